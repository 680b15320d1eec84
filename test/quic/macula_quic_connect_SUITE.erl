%% Connecting: from names to addresses, under one deadline, and whom one trusts.
-module(macula_quic_connect_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include_lib("public_key/include/public_key.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, log/2]).
-export([names_are_resolved/1, every_address_of_a_name_is_tried/1, both_families_are_dialled/1,
         a_family_that_is_not_told_keeps_no_other_waiting/1,
         an_unknown_name_is_nxdomain/1, a_black_hole_is_a_timeout/1,
         no_way_to_an_address_is_told_at_once/1, addresses_without_a_way_cost_no_time/1,
         the_deadline_is_over_everything/1, infinity_is_allowed/1, a_timeout_leaves_no_message/1,
         a_closed_port_is_refused_or_times_out/1, a_dead_caller_dials_no_more/1,
         local_address_is_where_it_comes_from/1, clients_share_an_endpoint/1,
         a_large_initial_mtu_connects/1,
         a_local_port_is_free_with_the_end_of_its_connection/1,
         a_client_knows_its_own_address/1, wrong_arguments_are_refused/1]).
%% Run in a node under test.
-export([dial/2, dial_last/2, dial_by/2]).
-export([verification_is_the_default/1, cacertfile_is_trusted/1, names_are_verified/1,
         a_chain_is_verified/1, a_long_chain_outlives_losses/1, a_chain_has_six_intermediates_at_most/1, dates_are_verified/1, verify_pubkey_pins_the_key/1,
         verify_none_is_logged/1, verify_none_still_checks_the_handshake/1,
         alpn_mismatch_names_the_offer/1, alpn_is_chosen_by_the_server/1,
         server_name_indication_is_asked_for_and_verified/1, an_impostor_is_refused/1]).
-export([client_certificates_are_shown/1, client_certificates_are_required/1,
         a_strange_client_certificate_is_an_alert/1, an_optional_client_certificate/1]).

-import(macula_quic_lab, [client_options/0, client_options/1, server_options/1, listen/0, listen/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

connect(Port, Options) ->
    macula_quic:connect("127.0.0.1", Port, Options, 5000).

%%--------------------------------------------------------------------------------------------
%% Names, addresses, deadlines

names_are_resolved(_Config) ->
    {ok, L} = macula_quic:listen(0, server_options(#{})),
    {ok, {_, Port}} = macula_quic:sockname(L),
    [begin
         {ok, C} = macula_quic:connect(Host, Port, client_options(), 5000),
         {ok, S} = macula_quic:accept(L, 5000),
         ?assertMatch({ok, {Ip, Port}} when Ip =:= "127.0.0.1"; Ip =:= "::1",
                      macula_quic:peername(C)),
         ok = macula_quic:close(S)
     end || Host <- ["localhost", <<"localhost">>, localhost, "127.0.0.1", <<"::1">>, "[::1]",
                     {127, 0, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 1}]],
    ok = macula_quic:close(L).

%% The resolver of this VM is told a name with addresses of which only one answers.
every_address_of_a_name_is_tried(_Config) ->
    {L, Port} = listen(),
    Name = "many.macula.test",
    {ok, Silent} = gen_udp:open(Port, [{ip, {127, 0, 0, 9}}]),
    with_hosts([{{127, 0, 0, 9}, [Name]}, {{127, 0, 0, 8}, [Name]}, {{127, 0, 0, 1}, [Name]}], fun() ->
        {ok, C} = macula_quic:connect(Name, Port,
                                      client_options(#{server_name_indication => "localhost"}),
                                      5000),
        {ok, _} = macula_quic:accept(L, 5000),
        ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:peername(C))
    end),
    gen_udp:close(Silent).

both_families_are_dialled(_Config) ->
    %% Only IPv4 is served, and the name has an IPv6 address too, which comes first.
    {L, Port} = listen(),
    Name = "both.macula.test",
    with_hosts([{{0, 0, 0, 0, 0, 0, 0, 1}, [Name]}, {{127, 0, 0, 1}, [Name]}], fun() ->
        {ok, C} = macula_quic:connect(Name, Port,
                                      client_options(#{server_name_indication => "localhost"}),
                                      5000),
        ?assertEqual({ok, {"127.0.0.1", Port}}, macula_quic:peername(C))
    end),
    ok = macula_quic:close(L).

%% A resolver that tells the addresses of one family, and of the other one nothing, or late.
a_family_that_is_not_told_keeps_no_other_waiting(_Config) ->
    {ok, L} = macula_quic:listen("127.0.0.1", 0, server_options(#{})),
    {ok, {_, Port}} = macula_quic:sockname(L),
    [macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
         {ok, Dns} = gen_udp:open(0, [binary, {active, true}, {ip, {127, 0, 0, 1}}]),
         {ok, At} = inet:port(Dns),
         Server = spawn_link(fun() -> tell_addresses(Slow) end),
         ok = gen_udp:controlling_process(Dns, Server),
         {Ms, Result} = macula_test_nodes:call(Node, ?MODULE, dial_by, [At, Port], 30000),
         ct:log("~p: ~p after ~p ms", [Slow, Result, Ms]),
         ?assertEqual(ok, Result),
         ?assertMatch(_ when Ms < Most, Ms),
         unlink(Server),
         exit(Server, kill)
     %% Of the IPv6 address nothing answers at the port.
     end) || {Slow, Most} <- [{#{28 => never}, 1900}, {#{1 => 600}, 8000}]],
    ok = macula_quic:close(L).

dial_by(Dns, Port) ->
    %% Files would take the place of what is set here.
    [ok = inet_db:res_option(File, "") || File <- [resolv_conf, hosts_file]],
    ok = inet_db:res_option(nameservers, [{{127, 0, 0, 1}, Dns}]),
    ok = inet_db:set_lookup([dns]),
    Options = client_options(#{server_name_indication => "localhost", verify => none}),
    {Micros, Result} = timer:tc(fun() ->
        macula_quic:connect("slow.macula.test", Port, maps:remove(cacerts, Options), 10000)
    end),
    {Micros div 1000, case Result of {ok, _} -> ok; _ -> Result end}.

%% Of 127.0.0.1 (type 1), and of ::1 (type 28), as late as `Slow' says.
tell_addresses(Slow) ->
    receive
        {udp, Dns, Ip, Port, <<Id:16, _:80, Question/binary>>} ->
            [Name, _] = binary:split(Question, <<0>>),
            <<_:(byte_size(Name))/binary, 0, Type:16, _/binary>> = Question,
            Asked = binary:part(Question, 0, byte_size(Name) + 5),
            Address = case Type of
                1 -> <<127, 0, 0, 1>>;
                28 -> <<1:128>>
            end,
            Answer = <<Id:16, 16#8180:16, 1:16, 1:16, 0:32, Asked/binary, 16#c00c:16, Type:16, 1:16, 60:32,
                       (byte_size(Address)):16, Address/binary>>,
            case maps:get(Type, Slow, 0) of
                never -> ok;
                Ms -> _ = erlang:send_after(Ms, self(), {tell, Dns, Ip, Port, Answer})
            end,
            tell_addresses(Slow);
        {tell, Dns, Ip, Port, Answer} ->
            ok = gen_udp:send(Dns, Ip, Port, Answer),
            tell_addresses(Slow)
    end.

with_hosts(Hosts, Fun) ->
    Before = inet_db:res_option(lookup),
    ok = inet_db:set_lookup([file]),
    [ok = inet_db:add_host(Ip, Names) || {Ip, Names} <- Hosts],
    try
        Fun()
    after
        [ok = inet_db:del_host(Ip) || {Ip, _} <- Hosts],
        ok = inet_db:set_lookup(Before)
    end.

an_unknown_name_is_nxdomain(_Config) ->
    with_hosts([], fun() ->
        ?assertEqual({error, nxdomain},
                     macula_quic:connect("no-such-host.invalid", 443, client_options(), 5000))
    end).

%% As over TCP, whatever the reason.
no_way_to_an_address_is_told_at_once(_Config) ->
    secluded(fun(Node) ->
        [begin
             {Ms, Result} = macula_test_nodes:call(Node, ?MODULE, dial, [Host, 10000]),
             ct:log("~s: ~p after ~p ms", [Host, Result, Ms]),
             ?assertEqual({Host, {error, Reason}}, {Host, Result}),
             ?assertMatch(_ when Ms < 8000, Ms)
         end || {Host, Reason} <- [{"198.51.100.1", enetunreach}, {"2001:db8::1", enetunreach},
                                   {"203.0.113.1", eacces}, {"203.0.113.65", einval},
                                   {"203.0.113.129", ehostunreach}]]
    end).

%% The pace of attempts is for those that may still succeed.
addresses_without_a_way_cost_no_time(_Config) ->
    secluded(fun(Node) ->
        {Ms, Peer} = macula_test_nodes:call(Node, ?MODULE, dial_last, [40, 20000]),
        ct:log("~p after ~p ms", [Peer, Ms]),
        ?assertMatch({ok, {"127.0.0.1", _}}, Peer),
        %% Ten seconds at their pace.
        ?assertMatch(_ when Ms < 8000, Ms)
    end).

%% A node whose system knows no way to anywhere.
secluded(Fun) ->
    Routes = ["ip route add prohibit 203.0.113.0/26", "ip route add blackhole 203.0.113.64/26",
              "ip route add unreachable 203.0.113.128/26"],
    case macula_test_nodes:secluded(Routes) of
        {ok, Exec} ->
            macula_test_nodes:with_nodes([#{carrier => none, exec => Exec}],
                                         fun([Node]) -> Fun(Node) end);
        {error, Reason} ->
            {skip, {"needs a network namespace", Reason}}
    end.

dial(Host, Timeout) ->
    Begun = erlang:monotonic_time(millisecond),
    Result = macula_quic:connect(Host, 443, client_options(), Timeout),
    {erlang:monotonic_time(millisecond) - Begun, Result}.

%% A name with so many addresses to which no way leads, and one that is served.
dial_last(Count, Timeout) ->
    {L, Port} = listen(),
    Name = "lost.macula.test",
    Lost = [{198, 51, 100, N} || N <- lists:seq(1, Count)],
    with_hosts([{Ip, [Name]} || Ip <- Lost ++ [{127, 0, 0, 1}]], fun() ->
        Begun = erlang:monotonic_time(millisecond),
        {ok, C} = macula_quic:connect(Name, Port,
                                      client_options(#{server_name_indication => "localhost"}),
                                      Timeout),
        Took = erlang:monotonic_time(millisecond) - Begun,
        Peer = macula_quic:peername(C),
        ok = macula_quic:close(L),
        {Took, Peer}
    end).

%% A port that takes packets and never answers.
black_hole() ->
    {ok, Socket} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    {Socket, Port}.

a_black_hole_is_a_timeout(_Config) ->
    {Socket, Port} = black_hole(),
    [begin
         Begun = erlang:monotonic_time(millisecond),
         ?assertEqual({error, timeout},
                      macula_quic:connect("127.0.0.1", Port, client_options(), Timeout)),
         Took = erlang:monotonic_time(millisecond) - Begun,
         %% Far from all that would end it otherwise.
         ?assertMatch(_ when Took >= Timeout andalso Took < Timeout + 8000, Took)
     end || Timeout <- [0, 1, 300]],
    gen_udp:close(Socket).

the_deadline_is_over_everything(_Config) ->
    {Socket, Port} = black_hole(),
    Name = "holes.macula.test",
    Ips = [{127, 0, 0, N} || N <- lists:seq(1, 6)],
    with_hosts([{Ip, [Name]} || Ip <- Ips], fun() ->
        Begun = erlang:monotonic_time(millisecond),
        {error, _} = macula_quic:connect(Name, Port, client_options(), 700),
        ?assertMatch(Took when Took < 8000, erlang:monotonic_time(millisecond) - Begun)
    end),
    gen_udp:close(Socket).

infinity_is_allowed(_Config) ->
    {_L, Port} = Listening = listen(),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, client_options(), infinity),
    ?assertEqual({ok, C}, macula_quic:handshake(C)),
    ok = macula_quic:close(element(1, Listening)),
    [?assertMatch({error, {bad_option, timeout, _}},
                  macula_quic:connect("127.0.0.1", Port, client_options(), T))
     || T <- [-1, 1.0, never, 1 bsl 32, 1 bsl 64]].

a_timeout_leaves_no_message(_Config) ->
    {L, Port} = listen(),
    %% About as long as a handshake takes, so that some just miss it.
    Results = [macula_quic:connect("127.0.0.1", Port, client_options(), N rem 8)
               || N <- lists:seq(1, macula_quic_lab:times(100))],
    Connected = [C || {ok, C} <- Results],
    ?assertEqual([], [R || R <- Results, element(1, R) =/= ok, R =/= {error, timeout}]),
    [?assertEqual(ok, macula_quic:close(C)) || C <- Connected],
    [?EXPECT({quic, closed, C, normal}) || C <- Connected],
    ok = macula_quic:close(L),
    ?EXPECT({quic, listener_stopped, L, _}),
    ?assertEqual({messages, []}, process_info(self(), messages)).

a_closed_port_is_refused_or_times_out(_Config) ->
    {Socket, Port} = black_hole(),
    gen_udp:close(Socket),
    {error, Why} = macula_quic:connect("127.0.0.1", Port, client_options(), 5000),
    case os:type() of
        %% The system tells.
        {unix, linux} -> ?assertEqual(econnrefused, Why);
        _ -> ?assertMatch(_ when Why =:= econnrefused orelse Why =:= timeout, Why)
    end.

a_dead_caller_dials_no_more(_Config) ->
    {Socket, Port} = black_hole(),
    ok = inet:setopts(Socket, [{active, true}]),
    %% With a port of its own, which is closed when the dial is given up.
    {ok, Local} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
    {ok, LocalPort} = inet:port(Local),
    gen_udp:close(Local),
    Options = client_options(#{local_address => {"127.0.0.1", LocalPort}}),
    Caller = spawn(fun() -> macula_quic:connect("127.0.0.1", Port, Options, infinity) end),
    ?EXPECT({udp, Socket, {127, 0, 0, 1}, LocalPort, _}),
    exit(Caller, kill),
    macula_test_nodes:wait_until(fun() ->
        case gen_udp:open(LocalPort, [{ip, {127, 0, 0, 1}}]) of
            {ok, S} -> gen_udp:close(S) =:= ok;
            _ -> false
        end
    end),
    gen_udp:close(Socket).

local_address_is_where_it_comes_from(_Config) ->
    {L, Port} = listen(),
    [begin
         {ok, C} = connect(Port, client_options(#{local_address => Local})),
         {ok, S} = macula_quic:accept(L, 5000),
         {ok, {"127.0.0.5", _} = Name} = macula_quic:peername(S),
         ?assertEqual({ok, Name}, macula_quic:sockname(C))
     end || Local <- ["127.0.0.5", {127, 0, 0, 5}, {<<"127.0.0.5">>, 0}]],
    {ok, Taken} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
    {ok, TakenPort} = inet:port(Taken),
    ?assertEqual({error, eaddrinuse},
                 connect(Port, client_options(#{local_address => {"127.0.0.1", TakenPort}}))),
    ?assertEqual({error, eaddrnotavail},
                 connect(Port, client_options(#{local_address => "192.0.2.1"}))),
    [?assertEqual({error, eafnosupport},
                  macula_quic:connect(Host, Port, client_options(#{local_address => Local}), 5000))
     || {Host, Local} <- [{"::1", "127.0.0.1"}, {"127.0.0.1", "::1"}]],
    {ok, Both} = connect(Port, client_options(#{local_address => "::"})),
    ?assertEqual(ok, macula_quic:close(Both)),
    [?assertMatch({error, {bad_option, local_address, _}},
                  connect(Port, client_options(#{local_address => Wrong})))
     || Wrong <- ["localhost", 1, {1, 2}, {"127.0.0.1", 65536}, [1 | 2], <<>>]].

%% Nobody's garbage holds it: the handle of the connection is still there.
a_local_port_is_free_with_the_end_of_its_connection(_Config) ->
    {L, Port} = macula_quic_lab:listen(),
    [begin
         {ok, C} = connect(Port, client_options(Options)),
         {ok, {Ip, Local}} = macula_quic:sockname(C),
         {ok, Address} = inet:parse_address(Ip),
         {error, eaddrinuse} = gen_udp:open(Local, [{ip, Address}]),
         ok = macula_quic:close_connection(C),
         macula_test_nodes:wait_until(fun() ->
             case gen_udp:open(Local, [{ip, Address}]) of
                 {ok, Udp} -> ok =:= gen_udp:close(Udp);
                 {error, eaddrinuse} = Taken -> Taken
             end
         end),
         ?assertMatch({ok, #{state := {closed, _}}}, macula_quic:info(C))
     end || Options <- [#{local_address => "127.0.0.1"}, #{maximum_mtu => 9000}]],
    ok = macula_quic:close(L).

clients_share_an_endpoint(_Config) ->
    {L, Port} = listen(),
    Conns = [begin {ok, C} = connect(Port, client_options()), C end || _ <- lists:seq(1, 10)],
    Ports = [begin {ok, {_, P}} = macula_quic:sockname(C), P end || C <- Conns],
    ?assertMatch([_], lists:usort(Ports)),
    ok = macula_quic:close(L).

%% A datagram that is larger than QUIC's usual first window would never leave.
a_large_initial_mtu_connects(_Config) ->
    [begin
         Large = #{Key => Mtu, maximum_mtu => 65000},
         {L, Port} = macula_quic_lab:listen(Large),
         {ok, C} = connect(Port, client_options(Large)),
         {ok, S} = macula_quic:accept(L, 5000),
         {ok, [{mtu, Now}]} = macula_quic:getstat(S, [mtu]),
         ?assert(Now >= Mtu),
         [ok = macula_quic:close(X) || X <- [C, S, L]]
     end || Key <- [initial_mtu, minimum_mtu], Mtu <- [11900, 12000, 16000]].

a_client_knows_its_own_address(_Config) ->
    {L, Port} = listen(),
    {ok, C} = connect(Port, client_options()),
    {ok, S} = macula_quic:accept(L, 5000),
    ?assertEqual(macula_quic:peername(S), macula_quic:sockname(C)).

wrong_arguments_are_refused(_Config) ->
    [?assertMatch({error, {bad_option, host, _}},
                  macula_quic:connect(Host, 4433, client_options(), 1000))
     || Host <- ["", <<>>, undefined, 42, {1, 2}, [1 | 2], "two words", ["list"], self(),
                 lists:duplicate(254, $a), <<"nul", 0>>, "\n"]],
    [?assertMatch({error, {bad_option, port, _}},
                  macula_quic:connect("127.0.0.1", Port, client_options(), 1000))
     || Port <- [0, -1, 65536, http, "4433", 1.0]],
    [?assertMatch({error, {bad_option, Key, _}}, connect(4433, client_options(#{Key => Value})))
     || {Key, Value} <- [{verify, yes}, {verify_pubkey, <<1>>}, {verify_pubkey, "key"},
                         {server_name_indication, ""}, {backlog, 5}, {x, y}, {alpn, [1.5]},
                         {alpn, undefined}, {alpn, [undefined]},
                         {cacertfile, 7}, {idle_timeout_ms, -1},
                         {peer_bidi_stream_count, 100001}, {initial_mtu, 16001}, {minimum_mtu, 16001},
                         {peer_unidi_stream_count, 1 bsl 60}]].

%%--------------------------------------------------------------------------------------------
%% Whom to trust

verification_is_the_default(_Config) ->
    {L, Port} = listen(),
    %% A stranger's certificate, against the roots of the platform.
    ?assertMatch({error, {bad_cert, Why}} when Why =:= unknown_ca; Why =:= selfsigned_peer,
                 connect(Port, #{alpn => ["test"]})),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)).

cacertfile_is_trusted(Config) ->
    {_L, Port} = Listening = listen(),
    File = filename:join(proplists:get_value(priv_dir, Config), "ca.pem"),
    #{cert := Pem} = macula_quic_lab:credentials(),
    ok = file:write_file(File, Pem),
    [{_, Der, _}] = public_key:pem_decode(Pem),
    [?assertMatch({ok, _}, connect(Port, Options#{alpn => ["test"]}))
     || Options <- [#{cacertfile => File}, #{cacertfile => list_to_binary(File)},
                    #{cacerts => [Der]}, #{cacerts => Der}, #{cacerts => Pem}]],
    %% Another root is none.
    #{cert := Other} = macula_quic_lab:ed25519(),
    ?assertMatch({error, {bad_cert, _}}, connect(Port, #{alpn => ["test"], cacerts => Other})),
    ?assertEqual({error, {bad_cacertfile, "/no/such/file", enoent}},
                 connect(Port, #{cacertfile => "/no/such/file"})),
    ok = macula_quic:close(element(1, Listening)).

names_are_verified(_Config) ->
    {_L, Port} = Listening = listen(),
    ?assertEqual({error, {bad_cert, hostname_check_failed}},
                 connect(Port, client_options(#{server_name_indication => "example.org"}))),
    ?assertEqual({error, {bad_cert, hostname_check_failed}},
                 connect(Port, client_options(#{server_name_indication => "127.0.0.2"}))),
    ok = macula_quic:close(element(1, Listening)).

chain(Leaf) ->
    macula_quic_lab:chain(#{leaf => Leaf}).

a_chain_is_verified(_Config) ->
    #{server := #{leaf := Leaf, chain := Chain, key := Key, root := Root}} = chain([]),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, #{cert => lists:droplast(Chain), key => Key}),
    {ok, {_, Port}} = macula_quic:sockname(L),
    {ok, C} = connect(Port, #{cacerts => [Root]}),
    ?assertEqual({ok, Leaf}, macula_quic:peercert(C)),
    ?assertEqual({ok, lists:droplast(Chain)}, macula_quic:peercerts(C)),
    {ok, Short} = macula_quic:listen("127.0.0.1", 0, #{cert => Leaf, key => Key}),
    {ok, {_, ShortPort}} = macula_quic:sockname(Short),
    ?assertEqual({error, {bad_cert, unknown_ca}}, connect(ShortPort, #{cacerts => [Root]})),
    #{server := #{root := OtherRoot}} = chain([]),
    ?assertMatch({error, {bad_cert, Why}} when Why =:= unknown_ca; Why =:= invalid_signature,
                 connect(Port, #{cacerts => [OtherRoot]})),
    [ok = macula_quic:close(X) || X <- [L, Short]].

a_chain_has_six_intermediates_at_most(_Config) ->
    [begin
         #{server := #{chain := Chain, key := Key, root := Root}} =
             macula_quic_lab:chain(#{intermediates => Intermediates}),
         {ok, L} = macula_quic:listen("127.0.0.1", 0, #{cert => lists:droplast(Chain), key => Key}),
         {ok, {_, Port}} = macula_quic:sockname(L),
         Result = connect(Port, #{cacerts => [Root]}),
         ?assertMatch({Intermediates, {Expected, _}}, {Intermediates, Result}),
         _ = Expected =:= ok orelse
             ?assertEqual({error, {bad_cert, max_path_length_reached}}, Result),
         ok = macula_quic:close(L)
     end || {Intermediates, Expected} <- [{6, ok}, {7, error}, {12, error}]].

%% Whichever datagram of the server's is lost, none costs the handshake: not the first, without which the
%% client can read nothing, and not one that more must wait for than fits into a flight.
a_long_chain_outlives_losses(_Config) ->
    Names = [lists:flatten(io_lib:format("host-~3..0b.a-rather-long-domain-name.example.org", [N]))
             || N <- lists:seq(1, 600)],
    #{server := #{chain := Chain, key := Key, root := Root}} = macula_quic_lab:chain(#{names => Names}),
    ?assertMatch(_ when byte_size(hd(Chain)) > 25000, byte_size(hd(Chain))),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, #{cert => lists:droplast(Chain), key => Key}),
    {ok, {_, Port}} = macula_quic:sockname(L),
    [begin
         Self = self(),
         Relay = spawn_link(fun() -> lossy(Self, Port, Lost) end),
         At = ?EXPECT({Relay, Listening}, Listening),
         {Us, Result} = timer:tc(fun() ->
             macula_quic:connect("127.0.0.1", At, #{cacerts => [Root]}, 30000)
         end),
         ct:log("without ~w: ~p after ~b ms", [Lost, Result, Us div 1000]),
         ?assertMatch({_, {ok, _}}, {Lost, Result}),
         {ok, C} = Result,
         ok = macula_quic:close(C),
         unlink(Relay),
         exit(Relay, kill)
     end || Lost <- [[N] || N <- lists:seq(1, 12)] ++ [[1, 2], [3, 4], [3, 5, 7], lists:seq(3, 24, 3)]],
    ok = macula_quic:close(L).

%% Relays between one client and the server, but for these datagrams of the server's.
lossy(Caller, Server, Lost) ->
    Options = [binary, {ip, {127, 0, 0, 1}}, {active, true}, {recbuf, 1000000}],
    {ok, Front} = gen_udp:open(0, Options),
    {ok, Back} = gen_udp:open(0, Options),
    {ok, At} = inet:port(Front),
    Caller ! {self(), At},
    lossy(Front, Back, Server, undefined, Lost, 1).

lossy(Front, Back, Server, Client, Lost, N) ->
    receive
        {udp, Front, _, Port, Data} ->
            _ = gen_udp:send(Back, {127, 0, 0, 1}, Server, Data),
            lossy(Front, Back, Server, Port, Lost, N);
        {udp, Back, _, _, Data} ->
            _ = lists:member(N, Lost) orelse gen_udp:send(Front, {127, 0, 0, 1}, Client, Data),
            lossy(Front, Back, Server, Client, Lost, N + 1)
    end.

dates_are_verified(_Config) ->
    [begin
         #{server := #{chain := Chain, key := Key, root := Root}} =
             chain([{validity, Validity}]),
         {ok, L} = macula_quic:listen("127.0.0.1", 0, #{cert => Chain, key => Key}),
         {ok, {_, Port}} = macula_quic:sockname(L),
         ?assertEqual({error, {bad_cert, Why}}, connect(Port, #{cacerts => [Root]})),
         ok = macula_quic:close(L)
     end || {Validity, Why} <- [{{{2001, 1, 1}, {2002, 1, 1}}, certificate_expired},
                                {{{2090, 1, 1}, {2091, 1, 1}}, not_yet_valid}]].

verify_pubkey_pins_the_key(_Config) ->
    #{public := Public} = macula_quic_lab:credentials(),
    {_L, Port} = Listening = listen(),
    %% Whatever the name.
    {ok, C} = connect(Port, #{verify_pubkey => Public, alpn => ["test"],
                              server_name_indication => "elsewhere.example"}),
    ?assertEqual({ok, C}, macula_quic:handshake(C)),
    #{public := Other} = macula_quic_lab:ed25519(),
    ?assertEqual({error, {bad_cert, pubkey_mismatch}},
                 connect(Port, #{verify_pubkey => Other, alpn => ["test"]})),
    %% A pin is not weakened by `verify'.
    ?assertEqual({error, {bad_cert, pubkey_mismatch}},
                 connect(Port, #{verify_pubkey => Other, verify => none, alpn => ["test"]})),
    ok = macula_quic:close(element(1, Listening)).

verify_none_is_logged(_Config) ->
    {_L, Port} = Listening = listen(),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => warning}),
    try
        {ok, C} = connect(Port, #{verify => none, alpn => ["test"]}),
        ?assertEqual({ok, C}, macula_quic:handshake(C)),
        ?EXPECT({log, #{level := warning, msg := {report, #{what := quic_peer_not_verified,
                                                            port := Port}}}}),
        {ok, _} = connect(Port, client_options()),
        %% Others may log meanwhile.
        ?NOTHING({log, #{msg := {report, #{what := quic_peer_not_verified}}}})
    after
        logger:remove_handler(?MODULE)
    end,
    ok = macula_quic:close(element(1, Listening)).

%% A handler of the logger.
log(Event, #{config := Test}) ->
    Test ! {log, Event}.

%% Whoever shows a certificate without its key must not pass. It takes a TLS stack that signs with
%% another key: the listener refuses to be one, so the two are put together wrongly by hand.
verify_none_still_checks_the_handshake(_Config) ->
    #{cert := Cert} = macula_quic_lab:credentials(),
    #{key := WrongKey} = macula_quic_lab:ed25519(),
    ?assertEqual({error, {bad_key, key_mismatch}},
                 macula_quic:listen("127.0.0.1", 0, #{cert => Cert, key => WrongKey})).

alpn_mismatch_names_the_offer(_Config) ->
    {_L, Port} = Listening = listen(#{alpn => ["a", "b"]}),
    ?assertEqual({error, {alpn_mismatch, [<<"c">>, <<"d">>]}},
                 connect(Port, client_options(#{alpn => ["c", <<"d">>]}))),
    ok = macula_quic:close(element(1, Listening)).

alpn_is_chosen_by_the_server(_Config) ->
    {L, Port} = listen(#{alpn => ["first", "second"]}),
    {ok, C} = connect(Port, client_options(#{alpn => ["other", "second", "first"]})),
    {ok, S} = macula_quic:accept(L, 5000),
    [?assertEqual({ok, <<"first">>}, macula_quic:negotiated_protocol(X)) || X <- [C, S]].

server_name_indication_is_asked_for_and_verified(_Config) ->
    {L, Port} = listen(),
    ok = macula_quic:async_accept(L),
    [begin
         {ok, C} = connect(Port, client_options(#{Key => "localhost"})),
         ?EXPECT({quic, new_conn, _, #{server_name := <<"localhost">>}}),
         ok = macula_quic:close(C)
     end || Key <- [server_name_indication, server_name, sni]].

%% The right name and a certificate for it, of a key that nobody listed.
an_impostor_is_refused(_Config) ->
    #{cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, #{cert => Cert, key => Key, alpn => ["test"]}),
    {ok, {_, Port}} = macula_quic:sockname(L),
    ?assertMatch({error, {bad_cert, _}}, connect(Port, client_options())),
    ok = macula_quic:close(L).

%%--------------------------------------------------------------------------------------------
%% Clients with certificates

client_certificates_are_shown(_Config) ->
    #{server := Server, client := Client} = chain([]),
    {L, Port} = listen(#{verify => verify_peer, fail_if_no_peer_cert => true,
                         cacerts => [maps:get(root, Client)]}),
    ok = macula_quic:async_accept(L),
    Leaf = maps:get(leaf, Client),
    {ok, C} = connect(Port, client_options(#{cert => maps:get(chain, Client),
                                             key => maps:get(key, Client)})),
    S = ?EXPECT({quic, new_conn, X, #{peercert := Leaf}}, X),
    ?assertEqual({ok, Leaf}, macula_quic:peercert(S)),
    ?assertMatch({ok, <<_/binary>>}, macula_quic:peercert(C)),
    ?assertEqual(true, is_map(Server)).

client_certificates_are_required(_Config) ->
    #{client := Client} = chain([]),
    {L, Port} = listen(#{verify => verify_peer, fail_if_no_peer_cert => true,
                         cacerts => [maps:get(root, Client)]}),
    %% TLS 1.3 tells a client only after it has finished its own part.
    case connect(Port, client_options()) of
        {error, Why} -> ?assertEqual({tls_alert, certificate_required}, Why);
        {ok, C} -> ?EXPECT({quic, transport_shutdown, C, {tls_alert, certificate_required}})
    end,
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)).

a_strange_client_certificate_is_an_alert(_Config) ->
    #{client := Client} = chain([]),
    #{client := Stranger} = chain([]),
    {L, Port} = listen(#{verify => verify_peer, cacerts => [maps:get(root, Client)]}),
    ?assertMatch({error, {tls_alert, Why}}
                 when Why =:= unknown_ca; Why =:= bad_certificate; Why =:= decrypt_error,
                 connect(Port, client_options(#{cert => maps:get(chain, Stranger),
                                                key => maps:get(key, Stranger)}))),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)).

an_optional_client_certificate(_Config) ->
    #{client := Client} = chain([]),
    {L, Port} = listen(#{verify => verify_peer, cacerts => [maps:get(root, Client)]}),
    {ok, C} = connect(Port, client_options()),
    {ok, S} = macula_quic:accept(L, 5000),
    ?assertEqual({error, no_peercert}, macula_quic:peercert(S)),
    ?assertMatch([{ok, _}, {ok, _}], [macula_quic:handshake(X) || X <- [C, S]]).
