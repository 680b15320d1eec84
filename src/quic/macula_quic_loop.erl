%% @doc What `macula_quic_connection' and `macula_quic_stream' do with events: one after the other, each
%% with the state that the one before has left.
%%
%% The process's own module is `process' in the state. What it does itself is its `event/3', and what is
%% done where the callback module lacks a callback its `missing/4'.
%% @private
-module(macula_quic_loop).

-export([run/2, event/3, go_on/1, go_on/2, call/3, missing/4, returned/2, code_change/3,
         get_handle/1, get_handle/2]).

-export_type([state/0, result/0, reply/0]).

-type state() :: #{process := module(), callback := module(), callback_state := term(),
                   pending := [term()], waiting := macula_quic_callback:waiting(), atom() => term()}.
%% `pending': events that follow. `waiting': what the last callback said about the time without any.

-type result() :: {noreply, state()} | {noreply, state(), macula_quic_callback:action()}
                | {stop, term(), state()}.
-type reply() :: {reply, term(), state()} | {reply, term(), state(), macula_quic_callback:action()}
               | {stop, term(), term(), state()}.

-callback event(Event :: term(), none | macula_quic_callback:action(), state()) -> result().
-callback missing(Name :: atom(), Args :: [term()], none | macula_quic_callback:action(), state()) ->
    result().

%% @doc The handle that a process serves. However it has ended, it has none.
-spec get_handle(pid()) -> undefined | reference().
get_handle(Pid) ->
    try gen_server:call(Pid, {?MODULE, get_handle}, infinity)
    catch exit:{Why, _} when Why =/= calling_self -> undefined
    end.

%% @doc The same, asked for so long; an answer that comes later is dropped.
-spec get_handle(pid(), timeout()) -> {ok, undefined | reference()} | {error, timeout}.
get_handle(Pid, infinity) ->
    {ok, get_handle(Pid)};
get_handle(Pid, Timeout) when Pid =:= self() ->
    exit({calling_self, {?MODULE, get_handle, [Pid, Timeout]}});
get_handle(Pid, Timeout) ->
    case gen_server:receive_response(gen_server:send_request(Pid, {?MODULE, get_handle}), Timeout) of
        {reply, Handle} -> {ok, Handle};
        {error, _} -> {ok, undefined};
        timeout -> {error, timeout}
    end.

%% @doc Goes on with the next event after a callback that has asked for this action.
-spec run(none | macula_quic_callback:action(), state()) -> result().
run({continue, Continue}, State) ->
    {noreply, State, {continue, {?MODULE, Continue}}};
run(Action, #{pending := []} = State) ->
    go_on(State#{waiting := macula_quic_callback:wait(Action)});
%% To hibernate, or to wait for a while, is for a process that has nothing to do: the last callback's word
%% counts.
run(Action, #{pending := [Event | Events], process := Process} = State) ->
    Process:event(Event, Action, State#{pending := Events}).

%% @doc Calls the callback of an event.
-spec event({atom(), [term()]}, none | macula_quic_callback:action(), state()) -> result().
event({Name, Args}, Action, #{process := Process, callback := Callback, callback_state := CbState} = State) ->
    case macula_quic_callback:has(Callback, Name, length(Args) + 1) of
        true -> returned(macula_quic_callback:call(Callback, Name, Args ++ [CbState]), State);
        false -> Process:missing(Name, Args, Action, State)
    end.

%% @doc After what was not for the callback module: the process goes on waiting.
-spec go_on(state()) -> result().
go_on(#{waiting := Waiting} = State) ->
    case macula_quic_callback:left(Waiting) of
        none -> {noreply, State};
        Action -> {noreply, State, Action}
    end.

%% @doc The same with an answer to a call.
-spec go_on(term(), state()) -> reply().
go_on(Reply, State) ->
    case go_on(State) of
        {noreply, Same} -> {reply, Reply, Same};
        {noreply, Same, Action} -> {reply, Reply, Same, Action}
    end.

%% @doc A call that is for the callback module.
-spec call(term(), gen_server:from(), state()) -> result() | reply().
call(Request, From, #{callback := Callback, callback_state := CbState} = State) ->
    case macula_quic_callback:has(Callback, handle_call, 3) of
        true ->
            case macula_quic_callback:call(Callback, handle_call, [Request, From, CbState]) of
                {ok, {reply, Reply, New, {continue, Continue}}} ->
                    {reply, Reply, State#{callback_state := New}, {continue, {?MODULE, Continue}}};
                {ok, {reply, Reply, New, Action}} ->
                    go_on(Reply, State#{callback_state := New, waiting := macula_quic_callback:wait(Action)});
                {ok, {stop, Reason, Reply, New}} ->
                    {stop, Reason, Reply, State#{callback_state := New}};
                Outcome ->
                    returned(Outcome, State)
            end;
        false ->
            go_on({error, unknown_call}, State)
    end.

%% @doc What happens where a callback of any process is missing.
-spec missing(atom(), [term()], none | macula_quic_callback:action(), state()) -> result().
missing(handle_info, [{'EXIT', _, Reason}], Action, State)
  when Reason =:= normal; Reason =:= shutdown; element(1, Reason) =:= shutdown ->
    run(Action, State);
missing(Name, [Message], Action, #{callback := Callback} = State)
  when Name =:= handle_info; Name =:= handle_cast ->
    macula_quic_callback:log_unexpected(Callback, Message),
    run(Action, State);
missing(handle_continue, [Continue], _Action, #{callback := Callback, callback_state := CbState} = State) ->
    %% Undefined, and said so as everywhere.
    returned(macula_quic_callback:call(Callback, handle_continue, [Continue, CbState]), State);
missing(_Name, _Args, Action, State) ->
    run(Action, State).

%% @doc Does what a callback has returned.
-spec returned({ok, macula_quic_callback:outcome()} | {crash, term()}, state()) -> result().
returned({ok, {noreply, CbState, none}}, #{pending := [], waiting := none} = State) ->
    %% As after most messages.
    {noreply, State#{callback_state := CbState}};
returned({ok, {noreply, CbState, Action}}, State) ->
    run(Action, State#{callback_state := CbState});
returned({ok, {error, Reason, CbState}}, State) ->
    {stop, {shutdown, Reason},
     State#{callback_state := CbState, close => macula_quic_callback:refusal(Reason)}};
returned({ok, {stop, Reason, CbState}}, State) ->
    {stop, Reason, State#{callback_state := CbState}};
returned({ok, Reply}, State) ->
    %% Where nobody has called.
    {stop, {bad_return_value, macula_quic_callback:unread(Reply)}, State};
returned({crash, Reason}, State) ->
    {stop, Reason, State}.

%% @doc Has another version of the callback module make its state of the earlier one's.
-spec code_change(term(), state(), term()) -> {ok, state()} | {error, term()}.
code_change(_OldVsn, #{begun := false} = State, _Extra) ->
    %% A stream that is not there yet has none.
    {ok, State};
code_change(OldVsn, #{callback := Callback, callback_state := CbState} = State, Extra) ->
    case macula_quic_callback:has(Callback, code_change, 3) of
        true ->
            case Callback:code_change(OldVsn, CbState, Extra) of
                {ok, New} -> {ok, State#{callback_state := New}};
                {error, _} = Error -> Error
            end;
        false ->
            {ok, State}
    end.
