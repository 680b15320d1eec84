%% @doc Bytes of a stream that were read and are not parsed, and how many the next frame needs.
%% @private
-module(macula_peering_buffer).

-export([new/0, keep/2, add/2, is_ready/1, is_empty/1, take/1]).

-export_type([buffer/0]).

%% The length of a frame, which stands before it.
-define(PREFIX, 4).

-record(buffer, {
    %% Newest first.
    chunks = [] :: [binary()],
    size = 0 :: non_neg_integer(),
    need = ?PREFIX :: pos_integer()
}).

-opaque buffer() :: #buffer{}.

-spec new() -> buffer().
new() -> #buffer{}.

%% @doc A buffer of the beginning of a frame, of which so many bytes are missing at least; 0 where
%% nobody has looked.
-spec keep(binary(), non_neg_integer()) -> buffer().
keep(<<>>, _) ->
    new();
%% Copied when it is a small part of what was read, so that it does not keep the rest alive.
keep(Rest, Missing) ->
    Kept = case binary:referenced_byte_size(Rest) > 4 * byte_size(Rest) of
        true -> binary:copy(Rest);
        false -> Rest
    end,
    Size = byte_size(Kept),
    #buffer{chunks = [Kept], size = Size, need = need(Size, Missing)}.

need(_, 0) -> ?PREFIX;
need(Size, Missing) -> Size + Missing.

-spec add(binary(), buffer()) -> buffer().
add(Bytes, #buffer{chunks = Chunks, size = Size} = Buffer) ->
    Buffer#buffer{chunks = [Bytes | Chunks], size = Size + byte_size(Bytes)}.

%% @doc Whether the next frame may be whole: it is worth a look.
-spec is_ready(buffer()) -> boolean().
is_ready(#buffer{size = Size, need = Need}) -> Size >= Need.

-spec is_empty(buffer()) -> boolean().
is_empty(#buffer{size = Size}) -> Size =:= 0.

%% @doc All bytes, and a buffer without them.
-spec take(buffer()) -> {binary(), buffer()}.
take(#buffer{chunks = [Chunk]}) -> {Chunk, new()};
take(#buffer{chunks = Chunks}) -> {iolist_to_binary(lists:reverse(Chunks)), new()}.
