%% What programs expect of a connection between two nodes, whatever carries it.
-module(macula_dist_semantics_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([rpc_calls/1, erpc_calls_and_exceptions/1, messages_from_0_bytes_to_256_mib/1,
         message_of_1_gib/1,
         every_kind_of_term/1, links/1, monitors/1, remote_spawns/1, exit_signals/1, aliases/1,
         group_leader_output/1, global_names_and_locks/1, pg_groups/1, mnesia_replicates/1,
         gen_server_multi_call/1, monitor_node_bif/1, nosuspend_sends/1, noconnect_sends/1,
         priority_messages_come_first/1,
         many_processes_talk/1, getopts_and_setopts/1, node_info_is_sane/1, dist_statistics/1,
         controller_answers_send/1, controller_ignores_garbage/1]).

%% For what comes at once, unless the machine stands still.
-define(WAIT, 30000).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [rpc_calls, erpc_calls_and_exceptions, messages_from_0_bytes_to_256_mib, message_of_1_gib,
     every_kind_of_term,
     links, monitors, remote_spawns, exit_signals, aliases, group_leader_output,
     global_names_and_locks, pg_groups, mnesia_replicates, gen_server_multi_call,
     monitor_node_bif, nosuspend_sends, noconnect_sends, priority_messages_come_first, many_processes_talk,
     getopts_and_setopts, node_info_is_sane, dist_statistics, controller_answers_send,
     controller_ignores_garbage].

%% One pair of nodes for the whole suite.
init_per_suite(Config0) ->
    Config = macula_dist_case:case_begin(pair, macula_dist_case:suite_begin(Config0)),
    A = macula_dist_case:start(a),
    B = macula_dist_case:start(b),
    ok = macula_dist_case:connect(A, B),
    [{a, A}, {b, B} | Config].

end_per_suite(Config) ->
    {A, B} = pair(Config),
    lists:foreach(fun macula_dist_case:stop/1, [A, B]),
    ok = macula_dist_case:case_end(pair, Config),
    macula_dist_case:suite_end(Config).

init_per_testcase(_Case, Config) -> Config.

%% No case may cost the pair its connection or leave a complaint of the VM in a log.
end_per_testcase(_Case, Config) ->
    {A, B} = pair(Config),
    case lists:member(macula_dist_case:node_of(B),
                      macula_dist_case:call(A, erlang, nodes, [connected])) of
        true -> ok;
        false -> {fail, connection_lost}
    end.

pair(Config) ->
    {proplists:get_value(a, Config), proplists:get_value(b, Config)}.

%% Runs Fun(NodeB) at A.
at_a(Config, Fun) ->
    {A, B} = pair(Config),
    macula_dist_case:call(A, Fun, [macula_dist_case:node_of(B)]).

%% -- cases ----------------------------------------------------------------------------------------

rpc_calls(Config) ->
    ok = at_a(Config, fun(B) ->
        B = rpc:call(B, erlang, node, []),
        {badrpc, {'EXIT', {undef, _}}} = rpc:call(B, no_such_module, f, []),
        {badrpc, timeout} = rpc:call(B, timer, sleep, [infinity], 50),
        Key = rpc:async_call(B, lists, seq, [1, 1000]),
        1000 = length(rpc:yield(Key)),
        {[B], []} = rpc:multicall([B], erlang, node, []),
        true = rpc:cast(B, erlang, send, [self(), cast]),
        receive cast -> ok after ?WAIT -> error(cast_lost) end
    end).

erpc_calls_and_exceptions(Config) ->
    ok = at_a(Config, fun(B) ->
        B = erpc:call(B, erlang, node, []),
        {'EXIT', {{exception, badarith, _}, _}} = (catch erpc:call(B, fun() -> 1 / id(0) end)),
        thrown = try erpc:call(B, fun() -> throw(ball) end) catch throw:ball -> thrown end,
        {'EXIT', {{erpc, timeout}, _}} = (catch erpc:call(B, timer, sleep, [infinity], 50)),
        [{ok, B}] = erpc:multicall([B], erlang, node, []),
        Ids = lists:foldl(fun(N, Acc) ->
            erpc:send_request(B, fun() -> N * N end, N, Acc)
        end, erpc:reqids_new(), lists:seq(1, 200)),
        200 = erpc:reqids_size(Ids),
        gather(Ids, 200)
    end).

gather(Ids, 0) ->
    no_request = erpc:receive_response(Ids, 5000, true),
    ok;
gather(Ids0, Left) ->
    {{response, Square}, N, Ids} = erpc:wait_response(Ids0, 10000, true),
    Square = N * N,
    gather(Ids, Left - 1).

id(X) -> X.

%% Every size around the borders of packets, frames and fragments, and the large ones.
messages_from_0_bytes_to_256_mib(Config) ->
    Borders = lists:usort(lists:append([[max(0, S - 1), S, S + 1]
                                        || S <- [0, 64, 255, 1200, 1452, 4096, 16384, 65535, 65536,
                                                 131072, 1 bsl 20, 8 bsl 20]])),
    ok = at_a(Config, fun(B) ->
        Echo = spawn_link(B, fun echo/0),
        lists:foreach(fun(Size) -> ok = echo_bytes(Echo, Size) end,
                      Borders ++ [64 bsl 20, 256 bsl 20]),
        unlink(Echo),
        exit(Echo, kill),
        erlang:garbage_collect(),
        ok
    end).

%% At a node of its own each, which take what they held with them. Half a minute and 4 GB of memory
%% with any carrier, hence part of the soak.
message_of_1_gib(_Config) ->
    case os:getenv("MACULA_SOAK") of
        false ->
            {skip, "MACULA_SOAK=1 runs it"};
        _ ->
            A = macula_dist_case:start(big_a),
            B = macula_dist_case:start(big_b),
            ok = macula_dist_case:connect(A, B),
            {Ms, ok} = macula_dist_case:call(A, fun() ->
                Echo = spawn_link(macula_dist_case:node_of(B), fun echo/0),
                macula_dist_case:timed(fun() -> echo_bytes(Echo, 1 bsl 30) end)
            end),
            ct:log("1 GiB there, hashed at both ends, in ~p ms", [Ms]),
            lists:foreach(fun macula_dist_case:stop/1, [A, B])
    end.

echo() ->
    receive
        {From, Ref, Bin} ->
            From ! {Ref, byte_size(Bin), erlang:md5(Bin)},
            erlang:garbage_collect(),
            echo()
    end.

echo_bytes(Echo, Size) ->
    Bin = pattern(Size),
    Ref = make_ref(),
    Echo ! {self(), Ref, Bin},
    Md5 = erlang:md5(Bin),
    receive
        {Ref, Size, Md5} -> ok;
        {Ref, Other, _} -> error({damaged, Size, Other})
    after 60000 -> error({lost, Size})
    end.

%% Bytes that differ by position, so that a swapped or repeated piece shows.
pattern(Size) ->
    Block = << <<N:32>> || N <- lists:seq(1, 4099) >>,
    Whole = binary:copy(Block, Size div byte_size(Block) + 1),
    binary:part(Whole, 0, Size).

every_kind_of_term(Config) ->
    ok = at_a(Config, fun(B) ->
        Terms = [[], {}, #{}, <<>>, <<1:1>>, <<7:3>>, 0, -1, 1 bsl 59, -(1 bsl 200), 1.0e300, -0.5,
                 '', 'żółw', list_to_atom(lists:duplicate(255, $a)), "text", [a | b],
                 self(), make_ref(), alias(), fun lists:map/2, fun(X) -> {X, B} end,
                 maps:from_list([{N, {N, [N]}} || N <- lists:seq(1, 100)]),
                 list_to_tuple(lists:seq(1, 300)), lists:seq(1, 100000),
                 [list_to_atom("atom_" ++ integer_to_list(N)) || N <- lists:seq(1, 3000)],
                 binary:copy(<<1>>, 65), lists:duplicate(100, binary:copy(<<2>>, 100000)),
                 hd(erlang:ports())],
        Echo = spawn_link(B, fun term_echo/0),
        lists:foreach(fun(Term) ->
            Ref = make_ref(),
            Echo ! {self(), Ref, Term},
            receive {Ref, Back} -> Back =:= Term orelse error({changed, Term, Back})
            after ?WAIT -> error({lost, Term})
            end
        end, Terms),
        unlink(Echo),
        exit(Echo, kill),
        ok
    end).

term_echo() ->
    receive {From, Ref, Term} -> From ! {Ref, Term}, term_echo() end.

links(Config) ->
    ok = at_a(Config, fun(B) ->
        process_flag(trap_exit, true),
        P1 = spawn_link(B, fun() -> exit(why) end),
        receive {'EXIT', P1, why} -> ok after ?WAIT -> error(no_exit) end,
        P2 = spawn(B, fun wait/0),
        link(P2),
        P2 ! {finish, {big, lists:seq(1, 100000)}},
        receive {'EXIT', P2, {big, L}} -> 100000 = length(L) after ?WAIT -> error(no_exit) end,
        link(P2),
        receive {'EXIT', P2, noproc} -> ok after ?WAIT -> error(no_noproc) end,
        P3 = spawn_link(B, fun wait/0),
        unlink(P3),
        exit(P3, kill),
        M = monitor(process, P3),
        receive {'DOWN', M, _, _, _} -> ok after ?WAIT -> error(no_down) end,
        receive {'EXIT', P3, _} -> error(unlinked) after 0 -> ok end,
        %% A link the other way round: the far process falls with the near one.
        Near = spawn(fun() -> Far = spawn_link(B, fun wait/0), receive {far, To} -> To ! Far end,
                              receive die -> exit(gone) end end),
        Near ! {far, self()},
        Far = receive Pid when is_pid(Pid) -> Pid after ?WAIT -> error(no_far) end,
        MFar = monitor(process, Far),
        Near ! die,
        receive {'DOWN', MFar, _, _, gone} -> ok after ?WAIT -> error(far_lives) end
    end).

wait() ->
    receive {finish, Reason} -> exit(Reason) end.

monitors(Config) ->
    ok = at_a(Config, fun(B) ->
        {P1, M1} = spawn_monitor(B, fun wait/0),
        P1 ! {finish, done},
        receive {'DOWN', M1, process, P1, done} -> ok after ?WAIT -> error(no_down) end,
        M2 = monitor(process, P1),
        receive {'DOWN', M2, process, P1, noproc} -> ok after ?WAIT -> error(no_down) end,
        M3 = monitor(process, {no_such_name, B}),
        receive {'DOWN', M3, process, {no_such_name, B}, noproc} -> ok
        after ?WAIT -> error(no_down) end,
        P4 = spawn(B, fun() -> register(watched_name, self()), wait() end),
        await_name(B, watched_name),
        M4 = monitor(process, {watched_name, B}),
        P4 ! {finish, by_name},
        receive {'DOWN', M4, process, {watched_name, B}, by_name} -> ok
        after ?WAIT -> error(no_down) end,
        P5 = spawn(B, fun wait/0),
        M5 = monitor(process, P5),
        true = demonitor(M5, [flush]),
        P5 ! {finish, x},
        M6 = monitor(process, P5),
        receive {'DOWN', M6, _, _, _} -> ok after ?WAIT -> error(no_down) end,
        receive {'DOWN', M5, _, _, _} -> error(demonitored) after 0 -> ok end
    end).

await_name(B, Name) ->
    case erpc:call(B, erlang, whereis, [Name]) of
        undefined -> await_name(B, Name);
        _ -> ok
    end.

remote_spawns(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        P1 = spawn(B, erlang, send, [Self, spawned]),
        B = node(P1),
        receive spawned -> ok after ?WAIT -> error(no_spawn) end,
        R2 = spawn_request(B, fun() -> ok end, [monitor, {reply_tag, tag}]),
        receive {tag, R2, ok, P2} ->
            receive {'DOWN', R2, process, P2, normal} -> ok after ?WAIT -> error(no_down) end
        after ?WAIT -> error(no_spawn_reply) end,
        R3 = spawn_request(B, no_such_module, f, [], [monitor]),
        receive {spawn_reply, R3, ok, P3} ->
            receive {'DOWN', R3, process, P3, {undef, _}} -> ok after ?WAIT -> error(no_down) end
        after ?WAIT -> error(no_spawn_reply) end,
        R4 = spawn_request(B, erlang, send, [Self, x], [no_such_option]),
        receive {spawn_reply, R4, error, badopt} -> ok after ?WAIT -> error(no_refusal) end,
        {P5, M5} = spawn_opt(B, fun wait/0, [monitor, {priority, high}]),
        P5 ! {finish, ok},
        receive {'DOWN', M5, _, _, ok} -> ok after ?WAIT -> error(no_down) end,
        %% A thousand at once, each reply and each end.
        Refs = [spawn_request(B, fun() -> exit(N) end, [monitor]) || N <- lists:seq(1, 1000)],
        lists:foreach(fun({N, Ref}) ->
            receive {spawn_reply, Ref, ok, _} -> ok after ?WAIT -> error({no_reply, N}) end,
            receive {'DOWN', Ref, process, _, N} -> ok after ?WAIT -> error({no_down, N}) end
        end, lists:zip(lists:seq(1, 1000), Refs))
    end).

exit_signals(Config) ->
    ok = at_a(Config, fun(B) ->
        {P1, M1} = spawn_monitor(B, fun wait/0),
        exit(P1, reason),
        receive {'DOWN', M1, _, _, reason} -> ok after ?WAIT -> error(no_down) end,
        {P2, M2} = spawn_monitor(B, fun wait/0),
        exit(P2, kill),
        receive {'DOWN', M2, _, _, killed} -> ok after ?WAIT -> error(no_down) end,
        Self = self(),
        {P3, M3} = spawn_monitor(B, fun() ->
            process_flag(trap_exit, true),
            Self ! trapping,
            receive {'EXIT', From, Why} -> exit({trapped, From, Why}) end
        end),
        receive trapping -> ok after ?WAIT -> error(not_started) end,
        exit(P3, soft),
        receive {'DOWN', M3, _, _, {trapped, Self, soft}} -> ok after ?WAIT -> error(no_down) end
    end).

aliases(Config) ->
    ok = at_a(Config, fun(B) ->
        A1 = alias([reply]),
        spawn(B, fun() -> A1 ! one, A1 ! two end),
        receive one -> ok after ?WAIT -> error(alias_lost) end,
        receive two -> error(alias_stayed) after 200 -> ok end,
        {P, MA} = spawn_opt(B, fun() -> receive {go, To} -> To ! {To, reply} end end,
                            [{monitor, [{alias, reply_demonitor}]}]),
        P ! {go, MA},
        receive {MA, reply} -> ok after ?WAIT -> error(no_reply) end,
        receive {'DOWN', MA, _, _, _} -> error(still_monitored) after 100 -> ok end
    end).

group_leader_output(Config) ->
    ok = at_a(Config, fun(B) ->
        Collector = spawn_link(fun() -> io_server([]) end),
        Self = self(),
        spawn(B, fun() -> group_leader(Collector, self()), io:format("hello ~p", [node()]),
                          Self ! printed end),
        receive printed -> ok after ?WAIT -> error(not_printed) end,
        Collector ! {get, self()},
        Text = receive {text, T} -> lists:flatten(T) after ?WAIT -> error(no_text) end,
        Text = lists:flatten(io_lib:format("hello ~p", [B])),
        ok
    end).

io_server(Acc) ->
    receive
        {io_request, From, As, {put_chars, unicode, M, F, A}} ->
            From ! {io_reply, As, ok},
            io_server([apply(M, F, A) | Acc]);
        {get, From} -> From ! {text, lists:reverse(Acc)}
    end.

global_names_and_locks(Config) ->
    ok = at_a(Config, fun(B) ->
        ok = global:sync(),
        yes = global:register_name(semantics_name, self()),
        Self = self(),
        Self = erpc:call(B, fun() -> global:sync(), global:whereis_name(semantics_name) end),
        no = erpc:call(B, fun() -> global:register_name(semantics_name, whereis(init)) end),
        erpc:call(B, fun() -> global:send(semantics_name, through_global) end),
        receive through_global -> ok after ?WAIT -> error(not_sent) end,
        _ = global:unregister_name(semantics_name),
        true = global:set_lock({semantics_lock, self()}),
        false = erpc:call(B, fun() -> global:set_lock({semantics_lock, self()}, [node(Self), node()],
                                                       0) end),
        true = global:del_lock({semantics_lock, self()}),
        ok
    end).

pg_groups(Config) ->
    ok = at_a(Config, fun(B) ->
        Scope = semantics_scope,
        {ok, Local} = pg:start(Scope),
        Remote = spawn(B, fun() -> {ok, _} = pg:start(Scope), ok = pg:join(Scope, g, self()),
                                   wait() end),
        ok = pg:join(Scope, g, self()),
        Both = lists:sort([self(), Remote]),
        until(fun() -> lists:sort(pg:get_members(Scope, g)) =:= Both end),
        until(fun() -> lists:sort(erpc:call(B, pg, get_members, [Scope, g])) =:= Both end),
        Self = self(),
        [Self] = pg:get_local_members(Scope, g),
        Remote ! {finish, normal},
        until(fun() -> pg:get_members(Scope, g) =:= [Self] end),
        ok = pg:leave(Scope, g, self()),
        gen_server:stop(Local)
    end).

until(Fun) -> until(Fun, 1000).

until(_Fun, 0) -> error(never);
until(Fun, N) ->
    case Fun() of
        true -> ok;
        false -> receive after 10 -> until(Fun, N - 1) end
    end.

mnesia_replicates(Config) ->
    ok = at_a(Config, fun(B) ->
        ok = application:set_env(mnesia, dir, "unused_a"),
        ok = mnesia:start(),
        ok = erpc:call(B, fun() -> ok = application:set_env(mnesia, dir, "unused_b"),
                                   mnesia:start() end),
        {ok, [B]} = mnesia:change_config(extra_db_nodes, [B]),
        {atomic, ok} = mnesia:create_table(t, [{ram_copies, [node(), B]}]),
        lists:foreach(fun(N) ->
            {atomic, ok} = mnesia:transaction(fun() -> mnesia:write({t, N, N * N}) end)
        end, lists:seq(1, 300)),
        {atomic, ok} = erpc:call(B, fun() ->
            mnesia:transaction(fun() ->
                lists:foreach(fun(N) -> Sq = N * N, [{t, N, Sq}] = mnesia:read(t, N) end,
                              lists:seq(1, 300)),
                mnesia:write({t, from_b, 1})
            end)
        end),
        %% Not a dirty read: what B has committed may still be on its way to this copy.
        {atomic, [{t, from_b, 1}]} = mnesia:transaction(fun() -> mnesia:read(t, from_b) end),
        {atomic, ok} = mnesia:delete_table(t),
        stopped = erpc:call(B, mnesia, stop, []),
        stopped = mnesia:stop(),
        ok
    end).

gen_server_multi_call(Config) ->
    ok = at_a(Config, fun(B) ->
        Here = node(),
        {Replies, []} = gen_server:multi_call([Here, B], rex, {call, erlang, node, [], self()}),
        [{Here, Here}, {B, B}] = lists:sort(fun({X, _}, _) -> X =:= Here end, Replies),
        ok
    end).

monitor_node_bif(Config) ->
    {A, _} = pair(Config),
    C = macula_dist_case:start(c),
    NodeC = macula_dist_case:node_of(C),
    ok = macula_dist_case:connect(A, C),
    Starter = macula_dist_case:call(A, fun() ->
        Caller = self(),
        Pid = spawn(fun() -> true = monitor_node(NodeC, true), Caller ! {self(), set},
                             receive {nodedown, NodeC} -> seen(yes) end end),
        receive {Pid, set} -> Pid end
    end),
    macula_dist_case:stop(C),
    macula_dist_case:eventually(fun() ->
        not macula_dist_case:call(A, erlang, is_process_alive, [Starter])
    end).

seen(yes) -> ok.

%% A send that may not suspend still reaches an idle link; under load it may only say nosuspend.
nosuspend_sends(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        Echo = spawn_link(B, fun term_echo/0),
        Ref = make_ref(),
        ok = erlang:send(Echo, {Self, Ref, hi}, [nosuspend]),
        receive {Ref, hi} -> ok after ?WAIT -> error(lost) end,
        Counter = spawn_link(B, fun() -> count(0) end),
        Bin = binary:copy(<<0>>, 1 bsl 20),
        Sent = length([ok || _ <- lists:seq(1, 300),
                             erlang:send(Counter, {data, Bin}, [nosuspend]) =:= ok]),
        Counter ! {get, Self},
        receive {counted, Sent} -> ok;
                {counted, Other} -> error({Other, arrived_of, Sent})
        after ?WAIT -> error(no_count) end,
        [begin unlink(P), exit(P, kill) end || P <- [Echo, Counter]],
        ok
    end).

count(N) ->
    receive
        {data, _} -> count(N + 1);
        {get, From} -> From ! {counted, N}, count(N)
    end.

noconnect_sends(Config) ->
    {A, _} = pair(Config),
    D = macula_dist_case:start(d),
    NodeD = macula_dist_case:node_of(D),
    noconnect = macula_dist_case:call(A, erlang, send, [{init, NodeD}, x, [noconnect]]),
    false = lists:member(NodeD, macula_dist_case:call(A, erlang, nodes, [connected])),
    macula_dist_case:stop(D).

%% OTP 28 and later.
priority_messages_come_first(Config) ->
    {_, B} = pair(Config),
    case macula_dist_case:call(B, macula_test_priority, is_known, []) of
        true ->
            Expected = macula_test_priority:expected(),
            Orders = at_a(Config, fun(Node) -> macula_test_priority:orders(Node, 10) end),
            [Expected] = lists:usort(Orders);
        false ->
            {skip, "this VM has no priority messages"}
    end.

%% 200 pairs of processes with their own sizes and directions, all at once; each checks every reply.
many_processes_talk(Config) ->
    ok = at_a(Config, fun(B) ->
        Workers = [spawn_monitor(fun() -> talk(B, N, 50) end) || N <- lists:seq(1, 200)],
        lists:foreach(fun({P, M}) ->
            receive {'DOWN', M, process, P, Reason} -> Reason =:= normal orelse error(Reason)
            after 60000 -> error({stuck, P}) end
        end, Workers)
    end).

talk(B, N, Rounds) ->
    Echo = spawn_link(B, fun echo/0),
    lists:foreach(fun(R) -> ok = echo_bytes(Echo, (N * 7919 + R * 104729) rem 50000) end,
                  lists:seq(1, Rounds)),
    unlink(Echo),
    exit(Echo, kill).

getopts_and_setopts(Config) ->
    ok = at_a(Config, fun(B) ->
        {ok, [{nodelay, NoDelay}]} = net_kernel:getopts(B, [nodelay]),
        true = is_boolean(NoDelay),
        ok = net_kernel:setopts(B, [{nodelay, true}]),
        {error, _} = net_kernel:setopts(B, [{active, true}]),
        {error, noconnection} = net_kernel:getopts('not_there@127.0.0.1', [nodelay]),
        pong = net_adm:ping(B),
        ok
    end).

node_info_is_sane(Config) ->
    {A, B} = pair(Config),
    NodeB = macula_dist_case:node_of(B),
    {ok, Info} = macula_dist_case:call(A, net_kernel, node_info, [NodeB]),
    up = proplists:get_value(state, Info),
    normal = proplists:get_value(type, Info),
    true = is_pid(proplists:get_value(owner, Info)),
    {net_address, Address, Host, Protocol, Family} = proplists:get_value(address, Info),
    true = lists:member(Family, [inet, inet6]),
    "127.0.0.1" = Host,
    {{127, 0, 0, 1}, Port} = Address,
    true = is_integer(Port) andalso Port > 0,
    case macula_dist_case:carrier() of
        "macula" -> quic = Protocol;
        _ -> ok
    end,
    In = proplists:get_value(in, Info),
    Out = proplists:get_value(out, Info),
    true = is_integer(In) andalso In > 0 andalso is_integer(Out) andalso Out > 0.

%% The counters the tick logic and people look at move with traffic, in both directions.
dist_statistics(Config) ->
    {A, B} = pair(Config),
    NodeB = macula_dist_case:node_of(B),
    {In0, Out0} = in_out(A, NodeB),
    100 = macula_dist_case:call(A, fun() ->
        length([pong || _ <- lists:seq(1, 100), net_adm:ping(NodeB) =:= pong])
    end),
    {In1, Out1} = in_out(A, NodeB),
    true = In1 - In0 >= 100,
    true = Out1 - Out0 >= 100.

in_out(A, NodeB) ->
    {ok, Info} = macula_dist_case:call(A, net_kernel, node_info, [NodeB]),
    {proplists:get_value(in, Info), proplists:get_value(out, Info)}.

%% OTP's own suites put hand-made packets on a link this way.
controller_answers_send(Config) ->
    case macula_dist_case:carrier() of
        "inet" ++ _ -> {skip, "a port or tls_sender is the controller"};
        _ ->
            ok = at_a(Config, fun(B) ->
                {B, Ctrl} = lists:keyfind(B, 1, erlang:system_info(dist_ctrl)),
                true = is_pid(Ctrl),
                %% An ordinary message to a registered name (REG_SEND) behind an empty header.
                Sink = spawn_link(B, fun() -> register(raw_sink, self()), sink([]) end),
                await_name(B, raw_sink),
                <<131, Control/binary>> = term_to_binary({6, self(), '', raw_sink}),
                <<131, Payload/binary>> = term_to_binary({raw, [1, 2, 3]}),
                lists:foreach(fun(N) ->
                    Ref = make_ref(),
                    Ctrl ! {send, self(), Ref, [131, $D, 0, Control, Payload]},
                    receive {Ref, ok} -> ok after ?WAIT -> error({no_answer, N}) end
                end, lists:seq(1, 100)),
                until(fun() -> Sink ! {get, self()},
                               receive {got, L} -> length(L) =:= 100 end end),
                unlink(Sink),
                exit(Sink, kill),
                ok
            end)
    end.

sink(Acc) ->
    receive
        {raw, _} = M -> sink([M | Acc]);
        {get, From} -> From ! {got, Acc}, sink(Acc)
    end.

controller_ignores_garbage(Config) ->
    ok = at_a(Config, fun(B) ->
        {B, Ctrl} = lists:keyfind(B, 1, erlang:system_info(dist_ctrl)),
        case is_pid(Ctrl) of
            false -> ok;
            true ->
                {links, Links} = process_info(Ctrl, links),
                Targets = [Ctrl | [P || P <- Links, is_pid(P), P =/= whereis(net_kernel)]],
                Garbage = [x, {}, {1, 2, 3}, <<"bin">>, {send, x}, {make_ref(), self(), nonsense},
                           {'EXIT', self(), normal}, {quic, x, y, z}, dist_data, tick_me,
                           {quic, closed, self(), #{}}, [1 | 2]],
                [P ! G || P <- Targets, G <- Garbage],
                pong = net_adm:ping(B),
                [true = is_process_alive(P) || P <- Targets],
                ok
        end
    end).
