%% Connections whose address changes: by a call, and by a NAT on the way.
-module(macula_quic_migration_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([a_client_moves_to_another_port/1, a_client_moves_with_streams_in_full_flow/1,
         others_of_the_endpoint_stay/1, a_client_moves_to_an_address_of_its_choice/1,
         a_client_that_has_chosen_its_address_moves/1, addresses_that_cannot_be_had/1,
         a_server_that_forbids_it_keeps_the_connection/1, no_way_back_keeps_the_connection/1,
         an_option_forbids_it/1, a_server_does_not_move/1, both_ends_are_told/1,
         a_caller_that_gives_up_leaves_the_connection/1, a_nat_forgets_with_streams_in_full_flow/1,
         a_nat_forgets_and_the_server_forbids_it/1, a_nat_forgets_a_client_that_waits_for_room/1,
         nothing_is_left_of_moves/1]).

-import(macula_quic_lab, [client_options/1, listen/1, pair/2, pair/3, through/2]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Data both ways on several streams, and what has become of it.
flow(#{client := C, server := S} = Pair, Bytes) ->
    Self = self(),
    Ways = [Ends || P <- [Pair, Pair#{client := S, server := C}], Ends <- [macula_quic_lab:stream(P) || _ <- [1, 2]]],
    [begin
         Data = crypto:strong_rand_bytes(Bytes),
         _ = spawn_link(fun() -> ok = macula_quic:send(From, Data, #{fin => true}) end),
         _ = spawn_link(fun() -> Self ! {arrived, To, crypto:hash(sha256, macula_quic_lab:read_to_end(To))} end),
         {To, crypto:hash(sha256, Data)}
     end || {From, To} <- Ways].

arrived(Flow) ->
    [?EXPECT({arrived, To, Hash}, ok, 120000) || {To, Hash} <- Flow],
    ok.

is_flowing(Flow) ->
    [] =:= [To || {To, _} <- Flow, {messages, Messages} <- [process_info(self(), messages)],
                  lists:keymember(To, 2, Messages)].

port_of({_, Port}) -> Port.

%% Both ways.
talks(Pair) ->
    arrived(flow(Pair, 1000)).

sees(Server, Address) ->
    macula_test_nodes:wait_until(fun() -> macula_quic:peername(Server) =:= {ok, Address} end).

a_client_moves_to_another_port(_Config) ->
    #{client := C, server := S} = Pair = pair(#{}, #{}),
    lists:foldl(fun(_, Before) ->
        {ok, {"127.0.0.1", Port} = Now} = macula_quic:migrate(C),
        ?assertNotEqual(port_of(Before), Port),
        ?assertEqual({ok, Now}, macula_quic:sockname(C)),
        sees(S, Now),
        talks(Pair),
        Now
    end, element(2, {ok, _} = macula_quic:sockname(C)), lists:seq(1, macula_quic_lab:times(5))).

a_client_moves_with_streams_in_full_flow(_Config) ->
    %% A narrow line, so that the data lasts longer than the moves.
    #{client := C, server := S, relay := Relay} = Pair = through(#{delay_ms => 5, rate => 4000000}, #{}),
    Flow = flow(Pair, 4 * 1024 * 1024),
    [{ok, _} = macula_quic:migrate(C) || _ <- lists:seq(1, 4)],
    ?assert(is_flowing(Flow)),
    arrived(Flow),
    #{clients := Clients} = macula_relay:stats(Relay),
    ?assertEqual(5, Clients),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

others_of_the_endpoint_stay(_Config) ->
    {L, Port} = listen(#{}),
    %% A server that would lose whoever moves.
    {Strict, StrictPort} = listen(#{migration_enabled => false}),
    [Moving, Beside] = [pair(L, Port, #{}) || _ <- [1, 2]],
    Strange = pair(Strict, StrictPort, #{}),
    Others = [Beside, Strange],
    Before = [{macula_quic:sockname(C), macula_quic:peername(S)} || #{client := C, server := S} <- Others],
    Flows = [flow(Pair, 2 * 1024 * 1024) || Pair <- [Moving | Others]],
    [{ok, _} = macula_quic:migrate(maps:get(client, Moving)) || _ <- lists:seq(1, 5)],
    [arrived(Flow) || Flow <- Flows],
    ?assertEqual(Before, [{macula_quic:sockname(C), macula_quic:peername(S)} || #{client := C, server := S} <- Others]),
    [talks(Pair) || Pair <- [Moving | Others]],
    %% Those that come later, too.
    talks(pair(L, Port, #{})).

a_client_moves_to_an_address_of_its_choice(_Config) ->
    #{client := C, server := S} = Pair = pair(#{}, #{}),
    [begin
         Free = macula_test_nodes:free_udp_port(),
         {ok, {Ip, Port} = Now} = macula_quic:migrate(C, Spell(Ip, Free)),
         ?assert(Port =:= Free orelse Port > 0),
         sees(S, Now),
         ?assertEqual({ok, Now}, macula_quic:sockname(C)),
         talks(Pair)
     end || {Ip, Spell} <- [{"127.0.0.2", fun(Ip, Port) -> {Ip, Port} end},
                            {"127.0.0.3", fun(Ip, Port) -> Ip ++ ":" ++ integer_to_list(Port) end},
                            {"127.0.0.1", fun(_, _) -> <<"127.0.0.1">> end},
                            {"127.0.0.4", fun(_, _) -> {{127, 0, 0, 4}, 0} end}]].

a_client_that_has_chosen_its_address_moves(_Config) ->
    #{client := C, server := S} = Pair = pair(#{}, #{local_address => "127.0.0.5:0"}),
    {ok, {"127.0.0.5", Before}} = macula_quic:sockname(C),
    {ok, {"127.0.0.5", Port} = Now} = macula_quic:migrate(C),
    ?assertNotEqual(Before, Port),
    sees(S, Now),
    talks(Pair),
    %% With larger packets than the endpoint that others share.
    Large = #{client := C2} = pair(#{maximum_mtu => 9000}, #{maximum_mtu => 9000}),
    Flow = flow(Large, 1024 * 1024),
    {ok, _} = macula_quic:migrate(C2),
    arrived(Flow).

addresses_that_cannot_be_had(_Config) ->
    #{client := C, port := Port} = Pair = pair(#{}, #{}),
    {ok, Before} = macula_quic:sockname(C),
    [?assertEqual({Local, {error, Why}}, {Local, macula_quic:migrate(C, Local)})
     || {Local, Why} <- [{{"127.0.0.1", Port}, eaddrinuse}, {"192.0.2.1", eaddrnotavail}, {"::1", eafnosupport},
                         {x, {bad_option, local_address, {wanted, local_address}}},
                         {{"127.0.0.1", 65536}, {bad_option, local_address, {wanted, local_address}}}]],
    ?assertEqual({ok, Before}, macula_quic:sockname(C)),
    talks(Pair),
    [?assertEqual({error, badarg}, macula_quic:migrate(X)) || X <- [make_ref(), self(), maps:get(listener, Pair)]],
    ok = macula_quic:close(C),
    ?EXPECT({quic, closed, C, normal}),
    ?assertEqual({error, closed}, macula_quic:migrate(C)).

a_server_that_forbids_it_keeps_the_connection(_Config) ->
    #{client := C, server := S} = Pair = pair(#{migration_enabled => 0}, #{}),
    {ok, Before} = macula_quic:sockname(C),
    Flow = flow(Pair, 8 * 1024 * 1024),
    ?assertEqual({error, timeout}, macula_quic:migrate(C)),
    arrived(Flow),
    talks(Pair),
    ?assertEqual([{ok, Before}, {ok, Before}], [macula_quic:sockname(C), macula_quic:peername(S)]).

%% The relay is the way; it drops what comes from an address it does not know.
no_way_back_keeps_the_connection(_Config) ->
    #{client := C, relay := Relay} = Pair = through(#{}, #{}),
    {ok, Before} = macula_quic:sockname(C),
    ok = macula_relay:set(Relay, #{blackhole => true}),
    ?assertEqual({error, timeout}, macula_quic:migrate(C)),
    ok = macula_relay:set(Relay, #{blackhole => false}),
    ?assertEqual({ok, Before}, macula_quic:sockname(C)),
    talks(Pair),
    {ok, After} = macula_quic:migrate(C),
    ?assertNotEqual(Before, After),
    talks(Pair).

an_option_forbids_it(_Config) ->
    [begin
         #{client := C} = Pair = pair(#{}, #{migration_enabled => Off}),
         ?assertEqual({error, disabled}, macula_quic:migrate(C)),
         ?assertEqual({error, disabled}, macula_quic:migrate(C, "127.0.0.2")),
         talks(Pair)
     end || Off <- [false, 0]].

a_server_does_not_move(_Config) ->
    #{server := S} = Pair = pair(#{}, #{}),
    ?assertEqual({error, not_a_client}, macula_quic:migrate(S)),
    ?assertMatch("the server" ++ _, macula_quic:format_error(not_a_client)),
    talks(Pair).

both_ends_are_told(_Config) ->
    #{client := C, server := S} = pair(#{}, #{}),
    [ok = macula_quic:tell_changes(X, 10) || X <- [C, S]],
    [?EXPECT({quic, dgram_state_changed, X, _}) || X <- [C, S]],
    {ok, Now} = macula_quic:migrate(C),
    ?EXPECT({quic, local_address_changed, C, Now}),
    ?EXPECT({quic, peer_address_changed, S, Now}),
    ?NOTHING({quic, peer_address_changed, C, _}),
    ?NOTHING({quic, local_address_changed, S, _}).

a_caller_that_gives_up_leaves_the_connection(_Config) ->
    #{client := C} = Pair = pair(#{migration_enabled => false}, #{}),
    {Pid, Ref} = spawn_monitor(fun() -> macula_quic:migrate(C) end),
    macula_test_nodes:wait_until(fun() -> process_info(Pid, status) =:= {status, waiting} end),
    exit(Pid, kill),
    ?EXPECT({'DOWN', Ref, process, Pid, killed}),
    talks(Pair).

a_nat_forgets_with_streams_in_full_flow(_Config) ->
    #{client := C, server := S, relay := Relay} = Pair = through(#{delay_ms => 5, rate => 4000000}, #{}),
    ok = macula_quic:tell_changes(S, 10),
    ?EXPECT({quic, dgram_state_changed, S, _}),
    Flow = flow(Pair, 4 * 1024 * 1024),
    [begin
         ok = macula_relay:rebind(Relay),
         ?EXPECT({quic, peer_address_changed, S, New}, ?assertEqual({ok, New}, macula_quic:peername(S)))
     end || _ <- [1, 2, 3]],
    ?assert(is_flowing(Flow)),
    arrived(Flow),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

%% The server tells of the room to where the client was, and that one has nothing under way.
a_nat_forgets_a_client_that_waits_for_room(_Config) ->
    #{relay := Relay} = Pair = through(#{}, #{}),
    {From, To} = macula_quic_lab:stream(Pair),
    Data = crypto:strong_rand_bytes(32 bsl 20),
    _ = spawn_link(fun() -> ok = macula_quic:send(From, Data, #{fin => true}) end),
    quiet(Relay, none),
    ok = macula_relay:rebind(Relay),
    ?assert(Data =:= macula_quic_lab:read_to_end(To)).

%% All that may be sent has been, and is acknowledged.
quiet(Relay, Before) ->
    case macula_relay:stats(Relay) of
        Before -> ok;
        Now -> receive after 500 -> quiet(Relay, Now) end
    end.

a_nat_forgets_and_the_server_forbids_it(_Config) ->
    Options = #{idle_timeout_ms => 1000},
    #{server := S, client := C, relay := Relay} = Pair =
        through(#{}, Options#{migration_enabled => false, keep_alive_interval_ms => 100}),
    talks(Pair),
    ok = macula_relay:rebind(Relay),
    ?EXPECT({quic, transport_shutdown, S, timeout}),
    %% A packet of the client after that meets a server without this connection, which answers with a
    %% stateless reset.
    Reason = ?EXPECT({quic, transport_shutdown, C, Why}, Why),
    ?assert(lists:member(Reason, [timeout, reset])).

nothing_is_left_of_moves(_Config) ->
    Fds = fun() -> {ok, Names} = file:list_dir("/proc/self/fd"), length(Names) end,
    %% What all share is there.
    {ok, _} = macula_quic_lab:in_process(fun() -> macula_quic:migrate(maps:get(client, pair(#{}, #{}))) end),
    macula_quic_lab:drained(),
    Before = Fds(),
    %% Handles of connections that are over keep sockets, which are bound to nothing.
    During = macula_quic_lab:in_process(fun() ->
        Pairs = [begin
                     #{client := C} = Pair = pair(#{}, #{}),
                     [{ok, _} = macula_quic:migrate(C) || _ <- [1, 2, 3]],
                     Pair
                 end || _ <- lists:seq(1, 5)],
        Open = Fds(),
        [macula_quic_lab:close(Pair) || Pair <- Pairs],
        Open
    end),
    ?assert(During > Before),
    macula_test_nodes:wait_until(fun() -> Fds() =< Before end, 30000).
