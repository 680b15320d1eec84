%% Who is gone is noticed in time; who is only busy is left alone; who comes back is a new one.
-module(macula_dist_liveness_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([kill_9_is_noticed_within_the_liveness_timeout/1,
         killed_node_of_a_living_host_is_noticed_in_seconds/1, idle_links_wake_a_node_seldom/1,
         made_up_refusals_end_no_link/1,
         cut_link_is_noticed_by_both_within_the_liveness_timeout/1,
         the_smaller_liveness_counts_for_both/1, short_cut_is_survived/1,
         stopped_vm_is_noticed_by_net_ticktime_and_comes_back/1, stopped_vm_amid_bulk_keeps_its_link/1,
         blocked_vm_is_not_declared_dead_by_the_transport/1,
         blocked_vm_ends_in_net_tick_timeout/1, busy_vm_keeps_its_links/1,
         idle_link_lives_on_ticks/1, tick_is_not_stuck_behind_data/1, creation_is_random/1,
         old_pids_of_a_restarted_node_are_dead/1, restart_on_the_same_port_is_noticed_at_once/1,
         restarted_node_dials_its_old_peer/1, net_ticktime_may_change_at_run_time/1,
         node_that_is_back_at_once_is_reached_at_once/1,
         the_later_of_two_dials_of_a_node_counts/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           connected/2, eventually/1, eventually/2, needs_macula/1, timed/1,
                           nodedown_watch/1, await_nodedown/3, node_events/2, unique/1]).

%% The default liveness timeout, and the patience of a busy test machine.
-define(LIVENESS, 10000).
-define(SLACK, 10000).
%% That of macula_dist_case:quick/0, where the case is not about the default.
-define(QUICK, 3000).

suite() -> [{timetrap, {minutes, 4}}].

all() ->
    [kill_9_is_noticed_within_the_liveness_timeout,
     killed_node_of_a_living_host_is_noticed_in_seconds, idle_links_wake_a_node_seldom,
     made_up_refusals_end_no_link,
     cut_link_is_noticed_by_both_within_the_liveness_timeout,
     the_smaller_liveness_counts_for_both, short_cut_is_survived,
     stopped_vm_is_noticed_by_net_ticktime_and_comes_back, stopped_vm_amid_bulk_keeps_its_link,
     blocked_vm_is_not_declared_dead_by_the_transport, blocked_vm_ends_in_net_tick_timeout,
     busy_vm_keeps_its_links, idle_link_lives_on_ticks, tick_is_not_stuck_behind_data,
     creation_is_random, old_pids_of_a_restarted_node_are_dead,
     restart_on_the_same_port_is_noticed_at_once, restarted_node_dials_its_old_peer,
     net_ticktime_may_change_at_run_time, node_that_is_back_at_once_is_reached_at_once].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

now_ms() -> erlang:system_time(millisecond).

%% Without a relay the kernel would betray the death at once by an unreachable port.
kill_9_is_noticed_within_the_liveness_timeout(_Config) ->
    {A, B, _Relay} = macula_dist_case:relayed_pair(#{}),
    Watch = nodedown_watch(A),
    macula_dist_case:kill(B),
    Killed = now_ms(),
    {_, At} = await_nodedown({A, Watch}, node_of(B), ?LIVENESS + ?SLACK),
    ct:log("noticed after ~b ms", [At - Killed]),
    true = At - Killed =< ?LIVENESS + ?SLACK.

%% Where the system tells that nobody has the port any more. The survivor has dialled in one round, and
%% has been dialled in the other; nothing but signs of life goes over the link when the node dies.
killed_node_of_a_living_host_is_noticed_in_seconds(_Config) ->
    on_linux(fun() ->
        Patient = ["-macula_dist_liveness", "20000"],
        [begin
             A = start(a, #{args => Patient}),
             %% Nobody else is to take the port of the one that dies, as nodes of other suites would.
             Port = integer_to_list(macula_test_nodes:free_udp_port()),
             B = start(b, #{args => ["-macula_dist_port", Port | Patient]}),
             ok = case Dialler of
                 survivor -> connect(A, B);
                 victim -> connect(B, A)
             end,
             Watch = nodedown_watch(A),
             ok = call(A, timer, sleep, [rand:uniform(3000)]),
             macula_dist_case:kill(B),
             Killed = now_ms(),
             {connection_closed, At} = await_nodedown({A, Watch}, node_of(B), 20000),
             ct:log("~p dialled: noticed after ~b ms", [Dialler, At - Killed]),
             %% The next look is 4.5 s away at most, a second of refusals follows, and the rest is for a
             %% busy test machine. In silence the end comes after 13 s at the earliest.
             true = At - Killed < 12000
         end || Dialler <- [survivor, victim]],
        ok
    end).

%% How often the native thread goes to sleep tells how often something wakes it. Both ends of each
%% link used to ping eight times in the liveness time: 2.2 times a second for each link. Timers of the runtime and
%% packets sent one by one cost as much as was left.
idle_links_wake_a_node_seldom(_Config) ->
    on_linux(fun() ->
        Nodes = [A | Peers] = macula_dist_case:start_many([a, b, c, d, e], #{}),
        [ok = connect(X, Y) || X <- Nodes, Y <- Nodes, X =/= Y],
        ok = call(A, timer, sleep, [3000]),
        Before = sleeps(A),
        ok = call(A, timer, sleep, [15000]),
        Rate = (sleeps(A) - Before) / 15 / length(Peers),
        ct:log("~.2f times a second for each link", [Rate]),
        %% A tenth to a fifth by itself, and what a busy machine adds by packets that come late.
        true = Rate < 0.8,
        [true = connected(A, P) || P <- Peers],
        ok
    end).

sleeps(#{os_pid := Pid}) ->
    [Count] = [binary_to_integer(N)
               || File <- filelib:wildcard("/proc/" ++ Pid ++ "/task/*/status"),
                  {ok, Text} <- [file:read_file(File)],
                  {match, [N]} <- [re:run(Text, "Name:\tmacula-dist\n.*\nvoluntary_ctxt_switches:\t(\\d+)",
                                          [dotall, {capture, all_but_first, binary}])]],
    Count.

%% Whoever guesses the ports can send what looks like the host's answer.
made_up_refusals_end_no_link(_Config) ->
    on_linux(fun() ->
        case socket:open(inet, raw, icmp) of
            {ok, Socket} ->
                A = start(a),
                %% A peer that gets no processor for a second does not answer for a second, as one
                %% that is gone. On a busy machine this one goes first; raw sockets need root anyway.
                Nice = os:find_executable("nice"),
                B = start(b, #{exec => {Nice, ["-n", "-20", os:find_executable("erl")]}}),
                ok = survives_refusals(A, B, Socket),
                ok = socket:close(Socket);
            {error, Reason} ->
                {skip, {"needs raw sockets", Reason}}
        end
    end).

survives_refusals(A, B, Socket) ->
    ok = eventually(fun() ->
        call(A, net_adm, ping, [node_of(B)]) =:= pong andalso connected(B, A)
    end),
    Refusal = refusal(port_seen_by(B, A), port_seen_by(A, B)),
    Watch = nodedown_watch(A),
    %% The link is idle: nothing but the engine's own question makes the peer speak.
    Until = now_ms() + 4000,
    ok = refuse_until(Socket, Refusal, fun() -> now_ms() >= Until end),
    ok = refuse_until(Socket, Refusal, fun() ->
        case call(A, macula_dist, info, [node_of(B)]) of
            {ok, #{refused_datagrams := Seen}} -> Seen >= 10;
            {error, not_connected} -> true
        end
    end),
    [] = node_events(A, Watch),
    pong = call(A, net_adm, ping, [node_of(B)]),
    ok.

on_linux(Fun) ->
    case os:type() of
        {unix, linux} -> needs_macula(Fun);
        _ -> {skip, "Linux tells of refused datagrams"}
    end.

info(A, B) ->
    {ok, Info} = call(A, macula_dist, info, [node_of(B)]),
    Info.

port_seen_by(A, B) ->
    #{address := {{127, 0, 0, 1}, Port}} = info(A, B),
    Port.

%% RFC 792: destination unreachable, port unreachable, and the beginning of the datagram it is about.
refusal(From, To) ->
    Udp = <<From:16, To:16, 16:16, 0:16>>,
    Ip = <<4:4, 5:4, 0:8, 36:16, 0:16, 0:16, 64:8, 17:8, 0:16, 127, 0, 0, 1, 127, 0, 0, 1>>,
    Sum = checksum(<<3, 3, 0:16, 0:32, Ip/binary, Udp/binary>>),
    <<3, 3, Sum:16, 0:32, Ip/binary, Udp/binary>>.

checksum(Bytes) ->
    Sum = lists:sum([Word || <<Word:16>> <= Bytes]),
    Folded = (Sum band 16#ffff) + (Sum bsr 16),
    (bnot (Folded + (Folded bsr 16))) band 16#ffff.

refuse_until(Socket, Packet, Enough) ->
    To = #{family => inet, addr => {127, 0, 0, 1}, port => 0},
    ok = socket:sendto(Socket, Packet, To),
    receive after 20 -> ok end,
    case Enough() of
        true -> ok;
        false -> refuse_until(Socket, Packet, Enough)
    end.

cut_link_is_noticed_by_both_within_the_liveness_timeout(_Config) ->
    needs_macula(fun() ->
        {A, B, Relay} = macula_dist_case:relayed_pair(#{}, macula_dist_case:quick()),
        WatchA = nodedown_watch(A),
        WatchB = nodedown_watch(B),
        ok = macula_relay:set(Relay, #{blackhole => true}),
        Cut = now_ms(),
        {_, AtA} = await_nodedown({A, WatchA}, node_of(B), ?QUICK + ?SLACK),
        {_, AtB} = await_nodedown({B, WatchB}, node_of(A), ?QUICK + ?SLACK),
        ct:log("noticed after ~b and ~b ms", [AtA - Cut, AtB - Cut]),
        %% Healed, it is as before.
        ok = macula_relay:set(Relay, #{blackhole => false}),
        ok = connect(A, B)
    end).

%% Whichever of the two dials. No node dials by itself again, past the relay: that would end the link
%% at a peer which has noticed nothing.
the_smaller_liveness_counts_for_both(_Config) ->
    needs_macula(fun() ->
        Args = fun(Liveness) ->
            ["-macula_dist_liveness", Liveness, "-kernel", "dist_auto_connect", "once"]
        end,
        [begin
             B = start(b, #{args => Args(Listener)}),
             Target = {{127, 0, 0, 1}, macula_dist_case:port_of(B)},
             {ok, Relay} = macula_relay:start_link(#{target => Target}),
             Found = macula_dist_case:found_at(node_of(B), macula_relay:port(Relay)),
             A = start(a, #{args => Args(Dialler) ++ Found}),
             ok = connect(A, B),
             [{ok, #{liveness_ms := ?QUICK}} = call(N, macula_dist, info, [node_of(Peer)])
              || {N, Peer} <- [{A, B}, {B, A}]],
             Watches = [{{N, nodedown_watch(N)}, node_of(Peer)} || {N, Peer} <- [{A, B}, {B, A}]],
             Cut = now_ms(),
             ok = macula_relay:set(Relay, #{blackhole => true}),
             [begin
                  {connection_closed, At} = await_nodedown(Watch, Peer, ?QUICK + ?SLACK),
                  ct:log("~s and ~s: noticed after ~b ms", [Dialler, Listener, At - Cut])
              end || {Watch, Peer} <- Watches]
         end || {Dialler, Listener} <- [{"3000", "60000"}, {"60000", "3000"}]],
        ok
    end).

short_cut_is_survived(_Config) ->
    needs_macula(fun() ->
        %% Long enough for a busy machine to add to the cut.
        {A, B, Relay} = macula_dist_case:relayed_pair(#{}, #{args => ["-macula_dist_liveness", "30000"]}),
        Watch = nodedown_watch(A),
        NodeB = node_of(B),
        ok = macula_relay:set(Relay, #{blackhole => true}),
        Caller = call(A, fun() ->
            Starter = self(),
            Pid = spawn(fun() ->
                Starter ! {self(), calling},
                Answer = erpc:call(NodeB, erlang, node, []),
                receive {get, To} -> To ! {self(), Answer} end
            end),
            receive {Pid, calling} -> Pid end
        end),
        receive after 4000 -> ok end,
        false = answered(A, Caller),
        ok = macula_relay:set(Relay, #{blackhole => false}),
        ok = eventually(fun() -> answered(A, Caller) end, ?LIVENESS + ?SLACK),
        NodeB = call(A, fun() ->
            Caller ! {get, self()},
            receive {Caller, Answer} -> Answer after 5000 -> error(caller_lost) end
        end),
        [] = [E || {nodedown, _, _, _} = E <- node_events(A, Watch)]
    end).

%% Waits for its answer no more, and so for nothing but to be asked.
answered(A, Caller) ->
    {current_function, Function} = call(A, erlang, process_info, [Caller, current_function]),
    element(1, Function) =:= ?MODULE.

%% Where the net tick is to be what notices: a stopped VM's transport is silent, too.
ticking() ->
    #{args => ["-kernel", "net_ticktime", "4", "-macula_dist_liveness", "40000"]}.

stopped_vm_is_noticed_by_net_ticktime_and_comes_back(_Config) ->
    A = start(a, ticking()),
    B = start(b, ticking()),
    Watch = nodedown_watch(A),
    WatchB = nodedown_watch(B),
    ok = connect(A, B),
    macula_dist_case:signal(B, "STOP"),
    {net_tick_timeout, _} = await_nodedown({A, Watch}, node_of(B), 15000),
    macula_dist_case:signal(B, "CONT"),
    %% It learns that it was given up, and is welcome again.
    {_, _} = await_nodedown({B, WatchB}, node_of(A), 15000),
    ok = eventually(fun() -> call(A, net_adm, ping, [node_of(B)]) =:= pong end),
    ok = eventually(fun() -> call(B, net_adm, ping, [node_of(A)]) =:= pong end).

%% It stands still for less than any timeout, with bulk under way in both directions: nothing is lost, nothing comes
%% twice, and both directions go on.
stopped_vm_amid_bulk_keeps_its_link(_Config) ->
    [A, B] = [start(Name, #{args => ["-macula_dist_liveness", "60000"]}) || Name <- [a, b]],
    Watch = nodedown_watch(A),
    ok = connect(A, B),
    [Controller] = macula_dist_case:controllers(A),
    [_There, Back] = Flows = [flow(A, B), flow(B, A)],
    lists:foreach(fun(_) ->
        [ok = goes_on(Flow) || Flow <- Flows],
        macula_dist_case:signal(B, "STOP"),
        %% What was under way has come.
        _ = macula_dist_case:settled(fun() -> taken(Back) end),
        macula_dist_case:signal(B, "CONT")
    end, lists:seq(1, 3)),
    [ok = goes_on(Flow) || Flow <- Flows],
    [begin
         Sent = ask(Flow, source, finish),
         ok = eventually(fun() -> taken(Flow) =:= Sent end)
     end || Flow <- Flows],
    [Controller] = macula_dist_case:controllers(A),
    [] = [E || {nodedown, _, _, _} = E <- node_events(A, Watch)].

%% A process that sends large messages without end, and one that takes them.
flow(From, To) ->
    Sink = call(To, fun() -> spawn(fun() -> sink(0) end) end),
    Source = call(From, fun() -> spawn(fun() -> source(Sink, 0) end) end),
    #{sink => {To, Sink}, source => {From, Source}}.

source(Sink, N) ->
    receive
        {finish, Who, Ref} -> Who ! {Ref, N}
    after 0 ->
        Sink ! {N, large(N)},
        source(Sink, N + 1)
    end.

%% Stops at whatever is not the next one, whole.
sink(N) ->
    receive
        {taken, Who, Ref} ->
            Who ! {Ref, N},
            sink(N);
        {N, Data} ->
            true = Data =:= large(N),
            sink(N + 1);
        {_, _} ->
            exit(out_of_order)
    end.

large(N) -> binary:copy(<<N:64>>, 65536).

ask(Flow, Which, What) ->
    #{Which := {Node, Pid}} = Flow,
    call(Node, fun() ->
        Ref = make_ref(),
        Pid ! {What, self(), Ref},
        receive {Ref, N} -> N after 60000 -> error(no_answer) end
    end).

taken(Flow) -> ask(Flow, sink, taken).

goes_on(Flow) ->
    Before = taken(Flow),
    eventually(fun() -> taken(Flow) > Before + 4 end).

blocked_vm_is_not_declared_dead_by_the_transport(_Config) ->
    Liveness = 6000,
    [A, B] = [start(Name, #{args => ["-macula_dist_liveness", integer_to_list(Liveness)]}) || Name <- [a, b]],
    ok = connect(A, B),
    Watch = nodedown_watch(A),
    [Ctrl] = macula_dist_case:controllers(A),
    Await = macula_dist_case:block(B, 2 * Liveness),
    ok = Await(),
    pong = call(A, net_adm, ping, [node_of(B)]),
    [] = [E || {nodedown, _, _, _} = E <- node_events(A, Watch)],
    [Ctrl] = macula_dist_case:controllers(A).

blocked_vm_ends_in_net_tick_timeout(_Config) ->
    A = start(a, #{args => ["-kernel", "net_ticktime", "4"]}),
    B = start(b, #{args => ["-kernel", "net_ticktime", "4"]}),
    Watch = nodedown_watch(A),
    ok = connect(A, B),
    Await = macula_dist_case:block(B, 20000),
    Blocked = now_ms(),
    %% While it stands still, not when it goes on.
    {net_tick_timeout, At} = await_nodedown({A, Watch}, node_of(B), 20000),
    true = At - Blocked =< 15000,
    ok = Await(),
    ok = eventually(fun() -> call(A, net_adm, ping, [node_of(B)]) =:= pong end).

busy_vm_keeps_its_links(_Config) ->
    A = start(a, #{args => ["-kernel", "net_ticktime", "4"]}),
    B = start(b, #{args => ["-kernel", "net_ticktime", "4"]}),
    ok = connect(A, B),
    Watch = nodedown_watch(A),
    %% They burn when A says so: beside them nothing of normal priority runs in B, and the answer to
    %% this call would not leave it.
    Burners = call(B, fun() ->
        [spawn_opt(fun() -> receive burn -> burn(0) end end, [{priority, high}])
         || _ <- lists:seq(1, 20)]
    end),
    %% A timer in A, not a pause for luck: two tick times under load.
    ok = call(A, fun() -> [P ! burn || P <- Burners], timer:sleep(9000) end),
    [] = [E || {nodedown, _, _, _} = E <- node_events(A, Watch)],
    %% They burned, and the link carries what ends them.
    true = call(A, fun() ->
        Load = [monitor(process, P) || P <- Burners],
        [exit(P, kill) || P <- Burners],
        lists:all(fun(M) -> receive {'DOWN', M, _, _, Why} -> Why =:= killed after 9000 -> false end
                  end, Load)
    end),
    true = call(B, fun() -> element(1, statistics(runtime)) > 2000 end),
    true = connected(A, B).

burn(N) -> burn(N + 1).

idle_link_lives_on_ticks(_Config) ->
    Args = ["-kernel", "net_ticktime", "4"],
    A = start(a, #{args => Args}),
    B = start(b, #{args => Args}),
    ok = connect(A, B),
    WatchA = nodedown_watch(A),
    WatchB = nodedown_watch(B),
    ok = call(A, timer, sleep, [12000]),
    [] = [E || {nodedown, _, _, _} = E <- node_events(A, WatchA)],
    [] = [E || {nodedown, _, _, _} = E <- node_events(B, WatchB)],
    true = connected(A, B) andalso connected(B, A).

%% A slow link with a full queue: the ticks of a short tick time still pass.
tick_is_not_stuck_behind_data(_Config) ->
    needs_macula(fun() ->
        Args = #{args => ["-kernel", "net_ticktime", "4"]},
        {A, B, _} = macula_dist_case:relayed_pair(#{rate => 2000000, delay_ms => 5}, Args),
        NodeB = node_of(B),
        Watch = nodedown_watch(A),
        WatchB = nodedown_watch(B),
        call(A, fun() ->
            Sink = spawn(NodeB, fun sink/0),
            Senders = [spawn(fun() -> flood(Sink, binary:copy(<<0>>, 4000000)) end)
                       || _ <- lists:seq(1, 4)],
            receive after 12000 -> ok end,
            [exit(S, kill) || S <- Senders]
        end),
        [] = [E || {nodedown, _, _, _} = E <- node_events(A, Watch)],
        [] = [E || {nodedown, _, _, _} = E <- node_events(B, WatchB)],
        true = connected(A, B)
    end).

sink() -> receive _ -> sink() end.

flood(Sink, Bin) ->
    Sink ! Bin,
    flood(Sink, Bin).

creation_is_random(_Config) ->
    Name = unique("created"),
    Creations = [begin
        N = start(Name, #{exact => true}),
        Creation = call(N, erts_internal, get_creation, []),
        macula_dist_case:stop(N),
        Creation
    end || _ <- lists:seq(1, 5)],
    ct:log("~p", [Creations]),
    5 = length(lists:usort(Creations)),
    true = lists:all(fun(C) -> C > 3 end, Creations).

old_pids_of_a_restarted_node_are_dead(_Config) ->
    A = start(a, macula_dist_case:quick()),
    Name = unique("b"),
    B1 = start(Name, #{exact => true}),
    NodeB = node_of(B1),
    ok = connect(A, B1),
    Old = call(A, fun() -> erpc:call(NodeB, erlang, whereis, [init]) end),
    macula_dist_case:kill(B1),
    B2 = start(Name, #{exact => true}),
    ok = eventually(fun() -> call(A, net_adm, ping, [NodeB]) =:= pong end, 15000),
    New = call(A, fun() -> erpc:call(NodeB, erlang, whereis, [init]) end),
    true = Old =/= New,
    Reason = call(A, fun() ->
        M = monitor(process, Old),
        receive {'DOWN', M, process, Old, Why} -> Why after 10000 -> still_watching end
    end),
    true = lists:member(Reason, [noproc, noconnection]),
    %% A message to the old process is for nobody, least of all for the new one of the same number.
    Trap = call(A, fun() -> erpc:call(NodeB, erlang, whereis, [init]) =:= New end),
    true = Trap,
    _ = B2.

%% Packets of the old connection reach the new node, which does not know them and says so.
restart_on_the_same_port_is_noticed_at_once(_Config) ->
    needs_macula(fun() ->
        Port = integer_to_list(macula_test_nodes:free_udp_port()),
        Name = unique("b"),
        Args = #{exact => true, args => ["-macula_dist_port", Port]},
        A = start(a),
        B1 = start(Name, Args),
        ok = connect(A, B1),
        Watch = nodedown_watch(A),
        macula_dist_case:kill(B1),
        B2 = start(Name, Args),
        Back = now_ms(),
        {_, At} = await_nodedown({A, Watch}, node_of(B2), ?LIVENESS),
        ct:log("noticed ~b ms after the restart", [At - Back]),
        true = At - Back < 4000
    end).

restarted_node_dials_its_old_peer(_Config) ->
    A = start(a),
    Name = unique("b"),
    B1 = start(Name, #{exact => true}),
    ok = connect(A, B1),
    Watch = nodedown_watch(A),
    macula_dist_case:kill(B1),
    B2 = start(Name, #{exact => true}),
    {Ms, pong} = call(B2, fun() -> timed(fun() -> net_adm:ping(node_of(A)) end) end),
    ct:log("~p ms", [Ms]),
    true = Ms < 7000,
    %% A saw the old one go before the new one came.
    NodeB = node_of(B2),
    ok = eventually(fun() ->
        case [Kind || {Kind, Node, _, _} <- node_events(A, Watch), Node =:= NodeB] of
            [nodedown, nodeup] -> true;
            Other -> Other
        end
    end).

%% Each life of A ends in the middle of its traffic, and the next begins at once: B may have dialled A in
%% the moment of its end.
node_that_is_back_at_once_is_reached_at_once(_Config) ->
    B = start(b),
    NodeB = node_of(B),
    Name = unique("a") ++ "@127.0.0.1",
    Life = lists:flatten(io_lib:format(
        "R = net_adm:ping(~p), io:format(\"~~p~~n\", [R]), "
        "F = fun F() -> {nobody, ~p} ! binary:copy(<<2>>, 20000), F() end, "
        "[spawn(F) || _ <- [1, 2, 3]], timer:sleep(60 + rand:uniform(60)), "
        "halt(0, [{flush, ~p}]).", [NodeB, NodeB, false])),
    Args = macula_test_nodes:pa_args() ++ macula_dist_case:carrier_args()
        ++ ["-noinput", "-name", Name, "-eval", Life, "-setcookie",
            atom_to_list(call(B, erlang, get_cookie, []))],
    Rounds = [begin
                  A = macula_dist_case:os_erl(Args, [{env, [{"ERL_CRASH_DUMP", "/dev/null"}]}]),
                  {_, Output} = macula_dist_case:os_await(A, exit),
                  Output
              end || _ <- lists:seq(1, 15)],
    ?assertEqual([], [Output || Output <- Rounds, string:find(Output, "pong") =:= nomatch]).

%% A node may end in the middle of its handshake without a word; what it has begun is not in the way of its successor.
%% A handshake that the other end has begun is given up for the sake of a node whose name comes later only.
the_later_of_two_dials_of_a_node_counts(_Config) ->
    B = start(z),
    Name = unique("a"),
    {Rogue, _} = macula_dist_rogue:begin_as(B, Name ++ "@127.0.0.1"),
    A = start(Name, #{exact => true}),
    pong = call(A, net_adm, ping, [node_of(B)]),
    Node = node_of(A),
    [Node] = call(B, erlang, nodes, [connected]),
    ok = macula_dist_rogue:close(Rogue).

net_ticktime_may_change_at_run_time(_Config) ->
    A = start(a, #{args => ["-macula_dist_liveness", "40000"]}),
    B = start(b, #{args => ["-macula_dist_liveness", "40000"]}),
    ok = connect(A, B),
    Watch = nodedown_watch(A),
    change_initiated = call(A, net_kernel, set_net_ticktime, [4, 0]),
    change_initiated = call(B, net_kernel, set_net_ticktime, [4, 0]),
    ok = eventually(fun() -> call(A, net_kernel, get_net_ticktime, []) =:= 4 end),
    pong = call(A, net_adm, ping, [node_of(B)]),
    macula_dist_case:signal(B, "STOP"),
    {net_tick_timeout, _} = await_nodedown({A, Watch}, node_of(B), 15000),
    ok.
