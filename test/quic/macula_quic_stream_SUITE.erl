%% Streams: both directions, every way to read them, every way to end them.
-module(macula_quic_stream_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([streams_that_are_reset_leave_nothing/1]).
-export([bidirectional_streams_carry_both_ways/1, unidirectional_streams_carry_one_way/1,
         both_sides_open_streams/1, streams_beyond_the_limit_wait/1,
         no_time_to_wait_is_enough_for_a_stream_that_is_there/1, no_time_to_wait_is_enough_at_any_moment/1,
         no_stream_comes_after_the_close/1, nothing_is_taken_after_the_close/1,
         a_stream_that_nobody_opened_never_shows/1, openers_at_the_limit_all_get_their_turn/1,
         no_time_to_wait_is_enough_for_a_stream_that_came/1,
         no_time_to_wait_is_enough_for_bytes_that_are_there/1,
         an_opened_stream_shows_with_its_first_byte/1, streams_are_told_in_order/1,
         async_accept_stream_goes_on/1, async_accept_stream_is_for_the_owner/1,
         accept_stream_times_out_and_leaves_no_message/1, active_streams_are_announced_first/1]).
-export([recv_gives_exactly_what_is_asked/1, recv_0_gives_what_there_is/1,
         recv_at_the_end_gives_the_tail/1, a_timed_out_recv_keeps_the_data/1,
         concurrent_recvs_are_served_in_turn/1, a_timed_out_recv_lets_the_next_one_through/1,
         a_dead_recv_lets_the_next_one_through/1, recv_while_active_is_einval/1,
         a_large_recv_passes_the_window/1]).
-export([active_true_delivers_all/1, active_once_delivers_one/1, active_n_counts_down/1,
         active_n_adds_up_and_overflows/1, active_n_below_zero_is_passive/1,
         passive_goes_to_the_owner/1, passive_active_passive_loses_nothing/1,
         a_stream_turns_active_thousands_of_times_while_data_flows/1,
         active_false_stops_at_once/1, data_before_active_is_delivered/1,
         the_end_is_told_in_active_mode/1, the_end_is_told_before_the_stream_is_closed/1]).
-export([half_closed_streams_carry_the_other_way/1, reset_codes_are_seen_by_the_peer/1,
         stop_codes_are_seen_by_the_peer/1, a_reset_throws_away_what_was_not_read/1,
         flags_by_number_and_by_name/1, a_reset_gives_up_both_halves/1, a_closed_stream_says_so_once/1,
         sending_after_the_end_is_closed/1, close_stream_delivers_what_was_sent/1,
         priorities_are_served_first/1, delivered_is_told_when_all_has_arrived/1,
         a_close_releases_senders_that_wait/1, a_stream_that_nobody_got_is_reset/1,
         a_killed_opener_takes_no_credit_along/1, streams_are_given_in_order_whoever_waited/1,
         who_waits_for_delivery_holds_nobody_up/1, delivered_is_never_early/1,
         delivered_waits_for_no_other_stream/1, delivered_waits_for_no_credit/1]).
-export([send_waits_for_the_receiver/1, a_timed_out_send_sent_nothing/1,
         many_senders_of_one_stream_try_seldom/1, a_sender_that_does_not_come_holds_up_nobody/1,
         a_stop_releases_senders_that_wait/1, async_send_is_busy_and_then_ready/1,
         async_send_with_fin_ends_the_stream_behind_its_data/1,
         empty_sends_and_an_empty_stream/1, iolists_of_thousands_of_pieces/1,
         concurrent_sends_stay_whole/1, wrong_data_is_refused/1, wrong_options_are_refused/1]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, stream/2, read_to_end/1, collect/2]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%%--------------------------------------------------------------------------------------------

bidirectional_streams_carry_both_ways(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    Data = crypto:strong_rand_bytes(300000),
    ok = macula_quic:send(Here, Data, #{fin => true}),
    ok = macula_quic:send(There, [Data, Data], #{fin => true}),
    ?assertEqual(Data, read_to_end(There)),
    ?assertEqual(<<Data/binary, Data/binary>>, read_to_end(Here)),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

unidirectional_streams_carry_one_way(_Config) ->
    {Here, There} = stream(pair(), #{direction => unidirectional}),
    ok = macula_quic:send(Here, <<"one way">>, #{fin => true}),
    ?assertEqual(<<"one way">>, read_to_end(There)),
    ?assertEqual({error, einval}, macula_quic:recv(Here, 0, 1000)),
    ?assertEqual({error, closed}, macula_quic:send(There, <<"x">>)),
    [?assertMatch({ok, #{direction := unidirectional}}, macula_quic:info(S))
     || S <- [Here, There]],
    %% Both ends of it are over, and say so.
    [?EXPECT({quic, stream_closed, S, #{reason := normal}}) || S <- [Here, There]].

both_sides_open_streams(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    _ = stream(Pair),
    {Here, There} = stream(#{client => S, server => C}),
    ok = macula_quic:send(There, <<"back">>, #{fin => true}),
    ?assertEqual(<<"back">>, read_to_end(Here)),
    ?assertMatch({ok, #{initiator := server, stream_id := 1}}, macula_quic:info(Here)).

streams_beyond_the_limit_wait(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 2}, #{}),
    [One, Two] = [begin {ok, X} = macula_quic:open_stream(C), X end || _ <- [1, 2]],
    ?assertEqual({error, timeout}, macula_quic:open_stream(C, #{timeout => 50})),
    [ok = macula_quic:send(X, <<"x">>, #{fin => true}) || X <- [One, Two]],
    Self = self(),
    Waiting = spawn_link(fun() ->
        Self ! {self(), element(1, macula_quic:open_stream(C, #{timeout => infinity}))}
    end),
    {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
    <<"x">> = read_to_end(There),
    ok = macula_quic:close_stream(There),
    ?EXPECT({Waiting, ok}),
    ?assertEqual([], [M || {R, _} = M <- element(2, process_info(self(), messages)),
                            is_reference(R)]).

%% And a stream that is not given was never opened: the peer sees those that were, and no other.
no_time_to_wait_is_enough_for_a_stream_that_is_there(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 100}, #{}),
    Open = fun() -> macula_quic:open_stream(C, #{timeout => 0}) end,
    Streams = [begin {ok, Stream} = Open(), Stream end || _ <- lists:seq(1, 100)],
    [?assertEqual({error, timeout}, Open()) || _ <- lists:seq(1, 400)],
    [ok = macula_quic:send(Stream, <<N:16>>, #{fin => true})
     || {N, Stream} <- lists:enumerate(Streams)],
    Seen = [begin
                {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
                <<N:16>> = read_to_end(There),
                ok = macula_quic:close_stream(There),
                N
            end || _ <- Streams],
    ?assertEqual(lists:seq(1, 100), lists:sort(Seen)),
    %% Those that ended make room.
    ok = macula_test_nodes:wait_until(fun() -> element(1, Open()) =:= ok end),
    ?assertEqual({error, timeout}, macula_quic:accept_stream(S, #{}, 100)).

%% Also when the native thread has just served the last caller, and looks for those whose time is over.
no_time_to_wait_is_enough_at_any_moment(_Config) ->
    each_connection(1000, fun(_, C, _) ->
        [?assertMatch({ok, _}, macula_quic:open_stream(C, #{timeout => 0})) || _ <- lists:seq(1, 100)]
    end).

%% So many connections one after the other, numbered, whose server allows 100 streams.
each_connection(Count, Fun) ->
    {L, Port} = macula_quic_lab:listen(#{peer_bidi_stream_count => 100}),
    [begin
         {ok, C} = macula_quic:connect("127.0.0.1", Port, macula_quic_lab:client_options(), 30000),
         {ok, S} = macula_quic:accept(L, 30000),
         _ = Fun(N, C, S),
         [ok = macula_quic:close(X) || X <- [C, S]]
     end || N <- lists:seq(1, Count)],
    ok = macula_quic:close(L).

%% QUIC hears of the close a moment later than those that ask.
no_stream_comes_after_the_close(_Config) ->
    each_connection(300, fun(N, C, S) ->
        {ok, Stream} = macula_quic:open_stream(C),
        ok = macula_quic:send(Stream, <<"there">>),
        %% The task that takes streams is at work.
        _ = [macula_quic:accept_stream(S, #{}, 0) || N rem 2 =:= 0],
        ok = macula_quic:close(S),
        ?assertEqual([{error, closed}], lists:usort([macula_quic:accept_stream(S, #{}, 0) || _ <- lists:seq(1, 20)])),
        ?assertEqual({error, closed}, macula_quic:open_stream(S, #{timeout => 0}))
    end).

%% The task of a stream hears of the close a moment later, too.
nothing_is_taken_after_the_close(_Config) ->
    each_connection(300, fun(_, C, _) ->
        {ok, Stream} = macula_quic:open_stream(C),
        ok = macula_quic:send(Stream, <<"there">>),
        ok = macula_quic:close(C),
        ?assertEqual({error, closed}, macula_quic:send(Stream, <<"lost">>)),
        ?assertEqual({error, closed}, macula_quic:async_send(Stream, <<"lost">>)),
        ?assertEqual({error, closed}, macula_quic:send(Stream, <<>>, #{fin => true})),
        ?assertEqual({error, closed}, macula_quic:async_accept_stream(C)),
        ?assertMatch({error, {connection_lost, _}}, macula_quic:recv(Stream, 1, 0))
    end).

%% Streams that are open ahead are no business of the peer's: it sees those that were used, in the order
%% of their numbers, from the first one on.
a_stream_that_nobody_opened_never_shows(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 1000}, #{}),
    Self = self(),
    Openers = [spawn_link(fun() ->
                   [begin
                        {ok, Stream} = macula_quic:open_stream(C),
                        ok = macula_quic:send(Stream, <<Me:8, N:8>>, #{fin => true})
                    end || N <- lists:seq(1, 10)],
                   Self ! {self(), done},
                   receive stop -> ok end
               end) || Me <- lists:seq(1, 16)],
    [?EXPECT({Opener, done}) || Opener <- Openers],
    Seen = [begin
                {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
                {ok, #{stream_id := Id}} = macula_quic:info(There),
                {Id, read_to_end(There)}
            end || _ <- lists:seq(1, 160)],
    ?assertEqual(lists:seq(0, 159 * 4, 4), [Id || {Id, _} <- Seen]),
    ?assertEqual([<<Me, N>> || Me <- lists:seq(1, 16), N <- lists:seq(1, 10)],
                 lists:sort([Data || {_, Data} <- Seen])),
    ?assertEqual({error, timeout}, macula_quic:accept_stream(S, #{}, 100)),
    [Opener ! stop || Opener <- Openers].

openers_at_the_limit_all_get_their_turn(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 3}, #{}),
    Self = self(),
    Answer = fun Answer() ->
        case macula_quic:accept_stream(S, #{}, 10000) of
            {ok, There} ->
                Data = read_to_end(There),
                ok = macula_quic:send(There, Data, #{fin => true}),
                Answer();
            {error, closed} ->
                ok
        end
    end,
    _ = spawn_link(Answer),
    Openers = [spawn_link(fun() ->
                   [begin
                        {ok, Stream} = macula_quic:open_stream(C, #{timeout => 20000}),
                        ok = macula_quic:send(Stream, <<N:32>>, #{fin => true}),
                        <<N:32>> = read_to_end(Stream)
                    end || N <- lists:seq(1, 30)],
                   Self ! {self(), done}
               end) || _ <- lists:seq(1, 20)],
    [?EXPECT({Opener, done}) || Opener <- Openers],
    ok = macula_quic:close_connection(C).

no_time_to_wait_is_enough_for_a_stream_that_came(_Config) ->
    #{client := C, server := S} = pair(),
    Accept = fun() -> macula_quic:accept_stream(S, #{}, 0) end,
    ?assertEqual({error, timeout}, Accept()),
    [begin
         {ok, Here} = macula_quic:open_stream(C, #{direction => Direction}),
         ok = macula_quic:send(Here, <<N:16>>),
         arrived(Here),
         {ok, There} = Accept(),
         ?assertEqual({ok, <<N:16>>}, macula_quic:recv(There, 2, 5000)),
         ?assertEqual({error, timeout}, Accept())
     end || N <- lists:seq(1, 50), Direction <- [bidirectional, unidirectional]].

no_time_to_wait_is_enough_for_bytes_that_are_there(_Config) ->
    {Here, There} = stream(pair()),
    [begin
         ?assertEqual({error, timeout}, macula_quic:recv(There, Len, 0)),
         ok = macula_quic:send(Here, <<N:32>>),
         arrived(Here),
         %% What is too little stays.
         ?assertEqual({error, timeout}, macula_quic:recv(There, 5, 0)),
         ?assertEqual({ok, <<N:32>>}, macula_quic:recv(There, Len, 0))
     end || N <- lists:seq(1, 50), Len <- [0, 4]],
    Large = crypto:strong_rand_bytes(1000000),
    ok = macula_quic:send(Here, Large),
    arrived(Here),
    ?assertEqual({ok, Large}, macula_quic:recv(There, byte_size(Large), 0)),
    ok = macula_quic:send(Here, <<"end">>, #{fin => true}),
    arrived(Here),
    ?assertEqual({ok, <<"end">>}, macula_quic:recv(There, 10, 0)),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 0)).

%% The peer's transport has what was sent.
arrived(Stream) ->
    ok = macula_quic:tell_delivered(Stream),
    ?EXPECT({quic, delivered, Stream, undefined}).

an_opened_stream_shows_with_its_first_byte(_Config) ->
    #{client := C, server := S} = pair(),
    {ok, Here} = macula_quic:open_stream(C),
    ?assertEqual({error, timeout}, macula_quic:accept_stream(S, #{}, 50)),
    ok = macula_quic:send(Here, <<>>, #{fin => true}),
    {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)).

streams_are_told_in_order(_Config) ->
    #{client := C, server := S} = pair(),
    ok = macula_quic:async_accept_stream(S),
    Opened = [begin
                  {ok, X} = macula_quic:open_stream(C),
                  ok = macula_quic:send(X, <<"x">>),
                  {ok, #{stream_id := Id}} = macula_quic:info(X),
                  {X, Id}
              end || _ <- lists:seq(1, 50)],
    Told = [?EXPECT({quic, new_stream, _, #{conn := S, stream_id := Id,
                                            direction := bidirectional}}, Id) || _ <- Opened],
    ?assertEqual([Id || {_, Id} <- Opened], Told).

async_accept_stream_goes_on(_Config) ->
    #{client := C, server := S} = pair(),
    [ok = macula_quic:async_accept_stream(S) || _ <- lists:seq(1, 50)],
    [begin
         {ok, X} = macula_quic:open_stream(C, #{direction => Direction}),
         ok = macula_quic:send(X, <<"x">>, #{fin => true}),
         ?EXPECT({quic, new_stream, There, #{direction := Direction}},
                 ?assertEqual(<<"x">>, read_to_end(There)))
     end || _ <- lists:seq(1, 10), Direction <- [bidirectional, unidirectional]],
    ?NOTHING({quic, new_stream, _, _}).

async_accept_stream_is_for_the_owner(_Config) ->
    #{server := S} = pair(),
    Result = macula_quic_lab:in_process(fun() -> macula_quic:async_accept_stream(S) end),
    ?assertEqual({error, not_owner}, Result).

accept_stream_times_out_and_leaves_no_message(_Config) ->
    #{server := S} = Pair = pair(),
    _ = [?assertEqual({error, timeout}, macula_quic:accept_stream(S, #{}, T))
         || T <- [0, 1, 20, 0, 5]],
    {_, _} = stream(Pair),
    ?assertEqual({messages, []}, process_info(self(), messages)).

%% Whatever the threads do meanwhile, a stream is announced before its data.
active_streams_are_announced_first(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 10000}, #{}),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    Times = macula_quic_lab:times(300),
    Streams = [begin
                   {ok, X} = macula_quic:open_stream(C),
                   ok = macula_quic:async_send(X, <<"data">>),
                   X
               end || _ <- lists:seq(1, Times)],
    announced(Times, #{}),
    ?assertEqual(Times, length(Streams)).

announced(0, Left) when map_size(Left) =:= 0 ->
    ok;
announced(N, Left) ->
    ?EXPECT({quic, What, Stream, _},
            case What of
                new_stream -> announced(N - 1, Left#{Stream => true});
                <<"data">> -> announced(N, maps:remove(Stream, maps:update(Stream, seen, Left)))
            end).

%%--------------------------------------------------------------------------------------------

recv_gives_exactly_what_is_asked(_Config) ->
    {Here, There} = stream(pair()),
    Data = crypto:strong_rand_bytes(100000),
    [ok = macula_quic:send(Here, Part) || <<Part:1000/binary>> <= Data],
    Sizes = [1, 2, 3, 999, 1000, 1001, 65536, 1],
    Read = [begin
                {ok, Part} = macula_quic:recv(There, Size, 5000),
                ?assertEqual(Size, byte_size(Part)),
                Part
            end || Size <- Sizes],
    Sum = lists:sum(Sizes),
    ?assertEqual(binary:part(Data, 0, Sum), iolist_to_binary(Read)).

recv_0_gives_what_there_is(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"abc">>),
    ?assertEqual({ok, <<"abc">>}, macula_quic:recv(There, 0, 5000)),
    ?assertEqual({error, timeout}, macula_quic:recv(There, 0, 0)).

recv_at_the_end_gives_the_tail(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"the tail">>, #{fin => true}),
    ?assertEqual({ok, <<"the">>}, macula_quic:recv(There, 3, 5000)),
    ?assertEqual({ok, <<" tail">>}, macula_quic:recv(There, 1000, 5000)),
    ?assertEqual({error, closed}, macula_quic:recv(There, 1000, 5000)),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)).

a_timed_out_recv_keeps_the_data(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"half">>),
    ?assertEqual({error, timeout}, macula_quic:recv(There, 8, 50)),
    _ = [?assertEqual({error, timeout}, macula_quic:recv(There, 8, 0)) || _ <- lists:seq(1, 100)],
    ok = macula_quic:send(Here, <<"half">>),
    ?assertEqual({ok, <<"halfhalf">>}, macula_quic:recv(There, 8, 5000)),
    ?assertEqual({messages, []}, process_info(self(), messages)).

%% The bytes go to the callers in the order in which they asked.
concurrent_recvs_are_served_in_turn(_Config) ->
    {Here, There} = stream(pair()),
    Self = self(),
    Readers = [begin
                   Pid = spawn_link(fun() -> Self ! {self(), macula_quic:recv(There, 4, 10000)} end),
                   waits(Pid),
                   Pid
               end || _ <- lists:seq(1, 10)],
    [ok = macula_quic:send(Here, <<N:32>>) || N <- lists:seq(1, 10)],
    [?EXPECT({Pid, {ok, <<N:32>>}}) || {Pid, N} <- lists:zip(Readers, lists:seq(1, 10))].

waits(Pid) ->
    macula_test_nodes:wait_until(fun() -> is_waiting(Pid) end).

is_waiting(Pid) ->
    process_info(Pid, [status, current_function]) =:=
        [{status, waiting}, {current_function, {macula_quic_call, await, 3}}].

a_timed_out_recv_lets_the_next_one_through(_Config) ->
    {Here, There} = stream(pair()),
    Self = self(),
    %% Long enough for both to be seen waiting.
    Greedy = spawn_link(fun() -> Self ! {self(), macula_quic:recv(There, 1000, 2000)} end),
    waits(Greedy),
    Modest = spawn_link(fun() -> Self ! {self(), macula_quic:recv(There, 4, 20000)} end),
    waits(Modest),
    ok = macula_quic:send(Here, <<"data">>),
    ?EXPECT({Greedy, {error, timeout}}),
    ?EXPECT({Modest, {ok, <<"data">>}}).

a_dead_recv_lets_the_next_one_through(_Config) ->
    {Here, There} = stream(pair()),
    Self = self(),
    Greedy = spawn(fun() -> macula_quic:recv(There, 1000) end),
    waits(Greedy),
    Modest = spawn_link(fun() -> Self ! {self(), macula_quic:recv(There, 4, 20000)} end),
    waits(Modest),
    ok = macula_quic:send(Here, <<"data">>),
    exit(Greedy, kill),
    ?EXPECT({Modest, {ok, <<"data">>}}).

recv_while_active_is_einval(_Config) ->
    {Here, There} = stream(pair()),
    [begin
         ok = macula_quic:setopt(There, active, Mode),
         ?assertEqual({error, einval}, macula_quic:recv(There, 1, 100))
     end || Mode <- [true, once, 5]],
    ok = macula_quic:setopt(There, active, false),
    ok = macula_quic:send(Here, <<"x">>),
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 1, 5000)).

a_large_recv_passes_the_window(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 65536}, #{})),
    Data = crypto:strong_rand_bytes(3000000),
    ok = macula_quic:send(Here, Data),
    ?assertEqual({ok, Data}, macula_quic:recv(There, 3000000, 20000)).

%%--------------------------------------------------------------------------------------------

active_true_delivers_all(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, true),
    Data = crypto:strong_rand_bytes(2000000),
    ok = macula_quic:send(Here, Data),
    ?assertEqual(Data, collect(There, 2000000)).

active_once_delivers_one(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, once),
    ok = macula_quic:send(Here, <<"one">>),
    ?EXPECT({quic, <<"one">>, There, #{absolute_offset := 1, len := 3}}),
    {ok, #{active := false}} = macula_quic:info(There),
    ok = macula_quic:send(Here, <<"two">>),
    ?assertEqual({ok, <<"two">>}, macula_quic:recv(There, 3, 5000)),
    ?NOTHING({quic, _, There, _}).

active_n_counts_down(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, 3),
    [begin
         ok = macula_quic:send(Here, <<N>>),
         ?EXPECT({quic, <<N>>, There, #{absolute_offset := N}})
     end || N <- [1, 2, 3]],
    ?EXPECT({quic, passive, There, undefined}),
    ok = macula_quic:send(Here, <<4>>),
    ?assertEqual({ok, <<4>>}, macula_quic:recv(There, 1, 5000)),
    ?NOTHING({quic, _, There, _}),
    %% And again: a stream that was passive once must not stay silent.
    ok = macula_quic:setopt(There, active, 1),
    ok = macula_quic:send(Here, <<5>>),
    ?EXPECT({quic, <<5>>, There, _}),
    ?EXPECT({quic, passive, There, undefined}).

active_n_adds_up_and_overflows(_Config) ->
    {_Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, 10),
    ok = macula_quic:setopt(There, active, 20),
    ?assertMatch({ok, #{active := 30}}, macula_quic:info(There)),
    ok = macula_quic:setopt(There, active, -5),
    ?assertMatch({ok, #{active := 25}}, macula_quic:info(There)),
    [?assertMatch({error, {bad_option, active, _}}, macula_quic:setopt(There, active, Value))
     || Value <- [32767, 32743, 32768, -32769, 1 bsl 31, 1 bsl 32, 1 bsl 63, 1 bsl 64, -(1 bsl 64),
                  2.0, "1", sometimes, <<1>>]],
    ?assertMatch({ok, #{active := 25}}, macula_quic:info(There)),
    ok = macula_quic:setopt(There, active, 32742),
    ?assertMatch({ok, #{active := 32767}}, macula_quic:info(There)).

active_n_below_zero_is_passive(_Config) ->
    {_Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, 10),
    ok = macula_quic:setopt(There, active, -10),
    ?EXPECT({quic, passive, There, undefined}),
    ?assertMatch({ok, #{active := false}}, macula_quic:info(There)),
    ok = macula_quic:setopt(There, active, -32768),
    ?EXPECT({quic, passive, There, undefined}).

passive_goes_to_the_owner(_Config) ->
    {_Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, 10),
    {ok, []} = macula_quic_lab:in_process(fun() ->
        {macula_quic:setopt(There, active, -10), macula_quic_lab:mailbox()}
    end),
    ?EXPECT({quic, passive, There, undefined}).

%% Every mode after every other, while data comes: what is missing or out of order shows.
passive_active_passive_loses_nothing(_Config) ->
    {Here, There} = stream(pair()),
    Size = 4000000,
    Data = crypto:strong_rand_bytes(Size),
    _ = spawn_link(fun() ->
        [ok = macula_quic:send(Here, Part) || <<Part:4000/binary>> <= Data]
    end),
    Read = mixed(There, Size, [once, 2, recv, true, recv, 7, once, false], []),
    ?assert(Data =:= iolist_to_binary(Read)),
    ok = macula_quic:close_stream(Here).

mixed(_Stream, 0, _Modes, Read) ->
    lists:reverse(Read);
mixed(Stream, Left, [recv | Modes], Read) ->
    Len = min(Left, 5000),
    {ok, Data} = macula_quic:recv(Stream, Len, 20000),
    mixed(Stream, Left - Len, Modes ++ [recv], [Data | Read]);
mixed(Stream, Left, [Mode | Modes], Read) ->
    ok = macula_quic:setopt(Stream, active, Mode),
    Some = case Mode of
        false -> [];
        _ -> [?EXPECT({quic, Data, Stream, #{}} when is_binary(Data), Data, 20000)]
    end,
    ok = macula_quic:setopt(Stream, active, false),
    %% From here on no message comes.
    All = waiting(Stream, Some),
    mixed(Stream, Left - iolist_size(All), Modes ++ [Mode], lists:reverse(All) ++ Read).

waiting(Stream, Got) ->
    receive
        {quic, passive, Stream, undefined} -> waiting(Stream, Got);
        {quic, Data, Stream, _} -> waiting(Stream, Got ++ [Data])
    after 0 ->
        Got
    end.

%% And back each time, to read on without messages. The sender never rests, and the bytes are compared by their hash.
a_stream_turns_active_thousands_of_times_while_data_flows(_Config) ->
    {Here, There} = stream(pair()),
    Sender = macula_quic_flow:start(Here),
    Times = macula_quic_lab:soak(5000, 100000),
    Read = lists:foldl(fun(N, Before) ->
        ok = macula_quic:setopt(There, active, element(1 + N rem 3, {once, 1, true})),
        First = ?EXPECT({quic, Data, There, #{}} when is_binary(Data), Data, 20000),
        ok = macula_quic:setopt(There, active, false),
        ByMessages = macula_quic_flow:taken(Sender, iolist_to_binary(waiting(There, [First])), Before),
        {ok, More} = macula_quic:recv(There, 0, 20000),
        ?NOTHING({quic, _, There, _}),
        macula_quic_flow:taken(Sender, More, ByMessages)
    end, macula_quic_flow:none(), lists:seq(1, Times)),
    macula_quic_flow:stop(Sender),
    Rest = macula_quic_flow:taken(Sender, read_to_end(There), Read),
    ?assert(macula_quic_flow:is_whole(Sender, Rest)).

active_false_stops_at_once(_Config) ->
    {Here, There} = stream(pair()),
    [begin
         ok = macula_quic:setopt(There, active, true),
         ok = macula_quic:send(Here, <<"x">>),
         ok = macula_quic:setopt(There, active, false),
         %% Either it came before, or it waits for recv.
         case macula_quic_lab:mailbox() of
             [] -> {ok, <<"x">>} = macula_quic:recv(There, 1, 5000);
             [{quic, <<"x">>, There, _}] -> ok
         end
     end || _ <- lists:seq(1, macula_quic_lab:times(100))],
    ?NOTHING({quic, _, _, _}).

data_before_active_is_delivered(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"early">>),
    ?assertEqual({error, timeout}, macula_quic:recv(There, 6, 50)),
    ok = macula_quic:send(Here, <<"end">>, #{fin => true}),
    ok = macula_quic:setopt(There, active, true),
    ?assertEqual(<<"earlyend">>, collect(There, 8)),
    ?EXPECT({quic, peer_send_shutdown, There, undefined}).

the_end_is_told_in_active_mode(_Config) ->
    [begin
         {Here, There} = stream(pair()),
         ok = macula_quic:setopt(There, active, Mode),
         ok = macula_quic:send(Here, <<"last">>, #{fin => true}),
         ?EXPECT({quic, <<"last">>, There, _}),
         %% A mode that was spent by the data tells when it is set again.
         ok = macula_quic:setopt(There, active, Mode),
         ?EXPECT({quic, peer_send_shutdown, There, undefined}),
         ok = macula_quic:async_shutdown_stream(There, graceful, 0),
         ?EXPECT({quic, stream_closed, There, #{reason := normal, is_conn_shutdown := false}}),
         ok = macula_quic:close_stream(Here)
     end || Mode <- [true, once, 100, 1]].

%% Also if it was not asked for further messages, or asked too late.
the_end_is_told_before_the_stream_is_closed(_Config) ->
    Pair = pair(),
    [begin
         {Here, There} = stream(Pair),
         ok = macula_quic:setopt(There, active, Mode),
         ok = macula_quic:async_shutdown_stream(There, graceful, 0),
         ok = macula_quic:send(Here, <<"all">>, #{fin => true}),
         ?EXPECT({quic, <<"all">>, There, _}),
         [ok = macula_quic:setopt(There, active, Mode) || Again],
         %% The first of the two that comes.
         ?EXPECT({quic, What, There, _} when What =:= stream_closed; What =:= peer_send_shutdown,
                 ?assertEqual(peer_send_shutdown, What)),
         ?EXPECT({quic, stream_closed, There, #{reason := normal}}),
         ?NOTHING({quic, peer_send_shutdown, There, _})
     end || Mode <- [once, 1, 2, true], Again <- [false, true],
            _ <- lists:seq(1, macula_quic_lab:times(10))],
    %% Who reads by recv has been told by it.
    {Here, There} = stream(Pair),
    ok = macula_quic:async_shutdown_stream(There, graceful, 0),
    ok = macula_quic:send(Here, <<"all">>, #{fin => true}),
    <<"all">> = read_to_end(There),
    ?EXPECT({quic, stream_closed, There, #{reason := normal}}),
    ?NOTHING({quic, peer_send_shutdown, There, _}).

%%--------------------------------------------------------------------------------------------

half_closed_streams_carry_the_other_way(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    ok = macula_quic:async_shutdown_stream(Here, graceful, 0),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)),
    ?assertEqual({error, closed}, macula_quic:send(Here, <<"x">>)),
    Data = crypto:strong_rand_bytes(500000),
    ok = macula_quic:send(There, Data, #{fin => true}),
    ?assertEqual(Data, read_to_end(Here)),
    [?EXPECT({quic, stream_closed, X, #{reason := normal}}) || X <- [Here, There]],
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).

reset_codes_are_seen_by_the_peer(_Config) ->
    [begin
         {Here, There} = stream(pair()),
         ok = macula_quic:async_shutdown_stream(Here, abort_send, Code),
         ?EXPECT({quic, peer_send_aborted, There, Code}),
         ?assertEqual({error, {reset, Code}}, macula_quic:recv(There, 0, 5000)),
         %% The other half lives.
         ok = macula_quic:send(There, <<"alive">>),
         ?assertEqual({ok, <<"alive">>}, macula_quic:recv(Here, 5, 5000))
     end || Code <- [0, 1, 255, 1 bsl 32, (1 bsl 62) - 1]].

stop_codes_are_seen_by_the_peer(_Config) ->
    [begin
         {Here, There} = stream(pair()),
         ok = macula_quic:async_shutdown_stream(Here, abort_receive, Code),
         ?EXPECT({quic, peer_receive_aborted, There, Code}),
         ?assertEqual({error, {stopped, Code}}, macula_quic:send(There, <<"x">>)),
         ?assertEqual({error, {stopped, Code}}, macula_quic:async_send(There, <<"x">>)),
         ok = macula_quic:send(Here, <<"alive">>),
         ?assertEqual({ok, <<"alive">>}, macula_quic:recv(There, 5, 5000))
     end || Code <- [0, 7, (1 bsl 62) - 1]].

a_reset_throws_away_what_was_not_read(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"abc">>),
    ?assertEqual({error, timeout}, macula_quic:recv(There, 5, 100)),
    ok = macula_quic:async_shutdown_stream(Here, abort_send, 9),
    ?EXPECT({quic, peer_send_aborted, There, 9}),
    ?assertEqual({error, {reset, 9}}, macula_quic:recv(There, 0, 1000)).

flags_by_number_and_by_name(_Config) ->
    [begin
         {Here, There} = stream(pair()),
         ok = macula_quic:async_shutdown_stream(Here, Flag, 3),
         [?EXPECT({quic, What, There, 3}) || What <- Expected],
         ?NOTHING({quic, peer_send_aborted, _, _}),
         ?NOTHING({quic, peer_receive_aborted, _, _})
     end || {Flag, Expected} <- [{2, [peer_send_aborted]}, {4, [peer_receive_aborted]},
                                 {6, [peer_send_aborted, peer_receive_aborted]},
                                 {abort, [peer_send_aborted, peer_receive_aborted]},
                                 {[abort_send, immediate], [peer_send_aborted]},
                                 {14, [peer_send_aborted, peer_receive_aborted]},
                                 {8, [peer_send_aborted, peer_receive_aborted]},
                                 {immediate, [peer_send_aborted, peer_receive_aborted]},
                                 {18, [peer_send_aborted]}, {[abort_send, inline], [peer_send_aborted]}]],
    %% What aborts nothing finishes sending.
    [begin
         {Here, There} = stream(pair()),
         ok = macula_quic:send(Here, <<"all">>),
         ok = macula_quic:async_shutdown_stream(Here, Flag, 3),
         ?assertEqual(<<"all">>, macula_quic_lab:read_to_end(There))
     end || Flag <- [0, 1, 9, 16, none, graceful, [], [graceful, immediate], inline]],
    {Here, _} = stream(pair()),
    [?assertMatch({error, {bad_option, flag, _}}, macula_quic:async_shutdown_stream(Here, Flag, 0))
     || Flag <- [32, -1, softly, [graceful | abort], [abort, softly], "1", {}]],
    [?assertMatch({error, {bad_option, code, _}}, macula_quic:async_shutdown_stream(Here, 1, Code))
     || Code <- [-1, 1 bsl 62, 1.0, zero]].

a_reset_gives_up_both_halves(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"abc">>),
    ok = macula_quic:reset_stream(Here, 41),
    [?EXPECT({quic, What, There, 41}) || What <- [peer_send_aborted, peer_receive_aborted]],
    ?assertMatch({error, _}, macula_quic:send(Here, <<"def">>)),
    ?assertEqual({error, stopped}, macula_quic:recv(Here, 0, 1000)),
    ?assertEqual({error, {reset, 41}}, macula_quic:recv(There, 0, 1000)),
    [?EXPECT({quic, stream_closed, X, #{reason := normal}}) || X <- [Here, There]],
    %% Again, and one that is over.
    ?assertEqual(ok, macula_quic:reset_stream(Here, 42)),
    [?assertMatch({error, {bad_option, code, _}}, macula_quic:reset_stream(There, Code))
     || Code <- [-1, 1 bsl 62, reset]],
    ?assertEqual({error, badarg}, macula_quic:reset_stream(make_ref(), 1)).

a_closed_stream_says_so_once(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    [ok = macula_quic:close_stream(X) || X <- [Here, There, Here, There]],
    [?EXPECT({quic, stream_closed, X, #{reason := normal, is_conn_shutdown := false}})
     || X <- [Here, There]],
    [ok = macula_quic:close_connection(X) || X <- [C, S]],
    [?EXPECT({quic, What, X, _} when What =/= stream_closed) || X <- [C, S]],
    ?assertEqual([], [M || {quic, stream_closed, _, _} = M <- macula_quic_lab:mailbox()]),
    ?assertMatch({ok, #{state := closed}}, macula_quic:info(Here)).

sending_after_the_end_is_closed(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"end">>, #{fin => true}),
    ?assertEqual({error, closed}, macula_quic:send(Here, <<"more">>)),
    ?assertEqual({error, closed}, macula_quic:async_send(Here, <<"more">>)),
    ?assertEqual({error, closed}, macula_quic:send(Here, <<>>)),
    ?assertEqual(<<"end">>, read_to_end(There)).

close_stream_delivers_what_was_sent(_Config) ->
    #{client := C} = Pair = pair(),
    [begin
         {Here, There} = stream(Pair),
         Data = crypto:strong_rand_bytes(200000),
         ok = macula_quic:send(Here, Data),
         ok = macula_quic:close_stream(Here),
         ?assertEqual(Data, read_to_end(There)),
         ok = macula_quic:close_stream(There)
     end || _ <- lists:seq(1, 20)],
    {ok, C} = macula_quic:handshake(C).

%% Two streams wait for the peer, and then for a slow line; the one of the higher priority, though
%% it came second, is served before most of the other.
priorities_are_served_first(_Config) ->
    #{client := C, server := S} = macula_quic_lab:through(
        #{rate => 2000000, queue => 100000}, #{conn_flow_control_window => 20000}),
    {ok, Low} = macula_quic:open_stream(C, #{priority => -1}),
    ok = macula_quic:send(Low, binary:copy(<<0>>, 600000), #{fin => true}),
    {ok, High} = macula_quic:open_stream(C, #{priority => 10}),
    ok = macula_quic:send(High, binary:copy(<<1>>, 100000), #{fin => true}),
    ok = macula_quic:setopt(S, conn_flow_control_window, 1 bsl 26),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    ?assert(arrived_before_the_end(High, #{}) < 300000),
    [?assertMatch({error, {bad_option, priority, _}}, macula_quic:setopt(Low, priority, Wrong))
     || Wrong <- [1 bsl 31, -(1 bsl 31) - 1, 1.0]],
    [?assertMatch(X when X =:= ok; X =:= {error, closed}, macula_quic:setopt(Low, priority, Right))
     || Right <- [5, -(1 bsl 31), 1 bsl 31 - 1]].

%% How much of the first stream has come when the second one is complete.
arrived_before_the_end(High, Sizes) ->
    ?EXPECT({quic, What, Stream, _},
            case What of
                _ when is_binary(What) ->
                    Byte = binary:first(What),
                    arrived_before_the_end(
                        High, maps:update_with(Byte, fun(N) -> N + byte_size(What) end,
                                               byte_size(What), Sizes#{Stream => Byte}));
                peer_send_shutdown when map_get(Stream, Sizes) =:= 1 ->
                    maps:get(0, Sizes, 0);
                _ ->
                    arrived_before_the_end(High, Sizes)
            end, 20000).

%%--------------------------------------------------------------------------------------------

send_waits_for_the_receiver(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 100000},
                                #{high_watermark => 100000, send_window => 100000})),
    Self = self(),
    Size = 5000000,
    Sender = spawn_link(fun() ->
        [ok = macula_quic:send(Here, binary:copy(<<1>>, 10000)) || _ <- lists:seq(1, Size div 10000)],
        Self ! {self(), done}
    end),
    %% QUIC may have taken some since it began to wait: it waits on above the low-water mark.
    macula_test_nodes:wait_until(fun() ->
        {ok, #{send_pend := N}} = macula_quic:info(Here),
        N > 50000 andalso process_info(Sender, status) =:= {status, waiting}
    end),
    %% It waits, and what waits natively is bounded.
    {ok, #{send_pend := Pending}} = macula_quic:info(Here),
    ?assert(Pending =< 110000),
    ?NOTHING({Sender, done}),
    ok = macula_quic_lab:read(There, Size),
    ?EXPECT({Sender, done}),
    ok = macula_quic:close_stream(Here).

a_timed_out_send_sent_nothing(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 10000},
                                #{high_watermark => 10000})),
    Sent = fill_up(Here, 0),
    _ = [?assertEqual({error, timeout}, macula_quic:send(Here, <<"lost">>, #{timeout => T}))
         || T <- [0, 1, 10 | lists:duplicate(200, 0)]],
    _ = spawn_link(fun() -> ok = macula_quic:send(Here, <<"end">>, #{fin => true}) end),
    Read = read_to_end(There),
    ?assertEqual(Sent + 3, byte_size(Read)),
    ?assertEqual(nomatch, binary:match(Read, <<"lost">>)),
    ?assertEqual({messages, []}, process_info(self(), messages)).

%% Until nothing more leaves: the window of the stream has.
fill_up(Stream, Before) ->
    Sent = fill(Stream, Before),
    case macula_quic:info(Stream) of
        {ok, #{send_pend := N}} when N =< Sent - 9999, N >= 10000 -> Sent;
        {ok, _} -> fill_up(Stream, Sent)
    end.

fill(Stream, Sent) ->
    case macula_quic:send(Stream, <<0:80000>>, #{timeout => 300}) of
        ok -> fill(Stream, Sent + 10000);
        {error, timeout} -> Sent
    end.

a_stop_releases_senders_that_wait(_Config) ->
    [begin
         {Here, There, Senders} = with_senders_that_wait(),
         ok = End(There),
         [?EXPECT({Pid, {error, {stopped, Code}}}) || Pid <- Senders],
         ok = macula_quic:close_stream(Here)
     end || {Code, End} <- [{4, fun(S) -> macula_quic:async_shutdown_stream(S, abort, 4) end},
                            {0, fun macula_quic:close_stream/1}],
            _ <- lists:seq(1, macula_quic_lab:times(5))].

%% One's own: what they have to send can't be sent any more.
a_close_releases_senders_that_wait(_Config) ->
    [begin
         {Here, There, Senders} = with_senders_that_wait(),
         ok = End(Here),
         [?EXPECT({Pid, {error, closed}}) || Pid <- Senders],
         ok = macula_quic:close_stream(There)
     end || End <- [fun macula_quic:close_stream/1,
                    fun(S) -> macula_quic:async_shutdown_stream(S, graceful, 0) end,
                    fun(S) -> macula_quic:async_shutdown_stream(S, abort, 1) end],
            _ <- lists:seq(1, macula_quic_lab:times(5))].

%% The peer allows one more: the next caller gets it, although a process that is dead was before.
a_killed_opener_takes_no_credit_along(_Config) ->
    #{client := C, server := S} = Pair = pair(#{peer_bidi_stream_count => 1}, #{}),
    [begin
         {Here, There} = stream(Pair),
         {Opener, Monitor} = spawn_monitor(fun() ->
             macula_quic:open_stream(C, #{timeout => infinity})
         end),
         waits(Opener),
         exit(Opener, kill),
         receive {'DOWN', Monitor, process, Opener, killed} -> ok end,
         [ok = macula_quic:close_stream(X) || X <- [Here, There]],
         {ok, Next} = macula_quic:open_stream(C, #{timeout => 5000}),
         ok = macula_quic:send(Next, <<"next">>, #{fin => true}),
         {ok, Peer} = macula_quic:accept_stream(S, #{}, 5000),
         ?assertEqual({ok, <<"next">>}, macula_quic:recv(Peer, 4, 5000)),
         [ok = macula_quic:close_stream(X) || X <- [Next, Peer]]
     end || _ <- lists:seq(1, macula_quic_lab:times(20))],
    macula_quic_lab:close(Pair).

%% Some come without waiting, some after it: none is lost, none comes twice, and numbers only grow.
streams_are_given_in_order_whoever_waited(_Config) ->
    #{client := C, server := S} = Pair = pair(#{peer_bidi_stream_count => 10}, #{}),
    Count = macula_quic_lab:times(300),
    Self = self(),
    _ = spawn_link(fun() ->
        [begin
             {ok, X} = macula_quic:open_stream(C, #{timeout => 10000}),
             {ok, #{stream_id := Id}} = macula_quic:info(X),
             ok = macula_quic:send(X, <<Id:64>>, #{fin => true}),
             Self ! {opened, Id}
         end || _ <- lists:seq(1, Count)],
        receive stop -> ok end
    end),
    Accepted = [begin
        {ok, X} = macula_quic:accept_stream(S, #{}, 10000),
        {ok, <<Id:64>>} = macula_quic:recv(X, 8, 10000),
        ok = macula_quic:close_stream(X),
        Id
    end || _ <- lists:seq(1, Count)],
    Opened = [receive {opened, Id} -> Id after 10000 -> error(not_opened) end
              || _ <- lists:seq(1, Count)],
    ?assertEqual([4 * N || N <- lists:seq(0, Count - 1)], Opened),
    ?assertEqual(Opened, Accepted),
    macula_quic_lab:close(Pair).

%% Its end must not look like that of a stream that was finished.
a_stream_that_nobody_got_is_reset(_Config) ->
    #{client := C, server := S} = Pair = pair(#{peer_bidi_stream_count => 1}, #{}),
    [begin
         {Here, There} = stream(Pair),
         Opener = spawn(fun() -> macula_quic:open_stream(C, #{timeout => infinity}) end),
         waits(Opener),
         exit(Opener, kill),
         [ok = macula_quic:close_stream(X) || X <- [Here, There]],
         %% Perhaps it never came so far as to be opened.
         case macula_quic:accept_stream(S, #{}, 1000) of
             {ok, Phantom} -> ?assertMatch({error, {reset, _}}, macula_quic:recv(Phantom, 0, 5000));
             {error, timeout} -> ok
         end
     end || _ <- lists:seq(1, macula_quic_lab:times(10))],
    macula_quic_lab:close(Pair).

with_senders_that_wait() ->
    {Here, There} = stream(pair(#{stream_recv_window => 10000}, #{high_watermark => 10000})),
    Self = self(),
    Senders = [spawn_link(fun() -> Self ! {self(), send_until_refused(Here)} end)
               || _ <- lists:seq(1, 5)],
    [waits(Pid) || Pid <- Senders],
    {Here, There, Senders}.

send_until_refused(Stream) ->
    case macula_quic:send(Stream, <<0:80000>>) of
        ok -> send_until_refused(Stream);
        Error -> Error
    end.

%% Were all of them told of each bit of room, each would try some hundred times.
many_senders_of_one_stream_try_seldom(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 100000}, #{high_watermark => 100000})),
    ok = macula_quic:send(Here, <<"x">>),
    {ok, <<"x">>} = macula_quic:recv(There, 1, 5000),
    Senders = [spawn_monitor(fun() -> exit(macula_quic:send(Here, <<N:80000>>)) end) || N <- lists:seq(1, 1000)],
    %% Whoever came first has sent; all others wait.
    macula_test_nodes:wait_until(fun() ->
        lists:all(fun({Pid, _}) -> not is_process_alive(Pid) orelse is_waiting(Pid) end, Senders)
    end),
    Trial = {macula_quic, send_when_drained, 4},
    1 = erlang:trace_pattern(Trial, true, [local, call_count]),
    {ok, Bytes} = macula_quic:recv(There, 1000 * 10000, 60000),
    {call_count, Trials} = erlang:trace_info(Trial, call_count),
    1 = erlang:trace_pattern(Trial, false, [local, call_count]),
    [receive {'DOWN', Ref, process, Pid, Why} -> ?assertEqual(ok, Why) end || {Pid, Ref} <- Senders],
    ?assertEqual(lists:seq(1, 1000), lists:sort([N || <<N:80000>> <= Bytes])),
    ?assert(Trials < 5000, Trials).

a_sender_that_does_not_come_holds_up_nobody(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 10000}, #{high_watermark => 10000})),
    Sender = fun(Size) ->
        {Pid, Ref} = spawn_monitor(fun() -> exit(macula_quic:send(Here, <<0:Size/unit:8>>)) end),
        {Pid, Ref}
    end,
    {Full, FullRef} = Sender(100000),
    receive {'DOWN', FullRef, process, Full, ok} -> ok end,
    %% It would take all the room there is.
    {First, FirstRef} = Sender(100000),
    waits(First),
    true = erlang:suspend_process(First),
    {Second, SecondRef} = Sender(1),
    waits(Second),
    {ok, _} = macula_quic:recv(There, 100001, 5000),
    receive {'DOWN', SecondRef, process, Second, ok} -> ok after 5000 -> ct:fail(held_up) end,
    true = erlang:resume_process(First),
    receive {'DOWN', FirstRef, process, First, ok} -> ok after 5000 -> ct:fail(forgotten) end,
    {ok, _} = macula_quic:recv(There, 100000, 5000).

async_send_is_busy_and_then_ready(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 10000},
                                #{high_watermark => 20000, low_watermark => 5000})),
    Some = fill_async(Here, 0),
    stays_busy(Here, Some),
    Sent = fill_async(Here, Some),
    %% Busy for each, ready once.
    ?assertEqual({error, busy}, macula_quic:async_send(Here, <<"x">>)),
    ?NOTHING({quic, send_ready, _, _}),
    ok = macula_quic_lab:read(There, Sent),
    ?EXPECT({quic, send_ready, Here, undefined}),
    ok = macula_quic:async_send(Here, <<"y">>),
    ?assertEqual({ok, <<"y">>}, macula_quic:recv(There, 1, 5000)),
    ?NOTHING({quic, send_ready, _, _}),
    %% It comes to whoever was told busy, the owner or not.
    Self = self(),
    Stranger = spawn_link(fun() ->
        N = fill_async(Here, 0),
        Self ! {filled, N},
        ?EXPECT({quic, send_ready, Here, undefined}),
        Self ! {self(), ready}
    end),
    N = ?EXPECT({filled, X}, X),
    ok = macula_quic_lab:read(There, N),
    ?EXPECT({Stranger, ready}).

async_send_with_fin_ends_the_stream_behind_its_data(_Config) ->
    {Here, There} = stream(pair(#{stream_recv_window => 10000},
                                #{high_watermark => 20000, low_watermark => 5000})),
    Wrong = macula_quic:async_send(Here, <<"x">>, #{fin => 1}),
    ?assertMatch({error, {bad_option, fin, _}}, Wrong),
    ?assertEqual({error, {bad_option, timeout, unknown}},
                 macula_quic:async_send(Here, <<"x">>, #{timeout => 0})),
    %% Nothing of a call that is told busy is taken, its end neither.
    Some = fill_async(Here, 0),
    stays_busy(Here, Some),
    Sent = fill_async(Here, Some),
    ?assertEqual({error, busy}, macula_quic:async_send(Here, <<"last">>, #{fin => true})),
    %% Others send at the same time: what was taken is ahead of the last, the rest is refused.
    Senders = [spawn_monitor(fun() -> exit({taken, send_until_closed(Here, 0)}) end)
               || _ <- lists:seq(1, 4)],
    Self = self(),
    Reader = spawn_link(fun() ->
        receive go -> ok end,
        Self ! {read, read_to_end(There)}
    end),
    ok = macula_quic:controlling_process(There, Reader),
    Reader ! go,
    ?EXPECT({quic, send_ready, Here, undefined}),
    ok = send_last(Here),
    Taken = lists:sum([?EXPECT({'DOWN', Ref, process, _, {taken, N}}, N) || {_, Ref} <- Senders]),
    Read = ?EXPECT({read, Bytes}, Bytes),
    ?assertEqual(Sent + 1000 * Taken + 4, byte_size(Read)),
    ?assertEqual(<<"last">>, binary:part(Read, byte_size(Read), -4)).

send_until_closed(Stream, Taken) ->
    case macula_quic:send(Stream, <<0:8000>>) of
        ok -> send_until_closed(Stream, Taken + 1);
        {error, closed} -> Taken
    end.

send_last(Stream) ->
    case macula_quic:async_send(Stream, <<"last">>, #{fin => true}) of
        {error, busy} ->
            ?EXPECT({quic, send_ready, Stream, undefined}),
            send_last(Stream);
        Sent ->
            Sent
    end.

%% Once the window of the stream has left, nothing more does.
stays_busy(Stream, Sent) ->
    macula_test_nodes:wait_until(fun() ->
        {ok, #{send_pend := N}} = macula_quic:info(Stream),
        N =< Sent - 9999
    end).

fill_async(Stream, Sent) ->
    case macula_quic:async_send(Stream, <<0:8000>>) of
        ok -> fill_async(Stream, Sent + 1000);
        {error, busy} -> Sent
    end.

empty_sends_and_an_empty_stream(_Config) ->
    {Here, There} = stream(pair()),
    [ok = macula_quic:send(Here, Empty) || Empty <- [<<>>, [], [[], <<>>, [[]]]]],
    ok = macula_quic:async_send(Here, <<>>),
    ok = macula_quic:send(Here, <<"x">>),
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 0, 5000)),
    ok = macula_quic:send(Here, <<>>, #{fin => true}),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)).

iolists_of_thousands_of_pieces(_Config) ->
    {Here, There} = stream(pair()),
    Pieces = [[[N band 255], <<N:32>>, binary:copy(<<N>>, N rem 200), "text"]
              || N <- lists:seq(1, 5000)],
    Big = [binary:copy(<<N>>, 5000) || N <- lists:seq(1, 300)],
    _ = spawn_link(fun() ->
        ok = macula_quic:send(Here, Pieces),
        ok = macula_quic:send(Here, Big, #{fin => true})
    end),
    ?assert(iolist_to_binary([Pieces, Big]) =:= read_to_end(There)),
    ok = macula_quic:close_stream(Here).

%% What one call sends is not torn by what others send meanwhile.
concurrent_sends_stay_whole(_Config) ->
    {Here, There} = stream(pair(#{}, #{high_watermark => 50000})),
    Senders = 8,
    Each = 200,
    [spawn_link(fun() ->
         [ok = macula_quic:send(Here, [<<S, N:16>>, binary:copy(<<S>>, 4997)])
          || N <- lists:seq(1, Each)]
     end) || S <- lists:seq(1, Senders)],
    {ok, All} = macula_quic:recv(There, Senders * Each * 5000, 30000),
    Records = [{S, N, Rest} || <<S, N:16, Rest:4997/binary>> <= All],
    ?assertEqual(Senders * Each, length(Records)),
    [?assert(Rest =:= binary:copy(<<S>>, 4997)) || {S, _, Rest} <- Records],
    [?assertEqual(lists:seq(1, Each), [N || {S1, N, _} <- Records, S1 =:= S])
     || S <- lists:seq(1, Senders)],
    ok = macula_quic:close_stream(Here).

wrong_data_is_refused(_Config) ->
    {Here, _} = stream(pair()),
    [?assertMatch({error, {bad_option, data, _}}, Send(Data))
     || Data <- [atom, 1, [256], [a], [1 | 2], {}, #{}, <<1:7>>, [<<1:7>>], self()],
        Send <- [fun(D) -> macula_quic:send(Here, D) end,
                 fun(D) -> macula_quic:async_send(Here, D) end]].

wrong_options_are_refused(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    [?assertMatch({error, {bad_option, Key, _}}, macula_quic:open_stream(C, Options))
     || {Key, Options} <- [{active, #{active => -32769}}, {active, #{active => 32768}},
                           {direction, #{direction => both}}, {priority, #{priority => high}},
                           {priority, [{priority, 1 bsl 31}]}, {timeout, #{timeout => -1}},
                           {colour, #{colour => red}}]],
    [?assertMatch({error, {bad_option, Key, _}}, macula_quic:send(Here, <<>>, Options))
     || {Key, Options} <- [{timeout, #{timeout => soon}}, {fin, #{fin => 1}}, {x, [x]}]],
    ?assertMatch({error, {bad_option, active, _}},
                 macula_quic:accept_stream(S, #{active => maybe_so}, 10)),
    ?assertMatch({error, {bad_option, timeout, _}}, macula_quic:accept_stream(S, #{}, never)),
    ?assertMatch({error, {bad_option, active, _}},
                 macula_quic:async_accept_stream(S, #{active => -32769})),
    [?assertMatch({error, {bad_option, length, _}}, macula_quic:recv(There, Len, 10))
     || Len <- [-1, 1 bsl 31, 1.0, all]],
    ?assertMatch({error, {bad_option, timeout, _}}, macula_quic:recv(There, 1, -1)),
    ?assertMatch({error, {bad_option, colour, _}}, macula_quic:setopt(There, colour, red)),
    %% Handles of another kind.
    [?assertEqual({error, badarg}, F()) || F <- [
        fun() -> macula_quic:send(C, <<"x">>) end, fun() -> macula_quic:recv(C, 0, 10) end,
        fun() -> macula_quic:open_stream(Here) end, fun() -> macula_quic:setopt(C, active, true) end,
        fun() -> macula_quic:setopt(Here, datagrams, true) end,
        fun() -> macula_quic:accept_stream(Here, #{}, 10) end,
        fun() -> macula_quic:close_connection(Here) end,
        fun() -> macula_quic:close_stream(C) end, fun() -> macula_quic:close(self()) end,
        fun() -> macula_quic:accept(C, 10) end]].

delivered_is_told_when_all_has_arrived(_Config) ->
    #{relay := Relay} = Pair = macula_quic_lab:through(#{}, #{}),
    {Here, There} = stream(Pair),
    ok = macula_quic:tell_delivered(Here),
    ?EXPECT({quic, delivered, Here, undefined}),
    ok = macula_relay:set(Relay, #{up => #{blackhole => true}}),
    Data = crypto:strong_rand_bytes(20000),
    ok = macula_quic:send(Here, Data),
    ok = macula_quic:tell_delivered(Here),
    receive {quic, delivered, Here, _} -> error(not_delivered) after 300 -> ok end,
    ok = macula_relay:set(Relay, #{up => #{blackhole => false}}),
    ?EXPECT({quic, delivered, Here, undefined}),
    %% It is there: no packet comes any more.
    ok = macula_relay:set(Relay, #{blackhole => true}),
    ?assertEqual({ok, Data}, macula_quic:recv(There, byte_size(Data), 5000)),
    ok = macula_relay:set(Relay, #{blackhole => false}),
    %% Once for each time it is asked.
    ?NOTHING({quic, delivered, _, _}),
    %% With the end of the stream, while its other half goes on.
    {Last, LastThere} = stream(Pair),
    ok = macula_relay:set(Relay, #{up => #{blackhole => true}}),
    ok = macula_quic:send(Last, Data, #{fin => true}),
    ok = macula_quic:tell_delivered(Last),
    receive {quic, delivered, Last, _} -> error(not_delivered) after 300 -> ok end,
    ok = macula_relay:set(Relay, #{up => #{blackhole => false}}),
    ?EXPECT({quic, delivered, Last, undefined}),
    ?assertEqual(Data, read_to_end(LastThere)),
    %% Whoever asks later has his answer, too.
    ok = macula_quic:tell_delivered(Last),
    ?EXPECT({quic, delivered, Last, undefined}),
    ok = macula_quic:close_stream(LastThere),
    ?EXPECT({quic, stream_closed, LastThere, _}),
    ?assertEqual({error, closed}, macula_quic:recv(Last, 0, 5000)),
    ?EXPECT({quic, stream_closed, Last, _}),
    ?assertEqual({error, closed}, macula_quic:tell_delivered(Last)),
    %% At its end the stream has other words.
    ok = macula_quic:close_stream(Here),
    ok = macula_quic:close_stream(There),
    ?EXPECT({quic, stream_closed, Here, _}),
    ?assertEqual({error, closed}, macula_quic:tell_delivered(Here)),
    ?assertEqual({error, badarg}, macula_quic:tell_delivered(make_ref())),
    %% Both sides, as the relay takes the last packet with it.
    macula_quic_lab:close(Pair).

%% The peer has it all, and its acknowledgements are withheld, while several streams ask again and again.
delivered_is_never_early(_Config) ->
    #{relay := Relay} = Pair = macula_quic_lab:through(#{}, #{}),
    Streams = [stream(Pair) || _ <- lists:seq(1, 8)],
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    [begin
         [ok = macula_quic:send(Here, integer_to_binary(N)) || {Here, _} <- Streams],
         [ok = macula_quic:tell_delivered(Here) || {Here, _} <- Streams]
     end || N <- lists:seq(100, 299)],
    [?assertMatch({ok, _}, macula_quic:recv(There, 600, 10000)) || {_, There} <- Streams],
    receive {quic, delivered, _, _} = Early -> error(Early) after 300 -> ok end,
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    %% One for each question.
    [?EXPECT({quic, delivered, Here, undefined}) || {Here, _} <- Streams, _ <- lists:seq(1, 200)],
    ?NOTHING({quic, delivered, _, _}),
    %% With losses in both directions a message that was delivered is there.
    ok = macula_relay:set(Relay, #{loss => 0.2}),
    [begin
         Data = crypto:strong_rand_bytes(5000),
         ok = macula_quic:send(Here, Data),
         ok = macula_quic:tell_delivered(Here),
         ?EXPECT({quic, delivered, Here, undefined}, ok, 30000),
         ok = macula_relay:set(Relay, #{blackhole => true}),
         ?assertEqual({ok, Data}, macula_quic:recv(There, 5000, 5000)),
         ok = macula_relay:set(Relay, #{blackhole => false})
     end || {Here, There} <- Streams],
    ok = macula_relay:set(Relay, #{loss => 0.0}),
    macula_quic_lab:close(Pair).

%% While another stream of the connection has unacknowledged bytes at every moment.
delivered_waits_for_no_other_stream(_Config) ->
    Pair = macula_quic_lab:through(#{delay_ms => 5}, #{}),
    {Here, There} = stream(Pair),
    {Busy, BusyThere} = stream(Pair),
    ok = macula_quic:setopt(BusyThere, active, true),
    Self = self(),
    Sender = spawn_link(fun() -> keep_busy(Busy, Self) end),
    [begin
         ok = macula_quic:send(Here, <<N:32>>),
         ok = macula_quic:tell_delivered(Here),
         ?EXPECT({quic, delivered, Here, undefined}),
         ?assertEqual({ok, <<N:32>>}, macula_quic:recv(There, 4, 5000))
     end || N <- lists:seq(1, 20)],
    %% It was busy all the time, and is.
    ?EXPECT({busy, Sender}),
    unlink(Sender),
    exit(Sender, kill),
    macula_quic_lab:close(Pair).

keep_busy(Stream, Watcher) ->
    ok = macula_quic:send(Stream, binary:copy(<<0>>, 100000)),
    Watcher ! {busy, self()},
    keep_busy(Stream, Watcher).

%% Neither the stream's nor the connection's.
delivered_waits_for_no_credit(_Config) ->
    [begin
         Pair = pair(Window, #{}),
         {Here, There} = stream(Pair),
         [Size] = maps:values(Window),
         %% The peer has read one byte and gives credit anew when it has read more.
         First = crypto:strong_rand_bytes(Size - 1),
         ok = macula_quic:send(Here, First),
         ok = macula_quic:tell_delivered(Here),
         ?EXPECT({quic, delivered, Here, undefined}),
         %% And what is stuck behind it is not delivered, or any later question answered.
         Second = crypto:strong_rand_bytes(2 * Size),
         ok = macula_quic:send(Here, Second),
         ok = macula_quic:tell_delivered(Here),
         receive {quic, delivered, _, _} = Early -> error(Early) after 200 -> ok end,
         ?assertEqual({ok, First}, macula_quic:recv(There, byte_size(First), 5000)),
         ?assertEqual({ok, Second}, macula_quic:recv(There, byte_size(Second), 5000)),
         ?EXPECT({quic, delivered, Here, undefined}),
         macula_quic_lab:close(Pair)
     end || Window <- [#{stream_recv_window => 20000}, #{conn_flow_control_window => 20000}]].

who_waits_for_delivery_holds_nobody_up(_Config) ->
    Pair = macula_quic_lab:through(#{delay_ms => 5}, #{}),
    {Here, There} = stream(Pair),
    {Other, OtherThere} = stream(Pair),
    Self = self(),
    Data = crypto:strong_rand_bytes(3000000),
    spawn_link(fun() -> ok = macula_quic:send(Other, Data, #{fin => true}), Self ! sent end),
    ok = macula_quic:send(Here, <<"asked">>),
    ok = macula_quic:tell_delivered(Here),
    ?assertEqual({ok, <<"asked">>}, macula_quic:recv(There, 5, 10000)),
    ?assertEqual(Data, read_to_end(OtherThere)),
    ?EXPECT(sent),
    ?EXPECT({quic, delivered, Here, undefined}),
    ok = macula_quic:close_stream(There),
    macula_quic_lab:close(Pair).

%% Nor do those whose owner has died, while their connection lives.
streams_that_are_reset_leave_nothing(_Config) ->
    #{client := C, server := S} = pair(),
    Before = macula_quic_lab:objects(),
    [macula_quic_lab:in_process(fun() ->
         {ok, Stream} = macula_quic:open_stream(C),
         ok = macula_quic:send(Stream, <<"begun">>),
         ok = macula_quic:tell_delivered(Stream),
         ?EXPECT({quic, delivered, Stream, undefined}),
         case N rem 2 of
             0 -> ok = macula_quic:reset_stream(Stream, 7);
             1 -> ok
         end
     end) || N <- lists:seq(1, 100)],
    ok = macula_quic_lab:await_objects(Before),
    {There, Here} = stream(#{client => S, server => C}),
    ok = macula_quic:send(There, <<"still here">>),
    {ok, <<"still here">>} = macula_quic:recv(Here, 10, 5000).
