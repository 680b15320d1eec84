%% No error, log line, crash report or status shows a secret's value: secrets with a mark in them are put
%% everywhere, all that can fail is made to fail, and whatever is said of it is searched for the mark.
-module(macula_secrets_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([errors_of_quic_show_no_secret/1, a_key_for_a_file_name_is_not_shown/1,
         a_self_signed_certificate_shows_no_key/1, errors_of_peering_show_no_secret/1,
         errors_of_identities_show_no_secret/1, status_and_crashes_of_peering_show_no_secret/1,
         a_failure_with_the_key_in_hand_shows_none/1]).
-export([log/2]).

-define(MARK, "S3cr3tM4rk3rV4lue").

all() ->
    [errors_of_quic_show_no_secret, a_key_for_a_file_name_is_not_shown,
     a_self_signed_certificate_shows_no_key, errors_of_peering_show_no_secret,
     errors_of_identities_show_no_secret, status_and_crashes_of_peering_show_no_secret,
     a_failure_with_the_key_in_hand_shows_none].

init_per_suite(Config) ->
    {ok, Started} = application:ensure_all_started(macula),
    [{started, Started} | Config].

end_per_suite(Config) ->
    [application:stop(App) || App <- lists:reverse(proplists:get_value(started, Config))],
    ok.

init_per_testcase(_Case, Config) ->
    Log = ets:new(?MODULE, [public, ordered_set]),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, all),
    ok = logger:add_handler(?MODULE, ?MODULE, #{level => all, config => Log}),
    [{log, Log}, {level, Level} | Config].

end_per_testcase(_Case, Config) ->
    ok = logger:remove_handler(?MODULE),
    ok = logger:set_primary_config(level, proplists:get_value(level, Config)).

%% A logger handler: whatever is logged, in full.
log(Event, #{config := Log}) ->
    Text = logger_formatter:format(Event, #{depth => unlimited}),
    true = ets:insert(Log, {erlang:unique_integer([monotonic]), [Text, io_lib:format("~w", [Event])]}).

%%--------------------------------------------------------------------------------------------

%% 32 bytes, as keys and seeds have.
seed() ->
    <<?MARK, 0:(8 * (32 - length(?MARK)))>>.

pem() ->
    Body = base64:encode(<<16#30, 16#2e, 2, 1, 0, 16#30, 5, 6, 3, 16#2b, 16#65, 16#70, 4, 16#22, 4, 16#20,
                           (seed())/binary>>),
    <<"-----BEGIN PRIVATE KEY-----\n", Body/binary, "\n-----END PRIVATE KEY-----\n">>.

%% What people have in their hands when they mean a key.
secrets() ->
    [Begin, Body | _] = binary:split(pem(), <<"\n">>, [global]),
    Texts = [<<?MARK>>, seed(), pem(), Body, <<Body/binary, "\n">>, <<Begin/binary, "\n", Body/binary>>,
             binary:part(pem(), 3, byte_size(pem()) - 3), <<"/", Body/binary>>, <<"a/", Body/binary>>,
             base64:encode(seed()), binary:encode_hex(seed())],
    Texts ++ [binary_to_list(T) || T <- Texts].

shapes(S) ->
    [S, {S}, {der, S}, {'PrivateKeyInfo', S}, {'RSAPrivateKey', S, S}, [S], [S | tail], [{S}], #{S => S},
     #{private => S}, #{key => S}, fun() -> S end, fun() -> error(S) end].

%% A value under a key of options, and beside all of them.
placed(Key, V) ->
    [[{Key, V}], #{Key => V}, {Key, V}, [{Key, V, V}], [{V, Key}], #{V => Key}, [V], V, [{{Key, V}, true}]].

%% In each form in which a term, or a text in a log, could have it.
marks() ->
    <<_:2/binary, Middle:12/binary, _/binary>> = <<?MARK>>,
    Bytes = lists:flatten(lists:join(",", [integer_to_list(B) || <<B>> <= Middle])),
    %% In base64 it depends on where in a group of three the mark begins.
    Encoded = [binary:part(base64:encode(<<0:(8 * N), ?MARK>>), 4, 16) || N <- [0, 1, 2]],
    [Middle, list_to_binary(Bytes), string:uppercase(binary:encode_hex(Middle)),
     string:lowercase(binary:encode_hex(Middle)) | Encoded].

shows(Term) ->
    Text = unicode:characters_to_binary(io_lib:format("~0tp ~w ~ts", [Term, Term, words(Term)])),
    is_marked(Text).

is_marked(Text) ->
    binary:match(Text, marks()) =/= nomatch.

words({error, Reason}) ->
    [macula_quic:format_error(Reason), unicode:characters_to_binary(macula_peering:format_reason(Reason))];
words(_) ->
    "".

%% What a call gives, or how it fails.
outcome(Call) ->
    try Call() of
        {ok, _} -> ok;
        Result -> Result
    catch
        Class:Reason:Stack -> {Class, Reason, Stack}
    end.

-define(SILENT(Calls, Config), silent(?FUNCTION_NAME, Calls, Config)).

%% Calls are pairs of a description and a function.
silent(_Case, Calls, Config) ->
    Shown = [{What, Outcome} || {What, Call} <- Calls, Outcome <- [outcome(Call)], shows(Outcome)],
    ?assertEqual({0, []}, {length(Shown), lists:sublist(Shown, 3)}),
    ?assertEqual([], logged_marks(Config)).

logged_marks(Config) ->
    [Text || {_, Event} <- ets:tab2list(proplists:get_value(log, Config)),
             Text <- [unicode:characters_to_binary(Event)], is_marked(Text)].

%%--------------------------------------------------------------------------------------------

the_search_finds() ->
    Forms = secrets() ++ [binary_to_list(seed()), lists:flatten(io_lib:format("~w", [seed()]))],
    ?assertEqual([], [F || F <- Forms, not shows(F)]),
    ?assertNot(shows({error, {bad_option, key, "a file name, PEM, or DER is wanted"}})).

errors_of_quic_show_no_secret(Config) ->
    the_search_finds(),
    #{cert := Cert, key := Good} = macula_quic_lab:credentials(),
    Keys = fun(Role) ->
        %% What is given as sslkeylogfile is the name of a file that is there then.
        [Key || {Key, _} <- macula_quic_options:keys(Role), Key =/= sslkeylogfile]
            ++ [certkey, ticket_keys, nosuch, ciphers]
    end,
    Few = [<<?MARK>>, ?MARK, pem()],
    Calls = [{{connect, O}, fun() -> macula_quic:connect("127.0.0.1", 1, O, 50) end}
             || Key <- Keys(connect), S <- Few, V <- shapes(S), O <- placed(Key, V),
                %% A name to ask for, which anybody sees on the wire.
                Key =/= server_name_indication, Key =/= alpn]
        ++ [{{listen, O}, fun() -> macula_quic:listen({"127.0.0.1", 0}, O) end}
            || Key <- Keys(listen), Key =/= alpn, S <- Few, V <- shapes(S), O <- placed(Key, V)]
        ++ [{{with_cert, O}, fun() -> macula_quic:listen({"127.0.0.1", 0}, O#{cert => Cert}) end}
            || Key <- [key, keyfile, password, certfile], S <- secrets(), V <- shapes(S),
               O <- [#{Key => V}, #{Key => V, key => Good}]]
        ++ [{{Key, V}, fun() -> macula_quic:setopt(make_ref(), Key, V) end}
            || V <- Few, Key <- [active, priority, datagrams, nosuch, V]]
        ++ [{{getstat, N}, fun() -> macula_quic:getstat(make_ref(), N) end} || S <- Few, N <- shapes(S)],
    ?assert(length(Calls) > 10000),
    ?SILENT(Calls, Config).

%% Also where the rest is right, and in each place for a file.
a_key_for_a_file_name_is_not_shown(Config) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    Right = #{cert => Cert, key => Key, verify => verify_peer, cacerts => Cert},
    Calls = [{{Role, Place, S}, fun() -> Call(maps:put(Place, S, maps:without([Other], Right))) end}
             || {Role, Call} <- [{listen, fun(O) -> macula_quic:listen({"127.0.0.1", 0}, O) end},
                                 {connect, fun(O) -> macula_quic:connect("127.0.0.1", 1, O, 50) end}],
                {Place, Other} <- [{certfile, cert}, {cert, certfile}, {keyfile, key}, {key, keyfile},
                                   {cacerts, cacertfile}],
                S <- secrets()],
    ?SILENT(Calls, Config),
    [?assertMatch({error, {bad_keyfile, Place, enoent}},
                  macula_quic:listen({"127.0.0.1", 0}, #{cert => Cert, Place => ?MARK}))
     || Place <- [key, keyfile]],
    %% The name of a file that could be there is shown, or nobody would find the fault.
    Dir = proplists:get_value(priv_dir, Config),
    Absent = filename:join(Dir, "absent.pem"),
    ?assertEqual({error, {bad_keyfile, Absent, enoent}},
                 macula_quic:listen({"127.0.0.1", 0}, #{cert => Cert, keyfile => Absent})).

a_self_signed_certificate_shows_no_key(Config) ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    Odd = [S ++ " " || S <- secrets(), is_list(S)],
    Calls = [{A, fun() -> apply(macula_quic, generate_self_signed_cert, A) end}
             || S <- Odd ++ secrets(), V <- shapes(S),
                A <- [[Public, V, ["x"]], [V, Private, ["x"]], [Public, Private, V],
                      [Public, Private, ["x", V]], [Public, Private, ["x" | V]]]],
    ?SILENT(Calls, Config),
    ?assertEqual({error, {bad_san, 2}},
                 macula_quic:generate_self_signed_cert(Public, Private, ["x", "ünï"])),
    ?assertEqual({error, {bad_san, 3}},
                 macula_quic:generate_self_signed_cert(Public, Private, ["x", <<"y">>, {z}])).

errors_of_peering_show_no_secret(Config) ->
    Id = macula_identity:generate(),
    Good = #{connect => #{identity => Id, target => #{host => "127.0.0.1", port => 1, timeout_ms => 50}},
             listen => #{identity => Id, port => 0}, accept => #{identity => Id}},
    Start = fun(connect, O) -> macula_peering:connect(O);
               (listen, O) -> macula_peering:listen(O);
               (accept, O) -> macula_peering:accept(make_ref(), O)
            end,
    Few = [?MARK, <<?MARK>>, seed()],
    Wrong = fun(Role, Key, V) ->
        [(maps:get(Role, Good))#{Key => V}, #{Key => V}, [{Key, V}], (maps:get(Role, Good))#{V => Key}, V]
    end,
    %% What stands in CONNECT, or says where to find somebody, is no secret.
    Public = [station_id, realms, addresses, site, endorsements, sans, alpn, target, address, controlling_pid],
    Calls = [{{Role, O}, fun() -> Start(Role, O) end}
             || Role <- [connect, listen, accept],
                Key <- [nosuch, private, key | macula_peering_opts:keys(Role) -- Public],
                S <- Few, V <- shapes(S), O <- Wrong(Role, Key, V)]
        ++ [{{target, T}, fun() -> macula_peering:connect(#{identity => Id, target => T}) end}
            || Key <- [node_id, tls, timeout_ms, cacertfile, nosuch], S <- Few, V <- shapes(S),
               T <- [#{host => "127.0.0.1", port => 1, Key => V}, #{V => Key}, V]]
        ++ [{{F, A}, fun() -> apply(macula_peering, F, A) end}
            || S <- Few, V <- shapes(S),
               {F, A} <- [{close, [self(), V]}, {setopts, [self(), V]}, {setopts, [self(), [{active, V}]]},
                          {setopts, [self(), [{V, 1}]]}, {subscribe, [self(), V]},
                          {subscribe, [self(), self(), V]}, {send_frame, [self(), #{}, V]}],
               not (F =:= close andalso is_tuple(V) andalso element(1, V) =:= text)],
    ?SILENT(Calls, Config).

errors_of_identities_show_no_secret(Config) ->
    Path = filename:join(proplists:get_value(priv_dir, Config), "id.key"),
    Ping = macula_frame:ping(#{nonce => <<0:128>>}),
    Calls = [{{M, F, A}, fun() -> apply(M, F, A) end}
             || S <- secrets(), V <- shapes(S),
                {M, F, A} <- [{macula_identity, generate, [V]},
                              {macula_identity, generate, [#{puzzle_bits => V}]},
                              {macula_identity, generate, [#{puzzle_bits => 0, timeout => V}]},
                              {macula_identity, start_search, [V]},
                              {macula_identity, from_seed, [V]}, {macula_identity, from_pem, [V]},
                              {macula_identity, load, [V]}, {macula_identity, save, [V, Path]},
                              {macula_identity, save, [make_ref(), Path, V]},
                              {macula_identity, public, [V]}, {macula_identity, sign, ["m", V]},
                              {macula_identity, seed, [V]}, {macula_identity, to_pem, [V]},
                              {macula_identity, ensure, [V]},
                              {macula_frame, sign, [Ping, V]}, {macula_frame, sign_encode, [Ping, V]},
                              {macula_frame, sign_encode, [Ping, V, #{}]},
                              {macula_frame, sign_encode_many, [[Ping], V]},
                              {macula_frame, sign_update, [#{}, V]}],
                %% The one that is right gives the signed frame.
                not (M =:= macula_frame andalso V =:= #{private => seed()}),
                not (F =:= public andalso is_binary(V)), F =/= ensure orelse not is_map(V)],
    ?SILENT(Calls, Config).

%%--------------------------------------------------------------------------------------------

%% The identity's seed has the mark, and so have the certificates' keys that are made from it.
status_and_crashes_of_peering_show_no_secret(Config) ->
    process_flag(trap_exit, true),
    {ok, Id} = macula_identity:from_seed(seed()),
    Me = #{identity => #{private => seed()}},
    {ok, L} = macula_peering:listen(Me#{port => 0}),
    {ok, {_, Port}} = macula_peering:sockname(L),
    Target = #{host => "127.0.0.1", port => Port, node_id => macula_identity:public(Id)},
    {ok, D} = macula_peering:connect(Me#{target => Target, reconnect => true}),
    Workers = macula_test_nodes:wait_until(fun() ->
        case [Pid || {_, Pid, _, _} <- supervisor:which_children(macula_peering_conn_sup)] of
            [_, _] = Two -> length(macula_peering:peers()) =:= 2 andalso {value, Two};
            _ -> false
        end
    end),
    Supervisors = [whereis(N) || N <- [macula_sup, macula_peering_sup, macula_peering_conn_sup,
                                       macula_peering_dialer_sup, macula_peering_listener_sup,
                                       macula_peering_links, macula_peering_replay]],
    All = [L, D | Workers ++ Supervisors],
    [?assertEqual({Pid, []}, {Pid, [What || {What, Term} <- said_of(Pid), shows(Term)]}) || Pid <- All],
    [?assertNot(shows(T)) || T <- [ets:tab2list(macula_peering_links), macula_peering:peer_info(hd(Workers)),
                                   macula_peering:listener_info(L)]],
    %% Each fails in the middle of its work, with all of its state.
    Broken = fun(Field) when element(1, Field) =:= delivery -> broken; (Field) -> Field end,
    crash(hd(Workers), fun({S, Data}) -> {S, list_to_tuple(lists:map(Broken, tuple_to_list(Data)))} end,
          fun(W) -> macula_peering:subscribe(W, self()) end, Config),
    crash(L, fun(State) -> State#{links := broken} end,
          fun(W) -> W ! {macula_peering, handshake_complete, self(), <<0:256>>},
                    W ! {'DOWN', make_ref(), process, self(), gone} end, Config),
    crash(D, fun(State) -> State#{opts := broken} end,
          fun(W) -> W ! {macula_peering, disconnected, maps:get(worker, sys:get_state(W)), why} end,
          Config),
    ?assertEqual([], logged_marks(Config)).

said_of(Pid) ->
    [{status, sys:get_status(Pid)}, {state, sys:get_state(Pid)}
     | [{Item, process_info(Pid, Item)}
        || Item <- [dictionary, messages, links, monitors, initial_call, current_stacktrace]]].

crash(Pid, Break, Poke, Config) ->
    Ref = monitor(process, Pid),
    Before = reports(Config),
    _ = sys:replace_state(Pid, Break),
    Poke(Pid),
    receive {'DOWN', Ref, process, Pid, Why} -> ?assertNotEqual(normal, Why)
    after 10000 -> ct:fail({does_not_fail, Pid})
    end,
    macula_test_nodes:wait_until(fun() -> reports(Config) > Before end).

%% How many crash reports there are.
reports(Config) ->
    length([E || {_, E} <- ets:tab2list(proplists:get_value(log, Config)),
                 string:find(unicode:characters_to_binary(E), "crash") =/= nomatch]).

%% In a VM whose macula_quic fails with its arguments, as a stale one may.
a_failure_with_the_key_in_hand_shows_none(_Config) ->
    macula_test_nodes:with_nodes([#{carrier => none, args => ["-kernel", "logger_level", "all"]}], fun([Node]) ->
        Call = fun(M, F, A) -> macula_test_nodes:call(Node, M, F, A) end,
        {ok, _} = Call(application, ensure_all_started, [macula]),
        Log = filename:absname("with_the_key_in_hand.log"),
        ok = Call(logger, add_handler, [all, logger_std_h, #{
            level => all, config => #{file => Log},
            formatter => {logger_formatter, #{depth => unlimited}}}]),
        {ok, macula_quic, Broken} = broken_quic(),
        {module, macula_quic} = Call(code, load_binary, [macula_quic, "broken", Broken]),
        Result = Call(macula_peering, listen, [#{identity => #{private => seed()}, port => 0}]),
        ?assertMatch({error, _}, Result),
        ?assertNot(shows(Result)),
        ok = Call(logger_std_h, filesync, [all]),
        {ok, Text} = file:read_file(Log),
        ?assertNot(is_marked(Text))
    end).

broken_quic() ->
    Forms = [begin {ok, Tokens, _} = erl_scan:string(Text), {ok, Form} = erl_parse:parse_form(Tokens), Form end
             || Text <- ["-module(macula_quic).", "-export([generate_self_signed_cert/3]).",
                         "generate_self_signed_cert(Public, x, Names) -> {Public, Names}."]],
    compile:forms(Forms).
