%% Data that goes with a client's first packet: what it saves, what becomes of it, and what it must not do.
-module(macula_quic_early_data_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([it_is_answered_a_round_trip_earlier/1, a_server_reads_it_with_the_first_packet/1,
         nobody_sends_early_unless_both_ends_want_it/1, rejected_data_is_told_and_sent_again/1,
         what_was_recorded_is_not_read_again/1, a_listener_limits_it/1,
         a_client_that_sends_nothing_more_is_left/1, a_server_that_does_not_answer_is_left/1,
         handshake_waits_for_the_end_of_it/1, it_survives_a_retry/1, datagrams_go_early/1,
         many_at_a_time/1, a_pending_connection_ends_as_any_other/1,
         early_data_is_for_the_server_that_was_met/1, wrong_options_are_refused/1,
         a_connection_process_is_told/1,
         a_client_process_hears_of_the_handshake_in_order/1]).

all() -> macula_quic_lab:cases(?MODULE, []).

suite() ->
    [{timetrap, {minutes, 2}}].

init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Credentials of their own, and with them tickets.
fresh() ->
    #{cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    {#{cert => Cert, key => Key, alpn => ["test"], resumption => early_data},
     #{cacerts => Cert, alpn => ["test"], resumption => true, early_data => true}}.

serve(Options) ->
    {ok, Listener} = macula_quic:listen("127.0.0.1", 0, Options),
    {ok, {_, Port}} = macula_quic:sockname(Listener),
    ok = macula_quic:async_accept(Listener),
    {Listener, Port}.

connect(Port, Options) ->
    {ok, Client} = macula_quic:connect("127.0.0.1", Port, Options, 20000),
    Client.

accepted() ->
    ?EXPECT({quic, new_conn, Conn, Info}, {Conn, Info}).

%% The handshake may be done when its owner takes the connection.
came_early(#{early_data := Early}) ->
    lists:member(Early, [pending, accepted]).

early(Conn) ->
    {ok, #{early_data := Early}} = macula_quic:info(Conn),
    Early.

%% A ticket for this port.
met(Port, Options) ->
    Client = connect(Port, Options#{early_data => false}),
    ?assertEqual(none, early(Client)),
    {Server, #{early_data := none}} = accepted(),
    ?EXPECT({quic, nst_received, Client, <<>>}),
    close(Client, Server).

%% Before the handshake is done the peer does not see who closes it.
close(Client, Server) ->
    [{ok, Conn} = macula_quic:handshake(Conn) || Conn <- [Client, Server]],
    ok = macula_quic:close(Client),
    ?EXPECT({quic, closed, Client, normal}),
    ?EXPECT({quic, shutdown, Server, _}).

send(Conn, Data) ->
    {ok, Stream} = macula_quic:open_stream(Conn),
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    Stream.

read(Conn) ->
    {ok, Stream} = macula_quic:accept_stream(Conn, #{}, 10000),
    {Stream, macula_quic_lab:read_to_end(Stream)}.

through(Port, Options) ->
    {ok, Relay} = macula_relay:start_link(Options#{target => {{127, 0, 0, 1}, Port}}),
    {Relay, macula_relay:port(Relay)}.

%%--------------------------------------------------------------------------------------------
%% What it saves

%% 50 ms each way.
it_is_answered_a_round_trip_earlier(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{delay_ms => 50}),
    Talk = fun(Options, Early) ->
        Begin = erlang:monotonic_time(microsecond),
        Client = connect(There, Options),
        Stream = send(Client, <<"request">>),
        {Server, _} = accepted(),
        {Ours, <<"request">>} = read(Server),
        ok = macula_quic:send(Ours, <<"answer">>, #{fin => true}),
        ?assertEqual(<<"answer">>, macula_quic_lab:read_to_end(Stream)),
        Micros = erlang:monotonic_time(microsecond) - Begin,
        {ok, Client} = macula_quic:handshake(Client),
        ?assertEqual(Early, early(Client)),
        ?EXPECT({quic, nst_received, Client, <<>>}),
        close(Client, Server),
        Micros / 100000
    end,
    Waits = maps:remove(early_data, ClientOptions),
    _ = Talk(Waits, none),
    Pairs = [{Talk(Waits, none), Talk(ClientOptions, accepted)} || _ <- lists:seq(1, 5)],
    ct:pal("round trips, waiting and early: ~p", [Pairs]),
    %% The relay is never early, and what waits for two round trips has no answer before. What is late is late
    %% as this machine has something else to do.
    {Waiting, Early} = lists:unzip(Pairs),
    ?assert(lists:min(Waiting) >= 2),
    ?assert(lists:min(Early) >= 1),
    ?assert(lists:min(Early) < 1.8),
    macula_relay:stop(Relay).

a_server_reads_it_with_the_first_packet(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    %% Nothing that the server says arrives.
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    ?assertEqual(pending, early(Client)),
    ?assertMatch({ok, #{resumed := false}}, macula_quic:info(Client)),
    Here = send(Client, <<"early">>),
    {Server, Info} = accepted(),
    ?assertMatch(#{early_data := pending, resumed := true, negotiated_protocol := <<"test">>}, Info),
    {Ours, <<"early">>} = read(Server),
    ?assertEqual(pending, early(Server)),
    ?EXPECT({quic, resumed, Server, false}),
    ?NOTHING({quic, early_data, _, _}),
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    ok = macula_quic:send(Ours, <<"answer">>, #{fin => true}),
    ?assertEqual(<<"answer">>, macula_quic_lab:read_to_end(Here)),
    [begin
         ?EXPECT({quic, early_data, Conn, accepted}),
         ?assertEqual(accepted, early(Conn)),
         ?assertMatch({ok, #{resumed := true}}, macula_quic:info(Conn))
     end || Conn <- [Client, Server]],
    ?EXPECT({quic, resumed, Client, false}),
    %% And what comes later is as it always is.
    Data = crypto:strong_rand_bytes(1000000),
    _ = send(Server, Data),
    {_, Data} = read(Client),
    _ = send(Client, Data),
    {_, Data} = read(Server),
    macula_relay:stop(Relay).

nobody_sends_early_unless_both_ends_want_it(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Cases = [{ServerOptions#{resumption => true}, ClientOptions, true},
             {ServerOptions#{resumption => false}, ClientOptions, false},
             {ServerOptions, ClientOptions#{early_data => false}, true},
             {ServerOptions, ClientOptions#{resumption => false, early_data => false}, false}],
    [begin
         {Listener, Port} = serve(Server),
         [begin
              C = connect(Port, Client),
              {S, Info} = accepted(),
              ?assertMatch(#{early_data := none, resumed := Resumed}, Info),
              ?assertEqual(none, early(C)),
              [?EXPECT({quic, nst_received, C, <<>>}) || Resumes],
              close(C, S)
          end || Resumed <- [false, Resumes, Resumes]],
         ok = macula_quic:close(Listener)
     end || {Server, Client, Resumes} <- Cases],
    ?NOTHING({quic, early_data, _, _}).

%%--------------------------------------------------------------------------------------------
%% What becomes of it

%% A server that was started anew knows no session.
rejected_data_is_told_and_sent_again(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Old, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    ok = macula_quic:close_listener(Old),
    {ok, New} = macula_quic:listen("127.0.0.1", Port, ServerOptions),
    ok = macula_quic:async_accept(New),
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    Data = crypto:strong_rand_bytes(50000),
    Streams = [send(Client, Data) || _ <- lists:seq(1, 3)],
    {ok, Open} = macula_quic:open_stream(Client, #{active => true}),
    ok = macula_quic:send(Open, <<"open">>),
    {ok, One} = macula_quic:open_stream(Client, #{direction => unidirectional}),
    ok = macula_quic:send(One, <<"way">>),
    %% What is given up before is no stream of the server's either.
    {ok, Reset} = macula_quic:open_stream(Client),
    ok = macula_quic:send(Reset, <<"never mind">>),
    ok = macula_quic:reset_stream(Reset, 7),
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    ?EXPECT({quic, early_data, Client, rejected}),
    ?assertEqual(rejected, early(Client)),
    ?assertMatch({ok, #{resumed := false}}, macula_quic:info(Client)),
    {Server, #{resumed := false, early_data := none}} = accepted(),
    [?EXPECT({quic, stream_closed, Stream, #{reason := early_data_rejected, status := early_data_rejected,
                                             is_conn_shutdown := false}})
     || Stream <- [Open, One | Streams]],
    ?EXPECT({quic, stream_closed, Reset, _}),
    [?assertEqual({error, early_data_rejected}, macula_quic:send(Stream, <<"more">>))
     || Stream <- [Open, One]],
    ?assertEqual({error, early_data_rejected}, macula_quic:recv(hd(Streams), 0, 1000)),
    %% By choice, with the numbers that the rejected ones had.
    Again = [send(Client, [Data, N]) || N <- [1, 2, 3]],
    [begin
         {Theirs, Read} = read(Server),
         ?assert(lists:member(Read, [iolist_to_binary([Data, N]) || N <- [1, 2, 3]])),
         ok = macula_quic:send(Theirs, <<"got it">>, #{fin => true})
     end || _ <- Again],
    [?assertEqual(<<"got it">>, macula_quic_lab:read_to_end(Stream)) || Stream <- Again],
    ?assertEqual({error, timeout}, macula_quic:accept_stream(Server, #{}, 0)),
    [?EXPECT({quic, stream_closed, Stream, #{reason := normal}}) || Stream <- Again],
    {ok, [{streams, 0}]} = macula_quic:getstat(Client, [streams]),
    %% The next one is early again.
    ?EXPECT({quic, nst_received, Client, <<>>}),
    close(Client, Server),
    Next = connect(There, ClientOptions),
    _ = send(Next, Data),
    {Last, Info} = accepted(),
    ?assert(came_early(Info)),
    {_, Data} = read(Last),
    ?EXPECT({quic, early_data, Next, accepted}),
    close(Next, Last),
    macula_relay:stop(Relay).

%% RFC 8446, section 8: all that a client has sent, sent once more by somebody else.
what_was_recorded_is_not_read_again(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Listener, Port} = serve(ServerOptions#{handshake_timeout_ms => 3000}),
    Recorder = record(Port),
    There = port(Recorder),
    met(There, ClientOptions),
    recorded(Recorder),
    Client = connect(There, ClientOptions),
    _ = send(Client, <<"pay 100">>),
    {Server, Info} = accepted(),
    ?assert(came_early(Info)),
    {_, <<"pay 100">>} = read(Server),
    ?EXPECT({quic, early_data, Client, accepted}),
    ?EXPECT({quic, early_data, Server, accepted}),
    close(Client, Server),
    Recorded = recorded(Recorder),
    %% When the server has forgotten the connection.
    {ok, Socket} = gen_udp:open(0, [binary]),
    Replay = fun() -> [ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, Packet) || Packet <- Recorded] end,
    Tried = fun() ->
        {ok, #{handshakes := Trying}} = macula_quic:info(Listener),
        Trying
    end,
    macula_test_nodes:wait_until(fun() -> Replay(), Tried() > 0 end),
    macula_test_nodes:wait_until(fun() -> Tried() =:= 0 end),
    ?NOTHING({quic, new_conn, _, _}),
    Recorder ! stop,
    gen_udp:close(Socket).

%% A relay that remembers what clients send.
record(Port) ->
    spawn_link(fun() ->
        {ok, Front} = gen_udp:open(0, [binary, {ip, {127, 0, 0, 1}}, {active, true}]),
        {ok, Back} = gen_udp:open(0, [binary, {ip, {127, 0, 0, 1}}, {active, true}]),
        record(Front, Back, Port, undefined, [])
    end).

record(Front, Back, Port, Client, Packets) ->
    receive
        {udp, Front, Ip, From, Packet} ->
            ok = gen_udp:send(Back, {127, 0, 0, 1}, Port, Packet),
            record(Front, Back, Port, {Ip, From}, [Packet | Packets]);
        {udp, Back, _, _, Packet} ->
            {Ip, To} = Client,
            ok = gen_udp:send(Front, Ip, To, Packet),
            record(Front, Back, Port, Client, Packets);
        {port, To} ->
            {ok, Number} = inet:port(Front),
            To ! {self(), Number},
            record(Front, Back, Port, Client, Packets);
        {recorded, To} ->
            To ! {self(), lists:reverse(Packets)},
            record(Front, Back, Port, Client, []);
        stop ->
            ok
    end.

port(Recorder) -> asked(Recorder, port).

recorded(Recorder) -> asked(Recorder, recorded).

asked(Recorder, What) ->
    Recorder ! {What, self()},
    ?EXPECT({Recorder, Answer}, Answer).

a_listener_limits_it(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions#{early_data_limit => 3000}),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    Data = crypto:strong_rand_bytes(300000),
    Here = send(Client, Data),
    {Server, #{early_data := pending}} = accepted(),
    {ok, Stream} = macula_quic:accept_stream(Server, #{}, 10000),
    {ok, First} = macula_quic:recv(Stream, 3000, 10000),
    ?assertEqual({error, timeout}, macula_quic:recv(Stream, 1, 500)),
    %% Nor does the server's owner change that.
    ok = macula_quic:setopt(Server, conn_flow_control_window, 1000000),
    ?assertEqual({error, timeout}, macula_quic:recv(Stream, 1, 500)),
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    ?assert(Data =:= <<First/binary, (macula_quic_lab:read_to_end(Stream))/binary>>),
    ?EXPECT({quic, early_data, Client, accepted}),
    ok = macula_quic:close(Here),
    macula_relay:stop(Relay).

a_client_that_sends_nothing_more_is_left(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Listener, Port} = serve(ServerOptions#{handshake_timeout_ms => 3000, max_handshakes => 1}),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    _ = send(Client, <<"early">>),
    {Server, #{early_data := pending}} = accepted(),
    {_, <<"early">>} = read(Server),
    %% It has its place among the handshakes all the while.
    ?assertMatch({ok, #{handshakes := 1}}, macula_quic:info(Listener)),
    ?EXPECT({quic, transport_shutdown, Server, timeout}),
    ?assertEqual({error, timeout}, macula_quic:handshake(Server)),
    ?assertMatch({ok, #{handshakes := 0}}, macula_quic:info(Listener)),
    ?NOTHING({quic, early_data, Server, _}),
    ok = macula_quic:close(Client),
    macula_relay:stop(Relay).

a_server_that_does_not_answer_is_left(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    [begin
         ok = macula_relay:set(Relay, #{blackhole => false}),
         met(There, ClientOptions),
         ok = macula_relay:set(Relay, #{blackhole => true}),
         {ok, Client} = macula_quic:connect("127.0.0.1", There, maps:merge(ClientOptions, More), Timeout),
         Stream = send(Client, <<"early">>),
         ?EXPECT({quic, stream_closed, Stream, #{reason := timeout}}, ok, 30000),
         ?EXPECT({quic, transport_shutdown, Client, timeout}),
         ?assertEqual({error, timeout}, macula_quic:handshake(Client)),
         ?NOTHING({quic, early_data, _, _})
     end || {More, Timeout} <- [{#{handshake_timeout_ms => 2000}, 20000}, {#{}, 2000},
                                {#{idle_timeout_ms => 2000}, infinity}]],
    macula_relay:stop(Relay).

handshake_waits_for_the_end_of_it(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    _ = send(Client, <<"early">>),
    {Server, _} = accepted(),
    Self = self(),
    Waiting = [spawn_link(fun() -> Self ! {self(), macula_quic:handshake(Conn)} end)
               || Conn <- [Client, Server]],
    {_, <<"early">>} = read(Server),
    %% The client's first packet is sent again meanwhile.
    macula_test_nodes:wait_until(fun() ->
        #{down := #{blackholed := Dropped}} = macula_relay:stats(Relay),
        Dropped > 2
    end),
    [?NOTHING({Pid, _}) || Pid <- Waiting],
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    [?EXPECT({Pid, {ok, Conn}}) || {Pid, Conn} <- lists:zip(Waiting, [Client, Server])],
    macula_relay:stop(Relay).

it_survives_a_retry(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions#{retry => always}),
    met(Port, ClientOptions),
    [begin
         Client = connect(Port, ClientOptions),
         Data = crypto:strong_rand_bytes(10000),
         _ = send(Client, Data),
         {Server, Info} = accepted(),
         ?assert(came_early(Info)),
         {_, Data} = read(Server),
         ?EXPECT({quic, early_data, Client, accepted}),
         ?EXPECT({quic, nst_received, Client, <<>>}),
         close(Client, Server)
     end || _ <- lists:seq(1, 10)].

datagrams_go_early(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    met(There, ClientOptions),
    ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
    Client = connect(There, ClientOptions),
    ok = macula_quic:send_datagram(Client, <<"early">>),
    {Server, #{early_data := pending}} = accepted(),
    ok = macula_quic:setopt(Server, datagrams, true),
    ?EXPECT({quic, dgram, Server, <<"early">>}),
    macula_relay:stop(Relay).

many_at_a_time(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    Self = self(),
    Clients = 20,
    Rounds = 5,
    %% Each with a name, and tickets, of its own.
    Pids = [spawn_link(fun() ->
        Options = (maps:remove(cacerts, ClientOptions))#{
            verify => verify_none, server_name => "host" ++ integer_to_list(N)},
        Outcomes = [begin
            Client = connect(Port, Options),
            Data = crypto:strong_rand_bytes(5000 + rand:uniform(5000)),
            Stream = send(Client, Data),
            Hash = crypto:hash(sha256, Data),
            Hash = macula_quic_lab:read_to_end(Stream),
            {ok, Client} = macula_quic:handshake(Client),
            Early = early(Client),
            ?EXPECT({quic, nst_received, Client, <<>>}),
            ok = macula_quic:close(Client),
            Early
        end || _ <- lists:seq(1, Rounds)],
        Self ! {self(), Outcomes}
    end) || N <- lists:seq(1, Clients)],
    [begin
         {Server, _} = accepted(),
         Answerer = spawn_link(fun() ->
             receive go -> ok end,
             {Stream, Data} = read(Server),
             ok = macula_quic:send(Stream, crypto:hash(sha256, Data), #{fin => true}),
             ?EXPECT({quic, shutdown, Server, _})
         end),
         ok = macula_quic:controlling_process(Server, Answerer),
         Answerer ! go
     end || _ <- lists:seq(1, Clients * Rounds)],
    [?EXPECT({Pid, [none, accepted, accepted, accepted, accepted]}, ok, 30000) || Pid <- Pids].

a_pending_connection_ends_as_any_other(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    Pending = fun() ->
        ok = macula_relay:set(Relay, #{up => #{blackhole => false}, down => #{blackhole => false}}),
        met(There, ClientOptions),
        ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
        Client = connect(There, ClientOptions),
        _ = send(Client, <<"early">>),
        {Server, #{early_data := pending}} = accepted(),
        {Client, Server}
    end,
    {C1, S1} = Pending(),
    %% Neither hears of the other's end.
    ok = macula_relay:set(Relay, #{up => #{blackhole => true}}),
    [ok = macula_quic:close(C) || C <- [C1, S1]],
    [?EXPECT({quic, closed, C, normal}) || C <- [C1, S1]],
    [?assertMatch({error, _}, macula_quic:handshake(C)) || C <- [C1, S1]],
    %% With a new owner, who dies.
    {C2, S2} = Pending(),
    {Pid, Monitor} = spawn_monitor(fun() -> receive stop -> ok end end),
    [ok = macula_quic:controlling_process(C, Pid) || C <- [C2, S2]],
    Pid ! stop,
    ?EXPECT({'DOWN', Monitor, process, Pid, normal}),
    [macula_test_nodes:wait_until(fun() -> element(1, macula_quic:handshake(C)) =:= error end)
     || C <- [C2, S2]],
    %% And the listener goes before.
    {C3, S3} = Pending(),
    ok = macula_quic:close_listener(Listener),
    ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
    [?EXPECT({quic, early_data, C, accepted}) || C <- [C3, S3]],
    {_, <<"early">>} = read(S3),
    close(C3, S3),
    macula_relay:stop(Relay).

%% A ticket is of use at the listener that has made it.
early_data_is_for_the_server_that_was_met(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    [{_, P1}, {_, P2}] = Serving = [serve(ServerOptions) || _ <- [1, 2]],
    met(P1, ClientOptions),
    Client = connect(P2, ClientOptions),
    {Server, #{early_data := none, resumed := false}} = accepted(),
    ?assertEqual(none, early(Client)),
    close(Client, Server),
    [ok = macula_quic:close_listener(L) || {L, _} <- Serving].

wrong_options_are_refused(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Refused = fun(Key, Why, Options) ->
        ?assertEqual({error, {bad_option, Key, Why}}, macula_quic:listen("127.0.0.1", 0, Options))
    end,
    #{cert := Cert} = ServerOptions,
    Refused(resumption, {excludes, verify_peer}, ServerOptions#{verify => verify_peer, cacerts => Cert}),
    Refused(resumption_keys, {excludes, early_data}, ServerOptions#{resumption_keys => <<0:256>>}),
    Levels = maps:remove(resumption, ServerOptions),
    ?assertEqual({error, {unsupported_option, server_resumption_level}},
                 macula_quic:listen("127.0.0.1", 0, Levels#{server_resumption_level => 3})),
    ?assertEqual({error, {bad_option, early_data, {needs, resumption}}},
                 macula_quic:connect("127.0.0.1", 1, ClientOptions#{resumption => false}, 1000)),
    {Listener, Port} = serve(Levels#{server_resumption_level => 2}),
    ?assertEqual({error, {bad_option, resumption_keys, {needs, resumption}}},
                 macula_quic:setopt(Listener, resumption_keys, <<0:256>>)),
    met(Port, ClientOptions),
    Client = connect(Port, ClientOptions),
    {Server, Info} = accepted(),
    ?assert(came_early(Info)),
    close(Client, Server).

a_connection_process_is_told(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Own = #{tell => self(), script => fun(_, _, _) -> default end},
    Module = macula_quic_script:module([{init, 1}, {new_conn, 3}, {connected, 3}, {resumed, 3},
                                        {nst_received, 3}, {early_data, 3}, {closed, 3}]),
    {ok, Sup} = macula_quic_connection:start_listener(
        #{callback => Module, acceptors => 1, listen_on => {"127.0.0.1", 0}, conn_opts => Own,
          listen_opts => ServerOptions}),
    {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Sup)),
    [begin
         {ok, Client} = macula_quic_connection:start_link(
             Module, {"127.0.0.1", Port}, {maps:merge(ClientOptions, Own), #{}}),
         [Conn, _] = ?EXPECT({connected, Client, Args}, Args),
         {Server, [There, Props]} = ?EXPECT({new_conn, Pid, Args}, {Pid, Args}),
         [begin
              ?assert(came_early(Props)),
              [?EXPECT({early_data, Pid, [C, accepted]}) || {Pid, C} <- [{Client, Conn}, {Server, There}]],
              [?EXPECT({resumed, Pid, [C, false]}) || {Pid, C} <- [{Client, Conn}, {Server, There}]],
              [?assertMatch(#{is_resumed := true}, sys:get_state(Pid)) || Pid <- [Client, Server]]
          end || Early],
         ?EXPECT({nst_received, Client, [Conn, <<>>]}),
         ok = macula_quic:close(Conn),
         [?EXPECT({closed, Pid, _}) || Pid <- [Client, Server]],
         [gen_server:stop(Pid) || Pid <- [Client, Server]]
     end || Early <- [false, true, true]],
    unlink(Sup),
    exit(Sup, shutdown).

%% Whether it knows how the handshake has ended when it gets the connection, or does not.
a_client_process_hears_of_the_handshake_in_order(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {_Listener, Port} = serve(ServerOptions),
    {Relay, There} = through(Port, #{}),
    Module = macula_quic_script:module([{init, 1}, {connected, 3}, {peer_cert_received, 3}, {resumed, 3},
                                        {early_data, 3}, {nst_received, 3}, {closed, 3}]),
    Own = #{tell => self(), script => fun(_, _, _) -> default end},
    Dial = fun(Held) ->
        ok = macula_relay:set(Relay, #{down => #{blackhole => Held}}),
        {ok, Client} = macula_quic_connection:start_link(
            Module, {"127.0.0.1", There}, {maps:merge(ClientOptions, Own), #{}}),
        Begun = calls(Client, connected),
        ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
        {Client, Begun}
    end,
    End = fun(Client, Conn, Server) ->
        %% What the next one resumes.
        ?assertMatch([{nst_received, [Conn, <<>>]}], calls(Client, nst_received)),
        ok = macula_quic:close(Conn),
        ?assertMatch([{closed, [Conn, _]}], [Call || {Callback, _} = Call <- calls(Client, closed),
                                                     Callback =/= nst_received]),
        ?EXPECT({quic, shutdown, Server, _}),
        ok = gen_server:stop(Client)
    end,
    %% Without early data all is known before.
    {First, FirstBegun} = Dial(false),
    ?assertMatch([{init, _}, {peer_cert_received, [_, #{cert := Der}]},
                  {connected, [_, #{is_resumed := false, alpns := "test", peercert := Der}]}], FirstBegun),
    [_, {_, [FirstConn, #{cert := Cert}]}, _] = FirstBegun,
    {FirstServer, _} = accepted(),
    End(First, FirstConn, FirstServer),
    [begin
         {Client, Begun} = Dial(Held),
         {Server, _} = accepted(),
         [{init, _}, {connected, [Conn, Props]}] = Begun,
         ?assertMatch(#{is_resumed := false, alpns := undefined, negotiated_protocol := undefined,
                        peercert := undefined}, Props),
         ?assertEqual([{resumed, [Conn, false]}, {peer_cert_received, [Conn, #{cert => Cert, chain => [Cert]}]},
                       {early_data, [Conn, accepted]}], calls(Client, early_data)),
         ?assertEqual({ok, <<"test">>}, macula_quic:negotiated_protocol(Conn)),
         ?assertMatch(#{is_resumed := true}, sys:get_state(Client)),
         End(Client, Conn, Server)
     end || Held <- [true | lists:duplicate(macula_quic_lab:times(20), false)]],
    macula_relay:stop(Relay).

%% What the process has called, in order, up to this callback.
calls(Client, Last) ->
    {Callback, Args} = ?EXPECT({Name, Client, Given}, {Name, Given}, 20000),
    [{Callback, Args} | case Callback of
        Last -> [];
        _ -> calls(Client, Last)
    end].
