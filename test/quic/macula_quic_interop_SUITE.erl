%% Other implementations of QUIC at the other end, in both roles: aioquic, and quiche and s2n-quic as the
%% programs of test/interop. `make interop' builds them and makes the table of docs/interop.md of what
%% came of each case. A peer that is not there is skipped: MACULA_INTEROP_PYTHON names a Python that has
%% aioquic (python3), MACULA_INTEROP_PEERS the directory of the built programs.
-module(macula_quic_interop_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, groups/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_group/2,
         end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([rows/0, peers/0]).
-export([our_server_handshake/1, our_server_bulk/1, our_server_streams/1,
         our_server_streams_blocked/1, our_server_half_close/1, our_server_reset_and_stop/1,
         our_server_datagrams/1,
         our_server_retry/1, our_server_resumption/1, our_server_early_data/1,
         our_server_key_update/1, our_server_rebinding/1, our_server_version_negotiation/1,
         our_server_alpn_refusal/1, our_server_mutual_tls/1, our_server_long_chain/1,
         our_server_is_not_trusted/1, our_server_loss/1, our_server_close/1]).
-export([our_client_handshake/1, our_client_bulk/1, our_client_streams/1,
         our_client_streams_blocked/1, our_client_half_close/1, our_client_reset_and_stop/1,
         our_client_datagrams/1,
         our_client_retry/1, our_client_resumption/1, our_client_early_data/1,
         our_client_key_update/1, our_client_rebinding/1, our_client_version_negotiation/1,
         our_client_alpn_refusal/1, our_client_mutual_tls/1, our_client_long_chain/1,
         our_client_trusts_not_all/1, our_client_loss/1, our_client_close/1]).

-define(MB, 1000000).
-define(BULK, 10000000).
%% TLS alert 120 as an error of QUIC (RFC 9001, section 4.8).
-define(NO_APPLICATION_PROTOCOL, 16#178).

%% What is tried, with the case of our server and that of our client.
rows() ->
    [{"handshake, version 1, ALPN", our_server_handshake, our_client_handshake},
     {"10 MB each way, and both ways at once, with checksums", our_server_bulk, our_client_bulk},
     {"100 streams of each kind at once, and more in turn", our_server_streams, our_client_streams},
     {"STREAMS_BLOCKED", our_server_streams_blocked, our_client_streams_blocked},
     {"half-close, empty streams", our_server_half_close, our_client_half_close},
     {"reset and stop with their codes", our_server_reset_and_stop, our_client_reset_and_stop},
     {"datagrams (RFC 9221)", our_server_datagrams, our_client_datagrams},
     {"Retry", our_server_retry, our_client_retry},
     {"resumption", our_server_resumption, our_client_resumption},
     {"0-RTT", our_server_early_data, our_client_early_data},
     {"key update", our_server_key_update, our_client_key_update},
     {"rebinding of a NAT in full flow", our_server_rebinding, our_client_rebinding},
     {"version negotiation", our_server_version_negotiation, our_client_version_negotiation},
     {"refusal of an ALPN protocol", our_server_alpn_refusal, our_client_alpn_refusal},
     {"certificates of both sides", our_server_mutual_tls, our_client_mutual_tls},
     {"a chain of 7 certificates, 9 kB", our_server_long_chain, our_client_long_chain},
     {"a certificate that is not trusted", our_server_is_not_trusted, our_client_trusts_not_all},
     {"5 % loss each way", our_server_loss, our_client_loss},
     {"closing with a code, from both sides", our_server_close, our_client_close}].

peers() ->
    [aioquic, quiche, s2n].

%% What cannot be tried, and why.
missing(s2n, Case) when Case =:= our_server_early_data; Case =:= our_client_early_data ->
    "s2n-quic sends no early data, and drops the packets of it that come";
missing(s2n, our_server_version_negotiation) ->
    "s2n-quic offers version 1 first";
missing(s2n, our_client_version_negotiation) ->
    "s2n-quic always speaks version 1";
missing(_, _) ->
    undefined.

all() ->
    [{group, Peer} || Peer <- peers()].

groups() ->
    [{Peer, [], [Case || {_, Server, Client} <- rows(), Case <- [Server, Client]]}
     || Peer <- peers()].

suite() ->
    [{timetrap, {minutes, 10}}].

init_per_suite(Config) ->
    macula_quic_lab:drained(),
    Dir = ?config(priv_dir, Config),
    #{server := Server, client := Client} = macula_quic_lab:chain(),
    Names = ["host-" ++ integer_to_list(N) ++ ".a-rather-long-domain-name.example.org"
             || N <- lists:seq(1, 100)],
    #{server := Long} = macula_quic_lab:chain(#{intermediates => 6, names => Names}),
    #{server := Other} = macula_quic_lab:chain(),
    Sides = [{server, Server}, {client, Client}, {long, Long}, {other, Other}],
    [{credentials, maps:from_list([{Name, files(Dir, Name, Side)} || {Name, Side} <- Sides])}
     | Config].

end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%% A chain without its root, its key, and the root.
files(Dir, Name, #{leaf := Leaf, chain := Chain, key := {Type, Key}, root := Root}) ->
    File = fun(Kind, Entries) ->
        Path = filename:join(Dir, atom_to_list(Name) ++ "-" ++ Kind ++ ".pem"),
        %% Not everybody takes the empty lines behind each entry.
        Pem = binary:replace(public_key:pem_encode(Entries), <<"\n\n">>, <<"\n">>, [global]),
        ok = file:write_file(Path, Pem),
        list_to_binary(Path)
    end,
    Certificates = fun(Ders) -> [{'Certificate', Der, not_encrypted} || Der <- Ders] end,
    #{leaf => Leaf, cert => File("cert", Certificates(lists:droplast(Chain))),
      key => File("key", [{Type, Key, not_encrypted}]), ca => File("ca", Certificates([Root]))}.

init_per_group(aioquic, Config) ->
    Python = os:getenv("MACULA_INTEROP_PYTHON", "python3"),
    Root = macula_test_run:root(),
    case macula_test_run:run(Root, "'" ++ Python ++ "' -c 'import aioquic'") of
        {0, _} ->
            Script = filename:join(?config(data_dir, Config), "peer.py"),
            [{peer, aioquic}, {program, filename:absname(os:find_executable(Python))},
             {arguments, [Script]} | Config];
        {_, _} ->
            {skip, Python ++ " has no aioquic (pip install aioquic, MACULA_INTEROP_PYTHON)"}
    end;
init_per_group(Peer, Config) ->
    Program = filename:absname(filename:join(os:getenv("MACULA_INTEROP_PEERS", "."),
                                             atom_to_list(Peer) ++ "_peer")),
    case os:find_executable(Program) of
        false -> {skip, "no " ++ Program ++ " (make interop, MACULA_INTEROP_PEERS)"};
        _ -> [{peer, Peer}, {program, Program}, {arguments, []} | Config]
    end.

end_per_group(_Peer, _Config) ->
    ok.

init_per_testcase(Case, Config) ->
    case missing(?config(peer, Config), Case) of
        undefined ->
            Config;
        Why ->
            record(Case, {missing, Why}, Config),
            {skip, Why}
    end.

end_per_testcase(Case, Config) ->
    record(Case, ?config(tc_status, Config), Config).

%% For the table.
record(Case, Result, Config) ->
    case os:getenv("MACULA_INTEROP_RESULTS") of
        false ->
            ok;
        File ->
            Line = io_lib:format("~0p.~n", [{?config(peer, Config), Case, Result}]),
            ok = file:write_file(File, Line, [append])
    end.

%%--------------------------------------------------------------------------------------------
%% Their client, our server

our_server_handshake(Config) ->
    Peer = #{conn := Conn} = their_client(Config),
    ?assertEqual(["interop", 1], tell(Peer, ["info"])),
    ?assertEqual({ok, <<"interop">>}, macula_quic:negotiated_protocol(Conn)),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_bulk(Config) ->
    Peer = their_client(Config),
    move_bulk(Peer),
    leave(Peer).

our_server_streams(Config) ->
    Peer = their_client(Config),
    ?assertEqual(true, tell(Peer, ["echo", 100, 20000])),
    ?assertEqual(true, tell(Peer, ["uni", 100, 20000])),
    %% More than the limit of streams in all: it is raised as they end.
    ?assertEqual(true, tell(Peer, ["echo", 100, 10])),
    ?assertEqual(true, tell(Peer, ["uni", 100, 0])),
    leave(Peer).

%% The first message says that the peer has as many open as it may; the second one can only come of its frame.
%% s2n-quic puts that into the next packet that leaves for another reason, here the answer to a PING of ours.
our_server_streams_blocked(Config) ->
    Ours = #{peer_bidi_stream_count => 1, keep_alive_interval_ms => 100},
    Peer = #{conn := Conn} = their_client(Config, Ours, #{}, direct),
    ok = macula_quic:tell_changes(Conn, 10),
    ?assertEqual("held", tell(Peer, ["hold"])),
    ?EXPECT({quic, peer_needs_streams, Conn, bidi_streams}),
    command(Peer, ["up", 1000]),
    ?EXPECT({quic, peer_needs_streams, Conn, bidi_streams}),
    ?EXPECT({held, Holder}, Holder ! release),
    ?assertEqual(["fin", true], result(Peer)),
    leave(Peer).

our_server_half_close(Config) ->
    Peer = their_client(Config),
    ?assertEqual(["fin", true], tell(Peer, ["empty"])),
    ?assertEqual(["fin", true], tell(Peer, ["half"])),
    leave(Peer).

our_server_reset_and_stop(Config) ->
    Peer = their_client(Config),
    [begin
         ?assertEqual({Code, Code}, {Code, tell(Peer, ["reset", Code])}),
         ?assertEqual({Code, Code}, {Code, tell(Peer, ["stop", Code])}),
         ?assertEqual("aborted", tell(Peer, ["abort", Code])),
         ?EXPECT({aborted, Ends}, ?assertEqual({Code, Code + 1}, Ends))
     end || Code <- [0, 63, 16384, (1 bsl 61)]],
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_datagrams(Config) ->
    Peer = their_client(Config),
    [?assertEqual({Size, true}, {Size, tell(Peer, ["datagrams", Size])}) || Size <- [0, 1, 500, 1100]],
    leave(Peer).

our_server_retry(Config) ->
    Peer = their_client(Config, #{retry => always}, #{}, direct),
    _ = ?config(peer, Config) =:= quiche orelse ?assertEqual(true, tell(Peer, ["retried"])),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_resumption(Config) ->
    Peer = #{conn := Conn} = their_client(Config, #{resumption => true}, #{resume => true}, direct),
    ?assertEqual(true, tell(Peer, ["resumed"])),
    ?assertMatch({ok, #{resumed := true}}, macula_quic:info(Conn)),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_early_data(Config) ->
    Ours = #{resumption => early_data},
    Peer = #{conn := Conn} = their_client(Config, Ours, #{resume => true, early => true}, direct),
    ?assertEqual([true, true], tell(Peer, ["early"])),
    ?assertMatch({ok, #{resumed := true, early_data := accepted}}, macula_quic:info(Conn)),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_key_update(Config) ->
    Peer = their_client(Config),
    update_keys(?config(peer, Config), Peer),
    leave(Peer).

our_server_rebinding(Config) ->
    Peer = #{conn := Conn, relay := Relay} = their_client(Config, #{}, #{}, #{}),
    {ok, Before} = macula_quic:peername(Conn),
    %% What their client sends is what shows its new address.
    rebind_in_flow(Relay, fun() -> ?assertEqual(["fin", true], tell(Peer, ["up", ?BULK])) end),
    move_bulk(Peer),
    {ok, After} = macula_quic:peername(Conn),
    ?assertNotEqual(Before, After),
    leave(Peer).

our_server_version_negotiation(Config) ->
    Peer = their_client(Config, #{}, #{vn => true}, direct),
    ?assertEqual(["interop", 1], tell(Peer, ["info"])),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_alpn_refusal(Config) ->
    {Listener, Port} = our_server(Config, #{}),
    Theirs = start(Config, "client", #{port => Port, ca => file(ca, server, Config), alpn => <<"alien">>}),
    {refused, [Code, false | _]} = said(Theirs),
    ?assertEqual(?NO_APPLICATION_PROTOCOL, Code),
    ?assertEqual({error, timeout}, macula_quic:accept(Listener, 0)),
    leave(#{port => Theirs}).

our_server_mutual_tls(Config) ->
    Ours = #{verify => verify_peer, fail_if_no_peer_cert => true,
             cacertfile => file(ca, client, Config)},
    Theirs = #{mtls => true, cert => file(cert, client, Config), key => file(key, client, Config)},
    Peer = #{conn := Conn} = their_client(Config, Ours, Theirs, direct),
    ?assertEqual({ok, file(leaf, client, Config)}, macula_quic:peercert(Conn)),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_long_chain(Config) ->
    Ours = #{certfile => file(cert, long, Config), keyfile => file(key, long, Config)},
    Peer = their_client(Config, Ours, #{ca => file(ca, long, Config)}, direct),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

our_server_is_not_trusted(Config) ->
    {Listener, Port} = our_server(Config, #{}),
    Theirs = start(Config, "client", #{port => Port, ca => file(ca, other, Config)}),
    {refused, [Code, false | _]} = said(Theirs),
    %% An alert of TLS.
    ?assertMatch(_ when Code > 16#100, Code),
    ?assertEqual({error, timeout}, macula_quic:accept(Listener, 0)),
    leave(#{port => Theirs}).

our_server_loss(Config) ->
    Peer = their_client(Config, #{}, #{}, #{loss => 0.05, seed => 5}),
    move_bulk(Peer),
    ?assertEqual(true, tell(Peer, ["echo", 100, 20000])),
    leave(Peer).

our_server_close(Config) ->
    [begin
         Peer = #{conn := Conn} = their_client(Config),
         ?assertEqual("closed", tell(Peer, ["close", Code, Reason])),
         Said = case ?config(peer, Config) of
             %% An application on s2n-quic gives a code alone.
             s2n -> <<>>;
             _ -> list_to_binary(Reason)
         end,
         ?EXPECT({quic, shutdown, Conn, {application_close, Code, Said}}),
         leave(maps:remove(conn, Peer))
     end || {Code, Reason} <- [{0, "bye"}, {4711, ""}, {(1 bsl 62) - 1, "last"}]],
    Asking = #{conn := Asked} = their_client(Config),
    [Code, true | _] = tell(Asking, ["ask_close", 4711]),
    ?assertEqual(4711, Code),
    ?EXPECT({quic, closed, Asked, normal}),
    leave(maps:remove(conn, Asking)).

%%--------------------------------------------------------------------------------------------
%% Their server, our client

our_client_handshake(Config) ->
    {Peer, C} = their_server(Config),
    ?assertEqual({ok, <<"interop">>}, macula_quic:negotiated_protocol(C)),
    ?assertEqual({ok, file(leaf, server, Config)}, macula_quic:peercert(C)),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(Peer).

our_client_bulk(Config) ->
    {Peer, C} = their_server(Config),
    ask_for_bulk(C),
    leave(Peer).

our_client_streams(Config) ->
    {Peer, C} = their_server(Config),
    [begin
         Many = [{open(C, block($e, Size)), block($e, Size)} || _ <- lists:seq(1, 100)],
         [?assertEqual(Data, macula_quic_lab:read_to_end(Stream)) || {Stream, Data} <- Many]
     end || Size <- [20000, 0, 100]],
    [begin
         [begin
              {ok, Out} = macula_quic:open_stream(C, #{direction => unidirectional}),
              ok = macula_quic:send(Out, block(Size), #{fin => true})
          end || _ <- lists:seq(1, 100)],
         [begin
              {ok, In} = macula_quic:accept_stream(C, #{}, 10000),
              ?assertEqual(digest(block(Size)), macula_quic_lab:read_to_end(In))
          end || _ <- lists:seq(1, 100)]
     end || Size <- [20000, 0, 1]],
    leave(Peer).

our_client_streams_blocked(Config) ->
    Ours = #{peer_unidi_stream_count => 1, keep_alive_interval_ms => 100},
    {Peer, C} = their_server(Config, Ours, #{}, direct),
    ok = macula_quic:tell_changes(C, 10),
    Ask = fun(Size) ->
        {ok, Out} = macula_quic:open_stream(C, #{direction => unidirectional}),
        ok = macula_quic:send(Out, block(Size), #{fin => true})
    end,
    Answered = fun(Size, In) ->
        ?assertEqual(digest(block(Size)), macula_quic_lab:read_to_end(In))
    end,
    Ask(1000),
    {ok, First} = macula_quic:accept_stream(C, #{}, 10000),
    ?EXPECT({quic, peer_needs_streams, C, unidi_streams}),
    Ask(2000),
    ?EXPECT({quic, peer_needs_streams, C, unidi_streams}),
    Answered(1000, First),
    {ok, Second} = macula_quic:accept_stream(C, #{}, 10000),
    Answered(2000, Second),
    leave(Peer).

our_client_half_close(Config) ->
    {Peer, C} = their_server(Config),
    ?assertEqual(<<>>, ask(C, <<>>)),
    {ok, Half} = macula_quic:open_stream(C),
    ok = macula_quic:send(Half, block($h, 1000)),
    ?assertEqual(<<"e">>, ask(C, <<"e">>)),
    ok = macula_quic:async_shutdown_stream(Half, graceful, 0),
    ?assertEqual(digest(block(1000)), macula_quic_lab:read_to_end(Half)),
    leave(Peer).

our_client_reset_and_stop(Config) ->
    {Peer, C} = their_server(Config),
    [begin
         {ok, Reset} = macula_quic:open_stream(C),
         ok = macula_quic:send(Reset, <<$r, Code:64>>),
         ?assertEqual({error, {reset, Code}}, macula_quic:recv(Reset, 0, 10000)),
         ?EXPECT({quic, peer_send_aborted, Reset, Code}),
         {ok, Stopped} = macula_quic:open_stream(C),
         ok = macula_quic:send(Stopped, <<$s, Code:64>>),
         ?EXPECT({quic, peer_receive_aborted, Stopped, Code}),
         ?assertEqual({error, {stopped, Code}}, macula_quic:send(Stopped, <<"x">>))
     end || Code <- [0, 63, 16384, (1 bsl 62) - 1]],
    ?assertEqual(<<"e!">>, ask(C, <<"e!">>)),
    leave(Peer).

our_client_datagrams(Config) ->
    {Peer, C} = their_server(Config),
    ok = macula_quic:setopt(C, datagrams, true),
    [begin
         ok = macula_quic:send_datagram(C, block(Size)),
         Data = block(Size),
         ?EXPECT({quic, dgram, C, Data})
     end || Size <- [0, 1, 500, 1100]],
    leave(Peer).

our_client_retry(Config) ->
    %% These servers take no client that comes without a token.
    {Peer, C} = their_server(Config, #{}, #{retry => true}, direct),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(Peer).

our_client_resumption(Config) ->
    {Theirs, Port} = start_server(Config, #{}),
    Options = #{resumption => true},
    with_ticket(Config, Port, Options),
    {ok, C} = connect(Config, Port, Options),
    ?assertMatch({ok, #{resumed := true}}, macula_quic:info(C)),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(#{port => Theirs, conn => C}).

our_client_early_data(Config) ->
    {Theirs, Port} = start_server(Config, #{early => true}),
    Options = #{resumption => true, early_data => true},
    with_ticket(Config, Port, Options),
    {ok, C} = connect(Config, Port, Options),
    ?assertMatch({ok, #{early_data := Early}} when Early =:= pending; Early =:= accepted,
                 macula_quic:info(C)),
    ?assertEqual(<<"early">>, ask(C, <<"early">>)),
    {ok, C} = macula_quic:handshake(C),
    ?assertMatch({ok, #{resumed := true, early_data := accepted}}, macula_quic:info(C)),
    leave(#{port => Theirs, conn => C}).

our_client_key_update(Config) ->
    {Peer, C} = their_server(Config),
    %% Asks aioquic for an update; Quinn makes one within its first thousand packets.
    [?assertEqual(block($k, 10000), ask(C, block($k, 10000)))
     || ?config(peer, Config) =:= aioquic, _ <- lists:seq(1, 5)],
    ask_for_bulk(C),
    _ = ?config(peer, Config) =:= s2n andalso
        ?assertMatch(Updates when Updates > 0, tell(Peer, ["key_updates"])),
    leave(Peer).

our_client_rebinding(Config) ->
    %% A client that only receives says nothing by which a server could learn of its new address.
    Ours = #{keep_alive_interval_ms => 100},
    {Peer = #{relay := Relay}, C} = their_server(Config, Ours, #{}, #{}),
    rebind_in_flow(Relay, fun() -> ask_for_bulk(C) end),
    leave(Peer).

our_client_version_negotiation(Config) ->
    {Theirs, Port} = start_server(Config, #{v2 => true}),
    ?assertEqual({error, version_mismatch}, connect(Config, Port, #{})),
    leave(#{port => Theirs}).

our_client_alpn_refusal(Config) ->
    {Theirs, Port} = start_server(Config, #{}),
    Refused = case ?config(peer, Config) of
        %% Its TLS has one alert for all that a handshake fails of.
        s2n -> {tls_alert, handshake_failure};
        _ -> {alpn_mismatch, [<<"alien">>]}
    end,
    ?assertEqual({error, Refused}, connect(Config, Port, #{alpn => ["alien"]})),
    leave(#{port => Theirs}).

our_client_mutual_tls(Config) ->
    Ours = #{certfile => file(cert, client, Config), keyfile => file(key, client, Config)},
    {Peer, C} = their_server(Config, Ours, #{mtls => true, ca => file(ca, client, Config)}, direct),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(Peer).

our_client_long_chain(Config) ->
    Theirs = #{cert => file(cert, long, Config), key => file(key, long, Config)},
    {Peer, C} = their_server(Config, #{cacertfile => file(ca, long, Config)}, Theirs, direct),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(Peer).

our_client_trusts_not_all(Config) ->
    {Theirs, Port} = start_server(Config, #{}),
    ?assertMatch({error, {bad_cert, _}},
                 connect(Config, Port, #{cacertfile => file(ca, other, Config)})),
    #{public := Key} = macula_quic_lab:ed25519(),
    ?assertEqual({error, {bad_cert, pubkey_mismatch}}, connect(Config, Port, #{verify_pubkey => Key})),
    leave(#{port => Theirs}).

our_client_loss(Config) ->
    {Peer, C} = their_server(Config, #{}, #{}, #{loss => 0.05, seed => 5}),
    ask_for_bulk(C),
    Many = [{open(C, block($e, 20000)), block($e, 20000)} || _ <- lists:seq(1, 100)],
    [?assertEqual(Data, macula_quic_lab:read_to_end(Stream)) || {Stream, Data} <- Many],
    leave(Peer).

our_client_close(Config) ->
    {#{port := Theirs}, Closing} = their_server(Config),
    %% Before a handshake is confirmed a client says it in two packets of one datagram, of which quiche and
    %% s2n-quic drop all when they have no keys for the first.
    ?assertEqual(<<"echo">>, ask(Closing, <<"echo">>)),
    ok = macula_quic:close_connection(Closing, 4711, <<"bye">>),
    {closed, [Code, true | _]} = said(Theirs),
    ?assertEqual(4711, Code),
    leave(#{port => Theirs}),
    {Peer, C} = their_server(Config),
    Stream = open(C, <<$x, 4711:64>>),
    Words = case ?config(peer, Config) of
        s2n -> <<>>;
        _ -> <<"asked to">>
    end,
    Reason = {application_close, 4711, Words},
    ?EXPECT({quic, shutdown, C, Reason}),
    ?assertEqual({error, {connection_lost, Reason}}, macula_quic:recv(Stream, 0, 10000)),
    leave(Peer).

%%--------------------------------------------------------------------------------------------

move_bulk(Peer) ->
    ?assertEqual(["fin", true], tell(Peer, ["up", ?BULK])),
    ?assertEqual(["fin", true], tell(Peer, ["down", ?BULK])),
    ?assertEqual(true, tell(Peer, ["echo", 1, ?BULK])).

ask_for_bulk(Conn) ->
    ?assertEqual(digest(block(?BULK)), ask(Conn, block($h, ?BULK))),
    ?assertEqual(digest(block(?BULK)), digest(ask(Conn, <<$g, ?BULK:64>>))),
    Self = self(),
    {ok, Both} = macula_quic:open_stream(Conn),
    spawn_link(fun() ->
        ok = macula_quic:send(Both, block($e, ?BULK), #{fin => true}),
        Self ! {sent, Both}
    end),
    ?assertEqual(digest(block($e, ?BULK)), digest(macula_quic_lab:read_to_end(Both))),
    ?EXPECT({sent, Both}).

%% aioquic updates when asked; the others only follow. Quinn itself makes an update within its first
%% thousand packets, without which nothing more would be understood.
update_keys(aioquic, Peer) ->
    [?assertEqual(true, tell(Peer, ["key_update"])) || _ <- lists:seq(1, 5)],
    move_bulk(Peer);
update_keys(quiche, Peer) ->
    move_bulk(Peer);
update_keys(s2n, Peer) ->
    move_bulk(Peer),
    ?assertMatch(Updates when Updates > 0, tell(Peer, ["key_updates"])).

%% The NAT forgets its mappings while the work is done, up to three times: the work may be done sooner.
rebind_in_flow(Relay, Work) ->
    Test = self(),
    Nat = spawn_link(fun() ->
        [begin
             rebind_later(Relay),
             Test ! {rebound, Relay}
         end || _ <- lists:seq(1, 3)],
        receive stop -> ok end
    end),
    Work(),
    unlink(Nat),
    exit(Nat, kill),
    ?EXPECT({rebound, Relay}).

rebind_later(Relay) ->
    Bytes = fun() ->
        #{up := #{bytes := Up}, down := #{bytes := Down}} = macula_relay:stats(Relay),
        Up + Down
    end,
    Before = Bytes(),
    macula_test_nodes:wait_until(fun() -> Bytes() > Before + 2 * ?MB end),
    ok = macula_relay:rebind(Relay).

file(What, Name, Config) ->
    #{Name := #{What := Value}} = ?config(credentials, Config),
    Value.

%% A connection, until it has brought a ticket.
with_ticket(Config, Port, Options) ->
    {ok, C} = connect(Config, Port, Options),
    ?EXPECT({quic, nst_received, C, <<>>}),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    ok = macula_quic:close_connection(C).

connect(Config, Port, Options) ->
    Default = #{cacertfile => file(ca, server, Config), alpn => ["interop"]},
    macula_quic:connect("localhost", Port, maps:merge(Default, Options), 20000).

start_server(Config, Options) ->
    Default = #{cert => file(cert, server, Config), key => file(key, server, Config)},
    Theirs = start(Config, "server", maps:merge(Default, Options)),
    {listening, Port} = said(Theirs),
    {Theirs, Port}.

their_server(Config) ->
    their_server(Config, #{}, #{}, direct).

their_server(Config, Ours, Options, Way) ->
    {Theirs, Port} = start_server(Config, Options),
    Peer = through(Way, Port),
    {ok, Conn} = connect(Config, maps:get(at, Peer), Ours),
    {Peer#{port => Theirs, conn => Conn}, Conn}.

our_server(Config, Options) ->
    Default = #{certfile => file(cert, server, Config), keyfile => file(key, server, Config),
                alpn => ["other", "interop"]},
    {ok, Listener} = macula_quic:listen("127.0.0.1", 0, maps:merge(Default, Options)),
    {ok, {_, Port}} = macula_quic:sockname(Listener),
    {Listener, Port}.

their_client(Config) ->
    their_client(Config, #{}, #{}, direct).

%% The calling process owns the connection; others serve its streams.
their_client(Config, Ours, Options, Way) ->
    {Listener, Port} = our_server(Config, Ours),
    Peer = through(Way, Port),
    Default = #{port => maps:get(at, Peer), ca => file(ca, server, Config)},
    Theirs = start(Config, "client", maps:merge(Default, Options)),
    Self = self(),
    %% One that resumes has been there before.
    [macula_quic_lab:in_process(fun() ->
         {ok, First} = macula_quic:accept(Listener, 20000),
         serve(First, Self)
     end) || is_map_key(resume, Options)],
    {ok, Conn} = macula_quic:accept(Listener, 20000),
    spawn_link(fun() -> serve(Conn, Self) end),
    {connected, true} = said(Theirs),
    ok = macula_quic:setopt(Conn, datagrams, true),
    Peer#{port => Theirs, conn => Conn, listener => Listener}.

%% Packets go straight to this port, or by a relay with these options.
through(direct, Port) ->
    #{at => Port};
through(Options, Port) ->
    {ok, Relay} = macula_relay:start_link(Options#{target => {{127, 0, 0, 1}, Port}}),
    #{at => macula_relay:port(Relay), relay => Relay}.

%% As the peers do.
serve(Conn, Test) ->
    case macula_quic:accept_stream(Conn) of
        {ok, Stream} ->
            Pid = spawn_link(fun() -> receive go -> serve_stream(Conn, Stream, Test) end end),
            ok = macula_quic:controlling_process(Stream, Pid),
            Pid ! go,
            serve(Conn, Test);
        {error, closed} ->
            ok
    end.

serve_stream(Conn, Stream, Test) ->
    case macula_quic:info(Stream) of
        {ok, #{direction := unidirectional}} ->
            Digest = digest(macula_quic_lab:read_to_end(Stream)),
            {ok, Back} = macula_quic:open_stream(Conn, #{direction => unidirectional}),
            finish(Back, Digest);
        {ok, #{}} ->
            letter(macula_quic:recv(Stream, 1), Conn, Stream, Test)
    end.

letter({error, closed}, _Conn, Stream, _Test) ->
    finish(Stream, <<>>);
letter({ok, <<"e">>}, _Conn, Stream, Test) ->
    ok = macula_quic:send(Stream, <<"e">>),
    echo(Stream, Test);
letter({ok, <<"w">>}, _Conn, Stream, Test) ->
    Test ! {held, self()},
    receive release -> ok end,
    {error, closed} = macula_quic:recv(Stream, 0),
    finish(Stream, <<>>);
letter({ok, <<"h">>}, _Conn, Stream, _Test) ->
    finish(Stream, digest(macula_quic_lab:read_to_end(Stream)));
letter({ok, Letter}, Conn, Stream, _Test) ->
    {ok, <<Number:64>>} = macula_quic:recv(Stream, 8),
    case Letter of
        <<"g">> ->
            finish(Stream, block(Number));
        <<"r">> ->
            ok = macula_quic:async_shutdown_stream(Stream, abort_send, Number);
        <<"s">> ->
            ok = macula_quic:async_shutdown_stream(Stream, abort_receive, Number);
        <<"x">> ->
            ok = macula_quic:async_shutdown_connection(Conn, 0, {Number, "asked to"})
    end.

echo(Stream, Test) ->
    case macula_quic:recv(Stream, 0) of
        {ok, Data} ->
            ok = macula_quic:send(Stream, Data),
            echo(Stream, Test);
        {error, closed} ->
            finish(Stream, <<>>);
        {error, {reset, Code}} ->
            ?EXPECT({quic, peer_send_aborted, Stream, Code}),
            ?EXPECT({quic, peer_receive_aborted, Stream, Stop}, Test ! {aborted, {Code, Stop}})
    end.

%% Until it is delivered: the stream's owner must live as long.
finish(Stream, Data) ->
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    ?EXPECT({quic, stream_closed, Stream, _}, ok, 60000).

open(Conn, Data) ->
    {ok, Stream} = macula_quic:open_stream(Conn),
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    Stream.

ask(Conn, Data) ->
    macula_quic_lab:read_to_end(open(Conn, Data)).

block(Letter, Size) ->
    <<Letter, (block(Size))/binary>>.

block(Size) ->
    binary:part(binary:copy(<<"0123456789abcdef">>, Size div 16 + 1), 0, Size).

digest(Data) ->
    crypto:hash(sha256, Data).

%%--------------------------------------------------------------------------------------------
%% The peers

start(Config, Role, Options) ->
    Arguments = ?config(arguments, Config) ++ [Role, json(Options)],
    open_port({spawn_executable, ?config(program, Config)},
              [{args, Arguments}, {line, 10000}, exit_status, use_stdio, binary]).

json(Options) ->
    Values = [io_lib:format("\"~s\": ~s", [Key, value(Value)]) || {Key, Value} <- maps:to_list(Options)],
    lists:flatten(["{", lists:join(", ", Values), "}"]).

value(Text) when is_binary(Text) -> ["\"", Text, "\""];
value(Value) -> io_lib:format("~w", [Value]).

tell(Peer, Command) ->
    command(Peer, Command),
    result(Peer).

result(#{port := Theirs} = Peer) ->
    {result, Result} = said(Theirs, maps:get(conn, Peer, undefined)),
    Result.

command(#{port := Theirs}, Command) ->
    true = port_command(Theirs, io_lib:format("~0p~n", [Command])).

said(Theirs) ->
    said(Theirs, undefined).

%% Datagrams are echoed meanwhile.
said(Theirs, Conn) ->
    receive
        {Theirs, {data, {eol, Line}}} ->
            {ok, Tokens, _} = erl_scan:string(binary_to_list(Line)),
            {ok, Term} = erl_parse:parse_term(Tokens),
            Term;
        {Theirs, {exit_status, Status}} ->
            error({peer_has_ended, Status});
        {quic, dgram, Conn, Data} ->
            ok = macula_quic:send_datagram(Conn, Data),
            said(Theirs, Conn)
    after 60000 ->
        error(peer_says_nothing)
    end.

%% Its standard input ends, and with it the process.
leave(#{port := Theirs} = Peer) ->
    _ = erlang:port_info(Theirs) =:= undefined orelse port_close(Theirs),
    [ok = macula_quic:close_connection(Conn) || #{conn := Conn} <- [Peer]],
    [ok = macula_relay:stop(Relay) || #{relay := Relay} <- [Peer]],
    ok.
