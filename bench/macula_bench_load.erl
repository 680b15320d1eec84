%% @doc What runs inside the nodes that are measured. It knows nothing of carriers: it sends terms
%% to pids.
-module(macula_bench_load).

-export([throughput/3, round_trips/2, callers/3, transfer/3]).
-export([sink/0, echo/0]).

-type throughput() :: #{messages := non_neg_integer(), bytes := non_neg_integer(),
                        microseconds := pos_integer(), cpu_ms := non_neg_integer()}.
-type latencies() :: #{p50 := float(), p99 := float(), count := non_neg_integer()}.
%% Latencies in microseconds.

%% @doc One process sends binaries of `Size' bytes to one process of `Node' for `Ms' milliseconds;
%% the clock stops when the receiver has counted the last. CPU time is that of both VMs.
-spec throughput(node(), pos_integer(), pos_integer()) -> throughput().
throughput(Node, Size, Ms) ->
    Sink = spawn_link(Node, ?MODULE, sink, []),
    Data = rand:bytes(Size),
    _ = flood(Sink, Data, deadline(Ms div 5)),
    _ = counted(Sink),
    Cpu0 = cpu(Node),
    Start = now_us(),
    Sent = flood(Sink, Data, deadline(Ms)),
    Sent = counted(Sink),
    Took = now_us() - Start,
    Cpu = cpu(Node) - Cpu0,
    unlink(Sink),
    exit(Sink, kill),
    #{messages => Sent, bytes => Sent * Size, microseconds => Took, cpu_ms => Cpu}.

%% The clock is asked now and then only: that would be a part of what a small message costs.
flood(Sink, Data, Deadline) ->
    flood(Sink, Data, Deadline, max(1, min(1000, 65536 div byte_size(Data))), 0).

flood(Sink, Data, Deadline, Burst, Sent) ->
    burst(Sink, Data, Burst),
    case now_us() < Deadline of
        true -> flood(Sink, Data, Deadline, Burst, Sent + Burst);
        false -> Sent + Burst
    end.

burst(_Sink, _Data, 0) ->
    ok;
burst(Sink, Data, N) ->
    Sink ! Data,
    burst(Sink, Data, N - 1).

counted(Sink) ->
    Sink ! {count, self()},
    receive {counted, Sink, Count} -> Count end.

%% @private
-spec sink() -> no_return().
sink() ->
    sink(0).

sink(Count) ->
    receive
        Data when is_binary(Data) ->
            sink(Count + 1);
        {count, From} ->
            From ! {counted, self(), Count},
            sink(0)
    end.

%% @doc One process sends 64 bytes and waits for the answer, for `Ms' milliseconds.
-spec round_trips(node(), pos_integer()) -> latencies().
round_trips(Node, Ms) ->
    Echo = spawn_link(Node, ?MODULE, echo, []),
    Data = rand:bytes(64),
    Ask = fun() ->
        Echo ! {self(), Data},
        receive {Echo, Data} -> ok end
    end,
    _ = timed(Ask, deadline(Ms div 5), []),
    Times = timed(Ask, deadline(Ms), []),
    unlink(Echo),
    exit(Echo, kill),
    latencies(Times).

%% @private
-spec echo() -> no_return().
echo() ->
    receive
        {From, Data} -> From ! {self(), Data}
    end,
    echo().

%% @doc `N' processes call one of `Node' at the same time, with monitors and references as
%% `gen_server:call' does. Returns also the calls per second.
-spec callers(node(), pos_integer(), pos_integer()) -> latencies().
callers(Node, N, Ms) ->
    Server = spawn_link(Node, ?MODULE, echo, []),
    Data = rand:bytes(64),
    Call = fun() ->
        Monitor = erlang:monitor(process, Server),
        Server ! {self(), {Monitor, Data}},
        receive {Server, {Monitor, Data}} -> erlang:demonitor(Monitor, [flush]) end
    end,
    _ = timed(Call, deadline(Ms div 5), []),
    Self = self(),
    Start = now_us(),
    Deadline = deadline(Ms),
    Pids = [spawn_link(fun() -> Self ! {self(), timed(Call, Deadline, [])} end)
            || _ <- lists:seq(1, N)],
    Times = lists:append([receive {Pid, T} -> T end || Pid <- Pids]),
    Took = now_us() - Start,
    unlink(Server),
    exit(Server, kill),
    (latencies(Times))#{per_second => length(Times) * 1.0e6 / Took}.

%% @doc Sends `Bytes' in pieces of `Piece' bytes and returns the microseconds it took. How many the
%% receiver has counted stands in the first of `Counters', at least a hundred times.
-spec transfer(node(), {pos_integer(), pos_integer()}, counters:counters_ref()) -> pos_integer().
transfer(Node, {Bytes, Piece}, Counters) ->
    Sink = spawn_link(Node, ?MODULE, sink, []),
    Data = rand:bytes(Piece),
    Pieces = Bytes div Piece,
    Start = now_us(),
    Pieces = pieces(Sink, Data, Pieces, max(1, Pieces div 100), false, Counters),
    Took = now_us() - Start,
    unlink(Sink),
    exit(Sink, kill),
    Took.

%% Two steps may be under way, so the line never stands still for the sake of counting.
pieces(Sink, Data, 0, _Step, Asked, Counters) ->
    Counted = answer(Sink, Asked),
    ok = counters:add(Counters, 1, Counted * byte_size(Data)),
    Counted;
pieces(Sink, Data, Left, Step, Asked, Counters) ->
    N = min(Left, Step),
    burst(Sink, Data, N),
    Sink ! {count, self()},
    Counted = answer(Sink, Asked),
    ok = counters:add(Counters, 1, Counted * byte_size(Data)),
    Rest = pieces(Sink, Data, Left - N, Step, true, Counters),
    Counted + Rest.

answer(_Sink, false) ->
    0;
answer(Sink, true) ->
    receive {counted, Sink, Count} -> Count end.

%% Measuring

timed(Fun, Deadline, Times) ->
    Before = erlang:monotonic_time(nanosecond),
    _ = Fun(),
    After = erlang:monotonic_time(nanosecond),
    case After div 1000 < Deadline of
        true -> timed(Fun, Deadline, [After - Before | Times]);
        false -> [After - Before | Times]
    end.

latencies(Times) ->
    Sorted = list_to_tuple(lists:sort(Times)),
    Size = tuple_size(Sorted),
    At = fun(Part) -> element(max(1, Size * Part div 100), Sorted) / 1000 end,
    #{p50 => At(50), p99 => At(99), count => Size}.

cpu(Node) ->
    {Here, _} = erlang:statistics(runtime),
    {There, _} = erpc:call(Node, erlang, statistics, [runtime]),
    Here + There.

now_us() ->
    erlang:monotonic_time(microsecond).

deadline(Ms) ->
    now_us() + Ms * 1000.
