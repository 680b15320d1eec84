%% The runner of suites says what happened, whatever happened.
-module(macula_test_lanes_tests).

-include_lib("eunit/include/eunit.hrl").

-define(ABOUT, [{alone, [big, huge]}, {apart, [[one, two, big]]},
                {seconds, [{long, 50}, {one, 30}, {two, 30}, {short, 1}]}]).

the_longest_begin_first_and_some_are_alone_test() ->
    ?assertEqual({[[one, two], [long], [short], [quick]], [huge, big]},
                 macula_test_lanes:plan([quick, huge, short, two, one, long, big], ?ABOUT)),
    ?assertEqual({[[two]], []}, macula_test_lanes:plan([two], ?ABOUT)).

%% A name that is mistaken would let a suite run beside others that should not.
every_suite_described_exists_test() ->
    Root = macula_test_run:root(),
    {ok, About} = file:consult(filename:join(Root, "test/suites.term")),
    Names = proplists:get_value(alone, About) ++ lists:append(proplists:get_value(apart, About))
        ++ [Suite || {Suite, _} <- proplists:get_value(seconds, About)],
    ?assertEqual([], [Name || Name <- Names,
                              [] =:= filelib:wildcard("test/*/" ++ atom_to_list(Name) ++ ".erl", Root)]).

outcomes_are_what_the_suites_did_test_() ->
    {timeout, 120, fun() ->
        Dir = filename:join([macula_test_run:root(), "_build/test/lanes", os:getpid()]),
        ok = filelib:ensure_dir(filename:join(Dir, "x")),
        true = code:add_patha(Dir),
        try
            outcomes(Dir)
        after
            true = code:del_path(Dir),
            ok = file:del_dir_r(Dir)
        end
    end}.

outcomes(Dir) ->
    ok = write(Dir, mixed_SUITE, "
        -export([good/1, bad/1, slow/0, slow/1, wont/1]).
        all() -> [good, bad, slow, wont].
        slow() -> [{timetrap, 300}].
        slow(_) -> receive never -> ok end.
        good(_) -> ok.
        bad(_) -> [expected] = [found].
        wont(_) -> {skip, \"not here\"}."),
    ok = write(Dir, unprepared_SUITE, "
        -export([init_per_suite/1, end_per_suite/1, a/1, b/1]).
        all() -> [a, b].
        init_per_suite(_) -> error(no_way).
        end_per_suite(_) -> ok.
        a(_) -> ok.
        b(_) -> ok."),
    ok = write(Dir, ended_SUITE, "
        -export([a/1]).
        all() -> [a].
        a(_) -> halt(0)."),
    ok = write(Dir, empty_SUITE, "all() -> []."),
    Self = self(),
    Suites = [mixed_SUITE, unprepared_SUITE, ended_SUITE, empty_SUITE, missing_SUITE],
    Outcomes = macula_test_lanes:run({[[S] || S <- Suites], []}, 2, Dir,
                                     fun(Line) -> Self ! {line, Line}, ok end),
    Lines = lines(),
    ?assertEqual([{empty_SUITE, {0, 1, 0}}, {ended_SUITE, {0, 1, 0}}, {missing_SUITE, {0, 1, 0}},
                  {mixed_SUITE, {1, 2, 1}}, {unprepared_SUITE, {0, 2, 0}}],
                 lists:sort([{Suite, Counts} || {Suite, Counts, _} <- Outcomes])),
    Found = fun(Says) -> [L || L <- Lines, match =:= re:run(L, Says, [{capture, none}])] end,
    [?assertMatch({Says, [_]}, {Says, Found(Says)}, Lines)
     || Says <- ["^%%% mixed_SUITE: good: ok \\([0-9.]+ s\\)$", "^%%% mixed_SUITE: bad: FAILED: .*found",
                 "^%%% mixed_SUITE: slow: FAILED: timetrap", ": ok( |$)",
                 "^%%% mixed_SUITE: wont: skipped: not here$",
                 "^%%% mixed_SUITE: 1 passed, 2 failed, 1 skipped in ",
                 "^%%% unprepared_SUITE: init_per_suite: FAILED: .*no_way",
                 "^%%% ended_SUITE: the suite: FAILED: ", "^%%% empty_SUITE: the suite: FAILED: ",
                 "^%%% missing_SUITE: the suite: FAILED: "]].

lines() ->
    receive {line, Line} -> [Line | lines()] after 0 -> [] end.

write(Dir, Suite, Text) ->
    File = filename:join(Dir, Suite),
    ok = file:write_file(File ++ ".erl", ["-module(", atom_to_list(Suite), ").\n-export([all/0]).\n", Text]),
    {ok, Suite} = compile:file(File, [{outdir, Dir}]),
    ok.
