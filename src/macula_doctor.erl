%% @doc What may be wrong with macula in this VM, and with the way to another node.
%% @private
-module(macula_doctor).

-export([here/0, peer/1, format/1, library/0]).

-include_lib("kernel/include/file.hrl").

%% What a native socket asks for (udp/socket.rs).
-define(BUFFER, 4 * 1024 * 1024).

-define(SHORT_COOKIE, 16).

-define(LOOKUP, 2000).

%% --- this VM --------------------------------------------------------------------------------

-spec here() -> [macula:finding()].
here() ->
    case library() of
        ok -> start_flags() ++ carrier() ++ udp_buffer();
        Reason -> [{error, {native_library, Reason}}]
    end.

%% @doc Whether the native library is there, or why not.
-spec library() -> ok | term().
library() ->
    try macula_nif:live_objects() of
        _ -> ok
    catch
        error:Reason -> Reason
    end.

start_flags() ->
    case macula_dist:check_start_flags() of
        ok -> [];
        {error, Reason} -> [{error, Reason}]
    end.

carrier() ->
    case {is_alive(), is_carrier()} of
        {false, _} -> [];
        {true, false} -> [{warning, {other_carrier, node()}}];
        {true, true} -> cookie() ++ own_name()
    end.

%% The distribution of this VM has a port.
is_carrier() ->
    proplists:get_value(dist_endpoint, macula_nif:live_objects()) > 0.

cookie() ->
    case length(atom_to_list(erlang:get_cookie())) < ?SHORT_COOKIE of
        true -> [{warning, short_cookie}];
        false -> []
    end.

own_name() ->
    case macula_dist_discovery:lookup(node(), ?LOOKUP) of
        {ok, _} -> [];
        {error, Reason} -> [{error, {unknown_node, node(), Reason}}]
    end.

%% A socket of the VM's is given what this system gives to everybody. Root may have more.
udp_buffer() ->
    case gen_udp:open(0, [{recbuf, ?BUFFER}]) of
        {ok, Socket} ->
            {ok, [{recbuf, Bytes}]} = inet:getopts(Socket, [recbuf]),
            ok = gen_udp:close(Socket),
            case Bytes < ?BUFFER andalso not is_root() of
                true -> [{warning, {udp_buffer, Bytes}}];
                false -> []
            end;
        {error, Reason} ->
            [{error, {no_socket, Reason}}]
    end.

is_root() ->
    case file:read_file_info("/proc/self") of
        {ok, #file_info{uid = Uid}} -> Uid =:= 0;
        {error, _} -> false
    end.

%% --- another node ---------------------------------------------------------------------------

-spec peer(node()) -> [macula:finding()].
peer(Node) ->
    case {library(), is_alive() andalso is_carrier()} of
        {ok, true} -> peer_of_node(Node);
        {ok, false} -> [{error, case is_alive() of true -> {other_carrier, node()}; false -> not_alive end}];
        {Reason, _} -> [{error, {native_library, Reason}}]
    end.

peer_of_node(Node) ->
    case net_kernel:connect_node(Node) of
        true ->
            [];
        _ ->
            case macula_dist_setup:try_out(Node) of
                ok -> [{error, {handshake_failed, Node}}];
                {error, What} -> [{error, What}]
            end
    end.

%% --- words ----------------------------------------------------------------------------------

-spec format(term()) -> iodata().
format({native_library, Reason}) ->
    io_lib:format("the native library could not be loaded (~0tp)", [Reason]);
format(proto_dist_given_twice) ->
    "-proto_dist is given more than once, and this OTP leaves macula out";
format({unknown_node, Node, Reason}) ->
    io_lib:format("nobody knows an address of ~ts (~0tp)", [Node, Reason]);
format({no_answer, Node, Addresses, Reason}) ->
    io_lib:format("~ts is not connected: nothing answers at ~ts (~0tp)",
                  [Node, lists:join(", ", [address(A) || A <- Addresses]), Reason]);
format({refused, Node, Reason}) ->
    io_lib:format("~ts is not connected: ~ts", [Node, macula_dist_trust:format_error(Reason)]);
format({handshake_failed, Node}) ->
    io_lib:format("~ts answers and has the same cookie, but OTP's handshake has failed: a node with this node's name may "
                  "be connected there, or it allows other nodes only (net_kernel:allow/1)", [Node]);
format(not_alive) ->
    "this VM is no node";
format({other_carrier, Node}) ->
    io_lib:format("the distribution of ~ts is not over macula: it was started without -proto_dist macula", [Node]);
format(short_cookie) ->
    io_lib:format("the cookie has fewer than ~b characters, and may be guessed", [?SHORT_COOKIE]);
format({no_socket, Reason}) ->
    io_lib:format("the system gives this VM no UDP socket (~0tp)", [Reason]);
format({udp_buffer, Bytes}) ->
    io_lib:format("the system limits the buffers of UDP sockets to ~b bytes, and bursts of datagrams may be lost: raise "
                  "net.core.rmem_max and net.core.wmem_max to ~b", [Bytes, ?BUFFER]);
format(Other) ->
    io_lib:format("~0tp", [Other]).

address(Address) ->
    macula_dist_trust:format_address(macula_dist_listen:native(Address)).
