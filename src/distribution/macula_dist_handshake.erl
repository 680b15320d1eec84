%% @doc What OTP's handshake, and `dist_util' after it, see of a link.
%%
%% net_kernel asks for options in terms of TCP sockets. `nodelay' is the one that means something: QUIC never
%% delays, so both values are true to the letter, and what was set can be read back. It is kept by
%% the link's supervisor, in whose process these functions are called.
%% @private
-module(macula_dist_handshake).

-export([controller/3, data/2, begins_with/1, is_in_handshake_with/2, initial_options/0, check_options/1, read_options/2]).
%% Called by dist_util.
-export([hs_send/2, hs_recv/3, hs_options/1, hs_getll/1, hs_address/2, hs_complete/3, hs_tick/1,
         hs_getstat/1, hs_setopts/2, hs_getopts/2]).

-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/dist_util.hrl").

-define(DIALLED_BY, {?MODULE, dialled_by}).

%% @doc The controller of a link whose peer has proven itself.
-spec controller(Link :: reference(), node(), PeersLiveness :: pos_integer()) -> pid().
controller(Link, Node, PeersLiveness) ->
    Facts = #{trust => cookie, liveness_ms => min(macula_dist_parameters:own_liveness(), PeersLiveness)},
    case macula_dist_link:start_controller(Link, Facts) of
        {ok, Controller} -> Controller;
        {error, closed} -> ?shutdown(Node)
    end.

%% @doc What dist_util calls for as long as the link lives. No closures: those would go with the code they
%% were made in, and the link with them.
-spec data(Link :: reference(), Controller :: pid()) -> #hs_data{}.
data(Link, Controller) ->
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

%% @doc Notes that the caller is in OTP's handshake with this peer, which has dialled.
-spec begins_with(Peer :: binary()) -> ok.
begins_with(Peer) ->
    _ = put(?DIALLED_BY, Peer),
    ok.

%% @doc Whether the process is in OTP's handshake with this peer, which has dialled.
-spec is_in_handshake_with(pid(), Peer :: binary()) -> boolean().
is_in_handshake_with(Pid, Peer) ->
    case process_info(Pid, dictionary) of
        {dictionary, Dictionary} -> lists:member({?DIALLED_BY, Peer}, Dictionary);
        undefined -> false
    end.

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
    _ = erase(?DIALLED_BY),
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
                         protocol = macula_dist_parameters:protocol(), family = macula_dist_parameters:family()};
        false ->
            ?shutdown(no_node)
    end.

%% @doc The options of a link that begins.
-spec initial_options() -> #{nodelay := boolean()}.
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

%% @doc Whether all of these options can be set.
-spec check_options([term()]) -> ok | {error, term()}.
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

%% @doc The values of these options.
-spec read_options(map(), [term()]) -> {ok, [term()]} | {error, einval}.
read_options(Values, Options) ->
    case [Key || Key <- Options, not is_map_key(Key, Values)] of
        [] -> {ok, [{Key, maps:get(Key, Values)} || Key <- Options]};
        _ -> {error, einval}
    end.
