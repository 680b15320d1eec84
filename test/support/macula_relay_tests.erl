%% The relay is the network of all other tests: what it promises is checked on plain UDP.
-module(macula_relay_tests).

-include_lib("eunit/include/eunit.hrl").

-define(LOCAL, {127, 0, 0, 1}).

carries_both_ways_test() ->
    with_relay(#{}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, <<"ping">>),
        {Port, <<"ping">>} = recv(Server),
        ok = gen_udp:send(Server, ?LOCAL, Port, <<"pong">>),
        {_, <<"pong">>} = recv(Client),
        #{up := #{forwarded := 1, bytes := 4}, down := #{forwarded := 1}, clients := 1} =
            macula_relay:stats(Relay)
    end).

carries_the_largest_datagram_test() ->
    with_relay(#{}, fun(Relay, Client, Server) ->
        Data = rand:bytes(65507),
        ok = to(Client, Relay, Data),
        {Port, Data} = recv(Server),
        ok = gen_udp:send(Server, ?LOCAL, Port, Data),
        {_, Data} = recv(Client)
    end).

keeps_clients_apart_test() ->
    with_relay(#{}, fun(Relay, Client1, Server) ->
        {ok, Client2} = socket(),
        ok = to(Client1, Relay, <<"1">>),
        {Port1, <<"1">>} = recv(Server),
        ok = to(Client2, Relay, <<"2">>),
        {Port2, <<"2">>} = recv(Server),
        ?assertNotEqual(Port1, Port2),
        ok = gen_udp:send(Server, ?LOCAL, Port2, <<"b">>),
        ok = gen_udp:send(Server, ?LOCAL, Port1, <<"a">>),
        {_, <<"a">>} = recv(Client1),
        {_, <<"b">>} = recv(Client2),
        ok = gen_udp:close(Client2)
    end).

loses_the_share_asked_for_test() ->
    with_relay(#{loss => 0.2, seed => 1}, fun(Relay, Client, _Server) ->
        %% By hundreds: the kernel keeps only so many for a relay that waits for its turn.
        _ = [begin
                 _ = [ok = to(Client, Relay, <<N:32>>) || N <- lists:seq(1, 100)],
                 await_received(Relay, Hundreds * 100)
             end || Hundreds <- lists:seq(1, 20)],
        #{up := #{lost := Lost, forwarded := Forwarded}} = await_received(Relay, 2000),
        ?assertEqual(2000, Lost + Forwarded),
        ?assert(Lost > 300 andalso Lost < 500)
    end).

same_seed_loses_the_same_test() ->
    Lost = fun(Seed) ->
        with_relay(#{loss => 0.5, seed => Seed}, fun(Relay, Client, Server) ->
            _ = [ok = to(Client, Relay, <<N:32>>) || N <- lists:seq(1, 64)],
            _ = await_received(Relay, 64),
            drain(Server)
        end)
    end,
    ?assertEqual(Lost(7), Lost(7)),
    ?assertNotEqual(Lost(7), Lost(8)).

loses_in_one_direction_only_test() ->
    with_relay(#{down => #{loss => 1}}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, <<"ping">>),
        {Port, <<"ping">>} = recv(Server),
        ok = gen_udp:send(Server, ?LOCAL, Port, <<"pong">>),
        #{down := #{lost := 1}} = await_received(Relay, down, 1),
        [] = drain(Client)
    end).

delays_and_keeps_order_test() ->
    with_relay(#{delay_ms => 40}, fun(Relay, Client, Server) ->
        Start = erlang:monotonic_time(millisecond),
        _ = [ok = to(Client, Relay, <<N:32>>) || N <- lists:seq(1, 100)],
        {Port, <<1:32>>} = recv(Server),
        ?assert(erlang:monotonic_time(millisecond) - Start >= 39),
        %% Less delay from now on must not overtake what waits.
        ok = macula_relay:set(Relay, #{delay_ms => 0}),
        ok = to(Client, Relay, <<101:32>>),
        _ = [{Port, <<N:32>>} = recv(Server) || N <- lists:seq(2, 101)]
    end).

%% Each datagram takes between 20 and 60 ms, by itself: some come before earlier ones, all of them come.
jitter_lets_datagrams_overtake_test() ->
    with_relay(#{delay_ms => 20, jitter_ms => 40, seed => 5}, fun(Relay, Client, Server) ->
        Sent = lists:seq(1, 200),
        Start = erlang:monotonic_time(millisecond),
        _ = [ok = to(Client, Relay, <<N:32>>) || N <- Sent],
        {_, <<First:32>>} = recv(Server),
        ?assert(erlang:monotonic_time(millisecond) - Start >= 19),
        Got = [First | [begin {_, <<N:32>>} = recv(Server), N end || _ <- tl(Sent)]],
        ?assertNotEqual(Sent, Got),
        ?assertEqual(Sent, lists:sort(Got)),
        %% Of all neighbours nearly half have changed places.
        Overtaken = length([x || {A, B} <- lists:zip(lists:droplast(Got), tl(Got)), A > B]),
        ?assert(Overtaken > 60, Overtaken)
    end).

%% What is due earlier goes in its time, though the relay waits for a later one already.
jitter_takes_no_longer_than_it_says_test() ->
    with_relay(#{jitter_ms => 1000, seed => 11}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, <<"late">>),
        _ = await_received(Relay, 1),
        ok = macula_relay:set(Relay, #{jitter_ms => 1}),
        ok = to(Client, Relay, <<"early">>),
        {_, <<"early">>} = recv(Server),
        #{up := #{forwarded := 1}} = macula_relay:stats(Relay),
        {_, <<"late">>} = recv(Server)
    end).

doubles_the_share_asked_for_test() ->
    with_relay(#{duplicate => 0.2, seed => 1}, fun(Relay, Client, Server) ->
        Got = [begin
                   _ = [ok = to(Client, Relay, <<N:32>>) || N <- lists:seq(1, 100)],
                   #{up := #{forwarded := Forwarded}} = await_received(Relay, Hundreds * 100),
                   {Forwarded, drain(Server)}
               end || Hundreds <- lists:seq(1, 20)],
        #{up := #{received := 2000, duplicated := Twice, forwarded := Forwarded}} = macula_relay:stats(Relay),
        ?assertEqual(2000 + Twice, Forwarded),
        ?assert(Twice > 300 andalso Twice < 500, Twice),
        ?assertEqual(Forwarded, length(lists:append([Data || {_, Data} <- Got])))
    end).

doubles_each_datagram_once_test() ->
    with_relay(#{up => #{duplicate => 1, jitter_ms => 10}}, fun(Relay, Client, Server) ->
        _ = [ok = to(Client, Relay, <<N:32>>) || N <- lists:seq(1, 50)],
        Got = [begin {_, <<N:32>>} = recv(Server), N end || _ <- lists:seq(1, 100)],
        ?assertEqual(lists:sort(lists:seq(1, 50) ++ lists:seq(1, 50)), lists:sort(Got))
    end).

same_seed_doubles_and_reorders_the_same_test() ->
    Got = fun(Seed) ->
        with_relay(#{duplicate => 0.5, jitter_ms => 300, seed => Seed}, fun(Relay, Client, Server) ->
            _ = [ok = to(Client, Relay, <<N>>) || N <- lists:seq(1, 4)],
            #{up := #{duplicated := Twice}} = await_received(Relay, 4),
            [begin {_, <<N>>} = recv(Server), N end || _ <- lists:seq(1, 4 + Twice)]
        end)
    end,
    %% Of both seeds each datagram is due at least 42 ms before the next.
    ?assertEqual([3, 2, 4, 1, 1], Got(58)),
    ?assertEqual([1, 4, 3, 2], Got(114)).

throttles_and_drops_the_tail_test() ->
    %% 100,000 bytes/s and room for 10,000: of 50 kB sent at once about 11 datagrams survive.
    with_relay(#{rate => 100000, queue => 10000}, fun(Relay, Client, Server) ->
        Start = erlang:monotonic_time(millisecond),
        _ = [ok = to(Client, Relay, <<N:8000>>) || N <- lists:seq(1, 50)],
        #{up := #{queue_dropped := Dropped}} = await_received(Relay, 50),
        %% Each 10 ms that they took to come there was room for one more.
        Spent = erlang:monotonic_time(millisecond) - Start,
        ?assert(Dropped >= 37 - Spent div 10 andalso Dropped =< 40),
        Got = [recv(Server) || _ <- lists:seq(1, 50 - Dropped)],
        Took = erlang:monotonic_time(millisecond) - Start,
        ?assertEqual(50 - Dropped, length(Got)),
        ?assert(Took >= (50 - Dropped) * 10 - 1)
    end).

larger_ones_than_asked_for_vanish_test() ->
    with_relay(#{up => #{largest => 100}}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, rand:bytes(101)),
        ok = to(Client, Relay, <<0:800>>),
        {Port, <<0:800>>} = recv(Server),
        #{up := #{lost := 1, forwarded := 1}} = await_received(Relay, 2),
        ok = gen_udp:send(Server, ?LOCAL, Port, <<1:808>>),
        {_, <<1:808>>} = recv(Client)
    end).

blackhole_swallows_what_is_under_way_test() ->
    with_relay(#{delay_ms => 50}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, <<"1">>),
        _ = await_received(Relay, 1),
        ok = macula_relay:set(Relay, #{blackhole => true}),
        ok = to(Client, Relay, <<"2">>),
        macula_test_nodes:wait_until(fun() ->
            #{up := #{blackholed := N}} = macula_relay:stats(Relay),
            N =:= 2
        end),
        [] = drain(Server),
        ok = macula_relay:set(Relay, #{blackhole => false, delay_ms => 0}),
        ok = to(Client, Relay, <<"3">>),
        {_, <<"3">>} = recv(Server)
    end).

rebind_changes_the_port_seen_test() ->
    with_relay(#{}, fun(Relay, Client, Server) ->
        ok = to(Client, Relay, <<"1">>),
        {Port1, <<"1">>} = recv(Server),
        ok = macula_relay:rebind(Relay),
        ok = to(Client, Relay, <<"2">>),
        {Port2, <<"2">>} = recv(Server),
        ?assertNotEqual(Port1, Port2),
        ok = gen_udp:send(Server, ?LOCAL, Port1, <<"lost">>),
        ok = gen_udp:send(Server, ?LOCAL, Port2, <<"found">>),
        {_, <<"found">>} = recv(Client)
    end).

serves_ipv6_test() ->
    case gen_udp:open(0, [inet6, binary, {active, false}, {ip, {0, 0, 0, 0, 0, 0, 0, 1}}]) of
        {ok, Server} ->
            {ok, Port} = inet:port(Server),
            Local = {0, 0, 0, 0, 0, 0, 0, 1},
            {ok, Relay} = macula_relay:start_link(#{target => {Local, Port}}),
            {ok, Client} = gen_udp:open(0, [inet6, binary, {active, false}, {ip, Local}]),
            ok = gen_udp:send(Client, Local, macula_relay:port(Relay), <<"six">>),
            {ok, {_, _, <<"six">>}} = gen_udp:recv(Server, 0, 5000),
            ok = macula_relay:stop(Relay);
        {error, _NoIpv6Here} ->
            ok
    end.

says_what_is_wrong_test() ->
    Target = {?LOCAL, 1},
    {error, {bad_option, target, missing}} = macula_relay:start_link(#{}),
    {error, {bad_option, loss, 1.5}} = macula_relay:start_link(#{target => Target, loss => 1.5}),
    {error, {bad_option, duplicate, -1}} = macula_relay:start_link(#{target => Target, duplicate => -1}),
    {error, {bad_option, jitter_ms, 0.5}} = macula_relay:start_link(#{target => Target, jitter_ms => 0.5}),
    {error, {bad_option, lose, 1}} = macula_relay:start_link(#{target => Target, lose => 1}),
    {error, {bad_option, target, {_, 0}}} = macula_relay:start_link(#{target => {?LOCAL, 0}}),
    {ok, Relay} = macula_relay:start_link(#{target => Target}),
    {error, {bad_option, seed, 1}} = macula_relay:set(Relay, #{seed => 1}),
    ok = macula_relay:stop(Relay).

%% Fast enough not to be what a test of throughput measures.
passes_a_hundred_megabytes_a_second_test_() ->
    {timeout, 30, fun() ->
        with_relay(#{}, fun(Relay, Client, Server) ->
            Data = rand:bytes(16000),
            Start = erlang:monotonic_time(microsecond),
            _ = [begin
                     ok = to(Client, Relay, Data),
                     {_, Data} = recv(Server)
                 end || _ <- lists:seq(1, 5000)],
            Seconds = (erlang:monotonic_time(microsecond) - Start) / 1.0e6,
            ?debugFmt("relay: ~b MB/s one datagram at a time", [round(80 / Seconds)]),
            ?assert(Seconds < 10)
        end)
    end}.

%% Helpers

with_relay(Options, Fun) ->
    {ok, Server} = socket(),
    {ok, Client} = socket(),
    {ok, Port} = inet:port(Server),
    {ok, Relay} = macula_relay:start_link(Options#{target => {?LOCAL, Port}}),
    try
        Fun(Relay, Client, Server)
    after
        ok = macula_relay:stop(Relay),
        ok = gen_udp:close(Client),
        ok = gen_udp:close(Server)
    end.

socket() ->
    gen_udp:open(0, [binary, {active, false}, {ip, ?LOCAL}, {recbuf, 4000000}, {buffer, 65536}]).

to(Socket, Relay, Data) ->
    gen_udp:send(Socket, ?LOCAL, macula_relay:port(Relay), Data).

recv(Socket) ->
    {ok, {_, Port, Data}} = gen_udp:recv(Socket, 0, 5000),
    {Port, Data}.

drain(Socket) ->
    case gen_udp:recv(Socket, 0, 0) of
        {ok, {_, _, Data}} -> [Data | drain(Socket)];
        {error, timeout} -> []
    end.

await_received(Relay, N) ->
    await_received(Relay, up, N).

await_received(Relay, Direction, N) ->
    macula_test_nodes:wait_until(fun() ->
        Stats = macula_relay:stats(Relay),
        #{Direction := #{received := Received}} = Stats,
        Received >= N andalso {value, Stats}
    end).
