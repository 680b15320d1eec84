%% @doc Owns a listener of `macula_quic_connection' and keeps acceptors ready.
%%
%% An acceptor says when it has a connection, and is replaced. A connection's end makes room where their number is
%% limited. An acceptor that cannot be started, or ends before it has a connection, has failed: another one is started
%% after a pause, which grows with each failure. The listener and its connections do not end for it.
%% @private
-module(macula_quic_acceptor).
-behaviour(gen_server).

-export([start_link/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

%% Milliseconds between tries to start acceptors, the first one and the longest. An acceptor that has lived for the
%% longest is as good as one that was given a connection: it does not make the pause grow.
-define(PAUSE, 50).
-define(LONGEST_PAUSE, 5000).

-type state() :: #{
    sup := pid(),
    listener := macula_quic:listener(),
    listen_on := term(),
    %% Behind a fun, as keys and passwords are among them: whoever looks at the state, or at a report, sees none.
    listen_opts := fun(() -> [{atom(), term()}]),
    callback := module(),
    conn_opts := map(),
    stream_opts := macula_quic_connection:stream_opts(),
    acceptors := pos_integer(),
    max_connections := pos_integer() | infinity,
    locked := boolean(),
    %% When an acceptor has failed: the timer of the next try, and the pause before the one after it.
    retry := none | reference(),
    pause := pos_integer(),
    %% With the monotonic time of the acceptor's start.
    waiting := #{pid() => {reference(), integer()}},
    connected := #{pid() => reference()}
}.

%% @doc Starts a listener with its acceptors.
-spec start_link(macula_quic_connection:listener_opts()) -> {ok, pid()} | {error, term()}.
start_link(Options) ->
    case gen_server:start_link(?MODULE, Options, []) of
        {ok, Pid} -> {ok, Pid};
        {error, {shutdown, Reason}} -> {error, Reason};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

%% @private
-spec init(macula_quic_connection:listener_opts()) -> {ok, state()} | {stop, term()}.
init(Options) ->
    process_flag(trap_exit, true),
    case checked(Options) of
        {ok, State} -> listening(State);
        {error, Reason} -> {stop, {shutdown, Reason}}
    end.

checked(Options) ->
    Known = [id, callback, listen_on, listen_opts, conn_opts, stream_opts, acceptors, max_connections,
             shutdown_ms],
    case {maps:keys(maps:without(Known, Options)), conn_opts(maps:get(conn_opts, Options, #{}))} of
        {[Key | _], _} ->
            {error, {bad_option, Key, unknown}};
        {[], {error, _} = Error} ->
            Error;
        {[], {ok, {ForListener, Own}}} ->
            Wanted = [{acceptors, 16, fun positive/1}, {max_connections, infinity, fun bound/1},
                      {shutdown_ms, 5000, fun milliseconds/1}],
            Values = [{Key, maps:get(Key, Options, Default), Check} || {Key, Default, Check} <- Wanted],
            case {[Key || {Key, Value, Check} <- Values, not Check(Value)],
                  macula_quic_options:split(listen, maps:get(listen_opts, Options, #{}))} of
                {[Key | _], _} -> {error, {bad_option, Key, not_a_number}};
                {[], {error, _} = Error} -> Error;
                {[], {ok, {_, Unknown}}} when map_size(Unknown) > 0 ->
                    {error, {bad_option, hd(maps:keys(Unknown)), unknown}};
                {[], {ok, {ListenOpts, _}}} ->
                    callback(Options, Own, #{
                        listen_on => maps:get(listen_on, Options, undefined),
                        %% Later ones override.
                        listen_opts => veiled(ListenOpts ++ ForListener),
                        stream_opts => maps:get(stream_opts, Options, #{}),
                        locked => false, retry => none, pause => ?PAUSE,
                        waiting => #{}, connected => #{}}, Values)
            end
    end.

veiled(Opts) -> fun() -> Opts end.

%% What names the module is no option of a listener.
conn_opts(ConnOpts) when is_map(ConnOpts) ->
    case macula_quic_options:split(listen, maps:remove(conn_callback, ConnOpts)) of
        {ok, {ForListener, Own}} -> {ok, {ForListener, maps:merge(Own, maps:with([conn_callback], ConnOpts))}};
        Error -> Error
    end;
conn_opts(ConnOpts) ->
    try conn_opts(maps:from_list(proplists:unfold(ConnOpts)))
    catch error:_ -> {error, {bad_option, conn_opts, not_a_list}}
    end.

callback(Options, Own, State, Values) ->
    case maps:get(callback, Options, maps:get(conn_callback, Own, undefined)) of
        undefined ->
            {error, {bad_option, callback, missing}};
        Callback ->
            Numbers = maps:from_list([{Key, Value} || {Key, Value, _} <- Values]),
            {ok, maps:merge(Numbers, State#{callback => Callback,
                                            conn_opts => maps:remove(conn_callback, Own)})}
    end.

positive(N) -> is_integer(N) andalso N > 0 andalso N =< 100000.
bound(N) -> N =:= infinity orelse (is_integer(N) andalso N > 0).
milliseconds(N) -> is_integer(N) andalso N >= 0 andalso N =< 16#ffffffff.

%% The first acceptors find what is wrong with the callback module.
listening(#{shutdown_ms := ShutdownMs} = State0) ->
    case listen(State0) of
        {ok, Listener} ->
            {ok, Sup} = macula_quic_acceptor_sup:start_link(ShutdownMs),
            State = (maps:remove(shutdown_ms, State0))#{listener => Listener, sup => Sup},
            case fill(State) of
                {ok, Filled} ->
                    begun(Filled),
                    {ok, Filled};
                {error, Reason, _} ->
                    stop_all(Sup),
                    {stop, {shutdown, Reason}}
            end;
        {error, Reason} ->
            {stop, {shutdown, Reason}}
    end.

begun(#{listener := Listener, callback := Callback}) ->
    Known = #{callback => Callback, listener => self()},
    macula_telemetry:begun([macula, quic, listener], {start, stop}, case macula_quic:sockname(Listener) of
        {ok, Address} -> Known#{sockname => Address};
        {error, _} -> Known
    end).

listen(#{listen_on := undefined}) -> {error, {bad_option, listen_on, missing}};
listen(#{listen_on := On, listen_opts := Opts}) -> macula_quic:listen(On, Opts()).

fill(#{waiting := Waiting, connected := Connected, acceptors := Wanted, max_connections := Max} = State) ->
    Ready = map_size(Waiting),
    %% An integer is less than an atom.
    case Ready < Wanted andalso Ready + map_size(Connected) < Max of
        true ->
            #{sup := Sup, listener := Listener, callback := Callback, conn_opts := ConnOpts,
              stream_opts := StreamOpts} = State,
            case supervisor:start_child(Sup, [Listener, Callback, {ConnOpts, StreamOpts}, {keeper, self()}]) of
                {ok, Pid} when is_pid(Pid) ->
                    fill(State#{waiting := Waiting#{Pid => {monitor(process, Pid), now_ms()}}});
                {ok, undefined} -> {error, ignore, State};
                {error, Reason} -> {error, Reason, State}
            end;
        false ->
            {ok, State}
    end.

%% @private
-spec handle_call(term(), gen_server:from(), state()) -> {reply, term(), state()}.
handle_call(get_listener, _From, #{listener := Listener} = State) ->
    {reply, Listener, State};
%% What is changed counts for a listener that takes the place of this one, too.
handle_call({set_locked, Lock}, _From, #{listener := Listener} = State) ->
    case set_locked(Listener, Lock) of
        ok -> {reply, ok, State#{locked := Lock}};
        Error -> {reply, Error, State}
    end;
handle_call({reload, Veiled}, _From, #{listener := Listener, listen_opts := Old} = State) ->
    Options = Veiled(),
    case macula_quic:reload(Listener, Options) of
        ok -> {reply, ok, State#{listen_opts := veiled(macula_quic_options:reloaded(Options, Old()))}};
        Error -> {reply, Error, State}
    end;
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
-spec handle_cast(term(), state()) -> {noreply, state()} | {stop, term(), state()}.
handle_cast({taken, Pid}, #{waiting := Waiting, connected := Connected} = State) ->
    case maps:take(Pid, Waiting) of
        {{Ref, _Since}, Left} -> proved(State#{waiting := Left, connected := Connected#{Pid => Ref}});
        %% It has ended since.
        error -> {noreply, State}
    end;
%% Its 'DOWN' would say `noproc' where it has ended before it was watched.
handle_cast({ended, Pid, Reason}, #{waiting := Waiting} = State) ->
    case maps:take(Pid, Waiting) of
        {{Ref, Since}, Left} ->
            demonitor(Ref, [flush]),
            ended(now_ms() - Since, Reason, State#{waiting := Left});
        error ->
            {noreply, State}
    end;
handle_cast(_Request, State) ->
    {noreply, State}.

%% @private
-spec handle_info(term(), state()) -> {noreply, state()} | {stop, term(), state()}.
handle_info({'DOWN', _, process, Pid, Reason}, #{waiting := Waiting, connected := Connected} = State) ->
    case maps:take(Pid, Waiting) of
        {{_Ref, Since}, Left} -> ended(now_ms() - Since, Reason, State#{waiting := Left});
        error -> filled(State#{connected := maps:remove(Pid, Connected)})
    end;
handle_info({timeout, Timer, fill}, #{retry := Timer} = State) ->
    filled(State#{retry := none});
handle_info({quic, listener_stopped, Listener, Why}, #{listener := Listener} = State) ->
    again(Why, State);
handle_info({'EXIT', Sup, Reason}, #{sup := Sup} = State) ->
    {stop, Reason, State};
handle_info(_Message, State) ->
    {noreply, State}.

set_locked(Listener, true) -> macula_quic:lock(Listener);
set_locked(Listener, false) -> macula_quic:unlock(Listener).

%% An acceptor has ended before it had a connection.
ended(Lived, _Reason, State) when Lived >= ?LONGEST_PAUSE -> proved(State);
ended(_Lived, Reason, State) -> failed(Reason, State).

%% Acceptors work, so that the next one is started at once.
proved(#{retry := none} = State) ->
    filled(State#{pause := ?PAUSE});
proved(#{retry := Timer} = State) ->
    %% A timeout that is on its way is no longer the one of the state.
    _ = erlang:cancel_timer(Timer),
    filled(State#{retry := none, pause := ?PAUSE}).

%% What makes room while a try is due waits for it.
filled(#{retry := Timer} = State) when Timer =/= none ->
    {noreply, State};
filled(State) ->
    case fill(State) of
        {ok, Filled} -> {noreply, Filled};
        {error, Reason, Filled} -> failed(Reason, Filled)
    end.

%% Several acceptors that fail together, as where all need the same thing, are one failure.
failed(_Reason, #{retry := Timer} = State) when Timer =/= none ->
    {noreply, State};
failed(Reason, #{pause := Pause, callback := Callback} = State) ->
    logger:warning(#{what => quic_acceptor_failed, callback => Callback, reason => Reason},
                   #{macula => quic, report_cb => fun report/1}),
    Timer = erlang:start_timer(Pause, self(), fill),
    {noreply, State#{retry := Timer, pause := min(2 * Pause, ?LONGEST_PAUSE)}}.

report(#{callback := Callback, reason := Reason}) ->
    {"macula: an acceptor with the callbacks of ~0tp could not be started, or has ended without a connection "
     "(~0tP), and another one is started later", [Callback, Reason, 9]}.

now_ms() ->
    erlang:monotonic_time(millisecond).

%% Listens again where it did; those that wait at the old listener wait for nothing, and end for no failure of theirs.
again(Why, #{listen_on := On, listener := Old, sup := Sup, waiting := Waiting, locked := Locked} = State) ->
    logger:warning(#{what => quic_listener_stopped, listen_on => On, reason => Why},
                   #{macula => quic, report_cb => fun stopped/1}),
    Where = case {On, macula_quic:sockname(Old)} of
        {0, {ok, {_, Port}}} -> Port;
        {{Address, 0}, {ok, {_, Port}}} -> {Address, Port};
        _ -> On
    end,
    case listen(State#{listen_on := Where}) of
        {ok, Listener} ->
            _ = set_locked(Listener, Locked),
            macula_telemetry:ended(Why),
            begun(State#{listener := Listener}),
            _ = [demonitor(Ref, [flush]) || {Ref, _Since} <- maps:values(Waiting)],
            _ = [supervisor:terminate_child(Sup, Pid) || Pid <- maps:keys(Waiting)],
            filled(State#{listener := Listener, waiting := #{}});
        {error, Reason} ->
            {stop, {listener_stopped, Reason}, State}
    end.

stopped(#{listen_on := On, reason := Why}) ->
    {"macula: the listener on ~0tp has stopped (~0tp), and is started again", [On, Why]}.

%% @private
-spec terminate(term(), state()) -> ok.
terminate(Reason, #{listener := Listener, sup := Sup}) ->
    macula_telemetry:ended(Reason),
    _ = macula_quic:close_listener(Listener),
    stop_all(Sup).

stop_all(Sup) ->
    Ref = monitor(process, Sup),
    exit(Sup, shutdown),
    receive {'DOWN', Ref, process, Sup, _} -> ok end.
