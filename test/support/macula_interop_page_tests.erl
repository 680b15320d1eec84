-module(macula_interop_page_tests).

-include_lib("eunit/include/eunit.hrl").

-define(PAGE, <<"# Title\n\n<!-- interop -->\nold\n<!-- end -->\nafter\n">>).

page_test() ->
    Results = [{aioquic, our_server_handshake, {failed, first}}, {aioquic, our_server_handshake, ok},
               {quiche, our_client_handshake, {failed, why}},
               {s2n, our_server_early_data, {missing, "nobody has it"}}],
    Lines = binary:split(macula_interop_page:render(?PAGE, Results, ["A 1", "B 2", "C 3"]), <<"\n">>, [global]),
    ?assert(lists:member(<<"| | A 1 | | B 2 | | C 3 | |">>, Lines)),
    ?assert(lists:member(<<"| handshake, version 1, ALPN | yes | not run | not run | **no** | not run |"
                           " not run |">>, Lines)),
    ?assert(lists:member(<<"| 0-RTT | not run | not run | not run | not run | – | not run |"/utf8>>, Lines)),
    ?assert(lists:member(<<"- 0-RTT: nobody has it">>, Lines)),
    ?assertNot(lists:member(<<"old">>, Lines)),
    ?assertEqual([<<"<!-- end -->">>, <<"after">>, <<>>], lists:nthtail(length(Lines) - 3, Lines)).

%% `make interop' has been run since a row came.
all_rows_are_on_the_page_test() ->
    {ok, Page} = file:read_file(filename:join([macula_test_run:root(), "docs", "interop.md"])),
    [?assertMatch({What, {_, _}}, {What, binary:match(Page, iolist_to_binary(["\n| ", What, " | "]))})
     || {What, _, _} <- macula_quic_interop_SUITE:rows()],
    ?assertEqual({failing, nomatch}, {failing, binary:match(Page, <<"**no**">>)}),
    ?assertEqual({unknown, nomatch}, {unknown, binary:match(Page, <<"not run">>)}).
