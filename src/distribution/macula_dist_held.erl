%% @doc Senders that are held: they have much in the queue of a link, and wait alone until there is room.
%%
%% The output handler of the link suspends them, and keeps in its process dictionary whom. The engine says who is to
%% be held, and when the queue has room for a sender again (`macula_dist_free'). While senders are held the handler
%% gets `macula_dist_standstill' from time to time, and `macula_dist_async' when one of them is found to have the flag
%% `async_dist' (OTP 25.3): such a process has asked never to be suspended for what it sends.
%% @private
-module(macula_dist_held).

-export([hold/2, free/1, free_all/0, look_again/1, let_go_async/1]).

%% A link that has moved nothing in this time, in milliseconds, holds no sender any longer: when it is full the
%% VM does, as over TCP, and tells those that do not want to be suspended. It is looked at this often.
-define(STANDSTILL, 700).
-define(LOOK, 140).

%% How long the output handler waits until senders are held, in milliseconds: one may be in a native function.
-define(HOLDING, 2).

-type sender() :: {non_neg_integer(), non_neg_integer(), non_neg_integer()}.
%% A process by the two numbers of its pid, and the number of the hold.

%% Those that have much in the queue wait until there is room, and nobody else. If this process ends
%% the VM resumes them. A sender that somebody else has suspended, too, needs both to resume it.
-spec hold(reference(), [sender()]) -> ok.
hold(Link, Senders) ->
    Tag = make_ref(),
    Known = held(),
    Held = lists:foldl(fun(Sender, Acc) -> hold_one(Sender, Tag, Acc) end, Known, Senders),
    _ = put(held, Held),
    tell_held(maps:keys(maps:without(maps:keys(Known), Held))),
    await_held(Tag, map_size(Held) - map_size(Known)),
    case get(held_timer) of
        undefined when map_size(Held) > 0 -> look_later(Link);
        _ -> ok
    end.

tell_held([]) -> ok;
tell_held(Senders) -> macula_telemetry:tell(held, #{count => length(Senders)}, #{senders => Senders}).

%% A sender that runs sends on until its turn is over. While nothing is pulled the VM stops it, too, when
%% its queue is full; that is sooner.
await_held(Tag, 0) ->
    %% A reference that no receive follows would leave a mark in the mailbox for good (macula_quic_call).
    self() ! {Tag, nobody},
    receive {Tag, nobody} -> ok end;
await_held(Tag, Count) ->
    receive
        {Tag, _} -> await_held(Tag, Count - 1)
    after ?HOLDING ->
        ok
    end.

%% One that is let go and has to wait again before the word of it has come here waits on.
hold_one({Number, Serial, Hold}, Tag, Held) ->
    Pid = pid(Number, Serial),
    case macula_dist_asking:keep_waiting(Pid, Hold) orelse stay_async(Pid, Hold) of
        true ->
            Held;
        false ->
            %% net_kernel sees to all links.
            try Pid =/= self() andalso Pid =/= whereis(net_kernel)
                    andalso erlang:suspend_process(Pid, [{asynchronous, Tag}, unless_suspending]) of
                true -> look_for_async(Pid), Held#{Pid => Hold};
                false when is_map_key(Pid, Held) -> Held#{Pid => Hold};
                false -> Held
            catch
                %% It has ended, or is about to.
                error:_ -> Held
            end
    end.

%% The queue has room for these again.
-spec free([sender()]) -> ok.
free(Senders) ->
    _ = put(held, lists:foldl(fun free_one/2, held(), Senders)),
    ok.

free_one({Number, Serial, Hold}, Held) ->
    Pid = pid(Number, Serial),
    case Held of
        #{Pid := Hold} -> resume(Pid), maps:remove(Pid, Held);
        _ -> forget_async(Pid, Hold), macula_dist_asking:answer(Pid, Hold), Held
    end.

%% Nobody is held any longer.
-spec free_all() -> ok.
free_all() ->
    lists:foreach(fun resume/1, maps:keys(held())),
    _ = erase(held),
    ok.

resume(Pid) ->
    try
        true = erlang:resume_process(Pid),
        ok
    catch
        %% It has ended.
        error:_ -> ok
    end.

%% The VM tells the flag of a process that runs when its turn, or its native function, is over. A process made for
%% that waits, and the sender is held meanwhile: what it sends in that time would all be in the queue.
look_for_async(Pid) ->
    Self = self(),
    case get(knows_async) of
        undefined ->
            _ = put(knows_async, async_dist(Self) =/= unknown),
            look_for_async(Pid);
        true ->
            try
                _ = spawn_opt(fun() -> tell_async(Self, Pid) end, [{priority, max}]),
                ok
            catch
                %% Without room for one process more the sender waits, and the link stays.
                error:system_limit -> ok
            end;
        false ->
            ok
    end.

tell_async(Handler, Pid) ->
    case async_dist(Pid) of
        {async_dist, true} -> Handler ! {macula_dist_async, Pid}, ok;
        _ -> ok
    end.

async_dist(Pid) ->
    try
        erlang:process_info(Pid, async_dist)
    catch
        %% The VM has no such flag.
        error:badarg -> unknown
    end.

%% Deals with `macula_dist_async'. Until the queue would have room for the sender it is not held again.
-spec let_go_async(pid()) -> ok.
let_go_async(Pid) ->
    case held() of
        #{Pid := Hold} = Held ->
            resume(Pid),
            _ = put(held, maps:remove(Pid, Held)),
            set_async(maps:put(Pid, Hold, async()));
        _ ->
            ok
    end.

stay_async(Pid, Hold) ->
    case async() of
        #{Pid := _} = Async -> set_async(Async#{Pid := Hold}), true;
        _ -> false
    end.

forget_async(Pid, Hold) ->
    case async() of
        #{Pid := Hold} = Async -> set_async(maps:remove(Pid, Async));
        _ -> ok
    end.

set_async(Async) ->
    _ = put(async, Async),
    ok.

async() ->
    case get(async) of
        undefined -> #{};
        Async -> Async
    end.

held() ->
    case get(held) of
        undefined -> #{};
        Held -> Held
    end.

pid(Number, Serial) ->
    list_to_pid("<0." ++ integer_to_list(Number) ++ "." ++ integer_to_list(Serial) ++ ">").

look_later(Link) ->
    look_in_a_while({moved(Link), erlang:monotonic_time(millisecond)}).

look_in_a_while(Last) ->
    _ = put(held_timer, Last),
    _ = erlang:send_after(?LOOK, self(), macula_dist_standstill),
    ok.

%% Deals with `macula_dist_standstill'.
-spec look_again(reference()) -> ok.
look_again(Link) ->
    Held = held(),
    {Last, Since} = erase(held_timer),
    Stands = erlang:monotonic_time(millisecond) - Since,
    case moved(Link) of
        _ when map_size(Held) =:= 0 -> ok;
        Last when Stands >= ?STANDSTILL -> free_all();
        Last -> look_in_a_while({Last, Since});
        _ -> look_later(Link)
    end.

moved(Link) ->
    #{bytes_out := Moved} = macula_dist_nif:dist_info(Link),
    Moved.
