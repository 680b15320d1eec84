%% macula in other people's projects: each way of depending on it builds and loads with no extra
%% step. Every case works on a copy of the tree in a directory of its own; nothing is fetched.
-module(packaging_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([rebar3_git_dependency/1, rebar3_checkout/1, mix_path_dependency/1,
         mix_release_is_reached_by_its_own_commands/1,
         host_cargo_configuration_does_not_capture_the_build/1,
         build_without_cargo_says_so/1, build_of_broken_rust_stops_with_the_reason/1,
         build_directory_is_complete/1, rabbitmq_clusters_over_quic/1, readme_example_runs/1,
         ejabberd_clusters_over_quic/1,
         rabbitmq_gets_a_whole_copy/1, setup_says_what_to_run/1, setup_is_silent_when_nothing_is_missing/1,
         setup_goes_on_without_tshark/1]).

suite() ->
    [{timetrap, {minutes, 15}}].

all() ->
    [build_directory_is_complete, rebar3_git_dependency, rebar3_checkout, mix_path_dependency,
     mix_release_is_reached_by_its_own_commands,
     host_cargo_configuration_does_not_capture_the_build, build_without_cargo_says_so,
     build_of_broken_rust_stops_with_the_reason, readme_example_runs,
     rabbitmq_gets_a_whole_copy,
     setup_says_what_to_run, setup_is_silent_when_nothing_is_missing, setup_goes_on_without_tshark,
     rabbitmq_clusters_over_quic,
     ejabberd_clusters_over_quic].

init_per_suite(Config) ->
    Root = macula_test_run:root(),
    Tree = filename:join(?config(priv_dir, Config), "macula.git"),
    ok = copy_tree(Root, Tree),
    %% A repository of its own: a dependency is cloned, not linked.
    _ = must(Tree, "git init -q . && git add -A && git -c user.name=test -c user.email=test@localhost "
                    "commit -q -m copy"),
    %% What is tested is that it is built, not how well: a part of the time.
    Cargo = filename:join(?config(priv_dir, Config), ".cargo/config.toml"),
    ok = filelib:ensure_dir(Cargo),
    ok = file:write_file(Cargo, ["[profile.release.package.", crate(Root), "]\n"
                                 "opt-level = 0\ndebug = false\n"]),
    Target = target(Root),
    ok = warm(filename:join(filename:dirname(Target), "release"), Target),
    Clone = filename:join(?config(priv_dir, Config), "clone"),
    _ = must(".", "git clone -q " ++ Tree ++ " " ++ Clone),
    ok = as_old_as(Clone, filename:join(?config(priv_dir, Config), "git")),
    [{root, Root}, {tree, Tree}, {clone, Clone}, {target, Target} | Config].

end_per_suite(_Config) ->
    ok.

init_per_testcase(host_cargo_configuration_does_not_capture_the_build, Config) ->
    [{dir, filename:join(?config(priv_dir, Config), rebar3_checkout)} | Config];
init_per_testcase(Case, Config) ->
    Dir = filename:join(?config(priv_dir, Config), Case),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    [{dir, Dir} | Config].

end_per_testcase(_Case, _Config) ->
    ok.

%% What `erl -pa _build/default/lib/macula/ebin' finds is all there is to find.
build_directory_is_complete(Config) ->
    Dir = ?config(clone, Config),
    _ = must(Dir, env(Config) ++ "sh scripts/build"),
    Ebin = filename:join(Dir, "_build/default/lib/macula/ebin"),
    {ok, [{application, macula, Keys}]} = file:consult(filename:join(Ebin, "macula.app")),
    Modules = proplists:get_value(modules, Keys),
    ?assert(lists:member(macula_nif, Modules)),
    Sources = filelib:wildcard("src/**/*.erl", Dir),
    ?assertEqual(lists:sort([list_to_atom(filename:basename(S, ".erl")) || S <- Sources]),
                 lists:sort(Modules)),
    [?assert(filelib:is_regular(filename:join(Ebin, atom_to_list(M) ++ ".beam"))) || M <- Modules],
    loads(filename:join(Dir, "_build/default/lib")),
    helps(filename:join(Dir, "_build/default/lib")).

%% The examples as they stand, after a clone.
rebar3_git_dependency(Config) ->
    Dir = filename:join(?config(clone, Config), "examples/rebar3_app"),
    _ = must(Dir, env(Config) ++ "rebar3 compile"),
    ?assert(filelib:is_dir(filename:join(Dir, "_build/default/lib/macula/.git"))),
    runs_rebar3_app(Dir).

rebar3_checkout(Config) ->
    Dir = ?config(dir, Config),
    ok = copy_tree(filename:join(?config(root, Config), "examples/rebar3_app"), Dir),
    ok = file:delete(filename:join(Dir, "rebar.config.script")),
    ok = file:make_dir(filename:join(Dir, "_checkouts")),
    _ = must(Dir, env(Config) ++ "git clone -q " ++ ?config(tree, Config) ++ " _checkouts/macula"),
    _ = must(Dir, env(Config) ++ "rebar3 compile"),
    runs_rebar3_app(Dir).

mix_path_dependency(Config) ->
    Dir = filename:join(?config(clone, Config), "examples/mix_app"),
    Run = must(Dir, env(Config) ++ "MIX_REBAR3=$(command -v rebar3) mix run -e 'MixApp.main()'"),
    ?assertMatch({match, _}, re:run(Run, "echoed 1048576 bytes over QUIC")),
    helps(filename:join(Dir, "_build/*/lib")),
    Help = must(Dir, env(Config) ++ "echo 'h :macula_quic.connect' | "
                     "MIX_REBAR3=$(command -v rebar3) iex -S mix"),
    ?assertMatch({match, _}, re:run(Help, "Connects to a host")).

%% `rpc', `pid' and `stop' start a node that joins the release's for a moment; it must speak macula, too,
%% which its own file of arguments says.
mix_release_is_reached_by_its_own_commands(Config) ->
    Dir = filename:join(?config(clone, Config), "examples/mix_app"),
    _ = must(Dir, env(Config) ++ "MIX_ENV=prod MIX_REBAR3=$(command -v rebar3) mix release --overwrite"),
    Release = filename:join(Dir, "_build/prod/rel/mix_app"),
    Node = "mix" ++ os:getpid() ++ "@127.0.0.1",
    Epmd = integer_to_list(macula_dist_case:free_tcp_port()),
    Env = "RELEASE_NODE=" ++ Node ++ " ERL_EPMD_PORT=" ++ Epmd ++ " ",
    Command = fun(What) -> run(Release, Env ++ "bin/mix_app " ++ What) end,
    Alone = filename:join(Release, "releases/1.0.0/remote.vm.args"),
    {ok, Args} = file:read_file(Alone),
    {0, _} = Command("daemon"),
    try
        Said = macula_test_nodes:wait_until(fun() ->
            case Command("rpc 'IO.inspect({Node.self(), System.pid(), :code.get_mode(), "
                         ":macula_dist.info()})'") of
                {0, Output} -> {value, Output};
                Failed -> Failed
            end
        end, 60000),
        {match, [Pid]} = re:run(Said, Node ++ "\",\\s+\"([0-9]+)\",\\s+:embedded.*trust: :cookie",
                                [dotall, {capture, all_but_first, list}]),
        %% The scripts and the VM may print warnings beside the number.
        {0, Printed} = Command("pid"),
        ?assertMatch({true, _}, {lists:member(Pid, string:lexemes(Printed, "\n")), Printed}),
        %% Without it they speak TCP, and say what people see then.
        ok = file:write_file(Alone, ""),
        {1, Down} = Command("pid"),
        ?assertMatch({match, _}, re:run(Down, "nodedown")),
        ok = file:write_file(Alone, Args),
        {0, _} = Command("stop"),
        ok = macula_test_nodes:wait_until(fun() ->
            {_, Names} = run(Release, "epmd -port " ++ Epmd ++ " -names"),
            string:find(Names, "name mix") =:= nomatch
        end, 30000)
    after
        ok = file:write_file(Alone, Args),
        _ = Command("stop"),
        _ = run(Release, "epmd -port " ++ Epmd ++ " -kill")
    end.

%% The host of the checkout becomes a cargo workspace with target directories of its own. (The same
%% host, as the crate then need not be compiled again.)
host_cargo_configuration_does_not_capture_the_build(Config) ->
    Dir = ?config(dir, Config),
    ok = file:write_file(filename:join(Dir, "Cargo.toml"),
                         "[workspace]\nmembers = [\"nothing_here\"]\nresolver = \"2\"\n"),
    ok = filelib:ensure_dir(filename:join(Dir, ".cargo/x")),
    ok = file:write_file(filename:join(Dir, ".cargo/config.toml"),
                         "[build]\ntarget-dir = \"host-target\"\n"),
    ok = file:delete(filename:join(Dir, "_checkouts/macula/priv/macula_nif.so")),
    _ = must(Dir, env(Config) ++ "CARGO_TARGET_DIR=" ++ Dir ++ "/elsewhere rebar3 compile"),
    ?assertNot(filelib:is_dir(filename:join(Dir, "elsewhere"))),
    ?assertNot(filelib:is_dir(filename:join(Dir, "host-target"))),
    runs_rebar3_app(Dir).

build_without_cargo_says_so(Config) ->
    Clone = ?config(clone, Config),
    Bin = only(["sh", "dirname", "uname", "mkdir", "rm", "sed", "erl", "escript", "rebar3", "env",
                "basename", "readlink", "cat"], Config),
    {Status, Output} = run(Clone, "env -i PATH=" ++ Bin ++ " HOME=" ++ Bin ++ " rebar3 compile"),
    ?assertNotEqual(0, Status),
    ?assertMatch({match, _}, re:run(Output, "cargo is not in PATH")).

build_of_broken_rust_stops_with_the_reason(Config) ->
    Clone = ?config(clone, Config),
    Lib = filename:join(Clone, "native/macula/src/lib.rs"),
    {ok, Good} = file:read_file(Lib),
    ok = file:write_file(Lib, [Good, "\nfn broken() -> NoSuchType {}\n"]),
    %% An older library must not hide that the new one was not built.
    ok = file:write_file(filename:join(Clone, "priv/macula_nif.so"), "old"),
    {Status, Output} = run(Clone, env(Config) ++ "rebar3 compile"),
    ?assertNotEqual(0, Status),
    ?assertMatch({match, _}, re:run(Output, "NoSuchType")),
    ?assertMatch({match, _}, re:run(Output, "could not be built")).

setup_says_what_to_run(Config) ->
    Bin = only(["sh", "dirname", "uname", "sed", "tr", "readlink", "git", "cc"], Config),
    %% Somebody who is not root, on a Debian, with no sudo.
    [begin
         File = filename:join(Bin, Name),
         ok = file:write_file(File, "#!/bin/sh\n" ++ Text ++ "\n"),
         ok = file:change_mode(File, 8#755)
     end || {Name, Text} <- [{"id", "echo 1000"}, {"apt-get", "exit 99"}, {"apt-cache", "exit 0"}]],
    {1, Output} = run(?config(clone, Config), "env -i PATH=" ++ Bin ++ " HOME=" ++ Bin ++
                                              " sh scripts/setup"),
    ?assertMatch({match, _}, re:run(Output, "  sudo apt-get install -y --no-install-recommends "
                                            "erlang-base .*rebar3 elixir")).

setup_is_silent_when_nothing_is_missing(Config) ->
    ?assertEqual({0, ""}, run(?config(clone, Config), "sh scripts/setup")).

%% What some tests want is asked for once, and is no reason to stop.
setup_goes_on_without_tshark(Config) ->
    Clone = ?config(clone, Config),
    Bin = ?config(dir, Config),
    Tried = filename:join(Bin, "tried"),
    [begin
         File = filename:join(Bin, Name),
         ok = file:write_file(File, "#!/bin/sh\n" ++ Text ++ "\n"),
         ok = file:change_mode(File, 8#755)
     end || {Name, Text} <- [{"apt-get", "echo \"$*\" >>" ++ Tried ++ "; exit 100"},
                             {"id", "echo 0"}]],
    Path = "PATH=" ++ Bin ++ ":" ++ hidden(Config),
    Setup = fun() -> run(Clone, Path ++ " sh scripts/setup test") end,
    %% For tests alone.
    ?assertEqual({0, ""}, run(Clone, Path ++ " sh scripts/setup")),
    {0, Output} = Setup(),
    ?assertMatch({match, _}, re:run(Output, "no tshark")),
    {ok, Asked} = file:read_file(Tried),
    ?assertEqual(<<"install -y --no-install-recommends tshark\nupdate\n"
                   "install -y --no-install-recommends tshark\n">>, Asked),
    ?assertEqual({0, ""}, Setup()).

%% All programs of this system but for one.
hidden(Config) ->
    Dir = filename:join(?config(dir, Config), "programs"),
    ok = file:make_dir(Dir),
    [_ = file:make_symlink(File, filename:join(Dir, filename:basename(File)))
     || Path <- string:lexemes(os:getenv("PATH"), ":"), File <- filelib:wildcard(filename:join(Path, "*")),
        filename:basename(File) =/= "tshark"],
    Dir.

%% What people copy from the front page.
readme_example_runs(Config) ->
    {ok, Readme} = file:read_file(filename:join(?config(root, Config), "README.md")),
    {match, [[Code]]} = re:run(Readme, "```erlang\n(%% The client knows[^`]*)```",
                               [global, {capture, all_but_first, list}]),
    {ok, Tokens, _} = erl_scan:string(Code),
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    {value, {ok, <<"hello">>}, _} = erl_eval:exprs(Expressions, erl_eval:new_bindings()),
    ok.

%% The line by which people take a build to their brokers.
rabbitmq_gets_a_whole_copy(Config) ->
    Root = ?config(root, Config),
    _ = must(Root, "rebar3 compile"),
    {ok, Readme} = file:read_file(filename:join(Root, "examples/rabbitmq/README.md")),
    {match, [Line]} = re:run(Readme, "\n +(mkdir -p /opt/macula .*)\n", [{capture, all_but_first, list}]),
    Copy = filename:join([?config(dir, Config), "lib", "macula"]),
    _ = must(Root, lists:flatten(string:replace(Line, "/opt/macula", Copy, all))),
    [] = [File || File <- filelib:wildcard(Copy ++ "/*/*"),
                  {ok, #file_info{type = symlink}} <- [file:read_link_info(File)]],
    loads(filename:dirname(Copy)).

rabbitmq_clusters_over_quic(Config) ->
    case filelib:is_regular("/usr/lib/rabbitmq/bin/rabbitmq-server") of
        true ->
            Root = ?config(root, Config),
            _ = must(Root, "sh examples/rabbitmq/try " ++ code:lib_dir(macula)),
            ok;
        false ->
            {skip, "rabbitmq-server is not installed"}
    end.

%% ejabberdctl runs as root or as its own user alone.
ejabberd_clusters_over_quic(Config) ->
    case {filelib:is_regular("/usr/sbin/ejabberdctl"), string:trim(os:cmd("id -un"))} of
        {true, User} when User =:= "root"; User =:= "ejabberd" ->
            Root = ?config(root, Config),
            _ = must(Root, "sh examples/ejabberd/try " ++ code:lib_dir(macula)),
            ok;
        {true, _} ->
            {skip, "ejabberdctl does not run as this user"};
        {false, _} ->
            {skip, "ejabberd is not installed"}
    end.

%% Helpers

runs_rebar3_app(Dir) ->
    loads(filename:join(Dir, "_build/default/*")),
    helps(filename:join(Dir, "_build/default/*")),
    Output = must(Dir, "erl -noshell -pa " ++ pa(filename:join(Dir, "_build/default/*")) ++
                       " -s rebar3_app main"),
    ?assertMatch({match, _}, re:run(Output, "echoed 1048576 bytes over QUIC")).

%% A directory with these programs and no others.
only(Tools, Config) ->
    Bin = filename:join(?config(dir, Config), "bin"),
    ok = file:make_dir(Bin),
    [ok = file:make_symlink(os:find_executable(Tool), filename:join(Bin, Tool))
     || Tool <- Tools, os:find_executable(Tool) =/= false],
    Bin.

%% The NIF library is there and the VM takes it.
loads(Lib) ->
    Output = must(".", "erl -noshell -pa " ++ pa(Lib) ++
        " -eval 'io:format(\"~p\", [code:ensure_loaded(macula_nif)]), halt().'"),
    %% The VM may print warnings beside it.
    ?assertMatch({match, _}, re:run(Output, "\\{module,macula_nif\\}")).

%% `h' of the shell finds the documentation.
helps(Lib) ->
    Output = must(".", "echo 'h(macula_quic, connect).' | erl -pa " ++ pa(Lib)),
    ?assertMatch({match, _}, re:run(Output, "Connects to a host")).

pa(Lib) ->
    string:join(filelib:wildcard(Lib ++ "/*/ebin"), " ").

%% For each program of a command line, not for the first in a pipe alone.
env(Config) ->
    "export MACULA_TARGET_DIR='" ++ ?config(target, Config) ++
    "' GIT_TEMPLATE_DIR='" ++ filename:join(?config(priv_dir, Config), "git") ++ "'; ".

%% What git checks out with this template is as old as the clone that is there already. Cargo knows a
%% crate by its place in the workspace and looks at the age of its files: one compilation serves all
%% copies of the same sources, and none that is older than the clone does.
as_old_as(Clone, Template) ->
    Hook = filename:join(Template, "hooks/post-checkout"),
    ok = filelib:ensure_dir(Hook),
    ok = file:write_file(Hook, ["#!/bin/sh\ngit ls-files -z | xargs -0 touch -r '", Clone, "/Cargo.toml'\n"]),
    file:change_mode(Hook, 8#755).

%% A target directory beside the one in use: cargo names a crate's library without its path, so one
%% directory must not serve two trees at a time. The crates it depends on are copied, not compiled.
warm(Release, Target) ->
    case filelib:is_dir(Release) andalso not filelib:is_dir(Target) of
        true ->
            ok = filelib:ensure_dir(filename:join(Target, "x")),
            _ = must(Target, "cp -a " ++ Release ++ " ."),
            ok;
        false ->
            ok
    end.

target(Root) ->
    case os:getenv("MACULA_TARGET_DIR") of
        false -> filename:join(Root, "target/packaging");
        Dir -> filename:join(Dir, "packaging")
    end.

%% By its name there: cargo only warns of a profile for a crate that it does not know.
crate(Root) ->
    {ok, Manifest} = file:read_file(filename:join(Root, "native/macula/Cargo.toml")),
    {match, [Name]} = re:run(Manifest, "^name = \"(.*)\"$", [multiline, {capture, all_but_first, list}]),
    Name.

%% What git would give to others, with the changes not yet committed.
copy_tree(From, To) ->
    ok = filelib:ensure_dir(filename:join(To, "x")),
    _ = must(From, "git ls-files -co --exclude-standard -z | "
                   "xargs -0 sh -c 'for f; do [ -e \"$f\" ] && printf \"%s\\0\" \"$f\"; done' sh | "
                   "tar -c --null -T - | tar -x -C '" ++ To ++ "'"),
    ok.

must(Dir, Command) ->
    case run(Dir, Command) of
        {0, Output} -> Output;
        {Status, Output} -> ct:fail("~ts~nended with ~b:~n~ts", [Command, Status, Output])
    end.

run(Dir, Command) ->
    macula_test_run:run(Dir, Command).
