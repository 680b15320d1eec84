%% @doc Real nodes for tests, on OTP's `peer': control goes over the node's standard input and
%% output, so the distribution under test can be cut, blocked or refused without losing the node.
%%
%% ```
%% macula_test_nodes:with_nodes([#{}, #{args => ["-hidden"]}], fun([A, B]) ->
%%     pong = macula_test_nodes:call(A, net_adm, ping, [macula_test_nodes:name(B)]),
%%     ok = macula_test_nodes:kill(B)
%% end).
%% '''
-module(macula_test_nodes).

-export([start/1, stop/1, with_nodes/2, call/4, call/5, name/1, os_pid/1, link_protocol/2]).
-export([kill/1, pause/1, resume/1, is_alive/1, resident_kb/1, own_kb/1, native_kb/1, allocated_kb/0]).
-export([free_udp_port/0, is_udp_port_free/1, free_tcp_port/0, wait_until/1, wait_until/2, pa_args/0]).
-export([secluded/1]).
-export([snapshot/0, snapshot/1, leaks/2, await_no_leak/1, await_no_leak/2]).

-export_type([test_node/0, options/0, snapshot/0]).

-type test_node() :: #{peer := pid(), node := node(), os_pid := string()}.
%% `carrier': `macula' (default), `inet_tcp', `inet_tls' or another `-proto_dist'; `none' starts a
%% node without distribution. `name' (default: unique) and `host' (default "127.0.0.1") make the
%% node's name, with `-sname' instead when `longnames' is `false'. `cookie' is a string, `args' more
%% arguments of `erl', `env' pairs of strings, `wait_boot' milliseconds (default 30,000). `exec' is
%% another `erl' with arguments before ours, and `pa' its code directories (default: this VM's).
-type options() :: #{
    carrier => atom(), name => string(), host => string(), longnames => boolean(),
    cookie => string(), args => [string()], env => [{string(), string()}],
    exec => {file:filename(), [string()]}, pa => [file:filename()],
    wait_boot => pos_integer()}.
-type snapshot() :: #{processes := integer(), ports := integer(), fds := integer(),
                      memory := integer(), binary := integer(), ets := integer()}.

-define(COOKIE, "macula_test").
-define(TIMEOUT, 15000).

%% @doc Starts a node and waits until it answers. It ends with `stop/1', or with this VM.
-spec start(options()) -> {ok, test_node()} | {error, term()}.
start(Options) ->
    try peer:start(peer_options(Options)) of
        {ok, Peer} -> {ok, running(Peer)};
        {ok, Peer, _Node} -> {ok, running(Peer)};
        {error, _} = Error -> Error
    catch
        %% peer exits with what ended the node's boot
        exit:Reason -> {error, Reason}
    end.

running(Peer) ->
    #{peer => Peer, node => peer:call(Peer, erlang, node, [], ?TIMEOUT),
      os_pid => peer:call(Peer, os, getpid, [], ?TIMEOUT)}.

peer_options(Options) ->
    Carrier = maps:get(carrier, Options, macula),
    Cookie = maps:get(cookie, Options, ?COOKIE),
    Pa = case Options of
        #{pa := Dirs} -> pa_args(Dirs);
        #{} -> pa_args()
    end,
    Base = (maps:with([exec], Options))#{
        connection => standard_io,
        wait_boot => maps:get(wait_boot, Options, 30000),
        env => maps:get(env, Options, []),
        args => Pa ++ carrier_args(Carrier, Cookie) ++ maps:get(args, Options, [])},
    case Carrier of
        none ->
            Base;
        _ ->
            Base#{name => maps:get(name, Options, peer:random_name("macula")),
                  host => maps:get(host, Options, "127.0.0.1"),
                  longnames => maps:get(longnames, Options, true)}
    end.

carrier_args(none, _Cookie) -> [];
carrier_args(Carrier, Cookie) -> ["-proto_dist", atom_to_list(Carrier), "-setcookie", Cookie].

%% @doc The `-pa' arguments that give another VM the code this one runs.
-spec pa_args() -> [string()].
pa_args() ->
    Root = code:lib_dir(),
    Ours = [filename:absname(D) || D <- code:get_path(), D =/= ".", not lists:prefix(Root, D),
                                   filelib:is_dir(D)],
    pa_args(lists:reverse(Ours)).

pa_args(Dirs) ->
    lists:append([["-pa", Dir] || Dir <- Dirs]).

%% @doc The `exec' of a node in a network namespace of its own, which has the loopback interface and
%% what these commands of the shell add. An error where this system makes none.
-spec secluded([string()]) -> {ok, {file:filename(), [string()]}} | {error, string()}.
secluded(Commands) ->
    Steps = lists:join(" && ", ["ip link set lo up" | Commands]),
    case {os:find_executable("unshare"), os:find_executable("erl")} of
        {Unshare, Erl} when is_list(Unshare), is_list(Erl) ->
            Enter = fun(Last) -> ["-n", "sh", "-c", lists:flatten([Steps, " && ", Last]), "sh"] end,
            Trial = open_port({spawn_executable, Unshare},
                              [{args, Enter("true")}, exit_status, stderr_to_stdout]),
            case trial(Trial, []) of
                {0, _} -> {ok, {Unshare, Enter(["exec '", Erl, "' \"$@\""])}};
                {_, Said} -> {error, Said}
            end;
        _ ->
            {error, "needs unshare and erl"}
    end.

trial(Port, Said) ->
    receive
        {Port, {data, Data}} -> trial(Port, [Said, Data]);
        {Port, {exit_status, Status}} -> {Status, lists:flatten(Said)}
    end.

%% @doc Stops the node and waits until its operating system process is gone; one that does not obey
%% (stopped, blocked) is killed.
-spec stop(test_node()) -> ok.
stop(#{peer := Peer} = Node) ->
    case is_stopped(Node) of
        true ->
            kill(Node);
        false ->
            try
                peer:stop(Peer)
            catch
                %% the node has ended already
                exit:_ -> ok
            end,
            try
                wait_until(fun() -> not is_alive(Node) end, 5000)
            catch
                error:{not_reached, _, _} -> kill(Node)
            end
    end.

%% A stopped process (SIGSTOP) can never answer.
is_stopped(#{os_pid := OsPid}) ->
    states("/proc/" ++ OsPid ++ "/stat") =:= "T".

%% Of a process or its threads, as far as the system tells.
states(Wildcard) ->
    [begin
         [_, AfterName] = string:split(Stat, ") ", trailing),
         binary:first(AfterName)
     end || File <- filelib:wildcard(Wildcard), {ok, Stat} <- [file:read_file(File)]].

%% @doc Runs `Fun' with the nodes, which end with it whatever happens.
-spec with_nodes([options()], fun(([test_node()]) -> Result)) -> Result.
with_nodes(Options, Fun) ->
    with_nodes(Options, Fun, []).

with_nodes([], Fun, Nodes) ->
    try
        Fun(lists:reverse(Nodes))
    after
        lists:foreach(fun stop/1, Nodes)
    end;
with_nodes([Options | Rest], Fun, Nodes) ->
    case start(Options) of
        {ok, Node} ->
            with_nodes(Rest, Fun, [Node | Nodes]);
        {error, Reason} ->
            lists:foreach(fun stop/1, Nodes),
            error({node_did_not_start, Options, Reason})
    end.

%% @doc Calls a function on the node, not through its distribution.
-spec call(test_node(), module(), atom(), [term()]) -> term().
call(Node, Module, Function, Args) ->
    call(Node, Module, Function, Args, ?TIMEOUT).

-spec call(test_node(), module(), atom(), [term()], timeout()) -> term().
call(#{peer := Peer}, Module, Function, Args, Timeout) ->
    peer:call(Peer, Module, Function, Args, Timeout).

-spec name(test_node()) -> node().
name(#{node := Name}) -> Name.

-spec os_pid(test_node()) -> string().
os_pid(#{os_pid := OsPid}) -> OsPid.

%% @doc What the link from one node to the other runs over, as net_kernel was told: `tcp', `tls', ...
-spec link_protocol(test_node(), test_node()) -> atom().
link_protocol(Node, To) ->
    {ok, Info} = call(Node, net_kernel, node_info, [name(To)]),
    {net_address, _Address, _Host, Protocol, _Family} = proplists:get_value(address, Info),
    Protocol.

%% @doc Kills the node with SIGKILL and waits until it is gone.
-spec kill(test_node()) -> ok.
kill(#{peer := Peer} = Node) ->
    signal("KILL", Node),
    wait_until(fun() -> not is_alive(Node) end),
    wait_until(fun() -> not is_process_alive(Peer) end).

%% @doc Stops the whole node (SIGSTOP): its schedulers and its native threads.
-spec pause(test_node()) -> ok.
pause(#{os_pid := OsPid} = Node) ->
    %% Until none of its threads runs.
    wait_until(fun() ->
        signal("STOP", Node),
        [S || S <- states("/proc/" ++ OsPid ++ "/task/*/stat"), lists:member(S, "RSD")] =:= []
    end).

-spec resume(test_node()) -> ok.
resume(Node) ->
    signal("CONT", Node).

%% @doc Does the operating system process still exist?
-spec is_alive(test_node()) -> boolean().
is_alive(#{os_pid := OsPid}) ->
    os:cmd("kill -0 " ++ OsPid ++ " 2>/dev/null && echo alive") =/= "".

%% @doc Kilobytes resident in operating system processes together, `unknown' where the system does not
%% tell of each (Linux does).
-spec resident_kb([string()]) -> float() | unknown.
resident_kb(OsPids) ->
    memory_kb("VmRSS", OsPids).

%% @doc The same without what is of files, such as the code of libraries, which processes share.
-spec own_kb([string()]) -> float() | unknown.
own_kb(OsPids) ->
    memory_kb("RssAnon", OsPids).

%% @doc The same of a test node without what its VM's allocators have of the system: memory of native libraries,
%% mostly.
-spec native_kb(test_node()) -> float() | unknown.
native_kb(Node) ->
    case own_kb([os_pid(Node)]) of
        unknown -> unknown;
        Kb -> Kb - call(Node, ?MODULE, allocated_kb, [])
    end.

%% @doc Kilobytes that this VM's allocators have of the system.
-spec allocated_kb() -> float().
allocated_kb() ->
    lists:sum([element(2, Size)
               || Allocator <- erlang:system_info(alloc_util_allocators),
                  Instances <- [erlang:system_info({allocator_sizes, Allocator})], is_list(Instances),
                  {instance, _, Carriers} <- Instances, {_, Sizes} <- Carriers,
                  Size <- Sizes, element(1, Size) =:= carriers_size]) / 1000.

memory_kb(Line, OsPids) ->
    Each = [begin
        {match, [Kib]} = re:run(Status, Line ++ ":\\s*([0-9]+)", [{capture, all_but_first, list}]),
        list_to_integer(Kib) * 1.024
    end || OsPid <- OsPids, {ok, Status} <- [file:read_file("/proc/" ++ OsPid ++ "/status")]],
    case length(Each) =:= length(OsPids) of
        true -> lists:sum(Each);
        false -> unknown
    end.

signal(Name, #{os_pid := OsPid}) ->
    _ = os:cmd("kill -" ++ Name ++ " " ++ OsPid ++ " 2>/dev/null"),
    ok.

%% @doc A UDP port that was free a moment ago on all addresses, of those that no system gives to sockets
%% by itself: another suite's sockets do not take the port meanwhile.
-spec free_udp_port() -> inet:port_number().
free_udp_port() ->
    free_port(fun gen_udp:open/1, fun gen_udp:close/1).

%% @doc The same of TCP, on 127.0.0.1.
-spec free_tcp_port() -> inet:port_number().
free_tcp_port() ->
    free_port(fun(Port) -> gen_tcp:listen(Port, [{ip, {127, 0, 0, 1}}]) end, fun gen_tcp:close/1).

free_port(Open, Close) ->
    Port = 9999 + rand:uniform(20000),
    case Open(Port) of
        {ok, Socket} ->
            ok = Close(Socket),
            Port;
        {error, eaddrinuse} ->
            free_port(Open, Close)
    end.

%% @doc Is there no socket with this UDP port on 127.0.0.1?
-spec is_udp_port_free(inet:port_number()) -> boolean().
is_udp_port_free(Port) ->
    case gen_udp:open(Port, [{ip, {127, 0, 0, 1}}]) of
        {ok, Socket} -> gen_udp:close(Socket) =:= ok;
        {error, eaddrinuse} -> false
    end.

%% @doc Asks until `Fun' returns `true' or `{value, V}'; returns `ok' or `V'. Raises
%% `{not_reached, LastAnswer, TimeoutMs}' at the deadline.
-spec wait_until(fun(() -> boolean() | {value, V})) -> ok | V.
wait_until(Fun) ->
    wait_until(Fun, ?TIMEOUT).

-spec wait_until(fun(() -> boolean() | {value, V}), non_neg_integer()) -> ok | V.
wait_until(Fun, Timeout) ->
    wait_until(Fun, Timeout, erlang:monotonic_time(millisecond) + Timeout, 1).

wait_until(Fun, Timeout, Deadline, Pause) ->
    case Fun() of
        true ->
            ok;
        {value, Value} ->
            Value;
        Answer ->
            case erlang:monotonic_time(millisecond) >= Deadline of
                true ->
                    error({not_reached, Answer, Timeout});
                false ->
                    receive after Pause -> ok end,
                    wait_until(Fun, Timeout, Deadline, min(Pause * 2, 50))
            end
    end.

%% @doc What a VM holds: to be compared before and after something that must leave nothing behind.
-spec snapshot() -> snapshot().
snapshot() ->
    lists:foreach(fun erlang:garbage_collect/1, erlang:processes()),
    #{processes => erlang:system_info(process_count), ports => erlang:system_info(port_count),
      fds => open_files(), memory => erlang:memory(total), binary => erlang:memory(binary),
      ets => length(ets:all())}.

%% @doc The same of a test node.
-spec snapshot(test_node()) -> snapshot().
snapshot(Node) ->
    call(Node, ?MODULE, snapshot, []).

open_files() ->
    case file:list_dir("/proc/self/fd") of
        {ok, Names} ->
            length(Names);
        {error, _} ->
            {ok, Names} = file:list_dir("/dev/fd"),
            length(Names)
    end.

%% @doc What is more than before: `{Key, Before, After}'. Memory may grow by 8 MB, as code is loaded
%% and allocators keep what they have; the rest not at all.
-spec leaks(snapshot(), snapshot()) -> [{atom(), integer(), integer()}].
leaks(Before, After) ->
    [{Key, Old, New} || {Key, Old} <- maps:to_list(Before), New <- [maps:get(Key, After)],
                        New > Old + tolerance(Key)].

tolerance(memory) -> 8000000;
tolerance(binary) -> 2000000;
tolerance(_) -> 0.

%% @doc Waits until this VM holds no more than it did; raises what leaked.
-spec await_no_leak(snapshot()) -> ok.
await_no_leak(Before) ->
    no_leak(Before, fun snapshot/0).

%% @doc The same of a test node.
-spec await_no_leak(test_node(), snapshot()) -> ok.
await_no_leak(Node, Before) ->
    no_leak(Before, fun() -> snapshot(Node) end).

no_leak(Before, Snapshot) ->
    try
        wait_until(fun() -> leaks(Before, Snapshot()) =:= [] end)
    catch
        error:{not_reached, _, _} -> error({leaked, leaks(Before, Snapshot())})
    end.
