%% The links of the documentation lead to pages and headings that are there.
-module(macula_links_tests).

-include_lib("eunit/include/eunit.hrl").

every_link_leads_somewhere_test_() ->
    [{Page, fun() -> ?assertEqual([], dead(Page, read(Page))) end} || Page <- pages()].

%% Also where it is no link: in documentation of modules, in scripts, in the changelog.
every_page_that_is_named_is_there_test_() ->
    Files = pages() ++ files(["src/**/*.erl", "native/macula/src/**/*.rs", "test/**/*.erl", "scripts/*", "Makefile"]),
    [{File, fun() -> ?assertEqual([], [Named || Named <- named(read(File)), not is_there(Named)]) end}
     || File <- Files, filename:basename(File) =/= ?MODULE_STRING ++ ".erl"].

the_check_finds_dead_links_test() ->
    Dead = fun(Text) -> dead("docs/interop.md", list_to_binary(Text)) end,
    ?assertEqual(["nowhere.md"], Dead("[a](nowhere.md)")),
    ?assertEqual(["../test/nowhere"], Dead("![a b](../test/nowhere \"title\") [c](../test/interop)")),
    ?assertEqual(["guides/quic.md#nothing"], Dead("See [a\nb](guides/quic.md#nothing).")),
    ?assertEqual(["#nothing"], Dead("[a](#nothing)")),
    %% A directory has no headings.
    ?assertEqual(["../test/interop#a"], Dead("[a](../test/interop#a)")),
    ?assertEqual(["nowhere.md"], Dead("```\n[a](in_code.md)\n```\n`[a](in_code.md)` [`a`](nowhere.md)")),
    ?assertEqual([], Dead("[a](guides/quic.md#early-data) [b](#what-to-know) [c](https://nowhere.example.org/a.md)\n"
                          "## What to know\n")),
    ?assertEqual(["docs/a/b.md"], named(<<"%% `docs/a/b.md' says">>)).

headings_are_named_as_github_does_test() ->
    ?assertEqual(["limits-of-macula_quic", "a-b--c", "twice", "twice-1", "a-link"],
                 anchors(<<"# Limits of `macula_quic`\n## A b & c!\n```\n# no heading\n```\n## Twice\ntext\n"
                           "### Twice\n## A [link](to.md)\n">>)).

%%% Pages

root() ->
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    filename:dirname(filename:dirname(filename:dirname(Source))).

pages() ->
    [_ | _] = files(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "examples/**/*.md"]).

%% Without what a build of an example puts beside it.
files(Patterns) ->
    Found = [File || Pattern <- Patterns, File <- filelib:wildcard(Pattern, root()),
                     filelib:is_regular(filename:join(root(), File))],
    [File || File <- Found, not lists:any(fun(Part) -> lists:member(Part, ["_build", "deps", "_checkouts"]) end,
                                          filename:split(File))].

read(File) ->
    {ok, Text} = file:read_file(filename:join(root(), File)),
    Text.

is_there(File) ->
    filelib:is_file(filename:join(root(), File)).

named(Text) ->
    found(Text, "\\bdocs/[A-Za-z0-9_/-]+\\.md\\b", 0).

%%% Links

dead(Page, Text) ->
    [Link || Link <- links(Text), not leads_somewhere(Page, Text, Link)].

%% A title behind the target is none of it.
links(Text) ->
    Written = found(without_code(Text), "\\[[^\\]]*\\]\\(([^)\\s]+)[^)]*\\)", 1),
    [Link || Link <- Written, nomatch =:= re:run(Link, "^[a-z]+:")].

leads_somewhere(Page, Text, Link) ->
    {Path, Anchor} = case string:split(Link, "#") of
        [Whole] -> {Whole, none};
        [File, Heading] -> {File, Heading}
    end,
    Target = filename:join(filename:dirname(Page), Path),
    case {Path, Anchor} of
        {"", _} -> lists:member(Anchor, anchors(Text));
        {_, none} -> is_there(Target);
        {_, _} -> filename:extension(Path) =:= ".md" andalso is_there(Target)
                      andalso lists:member(Anchor, anchors(read(Target)))
    end.

anchors(Text) ->
    numbered([anchor(Heading) || Heading <- found(without_blocks(Text), "^#{1,6} +(.*)$", 1)], #{}).

%% Letters of a link's target are not in the name of its heading.
anchor(Heading) ->
    Shown = re:replace(Heading, "\\[([^\\]]*)\\]\\([^)]*\\)", "\\1", [global, unicode]),
    Kept = re:replace(Shown, "[^\\p{L}\\p{N} _-]", "", [global, unicode, ucp]),
    string:replace(string:lowercase(unicode:characters_to_list(Kept)), " ", "-", all).

numbered([], _) ->
    [];
numbered([Anchor | Anchors], Seen) ->
    Flat = unicode:characters_to_list(Anchor),
    case Seen of
        #{Flat := N} -> [Flat ++ "-" ++ integer_to_list(N) | numbered(Anchors, Seen#{Flat := N + 1})];
        #{} -> [Flat | numbered(Anchors, Seen#{Flat => 1})]
    end.

without_code(Text) ->
    re:replace(without_blocks(Text), "`[^`]+`", "", [global, unicode, {return, binary}]).

without_blocks(Text) ->
    re:replace(Text, "^ *```.*?^ *```$", "", [global, unicode, multiline, dotall, {return, binary}]).

found(Text, Pattern, Group) ->
    case re:run(Text, Pattern, [global, unicode, multiline, {capture, [Group], list}]) of
        {match, Matches} -> [Found || [Found] <- Matches];
        nomatch -> []
    end.
