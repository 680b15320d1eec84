%% What nobody holds is gone, what has promised messages is kept, and nothing is left behind.
-module(macula_quic_collector_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([dropped_handles_are_collected/1, a_dropped_connection_is_closed/1,
         a_dropped_stream_is_finished/1, what_was_sent_outlives_its_handles/1,
         a_listener_that_nobody_got_is_closed/1, a_dropped_listener_stops/1,
         a_finished_stream_may_be_dropped/1, a_closed_stream_still_says_so/1,
         a_stream_keeps_its_connection/1, active_streams_are_kept/1, armed_listeners_are_kept/1,
         accepting_connections_are_kept/1, passive_streams_are_not_kept/1,
         disarmed_handles_are_collected/1, datagrams_keep_while_they_are_wanted/1,
         a_handle_in_a_call_is_kept/1, handles_in_messages_are_kept/1]).

-import(macula_quic_lab, [await_objects/1, loose_pair/0, loose_stream/1, loose_listen/0, client_options/0]).

all() -> macula_quic_lab:cases(?MODULE, []).

init_per_suite(Config) ->
    Config.

end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

init_per_testcase(_Case, Config) ->
    macula_quic_lab:drained(),
    Config.

end_per_testcase(_Case, _Config) ->
    ok.

%% Handles that a test is to let go of are made in a function that has returned.
counts(Listeners, Connections, Streams) ->
    await_objects([{connection, Connections}, {listener, Listeners}, {stream, Streams}]).

%% The same, with nothing left in the mailbox: when one end of a stream is collected before the other,
%% this one's owner hears of it, and the message holds the handle.
counts_without_mail(Listeners, Connections, Streams) ->
    Wanted = [{connection, Connections}, {listener, Listeners}, {stream, Streams}],
    macula_test_nodes:wait_until(fun() ->
        _ = macula_quic_lab:mailbox(),
        Now = macula_quic_lab:objects(),
        Wanted -- Now =:= [] orelse Now
    end, 45000).

collect() ->
    lists:foreach(fun erlang:garbage_collect/1, processes()).

dropped_handles_are_collected(_Config) ->
    ok = make_and_drop(),
    counts(0, 0, 0).

make_and_drop() ->
    [begin
         Pair = loose_pair(),
         _ = [loose_stream(Pair) || _ <- lists:seq(1, 5)],
         ok
     end || _ <- lists:seq(1, 5)],
    ok.

a_dropped_connection_is_closed(_Config) ->
    {L, Port} = loose_listen(),
    ok = dial_and_drop(L, Port),
    S = receive {accepted, Conn} -> Conn end,
    collect(),
    ?EXPECT({quic, shutdown, S, {application_close, 0, <<>>}}).

dial_and_drop(L, Port) ->
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    {ok, S} = macula_quic:accept(L, 5000),
    self() ! {accepted, S},
    {ok, C} = macula_quic:handshake(C),
    ok.

a_dropped_stream_is_finished(_Config) ->
    #{client := C, server := S} = Pair = loose_pair(),
    There = open_and_drop(Pair),
    collect(),
    ?EXPECT({quic, peer_receive_aborted, There, 0}),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)),
    ?EXPECT({quic, stream_closed, There, _}),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

open_and_drop(Pair) ->
    element(2, loose_stream(Pair)).

%% Neither the stream nor its connection is held when the data is read.
what_was_sent_outlives_its_handles(_Config) ->
    Data = crypto:strong_rand_bytes(8000000),
    There = send_and_drop(Data),
    collect(),
    {ok, First} = macula_quic:recv(There, 1000, 30000),
    collect(),
    Rest = macula_quic_lab:read_to_end(There),
    ?assert(Data =:= <<First/binary, Rest/binary>>),
    ?EXPECT({quic, stream_closed, There, _}).

send_and_drop(Data) ->
    {Here, There} = loose_stream(loose_pair()),
    ok = macula_quic:send(Here, Data),
    There.

a_listener_that_nobody_got_is_closed(_Config) ->
    [begin
         Pid = spawn(fun() -> loose_listen() end),
         erlang:yield(),
         exit(Pid, kill)
     end || _ <- lists:seq(1, 200)],
    counts(0, 0, 0).

a_dropped_listener_stops(_Config) ->
    Port = element(2, loose_listen()),
    collect(),
    macula_test_nodes:wait_until(fun() ->
        case gen_udp:open(Port, [{ip, {127, 0, 0, 1}}]) of
            {ok, Socket} -> gen_udp:close(Socket) =:= ok;
            _ -> false
        end
    end).

a_finished_stream_may_be_dropped(_Config) ->
    #{client := C, server := S} = Pair = loose_pair(),
    Data = crypto:strong_rand_bytes(1000000),
    There = finish_and_drop(Pair, Data),
    collect(),
    ?assert(Data =:= macula_quic_lab:read_to_end(There)),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

finish_and_drop(Pair, Data) ->
    {Here, There} = loose_stream(Pair),
    ok = macula_quic:send(Here, Data, #{fin => true}),
    There.

a_closed_stream_still_says_so(_Config) ->
    #{client := C, server := S} = Pair = loose_pair(),
    There = close_and_drop(Pair),
    collect(),
    ok = macula_quic:close_stream(There),
    Closed = [?EXPECT({quic, stream_closed, X, #{reason := normal}}, X) || _ <- [1, 2]],
    ?assertEqual(true, lists:member(There, Closed)),
    ?assertEqual(2, length(lists:usort(Closed))),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

close_and_drop(Pair) ->
    {Here, There} = loose_stream(Pair),
    ok = macula_quic:close_stream(Here),
    There.

a_stream_keeps_its_connection(_Config) ->
    {L, Here, There} = only_streams(),
    [begin
         collect(),
         ok = macula_quic:send(Here, <<N:32>>),
         {ok, <<N:32>>} = macula_quic:recv(There, 4, 5000)
     end || N <- [1, 2, 3]],
    ok = macula_quic:close_listener(L),
    ok = macula_quic:close_stream(Here).

only_streams() ->
    #{listener := L} = Pair = loose_pair(),
    {Here, There} = loose_stream(Pair),
    {L, Here, There}.

%% A process that only receives need not hold the handle.
active_streams_are_kept(_Config) ->
    #{client := C, server := S} = Pair = loose_pair(),
    Self = self(),
    Echo = spawn_link(fun() -> echo(Self) end),
    Here = give_away_active(Pair, Echo),
    [begin
         collect(),
         ok = macula_quic:send(Here, <<N:32>>),
         ?EXPECT({Echo, <<N:32>>})
     end || N <- [1, 2, 3]],
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

give_away_active(Pair, To) ->
    {Here, There} = loose_stream(Pair),
    ok = macula_quic:handoff_stream(There, To, #{active => true}),
    Here.

echo(To) ->
    receive
        {quic, Data, _Stream, _} when is_binary(Data) ->
            To ! {self(), Data},
            echo(To)
    end.

armed_listeners_are_kept(_Config) ->
    Port = arm_and_drop(),
    [begin
         collect(),
         {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
         ?EXPECT({quic, new_conn, _, _}),
         ok = macula_quic:close(C)
     end || _ <- [1, 2, 3]].

arm_and_drop() ->
    {L, Port} = loose_listen(),
    ok = macula_quic:async_accept(L),
    Port.

accepting_connections_are_kept(_Config) ->
    {L, C} = accepting(),
    [begin
         collect(),
         {ok, X} = macula_quic:open_stream(C),
         ok = macula_quic:send(X, <<"x">>),
         ?EXPECT({quic, new_stream, _, _})
     end || _ <- [1, 2, 3]],
    ok = macula_quic:close(L).

accepting() ->
    #{client := C, server := S, listener := L} = loose_pair(),
    ok = macula_quic:async_accept_stream(S),
    {L, C}.

passive_streams_are_not_kept(_Config) ->
    #{listener := L, client := C, server := S} = Pair = loose_pair(),
    ok = drop_streams(Pair, fun(_) -> ok end),
    counts_without_mail(1, 2, 0),
    ?assertMatch({ok, _}, macula_quic:info(L)),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

drop_streams(Pair, Fun) ->
    [begin
         {Here, There} = loose_stream(Pair),
         [ok = Fun(X) || X <- [Here, There]]
     end || _ <- lists:seq(1, 5)],
    ok.

disarmed_handles_are_collected(_Config) ->
    #{listener := L, client := C, server := S} = Pair = loose_pair(),
    ok = drop_streams(Pair, fun(X) ->
        [ok = macula_quic:setopt(X, active, Mode) || Mode <- [true, once, 7, false]],
        ok
    end),
    counts_without_mail(1, 2, 0),
    ?assertMatch({ok, _}, macula_quic:info(L)),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

datagrams_keep_while_they_are_wanted(_Config) ->
    {L, C} = wants_datagrams(true),
    [begin
         collect(),
         ok = macula_quic:send_datagram(C, <<N>>),
         ?EXPECT({quic, dgram, _, <<N>>})
     end || N <- [1, 2, 3]],
    ok = macula_quic:close(C),
    ok = macula_quic:close(L),
    %% Not any more once that is over: the connection goes, and its peer hears of it.
    {L2, Other} = wants_datagrams(false),
    collect(),
    ?EXPECT({quic, shutdown, Other, _}),
    ok = macula_quic:close(L2),
    {L3, Once} = wants_datagrams(once),
    collect(),
    ok = macula_quic:send_datagram(Once, <<"one">>),
    ?EXPECT({quic, dgram, _, <<"one">>}),
    macula_test_nodes:wait_until(fun() ->
        collect(),
        macula_quic:handshake(Once) =/= {ok, Once}
    end),
    ok = macula_quic:close(L3).

wants_datagrams(Mode) ->
    #{client := C, server := S, listener := L} = loose_pair(),
    ok = macula_quic:setopt(S, datagrams, true),
    ok = macula_quic:setopt(S, datagrams, Mode),
    {L, C}.

%% The only reference to the handle is in the call that waits.
a_handle_in_a_call_is_kept(_Config) ->
    #{client := C, server := S, listener := L, port := Port} = Pair = loose_pair(),
    {Here, There} = loose_stream(Pair),
    Reader = call(fun(H) -> macula_quic:recv(H, 4) end, There),
    Accepting = call(fun(H) -> macula_quic:accept_stream(H) end, S),
    Listening = call(fun(H) -> macula_quic:accept(H) end, L),
    ok = still_kept(C, Here, Port, Reader, Accepting, Listening).

call(Call, Handle) ->
    Self = self(),
    Pid = spawn_link(fun() ->
        receive
            {handle, H} -> last_use(Self, Call, H)
        end
    end),
    Pid ! {handle, Handle},
    macula_test_nodes:wait_until(fun() ->
        process_info(Pid, current_function) =:=
            {current_function, {macula_quic_call, await, 3}}
    end),
    Pid.

last_use(Test, Call, Handle) ->
    Result = Call(Handle),
    Test ! {self(), Result},
    receive stop -> Result end.

still_kept(C, Here, Port, Reader, Accepting, Listening) ->
    [collect() || _ <- [1, 2, 3]],
    ok = macula_quic:send(Here, <<"data">>),
    ?EXPECT({Reader, {ok, <<"data">>}}),
    {ok, X} = macula_quic:open_stream(C),
    ok = macula_quic:send(X, <<"x">>),
    ?EXPECT({Accepting, {ok, _}}),
    {ok, C2} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    ?EXPECT({Listening, {ok, _}}),
    ok = macula_quic:close(C2),
    ok = macula_quic:close(X).

handles_in_messages_are_kept(_Config) ->
    {L, Port} = loose_listen(),
    ok = macula_quic:async_accept(L),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    macula_quic_lab:await_mailbox(fun(Ms) -> [x || {quic, new_conn, _, _} <- Ms] =/= [] end),
    [collect() || _ <- [1, 2, 3]],
    ?assertEqual({ok, C}, macula_quic:handshake(C)),
    S = ?EXPECT({quic, new_conn, Conn, _}, Conn),
    ?assertEqual({ok, S}, macula_quic:handshake(S)).
