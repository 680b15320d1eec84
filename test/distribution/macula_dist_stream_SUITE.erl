%% Streams of the users' own on a link of the distribution.
-module(macula_dist_stream_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([what_is_sent_arrives_with_its_end_both_ways/1, acceptor_owns_the_stream/1,
         calls_that_fail_say_why/1, passive_stream_tells_as_much_as_is_asked_for/1,
         death_of_the_owner_resets_what_is_not_finished/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/4, node_of/1, connect/2, eventually/1]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [what_is_sent_arrives_with_its_end_both_ways, acceptor_owns_the_stream, calls_that_fail_say_why,
     passive_stream_tells_as_much_as_is_asked_for, death_of_the_owner_resets_what_is_not_finished].

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
        {seen, From, Ref} ->
            From ! {Ref, lists:reverse(Seen)},
            work(Seen);
        Other ->
            work([Other | Seen])
    end.

do(N, Pid, Fun) ->
    ask(N, Pid, fun(Ref) -> {do, self(), Ref, Fun} end).

%% What the worker has got.
seen(N, Pid) ->
    ask(N, Pid, fun(Ref) -> {seen, self(), Ref} end).

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
        ok = eventually(fun() -> proplists:get_value(stream, call(N, macula_nif, live_objects, [])) =:= 0 end)
    end, Nodes).

%% -- opening, sending, the end ----------------------------------------------------------------------

what_is_sent_arrives_with_its_end_both_ways(_Config) ->
    {A, B} = pair(),
    {Opener, Acceptor} = {worker(A), worker(B)},
    accept(B, Acceptor, A),
    Stream = {macula_dist_stream, Node, Number} = open(A, Opener, B),
    Node = node_of(B),
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
