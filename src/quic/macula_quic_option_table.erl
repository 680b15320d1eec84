%% @doc Every option of `macula_quic', with what it does: the one table.
%%
%% The calls check by it (`macula_quic_options'), `macula_quic:format_error/1' explains by it, and
%% `docs/reference/options.md' is made of it.
%% @private
-module(macula_quic_option_table).

-export([roles/0, rows/1, section/1, explain/1]).

-export_type([role/0, row/0]).

-type role() :: listen | reload | connect | open_stream | accept_stream | arm_stream | arm | send | async_send |
                send_datagram | handoff.
-type row() :: {option, atom(), macula_quic_option_value:type(), Default :: term(), Text :: string()}
             | {same, atom(), Option :: atom(), macula_quic_option_value:type(), Text :: string()}
             | {unsupported, atom(), macula_quic_option_value:type(),
                NoOp :: macula_quic_option_value:type(), Why :: string(), Instead :: string()}.
%% An option; another name of one, with values of its own; or one that this library does not honour,
%% with the values that ask for nothing it does not do.

%% A connection has a place for each stream the peer may open from its beginning, about 80 bytes.
-define(MAX_STREAMS, 100000).
%% Quinn writes the length of a handshake packet in two bytes, which end at 16383.
-define(MAX_FIRST_MTU, 16000).
-define(MAX_VARINT, 16#3FFFFFFFFFFFFFFF).
-define(UINT8, {integer, 0, 16#ff}).
-define(UINT16, {integer, 0, 16#ffff}).
-define(UINT32, {integer, 0, 16#ffffffff}).
-define(UINT62, {integer, 0, ?MAX_VARINT}).
-define(UINT64, {integer, 0, 16#ffffffffffffffff}).
-define(NOTHING, {one_of, []}).
-define(MIB, 1048576).

%% @doc The calls that take options.
-spec roles() -> [role()].
roles() ->
    [listen, reload, connect, open_stream, accept_stream, arm_stream, arm, send, async_send, send_datagram,
     handoff].

%% @doc All rows that a call knows.
-spec rows(role()) -> [row()].
rows(listen) -> section(listen) ++ section(connection);
rows(reload) -> section(reload) ++ kept();
rows(connect) -> section(connect) ++ section(connection);
rows(open_stream) -> section(open_stream) ++ section(stream);
rows(accept_stream) -> section(accept_stream) ++ section(accepted) ++ section(stream);
rows(arm_stream) -> section(arm_stream) ++ section(accepted) ++ section(stream);
rows(Role) -> section(Role).

%% Options of a listener that cannot be changed while it serves.
kept() ->
    Changed = [element(2, Row) || Row <- section(reload)],
    [case Row of
         {option, Key, Type, _, _} -> kept(Key, Type);
         {same, Key, _, Type, _} -> kept(Key, Type);
         _ -> Row
     end || Row <- rows(listen), not lists:member(element(2, Row), Changed)].

kept(Key, Type) ->
    {unsupported, Key, Type, ?NOTHING, "a listener keeps it as long as there is one",
     "a new listener at the same address, after `close_listener/1`: connections live on"}.

%% @doc Why an option is not supported, and what there is instead.
-spec explain(atom()) -> {ok, Why :: string(), Instead :: string()} | error.
explain(Key) ->
    Rows = [{Why, Instead} || Role <- roles(), {unsupported, K, _, _, Why, Instead} <- rows(Role),
                              K =:= Key],
    case Rows of
        [{Why, Instead} | _] -> {ok, Why, Instead};
        [] -> error
    end.

%% @doc The rows of a part of the documentation.
-spec section(atom()) -> [row()].
section(listen) ->
    [{option, verify, verify, verify_none,
      "`verify_peer` asks clients for a certificate and verifies it with `cacertfile` or `cacerts`"},
     {option, fail_if_no_peer_cert, boolean, false,
      "with `verify_peer`: a client must show a certificate"},
     {option, sni_hosts, sni_hosts, [],
      "certificates by the name that a client asks for (SNI); of others, and of clients that ask for none, "
      "the listener's own. `*.example.org` stands for every name with one label in the place of `*`; a name "
      "itself goes before. A list of `{Host, Options}` will do, as in `ssl`"},
     {unsupported, sni_fun, any, {one_of, [undefined]},
      "the handshake would wait for the function's process", "`sni_hosts`, which `reload/2` changes"},
     {option, handshake_timeout_ms, period, 10000, "time for each handshake"},
     {same, handshake_idle_timeout_ms, handshake_timeout_ms, period, ""},
     {option, max_handshakes, {integer, 1, 1000000}, 1024, "handshakes in progress"},
     {option, backlog, {integer, 1, 1000000}, 1024,
      "established connections that wait to be accepted"},
     {option, max_connections, count, infinity,
      "connections at a time, from their first packet until QUIC has forgotten them; further ones are refused"},
     {option, max_connections_per_address, count, infinity,
      "the same of one address, which is the /64 network of an IPv6 address. From half of it on a client must prove "
      "its address first, unless `retry` is `never`"},
     {option, connection_rate_per_address, {counted, 1000000}, infinity,
      "connections that begin in a second from one address, likewise"},
     {option, connection_burst_per_address, {integer, 1, 1000000}, undefined,
      "connections that an address may begin at once, when it has been quiet; by default those of a second"},
     {option, retry, {one_of, [auto, always, never]}, auto,
      "whether a client must prove its address first (RFC 9000, section 8.1); `auto`: when half of "
      "`max_handshakes` are taken"},
     {same, retry_memory_limit, retry,
      {translated, [{0, always}, {65, auto}, {65535, never}], ?UINT16},
      "a share of the memory in other libraries: 0 is `always`, 65, their default, `auto`, 65535 "
      "`never`; shares between are not supported"},
     {option, migration_enabled, switch, true, "clients may change their address; packets from another one are dropped otherwise, also after a NAT has "
      "forgotten the client"},
     {option, stateless_reset_key, reset_key, <<>>,
      "a listener started anew with the same key tells the peers of its old self at once that it has "
      "forgotten them"},
     {option, resumption, {one_of, [false, true, early_data]}, false,
      "clients get tickets, with which they resume their sessions (RFC 8446, section 2.2); not with "
      "`verify_peer`, as a client that resumes shows no certificate. `early_data`: and may send data with "
      "their first packet. **Somebody may have recorded it, and it may be sent again**: see "
      "[quic.md](../guides/quic.md#early-data). A ticket counts with the listener that made it, once"},
     {same, server_resumption_level, resumption,
      {translated, [{0, false}, {1, true}, {2, early_data}], ?UINT8}, "0 is `false`, 1 `true`, 2 `early_data`"},
     {option, early_data_limit, {integer, 1, ?MAX_VARINT}, 16384,
      "bytes of early data on all streams of a connection together, which may send no more until its "
      "handshake is done, early or not; datagrams are bounded by `datagram_receive_buffer`"},
     {option, early_data_sessions, {integer, 1, 10000000}, 10000,
      "sessions, each of some 300 bytes, that the listener keeps for `early_data`; the oldest go. A client "
      "takes two with each connection"},
     {option, resumption_keys, secrets, [],
      "the first one makes tickets, all of them open tickets: listeners that have them in common, at other "
      "hosts and after a restart, too, resume each other's sessions. `setopt/3` changes them. By default the "
      "listener has a random one, and takes another each `resumption_lifetime_s`"},
     {option, resumption_lifetime_s, {integer, 1, 604800}, 43200, "seconds for which a ticket can be used"},
     {unsupported, local_address, local_address, ?NOTHING,
      "a listener's address is an argument of the call", "`listen/3`"}];
section(reload) ->
    [{option, certfile, credentials, undefined, "the certificate with its chain"},
     {option, cert, credentials, undefined, "the same; `certfile` goes before"},
     {option, keyfile, credentials, undefined, "the private key of the certificate, with which it is given"},
     {option, key, credentials, undefined, "the same; `keyfile` goes before"},
     {option, password, password, undefined, "of an encrypted key"},
     {option, sni_hosts, sni_hosts, keep, "certificates by name: all of them, `#{}` for none"},
     {option, cacertfile, credentials, undefined, "trusted roots"},
     {option, cacerts, credentials, undefined, "the same; `cacertfile` goes before"},
     {option, verify, verify, keep, "whether clients are asked for a certificate"},
     {option, fail_if_no_peer_cert, boolean, keep, "whether they must show one"},
     {option, alpn, alpn, keep, "application protocols, all of them, the preferred one first"}];
section(connect) ->
    [{option, verify, verify, verify_peer,
      "`verify_none` accepts any certificate, which is logged; that the server holds its key is still "
      "checked"},
     {option, verify_pubkey, pubkey, undefined,
      "the server must hold this key; then names, dates and chain do not matter"},
     {option, server_name_indication, server_name, undefined,
      "the name to ask for and to verify, if it is not the host"},
     {same, server_name, server_name_indication, server_name, ""},
     {same, sni, server_name_indication, server_name, ""},
     {option, local_address, local_address, undefined, "where to connect from; port 0 is any"},
     {option, handshake_timeout_ms, period, infinity,
      "time for what follows name resolution, within the timeout of the call"},
     {same, handshake_idle_timeout_ms, handshake_timeout_ms, period, ""},
     {option, resumption, boolean, false,
      "tickets of the server are kept, and sessions resumed, without a certificate, with those of "
      "connections that had the same server name, `alpn`, and options of trust and certificates. A "
      "certificate that was verified counts for a day; 256 such configurations are kept, each with 4 tickets"},
     {option, early_data, boolean, false,
      "with `resumption`: where a ticket of the same server at the same address allows it, the call gives the "
      "connection at once, and what is sent on it goes with the first packet. **Such data can be replayed**: "
      "send nothing early that must not be done twice. `{quic, early_data, Conn, accepted | rejected}` tells "
      "what has become of it"},
     {unsupported, server_resumption_level, ?UINT8, {one_of, [0]}, "a client makes no tickets",
      "`resumption`"},
     {option, migration_enabled, switch, true, "whether `migrate/1,2` may move the connection"},
     {unsupported, retry_memory_limit, ?UINT16, ?NOTHING, "servers ask for a Retry, clients follow",
      "`retry` of the listener"}];
section(connection) ->
    [{option, alpn, alpn, [<<"macula">>], "application protocols, the preferred one first"},
     {option, certfile, credentials, undefined, "the certificate with its chain"},
     {option, cert, credentials, undefined, "the same; `certfile` goes before"},
     {option, keyfile, credentials, undefined, "the private key of the certificate"},
     {option, key, credentials, undefined,
      "the same; `keyfile` goes before. An error names this option, never its value"},
     {option, password, password, undefined, "of an encrypted key"},
     {option, cacertfile, credentials, undefined,
      "trusted roots; a client without them takes the platform's"},
     {option, cacerts, credentials, undefined, "the same; `cacertfile` goes before"},
     {option, verify_fun, verify_fun, undefined,
      "with `verify_peer`: decides about the peer's certificates, as the option of this name in `ssl`, once they "
      "are verified and before anybody has the connection; see "
      "[quic.md](../guides/quic.md#certificates-about-which-a-function-decides)"},
     {option, custom_verify, boolean, false, "`true` says that there is a `verify_fun`, and needs one"},
     {option, idle_timeout_ms, ?UINT64, 30000,
      "silence after which a connection is over, if the peer does not want less; 0: none"},
     {same, idle_timeout, idle_timeout_ms, ?UINT64, ""},
     {option, keep_alive_interval_ms, ?UINT32, 0, "silence after which a PING is sent; 0: none"},
     {same, keep_alive_interval, keep_alive_interval_ms, ?UINT32, ""},
     {option, disconnect_timeout_ms, {nonzero, {integer, 1, 16#ffffffff}}, undefined,
      "time for which the peer may leave what is sent to it without any answer; then the connection has "
      "timed out. By default, and in any case, `idle_timeout_ms` ends it, however much is sent"},
     {option, peer_bidi_stream_count, {integer, 0, ?MAX_STREAMS}, 100,
      "bidirectional streams the peer may have open; each costs about 50 bytes from the beginning, open "
      "or not"},
     {option, peer_unidi_stream_count, {integer, 0, ?MAX_STREAMS}, 100,
      "unidirectional streams the peer may have open; each costs about 30 bytes from the beginning, open "
      "or not"},
     {option, stream_recv_window, {integer, 1024, ?MAX_VARINT}, 2 * ?MIB,
      "bytes the peer may send ahead of their being read, on each stream"},
     {same, stream_recv_window_default, stream_recv_window, {integer, 1024, ?MAX_VARINT}, ""},
     {option, conn_flow_control_window, {integer, 1024, ?MAX_VARINT}, 64 * ?MIB,
      "the same, on all streams together"},
     {option, send_window, {integer, 1024, ?MAX_VARINT}, 10 * ?MIB,
      "bytes sent that the peer has not acknowledged, on all streams together"},
     {option, congestion_control, {one_of, [cubic, bbr, new_reno]}, cubic, "how the path is shared"},
     {same, congestion_control_algorithm, congestion_control,
      {translated, [{0, cubic}, {1, bbr}, {cubic, cubic}, {bbr, bbr}, {new_reno, new_reno}], ?UINT16},
      "0 is `cubic`, 1 is `bbr`; or by name"},
     {option, initial_window_packets, {integer, 2, 16#ffffffff}, undefined,
      "congestion window at first, in packets of `initial_mtu`; that of RFC 9002 by default, and "
      "Quinn's own of 240,000 bytes with `bbr`"},
     {option, send_idle_timeout_ms, {nonzero, {integer, 1, 16#ffffffff}}, undefined,
      "silence after which the congestion window begins anew; by default it never does"},
     {option, initial_rtt_ms, {integer, 1, 60000}, 333, "round trip that is assumed at first"},
     {option, minimum_mtu, {integer, 1200, ?MAX_FIRST_MTU}, 1200,
      "bytes of UDP payload that every path takes, without IP and UDP headers"},
     {option, initial_mtu, {integer, 1200, ?MAX_FIRST_MTU}, 1200,
      "bytes of UDP payload at first, at least `minimum_mtu`"},
     {option, maximum_mtu, {at_most, 65527, {integer, 1200, 16#ffff}}, 1452,
      "bytes of UDP payload up to which the path is probed (RFC 8899); more than 65527 is as much as UDP carries"},
     {option, mtu_discovery_search_complete_timeout_us, {integer, 1000, 16#ffffffffffffffff}, 600000000,
      "time after which the path is probed again"},
     {option, datagram_receive_enabled, switch, true, "datagrams (RFC 9221) are received; where they are not, none are sent"},
     {option, datagram_receive_buffer, {integer, 1200, 1 bsl 30}, ?MIB,
      "bytes of datagrams that wait to be read; the oldest go"},
     {option, datagram_send_buffer, {integer, 1200, 1 bsl 30}, ?MIB,
      "bytes of datagrams that QUIC holds to be sent"},
     {option, high_watermark, {integer, 1, 1 bsl 40}, ?MIB,
      "bytes queued on a stream from which on its senders wait"},
     {option, low_watermark, {integer, 0, 1 bsl 40}, undefined,
      "bytes down to which they wait; half of `high_watermark` by default"},
     {option, keylog, boolean, false, "TLS secrets go to the file named by `SSLKEYLOGFILE`"},
     {option, sslkeylogfile, file_name, undefined,
      "TLS secrets are appended to this file, which only its owner may read if it is new"},
     {option, qlog_dir, file_name, undefined,
      "each connection writes its log, in qlog's format, to a file of its own in this directory"},
     {unsupported, conn_callback, any, ?NOTHING,
      "a connection of this module tells its owner, a process", "`macula_quic_connection`, which takes it"},
     {unsupported, handle, any, ?NOTHING, "handles are made by the calls", "`connect/4`, `accept/2`"},
     {unsupported, nst, binary, {one_of, [<<>>]},
      "rustls lets no ticket out, and takes none in: they stay in the memory of this virtual machine, and "
      "`nst_received` carries an empty binary", "`resumption`"},
     {unsupported, quic_event_mask, ?UINT32, {one_of, [0]},
      "the owner gets all messages of its handles", "`docs/reference/messages.md`"},
     {unsupported, disable_1rtt_encryption, boolean, {one_of, [false]},
      "QUIC is always encrypted", "`congestion_control`, `maximum_mtu` for speed"},
     {unsupported, local_bidi_stream_count, ?UINT16, ?NOTHING,
      "the peer says how many streams we may open", "`peer_bidi_stream_count` of the peer"},
     {unsupported, local_peer_unidi_stream_count, ?UINT16, ?NOTHING,
      "the peer says how many streams we may open", "`peer_unidi_stream_count` of the peer"},
     {unsupported, max_bytes_per_key, ?UINT64, ?NOTHING,
      "Quinn changes keys by the number of packets, before a key is used up", "the default"},
     {unsupported, tls_client_max_send_buffer, ?UINT32, ?NOTHING,
      "rustls bounds what a handshake holds", "`max_handshakes`"},
     {unsupported, tls_server_max_send_buffer, ?UINT32, ?NOTHING,
      "rustls bounds what a handshake holds", "`max_handshakes`"},
     {unsupported, stream_recv_buffer_default, ?UINT32, ?NOTHING,
      "data is kept in the packets it came in: no buffer is set aside", "`stream_recv_window`"},
     {unsupported, max_stateless_operations, ?UINT32, ?NOTHING,
      "Quinn answers stateless packets at once and queues none", "`max_handshakes`, `retry`"},
     {unsupported, max_binding_stateless_operations, ?UINT16, ?NOTHING,
      "Quinn answers stateless packets at once and queues none", "`max_handshakes`, `retry`"},
     {unsupported, stateless_operation_expiration_ms, ?UINT16, ?NOTHING,
      "Quinn answers stateless packets at once and queues none", "`max_handshakes`, `retry`"},
     {unsupported, max_ack_delay_ms, ?UINT32, {one_of, [25]},
      "Quinn acknowledges after 25 ms at the latest", "the default"},
     {unsupported, load_balancing_mode, ?UINT16, {one_of, [0]},
      "connection ids carry no server id", "`stateless_reset_key`"},
     {unsupported, max_operations_per_drain, ?UINT8, ?NOTHING,
      "a connection takes turns with others by a measure of its own", "the default"},
     {unsupported, send_buffering_enabled, switch, {one_of, [true, 1]},
      "what is sent is queued in any case", "`high_watermark`; `tell_delivered/1`"},
     {unsupported, pacing_enabled, switch, {one_of, [true, 1]}, "Quinn always paces what is sent",
      "`congestion_control`, `initial_rtt_ms`"},
     {unsupported, mtu_discovery_missing_probe_count, ?UINT8, {one_of, [3]},
      "Quinn takes a size for too large after three lost probes", "`maximum_mtu`"},
     {unsupported, ciphers, any, ?NOTHING, "all suites of TLS 1.3 for QUIC are offered", "the default"},
     {unsupported, versions, any, ?NOTHING, "QUIC has TLS 1.3 alone", "the default"},
     {unsupported, reuseaddr, switch, {one_of, [false, 0]},
      "a UDP port has no connections that linger", "`listen/3` takes over the port of a closed "
      "listener"},
     {unsupported, reuseport, switch, {one_of, [false, 0]}, "one socket serves a port",
      "several ports"}];
section(open_stream) ->
    [{option, direction, {one_of, [bidirectional, unidirectional]}, bidirectional,
      "whether the peer may send on it"},
     {same, open_flag, direction, {translated, [{0, keep}, {1, unidirectional}], {integer, 0, 2}},
      "0: nothing; 1: `unidirectional`; 2, early data on this stream alone, is not supported: `early_data` of "
      "`connect/4` allows it on all"},
     {option, priority, {integer, -16#80000000, 16#7fffffff}, 0,
      "streams of a higher one are served first"},
     {option, timeout, timeout, 5000,
      "how long to wait while the peer allows no more streams; 0: not at all"},
     {option, start_flag, start_flag, 0,
      "a sum: 1: the peer learns of the stream at once, not with the first bytes; 2: as `timeout` 0; 4, "
      "close a stream that does not start: always done; 8, a message when the peer takes it, is not "
      "supported"}
     | section(opened)];
section(accept_stream) ->
    [{option, priority, {integer, -16#80000000, 16#7fffffff}, 0,
      "of what this side sends: streams of a higher one are served first"}
     | section(opened)];
section(opened) ->
    [{option, high_watermark, {integer, 1, 1 bsl 40}, undefined,
      "bytes queued from which on senders wait; by default that of the connection. Its low mark is half "
      "of it"},
     {same, ideal_send_buffer_size, high_watermark,
      {nonzero, {at_most, 1 bsl 40, {integer, 1, 16#ffffffffffffffff}}}, "0 is the default"}];
section(arm_stream) ->
    [{unsupported, priority, {integer, -16#80000000, 16#7fffffff}, {one_of, [0]},
      "streams come by message, each to be set by itself", "`setopt(Stream, priority, Priority)`"},
     {unsupported, ideal_send_buffer_size, ?UINT64, ?NOTHING,
      "streams come by message, each to be set by itself", "`setopt(Stream, high_watermark, Bytes)`"}];
section(accepted) ->
    [{unsupported, open_flag, {integer, 0, 2}, {one_of, [0]}, "the peer has opened the stream",
      "`open_stream/2`"},
     {unsupported, start_flag, {integer, 0, 15}, {one_of, [0]}, "the peer has begun the stream",
      "`open_stream/2`"}];
section(stream) ->
    [{option, active, active, false, "whether data comes as messages, and how many of them"},
     {unsupported, event_mask, ?UINT32, {one_of, [0]}, "the owner gets all messages of its handles",
      "`docs/reference/messages.md`"},
     {unsupported, disable_fpbuffer, boolean, {one_of, [true, false]},
      "there is no such buffer: data is always given in order", "the default"},
     {unsupported, stream_id, ?UINT62, ?NOTHING, "QUIC numbers streams in the order of their opening",
      "`info/1` tells it"},
     {unsupported, '0rtt_length', ?UINT64, {one_of, [0]}, "QUIC tells nobody which part of a stream came early",
      "`early_data` of `info/1`, `handshake/1`"}];
section(arm) ->
    [{option, count, count, infinity, "connections that the caller takes"}];
section(send) ->
    [{option, timeout, timeout, infinity, "how long to wait; then nothing of the data was sent"}
     | section(async_send)];
section(async_send) ->
    [{option, fin, boolean, false, "the stream ends behind the data"}];
section(send_datagram) ->
    [{option, overflow, {one_of, [wait, drop_oldest]}, wait,
      "when as many datagrams wait for QUIC as may: the caller waits for room, or the oldest of them go, each "
      "counted in `dropped_datagrams`"},
     {option, timeout, timeout, infinity, "how long to wait; then the datagram was not taken"}];
section(handoff) ->
    [{option, active, mode, undefined,
      "the mode under the new owner, whatever it was before; without it the mode stays"}].
