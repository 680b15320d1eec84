%% @doc The frames of a link that wait to be delivered, to whom they go, and how many may go now.
%%
%% They go to the owner of the link, and to subscribers who want their type. What goes to the owner costs
%% credit; without credit the frames wait, in their order.
%% @private
-module(macula_peering_delivery).

-export([new/3, add/2, grant/2, run/3, is_empty/1, drop/1]).
-export([subscribe/3, unsubscribe/2, down/3, subscribers/1]).

-export_type([delivery/0, item/0, outcome/0]).

-type item() :: {macula_frame:frame(), macula_frame:verdict()} | {bad_frame, {atom(), binary()}}.
-type outcome() :: empty | held | goodbye | {error, term()}.
%% `empty': nothing waits any more; `held': what waits needs credit; `goodbye': the peer's farewell was
%% delivered, and nothing behind it was.

-record(delivery, {
    rules :: macula_peering_incoming:rules(),
    counters :: counters:counters_ref(),
    credit :: infinity | non_neg_integer(),
    waiting = [] :: [item()],
    %% A frame that could not be decoded has been logged.
    warned = false :: boolean(),
    subscribers = #{} :: #{pid() => {reference(), all | [atom()]}}
}).

-opaque delivery() :: #delivery{}.

-spec new(true | once | non_neg_integer(), macula_peering_incoming:rules(), counters:counters_ref()) ->
    delivery().
new(Active, Rules, Counters) ->
    #delivery{rules = Rules, counters = Counters, credit = credit(Active)}.

credit(true) -> infinity;
credit(once) -> 1;
credit(N) -> N.

-spec add([item()], delivery()) -> delivery().
add(Items, #delivery{waiting = []} = Delivery) -> Delivery#delivery{waiting = Items};
add(Items, #delivery{waiting = Waiting} = Delivery) -> Delivery#delivery{waiting = Waiting ++ Items}.

%% @doc Sets the credit, or adds to it.
-spec grant(boolean() | once | non_neg_integer(), delivery()) -> delivery().
grant(true, Delivery) -> Delivery#delivery{credit = infinity};
grant(false, Delivery) -> Delivery#delivery{credit = 0};
grant(once, Delivery) -> Delivery#delivery{credit = 1};
grant(N, #delivery{credit = infinity} = Delivery) -> Delivery#delivery{credit = N};
grant(N, #delivery{credit = Credit} = Delivery) -> Delivery#delivery{credit = Credit + N}.

-spec is_empty(delivery()) -> boolean().
is_empty(#delivery{waiting = Waiting}) -> Waiting =:= [].

%% @doc What waits is not delivered any more.
-spec drop(delivery()) -> delivery().
drop(Delivery) -> Delivery#delivery{waiting = []}.

%% @doc Delivers as the credit allows.
-spec run(pid(), macula_identity:node_id(), delivery()) -> {outcome(), delivery()}.
run(_, _, #delivery{waiting = []} = Delivery) ->
    {empty, Delivery};
run(_, _, #delivery{credit = 0} = Delivery) ->
    {held, Delivery};
run(Owner, Peer, #delivery{waiting = [{bad_frame, {Why, Bad}} | Rest]} = Delivery) ->
    #delivery{counters = Counters, rules = Rules} = Delivery,
    macula_peering_counters:add(Counters, frames_in, 1),
    macula_peering_counters:add(Counters, frames_rejected, 1),
    case macula_peering_incoming:bad_frames(Rules) of
        drop ->
            run(Owner, Peer, (warn(Why, Peer, Delivery))#delivery{waiting = Rest});
        deliver ->
            Owner ! {macula_peering, bad_frame, self(), #{reason => Why, bytes => Bad}},
            run(Owner, Peer, spend(1, Owner, Delivery#delivery{waiting = Rest}))
    end;
run(Owner, Peer, #delivery{waiting = [{Frame, Verdict} | Rest]} = Delivery) ->
    case frame(Frame, Verdict, Owner, Peer, Delivery) of
        {ok, Used} -> run(Owner, Peer, spend(Used, Owner, Delivery#delivery{waiting = Rest}));
        goodbye -> {goodbye, Delivery};
        {error, Reason} -> {{error, Reason}, Delivery}
    end.

warn(Why, Peer, #delivery{warned = false} = Delivery) ->
    macula_peering_log:bad_frame(Peer, Why),
    Delivery#delivery{warned = true};
warn(_, _, Delivery) ->
    Delivery.

spend(0, _, Delivery) -> Delivery;
spend(_, _, #delivery{credit = infinity} = Delivery) -> Delivery;
spend(_, Owner, #delivery{credit = 1} = Delivery) ->
    Owner ! {macula_peering, passive, self(), undefined},
    Delivery#delivery{credit = 0};
spend(_, _, #delivery{credit = Credit} = Delivery) -> Delivery#delivery{credit = Credit - 1}.

%% One frame to whom it concerns. `{ok, Used}': how much of the credit it took.
frame(Frame, Verdict, Owner, Peer, #delivery{rules = Rules, counters = Counters} = Delivery) ->
    macula_peering_counters:add(Counters, frames_in, 1),
    case macula_peering_incoming:judge(Frame, Verdict, Peer, Rules) of
        {deliver, Type, Category, none} ->
            pass(Type, Category, {macula_peering, frame, self(), Frame}, Owner, Delivery);
        {deliver, Type, Category, Meta} ->
            pass(Type, Category, {macula_peering, frame, self(), Frame, Meta}, Owner, Delivery);
        drop ->
            {ok, 0};
        reject ->
            macula_peering_counters:add(Counters, frames_rejected, 1),
            {ok, 0};
        {error, Why} ->
            {error, {protocol_error, Why}}
    end.

pass(Type, Category, Event, Owner, #delivery{subscribers = Subscribers}) ->
    Owner ! Event,
    %% An owner that subscribes has it already.
    maps:foreach(fun(Pid, {_, Filter}) ->
        Pid =/= Owner andalso wants(Filter, Type, Category) andalso (Pid ! Event)
    end, Subscribers),
    case Type of
        goodbye -> goodbye;
        _ -> {ok, 1}
    end.

wants(all, _, _) -> true;
wants(Filter, Type, Category) -> lists:member(Type, Filter) orelse lists:member(Category, Filter).

%% @doc Another one who gets frames, or the same one with another filter.
-spec subscribe(pid(), all | [atom()], delivery()) -> delivery().
subscribe(Pid, Filter, #delivery{subscribers = Subscribers} = Delivery) ->
    Ref = case Subscribers of
        #{Pid := {Old, _}} -> Old;
        #{} -> monitor(process, Pid)
    end,
    Delivery#delivery{subscribers = Subscribers#{Pid => {Ref, Filter}}}.

-spec unsubscribe(pid(), delivery()) -> {ok, delivery()} | error.
unsubscribe(Pid, #delivery{subscribers = Subscribers} = Delivery) ->
    case maps:take(Pid, Subscribers) of
        {{Ref, _}, Left} ->
            demonitor(Ref, [flush]),
            {ok, Delivery#delivery{subscribers = Left}};
        error ->
            error
    end.

%% @doc For a message of a monitor: `error' where it is no subscriber's.
-spec down(reference(), pid(), delivery()) -> {ok, delivery()} | error.
down(Ref, Pid, #delivery{subscribers = Subscribers} = Delivery) ->
    case Subscribers of
        #{Pid := {Ref, _}} -> {ok, Delivery#delivery{subscribers = maps:remove(Pid, Subscribers)}};
        #{} -> error
    end.

-spec subscribers(delivery()) -> [pid()].
subscribers(#delivery{subscribers = Subscribers}) -> maps:keys(Subscribers).
