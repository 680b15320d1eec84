%% Conversations of any content, in any order, cut anywhere: each worker tells of its end once, and
%% nothing of a conversation stays behind.
-module(prop_macula_peering).

-include("../support/macula_proper.hrl").

-export([prop_any_dialler_is_survived/0, prop_any_station_is_survived/0]).

-define(WAIT, 15000).

prop_any_dialler_is_survived() ->
    {ok, _} = application:ensure_all_started(macula),
    Server = identity(),
    {ok, L} = macula_peering:listen(#{identity => Server, port => 0, address => {127, 0, 0, 1},
                                      drain_timeout_ms => 100, replay_cache => false,
                                      verify_frames => #{dht => require, rpc => report}}),
    {ok, {_, Port}} = macula_peering:sockname(L),
    Client = identity(),
    ?FORALL(Steps, steps(Client, connect(Client)),
        begin
            {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}], ?WAIT),
            {ok, Stream} = macula_quic:open_stream(Conn),
            run(Steps, Conn, Stream),
            ok = macula_quic:close_connection(Conn),
            %% There is a worker from the moment the listener has seen the connection; if it sees
            %% one late, a later conversation hears of that.
            Ended = ended(L, []),
            {ok, #{handshaking := 0, links := 0}} = settled(L),
            drop(),
            Told = [Pid || {{told, Pid}, _} <- get()],
            _ = [put({told, Pid}, true) || Pid <- Ended],
            equals([], Ended -- lists:usort(Ended -- Told))
        end).

prop_any_station_is_survived() ->
    {ok, _} = application:ensure_all_started(macula),
    Server = identity(),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(
        macula_identity:public(Server), macula_identity:seed(Server), []),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, [{cert, Cert}, {key, Key}]),
    {ok, {_, Port}} = macula_quic:sockname(L),
    Client = identity(),
    ?FORALL(Steps, steps(Server, hello(Server)),
        begin
            {ok, C} = macula_peering:connect(#{
                identity => Client, drain_timeout_ms => 100,
                target => #{host => "127.0.0.1", port => Port,
                            node_id => macula_identity:public(Server)}}),
            {ok, Conn} = macula_quic:accept(L, ?WAIT),
            {ok, Stream} = macula_quic:accept_stream(Conn, #{}, ?WAIT),
            run(Steps, Conn, Stream),
            ok = macula_quic:close_connection(Conn),
            receive {macula_peering, disconnected, C, _} -> ok after ?WAIT -> error(no_end) end,
            _ = sys:get_state(macula_peering_links),
            Again = receive {macula_peering, disconnected, C, Why} -> {again, Why} after 0 -> once end,
            drop(),
            equals(once, Again)
        end).

identity() ->
    {ok, Id} = macula_identity:generate(#{puzzle_bits => 0}),
    Id.

%% What has been written before the connection may have been closed already by the other side.
run(Steps, Conn, Stream) ->
    lists:foreach(fun
        ({send, Bytes, 0}) -> _ = macula_quic:send(Stream, Bytes);
        ({send, Bytes, Cut}) ->
            At = Cut rem (byte_size(Bytes) + 1),
            <<First:At/binary, Second/binary>> = Bytes,
            _ = macula_quic:send(Stream, First),
            erlang:yield(),
            _ = macula_quic:send(Stream, Second);
        (fin) -> _ = macula_quic:async_shutdown_stream(Stream, graceful, 0);
        ({reset, Code}) -> _ = macula_quic:async_shutdown_stream(Stream, abort_send, Code);
        ({stop, Code}) -> _ = macula_quic:async_shutdown_stream(Stream, abort_receive, Code);
        ({other, Bytes}) ->
            case macula_quic:open_stream(Conn) of
                {ok, Other} -> put({held, Other}, held), _ = macula_quic:send(Other, Bytes);
                {error, _} -> ok
            end
    end, Steps),
    [erase(Key) || {{held, _} = Key, _} <- get()].

%% Which workers have told of their end when the listener knows none.
ended(L, Told) ->
    receive
        {macula_peering, disconnected, Pid, _} -> ended(L, [Pid | Told])
    after 0 ->
        case {macula_peering:listener_info(L),
              proplists:get_value(active, supervisor:count_children(macula_peering_conn_sup))} of
            {{ok, #{handshaking := 0, links := 0}}, 0} when Told =/= [] -> flush_ended(Told);
            _ -> receive {macula_peering, disconnected, Pid, _} -> ended(L, [Pid | Told])
                 after 50 -> if Told =/= [] -> ended(L, Told); true -> none_came(L) end
                 end
        end
    end.

%% A connection that was over before the listener took it has no worker.
none_came(L) ->
    _ = sys:get_state(L),
    receive {macula_peering, disconnected, Pid, _} -> ended(L, [Pid]) after 200 -> [] end.

flush_ended(Told) ->
    _ = sys:get_state(macula_peering_links),
    receive {macula_peering, disconnected, Pid, _} -> flush_ended([Pid | Told]) after 0 -> Told end.

settled(L) ->
    macula_test_nodes:wait_until(fun() ->
        case macula_peering:listener_info(L) of
            {ok, #{handshaking := 0, links := 0}} = Info -> {value, Info};
            _ -> false
        end
    end).

drop() ->
    receive _ -> drop() after 0 -> ok end.

%% Most conversations begin as they should, or they would all end there.
steps(Id, First) ->
    ?LET({Begin, Rest}, {frequency([{3, [First]}, {1, []}]), list(step(Id, First))}, Begin ++ Rest).

step(Id, First) ->
    frequency([
        {6, ?LET({F, Cut}, {frame(Id), cut()}, {send, F, Cut})},
        {2, ?LET({B, Cut}, {binary(), cut()}, {send, <<(byte_size(B)):32, B/binary>>, Cut})},
        {2, ?LET(B, binary(), {send, B, 0})},
        {1, First},
        {1, ?LET(B, oneof([binary(), frame(Id)]), {other, B})},
        {1, oneof([fin, {reset, range(0, 100)}, {stop, range(0, 100)}])}]).

cut() ->
    oneof([0, pos_integer()]).

frame(Id) ->
    ?LET({Frame, Signed}, {oneof([ping(), goodbye(), novelty()]), boolean()},
         macula_frame:encode(case Signed of
             true -> macula_frame:sign(Frame, Id);
             false -> Frame
         end)).

ping() -> ?LET(N, binary(16), macula_frame:ping(#{nonce => N})).
goodbye() -> ?LET(_, boolean(), macula_frame:goodbye(operator_stop)).
novelty() -> ?LET(T, binary(4), (macula_frame:ping(#{nonce => <<0:128>>}))#{
    frame_type => {text, base64:encode(T)}}).

connect(Id) ->
    Public = macula_identity:public(Id),
    ?LET(_, boolean(), {send, macula_frame:encode(macula_frame:sign(macula_frame:connect(#{
        node_id => Public, station_id => Public,
        puzzle_evidence => macula_identity:puzzle_evidence(Id)}), Id)), 0}).

hello(Id) ->
    Public = macula_identity:public(Id),
    ?LET(Accepted, frequency([{5, true}, {1, false}]),
         {send, macula_frame:encode(macula_frame:sign(macula_frame:hello(#{
             node_id => Public, station_id => Public, accepted => Accepted,
             negotiated_capabilities => 0}), Id)), 0}).
