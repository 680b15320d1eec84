%% Wrong terms for every argument of every function: an error that is documented, never a crash of
%% the VM, never an exception, and nothing left behind.
-module(prop_macula_quic).

-include("../support/macula_proper.hrl").

-export([prop_every_call_answers_any_terms/0, prop_options_are_taken_or_refused/0,
         prop_every_option_takes_its_values_and_no_others/0]).

%% All that is exported, but for what waits for ever when it is asked to.
calls() ->
    [{F, A} || {F, A} <- macula_quic:module_info(exports), F =/= module_info].

prop_every_call_answers_any_terms() ->
    %% What other properties of this VM keep is theirs.
    ?SETUP(fun() ->
        Before = macula_quic_lab:objects(),
        fun() -> macula_quic_lab:await_objects(Before) end
    end,
    ?FORALL({F, Args}, ?LET({F, A}, elements(calls()), {exactly(F), vector(A, argument())}),
        begin
            %% In a process of its own, whose handles and messages go with it. What waits is ended.
            Self = self(),
            {Pid, Monitor} = spawn_monitor(fun() ->
                Answer = call(Self, F, Args),
                %% As text: an error may name a handle, which would live on in this test.
                exit({answer, is_documented(F, Answer), io_lib:format("~0p", [Answer])})
            end),
            receive
                {Pid, begun} -> ok;
                {'DOWN', Monitor, process, Pid, Why} -> error({no_pair, Why})
            end,
            {Documented, Text} = receive
                {'DOWN', Monitor, process, Pid, {answer, Is, Shown}} -> {Is, Shown};
                {'DOWN', Monitor, process, Pid, Other} -> {false, io_lib:format("~0p", [Other])}
            after 100 ->
                exit(Pid, kill),
                receive {'DOWN', Monitor, process, Pid, _} -> {true, "waited"} end
            end,
            ?WHENFAIL(io:format("macula_quic:~p(~0p) -> ~s~n", [F, Args, Text]), Documented)
        end)).

call(Test, F, Args) ->
    #{listener := L, client := C, server := S} = Pair = macula_quic_lab:pair(),
    {Here, There} = macula_quic_lab:stream(Pair),
    Handles = {L, C, S, Here, There},
    %% Held as long as the process lives.
    _ = put(handles, Handles),
    Test ! {self(), begun},
    try apply(macula_quic, F, [materialise(Arg, Handles) || Arg <- Args])
    catch Class:Why:Stack -> {raised, Class, Why, Stack}
    end.

is_documented(_, ok) -> true;
is_documented(_, {ok, _}) -> true;
is_documented(format_error, Text) -> io_lib:char_list(Text);
is_documented(counters, [#{name := _, help := _} | _]) -> true;
is_documented(_, {error, Why}) when is_atom(Why) -> true;
is_documented(_, {error, {Tag, _}}) when is_atom(Tag) -> true;
is_documented(_, {error, {Tag, _, _}}) when is_atom(Tag) -> true;
is_documented(_, _) -> false.

materialise({'$handle', N}, Handles) -> element(N, Handles);
materialise('$self', _) -> self();
materialise('$ref', _) -> make_ref();
materialise('$fun', _) -> fun() -> ok end;
materialise(Other, _) -> Other.

argument() ->
    frequency([
        {6, ?LET(N, range(1, 5), {'$handle', N})},
        {2, elements(['$self', '$ref', '$fun'])},
        {3, odd_term()},
        {2, plausible()},
        {2, options()}]).

odd_term() ->
    oneof([integer(), largeint(), atom(), binary(), bitstring(), float(), list(integer()), string(),
           tuple([integer(), atom()]), [], {}, exactly(#{}), [a | b], [[[1 | 2]]], <<1:3>>,
           1 bsl 64, -(1 bsl 64), 1 bsl 62, (1 bsl 62) - 1, 65535, 65536, undefined, infinity,
           [binary(), [byte()]], exactly([256]), exactly(lists:duplicate(300, $a))]).

plausible() ->
    oneof([0, 1, 5, 50, "127.0.0.1", <<"::1">>, {127, 0, 0, 1}, {"127.0.0.1", 0},
           active, priority, datagrams, true, false, once, <<"data">>, ["io", <<"data">>],
           [rtt, cwnd], graceful, abort, [abort_send, immediate], 32767, "localhost"]).

options() ->
    ?LET(Pairs, list(option()), oneof([Pairs, maps:from_list([P || {_, _} = P <- Pairs])])).

option() ->
    Keys = lists:usort([element(2, Row) || Role <- macula_quic_option_table:roles(),
                                           Row <- macula_quic_option_table:rows(Role)])
           %% Would make files.
           -- [sslkeylogfile],
    %% No listener is opened by chance that waits for the keys in files: those names are odd.
    ?LET(K, elements(Keys), {K, oneof([odd_term(), plausible()])}).

prop_options_are_taken_or_refused() ->
    ?FORALL({Role, Options},
            {elements(macula_quic_option_table:roles()), oneof([options(), odd_term(), list(odd_term())])},
        begin
            Result = parse(Role, Options),
            ?WHENFAIL(io:format("~p ~0p -> ~p~n", [Role, Options, Result]), case Result of
                {ok, Map} when is_map(Map) -> true;
                {error, {bad_option, _, Why}} -> is_atom(Why) orelse is_tuple(Why);
                {error, {unsupported_option, _}} -> true;
                {error, {Bad, _, _}} -> lists:member(Bad, [bad_certfile, bad_keyfile,
                                                           bad_cacertfile]);
                _ -> false
            end)
        end).

parse(listen, Options) -> macula_quic_options:listen(Options);
parse(reload, Options) -> macula_quic_options:reload(Options);
parse(connect, Options) -> macula_quic_options:connect(Options);
parse(Role, Options) -> macula_quic_options:stream(Role, Options).

%% Each key of each call with a value of its type, and with one that is none.
prop_every_option_takes_its_values_and_no_others() ->
    Rows = [{Role, Row} || Role <- macula_quic_option_table:roles(),
                           Row <- macula_quic_option_table:rows(Role),
                           not lists:member(type(Row), [credentials, any])],
    ?FORALL({{Role, Row}, Value},
            ?LET({Role, Row}, elements(Rows),
                 {exactly({Role, Row}), oneof([value(type(Row)), odd_term(), plausible()])}),
        begin
            Key = element(2, Row),
            Result = parse(Role, base(Role) ++ [{Key, Value}]),
            ?WHENFAIL(io:format("~p ~0p -> ~0p~n", [Role, {Key, Value}, Result]),
                      is_as_the_table_says(Row, Value, Result))
        end).

type({option, _, Type, _, _}) -> Type;
type({same, _, _, Type, _}) -> Type;
type({unsupported, _, Type, _, _, _}) -> Type.

%% With room for every value that is right for itself.
base(listen) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    [{cert, Cert}, {key, Key}, {cacerts, Cert} | base(connect)];
base(connect) ->
    [{maximum_mtu, 65527}, {high_watermark, 1 bsl 40}, {low_watermark, 0}];
base(_) ->
    [].

is_as_the_table_says({unsupported, Key, Type, NoOp, _, _}, Value, Result) ->
    case {is(NoOp, Value), is(Type, Value), Result} of
        {true, _, {ok, _}} -> true;
        {false, true, {error, {unsupported_option, Key}}} -> true;
        {false, false, {error, {bad_option, Key, {wanted, Type}}}} -> true;
        _ -> false
    end;
is_as_the_table_says(Row, Value, Result) ->
    {Key, Type} = {element(2, Row), type(Row)},
    case {is(Type, Value), Result} of
        {true, {ok, _}} -> true;
        %% Of the type, and not to be had.
        {true, {error, {unsupported_option, Key}}} ->
            element(1, Row) =:= same orelse Type =:= start_flag;
        %% Right for itself, but not beside others.
        {true, {error, {bad_option, _, {Why, _}}}} ->
            lists:member(Why, [needs, excludes, must_be_below, must_not_be_below]);
        {false, {error, {bad_option, Key, {wanted, Type}}}} -> true;
        _ -> false
    end.

%% What belongs to a type, said once more, and in another way.
is({integer, Min, Max}, V) -> is_integer(V) andalso Min =< V andalso V =< Max;
is({one_of, Vs}, V) -> lists:any(fun(Each) -> Each =:= V end, Vs);
is({translated, Pairs, Type}, V) -> lists:any(fun({Each, _}) -> Each =:= V end, Pairs) orelse is(Type, V);
is({at_most, _, Type}, V) -> is(Type, V);
is({nonzero, Type}, V) -> V =:= 0 orelse is(Type, V);
is({counted, Max}, V) -> V =:= infinity orelse is({integer, 1, Max}, V);
is(binary, V) -> is_binary(V);
is(boolean, V) -> is_boolean(V);
is(switch, V) -> lists:any(fun(Each) -> Each =:= V end, [true, false, 0, 1]);
is(timeout, V) -> V =:= infinity orelse is({integer, 0, (1 bsl 32) - 1}, V);
is(period, V) -> V =:= infinity orelse is({integer, 0, (1 bsl 64) - 1}, V);
is(count, V) -> V =:= infinity orelse is({integer, 1, (1 bsl 62) - 1}, V);
is(active, V) -> is_boolean(V) orelse V =:= once orelse is({integer, -32768, 32767}, V);
is(mode, V) -> is_boolean(V) orelse V =:= once orelse is({integer, 1, 32767}, V);
is(file_name, V) -> V =:= undefined orelse is_name(V);
is(start_flag, V) -> is({integer, 0, 15}, V);
is(verify, V) -> lists:member(V, [verify_peer, verify_none, peer, none, webpki]);
is(pubkey, V) -> V =:= undefined orelse is_binary(V) andalso lists:member(byte_size(V), [0, 32]);
is(reset_key, V) -> is_binary(V) andalso byte_size(V) >= 32;
is(secrets, V) when is_binary(V) -> is(secrets, [V]);
is(secrets, V) ->
    is_list(V) andalso lists:member(length_of(V), lists:seq(0, 16))
        andalso lists:all(fun(Key) -> is(reset_key, Key) end, V);
is(password, Fun) when is_function(Fun, 0) -> Fun() =/= Fun andalso is(password, Fun());
is(password, undefined) -> true;
is(password, V) -> is_text(fun erlang:iolist_to_binary/1, V);
%% Which names there are has a test of its own.
is(server_name, V) -> macula_quic_option_value:check(server_name, V) =/= error;
is(verify_fun, undefined) -> true;
is(verify_fun, {Fun, _}) -> is_function(Fun, 3) orelse is_function(Fun, 4);
%% Which names and entries there are has a test of its own.
is(sni_hosts, V) -> macula_quic_option_value:check(sni_hosts, V) =/= error;
%% Which addresses there are has a test of its own.
is(local_address, V) -> macula_quic_option_value:check(local_address, V) =/= error;
is(alpn, [_ | _] = V) ->
    Names = case is_integer(hd(V)) of true -> [V]; false -> V end,
    is_list(Names) andalso length_of(Names) =< 255 andalso lists:all(fun is_protocol/1, Names);
is(alpn, V) when is_atom(V) -> V =/= undefined andalso is_protocol(V);
is(alpn, V) -> is_binary(V) andalso is_protocol(V);
is(_, _) -> false.

is_protocol(V) when is_atom(V) -> is_protocol(atom_to_list(V));
is_protocol(V) ->
    is_text(fun erlang:iolist_to_binary/1, V)
        andalso lists:member(iolist_size(V), lists:seq(1, 255)).

is_name(V) ->
    is_text(fun unicode:characters_to_binary/1, V)
        andalso unicode:characters_to_list(V) =/= ""
        andalso not lists:member(0, unicode:characters_to_list(V)).

is_text(Convert, V) ->
    (is_binary(V) orelse is_list(V)) andalso
        try is_binary(Convert(V)) catch error:_ -> false end.

length_of(List) ->
    try length(List) catch error:badarg -> infinity end.

value({integer, Min, Max}) -> oneof([Min, Max, Min - 1, Max + 1, integer(Min, Max)]);
value({one_of, []}) -> odd_term();
value({one_of, Values}) -> elements(Values);
value({translated, Pairs, Type}) -> oneof([elements([V || {V, _} <- Pairs]), value(Type)]);
value({at_most, _, Type}) -> value(Type);
value({nonzero, Type}) -> oneof([0, value(Type)]);
value({counted, Max}) -> oneof([infinity, 0, 1, Max, Max + 1]);
value(binary) -> binary();
value(boolean) -> boolean();
value(switch) -> elements([true, false, 0, 1, 2]);
value(timeout) -> oneof([infinity, integer(0, (1 bsl 32) - 1), 1 bsl 32]);
value(period) -> oneof([infinity, 0, integer(1, (1 bsl 64) - 1), 1 bsl 64]);
value(count) -> oneof([infinity, integer(0, (1 bsl 62) - 1), 1 bsl 62]);
value(active) -> oneof([true, false, once, integer(-32769, 32768)]);
value(mode) -> oneof([true, false, once, integer(-1, 32768)]);
value(file_name) -> oneof(["/dev/null", <<"/dev/null">>, string(), binary(), undefined]);
value(start_flag) -> integer(0, 16);
value(verify) -> elements([verify_peer, verify_none, peer, none, webpki, undefined]);
value(pubkey) -> oneof([binary(32), binary(31), undefined, <<>>]);
value(reset_key) -> oneof([binary(32), binary(31), binary(64)]);
value(secrets) -> oneof([binary(32), binary(31), list(binary(32)), [<<0:256>>, <<1:248>>], [<<0:256>> | x]]);
value(password) -> oneof([string(), binary(), function0(binary()), function0(atom()), ["a", <<"b">>]]);
value(server_name) -> oneof([string(), binary(), "host", "127.0.0.1", "two words", lists:duplicate(256, $a)]);
value(local_address) -> elements(["127.0.0.1", "::1", "127.0.0.1:80", "[::1]:80", {"::", 0}, {1, 2}]);
value(verify_fun) ->
    elements([undefined, {fun(_, _, S) -> {valid, S} end, x}, {fun(_, _, _, S) -> {valid, S} end, x},
              fun(_, _, S) -> {valid, S} end, {fun() -> ok end, x}]);
value(sni_hosts) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    elements([#{}, [], #{"a.example" => #{cert => Cert, key => Key}}, [{"*.b", [{cert, Cert}, {key, Key}]}],
              #{"a b" => #{}}, #{a => #{}}, [{"a", 1}], [x]]);
value(alpn) -> oneof([["a"], [<<"b">>, h3], "c", <<"d">>, [], [""], [lists:duplicate(256, $x)]]).
