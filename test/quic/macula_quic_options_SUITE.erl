%% What options do, seen from outside. Which values they take is for macula_quic_options_tests and
%% prop_macula_quic; options with a suite of their own for their subject are tested there.
-module(macula_quic_options_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include_lib("kernel/include/file.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([the_first_window_is_so_many_packets/1, congestion_control_by_number/1,
         the_window_begins_anew_after_silence/1, a_path_is_probed_again_after_a_time/1,
         the_mtu_stays_within_its_bounds/1, tls_secrets_go_to_the_file/1,
         a_file_for_secrets_that_cannot_be_opened_is_told/1, the_peer_learns_of_a_stream_at_once/1,
         a_stream_that_would_wait_fails/1, a_unidirectional_stream_by_flag/1,
         a_stream_has_its_own_high_watermark/1, a_higher_watermark_lets_senders_go_on/1,
         an_accepted_stream_has_a_priority/1, a_local_address_with_its_port/1,
         a_handshake_ends_in_time/1, a_retry_is_asked_for_by_a_share_of_memory/1,
         datagrams_are_switched_off_by_number/1, windows_bound_what_is_unread/1,
         an_active_mode_without_messages_is_passive/1,
         a_peer_that_does_not_answer_is_left/1, a_peer_with_nothing_to_answer_is_not_left/1,
         what_is_not_acknowledged_ends_a_connection_in_its_idle_timeout/1,
         every_call_answers_for_every_key/1, the_least_and_the_largest_values_work/1,
         a_configuration_of_another_library_connects/1]).

-import(macula_quic_lab, [listen/1, pair/2, pair/3, stream/1, stream/2, client_options/1]).

all() -> macula_quic_lab:cases(?MODULE, []).

suite() ->
    [{timetrap, {minutes, 2}}].

init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

stat(Conn, Name) ->
    {ok, [{Name, Value}]} = macula_quic:getstat(Conn, [Name]),
    Value.

%%--------------------------------------------------------------------------------------------
%% The path

the_first_window_is_so_many_packets(_Config) ->
    %% What the handshake has acknowledged is added by some.
    [begin
         #{client := C} = Pair = pair(#{}, Options#{initial_window_packets => Packets}),
         Window = stat(C, cwnd),
         ?assert(Window >= Packets * 1200),
         ?assert(Window < Packets * 1200 + 30000),
         macula_quic_lab:close(Pair)
     end || Options <- [#{congestion_control => CC} || CC <- [cubic, new_reno, bbr]],
            Packets <- [100, 1000]],
    #{server := S} = pair(#{initial_window_packets => 300}, #{}),
    ?assert(stat(S, cwnd) >= 300 * 1200),
    %% A small one works, too.
    #{client := Small} = Pair = pair(#{}, #{initial_window_packets => 2}),
    ?assert(stat(Small, cwnd) >= 2 * 1200),
    {Here, There} = stream(Pair),
    ok = macula_quic:send(Here, binary:copy(<<"x">>, 100000), #{fin => true}),
    ?assertEqual(100000, byte_size(macula_quic_lab:read_to_end(There))).

%% The controllers begin with different windows.
congestion_control_by_number(_Config) ->
    Window = fun(Number) ->
        #{client := C} = pair(#{}, #{congestion_control_algorithm => Number}),
        stat(C, cwnd)
    end,
    ?assert(Window(0) < 100000),
    ?assert(Window(1) > 200000).

the_window_begins_anew_after_silence(_Config) ->
    [begin
         #{client := C} = Pair = pair(#{}, Options),
         {Here, There} = stream(Pair),
         Reader = spawn_link(fun() -> receive go -> macula_quic_lab:read_to_end(There) end end),
         ok = macula_quic:controlling_process(There, Reader),
         Reader ! go,
         ok = macula_quic:send(Here, binary:copy(<<"x">>, 8000000)),
         ok = macula_quic:tell_delivered(Here),
         ?EXPECT({quic, delivered, Here, undefined}, ok, 60000),
         Grown = stat(C, cwnd),
         ?assert(Grown > 60000),
         silence(1000),
         ok = macula_quic:send(Here, <<"again">>),
         ok = macula_quic:tell_delivered(Here),
         ?EXPECT({quic, delivered, Here, undefined}),
         ?assertEqual(Anew, stat(C, cwnd) < 60000),
         ok = macula_quic:send(Here, <<>>, #{fin => true})
     end || {Options, Anew} <- [{#{send_idle_timeout_ms => 300}, true}, {#{}, false}]].

%% Nothing is sent for so many milliseconds.
silence(Milliseconds) ->
    Until = erlang:monotonic_time(millisecond) + Milliseconds,
    macula_test_nodes:wait_until(fun() -> erlang:monotonic_time(millisecond) >= Until end).

a_path_is_probed_again_after_a_time(_Config) ->
    {L, Port} = listen(#{}),
    Path = path(Port),
    narrow(Path, 1250),
    Options = #{mtu_discovery_search_complete_timeout_us => 200000, initial_rtt_ms => 20,
                keep_alive_interval_ms => 50},
    #{client := C} = pair(L, path_port(Path), Options),
    macula_test_nodes:wait_until(fun() -> stat(C, mtu_probes_lost) >= 2 end),
    ?assert(stat(C, mtu) =< 1250),
    narrow(Path, 65535),
    macula_test_nodes:wait_until(fun() -> stat(C, mtu) > 1400 end).

the_mtu_stays_within_its_bounds(_Config) ->
    #{client := C, server := S} = pair(#{maximum_mtu => 1300}, #{minimum_mtu => 1280}),
    ?assert(stat(C, mtu) >= 1280),
    macula_test_nodes:wait_until(fun() -> stat(S, mtu) > 1270 end),
    ?assert(stat(S, mtu) =< 1300).

a_local_address_with_its_port(_Config) ->
    {L, Port} = listen(#{}),
    [begin
         {ok, Socket} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
         {ok, Free} = inet:port(Socket),
         ok = gen_udp:close(Socket),
         #{client := C, server := S} = pair(L, Port, #{local_address => Text(Free)}),
         ?assertEqual({ok, {"127.0.0.1", Free}}, macula_quic:peername(S)),
         ?assertEqual({ok, {"127.0.0.1", Free}}, macula_quic:sockname(C)),
         ok = macula_quic:close(C)
     end || Text <- [fun(Free) -> "127.0.0.1:" ++ integer_to_list(Free) end,
                     fun(Free) -> <<"127.0.0.1:", (integer_to_binary(Free))/binary>> end]].

a_handshake_ends_in_time(_Config) ->
    {ok, Silent} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}, {active, false}]),
    {ok, Port} = inet:port(Silent),
    [begin
         {Micros, Result} = timer:tc(fun() ->
             macula_quic:connect("127.0.0.1", Port, client_options(#{Key => 200}), 60000)
         end),
         ?assertEqual({error, timeout}, Result),
         ?assert(Micros >= 200000),
         ?assert(Micros < 20000000)
     end || Key <- [handshake_timeout_ms, handshake_idle_timeout_ms]],
    %% 0 is no limit of its own.
    ?assertEqual({error, timeout},
                 macula_quic:connect("127.0.0.1", Port, client_options(#{handshake_idle_timeout_ms => 0}),
                                     300)),
    ok = gen_udp:close(Silent).

%% A Retry is a long header of type 3 (RFC 9000, section 17.2.5).
a_retry_is_asked_for_by_a_share_of_memory(_Config) ->
    [begin
         {L, Port} = listen(#{retry_memory_limit => Share}),
         Path = path(Port),
         _ = pair(L, path_port(Path), #{}),
         <<Form:1, _:1, Type:2, _:4, _/binary>> = first_answer(Path),
         ?assertEqual({1, Retried}, {Form, Type =:= 3})
     end || {Share, Retried} <- [{0, true}, {65, false}, {65535, false}]],
    ?assertEqual({error, {unsupported_option, retry_memory_limit}},
                 macula_quic:listen("127.0.0.1", 0, macula_quic_lab:server_options(
                     #{retry_memory_limit => 100}))).

datagrams_are_switched_off_by_number(_Config) ->
    #{client := C, server := S} = pair(#{datagram_receive_enabled => 0},
                                       #{datagram_receive_enabled => 1}),
    ?assertEqual({error, unsupported}, macula_quic:send_datagram(C, <<"x">>)),
    %% Nor does Quinn send any then.
    ?assertEqual({error, disabled}, macula_quic:send_datagram(S, <<"x">>)).

%% What is sent waits here but for what the peer has room for.
windows_bound_what_is_unread(_Config) ->
    Sent = 200000,
    Data = binary:copy(<<"x">>, Sent),
    %% A byte has announced each stream, and was read.
    #{client := C} = Pair = pair(#{stream_recv_window_default => 65536}, #{}),
    {Here, _There} = stream(Pair),
    ok = macula_quic:send(Here, Data),
    macula_test_nodes:wait_until(fun() -> stat(C, send_pend) =< Sent - 65536 + 1 end),
    ?assert(stat(C, send_pend) >= Sent - 65536 - 1),
    #{client := C2} = Pair2 = pair(#{conn_flow_control_window => 32768}, #{}),
    [ok = macula_quic:send(Out, Data) || {Out, _In} <- [stream(Pair2) || _ <- [1, 2]]],
    macula_test_nodes:wait_until(fun() -> stat(C2, send_pend) =< 2 * Sent - 32768 + 2 end),
    ?assert(stat(C2, send_pend) >= 2 * Sent - 32768 - 2).

%%--------------------------------------------------------------------------------------------
%% Secrets of TLS

tls_secrets_go_to_the_file(Config) ->
    Dir = proplists:get_value(priv_dir, Config),
    [Client, Server] = [filename:join(Dir, Name) || Name <- ["client.keys", "server.keys"]],
    #{client := C} = Pair = pair(#{sslkeylogfile => list_to_binary(Server)},
                                 #{sslkeylogfile => Client}),
    _ = stream(Pair),
    Lines = fun(File) ->
        {ok, Text} = file:read_file(File),
        [binary:split(Line, <<" ">>, [global]) || Line <- binary:split(Text, <<"\n">>, [global, trim])]
    end,
    Kept = lists:sort(Lines(Client)),
    ?assertEqual(Kept, lists:sort(Lines(Server))),
    Labels = [<<"CLIENT_HANDSHAKE_TRAFFIC_SECRET">>, <<"CLIENT_TRAFFIC_SECRET_0">>,
              <<"SERVER_HANDSHAKE_TRAFFIC_SECRET">>, <<"SERVER_TRAFFIC_SECRET_0">>],
    ?assertEqual([], Labels -- [Label || [Label, _, _] <- Kept]),
    [Random] = lists:usort([R || [_, R, _] <- Kept]),
    ?assertEqual(32, byte_size(binary:decode_hex(Random))),
    [begin
         {ok, #file_info{mode = Mode}} = file:read_file_info(File),
         ?assertEqual(8#600, Mode band 8#777)
     end || File <- [Client, Server]],
    ok = macula_quic:close(C),
    %% What was there stays.
    _ = pair(#{}, #{sslkeylogfile => Client}),
    ?assertEqual(Kept, lists:sort([L || [_, R, _] = L <- Lines(Client), R =:= Random])),
    ?assertEqual(2, length(lists:usort([R || [_, R, _] <- Lines(Client)]))).

a_file_for_secrets_that_cannot_be_opened_is_told(Config) ->
    Dir = proplists:get_value(priv_dir, Config),
    {_L, Port} = Listening = listen(#{}),
    [begin
         Error = {error, {bad_option, sslkeylogfile, Why}},
         ?assertEqual(Error, macula_quic:listen("127.0.0.1", 0, macula_quic_lab:server_options(
                                 #{sslkeylogfile => File}))),
         ?assertEqual(Error, macula_quic:connect("127.0.0.1", Port,
                                                 client_options(#{sslkeylogfile => File}), 5000)),
         ?assertNotEqual("", macula_quic:format_error(Error))
     end || {File, Why} <- [{filename:join([Dir, "nowhere", "keys"]), enoent}, {Dir, eisdir}]],
    ok = macula_quic:close(element(1, Listening)).

%%--------------------------------------------------------------------------------------------
%% Streams

the_peer_learns_of_a_stream_at_once(_Config) ->
    #{client := C, server := S} = pair(#{}, #{}),
    {ok, Here} = macula_quic:open_stream(C, #{start_flag => 1}),
    {ok, There} = macula_quic:accept_stream(S, #{}, 10000),
    ?assertEqual({error, timeout}, macula_quic:recv(There, 0, 0)),
    [ok, ok] = [macula_quic:send(X, <<"later">>, #{fin => true}) || X <- [Here, There]],
    ?assertEqual([<<"later">>, <<"later">>], [macula_quic_lab:read_to_end(X) || X <- [Here, There]]),
    %% One without data may end.
    {ok, Empty} = macula_quic:open_stream(C, #{start_flag => 1, direction => unidirectional}),
    {ok, Ended} = macula_quic:accept_stream(S, #{}, 10000),
    ok = macula_quic:close_stream(Empty),
    ?assertEqual({error, closed}, macula_quic:recv(Ended, 0, 10000)),
    %% Not by itself, while somebody holds the handle.
    {ok, Unknown} = macula_quic:open_stream(C, #{start_flag => 0}),
    ?assertEqual({error, timeout}, macula_quic:accept_stream(S, #{}, 300)),
    ?assertMatch({ok, #{state := open}}, macula_quic:info(Unknown)).

a_stream_that_would_wait_fails(_Config) ->
    #{client := C} = pair(#{peer_bidi_stream_count => 1}, #{}),
    {ok, _First} = macula_quic:open_stream(C, #{start_flag => 2}),
    ?assertEqual({error, timeout}, macula_quic:open_stream(C, #{start_flag => 2, timeout => infinity})),
    ?assertEqual({error, timeout}, macula_quic:open_stream(C, #{start_flag => 6, timeout => infinity})).

a_unidirectional_stream_by_flag(_Config) ->
    #{client := C} = pair(#{}, #{}),
    [begin
         {ok, Stream} = macula_quic:open_stream(C, #{open_flag => Flag}),
         ?assertMatch({ok, #{direction := Direction}}, macula_quic:info(Stream))
     end || {Flag, Direction} <- [{0, bidirectional}, {1, unidirectional}]],
    ?assertEqual({error, {unsupported_option, open_flag}}, macula_quic:open_stream(C, #{open_flag => 2})).

a_stream_has_its_own_high_watermark(_Config) ->
    %% The peer reads nothing, and has room for little.
    Narrow = #{stream_recv_window => 1024},
    #{client := C, server := S} = pair(Narrow, Narrow),
    Data = binary:copy(<<"x">>, 10000),
    {ok, Plain} = macula_quic:open_stream(C),
    ok = macula_quic:async_send(Plain, Data),
    {ok, Answering} = macula_quic:accept_stream(S, #{ideal_send_buffer_size => 4096}, 10000),
    {ok, Small} = macula_quic:open_stream(C, #{ideal_send_buffer_size => 4096}),
    ok = macula_quic:async_send(Plain, Data),
    [begin
         ok = macula_quic:async_send(Stream, Data),
         ?assertEqual({error, busy}, macula_quic:async_send(Stream, Data))
     end || Stream <- [Small, Answering]],
    ok = macula_quic:async_send(Plain, Data),
    ok = macula_quic:setopt(Plain, high_watermark, 4096),
    ?assertEqual({error, busy}, macula_quic:async_send(Plain, Data)),
    [?assertEqual({error, {bad_option, high_watermark, {wanted, {integer, 1, 1 bsl 40}}}},
                  macula_quic:setopt(Plain, high_watermark, Wrong)) || Wrong <- [0, -1, x, 1 bsl 41]],
    ?assertEqual({error, badarg}, macula_quic:setopt(C, high_watermark, 1)).

a_higher_watermark_lets_senders_go_on(_Config) ->
    #{client := C} = pair(#{stream_recv_window => 1024}, #{}),
    {ok, Stream} = macula_quic:open_stream(C, #{high_watermark => 4096}),
    Data = binary:copy(<<"x">>, 10000),
    ok = macula_quic:send(Stream, Data),
    Self = self(),
    _ = spawn_link(fun() -> Self ! {sent, macula_quic:send(Stream, Data)} end),
    ?assertEqual({error, timeout}, macula_quic:send(Stream, Data, #{timeout => 200})),
    ?NOTHING({sent, _}),
    ok = macula_quic:setopt(Stream, high_watermark, 1000000),
    ?EXPECT({sent, ok}).

an_accepted_stream_has_a_priority(_Config) ->
    Size = 1000000,
    %% Nothing much leaves before both have all.
    Pair = macula_quic_lab:through(#{rate => 4000000}, #{conn_flow_control_window => 20000}),
    #{client := C, server := S} = Pair,
    [{ok, LowOut}, {ok, HighOut}] = [macula_quic:open_stream(C) || _ <- [1, 2]],
    [ok = macula_quic:send(Out, <<"!">>) || Out <- [LowOut, HighOut]],
    {ok, Low} = macula_quic:accept_stream(S, #{}, 10000),
    {ok, High} = macula_quic:accept_stream(S, #{priority => 10}, 10000),
    Data = binary:copy(<<"x">>, Size),
    [ok = macula_quic:send(In, Data, #{fin => true}) || In <- [Low, High]],
    ok = macula_quic:setopt(C, conn_flow_control_window, 1 bsl 26),
    [ok = macula_quic:setopt(Out, active, true) || Out <- [LowOut, HighOut]],
    Before = until_end(HighOut, LowOut, 0),
    %% What the first window let through is ahead.
    ?assert(Before < Size div 2).

%% How much of another stream has come when one ends.
until_end(Stream, Other, Bytes) ->
    receive
        {quic, peer_send_shutdown, Stream, undefined} -> Bytes;
        {quic, Data, Other, _} when is_binary(Data) -> until_end(Stream, Other, Bytes + byte_size(Data));
        {quic, Data, Stream, _} when is_binary(Data) -> until_end(Stream, Other, Bytes)
    after 60000 ->
        error(not_ended)
    end.

an_active_mode_without_messages_is_passive(_Config) ->
    #{client := C, server := S} = pair(#{}, #{}),
    [begin
         {ok, Here} = macula_quic:open_stream(C, #{active => Active}),
         ok = macula_quic:send(Here, <<"!">>),
         {ok, There} = macula_quic:accept_stream(S, #{active => Active}, 10000),
         [?assertMatch({ok, #{active := false}}, macula_quic:info(X)) || X <- [Here, There]],
         ?assertEqual({ok, <<"!">>}, macula_quic:recv(There, 1, 10000))
     end || Active <- [0, -1, -32768]].

%% However much is sent: silence is that of the peer.
what_is_not_acknowledged_ends_a_connection_in_its_idle_timeout(_Config) ->
    #{relay := Relay, client := C} = Pair =
        macula_quic_lab:through(#{}, #{idle_timeout_ms => 1500, keep_alive_interval_ms => 200}),
    {Here, _There} = stream(Pair),
    ok = macula_relay:set(Relay, #{blackhole => true}),
    _ = spawn_link(fun() -> send_on(Here) end),
    {Micros, ok} = timer:tc(fun() -> ?EXPECT({quic, transport_shutdown, C, timeout}, ok, 30000) end),
    ?assert(Micros < 25000000),
    macula_relay:stop(Relay).

a_peer_that_does_not_answer_is_left(_Config) ->
    #{relay := Relay, client := C} = Pair =
        macula_quic_lab:through(#{}, #{idle_timeout_ms => 60000, disconnect_timeout_ms => 2000}),
    {Here, There} = stream(Pair),
    ok = macula_quic:send(There, <<"before">>),
    macula_test_nodes:wait_until(fun() ->
        {ok, [{recv_stream_frames, N}]} = macula_quic:getstat(C, [recv_stream_frames]),
        N >= 1
    end),
    ok = macula_relay:set(Relay, #{blackhole => true}),
    {Micros, ok} = timer:tc(fun() ->
        ok = macula_quic:send(Here, <<"into the void">>),
        ?EXPECT({quic, transport_shutdown, C, timeout}, ok, 60000)
    end),
    ?assert(Micros >= 2000000),
    ?assert(Micros < 30000000),
    %% What arrived before is still there.
    ?assertEqual({ok, <<"before">>}, macula_quic:recv(Here, 0, 1000)),
    ?assertEqual({error, {connection_lost, timeout}}, macula_quic:recv(Here, 0, 1000)),
    ?EXPECT({quic, stream_closed, Here, #{reason := timeout, is_conn_shutdown := true}}),
    ?assertEqual({error, timeout}, macula_quic:handshake(C)),
    ?assertMatch({ok, #{state := {closed, timeout}}}, macula_quic:info(C)),
    macula_relay:stop(Relay).

%% Silence alone is no fault.
a_peer_with_nothing_to_answer_is_not_left(_Config) ->
    %% More than a busy machine takes for an answer.
    Patience = #{disconnect_timeout_ms => 2000},
    #{client := C, server := S} = Pair = pair(Patience, Patience),
    {Here, There} = stream(Pair),
    [begin
         silence(2500),
         ok = macula_quic:send(Here, <<"ping">>),
         ?assertEqual({ok, <<"ping">>}, macula_quic:recv(There, 4, 10000)),
         ok = macula_quic:send(There, <<"pong">>),
         ?assertEqual({ok, <<"pong">>}, macula_quic:recv(Here, 4, 10000))
     end || _ <- [1, 2]],
    [?assertEqual({ok, X}, macula_quic:handshake(X)) || X <- [C, S]].

send_on(Stream) ->
    case macula_quic:async_send(Stream, <<0:8000>>) of
        ok -> erlang:yield(), send_on(Stream);
        {error, busy} -> receive {quic, send_ready, Stream, _} -> send_on(Stream) after 20000 -> ok end;
        {error, _} -> ok
    end.

%%--------------------------------------------------------------------------------------------
%% All keys

every_call_answers_for_every_key(_Config) ->
    #{client := C, server := S, port := Port} = pair(#{}, #{}),
    Calls = [{listen, fun(Option) -> macula_quic:listen("127.0.0.1", 0,
                                                        maps:to_list(macula_quic_lab:server_options())
                                                        ++ [Option]) end},
             {connect, fun(Option) -> macula_quic:connect("127.0.0.1", Port,
                                                          maps:to_list(client_options(#{})) ++ [Option],
                                                          5000) end},
             {open_stream, fun(Option) -> macula_quic:open_stream(C, [Option]) end},
             {accept_stream, fun(Option) -> macula_quic:accept_stream(S, [Option], 0) end},
             {arm_stream, fun(Option) -> macula_quic:async_accept_stream(S, [Option]) end}],
    %% A value of the type that is no value of the no-op.
    Asking = fun(Type, NoOp) ->
        Values = [true, false, 0, 1, 7, 200, 100000, <<"binary">>, "127.0.0.1"],
        [V | _] = [V || V <- Values, macula_quic_option_value:check(Type, V) =/= error,
                        macula_quic_option_value:check(NoOp, V) =:= error],
        V
    end,
    [?assertEqual({Role, Key, {error, {unsupported_option, Key}}},
                  {Role, Key, Call({Key, Asking(Type, NoOp)})})
     || {Role, Call} <- Calls, {unsupported, Key, Type, NoOp, _, _} <- macula_quic_option_table:rows(Role),
        Key =/= disable_fpbuffer],
    %% No secret or file of this name is among them.
    [?assertEqual({Role, Key, {error, {bad_option, Key, {wanted, Type}}}},
                  {Role, Key, Call({Key, {no, value}})})
     || {Role, Call} <- Calls, Row <- macula_quic_option_table:rows(Role),
        {Key, Type} <- case Row of
                           {option, K, T, _, _} -> [{K, T}];
                           {same, K, _, T, _} -> [{K, T}];
                           {unsupported, K, T, _, _, _} -> [{K, T}]
                       end,
        not lists:member(Type, [any, credentials])].

%% Of each number, on both sides.
the_least_and_the_largest_values_work(_Config) ->
    Bounds = fun({integer, Min, Max}) -> [Min, Max];
                (period) -> [1000, 16#ffffffff, 16#ffffffffffffffff, 0, infinity];
                (_) -> []
             end,
    Works = fun(Role, Key, Value) ->
        %% A large first packet needs a path for it.
        Large = #{maximum_mtu => 65527, Key => Value},
        Options = case Key =:= minimum_mtu orelse Key =:= initial_mtu of
            true -> {Large, Large};
            false when Role =:= listen -> {#{Key => Value}, #{}};
            false -> {#{}, #{Key => Value}}
        end,
        Pair = pair(element(1, Options), element(2, Options)),
        {Here, There} = stream(case {Role, Key} of
            %% The other side may open none.
            {listen, peer_bidi_stream_count} when Value =:= 0 ->
                Pair#{client := maps:get(server, Pair), server := maps:get(client, Pair)};
            _ ->
                Pair
        end),
        ok = macula_quic:send(Here, binary:copy(<<"x">>, 20000), #{fin => true}),
        ?assertEqual(20000, byte_size(macula_quic_lab:read_to_end(There))),
        macula_quic_lab:close(Pair)
    end,
    [try Works(Role, Key, Value)
     catch Class:Why:Stack -> error({Role, Key, Value, Class, Why, Stack})
     end || Role <- [listen, connect], {option, Key, Type, _, _} <- macula_quic_option_table:rows(Role),
            %% A connection may well be over in a millisecond, and a low mark needs a high one.
            Key =/= idle_timeout_ms, Key =/= low_watermark, Value <- Bounds(Type)],
    [Works(Role, idle_timeout_ms, Value) || Role <- [listen, connect], Value <- [0, 16#ffffffffffffffff]].

%% Under the names, and with the values, of others.
a_configuration_of_another_library_connects(_Config) ->
    Both = #{custom_verify => false, disable_1rtt_encryption => false, handshake_idle_timeout_ms => 10000,
             idle_timeout_ms => 30000, quic_event_mask => 0, max_ack_delay_ms => 25,
             initial_rtt_ms => 333, initial_window_packets => 10, send_idle_timeout_ms => 1000,
             congestion_control_algorithm => 0, keep_alive_interval_ms => 0,
             peer_bidi_stream_count => 65535, peer_unidi_stream_count => 65535,
             stream_recv_window_default => 65536, conn_flow_control_window => 16777216,
             load_balancing_mode => 0, send_buffering_enabled => 1, pacing_enabled => 1,
             migration_enabled => 1, datagram_receive_enabled => 1, server_resumption_level => 0,
             minimum_mtu => 1248, maximum_mtu => 1500, mtu_discovery_missing_probe_count => 3,
             mtu_discovery_search_complete_timeout_us => 600000000},
    Pair = pair(Both#{verify => none, retry_memory_limit => 65}, Both#{verify => peer}),
    {Here, There} = stream(Pair, #{active => false, open_flag => 0, start_flag => 1, event_mask => 0,
                                   disable_fpbuffer => false, priority => 16#7fff,
                                   ideal_send_buffer_size => 131072, '0rtt_length' => 0}),
    ok = macula_quic:send(Here, binary:copy(<<"x">>, 1000000), #{fin => true}),
    ?assertEqual(1000000, byte_size(macula_quic_lab:read_to_end(There))).

%%--------------------------------------------------------------------------------------------
%% A path to a port of this host that drops what is larger than it takes, and keeps the first answer.

path(Target) ->
    Self = self(),
    Path = spawn_link(fun() ->
        {ok, Socket} = gen_udp:open(0, [binary, {ip, {127, 0, 0, 1}}, {buffer, 65536},
                                        {recbuf, 1000000}]),
        {ok, Port} = inet:port(Socket),
        Self ! {self(), Port},
        carry(Socket, Target, undefined, 65535, undefined)
    end),
    receive {Path, Port} -> {Path, Port} end.

path_port({_Path, Port}) -> Port.

narrow({Path, _Port}, Largest) -> Path ! {largest, Largest}.

first_answer({Path, _Port}) ->
    Path ! {first_answer, self()},
    receive {Path, First} -> First after 10000 -> error(no_answer) end.

carry(Socket, Target, Client, Largest, First) ->
    receive
        {udp, Socket, _, Target, Data} ->
            _ = [gen_udp:send(Socket, {127, 0, 0, 1}, Client, Data) || byte_size(Data) =< Largest],
            carry(Socket, Target, Client, Largest, case First of undefined -> Data; _ -> First end);
        {udp, Socket, _, From, Data} ->
            _ = [gen_udp:send(Socket, {127, 0, 0, 1}, Target, Data) || byte_size(Data) =< Largest],
            carry(Socket, Target, From, Largest, First);
        {largest, New} ->
            carry(Socket, Target, Client, New, First);
        {first_answer, To} ->
            To ! {self(), First},
            carry(Socket, Target, Client, Largest, First)
    end.
