%% Many small nodes that dial each other at once, over any carrier: when they are one mesh, what that took, and
%% what the mesh costs while nobody says anything.
-module(macula_test_mesh).

-export([measure/3]).
%% What the nodes run.
-export([watch/1, dial_all/2]).

-export_type([figures/0]).

%% How long the whole mesh may take.
-define(DIAL_MS, 120000).
%% How long a node takes to give back what its start and the loading of code have left.
-define(SETTLE_MS, 3000).

%% `ms' until the mesh is whole, processor time in ms of all nodes for a link, `lost' and `incomplete' where
%% something is missing, in the end too. Where the system shows it (Linux), resident memory in KB for an end of a
%% link, the part of it (`own_kb') that is not of files, which VMs share, and how many times a second the threads of
%% a node were woken for each end in the second half of that time.
-type figures() :: #{ms := non_neg_integer(), cpu_ms := float(),
                     lost := [{node(), {node(), list()}}], incomplete := [non_neg_integer()],
                     kb := float() | unknown, own_kb := float() | unknown, wakes := float() | unknown}.

%% Watches the whole mesh for WatchedMs: what is not stable yet falls apart in that time.
-spec measure(macula_test_nodes:options(), pos_integer(), non_neg_integer()) -> figures().
measure(Options, Size, WatchedMs) ->
    Nodes = start(Options, Size),
    try
        Names = [macula_test_nodes:name(N) || N <- Nodes],
        OsPids = [macula_test_nodes:os_pid(N) || N <- Nodes],
        Watches = [{N, macula_test_nodes:call(N, erlang, apply, [fun started_watch/0, []])}
                   || N <- Nodes],
        _ = at_once(fun(N) -> ok = macula_test_nodes:call(N, erlang, apply, [fun prepare/0, []]) end, Nodes),
        receive after ?SETTLE_MS -> ok end,
        Before = processor_ms(Nodes),
        Alone = macula_test_nodes:resident_kb(OsPids),
        AloneOwn = macula_test_nodes:own_kb(OsPids),
        Began = erlang:monotonic_time(millisecond),
        Sizes = at_once(fun(N) ->
            macula_test_nodes:call(N, ?MODULE, dial_all, [Names, ?DIAL_MS], ?DIAL_MS + 30000)
        end, Nodes),
        Ms = erlang:monotonic_time(millisecond) - Began,
        Links = Size * (Size - 1) div 2,
        Cpu = (processor_ms(Nodes) - Before) / Links,
        Ends = 2 * Links,
        %% What the dialling leaves to do is done in the first half.
        receive after WatchedMs div 2 -> ok end,
        Asleep = wakes(OsPids),
        receive after WatchedMs div 2 -> ok end,
        Woken = wakes(OsPids),
        Kb = macula_test_nodes:resident_kb(OsPids),
        OwnKb = macula_test_nodes:own_kb(OsPids),
        Lost = [{macula_test_nodes:name(N), Down} || {N, Watch} <- Watches, Down <- seen(N, Watch)],
        Left = [length(macula_test_nodes:call(N, erlang, nodes, [])) || N <- Nodes],
        #{ms => Ms, cpu_ms => Cpu, lost => Lost, kb => growth(Alone, Kb, Ends),
          own_kb => growth(AloneOwn, OwnKb, Ends),
          wakes => growth(Asleep, Woken, Ends * (WatchedMs div 2) / 1000),
          incomplete => [S || S <- Sizes ++ Left, S =/= Size - 1]}
    after
        at_once(fun macula_test_nodes:kill/1, Nodes)
    end.

%% As small as a node can be: there are many of them.
start(Options, Size) ->
    Lean = ["+S", "1:1", "+SDcpu", "1:1", "+SDio", "1", "+A", "1", "-kernel", "logger_level", "none"],
    Args = Lean ++ maps:get(args, Options, []),
    Results = at_once(fun(_) ->
        macula_test_nodes:start(Options#{args => Args, wait_boot => 120000})
    end, lists:seq(1, Size)),
    case [Error || {error, Error} <- Results] of
        [] ->
            [N || {ok, N} <- Results];
        [Error | _] ->
            _ = at_once(fun macula_test_nodes:kill/1, [N || {ok, N} <- Results]),
            error({node_did_not_start, Error})
    end.

at_once(Fun, List) ->
    Workers = [spawn_monitor(fun() -> exit({done, Fun(Item)}) end) || Item <- List],
    [receive
         {'DOWN', Monitor, process, Pid, {done, Result}} -> Result;
         {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
     end || {Pid, Monitor} <- Workers].

processor_ms(Nodes) ->
    lists:sum([element(1, macula_test_nodes:call(N, erlang, statistics, [runtime])) || N <- Nodes]).

growth(unknown, _, _) -> unknown;
growth(_, _, Parts) when Parts == 0 -> unknown;
growth(Before, After, Parts) -> (After - Before) / Parts.

%% How many times the threads of the nodes have slept and been woken.
wakes(OsPids) ->
    case [Status || OsPid <- OsPids, File <- filelib:wildcard("/proc/" ++ OsPid ++ "/task/*/status"),
                    {ok, Status} <- [file:read_file(File)]] of
        [] ->
            unknown;
        Statuses ->
            lists:sum([begin
                {match, [N]} = re:run(Status, "^voluntary_ctxt_switches:\\s+([0-9]+)",
                                      [multiline, {capture, all_but_first, binary}]),
                binary_to_integer(N)
            end || Status <- Statuses])
    end.

%% -- at a node ------------------------------------------------------------------------------------

started_watch() ->
    Starter = self(),
    Pid = spawn(?MODULE, watch, [Starter]),
    receive {Pid, watching} -> Pid end.

%% Whether a node has loaded these by now depends on its arguments; a link's memory has none of it.
prepare() ->
    _ = [{module, Module} = code:ensure_loaded(Module) || Module <- [string, unicode_util]],
    lists:foreach(fun erlang:garbage_collect/1, processes()).

watch(Starter) ->
    ok = net_kernel:monitor_nodes(true, [nodedown_reason]),
    Starter ! {self(), watching},
    watched([]).

watched(Lost) ->
    receive
        {nodedown, Node, Info} -> watched([{Node, Info} | Lost]);
        {nodeup, _, _} -> watched(Lost);
        {get, From} -> From ! {self(), Lost}, watched(Lost)
    end.

seen(N, Watch) ->
    macula_test_nodes:call(N, erlang, apply, [fun() ->
        Watch ! {get, self()},
        receive {Watch, Lost} -> Lost after 5000 -> error(watch_lost) end
    end, []]).

%% How many others the node is connected with in the end.
dial_all(Names, Ms) ->
    dial_all(Names, Ms, erlang:monotonic_time(millisecond)).

dial_all(Names, Ms, Began) ->
    case Names -- [node() | nodes()] of
        [] ->
            length(nodes());
        Missing ->
            case erlang:monotonic_time(millisecond) - Began > Ms of
                true ->
                    length(nodes());
                false ->
                    _ = [net_kernel:connect_node(Name) || Name <- Missing],
                    receive after 20 -> ok end,
                    dial_all(Names, Ms, Began)
            end
    end.
