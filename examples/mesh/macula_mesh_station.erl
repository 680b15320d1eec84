%% @doc A station of the mesh: it listens, dials the addresses it is given, and talks over its links.
%%
%% ```
%% {ok, _} = application:ensure_all_started(macula),
%% {ok, _} = macula_mesh_station:start(#{
%%     name => "bravo", key => "bravo.key", port => 4434,
%%     stations => #{AlphaId => "alpha", BravoId => "bravo"},
%%     dial => [#{port => 4433, node_id => AlphaId}]}),
%% {ok, 6, Micros} = macula_mesh_station:call("alpha", <<"mesh.sum">>, [1, 2, 3], 1000).
%% '''
%%
%% One process owns the listener and all links. Nothing it sends may hold it up: a peer that does
%% not read loses what does not fit into its queue, and that is counted.
-module(macula_mesh_station).
-behaviour(gen_server).

-export([start/1, stop/0, view/1, publish/2, call/4, heard/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-define(HOST, {127, 0, 0, 1}).
-define(REALM, <<0:256>>).
-define(TOPICS, [<<"mesh.load">>, <<"mesh.burst">>]).
%% A peer that is killed is noticed after the first, when nothing came although the second asked.
-define(IDLE_MS, 3000).
-define(KEEP_ALIVE_MS, 750).
-define(REDIAL, #{min_delay_ms => 100, max_delay_ms => 800, factor => 2, jitter => 0.3}).
-define(PING_MS, 200).
-define(CHATTER_MS, 500).
-define(DEADLINE_MS, 1000).
%% Round trips that the shown one is the median of.
-define(ROUND_TRIPS, 9).

-type name() :: string().
-type options() :: #{
    name := name(),
    key := file:name_all(),
    port := inet:port_number(),
    %% Who there is; nobody else is let in.
    stations := #{macula_identity:node_id() => name()},
    dial := [#{port := inet:port_number(), node_id := macula_identity:node_id()}]
}.
-type happening() ::
    {linked, name(), client | server}
    | {lost, name(), macula_peering:disconnect_reason()}
    | {redialling, name(), Attempt :: pos_integer(), DelayMs :: non_neg_integer(),
       macula_peering:disconnect_reason()}.
-type view() :: #{
    name := name(),
    %% Round-trip time of PING and PONG in microseconds, once it is known.
    links := #{name() => undefined | non_neg_integer()},
    redialling := #{name() => pos_integer()},
    counts := #{atom() => non_neg_integer()},
    %% With the microsecond (since 1970) of each, oldest first, and where to go on.
    happened := [{integer(), happening()}],
    next := non_neg_integer()
}.
-export_type([options/0, view/0, happening/0, name/0]).

-record(link, {
    peer :: macula_identity:node_id(),
    role :: client | server,
    pings = #{} :: #{binary() => integer()},
    round_trips = [] :: [non_neg_integer()],
    topics = #{} :: #{binary() => true}
}).

-record(call, {
    from :: gen_server:from() | chatter,
    timer :: reference(),
    began :: integer()
}).

-record(state, {
    name :: name(),
    identity :: macula_identity:identity(),
    listener :: pid(),
    stations :: #{macula_identity:node_id() => name()},
    dialers = #{} :: #{pid() => macula_identity:node_id()},
    redialling = #{} :: #{name() => pos_integer()},
    links = #{} :: #{pid() => #link{}},
    %% By the peer: of two links the newer one.
    by_peer = #{} :: #{macula_identity:node_id() => pid()},
    calls = #{} :: #{binary() => #call{}},
    %% Workers of calls from others: to whom the answer goes.
    serving = #{} :: #{reference() => {pid(), binary()}},
    seq = 0 :: non_neg_integer(),
    heard = #{} :: #{binary() => [{name(), non_neg_integer()}]},
    counts = #{} :: #{atom() => non_neg_integer()},
    happened = [] :: [{integer(), happening()}],
    happenings = 0 :: non_neg_integer()
}).

%% @doc Starts the VM's station.
-spec start(options()) -> {ok, pid()} | {error, term()}.
start(Options) ->
    case gen_server:start({local, ?MODULE}, ?MODULE, Options, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

%% @doc Says goodbye to all peers and ends, once they have heard it.
-spec stop() -> ok.
stop() ->
    gen_server:stop(?MODULE, normal, 10000).

%% @doc What there is to see, with what happened from `From' on (0: all).
-spec view(non_neg_integer()) -> view().
view(From) ->
    gen_server:call(?MODULE, {view, From}).

%% @doc Publishes to a topic through one of the peers, each in its turn.
-spec publish(binary(), term()) -> ok | {error, not_linked | macula_peering:send_error()}.
publish(Topic, Payload) ->
    gen_server:call(?MODULE, {publish, Topic, Payload}).

%% @doc Calls a procedure at a peer. `{error, deadline}' comes when it is over, whatever the peer
%% does; `{ok, Result, Micros}' says how long it took.
-spec call(name(), binary(), term(), pos_integer()) ->
    {ok, term(), non_neg_integer()} | {error, deadline | not_linked | {error_frame, term()}}.
call(Peer, Procedure, Payload, DeadlineMs) ->
    gen_server:call(?MODULE, {call, Peer, Procedure, Payload, DeadlineMs}, infinity).

%% @doc Publishers and numbers of the events of a topic, as they came.
-spec heard(binary()) -> [{name(), non_neg_integer()}].
heard(Topic) ->
    gen_server:call(?MODULE, {heard, Topic}).

%%% Beginning and end

-spec init(options()) -> {ok, #state{}} | {stop, term()}.
init(#{name := Name, key := File, port := Port, stations := Stations, dial := Dial}) ->
    process_flag(trap_exit, true),
    {ok, Identity} = macula_identity:load(File),
    Listening = macula_peering:listen(#{
        identity => Identity, address => ?HOST, port => Port, allow => maps:keys(Stations),
        idle_timeout_ms => ?IDLE_MS, keep_alive_interval_ms => ?KEEP_ALIVE_MS,
        verify_frames => require}),
    case Listening of
        {ok, Listener} ->
            every(?PING_MS, ping),
            every(?CHATTER_MS, chatter),
            {ok, #state{name = Name, identity = Identity, listener = Listener, stations = Stations,
                        dialers = maps:from_list([dial(Target, Identity) || Target <- Dial])}};
        {error, Reason} ->
            {stop, Reason}
    end.

%% The node id is pinned: whoever else answers there is refused.
dial(#{port := Port, node_id := NodeId}, Identity) ->
    {ok, Dialer} = macula_peering:connect(#{
        identity => Identity, target => #{host => ?HOST, port => Port, node_id => NodeId,
                                          timeout_ms => ?IDLE_MS},
        reconnect => ?REDIAL, verify_frames => require,
        idle_timeout_ms => ?IDLE_MS, keep_alive_interval_ms => ?KEEP_ALIVE_MS}),
    {Dialer, NodeId}.

every(Ms, What) ->
    _ = erlang:send_after(Ms, self(), {every, Ms, What}),
    ok.

-spec terminate(term(), #state{}) -> ok.
terminate(_, #state{listener = Listener, links = Links, dialers = Dialers}) ->
    ok = macula_peering:close_listener(Listener),
    lists:foreach(fun macula_peering:close/1, maps:keys(Dialers) ++ maps:keys(Links)),
    lists:foreach(fun(Link) ->
        receive {macula_peering, disconnected, Link, _} -> ok end
    end, maps:keys(Links)).

%%% Questions

-spec handle_call(term(), gen_server:from(), #state{}) ->
    {reply, term(), #state{}} | {noreply, #state{}}.
handle_call({view, From}, _, State) ->
    {reply, view(From, State), State};
handle_call({heard, Topic}, _, #state{heard = Heard} = State) ->
    {reply, lists:reverse(maps:get(Topic, Heard, [])), State};
handle_call({publish, Topic, Payload}, _, State) ->
    {Result, Next} = publish(Topic, Payload, State),
    {reply, Result, Next};
handle_call({call, Peer, Procedure, Payload, DeadlineMs}, From,
            #state{stations = Stations} = State) ->
    case [NodeId || {NodeId, Name} <- maps:to_list(Stations), Name =:= Peer] of
        [NodeId] -> call(NodeId, Procedure, Payload, DeadlineMs, From, State);
        [] -> {reply, {error, not_linked}, State}
    end.

-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_, State) ->
    {noreply, State}.

view(From, #state{name = Name, links = Links, redialling = Redialling, counts = Counts,
                  happened = Happened, happenings = N} = State) ->
    #{name => Name,
      links => maps:from_list([{name(Peer, State), median(Trips)}
                               || #link{peer = Peer, round_trips = Trips} <- maps:values(Links)]),
      redialling => Redialling, counts => Counts,
      happened => lists:reverse(lists:sublist(Happened, max(0, N - From))), next => N}.

median([]) -> undefined;
median(Values) -> lists:nth((length(Values) + 1) div 2, lists:sort(Values)).

name(NodeId, #state{stations = Stations}) ->
    maps:get(NodeId, Stations, "stranger").

%%% Events

-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({macula_peering, frame, Link, #{frame_type := Type} = Frame, _Verified},
            #state{links = Links} = State) when is_map_key(Link, Links) ->
    {noreply, frame(Type, Frame, Link, count(frames_in, State))};
handle_info({macula_peering, connected, Link, NodeId}, State) ->
    {noreply, linked(Link, NodeId, State)};
handle_info({macula_peering, disconnected, Link, Reason}, State) ->
    {noreply, lost(Link, Reason, State)};
handle_info({macula_peering, reconnecting, Dialer,
             #{attempt := Attempt, delay_ms := Delay, reason := Reason}},
            #state{dialers = Dialers, redialling = Redialling} = State) ->
    Peer = name(maps:get(Dialer, Dialers), State),
    {noreply, happened({redialling, Peer, Attempt, Delay, Reason},
                       State#state{redialling = Redialling#{Peer => Attempt}})};
handle_info({every, Ms, What}, State) ->
    every(Ms, What),
    {noreply, regularly(What, State)};
handle_info({timeout, Timer, {deadline, Id}}, #state{calls = Calls} = State) ->
    case Calls of
        #{Id := #call{timer = Timer} = Call} ->
            answer(Call, {error, deadline}),
            {noreply, count(deadlines, State#state{calls = maps:remove(Id, Calls)})};
        #{} ->
            {noreply, State}
    end;
handle_info({'DOWN', Worker, process, _, Outcome}, #state{serving = Serving} = State) ->
    case maps:take(Worker, Serving) of
        {To, Rest} -> {noreply, served(Outcome, To, State#state{serving = Rest})};
        error -> {noreply, State}
    end;
handle_info(_, State) ->
    {noreply, State}.

linked(Link, NodeId, #state{links = Links, by_peer = ByPeer, redialling = Redialling} = State) ->
    {ok, #{role := Role}} = macula_peering:peer_info(Link),
    Peer = name(NodeId, State),
    Next = happened({linked, Peer, Role}, State#state{
        links = Links#{Link => #link{peer = NodeId, role = Role}},
        by_peer = ByPeer#{NodeId => Link}, redialling = maps:remove(Peer, Redialling)}),
    lists:foldl(fun(Topic, Acc) ->
        Frame = macula_frame:subscribe(#{topic => Topic, realm => ?REALM,
                                         subscriber => self_id(Acc)}),
        %% This one may not be lost, so it waits: an acceptor's link is held for a moment.
        sent(macula_peering:send_frame(Link, Frame), Acc)
    end, Next, ?TOPICS).

lost(Link, Reason, #state{links = Links, by_peer = ByPeer} = State) ->
    case maps:take(Link, Links) of
        {#link{peer = NodeId}, Rest} ->
            Left = case ByPeer of
                #{NodeId := Link} -> maps:remove(NodeId, ByPeer);
                #{} -> ByPeer
            end,
            happened({lost, name(NodeId, State), Reason},
                     State#state{links = Rest, by_peer = Left});
        error ->
            %% An attempt that led to nothing; the dialer says so, too, and why.
            count(attempts_failed, State)
    end.

%%% Frames

frame(ping, #{nonce := Nonce}, Link, State) ->
    send(Link, macula_frame:pong(#{nonce => Nonce}), count(pings, State));
frame(pong, #{nonce := Nonce}, Pid, #state{links = Links} = State) ->
    #{Pid := #link{pings = Pings, round_trips = Trips} = Link} = Links,
    case maps:take(Nonce, Pings) of
        {Sent, Rest} ->
            Took = now_us() - Sent,
            Kept = lists:sublist([Took | Trips], ?ROUND_TRIPS),
            count(pongs, State#state{
                links = Links#{Pid := Link#link{pings = Rest, round_trips = Kept}}});
        error ->
            State
    end;
frame(subscribe, #{topic := Topic}, Pid, #state{links = Links} = State) ->
    #{Pid := #link{topics = Topics} = Link} = Links,
    State#state{links = Links#{Pid := Link#link{topics = Topics#{Topic => true}}}};
frame(publish, Frame, _, State) ->
    fan_out(Frame, State);
frame(event, Frame, _, State) ->
    event(Frame, State);
frame(call, Frame, Link, State) ->
    serve(Frame, Link, State);
frame(result, #{call_id := Id, payload := Payload}, _, State) ->
    called(Id, {ok, Payload}, State);
frame(error, #{call_id := Id, name := Name}, _, State) ->
    called(Id, {error, {error_frame, Name}}, State);
frame(_, _, _, State) ->
    State.

%% Whoever gets a PUBLISH passes it on to all who have subscribed, but not to its author. The
%% author's signature on it (`publisher_sig') goes along, and those who get it check that.
fan_out(#{publisher := Publisher, topic := Topic} = Publication, #state{links = Links} = State) ->
    Event = macula_frame:event((maps:with([topic, realm, publisher, seq, payload, publisher_sig],
                                          Publication))#{delivered_via => direct}),
    To = [Pid || {Pid, #link{peer = Peer, topics = Topics}} <- maps:to_list(Links),
                 Peer =/= Publisher, is_map_key(Topic, Topics)],
    event(Event, lists:foldl(fun(Link, Acc) -> send(Link, Event, Acc) end,
                             count(fanned_out, State), To)).

event(#{publisher := Publisher, topic := Topic, seq := Seq} = Event,
      #state{heard = Heard} = State) ->
    case macula_frame:verify_publisher(Event) of
        {ok, _} when Topic =:= <<"mesh.burst">> ->
            Entry = {name(Publisher, State), Seq},
            Known = maps:get(Topic, Heard, []),
            count(events, State#state{heard = Heard#{Topic => [Entry | Known]}});
        {ok, _} -> count(events, State);
        {error, _} -> count(forged, State)
    end.

publish(Topic, Payload, #state{identity = Identity, by_peer = ByPeer, seq = Seq} = State) ->
    case maps:values(ByPeer) of
        [] ->
            {{error, not_linked}, State};
        Links ->
            Link = lists:nth(Seq rem length(Links) + 1, Links),
            Frame = macula_frame:sign_publisher(macula_frame:publish(#{
                topic => Topic, realm => ?REALM, publisher => self_id(State), seq => Seq,
                payload => Payload, published_at_ms => erlang:system_time(millisecond)}), Identity),
            case macula_peering:send_frame(Link, Frame, #{timeout => 0}) of
                ok -> {ok, count(published, count(frames_out, State#state{seq = Seq + 1}))};
                {error, Reason} -> {{error, Reason}, count(dropped, State)}
            end
    end.

%%% Calls

call(NodeId, Procedure, Payload, DeadlineMs, From,
     #state{by_peer = ByPeer, calls = Calls} = State) ->
    case ByPeer of
        #{NodeId := Link} ->
            Id = crypto:strong_rand_bytes(16),
            Frame = macula_frame:call(#{
                call_id => Id, procedure => Procedure, realm => ?REALM, payload => Payload,
                caller => self_id(State),
                deadline_ms => erlang:system_time(millisecond) + DeadlineMs}),
            Timer = erlang:start_timer(DeadlineMs, self(), {deadline, Id}),
            Call = #call{from = From, timer = Timer, began = now_us()},
            {noreply, send(Link, Frame, State#state{calls = Calls#{Id => Call}})};
        #{} ->
            answer(#call{from = From, timer = make_ref(), began = 0}, {error, not_linked}),
            {noreply, State}
    end.

called(Id, Outcome, #state{calls = Calls} = State) ->
    case maps:take(Id, Calls) of
        {#call{timer = Timer, began = Began} = Call, Rest} ->
            _ = erlang:cancel_timer(Timer),
            answer(Call, case Outcome of
                {ok, Payload} -> {ok, Payload, now_us() - Began};
                Error -> Error
            end),
            count(answered, State#state{calls = Rest});
        error ->
            %% Nobody waits for it any more.
            count(late, State)
    end.

answer(#call{from = chatter}, _) -> ok;
answer(#call{from = From}, Answer) -> gen_server:reply(From, Answer).

%% Each call in a process of its own, which does not outlive the deadline: then nobody listens.
serve(#{call_id := Id, deadline_ms := Deadline, procedure := Procedure, payload := Payload}, Link,
      #state{serving = Serving, name = Name} = State) ->
    Left = Deadline - erlang:system_time(millisecond),
    {Pid, Ref} = spawn_monitor(fun() -> exit({done, procedure(Procedure, Payload, Name)}) end),
    {ok, _} = timer:kill_after(max(0, Left), Pid),
    State#state{serving = Serving#{Ref => {Link, Id}}}.

procedure(<<"mesh.name">>, _, Name) -> {ok, {text, list_to_binary(Name)}};
procedure(<<"mesh.sum">>, Numbers, _) when is_list(Numbers) -> {ok, lists:sum(Numbers)};
procedure(<<"mesh.wait">>, Ms, _) when is_integer(Ms), Ms >= 0 -> {ok, receive after Ms -> Ms end};
procedure(_, _, _) -> {error, unknown_error}.

served({done, {ok, Payload}}, {Link, Id}, State) ->
    send(Link, macula_frame:result(#{call_id => Id, payload => Payload,
                                     responded_by => self_id(State)}), count(served, State));
served(killed, _, State) ->
    count(given_up, State);
served(Failure, {Link, Id}, State) ->
    Name = case Failure of
        {done, {error, Known}} -> Known;
        _ -> unknown_error
    end,
    send(Link, macula_frame:error(#{call_id => Id, name => Name, reported_by => self_id(State)}),
         count(served, State)).

%%% What is always going on

regularly(ping, #state{links = Links} = State) ->
    maps:fold(fun(Pid, _, Acc) -> ping(Pid, Acc) end, State, Links);
regularly(chatter, #state{by_peer = ByPeer} = State) ->
    {_, Next} = publish(<<"mesh.load">>, #{processes => erlang:system_info(process_count)}, State),
    case maps:keys(ByPeer) of
        [] -> Next;
        Peers ->
            Peer = lists:nth(rand:uniform(length(Peers)), Peers),
            {noreply, Called} = call(Peer, <<"mesh.name">>, undefined, ?DEADLINE_MS, chatter, Next),
            Called
    end.

%% What was never answered is forgotten, as its number is bounded.
ping(Pid, #state{links = Links} = State) ->
    #{Pid := #link{pings = Pings} = Link} = Links,
    Nonce = crypto:strong_rand_bytes(16),
    Kept = case map_size(Pings) > 32 of true -> #{}; false -> Pings end,
    Waiting = State#state{links = Links#{Pid := Link#link{pings = Kept#{Nonce => now_us()}}}},
    send(Pid, macula_frame:ping(#{nonce => Nonce}), Waiting).

send(Link, Frame, State) ->
    sent(macula_peering:send_frame(Link, Frame, #{timeout => 0}), State).

sent(ok, State) -> count(frames_out, State);
sent({error, _}, State) -> count(dropped, State).

self_id(#state{identity = Identity}) -> macula_identity:public(Identity).

count(What, #state{counts = Counts} = State) ->
    State#state{counts = maps:update_with(What, fun(N) -> N + 1 end, 1, Counts)}.

happened(What, #state{happened = Happened, happenings = N} = State) ->
    State#state{happened = [{os:system_time(microsecond), What} | Happened], happenings = N + 1}.

now_us() ->
    erlang:monotonic_time(microsecond).
