%% A panic in the native library ends the link it happened in, at once and for a reason that OTP names,
%% and no other; and what serves all links goes on. A native thread that stands still keeps no process waiting.
-module(macula_dist_panic_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([the_control_stream/1, the_reader_of_a_lane/1, the_writer_of_a_lane/1, a_process_that_sends/1,
         packets_given_to_a_queue_that_drains/1, a_link_where_it_is_driven/1,
         the_driver_of_the_endpoint/1, the_driver_of_the_endpoint_of_a_node_that_only_dials/1,
         the_driver_of_a_handshake/1,
         a_dial/1, a_stranger/1, the_acceptor_of_strangers/1, the_watch_over_all_links/1,
         info_waits_for_nobody_who_sends/1]).

-import(macula_dist_case, [start/2, call/2, call/4, node_of/1, connect/2, connected/2, eventually/1,
                           nodedown_watch/1, await_nodedown/3, node_events/2]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [the_control_stream, the_reader_of_a_lane, the_writer_of_a_lane, a_process_that_sends,
     packets_given_to_a_queue_that_drains, a_link_where_it_is_driven,
     the_driver_of_the_endpoint, the_driver_of_the_endpoint_of_a_node_that_only_dials,
     the_driver_of_a_handshake, a_dial, a_stranger, the_acceptor_of_strangers, the_watch_over_all_links,
     info_waits_for_nobody_who_sends].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

arm(N, Point) ->
    true = call(N, macula_nif, inject_panic, [Point]),
    ok.

has_panicked(N) ->
    eventually(fun() -> call(N, macula_nif, injected_panics, []) =:= 0 end).

%% Three nodes in a row, of which the link between the first two is to fail. Silence alone would be
%% noticed after many seconds: what is sooner has been said.
row(Args) ->
    All = ["-macula_dist_liveness", "40000", "-connect_all", "false" | Args],
    [A, B, C] = [start(Name, #{args => All}) || Name <- [a, b, c]],
    ok = connect(A, B),
    ok = connect(B, C),
    [A, B, C].

%% `Cause' lets the link pass the armed point at A.
link_fails(Point, Cause) ->
    link_fails(Point, [], Cause).

link_fails(Point, Args, Cause) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B, C] = row(Args),
        [WatchA, WatchB] = [nodedown_watch(N) || N <- [A, B]],
        Begun = erlang:system_time(millisecond),
        arm(A, Point),
        Cause(A, B),
        {connection_closed, At} = await_nodedown({A, WatchA}, node_of(B), 20000),
        {connection_closed, AtB} = await_nodedown({B, WatchB}, node_of(A), 20000),
        ct:log("down after ~b and ~b ms", [At - Begun, AtB - Begun]),
        ?assert(max(At, AtB) - Begun < 15000),
        ok = has_panicked(A),
        %% The VM lives, a link can be made again, and each has been told once.
        ok = connect(A, B),
        true = echo(A, B),
        ?assertMatch([_], [down || {nodedown, _, _, _} <- node_events(A, WatchA)]),
        ?assertEqual([node_of(A)], [Node || {nodedown, Node, _, _} <- node_events(B, WatchB)]),
        true = connected(B, C),
        true = echo(B, C),
        %% Nothing of the old link is left.
        eventually(fun() -> links(A) =:= 1 end)
    end).

links(N) ->
    proplists:get_value(link, call(N, macula_nif, live_objects, [])).

echo(A, B) ->
    Node = node_of(B),
    call(A, fun() -> Node =:= erpc:call(Node, erlang, node, [], 30000) end).

cast(A, B, Term) ->
    Node = node_of(B),
    call(A, fun() -> {nobody, Node} ! Term, ok end).

%% A net tick passes the control stream. Without one the reason would be `net_tick_timeout'.
the_control_stream(_Config) ->
    link_fails(link_control, ["-kernel", "net_ticktime", "4"], fun(_, _) -> ok end).

the_reader_of_a_lane(_Config) ->
    link_fails(link_read, fun(A, B) -> cast(B, A, hello) end).

%% More than a process sends by itself.
the_writer_of_a_lane(_Config) ->
    link_fails(link_write, fun(A, B) -> cast(A, B, binary:copy(<<"x">>, 1000000)) end).

a_process_that_sends(_Config) ->
    link_fails(link_send, fun(A, B) -> cast(A, B, hello) end).

%% Whoever brings the queue down to where the output process may go on has to tell that process. It may be
%% a process that sends, on a thread of the VM, from which a native message cannot leave.
packets_given_to_a_queue_that_drains(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        ok = connect(A, B),
        Watch = nodedown_watch(A),
        Node = node_of(B),
        call(A, fun() ->
            Sink = spawn(Node, fun sink/0),
            Data = binary:copy(<<"x">>, 100000),
            Senders = [spawn(fun() -> flood(Sink, Data) end) || _ <- lists:seq(1, 4)],
            {Node, Controller} = lists:keyfind(Node, 1, erlang:system_info(dist_ctrl)),
            Until = erlang:monotonic_time(millisecond) + 6000,
            give(Controller, Until),
            [exit(Sender, kill) || Sender <- Senders],
            ok
        end),
        true = echo(A, B),
        ?assertEqual([], [Event || {nodedown, _, _, _} = Event <- node_events(A, Watch)])
    end).

flood(Sink, Data) ->
    Sink ! Data,
    flood(Sink, Data).

sink() ->
    receive _ -> sink() end.

%% Packets beside those of the VM, small ones, which the output process sends itself.
give(Controller, Until) ->
    case erlang:monotonic_time(millisecond) > Until of
        true ->
            ok;
        false ->
            Monitor = monitor(process, Controller),
            Controller ! {send, self(), Monitor, packet()},
            receive
                {Monitor, ok} ->
                    demonitor(Monitor, [flush]),
                    give(Controller, Until);
                {'DOWN', Monitor, process, Controller, Reason} ->
                    error({link_ended, Reason})
            end
    end.

%% A message to nobody, as the VM would send it.
packet() ->
    [<<131, Control/binary>>, <<131, Message/binary>>] =
        [term_to_binary(Term) || Term <- [{6, self(), '', nobody}, hello]],
    [<<131, $D, 0>>, Control, Message].

%% On the native thread, and on that of a process that sends. The peer cannot be told, and notices the
%% silence.
a_link_where_it_is_driven(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        [begin
             ok = connect(A, B),
             [WatchA, WatchB] = [nodedown_watch(N) || N <- [A, B]],
             alone(A),
             arm(A, transmit),
             Begun = erlang:system_time(millisecond),
             cast(A, B, Term),
             {connection_closed, At} = await_nodedown({A, WatchA}, node_of(B), 20000),
             ?assert(At - Begun < 3000),
             %% Or by the next link that A makes.
             {Why, _} = await_nodedown({B, WatchB}, node_of(A), 20000),
             ?assert(lists:member(Why, [connection_closed, wait_pending])),
             ok = has_panicked(A)
         end || Term <- [hello, binary:copy(<<"x">>, 1000000)], _ <- [1, 2]],
        ok = connect(A, B),
        true = echo(A, B),
        eventually(fun() -> links(A) =:= 1 end)
    end).

%% All links go through it: they are lost, and the same port is served again.
the_driver_of_the_endpoint(_Config) ->
    endpoint_fails([]).

the_driver_of_the_endpoint_of_a_node_that_only_dials(_Config) ->
    endpoint_fails(["-dist_listen", "false"]).

endpoint_fails(Args) ->
    macula_dist_case:needs_macula(fun() ->
        Liveness = ["-macula_dist_liveness", "4000"],
        [A, B] = [start(a, #{args => Liveness ++ Args}), start(b, #{args => Liveness})],
        [begin
             ok = connect(A, B),
             Address = call(B, fun() -> address_of(node_of(A)) end),
             [WatchA, WatchB] = [nodedown_watch(N) || N <- [A, B]],
             arm(A, receive_datagram),
             Begun = erlang:system_time(millisecond),
             cast(B, A, hello),
             {connection_closed, At} = await_nodedown({A, WatchA}, node_of(B), 20000),
             ?assert(At - Begun < 3000),
             {Why, _} = await_nodedown({B, WatchB}, node_of(A), 20000),
             ?assert(lists:member(Why, [connection_closed, wait_pending])),
             ok = has_panicked(A),
             case Args of
                 [] ->
                     %% The other node finds this one where it was.
                     ok = connect(B, A),
                     ?assertEqual(Address, call(B, fun() -> address_of(node_of(A)) end));
                 _ ->
                     ok = connect(A, B)
             end,
             true = echo(A, B)
         end || _ <- [1, 2, 3]],
        eventually(fun() -> links(A) =:= 1 end)
    end).

address_of(Node) ->
    {ok, #{address := Address}} = macula_dist:info(Node),
    Address.

%% Before the handshake is over, on either side.
the_driver_of_a_handshake(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        [begin
             arm(N, transmit),
             _PongOrPang = call(A, net_adm, ping, [node_of(B)]),
             ok = has_panicked(N),
             ok = connect(A, B),
             true = echo(A, B),
             true = call(A, erlang, disconnect_node, [node_of(B)]),
             eventually(fun() -> not connected(A, B) andalso not connected(B, A) end),
             [eventually(fun() -> links(X) =:= 0 end) || X <- [A, B]]
         end || N <- [A, B], _ <- [1, 2, 3]]
    end).

%% No link but the one that is up: another, which is ending or has lost to that one, might pass the armed point.
alone(N) ->
    eventually(fun() -> links(N) =:= 1 end).

two() ->
    [start(Name, #{args => ["-macula_dist_liveness", "4000"]}) || Name <- [a, b]].

a_dial(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        arm(A, dist_dial),
        {Micros, pang} = timer:tc(fun() -> call(A, net_adm, ping, [node_of(B)]) end),
        %% What waits for an answer takes 7 s.
        ?assert(Micros < 6000000),
        ok = connect(A, B)
    end).

a_stranger(_Config) ->
    served_again(dist_meet).

the_acceptor_of_strangers(_Config) ->
    served_again(dist_serve).

%% Whoever comes in that moment has to come again; those that come later are served.
served_again(Point) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        arm(B, Point),
        _PongOrPang = call(A, net_adm, ping, [node_of(B)]),
        ok = has_panicked(B),
        ok = connect(A, B),
        true = echo(A, B)
    end).

the_watch_over_all_links(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = two(),
        ok = connect(A, B),
        Watch = nodedown_watch(A),
        [arm(N, dist_watch) || N <- [A, B]],
        [ok = has_panicked(N) || N <- [A, B]],
        true = echo(A, B),
        ok = macula_test_nodes:pause(B),
        Paused = erlang:system_time(millisecond),
        {connection_closed, At} = await_nodedown({A, Watch}, node_of(B), 30000),
        ct:log("noticed after ~b ms", [At - Paused]),
        %% Long before the net ticks would tell.
        ?assert(At - Paused < 25000)
    end).

%% Whoever encrypts and sends has the lock of the connection meanwhile.
info_waits_for_nobody_who_sends(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        [A, B] = [start(Name, #{}) || Name <- [a, b]],
        ok = connect(A, B),
        true = echo(A, B),
        Node = node_of(B),
        {Micros, {ok, Info}} = call(A, fun() ->
            true = macula_nif:inject_stall(transmit, 6000),
            %% More than a process sends by itself.
            {nobody, Node} ! binary:copy(<<"x">>, 1000000),
            stands_still(),
            timer:tc(fun() -> macula_dist:info(Node) end)
        end),
        ct:log("answered after ~b us", [Micros]),
        ?assert(Micros < 4000000),
        %% As it was when the link was looked at last.
        ?assertMatch(#{mtu := Mtu, rtt_us := Rtt} when Mtu >= 1200 andalso Rtt > 0, Info),
        true = echo(A, B)
    end).

stands_still() ->
    case macula_nif:injected_panics() of
        0 -> ok;
        _ -> timer:sleep(1), stands_still()
    end.
