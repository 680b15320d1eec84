%% @doc A network in one process: a UDP relay that loses, doubles, delays, reorders, throttles and cuts.
%%
%% Tests of QUIC need a bad network and the kernels they run on have no `netem'. The relay listens
%% on a port of its own; each client address that sends to it gets an own socket towards the
%% target, as behind a NAT, and the target's answers go back the same way.
%%
%% ```
%% {ok, R} = macula_relay:start_link(#{target => {{127,0,0,1}, 4433}, loss => 0.01, delay_ms => 10}),
%% {ok, C} = macula_quic:connect("127.0.0.1", macula_relay:port(R), Opts, 5000),
%% ok = macula_relay:set(R, #{blackhole => true}).
%% '''
%%
%% Options, all but `target' with a default and all but `listen' and `seed' changeable by
%% {@link set/2}:
%% <ul>
%% <li>`target': `{Ip, Port}' that datagrams go to.</li>
%% <li>`listen': `{Ip, Port}' to listen on; default loopback of the target's family, port 0.</li>
%% <li>`loss': the part of datagrams that vanishes, `0.0' to `1.0'; default 0.</li>
%% <li>`duplicate': the part of datagrams that goes on twice, `0.0' to `1.0'; default 0. Each of the two
%%     takes its own place in the queue, and its own time.</li>
%% <li>`delay_ms': one-way delay in milliseconds; default 0. Late by up to 1 ms, never early, and
%%     in order unless there is jitter.</li>
%% <li>`jitter_ms': each datagram takes a time of its own in addition, evenly spread from 0 to so many
%%     milliseconds; default 0. Datagrams overtake one another by it.</li>
%% <li>`rate': bytes per second, or `infinity' (default); of each client and direction by itself.</li>
%% <li>`queue': bytes that may wait for `rate' before the tail is dropped; default 500,000.</li>
%% <li>`largest': bytes of the largest datagram that passes, larger ones vanish; default 65536.</li>
%% <li>`blackhole': `true' drops all, also what is under way; default `false'.</li>
%% <li>`up', `down': a map with any of the eight above for that direction only (up is towards the
%%     target).</li>
%% <li>`seed': an integer; the same seed loses, doubles and delays the same datagrams of the same traffic.</li>
%% </ul>
-module(macula_relay).
-behaviour(gen_server).

-export([start_link/1, port/1, set/2, stats/1, rebind/1, stop/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([options/0, direction_options/0, stats/0]).

%% Datagrams the kernel may hand over before we ask for more: bounds the mailbox.
-define(ACTIVE, 500).
-define(BUFFER, 4 * 1024 * 1024).
-define(MAX_DATAGRAM, 65536).

-type address() :: {inet:ip_address(), inet:port_number()}.
-type direction_options() :: #{
    loss => number(), duplicate => number(), delay_ms => non_neg_integer(),
    jitter_ms => non_neg_integer(), rate => pos_integer() | infinity,
    queue => non_neg_integer(), largest => pos_integer(), blackhole => boolean()}.
-type options() :: #{
    target := address(), listen => address(), seed => integer(),
    up => direction_options(), down => direction_options(),
    loss => number(), duplicate => number(), delay_ms => non_neg_integer(),
    jitter_ms => non_neg_integer(), rate => pos_integer() | infinity,
    queue => non_neg_integer(), largest => pos_integer(), blackhole => boolean()}.
-type counts() :: #{
    received := non_neg_integer(), forwarded := non_neg_integer(), bytes := non_neg_integer(),
    lost := non_neg_integer(), duplicated := non_neg_integer(),
    queue_dropped := non_neg_integer(), blackholed := non_neg_integer(), send_errors := non_neg_integer()}.
%% `bytes' counts what was forwarded.
-type stats() :: #{up := counts(), down := counts(), clients := non_neg_integer()}.

%% One direction of one client: what waits, and when the line is free again (microseconds).
-record(lane, {
    %% By the time at which each is due; a number keeps those of the same time in order.
    waiting = gb_trees:empty() :: gb_trees:tree({integer(), non_neg_integer()}, binary()),
    number = 0 :: non_neg_integer(),
    %% Monotonic time is negative: zero would be far in the future.
    free_at :: integer(),
    %% Of what came last, without its jitter.
    last_due :: integer(),
    %% When it fires, in milliseconds.
    timer = undefined :: undefined | {integer(), reference()}
}).

-record(client, {
    address :: address(),
    socket :: gen_udp:socket(),
    up :: #lane{},
    down :: #lane{}
}).

-record(state, {
    socket :: gen_udp:socket(),
    family :: inet | inet6,
    target :: address(),
    up :: direction_options(),
    down :: direction_options(),
    random :: rand:state(),
    clients = #{} :: #{address() => #client{}},
    by_socket = #{} :: #{gen_udp:socket() => address()},
    stats :: #{up := counts(), down := counts()}
}).

%% API

-spec start_link(options()) -> {ok, pid()} | {error, term()}.
start_link(Options) ->
    case check(Options, [target, listen, seed]) of
        ok when is_map_key(target, Options) ->
            gen_server:start_link(?MODULE, Options,
                                  [{spawn_opt, [{message_queue_data, off_heap}, {priority, high}]}]);
        ok ->
            {error, {bad_option, target, missing}};
        {error, _} = Error ->
            Error
    end.

%% @doc The port that clients send to.
-spec port(pid()) -> inet:port_number().
port(Relay) ->
    gen_server:call(Relay, port).

%% @doc Changes the network from now on; datagrams that wait keep the time they were given.
-spec set(pid(), map()) -> ok | {error, {bad_option, term(), term()}}.
set(Relay, Options) ->
    case check(Options, [target]) of
        ok -> gen_server:call(Relay, {set, Options});
        {error, _} = Error -> Error
    end.

-spec stats(pid()) -> stats().
stats(Relay) ->
    gen_server:call(Relay, stats).

%% @doc Gives every client a new port towards the target, as a NAT does that forgot them. Answers to
%% the old port are lost.
-spec rebind(pid()) -> ok.
rebind(Relay) ->
    gen_server:call(Relay, rebind).

-spec stop(pid()) -> ok.
stop(Relay) ->
    gen_server:stop(Relay).

%% gen_server

%% @private
init(#{target := {TargetIp, _} = Target} = Options) ->
    Family = family(TargetIp),
    {Ip, Port} = maps:get(listen, Options, {loopback(Family), 0}),
    case open(Family, Ip, Port) of
        {ok, Socket} ->
            Default = #{loss => 0, duplicate => 0, delay_ms => 0, jitter_ms => 0, rate => infinity,
                        queue => 500000, largest => ?MAX_DATAGRAM, blackhole => false},
            Seed = maps:get(seed, Options, erlang:unique_integer()),
            Zero = #{received => 0, forwarded => 0, bytes => 0, lost => 0, duplicated => 0,
                     queue_dropped => 0, blackholed => 0, send_errors => 0},
            {ok, apply_options(Options, #state{
                socket = Socket, family = Family, target = Target, up = Default, down = Default,
                random = rand:seed_s(exsss, Seed), stats = #{up => Zero, down => Zero}})};
        {error, Reason} ->
            {stop, Reason}
    end.

%% @private
handle_call(port, _From, State) ->
    {ok, Port} = inet:port(State#state.socket),
    {reply, Port, State};
handle_call({set, Options}, _From, State) ->
    {reply, ok, apply_options(Options, State)};
handle_call(stats, _From, #state{stats = Stats, clients = Clients} = State) ->
    {reply, Stats#{clients => map_size(Clients)}, State};
handle_call(rebind, _From, #state{clients = Clients} = State) ->
    %% All new sockets before any old one goes, else the kernel may hand out the same port again.
    Moved = maps:map(fun(_, Client) -> Client#client{socket = upstream(State)} end, Clients),
    ok = maps:foreach(fun(_, #client{socket = Old}) -> gen_udp:close(Old) end, Clients),
    BySocket = maps:fold(fun(Address, #client{socket = S}, Acc) -> Acc#{S => Address} end, #{}, Moved),
    {reply, ok, State#state{clients = Moved, by_socket = BySocket}}.

%% @private
handle_cast(_Request, State) ->
    {noreply, State}.

%% @private
handle_info({udp, Socket, Ip, Port, Data}, #state{socket = Socket} = State) ->
    {Client, State1} = client({Ip, Port}, State),
    {noreply, enter(up, Client, Data, State1)};
handle_info({udp, Socket, Ip, Port, Data}, #state{target = Target, by_socket = BySocket} = State) ->
    case BySocket of
        #{Socket := Address} when {Ip, Port} =:= Target ->
            {noreply, enter(down, maps:get(Address, State#state.clients), Data, State)};
        _ ->
            %% A stranger, or a socket from before a rebind.
            {noreply, State}
    end;
handle_info({udp_passive, Socket}, State) ->
    %% Fails only for a socket that a rebind has closed meanwhile.
    _ = inet:setopts(Socket, [{active, ?ACTIVE}]),
    {noreply, State};
handle_info({timeout, Timer, {Direction, Address}}, #state{clients = Clients} = State) ->
    Client = maps:get(Address, Clients),
    case lane(Direction, Client) of
        #lane{timer = {_, Timer}} = Lane ->
            {Lane1, State1} = flush(Direction, Client, Lane#lane{timer = undefined}, State),
            {noreply, put_lane(Direction, Client, Lane1, State1)};
        _ ->
            {noreply, State}
    end;
handle_info(_Other, State) ->
    {noreply, State}.

%% @private
terminate(_Reason, #state{socket = Socket, clients = Clients}) ->
    maps:foreach(fun(_, #client{socket = S}) -> gen_udp:close(S) end, Clients),
    gen_udp:close(Socket).

%% Sockets

open(Family, Ip, Port) ->
    gen_udp:open(Port, [Family, binary, {ip, Ip}, {active, ?ACTIVE}, {recbuf, ?BUFFER},
                        {sndbuf, ?BUFFER}, {buffer, ?MAX_DATAGRAM}, {read_packets, 50}]).

upstream(#state{family = Family, target = {TargetIp, _}}) ->
    Ip = case TargetIp of
        {127, _, _, _} -> loopback(inet);
        {0, 0, 0, 0, 0, 0, 0, 1} -> loopback(inet6);
        _ when Family =:= inet -> {0, 0, 0, 0};
        _ -> {0, 0, 0, 0, 0, 0, 0, 0}
    end,
    {ok, Socket} = open(Family, Ip, 0),
    Socket.

family(Ip) when tuple_size(Ip) =:= 4 -> inet;
family(Ip) when tuple_size(Ip) =:= 8 -> inet6.

loopback(inet) -> {127, 0, 0, 1};
loopback(inet6) -> {0, 0, 0, 0, 0, 0, 0, 1}.

client(Address, #state{clients = Clients, by_socket = BySocket} = State) ->
    case Clients of
        #{Address := Client} ->
            {Client, State};
        _ ->
            Socket = upstream(State),
            Now = now_us(),
            Lane = #lane{free_at = Now, last_due = Now},
            Client = #client{address = Address, socket = Socket, up = Lane, down = Lane},
            {Client, State#state{clients = Clients#{Address => Client},
                                 by_socket = BySocket#{Socket => Address}}}
    end.

%% The way of one datagram

enter(Direction, #client{address = Address} = Client, Data, State0) ->
    #{loss := Loss, duplicate := Duplicate, largest := Largest, blackhole := Blackhole} =
        options(Direction, State0),
    State1 = count(Direction, received, 1, State0),
    {Lost, State2} = chance(Loss, State1),
    if
        byte_size(Data) > Largest -> count(Direction, lost, 1, State2);
        Blackhole -> count(Direction, blackholed, 1, State2);
        Lost -> count(Direction, lost, 1, State2);
        true ->
            {Twice, State3} = chance(Duplicate, State2),
            State4 = admit(Direction, Client, Data, State3),
            case Twice of
                true ->
                    State5 = count(Direction, duplicated, 1, State4),
                    admit(Direction, maps:get(Address, State5#state.clients), Data, State5);
                false ->
                    State4
            end
    end.

chance(Part, State) when Part == 0 ->
    {false, State};
chance(Part, #state{random = Random0} = State) ->
    {Throw, Random} = rand:uniform_s(Random0),
    {Throw < Part, State#state{random = Random}}.

admit(Direction, Client, Data, State) ->
    Lane = lane(Direction, Client),
    #{delay_ms := Delay, jitter_ms := Jitter, rate := Rate} = Options = options(Direction, State),
    case gb_trees:is_empty(Lane#lane.waiting) of
        true when Delay =:= 0, Jitter =:= 0, Rate =:= infinity ->
            transmit(Direction, Client, Data, State);
        _ ->
            Now = now_us(),
            Waiting = max(0, Lane#lane.free_at - Now),
            case fits(Waiting, Options) of
                false ->
                    count(Direction, queue_dropped, 1, State);
                true ->
                    FreeAt = Now + Waiting + line_time(byte_size(Data), Rate),
                    %% A shorter delay set meanwhile must not let it overtake.
                    Due = max(FreeAt + Delay * 1000, Lane#lane.last_due),
                    {More, State1} = jitter(Jitter, State),
                    Number = Lane#lane.number,
                    In = gb_trees:insert({Due + More, Number}, Data, Lane#lane.waiting),
                    Lane1 = Lane#lane{waiting = In, number = Number + 1, free_at = FreeAt,
                                      last_due = Due},
                    put_lane(Direction, Client, arm(Direction, Client, Lane1), State1)
            end
    end.

%% Microseconds.
jitter(0, State) ->
    {0, State};
jitter(Millis, #state{random = Random0} = State) ->
    {Micros, Random} = rand:uniform_s(Millis * 1000 + 1, Random0),
    {Micros - 1, State#state{random = Random}}.

%% One datagram always fits an idle line, however small the queue.
fits(0, _) -> true;
fits(_, #{rate := infinity}) -> true;
fits(Waiting, #{rate := Rate, queue := Queue}) -> Waiting * Rate div 1000000 =< Queue.

line_time(_Size, infinity) -> 0;
line_time(Size, Rate) -> Size * 1000000 div Rate.

%% One timer, for what is due first.
arm(Direction, #client{address = Address}, #lane{waiting = Waiting} = Lane) ->
    case gb_trees:is_empty(Waiting) of
        true ->
            Lane;
        false ->
            {{Due, _}, _} = gb_trees:smallest(Waiting),
            %% Rounded up (`div' would round a negative time the other way).
            DueMs = erlang:convert_time_unit(Due + 999, microsecond, millisecond),
            start_timer(DueMs, {Direction, Address}, Lane)
    end.

start_timer(DueMs, _Message, #lane{timer = {Armed, _}} = Lane) when Armed =< DueMs ->
    Lane;
start_timer(DueMs, Message, #lane{timer = Armed} = Lane) ->
    %% Its message may wait already, and is then another's no more.
    _ = [erlang:cancel_timer(Later) || {_, Later} <- [Armed]],
    Timer = erlang:start_timer(DueMs, self(), Message, [{abs, true}]),
    Lane#lane{timer = {DueMs, Timer}}.

flush(Direction, Client, Lane, State) ->
    flush(Direction, Client, Lane, now_us(), State).

flush(Direction, Client, #lane{waiting = Waiting} = Lane, Now, State) ->
    case gb_trees:is_empty(Waiting) orelse gb_trees:smallest(Waiting) of
        {{Due, _}, Data} when Due =< Now ->
            {_, _, Rest} = gb_trees:take_smallest(Waiting),
            State1 = case options(Direction, State) of
                #{blackhole := true} -> count(Direction, blackholed, 1, State);
                _ -> transmit(Direction, Client, Data, State)
            end,
            flush(Direction, Client, Lane#lane{waiting = Rest}, Now, State1);
        _ ->
            {arm(Direction, Client, Lane), State}
    end.

transmit(Direction, Client, Data, #state{stats = Stats} = State) ->
    Result = case Direction of
        up ->
            {Ip, Port} = State#state.target,
            gen_udp:send(Client#client.socket, Ip, Port, Data);
        down ->
            {Ip, Port} = Client#client.address,
            gen_udp:send(State#state.socket, Ip, Port, Data)
    end,
    case Result of
        ok ->
            #{Direction := #{forwarded := Forwarded, bytes := Bytes} = Counts} = Stats,
            State#state{stats = Stats#{Direction := Counts#{
                forwarded := Forwarded + 1, bytes := Bytes + byte_size(Data)}}};
        {error, _} ->
            count(Direction, send_errors, 1, State)
    end.

%% Small helpers

now_us() ->
    erlang:monotonic_time(microsecond).

options(up, #state{up = Up}) -> Up;
options(down, #state{down = Down}) -> Down.

lane(up, #client{up = Up}) -> Up;
lane(down, #client{down = Down}) -> Down.

put_lane(up, Client, Lane, State) -> put_client(Client#client{up = Lane}, State);
put_lane(down, Client, Lane, State) -> put_client(Client#client{down = Lane}, State).

put_client(#client{address = Address} = Client, #state{clients = Clients} = State) ->
    State#state{clients = Clients#{Address => Client}}.

count(Direction, Key, N, #state{stats = Stats} = State) ->
    #{Direction := #{Key := Old} = Counts} = Stats,
    State#state{stats = Stats#{Direction := Counts#{Key := Old + N}}}.

apply_options(Options, #state{up = Up, down = Down} = State) ->
    Both = maps:with([loss, duplicate, delay_ms, jitter_ms, rate, queue, largest, blackhole], Options),
    State#state{
        target = maps:get(target, Options, State#state.target),
        up = maps:merge(maps:merge(Up, Both), maps:get(up, Options, #{})),
        down = maps:merge(maps:merge(Down, Both), maps:get(down, Options, #{}))}.

check(Options, Extra) when is_map(Options) ->
    check_all(maps:to_list(Options), Extra);
check(Options, _Extra) ->
    {error, {bad_option, Options, not_a_map}}.

check_all([], _Extra) ->
    ok;
check_all([{Key, Value} | Rest], Extra) ->
    case option(Key, Value, Extra) of
        true -> check_all(Rest, Extra);
        false -> {error, {bad_option, Key, Value}}
    end.

option(Key, V, _) when Key =:= loss; Key =:= duplicate -> is_number(V) andalso V >= 0 andalso V =< 1;
option(Key, V, _) when Key =:= delay_ms; Key =:= jitter_ms -> is_integer(V) andalso V >= 0;
option(rate, V, _) -> V =:= infinity orelse (is_integer(V) andalso V > 0);
option(queue, V, _) -> is_integer(V) andalso V >= 0;
option(largest, V, _) -> is_integer(V) andalso V > 0;
option(blackhole, V, _) -> is_boolean(V);
option(Key, V, [_ | _]) when Key =:= up; Key =:= down -> check(V, []) =:= ok;
option(seed, V, Extra) -> lists:member(seed, Extra) andalso is_integer(V);
option(Key, {Ip, Port}, Extra) when Key =:= target; Key =:= listen ->
    lists:member(Key, Extra) andalso inet:is_ip_address(Ip)
        andalso is_integer(Port) andalso Port =< 65535
        andalso (Port > 0 orelse (Key =:= listen andalso Port =:= 0));
option(_, _, _) -> false.
