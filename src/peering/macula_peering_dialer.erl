%% @doc Keeps a link to one peer: dials, and dials again when the link is lost, with a delay that
%% grows from attempt to attempt and is drawn from a range, so that many do not come at once.
%% @private
-module(macula_peering_dialer).
-behaviour(gen_server).

-export([start_link/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, handle_continue/2, terminate/2]).

-type state() :: #{
    opts := macula_peering_opts:opts(),
    owner := pid(),
    owner_ref := reference(),
    worker := undefined | pid(),
    attempt := non_neg_integer(),
    %% The delay before the present dial, and since when the link stands.
    delay := non_neg_integer(),
    since := undefined | integer(),
    timer := undefined | gave_up | reference()
}.

-spec start_link(macula_peering_opts:opts()) -> {ok, pid()} | {error, term()}.
start_link(Opts) ->
    case gen_server:start_link(?MODULE, Opts, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

-spec init(macula_peering_opts:opts()) ->
    {ok, state(), {continue, dial}} | {stop, {shutdown, not_started}}.
init(#{controlling_pid := Owner} = Opts) ->
    process_flag(trap_exit, true),
    case macula_peering_links:watch_dialer(self(), Owner) of
        ok ->
            {ok, #{opts => Opts, owner => Owner, owner_ref => monitor(process, Owner),
                   worker => undefined, attempt => 0, delay => 0, since => undefined,
                   timer => undefined},
             {continue, dial}};
        {error, Reason} ->
            {stop, {shutdown, Reason}}
    end.

-spec handle_continue(dial, state()) -> {noreply, state()}.
handle_continue(dial, State) ->
    {noreply, dial(State)}.

dial(#{opts := Opts, attempt := Attempt} = State) ->
    case macula_peering_sup:start_child(macula_peering_conn,
                                        {client, Opts#{dialer => self()}}) of
        {ok, Pid} ->
            macula_peering_links:alias(self(), Pid, Attempt + 1),
            State#{worker := Pid, attempt := Attempt + 1, since := undefined, timer := undefined};
        {error, Reason} ->
            retry(Reason, State#{attempt := Attempt + 1, worker := undefined})
    end.

retry(Reason, #{opts := #{reconnect := #{max_attempts := Max}}, attempt := Attempt,
                owner := Owner} = State) when is_integer(Max), Attempt >= Max ->
    Owner ! {macula_peering, gave_up, self(), #{attempts => Attempt, reason => Reason}},
    State#{timer := gave_up};
retry(Reason, #{opts := #{reconnect := Reconnect}, attempt := Attempt, owner := Owner} = State) ->
    Delay = delay(Attempt, Reconnect),
    Owner ! {macula_peering, reconnecting, self(),
             #{attempt => Attempt + 1, delay_ms => Delay, reason => Reason}},
    State#{delay := Delay, timer := erlang:start_timer(Delay, self(), dial)}.

delay(Attempt, #{min_delay_ms := Min, max_delay_ms := Max, factor := Factor, jitter := Jitter}) ->
    Grown = grown(min(Min, Max), max(0, Attempt - 1), Factor, Max),
    round(Grown * (1 - Jitter * rand:uniform())).

%% By steps, so that no power leaves the range of numbers; nor does a step, as a factor over Max reaches Max.
grown(Delay, Steps, Factor, Max) when Steps =:= 0; Delay >= Max; Factor == 1 -> min(Delay, Max);
grown(Delay, Steps, Factor, Max) -> grown(Delay * min(Factor, Max), Steps - 1, Factor, Max).

%% A link that stood for less than the wait before it has proved nothing: one that is ended again
%% and again as soon as it stands, as by a station that does not want it, is dialled less and less.
proved(#{since := Since, delay := Delay} = State) when is_integer(Since) ->
    case erlang:monotonic_time(millisecond) - Since >= Delay of
        true -> State#{attempt := 0};
        false -> State
    end;
proved(State) ->
    State.

-spec handle_call(term(), gen_server:from(), state()) -> {reply, term(), state()}.
handle_call({controlling_process, Caller, New}, _From, #{owner := Caller} = State) ->
    #{owner_ref := Ref, opts := Opts, worker := Worker} = State,
    case hand_worker(Worker, Caller, New) of
        ok ->
            demonitor(Ref, [flush]),
            macula_peering_links:alias_owner(self(), New),
            {reply, ok, State#{owner := New, owner_ref := monitor(process, New),
                               opts := Opts#{controlling_pid := New}}};
        {error, Reason} ->
            {reply, {error, Reason}, State}
    end;
handle_call({controlling_process, _, _}, _From, State) ->
    {reply, {error, not_owner}, State};
handle_call(Request, _From, State)
  when Request =:= close_listener; Request =:= sockname; Request =:= info ->
    {reply, {error, badarg}, State};
handle_call(_, _From, State) ->
    {reply, {error, not_connected}, State}.

%% One that is ending tells its old owner; the next one has the new. One that has been given to somebody
%% else is not the caller's to give.
hand_worker(undefined, _, _) ->
    ok;
hand_worker(Worker, Caller, New) ->
    case macula_peering:controlling_process(Worker, Caller, New) of
        {error, not_connected} -> ok;
        Answer -> Answer
    end.

-spec handle_cast(term(), state()) -> {noreply, state()} | {stop, normal, state()}.
handle_cast({close, Reason}, #{worker := Pid} = State) when is_pid(Pid) ->
    gen_statem:cast(Pid, {close, Reason}),
    {stop, normal, State#{worker := undefined}};
handle_cast({close, _}, State) ->
    {stop, normal, State};
handle_cast(_, State) ->
    {noreply, State}.

-spec handle_info(term(), state()) -> {noreply, state()} | {stop, term(), state()}.
handle_info({macula_peering, handshake_complete, Pid, _}, #{worker := Pid} = State) ->
    {noreply, State#{since := erlang:monotonic_time(millisecond)}};
handle_info({macula_peering, disconnected, Pid, Reason}, #{worker := Pid} = State) ->
    macula_peering_links:alias(self(), undefined, maps:get(attempt, State)),
    case retry(Reason, proved(State#{worker := undefined})) of
        #{timer := gave_up} = Last -> {stop, normal, Last};
        Next -> {noreply, Next}
    end;
handle_info({'DOWN', Ref, process, _, _}, #{owner_ref := Ref} = State) ->
    %% The worker watches its owner itself.
    {stop, normal, State#{worker := undefined}};
handle_info({timeout, Timer, dial}, #{timer := Timer} = State) ->
    {noreply, dial(State)};
handle_info({'EXIT', _, shutdown}, #{worker := Pid} = State) when is_pid(Pid) ->
    %% Not the supervisor's, which gets no message of it: the link is to end with this process.
    handle_cast({close, undefined}, State);
handle_info({'EXIT', _, Reason}, State) ->
    {stop, Reason, State};
handle_info(_, State) ->
    {noreply, State}.

-spec terminate(term(), state()) -> ok.
terminate(shutdown, #{worker := undefined, owner := Owner, attempt := Attempt}) ->
    %% Nobody else tells: there is no link now.
    Owner ! {macula_peering, gave_up, self(), #{attempts => Attempt, reason => shutdown}},
    macula_peering_links:unalias(self());
terminate(shutdown, _) ->
    %% The application stops. The supervisor of the workers, whose turn is next, ends this one with the reason.
    macula_peering_links:unalias(self());
terminate(normal, #{worker := Worker}) ->
    _ = [gen_statem:cast(Pid, {close, undefined}) || Pid <- [Worker], is_pid(Pid)],
    macula_peering_links:unalias(self());
terminate(_, _) ->
    %% A failure is told, and the worker ended, as if this process had been killed.
    ok.
