%% @doc The options of `macula_quic': one table that names, checks and defaults each of them.
%%
%% A call gives a list of `{Key, Value}' or a map; a later entry of a list overrides an earlier
%% one. What comes out is complete and checked: the native side fills in nothing. Whoever gives an
%% unknown key, or a value that a key cannot have, gets `{error, {bad_option, Key, Why}}'; a key
%% that other QUIC libraries know and QUIC in this one cannot honour gives
%% `{error, {unsupported_option, Key}}'.
%% @private
-module(macula_quic_options).

-export([listen/1, connect/1, stream/2, keys/1]).

-export_type([options/0, role/0]).

-type options() :: [{atom(), term()} | atom()] | map().
-type role() :: listen | connect | open_stream | accept_stream | arm_stream | arm | send | handoff.

%% A connection has a place for each stream the peer may open from its beginning, about 80 bytes.
-define(MAX_STREAMS, 100000).
%% Quinn writes the length of a handshake packet in two bytes, which end at 16383.
-define(MAX_FIRST_MTU, 16000).
-define(MAX_VARINT, 16#3FFFFFFFFFFFFFFF).
-define(MIB, 1048576).

%% @doc The options of a listener, as the native side takes them.
-spec listen(options()) -> {ok, map()} | {error, term()}.
listen(Options) ->
    chain(parse(listen, Options), [fun credentials/1, fun server_trust/1, fun marks/1,
                                   fun mtu/1, fun native_listen/1]).

%% @doc The options of a dial. The addresses are the caller's to add.
-spec connect(options()) -> {ok, map()} | {error, term()}.
connect(Options) ->
    chain(parse(connect, Options), [fun credentials/1, fun client_trust/1, fun marks/1,
                                    fun mtu/1, fun native_connect/1]).

%% @doc The options of the calls on streams.
-spec stream(role(), options()) -> {ok, map()} | {error, term()}.
stream(Role, Options) ->
    parse(Role, Options).

%% @doc Every key that a role takes, with its default.
-spec keys(role()) -> [{atom(), term()}].
keys(Role) ->
    [{Key, Default} || {Key, Default, _Check} <- table(Role)].

chain({ok, Value}, [Fun | Funs]) -> chain(Fun(Value), Funs);
chain(Result, _Funs) -> Result.

%%--------------------------------------------------------------------------------------------
%% The table: key, default, check. A check gives the value as it is used, or says what is wrong.

table(listen) ->
    [{verify, verify_none, fun verify/1},
     {fail_if_no_peer_cert, false, fun boolean/1},
     {handshake_timeout_ms, 10000, int(1, 3600000)},
     {max_handshakes, 1024, int(1, 1000000)},
     {backlog, 1024, int(1, 1000000)},
     {retry, auto, one_of([auto, always, never])},
     {migration_enabled, true, fun boolean/1},
     {stateless_reset_key, <<>>, fun reset_key/1}
     | common()];
table(connect) ->
    [{verify, verify_peer, fun verify/1},
     {verify_pubkey, undefined, fun pubkey/1},
     {server_name_indication, undefined, fun host_name/1},
     {local_address, undefined, fun local_address/1},
     {handshake_timeout_ms, infinity, fun timeout/1}
     | common()];
table(open_stream) ->
    [{active, false, fun active/1},
     {direction, bidirectional, one_of([bidirectional, unidirectional])},
     {priority, 0, int(-16#80000000, 16#7fffffff)},
     {timeout, 5000, fun timeout/1}];
table(accept_stream) ->
    [{active, false, fun active/1}];
table(arm_stream) ->
    [{active, false, fun active/1}];
table(arm) ->
    [{count, 0, fun count/1}];
table(send) ->
    [{timeout, infinity, fun timeout/1},
     {fin, false, fun boolean/1}];
table(handoff) ->
    [{active, undefined, fun active/1}].

common() ->
    [{alpn, [<<"macula">>], fun alpn/1},
     {certfile, undefined, fun any/1},
     {cert, undefined, fun any/1},
     {keyfile, undefined, fun any/1},
     {key, undefined, fun any/1},
     {password, undefined, fun password/1},
     {cacertfile, undefined, fun any/1},
     {cacerts, undefined, fun any/1},
     {idle_timeout_ms, 30000, int(0, ?MAX_VARINT)},
     {keep_alive_interval_ms, 0, int(0, 86400000)},
     {peer_bidi_stream_count, 100, int(0, ?MAX_STREAMS)},
     {peer_unidi_stream_count, 100, int(0, ?MAX_STREAMS)},
     {stream_recv_window, 2 * ?MIB, int(1024, ?MAX_VARINT)},
     {conn_flow_control_window, 64 * ?MIB, int(1024, ?MAX_VARINT)},
     {send_window, 10 * ?MIB, int(1024, ?MAX_VARINT)},
     {congestion_control, cubic, one_of([cubic, bbr, new_reno])},
     {initial_rtt_ms, 333, int(1, 60000)},
     {minimum_mtu, 1200, int(1200, ?MAX_FIRST_MTU)},
     {initial_mtu, 1200, int(1200, ?MAX_FIRST_MTU)},
     {maximum_mtu, 1452, int(1200, 65527)},
     {datagram_receive_enabled, true, fun boolean/1},
     {datagram_receive_buffer, ?MIB, int(1200, 1 bsl 30)},
     {datagram_send_buffer, ?MIB, int(1200, 1 bsl 30)},
     {high_watermark, ?MIB, int(1, 1 bsl 40)},
     {low_watermark, undefined, int(0, 1 bsl 40)},
     {keylog, false, fun boolean/1}].

%% Other names for the same thing.
canonical(server_name) -> server_name_indication;
canonical(sni) -> server_name_indication;
canonical(idle_timeout) -> idle_timeout_ms;
canonical(keep_alive_interval) -> keep_alive_interval_ms;
canonical(stream_recv_window_default) -> stream_recv_window;
canonical(handshake_idle_timeout_ms) -> handshake_timeout_ms;
canonical(Key) -> Key.

%% Known elsewhere, and not to be had from Quinn.
unsupported() ->
    [disable_1rtt_encryption, max_bytes_per_key, tls_client_max_send_buffer,
     tls_server_max_send_buffer, stream_recv_buffer_default, max_stateless_operations,
     initial_window_packets, send_idle_timeout_ms, max_ack_delay_ms, disconnect_timeout_ms,
     congestion_control_algorithm, retry_memory_limit, load_balancing_mode,
     max_operations_per_drain, send_buffering_enabled, pacing_enabled, server_resumption_level,
     mtu_discovery_search_complete_timeout_us, mtu_discovery_missing_probe_count,
     max_binding_stateless_operations, stateless_operation_expiration_ms, quic_event_mask,
     event_mask, nst, custom_verify, ciphers, versions, reuseaddr, reuseport].

%%--------------------------------------------------------------------------------------------

parse(Role, Options) when is_map(Options) ->
    parse(Role, maps:to_list(Options));
parse(Role, Options) when is_list(Options) ->
    Table = table(Role),
    Defaults = maps:from_list([{Key, Default} || {Key, Default, _} <- Table]),
    parse(Options, Table, Defaults);
parse(_Role, Options) ->
    {error, {bad_option, name(Options), "a list or a map of options is wanted"}}.

parse([], _Table, Parsed) ->
    {ok, Parsed};
parse([{Key, Value} | Options], Table, Parsed) when is_atom(Key) ->
    Name = canonical(Key),
    case lists:keyfind(Name, 1, Table) of
        {Name, _Default, Check} ->
            try Check(Value) of
                {ok, Checked} -> parse(Options, Table, Parsed#{Name := Checked});
                {error, Why} -> {error, {bad_option, Key, Why}}
            catch
                _:_ -> {error, {bad_option, Key, "not a value of this option"}}
            end;
        false ->
            case lists:member(Key, unsupported()) of
                true -> {error, {unsupported_option, Key}};
                false -> {error, {bad_option, Key, "unknown option"}}
            end
    end;
parse([Key | Options], Table, Parsed) when is_atom(Key) ->
    parse([{Key, true} | Options], Table, Parsed);
parse([Other | _], _Table, _Parsed) ->
    {error, {bad_option, name(Other), "not an option"}};
parse(_Improper, _Table, _Parsed) ->
    {error, {bad_option, options, "an improper list"}}.

%% What stands in a wrong place may be a secret: an error shows the name alone.
name(Term) when is_atom(Term) -> Term;
name(Term) when is_tuple(Term), tuple_size(Term) > 0, is_atom(element(1, Term)) -> element(1, Term);
name(_) -> options.

any(Value) -> {ok, Value}.

boolean(Value) when is_boolean(Value) -> {ok, Value};
boolean(_) -> {error, "true or false is wanted"}.

int(Min, Max) ->
    fun(Value) when is_integer(Value), Value >= Min, Value =< Max ->
            {ok, Value};
       (_) ->
            {error, text("an integer from ~b to ~b is wanted", [Min, Max])}
    end.

one_of(Values) ->
    fun(Value) ->
        case lists:member(Value, Values) of
            true -> {ok, Value};
            false -> {error, text("one of ~0p is wanted", [Values])}
        end
    end.

text(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).

timeout(infinity) -> {ok, infinity};
timeout(Value) when is_integer(Value), Value >= 0, Value =< 16#ffffffff -> {ok, Value};
timeout(_) -> {error, "milliseconds or infinity is wanted"}.

count(infinity) -> {ok, 0};
count(Value) when is_integer(Value), Value > 0, Value =< ?MAX_VARINT -> {ok, Value};
count(_) -> {error, "a positive integer or infinity is wanted"}.

active(Value) when is_boolean(Value); Value =:= once -> {ok, Value};
active(Value) when is_integer(Value), Value > 0, Value =< 32767 -> {ok, Value};
active(_) -> {error, "true, false, once or 1..32767 is wanted"}.

verify(verify_peer) -> {ok, verify_peer};
verify(peer) -> {ok, verify_peer};
verify(webpki) -> {ok, verify_peer};
verify(verify_none) -> {ok, verify_none};
verify(none) -> {ok, verify_none};
verify(_) -> {error, "verify_peer or verify_none is wanted"}.

pubkey(Key) when is_binary(Key), byte_size(Key) =:= 32 -> {ok, Key};
%% No key, no pin.
pubkey(<<>>) -> {ok, undefined};
pubkey(_) -> {error, "an Ed25519 public key of 32 bytes is wanted"}.

reset_key(Key) when is_binary(Key), byte_size(Key) >= 32 -> {ok, Key};
reset_key(_) -> {error, "a binary of 32 bytes or more is wanted"}.

password(Password) when is_binary(Password) -> {ok, binary_to_list(Password)};
password(Password) when is_list(Password) -> {ok, binary_to_list(iolist_to_binary(Password))};
password(Fun) when is_function(Fun, 0) -> password(Fun());
password(_) -> {error, "a string, a binary or a fun is wanted"}.

host_name(Name) ->
    case unicode:characters_to_binary(Name) of
        Bin when is_binary(Bin), byte_size(Bin) > 0, byte_size(Bin) =< 255 -> {ok, Bin};
        _ -> {error, "a host name is wanted"}
    end.

local_address({Address, Port}) when is_integer(Port), Port >= 0, Port =< 65535 ->
    case macula_quic_address:literal(Address) of
        {ok, Text} -> {ok, {Text, Port}};
        error -> {error, "an IP address, or {Address, Port}, is wanted"}
    end;
local_address(Address) ->
    local_address_of(macula_quic_address:literal(Address)).

local_address_of({ok, Text}) -> {ok, {Text, 0}};
local_address_of(error) -> {error, "an IP address, or {Address, Port}, is wanted"}.

alpn([_ | _] = Protocols) ->
    try [protocol(P) || P <- protocols(Protocols)] of
        Bins when length(Bins) =< 255 ->
            case lists:all(fun(P) -> byte_size(P) > 0 andalso byte_size(P) =< 255 end, Bins) of
                true -> {ok, Bins};
                false -> {error, "a protocol name has 1 to 255 bytes"}
            end;
        _ ->
            {error, "too many protocols"}
    catch
        error:_ -> {error, "a list of protocol names, strings, binaries or atoms, is wanted"}
    end;
alpn(Protocol) when is_binary(Protocol); is_atom(Protocol), Protocol =/= undefined -> alpn([Protocol]);
alpn(_) -> {error, "a list of protocol names, strings, binaries or atoms, is wanted"}.

protocol(Name) when is_atom(Name), Name =/= undefined -> atom_to_binary(Name);
protocol(Name) -> iolist_to_binary(Name).

%% One name given as a string, or several.
protocols([Char | _] = String) when is_integer(Char) -> [String];
protocols(List) -> List.

%%--------------------------------------------------------------------------------------------
%% What several options say together.

credentials(Options) ->
    macula_quic_pem:credentials(Options).

server_trust(#{verify := verify_none, fail_if_no_peer_cert := true}) ->
    {error, {bad_option, fail_if_no_peer_cert, "needs verify_peer"}};
server_trust(#{verify := verify_none} = Options) ->
    {ok, Options#{verify_client => none, roots => []}};
server_trust(Options) ->
    case macula_quic_pem:roots(Options) of
        {ok, []} -> {error, {bad_option, cacertfile, "verify_peer needs cacertfile or cacerts"}};
        {ok, Roots} -> {ok, Options#{verify_client => client_wanted(Options), roots => Roots}};
        Error -> Error
    end.

client_wanted(#{fail_if_no_peer_cert := true}) -> required;
client_wanted(_) -> optional.

client_trust(#{verify_pubkey := Key} = Options) when is_binary(Key) ->
    {ok, Options#{trust => pubkey, roots => []}};
client_trust(#{verify := verify_none} = Options) ->
    {ok, Options#{trust => none, roots => []}};
client_trust(Options) ->
    case macula_quic_pem:roots(Options) of
        {ok, []} -> {ok, Options#{trust => system, roots => []}};
        {ok, Roots} -> {ok, Options#{trust => roots, roots => Roots}};
        Error -> Error
    end.

marks(#{low_watermark := undefined, high_watermark := High} = Options) ->
    {ok, Options#{low_watermark := High div 2}};
marks(#{low_watermark := Low, high_watermark := High}) when Low >= High ->
    {error, {bad_option, low_watermark, "must be below high_watermark"}};
marks(Options) ->
    {ok, Options}.

mtu(#{minimum_mtu := Min, initial_mtu := Initial} = Options) when Initial < Min ->
    mtu(Options#{initial_mtu := Min});
mtu(#{initial_mtu := Initial, maximum_mtu := Max}) when Max < Initial ->
    {error, {bad_option, maximum_mtu, "must not be below the initial and the minimum MTU"}};
mtu(Options) ->
    {ok, Options}.

native_listen(Options) ->
    case Options of
        #{chain := []} ->
            {error, {bad_option, certfile, "a listener needs a certificate"}};
        #{stateless_reset_key := ResetKey, verify_client := VerifyClient} ->
            {ok, (native(Options))#{
                verify_client => VerifyClient,
                handshakes => maps:get(max_handshakes, Options),
                handshake_timeout => maps:get(handshake_timeout_ms, Options),
                backlog => maps:get(backlog, Options),
                retry => maps:get(retry, Options),
                migration => maps:get(migration_enabled, Options),
                reset_key => ResetKey}}
    end.

native_connect(#{trust := Trust} = Options) ->
    {LocalAddress, LocalPort} = case Options of
        #{local_address := undefined} -> {<<>>, 0};
        #{local_address := Local} -> Local
    end,
    PubKey = case Options of
        #{verify_pubkey := undefined} -> <<>>;
        #{verify_pubkey := Key} -> Key
    end,
    {ok, (native(Options))#{
        verify => Trust,
        pubkey => PubKey,
        server_name => maps:get(server_name_indication, Options),
        handshake_timeout => maps:get(handshake_timeout_ms, Options),
        local_address => LocalAddress,
        local_port => LocalPort}}.

native(#{chain := Chain, private_key := {Kind, Key}, roots := Roots} = Options) ->
    #{alpn => maps:get(alpn, Options),
      cert => Chain,
      key_kind => Kind,
      key => Key,
      cacerts => Roots,
      keylog => maps:get(keylog, Options),
      high_watermark => maps:get(high_watermark, Options),
      low_watermark => maps:get(low_watermark, Options),
      transport => transport(Options)}.

transport(Options) ->
    Datagrams = case Options of
        #{datagram_receive_enabled := true, datagram_receive_buffer := Size} -> Size;
        _ -> 0
    end,
    #{idle_timeout => maps:get(idle_timeout_ms, Options),
      keep_alive => maps:get(keep_alive_interval_ms, Options),
      bidi_streams => maps:get(peer_bidi_stream_count, Options),
      uni_streams => maps:get(peer_unidi_stream_count, Options),
      stream_receive_window => maps:get(stream_recv_window, Options),
      receive_window => maps:get(conn_flow_control_window, Options),
      send_window => maps:get(send_window, Options),
      congestion_control => maps:get(congestion_control, Options),
      initial_rtt => maps:get(initial_rtt_ms, Options),
      min_mtu => maps:get(minimum_mtu, Options),
      initial_mtu => maps:get(initial_mtu, Options),
      max_mtu => maps:get(maximum_mtu, Options),
      datagram_receive_buffer => Datagrams,
      datagram_send_buffer => maps:get(datagram_send_buffer, Options)}.
