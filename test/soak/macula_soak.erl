%% @doc `make soak': a cluster under load on a bad network. Every few seconds the network changes
%% (loss, delay, rate, cuts, new NAT ports), now and then a node is killed and comes back. At the end
%% the network heals, the load stops, and nothing may be left: not a process, a file or a megabyte
%% more than at the start.
-module(macula_soak).

-export([main/1]).
%% For the other soaks.
-export([run/2, relay/2, spec/3, meshed/1, verify/1, memory/1, sum/2]).

-import(macula_test_nodes, [call/4, call/5, name/1, wait_until/2]).

-define(NAMES, ["soak1", "soak2", "soak3"]).
-define(HEAL_MS, 60000).
-define(MAX_MB, 600).

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
        load(Nodes),
        Deadline = now_ms() + Ms,
        {Last, Killed} = storm(Nodes, Specs, Relays, Deadline, 1, #{}),
        try
            [calm(Relay) || {_, Relay} <- Relays],
            meshed(Last),
            Reports = [call(Node, macula_soak_load, stop, []) || Node <- Last],
            [ok = verify(Report) || Report <- Reports],
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

%% Returns the nodes as they are at the end, and how many were killed.
storm(Nodes, Specs, Relays, Deadline, Round, Killed) ->
    case now_ms() >= Deadline of
        true ->
            {Nodes, lists:sum(maps:values(Killed))};
        false ->
            [weather(Relay) || {_, Relay} <- Relays],
            Index = rand:uniform(length(Nodes)),
            {Nodes1, Killed1} = case Round rem 6 of
                0 ->
                    {kill(Index, Nodes, Specs),
                     maps:update_with(Index, fun(N) -> N + 1 end, 1, Killed)};
                _ ->
                    {Nodes, Killed}
            end,
            pause(2000 + rand:uniform(8000)),
            [calm(Relay) || {_, Relay} <- Relays],
            meshed(Nodes1),
            Reports = [call(Node, macula_soak_load, report, []) || Node <- Nodes1],
            [ok = verify(Report) || Report <- Reports],
            io:format("soak: round ~b: ~b messages, ~b calls, ~b breaks; ~s~n",
                      [Round, sum(messages, Reports), sum(calls, Reports), sum(breaks, Reports), memory(Nodes1)]),
            storm(Nodes1, Specs, Relays, Deadline, Round + 1, Killed1)
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
