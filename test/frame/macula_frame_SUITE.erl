%% The frames of the peering wire, byte for byte, and what the decoder makes of other bytes.
-module(macula_frame_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
%% Run in a node of its own.
-export([bound_memory/0]).
-export([vectors_decode_and_verify/1, vectors_are_reproduced_from_their_fields/1,
         vectors_are_reproduced_from_the_model/1, vectors_verify_in_the_decoding_call/1,
         publisher_and_update_signatures/1, decode_cases/1, every_cut_needs_more/1,
         every_flipped_bit_is_noticed/1, payload_text_stays_text/1,
         text_undefined_survives_and_verifies/1, existing_atoms_on_request/1,
         no_atom_comes_from_the_wire/1, unknown_types_and_fields_are_kept/1,
         check_frame_names_what_is_wrong/1, constructors_fill_the_envelope/1,
         constructors_do_not_walk_through_payloads/1, a_category_is_found_at_once/1,
         every_type_round_trips/1, terms_without_a_place_on_the_wire/1, depth_is_bounded/1,
         large_frames/1, memory_is_bounded_before_judgement/1,
         the_memory_of_terms_is_not_underrated/1, long_calls_do_not_hold_a_scheduler/1, short_frames_may_be_much_work/1,
         a_wrong_argument_shows_no_key/1, parse_stream_takes_frames_apart/1,
         batches_keep_order_and_errors/1, wrong_options_are_named/1, signers_by_type/1, the_catalogue_is_printed/1]).

all() ->
    [F || {F, 1} <- ?MODULE:module_info(exports), F =/= module_info,
          F =/= init_per_suite, F =/= end_per_suite].

init_per_suite(Config) ->
    {ok, Vectors} = file:consult(filename:join(proplists:get_value(data_dir, Config), "vectors.term")),
    [{vectors, Vectors} | Config].

end_per_suite(_Config) ->
    ok.

frames(Config) ->
    [{Name, Type, V} || {frame, Name, Type, V} <- proplists:get_value(vectors, Config)].

vectors_decode_and_verify(Config) ->
    [begin
        {ok, Frame, <<>>} = macula_frame:decode(Wire),
        ?assertEqual(Type, macula_frame:frame_type(Frame)),
        ?assertEqual(Signature, macula_frame:signature(Frame)),
        ?assertEqual({ok, Frame}, macula_frame:verify(Frame, Public)),
        ?assertEqual(Wire, macula_frame:encode(Frame)),
        ?assertEqual({error, signature_invalid},
                     macula_frame:verify(Frame#{capabilities => 77}, Public))
     end || {_Name, Type, #{wire := Wire, public := Public, signature := Signature}}
                <- frames(Config)].

vectors_are_reproduced_from_their_fields(Config) ->
    [begin
        {ok, Id} = macula_identity:from_seed(Seed),
        {ok, Decoded, <<>>} = macula_frame:decode(Wire),
        Own = [Field || {Field, _, _} <- macula_frame:fields(Type)],
        Spec = maps:with(Own -- [signature], Decoded),
        Frame = macula_frame:new(Type, Spec),
        ?assertEqual(maps:remove(signature, Decoded), Frame),
        ?assertEqual({ok, Wire}, macula_frame:sign_encode(Frame, Id)),
        ?assertEqual(Wire, macula_frame:encode(macula_frame:sign(Frame, Id))),
        ?assertEqual(Wire, macula_frame:encode(macula_frame:sign(Frame, #{private => Seed})))
     end || {_Name, Type, #{wire := Wire, seed := Seed}} <- frames(Config)].

vectors_are_reproduced_from_the_model(Config) ->
    [begin
        ?assertEqual({ok, Unsigned}, macula_frame:cbor_encode(Model)),
        ?assertEqual({ok, Model}, macula_frame:cbor_decode(Unsigned)),
        {ok, Id} = macula_identity:from_seed(Seed),
        ?assertEqual(Signature, macula_identity:sign(Signed, Id)),
        ?assert(macula_identity:verify(Signed, Signature, macula_identity:public(Id))),
        Extra = case Publisher of
            undefined -> #{};
            _ -> #{{text, <<"publisher_sig">>} => Publisher}
        end,
        {ok, Body} = macula_frame:cbor_encode(
            maps:merge(Model#{<<"signature">> => Signature}, Extra)),
        ?assertEqual(Wire, <<(byte_size(Body)):32, Body/binary>>)
     end || {_Name, _Type, #{model := Model, unsigned := Unsigned, signed := Signed, seed := Seed,
                             signature := Signature, publisher_sig := Publisher, wire := Wire}}
                <- frames(Config)].

vectors_verify_in_the_decoding_call(Config) ->
    Other = macula_identity:public(macula_identity:generate()),
    [begin
        {ok, Frame, _, _} = macula_frame:decode_verify(Wire, Public, #{}),
        ?assertEqual({ok, Frame, {ok, Public}, <<"rest">>},
                     macula_frame:decode_verify(<<Wire/binary, "rest">>, Public, #{})),
        {ok, Frame, Verdict, <<>>} = macula_frame:decode_verify(Wire, Other, #{}),
        case macula_frame:signer(Frame, Other) of
            Other -> ?assertEqual({error, signature_invalid}, Verdict);
            Public -> ?assertEqual({ok, Public}, Verdict)
        end
     end || {_Name, _Type, #{wire := Wire, public := Public}} <- frames(Config)].

publisher_and_update_signatures(Config) ->
    [begin
        Message = <<Domain/binary, Input/binary>>,
        ?assert(macula_identity:verify(Message, Signature, Signer))
     end || {signature, _, #{input := Input, domain := Domain, signer := Signer,
                             signature := Signature}} <- proplists:get_value(vectors, Config)],
    {_, _, #{wire := Wire, seed := Seed}} =
        lists:keyfind(publish_map_with_publisher_sig, 1, frames(Config)),
    {ok, Publish, <<>>} = macula_frame:decode(Wire),
    ?assertEqual({ok, Publish}, macula_frame:verify_publisher(Publish)),
    ?assertEqual({error, bad_frame}, macula_frame:verify_publisher(Publish#{payload => self()})),
    ?assertError({bad_frame, {missing_field, [seq]}},
                 macula_frame:sign_publisher(maps:remove(seq, Publish), #{private => Seed})),
    ?assertEqual(Publish, macula_frame:sign_publisher(maps:remove(publisher_sig, Publish),
                                                      #{private => Seed})),
    ?assertEqual({error, signature_invalid}, macula_frame:verify_publisher(Publish#{seq => 1})),
    ?assertEqual({error, bad_frame},
                 macula_frame:verify_publisher(maps:remove(publisher_sig, Publish))),
    %% It outlives the relay's own signature on the EVENT that carries it.
    Event = macula_frame:event(maps:merge(
        maps:with([topic, realm, publisher, seq, payload, publisher_sig], Publish),
        #{delivered_via => plumtree})),
    {ok, Received, <<>>} = macula_frame:decode(
        macula_frame:encode(macula_frame:sign(Event, macula_identity:generate()))),
    ?assertMatch({ok, _}, macula_frame:verify_publisher(Received)),

    {_, _, #{wire := Swim}} = lists:keyfind(swim_ping_piggyback, 1, frames(Config)),
    {ok, #{piggyback := [Update]}, <<>>} = macula_frame:decode(Swim),
    ?assertMatch(#{state := suspect, incarnation := 3}, Update),
    ?assertEqual({ok, Update}, macula_frame:verify_update(Update)),
    ?assertEqual({error, signature_invalid}, macula_frame:verify_update(Update#{state => alive})),
    ?assertEqual({error, bad_frame}, macula_frame:verify_update(maps:remove(by, Update))),
    ?assertEqual({error, bad_frame}, macula_frame:verify_update(Update#{state => self()})),
    Unsigned = macula_frame:swim_update(maps:remove(signature, Update)),
    ?assertEqual(Update, macula_frame:sign_update(Unsigned, #{private => Seed})).

decode_cases(Config) ->
    Cases = maps:from_list([{Name, Input} || {decode, Name, Input}
                                                 <- proplists:get_value(vectors, Config)]),
    Expected = #{
        oversize_prefix_16777216 => {error, frame_too_large},
        max_prefix_needs_more => {more, 16777215},
        short_prefix => {more, 2},
        empty_map_no_frame_type => {ok, #{}, <<>>},
        break_byte => {error, {bad_frame, not_a_map}},
        cbor_bool_value => {error, {bad_frame, unsupported_item}},
        cbor_undefined_simple => {error, {bad_frame, unsupported_item}},
        indefinite_map => {error, {bad_frame, indefinite_length}},
        trailing_byte_inside_frame => {error, {bad_frame, trailing_bytes}},
        duplicate_keys_last_wins => {error, {bad_frame, duplicate_key}},
        byte_string_key => {error, {bad_frame, bad_key}},
        nan_double => {error, {bad_frame, not_finite}}
    },
    maps:foreach(fun(Name, Want) ->
        Got = macula_frame:decode(maps:get(Name, Cases)),
        case Name of
            break_byte -> ?assertMatch({error, {bad_frame, _}}, Got);
            _ -> ?assertEqual(Want, Got)
        end
    end, Expected),
    Signed = [signed_ping_reverse_key_order, signed_ping_tampered_body],
    ?assertEqual(lists:sort(maps:keys(Expected) ++ Signed), lists:sort(maps:keys(Cases))),
    [#{public := Public}] = [I || {identity, a, I} <- proplists:get_value(vectors, Config)],
    {ok, Ping, <<>>} = macula_frame:decode(maps:get(signed_ping_reverse_key_order, Cases)),
    ?assertEqual({ok, Ping}, macula_frame:verify(Ping, Public)),
    ?assertMatch({ok, _, {ok, Public}, <<>>},
                 macula_frame:decode_verify(maps:get(signed_ping_reverse_key_order, Cases),
                                            Public, #{})),
    {ok, Tampered, <<>>} = macula_frame:decode(maps:get(signed_ping_tampered_body, Cases)),
    ?assertEqual({error, signature_invalid}, macula_frame:verify(Tampered, Public)),
    ?assertEqual({error, {bad_frame, truncated}}, macula_frame:decode(<<0:32>>)).

every_cut_needs_more(Config) ->
    [{_, _, #{wire := Wire}} | _] = frames(Config),
    [?assertMatch({more, N} when N =< byte_size(Wire) - Cut,
                  macula_frame:decode(binary:part(Wire, 0, Cut)))
     || Cut <- lists:seq(0, byte_size(Wire) - 1)].

every_flipped_bit_is_noticed(Config) ->
    {_, _, #{wire := <<Length:32, Body/binary>>, public := Public}} =
        lists:keyfind(call, 1, frames(Config)),
    [begin
        <<Before:Bit, B:1, After/bits>> = Body,
        Flipped = <<Length:32, Before:Bit, (1 - B):1, After/bits>>,
        case macula_frame:decode_verify(Flipped, Public, #{}) of
            {ok, _, {ok, Public}, _} -> ct:fail({accepted, Bit});
            {ok, _, {error, _}, <<>>} -> ok;
            {error, {bad_frame, _}} -> ok
        end
     end || Bit <- lists:seq(0, bit_size(Body) - 1)].

%% Atoms are text on the wire, and text comes back as text, as a value and as a key; only names of
%% the catalogue in their own fields are atoms.
payload_text_stays_text(_Config) ->
    Payload = #{ok => error, <<"key">> => {text, <<"value">>}, 7 => [ping, true, undefined],
                {text, <<"topic">>} => <<"bytes">>, -3 => 1.5},
    Frame = result(Payload),
    {ok, Decoded, <<>>} = macula_frame:decode(macula_frame:encode(Frame)),
    ?assertEqual(#{{text, <<"ok">>} => {text, <<"error">>},
                   {text, <<"key">>} => {text, <<"value">>},
                   {text, <<"topic">>} => <<"bytes">>,
                   7 => [{text, <<"ping">>}, {text, <<"true">>}, undefined],
                   -3 => 1.5},
                 maps:get(payload, Decoded)),
    ?assertEqual(macula_frame:encode(Frame), macula_frame:encode(Decoded)).

text_undefined_survives_and_verifies(_Config) ->
    Id = macula_identity:generate(),
    Frame = macula_frame:sign(result({text, <<"undefined">>}, Id), Id),
    Wire = macula_frame:encode(Frame),
    {ok, Decoded, {ok, _}, <<>>} =
        macula_frame:decode_verify(Wire, macula_identity:public(Id), #{}),
    ?assertEqual({text, <<"undefined">>}, maps:get(payload, Decoded)),
    {ok, Existing, <<>>} = macula_frame:decode(Wire, #{text => existing}),
    ?assertMatch({ok, _}, macula_frame:verify(Existing, macula_identity:public(Id))),
    ?assertEqual({error, {bad_field, [payload], text_undefined}},
                 macula_frame:check_frame(Frame)),
    ?assertEqual({error, {not_encodable, text_undefined}},
                 macula_frame:sign_encode(Frame, Id, #{text_undefined => refuse})).

existing_atoms_on_request(_Config) ->
    Wire = macula_frame:encode(result(#{ok => {text, <<"some_unknown_zzz_">>}})),
    {ok, Decoded, <<>>} = macula_frame:decode(Wire, #{text => existing}),
    ?assertEqual(#{ok => {text, <<"some_unknown_zzz_">>}}, maps:get(payload, Decoded)),
    %% As a key "undefined" is a name like any other; as a value it would be taken for null.
    Id = macula_identity:generate(),
    Named = macula_frame:encode(macula_frame:sign(
        result(#{undefined => {text, <<"undefined">>}, {text, <<"ok">>} => undefined}), Id)),
    {ok, Again, <<>>} = macula_frame:decode(Named, #{text => existing}),
    ?assertEqual(#{undefined => {text, <<"undefined">>}, ok => undefined},
                 maps:get(payload, Again)),
    ?assertEqual({ok, Again}, macula_frame:verify(Again, macula_identity:public(Id))).

no_atom_comes_from_the_wire(_Config) ->
    Frames = [begin
        Text = {text, <<"atom_of_nobody_", (integer_to_binary(N))/binary>>},
        macula_frame:encode((result(#{Text => Text}))#{Text => [Text], frame_type => Text,
                                                       reason => Text})
     end || N <- lists:seq(1, 1000)],
    Before = erlang:system_info(atom_count),
    [{ok, _, <<>>} = macula_frame:decode(Wire, #{text => Text})
     || Wire <- Frames, Text <- [tagged, existing]],
    ?assertEqual(Before, erlang:system_info(atom_count)).

unknown_types_and_fields_are_kept(_Config) ->
    Id = macula_identity:generate(),
    Public = macula_identity:public(Id),
    Frame = maps:merge(ping(), #{frame_type => {text, <<"novelty">>},
                                 {text, <<"extra">>} => #{{text, <<"nonce">>} => 1}}),
    Wire = macula_frame:encode(macula_frame:sign(Frame, Id)),
    {ok, Decoded, {ok, Public}, <<>>} = macula_frame:decode_verify(Wire, Public, #{}),
    ?assertEqual(Frame, maps:remove(signature, Decoded)),
    ?assertEqual({error, {unknown_frame_type, {text, <<"novelty">>}}},
                 macula_frame:check_frame(Decoded)),
    {ok, WithExtra, <<>>} = macula_frame:decode(
        macula_frame:encode((ping())#{{text, <<"extra">>} => 1})),
    ?assertEqual(ok, macula_frame:check_frame(WithExtra)).

check_frame_names_what_is_wrong(_Config) ->
    Wrong = fun(Frame) -> {error, Reason} = macula_frame:check_frame(Frame), Reason end,
    ?assertEqual(not_a_map, Wrong(ping)),
    ?assertEqual({missing_field, [frame_type]}, Wrong(#{})),
    ?assertEqual({missing_field, [nonce]}, Wrong(maps:remove(nonce, ping()))),
    ?assertEqual({bad_field, [nonce], {bytes, 16}}, Wrong((ping())#{nonce => <<1>>})),
    ?assertEqual({bad_field, [capabilities], uint}, Wrong((ping())#{capabilities => -1})),
    ?assertEqual({bad_field, [payload, a, 2], bad_type}, Wrong(result(#{a => [1, self()]}))),
    ?assertEqual({bad_field, [payload, a], integer_range}, Wrong(result(#{a => 1 bsl 64}))),
    ?assertEqual({bad_field, [payload], improper_list}, Wrong(result([1 | 2]))),
    ?assertMatch({bad_field, [payload, _], duplicate_key},
                 Wrong(result(#{a => 1, <<"a">> => 2}))),
    ?assertEqual({bad_field, [payload], bad_text}, Wrong(result({text, <<255>>}))),
    Want = macula_frame:want(#{blocks => [#{mcid => <<0:272>>}]}),
    ?assertMatch(#{blocks := [#{priority := 128}]}, Want),
    ?assertEqual({bad_field, [blocks, 1, priority], {uint, 255}},
                 Wrong(Want#{blocks => [#{mcid => <<0:272>>, priority => 256}]})),
    ?assertError({bad_frame, {bad_field, [blocks], array}},
                 macula_frame:want(#{blocks => [#{mcid => <<0:272>>} | more]})),
    %% A deadline is a time, which may be before 1970; a depth is a count.
    Call = macula_frame:call(#{call_id => <<0:128>>, procedure => <<>>, realm => <<0:256>>,
                               payload => 0, deadline_ms => -1, caller => <<0:256>>}),
    ?assertEqual({bad_field, [retry_budget], uint}, Wrong(Call#{retry_budget => -1})),
    ?assertEqual(ok, macula_frame:check_field(connect, realms, [<<0:256>>])),
    ?assertEqual({error, {bad_field, [realms, 1], {bytes, 32}}},
                 macula_frame:check_field(connect, realms, [<<0>>])),
    %% What may be null may be absent, though the constructors send it.
    Error = macula_frame:error(#{call_id => <<0:128>>, code => 1, reported_by => <<0:256>>}),
    ?assertMatch(#{detail := undefined, offending_hop := undefined}, Error),
    ?assertEqual(ok, macula_frame:check_frame(maps:without([detail, offending_hop], Error))),
    ?assertEqual(frame_too_large,
                 Wrong(macula_frame_SUITE_block(binary:copy(<<0>>, 16#FFFFFF)))),
    ?assertError({bad_frame, {missing_field, [nonce]}}, macula_frame:ping(#{})),
    ?assertError({bad_frame, {bad_field, [realms], {too_many, 1024}}},
                 macula_frame:connect(#{node_id => <<0:256>>, station_id => <<0:256>>,
                                        puzzle_evidence => <<0:256>>,
                                        realms => lists:duplicate(1025, <<0:256>>)})),
    [?assert(is_binary(unicode:characters_to_binary(macula_frame:explain(Reason))))
     || Reason <- [not_a_map, frame_too_large, {missing_field, [a]}, {bad_field, [a, 1], uint},
                   {unknown_frame_type, x}, {bad_frame, truncated}, {not_encodable, bad_type}]].

macula_frame_SUITE_block(Payload) ->
    Block = macula_frame:block(#{mcid => <<0:272>>, payload => <<>>}),
    Block#{payload => Payload}.

constructors_fill_the_envelope(_Config) ->
    Before = erlang:system_time(millisecond),
    #{version := 2, frame_type := ping, capabilities := 0, realm := undefined,
      call_id := undefined, source_route := undefined, sent_at_ms := Sent,
      frame_id := <<Ms:48, 7:4, _:12, 2:2, _:62>>} = ping(),
    ?assert(Sent >= Before andalso Ms >= Before andalso Ms =< erlang:system_time(millisecond)),
    NodeId = <<7:256>>,
    Evidence = crypto:hash(sha256, NodeId),
    ?assertMatch(#{station_id := NodeId, puzzle_evidence := Evidence, realms := [],
                   addresses := [], site := undefined, endorsements := []},
                 macula_frame:connect(#{node_id => NodeId})),
    ?assertMatch(#{station_id := <<8:256>>}, macula_frame:hello(#{
        node_id => NodeId, station_id => <<8:256>>, accepted => true,
        negotiated_capabilities => 0})),
    [?assertError({bad_frame, {bad_field, [frame_type], _}},
                  macula_frame:ping(#{nonce => <<5:128>>, frame_type => Type}))
     || Type <- [pong, undefined, 7]],
    ?assertEqual(ping, maps:get(frame_type, macula_frame:ping(ping()))),
    ?assertError({bad_frame, not_a_map}, macula_frame:ping(not_a_map)),
    %% Older callers do not send a token.
    Call = macula_frame:call(#{call_id => <<0:128>>, procedure => <<"p">>, realm => <<0:256>>,
                               payload => #{}, deadline_ms => 1, caller => NodeId}),
    ?assertMatch(#{ucan_token := <<>>, source_route := <<>>, retry_budget := 0}, Call),
    ?assertEqual(ok, macula_frame:check_frame(maps:remove(ucan_token, Call))),
    ?assertMatch(#{reason := operator_stop, detail := <<"bye">>},
                 macula_frame:goodbye(operator_stop, <<"bye">>)),
    ?assertMatch(#{code := 12, name := tombstoned},
                 macula_frame:error(#{call_id => <<0:128>>, code => 12,
                                      reported_by => <<0:256>>})).

%% Every type, with every field of every kind: what is built is what arrives.
%% Counted in reductions, which no busy machine changes: the encoder looks at the payload, once.
constructors_do_not_walk_through_payloads(_Config) ->
    Reductions = fun(Payload) ->
        reductions(fun() -> macula_frame:result(#{call_id => <<0:128>>, payload => Payload,
                                                  responded_by => <<0:256>>}) end)
    end,
    Small = Reductions(0),
    [?assert(Reductions(Large) < Small + 500)
     || Large <- [lists:seq(1, 10_000), maps:from_list([{N, N} || N <- lists:seq(1, 10_000)])]],
    ?assert(Small < 2_000),
    %% What has no place on the wire is told when it is to go there, or on request.
    Frame = macula_frame:result(#{call_id => <<0:128>>, payload => self(), responded_by => <<0:256>>}),
    ?assertEqual({error, {bad_field, [payload], bad_type}}, macula_frame:check_frame(Frame)),
    ?assertEqual({error, {not_encodable, bad_type}}, macula_frame:try_encode(Frame)).

a_category_is_found_at_once(_Config) ->
    Types = macula_frame:types(),
    _ = macula_frame:category(connect),
    [?assert(reductions(fun() -> [macula_frame:category(Type) || _ <- lists:seq(1, 1000)] end) < 20_000)
     || Type <- [hd(Types), lists:last(Types), {text, <<"novelty">>}]].

reductions(Fun) ->
    _ = Fun(),
    {reductions, Before} = process_info(self(), reductions),
    _ = Fun(),
    {reductions, After} = process_info(self(), reductions),
    After - Before.

every_type_round_trips(_Config) ->
    Id = macula_identity:generate(),
    Public = macula_identity:public(Id),
    Types = macula_frame:types(),
    ?assertEqual(47, length(Types)),
    [begin
        Frame = example(Type),
        ?assertEqual(ok, macula_frame:check_frame(Frame)),
        Signed = macula_frame:sign(Frame, Id),
        {ok, Decoded, <<>>} = macula_frame:decode(macula_frame:encode(Signed)),
        ?assertEqual(Signed, Decoded),
        ?assertEqual({ok, Decoded}, macula_frame:verify(Decoded, Public)),
        [?assertEqual(maps:get(Field, Frame), macula_frame:get(Field, Decoded))
         || {Field, _, _} <- macula_frame:fields(Type), Field =/= signature]
     end || Type <- Types],
    ?assertError({no_such_field, ping, topic}, macula_frame:get(topic, ping())),
    ?assertError({missing_field, [nonce]}, macula_frame:get(nonce, maps:remove(nonce, ping()))).

example(Type) ->
    Fields = [{Name, example_of(Kind)} || {Name, Kind, _} <- macula_frame:fields(Type),
                                          Name =/= signature, Name =/= frame_type],
    macula_frame:new(Type, maps:from_list(Fields)).

example_of({bytes, Size}) -> crypto:strong_rand_bytes(Size);
example_of(bytes) -> <<"some bytes">>;
example_of(uint) -> 16#FFFFFFFFFFFFFFFF;
example_of({uint, Max}) -> Max;
example_of(int) -> -16#FFFFFFFFFFFFFFFF;
example_of(bool) -> true;
example_of({enum, Names}) -> lists:last(Names);
example_of({name, []}) -> {text, <<"a reason">>};
example_of({name, Names}) -> hd(Names);
example_of({array, Kind}) -> [example_of(Kind), example_of(Kind)];
example_of({array, Kind, _}) -> [example_of(Kind)];
example_of({map, Fields}) -> maps:from_list([{Name, example_of(Kind)} || {Name, Kind, _} <- Fields]);
example_of(map) -> #{{text, <<"host">>} => <<"h">>, 1 => -1.5};
example_of(any) -> [#{}, <<>>, {text, <<>>}, undefined, 0];
example_of({null_or, Kind}) -> example_of(Kind);
example_of({map_or, [Name]}) -> Name.

terms_without_a_place_on_the_wire(_Config) ->
    [?assertEqual({error, {not_encodable, Why}}, macula_frame:try_encode(result(Term)))
     || {Term, Why} <- [{self(), bad_type}, {make_ref(), bad_type}, {fun() -> ok end, bad_type},
                        {{a, b}, bad_type}, {{}, bad_type}, {<<1:3>>, bad_type},
                        {[1 | 2], improper_list}, {1 bsl 64, integer_range},
                        {-(1 bsl 64) - 1, integer_range}, {{text, <<255>>}, bad_text},
                        {#{1.0 => 1}, bad_key}, {#{[] => 1}, bad_key},
                        {#{a => 1, {text, <<"a">>} => 1}, duplicate_key}]],
    ?assertError({bad_frame, {not_encodable, bad_type}}, macula_frame:encode(result(self()))),
    %% Names beyond Latin-1, which OTP 25 gives no direct access to.
    Name = binary_to_atom(<<"日本"/utf8>>),
    {ok, #{payload := {text, <<"日本"/utf8>>}}, <<>>} =
        macula_frame:decode(macula_frame:encode(result(Name))),
    [begin
        {ok, #{payload := Decoded}, <<>>} = macula_frame:decode(macula_frame:encode(result(N))),
        ?assertEqual(N, Decoded)
     end || N <- [0, 23, 24, 255, 256, 65535, 65536, 1 bsl 32, 1 bsl 63, (1 bsl 64) - 1, -1, -24,
                  -25, -256, -257, -(1 bsl 63), -(1 bsl 63) - 1, -(1 bsl 64), 1.0e300, -0.0]].

depth_is_bounded(_Config) ->
    %% The frame itself is the first container.
    Deep = fun(N) -> lists:foldl(fun(_, Acc) -> [Acc] end, [], lists:seq(2, N)) end,
    Frame = result(Deep(63)),
    {ok, Decoded, <<>>} = macula_frame:decode(macula_frame:encode(Frame)),
    ?assertEqual(Deep(63), maps:get(payload, Decoded)),
    ?assertEqual({error, {not_encodable, too_deep}}, macula_frame:try_encode(result(Deep(64)))),
    ?assertMatch({error, {bad_field, _, too_deep}}, macula_frame:check_frame(result(Deep(64)))),
    Bomb = <<16#a1, 16#61, $a, (binary:copy(<<16#81>>, 10_000_000))/binary, 0>>,
    ?assertEqual({error, {bad_frame, too_deep}},
                 macula_frame:decode(<<(byte_size(Bomb)):32, Bomb/binary>>)).

large_frames(_Config) ->
    Id = macula_identity:generate(),
    Public = macula_identity:public(Id),
    [begin
        {ok, Wire} = macula_frame:sign_encode(result(Payload, Id), Id),
        {ok, Decoded, {ok, Public}, <<>>} = macula_frame:decode_verify(Wire, Public, #{}),
        ?assertEqual(Payload, maps:get(payload, Decoded)),
        ?assertEqual(Wire, macula_frame:encode(Decoded)),
        ?assertMatch({ok, _}, macula_frame:verify(Decoded, Public))
     end || Payload <- [crypto:strong_rand_bytes(N) || N <- [15_000, 17_000, 70_000, 16_000_000]]
                       ++ [lists:seq(1, N) || N <- [4_000, 5_000, 300_000]]
                       ++ [maps:from_list([{N, []} || N <- lists:seq(1, 100_000)])]],
    %% The largest length there is, and one byte more.
    Overhead = byte_size(macula_frame:encode(macula_frame_SUITE_block(
        binary:copy(<<0>>, 70_000)))) - 70_000,
    Largest = 16#FFFFFF + 4 - Overhead,
    {ok, <<16#FFFFFF:32, _/binary>>} =
        macula_frame:try_encode(macula_frame_SUITE_block(binary:copy(<<0>>, Largest))),
    ?assertEqual({error, frame_too_large}, macula_frame:try_encode(
        macula_frame_SUITE_block(binary:copy(<<0>>, Largest + 1)))).

%% Of the greatest frames there are, those that would cost most: what a peer sends is refused before
%% the memory is taken. In a virtual machine that does nothing else, as what others take would count.
memory_is_bounded_before_judgement(_Config) ->
    Peaks = macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        macula_test_nodes:call(Node, ?MODULE, bound_memory, [], 60000)
    end),
    [ct:pal("~p: ~.1f times the frame", [Why, Times]) || {Why, Times} <- Peaks].

%% The peaks of what is refused, in multiples of the frame.
bound_memory() ->
    Frame = fun(Payload) ->
        Body = <<16#a1, 16#61, $p, Payload/binary>>,
        <<(byte_size(Body)):32, Body/binary>>
    end,
    Size = 16#FFFFFF - 10,
    Container = fun(Head, Members, Bytes) -> <<Head, Members:32, Bytes/binary>> end,
    N = Size div 2,
    Last = Size div 6,
    Distinct = << <<16#1a, (Last - I):32, 0>> || I <- lists:seq(1, Last - 1) >>,
    Peaks = [begin
        Wire = Frame(Payload),
        {Result, Peak} = peak(fun() -> macula_frame:decode(Wire, Opts) end),
        ?assertEqual({Why, {error, {bad_frame, Why}}}, {Why, Result}),
        ?assertMatch({_, Real, _} when Real =< Times, {Why, Peak / byte_size(Wire), Times}),
        {Why, Peak / byte_size(Wire)}
     end || {Why, Opts, Payload, Times} <- [
        {too_many_terms, #{}, Container(16#ba, N, binary:copy(<<0>>, 2 * N)), 1},
        {duplicate_key, #{max_terms => 16#FFFFFFFF}, Container(16#ba, N, binary:copy(<<0>>, 2 * N)), 5},
        {duplicate_key, #{max_terms => 16#FFFFFFFF},
         Container(16#ba, Last, <<Distinct/binary, 16#1a, 1:32, 0>>), 3},
        {too_many_terms, #{}, Container(16#9a, Size, binary:copy(<<0>>, Size)), 1},
        {too_many_terms, #{}, Container(16#9a, Size, binary:copy(<<16#60>>, Size)), 1},
        {too_many_terms, #{}, Container(16#9a, Size, binary:copy(<<16#a0>>, Size)), 1},
        {too_many_terms, #{}, Container(16#ba, Last - 1, Distinct), 1}]],
    %% What is allowed costs no more than three times the allowance.
    Most = 64 * 1024 * 1024,
    Zeros = Most div 16 - 1000,
    Allowed = Frame(Container(16#9a, Zeros, binary:copy(<<0>>, Zeros))),
    {Length, Peak} = peak(fun() ->
        {ok, #{{text, <<"p">>} := List}, <<>>} = macula_frame:decode(Allowed),
        length(List)
    end),
    ?assertEqual(Zeros, Length),
    ?assert(Peak =< 3 * Most),
    %% The bound is the caller's, too.
    ?assertMatch({error, {bad_frame, too_many_terms}}, macula_frame:decode(Allowed, #{max_terms => 1000})),
    ?assertMatch({ok, _, <<>>}, macula_frame:decode(Allowed, #{max_terms => 2 * Most})),
    ?assertEqual({error, {bad_option, max_terms, 0}}, macula_frame:decode(Allowed, #{max_terms => 0})),
    Peaks.

%% What a call takes at its peak beyond what was there before, in another process, whose memory goes
%% with it. Where the system does not tell, nothing is measured.
peak(Fun) ->
    erlang:garbage_collect(),
    Before = case file:write_file("/proc/self/clear_refs", "5") of
        ok -> status("VmRSS");
        {error, _} -> unknown
    end,
    {Pid, Ref} = spawn_monitor(fun() -> exit({done, Fun()}) end),
    Result = receive {'DOWN', Ref, process, Pid, {done, R}} -> R end,
    case Before of
        unknown -> {Result, 0};
        _ -> {Result, max(0, status("VmHWM") - Before)}
    end.

status(Name) ->
    {ok, Text} = file:read_file("/proc/self/status"),
    {match, [Kilobytes]} = re:run(Text, Name ++ ":\\s+(\\d+) kB", [{capture, all_but_first, list}]),
    list_to_integer(Kilobytes) * 1024.

%% The bound counts no less than the virtual machine does, whatever the frame is made of.
the_memory_of_terms_is_not_underrated(_Config) ->
    [begin
        Wire = macula_frame:encode(result(Payload)),
        {ok, Decoded, <<>>} = macula_frame:decode(Wire),
        Real = erts_debug:flat_size(Decoded) * erlang:system_info(wordsize),
        ?assertEqual({error, {bad_frame, too_many_terms}},
                     macula_frame:decode(Wire, #{max_terms => Real - 1})),
        %% Nor is it so much more that it would be in the way.
        ?assertMatch({ok, _, _}, macula_frame:decode(Wire, #{max_terms => 2 * Real + 2000 + byte_size(Wire)}))
     end || Payload <- [0, 1 bsl 59, -(1 bsl 59) - 1, (1 bsl 64) - 1, 1.5, <<>>, <<0:512>>, <<0:520>>,
                        [], lists:seq(1, 1000), lists:duplicate(1000, {text, <<>>}),
                        lists:duplicate(1000, #{}), lists:duplicate(1000, <<1>>), <<0:80000>>,
                        lists:duplicate(100, <<0:(65 * 8)>>),
                        lists:duplicate(300, #{name => {text, <<"value">>}, n => 1})]
                       ++ [maps:from_list([{I, I} || I <- lists:seq(1, N)])
                           || N <- [1, 31, 32, 33, 34, 40, 64, 100, 1000, 10_000, 100_000]]].

%% While one process works on the largest frames, another must be scheduled as if nothing were
%% there, on a node with a single scheduler.
long_calls_do_not_hold_a_scheduler(_Config) ->
    Ids = lists:seq(1, 1_000_000),
    Frame = result([Ids, binary:copy(<<0>>, 8_000_000)]),
    Id = macula_identity:generate(),
    {ok, Wire} = macula_frame:sign_encode(Frame, Id),
    Old = erlang:system_flag(schedulers_online, 1),
    Flags = [{long_schedule, 50}],
    erlang:system_monitor(self(), Flags),
    try
        {Worker, Ref} = spawn_monitor(fun() ->
            {ok, _} = macula_frame:sign_encode(Frame, Id),
            {ok, Again, <<>>} = macula_frame:decode(Wire),
            {ok, _} = macula_frame:try_encode(Again)
        end),
        receive {'DOWN', Ref, process, Worker, Reason} -> ?assertEqual(normal, Reason) end,
        %% The monitor's message is sent when the schedule ends, which is before the exit.
        receive {monitor, Worker, long_schedule, Info} -> ct:fail(Info) after 0 -> ok end
    after
        erlang:system_monitor(undefined),
        erlang:system_flag(schedulers_online, Old)
    end.

%% What is short on the wire may be many terms: those that cost most for a byte are not left to a
%% normal scheduler, and come out the same.
short_frames_may_be_much_work(_Config) ->
    _ = macula_frame:encode(ping()),
    Table = persistent_term:get(macula_frame),
    Short = fun(Wire) -> macula_nif:frame_parse(Table, Wire, 0, none,
                                                     {tagged, 16#ffffff, 16#ffffffff, false}) end,
    [begin
        Wire = macula_frame:encode(result(Payload)),
        ?assert(byte_size(Wire) < 8192),
        ?assertEqual({[], 0, large}, Short(Wire)),
        {[#{payload := Payload}, #{payload := Payload}], <<>>} =
            macula_frame:parse_stream(<<Wire/binary, Wire/binary>>)
     end || Payload <- [lists:duplicate(7_500, #{}), lists:duplicate(7_500, <<>>),
                        lists:duplicate(7_500, 0), lists:duplicate(2_500, #{0 => 0}),
                        maps:from_list([{N, 0} || N <- lists:seq(1, 1_900)])]],
    %% Ordinary ones are taken together, up to what one call may do.
    Ordinary = binary:copy(macula_frame:encode(result(lists:seq(1, 100))), 200),
    {Items, Next, again} = Short(Ordinary),
    ?assert(length(Items) > 10),
    ?assert(Next < byte_size(Ordinary)),
    ?assertEqual(200, length(element(1, macula_frame:parse_stream(Ordinary)))),
    %% A list is too long for a short call before all of it has been walked through.
    Long = lists:duplicate(1_000_000, 0),
    All = {true, true, 16#ffffffff},
    ?assertEqual(large, macula_nif:frame_encode(Table, result(Long), All)),
    ?assertEqual(large, macula_nif:frame_encode(Table, result(Long ++ improper), All)),
    ?assertEqual({error, {not_encodable, improper_list}},
                 macula_frame:try_encode(result(Long ++ improper))).

%% A seed among the arguments of a failed call would stand in its report.
a_wrong_argument_shows_no_key(_Config) ->
    Seed = crypto:strong_rand_bytes(32),
    Key = #{private => Seed},
    Calls = [fun() -> macula_frame:sign(not_a_map, Key) end,
             fun() -> macula_frame:sign(ping(), Key#{public => <<0:256>>}) end,
             fun() -> macula_frame:sign(result(self()), Key) end,
             fun() -> macula_frame:sign_encode(not_a_map, Key) end,
             fun() -> macula_frame:sign_encode(ping(), Key#{public => <<0:256>>}) end,
             fun() -> macula_frame:sign_encode(ping(), Key, #{text => 1}) end,
             fun() -> macula_frame:sign_encode_many([not_a_map], Key) end,
             fun() -> macula_frame:sign_encode_many(not_a_list, Key) end,
             fun() -> macula_frame:sign_encode_many([ping() | not_a_list], Key) end,
             fun() -> macula_frame:sign_publisher(not_a_map, Key) end,
             fun() -> macula_frame:sign_publisher(#{topic => self()}, Key) end,
             fun() -> macula_frame:sign_update(not_a_map, Key) end,
             fun() -> macula_identity:sign(<<"text">>, Key) end,
             fun() -> macula_identity:public(Key) end,
             fun() -> macula_identity:to_pem(Key) end,
             fun() -> macula_identity:seed(Key) end,
             fun() -> macula_identity:save(Key, "key") end],
    [begin
        Told = try Call() of Result -> Result catch Class:Why:Stack -> {Class, Why, Stack} end,
        Text = iolist_to_binary(io_lib:format("~0p", [Told])),
        ?assertEqual(nomatch, binary:match(Text, iolist_to_binary(io_lib:format("~0p", [Seed]))))
     end || Call <- Calls],
    {ok, Wire} = macula_frame:sign_encode(ping(), Key),
    {ok, Id} = macula_identity:from_seed(Seed),
    Public = macula_identity:public(Id),
    ?assertMatch({ok, _, {ok, Public}, <<>>}, macula_frame:decode_verify(Wire, Public, #{})),
    ?assertEqual({error, bad_identity}, macula_frame:sign_encode(ping(), <<"no identity">>)).

parse_stream_takes_frames_apart(_Config) ->
    Frames = [result(N) || N <- lists:seq(1, 500)] ++ [result(binary:copy(<<0>>, 50_000)),
                                                      result(last)],
    Wires = [macula_frame:encode(Frame) || Frame <- Frames],
    Decoded = [Frame || Wire <- Wires, {ok, Frame, <<>>} <- [macula_frame:decode(Wire)]],
    Stream = iolist_to_binary(Wires),
    ?assertEqual({Decoded, <<>>}, macula_frame:parse_stream(Stream)),
    ?assertEqual({Decoded, <<0, 0>>}, macula_frame:parse_stream(<<Stream/binary, 0, 0>>)),
    ?assertEqual({[], <<>>}, macula_frame:parse_stream(<<>>)),
    ?assertEqual({error, frame_too_large, Decoded},
                 macula_frame:parse_stream(<<Stream/binary, 1:8, 0:24>>)),
    ?assertEqual({error, {bad_frame, not_a_map}, Decoded},
                 macula_frame:parse_stream(<<Stream/binary, 1:32, 0>>)),
    ?assertMatch({error, frame_too_large, [_]},
                 macula_frame:parse_stream(<<(hd(Wires))/binary, (lists:nth(501, Wires))/binary>>,
                                           #{max => 40_000})),
    {Items, <<>>, {more, 4}} = macula_frame:parse(Stream, <<0:256>>, #{}),
    ?assertEqual([{error, unsigned}], lists:usort([Verdict || {_, Verdict} <- Items])).

batches_keep_order_and_errors(_Config) ->
    Id = macula_identity:generate(),
    Frames = [case N rem 50 of
                  0 -> result(self());
                  25 -> result(binary:copy(<<N>>, 40_000));
                  _ -> result(N)
              end || N <- lists:seq(1, 200)],
    ?assertEqual([macula_frame:sign_encode(Frame, Id) || Frame <- Frames],
                 macula_frame:sign_encode_many(Frames, Id)),
    ?assertEqual([], macula_frame:sign_encode_many([], Id)).

wrong_options_are_named(_Config) ->
    Wire = macula_frame:encode(ping()),
    [?assertEqual({error, {bad_option, Key, Why}}, macula_frame:decode(Wire, Opts))
     || {Opts, Key, Why} <- [{#{texts => existing}, texts, unknown}, {#{text => atoms}, text, atoms},
                             {#{max => -1}, max, -1}, {#{max => 16#1000000}, max, 16#1000000}]],
    ?assertEqual({error, {bad_option, max, x}, []}, macula_frame:parse_stream(Wire, #{max => x})),
    [?assertEqual({error, {bad_option, Key, Why}},
                  macula_frame:sign_encode(ping(), macula_identity:generate(), Opts))
     || {Opts, Key, Why} <- [{#{text => 1}, text, unknown}, {#{text_undefined => 1}, text_undefined, 1},
                             {#{newer_terms => 1}, newer_terms, 1}, {#{max_terms => 0}, max_terms, 0}]],
    ?assertEqual({error, {bad_option, newer_terms, no}}, macula_frame:try_encode(ping(), #{newer_terms => no})).

signers_by_type(_Config) ->
    [Peer, Other] = [macula_identity:public(macula_identity:generate()) || _ <- [1, 2]],
    Named = #{call => caller, result => responded_by, stream_reply => responded_by,
              error => reported_by, publish => publisher, stream_open => caller,
              stream_data => signer, stream_end => signer, stream_error => signer,
              connect => node_id, hello => node_id},
    [begin
        Frame = example(Type),
        case Named of
            #{Type := Field} ->
                ?assertEqual(Other, macula_frame:signer(Frame#{Field => Other}, Peer));
            #{} ->
                ?assertEqual(Peer, macula_frame:signer(Frame, Peer))
        end
     end || Type <- macula_frame:types()],
    Data = maps:remove(signer, example(stream_data)),
    ?assertEqual(Peer, macula_frame:signer(Data, Peer)),
    ?assertEqual(undefined, macula_frame:signer(Data#{signer => <<1>>}, Peer)).

the_catalogue_is_printed(_Config) ->
    Text = unicode:characters_to_binary(macula_frame:catalogue()),
    [?assertMatch({_, _}, binary:match(Text, <<"## ", (atom_to_binary(Type))/binary, "\n">>))
     || Type <- macula_frame:types()],
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    Root = filename:dirname(filename:dirname(filename:dirname(Source))),
    {ok, Page} = file:read_file(filename:join([Root, "docs", "reference", "frames.md"])),
    ?assertMatch({_, _}, binary:match(Page, Text)).

ping() ->
    macula_frame:ping(#{nonce => <<5:128>>}).

result(Payload) ->
    Frame = macula_frame:result(#{call_id => <<1:128>>, payload => 0, responded_by => <<0:256>>}),
    Frame#{payload => Payload}.

result(Payload, Id) ->
    (result(Payload))#{responded_by => macula_identity:public(Id)}.
