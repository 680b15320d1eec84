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
%% `-macula_dist_window BYTES' (of a lane, under way or unread; 8388608), `-macula_dist_streams N' (user streams that a peer may have open, see {@link macula_dist_stream}; 10000). From the
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

-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/logger.hrl").

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
    #net_address{host = Host, protocol = macula_dist_parameters:protocol(),
                 family = macula_dist_parameters:family()}.

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
    case macula_dist_listen:listen(Name, Host) of
        {ok, Endpoint, Node, Address, Creation} ->
            NetAddress = (address())#net_address{address = Address, host = Host},
            {ok, {{macula_dist, Endpoint, Node}, NetAddress, Creation}};
        {error, _} = Error ->
            Error
    end.

%% @doc Closes the node's port. Links that are up end with their processes.
-spec close(listen()) -> ok.
close({macula_dist, Endpoint, Node}) ->
    macula_dist_listen:close(Endpoint, Node).

%% --- accepting ------------------------------------------------------------------------------

%% @doc Starts the process that takes what arrives at the port.
-spec accept(listen()) -> pid().
accept({macula_dist, Endpoint, _Node}) ->
    macula_dist_accept:start(Endpoint).

%% @doc Starts the process that does OTP's handshake with a peer that has dialled.
-spec accept_connection(pid(), pid(), node(), [node()], non_neg_integer()) -> pid().
accept_connection(AcceptPid, _Socket, MyNode, Allowed, SetupTime) ->
    macula_dist_accept:start_handshake(AcceptPid, MyNode, Allowed, SetupTime).

%% --- dialling -------------------------------------------------------------------------------

%% @doc Starts the process that dials a node.
-spec setup(node(), normal | hidden, node(), longnames | shortnames, non_neg_integer()) -> pid().
setup(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    macula_dist_setup:start(Node, Type, MyNode, LongOrShortNames, SetupTime).

%% --- options --------------------------------------------------------------------------------

%% @doc Options for links to come: what `net_kernel:setopts(new, _)' asks of the port.
-spec setopts(listen(), [term()]) -> ok | {error, term()}.
setopts(_Listen, Options) ->
    macula_dist_handshake:check_options(Options).

%% @doc Options of the port.
-spec getopts(listen(), [term()]) -> {ok, [term()]} | {error, term()}.
getopts(_Listen, Options) ->
    macula_dist_handshake:read_options(macula_dist_handshake:initial_options(), Options).

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
