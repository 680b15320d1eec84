%% @doc `make matrix': nodes of several OTP releases over one and the same native library, each with
%% its own kind and with every other.
-module(macula_matrix).

-export([main/1]).

-import(macula_test_nodes, [call/4, call/5, name/1, wait_until/1]).

%% @doc Arguments: directories of chroots that have the code for their release in /macula/ebin.
-spec main([file:filename()]) -> no_return().
main(Chroots) ->
    Kinds = [#{} | [#{exec => {os:find_executable("chroot"), [Dir, "/usr/bin/erl"]},
                      pa => ["/macula/ebin"]} || Dir <- Chroots]],
    Pairs = [{A, B} || {N, A} <- lists:enumerate(Kinds), B <- lists:nthtail(N - 1, Kinds)],
    Results = [pair(A, B) || {A, B} <- Pairs],
    Failed = length([failed || false <- Results]),
    io:format("~b passed, ~b failed~n", [length(Results) - Failed, Failed]),
    halt(case Failed of 0 -> 0; _ -> 1 end).

pair(A, B) ->
    try
        macula_test_nodes:with_nodes([A, B, B], fun([NodeA, NodeB, Halting]) ->
            io:format("OTP ~s with OTP ~s: ", [release(NodeA), release(NodeB)]),
            [begin io:format("~s ", [What]), check(What, NodeA, NodeB) end
             || What <- [ping, carrier, call, large, monitor, global, async_dist, priority, disconnect, reconnect, kill]],
            io:format("halt "),
            check(halt, NodeA, Halting),
            io:format("ok~n"),
            true
        end)
    catch
        Class:Reason:Stack ->
            io:format("FAILED~n  ~tp~n", [{Class, Reason, Stack}]),
            false
    end.

release(Node) ->
    call(Node, erlang, system_info, [otp_release]).

check(ping, A, B) ->
    pong = call(A, net_adm, ping, [name(B)]);
check(carrier, A, B) ->
    false = lists:member(macula_test_nodes:link_protocol(A, B), [tcp, tls]);
check(call, A, B) ->
    NameB = name(B),
    NameB = call(A, erpc, call, [NameB, erlang, node, []]),
    NameA = name(A),
    NameA = call(B, erpc, call, [NameA, erlang, node, []]);
check(large, A, B) ->
    [begin
         Data = rand:bytes(Size),
         Hash = erlang:phash2(Data),
         Hash = call(From, erpc, call, [name(To), erlang, phash2, [Data]], 60000)
     end || Size <- [0, 1, 65536, 8000000], {From, To} <- [{A, B}, {B, A}]];
check(monitor, A, B) ->
    %% A spawn reply, a DOWN and their order are the carrier's to keep.
    {error, {exception, badarg, _}} =
        call(A, macula_matrix_probe, caught_error, [name(B)]);
check(global, A, B) ->
    yes = call(A, macula_matrix_probe, register, [matrix_probe]),
    wait_until(fun() -> is_pid(call(B, global, whereis_name, [matrix_probe])) end);
check(async_dist, A, B) ->
    %% Others are held for as long as a link may stand still: 700 ms.
    ok = macula_test_nodes:pause(B),
    Took = call(A, macula_matrix_probe, send_async, [name(B), 30]),
    ok = macula_test_nodes:resume(B),
    true = Took =:= no_async_dist orelse Took < 500,
    pong = call(A, net_adm, ping, [name(B)]);
check(priority, A, B) ->
    %% Both ends have to know them.
    case [call(N, macula_test_priority, is_known, []) || N <- [A, B]] of
        [true, true] ->
            Expected = macula_test_priority:expected(),
            [Expected] = lists:usort(call(A, macula_test_priority, orders, [name(B), 10], 60000)),
            [Expected] = lists:usort(call(A, macula_test_priority, orders_beside_bulk, [name(B), 10], 60000)),
            ok;
        _ ->
            io:format("(not known) ")
    end;
check(disconnect, A, B) ->
    true = call(A, erlang, disconnect_node, [name(B)]),
    wait_until(fun() -> call(B, erlang, nodes, []) =:= [] end);
check(reconnect, A, B) ->
    pong = call(B, net_adm, ping, [name(A)]);
check(halt, A, B) ->
    pong = call(A, net_adm, ping, [name(B)]),
    ok = call(A, erpc, cast, [name(B), erlang, halt, [0]]),
    %% It says goodbye: this is not the liveness time.
    macula_test_nodes:wait_until(fun() -> call(A, erlang, nodes, []) =:= [] end, 4000);
check(kill, A, B) ->
    ok = macula_test_nodes:kill(B),
    macula_test_nodes:wait_until(fun() -> call(A, erlang, nodes, []) =:= [] end, 30000).
