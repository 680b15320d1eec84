%% @doc Who may link with this node: proofs of the cookie, bound to the TLS session.
%%
%% Before the first byte of the distribution's own handshake both ends prove that they know the
%% cookie, over the exporter value of this very TLS session, their role and both node names. The one
%% that dials proves first, so that a stranger who dials learns nothing. A machine in the middle
%% that decrypts and encrypts again has two sessions with two exporter values, and neither proof is
%% worth anything in the other.
%%
%% The certificates are made in memory at each start and are not looked at; what an attacker without
%% the cookie can do is connect, and be refused with one line in the log.
%%
%% The frames, on the link's control stream:
%% ```
%% dialler:   1, NameLen:16, DiallersName, NameLen:16, NameAskedFor, Proof:32/binary, Liveness:32
%% acceptor:  0, Proof:32/binary, Liveness:32    or    Reason (1: cookie, 2: name, 3: malformed)
%% '''
%% Liveness is what the node was started with, in milliseconds; the smaller value counts for the link.
%% @private
-module(macula_dist_trust).

-export([dial/4, accept/2, log_refused/2, format_error/1, endpoint_key/1]).

-define(VERSION, 1).
-define(OK, 0).
-define(BAD_COOKIE, 1).
-define(WRONG_NAME, 2).
-define(MALFORMED, 3).

%% A peer that has connected proves itself within this time.
-define(TIMEOUT, 7000).

-type link() :: reference().
-type reason() :: bad_cookie | wrong_name | malformed | no_cookie | timeout | {closed, term()}.
-export_type([reason/0]).

%% @doc Proves this node to the one it dialled, and checks that one.
-spec dial(link(), node(), node(), atom()) -> ok | {error, reason()}.
dial(Link, MyNode, Node, Cookie) ->
    case exporter(Link, Cookie) of
        {ok, Exporter} ->
            Names = names(atom_to_binary(MyNode), atom_to_binary(Node)),
            Hello = [?VERSION, Names, proof(Cookie, dialler, Exporter, Names), liveness()],
            case send(Link, Hello) of
                ok ->
                    case recv(Link) of
                        {ok, <<?OK, Proof:32/binary, Rest/binary>>} ->
                            trust(Link, Rest, is_proof(Proof, Cookie, acceptor, Exporter, Names));
                        {ok, <<?BAD_COOKIE>>} -> {error, bad_cookie};
                        {ok, <<?WRONG_NAME>>} -> {error, wrong_name};
                        {ok, _} -> {error, malformed};
                        {error, _} = Error -> Error
                    end;
                {error, _} = Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

%% @doc Checks a peer that has dialled this node, and proves this node to it.
-spec accept(link(), node()) -> ok | {error, reason()}.
accept(Link, MyNode) ->
    case recv(Link) of
        {ok, Hello} -> accept(Link, MyNode, Hello);
        {error, _} = Error -> Error
    end.

accept(Link, MyNode, <<?VERSION, Rest/binary>>) ->
    case Rest of
        <<PeerLen:16, Peer:PeerLen/binary, AskedLen:16, Asked:AskedLen/binary, Proof:32/binary,
          Liveness/binary>> ->
            Cookie = cookie(Peer),
            Names = names(Peer, Asked),
            case exporter(Link, Cookie) of
                {ok, Exporter} ->
                    case is_proof(Proof, Cookie, dialler, Exporter, Names) of
                        ok ->
                            Greeted = greet(Link, MyNode, Asked, Cookie, Exporter, Names),
                            trust(Link, Liveness, Greeted);
                        {error, _} = Error ->
                            refuse(Link, ?BAD_COOKIE, Error)
                    end;
                {error, no_cookie} = Error ->
                    refuse(Link, ?BAD_COOKIE, Error);
                {error, _} = Error ->
                    Error
            end;
        _ ->
            refuse(Link, ?MALFORMED, {error, malformed})
    end;
accept(Link, _MyNode, _) ->
    refuse(Link, ?MALFORMED, {error, malformed}).

%% The name is checked after the proof: a stranger is not told what this node is called.
greet(Link, MyNode, Asked, Cookie, Exporter, Names) ->
    case atom_to_binary(MyNode) of
        Asked -> send(Link, [?OK, proof(Cookie, acceptor, Exporter, Names), liveness()]);
        _ -> refuse(Link, ?WRONG_NAME, {error, wrong_name})
    end.

%% From here on the peer is no stranger, and its lane may come.
trust(Link, <<Liveness:32>>, ok) when Liveness >= 1000, Liveness =< 600000 ->
    macula_dist_nif:dist_trust(Link, Liveness);
trust(_Link, _Liveness, ok) ->
    {error, malformed};
trust(_Link, _Liveness, {error, _} = Error) ->
    Error.

liveness() ->
    {ok, Ms} = macula_dist:liveness(),
    <<Ms:32>>.

refuse(Link, Code, Error) ->
    _ = send(Link, [Code]),
    Error.

%% The peer's own cookie where one is set. Its name makes no atom: one that is not known yet can't
%% have a cookie of its own.
cookie(Peer) ->
    try binary_to_existing_atom(Peer) of
        Node -> auth:get_cookie(Node)
    catch
        error:_ -> auth:get_cookie()
    end.

exporter(_Link, nocookie) ->
    {error, no_cookie};
exporter(Link, _Cookie) ->
    case macula_dist_nif:dist_exporter(Link) of
        {ok, _} = Ok -> Ok;
        {error, Why} -> {error, {closed, Why}}
    end.

names(Dialler, Asked) ->
    <<(byte_size(Dialler)):16, Dialler/binary, (byte_size(Asked)):16, Asked/binary>>.

proof(Cookie, Role, Exporter, Names) ->
    macula_dist_nif:dist_mac(atom_to_binary(Cookie), said(Role, Exporter, Names)).

is_proof(Proof, Cookie, Role, Exporter, Names) ->
    case macula_dist_nif:dist_is_mac(atom_to_binary(Cookie), said(Role, Exporter, Names), Proof) of
        true -> ok;
        false -> {error, bad_cookie}
    end.

said(Role, Exporter, Names) ->
    Tag = case Role of
        dialler -> <<"macula-dist/1 dialler">>;
        acceptor -> <<"macula-dist/1 acceptor">>
    end,
    [Tag, 0, Exporter, Names].

send(Link, Frame) ->
    case macula_dist_link:send_frame(Link, Frame) of
        ok -> ok;
        {error, Why} -> {error, {closed, Why}}
    end.

recv(Link) ->
    case macula_dist_link:recv_frame(Link, ?TIMEOUT) of
        {ok, _} = Ok -> Ok;
        {error, timeout} -> {error, timeout};
        {error, Why} -> {error, {closed, Why}}
    end.

%% @doc The secret from which an endpoint's stateless reset tokens and connection ids are made: the
%% same each time this node starts. It has nothing to do with the cookie, as tokens are shown to
%% strangers, who could try cookies against them. Where no secret can be kept it is a new one each
%% time, and a restarted node's peers notice later.
-spec endpoint_key(string()) -> <<_:320>>.
endpoint_key(Node) ->
    Secret = case macula_dist_discovery:secret() of
        {ok, Kept} -> Kept;
        none -> macula_dist_nif:dist_random()
    end,
    Derive = fun(Label) ->
        macula_dist_nif:dist_mac(Secret, [<<"macula-dist/1 ">>, Label, 0,
                                          unicode:characters_to_binary(Node)])
    end,
    <<Cid:8/binary, _/binary>> = Derive(<<"connection ids">>),
    <<(Derive(<<"stateless reset">>))/binary, Cid/binary>>.

%% @doc One line that says who was refused and why. Without a log domain: the VM's default handler
%% shows no domain but OTP's own, and this is to be seen.
-spec log_refused(term(), term()) -> ok.
log_refused(Peer, Reason) ->
    logger:error("macula_dist: ~ts refused: ~ts", [peer(Peer), format_error(Reason)],
                 #{macula_dist => {refused, Peer, Reason}}).

peer({to, Node}) ->
    io_lib:format("connection to ~ts", [Node]);
peer({Ip, Port}) ->
    io_lib:format("connection from ~ts port ~w", [inet:ntoa(Ip), Port]);
peer({Ip, Port, Scope}) ->
    io_lib:format("connection from ~ts%~w port ~w", [inet:ntoa(Ip), Scope, Port]).

%% @doc A sentence for a reason.
-spec format_error(term()) -> iodata().
format_error(bad_cookie) -> "not the same cookie, or a machine in the middle";
format_error(wrong_name) -> "the node there has another name";
format_error(no_cookie) -> "this node has no cookie, and there are no links without one";
format_error(malformed) -> "does not speak the distribution's protocol";
format_error(too_many) -> "too many peers at a time that had not proven themselves";
format_error(timeout) -> "did not prove itself in time";
format_error({closed, Why}) -> ["the connection ended before its proof: ", format_error(Why)];
format_error({tls_alert, 120}) -> "speaks another protocol than macula-dist/1";
format_error({tls_alert, 116}) -> "has no certificate, as a plain QUIC client";
format_error({tls_alert, Alert}) -> io_lib:format("TLS alert ~w", [Alert]);
format_error({native_library_not_loaded, Why}) ->
    io_lib:format("the native library could not be loaded: ~0tp", [Why]);
format_error(Other) -> io_lib:format("~0p", [Other]).
