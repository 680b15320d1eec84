%% @doc `make bench': macula beside what OTP ships, Quinn alone and Ed25519 alone, in one run.
%%
%% Every repetition starts fresh nodes for each carrier in turn, so that what the machine does
%% meanwhile falls on all alike; what is shown are medians. All single values go to `results.csv'.
-module(macula_bench).

-export([main/1, median/1]).

-define(SIZES, [{"64 B", 64}, {"1 KiB", 1024}, {"16 KiB", 16384}, {"1 MiB", 1048576}]).
%% What macula must reach over inet_tls, as a ratio of medians.
-define(FLOORS, #{{throughput, 64} => 2.0, {throughput, 1024} => 3.0, {throughput, 16384} => 4.0,
                  {throughput, 1048576} => 4.0, round_trip_p50 => 1.0, callers_per_second => 1.0}).

-type row() :: {Part :: atom(), Subject :: atom(), Metric :: term(), Repetition :: pos_integer(),
                Value :: number()}.
-export_type([row/0]).

%% @doc Arguments: the directory for results, and the programs with bare Quinn and bare Ed25519.
-spec main([string()]) -> no_return().
main([Out, Quinn, Ed25519]) ->
    try
        Options = options(),
        ok = filelib:ensure_dir(filename:join(Out, "x")),
        Certs = macula_bench_certs:write(filename:join(Out, "tls"), ["127.0.0.1"]),
        io:format("macula bench: ~s~n~n", [about(Options)]),
        Rows = run(Options, Certs, {Quinn, Ed25519}),
        ok = write_csv(filename:join(Out, "results.csv"), Rows),
        ok = file:write_file(filename:join(Out, "results.svg"), macula_bench_svg:render(charts(Rows))),
        Table = table(Rows, Options),
        ok = file:write_file(filename:join(Out, "results.txt"), [about(Options), "\n\n", Table]),
        io:format("~n~ts~nin ~s: results.txt, results.csv, results.svg~n", [Table, Out]),
        ok = file:del_dir_r(filename:join(Out, "tls")),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format(standard_error, "bench: ~tp~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

options() ->
    #{repetitions => number_of("MACULA_BENCH_REPETITIONS", 5),
      ms => number_of("MACULA_BENCH_MS", 1000),
      carriers => names("MACULA_BENCH_CARRIERS", [inet_tcp, inet_tls, macula]),
      parts => names("MACULA_BENCH_PARTS", [dist, mesh, quic, peering]),
      rows => names("MACULA_BENCH_ROWS", macula_bench_quic:rows()),
      runtimes => names("MACULA_BENCH_RUNTIMES", macula_bench_quic:runtimes()),
      cipher => one_of("MACULA_BENCH_CIPHER", [aes128, aes256]),
      percent => number_of("MACULA_BENCH_PERCENT", 100),
      mesh => number_of("MACULA_BENCH_MESH", 20),
      peers => number_of("MACULA_BENCH_PEERS", 5000)}.

number_of(Variable, Default) ->
    case string:to_integer(os:getenv(Variable, integer_to_list(Default))) of
        {N, ""} when N > 0 -> N;
        _ -> error({not_a_positive_number, Variable})
    end.

names(Variable, Known) ->
    Default = lists:join(",", [atom_to_list(Name) || Name <- Known]),
    Names = [list_to_atom(Name)
             || Name <- string:lexemes(os:getenv(Variable, lists:append(Default)), ",")],
    case Names -- Known of
        [] when Names =/= [] -> Names;
        Unknown -> error({unknown, Variable, Unknown, {known, Known}})
    end.

one_of(Variable, [Default | _] = Known) ->
    Name = list_to_atom(os:getenv(Variable, atom_to_list(Default))),
    case lists:member(Name, Known) of
        true -> Name;
        false -> error({unknown, Variable, Name, {known, Known}})
    end.

about(#{repetitions := Repetitions, ms := Ms}) ->
    io_lib:format("OTP ~s, ~b schedulers, ~s; ~b repetitions of ~b ms",
                  [erlang:system_info(otp_release), erlang:system_info(schedulers_online),
                   string:trim(os:cmd("uname -sm")), Repetitions, Ms]).

%% Running

-spec run(map(), file:filename(), {file:filename(), file:filename()}) -> [row()].
run(#{repetitions := Repetitions, parts := Parts} = Options, Certs, Programs) ->
    lists:append([run(Part, Repetition, Options, Certs, Programs)
                  || Repetition <- lists:seq(1, Repetitions), Part <- Parts]).

run(dist, Repetition, #{carriers := Carriers, ms := Ms}, Certs, _Programs) ->
    by_carrier(dist, Repetition, Carriers, fun(Carrier) -> dist(node_options(Carrier, Certs), Ms) end);
run(mesh, Repetition, #{carriers := Carriers, mesh := Size, percent := Percent}, Certs, _Programs) ->
    by_carrier(mesh, Repetition, macula_bench_mesh:subjects(Carriers),
               fun(Carrier) -> macula_bench_mesh:run(node_options(Carrier, Certs), Size, Percent) end);
run(peering, Repetition, #{ms := Ms, peers := Peers}, _Certs, {_, Ed25519}) ->
    io:format("~b macula_peering, Ed25519~n", [Repetition]),
    %% The crowd comes once: what it measures does not vary much, and takes its time.
    [{peering, Subject, Metric, Repetition, Value}
     || {Subject, Metric, Value} <- macula_bench_peering:run(Ms, Ed25519)
            ++ case Repetition of 1 -> macula_bench_peering:crowd(Peers); _ -> [] end];
run(quic, Repetition, #{rows := Rows} = Options, _Certs, {Quinn, _}) ->
    lists:append([begin
        io:format("~b ~s~n", [Repetition, Row]),
        [{quic, Subject, Metric, Repetition, Value}
         || {Subject, Metric, Value} <- macula_bench_quic:run(Row, Repetition,
                                                              Options#{program => Quinn})]
    end || Row <- Rows]).

%% Another carrier begins each time, so that none always comes after the same other.
by_carrier(Part, Repetition, Carriers, Measure) ->
    {Last, First} = lists:split((Repetition - 1) rem length(Carriers), Carriers),
    lists:append([begin
        io:format("~b ~s, ~s~n", [Repetition, Part, Carrier]),
        [{Part, Carrier, Metric, Repetition, Value} || {Metric, Value} <- Measure(Carrier)]
    end || Carrier <- First ++ Last]).

node_options(inet_tls, Certs) -> #{carrier => inet_tls, args => ["-ssl_dist_optfile", Certs]};
node_options(macula_one, _Certs) -> #{carrier => macula, args => ["-macula_dist_lanes", "1"]};
node_options(Carrier, _Certs) -> #{carrier => Carrier}.

dist(#{carrier := Carrier} = Node, Ms) ->
    macula_test_nodes:with_nodes([Node, Node], fun([A, B]) ->
        To = macula_test_nodes:name(B),
        pong = macula_test_nodes:call(A, net_adm, ping, [To]),
        %% What net_kernel was told, not what we hope it understood.
        ok = uses(macula_test_nodes:link_protocol(A, B), Carrier),
        Load = fun(Function, Extra) ->
            macula_test_nodes:call(A, macula_bench_load, Function, [To | Extra], 120000)
        end,
        #{p50 := P50, p99 := P99} = Load(round_trips, [Ms]),
        #{p99 := Callers99, per_second := PerSecond} = Load(callers, [100, Ms]),
        [{round_trip_p50, P50}, {round_trip_p99, P99}, {callers_p99, Callers99},
         {callers_per_second, PerSecond} |
         lists:append([throughput(Size, Load(throughput, [Size, Ms])) || {_, Size} <- ?SIZES])]
    end).

%% Bytes per microsecond are MB/s.
throughput(Size, #{bytes := Bytes, messages := Messages, microseconds := Took, cpu_ms := Cpu}) ->
    [{{throughput, Size}, Bytes / Took}, {{messages, Size}, Messages * 1.0e6 / Took},
     {{cpu_s_per_gb, Size}, Cpu * 1.0e6 / Bytes}].

uses(Link, Carrier) ->
    case {Carrier, Link} of
        {inet_tcp, tcp} -> ok;
        {inet_tls, tls} -> ok;
        {macula, _} when Link =/= tcp, Link =/= tls -> ok;
        _ -> error({wrong_carrier, Carrier, Link})
    end.

%% Results

-spec median([number()]) -> float().
median(Values) ->
    Sorted = lists:sort(Values),
    Half = length(Sorted) div 2,
    case length(Sorted) rem 2 of
        1 -> float(lists:nth(Half + 1, Sorted));
        0 -> (lists:nth(Half, Sorted) + lists:nth(Half + 1, Sorted)) / 2
    end.

medians(Rows) ->
    Groups = lists:foldl(fun({_Part, Subject, Metric, _Repetition, Value}, Acc) ->
        maps:update_with({Subject, Metric}, fun(Old) -> [Value | Old] end, [Value], Acc)
    end, #{}, Rows),
    maps:map(fun(_, Values) -> median(Values) end, Groups).

write_csv(File, Rows) ->
    file:write_file(File, ["part,subject,metric,size,repetition,value\n" | [
        io_lib:format("~s,~s,~s,~s,~b,~.3f~n",
                      [Part, Subject, metric_name(Metric), metric_size(Metric), Repetition,
                       float(Value)])
        || {Part, Subject, Metric, Repetition, Value} <- Rows]]).

metric_name({Name, _Size}) -> atom_to_list(Name);
metric_name(Name) -> atom_to_list(Name).

metric_size({_Name, Size}) -> integer_to_list(Size);
metric_size(_Name) -> "".

table(Rows, #{carriers := Carriers, parts := Parts, rows := QuicRows, mesh := Size}) ->
    Medians = medians(Rows),
    [[dist_table(Medians, Carriers) || lists:member(dist, Parts)],
     [["\n", macula_bench_mesh:table(Medians, Carriers, Size)] || lists:member(mesh, Parts)],
     [["\n", macula_bench_quic:table(Rows, QuicRows)] || lists:member(quic, Parts)],
     [["\n", macula_bench_peering:table(Medians)] || lists:member(peering, Parts)]].

dist_table(Medians, Carriers) ->
    Head = ["distribution, one sender to one receiver, loopback, medians\n", pad("", 20),
            [pad_left(atom_to_list(C), 10) || C <- Carriers],
            pad_left("/tls", 7), pad_left("/tcp", 7), pad_left("floor/tls", 11), "\n"],
    Lines = [{"64 B, msg/s", {messages, 64}, {throughput, 64}, higher},
             {"1 KiB, MB/s", {throughput, 1024}, {throughput, 1024}, higher},
             {"16 KiB, MB/s", {throughput, 16384}, {throughput, 16384}, higher},
             {"1 MiB, MB/s", {throughput, 1048576}, {throughput, 1048576}, higher},
             {"16 KiB, CPU s/GB", {cpu_s_per_gb, 16384}, none, lower},
             {"round trip p50, us", round_trip_p50, round_trip_p50, lower},
             {"round trip p99, us", round_trip_p99, none, lower},
             {"100 callers, calls/s", callers_per_second, callers_per_second, higher},
             {"100 callers p99, us", callers_p99, none, lower}],
    [Head | [dist_line(Line, Medians, Carriers) || Line <- Lines]].

dist_line({Title, Metric, Floor, Better}, Medians, Carriers) ->
    Ratio = fun(Other) -> ratio(Better, {macula, Metric}, {Other, Metric}, Medians) end,
    [pad(Title, 20), [pad_left(value(maps:find({C, Metric}, Medians)), 10) || C <- Carriers],
     pad_left(ratio_text(Ratio(inet_tls)), 7), pad_left(ratio_text(Ratio(inet_tcp)), 7),
     pad_left(verdict(Ratio(inet_tls), maps:find(Floor, ?FLOORS)), 11), "\n"].

%% Above one is better, also where less is better.
ratio(Better, Ours, Theirs, Medians) ->
    case {maps:find(Ours, Medians), maps:find(Theirs, Medians)} of
        {{ok, A}, {ok, B}} when A > 0, B > 0, Better =:= higher -> A / B;
        {{ok, A}, {ok, B}} when A > 0, B > 0 -> B / A;
        _ -> none
    end.

ratio_text(none) -> "-";
ratio_text(Ratio) when Ratio >= 9.95 -> io_lib:format("~bx", [round(Ratio)]);
ratio_text(Ratio) -> io_lib:format("~.2fx", [Ratio]).

verdict(none, _) -> "";
verdict(_, error) -> "";
verdict(Ratio, {ok, Floor}) when Ratio >= Floor -> io_lib:format("~.1fx ok", [Floor]);
verdict(_, {ok, Floor}) -> io_lib:format("~.1fx NO", [Floor]).

value(error) -> "-";
value({ok, Value}) when Value >= 100000 -> io_lib:format("~b k", [round(Value / 1000)]);
value({ok, Value}) when Value >= 100 -> io_lib:format("~b", [round(Value)]);
value({ok, Value}) -> io_lib:format("~.1f", [Value]).

pad(Text, Width) -> string:pad(lists:flatten(Text), Width, trailing).
pad_left(Text, Width) -> string:pad(lists:flatten(Text), Width, leading).

%% A chart: a title, its unit, groups of bars.
charts(Rows) ->
    Medians = medians(Rows),
    Group = fun(Label, Metric, Subjects) ->
        {Label, [{S, maps:get({S, Metric}, Medians)} || S <- Subjects,
                                                        is_map_key({S, Metric}, Medians)]}
    end,
    Carriers = [inet_tcp, inet_tls, macula],
    Quic = [macula_quic, quinn_current, quinn_multi],
    All = [{"Distribution: throughput", "MB/s (log scale)", log,
            [Group(Name, {throughput, Size}, Carriers) || {Name, Size} <- ?SIZES]},
           {"Distribution: round trip of 64 bytes", "microseconds", linear,
            [Group("p50", round_trip_p50, Carriers), Group("p99", round_trip_p99, Carriers)]},
           {"Distribution: 100 concurrent callers", "calls per second", linear,
            [Group("", callers_per_second, Carriers)]},
           {"Streams: 64-byte echo", "microseconds", linear,
            [Group("p50", echo_p50_us, Quic), Group("p99", echo_p99_us, Quic)]},
           {"Streams: small things", "per second (log scale)", log,
            [Group("100 echoes", echo100_per_second, Quic), Group("streams", short_per_second, Quic),
             Group("datagrams", datagrams_received_per_second, Quic),
             Group("connections", connections_per_second, Quic)]},
           {"Streams: large things", "MB/s", linear,
            [Group("1 GiB", bulk_mb_s, Quic), Group("in 1 KiB", small_sends_mb_s, Quic),
             Group("100 streams", many_streams_mb_s, Quic)]},
           {"Peering: a frame of 200 bytes", "nanoseconds", linear,
            [Group("encode, sign", sign_ns, [macula_peering, ed25519]),
             Group("decode, verify", verify_ns, [macula_peering, ed25519])]}],
    [Chart || {_, _, _, Groups} = Chart <- All, lists:any(fun({_, Bars}) -> Bars =/= [] end, Groups)].
