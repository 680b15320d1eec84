%% @doc What the command line and the `kernel' application say about the distribution.
%% @private
-module(macula_dist_parameters).

-export([family/0, protocol/0, endpoint_options/2, own_liveness/0, setup_time/0]).

-include_lib("kernel/include/logger.hrl").

-define(LIVENESS, 10000).
-define(SETUP_TIME, 7000).
%% User streams that a peer may have open at a time.
-define(STREAMS, 10000).
%% Bytes of a lane under way, or unread. A path of 1 Gbit/s and 50 ms holds 6.25 MB.
-define(WINDOW, 8388608).

%% @doc What net_kernel calls the addresses of this carrier.
-spec family() -> inet.
family() -> inet.

%% @doc And what lies below.
-spec protocol() -> quic.
protocol() -> quic.

%% @doc The address of a node's endpoint, and the options that the engine makes the endpoint with.
-spec endpoint_options(string(), boolean()) ->
    {ok, Ip :: tuple(), map()} | {error, {bad_option, atom(), term()}}.
endpoint_options(Node, Listen) ->
    case socket_options(Listen) of
        {ok, Ip, Socket} ->
            Known = Socket#{listen => Listen, reset_key => macula_dist_trust:endpoint_key(Node)},
            Flags = [{liveness, liveness()}, {congestion, congestion()}, {lanes, lanes()},
                     {streams, number(macula_dist_streams, ?STREAMS, 0, 100000)},
                     {window, number(macula_dist_window, ?WINDOW, 16#10000, 16#40000000)}],
            case [Error || {_, {error, _} = Error} <- Flags] of
                [] -> {ok, Ip, maps:merge(Known, maps:from_list([{Key, Value} || {Key, {ok, Value}} <- Flags]))};
                [Error | _] -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% What the kernel application's parameters ask of the one UDP socket. What stands first counts.
socket_options(Listen) ->
    Default = #{recbuf => 0, sndbuf => 0, only_v6 => false,
                %% Both families, where the system has both.
                ip => {0, 0, 0, 0, 0, 0, 0, 0}},
    Parameters = [inet_dist_listen_options || Listen] ++ [inet_dist_connect_options],
    Read = lists:foldl(fun read_parameter/2, interface(), Parameters),
    case Read of
        {ok, Asked} ->
            {Ip, Socket} = maps:take(ip, maps:merge(Default, Asked)),
            {ok, Ip, Socket};
        {error, _} = Error ->
            Error
    end.

interface() ->
    case application:get_env(kernel, inet_dist_use_interface) of
        {ok, Interface} ->
            case macula_dist_discovery:address(Interface) of
                {ok, Ip} -> {ok, #{ip => Ip}};
                error -> {error, {bad_option, inet_dist_use_interface, Interface}}
            end;
        undefined ->
            {ok, #{}}
    end.

read_parameter(_Parameter, {error, _} = Error) ->
    Error;
read_parameter(Parameter, {ok, Asked}) ->
    case application:get_env(kernel, Parameter, []) of
        Options when is_list(Options), length(Options) >= 0 ->
            read_options(Parameter, Options, Asked);
        Other ->
            {error, {bad_option, Parameter, Other}}
    end.

read_options(_Parameter, [], Asked) ->
    {ok, Asked};
read_options(Parameter, [Option | Options], Asked) ->
    case socket_option(Option) of
        {ok, Key, Value} ->
            _ = is_map_key(Key, Asked) andalso maps:get(Key, Asked) =/= Value
                andalso log_option(Parameter, Option, "the one UDP port has got another value"),
            read_options(Parameter, Options, maps:merge(#{Key => Value}, Asked));
        nothing_to_do ->
            read_options(Parameter, Options, Asked);
        unknown ->
            log_option(Parameter, Option, "it has no meaning for QUIC"),
            read_options(Parameter, Options, Asked);
        bad ->
            {error, {bad_option, Parameter, Option}}
    end.

socket_option({Size, N}) when Size =:= recbuf; Size =:= sndbuf ->
    case is_integer(N) andalso N > 0 andalso N =< 16#7fffffff of
        true -> {ok, Size, N};
        false -> bad
    end;
socket_option({Ip, Address}) when Ip =:= ip; Ip =:= ifaddr ->
    case macula_dist_discovery:address(Address) of
        {ok, Value} -> {ok, ip, Value};
        error -> bad
    end;
socket_option({ipv6_v6only, Only}) ->
    case is_boolean(Only) of
        true -> {ok, only_v6, Only};
        false -> bad
    end;
%% QUIC never delays.
socket_option({nodelay, Nodelay}) when is_boolean(Nodelay) ->
    nothing_to_do;
%% The service class and the priority of a datagram are set with each one, for its ECN bits.
socket_option(_) ->
    unknown.

log_option(Parameter, Option, Why) ->
    ?LOG_WARNING("macula_dist: ~0tp of ~s is not obeyed: ~s", [Option, Parameter, Why],
                 #{macula_dist => {option_not_obeyed, Parameter, Option}}).

liveness() ->
    number(macula_dist_liveness, ?LIVENESS, 1000, 600000).

%% @doc The liveness time, as it was checked when the port was opened.
-spec own_liveness() -> pos_integer().
own_liveness() ->
    {ok, Liveness} = liveness(),
    Liveness.

%% @doc The time of each step of a set-up in milliseconds, as net_kernel reads it.
-spec setup_time() -> pos_integer().
setup_time() ->
    case application:get_env(kernel, net_setuptime) of
        {ok, Seconds} when is_number(Seconds), Seconds >= 120 -> 120000;
        {ok, Seconds} when is_number(Seconds), Seconds > 0 -> max(1, round(1000 * Seconds));
        _ -> ?SETUP_TIME
    end.

congestion() ->
    case argument(macula_dist_congestion) of
        none -> {ok, bbr};
        "bbr" -> {ok, bbr};
        "cubic" -> {ok, cubic};
        Text -> {error, {bad_option, macula_dist_congestion, Text}}
    end.

lanes() ->
    case argument(macula_dist_lanes) of
        none -> {ok, 2};
        "2" -> {ok, 2};
        "1" -> {ok, 1};
        Text -> {error, {bad_option, macula_dist_lanes, Text}}
    end.

number(Flag, Default, Least, Most) ->
    case argument(Flag) of
        none -> {ok, Default};
        Text ->
            case string:to_integer(Text) of
                {N, ""} when is_integer(N), N >= Least, N =< Most -> {ok, N};
                _ -> {error, {bad_option, Flag, Text}}
            end
    end.

argument(Flag) ->
    case init:get_argument(Flag) of
        {ok, Values} -> string:join(lists:last(Values), " ");
        error -> none
    end.
