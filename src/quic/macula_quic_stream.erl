%% @doc A behaviour for one process per stream, beside {@link macula_quic_connection}.
%%
%% The process owns the stream: what happens to that becomes a call of the callback module. It comes by
%% its stream in one of three ways:
%% <ul>
%% <li>It opens one: {@link start_link/3} with `is_local => true' in the options.</li>
%% <li>It takes the next one that the peer opens: {@link start_link/3} without that.</li>
%% <li>It is given one by the process that owns it: {@link start_link/5}. With `stream_callback' in its
%% options a process of `macula_quic_connection' does that for all streams of the peer.</li>
%% </ul>
%%
%% ```
%% -module(echo_stream).
%% -behaviour(macula_quic_stream).
%% -export([init_handoff/4, handle_stream_data/4, peer_send_shutdown/3]).
%%
%% init_handoff(_Stream, _StreamOpts, _Conn, _Props) -> {ok, undefined}.
%%
%% handle_stream_data(Stream, Data, _Flags, State) ->
%%     ok = macula_quic:send(Stream, Data),
%%     {ok, State}.
%%
%% peer_send_shutdown(Stream, undefined, State) ->
%%     ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
%%     {ok, State}.
%% '''
%%
%% == Options ==
%%
%% `StreamOpts' is a map or a list: options of {@link macula_quic:open_stream/2}, or of
%% {@link macula_quic:accept_stream/3} for a stream of the peer's, `is_local', and the user's own. `active'
%% is 16 by default: so many messages are delivered, and so many again once the callbacks are through with
%% them, unless the module has a `passive/3' that decides. A stream is in that mode once the callback that
%% begins it has returned.
%%
%% == Callbacks ==
%%
%% Checked at the start are `init_handoff/4' for a stream that is given, `new_stream/3' for one that is
%% taken, and `handle_stream_data/4', unless the mode is `false' or the stream only sends. Without the
%% others:
%% <ul>
%% <li>`init/1' of a stream that is opened: the state is a map of `conn', `is_owner', `is_local',
%% `is_unidir' and `stream_opts'.</li>
%% <li>`passive/3': as above, if `active' is a number.</li>
%% <li>`stream_closed/3': the process ends, with `normal', or `{shutdown, Reason}' if the connection was
%% lost.</li>
%% <li>`handle_call/3': the answer is `{error, unknown_call}'.</li>
%% <li>`handle_cast/2', `handle_info/2': the message is logged.</li>
%% <li>`handle_continue/2': whoever returns `{continue, _}' must have it.</li>
%% <li>`code_change/3': the state stays as it is.</li>
%% <li>`format_status/1': reports show the state as it is.</li>
%% <li>Any other: nothing happens.</li>
%% </ul>
%%
%% A callback returns what one of `macula_quic_connection' does. `{error, Reason, State}' aborts the stream
%% both ways, with the code that `Reason' names as described there (1 if it names none), and ends the
%% process with `{shutdown, Reason}'. A process that ends with `normal', `shutdown' or `{shutdown, _}'
%% finishes its stream: what was sent is delivered. With any other reason the stream is aborted with code
%% 1, or the one in `{shutdown, {Code, _}}'. The process traps exits.
-module(macula_quic_stream).
-behaviour(gen_server).
-behaviour(macula_quic_loop).

-import(macula_quic_callback, [good/1]).

-export([start/3, start_link/3, start/5, start_link/5, send/2, send/3, get_handle/1]).
-export([start_child/5, start_first/4, send_options/2, claim/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, handle_continue/2, terminate/2,
         code_change/3, format_status/1]).
-export([event/3, missing/4]).

-export_type([cb_ret/0, cb_state/0, state/0, stream_opts/0, stream_props/0, start_props/0,
              recv_data_props/0, stream_closed_props/0]).

-type cb_state() :: term().
%% The callback module's own.
-type cb_ret() :: macula_quic_connection:cb_ret().
%% As everywhere.
-type stream_opts() :: macula_quic_connection:stream_opts().
%% Options of a stream, of this module, and the user's own.
-type stream_props() :: macula_quic_connection:new_stream_props().
%% What `{quic, new_stream, Stream, Info}' carries; for `start_link/5' also `post_info'.
-type start_props() :: #{status := success, stream_id := non_neg_integer(), is_peer_accepted := true}.
%% A stream that is there is one that the peer allows.
-type recv_data_props() :: #{absolute_offset := non_neg_integer(), len := non_neg_integer(),
                             flags := non_neg_integer(), _ => _}.
%% What comes with data.
-type stream_closed_props() :: #{reason := term(), is_conn_shutdown := boolean(), _ => _}.
%% What the stream's last message carries.
-type state() :: #{
    process := module(),
    stream := undefined | macula_quic:stream(),
    conn := macula_quic:connection(),
    callback := module(),
    callback_state := cb_state(),
    is_owner := boolean(),
    is_local := boolean(),
    is_unidir := boolean(),
    stream_opts := map(),
    active := macula_quic:active(),
    settings := [{atom(), term()}],
    pending := [event()],
    waiting := macula_quic_callback:waiting(),
    %% Messages of a stream that is not all here yet.
    early := [tuple()],
    %% There is a callback state.
    begun := boolean(),
    ended := boolean(),
    %% What the peer's word is awaited for, and what is to be asked next.
    asked := none | data | fin,
    ask := none | data | fin,
    send_is_over := boolean(),
    aborted := boolean(),
    first => first(),
    accept => {reference(), none | reference()},
    giver => {reference(), pid()},
    %% The connection's process that has started this one: it is told when the stream's end has been told here.
    parent => pid(),
    close => {non_neg_integer(), iodata()}
}.
%% The process's own: what `sys:get_state/1' shows.
-type first() :: #{from := gen_server:from(), data := iodata(), fin := boolean(),
                   deadline := macula_quic_call:deadline(), claim := atomics:atomics_ref()}.
%% What is sent first, for whom. `claim' is 1 once it is being sent, or was given up.
-type event() :: {atom(), [term()]} | {message, tuple()} | active | over.

-callback init(Args :: map()) ->
    {ok, cb_state()} | {error, Reason :: term(), cb_state()} | {stop, Reason :: term()}.
%% The stream is open. `Args' is a map of `conn', `stream', `is_owner', `is_local', `is_unidir' and
%% `stream_opts'.

-callback init_handoff(macula_quic:stream(), StreamOpts :: map(), macula_quic:connection(),
                       stream_props()) ->
    {ok, cb_state()} | {error, Reason :: term()} | {error, Reason :: term(), cb_state()}
    | {stop, Reason :: term()}.
%% The process is about to be given the stream, which it does not own yet.

-callback post_handoff(macula_quic:stream(), PostInfo :: term(), cb_state()) -> cb_ret().
%% The process owns the stream. `PostInfo' is `post_info' of the properties, or `undefined'.

-callback new_stream(macula_quic:stream(), stream_props(), macula_quic:connection()) ->
    {ok, cb_state()} | {error, Reason :: term()} | {error, Reason :: term(), cb_state()}
    | {stop, Reason :: term(), cb_state()}.
%% The peer has opened the stream, which the process has taken. The properties have `stream_opts', too.

-callback start_completed(macula_quic:stream(), start_props(), cb_state()) -> cb_ret().
%% The stream was opened by this process.

-callback peer_accepted(macula_quic:stream(), undefined, cb_state()) -> cb_ret().
%% The peer allows a stream that it did not allow when it was opened. Here a stream is opened when the
%% peer allows it.

-callback send_complete(macula_quic:stream(), IsCancelled :: boolean(), cb_state()) -> cb_ret().
%% What was sent by {@link send/3} up to some moment has arrived at the peer, one or more sends of it; or
%% will not (`true').

-callback peer_send_shutdown(macula_quic:stream(), undefined, cb_state()) -> cb_ret().
%% The peer has finished, and all its data was delivered.

-callback peer_send_aborted(macula_quic:stream(), ErrorCode :: non_neg_integer(), cb_state()) -> cb_ret().
%% The peer has reset its sending half.

-callback peer_receive_aborted(macula_quic:stream(), ErrorCode :: non_neg_integer(), cb_state()) ->
    cb_ret().
%% The peer has asked us to stop sending.

-callback send_shutdown_complete(macula_quic:stream(), IsGraceful :: boolean(), cb_state()) -> cb_ret().
%% Our sending half is over: all of it has arrived, with its end, or the peer or the connection has cut
%% it off.

-callback stream_closed(macula_quic:stream(), stream_closed_props(), cb_state()) -> cb_ret().
%% Both halves are over.

-callback passive(macula_quic:stream(), undefined, cb_state()) -> cb_ret().
%% The messages of `active' are spent.

-callback handle_stream_data(macula_quic:stream(), Data :: binary(), recv_data_props(), cb_state()) ->
    cb_ret().
%% Data of the peer.

-callback handle_call(Request :: term(), gen_server:from(), cb_state()) -> cb_ret().
%% A call that is not this module's.

-callback handle_cast(Request :: term(), cb_state()) -> cb_ret().
%% A cast.

-callback handle_info(Message :: term(), cb_state()) -> cb_ret().
%% Any other message.

-callback handle_continue(Continue :: term(), cb_state()) -> cb_ret().
%% After a callback that returned `{continue, Continue}', before anything else.

-callback terminate(Reason :: term(), cb_state()) -> term().
%% The process ends. The stream, if it is not over, is ended behind this.

-callback code_change(OldVsn :: term(), cb_state(), Extra :: term()) -> {ok, cb_state()} | {error, Reason :: term()}.
%% As in `gen_server': `sys:change_code/4' asks for the state that another version of the module has.

-callback format_status(cb_state()) -> term().
%% What reports show of the state.

-optional_callbacks([init/1, init_handoff/4, post_handoff/3, new_stream/3, start_completed/3,
                     peer_accepted/3, send_complete/3, peer_send_shutdown/3, peer_send_aborted/3,
                     peer_receive_aborted/3, send_shutdown_complete/3, stream_closed/3, passive/3,
                     handle_stream_data/4, handle_call/3, handle_cast/2, handle_info/2,
                     handle_continue/2, terminate/2, code_change/3, format_status/1]).

-define(ACTIVE, 16).
%% From so many bytes on that it was sent, a stream's process has a heap of so many words.
-define(BUSY, 4096).
-define(BUSY_HEAP, 2586).

%%--------------------------------------------------------------------------------------------
%% Starting

%% @doc Starts a process that opens a stream, or takes one, as {@link start_link/3}, without a link.
-spec start(module(), macula_quic:connection(), stream_opts()) -> {ok, pid()} | {error, term()}.
start(Callback, Conn, StreamOpts) ->
    started(gen_server:start(?MODULE, {own, Callback, Conn, StreamOpts}, [])).

%% @doc Starts a process that opens a stream, if `is_local' is `true' in `StreamOpts', and otherwise takes
%% the next one that the peer opens.
%%
%% It returns when the stream is open, and at once where one is to be taken. Errors: those of
%% {@link macula_quic:open_stream/2}, `{bad_callback, Module, Why}', what the callback says.
-spec start_link(module(), macula_quic:connection(), stream_opts()) -> {ok, pid()} | {error, term()}.
start_link(Callback, Conn, StreamOpts) ->
    started(gen_server:start_link(?MODULE, {own, Callback, Conn, StreamOpts}, [])).

%% @doc Starts a process and gives it a stream, as {@link start_link/5}, without a link.
-spec start(module(), macula_quic:stream(), macula_quic:connection(), stream_opts(), stream_props()) ->
    {ok, pid()} | {error, term()}.
start(Callback, Stream, Conn, StreamOpts, Props) ->
    give(gen_server:start(?MODULE, {given, Callback, Stream, Conn, StreamOpts, Props, self()}, []),
         Stream, Props).

%% @doc Starts a process and gives it a stream of the caller's, with the messages about it that wait.
%%
%% `Props' is what came with `new_stream'; what the caller has read of the stream, or knows of it, may be
%% added as `post_info'. Errors: `not_owner', `{bad_callback, Module, Why}', what `init_handoff/4' says.
%% The caller owns the stream then, as before.
-spec start_link(module(), macula_quic:stream(), macula_quic:connection(), stream_opts(),
                 stream_props()) -> {ok, pid()} | {error, term()}.
start_link(Callback, Stream, Conn, StreamOpts, Props) ->
    give(gen_server:start_link(?MODULE, {given, Callback, Stream, Conn, StreamOpts, Props, self()}, []),
         Stream, Props).

give(Result, Stream, Props) ->
    case started(Result) of
        {ok, Pid} ->
            case macula_quic:controlling_process(Stream, Pid) of
                ok ->
                    Pid ! {?MODULE, given, Stream, maps:get(post_info, Props, undefined)},
                    {ok, Pid};
                {error, _} = Error ->
                    Pid ! {?MODULE, not_given, Stream},
                    Error
            end;
        Error ->
            Error
    end.

%% @private
%% @doc As {@link start_link/5}, of a caller that traps exits: of a process that has not started it hears by the
%% error alone.
-spec start_child(module(), macula_quic:stream(), macula_quic:connection(), stream_opts(), stream_props()) ->
    {ok, pid()} | {error, term()}.
start_child(Callback, Stream, Conn, StreamOpts, Props) ->
    give(child({given, Callback, Stream, Conn, StreamOpts, Props, self()}), Stream, Props).

%% @private
%% @doc Starts a process that opens a stream and sends the first data; it answers the caller of
%% `macula_quic_connection:stream_send/6', unless it fails before. The caller traps exits, as in
%% {@link start_child/5}.
-spec start_first(module(), macula_quic:connection(), stream_opts(), first()) -> {ok, pid()} | {error, term()}.
start_first(Callback, Conn, StreamOpts, First) ->
    started(child({first, Callback, Conn, StreamOpts, First})).

%% What has not started is linked for a moment yet, before OTP 26, and its exit would be a message of nobody. Its
%% word is there before the start's result.
child(Args) ->
    Result = gen_server:start_link(?MODULE, {child, self(), Args}, []),
    Child = receive {?MODULE, begins, Pid} -> Pid after 0 -> none end,
    _ = [forget(Child) || Child =/= none, element(1, Result) =/= ok],
    Result.

forget(Child) ->
    true = unlink(Child),
    receive {'EXIT', Child, _} -> ok after 0 -> ok end.

started({ok, Pid}) -> {ok, Pid};
%% What was wrong is known here: it is no crash.
started({error, {shutdown, Reason}}) -> {error, Reason};
started({error, Reason}) -> {error, Reason};
started(ignore) -> {error, ignore}.

%% @equiv send(StreamPid, Data, #{})
-spec send(pid(), iodata()) -> ok | {error, term()}.
send(StreamPid, Data) ->
    send(StreamPid, Data, #{}).

%% @doc Sends data on the stream of another process; the caller waits while more than the high-water mark
%% is queued, and that process does not.
%%
%% `Flag' is a map or a list of options of {@link macula_quic:send/3}, or the sum of numbers as others use
%% them: 4 finishes the stream after the data; 0, 1, 2, 8, 16 and 4096 change nothing. Callbacks send by
%% `macula_quic:send/2,3' on their own stream.
%%
%% The option `timeout' bounds the whole call: the process is asked for its stream first, which waits for a callback
%% that runs. After `{error, timeout}' nothing was sent. With 0 there is no time to ask, and nothing is ever sent.
-spec send(pid(), iodata(), non_neg_integer() | macula_quic:options()) -> ok | {error, term()}.
send(StreamPid, Data, Flag) ->
    case send_options(send, Flag) of
        {ok, #{timeout := Timeout} = Options} ->
            Deadline = macula_quic_call:deadline(Timeout),
            case macula_quic_loop:get_handle(StreamPid, Timeout) of
                {ok, undefined} ->
                    {error, closed};
                {ok, Stream} ->
                    send_on(Stream, StreamPid, Data, Options#{timeout := macula_quic_call:left(Deadline)});
                {error, timeout} ->
                    {error, timeout}
            end;
        Error ->
            Error
    end.

send_on(Stream, StreamPid, Data, #{fin := Fin} = Options) ->
    case macula_quic:send(Stream, Data, Options) of
        ok -> gen_server:cast(StreamPid, {?MODULE, sent, Fin});
        Error -> Error
    end.

%% @doc The handle of a process's stream, which is `undefined' before there is one, and if the process is
%% dead.
-spec get_handle(pid()) -> undefined | macula_quic:stream().
get_handle(StreamPid) ->
    macula_quic_loop:get_handle(StreamPid).

%% START, FIN, ALLOW_0_RTT, DGRAM_PRIORITY, DELAY_SEND, SYNC.
-define(SEND_FLAGS, (1 bor 2 bor 4 bor 8 bor 16 bor 4096)).

%% @private
%% @doc What a flag, or options, of a call say.
-spec send_options(send | async_send, term()) ->
    {ok, #{fin := boolean(), timeout => timeout(), atom() => term()}} | {error, term()}.
send_options(Role, Flag) when is_integer(Flag), Flag >= 0, Flag band (bnot ?SEND_FLAGS) =:= 0 ->
    macula_quic_options:stream(Role, #{fin => Flag band 4 =/= 0});
send_options(Role, Options) when is_map(Options); is_list(Options) ->
    macula_quic_options:stream(Role, Options);
send_options(_Role, _Flag) ->
    {error, {bad_option, flag, unknown}}.

%%--------------------------------------------------------------------------------------------
%% The process

%% @private
-spec init(tuple()) -> {ok, state()} | {ok, state(), macula_quic_callback:action()} | {stop, term()}.
init({child, Parent, Args}) ->
    Parent ! {?MODULE, begins, self()},
    case init(Args) of
        {ok, State} -> {ok, State#{parent => Parent}};
        {ok, State, Action} -> {ok, State#{parent => Parent}, Action};
        Other -> Other
    end;
init({own, Callback, Conn, StreamOpts}) ->
    process_flag(trap_exit, true),
    macula_quic_callback:start(fun() ->
        case state(by_option, Callback, Conn, StreamOpts) of
            #{is_local := true} = State -> opened(open(#{}, State));
            State -> {ok, take_next(State)}
        end
    end);
init({given, Callback, Stream, Conn, StreamOpts, Props, Giver}) ->
    process_flag(trap_exit, true),
    macula_quic_callback:start(fun() ->
        State = (state(false, Callback, Conn, StreamOpts))#{
            stream := Stream, is_unidir := maps:get(direction, Props, bidirectional) =:= unidirectional},
        checked(State, [{init_handoff, 4}]),
        #{stream_opts := Opts} = State,
        CbState = begun(macula_quic_callback:begin_with(Callback, init_handoff, [Stream, Opts, Conn, Props])),
        {ok, State#{callback_state := CbState, begun := true, giver => {monitor(process, Giver), Giver}}}
    end);
init({first, Callback, Conn, StreamOpts, First}) ->
    process_flag(trap_exit, true),
    macula_quic_callback:start(fun() ->
        State = state(true, Callback, Conn, StreamOpts),
        checked(State, []),
        {ok, State#{first => First}, {continue, {?MODULE, open}}}
    end).

begun({ok, CbState}) -> CbState;
begun({error, Reason}) -> macula_quic_callback:refuse(Reason);
begun({error, Reason, _}) -> macula_quic_callback:refuse(Reason);
begun({stop, Reason}) -> macula_quic_callback:refuse(Reason);
begun({stop, Reason, _}) -> macula_quic_callback:refuse(Reason);
begun(Other) -> exit({bad_return_value, Other}).

state(IsLocal, Callback, Conn, StreamOpts) ->
    Opts = good(macula_quic_callback:options(StreamOpts)),
    Local = case {IsLocal, maps:get(is_local, Opts, false)} of
        {by_option, Is} when is_boolean(Is) -> Is;
        {Given, Is} when is_boolean(Given), is_boolean(Is) -> Given;
        _ -> macula_quic_callback:refuse({bad_option, is_local, not_a_boolean})
    end,
    Role = case Local of true -> open_stream; false -> accept_stream end,
    {Known, _Own} = good(macula_quic_options:split(Role, Opts)),
    Parsed = good(macula_quic_options:stream(Role, maps:merge(#{active => ?ACTIVE}, maps:from_list(Known)))),
    Active = maps:get(active, Parsed),
    %% Of a stream that is opened they are given with it.
    Settings = case Local of
        true -> [];
        false -> [{Key, Value} || Key <- [priority, high_watermark],
                                  {ok, Value} <- [maps:find(Key, Parsed)],
                                  Value =/= undefined, {Key, Value} =/= {priority, 0}]
    end,
    #{process => ?MODULE, stream => undefined, conn => Conn, callback => Callback, callback_state => undefined,
      is_owner => false, is_local => Local, is_unidir => false, stream_opts => Opts, active => Active,
      settings => Settings,
      pending => [], waiting => none, early => [], begun => false, ended => false,
      asked => none, ask => none, send_is_over => false,
      aborted => false}.

%% Data needs somebody to take it.
checked(#{callback := Callback, active := Active} = State, Needed) ->
    Data = [{handle_stream_data, 4} || Active =/= false, not only_sends(State)],
    case macula_quic_callback:check(Callback, Needed ++ Data) of
        ok -> ok;
        {error, Reason} -> macula_quic_callback:refuse(Reason)
    end.

only_sends(#{is_local := true, stream_opts := Opts}) ->
    {ok, {Known, _Own}} = macula_quic_options:split(open_stream, Opts),
    {ok, #{direction := Direction}} = macula_quic_options:stream(open_stream, Known),
    Direction =:= unidirectional;
only_sends(_) ->
    false.

%% Passive, as long as nobody's state is there to take messages with.
open(More, #{conn := Conn, stream_opts := Opts} = State) ->
    checked(State, []),
    {Known, _Own} = good(macula_quic_options:split(open_stream, maps:merge(More, Opts))),
    Stream = good(macula_quic:open_stream(Conn, maps:merge(maps:from_list(Known), #{active => false}))),
    {ok, #{direction := Direction}} = macula_quic:info(Stream),
    State#{stream := Stream, is_owner := true, is_unidir := Direction =:= unidirectional}.

opened(State) ->
    {ok, begin_local(State), {continue, {?MODULE, run}}}.

begin_local(#{stream := Stream, conn := Conn, callback := Callback, stream_opts := Opts,
              is_unidir := Unidir} = State) ->
    Args = #{conn => Conn, is_owner => true, is_local => true, is_unidir => Unidir, stream_opts => Opts},
    CbState = case macula_quic_callback:has(Callback, init, 1) of
        true -> begun(init_or_abort(Callback, Args#{stream => Stream}));
        false -> Args
    end,
    {ok, #{stream_id := Id}} = macula_quic:info(Stream),
    Props = #{status => success, stream_id => Id, is_peer_accepted => true},
    State#{callback_state := CbState, begun := true,
           pending := [{start_completed, [Stream, Props]}, active]}.

%% Where `init/1' refuses, the process has no state to end with, and the peer is told here.
init_or_abort(Callback, #{stream := Stream} = Args) ->
    try macula_quic_callback:begin_with(Callback, init, [Args]) of
        Returned ->
            _ = end_refused(Stream, Returned),
            Returned
    catch
        Class:Reason:Stack ->
            _ = finish(Stream, crash),
            erlang:raise(Class, Reason, Stack)
    end.

end_refused(_Stream, {ok, _}) -> ok;
end_refused(Stream, {error, Reason}) -> abort(Stream, macula_quic_callback:refusal(Reason));
end_refused(Stream, {error, Reason, _}) -> abort(Stream, macula_quic_callback:refusal(Reason));
end_refused(Stream, {stop, Reason}) -> finish(Stream, Reason);
end_refused(Stream, {stop, Reason, _}) -> finish(Stream, Reason);
end_refused(Stream, _Wrong) -> finish(Stream, bad_return_value).

%% The answer is a message like any other.
take_next(#{conn := Conn} = State) ->
    checked(State, [{new_stream, 3}]),
    Ref = make_ref(),
    try macula_nif:conn_accept_stream(Conn, Ref, false, false) of
        Operation when is_reference(Operation) ->
            State#{accept => {Ref, Operation}};
        %% It was there already.
        {ok, _} = Taken ->
            self() ! {Ref, Taken},
            State#{accept => {Ref, none}};
        {error, Reason} ->
            macula_quic_callback:refuse(Reason)
    catch
        error:badarg -> macula_quic_callback:refuse(badarg)
    end.

%% @private
-spec handle_call(term(), gen_server:from(), state()) -> macula_quic_loop:result() | macula_quic_loop:reply().
handle_call({macula_quic_loop, get_handle}, _From, #{stream := Stream, is_owner := true} = State) ->
    macula_quic_loop:go_on(Stream, State);
handle_call({macula_quic_loop, get_handle}, _From, State) ->
    macula_quic_loop:go_on(undefined, State);
handle_call(Request, From, State) ->
    macula_quic_loop:call(Request, From, State).

%% @private
-spec handle_cast(term(), state()) -> macula_quic_loop:result().
handle_cast({?MODULE, sent, Fin}, State) ->
    macula_quic_loop:go_on(sent(Fin, State));
handle_cast(Request, State) ->
    event({handle_cast, [Request]}, State).

%% @private
-spec handle_continue(term(), state()) -> macula_quic_loop:result().
handle_continue({?MODULE, run}, State) ->
    macula_quic_loop:run(none, State);
handle_continue({macula_quic_loop, Continue}, State) ->
    event({handle_continue, [Continue]}, State);
handle_continue({?MODULE, open}, #{first := #{from := From, deadline := Deadline} = First} = State0) ->
    State = maps:remove(first, State0),
    %% What is left of the caller's time is all there is.
    try begin_local(open(#{timeout => macula_quic_call:left(Deadline)}, State)) of
        Begun -> send_first(First, Begun)
    catch
        throw:{macula_quic_callback, timeout} ->
            gen_server:reply(From, {error, timeout}),
            {stop, {shutdown, timeout}, State};
        throw:{macula_quic_callback, Reason} ->
            gen_server:reply(From, {error, {start_stream, Reason}}),
            {stop, {shutdown, Reason}, State}
    end.

send_first(#{from := From, data := Data, fin := Fin, deadline := Deadline, claim := Claim},
           #{stream := Stream} = Begun) ->
    %% The caller may have given up, and has been told that nothing is sent then.
    Sent = case claim(Claim) of
        true -> macula_quic:send(Stream, Data, #{fin => Fin, timeout => macula_quic_call:left(Deadline)});
        false -> {error, timeout}
    end,
    gen_server:reply(From, Sent),
    case Sent of
        ok -> macula_quic_loop:run(none, sent(Fin, Begun));
        {error, Reason} -> {stop, {shutdown, Reason}, Begun#{close => {1, <<>>}}}
    end.

%% @private
%% @doc Whether the first data is the one's that asks: the process's, to send it, or the caller's, to give it up.
-spec claim(atomics:atomics_ref()) -> boolean().
claim(Claim) ->
    atomics:compare_exchange(Claim, 1, 0, 1) =:= ok.

%% @private
-spec handle_info(term(), state()) -> macula_quic_loop:result().
handle_info({quic, Data, Stream, Flags},
            #{stream := Stream, is_owner := true, pending := [], waiting := none,
              callback := Callback, callback_state := CbState} = State) when is_binary(Data) ->
    %% Most messages are this one, which takes the short way.
    grow(Flags),
    case macula_quic_callback:has(Callback, handle_stream_data, 4) of
        true ->
            Args = [Stream, Data, Flags, CbState],
            macula_quic_loop:returned(macula_quic_callback:call(Callback, handle_stream_data, Args), State);
        false ->
            event({handle_stream_data, [Stream, Data, Flags]}, State)
    end;
handle_info({Ref, Result}, #{accept := {Ref, _}} = State) ->
    taken(Result, maps:remove(accept, State));
handle_info({?MODULE, given, Stream, PostInfo}, #{stream := Stream, giver := {Ref, _}} = State) ->
    demonitor(Ref, [flush]),
    #{early := Early} = State,
    macula_quic_loop:run(none, (maps:remove(giver, State))#{
        is_owner := true, early := [],
        pending := [{post_handoff, [Stream, PostInfo]}, active
                    | [{message, M} || M <- lists:reverse(Early)]]});
handle_info({?MODULE, not_given, Stream}, #{stream := Stream, giver := _} = State) ->
    {stop, {shutdown, not_given}, State};
handle_info({'DOWN', Ref, process, _, _}, #{giver := {Ref, _}} = State) ->
    {stop, {shutdown, owner_down}, State};
handle_info({quic, _, Stream, _} = Message, #{stream := Stream, giver := _, early := Early} = State) ->
    macula_quic_loop:go_on(State#{early := [Message | Early]});
handle_info({quic, Data, Stream, Flags}, #{stream := Stream} = State) when is_binary(Data) ->
    grow(Flags),
    event({handle_stream_data, [Stream, Data, Flags]}, State);
handle_info({quic, What, Stream, Detail} = Message, #{stream := Stream} = State) ->
    told(What, Detail, Message, State);
handle_info(Message, State) ->
    event({handle_info, [Message]}, State).

%% A message has memory of its own until the next collection, which comes when all of that is large beside the heap.
%% With the heap of a process that has just begun this is the case after a few messages.
grow(#{absolute_offset := Offset, len := Length}) when Offset < ?BUSY, Offset + Length >= ?BUSY ->
    case process_info(self(), total_heap_size) of
        {total_heap_size, Words} when Words < ?BUSY_HEAP ->
            _ = process_flag(min_heap_size, ?BUSY_HEAP),
            true = erlang:garbage_collect(),
            ok;
        _ ->
            ok
    end;
grow(_Flags) ->
    ok.

%% @private
-spec terminate(term(), state()) -> term().
terminate(Reason, #{callback := Callback, callback_state := CbState, begun := Begun} = State) ->
    _ = case State of
        #{accept := {_, Operation}} when Operation =/= none -> macula_nif:op_cancel(Operation);
        _ -> ok
    end,
    %% One that cannot be loaded has been the reason, which stands.
    Wanted = Begun andalso macula_quic_callback:exports(Callback, terminate, 2) =:= true,
    try Wanted andalso Callback:terminate(Reason, CbState)
    after
        close(Reason, State)
    end.

close(_Reason, #{is_owner := IsOwner, ended := Ended}) when not IsOwner; Ended ->
    ok;
close(_Reason, #{stream := Stream, close := Close}) ->
    abort(Stream, Close);
close(Reason, #{stream := Stream}) ->
    finish(Stream, Reason).

%% As a process that ends for this reason leaves its stream.
finish(Stream, Reason) ->
    case macula_quic_callback:close_code(Reason) of
        {0, _} -> macula_quic:close_stream(Stream);
        Close -> abort(Stream, Close)
    end.

abort(Stream, {Code, _Text}) ->
    macula_quic:async_shutdown_stream(Stream, abort, Code).

%% @private
-spec code_change(term(), state(), term()) -> {ok, state()} | {error, term()}.
code_change(OldVsn, State, Extra) ->
    macula_quic_loop:code_change(OldVsn, State, Extra).

%% @private
-spec format_status(gen_server:format_status()) -> gen_server:format_status().
format_status(#{state := #{callback := Callback, callback_state := CbState} = State} = Status) ->
    case macula_quic_callback:has(Callback, format_status, 1) of
        true -> Status#{state := State#{callback_state := Callback:format_status(CbState)}};
        false -> Status
    end;
format_status(Status) ->
    Status.

%%--------------------------------------------------------------------------------------------
%% Streams that come, and what they say

taken({ok, Stream}, #{callback := Callback, conn := Conn, stream_opts := Opts} = State) ->
    {ok, #{stream_id := Id, direction := Direction}} = macula_quic:info(Stream),
    Props = Opts#{conn => Conn, stream_id => Id, direction => Direction, stream_opts => Opts},
    Taken = State#{stream := Stream, is_owner := true, is_unidir := Direction =:= unidirectional},
    case macula_quic_callback:call(Callback, new_stream, [Stream, Props, Conn]) of
        {ok, {noreply, _, _}} = Outcome ->
            macula_quic_loop:returned(Outcome, Taken#{begun := true, pending := [active]});
        {crash, {bad_return_value, {error, Reason}}} ->
            macula_quic_loop:returned({ok, {error, Reason, undefined}}, Taken);
        Outcome ->
            macula_quic_loop:returned(Outcome, Taken)
    end;
taken({error, Reason}, State) ->
    %% No stream came before the connection's end.
    {stop, {shutdown, Reason}, State}.

told(stream_closed, Props, _Message, #{stream := Stream} = State) ->
    #{asked := Asked, send_is_over := Over, is_local := Local, is_unidir := Unidir, pending := Pending,
      aborted := Aborted} = State,
    Graceful = maps:get(reason, Props, normal) =:= normal andalso not Aborted,
    %% Asked for and not told: it ended otherwise.
    Cancelled = [{send_complete, [Stream, true]} || Asked =/= none],
    Ended = [{send_shutdown_complete, [Stream, Graceful andalso Asked =:= none]}
             || not Over, Local orelse not Unidir],
    macula_quic_loop:run(none, State#{ended := true, asked := none, send_is_over := true,
                     pending := Cancelled ++ Ended ++ [{stream_closed, [Stream, Props]} | Pending] ++ [over]});
told(delivered, undefined, _Message, #{asked := Asked} = State) when Asked =/= none ->
    #{ask := Ask, stream := Stream, pending := Pending} = State,
    Over = [{send_shutdown_complete, [Stream, true]} || Asked =:= fin],
    macula_quic_loop:run(none, ask(Ask, State#{asked := none, ask := none, send_is_over := Asked =:= fin,
                              pending := [{send_complete, [Stream, false]} | Over] ++ Pending}));
told(peer_receive_aborted, Code, _Message, #{stream := Stream} = State) ->
    event({peer_receive_aborted, [Stream, Code]}, State#{aborted := true});
told(What, Detail, Message, #{stream := Stream} = State) ->
    case lists:member(What, [peer_send_shutdown, peer_send_aborted, passive, start_completed,
                             peer_accepted]) of
        true -> event({What, [Stream, Detail]}, State);
        false -> event({handle_info, [Message]}, State)
    end.

%% One question at a time: its answer is about all that was sent before it.
sent(Fin, #{callback := Callback, asked := Asked, ask := Ask} = State) ->
    Wanted = macula_quic_callback:has(Callback, send_complete, 3)
        orelse macula_quic_callback:has(Callback, send_shutdown_complete, 3),
    What = case Fin of true -> fin; false -> data end,
    case {Wanted, Asked} of
        {false, _} -> State;
        {true, none} -> ask(What, State);
        {true, _} when Ask =:= fin -> State;
        {true, _} -> State#{ask := What}
    end.

ask(none, State) ->
    State;
ask(_What, #{ended := true} = State) ->
    State;
ask(What, #{stream := Stream} = State) ->
    case macula_quic:tell_delivered(Stream) of
        ok -> State#{asked := What};
        %% Something else has ended the sending half, which the stream's end tells.
        {error, _} -> State#{asked := What, aborted := true}
    end.

%%--------------------------------------------------------------------------------------------
%% Events: one after the other, each with the state that the one before has left

event(Event, State) ->
    event(Event, none, State).

%% @private
-spec event(event(), none | macula_quic_callback:action(), state()) -> macula_quic_loop:result().
event({message, Message}, _Action, State) ->
    handle_info(Message, State);
event(active, Action, #{stream := Stream, active := Active, settings := Settings} = State) ->
    %% One that has ended, or goes one way, has no use for some of it.
    _ = [macula_quic:setopt(Stream, Key, Value)
         || {Key, Value} <- Settings ++ [{active, Active} || Active =/= false]],
    macula_quic_loop:run(Action, State);
event(over, Action, State) ->
    _ = [Parent ! {?MODULE, over, self()} || #{parent := Parent} <- [State]],
    macula_quic_loop:run(Action, State);
event(Event, Action, State) ->
    macula_quic_loop:event(Event, Action, State).

%% @private
-spec missing(atom(), [term()], none | macula_quic_callback:action(), state()) -> macula_quic_loop:result().
missing(passive, [Stream, _], Action, #{active := Active} = State) when is_integer(Active) ->
    _ = macula_quic:setopt(Stream, active, Active),
    macula_quic_loop:run(Action, State);
missing(stream_closed, [_Stream, Props], _Action, State) ->
    case maps:get(reason, Props, normal) of
        normal -> {stop, normal, State};
        Reason -> {stop, {shutdown, Reason}, State}
    end;
missing(Name, Args, Action, State) ->
    macula_quic_loop:missing(Name, Args, Action, State).
