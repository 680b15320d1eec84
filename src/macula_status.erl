%% @doc What macula does in this VM, as text.
%% @private
-module(macula_status).

-export([lines/0]).

-spec lines() -> iodata().
lines() ->
    [io_lib:format("macula ~ts on OTP ~ts~n", [version(), erlang:system_info(otp_release)])
     | case macula_doctor:library() of
           ok -> [distribution(maps:from_list(macula_nif:live_objects())), streams(), peering()];
           Reason -> [macula_doctor:format({native_library, Reason}), "\n"]
       end].

version() ->
    _ = application:load(macula),
    case application:get_key(macula, vsn) of
        {ok, Version} -> Version;
        undefined -> "of an unknown version"
    end.

distribution(#{dist_endpoint := 0}) ->
    "no distribution over macula\n";
distribution(_) ->
    Links = macula_dist:info(),
    [io_lib:format("distribution of ~ts over macula, ~ts~ts~n", [node(), port(), count(map_size(Links), "link")])
     | [link(Node, Info) || {Node, Info} <- lists:sort(maps:to_list(Links))]].

%% A node that only dials has no port that others know.
port() ->
    case macula_dist_discovery:lookup(node(), 1000) of
        {ok, [{_, Port} | _]} -> io_lib:format("UDP port ~b, ", [Port]);
        _ -> ""
    end.

link(Node, #{address := Address, rtt_us := Rtt, mtu := Mtu, bytes_in := In, bytes_out := Out, queued_bytes := Queued,
             senders_held := Held}) ->
    io_lib:format("  ~ts at ~ts: round trip ~.2f ms, MTU ~b, in ~ts, out ~ts, queued ~ts, held ~b~n",
                  [Node, address(Address), Rtt / 1000, Mtu, bytes(In), bytes(Out), bytes(Queued), Held]).

address({Ip, Port}) when tuple_size(Ip) =:= 4 -> io_lib:format("~ts:~b", [inet:ntoa(Ip), Port]);
address({Ip, Port}) -> io_lib:format("[~ts]:~b", [inet:ntoa(Ip), Port]);
address({Ip, Port, Scope}) -> io_lib:format("[~ts%~b]:~b", [inet:ntoa(Ip), Scope, Port]).

bytes(N) when N < 1000 -> io_lib:format("~b B", [N]);
bytes(N) when N < 1000000 -> io_lib:format("~.1f KB", [N / 1000]);
bytes(N) when N < 1000000000 -> io_lib:format("~.1f MB", [N / 1000000]);
bytes(N) -> io_lib:format("~.1f GB", [N / 1000000000]).

streams() ->
    Counters = maps:from_list([{Name, Value} || #{name := Name, value := Value} <- macula_quic:counters()]),
    Counts = [count(maps:get(Name, Counters), One)
              || {Name, One} <- [{listeners, "listener"}, {connections, "connection"}, {streams, "stream"}]],
    ["macula_quic: ", lists:join(", ", Counts), "\n"].

peering() ->
    io_lib:format("macula_peering: ~ts~n", [count(length(macula_peering:peers()), "link")]).

count(1, One) -> ["1 ", One];
count(N, One) -> [integer_to_list(N), $\s, One, $s].
