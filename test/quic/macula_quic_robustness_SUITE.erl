%% Strangers, garbage, half handshakes, load: the VM lives, schedulers run, nothing leaks.
-module(macula_quic_robustness_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([walks/1, niceness/0, weigh/1, idle_beside/1]).
-export([garbage_datagrams_change_nothing/1, a_thousand_half_open_handshakes/1,
         clients_that_vanish_leave_nothing/1, a_damaged_path_delivers_all/1,
         a_path_that_loses_doubles_and_reorders_delivers_all/1,
         an_idle_timeout_comes_in_time_while_schedulers_starve/1,
         a_peer_that_resets_everything_ends_each_stream_once/1,
         an_owner_killed_in_any_call_leaves_nothing/1,
         no_scheduler_is_blocked_under_load/1, native_calls_are_short/1,
         late_replies_leave_no_message/1, any_order_of_calls_leaves_nothing/1,
         everything_at_once_leaves_nothing/1, a_busy_connection_hears_by_a_socket_of_its_own/1,
         an_idle_connection_costs_thirty_kilobytes_at_each_end/1,
         native_threads_let_schedulers_go_first/1]).

-import(macula_quic_lab, [pair/0, pair/2, stream/1, listen/0, listen/1, client_options/0,
                          in_process/1]).

all() -> macula_quic_lab:cases(?MODULE, [walks, weigh, idle_beside]).

suite() ->
    [{timetrap, {minutes, 3}}].

init_per_suite(Config) ->
    macula_quic_lab:drained(),
    %% Both shared endpoints of clients, and what is loaded on first use.
    in_process(fun() -> _ = pair(), ok end),
    macula_quic_lab:drained(),
    Config.

end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Runs a function in a process of its own; nothing native, no process, no file, no atom is left.
leaves_nothing(Fun) ->
    Known = erlang:system_info(atom_count),
    Result = leaves_no_thing(Fun),
    case erlang:system_info(atom_count) of
        Known ->
            Result;
        More ->
            %% Names that stay from their first use on; what makes atoms of its own makes them again.
            Again = leaves_no_thing(Fun),
            ?assertEqual(More, erlang:system_info(atom_count)),
            Again
    end.

leaves_no_thing(Fun) ->
    Before = maps:with([processes, ports, fds, ets], macula_test_nodes:snapshot()),
    Result = in_process(Fun),
    macula_quic_lab:drained(),
    ok = macula_test_nodes:await_no_leak(Before),
    Result.

%%--------------------------------------------------------------------------------------------

garbage_datagrams_change_nothing(_Config) ->
    leaves_nothing(fun() ->
        #{port := Port, client := C} = Pair = pair(),
        {Here, There} = stream(Pair),
        {ok, Socket} = gen_udp:open(0, [binary, {active, false}]),
        Seed = rand:seed_s(exsss, 42),
        _ = lists:foldl(fun(N, S0) ->
            {Size, S1} = rand:uniform_s(1400, S0),
            {Bytes, S2} = rand:bytes_s(Size, S1),
            Packet = case N rem 4 of
                0 -> Bytes;
                1 -> macula_quic_lab:initial_packet();
                %% A short header, as of a connection; a long one, cut.
                2 -> <<2#01:2, 0:6, Bytes/binary>>;
                3 -> binary:part(macula_quic_lab:initial_packet(), 0, min(Size, 1170))
            end,
            ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, Packet),
            S2
        end, Seed, lists:seq(1, 3000)),
        [ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, Odd)
         || Odd <- [<<>>, <<0>>, <<255>>, binary:copy(<<16#c0>>, 1200), <<16#c0, 1:32, 255>>,
                    <<16#c0, 1:32, 20, 0:160, 20, 0:160, 16#ffffffffffffffff:64>>]],
        ok = macula_quic:send(Here, <<"alive">>),
        ?assertEqual({ok, <<"alive">>}, macula_quic:recv(There, 5, 5000)),
        New = macula_quic_lab:pair(maps:get(listener, Pair), Port, #{}),
        ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, maps:get(client, New)]]),
        ok = gen_udp:close(Socket)
    end).

a_thousand_half_open_handshakes(_Config) ->
    leaves_nothing(fun() ->
        {L, Port} = listen(#{handshake_timeout_ms => 60000, initial_rtt_ms => 20}),
        {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port},
                                                down => #{blackhole => true}}),
        RelayPort = macula_relay:port(Relay),
        Options = client_options(),
        Diallers = [spawn(fun() ->
            macula_quic:connect("127.0.0.1", RelayPort, Options, infinity)
        end) || _ <- lists:seq(1, 1000)],
        macula_test_nodes:wait_until(fun() ->
            {ok, #{handshakes := N}} = macula_quic:info(L),
            #{up := #{forwarded := Sent}} = macula_relay:stats(Relay),
            N >= 256 andalso Sent >= 1000
        end, 30000),
        {ok, #{handshakes := N}} = macula_quic:info(L),
        ?assertMatch(_ when N =< 1024, N),
        %% A good client gets through, soon.
        [begin
             {Micros, {ok, C}} = timer:tc(fun() ->
                 macula_quic:connect("127.0.0.1", Port, Options, 30000)
             end),
             {ok, S} = macula_quic:accept(L, 5000),
             _ = stream(#{client => C, server => S}),
             %% The others hold their places for a minute.
             ?assertMatch(_ when Micros < 15000000, Micros)
         end || _ <- lists:seq(1, 10)],
        [exit(Pid, kill) || Pid <- Diallers],
        ok = macula_quic:close(L),
        macula_relay:stop(Relay)
    end).

clients_that_vanish_leave_nothing(_Config) ->
    leaves_nothing(fun() ->
        {L, Port} = listen(#{idle_timeout_ms => 4000}),
        {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}}),
        %% None is idle before all of them stand.
        Alive = #{keep_alive_interval_ms => 300},
        Pairs = [macula_quic_lab:pair(L, macula_relay:port(Relay), Alive) || _ <- lists:seq(1, 30)],
        Streams = [stream(P) || P <- Pairs],
        ok = macula_relay:set(Relay, #{blackhole => true}),
        [ok = macula_quic:send(There, <<"to nobody">>) || {_, There} <- Streams],
        [?EXPECT({quic, transport_shutdown, S, timeout}, ok, 60000) || #{server := S} <- Pairs],
        macula_relay:stop(Relay)
    end).

a_damaged_path_delivers_all(_Config) ->
    leaves_nothing(fun() ->
        #{relay := R} = Pair = macula_quic_lab:through(
            #{loss => 0.03, delay_ms => 3, rate => 20000000, seed => 11}, #{}),
        Size = 2000000,
        Data = crypto:strong_rand_bytes(Size),
        {Here, There} = stream(Pair),
        Self = self(),
        Sender = spawn_link(fun() ->
            ok = macula_quic:send(Here, Data, #{fin => true}),
            ok = macula_quic:send(There, Data, #{fin => true}),
            Self ! {self(), sent}
        end),
        ?assert(Data =:= macula_quic_lab:read_to_end(There)),
        ?assert(Data =:= macula_quic_lab:read_to_end(Here)),
        ?EXPECT({Sender, sent}),
        [ok = macula_quic:close(maps:get(X, Pair)) || X <- [client, server]],
        macula_relay:stop(R)
    end).

%% Hundreds of milliseconds between what was sent together, in both directions, with each controller.
a_path_that_loses_doubles_and_reorders_delivers_all(_Config) ->
    Size = macula_quic_lab:soak(30000, 600000),
    leaves_nothing(fun() ->
        Self = self(),
        Path = #{loss => 0.05, duplicate => 0.05, jitter_ms => 200, seed => 12},
        Controllers = [spawn_link(fun() ->
            Self ! {self(), cross(Path, #{congestion_control => Controller}, Size)}
        end) || Controller <- [cubic, new_reno, bbr]],
        Ways = lists:append([?EXPECT({Pid, Counts}, Counts, 170000) || Pid <- Controllers]),
        %% Of hundreds of packets.
        [?assert(lists:sum([maps:get(What, Way) || Way <- Ways]) > 0, Ways) || What <- [lost, duplicated]]
    end).

cross(Path, Options, Size) ->
    #{relay := Relay, client := C, server := S} = Pair = macula_quic_lab:through(Path, Options),
    {Here, There} = stream(Pair),
    ok = macula_quic:setopt(S, datagrams, true),
    Sent = [{Stream, crypto:strong_rand_bytes(Size)} || Stream <- [Here, There]],
    Senders = [spawn_link(fun() -> ok = macula_quic:send(Stream, Data, #{fin => true}) end)
               || {Stream, Data} <- Sent],
    %% A packet for each.
    [ok = macula_quic:send_datagram(C, <<N:8000>>) || N <- lists:seq(1, 30)],
    Hash = fun(Data) -> crypto:hash(sha256, Data) end,
    ?assertEqual([Hash(Data) || {_, Data} <- Sent],
                 [Hash(macula_quic_lab:read_to_end(Stream)) || Stream <- [There, Here]]),
    %% What the path doubles comes once, as part of a stream or as a datagram.
    Datagrams = [N || {quic, dgram, Of, <<N:8000>>} <- macula_quic_lab:mailbox(), Of =:= S],
    ?assertMatch([_ | _], Datagrams),
    ?assertEqual(lists:usort(Datagrams), lists:sort(Datagrams)),
    #{up := Up, down := Down} = macula_relay:stats(Relay),
    [unlink(Sender) || Sender <- Senders],
    [ok = macula_quic:close(Conn) || Conn <- [C, S]],
    macula_relay:stop(Relay),
    [Up, Down].

%% Timeouts and signs of life are native threads' work.
an_idle_timeout_comes_in_time_while_schedulers_starve(_Config) ->
    macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        {Kept, Ended} = macula_test_nodes:call(Node, ?MODULE, idle_beside, [1500], 60000),
        ct:pal("ended after ~p ms", [Ended]),
        ?assertEqual([true, true], Kept),
        [?assert(Ms > 1000 andalso Ms < 2500, Ended) || Ms <- Ended]
    end).

%% @private A connection that sends signs of life, and one that does not, with so long an idle timeout and
%% processes that leave the schedulers no time. Whether both ends of the first are there after two
%% timeouts, and how long the ends of the other were.
idle_beside(Timeout) ->
    Idle = #{idle_timeout_ms => Timeout},
    {L, Port} = listen(Idle),
    Kept = macula_quic_lab:pair(L, Port, Idle#{keep_alive_interval_ms => Timeout div 5}),
    Left = macula_quic_lab:pair(L, Port, Idle),
    Ends = [maps:get(End, Left) || End <- [client, server]],
    Begun = erlang:monotonic_time(millisecond),
    %% Not even what has a higher priority than others is run, but for this process.
    _ = process_flag(priority, max),
    Busy = [spawn_opt(fun busy/0, [link, {priority, max}]) || _ <- lists:seq(1, 8 * erlang:system_info(schedulers))],
    Told = [?EXPECT({quic, transport_shutdown, End, timeout}, erlang:monotonic_time(millisecond) - Begun, 20000)
            || End <- Ends],
    receive after max(0, Begun + 2 * Timeout - erlang:monotonic_time(millisecond)) -> ok end,
    Alive = [macula_quic:handshake(maps:get(End, Kept)) =:= {ok, maps:get(End, Kept)}
             || End <- [client, server]],
    [begin unlink(Pid), exit(Pid, kill) end || Pid <- Busy],
    _ = process_flag(priority, normal),
    ?NOTHING({quic, _, _, _}),
    {Alive, Told}.

busy() ->
    _ = lists:foldl(fun(X, A) -> X bxor A end, 0, lists:seq(1, 10000)),
    busy().

%% Each stream is reset and stopped as soon as it shows, in the middle of what is sent.
a_peer_that_resets_everything_ends_each_stream_once(_Config) ->
    Count = macula_quic_lab:soak(3000, 10000),
    leaves_nothing(fun() ->
        #{client := C, server := S} = pair(),
        Peer = spawn_link(fun resets/0),
        ok = macula_quic:async_accept_stream(S, #{active => true}),
        ok = macula_quic:controlling_process(S, Peer),
        Streams = [begin
            {ok, Stream} = macula_quic:open_stream(C, #{active => true, timeout => 10000}),
            _ = macula_quic:send(Stream, <<0:640000>>),
            Stream
        end || _ <- lists:seq(1, Count)],
        [?EXPECT({quic, stream_closed, Stream, #{is_conn_shutdown := false}}, ok, 30000) || Stream <- Streams],
        macula_test_nodes:wait_until(fun() ->
            [macula_quic:getstat(Conn, [streams]) || Conn <- [C, S]] =:= lists:duplicate(2, {ok, [{streams, 0}]})
        end),
        %% Another would be before these answers.
        ?NOTHING({quic, stream_closed, _, _}),
        ?assertEqual({ok, C}, macula_quic:handshake(C))
    end).

resets() ->
    receive
        {quic, new_stream, Stream, _} -> _ = macula_quic:reset_stream(Stream, 9);
        {quic, _, _, _} -> ok
    end,
    resets().

%% An owner of a connection and of a stream with data under way, which is killed within each of the calls by turns,
%% as early or late as it happens.
an_owner_killed_in_any_call_leaves_nothing(_Config) ->
    Calls = calls(),
    %% What is made by the first of each.
    leaves_nothing(fun() -> killed_in(Calls ++ Calls) end),
    Rounds = macula_quic_lab:soak(50, 250),
    leaves_nothing(fun() -> killed_in(lists:append(lists:duplicate(Rounds, Calls))) end).

%% What comes before a call, and the call.
calls() ->
    Port = fun(Port) -> Port end,
    Listen = fun(_) ->
        {ok, L} = macula_quic:listen("127.0.0.1", 0, macula_quic_lab:server_options()),
        macula_quic:accept(L, 1000)
    end,
    Dial = fun(P) -> macula_quic:connect("127.0.0.1", P, client_options(), 2000) end,
    [{Port, Listen}, {Port, Dial} | [{fun busy_owner/1, Call} || Call <- [
        fun({C, _, _}) -> macula_quic:open_stream(C) end,
        fun({_, X, _}) -> macula_quic:send(X, <<1:24000000>>) end,
        fun({_, X, _}) -> macula_quic:recv(X, 10, 1000) end,
        fun({C, _, _}) -> macula_quic:accept_stream(C, #{}, 1000) end,
        fun({C, _, _}) -> macula_quic:migrate(C) end,
        fun({_, X, Other}) -> macula_quic:controlling_process(X, Other) end,
        fun({C, _, Other}) -> macula_quic:controlling_process(C, Other) end,
        fun({_, X, Other}) -> macula_quic:handoff_stream(X, Other, #{active => true}) end,
        fun({C, _, _}) -> macula_quic:close_connection(C, 3, <<"x">>) end,
        fun({C, _, _}) -> [macula_quic:send_datagram(C, <<0:8000>>) || _ <- lists:seq(1, 500)] end]]].

busy_owner(Port) ->
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 10000),
    {ok, X} = macula_quic:open_stream(C),
    ok = macula_quic:send(X, <<"x">>),
    {C, X, spawn(fun() -> receive stop -> ok after 50 -> ok end end)}.

killed_in(Calls) ->
    {L, Port} = listen(#{idle_timeout_ms => 3000}),
    Server = spawn_link(fun() ->
        receive arm -> ok = macula_quic:async_accept(L) end,
        taking()
    end),
    Server ! arm,
    [kill_in(Call, Port) || Call <- Calls],
    {ok, #{accepted := Accepted}} = macula_quic:info(L),
    ?assert(Accepted >= length([x || {Before, _} <- Calls, Before =:= fun busy_owner/1]), Accepted),
    unlink(Server),
    exit(Server, kill),
    ok = macula_quic:close(L).

taking() ->
    receive
        {quic, new_conn, Conn, _} -> _ = macula_quic:async_accept_stream(Conn, #{active => true});
        {quic, _, _, _} -> ok
    end,
    taking().

kill_in({Before, Call}, Port) ->
    Self = self(),
    {Owner, Monitor} = spawn_monitor(fun() ->
        State = Before(Port),
        Self ! {self(), calls},
        _ = Call(State),
        receive never -> ok end
    end),
    ?EXPECT({Owner, calls}),
    case rand:uniform(4) - 2 of
        Millis when Millis > 0 -> receive after Millis -> ok end;
        _ -> [erlang:yield() || _ <- lists:seq(1, rand:uniform(20))]
    end,
    exit(Owner, kill),
    ?EXPECT({'DOWN', Monitor, process, Owner, Reason}, ?assertEqual(killed, Reason)).

%% The VM itself watches: no process runs on a scheduler for long, in a native function or not.
no_scheduler_is_blocked_under_load(_Config) ->
    macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        %% Other programs on the machine may stop a scheduler thread; a native call of ours that
        %% waits would be seen here each time.
        slow_calls(Node, 3)
    end).

slow_calls(Node, Tries) ->
    Slow = macula_test_nodes:call(Node, macula_quic_load, watched, [4000], 60000),
    ct:pal("calls of 20 ms and more under load: ~p", [Slow]),
    case [Mfa || {_, Info} <- Slow, {_, {macula_nif, _, _} = Mfa} <- Info] of
        Native when length(Native) > 2, Tries > 1 -> slow_calls(Node, Tries - 1);
        Native -> ?assertMatch(_ when length(Native) =< 2, Native)
    end.

%% How long each native function takes on a busy connection, from inside of the VM. The median says
%% what the call costs, whoever else uses the machine.
native_calls_are_short(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    Load = [spawn_link(fun() ->
        {A, B} = stream(Pair),
        _ = spawn_link(fun() -> sink(B) end),
        flood(A, binary:copy(<<0>>, 50000))
    end) || _ <- [1]],
    Large = binary:copy(<<1>>, 1000000),
    Pieces = [binary:copy(<<N>>, 3000) || N <- lists:seq(1, 64)],
    Calls = [{send, fun() -> macula_nif:stream_send(Here, make_ref(), [<<"x">>], false, busy) end},
             {send_pieces, fun() ->
                  macula_nif:stream_send(Here, make_ref(), Pieces, false, busy) end},
             {send_large, fun() ->
                  macula_nif:stream_send(Here, make_ref(), [Large], false, busy) end},
             {recv, fun() ->
                  {ok, Op} = macula_nif:stream_recv(There, make_ref(), 0, false),
                  macula_nif:op_cancel(Op) end},
             {set_active, fun() -> macula_nif:stream_set_active(There, false) end},
             {info, fun() -> macula_nif:stream_info(Here) end},
             {ask, fun() -> macula_nif:conn_ask(C, make_ref(), peername) end},
             {priority, fun() -> macula_nif:stream_set_priority(Here, 0) end},
             {is, fun() -> macula_nif:conn_is(C) end}],
    [begin
         Times = lists:sort([begin
                                 {Nanos, _} = nanos(Call),
                                 Nanos
                             end || _ <- lists:seq(1, 300)]),
         Median = lists:nth(150, Times),
         ct:pal("~p: median ~b us, highest ~b us", [Name, Median div 1000,
                                                   lists:last(Times) div 1000]),
         ?assertMatch(_ when Median < 1000000, {Name, Median}, Median)
     end || {Name, Call} <- Calls],
    [begin unlink(P), exit(P, kill) end || P <- Load].

nanos(Fun) ->
    Begun = erlang:monotonic_time(nanosecond),
    Result = Fun(),
    {erlang:monotonic_time(nanosecond) - Begun, Result}.

flood(Stream, Data) ->
    case macula_quic:send(Stream, Data) of
        ok -> flood(Stream, Data);
        {error, _} -> ok
    end.

sink(Stream) ->
    case macula_quic:recv(Stream, 0) of
        {ok, _} -> sink(Stream);
        {error, _} -> ok
    end.

%% Every call that can time out, about when its answer comes.
late_replies_leave_no_message(_Config) ->
    #{listener := L, port := Port, client := C, server := S} = Pair = pair(),
    {Here, There} = stream(Pair),
    Times = macula_quic_lab:times(200),
    Options = client_options(),
    Self = self(),
    Sender = spawn_link(fun() ->
        [ok = macula_quic:send(Here, <<"x">>) || _ <- lists:seq(1, Times)],
        Self ! {self(), done},
        receive stop -> ok end
    end),
    Opener = spawn_link(fun() ->
        _ = [begin
                 {ok, X} = macula_quic:open_stream(C, #{direction => unidirectional,
                                                        timeout => infinity}),
                 ok = macula_quic:send(X, <<"x">>, #{fin => true})
             end || _ <- lists:seq(1, Times div 4)],
        _ = [macula_quic:connect("127.0.0.1", Port, Options, 5000) || _ <- lists:seq(1, 20)],
        Self ! {self(), done},
        receive stop -> ok end
    end),
    [begin
         T = N rem 3,
         _ = macula_quic:recv(There, 1, T),
         case macula_quic:accept_stream(S, #{}, T) of
             {ok, X} -> {ok, <<"x">>} = macula_quic:recv(X, 1, 5000),
                        ok = macula_quic:close_stream(X);
             {error, timeout} -> ok
         end,
         _ = macula_quic:accept(L, T),
         %% Unidirectional the other way: not taken for those accepted above.
         _ = macula_quic:open_stream(S, #{timeout => T, direction => unidirectional}),
         _ = macula_quic:connect("127.0.0.1", Port, Options, T)
     end || N <- lists:seq(1, Times)],
    [?EXPECT({Pid, done}, ok, 60000) || Pid <- [Sender, Opener]],
    {messages, Messages} = process_info(self(), messages),
    ?assertEqual([], [M || M <- Messages, element(1, M) =/= quic]),
    [ok = macula_quic:close(X) || X <- [Here, C]].

%% A random walk over all calls with good arguments, from several processes at once.
any_order_of_calls_leaves_nothing(_Config) ->
    [leaves_nothing(fun() -> walks(Seed) end) || Seed <- lists:seq(1, 5)].

walks(Seed) ->
    #{client := C, server := S, listener := L} = Pair = pair(),
    Streams = [stream(Pair) || _ <- [1, 2, 3]],
    Handles = [C, S | lists:append([[A, B] || {A, B} <- Streams])],
    Walkers = [spawn_monitor(fun() ->
        walk(rand:seed_s(exsss, {Seed, N, 0}), Handles, 300)
    end) || N <- lists:seq(1, 6)],
    [receive
         {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason)
     after 60000 -> error({stuck, process_info(Pid, current_stacktrace)})
     end || {Pid, Monitor} <- Walkers],
    ?assertMatch({ok, _}, macula_quic:info(L)).

walk(_Random, _Handles, 0) ->
    ok;
walk(R0, Handles, Left) ->
    {I, R1} = rand:uniform_s(length(Handles), R0),
    {J, R2} = rand:uniform_s(16, R1),
    H = lists:nth(I, Handles),
    _ = case J of
        1 -> macula_quic:send(H, <<"data">>, #{timeout => 5});
        2 -> macula_quic:recv(H, 3, 1);
        3 -> macula_quic:setopt(H, active, true);
        4 -> macula_quic:setopt(H, active, false);
        5 -> macula_quic:setopt(H, active, 3);
        6 -> macula_quic:async_send(H, [<<"io">>, "list"]);
        7 -> macula_quic:controlling_process(H, self());
        8 -> macula_quic:open_stream(H, #{timeout => 5});
        9 -> macula_quic:accept_stream(H, #{}, 1);
        10 -> macula_quic:getstat(H);
        11 -> macula_quic:info(H);
        12 -> macula_quic:send_datagram(H, <<"dgram">>);
        13 when Left < 30 -> macula_quic:async_shutdown_stream(H, abort, 1);
        14 when Left < 20 -> macula_quic:close_stream(H);
        15 when Left < 3 -> macula_quic:close(H);
        _ -> macula_quic:setopt(H, datagrams, once)
    end,
    walk(R2, Handles, Left - 1).

%% What waits in the system for one connection is ahead of nothing of its neighbours.
a_busy_connection_hears_by_a_socket_of_its_own(_Config) ->
    case os:type() of
        {unix, linux} -> leaves_nothing(fun busy_and_quiet/0);
        _ -> {skip, "where the system gives packets to the socket that is connected"}
    end.

busy_and_quiet() ->
    #{listener := L, port := Port, client := C} = Quiet = pair(),
    {Here, There} = stream(Quiet),
    Busy = macula_quic_lab:pair(L, Port, #{local_address => "127.0.0.1:0"}),
    {From, To} = stream(Busy),
    Half = crypto:strong_rand_bytes(32 bsl 20),
    ?assertEqual(1, sockets(Port)),
    Sender = spawn_link(fun() -> ok = macula_quic:send(From, [Half, Half], #{fin => true}) end),
    ?assertEqual({ok, Half}, macula_quic:recv(To, byte_size(Half), 60000)),
    ?assertEqual(2, sockets(Port)),
    ok = macula_quic:send(Here, <<"quiet">>),
    ?assertEqual({ok, <<"quiet">>}, macula_quic:recv(There, 5, 5000)),
    %% One more that finds the port as it was.
    ?assertMatch(#{}, macula_quic_lab:pair(L, Port, #{})),
    ?assertEqual({error, eaddrinuse}, macula_quic:listen("127.0.0.1", Port, macula_quic_lab:server_options())),
    ?assert(Half =:= macula_quic_lab:read_to_end(To)),
    ok = macula_quic:close(maps:get(client, Busy)),
    macula_test_nodes:wait_until(fun() -> sockets(Port) =:= 1 end, 30000),
    ?assertMatch({ok, _}, macula_quic:info(C)),
    unlink(Sender).

%% UDP sockets of this host with the port.
sockets(Port) ->
    {ok, Table} = file:read_file("/proc/net/udp"),
    Local = iolist_to_binary(io_lib:format("0100007F:~4.16.0B", [Port])),
    length(binary:matches(Table, Local)).

%% Owners that are killed while connections, streams and transfers are under way.
everything_at_once_leaves_nothing(_Config) ->
    leaves_nothing(fun() ->
        {L, Port} = listen(),
        Options = client_options(),
        Server = spawn_link(fun() ->
            receive go -> ok end,
            ok = macula_quic:async_accept(L),
            serve([])
        end),
        Server ! go,
        Clients = [spawn(fun() -> busy_client(Port, Options) end) || _ <- lists:seq(1, 30)],
        {ok, #{accepted := _}} = macula_quic:info(L),
        macula_test_nodes:wait_until(fun() ->
            {ok, #{accepted := N}} = macula_quic:info(L),
            N >= 60
        end, 30000),
        [exit(Pid, kill) || Pid <- Clients],
        unlink(Server),
        exit(Server, kill),
        ok = macula_quic:close(L)
    end).

serve(Kept) ->
    receive
        {quic, new_conn, Conn, _} ->
            _ = macula_quic:async_accept_stream(Conn, #{active => once}),
            serve([Conn | lists:sublist(Kept, 20)]);
        {quic, Data, Stream, _} when is_binary(Data) ->
            _ = macula_quic:async_send(Stream, Data),
            _ = macula_quic:setopt(Stream, active, once),
            Other = spawn(fun() -> receive stop -> ok after 50 -> ok end end),
            _ = macula_quic:controlling_process(Stream, Other),
            serve(Kept);
        _ ->
            serve(Kept)
    end.

busy_client(Port, Options) ->
    case macula_quic:connect("127.0.0.1", Port, Options, 5000) of
        {ok, C} ->
            _ = [begin
                     {ok, X} = macula_quic:open_stream(C),
                     ok = macula_quic:send(X, crypto:strong_rand_bytes(5000)),
                     macula_quic:recv(X, 5000, 20)
                 end || _ <- lists:seq(1, 3)],
            busy_client(Port, Options);
        {error, _} ->
            busy_client(Port, Options)
    end.

%% Resident memory, all told, of a VM that has both ends.
an_idle_connection_costs_thirty_kilobytes_at_each_end(_Config) ->
    {ok, Node} = macula_test_nodes:start(#{carrier => none}),
    try
        case macula_test_nodes:call(Node, ?MODULE, weigh, [3000], 60000) of
            unknown -> {skip, "the system does not tell what is resident"};
            Kb -> ?assert(Kb =< 60, Kb)
        end
    after
        macula_test_nodes:stop(Node)
    end.

%% Kilobytes for each of so many connections, beside those that are there before.
weigh(Count) ->
    Idle = #{idle_timeout_ms => 600000},
    {Listener, Port} = listen(Idle),
    Begin = fun(_) ->
        {ok, Client} = macula_quic:connect("127.0.0.1", Port,
                                           macula_quic_lab:client_options(Idle), 10000),
        {ok, Server} = macula_quic:accept(Listener, 10000),
        {Client, Server}
    end,
    First = lists:map(Begin, lists:seq(1, 300)),
    Before = macula_test_nodes:resident_kb([os:getpid()]),
    More = lists:map(Begin, lists:seq(1, Count)),
    After = macula_test_nodes:resident_kb([os:getpid()]),
    lists:foreach(fun({Client, Server}) ->
        ok = macula_quic:close(Client),
        ok = macula_quic:close(Server)
    end, First ++ More),
    case After of
        unknown -> unknown;
        _ -> (After - Before) / Count
    end.

%% By one, unless told otherwise; nothing that is no niceness is taken for one.
native_threads_let_schedulers_go_first(_Config) ->
    case os:type() of
        {unix, linux} ->
            [?assertEqual({Said, By}, {Said, stepped_back(Env)})
             || {Said, Env, By} <- [{nothing, [], 1}, {"3", [{"MACULA_NICE", "3"}], 3},
                                    {"0", [{"MACULA_NICE", "0"}], 0},
                                    {"-5", [{"MACULA_NICE", "-5"}], 0},
                                    {"x", [{"MACULA_NICE", "x"}], 1}]],
            ok;
        _ ->
            {skip, "a priority of a thread is Linux's"}
    end.

stepped_back(Env) ->
    macula_test_nodes:with_nodes([#{carrier => none, env => Env}], fun([Node]) ->
        #{"1_scheduler" := [Scheduler], "macula-quic" := [Native]} =
            macula_test_nodes:call(Node, ?MODULE, niceness, []),
        Native - Scheduler
    end).

%% @private The niceness of this VM's threads by their names, once there are native ones.
niceness() ->
    _ = in_process(fun() -> _ = pair(), ok end),
    Threads = [begin
        {ok, Stat} = file:read_file(Task),
        [Before, After] = string:split(Stat, ")", trailing),
        [_, Name] = string:split(Before, "("),
        {binary_to_list(Name), binary_to_integer(lists:nth(17, string:lexemes(After, " ")))}
    end || Task <- filelib:wildcard("/proc/self/task/*/stat")],
    maps:map(fun(Name, _) -> lists:usort([Nice || {N, Nice} <- Threads, N =:= Name]) end,
             maps:from_list(Threads)).
