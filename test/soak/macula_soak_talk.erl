%% @doc The conversation of peers, fuzzed in bulk: any bytes, in any order, cut anywhere, over real
%% connections, to the acceptor's and to the dialler's side of it.
%%
%% An input is one piece of bytes that a worker took up while its conversation was open. The VM
%% counts them itself, at the function that takes them (a call count, which the workers do not
%% notice): what was sent into a conversation that was over, or came together with its neighbour in
%% one read, counts for nothing, or for one.
%%
%% Every worker must tell of its end once, with a reason that the documentation lists, and none
%% may fail. At the end nothing may be left: no process, no handle, no atom, no megabyte.
-module(macula_soak_talk).

-export([main/1, run/1]).

%% What takes up bytes in the handshake and in the conversation.
-define(INPUT, {macula_peering_conn, add, 2}).
%% The part of them that is taken up before the peer is known.
-define(UNKNOWN, {macula_peering_conn, handshake, 1}).
%% Conversations of one feeder, which it serves by turns: the pieces of one are then apart.
-define(OPEN, 24).
-define(WAIT, 10000).
-define(SAY_MS, 30000).

%% @doc Arguments: inputs, minutes at most.
-spec main([string()]) -> no_return().
main([Inputs, Minutes]) ->
    Seed = list_to_integer(os:getenv("MACULA_TALK_SEED", integer_to_list(os:system_time(second)))),
    io:format("talk: ~s inputs, MACULA_TALK_SEED=~b~n", [Inputs, Seed]),
    %% Of workers that are killed the supervisor says so each time; how others end is looked at.
    ok = logger:set_primary_config(level, none),
    try
        #{inputs := Done} = run(#{inputs => list_to_integer(Inputs), seed => Seed,
                                  minutes => list_to_integer(Minutes)}),
        io:format("talk: ok, ~b inputs~n", [Done]),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format(standard_error, "talk: FAILED: ~tp~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

%% @doc Feeds until so many inputs were taken up, or the time is over.
-spec run(#{inputs := pos_integer(), seed := integer(), minutes := pos_integer()}) -> map().
run(#{inputs := Inputs, seed := Seed, minutes := Minutes}) ->
    {ok, _} = application:ensure_all_started(macula),
    %% What is made once is made before the count: code, atoms, allocators' first blocks.
    Objects = macula_nif:live_objects(),
    ok = feed(warm_up, 20000, Seed, 1),
    settled(Objects),
    Snapshot = macula_test_nodes:snapshot(),
    Atoms = erlang:system_info(atom_count),
    Resident = resident_mb(),
    ok = feed(talk, Inputs, Seed + 1, Minutes),
    Done = count(?INPUT),
    Unknown = count(?UNKNOWN),
    settled(Objects),
    ok = macula_test_nodes:await_no_leak(Snapshot),
    case erlang:system_info(atom_count) of
        Atoms -> ok;
        More -> error({atoms, [atom(N) || N <- lists:seq(Atoms, More - 1)]})
    end,
    io:format("talk: ~b inputs, of these ~b before the peer was known; ~b MB resident before, ~b "
              "after; no process, handle, file or atom more~n",
              [Done, Unknown, Resident, resident_mb()]),
    #{inputs => Done, before_known => Unknown, resident_mb => {Resident, resident_mb()}}.

%% An atom by its place in the table.
atom(N) ->
    binary_to_term(<<131, 75, N:24>>).

feed(Name, Inputs, Seed, Minutes) ->
    {module, _} = code:ensure_loaded(macula_peering_conn),
    _ = [1 = erlang:trace_pattern(F, true, [local, call_count]) || F <- [?INPUT, ?UNKNOWN]],
    Self = self(),
    Feeders = [spawn_monitor(fun() -> feeder(Self, Kind, Variant, Seed * 100 + Variant) end)
               || Variant <- lists:seq(1, 2 * erlang:system_info(schedulers_online)),
                  Kind <- [dialler, station]],
    Deadline = now_ms() + Minutes * 60000,
    ok = watch(Name, Inputs, Feeders, now_ms(), Deadline),
    _ = [Pid ! stop || {Pid, _} <- Feeders],
    Said = [receive
        {'DOWN', Ref, process, Pid, {talked, N, Ends}} -> {N, Ends};
        {'DOWN', Ref, process, Pid, Why} -> error({feeder_failed, Why})
    after 60000 -> error({feeder_stuck, process_info(Pid, [current_stacktrace, messages])})
    end || {Pid, Ref} <- Feeders],
    Ends = lists:foldl(fun({_, E}, Acc) ->
        maps:merge_with(fun(_, A, B) -> A + B end, E, Acc)
    end, #{}, Said),
    io:format("talk: ~b conversations, which ended:~n~ts", [
        lists:sum([N || {N, _} <- Said]),
        [io_lib:format("  ~8b ~tp~n", [N, Reason]) || {Reason, N} <- maps:to_list(Ends)]]).

watch(Name, Inputs, Feeders, Said, Deadline) ->
    receive
        {'DOWN', _, process, Pid, Why} -> error({feeder_failed, Pid, Why})
    after 200 ->
        Done = count(?INPUT),
        case now_ms() of
            _ when Done >= Inputs -> ok;
            Now when Now >= Deadline, Name =:= talk -> ok;
            Now when Now - Said >= ?SAY_MS ->
                io:format("talk: ~b inputs, ~b before the peer was known, ~b atoms, ~b MB resident, "
                          "~b of them the VM's~n",
                          [Done, count(?UNKNOWN), erlang:system_info(atom_count), resident_mb(),
                           erlang:memory(total) div 1000000]),
                watch(Name, Inputs, Feeders, Now, Deadline);
            _ ->
                watch(Name, Inputs, Feeders, Said, Deadline)
        end
    end.

count(Function) ->
    {call_count, N} = erlang:trace_info(Function, call_count),
    N.

settled(Objects) ->
    macula_test_nodes:wait_until(fun() ->
        Left = supervisor:count_children(macula_peering_conn_sup),
        proplists:get_value(active, Left) =:= 0 orelse Left
    end, 30000),
    _ = sys:get_state(macula_peering_links),
    [] = macula_peering:peers(),
    ok = macula_test_nodes:wait_until(fun() ->
        _ = [erlang:garbage_collect(P) || P <- processes()],
        Now = macula_nif:live_objects(),
        Now =:= Objects orelse {Now, Objects}
    end).

resident_mb() ->
    {ok, Statm} = file:read_file("/proc/self/statm"),
    binary_to_integer(lists:nth(2, binary:split(Statm, <<" ">>, [global]))) * 4 div 1024.

now_ms() ->
    erlang:monotonic_time(millisecond).

%%% A feeder: some conversations, each fed by turns

feeder(Parent, Role, Variant, Seed) ->
    _ = rand:seed(exsss, Seed),
    process_flag(message_queue_data, off_heap),
    Monitor = monitor(process, Parent),
    Id = identity(),
    Side = side(Role, Variant, Id),
    Pool = pool(Id),
    Talks = [begin_talk(Side, Pool) || _ <- lists:seq(1, ?OPEN)],
    N = turns(Talks, Side#{monitor => Monitor}, Pool, ?OPEN),
    exit({talked, N, maps:from_list([{Kind, Count} || {{ends, Kind}, Count} <- get()])}).

%% The acceptor is fuzzed by diallers of bare QUIC, the dialler by a station of bare QUIC.
side(dialler, Variant, Id) ->
    Server = identity(),
    {ok, L} = macula_peering:listen(maps:merge(options(Variant), #{
        identity => Server, port => 0, address => {127, 0, 0, 1}, replay_cache => false})),
    {ok, {_, Port}} = macula_peering:sockname(L),
    Diallers = [Id | [identity() || _ <- lists:seq(2, 2 * ?OPEN)]],
    #{kind => dialler, listener => L, port => Port, pin => macula_identity:public(Server),
      first => list_to_tuple([signed(macula_frame:connect(#{
          node_id => macula_identity:public(I)}), I) || I <- Diallers])};
side(station, Variant, Id) ->
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(
        macula_identity:public(Id), macula_identity:seed(Id), []),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, [{cert, Cert}, {key, Key}]),
    {ok, {_, Port}} = macula_quic:sockname(L),
    Options = maps:without([duplicates, puzzle_bits, hello_gap_ms, allow, freshness_ms],
                           options(Variant)),
    #{kind => station, listener => L, port => Port,
      connect => Options#{identity => identity(),
                          target => #{host => {127, 0, 0, 1}, port => Port,
                                      node_id => macula_identity:public(Id)}},
      first => {signed(macula_frame:hello(#{node_id => macula_identity:public(Id), accepted => true,
                                            negotiated_capabilities => 0}), Id)}}.

options(Variant) ->
    %% A farewell of QUIC may be lost, as any packet; then it takes the idle timeout.
    Common = #{drain_timeout_ms => 100, handshake_timeout_ms => 3000, duplicates => allow,
               idle_timeout_ms => 8000, keep_alive_interval_ms => 2000},
    maps:merge(Common, case Variant rem 4 of
        1 -> #{};
        2 -> #{verify_frames => #{default => require, rpc => report}, active => 3};
        3 -> #{verify_frames => report, text => existing, allow => fun(_) -> true end};
        0 -> #{unknown_types => drop, dedicated_streams => refuse, duplicates => newest,
               hello_gap_ms => 0, max_frame => 60000}
    end).

identity() ->
    {ok, Id} = macula_identity:generate(#{puzzle_bits => 0}),
    Id.

signed(Frame, Id) ->
    macula_frame:encode(macula_frame:sign(Frame, Id)).

begin_talk(#{kind := dialler, port := Port, pin := Pin} = Side, Pool) ->
    {ok, Conn} = macula_quic:connect({127, 0, 0, 1}, Port, [{alpn, ["macula"]}, {verify_pubkey, Pin}],
                                     ?WAIT),
    {ok, Stream} = macula_quic:open_stream(Conn),
    talk(Conn, Stream, unknown, Side, Pool);
begin_talk(#{kind := station, listener := L, connect := Opts} = Side, Pool) ->
    {ok, Worker} = macula_peering:connect(Opts),
    {ok, Conn} = macula_quic:accept(L, ?WAIT),
    {ok, Stream} = macula_quic:accept_stream(Conn, #{}, ?WAIT),
    talk(Conn, Stream, Worker, Side, Pool).

%% Most begin as they should, or they would all end there.
talk(Conn, Stream, Worker, #{first := Firsts}, Pool) ->
    First = pick(Firsts),
    Begin = case rand:uniform(20) of
        1 -> [];
        2 -> [flip(First)];
        3 -> [item(Pool), First];
        4 -> [item(Pool), item(Pool), First];
        5 -> [First, First];
        _ -> [First]
    end,
    %% Some wait behind what they began with, so that the other side is not interrupted there.
    #{conn => Conn, stream => Stream, worker => Worker, bytes => iolist_to_binary(Begin),
      left => 20 + rand:uniform(400), others => [],
      pause => case rand:uniform(3) of 1 -> rand:uniform(300); _ -> 0 end}.

%% `left' bounds a conversation that nothing ends. Everything that came is heard between turns.
turns(Talks, Side, Pool, N) ->
    #{over := Over, stop := Stop} = hear(#{over => #{}, stop => false, side => Side}),
    case Stop of
        true ->
            _ = [macula_quic:close_connection(Conn) || #{conn := Conn} <- Talks],
            stop_listening(Side),
            finish(Talks, Side),
            N;
        false ->
            {Next, Begun} = lists:mapfoldl(fun(#{conn := Conn} = Talk, Count) ->
                case maps:is_key(Conn, Over) orelse step(Talk, Pool) of
                    #{} = Fed ->
                        {Fed, Count};
                    _ ->
                        _ = macula_quic:close_connection(Conn),
                        {begin_talk(Side, Pool), Count + 1}
                end
            end, N, Talks),
            turns(Next, Side, Pool, Begun)
    end.

stop_listening(#{kind := dialler, listener := L}) -> macula_peering:close_listener(L);
stop_listening(#{kind := station, listener := L}) -> macula_quic:close_listener(L).

%% Whoever controls links lives until they have told of their end.
finish(Talks, Side) ->
    ok = macula_test_nodes:wait_until(fun() ->
        _ = hear(#{over => #{}, stop => false, side => Side}),
        Mine = [P || {_, P, _, _} <- supervisor:which_children(macula_peering_conn_sup),
                     {ok, #{owner := Owner}} <- [macula_peering_links:find(P)], Owner =:= self()],
        Mine =:= [] orelse {length(Talks), [catch {sys:get_state(P), process_info(P, messages)}
                                            || P <- Mine]}
    end, 30000),
    _ = sys:get_state(macula_peering_links),
    _ = hear(#{over => #{}, stop => false, side => Side}),
    %% A worker of ours that began was heard of once.
    ok.

hear(#{over := Over, side := #{monitor := Monitor}} = Heard) ->
    receive
        {macula_peering, disconnected, Worker, Reason} ->
            documented(Reason) orelse error({undocumented, Reason}),
            undefined =:= put({ended, Worker}, true) orelse error({twice, Worker, Reason}),
            case add({ends, kind(Reason)}, 1) =:= 1 orelse add(ended, 1) of
                %% Kept for a while: pids come again, though not soon.
                N when is_integer(N), N rem 20000 =:= 0 ->
                    _ = [erase(Key) || {{ended, _} = Key, _} <- get()],
                    ok;
                _ -> ok
            end,
            hear(Heard);
        {macula_peering, connected, Worker, _} ->
            %% Some are closed from our side, at some time.
            case rand:uniform(100) of
                1 -> macula_peering:close(Worker);
                2 -> exit(Worker, kill);
                _ -> ok
            end,
            hear(Heard);
        {macula_peering, passive, Worker, _} ->
            _ = macula_peering:setopts(Worker, [{active, 3}]),
            hear(Heard);
        {macula_peering, new_dedicated_stream, _, Stream} ->
            _ = macula_quic:async_shutdown_stream(Stream, abort, 0),
            hear(Heard);
        {macula_peering, _, _, _} -> hear(Heard);
        {macula_peering, _, _, _, _} -> hear(Heard);
        {quic, What, Conn, _} when What =:= shutdown; What =:= transport_shutdown; What =:= closed ->
            hear(Heard#{over := Over#{Conn => true}});
        {quic, _, _, _} -> hear(Heard);
        {'DOWN', Monitor, process, _, _} -> exit(parent_is_gone);
        stop -> hear(Heard#{stop := true})
    after 0 ->
        Heard
    end.

add(Key, N) ->
    Sum = case get(Key) of undefined -> N; Old -> Old + N end,
    put(Key, Sum),
    Sum.

kind({connection_lost, _}) -> connection_lost;
kind({Tag, Code}) when is_integer(Code) -> Tag;
kind({peer_identity_mismatch, _, _}) -> peer_identity_mismatch;
kind(Reason) -> Reason.

documented({worker_down, killed}) -> true;
documented({protocol_error, frame_too_large}) -> true;
documented({protocol_error, no_frame_type}) -> true;
documented({protocol_error, too_much_before_handshake}) -> true;
documented({unsupported_version, _}) -> true;
documented({protocol_error, {bad_frame, Why}}) -> is_atom(Why);
documented({connect_verify_failed, Why}) -> verify_reason(Why);
documented({hello_verify_failed, Why}) -> verify_reason(Why);
documented({refused, Code}) -> Code =:= undefined orelse is_integer(Code);
documented({Tag, Code}) when Tag =:= stream_reset; Tag =:= stream_stopped -> is_integer(Code);
documented({peer_identity_mismatch, <<_:256>>, <<_:256>>}) -> true;
documented({connection_lost, _}) -> true;
documented({connect_failed, _}) -> true;
documented({open_stream_failed, _}) -> true;
documented({setopt_failed, _}) -> true;
documented({send_connect_failed, _}) -> true;
documented({send_hello_failed, _}) -> true;
documented(Reason) ->
    lists:member(Reason, [drained, peer_closed, peer_closed_during_drain, handshake_timeout,
                          closed_during_handshake, unexpected_connect_on_client,
                          unexpected_hello_on_server]).

verify_reason({bad_frame, Field}) -> is_atom(Field);
verify_reason(Why) -> lists:member(Why, [signature_invalid, bad_frame]).

%% One piece. `over' when the other side does not take more, or when it is time.
step(#{left := 0}, _) -> over;
step(#{bytes := <<>>, pause := Turns} = Talk, _) when Turns > 0 ->
    Talk#{pause := Turns - 1};
step(#{bytes := Bytes, left := Left, stream := Stream} = Talk, Pool) ->
    Size = case rand:uniform(8) of
        1 -> 1;
        2 -> rand:uniform(6);
        3 -> 400 + rand:uniform(1500);
        _ -> 20 + rand:uniform(250)
    end,
    {Now, Later} = case Talk of
        #{pause := Pause} when Pause > 0, byte_size(Bytes) =< Size -> {Bytes, <<>>};
        #{} -> split_binary(enough(Bytes, Size, Pool), Size)
    end,
    case macula_quic:send(Stream, Now, #{timeout => 0}) of
        ok -> beside(Talk#{bytes := Later, left := Left - 1});
        {error, timeout} -> Talk#{left := Left - 1};
        {error, _} -> over
    end.

enough(Bytes, Size, _) when byte_size(Bytes) >= Size -> Bytes;
enough(Bytes, Size, Pool) -> enough(iolist_to_binary([Bytes, item(Pool)]), Size, Pool).

%% What happens beside the control stream, or to it.
beside(#{conn := Conn, stream := Stream, others := Others} = Talk) ->
    case rand:uniform(1500) of
        N when N =< 4 ->
            case macula_quic:open_stream(Conn, #{timeout => 100}) of
                {ok, Other} ->
                    _ = macula_quic:send(Other, crypto:strong_rand_bytes(50), #{timeout => 0}),
                    Talk#{others := [Other | Others]};
                {error, _} -> Talk
            end;
        5 -> _ = macula_quic:async_shutdown_stream(Stream, graceful, 0), Talk;
        6 -> _ = macula_quic:async_shutdown_stream(Stream, abort_send, rand:uniform(100)), Talk;
        7 -> _ = macula_quic:async_shutdown_stream(Stream, abort_receive, rand:uniform(100)), Talk;
        8 -> over;
        _ -> Talk
    end.

%%% What is said

%% Frames of all kinds, and the seeds of the decoder's fuzzer.
pool(Id) ->
    Seeds = case file:list_dir("fuzz/seeds/frame") of
        {ok, Names} ->
            [begin
                {ok, Bytes} = file:read_file(filename:join("fuzz/seeds/frame", Name)),
                <<(byte_size(Bytes)):32, Bytes/binary>>
             end || Name <- lists:sort(Names)];
        {error, _} -> []
    end,
    Frames = [signed(macula_frame:ping(#{nonce => crypto:strong_rand_bytes(16)}), Id),
              macula_frame:encode(macula_frame:ping(#{nonce => <<0:128>>})),
              signed(macula_frame:have(#{blocks => []}), Id)
              | [signed((macula_frame:result(#{call_id => <<0:128>>, payload => 0,
                                               responded_by => macula_identity:public(Id)}))#{
                    payload => P}, Id)
                 || P <- [<<>>, binary:copy(<<7>>, 1500), [1, [2, #{3 => 4.5}]], #{a => undefined}]]],
    {list_to_tuple(Frames), list_to_tuple([<<>> | Seeds]),
     signed(macula_frame:goodbye(operator_stop), Id)}.

item({Frames, Seeds, Goodbye}) ->
    case rand:uniform(700) of
        1 -> <<(rand:uniform(1 bsl 32) - 1):32>>;
        2 -> crypto:strong_rand_bytes(rand:uniform(40));
        3 -> flip(pick(Frames));
        4 -> pick(Seeds);
        5 -> Goodbye;
        6 -> Junk = crypto:strong_rand_bytes(rand:uniform(60)), [<<(byte_size(Junk)):32>>, Junk];
        N when N < 250 -> pick(Frames);
        _ -> strange()
    end.

pick(Tuple) ->
    element(rand:uniform(tuple_size(Tuple)), Tuple).

%% One bit, anywhere behind the length.
flip(<<Length:32, Body/binary>>) when Body =/= <<>> ->
    At = rand:uniform(byte_size(Body)) - 1,
    <<Before:At/binary, Byte, After/binary>> = Body,
    <<Length:32, Before/binary, (Byte bxor (1 bsl (rand:uniform(8) - 1))), After/binary>>;
flip(Bytes) ->
    Bytes.

%% A map that is well formed as a rule, seldom in the canonical form, of fields that fit each other
%% as chance has it.
strange() ->
    Type = text(case rand:uniform(4) of
        1 -> ["t", integer_to_list(rand:uniform(1 bsl 40), 36)];
        _ -> pick({"ping", "pong", "call", "result", "error", "publish", "event", "stream_data",
                   "nodes", "want", "have", "cancel", "swim_ping", "manifest_res", "store_ack",
                   "advertise", "connect", "hello", "plumtree_gossip", "subscribe"})
    end),
    Names = [Name || Name <- ["nonce", "payload", "signature", "publisher_sig", "realm", "caller",
                              "node_id", "signer", "blocks", "nodes", "code", "name", "accepted",
                              "version", "frame_id", "sent_at_ms", "capabilities", "reason"],
                     rand:uniform(3) =:= 1],
    Entries = [[text(Name), cbor(3)] || Name <- Names],
    Typed = case rand:uniform(1500) of
        1 -> Entries;
        _ -> [[text("frame_type"), Type] | Entries]
    end,
    Body = iolist_to_binary([head(5, length(Typed)) | shuffled(Typed)]),
    [<<(byte_size(Body)):32>>, Body].

shuffled(List) ->
    [E || {_, E} <- lists:sort([{rand:uniform(), E} || E <- List])].

cbor(Depth) ->
    case rand:uniform(14) of
        1 -> head(0, rand:uniform(1 bsl 64) - 1);
        2 -> head(1, rand:uniform(1 bsl 64) - 1);
        3 -> head(0, rand:uniform(30));
        4 -> <<16#fb, (rand:normal() * 1.0e10):64/float>>;
        5 -> <<16#fa, (rand:normal()):32/float>>;
        6 -> <<16#f9, (rand:uniform(16#7bff)):16>>;
        7 -> text(pick({"true", "false", "undefined", "direct", "no such atom", "", "\x{e4}"}));
        8 when Depth > 0 -> container(Depth, rand:uniform(4), rand:uniform(60));
        9 when Depth > 0 -> map(Depth);
        10 -> binary(32);
        11 -> binary(64);
        12 -> binary(16);
        13 -> <<16#f6>>;
        %% Seldom what is forbidden: a tag, a boolean, an indefinite length, not a number.
        14 when Depth =:= 3 ->
            case rand:uniform(250) of
                1 -> pick({<<16#c0, 0>>, <<16#f5>>, <<16#9f, 16#ff>>, <<16#f9, 16#7e, 0>>,
                           <<16#62, 16#ff, 16#fe>>, <<16#f7>>, <<16#1c>>});
                _ -> head(0, 0)
            end;
        _ -> binary(rand:uniform(40) - 1)
    end.

binary(Size) ->
    [head(2, Size), rand:bytes(Size)].

container(Depth, N, 1) -> deep(Depth, N);
container(Depth, N, _) -> [head(4, N) | [cbor(Depth - 1) || _ <- lists:seq(1, N)]].

%% As deep as is allowed, or one more.
deep(_, _) ->
    [binary:copy(<<16#81>>, 59 + rand:uniform(4)), 0].

map(Depth) ->
    N = rand:uniform(4) - 1,
    [head(5, N) | [[case rand:uniform(3) of
                        1 -> head(0, 10 * I);
                        2 -> head(1, 10 * I);
                        3 -> text(["k", integer_to_list(I)])
                    end, cbor(Depth - 1)] || I <- lists:seq(1, N)]].

text(Chars) ->
    Utf8 = unicode:characters_to_binary(Chars),
    [head(3, byte_size(Utf8)), Utf8].

%% Not always the shortest.
head(Major, N) ->
    Longer = case rand:uniform(12) of 1 -> rand:uniform(3); _ -> 0 end,
    Shortest = if N < 24 -> 0; N < 16#100 -> 1; N < 16#10000 -> 2; N < 16#100000000 -> 3; true -> 4 end,
    case min(4, Shortest + Longer) of
        0 -> <<Major:3, N:5>>;
        1 -> <<Major:3, 24:5, N:8>>;
        2 -> <<Major:3, 25:5, N:16>>;
        3 -> <<Major:3, 26:5, N:32>>;
        4 -> <<Major:3, 27:5, N:64>>
    end.
