%% A callback module for tests of the behaviours: it tells its test of each call, and returns what the
%% test wants. Made anew under another name, with the callbacks that a test names and no others.
-module(macula_quic_script).

-export([module/1, in_file/2, called/3]).

%% @doc A module that exports the callbacks of the list, loaded. Each call is a message
%% `{Callback, Pid, Args}' to the process in the state, or in the options, of which `tell' is the key; the
%% options' `script' says by a fun what is returned: `fun(Callback, Args, State)', with a default for
%% `default'.
-spec module([{atom(), arity()}]) -> module().
module(Callbacks) ->
    Name = name("", Callbacks),
    case code:is_loaded(Name) of
        false ->
            {module, Name} = code:load_binary(Name, atom_to_list(Name), compiled(Name, Callbacks)),
            Name;
        _ ->
            Name
    end.

%% @doc Such a module of its own, not loaded, in a file of this directory, which is a code path from then on.
-spec in_file([{atom(), arity()}], file:filename()) -> module().
in_file(Callbacks, Dir) ->
    Name = name("file_", Callbacks),
    ok = file:write_file(filename:join(Dir, atom_to_list(Name) ++ ".beam"), compiled(Name, Callbacks)),
    true = code:add_patha(Dir),
    Name.

name(Kind, Callbacks) ->
    list_to_atom("macula_quic_script_" ++ Kind ++ integer_to_list(erlang:phash2(lists:sort(Callbacks)))).

compiled(Name, Callbacks) ->
    Forms = [{attribute, 1, module, Name}, {attribute, 1, export, Callbacks}
             | [function(F, A) || {F, A} <- Callbacks]],
    {ok, Name, Code} = compile:forms(Forms, []),
    Code.

%% F(A1, ..., An) -> macula_quic_script:called(F, [A1, ..., An-1], An).
function(F, Arity) ->
    Vars = [{var, 1, list_to_atom("A" ++ integer_to_list(N))} || N <- lists:seq(1, Arity)],
    Args = lists:foldr(fun(Var, Tail) -> {cons, 1, Var, Tail} end, {nil, 1}, lists:droplast(Vars)),
    Call = {call, 1, {remote, 1, {atom, 1, ?MODULE}, {atom, 1, called}},
            [{atom, 1, F}, Args, lists:last(Vars)]},
    {function, 1, F, Arity, [{clause, 1, Vars, [], [Call]}]}.

%% @doc What all callbacks of such a module call.
-spec called(atom(), [term()], term()) -> term().
%% The first four make the state; of some callbacks the state, or the options, are not the last argument.
called(init, [], #{stream_opts := #{tell := _} = Opts} = Args) when not is_map_key(tell, Args) ->
    answer(init, [Args], Opts);
called(init, [], Args) ->
    answer(init, [Args], Args);
called(init_handoff, [_, Opts | _] = Args, Props) ->
    answer(init_handoff, Args ++ [Props], Opts);
called(new_stream, [Stream, #{tell := _} = Props], Conn) ->
    answer(new_stream, [Stream, Props, Conn], Props);
called(code_change, [OldVsn, State], Extra) ->
    answer(code_change, [OldVsn, Extra], State);
called(Callback, Args, State) ->
    answer(Callback, Args, State).

answer(Callback, Args, #{tell := Pid, script := Script} = State) ->
    Pid ! {Callback, self(), Args},
    case Script(Callback, Args, State) of
        default -> default(Callback, State);
        Return -> Return
    end.

default(handle_call, State) -> {reply, State, State};
default(terminate, _State) -> ok;
default(_Callback, State) -> {ok, State}.
