%% What may come at a node's port from anywhere: it lives, its links live, honest nodes get in, and
%% afterwards it holds what it held before.
-module(macula_dist_robust_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([garbage_datagrams/1, a_thousand_clients_that_never_finish_their_handshake/1,
         clients_that_finish_tls_and_then_stay_silent/1, half_frames_and_sudden_ends/1,
         streams_and_datagrams_nobody_asked_for/1, bad_packet_costs_the_link_and_no_more/1,
         wrong_arguments_do_not_harm/1, version_1_alone_is_spoken/1, many_links_come_and_go/1,
         real_time_is_asked_for_and_given_back_under_handshakes/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           eventually/1, eventually/2]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [garbage_datagrams, a_thousand_clients_that_never_finish_their_handshake,
     clients_that_finish_tls_and_then_stay_silent, half_frames_and_sudden_ends,
     streams_and_datagrams_nobody_asked_for, bad_packet_costs_the_link_and_no_more,
     wrong_arguments_do_not_harm, version_1_alone_is_spoken, many_links_come_and_go,
     real_time_is_asked_for_and_given_back_under_handshakes].

init_per_suite(Config) ->
    case macula_dist_case:carrier() of
        "macula" ->
            ok = logger:set_primary_config(level, error),
            macula_dist_case:suite_begin(Config);
        Other ->
            {skip, Other ++ " has other ports"}
    end.

end_per_suite(Config) ->
    ok = logger:set_primary_config(level, notice),
    macula_dist_case:suite_end(Config).

init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- helpers --------------------------------------------------------------------------------------

%% T on a known port, with a link to A and the code loaded that strangers make it load.
scene() ->
    T = start(t),
    Port = macula_dist_case:port_of(T),
    A = start(a),
    ok = connect(A, T),
    {ok, Conn} = macula_dist_stranger:dial(Port),
    {ok, S} = macula_dist_stranger:first_stream(Conn),
    ok = macula_quic:send(S, <<"hello">>),
    _ = macula_quic:close(Conn),
    honest_gets_in(T),
    %% OTP's resolver is started when a name is first looked up, and stays.
    {ok, _} = call(T, inet, getaddr, ["localhost", inet]),
    {T, A, Port, link_to(A, T), before(T)}.

%% Others that have come and gone may be on their way out at A: `global' has linked them with A, too.
link_to(A, T) ->
    Link = proplists:get_value(node_of(T), macula_dist_case:controllers(A)),
    true = is_pid(Link),
    Link.

%% Taken when what the beginning left has gone.
before(T) ->
    ok = eventually(fun() -> length(call(T, erlang, nodes, [connected])) =:= 1 end),
    {macula_test_nodes:snapshot(T), macula_dist_case:native_memory(T)}.

honest_gets_in(T) ->
    {Ms, ok} = macula_dist_case:timed(fun() ->
        Honest = start(honest),
        ok = connect(Honest, T),
        macula_dist_case:stop(Honest)
    end),
    ct:log("an honest node came, linked and went in ~p ms", [Ms]).

%% The same link as before, others get in, and nothing is left.
unharmed({T, A, _Port, Ctrl, {Snapshot, Native}}) ->
    Ctrl = link_to(A, T),
    pong = call(A, net_adm, ping, [node_of(T)]),
    honest_gets_in(T),
    ok = macula_test_nodes:wait_until(fun() ->
        case macula_test_nodes:leaks(Snapshot, macula_test_nodes:snapshot(T)) of
            [] -> true;
            Leaks -> Leaks
        end
    end, 30000),
    Growth = macula_dist_case:native_memory(T) - Native,
    ct:log("native memory grew by ~b KB", [Growth div 1000]),
    true = Growth < 40000000.

%% -- cases ----------------------------------------------------------------------------------------

version_1_alone_is_spoken(_Config) ->
    [1] = macula_quic_lab:versions(macula_dist_case:port_of(start(t))).

garbage_datagrams(_Config) ->
    {_, _, Port, _, _} = Scene = scene(),
    {ok, U} = gen_udp:open(0, [binary, {active, false}]),
    lists:foreach(fun(N) ->
        ok = gen_udp:send(U, {127, 0, 0, 1}, Port, garbage(N))
    end, lists:seq(1, 30000)),
    ok = gen_udp:close(U),
    unharmed(Scene).

%% Pure noise, and noise that begins as QUIC does: long headers of version 1 and others, version
%% negotiation, short headers, wrong lengths, empty.
garbage(N) ->
    Noise = rand:bytes(rand:uniform(1400)),
    case N rem 8 of
        0 -> Noise;
        1 -> <<16#c0, 1:32, 8, (rand:bytes(8))/binary, 8, (rand:bytes(8))/binary, 0, Noise/binary>>;
        2 -> <<16#c3, 1:32, 255, Noise/binary>>;
        3 -> <<16#40, Noise/binary>>;
        4 -> <<16#80, 0:32, 8, (rand:bytes(8))/binary, 0, Noise/binary>>;
        5 -> <<16#c0, 16#babababa:32, 20, (rand:bytes(1200))/binary>>;
        6 -> <<>>;
        7 -> <<16#f0, 1:32, 20, (rand:bytes(20))/binary, 0, 16#4400:16, (rand:bytes(1200))/binary>>
    end.

%% First flights as a real client sends them, caught by a sink and sent on to the node, each from an
%% address of its own (as far as files may be open); half of them without their last datagram.
a_thousand_clients_that_never_finish_their_handshake(_Config) ->
    {T, _, Port, _, _} = Scene = scene(),
    Flights = first_flights(1000),
    MaxFiles = proplists:get_value(max_fds, lists:flatten(erlang:system_info(check_io))),
    Sockets = [begin
        {ok, U} = gen_udp:open(0, [binary, {ip, {127, 0, 0, 1}}, {active, false}]),
        U
    end || _ <- lists:seq(1, min(length(Flights), MaxFiles div 2))],
    lists:foreach(fun({N, Flight}) ->
        U = lists:nth(N rem length(Sockets) + 1, Sockets),
        [ok = gen_udp:send(U, {127, 0, 0, 1}, Port, D) || D <- Flight]
    end, lists:zip(lists:seq(1, length(Flights)), Flights)),
    %% While they are all in progress:
    honest_gets_in(T),
    [ok = gen_udp:close(U) || U <- Sockets],
    unharmed(Scene).

first_flights(Wanted) ->
    Options = [binary, {ip, {127, 0, 0, 1}}, {recbuf, 8000000}, {active, false}],
    {ok, Sink} = gen_udp:open(0, Options),
    {ok, SinkPort} = inet:port(Sink),
    Dialler = spawn_link(fun() ->
        Identity = macula_dist_stranger:identity(),
        Refs = [spawn_monitor(fun() ->
            {error, _} = macula_quic:connect("127.0.0.1", SinkPort,
                                             [{verify, verify_none}, {alpn, [<<"macula-dist/1">>]}
                                              | Identity], 3000)
        end) || _ <- lists:seq(1, Wanted)],
        [receive {'DOWN', M, _, _, _} -> ok end || {_, M} <- Refs]
    end),
    %% To the end: how soon the first and how long after it the next ones come is up to the machine.
    Caught = catch_flights(Sink, Dialler, #{}),
    ok = gen_udp:close(Sink),
    Flights = [lists:reverse(F) || F <- maps:values(Caught)],
    true = length(Flights) >= Wanted * 9 div 10,
    [case N rem 2 of 0 when length(F) > 1 -> lists:droplast(F); _ -> F end
     || {N, F} <- lists:zip(lists:seq(1, length(Flights)), Flights)].

%% By destination connection id: all diallers share a port.
catch_flights(Sink, Dialler, Caught) ->
    case gen_udp:recv(Sink, 0, 500) of
        {ok, {_, _, <<1:1, _:7, _:32, Len, Dcid:Len/binary, _/binary>> = Datagram}} ->
            Flight = maps:get(Dcid, Caught, []),
            case length(Flight) < 2 andalso not lists:member(Datagram, Flight) of
                true -> catch_flights(Sink, Dialler, Caught#{Dcid => [Datagram | Flight]});
                false -> catch_flights(Sink, Dialler, Caught)
            end;
        {ok, _} ->
            catch_flights(Sink, Dialler, Caught);
        {error, timeout} ->
            case is_process_alive(Dialler) of
                true -> catch_flights(Sink, Dialler, Caught);
                false -> Caught
            end
    end.

clients_that_finish_tls_and_then_stay_silent(_Config) ->
    {T, _, Port, _, _} = Scene = scene(),
    Identity = macula_dist_stranger:identity(),
    Conns = [begin {ok, Conn} = macula_dist_stranger:dial(Port, Identity), Conn end
             || _ <- lists:seq(1, 100)],
    honest_gets_in(T),
    %% All of them are shown out by the node.
    lists:foreach(fun(Conn) ->
        receive
            {quic, Event, Conn, _} when Event =:= shutdown; Event =:= closed;
                                        Event =:= transport_shutdown -> ok
        after 15000 -> ct:fail(still_there) end
    end, Conns),
    unharmed(Scene).

half_frames_and_sudden_ends(_Config) ->
    {T, _, Port, _, _} = Scene = scene(),
    Identity = macula_dist_stranger:identity(),
    Name = atom_to_binary(node_of(T)),
    {_, Share} = macula_nif:dist_exchange(dialler, <<"a guess">>),
    Whole = iolist_to_binary(macula_dist_proof:hello(<<"evil@127.0.0.1">>, Name, Share)),
    lists:foreach(fun(N) ->
        {ok, Conn} = macula_dist_stranger:dial(Port, Identity),
        {ok, S} = macula_dist_stranger:first_stream(Conn),
        %% Cut anywhere, and ended in each of the ways there are.
        ok = macula_quic:send(S, binary:part(Whole, 0, N rem byte_size(Whole))),
        case N rem 4 of
            0 -> _ = macula_quic:close(Conn);
            1 -> _ = macula_quic:close_stream(S);
            2 -> _ = macula_quic:async_shutdown_stream(S, abort, N);
            3 -> _ = macula_quic:close_connection(Conn, N, <<"sudden">>)
        end,
        _ = macula_quic:close(Conn)
    end, lists:seq(1, 120)),
    unharmed(Scene).

streams_and_datagrams_nobody_asked_for(_Config) ->
    {_, _, Port, _, _} = Scene = scene(),
    {ok, Conn} = macula_dist_stranger:dial(Port),
    lists:foreach(fun(Direction) ->
        lists:foreach(fun(_) ->
            case macula_quic:open_stream(Conn, #{direction => Direction, timeout => 100}) of
                {ok, S} -> _ = macula_quic:async_send(S, rand:bytes(100000));
                {error, _} -> ok
            end
        end, lists:seq(1, 40))
    end, [bidirectional, unidirectional]),
    [_ = macula_quic:send_datagram(Conn, rand:bytes(500)) || _ <- lists:seq(1, 100)],
    _ = macula_quic:close(Conn),
    unharmed(Scene).

%% A peer with the cookie that sends nonsense: the VM drops the link, and the next is as good.
bad_packet_costs_the_link_and_no_more(_Config) ->
    A = start(a),
    B = start(b),
    NodeB = node_of(B),
    lists:foreach(fun(Packet) ->
        ok = connect(A, B),
        Watch = macula_dist_case:nodedown_watch(A),
        call(A, fun() ->
            {NodeB, Ctrl} = lists:keyfind(NodeB, 1, erlang:system_info(dist_ctrl)),
            Ctrl ! {send, self(), make_ref(), Packet}
        end),
        {_, _} = macula_dist_case:await_nodedown({A, Watch}, NodeB, 10000),
        ok = eventually(fun() -> not macula_dist_case:connected(B, A) end)
    end, [%% Atoms by reference to a cache that was rejected: ERTS 25 looks them up all the same.
          <<131, $D, 255>>, <<131, $D, 3, 16#88, 16#08, 0, 1, "a", 1, 1, "b", 2, 1, "c", 104, 2, 97, 1>>,
          <<131, $D, 1, 0, 7, 104, 1, 97, 1>>, <<131, $E, 1:64, 1:64, 1, 0, 7, 104, 1, 97, 1>>,
          <<131, $E, 1:64, 2:64, 1, 0, 7, (rand:bytes(5000))/binary>>,
          <<131, $D, 0, 255>>, <<131, $D, 0, 104, 1, 97, 200>>, <<131, $D, 0, 131, 131>>,
          <<131, $D, 0, 104, 3, 97, 2>>]),
    ok = connect(A, B).

%% Whoever calls the carrier's functions with nonsense gets an exception or an error, and no crash.
wrong_arguments_do_not_harm(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    Result = call(A, fun() ->
        Junk = [x, 1, -1, 1.5, <<>>, "s", [], {}, #{}, make_ref(), self(), fun() -> ok end, [x | y],
                [x, $@, y], [$a, $@ | $b]],
        Functions = [{F, N} || {F, N} <- macula_nif:module_info(exports),
                               lists:prefix("dist_", atom_to_list(F))],
        [begin
            Args = [lists:nth(rand:uniform(length(Junk)), Junk) || _ <- lists:seq(1, Arity)],
            catch apply(macula_nif, F, Args)
        end || {F, Arity} <- Functions, _ <- lists:seq(1, 100)],
        %% These are asked about any name, and raise nothing.
        false = lists:any(fun(J) -> macula_dist:select(J) orelse macula_dist:is_node_name(J)
                                        orelse macula_dist:splitname(J) =/= false end, Junk),
        [{error, not_connected} = macula_dist:info(J) || J <- Junk],
        length(Functions)
    end),
    true = Result > 5,
    pong = call(A, net_adm, ping, [node_of(B)]),
    ok.

many_links_come_and_go(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    NodeT = node_of(T),
    Others = [start(o) || _ <- lists:seq(1, 3)],
    Self = self(),
    [spawn_link(fun() -> Self ! {done, call(O, fun() ->
        lists:foreach(fun(_) ->
            _ = net_kernel:connect_node(NodeT),
            _ = erlang:disconnect_node(NodeT)
        end, lists:seq(1, 60))
    end)} end) || O <- Others],
    [receive {done, ok} -> ok after 60000 -> ct:fail(stuck) end || _ <- Others],
    [macula_dist_case:stop(O) || O <- Others],
    ok = eventually(fun() -> length(call(T, erlang, nodes, [connected])) =:= 1 end, 20000),
    unharmed(Scene).

real_time_is_asked_for_and_given_back_under_handshakes(_Config) ->
    case os:cmd("chrt -r 1 true 2>&1") of
        "" -> real_time();
        No -> {skip, "no real-time policy here: " ++ No}
    end.

real_time() ->
    Plain = start(plain),
    false = is_real_time(Plain),
    Asked = start(asked, #{env => [{"MACULA_DIST_REALTIME", "1"}]}),
    Port = macula_dist_case:port_of(Asked),
    {ok, Poke} = gen_udp:open(0, [binary]),
    Becomes = fun(Wanted) ->
        ok = macula_test_nodes:wait_until(fun() ->
            %% A thread that sleeps changes nothing, and a single byte would not wake it.
            ok = gen_udp:send(Poke, {127, 0, 0, 1}, Port, <<0, 0>>),
            is_real_time(Asked) =:= Wanted
        end)
    end,
    Becomes(true),
    Flood = spawn_link(fun() ->
        {ok, U} = gen_udp:open(0, [binary]),
        flood(U, Port)
    end),
    Becomes(false),
    unlink(Flood),
    exit(Flood, kill),
    Becomes(true).

flood(U, Port) ->
    ok = gen_udp:send(U, {127, 0, 0, 1}, Port, macula_quic_lab:initial_packet()),
    flood(U, Port).

%% Field 41 of proc(5): whether the policy of the thread `macula-dist' is SCHED_RR.
is_real_time(#{os_pid := Pid}) ->
    Tasks = "/proc/" ++ Pid ++ "/task/",
    [Policy] = [lists:nth(41 - 2, string:lexemes(After, " "))
                || Stat <- filelib:wildcard(Tasks ++ "*/stat"),
                   {ok, Line} <- [file:read_file(Stat)],
                   [_, Rest] <- [string:split(binary_to_list(Line), "(")],
                   ["macula-dist", After] <- [string:split(Rest, ")")]],
    Policy =:= "2".
