%% Many nodes that all dial each other at once become one mesh and stay one. The same is done over
%% inet_tcp in the same run, so that what is measured is a ratio.
-module(macula_dist_mesh_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1]).
-export([a_storm_of_dials_becomes_a_mesh_and_stays_one/1]).
%% What the nodes run.
-export([watch/1, dial_all/2]).

%% How long the whole mesh may take, and for how long it is watched afterwards.
-define(DIAL_MS, 120000).
-define(WATCHED_MS, 5000).

suite() -> [{timetrap, {minutes, 10}}].

all() -> [a_storm_of_dials_becomes_a_mesh_and_stays_one].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).

%% MACULA_MESH_NODES (20) is the size.
a_storm_of_dials_becomes_a_mesh_and_stays_one(_Config) ->
    Size = list_to_integer(os:getenv("MACULA_MESH_NODES", "20")),
    Tcp = mesh(inet_tcp, Size),
    Macula = mesh(macula, Size),
    ct:pal("mesh of ~b: inet_tcp whole in ~b ms, ~.1f ms of processor a link; "
           "macula ~b ms, ~.1f ms",
           [Size, maps:get(ms, Tcp), maps:get(cpu_ms, Tcp), maps:get(ms, Macula),
            maps:get(cpu_ms, Macula)]),
    ?assertEqual([], maps:get(incomplete, Macula)),
    ?assertEqual([], maps:get(lost, Macula)),
    %% Generous, as the machine may be busy during one of the two.
    ?assert(maps:get(ms, Macula) =< 10 * maps:get(ms, Tcp) + 5000,
            {maps:get(ms, Macula), maps:get(ms, Tcp)}).

mesh(Carrier, Size) ->
    Nodes = start(Carrier, Size),
    try
        Names = [macula_test_nodes:name(N) || N <- Nodes],
        Watches = [{N, macula_test_nodes:call(N, erlang, apply, [fun started_watch/0, []])}
                   || N <- Nodes],
        Before = processor_ms(Nodes),
        Began = erlang:monotonic_time(millisecond),
        Sizes = at_once(fun(N) ->
            macula_test_nodes:call(N, ?MODULE, dial_all, [Names, ?DIAL_MS], ?DIAL_MS + 30000)
        end, Nodes),
        Ms = erlang:monotonic_time(millisecond) - Began,
        Links = Size * (Size - 1) div 2,
        Cpu = (processor_ms(Nodes) - Before) / Links,
        %% What is not stable yet would fall apart in these seconds.
        receive after ?WATCHED_MS -> ok end,
        Lost = [{macula_test_nodes:name(N), Down} || {N, Watch} <- Watches, Down <- seen(N, Watch)],
        Left = [length(macula_test_nodes:call(N, erlang, nodes, [])) || N <- Nodes],
        #{ms => Ms, cpu_ms => Cpu, lost => Lost,
          incomplete => [S || S <- Sizes ++ Left, S =/= Size - 1]}
    after
        at_once(fun macula_test_nodes:kill/1, Nodes)
    end.

%% As small as a node can be: there are many of them.
start(Carrier, Size) ->
    Lean = ["+S", "1:1", "+SDcpu", "1:1", "+SDio", "1", "+A", "1", "-kernel", "logger_level", "none"],
    Results = at_once(fun(_) ->
        macula_test_nodes:start(#{carrier => Carrier, args => Lean, wait_boot => 120000})
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

%% -- at a node ------------------------------------------------------------------------------------

started_watch() ->
    Starter = self(),
    Pid = spawn(?MODULE, watch, [Starter]),
    receive {Pid, watching} -> Pid end.

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
