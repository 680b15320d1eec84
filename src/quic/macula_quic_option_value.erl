%% @doc The types of option values: what belongs to each, how it is used, and its name in words.
%% @private
-module(macula_quic_option_value).

-export([check/2, words/1]).

-export_type([type/0]).

-type type() :: {integer, integer(), integer()}
              | {one_of, [term()]}
              | {counted, pos_integer()}
              | {translated, [{term(), term()}], type()}
              | {at_most, integer(), type()}
              | {nonzero, type()}
              | atom().

-define(MAX_VARINT, 16#3FFFFFFFFFFFFFFF).

%% @doc A value as it is used; `keep' if it changes nothing; `unsupported' if it is one of the type
%% that cannot be had; `error' if it is none of the type.
-spec check(type(), term()) -> {ok, term()} | keep | unsupported | error.
check(any, Value) ->
    {ok, Value};
check(credentials, Value) ->
    %% What it holds is seen when it is read.
    {ok, Value};
check(binary, Value) when is_binary(Value) ->
    {ok, Value};
check({integer, Min, Max}, Value) when is_integer(Value), Value >= Min, Value =< Max ->
    {ok, Value};
check({one_of, Values}, Value) ->
    case [V || V <- Values, V =:= Value] of
        [_ | _] -> {ok, Value};
        [] -> error
    end;
check({translated, Pairs, Type}, Value) ->
    case [Used || {Given, Used} <- Pairs, Given =:= Value] of
        [keep] -> keep;
        [Used] -> {ok, Used};
        [] ->
            case check(Type, Value) of
                {ok, _} -> unsupported;
                Other -> Other
            end
    end;
%% More counts as so much.
check({at_most, Most, Type}, Value) ->
    case check(Type, Value) of
        {ok, Given} -> {ok, min(Given, Most)};
        Other -> Other
    end;
%% 0 leaves what is there without the option.
check({nonzero, _Type}, 0) ->
    keep;
check({nonzero, Type}, Value) ->
    check(Type, Value);
check(boolean, Value) when is_boolean(Value) ->
    {ok, Value};
check(switch, Value) when is_boolean(Value) ->
    {ok, Value};
check(switch, 0) ->
    {ok, false};
check(switch, 1) ->
    {ok, true};
check(timeout, infinity) ->
    {ok, infinity};
check(timeout, Value) when is_integer(Value), Value >= 0, Value =< 16#ffffffff ->
    {ok, Value};
check(period, Value) when Value =:= infinity; Value =:= 0 ->
    {ok, infinity};
check(period, Value) when is_integer(Value), Value > 0, Value =< 16#ffffffff ->
    {ok, Value};
%% Longer than a process can wait.
check(period, Value) when is_integer(Value), Value > 0, Value =< 16#ffffffffffffffff ->
    {ok, infinity};
check({counted, _Max}, infinity) ->
    {ok, infinity};
check({counted, Max}, Value) ->
    check({integer, 1, Max}, Value);
check(count, infinity) ->
    {ok, infinity};
check(count, Value) when is_integer(Value), Value > 0, Value =< ?MAX_VARINT ->
    {ok, Value};
check(active, Value) when is_boolean(Value); Value =:= once ->
    {ok, Value};
check(active, Value) when is_integer(Value), Value > 0, Value =< 32767 ->
    {ok, Value};
%% No message may come: passive.
check(active, Value) when is_integer(Value), Value >= -32768, Value =< 0 ->
    {ok, false};
%% As it is to be, where a count adds to nothing.
check(mode, Value) when is_boolean(Value); Value =:= once ->
    {ok, Value};
check(mode, Value) ->
    check({integer, 1, 32767}, Value);
%% 1: told to the peer at once, 2: fails when it would wait, 4: closed when it fails, 8: tells that
%% the peer has taken it.
check(start_flag, Flags) when is_integer(Flags), Flags >= 0, Flags < 8 ->
    {ok, Flags};
check(start_flag, Flags) when is_integer(Flags), Flags >= 8, Flags =< 15 ->
    unsupported;
check(file_name, undefined) ->
    {ok, undefined};
check(file_name, [_ | _] = Name) ->
    try unicode:characters_to_binary(Name) of
        Bin when is_binary(Bin) -> check(file_name, Bin);
        _ -> error
    catch
        error:badarg -> error
    end;
check(file_name, Name) when is_binary(Name), Name =/= <<>> ->
    case {unicode:characters_to_list(Name), binary:match(Name, <<0>>)} of
        {Chars, nomatch} when is_list(Chars) -> {ok, Name};
        _ -> error
    end;
check(verify, Value) when Value =:= verify_peer; Value =:= peer; Value =:= webpki ->
    {ok, verify_peer};
check(verify, Value) when Value =:= verify_none; Value =:= none ->
    {ok, verify_none};
check(pubkey, Key) when is_binary(Key), byte_size(Key) =:= 32 ->
    {ok, Key};
check(pubkey, Value) when Value =:= <<>>; Value =:= undefined ->
    {ok, undefined};
check(reset_key, Key) when is_binary(Key), byte_size(Key) >= 32 ->
    {ok, Key};
check(secrets, Key) when is_binary(Key) ->
    check(secrets, [Key]);
check(secrets, Keys) when is_list(Keys), length(Keys) =< 16 ->
    case [Key || Key <- Keys, not is_binary(Key) orelse byte_size(Key) < 32] of
        [] -> {ok, Keys};
        _ -> error
    end;
check(password, undefined) ->
    {ok, undefined};
check(password, Fun) when is_function(Fun, 0) ->
    try Fun() of
        Password when not is_function(Password) -> check(password, Password);
        _ -> error
    catch
        %% The reason may hold a part of the secret.
        _:_ -> error
    end;
check(password, Password) when is_binary(Password); is_list(Password) ->
    try {ok, binary_to_list(iolist_to_binary(Password))}
    catch error:badarg -> error
    end;
check(host_name, Name) when is_binary(Name); is_list(Name) ->
    try unicode:characters_to_binary(Name) of
        Bin when is_binary(Bin), byte_size(Bin) > 0, byte_size(Bin) =< 255 -> {ok, Bin};
        _ -> error
    catch
        error:badarg -> error
    end;
check(server_name, Name) ->
    case check(host_name, Name) of
        {ok, Text} ->
            case is_dns_name(Text) orelse is_ip(Text) of
                true -> {ok, Text};
                false -> error
            end;
        error ->
            error
    end;
check(sni_hosts, Hosts) when is_map(Hosts) ->
    check(sni_hosts, maps:to_list(Hosts));
check(sni_hosts, Hosts) when is_list(Hosts) ->
    try lists:foldl(fun sni_host/2, #{}, Hosts) of
        ByName -> {ok, maps:to_list(ByName)}
    catch
        %% Also what is no list of pairs; the reason may hold a part of a secret.
        _:_ -> error
    end;
check(verify_fun, undefined) ->
    {ok, undefined};
check(verify_fun, {Fun, State}) when is_function(Fun, 3); is_function(Fun, 4) ->
    {ok, {Fun, State}};
check(local_address, Address) ->
    local_address(Address);
check(alpn, Protocols) ->
    alpn(Protocols);
check(_Type, _Value) ->
    error.

%% What TLS takes for a name to ask for: the last label is no number, and a dot may follow it.
is_dns_name(Text) ->
    Label = "[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?",
    byte_size(Text) =< 253
        andalso re:run(Text, ["^(", Label, "\\.)*(?![0-9]+\\.?\\z)", Label, "\\.?\\z"], [{capture, none}]) =:= match.

%% Without brackets or an interface, which are no part of a name.
is_ip(Text) ->
    re:run(Text, "^[0-9a-fA-F:.]+\\z", [{capture, none}]) =:= match
        andalso element(1, inet:parse_strict_address(binary_to_list(Text))) =:= ok.

local_address({Address, Port}) when is_integer(Port), Port >= 0, Port =< 65535 ->
    case macula_quic_address:literal(Address) of
        {ok, Text} -> {ok, {Text, Port}};
        error -> error
    end;
local_address(Address) ->
    case macula_quic_address:literal(Address) of
        {ok, Text} -> {ok, {Text, 0}};
        error -> address_and_port(Address)
    end.

%% "127.0.0.1:4433", "[::1]:4433". Without brackets the last part of an IPv6 address is no port.
address_and_port(Text) when is_binary(Text) ->
    address_and_port(binary_to_list(Text));
address_and_port([_ | _] = Text) ->
    case io_lib:latin1_char_list(Text) andalso string:split(Text, ":", trailing) of
        [[First | _] = Ip, [Digit | _] = Digits] when Digit >= $0, Digit =< $9 ->
            case {First =/= $[ andalso lists:member($:, Ip), string:to_integer(Digits)} of
                {false, {Port, []}} -> local_address({Ip, Port});
                _ -> error
            end;
        _ ->
            error
    end;
address_and_port(_) ->
    error.

alpn([_ | _] = Protocols) ->
    try [protocol(P) || P <- protocols(Protocols)] of
        Names when length(Names) =< 255 ->
            case [N || N <- Names, byte_size(N) =:= 0 orelse byte_size(N) > 255] of
                [] -> {ok, Names};
                _ -> error
            end;
        _ ->
            error
    catch
        error:_ -> error
    end;
alpn(Protocol) when is_binary(Protocol); is_atom(Protocol), Protocol =/= undefined ->
    alpn([Protocol]);
alpn(_) ->
    error.

%% One name given as a string, or several.
protocols([Char | _] = String) when is_integer(Char) -> [String];
protocols(List) -> List.

protocol(Name) when is_atom(Name), Name =/= undefined -> atom_to_binary(Name, utf8);
protocol(Name) -> iolist_to_binary(Name).

%% A later one of the same name overrides. Options of an entry are those of its certificate.
sni_host({Host, Options}, ByName) ->
    {ok, Text} = check(host_name, Host),
    Name = string:lowercase(Text),
    {match, _} = re:run(Name, "^(\\*\\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\\.[a-z0-9_][a-z0-9_-]{0,62})*$"),
    Given = case is_map(Options) of
        true -> Options;
        false -> maps:from_list(Options)
    end,
    Default = #{certfile => undefined, cert => undefined, keyfile => undefined, key => undefined,
                password => undefined},
    [] = maps:keys(Given) -- maps:keys(Default),
    {ok, Password} = check(password, maps:get(password, Given, undefined)),
    ByName#{Name => maps:merge(Default, Given#{password => Password})}.

%% @doc The values of a type in words.
-spec words(type()) -> string().
words({integer, Min, Max}) -> text("an integer from ~ts to ~ts", [number(Min), number(Max)]);
words({counted, Max}) -> text("~ts, or infinity", [words({integer, 1, Max})]);
words({one_of, []}) -> "nothing";
words({one_of, [Value]}) -> text("~0p", [Value]);
words({one_of, Values}) -> lists:flatten(lists:join(", ", [text("~0p", [V]) || V <- Values]));
words({translated, _Pairs, Type}) -> words(Type);
words({at_most, _Most, Type}) -> words(Type);
words({nonzero, Type}) -> "0, or " ++ words(Type);
words(any) -> "any term";
words(binary) -> "a binary";
words(boolean) -> "true or false";
words(switch) -> "true, false, 1 or 0";
words(timeout) -> "milliseconds or infinity";
words(period) -> "milliseconds, or infinity or 0 for no limit";
words(interval) -> "an integer from 10 to 3600000, or infinity";
words(count) -> "a positive integer or infinity";
words(active) -> "true, false, once or an integer from -32768 to 32767";
words(mode) -> "true, false, once or an integer from 1 to 32767";
words(file_name) -> "a file name";
words(start_flag) -> words({integer, 0, 15});
words(verify) -> "verify_peer (peer, webpki) or verify_none (none)";
words(pubkey) -> "an Ed25519 public key of 32 bytes";
words(reset_key) -> "a binary of 32 bytes or more";
words(secrets) -> "a binary of 32 bytes or more, or a list of up to 16 of them";
words(password) -> "a string, a binary, or a function without arguments that gives one";
words(server_name) -> words(host);
words(local_address) -> "an IP address, {Address, Port} or \"Address:Port\"";
words(verify_fun) -> "{Fun, State} with a function of three or four arguments";
words(sni_hosts) ->
    "a map of host names to maps of certfile or cert, keyfile or key, and password";
words(alpn) -> "a list of protocol names (strings, binaries, atoms) of 1 to 255 bytes";
words(credentials) -> "a file name, PEM, or DER";
words(ip_address) -> "an IP address";
words(host) -> "a host name or an IP address";
words(iodata) -> "iodata";
words(options) -> "a list or a map of options";
words(counters) -> "a list of counters";
words(connection_flags) -> "none or silent, or a number";
words(atom) -> "an atom";
words(stream_flags) -> "graceful, abort_send, abort_receive or abort";
words(Other) -> text("~0p", [Other]).

%% Large limits are powers of two, less one or not.
number(N) when N > 16#ffffff, N band (N - 1) =:= 0 -> text("2^~b", [bits(N)]);
number(N) when N >= 16#ffffff, N band (N + 1) =:= 0 -> text("2^~b-1", [bits(N + 1)]);
number(N) when N < -16#ffffff -> "-" ++ number(-N);
number(N) -> integer_to_list(N).

bits(1) -> 0;
bits(N) -> 1 + bits(N bsr 1).

text(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).
