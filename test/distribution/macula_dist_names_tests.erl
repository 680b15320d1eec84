%% Names, as the distribution reads them.
-module(macula_dist_names_tests).

-include_lib("eunit/include/eunit.hrl").

a_name_that_is_a_port_carries_its_port_test() ->
    ?assertEqual({4433, "10.0.0.5"}, macula_dist:splitname('4433@10.0.0.5')),
    ?assertEqual({1, "host"}, macula_dist:splitname("1@host")),
    ?assertEqual({65535, "::1"}, macula_dist:splitname("65535@::1")).

another_name_carries_none_test() ->
    [?assertEqual(false, macula_dist:splitname(Name))
     || Name <- ['a@host', '0@host', '65536@host', '99999@host', '123456@host', '44a33@host',
                 '-1@host', "host", "", "@host", "4433@", "4433@a@b", '4433']].

names_are_split_at_their_only_at_sign_test() ->
    ?assertEqual({"a", "b"}, macula_dist_discovery:split('a@b')),
    ?assertEqual({"a1", "b.c.d"}, macula_dist_discovery:split("a1@b.c.d")),
    ?assertEqual({"f", "::1"}, macula_dist_discovery:split('f@::1')),
    [?assertEqual(false, macula_dist_discovery:split(Name))
     || Name <- [a, "a@", "@b", "a@b@c", "", 17, {a, b}]].

is_node_name_takes_two_parts_test() ->
    ?assert(macula_dist:is_node_name('a@b')),
    ?assert(macula_dist:is_node_name('4433@10.0.0.5')),
    ?assert(macula_dist:is_node_name("4433@192.168.1.100")),
    ?assertNot(macula_dist:is_node_name(a)),
    ?assertNot(macula_dist:is_node_name("a@")),
    ?assertNot(macula_dist:is_node_name(17)).

what_is_no_text_is_no_name_test() ->
    [begin
         ?assertNot(macula_dist:is_node_name(Odd)),
         ?assertEqual(false, macula_dist:splitname(Odd))
     end || Odd <- [[x, $@, $a], [$a | b], [-1, $@, $a], [$a, $@, x], [$a, $@ | $b], <<"a@b">>,
                    #{}]].

hosts_suit_the_kind_of_name_test() ->
    Check = fun macula_dist_discovery:check_name/2,
    ?assertEqual(ok, Check("host", shortnames)),
    ?assertEqual({error, not_shortnames}, Check("host.example.org", shortnames)),
    ?assertEqual(ok, Check("host.example.org", longnames)),
    ?assertEqual(ok, Check("127.0.0.1", longnames)),
    ?assertEqual(ok, Check("::1", longnames)),
    ?assertEqual({error, not_longnames}, Check("host", longnames)).

a_port_in_the_name_is_the_only_port_to_listen_on_test() ->
    ?assertEqual([4433], macula_dist_discovery:ports("4433")),
    ?assertEqual([5000], macula_dist_discovery:ports("5000")).

a_name_without_port_tries_the_default_first_test() ->
    ?assertEqual([4433, 0], macula_dist_discovery:ports("a")).

a_name_with_its_port_needs_nobody_to_look_it_up_test() ->
    ?assertEqual({ok, [{{127, 0, 0, 1}, 4711}]}, macula_dist_discovery:lookup('4711@127.0.0.1', 5000)),
    ?assertEqual({ok, [{{0, 0, 0, 0, 0, 0, 0, 1}, 4711}]},
                 macula_dist_discovery:lookup('4711@::1', 5000)).

the_table_in_the_configuration_comes_first_test_() ->
    Node = '4711@127.0.0.1',
    {setup,
     fun() -> application:set_env(macula, dist_nodes, #{Node => {{127, 0, 0, 9}, 17}}) end,
     fun(_) -> application:unset_env(macula, dist_nodes) end,
     [?_assertEqual({ok, [{{127, 0, 0, 9}, 17}]}, macula_dist_discovery:lookup(Node, 5000))]}.

%% Looked up in the hosts' table alone: a name server may take its time.
a_host_that_does_not_exist_is_nobody_test_() ->
    {setup,
     fun() -> Lookup = inet_db:res_option(lookup), ok = inet_db:set_lookup([file]), Lookup end,
     fun inet_db:set_lookup/1,
     [?_assertEqual({error, nxdomain},
                    macula_dist_discovery:lookup('4711@no-such-host.invalid', 5000))]}.

%% net_kernel asks this, which has ticks to send.
select_looks_nothing_up_test() ->
    ?assert(macula_dist:select('a@no-such-host.invalid')),
    ?assertNot(macula_dist:select('a@b@c')).

an_address_of_one_link_keeps_its_interface_test() ->
    LinkLocal = {16#fe80, 0, 0, 0, 0, 0, 0, 1},
    ?assertEqual({ok, {LinkLocal, 7}}, macula_dist_discovery:address("fe80::1%7")),
    ?assertEqual({ok, [{{LinkLocal, 7}, 4711}]}, macula_dist_discovery:lookup('4711@fe80::1%7', 5000)),
    {ok, [{Interface, _} | _]} = inet:getifaddrs(),
    {ok, Index} = net:if_name2index(Interface),
    ?assertEqual({ok, {LinkLocal, Index}}, macula_dist_discovery:address("fe80::1%" ++ Interface)),
    [?assertEqual(error, macula_dist_discovery:address(Bad))
     || Bad <- ["fe80::1%", "fe80::1%nosuchif", "127.0.0.1%lo", "fe80::1%0", "fe80::1%99999999999",
                {127, 0, 0, 300}, {LinkLocal, 0}, {{127, 0, 0, 1}, 2}, "a.b", x, {1, 2}]].

refusals_read_as_sentences_test() ->
    [?assert(is_binary(unicode:characters_to_binary(macula_dist_trust:format_error(Reason))))
     || Reason <- [bad_cookie, wrong_name, no_cookie, malformed, timeout, {closed, reset},
                   {tls_alert, 120}, {tls_alert, 116}, {tls_alert, 40}, {other, "thing"}]].

the_carriers_of_each_otp_test() ->
    Macula = ["macula"],
    Tcp = ["inet_tcp"],
    [?assertEqual(Tcp, macula_dist:proto_dist(Kernel, [Macula, Macula]))
     || Kernel <- [[8, 5, 3], [9, 2], [10, 0, 1]]],
    [?assertEqual(First, macula_dist:proto_dist(Kernel, [First, Second]))
     || Kernel <- [[10, 1], [10, 6, 4], [11, 0]], {First, Second} <- [{Macula, Tcp}, {Tcp, Macula}]],
    ?assertEqual(Macula, macula_dist:proto_dist([8, 5], [Macula])).
