%% @doc A mnesia table that is copied to a node which joins, through a relay, while fifty processes write to it: at
%% the end both nodes have the same, and every write that was told done.
-module(macula_soak_mnesia).

-export([main/1]).
%% At the nodes.
-export([fill/2, write/1, join/1, stop/1, digest/0, written/1]).

-import(macula_test_nodes, [call/4, call/5, name/1, wait_until/2]).

-define(TABLE, macula_soak_table).
-define(NAMES, ["mnesia1", "mnesia2"]).
-define(WRITERS, 50).
-define(VALUE, 1000).
%% A writer waits so long after a write.
-define(PAUSE_MS, 5).
-define(COPY_MS, 300000).

%% @doc Arguments: how often, and how many megabytes.
-spec main([string()]) -> no_return().
main([Times, Megabytes]) ->
    io:format("soak: a mnesia table of ~s MB is copied ~s times~n", [Megabytes, Times]),
    macula_soak:run("soak", fun() ->
        [copy(N, lists:nth(N rem 2 + 1, [0.01, 0]), list_to_integer(Megabytes))
         || N <- lists:seq(1, list_to_integer(Times))]
    end).

copy(Round, Loss, Megabytes) ->
    Ports = [{Name, macula_test_nodes:free_udp_port()} || Name <- ?NAMES],
    Relays = [{Name, macula_soak:relay(Port, #{loss => Loss})} || {Name, Port} <- Ports],
    Specs = [macula_soak:spec(Name, Port, Relays) || {Name, Port} <- Ports],
    macula_test_nodes:with_nodes(Specs, fun([A, B] = Nodes) ->
        Records = Megabytes * 1000000 div ?VALUE,
        [ok = call(Node, application, start, [mnesia]) || Node <- Nodes],
        ok = call(A, ?MODULE, fill, [Records, ?VALUE], ?COPY_MS),
        Writers = call(A, ?MODULE, write, [Records]),
        macula_soak:meshed(Nodes),
        Begun = erlang:monotonic_time(millisecond),
        ok = call(A, ?MODULE, join, [name(B)], ?COPY_MS),
        Took = erlang:monotonic_time(millisecond) - Begun,
        Counts = call(A, ?MODULE, stop, [Writers]),
        true = lists:all(fun(Count) -> Count > 0 end, Counts),
        %% The last commits may be under way.
        Same = wait_until(fun() ->
            case [call(Node, ?MODULE, digest, [], ?COPY_MS) || Node <- Nodes] of
                [Digest, Digest] -> {value, Digest};
                Other -> Other
            end
        end, 60000),
        {Size, _} = Same,
        Size = Records + ?WRITERS,
        [Counts = call(Node, ?MODULE, written, [?WRITERS]) || Node <- Nodes],
        Bytes = lists:sum([maps:get(bytes, maps:get(Way, macula_relay:stats(Relay)))
                           || {_, Relay} <- Relays, Way <- [up, down]]),
        true = Bytes > Megabytes * 1000000,
        io:format("soak: copy ~b at ~b % loss in ~b ms, beside ~b writes; both have the same ~b records; ~s~n",
                  [Round, round(Loss * 100), Took, lists:sum(Counts), Size, macula_soak:memory(Nodes)])
    end),
    [ok = macula_relay:stop(Relay) || {_, Relay} <- Relays].

%% @private
-spec fill(pos_integer(), pos_integer()) -> ok.
fill(Records, Size) ->
    {atomic, ok} = mnesia:create_table(?TABLE, [{ram_copies, [node()]}]),
    lists:foreach(fun(Key) -> ok = mnesia:dirty_write({?TABLE, Key, rand:bytes(Size)}) end, lists:seq(1, Records)).

%% @private
-spec write(pos_integer()) -> [pid()].
write(Records) ->
    [spawn(fun() -> write(N, Records, 0) end) || N <- lists:seq(1, ?WRITERS)].

%% Each has a record of its own that tells its last write.
write(N, Records, Count) ->
    receive
        {stop, From} -> From ! {self(), Count}
    after ?PAUSE_MS ->
        {atomic, ok} = mnesia:transaction(fun() ->
            ok = mnesia:write({?TABLE, rand:uniform(Records), rand:bytes(?VALUE)}),
            mnesia:write({?TABLE, {writer, N}, Count + 1})
        end),
        write(N, Records, Count + 1)
    end.

%% @private
-spec join(node()) -> ok.
join(Node) ->
    {ok, [Node]} = mnesia:change_config(extra_db_nodes, [Node]),
    {atomic, ok} = mnesia:add_table_copy(?TABLE, Node, ram_copies),
    ok.

%% @private
-spec stop([pid()]) -> [non_neg_integer()].
stop(Writers) ->
    [Writer ! {stop, self()} || Writer <- Writers],
    [receive {Writer, Count} -> Count end || Writer <- Writers].

%% @private
-spec digest() -> {non_neg_integer(), non_neg_integer()}.
digest() ->
    {mnesia:table_info(?TABLE, size),
     ets:foldl(fun(Record, Sum) -> Sum + erlang:phash2(Record, 1 bsl 32) end, 0, ?TABLE)}.

%% @private
-spec written(pos_integer()) -> [non_neg_integer()].
written(Writers) ->
    [begin
        [{_, _, Count}] = mnesia:dirty_read(?TABLE, {writer, N}),
        Count
    end || N <- lists:seq(1, Writers)].
