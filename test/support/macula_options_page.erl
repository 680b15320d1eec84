%% @doc The tables of `docs/reference/options.md', made of the one table of options. Between its marks,
%% `<!-- options: Section -->' and `<!-- end -->', the page is not written by hand:
%% `scripts/options-page' writes it anew, and a test compares.
-module(macula_options_page).

-export([main/0, render/1]).

%% @doc Writes the tables of the page anew.
-spec main() -> no_return().
main() ->
    [File] = init:get_plain_arguments(),
    {ok, Page} = file:read_file(File),
    ok = file:write_file(File, render(Page)),
    halt(0).

%% @doc A page with the tables as they should be.
-spec render(binary()) -> binary().
render(Page) ->
    Lines = binary:split(Page, <<"\n">>, [global]),
    iolist_to_binary(lists:join("\n", lines(Lines))).

lines([<<"<!-- options: ", Rest/binary>> = Mark | Lines]) ->
    [Name | _] = binary:split(Rest, <<" -->">>),
    [_ | Behind] = lists:dropwhile(fun(Line) -> Line =/= <<"<!-- end -->">> end, Lines),
    [Mark | table(Name)] ++ ["<!-- end -->" | lines(Behind)];
lines([Line | Lines]) ->
    [Line | lines(Lines)];
lines([]) ->
    [].

table(<<"unsupported">>) ->
    Sections = [listen, connect, connection, open_stream, accepted, arm_stream, stream],
    ["| option | of | nothing is asked for by | why not | instead |", "|---|---|---|---|---|"
     | [row([code(Key), of_section(Section), nothing(NoOp), Why, Instead])
        || Section <- Sections,
           {unsupported, Key, _, NoOp, Why, Instead} <- macula_quic_option_table:section(Section)]];
table(Name) ->
    Rows = macula_quic_option_table:section(binary_to_existing_atom(Name, utf8)),
    ["| option | values | default | what it does |", "|---|---|---|---|"
     | [line(Row, Rows) || Row <- Rows, element(1, Row) =/= unsupported]].

line({option, Key, Type, Default, Text}, _Rows) ->
    row([code(Key), values(Type), default(Default), Text]);
line({same, Key, Name, Type, Text}, _Rows) ->
    More = case Text of "" -> ""; _ -> ["; ", Text] end,
    row([code(Key), values(Type), "", ["`", atom_to_list(Name), "` by another name", More]]).

row(Cells) ->
    Escaped = [re:replace(Cell, "\\|", "\\\\|", [global]) || Cell <- Cells],
    ["| ", lists:join(" | ", Escaped), " |"].

of_section(listen) -> "listeners";
of_section(connect) -> "clients";
of_section(connection) -> "both sides";
of_section(open_stream) -> "`open_stream/2`";
of_section(accepted) -> "`accept_stream/3`, `async_accept_stream/2`";
of_section(arm_stream) -> "`async_accept_stream/2`";
of_section(stream) -> "streams".

values({one_of, Values}) -> lists:join(", ", [code(V) || V <- Values]);
values(Type) -> macula_quic_option_value:words(Type).

nothing({one_of, []}) -> "";
nothing(Type) -> values(Type).

default(undefined) -> "";
default(<<>>) -> "";
default(Default) -> code(Default).

code(Term) -> io_lib:format("`~0p`", [Term]).
