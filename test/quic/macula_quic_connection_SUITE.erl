%% The behaviour for a process per connection: its callbacks, what they return, how acceptors become
%% connections, and what is left when something goes wrong.
-module(macula_quic_connection_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2, log/2]).
-export([a_server_hears_of_a_connection_from_its_beginning/1,
         a_client_hears_of_its_connection_from_the_beginning/1,
         a_client_that_cannot_connect_is_told_why/1, a_client_is_there_while_it_connects/1,
         the_peers_close_comes_with_its_code/1, the_transports_end_comes_with_its_reason/1,
         ones_own_close_is_told/1, certificates_are_told/1, datagrams_come_in_order_and_all_of_them/1,
         a_changed_address_of_the_peer_is_told/1, how_many_streams_there_may_be_is_told/1,
         seldom_events_are_passed_on/1,
         the_users_own_keys_reach_the_state/1, refusing_tells_the_peer_why/1,
         whatever_a_callback_returns_counts/1, what_no_callback_may_return_is_a_crash/1,
         actions_of_early_callbacks_are_kept/1, a_timeout_runs_on_behind_the_modules_back/1,
         init_may_refuse/1, what_init_throws_counts_as_returned/1, foreign_messages_reach_handle_info/1,
         what_other_handles_say_during_a_dial_is_told/1,
         missing_callbacks_have_defaults/1, what_must_be_there_is_checked_at_the_start/1,
         wrong_options_are_refused/1, the_module_may_be_named_in_the_options/1,
         a_crash_closes_the_connection_with_a_code/1,
         stopping_closes_the_connection_with_a_code/1, acceptors_that_die_are_replaced/1,
         a_failed_listener_is_replaced/1, stopping_the_listener_ends_its_connections/1,
         connections_are_bounded_if_wanted/1, acceptors_under_a_supervisor_of_ones_own/1,
         an_acceptor_ends_with_its_supervisor/1, secrets_are_nowhere/1, a_listener_shows_no_secrets/1,
         sys_works_on_it/1, a_module_that_is_not_loaded_is_loaded/1,
         another_version_of_a_module_changes_its_state/1,
         a_stream_is_sent_by_a_process_of_its_own/1,
         the_peer_sees_why_its_stream_is_refused/1, a_module_hears_nothing_of_refused_streams/1,
         processes_of_streams_have_what_arrived_before_the_end/1,
         a_caller_hears_of_a_stream_process_that_fails/1, nothing_is_sent_once_the_time_is_over/1,
         options_of_a_first_send_are_all_read/1, a_dead_process_has_no_handle/1,
         a_listener_outlives_acceptors_that_cannot_start/1,
         acceptors_that_end_without_a_connection_are_replaced_less_and_less_often/1,
         a_connection_brings_the_next_acceptor_at_once/1,
         an_acceptor_that_has_waited_long_is_replaced_at_once/1,
         many_connections_with_many_streams/1, no_connection_is_lost_while_acceptors_change/1]).

-import(macula_quic_lab, [server_options/1, client_options/0, client_options/1]).

-define(LISTENER, listener_under_test).

all() -> macula_quic_lab:cases(?MODULE, []).
init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

init_per_testcase(_Case, Config) ->
    Config.

end_per_testcase(_Case, _Config) ->
    ok.

%%--------------------------------------------------------------------------------------------
%% Callbacks

a_server_hears_of_a_connection_from_its_beginning(_Config) ->
    {Sup, Port} = server([new_conn, connected, new_stream, closed], #{own => key}, #{acceptors => 1}),
    Client = connect(Port),
    {Pid, [InitArgs]} = called(init),
    ?assertMatch(#{own := key, stream_opts := #{}}, InitArgs),
    [Conn, Props] = called(new_conn, Pid),
    {ok, Address} = macula_quic:sockname(Client),
    ?assertMatch(#{peername := Address, negotiated_protocol := <<"test">>,
                   server_name := undefined, peercert := undefined}, Props),
    [Conn, Connected] = called(connected, Pid),
    ?assertMatch(#{is_resumed := false, alpns := "test", peername := Address}, Connected),
    ?assertEqual(Conn, macula_quic_connection:get_handle(Pid)),
    {ok, Stream} = macula_quic:open_stream(Client),
    ok = macula_quic:send(Stream, <<"x">>),
    [There, StreamProps] = called(new_stream, Pid),
    ?assertMatch(#{conn := Conn, stream_id := 0, direction := bidirectional}, StreamProps),
    ?assertEqual({ok, <<"x">>}, in(Pid, fun() -> macula_quic:recv(There, 1, 5000) end)),
    %% In its place another one waits.
    {Next, [_]} = called(init),
    ?assertEqual(undefined, macula_quic_connection:get_handle(Next)),
    stop(Sup).

a_client_hears_of_its_connection_from_the_beginning(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(),
    {ok, Pid} = client(Port, [connected, new_stream, peer_cert_received, closed, handle_info], #{own => key}),
    [#{own := key}] = called(init, Pid),
    {ok, Server} = macula_quic:accept(Listener, 5000),
    [Conn, #{cert := Der}] = called(peer_cert_received, Pid),
    ?assertEqual({ok, Der}, macula_quic:peercert(Conn)),
    [Conn, #{alpns := "test", peername := {"127.0.0.1", Port}}] = called(connected, Pid),
    ?assertEqual(Conn, macula_quic_connection:get_handle(Pid)),
    {ok, Stream} = macula_quic:open_stream(Server, #{direction => unidirectional}),
    ok = macula_quic:send(Stream, <<"x">>),
    [_, #{direction := unidirectional}] = called(new_stream, Pid),
    %% Nothing is told of what the process does for itself.
    ?NOTHING({handle_info, Pid, _}),
    ok = gen_server:stop(Pid).

a_client_that_cannot_connect_is_told_why(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(#{alpn => ["other"]}),
    {ok, Pid} = client(Port, [connected, transport_shutdown, closed], #{}),
    unlink(Pid),
    Ref = monitor(process, Pid),
    Reason = {alpn_mismatch, [<<"test">>]},
    ?assertEqual([undefined, #{status => alpn_mismatch, error => 16#178, reason => Reason}], called(transport_shutdown, Pid)),
    ?assertMatch([undefined, #{is_handshake_completed := false, reason := Reason}], called(closed, Pid)),
    %% What its closed/3 returned lets it live.
    exit(Pid, shutdown),
    ?EXPECT({'DOWN', Ref, process, Pid, shutdown}),
    %% Without any of these it ends.
    {ok, Other} = client(Port, [], #{}),
    unlink(Other),
    OtherRef = monitor(process, Other),
    ?EXPECT({'DOWN', OtherRef, process, Other, {shutdown, Reason}}),
    ok = macula_quic:close(Listener).

a_client_is_there_while_it_connects(_Config) ->
    {ok, Socket} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
    {ok, Silent} = inet:port(Socket),
    {ok, Pid} = client(Silent, [transport_shutdown, handle_call], #{}),
    ?assertEqual(undefined, macula_quic_connection:get_handle(Pid)),
    ?assertMatch(#{tell := _}, gen_server:call(Pid, hello)),
    ?assertEqual({error, closed}, macula_quic_connection:stream_send(Pid, ?MODULE, <<>>, 0, #{}, 1000)),
    ok = gen_server:stop(Pid),
    {ok, Impatient} = client(Silent, [transport_shutdown], #{connect_timeout_ms => 20}),
    unlink(Impatient),
    ?assertMatch([undefined, #{status := timeout}], called(transport_shutdown, Impatient)),
    ok = gen_udp:close(Socket).

the_peers_close_comes_with_its_code(_Config) ->
    {Sup, Port} = server([new_conn, shutdown, closed], #{}, #{acceptors => 1}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    ok = macula_quic:close_connection(Client, 42, <<"bye">>),
    ?assertEqual([Conn, 42], called(shutdown, Pid)),
    ?assertEqual([Conn, #{is_handshake_completed => true, is_peer_acked => true, is_app_closing => false,
                          reason => {application_close, 42, <<"bye">>}}], called(closed, Pid)),
    stop(Sup).

the_transports_end_comes_with_its_reason(_Config) ->
    {Sup, Port} = server([new_conn, transport_shutdown, closed], #{idle_timeout_ms => 2000}, #{}),
    Client = connect(Port, #{idle_timeout_ms => 100000}),
    {Pid, [Conn, _]} = called(new_conn),
    ?assertEqual([Conn, #{status => timeout, error => undefined, reason => timeout}], called(transport_shutdown, Pid)),
    ?assertMatch([Conn, #{reason := timeout, is_app_closing := false, is_peer_acked := false}],
                 called(closed, Pid)),
    ok = macula_quic:close(Client),
    stop(Sup).

ones_own_close_is_told(_Config) ->
    {Sup, Port} = server([new_conn, closed, shutdown, transport_shutdown], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    ok = macula_quic:close_connection(Conn, 7, <<"enough">>),
    ?assertMatch([Conn, #{reason := normal, is_app_closing := true}], called(closed, Pid)),
    ?EXPECT({quic, shutdown, Client, {application_close, 7, <<"enough">>}}),
    ?NOTHING({shutdown, Pid, _}),
    ?NOTHING({transport_shutdown, Pid, _}),
    stop(Sup).

certificates_are_told(_Config) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    {Sup, Port} = server([new_conn, peer_cert_received, connected], #{},
                         #{listen_opts => server_options(#{verify => verify_peer, cacerts => Cert})}),
    _With = connect(Port, #{cert => Cert, key => Key}),
    {Pid, [Conn, #{peercert := Der}]} = called(new_conn),
    ?assertEqual([Conn, #{cert => Der, chain => [Der]}], called(peer_cert_received, Pid)),
    _ = called(connected, Pid),
    _Without = connect(Port),
    {Other, _} = called(new_conn),
    _ = called(connected, Other),
    ?NOTHING({peer_cert_received, Other, _}),
    stop(Sup).

datagrams_come_in_order_and_all_of_them(_Config) ->
    {Sup, Port} = server([new_conn, dgram_recv, dgram_state_changed, connected], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    [Conn, #{dgram_send_enabled := true, dgram_max_len := Max}] = called(dgram_state_changed, Pid),
    ?assert(Max > 1000),
    [begin
         ok = macula_quic:send_datagram(Client, <<N:32>>),
         ?assertEqual([Conn, <<N:32>>, 0], called(dgram_recv, Pid))
     end || N <- lists:seq(1, 300)],
    Deaf = connect(Port, #{datagram_receive_enabled => false}),
    {Other, [OtherConn, _]} = called(new_conn),
    ?assertEqual([OtherConn, #{dgram_send_enabled => false, dgram_max_len => 0}],
                 called(dgram_state_changed, Other)),
    ok = macula_quic:close(Deaf),
    stop(Sup).

a_changed_address_of_the_peer_is_told(_Config) ->
    {Sup, Port} = server([new_conn, dgram_state_changed, peer_address_changed], #{poll_interval_ms => 20}, #{}),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, Port}}),
    Client = connect(macula_relay:port(Relay)),
    {Pid, [Conn, #{peername := Before}]} = called(new_conn),
    %% The first look has been taken.
    _ = called(dgram_state_changed, Pid),
    ok = macula_relay:rebind(Relay),
    {ok, Stream} = macula_quic:open_stream(Client),
    ok = macula_quic:send(Stream, <<"x">>),
    [Conn, Now] = called(peer_address_changed, Pid),
    ?assertNotEqual(Before, Now),
    ?assertEqual({ok, Now}, macula_quic:peername(Conn)),
    ok = macula_quic:close(Client),
    stop(Sup).

how_many_streams_there_may_be_is_told(_Config) ->
    {Sup, Port} = server([new_conn, streams_available, peer_needs_streams],
                         #{poll_interval_ms => 20, peer_bidi_stream_count => 2, peer_unidi_stream_count => 3}, #{}),
    {ok, Client} = client(Port, [connected, streams_available], #{peer_bidi_stream_count => 7}),
    {Server, [Here, _]} = called(new_conn),
    [Conn, _] = called(connected, Client),
    ?assertEqual([Conn, {2, 3}], called(streams_available, Client)),
    ?assertEqual([Here, {7, 100}], called(streams_available, Server)),
    Use = fun() ->
        {ok, Stream} = macula_quic:open_stream(Conn, #{timeout => 5000}),
        ok = macula_quic:send(Stream, <<"x">>, #{fin => true}),
        {ok, There} = macula_quic:accept_stream(Here, #{}, 5000),
        {Stream, There}
    end,
    [{Stream, There}, {_, Second}] = [Use(), Use()],
    ?assertEqual([Here, bidi_streams], called(peer_needs_streams, Server)),
    ok = macula_quic:send(There, <<"x">>, #{fin => true}),
    [<<"x">> = macula_quic_lab:read_to_end(X) || X <- [Stream, There]],
    ?assertEqual([Conn, {1, 3}], called(streams_available, Client)),
    <<"x">> = macula_quic_lab:read_to_end(Second),
    ok = gen_server:stop(Client),
    stop(Sup).

%% What comes seldom is passed on in the same way.
seldom_events_are_passed_on(_Config) ->
    Events = [{resumed, false}, {nst_received, <<"ticket">>}, {local_address_changed, {"127.0.0.1", 1}}],
    {Sup, Port} = server([new_conn | [E || {E, _} <- Events]], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    [begin
         Pid ! {quic, What, Conn, Detail},
         ?assertEqual([Conn, Detail], called(What, Pid))
     end || {What, Detail} <- Events],
    ok = macula_quic:close(Client),
    stop(Sup).

the_users_own_keys_reach_the_state(_Config) ->
    %% Options of the listener that stand with them are obeyed.
    {Sup, Port} = server([new_conn, handle_call], #{mine => {any, "thing"}, peer_bidi_stream_count => 0}, #{}),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    ?assertMatch(#{mine := {any, "thing"}}, gen_server:call(Pid, state)),
    ?assertMatch(#{conn_opts := #{mine := {any, "thing"}}, is_resumed := false, stream_opts := #{}},
                 sys:get_state(Pid)),
    ?assertEqual({error, timeout}, macula_quic:open_stream(Client, #{timeout => 0})),
    ok = macula_quic:close(Client),
    stop(Sup).

%%--------------------------------------------------------------------------------------------
%% What callbacks return

refusing_tells_the_peer_why(_Config) ->
    [begin
         {Sup, Port} = server([new_conn, connected, closed], #{script => script(new_conn, {error, Reason})}, #{}),
         Client = connect(Port),
         {Pid, _} = called(new_conn),
         ?EXPECT({quic, shutdown, Client, {application_close, Code, Text}}),
         await_dead(Pid),
         ?NOTHING({connected, Pid, _}),
         ?NOTHING({closed, Pid, _}),
         stop(Sup)
     end || {Reason, Code, Text} <- [{{77, <<"not you">>}, 77, <<"not you">>}, {78, 78, <<>>},
                                     {{79, ["not", $ , <<"you">>]}, 79, <<"not you">>},
                                     {overloaded, 1, <<"overloaded">>}, {{secret, term}, 1, <<"refused">>},
                                     {{80, not_iodata}, 1, <<"refused">>}]].

whatever_a_callback_returns_counts(_Config) ->
    {Sup, Port} = server([new_conn, handle_call, handle_cast, handle_info, handle_continue, terminate],
                         #{script => fun
                             (handle_call, [{do, Return}, _], S) -> with(Return, S);
                             (handle_cast, [Return], S) -> with(Return, S);
                             (handle_info, [{do, Return}], S) -> with(Return, S);
                             (handle_continue, [{then, From}], S) -> gen_server:reply(From, continued), {ok, S};
                             (_, _, _) -> default
                         end}, #{}),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    Call = fun(Return) -> gen_server:call(Pid, {do, Return}) end,
    %% Of calls.
    ?assertEqual(1, Call(fun(S) -> {reply, 1, S#{n => 1}} end)),
    ?assertEqual(1, Call(fun(#{n := N} = S) -> {reply, N, S, hibernate} end)),
    await_hibernation(Pid),
    ?assertEqual(2, Call(fun(S) -> {reply, 2, S, 10} end)),
    ?assertEqual([timeout], called(handle_info, Pid, timeout)),
    ?assertEqual(3, Call(fun(S) -> {reply, 3, S, infinity} end)),
    ?assertEqual(4, Call(fun(S) -> {reply, 4, S, {continue, then}} end)),
    ?assertEqual([then], called(handle_continue, Pid)),
    %% Without an answer, which comes from elsewhere: in every form.
    [begin
         Reply = gen_server:send_request(Pid, {do, Return}),
         [_, From] = called(handle_call, Pid, Return),
         _ = called(handle_call, Pid, fun() -> ok end, 0),
         gen_server:reply(From, late),
         ?assertEqual({reply, late}, gen_server:wait_response(Reply, 5000))
     end || Return <- [fun(S) -> {ok, S} end, fun(S) -> {noreply, S} end, fun(S) -> {noreply, S, 60000} end,
                       fun(S) -> {hibernate, S} end, fun(S) -> {infinity, S} end, fun(S) -> {60000, S} end]],
    %% Of anything else.
    [begin
         send_to(Pid, How, fun(S) -> {ok, S#{n => How}} end),
         ?assertEqual(How, Call(fun(#{n := N} = S) -> {reply, N, S} end)),
         send_to(Pid, How, fun(S) -> {hibernate, S} end),
         await_hibernation(Pid),
         send_to(Pid, How, fun(S) -> {10, S} end),
         ?assertEqual([timeout], called(handle_info, Pid, timeout)),
         send_to(Pid, How, fun(S) -> {{continue, {How, x}}, S} end),
         ?assertEqual([{How, x}], called(handle_continue, Pid, {How, x}))
     end || How <- [cast, info]],
    %% Each of these ends it.
    Ends = [{fun(S) -> {stop, normal, S} end, normal, 0},
            {fun(S) -> {stop, {shutdown, {9, <<>>}}, S} end, {shutdown, {9, <<>>}}, 9},
            {fun(S) -> {error, {8, <<>>}, S} end, {shutdown, {8, <<>>}}, 8},
            {fun(S) -> {stop, shutdown, S} end, shutdown, 0}],
    ok = macula_quic:close(Client),
    [begin
         Other = connect(Port),
         {OtherPid, _} = called(new_conn),
         Ref = monitor(process, OtherPid),
         send_to(OtherPid, How, Return),
         ?EXPECT({'DOWN', Ref, process, OtherPid, Reason}),
         ?assertEqual([Reason], called(terminate, OtherPid, Reason)),
         ?EXPECT({quic, shutdown, Other, {application_close, Code, _}})
     end || How <- [cast, info], {Return, Reason, Code} <- Ends],
    Last = connect(Port),
    {LastPid, _} = called(new_conn),
    LastRef = monitor(process, LastPid),
    ?assertEqual(answered, gen_server:call(LastPid, {do, fun(S) -> {stop, normal, answered, S} end})),
    ?EXPECT({'DOWN', LastRef, process, LastPid, normal}),
    ?EXPECT({quic, shutdown, Last, _}),
    stop(Sup).

what_no_callback_may_return_is_a_crash(_Config) ->
    {Sup, Port} = server([new_conn, handle_cast], #{script => fun
                             (handle_cast, [Return], S) -> with(Return, S);
                             (_, _, _) -> default
                         end}, #{}),
    quietly(fun() ->
        [begin
             Client = connect(Port),
             {Pid, _} = called(new_conn),
             Ref = monitor(process, Pid),
             gen_server:cast(Pid, Return),
             %% It is told as the callback has said it.
             Returned = ?EXPECT({'DOWN', Ref, process, Pid, {bad_return_value, R}}, R),
             ?assertEqual(shape(Return(state)), shape(Returned)),
             ?EXPECT({quic, shutdown, Client, {application_close, 1, <<"internal error">>}})
         end || Return <- [fun(_) -> nonsense end, fun(S) -> {reply, 1, S} end, fun(S) -> {reply, 1, S, hibernate} end,
                           fun(S) -> {reply, 1, S, none} end, fun(S) -> {stop, normal, 1, S} end,
                           fun(S) -> {-1, S} end, fun(S) -> {ok, S, nonsense} end, fun(S) -> {ok, S, none} end,
                           fun(S) -> {ok, S, 1 bsl 32} end, fun(S) -> {noreply, S, 1 bsl 40} end,
                           fun(S) -> {1 bsl 32, S} end]]
    end),
    stop(Sup).

%% A return value without the state in it.
shape(Returned) when is_tuple(Returned) ->
    [case Part of state -> state; #{} -> state; _ -> Part end || Part <- tuple_to_list(Returned)];
shape(Returned) ->
    Returned.

%% A continue of new_conn comes before connected, whose timeout counts from then on.
actions_of_early_callbacks_are_kept(_Config) ->
    {Sup, Port} = server([new_conn, connected, handle_continue, handle_info],
                         #{script => fun
                             (init, _, S) -> {ok, S, {continue, from_init}};
                             (new_conn, _, S) -> {{continue, from_new_conn}, S};
                             (handle_continue, [from_new_conn], S) -> {{continue, again}, S};
                             (connected, _, S) -> {20, S};
                             (_, _, _) -> default
                         end}, #{acceptors => 1}),
    {Pid, _} = called(init),
    Client = connect(Port),
    ?assertEqual([handle_continue, new_conn, handle_continue, handle_continue, connected, handle_info],
                 [?EXPECT({What, Pid, _}, What) || _ <- lists:seq(1, 6)]),
    ok = macula_quic:close(Client),
    stop(Sup).

%% What the process is asked behind the module's back is no message of the module's.
a_timeout_runs_on_behind_the_modules_back(_Config) ->
    {Sup, Port} = server([new_conn, handle_info, handle_call],
                         #{script => fun
                             (handle_call, _, S) -> {reply, ok, S, 300};
                             (_, _, _) -> default
                         end}, #{}),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    ok = gen_server:call(Pid, wait),
    Asker = spawn_link(fun Ask() ->
        _ = macula_quic_connection:get_handle(Pid),
        receive after 10 -> Ask() end
    end),
    ?assertEqual([timeout], called(handle_info, Pid)),
    unlink(Asker),
    exit(Asker, kill),
    ok = macula_quic:close(Client),
    stop(Sup).

init_may_refuse(_Config) ->
    Module = module([]),
    Start = fun(Return) ->
        Opts = client_options(#{tell => self(), script => script(init, Return)}),
        macula_quic_connection:start_link(Module, {"127.0.0.1", 1}, {Opts, #{}})
    end,
    process_flag(trap_exit, true),
    ?assertEqual({error, no}, Start({error, no})),
    ?assertEqual({error, no}, Start({fixed, {stop, no}})),
    ?assertEqual(ignore, Start({fixed, ignore})),
    %% What is wrong is told as `init/1' has said it, with nothing of the process's own.
    quietly(fun() ->
        [?assertEqual({error, {bad_return_value, Wrong}}, Start({fixed, Wrong}))
         || Wrong <- [what, {ok, mine, nonsense}, {ok, mine, -1}, {ok, mine, none}, {ok, mine, 1 bsl 40}]]
    end),
    %% The longest time there is.
    {ok, Patient} = Start({fixed, {ok, mine, 16#ffffffff}}),
    ok = gen_server:stop(Patient),
    ?EXPECT({'EXIT', Patient, normal}),
    ?assertEqual({error, no}, start_server(module([{new_conn, 3}]),
                                          #{tell => self(), script => script(init, {error, no})}, #{})),
    process_flag(trap_exit, false).

what_init_throws_counts_as_returned(_Config) ->
    Throw = fun(Return) -> fun(init, _, S) -> throw(Return(S)); (_, _, _) -> default end end,
    Ok = Throw(fun(S) -> {ok, S} end),
    {Sup, Port} = server([new_conn, handle_call], #{script => Ok}, #{acceptors => 1}),
    {ok, Client} = client(Port, [connected, handle_call], #{script => Ok}),
    {Server, _} = called(new_conn),
    _ = called(connected, Client),
    [?assertMatch(#{tell := _}, gen_server:call(Pid, hello)) || Pid <- [Client, Server]],
    ok = gen_server:stop(Client),
    stop(Sup),
    process_flag(trap_exit, true),
    Start = fun(Return) -> client(1, [], #{script => Throw(Return)}) end,
    ?assertEqual({error, no}, Start(fun(S) -> {error, no, S} end)),
    ?assertEqual({error, no}, Start(fun(_) -> {stop, no} end)),
    ?assertEqual(ignore, Start(fun(_) -> ignore end)),
    quietly(fun() -> ?assertEqual({error, {bad_return_value, what}}, Start(fun(_) -> what end)) end),
    process_flag(trap_exit, false).

foreign_messages_reach_handle_info(_Config) ->
    {Sup, Port} = server([new_conn, handle_info, handle_cast], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    [begin
         Pid ! Message,
         ?assertEqual([Message], called(handle_info, Pid))
     end || Message <- [hello, {quic, unknown, Conn, 1}, {quic, <<"data">>, make_ref(), #{}},
                        {quic, new_conn, make_ref(), #{}}, {'EXIT', self(), normal}]],
    gen_server:cast(Pid, {a, cast}),
    ?assertEqual([{a, cast}], called(handle_cast, Pid)),
    ok = macula_quic:close(Client),
    stop(Sup).

%% As a proxy does, whose client has sent its request while the server was dialled in vain.
what_other_handles_say_during_a_dial_is_told(_Config) ->
    Pair = macula_quic_lab:pair(),
    {Here, There} = macula_quic_lab:stream(Pair),
    {ok, Silent} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}, {active, false}]),
    {ok, Port} = inet:port(Silent),
    {ok, Pid} = client(Port, [handle_info, transport_shutdown, closed], #{connect_timeout_ms => 1000}),
    ok = macula_quic:setopt(There, active, true),
    ok = macula_quic:controlling_process(There, Pid),
    ok = macula_quic:send(Here, <<"request">>, #{fin => true}),
    ?assertMatch([{quic, <<"request">>, There, _}], called(handle_info, Pid)),
    ?assertMatch([{quic, peer_send_shutdown, There, undefined}], called(handle_info, Pid)),
    ?assertMatch([undefined, #{reason := timeout}], called(transport_shutdown, Pid)),
    ?assertMatch([undefined, #{reason := timeout}], called(closed, Pid)),
    ok = gen_server:stop(Pid),
    ok = gen_udp:close(Silent),
    macula_quic_lab:close(Pair).

missing_callbacks_have_defaults(_Config) ->
    {Sup, Port} = server([new_conn], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    ?assertEqual({error, unknown_call}, gen_server:call(Pid, hello)),
    [Pid ! {quic, What, Conn, undefined} || What <- [resumed, nst_received, peer_needs_streams]],
    Pid ! {quic, streams_available, Conn, #{bidi_streams => 1, unidi_streams => 1}},
    quietly(fun() ->
        Pid ! hello,
        gen_server:cast(Pid, hello),
        ?assertEqual(Conn, macula_quic_connection:get_handle(Pid))
    end),
    %% The peer's streams are left to whoever accepts them.
    {ok, Stream} = macula_quic:open_stream(Client),
    ok = macula_quic:send(Stream, <<"x">>),
    {ok, There} = macula_quic:accept_stream(Conn, #{}, 5000),
    ?assertEqual({ok, <<"x">>}, macula_quic:recv(There, 1, 5000)),
    Ref = monitor(process, Pid),
    %% The monitor is there with the answer, and a process that ends before would be told as `noproc'.
    ?assertEqual(Conn, macula_quic_connection:get_handle(Pid)),
    ok = macula_quic:close_connection(Client, 5, <<>>),
    ?EXPECT({'DOWN', Ref, process, Pid, {shutdown, {application_close, 5, <<>>}}}),
    %% Its own close is nobody's fault.
    Other = connect(Port),
    {OtherPid, [OtherConn, _]} = called(new_conn),
    OtherRef = monitor(process, OtherPid),
    ok = macula_quic:close(OtherConn),
    ?EXPECT({'DOWN', OtherRef, process, OtherPid, normal}),
    ?EXPECT({quic, shutdown, Other, _}),
    %% A continue needs its callback.
    stop(Sup).

what_must_be_there_is_checked_at_the_start(_Config) ->
    process_flag(trap_exit, true),
    NoInit = macula_quic_script:module([{new_conn, 3}]),
    NoConn = module([]),
    Own = #{tell => self(), script => script(none, none)},
    ?assertEqual({error, {bad_callback, NoInit, {missing, [{init, 1}]}}}, start_server(NoInit, Own, #{})),
    ?assertEqual({error, {bad_callback, NoConn, {missing, [{new_conn, 3}]}}}, start_server(NoConn, Own, #{})),
    ?assertEqual({error, {bad_callback, no_such_module, nofile}}, start_server(no_such_module, Own, #{})),
    ?assertEqual({error, {bad_callback, NoInit, {missing, [{init, 1}]}}},
                 macula_quic_connection:start_link(NoInit, {"127.0.0.1", 1}, {Own, #{}})),
    ?assertEqual({error, {bad_callback, "text", not_a_module}},
                 macula_quic_connection:start_link("text", {"127.0.0.1", 1}, {Own, #{}})),
    ?assertEqual("the callback module " ++ atom_to_list(NoInit) ++ " does not export init/1",
                 macula_quic:format_error({error, {bad_callback, NoInit, {missing, [{init, 1}]}}})),
    process_flag(trap_exit, false).

wrong_options_are_refused(_Config) ->
    process_flag(trap_exit, true),
    Client = module([]),
    Server = module([{new_conn, 3}]),
    Own = #{tell => self(), script => script(none, none)},
    Start = fun(Conn, Stream) ->
        macula_quic_connection:start_link(Client, {"127.0.0.1", 1}, {maps:merge(Own, Conn), Stream})
    end,
    ?assertMatch({error, {bad_option, idle_timeout_ms, _}}, Start(#{idle_timeout_ms => never}, #{})),
    ?assertMatch({error, {unsupported_option, disable_1rtt_encryption}},
                 Start(#{disable_1rtt_encryption => true}, #{})),
    ?assertMatch({error, {bad_option, connect_timeout_ms, _}}, Start(#{connect_timeout_ms => -1}, #{})),
    ?assertMatch({error, {bad_option, poll_interval_ms, _}}, Start(#{poll_interval_ms => often}, #{})),
    ?assertMatch({error, {bad_option, linger_ms, _}}, Start(#{linger_ms => -1}, #{})),
    ?assertMatch({error, {bad_option, active, _}}, Start(#{}, #{active => never})),
    ?assertMatch({error, {bad_callback, nobody, _}}, Start(#{}, #{stream_callback => nobody})),
    ?assertMatch({error, {bad_option, options, _}}, Start(#{}, text)),
    [?assertMatch({error, {bad_option, Key, _}}, start_server(Server, Own, #{Key => Value}))
     || {Key, Value} <- [{acceptors, 0}, {max_connections, no}, {shutdown_ms, -1}, {what, ever},
                         {shutdown_ms, infinity}]],
    ?assertMatch({error, {bad_option, port, _}}, start_server(Server, Own, #{listen_on => 70000})),
    ?assertMatch({error, {bad_option, typo, _}}, start_server(Server, Own, #{listen_opts => #{typo => 1}})),
    ?assertMatch({error, {bad_option, backlog, _}}, start_server(Server, Own#{backlog => 0}, #{})),
    %% A listener that is there has its options.
    {Listener, _} = macula_quic_lab:listen(),
    ?assertEqual({error, {bad_option, idle_timeout_ms, listener_option}},
                 macula_quic_connection:start_acceptor(Listener, {Own#{conn_callback => Server,
                                                                       idle_timeout_ms => 1}, #{}}, self())),
    ?assertEqual({error, {bad_option, conn_callback, missing}},
                 macula_quic_connection:start_acceptor(Listener, {Own, #{}}, self())),
    ?assertEqual({error, {bad_option, options, not_a_table}},
                 macula_quic_connection:start_acceptor(Listener, no_table, self())),
    ok = macula_quic:close(Listener),
    process_flag(trap_exit, false).

%%--------------------------------------------------------------------------------------------
%% Ends

%% As configurations of others name it, among the options of connections.
the_module_may_be_named_in_the_options(_Config) ->
    Own = #{tell => self(), script => script(none, none), conn_callback => module([{new_conn, 3}])},
    {ok, Sup} = macula_quic_connection:start_listener(#{
        listen_on => {"127.0.0.1", 0}, listen_opts => server_options(#{}), conn_opts => maps:to_list(Own)}),
    Client = connect(port(Sup)),
    {_, _} = called(new_conn),
    ok = macula_quic:close(Client),
    stop(Sup).

a_crash_closes_the_connection_with_a_code(_Config) ->
    quietly(fun() ->
        [begin
             Callbacks = lists:usort([new_conn, Callback, terminate]),
             {Sup, Port} = server(Callbacks, #{script => fun
                                      (Name, _, _) when Name =:= Callback -> error(deliberate);
                                      (_, _, _) -> default
                                  end}, #{acceptors => 2}),
             Client = connect(Port),
             {Pid, _} = called(new_conn),
             _ = [Pid ! hello || Callback =:= handle_info],
             ?EXPECT({quic, shutdown, Client, {application_close, 1, <<"internal error">>}}),
             ?assertMatch([{deliberate, _}], called(terminate, Pid)),
             await_dead(Pid),
             await_acceptors(Sup, 2),
             stop(Sup)
         end || Callback <- [new_conn, connected, handle_info]]
    end).

stopping_closes_the_connection_with_a_code(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(),
    [begin
         {ok, Pid} = client(Port, [connected, terminate], #{}),
         {ok, Server} = macula_quic:accept(Listener, 5000),
         _ = called(connected, Pid),
         unlink(Pid),
         ok = gen_server:stop(Pid, Reason, 5000),
         ?assertEqual([Reason], called(terminate, Pid)),
         ?EXPECT({quic, shutdown, Server, {application_close, Code, Text}})
     end || {Reason, Code, Text} <- [{normal, 0, <<>>}, {shutdown, 0, <<>>}, {{shutdown, {6, <<"t">>}}, 6, <<"t">>},
                                     {{shutdown, something}, 0, <<>>}]],
    ok = macula_quic:close(Listener).

acceptors_that_die_are_replaced(_Config) ->
    {Sup, Port} = server([new_conn], #{}, #{acceptors => 3}),
    Waiting = await_acceptors(Sup, 3),
    [exit(Pid, kill) || Pid <- Waiting],
    Others = macula_test_nodes:wait_until(fun() ->
        Now = acceptors(Sup),
        case {length(Now), Now -- Waiting} of
            {3, Now} -> {value, Now};
            _ -> Now
        end
    end),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    ?assert(lists:member(Pid, Others)),
    _ = await_acceptors(Sup, 3),
    ok = macula_quic:close(Client),
    stop(Sup).

%% Connections that are there live on, and the port stays.
a_failed_listener_is_replaced(_Config) ->
    {Sup, Port} = server([new_conn, handle_call], #{}, #{acceptors => 2}),
    First = connect(Port),
    {Pid, _} = called(new_conn),
    Before = macula_quic_connection:get_listener(Sup),
    quietly(fun() ->
        ok = macula_quic:close_listener(Before),
        ok = macula_test_nodes:wait_until(fun() -> macula_quic_connection:get_listener(Sup) =/= Before end)
    end),
    ?assertMatch(#{tell := _}, gen_server:call(Pid, hello)),
    ?assertEqual(ok, alive(First)),
    Second = connect(Port),
    {_, _} = called(new_conn),
    [ok = macula_quic:close(Client) || Client <- [First, Second]],
    stop(Sup).

stopping_the_listener_ends_its_connections(_Config) ->
    {Sup, Port} = server([new_conn, terminate], #{}, #{}),
    Clients = [connect(Port) || _ <- lists:seq(1, 5)],
    Pids = [element(1, called(new_conn)) || _ <- Clients],
    stop(Sup),
    [?EXPECT({quic, shutdown, Client, {application_close, 0, <<>>}}) || Client <- Clients],
    [?assertEqual([shutdown], called(terminate, Pid)) || Pid <- Pids],
    ?assertEqual([], [Pid || Pid <- Pids, is_process_alive(Pid)]),
    ?assertMatch({error, _}, macula_quic:connect("127.0.0.1", Port, client_options(), 200)).

connections_are_bounded_if_wanted(_Config) ->
    {Sup, Port} = server([new_conn], #{}, #{acceptors => 4, max_connections => 2}),
    Clients = [connect(Port) || _ <- lists:seq(1, 3)],
    {_, _} = called(new_conn),
    {_, _} = called(new_conn),
    ?assertEqual([], await_acceptors(Sup, 0)),
    ?NOTHING({new_conn, _, _}),
    %% The third waits in the backlog, until there is room.
    ok = macula_quic:close(hd(Clients)),
    {_, _} = called(new_conn),
    [ok = macula_quic:close(Client) || Client <- tl(Clients)],
    stop(Sup).

acceptors_under_a_supervisor_of_ones_own(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(),
    Module = module([{new_conn, 3}]),
    Table = ets:new(?MODULE, [public]),
    true = ets:insert(Table, [{c_opts, #{conn_callback => Module, tell => self(),
                                         script => script(none, none)}}, {s_opts, #{}}]),
    {ok, Sup} = supervisor:start_link(macula_quic_connection_sup, [Listener, Table]),
    [{ok, _} = supervisor:start_child(Sup, [Sup]) || _ <- lists:seq(1, 2)],
    Clients = [connect(Port) || _ <- lists:seq(1, 10)],
    Pids = [element(1, called(new_conn)) || _ <- Clients],
    ?assertEqual(10, length(lists:usort(Pids))),
    ok = macula_test_nodes:wait_until(fun() ->
        12 =:= proplists:get_value(active, supervisor:count_children(Sup))
    end),
    [ok = macula_quic:close(Client) || Client <- Clients],
    unlink(Sup),
    exit(Sup, shutdown),
    await_dead(Sup),
    ok = macula_quic:close(Listener).

an_acceptor_ends_with_its_supervisor(_Config) ->
    {Listener, _} = macula_quic_lab:listen(),
    Sup = spawn(fun() -> receive stop -> ok end end),
    Opts = #{conn_callback => module([{new_conn, 3}]), tell => self(), script => script(none, none)},
    {ok, Pid} = macula_quic_connection:start_acceptor(Listener, {Opts, #{}}, Sup),
    unlink(Pid),
    Ref = monitor(process, Pid),
    Sup ! stop,
    ?EXPECT({'DOWN', Ref, process, Pid, {shutdown, listener_down}}),
    ok = macula_quic:close(Listener).

%%--------------------------------------------------------------------------------------------
%% Tools

secrets_are_nowhere(_Config) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    {Sup, Port} = server([new_conn], #{password => "SECRET"}, #{}),
    {ok, Pid} = client(Port, [connected], #{cert => Cert, key => Key, password => "SECRET"}),
    [InitArgs] = called(init, Pid),
    _ = called(connected, Pid),
    Shown = io_lib:format("~p", [[InitArgs, sys:get_state(Pid), sys:get_status(Pid), sys:get_status(Sup),
                                  process_info(Pid)]]),
    %% The key without its frame, as it is shown whatever its form.
    [_, Base64 | _] = binary:split(Key, <<"\n">>, [global]),
    [?assertEqual(nomatch, string:find(Shown, Secret)) || Secret <- ["SECRET", Base64]],
    ok = gen_server:stop(Pid),
    %% What the module calls secret is the module's to say.
    Module = module([{format_status, 1}]),
    Opts = client_options(#{tell => self(), script => script(format_status, {fixed, shown_instead})}),
    {ok, Discreet} = macula_quic_connection:start_link(Module, {"127.0.0.1", Port}, {Opts, #{}}),
    Status = io_lib:format("~p", [sys:get_status(Discreet)]),
    ?assertNotEqual(nomatch, string:find(Status, "shown_instead")),
    ok = gen_server:stop(Discreet),
    stop(Sup).

%% Neither those of its start nor later ones, wherever one looks.
a_listener_shows_no_secrets(_Config) ->
    #{cert := Cert, key := Key} = macula_quic_lab:credentials(),
    Secret = fun(N) -> binary:copy(<<N>>, 32) end,
    ListenOpts = #{alpn => ["test"], cert => Cert, key => Key, password => "PASSWORD",
                   sni_hosts => #{"example.org" => #{cert => Cert, key => Key}}},
    {Sup, Port} = server([new_conn], #{resumption => true, resumption_keys => [Secret($R)],
                                       stateless_reset_key => Secret($S)},
                         #{acceptors => 1, listen_opts => ListenOpts}),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    [Acceptor] = await_acceptors(Sup, 1),
    [_, Base64 | _] = binary:split(Key, <<"\n">>, [global]),
    Secrets = [Base64, Secret($R), Secret($S), <<"PASSWORD">>],
    ok = sys:log(Sup, true),
    ok = macula_quic_connection:reload_listener(Sup, #{cert => Cert, key => Key}),
    #{sup := Children} = sys:get_state(Sup),
    Seen = [[sys:get_state(P), sys:get_status(P), process_info(P)] || P <- [Sup, Children, Acceptor, Pid]],
    Shown = unicode:characters_to_binary(io_lib:format("~p ~w", [Seen, Seen])),
    [?assertEqual(nomatch, binary:match(Shown, Form))
     || One <- Secrets, Form <- [One, unicode:characters_to_binary(io_lib:format("~w", [One])),
                                 unicode:characters_to_binary(io_lib:format("~w", [binary_to_list(One)]))]],
    %% A call that fails shows them no more.
    stop(Sup),
    {'EXIT', Failed} = catch macula_quic_connection:reload_listener(Sup, #{cert => Cert, key => Key}),
    ?assertEqual(nomatch, string:find(io_lib:format("~p", [Failed]), Base64)),
    ok = macula_quic:close(Client).

sys_works_on_it(_Config) ->
    {Sup, Port} = server([new_conn, handle_call], #{}, #{}),
    Client = connect(Port),
    {Pid, [Conn, _]} = called(new_conn),
    ?assertMatch(#{conn := Conn, callback := _, callback_state := #{tell := _}, listener := _, sup := Sup},
                 sys:get_state(Pid)),
    ok = sys:suspend(Pid),
    _ = sys:replace_state(Pid, fun(#{callback_state := S} = State) -> State#{callback_state := S#{n => 1}} end),
    ok = sys:resume(Pid),
    ?assertMatch(#{n := 1}, gen_server:call(Pid, state)),
    ok = macula_quic:close(Client),
    stop(Sup).

%% Mix leaves modules so while it compiles, and behind that until somebody calls them.
a_module_that_is_not_loaded_is_loaded(Config) ->
    Dir = ?config(priv_dir, Config),
    Module = macula_quic_script:in_file([{init, 1} | arities([new_conn, handle_info, closed])], Dir),
    %% No acceptor that begins loads it meanwhile.
    {ok, Sup} = start_server(Module, #{tell => self(), script => script(none, none)},
                             #{acceptors => 1, max_connections => 1}),
    Client = connect(port(Sup)),
    {Pid, [Conn, _]} = called(new_conn),
    unload(Module),
    Pid ! {do, this},
    ?assertEqual([{do, this}], called(handle_info, Pid)),
    unload(Module),
    ok = macula_quic:close(Client),
    ?assertMatch([Conn, #{reason := {application_close, 0, <<>>}}], called(closed, Pid)),
    %% What cannot be loaded is a crash, as in any gen_server, and nothing is passed over.
    Ref = monitor(process, Pid),
    unload(Module),
    true = code:del_path(Dir),
    Pid ! {do, that},
    ?EXPECT({'DOWN', Ref, process, Pid, {undef, [{Module, handle_info, _, _} | _]}}),
    true = code:add_patha(Dir),
    stop(Sup),
    unload(Module),
    true = code:del_path(Dir).

another_version_of_a_module_changes_its_state(_Config) ->
    {Sup, Port} = server([new_conn, code_change], #{script => fun
                             (code_change, [_, refuse], _) -> {error, no};
                             (code_change, [V, Extra], S) -> {ok, S#{changed => {V, Extra}}};
                             (_, _, _) -> default
                         end}, #{}),
    Client = connect(Port),
    {Pid, _} = called(new_conn),
    Changed = fun(Process, Extra) ->
        ok = sys:suspend(Process),
        Result = sys:change_code(Process, any, old, Extra),
        ok = sys:resume(Process),
        #{callback_state := State} = sys:get_state(Process),
        {Result, maps:get(changed, State, not_changed)}
    end,
    ?assertEqual({{error, {error, no}}, not_changed}, Changed(Pid, refuse)),
    ?assertEqual({ok, {old, extra}}, Changed(Pid, extra)),
    ?assertEqual({ok, {old, again}}, Changed(Pid, again)),
    %% Without the callback the state stays.
    {Other, OtherPort} = server([new_conn], #{}, #{}),
    Second = connect(OtherPort),
    {Same, _} = called(new_conn),
    ?assertEqual({ok, not_changed}, Changed(Same, extra)),
    [ok = macula_quic:close(C) || C <- [Client, Second]],
    [stop(S) || S <- [Sup, Other]].

unload(Module) ->
    _ = code:purge(Module),
    true = code:delete(Module),
    _ = code:purge(Module),
    ?assertNot(erlang:module_loaded(Module)).

a_stream_is_sent_by_a_process_of_its_own(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(#{peer_bidi_stream_count => 1}),
    {ok, Pid} = client(Port, [connected], #{}),
    {ok, Server} = macula_quic:accept(Listener, 5000),
    _ = called(connected, Pid),
    Module = macula_quic_script:module([{handle_stream_data, 4}, {init, 1}, {stream_closed, 3}]),
    Opts = #{tell => self(), script => fun
                 (stream_closed, _, S) -> {stop, normal, S};
                 (_, _, _) -> default
             end},
    %% 4: with its end.
    ?assertEqual(ok, macula_quic_connection:stream_send(Pid, Module, [<<"he">>, "llo"], 4, Opts, 5000)),
    {ok, There} = macula_quic:accept_stream(Server, #{}, 5000),
    ?assertEqual({ok, <<"hello">>}, macula_quic:recv(There, 5, 5000)),
    ?assertEqual({error, closed}, macula_quic:recv(There, 0, 5000)),
    StreamPid = ?EXPECT({init, P, [#{is_local := true, is_unidir := false}]}, P),
    ok = macula_quic:send(There, <<"answer">>),
    ?assertMatch([_, <<"answer">>, _], called(handle_stream_data, StreamPid)),
    %% The peer allows one at a time: another waits, and its connection's process does not.
    ?assertEqual({error, timeout}, macula_quic_connection:stream_send(Pid, Module, <<"x">>, 0, Opts, 50)),
    ?assert(is_reference(macula_quic_connection:get_handle(Pid))),
    ?assertMatch({error, {bad_option, flag, _}},
                 macula_quic_connection:stream_send(Pid, Module, <<"x">>, 32, Opts, 5000)),
    ?assertMatch({error, {start_stream, {bad_callback, ?MODULE, _}}},
                 macula_quic_connection:stream_send(Pid, ?MODULE, <<"x">>, 0, Opts, 5000)),
    ok = macula_quic:close_stream(There),
    _ = called(stream_closed, StreamPid),
    await_dead(StreamPid),
    ok = gen_server:stop(Pid),
    ?assertEqual({error, closed}, macula_quic_connection:stream_send(Pid, Module, <<"x">>, 0, Opts, 5000)),
    ok = macula_quic:close(Listener).

%% By `init_handoff/4' of the stream's module, before its process has the stream.
the_peer_sees_why_its_stream_is_refused(_Config) ->
    Module = macula_quic_script:module([{init_handoff, 4}, {handle_stream_data, 4}]),
    quietly(fun() ->
        [begin
             Streams = #{stream_callback => Module, tell => self(), script => fun(_, _, _) -> Return() end},
             {Sup, Port} = server([new_conn], #{}, #{stream_opts => Streams}),
             Client = connect(Port),
             {ok, Stream} = macula_quic:open_stream(Client, #{active => true}),
             ok = macula_quic:send(Stream, <<"x">>),
             ?EXPECT({quic, peer_send_aborted, Stream, Code}),
             ?EXPECT({quic, peer_receive_aborted, Stream, Code}),
             ok = macula_quic:close(Client),
             stop(Sup)
         end || {Return, Code} <- [{fun() -> {error, {7, <<"no">>}} end, 7}, {fun() -> {error, 8, state} end, 8},
                                   {fun() -> {error, why} end, 1}, {fun() -> error(deliberate) end, 1}]]
    end).

%% It has no name for them. What it hears behind is of one that was taken.
a_module_hears_nothing_of_refused_streams(_Config) ->
    Module = macula_quic_script:module([{init_handoff, 4}, {handle_stream_data, 4}]),
    quietly(fun() ->
        [begin
             Streams = #{stream_callback => Module, tell => self(), script => fun(_, _, _) -> Return() end},
             {Sup, Port} = server([new_conn, handle_info], #{}, #{stream_opts => Streams}),
             Client = connect(Port),
             {Pid, [Conn, _]} = called(new_conn),
             {ok, Stream} = macula_quic:open_stream(Client, #{active => true}),
             ok = macula_quic:send(Stream, <<"x">>),
             ?EXPECT({quic, stream_closed, Stream, _}),
             macula_test_nodes:wait_until(fun() ->
                 macula_quic:getstat(Conn, [streams]) =:= {ok, [{streams, 0}]}
             end),
             Pid ! {do, last},
             ?assertEqual([{do, last}], called(handle_info, Pid)),
             ?assertMatch(#{refused := None, streams := None} when map_size(None) =:= 0, sys:get_state(Pid)),
             ok = macula_quic:close(Client),
             stop(Sup)
         end || Return <- [fun() -> {error, {7, <<"no">>}} end, fun() -> error(deliberate) end]]
    end),
    %% Nor of a process that was to open one.
    {Listener, Port} = macula_quic_lab:listen(#{}),
    {ok, Client} = client(Port, [connected, handle_info], #{}),
    {ok, Server} = macula_quic:accept(Listener, 5000),
    _ = called(connected, Client),
    ?assertMatch({error, {start_stream, {bad_callback, ?MODULE, _}}},
                 macula_quic_connection:stream_send(Client, ?MODULE, <<"x">>, 0, #{}, 5000)),
    Client ! {do, last},
    ?assertEqual([{do, last}], called(handle_info, Client)),
    ok = gen_server:stop(Client),
    ok = macula_quic:close(Server).

%% A client that has waited until its stream has arrived may close, however slow the server's process is.
processes_of_streams_have_what_arrived_before_the_end(_Config) ->
    Size = 2000000,
    Module = macula_quic_script:module([{init_handoff, 4}, {handle_stream_data, 4}, {peer_send_shutdown, 3},
                                        {stream_closed, 3}]),
    Streams = #{stream_callback => Module, tell => self(), script => fun
                    (handle_stream_data, [_, _, #{absolute_offset := 0}], _) -> receive go -> default end;
                    (stream_closed, _, S) -> {ok, S};
                    (_, _, _) -> default
                end},
    Ended = fun(Own) ->
        {Sup, Port} = server([new_conn, shutdown], Own, #{stream_opts => Streams}),
        Client = connect(Port),
        {Pid, [Conn, _]} = called(new_conn),
        {ok, Stream} = macula_quic:open_stream(Client, #{direction => unidirectional}),
        ok = macula_quic:send(Stream, binary:copy(<<"x">>, Size), #{fin => true}),
        {StreamPid, [There, _, _, _]} = called(init_handoff),
        ?EXPECT({quic, stream_closed, Stream, #{reason := normal}}),
        ok = macula_quic:close(Client),
        Ref = monitor(process, Pid),
        [Conn, 0] = called(shutdown, Pid),
        {Sup, Ref, StreamPid, There}
    end,
    {Sup, Ref, StreamPid, There} = Ended(#{}),
    StreamPid ! go,
    ?EXPECT({peer_send_shutdown, StreamPid, [There, undefined]}),
    ?EXPECT({stream_closed, StreamPid, [There, #{reason := normal}]}),
    %% The stream's process would stay, and holds nothing up.
    ?EXPECT({'DOWN', Ref, process, _, {shutdown, {application_close, 0, <<>>}}}),
    {messages, Messages} = process_info(self(), messages),
    ?assertEqual(Size, lists:sum([byte_size(Data) || {handle_stream_data, _, [_, Data, _]} <- Messages])),
    stop(Sup),
    %% One that takes too long.
    {Second, Other, Stuck, _} = Ended(#{linger_ms => 100}),
    ?EXPECT({'DOWN', Other, process, _, {shutdown, {application_close, 0, <<>>}}}),
    Stuck ! go,
    stop(Second).

%% A client's process, and the handle of the other end.
up() ->
    {Listener, Port} = macula_quic_lab:listen(#{}),
    {ok, Pid} = client(Port, [connected], #{}),
    {ok, Server} = macula_quic:accept(Listener, 5000),
    _ = called(connected, Pid),
    {Listener, Pid, Server}.

down({Listener, Pid, _}) ->
    ok = gen_server:stop(Pid),
    ok = macula_quic:close(Listener).

a_caller_hears_of_a_stream_process_that_fails(_Config) ->
    {_, Pid, Server} = Up = up(),
    Module = macula_quic_script:module([{handle_stream_data, 4}, {init, 1}]),
    Send = fun(Init, Timeout) ->
        Opts = #{tell => self(), script => fun(init, _, S) -> Init(S); (_, _, _) -> default end},
        macula_quic_connection:stream_send(Pid, Module, <<"x">>, 0, Opts, Timeout)
    end,
    quietly(fun() ->
        [?assertEqual({error, {start_stream, Reason}}, Send(Init, Timeout))
         || Timeout <- [infinity, 30000],
            {Reason, Init} <- [{boom, fun(_) -> error(boom) end}, {bye, fun(_) -> exit(bye) end},
                               {no, fun(S) -> {error, no, S} end}, {no, fun(_) -> {stop, no} end},
                               {killed, fun(_) -> exit(self(), kill) end},
                               {{bad_return_value, ignore}, fun(_) -> ignore end},
                               {{bad_return_value, {ok, s, hibernate}}, fun(_) -> {ok, s, hibernate} end},
                               {{bad_return_value, what}, fun(_) -> throw(what) end}]]
    end),
    %% The connection goes on, and nothing of them was sent.
    ?assertEqual(ok, Send(fun(S) -> {ok, S} end, 5000)),
    There = macula_test_nodes:wait_until(fun() ->
        {ok, Stream} = macula_quic:accept_stream(Server, #{}, 5000),
        case macula_quic:recv(Stream, 1, 5000) of
            {ok, <<"x">>} -> {value, Stream};
            {error, {reset, _}} -> false
        end
    end),
    ok = macula_quic:close_stream(There),
    down(Up).

%% However late the process comes to it.
nothing_is_sent_once_the_time_is_over(_Config) ->
    {_, Pid, Server} = Up = up(),
    Module = macula_quic_script:module([{handle_stream_data, 4}, {init, 1}]),
    Self = self(),
    Send = fun(Init, Timeout) ->
        Opts = #{tell => self(), script => fun(init, _, S) -> Init(), {ok, S}; (_, _, _) -> default end},
        macula_quic_connection:stream_send(Pid, Module, <<"x">>, 0, Opts, Timeout)
    end,
    %% The connection's process is busy, the stream's process is, and there is no time at all.
    ok = sys:suspend(Pid),
    ?assertEqual({error, timeout}, Send(fun() -> ok end, 20)),
    ok = sys:resume(Pid),
    ?assertEqual({error, timeout}, Send(fun() -> Self ! {busy, self()}, receive go -> ok end end, 20)),
    Busy = ?EXPECT({busy, P}, P),
    Ref = monitor(process, Busy),
    Busy ! go,
    ?EXPECT({'DOWN', Ref, process, Busy, {shutdown, timeout}}),
    [?assertEqual({error, timeout}, Send(fun() -> ok end, 0)) || _ <- lists:seq(1, 20)],
    %% What has time comes, and nothing of the others, some of which may end after it.
    ?assertEqual(ok, Send(fun() -> ok end, 5000)),
    Read = fun Read(Seen) ->
        case macula_quic:accept_stream(Server, #{}, 300) of
            {ok, Stream} -> Read([macula_quic:recv(Stream, 1, 5000) | Seen]);
            {error, timeout} -> [{ok, Data} || {ok, Data} <- Seen]
        end
    end,
    ?assertEqual([{ok, <<"x">>}], Read([])),
    [?assertMatch({error, {bad_option, timeout, _}}, Send(fun() -> ok end, Timeout))
     || Timeout <- [-1, 1.5, foo]],
    ?NOTHING({_, {error, _}}),
    down(Up).

options_of_a_first_send_are_all_read(_Config) ->
    {_, Pid, Server} = Up = up(),
    Module = macula_quic_script:module([{handle_stream_data, 4}, {init, 1}]),
    Opts = #{tell => self(), script => fun(_, _, _) -> default end},
    Send = fun(Flag) -> macula_quic_connection:stream_send(Pid, Module, <<"x">>, Flag, Opts, 5000) end,
    [?assertMatch({error, {bad_option, Key, _}}, Send(Flag))
     || {Key, Flag} <- [{foo, #{foo => 1}}, {fin, #{fin => yes}}, {timeout, [{timeout, foo}]},
                        {foo, [foo | bar]}, {flag, 32}, {flag, foo}]],
    %% Of two the later one counts, as everywhere.
    [begin
         ?assertEqual(ok, Send(Flag)),
         {ok, Stream} = macula_quic:accept_stream(Server, #{}, 5000),
         ?assertEqual({ok, <<"x">>}, macula_quic:recv(Stream, 1, 5000)),
         ?assertEqual({error, End}, macula_quic:recv(Stream, 1, Time)),
         ok = macula_quic:close_stream(Stream)
     end || {Flag, End, Time} <- [{[{fin, false}, {fin, true}], closed, 5000}, {[fin], closed, 5000},
                                  {[{fin, true}, {fin, false}], timeout, 50}]],
    down(Up).

a_dead_process_has_no_handle(_Config) ->
    {Listener, Pid, _} = up(),
    unlink(Pid),
    Module = macula_quic_script:module([{handle_stream_data, 4}, {init, 1}]),
    Opts = #{tell => self(), script => fun(_, _, _) -> default end},
    Calls = [fun() -> macula_quic_connection:get_handle(Pid) end,
             fun() -> macula_quic_connection:stream_send(Pid, Module, <<"x">>, 0, Opts, infinity) end],
    %% It is killed while they wait for it, and is dead.
    ok = sys:suspend(Pid),
    Waiting = [spawn_monitor(fun() -> exit({gave, Call()}) end) || Call <- Calls],
    ok = macula_test_nodes:wait_until(fun() ->
        process_info(Pid, message_queue_len) =:= {message_queue_len, length(Calls)}
    end),
    exit(Pid, kill),
    ?assertEqual([undefined, {error, closed}],
                 [?EXPECT({'DOWN', Ref, process, _, {gave, Gave}}, Gave) || {_, Ref} <- Waiting]),
    ?assertEqual([undefined, {error, closed}], [Call() || Call <- Calls]),
    ok = macula_quic:close(Listener).

%% Those that are there already are not to end for it.
a_listener_outlives_acceptors_that_cannot_start(_Config) ->
    Fails = counters:new(1, []),
    Script = fun(init, _, _) ->
                     case counters:get(Fails, 1) of 1 -> {stop, no}; 0 -> default end;
                (_, _, _) ->
                     default
             end,
    {Sup, Port} = server([new_conn, handle_call], #{script => Script}, #{acceptors => 2}),
    First = connect(Port),
    {Pid, _} = called(new_conn),
    [_, _] = await_acceptors(Sup, 2),
    ok = counters:put(Fails, 1, 1),
    quietly(fun() ->
        [exit(P, kill) || P <- acceptors(Sup)],
        ok = macula_test_nodes:wait_until(fun() -> acceptors(Sup) =:= [] end),
        flush_inits(),
        %% Again and again.
        {_, _} = called(init),
        {_, _} = called(init),
        ?assertMatch(#{tell := _}, gen_server:call(Pid, hello)),
        ?assertEqual(ok, alive(First)),
        ok = counters:put(Fails, 1, 0),
        [_, _] = await_acceptors(Sup, 2)
    end),
    Second = connect(Port),
    {_, _} = called(new_conn),
    [ok = macula_quic:close(Client) || Client <- [First, Second]],
    stop(Sup).

%% Where `init/1' lets the start succeed and the rest of it fails: the pause between the starts grows, the log tells of
%% each, and what is there lives on.
acceptors_that_end_without_a_connection_are_replaced_less_and_less_often(_Config) ->
    Self = self(),
    Fails = counters:new(1, []),
    Script = fun
        (init, _, S) -> Self ! {began, erlang:monotonic_time()}, {ok, S, {continue, load}};
        (handle_continue, _, S) -> case counters:get(Fails, 1) of 1 -> exit({shutdown, down}); 0 -> {ok, S} end;
        (_, _, _) -> default
    end,
    {Sup, Port} = server([new_conn, handle_call, handle_continue], #{script => Script}, #{acceptors => 1}),
    First = connect(Port),
    {Pid, _} = called(new_conn),
    _ = [?EXPECT({began, _}) || _ <- [first, second]],
    [Waiting] = await_acceptors(Sup, 1),
    ok = counters:put(Fails, 1, 1),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => Self, level => warning}),
    try
        exit(Waiting, kill),
        Began = [?EXPECT({began, At}, At) || _ <- lists:seq(1, 4)],
        [?assert(Then - Before >= erlang:convert_time_unit(Pause, millisecond, native))
         || {Before, Then, Pause} <- lists:zip3(lists:droplast(Began), tl(Began), [100, 200, 400])],
        [?EXPECT({logged, #{what := quic_acceptor_failed, reason := Reason}})
         || Reason <- [killed, {shutdown, down}, {shutdown, down}]],
        ?assertMatch(#{tell := _}, gen_server:call(Pid, hello)),
        ok = counters:put(Fails, 1, 0),
        [_] = await_acceptors(Sup, 1)
    after
        ok = logger:remove_handler(?MODULE)
    end,
    Second = connect(Port),
    {_, _} = called(new_conn),
    [ok = macula_quic:close(Client) || Client <- [First, Second]],
    stop(Sup).

%% The pause is over with it, however long it had become.
a_connection_brings_the_next_acceptor_at_once(_Config) ->
    {Sup, Port} = server([new_conn], #{}, #{acceptors => 2}),
    [Fails, Waits] = await_acceptors(Sup, 2),
    quietly(fun() ->
        paused(Sup, 600000),
        exit(Fails, kill),
        ?assertEqual([Waits], await_acceptors(Sup, 1))
    end),
    Client = connect(Port),
    {Waits, _} = called(new_conn),
    [_, _] = await_acceptors(Sup, 2),
    ?assertMatch(#{pause := 50, retry := none}, sys:get_state(Sup)),
    ok = macula_quic:close(Client),
    stop(Sup).

an_acceptor_that_has_waited_long_is_replaced_at_once(_Config) ->
    {Sup, _Port} = server([new_conn], #{}, #{acceptors => 1}),
    [Waits] = await_acceptors(Sup, 1),
    paused(Sup, 600000),
    _ = sys:replace_state(Sup, fun(#{waiting := #{Waits := {Ref, Since}}} = State) ->
        State#{waiting := #{Waits => {Ref, Since - 5000}}}
    end),
    exit(Waits, kill),
    ok = macula_test_nodes:wait_until(fun() ->
        case acceptors(Sup) of [Pid] -> Pid =/= Waits; _ -> false end
    end),
    ?assertMatch(#{pause := 50, retry := none}, sys:get_state(Sup)),
    stop(Sup).

%% As if acceptors had failed so often that the pause is so long by now.
paused(Sup, Pause) ->
    sys:replace_state(Sup, fun(State) -> State#{pause := Pause} end).

%% The handler of the log.
log(#{msg := {report, Report}}, #{config := Pid}) ->
    Pid ! {logged, Report};
log(_, _) ->
    ok.

flush_inits() ->
    receive {init, _, _} -> flush_inits()
    after 0 -> ok
    end.

%%--------------------------------------------------------------------------------------------
%% Load

%% A hundred connections of ten streams each, all at once; each echoes what it gets, by the hash.
many_connections_with_many_streams(_Config) ->
    Module = macula_quic_script:module([{init_handoff, 4}, {handle_stream_data, 4}, {peer_send_shutdown, 3}]),
    Nobody = spawn_link(fun Nobody() -> receive _ -> Nobody() end end),
    Echo = #{tell => Nobody, stream_callback => Module, active => 5, script => fun
                 (handle_stream_data, [Stream, Data, _], S) -> ok = macula_quic:send(Stream, Data), {ok, S};
                 (peer_send_shutdown, [Stream, _], S) ->
                     ok = macula_quic:async_shutdown_stream(Stream, graceful, 0), {ok, S};
                 (_, _, _) -> default
             end},
    {ok, Sup} = start_server(module([{new_conn, 3}]), #{tell => Nobody, script => script(none, none)},
                             #{stream_opts => Echo, acceptors => 8}),
    Port = port(Sup),
    Workers = [spawn_monitor(fun() ->
        Client = connect(Port),
        Streams = [begin
            {ok, Stream} = macula_quic:open_stream(Client),
            Data = crypto:strong_rand_bytes(20000 + rand:uniform(20000)),
            ok = macula_quic:send(Stream, Data, #{fin => true}),
            {Stream, crypto:hash(sha256, Data)}
        end || _ <- lists:seq(1, 10)],
        [Hash = crypto:hash(sha256, macula_quic_lab:read_to_end(Stream)) || {Stream, Hash} <- Streams],
        ok = macula_quic:close(Client)
    end) || _ <- lists:seq(1, 100)],
    [?EXPECT({'DOWN', Ref, process, Pid, Why}, ?assertEqual(normal, Why), 60000) || {Pid, Ref} <- Workers],
    stop(Sup),
    unlink(Nobody),
    exit(Nobody, kill).

%% Acceptors are killed all the time; every client that is connected talks with somebody, or is told that
%% it does not.
no_connection_is_lost_while_acceptors_change(_Config) ->
    {Sup, Port} = server([new_conn, connected], #{}, #{acceptors => 2}),
    Killer = spawn_link(fun() -> killer(Sup) end),
    N = 100,
    Clients = [connect(Port) || _ <- lists:seq(1, N)],
    unlink(Killer),
    exit(Killer, kill),
    %% Another process looks: its owner may not be shown what came last (OTP 25).
    macula_quic_lab:await_mailbox(fun(Messages) ->
        Connected = [Conn || {connected, _, [Conn, _]} <- Messages],
        Ended = [Conn || {quic, shutdown, Conn, _} <- Messages],
        length(lists:usort(Connected)) + length(Ended) >= N
    end),
    [ok = macula_quic:close(Client) || Client <- Clients],
    stop(Sup).

killer(Sup) ->
    _ = [exit(Pid, kill) || Pid <- acceptors(Sup)],
    receive after 2 -> killer(Sup) end.

%%--------------------------------------------------------------------------------------------
%% Helpers

module(Callbacks) ->
    macula_quic_script:module([{init, 1} | Callbacks]).

%% With how many arguments.
arity(dgram_recv) -> 4;
arity(Two) when Two =:= handle_cast; Two =:= handle_info; Two =:= handle_continue; Two =:= terminate -> 2;
arity(_) -> 3.

arities(Callbacks) ->
    [{Callback, arity(Callback)} || Callback <- Callbacks].

%% A callback that returns this; `{error, Reason}' gets the state, `{fixed, Return}' does not.
script(Callback, Return) ->
    fun(Name, _Args, State) when Name =:= Callback ->
            case Return of
                {error, Reason} -> {error, Reason, State};
                {fixed, Fixed} -> Fixed
            end;
       (_, _, _) ->
            default
    end.

with(Return, State) when is_function(Return, 1) -> Return(State).

start_server(Module, Own, More) ->
    macula_quic_connection:start_listener(maps:merge(
        #{callback => Module, listen_on => {"127.0.0.1", 0}, listen_opts => server_options(#{}),
          conn_opts => Own}, More)).

server(Callbacks, Own, More) ->
    Conn = maps:merge(#{tell => self(), script => script(none, none)}, Own),
    {ok, Sup} = start_server(module(arities(Callbacks)), Conn, More),
    {Sup, port(Sup)}.

port(Sup) ->
    {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Sup)),
    Port.

client(Port, Callbacks, Own) ->
    Conn = client_options(maps:merge(#{tell => self(), script => script(none, none)}, Own)),
    macula_quic_connection:start_link(module(arities(Callbacks)), {"127.0.0.1", Port}, {Conn, #{}}).

connect(Port) ->
    connect(Port, #{}).

%% Kept by its process, as a connection that nobody holds is closed.
connect(Port, Options) ->
    {ok, Client} = macula_quic:connect("127.0.0.1", Port, client_options(Options), 10000),
    _ = put({?MODULE, Client}, kept),
    Client.

stop(Sup) ->
    unlink(Sup),
    ok = gen_server:stop(Sup, shutdown, 20000).

called(Callback) ->
    ?EXPECT({Callback, Pid, Args}, {Pid, Args}).

called(Callback, Pid) ->
    ?EXPECT({Callback, Pid, Args}, Args).

%% The call with this for its first argument.
called(handle_call, Pid, Return) ->
    ?EXPECT({handle_call, Pid, [{do, Return}, From]}, [Return, From]);
called(Callback, Pid, Argument) ->
    ?EXPECT({Callback, Pid, [Argument]}, [Argument]).

called(_Callback, _Pid, _Fun, 0) ->
    ok.

send_to(Pid, cast, Return) -> gen_server:cast(Pid, Return);
send_to(Pid, info, Return) -> Pid ! {do, Return}.

%% Evaluated by anybody: of a stream, any process may read.
in(_Pid, Fun) -> Fun().

alive(Conn) ->
    case macula_quic:handshake(Conn) of
        {ok, Conn} -> ok;
        Other -> Other
    end.

await_dead(Pid) ->
    ok = macula_test_nodes:wait_until(fun() -> not is_process_alive(Pid) end).

await_hibernation(Pid) ->
    ok = macula_test_nodes:wait_until(fun() ->
        {current_function, {erlang, hibernate, 3}} =:= process_info(Pid, current_function)
            orelse process_info(Pid, current_function)
    end).

acceptors(Sup) ->
    #{waiting := Waiting} = sys:get_state(Sup),
    maps:keys(Waiting).

await_acceptors(Sup, N) ->
    macula_test_nodes:wait_until(fun() ->
        case acceptors(Sup) of
            Pids when length(Pids) =:= N -> {value, Pids};
            Pids -> Pids
        end
    end).

%% What is provoked on purpose is not to be in the log.
quietly(Fun) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    try Fun()
    after ok = logger:set_primary_config(level, Level)
    end.
