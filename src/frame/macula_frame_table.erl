%% @doc The one closed table of the peering wire: every frame type with its category, whose key it
%% is signed with, and the name, kind and presence of its fields. Construction, checking, decoding
%% (in the native library too) and the documentation are made from it; nothing else names a field.
%% @private
-module(macula_frame_table).

-export([types/0, type/1, envelope/0, update/0, error_codes/0, max_realms/0, native/0]).

-export_type([type/0, known/0, kind/0, field/0, category/0, signed_by/0]).

-type category() :: handshake | dht | swim | pubsub | rpc | stream | hyparview | plumtree | content.
-type signed_by() :: peer | {field, atom()} | {field_or_peer, atom()}.
-type kind() ::
    {bytes, Size :: pos_integer()}
    | bytes
    | uint
    | {uint, Max :: non_neg_integer()}
    | int
    | bool
    | {enum, [atom()]}
    | {name, Known :: [atom()]}
    | {array, kind()}
    | {array, kind(), Max :: pos_integer()}
    | {map, [field()]}
    | map
    | any
    | {null_or, kind()}
    | {map_or, [atom()]}.
-type field() :: {Name :: atom(), kind(), presence()}.
%% `{default, Value}': the key is always sent, and the constructor fills it in. `optional': the key
%% may be absent; `{optional, Value}': so it may, but the constructor fills it in.

-type presence() :: required | optional | {default, term()} | {optional, term()}.
-type type() :: #{category := category(), signed_by := signed_by(), fields := [field()]}.

-type known() :: #{category := category(), signed_by := signed_by(), fields := [field()],
                   all := [field()], defaults := #{atom() => term()}}.

-define(B16, {bytes, 16}).
-define(B32, {bytes, 32}).
-define(MCID, {bytes, 34}).
%% More realms than any node serves, and few enough to bound what a handshake costs.
-define(MAX_REALMS, 1024).

%% @doc How many realms CONNECT and HELLO may name.
-spec max_realms() -> pos_integer().
max_realms() -> ?MAX_REALMS.

%% @doc The fields that every frame has.
-spec envelope() -> [field()].
envelope() ->
    [{version, uint, {default, 2}},
     {frame_type, {enum, [Type || {Type, _, _, _} <- catalogue()]}, required},
     {frame_id, ?B16, required},
     {sent_at_ms, int, required},
     {capabilities, uint, {default, 0}},
     {realm, {null_or, ?B32}, {default, undefined}},
     {call_id, {null_or, ?B16}, {default, undefined}},
     {source_route, {null_or, bytes}, {default, undefined}},
     {signature, {bytes, 64}, optional}].

%% @doc The fields of a membership update inside SWIM frames.
-spec update() -> [field()].
update() ->
    [{target, ?B32, required},
     {state, {enum, [alive, suspect, confirmed_failed]}, required},
     {incarnation, uint, required},
     {observed_at, uint, required},
     {by, ?B32, required},
     {signature, {bytes, 64}, required}].

%% @doc The codes of an ERROR frame with their names.
-spec error_codes() -> [{0..255, atom()}].
error_codes() ->
    [{0, ok}, {1, unknown_next_peer}, {2, temporary_relay_failure}, {3, relay_disabled},
     {4, node_not_found_at_target_relay}, {5, target_realm_refused}, {6, loop_detected},
     {7, expiry_too_soon}, {8, upstream_congestion}, {9, invalid_path_header},
     {10, crypto_puzzle_invalid}, {11, realm_not_authoritative_here}, {12, tombstoned},
     {13, payload_too_large}, {14, signature_invalid}, {15, unknown_error}, {16, unauthorized}].

%% @doc All types in the order of the catalogue.
-spec types() -> [{atom(), type()}].
types() ->
    [{Name, #{category => Category, signed_by => SignedBy, fields => Fields}}
     || {Name, Category, SignedBy, Fields} <- catalogue()].

%% @doc One type, with what every frame is asked for made once: `all' its fields, those of the envelope
%% first, and the `defaults' of these.
-spec type(term()) -> {ok, known()} | error.
type(Name) ->
    maps:find(Name, known()).

known() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            Known = maps:from_list([{Name, known(Type)} || {Name, Type} <- types()]),
            ok = persistent_term:put(?MODULE, Known),
            Known;
        Known ->
            Known
    end.

known(#{fields := Own} = Type) ->
    Names = [Name || {Name, _, _} <- Own],
    All = [Field || {Name, _, _} = Field <- envelope(), not lists:member(Name, Names)] ++ Own,
    Type#{all => All, defaults => maps:from_list([{Name, Value} || {Name, _, {_, Value}} <- All])}.

catalogue() ->
    [{connect, handshake, {field, node_id},
      presence() ++ [{puzzle_evidence, ?B32, required},
                     {endorsements, {array, map}, {default, []}}]},
     {hello, handshake, {field, node_id},
      presence() ++ [{accepted, bool, required},
                     {refusal_code, {null_or, uint}, {default, undefined}},
                     {negotiated_capabilities, uint, required}]},
     {goodbye, handshake, peer,
      [{reason, {name, [operator_stop, app_liveness_lost, replaced_by_newer_handshake,
                        puzzle_invalid]}, {default, operator_stop}},
       {detail, {null_or, bytes}, {default, undefined}}]},

     {ping, dht, peer, [{nonce, ?B16, required}]},
     {pong, dht, peer, [{nonce, ?B16, required}]},
     {find_node, dht, peer,
      [{key, ?B32, required}, {origin, ?B32, required}, {depth, uint, required}]},
     {nodes, dht, peer,
      [{key, ?B32, required},
       {nodes, {array, {map, [{node_id, ?B32, required},
                              {station_id, ?B32, required},
                              {addresses, {array, map}, {default, []}},
                              {tier, {uint, 4}, required},
                              {asn, {null_or, uint}, {optional, undefined}},
                              {country, {bytes, 2}, required},
                              {last_seen_at, uint, required}]}}, required}]},
     {find_value, dht, peer, [{key, ?B32, required}, {origin, ?B32, required}]},
     {value, dht, peer, [{key, ?B32, required}, {records, {array, bytes}, required}]},
     {store, dht, peer, [{record, bytes, required}]},
     {store_ack, dht, peer,
      [{key, ?B32, required}, {stored, bool, required},
       {reason, {null_or, {name, []}}, {optional, undefined}}]},
     {replicate, dht, peer, [{record, bytes, required}, {new_custodian, bool, required}]},
     {replicate_ack, dht, peer, [{key, ?B32, required}, {accepted, bool, required}]},

     {swim_ping, swim, peer,
      [{round, uint, required}, {incarnation, uint, required}, piggyback()]},
     {swim_ack, swim, peer,
      [{round, uint, required}, {responder, ?B32, required}, {incarnation, uint, required},
       piggyback()]},
     {swim_suspect, swim, peer, suspicion()},
     {swim_confirm, swim, peer, suspicion()},

     {call, rpc, {field, caller},
      [{call_id, ?B16, required}, {procedure, bytes, required}, {realm, ?B32, required},
       {payload, any, required}, {deadline_ms, int, required}, {caller, ?B32, required},
       {source_route, bytes, {default, <<>>}}, {retry_budget, uint, {default, 0}},
       %% Peers before 4.4 do not send this one.
       {ucan_token, bytes, {optional, <<>>}}]},
     {result, rpc, {field, responded_by},
      [{call_id, ?B16, required}, {payload, any, required}, {responded_by, ?B32, required},
       {source_route_reverse, bytes, {default, <<>>}}]},
     {error, rpc, {field, reported_by},
      [{call_id, ?B16, required}, {code, {uint, 255}, required},
       {name, {name, [Name || {_, Name} <- error_codes()]}, required},
       {reported_by, ?B32, required},
       {detail, {null_or, bytes}, {optional, undefined}},
       {offending_hop, {null_or, ?B32}, {optional, undefined}},
       {source_route_partial, bytes, {default, <<>>}}]},

     {publish, pubsub, {field, publisher},
      [{topic, bytes, required}, {realm, ?B32, required}, {publisher, ?B32, required},
       {seq, uint, required}, {payload, any, required}, {published_at_ms, int, required},
       {ttl_ms, {null_or, uint}, {optional, undefined}},
       {publisher_sig, {bytes, 64}, optional}]},
     {event, pubsub, peer,
      [{topic, bytes, required}, {realm, ?B32, required}, {publisher, ?B32, required},
       {seq, uint, required}, {payload, any, required},
       {delivered_via, {enum, [plumtree, dht, direct]}, required},
       {publisher_sig, {bytes, 64}, optional}]},
     {subscribe, pubsub, peer,
      [{topic, bytes, required}, {realm, ?B32, required}, {subscriber, ?B32, required},
       {filter, any, {optional, undefined}}, {options, map, {default, #{}}}]},
     {unsubscribe, pubsub, peer,
      [{topic, bytes, required}, {realm, ?B32, required}, {subscriber, ?B32, required}]},
     {advertise, rpc, peer,
      [{realm, ?B32, required}, {procedure, bytes, required}, {advertiser, ?B32, required},
       {options, map, {default, #{}}}]},
     {unadvertise, rpc, peer,
      [{realm, ?B32, required}, {procedure, bytes, required}, {advertiser, ?B32, required}]},

     {stream_open, stream, {field, caller},
      [{stream_id, ?B16, required}, {procedure, bytes, required}, {realm, ?B32, required},
       {mode, {enum, [server_stream, client_stream, bidi]}, required}, {args, any, required},
       {deadline_ms, int, required}, {caller, ?B32, required},
       {source_route, bytes, {default, <<>>}}, {retry_budget, uint, {default, 0}}]},
     {stream_data, stream, {field_or_peer, signer},
      [{stream_id, ?B16, required}, {seq, uint, required},
       {encoding, {enum, [raw, msgpack]}, {default, raw}}, {body, any, required},
       {signer, ?B32, optional}]},
     {stream_end, stream, {field_or_peer, signer},
      [{stream_id, ?B16, required}, {role, {enum, [send, both]}, required},
       {signer, ?B32, optional}]},
     {stream_error, stream, {field_or_peer, signer},
      [{stream_id, ?B16, required}, {code, bytes, required}, {message, bytes, required},
       {signer, ?B32, optional}]},
     {stream_reply, stream, {field, responded_by},
      [{stream_id, ?B16, required}, {payload, any, required}, {responded_by, ?B32, required}]},

     {hyparview_join, hyparview, peer, [{realm, ?B32, required}, {new_member, ?B32, required}]},
     {hyparview_forward_join, hyparview, peer,
      [{realm, ?B32, required}, {new_member, ?B32, required}, {ttl, uint, required},
       {arwl, uint, required}, {prwl, uint, required}]},
     {hyparview_neighbor, hyparview, peer,
      [{realm, ?B32, required}, {priority, {enum, [high, low]}, required}]},
     {hyparview_disconnect, hyparview, peer, [{realm, ?B32, required}]},
     {hyparview_shuffle, hyparview, peer,
      [{realm, ?B32, required}, {origin, ?B32, required}, {ttl, uint, required},
       {peer_sample, {array, ?B32}, required}]},
     {hyparview_shuffle_reply, hyparview, peer,
      [{realm, ?B32, required}, {peer_sample, {array, ?B32}, required}]},

     {plumtree_gossip, plumtree, peer, gossip() ++ [{payload, any, required}]},
     {plumtree_ihave, plumtree, peer, gossip()},
     {plumtree_graft, plumtree, peer, gossip()},
     {plumtree_prune, plumtree, peer, [{realm, ?B32, required}]},

     {want, content, peer,
      [{blocks, {array, {map, [{mcid, ?MCID, required},
                               {priority, {uint, 255}, {default, 128}}]}}, required}]},
     {have, content, peer,
      [{blocks, {array, {map, [{mcid, ?MCID, required}, {size, uint, required}]}}, required}]},
     {block, content, peer, [{mcid, ?MCID, required}, {payload, bytes, required}]},
     {manifest_req, content, peer, [{mcid, ?MCID, required}]},
     {manifest_res, content, peer,
      [{mcid, ?MCID, required}, {manifest, {map_or, [not_found]}, required}]},
     {cancel, content, peer, [{blocks, {array, ?MCID}, required}]}].

%% What CONNECT and HELLO share.
presence() ->
    [{node_id, ?B32, required},
     {station_id, ?B32, required},
     {realms, {array, ?B32, ?MAX_REALMS}, {default, []}},
     {addresses, {array, map}, {default, []}},
     {site, {null_or, map}, {default, undefined}}].

suspicion() ->
    [{target, ?B32, required}, {target_incarnation, uint, required},
     {suspected_by, ?B32, required}, {ttl, uint, required}].

piggyback() ->
    {piggyback, {array, {map, update()}}, {default, []}}.

gossip() ->
    [{realm, ?B32, required}, {msg_id, ?B16, required}, {round, uint, required}].

%% @doc The table as `macula_nif:frame_table/2' takes it: only what decides how bytes become
%% terms and whose key signs.
-spec native() -> {Envelope :: list(), Types :: list()}.
native() ->
    Native = fun(Fields) -> [{Name, native_kind(Kind)} || {Name, Kind, _} <- Fields] end,
    {Native(envelope()),
     [{Name, SignedBy, Native(Fields)} || {Name, _, SignedBy, Fields} <- catalogue()]}.

native_kind(bool) -> {enum, [true, false]};
native_kind({enum, Names}) -> {enum, Names};
native_kind({name, Names}) -> {enum, Names};
native_kind({map_or, Names}) -> {enum, Names};
native_kind({null_or, Kind}) -> native_kind(Kind);
native_kind({array, Kind}) -> {array, native_kind(Kind)};
native_kind({array, Kind, _Max}) -> {array, native_kind(Kind)};
native_kind({map, Fields}) -> {map, [{Name, native_kind(Kind)} || {Name, Kind, _} <- Fields]};
native_kind(_) -> any.
