%% What people run to look at macula does what it says.
-module(tools_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([demo_shows_a_cluster_in_80_columns/1, demo_without_the_library_fails/1,
         bench_writes_its_results/1, bench_measures_a_mesh/1, bench_measures_peering/1, bench_measures_quic/0,
         bench_measures_quic/1, quinn_alone_takes_what_it_is_given/1,
         bench_refuses_what_it_does_not_know/1, bench_copies_a_file_beside_bulk/1,
         bench_has_tls_on_the_line/1, bench_has_a_line_without_namespaces/1,
         soak_refuses_what_it_does_not_know/1]).

suite() ->
    [{timetrap, {minutes, 5}}].

all() ->
    [demo_shows_a_cluster_in_80_columns, demo_without_the_library_fails, bench_writes_its_results,
     bench_measures_a_mesh, bench_measures_peering, bench_measures_quic, quinn_alone_takes_what_it_is_given,
     bench_refuses_what_it_does_not_know, bench_copies_a_file_beside_bulk, bench_has_tls_on_the_line,
     bench_has_a_line_without_namespaces, soak_refuses_what_it_does_not_know].

init_per_suite(Config) ->
    Root = macula_test_run:root(),
    %% The scripts use the build of the default profile.
    {0, _} = macula_test_run:run(Root, "rebar3 compile"),
    [{root, Root} | Config].

end_per_suite(_Config) ->
    ok.

demo_shows_a_cluster_in_80_columns(Config) ->
    {0, Output} = macula_test_run:run(?config(root, Config), "sh scripts/demo"),
    %% Apart from what the nodes may log.
    ?assertEqual([], [Line || Line <- string:split(Output, "\n", all), string:length(Line) > 80,
                              not lists:prefix("macula_dist: ", Line)]),
    ?assertEqual(nomatch, re:run(Output, "[\\e\\r]")),
    [?assertMatch({match, _}, re:run(Output, Shown))
     || Shown <- ["every one sees the 3 others", "cookie +TLS", "the 4 copies are equal",
                  "1024 MiB", "knew after", "saw it back after", "complete again",
                  "\n  macula +[0-9]+", "\n  inet_tls +[0-9]+", "\n  inet_tcp +[0-9]+"]].

demo_without_the_library_fails(Config) ->
    %% A copy of the script in a tree that has no build.
    Tree = filename:join(?config(priv_dir, Config), "tree"),
    _ = [begin
             To = filename:join(Tree, File),
             ok = filelib:ensure_dir(To),
             {ok, _} = file:copy(filename:join(?config(root, Config), File), To)
         end || File <- ["scripts/demo", "test/support/macula_test_nodes.erl",
                         "bench/macula_bench_load.erl", "bench/macula_bench_certs.erl" |
                         [filename:join("examples/demo", F)
                          || F <- ["macula_demo.erl", "macula_demo_node.erl"]]]],
    {1, Output} = macula_test_run:run(Tree, "sh scripts/demo"),
    ?assertMatch({match, _}, re:run(Output, "demo: FAILED")).

bench_writes_its_results(Config) ->
    Out = filename:join(?config(priv_dir, Config), "bench"),
    {0, _} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_REPETITIONS=1 MACULA_BENCH_MS=200 "
        "MACULA_BENCH_PARTS=dist sh scripts/bench"),
    {ok, Csv} = file:read_file(filename:join(Out, "results.csv")),
    [<<"part,subject,metric,size,repetition,value">> | Rows] =
        binary:split(Csv, <<"\n">>, [global, trim]),
    %% Four sizes with three values each, and four of latency, by three carriers.
    ?assertEqual(3 * (4 * 3 + 4), length(Rows)),
    ?assertEqual([], [Row || Row <- Rows, {match, _} <- [re:run(Row, ",0\\.000$")],
                             nomatch =:= re:run(Row, "cpu_s_per_gb")]),
    {ok, Svg} = file:read_file(filename:join(Out, "results.svg")),
    {_Document, []} = xmerl_scan:string(binary_to_list(Svg)),
    {ok, Table} = file:read_file(filename:join(Out, "results.txt")),
    ?assertMatch({match, _}, re:run(Table, "round trip p50")).

bench_measures_a_mesh(Config) ->
    Out = filename:join(?config(priv_dir, Config), "bench_mesh"),
    {0, Output} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_REPETITIONS=1 MACULA_BENCH_PERCENT=10 "
        "MACULA_BENCH_PARTS=mesh MACULA_BENCH_MESH=3 sh scripts/bench"),
    [?assertMatch({_, {match, _}}, {Line, re:run(Output, Line, [multiline])})
     || Line <- ["^full mesh of 3 nodes", "^ +inet_tcp +inet_tls +macula +macula_one +to tcp",
                 "^the mesh is whole, ms( +[0-9.]+){5}x", "^processor time of a link, both ends, ms( +[0-9.]+){5}x",
                 "^memory of an end of a link, KB", "^  of that not of files, KB",
                 "^wake-ups a second, idle end of a link"]].

bench_measures_peering(Config) ->
    Out = filename:join(?config(priv_dir, Config), "bench_peering"),
    {0, Output} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_REPETITIONS=1 MACULA_BENCH_MS=400 "
        "MACULA_BENCH_PARTS=peering MACULA_BENCH_PEERS=50 sh scripts/bench"),
    %% Each with a value, and what it is compared with.
    [?assertMatch({_, {match, _}}, {Line, re:run(Output, Line, [multiline])})
     || Line <- ["^encode and sign, us +[1-9][0-9.]* +Ed25519 alone [1-9][0-9.]* +[0-9.]+x +1.3x",
                 "^decode and verify, us +[1-9][0-9.]* +Ed25519 alone [1-9][0-9.]* +[0-9.]+x +1.3x",
                 "^signed, verified, frames/s +[1-9][0-9]* +no link between [1-9][0-9]* +[0-9]+ %",
                 "^signed before, frames/s +[1-9][0-9]* .*100000 ",
                 "^a lone one and its answer, us +[1-9][0-9]* +same bytes, stream [1-9]",
                 "one node with 50 peers",
                 %% So few fit into what the process has already.
                 "^memory of each, KiB +-?[0-9]", "^ +of that in the VM, KiB +-?[0-9]",
                 "^send_frame to all, ms +[0-9.]*[1-9]", "^  one turn of its process, us +[1-9]"]].

%% Quinn may have to be compiled first.
bench_measures_quic() ->
    [{timetrap, {minutes, 20}}].

bench_measures_quic(Config) ->
    Out = filename:join(?config(priv_dir, Config), "bench_quic"),
    {0, Output} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_REPETITIONS=1 MACULA_BENCH_MS=400 "
        "MACULA_BENCH_PERCENT=1 MACULA_BENCH_PARTS=quic sh scripts/bench"),
    {ok, Csv} = file:read_file(filename:join(Out, "results.csv")),
    Measured = [{Subject, Metric}
                || Line <- tl(binary:split(Csv, <<"\n">>, [global, trim])),
                   [<<"quic">>, Subject, Metric | _] <- [binary:split(Line, <<",">>, [global])]],
    Of = fun(Wanted) -> lists:sort([Metric || {Subject, Metric} <- Measured, Subject =:= Wanted]) end,
    %% Quinn with either runtime does all that macula_quic does, but for a row beside gen_tcp, one beside full
    %% handshakes, and two without behaviours.
    ?assertEqual(Of(<<"quinn_current">>), Of(<<"quinn_multi">>)),
    ?assertEqual(Of(<<"quinn_current">>),
                 ((Of(<<"macula_quic">>) -- Of(<<"gen_tcp">>)) -- Of(<<"full">>)) -- Of(<<"raw">>)),
    ?assertEqual([<<Row/binary, Name/binary>> || Row <- [<<"behaviour">>, <<"behaviours">>],
                                                 Name <- [<<"_p50_us">>, <<"_p99_us">>, <<"_per_second">>]],
                 Of(<<"raw">>)),
    ?assertEqual([<<"resumption_cpu_us">>, <<"resumption_per_second">>], Of(<<"full">>)),
    ?assertEqual([<<"schedule_events">>, <<"schedule_p50_us">>, <<"schedule_p99_us">>,
                  <<"schedule_per_second">>], Of(<<"gen_tcp">>)),
    %% Each line of the table has both values.
    Lines = [Line || <<"| ", _/binary>> = Line <- re:split(Output, "\n"),
                     nomatch =:= re:run(Line, "^\\| streams, two")],
    ?assertEqual(28, length(Lines)),
    ?assertEqual([], [Line || Line <- Lines,
                              nomatch =:= re:run(Line, "^\\| [^|]+ \\| -?[0-9.]+ \\| -?[0-9.]+ \\|")]).

quinn_alone_takes_what_it_is_given(Config) ->
    Out = filename:join(?config(priv_dir, Config), "bench_row"),
    {0, Output} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_REPETITIONS=2 MACULA_BENCH_MS=400 "
        "MACULA_BENCH_ROWS=serial MACULA_BENCH_RUNTIMES=multi MACULA_BENCH_CIPHER=aes256 "
        "sh scripts/bench"),
    %% A row alone, of no other part, with the range of its ratio.
    ?assertMatch({match, _}, re:run(Output, "one after the other.*\\| multi \\|.* - ")),
    ?assertEqual(nomatch, re:run(Output, "echo|inet_tcp|peering")),
    {ok, Csv} = file:read_file(filename:join(Out, "results.csv")),
    ?assertEqual(nomatch, re:run(Csv, "quinn_current")).

bench_refuses_what_it_does_not_know(Config) ->
    [?assertMatch({_, {1, _}}, {Variable, macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_PARTS=dist " ++ Variable ++ "=unheard_of sh scripts/bench")})
     || Variable <- ["MACULA_BENCH_ROWS", "MACULA_BENCH_RUNTIMES", "MACULA_BENCH_CIPHER",
                     "MACULA_BENCH_PERCENT"]],
    {1, Output} = macula_test_run:run(?config(root, Config),
        "MACULA_BENCH_PARTS=dist MACULA_BENCH_CARRIERS=inet_udp sh scripts/bench"),
    ?assertMatch({match, _}, re:run(Output, "unknown")).

bench_copies_a_file_beside_bulk(Config) ->
    on_a_line(fun() -> copies_a_file(Config, "namespaces") end).

copies_a_file(Config, Line) ->
    Out = filename:join(?config(priv_dir, Config), "bench_link_" ++ Line),
    Run = "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_LINE=" ++ Line ++ " MACULA_BENCH_MS=500 MACULA_BENCH_LOSS=0.0 "
        "MACULA_BENCH_CROWD=1 MACULA_BENCH_REPETITIONS=2 MACULA_BENCH_FILE_MB=3 ",
    {0, Output} = macula_test_run:run(?config(root, Config),
        Run ++ "MACULA_BENCH_CARRIERS=inet_tcp,macula,macula_file sh scripts/bench-link"),
    Rate = "[0-9.]*[1-9][0-9.]* MB/s",
    [?assertMatch({_, {match, _}}, {Wanted, re:run(Output, Wanted, [multiline])})
     || Wanted <- ["^macula_file +loss .* p99 +[0-9.]+ .* bulk +" ++ Rate ++ " +file of 3145728 bytes +"
                       ++ Rate ++ ", delivered whole",
                   "^median of 2: macula +loss .* bulk +" ++ Rate,
                   %% Once, whatever the repetitions.
                   "^median of 1: macula_file .* file +" ++ Rate]],
    {ok, ["link.txt"]} = file:list_dir(Out),
    Output.

bench_has_tls_on_the_line(Config) ->
    on_a_line(fun() ->
        Out = filename:join(?config(priv_dir, Config), "bench_link_tls"),
        {0, Output} = macula_test_run:run(?config(root, Config),
            "MACULA_BENCH_OUT=" ++ Out ++ " MACULA_BENCH_MS=500 MACULA_BENCH_LOSS=0.0 MACULA_BENCH_CROWD=1 "
            "MACULA_BENCH_CARRIERS=inet_tls sh scripts/bench-link"),
        ?assertMatch({match, _}, re:run(Output, "^inet_tls +loss .* \\([1-9][0-9]* pings\\) +bulk +[0-9.]*[1-9]",
                                        [multiline]))
    end).

on_a_line(Fun) ->
    case os:cmd("unshare --net --mount true 2>&1") of
        "" -> Fun();
        No -> {skip, "no namespaces here: " ++ No}
    end.

bench_has_a_line_without_namespaces(Config) ->
    Output = copies_a_file(Config, "relay"),
    ?assertMatch({match, _}, re:run(Output, "rows of inet_tcp and inet_tls are missing")),
    ?assertEqual(nomatch, re:run(Output, "^inet_tcp", [multiline])),
    {2, Unknown} = macula_test_run:run(?config(root, Config), "MACULA_BENCH_LINE=washing sh scripts/bench-link"),
    ?assertMatch({match, _}, re:run(Unknown, "no line washing")).

soak_refuses_what_it_does_not_know(Config) ->
    {2, Output} = macula_test_run:run(?config(root, Config), "MACULA_SOAK_PARTS=mnesia,sand sh scripts/soak"),
    ?assertMatch({match, _}, re:run(Output, "no part sand; there are: peering")).
