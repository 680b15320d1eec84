%% Many nodes that all dial each other at once become one mesh and stay one. The same is done over
%% inet_tcp in the same run, so that what is measured is a ratio.
-module(macula_dist_mesh_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1]).
-export([a_storm_of_dials_becomes_a_mesh_and_stays_one/1]).

%% For how long the mesh is watched.
-define(WATCHED_MS, 10000).

suite() -> [{timetrap, {minutes, 10}}].

all() -> [a_storm_of_dials_becomes_a_mesh_and_stays_one].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).

%% MACULA_MESH_NODES (20) is the size.
a_storm_of_dials_becomes_a_mesh_and_stays_one(_Config) ->
    Size = list_to_integer(os:getenv("MACULA_MESH_NODES", "20")),
    Tcp = macula_test_mesh:measure(#{carrier => inet_tcp}, Size, 0),
    #{wakes := Wakes} = Macula = macula_test_mesh:measure(#{carrier => macula}, Size, ?WATCHED_MS),
    ct:pal("mesh of ~b: inet_tcp whole in ~b ms, ~.1f ms of processor a link; "
           "macula ~b ms, ~.1f ms, and ~p wake-ups a second for an end of a link that idles",
           [Size, maps:get(ms, Tcp), maps:get(cpu_ms, Tcp), maps:get(ms, Macula),
            maps:get(cpu_ms, Macula), Wakes]),
    ?assertEqual([], maps:get(incomplete, Macula)),
    ?assertEqual([], maps:get(lost, Macula)),
    %% 0.15 to 0.2 are seen, of which 0.1 are the VM's own; a busy machine adds to them. Both ends that ask each other
    %% by themselves need 2.
    ?assert(Wakes =:= unknown orelse Wakes =< 0.8, Wakes),
    %% Generous, as the machine may be busy during one of the two.
    ?assert(maps:get(ms, Macula) =< 10 * maps:get(ms, Tcp) + 5000,
            {maps:get(ms, Macula), maps:get(ms, Tcp)}).
