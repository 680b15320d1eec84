%% Whatever the system says of a datagram, links and connections live on and new ones can be made.
-module(macula_dist_socket_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2,
         end_per_testcase/2]).
-export([every_icmp_message_is_survived/1, every_errno_of_the_socket_is_survived/1,
         every_errno_is_survived_by_connections_and_listeners/1,
         socket_that_is_gone_is_replaced/1, socket_of_quic_that_is_gone_is_replaced/1,
         listener_that_cannot_be_replaced_tells_its_owner/1,
         links_outlive_denied_sends/1, connections_outlive_denied_sends/1,
         refused_batch_is_sent_at_once_without/1, unreachable_network_is_told_at_once/1,
         a_node_that_answers_soon_is_dialled_from_one_socket/1]).
%% Run in a node under test.
-export([echo_server/0, echo/2, echo/3, connection/1, call_itself/1, told/1]).

-import(macula_dist_case, [start/1, start/2, call/4, node_of/1, connect/2, timed/1,
                           nodedown_watch/1, node_events/2]).

suite() -> [{timetrap, {minutes, 3}}].

all() ->
    [every_icmp_message_is_survived, every_errno_of_the_socket_is_survived,
     every_errno_is_survived_by_connections_and_listeners, socket_that_is_gone_is_replaced,
     socket_of_quic_that_is_gone_is_replaced, listener_that_cannot_be_replaced_tells_its_owner,
     links_outlive_denied_sends, connections_outlive_denied_sends,
     refused_batch_is_sent_at_once_without,
     unreachable_network_is_told_at_once, a_node_that_answers_soon_is_dialled_from_one_socket].

init_per_suite(Config0) ->
    case {os:type(), os:find_executable("cc")} of
        {{unix, linux}, Cc} when is_list(Cc) ->
            Config = macula_dist_case:suite_begin(Config0),
            Source = filename:join(proplists:get_value(data_dir, Config), "refuse.c"),
            Library = filename:join(proplists:get_value(priv_dir, Config), "refuse.so"),
            Command = ["cc -shared -fPIC -o ", Library, " ", Source, " -ldl -lpthread 2>&1"],
            "" = os:cmd(lists:flatten(Command)),
            [{library, Library} | Config];
        _ ->
            {skip, "needs Linux and a C compiler"}
    end.

end_per_suite(Config) -> macula_dist_case:suite_end(Config).
init_per_testcase(Case, Config) -> macula_dist_case:case_begin(Case, Config).
end_per_testcase(Case, Config) -> macula_dist_case:case_end(Case, Config).

%% -- ICMP ------------------------------------------------------------------------------------------

%% All that quote the datagram they are about, of either family.
every_icmp_message_is_survived(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        case {socket:open(inet, raw, icmp), socket:open(inet6, raw, 'ipv6-icmp')} of
            {{ok, V4}, {ok, V6}} ->
                A = start(a),
                B = start(b),
                ok = connect(A, B),
                Port = macula_dist_case:port_of(B),
                Others = [macula_dist_case:port_of(A), 9],
                Four = [{3, Code} || Code <- lists:seq(0, 15)] ++ [{4, 0}, {11, 0}, {11, 1}]
                    ++ [{12, Code} || Code <- lists:seq(0, 2)],
                Six = [{1, Code} || Code <- lists:seq(0, 8)] ++ [{2, 0}, {3, 0}, {3, 1}]
                    ++ [{4, Code} || Code <- lists:seq(0, 3)],
                [icmp4(V4, Type, Code, Port, Other) || {Type, Code} <- Four, Other <- Others],
                lives(A, B),
                [icmp6(V6, Type, Code, Port, Other) || {Type, Code} <- Six, Other <- Others],
                lives(A, B),
                C = start(c),
                ok = connect(C, B);
            Refused ->
                {skip, {"needs raw sockets", Refused}}
        end
    end).

icmp4(Socket, Type, Code, From, To) ->
    Quoted = <<16#45, 0, 1228:16, 1:16, 0:16, 64, 17, 0:16, 127, 0, 0, 1, 127, 0, 0, 1,
               (udp(From, To))/binary>>,
    Message = <<Type, Code, 0:16, 1400:32, Quoted/binary>>,
    Sum = checksum(Message, 0),
    <<Start:2/binary, 0:16, Rest/binary>> = Message,
    ok = socket:sendto(Socket, <<Start/binary, Sum:16, Rest/binary>>,
                       #{family => inet, addr => {127, 0, 0, 1}, port => 0}).

%% The system puts in the checksum.
icmp6(Socket, Type, Code, From, To) ->
    Quoted = <<6:4, 0:28, 1208:16, 17, 64, 1:128, 1:128, (udp(From, To))/binary>>,
    _ = socket:sendto(Socket, <<Type, Code, 0:16, 1400:32, Quoted/binary>>,
                      #{family => inet6, addr => {0, 0, 0, 0, 0, 0, 0, 1}, port => 0}),
    ok.

udp(From, To) ->
    <<From:16, To:16, 1208:16, 0:16, 0:192>>.

checksum(<<Word:16, Rest/binary>>, Sum) -> checksum(Rest, Sum + Word);
checksum(<<>>, Sum) when Sum > 16#ffff -> checksum(<<>>, (Sum band 16#ffff) + (Sum bsr 16));
checksum(<<>>, Sum) -> bnot Sum band 16#ffff.

%% -- errors of the socket --------------------------------------------------------------------------

%% All but those that mean "later" and those that mean "not a socket".
errnos() ->
    lists:seq(1, 133) -- [4, 9, 11, 88].

every_errno_of_the_socket_is_survived(Config) ->
    macula_dist_case:needs_macula(fun() ->
        {B, Refuse} = preloaded(b, Config),
        A = start(a),
        ok = connect(A, B),
        [begin
             Refuse(io_lib:format("~s ~b 3", [Call, Errno])),
             lives(A, B)
         end || Call <- ["recv", "send"], Errno <- errnos()],
        %% More in a row than the thread puts up with in one turn: ENOMEM.
        Refuse("recv 12 100"),
        lives(A, B),
        C = start(c),
        ok = connect(C, B)
    end).

every_errno_is_survived_by_connections_and_listeners(Config) ->
    macula_dist_case:needs_macula(fun() ->
        {N, Refuse} = preloaded(n, Config),
        Server = call(N, ?MODULE, echo_server, []),
        Old = call(N, ?MODULE, connection, [Server]),
        [begin
             Refuse(io_lib:format("~s ~b 3", [Call, Errno])),
             ok = call(N, ?MODULE, echo, [Old, {Call, Errno}])
         end || Call <- ["recv", "send"], Errno <- errnos()],
        New = call(N, ?MODULE, connection, [Server]),
        ok = call(N, ?MODULE, echo, [New, new])
    end).

%% Closed behind our back, as by a library in the VM that closes what is not its own, and perhaps another
%% file by now.
socket_that_is_gone_is_replaced(Config) ->
    macula_dist_case:needs_macula(fun() ->
        [begin
             {B, Refuse} = preloaded(b, Config),
             A = start(a),
             ok = connect(A, B),
             Port = macula_dist_case:port_of(B),
             Refuse(How),
             lives(A, B),
             macula_dist_case:await_log(B, "UDP port " ++ integer_to_list(Port) ++ " is gone"),
             macula_dist_case:await_log(B, "another socket has UDP port"),
             C = start(c),
             ok = connect(C, B),
             Port = macula_dist_case:port_of(B),
             lives(A, B)
         end || How <- ["close", "other"]],
        ok
    end).

socket_of_quic_that_is_gone_is_replaced(Config) ->
    macula_dist_case:needs_macula(fun() ->
        {N, Refuse} = preloaded(n, Config),
        #{listener := Listener, port := Port} = Server = call(N, ?MODULE, echo_server, []),
        Old = call(N, ?MODULE, connection, [Server]),
        %% The client sends first; what is asked for while the first socket is replaced meets the other.
        [begin
             Refuse(How),
             ok = call(N, ?MODULE, echo, [Old, {How, Round}])
         end || How <- ["close", "other"], Round <- lists:seq(1, 6)],
        New = call(N, ?MODULE, connection, [Server]),
        ok = call(N, ?MODULE, echo, [New, new]),
        {ok, {_, Port}} = call(N, macula_quic, sockname, [Listener])
    end).

%% As where another has the port by then. The peer is not told.
listener_that_cannot_be_replaced_tells_its_owner(Config) ->
    macula_dist_case:needs_macula(fun() ->
        {N, Refuse} = preloaded(n, Config),
        Client = start(c),
        #{owner := Owner} = Server = call(N, ?MODULE, echo_server, []),
        Old = call(Client, ?MODULE, connection, [Server]),
        ok = call(Client, ?MODULE, echo, [Old, before]),
        Refuse("taken"),
        spawn(fun() -> call(Client, ?MODULE, echo, [Old, lost]) end),
        {Ms, eaddrinuse} = timed(fun() -> call(N, ?MODULE, told, [Owner]) end),
        ct:log("told after ~p ms", [Ms]),
        true = Ms >= 5000,
        New = call(N, ?MODULE, echo_server, []),
        ok = call(Client, ?MODULE, echo, [call(Client, ?MODULE, connection, [New]), new])
    end).

%% A firewall, or a route that is lost for some seconds. They cost next to no processor time, and what was
%% sent meanwhile arrives soon after their end: QUIC's own timers alone would wait for up to as long again.
links_outlive_denied_sends(Config) ->
    macula_dist_case:needs_macula(fun() ->
        [begin
             {B, Refuse} = preloaded(b, Config, liveness()),
             A = start(a, liveness()),
             ok = connect(A, B),
             Watch = nodedown_watch(A),
             lives(A, B),
             denied(B, Refuse, Errno, fun() -> lives(B, A) end),
             [] = [Event || {nodedown, _, _, _} = Event <- node_events(A, Watch)]
         end || Errno <- denials()],
        ok
    end).

%% That links live through it.
liveness() -> #{args => ["-macula_dist_liveness", "40000"]}.

connections_outlive_denied_sends(Config) ->
    macula_dist_case:needs_macula(fun() ->
        [begin
             {N, Refuse} = preloaded(n, Config),
             Client = start(c),
             Server = call(Client, ?MODULE, echo_server, []),
             Old = call(N, ?MODULE, connection, [Server]),
             ok = call(N, ?MODULE, echo, [Old, before]),
             denied(N, Refuse, Errno, fun() ->
                 ok = call(N, ?MODULE, echo, [Old, denied, 300000])
             end)
         end || Errno <- denials()],
        ok
    end).

%% EPERM, ENETUNREACH.
denials() -> [1, 101].

%% Nine seconds in which the node may send nothing, and what is begun in them.
denied(Node, Refuse, Errno, Act) ->
    Refuse("deny " ++ integer_to_list(Errno)),
    Test = self(),
    Cpu = cpu(Node),
    Caller = spawn_link(fun() -> Act(), Test ! {self(), now_ms()} end),
    receive {Caller, _} -> error({not_denied, Errno}) after 9000 -> ok end,
    Spent = cpu(Node) - Cpu,
    End = now_ms(),
    Refuse("allow 0"),
    receive
        {Caller, Back} ->
            ct:log("errno ~b: ~b ms of processor time; back after ~b ms", [Errno, Spent, Back - End]),
            true = Spent < 3000,
            %% QUIC's own timers alone may take 9 s.
            true = Back - End < 5000
    after 15000 ->
        error({not_back, Errno})
    end.

cpu(#{os_pid := Pid}) ->
    {ok, Stat} = file:read_file("/proc/" ++ Pid ++ "/stat"),
    [_, Fields] = string:split(Stat, ") ", trailing),
    Words = string:lexemes(Fields, " "),
    10 * lists:sum([binary_to_integer(lists:nth(N, Words)) || N <- [12, 13]]).

now_ms() -> erlang:monotonic_time(millisecond).

refused_batch_is_sent_at_once_without(Config) ->
    macula_dist_case:needs_macula(fun() ->
        [begin
             {N, Refuse} = preloaded(n, Config),
             %% What is loaded once must not count.
             Server0 = call(N, ?MODULE, echo_server, []),
             _ = call(N, ?MODULE, connection, [Server0]),
             Refuse("gso " ++ Errno),
             %% The quickest of several, each with sockets of its own: any of them may meet a busy moment of the
             %% test machine, and all would wait for QUIC's first timer.
             Times = [begin
                 Server = call(N, ?MODULE, echo_server, []),
                 element(1, timed(fun() -> call(N, ?MODULE, connection, [Server]) end))
             end || _ <- [1, 2, 3]],
             ct:log("connected after ~p ms", [Times]),
             true = lists:min(Times) < 800
         end || Errno <- ["5", "22"]],
        ok
    end).

%% As over TCP, whatever the reason.
unreachable_network_is_told_at_once(_Config) ->
    Routes = ["ip route add prohibit 203.0.113.0/26", "ip route add blackhole 203.0.113.64/26",
              "ip route add unreachable 203.0.113.128/26"],
    case macula_test_nodes:secluded(Routes) of
        {ok, Exec} ->
            A = start("4433", #{exact => true, exec => Exec,
                                args => ["-no_epmd", "-start_epmd", "false"]}),
            [begin
                 Peer = list_to_atom("4434@" ++ Host),
                 {Ms, pang} = timed(fun() -> call(A, net_adm, ping, [Peer]) end),
                 ct:log("~s: pang after ~p ms", [Host, Ms]),
                 %% What waits for an answer takes 7 s.
                 true = Ms < 6000
             end || Host <- ["2001:db8::1", "198.51.100.1", "203.0.113.1", "203.0.113.65",
                             "203.0.113.129"]],
            ok;
        {error, Reason} ->
            {skip, {"needs a network namespace", Reason}}
    end.

%% The relay has a client for each address that sends to it. A dial asks whether anybody has the port from a
%% socket of its own, and a peer that answers soon makes that needless. On a busy machine some answer late.
a_node_that_answers_soon_is_dialled_from_one_socket(_Config) ->
    macula_dist_case:needs_macula(fun() ->
        {A, B, Relay} = macula_dist_case:relayed_pair(#{}, #{args => ["-connect_all", "false"]}),
        Rounds = 20,
        [begin
             true = call(A, erlang, disconnect_node, [node_of(B)]),
             macula_test_nodes:wait_until(fun() ->
                 not macula_dist_case:connected(A, B) andalso not macula_dist_case:connected(B, A)
             end),
             ok = connect(A, B)
         end || _ <- lists:seq(1, Rounds)],
        #{clients := Clients} = macula_relay:stats(Relay),
        ct:log("~b clients after ~b dials", [Clients, Rounds + 1]),
        ?assert(Clients =< Rounds div 2)
    end).

%% -- shared ----------------------------------------------------------------------------------------

preloaded(Name, Config) ->
    preloaded(Name, Config, #{}).

preloaded(Name, Config, Options) ->
    File = filename:join(proplists:get_value(priv_dir, Config),
                         "refuse." ++ integer_to_list(erlang:unique_integer([positive]))),
    Library = proplists:get_value(library, Config),
    N = start(Name, Options#{env => [{"LD_PRELOAD", Library}, {"REFUSE", File}]}),
    %% It must not be seen half written.
    {N, fun(What) ->
        ok = file:write_file(File ++ ".new", What),
        ok = file:rename(File ++ ".new", File)
    end}.

lives(A, B) ->
    {ok, #{} = _} = call(A, macula_dist, info, [node_of(B)]),
    true = call(A, ?MODULE, call_itself, [node_of(B)]).

call_itself(Node) ->
    100000 =:= erpc:call(Node, erlang, byte_size, [binary:copy(<<1>>, 100000)], 20000).

echo_server() ->
    Caller = self(),
    {Public, Private} = crypto:generate_key(eddsa, ed25519),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(Public, Private, ["127.0.0.1"]),
    spawn(fun() ->
        {ok, Listener} = macula_quic:listen({"127.0.0.1", 0},
                                            [{cert, Cert}, {key, Key}, {alpn, ["echo"]}]),
        {ok, {_, Port}} = macula_quic:sockname(Listener),
        Caller ! {server, #{key => Public, port => Port, listener => Listener, owner => self()}},
        spawn(fun() -> accept(Listener) end),
        receive {quic, listener_stopped, Listener, Why} ->
            receive {told, From} -> From ! {self(), Why} end
        end
    end),
    receive {server, Server} -> Server end.

%% Why the listener has stopped.
told(Owner) ->
    Owner ! {told, self()},
    receive {Owner, Why} -> Why after 60000 -> not_told end.

accept(Listener) ->
    case macula_quic:accept(Listener) of
        {ok, Connection} ->
            Pid = spawn(fun() -> receive go -> serve(Connection) end end),
            ok = macula_quic:controlling_process(Connection, Pid),
            Pid ! go,
            accept(Listener);
        {error, closed} ->
            ok
    end.

serve(Connection) ->
    {ok, Stream} = macula_quic:accept_stream(Connection, #{}, infinity),
    {ok, Data} = macula_quic:recv(Stream, 4, 20000),
    ok = drain(Stream),
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    %% Not collected before it is delivered.
    put({stream, make_ref()}, Stream),
    serve(Connection).

drain(Stream) ->
    case macula_quic:recv(Stream, 0, 20000) of
        {ok, _} -> drain(Stream);
        {error, closed} -> ok
    end.

%% A process that holds a connection.
connection(#{key := Public, port := Port}) ->
    Caller = self(),
    Pid = spawn(fun() ->
        {ok, Connection} = macula_quic:connect("127.0.0.1", Port,
                                               [{verify_pubkey, Public}, {alpn, ["echo"]}], 10000),
        Caller ! {connected, self()},
        hold(Connection)
    end),
    receive {connected, Pid} -> Pid after 11000 -> error(not_connected) end.

hold(Connection) ->
    receive
        {echo, More, From} ->
            {ok, Stream} = macula_quic:open_stream(Connection),
            ok = macula_quic:send(Stream, [<<"ping">>, binary:copy(<<1>>, More)], #{fin => true}),
            From ! {self(), macula_quic:recv(Stream, 4, 20000)},
            hold(Connection)
    end.

echo(Pid, What) ->
    echo(Pid, What, 0).

%% The answer comes when all has arrived.
echo(Pid, What, More) ->
    Pid ! {echo, More, self()},
    receive {Pid, {ok, <<"ping">>}} -> ok after 25000 -> error({no_echo, What}) end.
