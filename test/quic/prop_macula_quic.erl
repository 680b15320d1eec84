%% Wrong terms for every argument of every function: an error that is documented, never a crash of
%% the VM, never an exception, and nothing left behind.
-module(prop_macula_quic).

-include("../support/macula_proper.hrl").

-export([prop_every_call_answers_any_terms/0, prop_options_are_taken_or_refused/0]).

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
    Keys = lists:usort([K || Role <- [listen, connect, open_stream, accept_stream, arm, send,
                                      handoff],
                             {K, _} <- macula_quic_options:keys(Role)])
           ++ [sni, idle_timeout, ciphers, versions],
    %% No listener is opened by chance that waits for the keys in files: those names are odd.
    ?LET(K, elements(Keys), {K, oneof([odd_term(), plausible()])}).

prop_options_are_taken_or_refused() ->
    ?FORALL({Role, Options},
            {elements([listen, connect, open_stream, accept_stream, arm_stream, arm, send,
                       handoff]), oneof([options(), odd_term(), list(odd_term())])},
        begin
            Result = case Role of
                listen -> macula_quic_options:listen(Options);
                connect -> macula_quic_options:connect(Options);
                _ -> macula_quic_options:stream(Role, Options)
            end,
            ?WHENFAIL(io:format("~p ~0p -> ~p~n", [Role, Options, Result]), case Result of
                {ok, Map} when is_map(Map) -> true;
                {error, {bad_option, _, _}} -> true;
                {error, {unsupported_option, _}} -> true;
                {error, {Bad, _, _}} -> lists:member(Bad, [bad_certfile, bad_keyfile,
                                                           bad_cacertfile]);
                _ -> false
            end)
        end).
