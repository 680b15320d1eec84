%% @doc `make demo': four nodes cluster over QUIC on this machine, do what clusters do, lose one
%% and get it back. Each step checks what it shows; the first that fails ends the demo with status 1.
-module(macula_demo).

-export([main/1]).

-define(NAMES, ["one", "two", "three", "four"]).
-define(HOST, "127.0.0.1").
-define(GIB, (1 bsl 30)).
-define(RECORDS, 2000).
%% Noticing a killed node takes a liveness timeout (10 s by default).
-define(NOTICE_MS, 30000).
-define(STALL_MS, 20000).
-define(LIMIT_MS, 180000).
-define(BAR, 30).

-import(macula_test_nodes, [call/4, call/5, name/1, wait_until/1, wait_until/2]).

%% @doc Arguments: a directory for temporary files, and whether the output is a terminal.
-spec main([string()]) -> no_return().
main([Dir, Terminal]) ->
    put(terminal, Terminal =:= "terminal"),
    %% A demo that hangs has failed, too.
    {ok, _} = timer:apply_after(?LIMIT_MS, erlang, apply, [fun() ->
        io:format(standard_error, "~ndemo: FAILED: not done after ~b s~n", [?LIMIT_MS div 1000]),
        halt(1)
    end, []]),
    try
        demo(Dir),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("~n"),
            io:format(standard_error, "demo: FAILED: ~ts: ~tp~n", [get_or(step, "start"),
                                                                   {Class, Reason, Stack}]),
            halt(1)
    end.

demo(Dir) ->
    Begun = now_ms(),
    title("macula: Erlang distribution over QUIC, four nodes on this machine"),
    line("OTP ~s, ~b schedulers, ~s", [erlang:system_info(otp_release),
                                       erlang:system_info(schedulers_online),
                                       string:trim(os:cmd("uname -sm"))]),
    Macula = [spec(Name) || Name <- ?NAMES],
    Ours = macula_test_nodes:with_nodes(Macula, fun(Nodes) ->
        [One, Two | _] = Nodes,
        cluster(Nodes),
        replicate(Nodes),
        step("Move 1 GiB from one to two"),
        Rate = transfer(One, Two),
        line("  ~b MB/s, in messages of 1 MiB from one process to one process", [round(Rate)]),
        step("Measure call latency"),
        Latency = latency(One, Two),
        kill_and_restart(Nodes),
        {Rate, Latency}
    end),
    step("The same over what OTP ships"),
    Certs = macula_bench_certs:write(filename:join(Dir, "tls"), [?HOST]),
    Tcp = reference(inet_tcp, []),
    Tls = reference(inet_tls, ["-ssl_dist_optfile", Certs]),
    ok = file:del_dir_r(filename:join(Dir, "tls")),
    title("In this run, same transfer and same call"),
    line("  ~-10s ~12s ~14s ~14s", ["carrier", "1 GiB, MB/s", "call p50, us", "call p99, us"]),
    [line("  ~-10s ~12b ~14b ~14b", [Name, round(Rate), round(P50), round(P99)])
     || {Name, {Rate, {P50, P99}}} <- [{"macula", Ours}, {"inet_tls", Tls}, {"inet_tcp", Tcp}]],
    line("~n  inet_tcp is neither encrypted nor authenticated. Done in ~b s.",
         [(now_ms() - Begun) div 1000]).

spec(Name) ->
    #{carrier => macula, name => Name, args => ["-kernel", "logger_level", "error",
                                                    "-mnesia", "schema_location", "ram"]}.

%% Steps

cluster(Nodes) ->
    step("Form a cluster"),
    [ok = call(Node, macula_demo_node, watch, []) || Node <- Nodes],
    Start = now_ms(),
    [First | Rest] = Nodes,
    %% As with any carrier, knowing one member is enough.
    [pong = call(Node, net_adm, ping, [name(First)]) || Node <- Rest],
    ok = meshed(Nodes),
    line("  4 nodes, every one sees the 3 others, after ~b ms", [now_ms() - Start]),
    Links = [{A, B} || A <- Nodes, B <- Nodes, name(A) < name(B)],
    line("  ~-14s ~-7s ~-26s ~s", ["link", "trust", "cipher", "key exchange"]),
    lists:foreach(fun({A, B}) ->
        %% Not TCP under a good name: what net_kernel was told, and what the link itself says.
        Protocol = macula_test_nodes:link_protocol(A, B),
        false = lists:member(Protocol, [tcp, tls]),
        {ok, #{trust := Trust, cipher := Cipher, key_exchange := Exchange}} =
            call(A, macula_dist, info, [name(B)]),
        line("  ~-14s ~-7s ~-26s ~s",
             [[short(A), " - ", short(B)], text(Trust), text(Cipher), text(Exchange)])
    end, Links).

replicate([First | Rest] = Nodes) ->
    step("Replicate a mnesia table"),
    ok = call(First, macula_demo_node, mnesia_start, [[]]),
    [ok = call(Node, macula_demo_node, mnesia_start, [[name(First)]]) || Node <- Rest],
    Start = now_ms(),
    ok = call(First, macula_demo_node, mnesia_fill, [1, ?RECORDS], 60000),
    Checksum = same_checksum(Nodes),
    line("  ~b records in one transaction, ~b ms; the 4 copies are equal (~.16b)",
         [?RECORDS, now_ms() - Start, Checksum]).

%% A transaction is applied at the others a moment after the commit.
same_checksum(Nodes) ->
    wait_until(fun() ->
        case lists:usort([call(Node, macula_demo_node, mnesia_checksum, []) || Node <- Nodes]) of
            [{Count, Checksum}] when Count > 0 -> {value, Checksum};
            Different -> {different, Different}
        end
    end).

kill_and_restart(Nodes) ->
    [One, Two, Three, Four] = Nodes,
    Left = [One, Two, Three],
    step("Kill node four with -9"),
    Name = name(Four),
    Killed = os:system_time(microsecond),
    ok = macula_test_nodes:kill(Four),
    lists:foreach(fun(Node) ->
        {At, Reason} = wait_until(fun() -> saw(down, Name, Killed, Node) end, ?NOTICE_MS),
        line("  ~-6s knew after ~5.2f s (~p)", [short(Node), (At - Killed) / 1.0e6, Reason])
    end, Left),
    ok = call(One, macula_demo_node, mnesia_fill, [?RECORDS + 1, ?RECORDS + 1000], 60000),
    line("  and wrote 1000 more records without it"),
    step("Start node four again"),
    Restarted = os:system_time(microsecond),
    {ok, Again} = macula_test_nodes:start(spec("four")),
    try
        ok = call(Again, macula_demo_node, watch, []),
        pong = call(Again, net_adm, ping, [name(One)]),
        ok = meshed(Left ++ [Again]),
        lists:foreach(fun(Node) ->
            {At, _} = wait_until(fun() -> saw(up, Name, Restarted, Node) end),
            line("  ~-6s saw it back after ~.2f s", [short(Node), (At - Restarted) / 1.0e6])
        end, Left),
        ok = call(Again, macula_demo_node, mnesia_start, [[name(One)]]),
        Checksum = same_checksum(Left ++ [Again]),
        line("  its copy of the table is complete again (~.16b)", [Checksum])
    after
        macula_test_nodes:stop(Again)
    end.

saw(What, Name, Since, Node) ->
    Events = call(Node, macula_demo_node, events, []),
    case [{At, Reason} || {W, N, At, Reason} <- Events, W =:= What, N =:= Name, At >= Since] of
        [] -> false;
        Seen -> {value, lists:last(Seen)}
    end.

meshed(Nodes) ->
    Names = lists:sort([name(Node) || Node <- Nodes]),
    wait_until(fun() ->
        lists:all(fun(Node) ->
            lists:sort([name(Node) | call(Node, erlang, nodes, [])]) =:= Names
        end, Nodes)
    end).

reference(Carrier, Args) ->
    Specs = [#{carrier => Carrier, args => Args} || _ <- [1, 2]],
    macula_test_nodes:with_nodes(Specs, fun([A, B]) ->
        line("  ~s", [Carrier]),
        pong = call(A, net_adm, ping, [name(B)]),
        Expected = case Carrier of inet_tcp -> tcp; inet_tls -> tls end,
        Expected = macula_test_nodes:link_protocol(A, B),
        Rate = transfer(A, B),
        {Rate, latency(A, B)}
    end).

latency(A, B) ->
    #{p50 := P50, p99 := P99, count := Count} =
        call(A, macula_bench_load, round_trips, [name(B), 1000], 30000),
    line("  64 bytes there and back: p50 ~b us, p99 ~b us (~b times)",
         [round(P50), round(P99), Count]),
    {P50, P99}.

%% Returns MB/s.
transfer(A, B) ->
    ok = call(A, macula_demo_node, transfer, [name(B), ?GIB]),
    Took = follow(A, now_ms(), {0, now_ms()}),
    ?GIB / Took.

follow(Node, Start, {Last, LastChange}) ->
    {Bytes, Took} = call(Node, macula_demo_node, progress, []),
    Now = now_ms(),
    bar(Bytes, case Took of 0 -> Now - Start; _ -> Took div 1000 end, Took > 0),
    case {Took, Bytes} of
        {0, Last} when Now - LastChange > ?STALL_MS ->
            error({transfer_stalled, [{bytes, Bytes}]});
        {0, Last} ->
            pause(50),
            follow(Node, Start, {Last, LastChange});
        {0, _} ->
            pause(50),
            follow(Node, Start, {Bytes, Now});
        {_, ?GIB} ->
            Took;
        _ ->
            error({bytes_missing, ?GIB - Bytes})
    end.

%% Redrawn on a terminal; into a file or a pipe goes only the last.
bar(Bytes, Ms, Done) ->
    Filled = Bytes * ?BAR div ?GIB,
    Bar = [lists:duplicate(Filled, $#), lists:duplicate(?BAR - Filled, $.)],
    Text = io_lib:format("  [~s] ~4b MiB  ~5b MB/s", [Bar, Bytes bsr 20,
                                                      Bytes div max(1, Ms) div 1000]),
    case get(terminal) of
        true when Done -> io:format("\r~s~n", [Text]);
        true -> io:format("\r~s", [Text]);
        false when Done -> line("~s", [Text]);
        false -> ok
    end.

%% Output

title(Text) ->
    io:format("~n~ts~n", [bold(Text)]).

step(Text) ->
    N = get_or(step_number, 0) + 1,
    put(step_number, N),
    put(step, Text),
    io:format("~n~ts~n", [bold(io_lib:format("~b. ~ts", [N, Text]))]).

bold(Text) ->
    case get(terminal) andalso os:getenv("NO_COLOR") =:= false of
        true -> ["\e[1m", Text, "\e[0m"];
        false -> Text
    end.

line(Text) ->
    line(Text, []).

line(Format, Args) ->
    io:format(Format ++ "~n", Args).

short(Node) ->
    hd(string:split(atom_to_list(name(Node)), "@")).

text(Term) when is_atom(Term) -> atom_to_list(Term);
text(Term) -> unicode:characters_to_list(Term).

pause(Ms) ->
    receive after Ms -> ok end.

now_ms() ->
    erlang:monotonic_time(millisecond).

get_or(Key, Default) ->
    case get(Key) of
        undefined -> Default;
        Value -> Value
    end.
