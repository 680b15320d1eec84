%% Terminal truth: however a connection ends, its owner hears why, once, for the connection and for
%% each of its streams.
-module(macula_quic_terminal_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([the_peers_close_with_its_code_and_reason/1, codes_and_reasons_of_every_size/1,
         every_flag_of_a_connection_closes_it/1, the_end_of_a_stream_says_how_its_connection_ended/1,
         the_local_close/1, an_idle_timeout/1, keep_alive_keeps_idle_connections/1,
         a_killed_owner/1, a_killed_vm_is_an_idle_timeout/1, a_stateless_reset/1,
         without_the_key_there_is_no_reset/1, a_stopped_listener_ends_once/1,
         both_sides_close_at_once/1, every_call_fails_after_the_end/1,
         what_waits_is_answered_at_the_end/1, data_before_the_end_is_read_first/1,
         a_local_close_ends_passive_streams_too/1, a_stream_of_every_kind_ends_once/1,
         a_passive_reader_tells_a_whole_stream_from_one_cut_off/1,
         a_whole_stream_stays_whole_after_the_connection/1,
         the_death_of_an_owner_is_no_end_of_the_data/1,
         closing_the_connection_ends_streams_with_unread_data/1,
         a_close_amid_bulk_is_heard_at_once/1, a_hundred_streams_end_before_their_connection/1,
         the_end_of_those_who_close_does_not_overtake_it/1,
         start_listener/3]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, client_options/1, server_options/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Streams of all kinds over a pair, each in active mode on both sides, and whose they are.
streams(#{client := C, server := S} = Pair) ->
    Opened = [begin
                  {Here, There} = macula_quic_lab:stream(#{client => A, server => B},
                                                         #{direction => Direction}),
                  [{A, Here}, {B, There}]
              end || {A, B} <- [{C, S}, {S, C}], Direction <- [bidirectional, unidirectional],
                     _ <- [1, 2]],
    All = lists:append(Opened),
    [ok = macula_quic:setopt(X, active, true) || {_, X} <- All],
    Pair#{streams => All}.

ends(Conn, Streams) ->
    [X || {Of, X} <- Streams, Of =:= Conn].

%% Each of these streams ends once, with this reason; then nothing native lives, so that nothing can
%% come any more, and nothing has.
ended(Streams, Reason) ->
    [?EXPECT({quic, stream_closed, X, #{is_conn_shutdown := true, reason := Reason}}, ok, 30000)
     || X <- Streams].

nothing_more() ->
    %% A connection that has ended does so for all of its streams in no time; the answers to these
    %% calls come through the same threads.
    {L, Port} = macula_quic_lab:listen(),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
    {ok, _} = macula_quic:getstat(C),
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ok = macula_quic:close(L),
    ?EXPECT({quic, listener_stopped, L, undefined}),
    ?assertEqual([], [M || {quic, What, _, _} = M <- macula_quic_lab:mailbox(),
                           What =/= peer_send_shutdown]).

the_peers_close_with_its_code_and_reason(_Config) ->
    #{client := C, server := S, streams := Streams} = streams(pair()),
    ok = macula_quic:async_shutdown_connection(S, 0, {4711, <<"out of office">>}),
    Reason = {application_close, 4711, <<"out of office">>},
    ?EXPECT({quic, shutdown, C, Reason}),
    ?EXPECT({quic, closed, S, normal}),
    ended(ends(C, Streams), Reason),
    ended(ends(S, Streams), closed),
    nothing_more(),
    ?assertEqual({error, Reason}, macula_quic:handshake(C)).

codes_and_reasons_of_every_size(_Config) ->
    [begin
         #{client := C, server := S} = pair(),
         ok = macula_quic:close_connection(C, Code, Reason),
         Expected = iolist_to_binary(Reason),
         ?EXPECT({quic, shutdown, S, {application_close, Code, Expected}})
     end || {Code, Reason} <- [{0, <<>>}, {1, "list"}, {63, [<<"io">>, $l, ["ist"]]},
                               {16383, <<0, 255, 1>>}, {(1 bsl 62) - 1, binary:copy(<<"r">>, 500)}]],
    %% A reason must fit into a packet: what does not is cut.
    #{client := C, server := S} = pair(),
    ok = macula_quic:close_connection(C, 5, binary:copy(<<"r">>, 1000000)),
    ?EXPECT({quic, shutdown, S, {application_close, 5, Cut}},
            ?assertMatch({_, 0}, {byte_size(Cut),
                                  byte_size(binary:replace(Cut, <<"r">>, <<>>, [global]))})),
    [?assertMatch({error, {bad_option, code, _}}, macula_quic:close_connection(C, Code, <<>>))
     || Code <- [-1, 1 bsl 62, 1.5, code]],
    ?assertMatch({error, {bad_option, reason, _}}, macula_quic:close_connection(C, 1, reason)),
    [?assertMatch({error, {bad_option, flag, _}}, macula_quic:async_shutdown_connection(C, Flag, 0))
     || Flag <- [-1, loud, [silent, loud], "1", [none | silent]]].

%% The peer is told in any case.
every_flag_of_a_connection_closes_it(_Config) ->
    [begin
         #{client := C, server := S} = pair(),
         ok = macula_quic:async_shutdown_connection(C, Flag, 9),
         ?EXPECT({quic, closed, C, normal}),
         ?EXPECT({quic, shutdown, S, {application_close, 9, <<>>}})
     end || Flag <- [0, 1, 2, 4, 8, 16, 1 bsl 31, none, silent, [], [silent]]].

%% With the keys that programs for quicer look at.
the_end_of_a_stream_says_how_its_connection_ended(_Config) ->
    Of = fun(App, Remote, Status, Error) ->
        #{is_conn_shutdown => true, is_app_closing => false, is_shutdown_by_app => App,
          is_closed_remotely => Remote, status => Status, error => Error}
    end,
    Closed = fun(Stream, Expected) ->
        ?EXPECT({quic, stream_closed, Stream, Info},
                ?assertEqual(Expected, maps:remove(reason, Info)), 30000)
    end,
    [begin
         Pair = #{client := C} = pair(),
         {Here, There} = macula_quic_lab:stream(Pair),
         ok = macula_quic:close_connection(C, Code, <<>>),
         Closed(Here, Of(true, false, success, 0)),
         Closed(There, Of(true, true, Status, Code))
     end || {Code, Status} <- [{0, success}, {77, user_canceled}]],
    %% Each side by itself.
    #{relay := R} = Idle = macula_quic_lab:through(#{}, #{idle_timeout_ms => 1000}),
    {Near, Far} = macula_quic_lab:stream(Idle),
    ok = macula_relay:set(R, #{blackhole => true}),
    [Closed(X, Of(false, false, connection_idle, 0)) || X <- [Near, Far]],
    macula_relay:stop(R),
    %% And one whose connection lives on.
    {One, Other} = macula_quic_lab:stream(pair()),
    [ok = macula_quic:close_stream(X) || X <- [One, Other]],
    Alone = #{is_conn_shutdown => false, is_app_closing => true, is_shutdown_by_app => false,
              is_closed_remotely => false, status => success, error => 0},
    [Closed(X, Alone) || X <- [One, Other]].

%% However many they are.
a_hundred_streams_end_before_their_connection(_Config) ->
    [begin
         #{client := C, server := S} = Pair = pair(),
         Streams = [macula_quic_lab:stream(Pair) || _ <- lists:seq(1, 100)],
         ok = macula_quic:close_connection(S, 3, <<>>),
         Ended = ended_before({quic, shutdown, C, {application_close, 3, <<>>}}),
         ?assertEqual([], [Here || {Here, _} <- Streams] -- Ended),
         ?EXPECT({quic, closed, S, normal}),
         macula_quic_lab:mailbox()
     end || _ <- lists:seq(1, 5)].

ended_before(Message) ->
    receive
        {quic, stream_closed, Stream, _} -> [Stream | ended_before(Message)];
        Message -> []
    after 10000 -> error({not_received, Message, macula_quic_lab:mailbox()})
    end.

the_local_close(_Config) ->
    #{client := C, server := S, streams := Streams} = streams(pair()),
    [ok = macula_quic:close_connection(C) || _ <- lists:seq(1, 10)],
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ?EXPECT({quic, shutdown, S, {application_close, 0, <<>>}}),
    ended(ends(C, Streams), closed),
    ended(ends(S, Streams), {application_close, 0, <<>>}),
    nothing_more().

an_idle_timeout(_Config) ->
    Options = #{idle_timeout_ms => 2000},
    #{relay := R, client := C, server := S, streams := Streams} =
        streams(macula_quic_lab:through(#{}, Options)),
    ok = macula_relay:set(R, #{blackhole => true}),
    [?EXPECT({quic, transport_shutdown, X, timeout}, ok, 60000) || X <- [C, S]],
    ended([X || {_, X} <- Streams], timeout),
    nothing_more(),
    [?assertEqual({error, timeout}, macula_quic:handshake(X)) || X <- [C, S]],
    macula_relay:stop(R).

keep_alive_keeps_idle_connections(_Config) ->
    #{client := C, server := S} = pair(#{idle_timeout_ms => 2500},
                                       #{keep_alive_interval_ms => 150}),
    %% Some times the timeout later.
    macula_test_nodes:wait_until(fun() ->
        {ok, [{recv_cnt, N}]} = macula_quic:getstat(S, [recv_cnt]),
        N > 55
    end),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

a_killed_owner(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    Self = self(),
    Owner = spawn(fun() ->
        {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(#{}), 5000),
        Self ! connected,
        Server = receive {pair, Given} -> Given end,
        #{streams := Streams} = streams(#{client => C, server => Server}),
        Theirs = ends(Server, Streams),
        [ok = macula_quic:controlling_process(X, Self) || X <- Theirs],
        Self ! {streams, Theirs},
        receive stop -> {C, Streams} end
    end),
    {ok, S} = macula_quic:accept(L, 5000),
    Owner ! {pair, S},
    Streams = ?EXPECT({streams, Xs}, Xs),
    ?EXPECT(connected),
    exit(Owner, kill),
    Reason = {application_close, 0, <<"owner died">>},
    ?EXPECT({quic, shutdown, S, Reason}),
    %% Its streams were reset, or ended with the connection, whichever was first.
    [?EXPECT({quic, stream_closed, X, _}) || X <- Streams],
    _ = [?EXPECT({quic, What, X, 0} when is_atom(What))
         || X <- Streams, {quic, W, Y, 0} <- element(2, process_info(self(), messages)),
            is_atom(W), Y =:= X],
    nothing_more().

%% A node with a listener; it tells nobody when it is killed.
start_listener(Port, Options, Test) ->
    Self = self(),
    _ = spawn(fun() ->
        {ok, L} = macula_quic:listen("127.0.0.1", Port, Options),
        {ok, {_, Bound}} = macula_quic:sockname(L),
        ok = macula_quic:async_accept(L),
        Self ! {listening, Bound},
        serve(Test)
    end),
    receive {listening, Bound} -> Bound after 12000 -> error(timeout) end.

%% Echoes the first bytes of each stream.
serve(Kept) ->
    receive
        {quic, new_conn, Conn, _} ->
            ok = macula_quic:async_accept_stream(Conn, #{active => true}),
            serve([Conn | Kept]);
        {quic, Data, Stream, _} when is_binary(Data) ->
            ok = macula_quic:send(Stream, Data),
            serve([Stream | Kept]);
        _ ->
            serve(Kept)
    end.

dial_and_echo(Port, Options) ->
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(Options), 5000),
    Streams = [begin
                   {ok, X} = macula_quic:open_stream(C),
                   ok = macula_quic:send(X, <<"echo">>),
                   {ok, <<"echo">>} = macula_quic:recv(X, 4, 5000),
                   ok = macula_quic:setopt(X, active, true),
                   X
               end || _ <- [1, 2, 3]],
    {C, Streams}.

a_killed_vm_is_an_idle_timeout(_Config) ->
    {ok, Node} = macula_test_nodes:start(#{carrier => none}),
    try
        Port = macula_test_nodes:call(Node, ?MODULE, start_listener,
                                      [0, server_options(#{}), []]),
        {C, Streams} = dial_and_echo(Port, #{idle_timeout_ms => 2000}),
        {ok, Passive} = macula_quic:open_stream(C),
        ok = macula_quic:send(Passive, <<"more">>),
        {ok, <<"more">>} = macula_quic:recv(Passive, 4, 5000),
        macula_test_nodes:kill(Node),
        %% Three times PTO at least, as below.
        ?assertEqual({error, {connection_lost, timeout}}, macula_quic:recv(Passive, 0, 60000)),
        ?EXPECT({quic, stream_closed, Passive, #{reason := timeout}}),
        ?EXPECT({quic, transport_shutdown, C, timeout}),
        ended(Streams, timeout),
        nothing_more()
    after
        macula_test_nodes:stop(Node)
    end.

a_stateless_reset(_Config) ->
    restarted(#{stateless_reset_key => crypto:strong_rand_bytes(32)}, reset).

without_the_key_there_is_no_reset(_Config) ->
    restarted(#{}, timeout).

%% A VM is killed, and another one listens in its place.
restarted(Options, Reason) ->
    {ok, First} = macula_test_nodes:start(#{carrier => none}),
    {ok, Second} = macula_test_nodes:start(#{carrier => none}),
    try
        Port = macula_test_nodes:call(First, ?MODULE, start_listener,
                                      [0, server_options(Options), []]),
        %% A reset must come before the timeout, however long the other one takes to listen.
        Idle = case Reason of reset -> 20000; timeout -> 5000 end,
        {C, [X | _] = Streams} = dial_and_echo(Port, #{idle_timeout_ms => Idle}),
        macula_test_nodes:kill(First),
        Port = macula_test_nodes:call(Second, ?MODULE, start_listener,
                                      [Port, server_options(Options), []]),
        %% A stateless reset answers a packet of some size (RFC 9000, section 10.3).
        ok = macula_quic:send(X, binary:copy(<<"anybody there?">>, 50)),
        %% The idle timeout is three times PTO at least (RFC 9000, section 10.1): long after a handshake
        %% with a busy machine.
        ?EXPECT({quic, transport_shutdown, C, Reason}, ok, 60000),
        ended(Streams, Reason),
        nothing_more(),
        %% The new one serves.
        {C2, _} = dial_and_echo(Port, #{}),
        ?assertEqual({ok, C2}, macula_quic:handshake(C2))
    after
        [macula_test_nodes:stop(N) || N <- [First, Second]]
    end.

a_stopped_listener_ends_once(_Config) ->
    {L, _} = macula_quic_lab:listen(),
    Self = self(),
    Closers = [spawn_link(fun() -> Self ! {self(), macula_quic:close_listener(L)} end)
               || _ <- lists:seq(1, 10)],
    [?EXPECT({Pid, ok}) || Pid <- Closers],
    ?EXPECT({quic, listener_stopped, L, undefined}),
    nothing_more().

%% Each side hears of one end: its own, or the other's, whichever was first for it.
both_sides_close_at_once(_Config) ->
    [begin
         #{client := C, server := S, streams := Streams} = streams(pair()),
         [spawn_link(fun() -> macula_quic:close_connection(X, 8, <<"race">>) end) || X <- [C, S]],
         [?EXPECT({quic, What, X, _} when What =:= closed orelse What =:= shutdown)
          || X <- [C, S]],
         [?EXPECT({quic, stream_closed, X, #{is_conn_shutdown := true}}) || {_, X} <- Streams],
         nothing_more()
     end || _ <- lists:seq(1, macula_quic_lab:times(10))].

every_call_fails_after_the_end(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    ok = macula_quic:close_connection(S, 3, <<"over">>),
    ?EXPECT({quic, stream_closed, Here, _}),
    ?EXPECT({quic, shutdown, C, _}),
    ?EXPECT({quic, stream_closed, There, _}),
    [?assertEqual({error, closed}, F()) || F <- [
        fun() -> macula_quic:send(Here, <<"x">>) end,
        fun() -> macula_quic:async_send(Here, <<"x">>) end,
        fun() -> macula_quic:open_stream(C) end,
        fun() -> macula_quic:accept_stream(C, #{}, 1000) end,
        fun() -> macula_quic:async_accept_stream(C) end,
        fun() -> macula_quic:send_datagram(C, <<"x">>) end,
        fun() -> macula_quic:send(There, <<"x">>) end]],
    Reason = {application_close, 3, <<"over">>},
    ?assertEqual({error, Reason}, macula_quic:handshake(C)),
    ?assertEqual({error, {connection_lost, Reason}}, macula_quic:recv(Here, 0, 1000)),
    %% What was known is still known, and closing again is no error.
    ?assertMatch({ok, {"127.0.0.1", _}}, macula_quic:peername(C)),
    ?assertMatch({ok, [_ | _]}, macula_quic:getstat(C)),
    ?assertMatch({ok, #{state := {closed, {application_close, 3, <<"over">>}}}},
                 macula_quic:info(C)),
    [?assertEqual(ok, macula_quic:close(H)) || H <- [C, S, Here, There]],
    nothing_more_of([C, S, Here, There]).

nothing_more_of(Handles) ->
    _ = [macula_quic:info(H) || H <- Handles],
    ?assertEqual([], [H || {quic, stream_closed, H, _} <- macula_quic_lab:mailbox(),
                           H =:= hd(Handles)]).

what_waits_is_answered_at_the_end(_Config) ->
    #{client := C, server := S} = Pair = pair(#{peer_bidi_stream_count => 1,
                                                high_watermark => 10000},
                                              #{stream_recv_window => 10000}),
    {Here, There} = stream(Pair),
    {ok, Out} = macula_quic:open_stream(S, #{direction => unidirectional}),
    Self = self(),
    Calls = [fun() -> macula_quic:open_stream(C, #{timeout => infinity}) end,
             fun() -> macula_quic:accept_stream(S) end,
             fun() -> macula_quic:accept_stream(S) end,
             fun() -> ok = macula_quic:send(Out, binary:copy(<<0>>, 100000)),
                      macula_quic:send(Out, <<0>>) end],
    Waiting = [waiting(fun() -> Self ! {self(), Call()} end) || Call <- Calls],
    Readers = [{waiting(fun() -> Self ! {self(), macula_quic:recv(X, Len)} end), Why}
               || {X, Len, Why} <- [{Here, 100, closed},
                                    {There, 1000000, {application_close, 0, <<>>}}]],
    ok = macula_quic:close_connection(C),
    [?EXPECT({Pid, {error, closed}}) || Pid <- Waiting],
    [?EXPECT({Pid, {error, {connection_lost, Why}}}) || {Pid, Why} <- Readers].

%% A process that has come to wait for something.
waiting(Fun) ->
    Pid = spawn_link(Fun),
    is_waiting(Pid),
    Pid.

is_waiting(Pid) ->
    macula_test_nodes:wait_until(fun() -> process_info(Pid, status) =:= {status, waiting} end).

%% Only what the peer has finished ends in `closed'; both for who waits, and for who comes later.
a_passive_reader_tells_a_whole_stream_from_one_cut_off(_Config) ->
    Bye = {application_close, 77, <<"bye">>},
    [begin
         #{client := C, server := S} = Pair = pair(),
         {Here, There} = stream(Pair),
         Self = self(),
         ok = macula_quic:send(Here, <<"begun">>),
         Reader = spawn_link(fun() ->
             Self ! {self(), macula_quic:recv(There, 5)},
             Self ! {self(), [macula_quic:recv(There, 5), macula_quic:recv(There, 5)]}
         end),
         %% It has part of it, and waits for more: a reset may take what was not read yet.
         ?EXPECT({Reader, {ok, <<"begun">>}}),
         is_waiting(Reader),
         End(Here, There, C, S),
         ?EXPECT({Reader, Read}, ?assertEqual([{error, Why}, {error, Why}], Read)),
         ?assertEqual({error, Why}, macula_quic:recv(There, 0, 0)),
         ?assertEqual({error, Why}, macula_quic:recv(There, 100, 1000))
     end || {End, Why} <- [
         {fun(H, _, _, _) -> ok = macula_quic:async_shutdown_stream(H, graceful, 0) end, closed},
         {fun(H, _, _, _) -> ok = macula_quic:async_shutdown_stream(H, abort_send, 9) end,
          {reset, 9}},
         {fun(H, _, _, _) -> ok = macula_quic:async_shutdown_stream(H, abort, 0) end, {reset, 0}},
         {fun(_, _, C, _) -> ok = macula_quic:close_connection(C, 77, <<"bye">>) end,
          {connection_lost, Bye}},
         {fun(_, _, _, S) -> ok = macula_quic:close_connection(S, 77, <<"bye">>) end,
          {connection_lost, closed}},
         {fun(_, T, _, _) -> ok = macula_quic:close_stream(T) end, stopped},
         {fun(_, T, _, _) -> ok = macula_quic:async_shutdown_stream(T, abort_receive, 3) end,
          stopped}]].

a_whole_stream_stays_whole_after_the_connection(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    {Cut, CutThere} = stream(Pair),
    ok = macula_quic:send(Here, <<"all of it">>, #{fin => true}),
    ok = macula_quic:send(Cut, <<"part of it">>),
    [begin
         ok = macula_quic:tell_delivered(Sent),
         ?EXPECT({quic, delivered, Sent, undefined})
     end || Sent <- [Here, Cut]],
    ok = macula_quic:close_connection(C, 5, <<"early">>),
    Reason = {application_close, 5, <<"early">>},
    ?EXPECT({quic, shutdown, S, Reason}),
    ?assertEqual([{ok, <<"all of it">>}, {error, closed}, {error, closed}],
                 [macula_quic:recv(There, 100, 5000) || _ <- [1, 2, 3]]),
    ?assertEqual([{ok, <<"part of it">>} | lists:duplicate(2, {error, {connection_lost, Reason}})],
                 [macula_quic:recv(CutThere, 100, 5000) || _ <- [1, 2, 3]]),
    %% The connection took both down, as the other half of each was open.
    [?EXPECT({quic, stream_closed, X, #{is_conn_shutdown := true, reason := Reason}})
     || X <- [There, CutThere]].

%% Whoever closes a connection and waits for all terminal messages gets them, whatever was unread.
closing_the_connection_ends_streams_with_unread_data(_Config) ->
    [begin
         #{server := S} = Pair = pair(),
         {Here, There} = stream(Pair),
         ok = macula_quic:send(Here, Data, #{fin => Fin}),
         %% Some of it is there.
         {ok, _} = macula_quic:recv(There, 1, 5000),
         ok = macula_quic:tell_delivered(Here),
         case Fin of
             true -> ?EXPECT({quic, delivered, Here, _});
             false -> ok
         end,
         ok = macula_quic:close_connection(S),
         ?EXPECT({quic, closed, S, normal}),
         ?EXPECT({quic, stream_closed, There, #{is_conn_shutdown := true}}),
         ?assertEqual({error, {connection_lost, closed}}, macula_quic:recv(There, 0, 1000))
     end || Fin <- [true, false], Data <- [<<"unread">>, <<0:800000>>],
            _ <- lists:seq(1, macula_quic_lab:times(3))].

the_death_of_an_owner_is_no_end_of_the_data(_Config) ->
    #{server := S} = Pair = pair(),
    {_Here, There} = stream(Pair),
    Self = self(),
    Reader = waiting(fun() -> Self ! {self(), macula_quic:recv(There, 5)} end),
    Owner = spawn(fun() -> receive stop -> ok end end),
    ok = macula_quic:controlling_process(There, Owner),
    exit(Owner, kill),
    ?EXPECT({Reader, {error, stopped}}),
    ?assertEqual({ok, S}, macula_quic:handshake(S)).

data_before_the_end_is_read_first(_Config) ->
    Options = #{idle_timeout_ms => 2000},
    #{relay := R, client := C, server := S} = Pair = macula_quic_lab:through(#{}, Options),
    {Here, There} = stream(Pair),
    ok = macula_quic:send(Here, <<"last words">>),
    {error, timeout} = macula_quic:recv(There, 100, 0),
    %% They have arrived.
    ok = macula_quic:tell_delivered(Here),
    ?EXPECT({quic, delivered, Here, undefined}),
    {error, timeout} = macula_quic:recv(There, 100, 20),
    ok = macula_relay:set(R, #{blackhole => true}),
    [?EXPECT({quic, transport_shutdown, X, timeout}, ok, 60000) || X <- [C, S]],
    ?assertEqual({ok, <<"last words">>}, macula_quic:recv(There, 0, 1000)),
    ?assertEqual({error, {connection_lost, timeout}}, macula_quic:recv(There, 0, 1000)),
    ?EXPECT({quic, stream_closed, There, #{is_conn_shutdown := true, reason := timeout}}),
    macula_relay:stop(R).

a_local_close_ends_passive_streams_too(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    ok = macula_quic:send(Here, <<"never read">>),
    {error, timeout} = macula_quic:recv(There, 100, 100),
    ok = macula_quic:close_connection(S),
    ?EXPECT({quic, stream_closed, There, #{is_conn_shutdown := true, reason := closed}}),
    ?EXPECT({quic, closed, S, normal}),
    ?EXPECT({quic, shutdown, C, _}).

%% Streams that end by themselves, in every way, do so once, and not again with the connection.
a_stream_of_every_kind_ends_once(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    Ways = [fun(A, B) -> [ok = macula_quic:close_stream(X) || X <- [A, B]] end,
            fun(A, B) -> ok = macula_quic:async_shutdown_stream(A, abort, 1),
                         ok = macula_quic:async_shutdown_stream(B, abort, 2) end,
            fun(A, B) -> ok = macula_quic:async_shutdown_stream(A, abort, 1),
                         ok = macula_quic:close_stream(B) end,
            fun(A, B) -> [ok = macula_quic:async_shutdown_stream(X, graceful, 0) || X <- [A, B]],
                         [{error, closed} = macula_quic:recv(X, 0, 5000) || X <- [A, B]] end,
            fun(A, B) -> [ok = macula_quic:setopt(X, active, true) || X <- [A, B]],
                         [ok = macula_quic:send(X, <<"x">>, #{fin => true}) || X <- [A, B]] end,
            fun(A, B) -> ok = macula_quic:async_shutdown_stream(A, [graceful, abort_receive], 3),
                         {error, closed} = macula_quic:recv(B, 0, 5000) end],
    Streams = lists:append([begin
                                {A, B} = stream(Pair),
                                _ = Way(A, B),
                                [A, B]
                            end || Way <- Ways]),
    [?EXPECT({quic, stream_closed, X, #{reason := normal, is_conn_shutdown := false}})
     || X <- Streams],
    ok = macula_quic:close_connection(C),
    ?EXPECT({quic, closed, C, normal}),
    ?EXPECT({quic, shutdown, S, _}),
    ?assertEqual([], [M || {quic, stream_closed, _, _} = M <- macula_quic_lab:mailbox()]).

%% More waits than the congestion window has room for, and nobody reads.
%% A process closes the connection and ends, with a stream that is its own: for the peer the stream was cut off by
%% the close, neither reset nor finished before.
the_end_of_those_who_close_does_not_overtake_it(_Config) ->
    Reason = {application_close, 7, <<"bye">>},
    {Out, In} = macula_quic_lab:stream(pair()),
    Reader = spawn_link(fun() -> receive go -> drain(In) end end),
    ok = macula_quic:controlling_process(In, Reader),
    Reader ! go,
    Talkers = [spawn_link(fun() -> talk(Out) end) || _ <- lists:seq(1, 2)],
    [begin
         #{client := C, server := S} = Pair = pair(),
         {Here, There} = macula_quic_lab:stream(Pair),
         ok = macula_quic:setopt(Here, active, true),
         {Closer, Monitor} = spawn_monitor(fun() ->
             receive go -> ok end,
             ok = macula_quic:async_shutdown_connection(S, 0, {7, <<"bye">>})
         end),
         ok = macula_quic:controlling_process(There, Closer),
         Closer ! go,
         ?EXPECT({'DOWN', Monitor, process, _, normal}),
         ?EXPECT({quic, stream_closed, Here, #{is_conn_shutdown := true, reason := Reason}}),
         ?NOTHING({quic, peer_send_aborted, Here, _}),
         ?NOTHING({quic, peer_send_shutdown, Here, _}),
         ?EXPECT({quic, shutdown, C, Reason}),
         ?EXPECT({quic, closed, S, normal})
     end || _ <- lists:seq(1, 300)],
    [begin
         unlink(Talker),
         exit(Talker, kill)
     end || Talker <- Talkers ++ [Reader]].

%% Keeps native threads busy with what schedulers leave to them.
talk(Out) ->
    ok = macula_quic:send(Out, <<"x">>),
    talk(Out).

drain(In) ->
    {ok, _} = macula_quic:recv(In, 0),
    drain(In).

a_close_amid_bulk_is_heard_at_once(_Config) ->
    [begin
         Pair = #{client := C, server := S} = pair(),
         {Here, There} = stream(Pair),
         {From, To, Sender} = case N rem 2 of 0 -> {C, S, Here}; 1 -> {S, C, There} end,
         ok = macula_quic:send(Sender, binary:copy(<<0>>, Size)),
         ok = macula_quic:close_connection(From, 7, <<"bye">>),
         ?EXPECT({quic, shutdown, To, {application_close, 7, <<"bye">>}}),
         ?EXPECT({quic, closed, From, normal}),
         %% The window that lets the close pass is nobody's business.
         {ok, [{cwnd, Window}]} = macula_quic:getstat(From, [cwnd]),
         ?assert(Window < 100_000_000)
     end || Size <- [15000, 25000, 200000, 1000000], N <- lists:seq(1, 10)].
