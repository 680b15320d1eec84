%% A load for a node of its own, watched by the VM's system monitor.
-module(macula_quic_load).

-include("macula_quic_test.hrl").

-export([watched/1]).

%% @doc Keeps connections, streams and messages going for so many milliseconds. What the VM said of
%% processes that ran for 20 ms and more without a pause.
-spec watched(pos_integer()) -> [{pid(), [term()]}].
watched(Duration) ->
    Self = self(),
    Watcher = spawn_link(fun() -> watch(Self, []) end),
    _ = erlang:system_monitor(Watcher, [{long_schedule, 20}]),
    Pair = macula_quic_lab:pair(),
    %% One after the other: whoever accepts at the same time may get another's.
    Streams = [macula_quic_lab:stream(Pair) || _ <- lists:seq(1, 5)],
    {Bulk, Small} = lists:split(2, Streams),
    Workers = [spawn_link(fun() -> bulk(Here, There) end) || {Here, There} <- Bulk] ++
              [spawn_link(fun() -> ping(Here, There) end) || {Here, There} <- Small] ++
              [spawn_link(fun() -> dial(maps:get(port, Pair)) end),
               spawn_link(fun() -> accept(maps:get(listener, Pair)) end)],
    %% The load itself is what takes the time.
    receive never -> ok after Duration -> ok end,
    _ = erlang:system_monitor(undefined),
    [begin unlink(Pid), exit(Pid, kill) end || Pid <- Workers],
    Watcher ! {report, self()},
    receive {slow, Slow} -> Slow end.

watch(Test, Slow) ->
    receive
        {monitor, Pid, long_schedule, Info} -> watch(Test, [{Pid, Info} | Slow]);
        {report, Test} -> Test ! {slow, Slow}
    end.

bulk(Here, There) ->
    _ = spawn_link(fun() -> read_on(There) end),
    Blocks = [binary:copy(<<0>>, 70000), lists:duplicate(5000, <<"piece">>)],
    send_on(Here, Blocks).

send_on(Stream, Blocks) ->
    _ = [ok = macula_quic:send(Stream, Block) || Block <- Blocks],
    send_on(Stream, Blocks).

read_on(Stream) ->
    {ok, _} = macula_quic:recv(Stream, 0),
    read_on(Stream).

ping(Here, There) ->
    ok = macula_quic:send(Here, <<"ping">>),
    {ok, <<"ping">>} = macula_quic:recv(There, 4, 30000),
    ping(Here, There).

dial(Port) ->
    {ok, C} = macula_quic:connect("127.0.0.1", Port, macula_quic_lab:client_options(), 30000),
    ok = macula_quic:close(C),
    %% Or the other side was first, which keeps none.
    ?EXPECT({quic, _, C, _}, ok, 30000),
    dial(Port).

accept(Listener) ->
    _ = macula_quic:accept(Listener, 30000),
    accept(Listener).
