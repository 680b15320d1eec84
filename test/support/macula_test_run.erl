%% @doc Commands of a shell, for tests of what people type.
-module(macula_test_run).

-export([root/0, run/2]).

%% @doc The repository's directory.
-spec root() -> file:filename().
root() ->
    root(filename:absname(code:lib_dir(macula))).

root(Dir) ->
    case filelib:is_regular(filename:join(Dir, "Cargo.toml")) of
        true -> Dir;
        false when Dir =/= "/" -> root(filename:dirname(Dir))
    end.

%% @doc Runs a command of `sh' in a directory; its status and all that it says. What this VM was
%% started with does not leak into those that the command starts.
-spec run(file:filename(), string()) -> {non_neg_integer(), string()}.
run(Dir, Command) ->
    Port = open_port({spawn_executable, os:find_executable("sh")},
                     [{args, ["-c", Command ++ " 2>&1"]}, {cd, Dir}, exit_status, binary,
                      {env, [{"ERL_FLAGS", false}, {"ERL_AFLAGS", false}, {"ERL_LIBS", false},
                             {"REBAR_PROFILE", false}, {"MIX_ENV", "dev"}]}]),
    collect(Port, Command, []).

collect(Port, Command, Output) ->
    receive
        {Port, {data, Data}} ->
            collect(Port, Command, [Output, Data]);
        {Port, {exit_status, Status}} ->
            Text = unicode:characters_to_list(iolist_to_binary(Output)),
            ct:log("~ts~nstatus ~b~n~ts", [Command, Status, Text]),
            {Status, Text}
    end.
