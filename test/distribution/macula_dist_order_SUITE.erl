%% Erlang's promise about signals: what one process sends to another arrives in the order sent. On
%% a connection with many streams this is the first thing to break, and loss is what shows it. Each
%% case runs over a clean link and over one that loses 1 % of its datagrams, beside bulk traffic; some run over links
%% that lose 5 % in one direction, and on one lane. With MACULA_SOAK all run in each weather, on the lanes that
%% MACULA_TEST_DIST_ARGS says.
-module(macula_dist_order_SUITE).

-export([suite/0, all/0, groups/0, init_per_suite/1, end_per_suite/1, init_per_group/2,
         end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([reply_is_not_overtaken_by_the_exit_after_it/1, reply_of_a_server_that_stops_is_seen_before_its_exit/1,
         message_is_not_overtaken_by_the_down_by_name_after_it/1,
         message_is_not_overtaken_by_the_down_by_pid_after_it/1,
         message_is_not_overtaken_by_the_link_exit_after_it/1,
         send_by_name_and_by_pid_keep_their_order/1, send_by_alias_and_by_pid_keep_their_order/1,
         spawn_reply_precedes_all_of_the_child/1, erpc_500_times/1, storm_of_calls_is_answered/1,
         storm_of_spawn_requests_keeps_the_order_of_each/1, pg_and_global_follow_beside_bulk/1,
         big_message_is_not_overtaken_by_the_small_one_after_it/1,
         one_sender_to_many_receivers_keeps_each_order/1,
         many_senders_to_one_receiver_keep_each_order/1, exit_signal_does_not_overtake_messages/1,
         unlink_and_link_keep_their_order/1, demonitor_and_monitor_keep_their_order/1,
         group_leader_signal_keeps_its_order/1]).
%% As a server at the nodes.
-export([init/1, handle_call/3, handle_cast/2]).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    Groups = case os:getenv("MACULA_SOAK") of
        false -> [clean, lost_1, up_5_in_short, down_5_in_short, lost_5_on_one_lane_in_short];
        _ -> weathers()
    end,
    [{group, Group} || Group <- Groups].

groups() ->
    [{Weather, [], cases()} || Weather <- weathers()]
        ++ [{Group, [], quick_cases()} || Group <- [up_5_in_short, down_5_in_short, lost_5_on_one_lane_in_short]].

cases() ->
    [reply_is_not_overtaken_by_the_exit_after_it, reply_of_a_server_that_stops_is_seen_before_its_exit,
     message_is_not_overtaken_by_the_down_by_name_after_it,
     message_is_not_overtaken_by_the_down_by_pid_after_it,
     message_is_not_overtaken_by_the_link_exit_after_it,
     send_by_name_and_by_pid_keep_their_order,
     send_by_alias_and_by_pid_keep_their_order,
     spawn_reply_precedes_all_of_the_child, erpc_500_times, storm_of_calls_is_answered,
     storm_of_spawn_requests_keeps_the_order_of_each, pg_and_global_follow_beside_bulk,
     big_message_is_not_overtaken_by_the_small_one_after_it,
     one_sender_to_many_receivers_keeps_each_order,
     many_senders_to_one_receiver_keep_each_order,
     exit_signal_does_not_overtake_messages,
     unlink_and_link_keep_their_order, demonitor_and_monitor_keep_their_order,
     group_leader_signal_keeps_its_order].

%% Those that are soon over on a bad link, too.
quick_cases() ->
    [reply_of_a_server_that_stops_is_seen_before_its_exit,
     send_by_name_and_by_pid_keep_their_order,
     send_by_alias_and_by_pid_keep_their_order, storm_of_calls_is_answered,
     storm_of_spawn_requests_keeps_the_order_of_each,
     big_message_is_not_overtaken_by_the_small_one_after_it,
     one_sender_to_many_receivers_keeps_each_order,
     many_senders_to_one_receiver_keep_each_order].

weathers() ->
    [clean, lost_0_2, lost_1, lost_5, up_0_2, up_1, up_5, down_0_2, down_1, down_5].

%% Percent of the datagrams, towards B (up), towards A (down) or both ways.
weather(clean) -> #{};
weather(lost_0_2) -> #{loss => 0.002};
weather(lost_1) -> #{loss => 0.01};
weather(lost_5) -> #{loss => 0.05};
weather(up_0_2) -> #{up => weather(lost_0_2)};
weather(up_1) -> #{up => weather(lost_1)};
weather(up_5) -> #{up => weather(lost_5)};
weather(down_0_2) -> #{down => weather(lost_0_2)};
weather(down_1) -> #{down => weather(lost_1)};
weather(down_5) -> #{down => weather(lost_5)};
weather(up_5_in_short) -> weather(up_5);
weather(down_5_in_short) -> weather(down_5);
weather(lost_5_on_one_lane_in_short) -> weather(lost_5).

node_options(lost_5_on_one_lane_in_short) -> #{args => ["-macula_dist_lanes", "1"]};
node_options(_) -> #{}.

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).

%% The relay ends with its starter, and a group's begin runs in a process of its own: a keeper.
init_per_group(Group, Config0) ->
    Config = macula_dist_case:case_begin(Group, Config0),
    case {Group, macula_dist_case:carrier()} of
        {_, Carrier} when Carrier =/= "macula", Group =/= clean ->
            {skip, "only UDP can be relayed"};
        _ ->
            {Keeper, {A, B, _}} = macula_dist_case:keep(fun() ->
                macula_dist_case:relayed_pair((weather(Group))#{delay_ms => 1, seed => 1}, node_options(Group))
            end),
            [{keeper, Keeper}, {a, A}, {b, B} | Config]
    end.

end_per_group(Group, Config) ->
    lists:foreach(fun(Key) -> macula_dist_case:stop(proplists:get_value(Key, Config)) end, [a, b]),
    ok = macula_dist_case:drop(proplists:get_value(keeper, Config)),
    macula_dist_case:case_end(Group, Config).

%% Bulk traffic in both directions, from other processes, while the case runs.
init_per_testcase(_Case, Config) ->
    A = proplists:get_value(a, Config),
    B = proplists:get_value(b, Config),
    NodeB = macula_dist_case:node_of(B),
    Bulk = macula_dist_case:call(A, fun() ->
        Caller = self(),
        [spawn(fun() -> bulk(NodeB, Direction, Caller) end) || Direction <- [there, back]]
    end),
    [{bulk, Bulk} | Config].

end_per_testcase(_Case, Config) ->
    A = proplists:get_value(a, Config),
    B = proplists:get_value(b, Config),
    macula_dist_case:call(A, fun() ->
        [exit(P, kill) || P <- proplists:get_value(bulk, Config)], ok
    end),
    case macula_dist_case:connected(A, B) of
        true -> ok;
        false -> {fail, connection_lost}
    end.

bulk(NodeB, Direction, _Caller) ->
    Echo = spawn_link(NodeB, fun bulk_echo/0),
    Bin = binary:copy(<<0>>, 300000),
    bulk_loop(Direction, Echo, Bin).

bulk_loop(there, Echo, Bin) ->
    Echo ! {self(), size, Bin},
    receive {Echo, _} -> bulk_loop(there, Echo, Bin) end;
bulk_loop(back, Echo, Bin) ->
    Echo ! {self(), want, byte_size(Bin)},
    receive {Echo, _} -> bulk_loop(back, Echo, Bin) end.

bulk_echo() ->
    receive
        {From, size, Bin} -> From ! {self(), byte_size(Bin)}, bulk_echo();
        {From, want, N} -> From ! {self(), binary:copy(<<1>>, N)}, bulk_echo()
    end.

at_a(Config, Fun) ->
    NodeB = macula_dist_case:node_of(proplists:get_value(b, Config)),
    macula_dist_case:call(proplists:get_value(a, Config), Fun, [NodeB]).

times(N, Fun) ->
    lists:foreach(Fun, lists:seq(1, N)).

next() ->
    receive M -> M after 30000 -> error(nothing_came) end.

%% -- cases ----------------------------------------------------------------------------------------

reply_is_not_overtaken_by_the_exit_after_it(Config) ->
    ok = at_a(Config, fun(B) ->
        times(300, fun(N) ->
            Server = spawn(B, fun() -> server_once() end),
            %% gen_server:call: monitors, asks, exits with the server's reason when DOWN is first
            N = gen_server:call(Server, N, 30000)
        end)
    end).

server_once() ->
    receive {'$gen_call', From, N} -> gen_server:reply(From, N), exit(stopped) end.

%% It stops with the reply, which is large: `{stop, normal, Reply, State}'. One after the other, and many at once.
reply_of_a_server_that_stops_is_seen_before_its_exit(Config) ->
    ok = at_a(Config, fun(B) ->
        times(40, fun(N) -> ask_server(B, N) end),
        at_once(10, fun(_) -> times(20, fun(N) -> ask_server(B, N) end) end)
    end).

ask_server(B, N) ->
    {ok, Server} = erpc:call(B, gen_server, start, [?MODULE, N, []], 30000),
    {N, <<_:20000/binary>>} = gen_server:call(Server, reply, 30000).

init(N) -> {ok, N}.

handle_call(reply, _From, N) -> {stop, normal, {N, binary:copy(<<N:16>>, 10000)}, N}.

handle_cast(_, N) -> {noreply, N}.

%% So many processes run Fun at the same time, and all come to an end.
at_once(Count, Fun) ->
    Workers = [spawn_monitor(fun() -> Fun(Number) end) || Number <- lists:seq(1, Count)],
    lists:foreach(fun({P, M}) ->
        receive {'DOWN', M, process, P, Reason} -> normal = Reason after 60000 -> error({stuck, P}) end
    end, Workers).

message_is_not_overtaken_by_the_down_by_name_after_it(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        times(200, fun(N) ->
            Name = list_to_atom("order_" ++ integer_to_list(N)),
            P = spawn(B, fun() ->
                register(Name, self()),
                Self ! {registered, N},
                receive go -> Self ! {last_words, N} end
            end),
            {registered, N} = next(),
            M = monitor(process, {Name, B}),
            P ! go,
            {last_words, N} = next(),
            {'DOWN', M, process, {Name, B}, normal} = next()
        end)
    end).

message_is_not_overtaken_by_the_down_by_pid_after_it(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        times(300, fun(N) ->
            {P, M} = spawn_monitor(B, fun() -> Self ! {last_words, N}, exit(N) end),
            {last_words, N} = next(),
            {'DOWN', M, process, P, N} = next()
        end)
    end).

message_is_not_overtaken_by_the_link_exit_after_it(Config) ->
    ok = at_a(Config, fun(B) ->
        process_flag(trap_exit, true),
        Self = self(),
        times(300, fun(N) ->
            P = spawn_link(B, fun() -> Self ! {last_words, N}, exit({reason, N}) end),
            {last_words, N} = next(),
            {'EXIT', P, {reason, N}} = next()
        end)
    end).

send_by_name_and_by_pid_keep_their_order(Config) ->
    ok = at_a(Config, fun(B) ->
        P = named_collector(B, order_by_name),
        times(500, fun(N) ->
            {order_by_name, B} ! {1, N},
            P ! {2, N}
        end),
        Expected = lists:append([[{1, N}, {2, N}] || N <- lists:seq(1, 500)]),
        Expected = collected(P, length(Expected)),
        ok
    end).

send_by_alias_and_by_pid_keep_their_order(Config) ->
    ok = at_a(Config, fun(B) ->
        P = named_collector(B, order_by_alias),
        P ! {alias, self()},
        Alias = next(),
        times(500, fun(N) ->
            Alias ! {1, N},
            P ! {2, N},
            {order_by_alias, B} ! {3, N}
        end),
        Expected = lists:append([[{1, N}, {2, N}, {3, N}] || N <- lists:seq(1, 500)]),
        Expected = collected(P, length(Expected)),
        ok
    end).

named_collector(B, Name) ->
    Self = self(),
    P = spawn_link(B, fun() -> register(Name, self()), Self ! ready, collector([], 0) end),
    ready = next(),
    P.

collector(Acc, N) ->
    receive
        {alias, From} -> From ! alias(), collector(Acc, N);
        {get, From, Wanted} when N >= Wanted ->
            From ! {collected, lists:reverse(Acc)};
        {Tag, _} = M when is_integer(Tag) -> collector([M | Acc], N + 1)
    end.

collected(P, Wanted) ->
    unlink(P),
    P ! {get, self(), Wanted},
    {collected, List} = next(),
    List.

spawn_reply_precedes_all_of_the_child(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        times(300, fun(N) ->
            R = spawn_request(B, fun() -> Self ! {child, N}, exit(N) end, [monitor]),
            {spawn_reply, R, ok, P} = next(),
            {child, N} = next(),
            {'DOWN', R, process, P, N} = next()
        end)
    end).

erpc_500_times(Config) ->
    ok = at_a(Config, fun(B) ->
        times(500, fun(N) -> N = erpc:call(B, erlang, abs, [-N], 30000) end)
    end).

storm_of_calls_is_answered(Config) ->
    ok = at_a(Config, fun(B) ->
        at_once(50, fun(Number) ->
            times(20, fun(N) ->
                Bin = binary:copy(<<Number, N>>, N * 300),
                Bin = erpc:call(B, fun() -> Bin end, 60000)
            end)
        end)
    end).

%% With a link, with a monitor and with both: the reply, what the child says, and then its end.
storm_of_spawn_requests_keeps_the_order_of_each(Config) ->
    ok = at_a(Config, fun(B) ->
        at_once(50, fun(_) ->
            process_flag(trap_exit, true),
            Self = self(),
            times(20, fun(N) ->
                Options = lists:nth(N rem 3 + 1, [[link], [monitor], [link, monitor]]),
                R = spawn_request(B, fun() ->
                    Self ! {child, N, binary:copy(<<0>>, N * 500)},
                    exit({bye, N})
                end, Options),
                {spawn_reply, R, ok, P} = next(),
                {child, N, _} = next(),
                Options = lists:sort([case next() of
                    {'DOWN', R, process, P, {bye, N}} -> monitor;
                    {'EXIT', P, {bye, N}} -> link
                end || _ <- Options])
            end)
        end)
    end).

pg_and_global_follow_beside_bulk(Config) ->
    ok = at_a(Config, fun(B) ->
        Scope = order_scope,
        Self = self(),
        {ok, Pg} = pg:start(Scope),
        There = spawn(B, fun() ->
            {ok, _} = pg:start(Scope),
            Self ! {self(), started},
            receive stop -> ok end
        end),
        receive {There, started} -> ok end,
        times(8, fun(N) ->
            Joined = erpc:call(B, fun() ->
                [begin
                    P = spawn(fun() -> receive stop -> ok end end),
                    ok = pg:join(Scope, N, P),
                    P
                end || _ <- lists:seq(1, 20)]
            end, 30000),
            ok = macula_test_nodes:wait_until(fun() ->
                lists:sort(pg:get_members(Scope, N)) =:= lists:sort(Joined)
            end),
            [P ! stop || P <- Joined],
            ok = macula_test_nodes:wait_until(fun() -> pg:get_members(Scope, N) =:= [] end),
            Name = {order, N},
            yes = global:register_name(Name, Self),
            Self = erpc:call(B, global, whereis_name, [Name], 30000),
            no = erpc:call(B, fun() -> global:register_name(Name, whereis(init)) end, 30000),
            true = global:set_lock({Name, Self}),
            false = erpc:call(B, fun() -> global:set_lock({Name, self()}, [node(Self), B], 0) end, 30000),
            true = global:del_lock({Name, Self}),
            _ = global:unregister_name(Name),
            undefined = erpc:call(B, global, whereis_name, [Name], 30000)
        end),
        There ! stop,
        gen_server:stop(Pg)
    end).

%% A fragmented message and what follows it, in one sender's order, sizes around the fragment's.
big_message_is_not_overtaken_by_the_small_one_after_it(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        Sizes = [0, 1, 100, 65535, 65536, 65537, 131072, 400000, 1000000],
        P = spawn_link(B, fun() -> sizes_to(Self) end),
        Sent = [lists:nth(N * 7 rem length(Sizes) + 1, Sizes) || N <- lists:seq(1, 150)],
        lists:foreach(fun(Size) -> P ! {n, binary:copy(<<7>>, Size)} end, Sent),
        Sent = [next() || _ <- Sent],
        unlink(P),
        exit(P, kill),
        ok
    end).

sizes_to(Pid) ->
    receive {n, Bin} -> Pid ! byte_size(Bin), sizes_to(Pid) end.

one_sender_to_many_receivers_keeps_each_order(Config) ->
    ok = at_a(Config, fun(B) ->
        Receivers = [spawn_link(B, fun() -> collector([], 0) end) || _ <- lists:seq(1, 20)],
        times(200, fun(N) ->
            Payload = binary:copy(<<N>>, case N rem 50 of 0 -> 200000; _ -> N end),
            [P ! {N, byte_size(Payload)} || P <- Receivers],
            hd(Receivers) ! {N, Payload}
        end),
        [First | Rest] = [[N || {N, _} <- collected(P, 200)] || P <- Receivers],
        Once = lists:seq(1, 200),
        [Once = L || L <- Rest],
        %% The first may be asked before its doubled messages are all there: order is what counts.
        First = lists:sort(First),
        ok
    end).

many_senders_to_one_receiver_keep_each_order(Config) ->
    ok = at_a(Config, fun(B) ->
        Senders = 40,
        Each = 100,
        P = spawn_link(B, fun() -> collector([], 0) end),
        times(Senders, fun(S) ->
            spawn_link(fun() ->
                times(Each, fun(N) ->
                    P ! {S, {N, binary:copy(<<0>>, S * N * 13 rem 3000)}}
                end)
            end)
        end),
        All = collected(P, Senders * Each),
        Expected = lists:seq(1, Each),
        times(Senders, fun(S) -> Expected = [N || {Sender, {N, _}} <- All, Sender =:= S] end)
    end).

exit_signal_does_not_overtake_messages(Config) ->
    ok = at_a(Config, fun(B) ->
        process_flag(trap_exit, true),
        Self = self(),
        times(100, fun(N) ->
            P = spawn_link(B, fun() ->
                process_flag(trap_exit, true),
                Self ! {trapping, N},
                collector_until_exit([])
            end),
            %% Until it has run the signal would simply end it.
            {trapping, N} = next(),
            times(10, fun(I) -> P ! {I, I} end),
            exit(P, {stop, N}),
            {'EXIT', P, {got, Got, {stop, N}}} = next(),
            Got = lists:seq(1, 10)
        end)
    end).

collector_until_exit(Acc) ->
    receive
        {I, I} -> collector_until_exit([I | Acc]);
        {'EXIT', _, Why} -> exit({got, lists:reverse(Acc), Why})
    end.

unlink_and_link_keep_their_order(Config) ->
    ok = at_a(Config, fun(B) ->
        process_flag(trap_exit, true),
        times(200, fun(N) ->
            P = spawn_link(B, fun() -> receive {die, N} -> exit(N) end end),
            unlink(P),
            link(P),
            unlink(P),
            link(P),
            P ! {die, N},
            {'EXIT', P, N} = next()
        end)
    end).

demonitor_and_monitor_keep_their_order(Config) ->
    ok = at_a(Config, fun(B) ->
        times(200, fun(N) ->
            P = spawn(B, fun() -> receive {die, N} -> exit(N) end end),
            M1 = monitor(process, P),
            demonitor(M1),
            M2 = monitor(process, P),
            P ! {die, N},
            {'DOWN', M2, process, P, N} = next()
        end)
    end).

group_leader_signal_keeps_its_order(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        times(200, fun(N) ->
            P = spawn_link(B, fun() -> receive {which, N} -> Self ! group_leader() end end),
            group_leader(Self, P),
            P ! {which, N},
            Self = next(),
            unlink(P)
        end)
    end).
