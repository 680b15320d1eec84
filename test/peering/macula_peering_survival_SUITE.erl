%% What links survive: a peer's VM killed in every state of the conversation, on either side, and a
%% clock that is set back while they stand.
-module(macula_peering_survival_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_testcase/2, end_per_testcase/2]).
-export([a_dialler_survives_kill_9_of_its_peer_in_every_state/1,
         an_acceptor_survives_kill_9_of_its_peer_in_every_state/1,
         a_clock_set_back_an_hour_ends_no_link/1]).
%% Run in the peer's VM.
-export([listening/1, dialling/2, raw_dialling/2, suspended_goodbye/0, links/0, relink/1,
         ping_all/0, pings_heard/0]).

-define(LOCAL, {127, 0, 0, 1}).
%% A lost peer is noticed by these; all else in here ends later by itself.
-define(NOTICED, #{idle_timeout_ms => 1500, keep_alive_interval_ms => 300}).
%% Where nothing is to be lost, whatever else the machine has to do meanwhile.
-define(KEPT, #{idle_timeout_ms => 5000, keep_alive_interval_ms => 500}).
-define(WAIT, 15000).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [a_dialler_survives_kill_9_of_its_peer_in_every_state,
     an_acceptor_survives_kill_9_of_its_peer_in_every_state, a_clock_set_back_an_hour_ends_no_link].

init_per_testcase(_Case, Config) ->
    {ok, _} = application:ensure_all_started(macula),
    Config.

end_per_testcase(_Case, _Config) ->
    application:stop(macula).

%%% kill -9

a_dialler_survives_kill_9_of_its_peer_in_every_state(_Config) ->
    Before = objects(),
    lists:foreach(fun({State, Options, Lead, Allowed}) ->
        with_node(fun(Node) ->
            {Port, NodeId} = call(Node, listening, [Options]),
            State =:= connecting andalso macula_test_nodes:pause(Node),
            {ok, Link} = macula_peering:connect(maps:merge(?NOTICED, #{
                identity => id(), drain_timeout_ms => 3000, handshake_timeout_ms => 8000,
                target => #{host => ?LOCAL, port => Port, node_id => NodeId, timeout_ms => 3000}})),
            Lead(Link, Node),
            survives(Link, State, Node, Allowed)
        end)
    end, [
        {connecting, #{}, fun(_, _) -> ok end, [connect_failed]},
        {handshaking, #{allow => block}, fun(_, _) -> ok end, [connection_lost, handshake_timeout]},
        {connected, #{}, fun(_, _) -> ok end, [connection_lost]},
        {draining, #{}, fun close_unheard/2, [drained, peer_closed_during_drain]},
        {leaving, #{}, fun goodbye_by_peer/2, [peer_closed]}]),
    nothing_is_left(Before).

an_acceptor_survives_kill_9_of_its_peer_in_every_state(_Config) ->
    Before = objects(),
    lists:foreach(fun({State, Options, How, Lead, Allowed}) ->
        with_node(fun(Node) ->
            {ok, Listener} = macula_peering:listen(maps:merge(maps:merge(?NOTICED, #{
                identity => Id = id(), port => 0, address => ?LOCAL, drain_timeout_ms => 3000,
                handshake_timeout_ms => 8000}), Options)),
            {ok, {_, Port}} = macula_peering:sockname(Listener),
            ok = call(Node, How, [Port, macula_identity:public(Id)]),
            Link = macula_test_nodes:wait_until(fun() ->
                case [P || {_, P, _, _} <- supervisor:which_children(macula_peering_conn_sup)] of
                    [P] -> {value, P};
                    Other -> {workers, Other}
                end
            end, ?WAIT),
            Lead(Link, Node),
            survives(Link, State, Node, Allowed),
            ok = macula_peering:close_listener(Listener)
        end)
    end, [
        {handshaking, #{}, raw_dialling, fun(_, _) -> ok end,
         [connection_lost, handshake_timeout]},
        %% While a rule of the user's decides about it.
        {handshaking, #{allow => fun(_) -> receive never -> true end end}, dialling,
         fun(Link, _) -> await_decision(Link) end, [connection_lost, handshake_timeout]},
        {held, #{hello_gap_ms => 60000}, dialling, fun(_, _) -> ok end, [connection_lost]},
        {connected, #{}, dialling, fun(_, _) -> ok end, [connection_lost]},
        {draining, #{}, dialling, fun close_unheard/2, [drained, peer_closed_during_drain]},
        {leaving, #{}, dialling, fun goodbye_by_peer/2, [peer_closed]}]),
    nothing_is_left(Before).

%% It is in that state when the peer is killed, and then its end is told once, with a reason that
%% the documentation lists.
survives(Link, State, Node, Allowed) ->
    ok = await_state(Link, State),
    ok = macula_test_nodes:kill(Node),
    Reason = receive {macula_peering, disconnected, Link, Why} -> Why
             after ?WAIT -> ct:fail({not_told, State, catch sys:get_state(Link)}) end,
    ct:log("~p: ~p", [State, Reason]),
    ?assert(lists:member(case Reason of {Tag, _} -> Tag; Tag -> Tag end, Allowed), {State, Reason}),
    _ = sys:get_state(macula_peering_links),
    receive {macula_peering, disconnected, Link, Again} -> ct:fail({twice, State, Again})
    after 0 -> ok end,
    ?assertNot(is_process_alive(Link)),
    ?assertEqual([], macula_peering:peers()).

await_state(Link, State) ->
    macula_test_nodes:wait_until(fun() ->
        {Now, _} = sys:get_state(Link),
        Now =:= State orelse {state, Now}
    end, ?WAIT).

%% The rule runs in a process of its own, which the worker watches.
await_decision(Link) ->
    macula_test_nodes:wait_until(fun() ->
        {monitors, Watched} = process_info(Link, monitors),
        length(Watched) > 1 orelse {monitors, Watched}
    end, ?WAIT).

%% The peer stands still, so it never takes the farewell.
close_unheard(Link, Node) ->
    ok = await_state(Link, connected),
    macula_test_nodes:pause(Node),
    ok = macula_peering:close(Link).

%% The peer says goodbye, and then does not close.
goodbye_by_peer(Link, Node) ->
    ok = await_state(Link, connected),
    ok = call(Node, suspended_goodbye, []).

%% What another test has left may still be on its way out.
objects() ->
    macula_quic_lab:objects().

nothing_is_left(Before) ->
    macula_quic_lab:await_objects(Before).

%%% The clock

%% The VM's own clock, as it reads it from the system, is moved by a library loaded before it. The
%% clock of the machine is everybody's.
a_clock_set_back_an_hour_ends_no_link(Config) ->
    case os:find_executable("cc") of
        false -> {skip, "no C compiler"};
        Cc -> clock_set_back(Cc, proplists:get_value(priv_dir, Config))
    end.

clock_set_back(Cc, Dir) ->
    Library = filename:join(Dir, "clock.so"),
    Source = filename:join(Dir, "clock.c"),
    File = filename:join(Dir, "seconds"),
    ok = file:write_file(Source, clock_source()),
    ok = file:write_file(File, <<0:64/native>>),
    case os:cmd(lists:join(" ", [Cc, "-shared -fPIC -O2 -o", Library, Source, "-ldl"])) of
        "" -> ok;
        Says -> ct:fail(Says)
    end,
    Env = [{"LD_PRELOAD", Library}, {"MACULA_TEST_CLOCK", File}],
    macula_test_nodes:with_nodes([#{carrier => none, env => Env}], fun([Node]) ->
        {ok, _} = macula_test_nodes:call(Node, application, ensure_all_started, [macula]),
        Server = id(),
        {ok, Listener} = macula_peering:listen(?KEPT#{
            identity => Server, port => 0, address => ?LOCAL, duplicates => allow}),
        {ok, {_, Port}} = macula_peering:sockname(Listener),
        NodeId = macula_identity:public(Server),
        ok = call(Node, dialling, [Port, NodeId]),
        Accepted = connected(),
        {TheirPort, TheirId} = call(Node, listening, [?KEPT]),
        {ok, Dialled} = dial(TheirPort, TheirId),
        Dialled = connected(),
        ok = exchange([Accepted, Dialled], Node),

        ok = file:write_file(File, <<(-3600):64/native-signed>>),
        Behind = os:system_time(second) - macula_test_nodes:call(Node, os, system_time, [second]),
        ?assert(abs(Behind - 3600) < 60, Behind),
        %% Over more than the idle timeout, so that what keeps a link alive is seen to go on.
        [begin
             ok = exchange([Accepted, Dialled], Node),
             receive {macula_peering, disconnected, _, Reason} -> ct:fail(Reason)
             after 500 -> ok end
         end || _ <- lists:seq(1, 12)],
        %% New ones come about, in both directions.
        {ok, Again} = dial(TheirPort, TheirId),
        Again = connected(),
        ok = call(Node, relink, [[Port, NodeId]]),
        Anew = connected(),
        ok = exchange([Accepted, Dialled, Again, Anew], Node),
        %% And they part as ever.
        All = [Accepted, Dialled, Again, Anew],
        [ok = macula_peering:close(Link) || Link <- All],
        [receive {macula_peering, disconnected, Link, Why} -> ?assertEqual(drained, Why)
         after ?WAIT -> ct:fail({does_not_end, Link}) end || Link <- All]
    end).

dial(Port, NodeId) ->
    macula_peering:connect(?KEPT#{
        identity => id(), target => #{host => ?LOCAL, port => Port, node_id => NodeId}}).

connected() ->
    receive {macula_peering, connected, Link, _} -> Link after ?WAIT -> ct:fail(not_connected) end.

%% A frame each way on each link.
exchange(Links, Node) ->
    Heard = call(Node, pings_heard, []),
    [ok = macula_peering:send_frame(Link, ping()) || Link <- Links],
    ok = call(Node, ping_all, []),
    [receive {macula_peering, frame, Link, #{frame_type := ping}} -> ok
     after ?WAIT -> ct:fail({no_frame, Link}) end || Link <- Links],
    macula_test_nodes:wait_until(fun() ->
        call(Node, pings_heard, []) - Heard =:= length(Links)
    end, ?WAIT).

clock_source() ->
    "#define _GNU_SOURCE\n"
    "#include <dlfcn.h>\n#include <fcntl.h>\n#include <stdint.h>\n#include <stdlib.h>\n"
    "#include <sys/mman.h>\n#include <sys/time.h>\n#include <time.h>\n"
    "static volatile int64_t *offset;\n"
    "static int (*real)(clockid_t, struct timespec *);\n"
    "__attribute__((constructor)) static void begin(void) {\n"
    "    const char *name = getenv(\"MACULA_TEST_CLOCK\");\n"
    "    int file = name ? open(name, O_RDONLY) : -1;\n"
    "    void *map = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);\n"
    "    real = dlsym(RTLD_NEXT, \"clock_gettime\");\n"
    "    if (map != MAP_FAILED) offset = map;\n"
    "}\n"
    "int clock_gettime(clockid_t clock, struct timespec *now) {\n"
    "    if (!real) real = dlsym(RTLD_NEXT, \"clock_gettime\");\n"
    "    int result = real(clock, now);\n"
    "    if (!result && offset && clock == CLOCK_REALTIME) now->tv_sec += *offset;\n"
    "    return result;\n"
    "}\n"
    "int gettimeofday(struct timeval *restrict now, void *restrict zone) {\n"
    "    struct timespec t;\n"
    "    (void)zone;\n"
    "    if (clock_gettime(CLOCK_REALTIME, &t)) return -1;\n"
    "    now->tv_sec = t.tv_sec;\n"
    "    now->tv_usec = t.tv_nsec / 1000;\n"
    "    return 0;\n"
    "}\n".

%%% In the peer's VM

with_node(Fun) ->
    macula_test_nodes:with_nodes([#{carrier => none}], fun([Node]) ->
        {ok, _} = macula_test_nodes:call(Node, application, ensure_all_started, [macula]),
        Fun(Node)
    end).

call(Node, Function, Args) ->
    macula_test_nodes:call(Node, ?MODULE, Function, Args).

%% @private A listener; the port and the node id.
listening(Options) ->
    owner(fun() ->
        Id = id(),
        Rule = case Options of
            #{allow := block} -> #{allow => fun(_) -> receive never -> true end end};
            #{} -> #{}
        end,
        {ok, Listener} = macula_peering:listen(maps:merge(?NOTICED#{
            identity => Id, port => 0, address => ?LOCAL, duplicates => allow},
            maps:merge(maps:remove(allow, Options), Rule))),
        {ok, {_, Port}} = macula_peering:sockname(Listener),
        {Port, macula_identity:public(Id)}
    end).

%% @private
dialling(Port, NodeId) ->
    owner(fun() -> {ok, _} = dial(Port, NodeId), ok end).

%% @private The same by another owner, while the first goes on.
relink([Port, NodeId]) ->
    dialling(Port, NodeId).

%% @private A connection whose stream has begun, and says no more.
raw_dialling(Port, NodeId) ->
    owner(fun() ->
        {ok, Conn} = macula_quic:connect(?LOCAL, Port,
                                         [{alpn, [<<"macula">>]}, {verify_pubkey, NodeId}], 10000),
        {ok, Stream} = macula_quic:open_stream(Conn),
        ok = macula_quic:send(Stream, <<0>>),
        put(held, {Conn, Stream}),
        ok
    end).

%% @private The worker is stopped, so that it does not answer what the farewell leads to.
suspended_goodbye() ->
    [Link] = links(),
    %% An acceptor's is held for a moment after HELLO.
    ok = macula_test_nodes:wait_until(fun() ->
        {ok, #{status := Status}} = macula_peering:peer_info(Link),
        Status =:= open orelse Status
    end),
    ok = sys:suspend(Link),
    macula_peering:send_frame(Link, macula_frame:goodbye(operator_stop)).

%% @private
links() ->
    [Link || {Link, _} <- macula_peering:peers()].

%% @private
ping_all() ->
    [ok = macula_peering:send_frame(Link, ping()) || Link <- links()],
    ok.

%% @private
pings_heard() ->
    lists:sum([N || Link <- links(), {ok, #{frames_in := N}} <- [macula_peering:peer_info(Link)]]).

%% Runs a function in a process that stays as the owner of what it makes.
owner(Fun) ->
    Self = self(),
    Ref = make_ref(),
    _ = spawn(fun() ->
        Self ! {Ref, Fun()},
        stay()
    end),
    receive {Ref, Answer} -> Answer after 10000 -> error(no_answer) end.

stay() -> receive _ -> stay() end.

id() ->
    {ok, Id} = macula_identity:generate(#{puzzle_bits => 0}),
    Id.

ping() ->
    macula_frame:ping(#{nonce => crypto:strong_rand_bytes(16)}).
