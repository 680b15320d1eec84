%% Programs that were written for the first macula_quic, or for quicer, find what they look for.
-module(macula_quic_original_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([handshake_gives_the_connection/1, new_conn_has_remote_addr/1, verify_webpki_is_verify_peer/1,
         an_empty_verify_pubkey_pins_nothing/1, alpn_takes_atoms/1, both_sizes_of_a_path_are_told/1,
         getstat_has_the_counters_of_inet/1, a_stale_handle_is_closed/1,
         data_and_streams_come_with_flags/1]).

-import(macula_quic_lab, [client_options/1, listen/0, listen/1, pair/0, pair/2, stream/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

handshake_gives_the_connection(_Config) ->
    #{client := C, server := S} = pair(),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]],
    ok = macula_quic:close(C),
    ?EXPECT({quic, shutdown, S, _}),
    [?assertMatch({error, _}, macula_quic:handshake(X)) || X <- [C, S]].

new_conn_has_remote_addr(_Config) ->
    [begin
         {ok, L} = macula_quic:listen(Address, 0, macula_quic_lab:server_options()),
         {ok, {_, Port}} = macula_quic:sockname(L),
         ok = macula_quic:async_accept(L),
         {ok, C} = macula_quic:connect(To, Port, client_options(#{}), 5000),
         {ok, {Ip, FromPort}} = macula_quic:sockname(C),
         Text = iolist_to_binary([Before, Ip, After, ":", integer_to_list(FromPort)]),
         ?EXPECT({quic, new_conn, _, #{remote_addr := Text, peername := {Ip, FromPort}}}),
         ok = macula_quic:close(C),
         ok = macula_quic:close(L)
     end || {Address, To, Before, After} <- [{"127.0.0.1", "127.0.0.1", "", ""}, {"::1", "::1", "[", "]"},
                                             %% One socket for both families.
                                             {"::", "127.0.0.1", "", ""}]].

%% Against the roots of the platform, or those that are given.
verify_webpki_is_verify_peer(_Config) ->
    {L, Port} = listen(),
    Connect = fun(Options) -> macula_quic:connect("127.0.0.1", Port, Options, 5000) end,
    ?assertMatch({error, {bad_cert, _}}, Connect([{alpn, ["test"]}, {verify, webpki}])),
    ?assertMatch({ok, _}, Connect(client_options(#{verify => webpki}))),
    ok = macula_quic:close(L).

an_empty_verify_pubkey_pins_nothing(_Config) ->
    {L, Port} = listen(),
    Connect = fun(Options) -> macula_quic:connect("127.0.0.1", Port, Options, 5000) end,
    ?assertMatch({ok, _}, Connect(client_options(#{verify_pubkey => <<>>}))),
    %% Nor does it switch off what is verified otherwise.
    ?assertMatch({error, {bad_cert, _}}, Connect([{alpn, ["test"]}, {verify_pubkey, <<>>}])),
    ok = macula_quic:close(L).

alpn_takes_atoms(_Config) ->
    [begin
         #{client := C, server := S} = Pair = pair(#{alpn => Server}, #{alpn => Client}),
         [?assertEqual({ok, <<"test">>}, macula_quic:negotiated_protocol(X)) || X <- [C, S]],
         macula_quic_lab:close(Pair)
     end || {Server, Client} <- [{[test], ["test"]}, {<<"test">>, [other, test]}, {test, test},
                                 {[first, <<"test">>], test}]].

both_sizes_of_a_path_are_told(_Config) ->
    #{client := C} = pair(#{}, #{maximum_mtu => 1400}),
    {ok, Mtu} = macula_quic:path_mtu(C),
    ?assert(Mtu >= 1200 andalso Mtu =< 1400),
    %% The path is probed meanwhile.
    macula_test_nodes:wait_until(fun() -> macula_quic:path_mtu(C) =:= {ok, 1400} end),
    {ok, Datagram} = macula_quic:max_datagram_size(C),
    ?assert(Datagram < 1400 andalso Datagram > 1300),
    ?assertEqual({ok, [{mtu, 1400}]}, macula_quic:getstat(C, [mtu])),
    %% Without datagrams there is still a path.
    #{client := C2} = pair(#{datagram_receive_enabled => false}, #{}),
    ?assertEqual({error, no_path_mtu}, macula_quic:max_datagram_size(C2)),
    ?assertMatch({ok, N} when N >= 1200, macula_quic:path_mtu(C2)),
    ?assertEqual({error, badarg}, macula_quic:path_mtu(make_ref())).

getstat_has_the_counters_of_inet(_Config) ->
    #{client := C} = Pair = pair(),
    {Here, There} = stream(Pair),
    ok = macula_quic:send(Here, binary:copy(<<1>>, 100000)),
    ok = macula_quic_lab:read(There, 100000),
    {ok, Socket} = gen_udp:open(0),
    {ok, Inet} = inet:getstat(Socket),
    ok = gen_udp:close(Socket),
    Names = [Name || {Name, _} <- Inet],
    ?assert(length(Names) >= 10),
    {ok, Stats} = macula_quic:getstat(C, Names),
    ?assertEqual(Names, [Name || {Name, N} <- Stats, is_integer(N), N >= 0]),
    #{send_oct := Octets, send_cnt := Count, send_avg := Mean, recv_avg := Received} =
        maps:from_list(Stats),
    ?assert(Octets > 100000),
    ?assertEqual(Octets div Count, Mean),
    ?assert(Received > 0),
    {ok, All} = macula_quic:getstat(C),
    ?assertEqual([], Names -- [Name || {Name, _} <- All]).

a_stale_handle_is_closed(_Config) ->
    Self = self(),
    Maker = fun() ->
        #{listener := L, client := C} = Pair = macula_quic_lab:loose_pair(),
        {Here, _} = macula_quic_lab:loose_stream(Pair),
        Self ! {made, term_to_binary([L, C, Here])}
    end,
    {Pid, Ref} = spawn_monitor(Maker),
    Binary = receive {made, B} -> B end,
    receive {'DOWN', Ref, process, Pid, normal} -> ok end,
    macula_test_nodes:wait_until(fun() ->
        lists:all(fun(Handle) -> macula_quic:info(Handle) =:= {error, badarg} end, binary_to_term(Binary))
    end),
    [?assertEqual(ok, macula_quic:close(Handle)) || Handle <- binary_to_term(Binary)],
    [?assertEqual({error, badarg}, macula_quic:close(What)) || What <- [self(), undefined, "ref", 1]].

data_and_streams_come_with_flags(_Config) ->
    #{client := C, server := S} = pair(),
    ok = macula_quic:async_accept_stream(S, #{active => true}),
    [begin
         {ok, Here} = macula_quic:open_stream(C, #{direction => Direction}),
         ok = macula_quic:send(Here, <<"abc">>, #{fin => true}),
         There = ?EXPECT({quic, new_stream, Stream, #{conn := S, flags := Flags}}, Stream),
         ?EXPECT({quic, <<"abc">>, There, #{absolute_offset := 0, len := 3, flags := 0}})
     end || {Direction, Flags} <- [{bidirectional, 0}, {unidirectional, 1}]].
