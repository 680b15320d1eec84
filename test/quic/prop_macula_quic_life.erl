%% A model of listeners, connections and streams, with any sequence of what their owners may do: open, send,
%% receive in each mode, give away, move to another port, reset, stop, close, be killed.
%%
%% The model knows for each end of each stream what it has sent and how its two halves stand, and for each
%% handle which owner has it. From that follows what every call answers and which messages each owner may
%% get: no byte twice, out of order or missing, no message about a handle to anybody but its owner, none
%% that nothing has caused, one terminal message and nothing behind it. At the end all that still lives is
%% finished, read to the end and closed, and nothing native, no atom and no file descriptor is left.
-module(prop_macula_quic_life).
-behaviour(proper_statem).

-include("../support/macula_proper.hrl").
-include("macula_quic_test.hrl").

-export([prop_what_owners_see_follows_from_what_was_done/0]).
-export([initial_state/0, command/1, precondition/2, next_state/3, postcondition/3]).
-export([listen/2, close_listener/1, connect/4, open/5, send/4, recv/3, set_active/3, read_all/3, give/2,
         steal/2, shut/4, close_stream/3, close_connection/3, migrate/1, kill/1, end_well/1]).

-define(OWNERS, [1, 2, 3, 4]).
-define(PATIENCE, 20000).
%% What one end sends at most, far below all windows: no send waits.
-define(MOST, 200000).

prop_what_owners_see_follows_from_what_was_done() ->
    ?SETUP(fun() ->
        %% Once, so that all code is there, and all atoms.
        true = holds([{set, {var, N}, Call} || {N, Call} <- all_of_it()]),
        Before = {macula_quic_lab:objects(), fds(), erlang:system_info(atom_count)},
        fun() -> nothing_is_left(Before) end
    end,
    ?FORALL(Commands, proper_types:resize(60, proper_statem:commands(?MODULE)), holds(Commands))).

%% In a process of its own, whose handles go with it.
holds(Commands) ->
    Calls = [{F, Args} || {set, _, {call, _, F, Args}} <- Commands],
    case macula_quic_lab:in_process(fun() -> run(Calls) end) of
        ok ->
            true;
        Fault ->
            io:format("~n~0tp~n~s", [Fault, [io_lib:format("  ~0p~n", [Call]) || Call <- Calls]]),
            false
    end.

%% Not by proper_statem:run_commands/2, which shows nothing of a call that raises.
run(Calls) ->
    [start_owner(Owner) || Owner <- ?OWNERS],
    try finish(steps(Calls, initial_state()))
    catch Class:Why:Stack -> {Class, Why, Stack}
    after [kill_owner(Owner) || Owner <- ?OWNERS]
    end.

fds() ->
    case file:list_dir("/proc/self/fd") of
        {ok, Names} -> length(Names);
        {error, _} -> 0
    end.

nothing_is_left({Objects, Fds, Atoms}) ->
    macula_quic_lab:await_objects(Objects),
    macula_test_nodes:wait_until(fun() -> fds() =< Fds orelse {fds, Fds, fds()} end),
    %% Those of PropEr and of reports; not one for each of some sequences.
    Now = erlang:system_info(atom_count),
    Now - Atoms < 200 orelse error({atoms, Atoms, Now}),
    ok.

%% One of each.
all_of_it() ->
    lists:enumerate([{call, ?MODULE, F, Args} || {F, Args} <- [
        {listen, [5, 1]}, {connect, [1, 5, 2, waiting]}, {connect, [2, 5, 3, armed]},
        {open, [1, 3, client, bidirectional, waiting]}, {open, [1, 4, server, unidirectional, armed]},
        {send, [3, client, 1000, false]}, {recv, [3, server, 500]}, {set_active, [3, server, once]},
        {send, [4, server, 1000, true]}, {read_all, [4, client, true]}, {give, [{3, server}, 3]},
        {steal, [{1, client}, 1]}, {migrate, [1]}, {shut, [3, client, abort_send, true]},
        {close_stream, [3, server, true]}, {kill, [3]}, {close_connection, [1, server, 7]},
        {close_listener, [5]}]]).

%%--------------------------------------------------------------------------------------------
%% The model

%% A handle's key is {Listener, listener}, {Connection, Side} or {Stream, Side}, all of them numbered in a row.
initial_state() ->
    #{listeners => #{}, conns => #{}, armed => [], streams => #{}, owner => #{}, may => #{}, next => 1}.

command(#{next := Next, conns := Conns} = S) ->
    Id = Next,
    Ends = live_ends(S),
    Listeners = live_listeners(S),
    Handles = Listeners ++ live_conns(S) ++ Ends,
    proper_types:frequency(
        [{case Listeners of [] -> 9; _ -> 1 end, call(listen, [Id, owner()])}]
        ++ lists:append([[
            {1, ?LET({L, _}, elements(Listeners), call(close_listener, [L]))},
            {case map_size(Conns) < 4 of true -> 4; false -> 1 end,
             ?LET({L, _}, elements(Listeners), call(connect, [Id, L, owner(), how()]))}] || Listeners =/= []])
        ++ lists:append([[
            {8, ?LET({C, Side}, elements(both_alive(S)),
                     call(open, [C, Id, Side, elements([bidirectional, bidirectional, unidirectional]), how()]))},
            {1, ?LET({C, Side}, elements(both_alive(S)), call(close_connection, [C, Side, code()]))},
            {1, ?LET({C, _}, elements(both_alive(S)), call(migrate, [C]))}] || both_alive(S) =/= []])
        ++ lists:append([[
            {10, on(Ends, fun(St, Side) -> call(send, [St, Side, size(), oneof([false, false, false, true])]) end)},
            {6, on(Ends, fun(St, Side) -> call(recv, [St, Side, size()]) end)},
            {5, on(Ends, fun(St, Side) -> call(set_active, [St, Side, mode()]) end)},
            {4, on(Ends, fun(St, Side) -> call(read_all, [St, Side, mode()]) end)},
            {3, on(Ends, fun(St, Side) ->
                call(shut, [St, Side, elements([abort_send, abort_receive, abort]), boolean()])
            end)},
            {1, on(Ends, fun(St, Side) -> call(close_stream, [St, Side, boolean()]) end)}] || Ends =/= []])
        ++ lists:append([[
            {5, ?LET(Key, elements(Handles), call(give, [Key, owner()]))},
            {1, ?LET(Key, elements(Handles), call(steal, [Key, owner()]))}] || Handles =/= []])
        ++ [{1, call(kill, [owner()])}]).

call(F, Args) -> {call, ?MODULE, F, Args}.
owner() -> elements(?OWNERS).
how() -> elements([waiting, armed]).
code() -> oneof([0, 7, (1 bsl 62) - 1]).
size() -> oneof([0, 1, integer(1, 3000), integer(1, 30000)]).
mode() -> oneof([true, once, integer(1, 5), false]).
on(Ends, Call) -> ?LET({Stream, Side}, elements(Ends), Call(Stream, Side)).

other(client) -> server;
other(server) -> client.

is_mine(Key, #{owner := Owner}) -> is_integer(maps:get(Key, Owner, dead)).

live_listeners(#{listeners := Listeners} = S) ->
    [{L, listener} || {L, open} <- maps:to_list(Listeners), is_mine({L, listener}, S)].

live_conns(#{conns := Conns} = S) ->
    [{C, Side} || {C, up} <- maps:to_list(Conns), Side <- [client, server], is_mine({C, Side}, S)].

both_alive(S) -> [{C, Side} || {C, Side} <- live_conns(S), is_mine({C, other(Side)}, S)].

live_ends(#{streams := Streams} = S) ->
    [{St, Side} || {St, #{conn := C}} <- maps:to_list(Streams), is_up(C, S), Side <- [client, server],
                   is_mine({St, Side}, S)].

is_up(C, #{conns := Conns}) -> maps:get(C, Conns, over) =:= up.

precondition(S, {call, _, listen, [L, _]}) ->
    is_new(L, S);
precondition(S, {call, _, close_listener, [L]}) ->
    is_open(L, S);
precondition(S, {call, _, connect, [C, L | _]}) ->
    is_new(C, S) andalso is_open(L, S);
%% Once armed, an owner gets all streams by message.
precondition(S, {call, _, open, [C, St, Side, _, How]}) ->
    is_mine({C, client}, S) andalso is_mine({C, server}, S) andalso is_up(C, S) andalso is_new(St, S)
        andalso (How =:= armed orelse not lists:member({C, other(Side)}, maps:get(armed, S)));
precondition(S, {call, _, send, [St, Side, Size, _]}) ->
    is_live(St, Side, S) andalso tx(St, Side, S) =/= none andalso sent(St, Side, S) + Size =< ?MOST;
precondition(S, {call, _, F, [St, Side | _]}) when F =:= recv; F =:= set_active; F =:= read_all ->
    is_live(St, Side, S) andalso rx(St, Side, S) =:= open;
precondition(S, {call, _, shut, [St, Side, Flag, _]}) ->
    %% Behind a FIN nobody knows whether a reset still finds something to reset.
    is_live(St, Side, S)
        andalso (Flag =:= abort_receive orelse tx(St, Side, S) =:= open)
        andalso (Flag =:= abort_send orelse rx(St, Side, S) =:= open);
precondition(S, {call, _, close_stream, [St, Side, _]}) ->
    is_live(St, Side, S);
precondition(S, {call, _, give, [Key, _]}) ->
    can_be_given(Key, S);
precondition(#{owner := Owner} = S, {call, _, steal, [Key, Thief]}) ->
    can_be_given(Key, S) andalso map_get(Key, Owner) =/= Thief;
precondition(S, {call, _, close_connection, [C, Side, _]}) ->
    is_up(C, S) andalso is_mine({C, Side}, S);
precondition(S, {call, _, migrate, [C]}) ->
    is_up(C, S) andalso is_mine({C, client}, S) andalso is_mine({C, server}, S);
precondition(_, {call, _, kill, _}) ->
    true;
precondition(S, {call, _, end_well, [St]}) ->
    is_over(St, client, S) andalso is_over(St, server, S).

is_new(Id, #{listeners := Listeners, conns := Conns, streams := Streams}) ->
    not lists:any(fun(Known) -> is_map_key(Id, Known) end, [Listeners, Conns, Streams]).

is_open(L, S) -> lists:member({L, listener}, live_listeners(S)).

is_live(St, Side, S) -> lists:member({St, Side}, live_ends(S)).

can_be_given(Key, S) ->
    lists:member(Key, live_listeners(S) ++ live_conns(S) ++ live_ends(S)).

half(What, St, Side, #{streams := Streams}) -> map_get({What, Side}, map_get(St, Streams)).
tx(St, Side, S) -> half(tx, St, Side, S).
rx(St, Side, S) -> half(rx, St, Side, S).
sent(St, Side, S) -> half(sent, St, Side, S).

next_state(#{listeners := Listeners, next := Next} = S, _, {call, _, listen, [L, Owner]}) ->
    owned({L, listener}, Owner, S#{listeners := Listeners#{L => open}, next := max(Next, L + 1)});
next_state(#{listeners := Listeners} = S, _, {call, _, close_listener, [L]}) ->
    S#{listeners := Listeners#{L := closed}};
next_state(#{conns := Conns, next := Next, owner := Owners} = S, _, {call, _, connect, [C, L, Owner, _]}) ->
    owned({C, client}, Owner,
          owned({C, server}, map_get({L, listener}, Owners),
                S#{conns := Conns#{C => up}, next := max(Next, C + 1)}));
next_state(#{armed := Armed} = S, Result, {call, M, open, [C, St, Side, Direction, armed]}) ->
    next_state(S#{armed := lists:usort([{C, other(Side)} | Armed])}, Result,
               {call, M, open, [C, St, Side, Direction, waiting]});
next_state(#{streams := Streams, next := Next, owner := Owner} = S, _,
           {call, _, open, [C, St, Side, Direction, waiting]}) ->
    Back = case Direction of bidirectional -> open; unidirectional -> none end,
    Peer = other(Side),
    Stream = #{conn => C, {tx, Side} => open, {rx, Peer} => open, {tx, Peer} => Back, {rx, Side} => Back,
               {sent, Side} => 1, {sent, Peer} => 0},
    owned({St, client}, map_get({C, client}, Owner),
          owned({St, server}, map_get({C, server}, Owner),
                S#{streams := Streams#{St => Stream}, next := max(Next, St + 1)}));
next_state(S, _, {call, _, send, [St, Side, Size, Fin]}) ->
    case tx(St, Side, S) of
        open ->
            Sent = set(sent, St, Side, sent(St, Side, S) + Size, S),
            case Fin of true -> set(tx, St, Side, fin, Sent); false -> Sent end;
        _ ->
            S
    end;
next_state(#{owner := Owner} = S, _, {call, _, give, [Key, To]}) ->
    S#{owner := Owner#{Key := To}};
next_state(S, _, {call, _, shut, [St, Side, Flag, _]}) ->
    Reset = case Flag of abort_receive -> S; _ -> reset(St, Side, 5, S) end,
    case Flag of abort_send -> Reset; _ -> stop(St, Side, 5, Reset) end;
next_state(S, _, {call, _, close_stream, [St, Side, _]}) ->
    Finished = case tx(St, Side, S) of open -> set(tx, St, Side, fin, S); _ -> S end,
    stop(St, Side, 0, Finished);
next_state(#{conns := Conns} = S, _, {call, _, close_connection, [C, Side, Code]}) ->
    S#{conns := Conns#{C := {over, Side, Code}}};
next_state(S, _, {call, _, kill, [Owner]}) ->
    killed(Owner, S);
next_state(S, _, _) ->
    S.

owned(Key, Who, #{owner := Owner} = S) -> S#{owner := Owner#{Key => Who}}.

set(What, St, Side, Value, #{streams := Streams} = S) ->
    S#{streams := Streams#{St := (map_get(St, Streams))#{{What, Side} := Value}}}.

may(Key, Event, #{may := May} = S) -> S#{may := May#{Key => [Event | maps:get(Key, May, [])]}}.

reset(St, Side, Code, S) ->
    case tx(St, Side, S) of
        open ->
            Reset = set(tx, St, Side, {reset, Code}, S),
            case rx(St, other(Side), S) of
                open -> may({St, other(Side)}, {peer_send_aborted, Code}, Reset);
                _ -> Reset
            end;
        %% Sent, and perhaps not yet acknowledged: a kill may still cut it off.
        fin -> may({St, other(Side)}, {peer_send_aborted, Code}, set(tx, St, Side, {lost, Code}, S));
        _ -> S
    end.

stop(St, Side, Code, S) ->
    case rx(St, Side, S) of
        open ->
            Stopped = set(rx, St, Side, stopped, S),
            Peer = other(Side),
            case tx(St, Peer, S) of
                open -> may({St, Peer}, {peer_receive_aborted, Code}, set(tx, St, Peer, {stopped, Code}, Stopped));
                _ -> may({St, Peer}, {peer_receive_aborted, Code}, Stopped)
            end;
        _ ->
            S
    end.

killed(Who, #{owner := Owner, conns := Conns, streams := Streams} = S) ->
    Gone = [Key || {Key, O} <- maps:to_list(Owner), O =:= Who],
    Dead = S#{owner := maps:map(fun(_, O) when O =:= Who -> dead; (_, O) -> O end, Owner)},
    lists:foldl(fun
        ({L, listener}, #{listeners := Ls} = Acc) ->
            Acc#{listeners := Ls#{L := closed}};
        ({Id, Side}, #{conns := Cs} = Acc) when map_get(Id, Conns) =:= up ->
            Acc#{conns := Cs#{Id := {over, Side, 0}}};
        ({Id, Side}, Acc) when is_map_key(Id, Streams) ->
            stop(Id, Side, 0, reset(Id, Side, 0, Acc));
        (_, Acc) ->
            Acc
    end, Dead, Gone).

%% Both halves of an end, where all was read that the peer had to say.
is_over(St, Side, S) ->
    tx(St, Side, S) =/= open andalso
        case rx(St, Side, S) of
            open -> case tx(St, other(Side), S) of
                open -> false;
                fin -> got({St, Side}) =:= sent(St, other(Side), S);
                _ -> true
            end;
            _ -> true
        end.

%%--------------------------------------------------------------------------------------------
%% What follows from a call

postcondition(S, {call, _, F, Args} = Call, Result) ->
    After = next_state(S, Result, Call),
    answers(F, Args, S, Result) orelse error({answer, Result}),
    Must = must(F, Args, S, After),
    %% What had arrived before a connection's end is read before a stream ends.
    [set_active(Id, Side, true) || {{Id, Side}, ended} <- Must, is_map_key(Id, maps:get(streams, After)),
                                   rx(Id, Side, After) =:= open, is_mine({Id, Side}, After)],
    await(Must, After, deadline()),
    true.

answers(send, [St, Side, _, _], S, Result) ->
    case tx(St, Side, S) of
        open ->
            Result =:= ok;
        {stopped, Code} ->
            Told = lists:member({peer_receive_aborted, Code}, seen({St, Side})),
            Result =:= {error, {stopped, Code}}
                orelse not Told andalso lists:member(Result, [ok, {error, closed}]);
        _ ->
            %% The peer may have asked to stop what was finished.
            Stops = [Code || {peer_receive_aborted, Code} <- maps:get({St, Side}, maps:get(may, S), [])],
            lists:member(Result, [{error, closed} | [{error, {stopped, Code}} || Code <- Stops]])
    end;
answers(recv, [St, Side, Len], S, {Told, Result}) ->
    Key = {St, Side},
    note(holder(Key), Told, S),
    Left = sent(St, other(Side), S) - got(Key),
    case Result of
        {ok, Bytes} -> take(Key, Bytes);
        {error, closed} -> change({read_to_end, Key}, true);
        {error, _} -> ok
    end,
    case {tx(St, other(Side), S), Result} of
        {{reset, Code}, {error, {reset, Code}}} -> true;
        {{lost, Code}, {error, {reset, Code}}} -> true;
        {fin, {error, closed}} -> Left =:= 0;
        {{lost, _}, {error, closed}} -> Left =:= 0;
        {_, {error, timeout}} -> Len > Left orelse Left =:= 0;
        {Tx, {ok, Data}} when Tx =:= open; Tx =:= fin ->
            byte_size(Data) =:= min(Len, Left) orelse Len =:= 0 andalso byte_size(Data) =< Left;
        {_, {ok, Data}} -> byte_size(Data) =< Left;
        _ -> false
    end;
answers(read_all, [St, Side, Mode], S, ok) ->
    read_all({St, Side}, Mode, S, deadline());
answers(steal, _, _, Result) ->
    Result =:= {error, not_owner};
answers(migrate, _, _, Result) ->
    element(1, Result) =:= ok;
answers(_, _, _, Result) ->
    Result =:= ok.

%% What must be told for the owners to know: events of streams only where the call wants to wait.
must(shut, [_, _, _, true], S, After) -> new_events(S, After);
must(close_stream, [_, _, true], S, After) -> new_events(S, After);
must(close_listener, [L], _, _) -> [{{L, listener}, ended}];
must(close_connection, _, S, After) -> ends(S, After);
must(kill, _, S, After) -> new_events(S, After) ++ ends(S, After);
must(end_well, [St], _, _) -> [{{St, client}, ended}, {{St, server}, ended}];
must(_, _, _, _) -> [].

%% Where the connection goes, too, nothing else needs to be told.
new_events(#{may := Before} = S, #{may := May, streams := Streams} = After) ->
    [{{St, Side}, Event}
     || {{St, Side} = Key, Events} <- maps:to_list(May), Event <- Events -- maps:get(Key, Before, []),
        #{conn := C} <- [map_get(St, Streams)], is_up(C, After),
        case Event of
            {peer_send_aborted, _} -> tx(St, other(Side), S) =:= open;
            {peer_receive_aborted, _} -> tx(St, Side, S) =:= open
        end].

%% All handles of connections that are over now.
ends(S, #{conns := Conns, streams := Streams}) ->
    Over = [C || {C, {over, _, _}} <- maps:to_list(Conns), is_up(C, S)],
    [{{Id, Side}, ended} || Id <- Over ++ [St || {St, #{conn := C}} <- maps:to_list(Streams), lists:member(C, Over)],
                            Side <- [client, server]].

%% What an owner may be told of a handle now.
is_allowed(_, {passive, undefined}, _) ->
    true;
is_allowed({L, listener}, {ended, listener_stopped, undefined}, #{listeners := Listeners}) ->
    map_get(L, Listeners) =:= closed;
is_allowed({Id, Side}, {ended, What, Detail}, #{conns := Conns}) when is_map_key(Id, Conns) ->
    case map_get(Id, Conns) of
        {over, Side, _} -> {What, Detail} =:= {closed, normal};
        {over, _, Code} -> What =:= shutdown andalso element(2, Detail) =:= Code;
        up -> false
    end;
is_allowed({Id, Side}, {ended, stream_closed, #{reason := Why}}, #{streams := Streams} = S) ->
    #{conn := C} = map_get(Id, Streams),
    not is_up(C, S) orelse Why =:= normal andalso is_over(Id, Side, S);
is_allowed({Id, Side} = Key, peer_send_shutdown, S) ->
    Tx = tx(Id, other(Side), S),
    (Tx =:= fin orelse element(1, Tx) =:= lost) andalso got(Key) =:= sent(Id, other(Side), S)
        andalso not lists:member(peer_send_shutdown, seen(Key));
is_allowed(Key, Event, #{may := May}) ->
    lists:member(Event, maps:get(Key, May, []) -- seen(Key)).

%%--------------------------------------------------------------------------------------------
%% What was done and seen, in the process's dictionary

change(What, Value) -> put({?MODULE, What}, Value).
known(What, Default) ->
    case get({?MODULE, What}) of
        undefined -> Default;
        Value -> Value
    end.

got(Key) -> known({got, Key}, 0).
seen(Key) -> known({seen, Key}, []).
holder(Key) -> known({holder, Key}, none).
handle(Key) -> known({handle, Key}, none).

know(Key, Owner, Handle) ->
    _ = change({holder, Key}, Owner),
    _ = change({handle, Key}, Handle),
    _ = change({key, Handle}, Key),
    ok.

%% The bytes that an end sends, by which every one can be told from its neighbours.
data(Key, Offset, Size) ->
    binary:part(pattern(), (Offset + erlang:phash2(Key)) rem 251, Size).

pattern() ->
    case persistent_term:get(?MODULE, none) of
        none ->
            Made = binary:copy(list_to_binary(lists:seq(0, 250)), ?MOST div 251 + 2),
            persistent_term:put(?MODULE, Made),
            Made;
        Made ->
            Made
    end.

take({St, Side} = Key, Bytes) ->
    At = got(Key),
    Bytes =:= data({St, other(Side)}, At, byte_size(Bytes)) orelse error({other_bytes, Key, At, byte_size(Bytes)}),
    change({got, Key}, At + byte_size(Bytes)).

start_owner(Owner) ->
    change({owner, Owner}, macula_quic_lab:spawn_owner(fun() -> none end)).

kill_owner(Owner) ->
    Pid = known({owner, Owner}, none),
    unlink(Pid),
    Monitor = monitor(process, Pid),
    exit(Pid, kill),
    receive {'DOWN', Monitor, process, Pid, _} -> ok end.

%% What is raised there is raised here.
in(Owner, Fun) ->
    Result = macula_quic_lab:ask(known({owner, Owner}, none), fun(_) ->
        try {ok, Fun()}
        catch Class:Why:Stack -> {Class, Why, Stack}
        end
    end),
    case Result of
        {ok, Value} -> Value;
        {Class, Why, Stack} -> erlang:raise(Class, Why, Stack)
    end.

as(Key, Fun) ->
    Handle = handle(Key),
    in(holder(Key), fun() -> Fun(Handle) end).

deadline() -> erlang:monotonic_time(millisecond) + ?PATIENCE.

is_past(Deadline) -> erlang:monotonic_time(millisecond) > Deadline.

look(S) ->
    [note(Owner, in(Owner, fun macula_quic_lab:mailbox/0), S) || Owner <- ?OWNERS],
    ok.

note(Owner, Messages, S) ->
    [begin
         Key = known({key, Handle}, unknown),
         holder(Key) =:= Owner orelse error({not_the_owner, Owner, Key, What}),
         not is_ended(Key) orelse error({behind_the_end, Key, What, Detail}),
         told(Key, What, Detail, S)
     end || {quic, What, Handle, Detail} <- Messages],
    ok.

told(Key, Data, #{absolute_offset := At, len := Len}, _) when is_binary(Data) ->
    {At, Len} =:= {got(Key), byte_size(Data)} orelse error({gap, Key, got(Key), At, Len}),
    take(Key, Data);
told(Key, What, Detail, S) ->
    Event = case lists:member(What, [stream_closed, shutdown, closed, transport_shutdown, listener_stopped]) of
        true -> {ended, What, Detail};
        false when What =:= peer_send_shutdown -> What;
        false -> {What, Detail}
    end,
    is_allowed(Key, Event, S) orelse error({not_caused, Key, Event, seen(Key)}),
    change({seen, Key}, [Event | seen(Key)]).

is_ended(Key) -> lists:keymember(ended, 1, seen(Key)).

%% Until all of it was told to those who live. A stream that has ended says nothing more.
await(Must, #{owner := Owners} = S, Deadline) ->
    look(S),
    Missing = [{Key, Event} || {Key, Event} <- Must, map_get(Key, Owners) =/= dead,
                               not is_ended(Key) andalso not lists:member(Event, seen(Key))],
    case Missing of
        [] -> ok;
        _ ->
            is_past(Deadline) andalso error({not_told, Missing}),
            timer:sleep(1),
            await(Missing, S, Deadline)
    end.

%% All that the peer has sent so far, and how the peer has ended it.
read_all(Key, Mode, S, Deadline) ->
    look(S),
    Armed = spent(Key, Mode),
    case has_all(Key, S) of
        true ->
            true;
        false when Mode =:= false ->
            {St, Side} = Key,
            is_past(Deadline) andalso error({not_read, Key, got(Key)}),
            answers(recv, [St, Side, 0], S, recv(St, Side, 0)) andalso read_all(Key, Mode, S, Deadline);
        false ->
            {St, Side} = Key,
            ok = set_active(St, Side, Mode),
            until_passive(Key, Mode, S, Armed, Deadline)
    end.

until_passive(Key, Mode, S, Armed, Deadline) ->
    look(S),
    case {has_all(Key, S), spent(Key, Mode) > Armed} of
        {true, _} -> true;
        {false, true} -> read_all(Key, Mode, S, Deadline);
        {false, false} ->
            is_past(Deadline) andalso error({not_read, Key, got(Key)}),
            timer:sleep(1),
            until_passive(Key, Mode, S, Armed, Deadline)
    end.

%% Of a count the last message is told, of `once' it is the data.
spent(Key, once) -> got(Key);
spent(Key, _) -> length([x || {passive, _} <- seen(Key)]).

has_all({St, Side} = Key, S) ->
    Finished = known({read_to_end, Key}, false) orelse lists:member(peer_send_shutdown, seen(Key)),
    Aborted = lists:keymember(peer_send_aborted, 1, seen(Key)),
    is_ended(Key) orelse case tx(St, other(Side), S) of
        fin -> Finished;
        {reset, _} -> Aborted;
        {lost, _} -> Finished orelse Aborted;
        _ -> got(Key) =:= sent(St, other(Side), S)
    end.

%% All that lives is finished, read and closed.
finish(S) ->
    #{conns := Conns, streams := Streams} = S,
    Ends = live_ends(S),
    Finished = steps([{send, [St, Side, 0, true]} || {St, Side} <- Ends, tx(St, Side, S) =:= open], S),
    Read = steps([{read_all, [St, Side, true]} || {St, Side} <- Ends, rx(St, Side, S) =:= open], Finished),
    Ended = steps([{end_well, [St]} || {St, #{conn := C}} <- maps:to_list(Streams), is_up(C, S)], Read),
    Closed = steps([{close_connection, [C, Side, 7]}
                    || {C, up} <- maps:to_list(Conns),
                       Side <- lists:sublist([X || X <- [client, server], is_mine({C, X}, S)], 1)], Ended),
    Stopped = steps([{close_listener, [L]} || {L, listener} <- live_listeners(S)], Closed),
    look(Stopped).

steps(Calls, S) ->
    lists:foldl(fun({F, Args}, Before) ->
        Call = call(F, Args),
        try
            Result = apply(?MODULE, F, Args),
            postcondition(Before, Call, Result),
            next_state(Before, Result, Call)
        catch
            error:Why:Stack -> erlang:raise(error, {F, Args, Why}, Stack)
        end
    end, S, Calls).

%%--------------------------------------------------------------------------------------------
%% The calls, each in the owner's process

listen(L, Owner) ->
    know({L, listener}, Owner, in(Owner, fun() -> element(1, macula_quic_lab:listen()) end)).

close_listener(L) -> as({L, listener}, fun macula_quic:close_listener/1).

connect(C, L, Owner, How) ->
    Key = {L, listener},
    [ok = as(Key, fun(Listener) -> macula_quic:async_accept(Listener, #{count => 1}) end) || How =:= armed],
    {ok, {_, Port}} = macula_quic:sockname(handle(Key)),
    {ok, Client} = in(Owner, fun() ->
        macula_quic:connect("127.0.0.1", Port, macula_quic_lab:client_options(), ?PATIENCE)
    end),
    Server = as(Key, fun(Listener) ->
        case How of
            waiting -> {ok, Conn} = macula_quic:accept(Listener, ?PATIENCE), Conn;
            armed -> ?EXPECT({quic, new_conn, Conn, _}, Conn, ?PATIENCE)
        end
    end),
    know({C, client}, Owner, Client),
    know({C, server}, holder(Key), Server).

%% With one byte, by which the peer sees the stream.
open(C, St, Side, Direction, How) ->
    Peer = other(Side),
    [ok = as({C, Peer}, fun(Conn) -> macula_quic:async_accept_stream(Conn) end) || How =:= armed],
    First = data({St, Side}, 0, 1),
    Here = as({C, Side}, fun(Conn) ->
        {ok, Stream} = macula_quic:open_stream(Conn, #{direction => Direction, timeout => ?PATIENCE}),
        ok = macula_quic:send(Stream, First),
        Stream
    end),
    There = as({C, Peer}, fun(Conn) ->
        case How of
            waiting -> {ok, Stream} = macula_quic:accept_stream(Conn, #{}, ?PATIENCE), Stream;
            armed -> ?EXPECT({quic, new_stream, Stream, #{conn := Of}} when Of =:= Conn, Stream, ?PATIENCE)
        end
    end),
    _ = change({sent, {St, Side}}, 1),
    know({St, Side}, holder({C, Side}), Here),
    know({St, Peer}, holder({C, Peer}), There).

send(St, Side, Size, Fin) ->
    Key = {St, Side},
    Sent = known({sent, Key}, 0),
    Data = data(Key, Sent, Size),
    Result = as(Key, fun(Stream) -> macula_quic:send(Stream, Data, #{fin => Fin, timeout => ?PATIENCE}) end),
    [change({sent, Key}, Sent + Size) || Result =:= ok],
    Result.

%% Passive first: what was told before then comes before. Where all has been sent that is wanted, it comes.
recv(St, Side, Len) ->
    Key = {St, Side},
    Left = known({sent, {St, other(Side)}}, 0) - got(Key),
    as(Key, fun(Stream) ->
        _ = macula_quic:setopt(Stream, active, false),
        Told = macula_quic_lab:mailbox(),
        Rest = Left - lists:sum([byte_size(Data) || {quic, Data, Of, _} <- Told, is_binary(Data), Of =:= Stream]),
        Timeout = case Rest > 0 andalso Len =< Rest of true -> ?PATIENCE; false -> 0 end,
        {Told, macula_quic:recv(Stream, Len, Timeout)}
    end).

set_active(St, Side, Mode) ->
    as({St, Side}, fun(Stream) -> _ = macula_quic:setopt(Stream, active, Mode), ok end).

%% Goes on as long as the model says.
read_all(_St, _Side, _Mode) -> ok.

give(Key, To) ->
    Pid = known({owner, To}, none),
    Result = as(Key, fun(Handle) -> macula_quic:controlling_process(Handle, Pid) end),
    _ = change({holder, Key}, To),
    Result.

steal(Key, Thief) ->
    Handle = handle(Key),
    in(Thief, fun() -> macula_quic:controlling_process(Handle, self()) end).

shut(St, Side, Flag, _Wait) ->
    as({St, Side}, fun(Stream) -> macula_quic:async_shutdown_stream(Stream, Flag, 5) end).

close_stream(St, Side, _Wait) -> as({St, Side}, fun macula_quic:close_stream/1).

close_connection(C, Side, Code) ->
    as({C, Side}, fun(Conn) -> macula_quic:close_connection(Conn, Code, <<"bye">>) end).

migrate(C) -> as({C, client}, fun macula_quic:migrate/1).

kill(Owner) ->
    ok = kill_owner(Owner),
    _ = start_owner(Owner),
    ok.

%% Has nothing to do but to wait for the messages.
end_well(_St) -> ok.
