%% @doc Peering between two VMs beside what its signatures alone cost, and one VM with thousands of
%% peers.
%%
%% The frame is one of 200 bytes (204 with its length). What is compared is measured in turns of a
%% fraction of a second, as the machine may have other things to do.
-module(macula_bench_peering).

-export([run/2, crowd/1, table/1]).
-export([listen/1, dial/3, count_frames/1, send/2, stop_sending/0, sign_loop/1, verify_loop/1,
         cpu_us/0, lone/3, echo_server/0]).
-export([dial_many/3, hold/0, held/0, memory/0, send_to_all/1, turns/1, fastest_us/1]).

-define(ALPN, "macula-bench").
%% Operations between two looks at the clock. A few take less than a turn of the system's scheduler,
%% so on a busy machine most are not interrupted.
-define(FEW, 20).
-define(BATCH, 100).
-define(TURNS, 4).
%% Pause before a lone frame: longer than anything that might wait for company.
-define(PAUSE_MS, 5).
-define(LONE, 200).
%% Loops over a crowd.
-define(ROUNDS, 20).

%% @doc Everything about one link. `Bare' is the program with the bare Ed25519.
-spec run(pos_integer(), file:filename()) -> [{Subject :: atom(), Metric :: atom(), number()}].
run(Ms, Bare) ->
    crypto(Ms, Bare) ++ links(Ms).

%% @doc What must be reached is in the last column.
-spec table(#{{Subject :: atom(), Metric :: term()} => number()}) -> iodata().
table(Medians) ->
    Of = fun(Subject, Metric) -> maps:get({Subject, Metric}, Medians) end,
    Ours = fun(Metric) -> Of(macula_peering, Metric) end,
    Times = fun(Title, Metric, Other, Name, Limit) ->
        Ratio = Ours(Metric) / Of(Other, Metric),
        line(Title, Ours(Metric) / scale(Metric),
             io_lib:format("~s ~.1f", [Name, Of(Other, Metric) / scale(Metric)]),
             io_lib:format("~.2fx", [Ratio]), within(Ratio =< Limit, "~.1fx", Limit))
    end,
    Share = Ours(frames_per_second) / Of(signatures, frames_per_second),
    ["peering, frames of 200 bytes, two processes, loopback, medians\n",
     Times("encode and sign, us", sign_ns, ed25519, "Ed25519 alone", 1.3),
     Times("decode and verify, us", verify_ns, ed25519, "Ed25519 alone", 1.3),
     line("signed, verified, frames/s", Ours(frames_per_second),
          io_lib:format("no link between ~b", [round(Of(signatures, frames_per_second))]),
          io_lib:format("~b %", [round(Share * 100)]), within(Share >= 0.8, "~b %", 80)),
     line("  processor time of each, us", Ours(cpu_us_per_frame),
          io_lib:format("no link between ~.1f", [Of(signatures, cpu_us_per_frame)]),
          io_lib:format("~.2fx", [Ours(cpu_us_per_frame) / Of(signatures, cpu_us_per_frame)]), ""),
     line("signed before, frames/s", Ours(presigned_per_second), "verified by the owner", "",
          within(Ours(presigned_per_second) >= 100000, "~b", 100000)),
     line("  processor time of each, us", Ours(presigned_cpu_us), "both VMs, all threads", "", ""),
     Times("a lone one and its answer, us", lone_us, macula_quic, "same bytes, stream", 1.5),
     case Medians of
         #{{macula_peering, crowd_peers} := Peers} -> crowd_table(round(Peers), Ours, Of);
         #{} -> []
     end].

crowd_table(Peers, Ours, Of) ->
    [io_lib:format("~npeering, one node with ~b peers~n", [Peers]),
     line("memory of each, KiB", Ours(crowd_kb_per_peer), "resident",
          "", ""),
     line("  of that in the VM, KiB", Ours(crowd_erlang_kb_per_peer), "", "", ""),
     line("send_frame to all, ms", Ours(crowd_loop_ms), "in one loop", "", ""),
     line("  one turn of its process, us", Ours(crowd_turn_us), "undisturbed", "",
          within(Ours(crowd_turn_us) =< 1000, "~b", 1000)),
     [line(Title, Ours(Metric), io_lib:format("plain processes ~b", [round(Of(control, Metric))]),
           "", "")
      || {Title, Metric} <- [
          {io_lib:format("  turns over 1 ms, ~b loops", [?ROUNDS]), crowd_stalls},
          {"  the longest, ms", crowd_longest_ms},
          {"  sleeps of its scheduler", crowd_sleeps}]]].

scale(lone_us) -> 1;
scale(_) -> 1000.

within(true, Format, Limit) -> io_lib:format(Format ++ " ok", [Limit]);
within(false, Format, Limit) -> io_lib:format(Format ++ " NO", [Limit]).

line(Title, Value, Beside, Ratio, Verdict) ->
    Number = case Value of
        _ when Value >= 100 -> integer_to_list(round(Value));
        _ -> io_lib:format("~.1f", [float(Value)])
    end,
    io_lib:format("~-30ts~8ts  ~-24ts~6ts~11ts~n", [Title, Number, Beside, Ratio, Verdict]).

%%% The frame

frame() ->
    macula_frame:have(#{blocks => []}).

wire(Identity) ->
    {ok, <<200:32, _:200/binary>> = Wire} = macula_frame:sign_encode(frame(), Identity),
    Wire.

%%% Signatures

crypto(Ms, Bare) ->
    Identity = macula_identity:generate(),
    Peer = macula_identity:public(Identity),
    Frame = frame(),
    Wire = wire(Identity),
    Port = open_port({spawn_executable, Bare}, [{line, 64}, binary]),
    %% Signed is the domain, and the map without the signature (10 bytes of name, 66 of value).
    Signed = 16 + 200 - 76,
    Sides = [
        {ed25519, sign_ns, fun() -> bare(Port, "sign", Signed) end},
        {macula_peering, sign_ns, fun() -> ours(fun() ->
            {ok, _} = macula_frame:sign_encode(Frame, Identity)
        end) end},
        {ed25519, verify_ns, fun() -> bare(Port, "verify", Signed) end},
        {macula_peering, verify_ns, fun() -> ours(fun() ->
            {ok, _, {ok, Peer}, <<>>} = macula_frame:decode_verify(Wire, Peer, #{})
        end) end}],
    Deadline = erlang:monotonic_time(millisecond) + 2 * Ms,
    Taken = interleaved(Sides, Deadline, []),
    true = port_close(Port),
    [{Subject, Metric, macula_bench:median([V || {S, M, V} <- Taken, S =:= Subject, M =:= Metric])}
     || {Subject, Metric, _} <- Sides].

interleaved(Sides, Deadline, Acc) ->
    Next = [{Subject, Metric, Measure()} || {Subject, Metric, Measure} <- Sides] ++ Acc,
    case erlang:monotonic_time(millisecond) < Deadline of
        true -> interleaved(Sides, Deadline, Next);
        false -> Next
    end.

bare(Port, What, Length) ->
    true = port_command(Port, io_lib:format("~s ~b ~b~n", [What, ?FEW, Length])),
    receive {Port, {data, {eol, Answer}}} -> binary_to_integer(Answer) / ?FEW
    after 60000 -> error(no_answer)
    end.

ours(Fun) ->
    Start = erlang:monotonic_time(nanosecond),
    repeat(?FEW, Fun),
    (erlang:monotonic_time(nanosecond) - Start) / ?FEW.

repeat(0, _) -> ok;
repeat(N, Fun) -> _ = Fun(), repeat(N - 1, Fun).

%%% Links

links(Ms) ->
    None = #{carrier => none},
    macula_test_nodes:with_nodes([None, None], fun([A, B]) ->
        On = fun(Node, Function, Args) ->
            macula_test_nodes:call(Node, ?MODULE, Function, Args, 60000 + 4 * Ms)
        end,
        [{ok, _} = macula_test_nodes:call(N, application, ensure_all_started, [macula])
         || N <- [A, B]],
        {Port, Peer} = On(B, listen, [#{verify_frames => require}]),
        ok = On(A, dial, [signed, Port, Peer]),
        {PlainPort, PlainPeer} = On(B, listen, [#{}]),
        ok = On(A, dial, [presigned, PlainPort, PlainPeer]),
        Turn = max(100, Ms div ?TURNS),
        Turns = [begin
            {Alone, AloneCpu} = alone(On, A, B, Turn),
            {Signed, SignedCpu} = through(signed, frame, On, A, B, Turn),
            {Presigned, PresignedCpu} = through(presigned, wire, On, A, B, Turn),
            {Alone, AloneCpu, Signed, SignedCpu, Presigned, PresignedCpu}
        end || _ <- lists:seq(1, ?TURNS)],
        {Echo, Key} = On(B, echo_server, []),
        {LoneFrame, LoneBytes} = On(A, lone, [presigned, Echo, Key]),
        Median = fun(N) -> macula_bench:median([element(N, T) || T <- Turns]) end,
        [{signatures, frames_per_second, Median(1)},
         {signatures, cpu_us_per_frame, Median(2)},
         {macula_peering, frames_per_second, Median(3)},
         {macula_peering, cpu_us_per_frame, Median(4)},
         {macula_peering, presigned_per_second, Median(5)},
         {macula_peering, presigned_cpu_us, Median(6)},
         {macula_peering, lone_us, LoneFrame}, {macula_quic, lone_us, LoneBytes}]
    end).

%% Signing in one VM while the other verifies, and nothing between them: the slower of the two, and
%% what one frame costs both.
alone(On, A, B, Ms) ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn_link(fun() -> Self ! {Ref, On(A, sign_loop, [Ms])} end),
    {Verified, VerifyCpu} = On(B, verify_loop, [Ms]),
    receive {Ref, {Signed, SignCpu}} -> {min(Signed, Verified), SignCpu + VerifyCpu} end.

%% The rate at which frames come through a link, and what each costs both VMs.
through(Name, What, On, A, B, Ms) ->
    ok = On(A, send, [Name, What]),
    Before = On(A, cpu_us, []),
    {Rate, Frames, ReceiveCpu} = On(B, count_frames, [Ms]),
    SendCpu = On(A, cpu_us, []) - Before,
    ok = On(A, stop_sending, []),
    {Rate, (SendCpu + ReceiveCpu) / Frames}.

%% @private Processor time that this VM has used, all threads together.
cpu_us() ->
    element(1, statistics(runtime)) * 1000.

%% @private Listens, with a process that counts the frames that come, and answers those on a link
%% that asks for it. Returns the port and the node id.
listen(Options) ->
    Self = self(),
    Ref = make_ref(),
    Counter = counter(),
    _ = spawn(fun() ->
        Identity = macula_identity:generate(),
        {ok, L} = macula_peering:listen(Options#{identity => Identity, port => 0,
                                                 address => {127, 0, 0, 1}, hello_gap_ms => 0}),
        {ok, {_, Port}} = macula_peering:sockname(L),
        Self ! {Ref, {Port, macula_identity:public(Identity)}},
        {ok, Pong} = macula_frame:sign_encode(macula_frame:pong(#{nonce => <<0:128>>}), Identity),
        owner(Counter, Pong)
    end),
    receive {Ref, Answer} -> Answer after 10000 -> error(no_listener) end.

owner(Counter, Pong) ->
    receive
        {macula_peering, frame, Link, #{frame_type := ping}} ->
            ok = macula_peering:send_frame(Link, Pong),
            owner(Counter, Pong);
        {macula_peering, frame, _, _} ->
            counters:add(Counter, 1, 1),
            owner(Counter, Pong);
        {macula_peering, frame, _, _, #{verdict := {ok, _}}} ->
            counters:add(Counter, 1, 1),
            owner(Counter, Pong);
        {macula_peering, _, _, _} ->
            owner(Counter, Pong)
    end.

counter() ->
    case persistent_term:get(?MODULE, none) of
        none ->
            Counter = counters:new(1, []),
            ok = persistent_term:put(?MODULE, Counter),
            Counter;
        Counter ->
            Counter
    end.

%% @private Frames received per second from when they flow, then from the first: how many, and the
%% processor time taken.
count_frames(Ms) ->
    Counter = counter(),
    First = counters:get(Counter, 1),
    FirstCpu = cpu_us(),
    flowing(Counter, First, erlang:monotonic_time(millisecond) + 10000),
    Before = counters:get(Counter, 1),
    Start = erlang:monotonic_time(microsecond),
    receive after Ms -> ok end,
    Last = counters:get(Counter, 1),
    Took = erlang:monotonic_time(microsecond) - Start,
    {(Last - Before) * 1.0e6 / Took, Last - First, cpu_us() - FirstCpu}.

flowing(Counter, First, Deadline) ->
    case counters:get(Counter, 1) - First > 1000 of
        true -> ok;
        false ->
            erlang:monotonic_time(millisecond) < Deadline orelse error(no_frames),
            receive after 1 -> ok end,
            flowing(Counter, First, Deadline)
    end.

%% @private Links under a name.
dial(Name, Port, Peer) ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        Identity = macula_identity:generate(),
        {ok, Link} = macula_peering:connect(#{
            identity => Identity,
            target => #{host => {127, 0, 0, 1}, port => Port, node_id => Peer}}),
        receive {macula_peering, connected, Link, Peer} -> ok end,
        true = register(Name, self()),
        Self ! {Ref, ok},
        sender(Link, wire(Identity), undefined)
    end),
    receive {Ref, ok} -> ok after 30000 -> error(not_linked) end.

%% Owns a link, and lets another process send through it.
sender(Link, Wire, Sending) ->
    receive
        {send, From, Ref, What} ->
            Frame = case What of frame -> frame(); wire -> Wire end,
            Pid = spawn(fun() -> send_loop(Link, Frame) end),
            From ! {Ref, ok},
            sender(Link, Wire, Pid);
        {stop, From, Ref} ->
            is_pid(Sending) andalso begin
                Monitor = monitor(process, Sending),
                exit(Sending, kill),
                receive {'DOWN', Monitor, _, _, _} -> ok end
            end,
            From ! {Ref, ok},
            sender(Link, Wire, undefined);
        {lone, From, Ref} ->
            Ping = macula_frame:ping(#{nonce => <<0:128>>}),
            {ok, Bytes} = macula_frame:sign_encode(Ping, macula_identity:generate()),
            From ! {Ref, lone_times(fun() ->
                ok = macula_peering:send_frame(Link, Bytes),
                receive {macula_peering, frame, Link, #{frame_type := pong}} -> ok end
            end)},
            sender(Link, Wire, Sending)
    end.

send_loop(Link, Frame) ->
    ok = macula_peering:send_frame(Link, Frame, #{timeout => infinity}),
    send_loop(Link, Frame).

%% @private Sends until told to stop: a `frame', signed each time, or its `wire' form.
send(Name, What) ->
    ask(Name, fun(Ref) -> {send, self(), Ref, What} end).

%% @private
stop_sending() ->
    [ok = ask(Name, fun(Ref) -> {stop, self(), Ref} end) || Name <- [signed, presigned]],
    ok.

ask(Name, Request) ->
    Ref = make_ref(),
    Name ! Request(Ref),
    receive {Ref, Answer} -> Answer after 60000 -> error(no_answer) end.

%% @private Frames signed and encoded per second, and the processor time of each.
sign_loop(Ms) ->
    Identity = macula_identity:generate(),
    Frame = frame(),
    per_second(Ms, fun() -> {ok, _} = macula_frame:sign_encode(Frame, Identity) end).

%% @private Frames decoded and verified per second, and the processor time of each.
verify_loop(Ms) ->
    Identity = macula_identity:generate(),
    Peer = macula_identity:public(Identity),
    Wire = wire(Identity),
    per_second(Ms, fun() ->
        {ok, _, {ok, Peer}, <<>>} = macula_frame:decode_verify(Wire, Peer, #{})
    end).

per_second(Ms, Fun) ->
    Start = erlang:monotonic_time(microsecond),
    Cpu = cpu_us(),
    N = until(Start + Ms * 1000, Fun, 0),
    {N * 1.0e6 / (erlang:monotonic_time(microsecond) - Start), (cpu_us() - Cpu) / N}.

until(End, Fun, N) ->
    repeat(?BATCH, Fun),
    case erlang:monotonic_time(microsecond) < End of
        true -> until(End, Fun, N + ?BATCH);
        false -> N + ?BATCH
    end.

%%% A frame by itself

%% @private Medians of the round trip of one frame after a pause, and of as many bytes on a stream.
lone(Name, Port, Key) ->
    Options = [{alpn, [?ALPN]}, {verify_pubkey, Key}],
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, Options, 10000),
    {ok, Stream} = macula_quic:open_stream(Conn, #{active => true}),
    Bytes = crypto:strong_rand_bytes(219),
    Raw = fun() ->
        lone_times(fun() ->
            ok = macula_quic:send(Stream, Bytes),
            echoed(Stream, byte_size(Bytes))
        end)
    end,
    Frame = fun() -> ask(Name, fun(Ref) -> {lone, self(), Ref} end) end,
    Turns = [{Frame(), Raw()} || _ <- lists:seq(1, ?TURNS)],
    ok = macula_quic:close_connection(Conn),
    {macula_bench:median(lists:append([F || {F, _} <- Turns])),
     macula_bench:median(lists:append([R || {_, R} <- Turns]))}.

echoed(_, Left) when Left =< 0 -> ok;
echoed(Stream, Left) ->
    receive
        {quic, Data, Stream, _} when is_binary(Data) -> echoed(Stream, Left - byte_size(Data))
    end.

lone_times(Fun) ->
    [begin
         receive after ?PAUSE_MS -> ok end,
         {Took, ok} = timer:tc(Fun),
         Took
     end || _ <- lists:seq(1, ?LONE div ?TURNS)].

%% @private Returns what comes on any stream of one connection.
echo_server() ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        {Public, Private} = crypto:generate_key(eddsa, ed25519),
        {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
        {ok, L} = macula_quic:listen({"127.0.0.1", 0}, [{cert, Cert}, {key, Key}, {alpn, [?ALPN]}]),
        {ok, {_, Port}} = macula_quic:sockname(L),
        ok = macula_quic:async_accept(L),
        Self ! {Ref, {Port, Public}},
        receive
            {quic, new_conn, Conn, _} ->
                ok = macula_quic:async_accept_stream(Conn, #{active => true}),
                echo()
        end
    end),
    receive {Ref, Answer} -> Answer after 10000 -> error(no_listener) end.

echo() ->
    receive
        {quic, Data, Stream, _} when is_binary(Data) -> ok = macula_quic:send(Stream, Data), echo();
        _ -> echo()
    end.

%%% A crowd

%% @doc One VM with so many peers: what each costs it, and what sending to all of them in one loop
%% does to its schedulers.
-spec crowd(pos_integer()) -> [{Subject :: atom(), Metric :: atom(), number()}].
crowd(Peers) ->
    None = #{carrier => none, args => ["+P", "1000000"]},
    macula_test_nodes:with_nodes([None, None], fun([Hub, Crowd]) ->
        On = fun(Node, Function, Args) ->
            macula_test_nodes:call(Node, ?MODULE, Function, Args, 600000)
        end,
        [{ok, _} = macula_test_nodes:call(N, application, ensure_all_started, [macula])
         || N <- [Hub, Crowd]],
        {Port, NodeId} = On(Hub, hold, []),
        %% What is made once, by the first.
        ok = On(Crowd, dial_many, [10, Port, NodeId]),
        ok = macula_test_nodes:wait_until(fun() -> On(Hub, held, []) =:= 10 end, 60000),
        {Resident, Erlang} = On(Hub, memory, []),
        ok = On(Crowd, dial_many, [Peers - 10, Port, NodeId]),
        ok = macula_test_nodes:wait_until(fun() -> On(Hub, held, []) =:= Peers end, 300000),
        {ResidentAfter, ErlangAfter} = On(Hub, memory, []),
        {LoopMs, Ours, Control} = On(Hub, send_to_all, [Peers]),
        Turns = On(Hub, turns, [Peers]),
        Sends = [On(Hub, fastest_us, [Peers]) || _ <- lists:seq(1, 5)],
        Stalls = fun(Subject, Of) ->
            [{Subject, crowd_stalls, maps:get(stalls, Of)},
             {Subject, crowd_longest_ms, maps:get(longest, Of)},
             {Subject, crowd_sleeps, maps:get(sleeps, Of)}]
        end,
        [{macula_peering, crowd_peers, Peers},
         {macula_peering, crowd_kb_per_peer, (ResidentAfter - Resident) / (Peers - 10) / 1024},
         {macula_peering, crowd_erlang_kb_per_peer, (ErlangAfter - Erlang) / (Peers - 10) / 1024},
         {macula_peering, crowd_loop_ms, LoopMs},
         {macula_peering, crowd_turn_us, lists:min(Sends) * Peers / Turns}
         | Stalls(macula_peering, Ours) ++ Stalls(control, Control)]
    end).

%% @private A listener for the crowd, and the process that owns the links.
hold() ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        true = register(hold, self()),
        Identity = macula_identity:generate(),
        {ok, L} = macula_peering:listen((patient())#{
            identity => Identity, port => 0, address => {127, 0, 0, 1}, duplicates => allow}),
        {ok, {_, Port}} = macula_peering:sockname(L),
        Self ! {Ref, {Port, macula_identity:public(Identity)}},
        hold([])
    end),
    receive {Ref, Answer} -> Answer after 10000 -> error(no_listener) end.

hold(Links) ->
    receive
        {macula_peering, connected, Link, _} -> hold([Link | Links]);
        {macula_peering, disconnected, Link, _} -> hold(lists:delete(Link, Links));
        {links, From, Ref} -> From ! {Ref, Links}, hold(Links);
        {macula_peering, _, _, _} -> hold(Links)
    end.

%% @private
held() ->
    length(ask(hold, fun(Ref) -> {links, self(), Ref} end)).

%% @private Dials with a few dials under way at any time.
dial_many(Peers, Port, NodeId) ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        Identity = macula_identity:generate(),
        Options = (patient())#{
            identity => Identity,
            target => #{host => {127, 0, 0, 1}, port => Port, node_id => NodeId,
                        timeout_ms => 60000}},
        dialling(Options, Peers, 0),
        Self ! {Ref, ok},
        receive never -> ok end
    end),
    receive {Ref, ok} -> ok after 600000 -> error(not_linked) end.

dialling(_, 0, 0) -> ok;
dialling(Options, Left, Waiting) when Left > 0, Waiting < 16 ->
    {ok, _} = macula_peering:connect(Options),
    dialling(Options, Left - 1, Waiting + 1);
dialling(Options, Left, Waiting) ->
    receive
        {macula_peering, connected, _, _} -> dialling(Options, Left, Waiting - 1);
        {macula_peering, disconnected, _, Reason} -> error({lost, Reason})
    end.

%% So that a machine that is slow changes nothing.
patient() ->
    #{idle_timeout_ms => 120000, keep_alive_interval_ms => 40000, handshake_timeout_ms => 60000}.

%% @private Bytes resident, and bytes of the Erlang VM, with no garbage.
memory() ->
    lists:foreach(fun erlang:garbage_collect/1, processes()),
    {ok, Status} = file:read_file("/proc/self/statm"),
    [_, Pages | _] = binary:split(Status, <<" ">>, [global]),
    {binary_to_integer(Pages) * 4096, erlang:memory(total)}.

%% @private Loops over all peers in one process, with its turns that the VM reports as longer than a
%% millisecond. By turns with loops that send as many messages to plain processes for the same time,
%% as the system takes the processor away from both alike where others want it. What a loop itself
%% may do to a scheduler beside computing is to let it wait for somebody: then its thread sleeps, and
%% the system counts that. The process is bound to one scheduler, which has nothing else to sleep for.
send_to_all(Peers) ->
    Send = send_once(Peers),
    Plain = [spawn_link(fun drain/0) || _ <- lists:seq(1, Peers)],
    Thread = first_scheduler(),
    Rounds = [begin
        {Took, _, _} = Loop = observed(Thread, Send),
        Control = observed(Thread, fun() ->
            until(erlang:monotonic_time(microsecond) + Took,
                  fun() -> lists:foreach(fun(P) -> P ! {frame, <<0:128>>} end, Plain) end)
        end),
        {Loop, Control}
    end || _ <- lists:seq(1, ?ROUNDS)],
    [begin unlink(P), exit(P, kill) end || P <- Plain],
    {Loops, Controls} = lists:unzip(Rounds),
    {macula_bench:median([Took / 1000 || {Took, _, _} <- Loops]), stalls(Loops), stalls(Controls)}.

until(End, Fun) ->
    Fun(),
    erlang:monotonic_time(microsecond) < End andalso until(End, Fun).

drain() -> receive _ -> drain() end.

stalls(Loops) ->
    Turns = lists:append([Long || {_, Long, _} <- Loops]),
    #{stalls => length(Turns), longest => lists:max([0 | Turns]),
      sleeps => lists:sum([Sleeps || {_, _, Sleeps} <- Loops])}.

%% The time it took in microseconds, its long turns in milliseconds, and how often its scheduler slept.
observed(Thread, Fun) ->
    Self = self(),
    Ref = make_ref(),
    Pid = spawn_opt(fun() ->
        receive {Ref, go} -> ok end,
        {Took, _} = timer:tc(Fun),
        Self ! {Ref, took, Took}
    end, [link, {scheduler, 1}]),
    _ = erlang:system_monitor(self(), [{long_schedule, 1}]),
    Before = sleeps(Thread),
    Pid ! {Ref, go},
    Took = receive {Ref, took, T} -> T end,
    After = sleeps(Thread),
    _ = erlang:system_monitor(undefined),
    {Took, long_turns(Pid), After - Before}.

long_turns(Pid) ->
    receive
        {monitor, Pid, long_schedule, Info} ->
            [proplists:get_value(timeout, Info) | long_turns(Pid)];
        {monitor, _, long_schedule, _} ->
            long_turns(Pid)
    after 0 ->
        []
    end.

%% Where the system tells of the thread of the first scheduler, if it does.
first_scheduler() ->
    [Task ++ "/status" || Task <- filelib:wildcard("/proc/self/task/*"),
                          {ok, <<"1_scheduler\n">>} <- [file:read_file(Task ++ "/comm")]].

%% How often that has given its processor up by itself. Asking adds one or two.
sleeps([]) ->
    0;
sleeps([Thread]) ->
    {ok, Status} = file:read_file(Thread),
    {match, [N]} = re:run(Status, "\nvoluntary_ctxt_switches:\\s+(\\d+)", [{capture, [1], list}]),
    list_to_integer(N).

send_once(Peers) ->
    Links = ask(hold, fun(Ref) -> {links, self(), Ref} end),
    Peers = length(Links),
    Frame = macula_frame:ping(#{nonce => <<0:128>>}),
    fun() -> lists:foreach(fun(Link) -> ok = macula_peering:send_frame(Link, Frame) end, Links) end.

%% @private In how many turns of its process the loop is run. That does not depend on what else the
%% machine does, so with the time of a send that was not disturbed it tells how long a turn is.
turns(Peers) ->
    Send = send_once(Peers),
    {Pid, Ref} = spawn_monitor(fun() -> receive go -> Send() end end),
    1 = erlang:trace(Pid, true, [running]),
    Pid ! go,
    turns(Pid, Ref, 0).

turns(Pid, Ref, N) ->
    receive
        {trace, Pid, in, _} -> turns(Pid, Ref, N + 1);
        {trace, Pid, out, _} -> turns(Pid, Ref, N);
        {'DOWN', Ref, process, Pid, normal} -> N
    end.

%% @private The time of one send, from the tenth of all few in a row that were disturbed least.
fastest_us(Peers) ->
    Links = ask(hold, fun(Ref) -> {links, self(), Ref} end),
    Peers = length(Links),
    Frame = macula_frame:ping(#{nonce => <<0:128>>}),
    Times = lists:sort(few(Links, Frame)),
    lists:nth(max(1, length(Times) div 10), Times).

few([A, B, C, D, E | Rest], Frame) ->
    Start = erlang:monotonic_time(nanosecond),
    [ok = macula_peering:send_frame(Link, Frame) || Link <- [A, B, C, D, E]],
    [(erlang:monotonic_time(nanosecond) - Start) / 5000 | few(Rest, Frame)];
few(_, _) ->
    [].
