%% @doc What CONNECT and HELLO say of this node, what they must say of a peer, and which peers may come in.
%% @private
-module(macula_peering_handshake).

-export([connect/2, hello/3]).
-export([newer/2, check_presence/1, addresses/1, judge/3, claim/3, decide/4]).

%% What the field of HELLO holds.
-define(MAX_CODE, 16#ffffffffffffffff).

%% @doc The CONNECT of this node.
-spec connect(macula_identity:identity(), macula_peering_opts:opts()) -> macula_frame:frame().
connect(Identity, #{endorsements := Endorsements} = Opts) ->
    macula_frame:connect((presence(Identity, Opts))#{
        puzzle_evidence => macula_identity:puzzle_evidence(Identity), endorsements => Endorsements}).

%% @doc The HELLO of this node, which accepts a peer or refuses it.
-spec hello(#{accepted := boolean(), refusal_code => non_neg_integer()}, macula_identity:identity(),
            macula_peering_opts:opts()) -> macula_frame:frame().
hello(Answer, Identity, #{capabilities := Capabilities} = Opts) ->
    macula_frame:hello(maps:merge((presence(Identity, Opts))#{negotiated_capabilities => Capabilities},
                                  Answer)).

%% What both say of us.
presence(Identity, Opts) ->
    NodeId = macula_identity:public(Identity),
    StationId = case Opts of
        #{station_id := undefined} -> NodeId;
        #{station_id := Id} -> Id
    end,
    (maps:with([realms, capabilities, addresses, site], Opts))#{
        node_id => NodeId, station_id => StationId}.

%% @doc Whether the frame begins the handshake of a later version, and of which. That begins with an opener, which a
%% challenge answers; a refusal there is a HELLO that names nobody.
-spec newer(macula_frame:frame(), client | server) -> {true, term()} | false.
newer(#{frame_type := {text, Type}} = Frame, _) when Type =:= <<"opener">>; Type =:= <<"challenge">> ->
    {true, macula_frame:get(version, Frame, undefined)};
newer(#{frame_type := hello, refusal_code := {text, <<"unsupported_version">>}} = Frame, client) ->
    {true, macula_frame:get(version, Frame, undefined)};
newer(#{frame_type := Type, version := Version} = Frame, _)
  when not is_map_key(node_id, Frame), is_integer(Version), Version > 2,
       (Type =:= hello orelse Type =:= connect) ->
    {true, Version};
newer(_, _) ->
    false.

%% @doc Whether the frame says what a peer has to say of itself. No stricter than older stations are, but where
%% something is built on it.
-spec check_presence(macula_frame:frame()) -> ok | {error, atom()}.
check_presence(Frame) ->
    check_presence([station_id, realms, capabilities], Frame).

check_presence([], _) -> ok;
check_presence([Field | Fields], Frame) ->
    case {Field, Frame} of
        {station_id, #{station_id := <<_:256>>}} -> check_presence(Fields, Frame);
        {capabilities, #{capabilities := N}} when is_integer(N), N >= 0 ->
            check_presence(Fields, Frame);
        {realms, #{realms := Realms}} when is_list(Realms) ->
            case length(Realms) =< macula_frame_table:max_realms()
                 andalso lists:all(fun is_binary/1, Realms) of
                true -> check_presence(Fields, Frame);
                false -> {error, Field}
            end;
        _ -> {error, Field}
    end.

%% @doc The addresses that a peer gives. Older stations take whatever stands there, so that alone ends no handshake.
-spec addresses(macula_frame:frame()) -> [map()].
addresses(Frame) ->
    case macula_frame:get(addresses, Frame, []) of
        Addresses when is_list(Addresses) -> [Address || Address <- Addresses, is_map(Address)];
        _ -> []
    end.

%% @doc Judges the CONNECT of a peer whose signature and presence are right. `ask' where a rule is a function,
%% which {@link decide/4} asks.
-spec judge(macula_frame:frame(), macula_identity:node_id(), macula_peering_opts:opts()) ->
    welcome | ask | {refuse, non_neg_integer()} | {error, stale | replayed}.
judge(Frame, Peer, #{freshness_ms := Window, puzzle_bits := Bits} = Opts) ->
    Fresh = is_fresh(Frame, Window),
    case Fresh andalso is_first_time(Frame, Opts) of
        true ->
            case macula_identity:puzzle_bits(Peer) >= Bits of
                true -> ask_rules(Peer, Opts);
                false -> {refuse, macula_frame:error_code(crypto_puzzle_invalid)}
            end;
        false when Fresh ->
            {error, replayed};
        false ->
            {error, stale}
    end.

%% Whether the frame was sent so many milliseconds ago at most, or ahead of this clock.
is_fresh(_, infinity) -> true;
is_fresh(#{sent_at_ms := Sent}, Window) when is_integer(Sent) ->
    abs(erlang:system_time(millisecond) - Sent) =< Window;
is_fresh(_, _) -> false.

is_first_time(_, #{replay_cache := false}) -> true;
is_first_time(Frame, _) ->
    %% What the signature covers may be captured; what it covers is told apart by it.
    macula_peering_replay:first_time(macula_frame:signature(Frame)).

ask_rules(Peer, #{allow := Allow, deny := Deny}) ->
    case {rule(Deny, Peer), rule(Allow, Peer)} of
        {true, _} -> {refuse, unauthorized()};
        {_, false} -> {refuse, unauthorized()};
        {false, true} -> welcome;
        _ -> ask
    end.

rule(all, _) -> true;
rule(none, _) -> false;
rule(NodeIds, Peer) when is_list(NodeIds) -> lists:member(Peer, NodeIds);
rule(Fun, _) -> Fun.

unauthorized() -> macula_frame:error_code(unauthorized).

%% @doc What rules that are functions are told of a peer.
-spec claim(macula_frame:frame(), macula_identity:node_id(), undefined | macula_quic:address()) ->
    macula_peering:claim().
claim(Frame, Peer, Address) ->
    (maps:with([station_id, realms, capabilities, addresses, site, endorsements,
                puzzle_evidence, sent_at_ms], Frame))#{
        node_id => Peer,
        puzzle_bits => macula_identity:puzzle_bits(Peer),
        address => Address}.

%% @doc Asks the rules that are functions, and exits with `{decided, allow}' or `{decided, Code}'. They are the user's:
%% they may take time, and they may fail, so this is a process of its own.
-spec decide(term(), term(), macula_identity:node_id(), map()) -> no_return().
decide(Allow, Deny, Peer, Claim) ->
    exit({decided, case verdict(Deny, Peer, Claim, false) of
        allow -> verdict(Allow, Peer, Claim, true);
        Code -> Code
    end}).

%% `Good' is the answer of the rule that lets the peer in.
verdict(Rule, _, Claim, Good) when is_function(Rule) ->
    case Rule(Claim) of
        Good -> allow;
        allow -> allow;
        Answer when is_boolean(Answer) -> unauthorized();
        deny -> unauthorized();
        {deny, Code} when is_integer(Code), Code >= 0, Code =< ?MAX_CODE -> Code
    end;
verdict(Rule, Peer, _, Good) ->
    case rule(Rule, Peer) of
        Good -> allow;
        _ -> unauthorized()
    end.
