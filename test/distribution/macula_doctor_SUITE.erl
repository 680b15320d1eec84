%% What macula says of itself at a shell, and of the way to another node.
-module(macula_doctor_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([status_shows_links_connections_and_streams/1, status_and_doctor_print_at_a_shell/1,
         connected_nodes_have_nothing_wrong/1, another_cookie_is_found/1, unknown_names_are_found/1,
         set_up_times_are_read_as_net_kernel_reads_them/1, a_port_without_a_node_is_found/1,
         another_node_at_the_address_is_found/1,
         a_handshake_that_fails_is_found/1, flag_given_twice_is_found/1,
         another_carrier_and_no_node_are_found/1, missing_library_is_found/1,
         a_want_of_descriptors_is_found/1, every_finding_has_words/1]).

-import(macula_dist_case, [start/1, start/2, call/2, call/4, node_of/1, connect/2, unique/1, needs_macula/1,
                           os_erl/1, os_await/3]).

suite() -> [{timetrap, {minutes, 2}}].

all() ->
    [status_shows_links_connections_and_streams, status_and_doctor_print_at_a_shell,
     connected_nodes_have_nothing_wrong, another_cookie_is_found, unknown_names_are_found,
     set_up_times_are_read_as_net_kernel_reads_them, a_port_without_a_node_is_found,
     another_node_at_the_address_is_found, a_handshake_that_fails_is_found,
     flag_given_twice_is_found, another_carrier_and_no_node_are_found, missing_library_is_found,
     a_want_of_descriptors_is_found, every_finding_has_words].

init_per_suite(Config) -> macula_dist_case:suite_begin(Config).
end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% A long cookie, so that the warning of a short one is not among what is found.
-define(COOKIE, "a_cookie_that_is_long_enough").

shown(N) ->
    call(N, fun() -> unicode:characters_to_list(macula_status:lines()) end).

is_in(Text, Part) ->
    string:find(Text, Part) =/= nomatch orelse error({not_in, Text, Part}).

doctor(N, Node) ->
    call(N, macula, doctor, [Node]).

status_shows_links_connections_and_streams(_Config) ->
    needs_macula(fun() ->
        [A, B] = [start(Name) || Name <- [a, b]],
        is_in(shown(A), "over macula"),
        is_in(shown(A), "0 links"),
        ok = connect(A, B),
        is_in(shown(A), "1 link\n"),
        is_in(shown(A), "  " ++ atom_to_list(node_of(B)) ++ " at 127.0.0.1:"),
        is_in(shown(A), "held 0\n"),
        is_in(shown(A), "macula_quic: 0 listeners, 0 connections, 0 streams\n"),
        {Listener, _} = call(A, fun() ->
            {Public, Private} = crypto:generate_key(eddsa, ed25519),
            {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
            Self = self(),
            Pid = spawn(fun() ->
                {ok, L} = macula_quic:listen({"127.0.0.1", 0}, [{cert, Cert}, {key, Key}, {alpn, ["t"]}]),
                Self ! {self(), L},
                receive stop -> ok end
            end),
            receive {Pid, L} -> {Pid, L} end
        end),
        is_in(shown(A), "macula_quic: 1 listener, 0 connections"),
        true = is_pid(Listener)
    end).

status_and_doctor_print_at_a_shell(_Config) ->
    Erl = os_erl(["-noshell", "-noinput", "-pa", ebin(), "-eval",
                  "ok = macula:status(), [] = [F || {error, _} = F <- macula:doctor()], halt(0)."]),
    {0, Output} = os_await(Erl, exit, 20000),
    is_in(binary_to_list(Output), "macula_quic: 0 listeners, 0 connections, 0 streams\n").

connected_nodes_have_nothing_wrong(_Config) ->
    needs_macula(fun() ->
        [A, B] = [start(Name, #{cookie => ?COOKIE}) || Name <- [a, b]],
        [] = doctor(A, node_of(B)),
        [] = [F || F <- call(A, macula, doctor, []), not is_of_the_system(F)],
        %% It has been connected by that.
        true = lists:member(node_of(B), call(A, erlang, nodes, [])),
        C = start(c, #{cookie => "short"}),
        true = lists:member({warning, short_cookie}, call(C, macula, doctor, []))
    end).

is_of_the_system({warning, {udp_buffer, _}}) -> true;
is_of_the_system(_) -> false.

another_cookie_is_found(_Config) ->
    needs_macula(fun() ->
        A = start(a, #{cookie => ?COOKIE}),
        B = start(b, #{cookie => "another" ++ ?COOKIE}),
        NodeB = node_of(B),
        [{error, {refused, NodeB, bad_cookie}} = Found] = doctor(A, NodeB),
        Words = macula:format_finding(Found),
        is_in(Words, "cookie"),
        nomatch = string:find(Words, ?COOKIE)
    end).

unknown_names_are_found(_Config) ->
    needs_macula(fun() ->
        A = start(a),
        Nobody = list_to_atom(unique("nobody") ++ "@127.0.0.1"),
        [{error, {unknown_node, Nobody, not_registered}}] = doctor(A, Nobody),
        [{error, {unknown_node, 'a@nowhere.invalid', nxdomain}}] = doctor(A, 'a@nowhere.invalid'),
        [{error, {unknown_node, nobody, bad_name}}] = doctor(A, nobody)
    end).

set_up_times_are_read_as_net_kernel_reads_them(_Config) ->
    needs_macula(fun() ->
        Node = list_to_atom(integer_to_list(macula_test_nodes:free_udp_port()) ++ "@127.0.0.1"),
        [begin
             A = start(a, #{args => ["-kernel", "net_setuptime", Time]}),
             [{error, {no_answer, Node, _, _}}] = doctor(A, Node)
         end || Time <- ["2.5", "0", "1000", "infinity"]],
        ok
    end).

a_port_without_a_node_is_found(_Config) ->
    needs_macula(fun() ->
        A = start(a),
        Port = macula_test_nodes:free_udp_port(),
        Node = list_to_atom(integer_to_list(Port) ++ "@127.0.0.1"),
        [{error, {no_answer, Node, [{{127, 0, 0, 1}, Port}], _}} = Found] = doctor(A, Node),
        is_in(macula:format_finding(Found), "127.0.0.1 port " ++ integer_to_list(Port))
    end).

another_node_at_the_address_is_found(_Config) ->
    needs_macula(fun() ->
        B = start(b),
        Other = list_to_atom(unique("other") ++ "@127.0.0.1"),
        A = start(a, #{args => macula_dist_case:found_at(Other, macula_dist_case:port_of(B))}),
        [{error, {refused, Other, wrong_name}}] = doctor(A, Other)
    end).

a_handshake_that_fails_is_found(_Config) ->
    needs_macula(fun() ->
        [A, B] = [start(Name) || Name <- [a, b]],
        ok = call(B, net_kernel, allow, [[node_of(B)]]),
        NodeB = node_of(B),
        [{error, {handshake_failed, NodeB}}] = doctor(A, NodeB)
    end).

flag_given_twice_is_found(_Config) ->
    Erl = os_erl(["-noshell", "-noinput", "-pa", ebin(), "-proto_dist", "macula", "-proto_dist", "macula", "-eval",
                  "Twice = list_to_integer(erlang:system_info(otp_release)) < 27,"
                  "Twice = lists:member({error, proto_dist_given_twice}, macula:doctor()), halt(0)."]),
    {0, _} = os_await(Erl, exit, 20000).

another_carrier_and_no_node_are_found(_Config) ->
    Erl = os_erl(["-noshell", "-noinput", "-pa", ebin(), "-eval",
                  "[{error, not_alive}] = macula:doctor('a@127.0.0.1'),"
                  "{ok, _} = net_kernel:start(['" ++ unique("tcp") ++ "@127.0.0.1', longnames]),"
                  "[{error, {other_carrier, N}}] = macula:doctor('a@127.0.0.1'), N = node(),"
                  "true = lists:member({warning, {other_carrier, N}}, macula:doctor()), halt(0)."]),
    {0, _} = os_await(Erl, exit, 20000).

missing_library_is_found(Config) ->
    Ebin = filename:join([proplists:get_value(priv_dir, Config), "macula", "ebin"]),
    ok = filelib:ensure_dir(filename:join(Ebin, "x")),
    lists:foreach(fun(File) ->
        {ok, _} = file:copy(File, filename:join(Ebin, filename:basename(File)))
    end, filelib:wildcard(filename:join(ebin(), "macula*"))),
    Erl = os_erl(["-noshell", "-noinput", "-pa", Ebin, "-eval",
                  "[{error, {native_library, _}}] = macula:doctor(), ok = macula:status(), halt(0)."]),
    {0, Output} = os_await(Erl, exit, 20000),
    is_in(binary_to_list(Output), "the native library could not be loaded").

a_want_of_descriptors_is_found(_Config) ->
    %% What the doctor needs is loaded before none is left.
    Code = "macula:doctor(), io:format(\"~0tp~n\", [ready]),"
           "Open = fun(Open, Files) -> case file:open(\"/dev/null\", [read, raw]) of"
           "    {ok, File} -> Open(Open, [File | Files]);"
           "    {error, emfile} -> Files end end,"
           "Files = Open(Open, []),"
           "Found = macula:doctor(),"
           "io:format(\"~0p ~b\", [lists:member({error, {no_socket, emfile}}, Found), length(Files)]), halt(0).",
    Output = os:cmd(lists:flatten(["ulimit -n 256; exec erl -noshell -noinput -pa ", ebin(), " -eval '", Code, "'"])),
    is_in(Output, "true "),
    is_in(Output, "error: the system gives this VM no UDP socket (emfile)").

every_finding_has_words(_Config) ->
    Node = 'a@127.0.0.1',
    Found = [{error, {native_library, undef}}, {error, proto_dist_given_twice}, {error, {unknown_node, Node, nxdomain}},
             {error, {no_answer, Node, [{{127, 0, 0, 1}, 1}, {{{0, 0, 0, 0, 0, 0, 0, 1}, 1}, 2}], timeout}},
             {error, {refused, Node, too_many}}, {error, {handshake_failed, Node}}, {error, not_alive},
             {error, {no_socket, emfile}},
             {warning, {other_carrier, Node}}, {warning, short_cookie}, {warning, {udp_buffer, 212992}}],
    lists:foreach(fun({Level, _} = F) ->
        Words = macula:format_finding(F),
        is_in(Words, atom_to_list(Level) ++ ": "),
        nomatch = string:find(Words, "{")
    end, Found).

ebin() ->
    filename:dirname(code:which(macula_app)).
