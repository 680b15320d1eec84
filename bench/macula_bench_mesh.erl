%% @doc A full mesh of nodes that dial each other at once, and then idle, over each carrier; over macula with one
%% lane, too: what the other one costs while nobody uses it.
-module(macula_bench_mesh).

-export([subjects/1, run/3, table/3]).

%% For how long the nodes idle.
-define(WATCHED_MS, 20000).

%% @doc What is measured where these carriers are.
-spec subjects([atom()]) -> [atom()].
subjects(Carriers) ->
    Carriers ++ [macula_one || lists:member(macula, Carriers)].

%% @doc The values of one repetition with one subject.
-spec run(macula_test_nodes:options(), pos_integer(), pos_integer()) -> [{atom(), number()}].
run(Options, Size, Percent) ->
    #{lost := [], incomplete := []} = Figures =
        macula_test_mesh:measure(Options, Size, max(1000, ?WATCHED_MS * Percent div 100)),
    [{Metric, Value} || {_, Metric, Key} <- rows(), Value <- [maps:get(Key, Figures)], Value =/= unknown].

%% The title in the table, the name in the results, and what it is called where it is measured.
rows() ->
    [{"the mesh is whole, ms", mesh_ms, ms}, {"processor time of a link, both ends, ms", mesh_cpu_ms, cpu_ms},
     {"memory of an end of a link, KB", mesh_kb, kb}, {"  of that not of files, KB", mesh_own_kb, own_kb},
     {"wake-ups a second, idle end of a link", mesh_wakes, wakes}].

%% @doc Medians side by side, and the ratio of macula to `inet_tcp'.
-spec table(#{{atom(), term()} => number()}, [atom()], pos_integer()) -> iolist().
table(Medians, Carriers, Size) ->
    Subjects = subjects(Carriers),
    Head = [io_lib:format("full mesh of ~b nodes that dial each other at once, one machine, medians\n", [Size]),
            io_lib:format("~-40s", [""]), [io_lib:format("~11s", [S]) || S <- Subjects], "   to tcp\n"],
    [Head | [line(Title, Metric, Medians, Subjects) || {Title, Metric, _} <- rows()]].

line(Title, Metric, Medians, Subjects) ->
    Of = fun(Subject) -> maps:get({Subject, Metric}, Medians, unknown) end,
    [io_lib:format("~-40s", [Title]), [value(Of(S)) || S <- Subjects], ratio(Of(macula), Of(inet_tcp)), "\n"].

value(unknown) -> io_lib:format("~11s", ["-"]);
value(Value) -> io_lib:format("~11.2f", [float(Value)]).

ratio(Ours, Theirs) when is_number(Ours), is_number(Theirs), Theirs > 0 ->
    io_lib:format("~8.2fx", [Ours / Theirs]);
ratio(_, _) ->
    io_lib:format("~9s", ["-"]).
