%% A peer that knows the cookie and breaks the rules of lanes, marks and frames: its link ends, both ends are told by
%% which rule, and nothing else suffers.
-module(macula_dist_rules_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([lanes_are_merged_by_their_marks/1, broken_rule_ends_the_link_with_its_reason/1,
         lane_that_waits_holds_no_more_than_its_window/1, lane_that_begins_when_there_is_no_credit_is_read/1,
         announced_frame_takes_no_memory_before_it_comes/1, more_of_a_stream_than_its_credit_ends_the_link/1]).

-import(macula_dist_case, [start/1, call/2, call/4, node_of/1, connect/2, eventually/1]).
-import(macula_dist_rogue, [lane/2, say/2, packet/1, mark/1]).

-define(MB, 1000000).
-define(EXPRESS, 0).
-define(BULK, 1).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [lanes_are_merged_by_their_marks, broken_rule_ends_the_link_with_its_reason,
     lane_that_waits_holds_no_more_than_its_window, lane_that_begins_when_there_is_no_credit_is_read,
     announced_frame_takes_no_memory_before_it_comes, more_of_a_stream_than_its_credit_ends_the_link].

init_per_suite(Config) ->
    case macula_dist_case:carrier() of
        "macula" ->
            ok = logger:set_primary_config(level, error),
            macula_dist_case:suite_begin(Config);
        Other ->
            {skip, Other ++ " has no lanes"}
    end.

end_per_suite(Config) ->
    ok = logger:set_primary_config(level, notice),
    macula_dist_case:suite_end(Config).

init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- helpers --------------------------------------------------------------------------------------

%% T with a link to A, and what must stay as it is.
scene() ->
    T = start(t),
    A = start(a),
    ok = connect(A, T),
    %% Whatever is made when a first peer comes is there from now on.
    R = macula_dist_rogue:dial(T),
    ok = macula_dist_rogue:close(R),
    ok = gone(R),
    {T, A, kept(T, A), macula_test_nodes:snapshot(T), macula_dist_case:native_memory(T)}.

kept(T, A) ->
    [call(T, erlang, whereis, [net_kernel]),
     proplists:get_value(node_of(T), macula_dist_case:controllers(A)),
     proplists:get_value(node_of(A), macula_dist_case:controllers(T))].

unharmed({T, A, Kept, Snapshot, Native}) ->
    Kept = kept(T, A),
    pong = call(A, net_adm, ping, [node_of(T)]),
    ok = macula_test_nodes:wait_until(fun() ->
        case macula_test_nodes:leaks(Snapshot, macula_test_nodes:snapshot(T)) of
            [] -> true;
            Leaks -> Leaks
        end
    end, 30000),
    Growth = macula_dist_case:native_memory(T) - Native,
    ct:log("native memory grew by ~b KB", [Growth div 1000]),
    true = Growth < 40 * ?MB.

gone(Rogue) ->
    eventually(fun() -> not macula_dist_rogue:is_connected(Rogue) end).

%% A process of T that keeps what comes, in order.
sink(T) ->
    call(T, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            true = register(rules_sink, self()),
            Starter ! {self(), ready},
            keep([])
        end),
        receive {Pid, ready} -> Pid end
    end).

keep(Kept) ->
    receive
        {get, From} -> From ! {kept, lists:reverse(Kept)}, keep(Kept);
        {bulk, _} -> keep([bulk | Kept]);
        Message -> keep([Message | Kept])
    end.

kept(T) ->
    call(T, fun() ->
        rules_sink ! {get, self()},
        receive {kept, Kept} -> Kept end
    end).

message(Rogue, Message) -> macula_dist_rogue:to_registered(Rogue, rules_sink, Message).

tick() -> packet(<<>>).

%% -- cases ----------------------------------------------------------------------------------------

%% What the other cases break: bulk waits for the express packet that its mark names.
lanes_are_merged_by_their_marks(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    Sink = sink(T),
    R = macula_dist_rogue:dial(T),
    Bulk = lane(R, ?BULK),
    ok = say(Bulk, [mark(2), message(R, third), message(R, fourth)]),
    Express = lane(R, ?EXPRESS),
    ok = say(Express, message(R, first)),
    ok = eventually(fun() -> kept(T) =:= [first] end),
    ok = say(Express, [message(R, second), mark(2), message(R, fifth)]),
    ok = eventually(fun() -> kept(T) =:= [first, second, third, fourth, fifth] end),
    ok = macula_dist_rogue:close(R),
    ok = gone(R),
    true = call(T, erlang, exit, [Sink, kill]),
    unharmed(Scene).

broken_rule_ends_the_link_with_its_reason(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    lists:foreach(fun({Break, Rule}) ->
        R = macula_dist_rogue:dial(T),
        Streams = Break(R),
        {application_close, 1, Told} = macula_dist_rogue:told_at_end(R),
        ct:log("~s", [Told]),
        {_, match} = {Told, re:run(Told, Rule, [{capture, none}])},
        ok = gone(R),
        Line = io_lib:format("macula_dist: the link to ~s ended[^\n]*~s", [macula_dist_rogue:node_of(R), Rule]),
        ok = macula_dist_case:await_log(T, lists:flatten(Line)),
        _ = Streams,
        ok = macula_dist_rogue:close(R)
    end, broken()),
    unharmed(Scene).

%% What a peer does, and what is wrong with that. The streams are kept: one that nobody holds is finished.
broken() ->
    Two = fun(First, Second) ->
        fun(R) ->
            [begin
                Lane = lane(R, Number),
                said(say(Lane, Data)),
                Lane
            end || {Number, Data} <- [First, Second]]
        end
    end,
    One = fun(Number, Data) ->
        fun(R) ->
            Lane = lane(R, Number),
            said(say(Lane, Data)),
            Lane
        end
    end,
    Ended = fun(Number, Data) ->
        fun(R) ->
            Express = lane(R, ?EXPRESS),
            Lane = lane(R, Number),
            ok = say(Lane, Data),
            ok = macula_dist_rogue:finish(Lane),
            ok = say(Express, mark(5)),
            [Express, Lane]
        end
    end,
    Preamble = fun(Bytes) -> fun(R) -> macula_dist_rogue:stream(R, Bytes) end end,
    Control = fun(Data) ->
        fun(#{control := Stream} = R) ->
            Lane = lane(R, ?EXPRESS),
            ok = say(Stream, Data),
            Lane
        end
    end,
    [%% Marks.
     {One(?BULK, mark(0)), "a mark of 0 after one of 0"},
     {Two({?EXPRESS, [tick(), tick()]}, {?BULK, [mark(2), tick(), mark(2)]}), "a mark of 2 after one of 2"},
     {Two({?EXPRESS, [tick(), tick()]}, {?BULK, [mark(2), tick(), mark(1)]}), "a mark of 1 after one of 2"},
     {Two({?EXPRESS, mark(1)}, {?BULK, mark(1)}), "lanes that wait for each other"},
     {Two({?BULK, mark(1)}, {?EXPRESS, mark((1 bsl 64) - 1)}), "lanes that wait for each other"},
     {Ended(?BULK, [tick()]), "a mark of 5 where the other lane has ended with 1"},
     %% Reports of what was delivered.
     {Control(mark(1)), "1 packets reported where 0 were sent"},
     {Control(mark((1 bsl 64) - 1)), "packets reported where 0 were sent"},
     %% Lanes.
     {One(2, tick()), "a lane of number 2"},
     {One(65535, tick()), "a lane of number 65535"},
     {Two({?EXPRESS, tick()}, {?EXPRESS, tick()}), "a lane of number 0"},
     {Two({?BULK, tick()}, {?BULK, tick()}), "a lane of number 1"},
     {fun third_lane/1, "a third lane"},
     {Preamble(<<"maln", 2:16, 0:16>>), "not a lane of this version"},
     {Preamble(<<"GET / HTTP/1.1\r\n">>), "not a lane of this version"},
     %% Frames.
     {One(?EXPRESS, <<3:2, 8:30, 1:64>>), "reserved frame kind 3"},
     {One(?EXPRESS, <<2:2, 16:30, 4:64, 1:64>>), "reserved frame kind 2"},
     {One(?BULK, <<1:2, 7:30, 1:64>>), "mark of 7 bytes"},
     {One(?BULK, <<1:2, 1073741823:30>>), "mark of 1073741823 bytes"},
     {Control(<<3:2, 8:30, 1:64>>), "reserved frame kind 3"},
     {Control(<<1:2, 9:30, 1:72>>), "mark of 9 bytes"},
     {Control(<<2:2, 15:30, 1:120>>), "credit of 15 bytes"},
     {Control(<<0:2, 1:30, 0>>), "frame of 1 bytes where at most 0 are allowed"},
     {Control(<<0:2, 1073741823:30>>), "frame of 1073741823 bytes where at most 0 are allowed"},
     {Control(<<"GET / HTTP/1.1\r\n">>), "mark of [0-9]+ bytes"}].

%% The first bytes of a lane may be what is wrong: the node can end the link before the peer says the rest.
said(ok) -> ok;
said({error, closed}) -> ok.

%% QUIC lets a peer have two at a time, so it ends one before.
third_lane(R) ->
    Express = lane(R, ?EXPRESS),
    Bulk = lane(R, ?BULK),
    ok = macula_dist_rogue:finish(Bulk),
    [Express, lane(R, ?BULK)].

%% A mark for what does not come is no mistake yet: the lane waits, is not read, and holds its window. The other
%% lane and the other links go on.
lane_that_waits_holds_no_more_than_its_window(_Config) ->
    {T, A, _, _, _} = Scene = scene(),
    Sink = sink(T),
    R = macula_dist_rogue:dial(T),
    Before = macula_dist_case:rss(T),
    Bulk = lane(R, ?BULK),
    ok = say(Bulk, mark(21)),
    Megabyte = [message(R, {bulk, binary:copy(<<0>>, 100000)}) || _ <- lists:seq(1, 10)],
    Count = counters:new(1, []),
    Sender = spawn_link(fun() ->
        receive go -> ok end,
        lists:foreach(fun(_) -> ok = say(Bulk, Megabyte), counters:add(Count, 1, 1) end, lists:seq(1, 40)),
        receive stop -> ok end
    end),
    ok = macula_quic:controlling_process(Bulk, Sender),
    Sender ! go,
    Express = lane(R, ?EXPRESS),
    ok = eventually(fun() -> counters:get(Count, 1) >= 8 end),
    [begin
        ok = say(Express, message(R, N)),
        ok = eventually(fun() -> kept(T) =:= lists:seq(1, N) end),
        pong = call(A, net_adm, ping, [node_of(T)])
    end || N <- lists:seq(1, 20)],
    Growth = macula_dist_case:rss(T) - Before,
    ct:log("a lane that waits costs ~b KB; ~b MB were taken", [Growth div 1000, counters:get(Count, 1)]),
    true = Growth < 25 * ?MB,
    true = counters:get(Count, 1) < 20,
    ok = say(Express, message(R, 21)),
    All = lists:seq(1, 21) ++ lists:duplicate(400, bulk),
    ok = eventually(fun() -> kept(T) =:= All orelse length(kept(T)) end),
    ok = macula_dist_rogue:close(R),
    ok = gone(R),
    true = call(T, erlang, exit, [Sink, kill]),
    unlink(Sender),
    exit(Sender, kill),
    unharmed(Scene).

%% The bulk lane begins while the express lane waits for the input handler, and is read when that goes on.
lane_that_begins_when_there_is_no_credit_is_read(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    Sink = sink(T),
    R = macula_dist_rogue:dial(T),
    Resume = suspend_input(T, macula_dist_rogue:node_of(R)),
    Express = lane(R, ?EXPRESS),
    %% Just what the lane may deliver before it waits: twice 512 KB, with 64 bytes for each packet.
    Message = message(R, {bulk, binary:copy(<<0>>, 1000)}),
    Size = iolist_size(Message),
    Count = 2 * 524288 div (Size - 4 + 64) + 1,
    ok = say(Express, lists:duplicate(Count, Message)),
    ok = eventually(fun() ->
        {ok, #{bytes_in := In}} = call(T, macula_dist, info, [macula_dist_rogue:node_of(R)]),
        In >= Count * Size orelse In
    end),
    Bulk = lane(R, ?BULK),
    ok = say(Bulk, [message(R, last)]),
    ok = macula_quic:tell_delivered(Bulk),
    receive {quic, delivered, Bulk, _} -> ok after 10000 -> ct:fail(not_acknowledged) end,
    ok = Resume(),
    ok = eventually(fun() ->
        Kept = kept(T),
        {length(Kept), lists:member(last, Kept)} =:= {Count + 1, true} orelse length(Kept)
    end),
    ok = macula_dist_rogue:close(R),
    ok = gone(R),
    true = call(T, erlang, exit, [Sink, kill]),
    unharmed(Scene).

%% The input handler of the link to Node stands still until the function is called.
suspend_input(T, Node) ->
    %% The node is connected a moment before its input handler begins.
    macula_dist_case:suspend(T, fun() -> macula_test_nodes:wait_until(fun() -> input_handler(Node) end) end).

input_handler(Node) ->
    {Node, Controller} = lists:keyfind(Node, 1, erlang:system_info(dist_ctrl)),
    {links, Links} = process_info(Controller, links),
    %% The handlers are linked, the one that has started the other.
    case [Pid || Pid <- Links, is_pid(Pid), {dictionary, D} <- [process_info(Pid, dictionary)],
                 {'$initial_call', {macula_dist_link, input_init, _}} <- D] of
        [Pid] -> {value, Pid};
        [] -> no_input_handler
    end.

%% The header of a frame may say a gigabyte.
announced_frame_takes_no_memory_before_it_comes(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    Before = call(T, erlang, memory, [binary]),
    Rogues = [begin
        R = macula_dist_rogue:dial(T),
        Lanes = [begin
            Lane = lane(R, Number),
            ok = say(Lane, <<0:2, 1073741823:30, (binary:copy(<<0>>, 100000))/binary>>),
            Lane
        end || Number <- [?EXPRESS, ?BULK]],
        {R, Lanes}
    end || _ <- lists:seq(1, 5)],
    ok = eventually(fun() ->
        [begin
            {ok, #{bytes_in := In}} = call(T, macula_dist, info, [macula_dist_rogue:node_of(R)]),
            In >= 200000
        end || {R, _} <- Rogues] =:= [true || _ <- Rogues]
    end),
    Growth = call(T, erlang, memory, [binary]) - Before,
    ct:log("ten announcements of 1 GiB cost ~b KB", [Growth div 1000]),
    true = Growth < 50 * ?MB,
    [begin
        ok = macula_dist_rogue:close(R),
        ok = gone(R)
    end || {R, _} <- Rogues],
    unharmed(Scene).

%% A stream with a place may send 16 KB ahead. Credit for 256 KB more is given when the owner was given half a kilobyte,
%% and the transport lets a megabyte through.
more_of_a_stream_than_its_credit_ends_the_link(_Config) ->
    {T, _, _, _, _} = Scene = scene(),
    lists:foreach(fun({First, Ahead, End}) ->
        R = macula_dist_rogue:dial_with_streams(T),
        Owner = stream_owner(T, macula_dist_rogue:node_of(R)),
        Stream = macula_dist_rogue:user_stream(R),
        ok = say(Stream, binary:copy(<<"x">>, First)),
        ok = eventually(fun() -> taken(T, Owner) =:= First end),
        ok = say(Stream, binary:copy(<<"y">>, Ahead)),
        ok = macula_quic:tell_delivered(Stream),
        receive {quic, delivered, Stream, _} -> ok after 10000 -> ct:fail(not_acknowledged) end,
        First = taken(T, Owner),
        _ = call(T, erlang, send, [Owner, read]),
        case End of
            goes_on ->
                ok = eventually(fun() -> taken(T, Owner) =:= First + Ahead end),
                %% An answer leaves behind the judgement of what has come.
                _ = call(T, erlang, send, [Owner, {answer, <<"z">>}]),
                {ok, <<"z">>} = macula_quic:recv(Stream, 1, 10000),
                true = macula_dist_rogue:is_connected(R);
            ends ->
                Rule = "more of a user stream than there was credit for",
                {application_close, 1, Told} = macula_dist_rogue:told_at_end(R),
                {_, match} = {Told, re:run(Told, Rule, [{capture, none}])},
                Line = io_lib:format("macula_dist: the link to ~s ended[^\n]*~s", [macula_dist_rogue:node_of(R), Rule]),
                ok = macula_dist_case:await_log(T, lists:flatten(Line))
        end,
        ok = macula_dist_rogue:close(R),
        ok = gone(R),
        true = call(T, erlang, exit, [Owner, kill])
    end, [{1, 16383, goes_on}, {1, 16384, ends}, {512, 262144, goes_on}, {512, ?MB, ends}]),
    unharmed(Scene).

%% A process of T that has the streams of Node, and reads when it is told to.
stream_owner(T, Node) ->
    call(T, fun() ->
        Starter = self(),
        Pid = spawn(fun() ->
            ok = macula_dist_stream:accept_streams(Node, [{active, false}]),
            Starter ! {self(), ready},
            own(none, 0)
        end),
        receive {Pid, ready} -> Pid end
    end).

own(Stream, Taken) ->
    receive
        {taken, From} -> From ! {taken, Taken}, own(Stream, Taken);
        {_, Of, {data, Data, _}} -> own(Of, Taken + byte_size(Data));
        read -> ok = macula_dist_stream:setopts(Stream, [{active, true}]), own(Stream, Taken);
        {answer, Data} -> ok = macula_dist_stream:send(Stream, Data), own(Stream, Taken);
        {_, Stream, {closed, _}} -> own(Stream, Taken)
    end.

taken(T, Owner) ->
    call(T, fun() ->
        Owner ! {taken, self()},
        receive {taken, Taken} -> Taken end
    end).
