%% @doc Frames on a dedicated stream of a link: one session or one transfer that shall not wait for
%% the frames of the control stream, nor they for it.
%%
%% Either side opens one with {@link macula_peering:open_stream/1}. The other side's controlling
%% process gets `{macula_peering, new_dedicated_stream, Pid, Stream}' and wraps the stream with
%% {@link from/2}. The first frame says what it is for (a STREAM_OPEN, or a CALL of `_content.*').
%%
%% ```
%% {ok, S} = macula_peering:open_stream(Link),
%% ok = macula_peering_stream:send(S, Open),
%% {ok, Reply, Verdict, S2} = macula_peering_stream:recv(S, 5000),
%% ok = macula_peering_stream:finish(S2).
%% '''
-module(macula_peering_stream).

-export([new/2, wire/3, sent/2, from/2, send/2, send/3, recv/2, finish/1, cancel/2, handle/1]).

-export_type([stream/0]).

-opaque stream() :: #{
    handle := macula_quic:stream(),
    identity := macula_identity:identity(),
    peer := macula_identity:node_id(),
    encoding := macula_frame:encode_opts(),
    rules := macula_peering_incoming:rules(),
    counters := counters:counters_ref(),
    buffer := binary()
}.

%% @private
-spec new(macula_quic:stream(), macula_peering_links:link()) ->
    {ok, stream()} | {error, not_connected}.
new(Handle, #{pid := Pid, node_id := Peer} = Link) ->
    case macula_peering_links:rules(Pid) of
        {ok, Rules} ->
            {ok, (maps:with([identity, encoding, counters], Link))#{
                handle => Handle, peer => Peer, rules => Rules, buffer => <<>>}};
        {error, Reason} ->
            {error, Reason}
    end.

%% @doc Wraps a stream that a peer has opened on a link.
-spec from(pid(), macula_quic:stream()) -> {ok, stream()} | {error, term()}.
from(Pid, Handle) ->
    case macula_peering_links:find(Pid) of
        {ok, #{node_id := _} = Link} -> new(Handle, Link);
        {ok, _} -> {error, not_connected};
        {error, Reason} -> {error, Reason}
    end.

%% @doc The QUIC stream, to give it to another process or to close it otherwise.
-spec handle(stream()) -> macula_quic:stream().
handle(#{handle := Handle}) -> Handle.

%% @equiv send(Stream, Frame, infinity)
-spec send(stream(), macula_frame:frame()) -> ok | {error, term()}.
send(Stream, Frame) ->
    send(Stream, Frame, infinity).

%% @doc Sends a frame, signed by the link's identity unless it bears a signature; waits for room.
-spec send(stream(), macula_frame:frame(), timeout()) -> ok | {error, term()}.
send(#{handle := Handle, identity := Identity, encoding := Encoding,
       counters := Counters}, Frame, Timeout) ->
    case wire(Frame, Identity, Encoding) of
        {ok, Wire} ->
            case macula_quic:send(Handle, Wire, #{timeout => Timeout}) of
                ok -> sent(Counters, Wire);
                Error -> Error
            end;
        {error, Reason} ->
            {error, Reason}
    end.

%% @private
-spec sent(counters:counters_ref(), binary()) -> ok.
sent(Counters, Wire) ->
    macula_peering_counters:add(Counters, frames_out, 1),
    macula_peering_counters:add(Counters, bytes_out, byte_size(Wire)).

%% @private A frame without a type would end the link at the other side.
-spec wire(term(), macula_identity:identity(), macula_frame:encode_opts()) ->
    {ok, binary()} | {error, macula_frame:encode_error()}.
wire(Frame, Identity, Encoding) when is_map(Frame) ->
    case {macula_frame:named_type(Frame), Frame} of
        {error, _} -> {error, {not_encodable, no_frame_type}};
        %% Whose signature it is has decided about the text "undefined".
        {_, #{signature := _}} ->
            macula_frame:try_encode(Frame, maps:remove(text_undefined, Encoding));
        _ -> macula_frame:sign_encode(Frame, Identity, Encoding)
    end;
wire(_, _, _) ->
    {error, {not_encodable, not_a_map}}.

%% @doc The next frame, with the verdict on its signature. What the link's `verify_frames' and
%% `unknown_types' do not let through is passed over, and counted as on the link. Errors: `closed' at
%% the end of the stream, `{bad_frame, truncated}' where the peer has ended it in the middle of a frame,
%% `{reset, Code}', `{connection_lost, Reason}' wherever in a frame that is, or what is wrong with the
%% bytes (`frame_too_large' by the link's `max_frame', `no_frame_type', `{unknown_type, Type}', ...),
%% upon which the stream is cancelled.
%% With `bad_frames => deliver' a frame that was not decoded comes as `{bad_frame, #{reason, bytes},
%% Stream}'.
%% `{timeout, Stream}' keeps what has come of a frame: go on with that stream.
-spec recv(stream(), timeout()) ->
    {ok, macula_frame:frame(), macula_frame:verdict(), stream()}
    | {bad_frame, #{reason := atom(), bytes := binary()}, stream()} | {timeout, stream()}
    | {error, term()}.
recv(Stream, infinity) ->
    recv(Stream, 0, infinity);
recv(Stream, Timeout) ->
    recv(Stream, 0, erlang:monotonic_time(millisecond) + Timeout).

recv(#{buffer := Buffer, peer := Peer, rules := Rules} = Stream, Missing, Deadline)
  when Missing =:= 0 ->
    case macula_frame:decode_verify(Buffer, Peer, macula_peering_incoming:decoding(Rules)) of
        {ok, Frame, Verdict, Rest} ->
            received(Frame, Verdict, Stream#{buffer := Rest}, Deadline);
        {more, N} ->
            recv(Stream, N, Deadline);
        {error, Reason} ->
            bad(macula_peering_incoming:bad(Reason, Buffer, Rules), Reason, Stream, Deadline)
    end;
recv(#{buffer := Buffer, handle := Handle} = Stream, Missing, Deadline) ->
    Left = case Deadline of
        infinity -> infinity;
        _ -> max(0, Deadline - erlang:monotonic_time(millisecond))
    end,
    case macula_quic:recv(Handle, Missing, Left) of
        %% Fewer bytes come at the end of the stream alone, of which the next call says what it is: a
        %% peer that has cut its frame short, or a connection that was lost in the middle of one.
        {ok, Bytes} ->
            macula_peering_counters:add(maps:get(counters, Stream), bytes_in, byte_size(Bytes)),
            recv(Stream#{buffer := <<Buffer/binary, Bytes/binary>>}, 0, Deadline);
        {error, timeout} -> {timeout, Stream};
        {error, closed} when Buffer =/= <<>> -> {error, {bad_frame, truncated}};
        {error, Reason} -> {error, Reason}
    end.

bad({skip, Bad, Rest}, {bad_frame, Why}, #{rules := Rules, counters := Counters} = Stream,
    Deadline) ->
    macula_peering_counters:add(Counters, frames_in, 1),
    macula_peering_counters:add(Counters, frames_rejected, 1),
    case macula_peering_incoming:bad_frames(Rules) of
        drop -> recv(Stream#{buffer := Rest}, 0, Deadline);
        deliver -> {bad_frame, #{reason => Why, bytes => Bad}, Stream#{buffer := Rest}}
    end;
bad(close, Reason, Stream, _) ->
    _ = cancel(Stream, 0),
    {error, Reason}.

received(Frame, Verdict, #{peer := Peer, rules := Rules, counters := Counters} = Stream,
         Deadline) ->
    macula_peering_counters:add(Counters, frames_in, 1),
    case macula_peering_incoming:judge(Frame, Verdict, Peer, Rules) of
        {deliver, _, _, _} ->
            {ok, Frame, Verdict, Stream};
        drop ->
            recv(Stream, 0, Deadline);
        reject ->
            macula_peering_counters:add(Counters, frames_rejected, 1),
            recv(Stream, 0, Deadline);
        {error, Why} ->
            _ = cancel(Stream, 0),
            {error, Why}
    end.

%% @doc Ends our side; the peer gets everything sent, then the end.
-spec finish(stream()) -> ok | {error, term()}.
finish(#{handle := Handle}) ->
    macula_quic:async_shutdown_stream(Handle, graceful, 0).

%% @doc Gives up both sides with a code.
-spec cancel(stream(), non_neg_integer()) -> ok | {error, term()}.
cancel(#{handle := Handle}, Code) ->
    macula_quic:async_shutdown_stream(Handle, abort, Code).
