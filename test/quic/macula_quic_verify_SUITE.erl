%% Certificates about which a function of the user's decides.
-module(macula_quic_verify_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include_lib("public_key/include/public_key.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([a_client_is_asked_about_each_certificate/1, a_server_is_asked_about_each_certificate/1,
         what_was_refused_may_be_accepted/1, a_client_that_refuses_tells_the_server/1,
         a_server_that_refuses_tells_the_client/1, each_reason_has_its_alert/1,
         nothing_is_delivered_before_the_verdict/1, a_slow_verdict_holds_up_nobody_else/1,
         a_late_verdict_is_a_no/1, a_function_that_fails_is_a_no/1, a_dead_function_is_a_no/1,
         a_client_without_a_certificate_is_not_asked_about/1, nothing_is_left_behind/1,
         options_that_do_not_go_together/1, reloading_keeps_the_function/1,
         a_module_that_is_loaded_again_keeps_the_function/1]).

-import(macula_quic_lab, [server_options/1, client_options/1, listen/1]).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% A leaf for localhost with its chain, and its root.
chain() ->
    San = #'Extension'{extnID = ?'id-ce-subjectAltName', critical = false,
                       extnValue = [{dNSName, "localhost"}, {iPAddress, <<127, 0, 0, 1>>}]},
    Key = [{key, public_key:generate_key({rsa, 2048, 65537})}, {digest, sha256}],
    Side = #{root => Key, intermediates => [Key], peer => [{extensions, [San]} | Key]},
    #{server_config := Own, client_config := Other} =
        public_key:pkix_test_data(#{server_chain => Side, client_chain => Side}),
    Leaf = proplists:get_value(cert, Own),
    Cas = lists:usort(proplists:get_value(cacerts, Own) ++ proplists:get_value(cacerts, Other)),
    [Middle] = [Ca || Ca <- Cas, public_key:pkix_is_issuer(Leaf, Ca)],
    [Root] = [Ca || Ca <- Cas, public_key:pkix_is_issuer(Middle, Ca)],
    #{own => #{cert => [Leaf, Middle], key => proplists:get_value(key, Own)}, leaf => Leaf,
      middle => Middle, root => Root}.

%% Tells the test what it is asked, and says the same of everything.
saying(What) ->
    Self = self(),
    {fun(#'OTPCertificate'{}, Der, Event, Told) ->
         Self ! {asked, Event, Der},
         case What of
             {fail, _} -> What;
             _ -> {What, Told + 1}
         end
     end, 0}.

asked() ->
    receive {asked, Event, Der} -> [{Event, Der} | asked()]
    after 0 -> []
    end.

connect(Port, Options) ->
    macula_quic:connect("127.0.0.1", Port, maps:merge(#{alpn => ["test"]}, Options), 10000).

%% A server that asks about clients' certificates.
asking(Options) ->
    listen(maps:merge(#{verify => verify_peer, fail_if_no_peer_cert => true}, Options)).

ed25519() ->
    maps:with([cert, key], macula_quic_lab:ed25519()).

%%--------------------------------------------------------------------------------------------

a_client_is_asked_about_each_certificate(_Config) ->
    #{own := Own, leaf := Leaf, middle := Middle, root := Root} = chain(),
    {L, Port} = listen(Own),
    [begin
         {ok, C} = connect(Port, #{cacerts => [Root], verify_fun => saying(Says), custom_verify => true}),
         ?assertEqual([{valid, Middle}, {valid_peer, Leaf}], asked()),
         ?assertEqual({ok, Leaf}, macula_quic:peercert(C)),
         {ok, S} = macula_quic:accept(L, 5000),
         ok = macula_quic:close(C),
         ?EXPECT({quic, shutdown, S, _})
     end || Says <- [valid, unknown]],
    %% With three arguments, as in ssl.
    {ok, _} = connect(Port, #{cacerts => [Root], verify_fun => {fun(#'OTPCertificate'{}, valid, [1]) -> {valid, [2]};
                                                                   (#'OTPCertificate'{}, valid_peer, [2]) -> {valid_peer, [3]}
                                                                end, [1]}}).

a_server_is_asked_about_each_certificate(_Config) ->
    #{own := Own, leaf := Leaf, middle := Middle, root := Root} = chain(),
    {L, Port} = asking(#{cacerts => [Root], verify_fun => saying(valid)}),
    ok = macula_quic:async_accept(L),
    {ok, _} = connect(Port, client_options(Own)),
    ?EXPECT({quic, new_conn, _, #{peercert := Leaf}}),
    ?assertEqual([{valid, Middle}, {valid_peer, Leaf}], asked()).

what_was_refused_may_be_accepted(_Config) ->
    #{own := Own, leaf := Leaf, middle := Middle} = chain(),
    #{root := Strange} = chain(),
    {L, Port} = asking(Own#{verify_fun => saying(valid)}),
    Client = #{cert := _} = ed25519(),
    {ok, C} = connect(Port, Client#{cacerts => [Strange], verify_fun => saying(valid)}),
    {ok, S} = macula_quic:accept(L, 5000),
    All = asked(),
    ?assertMatch([{{bad_cert, Why}, Leaf}, {valid, Middle}, {valid_peer, Leaf}]
                 when Why =:= unknown_ca; Why =:= invalid_signature,
                 [Asked || {_, Der} = Asked <- All, Der =:= Leaf orelse Der =:= Middle]),
    {ok, Shown} = macula_quic:peercert(S),
    ?assertEqual([{{bad_cert, unknown_ca}, Shown}, {valid_peer, Shown}],
                 [Asked || {_, Der} = Asked <- All, Der =:= Shown]),
    %% What the function does not know stays refused. The listener is there, though nothing here names it any more.
    true = erlang:garbage_collect(),
    ?assertMatch({error, {bad_cert, Why}} when Why =:= unknown_ca; Why =:= invalid_signature,
                 connect(Port, Client#{cacerts => [Strange], verify_fun => saying(unknown)})),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

a_client_that_refuses_tells_the_server(_Config) ->
    {L, Port} = listen(#{}),
    ok = macula_quic:async_accept(L),
    [begin
         ?assertEqual({error, {bad_cert, Reason}},
                      connect(Port, client_options(#{verify_fun => saying({fail, Reason})}))),
         %% Its part of the handshake was done.
         S = ?EXPECT({quic, new_conn, X, _}, X),
         ?EXPECT({quic, transport_shutdown, S, {tls_alert, Alert}}),
         ?NOTHING({quic, _, _, _})
     end || {Reason, Alert} <- [{not_today, bad_certificate}, {{bad_cert, unknown_ca}, unknown_ca},
                                {{deep, ["reason"]}, bad_certificate}]].

a_server_that_refuses_tells_the_client(_Config) ->
    {L, Port} = asking(#{verify_fun => saying({fail, access_denied})}),
    ok = macula_quic:async_accept(L),
    [begin
         case connect(Port, client_options(ed25519())) of
             {ok, C} -> ?EXPECT({quic, transport_shutdown, C, {tls_alert, access_denied}});
             {error, Why} -> ?assertEqual({tls_alert, access_denied}, Why)
         end,
         ?assertMatch([{{bad_cert, unknown_ca}, _}], asked())
     end || _ <- lists:seq(1, macula_quic_lab:times(10))],
    ?NOTHING({quic, new_conn, _, _}),
    ?assertMatch({ok, #{accepted := 0, backlog := 0}}, macula_quic:info(L)).

each_reason_has_its_alert(_Config) ->
    [begin
         {L, Port} = listen(#{}),
         ok = macula_quic:async_accept(L),
         {error, {bad_cert, Reason}} = connect(Port, client_options(#{verify_fun => saying({fail, Reason})})),
         S = ?EXPECT({quic, new_conn, X, _}, X),
         ?EXPECT({quic, transport_shutdown, S, {tls_alert, Alert}}),
         ok = macula_quic:close(L)
     end || {Reason, Alert} <- [{certificate_revoked, certificate_revoked}, {{bad_cert, revoked}, certificate_revoked},
                                {cert_expired, certificate_expired}, {certificate_unknown, certificate_unknown},
                                {unknown_ca, unknown_ca}, {access_denied, access_denied},
                                {<<"anything">>, bad_certificate}]].

%% Says what the test says, when it says so.
held() ->
    Self = self(),
    {fun(_Cert, {bad_cert, _}, State) ->
            Self ! {judging, self()},
            receive
                {say, valid} -> {valid, State};
                {say, Other} -> Other
            end;
        (_Cert, _Event, State) ->
            {valid, State}
     end, none}.

nothing_is_delivered_before_the_verdict(_Config) ->
    {L, Port} = asking(#{verify_fun => held(), handshake_timeout_ms => 60000}),
    ok = macula_quic:async_accept(L),
    {ok, C} = connect(Port, client_options(ed25519())),
    Judge = ?EXPECT({judging, Pid}, Pid),
    {ok, Out} = macula_quic:open_stream(C),
    Data = crypto:strong_rand_bytes(100000),
    ok = macula_quic:send(Out, Data, #{fin => true}),
    ok = macula_quic:send_datagram(C, <<"early">>),
    %% All of it has arrived, and is acknowledged.
    ok = macula_quic:tell_delivered(Out),
    ?EXPECT({quic, delivered, Out, undefined}),
    macula_test_nodes:wait_until(fun() -> macula_quic:getstat(C, [sent_datagrams]) =:= {ok, [{sent_datagrams, 1}]} end),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)),
    ?assertMatch({ok, #{accepted := 0, backlog := 0}}, macula_quic:info(L)),
    ?NOTHING({quic, new_conn, _, _}),
    Judge ! {say, valid},
    S = ?EXPECT({quic, new_conn, X, _}, X),
    {ok, In} = macula_quic:accept_stream(S, #{}, 5000),
    ?assertEqual(Data, macula_quic_lab:read_to_end(In)),
    ok = macula_quic:setopt(S, datagrams, true),
    ?EXPECT({quic, dgram, S, <<"early">>}),
    [ok = macula_quic:close(X) || X <- [C, L]].

a_slow_verdict_holds_up_nobody_else(_Config) ->
    {L, Port} = asking(#{verify_fun => held(), handshake_timeout_ms => 60000}),
    ok = macula_quic:async_accept(L),
    Clients = [begin {ok, C} = connect(Port, client_options(ed25519())), C end || _ <- lists:seq(1, 20)],
    Judges = [?EXPECT({judging, Pid}, Pid) || _ <- Clients],
    %% Another listener, and the later ones of this, are served while twenty are judged.
    #{client := Other} = macula_quic_lab:pair(),
    lists:last(Judges) ! {say, valid},
    First = ?EXPECT({quic, new_conn, X, _}, X),
    ?NOTHING({quic, new_conn, _, _}),
    [Judge ! {say, {fail, no}} || Judge <- lists:droplast(Judges)],
    [?EXPECT({quic, transport_shutdown, _, {tls_alert, bad_certificate}}) || _ <- tl(Clients)],
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [First, Other]],
    ok = macula_quic:close(L).

a_late_verdict_is_a_no(_Config) ->
    {L, Port} = asking(#{verify_fun => held(), handshake_timeout_ms => 3000}),
    ok = macula_quic:async_accept(L),
    {ok, C} = connect(Port, client_options(ed25519())),
    Judge = ?EXPECT({judging, Pid}, Pid),
    Ref = monitor(process, Judge),
    ?EXPECT({quic, transport_shutdown, C, {tls_alert, internal_error}}),
    ?EXPECT({'DOWN', Ref, process, Judge, killed}),
    ?NOTHING({quic, new_conn, _, _}),
    %% A client's time is that of the call.
    {Plain, PlainPort} = listen(#{}),
    Slow = {fun(_, _, _) -> receive never -> ok end end, none},
    ?assertEqual({error, timeout}, macula_quic:connect("127.0.0.1", PlainPort,
                                                       client_options(#{verify_fun => Slow}), 500)),
    [ok = macula_quic:close(X) || X <- [L, Plain]].

quietly(Fun) ->
    Primary = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    try Fun() after logger:set_primary_config(Primary) end.

a_function_that_fails_is_a_no(_Config) ->
    Failing = [{fun(_, _, _) -> error(on_purpose) end, none}, {fun(_, _, _) -> throw(on_purpose) end, none},
               {fun(_, _, _) -> exit(on_purpose) end, none}, {fun(_, _, _) -> nonsense end, none},
               {fun(_, _, _) -> {valid_peer, none} end, none}],
    quietly(fun() ->
        [begin
             #{cert := Cert} = macula_quic_lab:ed25519(),
             {L, Port} = listen(#{}),
             ok = macula_quic:async_accept(L),
             ?assertEqual({error, {bad_cert, verify_fun_failed}},
                          connect(Port, #{cacerts => Cert, verify_fun => Fun})),
             S = ?EXPECT({quic, new_conn, X, _}, X),
             ?EXPECT({quic, transport_shutdown, S, {tls_alert, internal_error}}),
             {Asking, AskingPort} = asking(#{verify_fun => Fun}),
             case connect(AskingPort, client_options(ed25519())) of
                 {ok, C} -> ?EXPECT({quic, transport_shutdown, C, {tls_alert, internal_error}});
                 {error, Why} -> ?assertEqual({tls_alert, internal_error}, Why)
             end,
             ?assertEqual({error, timeout}, macula_quic:accept(Asking, 0)),
             [ok = macula_quic:close(X) || X <- [L, Asking]]
         end || Fun <- Failing]
    end).

%% Whoever kills it.
a_dead_function_is_a_no(_Config) ->
    {L, Port} = asking(#{verify_fun => held(), handshake_timeout_ms => 60000}),
    {ok, C} = connect(Port, client_options(ed25519())),
    Judge = ?EXPECT({judging, Pid}, Pid),
    exit(Judge, kill),
    %% At once, and not when the time for the handshake is up.
    ?EXPECT({quic, transport_shutdown, C, {tls_alert, internal_error}}, ok, 30000),
    ?assertEqual({error, timeout}, macula_quic:accept(L, 0)).

a_client_without_a_certificate_is_not_asked_about(_Config) ->
    {L, Port} = listen(#{verify => verify_peer, verify_fun => saying({fail, no})}),
    {ok, _C} = connect(Port, client_options(#{})),
    {ok, S} = macula_quic:accept(L, 5000),
    ?assertEqual({error, no_peercert}, macula_quic:peercert(S)),
    ?assertEqual([], asked()).

nothing_is_left_behind(_Config) ->
    Count = fun() -> length([P || P <- processes(), {initial_call, {macula_quic_verifier, _, _}}
                                                    <- [process_info(P, initial_call)]]) end,
    Before = Count(),
    %% With the listener, also where its owner dies; with the call, also where its caller dies.
    {L, Port} = asking(#{verify_fun => saying(valid)}),
    {ok, C} = connect(Port, client_options((ed25519())#{verify_fun => saying(valid)})),
    {ok, _} = macula_quic:accept(L, 5000),
    %% That of the call is told to end, and ends a moment later.
    macula_test_nodes:wait_until(fun() -> Count() =:= Before + 1 orelse Count() end),
    ok = macula_quic:close(C),
    ok = macula_quic:close(L),
    {error, eaddrnotavail} = macula_quic:listen("192.0.2.1", 0, server_options(
        #{verify => verify_peer, verify_fun => saying(valid)})),
    ok = macula_quic_lab:in_process(fun() -> {_, _} = asking(#{verify_fun => saying(valid)}), ok end),
    {Plain, PlainPort} = listen(#{}),
    {Pid, Ref} = spawn_monitor(fun() -> connect(PlainPort, client_options(#{verify_fun => {fun(_, _, _) -> receive never -> ok end end, none}})) end),
    macula_test_nodes:wait_until(fun() -> Count() > Before end),
    exit(Pid, kill),
    ?EXPECT({'DOWN', Ref, process, Pid, killed}),
    macula_test_nodes:wait_until(fun() -> Count() =:= Before end),
    ok = macula_quic:close(Plain).

options_that_do_not_go_together(_Config) ->
    Fun = saying(valid),
    Connect = fun(Options) -> connect(1, client_options(Options)) end,
    Listen = fun(Options) -> macula_quic:listen("127.0.0.1", 0, server_options(Options)) end,
    [?assertEqual({Options, {error, {bad_option, Key, Why}}}, {Options, Call(Options)})
     || Call <- [Connect, Listen],
        {Options, Key, Why} <- [{#{custom_verify => true}, custom_verify, {needs, verify_fun}},
                                {#{verify => verify_none, verify_fun => Fun}, verify_fun, {needs, verify_peer}},
                                {#{verify_fun => fun(_) -> ok end}, verify_fun, {wanted, verify_fun}},
                                {#{verify => verify_peer, verify_fun => Fun, resumption => true}, resumption,
                                 {excludes, case Call of
                                     Connect -> verify_fun;
                                     Listen -> verify_peer
                                 end}},
                                {#{custom_verify => 1}, custom_verify, {wanted, boolean}}]],
    {ok, L} = Listen(#{verify => verify_peer, verify_fun => Fun, custom_verify => true}),
    ok = macula_quic:close(L).

%% As by a reloader of code.
a_module_that_is_loaded_again_keeps_the_function(_Config) ->
    {L, Port} = asking(#{verify_fun => saying(valid)}),
    lists:foreach(fun(_) ->
        _ = code:purge(macula_quic_verifier),
        {module, _} = code:load_file(macula_quic_verifier)
    end, [1, 2]),
    {ok, C} = connect(Port, client_options(ed25519())),
    {ok, S} = macula_quic:accept(L, 5000),
    [ok = macula_quic:close(Handle) || Handle <- [C, S, L]].

reloading_keeps_the_function(_Config) ->
    {L, Port} = asking(#{verify_fun => saying(valid)}),
    ok = macula_quic:reload(L, ed25519()),
    ok = macula_quic:reload(L, #{fail_if_no_peer_cert => false}),
    {ok, _} = connect(Port, (ed25519())#{verify_fun => {fun(_, _, S) -> {valid, S} end, none},
                                         cacerts => maps:get(cert, macula_quic_lab:credentials())}),
    {ok, S} = macula_quic:accept(L, 5000),
    {ok, Shown} = macula_quic:peercert(S),
    ?assertEqual([{{bad_cert, unknown_ca}, Shown}, {valid_peer, Shown}], asked()).
