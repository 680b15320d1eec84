%% @doc Deadlines: one over everything that a call does.
%% @private
-module(macula_quic_time).

-export([deadline/1, left/1]).

-export_type([deadline/0]).

-type deadline() :: integer() | infinity.

%% @doc The deadline of a call that may take so long.
-spec deadline(timeout()) -> deadline().
deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

%% @doc What is left until a deadline.
-spec left(deadline()) -> timeout().
left(infinity) -> infinity;
left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).
