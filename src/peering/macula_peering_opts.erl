%% @doc The options of peering: one table with the default and the check of each, for every role.
%% What leaves here is complete and checked.
%% @private
-module(macula_peering_opts).

-export([parse/2, keys/1]).

-export_type([opts/0, role/0]).

-type role() :: connect | accept | listen.
-type opts() :: #{atom() => term()}.

%% A handshake frame may measure 64 KiB; the rest of it takes less than one of them.
-define(PRESENCE_BYTES, 63 * 1024).
-define(B32(B), (is_binary(B) andalso byte_size(B) =:= 32)).

%% @doc The options of a role, with defaults.
-spec parse(role(), term()) -> {ok, opts()} | {error, {bad_option, term(), term()}}.
parse(Role, Opts) when is_map(Opts) ->
    Table = table(Role),
    case maps:keys(maps:without([Key || {Key, _, _} <- Table], Opts)) of
        [] ->
            case check(Table, Opts, #{}) of
                {ok, Checked} -> sendable(Checked);
                Error -> Error
            end;
        [Key | _] -> {error, {bad_option, shown(Key), unknown}}
    end;
parse(_, _) ->
    %% Not shown: a secret may be in it.
    {error, {bad_option, options, not_a_map}}.

%% What this node says of itself is sent to peers of any age.
sendable(#{newer_terms := Newer} = Opts) ->
    Wrong = fun(Key) ->
        case macula_frame:try_encode(#{Key => maps:get(Key, Opts)}, #{newer_terms => Newer}) of
            {error, {not_encodable, Why}} -> {true, {Key, Why}};
            _ -> false
        end
    end,
    case lists:filtermap(Wrong, [addresses, site, endorsements]) of
        [] -> fits(Opts);
        [{Key, Why} | _] -> {error, {bad_option, Key, Why}}
    end.

%% What this node says of itself must find room in a handshake frame; the greatest part is named.
fits(Opts) ->
    Size = fun(Term) ->
        case macula_frame:cbor_encode(Term) of
            {ok, Bytes} -> byte_size(Bytes);
            {error, frame_too_large} -> ?PRESENCE_BYTES + 1
        end
    end,
    Parts = [{Size(maps:get(Key, Opts)), Key} || Key <- [realms, addresses, site, endorsements]],
    case lists:sum([N || {N, _} <- Parts]) of
        Sum when Sum =< ?PRESENCE_BYTES -> {ok, Opts};
        _ -> {error, {bad_option, element(2, lists:max(Parts)), too_large}}
    end.

%% What stands in a wrong place may be a secret.
shown(Term) ->
    macula_identity:shown(Term).

%% @doc The keys of a role, of a target, or of `reconnect'.
-spec keys(role() | target | reconnect) -> [atom()].
keys(Name) ->
    [Key || {Key, _, _} <- table(Name)].

check([], _, Checked) ->
    {ok, Checked};
check([{Key, Default, Check} | Rest], Opts, Checked) ->
    case Opts of
        #{Key := Value} ->
            try Check(Value) of
                true -> check(Rest, Opts, Checked#{Key => Value});
                {ok, Used} -> check(Rest, Opts, Checked#{Key => Used});
                {error, {bad_option, _, _} = Reason} -> {error, Reason};
                {error, Why} -> {error, {bad_option, Key, Why}};
                false -> {error, {bad_option, Key, shown(Value)}}
            catch
                error:_ -> {error, {bad_option, Key, shown(Value)}}
            end;
        #{} when Default =:= required ->
            {error, {bad_option, Key, missing}};
        #{} ->
            check(Rest, Opts, Checked#{Key => Default})
    end.

table(connect) ->
    [{role, client, fun(R) -> R =:= client end},
     {target, required, fun target/1},
     {reconnect, false, fun reconnect/1},
     {idle_timeout_ms, 30_000, fun positive/1},
     {keep_alive_interval_ms, 10_000, fun natural/1}
     | common()];
table(accept) ->
    [{role, server, fun(R) -> R =:= server end} | server() ++ common()];
table(listen) ->
    [{port, required, fun(P) -> is_integer(P) andalso P >= 0 andalso P =< 65535 end},
     {address, any, fun bind_address/1},
     {sans, [], fun is_list/1},
     {alpn, [<<"macula">>], fun alpn/1},
     {max_handshaking, 256, quic(listen, max_handshakes)},
     {min_handshake_ms, 200, fun natural/1},
     {max_links, infinity, fun limit/1},
     {duplicates, newest, fun(D) -> lists:member(D, [newest, allow]) end},
     {idle_timeout_ms, 30_000, fun positive/1},
     {keep_alive_interval_ms, 10_000, fun natural/1}
     | server() ++ common()];
table(target) ->
    [{host, required, fun host/1},
     {port, required, fun(P) -> is_integer(P) andalso P > 0 andalso P =< 65535 end},
     {node_id, undefined, fun(Id) -> ?B32(Id) end},
     {expected_node_id, undefined, fun(Id) -> ?B32(Id) orelse Id =:= undefined end},
     {pin_tls_cert, undefined, fun is_boolean/1},
     {verify, undefined, fun(V) -> lists:member(V, [webpki, none]) end},
     {tls, auto, fun(T) -> lists:member(T, [auto, pin, webpki, none]) end},
     {alpn, [<<"macula">>], fun alpn/1},
     {timeout_ms, 30_000, fun limit/1},
     {server_name, undefined, quic(connect, server_name_indication)},
     {cacertfile, undefined, fun cacertfile/1},
     {local_address, undefined, fun local_address/1}];
table(reconnect) ->
    [{min_delay_ms, 200, fun positive/1},
     {max_delay_ms, 30_000, fun positive/1},
     {factor, 2, fun(F) -> is_number(F) andalso F >= 1 end},
     {jitter, 0.5, fun(J) -> is_number(J) andalso J >= 0 andalso J =< 1 end},
     {max_attempts, infinity, fun limit/1}].

server() ->
    [{allow, all, fun rule/1},
     {deny, none, fun rule/1},
     {puzzle_bits, 0, fun(B) -> is_integer(B) andalso B >= 0 andalso B =< 256 end},
     {freshness_ms, infinity, fun limit/1},
     {replay_cache, true, fun is_boolean/1},
     {hello_gap_ms, 25, fun natural/1}].

common() ->
    [{identity, required, fun identity/1},
     {station_id, undefined, field(station_id)},
     {realms, [], field(realms)},
     {capabilities, 0, field(capabilities)},
     {addresses, [], field(addresses)},
     {site, undefined, field(site)},
     {endorsements, [], field(endorsements)},
     {accept_owner, undefined, fun(P) -> is_pid(P) orelse P =:= undefined end},
     {controlling_pid, self(), fun(P) -> is_pid(P) andalso node(P) =:= node() end},
     {handshake_timeout_ms, 30_000, fun positive/1},
     {drain_timeout_ms, 5_000, fun positive/1},
     {send_timeout_ms, 5_000, fun limit/1},
     {verify_frames, none, fun verify_frames/1},
     {unknown_types, deliver, fun(A) -> lists:member(A, [deliver, drop, close]) end},
     {text, tagged, fun(T) -> lists:member(T, [tagged, existing]) end},
     {text_undefined, refuse, fun(T) -> lists:member(T, [refuse, allow]) end},
     {newer_terms, refuse, fun(T) -> lists:member(T, [refuse, allow]) end},
     {bad_frames, drop, fun(A) -> lists:member(A, [drop, deliver, close]) end},
     {max_frame, 16#FFFFFF, fun(N) -> is_integer(N) andalso N > 0 andalso N =< 16#FFFFFF end},
     {max_terms, 64 * 1024 * 1024, fun positive/1},
     {active, true, fun active/1},
     {dedicated_streams, owner, fun(D) -> lists:member(D, [owner, refuse]) end}].

%% What is to stand in CONNECT, and all but endorsements in HELLO: the table of frames knows it.
field(Name) ->
    fun(Value) -> macula_frame:check_field(connect, Name, Value) =:= ok end.

positive(N) -> is_integer(N) andalso N > 0 andalso N =< 16#FFFFFFFF.
natural(N) -> is_integer(N) andalso N >= 0 andalso N =< 16#FFFFFFFF.
limit(infinity) -> true;
limit(N) -> positive(N).

active(true) -> true;
active(once) -> true;
active(N) -> is_integer(N) andalso N >= 0 andalso N =< 16#FFFFFFFF.

identity(Identity) ->
    macula_identity:ensure(Identity).

bind_address(any) -> true;
bind_address(Address) -> not is_atom(Address) andalso macula_quic_address:literal(Address) =/= error.

%% Whether a name is anybody's is seen by the dial, and so is an interface that an address has behind `%'.
host(Host) when is_tuple(Host) -> macula_quic_address:literal(Host) =/= error;
host(Host) -> not is_atom(Host) andalso macula_quic_address:host(Host) =/= error.

alpn(Protocols) -> is_list(Protocols) andalso (quic(connect, alpn))(Protocols).

cacertfile(File) -> File =/= undefined andalso (quic(connect, cacertfile))(File).

local_address(Address) -> Address =:= undefined orelse (quic(connect, local_address))(Address).

%% What a dial or a listener passes on to QUIC is judged here by the table that judges it there, whatever the
%% other options are: the caller of a dial has gone on when QUIC sees it, and a dialer would dial for ever.
%% A file that cannot be read now is no wrong option, and what is missing beside this one key is not looked at.
quic(Role, Key) ->
    fun(Value) ->
        case macula_quic_options:Role([{Key, Value}]) of
            {error, {bad_option, Key, _}} -> false;
            _ -> true
        end
    end.

%% Who may link: `all', `none', a list of node ids, or a function of what CONNECT says.
rule(all) -> true;
rule(none) -> true;
rule(Fun) when is_function(Fun, 1) -> true;
rule(NodeIds) -> lists:all(fun(Id) -> ?B32(Id) end, NodeIds).

verify_frames(Mode) when is_atom(Mode) -> verify_mode(Mode);
verify_frames(Modes) when is_map(Modes) ->
    Categories = [other | lists:usort([macula_frame:category(T) || T <- macula_frame:types()])],
    case maps:keys(maps:without([default | Categories], Modes)) of
        [] -> lists:all(fun verify_mode/1, maps:values(Modes));
        Unknown -> {error, {unknown_categories, [shown(Key) || Key <- Unknown]}}
    end.

verify_mode(Mode) -> lists:member(Mode, [none, report, require]).

target(Target) when is_map(Target) ->
    sub(target, Target, fun older_names/1).

%% What older implementations call the same: whom to expect, and how far TLS is to prove it.
older_names(#{node_id := undefined, expected_node_id := Expected} = Target) ->
    older_trust(Target#{node_id := Expected});
older_names(#{node_id := NodeId, expected_node_id := Expected})
  when Expected =/= undefined, Expected =/= NodeId ->
    {error, {bad_option, expected_node_id, not_the_node_id}};
older_names(Target) ->
    older_trust(Target).

older_trust(#{tls := auto, node_id := NodeId, pin_tls_cert := Pin, verify := Verify} = Target)
  when Verify =/= undefined, NodeId =:= undefined; Verify =/= undefined, Pin =:= false ->
    trusted(Target#{tls := Verify});
older_trust(#{tls := auto, pin_tls_cert := false} = Target) ->
    trusted(Target#{tls := webpki});
%% Whoever says how has no need of the older names.
older_trust(#{tls := Tls, pin_tls_cert := Pin, verify := Verify})
  when Tls =/= auto, Pin =/= undefined; Tls =/= auto, Verify =/= undefined ->
    {error, {bad_option, tls, Tls}};
older_trust(Target) ->
    trusted(Target).

trusted(Target) ->
    trust(maps:without([expected_node_id, pin_tls_cert, verify], Target)).

%% With a known node id its key is pinned, unless the caller says that its TLS is another's.
trust(#{tls := auto, node_id := undefined} = Target) -> {ok, Target#{tls := webpki}};
trust(#{tls := auto} = Target) -> {ok, Target#{tls := pin}};
trust(#{tls := pin, node_id := undefined}) -> {error, {bad_option, node_id, missing}};
trust(Target) -> {ok, Target}.

reconnect(false) -> true;
reconnect(true) -> reconnect(#{});
reconnect(Opts) when is_map(Opts) ->
    sub(reconnect, Opts, fun(O) -> {ok, O} end).

sub(Name, Opts, Then) ->
    Table = table(Name),
    case maps:keys(maps:without([Key || {Key, _, _} <- Table], Opts)) of
        [] ->
            case check(Table, Opts, #{}) of
                {ok, Checked} -> Then(Checked);
                Error -> Error
            end;
        [Key | _] ->
            {error, {bad_option, {Name, shown(Key)}, unknown}}
    end.
