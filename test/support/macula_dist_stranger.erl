%% Those who are no node and talk to one all the same: QUIC clients without the cookie, servers that
%% pretend, and a machine in the middle that decrypts and encrypts again.
-module(macula_dist_stranger).

-export([dial/1, dial/2, dial/3, identity/0, frame/1, first_stream/1]).
-export([pretender/1, pretender/2, middle/1, drop/1]).

-define(ALPN, <<"macula-dist/1">>).

%% An Ed25519 key and a certificate for it, as options.
identity() ->
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, [<<"localhost">>]),
    [{cert, Cert}, {key, Key}].

%% A QUIC client with a certificate of its own that speaks the distribution's ALPN.
dial(Port) ->
    dial(Port, identity()).

dial(Port, Options) ->
    dial(Port, ?ALPN, Options).

%% With another protocol than that of a node without streams.
dial(Port, Alpn, Options) ->
    macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}, {alpn, [Alpn]} | Options], 5000).

%% The stream that an honest dialler opens first.
first_stream(Conn) ->
    macula_quic:open_stream(Conn, #{active => false}).

frame(Data) ->
    [<<(iolist_size(Data)):32>>, Data].

%% A listener on loopback that gives every connection's first stream to Fun: {Keeper, Port}.
pretender(Fun) ->
    pretender([], Fun).

pretender(Options, Fun) ->
    macula_dist_case:keep(fun() ->
        {ok, L} = macula_quic:listen("127.0.0.1", 0, [{alpn, [?ALPN]}, {peer_bidi_stream_count, 10}
                                                      | Options ++ identity()]),
        {ok, {_, Port}} = macula_quic:sockname(L),
        _ = spawn_link(fun() -> serve(L, Fun) end),
        Port
    end).

serve(L, Fun) ->
    case macula_quic:accept(L, infinity) of
        {ok, Conn} ->
            {Pid, Ref} = spawn_monitor(fun() ->
                receive {take, C} -> Fun(C) end
            end),
            ok = macula_quic:controlling_process(Conn, Pid),
            Pid ! {take, Conn},
            _ = Ref,
            serve(L, Fun);
        {error, _} ->
            ok
    end.

%% The machine in the middle: whoever dials it is connected on to the node at Port, each byte passed
%% on, with one TLS session to each side: {Keeper, Port}. Tells Watcher what it has read.
middle(#{target := Target, watcher := Watcher}) ->
    pretender(fun(Near) ->
        {ok, S1} = macula_quic:accept_stream(Near, #{active => false}, 5000),
        {ok, Far} = dial(Target),
        {ok, S2} = macula_quic:open_stream(Far, #{active => false}),
        Up = spawn_link(fun() -> pump(S1, S2, up, Watcher) end),
        Down = spawn_link(fun() -> pump(S2, S1, down, Watcher) end),
        %% The process owns both connections and stays as long as one of the two passes on.
        _ = [begin M = monitor(process, P), receive {'DOWN', M, _, _, _} -> ok end end
             || P <- [Up, Down]],
        {Near, Far}
    end).

pump(From, To, Direction, Watcher) ->
    case macula_quic:recv(From, 0, 20000) of
        {ok, Data} ->
            Watcher ! {passed_on, Direction, Data},
            case macula_quic:send(To, Data) of
                ok -> pump(From, To, Direction, Watcher);
                {error, _} -> ok
            end;
        {error, _} ->
            ok
    end.

drop(Keeper) -> macula_dist_case:drop(Keeper).
