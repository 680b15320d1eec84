%% @doc `macula_quic' by itself between two VMs, and the same by Quinn without a VM.
-module(macula_bench_quic).

-export([run/1, bare/2, server/0, client/3]).

-define(STREAM, (1 bsl 30)).
-define(CHUNK, 65536).
-define(ALPN, "macula-bench").

%% @doc The echo's latencies in microseconds and the stream's rate in MB/s.
-spec run(pos_integer()) -> [{atom(), float()}].
run(Ms) ->
    None = #{carrier => none},
    macula_test_nodes:with_nodes([None, None], fun([A, B]) ->
        {Port, Key} = macula_test_nodes:call(B, ?MODULE, server, []),
        macula_test_nodes:call(A, ?MODULE, client, [Port, Key, Ms], 300000)
    end).

%% @doc The same from the Rust program.
-spec bare(file:filename(), pos_integer()) -> [{atom(), float()}].
bare(Program, Ms) ->
    Output = os:cmd(lists:flatten(io_lib:format("~s ~b ~b", [Program, Ms, ?STREAM]))),
    Results = [{list_to_atom(Name), list_to_float(Value)}
               || Line <- string:lexemes(Output, "\n"), [Name, Value] <- [string:lexemes(Line, " ")]],
    case Results of
        [_, _, _] -> Results;
        _ -> error({bare_quinn, Output})
    end.

%% In the nodes

%% @private Starts a listener that outlives the call; the port and the key to pin.
server() ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        {Public, Private} = crypto:generate_key(eddsa, ed25519),
        {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0}, [{cert, Cert}, {key, Key},
                                                               {alpn, [?ALPN]}]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        ok = macula_quic:async_accept(Listener),
        Self ! {Ref, {Port, Public}},
        accept(Listener)
    end),
    receive {Ref, Answer} -> Answer after 10000 -> error(no_listener) end.

accept(Listener) ->
    receive
        {quic, new_conn, Conn, _Info} ->
            ok = macula_quic:async_accept_stream(Conn),
            accept(Listener);
        {quic, new_stream, Stream, _Props} ->
            Pid = spawn(fun() -> receive go -> answer(Stream) end end),
            ok = macula_quic:controlling_process(Stream, Pid),
            Pid ! go,
            accept(Listener);
        _Other ->
            accept(Listener)
    end.

answer(Stream) ->
    case macula_quic:recv(Stream, 1) of
        {ok, <<1>>} ->
            ok = macula_quic:setopt(Stream, active, true),
            echo(Stream);
        {ok, <<2>>} ->
            ok = macula_quic:setopt(Stream, active, 100),
            count(Stream, 0)
    end.

echo(Stream) ->
    receive
        {quic, Data, Stream, _} when is_binary(Data) ->
            ok = macula_quic:send(Stream, Data),
            echo(Stream);
        {quic, stream_closed, Stream, _} ->
            ok;
        _ ->
            echo(Stream)
    end.

count(Stream, Total) ->
    receive
        {quic, Data, Stream, _} when is_binary(Data) ->
            count(Stream, Total + byte_size(Data));
        {quic, passive, Stream, _} ->
            ok = macula_quic:setopt(Stream, active, 100),
            count(Stream, Total);
        {quic, peer_send_shutdown, Stream, _} ->
            ok = macula_quic:send(Stream, <<Total:64>>, #{fin => true}),
            %% The stream is reset when its owner ends before it is delivered.
            receive {quic, stream_closed, Stream, _} -> ok end;
        _ ->
            count(Stream, Total)
    end.

%% @private
client(Port, Key, Ms) ->
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{alpn, [?ALPN]}, {verify_pubkey, Key}], 5000),
    {ok, Echo} = macula_quic:open_stream(Conn),
    ok = macula_quic:send(Echo, <<1>>),
    Data = rand:bytes(64),
    _ = echoes(Echo, Data, deadline(Ms div 5), []),
    Times = list_to_tuple(lists:sort(echoes(Echo, Data, deadline(Ms), []))),
    At = fun(Part) -> element(max(1, tuple_size(Times) * Part div 100), Times) / 1000 end,
    {ok, Stream} = macula_quic:open_stream(Conn),
    Start = erlang:monotonic_time(microsecond),
    ok = macula_quic:send(Stream, <<2>>),
    Chunk = rand:bytes(?CHUNK),
    ok = repeat(?STREAM div ?CHUNK, fun() -> ok = macula_quic:send(Stream, Chunk) end),
    ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
    {ok, <<?STREAM:64>>} = macula_quic:recv(Stream, 8, 60000),
    Took = erlang:monotonic_time(microsecond) - Start,
    ok = macula_quic:close(Conn),
    [{echo_p50_us, At(50)}, {echo_p99_us, At(99)}, {stream_mb_s, ?STREAM / Took}].

echoes(Stream, Data, Deadline, Times) ->
    Before = erlang:monotonic_time(nanosecond),
    ok = macula_quic:send(Stream, Data),
    {ok, Data} = macula_quic:recv(Stream, byte_size(Data), 5000),
    After = erlang:monotonic_time(nanosecond),
    case After < Deadline of
        true -> echoes(Stream, Data, Deadline, [After - Before | Times]);
        false -> [After - Before | Times]
    end.

deadline(Ms) ->
    erlang:monotonic_time(nanosecond) + Ms * 1000000.

repeat(0, _Fun) -> ok;
repeat(N, Fun) -> _ = Fun(), repeat(N - 1, Fun).
