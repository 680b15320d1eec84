%% @doc The options of `macula_quic', parsed by the one table, `macula_quic_option_table'.
%%
%% A call gives a list of `{Key, Value}' or a map; a later entry of a list overrides an earlier
%% one, and in a map two names of one option must agree. What comes out is complete and checked: the
%% native side fills in nothing. Whoever gives an unknown key, or a value that a key cannot have, gets
%% `{error, {bad_option, Key, Why}}', where `Why' is an atom or a tuple; a key that other QUIC libraries
%% know, and this one cannot honour, gives `{error, {unsupported_option, Key}}', unless its value asks
%% for nothing but what is done anyway.
%% @private
-module(macula_quic_options).

-export([listen/1, connect/1, reload/1, reloaded/2, stream/2, keys/1, split/2]).

-export_type([options/0, role/0]).

-type options() :: [{atom(), term()} | atom()] | map().
-type role() :: macula_quic_option_table:role().

%% @doc The options of a listener, as the native side takes them.
-spec listen(options()) -> {ok, map()} | {error, term()}.
listen(Options) ->
    chain(parse(listen, Options), [fun credentials/1, fun hosts/1, fun server_trust/1, fun server_sessions/1,
                                   fun verdicts/1, fun marks/1,
                                   fun mtu/1, fun native_listen/1]).

%% @doc The options of a dial. The addresses are the caller's to add.
-spec connect(options()) -> {ok, map()} | {error, term()}.
connect(Options) ->
    chain(parse(connect, Options), [fun credentials/1, fun client_trust/1, fun verdicts/1, fun marks/1,
                                    fun mtu/1, fun native_connect/1]).

%% @doc The options of a listener that change, as the native side takes them: what is empty, or `keep', stays.
-spec reload(options()) -> {ok, map()} | {error, term()}.
reload(Options) ->
    chain(parse(reload, Options), [fun credentials/1, fun hosts/1, fun new_trust/1, fun native_reload/1]).

%% @doc The options of a listener after a reload.
-spec reloaded(options(), [{atom(), term()}]) -> [{atom(), term()}].
reloaded(Changes, Options) ->
    New = case is_map(Changes) of
        true -> maps:to_list(Changes);
        false -> proplists:unfold(Changes)
    end,
    Given = [Key || {Key, _} <- New],
    %% One name of a certificate goes before another, so none of an older one may stay.
    Together = [[certfile, cert, keyfile, key, password], [cacertfile, cacerts]],
    Gone = lists:append([Keys || Keys <- Together, Keys -- Given =/= Keys]),
    [Option || {Key, _} = Option <- Options, not lists:member(Key, Gone ++ Given)] ++ New.

%% @doc The options of the calls on streams.
-spec stream(role(), options()) -> {ok, map()} | {error, term()}.
stream(Role, Options) ->
    parse(Role, Options).

%% @doc Every option of a role, with its default.
-spec keys(role()) -> [{atom(), term()}].
keys(Role) ->
    defaults(macula_quic_option_table:rows(Role)).

defaults(Rows) ->
    [{Key, Default} || {option, Key, _Type, Default, _Text} <- Rows].

%% @doc The options among what was given, and the rest, which is the user's own. What other QUIC
%% libraries know counts as an option.
-spec split(role(), options()) -> {ok, {[{atom(), term()}], map()}} | {error, term()}.
split(Role, Options) when is_map(Options) ->
    Keys = [element(2, Row) || Row <- macula_quic_option_table:rows(Role)],
    Known = maps:with(Keys, Options),
    {ok, {maps:to_list(Known), maps:without(maps:keys(Known), Options)}};
split(Role, Options) ->
    try maps:from_list(proplists:unfold(Options)) of
        Map -> split(Role, Map)
    catch
        error:_ -> {error, {bad_option, name(Options), {wanted, options}}}
    end.

chain({ok, Value}, [Fun | Funs]) -> chain(Fun(Value), Funs);
chain(Result, _Funs) -> Result.

%%--------------------------------------------------------------------------------------------

parse(Role, Options) when is_map(Options) ->
    %% It has no order by which one of two names could win.
    parse(Role, maps:to_list(Options), #{});
parse(Role, Options) when is_list(Options) ->
    parse(Role, Options, last_wins);
parse(_Role, Options) ->
    {error, {bad_option, name(Options), {wanted, options}}}.

parse(Role, Options, Given) ->
    Rows = macula_quic_option_table:rows(Role),
    parse(Options, Rows, maps:from_list(defaults(Rows)), Given).

parse([], _Rows, Parsed, _Given) ->
    {ok, Parsed};
parse([{Key, Value} | Options], Rows, Parsed, Given) when is_atom(Key) ->
    case option(Key, Value, Rows) of
        {set, Name, Used} ->
            case once(Key, Name, Used, Parsed, Given) of
                {ok, More} -> parse(Options, Rows, Parsed#{Name := Used}, More);
                Error -> Error
            end;
        keep ->
            parse(Options, Rows, Parsed, Given);
        Error ->
            Error
    end;
parse([Key | Options], Rows, Parsed, Given) when is_atom(Key) ->
    parse([{Key, true} | Options], Rows, Parsed, Given);
parse([Other | _], _Rows, _Parsed, _Given) ->
    {error, {bad_option, name(Other), not_an_option}};
parse(_Improper, _Rows, _Parsed, _Given) ->
    {error, {bad_option, options, improper_list}}.

once(_Key, _Name, _Used, _Parsed, last_wins) ->
    {ok, last_wins};
once(Key, Name, Used, Parsed, Given) ->
    case {Given, Parsed} of
        {#{Name := _}, #{Name := Used}} -> {ok, Given};
        {#{Name := Other}, _} -> {error, {bad_option, Key, {contradicts, Other}}};
        _ -> {ok, Given#{Name => Key}}
    end.

option(Key, Value, Rows) ->
    case lists:keyfind(Key, 2, Rows) of
        {option, Key, Type, _Default, _Text} -> set(Key, Key, Type, Value);
        {same, Key, Name, Type, _Text} -> set(Key, Name, Type, Value);
        {unsupported, Key, Type, NoOp, _Why, _Instead} ->
            case {macula_quic_option_value:check(NoOp, Value),
                  macula_quic_option_value:check(Type, Value)} of
                {{ok, _}, _} -> keep;
                {error, error} -> {error, {bad_option, Key, {wanted, Type}}};
                {error, _} -> {error, {unsupported_option, Key}}
            end;
        false ->
            {error, {bad_option, Key, unknown}}
    end.

set(Key, Name, Type, Value) ->
    case macula_quic_option_value:check(Type, Value) of
        {ok, Used} -> {set, Name, Used};
        keep -> keep;
        unsupported -> {error, {unsupported_option, Key}};
        error -> {error, {bad_option, Key, {wanted, Type}}}
    end.

%% What stands in a wrong place may be a secret: an error shows the name alone.
name(Term) when is_atom(Term) -> Term;
name(Term) when is_tuple(Term), tuple_size(Term) > 0, is_atom(element(1, Term)) -> element(1, Term);
name(_) -> options.

%%--------------------------------------------------------------------------------------------
%% What several options say together.

credentials(Options) ->
    macula_quic_credentials:credentials(Options).

%% The certificates by name.
hosts(#{sni_hosts := keep} = Options) ->
    {ok, Options};
hosts(#{sni_hosts := Hosts} = Options) ->
    hosts(Hosts, [], Options).

hosts([{Host, Given} | Hosts], Read, Options) ->
    case macula_quic_credentials:credentials(Given) of
        {ok, #{chain := []}} -> {error, {bad_sni_host, Host, {bad_option, certfile, missing}}};
        {ok, #{chain := Chain, private_key := {Kind, Key}}} ->
            hosts(Hosts, [{Host, Chain, Kind, Key} | Read], Options);
        {error, Why} -> {error, {bad_sni_host, Host, Why}}
    end;
hosts([], Read, Options) ->
    {ok, Options#{sni_hosts := Read}}.

new_trust(#{verify := verify_none, fail_if_no_peer_cert := true}) ->
    {error, {bad_option, fail_if_no_peer_cert, {needs, verify_peer}}};
new_trust(Options) ->
    case macula_quic_credentials:roots(Options) of
        {ok, Roots} -> {ok, Options#{roots => Roots}};
        Error -> Error
    end.

server_trust(#{verify := verify_none, fail_if_no_peer_cert := true}) ->
    {error, {bad_option, fail_if_no_peer_cert, {needs, verify_peer}}};
server_trust(#{verify := verify_none} = Options) ->
    {ok, Options#{verify_client => none, roots => []}};
server_trust(Options) ->
    case macula_quic_credentials:roots(Options) of
        {ok, []} when map_get(verify_fun, Options) =:= undefined ->
            {error, {bad_option, verify, {needs, cacertfile}}};
        {ok, Roots} -> {ok, Options#{verify_client => client_wanted(Options), roots => Roots}};
        Error -> Error
    end.

client_wanted(#{fail_if_no_peer_cert := true}) -> required;
client_wanted(_) -> optional.

client_trust(#{verify_pubkey := Key} = Options) when is_binary(Key) ->
    {ok, Options#{trust => pubkey, roots => []}};
client_trust(#{verify := verify_none} = Options) ->
    {ok, Options#{trust => none, roots => []}};
client_trust(Options) ->
    case macula_quic_credentials:roots(Options) of
        {ok, []} -> {ok, Options#{trust => system, roots => []}};
        {ok, Roots} -> {ok, Options#{trust => roots, roots => Roots}};
        Error -> Error
    end.

%% A client that resumes shows no certificate: a ticket would stand for one whose chain and dates nobody
%% has looked at since.
server_sessions(#{resumption := Resumption, verify_client := VerifyClient})
  when Resumption =/= false, VerifyClient =/= none ->
    {error, {bad_option, resumption, {excludes, verify_peer}}};
server_sessions(#{resumption := false, resumption_keys := [_ | _]}) ->
    {error, {bad_option, resumption_keys, {needs, resumption}}};
%% What was sent early is read once because its session is kept here, and no other listener has it.
server_sessions(#{resumption := early_data, resumption_keys := [_ | _]}) ->
    {error, {bad_option, resumption_keys, {excludes, early_data}}};
server_sessions(Options) ->
    {ok, Options}.

%% A session that is resumed shows no certificates that could be asked about.
verdicts(#{verify_fun := undefined, custom_verify := true}) ->
    {error, {bad_option, custom_verify, {needs, verify_fun}}};
verdicts(#{verify_fun := undefined} = Options) ->
    {ok, Options};
verdicts(#{verify := verify_none}) ->
    {error, {bad_option, verify_fun, {needs, verify_peer}}};
verdicts(#{resumption := Resumption}) when Resumption =/= false ->
    {error, {bad_option, resumption, {excludes, verify_fun}}};
verdicts(Options) ->
    {ok, Options}.

marks(#{low_watermark := undefined, high_watermark := High} = Options) ->
    {ok, Options#{low_watermark := High div 2}};
marks(#{low_watermark := Low, high_watermark := High}) when Low >= High ->
    {error, {bad_option, low_watermark, {must_be_below, high_watermark}}};
marks(Options) ->
    {ok, Options}.

mtu(#{minimum_mtu := Min, initial_mtu := Initial} = Options) when Initial < Min ->
    mtu(Options#{initial_mtu := Min});
mtu(#{initial_mtu := Initial, maximum_mtu := Max}) when Max < Initial ->
    {error, {bad_option, maximum_mtu, {must_not_be_below, initial_mtu}}};
mtu(Options) ->
    {ok, Options}.

native_listen(Options) ->
    case Options of
        #{chain := []} ->
            {error, {bad_option, certfile, missing}};
        #{stateless_reset_key := ResetKey, verify_client := VerifyClient} ->
            {ok, (native(Options))#{
                verify_client => VerifyClient,
                sni_hosts => maps:get(sni_hosts, Options),
                handshakes => maps:get(max_handshakes, Options),
                handshake_timeout => limit(maps:get(handshake_timeout_ms, Options)),
                backlog => maps:get(backlog, Options),
                max_connections => some(maps:get(max_connections, Options)),
                max_per_address => some(maps:get(max_connections_per_address, Options)),
                rate_per_address => some(maps:get(connection_rate_per_address, Options)),
                burst_per_address => given(connection_burst_per_address, Options,
                                           some(maps:get(connection_rate_per_address, Options))),
                retry => maps:get(retry, Options),
                migration => maps:get(migration_enabled, Options),
                resumption => maps:get(resumption, Options),
                resumption_keys => maps:get(resumption_keys, Options),
                resumption_lifetime => maps:get(resumption_lifetime_s, Options),
                early_data_limit => maps:get(early_data_limit, Options),
                early_data_sessions => maps:get(early_data_sessions, Options),
                reset_key => ResetKey}}
    end.

native_reload(#{chain := Chain, private_key := {Kind, Key}, roots := Roots, sni_hosts := Hosts} = Options) ->
    {ok, #{cert => Chain,
           key_kind => Kind,
           key => Key,
           sni_hosts => Hosts,
           verify => case maps:get(verify, Options) of
               verify_peer -> true;
               verify_none -> false;
               keep -> keep
           end,
           required => maps:get(fail_if_no_peer_cert, Options),
           cacerts => Roots,
           alpn => case maps:get(alpn, Options) of keep -> []; Alpn -> Alpn end}}.

%% 0 is without limit.
some(infinity) -> 0;
some(Number) -> Number.

limit(infinity) -> 16#ffffffffffffffff;
limit(Milliseconds) -> Milliseconds.

native_connect(#{early_data := true, resumption := false}) ->
    {error, {bad_option, early_data, {needs, resumption}}};
native_connect(#{trust := Trust} = Options) ->
    {LocalAddress, LocalPort} = case Options of
        #{local_address := undefined} -> {<<>>, 0};
        #{local_address := Local} -> Local
    end,
    PubKey = case Options of
        #{verify_pubkey := undefined} -> <<>>;
        #{verify_pubkey := Key} -> Key
    end,
    {ok, (native(Options))#{
        verify => Trust,
        pubkey => PubKey,
        migration => maps:get(migration_enabled, Options),
        resumption => maps:get(resumption, Options),
        early_data => maps:get(early_data, Options),
        server_name => maps:get(server_name_indication, Options),
        handshake_timeout => maps:get(handshake_timeout_ms, Options),
        local_address => LocalAddress,
        local_port => LocalPort}}.

native(#{chain := Chain, private_key := {Kind, Key}, roots := Roots} = Options) ->
    #{alpn => maps:get(alpn, Options),
      cert => Chain,
      key_kind => Kind,
      key => Key,
      cacerts => Roots,
      verify_fun => maps:get(verify_fun, Options),
      keylog => maps:get(keylog, Options),
      sslkeylogfile => given(sslkeylogfile, Options, <<>>),
      high_watermark => maps:get(high_watermark, Options),
      low_watermark => maps:get(low_watermark, Options),
      disconnect_timeout => given(disconnect_timeout_ms, Options, 0),
      transport => transport(Options)}.

given(Key, Options, Otherwise) ->
    case Options of
        #{Key := undefined} -> Otherwise;
        #{Key := Value} -> Value
    end.

transport(Options) ->
    Datagrams = case Options of
        #{datagram_receive_enabled := true, datagram_receive_buffer := Size} -> Size;
        _ -> 0
    end,
    #{idle_timeout => maps:get(idle_timeout_ms, Options),
      keep_alive => maps:get(keep_alive_interval_ms, Options),
      bidi_streams => maps:get(peer_bidi_stream_count, Options),
      uni_streams => maps:get(peer_unidi_stream_count, Options),
      stream_receive_window => maps:get(stream_recv_window, Options),
      receive_window => maps:get(conn_flow_control_window, Options),
      send_window => maps:get(send_window, Options),
      congestion_control => maps:get(congestion_control, Options),
      initial_window => given(initial_window_packets, Options, 0),
      send_idle_timeout => given(send_idle_timeout_ms, Options, 0),
      mtu_discovery_interval => maps:get(mtu_discovery_search_complete_timeout_us, Options),
      initial_rtt => maps:get(initial_rtt_ms, Options),
      min_mtu => maps:get(minimum_mtu, Options),
      initial_mtu => maps:get(initial_mtu, Options),
      max_mtu => maps:get(maximum_mtu, Options),
      datagram_receive_buffer => Datagrams,
      datagram_send_buffer => maps:get(datagram_send_buffer, Options),
      qlog_dir => given(qlog_dir, Options, <<>>)}.
