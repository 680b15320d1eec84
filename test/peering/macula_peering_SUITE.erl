%% Links between peers, seen from outside: over real sockets, against peers that behave and peers,
%% made of bare QUIC, that do not.
-module(macula_peering_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(LOCAL, {127, 0, 0, 1}).
-define(WAIT, 15000).
%% In so much time a peer on a busy machine has read what has arrived.
-define(READ_MS, 200).
-define(receive_(Pattern, Result),
        receive Pattern -> Result after ?WAIT -> ct:fail({nothing, ??Pattern, messages()}) end).
-define(receive_(Pattern), ?receive_(Pattern, ok)).

all() ->
    [{group, conversation}, {group, misbehaviour}, {group, trust}, {group, ends}, {group, api}].

groups() ->
    [{conversation, [], [frames_travel_both_ways, a_close_is_a_farewell, the_close_of_a_station_is_seen,
        frames_that_share_a_read_with_connect_are_kept,
        frames_that_share_a_read_with_hello_are_kept, hello_travels_alone,
        hello_travels_alone_though_it_is_lost, the_wait_for_hello_is_bounded,
        senders_wait_until_hello_has_travelled, frames_before_connect_are_skipped,
        the_largest_frame_travels, frames_keep_their_order_through_loss,
        dedicated_streams_go_both_ways, dedicated_streams_obey_the_links_options,
        a_frame_cut_short_is_no_end, a_stream_lost_amid_a_frame_tells_of_the_loss,
        streams_opened_in_the_handshake_wait,
        odd_payloads_keep_the_link, odd_payloads_keep_a_dedicated_stream,
        what_old_peers_cannot_decode_is_not_sent, what_would_be_refused_for_its_memory_is_not_sent,
        text_undefined_is_not_sent, encoded_frames_are_sent_as_they_are]},
     {misbehaviour, [], [a_connect_with_a_wrong_signature_is_refused,
        a_connect_that_is_malformed_is_refused, a_hello_with_a_wrong_signature_is_refused,
        a_hello_of_another_node_is_refused, a_length_beyond_the_limit_ends_the_link,
        bytes_that_are_no_frame_end_the_link, a_frame_without_a_type_ends_the_link,
        odd_claims_do_not_reach_the_owner,
        unknown_types_are_delivered, unsigned_frames_are_delivered_by_default,
        verdicts_are_reported, what_is_not_signed_is_dropped_on_request,
        the_end_of_the_control_stream_is_seen, a_reset_of_the_control_stream_is_seen,
        a_second_stream_is_not_the_control_stream, a_server_that_gets_hello_closes,
        a_client_that_gets_connect_closes, a_refusal_is_reported,
        a_refusal_with_a_code_that_is_none_is_refused,
        a_connect_of_one_byte_a_time_is_read, a_connect_that_never_ends_times_out,
        an_unknown_peer_may_send_little, nothing_is_verified_for_an_unknown_peer,
        a_newer_handshake_gets_a_plain_reason,
        silent_peers_are_let_go, an_unknown_peer_costs_little_memory]},
     {trust, [], [a_wrong_pin_fails, a_wrong_node_id_without_a_pin_fails, older_names_of_trust_are_taken,
        older_names_that_contradict_are_refused, a_dial_may_take_for_ever,
        a_replayed_connect_is_refused, a_stale_connect_is_refused_on_request,
        a_clock_an_hour_behind_is_tolerated, rules_decide_who_may_link,
        a_rule_that_fails_refuses, a_rule_that_fails_is_seen, reports_are_seen_with_the_default_handler,
        log_events_have_no_domain, a_rule_does_not_outlive_its_worker,
        a_wide_window_is_covered_by_the_cache, a_key_is_in_no_report, an_unsolved_puzzle_is_refused_on_request,
        the_newest_link_of_a_node_is_kept, handshakes_are_capped,
        silent_peers_keep_nobody_out, a_peer_just_come_is_not_cut_short]},
     {ends, [], [a_killed_worker_is_reported_once, every_state_survives_a_kill,
        a_failed_watcher_misses_no_end, the_death_of_the_owner_ends_the_link,
        a_lost_connection_is_reported, a_link_lost_amid_a_frame_tells_of_the_loss,
        a_killed_node_is_noticed, a_peer_that_stays_is_left,
        a_close_of_a_link_whose_peer_is_gone_is_at_once,
        a_farewell_that_waited_for_credit_ends_the_link_at_once,
        an_exit_signal_is_a_failure_of_the_worker, a_dial_does_not_outlive_its_owner,
        a_close_during_the_dial_ends_it, a_close_before_the_link_stands_gives_its_reason, a_dial_to_nobody_fails, stopping_the_application_says_goodbye,
        nothing_is_left_behind]},
     {api, [], [peers_are_listed_and_described,
        what_a_peer_claims_does_not_burden_senders, a_slow_peer_makes_senders_wait,
        credit_stops_and_resumes_delivery, frames_before_a_loss_are_delivered,
        subscribers_get_what_they_ask_for, a_link_that_ends_still_knows_its_subscribers,
        a_wrong_filter_is_named, only_a_listener_is_closed,
        what_answers_no_close_gives_an_error_at_once,
        the_address_is_where_the_peer_is_now, a_link_given_away_is_not_given_again,
        control_changes_hands, wrong_options_are_named, wrong_options_of_a_target_are_named_at_once,
        wrong_options_of_every_call_are_named_at_once, what_may_be_right_later_is_the_dials_error,
        an_accept_that_fails_leaves_nothing, the_reason_of_a_server_that_closes_at_once_is_told,
        the_accept_owner_is_told_on_either_side,
        a_farewell_under_way_survives_the_shutdown, a_farewell_at_the_shutdown_leaves_hello_alone,
        a_dialer_that_waits_tells_of_the_shutdown, a_link_that_is_kept_tells_of_the_shutdown,
        an_upgrade_asks_the_supervisors_again, a_killed_dialer_takes_its_link_along,
        what_is_wrong_is_told_to_the_caller, only_a_connection_is_accepted,
        an_owner_that_subscribes_gets_each_frame_once, a_window_outlives_the_replay_process,
        an_idle_link_keeps_little_of_a_large_frame, without_the_application_it_says_so, a_lost_link_is_dialled_again,
        a_link_that_ends_as_soon_as_it_stands_is_dialled_less_and_less,
        any_factor_ends_at_the_longest_delay, a_dialer_gives_up_and_closes, sending_to_nobody_says_so, reasons_have_words]}].

init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(macula),
    Config.

end_per_suite(_Config) ->
    application:stop(macula).

init_per_testcase(_Case, Config) ->
    {ok, _} = application:ensure_all_started(macula),
    Config.

end_per_testcase(_Case, _Config) ->
    %% What a case leaves would be another's messages; the application's end takes it all.
    application:stop(macula).

%%% Helpers

messages() ->
    {messages, Messages} = process_info(self(), messages),
    Messages.

id() ->
    {ok, Id} = macula_identity:generate(#{puzzle_bits => 0}),
    Id.

pub(Id) ->
    macula_identity:public(Id).

listen(Opts) ->
    Id = maps:get(identity, Opts, id()),
    {ok, L} = macula_peering:listen(maps:merge(#{identity => Id, port => 0, address => ?LOCAL},
                                               Opts)),
    {ok, {_, Port}} = macula_peering:sockname(L),
    {L, Id, Port}.

target(Port, ServerId) ->
    #{host => "127.0.0.1", port => Port, node_id => pub(ServerId)}.

connect(Port, ServerId, Opts) ->
    {ok, C} = macula_peering:connect(maps:merge(
        #{identity => id(), target => target(Port, ServerId)}, Opts)),
    C.

%% A linked pair: client's worker, server's worker.
pair() -> pair(#{}, #{}).
pair(ClientOpts, ListenOpts) ->
    {L, ServerId, Port} = listen(ListenOpts),
    C = connect(Port, ServerId, ClientOpts),
    ?receive_({macula_peering, connected, C, _}),
    S = receive {macula_peering, connected, P, _} when P =/= C -> P after ?WAIT -> ct:fail(messages()) end,
    {C, S, L}.

ping(N) ->
    macula_frame:ping(#{nonce => <<N:128>>}).

%% Unchecked, so that what cannot be sent can be tried.
result(Payload) ->
    (macula_frame:result(#{call_id => <<0:128>>, payload => 0, responded_by => <<0:256>>}))#{
        payload => Payload}.

nonce(#{nonce := <<N:128>>}) -> N.

frame(Pid) ->
    ?receive_({macula_peering, frame, Pid, Frame}, Frame).

disconnected(Pid) when is_pid(Pid) ->
    Reason = ?receive_({macula_peering, disconnected, Pid, Why}, Why),
    ?assertNot(is_process_alive(Pid)),
    Reason.

%% Exactly once: the watching process has nothing more to say of this one.
once(Pid) ->
    _ = sys:get_state(macula_peering_links),
    receive {macula_peering, disconnected, Pid, Again} -> ct:fail({twice, Again}) after 0 -> ok end.

%% A peer of bare QUIC that dials.
raw_dial(Port) ->
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{alpn, ["macula"]}, {verify, verify_none}],
                                     ?WAIT),
    {ok, Stream} = macula_quic:open_stream(Conn),
    hold([Conn, Stream]),
    {Conn, Stream}.

%% Handles that nobody holds are collected, and what they name is closed.
hold(Handles) ->
    [put(Handle, held) || Handle <- Handles].

connect_frame(Id) -> connect_frame(Id, #{}).
connect_frame(Id, Extra) ->
    macula_frame:sign(maps:merge(macula_frame:connect(#{
        node_id => pub(Id), station_id => pub(Id),
        puzzle_evidence => macula_identity:puzzle_evidence(Id)}), Extra), Id).

hello_frame(Id, Extra) ->
    macula_frame:sign(maps:merge(macula_frame:hello(#{
        node_id => pub(Id), station_id => pub(Id), accepted => true,
        negotiated_capabilities => 0}), Extra), Id).

wire(Frame) -> macula_frame:encode(Frame).

%% A raw dialler that has completed the handshake, and the server's worker for it.
raw_client(Port, Id) ->
    {Conn, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, wire(connect_frame(Id))),
    {hello, _} = raw_frame(Stream),
    NodeId = pub(Id),
    S = ?receive_({macula_peering, connected, Pid, NodeId}, Pid),
    {Conn, Stream, S}.

raw_frame(Stream) ->
    {ok, <<Length:32>>} = macula_quic:recv(Stream, 4, ?WAIT),
    {ok, Body} = macula_quic:recv(Stream, Length, ?WAIT),
    {ok, Frame, <<>>} = macula_frame:decode(<<Length:32, Body/binary>>),
    {macula_frame:frame_type(Frame), Frame}.

%% A station of bare QUIC: its listener, port and identity.
raw_listen() ->
    Id = id(),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(pub(Id), macula_identity:seed(Id), []),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, [{cert, Cert}, {key, Key}, {alpn, ["macula"]}]),
    {ok, {_, Port}} = macula_quic:sockname(L),
    hold([L]),
    {L, Id, Port}.

%% Accepts one dialler up to its CONNECT.
raw_accept(L) ->
    {ok, Conn} = macula_quic:accept(L, ?WAIT),
    {ok, Stream} = macula_quic:accept_stream(Conn, #{}, ?WAIT),
    hold([Conn, Stream]),
    {connect, _} = raw_frame(Stream),
    {Conn, Stream}.

raw_server(Opts) ->
    {L, Id, Port} = raw_listen(),
    C = connect(Port, Id, Opts),
    {Conn, Stream} = raw_accept(L),
    {L, Id, C, Conn, Stream}.

%% The other side sees its connection closed with code 0, and no byte before that.
closed_without_a_word(Conn, Stream) ->
    ok = macula_quic:setopt(Stream, active, true),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    receive {quic, Bytes, Stream, _} when is_binary(Bytes) -> ct:fail(Bytes) after 0 -> ok end.

%%% Conversation

frames_travel_both_ways(_) ->
    {C, S, _} = pair(),
    ok = macula_peering:send_frame(C, ping(1)),
    ok = macula_peering:send_frame(S, ping(2)),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual(2, nonce(frame(C))),
    %% In order, from several senders each.
    [spawn_link(fun() ->
        [ok = macula_peering:send_frame(C, ping(Sender * 1000 + N)) || N <- lists:seq(1, 200)]
     end) || Sender <- lists:seq(1, 5)],
    Got = [nonce(frame(S)) || _ <- lists:seq(1, 1000)],
    [?assertEqual(lists:seq(Sender * 1000 + 1, Sender * 1000 + 200),
                  [N || N <- Got, N div 1000 =:= Sender]) || Sender <- lists:seq(1, 5)].

a_close_is_a_farewell(_) ->
    {C, S, _} = pair(),
    [ok = macula_peering:send_frame(C, ping(N)) || N <- lists:seq(1, 100)],
    ok = macula_peering:close(C, app_liveness_lost),
    %% Everything sent before arrives, then the farewell, then the end.
    ?assertEqual(lists:seq(1, 100), [nonce(frame(S)) || _ <- lists:seq(1, 100)]),
    ?assertMatch(#{frame_type := goodbye, reason := app_liveness_lost}, frame(S)),
    ?assertEqual(drained, disconnected(C)),
    ?assertEqual(peer_closed, disconnected(S)),
    once(C), once(S),
    ?assertEqual({error, not_connected}, macula_peering:send_frame(C, ping(1))).

the_close_of_a_station_is_seen(_) ->
    {L, _, C, Conn, Stream} = raw_server(#{}),
    Id = id(),
    ok = macula_quic:send(Stream, wire(hello_frame(Id, #{}))),
    %% The station's key is pinned, so this HELLO of another is refused.
    ?assertMatch({peer_identity_mismatch, _, _}, disconnected(C)),
    _ = macula_quic:close_connection(Conn),
    ok = macula_quic:close_listener(L).

frames_that_share_a_read_with_connect_are_kept(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    {_, Stream} = raw_dial(Port),
    Frames = [macula_frame:sign(ping(N), Id) || N <- lists:seq(1, 50)],
    ok = macula_quic:send(Stream, [wire(F) || F <- [connect_frame(Id) | Frames]]),
    S = ?receive_({macula_peering, connected, Pid, _}, Pid),
    ?assertEqual(lists:seq(1, 50), [nonce(frame(S)) || _ <- Frames]).

frames_that_share_a_read_with_hello_are_kept(_) ->
    {_, Id, C, _, Stream} = raw_server(#{}),
    Frames = [macula_frame:sign(ping(N), Id) || N <- lists:seq(1, 50)],
    ok = macula_quic:send(Stream, [wire(F) || F <- [hello_frame(Id, #{}) | Frames]]),
    ?receive_({macula_peering, connected, C, _}),
    ?assertEqual(lists:seq(1, 50), [nonce(frame(C)) || _ <- Frames]).

%% What the peer reads together with HELLO must be HELLO alone, though frames are sent as soon as
%% the link stands, and though packets are lost on the way.
hello_travels_alone(_) ->
    Sender = spawn_link(fun Loop() ->
        receive {macula_peering, connected, Pid, _} ->
            spawn_link(fun() -> [macula_peering:send_frame(Pid, ping(N)) || N <- [1, 2, 3]] end)
        after 0 -> ok end,
        receive
            {macula_peering, _, _, _} = M when element(2, M) =/= connected -> Loop()
        after 1 -> Loop() end
    end),
    {_, _, Port} = listen(#{controlling_pid => Sender, hello_gap_ms => ?READ_MS}),
    {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}, delay_ms => 10, loss => 0.0}),
    [begin
        Id = id(),
        {Conn, Stream} = raw_dial(Via),
        ok = macula_quic:setopt(Stream, active, true),
        ok = macula_quic:send(Stream, wire(connect_frame(Id))),
        First = ?receive_({quic, Bytes, Stream, _} when is_binary(Bytes), Bytes),
        ?assertMatch({ok, #{frame_type := hello}, <<>>}, macula_frame:decode(First)),
        {ok, #{nonce := <<1:128>>}, _} =
            macula_frame:decode(?receive_({quic, Bytes2, Stream, _} when is_binary(Bytes2), Bytes2)),
        ok = macula_quic:close_connection(Conn)
     end || _ <- lists:seq(1, 5), Via <- [Port, macula_relay:port(Relay)]],
    unlink(Sender),
    exit(Sender, kill),
    ok = macula_relay:stop(Relay).

%% Whoever accepts sends at once; the first read of the peer holds HELLO and nothing else, however
%% often HELLO was lost, since an older peer drops what comes with it.
hello_travels_alone_though_it_is_lost(_) ->
    {_, _, Port} = listen(#{hello_gap_ms => ?READ_MS}),
    %% Longer than any round trip, and several retransmissions.
    [begin
        {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}}),
        {_, Stream} = raw_dial(macula_relay:port(Relay)),
        ok = macula_quic:setopt(Stream, active, true),
        ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
        Id = id(),
        NodeId = pub(Id),
        ok = macula_quic:send(Stream, wire(connect_frame(Id))),
        S = ?receive_({macula_peering, connected, Pid, NodeId}, Pid),
        spawn_link(fun() ->
            [ok = macula_peering:send_frame(S, ping(N), #{timeout => infinity}) || N <- [1, 2, 3]]
        end),
        receive after Ms -> ok end,
        ?assertMatch({ok, #{status := held}}, macula_peering:peer_info(S)),
        ok = macula_relay:set(Relay, #{down => #{blackhole => false}}),
        hello_alone(Stream),
        ok = macula_relay:stop(Relay)
     end || Ms <- [100, 400, 1000]],
    %% And as chance has it. Where it has it that acknowledgements are lost in a row, the next try comes
    %% twice as late each time; without any, frames go out when the handshake's time is over (30 s).
    {ok, Lossy} = macula_relay:start_link(#{target => {?LOCAL, Port}, delay_ms => 5, seed => 3}),
    [begin
        ok = macula_relay:set(Lossy, #{loss => 0}),
        {Conn, Stream} = raw_dial(macula_relay:port(Lossy)),
        ok = macula_quic:setopt(Stream, active, true),
        ok = macula_relay:set(Lossy, #{loss => 0.3}),
        Id = id(),
        NodeId = pub(Id),
        ok = macula_quic:send(Stream, wire(connect_frame(Id))),
        S = receive {macula_peering, connected, Pid, NodeId} -> Pid
            after 45000 -> ct:fail({no_connect, messages()}) end,
        spawn_link(fun() -> macula_peering:send_frame(S, ping(1), #{timeout => infinity}) end),
        hello_alone(Stream),
        ok = macula_quic:close_connection(Conn)
     end || _ <- lists:seq(1, 20)],
    ok = macula_relay:stop(Lossy).

hello_alone(Stream) ->
    First = receive {quic, Bytes, Stream, _} when is_binary(Bytes) -> Bytes
            after 45000 -> ct:fail({no_hello, messages()}) end,
    ?assertMatch({ok, #{frame_type := hello}, <<>>}, macula_frame:decode(First)),
    {ok, #{nonce := <<1:128>>}, _} = macula_frame:decode(
        receive {quic, More, Stream, _} when is_binary(More) -> More
        after 45000 -> ct:fail({no_frame, messages()}) end).

the_wait_for_hello_is_bounded(_) ->
    {_, _, Soon} = listen(#{handshake_timeout_ms => 5000}),
    {_, _, Late} = listen(#{handshake_timeout_ms => 60000, drain_timeout_ms => 400}),
    Held = fun(Port) ->
        {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}}),
        {_, Stream} = raw_dial(macula_relay:port(Relay)),
        ok = macula_relay:set(Relay, #{down => #{blackhole => true}}),
        ok = macula_quic:send(Stream, wire(connect_frame(id()))),
        S = ?receive_({macula_peering, connected, Pid, _}, Pid),
        {S, Relay}
    end,
    {S1, _} = Held(Soon),
    ?assertEqual({error, timeout}, macula_peering:send_frame(S1, ping(1), #{timeout => 200})),
    ok = macula_peering:send_frame(S1, ping(1), #{timeout => ?WAIT}),
    %% A close, and the death of the owner, wait no longer than a drain may take.
    {S2, _} = Held(Late),
    {Took, drained} = timer:tc(fun() -> ok = macula_peering:close(S2), disconnected(S2) end),
    ?assert(Took < 30_000_000, Took),
    {S3, Relay3} = Held(Late),
    Owner = spawn(fun() -> receive never -> ok end end),
    ok = macula_peering:subscribe(S3, self()),
    ok = macula_peering:controlling_process(S3, Owner),
    exit(Owner, kill),
    ok = macula_relay:set(Relay3, #{down => #{blackhole => false}}),
    ?assertEqual(owner_down, disconnected(S3)).

senders_wait_until_hello_has_travelled(_) ->
    %% Long enough for a busy machine to look while they wait.
    {_, _, Port} = listen(#{hello_gap_ms => 12_000}),
    Id = id(),
    {_, Stream, S} = raw_client(Port, Id),
    ?assertEqual({error, busy}, macula_peering:send_frame(S, ping(0), #{timeout => 0})),
    ?assertEqual({error, timeout}, macula_peering:send_frame(S, ping(0), #{timeout => 10})),
    Self = self(),
    spawn_link(fun() -> Self ! {sent, macula_peering:send_frame(S, ping(1))} end),
    %% The peer's own frame ends the waiting.
    ok = macula_quic:send(Stream, wire(macula_frame:sign(ping(9), Id))),
    ?receive_({sent, ok}),
    ?assertEqual(9, nonce(frame(S))),
    {ping, #{nonce := <<1:128>>}} = raw_frame(Stream),
    %% So does a stream that the peer opens; one that we open waits.
    {Conn3, _, S3} = raw_client(Port, id()),
    spawn_link(fun() -> Self ! {opened, macula_peering:open_stream(S3)} end),
    receive {opened, Early} -> ct:fail(Early) after 50 -> ok end,
    {ok, Third} = macula_quic:open_stream(Conn3),
    hold([Third]),
    ok = macula_quic:send(Third, wire(ping(1))),
    ?receive_({opened, {ok, _}}),
    ?receive_({macula_peering, new_dedicated_stream, S3, _}),
    %% And so does the time, for a farewell too.
    {_, _, Port2} = listen(#{hello_gap_ms => 500}),
    {_, Stream2, S2} = raw_client(Port2, id()),
    ok = macula_peering:close(S2),
    {goodbye, _} = raw_frame(Stream2),
    ok.

frames_before_connect_are_skipped(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    {_, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, [wire(ping(N)) || N <- lists:seq(1, 100)]),
    ok = macula_quic:send(Stream, [wire(macula_frame:goodbye(operator_stop)),
                                   wire((ping(1))#{frame_type => {text, <<"novelty">>}})]),
    ok = macula_quic:send(Stream, wire(connect_frame(Id))),
    S = ?receive_({macula_peering, connected, Pid, _}, Pid),
    ok = macula_quic:send(Stream, wire(ping(7))),
    ?assertEqual(7, nonce(frame(S))).

the_largest_frame_travels(_) ->
    {C, S, _} = pair(),
    Payload = crypto:strong_rand_bytes(16#FFFFFF - 400),
    [ok = macula_peering:send_frame(C, Frame, #{timeout => ?WAIT})
     || Frame <- [result(Payload), ping(1)]],
    ?assertEqual(Payload, maps:get(payload, frame(S))),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual({error, frame_too_large},
                 macula_peering:send_frame(C, result(<<Payload/binary, 0:4000>>))).

frames_keep_their_order_through_loss(_) ->
    {_, ServerId, Port} = listen(#{}),
    {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}, loss => 0.05, delay_ms => 1,
                                            seed => 7}),
    C = connect(macula_relay:port(Relay), ServerId, #{}),
    S = receive {macula_peering, connected, P, _} when P =/= C -> P after ?WAIT -> ct:fail(messages()) end,
    ?receive_({macula_peering, connected, C, _}),
    N = count("MACULA_LOSSY_FRAMES", 30000),
    spawn_link(fun() ->
        [ok = macula_peering:send_frame(C, ping(I), #{timeout => infinity}) || I <- lists:seq(1, N)]
    end),
    in_order(S, 1, N),
    ok = macula_peering:close(C),
    ?assertMatch(#{frame_type := goodbye}, frame(S)),
    ?assertEqual(drained, disconnected(C)),
    ok = macula_relay:stop(Relay).

in_order(_, I, N) when I > N -> ok;
in_order(S, I, N) ->
    receive {macula_peering, frame, S, #{nonce := <<I:128>>}} -> in_order(S, I + 1, N)
    after 30000 -> ct:fail({stuck, I, erlang:process_info(self(), message_queue_len)}) end.

count(Name, Default) ->
    list_to_integer(os:getenv(Name, integer_to_list(Default))).

%% What the options say of frames that arrive holds for them as for the control stream, on either side.
dedicated_streams_obey_the_links_options(_) ->
    Options = #{verify_frames => #{dht => require, rpc => report}, unknown_types => drop,
                max_frame => 1000, text => existing},
    Novelty = (ping(0))#{frame_type => {text, <<"novelty">>}},
    [begin
        {ok, Out} = macula_peering:open_stream(From),
        [ok = macula_quic:send(macula_peering_stream:handle(Out), wire(Frame))
         || Frame <- [ping(1), macula_frame:sign(ping(2), id()), Novelty]],
        ok = macula_peering_stream:send(Out, ping(3)),
        ok = macula_peering_stream:send(Out, result({text, <<"true">>})),
        {ok, In} = macula_peering_stream:from(
            To, ?receive_({macula_peering, new_dedicated_stream, To, H}, H)),
        {ok, Before} = macula_peering:peer_info(To),
        {ok, #{nonce := <<3:128>>}, {ok, _}, In2} = macula_peering_stream:recv(In, ?WAIT),
        {ok, #{payload := true}, {error, signature_invalid}, In3} =
            macula_peering_stream:recv(In2, ?WAIT),
        {ok, After} = macula_peering:peer_info(To),
        ?assertEqual({5, 2}, {maps:get(K1, After) - maps:get(K1, Before),
                              maps:get(K2, After) - maps:get(K2, Before)}),
        ok = macula_peering_stream:send(Out, result(<<0:8000>>)),
        ?assertEqual({error, frame_too_large}, macula_peering_stream:recv(In3, ?WAIT)),
        %% The stream is over, and the link is not.
        ?assertEqual({error, {reset, 0}}, macula_peering_stream:recv(Out, ?WAIT)),
        ok = macula_peering:send_frame(From, ping(4)),
        ?receive_({macula_peering, frame, To, #{nonce := <<4:128>>}, #{verdict := {ok, _}}})
     end || {From, To} <- both(pair(Options, Options)),
            {K1, K2} <- [{frames_in, frames_rejected}]],
    {C, S, _} = pair(#{unknown_types => close}, #{unknown_types => close}),
    {ok, Out4} = macula_peering:open_stream(C),
    ok = macula_quic:send(macula_peering_stream:handle(Out4), wire(Novelty)),
    {ok, In4} = macula_peering_stream:from(
        S, ?receive_({macula_peering, new_dedicated_stream, S, H4}, H4)),
    ?assertEqual({error, {unknown_type, {text, <<"novelty">>}}},
                 macula_peering_stream:recv(In4, ?WAIT)).

both({C, S, _}) -> [{C, S}, {S, C}].

a_frame_cut_short_is_no_end(_) ->
    {C, S, _} = pair(),
    [begin
        {ok, Out} = macula_peering:open_stream(C),
        ok = macula_quic:send(macula_peering_stream:handle(Out), Cut, #{fin => true}),
        {ok, In} = macula_peering_stream:from(
            S, ?receive_({macula_peering, new_dedicated_stream, S, H}, H)),
        ?assertEqual({error, Why}, macula_peering_stream:recv(In, ?WAIT))
     end || {Cut, Why} <- [{<<0, 0>>, {bad_frame, truncated}}, {<<0, 0, 0, 10>>, {bad_frame, truncated}},
                           {<<0, 0, 0, 10, 1>>, {bad_frame, truncated}}]].

%% The peer did nothing wrong: its connection is gone, before or while a frame is waited for.
a_stream_lost_amid_a_frame_tells_of_the_loss(_) ->
    [begin
        {C, S, L} = pair(),
        {ok, Out} = macula_peering:open_stream(C),
        hold([macula_peering_stream:handle(Out)]),
        ok = macula_quic:send(macula_peering_stream:handle(Out), Cut),
        %% What is short comes in one packet, with which the stream is there.
        {ok, In} = macula_peering_stream:from(
            S, ?receive_({macula_peering, new_dedicated_stream, S, H}, H)),
        {timeout, In2} = macula_peering_stream:recv(In, 0),
        Self = self(),
        Recv = fun() -> Self ! {got, macula_peering_stream:recv(In2, ?WAIT)} end,
        Lose = fun() ->
            lose(How, C, S),
            _ = disconnected(C),
            disconnected(S)
        end,
        case When of
            before -> Lose(), Recv();
            while -> spawn_link(Recv), Lose()
        end,
        Got = ?receive_({got, Answer}, Answer),
        case How of
            killed -> ?assertMatch({Cut, When, {error, {connection_lost, _}}}, {Cut, When, Got});
            _ -> ?assertEqual({Cut, When, {error, {connection_lost, lost_by(How)}}}, {Cut, When, Got})
        end,
        ok = macula_peering:close_listener(L)
     end || Cut <- [<<0, 0>>, <<0, 0, 0, 10>>, <<0, 0, 0, 10, 1>>], How <- [peer, own, killed],
            When <- [before, while]].

lose(peer, C, _) -> close_under(C, <<"gone">>);
lose(own, _, S) -> close_under(S, <<"gone">>);
lose(killed, C, _) -> exit(C, kill).

lost_by(peer) -> {application_close, 7, <<"gone">>};
lost_by(own) -> closed.

%% The connection of a link, whose worker has not asked for it.
close_under(Link, Reason) ->
    {ok, #{conn := Conn}} = macula_peering_links:find(Link),
    ok = macula_quic:close_connection(Conn, 7, Reason).

dedicated_streams_go_both_ways(_) ->
    {C, S, _} = pair(),
    [begin
        {ok, Out} = macula_peering:open_stream(From),
        ok = macula_peering_stream:send(Out, ping(1)),
        Handle = ?receive_({macula_peering, new_dedicated_stream, To, H}, H),
        {ok, In} = macula_peering_stream:from(To, Handle),
        {ok, #{nonce := <<1:128>>}, {ok, _}, In2} = macula_peering_stream:recv(In, ?WAIT),
        {timeout, In3} = macula_peering_stream:recv(In2, 0),
        ok = macula_peering_stream:send(In3, result(binary:copy(<<0>>, 100_000)), ?WAIT),
        {ok, #{frame_type := result}, {error, _}, Out2} = macula_peering_stream:recv(Out, infinity),
        ok = macula_peering_stream:finish(Out2),
        {error, closed} = macula_peering_stream:recv(In3, ?WAIT),
        ok = macula_peering_stream:finish(In3),
        %% A cancel is a reset.
        {ok, Out4} = macula_peering:open_stream(From),
        ok = macula_peering_stream:send(Out4, ping(2)),
        {ok, In4} = macula_peering_stream:from(
            To, ?receive_({macula_peering, new_dedicated_stream, To, H4}, H4)),
        {ok, _, _, In5} = macula_peering_stream:recv(In4, ?WAIT),
        ok = macula_peering_stream:cancel(Out4, 5),
        {error, {reset, 5}} = macula_peering_stream:recv(In5, ?WAIT)
     end || {From, To} <- [{C, S}, {S, C}]],
    %% What has no type is no frame here either.
    [begin
        {ok, #{handle := Raw} = Out7} = macula_peering:open_stream(C),
        ok = macula_quic:send(Raw, wire(Untyped)),
        {ok, In7} = macula_peering_stream:from(
            S, ?receive_({macula_peering, new_dedicated_stream, S, H7}, H7)),
        ?assertEqual({error, no_frame_type}, macula_peering_stream:recv(In7, ?WAIT)),
        ?assertEqual({error, {reset, 0}}, macula_peering_stream:recv(Out7, ?WAIT))
     end || Untyped <- [#{}, (ping(1))#{frame_type => 7}, (ping(1))#{frame_type => undefined}]],
    %% The control stream was not disturbed.
    ok = macula_peering:send_frame(C, ping(3)),
    ?assertEqual(3, nonce(frame(S))),
    %% A node that takes none refuses them.
    {C2, _, _} = pair(#{}, #{dedicated_streams => refuse}),
    {ok, Out6} = macula_peering:open_stream(C2),
    ok = macula_peering_stream:send(Out6, ping(1)),
    ?assertMatch({error, {reset, 0}}, macula_peering_stream:recv(Out6, ?WAIT)).

streams_opened_in_the_handshake_wait(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    {Conn, Stream} = raw_dial(Port),
    Others = [begin {ok, O} = macula_quic:open_stream(Conn, #{active => true}), O end
              || _ <- lists:seq(1, 12)],
    hold(Others),
    [ok = macula_quic:send(O, wire(macula_frame:sign(ping(1), Id))) || O <- Others],
    [?receive_({quic, peer_send_aborted, _, 0}) || _ <- lists:seq(1, 4)],
    ok = macula_quic:send(Stream, wire(connect_frame(Id))),
    S = ?receive_({macula_peering, connected, Pid, _}, Pid),
    %% A few are kept, the rest refused; HELLO came on the first.
    {hello, _} = raw_frame(Stream),
    [?receive_({macula_peering, new_dedicated_stream, S, _}) || _ <- lists:seq(1, 8)],
    _ = sys:get_state(S),
    receive {macula_peering, new_dedicated_stream, S, _} -> ct:fail(too_many) after 0 -> ok end,
    ok.

%% A frame with these as its payload, signed, as peers that allow more would send it.
odd_wires(Id) ->
    Marker = <<"here it stands">>,
    Good = macula_frame:encode((result(Marker))#{responded_by => pub(Id)}),
    <<_:32, Body/binary>> = Good,
    [{Why, begin
        New = binary:replace(Body, <<16#4e, Marker/binary>>, Odd),
        <<(byte_size(New)):32, New/binary>>
     end} || {Why, Odd} <- [
        {bad_key, <<16#a1, 16#41, 255, 0>>}, {bad_key, <<16#a1, 16#80, 0>>}, {bad_text, <<16#61, 255>>},
        {bad_text, <<16#a1, 16#61, 255, 0>>}, {too_deep, <<(binary:copy(<<16#81>>, 70))/binary, 0>>},
        {duplicate_key, <<16#a2, 0, 0, 0, 0>>}, {unsupported_item, <<16#f5>>},
        {unsupported_item, <<16#c0, 0>>}, {not_finite, <<16#fb, 16#7f, 16#f0, 0:48>>},
        {too_many_terms, <<16#9a, 10_000:32, 0:80_000>>}]].

odd_payloads_keep_the_link(_) ->
    Id = id(),
    Wires = odd_wires(Id),
    N = length(Wires),
    {C, S, _} = pair(#{}, #{max_terms => 100_000}),
    [begin
        ok = macula_peering:send_frame(C, Wire),
        ok = macula_peering:send_frame(C, ping(I))
     end || {I, {_, Wire}} <- lists:enumerate(Wires)],
    ?assertEqual(lists:seq(1, N), [nonce(frame(S)) || _ <- Wires]),
    ?assertMatch({ok, #{frames_rejected := N, frames_in := In}} when In =:= 2 * N,
                 macula_peering:peer_info(S)),
    %% The owner may have them as they came, each for one of its credit.
    {C2, S2, _} = pair(#{}, #{max_terms => 100_000, bad_frames => deliver, active => 1}),
    [begin
        ok = macula_peering:send_frame(C2, Wire),
        ?receive_({macula_peering, bad_frame, S2, #{reason := Why, bytes := Wire}}),
        ?receive_({macula_peering, passive, S2, undefined}),
        ok = macula_peering:setopts(S2, [{active, once}])
     end || {Why, Wire} <- Wires],
    %% Or have the link ended.
    [begin
        {C3, S3, _} = pair(#{}, #{max_terms => 100_000, bad_frames => close}),
        ok = macula_peering:send_frame(C3, Wire),
        ?assertEqual({protocol_error, {bad_frame, Why}}, disconnected(S3))
     end || {Why, Wire} <- [hd(Wires), lists:last(Wires)]].

odd_payloads_keep_a_dedicated_stream(_) ->
    [begin
        {C, S, _} = pair(#{}, #{max_terms => 100_000, bad_frames => Mode}),
        {ok, Out} = macula_peering:open_stream(C),
        [ok = macula_quic:send(macula_peering_stream:handle(Out), Wire)
         || {_, Wire} <- odd_wires(id())],
        ok = macula_peering_stream:send(Out, ping(3)),
        {ok, In} = macula_peering_stream:from(
            S, ?receive_({macula_peering, new_dedicated_stream, S, H}, H)),
        {Bad, Last} = (fun Next(Stream, Before) ->
            case macula_peering_stream:recv(Stream, ?WAIT) of
                {bad_frame, #{reason := Why, bytes := Bytes}, Stream2} ->
                    Next(Stream2, [{Why, byte_size(Bytes)} | Before]);
                Other ->
                    {lists:reverse(Before), Other}
            end
        end)(In, []),
        case Mode of
            drop -> ?assertEqual([], Bad);
            deliver -> ?assertEqual([{W, byte_size(B)} || {W, B} <- odd_wires(id())], Bad);
            close -> ok
        end,
        case Mode of
            close -> ?assertEqual({error, {bad_frame, bad_key}}, Last);
            _ -> ?assertMatch({ok, #{nonce := <<3:128>>}, _, _}, Last)
        end
     end || Mode <- [drop, deliver, close]].

%% Decoders of older peers stop at them for good, without a word.
what_old_peers_cannot_decode_is_not_sent(_) ->
    {C, S, _} = pair(),
    {ok, Out} = macula_peering:open_stream(C),
    Odd = [{float, 1.5}, {float, [#{a => 0.0}]}, {negative_integer, -1}, {negative_integer, [-(1 bsl 64)]},
           {integer_key, #{0 => 1}}, {integer_key, #{-1 => 1}}],
    [begin
        Error = {error, {not_encodable, Why}},
        ?assertEqual(Error, macula_peering:send_frame(C, result(Payload))),
        ?assertEqual(Error, macula_peering_stream:send(Out, result(Payload))),
        %% What another has signed stands as much in their way.
        ?assertEqual(Error, macula_peering:send_frame(C, macula_frame:sign(result(Payload), id()))),
        ?assert(is_binary(unicode:characters_to_binary(macula_frame:explain(element(2, Error)))))
     end || {Why, Payload} <- Odd],
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertEqual(1, nonce(frame(S))),
    ?assertMatch({error, {bad_option, site, float}},
                 macula_peering:listen(#{identity => id(), port => 0, site => #{a => 1.5}})),
    {C2, S2, _} = pair(#{newer_terms => allow, site => #{a => 1.5}}, #{}),
    [begin
        ok = macula_peering:send_frame(C2, result(Payload)),
        ?assertMatch(#{frame_type := result}, frame(S2))
     end || {_, Payload} <- Odd].

%% Or a peer of this kind would drop it.
what_would_be_refused_for_its_memory_is_not_sent(_) ->
    {C, S, _} = pair(#{max_terms => 100_000}, #{}),
    ?assertEqual({error, {not_encodable, too_many_terms}},
                 macula_peering:send_frame(C, result(lists:duplicate(10_000, 0)))),
    %% What a sender lets through a receiver with the same bound takes.
    {C2, S2, _} = pair(#{max_terms => 100_000}, #{max_terms => 100_000}),
    [begin
        Most = (fun Search(Low, High) when High - Low =< 1 -> Low;
                    Search(Low, High) ->
                        Middle = (Low + High) div 2,
                        case macula_frame:sign_encode(result(Many(Middle)), id(), #{max_terms => 100_000}) of
                            {ok, _} -> Search(Middle, High);
                            {error, {not_encodable, too_many_terms}} -> Search(Low, Middle)
                        end
                end)(0, 100_000),
        ?assert(Most > 100),
        ok = macula_peering:send_frame(C2, result(Many(Most))),
        ?assertMatch(#{frame_type := result}, frame(S2))
     end || Many <- [fun(N) -> lists:duplicate(N, 0) end, fun(N) -> lists:duplicate(N, {text, <<"word">>}) end,
                     fun(N) -> lists:duplicate(N, topic) end, fun(N) -> lists:duplicate(N, <<0:200>>) end,
                     fun(N) -> maps:from_list([{integer_to_binary(I), I} || I <- lists:seq(1, N)]) end,
                     fun(N) -> lists:duplicate(N, #{topic => 1}) end]],
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertEqual(1, nonce(frame(S))).

text_undefined_is_not_sent(_) ->
    {C, S, _} = pair(),
    ?assertEqual({error, {not_encodable, text_undefined}},
                 macula_peering:send_frame(C, result({text, <<"undefined">>}))),
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertEqual(1, nonce(frame(S))),
    {C2, S2, _} = pair(#{text_undefined => allow}, #{verify_frames => report}),
    ok = macula_peering:send_frame(C2, (result({text, <<"undefined">>}))#{
        responded_by => element(2, hd([P || P <- macula_peering:peers(), element(1, P) =:= S2]))}),
    ?receive_({macula_peering, frame, S2, #{payload := {text, <<"undefined">>}},
               #{verdict := {ok, _}}}).

encoded_frames_are_sent_as_they_are(_) ->
    {C, S, _} = pair(),
    Signed = macula_frame:sign(ping(5), id()),
    ok = macula_peering:send_frame(C, wire(Signed)),
    ok = macula_peering:send_frame(C, Signed),
    ?assertEqual(Signed, frame(S)),
    ?assertEqual(Signed, frame(S)),
    [?assertEqual({error, {not_encodable, Why}}, macula_peering:send_frame(C, Bad))
     || {Bad, Why} <- [{<<>>, not_a_frame}, {<<0:32>>, not_a_frame}, {<<5:32, 0>>, not_a_frame},
                       {ping, not_a_map}, {#{a => 1}, no_frame_type},
                       {#{frame_type => undefined}, no_frame_type},
                       {(ping(1))#{a => self()}, bad_type}]],
    %% What was refused has not harmed the link.
    ok = macula_peering:send_frame(C, ping(6)),
    ?assertEqual(6, nonce(frame(S))),
    {ok, #{frames_out := 3, bytes_out := Bytes}} = macula_peering:peer_info(C),
    ?assertMatch({ok, #{frames_in := 3, bytes_in := Bytes}}, macula_peering:peer_info(S)).

%%% Misbehaviour: the rows of the table of errors

a_connect_with_a_wrong_signature_is_refused(_) ->
    {_, _, Port} = listen(#{accept_owner => self()}),
    Good = connect_frame(id()),
    [begin
        {Conn, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, wire(Bad)),
        closed_without_a_word(Conn, Stream),
        ?receive_({macula_peering, disconnected, _, {connect_verify_failed, signature_invalid}})
     end || Bad <- [Good#{capabilities => 1}, Good#{node_id => pub(id())},
                    Good#{signature => <<0:512>>}]],
    receive {macula_peering, What, _, _} when What =/= disconnected -> ct:fail(What) after 0 -> ok end.

a_connect_that_is_malformed_is_refused(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    Good = connect_frame(Id),
    Resigned = fun(Changed) -> macula_frame:sign(Changed, Id) end,
    [begin
        {Conn, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, wire(Bad)),
        closed_without_a_word(Conn, Stream),
        ?receive_({macula_peering, disconnected, _, {connect_verify_failed, Why}})
     end || {Bad, Why} <- [{Good#{node_id => <<1>>}, bad_frame},
                           {Good#{signature => <<1>>}, bad_frame},
                           {maps:remove(signature, Good), bad_frame},
                           {maps:remove(node_id, Good), bad_frame},
                           {Resigned(maps:remove(station_id, Good)), {bad_frame, station_id}},
                           {Resigned(Good#{station_id => <<1>>}), {bad_frame, station_id}},
                           {Resigned(Good#{realms => undefined}), {bad_frame, realms}},
                           {Resigned(Good#{realms => lists:duplicate(1025, 0)}),
                            {bad_frame, realms}},
                           {Resigned(Good#{capabilities => -1}), {bad_frame, capabilities}}]].

a_hello_with_a_wrong_signature_is_refused(_) ->
    [begin
        {_, Id, C, Conn, Stream} = raw_server(#{}),
        Good = hello_frame(Id, #{}),
        ok = macula_quic:send(Stream, wire(Change(Good, Id))),
        ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
        ?assertEqual({hello_verify_failed, Why}, disconnected(C)),
        once(C)
     end || {Change, Why} <- [{fun(F, _) -> F#{capabilities => 1} end, signature_invalid},
                              {fun(F, _) -> F#{node_id => <<1>>} end, bad_frame},
                              {fun(F, _) -> maps:remove(signature, F) end, bad_frame},
                              {fun(F, Id) -> macula_frame:sign(F#{accepted => {text, <<"maybe">>}}, Id) end,
                               {bad_frame, accepted}},
                              {fun(F, Id) -> macula_frame:sign(maps:remove(station_id, F), Id) end,
                               {bad_frame, station_id}}]].

a_hello_of_another_node_is_refused(_) ->
    {_, Id, C, Conn, Stream} = raw_server(#{}),
    Other = id(),
    ok = macula_quic:send(Stream, wire(hello_frame(Other, #{}))),
    ?assertEqual({peer_identity_mismatch, pub(Id), pub(Other)}, disconnected(C)),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    %% Nor may another refuse in its name.
    {_, Id2, C2, _, Stream2} = raw_server(#{}),
    ok = macula_quic:send(Stream2, wire(hello_frame(Other, #{accepted => false}))),
    ?assertEqual({peer_identity_mismatch, pub(Id2), pub(Other)}, disconnected(C2)).

a_length_beyond_the_limit_ends_the_link(_) ->
    {_, _, Port} = listen(#{}),
    %% In the handshake, where less is allowed.
    [begin
        {Conn, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, <<Length:32>>),
        ?receive_({macula_peering, disconnected, _, {protocol_error, frame_too_large}}),
        ?receive_({quic, shutdown, Conn, _})
     end || Length <- [65533, 16#1000000, 16#FFFFFFFF]],
    %% And later, after frames that were well formed.
    {Conn2, Stream2, S} = raw_client(Port, id()),
    ok = macula_quic:send(Stream2, [wire(ping(1)), <<16#1000000:32>>]),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual({protocol_error, frame_too_large}, disconnected(S)),
    ?receive_({quic, shutdown, Conn2, {application_close, 0, _}}),
    once(S).

bytes_that_are_no_frame_end_the_link(_) ->
    {_, _, Port} = listen(#{}),
    {Conn, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, <<2:32, 16#bf, 16#ff>>),
    ?receive_({macula_peering, disconnected, _, {protocol_error, {bad_frame, indefinite_length}}}),
    ?receive_({quic, shutdown, Conn, _}),
    [begin
        {Conn2, Stream2, S} = raw_client(Port, id()),
        ok = macula_quic:send(Stream2, [wire(ping(1)), Bytes]),
        ?assertEqual(1, nonce(frame(S))),
        ?assertMatch({protocol_error, {bad_frame, _}}, disconnected(S)),
        ?receive_({quic, shutdown, Conn2, _})
     end || Bytes <- [<<0:32>>, <<1:32, 255>>, <<2:32, 16#a0, 0>>, <<1:32, 16#80>>]].

a_frame_without_a_type_ends_the_link(_) ->
    {_, _, Port} = listen(#{}),
    {_, Stream, S} = raw_client(Port, id()),
    ok = macula_quic:send(Stream, [wire(ping(1)), <<1:32, 16#a0>>]),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual({protocol_error, no_frame_type}, disconnected(S)),
    {_, Stream2} = raw_dial(Port),
    ok = macula_quic:send(Stream2, <<1:32, 16#a0>>),
    ?receive_({macula_peering, disconnected, _, {protocol_error, no_frame_type}}),
    %% A type that is no text is none.
    [begin
        Wire = wire((ping(1))#{frame_type => Type}),
        {_, Stream3, S3} = raw_client(Port, id()),
        ok = macula_quic:send(Stream3, Wire),
        ?assertEqual({protocol_error, no_frame_type}, disconnected(S3)),
        {_, Stream4} = raw_dial(Port),
        ok = macula_quic:send(Stream4, Wire),
        ?receive_({macula_peering, disconnected, _, {protocol_error, no_frame_type}})
     end || Type <- [undefined, 7, <<"ping">>, [], #{}, 1.5]].

%% What CONNECT says of the dialler is nobody's to trust, but has the types that are promised.
odd_claims_do_not_reach_the_owner(_) ->
    {_, _, Port} = listen(#{}),
    Linked = fun(Extra) ->
        {_, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, wire(connect_frame(id(), Extra))),
        receive
            {macula_peering, connected, S, _} ->
                {ok, #{realms := Realms, addresses := Addresses}} = macula_peering:peer_info(S),
                {Realms, Addresses};
            {macula_peering, disconnected, _, Reason} ->
                Reason
        after ?WAIT ->
            ct:fail(messages())
        end
    end,
    Address = #{host => <<"h">>},
    ?assertMatch({[<<1:256>>], []}, Linked(#{realms => [<<1:256>>], addresses => 7})),
    {[], Addresses} = Linked(#{addresses => [7, Address, {text, <<"a">>}, []]}),
    ?assertMatch([Map] when is_map(Map), Addresses),
    [?assertEqual({connect_verify_failed, {bad_frame, realms}}, Linked(#{realms => Realms}))
     || Realms <- [7, [7], [<<1:256>>, undefined], #{}]].

unknown_types_are_delivered(_) ->
    Novel = (ping(1))#{frame_type => {text, <<"novelty">>}},
    {C, S, _} = pair(),
    ok = macula_peering:send_frame(C, Novel),
    ?assertMatch(#{frame_type := {text, <<"novelty">>}}, frame(S)),
    {C2, S2, _} = pair(#{}, #{unknown_types => drop}),
    ok = macula_peering:send_frame(C2, Novel),
    ok = macula_peering:send_frame(C2, ping(2)),
    ?assertEqual(2, nonce(frame(S2))),
    {C3, S3, _} = pair(#{}, #{unknown_types => close}),
    ok = macula_peering:send_frame(C3, Novel),
    ?assertEqual({protocol_error, {unknown_type, {text, <<"novelty">>}}}, disconnected(S3)).

unsigned_frames_are_delivered_by_default(_) ->
    {C, S, _} = pair(),
    ok = macula_peering:send_frame(C, wire(ping(1))),
    ok = macula_peering:send_frame(C, macula_frame:sign(ping(2), id())),
    ?assertEqual([1, 2], [nonce(frame(S)) || _ <- [1, 2]]).

verdicts_are_reported(_) ->
    Id = id(),
    {C, S, _} = pair(#{identity => Id}, #{verify_frames => #{dht => report, rpc => report}}),
    Public = pub(Id),
    ok = macula_peering:send_frame(C, wire(ping(1))),
    ok = macula_peering:send_frame(C, macula_frame:sign(ping(2), id())),
    ok = macula_peering:send_frame(C, ping(3)),
    Relayed = id(),
    ok = macula_peering:send_frame(C, macula_frame:sign((result(4))#{responded_by => pub(Relayed)},
                                                        Relayed)),
    Verdicts = [?receive_({macula_peering, frame, S, _, #{verdict := V, category := K, peer := Public}}, {K, V})
                || _ <- lists:seq(1, 4)],
    ?assertEqual([{dht, {error, unsigned}}, {dht, {error, signature_invalid}}, {dht, {ok, Public}},
                  {rpc, {ok, pub(Relayed)}}], Verdicts),
    %% Other categories come as ever.
    ok = macula_peering:send_frame(C, macula_frame:plumtree_prune(#{realm => <<0:256>>})),
    ?assertMatch(#{frame_type := plumtree_prune}, frame(S)).

what_is_not_signed_is_dropped_on_request(_) ->
    {C, S, _} = pair(#{}, #{verify_frames => require}),
    ok = macula_peering:send_frame(C, wire(ping(1))),
    ok = macula_peering:send_frame(C, macula_frame:sign(ping(2), id())),
    ok = macula_peering:send_frame(C, ping(3)),
    ?receive_({macula_peering, frame, S, #{nonce := <<3:128>>}, #{verdict := {ok, _}}}),
    ?assertMatch({ok, #{frames_rejected := 2, frames_in := 3}}, macula_peering:peer_info(S)).

the_end_of_the_control_stream_is_seen(_) ->
    {_, _, Port} = listen(#{}),
    {Conn, Stream, S} = raw_client(Port, id()),
    ok = macula_quic:send(Stream, wire(ping(1)), #{fin => true}),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual(peer_closed, disconnected(S)),
    once(S),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    %% In the handshake too.
    {_, Stream2} = raw_dial(Port),
    ok = macula_quic:send(Stream2, <<0, 0>>, #{fin => true}),
    ?receive_({macula_peering, disconnected, _, peer_closed}).

a_reset_of_the_control_stream_is_seen(_) ->
    {_, _, Port} = listen(#{}),
    {_, Stream, S} = raw_client(Port, id()),
    ok = macula_quic:async_shutdown_stream(Stream, abort_send, 77),
    ?assertEqual({stream_reset, 77}, disconnected(S)),
    {_, Stream2, S2} = raw_client(Port, id()),
    ok = macula_quic:async_shutdown_stream(Stream2, abort_receive, 78),
    ?assertEqual({stream_stopped, 78}, disconnected(S2)).

a_second_stream_is_not_the_control_stream(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    {Conn, Stream} = raw_dial(Port),
    {ok, Second} = macula_quic:open_stream(Conn),
    hold([Second]),
    %% The first opened is seen last.
    ok = macula_quic:send(Second, wire(macula_frame:sign(ping(1), Id))),
    ok = macula_quic:send(Stream, wire(connect_frame(Id))),
    {hello, _} = raw_frame(Stream),
    S = ?receive_({macula_peering, connected, Pid, _}, Pid),
    Handle = ?receive_({macula_peering, new_dedicated_stream, S, H}, H),
    {ok, In} = macula_peering_stream:from(S, Handle),
    {ok, #{nonce := <<1:128>>}, _, _} = macula_peering_stream:recv(In, ?WAIT).

a_server_that_gets_hello_closes(_) ->
    {_, _, Port} = listen(#{}),
    {Conn, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, wire(hello_frame(id(), #{}))),
    ?receive_({macula_peering, disconnected, _, unexpected_hello_on_server}),
    ?receive_({quic, shutdown, Conn, _}).

a_client_that_gets_connect_closes(_) ->
    {_, Id, C, Conn, Stream} = raw_server(#{}),
    ok = macula_quic:send(Stream, wire(connect_frame(Id))),
    ?assertEqual(unexpected_connect_on_client, disconnected(C)),
    ?receive_({quic, shutdown, Conn, _}).

a_refusal_is_reported(_) ->
    {_, Id, C, Conn, Stream} = raw_server(#{}),
    ok = macula_quic:send(Stream, wire(hello_frame(Id, #{accepted => false, refusal_code => 42}))),
    ?assertEqual({refused, 42}, disconnected(C)),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}).

a_refusal_with_a_code_that_is_none_is_refused(_) ->
    [begin
        {_, Id, C, _, Stream} = raw_server(#{}),
        Hello = macula_frame:sign((hello_frame(Id, #{accepted => false}))#{refusal_code => Code}, Id),
        ok = macula_quic:send(Stream, wire(Hello)),
        ?assertEqual({hello_verify_failed, {bad_frame, refusal_code}}, disconnected(C))
     end || Code <- [-1, {text, <<"no">>}, [[]]]].

a_connect_of_one_byte_a_time_is_read(_) ->
    {_, _, Port} = listen(#{}),
    {_, Stream} = raw_dial(Port),
    [begin
        ok = macula_quic:send(Stream, [Byte]),
        receive after 1 -> ok end
     end || <<Byte>> <= wire(connect_frame(id()))],
    S = ?receive_({macula_peering, connected, Pid, _}, Pid),
    [ok = macula_quic:send(Stream, [Byte]) || <<Byte>> <= wire(ping(1))],
    ?assertEqual(1, nonce(frame(S))).

a_connect_that_never_ends_times_out(_) ->
    {L, _, Port} = listen(#{handshake_timeout_ms => 2000}),
    {Conn, Stream} = raw_dial(Port),
    Wire = wire(connect_frame(id())),
    Sender = spawn_link(fun() ->
        [begin
            _ = macula_quic:send(Stream, [Byte]),
            receive after 20 -> ok end
         end || <<Byte>> <= Wire]
    end),
    ?receive_({macula_peering, disconnected, _, handshake_timeout}),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    unlink(Sender),
    exit(Sender, kill),
    %% The listener is told by another way than we are.
    macula_test_nodes:wait_until(fun() -> take_handshaking(L) =:= {ok, #{handshaking => 0}} end),
    %% A station that does not answer.
    {_, _, C, _, _} = raw_server(#{handshake_timeout_ms => 1500}),
    ?assertEqual(handshake_timeout, disconnected(C)).

%% Its window alone is none: what is read makes room for more.
an_unknown_peer_may_send_little(_) ->
    {_, _, Port} = listen(#{}),
    {Conn, Stream} = raw_dial(Port),
    Pings = iolist_to_binary([wire(macula_frame:sign(ping(N), id())) || N <- lists:seq(1, 1000)]),
    ok = macula_quic:setopt(Stream, active, true),
    Pusher = spawn_link(fun() ->
        (fun Push(Sent) ->
            case macula_quic:send(Stream, Pings, #{timeout => 1000}) of
                ok when Sent < 150 -> Push(Sent + 1);
                _ -> ok
            end
        end)(0),
        receive never -> ok end
    end),
    ?receive_({macula_peering, disconnected, _, {protocol_error, too_much_before_handshake}}),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    unlink(Pusher),
    exit(Pusher, kill),
    %% A frame that counts together with those before it, and one that just has room.
    Skipped = [wire(ping(N)) || N <- lists:seq(1, 200)],
    Left = 65536 - iolist_size(Skipped),
    [begin
        {_, Stream2} = raw_dial(Port),
        Small = wire(connect_frame(id(), #{endorsements => [#{a => <<>>}]})),
        Padding = Left + Over - byte_size(Small) - 2,
        Connect = wire(connect_frame(id(), #{endorsements => [#{a => <<0:(Padding * 8)>>}]})),
        ?assertEqual(Left + Over, byte_size(Connect)),
        ok = macula_quic:send(Stream2, [Skipped, Connect]),
        case Over of
            0 -> ?receive_({macula_peering, connected, _, _});
            1 -> ?receive_({macula_peering, disconnected, _, {protocol_error, too_much_before_handshake}})
        end
     end || Over <- [0, 1]].

nothing_is_verified_for_an_unknown_peer(_) ->
    {_, _, Port} = listen(#{}),
    Id = id(),
    Call = macula_frame:sign(macula_frame:call(#{
        call_id => <<0:128>>, procedure => <<"p">>, realm => <<0:256>>, payload => 0, deadline_ms => 1,
        caller => pub(Id)}), Id),
    %% By the calls that verify; others decode.
    Verified = fun(Wires) ->
        Self = self(),
        Tracer = spawn_link(fun() ->
            (fun Count(N) ->
                receive
                    {trace, _, call, {macula_nif, frame_parse, [_, _, _, none, _]}} -> Count(N);
                    {trace, _, call, _} -> Count(N + 1);
                    {count, From} -> From ! {counted, N}
                end
            end)(0)
        end),
        1 = erlang:trace_pattern({macula_nif, frame_parse, 5}, true, [global]),
        _ = erlang:trace(all, true, [call, {tracer, Tracer}]),
        {_, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, [Wires, wire(connect_frame(id()))]),
        ?receive_({macula_peering, connected, _, _}),
        _ = erlang:trace(all, false, [call]),
        Delivered = erlang:trace_delivered(all),
        ?receive_({trace_delivered, all, Delivered}),
        Tracer ! {count, Self},
        ?receive_({counted, N}, N)
    end,
    ?assertEqual(1, Verified([])),
    ?assertEqual(1, Verified([wire(Call) || _ <- lists:seq(1, 100)])).

%% Later versions open with another frame, and refuse by a HELLO that names nobody.
a_newer_handshake_gets_a_plain_reason(_) ->
    {_, _, Port} = listen(#{}),
    Raw = fun(Map) ->
        {ok, Body} = macula_frame:cbor_encode(Map),
        <<(byte_size(Body)):32, Body/binary>>
    end,
    {_, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, Raw(#{frame_type => opener, version => 4})),
    %% It hears a refusal of our version.
    ?assertMatch({hello, #{version := 2, accepted := false}}, raw_frame(Stream)),
    ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
    ?receive_({macula_peering, disconnected, _, {unsupported_version, 4}}),
    {_, Stream2} = raw_dial(Port),
    ok = macula_quic:send(Stream2, Raw(#{frame_type => connect, version => 5, identity_key => <<1>>})),
    ?assertMatch({hello, _}, raw_frame(Stream2)),
    ok = macula_quic:async_shutdown_stream(Stream2, graceful, 0),
    ?receive_({macula_peering, disconnected, _, {unsupported_version, 5}}),
    [begin
        {_, _, C, _, Answer} = raw_server(#{}),
        ok = macula_quic:send(Answer, Raw(Frame)),
        ?assertEqual({unsupported_version, 4}, disconnected(C))
     end || Frame <- [#{frame_type => hello, version => 4, accepted => 0, capabilities => 0,
                        refusal_code => unsupported_version},
                      #{frame_type => hello, version => 4, accepted => 1, capabilities => 0},
                      #{frame_type => challenge, version => 4}]],
    ?assertEqual("the peer speaks another version of the handshake (4) than this node (2)",
                 lists:flatten(macula_peering:format_reason({unsupported_version, 4}))).

silent_peers_are_let_go(_) ->
    N = count("MACULA_SILENT_PEERS", 200),
    {L, ServerId, Port} = listen(#{handshake_timeout_ms => 1500, max_handshaking => N}),
    Conns = [begin
        {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}], ?WAIT),
        Conn
    end || _ <- lists:seq(1, N)],
    [?receive_({macula_peering, disconnected, _, handshake_timeout}) || _ <- Conns],
    [?receive_({quic, shutdown, Conn, {application_close, 0, _}}) || Conn <- Conns],
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshaking := H}} = macula_peering:listener_info(L),
        H =:= 0
    end),
    C = connect(Port, ServerId, #{}),
    ?receive_({macula_peering, connected, C, _}).

%% A peer that is not known yet can neither fill our buffers nor QUIC's: what it may send before
%% it has said who it is ends at 64 KiB, together with what is still unread.
an_unknown_peer_costs_little_memory(_) ->
    {_, _, Port} = listen(#{}),
    {Conn, Stream} = raw_dial(Port),
    %% On another stream, which nobody reads, and on the first a frame that does not end.
    {ok, Other} = macula_quic:open_stream(Conn),
    hold([Other]),
    ok = macula_quic:send(Other, binary:copy(<<0>>, 1_000_000)),
    ok = macula_quic:send(Stream, [<<60_000:32>>, binary:copy(<<16#80>>, 1_000)]),
    Worker = macula_test_nodes:wait_until(fun() ->
        case [Pid || {_, Pid, _, _} <- supervisor:which_children(macula_peering_conn_sup)] of
            [] -> false;
            Pids -> {value, lists:last(lists:sort(Pids))}
        end
    end),
    %% It has sent what it may, and then no more.
    Sent = fun() ->
        {ok, [{send_oct, Bytes}]} = macula_quic:getstat(Conn, [send_oct]),
        Bytes
    end,
    macula_test_nodes:wait_until(fun() -> Sent() > 60_000 orelse Sent() end),
    Most = settled(Sent, Sent(), 5),
    %% With headers, the handshake, and what a busy machine makes it send twice; of a million.
    ?assert(Most < 2 * 65_536, Most),
    {memory, Memory} = process_info(Worker, memory),
    ?assert(Memory < 65_536).

%% A value that has not changed for so many looks.
settled(_, Value, 0) -> Value;
settled(Look, Value, Looks) ->
    receive after 50 -> ok end,
    case Look() of
        Value -> settled(Look, Value, Looks - 1);
        Other -> settled(Look, Other, 5)
    end.

%%% Trust

a_wrong_pin_fails(_) ->
    {_, _, Port} = listen(#{}),
    C = connect(Port, id(), #{}),
    ?assertMatch({connect_failed, {bad_cert, _}}, disconnected(C)),
    once(C),
    %% And so does a certificate that nobody vouches for, where no node id is known.
    {ok, C2} = macula_peering:connect(#{identity => id(),
                                        target => #{host => "127.0.0.1", port => Port}}),
    ?assertMatch({connect_failed, {bad_cert, _}}, disconnected(C2)),
    receive {macula_peering, connected, _, _} -> ct:fail(connected) after 0 -> ok end.

a_wrong_node_id_without_a_pin_fails(_) ->
    {_, ServerId, Port} = listen(#{}),
    Expected = pub(id()),
    C = connect(Port, ServerId, #{target => #{host => "127.0.0.1", port => Port, tls => none,
                                              node_id => Expected}}),
    ?assertEqual({peer_identity_mismatch, Expected, pub(ServerId)}, disconnected(C)).

older_names_of_trust_are_taken(_) ->
    {_, ServerId, Port} = listen(#{}),
    {Right, Wrong} = {pub(ServerId), pub(id())},
    Dial = fun(More) ->
        {ok, C} = macula_peering:connect(#{identity => id(), target => maps:merge(
            #{host => "127.0.0.1", port => Port}, More)}),
        C
    end,
    %% Whoever is expected is pinned, whatever `verify' says.
    [begin
         C = Dial(Target#{expected_node_id => Right}),
         ?receive_({macula_peering, connected, C, Right}),
         ok = macula_peering:close(C),
         _ = disconnected(C),
         ?assertMatch({connect_failed, {bad_cert, _}}, disconnected(Dial(Target#{expected_node_id => Wrong})))
     end || Target <- [#{}, #{verify => webpki}, #{verify => none}, #{pin_tls_cert => true}]],
    %% Without the pin HELLO alone tells, behind what TLS verifies.
    Bare = #{pin_tls_cert => false, verify => none},
    C = Dial(Bare#{expected_node_id => Right}),
    ?receive_({macula_peering, connected, C, Right}),
    ?assertEqual({peer_identity_mismatch, Wrong, Right}, disconnected(Dial(Bare#{expected_node_id => Wrong}))),
    [?assertMatch({connect_failed, {bad_cert, _}},
                  disconnected(Dial(Target#{expected_node_id => Right})))
     || Target <- [#{pin_tls_cert => false}, #{pin_tls_cert => false, verify => webpki}]],
    %% Nobody is expected.
    Any = Dial(#{verify => none}),
    ?receive_({macula_peering, connected, Any, Right}),
    [?assertMatch({connect_failed, {bad_cert, _}}, disconnected(Dial(Target)))
     || Target <- [#{verify => webpki}, #{verify => webpki, expected_node_id => undefined},
                   #{pin_tls_cert => true}]].

older_names_that_contradict_are_refused(_) ->
    Id = pub(id()),
    [?assertEqual({error, {bad_option, Key, Why}},
                  macula_peering:connect(#{identity => id(), target => maps:merge(
                      #{host => "127.0.0.1", port => 1}, Target)}))
     || {Target, Key, Why} <- [
        {#{node_id => Id, expected_node_id => pub(id())}, expected_node_id, not_the_node_id},
        {#{tls => none, verify => none}, tls, none},
        {#{tls => pin, node_id => Id, pin_tls_cert => false}, tls, pin},
        {#{verify => verify_none}, verify, verify_none}, {#{pin_tls_cert => 1}, pin_tls_cert, 1},
        {#{expected_node_id => <<1>>}, expected_node_id, invalid},
        {#{timeout_ms => 0}, timeout_ms, 0}, {#{timeout_ms => never}, timeout_ms, never}]].

a_dial_may_take_for_ever(_) ->
    {_, ServerId, Port} = listen(#{}),
    Target = (target(Port, ServerId))#{timeout_ms => infinity},
    C = connect(Port, ServerId, #{target => Target}),
    ?receive_({macula_peering, connected, C, _}).

a_replayed_connect_is_refused(_) ->
    {_, _, Port} = listen(#{}),
    Captured = wire(connect_frame(id())),
    {_, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, Captured),
    ?receive_({macula_peering, connected, _, _}),
    {Conn, Stream2} = raw_dial(Port),
    ok = macula_quic:send(Stream2, Captured),
    ?receive_({macula_peering, disconnected, _, {connect_verify_failed, replayed}}),
    closed_without_a_word(Conn, Stream2),
    %% Unless that is not wanted.
    {_, _, Port2} = listen(#{replay_cache => false}),
    [begin
        {_, S} = raw_dial(Port2),
        ok = macula_quic:send(S, Captured),
        ?receive_({macula_peering, connected, _, _})
     end || _ <- [1, 2]].

a_stale_connect_is_refused_on_request(_) ->
    {_, _, Port} = listen(#{freshness_ms => 60_000}),
    Now = erlang:system_time(millisecond),
    [begin
        {_, Stream} = raw_dial(Port),
        ok = macula_quic:send(Stream, wire(connect_frame(id(), #{sent_at_ms => Sent}))),
        case Fresh of
            true -> ?receive_({macula_peering, connected, _, _});
            false -> ?receive_({macula_peering, disconnected, _, {connect_verify_failed, stale}})
        end
     end || {Sent, Fresh} <- [{Now, true}, {Now - 30_000, true}, {Now + 30_000, true},
                              {Now - 90_000, false}, {Now + 90_000, false}, {undefined, false}]].

%% A clock that was set back makes neither side refuse the other by default, and no timer of a
%% link depends on the time of day.
a_clock_an_hour_behind_is_tolerated(_) ->
    {_, _, Port} = listen(#{}),
    {_, Stream} = raw_dial(Port),
    ok = macula_quic:send(Stream, wire(connect_frame(id(), #{
        sent_at_ms => erlang:system_time(millisecond) - 3_600_000}))),
    ?receive_({macula_peering, connected, _, _}).

rules_decide_who_may_link(_) ->
    Id = id(),
    Public = pub(Id),
    Self = self(),
    [begin
        {L, ServerId, Port} = listen(Rules),
        C = connect(Port, ServerId, #{identity => Id, realms => [<<1:256>>]}),
        case Code of
            ok ->
                ?receive_({macula_peering, connected, C, _}),
                ok = macula_peering:close(C);
            _ ->
                ?assertEqual({refused, Code}, disconnected(C)),
                ?receive_({macula_peering, disconnected, _, {refused, Code}})
        end,
        ok = macula_peering:close_listener(L)
     end || {Rules, Code} <- [
        {#{allow => [Public]}, ok}, {#{allow => [pub(id())]}, 16}, {#{allow => none}, 16},
        {#{deny => [Public]}, 16}, {#{deny => [pub(id())]}, ok}, {#{deny => all}, 16},
        {#{allow => fun(Claim) -> Self ! {claim, Claim}, true end}, ok},
        {#{allow => fun(_) -> false end}, 16}, {#{allow => fun(_) -> deny end}, 16},
        {#{allow => fun(_) -> {deny, 7} end}, 7}, {#{deny => fun(_) -> true end}, 16},
        {#{deny => fun(_) -> false end}, ok}, {#{deny => fun(_) -> {deny, 9} end}, 9},
        {#{deny => fun(_) -> false end, allow => [pub(id())]}, 16}]],
    ?receive_({claim, #{node_id := Public, realms := [<<1:256>>], address := {"127.0.0.1", _},
                        puzzle_bits := _, capabilities := 0}}).

a_rule_that_fails_refuses(_) ->
    {_, ServerId, Port} = listen(#{allow => fun(_) -> error(broken) end}),
    ?assertEqual({refused, 16}, disconnected(connect(Port, ServerId, #{}))),
    {_, ServerId2, Port2} = listen(#{handshake_timeout_ms => 2000,
                                     allow => fun(_) -> receive never -> true end end}),
    C = connect(Port2, ServerId2, #{}),
    ?receive_({macula_peering, disconnected, _, handshake_timeout}),
    ?assertEqual(peer_closed, disconnected(C)),
    %% What decides does not outlive the worker, however that ends.
    Self = self(),
    {_, ServerId3, Port3} = listen(#{allow => fun(_) -> Self ! {rule, self()}, receive never -> true end end}),
    C3 = connect(Port3, ServerId3, #{}),
    Rule = ?receive_({rule, Pid}, Pid),
    Worker = macula_test_nodes:wait_until(fun() ->
        case [W || {_, W, _, _} <- supervisor:which_children(macula_peering_conn_sup), W =/= C3] of
            [Only] -> {value, Only};
            %% Those of before are on their way out.
            More -> More
        end
    end),
    exit(Worker, kill),
    macula_test_nodes:wait_until(fun() -> not is_process_alive(Rule) end).

%% As a VM starts that nobody has configured.
reports_are_seen_with_the_default_handler(_) ->
    {_, Wire} = hd(odd_wires(id())),
    Lines = [
        "{ok, _} = application:ensure_all_started(macula)",
        "Id = fun() -> {ok, I} = macula_identity:generate(#{puzzle_bits => 0}), I end",
        "Link = fun(Rule) -> There = Id(), {ok, L} = macula_peering:listen(Rule#{identity => There, port => 0,"
        "  address => {127, 0, 0, 1}}), {ok, {_, Port}} = macula_peering:sockname(L), {ok, C} ="
        "  macula_peering:connect(#{identity => Id(), target => #{host => \"127.0.0.1\", port => Port,"
        "  node_id => macula_identity:public(There)}}), C end",
        "Refused = Link(#{allow => fun(_) -> error(broken) end})",
        "receive {macula_peering, disconnected, Refused, _} -> ok end",
        "C = Link(#{})",
        "receive {macula_peering, connected, C, _} -> ok end",
        "ok = macula_peering:send_frame(C, base64:decode(\"" ++ base64:encode_to_string(Wire) ++ "\"))"],
    Erl = macula_dist_case:os_erl(["-noshell", "-noinput", "-pa" | code:get_path()]
                                  ++ ["-eval", lists:append(lists:join(", ", Lines)) ++ "."]),
    ok = macula_dist_case:os_await(Erl, "macula: a function given as allow or deny failed.* refused: .*broken"),
    ok = macula_dist_case:os_await(Erl, "macula: a frame of the peer [0-9a-f]+ was dropped"),
    macula_dist_case:os_stop(Erl).

%% By the VM's default handler, with the filters that OTP gives it.
a_rule_that_fails_is_seen(_) ->
    Filters = [{domain, {fun logger_filters:domain/2, {log, super, [otp, sasl]}}},
               {no_domain, {fun logger_filters:domain/2, {log, undefined, []}}}],
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), filter_default => stop,
                                                filters => Filters}),
    try
        [begin
            {_, ServerId, Port} = listen(Rule),
            ?assertEqual({refused, 16}, disconnected(connect(Port, ServerId, #{}))),
            Text = words(?receive_({logged, #{msg := {report, #{what := peering_rule_failed}}} = E}, E)),
            ?assertMatch({_, _}, binary:match(Text, <<"allow or deny failed">>)),
            ?assertMatch({_, _}, binary:match(Text, <<"broken">>))
         end || Rule <- [#{allow => fun(_) -> error(broken) end}, #{deny => fun(_) -> throw(broken) end},
                         #{allow => fun(_) -> broken end}]],
        %% So is the first frame of a link that is dropped.
        {C, _, _} = pair(),
        [ok = macula_peering:send_frame(C, Wire) || {_, Wire} <- odd_wires(id()), _ <- [1, 2]],
        Event = ?receive_({logged, #{msg := {report, #{what := peering_bad_frame}}} = F}, F),
        ?assertMatch({_, _}, binary:match(words(Event), <<"was dropped">>)),
        ok = macula_peering:close(C),
        _ = disconnected(C),
        receive {logged, #{msg := {report, #{what := peering_bad_frame}}}} -> ct:fail(twice) after 0 -> ok end
    after
        logger:remove_handler(?MODULE)
    end.

words(#{msg := {report, Report}, meta := #{report_cb := Words}}) ->
    {Format, Args} = Words(Report),
    unicode:characters_to_binary(io_lib:format(Format, Args)).

%% The default handler shows no domain but OTP's own.
log_events_have_no_domain(_) ->
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    Root = filename:dirname(filename:dirname(filename:dirname(Source))),
    Files = filelib:wildcard(filename:join([Root, "src", "**", "*.erl"])),
    ?assert(length(Files) > 20),
    [begin
        {ok, Text} = file:read_file(File),
        ?assertEqual({File, nomatch}, {File, re:run(Text, "domain\\s*=>", [{capture, none}])})
     end || File <- Files].

a_rule_does_not_outlive_its_worker(_) ->
    Self = self(),
    Rule = fun(_) -> Self ! {rule, self()}, receive never -> true end end,
    {L, ServerId, Port} = listen(#{handshake_timeout_ms => 2000, allow => Rule}),
    _ = connect(Port, ServerId, #{}),
    Pid = ?receive_({rule, P}, P),
    ?receive_({macula_peering, disconnected, _, handshake_timeout}),
    macula_test_nodes:wait_until(fun() -> not is_process_alive(Pid) end),
    ok = macula_peering:close_listener(L),
    %% Nor when the peer leaves meanwhile.
    {_, _, Port2} = listen(#{allow => Rule}),
    {Conn, Stream} = raw_dial(Port2),
    ok = macula_quic:send(Stream, wire(connect_frame(id()))),
    Pid2 = ?receive_({rule, P2}, P2),
    ok = macula_quic:close_connection(Conn),
    ?receive_({macula_peering, disconnected, _, peer_closed}),
    macula_test_nodes:wait_until(fun() -> not is_process_alive(Pid2) end).

%% What a window lets in must be remembered for as long, by whichever way it comes.
a_wide_window_is_covered_by_the_cache(_) ->
    forget_windows(),
    Id = id(),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(pub(Id), macula_identity:seed(Id), []),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, [{cert, Cert}, {key, Key}, {alpn, ["macula"]}]),
    {ok, {_, Port}} = macula_quic:sockname(L),
    {_, _} = raw_dial(Port),
    {ok, Conn} = macula_quic:accept(L, ?WAIT),
    {ok, _} = macula_peering:accept(Conn, #{identity => Id, freshness_ms => 600_000}),
    #{keep := Kept} = sys:get_state(macula_peering_replay),
    ?assert(Kept >= 1_200_000).

%% What other cases have asked for outlives the application.
forget_windows() ->
    ok = application:stop(macula),
    _ = persistent_term:erase({macula_peering_replay, keep}),
    {ok, _} = application:ensure_all_started(macula),
    ?assertMatch(#{keep := 300_000}, sys:get_state(macula_peering_replay)).

%% A link that fails in any way, and whatever asks it about itself, shows no key.
a_key_is_in_no_report(_) ->
    Seed = list_to_binary([101 + N || N <- lists:seq(1, 32)]),
    {ok, Id} = macula_identity:from_seed(Seed),
    Self = self(),
    ok = logger:add_handler(a_key, ?MODULE, #{config => Self, level => all}),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, all),
    try
        [{error, _} = macula_peering:listen(maps:merge(
            #{identity => #{private => Seed}, port => 0, address => ?LOCAL}, Bad))
         || Bad <- [#{sans => [1 | 2]}, #{sans => [self()]}, #{alpn => [self()]}, #{alpn => [a | b]},
                    #{alpn => []}, #{address => "no such address"}, #{port => x}]],
        [{error, _} = macula_peering:connect(#{identity => Bad, target => #{host => "h", port => 1}})
         || Bad <- [#{private => <<Seed/binary, 0>>}, #{private => [Seed]},
                    #{private => Seed, public => <<0:256>>}]],
        {_, _, Port} = listen(#{identity => #{private => Seed}}),
        Link = fun() ->
            C = connect(Port, Id, #{identity => #{private => binary:copy(Seed)}}),
            ?receive_({macula_peering, connected, C, _}),
            C
        end,
        C1 = Link(),
        Seen = [sys:get_status(C1), sys:get_state(C1), process_info(C1), process_info(C1, [dictionary]),
                macula_peering:peer_info(C1), Id],
        exit(C1, some_reason),
        _ = disconnected(C1),
        %% A state that no clause of a callback takes.
        C2 = Link(),
        _ = sys:replace_state(C2, fun({State, Data}) -> {State, setelement(2, Data, nobody)} end),
        _ = sys:replace_state(C2, fun({State, Data}) -> {State, {broken, Data}} end),
        ok = macula_peering:close(C2),
        ?assertMatch({worker_down, _}, disconnected(C2)),
        _ = logger:info("the last"),
        Said = (fun Said() ->
            case ?receive_({logged, Event}, Event) of
                #{msg := {string, "the last"}} -> [];
                Other -> [Other | Said()]
            end
        end)(),
        ?assertMatch([_ | _], [E || #{msg := {report, #{label := {gen_statem, terminate}}}} = E <- Said]),
        [?assertEqual(nomatch, string:find(io_lib:format("~w", [Term]), Shown))
         || Term <- Seen ++ Said, Shown <- ["102,103,104,105"]],
        [?assertEqual(nomatch, string:find(io_lib:format("~p", [Term]), "ghij")) || Term <- Seen ++ Said]
    after
        ok = logger:set_primary_config(level, Level),
        ok = logger:remove_handler(a_key)
    end.

%% @private The handler of the case above.
log(Event, #{config := To}) ->
    To ! {logged, Event}.

an_unsolved_puzzle_is_refused_on_request(_) ->
    {_, ServerId, Port} = listen(#{puzzle_bits => 10}),
    Unsolved = unsolved(),
    ?assertEqual({refused, 10}, disconnected(connect(Port, ServerId, #{identity => Unsolved}))),
    {ok, Solved} = macula_identity:generate(#{puzzle_bits => 10}),
    C = connect(Port, ServerId, #{identity => Solved}),
    ?receive_({macula_peering, connected, C, _}).

unsolved() ->
    Id = id(),
    case macula_identity:puzzle_bits(Id) < 10 of
        true -> Id;
        false -> unsolved()
    end.

the_newest_link_of_a_node_is_kept(_) ->
    {_, ServerId, Port} = listen(#{}),
    Id = id(),
    Older = connect(Port, ServerId, #{identity => Id}),
    ?receive_({macula_peering, connected, Older, _}),
    S1 = receive {macula_peering, connected, P1, _} when P1 =/= Older -> P1 after ?WAIT -> ct:fail(s) end,
    Newer = connect(Port, ServerId, #{identity => Id}),
    ?receive_({macula_peering, connected, Newer, _}),
    ?assertMatch(#{frame_type := goodbye, reason := replaced_by_newer_handshake}, frame(Older)),
    ?assertEqual(peer_closed, disconnected(Older)),
    ?assertEqual(drained, disconnected(S1)),
    ok = macula_peering:send_frame(Newer, ping(1)),
    S2 = receive {macula_peering, frame, P2, _} -> P2 after ?WAIT -> ct:fail(messages()) end,
    ?assertNotEqual(S1, S2),
    %% Unless that is not wanted.
    {_, ServerId2, Port2} = listen(#{duplicates => allow}),
    [begin
        C = connect(Port2, ServerId2, #{identity => Id}),
        ?receive_({macula_peering, connected, C, _})
     end || _ <- [1, 2]],
    receive {macula_peering, frame, _, #{frame_type := goodbye}} -> ct:fail(closed) after 300 -> ok end.

handshakes_are_capped(_) ->
    {L, ServerId, Port} = listen(#{max_handshaking => 3, min_handshake_ms => 600000,
                                   accept_owner => self()}),
    Silent = [element(1, raw_dial(Port)) || _ <- lists:seq(1, 3)],
    macula_test_nodes:wait_until(fun() ->
        {ok, #{handshaking => 3}} =:= take_handshaking(L)
    end),
    {ok, Conn} = macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}], ?WAIT),
    ?receive_({quic, shutdown, Conn, {application_close, 0, <<"busy">>}}),
    {ok, #{refused := 1}} = macula_peering:listener_info(L),
    %% One that leaves makes room.
    ok = macula_quic:close_connection(hd(Silent)),
    ?receive_({macula_peering, disconnected, _, peer_closed}),
    macula_test_nodes:wait_until(fun() -> take_handshaking(L) =:= {ok, #{handshaking => 2}} end),
    C = connect(Port, ServerId, #{}),
    ?receive_({macula_peering, connected, C, _}),
    ?receive_({macula_peering, handshake_complete, _, _}).

%% They fill all places, and come again as soon as they are let go.
silent_peers_keep_nobody_out(_) ->
    {L, ServerId, Port} = listen(#{max_handshaking => 8, min_handshake_ms => 0}),
    Silent = [spawn_link(fun() -> dial_silently(Port) end) || _ <- lists:seq(1, 12)],
    macula_test_nodes:wait_until(fun() ->
        {ok, #{cut_short := Cut}} = macula_peering:listener_info(L),
        Cut > 20 orelse {cut, Cut}
    end),
    Id = id(),
    {NodeId, Station} = {pub(Id), pub(ServerId)},
    C = connect(Port, ServerId, #{identity => Id, reconnect => true}),
    Link = ?receive_({macula_peering, connected, P, Station}, P),
    S = ?receive_({macula_peering, connected, P2, NodeId}, P2),
    [begin unlink(P3), exit(P3, kill) end || P3 <- Silent],
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertEqual(1, nonce(frame(S))),
    %% The one that stands was not disturbed, and the table of handshakes is in order.
    macula_test_nodes:wait_until(fun() ->
        {ok, Info} = macula_peering:listener_info(L),
        maps:with([handshaking, links], Info) =:= #{handshaking => 0, links => 1} orelse Info
    end),
    ok = macula_peering:close(C),
    ?receive_({macula_peering, disconnected, Link, drained}).

dial_silently(Port) ->
    case macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}], ?WAIT) of
        {ok, Conn} -> receive {quic, shutdown, Conn, _} -> ok end;
        {error, _} -> ok
    end,
    dial_silently(Port).

a_peer_just_come_is_not_cut_short(_) ->
    {L, ServerId, Port} = listen(#{max_handshaking => 2, min_handshake_ms => 600000}),
    {Conn, Stream} = raw_dial(Port),
    {_, _} = raw_dial(Port),
    macula_test_nodes:wait_until(fun() -> take_handshaking(L) =:= {ok, #{handshaking => 2}} end),
    C = connect(Port, ServerId, #{}),
    ?receive_({macula_peering, disconnected, C, _}),
    ?assertMatch({ok, #{cut_short := 0, refused := 1}}, macula_peering:listener_info(L)),
    ok = macula_quic:send(Stream, wire(connect_frame(id()))),
    {hello, _} = raw_frame(Stream),
    ?receive_({macula_peering, connected, _, _}),
    ok = macula_quic:close_connection(Conn).

take_handshaking(L) ->
    {ok, Info} = macula_peering:listener_info(L),
    {ok, maps:with([handshaking], Info)}.

%%% Ends

a_killed_worker_is_reported_once(_) ->
    {C, S, _} = pair(),
    exit(C, kill),
    ?assertEqual({worker_down, killed}, disconnected(C)),
    %% Its streams are reset, its connection is closed, and either may be seen first.
    Seen = disconnected(S),
    ?assert(lists:member(Seen, [peer_closed, {stream_reset, 0}, {stream_stopped, 0}])),
    once(C), once(S),
    {C2, S2, _} = pair(),
    exit(S2, some_reason),
    ?assertEqual({worker_down, some_reason}, disconnected(S2)),
    _ = disconnected(C2),
    once(S2), once(C2).

%% Killed a moment after its start, whichever state that is.
every_state_survives_a_kill(_) ->
    {_, ServerId, Port} = listen(#{}),
    [begin
        C = connect(Port, ServerId, #{}),
        busy(Micros),
        exit(C, kill),
        ?assertEqual({worker_down, killed}, disconnected(C)),
        once(C)
     end || Micros <- lists:seq(0, 6000, 100)],
    %% Each server worker that came into being has reported its end as well.
    macula_test_nodes:wait_until(fun() ->
        supervisor:count_children(macula_peering_conn_sup) =:=
            [{specs, 1}, {active, 0}, {supervisors, 0}, {workers, 0}]
    end),
    ?assertEqual([], macula_peering:peers()).

busy(Micros) ->
    Until = erlang:monotonic_time(microsecond) + Micros,
    (fun Spin() -> erlang:monotonic_time(microsecond) >= Until orelse Spin() end)().

a_failed_watcher_misses_no_end(_) ->
    {C, S, _} = pair(),
    Watcher = whereis(macula_peering_links),
    Ref = monitor(process, Watcher),
    %% Its successor finds this one dead already.
    ok = sys:suspend(Watcher),
    exit(C, kill),
    exit(Watcher, kill),
    receive {'DOWN', Ref, process, Watcher, killed} -> ok end,
    ?assertMatch({worker_down, _}, disconnected(C)),
    _ = disconnected(S),
    once(C), once(S).

the_death_of_the_owner_ends_the_link(_) ->
    {_, ServerId, Port} = listen(#{}),
    Self = self(),
    {Owner, Ref} = spawn_monitor(fun() ->
        C = connect(Port, ServerId, #{}),
        ?receive_({macula_peering, connected, C, _}),
        Self ! {link, C},
        receive never -> ok end
    end),
    C = ?receive_({link, Pid}, Pid),
    ok = macula_peering:subscribe(C, self()),
    S = ?receive_({macula_peering, connected, P, _}, P),
    exit(Owner, kill),
    receive {'DOWN', Ref, process, Owner, killed} -> ok end,
    ?assertEqual(owner_down, disconnected(C)),
    ?assertMatch(#{frame_type := goodbye}, frame(S)),
    ?assertEqual(peer_closed, disconnected(S)).

a_lost_connection_is_reported(_) ->
    {_, ServerId, Port} = listen(#{idle_timeout_ms => 1000, keep_alive_interval_ms => 200}),
    {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}}),
    C = connect(macula_relay:port(Relay), ServerId,
                #{idle_timeout_ms => 1000, keep_alive_interval_ms => 200}),
    ?receive_({macula_peering, connected, C, _}),
    S = receive {macula_peering, connected, P, _} when P =/= C -> P after ?WAIT -> ct:fail(s) end,
    ok = macula_relay:set(Relay, #{blackhole => true}),
    ?assertEqual({connection_lost, timeout}, timed_out(disconnected(C))),
    ?assertEqual({connection_lost, timeout}, timed_out(disconnected(S))),
    once(C), once(S),
    ok = macula_relay:stop(Relay).

a_link_lost_amid_a_frame_tells_of_the_loss(_) ->
    {L, _, Port} = listen(#{}),
    Lost = {connection_lost, {application_close, 7, <<"gone">>}},
    [begin
        {Conn, Stream, S} = raw_client(Port, id()),
        ok = macula_quic:send(Stream, [wire(ping(1)), Cut]),
        ?assertEqual(1, nonce(frame(S))),
        ok = macula_quic:close_connection(Conn, 7, <<"gone">>),
        ?assertEqual({Cut, Lost}, {Cut, disconnected(S)}),
        once(S),
        %% In the handshake, too.
        {Conn2, Stream2} = raw_dial(Port),
        ok = macula_quic:send(Stream2, Cut),
        macula_test_nodes:wait_until(fun() ->
            {ok, #{handshaking := N}} = macula_peering:listener_info(L),
            N =:= 1
        end),
        ok = macula_quic:close_connection(Conn2, 7, <<"gone">>),
        ?assertEqual({Cut, Lost}, {Cut, ?receive_({macula_peering, disconnected, _, Why}, Why)})
     end || Cut <- [<<0, 0>>, <<0, 0, 0, 10>>, <<0, 0, 0, 10, 1>>]].

timed_out({connection_lost, Why}) ->
    case string:find(lists:flatten(io_lib:format("~p", [Why])), "timeout") of
        nomatch -> {connection_lost, Why};
        _ -> {connection_lost, timeout}
    end.

%% A node that is killed at any moment of the conversation is noticed by the other, which goes on.
a_killed_node_is_noticed(_) ->
    {_, ServerId, Port} = listen(#{idle_timeout_ms => 1500, keep_alive_interval_ms => 300}),
    Target = target(Port, ServerId),
    [macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        {ok, _} = macula_test_nodes:call(Node, application, ensure_all_started, [macula]),
        ok = macula_test_nodes:call(Node, ?MODULE, link_and, [Do, Target]),
        S = ?receive_({macula_peering, connected, Pid, _}, Pid),
        macula_test_nodes:kill(Node),
        Reason = (fun Next() ->
            receive
                {macula_peering, frame, S, _} -> Next();
                {macula_peering, disconnected, S, R} -> R
            after ?WAIT -> ct:fail(not_noticed) end
        end)(),
        ?assertMatch({connection_lost, _}, Reason),
        once(S)
     end) || Do <- [nothing, send]],
    %% In the middle of a handshake, as far as that has come.
    [macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        {ok, _} = macula_test_nodes:call(Node, application, ensure_all_started, [macula]),
        ok = macula_test_nodes:call(Node, ?MODULE, dial_for_ever, [Target]),
        ?receive_({macula_peering, connected, _, _}),
        macula_test_nodes:kill(Node),
        macula_test_nodes:wait_until(fun() ->
            0 =:= proplists:get_value(active, supervisor:count_children(macula_peering_conn_sup))
        end)
     end) || _ <- [1, 2]],
    drop_messages(),
    C = connect(Port, ServerId, #{}),
    ?receive_({macula_peering, connected, C, _}).

%% Runs on a node that will be killed.
link_and(Do, Target) ->
    Caller = self(),
    spawn(fun() ->
        {ok, C} = macula_peering:connect(#{identity => macula_identity:generate(), target => Target}),
        receive {macula_peering, connected, C, _} -> Caller ! linked end,
        Loop = fun Loop() ->
            Do =:= send andalso macula_peering:send_frame(C, ping(0)),
            Do =:= nothing andalso receive never -> ok end,
            Loop()
        end,
        Loop()
    end),
    receive linked -> ok end.

%% Links that come and go as fast as they can.
dial_for_ever(Target) ->
    Loop = fun Loop(Id) ->
        {ok, C} = macula_peering:connect(#{identity => Id, target => Target}),
        receive {macula_peering, _, C, _} -> ok end,
        exit(C, kill),
        Loop(Id)
    end,
    [spawn(fun() -> Loop(macula_identity:generate()) end) || _ <- lists:seq(1, 8)],
    ok.

%% One that ignores a farewell, as older peers do, is left when the drain is over.
a_peer_that_stays_is_left(_) ->
    {_, _, Port} = listen(#{drain_timeout_ms => 4000}),
    {Conn, Stream, S} = raw_client(Port, id()),
    ok = macula_peering:close(S, operator_stop),
    {goodbye, _} = raw_frame(Stream),
    ?assertEqual({error, closed}, macula_peering:send_frame(S, ping(1))),
    ?assertEqual(drained, disconnected(S)),
    ?receive_({quic, shutdown, Conn, {application_close, 0, _}}),
    %% One that is faster.
    {_, _, Port2} = listen(#{drain_timeout_ms => 60_000}),
    {Conn2, Stream2, S2} = raw_client(Port2, id()),
    ok = macula_peering:close(S2, operator_stop),
    {goodbye, _} = raw_frame(Stream2),
    ok = macula_quic:close_connection(Conn2),
    ?assertEqual(peer_closed_during_drain, disconnected(S2)),
    %% One that says goodbye and does not leave.
    {_, Stream3, S3} = raw_client(Port, id()),
    ok = macula_quic:send(Stream3, wire(macula_frame:goodbye(operator_stop))),
    ?assertMatch(#{frame_type := goodbye}, frame(S3)),
    ?assertEqual(peer_closed, disconnected(S3)).

%% Frames without credit keep a link whose peer is gone, and nothing else does.
a_close_of_a_link_whose_peer_is_gone_is_at_once(_) ->
    Gone = fun() ->
        {C, S, L} = pair(#{}, #{active => 1, drain_timeout_ms => 60_000}),
        [ok = macula_peering:send_frame(C, ping(N)) || N <- lists:seq(1, 3)],
        _ = frame(S),
        macula_test_nodes:wait_until(fun() ->
            {ok, #{bytes_in := In}} = macula_peering:peer_info(S),
            In >= 3 * 219
        end),
        exit(C, kill),
        _ = disconnected(C),
        macula_test_nodes:wait_until(fun() ->
            macula_peering:send_frame(S, ping(1)) =:= {error, closed}
        end),
        {S, L}
    end,
    {S1, _} = Gone(),
    ok = macula_peering:close(S1),
    ?assertNotEqual(drained, disconnected(S1)),
    {S2, _} = Gone(),
    Owner = spawn(fun() -> receive never -> ok end end),
    ok = macula_peering:subscribe(S2, self()),
    ok = macula_peering:controlling_process(S2, Owner),
    exit(Owner, kill),
    _ = disconnected(S2),
    once(S1), once(S2).

a_farewell_that_waited_for_credit_ends_the_link_at_once(_) ->
    {C, S, _} = pair(#{drain_timeout_ms => 200}, #{active => 1, drain_timeout_ms => 60_000}),
    [ok = macula_peering:send_frame(C, ping(N)) || N <- lists:seq(1, 3)],
    ?assertEqual(1, nonce(frame(S))),
    ok = macula_peering:close(C),
    ?assertEqual(drained, disconnected(C)),
    macula_test_nodes:wait_until(fun() ->
        macula_peering:send_frame(S, ping(1)) =:= {error, closed}
    end),
    ok = macula_peering:setopts(S, [{active, true}]),
    ?assertEqual([2, 3], [nonce(frame(S)) || _ <- [2, 3]]),
    ?assertMatch(#{frame_type := goodbye}, frame(S)),
    ?assertEqual(peer_closed, disconnected(S)),
    once(S).

an_exit_signal_is_a_failure_of_the_worker(_) ->
    {C, S, _} = pair(),
    exit(C, normal),
    ?assertEqual({worker_down, normal}, disconnected(C)),
    _ = disconnected(S),
    once(C).

a_dial_does_not_outlive_its_owner(_) ->
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    Before = processes(),
    Self = self(),
    Owner = spawn(fun() -> Self ! {link, connect(Port, id(), #{})}, receive never -> ok end end),
    C = ?receive_({link, Pid}, Pid),
    %% The packet of the dial.
    {ok, _} = gen_udp:recv(Socket, 0, ?WAIT),
    IsDialling = fun() ->
        lists:member({initial_call, {macula_peering_attempt, dialling, 3}},
                     [process_info(P, initial_call) || P <- processes() -- Before])
    end,
    ?assert(IsDialling()),
    exit(Owner, kill),
    macula_test_nodes:wait_until(fun() -> not is_process_alive(C) end),
    macula_test_nodes:wait_until(fun() -> not IsDialling()
    %% Before the dial would end by itself.
    end, 10000),
    ok = gen_udp:close(Socket).

a_close_during_the_dial_ends_it(_) ->
    %% Nobody answers there.
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    C = connect(Port, id(), #{}),
    ?assertMatch({ok, #{status := opening}}, macula_peering:peer_info(C)),
    ?assertEqual({error, not_connected}, macula_peering:send_frame(C, ping(1))),
    ok = macula_peering:close(C),
    ?assertEqual(closed_during_handshake, disconnected(C)),
    once(C),
    ok = gen_udp:close(Socket).

%% In each state before it does.
a_close_before_the_link_stands_gives_its_reason(_) ->
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    Dialling = connect(Port, id(), #{}),
    {_, _, Handshaking, _, _} = raw_server(#{}),
    {_, _, Other, _, _} = raw_server(#{}),
    %% One that is dialled again is its dialer's to close.
    Dialer = connect(Port, id(), #{reconnect => true}),
    Worker = macula_test_nodes:wait_until(fun() ->
        case macula_peering:peer_info(Dialer) of
            {ok, #{pid := Pid}} -> {value, Pid};
            {error, not_connected} -> false
        end
    end),
    [begin
         ok = macula_peering:close(Pid, Reason),
         ?assertEqual(Reason, disconnected(Told)),
         once(Told)
     end || {Pid, Told, Reason} <- [{Dialling, Dialling, of_the_callers_own},
                                    {Handshaking, Handshaking, operator_stop},
                                    {Other, Other, {text, <<"because">>}},
                                    {Dialer, Worker, no_more_of_it}]],
    ok = gen_udp:close(Socket).

a_dial_to_nobody_fails(_) ->
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    C = connect(Port, id(), #{target => #{host => "127.0.0.1", port => Port, timeout_ms => 200,
                                          node_id => <<1:256>>}}),
    ?assertEqual({connect_failed, timeout}, disconnected(C)),
    C2 = connect(Port, id(), #{target => #{host => "no.such.host.invalid", port => Port,
                                           node_id => <<1:256>>, timeout_ms => 3000}}),
    ?assertMatch({connect_failed, _}, disconnected(C2)),
    ok = gen_udp:close(Socket).

stopping_the_application_says_goodbye(_) ->
    {_, Id, C, _, Stream} = raw_server(#{}),
    ok = macula_quic:send(Stream, wire(hello_frame(Id, #{}))),
    ?receive_({macula_peering, connected, C, _}),
    Self = self(),
    Reader = spawn_link(fun() -> receive go -> Self ! raw_frame(Stream) end end),
    Reader ! go,
    ok = application:stop(macula),
    ?receive_({goodbye, _}),
    ?assertEqual(shutdown, disconnected(C)),
    {ok, _} = application:ensure_all_started(macula).

%% Also where the end had begun before: the supervisor does not wait for the drain.
a_farewell_under_way_survives_the_shutdown(_) ->
    [begin
        {_, _, Port} = listen(#{hello_gap_ms => 0}),
        {_, Stream, S} = raw_client(Port, id()),
        ok = End(S),
        ok = application:stop(macula),
        ?assertMatch({goodbye, _}, raw_frame(Stream)),
        {ok, _} = application:ensure_all_started(macula)
     end || End <- [fun macula_peering:close/1, fun orphan/1], _ <- lists:seq(1, 10)].

a_farewell_at_the_shutdown_leaves_hello_alone(_) ->
    {_, _, Port} = listen(#{hello_gap_ms => ?READ_MS}),
    [begin
        {_, Stream} = raw_dial(Port),
        ok = macula_quic:setopt(Stream, active, true),
        Id = id(),
        NodeId = pub(Id),
        ok = macula_quic:send(Stream, wire(connect_frame(Id))),
        S = ?receive_({macula_peering, connected, Pid, NodeId}, Pid),
        exit(S, shutdown),
        ?assertEqual(shutdown, disconnected(S)),
        [?assertMatch({ok, #{frame_type := Type}, <<>>},
                      macula_frame:decode(?receive_({quic, Bytes, Stream, _} when is_binary(Bytes), Bytes)))
         || Type <- [hello, goodbye]]
     end || _ <- lists:seq(1, 20)].

orphan(S) ->
    Owner = spawn(fun() -> receive never -> ok end end),
    ok = macula_peering:controlling_process(S, Owner),
    exit(Owner, kill),
    ok.

a_dialer_that_waits_tells_of_the_shutdown(_) ->
    {ok, D} = macula_peering:connect(#{
        identity => id(), target => #{host => "127.0.0.1", port => macula_test_nodes:free_udp_port(),
                                      timeout_ms => 100, node_id => pub(id())},
        reconnect => #{min_delay_ms => 60_000, max_delay_ms => 60_000, jitter => 0}}),
    ?receive_({macula_peering, reconnecting, D, _}),
    ok = application:stop(macula),
    ?receive_({macula_peering, gave_up, D, #{reason := shutdown}}).

a_link_that_is_kept_tells_of_the_shutdown(_) ->
    {_, ServerId, Port} = listen(#{}),
    Dial = fun(To) ->
        {ok, D} = macula_peering:connect(#{identity => id(), target => target(To, ServerId), reconnect => #{}}),
        D
    end,
    _ = Dial(Port),
    Links = [?receive_({macula_peering, connected, P, _}, P) || _ <- [client, server]],
    ok = application:stop(macula),
    ?assertEqual([shutdown, shutdown], [disconnected(P) || P <- Links]),
    ok = application:start(macula),
    %% In the middle of the handshake.
    {ok, Silent} = gen_udp:open(0, [{active, true}]),
    {ok, SilentPort} = inet:port(Silent),
    D = Dial(SilentPort),
    ?receive_({udp, Silent, _, _, _}),
    ok = application:stop(macula),
    ?receive_({macula_peering, disconnected, _, shutdown}),
    ?assertNot(is_process_alive(D)),
    ok = gen_udp:close(Silent).

%% As the release handler does.
an_upgrade_asks_the_supervisors_again(_) ->
    {_, ServerId, Port} = listen(#{}),
    {ok, _} = macula_peering:connect(#{identity => id(), target => target(Port, ServerId)}),
    [C, S] = [?receive_({macula_peering, connected, P, _}, P) || _ <- [one, other]],
    [begin
         ok = sys:suspend(Sup),
         ok = sys:change_code(Sup, Module, undefined, []),
         ok = sys:resume(Sup)
     end || {Sup, Module} <- [{macula_sup, macula_sup} |
                              [{Name, macula_peering_sup}
                               || Name <- [macula_peering_sup, macula_peering_conn_sup, macula_peering_dialer_sup,
                                           macula_peering_listener_sup]]]],
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertMatch(#{frame_type := ping}, frame(S)),
    ?assertEqual([C, S], [P || P <- [C, S], is_process_alive(P)]).

a_killed_dialer_takes_its_link_along(_) ->
    {_, ServerId, Port} = listen(#{}),
    Dial = fun(P) ->
        {ok, D} = macula_peering:connect(#{identity => id(), target => target(P, ServerId),
                                           reconnect => #{min_delay_ms => 60_000}}),
        D
    end,
    D = Dial(Port),
    Both = [?receive_({macula_peering, connected, P, _}, P) || _ <- [client, server]],
    {[C], [S]} = lists:partition(fun(P) ->
        {ok, #{role := Role}} = macula_peering:peer_info(P),
        Role =:= client
    end, Both),
    exit(D, kill),
    ?receive_({macula_peering, gave_up, D, #{attempts := 1, reason := {worker_down, killed}}}),
    %% Not torn: the peer hears a farewell.
    ?assertMatch(#{frame_type := goodbye}, frame(S)),
    ?assertEqual({worker_down, killed}, disconnected(C)),
    ?assertEqual({error, not_connected}, macula_peering:send_frame(D, ping(1))),
    %% Between two attempts there is nobody else who could tell.
    Waiting = Dial(macula_test_nodes:free_udp_port()),
    ?receive_({macula_peering, reconnecting, Waiting, _}),
    exit(Waiting, kill),
    ?receive_({macula_peering, gave_up, Waiting, #{reason := {worker_down, killed}}}),
    %% One that fails has time for its own clearing up, and is told of all the same.
    Failing = Dial(macula_test_nodes:free_udp_port()),
    ?receive_({macula_peering, reconnecting, Failing, _}),
    exit(Failing, broken),
    ?receive_({macula_peering, gave_up, Failing, #{reason := {worker_down, broken}}}),
    Linked = Dial(Port),
    ?receive_({macula_peering, connected, _, _}),
    ?receive_({macula_peering, connected, _, _}),
    exit(Linked, broken),
    ?receive_({macula_peering, gave_up, Linked, #{reason := {worker_down, broken}}}),
    ?receive_({macula_peering, disconnected, _, {worker_down, broken}}),
    ?assertEqual([], ets:tab2list(macula_peering_aliases)).

only_a_connection_is_accepted(_) ->
    {L, _, Port} = raw_listen(),
    {Conn, Stream} = raw_dial(Port),
    [?assertMatch({error, _}, macula_peering:accept(Handle, #{identity => id()}))
     || Handle <- [L, Stream, make_ref(), self()]],
    %% All are still whose they were.
    ?assertMatch({ok, _}, macula_quic:sockname(L)),
    ok = macula_quic:controlling_process(Stream, self()),
    ok = macula_quic:close_connection(Conn, 0, <<>>),
    ok = macula_quic:close_listener(L),
    %% Nor is a link a listener, or a wait longer than any timer a wait.
    {C, _, _} = pair(),
    ?assertEqual({error, badarg}, macula_peering:sockname(C)),
    ?assertEqual({error, badarg}, macula_peering:listener_info(C)),
    ?assertMatch({error, {bad_option, _, _}},
                 macula_peering:send_frame(C, ping(1), #{timeout => 1 bsl 40})).

an_owner_that_subscribes_gets_each_frame_once(_) ->
    {C, S, _} = pair(),
    ok = macula_peering:subscribe(S, self()),
    [ok = macula_peering:send_frame(C, ping(N)) || N <- [1, 2, 3]],
    ?assertEqual([1, 2, 3], [nonce(frame(S)) || _ <- [1, 2, 3]]),
    ok = macula_peering:close(C),
    #{frame_type := goodbye} = frame(S),
    _ = disconnected(S),
    once(S).

%% Nothing of it reaches the worker, which could only fail.
what_is_wrong_is_told_to_the_caller(_) ->
    {C, S, _} = pair(),
    ?assertMatch({error, {bad_option, reason, _}},
                 macula_peering:close(C, {text, binary:copy(<<"x">>, 5000)})),
    %% Two keys of the wire's map would be the same.
    [?assertMatch({error, _}, macula_peering:send_frame(C, (ping(1))#{Key => <<1:512>>}))
     || Key <- [<<"signature">>, {text, <<"signature">>}, {text, <<"publisher_sig">>}]],
    ok = macula_peering:send_frame(C, ping(2)),
    ?assertEqual(2, nonce(frame(S))),
    %% A code that HELLO cannot carry is none: the peer is refused with the usual one.
    {_, ServerId, Port} = listen(#{allow => fun(_) -> {deny, 1 bsl 70} end}),
    ?assertMatch({refused, _}, disconnected(connect(Port, ServerId, #{}))).

a_window_outlives_the_replay_process(_) ->
    forget_windows(),
    ok = macula_peering_replay:cover(800_000),
    Kept = fun() -> maps:get(keep, sys:get_state(macula_peering_replay)) end,
    ?assert(Kept() >= 1_600_000),
    Old = whereis(macula_peering_replay),
    exit(Old, kill),
    macula_test_nodes:wait_until(fun() ->
        is_pid(whereis(macula_peering_replay)) andalso whereis(macula_peering_replay) =/= Old
    end),
    ?assert(Kept() >= 1_600_000).

%% A frame may be a hundred times as large as terms than it was as bytes.
an_idle_link_keeps_little_of_a_large_frame(_) ->
    {C, S, _} = pair(),
    ok = macula_peering:send_frame(C, result(lists:duplicate(400_000, {text, <<>>}))),
    #{frame_type := result} = frame(S),
    macula_test_nodes:wait_until(fun() ->
        {memory, Bytes} = process_info(S, memory),
        Bytes < 1_000_000 orelse Bytes
    end).

nothing_is_left_behind(_) ->
    Cycle = fun() ->
        {C, S, L} = pair(),
        ok = macula_peering:send_frame(C, result(binary:copy(<<0>>, 100_000))),
        _ = frame(S),
        ok = macula_peering:close(C),
        _ = disconnected(C),
        _ = disconnected(S),
        ok = macula_peering:close_listener(L),
        drop_messages()
    end,
    [Cycle() || _ <- lists:seq(1, 3)],
    Before = macula_test_nodes:snapshot(),
    no_atoms_by(fun() -> [Cycle() || _ <- lists:seq(1, 20)] end, 3),
    macula_test_nodes:await_no_leak(Before).

%% A module that is loaded meanwhile brings atoms once, and not each time.
no_atoms_by(Fun, Tries) ->
    Before = erlang:system_info(atom_count),
    _ = Fun(),
    case erlang:system_info(atom_count) of
        After when After > Before, Tries > 1 -> no_atoms_by(Fun, Tries - 1);
        After -> ?assertEqual(Before, After)
    end.

drop_messages() ->
    receive _ -> drop_messages() after 0 -> ok end.

%%% API

peers_are_listed_and_described(_) ->
    Id = id(),
    {C, S, _} = pair(#{identity => Id, realms => [<<1:256>>], capabilities => 0,
                       station_id => <<9:256>>}, #{capabilities => 1}),
    Public = pub(Id),
    ?assert(lists:member({S, Public}, macula_peering:peers())),
    {ok, Info} = macula_peering:peer_info(S),
    ?assertMatch(#{role := server, node_id := Public, station_id := <<9:256>>,
                   realms := [<<1:256>>], capabilities := 0, address := {"127.0.0.1", _},
                   since := _, rtt_us := _, frames_in := 0, frames_rejected := 0}, Info),
    ?assertMatch({ok, #{role := client, capabilities := 1, status := open}},
                 macula_peering:peer_info(C)),
    ok = macula_peering:close(C),
    _ = disconnected(S),
    _ = disconnected(C),
    ?assertNot(lists:keymember(C, 1, macula_peering:peers())),
    ?assertEqual({error, not_connected}, macula_peering:peer_info(C)).

%% Whoever sends reads the link's row.
what_a_peer_claims_does_not_burden_senders(_) ->
    Realms = [crypto:strong_rand_bytes(32) || _ <- lists:seq(1, 1024)],
    {C, S, _} = pair(#{realms => Realms}, #{hello_gap_ms => 0}),
    {ok, #{realms := Realms}} = macula_peering:peer_info(S),
    {ok, Row} = macula_peering_links:find(S),
    ?assert(erts_debug:flat_size(Row) < 256),
    ok = macula_peering:send_frame(S, ping(1)),
    ?assertEqual(1, nonce(frame(C))).

%% A peer that does not read fills the queue; then senders wait, and are told.
a_slow_peer_makes_senders_wait(_) ->
    {_, Id, C, _, Stream} = raw_server(#{send_timeout_ms => 3000}),
    ok = macula_quic:send(Stream, wire(hello_frame(Id, #{}))),
    ?receive_({macula_peering, connected, C, _}),
    Big = result(binary:copy(<<0>>, 60_000)),
    Sent = (fun Fill(N) ->
        case macula_peering:send_frame(C, Big) of
            ok when N < 1000 -> Fill(N + 1);
            {error, timeout} -> N
        end
    end)(0),
    %% The peer's window, ours, and the queue.
    ?assert(Sent * 60_000 < 20_000_000),
    %% The queue may be under its high mark still, and waiting was for its low one.
    More = (fun Fill(N) ->
        case macula_peering:send_frame(C, Big, #{timeout => 0}) of
            ok when N < 1000 -> Fill(N + 1);
            {error, busy} -> N
        end
    end)(0),
    ?assert(More * 60_000 =< 1_100_000),
    Self = self(),
    spawn_link(fun() -> Self ! {late, macula_peering:send_frame(C, Big, #{timeout => ?WAIT})} end),
    receive {late, Early} -> ct:fail(Early) after 100 -> ok end,
    ok = macula_quic:setopt(Stream, active, true),
    ?receive_({late, ok}),
    ?assertEqual({error, {bad_option, send_frame, invalid}},
                 macula_peering:send_frame(C, Big, #{tiemout => 1})).

credit_stops_and_resumes_delivery(_) ->
    {C, S, _} = pair(#{}, #{active => 3}),
    [ok = macula_peering:send_frame(C, ping(N)) || N <- lists:seq(1, 10)],
    ?assertEqual([1, 2, 3], [nonce(frame(S)) || _ <- [1, 2, 3]]),
    ?receive_({macula_peering, passive, S, undefined}),
    receive {macula_peering, frame, S, _} -> ct:fail(without_credit) after 100 -> ok end,
    ok = macula_peering:setopts(S, [{active, 2}]),
    ?assertEqual([4, 5], [nonce(frame(S)) || _ <- [4, 5]]),
    ?receive_({macula_peering, passive, S, undefined}),
    ok = macula_peering:setopts(S, [{active, once}]),
    ?assertEqual(6, nonce(frame(S))),
    ?receive_({macula_peering, passive, S, undefined}),
    ok = macula_peering:setopts(S, [{active, true}]),
    ?assertEqual([7, 8, 9, 10], [nonce(frame(S)) || _ <- lists:seq(7, 10)]),
    ?assertEqual({error, {bad_option, active, -1}}, macula_peering:setopts(S, [{active, -1}])),
    %% Without credit the peer's senders come to wait, and nothing is lost.
    ok = macula_peering:setopts(S, [{active, false}]),
    Big = result(binary:copy(<<0>>, 100_000)),
    Sent = (fun Fill(N) ->
        case macula_peering:send_frame(C, Big, #{timeout => 500}) of
            ok when N < 1000 -> Fill(N + 1);
            {error, timeout} -> N
        end
    end)(0),
    ok = macula_peering:setopts(S, [{active, true}]),
    [#{payload := _} = frame(S) || _ <- lists:seq(1, Sent)],
    receive {macula_peering, frame, S, Surplus} -> ct:fail(Surplus) after 100 -> ok end.

frames_before_a_loss_are_delivered(_) ->
    {C, S, _} = pair(#{}, #{active => 1}),
    [ok = macula_peering:send_frame(C, ping(N)) || N <- lists:seq(1, 5)],
    ?assertEqual(1, nonce(frame(S))),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{bytes_in := In}} = macula_peering:peer_info(S),
        In >= 5 * 219
    end),
    exit(C, kill),
    _ = disconnected(C),
    macula_test_nodes:wait_until(fun() ->
        macula_peering:send_frame(S, ping(1)) =:= {error, closed}
    end),
    ok = macula_peering:setopts(S, [{active, true}]),
    ?assertEqual([2, 3, 4, 5], [nonce(frame(S)) || _ <- lists:seq(2, 5)]),
    _ = disconnected(S).

subscribers_get_what_they_ask_for(_) ->
    {C, S, _} = pair(),
    Self = self(),
    Subscriber = fun(Filter) ->
        Pid = spawn_link(fun Loop() -> receive M -> Self ! {self(), M}, Loop() end end),
        ok = case Filter of
            all -> macula_peering:subscribe(S, Pid);
            _ -> macula_peering:subscribe(S, Pid, Filter)
        end,
        Pid
    end,
    [All, Dht, Result, Gone] = [Subscriber(F) || F <- [all, [dht], [result], all]],
    unlink(Gone),
    exit(Gone, kill),
    ok = macula_peering:send_frame(C, ping(1)),
    ok = macula_peering:send_frame(C, result(2)),
    ?receive_({All, {macula_peering, frame, S, #{frame_type := ping}}}),
    ?receive_({All, {macula_peering, frame, S, #{frame_type := result}}}),
    ?receive_({Dht, {macula_peering, frame, S, #{frame_type := ping}}}),
    ?receive_({Result, {macula_peering, frame, S, #{frame_type := result}}}),
    ok = macula_peering:unsubscribe(S, All),
    ok = macula_peering:close(C),
    [?receive_({Pid, {macula_peering, disconnected, S, peer_closed}}) || Pid <- [Dht, Result]],
    _ = disconnected(S),
    %% All that they have got has been passed on to here.
    [begin Pid ! passed_on, ?receive_({Pid, passed_on}) end || Pid <- [All, Dht, Result]],
    receive {Pid, M} when is_pid(Pid) -> ct:fail({Pid, M}) after 0 -> ok end,
    ?assertEqual({error, not_connected}, macula_peering:subscribe(S, self())).

a_link_that_ends_still_knows_its_subscribers(_) ->
    {C, S, _} = pair(),
    Self = self(),
    [Early, Late, Gone] = [spawn_link(fun Loop() -> receive M -> Self ! {self(), M}, Loop() end end)
                           || _ <- lists:seq(1, 3)],
    ok = macula_peering:subscribe(S, Early),
    ok = macula_peering:subscribe(S, Gone),
    %% The peer takes the farewell only later.
    ok = sys:suspend(C),
    ok = macula_peering:close(S),
    macula_test_nodes:wait_until(fun() ->
        {ok, #{status := Status}} = macula_peering:peer_info(S),
        Status =:= closing
    end),
    ok = macula_peering:subscribe(S, Late),
    ok = macula_peering:unsubscribe(S, Gone),
    ok = sys:resume(C),
    [?receive_({Pid, {macula_peering, disconnected, S, drained}}) || Pid <- [Early, Late]],
    _ = disconnected(S),
    [begin Pid ! passed_on, ?receive_({Pid, passed_on}) end || Pid <- [Early, Late, Gone]],
    receive {Pid, M} when is_pid(Pid) -> ct:fail({Pid, M}) after 0 -> ok end.

a_wrong_filter_is_named(_) ->
    {C, _, _} = pair(),
    [?assertEqual({error, {bad_option, filter, Why}}, macula_peering:subscribe(C, self(), Filter))
     || {Filter, Why} <- [{ping, ping}, {undefined, undefined}
                          | [{F, invalid} || F <- [[ping | pong], ["ping"], [1], #{}, <<"ping">>,
                                                   [{text, ping}]]]]],
    ?assertEqual({error, {bad_option, subscriber, me}}, macula_peering:subscribe(C, me)),
    [?assertEqual(ok, macula_peering:subscribe(C, self(), Filter))
     || Filter <- [all, [], [ping, dht], [{text, <<"novelty">>}]]].

only_a_listener_is_closed(_) ->
    {C, S, L} = pair(),
    {_, ServerId, Port} = listen(#{}),
    {ok, D} = macula_peering:connect(#{identity => id(), target => target(Port, ServerId),
                                       reconnect => true}),
    [?assertEqual({error, badarg}, macula_peering:close_listener(Pid)) || Pid <- [C, S, D]],
    ok = macula_peering:send_frame(C, ping(1)),
    ?assertEqual(1, nonce(frame(S))),
    ?assertEqual(ok, macula_peering:close_listener(L)),
    ?assertEqual(ok, macula_peering:close_listener(L)),
    ?assertNot(is_process_alive(L)).

what_answers_no_close_gives_an_error_at_once(_) ->
    ?assertEqual({error, badarg}, in_time(fun() -> macula_peering:close_listener(self()) end)),
    [begin
         Stranger = spawn_link(fun() -> answering(Answer) end),
         ?assertEqual({error, badarg}, in_time(fun() -> macula_peering:close_listener(Stranger) end)),
         ?assert(is_process_alive(Stranger)),
         unlink(Stranger),
         exit(Stranger, kill),
         ?assertEqual(ok, in_time(fun() -> macula_peering:close_listener(Stranger) end))
     end || Answer <- [foo, {ok, closed}, {error, unknown_call}, {error, not_connected}]].

answering(Answer) ->
    receive {'$gen_call', From, _} -> gen:reply(From, Answer) end,
    answering(Answer).

%% What a process of its own gets, which may hang.
in_time(Fun) ->
    {Pid, Ref} = spawn_monitor(fun() -> exit({result, Fun()}) end),
    receive
        {'DOWN', Ref, process, Pid, {result, Result}} -> Result
    after 5000 ->
        exit(Pid, kill),
        ct:fail(hangs)
    end.

%% A relay whose socket is another is to the server a peer that has moved.
the_address_is_where_the_peer_is_now(_) ->
    {_, ServerId, Port} = listen(#{}),
    {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}}),
    C = connect(macula_relay:port(Relay), ServerId, #{}),
    S = receive {macula_peering, connected, P, _} when P =/= C -> P after ?WAIT -> ct:fail(messages()) end,
    ?receive_({macula_peering, connected, C, _}),
    {ok, #{address := Before}} = macula_peering:peer_info(S),
    ok = macula_relay:rebind(Relay),
    N = macula_test_nodes:wait_until(fun() ->
        ok = macula_peering:send_frame(C, ping(1)),
        {ok, #{address := Now}} = macula_peering:peer_info(S),
        Now =/= Before andalso {value, Now}
    end),
    ?assertMatch({"127.0.0.1", _}, N),
    ok = macula_relay:stop(Relay).

%% A link is given by whose it is: the dialer asks its worker, and takes its word.
a_link_given_away_is_not_given_again(_) ->
    {_, ServerId, Port} = listen(#{}),
    {ok, D} = macula_peering:connect(#{identity => id(), target => target(Port, ServerId),
                                       reconnect => true}),
    Worker = dialled(),
    [First, Second] = [spawn_link(fun() -> receive never -> ok end end) || _ <- [1, 2]],
    ok = macula_peering:controlling_process(Worker, First),
    ?assertEqual({error, not_owner}, macula_peering:controlling_process(D, Second)),
    {ok, #{owner := First}} = macula_peering_links:find(D),
    %% What the dialer says goes where it went before.
    exit(Worker, kill),
    ?receive_({macula_peering, reconnecting, D, _}),
    Next = dialled(),
    ok = macula_peering:controlling_process(D, Second),
    ?assertMatch({ok, #{owner := Second}}, macula_peering_links:find(Next)).

control_changes_hands(_) ->
    {C, S, _} = pair(),
    Self = self(),
    New = spawn_link(fun Loop() -> receive M -> Self ! {new, M}, Loop() end end),
    ?assertEqual({error, not_owner},
                 begin
                     spawn_link(fun() -> Self ! macula_peering:controlling_process(S, Self) end),
                     ?receive_({error, W}, {error, W})
                 end),
    ok = macula_peering:controlling_process(S, New),
    ok = macula_peering:send_frame(C, ping(1)),
    ?receive_({new, {macula_peering, frame, S, #{nonce := <<1:128>>}}}),
    unlink(New),
    exit(New, kill),
    ?assertMatch(#{frame_type := goodbye}, frame(C)),
    ?assertEqual(peer_closed, disconnected(C)).

wrong_options_are_named(_) ->
    Good = #{identity => id(), target => #{host => "h", port => 1}},
    [?assertEqual({error, {bad_option, Key, Why}}, macula_peering:connect(Opts))
     || {Opts, Key, Why} <- [
        {[{identity, #{private => <<1:256>>}}], options, not_a_map}, {Good#{colour => red}, colour, unknown},
        {maps:remove(identity, Good), identity, missing}, {#{identity => id()}, target, missing},
        {Good#{identity => make_ref()}, identity, bad_identity},
        {Good#{realms => [<<1>>]}, realms, invalid}, {Good#{realms => x}, realms, x},
        {Good#{capabilities => -1}, capabilities, -1},
        {Good#{controlling_pid => me}, controlling_pid, me},
        {Good#{handshake_timeout_ms => 0}, handshake_timeout_ms, 0},
        {Good#{verify_frames => maybe_}, verify_frames, maybe_},
        {Good#{verify_frames => #{nonsense => none}}, verify_frames,
         {unknown_categories, [nonsense]}},
        {Good#{reconnect => #{min_delay => 1}}, {reconnect, min_delay}, unknown},
        {Good#{reconnect => #{jitter => 2}}, jitter, 2},
        {Good#{target => #{host => "h"}}, port, missing},
        {Good#{target => #{host => "h", port => 65536}}, port, 65536},
        {Good#{target => #{host => "h", port => 1, tls => pin}}, node_id, missing},
        {Good#{target => #{host => "h", port => 1, pin => 1}}, {target, pin}, unknown},
        {Good#{addresses => [#{a => self()}]}, addresses, invalid},
        {Good#{endorsements => [#{a => <<0:(70_000 * 8)>>}]}, endorsements, too_large},
        {Good#{endorsements => [#{a => <<0:(17_000_000 * 8)>>}]}, endorsements, too_large},
        {Good#{addresses => [#{a => <<0:(40_000 * 8)>>}], site => #{a => <<0:(30_000 * 8)>>}},
         addresses, too_large},
        {Good#{max_terms => 0}, max_terms, 0},
        {Good#{role => server}, role, server},
        {Good#{allow => all}, allow, unknown}]],
    %% What is accepted is also taken by a peer.
    {_, ServerId, ServerPort} = listen(#{site => #{a => <<0:(63_000 * 8)>>}}),
    C = connect(ServerPort, ServerId, #{endorsements => [#{a => <<0:(64_000 * 8)>>}],
                                        role => client}),
    ?receive_({macula_peering, connected, C, _}),
    ?assertEqual({error, {bad_option, port, -1}},
                 macula_peering:listen(#{identity => id(), port => -1})),
    ?assertEqual({error, {bad_option, allow, invalid}},
                 macula_peering:listen(#{identity => id(), port => 0, allow => [x]})),
    ?assertEqual({error, {bad_option, target, unknown}},
                 macula_peering:accept(make_ref(), Good)),
    ?assertMatch({error, _}, macula_peering:accept(make_ref(), #{identity => id()})),
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}]),
    {ok, Port} = inet:port(Socket),
    ?assertEqual({error, eaddrinuse},
                 macula_peering:listen(#{identity => id(), port => Port, address => ?LOCAL})).

wrong_options_of_a_target_are_named_at_once(_) ->
    Bytes = fun(N) -> binary:copy(<<"a">>, N) end,
    Wrong = #{
        host => ["", <<>>, "a b", <<"a b">>, " ", "a\n", [0], [16#2000], [foo], ["h"], [$h | x], "[::1", {1, 2, 3},
                 Bytes(254), undefined, localhost, 7],
        port => [0, -1, 65536, "1", http],
        node_id => [<<1>>, <<1:264>>, undefined, 7],
        expected_node_id => [<<1>>, id],
        pin_tls_cert => [1, undefined],
        verify => [verify_none, undefined],
        tls => [none_, undefined],
        alpn => [[], [""], [<<>>], [1.5], [undefined], [<<"a">> | b], [Bytes(256)], [7, x], h3, <<"h3">>],
        timeout_ms => [0, -1, 1 bsl 32, never, 1.5],
        server_name => ["", <<>>, "a b", <<"a b">>, "a..b", "-", "*.a", [0], [foo], [$h | x], [16#2000], <<255>>,
                        "1.2.3.4:5", Bytes(254), undefined, 7],
        cacertfile => ["", <<>>, [0], [foo], [$f | x], ["f"], undefined, 7],
        local_address => ["", <<>>, "localhost", "127.0.0.1:x", "127.0.0.1:65536", {1, 2}, {"127.0.0.1", -1},
                          [foo], [$1 | x], foo, 7]},
    ?assertEqual([], macula_peering_opts:keys(target) -- maps:keys(Wrong)),
    Good = #{host => "127.0.0.1", port => 1},
    [begin
         Target = maps:merge(Good, Trust#{Key => Value}),
         ?assertMatch({Target, {error, {bad_option, Key, Why}}} when is_atom(Why) orelse is_number(Why),
                      {Target, macula_peering:connect(#{identity => id(), target => Target,
                                                        reconnect => Reconnect})})
     end || {Key, Values} <- maps:to_list(Wrong), Value <- Values ++ [make_ref(), #{}],
            %% Whatever the dial would have looked at.
            Trust <- [#{}, #{node_id => <<1:256>>}, #{tls => none}], Reconnect <- [false, true]],
    nothing_was_begun().

%% What is refused leaves no worker and no listener, and nobody hears of one.
nothing_was_begun() ->
    [?assertEqual(0, proplists:get_value(active, supervisor:count_children(Sup)))
     || Sup <- [macula_peering_conn_sup, macula_peering_dialer_sup, macula_peering_listener_sup]],
    _ = sys:get_state(macula_peering_links),
    receive {macula_peering, _, _, _} = Event -> ct:fail(Event) after 0 -> ok end.

wrong_options_of_every_call_are_named_at_once(_) ->
    Good = #{identity => id()},
    Calls = #{
        connect => fun(Opts) ->
            macula_peering:connect(maps:merge(Good#{target => #{host => "127.0.0.1", port => 1}}, Opts))
        end,
        reconnect => fun(Opts) ->
            macula_peering:connect(Good#{target => #{host => "127.0.0.1", port => 1}, reconnect => Opts})
        end,
        accept => fun(Opts) -> macula_peering:accept(make_ref(), maps:merge(Good, Opts)) end,
        listen => fun(Opts) ->
            macula_peering:listen(maps:merge(Good#{port => 0, address => ?LOCAL}, Opts))
        end},
    [begin
         Told = Call(#{Key => Value}),
         ?assertMatch({Role, Key, Value, {error, {bad_option, Key, _}}}, {Role, Key, Value, Told}),
         {error, {bad_option, _, Why}} = Told,
         ?assert(is_atom(Why))
     end || {Role, Call} <- maps:to_list(Calls), Key <- macula_peering_opts:keys(Role),
            Value <- [make_ref(), {no, value}, <<1:3>>]],
    #{listen := Listen} = Calls,
    [?assertEqual({Key, Value, {error, {bad_option, Key, Why}}}, {Key, Value, Listen(#{Key => Value})})
     || {Key, Values, Why} <- [
            {address, ["", <<>>, "localhost", "a b", "127.0.0.1:80", "[::1", [foo], [$h | x], {1, 2}], invalid},
            {alpn, [[], [""], [1.5], [<<"a">> | b], [binary:copy(<<"a">>, 256)]], invalid},
            {max_handshaking, [2_000_000], 2_000_000}, {sans, [["a", <<>>], ["a", x], ["a" | x]], {bad_san, 2}}],
        Value <- Values],
    nothing_was_begun().

what_may_be_right_later_is_the_dials_error(Config) ->
    File = filename:join(proplists:get_value(priv_dir, Config), "no_such_file.pem"),
    Target = #{host => "127.0.0.1", port => 1},
    [begin
         {ok, C} = macula_peering:connect(#{identity => id(), target => maps:merge(Target, Later)}),
         ?assertEqual({connect_failed, Why}, disconnected(C))
     end || {Later, Why} <- [
        {#{tls => webpki, cacertfile => File}, {bad_cacertfile, File, enoent}},
        {#{host => "fe80::1%nosuch"}, {bad_option, host, no_such_interface}},
        {#{local_address => "192.0.2.1", tls => none}, eaddrnotavail}]].

any_factor_ends_at_the_longest_delay(_) ->
    Port = macula_test_nodes:free_udp_port(),
    [begin
         {ok, D} = macula_peering:connect(#{
             identity => id(), target => #{host => "127.0.0.1", port => Port, tls => none, timeout_ms => 10},
             reconnect => #{min_delay_ms => 5, max_delay_ms => 7, factor => Factor, jitter => 0}}),
         [?receive_({macula_peering, reconnecting, D, #{attempt := Attempt, delay_ms := Delay}})
          || {Attempt, Delay} <- [{2, 5}, {3, 7}, {4, 7}]],
         ok = macula_peering:close(D)
     end || Factor <- [1.5, 1.0e308, 1 bsl 2000]].

%% The caller has its error; of a worker that it never knew it hears nothing.
an_accept_that_fails_leaves_nothing(_) ->
    {L, Id, Port} = raw_listen(),
    {Dialled, _} = raw_dial(Port),
    {ok, Conn} = macula_quic:accept(L, ?WAIT),
    Self = self(),
    spawn_link(fun() ->
        Self ! {tried, macula_peering:accept(Conn, #{identity => Id, controlling_pid => Self})}
    end),
    ?receive_({tried, {error, not_owner}}),
    ?assertEqual({error, badarg}, macula_peering:accept(make_ref(), #{identity => Id})),
    macula_test_nodes:wait_until(fun() ->
        proplists:get_value(active, supervisor:count_children(macula_peering_conn_sup)) =:= 0
    end),
    _ = sys:get_state(macula_peering_links),
    receive {macula_peering, _, _, _} = Event -> ct:fail(Event) after 0 -> ok end,
    %% The connection is still the caller's.
    {ok, S} = macula_peering:accept(Conn, #{identity => Id}),
    ok = macula_quic:close_connection(Dialled),
    %% Whether before the worker has taken it up, or after.
    ?assertEqual(peer_closed, disconnected(S)).

%% Wherever the dialler is by then: before its stream, its CONNECT or its first read.
the_reason_of_a_server_that_closes_at_once_is_told(_) ->
    {L, Id, Port} = raw_listen(),
    Server = spawn_link(fun Close() ->
        case macula_quic:accept(L, infinity) of
            {ok, Conn} ->
                ok = macula_quic:close_connection(Conn, 7, <<"not today">>),
                Close();
            {error, closed} ->
                ok
        end
    end),
    Watch = monitor(process, Server),
    Ends = [disconnected(connect(Port, Id, #{})) || _ <- lists:seq(1, 100)],
    ?assertEqual([{connection_lost, {application_close, 7, <<"not today">>}}], lists:usort(Ends)),
    ok = macula_quic:close_listener(L),
    ?receive_({'DOWN', Watch, process, Server, normal}).

the_accept_owner_is_told_on_either_side(_) ->
    Self = self(),
    [begin
        {L, ServerId, Port} = listen(#{accept_owner => Self}),
        Public = pub(ServerId),
        {ok, C} = macula_peering:connect(Extra#{identity => id(), accept_owner => Self,
                                                target => target(Port, ServerId)}),
        ?receive_({macula_peering, handshake_complete, _, Public}),
        S = ?receive_({macula_peering, handshake_complete, Other, NodeId} when NodeId =/= Public, Other),
        {ok, #{role := server}} = macula_peering:peer_info(S),
        ok = macula_peering:close(C),
        ?assertEqual(peer_closed, disconnected(S)),
        ok = macula_peering:close_listener(L)
     end || Extra <- [#{}, #{reconnect => true}]].

without_the_application_it_says_so(_) ->
    ok = application:stop(macula),
    Opts = #{identity => id(), target => #{host => "h", port => 1}},
    ?assertEqual({error, not_started}, macula_peering:connect(Opts)),
    ?assertEqual({error, not_started}, macula_peering:connect(Opts#{reconnect => true})),
    ?assertEqual({error, not_started}, macula_peering:listen(#{identity => id(), port => 0})),
    ?assertEqual({error, not_started}, macula_peering:send_frame(self(), ping(1))),
    ?assertEqual({error, not_started}, macula_peering:peer_info(self())),
    ?assertEqual([], macula_peering:peers()),
    {ok, _} = application:ensure_all_started(macula).

a_lost_link_is_dialled_again(_) ->
    {_, ServerId, Port} = listen(#{}),
    {ok, Relay} = macula_relay:start_link(#{target => {?LOCAL, Port}}),
    Fast = #{idle_timeout_ms => 1500, keep_alive_interval_ms => 300},
    {ok, D} = macula_peering:connect(Fast#{
        identity => id(),
        target => (target(macula_relay:port(Relay), ServerId))#{timeout_ms => 1000},
        reconnect => #{min_delay_ms => 20, max_delay_ms => 100}}),
    %% The server's worker answers before, or after, the dialled one says it is connected.
    First = dialled(),
    ok = macula_peering:send_frame(D, ping(1)),
    ok = macula_relay:set(Relay, #{blackhole => true}),
    ?receive_({macula_peering, disconnected, First, {connection_lost, _}}),
    ?receive_({macula_peering, reconnecting, D, #{attempt := 1, delay_ms := Delay1,
                                                  reason := {connection_lost, _}}},
              ?assert(Delay1 =< 20)),
    ?receive_({macula_peering, reconnecting, D, #{attempt := 3, delay_ms := Delay3,
                                                  reason := {connect_failed, timeout}}},
              ?assert(Delay3 =< 100)),
    ok = macula_relay:set(Relay, #{blackhole => false}),
    Second = dialled(),
    ?assertNotEqual(First, Second),
    ok = macula_peering:send_frame(D, ping(2)),
    ?assertMatch({ok, #{pid := Second}}, macula_peering:peer_info(D)),
    %% A close is final.
    ok = macula_peering:close(D),
    ?assertEqual(drained, disconnected(Second)),
    ?assertNot(is_process_alive(D)),
    ok = macula_relay:stop(Relay).

dialled() ->
    Pid = ?receive_({macula_peering, connected, P, _}, P),
    case macula_peering:peer_info(Pid) of
        {ok, #{role := client}} -> Pid;
        _ -> dialled()
    end.

%% A station that ends each link as soon as it stands is not dialled at the shortest pace for ever.
a_link_that_ends_as_soon_as_it_stands_is_dialled_less_and_less(_) ->
    Station = spawn_link(fun Loop() ->
        receive
            {macula_peering, connected, Pid, _} -> ok = macula_peering:close(Pid), Loop();
            _ -> Loop()
        end
    end),
    {_, ServerId, Port} = listen(#{controlling_pid => Station, hello_gap_ms => 0}),
    {ok, D} = macula_peering:connect(#{
        identity => id(), target => target(Port, ServerId),
        reconnect => #{min_delay_ms => 1000, max_delay_ms => 2400, jitter => 0}}),
    Delays = [?receive_({macula_peering, reconnecting, D, #{attempt := N, delay_ms := Delay}}, {N, Delay})
              || _ <- lists:seq(1, 4)],
    ?assertEqual([{1, 1000}, {2, 1000}, {3, 2000}, {4, 2400}], Delays),
    ok = macula_peering:close(D),
    unlink(Station),
    exit(Station, kill).

a_dialer_gives_up_and_closes(_) ->
    {ok, Socket} = gen_udp:open(0, [{ip, ?LOCAL}, {active, false}]),
    {ok, Port} = inet:port(Socket),
    Opts = #{identity => id(), target => #{host => "127.0.0.1", port => Port, node_id => <<1:256>>,
                                           timeout_ms => 30},
             reconnect => #{min_delay_ms => 5, max_delay_ms => 10, max_attempts => 3}},
    {ok, D} = macula_peering:connect(Opts),
    ?receive_({macula_peering, gave_up, D, #{attempts := 3, reason := {connect_failed, timeout}}}),
    [?receive_({macula_peering, disconnected, _, {connect_failed, timeout}}) || _ <- [1, 2, 3]],
    ?assertEqual({error, not_connected}, macula_peering:send_frame(D, ping(1))),
    %% Its owner's death ends it, too.
    {Owner, Ref} = spawn_monitor(fun() ->
        {ok, D2} = macula_peering:connect(Opts#{reconnect => #{min_delay_ms => 5}}),
        exit({dialer, D2})
    end),
    D2 = receive {'DOWN', Ref, process, Owner, {dialer, Pid}} -> Pid end,
    macula_test_nodes:wait_until(fun() -> not is_process_alive(D2) end),
    ok = gen_udp:close(Socket).

sending_to_nobody_says_so(_) ->
    ?assertEqual({error, not_connected}, macula_peering:send_frame(self(), ping(1))),
    ?assertEqual({error, not_connected}, macula_peering:send_frame(self(), ping(1), #{timeout => 1})),
    ?assertEqual({error, not_connected}, macula_peering:open_stream(self())),
    ?assertEqual({error, not_connected}, macula_peering:setopts(self(), [{active, true}])),
    ok = macula_peering:close(spawn(fun() -> ok end)),
    ?assertEqual({error, {bad_option, reason, 7}}, macula_peering:close(self(), 7)),
    ?assertEqual({error, {bad_option, reason, undefined}}, macula_peering:close(self(), undefined)).

reasons_have_words(_) ->
    [?assert(is_binary(unicode:characters_to_binary(macula_peering:format_reason(R))))
     || R <- [drained, peer_closed, peer_closed_during_drain, handshake_timeout, owner_down,
              {connect_failed, timeout}, {connection_lost, timeout}, {refused, 16},
              {peer_identity_mismatch, <<0:256>>, <<1:256>>}, {protocol_error, x}, other]].
