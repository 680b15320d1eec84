%% Large terms arrive whole, in a row, to several receivers, and over a link that loses datagrams.
-module(macula_dist_large_SUITE).

-export([suite/0, all/0, groups/0, init_per_suite/1, end_per_suite/1, init_per_group/2,
         end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([erpc_arguments_of_8_16_32_32_and_200_mb/1, erpc_results_of_8_to_32_mb/1,
         one_sender_with_2_mb_messages_to_four_receivers/1, large_terms_both_ways_at_once/1,
         large_exit_reason/1, memory_comes_back/1]).

suite() -> [{timetrap, {minutes, 3}}].

all() -> [{group, clean}, {group, lossy}].

groups() ->
    Cases = [erpc_arguments_of_8_16_32_32_and_200_mb, erpc_results_of_8_to_32_mb,
             one_sender_with_2_mb_messages_to_four_receivers, large_terms_both_ways_at_once,
             large_exit_reason],
    [{clean, [], Cases ++ [memory_comes_back]}, {lossy, [], Cases}].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).

init_per_group(Group, Config0) ->
    Config = macula_dist_case:case_begin(Group, Config0),
    case {Group, macula_dist_case:carrier()} of
        {lossy, Carrier} when Carrier =/= "macula" -> {skip, "only UDP can be relayed"};
        {clean, _} -> pair(#{}, fun direct/1, Config);
        {lossy, _} -> pair(#{loss => 0.01, seed => 2}, fun macula_dist_case:relayed_pair/1, Config)
    end.

direct(_) ->
    A = macula_dist_case:start(a),
    B = macula_dist_case:start(b),
    ok = macula_dist_case:connect(A, B),
    {A, B, none}.

pair(Relay, Start, Config) ->
    {Keeper, {A, B, _}} = macula_dist_case:keep(fun() -> Start(Relay) end),
    [{keeper, Keeper}, {a, A}, {b, B} | Config].

end_per_group(Group, Config) ->
    lists:foreach(fun(Key) -> macula_dist_case:stop(proplists:get_value(Key, Config)) end, [a, b]),
    ok = macula_dist_case:drop(proplists:get_value(keeper, Config)),
    macula_dist_case:case_end(Group, Config).

init_per_testcase(_Case, Config) -> Config.

end_per_testcase(_Case, Config) ->
    case macula_dist_case:connected(proplists:get_value(a, Config),
                                    proplists:get_value(b, Config)) of
        true -> ok;
        false -> {fail, connection_lost}
    end.

at_a(Config, Fun) ->
    NodeB = macula_dist_case:node_of(proplists:get_value(b, Config)),
    macula_dist_case:call(proplists:get_value(a, Config), Fun, [NodeB]).

mb(N) -> crypto:strong_rand_bytes(N * 1000000).

erpc_arguments_of_8_16_32_32_and_200_mb(Config) ->
    Times = at_a(Config, fun(B) ->
        [begin
            Bin = mb(Mb),
            Md5 = erlang:md5(Bin),
            {Ms, Md5} = macula_dist_case:timed(fun() -> erpc:call(B, erlang, md5, [Bin], 90000) end),
            {Mb, Ms}
        end || Mb <- [8, 16, 32, 32, 200]]
    end),
    ct:log("{MB, ms}: ~p", [Times]).

erpc_results_of_8_to_32_mb(Config) ->
    ok = at_a(Config, fun(B) ->
        lists:foreach(fun(Mb) ->
            {Bin, Md5} = erpc:call(B, fun() -> Bin = mb(Mb), {Bin, erlang:md5(Bin)} end, 90000),
            Md5 = erlang:md5(Bin)
        end, [8, 16, 32])
    end).

%% ERTS names the fragments of a message by its sender.
one_sender_with_2_mb_messages_to_four_receivers(Config) ->
    ok = at_a(Config, fun(B) ->
        Self = self(),
        Receivers = [spawn_link(B, fun() -> md5s(Self, []) end) || _ <- lists:seq(1, 4)],
        Sent = [begin
            Bin = mb(2),
            [P ! {data, Bin} || P <- Receivers],
            erlang:md5(Bin)
        end || _ <- lists:seq(1, 10)],
        lists:foreach(fun(P) ->
            P ! report,
            receive {P, Got} -> Got = Sent after 90000 -> error({silent, P}) end,
            unlink(P),
            exit(P, kill)
        end, Receivers)
    end).

md5s(Parent, Acc) ->
    receive
        {data, Bin} -> md5s(Parent, [erlang:md5(Bin) | Acc]);
        report -> Parent ! {self(), lists:reverse(Acc)}
    end.

large_terms_both_ways_at_once(Config) ->
    ok = at_a(Config, fun(B) ->
        Workers = [spawn_monitor(fun() ->
            Bin = mb(10),
            Bin = erpc:call(B, fun() -> Bin end, 90000)
        end) || _ <- lists:seq(1, 4)],
        lists:foreach(fun({P, M}) ->
            receive {'DOWN', M, process, P, Reason} -> normal = Reason
            after 100000 -> error(stuck) end
        end, Workers)
    end).

large_exit_reason(Config) ->
    ok = at_a(Config, fun(B) ->
        Reason = lists:seq(1, 300000),
        {P, M} = spawn_monitor(B, fun() -> exit(lists:seq(1, 300000)) end),
        receive {'DOWN', M, process, P, Got} -> Reason = Got after 60000 -> error(no_down) end,
        ok
    end).

%% What large messages took is given back, in the native part as well.
memory_comes_back(Config) ->
    lists:foreach(fun(Key) ->
        N = proplists:get_value(Key, Config),
        %% What was sent last may still be on its way out of the native part.
        ok = macula_dist_case:eventually(fun() ->
            macula_dist_case:call(N, fun() ->
                [erlang:garbage_collect(P) || P <- processes()],
                Binary = erlang:memory(binary),
                Binary < 20000000 orelse Binary
            end)
        end),
        Native = macula_dist_case:native_memory(N),
        ct:log("~s: ~b MB native", [Key, Native div 1000000])
    end, [a, b]).
