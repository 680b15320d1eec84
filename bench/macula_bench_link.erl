%% @doc The rows of the bench that need a slow line: a conversation beside bulk, and beside a file that is copied.
%%
%% `scripts/bench-link' makes two namespaces and calls {@link main/1}; the program `macula_bench_link' is the line
%% between them: 200 Mbit/s, 20 ms round trip, a queue of 500 KB, and loss. Where there are no namespaces the line
%% is `macula_relay', which carries datagrams only: rows of macula alone.
-module(macula_bench_link).

-export([main/1]).
-export([receivers/1, received/0, bulk/2, ping/2]).
-export([take_file/2, copy_file/2, is_copied/1, taken_file/1]).

-define(RATE, 25_000_000).
-define(DELAY_US, 10_000).
-define(QUEUE, 500_000).
%% What a packet of 1,500 bytes has room for, without the headers of IP and UDP.
-define(DATAGRAM, 1472).
-define(HOSTS, ["10.99.0.1", "10.99.0.2"]).
-define(SUBJECTS, [inet_tcp, inet_tls, macula, macula_one, macula_file]).
-define(BULK, 1048576).
%% What is read of a file and sent at a time.
-define(PIECE, 262144).
%% Messages of a stream, before the receiver has to ask for more.
-define(AHEAD, 32).
%% How long the last answers are waited for, in ms: over TLS a process may not even get to send beside bulk.
-define(PATIENCE, 30000).

%% The program, or a relay and the port that it sends to.
-type line() :: {program, port()} | {relay, pid(), inet:port_number()}.

%% @doc Arguments: the program, or `relay', and a file for results.
-spec main([string()]) -> no_return().
main([Program, Out]) ->
    try
        Ms = number_of("MACULA_BENCH_MS", 8000),
        Repetitions = number_of("MACULA_BENCH_REPETITIONS", 1),
        Losses = [list_to_float(L) || L <- string:lexemes(os:getenv("MACULA_BENCH_LOSS", "0.0,0.01,0.05"), ",")],
        Crowds = [list_to_integer(N) || N <- string:lexemes(os:getenv("MACULA_BENCH_CROWD", "1,100"), ",")],
        Line = line(Program),
        Subjects = subjects(Line),
        File = filename:absname(Out ++ ".file"),
        Tls = Out ++ ".tls",
        Certs = macula_bench_certs:write(filename:absname(Tls), ?HOSTS),
        ok = make_file([Subject || macula_file = Subject <- Subjects], File),
        Runs = [begin
            ok = lose(Loss, Line),
            {Row, _} = {measure(Subject, Crowd, Ms, Line, {File, Certs}), settle()},
            io:format("~s~n", [row(Subject, Loss, Crowd, Row)]),
            {{Crowd, Loss, Subject}, Row}
        end || Repetition <- lists:seq(1, Repetitions), Crowd <- Crowds, Loss <- Losses,
               Crowd =:= 1 orelse Loss == 0, Subject <- Subjects,
               %% The copy of a file takes its time: it comes once.
               Subject =/= macula_file orelse Crowd =:= 1 andalso Repetition =:= 1],
        _ = file:delete(File),
        ok = file:del_dir_r(Tls),
        Medians = [median_row(Key, [Row || {K, Row} <- Runs, K =:= Key])
                   || Key <- lists:usort([Key || {Key, _} <- Runs])],
        io:format("~s", [Medians]),
        ok = file:write_file(Out, [[[row(Subject, Loss, Crowd, Row), "\n"]
                                    || {{Crowd, Loss, Subject}, Row} <- Runs], Medians]),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format(standard_error, "bench: ~tp~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

%% The line, without loss.
-spec line(string()) -> line().
line("relay") ->
    Port = macula_test_nodes:free_udp_port(),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}, rate => ?RATE, queue => ?QUEUE,
                                            delay_ms => ?DELAY_US div 1000, largest => ?DATAGRAM}),
    io:format("bench: the line is a relay of UDP; rows of inet_tcp and inet_tls are missing~n"),
    {relay, Relay, Port};
line(Program) ->
    [A, B] = [Host ++ "/24" || Host <- ?HOSTS],
    Line = open_port({spawn_executable, Program},
                     [{args, ["macula_a", A, "macula_b", B, integer_to_list(?RATE), integer_to_list(?DELAY_US),
                              integer_to_list(?QUEUE)]},
                      {line, 300}, exit_status]),
    receive {Line, {data, {eol, "ready"}}} -> ok end,
    {program, Line}.

-spec subjects(line()) -> [atom()].
subjects(Line) ->
    Text = os:getenv("MACULA_BENCH_CARRIERS", lists:join(",", [atom_to_list(S) || S <- ?SUBJECTS])),
    Named = [list_to_atom(Subject) || Subject <- string:lexemes(Text, ",")],
    case {Named -- ?SUBJECTS, Line} of
        {[], {relay, _, _}} -> Named -- [inet_tcp, inet_tls];
        {[], _} -> Named;
        {Unknown, _} -> error({unknown, "MACULA_BENCH_CARRIERS", Unknown, {known, ?SUBJECTS}})
    end.

-spec lose(float(), line()) -> ok.
lose(Loss, {program, Line}) ->
    true = port_command(Line, io_lib:format("loss ~f~n", [Loss])),
    ok;
lose(Loss, {relay, Relay, _}) ->
    macula_relay:set(Relay, #{loss => Loss}).

%% Bytes that repeat nowhere, for those that copy a file.
make_file([], _File) ->
    ok;
make_file(_, File) ->
    {ok, Device} = file:open(File, [write, raw, binary]),
    [ok = file:write(Device, rand:bytes(?BULK)) || _ <- lists:seq(1, number_of("MACULA_BENCH_FILE_MB", 1024))],
    file:close(Device).

settle() ->
    receive after 200 -> ok end.

number_of(Variable, Default) ->
    case string:to_integer(os:getenv(Variable, integer_to_list(Default))) of
        {N, ""} when N > 0 -> N;
        _ -> error({not_a_positive_number, Variable})
    end.

row(Subject, Loss, Crowd, #{p50 := P50, p99 := P99, max := Max, count := Count, bulk := Bulk,
                            figures := Figures} = Row) ->
    io_lib:format("~-12s loss ~4.1f %  ~3b bulk, ~3b small  p50 ~7.1f  p99 ~7.1f  max ~7.1f ms  (~b pings)  "
                  "bulk ~5.1f MB/s~s~n    ~s",
                  [Subject, Loss * 100, Crowd, Crowd, P50 / 1000, P99 / 1000, Max / 1000, Count, Bulk,
                   file_row(Row), line_row(Figures)]).

file_row(#{file := {Bytes, Rate}}) ->
    io_lib:format("  file of ~b bytes ~5.1f MB/s, delivered whole", [Bytes, Rate]);
file_row(_) ->
    "".

median_row({Crowd, Loss, Subject}, Rows) ->
    [P50, P99, Max, Bulk] = [median([maps:get(Key, Row) || Row <- Rows]) || Key <- [p50, p99, max, bulk]],
    File = case [FileRate || #{file := {_, FileRate}} <- Rows] of
        [] -> "";
        Rates -> io_lib:format("  file ~5.1f MB/s", [median(Rates)])
    end,
    io_lib:format("median of ~b: ~-12s loss ~4.1f %  ~3b bulk, ~3b small  p50 ~7.1f  p99 ~7.1f  max ~7.1f ms  "
                  "bulk ~5.1f MB/s~s~n",
                  [length(Rows), Subject, Loss * 100, Crowd, Crowd, P50 / 1000, P99 / 1000, Max / 1000, Bulk, File]).

median(Values) ->
    lists:nth((length(Values) + 1) div 2, lists:sort(Values)).

%% What the line says of itself: for how long packets waited at its beginning, and how late it was itself. A relay
%% knows how many came, and how many found no room.
line_row({Came, Full}) ->
    io_lib:format("of ~b packets to the relay ~b found no room in its queue", [Came, Full]);
line_row([Q50, Q99, Q100, _, L99, L100, Full | _]) ->
    io_lib:format("in the line's queue p50 ~.1f  p99 ~.1f  max ~.1f ms, ~b dropped; the line late p99 ~.1f  max ~.1f ms",
                  [Q50 / 1000, Q99 / 1000, Q100 / 1000, Full, L99 / 1000, L100 / 1000]).

%% Since the last time, or since there is a relay.
figures({relay, Relay, _}) ->
    #{up := #{received := Came, queue_dropped := Full}} = macula_relay:stats(Relay),
    {Came, Full};
figures({program, Line}) ->
    true = port_command(Line, "figures\n"),
    receive
        {Line, {data, {eol, "figures " ++ Figures}}} ->
            [list_to_integer(N) || N <- string:lexemes(Figures, " ")]
    end.

%% Of figures before and after something, those of what was between.
since({CameBefore, FullBefore}, {Came, Full}) -> {Came - CameBefore, Full - FullBefore};
since(_, Figures) -> Figures.

measure(Subject, Crowd, Ms, Line, {File, Certs}) ->
    {Carrier, Args} = case Subject of
        macula_one -> {macula, ["-macula_dist_lanes", "1"]};
        macula_file -> {macula, []};
        inet_tls -> {inet_tls, ["-ssl_dist_optfile", Certs]};
        _ -> {Subject, []}
    end,
    macula_test_nodes:with_nodes(nodes_at(Line, Carrier, Args), fun([A, B]) ->
        case Subject of
            macula_file -> beside(A, B, Crowd, Line, fun(Ping) -> pings_beside_file(A, B, File, Ms, Ping) end);
            _ -> beside(A, B, Crowd, Line, fun(Ping) -> {Ping(Ms), #{}} end)
        end
    end).

%% Both ends of the line. No EPMD on either side: both listen where the other knows.
-spec nodes_at(line(), atom(), [string()]) -> [macula_test_nodes:options()].
nodes_at({program, _}, Carrier, Args) ->
    Fixed = ["-start_epmd", "false", "-erl_epmd_port", "4433", "-kernel", "inet_dist_listen_min", "4433",
             "inet_dist_listen_max", "4433"],
    [#{carrier => Carrier, name => "bench", host => Host, args => Fixed ++ Args,
       exec => {os:find_executable("ip"), ["netns", "exec", Namespace, "erl"]}}
     || {Namespace, Host} <- lists:zip(["macula_a", "macula_b"], ?HOSTS)];
nodes_at({relay, Relay, Port}, macula, Args) ->
    %% The second answers on the connection of the first, and dials nobody.
    Table = lists:flatten(io_lib:format("~0p", [#{'bench_b@127.0.0.1' => {"127.0.0.1", macula_relay:port(Relay)}}])),
    [#{carrier => macula, name => Name,
       args => ["-no_epmd", "-start_epmd", "false", "-macula_dist_port", integer_to_list(Listens), "-macula",
                "dist_nodes", Table | Args]}
     || {Name, Listens} <- [{"bench_a", macula_test_nodes:free_udp_port()}, {"bench_b", Port}]].

%% Pings until the file is copied. What the receiver has got is what was sent, by count and hash.
pings_beside_file(A, B, File, Ms, Ping) ->
    Taker = macula_test_nodes:call(B, ?MODULE, take_file, [macula_test_nodes:name(A), File ++ ".copy"]),
    Begun = erlang:monotonic_time(microsecond),
    Sender = macula_test_nodes:call(A, ?MODULE, copy_file, [macula_test_nodes:name(B), File]),
    Times = pings_until_copied(A, Sender, Ms, Ping),
    {Bytes, _} = Taken = macula_test_nodes:call(B, ?MODULE, taken_file, [Taker], 600000),
    Took = erlang:monotonic_time(microsecond) - Begun,
    [Taken, Taken] = [about_file(Path) || Path <- [File, File ++ ".copy"]],
    ok = file:delete(File ++ ".copy"),
    {Times, #{file => {Bytes, Bytes / Took}}}.

pings_until_copied(A, Sender, Ms, Ping) ->
    Times = Ping(Ms),
    case macula_test_nodes:call(A, ?MODULE, is_copied, [Sender]) of
        true -> Times;
        false -> Times ++ pings_until_copied(A, Sender, Ms, Ping)
    end.

about_file(Path) ->
    {ok, Device} = file:open(Path, [read, raw, binary]),
    about_file(Device, 0, crypto:hash_init(sha256)).

about_file(Device, Bytes, Hash) ->
    case file:read(Device, ?BULK) of
        {ok, Data} ->
            about_file(Device, Bytes + byte_size(Data), crypto:hash_update(Hash, Data));
        eof ->
            ok = file:close(Device),
            {Bytes, crypto:hash_final(Hash)}
    end.

beside(A, B, Crowd, Line, Converse) ->
    pong = macula_test_nodes:call(A, net_adm, ping, [macula_test_nodes:name(B)]),
    {Sinks, Echoes} = macula_test_nodes:call(B, ?MODULE, receivers, [Crowd]),
    ok = macula_test_nodes:call(A, ?MODULE, bulk, [Sinks, ?BULK]),
    receive after 2000 -> ok end,
    %% Asked past the line, and of the receiver.
    FiguresBefore = figures(Line),
    Before = macula_test_nodes:call(B, ?MODULE, received, []),
    Start = erlang:monotonic_time(microsecond),
    {Times, More} = Converse(fun(Ms) -> macula_test_nodes:call(A, ?MODULE, ping, [Echoes, Ms], Ms + 120000) end),
    After = macula_test_nodes:call(B, ?MODULE, received, []),
    Figures = since(FiguresBefore, figures(Line)),
    Took = erlang:monotonic_time(microsecond) - Start,
    Sorted = lists:sort(Times),
    Count = length(Sorted),
    More#{p50 => lists:nth(Count div 2 + 1, Sorted), p99 => lists:nth(min(Count, Count * 99 div 100 + 1), Sorted),
      max => lists:last(Sorted), count => Count, bulk => (After - Before) / Took,
      figures => Figures}.

%% @private
-spec receivers(pos_integer()) -> {[pid()], [pid()]}.
receivers(Crowd) ->
    Bytes = counters:new(1, []),
    ok = persistent_term:put(?MODULE, Bytes),
    {[spawn(fun() -> receive_bulk(Bytes) end) || _ <- lists:seq(1, Crowd)],
     [spawn(macula_bench_load, echo, []) || _ <- lists:seq(1, Crowd)]}.

receive_bulk(Bytes) ->
    receive Data -> counters:add(Bytes, 1, byte_size(Data)) end,
    receive_bulk(Bytes).

%% @private
-spec received() -> non_neg_integer().
received() ->
    counters:get(persistent_term:get(?MODULE), 1).

%% @private
-spec bulk([pid()], pos_integer()) -> ok.
bulk(Sinks, Size) ->
    Data = rand:bytes(Size),
    lists:foreach(fun(Sink) -> spawn(fun() -> send(Sink, Data) end) end, Sinks).

send(Sink, Data) ->
    Sink ! Data,
    send(Sink, Data).

%% @private Each waits for the answer, and then 5 ms. An answer that is still missing in the end counts for as long
%% as it has been missing.
-spec ping([pid()], pos_integer()) -> [pos_integer()].
ping(Echoes, Ms) ->
    Now = erlang:monotonic_time(microsecond),
    End = Now + Ms * 1000,
    Self = self(),
    Pingers = maps:from_list([{spawn(fun() -> pings(Echo, End, Self) end), Now} || Echo <- Echoes]),
    Timer = erlang:start_timer(Ms + ?PATIENCE, self(), over),
    answers(Pingers, Timer, []).

answers(Pingers, Timer, Times) when map_size(Pingers) =:= 0 ->
    _ = erlang:cancel_timer(Timer),
    Times;
answers(Pingers, Timer, Times) ->
    receive
        {answer, Pid, Start, Now} -> answers(Pingers#{Pid := Now}, Timer, [Now - Start | Times]);
        {done, Pid} -> answers(maps:remove(Pid, Pingers), Timer, Times);
        {timeout, Timer, over} ->
            Now = erlang:monotonic_time(microsecond),
            [begin exit(Pid, kill), Now - Since end || {Pid, Since} <- maps:to_list(Pingers)] ++ Times
    end.

pings(Echo, End, To) ->
    Start = erlang:monotonic_time(microsecond),
    Echo ! {self(), Start},
    receive {Echo, Start} -> ok end,
    Now = erlang:monotonic_time(microsecond),
    To ! {answer, self(), Start, Now},
    case Now < End of
        true ->
            receive after 5 -> ok end,
            pings(Echo, End, To);
        false ->
            To ! {done, self()}
    end.

%% @private Takes the file that comes from a node by a stream.
-spec take_file(node(), file:filename()) -> pid().
take_file(From, Path) ->
    Starter = self(),
    Pid = spawn(fun() ->
        ok = macula_dist_stream:accept_streams(From, [{active, ?AHEAD}]),
        {ok, Device} = file:open(Path, [write, raw, binary]),
        Starter ! {self(), ready},
        take_pieces(Device, 0, crypto:hash_init(sha256))
    end),
    receive {Pid, ready} -> Pid end.

take_pieces(Device, Bytes, Hash) ->
    receive
        {macula_dist_stream, Stream, {data, Data, Fin}} ->
            ok = file:write(Device, Data),
            {Bytes1, Hash1} = {Bytes + byte_size(Data), crypto:hash_update(Hash, Data)},
            case Fin of
                true ->
                    ok = file:close(Device),
                    ok = macula_dist_stream:close_stream(Stream),
                    receive {get, From} -> From ! {self(), {Bytes1, crypto:hash_final(Hash1)}} end;
                false ->
                    take_pieces(Device, Bytes1, Hash1)
            end;
        {macula_dist_stream, Stream, passive} ->
            ok = macula_dist_stream:setopts(Stream, [{active, ?AHEAD}]),
            take_pieces(Device, Bytes, Hash);
        {macula_dist_stream, _Stream, Event} ->
            exit({stream, Event})
    end.

%% @private How many bytes have come, and their hash, when all have.
-spec taken_file(pid()) -> {non_neg_integer(), binary()}.
taken_file(Taker) ->
    Monitor = monitor(process, Taker),
    Taker ! {get, self()},
    receive
        {Taker, Taken} -> Taken;
        {'DOWN', Monitor, process, Taker, Reason} -> error({not_taken, Reason})
    end.

%% @private Sends a file by a stream.
-spec copy_file(node(), file:filename()) -> pid().
copy_file(To, Path) ->
    spawn(fun() ->
        {ok, Device} = file:open(Path, [read, raw, binary]),
        {ok, Stream} = macula_dist_stream:open_stream(To),
        ok = send_pieces(Stream, Device),
        receive {macula_dist_stream, Stream, closed} -> ok end
    end).

send_pieces(Stream, Device) ->
    case file:read(Device, ?PIECE) of
        {ok, Data} ->
            ok = macula_dist_stream:send(Stream, Data),
            send_pieces(Stream, Device);
        eof ->
            ok = file:close(Device),
            macula_dist_stream:close_stream(Stream)
    end.

%% @private Whether all was sent and acknowledged, or the sender has failed.
-spec is_copied(pid()) -> boolean().
is_copied(Sender) ->
    not is_process_alive(Sender).
