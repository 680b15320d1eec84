%% Streams of the users' own on a link of the distribution.
-module(macula_dist_stream_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([what_is_sent_arrives_with_its_end_both_ways/1, acceptor_owns_the_stream/1,
         calls_that_fail_say_why/1, passive_stream_tells_as_much_as_is_asked_for/1,
         death_of_the_owner_resets_what_is_not_finished/1,
         stream_is_refused_when_nobody_accepts/1, acceptors_take_turns/1,
         new_owner_gets_what_waits_and_what_comes/1, reset_ends_both_ends_with_its_code/1,
         messages_carry_another_tag_on_request/1, sender_waits_for_a_receiver_that_does_not_read/1,
         waiting_sender_hears_of_the_end/1, lower_number_is_served_first/1, ten_thousand_streams_at_once/1,
         stream_and_bulk_share_the_line/1,
         peer_allows_so_many_streams/1, streams_that_wait_for_an_answer_keep_no_other_from_being_opened/1,
         as_many_silent_streams_as_allowed_can_be_opened/1, streams_can_be_opened_while_bulk_fills_the_line/1,
         stream_that_is_over_gives_its_place_to_another/1, many_may_wait_for_streams_at_once/1,
         node_without_streams_says_unsupported/1,
         all_streams_end_with_the_link_and_tell_it_once/1,
         end_of_the_link_answers_those_who_wait_for_a_stream_or_for_room/1, name_of_an_earlier_link_names_no_stream/1,
         pings_go_past_a_hundred_full_streams/1, pings_go_past_a_file/1,
         unproven_peer_opens_no_stream/1, panic_in_a_task_ends_one_stream/1,
         senders_on_many_streams_share_what_they_queue/1, streams_that_nobody_reads_hold_little/1,
         places_are_free_again_whatever_becomes_of_their_streams/1, programs_for_quic_dist_run_with_its_face/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/4, node_of/1, connect/2, eventually/1,
                           eventually/2, settled/1]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [what_is_sent_arrives_with_its_end_both_ways, acceptor_owns_the_stream, calls_that_fail_say_why,
     passive_stream_tells_as_much_as_is_asked_for, death_of_the_owner_resets_what_is_not_finished,
     stream_is_refused_when_nobody_accepts, acceptors_take_turns, new_owner_gets_what_waits_and_what_comes,
     reset_ends_both_ends_with_its_code, messages_carry_another_tag_on_request,
     sender_waits_for_a_receiver_that_does_not_read, senders_on_many_streams_share_what_they_queue,
     streams_that_nobody_reads_hold_little, places_are_free_again_whatever_becomes_of_their_streams,
     waiting_sender_hears_of_the_end,
     lower_number_is_served_first, stream_and_bulk_share_the_line, ten_thousand_streams_at_once,
     peer_allows_so_many_streams, streams_that_wait_for_an_answer_keep_no_other_from_being_opened,
     as_many_silent_streams_as_allowed_can_be_opened, streams_can_be_opened_while_bulk_fills_the_line,
     stream_that_is_over_gives_its_place_to_another, many_may_wait_for_streams_at_once,
     node_without_streams_says_unsupported, all_streams_end_with_the_link_and_tell_it_once,
     end_of_the_link_answers_those_who_wait_for_a_stream_or_for_room,
     name_of_an_earlier_link_names_no_stream, pings_go_past_a_hundred_full_streams, pings_go_past_a_file,
     unproven_peer_opens_no_stream, panic_in_a_task_ends_one_stream,
     programs_for_quic_dist_run_with_its_face].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).

init_per_testcase(Case, Config) ->
    case macula_dist_case:carrier() of
        "macula" -> macula_dist_case:case_begin(Case, Config);
        Other -> {skip, Other ++ " has no such streams"}
    end.

end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- at the nodes ---------------------------------------------------------------------------------

pair() ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    {A, B}.

%% A process at the node that does what it is told, and keeps all other messages. Its death is of no
%% importance to others.
worker(N) ->
    call(N, fun() -> spawn(fun() -> work([]) end) end).

work(Seen) ->
    receive
        {do, From, Ref, Fun} ->
            From ! {Ref, Fun()},
            work(Seen);
        {look, From, Ref, Fun} ->
            From ! {Ref, Fun(lists:reverse(Seen))},
            work(Seen);
        Other ->
            work([Other | Seen])
    end.

do(N, Pid, Fun) ->
    ask(N, Pid, fun(Ref) -> {do, self(), Ref, Fun} end).

%% What the worker has got.
seen(N, Pid) -> look(N, Pid, fun(Seen) -> Seen end).

look(N, Pid, Fun) ->
    ask(N, Pid, fun(Ref) -> {look, self(), Ref, Fun} end).

ask(N, Pid, Message) ->
    call(N, fun() ->
        Ref = monitor(process, Pid),
        Pid ! Message(Ref),
        receive
            {Ref, Answer} -> demonitor(Ref, [flush]), Answer;
            {'DOWN', Ref, process, Pid, Reason} -> error({worker_down, Reason})
        end
    end).

accept(N, Pid, From) -> accept(N, Pid, From, []).
accept(N, Pid, From, Options) ->
    ok = do(N, Pid, fun() -> macula_dist_stream:accept_streams(node_of(From), Options) end).

open(N, Pid, To) -> open(N, Pid, To, []).
open(N, Pid, To, Options) ->
    {ok, Stream} = do(N, Pid, fun() -> macula_dist_stream:open_stream(node_of(To), Options) end),
    Stream.

send(N, Pid, Stream, Data) -> send(N, Pid, Stream, Data, false).
send(N, Pid, Stream, Data, Fin) ->
    do(N, Pid, fun() -> macula_dist_stream:send(Stream, Data, Fin) end).

%% The events of a stream in their order, the data joined: `{data, Bytes, Fin}' first, if there is any.
events(N, Pid, Stream) ->
    Events = [Event || {Tag, S, Event} <- seen(N, Pid), S =:= Stream, Tag =:= element(1, S)],
    {Data, Others} = lists:partition(fun(Event) -> element(1, pair(Event)) =:= data end, Events),
    Bytes = iolist_to_binary([Bytes || {data, Bytes, _} <- Data]),
    Fin = lists:any(fun({data, _, End}) -> End end, Data),
    {Bytes, Fin, Others}.

pair(Event) when is_atom(Event) -> {Event};
pair(Event) -> Event.

await_events(N, Pid, Stream, Expected) ->
    try eventually(fun() -> events(N, Pid, Stream) =:= Expected end)
    catch error:_ -> ct:fail({expected, Expected, got, events(N, Pid, Stream)})
    end.

%% The only stream that the worker has been told of.
await_stream(N, Pid) ->
    eventually(fun() ->
        case lists:usort([Stream || {Tag, Stream, _} <- seen(N, Pid), Tag =:= element(1, Stream)]) of
            [Stream] -> {value, Stream};
            [] -> false
        end
    end).

streams(N) -> call(N, macula_dist_stream, list_streams, []).

%% No stream is left at either node, in the library either.
none_left(Nodes) ->
    lists:foreach(fun(N) ->
        ok = eventually(fun() -> streams(N) =:= [] end),
        ok = eventually(fun() ->
            Live = call(N, macula_nif, live_objects, []),
            {0, 0} =:= {proplists:get_value(stream, Live), proplists:get_value(place, Live)}
        end)
    end, Nodes).

%% -- opening, sending, the end ----------------------------------------------------------------------

what_is_sent_arrives_with_its_end_both_ways(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    Stream = {macula_dist_stream, Node, Number} = open(A, Opener, B),
    Node = node_of(B),
    [#{ref := Stream, priority := 128}] = streams(A),
    Question = crypto:strong_rand_bytes(300000),
    Answer = crypto:strong_rand_bytes(5000),
    ok = send(A, Opener, Stream, [Question, "x"]),
    Other = await_stream(B, Acceptor),
    %% The number is the same at both ends.
    Other = {macula_dist_stream, node_of(A), Number},
    await_events(B, Acceptor, Other, {<<Question/binary, "x">>, false, []}),
    ok = send(A, Opener, Stream, <<>>, true),
    await_events(B, Acceptor, Other, {<<Question/binary, "x">>, true, []}),
    {error, closed} = send(A, Opener, Stream, <<"more">>),
    ok = send(B, Acceptor, Other, Answer),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:close_stream(Other) end),
    await_events(A, Opener, Stream, {Answer, true, [closed]}),
    await_events(B, Acceptor, Other, {<<Question/binary, "x">>, true, [closed]}),
    {error, unknown_stream} = send(A, Opener, Stream, <<"more">>),
    none_left([A, B]).

acceptor_owns_the_stream(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor, Other} = {worker(A), worker(B), worker(B)},
    accept(B, Acceptor, A),
    %% Twice is once.
    accept(B, Acceptor, A),
    Stream = open(A, Opener, B, [{priority, 16}]),
    ok = send(A, Opener, Stream, <<"hello">>),
    Theirs = await_stream(B, Acceptor),
    {error, not_owner} = send(B, Other, Theirs, <<"mine">>),
    {error, not_owner} = do(B, Other, fun() -> macula_dist_stream:reset_stream(Theirs) end),
    {error, not_owner} = do(B, Other, fun() -> macula_dist_stream:controlling_process(Theirs, self()) end),
    {error, not_owner} = do(B, Other, fun() -> macula_dist_stream:setopts(Theirs, [{active, once}]) end),
    ok = send(B, Acceptor, Theirs, <<"welcome">>),
    await_events(A, Opener, Stream, {<<"welcome">>, false, []}),
    [#{ref := Stream, node := NodeB, owner := Opener, priority := 16, stream_id := Id,
       recv_fin := false, send_fin := false}] = streams(A),
    NodeB = node_of(B),
    [#{ref := Theirs, owner := Acceptor, priority := 128, stream_id := Id}] = streams(B).

calls_that_fail_say_why(_Config) ->
    {A, B} = pair(),
    Node = node_of(B),
    Open = fun(Options) -> call(A, macula_dist_stream, open_stream, [Node, Options]) end,
    {error, {bad_option, priority, {not_in, 16, 255}} = Bad} = Open([{priority, 15}]),
    "the value of the option priority must be an integer from 16 to 255" =
        macula_dist_stream:format_error(Bad),
    {error, {bad_option, priority, _}} = Open([{priority, 256}]),
    {error, {bad_option, active, not_a_mode}} = Open([{active, never}]),
    {error, {unsupported_option, colour}} = Open([{colour, red}]),
    {error, badarg} = Open(nothing),
    {error, {unsupported_option, priority}} =
        call(A, macula_dist_stream, accept_streams, [Node, [{priority, 20}]]),
    {error, not_connected} = call(A, macula_dist_stream, open_stream, ['no@127.0.0.1']),
    {error, not_connected} = call(A, macula_dist_stream, accept_streams, ['no@127.0.0.1']),
    {error, not_connected} = call(A, macula_dist_stream, get_controller, ['no@127.0.0.1']),
    ok = call(A, macula_dist_stream, stop_accepting, ['no@127.0.0.1']),
    [] = call(A, macula_dist_stream, list_streams, ['no@127.0.0.1']),
    {error, not_connected} =
        call(A, macula_dist_stream, send, [{macula_dist_stream, 'no@127.0.0.1', 4}, <<>>]),
    Unknown = {macula_dist_stream, Node, 4},
    {error, unknown_stream} = call(A, macula_dist_stream, send, [Unknown, <<>>]),
    {error, unknown_stream} = call(A, macula_dist_stream, reset_stream, [Unknown, 1]),
    {error, badarg} = call(A, macula_dist_stream, reset_stream, [Unknown, 1 bsl 62]),
    {error, badarg} = call(A, macula_dist_stream, send, [Unknown, not_data]),
    {error, badarg} = call(A, macula_dist_stream, send, [nothing, <<>>]),
    {error, badarg} = call(A, macula_dist_stream, controlling_process, [Unknown, nobody]),
    {ok, Controller} = call(A, macula_dist_stream, get_controller, [Node]),
    [{Node, Controller}] = macula_dist_case:controllers(A).

passive_stream_tells_as_much_as_is_asked_for(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    %% The first data is always told.
    accept(B, Acceptor, A, [{active, false}]),
    Stream = open(A, Opener, B),
    ok = send(A, Opener, Stream, <<"a">>),
    Theirs = await_stream(B, Acceptor),
    await_events(B, Acceptor, Theirs, {<<"a">>, false, []}),
    ok = send(A, Opener, Stream, <<"b">>),
    Set = fun(Mode) -> do(B, Acceptor, fun() -> macula_dist_stream:setopts(Theirs, [{active, Mode}]) end) end,
    ok = Set(once),
    await_events(B, Acceptor, Theirs, {<<"ab">>, false, []}),
    ok = send(A, Opener, Stream, <<"c">>),
    ok = Set(2),
    await_events(B, Acceptor, Theirs, {<<"abc">>, false, []}),
    ok = send(A, Opener, Stream, <<"d">>),
    await_events(B, Acceptor, Theirs, {<<"abcd">>, false, [passive]}),
    ok = send(A, Opener, Stream, <<"e">>, true),
    {error, einval} = Set(32767 + 1 - 1) =:= ok andalso Set(32767),
    await_events(B, Acceptor, Theirs, {<<"abcde">>, true, [passive]}),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:close_stream(Theirs) end),
    await_events(B, Acceptor, Theirs, {<<"abcde">>, true, [passive, closed]}),
    none_left([A, B]).

death_of_the_owner_resets_what_is_not_finished(_Config) ->
    {A, B} = pair(),
    Acceptor = worker(B),
    accept(B, Acceptor, A),
    lists:foreach(fun({Fin, Expected}) ->
        Opener = worker(A),
        Data = crypto:strong_rand_bytes(100000),
        Stream = {_, _, Number} = open(A, Opener, B),
        ok = send(A, Opener, Stream, Data, Fin),
        true = call(A, erlang, exit, [Opener, kill]),
        Theirs = {macula_dist_stream, node_of(A), Number},
        case Expected of
            %% What came before the reset may have been told.
            reset ->
                eventually(fun() ->
                    {_, false, Others} = events(B, Acceptor, Theirs),
                    Others =:= [{reset, 0}] orelse streams(B) =:= []
                end);
            %% And then the peer wants no answer.
            whole ->
                await_events(B, Acceptor, Theirs, {Data, true, [{reset, 0}]})
        end
    end, [{false, reset}, {true, whole}]),
    none_left([A, B]).

%% -- refusal, pools, owners, resets -----------------------------------------------------------------

stream_is_refused_when_nobody_accepts(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    Refused = open(A, Opener, B),
    ok = send(A, Opener, Refused, <<"anybody?">>),
    await_events(A, Opener, Refused, {<<>>, false, [{reset, 16#100}]}),
    accept(B, Acceptor, A),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:stop_accepting(node_of(A)) end),
    Again = open(A, Opener, B),
    ok = send(A, Opener, Again, <<"anybody?">>, true),
    await_events(A, Opener, Again, {<<>>, false, [{reset, 16#100}]}),
    [] = seen(B, Acceptor),
    %% One that is reset before there is data is nobody's.
    accept(B, Acceptor, A),
    Unheard = open(A, Opener, B),
    ok = do(A, Opener, fun() -> macula_dist_stream:reset_stream(Unheard, 5) end),
    await_events(A, Opener, Unheard, {<<>>, false, [{reset, 5}]}),
    none_left([A, B]),
    [] = seen(B, Acceptor).

acceptors_take_turns(_Config) ->
    {A, B} = pair(),
    Opener = worker(A),
    Acceptors = [worker(B) || _ <- lists:seq(1, 3)],
    lists:foreach(fun(Acceptor) -> accept(B, Acceptor, A) end, Acceptors),
    Open = fun(Times) ->
        lists:foreach(fun(N) ->
            ok = send(A, Opener, open(A, Opener, B), <<N>>, true),
            ok = eventually(fun() ->
                lists:sum([given(B, P) || P <- Acceptors, alive(B, P)]) >= N
            end)
        end, Times)
    end,
    Open(lists:seq(1, 6)),
    [2, 2, 2] = [given(B, Acceptor) || Acceptor <- Acceptors],
    [First, Second, Third] = Acceptors,
    true = call(B, erlang, exit, [First, kill]),
    ok = eventually(fun() -> not alive(B, First) end),
    Open(lists:seq(5, 8)),
    [4, 4] = [given(B, Acceptor) || Acceptor <- [Second, Third]],
    ok = do(B, Second, fun() -> macula_dist_stream:stop_accepting(node_of(A)) end),
    Open(lists:seq(9, 10)),
    [4, 6] = [given(B, Acceptor) || Acceptor <- [Second, Third]].

%% How many streams the worker was given. The end of one may be told apart from its data.
given(N, Pid) ->
    look(N, Pid, fun(Seen) -> length(lists:usort([Stream || {_, Stream, _} <- Seen])) end).

alive(N, Pid) -> call(N, erlang, is_process_alive, [Pid]).

new_owner_gets_what_waits_and_what_comes(_Config) ->
    {A, B} = pair(),
    {Opener, Next, Self} = {worker(A), worker(B), self()},
    NodeA = node_of(A),
    Total = 2000,
    %% Messages wait in the mailbox of the one that gives the stream away while more of them come.
    Acceptor = call(B, fun() ->
        Caller = self(),
        Pid = spawn(fun() ->
            ok = macula_dist_stream:accept_streams(NodeA),
            Caller ! {self(), accepts},
            receive go -> ok end,
            [Stream] = lists:usort([S || {macula_dist_stream, S, _} <-
                                             element(2, process_info(self(), messages))]),
            Result = macula_dist_stream:controlling_process(Stream, Next),
            Next ! {given, Stream, Result, process_info(self(), message_queue_len)},
            receive stop -> ok end
        end),
        receive {Pid, accepts} -> Pid end
    end),
    Stream = {_, _, Number} = open(A, Opener, B),
    spawn_link(fun() ->
        ok = do(A, Opener, fun() ->
            lists:foreach(fun(N) -> ok = macula_dist_stream:send(Stream, <<N:32>>, N =:= Total) end,
                          lists:seq(1, Total))
        end),
        Self ! sent
    end),
    ok = eventually(fun() ->
        {message_queue_len, Waiting} = call(B, erlang, process_info, [Acceptor, message_queue_len]),
        Waiting > 0
    end),
    _ = call(B, erlang, send, [Acceptor, go]),
    receive sent -> ok end,
    Theirs = {macula_dist_stream, NodeA, Number},
    All = << <<N:32>> || N <- lists:seq(1, Total) >>,
    await_events(B, Next, Theirs, {All, true, []}),
    [{given, Theirs, ok, {message_queue_len, 0}}] = [G || {given, _, _, _} = G <- seen(B, Next)],
    [#{owner := Next}] = streams(B),
    {error, noproc} = do(B, Next, fun() ->
        {Dead, Ref} = spawn_monitor(fun() -> ok end),
        receive {'DOWN', Ref, process, Dead, _} -> ok end,
        macula_dist_stream:controlling_process(Theirs, Dead)
    end),
    ok = send(B, Next, Theirs, <<"thanks">>, true),
    await_events(A, Opener, Stream, {<<"thanks">>, true, [closed]}).

reset_ends_both_ends_with_its_code(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    lists:foreach(fun({Who, Mode, Code}) ->
        Stream = {_, _, Number} = open(A, Opener, B, [{active, Mode}]),
        Theirs = {macula_dist_stream, node_of(A), Number},
        ok = send(A, Opener, Stream, <<"x">>),
        await_events(B, Acceptor, Theirs, {<<"x">>, false, []}),
        ok = case Who of
            opener -> do(A, Opener, fun() -> macula_dist_stream:reset_stream(Stream, Code) end);
            acceptor -> do(B, Acceptor, fun() -> macula_dist_stream:reset_stream(Theirs, Code) end)
        end,
        await_events(A, Opener, Stream, {<<>>, false, [{reset, Code}]}),
        await_events(B, Acceptor, Theirs, {<<"x">>, false, [{reset, Code}]}),
        {error, unknown_stream} = send(A, Opener, Stream, <<"y">>)
    end, [{opener, true, 0}, {opener, false, 7}, {acceptor, true, 1 bsl 62 - 1}, {acceptor, false, 8}]),
    none_left([A, B]).

messages_carry_another_tag_on_request(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A, [{tag, theirs}]),
    Stream = {ours, _, Number} = open(A, Opener, B, [{tag, ours}]),
    ok = send(A, Opener, Stream, <<"x">>, true),
    Theirs = {theirs, node_of(A), Number},
    await_events(B, Acceptor, Theirs, {<<"x">>, true, []}),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:close_stream(Theirs) end),
    await_events(B, Acceptor, Theirs, {<<"x">>, true, [closed]}),
    await_events(A, Opener, Stream, {<<>>, true, [closed]}).

%% -- who waits ----------------------------------------------------------------------------------------

%% Sends without end, and says how much it has sent.
pump(N, To, Options, Size) ->
    Node = node_of(To),
    {Pid, Stream, Sent} = call(N, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            Sent = atomics:new(1, []),
            {ok, Stream} = macula_dist_stream:open_stream(Node, Options),
            Keeper = spawn(fun() -> keep(Sent) end),
            Starter ! {self(), Stream, Keeper},
            pump(Stream, binary:copy(<<7>>, Size), Sent)
        end),
        receive {Pid, Stream, Keeper} -> {Pid, Stream, Keeper} end
    end),
    {Pid, Stream, fun() -> ask(N, Sent, fun(Ref) -> {get, self(), Ref} end) end}.

pump(Stream, Data, Sent) ->
    case macula_dist_stream:send(Stream, Data) of
        ok ->
            atomics:add(Sent, 1, byte_size(Data)),
            pump(Stream, Data, Sent);
        Error ->
            receive {how, From, Ref} -> From ! {Ref, Error} end
    end.

keep(Counter) ->
    receive {get, From, Ref} -> From ! {Ref, atomics:get(Counter, 1)} end,
    keep(Counter).

sender_waits_for_a_receiver_that_does_not_read(_Config) ->
    {A, B} = pair(),
    Acceptor = worker(B),
    accept(B, Acceptor, A, [{active, false}]),
    {_, {_, _, Number}, Sent} = pump(A, B, [], 10000),
    Theirs = {_, _, Number} = await_stream(B, Acceptor),
    Held = settled(Sent),
    {First, false, []} = events(B, Acceptor, Theirs),
    ct:log("~b bytes sent, ~b bytes told", [Held, byte_size(First)]),
    %% The queue, and the credit of a stream that was read once.
    true = Held =< 600000,
    true = byte_size(First) =< 16384,
    %% As it reads, more comes.
    Told = fun() ->
        look(B, Acceptor, fun(Seen) -> lists:sum([byte_size(Data) || {_, _, {data, Data, _}} <- Seen]) end)
    end,
    lists:foreach(fun(_) ->
        Before = Told(),
        ok = do(B, Acceptor, fun() -> macula_dist_stream:setopts(Theirs, [{active, once}]) end),
        ok = eventually(fun() -> Told() > Before end)
    end, lists:seq(1, 10)),
    ok = eventually(fun() -> Sent() > Held end),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:reset_stream(Theirs) end),
    none_left([A, B]).

%% Streams by the thousand that nobody reads do not hold 256 KB each.
senders_on_many_streams_share_what_they_queue(_Config) ->
    {A, B} = pair(),
    accept(B, worker(B), A, [{active, false}]),
    Pumps = [pump(A, B, [], 10000) || _ <- lists:seq(1, 1024)],
    Held = settled(fun() -> lists:sum([Sent() || {_, _, Sent} <- Pumps]) end),
    ct:log("~b bytes", [Held]),
    %% 64 MB, and what was queued while there were fewer; 16 KB of credit, and a send more, for each.
    true = Held =< 200000000.

%% 20 KB for each of 5,000 streams: what the receiver holds is bounded for all together, and a stream that is read is
%% not kept waiting.
streams_that_nobody_reads_hold_little(_Config) ->
    {A, B} = pair(),
    Acceptor = worker(B),
    accept(B, Acceptor, A, [{active, false}]),
    Opener = worker(A),
    NodeB = node_of(B),
    Open = fun() ->
        {ok, Stream} = macula_dist_stream:open_stream(NodeB),
        ok = macula_dist_stream:send(Stream, <<0>>),
        Stream
    end,
    Streams = do(A, Opener, fun() -> [Open() || _ <- lists:seq(1, 5000)] end),
    ok = eventually(fun() -> length(streams(B)) =:= 5000 end, 60000),
    Resident = fun() -> round(macula_test_nodes:own_kb([macula_test_nodes:os_pid(B)])) div 1000 end,
    Before = settled(Resident),
    Data = binary:copy(<<"0123456789">>, 2000),
    ok = do(A, Opener, fun() -> lists:foreach(fun(S) -> ok = macula_dist_stream:send(S, Data) end, Streams) end),
    After = settled(Resident),
    ct:log("~b MB more", [After - Before]),
    true = After - Before =< 30,
    %% To and fro beside them.
    Reader = worker(B),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:stop_accepting(node_of(A)) end),
    accept(B, Reader, A),
    Stream = open(A, Opener, B),
    ok = send(A, Opener, Stream, [Data || _ <- lists:seq(1, 10)], true),
    await_events(B, Reader, await_stream(B, Reader), {binary:copy(Data, 10), true, []}),
    %% And whoever reads one of them gets all of it.
    Numbers = [Number || {_, _, Number} <- lists:nthtail(4900, Streams)],
    ok = do(B, Acceptor, fun() ->
        lists:foreach(fun(Number) ->
            ok = macula_dist_stream:setopts({macula_dist_stream, node_of(A), Number}, [{active, true}])
        end, Numbers)
    end),
    All = lists:duplicate(100, <<0, Data/binary>>),
    ok = eventually(fun() ->
        All =:= look(B, Acceptor, fun(Seen) ->
            [iolist_to_binary([Bytes || {_, {_, _, N}, {data, Bytes, _}} <- Seen, N =:= Number]) || Number <- Numbers]
        end)
    end).

%% The peer says so of each stream that had one: read, not read, reset by either side, refused.
places_are_free_again_whatever_becomes_of_their_streams(_Config) ->
    {A, B} = pair(),
    {Opener, Reader, Idler} = {worker(A), worker(B), worker(B)},
    Data = binary:copy(<<"x">>, 10000),
    Open = fun(Fin) ->
        [begin
            {ok, Stream} = macula_dist_stream:open_stream(node_of(B)),
            ok = macula_dist_stream:send(Stream, Data, Fin),
            Stream
         end || _ <- lists:seq(1, 200)]
    end,
    %% Nobody accepts them.
    _ = do(A, Opener, fun() -> Open(true) end),
    none_left([A, B]),
    %% Read, and finished by the other side too.
    accept(B, Reader, A),
    Read = do(A, Opener, fun() -> Open(false) end),
    ok = eventually(fun() -> length(streams(B)) =:= 200 end),
    finish(A, Opener, Read),
    Theirs = [{macula_dist_stream, node_of(A), Number} || {_, _, Number} <- Read],
    finish(B, Reader, Theirs),
    none_left([A, B]),
    %% Not read; the sender resets them, or the receiver.
    ok = do(B, Reader, fun() -> macula_dist_stream:stop_accepting(node_of(A)) end),
    accept(B, Idler, A, [{active, false}]),
    Reset = do(A, Opener, fun() -> Open(false) end),
    ok = eventually(fun() -> length(streams(B)) =:= 200 end),
    ok = do(A, Opener, fun() -> lists:foreach(fun(S) -> ok = macula_dist_stream:reset_stream(S) end, Reset) end),
    none_left([A, B]),
    _ = do(A, Opener, fun() -> Open(true) end),
    ok = eventually(fun() -> length(streams(B)) =:= 200 end),
    _ = call(B, erlang, exit, [Idler, kill]),
    none_left([A, B]).

finish(N, Pid, Streams) ->
    ok = do(N, Pid, fun() -> lists:foreach(fun macula_dist_stream:close_stream/1, Streams) end).

waiting_sender_hears_of_the_end(_Config) ->
    {A, B} = pair(),
    Acceptor = worker(B),
    accept(B, Acceptor, A, [{active, false}]),
    {Pump, {_, _, Number}, Sent} = pump(A, B, [], 100000),
    ok = eventually(fun() -> Sent() > 0 end),
    _ = settled(Sent),
    Theirs = {_, _, Number} = await_stream(B, Acceptor),
    ok = do(B, Acceptor, fun() -> macula_dist_stream:reset_stream(Theirs, 9) end),
    {error, {reset, 9}} = ask(A, Pump, fun(Ref) -> {how, self(), Ref} end).

%% Both have the same to send, on a line that is full.
lower_number_is_served_first(_Config) ->
    {A, B, _} = macula_dist_case:relayed_pair(#{rate => 2500000, delay_ms => 5, queue => 100000}),
    Sink = sink(B, A),
    Pumps = [{Priority, pump(A, B, [{priority, Priority}], 50000)} || Priority <- [200, 20, 255]],
    ok = eventually(fun() -> maps:size(received(B, Sink)) =:= 3 end),
    {_, {_, {_, _, Number}, _}} = lists:keyfind(20, 1, Pumps),
    Counts = fun() ->
        {Urgent, Rest} = maps:take(Number, received(B, Sink)),
        {Urgent, lists:sum(maps:values(Rest))}
    end,
    %% In some second: while the urgent sender waits for a processor, the line is the others'.
    ok = eventually(fun() ->
        {Urgent0, Rest0} = Counts(),
        ok = eventually(fun() -> element(1, Counts()) - Urgent0 > 2000000 end, 60000),
        {Urgent, Rest} = Counts(),
        ct:log("20: ~b bytes, 200 and 255 together: ~b", [Urgent - Urgent0, Rest - Rest0]),
        Urgent - Urgent0 > 4 * (Rest - Rest0)
    end, 60000).

%% A process that sends large messages without end, and a stream that does so, on a line that is full.
stream_and_bulk_share_the_line(_Config) ->
    {A, B, _} = macula_dist_case:relayed_pair(#{rate => 5000000, delay_ms => 5, queue => 100000}),
    Sink = sink(B, A),
    Heap = call(B, fun() -> spawn(fun() -> heap(0) end) end),
    _ = pump(A, B, [], 50000),
    _ = call(A, fun() ->
        Large = binary:copy(<<"bulk">>, 262144),
        spawn(fun Send() -> Heap ! Large, Send() end)
    end),
    Streamed = fun() -> lists:sum(maps:values(received(B, Sink))) end,
    Sent = fun() -> ask(B, Heap, fun(Ref) -> {get, self(), Ref} end) end,
    ok = eventually(fun() -> Streamed() > 0 andalso Sent() > 0 end),
    {Stream0, Bulk0} = {Streamed(), Sent()},
    ok = eventually(fun() -> Streamed() - Stream0 + Sent() - Bulk0 > 20000000 end, 60000),
    {Stream, Bulk} = {Streamed() - Stream0, Sent() - Bulk0},
    ct:log("stream: ~b bytes, bulk: ~b", [Stream, Bulk]),
    true = Stream > 3000000,
    true = Bulk > 3000000.

heap(Sum) ->
    receive
        {get, From, Ref} -> From ! {Ref, Sum}, heap(Sum);
        Large when is_binary(Large) -> heap(Sum + byte_size(Large))
    end.

%% Counts what comes on each stream.
sink(N, From) ->
    Node = node_of(From),
    call(N, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            ok = macula_dist_stream:accept_streams(Node),
            Starter ! {self(), ready},
            count(#{})
        end),
        receive {Pid, ready} -> Pid end
    end).

count(Counts) ->
    receive
        {get, From, Ref} ->
            From ! {Ref, Counts},
            count(Counts);
        {_, {_, _, Number}, {data, Data, _}} ->
            count(maps:update_with(Number, fun(Sum) -> Sum + byte_size(Data) end, byte_size(Data), Counts));
        _ ->
            count(Counts)
    end.

received(N, Sink) -> ask(N, Sink, fun(Ref) -> {get, self(), Ref} end).

ten_thousand_streams_at_once(_Config) ->
    {A, B} = pair(),
    NodeA = node_of(A),
    NodeB = node_of(B),
    Total = 10000,
    Echo = call(B, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            ok = macula_dist_stream:accept_streams(NodeA),
            Starter ! {self(), ready},
            echo([], Total)
        end),
        receive {Pid, ready} -> Pid end
    end),
    {Opener, Monitor} = call(A, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            Streams = [begin
                {ok, Stream} = macula_dist_stream:open_stream(NodeB),
                ok = macula_dist_stream:send(Stream, <<N:32>>),
                {Stream, N}
            end || N <- lists:seq(1, Total)],
            Starter ! {self(), opened},
            receive finish -> ok end,
            lists:foreach(fun({Stream, N}) -> ok = macula_dist_stream:send(Stream, <<N:32>>, true) end,
                          Streams),
            lists:foreach(fun({Stream, N}) -> {Stream, N} = {Stream, answer(Stream, N)} end, Streams),
            receive {get, From, Ref} -> From ! {Ref, all} end
        end),
        receive {Pid, opened} -> {Pid, opened} end
    end),
    opened = Monitor,
    ok = eventually(fun() -> length(streams(B)) =:= Total end, 60000),
    Total = length(streams(A)),
    %% The distribution beside them.
    pong = call(A, net_adm, ping, [NodeB]),
    _ = call(A, erlang, send, [Opener, finish]),
    all = ask(A, Opener, fun(Ref) -> {get, self(), Ref} end),
    true = is_pid(Echo),
    none_left([A, B]).

%% Nobody answers before all are open.
echo(Waiting, 0) ->
    lists:foreach(fun({Stream, Data}) -> ok = macula_dist_stream:send(Stream, Data, true) end, Waiting),
    receive stop -> ok end;
echo(Waiting, Left) ->
    receive
        {macula_dist_stream, Stream, {data, Data, true}} -> echo([{Stream, Data} | Waiting], Left - 1);
        {macula_dist_stream, _, {data, _, false}} -> echo(Waiting, Left)
    end.

answer(Stream, N) ->
    receive
        {macula_dist_stream, Stream, {data, Data, true}} ->
            Size = byte_size(Data),
            true = Size =< 8,
            receive {macula_dist_stream, Stream, closed} -> N end
    end.

peer_allows_so_many_streams(_Config) ->
    A = start(a),
    B = start(b, #{args => ["-macula_dist_streams", "3"]}),
    ok = connect(A, B),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    [First | _] = [open(A, Opener, B) || _ <- lists:seq(1, 3)],
    {error, too_many} = do(A, Opener, fun() -> macula_dist_stream:open_stream(node_of(B)) end),
    ok = do(A, Opener, fun() -> macula_dist_stream:reset_stream(First) end),
    _ = open(A, Opener, B).

%% One after the other, each finished by its opener before the next.
streams_that_wait_for_an_answer_keep_no_other_from_being_opened(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    lists:foreach(fun(N) ->
        ok = send(A, Opener, open(A, Opener, B), <<"question">>, true),
        ok = eventually(fun() -> given(B, Acceptor) =:= N end)
    end, lists:seq(1, 200)),
    200 = length(streams(A)).

as_many_silent_streams_as_allowed_can_be_opened(_Config) ->
    A = start(a),
    NodeA = node_of(A),
    Opener = worker(A),
    lists:foreach(fun({Allowed, Args}) ->
        B = start(b, #{args => Args}),
        NodeB = node_of(B),
        ok = connect(A, B),
        Acceptor = worker(B),
        accept(B, Acceptor, A),
        {Ms, Opened} = macula_dist_case:timed(fun() -> open_silent(A, Opener, NodeB, Allowed) end),
        ct:log("~b streams in ~b ms", [Allowed, round(Ms)]),
        {error, too_many} = do(A, Opener, fun() -> macula_dist_stream:open_stream(NodeB) end),
        Allowed = length(call(A, macula_dist_stream, list_streams, [NodeB])),
        %% A stream that the peer knows of is still nobody's before it has sent something.
        [] = seen(B, Acceptor),
        [] = streams(B),
        lists:foreach(fun(Stream = {_, _, Number}) ->
            ok = send(A, Opener, Stream, <<"x">>),
            await_events(B, Acceptor, {macula_dist_stream, NodeA, Number}, {<<"x">>, false, []})
        end, [hd(Opened), lists:last(Opened)]),
        ok = do(A, Opener, fun() -> lists:foreach(fun macula_dist_stream:reset_stream/1, Opened) end),
        none_left([A, B])
    end, [{10000, []}, {100, ["-macula_dist_streams", "100"]}]).

open_silent(N, Pid, Node, Count) ->
    do(N, Pid, fun() ->
        [begin
            {ok, Stream} = macula_dist_stream:open_stream(Node),
            Stream
        end || _ <- lists:seq(1, Count)]
    end).

%% What streams of this priority send waits behind bulk.
streams_can_be_opened_while_bulk_fills_the_line(_Config) ->
    {A, B, _} = macula_dist_case:relayed_pair(#{rate => 5000000, delay_ms => 5, queue => 100000}),
    NodeB = node_of(B),
    Heap = call(B, fun() -> spawn(fun() -> heap(0) end) end),
    _ = call(A, fun() ->
        Large = binary:copy(<<"bulk">>, 262144),
        [spawn(fun Send() -> Heap ! Large, Send() end) || _ <- [1, 2]]
    end),
    ok = eventually(fun() -> ask(B, Heap, fun(Ref) -> {get, self(), Ref} end) > 5000000 end),
    Opener = worker(A),
    Count = do(A, Opener, fun() ->
        length([begin
            {ok, Stream} = macula_dist_stream:open_stream(NodeB, [{priority, 255}]),
            ok = macula_dist_stream:send(Stream, <<"x">>)
        end || _ <- lists:seq(1, 300)])
    end),
    300 = Count.

stream_that_is_over_gives_its_place_to_another(_Config) ->
    {A, B, NodeB} = limited_pair("100"),
    Opener = worker(A),
    Streams = open_silent(A, Opener, NodeB, 100),
    lists:foreach(fun(Stream) ->
        ok = do(A, Opener, fun() -> macula_dist_stream:reset_stream(Stream) end),
        _ = open(A, Opener, B)
    end, lists:sublist(Streams, 20)),
    {error, too_many} = do(A, Opener, fun() -> macula_dist_stream:open_stream(NodeB) end).

many_may_wait_for_streams_at_once(_Config) ->
    {A, B} = pair(),
    NodeB = node_of(B),
    Opened = call(A, fun() ->
        Starter = self(),
        Pids = [spawn(fun() ->
            Starter ! {self(), element(1, macula_dist_stream:open_stream(NodeB))},
            receive stop -> ok end
        end) || _ <- lists:seq(1, 1000)],
        [receive {Pid, Result} -> Result end || Pid <- Pids]
    end),
    [ok] = lists:usort(Opened),
    1000 = length(streams(A)).

limited_pair(Allowed) ->
    A = start(a),
    B = start(b, #{args => ["-macula_dist_streams", Allowed]}),
    ok = connect(A, B),
    {A, B, node_of(B)}.

node_without_streams_says_unsupported(_Config) ->
    A = start(a),
    B = start(b, #{args => ["-macula_dist_streams", "0"]}),
    ok = connect(A, B),
    lists:foreach(fun({N, To}) ->
        {error, unsupported} = call(N, macula_dist_stream, open_stream, [node_of(To)]),
        {error, unsupported} = call(N, macula_dist_stream, accept_streams, [node_of(To)]),
        [] = call(N, macula_dist_stream, list_streams, [node_of(To)])
    end, [{A, B}, {B, A}]),
    true = macula_dist_case:connected(A, B).

%% -- the link -------------------------------------------------------------------------------------------

all_streams_end_with_the_link_and_tell_it_once(_Config) ->
    A = start(a),
    B = start(b),
    {Opener, Acceptor} = {worker(A), worker(B)},
    lists:foreach(fun(End) ->
        ok = connect(A, B),
        accept(B, Acceptor, A),
        Active = open(A, Opener, B),
        Passive = open(A, Opener, B, [{active, false}]),
        Finished = open(A, Opener, B),
        lists:foreach(fun({Stream, Fin}) -> ok = send(A, Opener, Stream, <<"x">>, Fin) end,
                      [{Active, false}, {Passive, false}, {Finished, true}]),
        Theirs = [{{macula_dist_stream, node_of(A), Number}, Fin}
                  || {{_, _, Number}, Fin} <- [{Active, false}, {Passive, false}, {Finished, true}]],
        lists:foreach(fun({Stream, Fin}) -> await_events(B, Acceptor, Stream, {<<"x">>, Fin, []}) end, Theirs),
        true = End(A, B),
        Lost = [{closed, noconnection}],
        lists:foreach(fun({Stream, Fin}) -> await_events(B, Acceptor, Stream, {<<"x">>, Fin, Lost}) end,
                      Theirs),
        lists:foreach(fun(Stream) -> await_events(A, Opener, Stream, {<<>>, false, Lost}) end,
                      [Active, Passive, Finished]),
        none_left([A, B]),
        %% What ends a link tells its streams first.
        ok = eventually(fun() -> not macula_dist_case:connected(A, B) andalso not macula_dist_case:connected(B, A) end),
        %% Once.
        lists:foreach(fun({Stream, Fin}) -> {<<"x">>, Fin, Lost} = events(B, Acceptor, Stream) end, Theirs),
        {error, not_connected} = send(A, Opener, Active, <<"y">>)
    end, ends_of_a_link()),
    %% And when the other node is killed.
    ok = connect(A, B),
    accept(B, Acceptor, A),
    Last = open(A, Opener, B),
    ok = send(A, Opener, Last, <<"x">>),
    _ = macula_dist_case:kill(B),
    await_events(A, Opener, Last, {<<>>, false, [{closed, noconnection}]}).

%% By this node, by the other one, and by what controls the link.
ends_of_a_link() ->
    [fun(One, Other) -> call(One, erlang, disconnect_node, [node_of(Other)]) end,
     fun(One, Other) -> call(Other, erlang, disconnect_node, [node_of(One)]) end,
     fun(One, Other) ->
         {ok, Controller} = call(One, macula_dist_stream, get_controller, [node_of(Other)]),
         call(One, erlang, exit, [Controller, kill])
     end].

%% Whoever waits for a stream would be told `too_many' after five seconds.
end_of_the_link_answers_those_who_wait_for_a_stream_or_for_room(_Config) ->
    A = start(a),
    B = start(b, #{args => ["-macula_dist_streams", "2"]}),
    NodeB = node_of(B),
    Acceptor = worker(B),
    lists:foreach(fun(End) ->
        ok = connect(A, B),
        accept(B, Acceptor, A, [{active, false}]),
        {Sender, _, Sent} = pump(A, B, [], 50000),
        _ = open(A, worker(A), B),
        ok = eventually(fun() -> Sent() > 0 end),
        _ = settled(Sent),
        Opener = call(A, fun() ->
            spawn(fun() ->
                Result = macula_dist_stream:open_stream(NodeB),
                receive {how, From, Ref} -> From ! {Ref, Result} end
            end)
        end),
        ok = eventually(fun() -> waits_in(A, Opener, open_stream) andalso waits_in(A, Sender, send_with_room) end),
        true = End(A, B),
        {Ms, Answers} = macula_dist_case:timed(fun() ->
            [ask(A, Pid, fun(Ref) -> {how, self(), Ref} end) || Pid <- [Opener, Sender]]
        end),
        ct:log("~p after ~b ms", [Answers, round(Ms)]),
        [{error, not_connected}, {error, not_connected}] = Answers,
        ok = eventually(fun() -> not macula_dist_case:connected(A, B) andalso not macula_dist_case:connected(B, A) end)
    end, ends_of_a_link()),
    none_left([A, B]).

waits_in(N, Pid, Function) ->
    [{status, Status}, {current_function, {Module, In, _}}] =
        call(N, erlang, process_info, [Pid, [status, current_function]]),
    {Status, Module, In} =:= {waiting, macula_dist_stream, Function}.

name_of_an_earlier_link_names_no_stream(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    Stream = open(A, Opener, B),
    true = call(A, erlang, disconnect_node, [node_of(B)]),
    await_events(A, Opener, Stream, {<<>>, false, [{closed, noconnection}]}),
    ok = eventually(fun() -> not macula_dist_case:connected(B, A) end),
    ok = connect(A, B),
    %% Nobody accepts streams on a new link before somebody says so.
    Refused = open(A, Opener, B),
    ok = send(A, Opener, Refused, <<"x">>),
    await_events(A, Opener, Refused, {<<>>, false, [{reset, 16#100}]}),
    accept(B, Acceptor, A),
    Next = open(A, Opener, B),
    true = Next =/= Stream,
    {error, unknown_stream} = send(A, Opener, Stream, <<"x">>).

pings_go_past_a_hundred_full_streams(_Config) ->
    {A, B} = pair(),
    Acceptor = worker(B),
    accept(B, Acceptor, A, [{active, false}]),
    Pumps = [pump(A, B, [], 100000) || _ <- lists:seq(1, 100)],
    ok = eventually(fun() -> length(streams(B)) =:= 100 end),
    _ = settled(fun() -> lists:sum([Sent() || {_, _, Sent} <- Pumps]) end),
    {Times, Took} = pings(A, node_of(B), 200),
    ct:log("ms: ~w", [Times]),
    true = lists:nth(100, Times) < 50,
    true = Took < 60000,
    %% Bulk goes past them, too.
    ok = call(A, fun() -> bulk(node_of(B), 20) end),
    %% And every one of them goes on when it is read.
    lists:foreach(fun({_, {_, _, Number}, _}) ->
        Theirs = {macula_dist_stream, node_of(A), Number},
        ok = do(B, Acceptor, fun() -> macula_dist_stream:setopts(Theirs, [{active, 2}]) end)
    end, Pumps),
    Passive = fun(Seen) -> length([x || {_, _, passive} <- Seen]) end,
    ok = eventually(fun() -> look(B, Acceptor, Passive) =:= 100 end, 30000).

%% Megabytes to the node and the word that they have come.
bulk(Node, Megabytes) ->
    Self = self(),
    Pid = spawn(Node, fun() ->
        lists:foreach(fun(_) -> receive {data, _} -> ok end end, lists:seq(1, Megabytes)),
        Self ! {self(), all}
    end),
    lists:foreach(fun(_) -> Pid ! {data, binary:copy(<<1>>, 1000000)} end, lists:seq(1, Megabytes)),
    receive {Pid, all} -> ok end.

%% Sorted round trips in milliseconds, one after the other, and how long they took together.
pings(N, Node, Count) ->
    call(N, fun() ->
        Echo = spawn(Node, fun echo_loop/0),
        {Took, Times} = macula_dist_case:timed(fun() ->
            [element(1, macula_dist_case:timed(fun() -> ping(Echo) end)) || _ <- lists:seq(1, Count)]
        end),
        {lists:sort(Times), Took}
    end).

echo_loop() ->
    receive {From, Ref} -> From ! Ref end,
    echo_loop().

ping(Echo) ->
    Ref = make_ref(),
    Echo ! {self(), Ref},
    receive Ref -> ok end.

%% A gigabyte with MACULA_STREAM_FILE_MB=1024.
pings_go_past_a_file(Config) ->
    Megabytes = list_to_integer(os:getenv("MACULA_STREAM_FILE_MB", "64")),
    Dir = proplists:get_value(priv_dir, Config),
    From = filename:join(Dir, "from"),
    To = filename:join(Dir, "to"),
    {ok, File} = file:open(From, [write, raw, binary]),
    lists:foreach(fun(_) -> ok = file:write(File, crypto:strong_rand_bytes(1048576)) end,
                  lists:seq(1, Megabytes)),
    ok = file:close(File),
    %% 20 MB a second, and 10 ms each way.
    {A, B, _} = macula_dist_case:relayed_pair(#{rate => 20000000, delay_ms => 5, queue => 200000}),
    NodeA = node_of(A),
    NodeB = node_of(B),
    {Idle, _} = pings(A, NodeB, 50),
    Self = self(),
    Receiver = call(B, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            {ok, Out} = file:open(To, [write, raw, binary]),
            ok = macula_dist_stream:accept_streams(NodeA, [{active, 10}]),
            Starter ! {self(), ready},
            Hash = save(Out, crypto:hash_init(sha256)),
            receive {get, Asker, Ref} -> Asker ! {Ref, Hash} end
        end),
        receive {Pid, ready} -> Pid end
    end),
    spawn_link(fun() ->
        {Ms, ok} = macula_dist_case:timed(fun() -> call(A, fun() -> copy(From, NodeB) end) end),
        Self ! {copied, Ms}
    end),
    Times = pings_until(A, NodeB, []),
    Ms = receive {copied, Took} -> Took after 0 -> error(not_copied) end,
    Hash = ask(B, Receiver, fun(Ref) -> {get, self(), Ref} end),
    {ok, Bytes} = file:read_file(From),
    Hash = crypto:hash(sha256, Bytes),
    {ok, Bytes} = file:read_file(To),
    ok = file:delete(From),
    ok = file:delete(To),
    Sorted = lists:sort(Times),
    Count = length(Sorted),
    [Median, P99] = [lists:nth(max(1, Count * Percent div 100), Sorted) || Percent <- [50, 99]],
    ct:log("~b MB in ~b ms; ~b pings, median ~.1f ms, 99 % ~.1f ms; idle ~.1f ms",
           [Megabytes, round(Ms), Count, Median, P99, lists:nth(25, Idle)]),
    true = Median =< lists:nth(25, Idle) + 60.

copy(From, Node) ->
    {ok, In} = file:open(From, [read, raw, binary]),
    {ok, Stream} = macula_dist_stream:open_stream(Node),
    copy_all(In, Stream),
    receive {macula_dist_stream, Stream, closed} -> file:close(In) end.

copy_all(In, Stream) ->
    case file:read(In, 131072) of
        {ok, Data} ->
            ok = macula_dist_stream:send(Stream, Data),
            copy_all(In, Stream);
        eof ->
            ok = macula_dist_stream:close_stream(Stream)
    end.

save(Out, Hash) ->
    receive
        {macula_dist_stream, Stream, {data, Data, Fin}} ->
            ok = file:write(Out, Data),
            Next = crypto:hash_update(Hash, Data),
            case Fin of
                true ->
                    ok = file:close(Out),
                    ok = macula_dist_stream:close_stream(Stream),
                    crypto:hash_final(Next);
                false ->
                    save(Out, Next)
            end;
        {macula_dist_stream, Stream, passive} ->
            ok = macula_dist_stream:setopts(Stream, [{active, 10}]),
            save(Out, Hash)
    end.

pings_until(A, Node, Times) ->
    {More, _} = pings(A, Node, 10),
    receive
        {copied, _} = Copied ->
            self() ! Copied,
            More ++ Times
    after 20 ->
        pings_until(A, Node, More ++ Times)
    end.

unproven_peer_opens_no_stream(_Config) ->
    B = start(b),
    lists:foreach(fun(Alpn) ->
        {ok, Stranger} = macula_quic:connect("127.0.0.1", macula_dist_case:port_of(B),
                                             [{verify, verify_none}, {alpn, [Alpn]}
                                              | macula_dist_stranger:identity()], 5000),
        {ok, Control} = macula_dist_stranger:first_stream(Stranger),
        {error, timeout} = macula_quic:open_stream(Stranger, #{timeout => 500}),
        %% Held until here: a stream whose handle is collected is finished.
        {ok, #{state := open}} = macula_quic:info(Control),
        ok = macula_quic:close_connection(Stranger)
    end, [<<"macula-dist/1+streams">>, <<"macula-dist/1">>]),
    [] = streams(B).

panic_in_a_task_ends_one_stream(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    lists:foreach(fun(Point) ->
        [Stream, Other] = [open(A, Opener, B) || _ <- [1, 2]],
        ok = send(A, Opener, Other, <<"x">>),
        ok = send(A, Opener, Stream, <<"x">>),
        {_, _, Number} = Stream,
        Theirs = {macula_dist_stream, node_of(A), Number},
        await_events(B, Acceptor, Theirs, {<<"x">>, false, []}),
        %% The task sleeps before the point: what wakes it first is the stream's own.
        true = call(A, macula_nif, inject_panic, [Point]),
        ok = case Point of
            dist_stream_write -> send(A, Opener, Stream, <<"y">>);
            dist_stream_read -> do(A, Opener, fun() -> macula_dist_stream:setopts(Stream, [{active, true}]) end)
        end,
        ok = eventually(fun() ->
            {_, _, Ends} = events(A, Opener, Stream),
            Ends =:= [{closed, internal_error}]
        end),
        ok = eventually(fun() ->
            {_, false, Ends} = events(B, Acceptor, Theirs),
            Ends =:= [{reset, 0}]
        end),
        ok = send(A, Opener, Other, <<"y">>, true),
        {_, _, Second} = Other,
        await_events(B, Acceptor, {macula_dist_stream, node_of(A), Second}, {<<"xy">>, true, []}),
        ok = do(A, Opener, fun() -> macula_dist_stream:reset_stream(Other) end)
    end, [dist_stream_write, dist_stream_read]),
    true = macula_dist_case:connected(A, B),
    none_left([A, B]).

%% -- examples/compat/quic_dist.erl ------------------------------------------------------------------------

%% As net_kernel does that has a host to listen at, and as programs do that give options: on nodes that do not listen
%% themselves. EPMD's client has one name for each.
listens_with_options(#{args := Args} = Options) ->
    lists:foreach(fun(Second) ->
        Name = macula_dist_case:unique("l"),
        Port = macula_test_nodes:free_udp_port(),
        {ok, N} = macula_test_nodes:start(Options#{
            name => Name,
            args => ["-dist_listen", "false", "-macula_dist_port", integer_to_list(Port) | Args]}),
        try
            {ok, {Listen, {net_address, {_, Port}, Host, quic, inet}, Creation}} =
                call(N, quic_dist, listen, [list_to_atom(Name), Second]),
            true = is_integer(Creation),
            true = Host =:= Second orelse is_map(Second),
            false = macula_test_nodes:is_udp_port_free(Port),
            ok = call(N, quic_dist, close, [Listen]),
            ok = eventually(fun() -> macula_test_nodes:is_udp_port_free(Port) end)
        after
            _ = macula_test_nodes:kill(N)
        end
    end, ["127.0.0.1", #{}]).

%% Each function of quic_dist, on nodes whose carrier it is.
programs_for_quic_dist_run_with_its_face(Config) ->
    Source = filename:join([macula_test_run:root(), "examples", "compat", "quic_dist.erl"]),
    Dir = filename:join(proplists:get_value(priv_dir, Config), "face"),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    {ok, quic_dist, []} = compile:file(Source, [{outdir, Dir}, return_errors, return_warnings,
                                                warnings_as_errors, warn_missing_spec]),
    Options = #{carrier => quic, args => ["-pa", Dir]},
    {ok, A} = macula_test_nodes:start(Options#{name => macula_dist_case:unique("a")}),
    {ok, B} = macula_test_nodes:start(Options#{name => macula_dist_case:unique("b")}),
    {NodeA, NodeB} = {node_of(A), node_of(B)},
    try
        ok = connect(A, B),
        #{NodeB := #{trust := cookie}} = call(A, macula_dist, info, []),
        true = call(A, quic_dist, is_node_name, [NodeA]),
        true = call(A, quic_dist, select, [NodeA]),
        {net_address, _, _, quic, inet} = call(A, quic_dist, address, []),
        {ok, Controller} = call(A, quic_dist, get_controller, [NodeB]),
        [{NodeB, Controller}] = macula_dist_case:controllers(A),
        {error, not_connected} = call(A, quic_dist, get_controller, ['no@127.0.0.1']),
        {Opener, Acceptor, Next} = {worker(A), worker(B), worker(B)},
        Q = fun(N, Pid, Function, Args) -> do(N, Pid, fun() -> apply(quic_dist, Function, Args) end) end,
        {ok, Refused} = Q(A, Opener, open_stream, [NodeB]),
        ok = Q(A, Opener, send, [Refused, <<"x">>]),
        await_events(A, Opener, Refused, {<<>>, false, [{reset, 16#100}]}),
        ok = Q(B, Acceptor, accept_streams, [NodeA]),
        {ok, {quic_dist_stream, NodeB, Number} = Stream} = Q(A, Opener, open_stream, [NodeB, [{priority, 64}]]),
        ok = Q(A, Opener, send, [Stream, <<"GET ">>]),
        ok = Q(A, Opener, send, [Stream, [<<"/data">>], true]),
        Theirs = {quic_dist_stream, NodeA, Number},
        await_events(B, Acceptor, Theirs, {<<"GET /data">>, true, []}),
        ok = Q(B, Acceptor, controlling_process, [Theirs, Next]),
        {error, not_owner} = Q(B, Acceptor, send, [Theirs, <<"mine">>]),
        [#{ref := Stream, node := NodeB, stream_id := Id, owner := Opener, priority := 64, recv_fin := false,
           send_fin := true}] = call(A, quic_dist, list_streams, []),
        [#{ref := Theirs, node := NodeA, stream_id := Id, owner := Next, recv_fin := true, send_fin := false}] =
            call(B, quic_dist, list_streams, [NodeA]),
        ok = Q(B, Next, send, [Theirs, <<"value">>, false]),
        ok = Q(B, Next, close_stream, [Theirs]),
        await_events(A, Opener, Stream, {<<"value">>, true, [closed]}),
        await_events(B, Next, Theirs, {<<>>, false, [closed]}),
        lists:foreach(fun({Args, Code}) ->
            {ok, Short} = Q(A, Opener, open_stream, [NodeB]),
            ok = Q(A, Opener, send, [Short, <<"x">>]),
            {_, _, N} = Short,
            await_events(B, Acceptor, {quic_dist_stream, NodeA, N}, {<<"x">>, false, []}),
            ok = Q(A, Opener, reset_stream, [Short | Args]),
            await_events(A, Opener, Short, {<<>>, false, [{reset, Code}]}),
            await_events(B, Acceptor, {quic_dist_stream, NodeA, N}, {<<"x">>, false, [{reset, Code}]})
        end, [{[], 0}, {[77], 77}]),
        ok = Q(B, Acceptor, stop_accepting, [NodeA]),
        {error, unknown_stream} = Q(A, Opener, send, [Stream, <<"late">>]),
        {ok, Last} = Q(A, Opener, open_stream, [NodeB]),
        true = call(B, erlang, disconnect_node, [NodeA]),
        await_events(A, Opener, Last, {<<>>, false, [{closed, noconnection}]}),
        listens_with_options(Options)
    after
        _ = macula_test_nodes:kill(A),
        _ = macula_test_nodes:kill(B)
    end.
