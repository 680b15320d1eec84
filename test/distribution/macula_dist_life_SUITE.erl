%% The life of the VM and of the code in it: restarts, code loaded again, crashes.
-module(macula_dist_life_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([init_restart_brings_the_node_back_on_its_port/1,
         code_loaded_again_drops_no_link_and_no_stream/1,
         code_loaded_again_leaves_a_full_link/1, purged_library_serves_what_it_made_before/1,
         deleted_library_comes_back_and_drops_no_link/1,
         net_kernel_starts_and_stops_a_hundred_times/1,
         application_starts_and_stops_a_hundred_times/1,
         crash_dump_gives_nodedown_at_once/1, halt_with_slogan_gives_nodedown_at_once/1,
         out_of_memory_gives_nodedown_at_once/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           eventually/1, eventually/2, os_erl/2, os_output/1, os_stop/1, unique/1]).

suite() -> [{timetrap, {minutes, 4}}].

all() ->
    [init_restart_brings_the_node_back_on_its_port, code_loaded_again_drops_no_link_and_no_stream,
     code_loaded_again_leaves_a_full_link, purged_library_serves_what_it_made_before,
     deleted_library_comes_back_and_drops_no_link,
     net_kernel_starts_and_stops_a_hundred_times, application_starts_and_stops_a_hundred_times,
     crash_dump_gives_nodedown_at_once, halt_with_slogan_gives_nodedown_at_once,
     out_of_memory_gives_nodedown_at_once].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- helpers --------------------------------------------------------------------------------------

modules() ->
    {ok, Modules} = application:get_key(macula, modules),
    Modules.

%% As a reloader does: what was old is purged, and those who run it are killed.
load_all_again() ->
    [{module, M} = c:l(M) || M <- modules()],
    ok.

%% A listener, a connection and a stream, held by a process of the node that outlives the calls.
hold_stream() ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    Caller = self(),
    Pid = spawn(fun() ->
        {ok, {Cert, Key}} =
            macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0},
                                            [{cert, Cert}, {key, Key}, {alpn, ["life"]}]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        Dial = fun() ->
            macula_quic:connect("127.0.0.1", Port,
                                [{verify_pubkey, Public}, {alpn, ["life"]}], 5000)
        end,
        {ok, Client} = Dial(),
        {ok, Server} = macula_quic:accept(Listener, 5000),
        {ok, Out} = macula_quic:open_stream(Client),
        ok = macula_quic:send(Out, <<"begin">>),
        {ok, In} = macula_quic:accept_stream(Server, #{}, 5000),
        {ok, <<"begin">>} = macula_quic:recv(In, 5, 5000),
        Caller ! {self(), ready},
        holder(Out, In, Dial, [Listener, Client, Server])
    end),
    receive {Pid, ready} -> Pid after 20000 -> error(no_stream) end.

%% Who nobody holds is collected.
holder(Out, In, Dial, Held) ->
    receive
        {use, From} ->
            ok = macula_quic:send(Out, <<"again">>),
            {ok, <<"again">>} = macula_quic:recv(In, 5, 5000),
            {ok, Conn} = Dial(),
            ok = macula_quic:close(Conn),
            From ! {self(), used},
            holder(Out, In, Dial, Held)
    end.

use_stream(Holder) ->
    Monitor = erlang:monitor(process, Holder),
    Holder ! {use, self()},
    receive
        {Holder, used} -> erlang:demonitor(Monitor, [flush]), ok;
        {'DOWN', Monitor, process, Holder, Reason} -> {holder_died, Reason}
    after 20000 -> timeout
    end.

%% -- cases ----------------------------------------------------------------------------------------

%% Native threads go on while all code is unloaded, and a peer dials all the time.
init_restart_brings_the_node_back_on_its_port(_Config) ->
    B = start(b, #{args => ["-no_epmd", "-start_epmd", "false"], exact => true,
                   name => integer_to_list(macula_test_nodes:free_udp_port())}),
    NodeB = node_of(B),
    lists:foreach(fun restart_round/1, [{B, NodeB, Round} || Round <- lists:seq(1, 5)]).

restart_round({B, NodeB, Round}) ->
    Port = integer_to_list(macula_test_nodes:free_udp_port()),
    Name = Port ++ "@127.0.0.1",
    NodeA = list_to_atom(Name),
    Cookie = atom_to_list(call(B, erlang, get_cookie, [])),
    A = os_erl(macula_test_nodes:pa_args() ++ macula_dist_case:carrier_args()
               ++ ["-noinput", "-no_epmd", "-start_epmd", "false", "-name", Name, "-setcookie",
                   Cookie],
               [{env, [{"ERL_CRASH_DUMP", "/dev/null"}]}]),
    Incarnation = fun() ->
        case call(B, rpc, call, [NodeA, erlang, whereis, [net_kernel], 2000]) of
            Pid when is_pid(Pid) -> {value, {Pid, call(B, fun() -> creation(NodeA) end)}};
            _ -> false
        end
    end,
    First = eventually(Incarnation),
    lists:foldl(fun(_, Before) ->
        %% The answer may be lost with the link.
        _ = call(B, rpc, call, [NodeA, init, restart, []]),
        eventually(fun() ->
            {_, Status} = os_output(A),
            Status =:= running orelse ct:fail({died, Round, os_output(A)}),
            case Incarnation() of
                {value, Before} -> false;
                Other -> Other
            end
        end, 20000)
    end, First, [1, 2]),
    ok = os_stop(A),
    ok = eventually(fun() -> not lists:member(NodeA, call(B, erlang, nodes, [connected])) end),
    NodeB = node_of(B).

%% What tells one life of a node from the next.
creation(Node) ->
    Pid = rpc:call(Node, erlang, self, [], 2000),
    is_pid(Pid) andalso binary:part(term_to_binary(Pid), byte_size(term_to_binary(Pid)) - 4, 4).

code_loaded_again_drops_no_link_and_no_stream(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    NodeB = node_of(B),
    Watch = macula_dist_case:nodedown_watch(B),
    Holder = call(A, fun hold_stream/0),
    lists:foreach(fun(_) ->
        ok = call(A, fun load_all_again/0),
        ok = call(A, fun use_stream/1, [Holder]),
        3000000 = byte_size(call(A, erpc, call, [NodeB, binary, copy, [<<1>>, 3000000]]))
    end, lists:seq(1, 5)),
    %% Nor one that has nothing to do, however quickly it happens.
    [ok = call(A, fun() -> [{module, M} = c:l(M) || M <- lists:duplicate(3, Module)], ok end)
     || Module <- call(A, fun modules/0)],
    ok = call(A, fun use_stream/1, [Holder]),
    3000000 = byte_size(call(A, erpc, call, [NodeB, binary, copy, [<<1>>, 3000000]])),
    %% New links are made by the new code.
    true = call(A, erlang, disconnect_node, [NodeB]),
    %% Or the end of the link could be told as that of one which another has replaced.
    _ = macula_dist_case:await_nodedown({B, Watch}, node_of(A), 15000),
    ok = connect(A, B),
    [connection_closed] = [R || {nodedown, _, R, _} <- macula_dist_case:node_events(B, Watch)],
    ok.

%% The output handler waits for room then.
code_loaded_again_leaves_a_full_link(_Config) ->
    A = start(a, #{args => ["-kernel", "net_ticktime", "600", "-macula_dist_liveness", "300000"]}),
    B = start(b, #{args => ["-kernel", "net_ticktime", "600", "-macula_dist_liveness", "300000"]}),
    ok = connect(A, B),
    NodeB = node_of(B),
    Watch = macula_dist_case:nodedown_watch(A),
    Sink = call(B, fun() ->
        spawn(fun() -> (fun Loop(Count) ->
            receive {count, From} -> From ! {self(), Count}, Loop(Count); {data, _} -> Loop(Count + 1) end
        end)(0) end)
    end),
    ok = macula_dist_case:signal(B, "STOP"),
    Count = 60,
    Sender = call(A, fun() ->
        spawn(fun() ->
            Data = binary:copy(<<7>>, 1000000),
            [Sink ! {data, Data} || _ <- lists:seq(1, Count)],
            receive stop -> ok end
        end)
    end),
    ok = eventually(fun() -> call(A, erlang, process_info, [Sender, status]) =:= {status, suspended} end),
    [ok = call(A, fun load_all_again/0) || _ <- [1, 2, 3]],
    ok = macula_dist_case:signal(B, "CONT"),
    ok = eventually(fun() ->
        Got = call(B, fun() -> Sink ! {count, self()}, receive {Sink, N} -> N end end),
        Got =:= Count orelse {Got, macula_dist_case:node_events(A, Watch),
                              call(A, erlang, process_info, [Sender, status])}
    end, 60000),
    [] = [Event || {nodedown, Node, _, _} = Event <- macula_dist_case:node_events(A, Watch), Node =:= NodeB],
    ok.

purged_library_serves_what_it_made_before(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    Holder = call(A, fun hold_stream/0),
    lists:foreach(fun(_) ->
        ok = call(A, fun() ->
            M = macula_nif,
            _ = code:purge(M),
            true = code:delete(M),
            _ = code:purge(M),
            {module, M} = code:load_file(M),
            ok
        end),
        ok = call(A, fun use_stream/1, [Holder])
    end, lists:seq(1, 5)),
    %% Whoever was at work in the purged code is gone; the node is not, and links again.
    ok = eventually(fun() -> call(A, net_adm, ping, [node_of(B)]) =:= pong end).

%% As every module that is deleted does: whoever calls it next has it loaded.
deleted_library_comes_back_and_drops_no_link(_Config) ->
    [A, B] = [start(Name) || Name <- [a, b]],
    ok = connect(A, B),
    NodeB = node_of(B),
    Watch = call(A, fun() ->
        spawn(fun() ->
            ok = net_kernel:monitor_nodes(true),
            receive {nodedown, Node} -> exit({nodedown, Node}) end
        end)
    end),
    lists:foreach(fun(_) ->
        pong = call(A, fun() ->
            _ = code:purge(macula_nif),
            true = code:delete(macula_nif),
            net_adm:ping(NodeB)
        end)
    end, lists:seq(1, 20)),
    true = call(A, erlang, is_process_alive, [Watch]),
    true = lists:member(NodeB, call(A, erlang, nodes, [])).

net_kernel_starts_and_stops_a_hundred_times(_Config) ->
    B = start(b),
    NodeB = node_of(B),
    {ok, N0} = macula_test_nodes:start(#{carrier => none,
                                         args => macula_dist_case:carrier_args()}),
    N = N0#{log => "none"},
    Cookie = call(B, erlang, get_cookie, []),
    lists:foreach(fun(_) ->
        Name = list_to_atom(unique("again") ++ "@127.0.0.1"),
        {ok, _} = call(N, net_kernel, start, [[Name, longnames]]),
        true = call(N, erlang, set_cookie, [Cookie]),
        pong = call(N, net_adm, ping, [NodeB]),
        ok = call(N, net_kernel, stop, []),
        ok = eventually(fun() -> call(N, erlang, node, []) =:= nonode@nohost end)
    end, lists:seq(1, 100)),
    ok = eventually(fun() ->
        Live = call(N, macula_nif, live_objects, []),
        {0, 0} =:= {proplists:get_value(link, Live), proplists:get_value(dist_endpoint, Live)}
            orelse Live
    end),
    ok = macula_test_nodes:stop(N).

application_starts_and_stops_a_hundred_times(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    Holder = call(A, fun hold_stream/0),
    ok = call(A, fun() ->
        lists:foreach(fun(_) ->
            {ok, _} = application:ensure_all_started(macula),
            ok = application:stop(macula)
        end, lists:seq(1, 100))
    end),
    ok = call(A, fun use_stream/1, [Holder]),
    true = macula_dist_case:connected(A, B).

%% The dump goes to a pipe that nobody empties: the VM is at it until it is killed.
crash_dump_gives_nodedown_at_once(_Config) ->
    crash(fun(A) -> ok = macula_dist_case:signal(A, "USR1") end).

halt_with_slogan_gives_nodedown_at_once(_Config) ->
    crash(fun(A) ->
        %% No answer comes.
        spawn(fun() -> catch call(A, erlang, halt, ["slogan"]) end)
    end).

%% Whatever takes the memory: one heap, many small ones, terms in tables, binaries.
out_of_memory_gives_nodedown_at_once(_Config) ->
    case os:find_executable("prlimit") of
        false -> {skip, "there is no prlimit here"};
        _ -> lists:foreach(fun(Grow) -> crash(fun(A) -> exhaust(A, Grow) end) end,
                           [heap, heaps, table, binaries])
    end.

%% As under `ulimit -v': the system gives no more than the node has by now, and 300 MB.
exhaust(#{os_pid := OsPid} = A, Grow) ->
    {ok, Status} = file:read_file("/proc/" ++ OsPid ++ "/status"),
    {match, [Size]} = re:run(Status, "VmSize:\\s+(\\d+) kB", [{capture, all_but_first, list}]),
    Limit = integer_to_list((list_to_integer(Size) + 300000) * 1024),
    "" = os:cmd("prlimit --pid " ++ OsPid ++ " --as=" ++ Limit),
    %% No answer comes.
    spawn(fun() -> catch call(A, fun() -> grow(Grow) end) end).

grow(heap) -> grow_heap([]);
grow(heaps) ->
    _ = spawn(fun() -> _ = lists:seq(1, 1000), receive never -> ok end end),
    grow(heaps);
grow(table) -> grow_table(ets:new(grow, [public]), 1);
grow(binaries) -> grow_binaries([]).

grow_heap(L) -> grow_heap([lists:seq(1, 100_000) | L]).

grow_table(T, N) ->
    true = ets:insert(T, {N, N, N, N}),
    grow_table(T, N + 1).

grow_binaries(L) -> grow_binaries([binary:copy(<<0>>, 1000) | L]).

crash(How) ->
    Fifo = filename:join(persistent_term:get({macula_dist_case, dir}), unique("dump")),
    "" = os:cmd("mkfifo " ++ Fifo),
    %% Both ends open, so that the VM's opening does not wait; it is told when the dump has begun.
    Reader = open_port({spawn, "sh -c 'exec 3<>" ++ Fifo ++ "; head -c 1 <&3; read line'"}, []),
    %% Silence alone would be noticed after half a minute.
    Patient = ["-macula_dist_liveness", "40000"],
    A = start(a, #{args => Patient, env => [{"ERL_CRASH_DUMP", Fifo}]}),
    B = start(b, #{args => Patient}),
    ok = connect(A, B),
    Watch = macula_dist_case:nodedown_watch(B),
    How(A),
    receive {Reader, {data, "="}} -> ok after 60000 -> ct:fail(no_dump) end,
    Begun = erlang:system_time(millisecond),
    {connection_closed, At} = macula_dist_case:await_nodedown({B, Watch}, node_of(A), 20000),
    ct:log("~b ms after the beginning of the dump", [At - Begun]),
    true = At - Begun < 10000,
    %% Still at its dump.
    true = macula_test_nodes:is_alive(A),
    ok = macula_dist_case:kill(A),
    true = port_close(Reader),
    ok.
