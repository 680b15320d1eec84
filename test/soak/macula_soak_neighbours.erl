%% @doc What a connection of `macula_quic' suffers when another one of its listener is flooded.
%%
%% One client echoes 64 bytes, another floods: with datagrams, with short streams, or with bulk. The echo is timed
%% alone, beside a flood of the same listener, and beside the same flood of another VM of this machine, which takes
%% its fair share of the processors: what the flood costs beyond that is the listener's doing.
-module(macula_soak_neighbours).

-export([main/1]).
%% At the nodes.
-export([serve/0, echo/2, flood/3, stop/1, handled/0]).

-import(macula_test_nodes, [call/4, call/5]).

-define(ALPN, "macula-soak").
-define(KINDS, [datagrams, short, bulk]).
-define(ROUNDS, 3).
%% A flood comes to its height.
-define(HEAD_START_MS, 500).
-define(PAUSE_MS, 1).
-define(SMALL, 64).
-define(DATAGRAM, 1000).
-define(PIECE, 65536).
-define(BULK_STREAMS, 4).
-define(SHORT_STREAMS, 32).
%% Whatever the machine, no neighbour stands still for so long.
-define(STILL_US, 1000000).

%% @doc Argument: milliseconds for each measurement.
-spec main([string()]) -> no_return().
main([Ms]) ->
    io:format("soak: an echo beside a flooded connection~n"),
    macula_soak:run("soak", fun() -> measure(list_to_integer(Ms)) end).

measure(Ms) ->
    Specs = [#{carrier => none} || _ <- [server, elsewhere, client, flooder]],
    macula_test_nodes:with_nodes(Specs, fun([Server, Elsewhere, Client, Flooder]) ->
        Here = {Server, call(Server, ?MODULE, serve, [])},
        There = {Elsewhere, call(Elsewhere, ?MODULE, serve, [])},
        Result = [{Kind, [[timed(Client, Here, Ms),
                           beside(Kind, Flooder, There, Client, Here, Ms),
                           beside(Kind, Flooder, Here, Client, Here, Ms)] || _ <- lists:seq(1, ?ROUNDS)]}
                  || Kind <- ?KINDS],
        ok = lists:foreach(fun report/1, Result),
        [] = [{stands_still, Kind, P99} || {Kind, Rounds} <- Result, {_, P99, _} <- medians(Rounds), P99 > ?STILL_US],
        ok
    end).

timed(Client, {_, Server}, Ms) ->
    Times = lists:sort(call(Client, ?MODULE, echo, [Server, Ms], Ms + 120000)),
    {percentile(50, Times), percentile(99, Times), 0}.

%% The third is how much of the flood was handled in a second.
beside(Kind, Flooder, {Flooded, Target}, Client, Here, Ms) ->
    Flood = call(Flooder, ?MODULE, flood, [Kind, Target, Ms]),
    receive after ?HEAD_START_MS -> ok end,
    Before = call(Flooded, ?MODULE, handled, []),
    Begun = erlang:monotonic_time(millisecond),
    {P50, P99, _} = timed(Client, Here, Ms),
    Handled = call(Flooded, ?MODULE, handled, []) - Before,
    Took = erlang:monotonic_time(millisecond) - Begun,
    ok = call(Flooder, ?MODULE, stop, [Flood]),
    true = Handled > 0,
    {P50, P99, Handled * 1000 div Took}.

percentile(Percent, Sorted) ->
    lists:nth(min(length(Sorted), length(Sorted) * Percent div 100 + 1), Sorted).

medians(Rounds) ->
    [list_to_tuple([lists:nth(?ROUNDS div 2 + 1, lists:sort([element(N, lists:nth(Column, Round)) || Round <- Rounds]))
                    || N <- [1, 2, 3]])
     || Column <- [1, 2, 3]].

report({Kind, Rounds}) ->
    [{A50, A99, _}, {E50, E99, Elsewhere}, {S50, S99, Same}] = medians(Rounds),
    io:format("soak: ~-9s  alone p50 ~b p99 ~b us; beside another VM's p50 ~b p99 ~b (~b/s); beside its listener's "
              "p50 ~b p99 ~b (~b/s): ~.1f times~n",
              [Kind, A50, A99, E50, E99, Elsewhere, S50, S99, Same, S99 / E99]).

%% -- the server -----------------------------------------------------------------------------------

%% @private
-spec serve() -> {inet:port_number(), binary()}.
serve() ->
    Starter = self(),
    Pid = spawn(fun() ->
        {Public, Private} = crypto:generate_key(eddsa, ed25519),
        {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0}, [{alpn, [?ALPN]}, {cert, Cert}, {key, Key}]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        ok = persistent_term:put(?MODULE, counters:new(1, [write_concurrency])),
        Starter ! {self(), {Port, Public}},
        accept(Listener)
    end),
    receive {Pid, Server} -> Server end.

%% @private How much was served, but for echoes: datagrams, short streams, pieces.
-spec handled() -> non_neg_integer().
handled() ->
    counters:get(persistent_term:get(?MODULE), 1).

count() ->
    counters:add(persistent_term:get(?MODULE), 1, 1).

accept(Listener) ->
    {ok, Conn} = macula_quic:accept(Listener, infinity),
    Pid = spawn(fun() ->
        receive go -> ok end,
        ok = macula_quic:setopt(Conn, datagrams, true),
        ok = macula_quic:async_accept_stream(Conn, [{active, false}]),
        connection(Conn)
    end),
    ok = macula_quic:controlling_process(Conn, Pid),
    Pid ! go,
    accept(Listener).

connection(Conn) ->
    receive
        {quic, dgram, Conn, _} ->
            count();
        {quic, new_stream, Stream, _} ->
            Pid = spawn(fun() -> receive go -> stream(Stream) end end),
            ok = macula_quic:controlling_process(Stream, Pid),
            Pid ! go;
        {quic, closed, Conn, _} ->
            exit(normal);
        _ ->
            ok
    end,
    connection(Conn).

stream(Stream) ->
    case macula_quic:recv(Stream, 1) of
        {ok, <<"e">>} -> answer(Stream);
        {ok, <<"s">>} -> answer_once(Stream);
        {ok, <<"b">>} -> swallow(Stream);
        {error, _} -> ok
    end.

answer(Stream) ->
    case macula_quic:recv(Stream, ?SMALL) of
        {ok, Data} -> _ = macula_quic:send(Stream, Data), answer(Stream);
        {error, _} -> ok
    end.

answer_once(Stream) ->
    case macula_quic:recv(Stream, ?SMALL) of
        {ok, Data} ->
            _ = macula_quic:send(Stream, Data, #{fin => true}),
            count(),
            %% The stream is reset when its owner ends before all is delivered.
            receive {quic, stream_closed, Stream, _} -> ok end;
        {error, _} ->
            ok
    end.

swallow(Stream) ->
    case macula_quic:recv(Stream, ?PIECE) of
        {ok, _} -> count(), swallow(Stream);
        {error, _} -> ok
    end.

%% -- the clients ----------------------------------------------------------------------------------

connect({Port, Public}) ->
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{alpn, [?ALPN]}, {verify_pubkey, Public}], 30000),
    Conn.

%% @private How long each echo took, in microseconds.
-spec echo({inet:port_number(), binary()}, pos_integer()) -> [pos_integer()].
echo(Server, Ms) ->
    Conn = connect(Server),
    {ok, Stream} = macula_quic:open_stream(Conn, #{active => false}),
    ok = macula_quic:send(Stream, <<"e">>),
    Times = echoes(Stream, erlang:monotonic_time(microsecond) + Ms * 1000, 0),
    ok = macula_quic:close(Conn),
    Times.

echoes(Stream, End, N) ->
    Data = <<N:?SMALL/unit:8>>,
    Begun = erlang:monotonic_time(microsecond),
    ok = macula_quic:send(Stream, Data),
    {ok, Data} = macula_quic:recv(Stream, ?SMALL, 30000),
    Now = erlang:monotonic_time(microsecond),
    case Now < End of
        true -> receive after ?PAUSE_MS -> [Now - Begun | echoes(Stream, End, N + 1)] end;
        false -> [Now - Begun]
    end.

%% @private Floods by a connection until it is told to stop, and for no longer than ten times the measurement.
-spec flood(datagrams | short | bulk, {inet:port_number(), binary()}, pos_integer()) -> pid().
flood(Kind, Server, Ms) ->
    spawn(fun() ->
        Conn = connect(Server),
        Workers = [spawn_link(fun() -> work(Kind, Conn) end) || _ <- lists:seq(1, parallel(Kind))],
        receive {stop, From, Ref} -> From ! {Ref, ok} after Ms * 10 -> ok end,
        [begin unlink(Worker), exit(Worker, kill) end || Worker <- Workers],
        macula_quic:close(Conn)
    end).

%% @private
-spec stop(pid()) -> ok.
stop(Flood) ->
    Ref = monitor(process, Flood),
    Flood ! {stop, self(), Ref},
    %% A flood that has failed is no flood.
    receive {Ref, ok} -> ok; {'DOWN', Ref, process, Flood, Reason} -> error({flood, Reason}) end,
    receive {'DOWN', Ref, process, Flood, _} -> ok end.

parallel(datagrams) -> 1;
parallel(short) -> ?SHORT_STREAMS;
parallel(bulk) -> ?BULK_STREAMS.

work(datagrams, Conn) ->
    ok = macula_quic:send_datagram(Conn, <<0:?DATAGRAM/unit:8>>),
    work(datagrams, Conn);
work(short, Conn) ->
    {ok, Stream} = macula_quic:open_stream(Conn, #{active => false}),
    ok = macula_quic:send(Stream, <<"s", 0:?SMALL/unit:8>>, #{fin => true}),
    {ok, <<0:?SMALL/unit:8>>} = macula_quic:recv(Stream, ?SMALL, 30000),
    work(short, Conn);
work(bulk, Conn) ->
    {ok, Stream} = macula_quic:open_stream(Conn, #{active => false}),
    ok = macula_quic:send(Stream, <<"b">>),
    pour(Stream, <<0:?PIECE/unit:8>>).

pour(Stream, Data) ->
    ok = macula_quic:send(Stream, Data),
    pour(Stream, Data).
