%% nodeup and nodedown: seen by everyone concerned, in order, once, and for the reason OTP names.
-module(macula_dist_nodedown_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([disconnect_node_gives_disconnect_here_and_connection_closed_there/1,
         halt_gives_connection_closed_at_once/1, halt_amid_bulk_gives_connection_closed_at_once/1,
         init_stop_gives_connection_closed/1,
         kill_9_gives_connection_closed_or_net_tick_timeout/1,
         killed_controller_gives_killed/1, controller_exit_reason_is_the_nodedown_reason/1,
         net_kernel_stop_gives_its_reason/1, silent_peer_gives_net_tick_timeout/1,
         refused_cookie_gives_no_nodedown/1, failed_setup_gives_no_nodedown/1,
         links_and_monitors_fire_with_noconnection/1, nodeup_precedes_nodedown_in_every_round/1,
         nodedown_comes_after_messages_already_received/1, hidden_and_visible_are_told_apart/1,
         a_node_that_left_is_gone_before_net_kernel_hears_of_it/1, link_leaves_nothing_behind/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           eventually/1, eventually/2, nodedown_watch/1, await_nodedown/3]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [disconnect_node_gives_disconnect_here_and_connection_closed_there,
     halt_gives_connection_closed_at_once, halt_amid_bulk_gives_connection_closed_at_once, init_stop_gives_connection_closed,
     kill_9_gives_connection_closed_or_net_tick_timeout,
     killed_controller_gives_killed, controller_exit_reason_is_the_nodedown_reason,
     net_kernel_stop_gives_its_reason, silent_peer_gives_net_tick_timeout,
     refused_cookie_gives_no_nodedown, failed_setup_gives_no_nodedown,
     links_and_monitors_fire_with_noconnection, nodeup_precedes_nodedown_in_every_round,
     nodedown_comes_after_messages_already_received, hidden_and_visible_are_told_apart,
     a_node_that_left_is_gone_before_net_kernel_hears_of_it, link_leaves_nothing_behind].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% Two connected nodes, each with a watch on node events.
watched_pair() -> watched_pair(patient()).

%% Silence alone would be noticed after half a minute: what is sooner has been said.
patient() -> #{args => patient_args()}.

patient_args() -> ["-macula_dist_liveness", "40000"].

watched_pair(Opts) ->
    A = start(a, Opts),
    B = start(b, Opts),
    WatchA = nodedown_watch(A),
    WatchB = nodedown_watch(B),
    ok = connect(A, B),
    {{A, WatchA}, {B, WatchB}}.

disconnect_node_gives_disconnect_here_and_connection_closed_there(_Config) ->
    {{A, _} = WA, {B, _} = WB} = watched_pair(),
    true = call(A, erlang, disconnect_node, [node_of(B)]),
    {disconnect, _} = await_nodedown(WA, node_of(B), 15000),
    {connection_closed, _} = await_nodedown(WB, node_of(A), 15000).

%% Nothing is sent over UDP when a process ends: the carrier itself has to say goodbye.
halt_gives_connection_closed_at_once(_Config) ->
    %% Behind a relay, where the system does not tell that the port is gone.
    {A, B, _Relay} = macula_dist_case:relayed_pair(#{}, patient()),
    halted(A, B).

%% The congestion window is full: the goodbye passes what waits.
halt_amid_bulk_gives_connection_closed_at_once(_Config) ->
    Line = #{rate => 4000000, delay_ms => 20},
    {A, B, _Relay} = macula_dist_case:relayed_pair(Line, patient()),
    NodeB = node_of(B),
    call(A, fun() ->
        Sink = spawn(fun Drain() -> receive _ -> Drain() end end),
        Flood = fun Flood() -> Sink ! binary:copy(<<0>>, 1000000), Flood() end,
        Begun = fun() -> element(2, process_info(Sink, reductions)) end,
        Before = Begun(),
        _ = spawn(NodeB, Flood),
        eventually(fun() -> Begun() > Before end)
    end),
    halted(A, B).

halted(A, B) ->
    WA = {A, nodedown_watch(A)},
    NodeB = node_of(B),
    %% From OTP 26 on nothing of ours runs in a halt without flush.
    Options = [{flush, list_to_integer(call(B, erlang, system_info, [otp_release])) >= 26}],
    call(A, fun() -> erpc:cast(NodeB, fun() -> erlang:halt(0, Options) end) end),
    eventually(fun() -> not macula_test_nodes:is_alive(B) end),
    Gone = erlang:system_time(millisecond),
    {connection_closed, At} = await_nodedown(WA, NodeB, 25000),
    ct:log("noticed after ~b ms", [At - Gone]),
    true = At - Gone < 20000.

init_stop_gives_connection_closed(_Config) ->
    {{A, _} = WA, {B, _}} = watched_pair(),
    NodeB = node_of(B),
    call(A, fun() -> erpc:cast(NodeB, init, stop, []) end),
    {connection_closed, _} = await_nodedown(WA, NodeB, 15000).

kill_9_gives_connection_closed_or_net_tick_timeout(_Config) ->
    {WA, {B, _}} = watched_pair(macula_dist_case:quick()),
    macula_dist_case:kill(B),
    {Reason, _} = await_nodedown(WA, node_of(B), 12000),
    true = lists:member(Reason, [connection_closed, net_tick_timeout]).

killed_controller_gives_killed(_Config) ->
    case macula_dist_case:carrier() of
        "inet" ++ _ -> {skip, "a port or tls_sender is the controller"};
        _ ->
            {{A, _} = WA, {B, _} = WB} = watched_pair(),
            NodeB = node_of(B),
            call(A, fun() ->
                {NodeB, Ctrl} = lists:keyfind(NodeB, 1, erlang:system_info(dist_ctrl)),
                exit(Ctrl, kill)
            end),
            {killed, _} = await_nodedown(WA, NodeB, 15000),
            {connection_closed, _} = await_nodedown(WB, node_of(A), 15000),
            ok = connect(A, B)
    end.

controller_exit_reason_is_the_nodedown_reason(_Config) ->
    case macula_dist_case:carrier() of
        "inet" ++ _ -> {skip, "a port or tls_sender is the controller"};
        _ ->
            {{A, _} = WA, {B, _} = WB} = watched_pair(),
            NodeB = node_of(B),
            call(A, fun() ->
                {NodeB, Ctrl} = lists:keyfind(NodeB, 1, erlang:system_info(dist_ctrl)),
                exit(Ctrl, a_reason_of_ours)
            end),
            {a_reason_of_ours, _} = await_nodedown(WA, NodeB, 15000),
            {connection_closed, _} = await_nodedown(WB, node_of(A), 15000),
            ok
    end.

net_kernel_stop_gives_its_reason(_Config) ->
    {_, {B, _} = WB} = {A0, _} = watched_pair_dynamic(),
    {A, _} = A0,
    NodeA = node_of(A),
    _ = node_of(B),
    ok = call(A, net_kernel, stop, []),
    {connection_closed, _} = await_nodedown(WB, NodeA, 15000),
    %% The name goes when the VM has cleaned up, which may be after stop/0 has returned.
    ok = eventually(fun() -> call(A, erlang, node, []) =:= nonode@nohost end).

%% A distribution started by net_kernel:start/1 is one that may be stopped.
watched_pair_dynamic() ->
    A0 = start_undistributed(),
    B = start(b, patient()),
    WatchB = nodedown_watch(B),
    Name = list_to_atom(macula_dist_case:unique("late") ++ "@127.0.0.1"),
    {ok, _} = call(A0, net_kernel, start, [[Name, longnames]]),
    Cookie = call(B, erlang, get_cookie, []),
    true = call(A0, erlang, set_cookie, [Cookie]),
    A = A0#{node := Name},
    ok = connect(A, B),
    {{A, undefined}, {B, WatchB}}.

start_undistributed() ->
    {ok, N} = macula_test_nodes:start(#{
        carrier => none, args => macula_dist_case:carrier_args() ++ patient_args()}),
    N#{log => "none"}.

%% SIGSTOP stops the native threads as well, so net ticks must be the quicker clock here.
silent_peer_gives_net_tick_timeout(_Config) ->
    Args = ["-kernel", "net_ticktime", "4" | patient_args()],
    {{A, _} = WA, {B, _}} = watched_pair(#{args => Args}),
    Before = erlang:system_time(millisecond),
    macula_dist_case:signal(B, "STOP"),
    Stopped = erlang:system_time(millisecond),
    {net_tick_timeout, At} = await_nodedown(WA, node_of(B), 25000),
    ct:log("noticed after ~b ms", [At - Stopped]),
    %% 4 s, less or more by a quarter, since the last tick, which is a second old at most; and what
    %% a busy machine adds.
    true = At - Before >= 1500,
    true = At - Stopped =< 20000,
    macula_dist_case:signal(B, "CONT"),
    _ = A.

refused_cookie_gives_no_nodedown(_Config) ->
    A = start(a),
    B = start(b, #{cookie => "another"}),
    Watch = nodedown_watch(A),
    pang = call(A, net_adm, ping, [node_of(B)]),
    [] = macula_dist_case:node_events(A, Watch).

failed_setup_gives_no_nodedown(_Config) ->
    A = start(a),
    Watch = nodedown_watch(A),
    pang = call(A, net_adm, ping, ['nobody_there@127.0.0.1']),
    [] = macula_dist_case:node_events(A, Watch).

links_and_monitors_fire_with_noconnection(_Config) ->
    {{A, _}, {B, _}} = watched_pair(macula_dist_case:quick()),
    NodeB = node_of(B),
    Tester = call(A, fun() ->
        Caller = self(),
        spawn(fun() ->
            process_flag(trap_exit, true),
            P = spawn_link(NodeB, timer, sleep, [infinity]),
            Alias = monitor(process, P, [{alias, explicit_unalias}]),
            ByName = monitor(process, {init, NodeB}),
            true = monitor_node(NodeB, true),
            Caller ! {self(), ready},
            receive {'EXIT', P, noconnection} -> ok end,
            receive {'DOWN', Alias, process, P, noconnection} -> ok end,
            receive {'DOWN', ByName, process, {init, NodeB}, noconnection} -> ok end,
            receive {nodedown, NodeB} -> ok end,
            receive {report, To} -> To ! {self(), all_fired} end
        end)
    end),
    macula_dist_case:kill(B),
    all_fired = call(A, fun() ->
        Tester ! {report, self()},
        receive {Tester, Result} -> Result after 15000 -> process_info(Tester, messages) end
    end).

nodeup_precedes_nodedown_in_every_round(_Config) ->
    {{A, WatchA}, {B, WatchB}} = watched_pair(),
    NodeA = node_of(A),
    NodeB = node_of(B),
    Rounds = 25,
    call(A, fun() ->
        lists:foreach(fun(_) ->
            true = erlang:disconnect_node(NodeB),
            ok = reconnect(NodeB)
        end, lists:seq(1, Rounds))
    end),
    Expected = lists:append([[nodeup] | lists:duplicate(Rounds, [nodedown, nodeup])]),
    lists:foreach(fun({N, Watch, Peer}) ->
        eventually(fun() ->
            Seen = [Kind || {Kind, Node, _, _} <- macula_dist_case:node_events(N, Watch),
                            Node =:= Peer],
            Seen =:= Expected orelse Seen
        end)
    end, [{A, WatchA, NodeB}, {B, WatchB, NodeA}]).

%% The other side may still be busy with the end of the old connection and refuse.
reconnect(Node) ->
    case net_kernel:connect_node(Node) of
        true -> ok;
        false -> reconnect(Node)
    end.

%% Everything a connection delivered is in the mailbox before its nodedown. The other node ends while
%% it sends, when some have arrived.
nodedown_comes_after_messages_already_received(_Config) ->
    {{A, _}, {B, _}} = watched_pair(),
    NodeB = node_of(B),
    Early = 1000,
    {Messages, Late} = call(A, fun() ->
        Self = self(),
        true = monitor_node(NodeB, true),
        spawn(NodeB, fun() -> count(Self, 1) end),
        ok = eventually(fun() ->
            {message_queue_len, Arrived} = process_info(Self, message_queue_len),
            Arrived >= Early
        end),
        spawn(NodeB, fun() -> erlang:halt(0) end),
        receive {nodedown, NodeB} -> ok after 15000 -> error(no_nodedown) end,
        {messages, Here} = process_info(Self, messages),
        pang = net_adm:ping(NodeB),
        {message_queue_len, Later} = process_info(Self, message_queue_len),
        {Here, Later - length(Here)}
    end),
    ct:log("~b had arrived", [length(Messages)]),
    true = length(Messages) >= Early,
    true = Messages =:= lists:seq(1, length(Messages)),
    0 = Late.

count(To, N) ->
    To ! N,
    count(To, N + 1).

hidden_and_visible_are_told_apart(_Config) ->
    A = start(a),
    H = start(h, #{args => ["-hidden"]}),
    ok = connect(A, H),
    [] = call(A, erlang, nodes, []),
    Hidden = node_of(H),
    [Hidden] = call(A, erlang, nodes, [hidden]),
    {ok, Info} = call(A, net_kernel, node_info, [Hidden]),
    hidden = proplists:get_value(type, Info).

%% A third node that asks the peer for its nodes after a disconnect is to hear what is, and not what was.
a_node_that_left_is_gone_before_net_kernel_hears_of_it(_Config) ->
    case macula_dist_case:carrier() of
        "inet" ++ _ -> {skip, "a port or tls_sender is the controller"};
        _ ->
            {{A, _}, {B, _}} = watched_pair(),
            _ = [begin
                     ok = connect(A, B),
                     false = listed_when_its_supervisor_ends(A, B)
                 end || _ <- lists:seq(1, 20)],
            ok
    end.

%% Whether B lists A at the moment at which the process that net_kernel knows of the link ends.
listed_when_its_supervisor_ends(A, B) ->
    NodeA = node_of(A),
    Watch = call(B, fun() ->
        {NodeA, Controller} = lists:keyfind(NodeA, 1, erlang:system_info(dist_ctrl)),
        {links, Links} = process_info(Controller, links),
        {links, Known} = process_info(whereis(net_kernel), links),
        [Supervisor] = [Pid || Pid <- Links, lists:member(Pid, Known)],
        Tell = self(),
        %% Ahead of whatever else runs then.
        Watch = spawn_opt(fun() ->
            Monitor = erlang:monitor(process, Supervisor),
            Tell ! watching,
            Listed = receive {'DOWN', Monitor, process, Supervisor, _} -> lists:member(NodeA, nodes(connected)) end,
            receive {tell, To} -> To ! {listed, Listed} end
        end, [{priority, max}]),
        receive watching -> Watch end
    end),
    true = call(A, erlang, disconnect_node, [node_of(B)]),
    call(B, fun() ->
        Watch ! {tell, self()},
        receive {listed, Listed} -> Listed after 10000 -> error(supervisor_lives) end
    end).

link_leaves_nothing_behind(_Config) ->
    {{A, _}, {B, _}} = watched_pair(),
    NodeB = node_of(B),
    Round = fun() ->
        true = erlang:disconnect_node(NodeB),
        ok = reconnect(NodeB)
    end,
    call(A, fun() -> [Round() || _ <- lists:seq(1, 5)], ok end),
    %% The system's resolver is a process and a port that the VM starts when first asked, and keeps.
    [{ok, _} = call(Node, inet, gethostbyname, ["localhost"]) || Node <- [A, B]],
    %% B may still be at the end of its part of the last handshake.
    ok = eventually(fun() -> macula_dist_case:connected(B, A) end),
    pong = call(B, net_adm, ping, [node_of(A)]),
    Before = {macula_test_nodes:snapshot(A), macula_test_nodes:snapshot(B)},
    call(A, fun() -> [Round() || _ <- lists:seq(1, 100)], ok end),
    ok = macula_test_nodes:await_no_leak(A, element(1, Before)),
    ok = macula_test_nodes:await_no_leak(B, element(2, Before)).
