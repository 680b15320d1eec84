%% Nobody waits behind somebody else's bulk: a small message goes past what another process sends in bulk,
%% the one who fills a link waits alone, and no order that programs lean on is lost.
-module(macula_dist_lanes_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([small_messages_pass_bulk/1, small_messages_pass_bulk_where_packets_are_lost/1,
         many_small_senders_get_through_beside_many_bulk_senders/1, one_lane_is_one_total_order/1,
         one_lane_lets_small_messages_through/1, wrong_flag_keeps_a_node_from_starting/1, window_is_what_a_link_fills/1,
         only_the_bulk_sender_waits/1, whoever_suspends_a_held_sender_resumes_it/1,
         sender_that_is_suspended_already_is_held_too/1, sender_that_exits_with_much_unsent_loses_nothing/1,
         held_sender_may_be_told_to_exit/1, noconnect_sender_is_held_as_any_other/1,
         slow_node_of_several_keeps_waiting_who_sends_to_it_alone/1,
         sender_held_by_two_links_goes_on/1, senders_of_every_priority_are_held_and_go_on/1,
         held_sender_goes_on_when_the_link_ends/1, held_sender_goes_on_when_its_output_handler_is_killed/1,
         traced_sender_is_held_and_goes_on/1, link_that_stands_still_tells_nosuspend_senders/1, net_kernel_is_never_held/1,
         sender_with_async_dist_does_not_wait/1,
         busy_dist_port_does_not_tell_of_held_senders/1,
         large_packet_put_on_the_link_is_answered_when_there_is_room/1,
         exit_comes_after_all_bulk_of_its_sender/1, down_by_name_comes_after_all_bulk/1,
         bulk_and_small_messages_of_one_sender_keep_their_order/1,
         disconnect_comes_after_what_was_sent/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/4, node_of/1, connect/2, connected/2, eventually/1,
                           eventually/2, needs_macula/1]).

-define(MB, 1000000).
-define(SLOW, #{rate => 10 * ?MB, delay_ms => 5, queue => 200000}).
%% In KB: the queue of the VM has room for all but very large messages.
-define(ROOM, #{args => ["+zdbbl", "65536"]}).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [small_messages_pass_bulk, small_messages_pass_bulk_where_packets_are_lost,
     many_small_senders_get_through_beside_many_bulk_senders, one_lane_is_one_total_order,
     one_lane_lets_small_messages_through, wrong_flag_keeps_a_node_from_starting, window_is_what_a_link_fills,
     only_the_bulk_sender_waits, whoever_suspends_a_held_sender_resumes_it,
     sender_that_is_suspended_already_is_held_too, sender_that_exits_with_much_unsent_loses_nothing,
     held_sender_may_be_told_to_exit, noconnect_sender_is_held_as_any_other,
     slow_node_of_several_keeps_waiting_who_sends_to_it_alone, sender_held_by_two_links_goes_on,
     senders_of_every_priority_are_held_and_go_on, held_sender_goes_on_when_the_link_ends,
     held_sender_goes_on_when_its_output_handler_is_killed, traced_sender_is_held_and_goes_on,
     link_that_stands_still_tells_nosuspend_senders, net_kernel_is_never_held, sender_with_async_dist_does_not_wait,
     busy_dist_port_does_not_tell_of_held_senders,
     large_packet_put_on_the_link_is_answered_when_there_is_room, exit_comes_after_all_bulk_of_its_sender,
     down_by_name_comes_after_all_bulk, bulk_and_small_messages_of_one_sender_keep_their_order,
     disconnect_comes_after_what_was_sent].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- at the nodes ---------------------------------------------------------------------------------

sink() ->
    receive _ -> sink() end.

echo() ->
    receive {From, Ref} -> From ! Ref end,
    echo().

%% Sends without end; says how often it has when it is asked for.
bulk_sender(Nodes, Size, Priority) ->
    Sinks = [spawn(Node, fun sink/0) || Node <- Nodes],
    Bin = binary:copy(<<0>>, Size),
    Counter = counters:new(1, []),
    Pid = spawn(fun() ->
        process_flag(priority, Priority),
        send_all(Sinks, Bin, Counter)
    end),
    {Pid, spawn(fun() -> keep(Counter) end)}.

send_all(Sinks, Bin, Counter) ->
    lists:foreach(fun(Sink) -> Sink ! Bin, counters:add(Counter, 1, 1) end, Sinks),
    send_all(Sinks, Bin, Counter).

keep(Counter) ->
    receive {get, From, Ref} -> From ! {Ref, counters:get(Counter, 1)} end,
    keep(Counter).

count_waits(Counter) ->
    receive
        {monitor, _, busy_dist_port, _} -> counters:add(Counter, 1, 1);
        {get, From, Ref} -> From ! {Ref, counters:get(Counter, 1)}
    end,
    count_waits(Counter).

bulk(N, Nodes) -> bulk(N, Nodes, normal).
bulk(N, Nodes, Priority) -> call(N, fun() -> bulk_sender(Nodes, 1048576, Priority) end).

count(N, Keeper) ->
    call(N, fun() ->
        Ref = make_ref(),
        Keeper ! {get, self(), Ref},
        receive {Ref, Count} -> Count end
    end).

goes_on(N, Keeper) ->
    Before = count(N, Keeper),
    eventually(fun() -> count(N, Keeper) > Before + 3 end, 30000).

%% Sorted round trips in milliseconds, one after the other.
pings(N, Node, Times) ->
    call(N, fun() ->
        Echo = spawn(Node, fun echo/0),
        lists:sort([begin
            {Ms, ok} = macula_dist_case:timed(fun() -> ping(Echo) end),
            receive after 5 -> Ms end
        end || _ <- lists:seq(1, Times)])
    end).

ping(Echo) ->
    Ref = make_ref(),
    Echo ! {self(), Ref},
    receive Ref -> ok end.

status(N, Pid) ->
    {status, Status} = call(N, erlang, process_info, [Pid, status]),
    Status.

is_held(N, Pid) ->
    eventually(fun() -> status(N, Pid) =:= suspended end).

%% -- small beside bulk ------------------------------------------------------------------------------

%% One megabyte alone takes 100 ms on this line, and all that queues and windows may hold a second.
small_messages_pass_bulk(_Config) ->
    passes_bulk(?SLOW, #{}, 60, 150).

small_messages_pass_bulk_where_packets_are_lost(_Config) ->
    passes_bulk(?SLOW#{loss => 0.02, seed => 1}, #{}, 80, 250).

one_lane_lets_small_messages_through(_Config) ->
    passes_bulk(?SLOW, #{args => ["-macula_dist_lanes", "1"]}, 350, 700).

passes_bulk(Line, Options, Median, NearlyAll) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(Line, Options),
        {_, Keeper} = bulk(A, [node_of(B)]),
        ok = goes_on(A, Keeper),
        Before = count(A, Keeper),
        Times = pings(A, node_of(B), 100),
        Sent = count(A, Keeper) - Before,
        ct:log("~b MB meanwhile; ms: ~w", [Sent, Times]),
        true = lists:nth(50, Times) =< Median,
        true = lists:nth(90, Times) =< NearlyAll,
        ok = goes_on(A, Keeper),
        true = connected(A, B)
    end).

many_small_senders_get_through_beside_many_bulk_senders(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        NodeB = node_of(B),
        Bulk = [bulk(A, [NodeB]) || _ <- lists:seq(1, 20)],
        lists:foreach(fun({Pid, _}) -> is_held(A, Pid) end, Bulk),
        Self = self(),
        Pids = [spawn_link(fun() -> Self ! {self(), pings(A, NodeB, 10)} end) || _ <- lists:seq(1, 20)],
        Times = lists:sort(lists:append([receive {Pid, T} -> T end || Pid <- Pids])),
        ct:log("ms: ~w", [Times]),
        true = lists:nth(100, Times) =< 250,
        %% Each of the others has its turn.
        Before = [{Keeper, count(A, Keeper)} || {_, Keeper} <- Bulk],
        ok = eventually(fun() ->
            lists:all(fun({Keeper, Count}) -> count(A, Keeper) > Count end, Before)
        end, 60000)
    end).

%% -- one lane ---------------------------------------------------------------------------------------

%% Another process's small message, sent after a large one, comes after it.
one_lane_is_one_total_order(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW, #{args => ["-macula_dist_lanes", "1"]}),
        lists:foreach(fun(_) -> [large, small] = relayed_order(A, node_of(B)) end, lists:seq(1, 10)),
        %% With two it overtakes, or this case would say nothing.
        {C, D, _} = macula_dist_case:relayed_pair(?SLOW),
        true = lists:member([small, large], [relayed_order(C, node_of(D)) || _ <- lists:seq(1, 10)])
    end).

%% The large message's sender tells the small one's that it has sent.
relayed_order(A, NodeB) ->
    call(A, fun() ->
        Self = self(),
        Sink = spawn(NodeB, fun() -> first_two(Self) end),
        Small = spawn(fun() -> receive go -> Sink ! small end end),
        spawn(fun() ->
            Sink ! {large, binary:copy(<<1>>, 3 * ?MB)},
            Small ! go
        end),
        receive {order, Order} -> Order end
    end).

first_two(To) ->
    First = receive {large, _} -> large; small -> small end,
    Second = receive {large, _} -> large; small -> small end,
    To ! {order, [First, Second]}.

wrong_flag_keeps_a_node_from_starting(_Config) ->
    needs_macula(fun() ->
        lists:foreach(fun({Flag, Value}) ->
            P = macula_dist_case:os_erl(macula_dist_case:carrier_args()
                    ++ ["-" ++ Flag, Value, "-noshell", "-name", macula_dist_case:unique("x") ++ "@127.0.0.1"]),
            {Code, Output} = macula_dist_case:os_await(P, exit, 30000),
            true = Code =/= 0,
            match = re:run(Output, "bad_option,\\s*" ++ Flag, [{capture, none}])
        end, [{"macula_dist_lanes", "0"}, {"macula_dist_lanes", "3"}, {"macula_dist_lanes", "two"},
              {"macula_dist_window", "65535"}, {"macula_dist_window", "1G"}, {"macula_dist_streams", "-1"},
              {"macula_dist_liveness", "999"}, {"macula_dist_congestion", "reno"}])
    end).

%% A round trip of 200 ms: with 64 KiB in each a megabyte takes 3 s.
window_is_what_a_link_fills(_Config) ->
    needs_macula(fun() ->
        [Small, Default] = [begin
            {A, B, Relay} = macula_dist_case:relayed_pair(#{delay_ms => 100}, #{args => Args}),
            Took = call(A, fun() ->
                Sink = spawn(node_of(B), fun echo/0),
                Ref = binary:copy(<<1>>, ?MB),
                Start = erlang:monotonic_time(millisecond),
                Sink ! {self(), Ref},
                receive Ref -> erlang:monotonic_time(millisecond) - Start end
            end),
            ok = macula_relay:stop(Relay),
            Took
        end || Args <- [["-macula_dist_window", "65536"], []]],
        ct:log("~b ms with 64 KiB, ~b ms by default", [Small, Default]),
        %% There and back.
        true = Small >= 5000,
        true = Default < Small
    end).

%% -- who waits --------------------------------------------------------------------------------------

only_the_bulk_sender_waits(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        NodeB = node_of(B),
        {Bulk, _} = bulk(A, [NodeB]),
        is_held(A, Bulk),
        {Small, Keeper} = call(A, fun() ->
            Sink = spawn(NodeB, fun sink/0),
            Counter = counters:new(1, []),
            {spawn(fun() -> send_slowly(Sink, Counter) end), spawn(fun() -> keep(Counter) end)}
        end),
        Seen = [begin
            ok = call(A, timer, sleep, [10]),
            {status(A, Bulk), status(A, Small)}
        end || _ <- lists:seq(1, 100)],
        ct:log("~p", [Seen]),
        true = length([held || {suspended, _} <- Seen]) > 50,
        [] = [held || {_, suspended} <- Seen],
        true = count(A, Keeper) > 50,
        {ok, #{senders_held := Held}} = call(A, macula_dist, info, [NodeB]),
        true = Held > 0
    end).

send_slowly(Sink, Counter) ->
    Sink ! small,
    counters:add(Counter, 1, 1),
    receive after 5 -> send_slowly(Sink, Counter) end.

%% Both have to resume it.
whoever_suspends_a_held_sender_resumes_it(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        {Bulk, Keeper} = bulk(A, [node_of(B)]),
        is_held(A, Bulk),
        Suspender = call(A, fun() ->
            Self = self(),
            Pid = spawn(fun() ->
                true = erlang:suspend_process(Bulk),
                Self ! {self(), suspended},
                receive resume -> true = erlang:resume_process(Bulk) end,
                receive stop -> ok end
            end),
            receive {Pid, suspended} -> Pid end
        end),
        %% The line has taken all that there was long ago.
        ok = eventually(fun() ->
            {ok, #{queued_bytes := Queued}} = call(A, macula_dist, info, [node_of(B)]),
            Queued =:= 0
        end),
        Count = count(A, Keeper),
        ok = call(A, timer, sleep, [1500]),
        Count = count(A, Keeper),
        suspended = status(A, Bulk),
        _ = call(A, erlang, send, [Suspender, resume]),
        ok = goes_on(A, Keeper)
    end).

%% The handler of the link comes to hold a process that somebody has suspended before. Whoever resumes it first, it
%% goes on when both have.
sender_that_is_suspended_already_is_held_too(_Config) ->
    needs_macula(fun() ->
        {A, B, Relay} = macula_dist_case:relayed_pair(?SLOW, ?ROOM),
        lists:foreach(fun(First) -> suspended_before(A, node_of(B), Relay, First) end, [user, link])
    end).

suspended_before(A, NodeB, Relay, First) ->
    [{NodeB, Handler}] = macula_dist_case:controllers(A),
    Suspender = call(A, fun() -> spawn(fun suspender/0) end),
    {Bulk, Keeper} = call(A, fun() ->
        Sink = spawn(NodeB, fun sink/0),
        Counter = counters:new(1, []),
        {spawn(fun() ->
            receive begin_it -> Sink ! binary:copy(<<0>>, 3 * ?MB) end,
            counters:add(Counter, 1, 1),
            receive go_on -> counters:add(Counter, 1, 1) end,
            receive stop -> ok end
        end), spawn(fun() -> keep(Counter) end)}
    end),
    %% What it sends waits in the VM, and then on the line, for 15 seconds.
    ok = macula_relay:set(Relay, #{rate => 200000}),
    ok = ask(A, Suspender, {suspend, Handler}),
    _ = call(A, erlang, send, [Bulk, begin_it]),
    ok = eventually(fun() -> count(A, Keeper) =:= 1 end),
    ok = ask(A, Suspender, {suspend, Bulk}),
    _ = call(A, erlang, send, [Bulk, go_on]),
    ok = ask(A, Suspender, {resume, Handler}),
    ok = eventually(fun() -> holds(A, Handler, Bulk) end),
    suspended = status(A, Bulk),
    LineIsFree = fun() ->
        ok = macula_relay:set(Relay, #{rate => 20 * ?MB}),
        ok = eventually(fun() -> not holds(A, Handler, Bulk) end)
    end,
    Resume = fun() -> ok = ask(A, Suspender, {resume, Bulk}) end,
    [Before, After] = case First of user -> [Resume, LineIsFree]; link -> [LineIsFree, Resume] end,
    ok = Before(),
    {suspended, 1} = {status(A, Bulk), count(A, Keeper)},
    ok = After(),
    ok = eventually(fun() -> count(A, Keeper) =:= 2 end),
    true = call(A, erlang, exit, [Bulk, kill]).

holds(A, Handler, Pid) ->
    {suspending, Held} = call(A, erlang, process_info, [Handler, suspending]),
    lists:keymember(Pid, 1, Held).

%% Suspends and resumes for others, as long as it lives.
suspender() ->
    receive
        {{suspend, Pid}, From, Ref} -> true = erlang:suspend_process(Pid), From ! {Ref, ok};
        {{resume, Pid}, From, Ref} -> true = erlang:resume_process(Pid), From ! {Ref, ok}
    end,
    suspender().

ask(N, Pid, Question) ->
    call(N, fun() ->
        Ref = make_ref(),
        Pid ! {Question, self(), Ref},
        receive {Ref, Answer} -> Answer end
    end).

%% It has ended by the time it is to be held, or ends when it is let go.
sender_that_exits_with_much_unsent_loses_nothing(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        NodeB = node_of(B),
        {Bulk, Keeper} = bulk(A, [NodeB]),
        is_held(A, Bulk),
        lists:foreach(fun(Parts) ->
            {Parts, normal} = parts_and_end(A, NodeB, fun(Sink) -> send_parts(Sink, Parts) end)
        end, [1, 2, 3, 5, 1, 2, 3, 5]),
        ok = goes_on(A, Keeper),
        [] = call(A, fun() ->
            [P || P <- processes(), P =/= Bulk, {status, suspended} =:= process_info(P, status)]
        end)
    end).

send_parts(Sink, Parts) ->
    lists:foreach(fun(N) -> Sink ! {part, N, binary:copy(<<N>>, 150000)} end, lists:seq(1, Parts)).

%% How many parts of such a sender come, in their order, before its end, and how it ended.
parts_and_end(A, NodeB, Fun) ->
    call(A, fun() ->
        Self = self(),
        Sender = spawn(fun() -> receive {sink, Sink} -> Fun(Sink) end end),
        Sink = spawn(NodeB, fun() ->
            Ref = monitor(process, Sender),
            Self ! {self(), ready},
            Self ! {self(), parts_until(Ref, 0)}
        end),
        receive {Sink, ready} -> ok end,
        Sender ! {sink, Sink},
        receive {Sink, Result} -> Result after 30000 -> error(no_end) end
    end).

parts_until(Ref, Count) ->
    Next = Count + 1,
    receive
        {part, Next, _} -> parts_until(Ref, Next);
        {part, Other, _} -> {out_of_order, Other, Next};
        {'DOWN', Ref, process, _, Reason} -> {Count, Reason}
    end.

%% By a signal of another process, and by that of one it is linked to.
held_sender_may_be_told_to_exit(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        NodeB = node_of(B),
        lists:foreach(fun(Kind) ->
            {Parts, Why} = parts_and_end(A, NodeB, fun(Sink) ->
                Self = self(),
                _ = spawn(fun() -> end_when_held(Kind, Self) end),
                send_parts(Sink, 200)
            end),
            ct:log("~p: ~b parts came", [Kind, Parts]),
            Why = Kind,
            %% What it had sent has come, the rest it has not sent.
            true = Parts > 0 andalso Parts < 200
        end, [told, linked, told, linked]),
        %% Others go on.
        {_, Keeper} = bulk(A, [NodeB]),
        [ok = goes_on(A, Keeper) || _ <- [1, 2]]
    end).

end_when_held(linked, Pid) -> true = link(Pid), await_suspended(Pid), exit(linked);
end_when_held(told, Pid) -> await_suspended(Pid), exit(Pid, told).

await_suspended(Pid) ->
    ok = macula_test_nodes:wait_until(fun() -> process_info(Pid, status) =:= {status, suspended} end).

%% It asks for no connection to be made, and there is one. When there is none it is told, and goes on.
noconnect_sender_is_held_as_any_other(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        NodeB = node_of(B),
        {Bulk, Keeper} = call(A, fun() ->
            Sink = spawn(NodeB, fun sink/0),
            Bin = binary:copy(<<0>>, ?MB),
            Counter = counters:new(2, []),
            {spawn(fun() -> send_noconnect(Sink, Bin, Counter) end), spawn(fun() -> keep_two(Counter) end)}
        end),
        is_held(A, Bulk),
        ok = goes_on_without_connection(A, Keeper, 1),
        %% A small one of another process passes.
        ok = call(A, fun() ->
            Echo = spawn(NodeB, fun echo/0),
            Ref = make_ref(),
            ok = erlang:send(Echo, {self(), Ref}, [noconnect]),
            receive Ref -> ok after 5000 -> stuck end
        end),
        is_held(A, Bulk),
        {_, 0} = ask(A, Keeper, get),
        true = call(A, erlang, disconnect_node, [NodeB]),
        ok = goes_on_without_connection(A, Keeper, 2),
        [] = call(A, erlang, nodes, [connected])
    end).

%% Counts what is sent, and what is not as there is no connection.
send_noconnect(Sink, Bin, Counter) ->
    case erlang:send(Sink, Bin, [noconnect]) of
        ok -> counters:add(Counter, 1, 1);
        noconnect -> counters:add(Counter, 2, 1), receive after 1 -> ok end
    end,
    send_noconnect(Sink, Bin, Counter).

keep_two(Counter) ->
    receive {get, From, Ref} -> From ! {Ref, {counters:get(Counter, 1), counters:get(Counter, 2)}} end,
    keep_two(Counter).

goes_on_without_connection(A, Keeper, Which) ->
    Before = element(Which, ask(A, Keeper, get)),
    eventually(fun() -> element(Which, ask(A, Keeper, get)) > Before + 3 end, 30000).

%% One process sends to all nodes in turn, and one line is slow: this one goes at its pace, and stands still while that
%% node does. What others send to the other nodes goes on, bulk and small.
slow_node_of_several_keeps_waiting_who_sends_to_it_alone(_Config) ->
    needs_macula(fun() ->
        Count = case os:getenv("MACULA_SOAK") of false -> 4; _ -> 10 end,
        Args = ["-macula_dist_liveness", "60000", "+S", "1:1"],
        [Slow | Fast] = All = [start("n" ++ integer_to_list(N), #{args => Args}) || N <- lists:seq(1, Count)],
        {ok, Relay} = macula_relay:start_link(#{rate => ?MB, delay_ms => 5, queue => 100000,
                                                target => {{127, 0, 0, 1}, macula_dist_case:port_of(Slow)}}),
        A = start(a, #{args => macula_dist_case:found_at(node_of(Slow), macula_relay:port(Relay)) ++ Args}),
        lists:foreach(fun(N) -> ok = connect(A, N) end, All),
        Size = 200000,
        {ToAll, KeeperOfAll} = call(A, fun() -> bulk_sender([node_of(N) || N <- All], Size, normal) end),
        is_held(A, ToAll),
        {_, KeeperOfFast} = call(A, fun() -> bulk_sender([node_of(N) || N <- Fast], Size, normal) end),
        ok = goes_on(A, KeeperOfFast),
        %% Messages to each node, while the slow line takes six.
        {All0, Fast0} = {count(A, KeeperOfAll), count(A, KeeperOfFast)},
        ok = eventually(fun() -> count(A, KeeperOfAll) >= All0 + 6 * Count end, 60000),
        Others = count(A, KeeperOfFast) - Fast0,
        {Median, Each} = medians(A, All),
        ct:log("~b messages to each other node; calls, ms: ~w", [Others div (Count - 1), Each]),
        true = Others > 3 * 6 * (Count - 1),
        true = Median < 300,
        ok = macula_test_nodes:pause(Slow),
        %% When it has sent what there is room for: for two seconds.
        ok = eventually(fun() ->
            Counts = [macula_dist_case:settled(fun() -> count(A, KeeperOfAll) end) || _ <- lists:seq(1, 4)],
            length(lists:usort(Counts)) =:= 1
        end, 30000),
        Stuck = count(A, KeeperOfAll),
        [ok = goes_on(A, KeeperOfFast) || _ <- lists:seq(1, 10)],
        {_, StillEach} = medians(A, Fast),
        ct:log("calls while one stands still, ms: ~w", [StillEach]),
        true = lists:all(fun(Ms) -> Ms < 1000 end, StillEach),
        Stuck = count(A, KeeperOfAll),
        ok = macula_test_nodes:resume(Slow),
        ok = goes_on(A, KeeperOfAll),
        true = lists:all(fun(N) -> connected(A, N) end, All)
    end).

%% Of eleven calls to each node, and of these.
medians(A, Nodes) ->
    Each = [call(A, fun() ->
        Times = [begin
            {Ms, _} = macula_dist_case:timed(fun() -> erpc:call(node_of(N), erlang, node, [], 30000) end),
            round(Ms)
        end || _ <- lists:seq(1, 11)],
        lists:nth(6, lists:sort(Times))
    end) || N <- Nodes],
    {lists:nth((length(Each) + 1) div 2, lists:sort(Each)), Each}.

sender_held_by_two_links_goes_on(_Config) ->
    needs_macula(fun() ->
        B = start(b),
        C = start(c),
        Relays = [begin
            {ok, Relay} = macula_relay:start_link(?SLOW#{target => {{127, 0, 0, 1}, macula_dist_case:port_of(N)}}),
            {node_of(N), {{127, 0, 0, 1}, macula_relay:port(Relay)}}
        end || N <- [B, C]],
        Nodes = lists:flatten(io_lib:format("~p", [maps:from_list(Relays)])),
        A = start(a, #{args => ["-macula", "dist_nodes", Nodes]}),
        ok = connect(A, B),
        ok = connect(A, C),
        Bulk = [bulk(A, [node_of(B), node_of(C)]), bulk(A, [node_of(B)]), bulk(A, [node_of(C)])],
        lists:foreach(fun({Pid, _}) -> is_held(A, Pid) end, Bulk),
        lists:foreach(fun({_, Keeper}) -> [ok = goes_on(A, Keeper) || _ <- lists:seq(1, 3)] end, Bulk)
    end).

senders_of_every_priority_are_held_and_go_on(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        Bulk = [bulk(A, [node_of(B)], Priority) || Priority <- [low, normal, high, max]],
        lists:foreach(fun({Pid, _}) -> is_held(A, Pid) end, Bulk),
        lists:foreach(fun({_, Keeper}) -> ok = goes_on(A, Keeper) end, Bulk)
    end).

%% It serves all links, so it must not wait for one.
net_kernel_is_never_held(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW, ?ROOM),
        NodeB = node_of(B),
        Sink = call(A, fun() -> spawn(NodeB, fun sink/0) end),
        %% What the line takes in two seconds.
        ok = call(A, fun() ->
            _ = sys:replace_state(net_kernel, fun(State) ->
                lists:foreach(fun(_) -> send_piece(Sink) end, lists:seq(1, 400)),
                State
            end),
            ok
        end),
        %% Had it been held, no more than a small part of that would be left by now.
        eventually(fun() ->
            {ok, #{queued_bytes := Queued}} = call(A, macula_dist, info, [NodeB]),
            Queued > 8 * ?MB
        end),
        %% Any other process that sends as much is.
        Pid = call(A, fun() -> spawn(fun() -> send_pieces(Sink) end) end),
        is_held(A, Pid)
    end).

%% OTP 25.3 and later. What it sends is queued, however much that is, until the flag is taken away.
sender_with_async_dist_does_not_wait(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW, ?ROOM),
        case call(A, fun() -> catch process_info(self(), async_dist) end) of
            {async_dist, false} -> async_dist(A, node_of(B));
            {'EXIT', {badarg, _}} -> {skip, "this VM has no async_dist"}
        end
    end).

async_dist(A, NodeB) ->
    Pid = call(A, fun() ->
        Self = self(),
        Sink = spawn(NodeB, fun sink/0),
        Pid = spawn(fun() ->
            false = process_flag(async_dist, true),
            %% What the line takes in two seconds.
            lists:foreach(fun(_) -> send_piece(Sink) end, lists:seq(1, 400)),
            Self ! {self(), sent},
            receive go_on -> ok end,
            true = process_flag(async_dist, false),
            send_pieces(Sink)
        end),
        receive {Pid, sent} -> Pid end
    end),
    {ok, #{queued_bytes := Queued}} = call(A, macula_dist, info, [NodeB]),
    true = Queued > 8 * ?MB,
    %% The flag is looked at again when the queue has had room for the sender.
    ok = eventually(fun() ->
        {ok, #{queued_bytes := Left}} = call(A, macula_dist, info, [NodeB]),
        Left =:= 0
    end),
    _ = call(A, fun() -> Pid ! go_on end),
    is_held(A, Pid).

send_piece(Sink) ->
    Sink ! binary:copy(<<0>>, 50000),
    true = erlang:yield().

%% Five times as much as the line takes.
send_pieces(Sink) ->
    send_piece(Sink),
    receive after 1 -> send_pieces(Sink) end.

busy_dist_port_does_not_tell_of_held_senders(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW, ?ROOM),
        NodeB = node_of(B),
        {Pid, Watcher} = call(A, fun() ->
            Counter = counters:new(1, []),
            Watcher = spawn(fun() -> count_waits(Counter) end),
            _ = erlang:system_monitor(Watcher, [busy_dist_port]),
            Sink = spawn(NodeB, fun sink/0),
            {spawn(fun() -> send_pieces(Sink) end), Watcher}
        end),
        is_held(A, Pid),
        0 = count(A, Watcher),
        %% It does of the queue of the VM, which a large message fills.
        _ = call(A, fun() -> bulk_sender([NodeB], 70 * ?MB, normal) end),
        eventually(fun() -> count(A, Watcher) > 0 end)
    end).

held_sender_goes_on_when_the_link_ends(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        {Bulk, Keeper} = bulk(A, [node_of(B)]),
        is_held(A, Bulk),
        ok = macula_dist_case:kill(B),
        _ = call(A, erlang, disconnect_node, [node_of(B)]),
        ok = goes_on(A, Keeper)
    end).

held_sender_goes_on_when_its_output_handler_is_killed(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        {Bulk, Keeper} = bulk(A, [node_of(B)]),
        is_held(A, Bulk),
        [{_, Controller}] = macula_dist_case:controllers(A),
        true = call(A, erlang, exit, [Controller, kill]),
        ok = goes_on(A, Keeper)
    end).

traced_sender_is_held_and_goes_on(_Config) ->
    needs_macula(fun() ->
        {A, B, _} = macula_dist_case:relayed_pair(?SLOW),
        {Bulk, Keeper} = bulk(A, [node_of(B)]),
        Tracer = call(A, fun() ->
            spawn(fun() -> erlang:trace(Bulk, true, [send, running]), sink() end)
        end),
        is_held(A, Bulk),
        [ok = goes_on(A, Keeper) || _ <- lists:seq(1, 3)],
        true = call(A, erlang, is_process_alive, [Tracer])
    end).

%% A process that never wants to be suspended is for a moment, while the line takes what it sent; where
%% nothing moves it is let go, and told.
link_that_stands_still_tells_nosuspend_senders(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    NodeB = node_of(B),
    Sink = call(A, fun() -> spawn(NodeB, fun sink/0) end),
    Unblocked = macula_dist_case:block(B, 16000),
    {Ms, Count} = macula_dist_case:timed(fun() ->
        call(A, fun() -> until_nosuspend(Sink, binary:copy(<<0>>, ?MB), 0) end)
    end),
    ct:log("told after ~b MB, ~p ms", [Count, Ms]),
    true = Ms < 15000,
    ok = Unblocked(),
    ok = eventually(fun() -> call(A, fun() -> erlang:send(Sink, again, [nosuspend]) =:= ok end) end).

until_nosuspend(_Sink, _Bin, Count) when Count > 500 -> error(never_told);
until_nosuspend(Sink, Bin, Count) ->
    case erlang:send(Sink, Bin, [nosuspend]) of
        ok -> receive after 5 -> until_nosuspend(Sink, Bin, Count + 1) end;
        nosuspend -> Count
    end.

%% Whoever puts packets on a link past the VM waits for the answer, not suspended, and what the VM has waits too.
large_packet_put_on_the_link_is_answered_when_there_is_room(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    NodeB = node_of(B),
    {Tally, Tallied} = call(B, fun() ->
        Counter = counters:new(1, []),
        Self = self(),
        Name = spawn(fun() -> register(foreign, self()), Self ! ready, tally(Counter) end),
        receive ready -> {Name, spawn(fun() -> keep(Counter) end)} end
    end),
    Unblocked = macula_dist_case:block(B, 6000),
    {Pid, Sent} = call(A, fun() ->
        {NodeB, Ctrl} = lists:keyfind(NodeB, 1, erlang:system_info(dist_ctrl)),
        Put = counters:new(1, []),
        Bin = binary:copy(<<0>>, ?MB),
        P = spawn(fun() -> put_all(Ctrl, Bin, Put) end),
        {P, spawn(fun() -> keep(Put) end)}
    end),
    %% No word for a while: it waits, and a sender of the VM is told.
    Large = binary:copy(<<0>>, ?MB),
    ok = eventually(fun() ->
        Before = count(A, Sent),
        {status, waiting} =:= call(A, erlang, process_info, [Pid, status]) andalso
            nosuspend =:= call(A, fun() -> erlang:send({nobody, NodeB}, Large, [nosuspend]) end) andalso
            Before =:= count(A, Sent)
    end),
    ok = Unblocked(),
    All = count(A, Sent),
    true = All > 0,
    ok = eventually(fun() -> count(A, Sent) > All + 10 end),
    true = call(A, fun() -> exit(Pid, kill) end),
    Put = count(A, Sent),
    ok = eventually(fun() -> count(B, Tallied) >= Put end),
    true = call(B, erlang, is_process_alive, [Tally]),
    ok = eventually(fun() -> call(A, fun() -> erlang:send({nobody, NodeB}, x, [nosuspend]) =:= ok end) end).

put_all(Ctrl, Bin, Put) ->
    Ref = make_ref(),
    Ctrl ! {send, self(), Ref, [131, $D, 0, external({6, self(), '', foreign}), external(Bin)]},
    receive {Ref, ok} -> ok end,
    counters:add(Put, 1, 1),
    put_all(Ctrl, Bin, Put).

external(Term) ->
    <<131, External/binary>> = term_to_binary(Term),
    External.

tally(Counter) ->
    receive Bin when is_binary(Bin) -> counters:add(Counter, 1, 1); _ -> ok end,
    tally(Counter).

%% -- order ------------------------------------------------------------------------------------------

%% Others talk meanwhile: express is never empty, and always ahead.
lossy_pair() ->
    {A, B, _} = macula_dist_case:relayed_pair(#{rate => 20 * ?MB, delay_ms => 3, loss => 0.02, seed => 3}),
    NodeB = node_of(B),
    call(A, fun() ->
        Echo = spawn(NodeB, fun echo/0),
        _ = [spawn(fun() -> chatter(Echo) end) || _ <- lists:seq(1, 5)],
        ok
    end),
    {A, NodeB}.

chatter(Echo) ->
    ping(Echo),
    receive after 2 -> chatter(Echo) end.

exit_comes_after_all_bulk_of_its_sender(_Config) ->
    {A, NodeB} = lossy_pair(),
    lists:foreach(fun(_) ->
        [{parts, 8}, down] = call(NodeB, A, fun(Self) ->
            Sender = spawn(fun() ->
                receive Sink -> [Sink ! {part, N, binary:copy(<<N>>, 150000)} || N <- lists:seq(1, 8)] end
            end),
            Sink = spawn(NodeB, fun() ->
                Ref = erlang:monitor(process, Sender),
                Sender ! self(),
                Self ! {result, parts_and_down(Ref, 0)}
            end),
            true = is_pid(Sink)
        end)
    end, lists:seq(1, 20)).

parts_and_down(Ref, Count) ->
    Next = Count + 1,
    receive
        {part, Next, _} -> parts_and_down(Ref, Next);
        {part, Other, _} -> [{out_of_order, Other, Next}];
        {'DOWN', Ref, process, _, _} -> [{parts, Count}, down]
    end.

down_by_name_comes_after_all_bulk(_Config) ->
    {A, NodeB} = lossy_pair(),
    NodeA = node_of(A),
    lists:foreach(fun(Round) ->
        Name = list_to_atom("named_" ++ integer_to_list(Round)),
        [{parts, 8}, down] = call(NodeB, A, fun(Self) ->
            Sender = spawn(fun() ->
                receive Sink -> [Sink ! {part, N, binary:copy(<<N>>, 150000)} || N <- lists:seq(1, 8)] end
            end),
            true = register(Name, Sender),
            _ = spawn(NodeB, fun() ->
                Ref = erlang:monitor(process, {Name, NodeA}),
                {Name, NodeA} ! self(),
                Self ! {result, parts_and_down(Ref, 0)}
            end)
        end)
    end, lists:seq(1, 20)).

%% Runs Fun at the node with the pid that the result is to be sent to.
call(_NodeB, N, Fun) ->
    call(N, fun() ->
        _ = Fun(self()),
        receive {result, Result} -> Result end
    end).

bulk_and_small_messages_of_one_sender_keep_their_order(_Config) ->
    {A, NodeB} = lossy_pair(),
    ok = call(A, fun() ->
        Self = self(),
        Sink = spawn(NodeB, fun() ->
            register(lanes_sink, self()),
            Self ! {ready, self()},
            Self ! {result, in_order(1, 600)}
        end),
        receive {ready, Sink} -> ok end,
        _ = spawn(fun() ->
            lists:foreach(fun(N) ->
                To = case N rem 2 of 0 -> Sink; 1 -> {lanes_sink, NodeB} end,
                To ! {N, binary:copy(<<0>>, case N rem 7 of 0 -> 400000; 3 -> 30000; _ -> 10 end)},
                %% Now and then all is delivered, and the sender is no longer one of bulk.
                N rem 150 =:= 0 andalso receive after 300 -> ok end
            end, lists:seq(1, 600))
        end),
        receive {result, Result} -> Result end
    end).

in_order(N, Last) when N > Last -> ok;
in_order(N, Last) ->
    receive
        {N, _} -> in_order(N + 1, Last);
        {Other, _} -> {out_of_order, Other, N}
    end.

%% The end of a link comes after both lanes.
disconnect_comes_after_what_was_sent(_Config) ->
    %% Packets are counted, and so nothing else may be sent: global greets each node that comes.
    needs_macula(fun() ->
        disconnect_after_bulk(macula_dist_case:relayed_pair(?SLOW, #{args => ["-connect_all", "false"]}))
    end).

disconnect_after_bulk({A, B, _}) ->
    NodeA = node_of(A),
    NodeB = node_of(B),
    lists:foreach(fun(_) ->
        ok = connect(A, B),
        Sink = call(B, fun() ->
            spawn(fun() ->
                true = erlang:monitor_node(NodeA, true),
                receive {store, From} -> From ! {self(), stored} end,
                keep_all([])
            end)
        end),
        ok = call(A, fun() ->
            Sink ! {store, self()},
            receive {Sink, stored} -> ok end,
            Taken = fun() -> {ok, #{packets_out := N}} = macula_dist:info(NodeB), N end,
            Before = Taken(),
            Sink ! {bulk, binary:copy(<<1>>, ?MB)},
            %% The VM throws away what it has not given to the link.
            ok = eventually(fun() -> Taken() >= Before + ?MB div 65536 + 1 end),
            true = erlang:disconnect_node(NodeB),
            ok
        end),
        ok = eventually(fun() ->
            call(B, fun() ->
                Sink ! {what, self()},
                receive {Sink, Seen} -> lists:member(nodedown, Seen) end
            end)
        end),
        [bulk | _] = call(B, fun() ->
            Sink ! {what, self()},
            receive {Sink, Seen} -> Seen -- [small] end
        end)
    end, lists:seq(1, 10)).

keep_all(Seen) ->
    receive
        {what, From} -> From ! {self(), lists:reverse(Seen)}, keep_all(Seen);
        {bulk, _} -> keep_all([bulk | Seen]);
        {nodedown, _} -> keep_all([nodedown | Seen]);
        small -> keep_all([small | Seen])
    end.
