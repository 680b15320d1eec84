%% @doc Peers that dial this node: the process that takes what arrives at the port, one that meets each peer,
%% and one for OTP's handshake.
%% @private
-module(macula_dist_accept).

-export([start/1, start_handshake/4]).
%% Spawned.
-export([accept_init/2, accept_loop/3, meet/2, do_accept/5]).

-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/logger.hrl").

%% @doc Starts the process that takes what arrives at the port.
-spec start(Endpoint :: reference()) -> pid().
start(Endpoint) ->
    spawn_opt(?MODULE, accept_init, [self(), Endpoint], [link, {priority, max}]).

%% @private
-spec accept_init(pid(), reference()) -> no_return().
accept_init(Kernel, Endpoint) ->
    process_flag(trap_exit, true),
    case macula_dist_nif:dist_accept(Endpoint) of
        ok -> ?MODULE:accept_loop(Kernel, #{}, macula_dist_refusals:new());
        {error, closed} -> exit(closed)
    end.

%% It waits in hibernation: a process that waits in the code of this module would be killed when the
%% module has been loaded twice. The reference to a link that was met is garbage here, too, and keeps
%% the link alive until it is collected.
%%
%% Each peer is met by a process of its own, so a slow one keeps nobody waiting. How many are met at
%% a time is limited by the endpoint.
%% @private
-spec accept_loop(pid(), #{pid() => term()}, macula_dist_refusals:log()) -> no_return().
accept_loop(Kernel, Meeting, Log) ->
    receive
        {macula_dist_link, Link, Peer} ->
            Pid = spawn_opt(?MODULE, meet, [Kernel, Link], [link, {priority, max}]),
            ?MODULE:accept_loop(Kernel, Meeting#{Pid => Peer}, Log);
        {macula_dist_refused, Peer, Why} ->
            ?MODULE:accept_loop(Kernel, Meeting, macula_dist_refusals:log(Peer, Why, Log));
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
                        {refused, Why} -> macula_dist_refusals:log(Peer, Why, Log);
                        Crash -> macula_dist_refusals:log(Peer, Crash, Log)
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
log_socket(failed, Port) ->
    ?LOG_ERROR("macula_dist: what serves UDP port ~w has failed and begins anew; its links are lost",
               [Port], #{macula_dist => socket}).

%% Trust first: net_kernel hears of a peer when it has proven that it knows the cookie.
%% @private
-spec meet(pid(), reference()) -> ok.
meet(Kernel, Link) ->
    true = macula_dist_nif:dist_own(Link, [self()]),
    case macula_dist_trust:accept(Link, node(), macula_dist_parameters:own_liveness()) of
        {ok, Peer, Liveness} ->
            give_up_earlier(Kernel, Peer),
            %% The link itself does not pass through net_kernel, where the reference would be
            %% garbage that keeps it alive.
            Kernel ! {accept, self(), self(), macula_dist_parameters:family(), macula_dist_parameters:protocol()},
            receive
                {Kernel, controller, Pid} ->
                    Monitor = erlang:monitor(process, Pid),
                    Pid ! {self(), controller, Link, Peer, Liveness},
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

%% A node dials another once at a time: one that dials again, before OTP's handshake of the time before is over, has
%% ended in between or has given up. Over TCP the system tells so. Until net_kernel hears it, the
%% new dial is refused for the sake of the old one.
give_up_earlier(Kernel, Peer) ->
    {links, Links} = process_info(Kernel, links),
    _ = [begin
             Monitor = erlang:monitor(process, Pid),
             true = exit(Pid, kill),
             receive {'DOWN', Monitor, process, Pid, _} -> ok end
         end || Pid <- Links, is_pid(Pid), macula_dist_handshake:is_in_handshake_with(Pid, Peer)],
    ok.

%% @doc Starts the process that does OTP's handshake with a peer that has dialled.
-spec start_handshake(pid(), node(), [node()], non_neg_integer()) -> pid().
start_handshake(AcceptPid, MyNode, Allowed, SetupTime) ->
    spawn_opt(?MODULE, do_accept, [self(), AcceptPid, MyNode, Allowed, SetupTime],
              dist_util:net_ticker_spawn_options()).

%% @private
-spec do_accept(pid(), pid(), node(), [node()], non_neg_integer()) -> no_return().
do_accept(Kernel, AcceptPid, MyNode, Allowed, SetupTime) ->
    Monitor = erlang:monitor(process, AcceptPid),
    receive
        {AcceptPid, controller, Link, Peer, Liveness} ->
            _ = erlang:demonitor(Monitor, [flush]),
            macula_dist_handshake:begins_with(Peer),
            Timer = dist_util:start_timer(SetupTime),
            Controller = macula_dist_handshake:controller(Link, MyNode, Liveness),
            AcceptPid ! {self(), has_it},
            check_ip(Link, MyNode),
            HSData = (macula_dist_handshake:data(Link, Controller))#hs_data{
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
