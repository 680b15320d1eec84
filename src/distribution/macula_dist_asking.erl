%% @doc Packets that did not come from the VM, and whose senders wait for an answer until the link has room.
%%
%% OTP's own test suites send such packets. The output handler keeps here, in its process dictionary, which senders
%% wait, and for what: for room on the link, or for the queue to let go a sender that would be held.
%% @private
-module(macula_dist_asking).

-export([add/2, is_any/0, keep_waiting/2, answer/2, answer_all/1]).

-type what() :: room | non_neg_integer().
%% What a sender waits for: room on the link, or the number of a hold.

%% The sender waits for room on the link.
-spec add(pid(), reference()) -> ok.
add(Pid, Ref) ->
    set_asking(maps:put(Pid, {Ref, room}, asking())).

%% True while somebody waits.
-spec is_any() -> boolean().
is_any() ->
    get(asking) =/= undefined.

%% True where the sender waits for such an answer. Then that is put off, and the sender need not be held.
-spec keep_waiting(pid(), non_neg_integer()) -> boolean().
keep_waiting(Pid, Hold) ->
    case asking() of
        #{Pid := {Ref, _}} = Asking -> set_asking(Asking#{Pid := {Ref, Hold}}), true;
        _ -> false
    end.

%% What this sender waits for has come.
-spec answer(pid(), what()) -> ok.
answer(Pid, For) ->
    case asking() of
        #{Pid := {Ref, For}} = Asking ->
            Pid ! {Ref, ok},
            set_asking(maps:remove(Pid, Asking));
        _ ->
            ok
    end.

%% What all these senders wait for has come.
-spec answer_all(what()) -> ok.
answer_all(For) ->
    lists:foreach(fun(Pid) -> answer(Pid, For) end, maps:keys(asking())).

set_asking(Asking) when map_size(Asking) =:= 0 -> _ = erase(asking), ok;
set_asking(Asking) -> _ = put(asking, Asking), ok.

asking() ->
    case get(asking) of
        undefined -> #{};
        Asking -> Asking
    end.
