%% What can be asked of a handle, and that the answers are true; datagrams; a moving client.
-module(macula_quic_knowledge_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([bytes_and_packets_are_counted/1, counters_grow_and_never_shrink/1,
         rtt_is_in_microseconds/1, losses_are_counted/1, no_loss_is_no_loss/1,
         send_pend_is_what_waits/1, streams_are_those_that_are_open/1, mtu_is_found/1,
         a_large_maximum_mtu_carries_streams_and_datagrams/1,
         counters_come_in_the_order_asked_for/1, unknown_counters_are_refused/1,
         names_of_both_ends/1, info_of_every_handle/1, every_reason_has_words/1]).
-export([datagrams_arrive/1, datagrams_are_delivered_as_armed/1,
         datagrams_are_counted_as_messages_of_streams_are/1, senders_choose_what_a_full_queue_of_datagrams_does/1,
         too_large_datagrams_are_emsgsize/1,
         max_datagram_size_is_exact/1, a_peer_without_datagrams/1, datagrams_may_be_lost/1,
         wrong_datagrams_are_refused/1, datagrams_keep_their_order/1,
         a_sender_of_datagrams_waits_for_room/1,
         senders_of_datagrams_hear_of_the_end/1]).
-export([a_rebound_client_keeps_its_connection/1, migration_can_be_forbidden/1,
         the_handshake_is_told_on_request/1,
         changes_are_told_on_request/1, what_datagrams_may_carry_is_told/1, told_changes_move_with_the_owner/1]).
-export([the_streams_that_the_peer_allows_are_told/1, streams_that_are_allowed_fast_are_told_together/1,
         a_peer_that_needs_streams_is_told/1, streams_are_told_to_nobody_who_has_not_asked/1]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, through/2]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

stat(Conn, Name) ->
    {ok, [{Name, Value}]} = macula_quic:getstat(Conn, [Name]),
    Value.

stats(Conn) ->
    {ok, Stats} = macula_quic:getstat(Conn),
    maps:from_list(Stats).

%%--------------------------------------------------------------------------------------------

bytes_and_packets_are_counted(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    Size = 3000000,
    %% No more at a time than any system's socket has room for: what is lost is sent, and counted,
    %% again.
    Part = 30000,
    [begin
         ok = macula_quic:send(Here, binary:copy(<<1>>, Part)),
         ok = macula_quic_lab:read(There, Part)
     end || _ <- lists:seq(1, Size div Part)],
    #{send_oct := Sent, send_cnt := SentCnt, sent_packets := Packets,
      sent_stream_frames := Frames} = stats(C),
    #{recv_oct := Received, recv_cnt := ReceivedCnt, recv_stream_frames := GotFrames,
      sent_acks := Acks} = stats(S),
    %% Headers and handshake cost something, but not much.
    [?assertMatch(_ when N > Size andalso N < Size * 1.2, N) || N <- [Sent, Received]],
    [?assertMatch(_ when N > Size div 1500 andalso N < Size div 1000, N)
     || N <- [SentCnt, ReceivedCnt, Packets, Frames, GotFrames]],
    ?assertMatch(_ when Acks > 10, Acks),
    %% The other way there was next to nothing.
    ?assert(stat(S, send_oct) < Size div 5),
    ok = macula_quic:close_stream(Here).

counters_grow_and_never_shrink(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    Growing = [send_oct, send_cnt, recv_oct, recv_cnt, sent_packets, sent_syscalls, recv_syscalls,
               sent_stream_frames, recv_acks],
    lists:foldl(fun(_, Before) ->
        ok = macula_quic:send(Here, binary:copy(<<0>>, 100000)),
        ok = macula_quic_lab:read(There, 100000),
        After = macula_test_nodes:wait_until(fun() ->
            Now = maps:with(Growing, stats(C)),
            case [K || K <- Growing, maps:get(K, Now) =< maps:get(K, Before)] of
                [] -> {value, Now};
                Still -> Still
            end
        end),
        ?assertEqual(length(Growing), map_size(After)),
        After
    end, maps:with(Growing, stats(C)), lists:seq(1, 5)).

rtt_is_in_microseconds(_Config) ->
    #{relay := R, client := C, server := S} = Pair = through(#{delay_ms => 20}, #{}),
    {Here, There} = stream(Pair),
    [begin
         ok = macula_quic:send(Here, <<"ping">>),
         {ok, <<"ping">>} = macula_quic:recv(There, 4, 5000),
         ok = macula_quic:send(There, <<"pong">>),
         {ok, <<"pong">>} = macula_quic:recv(Here, 4, 5000)
     end || _ <- lists:seq(1, 10)],
    [begin
         #{rtt := Rtt, min_rtt := Min} = stats(X),
         %% Neither milliseconds nor nanoseconds, however long a busy machine may take.
         ?assertMatch(_ when Min >= 40000 andalso Min < 4000000, Min),
         ?assertMatch(_ when Rtt >= Min andalso Rtt < 20000000, Rtt)
     end || X <- [C, S]],
    macula_relay:stop(R),
    %% And without the relay it is less, once nothing else has held a packet up.
    #{client := Near} = NearPair = pair(),
    {NearHere, NearThere} = stream(NearPair),
    macula_test_nodes:wait_until(fun() ->
        ok = macula_quic:send(NearHere, <<"ping">>),
        {ok, <<"ping">>} = macula_quic:recv(NearThere, 4, 5000),
        Min = stat(Near, min_rtt),
        (Min > 0 andalso Min < 40000) orelse Min
    end).

losses_are_counted(_Config) ->
    #{relay := R, client := C} = Pair = through(#{seed => 7}, #{}),
    {Here, There} = stream(Pair),
    ok = macula_relay:set(R, #{up => #{loss => 0.05}}),
    Size = 3000000,
    _ = spawn_link(fun() ->
        ok = macula_quic:send(Here, binary:copy(<<1>>, Size), #{fin => true})
    end),
    ?assertEqual(Size, byte_size(macula_quic_lab:read_to_end(There))),
    #{lost_packets := Lost, lost_bytes := Bytes, sent_packets := Sent,
      congestion_events := Events} = stats(C),
    #{up := #{lost := Dropped}} = macula_relay:stats(R),
    %% What the relay lost, within what is lost on the way to being noticed.
    ?assertMatch(_ when Dropped > 20, Dropped),
    ?assertMatch(_ when Lost >= Dropped * 0.7 andalso Lost =< Dropped * 3, Lost),
    ?assertMatch(_ when Bytes > Lost * 100 andalso Bytes < Lost * 1500, Bytes),
    ?assertMatch(_ when Events > 0 andalso Events =< Lost, Events),
    ?assertMatch(_ when Sent > Size div 1500, Sent),
    macula_relay:stop(R),
    ok = macula_quic:close_stream(Here).

no_loss_is_no_loss(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    [begin
         ok = macula_quic:send(Here, <<N:32>>),
         {ok, <<N:32>>} = macula_quic:recv(There, 4, 5000)
     end || N <- lists:seq(1, 100)],
    %% Probes for a larger MTU may be lost, data is not.
    #{lost_bytes := 0, congestion_events := 0, black_holes := 0} = stats(C).

send_pend_is_what_waits(_Config) ->
    #{client := C} = Pair = pair(#{stream_recv_window => 10000}, #{}),
    {Here, There} = stream(Pair),
    %% What the peer has read may not be counted out yet.
    macula_test_nodes:wait_until(fun() -> stat(C, send_pend) =:= 0 end),
    ok = macula_quic:send(Here, binary:copy(<<0>>, 500000)),
    %% The window of the stream and nothing more has left.
    macula_test_nodes:wait_until(fun() -> stat(C, send_pend) =< 490001 end),
    ?assertMatch(N when N >= 480000, stat(C, send_pend)),
    ok = macula_quic_lab:read(There, 500000),
    macula_test_nodes:wait_until(fun() -> stat(C, send_pend) =:= 0 end),
    %% What is thrown away waits no more.
    ok = macula_quic:send(Here, binary:copy(<<0>>, 500000)),
    ok = macula_quic:async_shutdown_stream(Here, abort_send, 0),
    macula_test_nodes:wait_until(fun() -> stat(C, send_pend) =:= 0 end).

streams_are_those_that_are_open(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    Streams = [stream(Pair) || _ <- lists:seq(1, 7)],
    [?assertEqual(7, stat(X, streams)) || X <- [C, S]],
    [begin
         ok = macula_quic:close_stream(A),
         ok = macula_quic:close_stream(B)
     end || {A, B} <- Streams],
    [?EXPECT({quic, stream_closed, X, _}) || {A, B} <- Streams, X <- [A, B]],
    %% The handles are still held.
    [?assertEqual(0, stat(X, streams)) || X <- [C, S]],
    ?assertMatch({ok, #{state := closed}}, macula_quic:info(element(1, hd(Streams)))).

mtu_is_found(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    macula_test_nodes:wait_until(fun() ->
        ok = macula_quic:send(Here, <<0:8000>>),
        ok = macula_quic_lab:read(There, 1000),
        stat(C, mtu) =:= 1452
    end),
    ?assertMatch(N when N > 0, stat(C, mtu_probes_sent)),
    #{client := Fixed} = pair(#{}, #{maximum_mtu => 1200}),
    ?assertEqual(1200, stat(Fixed, mtu)),
    #{client := Large} = LargePair = pair(#{maximum_mtu => 9000}, #{maximum_mtu => 9000}),
    {LargeHere, LargeThere} = stream(LargePair),
    macula_test_nodes:wait_until(fun() ->
        ok = macula_quic:send(LargeHere, <<0:80000>>),
        ok = macula_quic_lab:read(LargeThere, 10000),
        stat(Large, mtu) > 8000
    end).

%% A batch of datagrams this large is more than one segmented send can carry, and one that cannot be
%% sent looks like a path that lost it: then the MTU would fall back.
a_large_maximum_mtu_carries_streams_and_datagrams(_Config) ->
    [begin
        Large = #{maximum_mtu => 65000},
        #{client := C, server := S} = Pair = pair(Large, Large),
        {Here, There} = stream(Pair),
        Data = crypto:strong_rand_bytes(8 bsl 20),
        Both = [{A, B, Conn} || {A, B, Conn} <- [{Here, There, C}, {There, Here, S}]],
        %% Both directions at once, until both have found what the path takes.
        macula_test_nodes:wait_until(fun() ->
            [ok = macula_quic:async_send(A, <<0:800000>>) || {A, _, _} <- Both],
            [ok = macula_quic_lab:read(B, 100000) || {_, B, _} <- Both],
            Found = [stat(Conn, mtu) || {_, _, Conn} <- Both],
            lists:all(fun(Mtu) -> Mtu > 60000 end, Found) orelse Found
        end, 30000),
        Readers = [spawn_monitor(fun() ->
            ok = macula_quic:send(A, Data, #{fin => true})
        end) || {A, _, _} <- Both],
        [?assertEqual(Data, macula_quic_lab:read_to_end(B)) || {_, B, _} <- Both],
        [receive {'DOWN', Mon, process, _, Why} -> ?assertEqual(normal, Why) end
         || {_, Mon} <- Readers],
        [begin
            %% The search for a larger MTU may still go on.
            Size = macula_test_nodes:wait_until(fun() ->
                {ok, Largest} = macula_quic:max_datagram_size(From),
                case macula_quic:send_datagram(From, <<0:(8 * Largest + 8)>>) of
                    {error, emsgsize} -> {value, Largest};
                    ok -> Largest
                end
            end),
            ?assertMatch(_ when Size > 60000, Size),
            ok = macula_quic:setopt(To, datagrams, true),
            [begin
                Datagram = crypto:strong_rand_bytes(Size - N),
                ok = macula_quic:send_datagram(From, Datagram),
                ?EXPECT({quic, dgram, To, Datagram}, ok, 10000)
             end || N <- [0, 1, 1000]]
         end || {From, To} <- [{C, S}, {S, C}]],
        [begin
            ?assertEqual(0, stat(Conn, black_holes)),
            ?assertMatch(Mtu when Mtu > 60000, stat(Conn, mtu))
         end || {_, _, Conn} <- Both],
        ok = macula_quic_lab:close(Pair)
     end || _ <- lists:seq(1, macula_quic_lab:times(3))].

counters_come_in_the_order_asked_for(_Config) ->
    #{client := C} = pair(),
    {ok, All} = macula_quic:getstat(C),
    Names = [Name || {Name, _} <- All],
    [?assert(lists:member(Name, Names))
     || Name <- [recv_oct, recv_cnt, send_oct, send_cnt, send_pend, sent_packets, lost_packets,
                 lost_bytes, rtt, cwnd, mtu, streams]],
    [begin
         {ok, Some} = macula_quic:getstat(C, Asked),
         ?assertEqual(Asked, [Name || {Name, _} <- Some]),
         [?assert(is_integer(Value) andalso Value >= 0) || {_, Value} <- Some]
     end || Asked <- [Names, lists:reverse(Names), [], [rtt, rtt, cwnd]]],
    ?assertMatch(N when N >= 2400, stat(C, cwnd)).

unknown_counters_are_refused(_Config) ->
    #{client := C} = pair(),
    ?assertMatch({error, {bad_option, luck, _}}, macula_quic:getstat(C, [rtt, luck])),
    [?assertMatch({error, {bad_option, _, _}}, macula_quic:getstat(C, Wrong))
     || Wrong <- [rtt, [rtt | cwnd], ["rtt"], [{rtt, 1}], #{rtt => 1}]],
    ?assertEqual({error, badarg}, macula_quic:getstat(make_ref(), [rtt])),
    ?assertEqual({error, badarg}, macula_quic:getstat(make_ref())).

names_of_both_ends(_Config) ->
    #{client := C, server := S, port := Port, listener := L} = pair(),
    ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:peername(C)),
    ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:sockname(S)),
    ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:sockname(L)),
    ?assertEqual(macula_quic:sockname(C), macula_quic:peername(S)),
    [?assertEqual({ok, <<"test">>}, macula_quic:negotiated_protocol(X)) || X <- [C, S]],
    #{cert := Pem} = macula_quic_lab:credentials(),
    [{_, Der, _}] = public_key:pem_decode(Pem),
    ?assertEqual({ok, Der}, macula_quic:peercert(C)),
    ?assertEqual({error, no_peercert}, macula_quic:peercert(S)),
    ?assertEqual({ok, [Der]}, macula_quic:peercerts(C)),
    ?assertEqual({error, no_peercert}, macula_quic:peercerts(S)),
    [?assertEqual({error, badarg}, F(Wrong))
     || F <- [fun macula_quic:peername/1, fun macula_quic:sockname/1, fun macula_quic:peercert/1,
              fun macula_quic:peercerts/1, fun macula_quic:negotiated_protocol/1, fun macula_quic:max_datagram_size/1,
              fun macula_quic:info/1, fun macula_quic:handshake/1],
        Wrong <- [make_ref(), self(), conn]].

info_of_every_handle(_Config) ->
    #{client := C, server := S, listener := L} = Pair = pair(),
    {Here, There} = stream(Pair),
    Self = self(),
    ?assertMatch({ok, #{handle := connection, side := client, state := open, owner := Self,
                        peername := _, sockname := _, negotiated_protocol := <<"test">>,
                        stats := #{rtt := _}}}, macula_quic:info(C)),
    ?assertMatch({ok, #{handle := connection, side := server}}, macula_quic:info(S)),
    ?assertMatch({ok, #{handle := listener, owner := Self}}, macula_quic:info(L)),
    [?assertMatch({ok, #{handle := stream, stream_id := 0, direction := bidirectional,
                         initiator := client, owner := Self, active := false, state := open,
                         send_pend := _}}, macula_quic:info(X)) || X <- [Here, There]].

%% All that the documentation, the code and the table of messages name.
every_reason_has_words(_Config) ->
    Reasons = [timeout, closed, badarg, busy, not_owner, noproc, reset, connection_refused,
               version_mismatch, cids_exhausted, bad_server_name, no_peercert, no_path_mtu,
               protocol_not_negotiated, key_mismatch, unsupported, disabled, internal_error,
               einval, nxdomain, eaddrinuse, eacces, eaddrnotavail, eafnosupport, emfile,
               enetunreach, ehostunreach, econnrefused, emsgsize,
               {bad_option, key, "why"}, {unsupported_option, key},
               {bad_certfile, "file", enoent}, {bad_keyfile, <<"file">>, bad_password},
               {bad_keyfile, pem, no_password}, {bad_keyfile, "f", no_key},
               {bad_cacertfile, "f", no_certificate}, {bad_cert, unknown_ca},
               {bad_key, key_mismatch}, {bad_san, "x"}, {tls_alert, handshake_failure},
               {alpn_mismatch, [<<"h3">>]}, {application_close, 5, <<"bye">>},
               {application_close, 5, <<255, 0>>}, {transport_close, protocol_violation, <<"x">>},
               {transport_error, internal_error, <<>>}, {reset, 5}, {stopped, 7},
               stopped, {connection_lost, timeout}, {connection_lost, closed},
               {connection_lost, {application_close, 5, <<"bye">>}}],
    Words = [macula_quic:format_error(R) || R <- Reasons],
    [begin
         ?assert(io_lib:char_list(W)),
         ?assertEqual(W, macula_quic:format_error({error, R})),
         ?assertEqual(nomatch, string:find(W, "unknown POSIX"), {R, W}),
         ?assertEqual(nomatch, string:find(W, "\n"), {R, W})
     end || {R, W} <- lists:zip(Reasons, Words)],
    %% Nothing is beyond words.
    [?assert(io_lib:char_list(macula_quic:format_error(Odd)))
     || Odd <- [{what, ever}, 42, <<"x">>, #{}, self(), "text", [1 | 2], {error, {error, x}},
                {bad_option, [1 | 2], {no, text}}, {application_close, a, b},
                {alpn_mismatch, none}, {reset, x}, {stopped, "y"}, {bad_certfile, a, b},
                {tls_alert, 5}, {bad_cert, {x, y}}, {transport_close, 1, 2}, fun() -> ok end]].

%%--------------------------------------------------------------------------------------------

datagrams_arrive(_Config) ->
    #{client := C, server := S} = pair(),
    [ok = macula_quic:setopt(X, datagrams, true) || X <- [C, S]],
    [begin
         ok = macula_quic:send_datagram(From, Data),
         Expected = iolist_to_binary(Data),
         ?EXPECT({quic, dgram, To, Expected})
     end || {From, To} <- [{C, S}, {S, C}], Data <- [<<"one">>, ["io", <<"list">>], <<>>, <<0:8000>>]].

datagrams_are_delivered_as_armed(_Config) ->
    #{client := C, server := S} = pair(),
    [ok = macula_quic:send_datagram(C, <<N>>) || N <- [1, 2, 3, 4, 5, 6]],
    macula_test_nodes:wait_until(fun() -> stat(S, recv_datagrams) =:= 6 end),
    ?NOTHING({quic, dgram, _, _}),
    ok = macula_quic:setopt(S, datagrams, once),
    ?EXPECT({quic, dgram, S, <<1>>}),
    ok = macula_quic:setopt(S, datagrams, 2),
    [?EXPECT({quic, dgram, S, <<N>>}) || N <- [2, 3]],
    ?EXPECT({quic, passive, S, undefined}),
    ?NOTHING({quic, dgram, _, _}),
    ok = macula_quic:setopt(S, datagrams, true),
    [?EXPECT({quic, dgram, S, <<N>>}) || N <- [4, 5, 6]],
    ok = macula_quic:setopt(S, datagrams, false),
    ok = macula_quic:send_datagram(C, <<7>>),
    macula_test_nodes:wait_until(fun() -> stat(S, recv_datagrams) =:= 7 end),
    {ok, _} = macula_quic:info(S),
    ?NOTHING({quic, dgram, _, _}),
    [?assertMatch({error, {bad_option, datagrams, _}}, macula_quic:setopt(S, datagrams, Wrong))
     || Wrong <- [-32769, 32768, yes, "once", 1.0]].

datagrams_are_counted_as_messages_of_streams_are(_Config) ->
    #{client := C, server := S} = pair(),
    [ok = macula_quic:setopt(S, datagrams, N) || N <- [1, 1, 2, -1]],
    [ok = macula_quic:send_datagram(C, <<N>>) || N <- [1, 2, 3, 4]],
    [?EXPECT({quic, dgram, S, <<N>>}) || N <- [1, 2, 3]],
    ?EXPECT({quic, passive, S, undefined}),
    macula_test_nodes:wait_until(fun() -> stat(S, recv_datagrams) =:= 4 end),
    {ok, _} = macula_quic:info(S),
    ?NOTHING({quic, dgram, _, _}),
    %% A count may end by a request; one that would be too large leaves what was.
    ok = macula_quic:setopt(S, datagrams, 32767),
    ?EXPECT({quic, dgram, S, <<4>>}),
    ?assertMatch({error, {bad_option, datagrams, _}}, macula_quic:setopt(S, datagrams, 2)),
    ok = macula_quic:setopt(S, datagrams, -32768),
    ?EXPECT({quic, passive, S, undefined}),
    ok = macula_quic:setopt(S, datagrams, once),
    ok = macula_quic:send_datagram(C, <<5>>),
    ?EXPECT({quic, dgram, S, <<5>>}),
    ?NOTHING({quic, passive, _, _}).

%% The way is blocked: nothing leaves, so that the queue is full and stays so.
senders_choose_what_a_full_queue_of_datagrams_does(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(#{datagram_receive_buffer => 1 bsl 24}),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}}),
    At = macula_relay:port(Relay),
    #{client := C, server := S} = macula_quic_lab:pair(Listener, At, #{datagram_send_buffer => 100000}),
    ok = macula_quic:setopt(S, datagrams, true),
    ok = macula_relay:set(Relay, #{loss => 1.0}),
    Full = fun Fill(N) ->
        case macula_quic:send_datagram(C, <<N:32, 0:7968>>, #{timeout => 200}) of
            ok -> Fill(N + 1);
            {error, timeout} -> N
        end
    end(0),
    ?assertMatch(_ when Full > 200, Full),
    ?assertEqual(0, stat(C, dropped_datagrams)),
    %% As many as are in the queue go, and those that are last in it.
    [ok = macula_quic:send_datagram(C, <<N:32, 0:7968>>, #{overflow => drop_oldest})
     || N <- lists:seq(Full, Full + 999)],
    Dropped = stat(C, dropped_datagrams),
    ?assertMatch(_ when Dropped >= 700 andalso Dropped =< 1001, Dropped),
    ok = macula_relay:set(Relay, #{loss => 0.0}),
    Last = Full + 999,
    ?EXPECT({quic, dgram, S, <<Last:32, _/binary>>}, ok, 20000),
    [?assertEqual({error, {bad_option, Key, Why}}, macula_quic:send_datagram(C, <<>>, #{Key => Wrong}))
     || {Key, Wrong, Why} <- [{overflow, drop, {wanted, {one_of, [wait, drop_oldest]}}},
                              {timeout, -1, {wanted, timeout}}, {full, wait, unknown}]],
    ok = macula_relay:stop(Relay).

too_large_datagrams_are_emsgsize(_Config) ->
    #{client := C} = pair(),
    [?assertEqual({error, emsgsize}, macula_quic:send_datagram(C, binary:copy(<<0>>, Size)))
     || Size <- [1500, 65536, 5000000]].

max_datagram_size_is_exact(_Config) ->
    #{client := C, server := S} = pair(#{maximum_mtu => 1200}, #{maximum_mtu => 1200}),
    ok = macula_quic:setopt(S, datagrams, true),
    {ok, Max} = macula_quic:max_datagram_size(C),
    ?assertMatch(_ when Max > 1100 andalso Max < 1200, Max),
    ok = macula_quic:send_datagram(C, binary:copy(<<1>>, Max)),
    ?EXPECT({quic, dgram, S, <<1, _/binary>>}),
    ?assertEqual({error, emsgsize}, macula_quic:send_datagram(C, binary:copy(<<1>>, Max + 1))).

a_peer_without_datagrams(_Config) ->
    #{client := C, server := S} = pair(#{datagram_receive_enabled => false}, #{}),
    ?assertEqual({error, no_path_mtu}, macula_quic:max_datagram_size(C)),
    ?assertEqual({error, unsupported}, macula_quic:send_datagram(C, <<"x">>)),
    ?assertMatch({error, Why} when Why =:= disabled; Why =:= unsupported,
                 macula_quic:send_datagram(S, <<"x">>)).

datagrams_may_be_lost(_Config) ->
    #{relay := R, client := C, server := S} = through(#{seed => 3}, #{}),
    ok = macula_quic:setopt(S, datagrams, true),
    ok = macula_relay:set(R, #{up => #{loss => 0.3}}),
    Sent = until_lost(R, C, 0),
    ok = macula_relay:set(R, #{up => #{loss => 0.0}}),
    Got = until_last(C, S, []),
    ?assertMatch(N when N > 0 andalso N < Sent, length(Got)),
    %% In order on this path, and none twice.
    ?assertEqual(Got, lists:usort(Got)),
    macula_relay:stop(R).

%% Until the relay has lost some packets: it takes them later than they are sent, and one carries
%% many of these where their sender is faster than the line.
until_lost(Relay, Conn, Sent) ->
    [ok = macula_quic:send_datagram(Conn, <<N:32>>) || N <- lists:seq(Sent + 1, Sent + 50)],
    case macula_relay:stats(Relay) of
        #{up := #{lost := Lost}} when Lost >= 20, Sent >= 450 -> Sent + 50;
        _ -> until_lost(Relay, Conn, Sent + 50)
    end.

%% The last one may be lost as well, in a buffer of the relay's: it is sent until it arrives.
until_last(From, To, Got) ->
    until_last(From, To, fun(<<N:32>>) -> N end, Got).

until_last(From, To, Read, Got) ->
    receive
        {quic, dgram, To, <<"last">>} -> lists:reverse(Got);
        {quic, dgram, To, Data} -> until_last(From, To, Read, [Read(Data) | Got])
    after 100 ->
        ok = macula_quic:send_datagram(From, <<"last">>),
        until_last(From, To, Read, Got)
    end.

datagrams_keep_their_order(_Config) ->
    #{client := C, server := S} = pair(),
    ok = macula_quic:setopt(S, datagrams, true),
    Self = self(),
    Senders = [spawn_link(fun() ->
                   [ok = macula_quic:send_datagram(C, <<Me:8, N:32, 0:4000>>)
                    || N <- lists:seq(1, 2000)],
                   Self ! {self(), done}
               end) || Me <- lists:seq(1, 4)],
    [?EXPECT({Sender, done}) || Sender <- Senders],
    Got = until_last(C, S, fun(<<Me:8, N:32, _/binary>>) -> {Me, N} end, []),
    [begin
         Mine = [N || {From, N} <- Got, From =:= Me],
         ?assertEqual(Mine, lists:usort(Mine)),
         ?assertMatch(_ when length(Mine) > 200, length(Mine))
     end || Me <- lists:seq(1, 4)].

%% With a line that takes little, a sender is no faster than the line, and what waits stays little.
a_sender_of_datagrams_waits_for_room(_Config) ->
    #{relay := R, client := C} = through(#{}, #{}),
    ok = macula_quic:send_datagram(C, <<"known">>),
    ok = macula_relay:set(R, #{up => #{loss => 1.0}}),
    Sender = spawn_link(fun Loop() -> ok = macula_quic:send_datagram(C, <<0:8000>>), Loop() end),
    %% Nothing is acknowledged any more: the window is full, then QUIC's buffer, then the queue.
    ok = macula_test_nodes:wait_until(fun() ->
        {_, Before} = process_info(Sender, reductions),
        {_, Waits} = process_info(Sender, status),
        receive after 50 -> ok end,
        {Waits, Before} =:= {waiting, element(2, process_info(Sender, reductions))}
    end),
    ok = macula_relay:set(R, #{up => #{loss => 0.0}}),
    {_, Then} = process_info(Sender, reductions),
    ok = macula_test_nodes:wait_until(fun() ->
        element(2, process_info(Sender, reductions)) > Then + 1000
    end),
    unlink(Sender),
    exit(Sender, kill),
    macula_relay:stop(R).

senders_of_datagrams_hear_of_the_end(_Config) ->
    #{relay := R, client := C} = through(#{}, #{}),
    ok = macula_quic:send_datagram(C, <<"known">>),
    ok = macula_relay:set(R, #{up => #{loss => 1.0}}),
    Self = self(),
    Send = fun Send() ->
        case macula_quic:send_datagram(C, <<0:8000>>) of
            ok -> Send();
            Error -> Self ! {self(), Error}
        end
    end,
    Senders = [spawn_link(Send) || _ <- lists:seq(1, 4)],
    ok = macula_test_nodes:wait_until(fun() ->
        lists:all(fun(Pid) -> process_info(Pid, status) =:= {status, waiting} end, Senders)
    end),
    ok = macula_quic:close_connection(C),
    [?EXPECT({Sender, {error, closed}}) || Sender <- Senders],
    ?assertEqual({error, closed}, macula_quic:send_datagram(C, <<"late">>)),
    macula_relay:stop(R).

wrong_datagrams_are_refused(_Config) ->
    #{client := C} = pair(),
    [?assertMatch({error, {bad_option, data, _}}, macula_quic:send_datagram(C, Wrong))
     || Wrong <- [data, [256], [1 | 2], <<1:3>>]],
    ?assertEqual({error, badarg}, macula_quic:send_datagram(make_ref(), <<"x">>)).

%%--------------------------------------------------------------------------------------------

a_rebound_client_keeps_its_connection(_Config) ->
    #{relay := R, client := C, server := S} = Pair = through(#{}, #{}),
    {Here, There} = stream(Pair),
    {ok, Before} = macula_quic:peername(S),
    Names = [begin
         ok = macula_relay:rebind(R),
         ok = macula_quic:send(Here, <<N:32>>),
         {ok, <<N:32>>} = macula_quic:recv(There, 4, 10000),
         ok = macula_quic:send(There, <<N:32>>),
         {ok, <<N:32>>} = macula_quic:recv(Here, 4, 10000),
         {ok, Name} = macula_quic:peername(S),
         Name
     end || N <- lists:seq(1, 5)],
    %% The server sees the client move each time; a port that is free again may be given again.
    [?assertNotEqual(Old, New)
     || {Old, New} <- lists:zip([Before | lists:droplast(Names)], Names)],
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]],
    macula_relay:stop(R).

the_handshake_is_told_on_request(_Config) ->
    #{client := C, server := S} = pair(#{}, #{server_name => "localhost"}),
    ?NOTHING({quic, connected, _, _}),
    [begin
         ok = macula_quic:tell_changes(X),
         {ok, Peer} = macula_quic:peername(X),
         {ok, Own} = macula_quic:sockname(X),
         Props = ?EXPECT({quic, connected, X, P}, P),
         Name = case X of
             S -> <<"localhost">>;
             C -> undefined
         end,
         Cert = case macula_quic:peercert(X) of
             {ok, Der} -> Der;
             {error, no_peercert} -> undefined
         end,
         ?assertEqual(#{is_resumed => false, alpns => "test", negotiated_protocol => <<"test">>, peername => Peer,
                        sockname => Own, server_name => Name, peercert => Cert}, Props)
     end || X <- [C, S, C]],
    {ok, Shown} = macula_quic:peercert(C),
    [?EXPECT({quic, peer_cert_received, C, #{cert := Shown, chain := [Shown]}}) || _ <- [1, 2]],
    ?NOTHING({quic, peer_cert_received, S, _}).

changes_are_told_on_request(_Config) ->
    #{relay := R, client := C, server := S} = Pair = through(#{}, #{maximum_mtu => 1200}),
    {Here, There} = stream(Pair),
    ?assertEqual(ok, macula_quic:tell_changes(S, 10)),
    ?EXPECT({quic, dgram_state_changed, S, #{dgram_send_enabled := true}}),
    [begin
         ok = macula_relay:rebind(R),
         ok = macula_quic:send(Here, <<N:32>>),
         {ok, <<N:32>>} = macula_quic:recv(There, 4, 10000),
         Address = ?EXPECT({quic, peer_address_changed, S, A}, A),
         ?assertEqual({ok, Address}, macula_quic:peername(S))
     end || N <- lists:seq(1, 3)],
    %% No more when that is not wanted: what would be told comes before the word of a later request.
    ok = macula_quic:tell_changes(S, infinity),
    ok = macula_relay:rebind(R),
    ok = macula_quic:send(Here, <<4:32>>),
    {ok, <<4:32>>} = macula_quic:recv(There, 4, 10000),
    ok = macula_quic:tell_changes(S),
    ?EXPECT({quic, dgram_state_changed, S, _}),
    ?NOTHING({quic, peer_address_changed, S, _}),
    ?NOTHING({quic, _, C, _}),
    [?assertMatch({error, {bad_option, interval, {wanted, interval}}}, macula_quic:tell_changes(S, Wrong))
     || Wrong <- [0, 9, 3600001, often]],
    ?assertEqual({error, badarg}, macula_quic:tell_changes(make_ref())),
    macula_relay:stop(R).

what_datagrams_may_carry_is_told(_Config) ->
    #{client := C, server := S} = Pair = through(#{}, #{maximum_mtu => 1400}),
    ok = macula_quic:tell_changes(C, 10),
    %% At first, and when the path has been found to take more.
    First = ?EXPECT({quic, dgram_state_changed, C, #{dgram_send_enabled := true, dgram_max_len := Max}}, Max),
    {Here, There} = stream(Pair),
    Echo = spawn_link(fun() -> echo(Here, There) end),
    grown(C, First),
    unlink(Echo),
    exit(Echo, kill),
    #{client := Deaf} = pair(#{datagram_receive_enabled => false}, #{}),
    ok = macula_quic:tell_changes(Deaf, 10),
    ?EXPECT({quic, dgram_state_changed, Deaf, #{dgram_send_enabled := false, dgram_max_len := 0}}),
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ?EXPECT({quic, shutdown, S, _}),
    %% Nothing comes behind the last message.
    ok = macula_quic:tell_changes(C, 10),
    ok = macula_quic:tell_changes(Deaf, infinity),
    ok = macula_quic:tell_changes(Deaf, 10),
    ?EXPECT({quic, dgram_state_changed, Deaf, _}),
    ?NOTHING({quic, dgram_state_changed, C, _}).

%% Until a datagram of the whole MTU is allowed for.
grown(C, Before) ->
    case macula_quic:max_datagram_size(C) of
        {ok, Size} when Size > 1340 ->
            ?assertEqual(Size, last_size(C, Before));
        {ok, _} ->
            grown(C, ?EXPECT({quic, dgram_state_changed, C, #{dgram_max_len := Max}} when Max > Before, Max))
    end.

last_size(_C, Size) when Size > 1340 -> Size;
last_size(C, Before) ->
    last_size(C, ?EXPECT({quic, dgram_state_changed, C, #{dgram_max_len := Max}} when Max > Before, Max)).

echo(Here, There) ->
    ok = macula_quic:send(Here, <<"ping">>),
    {ok, <<"ping">>} = macula_quic:recv(There, 4, 10000),
    echo(Here, There).

told_changes_move_with_the_owner(_Config) ->
    #{relay := R, server := S} = Pair = through(#{}, #{}),
    {Here, There} = stream(Pair),
    ok = macula_quic:tell_changes(S, 10),
    ?EXPECT({quic, dgram_state_changed, S, _}),
    Owner = macula_quic_lab:spawn_owner(fun() -> S end),
    ok = macula_quic:controlling_process(S, Owner),
    ok = macula_relay:rebind(R),
    ok = macula_quic:send(Here, <<1:32>>),
    {ok, <<1:32>>} = macula_quic:recv(There, 4, 10000),
    ok = macula_test_nodes:wait_until(fun() ->
        macula_quic_lab:ask(Owner, fun(_) -> lists:keymember(peer_address_changed, 2, macula_quic_lab:mailbox()) end)
    end),
    ?NOTHING({quic, peer_address_changed, S, _}),
    macula_relay:stop(R).

migration_can_be_forbidden(_Config) ->
    #{relay := R, client := C, server := S, listener := _} = Pair = through(
        #{}, #{idle_timeout_ms => 2500}),
    {Here, _} = stream(Pair),
    ok = macula_relay:stop(R),
    {L2, Port2} = macula_quic_lab:listen(#{migration_enabled => false, idle_timeout_ms => 2500}),
    {ok, R2} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port2}}),
    Fixed = macula_quic_lab:pair(L2, macula_relay:port(R2), #{}),
    {FixedHere, _} = stream(Fixed),
    ok = macula_relay:rebind(R2),
    ok = macula_quic:send(FixedHere, <<"from elsewhere">>),
    #{client := FixedClient} = Fixed,
    ?EXPECT({quic, transport_shutdown, FixedClient, timeout}),
    [?EXPECT({quic, transport_shutdown, X, timeout}) || X <- [C, S]],
    ok = macula_quic:close_stream(Here),
    macula_relay:stop(R2).

%%--------------------------------------------------------------------------------------------

the_streams_that_the_peer_allows_are_told(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 5, peer_unidi_stream_count => 2}, #{}),
    ok = macula_quic:tell_changes(C, 10),
    ?assertEqual({5, 2}, available(C)),
    Streams = [begin
        {ok, Stream} = macula_quic:open_stream(C, #{timeout => 5000}),
        ok = macula_quic:send(Stream, <<N>>, #{fin => true}),
        {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
        {Stream, There}
    end || N <- [1, 2, 3]],
    %% Asked again, it tells what is left, whatever was opened ahead.
    ok = macula_quic:tell_changes(C, 10),
    ?assertEqual({2, 2}, available(C)),
    %% The server takes as many anew as are over.
    [begin
        _ = macula_quic_lab:read_to_end(There),
        ok = macula_quic:send(There, <<>>, #{fin => true}),
        _ = macula_quic_lab:read_to_end(Here)
     end || {Here, There} <- Streams],
    all_available(C, {5, 2}),
    %% The number is exact.
    ?assertEqual(lists:duplicate(5, ok) ++ [{error, timeout}], [open_now(C, bidirectional) || _ <- lists:seq(1, 6)]),
    ?assertEqual([ok, ok, {error, timeout}], [open_now(C, unidirectional) || _ <- lists:seq(1, 3)]),
    ok = macula_quic:tell_changes(C, 10),
    ?assertEqual({0, 0}, available(C)),
    %% A server is told, too, and of its own streams.
    ok = macula_quic:tell_changes(S, 10),
    ?assertEqual({100, 100}, available(S)).

streams_that_are_allowed_fast_are_told_together(_Config) ->
    %% A limit below 8 is raised for every stream that is over.
    #{client := C, server := S} = pair(#{peer_unidi_stream_count => 4}, #{}),
    ok = macula_quic:tell_changes(C, 200),
    ?assertEqual({100, 4}, available(C)),
    Begin = erlang:monotonic_time(millisecond),
    [begin
        {ok, Stream} = macula_quic:open_stream(C, #{direction => unidirectional, timeout => 5000}),
        ok = macula_quic:send(Stream, <<"x">>, #{fin => true}),
        {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
        <<"x">> = macula_quic_lab:read_to_end(There)
     end || _ <- lists:seq(1, 1000)],
    %% One each 100 ms at most, and the first.
    Told = all_available(C, {100, 4}),
    ?assertMatch(_ when Told > 0, Told),
    Most = 2 + (erlang:monotonic_time(millisecond) - Begin) div 100,
    ?assertMatch(_ when Told =< Most, Told).

a_peer_that_needs_streams_is_told(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 2, peer_unidi_stream_count => 1}, #{}),
    ok = macula_quic:tell_changes(S, 10),
    ?EXPECT({quic, streams_available, S, _}),
    Use = fun(Direction) ->
        {ok, Stream} = macula_quic:open_stream(C, #{direction => Direction, timeout => 5000}),
        ok = macula_quic:send(Stream, <<"x">>, #{fin => true}),
        {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
        {Stream, There}
    end,
    {_, Uni} = Use(unidirectional),
    ?EXPECT({quic, peer_needs_streams, S, unidi_streams}),
    {Here, First} = Use(bidirectional),
    Second = Use(bidirectional),
    ?EXPECT({quic, peer_needs_streams, S, bidi_streams}),
    ?NOTHING({quic, peer_needs_streams, S, _}),
    %% Once there was room it is told again; what is as it was is not.
    _ = macula_quic_lab:read_to_end(First),
    ok = macula_quic:send(First, <<>>, #{fin => true}),
    _ = macula_quic_lab:read_to_end(Here),
    ok = macula_test_nodes:wait_until(fun() -> stat(S, streams) =:= 2 end),
    %% This looks at once, and sees that there is room.
    ok = macula_quic:tell_changes(S, 10),
    ?EXPECT({quic, peer_needs_streams, S, unidi_streams}),
    ?NOTHING({quic, peer_needs_streams, S, bidi_streams}),
    Third = Use(bidirectional),
    ?EXPECT({quic, peer_needs_streams, S, bidi_streams}),
    %% Until here they are there: a handle that is collected ends its stream.
    [<<"x">> = macula_quic_lab:read_to_end(X) || X <- [Uni | [There || {_, There} <- [Second, Third]]]],
    ?NOTHING({quic, peer_needs_streams, S, _}).

streams_are_told_to_nobody_who_has_not_asked(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 1}, #{}),
    [begin
        {ok, Stream} = macula_quic:open_stream(C, #{timeout => 5000}),
        ok = macula_quic:send(Stream, <<"x">>, #{fin => true}),
        {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
        ok = macula_quic:send(There, <<"x">>, #{fin => true}),
        <<"x">> = macula_quic_lab:read_to_end(Stream),
        <<"x">> = macula_quic_lab:read_to_end(There)
     end || _ <- lists:seq(1, 20)],
    [?NOTHING({quic, What, Conn, _}) || What <- [streams_available, peer_needs_streams], Conn <- [C, S]].

available(Conn) ->
    ?EXPECT({quic, streams_available, Conn, #{bidi_streams := Bidi, unidi_streams := Unidi}}, {Bidi, Unidi}).

%% Waits until so many are told; in how many messages.
all_available(Conn, Wanted) ->
    all_available(Conn, Wanted, 1).

all_available(Conn, Wanted, N) ->
    case available(Conn) of
        Wanted -> N;
        _ -> all_available(Conn, Wanted, N + 1)
    end.

open_now(Conn, Direction) ->
    case macula_quic:open_stream(Conn, #{direction => Direction, timeout => 0}) of
        {ok, _} -> ok;
        Error -> Error
    end.
