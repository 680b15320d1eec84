%% @doc `make soak': a cluster under load on a bad network. Every few seconds the network changes
%% (loss, delay, rate, cuts, new NAT ports), now and then a node is killed and comes back. At the end
%% the network heals, the load stops, and nothing may be left: not a process, a file or a megabyte
%% more than at the start. Of native memory the VM knows nothing: nodes at rest are compared after a first part of
%% the storm, and in the end. The first node is never killed, so it has lived through all of that.
-module(macula_soak).

-export([main/1]).
%% For the other soaks.
-export([run/2, relay/2, spec/3, meshed/1, verify/1, memory/1, sum/2]).

-import(macula_test_nodes, [call/4, call/5, name/1, wait_until/2]).

-define(NAMES, ["soak1", "soak2", "soak3"]).
-define(HEAL_MS, 60000).
-define(MAX_MB, 600).
%% The first part of the storm is one of so many.
-define(WARM_UP, 3).
%% How long a node takes to give back what a load has left.
-define(SETTLE_MS, 3000).
%% What native memory may grow by after that: the system's allocator keeps some of what was once under way.
-define(NATIVE_KB, 12000).

%% @doc Argument: minutes.
-spec main([string()]) -> no_return().
main([Minutes]) ->
    Seed = list_to_integer(os:getenv("MACULA_SOAK_SEED", integer_to_list(os:system_time(second)))),
    _ = rand:seed(exsss, Seed),
    io:format("soak: ~s minutes, MACULA_SOAK_SEED=~b~n", [Minutes, Seed]),
    run("soak", fun() -> soak(list_to_integer(Minutes) * 60000) end).

%% @doc Runs a soak, says how it went and halts.
-spec run(string(), fun(() -> term())) -> no_return().
run(Name, Soak) ->
    try
        _ = Soak(),
        io:format("~s: ok~n", [Name]),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format(standard_error, "~s: FAILED: ~tp~n", [Name, {Class, Reason, Stack}]),
            halt(1)
    end.

soak(Ms) ->
    Ports = [{Name, macula_test_nodes:free_udp_port()} || Name <- ?NAMES],
    Relays = [{Name, relay(Port, #{})} || {Name, Port} <- Ports],
    Specs = [spec(Name, Port, Relays) || {Name, Port} <- Ports],
    macula_test_nodes:with_nodes(Specs, fun(Nodes) ->
        meshed(Nodes),
        %% OTP's resolver is a program with pipes, started when first asked, and stays.
        [{ok, _} = call(Node, inet, getaddr, ["localhost", inet]) || Node <- Nodes],
        Before = [macula_test_nodes:snapshot(Node) || Node <- Nodes],
        Begun = now_ms(),
        load(Nodes),
        Zero = #{round => 1, killed => 0, done => 0},
        {Warm, First} = storm(Nodes, Specs, Relays, Begun + Ms div ?WARM_UP, Zero),
        {AtRest, _} = at_rest(Warm, Relays),
        load(Warm),
        {Last, #{killed := Killed, done := Done}} = storm(Warm, Specs, Relays, Begun + Ms, First#{done := 0}),
        try
            {InTheEnd, DoneLast} = at_rest(Last, Relays),
            ok = flat(AtRest, InTheEnd, Done + DoneLast),
            %% A node that was started anew is compared with what it was when the first one was new.
            [ok = macula_test_nodes:await_no_leak(Node, Snapshot)
             || {Node, Snapshot} <- lists:zip(Last, Before)],
            io:format("soak: nothing is left behind; ~b nodes were killed~n", [Killed])
        after
            [macula_test_nodes:stop(Node) || Node <- Last]
        end
    end).

%% @doc A relay to a port of this host, with these options.
-spec relay(inet:port_number(), map()) -> pid().
relay(Port, Options) ->
    {ok, Relay} = macula_relay:start_link(Options#{target => {{127, 0, 0, 1}, Port}}),
    Relay.

%% @doc A node, as macula_test_nodes wants it. Every node finds the others behind their relays.
-spec spec(string(), inet:port_number(), [{string(), pid()}]) -> map().
spec(Name, Port, Relays) ->
    Table = maps:from_list([{list_to_atom(Other ++ "@127.0.0.1"),
                             {"127.0.0.1", macula_relay:port(Relay)}}
                            || {Other, Relay} <- Relays, Other =/= Name]),
    #{carrier => macula, name => Name,
      args => ["-no_epmd", "-start_epmd", "false", "-macula_dist_port", integer_to_list(Port),
               "-macula", "dist_nodes", lists:flatten(io_lib:format("~0p", [Table])),
               %% Parts of the mesh come and go by themselves here.
               "-kernel", "prevent_overlapping_partitions", "false", "logger_level", "error"]}.

load(Nodes) ->
    [ok = call(Node, macula_soak_load, start, [[name(N) || N <- Nodes, N =/= Node]])
     || Node <- Nodes],
    ok.

%% @doc Waits until each node is connected with each other.
-spec meshed([map()]) -> ok.
meshed(Nodes) ->
    Names = lists:sort([name(Node) || Node <- Nodes]),
    wait_until(fun() ->
        lists:all(fun(Node) ->
            [call(Node, net_adm, ping, [Name], ?HEAL_MS) || Name <- Names, Name =/= name(Node)],
            lists:sort([name(Node) | call(Node, erlang, nodes, [])]) =:= Names
        end, Nodes)
    end, ?HEAL_MS).

%% Stops the load. Answers the native memory of the nodes, by process, when nothing is under way, and what the first
%% node has done since it was asked last.
at_rest(Nodes, Relays) ->
    [calm(Relay) || {_, Relay} <- Relays],
    meshed(Nodes),
    Reports = [call(Node, macula_soak_load, stop, []) || Node <- Nodes],
    [ok = verify(Report) || Report <- Reports],
    %% Collects garbage.
    [macula_test_nodes:snapshot(Node) || Node <- Nodes],
    pause(?SETTLE_MS),
    {maps:from_list([{macula_test_nodes:os_pid(Node), {name(Node), macula_test_nodes:native_kb(Node)}}
                     || Node <- Nodes]), done(Reports)}.

done([#{messages := Messages, calls := Calls} | _]) ->
    Messages + Calls.

%% Compares the nodes that were there before.
flat(Before, After, Done) ->
    Grown = [{Name, round(NewKb - OldKb)}
             || {OsPid, {Name, OldKb}} <- maps:to_list(Before), {_, NewKb} <- [maps:get(OsPid, After, {gone, unknown})],
                OldKb =/= unknown, NewKb =/= unknown],
    [io:format("soak: native memory of ~s has grown by ~b KB in ~b messages and calls of the first node~n",
               [Name, Kb, Done]) || {Name, Kb} <- Grown],
    case [Much || {_, Kb} = Much <- Grown, Kb > ?NATIVE_KB] of
        [] -> ok;
        Leaks -> error({native_memory_has_grown, Leaks})
    end.

%% Returns the nodes as they are at the end, and what has happened.
storm(Nodes, Specs, Relays, Deadline, #{round := Round, killed := Killed, done := Done} = State) ->
    case now_ms() >= Deadline of
        true ->
            {Nodes, State};
        false ->
            [weather(Relay) || {_, Relay} <- Relays],
            {Nodes1, Killed1} = case Round rem 6 of
                0 -> {kill(1 + rand:uniform(length(Nodes) - 1), Nodes, Specs), Killed + 1};
                _ -> {Nodes, Killed}
            end,
            pause(2000 + rand:uniform(8000)),
            [calm(Relay) || {_, Relay} <- Relays],
            meshed(Nodes1),
            Reports = [call(Node, macula_soak_load, report, []) || Node <- Nodes1],
            [ok = verify(Report) || Report <- Reports],
            io:format("soak: round ~b: ~b messages, ~b calls, ~b breaks; ~s~n",
                      [Round, sum(messages, Reports), sum(calls, Reports), sum(breaks, Reports), memory(Nodes1)]),
            storm(Nodes1, Specs, Relays, Deadline,
                  State#{round := Round + 1, killed := Killed1, done := Done + done(Reports)})
    end.

%% @doc What all did of something.
-spec sum(atom(), [macula_soak_load:report()]) -> non_neg_integer().
sum(Key, Reports) ->
    lists:sum([maps:get(Key, Report) || Report <- Reports]).

%% @doc Fails where something went wrong.
-spec verify(macula_soak_load:report()) -> ok.
verify(#{violations := []}) -> ok;
verify(#{violations := Violations}) -> error({violations, Violations}).

%% @doc The memory of the nodes, for people. Fails where it is too much.
-spec memory([map()]) -> string().
memory(Nodes) ->
    string:join([integer_to_list(resident_mb(Node)) || Node <- Nodes], "/") ++ " MB".

%% Native memory counts, too. Over the limit something grows that should not: the load has a few
%% megabytes under way.
resident_mb(Node) ->
    case resident(Node) of
        Mb when Mb < ?MAX_MB -> Mb;
        Mb -> error({too_much_memory, name(Node), Mb})
    end.

resident(Node) ->
    case file:read_file("/proc/" ++ macula_test_nodes:os_pid(Node) ++ "/statm") of
        {ok, Statm} -> binary_to_integer(lists:nth(2, binary:split(Statm, <<" ">>, [global]))) * 4 div 1024;
        {error, _} -> call(Node, erlang, memory, [total]) div 1000000
    end.

weather(Relay) ->
    Loss = lists:nth(rand:uniform(4), [0, 0.001, 0.01, 0.05]),
    Delay = lists:nth(rand:uniform(4), [0, 1, 10, 50]),
    Rate = lists:nth(rand:uniform(3), [infinity, 25000000, 2500000]),
    ok = macula_relay:set(Relay, #{loss => Loss, delay_ms => Delay, rate => Rate,
                                   blackhole => rand:uniform(6) =:= 1}),
    case rand:uniform(4) of
        1 -> macula_relay:rebind(Relay);
        _ -> ok
    end.

calm(Relay) ->
    ok = macula_relay:set(Relay, #{loss => 0, delay_ms => 0, rate => infinity, blackhole => false}).

kill(Index, Nodes, Specs) ->
    {Left, [Node | Right]} = lists:split(Index - 1, Nodes),
    io:format("soak: kill -9 ~s~n", [name(Node)]),
    ok = macula_test_nodes:kill(Node),
    {ok, Again} = macula_test_nodes:start(lists:nth(Index, Specs)),
    ok = call(Again, macula_soak_load, start, [[name(N) || N <- Left ++ Right]]),
    Left ++ [Again | Right].

pause(Ms) ->
    receive after Ms -> ok end.

now_ms() ->
    erlang:monotonic_time(millisecond).
