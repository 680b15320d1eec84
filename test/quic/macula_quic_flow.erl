%% A stream that is never empty: its sender goes on until it is told to stop, and waits for its reader only
%% when so much is under way. Both ends keep a hash of the bytes, in the order in which they have them.
-module(macula_quic_flow).

-include("macula_quic_test.hrl").

-export([start/1, none/0, taken/3, stop/1, is_whole/2]).

-export_type([sender/0, read/0]).

%% Bytes under way at most.
-define(UNDER_WAY, 4096).
-define(POOL, 65536).

-type sender() :: pid().
-opaque read() :: {non_neg_integer(), crypto:hash_state()}.

%% @doc Has a process send on the stream.
-spec start(macula_quic:stream()) -> sender().
start(Stream) ->
    Pool = crypto:strong_rand_bytes(?POOL),
    spawn_link(fun() -> send(Stream, Pool, 0, ?UNDER_WAY, none()) end).

%% @doc What a reader has read at first.
-spec none() -> read().
none() ->
    {0, crypto:hash_init(sha256)}.

%% @doc The reader has read on.
-spec taken(sender(), binary(), read()) -> read().
taken(Sender, Data, Read) ->
    Sender ! {taken, byte_size(Data)},
    add(Data, Read).

%% @doc The sender ends its stream.
-spec stop(sender()) -> ok.
stop(Sender) ->
    Sender ! stop,
    ok.

%% @doc Whether all that was sent was read, as it was sent. Asked once, after the stream's end.
-spec is_whole(sender(), read()) -> boolean().
is_whole(Sender, {Size, Hash}) ->
    Sender ! {report, self()},
    {SizeSent, HashSent} = ?EXPECT({Sender, Sent}, Sent, 30000),
    Size > 0 andalso Size =:= SizeSent andalso crypto:hash_final(Hash) =:= HashSent.

%% Pieces of all sizes.
send(Stream, Pool, Number, Room, Sent) when Room > 0 ->
    receive
        stop ->
            ok = macula_quic:send(Stream, <<>>, #{fin => true}),
            {Size, Hash} = Sent,
            receive {report, To} -> To ! {self(), {Size, crypto:hash_final(Hash)}} end;
        {taken, Bytes} ->
            send(Stream, Pool, Number, Room + Bytes, Sent)
    after 0 ->
        Size = min(Room, 1 + Number * 31 rem 200),
        Piece = binary:part(Pool, Number * 211 rem (?POOL - 200), Size),
        ok = macula_quic:send(Stream, Piece),
        send(Stream, Pool, Number + 1, Room - Size, add(Piece, Sent))
    end;
send(Stream, Pool, Number, 0, Sent) ->
    %% One who is told to stop has no need of room.
    receive
        {taken, Bytes} -> send(Stream, Pool, Number, Bytes, Sent);
        stop -> self() ! stop, send(Stream, Pool, Number, 1, Sent)
    end.

add(Data, {Size, Hash}) ->
    {Size + byte_size(Data), crypto:hash_update(Hash, Data)}.
