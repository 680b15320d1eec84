%% Trust from the first packet: who does not know the cookie gets nowhere, whatever else he can do,
%% and the log says why in one line.
-module(macula_dist_trust_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([other_cookie_is_refused_and_both_logs_say_so/1, cookie_of_its_own_for_a_node/1,
         changed_cookie_counts_for_new_links/1, long_and_strange_cookies/1,
         client_of_another_protocol_is_refused/1, client_without_certificate_is_refused/1,
         client_that_sends_garbage_is_refused/1, client_with_a_made_up_proof_is_refused/1,
         client_that_stays_silent_is_dropped/1, machine_in_the_middle_is_refused/1,
         the_same_path_without_the_middle_works/1, pretender_with_a_made_up_proof_is_refused/1,
         pretender_that_reflects_the_proof_is_refused/1,
         pretender_that_reflects_the_share_is_refused/1,
         pretender_has_one_guess_and_nothing_to_try_others_against/1, replayed_proof_is_refused/1,
         node_under_a_wrong_name_is_refused/1, refusals_do_not_fill_the_log/1, refused_dials_do_not_fill_the_log/1,
         strangers_make_no_atoms/1, strangers_open_no_lane/1,
         no_more_than_64_kb_of_a_stranger_waits/1, info_tells_trust_cipher_and_key_exchange/1,
         cookie_is_nowhere_in_the_logs/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           eventually/1, eventually/2, await_log/2, logged/2]).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [other_cookie_is_refused_and_both_logs_say_so, cookie_of_its_own_for_a_node,
     changed_cookie_counts_for_new_links, long_and_strange_cookies,
     client_of_another_protocol_is_refused, client_without_certificate_is_refused,
     client_that_sends_garbage_is_refused, client_with_a_made_up_proof_is_refused,
     client_that_stays_silent_is_dropped, machine_in_the_middle_is_refused,
     the_same_path_without_the_middle_works, pretender_with_a_made_up_proof_is_refused,
     pretender_that_reflects_the_proof_is_refused,
     pretender_that_reflects_the_share_is_refused,
     pretender_has_one_guess_and_nothing_to_try_others_against, replayed_proof_is_refused,
     node_under_a_wrong_name_is_refused, refusals_do_not_fill_the_log,
     refused_dials_do_not_fill_the_log, strangers_make_no_atoms,
     strangers_open_no_lane, no_more_than_64_kb_of_a_stranger_waits,
     info_tells_trust_cipher_and_key_exchange, cookie_is_nowhere_in_the_logs].

init_per_suite(Config) ->
    case macula_dist_case:carrier() of
        "macula" ->
            %% Strangers do not verify whom they dial, and are warned each time.
            ok = logger:set_primary_config(level, error),
            macula_dist_case:suite_begin(Config);
        Other -> {skip, Other ++ " has other ways"}
    end.

end_per_suite(Config) ->
    ok = logger:set_primary_config(level, notice),
    macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- helpers --------------------------------------------------------------------------------------

%% A node and its port.
target() -> target(#{}).

target(Options) ->
    T = start(t, Options),
    {T, macula_dist_case:port_of(T)}.

%% Nobody got in, and the node is well: an honest one is served.
unharmed(T) ->
    [] = call(T, erlang, nodes, [connected]),
    Honest = start(honest),
    ok = connect(Honest, T),
    macula_dist_case:stop(Honest).

-define(REFUSED, "macula_dist: connection (from|to) [^\n]*refused: ").

%% The stream ends without a proof from the node.
no_proof(Stream) ->
    case macula_quic:recv(Stream, 0, 15000) of
        {ok, <<37:32, 0, _/binary>> = Proof} -> ct:fail({proven_to_a_stranger, Proof});
        {ok, _Refusal} -> no_proof(Stream);
        {error, timeout} -> ct:fail(still_connected);
        {error, _} -> ok
    end.

%% All that a dialler says who takes this for the cookie.
guess(Stream, Name, T, Cookie) ->
    macula_dist_proof:dialled(Stream, {Name, atom_to_binary(node_of(T))}, Cookie, <<0:256>>).

%% -- nodes ----------------------------------------------------------------------------------------

other_cookie_is_refused_and_both_logs_say_so(_Config) ->
    A = start(a),
    B = start(b, #{cookie => "quite_another"}),
    pang = call(A, net_adm, ping, [node_of(B)]),
    ok = await_log(A, ?REFUSED "[^\n]*cookie"),
    ok = await_log(B, ?REFUSED "[^\n]*cookie"),
    %% Before OTP's own handshake: it has not seen this attempt.
    false = logged(B, "Connection attempt from node"),
    false = logged(B, "challenge"),
    pang = call(B, net_adm, ping, [node_of(A)]),
    [] = call(A, erlang, nodes, [connected]),
    [] = call(B, erlang, nodes, [connected]),
    unharmed(A).

cookie_of_its_own_for_a_node(_Config) ->
    A = start(a),
    B = start(b, #{cookie => "only_for_b"}),
    true = call(A, erlang, set_cookie, [node_of(B), only_for_b]),
    ok = connect(A, B),
    true = call(A, erlang, disconnect_node, [node_of(B)]),
    ok = eventually(fun() -> call(B, erlang, nodes, [connected]) =:= [] end),
    ok = connect(B, A),
    unharmed_third(A).

%% Others still use the node's own cookie.
unharmed_third(A) ->
    C = start(c),
    ok = connect(C, A).

changed_cookie_counts_for_new_links(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    true = call(A, erlang, set_cookie, [new_one]),
    pong = call(A, net_adm, ping, [node_of(B)]),
    true = call(A, erlang, disconnect_node, [node_of(B)]),
    ok = eventually(fun() -> call(B, erlang, nodes, [connected]) =:= [] end),
    pang = call(B, net_adm, ping, [node_of(A)]),
    true = call(B, erlang, set_cookie, [new_one]),
    ok = connect(B, A).

long_and_strange_cookies(_Config) ->
    lists:foreach(fun(Cookie) ->
        A = start(a, #{cookie => Cookie}),
        B = start(b, #{cookie => Cookie}),
        ok = connect(A, B),
        [macula_dist_case:stop(N) || N <- [A, B]]
    end, [lists:duplicate(255, $c), "x", "a b$c%d;\"'"]).

node_under_a_wrong_name_is_refused(_Config) ->
    {T, Port} = target(),
    A = start(a, #{args => macula_dist_case:found_at('someone_else@127.0.0.1', Port)}),
    pang = call(A, net_adm, ping, ['someone_else@127.0.0.1']),
    ok = await_log(A, ?REFUSED "[^\n]*name"),
    ok = await_log(T, ?REFUSED "[^\n]*name"),
    unharmed(T).

%% -- clients --------------------------------------------------------------------------------------

client_of_another_protocol_is_refused(_Config) ->
    {T, Port} = target(),
    {error, _} = macula_quic:connect("127.0.0.1", Port,
                                     [{verify, verify_none}, {alpn, [<<"h3">>]}], 5000),
    ok = await_log(T, ?REFUSED "[^\n]*protocol"),
    unharmed(T).

client_without_certificate_is_refused(_Config) ->
    {T, Port} = target(),
    case macula_dist_stranger:dial(Port, []) of
        {error, _} -> ok;
        %% The client's handshake ends before the server has looked at its certificate.
        {ok, Conn} -> receive {quic, E, Conn, _} when E =/= new_stream -> ok
                      after 20000 -> ct:fail(not_refused) end
    end,
    ok = await_log(T, ?REFUSED "[^\n]*certificate"),
    unharmed(T).

client_that_sends_garbage_is_refused(_Config) ->
    {T, Port} = target(),
    lists:foreach(fun(Bytes) ->
        {ok, Conn} = macula_dist_stranger:dial(Port),
        {ok, S} = macula_dist_stranger:first_stream(Conn),
        ok = macula_quic:send(S, Bytes),
        ok = no_proof(S),
        _ = macula_quic:close(Conn)
    end, [<<"GET / HTTP/1.1\r\n\r\n">>, <<16#ffffffff:32, 0>>, <<0:32>>,
          macula_dist_stranger:frame(<<1>>), macula_dist_stranger:frame(<<3, 65535:16, "x">>),
          %% No share: of another length, of the wrong role, no point of the curve.
          macula_dist_proof:hello(<<"a@b">>, <<"c@d">>, <<>>),
          macula_dist_proof:hello(<<"a@b">>, <<"c@d">>, element(2, macula_nif:dist_exchange(acceptor, <<"x">>))),
          macula_dist_proof:hello(<<"a@b">>, <<"c@d">>, <<$A, 2:256/little>>),
          macula_dist_stranger:frame(binary:copy(<<0>>, 60000)),
          %% OTP's own handshake, without the proof before it
          macula_dist_stranger:frame([$N, <<16#d07df7fbd:64, 5:32, 3:16>>, "a@b"])]),
    ok = await_log(T, ?REFUSED),
    unharmed(T).

client_with_a_made_up_proof_is_refused(_Config) ->
    {T, Port} = target(),
    {ok, Conn} = macula_dist_stranger:dial(Port),
    {ok, S} = macula_dist_stranger:first_stream(Conn),
    {refused, <<1>>} = guess(S, <<"evil@127.0.0.1">>, T, <<"a guess">>),
    ok = no_proof(S),
    ok = await_log(T, ?REFUSED "[^\n]*cookie"),
    _ = macula_quic:close(Conn),
    unharmed(T).

client_that_stays_silent_is_dropped(_Config) ->
    {T, Port} = target(),
    {ok, Conn} = macula_dist_stranger:dial(Port),
    {ok, S} = macula_dist_stranger:first_stream(Conn),
    %% Half a frame, and then nothing.
    ok = macula_quic:send(S, <<100:32, 1, 2, 3>>),
    ok = no_proof(S),
    ok = await_log(T, ?REFUSED "[^\n]*in time"),
    _ = macula_quic:close(Conn),
    unharmed(T).

%% -- servers --------------------------------------------------------------------------------------

machine_in_the_middle_is_refused(_Config) ->
    {T, Port} = target(),
    {Middle, MiddlePort} = macula_dist_stranger:middle(#{target => Port, watcher => self()}),
    A = start(a, #{args => macula_dist_case:found_at(node_of(T), MiddlePort)}),
    pang = call(A, net_adm, ping, [node_of(T)]),
    %% It was in the middle: it has read the first frame in clear.
    receive {passed_on, up, <<_:32, 3, _/binary>>} -> ok after 5000 -> ct:fail(not_in_between) end,
    ok = await_log(A, ?REFUSED "[^\n]*machine in the middle"),
    ok = await_log(T, ?REFUSED "[^\n]*machine in the middle"),
    [] = call(A, erlang, nodes, [connected]),
    unharmed(T),
    ok = macula_dist_stranger:drop(Middle).

%% The control: packets passed on as they are.
the_same_path_without_the_middle_works(_Config) ->
    {T, Port} = target(),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}}),
    A = start(a, #{args => macula_dist_case:found_at(node_of(T), macula_relay:port(Relay))}),
    ok = connect(A, T),
    #{up := #{forwarded := N}} = macula_relay:stats(Relay),
    true = N > 0.

pretender_with_a_made_up_proof_is_refused(_Config) ->
    pretend(fun guess_share/1, fun(_Proof) -> crypto:strong_rand_bytes(32) end, "cookie").

%% The proof of one role is worth nothing in the other.
pretender_that_reflects_the_proof_is_refused(_Config) ->
    pretend(fun guess_share/1, fun(Proof) -> Proof end, "cookie").

pretender_that_reflects_the_share_is_refused(_Config) ->
    pretend(fun(Share) -> Share end, fun(Proof) -> Proof end, "protocol"),
    pretend(fun(<<_, Share/binary>>) -> <<$B, Share/binary>> end, fun(Proof) -> Proof end, "cookie").

guess_share(_Share) ->
    {_, Share} = macula_nif:dist_exchange(acceptor, <<"a guess">>),
    Share.

pretend(ShareFor, ProofFor, Refusal) ->
    Self = self(),
    {Keeper, Port} = macula_dist_stranger:pretender(fun(Conn) ->
        {ok, S} = macula_quic:accept_stream(Conn, #{active => false}, 5000),
        Hello = macula_dist_proof:hear(S),
        ok = macula_quic:send(S, macula_dist_stranger:frame([0, ShareFor(binary:part(Hello, byte_size(Hello), -33))])),
        case macula_quic:recv(S, 37, 15000) of
            {ok, <<33:32, 0, Proof:32/binary>>} ->
                ok = macula_quic:send(S, macula_dist_stranger:frame([0, <<10000:32>>, ProofFor(Proof)])),
                Self ! {after_answer, macula_quic:recv(S, 0, 15000)};
            Ended ->
                Self ! {after_answer, Ended}
        end,
        macula_quic:close(Conn)
    end),
    Name = 'pretended@127.0.0.1',
    A = start(a, #{args => macula_dist_case:found_at(Name, Port)}),
    pang = call(A, net_adm, ping, [Name]),
    ok = await_log(A, ?REFUSED "[^\n]*" ++ Refusal),
    %% Not a byte of OTP's handshake came.
    receive {after_answer, {ok, More}} -> ct:fail({went_on, More});
            {after_answer, {error, timeout}} -> ct:fail(still_connected);
            {after_answer, {error, _}} -> ok
    after 20000 -> ct:fail(no_answer) end,
    macula_dist_case:stop(A),
    ok = macula_dist_stranger:drop(Keeper).

%% Who answers in a node's place and has guessed the cookie knows it. Whoever has guessed wrong can't find out
%% what would have been right, not even with the cookie itself at hand.
pretender_has_one_guess_and_nothing_to_try_others_against(_Config) ->
    Cookie = <<"the_very_cookie">>,
    true = is_told_apart(Cookie, fun(#{key := Key} = Heard) -> fits(Key, Heard) end),
    Wrong = fun(#{key := Key, share := Share} = Heard) ->
        {Again, _} = macula_nif:dist_exchange(acceptor, Cookie),
        {ok, Other} = macula_nif:dist_exchange_key(Again, Share),
        [] =/= [K || K <- [Key, Other, Cookie, <<"wrong">>], fits(K, Heard)]
    end,
    false = is_told_apart(<<"wrong">>, Wrong).

%% What a pretender makes of all it hears, where a node dials that has the cookie.
is_told_apart(Guess, Judge) ->
    Self = self(),
    Keys = filename:join(persistent_term:get({macula_dist_case, dir}), macula_dist_case:unique("keys")),
    {Keeper, Port} = macula_dist_stranger:pretender([{sslkeylogfile, Keys}], fun(Conn) ->
        {ok, S} = macula_quic:accept_stream(Conn, #{active => false}, 5000),
        <<3, Rest/binary>> = macula_dist_proof:hear(S),
        Said = binary:part(Rest, 0, byte_size(Rest) - 33),
        Theirs = binary:part(Rest, byte_size(Rest), -33),
        {Exchange, Share} = macula_nif:dist_exchange(acceptor, Guess),
        {ok, Key} = macula_nif:dist_exchange_key(Exchange, Theirs),
        ok = macula_quic:send(S, macula_dist_stranger:frame([0, Share])),
        <<0, Proof/binary>> = macula_dist_proof:hear(S),
        Self ! {heard, #{key => Key, share => Theirs, said => Said, proof => Proof,
                         exporter => macula_dist_proof:exporter(Keys)}},
        macula_quic:close(Conn)
    end),
    Name = 'pretended@127.0.0.1',
    A = start(a, #{cookie => "the_very_cookie", args => macula_dist_case:found_at(Name, Port)}),
    pang = call(A, net_adm, ping, [Name]),
    Heard = receive {heard, H} -> H after 20000 -> ct:fail(nothing_heard) end,
    macula_dist_case:stop(A),
    ok = macula_dist_stranger:drop(Keeper),
    Judge(Heard).

fits(Key, #{proof := Proof, exporter := Exporter, said := Said}) ->
    Proof =:= macula_dist_proof:proof(Key, dialler, [Exporter, Said]).

%% All that an honest node says, again in a session of its own.
replayed_proof_is_refused(_Config) ->
    {T, Port} = target(),
    Self = self(),
    {Keeper, TrapPort} = macula_dist_stranger:pretender(fun(Conn) ->
        {ok, S} = macula_quic:accept_stream(Conn, #{active => false}, 5000),
        Hello = macula_dist_proof:hear(S),
        ok = macula_quic:send(S, macula_dist_stranger:frame([0, guess_share(Hello)])),
        Self ! {heard, Hello, macula_dist_proof:hear(S)}
    end),
    A = start(a, #{args => macula_dist_case:found_at(node_of(T), TrapPort)}),
    pang = call(A, net_adm, ping, [node_of(T)]),
    {Hello, Proof} = receive {heard, H, P} -> {H, P} after 5000 -> ct:fail(nothing_heard) end,
    {ok, Conn} = macula_dist_stranger:dial(Port),
    {ok, S} = macula_dist_stranger:first_stream(Conn),
    ok = macula_quic:send(S, macula_dist_stranger:frame(Hello)),
    <<0, _Share:33/binary>> = macula_dist_proof:hear(S),
    ok = macula_quic:send(S, macula_dist_stranger:frame(Proof)),
    ok = no_proof(S),
    ok = await_log(T, ?REFUSED "[^\n]*cookie"),
    _ = macula_quic:close(Conn),
    unharmed(T),
    ok = macula_dist_stranger:drop(Keeper).

%% -- what is left behind --------------------------------------------------------------------------

wrong_dials(Port, T, N) ->
    lists:foreach(fun(I) ->
        {ok, Conn} = macula_dist_stranger:dial(Port),
        {ok, S} = macula_dist_stranger:first_stream(Conn),
        Name = iolist_to_binary(["evil", integer_to_list(I), "@127.0.0.1"]),
        {refused, <<1>>} = guess(S, Name, T, <<"a guess">>),
        ok = no_proof(S),
        _ = macula_quic:close(Conn)
    end, lists:seq(1, N)).

refusals_do_not_fill_the_log(_Config) ->
    {T, Port} = target(),
    {Ms, ok} = macula_dist_case:timed(fun() -> wrong_dials(Port, T, 100) end),
    {match, Lines} = re:run(macula_dist_case:log(T), ?REFUSED, [global]),
    ct:log("~b lines of 100 in ~p ms", [length(Lines), Ms]),
    %% 20 in each 10 s: all of them only where a dial takes half a second.
    true = length(Lines) =< 20 * (trunc(Ms) div 10000 + 2),
    unharmed(T).

%% Nor a stream of any other kind beside the one for its proof.
strangers_open_no_lane(_Config) ->
    T = start(target),
    {ok, Conn} = macula_dist_stranger:dial(macula_dist_case:port_of(T)),
    %% A stream that nobody holds is collected and reset, and the node ends the connection.
    {ok, Stream} = macula_dist_stranger:first_stream(Conn),
    [{error, timeout} = macula_quic:open_stream(Conn, #{direction => Direction, timeout => 500})
     || Direction <- [unidirectional, bidirectional]],
    ok = macula_quic:close_stream(Stream),
    unharmed(T).

%% A megabyte to a node that has not come to reading. The relay counts headers and the handshake, too.
no_more_than_64_kb_of_a_stranger_waits(_Config) ->
    {T, Port} = target(),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}}),
    Resume = suspend_acceptor(T),
    {ok, Conn} = macula_dist_stranger:dial(macula_relay:port(Relay)),
    {ok, S} = macula_dist_stranger:first_stream(Conn),
    ok = macula_quic:async_send(S, binary:copy(<<0>>, 1000000)),
    Taken = macula_dist_case:settled(fun() ->
        #{up := #{bytes := Bytes}} = macula_relay:stats(Relay),
        Bytes
    end),
    ct:log("~b bytes of a megabyte", [Taken]),
    {ok, #{state := open}} = macula_quic:info(S),
    true = Taken > 60000,
    true = Taken < 100000,
    ok = Resume(),
    ok = no_proof(S),
    _ = macula_quic:close(Conn),
    unharmed(T).

%% The process that takes what arrives at the port stands still until the function is called.
suspend_acceptor(T) ->
    macula_dist_case:suspend(T, fun() ->
        {links, Links} = process_info(whereis(net_kernel), links),
        [Acceptor] = [P || P <- Links, is_pid(P),
                           {initial_call, {macula_dist_accept, accept_init, 2}} =:= process_info(P, initial_call)],
        Acceptor
    end).

strangers_make_no_atoms(_Config) ->
    {T, Port} = target(),
    wrong_dials(Port, T, 3),
    Before = call(T, erlang, system_info, [atom_count]),
    wrong_dials(Port, T, 60),
    After = call(T, erlang, system_info, [atom_count]),
    true = After - Before < 20.

info_tells_trust_cipher_and_key_exchange(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    {ok, Info} = call(A, macula_dist, info, [node_of(B)]),
    ct:log("~p", [Info]),
    #{trust := cookie, cipher := Cipher, key_exchange := Kx} = Info,
    match = re:run(text(Cipher), "AES_128_GCM|AES_256_GCM|CHACHA20", [{capture, none}]),
    match = re:run(text(Kx), "MLKEM", [{capture, none}]),
    {error, not_connected} = call(A, macula_dist, info, ['nobody@127.0.0.1']).

text(Atom) when is_atom(Atom) -> atom_to_list(Atom);
text(Text) -> Text.

cookie_is_nowhere_in_the_logs(_Config) ->
    {T, Port} = target(#{cookie => "a_cookie_to_look_for"}),
    wrong_dials(Port, T, 2),
    B = start(b, #{cookie => "another_to_look_for"}),
    pang = call(B, net_adm, ping, [node_of(T)]),
    ok = await_log(T, ?REFUSED),
    ok = await_log(B, ?REFUSED),
    false = logged(T, "to_look_for"),
    false = logged(B, "to_look_for").

%% A node that dials one with another cookie does so again and again.
refused_dials_do_not_fill_the_log(_Config) ->
    A = start(a),
    B = start(b, #{cookie => "another"}),
    {Ms, ok} = call(A, fun() ->
        macula_dist_case:timed(fun() ->
            [pang = net_adm:ping(node_of(B)) || _ <- lists:seq(1, 40)],
            ok
        end)
    end),
    ok = await_log(A, "connection to .* refused: not the same cookie"),
    {match, Lines} = re:run(macula_dist_case:log(A), "connection to .* refused", [global]),
    ct:log("~b lines of 40 in ~p ms", [length(Lines), Ms]),
    %% 20 in each 10 s.
    true = length(Lines) =< 20 * (trunc(Ms) div 10000 + 1).
