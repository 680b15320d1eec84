%% @doc What becomes of a frame that has arrived on a link, on its control stream or a dedicated one:
%% whether it is delivered, by the options `verify_frames' and `unknown_types', and how it is decoded,
%% by `text', `max_frame' and `max_terms'.
%% @private
-module(macula_peering_incoming).

-export([rules/1, check/2, decoding/1, judge/4, bad/3, bad_frames/1]).
-export([encoding/1]).

-export_type([rules/0, judgement/0]).

-type modes() :: none | #{macula_frame_table:category() | other | default =>
                              macula_peering:verify_mode()}.
-opaque rules() :: #{
    modes := modes(),
    unknown_types := deliver | drop | close,
    bad_frames := drop | deliver | close,
    decoding := macula_frame:decode_opts()
}.
-type judgement() ::
    {deliver, macula_frame:frame_type(), macula_frame_table:category() | other,
     Meta :: none | #{atom() => term()}}
    | drop | reject | {error, no_frame_type | {unknown_type, macula_frame:frame_type()}}.
%% `Meta' is `none' where the frame's category is not verified.

-spec rules(macula_peering_opts:opts()) -> rules().
rules(#{verify_frames := Modes, unknown_types := Unknown, text := Text, max_frame := Max,
        max_terms := Terms, bad_frames := Bad}) ->
    #{modes => modes(Modes), unknown_types => Unknown, bad_frames => Bad,
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

%% @doc How frames of a link are encoded.
-spec encoding(macula_peering_opts:opts()) -> macula_frame:encode_opts().
encoding(Opts) ->
    maps:with([text_undefined, newer_terms, max_terms], Opts).

-spec bad_frames(rules()) -> drop | deliver | close.
bad_frames(#{bad_frames := Mode}) -> Mode.

%% What is wrong with the content of a frame, and leaves no doubt about where the frame ends.
-define(ODD, [bad_key, bad_text, too_deep, duplicate_key, unsupported_item, not_finite,
              too_many_terms]).

%% @doc What becomes of a frame that could not be decoded, and stands first in a buffer: it is skipped,
%% or ends the link.
-spec bad(macula_frame:decode_error(), binary(), rules()) ->
    {skip, Bad :: binary(), Rest :: binary()} | close.
bad({bad_frame, Why}, <<Length:32, Body:Length/binary, Rest/binary>>, #{bad_frames := Mode})
  when Mode =/= close ->
    case lists:member(Why, ?ODD) of
        %% Without what was read together with this frame.
        true when Mode =:= deliver -> {skip, <<Length:32, Body/binary>>, Rest};
        true -> {skip, <<>>, Rest};
        false -> close
    end;
bad(_, _, _) ->
    close.

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
