%% What the suites of macula_quic share: a certificate, connected pairs, strangers to the protocol,
%% and the count of what lives.
-module(macula_quic_lab).

-include_lib("public_key/include/public_key.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([server_options/0, server_options/1, client_options/0, client_options/1, credentials/0,
         ed25519/0, chain/0, chain/1]).
-export([listen/0, listen/1, loose_listen/0, pair/0, pair/2, pair/3, loose_pair/0, through/2, stream/1, stream/2]).
-export([loose_stream/1, close/1]).
-export([read/2, read_to_end/1, collect/2, times/1, soak/2]).
-export([cases/2, begin_suite/1, end_suite/1]).
-export([objects/0, await_objects/1, drained/0, in_process/1, spawn_owner/1, ask/2, mailbox/0,
         await_mailbox/1]).
-export([initial_packet/0, closing_packet/0, pinging_packet/0, versions/1]).

-define(LOCALHOST, [<<"localhost">>, <<"127.0.0.1">>, <<"::1">>]).

%% @doc How often a test of a race is run: MACULA_QUIC_TIMES, or so often.
times(Default) ->
    list_to_integer(os:getenv("MACULA_QUIC_TIMES", integer_to_list(Default))).

%% @doc The size of a case that `make soak' runs at the second, and everybody else at the first.
soak(Size, Full) ->
    case os:getenv("MACULA_SOAK") of
        false -> Size;
        _ -> Full
    end.

%%--------------------------------------------------------------------------------------------
%% Suites

%% @doc All cases of a suite: what it exports with one argument, but for these and what Common Test calls.
cases(Suite, Others) ->
    [F || {F, 1} <- Suite:module_info(exports),
          not lists:member(F, [module_info, init_per_suite, end_per_suite | Others])].

%% @doc Nothing of another suite is left that a case would count.
begin_suite(Config) ->
    drained(),
    Config.

%% @doc Nothing of this suite is left.
end_suite(_Config) ->
    drained().

%%--------------------------------------------------------------------------------------------
%% Certificates and options

ed25519() ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ?LOCALHOST),
    #{public => Public, private => Private, cert => Cert, key => Key}.

%% One for all tests of this VM.
credentials() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            Made = ed25519(),
            persistent_term:put(?MODULE, Made),
            Made;
        Made ->
            Made
    end.

%% @doc For both sides: root, intermediates and leaf, as public_key makes them. `chain' is the leaf with all
%% that certify it, the root last; `root' is that of the same side.
chain() -> chain(#{}).

%% @doc With more `names' in the leaf, so many `intermediates' (1), `leaf' options of public_key's.
chain(Options) ->
    San = #'Extension'{extnID = ?'id-ce-subjectAltName', critical = false,
                       extnValue = [{dNSName, "localhost"}, {iPAddress, <<127, 0, 0, 1>>}
                                    | [{dNSName, N} || N <- maps:get(names, Options, [])]]},
    %% Not of an elliptic curve: those that public_key makes break RFC 5758, section 3.2.
    Key = [{key, public_key:generate_key({rsa, 2048, 65537})}, {digest, sha256}],
    Side = #{root => Key, intermediates => lists:duplicate(maps:get(intermediates, Options, 1), Key),
             peer => Key ++ [{extensions, [San]}] ++ maps:get(leaf, Options, [])},
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Side, client_chain => Side}),
    #{server => side(Server, Client), client => side(Client, Server)}.

%% The own certificate with its intermediates; the other side's root is trusted.
side(Own, Other) ->
    Leaf = proplists:get_value(cert, Own),
    %% Of both sides: roots and intermediates.
    Cas = lists:usort(proplists:get_value(cacerts, Own) ++ proplists:get_value(cacerts, Other)),
    #{leaf => Leaf, chain => [Leaf | up(Leaf, Cas)], key => proplists:get_value(key, Own),
      root => lists:last(up(Leaf, Cas))}.

up(Cert, Cas) ->
    [Ca] = [Ca || Ca <- Cas, public_key:pkix_is_issuer(Cert, Ca)],
    case public_key:pkix_is_self_signed(Ca) of
        true -> [Ca];
        false -> [Ca | up(Ca, Cas)]
    end.

server_options() -> server_options(#{}).

server_options(More) ->
    #{cert := Cert, key := Key} = credentials(),
    maps:merge(#{cert => Cert, key => Key, alpn => ["test"]}, More).

client_options() -> client_options(#{}).

client_options(More) ->
    #{cert := Cert} = credentials(),
    maps:merge(#{cacerts => Cert, alpn => ["test"]}, More).

%%--------------------------------------------------------------------------------------------
%% Connections and streams

listen() -> listen(#{}).

%% The calling process keeps the listener until it ends: one that nobody holds stops, and a case that dials
%% may have no more use for the handle.
listen(Options) ->
    {Listener, _} = Listening = loose_listen(Options),
    _ = put({?MODULE, Listener}, Listener),
    Listening.

%% A listener that nobody keeps.
loose_listen() -> loose_listen(#{}).

loose_listen(Options) ->
    {ok, Listener} = macula_quic:listen("127.0.0.1", 0, server_options(Options)),
    {ok, {"127.0.0.1", Port}} = macula_quic:sockname(Listener),
    {Listener, Port}.

pair() -> pair(#{}, #{}).

%% The calling process owns all three, and keeps them until it ends or closes the pair: a connection
%% closes with its last handle, and that may overtake what its streams have to say.
pair(ServerOptions, ClientOptions) ->
    {Listener, Port} = listen(ServerOptions),
    pair(Listener, Port, ClientOptions).

pair(Listener, Port, ClientOptions) ->
    #{client := Client} = Pair = loose_pair(Listener, Port, ClientOptions),
    _ = put({?MODULE, Client}, Pair),
    Pair.

%% A pair that nobody keeps.
loose_pair() ->
    {Listener, Port} = loose_listen(),
    loose_pair(Listener, Port, #{}).

loose_pair(Listener, Port, ClientOptions) ->
    {ok, Client} = macula_quic:connect("127.0.0.1", Port, client_options(ClientOptions), 10000),
    {ok, Server} = macula_quic:accept(Listener, 10000),
    #{listener => Listener, port => Port, client => Client, server => Server}.

%% A pair whose packets cross a relay.
through(RelayOptions, ConnOptions) ->
    {Listener, Port} = listen(ConnOptions),
    {ok, Relay} = macula_relay:start_link(RelayOptions#{target => {{127, 0, 0, 1}, Port}}),
    (pair(Listener, macula_relay:port(Relay), ConnOptions))#{relay => Relay}.

%% A stream from client to server, known on both sides; the byte that announced it was read.
%% The calling process keeps both ends until it ends: a stream that nobody holds is finished.
stream(Pair) -> stream(Pair, #{}).

stream(Pair, Options) ->
    {Here, There} = Ends = loose_stream(Pair, Options),
    _ = [put({?MODULE, Stream}, kept) || Stream <- [Here, There]],
    Ends.

%% One that nobody keeps.
loose_stream(Pair) -> loose_stream(Pair, #{}).

loose_stream(#{client := Client, server := Server}, Options) ->
    {ok, Here} = macula_quic:open_stream(Client, Options),
    ok = macula_quic:send(Here, <<"!">>),
    {ok, There} = case macula_quic:accept_stream(Server, #{}, 10000) of
        {ok, _} = Ok -> Ok;
        {error, Reason} ->
            error({not_accepted, Reason, [macula_quic:info(Conn) || Conn <- [Client, Server]]})
    end,
    {ok, <<"!">>} = macula_quic:recv(There, 1, 10000),
    {Here, There}.

close(#{listener := Listener, client := Client, server := Server}) ->
    _ = [erase({?MODULE, Kept}) || Kept <- [Client, Listener]],
    ok = macula_quic:close(Client),
    ok = macula_quic:close(Server),
    ok = macula_quic:close(Listener).

%% Exactly so many bytes, in chunks as they come.
read(_Stream, 0) ->
    ok;
read(Stream, Left) ->
    {ok, Data} = macula_quic:recv(Stream, 0, 30000),
    read(Stream, Left - byte_size(Data)).

read_to_end(Stream) ->
    read_to_end(Stream, []).

read_to_end(Stream, Read) ->
    case macula_quic:recv(Stream, 0, 30000) of
        {ok, Data} -> read_to_end(Stream, [Data | Read]);
        {error, closed} -> iolist_to_binary(lists:reverse(Read))
    end.

%% So many bytes from the messages of an active stream, which must come without a gap.
collect(Stream, Size) ->
    collect(Stream, Size, []).

collect(_Stream, 0, Got) ->
    iolist_to_binary(lists:reverse(Got));
collect(Stream, Left, Got) ->
    ?EXPECT({quic, Data, Stream, #{len := Len}} when is_binary(Data),
            begin
                ?assertEqual(Len, byte_size(Data)),
                collect(Stream, Left - Len, [Data | Got])
            end, 30000).

%%--------------------------------------------------------------------------------------------
%% What lives

%% @doc The live native objects, after every process has let go of what it does not use.
objects() ->
    lists:foreach(fun erlang:garbage_collect/1, processes()),
    lists:sort(macula_nif:live_objects()).

%% @doc Waits until no more lives than before.
await_objects(Before) ->
    macula_test_nodes:wait_until(fun() ->
        Now = objects(),
        case [K || {K, N} <- Now, N > proplists:get_value(K, Before)] of
            [] -> true;
            _ -> {Now, element(2, process_info(self(), messages))}
        end
    %% What was sent to a peer that is cut off keeps its connection until the idle timeout, 30 s.
    end, 45000).

%% @doc Waits until nothing native lives, as between two suites.
drained() ->
    await_objects([{connection, 0}, {listener, 0}, {stream, 0}]).

%% @doc The result of a function run in a process of its own, with which all its handles go.
in_process(Fun) ->
    {Pid, Monitor} = spawn_monitor(fun() -> exit({done, Fun()}) end),
    receive
        {'DOWN', Monitor, process, Pid, {done, Result}} -> Result;
        {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
    end.

%% @doc A process that evaluates what it is asked to, and keeps its mailbox otherwise untouched.
spawn_owner(Setup) ->
    spawn_link(fun() -> owner(Setup()) end).

owner(State) ->
    receive
        {ask, From, Ref, Fun} ->
            From ! {Ref, Fun(State)},
            owner(State)
    end.

ask(Owner, Fun) ->
    Ref = monitor(process, Owner),
    Owner ! {ask, self(), Ref, Fun},
    receive
        {Ref, Result} ->
            demonitor(Ref, [flush]),
            Result;
        {'DOWN', Ref, process, Owner, Reason} ->
            error({owner_died, Reason})
    end.

%% @doc The messages of QUIC in the mailbox, taken out.
mailbox() ->
    receive
        {quic, _, _, _} = Message -> [Message | mailbox()]
    after 0 ->
        []
    end.

%% @doc Waits until the caller's mailbox, of which nothing is taken, is as wanted. Another process looks
%% at it: its owner may not be shown what came last (OTP 25).
await_mailbox(Wanted) ->
    Self = self(),
    in_process(fun() ->
        macula_test_nodes:wait_until(fun() ->
            {messages, Messages} = process_info(Self, messages),
            Wanted(Messages) orelse Messages
        end)
    end).

%%--------------------------------------------------------------------------------------------

%% @doc The versions of QUIC that whoever serves a port of this host offers to a peer that asks for one
%% nobody speaks (RFC 9000, section 17.2.1), without those that only exercise the negotiation.
versions(Port) ->
    {ok, Socket} = gen_udp:open(0, [binary, {active, false}]),
    <<First, 1:32, Rest/binary>> = initial_packet(),
    ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, <<First, 16#5a6a7a8a:32, Rest/binary, 0:800>>),
    {ok, {_, _, Answer}} = gen_udp:recv(Socket, 0, 5000),
    ok = gen_udp:close(Socket),
    <<1:1, _:7, 0:32, N, _:N/binary, M, _:M/binary, Versions/binary>> = Answer,
    [Version || <<Version:32>> <= Versions, Version band 16#0f0f0f0f =/= 16#0a0a0a0a].

%% @doc A datagram that begins a connection and ends it in the same breath (RFC 9001, section 5).
closing_packet() ->
    %% CONNECTION_CLOSE without an error.
    sealed_packet(<<16#1c, 0, 0, 0>>).

%% @doc A datagram that begins a connection, says nothing in it and wants an acknowledgement.
pinging_packet() ->
    sealed_packet(<<1>>).

%% With padding; packet number 0, of one byte.
sealed_packet(Wanted) ->
    Dcid = crypto:strong_rand_bytes(8),
    Salt = binary:decode_hex(<<"38762cf7f55934b34d179ae6a4c80cadccbb7f0a">>),
    Initial = crypto:mac(hmac, sha256, Salt, Dcid),
    Secret = expand(Initial, <<"client in">>, 32),
    [Key, Iv, Mask] = [expand(Secret, Label, Size)
                       || {Label, Size} <- [{<<"quic key">>, 16}, {<<"quic iv">>, 12},
                                            {<<"quic hp">>, 16}]],
    Frames = <<Wanted/binary, 0:((1174 - byte_size(Wanted)) * 8)>>,
    Size = 1 + byte_size(Frames) + 16,
    Head = <<1:32, 8, Dcid/binary, 0, 0, 1:2, Size:14>>,
    {Sealed, Tag} = crypto:crypto_one_time_aead(aes_128_gcm, Key, Iv, Frames,
                                                <<16#c0, Head/binary, 0>>, true),
    <<_:3/binary, Sample:16/binary, _/binary>> = Sealed,
    <<_:4, M0:4, M1, _/binary>> = crypto:crypto_one_time(aes_128_ecb, Mask, Sample, true),
    <<(16#c0 bxor M0), Head/binary, M1, Sealed/binary, Tag/binary>>.

expand(Secret, Label, Size) ->
    Full = <<"tls13 ", Label/binary>>,
    Info = <<Size:16, (byte_size(Full)), Full/binary, 0, 1>>,
    binary:part(crypto:mac(hmac, sha256, Secret, Info), 0, Size).

%% @doc A datagram that begins a connection, and is noise behind its header: long header, padded.
initial_packet() ->
    Dcid = crypto:strong_rand_bytes(8),
    Scid = crypto:strong_rand_bytes(8),
    Rest = crypto:strong_rand_bytes(1150),
    <<16#c3, 1:32, 8, Dcid/binary, 8, Scid/binary, 0, 16#44, 16#96, Rest/binary>>.
