%% A stand-in for the module `telemetry': its handler is a function, which a test chooses.
-module(macula_test_telemetry).

-export([load/1, unload/0, record/0, recorded/0, execute/3]).

%% @doc Loads the stand-in; `Handler' gets each event as a tuple.
-spec load(fun(({[atom()], map(), map()}) -> term())) -> ok.
load(Handler) ->
    persistent_term:put(?MODULE, Handler),
    Vars = [{var, 1, V} || V <- ['E', 'M', 'D']],
    Call = {call, 1, {remote, 1, {atom, 1, ?MODULE}, {atom, 1, execute}}, Vars},
    Forms = [{attribute, 1, module, telemetry}, {attribute, 1, export, [{execute, 3}]},
             {function, 1, execute, 3, [{clause, 1, Vars, [], [Call]}]}],
    {ok, telemetry, Code} = compile:forms(Forms, []),
    {module, telemetry} = code:load_binary(telemetry, "telemetry", Code),
    ok.

%% @doc Takes the stand-in away again.
-spec unload() -> ok.
unload() ->
    _ = [code:purge(telemetry) || code:delete(telemetry)],
    ok.

%% @doc As `load/1', with a handler that keeps the events.
-spec record() -> ok.
record() ->
    case ets:whereis(?MODULE) of
        undefined -> keep();
        Table -> ets:delete_all_objects(Table)
    end,
    load(fun(Event) -> ets:insert(?MODULE, {erlang:unique_integer([monotonic]), Event}) end).

%% The table's owner lives on behind the case, and behind a call from another node.
keep() ->
    Self = self(),
    Keeper = spawn(fun() ->
        ?MODULE = ets:new(?MODULE, [named_table, public, ordered_set]),
        Self ! {self(), ready},
        receive stop -> ok end
    end),
    receive {Keeper, ready} -> ok end.

%% @doc The events so far.
-spec recorded() -> [{[atom()], map(), map()}].
recorded() ->
    [Event || {_, Event} <- ets:tab2list(?MODULE)].

%% @doc What the stand-in calls.
-spec execute([atom()], map(), map()) -> term().
execute(Event, Measurements, Metadata) ->
    (persistent_term:get(?MODULE))({Event, Measurements, Metadata}).
