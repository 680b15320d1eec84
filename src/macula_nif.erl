%% @doc The VM boundary: the stubs of the native functions and their loading, nothing else.
%% @private
-module(macula_nif).

%% The distribution's link engine: native/macula/src/distribution/nif.rs.
-export([dist_endpoint/2, dist_endpoint_close/1, dist_await_port/2, dist_accept/1, dist_connect/4,
         dist_own/2, dist_peer/1, dist_trust/2, dist_exporter/1, dist_control_send/3,
         dist_control_recv/2, dist_start/2, dist_send/2, dist_tick/1, dist_credit/2, dist_stat/1,
         dist_stop/1, dist_info/1, dist_exchange/2, dist_exchange_key/2, dist_mac/2, dist_is_mac/3, dist_random/0]).

-export([%% peering
         conn_set_receive_window/2, frame_table/2, frame_encode/3, frame_encode_dirty/3, frame_sign/3,
         frame_sign_dirty/3, frame_sign_encode/4, frame_sign_encode_dirty/4,
         frame_sign_encode_batch/4, frame_verify/3, frame_verify_dirty/3, frame_parse/5,
         frame_parse_dirty/5, cbor_encode/2, cbor_encode_dirty/2, cbor_decode/3,
         cbor_decode_dirty/3, identity_search/2, identity_cancel/1, identity_from_seed/1,
         identity_from_pem/1, identity_load/1, identity_save/3, identity_public/1,
         identity_seed/1, identity_pem/1, identity_sign/2, identity_sign_dirty/2,
         identity_verify/3, identity_verify_dirty/3, identity_puzzle_bits/1]).

-on_load(init/0).

-export_type([dist_address/0]).

-export([op_cancel/1, live_objects/0, qlog_failures/0, tls_self_signed/3, inject_panic/1, injected_panics/0,
         inject_stall/2]).
-export([listener_start/2, listener_arm/2, listener_accept/3, listener_close/2,
         listener_set_locked/2, listener_reload/3, verdict_tell/2, conn_migrate/4,
         listener_begin_transfer/2, listener_commit_transfer/1, listener_sockname/1,
         listener_info/1, listener_is/1, listener_set_resumption_keys/2]).
-export([conn_dial/2, conn_ask/3, conn_open_stream/6, conn_accept_stream/4, conn_arm/2,
         conn_close/3, conn_begin_transfer/2, conn_commit_transfer/1, conn_is/1,
         conn_send_datagram/4, conn_set_datagrams/2, conn_tell_changes/2]).
-export([stream_send/5, stream_recv/4, stream_set_active/2, stream_set_priority/2,
         stream_set_watermarks/3, stream_announce/1, stream_tell_delivered/1, stream_close/1,
         stream_shutdown/5, stream_begin_transfer/2, stream_commit_transfer/1, stream_info/1,
         stream_is/1]).
-export([dist_streams/2, dist_stream_open/5, dist_stream_accept/3, dist_stream_stop_accepting/1, dist_stream_send/5,
         dist_stream_reset/3, dist_stream_set_active/3, dist_stream_begin_transfer/3,
         dist_stream_commit_transfer/1, dist_stream_list/2]).

-export_type([stream_active/0, stream_facts/0]).

-define(STUB, erlang:nif_error(nif_not_loaded)).

-spec init() -> ok | {error, term()}.
init() ->
    %% Runs before any application is started when the distribution loads it: no application
    %% environment, no logger.
    case erlang:load_nif(filename:join(macula_library:priv(), "macula_nif"), 0) of
        ok -> macula_dist_nif:offer(dist_functions());
        %% Of a release that boots: the distribution has called this before.
        {error, {reload, _}} -> ok;
        {error, _} = Error -> Error
    end.

%% What the distribution calls, for the time in which this module is not known by its name yet.
dist_functions() ->
    #{dist_endpoint => fun dist_endpoint/2, dist_endpoint_close => fun dist_endpoint_close/1,
      dist_await_port => fun dist_await_port/2, dist_accept => fun dist_accept/1,
      dist_connect => fun dist_connect/4, dist_own => fun dist_own/2, dist_peer => fun dist_peer/1,
      dist_trust => fun dist_trust/2, dist_exporter => fun dist_exporter/1,
      dist_control_send => fun dist_control_send/3, dist_control_recv => fun dist_control_recv/2,
      dist_start => fun dist_start/2, dist_send => fun dist_send/2, dist_tick => fun dist_tick/1,
      dist_credit => fun dist_credit/2, dist_stat => fun dist_stat/1,
      dist_info => fun dist_info/1, dist_exchange => fun dist_exchange/2,
      dist_exchange_key => fun dist_exchange_key/2, dist_mac => fun dist_mac/2,
      dist_is_mac => fun dist_is_mac/3, dist_random => fun dist_random/0,
      dist_stop => fun dist_stop/1,
      dist_streams => fun dist_streams/2,
      dist_stream_open => fun dist_stream_open/5,
      dist_stream_accept => fun dist_stream_accept/3,
      dist_stream_stop_accepting => fun dist_stream_stop_accepting/1,
      dist_stream_send => fun dist_stream_send/5,
      dist_stream_reset => fun dist_stream_reset/3,
      dist_stream_set_active => fun dist_stream_set_active/3,
      dist_stream_begin_transfer => fun dist_stream_begin_transfer/3,
      dist_stream_commit_transfer => fun dist_stream_commit_transfer/1,
      dist_stream_list => fun dist_stream_list/2}.

%% --- distribution ---------------------------------------------------------------------------

-type dist_endpoint() :: reference().
-type dist_link() :: reference().
-type dist_exchange() :: reference().
%% With the number of the interface where the address counts on one link only.
-type dist_address() :: {inet:ip_address(), inet:port_number()}
                      | {inet:ip6_address(), inet:port_number(), Scope :: pos_integer()}.

-spec dist_endpoint(dist_address(), map()) ->
          {ok, dist_endpoint(), dist_address()} | {error, atom()}.
dist_endpoint(_Address, _Options) -> erlang:nif_error(nif_not_loaded).

-spec dist_endpoint_close(dist_endpoint()) -> ok.
dist_endpoint_close(_Endpoint) -> erlang:nif_error(nif_not_loaded).

-spec dist_await_port(inet:port_number(), reference()) -> boolean().
dist_await_port(_Port, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_accept(dist_endpoint()) -> ok | {error, closed}.
dist_accept(_Endpoint) -> erlang:nif_error(nif_not_loaded).

-spec dist_connect(dist_endpoint(), dist_address(), non_neg_integer(), reference()) -> ok.
dist_connect(_Endpoint, _Address, _Timeout, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_own(dist_link(), [pid()]) -> boolean().
dist_own(_Link, _Owners) -> erlang:nif_error(nif_not_loaded).

-spec dist_peer(dist_link()) -> dist_address().
dist_peer(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_trust(dist_link(), 1000..600000) -> ok.
dist_trust(_Link, _Liveness) -> erlang:nif_error(nif_not_loaded).

-spec dist_exporter(dist_link()) -> {ok, <<_:256>>} | {error, closed}.
dist_exporter(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_control_send(dist_link(), iodata(), reference()) -> ok | {error, closed}.
dist_control_send(_Link, _Data, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_control_recv(dist_link(), reference()) -> ok | {error, closed}.
dist_control_recv(_Link, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_start(dist_link(), pid()) -> ok | {error, closed}.
dist_start(_Link, _Input) -> erlang:nif_error(nif_not_loaded).

-spec dist_send(dist_link(), [{non_neg_integer(), [binary()]}]) -> Result | {hold, Result, [Sender]}
              when Result :: ok | busy | closed, Sender :: {non_neg_integer(), non_neg_integer(), pos_integer()}.
dist_send(_Link, _Packets) -> erlang:nif_error(nif_not_loaded).

-spec dist_tick(dist_link()) -> ok | {error, closed}.
dist_tick(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_credit(dist_link(), non_neg_integer()) -> ok.
dist_credit(_Link, _Cost) -> erlang:nif_error(nif_not_loaded).

-spec dist_stat(dist_link()) -> {non_neg_integer(), non_neg_integer(), non_neg_integer()}.
dist_stat(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_stop(dist_link()) -> ok.
dist_stop(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_info(dist_link()) -> map().
dist_info(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_exchange(dialler | acceptor, binary()) -> {dist_exchange(), Share :: <<_:264>>}.
dist_exchange(_Role, _Cookie) -> erlang:nif_error(nif_not_loaded).

-spec dist_exchange_key(dist_exchange(), binary()) -> {ok, <<_:256>>} | {error, bad_share}.
dist_exchange_key(_Exchange, _Share) -> erlang:nif_error(nif_not_loaded).

-spec dist_mac(binary(), iodata()) -> <<_:256>>.
dist_mac(_Key, _Data) -> erlang:nif_error(nif_not_loaded).

-spec dist_is_mac(binary(), iodata(), binary()) -> boolean().
dist_is_mac(_Key, _Data, _Mac) -> erlang:nif_error(nif_not_loaded).

-spec dist_random() -> <<_:256>>.
dist_random() -> erlang:nif_error(nif_not_loaded).

-type stream_active() :: boolean() | once | integer().
%% `{Name, {StreamId, Owner, Priority}, RecvFin, SendFin}'.
-type stream_facts() :: {{atom(), node(), non_neg_integer()},
                         {non_neg_integer(), pid(), 16..255}, boolean(), boolean()}.
-spec dist_streams(reference(), node()) ->
          ok.
dist_streams(_Link, _Node) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_open(node(), reference(), atom(), 16..255, stream_active()) ->
          ok | {error, not_connected | unsupported}.
dist_stream_open(_Node, _Ref, _Tag, _Priority, _Active) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_accept(node(), atom(), stream_active()) ->
          ok | {error, not_connected | unsupported}.
dist_stream_accept(_Node, _Tag, _Active) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_stop_accepting(node()) ->
          ok.
dist_stream_stop_accepting(_Node) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_send(node(), non_neg_integer(), reference() | none, [binary()], boolean()) ->
          ok | full | wait | {error, term()}.
dist_stream_send(_Node, _Stream, _Ref, _Data, _Fin) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_reset(node(), non_neg_integer(), non_neg_integer()) ->
          ok | {error, atom()}.
dist_stream_reset(_Node, _Stream, _Code) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_set_active(node(), non_neg_integer(), stream_active()) ->
          ok | {error, atom()}.
dist_stream_set_active(_Node, _Stream, _Active) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_begin_transfer(node(), non_neg_integer(), pid()) ->
          {ok, atom(), reference()} | {error, atom()}.
dist_stream_begin_transfer(_Node, _Stream, _Pid) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_commit_transfer(reference()) ->
          ok.
dist_stream_commit_transfer(_Handle) -> erlang:nif_error(nif_not_loaded).

-spec dist_stream_list(node(), non_neg_integer()) ->
          [stream_facts()].
dist_stream_list(_Node, _From) -> erlang:nif_error(nif_not_loaded).

%% Peering: frames, canonical CBOR, identities.
-spec conn_set_receive_window(reference(), pos_integer()) -> ok.
conn_set_receive_window(_Conn, _Bytes) -> erlang:nif_error(nif_not_loaded).
-spec frame_table(list(), list()) -> reference().
frame_table(_Envelope, _Types) -> erlang:nif_error(nif_not_loaded).
%% `Allow' is `{TextUndefined, NewerTerms, MaxTerms}'.
-spec frame_encode(reference(), map(), {boolean(), boolean(), pos_integer()}) ->
    {ok, binary()} | {error, term()} | large.
frame_encode(_Table, _Frame, _Allow) -> erlang:nif_error(nif_not_loaded).
-spec frame_encode_dirty(reference(), map(), {boolean(), boolean(), pos_integer()}) ->
    {ok, binary()} | {error, term()}.
frame_encode_dirty(_Table, _Frame, _Allow) -> erlang:nif_error(nif_not_loaded).
-spec frame_sign(reference(), reference(), map()) -> {ok, binary()} | {error, term()} | large.
frame_sign(_Table, _Identity, _Frame) -> erlang:nif_error(nif_not_loaded).
-spec frame_sign_dirty(reference(), reference(), map()) -> {ok, binary()} | {error, term()}.
frame_sign_dirty(_Table, _Identity, _Frame) -> erlang:nif_error(nif_not_loaded).
-spec frame_sign_encode(reference(), reference(), map(), {boolean(), boolean(), pos_integer()}) ->
    {ok, binary()} | {error, term()} | large.
frame_sign_encode(_Table, _Identity, _Frame, _Allow) -> erlang:nif_error(nif_not_loaded).
-spec frame_sign_encode_dirty(reference(), reference(), map(),
                              {boolean(), boolean(), pos_integer()}) ->
    {ok, binary()} | {error, term()}.
frame_sign_encode_dirty(_Table, _Identity, _Frame, _Allow) -> erlang:nif_error(nif_not_loaded).
-spec frame_sign_encode_batch(reference(), reference(), [map()],
                              {boolean(), boolean(), pos_integer()}) ->
    {[{ok, binary()} | {error, term()}], [map()]}.
frame_sign_encode_batch(_Table, _Identity, _Frames, _Allow) ->
    erlang:nif_error(nif_not_loaded).
-spec frame_verify(reference(), map(), binary()) -> ok | {error, term()} | large.
frame_verify(_Table, _Frame, _Public) -> erlang:nif_error(nif_not_loaded).
-spec frame_verify_dirty(reference(), map(), binary()) -> ok | {error, term()}.
frame_verify_dirty(_Table, _Frame, _Public) -> erlang:nif_error(nif_not_loaded).
-spec frame_parse(reference(), binary(), non_neg_integer(), none | first | binary(), tuple()) ->
    {[{map(), term()}], non_neg_integer(), again | large | {more, pos_integer()} | {error, term()}}.
frame_parse(_Table, _Bytes, _From, _Check, _Options) -> erlang:nif_error(nif_not_loaded).
-spec frame_parse_dirty(reference(), binary(), non_neg_integer(), none | first | binary(),
                        tuple()) ->
    {[{map(), term()}], non_neg_integer(), again | {more, pos_integer()} | {error, term()}}.
frame_parse_dirty(_Table, _Bytes, _From, _Check, _Options) -> erlang:nif_error(nif_not_loaded).
-spec cbor_encode(reference(), term()) -> {ok, binary()} | {error, term()} | large.
cbor_encode(_Table, _Term) -> erlang:nif_error(nif_not_loaded).
-spec cbor_encode_dirty(reference(), term()) -> {ok, binary()} | {error, term()}.
cbor_encode_dirty(_Table, _Term) -> erlang:nif_error(nif_not_loaded).
-spec cbor_decode(reference(), binary(), tagged | existing) ->
    {ok, term()} | {error, term()} | large.
cbor_decode(_Table, _Bytes, _Text) -> erlang:nif_error(nif_not_loaded).
-spec cbor_decode_dirty(reference(), binary(), tagged | existing) -> {ok, term()} | {error, term()}.
cbor_decode_dirty(_Table, _Bytes, _Text) -> erlang:nif_error(nif_not_loaded).
-spec identity_search(non_neg_integer(), reference()) -> {ok, reference()} | {error, term()}.
identity_search(_Bits, _Tag) -> erlang:nif_error(nif_not_loaded).
-spec identity_cancel(reference()) -> ok.
identity_cancel(_Search) -> erlang:nif_error(nif_not_loaded).
-spec identity_from_seed(binary()) -> {ok, reference()} | {error, term()}.
identity_from_seed(_Seed) -> erlang:nif_error(nif_not_loaded).
-spec identity_from_pem(binary()) -> {ok, reference()} | {error, term()}.
identity_from_pem(_Pem) -> erlang:nif_error(nif_not_loaded).
-spec identity_load(binary()) -> {ok, reference()} | {error, term()}.
identity_load(_Path) -> erlang:nif_error(nif_not_loaded).
-spec identity_save(reference(), binary(), key | pem) -> ok | {error, term()}.
identity_save(_Identity, _Path, _Format) -> erlang:nif_error(nif_not_loaded).
-spec identity_public(reference()) -> binary().
identity_public(_Identity) -> erlang:nif_error(nif_not_loaded).
-spec identity_seed(reference()) -> binary().
identity_seed(_Identity) -> erlang:nif_error(nif_not_loaded).
-spec identity_pem(reference()) -> binary().
identity_pem(_Identity) -> erlang:nif_error(nif_not_loaded).
-spec identity_sign(reference(), binary()) -> binary().
identity_sign(_Identity, _Message) -> erlang:nif_error(nif_not_loaded).
-spec identity_sign_dirty(reference(), binary()) -> binary().
identity_sign_dirty(_Identity, _Message) -> erlang:nif_error(nif_not_loaded).
-spec identity_verify(binary(), binary(), binary()) -> boolean().
identity_verify(_Public, _Message, _Signature) -> erlang:nif_error(nif_not_loaded).
-spec identity_verify_dirty(binary(), binary(), binary()) -> boolean().
identity_verify_dirty(_Public, _Message, _Signature) -> erlang:nif_error(nif_not_loaded).
-spec identity_puzzle_bits(binary()) -> 0..256.
identity_puzzle_bits(_Public) -> erlang:nif_error(nif_not_loaded).
-type operation() :: reference().
-type reply() :: operation() | {ok, operation()} | {error, term()}.

%% Operations: see reply.rs. Each takes a reference and is answered by `{Ref, Result}'.

-spec op_cancel(operation()) -> boolean().
op_cancel(_Operation) -> ?STUB.

-spec live_objects() ->
          [{listener | connection | stream | link | dist_endpoint | place, non_neg_integer()}].
live_objects() -> ?STUB.

%% Files of qlog that could not be written, and records that were lost.
-spec qlog_failures() -> {non_neg_integer(), non_neg_integer()}.
qlog_failures() -> ?STUB.

%% For tests: the next pass through a named point of the library panics (native/macula/src/vm/fault.rs).
-spec inject_panic(atom()) -> boolean().
inject_panic(_Point) -> ?STUB.

%% How many points are armed, with whatever.
-spec injected_panics() -> non_neg_integer().
injected_panics() -> ?STUB.

%% For tests: the next pass through a named point stands still for so many milliseconds.
-spec inject_stall(atom(), non_neg_integer()) -> boolean().
inject_stall(_Point, _Millis) -> ?STUB.

-spec tls_self_signed(binary(), binary(), [binary()]) ->
          {ok, {binary(), binary()}} | {error, term()}.
tls_self_signed(_Public, _Private, _Names) -> ?STUB.

-spec listener_start(reference(), map()) -> reply().
listener_start(_Ref, _Options) -> ?STUB.

-spec listener_arm(reference(), non_neg_integer()) -> ok | {error, closed}.
listener_arm(_Listener, _Count) -> ?STUB.

-spec listener_accept(reference(), reference(), boolean()) -> {ok, operation()} | {error, closed}.
listener_accept(_Listener, _Ref, _Now) -> ?STUB.

-spec listener_close(reference(), reference()) -> ok | {ok, operation()}.
listener_close(_Listener, _Ref) -> ?STUB.

-spec listener_set_locked(reference(), boolean()) -> ok | {error, closed}.
listener_set_locked(_Listener, _Lock) -> ?STUB.

-spec listener_reload(reference(), reference(), map()) -> {ok, operation()} | {error, closed}.
listener_reload(_Listener, _Ref, _Options) -> ?STUB.

-spec verdict_tell(reference(), 0..255) -> ok.
verdict_tell(_Question, _Alert) -> ?STUB.

-spec conn_migrate(reference(), reference(), binary(), inet:port_number()) -> operation().
conn_migrate(_Conn, _Ref, _Address, _Port) -> ?STUB.

-spec listener_begin_transfer(reference(), pid()) -> ok | {error, not_owner | noproc}.
listener_begin_transfer(_Listener, _Pid) -> ?STUB.

-spec listener_commit_transfer(reference()) -> ok.
listener_commit_transfer(_Listener) -> ?STUB.

-spec listener_sockname(reference()) -> {ok, {string(), inet:port_number()}}.
listener_sockname(_Listener) -> ?STUB.

-spec listener_info(reference()) -> map().
listener_info(_Listener) -> ?STUB.

-spec listener_is(term()) -> boolean().
listener_is(_Term) -> ?STUB.

-spec listener_set_resumption_keys(reference(), [binary()]) -> boolean().
listener_set_resumption_keys(_Listener, _Keys) -> ?STUB.

-spec conn_dial(reference(), map()) -> operation().
conn_dial(_Ref, _Options) -> ?STUB.

-spec conn_ask(reference(), reference(), atom()) -> operation().
conn_ask(_Conn, _Ref, _What) -> ?STUB.

-spec conn_open_stream(reference(), reference() | none, boolean(), term(), integer(), timeout()) ->
          operation() | later | {ok, reference()} | {error, closed | internal_error}.
conn_open_stream(_Conn, _Ref, _Bidirectional, _Active, _Priority, _Timeout) -> ?STUB.

-spec conn_accept_stream(reference(), reference(), term(), boolean()) ->
          operation() | {ok, reference()} | {error, closed}.
conn_accept_stream(_Conn, _Ref, _Active, _Now) -> ?STUB.

-spec conn_arm(reference(), term()) -> ok | {error, not_owner | closed}.
conn_arm(_Conn, _Active) -> ?STUB.

-spec conn_close(reference(), non_neg_integer(), binary()) -> ok.
conn_close(_Conn, _Code, _Reason) -> ?STUB.

-spec conn_begin_transfer(reference(), pid()) -> ok | {error, not_owner | noproc}.
conn_begin_transfer(_Conn, _Pid) -> ?STUB.

-spec conn_commit_transfer(reference()) -> ok.
conn_commit_transfer(_Conn) -> ?STUB.

-spec conn_is(term()) -> boolean().
conn_is(_Term) -> ?STUB.

-spec conn_send_datagram(reference(), reference() | none, binary(), now | wait | drop_oldest) ->
          ok | full | {wait, operation()} | {error, term()}.
conn_send_datagram(_Conn, _Ref, _Data, _Mode) -> ?STUB.

-spec conn_set_datagrams(reference(), term()) -> ok | {error, einval}.
conn_set_datagrams(_Conn, _Mode) -> ?STUB.

-spec conn_tell_changes(reference(), non_neg_integer()) -> ok.
conn_tell_changes(_Conn, _Every) -> ?STUB.

-spec stream_send(reference(), reference() | none, [binary()], boolean(), now | wait | busy) ->
          ok | full | {wait, operation()} | {error, term()}.
stream_send(_Stream, _Ref, _Data, _Fin, _Mode) -> ?STUB.

-spec stream_recv(reference(), reference(), non_neg_integer(), boolean()) ->
          {ok, operation()} | {error, term()}.
stream_recv(_Stream, _Ref, _Len, _Now) -> ?STUB.

-spec stream_set_active(reference(), term()) -> ok | {error, einval}.
stream_set_active(_Stream, _Mode) -> ?STUB.

-spec stream_set_priority(reference(), integer()) -> boolean().
stream_set_priority(_Stream, _Priority) -> ?STUB.

-spec stream_set_watermarks(reference(), pos_integer(), non_neg_integer()) -> boolean().
stream_set_watermarks(_Stream, _High, _Low) -> ?STUB.

-spec stream_announce(reference()) -> boolean().
stream_announce(_Stream) -> ?STUB.

-spec stream_tell_delivered(reference()) -> boolean().
stream_tell_delivered(_Stream) -> ?STUB.

-spec stream_close(reference()) -> ok.
stream_close(_Stream) -> ?STUB.

-spec stream_shutdown(reference(), boolean(), boolean(), boolean(), non_neg_integer()) -> ok.
stream_shutdown(_Stream, _Finish, _Reset, _Stop, _Code) -> ?STUB.

-spec stream_begin_transfer(reference(), pid()) -> ok | {error, not_owner | noproc}.
stream_begin_transfer(_Stream, _Pid) -> ?STUB.

-spec stream_commit_transfer(reference()) -> ok.
stream_commit_transfer(_Stream) -> ?STUB.

-spec stream_info(reference()) -> map().
stream_info(_Stream) -> ?STUB.

-spec stream_is(term()) -> boolean().
stream_is(_Term) -> ?STUB.
