%% What the distribution suites share: nodes as OS processes of their own, driven over standard
%% input and output so that the distribution under test is touched by the test alone.
%%
%% MACULA_TEST_CARRIER (default `macula') names the carrier, so that every expectation can first be
%% proven on a carrier that OTP ships: `inet_tcp', or `gen_tcp' with MACULA_TEST_CARRIER_PA naming
%% the directory of the compiled example. MACULA_TEST_DIST_ARGS are more arguments of every node, such as
%% `-macula_dist_lanes 1'.
-module(macula_dist_case).

-export([suite_begin/1, suite_end/1, case_begin/2, case_end/2, keep/1, drop/1]).
-export([carrier/0, carrier_args/0, needs_macula/1, quick/0, quick/1]).
-export([start/1, start/2, start_many/2, stop/1, kill/1, signal/2]).
-export([call/2, call/3, call/4, node_of/1, connect/2, connected/2, port_of/1, block/2,
         relayed_pair/1, relayed_pair/2, found_at/2]).
-export([log/1, await_log/2, await_log/3, logged/2]).
-export([os_erl/1, os_erl/2, os_output/1, os_await/2, os_await/3, os_stop/1]).
-export([eventually/1, eventually/2, settled/1, timed/1, unique/1, free_tcp_port/0]).
-export([suspend/2, rss/1, native_memory/1, controllers/1]).
-export([nodedown_watch/1, await_nodedown/3, node_events/2]).

%% As an `-epmd_module': all hosts are here, and all nodes are at `-port_of_all'.
-export([start_link/0, register_node/2, register_node/3, port_please/2, address_please/3]).

-type test_node() :: #{peer := pid(), node := node(), os_pid := string(), log := file:filename()}.
-export_type([test_node/0]).

-define(PIDS, {?MODULE, os_pids}).

%% -- suite and case frames ------------------------------------------------------------------------

%% An EPMD of the suite's own: nodes of other runs on this machine are not seen and not disturbed.
%% It runs before there are nodes: one that `erl' starts may listen too late for the first of them.
suite_begin(Config) ->
    Port = free_tcp_port(),
    Saved = os:getenv("ERL_EPMD_PORT"),
    os:putenv("ERL_EPMD_PORT", integer_to_list(Port)),
    Epmd = "epmd -port " ++ integer_to_list(Port),
    _ = os:cmd(Epmd ++ " -daemon"),
    ok = eventually(fun() ->
        Answer = os:cmd(Epmd ++ " -names"),
        re:run(Answer, "up and running", [{capture, none}]) =:= match orelse Answer
    end),
    [{epmd_port, Port}, {epmd_saved, Saved} | Config].

suite_end(Config) ->
    Port = proplists:get_value(epmd_port, Config),
    Kill = "epmd -port " ++ integer_to_list(Port) ++ " -kill 2>&1",
    %% It refuses while it believes that nodes live which have just been killed.
    ok = eventually(fun() ->
        Answer = os:cmd(Kill),
        re:run(Answer, "Killed|annot connect", [{capture, none}]) =:= match orelse Answer
    end),
    case proplists:get_value(epmd_saved, Config) of
        false -> os:unsetenv("ERL_EPMD_PORT");
        Value -> os:putenv("ERL_EPMD_PORT", Value)
    end,
    ok.

case_begin(Case, Config) ->
    persistent_term:put(?PIDS, []),
    Dir = filename:join(proplists:get_value(priv_dir, Config), atom_to_list(Case)),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    persistent_term:put({?MODULE, dir}, Dir),
    Config.

%% Whatever the case did, none of its nodes survives it.
case_end(_Case, _Config) ->
    lists:foreach(fun(OsPid) -> os_signal("KILL", OsPid) end, persistent_term:get(?PIDS, [])),
    persistent_term:put(?PIDS, []),
    ok.

%% What Fun makes lives on in a keeper process until drop/1: a suite's or group's beginning runs in
%% a process that ends with it, and takes with it what is linked to it.
keep(Fun) ->
    {Keeper, MRef} = spawn_monitor(fun() ->
        Made = Fun(),
        receive {take, From} -> From ! {self(), Made} end,
        receive drop -> exit(shutdown) end
    end),
    Keeper ! {take, self()},
    receive
        {Keeper, Made} -> demonitor(MRef, [flush]), {Keeper, Made};
        {'DOWN', MRef, process, Keeper, Reason} -> error(Reason)
    end.

drop(Keeper) ->
    MRef = monitor(process, Keeper),
    Keeper ! drop,
    receive {'DOWN', MRef, process, Keeper, _} -> ok end.

%% -- the carrier ----------------------------------------------------------------------------------

carrier() ->
    os:getenv("MACULA_TEST_CARRIER", "macula").

carrier_args() ->
    Pa = case os:getenv("MACULA_TEST_CARRIER_PA") of
        false -> [];
        Dir -> ["-pa", Dir]
    end,
    Pa ++ ["-pa", ebin(), "-proto_dist", carrier()].

%% For cases about what only this carrier promises.
needs_macula(Fun) ->
    case carrier() of
        "macula" -> Fun();
        Other -> {skip, Other ++ " makes no such promise"}
    end.

%% Where a death is awaited and the default liveness timeout is not what the case is about.
quick() -> quick(#{}).

quick(Options) -> args(["-macula_dist_liveness", "3000"], Options).

ebin() ->
    filename:dirname(code:which(macula_app)).

%% -- nodes ----------------------------------------------------------------------------------------

start(Name) ->
    start(Name, #{}).

%% The name is made unique unless `exact' is true. Other options: those of macula_test_nodes. The
%% node logs to a file of its own.
-spec start(string() | atom(), map()) -> test_node().
start(Name0, Opts) ->
    Name = case maps:get(exact, Opts, false) of
        true -> str(Name0);
        false -> unique(str(Name0))
    end,
    Log = filename:join(persistent_term:get({?MODULE, dir}), unique(str(Name0)) ++ ".log"),
    Long = maps:get(longnames, Opts, true),
    Host = maps:get(host, Opts, case Long of true -> "127.0.0.1"; false -> short_host() end),
    Handler = lists:flatten(io_lib:format(
        "[{handler,default,logger_std_h,#{config=>#{file=>~p}}}]", [Log])),
    Pa = case os:getenv("MACULA_TEST_CARRIER_PA") of
        false -> [];
        Dir -> ["-pa", Dir]
    end,
    Everywhere = string:lexemes(os:getenv("MACULA_TEST_DIST_ARGS", ""), " "),
    {ok, N} = macula_test_nodes:start(
        Opts#{carrier => list_to_atom(carrier()), name => Name, host => Host,
              args => Pa ++ ["-kernel", "logger", Handler] ++ Everywhere ++ maps:get(args, Opts, [])}),
    remember(maps:get(os_pid, N)),
    N#{log => Log}.

start_many(Names, Opts) ->
    [start(Name, Opts) || Name <- Names].

node_of(#{node := Node}) -> Node.

stop(N) ->
    ok = macula_test_nodes:stop(N),
    forget(N).

%% kill -9, and waits until the process is gone.
kill(N) ->
    ok = macula_test_nodes:kill(N),
    forget(N).

%% The system may give its number to a process that is none of ours.
forget(#{os_pid := OsPid}) ->
    persistent_term:put(?PIDS, lists:delete(OsPid, persistent_term:get(?PIDS, []))).

signal(#{os_pid := OsPid}, Signal) ->
    os_signal(Signal, OsPid).

os_signal(Signal, OsPid) ->
    _ = os:cmd("kill -" ++ Signal ++ " " ++ OsPid ++ " 2>/dev/null"),
    ok.

call(N, Fun) ->
    call(N, Fun, []).

call(N, Fun, Args) ->
    call(N, erlang, apply, [Fun, Args]).

call(N, M, F, A) ->
    macula_test_nodes:call(N, M, F, A, 300000).

%% Connects A to B and waits until both know.
connect(A, B) ->
    NodeA = node_of(A),
    NodeB = node_of(B),
    pong = call(A, net_adm, ping, [NodeB]),
    eventually(fun() -> lists:member(NodeA, call(B, erlang, nodes, [connected])) end).

connected(A, B) ->
    lists:member(node_of(B), call(A, erlang, nodes, [connected])).

%% The port that the system gave the node, or that it was told.
port_of(N) ->
    [Name, Host] = string:split(atom_to_list(node_of(N)), "@"),
    {port, Port, _} = call(N, erl_epmd, port_please, [Name, Host]),
    Port.

%% Every scheduler of N stands still for Ms, its native threads go on. Returns when N does not
%% answer any more; the function it returns waits for the end.
block(N, Ms) ->
    _ = call(N, erts_debug, set_internal_state, [available_internal_state, true]),
    Pid = spawn_link(fun() ->
        _ = call(N, erts_debug, set_internal_state, [block, Ms]),
        receive {tell, To} -> To ! {self(), unblocked} end
    end),
    ok = eventually(fun() ->
        try macula_test_nodes:call(N, erlang, is_alive, [], 300) of
            true -> false
        catch
            exit:_ -> true
        end
    end),
    fun() ->
        Pid ! {tell, self()},
        receive {Pid, unblocked} -> ok after Ms + 20000 -> error(still_blocked) end
    end.

%% A and B, connected through a relay: A's table of nodes says that B is where the relay listens.
%% A carrier over TCP cannot be relayed so; it gets a plain connection.
relayed_pair(RelayOptions) ->
    relayed_pair(RelayOptions, #{}).

relayed_pair(RelayOptions, NodeOptions) ->
    case carrier() of
        "macula" ->
            B = start(b, NodeOptions),
            Target = {{127, 0, 0, 1}, port_of(B)},
            {ok, Relay} = macula_relay:start_link(RelayOptions#{target => Target}),
            A = start(a, args(found_at(node_of(B), macula_relay:port(Relay)), NodeOptions)),
            ok = connect(A, B),
            #{up := #{forwarded := N}} = macula_relay:stats(Relay),
            true = N > 0,
            {A, B, Relay};
        _ ->
            A = start(a, NodeOptions),
            B = start(b, NodeOptions),
            ok = connect(A, B),
            {A, B, none}
    end.

args(Args, Options) ->
    Options#{args => Args ++ maps:get(args, Options, [])}.

%% Arguments that let a node find another at a port of this host.
found_at(Node, Port) ->
    ["-macula", "dist_nodes",
     lists:flatten(io_lib:format("#{~p => {{127,0,0,1},~b}}", [Node, Port]))].

%% -- nodedown, with its reason --------------------------------------------------------------------

%% Starts a process at N that keeps all node events; returns it.
nodedown_watch(N) ->
    call(N, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            ok = net_kernel:monitor_nodes(true, [nodedown_reason, {node_type, all}]),
            Starter ! {self(), ready},
            watch([])
        end),
        receive {Pid, ready} -> Pid end
    end).

watch(Events) ->
    receive
        {get, From, Ref} -> From ! {Ref, lists:reverse(Events)}, watch(Events);
        {Kind, Node, Info} ->
            Now = erlang:system_time(millisecond),
            watch([{Kind, Node, proplists:get_value(nodedown_reason, Info), Now} | Events])
    end.

%% All node events so far: {nodeup | nodedown, Node, Reason, SystemTimeMs}.
node_events(N, Watch) ->
    call(N, fun() ->
        Ref = make_ref(),
        Watch ! {get, self(), Ref},
        receive {Ref, Events} -> Events after 5000 -> error(watch_lost) end
    end).

%% The reason and system time (ms) of the first nodedown of Node that Watch saw.
await_nodedown({N, Watch}, Node, Timeout) ->
    eventually(fun() ->
        case [{Reason, At} || {nodedown, Down, Reason, At} <- node_events(N, Watch), Down =:= Node] of
            [First | _] -> {value, First};
            [] -> false
        end
    end, Timeout).

%% -- logs -----------------------------------------------------------------------------------------

%% What the node has logged, flushed.
log(#{log := File} = N) ->
    _ = try call(N, logger_std_h, filesync, [default]) catch _:_ -> ok end,
    case file:read_file(File) of
        {ok, Bin} -> Bin;
        {error, enoent} -> <<>>
    end.

logged(N, Regex) ->
    re:run(log(N), Regex, [{capture, none}, caseless]) =:= match.

await_log(N, Regex) ->
    await_log(N, Regex, 10000).

await_log(N, Regex, Timeout) ->
    try eventually(fun() -> logged(N, Regex) end, Timeout)
    catch error:{not_reached, _, _} -> ct:fail({not_logged, Regex, log(N)})
    end.

%% -- erl as a shell would start it ----------------------------------------------------------------

os_erl(Args) ->
    os_erl(Args, []).

%% A bare `erl' with exactly these arguments. A collector process owns the port.
os_erl(Args, Opts) ->
    Exe = proplists:get_value(exe, Opts, os:find_executable("erl")),
    Env = proplists:get_value(env, Opts, []),
    Starter = self(),
    Pid = spawn_link(fun() ->
        Port = open_port({spawn_executable, Exe},
                         [{args, Args}, {env, Env}, exit_status, stderr_to_stdout, binary]),
        {os_pid, OsPid} = erlang:port_info(Port, os_pid),
        Starter ! {self(), integer_to_list(OsPid)},
        collect(Port, <<>>, running)
    end),
    receive {Pid, OsPid} -> remember(OsPid), #{collector => Pid, os_pid => OsPid} end.

collect(Port, Output, Status) ->
    receive
        {Port, {data, Data}} -> collect(Port, <<Output/binary, Data/binary>>, Status);
        {Port, {exit_status, Code}} -> collect(Port, Output, {exited, Code});
        {input, Data} -> true = port_command(Port, Data), collect(Port, Output, Status);
        {get, From, Ref} -> From ! {Ref, Output, Status}, collect(Port, Output, Status)
    end.

os_output(#{collector := Pid}) ->
    Ref = make_ref(),
    Pid ! {get, self(), Ref},
    receive {Ref, Output, Status} -> {Output, Status} after 5000 -> error(collector_lost) end.

os_await(P, Regex) ->
    os_await(P, Regex, 30000).

os_await(P, exit, Timeout) ->
    eventually(fun() ->
        case os_output(P) of
            {Output, {exited, Code}} -> {value, {Code, Output}};
            _ -> false
        end
    end, Timeout);
os_await(P, Regex, Timeout) ->
    try eventually(fun() ->
            {Output, _} = os_output(P),
            re:run(Output, Regex, [{capture, none}]) =:= match
        end, Timeout)
    catch error:{not_reached, _, _} -> ct:fail({not_printed, Regex, os_output(P)})
    end.

os_stop(#{os_pid := OsPid}) ->
    os_signal("KILL", OsPid).

%% The process that `Find' finds on the node stands still until the function is called.
suspend(N, Find) ->
    Suspender = call(N, fun() ->
        Found = Find(),
        Starter = self(),
        Pid = spawn(fun() ->
            true = erlang:suspend_process(Found),
            Starter ! {self(), suspended},
            receive resume -> true = erlang:resume_process(Found) end
        end),
        receive {Pid, suspended} -> Pid end
    end),
    fun() ->
        _ = call(N, erlang, send, [Suspender, resume]),
        ok
    end.

%% -- looking from outside -------------------------------------------------------------------------

%% Resident memory in bytes.
rss(#{os_pid := OsPid}) ->
    list_to_integer(string:trim(os:cmd("ps -o rss= -p " ++ OsPid))) * 1024.

%% What the VM does not account for: native code's memory, stacks, the allocators' slack.
native_memory(N) ->
    rss(N) - call(N, erlang, memory, [total]).

%% The distribution controllers of a node: [{Node, Pid | Port}].
controllers(N) ->
    call(N, erlang, system_info, [dist_ctrl]).

%% -- odds and ends --------------------------------------------------------------------------------

eventually(Fun) -> macula_test_nodes:wait_until(Fun).

%% Waits for true or {value, Value}.
eventually(Fun, Timeout) -> macula_test_nodes:wait_until(Fun, Timeout).

%% Waits until an answer has not changed for half a second.
settled(Fun) -> settled(Fun, Fun()).

settled(Fun, Before) ->
    receive after 500 -> ok end,
    case Fun() of
        Before -> Before;
        Now -> settled(Fun, Now)
    end.

%% {Milliseconds, Result}
timed(Fun) ->
    T0 = erlang:monotonic_time(microsecond),
    Result = Fun(),
    {(erlang:monotonic_time(microsecond) - T0) / 1000, Result}.

unique(Name) ->
    Name ++ "_" ++ os:getpid() ++ "_" ++ integer_to_list(erlang:unique_integer([positive])).

free_tcp_port() -> macula_test_nodes:free_tcp_port().

short_host() ->
    {ok, Host} = inet:gethostname(),
    hd(string:lexemes(Host, ".")).

remember(OsPid) ->
    persistent_term:put(?PIDS, [OsPid | persistent_term:get(?PIDS, [])]).

str(A) when is_atom(A) -> atom_to_list(A);
str(L) -> L.

%% -- as an -epmd_module ---------------------------------------------------------------------------

start_link() -> ignore.

register_node(Name, Port) -> register_node(Name, Port, inet).

register_node(_Name, Port, _Family) ->
    ok = application:set_env(kernel, registered_port, Port),
    {ok, rand:uniform(3)}.

port_please(_Name, _Ip) ->
    {ok, [[Port]]} = init:get_argument(port_of_all),
    {port, list_to_integer(Port), 5}.

address_please(_Name, "nowhere", inet) -> {ok, {127, 0, 0, 1}};
address_please(_Name, _Host, _Family) -> {error, nxdomain}.
