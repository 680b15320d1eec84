%% @doc The distribution over QUIC: `erl -proto_dist macula'.
%%
%% Nothing needs to be configured, and nothing but the start line changes:
%% ```
%% erl -pa EBIN -proto_dist macula -name a@127.0.0.1 -setcookie C
%% erl -pa EBIN -proto_dist macula -no_epmd -start_epmd false -name 4433@127.0.0.1 -setcookie C
%% '''
%% Every link is a QUIC connection (TLS 1.3, hybrid post-quantum key exchange) between two nodes that
%% have proven to each other that they know the cookie. A node has one UDP port for dialling and being
%% dialled.
%%
%% Command line: `-macula_dist_port P' (the UDP port), `-macula_dist_liveness Ms' (a peer whose
%% transport gives no sign of life is gone; 10000), `-macula_dist_congestion bbr|cubic', `-macula_dist_lanes 1|2',
%% `-macula_dist_streams N' (user streams that a peer may have open, see {@link macula_dist_stream}; 10000). From the
%% `kernel' application `inet_dist_use_interface', `inet_dist_listen_min' and `inet_dist_listen_max'
%% are obeyed, and of `inet_dist_listen_options' and `inet_dist_connect_options' what has a meaning for
%% a UDP socket: `recbuf', `sndbuf', `ip' and `ipv6_v6only'; a line in the log names the rest. A wrong value keeps the node from starting, with a line that says so.
%%
%% This module is called before any application is started: it relies on kernel and stdlib being there
%% to be called, and on nothing running but the kernel's first processes.
-module(macula_dist).

%% What net_kernel calls.
-export([listen/1, listen/2, accept/1, accept_connection/5, setup/5, close/1, select/1, address/0,
         childspecs/0, is_node_name/1, splitname/1, setopts/2, getopts/2]).
%% For people and the rest of the library.
-export([info/0, info/1, check_start_flags/0, proto_dist/2]).
%% Internal, spawned.
-export([accept_init/2, accept_loop/3, meet/3, do_accept/5, do_setup/6, do_open/1, do_dial/4]).
%% Internal, called by dist_util.
-export([hs_send/2, hs_recv/3, hs_options/1, hs_getll/1, hs_address/2, hs_complete/3, hs_tick/1,
         hs_getstat/1, hs_setopts/2, hs_getopts/2]).

-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/logger.hrl").

-define(ENDPOINT, {?MODULE, endpoint}).
-define(DIAL_LOG, {?MODULE, dial_log}).
%% The process that makes the endpoint of a node that does not listen.
-define(OPENER, macula_dist_opener).
-define(FAMILY, inet).
-define(PROTOCOL, quic).
-define(LIVENESS, 10000).
-define(STREAMS, 10000).
%% A peer that leaves during the handshake says no more (RFC 9000, section 10.2.3).
-define(APPLICATION_ERROR, 16#c).
%% How often a dial begins whose connection ends before the peer has proven itself.
-define(DIALS, 3).

%% How long an address is tried alone, in milliseconds.
-define(NEXT_ADDRESS, 250).

%% Refusals logged per period; an attacker shall not fill the disk.
-define(LOG_MAX, 20).
-define(LOG_PERIOD, 10000).

-type listen() :: {macula_dist, Endpoint :: reference(), Node :: string()}.
-export_type([listen/0]).

%% --- names ----------------------------------------------------------------------------------

%% @doc Whether this carrier may be able to reach the node: the name is legal. net_kernel asks this
%% itself, and has ticks to send and links to take meanwhile; so the host is looked up by the process
%% that dials.
-spec select(node()) -> boolean().
select(Node) ->
    is_node_name(Node).

%% @doc The address family and protocol of this carrier.
-spec address() -> #net_address{}.
address() ->
    {ok, Host} = inet:gethostname(),
    #net_address{host = Host, protocol = ?PROTOCOL, family = ?FAMILY}.

%% @doc Whether the atom or string is a node's name.
-spec is_node_name(term()) -> boolean().
is_node_name(Node) ->
    macula_dist_discovery:split(Node) =/= false.

%% @doc The port and host of a name that carries its port: `{4433, "10.0.0.5"}' for
%% `4433@10.0.0.5', `false' for any other.
-spec splitname(atom() | string()) -> {inet:port_number(), string()} | false.
splitname(Node) ->
    case macula_dist_discovery:split(Node) of
        {Port, Host} when is_integer(Port) -> {Port, Host};
        _ -> false
    end.

%% @doc What the distribution's supervisor shall start for this carrier: nothing, each process
%% belongs to a link or to net_kernel.
-spec childspecs() -> {ok, [supervisor:child_spec()]}.
childspecs() ->
    {ok, []}.

%% --- listening ------------------------------------------------------------------------------

%% @doc As `listen/2' with this host's name, for an OTP that knows no better.
-spec listen(atom()) -> {ok, {listen(), #net_address{}, integer()}} | {error, term()}.
listen(Name) ->
    {ok, Host} = inet:gethostname(),
    listen(Name, Host).

%% @doc Opens the node's UDP port and makes its name known.
-spec listen(atom(), string()) -> {ok, {listen(), #net_address{}, integer()}} | {error, term()}.
listen(Name, Host) ->
    _ = check_start_flags(),
    case macula_dist_nif:load() of
        ok ->
            listen_loaded(Name, Host);
        {error, Reason} ->
            Error = {error, {native_library_not_loaded, Reason}},
            ?LOG_CRITICAL("macula_dist: ~ts", [macula_dist_trust:format_error(element(2, Error))],
                          #{macula_dist => start}),
            Error
    end.

listen_loaded(Name, Host) ->
    load_configuration(),
    guard(),
    close_left_over(),
    NameString = atom_to_list(Name),
    Node = NameString ++ "@" ++ Host,
    case open(Node, true, macula_dist_discovery:ports(NameString)) of
        {ok, Endpoint, Address} ->
            Port = element(2, Address),
            case macula_dist_discovery:register(NameString, Host, Port) of
                ok ->
                    persistent_term:put(?ENDPOINT, Endpoint),
                    NetAddress = (address())#net_address{address = Address, host = Host},
                    {ok, {{macula_dist, Endpoint, Node}, NetAddress, creation()}};
                {error, _} = Error ->
                    close_endpoint(Endpoint),
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

%% The configuration is readable once the application is loaded, which nobody has done yet.
load_configuration() ->
    try application:load(macula) of
        _ -> ok
    catch
        _:_ -> ok
    end.

%% Peers are told when this VM crashes. Without it they find out after the liveness time.
guard() ->
    case macula_library:guard() of
        ok -> ok;
        {error, Why} -> ?LOG_WARNING("macula_dist: peers will not be told of a crash: ~0p", [Why])
    end.

open(_Node, _Listen, {error, _} = Error) ->
    Error;
open(Node, Listen, Ports) ->
    case endpoint_options(Node, Listen) of
        {ok, Ip, Options} -> open_first(Ip, Ports, Options);
        {error, _} = Error -> Error
    end.

open_first(Ip, [Port | Ports], Options) ->
    case open_port(Ip, Port, Options) of
        {error, eaddrinuse} when Ports =/= [] -> open_first(Ip, Ports, Options);
        Result -> Result
    end.

open_port(Ip, Port, Options) ->
    case macula_dist_nif:dist_endpoint(native({Ip, Port}), Options) of
        {error, eaddrinuse} = Error ->
            %% Perhaps our own from a moment ago, whose links are ending. The engine knows: a restart of
            %% the VM spares no process that could.
            Ref = make_ref(),
            Awaited = macula_dist_nif:dist_await_port(Port, Ref),
            %% Each fresh reference has its receive (macula_quic_call).
            _ = Awaited orelse (self() ! {Ref, nothing}),
            receive {Ref, _} -> ok end,
            case Awaited of
                true -> macula_dist_nif:dist_endpoint(native({Ip, Port}), Options);
                false -> Error
            end;
        Result ->
            Result
    end.

endpoint_options(Node, Listen) ->
    case {socket_options(Listen), liveness(), congestion(), lanes(), streams()} of
        {{ok, Ip, Socket}, {ok, Liveness}, {ok, Congestion}, {ok, Lanes}, {ok, Streams}} ->
            {ok, Ip, Socket#{listen => Listen,
                             reset_key => macula_dist_trust:endpoint_key(Node),
                             liveness => Liveness,
                             congestion => Congestion, lanes => Lanes, streams => Streams}};
        {{error, _} = Error, _, _, _, _} -> Error;
        {_, {error, _} = Error, _, _, _} -> Error;
        {_, _, {error, _} = Error, _, _} -> Error;
        {_, _, _, {error, _} = Error, _} -> Error;
        {_, _, _, _, {error, _} = Error} -> Error
    end.

%% What the kernel application's parameters ask of the one UDP socket. What stands first counts.
socket_options(Listen) ->
    Default = #{recbuf => 0, sndbuf => 0, only_v6 => false,
                %% Both families, where the system has both.
                ip => {0, 0, 0, 0, 0, 0, 0, 0}},
    Parameters = [inet_dist_listen_options || Listen] ++ [inet_dist_connect_options],
    Read = lists:foldl(fun read_parameter/2, interface(), Parameters),
    case Read of
        {ok, Asked} ->
            {Ip, Socket} = maps:take(ip, maps:merge(Default, Asked)),
            {ok, Ip, Socket};
        {error, _} = Error ->
            Error
    end.

interface() ->
    case application:get_env(kernel, inet_dist_use_interface) of
        {ok, Interface} ->
            case macula_dist_discovery:address(Interface) of
                {ok, Ip} -> {ok, #{ip => Ip}};
                error -> {error, {bad_option, inet_dist_use_interface, Interface}}
            end;
        undefined ->
            {ok, #{}}
    end.

read_parameter(_Parameter, {error, _} = Error) ->
    Error;
read_parameter(Parameter, {ok, Asked}) ->
    case application:get_env(kernel, Parameter, []) of
        Options when is_list(Options), length(Options) >= 0 ->
            read_options(Parameter, Options, Asked);
        Other ->
            {error, {bad_option, Parameter, Other}}
    end.

read_options(_Parameter, [], Asked) ->
    {ok, Asked};
read_options(Parameter, [Option | Options], Asked) ->
    case socket_option(Option) of
        {ok, Key, Value} ->
            _ = is_map_key(Key, Asked) andalso maps:get(Key, Asked) =/= Value
                andalso log_option(Parameter, Option, "the one UDP port has got another value"),
            read_options(Parameter, Options, maps:merge(#{Key => Value}, Asked));
        nothing_to_do ->
            read_options(Parameter, Options, Asked);
        unknown ->
            log_option(Parameter, Option, "it has no meaning for QUIC"),
            read_options(Parameter, Options, Asked);
        bad ->
            {error, {bad_option, Parameter, Option}}
    end.

socket_option({Size, N}) when Size =:= recbuf; Size =:= sndbuf ->
    case is_integer(N) andalso N > 0 andalso N =< 16#7fffffff of
        true -> {ok, Size, N};
        false -> bad
    end;
socket_option({Ip, Address}) when Ip =:= ip; Ip =:= ifaddr ->
    case macula_dist_discovery:address(Address) of
        {ok, Value} -> {ok, ip, Value};
        error -> bad
    end;
socket_option({ipv6_v6only, Only}) ->
    case is_boolean(Only) of
        true -> {ok, only_v6, Only};
        false -> bad
    end;
%% QUIC never delays.
socket_option({nodelay, Nodelay}) when is_boolean(Nodelay) ->
    nothing_to_do;
%% The service class and the priority of a datagram are set with each one, for its ECN bits.
socket_option(_) ->
    unknown.

log_option(Parameter, Option, Why) ->
    ?LOG_WARNING("macula_dist: ~0tp of ~s is not obeyed: ~s", [Option, Parameter, Why],
                 #{macula_dist => {option_not_obeyed, Parameter, Option}}).

liveness() ->
    case argument(macula_dist_liveness) of
        none -> {ok, ?LIVENESS};
        Text ->
            case string:to_integer(Text) of
                {Ms, ""} when is_integer(Ms), Ms >= 1000, Ms =< 600000 -> {ok, Ms};
                _ -> {error, {bad_option, macula_dist_liveness, Text}}
            end
    end.

%% As it was checked when the port was opened.
own_liveness() ->
    {ok, Liveness} = liveness(),
    Liveness.

congestion() ->
    case argument(macula_dist_congestion) of
        none -> {ok, bbr};
        "bbr" -> {ok, bbr};
        "cubic" -> {ok, cubic};
        Text -> {error, {bad_option, macula_dist_congestion, Text}}
    end.

lanes() ->
    case argument(macula_dist_lanes) of
        none -> {ok, 2};
        "2" -> {ok, 2};
        "1" -> {ok, 1};
        Text -> {error, {bad_option, macula_dist_lanes, Text}}
    end.

%% User streams that a peer may have open at a time.
streams() ->
    case argument(macula_dist_streams) of
        none -> {ok, ?STREAMS};
        Text ->
            case string:to_integer(Text) of
                {N, ""} when is_integer(N), N >= 0, N =< 100000 -> {ok, N};
                _ -> {error, {bad_option, macula_dist_streams, Text}}
            end
    end.

argument(Flag) ->
    case init:get_argument(Flag) of
        {ok, Values} -> string:join(lists:last(Values), " ");
        error -> none
    end.

%% Random, so that a node that starts again is never taken for what it was.
creation() ->
    case macula_dist_nif:dist_random() of
        %% The smallest ones have a meaning of old.
        <<Creation:32, _/binary>> when Creation >= 4 -> Creation;
        _ -> creation()
    end.

%% @doc Closes the node's port. Links that are up end with their processes.
-spec close(listen()) -> ok.
close({macula_dist, Endpoint, Node}) ->
    macula_dist_discovery:unregister(Node),
    _ = persistent_term:get(?ENDPOINT, none) =:= Endpoint andalso persistent_term:erase(?ENDPOINT),
    close_endpoint(Endpoint).

%% The port is free when the links have ended, which they do when net_kernel has.
close_endpoint(Endpoint) ->
    macula_dist_nif:dist_endpoint_close(Endpoint).

%% The endpoint of a net_kernel that could not close it: it was killed, or never listened.
close_left_over() ->
    case persistent_term:get(?ENDPOINT, none) of
        none ->
            ok;
        Endpoint ->
            _ = persistent_term:erase(?ENDPOINT),
            close_endpoint(Endpoint)
    end.

%% The endpoint to dial from. A node that does not listen gets one when it first dials.
endpoint(Node) ->
    case persistent_term:get(?ENDPOINT, none) of
        none ->
            %% By a process of its own, which a set-up that runs out of time does not take along.
            {Opener, Monitor} = spawn_monitor(?MODULE, do_open, [Node]),
            receive
                {'DOWN', Monitor, process, Opener, {opened, Result}} -> Result;
                {'DOWN', Monitor, process, Opener, Reason} -> {error, Reason}
            end;
        Endpoint ->
            {ok, Endpoint}
    end.

%% One at a time, by the registered name: of two endpoints the one that is not kept would be
%% collected, with the links that were made from it.
%% @private
-spec do_open(string()) -> no_return().
do_open(Node) ->
    try register(?OPENER, self()) of
        true ->
            exit({opened, open_to_dial(Node, persistent_term:get(?ENDPOINT, none))})
    catch
        error:badarg ->
            Monitor = erlang:monitor(process, ?OPENER),
            receive {'DOWN', Monitor, process, _, _} -> do_open(Node) end
    end.

open_to_dial(Node, none) ->
    load_configuration(),
    case macula_dist_nif:load() of
        ok -> open_loaded_to_dial(Node);
        {error, Reason} -> {error, {native_library_not_loaded, Reason}}
    end;
open_to_dial(_Node, Endpoint) ->
    {ok, Endpoint}.

open_loaded_to_dial(Node) ->
    guard(),
    case open(Node, false, [0]) of
        {ok, Endpoint, _Address} ->
            persistent_term:put(?ENDPOINT, Endpoint),
            {ok, Endpoint};
        {error, _} = Error ->
            Error
    end.

%% --- accepting ------------------------------------------------------------------------------

%% @doc Starts the process that takes what arrives at the port.
-spec accept(listen()) -> pid().
accept({macula_dist, Endpoint, _Node}) ->
    spawn_opt(?MODULE, accept_init, [self(), Endpoint], [link, {priority, max}]).

%% @private
-spec accept_init(pid(), reference()) -> no_return().
accept_init(Kernel, Endpoint) ->
    process_flag(trap_exit, true),
    case macula_dist_nif:dist_accept(Endpoint) of
        ok -> ?MODULE:accept_loop(Kernel, #{}, {erlang:monotonic_time(millisecond), 0});
        {error, closed} -> exit(closed)
    end.

%% It waits in hibernation: a process that waits in the code of this module would be killed when the
%% module has been loaded twice. The reference to a link that was met is garbage here, too, and keeps
%% the link alive until it is collected.
%%
%% Each peer is met by a process of its own, so a slow one keeps nobody waiting. How many are met at
%% a time is limited by the endpoint.
%% @private
-spec accept_loop(pid(), #{pid() => term()}, {integer(), non_neg_integer()}) -> no_return().
accept_loop(Kernel, Meeting, Log) ->
    receive
        {macula_dist_link, Link, Peer} ->
            Pid = spawn_opt(?MODULE, meet, [Kernel, Link, self()], [link, {priority, max}]),
            ?MODULE:accept_loop(Kernel, Meeting#{Pid => Peer}, Log);
        {macula_dist_refused, Peer, Why} ->
            ?MODULE:accept_loop(Kernel, Meeting, log(Peer, Why, Log));
        {macula_dist_socket, News, Address} ->
            log_socket(News, element(2, Address)),
            ?MODULE:accept_loop(Kernel, Meeting, Log);
        {'EXIT', Kernel, Reason} ->
            exit(Reason);
        {'EXIT', Pid, Reason} ->
            case maps:take(Pid, Meeting) of
                {Peer, Rest} ->
                    NewLog = case Reason of
                        normal -> Log;
                        {refused, Why} -> log(Peer, Why, Log);
                        Crash -> log(Peer, Crash, Log)
                    end,
                    ?MODULE:accept_loop(Kernel, Rest, NewLog);
                error ->
                    ?MODULE:accept_loop(Kernel, Meeting, Log)
            end;
        _ ->
            ?MODULE:accept_loop(Kernel, Meeting, Log)
    after 0 ->
        erlang:hibernate(?MODULE, accept_loop, [Kernel, Meeting, Log])
    end.

%% The endpoint makes at most two such messages a second.
log_socket(gone, Port) ->
    ?LOG_ERROR("macula_dist: the socket of UDP port ~w is gone; another is bound as soon as the port is free",
               [Port], #{macula_dist => socket});
log_socket(replaced, Port) ->
    ?LOG_NOTICE("macula_dist: another socket has UDP port ~w", [Port], #{macula_dist => socket});
log_socket(ended, Port) ->
    ?LOG_ERROR("macula_dist: nothing serves UDP port ~w any more", [Port], #{macula_dist => socket}).

%% A peer that leaves before its proof is no attack: so do nodes that dial each other at the same
%% moment, as one of the two calls is given up.
log(_Peer, {closed, _}, Log) ->
    Log;
log(_Peer, {application_closed, _}, Log) ->
    Log;
log(_Peer, {transport_error, ?APPLICATION_ERROR}, Log) ->
    Log;
log(Peer, Why, {Since, Count}) ->
    Now = erlang:monotonic_time(millisecond),
    if
        Now - Since > ?LOG_PERIOD ->
            log_unlogged(Count - ?LOG_MAX),
            macula_dist_trust:log_refused(Peer, Why),
            {Now, 1};
        Count < ?LOG_MAX ->
            macula_dist_trust:log_refused(Peer, Why),
            {Since, Count + 1};
        true ->
            {Since, Count + 1}
    end.

log_unlogged(Count) when Count > 0 ->
    ?LOG_ERROR("macula_dist: ~w more connections refused", [Count], #{macula_dist => refused});
log_unlogged(_) ->
    ok.

%% The same for dials, each by a process of its own: when the period began, and how many there were.
log_dial(Node, Why) ->
    Log = dial_log(),
    Now = erlang:monotonic_time(millisecond),
    Since = atomics:get(Log, 1),
    case Now - Since > ?LOG_PERIOD andalso atomics:compare_exchange(Log, 1, Since, Now) of
        ok ->
            log_unlogged(atomics:exchange(Log, 2, 1) - ?LOG_MAX),
            macula_dist_trust:log_refused({to, Node}, Why);
        _ ->
            case atomics:add_get(Log, 2, 1) =< ?LOG_MAX of
                true -> macula_dist_trust:log_refused({to, Node}, Why);
                false -> ok
            end
    end.

dial_log() ->
    case persistent_term:get(?DIAL_LOG, none) of
        none ->
            Log = atomics:new(2, [{signed, true}]),
            ok = atomics:put(Log, 1, erlang:monotonic_time(millisecond)),
            persistent_term:put(?DIAL_LOG, Log),
            Log;
        Log ->
            Log
    end.

%% Trust first: net_kernel hears of a peer when it has proven that it knows the cookie.
%% @private
-spec meet(pid(), reference(), pid()) -> ok.
meet(Kernel, Link, _AcceptLoop) ->
    true = macula_dist_nif:dist_own(Link),
    case macula_dist_trust:accept(Link, node(), own_liveness()) of
        {ok, Liveness} ->
            %% The link itself does not pass through net_kernel, where the reference would be
            %% garbage that keeps it alive.
            Kernel ! {accept, self(), self(), ?FAMILY, ?PROTOCOL},
            receive
                {Kernel, controller, Pid} ->
                    Monitor = erlang:monitor(process, Pid),
                    Pid ! {self(), controller, Link, Liveness},
                    %% The owner until there is another: the link lives as long as its owner.
                    receive
                        {Pid, has_it} -> ok;
                        {'DOWN', Monitor, process, Pid, _} -> ok
                    end;
                {Kernel, unsupported_protocol} ->
                    exit(unsupported_protocol)
            end;
        {error, Why} ->
            exit({refused, Why})
    end.

%% @doc Starts the process that does OTP's handshake with a peer that has dialled.
-spec accept_connection(pid(), pid(), node(), [node()], non_neg_integer()) -> pid().
accept_connection(AcceptPid, _Socket, MyNode, Allowed, SetupTime) ->
    spawn_opt(?MODULE, do_accept, [self(), AcceptPid, MyNode, Allowed, SetupTime],
              dist_util:net_ticker_spawn_options()).

%% @private
-spec do_accept(pid(), pid(), node(), [node()], non_neg_integer()) -> no_return().
do_accept(Kernel, AcceptPid, MyNode, Allowed, SetupTime) ->
    Monitor = erlang:monitor(process, AcceptPid),
    receive
        {AcceptPid, controller, Link, Liveness} ->
            _ = erlang:demonitor(Monitor, [flush]),
            Timer = dist_util:start_timer(SetupTime),
            Controller = controller(Link, MyNode, Liveness),
            AcceptPid ! {self(), has_it},
            check_ip(Link, MyNode),
            HSData = (hs_data(Link, Controller))#hs_data{
                kernel_pid = Kernel,
                this_node = MyNode,
                timer = Timer,
                allowed = Allowed},
            dist_util:handshake_other_started(HSData);
        {'DOWN', Monitor, process, AcceptPid, _} ->
            ?shutdown2(MyNode, connection_setup_failed)
    end.

%% `{kernel, [{check_ip, true}]}': only peers of networks this host is on.
check_ip(Link, MyNode) ->
    case application:get_env(check_ip) of
        {ok, true} ->
            Ip = element(1, macula_dist_nif:dist_peer(Link)),
            case is_neighbour(Ip) of
                true ->
                    ok;
                false ->
                    ?LOG_ERROR("** Connection attempt from disallowed IP ~w ** ~n", [Ip]),
                    ?shutdown(MyNode)
            end;
        _ ->
            ok
    end.

is_neighbour(Ip) ->
    {ok, Interfaces} = inet:getifaddrs(),
    Masked = fun(A, M) -> lists:zipwith(fun erlang:'band'/2, tuple_to_list(A), tuple_to_list(M)) end,
    lists:any(fun({Own, Mask}) ->
                  tuple_size(Own) =:= tuple_size(Ip) andalso Masked(Own, Mask) =:= Masked(Ip, Mask)
              end,
              [Pair || {_, Options} <- Interfaces, Pair <- pairs(Options)]).

%% The options of an interface list each address before its mask.
pairs([{addr, Addr}, {netmask, Mask} | Rest]) -> [{Addr, Mask} | pairs(Rest)];
pairs([_ | Rest]) -> pairs(Rest);
pairs([]) -> [].

%% --- dialling -------------------------------------------------------------------------------

%% @doc Starts the process that dials a node.
-spec setup(node(), normal | hidden, node(), longnames | shortnames, non_neg_integer()) -> pid().
setup(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    spawn_opt(?MODULE, do_setup, [self(), Node, Type, MyNode, LongOrShortNames, SetupTime],
              dist_util:net_ticker_spawn_options()).

%% @private
-spec do_setup(pid(), node(), normal | hidden, node(), longnames | shortnames,
               non_neg_integer()) -> no_return().
do_setup(Kernel, Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    Timer = dist_util:start_timer(SetupTime),
    check_name(Node, LongOrShortNames),
    case macula_dist_discovery:lookup(Node, SetupTime) of
        {ok, Addresses} ->
            dist_util:reset_timer(Timer),
            case dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, ?DIALS) of
                {ok, Link, Liveness} ->
                    Controller = controller(Link, Node, Liveness),
                    dist_util:reset_timer(Timer),
                    HSData = (hs_data(Link, Controller))#hs_data{
                        kernel_pid = Kernel,
                        other_node = Node,
                        this_node = MyNode,
                        timer = Timer,
                        other_version = 5,
                        request_type = Type},
                    dist_util:handshake_we_started(HSData);
                {refused, Reason} ->
                    log_dial(Node, Reason),
                    ?shutdown2(Node, {refused, Reason});
                {error, Reason} ->
                    ?shutdown2(Node, {dial_failed, Addresses, Reason})
            end;
        {error, Reason} ->
            ?shutdown2(Node, {lookup_failed, Reason})
    end.

%% A node that ends while it is dialled takes the connection along, and the node that follows in its
%% place may be waiting for this very dial: so the dial begins anew.
dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, Dials) ->
    case dial(atom_to_list(MyNode), Addresses, SetupTime) of
        {ok, Link} ->
            dist_util:reset_timer(Timer),
            case macula_dist_trust:dial(Link, MyNode, Node, auth:get_cookie(Node), own_liveness()) of
                {ok, Liveness} ->
                    dist_util:reset_timer(Timer),
                    {ok, Link, Liveness};
                {error, {closed, _}} when Dials > 1 ->
                    dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, Dials - 1);
                {error, Reason} ->
                    {refused, Reason}
            end;
        {error, _} = Error ->
            Error
    end.

check_name(Node, LongOrShortNames) ->
    case macula_dist_discovery:split(Node) of
        {_, Host} ->
            case macula_dist_discovery:check_name(Host, LongOrShortNames) of
                ok ->
                    ok;
                {error, not_longnames} ->
                    ?LOG_ERROR("** System running to use fully qualified hostnames **~n"
                               "** Hostname ~ts is illegal **~n", [Host]),
                    ?shutdown(Node);
                {error, not_shortnames} ->
                    ?LOG_ERROR("** System NOT running to use fully qualified hostnames **~n"
                               "** Hostname ~ts is illegal **~n", [Host]),
                    ?shutdown(Node)
            end;
        false ->
            ?LOG_ERROR("** Nodename ~p illegal **~n", [Node]),
            ?shutdown(Node)
    end.

dial(MyNode, Addresses, SetupTime) ->
    case endpoint(MyNode) of
        {ok, Endpoint} ->
            Deadline = erlang:monotonic_time(millisecond) + SetupTime,
            dial_each(Endpoint, Addresses, #{}, Deadline, no_address);
        {error, _} = Error ->
            Error
    end.

%% An address is tried when the one before has failed or has not answered for a moment, and the first
%% that answers counts: one that is silent takes neither the others' time nor their turn.
dial_each(Endpoint, [Address | Rest], Trying, Deadline, Last) ->
    Time = left(Deadline),
    {Dialler, Monitor} = spawn_monitor(?MODULE, do_dial, [self(), Endpoint, native(Address),
                                                          Time div (length(Rest) + 1)]),
    Next = case Rest of
        [] -> Time;
        _ -> min(?NEXT_ADDRESS, Time)
    end,
    await_dialled(Endpoint, Rest, Trying#{Dialler => Monitor}, Deadline, Last, Next);
dial_each(_Endpoint, [], Trying, _Deadline, Last) when map_size(Trying) =:= 0 ->
    {error, Last};
dial_each(Endpoint, [], Trying, Deadline, Last) ->
    await_dialled(Endpoint, [], Trying, Deadline, Last, left(Deadline)).

await_dialled(Endpoint, Rest, Trying, Deadline, Last, Time) ->
    receive
        {Dialler, dialled, Link} when is_map_key(Dialler, Trying) ->
            true = macula_dist_nif:dist_own(Link),
            give_up(Trying),
            {ok, Link};
        {'DOWN', _, process, Dialler, Reason} when is_map_key(Dialler, Trying) ->
            Why = case Reason of {dial_failed, Failure} -> Failure; _ -> Reason end,
            dial_each(Endpoint, Rest, maps:remove(Dialler, Trying), Deadline, Why)
    after Time ->
        case Rest of
            [] ->
                give_up(Trying),
                {error, case Last of no_address -> timeout; _ -> Last end};
            _ ->
                dial_each(Endpoint, Rest, Trying, Deadline, Last)
        end
    end.

%% A link that has been made all the same is ended: its reference is garbage here, and would keep it.
give_up(Trying) ->
    _ = [begin
             true = exit(Dialler, kill),
             receive {'DOWN', Monitor, process, Dialler, _} -> ok end,
             receive {Dialler, dialled, Link} -> macula_dist_nif:dist_stop(Link) after 0 -> ok end
         end || {Dialler, Monitor} <- maps:to_list(Trying)],
    ok.

left(Deadline) ->
    max(0, Deadline - erlang:monotonic_time(millisecond)).

%% @private
-spec do_dial(pid(), reference(), macula_dist_nif:dist_address(), non_neg_integer()) -> ok.
do_dial(Parent, Endpoint, Address, Time) ->
    %% The set-up timer may end the one that asked.
    Monitor = erlang:monitor(process, Parent),
    Ref = make_ref(),
    ok = macula_dist_nif:dist_connect(Endpoint, Address, Time, Ref),
    receive
        {Ref, {ok, Link}} ->
            Parent ! {self(), dialled, Link},
            %% Until the other has it.
            receive {'DOWN', Monitor, process, Parent, _} -> ok end;
        {Ref, {error, Why}} ->
            exit({dial_failed, Why});
        {'DOWN', Monitor, process, Parent, _} ->
            ok
    end.

%% An address as the engine takes it.
native({{Ip, Scope}, Port}) when is_tuple(Ip) -> {Ip, Port, Scope};
native({Ip, Port}) -> {Ip, Port}.

controller(Link, Node, PeersLiveness) ->
    Facts = #{trust => cookie, liveness_ms => min(own_liveness(), PeersLiveness)},
    case macula_dist_link:start_controller(Link, Facts) of
        {ok, Controller} -> Controller;
        {error, closed} -> ?shutdown(Node)
    end.

%% --- the handshake's view of a link ---------------------------------------------------------

%% What dist_util calls for as long as the link lives. No closures: those would go with the code they
%% were made in, and the link with them.
hs_data(Link, Controller) ->
    put_options(initial_options()),
    #hs_data{
        socket = {Controller, Link},
        this_flags = 0,
        reject_flags = reject_flags(),
        f_send = fun ?MODULE:hs_send/2,
        f_recv = fun ?MODULE:hs_recv/3,
        f_setopts_pre_nodeup = fun ?MODULE:hs_options/1,
        f_setopts_post_nodeup = fun ?MODULE:hs_options/1,
        f_getll = fun ?MODULE:hs_getll/1,
        f_address = fun ?MODULE:hs_address/2,
        f_handshake_complete = fun ?MODULE:hs_complete/3,
        mf_tick = fun ?MODULE:hs_tick/1,
        mf_getstat = fun ?MODULE:hs_getstat/1,
        mf_setopts = fun ?MODULE:hs_setopts/2,
        mf_getopts = fun ?MODULE:hs_getopts/2}.

-type hs_socket() :: {Controller :: pid(), Link :: reference()}.

%% @private
-spec hs_send(hs_socket(), iodata()) -> ok | {error, closed}.
hs_send({_, Link}, Packet) ->
    macula_dist_link:send_frame(Link, Packet).

%% @private
-spec hs_recv(hs_socket(), non_neg_integer(), timeout()) -> {ok, [byte()]} | {error, closed}.
hs_recv({_, Link}, _Length, Timeout) ->
    case macula_dist_link:recv_frame(Link, Timeout) of
        {ok, Frame} -> {ok, binary_to_list(Frame)};
        {error, _} -> {error, closed}
    end.

%% @private
-spec hs_options(hs_socket()) -> ok.
hs_options(_) ->
    ok.

%% @private
-spec hs_getll(hs_socket()) -> {ok, pid()}.
hs_getll({Controller, _}) ->
    macula_dist_link:call(Controller, getll).

%% @private
-spec hs_address(hs_socket(), node()) -> #net_address{}.
hs_address({_, Link}, Node) ->
    peer_address(Link, Node).

%% @private
-spec hs_complete(hs_socket(), node(), erlang:dist_handle()) -> ok.
hs_complete({Controller, _}, Node, DHandle) ->
    macula_dist_link:call(Controller, {handshake_complete, Node, DHandle}).

%% @private
-spec hs_tick(hs_socket()) -> ok.
hs_tick({_, Link}) ->
    macula_dist_link:tick(Link).

%% @private
-spec hs_getstat(hs_socket()) -> {ok, non_neg_integer(), non_neg_integer(), 0}.
hs_getstat({_, Link}) ->
    macula_dist_link:getstat(Link).

%% @private
-spec hs_setopts(hs_socket(), [term()]) -> ok | {error, term()}.
hs_setopts(_, Options) ->
    set_link_options(Options).

%% @private
-spec hs_getopts(hs_socket(), [term()]) -> {ok, [term()]} | {error, term()}.
hs_getopts(_, Options) ->
    get_link_options(Options).

%% What needs packets in one strict order, as the atom cache does, is left out: lanes keep the order
%% per sender.
reject_flags() ->
    dist_util:strict_order_flags().

peer_address(Link, Node) ->
    case macula_dist_discovery:split(Node) of
        {_, Host} ->
            #net_address{address = macula_dist_nif:dist_peer(Link), host = Host,
                         protocol = ?PROTOCOL, family = ?FAMILY};
        false ->
            ?shutdown(no_node)
    end.

%% --- options --------------------------------------------------------------------------------
%% net_kernel asks in terms of TCP sockets. `nodelay' is the one that means something: QUIC never
%% delays, so both values are true to the letter, and what was set can be read back. It is kept by
%% the link's supervisor, in whose process these functions are called.

%% @doc Options for links to come: what `net_kernel:setopts(new, _)' asks of the port.
-spec setopts(listen(), [term()]) -> ok | {error, term()}.
setopts(_Listen, Options) ->
    check_options(Options).

%% @doc Options of the port.
-spec getopts(listen(), [term()]) -> {ok, [term()]} | {error, term()}.
getopts(_Listen, Options) ->
    read_options(initial_options(), Options).

initial_options() ->
    Nodelay = application:get_env(kernel, dist_nodelay, true),
    #{nodelay => case Nodelay of false -> false; _ -> true end}.

put_options(Options) ->
    _ = put(?MODULE, Options),
    ok.

set_link_options(Options) ->
    case check_options(Options) of
        ok -> put_options(maps:merge(get(?MODULE), maps:from_list(Options)));
        {error, _} = Error -> Error
    end.

get_link_options(Options) ->
    read_options(get(?MODULE), Options).

check_options(Options) ->
    case [Option || {Key, _} = Option <- Options,
                    Key =:= active orelse Key =:= deliver orelse Key =:= packet] of
        [] ->
            case lists:all(fun({nodelay, Value}) -> is_boolean(Value); (_) -> false end, Options) of
                true -> ok;
                false -> {error, einval}
            end;
        Bad ->
            {error, {badopts, Bad}}
    end.

read_options(Values, Options) ->
    case [Key || Key <- Options, not is_map_key(Key, Values)] of
        [] -> {ok, [{Key, maps:get(Key, Values)} || Key <- Options]};
        _ -> {error, einval}
    end.

%% --- for people -----------------------------------------------------------------------------

%% @doc The state of each link of this node that is up: see `info/1'.
-spec info() -> #{node() => map()}.
info() ->
    _ = check_start_flags(),
    maps:from_list([{Node, Info} || Node <- nodes(connected), {ok, Info} <- [link_info(Node)]]).

%% @doc The state of the link to a node: its UDP address, trust mode, liveness time (`liveness_ms', the
%% smaller one of both nodes'), cipher, key exchange, round trip in microseconds, path MTU in bytes, congestion window, and counters since the link is up.
-spec info(node()) -> {ok, map()} | {error, not_connected}.
info(Node) ->
    _ = check_start_flags(),
    link_info(Node).

link_info(Node) ->
    case [Ctrl || {N, Ctrl} <- erlang:system_info(dist_ctrl), N =:= Node, is_pid(Ctrl)] of
        [Controller] ->
            case macula_dist_link:info(Controller) of
                {ok, Info} -> {ok, Info};
                error -> {error, not_connected}
            end;
        _ ->
            {error, not_connected}
    end.

%% @doc Shouts when the node was started in a way that leaves this carrier out.
%%
%% `-proto_dist' given more than once (`ERL_AFLAGS' included) makes net_kernel use unencrypted TCP
%% without a word before OTP 27.1, and the first of them, with a warning, from then on.
-spec check_start_flags() -> ok | {error, proto_dist_given_twice}.
check_start_flags() ->
    case init:get_argument(proto_dist) of
        {ok, [_, _ | _] = Values} ->
            Used = proto_dist(kernel_version(), Values),
            case lists:member("macula", lists:append(Values)) andalso
                not lists:member("macula", Used) of
                true ->
                    ?LOG_CRITICAL("macula_dist: -proto_dist is given ~w times (~0p), of which this OTP "
                                  "takes ~ts: the distribution of this node is NOT over macula~ts. "
                                  "Give it once; look at ERL_AFLAGS, ERL_FLAGS, ERL_ZFLAGS and "
                                  "vm.args.",
                                  [length(Values), Values, taken(Values, Used), unencrypted(Used)],
                                  #{macula_dist => start_flags}),
                    {error, proto_dist_given_twice};
                false ->
                    ok
            end;
        _ ->
            ok
    end.

taken([Used | _], Used) -> "the first";
taken(_, _) -> "none".

unencrypted(["inet_tls"]) -> "";
unencrypted(["inet6_tls"]) -> "";
unencrypted(_) -> " but UNENCRYPTED".

%% @doc The carriers that net_kernel uses when `-proto_dist' is given with these lists of values.
%% @private
-spec proto_dist([non_neg_integer()], [[string()]]) -> [string()].
proto_dist(_Kernel, [Once]) -> Once;
%% OTP 27.1.
proto_dist(Kernel, [First | _]) when Kernel >= [10, 1] -> First;
proto_dist(_Kernel, _) -> ["inet_tcp"].

kernel_version() ->
    {ok, Version} = application:get_key(kernel, vsn),
    [case string:to_integer(Part) of {N, _} when is_integer(N) -> N; _ -> 0 end
     || Part <- string:lexemes(Version, ".-")].
