%% Another implementation of QUIC at the other end: aioquic, in both roles. Skipped where there is no
%% Python with aioquic; MACULA_INTEROP_PYTHON names one that is not called python3:
%%
%%   python3 -m venv V && V/bin/pip install aioquic && export MACULA_INTEROP_PYTHON=V/bin/python
-module(macula_quic_interop_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([their_client_and_streams/1, their_client_and_ends_of_streams/1,
         their_client_and_datagrams/1, their_client_updates_keys/1, their_client_and_retry/1,
         their_client_and_version_negotiation/1, their_client_closes/1,
         our_server_closes_their_client/1]).
-export([their_server_and_streams/1, their_server_and_ends_of_streams/1,
         their_server_and_datagrams/1, their_server_updates_keys/1, their_server_and_retry/1,
         their_server_without_our_version/1, their_server_without_our_protocol/1,
         their_server_is_not_trusted/1, our_client_closes/1, their_server_closes/1]).

-define(MB, 1000000).

all() ->
    [F || {F, 1} <- ?MODULE:module_info(exports), F =/= module_info, F =/= init_per_suite,
          F =/= end_per_suite].

suite() ->
    [{timetrap, {minutes, 2}}].

init_per_suite(Config) ->
    Python = os:getenv("MACULA_INTEROP_PYTHON", "python3"),
    Root = macula_test_run:root(),
    case macula_test_run:run(Root, "'" ++ Python ++ "' -c 'import aioquic'") of
        {0, _} ->
            macula_quic_lab:drained(),
            #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
            Dir = ?config(priv_dir, Config),
            [CertFile, KeyFile] = [filename:join(Dir, F) || F <- ["cert.pem", "key.pem"]],
            ok = file:write_file(CertFile, Cert),
            ok = file:write_file(KeyFile, Key),
            [{python, filename:absname(os:find_executable(Python))}, {certfile, CertFile},
             {keyfile, KeyFile} | Config];
        {_, _} ->
            {skip, Python ++ " has no aioquic (pip install aioquic, MACULA_INTEROP_PYTHON)"}
    end.

end_per_suite(_Config) ->
    macula_quic_lab:drained().

%%--------------------------------------------------------------------------------------------
%% Their client, our server

their_client_and_streams(Config) ->
    Peer = their_client(Config, #{}, []),
    ?assertEqual(["interop", 1, false], tell(Peer, ["info"])),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    ?assertEqual(true, tell(Peer, ["echo", 50, 20000])),
    ?assertEqual(true, tell(Peer, ["uni", 1, 10])),
    ?assertEqual(true, tell(Peer, ["uni", 50, 20000])),
    %% More than the limit of streams in all: it is raised as they end.
    ?assertEqual(true, tell(Peer, ["echo", 100, 10])),
    ?assertEqual(["fin", true], tell(Peer, ["up", 5 * ?MB])),
    ?assertEqual(["fin", true], tell(Peer, ["down", 5 * ?MB])),
    leave(Peer).

their_client_and_ends_of_streams(Config) ->
    Peer = their_client(Config, #{}, []),
    ?assertEqual(["fin", "b''"], tell(Peer, ["empty"])),
    ?assertEqual(["fin", true], tell(Peer, ["half"])),
    [begin
         ?assertEqual(Code, tell(Peer, ["reset", Code])),
         ?assertEqual(Code, tell(Peer, ["stop", Code])),
         ?assertEqual("aborted", tell(Peer, ["abort", Code])),
         ?EXPECT({aborted, Ends}, ?assertEqual({Code, Code + 1}, Ends))
     end || Code <- [0, 63, 16384, (1 bsl 61)]],
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

their_client_and_datagrams(Config) ->
    Peer = their_client(Config, #{}, []),
    [?assertEqual(true, tell(Peer, ["datagrams", Size])) || Size <- [0, 1, 500, 1100]],
    leave(Peer).

their_client_updates_keys(Config) ->
    Peer = their_client(Config, #{}, []),
    [?assertEqual(true, tell(Peer, ["key_update"])) || _ <- lists:seq(1, 5)],
    ?assertEqual(["fin", true], tell(Peer, ["down", ?MB])),
    leave(Peer).

their_client_and_retry(Config) ->
    Peer = their_client(Config, #{retry => always}, []),
    ?assertEqual(["interop", 1, true], tell(Peer, ["info"])),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

their_client_and_version_negotiation(Config) ->
    Peer = their_client(Config, #{}, ["vn"]),
    ?assertEqual(["interop", 1, false], tell(Peer, ["info"])),
    ?assertEqual(true, tell(Peer, ["echo", 1, 10])),
    leave(Peer).

their_client_closes(Config) ->
    [begin
         Peer = #{conn := Conn} = their_client(Config, #{}, []),
         ?assertEqual("closed", tell(Peer, ["close", Code, Reason])),
         Binary = list_to_binary(Reason),
         ?EXPECT({quic, shutdown, Conn, {application_close, Code, Binary}})
     end || {Code, Reason} <- [{0, "bye"}, {4711, ""}, {(1 bsl 62) - 1, "last"}]].

our_server_closes_their_client(Config) ->
    Peer = #{conn := Conn} = their_client(Config, #{}, []),
    %% The code and the reason; no frame is named as it is the application's.
    ?assertEqual([4711, null, "asked to"], tell(Peer, ["ask_close", 4711])),
    ?EXPECT({quic, closed, Conn, normal}).

%%--------------------------------------------------------------------------------------------
%% Their server, our client

their_server_and_streams(Config) ->
    {Peer, C} = their_server(Config, []),
    ?assertEqual({ok, <<"interop">>}, macula_quic:negotiated_protocol(C)),
    ?assertEqual({ok, der(Config)}, macula_quic:peercert(C)),
    [?assertEqual(block($e, Size), ask(C, block($e, Size)))
     || Size <- [0, 10, 20000 | lists:duplicate(120, 100)]],
    Many = [{open(C, block($e, 20000)), block($e, 20000)} || _ <- lists:seq(1, 50)],
    [?assertEqual(Data, macula_quic_lab:read_to_end(Stream)) || {Stream, Data} <- Many],
    Up = block($h, 5 * ?MB),
    ?assertEqual(digest(block(5 * ?MB)), ask(C, Up)),
    ?assertEqual(block(5 * ?MB), ask(C, <<$g, (5 * ?MB):64>>)),
    [begin
         {ok, Out} = macula_quic:open_stream(C, #{direction => unidirectional}),
         ok = macula_quic:send(Out, block(Size), #{fin => true}),
         {ok, In} = macula_quic:accept_stream(C, #{}, 10000),
         ?assertEqual(digest(block(Size)), macula_quic_lab:read_to_end(In))
     end || Size <- [0, 1, 20000 | lists:duplicate(120, 100)]],
    leave(Peer).

their_server_and_ends_of_streams(Config) ->
    {Peer, C} = their_server(Config, []),
    ?assertEqual(<<>>, ask(C, <<>>)),
    {ok, Half} = macula_quic:open_stream(C),
    ok = macula_quic:send(Half, block($h, 1000)),
    ?assertEqual(<<"e">>, ask(C, <<"e">>)),
    ok = macula_quic:async_shutdown_stream(Half, graceful, 0),
    ?assertEqual(digest(block(1000)), macula_quic_lab:read_to_end(Half)),
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

their_server_and_datagrams(Config) ->
    {Peer, C} = their_server(Config, []),
    ok = macula_quic:setopt(C, datagrams, true),
    [begin
         ok = macula_quic:send_datagram(C, block(Size)),
         Data = block(Size),
         ?EXPECT({quic, dgram, C, Data})
     end || Size <- [0, 1, 500, 1100]],
    leave(Peer).

their_server_updates_keys(Config) ->
    {Peer, C} = their_server(Config, []),
    [?assertEqual(block($k, 10000), ask(C, block($k, 10000))) || _ <- lists:seq(1, 5)],
    leave(Peer).

their_server_and_retry(Config) ->
    {Peer, C} = their_server(Config, ["retry"]),
    ?assertEqual(<<"echo">>, ask(C, <<"echo">>)),
    leave(Peer).

their_server_without_our_version(Config) ->
    {Peer, Port} = start_server(Config, ["v2"]),
    ?assertEqual({error, version_mismatch}, connect(Config, Port, [])),
    leave(Peer).

their_server_without_our_protocol(Config) ->
    {Peer, Port} = start_server(Config, []),
    ?assertEqual({error, {alpn_mismatch, [<<"other">>]}},
                 connect(Config, Port, [{alpn, ["other"]}])),
    leave(Peer).

their_server_is_not_trusted(Config) ->
    {Peer, Port} = start_server(Config, []),
    #{cert := Other, public := Key} = macula_quic_lab:ed25519(),
    ?assertMatch({error, {bad_cert, _}},
                 macula_quic:connect("localhost", Port, [{cacerts, Other}, {alpn, ["interop"]}],
                                     10000)),
    ?assertEqual({error, {bad_cert, pubkey_mismatch}},
                 connect(Config, Port, [{verify_pubkey, Key}])),
    leave(Peer).

our_client_closes(Config) ->
    {#{port := Python}, C} = their_server(Config, []),
    ok = macula_quic:close_connection(C, 4711, <<"bye">>),
    ?assertEqual({closed, [4711, null, "bye"]}, said(Python)).

their_server_closes(Config) ->
    {Peer, C} = their_server(Config, []),
    Stream = open(C, <<$x, 4711:64>>),
    Reason = {application_close, 4711, <<"asked to">>},
    ?EXPECT({quic, shutdown, C, Reason}),
    ?assertEqual({error, {connection_lost, Reason}}, macula_quic:recv(Stream, 0, 10000)),
    leave(Peer).

%%--------------------------------------------------------------------------------------------

connect(Config, Port, Options) ->
    macula_quic:connect("localhost", Port, [{cacertfile, ?config(certfile, Config)},
                                            {alpn, ["interop"]} | Options], 10000).

start_server(Config, Options) ->
    Python = python(Config, ["server", ?config(certfile, Config), ?config(keyfile, Config)
                             | Options]),
    {listening, Port} = said(Python),
    {#{port => Python}, Port}.

their_server(Config, Options) ->
    {Peer, Port} = start_server(Config, Options),
    {ok, Conn} = connect(Config, Port, []),
    {Peer#{conn => Conn}, Conn}.

%% The calling process owns the connection; others serve its streams.
their_client(Config, Options, Args) ->
    {Listener, Port} = macula_quic_lab:listen(Options#{alpn => ["other", "interop"]}),
    Python = python(Config, ["client", integer_to_list(Port), ?config(certfile, Config) | Args]),
    {ok, Conn} = macula_quic:accept(Listener, 20000),
    {connected, true} = said(Python),
    Self = self(),
    spawn_link(fun() -> serve(Conn, Self) end),
    ok = macula_quic:setopt(Conn, datagrams, true),
    #{port => Python, conn => Conn, listener => Listener}.

%% As peer.py says.
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
    ?EXPECT({quic, stream_closed, Stream, _}, ok, 30000).

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

der(Config) ->
    {ok, Pem} = file:read_file(?config(certfile, Config)),
    [{_, Der, _}] = public_key:pem_decode(Pem),
    Der.

%%--------------------------------------------------------------------------------------------
%% peer.py

python(Config, Args) ->
    Script = filename:join(?config(data_dir, Config), "peer.py"),
    open_port({spawn_executable, ?config(python, Config)},
              [{args, [Script | Args]}, {line, 10000}, exit_status, use_stdio, binary]).

tell(#{port := Python} = Peer, Command) ->
    true = port_command(Python, io_lib:format("~0p~n", [Command])),
    {result, Result} = said(Python, maps:get(conn, Peer, undefined)),
    Result.

said(Python) ->
    said(Python, undefined).

%% Datagrams are echoed while it is waited for.
said(Python, Conn) ->
    receive
        {Python, {data, {eol, Line}}} ->
            {ok, Tokens, _} = erl_scan:string(binary_to_list(Line)),
            {ok, Term} = erl_parse:parse_term(Tokens),
            Term;
        {Python, {exit_status, Status}} ->
            error({python, Status});
        {quic, dgram, Conn, Data} ->
            ok = macula_quic:send_datagram(Conn, Data),
            said(Python, Conn)
    after 30000 ->
        error(python_says_nothing)
    end.

%% Its standard input ends, and with it the process.
leave(#{port := Python, conn := Conn}) ->
    true = port_close(Python),
    ok = macula_quic:close_connection(Conn);
leave(#{port := Python}) ->
    true = port_close(Python),
    ok.
