%% Sessions that are resumed: who knows whom again, and who must not.
-module(macula_quic_resumption_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([both_ends_know_that_a_session_is_resumed/1, nothing_is_resumed_unless_both_ends_want_it/1,
         a_resumed_session_carries_data_and_gives_tickets/1,
         servers_with_a_secret_in_common_know_each_others_clients/1,
         a_restarted_server_knows_its_clients/1, secrets_are_changed_while_a_listener_serves/1,
         a_ticket_ends_with_its_lifetime/1,
         clients_that_verify_differently_share_no_tickets/1,
         a_certificate_is_verified_whatever_was_accepted_before/1,
         listeners_that_verify_clients_give_no_tickets/1, a_client_with_a_certificate_is_known_again/1,
         a_server_with_another_name_is_another_server/1, several_dials_at_a_time/1,
         secrets_are_not_shown/1, a_connection_process_is_told/1]).

-import(macula_quic_lab, [listen/1, client_options/1, server_options/1]).

all() -> macula_quic_lab:cases(?MODULE, []).

suite() ->
    [{timetrap, {minutes, 2}}].

init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% Clients of one case have a server name, and with it tickets, of their own: each case has credentials
%% that nobody else has.
fresh() ->
    #{cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    {#{cert => Cert, key => Key, alpn => ["test"], resumption => true},
     #{cacerts => Cert, alpn => ["test"], resumption => true}}.

serve(Options) ->
    {ok, Listener} = macula_quic:listen("127.0.0.1", 0, Options),
    {ok, {_, Port}} = macula_quic:sockname(Listener),
    {Listener, Port}.

connect({Listener, Port}, Options) ->
    {ok, Client} = macula_quic:connect("127.0.0.1", Port, Options, 10000),
    {ok, Server} = macula_quic:accept(Listener, 10000),
    {Client, Server}.

resumed({Client, Server}) ->
    [{ok, #{resumed := Here}}, {ok, #{resumed := There}}] = [macula_quic:info(C) || C <- [Client, Server]],
    ?assertEqual(Here, There),
    Here.

%% A connection, whether it was resumed, and its end.
once(Serving, Options) ->
    {Client, Server} = Pair = connect(Serving, Options),
    Resumed = resumed(Pair),
    ok = macula_quic:close(Client),
    ?EXPECT({quic, shutdown, Server, _}),
    ?EXPECT({quic, closed, Client, normal}),
    Resumed.

%% The same, when the client has a ticket.
once_with_ticket(Serving, Options) ->
    {Client, Server} = Pair = connect(Serving, Options),
    Resumed = resumed(Pair),
    ?EXPECT({quic, nst_received, Client, <<>>}),
    ok = macula_quic:close(Client),
    ?EXPECT({quic, shutdown, Server, _}),
    ?EXPECT({quic, closed, Client, normal}),
    Resumed.

both_ends_know_that_a_session_is_resumed(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Listener, Port} = Serving = serve(ServerOptions),
    {C1, S1} = First = connect(Serving, ClientOptions),
    ?assertNot(resumed(First)),
    ?EXPECT({quic, nst_received, C1, <<>>}),
    [?NOTHING({quic, resumed, C, _}) || C <- [C1, S1]],
    ok = macula_quic:async_accept(Listener),
    {ok, C2} = macula_quic:connect("127.0.0.1", Port, ClientOptions, 10000),
    {S2, Info} = ?EXPECT({quic, new_conn, Conn, I}, {Conn, I}),
    ?assertMatch(#{resumed := true}, Info),
    ?assert(resumed({C2, S2})),
    [?EXPECT({quic, resumed, C, false}) || C <- [C2, S2]],
    %% The certificate that was verified then.
    ?assertEqual(macula_quic:peercert(C1), macula_quic:peercert(C2)),
    ?assertMatch({ok, _}, macula_quic:peercert(C2)),
    ?assertEqual({ok, <<"test">>}, macula_quic:negotiated_protocol(C2)),
    ?assertEqual({ok, <<"test">>}, macula_quic:negotiated_protocol(S2)).

nothing_is_resumed_unless_both_ends_want_it(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Wants = serve(ServerOptions),
    Not = serve(maps:remove(resumption, ServerOptions)),
    Off = maps:remove(resumption, ClientOptions),
    [[?assertNot(once(Serving, Options)) || _ <- [1, 2, 3]]
     || {Serving, Options} <- [{Wants, Off}, {Not, ClientOptions}, {Not, Off}]],
    ?NOTHING({quic, nst_received, _, _}),
    ?NOTHING({quic, resumed, _, _}).

a_resumed_session_carries_data_and_gives_tickets(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Serving = serve(ServerOptions),
    ?assertNot(once_with_ticket(Serving, ClientOptions)),
    [begin
         {Client, Server} = Pair = connect(Serving, ClientOptions),
         ?assert(resumed(Pair)),
         {Here, There} = macula_quic_lab:stream(#{client => Client, server => Server}),
         Data = crypto:strong_rand_bytes(100000),
         ok = macula_quic:send(Here, Data, #{fin => true}),
         ?assert(Data =:= macula_quic_lab:read_to_end(There)),
         ?EXPECT({quic, nst_received, Client, <<>>})
     end || _ <- lists:seq(1, 10)].

servers_with_a_secret_in_common_know_each_others_clients(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    [A, B, C] = [crypto:strong_rand_bytes(32) || _ <- [1, 2, 3]],
    Servers = [serve(ServerOptions#{resumption_keys => Keys}) || Keys <- [[A, B], [B, A], B]],
    Stranger = serve(ServerOptions#{resumption_keys => [C]}),
    [S1, S2, S3] = Servers,
    ?assertNot(once_with_ticket(S1, ClientOptions)),
    ?assert(once_with_ticket(S2, ClientOptions)),
    ?assert(once_with_ticket(S3, ClientOptions)),
    ?assert(once_with_ticket(S1, ClientOptions)),
    %% Its ticket is sealed with the secret that the third one does not have.
    ?assertNot(once_with_ticket(S3, ClientOptions)),
    ?assertNot(once_with_ticket(Stranger, ClientOptions)).

a_restarted_server_knows_its_clients(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Restarted = fun(Options) ->
        {Listener, _} = Serving = serve(Options),
        Resumed = once_with_ticket(Serving, ClientOptions),
        ok = macula_quic:close_listener(Listener),
        Resumed
    end,
    Keyed = ServerOptions#{resumption_keys => crypto:strong_rand_bytes(32)},
    ?assertEqual([false, true, true], [Restarted(Keyed) || _ <- [1, 2, 3]]),
    %% One without a secret has another each time.
    ?assertEqual([false, false, false], [Restarted(ServerOptions) || _ <- [1, 2, 3]]).

secrets_are_changed_while_a_listener_serves(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    [Old, New] = [crypto:strong_rand_bytes(48) || _ <- [1, 2]],
    {Listener, _} = Serving = serve(ServerOptions#{resumption_keys => [Old]}),
    ?assertNot(once_with_ticket(Serving, ClientOptions)),
    ok = macula_quic:setopt(Listener, resumption_keys, [New, Old]),
    ?assert(once_with_ticket(Serving, ClientOptions)),
    ok = macula_quic:setopt(Listener, resumption_keys, New),
    ?assert(once_with_ticket(Serving, ClientOptions)),
    ok = macula_quic:setopt(Listener, resumption_keys, [Old]),
    ?assertNot(once(Serving, ClientOptions)),
    Wanted = {error, {bad_option, resumption_keys, {wanted, secrets}}},
    [?assertEqual(Wanted, macula_quic:setopt(Listener, resumption_keys, Keys))
     || Keys <- [[], <<>>, <<1:248>>, [Old, short], [Old | Old], undefined,
                 [Old || _ <- lists:seq(1, 17)]]],
    {Plain, _} = serve(maps:remove(resumption, ServerOptions)),
    ?assertEqual({error, {bad_option, resumption_keys, {needs, resumption}}},
                 macula_quic:setopt(Plain, resumption_keys, [Old])),
    ?assertEqual({error, badarg}, macula_quic:setopt(make_ref(), resumption_keys, [Old])).

a_ticket_ends_with_its_lifetime(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Keys = #{resumption_keys => crypto:strong_rand_bytes(32)},
    Long = serve(maps:merge(ServerOptions, Keys#{resumption_lifetime_s => 604800})),
    Short = serve(maps:merge(ServerOptions, Keys#{resumption_lifetime_s => 1})),
    ?assertNot(once_with_ticket(Long, ClientOptions)),
    Begin = erlang:monotonic_time(millisecond),
    %% The server that takes it counts, and the clock has whole seconds.
    ?assert(once_with_ticket(Long, ClientOptions)),
    {Client, _} = connect(Long, ClientOptions),
    ?EXPECT({quic, nst_received, Client, <<>>}),
    receive after max(0, Begin + 3000 - erlang:monotonic_time(millisecond)) -> ok end,
    ?assertNot(once(Short, ClientOptions)).

%% A ticket stands for how the server was verified then.
clients_that_verify_differently_share_no_tickets(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    #{public := Public, cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    Serving = serve((ServerOptions)#{alpn => ["test", "other"]}),
    #{cacerts := Trusted} = ClientOptions,
    None = (maps:remove(cacerts, ClientOptions))#{verify => verify_none},
    Kinds = [ClientOptions, None, ClientOptions#{alpn => ["test", "other"]},
             ClientOptions#{alpn => ["other", "test"]}, ClientOptions#{sni => "localhost"},
             ClientOptions#{cacerts => [der(Trusted), der(Cert)]},
             ClientOptions#{cert => Cert, key => Key}],
    [begin
         ?assertNot(once_with_ticket(Serving, Kind)),
         ?assert(once_with_ticket(Serving, Kind))
     end || Kind <- Kinds],
    %% Each of them still has its own.
    [?assert(once_with_ticket(Serving, Kind)) || Kind <- lists:reverse(Kinds)],
    %% A pinned key, of another server.
    Pinned = serve(ServerOptions#{cert => Cert, key => Key}),
    Pin = (maps:remove(cacerts, ClientOptions))#{verify_pubkey => Public},
    ?assertNot(once_with_ticket(Pinned, Pin)),
    ?assert(once_with_ticket(Pinned, Pin)),
    ?assertEqual({error, {bad_cert, pubkey_mismatch}}, refused(Serving, Pin)).

der(Pem) ->
    [{_, Der, not_encrypted}] = public_key:pem_decode(Pem),
    Der.

refused({_, Port}, Options) ->
    macula_quic:connect("127.0.0.1", Port, Options, 10000).

%% Also by a server that knows the session, and is trusted no more.
a_certificate_is_verified_whatever_was_accepted_before(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    #{cert := Other} = macula_quic_lab:ed25519(),
    Serving = serve(ServerOptions),
    None = (maps:remove(cacerts, ClientOptions))#{verify => verify_none},
    ?assertNot(once_with_ticket(Serving, None)),
    ?assert(once_with_ticket(Serving, None)),
    Distrusts = ClientOptions#{cacerts => Other},
    [?assertMatch({error, {bad_cert, _}}, refused(Serving, Distrusts)) || _ <- [1, 2]],
    ?assertNot(once_with_ticket(Serving, ClientOptions)),
    [?assertMatch({error, {bad_cert, _}}, refused(Serving, Distrusts)) || _ <- [1, 2]],
    %% The server's certificate is another one, and the ticket of no use to it: a full handshake tells.
    {OtherServer, _} = fresh(),
    {Impostor, _} = Another = serve(OtherServer),
    ?assertMatch({error, {bad_cert, _}}, refused(Another, ClientOptions)),
    ok = macula_quic:close(Impostor).

listeners_that_verify_clients_give_no_tickets(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    #{cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    Verifies = ServerOptions#{verify => verify_peer, cacerts => Cert},
    [?assertEqual({error, {bad_option, resumption, {excludes, verify_peer}}},
                  macula_quic:listen("127.0.0.1", 0, Options))
     || Options <- [Verifies, Verifies#{fail_if_no_peer_cert => true},
                    Verifies#{resumption_keys => crypto:strong_rand_bytes(32)},
                    (maps:remove(resumption, Verifies))#{server_resumption_level => 1}]],
    ?assertEqual({error, {bad_option, resumption_keys, {needs, resumption}}},
                 macula_quic:listen("127.0.0.1", 0, Verifies#{resumption => false,
                                                             resumption_keys => <<1:256>>})),
    %% And takes none that others have given.
    Serving = serve(Verifies#{resumption => false, fail_if_no_peer_cert => true}),
    Open = serve(ServerOptions),
    Shows = ClientOptions#{cert => Cert, key => Key},
    ?assertNot(once_with_ticket(Open, Shows)),
    [begin
         {_, Server} = Pair = connect(Serving, Shows),
         ?assertNot(resumed(Pair)),
         ?assertEqual({ok, der(Cert)}, macula_quic:peercert(Server))
     end || _ <- [1, 2]],
    ?assertNot(once_with_ticket(Open, ClientOptions)),
    %% Without a certificate nobody gets in, with or without a ticket.
    {_, Port} = Serving,
    Outcome = case macula_quic:connect("127.0.0.1", Port, ClientOptions, 10000) of
        {ok, Conn} -> ?EXPECT({quic, transport_shutdown, Conn, Why}, Why);
        {error, Why} -> Why
    end,
    ?assertEqual({tls_alert, certificate_required}, Outcome).

a_client_with_a_certificate_is_known_again(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    #{cert := Cert, key := Key} = macula_quic_lab:ed25519(),
    Serving = serve(ServerOptions),
    Shows = ClientOptions#{cert => Cert, key => Key},
    ?assertNot(once_with_ticket(Serving, Shows)),
    ?assert(once_with_ticket(Serving, Shows)),
    ?assertNot(once_with_ticket(Serving, ClientOptions)).

a_server_with_another_name_is_another_server(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Serving = serve(ServerOptions),
    Named = ClientOptions#{server_name => "localhost"},
    ?assertNot(once_with_ticket(Serving, ClientOptions)),
    ?assertNot(once_with_ticket(Serving, Named)),
    ?assert(once_with_ticket(Serving, ClientOptions)),
    ?assert(once_with_ticket(Serving, Named)).

%% Each takes a ticket that no other takes, or none.
several_dials_at_a_time(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    {Listener, Port} = Serving = serve(ServerOptions),
    ?assertNot(once_with_ticket(Serving, ClientOptions)),
    Self = self(),
    [begin
         Pids = [spawn_link(fun() ->
             {ok, Conn} = macula_quic:connect("127.0.0.1", Port, ClientOptions, 20000),
             {ok, #{resumed := Resumed}} = macula_quic:info(Conn),
             Self ! {self(), Resumed},
             receive stop -> macula_quic:close(Conn) end
         end) || _ <- lists:seq(1, 20)],
         Servers = [begin {ok, S} = macula_quic:accept(Listener, 20000), S end || _ <- Pids],
         Here = [?EXPECT({Pid, Resumed}, Resumed) || Pid <- Pids],
         There = [begin {ok, #{resumed := R}} = macula_quic:info(S), R end || S <- Servers],
         ?assertEqual(lists:sort(Here), lists:sort(There)),
         ?assert(lists:member(true, Here)),
         [Pid ! stop || Pid <- Pids],
         [?EXPECT({quic, shutdown, S, _}) || S <- Servers]
     end || _ <- [1, 2, 3]].

secrets_are_not_shown(_Config) ->
    {ServerOptions, _} = fresh(),
    Secret = <<"a secret of tickets, 32 bytes long">>,
    Shown = fun(Term) ->
        string:find(lists:flatten(io_lib:format("~p ~s", [Term, macula_quic:format_error(Term)])),
                    "secret of")
    end,
    Errors = [macula_quic:listen("127.0.0.1", 0, ServerOptions#{resumption_keys => Keys})
              || Keys <- [[Secret, "a secret of 5"], {Secret}, [binary_to_list(Secret)]]],
    [begin
         ?assertEqual({error, {bad_option, resumption_keys, {wanted, secrets}}}, Error),
         ?assertEqual(nomatch, Shown(Error))
     end || Error <- Errors],
    {Listener, _} = serve(ServerOptions#{resumption_keys => Secret}),
    ?assertEqual(nomatch, Shown(macula_quic:info(Listener))),
    ?assertEqual(nomatch, Shown(macula_quic:setopt(Listener, resumption_keys, [Secret, Secret | x]))),
    {ok, Sup} = macula_quic_connection:start_listener(
        #{callback => macula_quic_script:module([{init, 1}, {new_conn, 3}]), acceptors => 1,
          listen_on => {"127.0.0.1", 0}, listen_opts => ServerOptions#{resumption_keys => Secret},
          conn_opts => script()}),
    ?assertEqual(nomatch, Shown(sys:get_status(Sup))),
    {init, _, [Args]} = ?EXPECT({init, _, _} = Call, Call),
    ?assertNot(is_map_key(resumption_keys, Args)),
    unlink(Sup),
    exit(Sup, shutdown).

script() ->
    #{tell => self(), script => fun(_, _, _) -> default end}.

a_connection_process_is_told(_Config) ->
    {ServerOptions, ClientOptions} = fresh(),
    Module = macula_quic_script:module([{init, 1}, {new_conn, 3}, {connected, 3}, {resumed, 3},
                                        {nst_received, 3}, {closed, 3}]),
    {ok, Sup} = macula_quic_connection:start_listener(
        #{callback => Module, acceptors => 1, listen_on => {"127.0.0.1", 0}, conn_opts => script(),
          listen_opts => ServerOptions}),
    {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Sup)),
    [begin
         {ok, Client} = macula_quic_connection:start_link(
             Module, {"127.0.0.1", Port}, {maps:merge(ClientOptions, script()), #{}}),
         [Conn, Connected] = ?EXPECT({connected, Client, Args}, Args),
         ?assertMatch(#{is_resumed := Resumed}, Connected),
         {Server, [There, Props]} = ?EXPECT({new_conn, Pid, Args}, {Pid, Args}),
         ?assertMatch(#{resumed := Resumed}, Props),
         ?EXPECT({connected, Server, [There, #{is_resumed := Resumed}]}),
         ?EXPECT({nst_received, Client, [Conn, <<>>]}),
         [?EXPECT({resumed, Pid, [C, false]}) || {Pid, C} <- [{Client, Conn}, {Server, There}], Resumed],
         [?assertMatch(#{is_resumed := Resumed}, sys:get_state(Pid)) || Pid <- [Client, Server]],
         ok = macula_quic:close(Conn),
         [?EXPECT({closed, Pid, _}) || Pid <- [Client, Server]],
         [gen_server:stop(Pid) || Pid <- [Client, Server]],
         ?NOTHING({resumed, _, _})
     end || Resumed <- [false, true, true]],
    unlink(Sup),
    exit(Sup, shutdown).
