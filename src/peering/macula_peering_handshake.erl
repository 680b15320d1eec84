%% @doc What CONNECT and HELLO must say, and which peers may come in.
%% @private
-module(macula_peering_handshake).

-export([newer/2, check_presence/1, addresses/1, is_fresh/2, is_first_time/2, ask_rules/3, decide/4]).

%% What the field of HELLO holds.
-define(MAX_CODE, 16#ffffffffffffffff).

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

%% @doc Whether the frame was sent so many milliseconds ago at most, or ahead of this clock.
-spec is_fresh(macula_frame:frame(), timeout()) -> boolean().
is_fresh(_, infinity) -> true;
is_fresh(#{sent_at_ms := Sent}, Window) when is_integer(Sent) ->
    abs(erlang:system_time(millisecond) - Sent) =< Window;
is_fresh(_, _) -> false.

%% @doc Whether the frame is none that has come before.
-spec is_first_time(macula_frame:frame(), map()) -> boolean().
is_first_time(_, #{replay_cache := false}) -> true;
is_first_time(Frame, _) ->
    %% What the signature covers may be captured; what it covers is told apart by it.
    macula_peering_replay:first_time(macula_frame:signature(Frame)).

%% @doc What the rules say of a peer: that it may come in, or the code with which it is refused. `unknown' where a
%% rule is a function.
-spec ask_rules(term(), term(), macula_identity:node_id()) -> allow | unknown | non_neg_integer().
ask_rules(Allow, Deny, Peer) ->
    case {rule(Deny, Peer), rule(Allow, Peer)} of
        {true, _} -> unauthorized();
        {_, false} -> unauthorized();
        {false, true} -> allow;
        _ -> unknown
    end.

rule(all, _) -> true;
rule(none, _) -> false;
rule(NodeIds, Peer) when is_list(NodeIds) -> lists:member(Peer, NodeIds);
rule(Fun, _) -> Fun.

unauthorized() -> macula_frame:error_code(unauthorized).

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
