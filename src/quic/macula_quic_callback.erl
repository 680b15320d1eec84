%% @doc What `macula_quic_connection' and `macula_quic_stream' share: callback modules, what their
%% callbacks return, and what a peer is told when a process ends.
%% @private
-module(macula_quic_callback).

-export([start/1, good/1, refuse/1, check/2, has/3, exports/3, begin_with/3, call/3, is_action/1, unread/1,
         wait/1, left/1, close_code/1, refusal/1, options/1, hide/1,
         log_unexpected/2]).

-export_type([action/0, cb_ret/0, outcome/0, waiting/0]).

-type action() :: hibernate | timeout() | {continue, term()}.
-type cb_ret() ::
    {ok, term()} | {ok, term(), action()}
    | {noreply, term()} | {noreply, term(), action()}
    | {action(), term()}
    | {reply, term(), term()} | {reply, term(), term(), action()}
    | {error, term(), term()}
    | {stop, term(), term()} | {stop, term(), term(), term()}.
-type outcome() ::
    {noreply, term(), none | action()}
    | {reply, term(), term(), none | action()}
    | {error, term(), term()}
    | {stop, term(), term()} | {stop, term(), term(), term()}.

-type waiting() :: none | hibernate | {until, integer()}.
%% What a process does while nothing comes.

%% No process waits for longer than this number of milliseconds.
-define(is_action(A), (A =:= hibernate orelse A =:= infinity
                       orelse (is_integer(A) andalso A >= 0 andalso A =< 16#ffffffff)
                       orelse (tuple_size(A) =:= 2 andalso element(1, A) =:= continue))).
-define(is_code(Code), (is_integer(Code) andalso Code >= 0 andalso Code =< 16#3fffffffffffffff)).

%% @doc What `init/1' of a process does. Whatever is wrong with what was given is the reason of the start's
%% failure.
-spec start(fun(() -> Result)) -> Result | {stop, {shutdown, Reason :: term()}}.
start(Fun) ->
    try Fun()
    catch throw:{?MODULE, Reason} -> {stop, {shutdown, Reason}}
    end.

%% @doc The value of what is right, within {@link start/1}.
-spec good(ok | {ok, Value} | {error, term()}) -> ok | Value.
good(ok) -> ok;
good({ok, Value}) -> Value;
good({error, Reason}) -> refuse(Reason).

%% @doc Ends the start for this reason, within {@link start/1}: throws `{macula_quic_callback, Reason}'.
-spec refuse(term()) -> no_return().
refuse(Reason) -> throw({?MODULE, Reason}).

%% @doc Whether a module is there, with the callbacks that must be.
-spec check(module(), [{atom(), arity()}]) -> ok | {error, term()}.
check(Module, Needed) when is_atom(Module), Module =/= undefined ->
    case code:ensure_loaded(Module) of
        {module, Module} ->
            case [FA || {F, A} = FA <- Needed, not has(Module, F, A)] of
                [] -> ok;
                Missing -> {error, {bad_callback, Module, {missing, Missing}}}
            end;
        {error, Why} ->
            {error, {bad_callback, Module, Why}}
    end;
check(Module, _Needed) ->
    {error, {bad_callback, Module, not_a_module}}.

%% @doc Whether a callback is to be called. That of a module that cannot be loaded is: the call says what is wrong.
-spec has(module(), atom(), arity()) -> boolean().
has(Module, Function, Arity) ->
    exports(Module, Function, Arity) =/= false.

%% @doc Whether a module exports a function. A module that is not loaded, as between the steps of an upgrade, is
%% loaded here, as a call would load it.
-spec exports(module(), atom(), arity()) -> boolean() | {error, term()}.
exports(Module, Function, Arity) ->
    erlang:function_exported(Module, Function, Arity) orelse case code:ensure_loaded(Module) of
        {module, Module} -> erlang:function_exported(Module, Function, Arity);
        {error, _} = Error -> Error
    end.

%% @doc Calls a callback that begins a process. What it throws counts as returned, as with all callbacks; otherwise
%% `gen_server' would take it for what `init/1' of the process itself returns.
-spec begin_with(module(), atom(), [term()]) -> term().
begin_with(Module, Function, Args) ->
    try apply(Module, Function, Args)
    catch throw:Returned -> Returned
    end.

%% @doc Calls a callback. A crash is an outcome like others: so the process ends with the state that it has
%% by then, which `gen_server' would not know.
-spec call(module(), atom(), [term()]) -> {ok, outcome()} | {crash, term()}.
call(Module, Function, Args) ->
    try apply(Module, Function, Args) of
        Returned -> said(Returned)
    catch
        throw:Returned -> said(Returned);
        error:Reason:Stack -> {crash, {Reason, Stack}};
        exit:Reason -> {crash, Reason}
    end.

said(Returned) ->
    case read(Returned) of
        bad_return -> {crash, {bad_return_value, Returned}};
        Outcome -> {ok, Outcome}
    end.

%% @doc What an action means for the time in which nothing comes.
-spec wait(none | action()) -> waiting().
wait(hibernate) -> hibernate;
wait(Ms) when is_integer(Ms) -> {until, erlang:monotonic_time(millisecond) + Ms};
wait(_) -> none.

%% @doc The same as an action for now.
-spec left(waiting()) -> none | hibernate | non_neg_integer().
left({until, Time}) -> max(0, Time - erlang:monotonic_time(millisecond));
left(Waiting) -> Waiting.

%% What a callback's return value says.
-spec read(term()) -> outcome() | bad_return.
read({ok, S}) -> {noreply, S, none};
read({noreply, S}) -> {noreply, S, none};
read({ok, S, Action}) when ?is_action(Action) -> {noreply, S, Action};
read({noreply, S, Action}) when ?is_action(Action) -> {noreply, S, Action};
read({reply, Reply, S}) -> {reply, Reply, S, none};
read({reply, Reply, S, Action}) when ?is_action(Action) -> {reply, Reply, S, Action};
read({error, Reason, S}) -> {error, Reason, S};
read({stop, Reason, S}) -> {stop, Reason, S};
read({stop, Reason, Reply, S}) -> {stop, Reason, Reply, S};
read({Action, S}) when ?is_action(Action) -> {noreply, S, Action};
read(_) -> bad_return.

%% @doc Whether a process can do this.
-spec is_action(term()) -> boolean().
is_action(Action) when ?is_action(Action) -> true;
is_action(_) -> false.

%% @doc The return value of a callback that said so.
-spec unread(outcome()) -> term().
unread({reply, Reply, S, none}) -> {reply, Reply, S};
unread(Outcome) -> Outcome.

%% @doc The code, and the text, that the peer sees when a process ends for this reason. What goes
%% wrong inside is nobody's business outside.
-spec close_code(term()) -> {non_neg_integer(), iodata()}.
close_code(normal) -> {0, <<>>};
close_code(shutdown) -> {0, <<>>};
close_code({shutdown, Reason}) -> explicit(Reason, {0, <<>>});
close_code(_) -> {1, <<"internal error">>}.

%% @doc The same for a callback that says `{error, Reason, State}'.
-spec refusal(term()) -> {non_neg_integer(), iodata()}.
refusal(Reason) when is_atom(Reason) -> {1, atom_to_binary(Reason)};
refusal(Reason) -> explicit(Reason, {1, <<"refused">>}).

explicit({Code, Text} = Explicit, Default) when ?is_code(Code) ->
    try iolist_size(Text) of
        _ -> Explicit
    catch
        error:badarg -> Default
    end;
explicit(Code, _Default) when ?is_code(Code) -> {Code, <<>>};
explicit(_Reason, Default) -> Default.

%% @doc Options as a map.
-spec options(term()) -> {ok, map()} | {error, {bad_option, options, not_a_list}}.
options(Options) when is_map(Options) -> {ok, Options};
options(Options) ->
    try {ok, maps:from_list(proplists:unfold(Options))}
    catch error:_ -> {error, {bad_option, options, not_a_list}}
    end.

%% @doc Options, without what must not be seen.
-spec hide(map()) -> map().
hide(Options) ->
    maps:without([key, password, stateless_reset_key, resumption_keys, sni_hosts], Options).

%% @doc A message that nobody takes is not dropped in silence.
-spec log_unexpected(module(), term()) -> ok.
log_unexpected(Module, Message) ->
    logger:warning(#{what => quic_unexpected_message, callback => Module, message => Message},
                   #{macula => quic, report_cb => fun unexpected/1}).

unexpected(#{callback := Module, message := Message}) ->
    {"macula: a process of ~0tp, which has no callback for that, got ~0tP", [Module, Message, 9]}.
