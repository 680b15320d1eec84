%% The one table of options, its page, and the errors that come of it.
-module(macula_quic_options_tests).

-include_lib("eunit/include/eunit.hrl").

the_options_page_is_that_of_the_table_test() ->
    File = filename:join([root(), "docs", "reference", "options.md"]),
    {ok, Page} = file:read_file(File),
    [Wanted, Written] = [binary:split(Text, <<"\n">>, [global])
                         || Text <- [macula_options_page:render(Page), Page]],
    ?assertEqual({[], []}, {Wanted -- Written, Written -- Wanted}),
    ?assert(Wanted =:= Written),
    %% No section of the table is left out.
    Sections = [listen, reload, connect, connection, open_stream, accept_stream, stream, arm, send, async_send, handoff,
                unsupported],
    ?assertEqual([], [S || S <- Sections,
                           nomatch =:= binary:match(Page, iolist_to_binary(["<!-- options: ",
                                                                            atom_to_list(S), " -->"]))]).

every_row_says_what_it_does_test() ->
    [?assertNotEqual("", Text) || Role <- macula_quic_option_table:roles(),
                                  {option, _, _, _, Text} <- macula_quic_option_table:rows(Role)],
    [begin
         ?assertNotEqual("", Why),
         ?assertNotEqual("", Instead),
         Words = macula_quic:format_error({unsupported_option, Key}),
         ?assertMatch([_ | _], string:find(Words, "not supported: "))
     end || Role <- macula_quic_option_table:roles(),
            {unsupported, Key, _, _, Why, Instead} <- macula_quic_option_table:rows(Role)].

a_key_stands_once_in_each_call_test() ->
    [begin
         Keys = [element(2, Row) || Row <- macula_quic_option_table:rows(Role)],
         ?assertEqual([], Keys -- lists:usort(Keys))
     end || Role <- macula_quic_option_table:roles()].

%% The keys by which other QUIC libraries for Erlang are told what to do.
conn_opts() ->
    [alpn, conn_callback, custom_verify, handle, nst, handshake_idle_timeout_ms, quic_event_mask,
     disable_1rtt_encryption, local_address, local_bidi_stream_count, local_peer_unidi_stream_count,
     cert, certfile, key, keyfile, password, verify, cacertfile, sslkeylogfile, max_bytes_per_key,
     idle_timeout_ms, tls_client_max_send_buffer, tls_server_max_send_buffer,
     stream_recv_window_default, stream_recv_buffer_default, conn_flow_control_window,
     max_stateless_operations, initial_window_packets, send_idle_timeout_ms, initial_rtt_ms,
     max_ack_delay_ms, disconnect_timeout_ms, keep_alive_interval_ms, congestion_control_algorithm,
     peer_bidi_stream_count, peer_unidi_stream_count, retry_memory_limit, load_balancing_mode,
     max_operations_per_drain, send_buffering_enabled, pacing_enabled, migration_enabled,
     datagram_receive_enabled, server_resumption_level, minimum_mtu, maximum_mtu,
     mtu_discovery_search_complete_timeout_us, mtu_discovery_missing_probe_count,
     max_binding_stateless_operations, stateless_operation_expiration_ms].

stream_opts() ->
    [active, open_flag, start_flag, event_mask, disable_fpbuffer, stream_id, priority,
     ideal_send_buffer_size, '0rtt_length'].

every_key_of_other_libraries_is_known_test() ->
    [?assertEqual([], Keys -- [element(2, Row) || Row <- macula_quic_option_table:rows(Role)])
     || {Role, Keys} <- [{listen, conn_opts()}, {connect, conn_opts()}, {open_stream, stream_opts()},
                         {accept_stream, stream_opts()}, {arm_stream, stream_opts()}]].

%% A configuration as programs for other libraries bring it along.
values_of_other_libraries_are_taken_test() ->
    Common = #{alpn => ["h3"], verify => none, custom_verify => false, disable_1rtt_encryption => false,
               handshake_idle_timeout_ms => 5000, idle_timeout_ms => 60000,
               datagram_receive_enabled => 1, migration_enabled => 1, pacing_enabled => 1,
               send_buffering_enabled => 1, server_resumption_level => 0, load_balancing_mode => 0,
               congestion_control_algorithm => 0, quic_event_mask => 0, max_ack_delay_ms => 25,
               mtu_discovery_missing_probe_count => 3, peer_bidi_stream_count => 65535,
               stream_recv_window_default => 65536, conn_flow_control_window => 16777216},
    {ok, Connect} = macula_quic_options:connect(Common#{local_address => "127.0.0.1:4433"}),
    ?assertMatch(#{local_address := <<"127.0.0.1">>, local_port := 4433, handshake_timeout := 5000,
                   verify := none}, Connect),
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    {ok, Listen} = macula_quic_options:listen(Common#{cert => Cert, key => Key,
                                                      retry_memory_limit => 0}),
    ?assertMatch(#{retry := always, migration := true, handshake_timeout := 5000}, Listen),
    {ok, #{migration := false}} = macula_quic_options:listen(
        Common#{cert => Cert, key => Key, migration_enabled => 0}),
    {ok, #{transport := #{congestion_control := bbr, datagram_receive_buffer := 0}}} =
        macula_quic_options:connect(#{congestion_control_algorithm => 1,
                                      datagram_receive_enabled => 0}),
    ?assertEqual({ok, #{active => 10, direction => unidirectional, priority => 16#7fff, timeout => 5000,
                        start_flag => 6, high_watermark => 4096}},
                 macula_quic_options:stream(open_stream,
                                            #{active => 10, open_flag => 1, start_flag => 2 bor 4,
                                              priority => 16#7fff, event_mask => 0,
                                              ideal_send_buffer_size => 4096, disable_fpbuffer => true, '0rtt_length' => 0})).

%% From one end of the type to the other; what cannot be had is no wrong value.
values_at_the_ends_of_a_type_are_taken_test() ->
    {ok, #{transport := #{send_idle_timeout := 0, max_mtu := 65527}, disconnect_timeout := 0}} =
        macula_quic_options:connect(#{send_idle_timeout_ms => 0, disconnect_timeout_ms => 0, maximum_mtu => 65535}),
    [?assertMatch({ok, #{high_watermark := Used}},
                  macula_quic_options:stream(open_stream, #{ideal_send_buffer_size => Given}))
     || {Given, Used} <- [{0, undefined}, {1, 1}, {16#ffffffffffffffff, 1 bsl 40}]],
    [?assertEqual({error, {unsupported_option, congestion_control_algorithm}},
                  macula_quic_options:connect(#{congestion_control_algorithm => Number}))
     || Number <- [2, 65535]],
    [?assertMatch({error, {bad_option, Key, {wanted, _}}}, macula_quic_options:connect(#{Key => Wrong}))
     || {Key, Wrong} <- [{send_idle_timeout_ms, -1}, {send_idle_timeout_ms, 1 bsl 32}, {disconnect_timeout_ms, 0.0},
                         {maximum_mtu, 65536}, {congestion_control_algorithm, 65536},
                         {congestion_control_algorithm, vegas}]].

two_names_in_a_map_must_agree_test() ->
    Contradicts = fun(Options, Names) ->
        {error, {bad_option, Key, {contradicts, Other}}} = macula_quic_options:connect(Options),
        ?assertEqual(lists:sort(Names), lists:sort([Key, Other]))
    end,
    Contradicts(#{idle_timeout => 1, idle_timeout_ms => 2}, [idle_timeout, idle_timeout_ms]),
    Contradicts(#{sni => "a", server_name => "b"}, [sni, server_name]),
    ?assertMatch({ok, _}, macula_quic_options:connect(#{idle_timeout => 1, idle_timeout_ms => 1})),
    {ok, #{transport := #{idle_timeout := 2}}} =
        macula_quic_options:connect([{idle_timeout, 1}, {idle_timeout_ms, 2}]).

local_addresses_in_every_spelling_test() ->
    [?assertMatch({ok, #{local_address := Ip, local_port := Port}},
                  macula_quic_options:connect([{local_address, Given}]))
     || {Given, Ip, Port} <- [{"127.0.0.1", <<"127.0.0.1">>, 0}, {"127.0.0.1:80", <<"127.0.0.1">>, 80},
                              {<<"127.0.0.1:80">>, <<"127.0.0.1">>, 80}, {"[::1]:80", <<"::1">>, 80},
                              {"::1", <<"::1">>, 0}, {"::1:80", <<"::1:80">>, 0},
                              {{127, 0, 0, 1}, <<"127.0.0.1">>, 0}, {{"::1", 80}, <<"::1">>, 80},
                              {"[fe80::1%2]:80", <<"fe80::1%2">>, 80}]],
    [?assertEqual({error, {bad_option, local_address, {wanted, local_address}}},
                  macula_quic_options:connect([{local_address, Wrong}]))
     || Wrong <- ["localhost", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:+1",
                  "127.0.0.1:x", ":80", "", {"127.0.0.1", 65536}, 80, undefined, <<255>>,
                  "[::1]:80 "]].

%% Past the table, TLS says the same of each: a name that it takes is asked of a port where nobody is.
server_names_are_those_that_tls_can_ask_for_test() ->
    {ok, Native} = macula_quic_options:connect([{verify, verify_none}]),
    Port = macula_test_nodes:free_udp_port(),
    Dial = fun(Name) ->
        {error, Why} = macula_quic_verifier:connect(Native#{server_name => Name}, fun(Asking) ->
            macula_quic_call:connect("127.0.0.1", Port, Asking, macula_quic_call:deadline(200))
        end),
        ?assert(lists:member(Why, [bad_server_name, econnrefused, timeout])),
        Why =:= bad_server_name
    end,
    Long = lists:flatten(lists:duplicate(3, [lists:duplicate(63, $a), $.])),
    [begin
         ?assertMatch({Name, {ok, _}}, {Name, macula_quic_options:connect([{server_name, Name}])}),
         ?assertEqual({Name, false}, {Name, Dial(unicode:characters_to_binary(Name))})
     end || Name <- ["a", "localhost", "station.example", "station.example.", <<"A-b.1.c_">>, "_x._y.z", "1.a",
                     "127.0.0.1", "::1", "fe80::1", "a--b", Long ++ lists:duplicate(61, $a)]],
    Wrong = {error, {bad_option, server_name, {wanted, server_name}}},
    [begin
         ?assertEqual({Name, Wrong}, {Name, macula_quic_options:connect([{server_name, Name}])}),
         ?assertEqual({Name, true}, {Name, Dial(unicode:characters_to_binary(Name))})
     end || Name <- ["a b", " a", "a\n", "a..b", ".a", ".", "-a", "a-", "a-.b", "*.a", "a.1", "1.2.3.4.5",
                     "127.0.0.1:80", "[::1]", "fe80::1%1", [16#e4], [16#2000], <<"a", 0>>,
                     lists:duplicate(64, $a), Long ++ lists:duplicate(62, $a)]],
    [?assertEqual({Name, Wrong}, {Name, macula_quic_options:connect([{server_name, Name}])})
     || Name <- ["", <<>>, <<255>>, [x], {a}, a, undefined, lists:duplicate(256, $a)]].

errors_are_terms_and_words_come_from_format_error_test() ->
    [begin
         {error, {bad_option, _, Why} = Reason} = macula_quic_options:connect(Options),
         ?assert(is_atom(Why) orelse is_tuple(Why)),
         ?assertEqual(Words, macula_quic:format_error(Reason))
     end || {Options, Words} <-
                [{[{idle_timout, 1}], "bad option idle_timout: there is no such option"},
                 {[{idle_timeout_ms, x}],
                  "bad option idle_timeout_ms: wanted: an integer from 0 to 2^64-1"},
                 {[{keylog, 1}], "bad option keylog: wanted: true or false"},
                 {[{congestion_control, reno}], "bad option congestion_control: wanted: cubic, bbr, new_reno"},
                 {#{sni => "a", server_name => "b"}, undefined},
                 {[{low_watermark, 5}, {high_watermark, 5}],
                  "bad option low_watermark: it must be below high_watermark"},
                 {[{key, <<"-----BEGIN ">>}], "bad option key: it needs certfile"}],
            Words =/= undefined].

a_key_is_never_shown_test() ->
    #{cert := Cert} = macula_quic_lab:credentials(),
    [begin
         {error, Reason} = macula_quic_options:connect(#{cert => Cert, key => Key}),
         ?assertEqual(nomatch, string:find(io_lib:format("~0p ~ts", [Reason, macula_quic:format_error(Reason)]),
                                           "SECRET"))
     end || Key <- ["SECRET", <<"SECRET">>, {'PrivateKeyInfo', "SECRET"}, ["SECRET"], [<<"SECRET">>]]].

root() ->
    Source = proplists:get_value(source, ?MODULE:module_info(compile)),
    filename:dirname(filename:dirname(filename:dirname(Source))).
