%% Ownership: what changes hands, with what is on its way, and what ends with its owner.
-module(macula_quic_owner_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([a_stream_changes_hands_under_full_load/1, ten_thousand_transfers_keep_every_byte/1,
         ten_thousand_handoffs_keep_every_byte/1, counted_messages_move_with_the_stream/1,
         a_connection_changes_hands_with_its_new_streams/1, messages_that_wait_are_moved_in_order/1,
         a_new_stream_comes_before_its_data/1, a_listener_changes_hands/1,
         handoff_sets_the_mode_afterwards/1, a_handoffs_mode_replaces_the_earlier_one/1,
         a_handoff_with_a_wrong_mode_gives_nothing_away/1, many_streams_that_wait_change_hands_fast/1,
         only_the_owner_gives_away/1, to_a_dead_process_is_noproc/1,
         to_oneself_changes_nothing/1, a_new_owner_that_dies_at_once_ends_the_stream/1,
         an_owner_that_dies_between_the_steps_leaves_nothing/1, wrong_arguments_are_refused/1,
         the_owners_death_closes_its_connection/1, the_owners_death_resets_its_streams/1,
         the_owners_death_stops_its_listener/1, a_former_owners_death_ends_nothing/1,
         terminal_messages_go_to_the_new_owner/1]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, spawn_owner/1, ask/2, listen/0,
                          client_options/0]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% A ring of owners hands an active stream round while it is sent as fast as can be. Every byte
%% arrives once, and none at an owner before an earlier one at another.
a_stream_changes_hands_under_full_load(_Config) ->
    #{client := C} = Pair = pair(),
    [hand_round(Pair, Mode) || _ <- lists:seq(1, macula_quic_lab:times(10)),
                               Mode <- [true, 100, once]],
    ?assertEqual({ok, C}, macula_quic:handshake(C)).

hand_round(Pair, Mode) ->
    {Here, There} = stream(Pair),
    Self = self(),
    Size = 24000 * 64,
    Sender = spawn_link(fun() ->
        [ok = macula_quic:send(Here, <<N:64/unit:8>>) || N <- lists:seq(1, Size div 64)],
        ok = macula_quic:async_shutdown_stream(Here, graceful, 0),
        Self ! {self(), sent}
    end),
    Owners = [spawn_link(fun() -> taker(Self, Mode, 1 + I) end) || I <- lists:seq(1, 4)],
    Ring = lists:zip(Owners, tl(Owners) ++ [hd(Owners)]),
    [Pid ! {next, Next} || {Pid, Next} <- Ring],
    ok = macula_quic:controlling_process(There, hd(Owners)),
    hd(Owners) ! {take, There, 0},
    ?EXPECT({Sender, sent}, ok, 30000),
    Taken = ?EXPECT({complete, Offsets}, Offsets, 30000),
    [begin unlink(Pid), exit(Pid, kill) end || Pid <- Owners],
    %% `Taken' is the order in which the owners saw it, from the byte after the first.
    End = lists:foldl(fun({Offset, Len}, At) ->
        ?assertEqual(At, Offset),
        At + Len
    end, 1, Taken),
    ?assertEqual(1 + Size, End),
    ok = macula_quic:close_stream(Here).

%% Each holds the stream for some messages and passes it on, with what was taken so far.
taker(Report, Mode, Messages) ->
    receive {next, Next} -> taker(Report, Mode, Messages, Next) end.

taker(Report, Mode, Messages, Next) ->
    receive
        {take, Stream, Taken} ->
            Before = case Taken of 0 -> []; _ -> Taken end,
            ok = macula_quic:setopt(Stream, active, Mode),
            case take(Stream, Mode, Messages, Before) of
                {complete, All} ->
                    Report ! {complete, lists:reverse(All)};
                {pass, Some} ->
                    ok = macula_quic:controlling_process(Stream, Next),
                    Next ! {take, Stream, Some}
            end,
            taker(Report, Mode, Messages, Next)
    end.

take(_Stream, _Mode, 0, Taken) ->
    {pass, Taken};
take(Stream, Mode, Left, Taken) ->
    receive
        {quic, Data, Stream, #{absolute_offset := Offset, len := Len}} ->
            Len = byte_size(Data),
            _ = [ok = macula_quic:setopt(Stream, active, once) || Mode =:= once],
            take(Stream, Mode, Left - 1, [{Offset, Len} | Taken]);
        {quic, passive, Stream, undefined} ->
            ok = macula_quic:setopt(Stream, active, Mode),
            take(Stream, Mode, Left, Taken);
        {quic, peer_send_shutdown, Stream, undefined} ->
            {complete, Taken}
    after 20000 ->
        error({silent, macula_quic:info(Stream), length(Taken)})
    end.

%% The sender never rests: each owner takes one message, and passes the stream on with those that have come
%% meanwhile. The bytes are compared by their hash.
ten_thousand_transfers_keep_every_byte(_Config) ->
    pass_on(fun(Stream, To, _Mode) -> macula_quic:controlling_process(Stream, To) end,
            fun(Stream, Mode) -> macula_quic:setopt(Stream, active, Mode) end).

%% The same, with the next owner's mode set on the way.
ten_thousand_handoffs_keep_every_byte(_Config) ->
    pass_on(fun(Stream, To, Mode) -> macula_quic:handoff_stream(Stream, To, #{active => Mode}) end,
            fun(_Stream, _Mode) -> ok end).

pass_on(Hand, Begin) ->
    Times = 10000,
    Given = counters:new(2, []),
    Give = fun(Stream, To, Mode) ->
        ok = Hand(Stream, To, Mode),
        counters:add(Given, 1, 1)
    end,
    Find = fun() -> counters:add(Given, 2, 1) end,
    {Here, There} = stream(pair()),
    Sender = macula_quic_flow:start(Here),
    Self = self(),
    Owners = [spawn_link(fun() ->
        receive {next, Next} -> holder({Self, Sender, Next, Give, Begin, Find}) end
    end)
              || _ <- [1, 2, 3]],
    [Owner ! {next, Next} || {Owner, Next} <- lists:zip(Owners, tl(Owners) ++ [hd(Owners)])],
    Give(There, hd(Owners), mode(Times)),
    hd(Owners) ! {hold, There, macula_quic_flow:none(), Times - 1},
    Read = ?EXPECT({all, R}, R, 90000),
    ?assert(macula_quic_flow:is_whole(Sender, Read)),
    ?assertEqual(Times, counters:get(Given, 1)),
    ct:pal("~b times with messages that waited", [counters:get(Given, 2)]),
    ?assert(counters:get(Given, 2) > Times div 100, counters:get(Given, 2)).

mode(Left) -> element(1 + Left rem 3, {once, 2, true}).

holder({Test, Sender, Next, Give, Begin, Find} = Ring) ->
    receive
        {hold, Stream, Read, 0} ->
            macula_quic_flow:stop(Sender),
            ok = macula_quic:setopt(Stream, active, true),
            Test ! {all, to_the_end(Stream, Sender, Read)};
        {hold, Stream, Read, Left} ->
            _ = [Find() || {messages, [_ | _]} <- [process_info(self(), messages)]],
            ok = Begin(Stream, mode(Left + 1)),
            More = macula_quic_flow:taken(Sender, one_message(Stream), Read),
            Give(Stream, Next, mode(Left)),
            ?NOTHING({quic, _, Stream, _}),
            Next ! {hold, Stream, More, Left - 1},
            holder(Ring)
    end.

one_message(Stream) ->
    receive
        {quic, passive, Stream, undefined} ->
            ok = macula_quic:setopt(Stream, active, once),
            one_message(Stream);
        {quic, Data, Stream, _} when is_binary(Data) ->
            Data
    after 20000 ->
        error({silent, macula_quic:info(Stream)})
    end.

to_the_end(Stream, Sender, Read) ->
    receive
        {quic, passive, Stream, undefined} ->
            ok = macula_quic:setopt(Stream, active, true),
            to_the_end(Stream, Sender, Read);
        {quic, Data, Stream, _} when is_binary(Data) ->
            to_the_end(Stream, Sender, macula_quic_flow:taken(Sender, Data, Read));
        {quic, peer_send_shutdown, Stream, undefined} ->
            Read
    after 20000 ->
        error({silent, macula_quic:info(Stream)})
    end.

%% The messages of {active, N} and the passive message behind them go together.
counted_messages_move_with_the_stream(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, 3),
    [begin
         ok = macula_quic:send(Here, <<N>>),
         %% One message each.
         macula_test_nodes:wait_until(fun() ->
             {ok, #{active := A}} = macula_quic:info(There),
             A =:= case N of 3 -> false; _ -> 3 - N end
         end)
     end || N <- [1, 2, 3]],
    Other = spawn_owner(fun() -> There end),
    ok = macula_quic:controlling_process(There, Other),
    ?NOTHING({quic, _, _, _}),
    ?assertMatch([{quic, <<1>>, There, _}, {quic, <<2>>, There, _}, {quic, <<3>>, There, _},
                  {quic, passive, There, undefined}],
                 ask(Other, fun(_) -> macula_quic_lab:mailbox() end)),
    ok = macula_quic:close_stream(Here).

%% While the peer opens streams without pause, the connection goes from owner to owner.
a_connection_changes_hands_with_its_new_streams(_Config) ->
    #{client := C, server := S} = pair(#{peer_unidi_stream_count => 100000}, #{}),
    Self = self(),
    Count = 3000,
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    Opener = spawn_link(fun() ->
        [begin
             {ok, X} = macula_quic:open_stream(C, #{direction => unidirectional}),
             ok = macula_quic:send(X, <<N:32>>, #{fin => true})
         end || N <- lists:seq(1, Count)],
        Self ! {self(), opened},
        receive stop -> ok end
    end),
    Owners = [spawn_link(fun() -> conn_owner(Self, []) end) || _ <- lists:seq(1, 4)],
    Rounds = pass_conn(S, Self, Owners, 0),
    ?EXPECT({Opener, opened}, ok, 30000),
    %% Whoever has seen what: each stream announced once, then its data, then its end.
    macula_test_nodes:wait_until(fun() ->
        lists:sum([ask(Pid, fun(Seen) -> length([x || {_, peer_send_shutdown, _} <- Seen]) end)
                   || Pid <- Owners]) =:= Count
    end, 30000),
    Seen = lists:append([ask(Pid, fun lists:reverse/1) || Pid <- Owners]),
    ByStream = lists:foldl(fun({Stream, What, _}, Map) ->
        maps:update_with(Stream, fun(L) -> [What | L] end, [What], Map)
    end, #{}, Seen),
    ?assertEqual(Count, map_size(ByStream)),
    maps:foreach(fun(_, Whats) ->
        ?assertMatch([new_stream, <<_:32>>, peer_send_shutdown | _], lists:reverse(Whats))
    end, ByStream),
    Numbers = [N || {_, <<N:32>>, _} <- Seen],
    ?assertEqual(lists:seq(1, Count), lists:sort(Numbers)),
    ct:pal("~b transfers of the connection", [Rounds]),
    ?assert(Rounds > 10),
    [begin unlink(Pid), exit(Pid, kill) end || Pid <- [Opener | Owners]].

pass_conn(Conn, From, [Next | Rest], Rounds) ->
    ok = case From =:= self() of
        true -> macula_quic:controlling_process(Conn, Next);
        false -> ask(From, fun(Seen) -> {macula_quic:controlling_process(Conn, Next), Seen} end)
    end,
    Again = receive {_, opened} = M -> self() ! M, false after 0 -> true end,
    case Again orelse Rounds < 50 of
        true -> pass_conn(Conn, Next, Rest ++ [Next], Rounds + 1);
        false -> Rounds
    end.

%% Answers as `ask/2' wants, and notes what it is told of streams, newest first.
conn_owner(Report, Seen) ->
    receive
        {ask, From, Ref, Fun} ->
            case Fun(Seen) of
                {Result, Seen} -> From ! {Ref, Result};
                Result -> From ! {Ref, Result}
            end,
            conn_owner(Report, Seen);
        {quic, What, Stream, Detail} ->
            conn_owner(Report, [{Stream, What, Detail} | Seen])
    end.

messages_that_wait_are_moved_in_order(_Config) ->
    [begin
         {Here, There} = stream(Pair),
         ok = macula_quic:setopt(There, active, true),
         %% Others in between, which stay.
         Other = spawn_owner(fun() -> There end),
         Count = 200,
         _ = spawn_link(fun() ->
             [begin ok = macula_quic:send(Here, <<N:64>>), erlang:yield() end
              || N <- lists:seq(1, Count)],
             ok = macula_quic:async_shutdown_stream(Here, graceful, 0)
         end),
         self() ! {unrelated, 1},
         ?EXPECT({quic, First, There, #{absolute_offset := 1}}, self() ! {first, First}),
         self() ! {unrelated, 2},
         ok = macula_quic:controlling_process(There, Other),
         self() ! {unrelated, 3},
         ?NOTHING({quic, _, There, _}),
         Rest = ask(Other, fun(S) -> until_end(S, []) end),
         First1 = ?EXPECT({first, F}, F),
         ?assertEqual(<< <<N:64>> || N <- lists:seq(1, Count)>>,
                      iolist_to_binary([First1, Rest])),
         ?assertEqual([1, 2, 3], [?EXPECT({unrelated, X}, X) || _ <- [1, 2, 3]]),
         unlink(Other),
         exit(Other, kill),
         ok = macula_quic:close_stream(Here)
     end || Pair <- [pair()], _ <- lists:seq(1, macula_quic_lab:times(20))].

until_end(Stream, Got) ->
    receive
        {quic, Data, Stream, #{}} when is_binary(Data) -> until_end(Stream, [Data | Got]);
        {quic, peer_send_shutdown, Stream, undefined} -> lists:reverse(Got)
    after 10000 -> error({silent, length(Got)})
    end.

a_new_stream_comes_before_its_data(_Config) ->
    #{client := C, server := S} = pair(),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    Streams = [begin {ok, X} = macula_quic:open_stream(C), X end || _ <- lists:seq(1, 5)],
    [ok = macula_quic:send(X, <<"data">>, #{fin => true}) || X <- Streams],
    %% All of it waits here before the connection is given away.
    macula_quic_lab:await_mailbox(fun(Ms) ->
        length([x || {quic, peer_send_shutdown, _, _} <- Ms]) =:= 5
    end),
    Other = spawn_owner(fun() -> S end),
    ok = macula_quic:controlling_process(S, Other),
    ?NOTHING({quic, _, _, _}),
    Messages = ask(Other, fun(_) -> macula_quic_lab:mailbox() end),
    ByStream = [[What || {quic, What, X, _} <- Messages, X =:= Stream]
                || {quic, new_stream, Stream, #{conn := Conn}} <- Messages, Conn =:= S],
    ?assertEqual(lists:duplicate(5, [new_stream, <<"data">>, peer_send_shutdown]), ByStream),
    %% And they are the new owner's.
    [?assertMatch({ok, #{owner := Other}}, macula_quic:info(Stream))
     || {quic, new_stream, Stream, _} <- Messages],
    ?assertEqual(5, length(Streams)).

a_listener_changes_hands(_Config) ->
    {L, Port} = listen(),
    Other = spawn_owner(fun() -> L end),
    ok = macula_quic:controlling_process(L, Other),
    ?assertMatch({ok, #{owner := Other}}, macula_quic:info(L)),
    %% Armed is who asked, not who owns.
    ok = macula_quic:async_accept(L),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    S = ?EXPECT({quic, new_conn, Conn, _}, Conn),
    ok = macula_quic:close_listener(L),
    ?assertEqual([{quic, listener_stopped, L, undefined}],
                 ask(Other, fun(_) -> macula_quic_lab:mailbox() end)),
    ?assertEqual([{ok, C}, {ok, S}], [macula_quic:handshake(X) || X <- [C, S]]).

handoff_sets_the_mode_afterwards(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:send(Here, <<"early">>),
    Other = spawn_owner(fun() -> There end),
    ok = macula_quic:handoff_stream(There, Other, #{active => true}),
    ?assertEqual(<<"early">>, ask(Other, fun(S) -> macula_quic_lab:collect(S, 5) end)),
    ?assertMatch({ok, #{owner := Other, active := true}}, macula_quic:info(There)),
    ?assertEqual({error, not_owner}, macula_quic:handoff_stream(There, self(), #{})),
    ?assertMatch({error, {bad_option, mode, _}},
                 macula_quic:handoff_stream(Here, Other, #{mode => 1})),
    ?assertMatch({ok, #{owner := Me}} when Me =:= self(), macula_quic:info(Here)).

a_handoffs_mode_replaces_the_earlier_one(_Config) ->
    Pair = pair(),
    [begin
         {Here, There} = stream(Pair),
         ok = macula_quic:setopt(There, active, Before),
         Other = spawn_owner(fun() -> There end),
         ?assertEqual(ok, macula_quic:handoff_stream(There, Other, #{active => Mode})),
         ?assertMatch({ok, #{owner := Other, active := Mode}}, macula_quic:info(There)),
         ?assertEqual([], ask(Other, fun(_) -> macula_quic_lab:mailbox() end)),
         ok = macula_quic:close_stream(Here)
     end || Before <- [true, false, once, 100, 32767], Mode <- [true, false, once, 1, 10, 32767]].

a_handoff_with_a_wrong_mode_gives_nothing_away(_Config) ->
    #{client := C} = Pair = pair(),
    {_Here, There} = stream(Pair),
    ok = macula_quic:setopt(There, active, 100),
    Other = spawn_owner(fun() -> There end),
    [begin
         ?assertMatch({error, {bad_option, active, _}},
                      macula_quic:handoff_stream(There, Other, #{active => Mode})),
         ?assertMatch({ok, #{owner := Me, active := 100}} when Me =:= self(), macula_quic:info(There))
     end || Mode <- [0, -5, -32768, 32768, 1 bsl 70, 1.0, twice, "true"]],
    ?assertEqual({error, badarg}, macula_quic:handoff_stream(C, Other, #{active => true})),
    ?assertMatch({ok, #{owner := Me}} when Me =:= self(), macula_quic:info(C)).

%% Among messages of the caller's own, and of another connection.
many_streams_that_wait_change_hands_fast(_Config) ->
    Options = #{peer_unidi_stream_count => 100000},
    #{client := C, server := S} = pair(Options, #{}),
    #{client := OtherC, server := OtherS} = pair(Options, #{}),
    Count = 20000,
    Own = 10,
    [ok = macula_quic:async_accept_stream(Conn, #{active => true}) || Conn <- [S, OtherS]],
    Strangers = opened(OtherC, Own),
    await_messages(2 * Own),
    [self() ! {unrelated, N} || N <- lists:seq(1, Own)],
    Streams = opened(C, Count),
    await_messages(3 * Own + 2 * Count),
    self() ! {unrelated, last},
    Before = macula_quic_lab:mailbox(),
    Moved = sets:from_list([S | [Stream || {quic, new_stream, Stream, #{conn := Conn}} <- Before, Conn =:= S]]),
    IsMoved = fun({quic, new_stream, _, #{conn := Conn}}) -> Conn =:= S;
                 ({quic, _, Handle, _}) -> sets:is_element(Handle, Moved);
                 (_) -> false
              end,
    {Theirs, Mine} = lists:partition(IsMoved, Before),
    ?assertEqual(2 * Count, length(Theirs)),
    [self() ! Message || Message <- Before],
    Other = spawn_owner(fun() -> S end),
    {reductions, Begun} = process_info(self(), reductions),
    ok = macula_quic:controlling_process(S, Other),
    {reductions, Ended} = process_info(self(), reductions),
    ct:pal("~b streams in ~b reductions", [Count, Ended - Begun]),
    %% Work instead of time, which other programs take as well: each message that a receive passes over counts as
    %% one, so a scan of the mailbox for each stream would be thousands for each.
    ?assert(Ended - Begun < Count * 1000),
    ?assert(Theirs =:= ask(Other, fun(_) -> macula_quic_lab:mailbox() end)),
    ?assert(Mine =:= macula_quic_lab:mailbox()),
    Unrelated = lists:seq(1, Own) ++ [last],
    ?assertEqual(Unrelated, [?EXPECT({unrelated, X}, X) || _ <- Unrelated]),
    [?assertMatch({ok, #{owner := Other}}, macula_quic:info(Stream))
     || {quic, new_stream, Stream, _} <- lists:sublist(Theirs, 100) ++ lists:nthtail(2 * Count - 100, Theirs)],
    ?assertEqual(Own + Count, length(Strangers) + length(Streams)).

opened(Conn, Count) ->
    [begin
         {ok, Stream} = macula_quic:open_stream(Conn, #{direction => unidirectional}),
         ok = macula_quic:send(Stream, <<"data">>),
         Stream
     end || _ <- lists:seq(1, Count)].

%% Another process looks: the owner of the mailbox may not be shown what came last.
await_messages(Count) ->
    Self = self(),
    macula_quic_lab:in_process(fun() ->
        macula_test_nodes:wait_until(fun() ->
            {message_queue_len, Count} =:= process_info(Self, message_queue_len)
        end)
    end).

only_the_owner_gives_away(_Config) ->
    #{listener := L, client := C} = Pair = pair(),
    {Here, _There} = stream(Pair),
    Self = self(),
    [?assertEqual({error, not_owner}, macula_quic_lab:in_process(fun() ->
         macula_quic:controlling_process(Handle, To(Self))
     end)) || Handle <- [L, C, Here], To <- [fun(P) -> P end, fun(_) -> self() end]].

to_a_dead_process_is_noproc(_Config) ->
    #{listener := L, client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    {Dead, Monitor} = spawn_monitor(fun() -> ok end),
    receive {'DOWN', Monitor, process, Dead, _} -> ok end,
    [?assertEqual({error, noproc}, macula_quic:controlling_process(Handle, Dead))
     || Handle <- [L, C, Here]],
    %% Nothing changed.
    ok = macula_quic:send(Here, <<"still mine">>),
    ?assertEqual({ok, <<"still mine">>}, macula_quic:recv(There, 10, 5000)),
    [?assertMatch({ok, #{owner := Me}} when Me =:= self(), macula_quic:info(Handle))
     || Handle <- [L, C, Here]].

to_oneself_changes_nothing(_Config) ->
    {Here, There} = stream(pair()),
    ok = macula_quic:setopt(There, active, true),
    ok = macula_quic:send(Here, <<"x">>),
    [ok = macula_quic:controlling_process(There, self()) || _ <- [1, 2, 3]],
    ?assertEqual(<<"x">>, macula_quic_lab:collect(There, 1)),
    ?NOTHING({quic, _, _, _}),
    ok = macula_quic:close_stream(Here).

a_new_owner_that_dies_at_once_ends_the_stream(_Config) ->
    #{client := C} = Pair = pair(),
    [begin
         {Here, There} = stream(Pair),
         Doomed = spawn(fun() -> receive die -> ok end end),
         _ = spawn(fun() -> Doomed ! die end),
         case macula_quic:controlling_process(There, Doomed) of
             ok ->
                 ?EXPECT({quic, peer_receive_aborted, Here, 0}),
                 ?EXPECT({quic, peer_send_aborted, Here, 0}),
                 ?EXPECT({quic, stream_closed, Here, _});
             {error, noproc} ->
                 ok = macula_quic:close_stream(There),
                 ok = macula_quic:close_stream(Here)
         end
     end || _ <- lists:seq(1, macula_quic_lab:times(50))],
    ?assertEqual({ok, C}, macula_quic:handshake(C)).

%% The two native steps by hand, as no process dies between them at will.
an_owner_that_dies_between_the_steps_leaves_nothing(_Config) ->
    #{client := C, server := S} = pair(),
    Before = macula_quic_lab:objects(),
    Self = self(),
    ok = macula_quic:async_accept_stream(S),
    {Owner, Monitor} = spawn_monitor(fun() ->
        receive go -> ok end,
        ok = macula_nif:conn_begin_transfer(S, Self),
        {ok, X} = macula_quic:open_stream(C),
        ok = macula_quic:send(X, <<"x">>),
        %% The new stream is on its way to the next owner, who is never to have it.
        macula_test_nodes:wait_until(fun() ->
            {ok, #{stats := #{recv_stream_frames := N}}} = macula_quic:info(S),
            N > 0
        end),
        Self ! {stream, X},
        exit(done)
    end),
    ok = macula_quic:controlling_process(S, Owner),
    Owner ! go,
    receive {'DOWN', Monitor, process, Owner, done} -> ok end,
    ?EXPECT({stream, _}),
    ?EXPECT({quic, shutdown, C, {application_close, 0, <<"owner died">>}}),
    ok = macula_quic_lab:await_objects([{listener, proplists:get_value(listener, Before)},
                                        {connection, 2}, {stream, 0}]).

wrong_arguments_are_refused(_Config) ->
    {Here, _} = stream(pair()),
    [?assertEqual({error, badarg}, macula_quic:controlling_process(Handle, Pid))
     || {Handle, Pid} <- [{make_ref(), self()}, {Here, make_ref()}, {Here, undefined},
                          {self(), self()}, {Here, self}, {17, self()}]].

the_owners_death_closes_its_connection(_Config) ->
    [begin
         {L, Port} = listen(),
         Self = self(),
         Owner = spawn(fun() ->
             {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
             {ok, X} = macula_quic:open_stream(C),
             ok = macula_quic:send(X, <<"x">>),
             _ = put(held, {C, X}),
             Self ! connected,
             receive {die, How} -> exit(How) end
         end),
         {ok, S} = macula_quic:accept(L, 5000),
         {ok, There} = macula_quic:accept_stream(S, #{active => true}, 5000),
         ?EXPECT({quic, <<"x">>, There, _}),
         ?EXPECT(connected),
         case Reason of
             kill -> exit(Owner, kill);
             _ -> Owner ! {die, Reason}
         end,
         ?EXPECT({quic, shutdown, S, {application_close, 0, <<"owner died">>}}),
         %% Its stream is reset, and its connection closed: whichever is first.
         ?EXPECT({quic, stream_closed, There, #{is_conn_shutdown := Lost, reason := Why}},
                 ?assert(lists:member({Lost, Why}, [
                     {false, normal}, {true, {application_close, 0, <<"owner died">>}}])))
     end || Reason <- [kill, normal, crash]].

the_owners_death_resets_its_streams(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    Other = spawn(fun() -> receive stop -> ok end end),
    ok = macula_quic:controlling_process(There, Other),
    exit(Other, kill),
    ?EXPECT({quic, peer_send_aborted, Here, 0}),
    ?EXPECT({quic, peer_receive_aborted, Here, 0}),
    ?EXPECT({quic, stream_closed, Here, #{reason := normal}}),
    %% And nothing else.
    ?assertEqual({ok, C}, macula_quic:handshake(C)),
    _ = stream(Pair).

the_owners_death_stops_its_listener(_Config) ->
    {L, Port} = listen(),
    Other = spawn(fun() -> receive stop -> ok end end),
    ok = macula_quic:controlling_process(L, Other),
    exit(Other, kill),
    macula_test_nodes:wait_until(fun() -> macula_quic:accept(L, 0) =:= {error, closed} end),
    macula_test_nodes:wait_until(fun() ->
        case gen_udp:open(Port, [{ip, {127, 0, 0, 1}}]) of
            {ok, Socket} -> gen_udp:close(Socket) =:= ok;
            _ -> false
        end
    end).

a_former_owners_death_ends_nothing(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    {Former, Monitor} = spawn_monitor(fun() ->
        {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
        {ok, S} = macula_quic:accept(L, 5000),
        {Here, There} = stream(#{client => C, server => S}),
        [ok = macula_quic:controlling_process(H, Self) || H <- [C, S, Here, There]],
        Self ! {handles, C, S, Here, There}
    end),
    {C, S, Here, There} = ?EXPECT({handles, A, B, X, Y}, {A, B, X, Y}),
    receive {'DOWN', Monitor, process, Former, _} -> ok end,
    ok = macula_quic:send(Here, <<"x">>, #{fin => true}),
    ?assertEqual(<<"x">>, macula_quic_lab:read_to_end(There)),
    ?assertEqual([{ok, C}, {ok, S}], [macula_quic:handshake(H) || H <- [C, S]]).

terminal_messages_go_to_the_new_owner(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    Other = spawn_owner(fun() -> {S, There} end),
    [ok = macula_quic:controlling_process(H, Other) || H <- [S, There]],
    ok = macula_quic:close_connection(C, 9, <<"bye">>),
    ?EXPECT({quic, closed, C, normal}),
    ?EXPECT({quic, stream_closed, Here, #{is_conn_shutdown := true}}),
    Got = macula_test_nodes:wait_until(fun() ->
        case ask(Other, fun(_) -> process_info(self(), messages) end) of
            {messages, [_, _] = Two} -> {value, Two};
            Else -> Else
        end
    end),
    ?assertMatch([{quic, shutdown, S, {application_close, 9, <<"bye">>}},
                  {quic, stream_closed, There, #{is_conn_shutdown := true}}],
                 lists:sort(Got)),
    ?NOTHING({quic, _, _, _}).
