%% The exchange with which nodes show each other the cookie, step by step, for those that may do it wrong.
-module(macula_dist_proof).

-export([hello/3, said/2, proof/3, hear/1, dialled/4, exporter/1]).

-define(LABEL, <<"EXPORTER-macula-dist-1">>).
-define(TIMEOUT, 10000).

%% The frame with which an honest dialler begins, with a share of one's own.
hello(From, To, Share) ->
    macula_dist_stranger:frame([3, said(From, To), Share]).

%% What it says of itself.
said(From, To) ->
    <<(byte_size(From)):16, From/binary, (byte_size(To)):16, To/binary, 10000:32>>.

proof(Key, Role, Proven) ->
    crypto:mac(hmac, sha256, Key, [<<"macula-dist/1 ">>, atom_to_binary(Role), 0, Proven]).

%% The next frame.
hear(Stream) ->
    {ok, <<Length:32>>} = macula_quic:recv(Stream, 4, ?TIMEOUT),
    {ok, Frame} = macula_quic:recv(Stream, Length, ?TIMEOUT),
    Frame.

%% Says and hears all that a dialler does who has this cookie: the key, or what the node refuses with.
dialled(Stream, {From, To}, Cookie, Exporter) ->
    {Exchange, Share} = macula_nif:dist_exchange(dialler, Cookie),
    ok = macula_quic:send(Stream, hello(From, To, Share)),
    <<0, Theirs:33/binary>> = hear(Stream),
    {ok, Key} = macula_nif:dist_exchange_key(Exchange, Theirs),
    Said = said(From, To),
    ok = macula_quic:send(Stream, macula_dist_stranger:frame([0, proof(Key, dialler, [Exporter, Said])])),
    case hear(Stream) of
        <<0, Liveness:4/binary, Proof/binary>> ->
            %% The node has proven itself, too.
            Proof = proof(Key, acceptor, [Exporter, Said, Liveness]),
            {ok, Key};
        Refusal ->
            {refused, Refusal}
    end.

%% The exporter value of a TLS session, which is derived here (RFC 8446, section 7.5) from what the session's key
%% log says.
exporter(Keys) ->
    Secret = macula_test_nodes:wait_until(fun() ->
        {ok, Text} = file:read_file(Keys),
        case re:run(Text, "^EXPORTER_SECRET \\S+ (\\S+)$", [multiline, {capture, all_but_first, binary}]) of
            {match, [Hex]} -> {value, <<(binary_to_integer(Hex, 16)):256>>};
            nomatch -> no_secret
        end
    end),
    Empty = crypto:hash(sha256, <<>>),
    expand(expand(Secret, ?LABEL, Empty), <<"exporter">>, Empty).

%% HKDF-Expand-Label to the length of the hash.
expand(Secret, Label, Context) ->
    Full = <<"tls13 ", Label/binary>>,
    crypto:mac(hmac, sha256, Secret, <<32:16, (byte_size(Full)), Full/binary, (byte_size(Context)),
                                       Context/binary, 1>>).
