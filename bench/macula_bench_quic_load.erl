%% @doc What runs inside the two VMs that `macula_bench_quic' measures: a server, and a client for each
%% row. `bench/quinn_bare' does the same by Quinn alone.
%%
%% Everything that arrives is checked: the bytes of a long stream can be told from their place, a
%% short stream is answered with its hash, an echo is compared with what was sent.
-module(macula_bench_quic_load).

-export([server/2, client/3, tcp_server/0, tcp_client/2, watch/0, watched/0]).

-include_lib("public_key/include/public_key.hrl").

-define(ALPN, "macula-bench").
-define(SMALL, 64).
-define(DATAGRAM, 1000).

%% The first byte of a stream says what it is for.
-define(ECHO_ACTIVE, 1).
-define(COUNT, 2).
-define(SHORT, 3).
-define(IDLE, 4).
-define(ASK, 5).
-define(ECHO_PASSIVE, 6).
%% As `ASK', after a garbage collection of all processes.
-define(WEIGH, 7).

%% With this code the server closes a connection whose client asks for the name `refused'.
-define(REFUSED, 7).

%% A prime: no piece of the usual sizes, lost or twice there, leaves the rest in place.
-define(PERIOD, 65521).
-define(LONGEST, 65536).

%% Connections or streams that are there before the idle ones are weighed.
-define(FIRST, 50).
%% What a server answers before it has counted all may be out of date for so many milliseconds.
-define(SETTLED, 300).

-type mode() :: handing_over | active | inline | datagrams | tickets | behaviours.
%% What the server does with a stream: it hands it to a process of its own, reads it by messages, or
%% reads its first byte itself. With `datagrams' it hands over, and asks for datagrams as well. With `tickets'
%% it gives these, shows a chain of certificates, and sends each client a byte. With `behaviours' each connection and
%% each stream has a process of a behaviour.
-type measures() :: [{atom(), number()}].
-type server() :: {inet:port_number(), Trust :: [{atom(), term()}]}.

%%--------------------------------------------------------------------------------------------
%% Server

%% @doc Starts a server that outlives the call; the port, and how a client is to verify it.
-spec server(mode(), pos_integer()) -> server().
server(behaviours, Streams) ->
    start(fun() ->
        {Credentials, Trust} = credentials(behaviours),
        {ok, Pid} = macula_quic_connection:start_listener(#{
            callback => macula_bench_behaviours, listen_on => {"127.0.0.1", 0},
            listen_opts => [{alpn, [?ALPN]}, {peer_bidi_stream_count, Streams} | Credentials],
            stream_opts => #{stream_callback => macula_bench_behaviours, active => true}}),
        {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Pid)),
        {{Port, Trust}, fun() -> receive never -> ok end end}
    end);
server(Mode, Streams) ->
    start(fun() ->
        {Credentials, Trust} = credentials(Mode),
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0},
                                            [{alpn, [?ALPN]}, {peer_bidi_stream_count, Streams}
                                             | Credentials]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        ok = macula_quic:async_accept(Listener),
        State = #{mode => Mode, listener => Listener, pattern => pattern(), held => [],
                  conns => [], parts => #{}, datagrams => 0, first => 0, last => 0,
                  %% All bytes, how many streams have begun, Jain's index and the largest deviation from the mean in
                  %% millionths; the bytes of each.
                  sums => atomics:new(4, []), streams => counters:new(1000, [])},
        {{Port, Trust}, fun() -> serve(State) end}
    end).

%% As most servers have it: a certificate that an intermediate authority has signed, with a name for each
%% dialer.
credentials(tickets) ->
    Key = [{key, {rsa, 2048, 65537}}, {digest, sha256}],
    San = #'Extension'{extnID = ?'id-ce-subjectAltName', critical = false,
                       extnValue = [{dNSName, dialer(N)} || N <- lists:seq(0, 100)]},
    Chain = #{root => Key, intermediates => [Key], peer => [{extensions, [San]} | Key]},
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Chain,
                                    client_chain => #{root => [], intermediates => [], peer => []}}),
    [Cert, PrivateKey, Authorities] = [proplists:get_value(Name, Server) || Name <- [cert, key, cacerts]],
    Between = [Authority || Authority <- Authorities, not public_key:pkix_is_self_signed(Authority)],
    {[{resumption, true}, {cert, [Cert | Between]}, {key, PrivateKey}],
     [Option || {cacerts, _} = Option <- Client]};
credentials(_Mode) ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
    {[{cert, Cert}, {key, Key}], [{verify_pubkey, Public}]}.

start(Fun) ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        {Answer, Serve} = Fun(),
        Self ! {Ref, Answer},
        Serve()
    end),
    %% Large keys take their time.
    receive {Ref, Answer} -> Answer after 60000 -> error(no_server) end.

serve(#{mode := Mode, pattern := Pattern} = State) ->
    receive
        {quic, dgram, _Conn, <<_:64, Rest/binary>>} when byte_size(Rest) =:= ?DATAGRAM - 8 ->
            #{datagrams := N, first := First} = State,
            true = is_pattern(Pattern, 0, Rest),
            Now = erlang:monotonic_time(microsecond),
            serve(case N of
                0 -> State#{datagrams := 1, first := Now, last := Now};
                _ -> State#{datagrams := N + 1, first := First, last := Now}
            end);
        {quic, Data, Stream, _} when is_binary(Data) ->
            #{parts := Parts} = State,
            serve(State#{parts := Parts#{Stream := [maps:get(Stream, Parts), Data]}});
        {quic, peer_send_shutdown, Stream, _} when Mode =:= active ->
            {Parts, Rest} = maps:take(Stream, maps:get(parts, State)),
            <<?SHORT, Data/binary>> = iolist_to_binary(Parts),
            ok = macula_quic:send(Stream, <<(erlang:crc32(Data)):64>>, #{fin => true}),
            serve(State#{parts := Rest});
        {quic, new_stream, Stream, _} when Mode =:= active ->
            #{parts := Parts} = State,
            serve(State#{parts := Parts#{Stream => []}});
        {quic, new_stream, Stream, _} when Mode =:= inline ->
            case macula_quic:recv(Stream, 1, 5000) of
                {ok, <<?IDLE>>} ->
                    serve(State#{held := [Stream | maps:get(held, State)]});
                {ok, <<Ask>>} ->
                    _ = Ask =:= ?WEIGH andalso collect_garbage(),
                    ok = tell(Stream, seen(State)),
                    serve(State)
            end;
        {quic, new_stream, Stream, _} ->
            Owner = self(),
            Shared = maps:with([pattern, sums, streams], State),
            Pid = spawn(fun() -> receive go -> answer(Stream, Owner, Shared) end end),
            ok = macula_quic:controlling_process(Stream, Pid),
            Pid ! go,
            serve(State);
        {quic, new_conn, Conn, #{server_name := <<"refused">>}} ->
            ok = macula_quic:close_connection(Conn, ?REFUSED, <<>>),
            serve(State);
        {quic, new_conn, Conn, _Info} when Mode =:= tickets ->
            #{parts := Parts} = State,
            {ok, Stream} = macula_quic:open_stream(Conn, [{direction, unidirectional}]),
            ok = macula_quic:send(Stream, <<?SHORT>>, #{fin => true}),
            serve(State#{parts := Parts#{Conn => []}});
        {quic, shutdown, Conn, _} when Mode =:= tickets ->
            serve(State#{parts := maps:remove(Conn, maps:get(parts, State))});
        {quic, new_conn, Conn, _Info} ->
            _ = [ok = macula_quic:setopt(Conn, datagrams, true) || Mode =:= datagrams],
            ok = macula_quic:async_accept_stream(Conn, [{active, Mode =:= active}]),
            serve(State#{conns := [Conn | maps:get(conns, State)]});
        {seen, From, Ref} ->
            From ! {Ref, seen(State)},
            serve(State);
        {quic, _What, _Handle, _Detail} ->
            serve(State)
    end.

%% Streams held, datagrams counted and the microseconds between the first and the last, datagrams that
%% QUIC has had, fairness, unevenness.
seen(#{mode := Mode, held := Held, datagrams := Datagrams, first := First, last := Last,
       conns := Conns, sums := Sums}) ->
    Arrived = case Mode of
        datagrams ->
            {ok, [{recv_datagrams, N}]} = macula_quic:getstat(hd(Conns), [recv_datagrams]),
            N;
        _ ->
            0
    end,
    [length(Held), Datagrams, Last - First, Arrived, atomics:get(Sums, 3), atomics:get(Sums, 4)].

tell(Stream, Numbers) ->
    macula_quic:send(Stream, << <<N:64>> || N <- Numbers >>, #{fin => true}).

collect_garbage() ->
    lists:foreach(fun erlang:garbage_collect/1, erlang:processes()).

answer(Stream, Owner, Shared) ->
    case macula_quic:recv(Stream, 1) of
        {ok, <<?ECHO_ACTIVE>>} ->
            ok = macula_quic:setopt(Stream, active, true),
            echo(Stream);
        {ok, <<?ECHO_PASSIVE>>} ->
            echo_passive(Stream);
        {ok, <<?COUNT>>} ->
            {ok, <<All:64, Number:64>>} = macula_quic:recv(Stream, 16),
            Slot = atomics:add_get(maps:get(sums, Shared), 2, 1),
            ok = macula_quic:setopt(Stream, active, 100),
            count(Stream, 0, Shared#{slot => Slot, number => Number, half => All div 2});
        {ok, <<?ASK>>} ->
            Ref = make_ref(),
            Owner ! {seen, self(), Ref},
            ok = tell(Stream, receive {Ref, Seen} -> Seen end),
            %% The stream is reset when its owner ends before all is delivered.
            receive {quic, stream_closed, Stream, _} -> ok end
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

echo_passive(Stream) ->
    case macula_quic:recv(Stream, ?SMALL) of
        {ok, Data} ->
            ok = macula_quic:send(Stream, Data),
            echo_passive(Stream);
        {error, _} ->
            ok
    end.

count(Stream, Total, #{pattern := Pattern} = Shared) ->
    receive
        {quic, Data, Stream, _} when is_binary(Data) ->
            true = is_pattern(Pattern, Total, Data),
            ok = note(byte_size(Data), Shared),
            count(Stream, Total + byte_size(Data), Shared);
        {quic, passive, Stream, _} ->
            ok = macula_quic:setopt(Stream, active, 100),
            count(Stream, Total, Shared);
        {quic, peer_send_shutdown, Stream, _} ->
            ok = macula_quic:send(Stream, <<Total:64>>, #{fin => true}),
            receive {quic, stream_closed, Stream, _} -> ok end;
        {quic, stream_closed, Stream, _} ->
            ok;
        _ ->
            count(Stream, Total, Shared)
    end.

%% At half of all bytes: how evenly they came, with the streams of which nothing has come yet.
note(Size, #{sums := Sums, streams := Streams, slot := Slot, number := Number, half := Half}) ->
    ok = counters:add(Streams, Slot, Size),
    case atomics:add_get(Sums, 1, Size) of
        Now when Now >= Half, Now - Size < Half ->
            Bytes = [counters:get(Streams, N) || N <- lists:seq(1, Number)],
            Sum = lists:sum(Bytes),
            Squares = lists:sum([B * B || B <- Bytes]),
            atomics:put(Sums, 3, 1000000 * Sum * Sum div (Number * Squares)),
            Furthest = lists:max([abs(B * Number - Sum) || B <- Bytes]),
            atomics:put(Sums, 4, 1000000 * Furthest div Sum);
        _ ->
            ok
    end.

%%--------------------------------------------------------------------------------------------
%% Client

%% @doc Does one kind of work against the server and measures it. The load says how long (`ms'), how much
%% (`bytes', `chunk', `count') and how many at the same time (`parallel'); `pids' are the
%% operating system's names of both VMs.
-spec client(atom(), server(), map()) -> measures().
client(connections, Server, #{ms := Ms, parallel := Parallel}) ->
    Start = now_us(),
    Deadline = Start + Ms * 1000,
    Count = lists:sum(in_parallel(Parallel, fun(_) -> dial(Server, Deadline, 0) end)),
    [{per_second, Count * 1.0e6 / (now_us() - Start)}];
client(handshakes, Server, #{ms := Ms, parallel := Parallel, pids := Pids} = Load) ->
    Resumes = maps:get(resumption, Load, true),
    %% The name of each has tickets of its own, from the first connection on.
    Options = fun(N) -> [{resumption, Resumes}, {server_name_indication, dialer(N)}] end,
    _ = [greeted(Server, Options(N)) || N <- lists:seq(1, Parallel)],
    Dials = fun(For) ->
        Deadline = now_us() + For * 1000,
        lists:sum(in_parallel(Parallel, fun(N) -> greeted(Server, Options(N), Resumes, Deadline, 0) end))
    end,
    _ = Dials(Ms div 5),
    Cpu = cpu(Pids),
    Start = now_us(),
    Count = Dials(Ms),
    Took = now_us() - Start,
    [{per_second, Count * 1.0e6 / Took} | spent(cpu_us, Cpu, cpu(Pids), 1.0e6 / Count)];
client(idle_connections, Server, #{count := Count, pids := Pids}) ->
    Dial = fun(_) ->
        Conn = connect(Server),
        _ = ask(Conn, ?ASK),
        Conn
    end,
    First = lists:map(Dial, lists:seq(1, ?FIRST)),
    growth(hd(First), Count, Pids, fun() -> lists:map(Dial, lists:seq(1, Count)) end);
client(idle_streams, Server, #{count := Count, pids := Pids}) ->
    Conn = connect(Server),
    First = hold(Conn, ?FIRST, ?FIRST),
    growth(Conn, Count, Pids, fun() -> [First | hold(Conn, Count, ?FIRST + Count)] end);
client(behaviours, {Port, Trust}, #{ms := Ms, parallel := Parallel}) ->
    Own = #{tell => self()},
    {ok, Pid} = macula_quic_connection:start_link(
        macula_bench_behaviours, {"127.0.0.1", Port}, {maps:merge(Own, maps:from_list([{alpn, [?ALPN]} | Trust])), #{}}),
    Conn = receive {connected, Handle} -> Handle after 10000 -> error(not_connected) end,
    Options = Own#{data => rand:bytes(?SMALL), is_local => true, active => true},
    %% Without a link: they end with the connection, and not as `normal'.
    Streams = [begin
        {ok, Stream} = macula_quic_stream:start(macula_bench_behaviours, Conn, Options),
        Stream
    end || _ <- lists:seq(1, Parallel)],
    Start = now_us(),
    _ = [Stream ! {go, Start + Ms * 200, Start + Ms * 1000} || Stream <- Streams],
    Times = [receive {times, Stream, Each} -> Each after Ms + 10000 -> error(no_echo) end || Stream <- Streams],
    ok = gen_server:stop(Pid),
    latencies(Ms, Times);
client(Work, Server, Load) ->
    Conn = connect(Server),
    Measures = on(Conn, Work, Load),
    ok = macula_quic:close(Conn),
    Measures.

connect(Server) ->
    connect(Server, []).

connect({Port, Trust}, Options) ->
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{alpn, [?ALPN]} | Trust ++ Options], 10000),
    Conn.

on(Conn, echo, #{ms := Ms, parallel := Parallel} = Load) ->
    Active = maps:get(active, Load, true),
    Start = now_us(),
    Data = rand:bytes(?SMALL),
    latencies(Ms, in_parallel(Parallel, fun(_) ->
        {ok, Stream} = macula_quic:open_stream(Conn, [{active, Active}]),
        ok = macula_quic:send(Stream, case Active of
            true -> <<?ECHO_ACTIVE>>;
            false -> <<?ECHO_PASSIVE>>
        end),
        echoes(fun() ->
            ok = macula_quic:send(Stream, Data),
            Data = take(Active, Stream)
        end, Start + Ms * 200, Start + Ms * 1000, [])
    end));
on(Conn, short, #{ms := Ms, parallel := Parallel, pids := Pids}) ->
    _ = short_streams(Conn, Parallel, Ms div 5),
    Cpu = cpu(Pids),
    Start = now_us(),
    Count = short_streams(Conn, Parallel, Ms),
    Took = now_us() - Start,
    [{per_second, Count * 1.0e6 / Took} | spent(cpu_us, Cpu, cpu(Pids), 1.0e6 / Count)];
on(Conn, datagrams, #{ms := Ms, parallel := Parallel}) ->
    Rest = piece(pattern(), 0, ?DATAGRAM - 8),
    Start = now_us(),
    Deadline = Start + Ms * 1000,
    Sent = lists:sum(in_parallel(Parallel, fun(_) -> send_datagrams(Conn, Rest, Deadline, 0) end)),
    Took = now_us() - Start,
    [_, Received, Between, Arrived | _] = settled(Conn, Sent, ask(Conn, ?ASK), now_us()),
    {ok, [{sent_datagrams, Left}]} = macula_quic:getstat(Conn, [sent_datagrams]),
    [{sent_per_second, Sent * 1.0e6 / Took},
     {received_per_second, Received * 1.0e6 / max(1, Between)},
     {dropped_percent, 100 * (max(0, Sent - Left) + max(0, Arrived - Received)) / Sent},
     {lost_percent, 100 * max(0, Left - Arrived) / Sent}];
on(Conn, bulk, #{bytes := Bytes, chunk := Chunk, parallel := Parallel, pids := Pids}) ->
    Each = Bytes div Parallel,
    All = Each * Parallel,
    Pattern = pattern(),
    Cpu = cpu(Pids),
    Start = now_us(),
    _ = in_parallel(Parallel, fun(_) ->
        {ok, Stream} = macula_quic:open_stream(Conn),
        ok = macula_quic:send(Stream, <<?COUNT, All:64, Parallel:64>>),
        ok = send_pattern(Stream, Pattern, 0, Each, Chunk),
        ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
        {ok, <<Each:64>>} = macula_quic:recv(Stream, 8, 120000)
    end),
    %% Bytes per microsecond are MB/s.
    Rate = All / (now_us() - Start),
    Spent = spent(cpu_s_per_gb, Cpu, cpu(Pids), 1.0e9 / All),
    [_, _, _, _, Fairness, Uneven] = ask(Conn, ?ASK),
    [{mb_s, Rate}, {fairness, Fairness / 1.0e6}, {uneven, Uneven / 1.0e6} | Spent].

take(false, Stream) ->
    {ok, Data} = macula_quic:recv(Stream, ?SMALL, 10000),
    Data;
take(true, Stream) ->
    receive
        {quic, Data, Stream, _} when byte_size(Data) =:= ?SMALL ->
            Data;
        {quic, Data, Stream, _} when is_binary(Data) ->
            take_rest(Stream, Data)
    after 10000 -> error(no_echo)
    end.

take_rest(_Stream, Data) when byte_size(Data) >= ?SMALL ->
    Data;
take_rest(Stream, Data) ->
    receive
        {quic, More, Stream, _} when is_binary(More) ->
            take_rest(Stream, <<Data/binary, More/binary>>)
    after 10000 -> error(no_echo)
    end.

%% The nanoseconds of each echo that begins after the warm-up.
echoes(Echo, Warm, Deadline, Times) ->
    Before = erlang:monotonic_time(nanosecond),
    _ = Echo(),
    After = erlang:monotonic_time(nanosecond),
    if
        After div 1000 < Warm -> echoes(Echo, Warm, Deadline, Times);
        After div 1000 < Deadline -> echoes(Echo, Warm, Deadline, [After - Before | Times]);
        true -> Times
    end.

latencies(Ms, Lists) ->
    Times = list_to_tuple(lists:sort(lists:append(Lists))),
    Count = tuple_size(Times),
    At = fun(Part) -> element(max(1, Count * Part div 100), Times) / 1000 end,
    [{p50_us, At(50)}, {p99_us, At(99)}, {per_second, Count * 1000 / (Ms * 0.8)}].

%% How many streams were opened, answered and closed.
short_streams(Conn, Parallel, Ms) ->
    Deadline = now_us() + Ms * 1000,
    lists:sum(in_parallel(Parallel, fun(_) -> short(Conn, rand:bytes(?SMALL - 9), Deadline, 0) end)).

short(Conn, Rest, Deadline, Count) ->
    Data = <<Count:64, Rest/binary>>,
    {ok, Stream} = macula_quic:open_stream(Conn, [{active, true}]),
    ok = macula_quic:send(Stream, <<?SHORT, Data/binary>>, #{fin => true}),
    Hash = until_closed(Stream, <<>>),
    {Hash, Hash} = {Hash, <<(erlang:crc32(Data)):64>>},
    case now_us() < Deadline of
        true -> short(Conn, Rest, Deadline, Count + 1);
        false -> Count + 1
    end.

until_closed(Stream, Data) ->
    receive
        {quic, More, Stream, _} when is_binary(More) -> until_closed(Stream, <<Data/binary, More/binary>>);
        {quic, stream_closed, Stream, _} -> Data;
        {quic, peer_send_shutdown, Stream, _} -> until_closed(Stream, Data)
    after 10000 -> error(stream_not_closed)
    end.

send_datagrams(Conn, Rest, Deadline, Sent) ->
    ok = macula_quic:send_datagram(Conn, <<Sent:64, Rest/binary>>),
    case now_us() < Deadline of
        true -> send_datagrams(Conn, Rest, Deadline, Sent + 1);
        false -> Sent + 1
    end.

%% What the server has seen, when all is there or no more comes.
settled(_Conn, Sent, [_, Sent | _] = Seen, _Changed) ->
    Seen;
settled(Conn, Sent, [_, Datagrams | _] = Seen, Changed) ->
    case ask(Conn, ?ASK) of
        [_, Datagrams | _] ->
            case now_us() - Changed > ?SETTLED * 1000 of
                true ->
                    Seen;
                false ->
                    receive after 10 -> ok end,
                    settled(Conn, Sent, Seen, Changed)
            end;
        Newer ->
            settled(Conn, Sent, Newer, now_us())
    end.

%% The server closes every connection with a code, which the dialer waits for.
dial(Server, Deadline, Count) ->
    Conn = connect(Server, [{server_name_indication, "refused"}]),
    %% A handle that nobody holds has nobody to tell.
    ok = receive
        {quic, shutdown, Conn, {application_close, ?REFUSED, <<>>}} -> ok
    after 10000 -> error(connection_not_closed)
    end,
    case now_us() < Deadline of
        true -> dial(Server, Deadline, Count + 1);
        false -> Count + 1
    end.

%% Until the server has said its byte: tickets come before it.
greeted(Server, Options) ->
    Conn = connect(Server, Options),
    {ok, Stream} = macula_quic:accept_stream(Conn, #{}, 10000),
    {ok, <<?SHORT>>} = macula_quic:recv(Stream, 1, 10000),
    {ok, #{resumed := Resumed}} = macula_quic:info(Conn),
    ok = macula_quic:close(Conn),
    ok = receive {quic, closed, Conn, normal} -> ok after 10000 -> error(not_closed) end,
    Resumed.

greeted(Server, Options, Resumes, Deadline, Count) ->
    Resumes = greeted(Server, Options),
    ok = forget(),
    case now_us() < Deadline of
        true -> greeted(Server, Options, Resumes, Deadline, Count + 1);
        false -> Count + 1
    end.

dialer(N) ->
    "dialer" ++ integer_to_list(N) ++ ".example".

%% What else the connection has told.
forget() ->
    receive {quic, _, _, _} -> forget() after 0 -> ok end.

send_pattern(_Stream, _Pattern, Place, All, _Chunk) when Place =:= All ->
    ok;
send_pattern(Stream, Pattern, Place, All, Chunk) ->
    Size = min(Chunk, All - Place),
    ok = macula_quic:send(Stream, piece(Pattern, Place, Size)),
    send_pattern(Stream, Pattern, Place + Size, All, Chunk).

%% Opens idle streams until the server holds so many.
hold(Conn, Count, All) ->
    Streams = [begin
        {ok, Stream} = macula_quic:open_stream(Conn),
        ok = macula_quic:send(Stream, <<?IDLE>>),
        Stream
    end || _ <- lists:seq(1, Count)],
    ok = held(Conn, All),
    Streams.

held(Conn, All) ->
    case ask(Conn, ?ASK) of
        [All | _] -> ok;
        _ -> receive after 10 -> held(Conn, All) end
    end.

%% Kilobytes resident in both VMs, of each of so many.
growth(Conn, Count, Pids, Make) ->
    Weigh = fun() ->
        collect_garbage(),
        _ = ask(Conn, ?WEIGH),
        macula_test_nodes:resident_kb(Pids)
    end,
    Before = Weigh(),
    Held = Make(),
    Growth = spent(kb_each, Before, Weigh(), 1 / Count),
    %% So that none is collected before.
    _ = erlang:phash2(Held),
    Growth.

ask(Conn, Kind) ->
    {ok, Stream} = macula_quic:open_stream(Conn),
    ok = macula_quic:send(Stream, <<Kind>>, #{fin => true}),
    {ok, Answer} = macula_quic:recv(Stream, 6 * 8, 30000),
    [N || <<N:64>> <= Answer].

%%--------------------------------------------------------------------------------------------
%% The echo by gen_tcp, and what the schedulers say of either

%% @doc Echoes on every connection; the port.
-spec tcp_server() -> inet:port_number().
tcp_server() ->
    start(fun() ->
        {ok, Listener} = gen_tcp:listen(0, [binary, {ip, {127, 0, 0, 1}}, {active, false},
                                            {nodelay, true}, {backlog, 1024}]),
        {ok, Port} = inet:port(Listener),
        {Port, fun() -> tcp_accept(Listener) end}
    end).

tcp_accept(Listener) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    Pid = spawn(fun() ->
        receive go -> ok end,
        ok = inet:setopts(Socket, [{active, true}]),
        tcp_echo(Socket)
    end),
    ok = gen_tcp:controlling_process(Socket, Pid),
    Pid ! go,
    tcp_accept(Listener).

tcp_echo(Socket) ->
    receive
        {tcp, Socket, Data} ->
            ok = gen_tcp:send(Socket, Data),
            tcp_echo(Socket);
        {tcp_closed, Socket} ->
            ok
    end.

%% @doc The same echoes as `client(echo, ...)' over connections of gen_tcp.
-spec tcp_client(inet:port_number(), map()) -> measures().
tcp_client(Port, #{ms := Ms, parallel := Parallel}) ->
    Start = now_us(),
    Data = rand:bytes(?SMALL),
    latencies(Ms, in_parallel(Parallel, fun(_) ->
        {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, true}, {nodelay, true}]),
        echoes(fun() ->
            ok = gen_tcp:send(Socket, Data),
            receive {tcp, Socket, Data} -> ok after 10000 -> error(no_echo) end
        end, Start + Ms * 200, Start + Ms * 1000, [])
    end)).

%% @doc Counts from now on what occupies a scheduler for a millisecond or longer.
-spec watch() -> ok.
watch() ->
    start(fun() ->
        true = register(?MODULE, self()),
        _ = erlang:system_monitor(self(), [{long_schedule, 1}]),
        {ok, fun() -> watching(0) end}
    end).

watching(Count) ->
    receive
        {monitor, _, long_schedule, _} -> watching(Count + 1);
        {watched, From, Ref} -> From ! {Ref, Count}
    end.

-spec watched() -> non_neg_integer().
watched() ->
    Ref = make_ref(),
    ?MODULE ! {watched, self(), Ref},
    receive {Ref, Count} -> Count after 10000 -> error(no_watch) end.

%%--------------------------------------------------------------------------------------------
%% Both

pattern() ->
    {Bytes, _} = rand:bytes_s(?PERIOD, rand:seed_s(exsss, {1, 2, 3})),
    <<Bytes/binary, Bytes/binary, (binary:part(Bytes, 0, ?LONGEST - ?PERIOD))/binary>>.

%% So many bytes from this place on, at most 64 KiB.
piece(Pattern, Place, Size) ->
    binary:part(Pattern, Place rem ?PERIOD, Size).

is_pattern(Pattern, Place, Bytes) when byte_size(Bytes) =< ?LONGEST ->
    piece(Pattern, Place, byte_size(Bytes)) =:= Bytes;
is_pattern(Pattern, Place, Bytes) ->
    <<First:?LONGEST/binary, Rest/binary>> = Bytes,
    is_pattern(Pattern, Place, First) andalso is_pattern(Pattern, Place + ?LONGEST, Rest).

%% What each of so many processes gives.
in_parallel(Count, Fun) ->
    Pids = [spawn_monitor(fun() -> exit({done, Fun(N)}) end) || N <- lists:seq(1, Count)],
    [receive
        {'DOWN', Ref, process, Pid, {done, Result}} -> Result;
        {'DOWN', Ref, process, Pid, Reason} -> error({worker, Reason})
     end || {Pid, Ref} <- Pids].

%% Seconds of processor time that the processes have taken, where the system tells.
cpu(Pids) ->
    of_all([begin
        [_, AfterName] = string:split(Stat, ") ", trailing),
        Fields = string:lexemes(AfterName, " "),
        lists:sum([binary_to_integer(lists:nth(N, Fields)) || N <- [12, 13]]) / 100
    end || Pid <- Pids, {ok, Stat} <- [file:read_file("/proc/" ++ Pid ++ "/stat")]], Pids).

of_all(Values, Pids) when length(Values) =:= length(Pids) -> lists:sum(Values);
of_all(_Values, _Pids) -> unknown.

spent(_Name, Before, After, _Factor) when Before =:= unknown; After =:= unknown -> [];
spent(Name, Before, After, Factor) -> [{Name, (After - Before) * Factor}].

now_us() ->
    erlang:monotonic_time(microsecond).
