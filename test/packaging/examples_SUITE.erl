%% The small programs in examples/echo, run as their README says.
-module(examples_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([echo_in_erlang/1, echo_in_elixir/1, a_client_waits_for_its_connection/1, examples_are_short/1]).

suite() ->
    [{timetrap, {minutes, 3}}].

all() ->
    [examples_are_short, echo_in_erlang, a_client_waits_for_its_connection, echo_in_elixir].

examples_are_short(Config) ->
    Files = [_, _, _, _] = filelib:wildcard(filename:join(dir(Config), "*.{erl,ex}")),
    [begin
         {ok, Text} = file:read_file(File),
         Lines = length(binary:split(string:trim(Text), <<"\n">>, [global])),
         ?assert(Lines < 40, {File, Lines})
     end || File <- Files].

echo_in_erlang(Config) ->
    ok = build(Config),
    Dir = ?config(priv_dir, Config),
    Program = program(Config, "erlang"),
    Output = must(Config, "erl -noshell -pa " ++ ebin() ++ " -pa " ++ Dir ++ " -eval '" ++
                  lists:droplast(Program) ++ ", io:format(\"all is well~n\"), halt().'"),
    ?assertMatch({match, _}, re:run(Output, "all is well")).

%% A request before the connection is there, several at once, and one that is large.
a_client_waits_for_its_connection(Config) ->
    ok = build(Config),
    true = code:add_patha(?config(priv_dir, Config)),
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["localhost"]),
    {ok, Server} = echo_server:start_link({"127.0.0.1", 0}, #{cert => Cert, key => Key}),
    {ok, {_, Port}} = macula_quic:sockname(macula_quic_connection:get_listener(Server)),
    {ok, Client} = echo_client:start_link("127.0.0.1", Port, #{verify_pubkey => Public}),
    Large = crypto:strong_rand_bytes(1 bsl 20),
    Requests = [{gen_server:send_request(Client, {request, Data}), Data}
                || Data <- [<<"first">>, Large | [<<N:32>> || N <- lists:seq(1, 50)]]],
    [?assertEqual({reply, {ok, Data}}, gen_server:wait_response(Request, 30000)) || {Request, Data} <- Requests],
    ok = gen_server:stop(Client),
    ok = gen_server:stop(Server).

echo_in_elixir(Config) ->
    case os:find_executable("elixir") of
        false ->
            {skip, "Elixir is not installed"};
        _ ->
            Program = filename:join(?config(priv_dir, Config), "try.exs"),
            ok = file:write_file(Program, [program(Config, "elixir"), "\nIO.puts(\"all is well\")\n"]),
            Output = must(Config, "elixir -pa " ++ ebin() ++ " -r echo_server.ex -r echo_client.ex " ++ Program),
            ?assertMatch({match, _}, re:run(Output, "all is well")),
            ?assertEqual(nomatch, re:run(Output, "warning"))
    end.

%% Helpers

build(Config) ->
    Output = must(Config, "erlc -Wall -pa " ++ ebin() ++ " -o " ++ ?config(priv_dir, Config) ++ " *.erl"),
    ?assertEqual("", Output),
    ok.

%% What the README says, with a port that is free.
program(Config, Language) ->
    {ok, Readme} = file:read_file(filename:join(dir(Config), "README.md")),
    {match, [Code]} = re:run(Readme, "```" ++ Language ++ "\n([^`]*)\n```", [{capture, all_but_first, list}]),
    Port = integer_to_list(macula_test_nodes:free_udp_port()),
    lists:flatten(string:replace(Code, "4433", Port, all)).

dir(_Config) ->
    filename:join(macula_test_run:root(), "examples/echo").

ebin() ->
    filename:join(code:lib_dir(macula), "ebin").

must(Config, Command) ->
    case macula_test_run:run(dir(Config), Command) of
        {0, Output} -> Output;
        {Status, Output} -> ct:fail("~ts~nended with ~b:~n~ts", [Command, Status, Output])
    end.
