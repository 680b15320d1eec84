%% Accepting: who gets which connection, and how many.
-module(macula_quic_accept_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([async_accept_goes_on/1, async_accept_twice_is_once/1, async_accept_counts/1,
         a_count_can_be_changed/1, new_conn_tells_about_the_connection/1, accept_waits/1,
         accept_times_out_and_leaves_no_message/1,
         no_time_to_wait_is_enough_for_a_connection_that_is_there/1, several_acceptors_each_get_one/1,
         armed_processes_take_turns/1, a_dead_acceptor_is_passed_over/1,
         the_backlog_holds_connections/1, the_backlog_keeps_what_a_peer_has_left/1,
         a_full_backlog_keeps_what_a_peer_has_left/1, a_full_backlog_refuses_no_one_later/1,
         handshakes_are_capped/1, connections_that_ended_are_not_accepted/1,
         close_at_once_is_heard_after_new_conn/1, wrong_options_are_refused/1,
         arming_again_for_each_connection_misses_none/1,
         streams_that_came_before_the_end_are_accepted/1,
         streams_that_came_before_the_end_are_announced/1,
         retry_always_works/1, accept_and_async_accept_together/1]).

-import(macula_quic_lab, [client_options/0, client_options/1, listen/0, listen/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Kept: a connection that nobody holds is closed.
connect(Port) ->
    connect(Port, client_options()).

connect(Port, Options) ->
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, Options, 10000),
    kept(Conn).

accept(Listener) ->
    {ok, Conn} = macula_quic:accept(Listener, 10000),
    kept(Conn).

kept(Conn) ->
    put(Conn, kept),
    Conn.

%% After the answer to this nothing that was under way to the caller is still missing.
settled(Listener, Accepted) ->
    macula_test_nodes:wait_until(fun() ->
        {ok, #{accepted := N}} = macula_quic:info(Listener),
        N =:= Accepted
    end).

no_time_to_wait_is_enough_for_a_connection_that_is_there(_Config) ->
    {L, Port} = listen(),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)),
    Dialled = [connect(Port) || _ <- lists:seq(1, 20)],
    macula_test_nodes:wait_until(fun() ->
        {ok, #{backlog := N}} = macula_quic:info(L),
        N =:= 20
    end),
    Accepted = [begin {ok, Conn} = macula_quic:accept(L, 0), kept(Conn) end || _ <- Dialled],
    [?assertEqual({error, timeout}, macula_quic:accept(L, 0)) || _ <- Dialled],
    [?assertEqual({ok, Conn}, macula_quic:handshake(Conn)) || Conn <- Dialled ++ Accepted],
    %% Who waits is not disturbed by who does not.
    Self = self(),
    Waiting = spawn_link(fun() ->
        {ok, Conn} = macula_quic:accept(L, 10000),
        Self ! {self(), macula_quic:handshake(Conn)}
    end),
    macula_test_nodes:wait_until(fun() ->
        {current_function, {macula_quic_call, await, 3}} =:= process_info(Waiting, current_function)
    end),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)),
    _ = connect(Port),
    ?EXPECT({Waiting, {ok, _}}).

async_accept_goes_on(_Config) ->
    {L, Port} = listen(),
    ok = macula_quic:async_accept(L),
    Conns = [begin
                 _ = connect(Port),
                 ?EXPECT({quic, new_conn, Conn, _}, Conn)
             end || _ <- lists:seq(1, 20)],
    ?assertEqual(20, length(lists:usort(Conns))).

async_accept_twice_is_once(_Config) ->
    {L, Port} = listen(),
    [ok = macula_quic:async_accept(L) || _ <- lists:seq(1, 100)],
    Clients = [connect(Port) || _ <- lists:seq(1, 10)],
    Servers = [?EXPECT({quic, new_conn, Conn, _}, Conn) || _ <- Clients],
    ?assertEqual(10, length(lists:usort(Servers))),
    settled(L, 10),
    ?NOTHING({quic, new_conn, _, _}).

async_accept_counts(_Config) ->
    {L, Port} = listen(),
    ok = macula_quic:async_accept(L, #{count => 3}),
    _ = [connect(Port) || _ <- lists:seq(1, 5)],
    _ = [?EXPECT({quic, new_conn, _, _}) || _ <- lists:seq(1, 3)],
    macula_test_nodes:wait_until(fun() ->
        backlog(L) =:= 2
    end),
    ?NOTHING({quic, new_conn, _, _}),
    %% The others wait for whoever asks next.
    _ = accept(L),
    ok = macula_quic:async_accept(L, [{count, 1}]),
    ?EXPECT({quic, new_conn, _, _}).

backlog(Listener) ->
    {ok, #{backlog := N}} = macula_quic:info(Listener),
    N.

a_count_can_be_changed(_Config) ->
    {L, Port} = listen(),
    ok = macula_quic:async_accept(L, #{count => infinity}),
    ok = macula_quic:async_accept(L, #{count => 1}),
    _ = [connect(Port) || _ <- [1, 2]],
    ?EXPECT({quic, new_conn, _, _}),
    macula_test_nodes:wait_until(fun() ->
        backlog(L) =:= 1
    end),
    ?NOTHING({quic, new_conn, _, _}).

new_conn_tells_about_the_connection(_Config) ->
    {L, Port} = listen(#{alpn => ["one", "two"]}),
    ok = macula_quic:async_accept(L),
    {ok, C} = macula_quic:connect("localhost", Port, client_options(#{alpn => ["two"]}), 5000),
    {Conn, Info} = ?EXPECT({quic, new_conn, S, I}, {S, I}),
    _ = kept(Conn),
    {ok, {_, ClientPort}} = macula_quic:sockname(C),
    Address = iolist_to_binary(["127.0.0.1:", integer_to_list(ClientPort)]),
    ?assertEqual(#{peername => {"127.0.0.1", ClientPort}, remote_addr => Address,
                   negotiated_protocol => <<"two">>,
                   server_name => <<"localhost">>, peercert => undefined,
                   resumed => false, early_data => none}, Info),
    ?assertEqual({ok, maps:get(peername, Info)}, macula_quic:peername(Conn)),
    %% An address is no server name (RFC 6066, section 3).
    {ok, C1} = macula_quic:connect("127.0.0.1", Port, client_options(#{alpn => ["one"]}), 5000),
    ?EXPECT({quic, new_conn, S1, #{server_name := undefined, negotiated_protocol := <<"one">>}},
            kept(S1)),
    ?assertEqual({ok, C1}, macula_quic:handshake(C1)).

accept_waits(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    _ = spawn_link(fun() ->
        {ok, Conn} = macula_quic:accept(L),
        Self ! {accepted, macula_quic:peername(Conn)},
        receive stop -> ok end
    end),
    {ok, Local} = macula_quic:sockname(connect(Port)),
    ?EXPECT({accepted, {ok, Local}}).

accept_times_out_and_leaves_no_message(_Config) ->
    {L, Port} = listen(),
    _ = [?assertEqual({error, timeout}, macula_quic:accept(L, T)) || T <- [0, 1, 20, 0, 0, 5]],
    %% Those who gave up take nothing.
    _ = connect(Port),
    _ = accept(L),
    ?assertEqual({messages, []}, process_info(self(), messages)).

several_acceptors_each_get_one(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    Acceptors = [spawn_link(fun() ->
        Conn = accept(L),
        Self ! {self(), macula_quic:peername(Conn), Conn},
        receive stop -> ok end
    end) || _ <- lists:seq(1, 20)],
    Clients = [connect(Port) || _ <- Acceptors],
    Conns = [?EXPECT({Pid, {ok, _}, Conn}, Conn) || Pid <- Acceptors],
    ?assertEqual(20, length(lists:usort(Conns))),
    [?assertEqual({ok, C}, macula_quic:handshake(C)) || C <- Clients].

armed_processes_take_turns(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    Owners = [spawn_link(fun() ->
        ok = macula_quic:async_accept(L),
        Self ! {self(), armed},
        turns(Self)
    end) || _ <- lists:seq(1, 4)],
    [?EXPECT({Pid, armed}) || Pid <- Owners],
    Clients = [connect(Port) || _ <- lists:seq(1, 12)],
    Got = [?EXPECT({turn, Pid}, Pid) || _ <- Clients],
    ?assertEqual([3, 3, 3, 3], [length([P || P <- Got, P =:= O]) || O <- Owners]).

turns(To) ->
    receive
        {quic, new_conn, Conn, _} ->
            To ! {turn, self()},
            turns_hold(To, [Conn])
    end.

turns_hold(To, Conns) ->
    receive
        {quic, new_conn, Conn, _} ->
            To ! {turn, self()},
            turns_hold(To, [Conn | Conns]);
        stop ->
            Conns
    end.

%% Whoever dies between two connections takes none with it.
a_dead_acceptor_is_passed_over(_Config) ->
    {L, Port} = listen(),
    [begin
         {Pid, Monitor} = spawn_monitor(fun() ->
             ok = macula_quic:async_accept(L),
             receive stop -> ok end
         end),
         macula_test_nodes:wait_until(fun() ->
             process_info(Pid, status) =:= {status, waiting}
         end),
         exit(Pid, kill),
         receive {'DOWN', Monitor, process, Pid, killed} -> ok end,
         C = connect(Port),
         _ = accept(L),
         ?assertEqual({ok, C}, macula_quic:handshake(C))
     end || _ <- lists:seq(1, macula_quic_lab:times(10))].

the_backlog_holds_connections(_Config) ->
    {L, Port} = listen(),
    Clients = [connect(Port) || _ <- lists:seq(1, 10)],
    ?assertEqual(10, length([ok || C <- Clients, macula_quic:handshake(C) =:= {ok, C}])),
    Accepted = [accept(L) || _ <- Clients],
    ?assertEqual(10, length(lists:usort(Accepted))),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)).

%% A client that has sent, seen that it has arrived, and closed: over TCP, too, its data is there.
leave(Port, Data) ->
    C = connect(Port),
    {ok, Stream} = macula_quic:open_stream(C, #{direction => unidirectional}),
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    ?EXPECT({quic, stream_closed, Stream, _}),
    ok = macula_quic:close_connection(C, 3, <<"bye">>).

left_in(Conn) ->
    {ok, Stream} = macula_quic:accept_stream(Conn, #{}, 5000),
    {ok, Data} = macula_quic:recv(Stream, 0, 5000),
    ?assertEqual({error, closed}, macula_quic:recv(Stream, 0, 5000)),
    Data.

the_backlog_keeps_what_a_peer_has_left(_Config) ->
    {L, Port} = listen(),
    ok = leave(Port, <<"one">>),
    ok = leave(Port, <<"two">>),
    Conn = accept(L),
    ?assertEqual(<<"one">>, left_in(Conn)),
    ?EXPECT({quic, shutdown, Conn, {application_close, 3, <<"bye">>}}),
    ok = macula_quic:async_accept(L),
    {Other, _} = ?EXPECT({quic, new_conn, S, I}, {S, I}),
    ?assertEqual(<<"two">>, left_in(Other)),
    ?EXPECT({quic, shutdown, Other, {application_close, 3, <<"bye">>}}).

a_full_backlog_keeps_what_a_peer_has_left(_Config) ->
    {L, Port} = listen(#{backlog => 3}),
    ok = leave(Port, <<"one">>),
    ok = macula_quic:close_connection(connect(Port), 0, <<>>),
    ok = leave(Port, <<"two">>),
    %% There is room for one more, as one of those three is empty.
    _ = connect(Port),
    Conns = [accept(L) || _ <- [1, 2, 3]],
    ?assertEqual([<<"one">>, <<"two">>], [left_in(Conn) || Conn <- lists:droplast(Conns)]).

a_full_backlog_refuses_no_one_later(_Config) ->
    {L, Port} = listen(#{backlog => 2}),
    Self = self(),
    Diallers = [spawn_link(fun() ->
        Result = macula_quic:connect("127.0.0.1", Port, client_options(), 20000),
        Self ! {self(), element(1, Result)},
        receive stop -> Result end
    end) || _ <- lists:seq(1, 6)],
    %% Two are taken; the others wait until there is room.
    macula_test_nodes:wait_until(fun() ->
        {ok, #{backlog := N}} = macula_quic:info(L),
        N >= 2
    end),
    _ = [{ok, _} = macula_quic:accept(L, 10000) || _ <- Diallers],
    [?EXPECT({Pid, ok}) || Pid <- Diallers].

handshakes_are_capped(_Config) ->
    {L, Port} = listen(#{max_handshakes => 8, handshake_timeout_ms => 60000}),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port},
                                            down => #{blackhole => true}}),
    Diallers = [spawn(fun() ->
        macula_quic:connect("127.0.0.1", macula_relay:port(Relay), client_options(), 60000)
    end) || _ <- lists:seq(1, 40)],
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshakes := N}} = macula_quic:info(L),
        #{up := #{forwarded := Forwarded}} = macula_relay:stats(Relay),
        ?assertMatch(_ when N =< 8, N),
        N > 0 andalso Forwarded >= 80
    end),
    %% Who proves its address gets through.
    C = connect(Port),
    _ = accept(L),
    ?assertEqual({ok, C}, macula_quic:handshake(C)),
    [exit(Pid, kill) || Pid <- Diallers],
    macula_relay:stop(Relay).

connections_that_ended_are_not_accepted(_Config) ->
    {L, Port} = listen(),
    passed_over(L, Port, 20).

%% A close may be overtaken by the next handshake, each having tasks of its own on either side. Then
%% the listener could not know; but it is not so each time. The one that stays has a server name.
passed_over(L, Port, Tries) when Tries > 0 ->
    C = connect(Port),
    macula_test_nodes:wait_until(fun() ->
        backlog(L) =:= 1
    end),
    ok = macula_quic:close_connection(C, 5, <<"never mind">>),
    ?EXPECT({quic, closed, C, normal}),
    C2 = connect(Port, client_options(#{server_name_indication => "localhost"})),
    ok = macula_quic:async_accept(L, #{count => 1}),
    case ?EXPECT({quic, new_conn, Conn, #{server_name := Asked}}, {kept(Conn), Asked}) of
        {S, <<"localhost">>} ->
            ?assertEqual({open, open}, {state(C2), state(S)}),
            _ = macula_quic_lab:stream(#{client => C2, server => S});
        {S, undefined} ->
            ?EXPECT({quic, shutdown, S, {application_close, 5, <<"never mind">>}}),
            _ = accept(L),
            passed_over(L, Port, Tries - 1)
    end.

state(Conn) ->
    {ok, #{state := State}} = macula_quic:info(Conn),
    State.

%% A client that closes at once: whoever is told of its connection is told of its end, once, and
%% afterwards.
close_at_once_is_heard_after_new_conn(_Config) ->
    {L, Port} = listen(),
    Times = macula_quic_lab:times(100),
    Closer = spawn_link(fun() ->
        [ok = macula_quic:close_connection(connect(Port), N, <<"at once">>)
         || N <- lists:seq(1, Times)],
        %% One that stays, known by its server name: connections are delivered in their order.
        {ok, Last} = macula_quic:connect("localhost", Port, client_options(), 10000),
        receive stop -> Last end
    end),
    ok = macula_quic:async_accept(L),
    heard(Times, #{}, false),
    Closer ! stop.

heard(Times, Conns, Last) ->
    case {Last, [C || {C, open} <- maps:to_list(Conns)]} of
        {true, []} ->
            ok;
        _ ->
            ?EXPECT({quic, What, Conn, Detail}, heard(Times, What, Conn, Detail, Conns, Last))
    end.

heard(Times, new_conn, _Conn, #{server_name := <<"localhost">>}, Conns, false) ->
    heard(Times, Conns, true);
heard(Times, new_conn, Conn, _Info, Conns, Last) ->
    ?assertNot(maps:is_key(Conn, Conns)),
    heard(Times, Conns#{Conn => open}, Last);
heard(Times, shutdown, Conn, {application_close, N, <<"at once">>}, Conns, Last)
  when N > 0, N =< Times ->
    ?assertEqual(open, maps:get(Conn, Conns, never_announced)),
    heard(Times, Conns#{Conn := ended}, Last).

wrong_options_are_refused(_Config) ->
    {L, _} = listen(),
    [?assertMatch({error, {bad_option, Key, _}}, macula_quic:async_accept(L, Options))
     || {Options, Key} <- [{#{count => 0}, count}, {#{count => -1}, count}, {[{count, a}], count},
                           {#{number => 1}, number}, {not_a_map, not_a_map}]],
    [?assertMatch({error, {bad_option, timeout, _}}, macula_quic:accept(L, T))
     || T <- [-1, 1.5, forever, 1 bsl 40]],
    [?assertEqual({error, badarg}, F(Handle))
     || F <- [fun macula_quic:accept/1, fun macula_quic:async_accept/1,
              fun macula_quic:close_listener/1, fun(H) -> macula_quic:accept(H, 10) end],
        Handle <- [make_ref(), self(), listener, 17, <<"x">>]].

retry_always_works(_Config) ->
    {L, Port} = listen(#{retry => always}),
    C = connect(Port),
    S = accept(L),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(H) || H <- [C, S]]).

%% A process that waits goes before those that get messages.
accept_and_async_accept_together(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    Waiting = spawn_link(fun() ->
        Self ! {self(), macula_quic:accept(L, 10000)},
        receive stop -> ok end
    end),
    macula_test_nodes:wait_until(fun() ->
        process_info(Waiting, status) =:= {status, waiting}
    end),
    ok = macula_quic:async_accept(L),
    _ = connect(Port),
    ?EXPECT({Waiting, {ok, _}}),
    _ = connect(Port),
    ?EXPECT({quic, new_conn, _, _}).

%% Whoever has a connection may arm before the listener has counted it.
arming_again_for_each_connection_misses_none(_Config) ->
    {L, Port} = listen(),
    ok = macula_quic:async_accept(L, #{count => 1}),
    [begin
         {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 10000),
         S = ?EXPECT({quic, new_conn, Conn, _}, Conn),
         ok = macula_quic:async_accept(L, #{count => 1}),
         ok = macula_quic:close(C),
         ok = macula_quic:close(S)
     end || _ <- lists:seq(1, macula_quic_lab:times(300))],
    ok = macula_quic:close(L).

%% The peer was told that they have arrived.
streams_that_came_before_the_end_are_accepted(_Config) ->
    each_before_the_end(fun(S, Sent) ->
        ?EXPECT({quic, shutdown, S, {application_close, 7, <<"done">>}}),
        Got = [begin
                   {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
                   macula_quic_lab:read_to_end(There)
               end || _ <- Sent],
        ?assertEqual(Sent, lists:sort(Got)),
        ?assertEqual({error, closed}, macula_quic:accept_stream(S, #{}, 5000))
    end).

streams_that_came_before_the_end_are_announced(_Config) ->
    each_before_the_end(fun(S, Sent) ->
        Got = [?EXPECT({quic, new_stream, There, _}, macula_quic_lab:read_to_end(There)) || _ <- Sent],
        ?assertEqual(Sent, lists:sort(Got)),
        ?EXPECT({quic, shutdown, S, {application_close, 7, <<"done">>}})
    end, fun macula_quic:async_accept_stream/1).

each_before_the_end(Check) ->
    each_before_the_end(Check, fun(_) -> ok end).

each_before_the_end(Check, Prepare) ->
    [begin
         #{client := C, server := S} = Pair = macula_quic_lab:pair(),
         ok = Prepare(S),
         Sent = [<<N:32>> || N <- lists:seq(1, 6)],
         Streams = [begin
             Direction = lists:nth(1 + N rem 2, [bidirectional, unidirectional]),
             {ok, Here} = macula_quic:open_stream(C, #{direction => Direction}),
             ok = macula_quic:send(Here, <<N:32>>, #{fin => true}),
             Here
         end || <<N:32>> <- Sent],
         [case macula_quic:tell_delivered(Here) of
              ok -> ?EXPECT({quic, delivered, Here, undefined});
              {error, closed} -> ?EXPECT({quic, stream_closed, Here, #{reason := normal}})
          end || Here <- Streams],
         ok = macula_quic:close_connection(C, 7, <<"done">>),
         Check(S, Sent),
         macula_quic_lab:close(Pair)
     end || _ <- lists:seq(1, macula_quic_lab:times(30))].
