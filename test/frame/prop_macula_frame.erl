%% Frames of any content come back as they were sent, and any bytes at all are survived.
-module(prop_macula_frame).

-include("../support/macula_proper.hrl").

-export([prop_payloads_round_trip/0, prop_signatures_are_stable/0, prop_any_bytes_are_survived/0,
         prop_changed_frames_are_survived/0, prop_what_check_allows_is_sent/0,
         prop_streams_are_taken_apart_at_any_cut/0]).

prop_payloads_round_trip() ->
    ?FORALL(Payload, payload(),
        begin
            {ok, Bytes} = macula_frame:cbor_encode(Payload),
            {ok, Decoded} = macula_frame:cbor_decode(Bytes),
            {ok, Again} = macula_frame:cbor_encode(Decoded),
            equals({received(Payload), Bytes}, {Decoded, Again})
        end).

prop_signatures_are_stable() ->
    Id = macula_identity:generate(),
    Public = macula_identity:public(Id),
    ?FORALL(Payload, payload(),
        begin
            Frame = frame(Payload, Public),
            {ok, Wire} = macula_frame:sign_encode(Frame, Id),
            {ok, Decoded, {ok, Public}, <<>>} = macula_frame:decode_verify(Wire, Public, #{}),
            {ok, Decoded} = macula_frame:verify(Decoded, Public),
            {ok, Existing, <<>>} = macula_frame:decode(Wire, #{text => existing}),
            {ok, Existing} = macula_frame:verify(Existing, Public),
            [{ok, Wire}] = macula_frame:sign_encode_many([Frame], Id),
            equals({Wire, Wire, Wire}, {macula_frame:encode(Decoded),
                                        macula_frame:encode(Existing),
                                        macula_frame:encode(macula_frame:sign(Frame, Id))})
        end).

prop_any_bytes_are_survived() ->
    ?FORALL(Bytes, oneof([binary(), ?LET(B, binary(), <<(byte_size(B)):32, B/binary>>),
                          ?LET(B, items(), <<(byte_size(B)):32, B/binary>>)]),
        survived(Bytes)).

prop_changed_frames_are_survived() ->
    Id = macula_identity:generate(),
    Public = macula_identity:public(Id),
    ?FORALL({Payload, Changes}, {payload(), list({non_neg_integer(), byte()})},
        begin
            {ok, <<Length:32, Body/binary>>} = macula_frame:sign_encode(frame(Payload, Public), Id),
            Changed = lists:foldl(fun change/2, Body, Changes),
            Bytes = <<Length:32, Changed/binary>>,
            survived(Bytes) andalso
                case macula_frame:decode_verify(Bytes, Public, #{}) of
                    %% A change of form that keeps the content keeps the signature.
                    {ok, Frame, {ok, Public}, <<>>} ->
                        {ok, Original, <<>>} = macula_frame:decode(<<Length:32, Body/binary>>),
                        equals(Original, Frame);
                    _ ->
                        true
                end
        end).

change({At, Byte}, Body) ->
    Place = At rem byte_size(Body),
    <<Before:Place/binary, _, After/binary>> = Body,
    <<Before/binary, Byte, After/binary>>.

%% What is decoded is encoded again to the same canonical bytes; nothing raises.
survived(Bytes) ->
    case macula_frame:decode(Bytes) of
        {ok, Frame, Rest} ->
            {ok, Wire} = macula_frame:try_encode(Frame),
            {ok, Frame, Rest} =:= setelement(3, macula_frame:decode(Wire), Rest);
        {more, N} ->
            is_integer(N) andalso N > 0;
        {error, frame_too_large} ->
            true;
        {error, {bad_frame, Why}} ->
            is_atom(Why)
    end.

prop_what_check_allows_is_sent() ->
    ?FORALL(Payload, any(),
        begin
            Frame = frame(Payload, <<0:256>>),
            case {macula_frame:check_frame(Frame), macula_frame:try_encode(Frame)} of
                {ok, {ok, _}} -> true;
                {{error, {bad_field, _, text_undefined}}, {ok, _}} -> true;
                {{error, {bad_field, [payload | _], _}}, {error, {not_encodable, _}}} -> true;
                Other -> ?WHENFAIL(io:format("~tp~n", [Other]), false)
            end
        end).

prop_streams_are_taken_apart_at_any_cut() ->
    ?FORALL({Payloads, Cut}, {resize(6, list(payload())), non_neg_integer()},
        begin
            Wires = [macula_frame:encode(frame(Payload, <<0:256>>)) || Payload <- Payloads],
            Stream = iolist_to_binary(Wires),
            At = Cut rem (byte_size(Stream) + 1),
            <<First:At/binary, Second/binary>> = Stream,
            {Frames1, Rest} = macula_frame:parse_stream(First),
            {Frames2, <<>>} = macula_frame:parse_stream(<<Rest/binary, Second/binary>>),
            equals(Wires, [macula_frame:encode(Frame) || Frame <- Frames1 ++ Frames2])
        end).

frame(Payload, Public) ->
    #{version => 2, frame_type => result, frame_id => <<1:128>>, sent_at_ms => 1700000000000,
      capabilities => 0, realm => undefined, call_id => <<2:128>>, source_route => undefined,
      payload => Payload, responded_by => Public, source_route_reverse => <<>>}.

%% What a term of ours looks like to the one who receives it.
received(undefined) -> undefined;
received(Atom) when is_atom(Atom) -> {text, atom_to_binary(Atom)};
received(List) when is_list(List) -> [received(Member) || Member <- List];
received(Map) when is_map(Map) ->
    maps:from_list([{received_key(Key), received(Value)} || {Key, Value} <- maps:to_list(Map)]);
received(Other) -> Other.

received_key(Key) when is_atom(Key) -> {text, atom_to_binary(Key)};
received_key(Key) when is_binary(Key) -> {text, Key};
received_key(Key) -> Key.

payload() ->
    ?SIZED(Size, payload(Size)).

payload(0) ->
    oneof([integer(), range(-(1 bsl 64), (1 bsl 64) - 1), float(), binary(), name(), undefined,
           elements([true, false, ok]), text()]);
payload(Size) ->
    frequency([{3, payload(0)},
               {1, ?LAZY(list(payload(Size div 4)))},
               {1, ?LAZY(?LET(Pairs, list({key(), payload(Size div 4)}), unique(Pairs)))}]).

text() ->
    ?LET(Chars, list(frequency([{9, range($a, $z)}, {1, range(16#A0, 16#D7FF)}])),
         {text, unicode:characters_to_binary(Chars)}).

key() ->
    oneof([integer(), name(), text(), ?LET({text, T}, text(), T)]).

%% From a stock, as an atom that is made stays for ever, and there is room for a million.
name() ->
    frequency([{3, elements(['', ' ', 'with space', 'NULL', '\x{e9}', '\x{416}\x{1f600}', ok, true,
                             false, connect, frame_type, signature, publisher_sig, payload, text,
                             list_to_atom(lists:duplicate(23, $a)),
                             list_to_atom(lists:duplicate(24, $a)),
                             list_to_atom(lists:duplicate(255, 16#416))])},
               {1, ?LET(N, range(0, 4095), list_to_atom("macula_prop_" ++ integer_to_list(N)))}]).

%% No two keys that are one on the wire.
unique(Pairs) ->
    maps:from_list(maps:values(maps:from_list(
        [{received_key(Key), {Key, Value}} || {Key, Value} <- Pairs]))).

%% Bytes that look like CBOR more often than random ones do.
items() ->
    ?LET(Parts, list(oneof([<<16#a1>>, <<16#a2>>, <<16#80>>, <<16#81>>, <<16#61, $a>>, <<16#41, 0>>,
                            <<16#f6>>, <<16#f9, 16#3c, 0>>, <<16#18, 5>>, <<16#bf>>, <<16#ff>>,
                            <<16#fb, 0:64>>, <<16#1b, 1:64>>, <<16#3b, -1:64>>,
                            <<16#6a, "frame_type">>, <<16#64, "ping">>, <<16#69, "signature">>,
                            ?LET(B, byte(), <<B>>)])),
         iolist_to_binary([<<16#a1>> | Parts])).
