%% @doc Runs Common Test suites side by side, each in a VM of its own: what `scripts/test ct' calls.
%%
%% `test/suites.term' says which suites must be alone, which must not meet, and which take long. A
%% line is printed for each case as it ends, and a suite's whole output is in `LOGS/SUITE/output'.
-module(macula_test_lanes).

-export([main/1, plan/2, run/4, suite/1]).

%% The hook in a suite's VM.
-export([id/1, init/2, pre_init_per_testcase/4, post_end_per_testcase/5, on_tc_fail/4, on_tc_skip/4,
         terminate/1]).

-export_type([outcome/0, counts/0]).

-type counts() :: {Passed :: non_neg_integer(), Failed :: non_neg_integer(), Skipped :: non_neg_integer()}.
-type outcome() :: {module(), counts(), Seconds :: number()}.

-define(MARK, "%%% ").
-define(LINE_CHARS, 4000).

%% @doc Arguments: the directory for logs, the file that describes suites, how many run at a time, and
%% the suites. Halts with 0 when nothing has failed.
-spec main([string()]) -> no_return().
main([Logs, File, Lanes | Names]) ->
    {ok, About} = file:consult(File),
    Plan = plan([list_to_atom(Name) || Name <- Names], About),
    %% Bytes as they come.
    ok = io:setopts([{encoding, latin1}]),
    Outcomes = run(Plan, list_to_integer(Lanes), Logs, fun(Line) -> file:write(standard_io, [Line, $\n]) end),
    ok = write_index(filename:join(Logs, "index.html"), Outcomes),
    {Passed, Failed, Skipped} = total(Outcomes),
    io:format("ct: ~b passed, ~b failed, ~b skipped~n", [Passed, Failed, Skipped]),
    halt(case Failed of 0 -> 0; _ -> 1 end).

%% @doc What may run beside others, in the order in which a lane takes them, and what runs alone after
%% that. The members of a list run one after the other.
-spec plan([module()], [{atom(), term()}]) -> {[[module()]], [module()]}.
plan(Suites, About) ->
    {alone, Alone} = lists:keyfind(alone, 1, About),
    {apart, Apart} = lists:keyfind(apart, 1, About),
    {seconds, Seconds} = lists:keyfind(seconds, 1, About),
    Beside = Suites -- Alone,
    Groups = [Group || Names <- Apart, Group <- [[S || S <- Names, lists:member(S, Beside)]],
                       Group =/= []],
    Lists = Groups ++ [[S] || S <- Beside -- lists:append(Groups)],
    Cost = fun(List) -> lists:sum([proplists:get_value(S, Seconds, 0) || S <- List]) end,
    Longest = lists:reverse(lists:keysort(1, [{Cost(List), List} || List <- Lists])),
    {[List || {_, List} <- Longest], [S || S <- Suites, lists:member(S, Alone)]}.

%% @doc Runs what was planned. `Print' is given a line for each case and each suite as it ends.
-spec run({[[module()]], [module()]}, pos_integer(), file:filename(), fun((binary()) -> ok)) ->
          [outcome()].
run({Beside, Alone}, Lanes, Logs, Print) ->
    Run = fun(Suite) -> run_suite(Suite, filename:absname(Logs), Print) end,
    side_by_side(Beside, Lanes, Run, #{}, []) ++ [Run(Suite) || Suite <- Alone].

side_by_side([], _Lanes, _Run, Running, Done) when map_size(Running) =:= 0 ->
    Done;
side_by_side([List | Lists], Lanes, Run, Running, Done) when map_size(Running) < Lanes ->
    {Pid, MRef} = spawn_monitor(fun() -> exit({outcomes, [Run(Suite) || Suite <- List]}) end),
    side_by_side(Lists, Lanes, Run, Running#{MRef => Pid}, Done);
side_by_side(Lists, Lanes, Run, Running, Done) ->
    receive
        {'DOWN', MRef, process, _, {outcomes, Outcomes}} when is_map_key(MRef, Running) ->
            side_by_side(Lists, Lanes, Run, maps:remove(MRef, Running), Done ++ Outcomes);
        {'DOWN', MRef, process, _, Reason} when is_map_key(MRef, Running) ->
            error(Reason)
    end.

%% -- a suite from outside -------------------------------------------------------------------------

run_suite(Suite, Logs, Print) ->
    Name = atom_to_list(Suite),
    Dir = filename:join(Logs, Name),
    Result = filename:join(Dir, "result"),
    ok = filelib:ensure_dir(Result),
    _ = file:delete(Result),
    {ok, Output} = file:open(filename:join(Dir, "output"), [write, raw, delayed_write]),
    Begun = erlang:monotonic_time(millisecond),
    Port = open_port({spawn_executable, os:find_executable("erl")},
                     [{args, ["-noshell", "-pa" | code_path()]
                             ++ ["-run", ?MODULE_STRING, "suite", Name, Dir]},
                      {line, 65536}, exit_status, stderr_to_stdout, binary]),
    Status = collect(Port, Output, Print, []),
    ok = file:close(Output),
    Seconds = (erlang:monotonic_time(millisecond) - Begun) / 1000,
    Counts = counts(Suite, file:consult(Result), Status, Print),
    {Passed, Failed, Skipped} = Counts,
    ok = Print(line(Suite, io_lib:format("~b passed, ~b failed, ~b skipped in ~.1f s",
                                         [Passed, Failed, Skipped, Seconds]))),
    {Suite, Counts, Seconds}.

%% A case whose preparation failed is no skipped one.
counts(_Suite, {ok, [{Passed, Failed, {Skipped, Unprepared}}]}, 0, _Print) when Passed + Failed +
        Skipped + Unprepared > 0 ->
    {Passed, Failed + Unprepared, Skipped};
counts(Suite, {ok, [Result]}, 0, Print) ->
    ok = Print(failed(Suite, "the suite", {nothing_was_run, Result})),
    {0, 1, 0};
counts(Suite, _, Status, Print) ->
    ok = Print(failed(Suite, "the suite", {its_vm_ended, {status, Status}})),
    {0, 1, 0}.

collect(Port, Output, Print, Begun) ->
    receive
        {Port, {data, {noeol, Part}}} ->
            collect(Port, Output, Print, [Begun, Part]);
        {Port, {data, {eol, Part}}} ->
            Line = iolist_to_binary([Begun, Part]),
            ok = file:write(Output, [Line, $\n]),
            case Line of
                <<?MARK, _/binary>> -> ok = Print(Line);
                _ -> ok
            end,
            collect(Port, Output, Print, []);
        {Port, {exit_status, Status}} ->
            Status
    end.

%% What this VM was given beyond OTP.
code_path() ->
    Root = code:lib_dir(),
    [filename:absname(Dir) || Dir <- code:get_path(), Dir =/= ".", not lists:prefix(Root, Dir)].

total(Outcomes) ->
    lists:foldl(fun({_, {P, F, S}, _}, {Ps, Fs, Ss}) -> {Ps + P, Fs + F, Ss + S} end, {0, 0, 0}, Outcomes).

write_index(File, Outcomes) ->
    Rows = [io_lib:format("<tr><td><a href=\"~s/index.html\">~s</a><td>~b<td>~b<td>~b<td>~.1f~n",
                          [Suite, Suite, Passed, Failed, Skipped, float(Seconds)])
            || {Suite, {Passed, Failed, Skipped}, Seconds} <- lists:sort(Outcomes)],
    file:write_file(File, ["<!DOCTYPE html><title>Common Test</title><table>\n<tr><th>suite<th>passed"
                           "<th>failed<th>skipped<th>seconds\n", Rows, "</table>\n"]).

%% -- a suite from inside --------------------------------------------------------------------------

%% @doc Runs one suite in this VM; arguments: its name, and the directory for its logs.
-spec suite([string()]) -> no_return().
suite([Name, Dir]) ->
    %% Ends with the VM that runs the lanes.
    _ = spawn(fun() -> eof = io:get_line(""), halt(1) end),
    ok = io:setopts(user, [{encoding, latin1}]),
    Suite = list_to_atom(Name),
    Result = case code:which(Suite) of
        non_existing ->
            {error, no_such_suite};
        Beam ->
            ct:run_test([{dir, filename:dirname(Beam)}, {suite, Suite}, {logdir, Dir},
                         {auto_compile, false}, {ct_hooks, [?MODULE]}])
    end,
    ok = file:write_file(filename:join(Dir, "result"), io_lib:format("~0tp.~n", [Result])),
    halt(0).

%% @private
id(_Options) -> ?MODULE.

%% @private
init(_Id, _Options) -> {ok, #{}}.

%% @private
pre_init_per_testcase(_Suite, Case, Config, State) ->
    {Config, (told(State))#{begun => {Case, erlang:monotonic_time(millisecond)}}}.

%% Whether a case has failed is told after its end.
%% @private
post_end_per_testcase(Suite, Case, _Config, Return, State) ->
    Took = case State of
        #{begun := {Case, Begun}} ->
            io_lib:format(" (~.1f s)", [(erlang:monotonic_time(millisecond) - Begun) / 1000]);
        #{} ->
            ""
    end,
    {Return, State#{ended => {Case, line(Suite, [name(Case), ": ok", Took])}}}.

%% @private
on_tc_fail(Suite, Case, Reason, State) ->
    not_ok(Case, failed(Suite, name(Case), Reason), State).

%% @private
on_tc_skip(Suite, Case, {tc_auto_skip, Reason}, State) ->
    not_ok(Case, failed(Suite, name(Case), Reason), State);
on_tc_skip(Suite, Case, {tc_user_skip, Reason}, State) ->
    not_ok(Case, line(Suite, [name(Case), ": skipped: ", reason(Reason)]), State).

%% @private
terminate(State) -> told(State).

not_ok(Case, Line, State) ->
    Name = case Case of {Function, _Group} -> Function; _ -> Case end,
    Rest = case State of
        #{ended := {Name, _}} -> maps:remove(ended, State);
        #{} -> told(State)
    end,
    ok = print(Line),
    Rest.

told(#{ended := {_Case, Line}} = State) ->
    ok = print(Line),
    maps:remove(ended, State);
told(State) ->
    State.

name({Case, Group}) -> [atom_to_list(Group), $., atom_to_list(Case)];
name(Case) -> atom_to_list(Case).

failed(Suite, Case, Reason) ->
    line(Suite, [Case, ": FAILED: ", reason(Reason)]).

reason([Char | _] = Text) when is_integer(Char) -> Text;
reason(Reason) -> io_lib:format("~0tP", [Reason, 100]).

line(Suite, Text) ->
    OneLine = lists:join($\s, string:lexemes(unicode:characters_to_list(Text), "\r\n")),
    unicode:characters_to_binary(string:slice([?MARK, atom_to_list(Suite), ": ", OneLine], 0, ?LINE_CHARS)).

%% Past the group leader of a case, which is its log.
print(Line) ->
    file:write(user, [Line, $\n]).
