%% A panic in the native library ends what it happened in and nothing else, and everybody concerned is
%% told once.
-module(macula_panic_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([a_native_function_answers_and_shows_no_argument/1, an_answer_that_cannot_be_built/1,
         a_stream_that_is_read/1, an_active_stream_that_is_read/1, a_stream_that_is_written/1,
         who_waits_to_send_is_answered/1, a_connection/1, the_acceptor_of_streams/1,
         the_opener_of_a_stream/1, the_receiver_of_datagrams/1,
         the_sender_of_datagrams/1, a_listener_to_be/1, a_listener/1,
         a_handshake/1, the_announcement_of_a_connection/1, a_dial/1, all_attempts_of_a_dial/1,
         what_wakes_all_tasks/1, a_search_for_an_identity/1, a_connection_where_it_is_driven/1,
         the_driver_of_an_endpoint/1, the_receiver_of_packets/1, the_driver_of_a_handshake/1]).
-export([who_looks_for_changes/1, who_tells_of_a_session/1, what_begins_with_the_owner/1,
         who_watches_for_silence/1, who_asks_about_a_server/1, who_asks_about_a_client/1,
         the_writer_of_logs/1]).
%% Run in a node of its own.
-export([driver_fails/1, fails_beside/2, endpoint_fails/1, receiver_fails/1, handshake_fails/1]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, client_options/1, server_options/1]).

suite() -> [{timetrap, {minutes, 4}}].

all() ->
    [a_native_function_answers_and_shows_no_argument, an_answer_that_cannot_be_built,
     a_stream_that_is_read, an_active_stream_that_is_read, a_stream_that_is_written,
     who_waits_to_send_is_answered, a_connection, the_acceptor_of_streams, the_opener_of_a_stream,
     the_receiver_of_datagrams, the_sender_of_datagrams, a_listener_to_be, a_listener, a_handshake,
     the_announcement_of_a_connection, a_dial, all_attempts_of_a_dial, what_wakes_all_tasks,
     a_search_for_an_identity, a_connection_where_it_is_driven,
     the_driver_of_an_endpoint, the_receiver_of_packets, the_driver_of_a_handshake,
     who_looks_for_changes, who_tells_of_a_session, what_begins_with_the_owner, who_watches_for_silence,
     who_asks_about_a_server, who_asks_about_a_client, the_writer_of_logs].

init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Each case has a neighbour: a connection with a stream, which no panic of another may disturb.
init_per_testcase(_Case, Config) ->
    Self = self(),
    Neighbour = macula_quic_lab:spawn_owner(fun() ->
        Pair = pair(),
        Ends = settled_stream(Pair),
        Self ! ready,
        {Pair, Ends}
    end),
    receive ready -> ok end,
    [{neighbour, Neighbour} | Config].

end_per_testcase(_Case, Config) ->
    %% Nothing stays armed for the next case.
    0 = macula_nif:injected_panics(),
    unharmed(?config(neighbour, Config)).

unharmed(Neighbour) ->
    macula_quic_lab:ask(Neighbour, fun({_, {Here, There}}) ->
        [begin
             ok = macula_quic:send(From, <<"still here">>),
             {ok, <<"still here">>} = macula_quic:recv(To, 10, 10000)
         end || {From, To} <- [{Here, There}, {There, Here}]],
        [] = macula_quic_lab:mailbox()
    end).

arm(Point) ->
    true = macula_nif:inject_panic(Point),
    ok.

%% The handle has had its last message: another of its own, or of its connection, would be in the mailbox
%% when the answers to these calls are, as they take the same way.
nothing_more_of(Handle) ->
    #{client := C} = Pair = pair(),
    {ok, _} = macula_quic:getstat(C),
    macula_quic_lab:close(Pair),
    ?NOTHING({quic, _, Handle, _}).

%% The pair still carries streams.
works(Pair) ->
    {Here, There} = stream(Pair),
    ok = macula_quic:send(There, <<"hello">>),
    {ok, <<"hello">>} = macula_quic:recv(Here, 5, 10000).

%% A new stream of a new connection, all of whose tasks have begun, and wait.
settled_stream(#{client := C} = Pair) ->
    {Here, There} = Ends = stream(Pair),
    ok = macula_quic:send(There, <<"!">>),
    {ok, <<"!">>} = macula_quic:recv(Here, 1, 10000),
    quiet(C),
    Ends.

failed(Stream) ->
    ?EXPECT({quic, stream_closed, Stream, Info},
            ?assertMatch(#{reason := internal_error, status := internal_error, error := 0,
                           is_conn_shutdown := false}, Info)),
    nothing_more_of(Stream).

a_native_function_answers_and_shows_no_argument(_Config) ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    Make = fun() -> macula_quic:generate_self_signed_cert(Public, Private, ["localhost"]) end,
    arm(nif),
    %% An exception would carry the arguments.
    ?assertEqual({error, nif_panicked}, Make()),
    ?assertNotEqual("nif panicked", macula_quic:format_error({error, nif_panicked})),
    {ok, _} = Make().

an_answer_that_cannot_be_built(_Config) ->
    #{client := C} = Pair = pair(),
    arm(answer),
    ?assertEqual({error, internal_error}, macula_quic:getstat(C)),
    {ok, _} = macula_quic:getstat(C),
    works(Pair).

a_stream_that_is_read(_Config) ->
    Pair = pair(),
    {Here, There} = settled_stream(Pair),
    arm(stream_read),
    ?assertEqual({error, internal_error}, macula_quic:recv(There, 0, 10000)),
    failed(There),
    ?assertEqual({error, internal_error}, macula_quic:recv(There, 0, 10000)),
    %% The peer does not take it for a whole stream.
    ?assertEqual({error, {reset, 0}}, macula_quic:recv(Here, 0, 10000)),
    ?EXPECT({quic, peer_receive_aborted, Here, 0}),
    works(Pair).

an_active_stream_that_is_read(_Config) ->
    Pair = pair(),
    {_Here, There} = settled_stream(Pair),
    arm(stream_read),
    ok = macula_quic:setopt(There, active, true),
    failed(There),
    works(Pair).

a_stream_that_is_written(_Config) ->
    Pair = pair(),
    {Here, There} = settled_stream(Pair),
    arm(stream_write),
    ok = macula_quic:send(Here, <<"lost">>),
    failed(Here),
    ?assertMatch({error, _}, macula_quic:send(Here, <<"more">>)),
    ?assertEqual({error, {reset, 0}}, macula_quic:recv(There, 0, 10000)),
    works(Pair).

who_waits_to_send_is_answered(_Config) ->
    Pair = pair(#{stream_recv_window => 1024}, #{high_watermark => 2048}),
    {Here, _There} = settled_stream(Pair),
    Self = self(),
    Senders = [spawn_link(fun() -> Self ! {self(), fill(Here)} end) || _ <- [1, 2, 3]],
    [macula_test_nodes:wait_until(fun() ->
         {current_function, {macula_quic_call, await, 3}} =:= process_info(S, current_function)
     end) || S <- Senders],
    arm(stream_write),
    ok = macula_quic:setopt(Here, priority, 1),
    [?EXPECT({Sender, Result}, ?assertEqual({error, internal_error}, Result)) || Sender <- Senders],
    failed(Here),
    works(Pair).

fill(Stream) ->
    case macula_quic:send(Stream, binary:copy(<<"x">>, 1024)) of
        ok -> fill(Stream);
        Error -> Error
    end.

a_connection(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    arm(connection),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    ?EXPECT({quic, transport_shutdown, C, internal_error}),
    ?assertMatch({error, _}, macula_quic:open_stream(C)),
    nothing_more_of(C),
    %% The listener has no part in it.
    {ok, Next} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    {ok, S} = macula_quic:accept(L, 5000),
    works(#{client => Next, server => S}).

the_acceptor_of_streams(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    Self = self(),
    Waiting = spawn_link(fun() -> Self ! {self(), macula_quic:accept_stream(S)} end),
    macula_test_nodes:wait_until(fun() ->
        {current_function, {macula_quic_call, await, 3}} =:= process_info(Waiting, current_function)
    end),
    arm(accept_streams),
    ?assertEqual({error, internal_error}, macula_quic:accept_stream(S)),
    ?EXPECT({Waiting, Result}, ?assertEqual({error, internal_error}, Result)),
    ?EXPECT({quic, transport_shutdown, S, internal_error}),
    ?EXPECT({quic, shutdown, C, {application_close, 0, <<"internal error">>}}),
    [?EXPECT({quic, stream_closed, X, #{is_conn_shutdown := true}}) || X <- [Here, There]],
    ?assertMatch({error, _}, macula_quic:accept_stream(S)),
    nothing_more_of(S).

the_opener_of_a_stream(_Config) ->
    #{client := C} = Pair = pair(),
    arm(open_stream),
    ?assertEqual({error, internal_error}, macula_quic:open_stream(C)),
    works(Pair).

the_receiver_of_datagrams(_Config) ->
    #{client := C, server := S} = pair(),
    arm(datagrams),
    ok = macula_quic:setopt(S, datagrams, true),
    ?EXPECT({quic, transport_shutdown, S, internal_error}),
    ?EXPECT({quic, shutdown, C, {application_close, 0, <<"internal error">>}}),
    nothing_more_of(S).

%% Who waits for word about the first one is answered, as is everybody later.
the_sender_of_datagrams(_Config) ->
    #{client := C, server := S} = pair(),
    arm(datagrams_out),
    ?assertEqual({error, closed}, macula_quic:send_datagram(C, <<"first">>)),
    ?EXPECT({quic, transport_shutdown, C, internal_error}),
    ?EXPECT({quic, shutdown, S, {application_close, 0, <<"internal error">>}}),
    ?assertEqual({error, closed}, macula_quic:send_datagram(C, <<"later">>)),
    nothing_more_of(C).

a_listener_to_be(_Config) ->
    Listen = fun() -> macula_quic:listen("127.0.0.1", 0, server_options(#{})) end,
    arm(listen),
    ?assertEqual({error, internal_error}, Listen()),
    {ok, _} = Listen().

a_listener(_Config) ->
    #{listener := L, port := Port} = Pair = pair(),
    Self = self(),
    Waiting = spawn_link(fun() -> Self ! {self(), macula_quic:accept(L)} end),
    macula_test_nodes:wait_until(fun() ->
        {current_function, {macula_quic_call, await, 3}} =:= process_info(Waiting, current_function)
    end),
    arm(listener),
    ?assertEqual({error, internal_error}, macula_quic:accept(L)),
    ?EXPECT({Waiting, Result}, ?assertEqual({error, internal_error}, Result)),
    ?EXPECT({quic, listener_stopped, L, internal_error}),
    ?assertEqual({error, closed}, macula_quic:accept(L)),
    ok = macula_quic:close_listener(L),
    nothing_more_of(L),
    %% What it had established lives, and the port can be listened on.
    works(Pair),
    {ok, Again} = macula_quic:listen("127.0.0.1", Port, server_options(#{})),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    {ok, S} = macula_quic:accept(Again, 5000),
    works(#{client => C, server => S}).

a_handshake(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    Connect = fun() -> macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000) end,
    arm(handshake),
    ?assertMatch({error, Why} when Why =/= timeout, Connect()),
    the_next_one_works(Connect, L).

%% And of the one before no handshake is left.
the_next_one_works(Connect, L) ->
    {ok, C} = Connect(),
    {ok, S} = macula_quic:accept(L, 5000),
    works(#{client => C, server => S}),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshakes := Count}} = macula_quic:info(L),
        Count =:= 0
    end).

%% Who has it announced cannot know of the connection: it ends with the listener's task.
the_announcement_of_a_connection(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    ok = macula_quic:async_accept(L),
    arm(new_connection),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    ?EXPECT({quic, listener_stopped, L, internal_error}),
    ?EXPECT({quic, shutdown, C, {application_close, 0, _}}),
    nothing_more_of(L),
    ?NOTHING({quic, new_conn, _, _}).

a_dial(_Config) ->
    fails_once(dial).

all_attempts_of_a_dial(_Config) ->
    fails_once(attempt).

fails_once(Point) ->
    {L, Port} = macula_quic_lab:listen(),
    Connect = fun() -> macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000) end,
    arm(Point),
    ?assertEqual({error, internal_error}, Connect()),
    {ok, C} = Connect(),
    {ok, S} = macula_quic:accept(L, 5000),
    works(#{client => C, server => S}).

what_wakes_all_tasks(_Config) ->
    Pair = pair(),
    {Here, There} = stream(Pair),
    arm(bell),
    ok = macula_quic:send(Here, <<"ring">>),
    ?assertEqual({ok, <<"ring">>}, macula_quic:recv(There, 4, 10000)),
    works(Pair).

a_search_for_an_identity(_Config) ->
    arm(search),
    ?assertEqual({error, internal_error}, macula_identity:generate(#{puzzle_bits => 1})),
    {ok, _} = macula_identity:generate(#{puzzle_bits => 1}).

%% With the lock of the connection in hand: in a node of its own, which must live.
a_connection_where_it_is_driven(_Config) ->
    macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        [ok = macula_test_nodes:call(Node, ?MODULE, driver_fails, [Round], 90000)
         || Round <- lists:seq(1, 10)]
    end).

driver_fails(_Round) ->
    macula_quic_lab:in_process(fun driver_fails/0),
    %% Nothing of it is left.
    macula_quic_lab:drained().

driver_fails() ->
    Options = #{idle_timeout_ms => 3000, keep_alive_interval_ms => 0},
    #{listener := L, port := Port, client := C, server := S} = Pair = pair(Options, Options),
    {Here, There} = stream(Pair),
    {Idle, _} = stream(Pair),
    ok = macula_quic:setopt(Idle, active, true),
    ok = macula_quic:setopt(C, datagrams, true),
    Neighbours = pair(),
    {Near, Far} = stream(Neighbours),
    Self = self(),
    Waiting = [spawn_link(fun() -> Self ! {self(), Wait()} end)
               || Wait <- [fun() -> macula_quic:recv(Here, 0) end,
                           fun() -> macula_quic:accept_stream(C) end]],
    [macula_test_nodes:wait_until(fun() ->
         {current_function, {macula_quic_call, await, 3}} =:= process_info(W, current_function)
     end) || W <- Waiting],
    quiet(C),
    arm(transmit),
    ok = macula_quic:send(Here, <<"hello">>),
    [?EXPECT({W, Result}, ?assertEqual({error, internal_error}, Result)) || W <- Waiting],
    ?EXPECT({quic, transport_shutdown, C, internal_error}),
    [?EXPECT({quic, stream_closed, X, #{is_conn_shutdown := false, reason := internal_error}})
     || X <- [Here, Idle]],
    {ok, _} = macula_quic:getstat(C),
    ?assertEqual({error, internal_error}, macula_quic:open_stream(C)),
    ?assertMatch({error, _}, macula_quic:send(Here, <<"more">>)),
    ok = macula_quic:close(C),
    %% The peer hears no more of it.
    ?EXPECT({quic, transport_shutdown, S, timeout}, ok, 30000),
    ?EXPECT({quic, stream_closed, There, #{reason := timeout}}),
    %% Others are not disturbed.
    ok = macula_quic:send(Near, <<"still here">>),
    {ok, <<"still here">>} = macula_quic:recv(Far, 10, 10000),
    works(Neighbours),
    {ok, Next} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    {ok, Accepted} = macula_quic:accept(L, 5000),
    works(#{client => Next, server => Accepted}),
    [nothing_more_of(X) || X <- [C, S, Here, Idle, There]],
    0 = macula_nif:injected_panics(),
    ok.

%% Nothing is being sent on the connection: acknowledgements, probes and the like are through.
quiet(Conn) ->
    Sent = fun() -> {ok, [{_, N}]} = macula_quic:getstat(Conn, [send_cnt]), N end,
    macula_test_nodes:wait_until(fun() ->
        Before = Sent(),
        receive after 100 -> ok end,
        Before =:= Sent()
    end).

%% What serves all connections of a socket: each owner is told, and whoever listens or dials next is served.
the_driver_of_an_endpoint(_Config) ->
    in_a_node(endpoint_fails).

endpoint_fails(listener) ->
    %% A stray datagram passes the driver of the listener, and no other.
    the_listeners_endpoint_fails(fun(Port, _Stream) ->
        arm(receive_stray),
        {ok, Stray} = gen_udp:open(0),
        ok = gen_udp:send(Stray, {127, 0, 0, 1}, Port, <<0>>),
        ok = gen_udp:close(Stray)
    end);
endpoint_fails(dialler) ->
    {L, Port} = macula_quic_lab:listen(),
    Before = connected(L, Port),
    #{client := C} = Before,
    {Here, _There} = stream(Before),
    arm(receive_stray),
    {ok, {Ip, Dialler}} = macula_quic:sockname(C),
    {ok, Stray} = gen_udp:open(0),
    ok = gen_udp:send(Stray, Ip, Dialler, <<0>>),
    ?EXPECT({quic, transport_shutdown, C, {transport_error, internal_error, _}}),
    ?EXPECT({quic, stream_closed, Here, #{is_conn_shutdown := true}}),
    ok = gen_udp:close(Stray),
    works(connected(L, Port)),
    0 = macula_nif:injected_panics(),
    ok.

the_listeners_endpoint_fails(Break) ->
    {L, Port} = macula_quic_lab:listen(),
    #{client := C, server := S} = Pair = connected(L, Port),
    {Here, There} = stream(Pair),
    Self = self(),
    Waiting = spawn_link(fun() -> Self ! {self(), macula_quic:accept(L)} end),
    macula_test_nodes:wait_until(fun() ->
        {current_function, {macula_quic_call, await, 3}} =:= process_info(Waiting, current_function)
    end),
    %% What is still on its way would be received first, by the endpoint that dials perhaps.
    [quiet(End) || End <- [C, S]],
    Break(Port, Here),
    ?EXPECT({Waiting, Result}, ?assertEqual({error, internal_error}, Result)),
    ?EXPECT({quic, listener_stopped, L, internal_error}),
    ?EXPECT({quic, transport_shutdown, S, {transport_error, internal_error, _}}),
    ?EXPECT({quic, stream_closed, There, #{is_conn_shutdown := true}}),
    %% The port is free, and whoever has it resets what it does not know.
    {ok, Next} = macula_quic:listen("127.0.0.1", Port, server_options(#{})),
    works(connected(Next, Port)),
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ?EXPECT({quic, stream_closed, Here, _}),
    [nothing_more_of(X) || X <- [L, C, S, Here, There]],
    0 = macula_nif:injected_panics(),
    ok.

%% The same where the endpoint takes packets from the system: here one of a connection.
the_receiver_of_packets(_Config) ->
    in_a_node(receiver_fails, [listener]).

receiver_fails(listener) ->
    the_listeners_endpoint_fails(fun(_Port, Stream) ->
        arm(receive_datagram),
        ok = macula_quic:send(Stream, <<"a packet">>)
    end).

%% Nobody has a handle of the connection yet.
the_driver_of_a_handshake(_Config) ->
    in_a_node(handshake_fails).

%% The dialler sends first.
handshake_fails(dialler) ->
    {L, Port} = macula_quic_lab:listen(),
    arm(transmit),
    ?assertEqual({error, internal_error},
                 macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000)),
    works(connected(L, Port)),
    0 = macula_nif:injected_panics(),
    ok;
handshake_fails(listener) ->
    {L, Port} = macula_quic_lab:listen(),
    {ok, Peer} = gen_udp:open(0),
    arm(transmit),
    ok = gen_udp:send(Peer, {127, 0, 0, 1}, Port, macula_quic_lab:pinging_packet()),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshakes := Count}} = macula_quic:info(L),
        {Count, macula_nif:injected_panics()} =:= {0, 0}
    end),
    ok = gen_udp:close(Peer),
    works(connected(L, Port)),
    ok.

connected(L, Port) ->
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    {ok, S} = macula_quic:accept(L, 5000),
    #{client => C, server => S}.

%% In a node of its own, which must live.
in_a_node(Fails) ->
    in_a_node(Fails, [listener, dialler]).

in_a_node(Fails, Sides) ->
    macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        [ok = macula_test_nodes:call(Node, ?MODULE, fails_beside, [Fails, Side], 90000)
         || Side <- Sides, _ <- lists:seq(1, 5)]
    end).

fails_beside(Fails, Side) ->
    macula_quic_lab:in_process(fun() -> ?MODULE:Fails(Side) end),
    macula_quic_lab:drained().

%%--------------------------------------------------------------------------------------------
%% What is done beside the work of a connection

who_looks_for_changes(_Config) ->
    #{client := C, server := S} = pair(),
    arm(changes),
    ok = macula_quic:tell_changes(C),
    is_over(C, S).

who_tells_of_a_session(_Config) ->
    fails_at_once(session, #{resumption => true}).

%% Before the owner is told anything.
what_begins_with_the_owner(_Config) ->
    fails_at_once(session_begin, #{}).

fails_at_once(Point, Options) ->
    {L, Port} = macula_quic_lab:listen(Options),
    arm(Point),
    Connect = fun() -> macula_quic:connect("127.0.0.1", Port, client_options(Options), 5000) end,
    {ok, C} = Connect(),
    ?EXPECT({quic, transport_shutdown, C, internal_error}),
    ?assertMatch({error, _}, macula_quic:open_stream(C)),
    nothing_more_of(C),
    {ok, Next} = Connect(),
    is_served(L, Next).

%% The listener may have an end of the one that failed, too.
is_served(L, C) ->
    {ok, X} = macula_quic:open_stream(C),
    ok = macula_quic:send(X, <<"!">>),
    {ok, S} = macula_quic:accept(L, 5000),
    case macula_quic:accept_stream(S, #{}, 10000) of
        {ok, _} -> works(#{client => C, server => S});
        {error, closed} -> is_served(L, C);
        {error, {connection_lost, _}} -> is_served(L, C)
    end.

who_watches_for_silence(_Config) ->
    %% The server has no such watch.
    {L, Port} = macula_quic_lab:listen(),
    #{client := C, server := S} = macula_quic_lab:pair(L, Port, #{disconnect_timeout_ms => 800}),
    arm(silence),
    is_over(C, S).

is_over(C, S) ->
    ?EXPECT({quic, transport_shutdown, C, internal_error}),
    ?EXPECT({quic, shutdown, S, {application_close, 0, <<"internal error">>}}),
    ?assertMatch({error, _}, macula_quic:open_stream(C)),
    [nothing_more_of(X) || X <- [C, S]].

who_asks_about_a_server(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    Connect = fun() ->
        macula_quic:connect("127.0.0.1", Port, client_options(#{verify_fun => saying_yes()}), 5000)
    end,
    arm(verdict),
    ?assertEqual({error, internal_error}, Connect()),
    {ok, C} = Connect(),
    is_served(L, C).

who_asks_about_a_client(_Config) ->
    {L, Port} = macula_quic_lab:listen(#{verify => verify_peer, fail_if_no_peer_cert => true,
                                         verify_fun => saying_yes()}),
    Own = maps:with([cert, key], macula_quic_lab:ed25519()),
    Connect = fun() -> macula_quic:connect("127.0.0.1", Port, client_options(Own), 5000) end,
    arm(verdict),
    case Connect() of
        %% Whoever has shown all is done, and hears of it later.
        {ok, Refused} ->
            ?EXPECT({quic, _, Refused, _}),
            nothing_more_of(Refused);
        {error, Why} ->
            ?assertNotEqual(timeout, Why)
    end,
    the_next_one_works(Connect, L).

saying_yes() ->
    {fun(_Cert, {bad_cert, _}, State) -> {valid, State};
        (_Cert, _Event, State) -> {valid, State}
     end, none}.

%% The log it happens in is lost, and counted. The connection is not concerned, nor is the log of another.
the_writer_of_logs(Config) ->
    Dir = filename:join(?config(priv_dir, Config), "logs"),
    ok = file:make_dir(Dir),
    {L, Port} = macula_quic_lab:listen(#{qlog_dir => Dir}),
    Failures = fun() ->
        Of = maps:from_list([{Name, Value} || #{name := Name, value := Value} <- macula_quic:counters()]),
        [maps:get(Name, Of) || Name <- [qlog_failed_files, qlog_lost_records]]
    end,
    [Files, Records] = Failures(),
    arm(qlog),
    Pair = macula_quic_lab:pair(L, Port, #{}),
    works(Pair),
    macula_test_nodes:wait_until(fun() ->
        [NowFiles, NowRecords] = Failures(),
        NowFiles =:= Files + 1 andalso NowRecords > Records
    end),
    ?assertEqual({ok, []}, file:list_dir(Dir)),
    Other = macula_quic_lab:pair(L, Port, #{}),
    works(Other),
    works(Pair),
    macula_test_nodes:wait_until(fun() ->
        case filelib:wildcard(filename:join(Dir, "*.sqlog")) of
            [File] -> filelib:file_size(File) > 1000;
            Others -> Others
        end
    end).
