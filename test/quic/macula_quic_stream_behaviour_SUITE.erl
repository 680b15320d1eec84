%% The behaviour for a process per stream: how it comes by its stream, its callbacks, and its end.
-module(macula_quic_stream_behaviour_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([a_stream_is_opened/1, one_that_cannot_be_opened_is_said_so/1, the_next_stream_is_taken/1,
         a_stream_is_given_with_what_waits/1, one_that_is_refused_stays_with_its_owner/1,
         only_the_owner_gives/1, a_giver_that_dies_leaves_nothing/1, the_peers_end_is_told/1,
         the_peers_aborts_are_told/1, what_has_arrived_is_told/1, what_will_not_arrive_is_told/1,
         credit_is_renewed_or_asked_for/1, a_lost_connection_is_told/1,
         whatever_a_callback_returns_counts/1, what_a_starting_callback_throws_counts_as_returned/1,
         what_no_starting_callback_may_return_is_named/1,
         the_end_of_the_process_is_that_of_the_stream/1, the_peer_sees_why_init_has_refused/1,
         what_was_sent_outlives_the_process/1, missing_callbacks_have_defaults/1,
         what_must_be_there_is_checked_at_the_start/1, wrong_options_are_refused/1,
         options_of_the_stream_count/1,
         senders_wait_and_the_process_does_not/1,
         nothing_is_sent_once_the_time_is_over/1, events_of_later_are_passed_on/1,
         another_version_of_a_module_changes_its_state/1, handoff_under_load/1,
         a_process_has_a_larger_heap_once_its_stream_is_busy/1]).

-import(macula_quic_lab, [pair/0, pair/2]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%%--------------------------------------------------------------------------------------------
%% How a process comes by its stream

a_stream_is_opened(_Config) ->
    #{client := C, server := S} = pair(),
    {ok, Pid} = opened(C, [init, start_completed, handle_stream_data], #{own => key}),
    [#{conn := C, stream := Stream, is_local := true, is_unidir := false, is_owner := true,
       stream_opts := #{own := key}}] = called(init, Pid),
    ?assertEqual([Stream, #{status => success, stream_id => 0, is_peer_accepted => true}],
                 called(start_completed, Pid)),
    ?assertEqual(Stream, macula_quic_stream:get_handle(Pid)),
    ?assertEqual(ok, macula_quic_stream:send(Pid, ["he", <<"llo">>])),
    {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
    ?assertEqual({ok, <<"hello">>}, macula_quic:recv(There, 5, 5000)),
    ok = macula_quic:send(There, <<"answer">>),
    ?assertMatch([Stream, <<"answer">>, #{absolute_offset := 0, len := 6}], called(handle_stream_data, Pid)),
    ok = gen_server:stop(Pid),
    %% One way, without anybody for data.
    {ok, Uni} = opened(C, [init], #{direction => unidirectional}),
    [#{is_unidir := true}] = called(init, Uni),
    ?assertEqual(ok, macula_quic_stream:send(Uni, <<"one way">>, 4)),
    {ok, UniThere} = macula_quic:accept_stream(S, #{}, 5000),
    ?assertEqual(<<"one way">>, macula_quic_lab:read_to_end(UniThere)).

one_that_cannot_be_opened_is_said_so(_Config) ->
    #{client := C} = pair(#{peer_bidi_stream_count => 0}, #{}),
    process_flag(trap_exit, true),
    ?assertEqual({error, timeout}, opened(C, [init, handle_stream_data], #{timeout => 0})),
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ?assertEqual({error, closed}, opened(C, [init, handle_stream_data], #{})),
    ?assertEqual({error, badarg}, opened(make_ref(), [init, handle_stream_data], #{})),
    process_flag(trap_exit, false).

the_next_stream_is_taken(_Config) ->
    #{client := C, server := S} = pair(),
    {ok, Pid} = taken(S, [new_stream, handle_stream_data], #{own => key}),
    {ok, Other} = taken(S, [new_stream, handle_stream_data], #{}),
    ?assertEqual(undefined, macula_quic_stream:get_handle(Pid)),
    ?assertEqual({error, closed}, macula_quic_stream:send(Pid, <<"too early">>)),
    {ok, Stream} = macula_quic:open_stream(C),
    %% A stream that nobody holds is finished.
    _ = put({?MODULE, Stream}, kept),
    ok = macula_quic:send(Stream, <<"data">>),
    [There, #{conn := S, stream_id := 0, direction := bidirectional, own := key}, S] = called(new_stream, Pid),
    ?assertMatch([There, <<"data">>, _], called(handle_stream_data, Pid)),
    ?assertEqual(There, macula_quic_stream:get_handle(Pid)),
    %% One that refuses aborts.
    {ok, Refuses} = taken(S, [new_stream, handle_stream_data], #{script => fun
                              (new_stream, _, _) -> {error, {55, <<>>}};
                              (_, _, _) -> default
                          end}),
    unlink(Refuses),
    {ok, Second} = macula_quic:open_stream(C),
    ok = macula_quic:send(Second, <<"x">>),
    _ = called(new_stream, Other),
    {ok, Third} = macula_quic:open_stream(C),
    ok = macula_quic:send(Third, <<"x">>),
    ?EXPECT({quic, peer_receive_aborted, Third, 55}),
    %% One that waits ends with its connection, and without it when it is stopped.
    {ok, Waits} = taken(S, [new_stream, handle_stream_data, terminate], #{}),
    ok = gen_server:stop(Waits),
    {ok, Last} = taken(S, [new_stream, handle_stream_data], #{}),
    unlink(Last),
    Ref = monitor(process, Last),
    [unlink(P) || P <- [Pid, Other]],
    ok = macula_quic:close(C),
    ?EXPECT({'DOWN', Ref, process, Last, {shutdown, closed}}),
    ?NOTHING({terminate, Waits, _}).

%% Messages of an active stream that wait with the giver go first; the process knows what the giver has read.
a_stream_is_given_with_what_waits(_Config) ->
    #{client := C, server := S} = pair(),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    {ok, Stream} = macula_quic:open_stream(C),
    ok = macula_quic:send(Stream, <<"first">>),
    {There, Props} = ?EXPECT({quic, new_stream, T, P}, {T, P}),
    macula_quic_lab:await_mailbox(fun(Messages) -> [] =/= [1 || {quic, <<"first">>, _, _} <- Messages] end),
    {ok, Pid} = given(There, S, [init_handoff, post_handoff, handle_stream_data], #{own => key, active => true},
                      Props#{post_info => <<"known">>}),
    [There, #{own := key}, S, #{stream_id := 0, post_info := <<"known">>}] = called(init_handoff, Pid),
    ?assertEqual([There, <<"known">>], called(post_handoff, Pid)),
    ?assertMatch([There, <<"first">>, _], called(handle_stream_data, Pid)),
    ok = macula_quic:send(Stream, <<"second">>),
    ?assertMatch([There, <<"second">>, _], called(handle_stream_data, Pid)),
    ?NOTHING({quic, _, There, _}).

one_that_is_refused_stays_with_its_owner(_Config) ->
    {Stream, There, S, Props} = announced(),
    process_flag(trap_exit, true),
    ?assertEqual({error, no}, given(There, S, [init_handoff, handle_stream_data],
                                    #{script => fun(init_handoff, _, _) -> {error, no}; (_, _, _) -> default end},
                                    Props)),
    ?assertMatch({error, {bad_callback, _, {missing, [{init_handoff, 4}]}}},
                 given(There, S, [handle_stream_data], #{}, Props)),
    process_flag(trap_exit, false),
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 1, 5000)),
    ok = macula_quic:close_stream(Stream).

only_the_owner_gives(_Config) ->
    {Stream, There, S, Props} = announced(),
    Result = macula_quic_lab:in_process(fun() ->
        process_flag(trap_exit, true),
        given(There, S, [init_handoff, handle_stream_data, terminate], #{}, Props)
    end),
    ?assertEqual({error, not_owner}, Result),
    %% It never had the stream, which is untouched.
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 1, 5000)),
    ok = macula_quic:send(There, <<"y">>),
    ?assertEqual({ok, <<"y">>}, macula_quic:recv(Stream, 1, 5000)).

%% Between its process's start and the stream's change of hands.
a_giver_that_dies_leaves_nothing(_Config) ->
    {_Stream, There, S, Props} = announced(),
    Self = self(),
    Giver = spawn(fun() ->
        Opts = #{tell => Self, script => fun
                     (init_handoff, _, _) -> exit(whereis(giver_under_test), kill), default;
                     (_, _, _) -> default
                 end},
        true = register(giver_under_test, self()),
        macula_quic_stream:start(module([init_handoff, handle_stream_data]), There, S, Opts, Props)
    end),
    {Pid, _} = called(init_handoff),
    ok = macula_test_nodes:wait_until(fun() ->
        not is_process_alive(Giver) andalso not is_process_alive(Pid)
    end),
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 1, 5000)).

%%--------------------------------------------------------------------------------------------
%% What happens to it

the_peers_end_is_told(_Config) ->
    {Stream, There, Pid} = in_hands([handle_stream_data, peer_send_shutdown, stream_closed], #{}),
    ok = macula_quic:send(Stream, <<"last">>, #{fin => true}),
    ?assertMatch([There, <<"last">>, _], called(handle_stream_data, Pid)),
    ?assertEqual([There, undefined], called(peer_send_shutdown, Pid)),
    ?NOTHING({stream_closed, Pid, _}),
    ok = macula_quic_stream:send(Pid, <<"mine">>, #{fin => true}),
    ?assertEqual(<<"mine">>, macula_quic_lab:read_to_end(Stream)),
    ?assertMatch([There, #{reason := normal, is_conn_shutdown := false}], called(stream_closed, Pid)).

the_peers_aborts_are_told(_Config) ->
    {Stream, There, Pid} = in_hands([handle_stream_data, peer_send_aborted, peer_receive_aborted,
                                     send_shutdown_complete, stream_closed], #{}),
    ok = macula_quic:async_shutdown_stream(Stream, abort_receive, 11),
    ?assertEqual([There, 11], called(peer_receive_aborted, Pid)),
    ?assertEqual({error, {stopped, 11}}, macula_quic_stream:send(Pid, <<"x">>)),
    ok = macula_quic:async_shutdown_stream(Stream, abort_send, 12),
    ?assertEqual([There, 12], called(peer_send_aborted, Pid)),
    ?assertEqual([There, false], called(send_shutdown_complete, Pid)),
    _ = called(stream_closed, Pid).

what_has_arrived_is_told(_Config) ->
    {Stream, There, Pid} = in_hands([handle_stream_data, send_complete, send_shutdown_complete, stream_closed], #{}),
    ok = macula_quic_stream:send(Pid, <<"one">>),
    ?assertEqual([There, false], called(send_complete, Pid)),
    ok = macula_quic_stream:send(Pid, <<"two">>, [fin]),
    ?assertEqual([There, false], called(send_complete, Pid)),
    ?assertEqual([There, true], called(send_shutdown_complete, Pid)),
    ?assertEqual(<<"onetwo">>, macula_quic_lab:read_to_end(Stream)),
    ok = macula_quic:close_stream(Stream),
    _ = called(stream_closed, Pid),
    ?NOTHING({send_complete, Pid, _}),
    ?NOTHING({send_shutdown_complete, Pid, _}),
    %% Many at once are told once or several times, and the last one is among them.
    {_Other, OtherThere, OtherPid} = in_hands([handle_stream_data, send_complete, send_shutdown_complete], #{}),
    [ok = macula_quic_stream:send(OtherPid, <<N>>) || N <- lists:seq(1, 100)],
    ok = macula_quic_stream:send(OtherPid, <<>>, 4),
    ?assertEqual([OtherThere, true], called(send_shutdown_complete, OtherPid)),
    Told = length([1 || {send_complete, P, [_, false]} <- all_messages(), P =:= OtherPid]),
    ?assert(Told >= 1 andalso Told =< 101).

what_will_not_arrive_is_told(_Config) ->
    #{server := S} = Pair = pair(#{}, #{stream_recv_window => 1024}),
    {Stream, There, Pid} = in_hands(Pair, [handle_stream_data, send_complete, send_shutdown_complete,
                                           stream_closed, peer_receive_aborted], #{}),
    ok = macula_quic_stream:send(Pid, binary:copy(<<0>>, 100000), 4),
    ok = macula_quic:async_shutdown_stream(Stream, abort, 3),
    ?assertEqual([There, true], called(send_complete, Pid)),
    ?assertEqual([There, false], called(send_shutdown_complete, Pid)),
    _ = called(stream_closed, Pid),
    ?assertMatch({ok, _}, macula_quic:info(S)).

credit_is_renewed_or_asked_for(_Config) ->
    %% Without passive/3: more messages than `active' are delivered.
    {Stream, There, Pid} = in_hands([handle_stream_data], #{active => 2}),
    [begin
         ok = macula_quic:send(Stream, <<N>>),
         ?assertMatch([There, <<N>>, _], called(handle_stream_data, Pid))
     end || N <- lists:seq(1, 20)],
    %% With it, none until it asks.
    {Other, OtherThere, OtherPid} = in_hands([handle_stream_data, passive, handle_call], #{active => 1}),
    ok = macula_quic:send(Other, <<"a">>),
    ?assertMatch([OtherThere, <<"a">>, _], called(handle_stream_data, OtherPid)),
    ?assertEqual([OtherThere, undefined], called(passive, OtherPid)),
    ok = macula_quic:send(Other, <<"b">>),
    ?assertMatch({ok, #{active := false}}, macula_quic:info(OtherThere)),
    ok = macula_quic:setopt(OtherThere, active, 1),
    ?assertMatch([OtherThere, <<"b">>, _], called(handle_stream_data, OtherPid)),
    %% None at all, where somebody reads.
    {Third, ThirdThere, ThirdPid} = in_hands([], #{active => false}),
    ok = macula_quic:send(Third, <<"c">>),
    ?assertEqual({ok, <<"c">>}, macula_quic:recv(ThirdThere, 1, 5000)),
    ok = gen_server:stop(ThirdPid).

a_lost_connection_is_told(_Config) ->
    #{client := C} = Pair = pair(),
    {_Stream, There, Pid} = in_hands(Pair, [handle_stream_data, send_shutdown_complete, stream_closed], #{}),
    {_, _, Default} = in_hands(Pair, [handle_stream_data], #{}),
    unlink(Default),
    Ref = monitor(process, Default),
    ok = macula_quic:close_connection(C, 66, <<"bye">>),
    ?assertEqual([There, false], called(send_shutdown_complete, Pid)),
    Reason = {application_close, 66, <<"bye">>},
    ?assertMatch([There, #{is_conn_shutdown := true, reason := Reason}], called(stream_closed, Pid)),
    ?EXPECT({'DOWN', Ref, process, Default, {shutdown, Reason}}).

%% What QUIC does not say today is passed on in the same way.
events_of_later_are_passed_on(_Config) ->
    {_Stream, There, Pid} = in_hands([handle_stream_data, peer_accepted, handle_info], #{}),
    Pid ! {quic, peer_accepted, There, undefined},
    ?assertEqual([There, undefined], called(peer_accepted, Pid)),
    [begin
         Pid ! Message,
         ?assertEqual([Message], called(handle_info, Pid))
     end || Message <- [hello, {quic, unheard_of, There, 1}, {quic, <<"of another">>, make_ref(), #{}}]].

%%--------------------------------------------------------------------------------------------
%% What callbacks return

whatever_a_callback_returns_counts(_Config) ->
    Script = fun
        (handle_call, [{do, Return}, _], S) -> Return(S);
        (handle_cast, [{do, Return}], S) -> Return(S);
        (_, _, _) -> default
    end,
    {_, _, Pid} = in_hands([handle_stream_data, handle_call, handle_cast, handle_info, handle_continue],
                           #{script => Script}),
    Call = fun(Return) -> gen_server:call(Pid, {do, Return}) end,
    ?assertEqual(1, Call(fun(S) -> {reply, 1, S} end)),
    ?assertEqual(2, Call(fun(S) -> {reply, 2, S, {continue, a}} end)),
    ?assertEqual([a], called(handle_continue, Pid)),
    ?assertEqual(3, Call(fun(S) -> {reply, 3, S, 10} end)),
    ?assertEqual([timeout], called(handle_info, Pid)),
    [gen_server:cast(Pid, {do, Return}) || Return <- [fun(S) -> {ok, S} end, fun(S) -> {noreply, S} end,
                                                      fun(S) -> {{continue, b}, S} end]],
    ?assertEqual([b], called(handle_continue, Pid)),
    gen_server:cast(Pid, {do, fun(S) -> {10, S} end}),
    ?assertEqual([timeout], called(handle_info, Pid)),
    gen_server:cast(Pid, {do, fun(S) -> {hibernate, S} end}),
    ok = macula_test_nodes:wait_until(fun() ->
        {current_function, {erlang, hibernate, 3}} =:= process_info(Pid, current_function)
    end),
    ?assertEqual(4, Call(fun(S) -> {reply, 4, S, hibernate} end)).

what_a_starting_callback_throws_counts_as_returned(_Config) ->
    #{client := C, server := S} = Pair = pair(),
    Throws = fun(Starting, Return) ->
        #{script => fun(Name, _, State) when Name =:= Starting -> throw(Return(State)); (_, _, _) -> default end}
    end,
    Ok = fun(State) -> {ok, State} end,
    {ok, Opened} = opened(C, [handle_stream_data, handle_call], Throws(init, Ok)),
    {ok, Taken} = taken(S, [new_stream, handle_stream_data, handle_call], Throws(new_stream, Ok)),
    ok = macula_quic_stream:send(Opened, <<"x">>),
    _ = called(new_stream, Taken),
    {_, There, Given} = in_hands(Pair, [handle_stream_data, handle_call], Throws(init_handoff, Ok)),
    ?assertEqual(There, macula_quic_stream:get_handle(Given)),
    [?assertMatch(#{tell := _}, gen_server:call(Pid, hello)) || Pid <- [Opened, Taken, Given]],
    process_flag(trap_exit, true),
    No = fun(State) -> {error, no, State} end,
    ?assertEqual({error, no}, opened(C, [handle_stream_data], Throws(init, No))),
    {_, Refused, _, Props} = announced(Pair),
    ?assertEqual({error, no}, given(Refused, S, [init_handoff, handle_stream_data], Throws(init_handoff, No), Props)),
    process_flag(trap_exit, false).

what_no_starting_callback_may_return_is_named(_Config) ->
    #{client := C} = Pair = pair(),
    Returns = fun(Starting, Return) ->
        #{script => fun(Name, _, _) when Name =:= Starting -> Return; (_, _, _) -> default end}
    end,
    {_, There, S, Props} = announced(Pair),
    process_flag(trap_exit, true),
    quietly(fun() ->
        [begin
             Named = {error, {bad_return_value, Return}},
             ?assertEqual(Named, opened(C, [handle_stream_data], Returns(init, Return))),
             ?assertEqual(Named, given(There, S, [init_handoff, handle_stream_data],
                                       Returns(init_handoff, Return), Props))
         end || Return <- [what, {ok, mine, hibernate}, {ok, mine, 1 bsl 40}, {reply, 1, mine}]]
    end),
    process_flag(trap_exit, false).

the_end_of_the_process_is_that_of_the_stream(_Config) ->
    #{client := C} = Pair = pair(),
    Script = fun
        (handle_call, [{do, Return}, _], S) -> Return(S);
        (_, _, _) -> default
    end,
    quietly(fun() ->
        [begin
             {Stream, _, Pid} = in_hands(Pair, [handle_stream_data, handle_call, terminate], #{script => Script}),
             unlink(Pid),
             Ref = monitor(process, Pid),
             _ = gen_server:send_request(Pid, {do, Return}),
             ?EXPECT({'DOWN', Ref, process, Pid, _}),
             _ = called(terminate, Pid),
             case Code of
                 none -> ?assertEqual({error, closed}, macula_quic:recv(Stream, 0, 5000));
                 _ -> ?assertEqual({error, {reset, Code}}, macula_quic:recv(Stream, 0, 5000))
             end
         end || {Return, Code} <- [{fun(S) -> {stop, normal, S} end, none},
                                   {fun(S) -> {stop, shutdown, S} end, none},
                                   {fun(S) -> {stop, {shutdown, {9, <<>>}}, S} end, 9},
                                   {fun(S) -> {error, {8, <<>>}, S} end, 8},
                                   {fun(S) -> {error, why, S} end, 1},
                                   {fun(S) -> {stop, crash, S} end, 1},
                                   {fun(_) -> error(deliberate) end, 1},
                                   {fun(_) -> nonsense end, 1}]]
    end),
    ?assertMatch({ok, _}, macula_quic:info(C)).

%% The stream is open before the module's `init/1' says that it is not wanted.
the_peer_sees_why_init_has_refused(_Config) ->
    #{client := C, server := S} = pair(),
    process_flag(trap_exit, true),
    quietly(fun() ->
        [begin
             %% The peer learns of the stream at once.
             {error, _} = opened(C, [handle_stream_data], #{start_flag => 1, script => fun
                                     (init, _, State) -> Return(State);
                                     (_, _, _) -> default
                                 end}),
             {ok, There} = macula_quic:accept_stream(S, #{active => true}, 5000),
             case Code of
                 none ->
                     ?EXPECT({quic, peer_send_shutdown, There, _});
                 _ ->
                     ?EXPECT({quic, peer_send_aborted, There, Code}),
                     ?EXPECT({quic, peer_receive_aborted, There, Code})
             end
         end || {Return, Code} <- [{fun(State) -> {error, {7, <<"no">>}, State} end, 7},
                                   {fun(_) -> {error, 8} end, 8},
                                   {fun(State) -> {error, why, State} end, 1},
                                   {fun(_) -> {stop, {shutdown, {9, <<>>}}} end, 9},
                                   {fun(_) -> {stop, why} end, 1},
                                   {fun(_) -> {stop, normal} end, none},
                                   {fun(_) -> nonsense end, 1},
                                   {fun(State) -> throw({error, {10, <<>>}, State}) end, 10},
                                   {fun(_) -> error(deliberate) end, 1},
                                   {fun(_) -> exit(deliberate) end, 1}]]
    end),
    process_flag(trap_exit, false).

%% All of it, and its end.
what_was_sent_outlives_the_process(_Config) ->
    {Stream, _, Pid} = in_hands([handle_stream_data], #{}),
    unlink(Pid),
    Data = crypto:strong_rand_bytes(500000),
    ok = macula_quic_stream:send(Pid, Data),
    ok = gen_server:stop(Pid),
    ?assertEqual(crypto:hash(sha256, Data), crypto:hash(sha256, macula_quic_lab:read_to_end(Stream))),
    ?assertEqual({error, closed}, macula_quic_stream:send(Pid, <<"x">>)),
    ?assertEqual(undefined, macula_quic_stream:get_handle(Pid)).

missing_callbacks_have_defaults(_Config) ->
    {Stream, There, Pid} = in_hands([handle_stream_data], #{}),
    unlink(Pid),
    Ref = monitor(process, Pid),
    ?assertEqual({error, unknown_call}, gen_server:call(Pid, hello)),
    quietly(fun() ->
        Pid ! hello,
        gen_server:cast(Pid, hello),
        ?assertEqual(There, macula_quic_stream:get_handle(Pid))
    end),
    ok = macula_quic:async_shutdown_stream(Stream, abort, 1),
    ok = macula_quic:close_stream(There),
    ?EXPECT({'DOWN', Ref, process, Pid, normal}),
    %% A stream that is opened has a state, whatever the module makes of it.
    #{client := C} = pair(),
    {ok, Local} = macula_quic_stream:start_link(macula_quic_script:module([{handle_stream_data, 4}]), C,
                                                #{is_local => true}),
    ?assertMatch(#{callback_state := #{conn := C, is_local := true, is_unidir := false, is_owner := true}},
                 sys:get_state(Local)),
    ok = gen_server:stop(Local).

what_must_be_there_is_checked_at_the_start(_Config) ->
    #{client := C} = pair(),
    process_flag(trap_exit, true),
    Missing = fun(Result) -> {error, {bad_callback, _, {missing, What}}} = Result, What end,
    ?assertEqual([{handle_stream_data, 4}], Missing(opened(C, [init], #{}))),
    ?assertEqual([{new_stream, 3}], Missing(taken(C, [handle_stream_data], #{}))),
    ?assertEqual([{new_stream, 3}, {handle_stream_data, 4}], Missing(taken(C, [], #{}))),
    ?assertMatch({error, {bad_callback, no_such_module, _}},
                 macula_quic_stream:start(no_such_module, C, #{is_local => true})),
    process_flag(trap_exit, false).

%% Those of the stream are set on it, by whatever way it came, and others have to do with the way.
options_of_the_stream_count(_Config) ->
    Small = #{stream_recv_window => 1024},
    #{client := C, server := S} = Pair = pair(Small, Small),
    Full = fun(Pid, Stream) ->
        ok = macula_quic_stream:send(Pid, binary:copy(<<0>>, 5000)),
        ?assertEqual({error, timeout}, macula_quic_stream:send(Pid, <<"more">>, #{timeout => 20})),
        ?assertMatch({ok, _}, macula_quic:info(Stream))
    end,
    {Stream, _, Given} = in_hands(Pair, [handle_stream_data], #{high_watermark => 100, priority => 1}),
    Full(Given, Stream),
    {ok, Opened} = opened(C, [handle_stream_data], #{high_watermark => 100}),
    ok = macula_quic_stream:send(Opened, <<"x">>),
    {ok, There} = ?EXPECT({quic, new_stream, T, _}, {ok, T}),
    Full(Opened, There),
    process_flag(trap_exit, true),
    ?assertMatch({error, {unsupported_option, start_flag}},
                 taken(S, [new_stream, handle_stream_data], #{start_flag => 1})),
    ?assertMatch({error, {bad_option, priority, _}}, opened(C, [handle_stream_data], #{priority => high})),
    process_flag(trap_exit, false).

wrong_options_are_refused(_Config) ->
    #{client := C} = pair(),
    process_flag(trap_exit, true),
    ?assertMatch({error, {bad_option, active, _}}, opened(C, [handle_stream_data], #{active => never})),
    ?assertMatch({error, {bad_option, direction, _}}, opened(C, [handle_stream_data], #{direction => up})),
    ?assertMatch({error, {bad_option, is_local, _}}, opened(C, [handle_stream_data], #{is_local => perhaps})),
    ?assertMatch({error, {bad_option, options, _}}, macula_quic_stream:start(?MODULE, C, text)),
    process_flag(trap_exit, false),
    {_, _, Pid} = in_hands([handle_stream_data], #{}),
    [?assertMatch({error, {bad_option, _, _}}, macula_quic_stream:send(Pid, <<>>, Flag))
     || Flag <- [32, -1, fin, #{what => 1}]],
    [?assertEqual(ok, macula_quic_stream:send(Pid, <<"x">>, Flag)) || Flag <- [0, 1, 2, 8, 16, 4096]].

%%--------------------------------------------------------------------------------------------
%% Load

senders_wait_and_the_process_does_not(_Config) ->
    Pair = pair(#{high_watermark => 1000}, #{stream_recv_window => 1024}),
    {Stream, There, Pid} = in_hands(Pair, [handle_stream_data], #{}),
    Sender = spawn_link(fun() -> ok = macula_quic_stream:send(Pid, binary:copy(<<1>>, 200000)),
                                 ok = macula_quic_stream:send(Pid, binary:copy(<<2>>, 1000)) end),
    Ref = monitor(process, Sender),
    ok = macula_test_nodes:wait_until(fun() ->
        {status, waiting} =:= process_info(Sender, status)
            andalso {ok, #{send_pend => 0}} =/= macula_quic:info(There)
    end),
    ?assertEqual(There, macula_quic_stream:get_handle(Pid)),
    ok = macula_quic_lab:read(Stream, 201000),
    ?EXPECT({'DOWN', Ref, process, Sender, normal}).

%% The process is in a callback, or stands still: the caller waits as long as it has said, and no answer comes later.
nothing_is_sent_once_the_time_is_over(_Config) ->
    {Stream, There, Pid} = in_hands([handle_stream_data], #{script => fun
        (handle_stream_data, _, S) -> receive go -> {ok, S} end;
        (_, _, _) -> default
    end}),
    ok = macula_quic:send(Stream, <<"x">>),
    _ = called(handle_stream_data, Pid),
    Caller = self(),
    Late = fun(Timeout) ->
        %% Of a test that would wait for ever.
        Helper = spawn_link(fun() ->
            Sent = macula_quic_stream:send(Pid, <<"late">>, #{timeout => Timeout}),
            Caller ! {sent, self(), Sent},
            receive look -> Caller ! {mailbox, self(), all_messages()} end
        end),
        ?assertEqual({error, timeout}, ?EXPECT({sent, Helper, Sent}, Sent)),
        Helper
    end,
    Helpers = [Late(Timeout) || Timeout <- [0, 1, 50]],
    Pid ! go,
    %% By now it has answered all of them.
    ?assertEqual(There, macula_quic_stream:get_handle(Pid)),
    ?assertEqual([[], [], []], [begin Helper ! look, ?EXPECT({mailbox, Helper, Mail}, Mail) end || Helper <- Helpers]),
    ?assertEqual(ok, macula_quic_stream:send(Pid, <<"in time">>, #{timeout => 5000, fin => true})),
    ?assertEqual(<<"in time">>, macula_quic_lab:read_to_end(Stream)),
    ?assertExit({calling_self, _}, macula_quic_stream:send(self(), <<"x">>, #{timeout => 50})),
    ok = gen_server:stop(Pid),
    ?assertEqual({error, closed}, macula_quic_stream:send(Pid, <<"x">>, #{timeout => 5000})).

another_version_of_a_module_changes_its_state(_Config) ->
    #{client := C} = pair(),
    Script = fun (code_change, [V, Extra], S) -> {ok, S#{changed => {V, Extra}}};
                 (_, _, _) -> default
             end,
    Changed = fun(Pid) ->
        ok = sys:suspend(Pid),
        ok = sys:change_code(Pid, any, old, extra),
        ok = sys:resume(Pid),
        #{callback_state := State} = sys:get_state(Pid),
        State
    end,
    Init = fun (init, [Args], Opts) -> {ok, maps:merge(Opts, maps:remove(stream_opts, Args))};
               (Name, Args, S) -> Script(Name, Args, S)
           end,
    {ok, Open} = opened(C, [handle_stream_data, code_change], #{script => Init}),
    ?assertMatch(#{changed := {old, extra}}, Changed(Open)),
    {ok, Without} = opened(C, [handle_stream_data], #{script => Init}),
    State = Changed(Without),
    ?assertNot(is_map_key(changed, State)),
    %% One that waits for its stream has no state that could change.
    {ok, Waits} = taken(C, [new_stream, handle_stream_data, code_change], #{script => Script}),
    ?assertEqual(undefined, Changed(Waits)),
    [ok = gen_server:stop(Pid) || Pid <- [Open, Without, Waits]].

%% Streams that are given away while they are in full flow: every byte arrives once and in order.
a_process_has_a_larger_heap_once_its_stream_is_busy(_Config) ->
    #{client := C, server := S} = pair(),
    MinHeap = fun(Pid) ->
        {_, Settings} = process_info(Pid, garbage_collection),
        proplists:get_value(min_heap_size, Settings)
    end,
    Hears = fun(Options) ->
        {ok, Pid} = opened(C, [init, start_completed, handle_stream_data], Options),
        _ = called(start_completed, Pid),
        ok = macula_quic_stream:send(Pid, <<"x">>),
        {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
        Hear = fun(Bytes) ->
            ok = macula_quic:send(There, binary:copy(<<"x">>, Bytes)),
            hear(Pid, Bytes),
            %% It is through with that.
            _ = macula_quic_stream:get_handle(Pid),
            MinHeap(Pid)
        end,
        {MinHeap(Pid), Hear(3000), Hear(2000), Hear(2000)}
    end,
    {New, New, Busy, Busy} = Hears(#{}),
    ?assert(Busy > 2 * New),
    %% Whoever wants more has it.
    {Large, Large, Large, Large} = Hears(#{script => fun
        (init, _, _) -> _ = process_flag(min_heap_size, 100000), true = erlang:garbage_collect(), default;
        (_, _, _) -> default
    end}),
    ?assert(Large >= 100000).

hear(_Pid, 0) -> ok;
hear(Pid, Left) ->
    [_, Data, _] = called(handle_stream_data, Pid),
    hear(Pid, Left - byte_size(Data)).

handoff_under_load(_Config) ->
    #{client := C, server := S} = pair(#{peer_bidi_stream_count => 1000}, #{}),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    Self = self(),
    N = macula_quic_lab:times(200),
    Sender = spawn_link(fun() ->
        Hashes = [begin
            {ok, Stream} = macula_quic:open_stream(C),
            Data = crypto:strong_rand_bytes(100000),
            [ok = macula_quic:send(Stream, Part) || <<Part:1000/binary>> <= Data],
            ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
            {ok, #{stream_id := Id}} = macula_quic:info(Stream),
            {Stream, {Id, crypto:hash(sha256, Data)}}
        end || _ <- lists:seq(1, N)],
        Self ! {hashes, maps:from_list([Hash || {_, Hash} <- Hashes])},
        receive done -> [macula_quic:close_stream(Stream) || {Stream, _} <- Hashes] end
    end),
    Module = macula_quic_script:module([{init_handoff, 4}, {handle_stream_data, 4}, {peer_send_shutdown, 3}]),
    Nobody = spawn_link(fun Nobody() -> receive _ -> Nobody() end end),
    Script = fun
        (init_handoff, [_, Opts, _, #{stream_id := Id}], _) ->
            {ok, Opts#{hash => crypto:hash_init(sha256), id => Id, at => 0}};
        (handle_stream_data, [_, Data, #{absolute_offset := At}], #{hash := Hash, at := At} = State) ->
            {ok, State#{hash := crypto:hash_update(Hash, Data), at := At + byte_size(Data)}};
        (peer_send_shutdown, _, #{hash := Hash, id := Id} = State) ->
            Self ! {whole, Id, crypto:hash_final(Hash)},
            {stop, normal, State};
        (_, _, _) -> default
    end,
    [begin
         {There, Props} = ?EXPECT({quic, new_stream, T, P}, {T, P}, 30000),
         {ok, Pid} = macula_quic_stream:start_link(Module, There, S, #{tell => Nobody, script => Script, active => 5},
                                                   Props),
         unlink(Pid)
     end || _ <- lists:seq(1, N)],
    Hashes = ?EXPECT({hashes, H}, H, 60000),
    [begin
         Hash = ?EXPECT({whole, Id, H}, H, 60000),
         ?assertEqual({Id, maps:get(Id, Hashes)}, {Id, Hash})
     end || Id <- maps:keys(Hashes)],
    ?assertEqual(N, map_size(Hashes)),
    Sender ! done,
    unlink(Nobody),
    exit(Nobody, kill).

%%--------------------------------------------------------------------------------------------
%% Helpers

module(Callbacks) ->
    macula_quic_script:module([{Callback, arity(Callback)} || Callback <- Callbacks]).

arity(init) -> 1;
arity(Four) when Four =:= init_handoff; Four =:= handle_stream_data -> 4;
arity(Two) when Two =:= handle_cast; Two =:= handle_info; Two =:= handle_continue; Two =:= terminate -> 2;
arity(_) -> 3.

options(Opts) ->
    maps:merge(#{tell => self(), script => fun(_, _, _) -> default end}, Opts).

opened(Conn, Callbacks, Opts) ->
    macula_quic_stream:start_link(module(lists:usort([init | Callbacks])), Conn,
                                  options(maps:merge(#{is_local => true}, Opts))).

taken(Conn, Callbacks, Opts) ->
    macula_quic_stream:start_link(module(Callbacks), Conn, options(Opts)).

given(Stream, Conn, Callbacks, Opts, Props) ->
    macula_quic_stream:start_link(module(Callbacks), Stream, Conn, options(Opts), Props).

%% A stream of a new pair that the server has been told of.
announced() ->
    announced(pair()).

announced(#{client := C, server := S}) ->
    ok = macula_quic:async_accept_stream(S),
    {ok, Stream} = macula_quic:open_stream(C),
    ok = macula_quic:send(Stream, <<"x">>),
    {There, Props} = ?EXPECT({quic, new_stream, T, P}, {T, P}),
    [put({?MODULE, Handle}, kept) || Handle <- [Stream, There]],
    {Stream, There, S, Props}.

%% The same in the hands of a process, which has been given its first byte.
in_hands(Callbacks, Opts) ->
    in_hands(pair(), Callbacks, Opts).

in_hands(Pair, Callbacks, Opts) ->
    {Stream, There, S, Props} = announced(Pair),
    {ok, <<"x">>} = macula_quic:recv(There, 1, 5000),
    {ok, Pid} = given(There, S, [init_handoff, post_handoff | Callbacks], Opts, Props),
    _ = called(init_handoff, Pid),
    _ = called(post_handoff, Pid),
    {Stream, There, Pid}.

called(Callback) ->
    ?EXPECT({Callback, Pid, Args}, {Pid, Args}).

called(Callback, Pid) ->
    ?EXPECT({Callback, Pid, Args}, Args).

all_messages() ->
    receive Message -> [Message | all_messages()]
    after 0 -> []
    end.

%% What is provoked on purpose is not to be in the log.
quietly(Fun) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    try Fun()
    after ok = logger:set_primary_config(level, Level)
    end.
