%% The events for users of `telemetry', by a stand-in for its module: which there are, and that no handler
%% disturbs anything.
-module(macula_telemetry_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([nothing_is_done_without_telemetry/1, listeners_and_connections_begin_and_end/1,
         a_connection_that_crashes_has_ended/1, changed_addresses_are_told/1, peering_links_begin_and_end/1,
         distribution_links_begin_and_end/1, held_senders_are_told/1, handlers_that_fail_disturb_nothing/1,
         a_handler_that_waits_holds_up_nothing/1, events_that_no_handler_takes_are_counted/1]).

-define(CONN(What), [macula, quic, connection, What]).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [nothing_is_done_without_telemetry, listeners_and_connections_begin_and_end,
     a_connection_that_crashes_has_ended, changed_addresses_are_told, peering_links_begin_and_end,
     distribution_links_begin_and_end, held_senders_are_told, handlers_that_fail_disturb_nothing,
     a_handler_that_waits_holds_up_nothing, events_that_no_handler_takes_are_counted].

init_per_suite(Config0) ->
    Config = macula_dist_case:suite_begin(Config0),
    {ok, Started} = application:ensure_all_started(macula),
    [{started, Started} | Config].

end_per_suite(Config) ->
    [ok = application:stop(App) || App <- lists:reverse(proplists:get_value(started, Config))],
    macula_dist_case:suite_end(Config).

init_per_testcase(Case, Config) ->
    process_flag(trap_exit, true),
    macula_dist_case:case_begin(Case, Config).

end_per_testcase(Case, Config) ->
    macula_test_telemetry:unload(),
    macula_dist_case:case_end(Case, Config).

%%--------------------------------------------------------------------------------------------

nothing_is_done_without_telemetry(_Config) ->
    All = fun() ->
        [P || P <- processes(), {initial_call, {macula_telemetry, _, _}} <- [process_info(P, initial_call)]]
    end,
    %% Of an earlier case one may still be about to end.
    ok = macula_test_nodes:wait_until(fun() -> All() =:= [] end),
    {Sup, Client} = connected(#{}),
    ?assertEqual([], All()),
    macula_test_telemetry:record(),
    %% What has begun before is not told of.
    stop([Client, Sup]),
    ?assertEqual([], macula_test_telemetry:recorded()),
    {Sup2, Client2} = connected(#{}),
    ?assertMatch([_, _, _ | _], All()),
    stop([Client2, Sup2]),
    ok = macula_test_nodes:wait_until(fun() -> All() =:= [] end).

listeners_and_connections_begin_and_end(_Config) ->
    macula_test_telemetry:record(),
    {Sup, Client} = connected(#{}),
    {_, Measured, #{sockname := {_, Port}, callback := Callback, listener := Sup}} =
        await([macula, quic, listener, start], fun(_) -> true end),
    ?assertMatch(#{monotonic_time := _, system_time := _}, Measured),
    {_, _, #{peername := {"127.0.0.1", Port}, negotiated_protocol := <<"test">>, callback := Callback,
             connection := Client}} = await(?CONN(up), fun(#{side := Side}) -> Side =:= client end),
    {_, _, #{connection := Server}} = await(?CONN(up), fun(#{side := Side}) -> Side =:= server end),
    Conn = macula_quic_connection:get_handle(Server),
    ok = macula_quic:close_connection(Conn, 5, <<"bye">>),
    {_, #{duration := Duration}, _} =
        await(?CONN(down), fun(#{connection := Pid, reason := Reason}) ->
            Pid =:= Client andalso Reason =:= {application_close, 5, <<"bye">>}
        end),
    ?assert(Duration > 0),
    _ = await(?CONN(down), fun(#{connection := Pid, reason := R}) -> Pid =:= Server andalso R =:= normal end),
    stop([Client, Sup]),
    {_, #{duration := _}, #{reason := shutdown}} =
        await([macula, quic, listener, stop], fun(#{listener := Pid}) -> Pid =:= Sup end),
    %% Each once.
    Names = [Name || {Name, _, _} <- macula_test_telemetry:recorded()],
    ?assertEqual(lists:sort([[macula, quic, listener, start], [macula, quic, listener, stop], ?CONN(up), ?CONN(up),
                             ?CONN(down), ?CONN(down)]), lists:sort(Names)).

a_connection_that_crashes_has_ended(_Config) ->
    macula_test_telemetry:record(),
    {Sup, Client} = connected(#{}),
    {_, _, #{connection := Server}} = await(?CONN(up), fun(#{side := Side}) -> Side =:= server end),
    exit(Server, kill),
    _ = await(?CONN(down), fun(#{connection := Pid, reason := R}) -> Pid =:= Server andalso R =:= killed end),
    _ = await(?CONN(down), fun(#{connection := Pid}) -> Pid =:= Client end),
    stop([Client, Sup]).

changed_addresses_are_told(_Config) ->
    macula_test_telemetry:record(),
    Sup = server(#{poll_interval_ms => 20}),
    {ok, Relay} = macula_relay:start_link(#{target => {{127, 0, 0, 1}, port(Sup)}}),
    {ok, Client} = macula_quic:connect("127.0.0.1", macula_relay:port(Relay), macula_quic_lab:client_options(), 10000),
    {_, _, #{connection := Server, peername := Before}} = await(?CONN(up), fun(_) -> true end),
    %% The first look has been taken.
    receive {dgram_state_changed, Server, _} -> ok after 30000 -> error(no_look) end,
    ok = macula_relay:rebind(Relay),
    {ok, Stream} = macula_quic:open_stream(Client),
    ok = macula_quic:send(Stream, <<"x">>),
    {_, _, #{address := Now}} = await(?CONN(peer_address_changed), fun(#{connection := Pid}) -> Pid =:= Server end),
    ?assertNotEqual(Before, Now),
    ok = macula_quic:close(Client),
    macula_relay:stop(Relay),
    stop([Sup]).

peering_links_begin_and_end(_Config) ->
    macula_test_telemetry:record(),
    [Here, There] = [id(), id()],
    {ok, Listener} = macula_peering:listen(#{identity => There, port => 0, address => {127, 0, 0, 1}}),
    {ok, {_, Port}} = macula_peering:sockname(Listener),
    _ = await([macula, peering, listener, start], fun(#{sockname := {_, P}}) -> P =:= Port end),
    {ok, Link} = macula_peering:connect(#{identity => Here, target => #{
        host => "127.0.0.1", port => Port, node_id => macula_identity:public(There)}}),
    NodeId = macula_identity:public(There),
    {_, _, #{link := Link, node_id := NodeId, address := _}} =
        await([macula, peering, link, up], fun(#{role := Role}) -> Role =:= client end),
    {_, _, #{link := Other}} = await([macula, peering, link, up], fun(#{role := Role}) -> Role =:= server end),
    ok = macula_peering:close(Link, enough),
    {_, #{duration := _}, #{reason := Reason}} =
        await([macula, peering, link, down], fun(#{link := Pid}) -> Pid =:= Link end),
    receive {macula_peering, disconnected, Link, Told} -> ?assertEqual(Told, Reason) after 30000 -> error(silent) end,
    _ = await([macula, peering, link, down], fun(#{link := Pid}) -> Pid =:= Other end),
    ok = macula_peering:close_listener(Listener),
    _ = await([macula, peering, listener, stop], fun(#{listener := Pid}) -> is_pid(Pid) end).

distribution_links_begin_and_end(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        A = macula_dist_case:start(a),
        B = macula_dist_case:start(b),
        ok = call(A, macula_test_telemetry, record, []),
        ok = macula_dist_case:connect(A, B),
        NodeB = macula_dist_case:node_of(B),
        {_, _, #{controller := Controller}} =
            await(A, [macula, dist, link, up], fun(#{node := Node}) -> Node =:= NodeB end),
        ?assert(is_pid(Controller)),
        true = call(A, erlang, disconnect_node, [NodeB]),
        {_, #{duration := Duration}, #{reason := _}} =
            await(A, [macula, dist, link, down], fun(#{node := Node}) -> Node =:= NodeB end),
        ?assert(Duration > 0)
    end).

held_senders_are_told(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        {A, B, _} = slow_pair(),
        {_, #{count := Count, lost := _}, #{senders := Senders}} =
            await(A, [macula, dist, link, held], fun(_) -> true end),
        ?assertEqual(Count, length(Senders)),
        Bulk = call(A, erlang, whereis, [bulk]),
        _ = await(A, [macula, dist, link, held], fun(#{node := Node, senders := Pids}) ->
            Node =:= macula_dist_case:node_of(B) andalso lists:member(Bulk, Pids)
        end)
    end).

%% Here, and in a link whose peer must not notice.
handlers_that_fail_disturb_nothing(_Config) ->
    Self = self(),
    Fail = fun({Event, _, _}) -> Self ! {failing, Event}, error(intended) end,
    macula_test_telemetry:load(Fail),
    ok = quietly(fun() ->
        {Sup, Client} = connected(#{}),
        ?assert(is_reference(macula_quic_connection:get_handle(Client))),
        stop([Client, Sup]),
        %% One that has failed is asked again.
        [receive {failing, Event} -> ok after 30000 -> error({silent, Event}) end
         || Event <- [?CONN(up), ?CONN(up), ?CONN(down), ?CONN(down), [macula, quic, listener, stop]]],
        ok
    end),
    macula_dist_case:needs_macula(fun() ->
        A = macula_dist_case:start(a),
        B = macula_dist_case:start(b),
        ok = call(A, macula_test_telemetry, load, [fun(_) -> exit(intended) end]),
        ok = macula_dist_case:connect(A, B),
        [pong = call(A, net_adm, ping, [macula_dist_case:node_of(B)]) || _ <- lists:seq(1, 100)]
    end).

a_handler_that_waits_holds_up_nothing(_Config) ->
    macula_test_telemetry:load(fun(_) -> receive never -> ok end end),
    {Sup, Client} = connected(#{}),
    ?assert(is_reference(macula_quic_connection:get_handle(Client))),
    stop([Client, Sup]),
    macula_dist_case:needs_macula(fun() ->
        A = macula_dist_case:start(a),
        B = macula_dist_case:start(b),
        ok = call(A, macula_test_telemetry, load, [fun(_) -> receive never -> ok end end]),
        ok = macula_dist_case:connect(A, B),
        NodeB = macula_dist_case:node_of(B),
        pong = call(A, net_adm, ping, [NodeB]),
        true = call(A, erlang, disconnect_node, [NodeB]),
        ok = macula_dist_case:connect(A, B)
    end).

events_that_no_handler_takes_are_counted(_Config) ->
    Self = self(),
    macula_test_telemetry:load(fun({Event, Measured, _}) ->
        Self ! {handling, self(), Event, Measured},
        receive go_on -> ok end
    end),
    ok = macula_telemetry:begun([test], {up, down}, #{}),
    Witness = receive {handling, Pid, [test, up], _} -> Pid after 30000 -> error(silent) end,
    [ok = macula_telemetry:tell(event, #{n => N}, #{}) || N <- lists:seq(1, 150)],
    {message_queue_len, 100} = process_info(Witness, message_queue_len),
    ok = macula_telemetry:ended(over),
    Told = [begin
        Witness ! go_on,
        receive {handling, Witness, [test, event], #{n := N, lost := Lost}} -> {N, Lost} after 30000 -> error(silent) end
     end || _ <- lists:seq(1, 100)],
    ?assertEqual([{1, 50} | [{N, 0} || N <- lists:seq(2, 100)]], Told),
    Witness ! go_on,
    receive {handling, Witness, [test, down], #{duration := _}} -> ok after 30000 -> error(silent) end,
    Ref = monitor(process, Witness),
    Witness ! go_on,
    receive {'DOWN', Ref, process, Witness, normal} -> ok after 30000 -> error(alive) end.

%%--------------------------------------------------------------------------------------------

id() ->
    {ok, Id} = macula_identity:generate(#{puzzle_bits => 0}),
    Id.

server(Own) ->
    Options = #{tell => self(), script => fun(_, _, _) -> default end},
    Module = macula_quic_script:module([{init, 1}, {new_conn, 3}, {connected, 3}, {dgram_state_changed, 3},
                                        {peer_address_changed, 3}]),
    {ok, Sup} = macula_quic_connection:start_listener(#{
        callback => Module, listen_on => {"127.0.0.1", 0}, acceptors => 1,
        listen_opts => macula_quic_lab:server_options(#{}), conn_opts => maps:merge(Options, Own)}),
    Sup.

port(Sup) ->
    {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Sup)),
    Port.

%% A listener of processes, and a client's process that is connected with it.
connected(Own) ->
    Sup = server(Own),
    Module = macula_quic_script:module([{init, 1}, {new_conn, 3}, {connected, 3}, {dgram_state_changed, 3},
                                        {peer_address_changed, 3}]),
    Options = macula_quic_lab:client_options(#{tell => self(), script => fun(_, _, _) -> default end}),
    {ok, Client} = macula_quic_connection:start_link(Module, {"127.0.0.1", port(Sup)}, {Options, #{}}),
    [receive {connected, Pid, _} -> ok after 30000 -> error({not_connected, Side}) end
     || {Side, Pid} <- [{client, Client}]],
    receive {connected, Other, _} when Other =/= Client -> ok after 30000 -> error({not_connected, server}) end,
    {Sup, Client}.

stop(Pids) ->
    [begin
         Ref = monitor(process, Pid),
         exit(Pid, shutdown),
         receive {'DOWN', Ref, process, Pid, _} -> ok after 30000 -> error({alive, Pid}) end
     end || Pid <- Pids].

quietly(Fun) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    try Fun() after logger:set_primary_config(level, Level) end.

slow_pair() ->
    {A, B, Relay} = macula_dist_case:relayed_pair(#{rate => 10 * 1048576, delay_ms => 5, queue => 200000}),
    NodeB = macula_dist_case:node_of(B),
    ok = call(A, macula_test_telemetry, record, []),
    %% A link of its own, which begins with the stand-in there.
    true = call(A, erlang, disconnect_node, [NodeB]),
    ok = macula_dist_case:connect(A, B),
    _ = macula_dist_case:call(A, fun() ->
        Sink = spawn(NodeB, fun sink/0),
        Bin = binary:copy(<<0>>, 1048576),
        register(bulk, spawn(fun() -> send_all(Sink, Bin) end))
    end),
    {A, B, Relay}.

sink() ->
    receive _ -> sink() end.

send_all(Sink, Bin) ->
    Sink ! Bin,
    send_all(Sink, Bin).

call(Node, Module, Function, Args) ->
    macula_dist_case:call(Node, Module, Function, Args).

await(Name, Fits) ->
    await(here, Name, Fits).

%% The first event of this name that fits.
await(Node, Name, Fits) ->
    Found = fun() ->
        Events = case Node of
            here -> macula_test_telemetry:recorded();
            _ -> call(Node, macula_test_telemetry, recorded, [])
        end,
        [Event || {N, _, Metadata} = Event <- Events, N =:= Name, Fits(Metadata)]
    end,
    ok = macula_test_nodes:wait_until(fun() -> Found() =/= [] end),
    hd(Found()).
