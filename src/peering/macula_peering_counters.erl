%% @doc What a link counts: its worker, its dedicated streams and whoever sends add to it.
%% @private
-module(macula_peering_counters).

-export([new/0, add/3, all/1]).

-export_type([counter/0]).

-type counter() :: frames_in | bytes_in | frames_rejected | frames_out | bytes_out.

-spec new() -> counters:counters_ref().
new() ->
    %% Without a copy for each scheduler: there may be many links.
    counters:new(5, []).

-spec add(counters:counters_ref(), counter(), non_neg_integer()) -> ok.
add(Counters, Counter, N) ->
    counters:add(Counters, index(Counter), N).

-spec all(counters:counters_ref()) -> #{counter() => non_neg_integer()}.
all(Counters) ->
    maps:from_list([{Counter, counters:get(Counters, index(Counter))}
                    || Counter <- [frames_in, bytes_in, frames_rejected, frames_out, bytes_out]]).

index(frames_in) -> 1;
index(bytes_in) -> 2;
index(frames_rejected) -> 3;
index(frames_out) -> 4;
index(bytes_out) -> 5.
