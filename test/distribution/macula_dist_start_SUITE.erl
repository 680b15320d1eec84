%% The ways nodes are started: real `erl' command lines, each an OS process as a shell starts it.
-module(macula_dist_start_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([start_line_with_epmd/1, killed_node_does_not_keep_its_name/1, start_line_without_epmd/1,
         longest_names_need_no_epmd/1,
         start_epmd_false_uses_one_that_runs/1, start_epmd_false_does_without_one/1,
         epmd_module_knows_hosts_and_ports/1, sname_nodes/1, hidden_node/1,
         macula_dist_port_is_where_the_node_listens/1, taken_dist_port_stops_the_start/1,
         bad_dist_port_stops_the_start_and_says_so/1, second_node_of_default_port_gets_another/1,
         remsh_in_a_terminal/1, one_shot_call/1, peer_nodes_over_the_distribution/1,
         release_in_embedded_mode_with_vm_args/1,
         release_with_an_on_load_that_needs_the_file_server/1, erl_flags_in_the_environment/1,
         simultaneous_dials_of_two/1, simultaneous_dials_of_a_mesh/1, proto_dist_twice_is_shouted_about/1,
         dynamic_node_name/1, net_kernel_start_stop_start/1, node_that_does_not_listen/1,
         two_dials_at_once_of_a_node_that_does_not_listen/1,
         ipv6_loopback/1, link_local_address/1, wrong_range_of_ports_stops_the_start_and_says_so/1,
         wrong_interface_stops_the_start_and_says_so/1,
         socket_options_of_the_kernel_are_obeyed_or_named/1, name_taken_is_refused/1,
         refused_nodes_are_seen_with_the_default_handler/1, connect_all_builds_the_mesh/1,
         works_without_the_application_started/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/3, call/4, node_of/1, connect/2,
                           eventually/1, eventually/2, needs_macula/1, os_erl/1, os_erl/2,
                           os_await/2, os_await/3, os_output/1, unique/1]).

-define(COOKIE, "start_cookie").

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [start_line_with_epmd, killed_node_does_not_keep_its_name, start_line_without_epmd,
     longest_names_need_no_epmd, start_epmd_false_uses_one_that_runs,
     start_epmd_false_does_without_one, epmd_module_knows_hosts_and_ports, sname_nodes, hidden_node,
     macula_dist_port_is_where_the_node_listens, taken_dist_port_stops_the_start,
     bad_dist_port_stops_the_start_and_says_so, second_node_of_default_port_gets_another,
     remsh_in_a_terminal, one_shot_call, peer_nodes_over_the_distribution,
     release_in_embedded_mode_with_vm_args,
     release_with_an_on_load_that_needs_the_file_server, erl_flags_in_the_environment,
     simultaneous_dials_of_two, simultaneous_dials_of_a_mesh, proto_dist_twice_is_shouted_about,
     dynamic_node_name, net_kernel_start_stop_start, node_that_does_not_listen,
     two_dials_at_once_of_a_node_that_does_not_listen, ipv6_loopback, link_local_address,
     wrong_range_of_ports_stops_the_start_and_says_so, wrong_interface_stops_the_start_and_says_so,
     socket_options_of_the_kernel_are_obeyed_or_named,
     refused_nodes_are_seen_with_the_default_handler,
     name_taken_is_refused, connect_all_builds_the_mesh, works_without_the_application_started].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- helpers --------------------------------------------------------------------------------------

%% Beside the line under test only what makes it report and not read a terminal.
line(Args, Eval) ->
    line(Args, Eval, []).

line(Args, Eval, Opts) ->
    os_erl(macula_dist_case:carrier_args() ++ Args ++ ["-noinput", "-eval", Eval], Opts).

long(Name) -> ["-name", Name, "-setcookie", ?COOKIE].

no_epmd() -> ["-no_epmd", "-start_epmd", "false"].

up() -> "io:format(\"up as ~s~n\", [node()]).".

ping(Node) -> "io:format(\"~s~n\", [net_adm:ping('" ++ Node ++ "')]).".

%% -- cases ----------------------------------------------------------------------------------------

%% erl -pa EBIN -proto_dist macula -name a@127.0.0.1 -setcookie C
start_line_with_epmd(_Config) ->
    %% Any node beside this one may have README's names.
    Names = [NameA, NameB] = [unique(N) || N <- ["a", "b"]],
    NodeA = NameA ++ "@127.0.0.1",
    A = line(long(NodeA), up()),
    ok = os_await(A, "up as " ++ NodeA),
    B = line(long(NameB ++ "@127.0.0.1"), ping(NodeA)),
    ok = os_await(B, "pong"),
    %% EPMD as usual: both are listed.
    Listed = os:cmd("epmd -names"),
    [match = re:run(Listed, "name " ++ N ++ " at port", [{capture, none}]) || N <- Names].

%% As a VM starts that nobody has configured: both ends say on standard output who was refused, and why.
refused_nodes_are_seen_with_the_default_handler(_Config) ->
    needs_macula(fun() ->
        [NodeA, NodeB] = [unique(N) ++ "@127.0.0.1" || N <- ["a", "b"]],
        A = line(long(NodeA), up()),
        ok = os_await(A, "up as " ++ NodeA),
        B = line(["-name", NodeB, "-setcookie", "another"], ping(NodeA)),
        ok = os_await(B, "pang"),
        ok = os_await(A, "macula_dist: .* refused: .*cookie"),
        ok = os_await(B, "macula_dist: connection to " ++ NodeA ++ " refused: .*cookie")
    end).

%% Its entry is left, and another process may have the number of its own.
killed_node_does_not_keep_its_name(Config) ->
    needs_macula(fun() ->
        case filelib:is_file("/proc/self/stat") of
            true -> name_of_a_killed_node(filename:join(proplists:get_value(priv_dir, Config), "home"));
            false -> {skip, "the system does not tell when a process was started"}
        end
    end).

name_of_a_killed_node(Home) ->
    Node = unique("a") ++ "@127.0.0.1",
    File = filename:join([Home, "nodes", Node]),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, ["4433 ", os:getpid(), " 1\n"]),
    Start = fun() -> line(no_epmd() ++ long(Node), up(), [{env, [{"MACULA_HOME", Home}]}]) end,
    ok = os_await(Start(), "up as " ++ Node),
    %% And a node that lives does.
    {Code, Output} = os_await(Start(), exit, 30000),
    true = Code =/= 0,
    match = re:run(Output, "seems to be in use", [{capture, none}]),
    ok.

%% erl -pa EBIN -proto_dist macula -no_epmd -start_epmd false -name 4433@127.0.0.1 -setcookie C
start_line_without_epmd(_Config) ->
    needs_macula(fun() ->
        %% Any node beside this one may have 4433, the default.
        [Port, Other] = [integer_to_list(macula_test_nodes:free_udp_port()) || _ <- [a, b]],
        Name = Port ++ "@127.0.0.1",
        Env = [{env, [{"ERL_EPMD_PORT", integer_to_list(macula_dist_case:free_tcp_port())}]}],
        A = line(no_epmd() ++ long(Name), up(), Env),
        ok = os_await(A, "up as " ++ Name),
        false = macula_test_nodes:is_udp_port_free(list_to_integer(Port)),
        B = line(no_epmd() ++ long(Other ++ "@127.0.0.1"), ping(Name), Env),
        ok = os_await(B, "pong"),
        %% No EPMD was started for either, nor asked.
        ok = os_await(os_erl(["-names"], [{exe, os:find_executable("epmd")} | Env]),
                      "[Cc]annot connect to local epmd")
    end).

%% OTP's limit is 255 characters, and that of a file's name 255 bytes.
longest_names_need_no_epmd(Config) ->
    needs_macula(fun() ->
        Home = {"MACULA_HOME", filename:join(proplists:get_value(priv_dir, Config), "long")},
        Env = [{env, [Home]}],
        [A, Other] = [string:pad(unique(Name), 245, trailing, $n) ++ "@127.0.0.1" || Name <- ["a", "b"]],
        255 = length(lists:flatten(A)),
        Name = lists:flatten(A),
        ok = os_await(line(no_epmd() ++ long(Name), up(), Env), "up as " ++ Name),
        ok = os_await(line(no_epmd() ++ long(lists:flatten(Other)), ping(Name), Env), "pong")
    end).

start_epmd_false_uses_one_that_runs(_Config) ->
    A = unique("a") ++ "@127.0.0.1",
    ok = os_await(line(long(A), up()), "up as"),
    B = unique("b") ++ "@127.0.0.1",
    P = line(["-start_epmd", "false"] ++ long(B), ping(A)),
    ok = os_await(P, "pong"),
    ok = os_await(line(long(unique("c") ++ "@127.0.0.1"), ping(B)), "pong").

start_epmd_false_does_without_one(_Config) ->
    needs_macula(fun() ->
        Env = [{env, [{"ERL_EPMD_PORT", integer_to_list(macula_dist_case:free_tcp_port())}]}],
        A = unique("a") ++ "@127.0.0.1",
        ok = os_await(line(["-start_epmd", "false"] ++ long(A), up(), Env), "up as"),
        B = line(["-start_epmd", "false"] ++ long(unique("b") ++ "@127.0.0.1"), ping(A), Env),
        ok = os_await(B, "pong")
    end).

%% A name service of one's own, as OTP's carriers let one have it.
epmd_module_knows_hosts_and_ports(_Config) ->
    Args = fun(Extra) ->
        Extra ++ ["-epmd_module", "macula_dist_case", "-pa",
                  filename:dirname(code:which(macula_dist_case))]
    end,
    A = unique("a") ++ "@nowhere",
    P = line(Args(["-sname", A, "-setcookie", ?COOKIE]),
             "{ok, Port} = application:get_env(kernel, registered_port), "
             "io:format(\"port ~b.~n\", [Port])."),
    ok = os_await(P, "port [0-9]+\\."),
    {match, [Port]} = re:run(element(1, os_output(P)), "port ([0-9]+)\\.",
                             [{capture, all_but_first, list}]),
    Q = line(Args(["-sname", unique("b") ++ "@nowhere", "-setcookie", ?COOKIE, "-port_of_all", Port]),
             ping(A)),
    ok = os_await(Q, "pong").

sname_nodes(_Config) ->
    Name = unique("s"),
    A = line(["-sname", Name, "-setcookie", ?COOKIE], up()),
    ok = os_await(A, "up as " ++ Name ++ "@"),
    {ok, Host} = inet:gethostname(),
    B = line(["-sname", unique("t"), "-setcookie", ?COOKIE],
             ping(Name ++ "@" ++ hd(string:lexemes(Host, ".")))),
    ok = os_await(B, "pong").

hidden_node(_Config) ->
    A = unique("a") ++ "@127.0.0.1",
    VisiblePid = line(long(A), up()),
    ok = os_await(VisiblePid, "up as"),
    H = line(long(unique("h") ++ "@127.0.0.1") ++ ["-hidden"],
             "io:format(\"~p~n\", [{net_adm:ping('" ++ A ++ "'), "
             "rpc:call('" ++ A ++ "', erlang, nodes, []), "
             "rpc:call('" ++ A ++ "', erlang, nodes, [hidden]) =:= [node()]}])."),
    ok = os_await(H, "{pong,\\[\\],true}").

macula_dist_port_is_where_the_node_listens(_Config) ->
    needs_macula(fun() ->
        Port = macula_test_nodes:free_udp_port(),
        A = unique("a") ++ "@127.0.0.1",
        P = line(long(A) ++ ["-macula_dist_port", integer_to_list(Port)], up()),
        ok = os_await(P, "up as"),
        false = macula_test_nodes:is_udp_port_free(Port),
        B = line(long(unique("b") ++ "@127.0.0.1"), ping(A)),
        ok = os_await(B, "pong")
    end).

%% A port asked for by name is never exchanged for another in silence.
taken_dist_port_stops_the_start(_Config) ->
    needs_macula(fun() ->
        {ok, Socket} = gen_udp:open(0),
        {ok, Port} = inet:port(Socket),
        P = line(long(unique("a") ++ "@127.0.0.1")
                 ++ ["-macula_dist_port", integer_to_list(Port)], up()),
        {Code, Output} = os_await(P, exit, 30000),
        true = Code =/= 0,
        match = re:run(Output, "eaddrinuse", [{capture, none}]),
        ok = gen_udp:close(Socket)
    end).

bad_dist_port_stops_the_start_and_says_so(_Config) ->
    needs_macula(fun() ->
        lists:foreach(fun(Bad) ->
            P = line(long(unique("a") ++ "@127.0.0.1") ++ ["-macula_dist_port", Bad], up()),
            {Code, Output} = os_await(P, exit, 30000),
            true = Code =/= 0,
            match = re:run(Output, "macula_dist_port", [{capture, none}])
        end, ["no_number", "65536", "-1x"])
    end).

second_node_of_default_port_gets_another(_Config) ->
    Nodes = [A, B, C] = [unique(N) ++ "@127.0.0.1" || N <- ["a", "b", "c"]],
    Ps = [line(long(N), up()) || N <- Nodes],
    [ok = os_await(P, "up as") || P <- Ps],
    D = line(long(unique("d") ++ "@127.0.0.1"),
             "io:format(\"~p~n\", [[net_adm:ping(list_to_atom(N)) || N <- [\"" ++ A ++ "\", \"" ++ B
             ++ "\", \"" ++ C ++ "\"]]])."),
    ok = os_await(D, "\\[pong,pong,pong\\]").

%% A shell on a remote node, in a pseudo terminal.
remsh_in_a_terminal(_Config) ->
    case os:find_executable("script") of
        false -> {skip, "script(1) gives the pseudo terminal"};
        Script ->
            A = unique("a") ++ "@127.0.0.1",
            ok = os_await(line(long(A), up()), "up as"),
            Command = string:join(
                ["exec", os:find_executable("erl") | macula_dist_case:carrier_args()]
                ++ long(unique("r") ++ "@127.0.0.1") ++ ["-hidden", "-remsh", A], " "),
            R = #{collector := Collector} = os_erl(["-qec", Command, "/dev/null"],
                       [{exe, Script}, {env, [{"TERM", "xterm"}]}]),
            ok = os_await(R, "\\(" ++ A ++ "\\)1>"),
            Collector ! {input, <<"{over, 6*7, node()}.\n">>},
            ok = os_await(R, "{over,42,'" ++ A ++ "'}")
    end.

%% What scripts do: a hidden node calls once and is gone.
one_shot_call(_Config) ->
    A = unique("a") ++ "@127.0.0.1",
    ok = os_await(line(long(A), up()), "up as"),
    P = line(long(unique("once") ++ "@127.0.0.1") ++ ["-hidden"],
             "io:format(\"~p~n\", [rpc:call('" ++ A ++ "', lists, sum, [[40, 2]])]), halt(0)."),
    {0, Output} = os_await(P, exit, 30000),
    match = re:run(Output, "42", [{capture, none}]),
    ok.

%% OTP's peer module with the distribution itself as control connection.
peer_nodes_over_the_distribution(_Config) ->
    A = start(a),
    Cookie = atom_to_list(call(A, erlang, get_cookie, [])),
    Args = macula_dist_case:carrier_args() ++ ["-setcookie", Cookie],
    ok = call(A, fun() ->
        Names = [peer:random_name() || _ <- lists:seq(1, 2)],
        Peers = [peer:start_link(#{name => N, host => "127.0.0.1", longnames => true,
                                   args => Args}) || N <- Names],
        Nodes = [Node || {ok, _, Node} <- Peers],
        2 = length(Nodes),
        [N1, N2] = Nodes,
        N1 = erpc:call(N1, erlang, node, []),
        pong = erpc:call(N1, net_adm, ping, [N2]),
        lists:foreach(fun({ok, P, _}) -> ok = peer:stop(P) end, Peers)
    end),
    ok = eventually(fun() -> call(A, erlang, nodes, []) =:= [] end).

%% A boot script with the application in it, embedded mode, everything else in a vm.args: modules
%% that are not in the boot script cannot be loaded, so none may be missing when the kernel starts
%% the distribution.
release_in_embedded_mode_with_vm_args(Config) ->
    Dir = release(release, Config, []),
    {A, P} = start_release(Dir, []),
    ok = os_await(P, "up as " ++ A),
    B = line(long(unique("b") ++ "@127.0.0.1"),
             "io:format(\"mode ~p~n\", [rpc:call('" ++ A ++ "', code, get_mode, [])])."),
    ok = os_await(B, "mode " ++ mode()).

%% Other libraries' on_load functions run when the kernel's processes are there, the file server among
%% them; and a node that waits for another while it boots finds that one before.
release_with_an_on_load_that_needs_the_file_server(Config) ->
    needs_macula(fun() ->
        Dir = release(hostile, Config, [hostile_application(Config)]),
        Peer = start(a, #{cookie => ?COOKIE}),
        Sync = ["-kernel", "sync_nodes_mandatory", "['" ++ atom_to_list(node_of(Peer)) ++ "']",
                "-kernel", "sync_nodes_timeout", "20000"],
        lists:foreach(fun(Extra) ->
            {A, P} = start_release(Dir, Extra ++ [
                "-eval", "io:format(\"hostile ~p ~p~n\", "
                         "[macula_hostile:loaded(), nodes()])."]),
            ok = os_await(P, "up as " ++ A),
            ok = os_await(P, "hostile true"),
            ok = os_await(line(long(unique("b") ++ "@127.0.0.1"), ping(A)), "pong")
        end, [[], Sync])
    end).

%% An application whose one module asks the file server as soon as it is loaded.
hostile_application(Config) ->
    Dir = filename:join(proplists:get_value(priv_dir, Config), "macula_hostile-1/ebin"),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    Source = filename:join(Dir, "macula_hostile.erl"),
    ok = file:write_file(Source,
        "-module(macula_hostile).\n-export([loaded/0]).\n-on_load(init/0).\n"
        "init() -> {ok, _} = file:list_dir(\".\"), "
        "true = is_pid(whereis(file_server_2)), persistent_term:put(?MODULE, true).\n"
        "loaded() -> persistent_term:get(?MODULE).\n"),
    {ok, macula_hostile} = compile:file(Source, [{outdir, Dir}]),
    ok = file:write_file(filename:join(Dir, "macula_hostile.app"),
        "{application, macula_hostile, [{description, \"\"}, {vsn, \"1\"}, "
        "{modules, [macula_hostile]}, {registered, []}, {applications, [kernel, stdlib]}]}.\n"),
    {macula_hostile, "1", Dir}.

release(Name, Config, Extra) ->
    Dir = filename:join(proplists:get_value(priv_dir, Config), Name),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    Apps = release_apps() ++ [{App, Vsn} || {App, Vsn, _} <- Extra],
    Rel = {release, {"start_test", "1"}, {erts, erlang:system_info(version)}, Apps},
    ok = file:write_file(filename:join(Dir, "start_test.rel"), io_lib:format("~p.~n", [Rel])),
    Ebin = filename:dirname(code:which(macula_app)),
    {ok, _, _} = systools:make_script(filename:join(Dir, "start_test"),
                                      [{path, [Ebin | [E || {_, _, E} <- Extra]]}, {outdir, Dir},
                                       local, silent, no_warn_sasl]),
    Dir.

start_release(Dir, Args) ->
    A = unique("rel") ++ "@127.0.0.1",
    VmArgs = filename:join(Dir, A ++ ".args"),
    Pa = case os:getenv("MACULA_TEST_CARRIER_PA") of false -> ""; D -> "-pa " ++ D ++ "\n" end,
    ok = file:write_file(VmArgs, [
        "## Name of the node\n-name ", A, "\n\n-setcookie ", ?COOKIE, "\n", Pa,
        "-proto_dist ", macula_dist_case:carrier(), "\n+K true\n-kernel net_ticktime 30\n"]),
    P = os_erl(["-mode", mode(), "-boot", filename:join(Dir, "start_test"), "-args_file", VmArgs,
                "-noinput", "-eval", up() | Args]),
    {A, P}.

%% The carriers this suite is proven on are not all part of an application.
mode() ->
    case macula_dist_case:carrier() of
        "gen_tcp" -> "interactive";
        _ -> "embedded"
    end.

release_apps() ->
    _ = application:load(macula),
    {ok, Needed} = application:get_key(macula, applications),
    All = lists:usort(closure([kernel, stdlib, sasl, macula | Needed], [])),
    [{App, vsn(App)} || App <- [kernel, stdlib], lists:member(App, All)]
        ++ [{App, vsn(App)} || App <- All, App =/= kernel, App =/= stdlib].

closure([], Seen) -> Seen;
closure([App | Rest], Seen) ->
    case lists:member(App, Seen) of
        true -> closure(Rest, Seen);
        false ->
            _ = application:load(App),
            {ok, Needs} = application:get_key(App, applications),
            closure(Needs ++ Rest, [App | Seen])
    end.

vsn(App) ->
    _ = application:load(App),
    {ok, Vsn} = application:get_key(App, vsn),
    Vsn.

%% RabbitMQ and many scripts hand the flags over in the environment.
erl_flags_in_the_environment(_Config) ->
    A = unique("a") ++ "@127.0.0.1",
    Flags = string:join(macula_dist_case:carrier_args(), " "),
    P = os_erl(long(A) ++ ["-noinput", "-eval", up()], [{env, [{"ERL_AFLAGS", Flags}]}]),
    ok = os_await(P, "up as"),
    Q = os_erl(long(unique("b") ++ "@127.0.0.1") ++ ["-noinput", "-eval", ping(A)],
               [{env, [{"ERL_FLAGS", Flags}]}]),
    ok = os_await(Q, "pong").

%% Both dial at the same moment, again and again: one connection comes of it, known to both.
simultaneous_dials_of_two(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    NodeA = node_of(A),
    NodeB = node_of(B),
    Self = self(),
    lists:foreach(fun(Round) ->
        true = call(A, erlang, disconnect_node, [NodeB]),
        ok = eventually(fun() -> not macula_dist_case:connected(A, B)
                                 andalso not macula_dist_case:connected(B, A) end),
        At = erlang:system_time(millisecond) + 30,
        Dial = fun(Target) -> fun() ->
            Wait = At - erlang:system_time(millisecond),
            receive after max(0, Wait) -> ok end,
            net_adm:ping(Target)
        end end,
        [spawn_link(fun() -> Self ! {Round, call(N, Dial(T))} end)
         || {N, T} <- [{A, NodeB}, {B, NodeA}]],
        [receive {Round, Result} -> pong = Result after 20000 -> error({no_answer, Round}) end
         || _ <- [1, 2]],
        [1] = lists:usort([length(macula_dist_case:controllers(N)) || N <- [A, B]])
    end, lists:seq(1, 30)).

simultaneous_dials_of_a_mesh(_Config) ->
    Nodes = [start(N) || N <- ["a", "b", "c", "d", "e"]],
    Names = [node_of(N) || N <- Nodes],
    Self = self(),
    [spawn_link(fun() -> Self ! {N, call(N, fun() ->
        [net_adm:ping(Name) || Name <- Names, Name =/= node()]
    end)} end) || N <- Nodes],
    [receive {N, Pings} -> [pong, pong, pong, pong] = Pings after 30000 -> error(no_answer) end
     || N <- Nodes],
    [4 = length(macula_dist_case:controllers(N)) || N <- Nodes],
    ok.

%% Before OTP 27.1 the flag counts for nothing when it stands twice, and the node talks plain TCP; from
%% then on the first counts. Whoever asked for encryption and has none must be told in a way that
%% cannot be overlooked, and whoever has it must not.
proto_dist_twice_is_shouted_about(_Config) ->
    needs_macula(fun() ->
        Started = "{ok, _} = application:ensure_all_started(macula), ",
        %% The start lines do without the application: then who asks is told.
        Asked = "#{} = macula_dist:info(), ",
        Say = "io:format(\"carrier ~s~n\", [case persistent_term:get({macula_dist_listen, endpoint}, none) of "
              "none -> other; _ -> macula end]), ",
        Carriers = lists:map(fun({Extra, Env, Eval}) ->
            P = os_erl(macula_dist_case:carrier_args() ++ Extra
                       ++ long(unique("a") ++ "@127.0.0.1")
                       ++ ["-noinput", "-eval", Say ++ Eval ++ "init:stop()."],
                       [{env, Env}]),
            {0, Output} = os_await(P, exit, 30000),
            Shouted = re:run(Output, "proto_dist is given 2 times.*UNENCRYPTED",
                             [{capture, none}, dotall]) =:= match,
            {match, [Carrier]} = re:run(Output, "carrier ([a-z]+)", [{capture, all_but_first, list}]),
            Shouted = Carrier =:= "other",
            Carrier
        end, [{["-proto_dist", "macula"], [], Started},
              {[], [{"ERL_AFLAGS", "-proto_dist macula"}], Started},
              {[], [{"ERL_AFLAGS", "-proto_dist macula"}], Asked},
              {[], [{"ERL_AFLAGS", "-proto_dist inet_tcp"}], Asked}]),
        ct:log("~p", [Carriers]),
        %% One flag with two values is one flag.
        P = os_erl(macula_dist_case:carrier_args() ++ ["inet_tcp"] ++ long(unique("a") ++ "@127.0.0.1")
                   ++ ["-noinput", "-eval", Say ++ Asked ++ "init:stop()."]),
        {0, Both} = os_await(P, exit, 30000),
        match = re:run(Both, "carrier macula", [{capture, none}]),
        nomatch = re:run(Both, "UNENCRYPTED", [{capture, none}])
    end).

%% The node that is asked gives the name.
dynamic_node_name(_Config) ->
    A = start(a, #{longnames => false}),
    NodeA = atom_to_list(node_of(A)),
    Cookie = atom_to_list(call(A, erlang, get_cookie, [])),
    P = os_erl(macula_dist_case:carrier_args()
               ++ ["-sname", "undefined", "-setcookie", Cookie, "-noinput", "-eval",
                   "true = net_kernel:connect_node('" ++ NodeA ++ "'), "
                   "io:format(\"named ~s ~p~n\", [node(), "
                   "rpc:call('" ++ NodeA ++ "', erlang, nodes, [connected]) =:= [node()]])."]),
    ok = os_await(P, "named [A-Z0-9]+@[^ ]+ true").

net_kernel_start_stop_start(_Config) ->
    {ok, N0} = macula_test_nodes:start(#{carrier => none,
                                         args => macula_dist_case:carrier_args()}),
    N = N0#{log => "none"},
    B = start(b),
    Cookie = call(B, erlang, get_cookie, []),
    lists:foreach(fun(_) ->
        Name = list_to_atom(unique("again") ++ "@127.0.0.1"),
        {ok, _} = call(N, net_kernel, start, [[Name, longnames]]),
        true = call(N, erlang, set_cookie, [Cookie]),
        pong = call(N, net_adm, ping, [node_of(B)]),
        ok = call(N, net_kernel, stop, []),
        %% The name goes when the VM has cleaned up, which may be after stop/0 has returned.
        ok = eventually(fun() -> call(N, erlang, node, []) =:= nonode@nohost end),
        ok = eventually(fun() -> call(B, erlang, nodes, [connected]) =:= [] end)
    end, lists:seq(1, 3)),
    macula_test_nodes:stop(N).

%% -dist_listen false: dials out, cannot be dialled, implies hidden.
node_that_does_not_listen(_Config) ->
    A = start(a),
    NodeA = atom_to_list(node_of(A)),
    Cookie = atom_to_list(call(A, erlang, get_cookie, [])),
    P = os_erl(macula_dist_case:carrier_args()
               ++ ["-name", unique("mute") ++ "@127.0.0.1", "-dist_listen", "false",
                   "-setcookie", Cookie, "-noinput", "-eval", ping(NodeA)]),
    ok = os_await(P, "pong").

%% The first dials of such a node make its endpoint; there is one, whoever dials.
two_dials_at_once_of_a_node_that_does_not_listen(_Config) ->
    needs_macula(fun() ->
        Peers = [node_of(start(Name)) || Name <- ["a", "b", "c", "d"]],
        lists:foreach(fun(_) ->
            N = start(mute, #{args => ["-dist_listen", "false"]}),
            Endpoints = call(N, fun() ->
                Dials = [spawn_monitor(fun() ->
                    receive go -> exit(net_kernel:connect_node(Peer)) end
                end) || Peer <- Peers],
                [Pid ! go || {Pid, _} <- Dials],
                [receive {'DOWN', M, process, Pid, true} -> ok end || {Pid, M} <- Dials],
                %% An endpoint too many goes with its last reference.
                _ = [erlang:garbage_collect(P) || P <- erlang:processes()],
                proplists:get_value(dist_endpoint, macula_nif:live_objects())
            end),
            1 = Endpoints,
            %% A link of an endpoint that has gone would be gone, too.
            [pong = call(N, net_adm, ping, [Peer]) || Peer <- Peers],
            Peers = lists:sort(call(N, erlang, nodes, [connected])),
            macula_dist_case:stop(N)
        end, lists:seq(1, 5))
    end).

ipv6_loopback(_Config) ->
    needs_macula(fun() ->
        case gen_udp:open(0, [inet6, {ip, {0, 0, 0, 0, 0, 0, 0, 1}}]) of
            {error, _} -> {skip, "no IPv6 here"};
            {ok, Socket} ->
                ok = gen_udp:close(Socket),
                A = unique("six") ++ "@::1",
                ok = os_await(line(long(A), up()), "up as six"),
                B = line(long(unique("b") ++ "@::1"), ping(A)),
                ok = os_await(B, "pong")
        end
    end).

%% Such an address counts on one link only, so the interface belongs to it wherever it stands.
link_local_address(_Config) ->
    needs_macula(fun() ->
        case link_local() of
            none ->
                {skip, "no interface has a link-local address"};
            {Interface, Ip} ->
                Address = inet:ntoa(Ip) ++ "%" ++ Interface,
                Port = integer_to_list(macula_test_nodes:free_udp_port()),
                A = Port ++ "@" ++ Address,
                Bind = ["-kernel", "inet_dist_use_interface", io_lib:format("~p", [Address])],
                ok = os_await(line(no_epmd() ++ long(A) ++ [lists:flatten(B) || B <- Bind], up()),
                              "up as " ++ A),
                B = line(no_epmd() ++ long(unique("b") ++ "@127.0.0.1"),
                         "io:format(\"~s ~w~n\", [net_adm:ping('" ++ A ++ "'), "
                         "maps:get(address, element(2, macula_dist:info('" ++ A ++ "')))])."),
                {ok, Index} = net:if_name2index(Interface),
                {16#fe80, _, _, _, _, _, _, _} = Ip,
                ok = os_await(B, "pong {{65152,.*}," ++ Port ++ "," ++ integer_to_list(Index) ++ "}")
        end
    end).

link_local() ->
    {ok, Interfaces} = inet:getifaddrs(),
    case [{Name, Ip} || {Name, Options} <- Interfaces, lists:member(up, proplists:get_value(flags, Options)),
                        {addr, Ip = {16#fe80, _, _, _, _, _, _, _}} <- Options] of
        [First | _] -> First;
        [] -> none
    end.

wrong_range_of_ports_stops_the_start_and_says_so(_Config) ->
    needs_macula(fun() ->
        lists:foreach(fun({Min, Max, Named}) ->
            P = line(long(unique("a") ++ "@127.0.0.1")
                     ++ ["-kernel", "inet_dist_listen_min", Min, "inet_dist_listen_max", Max], up()),
            {Code, Output} = os_await(P, exit, 30000),
            true = Code =/= 0,
            match = re:run(Output, "bad_option,\\s*" ++ Named, [{capture, none}])
        end, [{"19105", "19101", "inet_dist_listen_max"}, {"65535", "65536", "inet_dist_listen_max"},
              {"70000", "70001", "inet_dist_listen_min"}])
    end).

wrong_interface_stops_the_start_and_says_so(_Config) ->
    needs_macula(fun() ->
        lists:foreach(fun(Bad) ->
            P = line(long(unique("a") ++ "@127.0.0.1")
                     ++ ["-kernel", "inet_dist_use_interface", Bad], up()),
            {Code, Output} = os_await(P, exit, 30000),
            true = Code =/= 0,
            match = re:run(Output, "bad_option,\\s*inet_dist_use_interface", [{capture, none}])
        end, ["{127,0,0,300}", "{127,0,0}", "\"fe80::1%nosuchinterface\"", "lo"])
    end).

socket_options_of_the_kernel_are_obeyed_or_named(_Config) ->
    needs_macula(fun() ->
        %% A port of its own: a node of another suite may have the default one, for IPv4 alone.
        Port = macula_test_nodes:free_udp_port(),
        N = start(a, #{args => ["-macula_dist_port", integer_to_list(Port), "-kernel", "inet_dist_listen_options",
                                "[{recbuf,65536},{nodelay,true},{keepalive,true},{ipv6_v6only,true}]",
                                "inet_dist_connect_options", "[{sndbuf,70000},{recbuf,1},inet6]"]}),
        Port = macula_dist_case:port_of(N),
        %% IPv4 is left to others: were the socket of both families, the port would be taken.
        {ok, Socket} = gen_udp:open(Port, [inet, {ip, {127, 0, 0, 1}}]),
        ok = gen_udp:close(Socket),
        [true = macula_dist_case:logged(N, Named)
         || Named <- ["{keepalive,true} of inet_dist_listen_options is not obeyed",
                      "{recbuf,1} of inet_dist_connect_options is not obeyed",
                      "inet6 of inet_dist_connect_options is not obeyed"]],
        [false = macula_dist_case:logged(N, Obeyed)
         || Obeyed <- ["nodelay", "{sndbuf,70000}", "{recbuf,65536}", "ipv6_v6only"]],
        case os:find_executable("ss") of
            false ->
                ok;
            Ss ->
                %% Linux takes twice the size, for its own needs.
                Shown = os:cmd(Ss ++ " -uamnH sport = :" ++ integer_to_list(Port)),
                match = re:run(Shown, "rb131072,.*tb140000,", [{capture, none}, dotall])
        end,
        Bad = line(long(unique("b") ++ "@127.0.0.1")
                   ++ ["-kernel", "inet_dist_listen_options", "[{recbuf,none}]"], up()),
        {Code, Output} = os_await(Bad, exit, 30000),
        true = Code =/= 0,
        match = re:run(Output, "bad_option,\\s*inet_dist_listen_options", [{capture, none}])
    end).

name_taken_is_refused(_Config) ->
    A = unique("a") ++ "@127.0.0.1",
    ok = os_await(line(long(A), up()), "up as"),
    P = line(long(A), up()),
    {Code, _} = os_await(P, exit, 30000),
    true = Code =/= 0.

connect_all_builds_the_mesh(_Config) ->
    Nodes = [A | Rest] = [start(N) || N <- ["a", "b", "c", "d"]],
    [ok = connect(N, A) || N <- Rest],
    ok = eventually(fun() ->
        lists:all(fun(N) -> length(call(N, erlang, nodes, [])) =:= 3 end, Nodes)
    end).

%% The carrier serves a plain `erl' in which nobody ever starts the application.
works_without_the_application_started(_Config) ->
    A = start(a),
    B = start(b),
    ok = connect(A, B),
    [false = lists:keymember(macula, 1, call(N, application, which_applications, []))
     || N <- [A, B]],
    ok.
