%% Where the system gives no more threads, as in a container with a limit on processes, everything that
%% needs one says so, shows no key, and works once there are threads again.
-module(macula_threads_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([listening_without_threads/1, dialling_without_threads/1, searching_without_threads/1,
         distribution_without_threads/1]).

-import(macula_dist_case, [call/2, call/4]).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [listening_without_threads, dialling_without_threads, searching_without_threads,
     distribution_without_threads].

init_per_suite(Config) ->
    case {os:type(), os:find_executable("setpriv"), os:find_executable("prlimit"), os:cmd("id -u")} of
        {{unix, linux}, SetPriv, PrLimit, "0\n"} when is_list(SetPriv), is_list(PrLimit) ->
            macula_dist_case:suite_begin(Config);
        _ ->
            {skip, "needs Linux, setpriv, prlimit, and root to become another user"}
    end.

end_per_suite(Config) -> macula_dist_case:suite_end(Config).

%% A node of a nobody, as the limit does not count for root, that could be a node of the distribution
%% and is none yet.
init_per_testcase(_Case, Config) ->
    Erl = filename:join([code:root_dir(), "bin", "erl"]),
    Nobody = ["--reuid=65533", "--regid=65533", "--clear-groups", "--inh-caps=-all", Erl],
    Home = filename:join("/tmp", "macula-threads-" ++ os:getpid()),
    _ = os:cmd("mkdir -p -m 777 " ++ Home),
    {ok, Node} = macula_test_nodes:start(
        #{carrier => none, exec => {os:find_executable("setpriv"), Nobody},
          env => [{"HOME", Home}, {"MACULA_HOME", Home}],
          args => ["-proto_dist", "macula", "-no_epmd", "-start_epmd", "false", "-setcookie", "threads"]}),
    {Public, Private} = call(Node, crypto, generate_key, [eddsa, ed25519]),
    {ok, {Cert, Key}} = call(Node, macula_quic, generate_self_signed_cert,
                             [Public, Private, ["localhost"]]),
    [{node, Node}, {home, Home}, {private, Private}, {cert, Cert}, {key, Key} | Config].

end_per_testcase(_Case, Config) ->
    ok = macula_test_nodes:stop(?config(node, Config)),
    ok = file:del_dir_r(?config(home, Config)).

%% Of the VM alone: the process that starts programs for it has its own.
limit(#{os_pid := OsPid} = Node, Limit) ->
    "" = call(Node, os, cmd, ["prlimit --pid " ++ OsPid ++ " --nproc=" ++ Limit ++ ": 2>&1"]),
    ok.

%% The error while there are no threads, and the result of the next try when there are.
without_and_with(Config, Try) ->
    Node = ?config(node, Config),
    limit(Node, "1"),
    Refused = call(Node, fun() -> catch Try() end),
    ct:log("~0tp", [Refused]),
    %% As it may stand in a log.
    Shown = unicode:characters_to_binary(io_lib:format("~0tp ~0w", [Refused, Refused])),
    Private = ?config(private, Config),
    [?assertEqual(nomatch, binary:match(Where, What))
     || Where <- [Shown, term_to_binary(Refused)],
        What <- [binary:part(?config(key, Config), 40, 20), Private,
                 unicode:characters_to_binary(io_lib:format("~w", [binary_to_list(Private)]))]],
    limit(Node, "5000"),
    {Refused, call(Node, Try)}.

listening_without_threads(Config) ->
    Options = #{cert => ?config(cert, Config), key => ?config(key, Config), alpn => ["test"]},
    ?assertMatch({{error, eagain}, {ok, _}},
                 without_and_with(Config, fun() ->
                     macula_quic:listen("127.0.0.1", 0, Options)
                 end)),
    ?assertNotEqual("eagain", macula_quic:format_error({error, eagain})).

dialling_without_threads(Config) ->
    Options = #{cert => ?config(cert, Config), key => ?config(key, Config), alpn => ["test"],
                verify => verify_none},
    %% Nobody serves it: that is known once there are threads.
    ?assertEqual({{error, eagain}, {error, econnrefused}},
                 without_and_with(Config, fun() ->
                     macula_quic:connect("127.0.0.1", 9, Options, 5000)
                 end)).

searching_without_threads(Config) ->
    ?assertMatch({{error, eagain}, {ok, _}},
                 without_and_with(Config, fun() -> macula_identity:generate(#{puzzle_bits => 1}) end)).

distribution_without_threads(Config) ->
    {Refused, Started} = without_and_with(Config, fun() ->
        net_kernel:start(['threads@127.0.0.1', longnames])
    end),
    ?assertMatch({error, _}, Refused),
    ?assertMatch({ok, _}, Started),
    ?assertEqual('threads@127.0.0.1', call(?config(node, Config), erlang, node, [])).
