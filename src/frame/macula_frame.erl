%% @doc Frames of the macula peering wire: building, checking, signing, encoding, decoding.
%%
%% A frame is a map. Its keys are atoms for the fields of the catalogue; the envelope (`version',
%% `frame_type', `frame_id', `sent_at_ms', `capabilities', `realm', `call_id', `source_route') is
%% filled in by the constructors, of which there is one per type, named after it:
%%
%% ```
%% Ping = macula_frame:ping(#{nonce => crypto:strong_rand_bytes(16)}),
%% Wire = macula_frame:encode(macula_frame:sign(Ping, Identity)),
%% {ok, Ping2, <<>>} = macula_frame:decode(Wire),
%% {ok, _} = macula_frame:verify(Ping2, macula_identity:public(Identity)).
%% '''
%%
%% Inside payloads the wire knows integers of 64 bits, floats, byte strings (Erlang binaries), text
%% (`{text, Utf8}'; atoms are sent as the text of their name), null (`undefined'), arrays (lists)
%% and maps with text or integer keys. Text comes back as `{text, Utf8}', as a value and as a key;
%% only names of the catalogue become atoms, so nothing a peer sends creates or finds an atom. The
%% decoding option `#{text => existing}' turns text that names an existing atom into that atom, as
%% older implementations do.
%%
%% {@link catalogue/0} prints all types with their fields from the table that also drives this
%% module.
-module(macula_frame).

%% Building
-export([new/2, goodbye/1, goodbye/2, error/1, swim_update/1,
         connect/1, hello/1, ping/1, pong/1, find_node/1, nodes/1, find_value/1, value/1, store/1,
         store_ack/1, replicate/1, replicate_ack/1, swim_ping/1, swim_ack/1, swim_suspect/1,
         swim_confirm/1, call/1, result/1, publish/1, event/1, subscribe/1, unsubscribe/1,
         advertise/1, unadvertise/1, stream_open/1, stream_data/1, stream_end/1, stream_error/1,
         stream_reply/1, hyparview_join/1, hyparview_forward_join/1, hyparview_neighbor/1,
         hyparview_disconnect/1, hyparview_shuffle/1, hyparview_shuffle_reply/1,
         plumtree_gossip/1, plumtree_ihave/1, plumtree_graft/1, plumtree_prune/1, want/1, have/1,
         block/1, manifest_req/1, manifest_res/1, cancel/1]).
%% Checking, signing
-export([check_frame/1, check_field/3, check_payload/1, sign/2, verify/2, sign_publisher/2, verify_publisher/1,
         sign_update/2, verify_update/1]).
%% Bytes
-export([encode/1, try_encode/1, try_encode/2, sign_encode/2, sign_encode/3, sign_encode_many/2, decode/1,
         decode/2, decode_verify/3, parse_stream/1, parse_stream/2, parse/3]).
-export([cbor_encode/1, cbor_decode/1]).
%% Reading
-export([frame_type/1, named_type/1, frame_id/1, version/1, signature/1, sent_at_ms/1, get/2, get/3, signer/2,
         category/1, types/0, fields/1, error_name/1, error_code/1, catalogue/0, explain/1]).

-export_type([frame/0, frame_type/0, field_error/0, decode_opts/0, decode_error/0,
              encode_opts/0, encode_error/0,
              verdict/0, parsed/0]).

-type frame() :: #{atom() | {text, binary()} | integer() => term()}.
-type frame_type() :: atom() | {text, binary()}.
-type path() :: [term()].
-type field_error() ::
    {unknown_frame_type, term()}
    | {missing_field, path()}
    | {bad_field, path(), Why :: term()}
    | not_a_map
    | frame_too_large.
%% Which field is wrong, as a path from the frame's root, and why.

-type decode_opts() :: #{text => tagged | existing, max => non_neg_integer(),
                         max_terms => pos_integer()}.
-type decode_error() ::
    frame_too_large | {bad_frame, malformed()} | {bad_option, Key :: term(), Value :: term()}.
-type malformed() ::
    truncated | trailing_bytes | too_deep | duplicate_key | bad_key | indefinite_length
    | unsupported_item | not_finite | bad_text | not_a_map | too_many_terms.
-type encode_opts() :: #{text_undefined => allow | refuse, newer_terms => allow | refuse,
                         max_terms => pos_integer()}.
%% What `sign_encode/3' and `try_encode/2' refuse to send. `text_undefined' and `newer_terms' (both
%% `allow'): the text "undefined"; floats, negative integers and integer keys. `max_terms': how much
%% memory the frame may take as terms, without bound by default.

-type encode_error() ::
    frame_too_large | {not_encodable, atom()} | bad_identity
    | {bad_option, Key :: term(), Value :: term()}.
-type verdict() ::
    unchecked | {ok, macula_identity:node_id()}
    | {error, unsigned | bad_frame | signature_invalid}.
%% Whether the signature of a frame is that of the key its type is signed with.

-type parsed() :: {[{frame(), verdict()}], Rest :: binary(),
                   {more, pos_integer()} | {error, decode_error()}}.

-define(MAX_DEPTH, 64).
-define(MAX_FRAME, 16#FFFFFF).
%% Four times the greatest frame; and what no frame can reach.
-define(MAX_TERMS, 64 * 1024 * 1024).
-define(MOST_TERMS, 16#FFFFFFFF).
-define(PUBLISHER_DOMAIN, "macula-v2-event-pub", 0).
-define(PUBLICATION, [topic, realm, publisher, seq, payload]).
-define(UPDATE_DOMAIN, "macula-v2-swim-update", 0).

%%% Building

%% @doc A frame of a type from its fields. The envelope is filled in, and so is every field that
%% has a default; fields given in `Spec' win. Raises `{bad_frame, field_error()}' when a field is
%% missing or wrong; {@link check_frame/1} tells the same without raising. What a payload, or a map of the
%% user's, is made of is not looked at before the frame is encoded, or checked by {@link check_frame/1}.
-spec new(atom(), map()) -> frame().
new(Type, #{frame_type := Other}) when Other =/= Type ->
    erlang:error({bad_frame, {bad_field, [frame_type], {enum, [Type]}}});
new(Type, Spec) when is_map(Spec) ->
    case macula_frame_table:type(Type) of
        {ok, #{fields := Fields, all := All, defaults := Defaults}} ->
            Frame = Defaults#{
                frame_type => Type,
                frame_id => frame_id(),
                sent_at_ms => erlang:system_time(millisecond)
            },
            checked(All, nested_defaults(Fields, maps:merge(Frame, Spec)));
        error ->
            erlang:error({bad_frame, {unknown_frame_type, Type}})
    end;
new(_, _) ->
    erlang:error({bad_frame, not_a_map}).

checked(Fields, Frame) ->
    try check_fields(Fields, Frame, [], shallow) of
        ok -> Frame
    catch
        throw:Reason -> erlang:error({bad_frame, Reason})
    end.

defaults(Fields) ->
    maps:from_list([{Name, Value} || {Name, _Kind, {Presence, Value}} <- Fields,
                                     Presence =:= default orelse Presence =:= optional]).

%% Entries of arrays have defaults too, such as the priority of a wanted block.
nested_defaults(Fields, Frame) ->
    lists:foldl(fun
        ({Name, {array, {map, Inner}}, _}, Acc) when length(map_get(Name, Acc)) > 0 ->
            Defaults = defaults(Inner),
            Fill = fun(Entry) when is_map(Entry) -> maps:merge(Defaults, Entry);
                      (Entry) -> Entry
                   end,
            Acc#{Name := [Fill(Entry) || Entry <- maps:get(Name, Acc)]};
        (_, Acc) ->
            Acc
    end, Frame, Fields).

%% @doc A GOODBYE from its fields, or with a reason (an atom or text).
-spec goodbye(map() | atom() | {text, binary()}) -> frame().
goodbye(Spec) when is_map(Spec) -> new(goodbye, Spec);
goodbye(Reason) -> goodbye(Reason, undefined).

%% @doc A GOODBYE with a reason and a detail for people.
-spec goodbye(atom() | {text, binary()}, undefined | binary()) -> frame().
goodbye(Reason, Detail) -> new(goodbye, #{reason => Reason, detail => Detail}).

%% @doc An ERROR frame. `code' and `name' follow from each other when only one is given.
-spec error(map()) -> frame().
error(#{code := Code} = Spec) when not is_map_key(name, Spec) ->
    new(error, Spec#{name => error_name(Code)});
error(#{name := Name} = Spec) when not is_map_key(code, Spec) ->
    new(error, Spec#{code => error_code(Name)});
error(Spec) ->
    new(error, Spec).

%% @doc A CONNECT frame from its fields; see {@link new/2}. `station_id' is the node id, and
%% `puzzle_evidence' its hash, unless they are given.
-spec connect(map()) -> frame().
connect(#{node_id := <<_:256>> = NodeId} = Spec) ->
    new(connect, maps:merge(#{station_id => NodeId,
                              puzzle_evidence => macula_identity:puzzle_evidence(NodeId)}, Spec));
connect(Spec) ->
    new(connect, Spec).

%% @doc A HELLO frame from its fields; see {@link new/2}. `station_id' is the node id unless it is
%% given.
-spec hello(map()) -> frame().
hello(#{node_id := <<_:256>> = NodeId} = Spec) ->
    new(hello, maps:merge(#{station_id => NodeId}, Spec));
hello(Spec) ->
    new(hello, Spec).

%% @doc A PING frame from its fields; see {@link new/2}.
-spec ping(map()) -> frame().
ping(Spec) -> new(ping, Spec).

%% @doc A PONG frame from its fields; see {@link new/2}.
-spec pong(map()) -> frame().
pong(Spec) -> new(pong, Spec).

%% @doc A FIND_NODE frame from its fields; see {@link new/2}.
-spec find_node(map()) -> frame().
find_node(Spec) -> new(find_node, Spec).

%% @doc A NODES frame from its fields; see {@link new/2}.
-spec nodes(map()) -> frame().
nodes(Spec) -> new(nodes, Spec).

%% @doc A FIND_VALUE frame from its fields; see {@link new/2}.
-spec find_value(map()) -> frame().
find_value(Spec) -> new(find_value, Spec).

%% @doc A VALUE frame from its fields; see {@link new/2}.
-spec value(map()) -> frame().
value(Spec) -> new(value, Spec).

%% @doc A STORE frame from its fields; see {@link new/2}.
-spec store(map()) -> frame().
store(Spec) -> new(store, Spec).

%% @doc A STORE_ACK frame from its fields; see {@link new/2}.
-spec store_ack(map()) -> frame().
store_ack(Spec) -> new(store_ack, Spec).

%% @doc A REPLICATE frame from its fields; see {@link new/2}.
-spec replicate(map()) -> frame().
replicate(Spec) -> new(replicate, Spec).

%% @doc A REPLICATE_ACK frame from its fields; see {@link new/2}.
-spec replicate_ack(map()) -> frame().
replicate_ack(Spec) -> new(replicate_ack, Spec).

%% @doc A SWIM_PING frame from its fields; see {@link new/2}.
-spec swim_ping(map()) -> frame().
swim_ping(Spec) -> new(swim_ping, Spec).

%% @doc A SWIM_ACK frame from its fields; see {@link new/2}.
-spec swim_ack(map()) -> frame().
swim_ack(Spec) -> new(swim_ack, Spec).

%% @doc A SWIM_SUSPECT frame from its fields; see {@link new/2}.
-spec swim_suspect(map()) -> frame().
swim_suspect(Spec) -> new(swim_suspect, Spec).

%% @doc A SWIM_CONFIRM frame from its fields; see {@link new/2}.
-spec swim_confirm(map()) -> frame().
swim_confirm(Spec) -> new(swim_confirm, Spec).

%% @doc A CALL frame from its fields; see {@link new/2}.
-spec call(map()) -> frame().
call(Spec) -> new(call, Spec).

%% @doc A RESULT frame from its fields; see {@link new/2}.
-spec result(map()) -> frame().
result(Spec) -> new(result, Spec).

%% @doc A PUBLISH frame from its fields; see {@link new/2}.
-spec publish(map()) -> frame().
publish(Spec) -> new(publish, Spec).

%% @doc A EVENT frame from its fields; see {@link new/2}.
-spec event(map()) -> frame().
event(Spec) -> new(event, Spec).

%% @doc A SUBSCRIBE frame from its fields; see {@link new/2}.
-spec subscribe(map()) -> frame().
subscribe(Spec) -> new(subscribe, Spec).

%% @doc A UNSUBSCRIBE frame from its fields; see {@link new/2}.
-spec unsubscribe(map()) -> frame().
unsubscribe(Spec) -> new(unsubscribe, Spec).

%% @doc A ADVERTISE frame from its fields; see {@link new/2}.
-spec advertise(map()) -> frame().
advertise(Spec) -> new(advertise, Spec).

%% @doc A UNADVERTISE frame from its fields; see {@link new/2}.
-spec unadvertise(map()) -> frame().
unadvertise(Spec) -> new(unadvertise, Spec).

%% @doc A STREAM_OPEN frame from its fields; see {@link new/2}.
-spec stream_open(map()) -> frame().
stream_open(Spec) -> new(stream_open, Spec).

%% @doc A STREAM_DATA frame from its fields; see {@link new/2}.
-spec stream_data(map()) -> frame().
stream_data(Spec) -> new(stream_data, Spec).

%% @doc A STREAM_END frame from its fields; see {@link new/2}.
-spec stream_end(map()) -> frame().
stream_end(Spec) -> new(stream_end, Spec).

%% @doc A STREAM_ERROR frame from its fields; see {@link new/2}.
-spec stream_error(map()) -> frame().
stream_error(Spec) -> new(stream_error, Spec).

%% @doc A STREAM_REPLY frame from its fields; see {@link new/2}.
-spec stream_reply(map()) -> frame().
stream_reply(Spec) -> new(stream_reply, Spec).

%% @doc A HYPARVIEW_JOIN frame from its fields; see {@link new/2}.
-spec hyparview_join(map()) -> frame().
hyparview_join(Spec) -> new(hyparview_join, Spec).

%% @doc A HYPARVIEW_FORWARD_JOIN frame from its fields; see {@link new/2}.
-spec hyparview_forward_join(map()) -> frame().
hyparview_forward_join(Spec) -> new(hyparview_forward_join, Spec).

%% @doc A HYPARVIEW_NEIGHBOR frame from its fields; see {@link new/2}.
-spec hyparview_neighbor(map()) -> frame().
hyparview_neighbor(Spec) -> new(hyparview_neighbor, Spec).

%% @doc A HYPARVIEW_DISCONNECT frame from its fields; see {@link new/2}.
-spec hyparview_disconnect(map()) -> frame().
hyparview_disconnect(Spec) -> new(hyparview_disconnect, Spec).

%% @doc A HYPARVIEW_SHUFFLE frame from its fields; see {@link new/2}.
-spec hyparview_shuffle(map()) -> frame().
hyparview_shuffle(Spec) -> new(hyparview_shuffle, Spec).

%% @doc A HYPARVIEW_SHUFFLE_REPLY frame from its fields; see {@link new/2}.
-spec hyparview_shuffle_reply(map()) -> frame().
hyparview_shuffle_reply(Spec) -> new(hyparview_shuffle_reply, Spec).

%% @doc A PLUMTREE_GOSSIP frame from its fields; see {@link new/2}.
-spec plumtree_gossip(map()) -> frame().
plumtree_gossip(Spec) -> new(plumtree_gossip, Spec).

%% @doc A PLUMTREE_IHAVE frame from its fields; see {@link new/2}.
-spec plumtree_ihave(map()) -> frame().
plumtree_ihave(Spec) -> new(plumtree_ihave, Spec).

%% @doc A PLUMTREE_GRAFT frame from its fields; see {@link new/2}.
-spec plumtree_graft(map()) -> frame().
plumtree_graft(Spec) -> new(plumtree_graft, Spec).

%% @doc A PLUMTREE_PRUNE frame from its fields; see {@link new/2}.
-spec plumtree_prune(map()) -> frame().
plumtree_prune(Spec) -> new(plumtree_prune, Spec).

%% @doc A WANT frame from its fields; see {@link new/2}.
-spec want(map()) -> frame().
want(Spec) -> new(want, Spec).

%% @doc A HAVE frame from its fields; see {@link new/2}.
-spec have(map()) -> frame().
have(Spec) -> new(have, Spec).

%% @doc A BLOCK frame from its fields; see {@link new/2}.
-spec block(map()) -> frame().
block(Spec) -> new(block, Spec).

%% @doc A MANIFEST_REQ frame from its fields; see {@link new/2}.
-spec manifest_req(map()) -> frame().
manifest_req(Spec) -> new(manifest_req, Spec).

%% @doc A MANIFEST_RES frame from its fields; see {@link new/2}.
-spec manifest_res(map()) -> frame().
manifest_res(Spec) -> new(manifest_res, Spec).

%% @doc A CANCEL frame from its fields; see {@link new/2}.
-spec cancel(map()) -> frame().
cancel(Spec) -> new(cancel, Spec).

%% UUID version 7: milliseconds since 1970, then random bits.
frame_id() ->
    <<A:12, B:62, _:6>> = crypto:strong_rand_bytes(10),
    <<(erlang:system_time(millisecond)):48, 7:4, A:12, 2:2, B:62>>.

%%% Checking

%% @doc What is wrong with a frame, before it is sent: an unknown type, a missing field, a value
%% the type does not allow, a term that has no place on the wire, text that older peers take for
%% null (`text_undefined'), or too many bytes.
-spec check_frame(term()) -> ok | {error, field_error()}.
check_frame(#{frame_type := Type} = Frame) ->
    case macula_frame_table:type(Type) of
        {ok, #{all := Fields}} ->
            try
                check_fields(Fields, Frame, [], deep),
                check_others(Fields, Frame, [], 1),
                check_size(Frame)
            catch
                throw:Reason -> {error, Reason}
            end;
        error ->
            {error, {unknown_frame_type, Type}}
    end;
check_frame(#{}) ->
    {error, {missing_field, [frame_type]}};
check_frame(_) ->
    {error, not_a_map}.

%% @doc The same for one field of a type, as for an option that is to become that field.
-spec check_field(frame_type(), atom(), term()) -> ok | {error, field_error()}.
check_field(Type, Name, Value) ->
    {Name, Kind, _} = lists:keyfind(Name, 1, fields(Type)),
    try check_kind(Kind, Value, [Name], deep) of
        _ -> ok
    catch
        throw:Reason -> {error, Reason}
    end.

%% @doc The same for a term that shall travel as payload.
-spec check_payload(term()) -> ok | {error, field_error()}.
check_payload(Payload) ->
    try check_any(Payload, [payload], 1) of
        _ -> ok
    catch
        throw:Reason -> {error, Reason}
    end.

check_size(Frame) ->
    case try_encode(Frame) of
        {ok, _} -> ok;
        {error, {not_encodable, Why}} -> {error, {bad_field, [], Why}};
        {error, frame_too_large} -> {error, frame_too_large}
    end.

%% `shallow' leaves out what only the encoder needs to look at.
check_fields(Fields, Map, Path, Depth) ->
    lists:foreach(fun({Name, Kind, Presence}) ->
        case Map of
            #{Name := Value} -> check_kind(Kind, Value, [Name | Path], Depth);
            #{} when Presence =:= optional; element(1, Presence) =:= optional -> ok;
            #{} -> throw({missing_field, lists:reverse(Path, [Name])})
        end
    end, Fields).

%% Keys that the table does not name are legal; they must be encodable.
check_others(Fields, Map, Path, Depth) ->
    Others = maps:without([Name || {Name, _, _} <- Fields], Map),
    _ = check_any(Others, Path, Depth - 1),
    ok.

check_kind({bytes, Size}, Value, _, _) when byte_size(Value) =:= Size -> ok;
check_kind({bytes, Size}, _, Path, _) -> bad(Path, {bytes, Size});
check_kind(bytes, Value, _, _) when is_binary(Value) -> ok;
check_kind(uint, Value, _, _) when is_integer(Value), Value >= 0, Value < 1 bsl 64 -> ok;
check_kind({uint, Max}, Value, _, _) when is_integer(Value), Value >= 0, Value =< Max -> ok;
check_kind({uint, Max}, _, Path, _) -> bad(Path, {uint, Max});
check_kind(int, Value, _, _)
  when is_integer(Value), Value < 1 bsl 64, Value >= -(1 bsl 64) -> ok;
check_kind(bool, Value, _, _) when is_boolean(Value) -> ok;
check_kind({enum, Names}, Value, Path, _) ->
    case lists:member(Value, Names) of
        true -> ok;
        false -> bad(Path, {enum, Names})
    end;
check_kind({name, _}, Value, Path, _) -> check_name(Value, Path);
check_kind({null_or, _}, undefined, _, _) -> ok;
check_kind({null_or, Kind}, Value, Path, Depth) -> check_kind(Kind, Value, Path, Depth);
check_kind({array, Kind, Max}, Value, Path, Depth) ->
    check_kind({array, Kind}, Value, Path, Depth),
    length(Value) =< Max orelse bad(Path, {too_many, Max});
check_kind({array, Kind}, Value, Path, Depth) ->
    is_proper(Value) orelse bad(Path, array),
    _ = lists:foldl(fun(Member, N) -> check_kind(Kind, Member, [N | Path], Depth), N + 1 end,
                    1, Value),
    ok;
check_kind({map, Fields}, Value, Path, Depth) when is_map(Value) ->
    check_fields(Fields, Value, Path, Depth),
    Depth =:= shallow orelse check_others(Fields, Value, Path, 3);
check_kind(map, Value, _, shallow) when is_map(Value) -> ok;
check_kind(map, Value, Path, deep) when is_map(Value) -> check_any(Value, Path, 1);
check_kind({map_or, Names}, Value, Path, Depth) ->
    is_map(Value) orelse lists:member(Value, Names) orelse bad(Path, {map_or, Names}),
    Depth =:= shallow orelse check_any(Value, Path, 1);
check_kind(any, _, _, shallow) -> ok;
check_kind(any, Value, Path, deep) -> check_any(Value, Path, 1);
check_kind(Kind, _, Path, _) when is_atom(Kind) -> bad(Path, Kind);
check_kind({map, _}, _, Path, _) -> bad(Path, map).

check_name(undefined, Path) -> bad(Path, text_undefined);
check_name(Value, _) when is_atom(Value) -> ok;
check_name({text, Text}, Path) when is_binary(Text) -> check_any({text, Text}, Path, 1);
check_name(_, Path) -> bad(Path, name).

check_any(Value, _, _) when is_atom(Value); is_binary(Value); is_float(Value) -> ok;
check_any(Value, Path, _) when is_integer(Value) ->
    (Value < 1 bsl 64 andalso Value >= -(1 bsl 64)) orelse bad(Path, integer_range);
check_any({text, <<"undefined">>}, Path, _) -> bad(Path, text_undefined);
check_any({text, Text}, Path, _) when is_binary(Text) -> check_text(Text, Path);
check_any(Value, Path, Depth) when is_list(Value); is_map(Value) ->
    Depth < ?MAX_DEPTH orelse bad(Path, too_deep),
    check_members(Value, Path, Depth + 1);
check_any(_, Path, _) -> bad(Path, bad_type).

check_members(List, Path, Depth) when is_list(List) ->
    is_proper(List) orelse bad(Path, improper_list),
    _ = lists:foldl(fun(Member, N) -> check_any(Member, [N | Path], Depth), N + 1 end, 1, List),
    ok;
check_members(Map, Path, Depth) ->
    _ = maps:fold(fun(Key, Value, Seen) ->
        Wire = check_key(Key, Path),
        is_map_key(Wire, Seen) andalso bad([Key | Path], duplicate_key),
        check_any(Value, [Key | Path], Depth),
        Seen#{Wire => []}
    end, #{}, Map),
    ok.

check_key(Key, _) when is_atom(Key) -> atom_to_binary(Key);
check_key(Key, Path) when is_binary(Key) -> check_text(Key, Path), Key;
check_key({text, Key}, Path) when is_binary(Key) -> check_text(Key, Path), Key;
check_key(Key, Path) when is_integer(Key) -> check_any(Key, Path, 1), Key;
check_key(Key, Path) -> bad([Key | Path], bad_key).

check_text(Text, Path) ->
    case unicode:characters_to_binary(Text) of
        Text -> ok;
        _ -> bad(Path, bad_text)
    end.

is_proper(List) ->
    is_list(List) andalso try length(List) of _ -> true catch error:badarg -> false end.

-spec bad(path(), term()) -> no_return().
bad(Path, Why) ->
    throw({bad_field, lists:reverse(Path), Why}).

%% @doc A sentence for people about an error of this module.
-spec explain(field_error() | decode_error() | encode_error()) -> unicode:chardata().
explain({unknown_frame_type, Type}) -> io_lib:format("no frame type is called ~tp", [Type]);
explain({missing_field, Path}) -> io_lib:format("the field ~ts is missing", [dotted(Path)]);
explain({bad_field, Path, text_undefined}) ->
    io_lib:format("~ts is the text \"undefined\", which older peers take for null",
                  [dotted(Path)]);
explain({bad_field, Path, Why}) -> io_lib:format("~ts is not ~tp", [dotted(Path), Why]);
explain({not_encodable, Why}) when Why =:= float; Why =:= negative_integer; Why =:= integer_key ->
    io_lib:format("older peers cannot read a term of the kind ~tp; see the option newer_terms", [Why]);
explain({not_encodable, too_many_terms}) -> "the frame takes more memory as terms than is allowed";
explain({not_encodable, Why}) -> io_lib:format("a term has no place on the wire: ~tp", [Why]);
explain({bad_frame, Why}) -> io_lib:format("the bytes are not a frame: ~tp", [Why]);
explain(bad_identity) -> "that is no identity";
explain({bad_option, Key, Value}) -> io_lib:format("~tp is no value of ~tp", [Value, Key]);
explain(not_a_map) -> "a frame is a map";
explain(frame_too_large) -> "a frame has at most 16777215 bytes".

dotted([]) -> "the frame";
dotted(Path) -> lists:join($., [io_lib:format("~tp", [Step]) || Step <- Path]).

%%% Signing

%% @doc The frame with its signature. Raises `{bad_frame, encode_error()}' for a frame that cannot
%% be encoded. An identity is one of `macula_identity', or a map with the seed as `private'.
-spec sign(frame(), macula_identity:identity() | map()) -> frame().
sign(Frame, Identity) when is_map(Frame) ->
    Id = identity(Identity),
    Frame#{signature => unwrap(short_or_long(
        fun() -> macula_nif:frame_sign(table(), Id, Frame) end,
        fun() -> macula_nif:frame_sign_dirty(table(), Id, Frame) end))};
sign(_, _) ->
    %% Not a failed match, whose report would show the identity, perhaps with its seed.
    erlang:error({bad_frame, not_a_map}).

%% @doc Whether a frame bears the signature of a node. Fields the catalogue does not know are
%% covered; `publisher_sig' is not.
-spec verify(frame(), macula_identity:node_id()) ->
    {ok, frame()} | {error, signature_invalid | bad_frame | encode_error()}.
verify(Frame, NodeId) when is_map(Frame), is_binary(NodeId) ->
    case short_or_long(fun() -> macula_nif:frame_verify(table(), Frame, NodeId) end,
                       fun() -> macula_nif:frame_verify_dirty(table(), Frame, NodeId) end) of
        ok -> {ok, Frame};
        {error, Reason} -> {error, Reason}
    end;
verify(_, _) ->
    {error, bad_frame}.

%% @doc Adds the publisher's own signature to a PUBLISH or EVENT: it stays valid when a relay
%% passes the publication on.
-spec sign_publisher(frame(), macula_identity:identity() | map()) -> frame().
sign_publisher(Frame, Identity) when is_map(Frame) ->
    %% Without one of these nobody could verify it.
    Missing = [Field || Field <- ?PUBLICATION, not is_map_key(Field, Frame)],
    Missing =:= [] orelse erlang:error({bad_frame, {missing_field, [hd(Missing)]}}),
    Signature = macula_identity:sign([<<?PUBLISHER_DOMAIN>>, unwrap(publication(Frame))],
                                     identity(Identity)),
    Frame#{publisher_sig => Signature};
sign_publisher(_, _) ->
    erlang:error({bad_frame, not_a_map}).

%% @doc Whether `publisher_sig' is the signature of the frame's `publisher'.
-spec verify_publisher(frame()) -> {ok, frame()} | {error, signature_invalid | bad_frame}.
verify_publisher(#{publisher := Publisher, publisher_sig := <<_:512>> = Signature,
                   topic := _, realm := _, seq := _, payload := _} = Frame)
  when byte_size(Publisher) =:= 32 ->
    verified(<<?PUBLISHER_DOMAIN>>, publication(Frame), Signature, Publisher, Frame);
verify_publisher(_) ->
    {error, bad_frame}.

publication(Frame) ->
    cbor_encode(maps:with(?PUBLICATION, Frame)).

%% @doc A membership update from its fields, without signature.
-spec swim_update(map()) -> map().
swim_update(Spec) ->
    Fields = lists:keydelete(signature, 1, macula_frame_table:update()),
    try check_fields(Fields, Spec, [], deep) of
        _ -> Spec
    catch
        throw:Reason -> erlang:error({bad_frame, Reason})
    end.

%% @doc Signs a membership update; the identity must be that of its `by'.
-spec sign_update(map(), macula_identity:identity() | map()) -> map().
sign_update(Update, Identity) ->
    Unsigned = maps:remove(signature, Update),
    Message = [<<?UPDATE_DOMAIN>>, unwrap(cbor_encode(Unsigned))],
    Update#{signature => macula_identity:sign(Message, identity(Identity))}.

%% @doc Whether a membership update bears the signature of its `by'.
-spec verify_update(map()) -> {ok, map()} | {error, signature_invalid | bad_frame}.
verify_update(#{by := By, signature := <<_:512>> = Signature} = Update)
  when byte_size(By) =:= 32 ->
    Bytes = cbor_encode(maps:remove(signature, Update)),
    verified(<<?UPDATE_DOMAIN>>, Bytes, Signature, By, Update);
verify_update(_) ->
    {error, bad_frame}.

verified(Domain, {ok, Bytes}, Signature, NodeId, What) ->
    case macula_identity:verify([Domain, Bytes], Signature, NodeId) of
        true -> {ok, What};
        false -> {error, signature_invalid}
    end;
verified(_, {error, _}, _, _, _) ->
    {error, bad_frame}.

identity(Identity) ->
    case macula_identity:ensure(Identity) of
        {ok, Id} -> Id;
        {error, Reason} -> erlang:error({bad_frame, Reason})
    end.

%%% Bytes

%% @doc The frame as it travels: a length of four bytes, then canonical CBOR. Raises
%% `{bad_frame, encode_error()}' when it cannot be encoded.
-spec encode(frame()) -> binary().
encode(Frame) ->
    unwrap(try_encode(Frame)).

%% @doc As {@link encode/1}, without raising.
-spec try_encode(frame()) -> {ok, binary()} | {error, encode_error()}.
try_encode(Frame) ->
    try_encode(Frame, #{}).

%% @doc The same, with a say in what shall not be sent.
-spec try_encode(frame(), encode_opts()) -> {ok, binary()} | {error, encode_error()}.
try_encode(Frame, Opts) ->
    case allow(Opts) of
        {ok, Allow} ->
            short_or_long(
                fun() -> macula_nif:frame_encode(table(), Frame, Allow) end,
                fun() -> macula_nif:frame_encode_dirty(table(), Frame, Allow) end);
        Error ->
            Error
    end.

allow(Opts) ->
    Undefined = maps:get(text_undefined, Opts, allow),
    Newer = maps:get(newer_terms, Opts, allow),
    Terms = maps:get(max_terms, Opts, ?MOST_TERMS),
    Bad = fun(Mode) -> Mode =/= allow andalso Mode =/= refuse end,
    case maps:keys(maps:without([text_undefined, newer_terms, max_terms], Opts)) of
        [Key | _] -> {error, {bad_option, macula_identity:shown(Key), unknown}};
        [] when not is_integer(Terms); Terms < 1; Terms > ?MOST_TERMS ->
            {error, {bad_option, max_terms, macula_identity:shown(Terms)}};
        [] ->
            case {Bad(Undefined), Bad(Newer)} of
                {true, _} -> {error, {bad_option, text_undefined, macula_identity:shown(Undefined)}};
                {_, true} -> {error, {bad_option, newer_terms, macula_identity:shown(Newer)}};
                _ -> {ok, {Undefined =:= allow, Newer =:= allow, Terms}}
            end
    end.

%% @equiv sign_encode(Frame, Identity, #{})
-spec sign_encode(frame(), macula_identity:identity() | map()) ->
    {ok, binary()} | {error, encode_error()}.
sign_encode(Frame, Identity) ->
    sign_encode(Frame, Identity, #{}).

%% @doc Signs and encodes in one native call. With `#{text_undefined => refuse}' a frame with the
%% text "undefined" is an error, since older peers would find its signature invalid; with
%% `#{newer_terms => refuse}' one with floats, negative integers or integer keys, at which the decoders
%% of older peers stop for good.
-spec sign_encode(frame(), macula_identity:identity() | map(), encode_opts()) ->
    {ok, binary()} | {error, encode_error()}.
sign_encode(Frame, Identity, Opts) ->
    case allow(Opts) of
        {ok, Allow} -> sign_encode_(Frame, Identity, Allow);
        Error -> Error
    end.

%% Only a native identity reaches the library: its errors would show any other.
sign_encode_(Frame, Identity, Allow) when not is_reference(Identity) ->
    case macula_identity:ensure(Identity) of
        {ok, Native} -> sign_encode_(Frame, Native, Allow);
        {error, Reason} -> {error, Reason}
    end;
sign_encode_(Frame, Identity, Allow) ->
    short_or_long(
        fun() -> macula_nif:frame_sign_encode(table(), Identity, Frame, Allow) end,
        fun() -> macula_nif:frame_sign_encode_dirty(table(), Identity, Frame, Allow) end).

%% @doc The same for many frames, in fewer native calls; the results are in the frames' order.
-spec sign_encode_many([frame()], macula_identity:identity() | map()) ->
    [{ok, binary()} | {error, encode_error()}].
sign_encode_many([], _Identity) ->
    [];
sign_encode_many(Frames, Identity) when not is_reference(Identity) ->
    sign_encode_many(Frames, identity(Identity));
sign_encode_many(Frames, _) when not is_list(Frames) ->
    erlang:error(badarg);
sign_encode_many(Frames, Identity) ->
    case macula_nif:frame_sign_encode_batch(table(), Identity, Frames, {true, true, ?MOST_TERMS}) of
        {Done, []} -> Done;
        {Done, [Large | Rest]} when Done =:= [] ->
            [sign_encode(Large, Identity) | sign_encode_many(Rest, Identity)];
        {Done, Rest} -> Done ++ sign_encode_many(Rest, Identity)
    end.

%% @equiv decode(Bytes, #{})
-spec decode(binary()) -> {ok, frame(), binary()} | {more, pos_integer()} | {error, decode_error()}.
decode(Bytes) ->
    decode(Bytes, #{}).

%% @doc The first frame of a binary and what follows it, or how many bytes are missing at least.
%% Options: `text' (`tagged' or `existing', see above); `max', the greatest length allowed
%% (default and upper bound 16777215); `max_terms' (67108864), the bytes that the frame may take as
%% terms. A frame that would take more is refused with `too_many_terms' before any term is made.
-spec decode(binary(), decode_opts()) ->
    {ok, frame(), binary()} | {more, pos_integer()} | {error, decode_error()}.
decode(Bytes, Opts) ->
    case first(Bytes, none, Opts) of
        {ok, Frame, _, Rest} -> {ok, Frame, Rest};
        Other -> Other
    end.

%% @doc Decodes the first frame and checks its signature in the same native call. `Peer' is the
%% node the frame came from, or `first' while that is unknown; types that others sign ({@link
%% catalogue/0}) are checked against the key they name.
-spec decode_verify(binary(), first | macula_identity:node_id(), decode_opts()) ->
    {ok, frame(), verdict(), binary()} | {more, pos_integer()} | {error, decode_error()}.
decode_verify(Bytes, Peer, Opts) ->
    first(Bytes, Peer, Opts).

first(Bytes, Check, Opts) ->
    case options(Opts, true) of
        {ok, Options} ->
            case parse_step(Bytes, 0, Check, Options) of
                {[{Frame, Verdict}], Next, _} ->
                    {ok, Frame, Verdict, binary:part(Bytes, Next, byte_size(Bytes) - Next)};
                {[], _, Status} ->
                    Status
            end;
        Error ->
            Error
    end.

%% @equiv parse_stream(Buffer, #{})
-spec parse_stream(binary()) -> {[frame()], binary()} | {error, decode_error(), [frame()]}.
parse_stream(Buffer) ->
    parse_stream(Buffer, #{}).

%% @doc All complete frames of a buffer and the bytes after them. Bytes that are no frame end the
%% stream for good: `{error, Reason, FramesBefore}'.
-spec parse_stream(binary(), decode_opts()) ->
    {[frame()], binary()} | {error, decode_error(), [frame()]}.
parse_stream(Buffer, Opts) ->
    case parse(Buffer, none, Opts) of
        {Items, Rest, {more, _}} -> {[Frame || {Frame, _} <- Items], Rest};
        {Items, _, {error, Reason}} -> {error, Reason, [Frame || {Frame, _} <- Items]}
    end.

%% @doc All complete frames of a buffer with the verdict on their signatures. `Check' is `none',
%% `first' (only frames that name their signer, as CONNECT and HELLO do, can be verified) or the
%% node id of the peer they came from.
-spec parse(binary(), none | first | macula_identity:node_id(), decode_opts()) -> parsed().
parse(Buffer, Check, Opts) ->
    case options(Opts, false) of
        {ok, Options} -> parse(Buffer, 0, Check, Options, []);
        Error -> {[], Buffer, Error}
    end.

parse(Buffer, From, Check, Options, Done) ->
    case parse_step(Buffer, From, Check, Options) of
        {Items, Next, again} -> parse(Buffer, Next, Check, Options, [Items | Done]);
        {Items, Next, Status} ->
            {lists:append(lists:reverse(Done, [Items])),
             binary:part(Buffer, Next, byte_size(Buffer) - Next), Status}
    end.

%% The short call stops where a frame is too long for it; the twin takes that frame.
parse_step(Buffer, From, Check, Options) ->
    case macula_nif:frame_parse(table(), Buffer, From, Check, Options) of
        {[], From, large} ->
            macula_nif:frame_parse_dirty(table(), Buffer, From, Check, Options);
        {Items, Next, large} ->
            {Items, Next, again};
        Result ->
            Result
    end.

options(Opts, One) ->
    Text = maps:get(text, Opts, tagged),
    Max = maps:get(max, Opts, ?MAX_FRAME),
    Terms = maps:get(max_terms, Opts, ?MAX_TERMS),
    case maps:keys(maps:without([text, max, max_terms], Opts)) of
        [Key | _] -> {error, {bad_option, macula_identity:shown(Key), unknown}};
        [] when Text =/= tagged, Text =/= existing -> {error, {bad_option, text, macula_identity:shown(Text)}};
        [] when not is_integer(Terms); Terms < 1; Terms > ?MOST_TERMS ->
            {error, {bad_option, max_terms, macula_identity:shown(Terms)}};
        [] when is_integer(Max), Max >= 0, Max =< ?MAX_FRAME -> {ok, {Text, Max, Terms, One}};
        [] -> {error, {bad_option, max, macula_identity:shown(Max)}}
    end.

%% @doc The canonical CBOR of a payload term.
-spec cbor_encode(term()) -> {ok, binary()} | {error, encode_error()}.
cbor_encode(Term) ->
    short_or_long(fun() -> macula_nif:cbor_encode(table(), Term) end,
                  fun() -> macula_nif:cbor_encode_dirty(table(), Term) end).

%% @doc The payload term of one CBOR item.
-spec cbor_decode(binary()) -> {ok, term()} | {error, decode_error()}.
cbor_decode(Bytes) ->
    short_or_long(fun() -> macula_nif:cbor_decode(table(), Bytes, tagged) end,
                  fun() -> macula_nif:cbor_decode_dirty(table(), Bytes, tagged) end).

short_or_long(Short, Long) ->
    case Short() of
        large -> Long();
        Result -> Result
    end.

unwrap({ok, Value}) -> Value;
unwrap({error, Reason}) -> erlang:error({bad_frame, Reason}).

%% Made once per node; the native library keeps it as long as this term lives.
table() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            {Envelope, Types} = macula_frame_table:native(),
            Table = macula_nif:frame_table(Envelope, Types),
            persistent_term:put(?MODULE, Table),
            Table;
        Table ->
            Table
    end.

%%% Reading

%% @doc The type of a frame: an atom of the catalogue, or the text of one it does not have.
-spec frame_type(frame()) -> frame_type().
frame_type(#{frame_type := Type}) -> Type.

%% @doc The type of what was received: a map whose `frame_type' is no text, or is missing, is not a
%% frame that a conversation could go on with.
-spec named_type(term()) -> {ok, frame_type()} | error.
named_type(#{frame_type := undefined}) -> error;
named_type(#{frame_type := Type}) when is_atom(Type) -> {ok, Type};
named_type(#{frame_type := {text, _} = Type}) -> {ok, Type};
named_type(_) -> error.

%% @doc The 16-byte id of a frame.
-spec frame_id(frame()) -> binary().
frame_id(#{frame_id := Id}) -> Id.

%% @doc The wire version a frame says it has.
-spec version(frame()) -> integer().
version(#{version := Version}) -> Version.

%% @doc The signature of a frame, if it has one.
-spec signature(frame()) -> binary() | undefined.
signature(Frame) -> maps:get(signature, Frame, undefined).

%% @doc When the sender says it made the frame, in milliseconds since 1970.
-spec sent_at_ms(frame()) -> integer().
sent_at_ms(#{sent_at_ms := Ms}) -> Ms.

%% @doc A field of a frame. Raises `{no_such_field, Type, Field}' when the frame's type has none of
%% that name, and `{missing_field, [Field]}' when this frame lacks it.
-spec get(atom(), frame()) -> term().
get(Field, Frame) ->
    case Frame of
        #{Field := Value} -> Value;
        #{frame_type := Type} ->
            case lists:keymember(Field, 1, fields(Type)) of
                true -> erlang:error({missing_field, [Field]});
                false -> erlang:error({no_such_field, Type, Field})
            end
    end.

%% @doc A field of a frame, or a default when it is absent.
-spec get(atom(), frame(), term()) -> term().
get(Field, Frame, Default) ->
    maps:get(Field, Frame, Default).

%% @doc Whose signature a frame should bear when it came from `Peer'. `undefined' when the field
%% that names the signer is missing or malformed.
-spec signer(frame(), macula_identity:node_id()) -> macula_identity:node_id() | undefined.
signer(#{frame_type := Type} = Frame, Peer) ->
    case macula_frame_table:type(Type) of
        {ok, #{signed_by := {field, Field}}} -> node_id(maps:get(Field, Frame, undefined));
        {ok, #{signed_by := {field_or_peer, Field}}} -> node_id(maps:get(Field, Frame, Peer));
        _ -> Peer
    end.

node_id(<<_:256>> = NodeId) -> NodeId;
node_id(_) -> undefined.

%% @doc The category of a type: it decides how frames of it are verified on a link.
-spec category(frame_type()) -> macula_frame_table:category() | other.
category(Type) ->
    case macula_frame_table:type(Type) of
        {ok, #{category := Category}} -> Category;
        error -> other
    end.

%% @doc All frame types.
-spec types() -> [atom()].
types() ->
    [Type || {Type, _} <- macula_frame_table:types()].

%% @doc The fields of a type, envelope first, with kind and presence.
-spec fields(frame_type()) -> [macula_frame_table:field()].
fields(Type) ->
    case macula_frame_table:type(Type) of
        {ok, #{all := Fields}} -> Fields;
        error -> macula_frame_table:envelope()
    end.

%% @doc The name of an ERROR code; `unknown_error' for codes the catalogue does not have.
-spec error_name(0..255) -> atom().
error_name(Code) ->
    proplists:get_value(Code, macula_frame_table:error_codes(), unknown_error).

%% @doc The code of an ERROR name; that of `unknown_error' for other names.
-spec error_code(term()) -> 0..255.
error_code(Name) ->
    case lists:keyfind(Name, 2, macula_frame_table:error_codes()) of
        {Code, _} -> Code;
        false -> 15
    end.

%% @doc All types with their fields, as Markdown.
-spec catalogue() -> unicode:chardata().
catalogue() ->
    ["## Every frame\n\n", table_of(macula_frame_table:envelope()),
     [[io_lib:format("\n## ~s\n\nCategory ~s. Signed by ~s.\n\n",
                     [Name, Category, signed_by_text(SignedBy)]), table_of(Fields)]
      || {Name, #{category := Category, signed_by := SignedBy, fields := Fields}}
             <- macula_frame_table:types()]].

signed_by_text(peer) -> "the connected peer";
signed_by_text({field, Field}) -> ["`", atom_to_list(Field), "`"];
signed_by_text({field_or_peer, Field}) ->
    ["`", atom_to_list(Field), "`, else the connected peer"].

table_of(Fields) ->
    ["| field | kind | presence |\n|---|---|---|\n",
     [io_lib:format("| `~s` | ~ts | ~ts |\n", [Name, kind_text(Kind), presence_text(Presence)])
      || {Name, Kind, Presence} <- Fields]].

presence_text(required) -> "required";
presence_text(optional) -> "may be absent";
presence_text({optional, Value}) ->
    io_lib:format("may be absent; sent as `~tw` by default", [Value]);
presence_text({default, Value}) -> io_lib:format("always sent; default `~tw`", [Value]).

kind_text({bytes, Size}) -> io_lib:format("~b bytes", [Size]);
kind_text(bytes) -> "bytes";
kind_text(uint) -> "integer >= 0";
kind_text({uint, Max}) -> io_lib:format("integer 0..~b", [Max]);
kind_text(int) -> "integer";
kind_text(bool) -> "`true` or `false`";
kind_text({enum, Names}) when length(Names) > 17 -> "the type's name";
kind_text({enum, Names}) -> names_text(Names);
kind_text({name, []}) -> "an atom or text";
kind_text({name, Names}) -> [names_text(Names), ", or other text"];
kind_text({array, Kind}) -> ["list of ", kind_text(Kind)];
kind_text({array, Kind, Max}) -> [io_lib:format("at most ~b of ", [Max]), kind_text(Kind)];
kind_text({map, Fields}) ->
    ["map of ", lists:join(", ", [[atom_to_list(Name), " (", kind_text(Kind), ")"]
                                  || {Name, Kind, _} <- Fields])];
kind_text(map) -> "map";
kind_text(any) -> "any payload term";
kind_text({null_or, Kind}) -> [kind_text(Kind), " or `undefined`"];
kind_text({map_or, Names}) -> ["map or ", names_text(Names)].

names_text(Names) ->
    lists:join(", ", [["`", atom_to_list(Name), "`"] || Name <- Names]).
