%% @doc One dial. Dialling waits, and a worker must not, so that is done by a process of its own; whoever
%% is killed loses its connection, which is how a dial is given up.
%% @private
-module(macula_peering_attempt).

-include("macula_peering.hrl").

-export([dialling/3]).

%% @doc Dials for the worker, and exits with `{dialled, {ok, Conn, Stream}}', which the worker owns then, or
%% with `{dialled, {error, Reason}}'. The reason `{ended, What, Detail}' is the last message of a connection.
-spec dialling(map(), map(), pid()) -> no_return().
dialling(Target, Opts, Worker) ->
    exit({dialled, dial(Target, Opts, Worker)}).

dial(#{host := Host, port := Port, timeout_ms := Timeout} = Target, Opts, Worker) ->
    Deadline = macula_quic_call:deadline(Timeout),
    case macula_quic:connect(Host, Port, quic_opts(Target, Opts), Timeout) of
        {ok, Conn} ->
            Left = macula_quic_call:left(Deadline),
            case macula_quic:open_stream(Conn, #{timeout => max(1, Left)}) of
                {ok, Stream} -> hand_over(Conn, Stream, Worker);
                {error, Reason} -> {error, last_word(open_stream_failed, Reason, Conn)}
            end;
        {error, Reason} ->
            {error, {connect_failed, Reason}}
    end.

hand_over(Conn, Stream, Worker) ->
    case give([Stream, Conn], Worker) of
        ok -> {ok, Conn, Stream};
        {error, Reason} -> {error, last_word(connect_failed, Reason, Conn)}
    end.

give([], _) -> ok;
give([Handle | Handles], Worker) ->
    case macula_quic:controlling_process(Handle, Worker) of
        ok -> give(Handles, Worker);
        Error -> Error
    end.

%% Why a connection has ended that refuses what is asked of it: its message may still be under way.
last_word(What, closed, Conn) ->
    receive
        {quic, End, Conn, Reason} when ?IS_END(End) -> {ended, End, Reason}
    after ?LAST_WORD ->
        {What, closed}
    end;
last_word(What, Reason, _) ->
    {What, Reason}.

quic_opts(#{alpn := Alpn} = Target, #{idle_timeout_ms := Idle, keep_alive_interval_ms := Alive}) ->
    [{alpn, Alpn}, {idle_timeout_ms, Idle}, {keep_alive_interval_ms, Alive},
     {datagram_receive_enabled, false}, {peer_unidi_stream_count, 0},
     {conn_flow_control_window, ?HANDSHAKE_BYTES}]
    ++ trust(Target)
    ++ [{Option, Value} || {Key, Option} <- [{cacertfile, cacertfile},
                                             {server_name, server_name_indication},
                                             {local_address, local_address}],
                           #{Key := Value} <- [Target], Value =/= undefined].

trust(#{tls := pin, node_id := NodeId}) -> [{verify_pubkey, NodeId}];
trust(#{tls := none}) -> [{verify, verify_none}];
trust(#{tls := webpki}) -> [{verify, verify_peer}].
