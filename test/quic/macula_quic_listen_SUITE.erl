%% Listening: addresses and ports, and the errors of the system.
-module(macula_quic_listen_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([port_0_takes_a_free_port/1, every_spelling_of_an_address/1, all_addresses_serve_both_families/1,
         ipv6_addresses_serve_ipv6_alone/1, a_taken_port_is_eaddrinuse/1,
         a_port_taken_by_another_program_is_eaddrinuse/1, a_foreign_address_is_eaddrnotavail/1,
         a_privileged_port_is_eacces/1, wrong_ports_are_refused/1, wrong_addresses_are_refused/1,
         a_listener_needs_a_certificate/1, unknown_options_are_refused/1,
         a_closed_listener_frees_its_port/1, a_half_open_handshake_does_not_hold_the_port/1,
         a_connection_that_ends_in_its_first_packet_is_not_kept/1,
         closing_leaves_connections_alone/1, relisten_beside_live_connections/1,
         close_twice_is_ok/1, a_closed_listener_accepts_nothing/1, the_owners_death_frees_the_port/1,
         listener_info/1, handles_of_ended_connections_hold_no_port/1,
         the_port_is_free_once_its_last_connection_is_gone/1,
         version_1_alone_is_spoken/1, link_local_addresses_keep_their_link/1,
         a_wrong_link_is_told/1]).
%% Called in another VM.
-export([on_links/0]).

-import(macula_quic_lab, [server_options/0, server_options/1, client_options/0, listen/0, pair/0,
                          pair/3]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

port_0_takes_a_free_port(_Config) ->
    Ports = [begin
                 {ok, L} = macula_quic:listen("127.0.0.1", 0, server_options()),
                 {ok, {"127.0.0.1", Port}} = macula_quic:sockname(L),
                 Port
             end || _ <- lists:seq(1, 5)],
    ?assert(lists:all(fun(P) -> P > 0 andalso P < 65536 end, Ports)),
    ?assertEqual(5, length(lists:usort(Ports))).

every_spelling_of_an_address(_Config) ->
    [begin
         {ok, L} = macula_quic:listen(Address, 0, server_options()),
         ?assertMatch({ok, {Text, _}}, macula_quic:sockname(L)),
         {ok, L2} = macula_quic:listen({Address, 0}, server_options()),
         ?assertMatch({ok, {Text, _}}, macula_quic:sockname(L2))
     end || {Address, Text} <- [{"127.0.0.1", "127.0.0.1"}, {<<"127.0.0.2">>, "127.0.0.2"},
                                {{127, 0, 0, 1}, "127.0.0.1"}, {"::1", "::1"}, {<<"[::1]">>, "::1"},
                                {{0, 0, 0, 0, 0, 0, 0, 1}, "::1"}, {"0.0.0.0", "0.0.0.0"},
                                {"::", "::"}]],
    {ok, L} = macula_quic:listen(0, maps:to_list(server_options())),
    ?assertMatch({ok, {"::", _}}, macula_quic:sockname(L)).

all_addresses_serve_both_families(_Config) ->
    [begin
         {ok, L} = Listen(),
         {ok, {_, Port}} = macula_quic:sockname(L),
         [begin
              {ok, C} = macula_quic:connect(Host, Port, client_options(), 5000),
              {ok, S} = macula_quic:accept(L, 5000),
              ?assertMatch({ok, {Host, _}}, macula_quic:peername(S)),
              ?assertEqual({ok, {Host, Port}}, macula_quic:peername(C)),
              %% The address the client reached, not the wildcard.
              ?assertEqual({ok, {Host, Port}}, macula_quic:sockname(S))
          end || Host <- ["127.0.0.1", "::1"]]
     end || Listen <- [fun() -> macula_quic:listen(0, server_options()) end,
                       fun() -> macula_quic:listen("::", 0, server_options()) end]].

ipv6_addresses_serve_ipv6_alone(_Config) ->
    {ok, L} = macula_quic:listen("::1", 0, server_options()),
    {ok, {_, Port}} = macula_quic:sockname(L),
    {ok, _} = macula_quic:connect("::1", Port, client_options(), 5000),
    {ok, Other} = gen_udp:open(Port, [inet, {ip, {127, 0, 0, 1}}]),
    ok = gen_udp:close(Other),
    ok = macula_quic:close(L).

a_taken_port_is_eaddrinuse(_Config) ->
    {L, Port} = listen(),
    ?assertEqual({error, eaddrinuse}, macula_quic:listen("127.0.0.1", Port, server_options())),
    %% The first one did not suffer.
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    {ok, S} = macula_quic:accept(L, 5000),
    ?assertEqual([{ok, C}, {ok, S}], [macula_quic:handshake(X) || X <- [C, S]]).

a_port_taken_by_another_program_is_eaddrinuse(_Config) ->
    {ok, Socket} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
    {ok, Port} = inet:port(Socket),
    ?assertEqual({error, eaddrinuse}, macula_quic:listen("127.0.0.1", Port, server_options())).

a_foreign_address_is_eaddrnotavail(_Config) ->
    %% From the blocks for documentation, RFC 5737 and RFC 3849.
    [?assertEqual({error, eaddrnotavail}, macula_quic:listen(Address, 0, server_options()))
     || Address <- ["192.0.2.1", "2001:db8::1"]].

a_privileged_port_is_eacces(_Config) ->
    case file:read_file("/proc/sys/net/ipv4/ip_unprivileged_port_start") of
        {ok, <<"0\n">>} -> {skip, "every port is open to everybody here"};
        _ -> privileged_port(os:cmd("id -u"))
    end.

privileged_port("0\n") ->
    %% In a node of a nobody, where that can be had.
    case os:find_executable("setpriv") of
        false ->
            {skip, "no setpriv"};
        SetPriv ->
            Erl = filename:join([code:root_dir(), "bin", "erl"]),
            Nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", Erl],
            {ok, Peer, _} = peer:start(#{connection => standard_io, exec => {SetPriv, Nobody},
                                      args => macula_test_nodes:pa_args()}),
            try
                ?assertEqual({error, eacces},
                             peer:call(Peer, macula_quic, listen,
                                       ["127.0.0.1", 443, server_options()]))
            after
                peer:stop(Peer)
            end
    end;
privileged_port(_) ->
    ?assertEqual({error, eacces}, macula_quic:listen("127.0.0.1", 443, server_options())).

wrong_ports_are_refused(_Config) ->
    [?assertMatch({error, {bad_option, port, _}}, macula_quic:listen(Port, server_options()))
     || Port <- [-1, 65536, 65536 + 4433, 1 bsl 70, http, "4433", 4433.0, <<"4433">>]].

wrong_addresses_are_refused(_Config) ->
    [?assertMatch({error, {bad_option, address, _}},
                  macula_quic:listen(Address, 0, server_options()))
     || Address <- ["localhost", "", <<>>, "1", "127.0.0.1.1", "256.0.0.1", {1, 2, 3}, {a, b, c, d},
                    {256, 0, 0, 1}, 42, "127.0.0.1\n", [1 | 2], [$1, "x"], ["127.0.0.1"], <<255>>,
                    "::1%", "[::1"]].

a_listener_needs_a_certificate(_Config) ->
    ?assertMatch({error, {bad_option, certfile, _}}, macula_quic:listen("127.0.0.1", 0, [])).

unknown_options_are_refused(_Config) ->
    ?assertEqual({error, {bad_option, idle_timout_ms, unknown}},
                 macula_quic:listen("127.0.0.1", 0, server_options(#{idle_timout_ms => 5}))),
    [?assertMatch({error, {bad_option, Key, _}},
                  macula_quic:listen("127.0.0.1", 0, server_options(#{Key => Value})))
     || {Key, Value} <- [{alpn, []}, {alpn, [<<>>]}, {alpn, [lists:duplicate(256, $x)]}, {alpn, 3},
                         {verify, maybe_later}, {fail_if_no_peer_cert, true}, {backlog, 0},
                         {max_handshakes, infinity}, {retry, sometimes}, {migration_enabled, 2},
                         {stateless_reset_key, <<1:8>>}, {stream_recv_window, -1},
                         {congestion_control, reno}, {maximum_mtu, 1199}, {maximum_mtu, 65536},
                         {low_watermark, 2000000}, {keylog, "file"}, {password, 1},
                         {datagram_receive_enabled, 2}, {verify_pubkey, <<0:256>>}]],
    [?assertEqual({error, {unsupported_option, Key}},
                  macula_quic:listen("127.0.0.1", 0, server_options(#{Key => 1})))
     || Key <- [ciphers, versions, max_bytes_per_key, reuseport, max_ack_delay_ms]],
    [?assertMatch({error, {bad_option, _, _}}, macula_quic:listen("127.0.0.1", 0, Options))
     || Options <- [not_options, [{a, b, c}], [1], [{verify, verify_none} | improper], {}, <<>>]].

a_closed_listener_frees_its_port(_Config) ->
    [begin
         {L, Port} = listen(),
         ok = macula_quic:close_listener(L),
         ?EXPECT({quic, listener_stopped, L, undefined}),
         {ok, Socket} = gen_udp:open(Port, [{ip, {127, 0, 0, 1}}]),
         ok = gen_udp:close(Socket)
     end || _ <- lists:seq(1, macula_quic_lab:times(10))].

a_half_open_handshake_does_not_hold_the_port(_Config) ->
    {L, Port} = macula_quic_lab:listen(#{initial_rtt_ms => 10, handshake_timeout_ms => 60000}),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port},
                                            down => #{blackhole => true}}),
    Self = self(),
    Dialler = spawn_link(fun() ->
        Self ! {dialled, macula_quic:connect("127.0.0.1", macula_relay:port(Relay),
                                             client_options(), 60000)}
    end),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshakes := N}} = macula_quic:info(L),
        N =:= 1
    end),
    ok = macula_quic:close_listener(L),
    %% Before the handshake would be over by itself.
    macula_test_nodes:wait_until(fun() -> macula_test_nodes:is_udp_port_free(Port) end, 30000),
    unlink(Dialler),
    exit(Dialler, kill),
    macula_relay:stop(Relay).

%% Each that is kept would hold the socket for as long as the VM lives.
a_connection_that_ends_in_its_first_packet_is_not_kept(_Config) ->
    {L, Port} = listen(),
    {ok, Socket} = gen_udp:open(0, [binary]),
    [ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, macula_quic_lab:closing_packet())
     || _ <- lists:seq(1, 100)],
    %% Served after them.
    #{client := C, server := S} = pair(L, Port, #{}),
    {ok, #{handshakes := 0, accepted := 1}} = macula_quic:info(L),
    [ok = macula_quic:close(X) || X <- [C, S, L]],
    ok = gen_udp:close(Socket),
    macula_test_nodes:wait_until(fun() -> macula_test_nodes:is_udp_port_free(Port) end).

closing_leaves_connections_alone(_Config) ->
    #{listener := L, client := C, server := S} = Pair = pair(),
    ok = macula_quic:close_listener(L),
    ?EXPECT({quic, listener_stopped, L, undefined}),
    {Here, There} = macula_quic_lab:stream(Pair),
    ok = macula_quic:send(There, <<"still here">>, #{fin => true}),
    ?assertEqual(<<"still here">>, macula_quic_lab:read_to_end(Here)),
    [?assertEqual({ok, H}, macula_quic:handshake(H)) || H <- [C, S]].

relisten_beside_live_connections(_Config) ->
    #{listener := L, port := Port} = Old = pair(),
    ok = macula_quic:close_listener(L),
    {ok, L2} = macula_quic:listen("127.0.0.1", Port, server_options(#{alpn => ["new"]})),
    ?assertEqual({error, eaddrinuse}, macula_quic:listen("127.0.0.1", Port, server_options())),
    %% New ones come to the new listener, under its options; the old ones live on.
    New = pair(L2, Port, #{alpn => ["new"]}),
    ?assertMatch({error, {alpn_mismatch, _}},
                 macula_quic:connect("127.0.0.1", Port, client_options(), 5000)),
    [begin
         {Here, There} = macula_quic_lab:stream(Pair),
         ok = macula_quic:send(Here, <<"x">>, #{fin => true}),
         ?assertEqual(<<"x">>, macula_quic_lab:read_to_end(There))
     end || Pair <- [Old, New]],
    ok = macula_quic:close_listener(L2),
    {ok, L3} = macula_quic:listen("127.0.0.1", Port, server_options()),
    _ = pair(L3, Port, #{}).

the_port_is_free_once_its_last_connection_is_gone(_Config) ->
    #{listener := L, client := C, server := S, port := Port} = pair(),
    ok = macula_quic:close_listener(L),
    ?assertNot(macula_test_nodes:is_udp_port_free(Port)),
    ok = macula_quic:close_connection(C),
    ?EXPECT({quic, shutdown, S, _}),
    macula_test_nodes:wait_until(fun() ->
        erlang:garbage_collect(),
        macula_test_nodes:is_udp_port_free(Port)
    end).

%% The handles of connections that are over, and of their streams, hold no port.
handles_of_ended_connections_hold_no_port(_Config) ->
    [begin
         #{listener := L, port := Port, client := C, server := S} = Pair = pair(),
         {Here, There} = macula_quic_lab:stream(Pair),
         ok = macula_quic:close(C),
         ?EXPECT({quic, shutdown, S, _}),
         ok = macula_quic:close(L),
         %% Whether it still drains or not.
         {ok, Again} = macula_quic:listen("127.0.0.1", Port, server_options()),
         ok = macula_quic:close(Again),
         macula_test_nodes:wait_until(fun() ->
             case gen_udp:open(Port, [{ip, {127, 0, 0, 1}}]) of
                 {ok, Udp} -> ok =:= gen_udp:close(Udp);
                 {error, eaddrinuse} = Taken -> Taken
             end
         end),
         %% Nor does another one's key matter.
         {ok, Other} = macula_quic:listen("127.0.0.1", Port, server_options(
             #{stateless_reset_key => crypto:strong_rand_bytes(32)})),
         {ok, C2} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
         [?assertMatch({ok, [{rtt, _}]}, macula_quic:getstat(X, [rtt])) || X <- [C, S, C2]],
         [?assertMatch({ok, #{state := closed}}, macula_quic:info(X)) || X <- [Here, There]],
         ok = macula_quic:close(Other)
     end || _ <- lists:seq(1, macula_quic_lab:times(3))].

close_twice_is_ok(_Config) ->
    {L, _} = listen(),
    ok = macula_quic:close_listener(L),
    ok = macula_quic:close_listener(L),
    ok = macula_quic:close(L),
    ?EXPECT({quic, listener_stopped, L, undefined}),
    ?NOTHING({quic, _, _, _}).

a_closed_listener_accepts_nothing(_Config) ->
    {L, Port} = listen(),
    Self = self(),
    _ = spawn_link(fun() -> Self ! {accepted, macula_quic:accept(L)} end),
    macula_test_nodes:wait_until(fun() -> macula_quic:accept(L, 0) =:= {error, timeout} end),
    ok = macula_quic:close_listener(L),
    ?EXPECT({accepted, {error, closed}}),
    ?assertEqual({error, closed}, macula_quic:accept(L, 1000)),
    ?assertEqual({error, closed}, macula_quic:async_accept(L)),
    ?assertMatch({error, Why} when Why =:= timeout; Why =:= econnrefused,
                 macula_quic:connect("127.0.0.1", Port, client_options(), 300)).

the_owners_death_frees_the_port(_Config) ->
    Port = macula_quic_lab:in_process(fun() -> element(2, listen()) end),
    macula_test_nodes:wait_until(fun() -> macula_test_nodes:is_udp_port_free(Port) end).

listener_info(_Config) ->
    #{listener := L, port := Port} = pair(),
    Self = self(),
    {ok, Info} = macula_quic:info(L),
    ?assertMatch(#{handle := listener, state := open, sockname := {"127.0.0.1", Port},
                   owner := Self, handshakes := 0, accepted := 1, backlog := 0}, Info),
    _ = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{backlog := B, accepted := A}} = macula_quic:info(L),
        {B, A} =:= {1, 2}
    end),
    ok = macula_quic:close_listener(L),
    {ok, #{state := closed}} = macula_quic:info(L),
    ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:sockname(L)).

%% Quinn knows the drafts before it.
version_1_alone_is_spoken(_Config) ->
    {L, Port} = listen(),
    ?assertEqual([1], macula_quic_lab:versions(Port)),
    ok = macula_quic:close(L).

%%--------------------------------------------------------------------------------------------

%% In a network of its own: two interfaces joined by a cable, and the loopback interface.
-define(NETWORK, "ip link set lo up && ip -6 addr add fe80::1/64 dev lo nodad && "
        "ip link add left type veth peer name right && "
        "ip -6 addr add fe80::2/64 dev left nodad && ip -6 addr add fe80::3/64 dev right nodad && "
        "ip link set left up && ip link set right up").

link_local_addresses_keep_their_link(_Config) ->
    case os:cmd("unshare --net sh -c '" ?NETWORK " && echo made' 2>&1") of
        "made\n" ->
            Sh = ["--net", "sh", "-c", ?NETWORK " && exec \"$0\" \"$@\"", os:find_executable("erl")],
            Options = #{carrier => none, exec => {os:find_executable("unshare"), Sh}},
            macula_test_nodes:with_nodes([Options], fun([Node]) ->
                ok = macula_test_nodes:call(Node, ?MODULE, on_links, [], 60000)
            end);
        Why ->
            {skip, "no network of our own is to be had: " ++ Why}
    end.

on_links() ->
    %% The kernel begins to use a cable when it has seen that both ends are up.
    macula_test_nodes:wait_until(fun() ->
        is_up("left") andalso is_up("right")
    end),
    [on_link(Ip, Interface, Dialled)
     || {Ip, Interface, Dialled} <- [{"fe80::1", "lo", "lo"}, {"fe80::2", "left", "left"},
                                     %% Over the cable the name is that of the dialler's own end.
                                     {"fe80::2", "left", "right"}]],
    ok.

on_link(Ip, Interface, Dialled) ->
    {ok, Tuple} = inet:parse_ipv6strict_address(Ip),
    Spelt = fun(On) ->
        [Ip ++ "%" ++ On, list_to_binary(Ip ++ "%" ++ On), "[" ++ Ip ++ "%" ++ On ++ "]",
         Ip ++ "%" ++ integer_to_list(index(On)), {Tuple, index(On)}]
    end,
    Text = Ip ++ "%" ++ Interface,
    [begin
         {ok, L} = macula_quic:listen({Address, 0}, server_options()),
         ?assertMatch({ok, {Text, _}}, macula_quic:sockname(L)),
         {ok, {Text, Port}} = macula_quic:sockname(L),
         ?assertMatch({ok, #{sockname := {Text, Port}}}, macula_quic:info(L)),
         ok = macula_quic:async_accept(L),
         [linked(Peer, Dialled, Interface, Port, Options)
          || Peer <- Spelt(Dialled), Options <- [#{}, #{local_address => local(Dialled)}]],
         %% The link of the local address is that of the peer's, where that has none.
         linked(Ip, Dialled, Interface, Port, #{local_address => local(Dialled)}),
         ok = macula_quic:close_listener(L)
     end || Address <- Spelt(Interface)].

local("lo") -> "fe80::1%lo";
local("left") -> "fe80::2%left";
local("right") -> "fe80::3%right".

linked(Peer, Dialled, Interface, Port, Options) ->
    {ok, C} = macula_quic:connect(Peer, Port, maps:merge(
        (client_options())#{verify => verify_none}, Options), 5000),
    {S, At} = ?EXPECT({quic, new_conn, Conn, #{peername := Name}}, {Conn, Name}),
    {ok, {To, Port}} = macula_quic:peername(C),
    {ok, {From, FromPort} = Local} = macula_quic:sockname(C),
    ?assertEqual({C, Dialled}, {C, link_of(To)}),
    ?assertEqual({C, Dialled}, {C, link_of(From)}),
    %% The server sees the address on its own link.
    ?assertEqual({ok, At}, macula_quic:peername(S)),
    ?assertEqual({hd(string:split(From, "%")) ++ "%" ++ Interface, FromPort}, At),
    ?assertEqual({From, FromPort}, Local),
    ?assertMatch({ok, {_, Port}}, macula_quic:sockname(S)),
    {ok, Here} = macula_quic:open_stream(C),
    ok = macula_quic:send(Here, <<"over the link">>),
    {ok, There} = macula_quic:accept_stream(S, #{}, 5000),
    ?assertEqual({ok, <<"over the link">>}, macula_quic:recv(There, 13, 5000)),
    ok = macula_quic:close(C),
    ?EXPECT({quic, shutdown, S, _}).

link_of(Address) ->
    [_, Interface] = string:split(Address, "%"),
    Interface.

is_up(Interface) ->
    {ok, Interfaces} = inet:getifaddrs(),
    lists:member(running, proplists:get_value(flags, proplists:get_value(Interface, Interfaces))).

index(Interface) ->
    {ok, Index} = net:if_name2index(Interface),
    Index.

a_wrong_link_is_told(_Config) ->
    Wrong = ["fe80::1%", "fe80::1%nosuchinterface", "fe80::1%-1", "fe80::1%99999999999", "127.0.0.1%lo",
             "fe80::1%lo%lo", {{127, 0, 0, 1}, 1}, {{16#fe80, 0, 0, 0, 0, 0, 0, 1}, 0},
             {{16#fe80, 0, 0, 0, 0, 0, 0, 1}, lo}],
    [begin
         ?assertMatch({A, {error, {bad_option, address, _}}}, {A, macula_quic:listen(A, 0, server_options())}),
         ?assertMatch({A, {error, {bad_option, local_address, _}}},
                      {A, macula_quic:connect("::1", 1, #{local_address => {A, 0}}, 100)})
     end || A <- Wrong],
    [?assertMatch({A, {error, {bad_option, host, no_such_interface}}}, {A, macula_quic:connect(A, 1, #{}, 1000)})
     || A <- ["fe80::1%", "fe80::1%nosuchinterface", <<"fe80::1%-1">>, "127.0.0.1%lo", "host%lo"]],
    %% An address of the right form on a link that does not exist.
    ?assertMatch({error, Why} when is_atom(Why),
                 macula_quic:listen("fe80::1%4000000000", 0, server_options())).
