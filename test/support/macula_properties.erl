%% @doc Runs the properties of all `prop_*' modules it finds: what `make test' and `make fuzz' call.
%%
%% Each exported `prop_*/0' is checked `MACULA_PROPER_TESTS' times (default 100). A property module
%% is skipped only when `MACULA_PROPERTIES', a comma-separated list of modules, does not name it.
-module(macula_properties).

-export([main/0, run/2]).

%% @doc Checks all, prints a line for each and a summary, and halts with 0 or 1.
-spec main() -> no_return().
main() ->
    N = list_to_integer(os:getenv("MACULA_PROPER_TESTS", "100")),
    Results = run(modules(), N),
    Failed = [Name || {Name, false} <- Results],
    io:format("~b properties passed, ~b failed~n", [length(Results) - length(Failed),
                                                     length(Failed)]),
    halt(case Results =/= [] andalso Failed =:= [] of true -> 0; false -> 1 end).

-spec run([module()], pos_integer()) -> [{{module(), atom()}, boolean()}].
run(Modules, N) ->
    [{{Module, Name}, check(Module, Name, N)}
     || Module <- Modules, {Name, 0} <- lists:sort(Module:module_info(exports)),
        lists:prefix("prop_", atom_to_list(Name))].

check(Module, Name, N) ->
    Start = erlang:monotonic_time(millisecond),
    Passed = try
        true =:= proper:quickcheck(Module:Name(), [{numtests, N}, nocolors, {on_output, fun output/2}])
    catch
        Class:Reason:Stack ->
            io:format("~tp~n", [{Class, Reason, Stack}]),
            false
    end,
    io:format("~s:~s: ~s (~b ms)~n",
              [Module, Name, case Passed of true -> "passed"; false -> "FAILED" end,
               erlang:monotonic_time(millisecond) - Start]),
    Passed.

%% A dot for each of thousands of passed tests says nothing in a log.
output(".", _) -> ok;
output(Format, Args) -> io:format(Format, Args).

modules() ->
    Beams = lists:append([filelib:wildcard("prop_*.beam", Dir) || Dir <- code:get_path()]),
    All = lists:usort([list_to_atom(filename:rootname(Beam)) || Beam <- Beams]),
    case os:getenv("MACULA_PROPERTIES") of
        false ->
            All;
        Names ->
            Wanted = [list_to_atom(Name) || Name <- string:lexemes(Names, ",")],
            case Wanted -- All of
                [] -> Wanted;
                Unknown -> error({unknown_property_modules, Unknown})
            end
    end.
