%% @doc A behaviour for one process per QUIC connection, at either end.
%%
%% The process owns the connection: what happens to that becomes a call of the callback module, with
%% the module's own state. `docs/reference/messages.md' has a table of the callbacks: when each is called, what
%% it carries, what follows.
%%
%% A server is a child of the user's own supervisor. It listens, and keeps some processes ready, each
%% of which takes one connection; none changes hands.
%%
%% ```
%% -module(hello).
%% -behaviour(macula_quic_connection).
%% -export([init/1, new_conn/3, connected/3]).
%%
%% init(ConnOpts) -> {ok, ConnOpts}.
%%
%% new_conn(_Conn, #{negotiated_protocol := <<"hello">>}, State) -> {ok, State};
%% new_conn(_Conn, _Props, State) -> {error, {7, <<"no protocol">>}, State}.
%%
%% connected(Conn, _Props, State) ->
%%     {ok, Stream} = macula_quic:open_stream(Conn, #{direction => unidirectional}),
%%     ok = macula_quic:send(Stream, <<"hello">>, #{fin => true}),
%%     {ok, State}.
%% '''
%%
%% and in the `init/1' of the supervisor
%%
%% ```
%% macula_quic_connection:child_spec(#{callback => hello, listen_on => 4433,
%%                                     listen_opts => #{certfile => "cert.pem", keyfile => "key.pem",
%%                                                      alpn => ["hello"]}})
%% '''
%%
%% A client is one process: {@link start_link/3}.
%%
%% == Options ==
%%
%% `ConnOpts' and `StreamOpts' are maps or lists. The keys that {@link macula_quic:connect/4} or
%% {@link macula_quic:listen/3} knows are options of the connection. Four keys are this module's:
%% <ul>
%% <li>`connect_timeout_ms' (10000, or `infinity'): how long a client tries to connect.</li>
%% <li>`poll_interval_ms' (1000; 10 to 3600000, or `infinity' for never): as in
%% {@link macula_quic:tell_changes/2}, which is asked for where the module has one of the callbacks.</li>
%% <li>`linger_ms' (30000, or `infinity'): how long `closed/3' waits, once the connection is over, until the processes
%% of streams that were started from this one have had what arrived before, and the ends of their streams.</li>
%% <li>`conn_callback': the callback module of acceptors, where none is named otherwise.</li>
%% </ul>
%% All other keys are the user's own: `init/1' gets them with the rest, and without `key', `password',
%% `stateless_reset_key' and `resumption_keys', which no state and no report ever shows. A supervisor shows how its
%% children were started: a key is best given as `keyfile'.
%%
%% `StreamOpts' are for the streams that the peer opens. With `stream_callback', and no `new_stream/3' in
%% the callback module, each of them gets a process of {@link macula_quic_stream}.
%%
%% == Callbacks ==
%%
%% `init/1' must be there, and `new_conn/3' on the server's side, which is checked at the start. Without
%% the others:
%% <ul>
%% <li>`closed/3': the process ends, for the reason `normal' if this side has closed the connection, and
%% `{shutdown, Reason}' otherwise.</li>
%% <li>`new_stream/3': see `stream_callback' above. Without that, too, the streams of the peer are not
%% taken: `macula_quic:accept_stream/3' does that.</li>
%% <li>`dgram_recv/4': datagrams are not taken.</li>
%% <li>`handle_call/3': the answer is `{error, unknown_call}'.</li>
%% <li>`handle_cast/2', `handle_info/2': the message is logged.</li>
%% <li>`handle_continue/2': whoever returns `{continue, _}' must have it.</li>
%% <li>`code_change/3': the state stays as it is.</li>
%% <li>`format_status/1': reports show the state as it is.</li>
%% <li>Any other: nothing happens.</li>
%% </ul>
%%
%% A callback returns a {@type cb_ret()}. `{error, Reason, State}' closes the connection, so that the
%% peer sees why, and ends the process with `{shutdown, Reason}': a `Reason' that is `{Code, Text}' or a
%% code is what the peer sees, of an atom it sees the name with code 1, of any other term
%% `{1, <<"refused">>}'. `{stop, Reason, State}' ends the process as in `gen_server', and the connection
%% with it: with code 0 for `normal', `shutdown' and `{shutdown, _}' (or the code in
%% `{shutdown, {Code, Text}}'), and otherwise, as after a crash, with code 1 and "internal error".
%%
%% A crash of a callback is one of the process. Processes of streams that were started from it end with
%% it. The process traps exits.
-module(macula_quic_connection).
-behaviour(gen_server).
-behaviour(macula_quic_loop).

-import(macula_quic_callback, [good/1]).

-export([start_link/3, start_acceptor/3, child_spec/1, start_listener/1, get_listener/1,
         lock_listener/1, unlock_listener/1, reload_listener/2,
         get_handle/1, stream_send/6]).
-export([start_acceptor/4]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, handle_continue/2, terminate/2,
         code_change/3, format_status/1]).
-export([event/3, missing/4]).

-export_type([cb_ret/0, cb_state/0, action/0, state/0, conn_opts/0, stream_opts/0, listener_opts/0,
              new_conn_props/0, connected_props/0, conn_closed_props/0, transport_shutdown_props/0,
              new_stream_props/0, dgram_state/0, cert_and_chain/0]).

-type cb_state() :: term().
%% The callback module's own.
-type action() :: hibernate | timeout() | {continue, Continue :: term()}.
%% What `gen_server' does next. After a timeout in milliseconds without a message, `handle_info' gets
%% `timeout'. It is 16#ffffffff at most.
-type cb_ret() ::
    {ok, cb_state()} | {ok, cb_state(), action()}
    | {noreply, cb_state()} | {noreply, cb_state(), action()}
    | {action(), cb_state()}
    | {reply, Reply :: term(), cb_state()} | {reply, Reply :: term(), cb_state(), action()}
    | {error, Reason :: term(), cb_state()}
    | {stop, Reason :: term(), cb_state()} | {stop, Reason :: term(), Reply :: term(), cb_state()}.
%% What a callback returns; those with a `Reply' are for `handle_call' alone, which may also return
%% without one and use `gen_server:reply/2'.
-type conn_opts() :: #{atom() => term()} | [{atom(), term()} | atom()].
%% Options of a connection, of this module, and the user's own.
-type stream_opts() :: #{atom() => term()} | [{atom(), term()} | atom()].
%% Options of the streams that the peer opens, and the user's own.
-type listener_opts() :: #{
    id => term(),
    callback => module(),
    listen_on => inet:port_number() | {string() | binary() | inet:ip_address(), inet:port_number()},
    listen_opts => macula_quic:options(),
    conn_opts => conn_opts(),
    stream_opts => stream_opts(),
    acceptors => pos_integer(),
    max_connections => pos_integer() | infinity,
    shutdown_ms => non_neg_integer()}.
%% `callback' (or `conn_callback' in `conn_opts'), `listen_on' (0: any free port) and `listen_opts' as in
%% `macula_quic:listen/3'. Options of a connection that stand in `conn_opts' go to the listener, too.
%% `acceptors' (16) processes are kept ready. With `max_connections' (`infinity') processes none is, and
%% further connections wait in the listener's backlog. When the listener is stopped its connections have
%% `shutdown_ms' (5000) to end. `id' (`macula_quic_connection') is the child's.
-type state() :: #{
    process := module(),
    listener := undefined | macula_quic:listener(),
    conn := undefined | macula_quic:connection(),
    callback := module(),
    callback_state := cb_state(),
    sup := undefined | pid(),
    conn_opts := map(),
    stream_opts := map(),
    is_resumed := boolean(),
    %% What is to be called yet.
    pending := [event()],
    waiting := macula_quic_callback:waiting(),
    by := undefined | {supervisor | keeper, pid()},
    dialer := undefined | pid(),
    %% Of a connection that the dialer is about to give.
    early := [tuple()],
    %% The processes of streams that this one has started.
    %% With the caller for whom it sends first, or whose stream's end was told.
    streams := #{pid() => gen_server:from() | none | over},
    %% Streams of the peer that no process has taken, until they are closed: the callback module knows none of them.
    refused := #{macula_quic:stream() => true},
    up := boolean(),
    ended := boolean(),
    poll := 10..3600000 | infinity,
    datagrams := non_neg_integer(),
    %% How long they may take to have the ends of their streams, once the connection is over; and that it is.
    linger := timeout(),
    lingering => {reference() | none, Reason :: term()},
    close => {non_neg_integer(), iodata()},
    watched => reference()
}.
%% The process's own: what `sys:get_state/1' shows.
-type event() :: {atom(), [term()]} | {up, map()} | arm | {ended, term()} | {message, tuple()}.
-type new_conn_props() :: #{peername := macula_quic:address(),
                            negotiated_protocol := undefined | binary(),
                            server_name := undefined | binary(),
                            peercert := undefined | binary(), _ => _}.
%% What `{quic, new_conn, Conn, Info}' carries.
-type connected_props() :: #{is_resumed := boolean(), alpns := undefined | string(), _ => _}.
%% The application protocol as a string, and what `macula_quic:info/1' tells: `peername', `sockname',
%% `negotiated_protocol', `server_name', `peercert'. A client that has sent early data has the connection before
%% the handshake is done: `is_resumed' is `false', and what that shows is `undefined'.
-type conn_closed_props() :: #{is_handshake_completed := boolean(), is_peer_acked := boolean(),
                               is_app_closing := boolean(), reason := term()}.
%% `reason' is that of the connection's last message; `is_app_closing' says that this side has closed
%% it, `is_peer_acked' that the peer has.
-type transport_shutdown_props() :: #{status := atom(), error := undefined | non_neg_integer(), reason := term()}.
%% `reason' is that of the message, or of a failed connect; `status' its first word; `error' the number of the transport's
%% error (RFC 9000, section 20.1), where it has one that is known.
-type new_stream_props() :: #{conn := macula_quic:connection(), stream_id := non_neg_integer(),
                              direction := bidirectional | unidirectional, _ => _}.
%% What `{quic, new_stream, Stream, Info}' carries.
-type dgram_state() :: #{dgram_send_enabled := boolean(), dgram_max_len := non_neg_integer()}.
%% Whether the peer takes datagrams, and how many bytes one may have now.
-type cert_and_chain() :: #{cert := binary(), chain := [binary(), ...]}.
%% The peer's own certificate, as DER, and all that the peer has shown, that one first.

-callback init(Args :: map()) ->
    {ok, cb_state()} | {ok, cb_state(), action()} | {error, Reason :: term(), cb_state()}
    | {stop, Reason :: term()} | ignore.
%% Before the connection: `Args' is `ConnOpts' with `stream_opts'. An error is that of the start.

-callback new_conn(macula_quic:connection(), new_conn_props(), cb_state()) -> cb_ret().
%% A server's connection: `{error, Reason, State}' refuses it.

-callback connected(macula_quic:connection(), connected_props(), cb_state()) -> cb_ret().
%% The connection is established.

-callback transport_shutdown(undefined | macula_quic:connection(), transport_shutdown_props(),
                             cb_state()) -> cb_ret().
%% The transport has ended the connection, or a client could not connect, which has no handle then.

-callback shutdown(macula_quic:connection(), ErrorCode :: non_neg_integer(), cb_state()) -> cb_ret().
%% The peer's application has closed the connection.

-callback closed(undefined | macula_quic:connection(), conn_closed_props(), cb_state()) -> cb_ret().
%% The connection is over, however it ended, and so are the streams that have processes started from this one.

-callback local_address_changed(macula_quic:connection(), macula_quic:address(), cb_state()) -> cb_ret().
%% The local address has changed; seen by looking.

-callback peer_address_changed(macula_quic:connection(), macula_quic:address(), cb_state()) -> cb_ret().
%% The peer's address has changed; seen by looking.

-callback streams_available(macula_quic:connection(),
                            {Bidirectional :: non_neg_integer(), Unidirectional :: non_neg_integer()},
                            cb_state()) -> cb_ret().
%% So many more streams may be opened: told once, and when the peer allows more.

-callback peer_needs_streams(macula_quic:connection(), unidi_streams | bidi_streams, cb_state()) ->
    cb_ret().
%% The peer has as many streams open as it may, or says that it would open more; seen by looking.

-callback resumed(macula_quic:connection(), SessionData :: false, cb_state()) -> cb_ret().
%% The session was resumed; told behind `connected'.

-callback early_data(macula_quic:connection(), accepted | rejected, cb_state()) -> cb_ret().
%% The handshake of a connection with early data is done, which `connected' does not wait for.

-callback nst_received(macula_quic:connection(), Ticket :: binary(), cb_state()) -> cb_ret().
%% A client with the option `resumption' has new tickets, which it keeps by itself: `Ticket' is empty.

-callback peer_cert_received(macula_quic:connection(), cert_and_chain(), cb_state()) -> cb_ret().
%% The peer has shown a certificate, which was verified as the options want. Told before `connected', and with
%% early data before `early_data'.

-callback new_stream(macula_quic:stream(), new_stream_props(), cb_state()) -> cb_ret().
%% The peer has opened a stream, which the process owns.

-callback dgram_recv(macula_quic:connection(), Data :: binary(), Flags :: non_neg_integer(),
                     cb_state()) -> cb_ret().
%% A datagram. `Flags' is 0.

-callback dgram_state_changed(macula_quic:connection(), dgram_state(), cb_state()) -> cb_ret().
%% Whether datagrams can be sent, and how large: told once, and when it changes; seen by looking.

-callback handle_call(Request :: term(), gen_server:from(), cb_state()) -> cb_ret().
%% A call that is not this module's.

-callback handle_cast(Request :: term(), cb_state()) -> cb_ret().
%% A cast.

-callback handle_info(Message :: term(), cb_state()) -> cb_ret().
%% Any other message: those of streams that the process owns, exits of linked processes, `timeout'.

-callback handle_continue(Continue :: term(), cb_state()) -> cb_ret().
%% After a callback that returned `{continue, Continue}', before anything else.

-callback terminate(Reason :: term(), cb_state()) -> term().
%% The process ends. The connection, if it is not over, is closed behind this.

-callback code_change(OldVsn :: term(), cb_state(), Extra :: term()) -> {ok, cb_state()} | {error, Reason :: term()}.
%% As in `gen_server': `sys:change_code/4' asks for the state that another version of the module has.

-callback format_status(cb_state()) -> term().
%% What reports show of the state.

-optional_callbacks([new_conn/3, connected/3, transport_shutdown/3, shutdown/3, closed/3,
                     local_address_changed/3, peer_address_changed/3, streams_available/3,
                     peer_needs_streams/3, resumed/3, early_data/3, nst_received/3, peer_cert_received/3,
                     new_stream/3, dgram_recv/4, dgram_state_changed/3, handle_call/3,
                     handle_cast/2, handle_info/2, handle_continue/2, terminate/2, code_change/3,
                     format_status/1]).

%% What costs a look now and then.
-define(TOLD_ON_REQUEST,
        [{peer_address_changed, 3}, {local_address_changed, 3}, {dgram_state_changed, 3},
         {streams_available, 3}, {peer_needs_streams, 3}]).
%% Datagrams that may wait in the mailbox.
-define(DATAGRAMS, 64).

%%--------------------------------------------------------------------------------------------
%% Starting

%% @doc Starts a client: a process that connects to `{Host, Port}', linked to the caller.
%%
%% It returns before the connection is there: then `connected/3' is called; and `transport_shutdown/3' and
%% `closed/3' if it cannot be made. Errors: of the options, as in {@link macula_quic:connect/4};
%% `{bad_callback, Module, Why}'; what `init/1' says.
-spec start_link(module(), {string() | binary() | inet:ip_address(), inet:port_number()},
                 {conn_opts(), stream_opts()}) -> {ok, pid()} | ignore | {error, term()}.
start_link(Callback, {Host, Port}, {ConnOpts, StreamOpts}) ->
    start_process({client, Callback, Host, Port, ConnOpts, StreamOpts}).

%% @doc Starts a process that takes the next connection of a listener, linked to the caller.
%%
%% `Options' is `{ConnOpts, StreamOpts}', or a table of ETS with the objects `{c_opts, ConnOpts}' and
%% `{s_opts, StreamOpts}', that several acceptors share. `ConnOpts' names the module as `conn_callback',
%% and holds no option of the listener. When the process has a connection it asks `Sup', a supervisor of
%% kind `simple_one_for_one' whose children are started with `start_acceptor(Listener, Options)', for
%% another acceptor: `supervisor:start_child(Sup, [Sup])'. Its children are to be `temporary'. An acceptor
%% that waits ends with `Sup', and does not see the listener's end: {@link child_spec/1} cares for
%% that, and for acceptors that fail.
-spec start_acceptor(macula_quic:listener(), ets:tid() | atom() | {conn_opts(), stream_opts()}, pid()) ->
    {ok, pid()} | ignore | {error, term()}.
start_acceptor(Listener, {ConnOpts, StreamOpts}, Sup) when is_pid(Sup) ->
    case macula_quic_callback:options(ConnOpts) of
        {ok, #{conn_callback := Callback} = Conn} ->
            start_acceptor(Listener, Callback, {maps:remove(conn_callback, Conn), StreamOpts},
                           {supervisor, Sup});
        {ok, _} -> {error, {bad_option, conn_callback, missing}};
        Error -> Error
    end;
start_acceptor(Listener, Table, Sup) when is_pid(Sup) ->
    try {ets:lookup_element(Table, c_opts, 2), ets:lookup_element(Table, s_opts, 2)} of
        Options -> start_acceptor(Listener, Options, Sup)
    catch
        error:badarg -> {error, {bad_option, options, not_a_table}}
    end.

%% @private
-spec start_acceptor(macula_quic:listener(), module(), {conn_opts(), stream_opts()},
                     {supervisor | keeper, pid()}) -> {ok, pid()} | ignore | {error, term()}.
start_acceptor(Listener, Callback, {ConnOpts, StreamOpts}, By) ->
    start_process({server, Callback, Listener, ConnOpts, StreamOpts, By}).

start_process(Args) ->
    case gen_server:start_link(?MODULE, Args, []) of
        {ok, Pid} -> {ok, Pid};
        ignore -> ignore;
        %% What was wrong is known here: it is no crash.
        {error, {shutdown, Reason}} -> {error, Reason};
        {error, Reason} -> {error, Reason}
    end.

%% @doc A listener with its acceptors and connections, as a child of a supervisor.
%%
%% The child listens, keeps acceptors ready, and supervises them and the connections that they become.
%% A connection that ends, or crashes, makes room for another; it never counts as a restart. Where an acceptor cannot
%% be started, or ends before it was given a connection, the log says so, and another one is started: first after 50 ms,
%% then less and less often, each 5 seconds in the end. Once an acceptor was given a connection, or has waited for
%% 5 seconds, the next one comes at once.
%% Where the listener's socket fails it listens anew, and its connections live on; if it cannot, the child ends,
%% and its supervisor decides.
-spec child_spec(listener_opts()) -> supervisor:child_spec().
child_spec(Options) when is_map(Options) ->
    #{id => maps:get(id, Options, ?MODULE),
      start => {?MODULE, start_listener, [Options]},
      restart => permanent,
      %% The bound on its end is `shutdown_ms'.
      shutdown => infinity,
      type => worker,
      modules => [?MODULE]}.

%% @doc Starts what {@link child_spec/1} describes, linked to the caller. Errors: those of
%% {@link macula_quic:listen/3}; `{bad_callback, Module, Why}'; what `init/1' of an acceptor says.
-spec start_listener(listener_opts()) -> {ok, pid()} | {error, term()}.
start_listener(Options) ->
    macula_quic_acceptor:start_link(Options).

%% @doc The handle of the listener, of which `macula_quic:sockname/1' tells the port.
-spec get_listener(pid()) -> macula_quic:listener().
get_listener(Pid) ->
    gen_server:call(Pid, get_listener, infinity).

%% @doc As {@link macula_quic:lock/1}, also for a listener that takes the place of one that has failed.
-spec lock_listener(pid()) -> ok | {error, term()}.
lock_listener(Pid) ->
    gen_server:call(Pid, {set_locked, true}, infinity).

%% @doc Takes new connections again.
-spec unlock_listener(pid()) -> ok | {error, term()}.
unlock_listener(Pid) ->
    gen_server:call(Pid, {set_locked, false}, infinity).

%% @doc As {@link macula_quic:reload/2}, also for a listener that takes the place of one that has failed.
-spec reload_listener(pid(), macula_quic:options()) -> ok | {error, term()}.
reload_listener(Pid, Options) ->
    %% Behind a fun, so that no report of a failed call shows a key.
    gen_server:call(Pid, {reload, fun() -> Options end}, infinity).

%% @doc The handle of a process's connection, which is `undefined' before there is one, and if the process is
%% dead.
-spec get_handle(pid()) -> undefined | macula_quic:connection().
get_handle(ConnPid) ->
    macula_quic_loop:get_handle(ConnPid).

%% @doc Opens a stream that a new process of {@link macula_quic_stream} with the module `Callback' serves,
%% and sends data on it.
%%
%% The process is linked with `ConnPid', which does not wait for it. `SendFlag' and `StreamOpts' are as
%% in {@link macula_quic_stream:send/3}, without `timeout', and {@link macula_quic_stream:start_link/3}.
%% Errors: `timeout', after which nothing was sent; `closed' if the connection is not there, or its process has
%% ended; `{start_stream, Reason}', also where the new process has ended, `{bad_option, Key, Why}', and what
%% {@link macula_quic:send/3} says.
-spec stream_send(ConnPid :: pid(), Callback :: module(), Data :: iodata(),
                  SendFlag :: non_neg_integer() | macula_quic:options(), stream_opts(), timeout()) ->
    ok | {error, term()}.
stream_send(ConnPid, Callback, Data, SendFlag, StreamOpts, Timeout) ->
    case {macula_quic_stream:send_options(async_send, SendFlag),
          macula_quic_options:stream(send, #{timeout => Timeout})} of
        {{ok, #{fin := Fin}}, {ok, _}} when ConnPid =/= self() ->
            Claim = atomics:new(1, []),
            First = #{data => Data, fin => Fin, deadline => macula_quic_call:deadline(Timeout), claim => Claim},
            Request = gen_server:send_request(ConnPid, {?MODULE, stream_send, Callback, First, StreamOpts}),
            await_sent(gen_server:wait_response(Request, Timeout), Request, Claim);
        {{ok, _}, {ok, _}} ->
            exit({calling_self, {?MODULE, stream_send, [ConnPid, Callback]}});
        {{error, _} = Error, _} ->
            Error;
        {_, Error} ->
            Error
    end.

await_sent({reply, Sent}, _Request, _Claim) ->
    Sent;
await_sent({error, _}, _Request, _Claim) ->
    {error, closed};
await_sent(timeout, Request, Claim) ->
    case macula_quic_stream:claim(Claim) of
        true ->
            %% What is said about it from now on is of no interest.
            _ = gen_server:receive_response(Request, 0),
            {error, timeout};
        false ->
            %% It is being sent, as long as there is time, so that how that ends is known at once.
            await_sent(gen_server:wait_response(Request, infinity), Request, Claim)
    end.

%%--------------------------------------------------------------------------------------------
%% The process

%% @private
-spec init(tuple()) -> {ok, state()} | {ok, state(), macula_quic_callback:action()} | {stop, term()} | ignore.
init({client, Callback, Host, Port, ConnOpts0, StreamOpts0}) ->
    process_flag(trap_exit, true),
    macula_quic_callback:start(fun() ->
        ok = good(macula_quic_callback:check(Callback, [{init, 1}])),
        ConnOpts = good(macula_quic_callback:options(ConnOpts0)),
        StreamOpts = good(stream_options(StreamOpts0)),
        {Known, Own} = good(macula_quic_options:split(connect, maps:remove(conn_callback, ConnOpts))),
        Timeout = good(timeout(connect_timeout_ms, 10000, Own)),
        _ = good(macula_quic_options:connect(Known)),
        State = state(Callback, ConnOpts, StreamOpts, Own),
        initialised(State, fun(Ready) ->
            Ready#{dialer := dial(Host, Port, Known, Timeout)}
        end)
    end);
init({server, Callback, Listener, ConnOpts0, StreamOpts0, {_, Pid} = By}) ->
    process_flag(trap_exit, true),
    macula_quic_callback:start(fun() ->
        ok = good(macula_quic_callback:check(Callback, [{init, 1}, {new_conn, 3}])),
        ConnOpts = good(macula_quic_callback:options(ConnOpts0)),
        StreamOpts = good(stream_options(StreamOpts0)),
        case macula_quic_options:split(listen, ConnOpts) of
            {ok, {[], Own}} ->
                State = (state(Callback, ConnOpts, StreamOpts, Own))#{
                    listener := Listener, sup := Pid, by := By, watched => monitor(process, Pid)},
                initialised(State, fun(Ready) ->
                    ok = good(macula_quic:async_accept(Listener, #{count => 1})),
                    Ready
                end);
            {ok, {[{Key, _} | _], _Own}} ->
                {stop, {shutdown, {bad_option, Key, listener_option}}};
            {error, Reason} ->
                {stop, {shutdown, Reason}}
        end
    end).

stream_options(Options) ->
    case macula_quic_callback:options(Options) of
        {ok, Map} ->
            %% Those of streams that have a process of their own are that one's.
            Role = case Map of #{stream_callback := _} -> accept_stream; _ -> arm_stream end,
            case macula_quic_options:stream(Role, known(Role, Map)) of
                {ok, _} -> stream_callback(Map);
                Error -> Error
            end;
        Error ->
            Error
    end.

known(Role, StreamOpts) ->
    {ok, {Known, _Own}} = macula_quic_options:split(Role, StreamOpts),
    maps:from_list(Known).

stream_callback(#{stream_callback := Module} = Map) ->
    case macula_quic_callback:check(Module, [{init_handoff, 4}]) of
        ok -> {ok, Map};
        Error -> Error
    end;
stream_callback(Map) ->
    {ok, Map}.

timeout(Key, Default, Own) ->
    case maps:get(Key, Own, Default) of
        infinity -> {ok, infinity};
        Ms when is_integer(Ms), Ms >= 0, Ms =< 16#ffffffff -> {ok, Ms};
        _ -> {error, {bad_option, Key, not_a_timeout}}
    end.

state(Callback, ConnOpts, StreamOpts, Own) ->
    Poll = case maps:get(poll_interval_ms, Own, 1000) of
        infinity -> infinity;
        Ms when is_integer(Ms), Ms >= 10, Ms =< 3600000 -> Ms;
        _ -> macula_quic_callback:refuse({bad_option, poll_interval_ms, not_an_interval})
    end,
    Linger = good(timeout(linger_ms, 30000, Own)),
    #{process => ?MODULE, listener => undefined, conn => undefined, callback => Callback, callback_state => undefined,
      sup => undefined, conn_opts => macula_quic_callback:hide(ConnOpts), stream_opts => StreamOpts,
      is_resumed => false, by => undefined, pending => [], waiting => none, dialer => undefined, early => [],
      streams => #{}, refused => #{}, up => false, ended => false, poll => Poll, linger => Linger,
      datagrams => 0}.

initialised(#{callback := Callback, conn_opts := ConnOpts, stream_opts := StreamOpts} = State, Ready) ->
    case macula_quic_callback:begin_with(Callback, init, [ConnOpts#{stream_opts => StreamOpts}]) of
        {ok, CbState} -> {ok, Ready(State#{callback_state := CbState})};
        {ok, CbState, {continue, Continue}} ->
            {ok, Ready(State#{callback_state := CbState}), {continue, {macula_quic_loop, Continue}}};
        {ok, CbState, Action} = Returned ->
            case macula_quic_callback:is_action(Action) of
                true ->
                    Waiting = macula_quic_callback:wait(Action),
                    {ok, Ready(State#{callback_state := CbState, waiting := Waiting}), Action};
                false ->
                    {stop, {bad_return_value, Returned}}
            end;
        {error, Reason, _CbState} -> {stop, {shutdown, Reason}};
        {stop, Reason} -> {stop, Reason};
        ignore -> ignore;
        Other -> {stop, {bad_return_value, Other}}
    end.

%% By another process: this one is there for its supervisor, and for calls, meanwhile. What the
%% connection has to say before it is given comes with it.
dial(Host, Port, Known, Timeout) ->
    Process = self(),
    spawn_link(fun() ->
        Result = case macula_quic:connect(Host, Port, Known, Timeout) of
            {ok, Conn} ->
                case macula_quic:controlling_process(Conn, Process) of
                    ok -> {ok, Conn};
                    Error -> Error
                end;
            Error ->
                Error
        end,
        Process ! {?MODULE, self(), Result}
    end).

%% @private
-spec handle_call(term(), gen_server:from(), state()) -> macula_quic_loop:result() | macula_quic_loop:reply().
handle_call({macula_quic_loop, get_handle}, _From, #{conn := Conn} = State) ->
    macula_quic_loop:go_on(Conn, State);
handle_call({?MODULE, stream_send, _, _, _}, _From, #{conn := Conn, up := Up, ended := Ended} = State)
  when Conn =:= undefined; Ended; not Up ->
    macula_quic_loop:go_on({error, closed}, State);
handle_call({?MODULE, stream_send, Callback, First, Opts}, From, #{conn := Conn, streams := Streams} = State) ->
    case macula_quic_stream:start_first(Callback, Conn, Opts, First#{from => From}) of
        {ok, Pid} -> macula_quic_loop:go_on(State#{streams := Streams#{Pid => From}});
        {error, Reason} -> macula_quic_loop:go_on({error, {start_stream, Reason}}, State)
    end;
handle_call(Request, From, State) ->
    macula_quic_loop:call(Request, From, State).

%% @private
-spec handle_cast(term(), state()) -> macula_quic_loop:result().
handle_cast(Request, State) ->
    event({handle_cast, [Request]}, State).

%% @private
-spec handle_continue(term(), state()) -> macula_quic_loop:result().
handle_continue({macula_quic_loop, Continue}, State) ->
    event({handle_continue, [Continue]}, State).

%% @private
-spec handle_info(term(), state()) -> macula_quic_loop:result().
handle_info({quic, new_conn, Conn, Info}, #{conn := undefined, by := By} = State)
  when By =/= undefined ->
    replace(By),
    macula_quic_loop:run(none, (unwatched(State))#{conn := Conn,
                                  pending := [{new_conn, [Conn, Info]}, {up, Info}]});
handle_info({?MODULE, Dialer, Result}, #{dialer := Dialer} = State) ->
    unlink(Dialer),
    receive {'EXIT', Dialer, _} -> ok after 0 -> ok end,
    dialled(Result, State#{dialer := undefined});
handle_info({'EXIT', Dialer, Reason}, #{dialer := Dialer} = State) ->
    dialled({error, Reason}, State#{dialer := undefined});
handle_info({quic, _, Handle, _} = Message, #{dialer := Dialer, early := Early} = State)
  when Dialer =/= undefined, is_reference(Handle) ->
    macula_quic_loop:go_on(State#{early := [Message | Early]});
handle_info({quic, stream_closed, Stream, _}, #{refused := Refused} = State) when is_map_key(Stream, Refused) ->
    macula_quic_loop:go_on(State#{refused := maps:remove(Stream, Refused)});
handle_info({quic, _, Stream, _}, #{refused := Refused} = State) when is_map_key(Stream, Refused) ->
    macula_quic_loop:go_on(State);
handle_info({quic, What, Conn, Detail} = Message, #{conn := Conn, ended := false} = State)
  when Conn =/= undefined, is_atom(What) ->
    told(What, Detail, Message, State);
handle_info({quic, new_stream, Stream, #{conn := Conn} = Props}, #{conn := Conn} = State) ->
    event({new_stream, [Stream, Props]}, State);
handle_info({'DOWN', Ref, process, _, _}, #{watched := Ref} = State) ->
    {stop, {shutdown, listener_down}, State};
handle_info({'EXIT', Pid, Reason}, #{streams := Streams} = State) when is_map_key(Pid, Streams) ->
    {Caller, Left} = maps:take(Pid, Streams),
    %% One that has its answer gets no other one. A crash has been reported by then.
    _ = [gen_server:reply(Caller, {error, {start_stream, cause(Reason)}}) || is_tuple(Caller)],
    linger(State#{streams := Left});
handle_info({macula_quic_stream, over, Pid}, #{streams := Streams} = State) when is_map_key(Pid, Streams) ->
    linger(State#{streams := Streams#{Pid := over}});
handle_info({timeout, Timer, linger}, #{lingering := {Timer, Reason}} = State) ->
    closed(Reason, none, State);
handle_info(Message, State) ->
    event({handle_info, [Message]}, State).

%% Why a process has ended, without its stack.
cause({shutdown, Reason}) -> Reason;
cause({Reason, [{M, F, _, _} | _]}) when is_atom(M), is_atom(F) -> Reason;
cause(Reason) -> Reason.

%% Another acceptor is to wait in the place of this one.
replace({keeper, Keeper}) ->
    gen_server:cast(Keeper, {taken, self()});
replace({supervisor, Sup}) ->
    %% Without waiting: the supervisor may be waiting for this process to end.
    _ = spawn(fun() -> supervisor:start_child(Sup, [Sup]) end),
    ok.

unwatched(#{watched := Ref} = State) ->
    demonitor(Ref, [flush]),
    maps:remove(watched, State).

dialled({ok, Conn}, #{early := Early} = State) ->
    Info = case macula_quic:info(Conn) of
        {ok, Known} -> Known;
        {error, _} -> #{}
    end,
    macula_quic_loop:run(none, State#{conn := Conn, early := [],
                     pending := [{up, Info} | [{message, M} || M <- lists:reverse(Early)]]});
%% Those that have come are of other handles of the process: of this connection nobody has any.
dialled({error, Reason}, #{early := Early} = State) ->
    macula_quic_loop:run(none, State#{ended := true, early := [],
                     pending := [{message, M} || M <- lists:reverse(Early)]
                                ++ [{transport_shutdown, [undefined, transport_props(Reason)]}, {ended, Reason}]}).

told(shutdown, {application_close, Code, _} = Reason, _Message, #{conn := Conn} = State) ->
    over([{shutdown, [Conn, Code]}], Reason, State);
told(transport_shutdown, Reason, _Message, #{conn := Conn} = State) ->
    over([{transport_shutdown, [Conn, transport_props(Reason)]}], Reason, State);
told(closed, Reason, _Message, State) ->
    over([], Reason, State);
told(dgram, Data, _Message, #{conn := Conn, datagrams := Left} = State) when Left > 0 ->
    event({dgram_recv, [Conn, Data, 0]}, datagram_taken(State));
%% The number of datagrams is spent, and the next was asked for with the last one.
told(passive, undefined, _Message, State) ->
    macula_quic_loop:run(none, State);
%% These callbacks do not wait for the native task that looks.
told(What, _Props, _Message, State) when What =:= connected; What =:= peer_cert_received ->
    macula_quic_loop:run(none, State);
told(What, Address, _Message, #{conn := Conn} = State)
  when What =:= peer_address_changed; What =:= local_address_changed ->
    macula_telemetry:tell(What, #{}, #{address => Address}),
    event({What, [Conn, Address]}, State);
told(streams_available, #{bidi_streams := Bidi, unidi_streams := Unidi}, _Message, #{conn := Conn} = State) ->
    event({streams_available, [Conn, {Bidi, Unidi}]}, State);
told(early_data, Outcome, _Message, #{listener := undefined, conn := Conn, pending := Pending} = State) ->
    Cert = cert_received(Conn, [], State),
    macula_quic_loop:run(none, State#{pending := Cert ++ [{early_data, [Conn, Outcome]} | Pending]});
told(What, Detail, Message, #{conn := Conn} = State) ->
    case lists:member(What, [resumed, early_data, nst_received, peer_needs_streams, dgram_state_changed]) of
        true when What =:= resumed -> event({What, [Conn, Detail]}, State#{is_resumed := true});
        true -> event({What, [Conn, Detail]}, State);
        false -> event({handle_info, [Message]}, State)
    end.

over(Events, Reason, #{pending := Pending} = State) ->
    macula_quic_loop:run(none, State#{ended := true, pending := Events ++ [{ended, Reason} | Pending]}).

%% What was asked for is taken before more is.
datagram_taken(#{datagrams := 1} = State) ->
    datagrams(State);
datagram_taken(#{datagrams := Left} = State) ->
    State#{datagrams := Left - 1}.

datagrams(#{conn := Conn} = State) ->
    case macula_quic:setopt(Conn, datagrams, ?DATAGRAMS) of
        ok -> State#{datagrams := ?DATAGRAMS};
        %% It is over.
        {error, _} -> State#{datagrams := 0}
    end.

transport_props(Reason) ->
    #{status => status(Reason), error => macula_quic_error:code(Reason), reason => Reason}.

status(Reason) when is_atom(Reason) -> Reason;
status(Reason) when is_tuple(Reason), is_atom(element(1, Reason)) -> element(1, Reason);
status(_) -> error.

%%--------------------------------------------------------------------------------------------
%% Events: one after the other, each with the state that the one before has left

event(Event, State) ->
    event(Event, none, State).

%% @private
-spec event(event(), none | macula_quic_callback:action(), state()) -> macula_quic_loop:result().
event({message, Message}, _Action, State) ->
    handle_info(Message, State);
event({up, Info}, Action, #{conn := Conn, pending := Pending} = State) ->
    begun(Info, State),
    Known = known_at_first(Info, State),
    Connected = {connected, [Conn, connected_props(Known)]},
    Cert = case Known of
        #{peercert := Der} when is_binary(Der) -> cert_received(Conn, [Der], State);
        _ -> []
    end,
    macula_quic_loop:run(Action, State#{up := true, is_resumed := maps:get(resumed, Known, false),
                                        pending := Cert ++ [Connected, arm | Pending]});
event(arm, Action, State) ->
    tell_changes(State),
    macula_quic_loop:run(Action, take_datagrams(take_streams(State)));
event({ended, Reason}, Action, #{linger := Linger} = State) ->
    macula_telemetry:ended(Reason),
    case has_open_streams(State) of
        false ->
            closed(Reason, Action, State);
        true ->
            Timer = case Linger of
                infinity -> none;
                _ -> erlang:start_timer(Linger, self(), linger)
            end,
            macula_quic_loop:run(Action, State#{lingering => {Timer, Reason}})
    end;
event(Event, Action, State) ->
    macula_quic_loop:event(Event, Action, State).

%% The processes of streams have what arrived before the connection's end, and after it the end of the stream.
has_open_streams(#{streams := Streams}) ->
    lists:any(fun(Caller) -> Caller =/= over end, maps:values(Streams)).

linger(#{lingering := {Timer, Reason}} = State) ->
    case has_open_streams(State) of
        false ->
            _ = [erlang:cancel_timer(Timer) || Timer =/= none],
            closed(Reason, none, State);
        true ->
            macula_quic_loop:go_on(State)
    end;
linger(State) ->
    macula_quic_loop:go_on(State).

closed(Reason, Action, #{conn := Conn, up := Up} = State) ->
    event({closed, [Conn, closed_props(Reason, Up)]}, Action, maps:remove(lingering, State)).

%% @private
-spec missing(atom(), [term()], none | macula_quic_callback:action(), state()) -> macula_quic_loop:result().
missing(closed, [_Conn, #{reason := normal}], _Action, State) ->
    {stop, normal, State};
missing(closed, [_Conn, #{reason := Reason}], _Action, State) ->
    {stop, {shutdown, Reason}, State};
missing(new_stream, [Stream, Props], Action, #{stream_opts := #{stream_callback := Module} = Opts} = State) ->
    #{conn := Conn, streams := Streams, refused := Refused} = State,
    case macula_quic_stream:start_child(Module, Stream, Conn, maps:remove(stream_callback, Opts), Props) of
        {ok, Pid} ->
            macula_quic_loop:run(Action, State#{streams := Streams#{Pid => none}});
        {error, Reason} ->
            %% The peer is told, as far as its stream is concerned.
            {Code, _Text} = macula_quic_callback:refusal(Reason),
            _ = macula_quic:async_shutdown_stream(Stream, abort, Code),
            _ = macula_quic:close_stream(Stream),
            macula_quic_loop:run(Action, State#{refused := Refused#{Stream => true}})
    end;
missing(Name, Args, Action, State) ->
    macula_quic_loop:missing(Name, Args, Action, State).

%% A client that has sent early data has its connection before the handshake is done. What that shows it may
%% know by now, or not: it comes behind `connected' either way, with `early_data'.
known_at_first(#{early_data := Early} = Info, #{listener := undefined}) when Early =/= none ->
    Info#{resumed := false, peercert := undefined, negotiated_protocol := undefined};
known_at_first(Info, _State) ->
    Info.

%% What the peer has shown, for a callback that wants to know: the native task is asked for the chain. If the connection
%% is over meanwhile, what is known of it counts.
cert_received(Conn, Known, #{callback := Callback}) ->
    Shown = case macula_quic_callback:has(Callback, peer_cert_received, 3) andalso macula_quic:peercerts(Conn) of
        {ok, Chain} -> Chain;
        {error, _} -> Known;
        false -> []
    end,
    [{peer_cert_received, [Conn, #{cert => hd(Shown), chain => Shown}]} || Shown =/= []].

begun(Info, #{callback := Callback, listener := Listener}) ->
    Known = maps:with([peername, sockname, negotiated_protocol, server_name], Info),
    macula_telemetry:begun([macula, quic, connection], {up, down}, Known#{
        callback => Callback, connection => self(),
        side => case Listener of undefined -> client; _ -> server end}).

connected_props(Info) ->
    Protocol = maps:get(negotiated_protocol, Info, undefined),
    Props = maps:with([peername, sockname, negotiated_protocol, server_name, peercert], Info),
    Props#{is_resumed => maps:get(resumed, Info, false),
           alpns => case Protocol of undefined -> undefined; _ -> binary_to_list(Protocol) end}.

closed_props(Reason, Up) ->
    #{is_handshake_completed => Up, is_app_closing => Reason =:= normal,
      is_peer_acked => is_tuple(Reason) andalso element(1, Reason) =:= application_close,
      reason => Reason}.

%% A connection that is over already says so by its last message.
take_streams(#{conn := Conn, callback := Callback, stream_opts := StreamOpts} = State) ->
    case {macula_quic_callback:has(Callback, new_stream, 3), StreamOpts} of
        {true, _} -> take_streams(Conn, maps:with([active], known(arm_stream, StreamOpts)));
        %% Active with the process that will have it.
        {false, #{stream_callback := _}} -> take_streams(Conn, #{active => false});
        {false, _} -> ok
    end,
    State.

take_streams(Conn, Options) ->
    case macula_quic:async_accept_stream(Conn, Options) of
        ok -> ok;
        {error, closed} -> ok
    end.

tell_changes(#{conn := Conn, callback := Callback, poll := Poll}) ->
    case [Name || {Name, Arity} <- ?TOLD_ON_REQUEST, macula_quic_callback:has(Callback, Name, Arity)] of
        [] -> ok;
        _ -> ok = macula_quic:tell_changes(Conn, Poll)
    end.

take_datagrams(#{callback := Callback} = State) ->
    case macula_quic_callback:has(Callback, dgram_recv, 4) of
        true -> datagrams(State);
        false -> State
    end.

%% @private
-spec terminate(term(), state()) -> term().
terminate(Reason, #{callback := Callback, callback_state := CbState, dialer := Dialer} = State) ->
    _ = [exit(Dialer, kill) || is_pid(Dialer)],
    macula_telemetry:ended(Reason),
    %% One that cannot be loaded has been the reason, which stands.
    try macula_quic_callback:exports(Callback, terminate, 2) =:= true andalso Callback:terminate(Reason, CbState)
    after
        tell_keeper(Reason, State),
        close(Reason, State)
    end.

%% Why an acceptor has ended without a connection.
tell_keeper(Reason, #{conn := undefined, by := {keeper, Keeper}}) ->
    gen_server:cast(Keeper, {ended, self(), Reason});
tell_keeper(_Reason, _State) ->
    ok.

close(_Reason, #{conn := Conn, ended := Ended}) when Conn =:= undefined; Ended ->
    ok;
close(Reason, #{conn := Conn} = State) ->
    {Code, Text} = case State of
        #{close := Close} -> Close;
        _ -> macula_quic_callback:close_code(Reason)
    end,
    macula_quic:close_connection(Conn, Code, Text).

%% @private
-spec code_change(term(), state(), term()) -> {ok, state()} | {error, term()}.
code_change(OldVsn, State, Extra) ->
    macula_quic_loop:code_change(OldVsn, State, Extra).

%% @private
-spec format_status(gen_server:format_status()) -> gen_server:format_status().
format_status(#{state := #{callback := Callback, callback_state := CbState} = State} = Status) ->
    Shown = case macula_quic_callback:has(Callback, format_status, 1) of
        true -> Callback:format_status(CbState);
        false -> CbState
    end,
    Status#{state := State#{callback_state := Shown}};
format_status(Status) ->
    Status.
