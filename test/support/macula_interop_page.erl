%% @doc The table of `docs/interop.md', made of what macula_quic_interop_SUITE has recorded:
%% `scripts/interop' writes it. Between its marks, `<!-- interop -->' and `<!-- end -->', the page is not
%% written by hand.
-module(macula_interop_page).

-export([main/0, render/3]).

-type result() :: {Peer :: atom(), Case :: atom(), ok | {missing, string()} | term()}.

%% @doc Writes the table anew from a file of results. The further arguments are the peers' versions.
-spec main() -> no_return().
main() ->
    [File, Recorded | Versions] = init:get_plain_arguments(),
    {ok, Page} = file:read_file(File),
    {ok, Results} = file:consult(Recorded),
    ok = file:write_file(File, render(Page, Results, Versions)),
    halt(0).

%% @doc A page with the table of these results.
-spec render(binary(), [result()], [string()]) -> binary().
render(Page, Results, Versions) ->
    Lines = binary:split(Page, <<"\n">>, [global]),
    {Before, [Mark | Rest]} = lists:splitwith(fun(Line) -> Line =/= <<"<!-- interop -->">> end, Lines),
    After = lists:dropwhile(fun(Line) -> Line =/= <<"<!-- end -->">> end, Rest),
    New = Before ++ [Mark] ++ table(Results, Versions) ++ After,
    iolist_to_binary(lists:join("\n", New)).

table(Results, Versions) ->
    Peers = macula_quic_interop_SUITE:peers(),
    Rows = macula_quic_interop_SUITE:rows(),
    Sides = [[" ", Side, " |"] || _ <- Peers, Side <- ["our server", "our client"]],
    [["| | ", lists:join(" | | ", Versions), " | |"],
     ["|---|", lists:duplicate(length(Sides), "---|")],
     ["| |", Sides]]
    ++ [["| ", What, " |", [[" ", cell(result(Peer, Case, Results)), " |"]
                            || Peer <- Peers, Case <- [Server, Client]]]
        || {What, Server, Client} <- Rows]
    ++ notes(Rows, Results).

result(Peer, Case, Results) ->
    %% The last one, should there be several.
    case [Result || {P, C, Result} <- Results, P =:= Peer, C =:= Case] of
        [] -> not_run;
        Found -> lists:last(Found)
    end.

cell(ok) -> "yes";
cell({missing, _}) -> <<"–"/utf8>>;
cell(not_run) -> "not run";
cell(_Failed) -> "**no**".

%% Why a case is missing, once for all that share the reason.
notes(Rows, Results) ->
    Missing = [{What, Why} || {What, Server, Client} <- Rows, {_, Case, {missing, Why}} <- Results,
                              Case =:= Server orelse Case =:= Client],
    case lists:usort(Missing) of
        [] -> [];
        Notes -> ["" | [["- ", What, ": ", Why] || {What, Why} <- Notes]]
    end.
