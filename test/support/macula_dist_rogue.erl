%% A peer that knows the cookie and is no node: it proves itself as a node does, and then says what it likes.
-module(macula_dist_rogue).

-export([dial/1, dial_with_streams/1, begin_as/2, node_of/1, is_connected/1, close/1, lane/2, stream/2, user_stream/1, finish/1, say/2, told_at_end/1]).
-export([packet/1, mark/1, to_registered/3]).

-define(TIMEOUT, 10000).

%% Connects as a node that nobody has heard of, up to the end of OTP's handshake. T is a node of macula_dist_case.
dial(T) -> dial(T, <<"macula-dist/1">>).

%% The same, as a node that has streams of users' own.
dial_with_streams(T) -> dial(T, <<"macula-dist/1+streams">>).

dial(T, Alpn) ->
    {Rogue, Cookie} = begin_as(T, macula_dist_case:unique("rogue") ++ "@127.0.0.1", Alpn),
    ok = shake_hands(Rogue, Cookie),
    ok = macula_test_nodes:wait_until(fun() -> is_connected(Rogue) end),
    Rogue.

%% Connects under this name, up to the first answer of OTP's handshake.
begin_as(T, Name) -> begin_as(T, Name, <<"macula-dist/1">>).

begin_as(T, Name, Alpn) ->
    Keys = filename:join(persistent_term:get({macula_dist_case, dir}), Name ++ ".keys"),
    {ok, Conn} = macula_dist_stranger:dial(macula_dist_case:port_of(T), Alpn,
                                           [{sslkeylogfile, Keys} | macula_dist_stranger:identity()]),
    {ok, Control} = macula_dist_stranger:first_stream(Conn),
    Rogue = #{conn => Conn, control => Control, name => list_to_binary(Name), node => T},
    Cookie = atom_to_binary(macula_dist_case:call(T, erlang, get_cookie, [])),
    ok = prove(Rogue, Cookie, macula_dist_proof:exporter(Keys)),
    ok = say_name(Rogue),
    {Rogue, Cookie}.

node_of(#{name := Name}) -> binary_to_atom(Name).

%% Whether the node knows it as one.
is_connected(#{node := T} = Rogue) ->
    lists:member(node_of(Rogue), macula_dist_case:call(T, erlang, nodes, [connected])).

close(#{conn := Conn}) ->
    _ = macula_quic:close(Conn),
    ok.

%% -- up to the end of the handshake ---------------------------------------------------------------

prove(#{control := Control, name := Name, node := T}, Cookie, Exporter) ->
    Asked = atom_to_binary(macula_dist_case:node_of(T)),
    {ok, _Key} = macula_dist_proof:dialled(Control, {Name, Asked}, Cookie, Exporter),
    ok.

%% OTP's own, in the form that it has since version 23.
say_name(#{control := Control, name := Name, node := T}) ->
    {erts_dflags, Flags, _, _, _, InOrder} = macula_dist_case:call(T, erts_internal, get_dflags, []),
    Able = Flags band bnot InOrder,
    ok = say(Control, macula_dist_stranger:frame([$N, <<Able:64, 1:32, (byte_size(Name)):16>>, Name])),
    <<"sok">> = macula_dist_proof:hear(Control),
    ok.

shake_hands(#{control := Control}, Cookie) ->
    <<$N, _:64, Challenge:32, _/binary>> = macula_dist_proof:hear(Control),
    Mine = rand:uniform(1 bsl 32) - 1,
    ok = say(Control, macula_dist_stranger:frame([$r, <<Mine:32>>, digest(Challenge, Cookie)])),
    Ack = <<$a, (digest(Mine, Cookie))/binary>>,
    Ack = macula_dist_proof:hear(Control),
    ok.

digest(Challenge, Cookie) ->
    erlang:md5([Cookie, integer_to_list(Challenge)]).

%% -- what it says then ----------------------------------------------------------------------------

%% Opens a lane with this number: 0 is express, 1 bulk.
lane(Rogue, Number) ->
    stream(Rogue, <<"maln", 1:16, Number:16>>).

%% Opens what stands where a lane would, and begins it so.
stream(#{conn := Conn}, Preamble) ->
    {ok, Stream} = macula_quic:open_stream(Conn, #{direction => unidirectional, timeout => ?TIMEOUT}),
    ok = say(Stream, Preamble),
    Stream.

%% Opens a stream as users' own are.
user_stream(#{conn := Conn}) ->
    {ok, Stream} = macula_quic:open_stream(Conn, #{active => false, timeout => ?TIMEOUT}),
    Stream.

finish(Lane) ->
    ok = macula_quic:send(Lane, <<>>, #{fin => true}).

say(Stream, Data) ->
    macula_quic:send(Stream, Data).

%% What the node says when it ends the link.
told_at_end(#{conn := Conn}) ->
    receive {quic, shutdown, Conn, Why} -> Why
    after ?TIMEOUT -> error({still_there, macula_quic:info(Conn)})
    end.

packet(Data) -> macula_dist_stranger:frame(Data).

mark(Number) -> <<1:2, 8:30, Number:64>>.

%% A message from a process of the rogue's to a registered one, as a packet.
to_registered(Rogue, To, Message) ->
    Node = atom_to_binary(node_of(Rogue)),
    Pid = <<88, 119, (byte_size(Node)), Node/binary, 100:32, 0:32, 1:32>>,
    Name = atom_to_binary(To),
    packet([131, $D, 0, 104, 4, 97, 6, Pid, 119, 0, 119, byte_size(Name), Name,
            tl(binary_to_list(term_to_binary(Message)))]).
