%% @doc Events for users of the application `telemetry', where that is there. Nothing here needs it: as long as its
%% module is not loaded nobody can have attached a handler, and nothing is done.
%%
%% Handlers run in a process of their own for each listener, connection and link, the witness, so that a handler that
%% is slow, or fails, disturbs nothing. The witness outlives what it watches, and so tells every end.
%% @private
-module(macula_telemetry).

-export([begun/3, tell/3, ended/1]).
-export([witness/5, look/1]).

-export_type([subject/0]).

-type subject() :: [atom()].
%% The beginning of an event's name: `[macula, quic, connection]'.

%% Events that may wait for a handler. Further ones are counted.
-define(WAITING, 100).

%% @doc This process serves something that begins with the event `Begin', and ends with `End'.
-spec begun(subject(), {Begin :: atom(), End :: atom()}, map()) -> ok.
begun(Subject, Names, Metadata) ->
    case is_wanted() of
        true ->
            Counts = atomics:new(2, []),
            Now = erlang:monotonic_time(),
            Arguments = [self(), Subject, Names, Metadata, {Now, Counts}],
            _ = put(?MODULE, {spawn(?MODULE, witness, Arguments), Counts}),
            ok;
        false ->
            ok
    end.

%% @doc Something has happened to what this process serves.
-spec tell(atom(), map(), map()) -> ok.
tell(Name, Measurements, Metadata) ->
    case get(?MODULE) of
        undefined ->
            ok;
        {Witness, Counts} ->
            case atomics:add_get(Counts, 1, 1) of
                N when N =< ?WAITING ->
                    Witness ! {?MODULE, Name, Measurements, Metadata},
                    ok;
                _ ->
                    ok = atomics:sub(Counts, 1, 1),
                    atomics:add(Counts, 2, 1)
            end
    end.

%% @doc What this process serves has ended.
-spec ended(term()) -> ok.
ended(Reason) ->
    case erase(?MODULE) of
        undefined ->
            ok;
        {Witness, _} ->
            Witness ! {?MODULE, ended, Reason},
            ok
    end.

is_wanted() ->
    erlang:function_exported(telemetry, execute, 3).

%% @private
-spec witness(pid(), subject(), {atom(), atom()}, map(), {integer(), atomics:atomics_ref()}) -> no_return().
witness(Pid, Subject, {Begin, End}, Metadata, {Since, Counts}) ->
    Ref = monitor(process, Pid),
    await_start(),
    execute(Subject ++ [Begin], #{monotonic_time => Since, system_time => erlang:system_time()}, Metadata),
    wait(#{ref => Ref, subject => Subject, ending => End, metadata => Metadata, since => Since, counts => Counts}).

%% Links may be made before the applications are started, `telemetry' among them.
await_start() ->
    case init:get_status() of
        {starting, Progress} when Progress =/= started -> receive after 100 -> await_start() end;
        _ -> ok
    end.

%% In hibernation the process is no obstacle to loading this module anew.
-spec wait(map()) -> no_return().
wait(State) ->
    erlang:hibernate(?MODULE, look, [State]).

%% @private
-spec look(map()) -> no_return() | ok.
look(#{ref := Ref, subject := Subject, metadata := Known, counts := Counts} = State) ->
    receive
        {?MODULE, Name, Measurements, Metadata} ->
            ok = atomics:sub(Counts, 1, 1),
            Lost = atomics:exchange(Counts, 2, 0),
            execute(Subject ++ [Name], Measurements#{lost => Lost}, maps:merge(Known, Metadata)),
            wait(State);
        {?MODULE, ended, Reason} ->
            finish(Reason, State);
        {'DOWN', Ref, process, _, Reason} ->
            finish(Reason, State);
        _ ->
            wait(State)
    end.

finish(Reason, #{subject := Subject, ending := End, metadata := Known, since := Since}) ->
    Now = erlang:monotonic_time(),
    execute(Subject ++ [End], #{duration => Now - Since, monotonic_time => Now, system_time => erlang:system_time()},
            Known#{reason => Reason}).

%% `telemetry' sees to handlers that fail; this does, where it is something else. The module's name is not written as
%% a call's, so that nothing takes it for a dependency.
execute(Event, Measurements, Metadata) ->
    Telemetry = telemetry,
    try
        _ = Telemetry:execute(Event, Measurements, Metadata),
        ok
    catch
        Class:Reason ->
            logger:warning(#{what => telemetry_failed, event => Event, class => Class, reason => Reason},
                           #{macula => telemetry, report_cb => fun failed/1})
    end.

failed(#{event := Event, class := Class, reason := Reason}) ->
    {"macula: the telemetry event ~0tp has failed: ~0tp ~0tP", [Event, Class, Reason, 9]}.
