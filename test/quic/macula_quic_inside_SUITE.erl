%% What can be seen of connections from outside: their logs in qlog's format, and TLS secrets by which tools
%% decrypt what was captured.
-module(macula_quic_inside_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").
-include("macula_quic_test.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([each_connection_writes_a_qlog_of_its_own/1, a_reload_keeps_the_qlog/1,
         reports_are_seen_with_the_default_handler/1,
         a_bad_qlog_dir_is_told_at_once/1,
         a_connection_outlives_its_qlog_dir/1]).
-export([counters_say_what_they_mean/1]).
-export([tshark_decrypts_a_session_by_the_clients_secrets/1,
         tshark_decrypts_a_session_by_the_servers_secrets/1,
         tshark_decrypts_nothing_without_secrets/1]).

-define(SECRET, <<"what only the two ends should read">>).

all() -> macula_quic_lab:cases(?MODULE, []).

suite() ->
    [{timetrap, {minutes, 2}}].

init_per_suite(Config) -> macula_quic_lab:begin_suite(Config).
end_per_suite(Config) -> macula_quic_lab:end_suite(Config).

%%--------------------------------------------------------------------------------------------
%% Reports

%% As a VM starts that nobody has configured.
reports_are_seen_with_the_default_handler(_Config) ->
    {Listener, Port} = macula_quic_lab:listen(),
    Expression = "{ok, _} = macula_quic:connect(\"127.0.0.1\", " ++ integer_to_list(Port)
        ++ ", [{verify, none}, {alpn, [\"test\"]}], 10000), halt().",
    Erl = open_port({spawn_executable, filename:join([code:root_dir(), "bin", "erl"])},
                    [{args, ["-noshell", "-noinput", "-pa" | code:get_path()] ++ ["-eval", Expression]},
                     exit_status, binary, stderr_to_stdout, in]),
    {0, Shown} = output(Erl, []),
    ok = macula_quic:close(Listener),
    ?assertMatch({{match, _}, _}, {re:run(Shown, "macula: connecting to .* without verifying"), Shown}).

output(Port, Shown) ->
    receive
        {Port, {data, Data}} -> output(Port, [Shown, Data]);
        {Port, {exit_status, Status}} -> {Status, iolist_to_binary(Shown)}
    after 60000 ->
        error({silent, iolist_to_binary(Shown)})
    end.

%%--------------------------------------------------------------------------------------------
%% Logs

each_connection_writes_a_qlog_of_its_own(Config) ->
    Dir = file_in(Config, "logs"),
    ok = file:make_dir(Dir),
    {Listener, Port} = macula_quic_lab:listen(#{qlog_dir => Dir}),
    %% Nothing is there before there is a connection.
    ?assertEqual({ok, []}, file:list_dir(Dir)),
    Options = macula_quic_lab:client_options(#{qlog_dir => Dir}),
    [macula_quic_lab:in_process(fun() ->
         {ok, Client} = macula_quic:connect("127.0.0.1", Port, Options, 10000),
         {ok, Server} = macula_quic:accept(Listener, 10000),
         talk(macula_quic_lab:loose_stream(#{client => Client, server => Server}))
     end) || _ <- lists:seq(1, 3)],
    ok = macula_quic:close(Listener),
    Names = written(Dir, 6),
    Sides = [list_to_tuple(string:split(filename:basename(Name, ".sqlog"), "-")) || Name <- Names],
    Ids = lists:usort([Id || {Id, _} <- Sides]),
    ?assertEqual(lists:sort([{Id, Side} || Id <- Ids, Side <- ["client", "server"]]), lists:sort(Sides)),
    %% The longest ids there are, in hexadecimal digits.
    [?assertMatch({match, _}, re:run(Id, "^[0-9a-f]{40}$")) || Id <- Ids],
    [is_qlog(filename:join(Dir, Name)) || Name <- Names].

%% Those that were there before go on writing, those that come after have a file, too.
a_reload_keeps_the_qlog(Config) ->
    Dir = file_in(Config, "reloaded"),
    ok = file:make_dir(Dir),
    {Listener, Port} = macula_quic_lab:listen(#{qlog_dir => Dir}),
    Other = macula_quic_lab:ed25519(),
    Talk = fun(#{cert := Cert}) ->
        Options = macula_quic_lab:client_options(#{cacerts => Cert}),
        {ok, Client} = macula_quic:connect("127.0.0.1", Port, Options, 10000),
        {ok, Server} = macula_quic:accept(Listener, 10000),
        Pair = #{client => Client, server => Server},
        talk(macula_quic_lab:loose_stream(Pair)),
        Pair
    end,
    macula_quic_lab:in_process(fun() ->
        Before = Talk(macula_quic_lab:credentials()),
        ok = macula_quic:reload(Listener, maps:with([cert, key], Other)),
        talk(macula_quic_lab:loose_stream(Before)),
        _ = Talk(Other)
    end),
    ok = macula_quic:close(Listener),
    [is_qlog(filename:join(Dir, Name)) || Name <- written(Dir, 2)].

a_bad_qlog_dir_is_told_at_once(Config) ->
    File = file_in(Config, "file"),
    ok = file:write_file(File, <<>>),
    [begin
         Options = #{qlog_dir => Dir},
         Expected = {error, {bad_option, qlog_dir, Why}},
         ?assertEqual(Expected, macula_quic:listen("127.0.0.1", 0, macula_quic_lab:server_options(Options))),
         %% Nobody is there who would answer.
         ?assertEqual(Expected, macula_quic:connect("127.0.0.1", macula_test_nodes:free_udp_port(),
                                                    macula_quic_lab:client_options(Options), 10000)),
         ?assertMatch([_ | _], lists:flatten(io_lib:format("~ts", [macula_quic:format_error(Expected)])))
     end || {Dir, Why} <- [{file_in(Config, "nowhere"), enoent}, {File, enotdir}]],
    ?assertMatch({error, {bad_option, qlog_dir, _}},
                 macula_quic:listen("127.0.0.1", 0, macula_quic_lab:server_options(#{qlog_dir => 1}))).

%% Logs are for those who look into a connection, not for it.
a_connection_outlives_its_qlog_dir(Config) ->
    Dir = file_in(Config, "gone"),
    ok = file:make_dir(Dir),
    {Listener, Port} = macula_quic_lab:listen(#{qlog_dir => Dir}),
    ok = file:del_dir(Dir),
    Failures = fun() -> [count(Name) || Name <- [qlog_failed_files, qlog_lost_records]] end,
    [Files, Records] = Failures(),
    Pair = macula_quic_lab:pair(Listener, Port, #{}),
    talk(macula_quic_lab:stream(Pair)),
    %% What is lost is counted.
    macula_test_nodes:wait_until(fun() ->
        [NowFiles, NowRecords] = Failures(),
        NowFiles =:= Files + 1 andalso NowRecords > Records + 5
    end),
    macula_quic_lab:close(Pair).

count(Name) ->
    [Value] = [Value || #{name := N, value := Value} <- macula_quic:counters(), N =:= Name],
    Value.

%%--------------------------------------------------------------------------------------------
%% Counters

counters_say_what_they_mean(_Config) ->
    {Before, _} = {count(connections), count(listeners)},
    #{client := Client} = Pair = macula_quic_lab:pair(),
    ?assertEqual(Before + 2, count(connections)),
    {ok, Counters} = macula_quic:counters(Client),
    {ok, Stats} = macula_quic:getstat(Client),
    ?assertEqual(lists:sort([Name || {Name, _} <- Stats]), lists:sort([Name || #{name := Name} <- Counters])),
    [?assertMatch({_, true, [_, _ | _]}, {Name, Type =:= gauge orelse Type =:= counter, Help})
     || #{name := Name, type := Type, help := Help} <- Counters ++ macula_quic:counters()],
    %% A counter does not fall.
    talk(macula_quic_lab:stream(Pair)),
    {ok, Later} = macula_quic:getstat(Client),
    [?assertMatch({_, Grown} when Grown >= Value, {Name, proplists:get_value(Name, Later)})
     || #{name := Name, type := counter, value := Value} <- Counters],
    ?assert(proplists:get_value(recv_oct, Later) > proplists:get_value(recv_oct, Stats)),
    macula_quic_lab:close(Pair),
    ?assertEqual({error, badarg}, macula_quic:counters(make_ref())).

%% So many files, once they are no longer open and all is written.
written(Dir, Count) ->
    macula_test_nodes:wait_until(fun() ->
        Objects = macula_quic_lab:objects(),
        {ok, Names} = file:list_dir(Dir),
        Open = [Target || Fd <- fds(), {ok, Target} <- [file:read_link("/proc/self/fd/" ++ Fd)],
                          lists:prefix(Dir, Target)],
        case {length(Names), Open} of
            {Count, []} -> {value, Names};
            _ -> {Names, Open, Objects}
        end
    end).

fds() ->
    case file:list_dir("/proc/self/fd") of
        {ok, Fds} -> Fds;
        {error, _} -> []
    end.

%% A sequence of JSON texts (RFC 7464): what it is, then what has happened, in order.
is_qlog(File) ->
    {ok, Bytes} = file:read_file(File),
    [<<>> | Texts] = binary:split(Bytes, <<16#1e>>, [global]),
    [First | Events] = [begin
                            ?assertEqual($\n, binary:last(Text)),
                            json(Text)
                        end || Text <- Texts],
    ?assertMatch(#{<<"qlog_version">> := _, <<"qlog_format">> := <<"JSON-SEQ">>,
                   <<"title">> := <<"macula_quic">>, <<"trace">> := #{<<"vantage_point">> := _}}, First),
    Times = [Time || #{<<"time">> := Time} <- Events],
    ?assertEqual({length(Events), lists:sort(Times)}, {length(Times), Times}),
    Kinds = lists:usort([Name || #{<<"name">> := Name} <- Events]),
    [?assert(lists:any(fun(Kind) -> binary:match(Kind, Wanted) =/= nomatch end, Kinds), {Wanted, Kinds})
     || Wanted <- [<<"packet_sent">>, <<"packet_received">>]].

%% Erlang has a decoder only from OTP 27 on.
json(Text) ->
    {Value, Rest} = value(space(Text)),
    ?assertEqual(<<>>, space(Rest)),
    Value.

value(<<"{", Rest/binary>>) -> members(space(Rest), #{});
value(<<"[", Rest/binary>>) -> elements(space(Rest), []);
value(<<"\"", Rest/binary>>) -> string(Rest, <<>>);
value(<<"true", Rest/binary>>) -> {true, Rest};
value(<<"false", Rest/binary>>) -> {false, Rest};
value(<<"null", Rest/binary>>) -> {null, Rest};
value(Text) ->
    {match, [{0, Length}]} = re:run(Text, "^-?[0-9]+(\\.[0-9]+)?([eE][-+]?[0-9]+)?", [{capture, first}]),
    <<Number:Length/binary, Rest/binary>> = Text,
    {try binary_to_float(Number) catch error:badarg -> float(binary_to_integer(Number)) end, Rest}.

members(<<"}", Rest/binary>>, Map) ->
    {Map, Rest};
members(Text, Map) ->
    {Key, AfterKey} = value(Text),
    <<":", Behind/binary>> = space(AfterKey),
    {Value, AfterValue} = value(space(Behind)),
    case space(AfterValue) of
        <<",", Rest/binary>> -> members(space(Rest), Map#{Key => Value});
        <<"}", Rest/binary>> -> {Map#{Key => Value}, Rest}
    end.

elements(<<"]", Rest/binary>>, List) ->
    {lists:reverse(List), Rest};
elements(Text, List) ->
    {Value, After} = value(Text),
    case space(After) of
        <<",", Rest/binary>> -> elements(space(Rest), [Value | List]);
        <<"]", Rest/binary>> -> {lists:reverse([Value | List]), Rest}
    end.

string(<<"\"", Rest/binary>>, Chars) -> {Chars, Rest};
string(<<"\\", Char, Rest/binary>>, Chars) -> string(Rest, <<Chars/binary, $\\, Char>>);
string(<<Char, Rest/binary>>, Chars) -> string(Rest, <<Chars/binary, Char>>).

space(<<Char, Rest/binary>>) when Char =:= $\s; Char =:= $\n; Char =:= $\t; Char =:= $\r -> space(Rest);
space(Text) -> Text.

%%--------------------------------------------------------------------------------------------
%% Secrets of TLS

tshark_decrypts_a_session_by_the_clients_secrets(Config) ->
    with_tshark(fun() ->
        Keys = file_in(Config, "client.keys"),
        Capture = capture(Config, #{}, #{sslkeylogfile => Keys}),
        ?assertEqual(<<"!", ?SECRET/binary, ?SECRET/binary>>, decrypt(Capture, Keys))
    end).

tshark_decrypts_a_session_by_the_servers_secrets(Config) ->
    with_tshark(fun() ->
        Keys = file_in(Config, "server.keys"),
        Capture = capture(Config, #{sslkeylogfile => Keys}, #{}),
        ?assertEqual(<<"!", ?SECRET/binary, ?SECRET/binary>>, decrypt(Capture, Keys))
    end).

%% Or the other cases would prove nothing.
tshark_decrypts_nothing_without_secrets(Config) ->
    with_tshark(fun() ->
        Keys = file_in(Config, "no.keys"),
        ok = file:write_file(Keys, <<>>),
        ?assertEqual(<<>>, decrypt(capture(Config, #{}, #{}), Keys))
    end).

with_tshark(Test) ->
    case os:find_executable("tshark") of
        false -> {skip, "no tshark (Debian: apt-get install tshark)"};
        _ -> Test()
    end.

%% A client says something, the server repeats it; the file of all packets between them.
capture(Config, ServerOptions, ClientOptions) ->
    {Listener, Port} = macula_quic_lab:listen(ServerOptions),
    File = file_in(Config, "capture-" ++ integer_to_list(Port) ++ ".pcap"),
    Tap = start_tap(Port, File),
    Pair = macula_quic_lab:pair(Listener, tap_port(Tap), ClientOptions),
    talk(macula_quic_lab:stream(Pair)),
    macula_quic_lab:close(Pair),
    ok = stop_tap(Tap),
    {File, Port}.

talk({Here, There}) ->
    ok = macula_quic:send(Here, ?SECRET, #{fin => true}),
    ?assertEqual(?SECRET, macula_quic_lab:read_to_end(There)),
    ok = macula_quic:send(There, ?SECRET, #{fin => true}),
    ?assertEqual(?SECRET, macula_quic_lab:read_to_end(Here)).

%% What tshark reads on streams.
decrypt({Capture, Port}, Keys) ->
    Arguments = ["-r", Capture, "-o", "tls.keylog_file:" ++ Keys, "-d",
                 "udp.port==" ++ integer_to_list(Port) ++ ",quic", "-Y", "quic.stream_data", "-T", "fields",
                 "-E", "occurrence=a", "-e", "quic.stream_data"],
    Tshark = open_port({spawn_executable, os:find_executable("tshark")},
                       [{args, Arguments}, exit_status, binary, use_stdio, in]),
    Hex = said(Tshark, []),
    << <<(binary_to_integer(<<A, B>>, 16))>>
       || <<A, B>> <= << <<C>> || <<C>> <= Hex, C =/= $\n, C =/= $,, C =/= $: >> >>.

said(Port, Said) ->
    receive
        {Port, {data, Data}} -> said(Port, [Data | Said]);
        {Port, {exit_status, 0}} -> iolist_to_binary(lists:reverse(Said));
        {Port, {exit_status, Status}} -> error({tshark, Status, lists:reverse(Said)})
    after 60000 ->
        error(tshark_hangs)
    end.

%%--------------------------------------------------------------------------------------------
%% A tap on the path to a server: what passes goes to a file as tcpdump writes it

start_tap(Server, File) ->
    Test = self(),
    Pid = spawn_link(fun() ->
        Options = [binary, {ip, {127, 0, 0, 1}}, {active, true}],
        {ok, Front} = gen_udp:open(0, Options),
        {ok, Back} = gen_udp:open(0, Options),
        {ok, Port} = inet:port(Front),
        {ok, Out} = file:open(File, [write, raw, binary]),
        %% Raw packets of IP.
        ok = file:write(Out, <<16#a1b2c3d4:32, 2:16, 4:16, 0:64, 65535:32, 101:32>>),
        Test ! {self(), Port},
        tap(Front, Back, Server, 0, Out, 0)
    end),
    {Pid, ?EXPECT({Pid, Port}, Port)}.

tap_port({_Pid, Port}) -> Port.

stop_tap({Pid, _Port}) ->
    Pid ! {stop, self()},
    ?EXPECT({Pid, stopped}).

tap(Front, Back, Server, Client, Out, N) ->
    receive
        {udp, Front, _, _, <<0>>} ->
            %% A client asks the system whether anybody is there, from another port.
            tap(Front, Back, Server, Client, Out, N);
        {udp, Front, _, Port, Data} ->
            ok = file:write(Out, packet(N, Port, Server, Data)),
            ok = gen_udp:send(Back, {127, 0, 0, 1}, Server, Data),
            tap(Front, Back, Server, Port, Out, N + 1);
        {udp, Back, _, _, Data} ->
            ok = file:write(Out, packet(N, Server, Client, Data)),
            ok = gen_udp:send(Front, {127, 0, 0, 1}, Client, Data),
            tap(Front, Back, Server, Client, Out, N + 1);
        {stop, From} ->
            ok = file:close(Out),
            From ! {self(), stopped}
    end.

%% One each microsecond. Zero is no checksum.
packet(N, From, To, Data) ->
    Udp = <<From:16, To:16, (8 + byte_size(Data)):16, 0:16, Data/binary>>,
    Length = 20 + byte_size(Udp),
    Ip = <<4:4, 5:4, 0, Length:16, 0:32, 64, 17, 0:16, 127, 0, 0, 1, 127, 0, 0, 1>>,
    <<0:32, N:32, Length:32, Length:32, Ip/binary, Udp/binary>>.

file_in(Config, Name) ->
    filename:join(?config(priv_dir, Config), Name).
