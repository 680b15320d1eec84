%% @doc The table of links, and the process that tells of their end.
%%
%% Each worker keeps one row here, so that anybody can send through it without asking it. The
%% worker writes why it ends into its row; the watching process sends `disconnected' when the
%% worker is dead, whatever killed it. As nobody else sends that event, it comes exactly once.
%% @private
-module(macula_peering_links).
-behaviour(gen_server).

-export([create/0, start_link/0]).
-export([watch/2, forget/0, update/2, claims/2, claims/1, rules/1, find/1, all/0]).
-export([watch_dialer/2, alias/3, alias_owner/2, unalias/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([link/0]).

-type link() :: #{
    pid := pid(),
    role := client | server,
    status := opening | held | open | closing,
    owner := pid(),
    subscribers := [pid()],
    dialer => pid(),
    reason := undefined | {why, term()},
    counters := counters:counters_ref(),
    atom() => term()
}.
%% `status': `opening' (no frame may be sent), `held' (soon), `open', `closing'.

-define(TABLE, ?MODULE).
-define(ALIASES, macula_peering_aliases).

%% @doc Makes the tables, unless they are there: an upgrade asks a supervisor for its children again. The calling
%% process owns them.
-spec create() -> ok.
create() ->
    case ets:whereis(?TABLE) of
        undefined -> make();
        _ -> ok
    end.

make() ->
    ?TABLE = ets:new(?TABLE, [named_table, public, {read_concurrency, true},
                              {write_concurrency, true}]),
    ?ALIASES = ets:new(?ALIASES, [named_table, public, {read_concurrency, true}]),
    ok.

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case gen_server:start_link({local, ?MODULE}, ?MODULE, [], []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

%% @doc Enters the calling worker, with what it does to frames that arrive; from now on its end is
%% told.
-spec watch(link(), macula_peering_incoming:rules()) -> ok | {error, not_started}.
watch(#{pid := Pid} = Link, Rules) when Pid =:= self() ->
    try
        gen_server:call(?MODULE, {watch, Link, Rules}, infinity)
    catch
        exit:_ -> {error, not_started}
    end.

%% @doc Of the calling worker nothing is told any more.
-spec forget() -> ok.
forget() ->
    true = ets:delete(?TABLE, self()),
    ok.

%% @doc Changes the row of the calling worker.
-spec update(pid(), #{atom() => term()}) -> ok.
update(Pid, Changes) ->
    Link = ets:lookup_element(?TABLE, Pid, 2),
    true = ets:update_element(?TABLE, Pid, {2, maps:merge(Link, Changes)}),
    ok.

%% @doc Keeps what the peer says of itself. That may be long, and whoever sends reads the row: so it
%% stands apart, or a peer could make every frame to it expensive.
-spec claims(pid(), #{atom() => term()}) -> ok.
claims(Pid, Claims) ->
    true = ets:update_element(?TABLE, Pid, {3, Claims}),
    ok.

%% @doc What the peer says of itself; nothing before the handshake is done, or after the end.
-spec claims(pid()) -> #{atom() => term()}.
claims(Pid) ->
    try
        ets:lookup_element(?TABLE, Pid, 3)
    catch
        error:badarg -> #{}
    end.

%% @doc What a worker does to frames that arrive.
-spec rules(pid()) -> {ok, macula_peering_incoming:rules()} | {error, not_connected}.
rules(Pid) ->
    try
        {ok, ets:lookup_element(?TABLE, Pid, 4)}
    catch
        error:badarg -> {error, not_connected}
    end.

%% @doc The row of a worker, or of the worker behind a dialer.
-spec find(pid()) -> {ok, link()} | {error, not_connected | not_started}.
find(Pid) ->
    case row(Pid) of
        {ok, Link} -> {ok, Link};
        error ->
            try ets:lookup(?ALIASES, Pid) of
                [{_, Worker, _, _}] when is_pid(Worker) -> find_worker(Worker);
                _ -> {error, not_connected}
            catch
                error:badarg -> {error, not_started}
            end
    end.

find_worker(Pid) ->
    case row(Pid) of
        {ok, Link} -> {ok, Link};
        error -> {error, not_connected}
    end.

row(Pid) ->
    try
        {ok, ets:lookup_element(?TABLE, Pid, 2)}
    catch
        error:badarg -> error
    end.

%% @doc All rows.
-spec all() -> [link()].
all() ->
    try
        ets:select(?TABLE, [{{'_', '$1', '_', '_'}, [], ['$1']}])
    catch
        error:badarg -> []
    end.

%% @doc Enters the calling dialer; if it is killed, its owner is told.
-spec watch_dialer(pid(), pid()) -> ok | {error, not_started}.
watch_dialer(Dialer, Owner) when Dialer =:= self() ->
    try
        gen_server:call(?MODULE, {watch_dialer, Dialer, Owner}, infinity)
    catch
        exit:_ -> {error, not_started}
    end.

%% @doc Lets a dialer stand for its present worker, which is the result of so many attempts.
-spec alias(pid(), pid() | undefined, non_neg_integer()) -> ok.
alias(Dialer, Worker, Attempt) ->
    true = ets:update_element(?ALIASES, Dialer, [{2, Worker}, {4, Attempt}]),
    ok.

%% @doc Gives the dialer's death another to be told to.
-spec alias_owner(pid(), pid()) -> ok.
alias_owner(Dialer, Owner) ->
    true = ets:update_element(?ALIASES, Dialer, {3, Owner}),
    ok.

-spec unalias(pid()) -> ok.
unalias(Dialer) ->
    true = ets:delete(?ALIASES, Dialer),
    ok.

-spec init([]) -> {ok, undefined}.
init([]) ->
    %% So that at a shutdown those whose end is in the mailbox are told of before.
    process_flag(trap_exit, true),
    %% After a failure of a predecessor: those that died meanwhile are told of at once.
    [monitor(process, Pid) || [Pid] <- ets:match(?TABLE, {'$1', '_', '_', '_'})
                                       ++ ets:match(?ALIASES, {'$1', '_', '_', '_'})],
    {ok, undefined}.

-spec handle_call({watch, link(), macula_peering_incoming:rules()} | {watch_dialer, pid(), pid()},
                  gen_server:from(), undefined) ->
    {reply, ok, undefined}.
handle_call({watch_dialer, Dialer, Owner}, _From, State) ->
    true = ets:insert(?ALIASES, {Dialer, undefined, Owner, 0}),
    _ = monitor(process, Dialer),
    {reply, ok, State};
handle_call({watch, #{pid := Pid} = Link, Rules}, _From, State) ->
    true = ets:insert(?TABLE, {Pid, Link, #{}, Rules}),
    _ = monitor(process, Pid),
    {reply, ok, State}.

-spec handle_cast(term(), undefined) -> {noreply, undefined}.
handle_cast(_, State) ->
    {noreply, State}.

-spec handle_info(term(), undefined) -> {noreply, undefined}.
handle_info({'DOWN', _, process, Pid, Exit}, State) ->
    tell(Pid, Exit),
    _ = dialer_died(Pid, Exit),
    {noreply, State};
handle_info(_, State) ->
    {noreply, State}.

%% Whoever lives on is the successor's to watch.
-spec terminate(term(), undefined) -> ok.
terminate(_, _) ->
    lists:foreach(fun([Pid]) ->
        case is_process_alive(Pid) of
            true -> ok;
            false -> tell(Pid, receive {'DOWN', _, process, Pid, Exit} -> Exit after 0 -> noproc end)
        end
    end, ets:match(?TABLE, {'$1', '_', '_', '_'})).

%% One that ended by itself has taken its row away, and said what there was to say.
dialer_died(Pid, Exit) ->
    case ets:take(?ALIASES, Pid) of
        [{Pid, _, Owner, Attempts}] ->
            Owner ! {macula_peering, gave_up, Pid,
                     #{attempts => Attempts, reason => {worker_down, Exit}}};
        [] ->
            ok
    end.

tell(Pid, Exit) ->
    case ets:take(?TABLE, Pid) of
        [{Pid, #{owner := Owner, subscribers := Subscribers} = Link, _, _}] ->
            Reason = case Link of
                #{reason := {why, Why}} -> Why;
                #{} -> {worker_down, Exit}
            end,
            lists:foreach(fun(To) -> To ! {macula_peering, disconnected, Pid, Reason} end,
                          lists:usort([Owner | Subscribers] ++ [D || #{dialer := D} <- [Link]]));
        [] ->
            ok
    end.
