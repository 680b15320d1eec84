%% @doc `macula_quic' between two VMs, and the same work by Quinn alone between two processes, row by
%% row. What runs in the VMs is in `macula_bench_quic_load', the same without a VM in
%% `bench/quinn_bare'.
%%
%% Quinn runs with each of its runtimes; the table compares with the one whose median is better.
-module(macula_bench_quic).

-export([rows/0, runtimes/0, run/3, table/2]).

-type row() :: echo | active | echo100 | short | serial | datagrams | connections | resumption | bulk |
               small_sends | many_streams | idle_connections | idle_streams | schedule | behaviours | behaviour.
%% `percent' scales bytes and counts; `cipher' is the one that Quinn prefers.
-type options() :: #{ms := pos_integer(), percent := pos_integer(), cipher := atom(),
                     runtimes := [atom()], program := file:filename(), atom() => term()}.
-export_type([row/0]).

-spec rows() -> [row()].
rows() ->
    [echo, active, echo100, short, serial, datagrams, connections, resumption, bulk, small_sends,
     many_streams, idle_connections, idle_streams, schedule, behaviours, behaviour].

%% @doc Quinn's runtimes: one thread for all, or one worker beside the main thread.
-spec runtimes() -> [atom()].
runtimes() ->
    [current, multi].

%% What is done, with how much, and what the server does with a stream.
work(echo, Load) -> {echo, Load#{active => false}, handing_over};
work(active, Load) -> {echo, Load#{active => true}, handing_over};
work(echo100, Load) -> {echo, Load#{parallel := 100}, handing_over};
work(short, Load) -> {short, Load#{parallel := 64}, active};
work(serial, Load) -> {short, Load, active};
work(datagrams, Load) -> {datagrams, Load#{parallel := 8}, datagrams};
work(connections, Load) -> {connections, Load#{parallel := 50}, handing_over};
work(resumption, Load) -> {handshakes, Load#{parallel := 16}, tickets};
work(bulk, Load) -> {bulk, scaled(bytes, 1 bsl 30, Load#{chunk => 65536}), handing_over};
work(small_sends, Load) -> {bulk, scaled(bytes, 1 bsl 27, Load#{chunk => 1024}), handing_over};
work(many_streams, Load) ->
    {bulk, scaled(bytes, 1000000000, Load#{chunk => 65536, parallel := 100}), handing_over};
work(idle_connections, Load) -> {idle_connections, scaled(count, 1000, Load), inline};
work(idle_streams, Load) ->
    #{count := Count} = Scaled = scaled(count, 20000, Load),
    {idle_streams, Scaled#{streams := Count + 100}, inline};
work(schedule, #{ms := Ms} = Load) -> {echo, Load#{ms := 4 * Ms, parallel := 100}, handing_over};
work(behaviours, Load) -> {behaviours, Load#{parallel := 100}, behaviours};
work(behaviour, Load) -> {behaviours, Load, behaviours}.

scaled(Key, Value, #{percent := Percent} = Load) ->
    Load#{Key => max(1, Value * Percent div 100)}.

%% @doc One repetition of a row: who did it, what was measured, and the value. Another subject begins
%% each time, so that none always comes after the same other.
-spec run(row(), pos_integer(), options()) -> [{atom(), atom(), number()}].
run(Row, Repetition, #{ms := Ms, percent := Percent} = Options) ->
    Work = work(Row, #{ms => Ms, percent => Percent, parallel => 1, streams => 100}),
    Subjects = subjects(Row, Options),
    {Last, First} = lists:split((Repetition - 1) rem length(Subjects), Subjects),
    [{Subject, metric(Row, Name), Value}
     || Subject <- First ++ Last, {Name, Value} <- measure(Subject, Row, Work, Options)].

subjects(schedule, _Options) -> [macula_quic, gen_tcp];
%% The same without tickets.
subjects(resumption, _Options) -> [macula_quic, full];
%% The same without the behaviours.
subjects(Row, _Options) when Row =:= behaviours; Row =:= behaviour -> [macula_quic, raw];
subjects(_Row, #{runtimes := Runtimes}) -> [macula_quic | [quinn(R) || R <- Runtimes]].

quinn(current) -> quinn_current;
quinn(multi) -> quinn_multi.

metric(Row, Name) ->
    list_to_atom(atom_to_list(Row) ++ "_" ++ atom_to_list(Name)).

measure(full, Row, {Work, Load, Mode}, Options) ->
    measure(macula_quic, Row, {Work, Load#{resumption => false}, Mode}, Options);
measure(raw, Row, {behaviours, Load, _Mode}, Options) ->
    measure(macula_quic, Row, {echo, Load, handing_over}, Options);
measure(macula_quic, Row, {Work, Load, Mode}, _Options) ->
    #{streams := Streams} = Load,
    in_vms(Row, fun(A, B, Call) ->
        Server = Call(B, server, [Mode, Streams]),
        Call(A, client, [Work, Server, Load#{pids => [macula_test_nodes:os_pid(N) || N <- [A, B]]}])
    end);
measure(gen_tcp, Row, {echo, Load, _Mode}, _Options) ->
    in_vms(Row, fun(A, B, Call) ->
        Call(A, tcp_client, [Call(B, tcp_server, []), Load])
    end);
measure(Quinn, _Row, {Work, Load, _Mode}, #{program := Program, cipher := Cipher}) ->
    Runtime = case Quinn of quinn_current -> "current"; quinn_multi -> "multi" end,
    Settings = [io_lib:format(" ~s=~b", [Key, Value])
                || {Key, Value} <- maps:to_list(Load),
                   lists:member(Key, [ms, bytes, chunk, parallel, count, streams])],
    Output = os:cmd(lists:flatten(io_lib:format("~s ~s runtime=~s cipher=~s~s",
                                                [Program, Work, Runtime, Cipher, Settings]))),
    Measures = [{list_to_atom(Name), list_to_float(Value)}
                || Line <- string:lexemes(Output, "\n"),
                   [Name, Value] <- [string:lexemes(Line, " ")]],
    case length(Measures) =:= length(string:lexemes(Output, "\n")) of
        true when Measures =/= [] -> Measures;
        _ -> error({quinn_bare, Work, Output})
    end.

%% Two VMs of their own for each row: none has to do with what another one left.
in_vms(Row, Fun) ->
    None = #{carrier => none, args => args(Row)},
    macula_test_nodes:with_nodes([None, None], fun([A, B] = Nodes) ->
        Call = fun(Node, Function, Args) ->
            macula_test_nodes:call(Node, macula_bench_quic_load, Function, Args, 300000)
        end,
        Watch = Row =:= schedule,
        _ = [ok = Call(Node, watch, []) || Node <- Nodes, Watch],
        Measures = Fun(A, B, Call),
        [{events, lists:sum([Call(Node, watched, []) || Node <- Nodes])} || Watch] ++ Measures
    end).

%% Schedulers that look for work spend time that has nothing to do with it.
args(resumption) -> ["+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none"];
args(_Row) -> [].

%%--------------------------------------------------------------------------------------------
%% The table

%% Which measure of a row is shown: which is better, and what macula_quic is to reach, beside the
%% other or by itself.
lines() ->
    [{echo, "64 B echo, passive, p50, us", p50_us, lower, {ratio, 0.95}},
     {echo, "64 B echo, passive, p99, us", p99_us, lower, {ratio, 1.0}},
     {active, "64 B echo, active, p50, us", p50_us, lower, {ratio, 0.95}},
     {active, "64 B echo, active, p99, us", p99_us, lower, {ratio, 1.0}},
     {echo100, "64 B echo on 100 streams, echoes/s", per_second, higher, {ratio, 0.5}},
     {echo100, "64 B echo on 100 streams, p99, us", p99_us, lower, {ratio, 3.0}},
     {short, "open, send 64 B, close, 64 at a time, streams/s", per_second, higher, {ratio, 0.35}},
     {short, "the same, processor us a stream", cpu_us, lower, none},
     {serial, "the same one after the other, streams/s", per_second, higher, none},
     {datagrams, "datagrams of 1,000 B, 8 senders, sent/s", sent_per_second, higher, {ratio, 0.6}},
     {datagrams, "datagrams received/s", received_per_second, higher, {ratio, 0.6}},
     {datagrams, "datagrams dropped by an end, %", dropped_percent, lower, {value, 0}},
     {datagrams, "datagrams lost between, %", lost_percent, lower, none},
     {connections, "connections/s, 50 dialers", per_second, higher, {ratio, 0.9}},
     {resumption, "a resumed connection, processor us (beside: a full one)", cpu_us, lower, {ratio, 0.7}},
     {resumption, "resumed connections/s, 16 dialers (beside: full ones)", per_second, higher, none},
     {bulk, "1 GiB in 64 KiB sends, MB/s", mb_s, higher, {ratio, 0.95}},
     {bulk, "1 GiB in 64 KiB sends, processor s/GB", cpu_s_per_gb, lower, {ratio, 1.1}},
     {small_sends, "128 MiB in 1 KiB sends, MB/s", mb_s, higher, {ratio, 1.1}},
     {many_streams, "100 streams of 10 MB, MB/s", mb_s, higher, {ratio, 0.95}},
     {many_streams, "100 streams, Jain's index half-way", fairness, higher, {value, 0.9}},
     {many_streams, "100 streams, furthest from an even share half-way", uneven, lower, {value, 0.2}},
     {idle_connections, "an idle connection, both sides, KB", kb_each, lower, {value, 60}},
     {idle_streams, "an idle stream, both sides, KB", kb_each, lower, {value, 4}},
     {schedule, "turns of 1 ms or more, 100 streams echo (beside: gen_tcp)", events, lower,
      {ratio, 1.0}},
     {schedule, "the same, echoes/s (beside: 100 connections of gen_tcp)", per_second, higher, none},
     {behaviours, "64 B echo on 100 streams by behaviours, echoes/s (beside: without)", per_second, higher,
      {ratio, 0.85}},
     {behaviour, "the same on one stream", per_second, higher, {ratio, 0.85}}].

%% @doc A table in Markdown: medians, the median's ratio to the better runtime of Quinn with the range
%% of single repetitions, and what is to be reached.
-spec table([macula_bench:row()], [row()]) -> iolist().
table(Results, Rows) ->
    Values = lists:foldr(fun({quic, Subject, Metric, Repetition, Value}, Acc) ->
                                 maps:update_with({Subject, Metric},
                                                  fun(Old) -> [{Repetition, Value} | Old] end,
                                                  [{Repetition, Value}], Acc);
                            (_, Acc) ->
                                 Acc
                         end, #{}, Results),
    ["| streams, two processes, loopback | macula_quic | Quinn alone | runtime | ratio | range | goal | |\n"
     "|---|---:|---:|---|---:|---|---|---|\n" |
     [line(Title, metric(Row, Name), Better, Goal, Values)
      || {Row, Title, Name, Better, Goal} <- lines(), lists:member(Row, Rows)]].

line(Title, Metric, Better, Goal, Values) ->
    Ours = maps:get({macula_quic, Metric}, Values, []),
    {Beside, Theirs} = better(Better, [{Subject, maps:get({Subject, Metric}, Values)}
                                       || Subject <- [quinn_current, quinn_multi, gen_tcp, full, raw],
                                          is_map_key({Subject, Metric}, Values)]),
    Ratio = ratio(median(Ours), median(Theirs)),
    Single = [R || {Repetition, Our} <- Ours, {_, Their} <- [lists:keyfind(Repetition, 1, Theirs)],
                   R <- [ratio(Our, Their)], R =/= none],
    Cells = [Title, value(median(Ours)), value(median(Theirs)), Beside, value(Ratio),
             case Single of
                 [_, _ | _] -> [value(lists:min(Single)), " - ", value(lists:max(Single))];
                 _ -> ""
             end,
             goal(Better, Goal), verdict(Better, Goal, median(Ours), median(Theirs))],
    ["|", [[" ", Cell, " |"] || Cell <- Cells], "\n"].

%% The runtime whose median is better.
better(_Better, []) ->
    {"", []};
better(Better, Subjects) ->
    Sorted = lists:sort(fun({_, A}, {_, B}) ->
        case Better of
            lower -> median(A) =< median(B);
            higher -> median(A) >= median(B)
        end
    end, Subjects),
    {Subject, Values} = hd(Sorted),
    {case Subject of
         quinn_current -> "current";
         quinn_multi -> "multi";
         gen_tcp -> "gen_tcp";
         full -> "full";
         raw -> "raw"
     end, Values}.

median([]) -> none;
median(Values) -> macula_bench:median([Value || {_, Value} <- Values]).

ratio(Ours, Theirs) when is_number(Ours), is_number(Theirs), Theirs > 0 -> Ours / Theirs;
ratio(_Ours, _Theirs) -> none.

goal(_Better, none) -> "";
goal(lower, {ratio, Goal}) -> ["at most ", value(Goal), "x"];
goal(higher, {ratio, Goal}) -> ["at least ", value(Goal), "x"];
goal(lower, {value, Goal}) -> ["at most ", value(Goal)];
goal(higher, {value, Goal}) -> ["at least ", value(Goal)].

verdict(_Better, none, _Ours, _Theirs) -> "";
verdict(_Better, _Goal, none, _Theirs) -> "";
verdict(lower, {value, Goal}, Ours, _Theirs) -> verdict(Ours =< Goal);
verdict(higher, {value, Goal}, Ours, _Theirs) -> verdict(Ours >= Goal);
verdict(_Better, {ratio, _}, _Ours, none) -> "";
verdict(lower, {ratio, Goal}, Ours, Theirs) -> verdict(Ours =< Goal * Theirs);
verdict(higher, {ratio, Goal}, Ours, Theirs) -> verdict(Ours >= Goal * Theirs).

verdict(true) -> "ok";
verdict(false) -> "NO".

value(none) -> "-";
value(Value) when Value >= 100 -> integer_to_list(round(Value));
value(Value) when Value >= 10 -> io_lib:format("~.1f", [float(Value)]);
value(Value) -> io_lib:format("~.2f", [float(Value)]).
