%% `make demo-mesh': what it says, and that it fails when what it should show does not happen.
-module(mesh_demo_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([a_mesh_links_talks_loses_one_and_gets_it_back/1, the_picture_fits_a_terminal/1,
         what_is_not_done_in_time_has_failed/1]).

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [a_mesh_links_talks_loses_one_and_gets_it_back, the_picture_fits_a_terminal,
     what_is_not_done_in_time_has_failed].

a_mesh_links_talks_loses_one_and_gets_it_back(_Config) ->
    {Status, Output} = demo([{"MACULA_MESH_OUTPUT", "pipe"}]),
    ?assertEqual(0, Status, Output),
    [?assertMatch({_, {match, _}}, {Says, re:run(Output, Says, [multiline])}, Output)
     || Says <- ["^ +[0-9.]+  bravo -> alpha linked$",
                 "10 links, all known at both ends",
                 %% every pair has a latency, in both directions
                 "^alpha +\\. +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9]+ +[0-9]+ +[0-9]+$",
                 "^echo +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +\\. +[0-9]+ +[0-9]+ +[0-9]+$",
                 "200 by alpha: each reached 4 others once, signature intact",
                 "21 calls got their RESULT.*an unknown one its ERROR",
                 "deadline of 300 ms: given up by both after [0-9]+ ms",
                 "alpha lost charlie: the connection was lost: timed out",
                 "delta dials charlie again in [0-9]+ ms \\(attempt 2\\)",
                 "refused by delta and echo: .*pubkey mismatch",
                 "linked with all again",
                 "200 by charlie: each reached 4 others once, signature intact",
                 "^mesh: all of it happened, in "]],
    %% Nothing for a terminal in it.
    ?assertEqual(nomatch, string:find(Output, "\e")),
    assert_width(Output).

the_picture_fits_a_terminal(_Config) ->
    {Status, Output} = demo([{"MACULA_MESH_OUTPUT", "terminal"}, {"TERM", "xterm"}]),
    ?assertEqual(0, Status, Output),
    Pictures = [plain(P) || P <- string:split(Output, "\e[J", all)],
    %% One that was drawn while the killed one was away, and one when it was back.
    Has = fun(Says) ->
        lists:any(fun(P) -> re:run(P, Says, [multiline]) =/= nomatch end, Pictures)
    end,
    ?assert(Has("^charlie +down +down +\\. +down +down"), Output),
    ?assert(Has("^delta +[0-9.]+ +[0-9.]+ +dial [0-9]+"), Output),
    ?assert(Has("^delta +[0-9.]+ +[0-9.]+ +[0-9.]+ +\\. +[0-9.]+"), Output),
    lists:foreach(fun assert_width/1, Pictures),
    [?assert(length(string:split(P, "\n", all)) =< 25, P) || P <- Pictures].

what_is_not_done_in_time_has_failed(_Config) ->
    {Status, Output} = demo([{"MACULA_MESH_OUTPUT", "pipe"}, {"MACULA_MESH_LIMIT_MS", "4000"}]),
    ?assertEqual(1, Status, Output),
    ?assertMatch({match, _}, re:run(Output,
                                    "^mesh: FAILED: not done after 4.0 s \\(in step [1-9]\\.",
                                    [multiline])).

assert_width(Text) ->
    [?assert(string:length(Line) =< 80, Line) || Line <- string:split(Text, "\n", all)].

plain(Text) ->
    re:replace(Text, "\e\\[[0-9;?]*[A-Za-z]", "", [global, {return, list}]).

demo(Env) ->
    Ebin = filename:dirname(code:which(macula_peering)),
    Port = open_port({spawn_executable, os:find_executable("sh")},
                     [{args, [script("scripts/demo-mesh")]}, {env, [{"MACULA_EBIN", Ebin} | Env]},
                      exit_status, stderr_to_stdout]),
    collect(Port, []).

collect(Port, Acc) ->
    receive
        {Port, {data, Data}} -> collect(Port, [Acc | Data]);
        {Port, {exit_status, Status}} -> {Status, unicode:characters_to_list(lists:flatten(Acc))}
    end.

%% Beside this suite's source, wherever that is built from.
script(Name) ->
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    find(filename:dirname(Source), Name).

find(Dir, Name) ->
    File = filename:join(Dir, Name),
    case filelib:is_regular(File) of
        true -> File;
        false when Dir =/= "/" -> find(filename:dirname(Dir), Name)
    end.
