%% @doc Bulk both ways at 1 % loss, beside small messages and calls, while nodes are killed, stopped for less
%% and for more than their peers' patience, and continued. Every message is verified, the load goes on after each
%% of these, and nothing is left behind.
-module(macula_soak_bulk).

-export([main/1]).

-import(macula_soak, [meshed/1, memory/1, sum/2, verify/1]).
-import(macula_test_nodes, [call/4, name/1, wait_until/2]).

-define(NAMES, ["bulk1", "bulk2"]).
-define(LOSS, 0.01).
-define(DELAY_MS, 5).
%% Stopped for so long a node keeps its links, or has lost them: the liveness time is 10 s.
-define(SHORT_MS, 3000).
-define(LONG_MS, 15000).
%% All goes on within so long.
-define(GOING_MS, 90000).

%% @doc Argument: seconds.
-spec main([string()]) -> no_return().
main([Seconds]) ->
    io:format("soak: bulk both ways for ~s s at ~b % loss~n", [Seconds, round(?LOSS * 100)]),
    macula_soak:run("soak", fun() -> soak(list_to_integer(Seconds) * 1000) end).

soak(Ms) ->
    Ports = [{Name, macula_test_nodes:free_udp_port()} || Name <- ?NAMES],
    Relays = [{Name, macula_soak:relay(Port, #{loss => ?LOSS, delay_ms => ?DELAY_MS})} || {Name, Port} <- Ports],
    Specs = [macula_soak:spec(Name, Port, Relays) || {Name, Port} <- Ports],
    macula_test_nodes:with_nodes(Specs, fun(Nodes) ->
        meshed(Nodes),
        [{ok, _} = call(Node, inet, getaddr, ["localhost", inet]) || Node <- Nodes],
        Before = [macula_test_nodes:snapshot(Node) || Node <- Nodes],
        [load(Node, Nodes) || Node <- Nodes],
        Events = [stop_short, kill, stop_long],
        Last = storm(Nodes, Specs, erlang:monotonic_time(millisecond) + Ms, 1, Events, Events),
        try
            Reports = [call(Node, macula_soak_load, stop, []) || Node <- Last],
            [ok = verify(Report) || Report <- Reports],
            [ok = macula_test_nodes:await_no_leak(Node, Snapshot) || {Node, Snapshot} <- lists:zip(Last, Before)],
            io:format("soak: nothing is left behind~n")
        after
            [macula_test_nodes:stop(Node) || Node <- Last]
        end
    end).

load(Node, Nodes) ->
    Peers = [name(N) || N <- Nodes, name(N) =/= name(Node)],
    ok = call(Node, macula_soak_load, start, [Peers, [bulk, messages, calls]]).

%% Each event comes once before the end.
storm(Nodes, Specs, Deadline, Round, Events, All) ->
    case Round > length(All) andalso erlang:monotonic_time(millisecond) >= Deadline of
        true ->
            Nodes;
        false ->
            [Event | Next] = case Events of [] -> All; _ -> Events end,
            Index = Round rem length(Nodes) + 1,
            Begun = erlang:monotonic_time(millisecond),
            Nodes1 = happen(Event, Index, Nodes, Specs),
            meshed(Nodes1),
            Healed = erlang:monotonic_time(millisecond),
            Reports = going(Nodes1),
            Going = erlang:monotonic_time(millisecond),
            io:format("soak: round ~b: ~s ~s, linked after ~b ms, all goes on after ~b; ~b bulk, ~b messages, "
                      "~b calls, ~b breaks; ~s~n",
                      [Round, Event, name(lists:nth(Index, Nodes)), Healed - Begun, Going - Begun,
                       sum(bulk, Reports), sum(messages, Reports), sum(calls, Reports), sum(breaks, Reports),
                       memory(Nodes1)]),
            storm(Nodes1, Specs, Deadline, Round + 1, Next, All)
    end.

happen(kill, Index, Nodes, Specs) ->
    {Left, [Node | Right]} = lists:split(Index - 1, Nodes),
    ok = macula_test_nodes:kill(Node),
    {ok, Again} = macula_test_nodes:start(lists:nth(Index, Specs)),
    Nodes1 = Left ++ [Again | Right],
    load(Again, Nodes1),
    Nodes1;
happen(stop_short, Index, Nodes, _Specs) ->
    stop(?SHORT_MS, Index, Nodes);
happen(stop_long, Index, Nodes, _Specs) ->
    stop(?LONG_MS, Index, Nodes).

stop(Ms, Index, Nodes) ->
    Node = lists:nth(Index, Nodes),
    ok = macula_test_nodes:pause(Node),
    receive after Ms -> ok end,
    ok = macula_test_nodes:resume(Node),
    Nodes.

%% What was done since the event: each kind of load, from each node.
going(Nodes) ->
    [ok = verify(call(Node, macula_soak_load, report, [])) || Node <- Nodes],
    [done(Node, Nodes) || Node <- Nodes].

done(Node, Nodes) ->
    Sums = counters:new(4, []),
    Keys = [{1, bulk}, {2, messages}, {3, calls}, {4, breaks}],
    try wait_until(fun() ->
        Report = call(Node, macula_soak_load, report, []),
        ok = verify(Report),
        [counters:add(Sums, Index, maps:get(Key, Report)) || {Index, Key} <- Keys],
        Done = maps:from_list([{Key, counters:get(Sums, Index)} || {Index, Key} <- Keys]),
        case Done of
            #{bulk := B, messages := M, calls := C} when B > 0, M > 0, C > 0 -> {value, Done};
            _ -> Done
        end
    end, ?GOING_MS)
    catch
        error:{not_reached, What, _} ->
            error({stands_still, name(Node), What, [{name(N), call(N, macula_soak_load, states, [])} || N <- Nodes]})
    end.
