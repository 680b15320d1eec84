%% What users read about the code is complete: what EDoc makes of the modules, and the pages that
%% promise to name everything of a kind.
-module(macula_edoc_tests).

-include_lib("eunit/include/eunit.hrl").
-include_lib("xmerl/include/xmerl.hrl").

%% EDoc takes the comment behind a type for its description, and drops one that stands before it.
type_comments_stand_behind_their_types_test() ->
    Misplaced = [{filename:basename(File), Line} || File <- sources(), Line <- misplaced(lines(File))],
    ?assertEqual([], Misplaced).

the_check_for_type_comments_finds_one_test() ->
    ?assertEqual([4], misplaced([<<"-module(a).">>, <<>>, <<"%% What it is.">>, <<"-type a() :: b.">>])),
    ?assertEqual([3], misplaced([<<"-export([a/0]).">>, <<"%% Two">>, <<"-opaque a() :: #{}.">>])),
    %% Behind a type it is that one's.
    ?assertEqual([], misplaced([<<"-type a() ::">>, <<"    b.">>, <<"%% What it is.">>, <<"-type c() :: d.">>])).

every_public_function_is_described_test_() ->
    [{atom_to_list(Module), fun() ->
        ?assertEqual([], [{Name, Arity} || {Name, Arity, Text} <- functions(Xml), Text =:= ""])
     end} || {Module, Xml} <- public()].

%% A constructor for each type, and a word about each.
every_frame_is_described_test() ->
    Described = [Name || {Name, 1, Text} <- functions(xml(macula_frame)), Text =/= ""],
    ?assertEqual([], macula_frame:types() -- Described).

every_option_of_peering_is_described_test() ->
    Text = type_text(opts, macula_peering),
    Keys = lists:usort(lists:append([macula_peering_opts:keys(Role) || Role <- [connect, accept, listen]])),
    ?assert(length(Keys) > 30),
    ?assertEqual([], [Key || Key <- Keys, not names(Key, Text)]),
    Target = type_text(target, macula_peering),
    ?assertEqual([], [Key || Key <- [host, port, node_id, tls, timeout_ms, server_name, cacertfile,
                                     local_address, alpn], not names(Key, Target)]).

every_reason_of_a_disconnection_is_described_test() ->
    Text = type_text(disconnect_reason, macula_peering),
    Reasons = lists:usort(lists:append([reasons(Form) || Module <- [macula_peering_conn, macula_peering_attempt],
                                                   Form <- forms(Module)])) -- [normal],
    ?assert(length(Reasons) > 15),
    ?assertEqual([], [Reason || Reason <- Reasons, not names(Reason, Text)]).

other_types_are_described_test_() ->
    [?_assertNotEqual("", type_text(Type, Module))
     || {Module, Types} <- [{macula_peering, [reconnect, claim]},
                            {macula_frame, [field_error, encode_opts, verdict]},
                            {macula_identity, [error_reason]}], Type <- Types].

%% docs/reference/messages.md has every message that peering sends, and none that it does not send.
every_message_of_peering_is_on_its_page_test() ->
    {ok, Page} = file:read_file(filename:join([root(), "docs", "reference", "messages.md"])),
    {match, Found} = re:run(Page, "`\\{macula_peering, ([a-z_]+),", [global, {capture, all_but_first, list}]),
    Documented = lists:usort([list_to_atom(Name) || [Name] <- Found]),
    Modules = [list_to_atom(filename:basename(File, ".erl"))
               || File <- filelib:wildcard(filename:join([root(), "src", "peering", "*.erl"]))],
    Sent = lists:usort(lists:append([messages(Form) || Module <- Modules, Form <- forms(Module)])),
    ?assert(length(Sent) >= 9),
    ?assertEqual(Sent, Documented).

%%% Sources

root() ->
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    filename:dirname(filename:dirname(filename:dirname(Source))).

sources() ->
    [_ | _] = filelib:wildcard(filename:join([root(), "src", "**", "*.erl"])).

lines(File) ->
    {ok, Text} = file:read_file(File),
    binary:split(Text, <<"\n">>, [global]).

%% The numbers of the lines that begin a type right behind a comment that belongs to no type.
misplaced(Lines) ->
    misplaced(lists:zip(lists:seq(1, length(Lines)), Lines), other).

%% What the line before was: `type', within one or at its end, or a comment behind one; a `comment'
%% behind something else; or `other'.
misplaced([], _) ->
    [];
misplaced([{N, Line} | Rest], Before) ->
    case {kind(Line), Before} of
        {type, comment} -> [N | misplaced(Rest, type)];
        {type, _} -> misplaced(Rest, type);
        {comment, Was} when Was =:= type; Was =:= comment -> misplaced(Rest, Was);
        {comment, other} -> misplaced(Rest, comment);
        {inner, type} -> misplaced(Rest, type);
        _ -> misplaced(Rest, other)
    end.

kind(<<"-type ", _/binary>>) -> type;
kind(<<"-opaque ", _/binary>>) -> type;
kind(<<"%%", _/binary>>) -> comment;
kind(<<" ", _/binary>>) -> inner;
kind(<<"}", _/binary>>) -> inner;
kind(_) -> other.

forms(Module) ->
    {ok, {Module, [{abstract_code, {raw_abstract_v1, Forms}}]}} =
        beam_lib:chunks(code:which(Module), [abstract_code]),
    Forms.

reasons({call, _, {atom, _, Name}, [Reason | Rest]} = Call)
  when Name =:= stop; Name =:= note; Name =:= failed; Name =:= last_word ->
    tag(Reason) ++ reasons([Reason | Rest]) ++ reasons(element(1, Call));
reasons(Tuple) when is_tuple(Tuple) -> reasons(tuple_to_list(Tuple));
reasons([First | Rest]) -> reasons(First) ++ reasons(Rest);
reasons(_) -> [].

tag({atom, _, Reason}) -> [Reason];
tag({tuple, _, [{atom, _, Tag} | _]}) -> [Tag];
tag(_) -> [].

%% As it is written down, or told by the worker.
messages({tuple, _, [{atom, _, macula_peering}, {atom, _, What}, _, _ | Rest]}) -> [What | messages(Rest)];
messages({call, _, {atom, _, tell}, [_, {atom, _, What}, _]}) -> [What];
messages(Tuple) when is_tuple(Tuple) -> messages(tuple_to_list(Tuple));
messages([First | Rest]) -> messages(First) ++ messages(Rest);
messages(_) -> [].

%%% What EDoc makes of them

public() ->
    All = [edoc:get_doc(File, [{preprocess, true}]) || File <- sources()],
    [Documented || {_, #xmlElement{attributes = Attributes}} = Documented <- All,
                   [] =:= [yes || #xmlAttribute{name = private, value = "yes"} <- Attributes]].

xml(Module) ->
    [File] = [File || File <- sources(), filename:basename(File, ".erl") =:= atom_to_list(Module)],
    {Module, Xml} = edoc:get_doc(File, [{preprocess, true}]),
    Xml.

functions(Xml) ->
    [{list_to_atom(attribute(name, Function)), list_to_integer(attribute(arity, Function)),
      text(xmerl_xpath:string("description/fullDescription|description/briefDescription|equiv", Function))}
     || Function <- xmerl_xpath:string("/module/functions/function[@exported='yes']", Xml),
        attribute(private, Function) =/= "yes", attribute(hidden, Function) =/= "yes"].

type_text(Type, Module) ->
    [Declared] = [Decl || Decl <- xmerl_xpath:string("/module/typedecls/typedecl", xml(Module)),
                          Name <- xmerl_xpath:string("typedef/erlangName/@name", Decl),
                          Name#xmlAttribute.value =:= atom_to_list(Type)],
    text(xmerl_xpath:string("description/fullDescription", Declared)).

text(Nodes) ->
    string:trim(lists:flatten([words(Node) || Node <- Nodes])).

words(#xmlText{value = Value}) -> Value;
words(#xmlElement{content = Content}) -> [words(Node) || Node <- Content];
words(_) -> "".

attribute(Name, #xmlElement{attributes = Attributes}) ->
    proplists:get_value(Name, [{N, V} || #xmlAttribute{name = N, value = V} <- Attributes], "").

names(Atom, Text) ->
    re:run(Text, "\\b" ++ atom_to_list(Atom) ++ "\\b", [{capture, none}]) =:= match.
