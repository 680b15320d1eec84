%% What can be done to a listener while it serves: new connections refused for a while, other
%% certificates and roots, certificates by name.
-module(macula_quic_listener_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include_lib("public_key/include/public_key.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([a_locked_listener_refuses_new_connections/1, a_locked_listener_refuses_also_with_a_full_backlog/1,
         what_is_accepted_by_a_locked_listener/1, a_closed_listener_cannot_be_changed/1,
         reloading_gives_new_connections_the_new_certificate/1, reloading_disturbs_no_traffic/1,
         reloading_loses_no_handshake/1, reloading_leaves_what_is_not_given/1,
         reloading_reads_files_anew/1, bad_material_leaves_the_old/1, options_that_stay_are_told/1,
         reloading_changes_the_protocols/1,
         reloading_changes_whom_the_listener_trusts/1, no_tickets_for_clients_that_must_show_certificates/1,
         certificates_go_by_the_name_asked_for/1, certificates_by_name_are_reloaded/1,
         wrong_certificates_by_name_are_told/1, no_error_shows_a_key_of_a_host/1,
         a_listener_of_processes_keeps_what_was_changed/1]).
%% A callback module of macula_quic_connection.
-export([init/1, new_conn/3]).

-import(macula_quic_lab, [server_options/1, client_options/1, listen/0, listen/1, pair/3]).

all() -> macula_quic_lab:cases(?MODULE, [init]).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% A certificate for these names that is trusted where it is listed.
cert(Names) ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, Names),
    [{_, Der, _}] = public_key:pem_decode(Cert),
    #{cert => Cert, key => Key, der => Der}.

material(Made) -> maps:with([cert, key], Made).

local() -> cert(["127.0.0.1", "localhost"]).

connect(Port, Options) ->
    macula_quic:connect("127.0.0.1", Port, maps:merge(#{alpn => ["test"]}, Options), 10000).

%% The certificate that a client sees which trusts all of these.
seen(Port, Trusted, Options) ->
    case connect(Port, Options#{cacerts => [Der || #{der := Der} <- Trusted]}) of
        {ok, Conn} ->
            {ok, Der} = macula_quic:peercert(Conn),
            ok = macula_quic:close(Conn),
            {ok, Der};
        Error ->
            Error
    end.

%%--------------------------------------------------------------------------------------------
%% Locked

a_locked_listener_refuses_new_connections(_Config) ->
    {L, Port} = listen(),
    #{client := C, server := S} = Pair = pair(L, Port, #{}),
    ?assertMatch({ok, #{locked := false}}, macula_quic:info(L)),
    [begin
         ok = macula_quic:lock(L),
         ok = macula_quic:lock(L),
         ?assertMatch({ok, #{locked := true, state := open}}, macula_quic:info(L)),
         [?assertEqual({error, connection_refused}, connect(Port, client_options(#{}))) || _ <- [1, 2, 3]],
         ?assertEqual({error, timeout}, macula_quic:accept(L, 0)),
         {Here, There} = macula_quic_lab:stream(Pair),
         ok = macula_quic:send(Here, <<"still here">>, #{fin => true}),
         ?assertEqual(<<"still here">>, macula_quic_lab:read_to_end(There)),
         ok = macula_quic:unlock(L),
         ok = macula_quic:unlock(L),
         #{client := C2} = pair(L, Port, #{}),
         ok = macula_quic:close(C2)
     end || _ <- lists:seq(1, macula_quic_lab:times(5))],
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

a_locked_listener_refuses_also_with_a_full_backlog(_Config) ->
    {L, Port} = listen(#{backlog => 1}),
    {ok, _Waiting} = connect(Port, client_options(#{})),
    macula_test_nodes:wait_until(fun() -> {ok, #{backlog := N}} = macula_quic:info(L), N =:= 1 end),
    ok = macula_quic:lock(L),
    ?assertEqual({error, connection_refused}, connect(Port, client_options(#{}))),
    ok = macula_quic:close(L).

%% What has begun goes on: those that wait to be accepted, and later ones after the end of the lock.
what_is_accepted_by_a_locked_listener(_Config) ->
    {L, Port} = listen(),
    {ok, C} = connect(Port, client_options(#{})),
    macula_test_nodes:wait_until(fun() -> {ok, #{backlog := N}} = macula_quic:info(L), N =:= 1 end),
    ok = macula_quic:lock(L),
    ok = macula_quic:async_accept(L),
    S = ?EXPECT({quic, new_conn, X, _}, X),
    ?assertMatch({ok, S}, macula_quic:handshake(S)),
    {error, connection_refused} = connect(Port, client_options(#{})),
    ?NOTHING({quic, new_conn, _, _}),
    ok = macula_quic:unlock(L),
    {ok, C2} = connect(Port, client_options(#{})),
    ?EXPECT({quic, new_conn, _, _}),
    [ok = macula_quic:close(X) || X <- [C, C2, L]].

a_closed_listener_cannot_be_changed(_Config) ->
    {L, Port} = listen(),
    #{client := C} = pair(L, Port, #{}),
    ok = macula_quic:close(L),
    Calls = [fun macula_quic:lock/1, fun macula_quic:unlock/1,
             fun(Handle) -> macula_quic:reload(Handle, material(local())) end],
    [?assertEqual({error, closed}, Call(L)) || Call <- Calls],
    [?assertEqual({error, badarg}, Call(Wrong)) || Call <- Calls, Wrong <- [C, make_ref(), self()]].

%%--------------------------------------------------------------------------------------------
%% Other certificates

reloading_gives_new_connections_the_new_certificate(_Config) ->
    [Old, New] = Both = [local(), local()],
    {L, Port} = listen(material(Old)),
    {ok, First} = connect(Port, #{cacerts => maps:get(cert, Old)}),
    {ok, S} = macula_quic:accept(L, 5000),
    ok = macula_quic:reload(L, maps:to_list(material(New))),
    ?assertEqual({ok, maps:get(der, New)}, seen(Port, Both, #{})),
    ?assertMatch({error, {bad_cert, _}}, connect(Port, #{cacerts => maps:get(cert, Old)})),
    ok = macula_quic:reload(L, material(Old)),
    ?assertEqual({ok, maps:get(der, Old)}, seen(Port, Both, #{})),
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [First, S]],
    ok = macula_quic:close(L).

%% Streams in both directions, and datagrams one after the other, while the certificates change.
reloading_disturbs_no_traffic(_Config) ->
    {L, Port} = listen(),
    #{client := C, server := S} = Pair = pair(L, Port, #{}),
    {Out, In} = macula_quic_lab:stream(Pair),
    {Back, There} = macula_quic_lab:stream(Pair#{client := S, server := C}),
    Data = crypto:strong_rand_bytes(8 * 1024 * 1024),
    Self = self(),
    [begin
         spawn_link(fun() -> ok = macula_quic:send(From, Data, #{fin => true}) end),
         spawn_link(fun() -> Self ! {read, To, crypto:hash(sha256, macula_quic_lab:read_to_end(To))} end)
     end || {From, To} <- [{Out, In}, {Back, There}]],
    ok = macula_quic:setopt(S, datagrams, true),
    [begin
         ok = macula_quic:reload(L, material(local())),
         ok = macula_quic:send_datagram(C, <<N:32>>),
         ?EXPECT({quic, dgram, S, <<N:32>>})
     end || N <- lists:seq(1, macula_quic_lab:times(50))],
    Hash = crypto:hash(sha256, Data),
    [?EXPECT({read, To, Hash}, ok, 60000) || To <- [In, There]].

%% Also of clients that have just been told to come again with a token.
reloading_loses_no_handshake(_Config) ->
    [begin
         Certs = [local() || _ <- [1, 2, 3]],
         Trust = [Der || #{der := Der} <- Certs],
         {L, Port} = listen((material(hd(Certs)))#{retry => Retry, backlog => 1000}),
         Self = self(),
         Dialers = [spawn_link(fun() ->
             Self ! {self(), [connect(Port, #{cacerts => Trust}) || _ <- lists:seq(1, 10)]}
         end) || _ <- lists:seq(1, 8)],
         reload_until(L, Certs, Dialers)
     end || Retry <- [never, always]].

reload_until(_L, _Certs, []) ->
    ok;
reload_until(L, [Cert | Certs], Dialers) ->
    ok = macula_quic:reload(L, material(Cert)),
    receive
        {Pid, Results} ->
            ?assertEqual([], [Result || Result <- Results, element(1, Result) =/= ok]),
            reload_until(L, Certs ++ [Cert], Dialers -- [Pid])
    after 0 ->
        reload_until(L, Certs ++ [Cert], Dialers)
    end.

reloading_leaves_what_is_not_given(_Config) ->
    [Own, Named, New] = All = [local(), cert(["a.example.org"]), local()],
    {L, Port} = listen((material(Own))#{sni_hosts => #{"a.example.org" => material(Named)}}),
    Asked = #{server_name_indication => "a.example.org"},
    ok = macula_quic:reload(L, []),
    ?assertEqual([{ok, maps:get(der, X)} || X <- [Own, Named]], [seen(Port, All, O) || O <- [#{}, Asked]]),
    ok = macula_quic:reload(L, material(New)),
    ?assertEqual([{ok, maps:get(der, X)} || X <- [New, Named]], [seen(Port, All, O) || O <- [#{}, Asked]]),
    ok = macula_quic:close(L).

reloading_reads_files_anew(Config) ->
    [CertFile, KeyFile] = [filename:join(proplists:get_value(priv_dir, Config), Name)
                           || Name <- ["reloaded.crt", "reloaded.key"]],
    Write = fun(#{cert := Cert, key := Key}) ->
        ok = file:write_file(CertFile, Cert),
        ok = file:write_file(KeyFile, Key)
    end,
    [Old, New] = Both = [local(), local()],
    Write(Old),
    Files = #{certfile => CertFile, keyfile => KeyFile},
    {ok, L} = macula_quic:listen("127.0.0.1", 0, Files#{alpn => ["test"]}),
    {ok, {_, Port}} = macula_quic:sockname(L),
    Write(New),
    ?assertEqual({ok, maps:get(der, Old)}, seen(Port, Both, #{})),
    ok = macula_quic:reload(L, Files),
    ?assertEqual({ok, maps:get(der, New)}, seen(Port, Both, #{})),
    ok = macula_quic:close(L).

bad_material_leaves_the_old(Config) ->
    Missing = filename:join(proplists:get_value(priv_dir, Config), "missing"),
    #{cert := Cert, key := Key} = Old = local(),
    #{cert := NewCert, key := NewKey} = New = local(),
    {L, Port} = listen(material(Old)),
    [begin
         ?assertEqual({Options, {error, Why}}, {Options, macula_quic:reload(L, Options)}),
         ?assertMatch([_ | _], macula_quic:format_error(Why)),
         ?assertEqual({ok, maps:get(der, Old)}, seen(Port, [Old, New], #{}))
     end || {Options, Why} <-
                [{#{cert => NewCert, key => Key}, {bad_key, key_mismatch}},
                 {#{cert => Cert, key => NewKey}, {bad_key, key_mismatch}},
                 {#{cert => NewCert}, {bad_option, cert, {needs, keyfile}}},
                 {#{key => NewKey}, {bad_option, key, {needs, certfile}}},
                 {#{certfile => Missing, keyfile => Missing},
                  {bad_certfile, Missing, enoent}},
                 {#{cert => NewCert, key => NewKey, cacertfile => Missing},
                  {bad_cacertfile, Missing, enoent}},
                 {#{cert => NewCert, key => NewKey, sni_hosts => #{"a" => #{cert => NewCert, key => Key}}},
                  {bad_sni_host, <<"a">>, {bad_key, key_mismatch}}},
                 {#{cert => NewCert, key => NewKey, verify => verify_peer},
                  {bad_option, verify, {needs, cacertfile}}},
                 {#{cert => NewCert, key => NewKey, fail_if_no_peer_cert => true},
                  {bad_option, fail_if_no_peer_cert, {needs, verify_peer}}},
                 {#{cert => NewCert, key => NewKey, verify => verify_none, fail_if_no_peer_cert => true},
                  {bad_option, fail_if_no_peer_cert, {needs, verify_peer}}},
                 {#{cert => NewCert, key => {'PrivateKeyInfo', <<"none">>}}, {bad_key, einval}}]],
    %% A certificate that cannot be read.
    Broken = #{cert => [<<16#30, 3, 1, 2, 3>>], key => NewKey},
    ?assertMatch({error, {bad_cert, _}}, macula_quic:reload(L, Broken)),
    ?assertEqual({ok, maps:get(der, Old)}, seen(Port, [Old, New], #{})),
    ok = macula_quic:close(L).

options_that_stay_are_told(_Config) ->
    {L, _} = listen(),
    [?assertEqual({error, Why}, macula_quic:reload(L, [{Key, Value}]))
     || {Key, Value, Why} <- [{alpn, [], {bad_option, alpn, {wanted, alpn}}},
                              {idle_timeout_ms, 5, {unsupported_option, idle_timeout_ms}},
                              {stateless_reset_key, <<0:256>>, {unsupported_option, stateless_reset_key}},
                              {certifle, "x", {bad_option, certifle, unknown}},
                              {verify, maybe_later, {bad_option, verify, {wanted, verify}}},
                              {retry, sometimes, {bad_option, retry, {wanted, {one_of, [auto, always, never]}}}}]],
    ?assertMatch({error, {bad_option, _, {wanted, options}}}, macula_quic:reload(L, not_options)),
    %% Each of them, with words.
    [begin
        ?assertEqual({Key, {error, {unsupported_option, Key}}}, {Key, macula_quic:reload(L, #{Key => Value})}),
        Words = unicode:characters_to_list(macula_quic:format_error({unsupported_option, Key})),
        ?assertNotEqual(nomatch, string:find(Words, "a listener keeps it"), Words)
     end || {Key, Value} <- macula_quic_options:keys(listen) -- macula_quic_options:keys(reload),
            Value =/= undefined, Value =/= <<>>, not lists:keymember(Key, 1, macula_quic_options:keys(reload))].

reloading_changes_the_protocols(_Config) ->
    {L, Port} = listen(),
    Connect = fun(Alpn) ->
        macula_quic:connect("127.0.0.1", Port, macula_quic_lab:client_options(#{alpn => Alpn, verify => none}), 10000)
    end,
    {ok, Old} = Connect(["test"]),
    {ok, Server} = macula_quic:accept(L, 5000),
    ok = macula_quic:reload(L, #{alpn => ["other", "test2"]}),
    %% What has begun goes on.
    ?assertEqual({ok, Old}, macula_quic:handshake(Old)),
    ?assertEqual({ok, Server}, macula_quic:handshake(Server)),
    ?assertMatch({error, {alpn_mismatch, _}}, Connect(["test"])),
    {ok, New} = Connect(["test2", "other"]),
    ?assertEqual({ok, <<"other">>}, macula_quic:negotiated_protocol(New)),
    %% They stay where others are not given.
    ok = macula_quic:reload(L, material(local())),
    {ok, Newer} = Connect(["test2"]),
    ?assertEqual({ok, <<"test2">>}, macula_quic:negotiated_protocol(Newer)),
    ok = macula_quic:close(L).

%%--------------------------------------------------------------------------------------------
%% Other roots

%% A certificate of a client with the root of its chain.
client_certificate() ->
    Key = [{key, public_key:generate_key({rsa, 2048, 65537})}, {digest, sha256}],
    Side = #{root => Key, intermediates => [], peer => Key},
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Side, client_chain => Side}),
    [Root] = [Ca || Ca <- proplists:get_value(cacerts, Server),
                    public_key:pkix_is_issuer(proplists:get_value(cert, Client), Ca)],
    #{own => #{cert => proplists:get_value(cert, Client), key => proplists:get_value(key, Client)},
      root => Root}.

reloading_changes_whom_the_listener_trusts(_Config) ->
    {L, Port} = listen(),
    [One, Other] = [client_certificate(), client_certificate()],
    Gets = fun(Own) ->
        case connect(Port, client_options(Own)) of
            {ok, C} ->
                %% A server that misses a certificate may tell so only afterwards.
                macula_test_nodes:wait_until(fun() ->
                    receive {quic, transport_shutdown, C, Why} -> {value, {error, Why}}
                    after 0 ->
                        case macula_quic:accept(L, 0) of
                            {ok, S} -> {value, shown(C, S)};
                            {error, timeout} -> false
                        end
                    end
                end);
            Error ->
                Error
        end
    end,
    #{own := #{cert := OneCert} = OneOwn, root := OneRoot} = One,
    #{own := OtherOwn, root := OtherRoot} = Other,
    ?assertEqual({error, no_peercert}, Gets(OneOwn)),
    ok = macula_quic:reload(L, #{verify => verify_peer, cacerts => [OneRoot]}),
    ?assertEqual({ok, OneCert}, Gets(OneOwn)),
    ?assertEqual({error, no_peercert}, Gets(#{})),
    ?assertMatch({error, {tls_alert, _}}, Gets(OtherOwn)),
    ok = macula_quic:reload(L, #{fail_if_no_peer_cert => true, cacerts => [OtherRoot]}),
    ?assertMatch({error, {tls_alert, _}}, Gets(OneOwn)),
    ?assertEqual({ok, maps:get(cert, OtherOwn)}, Gets(OtherOwn)),
    ?assertEqual({error, {tls_alert, certificate_required}}, Gets(#{})),
    ok = macula_quic:reload(L, #{fail_if_no_peer_cert => false}),
    ?assertEqual({error, no_peercert}, Gets(#{})),
    ok = macula_quic:reload(L, #{verify => verify_none}),
    ?assertEqual({error, no_peercert}, Gets(OneOwn)).

shown(C, S) ->
    Shown = macula_quic:peercert(S),
    ok = macula_quic:close(C),
    ?EXPECT({quic, shutdown, S, _}),
    ?EXPECT({quic, closed, C, _}),
    Shown.

no_tickets_for_clients_that_must_show_certificates(_Config) ->
    {L, _Port} = listen(#{resumption => true}),
    #{root := Root} = client_certificate(),
    ?assertEqual({error, {bad_option, verify, {excludes, resumption}}},
                 macula_quic:reload(L, #{verify => verify_peer, cacerts => [Root]})),
    ok = macula_quic:reload(L, material(local())).

%%--------------------------------------------------------------------------------------------
%% Certificates by name

certificates_go_by_the_name_asked_for(_Config) ->
    [Default, Named, Wild] = All = [local(), cert(["a.example.org"]), cert(["*.example.org"])],
    [begin
         {L, Port} = listen((material(Default))#{sni_hosts => Hosts}),
         Asked = fun(Name) -> seen(Port, All, #{server_name_indication => Name}) end,
         ?assertEqual({ok, maps:get(der, Named)}, Asked("a.example.org")),
         ?assertEqual({ok, maps:get(der, Named)}, Asked("A.Example.ORG")),
         ?assertEqual({ok, maps:get(der, Wild)}, Asked("b.example.org")),
         ?assertEqual({ok, maps:get(der, Default)}, Asked("localhost")),
         %% An address is no name to ask for.
         ?assertEqual({ok, maps:get(der, Default)}, seen(Port, All, #{})),
         %% One label alone is in the place of the star; the default certificate has another name.
         [?assertEqual({error, {bad_cert, hostname_check_failed}}, Asked(Name))
          || Name <- ["c.b.example.org", "example.org", "example.com"]],
         %% The server knows what it was asked for.
         {ok, C} = connect(Port, #{cacerts => [maps:get(der, Named)], server_name => "a.example.org"}),
         ok = macula_quic:async_accept(L),
         ?EXPECT({quic, new_conn, _, #{server_name := <<"a.example.org">>}}),
         ok = macula_quic:close(C),
         ok = macula_quic:close(L)
     end || Hosts <- [#{"a.example.org" => material(Named), <<"*.example.org">> => material(Wild)},
                      [{"*.Example.org", maps:to_list(material(Wild))},
                       {"A.EXAMPLE.org", maps:to_list(material(Named))}]]].

certificates_by_name_are_reloaded(_Config) ->
    [Default, One, Other] = All = [local(), cert(["a.example.org"]), cert(["a.example.org"])],
    {L, Port} = listen((material(Default))#{sni_hosts => #{"a.example.org" => material(One)}}),
    Asked = fun() -> seen(Port, All, #{server_name_indication => "a.example.org"}) end,
    ?assertEqual({ok, maps:get(der, One)}, Asked()),
    ok = macula_quic:reload(L, #{sni_hosts => #{"*.example.org" => material(Other)}}),
    ?assertEqual({ok, maps:get(der, Other)}, Asked()),
    ok = macula_quic:reload(L, #{sni_hosts => #{}}),
    ?assertEqual({error, {bad_cert, hostname_check_failed}}, Asked()),
    ok = macula_quic:close(L).

wrong_certificates_by_name_are_told(Config) ->
    Missing = filename:join(proplists:get_value(priv_dir, Config), "missing"),
    #{cert := Cert, key := Key} = local(),
    #{key := OtherKey} = local(),
    Listen = fun(Hosts) -> macula_quic:listen("127.0.0.1", 0, server_options(#{sni_hosts => Hosts})) end,
    Good = #{cert => Cert, key => Key},
    [?assertEqual({Hosts, {error, {bad_option, sni_hosts, {wanted, sni_hosts}}}}, {Hosts, Listen(Hosts)})
     || Hosts <- [x, "a.example.org", #{"" => Good}, #{"a b" => Good}, #{"*" => Good}, #{"a.*.org" => Good},
                  #{"*.*.org" => Good}, #{"a..org" => Good}, #{".org" => Good}, #{a => Good}, #{1 => Good},
                  #{"a" => x}, #{"a" => Good#{verify => verify_peer}}, [{"a", [{cert, Cert} | x]}],
                  [{"a", Good} | x], #{"a" => Good#{password => 1}}, #{lists:duplicate(254, $a) => Good}]],
    [begin
         ?assertEqual({error, {bad_sni_host, <<"a.example.org">>, Why}}, Listen(#{"a.example.org" => Entry})),
         ?assertMatch("for the host a.example.org: " ++ _,
                      macula_quic:format_error({bad_sni_host, <<"a.example.org">>, Why}))
     end || {Entry, Why} <- [{#{}, {bad_option, certfile, missing}},
                             {#{cert => Cert}, {bad_option, cert, {needs, keyfile}}},
                             {#{certfile => Missing, key => Key}, {bad_certfile, Missing, enoent}},
                             {#{cert => Cert, key => OtherKey}, {bad_key, key_mismatch}}]],
    ?assertEqual({error, {unsupported_option, sni_fun}},
                 macula_quic:listen("127.0.0.1", 0, server_options(#{sni_fun => fun(_) -> undefined end}))).

no_error_shows_a_key_of_a_host(_Config) ->
    #{cert := Cert} = local(),
    [begin
         {error, Why} = macula_quic:listen("127.0.0.1", 0, server_options(#{sni_hosts => Hosts})),
         ?assertEqual(nomatch, string:find(io_lib:format("~0p ~ts", [Why, macula_quic:format_error(Why)]), "SECRET"))
     end || Entry <- [#{cert => Cert, key => "SECRET"}, #{cert => Cert, key => <<"SECRET">>},
                      #{cert => Cert, key => {'PrivateKeyInfo', <<"SECRET">>}}, #{key => "SECRET"},
                      #{cert => Cert, key => "SECRET", "SECRET" => 1}, #{password => {"SECRET"}}],
            Hosts <- [#{"a" => Entry}, [{"a", maps:to_list(Entry)}]]].

%%--------------------------------------------------------------------------------------------
%% Of macula_quic_connection

init(_) -> {ok, none}.

new_conn(_Conn, _Props, State) -> {ok, State}.

a_listener_of_processes_keeps_what_was_changed(_Config) ->
    #{cert := OldCert, key := OldKey} = Old = local(),
    New = local(),
    {ok, Sup} = macula_quic_connection:start_listener(
        #{callback => ?MODULE, listen_on => {"127.0.0.1", 0},
          listen_opts => #{certfile => OldCert, keyfile => OldKey, alpn => ["test"]}}),
    First = macula_quic_connection:get_listener(Sup),
    {ok, {_, Port}} = macula_quic:sockname(First),
    ok = macula_quic_connection:reload_listener(Sup, material(New)),
    ok = macula_quic_connection:lock_listener(Sup),
    ?assertMatch({error, {bad_option, _, _}}, macula_quic_connection:reload_listener(Sup, #{key => "none"})),
    ?assertEqual({error, connection_refused}, seen(Port, [Old, New], #{})),
    Primary = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    try
        ok = macula_quic:close_listener(First),
        macula_test_nodes:wait_until(fun() -> macula_quic_connection:get_listener(Sup) =/= First end)
    after
        logger:set_primary_config(Primary)
    end,
    ?assertEqual({error, connection_refused}, seen(Port, [Old, New], #{})),
    ok = macula_quic_connection:unlock_listener(Sup),
    ?assertEqual({ok, maps:get(der, New)}, seen(Port, [Old, New], #{})),
    ?assertEqual(nomatch, string:find(io_lib:format("~p", [sys:get_status(Sup)]), "PRIVATE KEY")),
    ok = gen_server:stop(Sup).
