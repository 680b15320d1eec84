%% @doc `make demo-mesh': five VMs peer with each other, talk, lose one and get it back. Every step
%% checks what it shows; the first that fails ends the program with status 1.
-module(macula_mesh).

-export([main/1]).

-define(NAMES, ["alpha", "bravo", "charlie", "delta", "echo"]).
-define(VICTIM, "charlie").
-define(HOST, {127, 0, 0, 1}).
-define(BURST, 200).
-define(TALK_MS, 3000).
-define(DEADLINE_MS, 300).
%% How much later than its deadline a call may end on a machine that is busy.
-define(SLACK_MS, 10000).
-define(STEP_MS, 15000).

-import(macula_test_nodes, [wait_until/2]).

%% @doc Arguments: a directory for the identities, whether the output is a `terminal' or a `pipe',
%% and the milliseconds after which the program has failed.
-spec main([string()]) -> no_return().
main([Dir, Output, LimitMs]) ->
    Screen = macula_mesh_screen:start(Output),
    Limit = list_to_integer(LimitMs),
    {ok, _} = timer:apply_after(Limit, erlang, apply, [fun() ->
        failed(Screen, io_lib:format("not done after ~.1f s", [Limit / 1000]))
    end, []]),
    try
        run(Dir, Screen),
        macula_mesh_screen:stop(Screen, "all of it happened"),
        halt(0)
    catch
        error:{not_reached, Last, Ms}:_ ->
            failed(Screen, io_lib:format("not within ~.1f s; so far: ~tp", [Ms / 1000, Last]));
        Class:Reason:Stack ->
            failed(Screen, io_lib:format("~tp", [{Class, Reason, Stack}]))
    end.

-spec failed(pid(), iodata()) -> no_return().
failed(Screen, Why) ->
    macula_mesh_screen:stop(Screen, ["FAILED: ", Why]),
    halt(1).

run(Dir, Screen) ->
    {ok, _} = application:ensure_all_started(macula),
    Options = stations(Dir),
    step(Screen, "Start five VMs, each with an identity of its own"),
    Nodes = start_nodes(Options, Screen),
    try
        conduct(Options, Nodes, Screen)
    after
        lists:foreach(fun macula_test_nodes:stop/1, maps:values(macula_mesh_screen:nodes(Screen)))
    end.

conduct(Options, Nodes, Screen) ->
    step(Screen, "Link each with each, dialled with the key pinned"),
    [station(Name, Options, Nodes) || Name <- ?NAMES],
    Took = linked(?NAMES, Nodes),
    say(Screen, "~b links, all known at both ends, after ~b ms", [10, Took]),

    step(Screen, "Talk: PING and PONG on every link, events, calls"),
    receive after ?TALK_MS -> ok end,
    ok = latencies(Nodes),
    macula_mesh_screen:table(Screen),

    step(Screen, "Publish a burst, to be passed on to all who have subscribed"),
    burst("alpha", Nodes, Screen),

    step(Screen, "Call, with a deadline"),
    calls(Nodes, Screen),

    step(Screen, "Kill " ?VICTIM " with -9"),
    Without = kill(Nodes, Screen),

    step(Screen, "Another with another key answers at its address"),
    impostor(Options, Without, Screen),

    step(Screen, "Start " ?VICTIM " again"),
    All = restart(Options, Without, Screen),
    burst(?VICTIM, All, Screen),

    step(Screen, "Part"),
    [ok = call(Name, macula_mesh_station, stop, [], All) || Name <- ?NAMES],
    say(Screen, "every station has said goodbye to its peers and heard theirs", []).

%%% Stations

%% What each is told. A station dials those before it, so each pair is linked once.
stations(Dir) ->
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    Made = [begin
        File = filename:join(Dir, Name ++ ".key"),
        Identity = macula_identity:generate(),
        ok = macula_identity:save(Identity, File),
        {Name, File, macula_identity:public(Identity), macula_test_nodes:free_udp_port()}
    end || Name <- ?NAMES],
    Stations = maps:from_list([{NodeId, Name} || {Name, _, NodeId, _} <- Made]),
    maps:from_list([{Name, #{
        name => Name, key => filename:absname(File), port => Port, stations => Stations,
        dial => [#{port => P, node_id => NodeId} || {N, _, NodeId, P} <- Made, N < Name]}}
     || {Name, File, _, Port} <- Made]).

%% All at once: most of a VM's start is waiting for files.
start_nodes(Options, Screen) ->
    Director = self(),
    Starting = [spawn_monitor(fun() ->
        exit({started, Name, start_node(), Director})
    end) || Name <- maps:keys(Options)],
    Nodes = maps:from_list([receive
        {'DOWN', Ref, process, Pid, {started, Name, Node, _}} -> {Name, Node};
        {'DOWN', Ref, process, Pid, Reason} -> error({no_vm, Reason})
    end || {Pid, Ref} <- Starting]),
    macula_mesh_screen:watch(Screen, Nodes),
    say(Screen, "no Erlang distribution in any: what passes between them is signed frames", []),
    Nodes.

start_node() ->
    {ok, Node} = macula_test_nodes:start(#{carrier => none, args => [
        "+S", "1", "+sbwt", "none", "-kernel", "logger_level", "error"]}),
    {ok, _} = macula_test_nodes:call(Node, application, ensure_all_started, [macula]),
    Node.

station(Name, Options, Nodes) ->
    {ok, _} = call(Name, macula_mesh_station, start, [maps:get(Name, Options)], Nodes).

call(Name, Module, Function, Args, Nodes) ->
    macula_test_nodes:call(maps:get(Name, Nodes), Module, Function, Args).

view(Name, Nodes) ->
    call(Name, macula_mesh_station, view, [0], Nodes).

%%% Steps

linked(Names, Nodes) ->
    Begun = now_ms(),
    ok = wait_until(fun() ->
        Missing = [{Name, Other} || Name <- Names, #{links := Links} <- [view(Name, Nodes)],
                                    Other <- Names -- [Name], not is_map_key(Other, Links)],
        Missing =:= [] orelse {not_linked, Missing}
    end, ?STEP_MS),
    now_ms() - Begun.

latencies(Nodes) ->
    wait_until(fun() ->
        Unknown = [{Name, Peer} || Name <- maps:keys(Nodes),
                                   #{links := Links} <- [view(Name, Nodes)],
                                   {Peer, undefined} <- maps:to_list(Links)],
        Unknown =:= [] orelse {no_pong, Unknown}
    end, ?STEP_MS).

%% Whom a publication goes through changes with each, so its way is one hop or two.
burst(From, Nodes, Screen) ->
    Topic = <<"mesh.burst">>,
    Others = maps:keys(Nodes) -- [From],
    Before = maps:from_list([{Name, of_author(From, Name, Nodes)} || Name <- Others]),
    Begun = now_ms(),
    [ok = call(From, macula_mesh_station, publish, [Topic, #{number => N}], Nodes)
     || N <- lists:seq(1, ?BURST)],
    ok = wait_until(fun() ->
        Short = [{Name, length(New)} || Name <- Others,
                    New <- [of_author(From, Name, Nodes) -- maps:get(Name, Before)],
                    length(New) < ?BURST],
        Short =:= [] orelse {events_missing, Short}
    end, ?STEP_MS),
    Took = now_ms() - Begun,
    lists:foreach(fun(Name) ->
        New = of_author(From, Name, Nodes) -- maps:get(Name, Before),
        ?BURST = length(New),
        ?BURST = length(lists:usort(New))
    end, Others),
    0 = lists:sum([maps:get(forged, maps:get(counts, view(Name, Nodes)), 0) || Name <- Others]),
    say(Screen, "~b by ~s: each reached ~b others once, signature intact, ~b ms",
        [?BURST, From, length(Others), Took]).

of_author(Author, Name, Nodes) ->
    [Seq || {A, Seq} <- call(Name, macula_mesh_station, heard, [<<"mesh.burst">>], Nodes),
            A =:= Author].

calls(Nodes, Screen) ->
    Ask = fun(From, To, Procedure, Payload, Ms) ->
        call(From, macula_mesh_station, call, [To, Procedure, Payload, Ms], Nodes)
    end,
    Answers = [begin
        Name = {text, list_to_binary(To)},
        {ok, Name, Micros} = Ask(From, To, <<"mesh.name">>, undefined, 10000),
        Micros
    end || From <- ?NAMES, To <- ?NAMES, From =/= To],
    {ok, 5050, _} = Ask("alpha", "echo", <<"mesh.sum">>, lists:seq(1, 100), 10000),
    {error, {error_frame, unknown_error}} = Ask("bravo", "delta", <<"mesh.no">>, undefined, 10000),
    say(Screen, "~b calls got their RESULT, the median after ~.2f ms; an unknown one its ERROR",
        [length(Answers) + 1, macula_mesh_screen:median(Answers) / 1000]),
    Begun = now_ms(),
    {error, deadline} = Ask("echo", "alpha", <<"mesh.wait">>, 60000, ?DEADLINE_MS),
    Took = now_ms() - Begun,
    true = Took >= ?DEADLINE_MS andalso Took < ?DEADLINE_MS + ?SLACK_MS,
    ok = wait_until(fun() ->
        maps:get(given_up, maps:get(counts, view("alpha", Nodes)), 0) =:= 1
    end, ?STEP_MS),
    say(Screen, "one of a minute, with a deadline of ~b ms: given up by both after ~b ms",
        [?DEADLINE_MS, Took]).

kill(Nodes, Screen) ->
    Begun = now_ms(),
    ok = macula_test_nodes:kill(maps:get(?VICTIM, Nodes)),
    Left = maps:remove(?VICTIM, Nodes),
    macula_mesh_screen:watch(Screen, Left),
    ok = wait_until(fun() ->
        Believers = [Name || Name <- maps:keys(Left), #{links := Links} <- [view(Name, Left)],
                             is_map_key(?VICTIM, Links)],
        Believers =:= [] orelse {still_linked, Believers}
    end, ?STEP_MS),
    Took = now_ms() - Begun,
    Dialling = [Name || Name <- maps:keys(Left), Name > ?VICTIM],
    ok = wait_until(fun() ->
        Idle = [Name || Name <- Dialling,
                        not is_map_key(?VICTIM, maps:get(redialling, view(Name, Left)))],
        Idle =:= [] orelse {not_redialling, Idle}
    end, ?STEP_MS),
    say(Screen, "all ~b others knew after ~b ms; ~s dial on", [map_size(Left), Took,
                                                          lists:join(" and ", Dialling)]),
    Left.

%% Same address, other key: nobody may link with it.
impostor(Options, Nodes, Screen) ->
    #{?VICTIM := #{port := Port}} = Options,
    Cursors = maps:map(fun(Name, _) -> maps:get(next, view(Name, Nodes)) end, Nodes),
    {ok, Listener} = macula_peering:listen(#{identity => macula_identity:generate(),
                                             address => ?HOST, port => Port}),
    Dialling = [Name || Name <- maps:keys(Nodes), Name > ?VICTIM],
    [Why | _] = wait_until(fun() ->
        Refusals = [Refusal || Name <- Dialling,
                               Refusal <- refusal(Name, maps:get(Name, Cursors), Nodes)],
        case length(Refusals) >= length(Dialling) of
            true -> {value, Refusals};
            false -> {refused_by, Refusals}
        end
    end, ?STEP_MS),
    ok = macula_peering:close_listener(Listener),
    %% Connections that were refused hold the port until they are over.
    ok = wait_until(fun() -> macula_test_nodes:is_udp_port_free(Port) end, ?STEP_MS),
    receive {macula_peering, connected, _, _} -> error(impostor_was_linked) after 0 -> ok end,
    say(Screen, "refused by ~s: ~ts", [lists:join(" and ", Dialling),
                                       macula_quic:format_error(Why)]).

%% The first that is not the silence of an address where nobody is.
refusal(Name, Since, Nodes) ->
    #{happened := Happened} = call(Name, macula_mesh_station, view, [Since], Nodes),
    lists:sublist([Why || {_, {redialling, ?VICTIM, _, _, {connect_failed, Why}}} <- Happened,
                             Why =/= timeout, Why =/= econnrefused], 1).

restart(Options, Nodes, Screen) ->
    Node = start_node(),
    All = Nodes#{?VICTIM => Node},
    macula_mesh_screen:watch(Screen, All),
    _ = station(?VICTIM, Options, All),
    Took = linked(?NAMES, All),
    ok = latencies(All),
    say(Screen, "linked with all again ~b ms after it was back", [Took]),
    All.

%%% Output

step(Screen, Text) -> macula_mesh_screen:step(Screen, Text).

say(Screen, Format, Args) -> macula_mesh_screen:say(Screen, io_lib:format(Format, Args)).

now_ms() -> erlang:monotonic_time(millisecond).
