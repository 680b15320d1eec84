%% @doc The load inside a node under soak: streams of numbered messages and calls to each peer, for
%% ever, each verified. A link that breaks is a fact of this network and begins a new round; a message
%% lost, doubled, changed or out of order on a link that stands is a violation.
-module(macula_soak_load).

-export([start/1, start/2, report/0, stop/0, states/0]).
-export([receiver/2]).
-export_type([report/0]).

-define(ROUND, 200).
-define(BULK_ROUND, 20).
%% Longer than any cut of the network lasts, with the liveness time behind it: who waits longer hangs.
-define(STALL_MS, 90000).

-type report() :: #{messages := non_neg_integer(), calls := non_neg_integer(),
                    bulk := non_neg_integer(), breaks := non_neg_integer(), violations := [term()]}.

-spec start([node()]) -> ok.
start(Peers) ->
    start(Peers, [messages, calls]).

%% @doc The same with these kinds of load, each by a process for each peer.
-spec start([node()], [messages | bulk | calls]) -> ok.
start(Peers, Kinds) ->
    Starter = self(),
    Pid = spawn(fun() ->
        true = register(?MODULE, self()),
        Collector = self(),
        Workers = [spawn_link(fun() -> forever(Work, Peer, Collector) end)
                   || Peer <- Peers, Work <- [work(Kind) || Kind <- Kinds]],
        Starter ! {started, self()},
        collect(nothing(), Workers)
    end),
    receive {started, Pid} -> ok end.

%% @doc What was done and what went wrong since the last report.
-spec report() -> report().
report() ->
    ask(report).

%% @doc Ends the load and all its processes.
-spec stop() -> report().
stop() ->
    ask(stop).

%% @doc What the processes of the load are at, and the links: for whoever looks for why nothing moves.
-spec states() -> [term()].
states() ->
    [[{Pid, process_info(Pid, [status, suspending, current_function, message_queue_len, reductions])}
      || Pid <- processes(), is_load(process_info(Pid, [current_stacktrace, dictionary]))],
     [{Pid, process_info(Pid, [status, suspending, current_function, message_queue_len, dictionary])}
      || {_, Pid} <- erlang:system_info(dist_ctrl), is_pid(Pid)],
     [macula_dist:info(Node) || Node <- nodes(connected)]].

is_load([{current_stacktrace, Stack}, _]) -> lists:keymember(?MODULE, 1, Stack);
is_load(undefined) -> false.

ask(What) ->
    Ref = erlang:monitor(process, ?MODULE),
    ?MODULE ! {What, self(), Ref},
    receive
        {Ref, Report} ->
            erlang:demonitor(Ref, [flush]),
            Report;
        {'DOWN', Ref, process, _, Reason} ->
            error({load_is_gone, Reason})
    after 10000 ->
        error(load_does_not_answer)
    end.

nothing() ->
    #{messages => 0, calls => 0, bulk => 0, breaks => 0, violations => []}.

work(messages) -> fun(Peer, _) -> messages(Peer, messages, ?ROUND, fun size/0) end;
work(bulk) -> fun(Peer, _) -> messages(Peer, bulk, ?BULK_ROUND, fun() -> 1000000 + rand:uniform(3000000) end) end;
work(calls) -> fun calls/2.

collect(Report, Workers) ->
    receive
        {done, Kind, N} ->
            collect(maps:update_with(Kind, fun(Old) -> Old + N end, Report), Workers);
        {violation, What} ->
            collect(maps:update_with(violations, fun(Old) -> [What | Old] end, Report), Workers);
        {report, From, Ref} ->
            From ! {Ref, Report},
            collect(nothing(), Workers);
        {stop, From, Ref} ->
            lists:foreach(fun(Worker) -> unlink(Worker), exit(Worker, kill) end, Workers),
            From ! {Ref, Report}
    end.

forever(Work, Peer, Collector) ->
    case net_adm:ping(Peer) of
        pong ->
            case Work(Peer, Collector) of
                {violation, _} = Violation -> Collector ! Violation;
                {Kind, N} -> Collector ! {done, Kind, N};
                broken -> Collector ! {done, breaks, 1}
            end;
        pang ->
            receive after 100 -> ok end
    end,
    forever(Work, Peer, Collector).

%% A round of numbered messages.
messages(Peer, Kind, Round, Size) ->
    {Receiver, Monitor} = spawn_monitor(Peer, ?MODULE, receiver, [self(), Round]),
    lists:foreach(fun(N) ->
        Data = rand:bytes(Size()),
        Receiver ! {N, erlang:phash2(Data), Data}
    end, lists:seq(1, Round)),
    Result = receive
        {Receiver, complete} -> {Kind, Round};
        {Receiver, {wrong, What}} -> {violation, {messages, Peer, What}};
        {'DOWN', Monitor, process, Receiver, noconnection} -> broken;
        {'DOWN', Monitor, process, Receiver, Reason} -> {violation, {receiver_died, Peer, Reason}}
    after ?STALL_MS ->
        {violation, {messages_stalled, Peer}}
    end,
    erlang:demonitor(Monitor, [flush]),
    exit(Receiver, kill),
    receive {Receiver, _} -> ok after 0 -> ok end,
    Result.

%% @private
-spec receiver(pid(), pos_integer()) -> ok.
receiver(Sender, Round) ->
    Monitor = erlang:monitor(process, Sender),
    receiver(Sender, Monitor, 1, Round).

receiver(Sender, _Monitor, N, Round) when N > Round ->
    Sender ! {self(), complete},
    ok;
receiver(Sender, Monitor, N, Round) ->
    receive
        {N, Hash, Data} ->
            case erlang:phash2(Data) of
                Hash -> receiver(Sender, Monitor, N + 1, Round);
                _ -> wrong(Sender, {changed, N})
            end;
        {Other, _, _} ->
            wrong(Sender, {expected, N, got, Other});
        {'DOWN', Monitor, process, Sender, _} ->
            ok
    end.

wrong(Sender, What) ->
    Sender ! {self(), {wrong, What}},
    ok.

calls(Peer, _Collector) ->
    Data = rand:bytes(size()),
    Hash = erlang:phash2(Data),
    try erpc:call(Peer, erlang, phash2, [Data], ?STALL_MS) of
        Hash -> {calls, 1};
        Other -> {violation, {call, Peer, Hash, Other}}
    catch
        error:{erpc, noconnection} -> broken;
        Class:Reason -> {violation, {call, Peer, Class, Reason}}
    end.

%% Mostly small, sometimes over the size that ERTS fragments, now and then megabytes.
size() ->
    case rand:uniform(100) of
        N when N =< 80 -> rand:uniform(1000) - 1;
        N when N =< 97 -> rand:uniform(100000);
        _ -> rand:uniform(2000000)
    end.
