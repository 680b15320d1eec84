%% @doc Who may link with this node: those that know the cookie, as a password-authenticated key exchange
%% shows that is bound to the TLS session.
%%
%% Before the first byte of the distribution's own handshake both ends make a key of the cookie (SPAKE2) and
%% prove to each other that they have the same, over the exporter value of this very TLS session, their
%% role and both node names. The one that dials proves first. A stranger that dials, or that answers in a
%% node's place, has one guess at the cookie for each connection, is refused and logged when it is wrong,
%% and has seen nothing that other guesses could be held against. A machine in the middle that decrypts
%% and encrypts again has two sessions with two exporter values, and neither proof is worth anything in
%% the other.
%%
%% The certificates are made in memory at each start and are not looked at; what an attacker without
%% the cookie can do is connect, and be refused with one line in the log.
%%
%% The frames, on the link's control stream:
%% ```
%% dialler:   3, NameLen:16, DiallersName, NameLen:16, NameAskedFor, Liveness:32, Share:33/binary
%% acceptor:  0, Share:33/binary                  or    Reason (1: cookie, 3: malformed)
%% dialler:   0, Proof:32/binary
%% acceptor:  0, Liveness:32, Proof:32/binary     or    Reason (1: cookie, 2: name, 3: malformed)
%% '''
%% The liveness times, in milliseconds, are part of what is proven. The smaller one counts for the link.
%% @private
-module(macula_dist_trust).

-export([dial/5, accept/3, log_refused/2, format_address/1, format_error/1, endpoint_key/1]).

-define(VERSION, 3).
-define(OK, 0).
-define(BAD_COOKIE, 1).
-define(WRONG_NAME, 2).
-define(MALFORMED, 3).

%% A peer that has connected proves itself within this time.
-define(TIMEOUT, 7000).

-type link() :: reference().
-type reason() :: bad_cookie | wrong_name | malformed | no_cookie | timeout | {closed, term()}.
-export_type([reason/0]).

%% @doc Proves this node to the one it dialled, and checks that one. Its liveness time comes back.
-spec dial(link(), node(), node(), atom(), pos_integer()) ->
          {ok, non_neg_integer()} | {error, reason()}.
dial(Link, MyNode, Node, Cookie, Liveness) ->
    try
        Deadline = deadline(),
        Session = exporter(Link, Cookie),
        Said = said(atom_to_binary(MyNode), atom_to_binary(Node), Liveness),
        {Exchange, Share} = macula_dist_nif:dist_exchange(dialler, atom_to_binary(Cookie)),
        send(Link, [?VERSION, Said, Share]),
        Key = key(Exchange, answer(Link, Deadline)),
        send(Link, [?OK, proof(Key, dialler, [Session, Said])]),
        {Theirs, Proof} = proven(answer(Link, Deadline)),
        check(Proof, Key, acceptor, [Session, Said, <<Theirs:32>>]),
        trust(Link, Theirs),
        {ok, Theirs}
    catch
        throw:{untrusted, Reason} -> {error, Reason}
    end.

%% @doc Checks a peer that has dialled this node, and proves this node to it. The peer's name, which may be
%% no atom yet, and its liveness time come back.
-spec accept(link(), node(), pos_integer()) -> {ok, Peer :: binary(), non_neg_integer()} | {error, reason()}.
accept(Link, MyNode, Liveness) ->
    try
        Deadline = deadline(),
        {Peer, Asked, Theirs, TheirShare} = asked(recv(Link, Deadline)),
        Cookie = cookie(Peer),
        Session = exporter(Link, Cookie),
        Said = said(Peer, Asked, Theirs),
        {Exchange, Share} = macula_dist_nif:dist_exchange(acceptor, atom_to_binary(Cookie)),
        %% The peer makes its key in the same time.
        send(Link, [?OK, Share]),
        Key = key(Exchange, TheirShare),
        check(answer(Link, Deadline), Key, dialler, [Session, Said]),
        check_name(Asked, MyNode),
        send(Link, [?OK, <<Liveness:32>>, proof(Key, acceptor, [Session, Said, <<Liveness:32>>])]),
        trust(Link, Theirs),
        {ok, Peer, Theirs}
    catch
        throw:{untrusted, Reason} ->
            _ = refuse(Link, Reason),
            {error, Reason}
    end.

-spec untrusted(reason()) -> no_return().
untrusted(Reason) ->
    throw({untrusted, Reason}).

%% -- what is said ---------------------------------------------------------------------------------

asked(<<?VERSION, PeerLen:16, Peer:PeerLen/binary, AskedLen:16, Asked:AskedLen/binary, Theirs:32,
        Share:33/binary>>) ->
    {Peer, Asked, Theirs, Share};
asked(_) ->
    untrusted(malformed).

%% What an answer holds that is no refusal.
answer(Link, Deadline) ->
    case recv(Link, Deadline) of
        <<?OK, Answer/binary>> -> Answer;
        <<?BAD_COOKIE>> -> untrusted(bad_cookie);
        <<?WRONG_NAME>> -> untrusted(wrong_name);
        _ -> untrusted(malformed)
    end.

proven(<<Liveness:32, Proof:32/binary>>) -> {Liveness, Proof};
proven(_) -> untrusted(malformed).

%% A peer that goes or keeps silent is not told why.
refuse(Link, bad_cookie) -> say(Link, [?BAD_COOKIE]);
refuse(Link, no_cookie) -> say(Link, [?BAD_COOKIE]);
refuse(Link, wrong_name) -> say(Link, [?WRONG_NAME]);
refuse(Link, malformed) -> say(Link, [?MALFORMED]);
refuse(_Link, _) -> ok.

%% The name is checked after the proof: a stranger is not told what this node is called.
check_name(Asked, MyNode) ->
    case atom_to_binary(MyNode) of
        Asked -> ok;
        _ -> untrusted(wrong_name)
    end.

%% From here on the peer is no stranger, and its lanes may come.
trust(Link, Theirs) when Theirs >= 1000, Theirs =< 600000 ->
    ok = macula_dist_nif:dist_trust(Link, Theirs);
trust(_Link, _Theirs) ->
    untrusted(malformed).

%% The peer's own cookie where one is set. Its name makes no atom: one that is not known yet can't
%% have a cookie of its own.
cookie(Peer) ->
    try binary_to_existing_atom(Peer) of
        Node -> auth:get_cookie(Node)
    catch
        error:_ -> auth:get_cookie()
    end.

said(Dialler, Asked, Liveness) ->
    <<(byte_size(Dialler)):16, Dialler/binary, (byte_size(Asked)):16, Asked/binary, Liveness:32>>.

%% -- what is proven -------------------------------------------------------------------------------

%% What only the two ends of this TLS session know.
exporter(_Link, nocookie) ->
    untrusted(no_cookie);
exporter(Link, _Cookie) ->
    case macula_dist_nif:dist_exporter(Link) of
        {ok, Exporter} -> Exporter;
        {error, Why} -> untrusted({closed, Why})
    end.

key(Exchange, Share) ->
    case macula_dist_nif:dist_exchange_key(Exchange, Share) of
        {ok, Key} -> Key;
        {error, bad_share} -> untrusted(malformed)
    end.

proof(Key, Role, Proven) ->
    macula_dist_nif:dist_mac(Key, [tag(Role), 0, Proven]).

check(Proof, Key, Role, Proven) ->
    case macula_dist_nif:dist_is_mac(Key, [tag(Role), 0, Proven], Proof) of
        true -> ok;
        false -> untrusted(bad_cookie)
    end.

tag(dialler) -> <<"macula-dist/1 dialler">>;
tag(acceptor) -> <<"macula-dist/1 acceptor">>.

%% -- frames ---------------------------------------------------------------------------------------

deadline() ->
    erlang:monotonic_time(millisecond) + ?TIMEOUT.

send(Link, Frame) ->
    case say(Link, Frame) of
        ok -> ok;
        {error, Why} -> untrusted({closed, Why})
    end.

say(Link, Frame) ->
    macula_dist_link:send_frame(Link, Frame).

recv(Link, Deadline) ->
    case macula_dist_link:recv_frame(Link, max(0, Deadline - erlang:monotonic_time(millisecond))) of
        {ok, Frame} -> Frame;
        {error, timeout} -> untrusted(timeout);
        {error, Why} -> untrusted({closed, Why})
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
peer(Address) ->
    ["connection from ", format_address(Address)].

%% @doc An address and its port, for people.
-spec format_address(macula_dist_nif:dist_address()) -> iodata().
format_address({Ip, Port}) -> io_lib:format("~ts port ~w", [inet:ntoa(Ip), Port]);
format_address({Ip, Port, Scope}) -> io_lib:format("~ts%~w port ~w", [inet:ntoa(Ip), Scope, Port]).

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
