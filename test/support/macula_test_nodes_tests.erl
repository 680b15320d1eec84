%% The tools that other tests trust.
-module(macula_test_nodes_tests).

-include_lib("eunit/include/eunit.hrl").

-import(macula_test_nodes, [call/4, name/1]).

nodes_start_and_see_each_other_test_() ->
    {timeout, 60, fun() ->
        Two = macula_test_nodes:with_nodes([tcp(), tcp()], fun([A, B] = Nodes) ->
            pong = call(A, net_adm, ping, [name(B)]),
            [_] = call(B, erlang, nodes, []),
            Nodes
        end),
        [false, false] = [macula_test_nodes:is_alive(N) || N <- Two]
    end}.

a_killed_node_is_gone_test_() ->
    {timeout, 60, fun() ->
        {ok, Node} = macula_test_nodes:start(tcp()),
        true = macula_test_nodes:is_alive(Node),
        ok = macula_test_nodes:kill(Node),
        false = macula_test_nodes:is_alive(Node),
        ok = macula_test_nodes:stop(Node)
    end}.

a_paused_node_is_silent_until_resumed_test_() ->
    {timeout, 60, fun() ->
        %% Whatever happens: one that stays stopped would hold the test run's output for ever.
        macula_test_nodes:with_nodes([tcp()], fun([Node]) ->
            ok = macula_test_nodes:pause(Node),
            ?assertExit(_, macula_test_nodes:call(Node, erlang, node, [], 200)),
            ok = macula_test_nodes:resume(Node),
            _ = call(Node, erlang, node, []),
            ok = macula_test_nodes:pause(Node),
            ok = macula_test_nodes:stop(Node),
            false = macula_test_nodes:is_alive(Node)
        end)
    end}.

a_node_that_cannot_boot_is_an_error_test_() ->
    {timeout, 60, fun() ->
        {error, _} = macula_test_nodes:start(#{carrier => no_such_carrier})
    end}.

wait_until_gives_up_with_the_last_answer_test() ->
    ?assertError({not_reached, false, 20}, macula_test_nodes:wait_until(fun() -> false end, 20)),
    ?assertEqual(7, macula_test_nodes:wait_until(fun() -> {value, 7} end)).

%% More sockets than may close meanwhile in this VM, whose other processes are not ours.
a_leak_is_named_test_() ->
    {timeout, 60, fun() ->
        Before = macula_test_nodes:snapshot(),
        Sockets = [begin {ok, S} = gen_udp:open(0), S end || _ <- lists:seq(1, 10)],
        Leaks = macula_test_nodes:leaks(Before, macula_test_nodes:snapshot()),
        [?assertMatch({Key, Old, New} when New > Old, lists:keyfind(Key, 1, Leaks))
         || Key <- [fds, ports]],
        lists:foreach(fun gen_udp:close/1, Sockets),
        ok = macula_test_nodes:await_no_leak(Before)
    end}.

tcp() ->
    #{carrier => inet_tcp}.

%% What the system gives to a socket that names no port must not be what a test believes to be free.
free_ports_are_none_that_the_system_gives_test() ->
    Given = [begin
        {ok, Socket} = gen_udp:open(0),
        {ok, Port} = inet:port(Socket),
        ok = gen_udp:close(Socket),
        Port
    end || _ <- lists:seq(1, 1000)],
    Free = [Port || _ <- lists:seq(1, 100),
                    Port <- [macula_test_nodes:free_udp_port(), macula_test_nodes:free_tcp_port()]],
    %% Unless somebody has told the system to give others than it does by itself.
    case lists:min(Given) > 30000 of
        true -> ?assert(lists:max(Free) < 30000);
        false -> ok
    end.
