%% A property that fails must be seen to fail.
-module(macula_properties_tests).

-include_lib("eunit/include/eunit.hrl").
-include("macula_proper.hrl").

-export([prop_false/0, prop_true/0, prop_raises/0]).

prop_true() -> ?FORALL(L, list(integer()), lists:sort(L) =:= lists:usort(L) orelse has_twins(L)).
prop_false() -> ?FORALL(N, range(0, 10), N < 5).
prop_raises() -> ?FORALL(N, range(1, 10), N div 0 =:= 0).

has_twins(L) -> length(L) > length(lists:usort(L)).

failures_are_seen_test() ->
    ?assertEqual([{{?MODULE, prop_false}, false}, {{?MODULE, prop_raises}, false},
                  {{?MODULE, prop_true}, true}],
                 macula_properties:run([?MODULE], 200)).
