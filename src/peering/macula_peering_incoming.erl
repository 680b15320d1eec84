%% @doc What becomes of a frame that has arrived on a link, on its control stream or a dedicated one:
%% whether it is delivered, by the options `verify_frames' and `unknown_types', and how it is decoded,
%% by `text', `max_frame' and `max_terms'.
%% @private
-module(macula_peering_incoming).

-export([rules/1, check/2, decoding/1, judge/4]).

-export_type([rules/0, judgement/0]).

-type modes() :: none | #{macula_frame_table:category() | other | default =>
                              macula_peering:verify_mode()}.
-opaque rules() :: #{
    modes := modes(),
    unknown_types := deliver | drop | close,
    decoding := macula_frame:decode_opts()
}.
%% `Meta' is `none' where the frame's category is not verified.
-type judgement() ::
    {deliver, macula_frame:frame_type(), macula_frame_table:category() | other,
     Meta :: none | #{atom() => term()}}
    | drop | reject | {error, no_frame_type | {unknown_type, macula_frame:frame_type()}}.

-spec rules(macula_peering_opts:opts()) -> rules().
rules(#{verify_frames := Modes, unknown_types := Unknown, text := Text, max_frame := Max,
        max_terms := Terms}) ->
    #{modes => modes(Modes), unknown_types => Unknown,
      decoding => #{text => Text, max => Max, max_terms => Terms}}.

modes(none) -> none;
modes(Mode) when is_atom(Mode) -> #{default => Mode};
modes(Modes) -> Modes.

%% @doc Whose signatures `macula_frame:parse/3' is to look for, given the peer.
-spec check(rules(), macula_identity:node_id()) -> none | macula_identity:node_id().
check(#{modes := none}, _) -> none;
check(_, Peer) -> Peer.

-spec decoding(rules()) -> macula_frame:decode_opts().
decoding(#{decoding := Decoding}) -> Decoding.

-spec judge(macula_frame:frame(), macula_frame:verdict(), macula_identity:node_id(), rules()) ->
    judgement().
judge(Frame, Verdict, Peer, #{modes := Modes, unknown_types := Unknown}) ->
    case macula_frame:named_type(Frame) of
        {ok, Type} ->
            case macula_frame:category(Type) of
                other when Unknown =:= drop -> drop;
                other when Unknown =:= close -> {error, {unknown_type, Type}};
                Category -> signed(mode(Category, Modes), Type, Category, Verdict, Peer)
            end;
        error ->
            {error, no_frame_type}
    end.

mode(_, none) -> none;
mode(Category, Modes) -> maps:get(Category, Modes, maps:get(default, Modes, none)).

signed(none, Type, Category, _, _) ->
    {deliver, Type, Category, none};
signed(Mode, Type, Category, Verdict, Peer) when Mode =:= report; element(1, Verdict) =:= ok ->
    {deliver, Type, Category, #{verdict => Verdict, category => Category, peer => Peer}};
signed(require, _, _, _, _) ->
    reject.
