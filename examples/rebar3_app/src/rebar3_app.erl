%% @doc An echo over QUIC, both ends in one VM: `rebar3 compile', then
%% `erl -noshell -pa _build/default/lib/*/ebin -s rebar3_app main'.
-module(rebar3_app).

-export([main/0]).

-define(ALPN, "echo").

%% @doc Sends a megabyte to an echo server and checks what comes back.
-spec main() -> no_return().
main() ->
    %% The client knows the server by its key, as SSH does: no certificate authority is needed.
    {PublicKey, PrivateKey} = crypto:generate_key(eddsa, ed25519),
    Port = start_server(PublicKey, PrivateKey),
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{alpn, [?ALPN]},
                                                         {verify_pubkey, PublicKey}], 5000),
    {ok, Stream} = macula_quic:open_stream(Conn),
    Data = crypto:strong_rand_bytes(1 bsl 20),
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    {ok, Data} = macula_quic:recv(Stream, byte_size(Data), 10000),
    ok = macula_quic:close(Conn),
    io:format("echoed ~b bytes over QUIC~n", [byte_size(Data)]),
    halt(0).

start_server(PublicKey, PrivateKey) ->
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(PublicKey, PrivateKey, ["127.0.0.1"]),
    Starter = self(),
    Server = spawn_link(fun() ->
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0}, [{cert, Cert}, {key, Key},
                                                               {alpn, [?ALPN]}]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        Starter ! {self(), Port},
        {ok, Conn} = macula_quic:accept(Listener, infinity),
        {ok, Stream} = macula_quic:accept_stream(Conn, #{active => 10}, infinity),
        echo(Stream)
    end),
    receive {Server, Port} -> Port end.

%% Ten messages at a time: a client that does not read stops the server from reading, too.
echo(Stream) ->
    receive
        {quic, Data, Stream, _Info} when is_binary(Data) ->
            ok = macula_quic:send(Stream, Data),
            echo(Stream);
        {quic, passive, Stream, undefined} ->
            ok = macula_quic:setopt(Stream, active, 10),
            echo(Stream);
        {quic, peer_send_shutdown, Stream, undefined} ->
            ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
            echo(Stream);
        {quic, stream_closed, Stream, _Info} ->
            ok
    end.
