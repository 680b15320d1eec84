%% What strangers can have of a listener: addresses that are not proven, handshakes that are not finished,
%% connections without end.
-module(macula_quic_attack_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([addresses_must_be_proven_from_half_of_the_handshakes_on/1, slow_handshakes_are_dropped_on_time/1,
         an_unproven_address_gets_three_times_its_bytes/1, connections_are_limited_in_all/1,
         connections_of_an_address_are_limited/1, connections_of_an_address_in_a_second_are_limited/1,
         forged_packets_leave_half_to_the_address_they_name/1, limits_count_also_without_retry/1,
         handshakes_that_fail_give_their_places_back/1]).

-import(macula_quic_lab, [client_options/0, client_options/1, listen/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

connect(Port) ->
    connect(Port, #{}).

connect(Port, More) ->
    macula_quic:connect("127.0.0.1", Port, client_options(More), 10000).

from(Ip) ->
    #{local_address => Ip}.

handshakes(L) ->
    {ok, #{handshakes := N}} = macula_quic:info(L),
    N.

open(Ip) ->
    {ok, Socket} = gen_udp:open(0, [binary, {active, false}, {ip, Ip}]),
    Socket.

%% Begins a connection that nobody goes on with.
begin_one(Socket, Port) ->
    ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, macula_quic_lab:pinging_packet()).

%% Bits of a long header (RFC 9000, section 17.2).
kind(<<1:1, _:1, 0:2, _/bitstring>>) -> initial;
kind(<<1:1, _:1, 3:2, _/bitstring>>) -> retry;
kind(_) -> other.

%% What the listener answers to a beginning.
answer(Port) ->
    Socket = open({127, 0, 0, 1}),
    begin_one(Socket, Port),
    {ok, {_, _, Answer}} = gen_udp:recv(Socket, 0, 10000),
    ok = gen_udp:close(Socket),
    kind(Answer).

addresses_must_be_proven_from_half_of_the_handshakes_on(_Config) ->
    {L, Port} = listen(#{max_handshakes => 8, handshake_timeout_ms => 60000}),
    [begin
         ?assertEqual(initial, answer(Port)),
         macula_test_nodes:wait_until(fun() -> handshakes(L) =:= N end)
     end || N <- [1, 2, 3, 4]],
    %% The slot of the next one is the fifth.
    ?assertEqual(retry, answer(Port)),
    ?assertEqual(4, handshakes(L)),
    %% A client that does comes in.
    {ok, C} = connect(Port),
    {ok, _} = macula_quic:accept(L, 5000),
    [ok = macula_quic:close(X) || X <- [C, L]].

slow_handshakes_are_dropped_on_time(_Config) ->
    {L, Port} = listen(#{max_handshakes => 100, handshake_timeout_ms => 1000}),
    Socket = open({127, 0, 0, 1}),
    Packet = macula_quic_lab:pinging_packet(),
    ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, Packet),
    macula_test_nodes:wait_until(fun() -> handshakes(L) =:= 1 end),
    Begin = erlang:monotonic_time(millisecond),
    %% Whatever comes of it meanwhile.
    macula_test_nodes:wait_until(fun() ->
        ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, binary:part(Packet, 0, byte_size(Packet) - 1)),
        handshakes(L) =:= 0
    end),
    Took = erlang:monotonic_time(millisecond) - Begin,
    %% By default it is 10 s.
    ?assertMatch(_ when Took < 9000, Took),
    ?assertMatch({ok, #{accepted := 0}}, macula_quic:info(L)),
    [ok = gen_udp:close(Socket), ok = macula_quic:close(L)].

%% One datagram of a client arrives, and no other; what the server sends goes to nobody.
an_unproven_address_gets_three_times_its_bytes(_Config) ->
    %% A chain that is much longer than that.
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    [{_, Der, _}] = public_key:pem_decode(Cert),
    {L, Port} = listen(#{cert => lists:duplicate(40, Der), key => Key, initial_rtt_ms => 20,
                         handshake_timeout_ms => 2000}),
    Listening = open({127, 0, 0, 1}),
    {ok, Door} = inet:port(Listening),
    Towards = open({127, 0, 0, 1}),
    Dialler = spawn(fun() -> connect(Door) end),
    Firsts = [begin {ok, {_, _, Data}} = gen_udp:recv(Listening, 0, 10000), Data end || _ <- [1]],
    Sent = iolist_size(Firsts),
    [ok = gen_udp:send(Towards, {127, 0, 0, 1}, Port, Data) || Data <- Firsts],
    %% Until the server has given up, with all its probes.
    macula_test_nodes:wait_until(fun() -> handshakes(L) =:= 1 end),
    macula_test_nodes:wait_until(fun() -> handshakes(L) =:= 0 end),
    Answers = received(Towards),
    exit(Dialler, kill),
    ?assertMatch([_ | _], Answers),
    Got = iolist_size(Answers),
    ?assertMatch(_ when Got =< 3 * Sent, {Got, Sent}),
    [ok = gen_udp:close(Socket) || Socket <- [Listening, Towards]],
    ok = macula_quic:close(L).

received(Socket) ->
    case gen_udp:recv(Socket, 0, 0) of
        {ok, {_, _, Data}} -> [Data | received(Socket)];
        {error, timeout} -> []
    end.

connections_are_limited_in_all(_Config) ->
    {L, Port} = listen(#{max_connections => 3}),
    Held = [begin {ok, C} = connect(Port, from(Ip)), C end || Ip <- ["127.0.0.1", "127.0.0.2", "127.0.0.3"]],
    [?assertEqual({error, connection_refused}, connect(Port, from(Ip))) || Ip <- ["127.0.0.1", "127.0.0.4"]],
    ?assertMatch({ok, #{refused := 2, accepted := 3}}, macula_quic:info(L)),
    %% Those that are there live on, and each that ends makes room.
    [?assertEqual({ok, C}, macula_quic:handshake(C)) || C <- Held],
    ok = macula_quic:close(hd(Held)),
    macula_test_nodes:wait_until(fun() -> element(1, connect(Port)) =:= ok end),
    [ok = macula_quic:close(X) || X <- tl(Held) ++ [L]].

connections_of_an_address_are_limited(_Config) ->
    {L, Port} = listen(#{max_connections_per_address => 4}),
    Held = [begin {ok, C} = connect(Port), C end || _ <- [1, 2, 3, 4]],
    [?assertEqual({error, connection_refused}, connect(Port)) || _ <- [1, 2]],
    %% Of others there may be as many.
    Others = [begin {ok, C} = connect(Port, from("127.0.0.2")), C end || _ <- [1, 2, 3, 4]],
    ?assertEqual({error, connection_refused}, connect(Port, from("127.0.0.2"))),
    ok = macula_quic:close(hd(Held)),
    macula_test_nodes:wait_until(fun() -> element(1, connect(Port)) =:= ok end),
    ?assertEqual({error, connection_refused}, connect(Port, from("127.0.0.2"))),
    [ok = macula_quic:close(X) || X <- tl(Held) ++ Others ++ [L]].

connections_of_an_address_in_a_second_are_limited(_Config) ->
    {L, Port} = listen(#{connection_rate_per_address => 1, connection_burst_per_address => 10}),
    Begin = erlang:monotonic_time(millisecond),
    Results = [case connect(Port) of
                   {ok, C} -> ok = macula_quic:close(C), taken;
                   {error, connection_refused} -> refused
               end || _ <- lists:seq(1, 30)],
    Took = erlang:monotonic_time(millisecond) - Begin,
    Taken = length([taken || taken <- Results]),
    %% The burst, and one each second.
    ?assertMatch(_ when Taken >= 10, Taken),
    ?assertMatch(_ when Taken =< 11 + Took div 1000, {Taken, Took}),
    %% Another address has its own, and time gives this one some again.
    {ok, _} = connect(Port, from("127.0.0.2")),
    macula_test_nodes:wait_until(fun() -> element(1, connect(Port)) =:= ok end),
    ok = macula_quic:close(L).

%% Connections begun under somebody's address, who has never sent a packet.
forged_packets_leave_half_to_the_address_they_name(_Config) ->
    {L, Port} = listen(#{max_connections_per_address => 8, handshake_timeout_ms => 60000}),
    Forger = open({127, 0, 0, 6}),
    [begin_one(Forger, Port) || _ <- lists:seq(1, 50)],
    macula_test_nodes:wait_until(fun() -> handshakes(L) =:= 4 end),
    %% Whoever really has it still has the other half.
    Clients = [begin {ok, C} = connect(Port, from("127.0.0.6")), C end || _ <- [1, 2, 3, 4]],
    ?assertEqual({error, connection_refused}, connect(Port, from("127.0.0.6"))),
    ?assertEqual(4, handshakes(L)),
    [ok = macula_quic:close(X) || X <- Clients ++ [L]],
    ok = gen_udp:close(Forger).

limits_count_also_without_retry(_Config) ->
    {L, Port} = listen(#{max_connections_per_address => 2, retry => never}),
    Held = [begin {ok, C} = connect(Port), C end || _ <- [1, 2]],
    ?assertEqual({error, connection_refused}, connect(Port)),
    [ok = macula_quic:close(X) || X <- Held ++ [L]],
    {Always, AlwaysPort} = listen(#{max_connections_per_address => 2, retry => always}),
    Proven = [begin {ok, C} = connect(AlwaysPort), C end || _ <- [1, 2]],
    ?assertEqual({error, connection_refused}, connect(AlwaysPort)),
    [ok = macula_quic:close(X) || X <- Proven ++ [Always]].

handshakes_that_fail_give_their_places_back(_Config) ->
    {L, Port} = listen(#{max_connections => 4, handshake_timeout_ms => 3000, initial_rtt_ms => 10}),
    Socket = open({127, 0, 0, 1}),
    [begin_one(Socket, Port) || _ <- [1, 2, 3, 4]],
    macula_test_nodes:wait_until(fun() -> handshakes(L) =:= 4 end),
    ?assertEqual({error, connection_refused}, connect(Port)),
    %% And those that end in their first packet.
    [ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, macula_quic_lab:closing_packet()) || _ <- lists:seq(1, 20)],
    macula_test_nodes:wait_until(fun() -> element(1, connect(Port)) =:= ok end),
    ok = gen_udp:close(Socket),
    ok = macula_quic:close(L).
