%% @doc Remembers the handshake frames seen lately, so that a captured one is not taken twice.
%%
%% Two generations of a bounded size: what is in neither is taken for new. Times here are
%% monotonic, so a clock that is set has no effect.
%% @private
-module(macula_peering_replay).
-behaviour(gen_server).

-export([create/0, start_link/0, first_time/1, cover/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-define(TABLES, [macula_peering_seen_a, macula_peering_seen_b]).
%% A row takes about 150 bytes.
-define(MAX_ROWS, 100_000).
-define(KEEP_MS, 300_000).

-spec create() -> ok.
create() ->
    [Table = ets:new(Table, [named_table, public, {write_concurrency, true}])
     || Table <- ?TABLES, ets:whereis(Table) =:= undefined],
    ok.

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case gen_server:start_link({local, ?MODULE}, ?MODULE, [], []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

%% @doc Whether a key is new; it is known from now on. Of two callers with one key, one is first.
-spec first_time(term()) -> boolean().
first_time(Key) ->
    gen_server:call(?MODULE, {first_time, Key}, infinity).

%% @doc Keeps keys as long as a freshness window needs: twice its width.
-spec cover(pos_integer() | infinity) -> ok.
cover(infinity) -> ok;
cover(Window) -> gen_server:cast(?MODULE, {remember, 2 * Window}).

%% Beside the tables, which outlive this process, too.
-define(KEEP, {?MODULE, keep}).

-spec init([]) -> {ok, map()}.
init([]) ->
    Keep = persistent_term:get(?KEEP, ?KEEP_MS),
    {ok, rotate_later(#{now => hd(?TABLES), before => lists:last(?TABLES), keep => Keep})}.

rotate_later(#{keep := Keep} = State) ->
    State#{timer => erlang:start_timer(Keep, self(), rotate)}.

-spec handle_call(term(), gen_server:from(), map()) -> {reply, term(), map()}.
handle_call({first_time, Key}, _From, #{now := Now, before := Before} = State) ->
    New = not ets:member(Before, Key) andalso ets:insert_new(Now, {Key}),
    case ets:info(Now, size) >= ?MAX_ROWS of
        true -> {reply, New, rotate(State)};
        false -> {reply, New, State}
    end.

rotate(#{now := Now, before := Before, timer := Timer} = State) ->
    _ = erlang:cancel_timer(Timer),
    true = ets:delete_all_objects(Before),
    rotate_later(State#{now := Before, before := Now}).

-spec handle_cast(term(), map()) -> {noreply, map()}.
handle_cast({remember, Ms}, #{keep := Keep} = State) when Ms > Keep ->
    ok = persistent_term:put(?KEEP, Ms),
    {noreply, State#{keep := Ms}};
handle_cast(_, State) ->
    {noreply, State}.

-spec handle_info(term(), map()) -> {noreply, map()}.
handle_info({timeout, Timer, rotate}, #{timer := Timer} = State) ->
    {noreply, rotate(State)};
handle_info(_, State) ->
    {noreply, State}.
