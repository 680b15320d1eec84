%% @doc The demo's part inside its nodes.
-module(macula_demo_node).

-export([watch/0, events/0, transfer/2, progress/0]).
-export([mnesia_start/1, mnesia_fill/2, mnesia_checksum/0]).

-record(macula_demo, {key, value}).

%% @doc Remembers when other nodes come and go, by the clock all VMs of a machine share.
-spec watch() -> ok.
watch() ->
    Starter = self(),
    Pid = spawn(fun() ->
        true = register(?MODULE, self()),
        ok = net_kernel:monitor_nodes(true, [nodedown_reason]),
        Starter ! {watching, self()},
        watch([])
    end),
    receive {watching, Pid} -> ok end.

watch(Events) ->
    receive
        {nodeup, Node, _} ->
            watch([{up, Node, os:system_time(microsecond), none} | Events]);
        {nodedown, Node, Info} ->
            Reason = proplists:get_value(nodedown_reason, Info),
            watch([{down, Node, os:system_time(microsecond), Reason} | Events]);
        {events, From, Ref} ->
            From ! {Ref, Events},
            watch(Events)
    end.

-spec events() -> [{up | down, node(), integer(), term()}].
events() ->
    Ref = make_ref(),
    ?MODULE ! {events, self(), Ref},
    receive {Ref, Events} -> Events after 5000 -> error(no_watcher) end.

%% @doc Begins to move `Bytes' to another node; see `progress/0'.
-spec transfer(node(), pos_integer()) -> ok.
transfer(Node, Bytes) ->
    Counters = counters:new(2, []),
    persistent_term:put(?MODULE, Counters),
    _ = spawn(fun() ->
        Took = macula_bench_load:transfer(Node, {Bytes, 1 bsl 20}, Counters),
        counters:put(Counters, 2, Took)
    end),
    ok.

%% @doc Bytes received so far, and the microseconds taken once all are (0 before).
-spec progress() -> {non_neg_integer(), non_neg_integer()}.
progress() ->
    Counters = persistent_term:get(?MODULE),
    {counters:get(Counters, 1), counters:get(Counters, 2)}.

%% @doc Starts mnesia and joins it to that of the other nodes, with a copy of the table when there
%% is one.
-spec mnesia_start([node()]) -> ok.
mnesia_start([]) ->
    ok = mnesia:start(),
    {atomic, ok} = mnesia:create_table(macula_demo, [
        {attributes, record_info(fields, macula_demo)}, {ram_copies, [node()]}]),
    ok;
mnesia_start(Others) ->
    ok = mnesia:start(),
    {ok, [_ | _]} = mnesia:change_config(extra_db_nodes, Others),
    case mnesia:add_table_copy(macula_demo, node(), ram_copies) of
        {atomic, ok} -> ok;
        {aborted, {already_exists, macula_demo, _}} -> ok
    end,
    ok = mnesia:wait_for_tables([macula_demo], 10000).

-spec mnesia_fill(pos_integer(), pos_integer()) -> ok.
mnesia_fill(From, To) ->
    {atomic, ok} = mnesia:transaction(fun() ->
        lists:foreach(fun(N) -> mnesia:write(#macula_demo{key = N, value = erlang:phash2(N)}) end,
                      lists:seq(From, To))
    end),
    ok.

%% @doc Of this node's own copy, read past mnesia.
-spec mnesia_checksum() -> {non_neg_integer(), non_neg_integer()}.
mnesia_checksum() ->
    Records = lists:sort(ets:tab2list(macula_demo)),
    {length(Records), erlang:phash2(Records)}.
