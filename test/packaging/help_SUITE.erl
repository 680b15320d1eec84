%% What `h' of erl and of iex tells about macula, from a build as users make it.
-module(help_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([every_public_function_is_documented/1, erl_helps_with_every_public_function/1,
         iex_helps_with_every_public_function/1, changed_sources_change_the_help/1,
         an_unchanged_build_starts_no_vm/1, a_system_without_edoc_builds/1]).

suite() ->
    [{timetrap, {minutes, 5}}].

all() ->
    [every_public_function_is_documented, erl_helps_with_every_public_function,
     iex_helps_with_every_public_function, changed_sources_change_the_help,
     an_unchanged_build_starts_no_vm, a_system_without_edoc_builds].

init_per_suite(Config) ->
    Root = macula_test_run:root(),
    {0, _} = macula_test_run:run(Root, "rebar3 compile"),
    [{root, Root}, {ebin, filename:join(Root, "_build/default/lib/macula/ebin")} | Config].

end_per_suite(_Config) ->
    ok.

%% A function is public unless EDoc's own tag says that the function or the module is private.
every_public_function_is_documented(Config) ->
    Missing = [{M, F, A} || {M, Source} <- public_modules(Config),
                            {F, A} <- public_functions(M, Source), text(M, F, A) =:= <<>>],
    ?assertEqual([], Missing).

erl_helps_with_every_public_function(Config) ->
    Asked = asked(Config),
    Program = filename:join(?config(priv_dir, Config), "ask.eval"),
    ok = file:write_file(Program, io_lib:format(
        "[begin ok = h(M, F, A) end || {M, F, A} <- ~p],\nok = h(macula_quic, connect),\nhalt().\n",
        [Asked])),
    %% The shell itself, as `h' is a function of the shell.
    {0, Output} = macula_test_run:run(?config(root, Config),
        "erl -pa " ++ ?config(ebin, Config) ++ " < " ++ Program),
    ?assertMatch({match, _}, re:run(Output, "Connects to a host")),
    ?assertEqual(nomatch, re:run(Output, "\\*\\* exception")),
    [?assertMatch({_, {match, _}}, {F, re:run(Output, ["\\b", atom_to_list(F), "\\("])})
     || {_M, F, _A} <- Asked].

iex_helps_with_every_public_function(Config) ->
    case os:find_executable("iex") of
        false ->
            {skip, "Elixir is not installed"};
        _ ->
            Asked = asked(Config),
            Program = filename:join(?config(priv_dir, Config), "ask.exs"),
            ok = file:write_file(Program,
                [["h :", atom_to_list(M), ".", atom_to_list(F), "/", integer_to_list(A), "\n"]
                 || {M, F, A} <- Asked] ++ ["h :macula_quic.connect\n", "System.halt(0)\n"]),
            {0, Output} = macula_test_run:run(?config(root, Config),
                "iex -pa " ++ ?config(ebin, Config) ++ " < " ++ Program),
            ?assertMatch({match, _}, re:run(Output, "Connects to a host")),
            ?assertEqual(nomatch, re:run(Output, "No documentation|without docs|\\*\\* \\(")),
            [?assertMatch({_, {match, _}}, {F, re:run(Output, ["\\b", atom_to_list(F), "\\("])})
             || {_M, F, _A} <- Asked]
    end.

changed_sources_change_the_help(Config) ->
    Dir = built_copy(Config, "changed"),
    Source = filename:join(Dir, "src/quic/macula_quic.erl"),
    {ok, Text} = file:read_file(Source),
    ok = file:write_file(Source, string:replace(Text, "%% @doc ", "%% @doc What was not there: ")),
    %% The clock of a file system may stand still for some milliseconds.
    {ok, #file_info{mtime = Now}} = file:read_file_info(Source, [{time, posix}]),
    ok = file:write_file_info(Source, #file_info{mtime = Now + 1}, [{time, posix}]),
    {0, ""} = macula_test_run:run(Dir, "sh scripts/build-docs"),
    {ok, Chunk} = file:read_file(filename:join(Dir, "_build/default/lib/macula/doc/chunks/"
                                                    "macula_quic.chunk")),
    ?assertNotEqual(nomatch, binary:match(iolist_to_binary(io_lib:format("~p", [binary_to_term(Chunk)])),
                                          <<"What was not there: ">>)).

an_unchanged_build_starts_no_vm(Config) ->
    Dir = built_copy(Config, "unchanged"),
    Path = with_erl(Config, "no_vm", "echo a VM; exit 99"),
    ?assertEqual({0, ""}, macula_test_run:run(Dir, Path ++ "sh scripts/build-docs")).

%% The build goes on, says what is missing, and leaves nothing half done.
a_system_without_edoc_builds(Config) ->
    Dir = built_copy(Config, "without_edoc"),
    Doc = filename:join(Dir, "_build/default/lib/macula/doc"),
    ok = file:del_dir_r(Doc),
    Path = with_erl(Config, "no_edoc",
                    "exec " ++ os:find_executable("erl") ++ " -eval 'code:del_path(edoc)' \"$@\""),
    {0, Output} = macula_test_run:run(Dir, Path ++ "sh scripts/build-docs"),
    ?assertMatch({match, _}, re:run(Output, "^macula: no documentation for h: .*edoc")),
    ?assertEqual([], filelib:wildcard(Doc ++ "*")).

%% Helpers

%% Sources and what was built of them, in a directory of their own.
built_copy(Config, Name) ->
    Dir = filename:join(?config(priv_dir, Config), Name),
    Built = filename:join(Dir, "_build/default/lib/macula"),
    ok = filelib:ensure_dir(filename:join(Built, "x")),
    {0, _} = macula_test_run:run(?config(root, Config),
        "cp -r src scripts " ++ Dir ++ " && cp -r _build/default/lib/macula/ebin " ++ Built),
    {0, ""} = macula_test_run:run(Dir, "sh scripts/build-docs"),
    Dir.

%% A PATH whose `erl' is this script.
with_erl(Config, Name, Script) ->
    Bin = filename:join(?config(priv_dir, Config), Name),
    File = filename:join(Bin, "erl"),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, ["#!/bin/sh\n", Script, "\n"]),
    ok = file:change_mode(File, 8#755),
    "PATH=" ++ Bin ++ ":$PATH ".

asked(Config) ->
    [{M, F, A} || {M, Source} <- public_modules(Config), {F, A} <- public_functions(M, Source)].

public_modules(Config) ->
    Sources = filelib:wildcard(filename:join(?config(root, Config), "src/**/*.erl")),
    Public = [{list_to_atom(filename:basename(File, ".erl")), File}
              || File <- Sources, not is_private(module, File)],
    %% What the documentation names.
    ?assertEqual([], [macula_quic, macula_dist, macula_peering, macula_frame, macula_identity]
                     -- [M || {M, _} <- Public]),
    Public.

public_functions(Module, Source) ->
    %% The compiler's own.
    [FA || FA <- Module:module_info(exports) -- [{module_info, 0}, {module_info, 1}, {behaviour_info, 1}],
           not is_private(FA, Source)].

%% Does the comment right above say so?
is_private(What, Source) ->
    {ok, Forms} = epp:parse_file(Source, []),
    Line = lists:min([erl_anno:line(Anno) || Form <- Forms, {Named, Anno} <- [named(Form)],
                                             Named =:= What]),
    lists:any(fun({Begin, _, _, Lines}) ->
        Begin + length(Lines) =:= Line andalso
            %% The scanner takes the first percent sign off.
            lists:any(fun(Text) ->
                lists:prefix("% @private", Text) orelse lists:prefix("% @hidden", Text)
            end, Lines)
    end, erl_comment_scan:file(Source)).

named({attribute, Anno, module, _}) -> {module, Anno};
named({attribute, Anno, spec, {FA, _}}) -> {FA, Anno};
named({function, Anno, Function, Arity, _}) -> {{Function, Arity}, Anno};
named(_) -> none.

text(Module, Function, Arity) ->
    {ok, {docs_v1, _, _, _, _, _, Docs}} = code:get_doc(Module),
    case [Doc || {{function, F, A}, _, _, Doc, _} <- Docs, F =:= Function, A =:= Arity] of
        [#{<<"en">> := Text}] -> iolist_to_binary(io_lib:format("~p", [Text]));
        _ -> <<>>
    end.
