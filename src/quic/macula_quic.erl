%% @doc QUIC (RFC 9000) for Erlang: listeners, connections, streams and datagrams.
%%
%% A handle is a reference with one <em>owner</em>, the process that made or accepted it. The owner
%% gets its messages, `{quic, What, Handle, Detail}', all of which are listed in
%% `docs/reference/messages.md'. When the owner dies, its listeners and connections are closed and its
%% streams reset. {@link controlling_process/2} gives a handle, with the messages that wait, to
%% another process.
%%
%% A handle that nobody holds any more is collected: a listener is closed then, a stream finished
%% once all it has sent is delivered, a connection closed after its streams. Those that have
%% promised messages are kept, as a port is: a listener after {@link async_accept/1}, a connection
%% after {@link async_accept_stream/1}, a stream in active mode.
%%
%% Streams begin passive: {@link recv/2} reads from them. {@link setopt/3} makes them active, as
%% `inet:setopts/2' does, and data comes as messages. Both ways flow control reaches the peer;
%% `{active, true}' alone is unbounded. {@link send/2} makes a process wait that sends faster than
%% the network takes it.
%%
%% ```
%% {ok, L} = macula_quic:listen(4433, [{certfile, "cert.pem"}, {keyfile, "key.pem"},
%%                                     {alpn, ["echo"]}]),
%% {ok, Client} = macula_quic:connect("localhost", 4433, [{cacertfile, "cert.pem"},
%%                                                        {alpn, ["echo"]}], 5000),
%% {ok, Server} = macula_quic:accept(L, 5000),
%% {ok, Out} = macula_quic:open_stream(Client),
%% ok = macula_quic:send(Out, <<"hello">>),
%% {ok, In} = macula_quic:accept_stream(Server, #{}, 5000),
%% {ok, <<"hello">>} = macula_quic:recv(In, 5, 5000).
%% '''
%%
%% No function waits inside of the virtual machine's schedulers, and none fails on terms that it
%% does not know: those give `{error, badarg}' for a handle, `{error, {bad_option, Key, Why}}' for
%% an option. {@link format_error/1} puts any reason into words.
-module(macula_quic).

-export([listen/2, listen/3, accept/1, accept/2, async_accept/1, async_accept/2,
         close_listener/1, lock/1, unlock/1, reload/2]).
-export([connect/4, handshake/1, close_connection/1, close_connection/3,
         async_shutdown_connection/3, async_shutdown_connection/4]).
-export([open_stream/1, open_stream/2, accept_stream/1, accept_stream/3, async_accept_stream/1,
         async_accept_stream/2, close_stream/1, reset_stream/2, async_shutdown_stream/3]).
-export([send/2, send/3, async_send/2, async_send/3, tell_delivered/1, recv/2, recv/3, setopt/3]).
-export([send_datagram/2, send_datagram/3, tell_changes/1, tell_changes/2, migrate/1, migrate/2]).
-export([close/1, controlling_process/2, handoff_stream/3]).
-export([peername/1, sockname/1, peercert/1, peercerts/1, negotiated_protocol/1, max_datagram_size/1,
         path_mtu/1, getstat/1, getstat/2, counters/0, counters/1, info/1, format_error/1]).
-export([generate_self_signed_cert/3]).

-export_type([handle/0, listener/0, connection/0, stream/0, address/0, host_address/0, reason/0,
              active/0, options/0, counter/0]).

-type counter() :: #{name := atom(), type := counter | gauge, help := string(),
                     value := non_neg_integer()}.
%% A `counter' only grows, a `gauge' does not.
-type handle() :: listener() | connection() | stream().
-type listener() :: reference().
-type connection() :: reference().
-type stream() :: reference().
-type address() :: {string(), inet:port_number()}.
%% The text of an IP address, with the interface behind a `%' where the address counts on one link only
%% (`fe80::1%eth0'), and a UDP port.
-type host_address() :: string() | binary() | inet:ip_address() | {inet:ip6_address(), pos_integer()}.
%% An IP address, or in {@link connect/4} a name.
-type active() :: boolean() | once | 1..32767.
-type options() :: [{atom(), term()} | atom()] | map().
-type reason() :: term().

-define(is_port(Port), (is_integer(Port) andalso Port >= 0 andalso Port =< 65535)).
-define(MAX_CODE, 16#3fffffffffffffff).
%% Bytes of a datagram, and of a host name (RFC 1035, section 2.3.4) with its dot.
-define(LONGEST_REASON, 65535).
-define(LONGEST_NAME, 254).
-define(is_code(Code), (is_integer(Code) andalso Code >= 0 andalso Code =< ?MAX_CODE)).

%%--------------------------------------------------------------------------------------------
%% Listening

%% @doc Listens on all addresses of both families, or on `{Address, Port}'.
%% @equiv listen("::", Port, Options)
-spec listen(inet:port_number() | {host_address(), inet:port_number()}, options()) ->
          {ok, listener()} | {error, reason()}.
listen({Address, Port}, Options) ->
    listen(Address, Port, Options);
listen(Port, Options) ->
    case listen("::", Port, Options) of
        %% A host without IPv6.
        {error, Why} when Why =:= eafnosupport; Why =:= eaddrnotavail ->
            listen("0.0.0.0", Port, Options);
        Result ->
            Result
    end.

%% @doc Listens on one address and port; the calling process owns the listener.
%%
%% `"::"' serves IPv4 as well; any other IPv6 address does not. A link-local address, here as in
%% {@link connect/4}, has its interface behind a `%', by name or number: `"fe80::1%eth0"', or
%% `{Address, Number}'. Port 0 takes a free one, which
%% {@link sockname/1} tells. Handshakes are completed without an accepting process, up to the
%% backlog, as a TCP listener does. A connection that the peer has ended while it waited is given
%% where the peer has left streams in it, and passed over otherwise.
%%
%% A certificate (`certfile', `keyfile') is needed, to which `sni_hosts' adds others by name; `alpn' names the application protocols; with
%% `verify' (`verify_none' by default) and `fail_if_no_peer_cert' clients show theirs. All options, with
%% their values and defaults, are in `docs/reference/options.md'.
%%
%% Errors: `eaddrinuse', `eacces', `eaddrnotavail' and the like; `{bad_certfile, File, Why}',
%% `{bad_keyfile, File, Why}', `{bad_cacertfile, File, Why}', where `File' is the option's name unless the
%% file or its directory is there, as what was given may be a key; `{bad_cert, Why}', `{bad_key, Why}'
%% for what can be read and not used; `{bad_sni_host, Host, Reason}' with one of these for a host of
%% `sni_hosts'; `{bad_option, Key, Why}', `{unsupported_option, Key}'.
%%
%% The port of a closed listener stays taken while connections accepted through it live; a new
%% listener of this virtual machine on the same address takes it over.
-spec listen(host_address(), inet:port_number(), options()) ->
          {ok, listener()} | {error, reason()}.
listen(Address, Port, Options) when ?is_port(Port) ->
    case macula_quic_address:literal(Address) of
        {ok, Ip} ->
            case macula_quic_options:listen(Options) of
                {ok, Native} ->
                    macula_quic_verifier:listen(Native#{address => Ip, port => Port}, fun(Asking) ->
                        call(fun(Ref) -> macula_nif:listener_start(Ref, Asking) end)
                    end);
                Error ->
                    Error
            end;
        error ->
            {error, {bad_option, address, {wanted, ip_address}}}
    end;
listen(_Address, _Port, _Options) ->
    {error, {bad_option, port, {wanted, {integer, 0, 65535}}}}.

%% @equiv accept(Listener, infinity)
-spec accept(listener()) -> {ok, connection()} | {error, reason()}.
accept(Listener) ->
    accept(Listener, infinity).

%% @doc Waits for a connection; the calling process owns it. With a timeout of 0 one that is there is
%% given. Errors: `timeout', `closed'.
-spec accept(listener(), timeout()) -> {ok, connection()} | {error, reason()}.
accept(Listener, Timeout) ->
    await_there(fun(Ref, Now) -> macula_nif:listener_accept(Listener, Ref, Now) end, Timeout).

%% @equiv async_accept(Listener, [])
-spec async_accept(listener()) -> ok | {error, reason()}.
async_accept(Listener) ->
    async_accept(Listener, []).

%% @doc Has connections delivered to the calling process, which owns them, as
%% `{quic, new_conn, Conn, Info}', until the listener is closed or the process dies. `Info' is a
%% map of `peername', `remote_addr' (the same as `<<"Address:Port">>'), `negotiated_protocol',
%% `server_name' and `peercert' (DER), each of the last three `undefined' where there is none, `resumed',
%% a boolean, and `early_data', which is `pending' where the client sends early data, and `none' otherwise.
%%
%% Called again, it changes the options and nothing else. Several processes get connections in
%% turn. Option: `count' (`infinity'): no more than so many.
-spec async_accept(listener(), options()) -> ok | {error, reason()}.
async_accept(Listener, Options) ->
    with_options(arm, Options, fun(#{count := Count}) ->
        macula_nif:listener_arm(Listener, case Count of infinity -> 0; _ -> Count end)
    end).

%% @doc Stops listening. Established connections are left alone. Returns when the port is free, or
%% only they still hold it. The owner gets `{quic, listener_stopped, Listener, undefined}'. A listener
%% that has lost its socket, and gets no other, stops by itself, with the POSIX reason instead.
-spec close_listener(listener()) -> ok | {error, badarg}.
close_listener(Listener) ->
    call(fun(Ref) -> macula_nif:listener_close(Listener, Ref) end).

%% @doc Refuses new connections until {@link unlock/1}, which clients see as `connection_refused'.
%% Established connections, those that wait to be accepted, and handshakes that have begun go on. A locked
%% listener can be locked again. `locked' in {@link info/1} tells. Error: `closed'.
-spec lock(listener()) -> ok | {error, reason()}.
lock(Listener) ->
    native(fun() -> macula_nif:listener_set_locked(Listener, true) end).

%% @doc Takes new connections again.
-spec unlock(listener()) -> ok | {error, reason()}.
unlock(Listener) ->
    native(fun() -> macula_nif:listener_set_locked(Listener, false) end).

%% @doc Gives a listener other certificates, keys, trusted roots, or application protocols, for connections that
%% begin from now on.
%% Files are read anew. Established connections and handshakes that have begun keep what they have, and no
%% datagram is lost.
%%
%% Options are those of {@link listen/3} that concern certificates, and `alpn'
%% (`docs/reference/options.md'). The certificate with its key, the certificates by name (`sni_hosts', which
%% replaces all of them), the roots, `verify', `fail_if_no_peer_cert' and `alpn' stay as they are where they are
%% not given. Where anything is wrong nothing changes, and the error is one of {@link listen/3}. Other errors:
%% `closed'; `{unsupported_option, Key}' for all other options of a listener, of which {@link format_error/1}
%% says why.
-spec reload(listener(), options()) -> ok | {error, reason()}.
reload(Listener, Options) ->
    case macula_quic_options:reload(Options) of
        {ok, Native} -> call(fun(Ref) -> macula_nif:listener_reload(Listener, Ref, Native) end);
        Error -> Error
    end.

%%--------------------------------------------------------------------------------------------
%% Connecting

%% @doc Connects to a host: a name, or an IP address. The calling process owns the connection.
%%
%% All addresses of the host are tried, at the pace of RFC 8305; `Timeout' (milliseconds or
%% `infinity') is over everything, name resolution included. The server's certificate is verified
%% by default, against the roots of the platform and the host's name; `cacertfile' and `cacerts' name
%% other roots, where a certificate listed itself is trusted as it is, and `verify_pubkey' pins the key.
%% All options, with their values and defaults, are in `docs/reference/options.md'.
%%
%% With `resumption' sessions are resumed; with `early_data', too, what is sent goes with the first packet where a
%% ticket allows it, and may be replayed by others: then the call gives a connection whose handshake goes on,
%% which {@link handshake/1} waits for, and `{quic, early_data, Conn, accepted | rejected}' tells of.
%% `docs/guides/quic.md' says what that means.
%%
%% Errors: `timeout', `nxdomain', `econnrefused' where the system tells, at once what the system says
%% where no way leads to the address (`enetunreach', `ehostunreach', `eacces', `einval'),
%% `eafnosupport' for a local address of another family than the host's, `connection_refused' by
%% the server, `{bad_cert, Why}' if we, or the `verify_fun', refuse its certificate, `{tls_alert, Name}' if it refuses
%% ours, `{alpn_mismatch, Offered}', `bad_server_name' for a host, or a `server_name', that no certificate can
%% name, `{bad_option, Key, Why}' and other option errors. A server that misses a certificate may tell so only
%% after `{ok, Conn}', by `{quic, transport_shutdown, Conn, {tls_alert, certificate_required}}': in TLS 1.3 the
%% client's handshake is over by then.
-spec connect(host_address(), inet:port_number(), options(),
              timeout()) -> {ok, connection()} | {error, reason()}.
connect(Host, Port, Options, Timeout) when ?is_port(Port), Port > 0 ->
    case macula_quic_options:connect(Options) of
        {ok, Native} when Timeout =:= infinity; is_integer(Timeout), Timeout >= 0,
                          Timeout =< 16#ffffffff ->
            warn_unverified(Native, Host, Port),
            macula_quic_verifier:connect(Native, fun(Asking) ->
                macula_quic_call:connect(Host, Port, Asking, macula_quic_call:deadline(Timeout))
            end);
        {ok, _} ->
            {error, {bad_option, timeout, {wanted, timeout}}};
        Error ->
            Error
    end;
connect(_Host, _Port, _Options, _Timeout) ->
    {error, {bad_option, port, {wanted, {integer, 1, 65535}}}}.

%% Without a domain: the default handler shows no domain but its own, and this must be seen.
warn_unverified(#{verify := none}, Host, Port) ->
    logger:warning(#{what => quic_peer_not_verified, host => Host, port => Port},
                   #{macula => quic, report_cb => fun unverified/1});
warn_unverified(_Native, _Host, _Port) ->
    ok.

unverified(#{host := Host, port := Port}) ->
    {"macula: connecting to ~0tp port ~b without verifying its certificate", [Host, Port]}.

%% @doc `{ok, Conn}' if the connection is established, and `{error, Reason}' once it has ended. It is
%% established from the moment there is a handle, but for connections with early data: there this waits for
%% the end of the handshake. A server that does so before it acts on early data knows that the client is
%% there, and that nobody has replayed what somebody else has sent.
-spec handshake(connection()) -> {ok, connection()} | {error, reason()}.
handshake(Conn) ->
    case ask(Conn, handshake) of
        ok -> {ok, Conn};
        Error -> Error
    end.

%% @equiv close_connection(Conn, 0, <<>>)
-spec close_connection(connection()) -> ok | {error, badarg}.
close_connection(Conn) ->
    close_connection(Conn, 0, <<>>).

%% @doc Closes a connection at once, with an application error code (0..2^62-1) and a reason, of which
%% the peer sees what a packet takes. What its streams have not delivered is discarded: finish them first, and wait
%% for their `stream_closed'. The owner gets `{quic, closed, Conn, normal}', the peer's owner
%% `{quic, shutdown, Conn, {application_close, Code, Reason}}'.
-spec close_connection(connection(), non_neg_integer(), iodata()) -> ok | {error, reason()}.
close_connection(Conn, Code, Reason) when ?is_code(Code) ->
    try iolist_to_binary(Reason) of
        %% No packet takes more, and the rest would only be copied.
        <<Part:?LONGEST_REASON/binary, _, _/binary>> -> close_connection(Conn, Code, Part);
        Binary -> native(fun() -> macula_nif:conn_close(Conn, Code, Binary) end)
    catch
        error:badarg -> {error, {bad_option, reason, {wanted, iodata}}}
    end;
close_connection(_Conn, _Code, _Reason) ->
    {error, {bad_option, code, {wanted, {integer, 0, ?MAX_CODE}}}}.

%% @doc Closes a connection with a code, or `{Code, Reason}'. The flag is any number, `none', `silent', or a
%% list of them, and changes nothing: Quinn always tells the peer, also where other libraries would
%% leave the peer to its timeout.
-spec async_shutdown_connection(connection(), non_neg_integer() | atom() | [atom()],
                                non_neg_integer() | {non_neg_integer(), iodata()}) ->
          ok | {error, reason()}.
async_shutdown_connection(Conn, Flag, {Code, Reason}) ->
    async_shutdown_connection(Conn, Flag, Code, Reason);
async_shutdown_connection(Conn, Flag, Code) ->
    async_shutdown_connection(Conn, Flag, Code, <<>>).

%% @doc Closes a connection with a code and a reason.
-spec async_shutdown_connection(connection(), non_neg_integer() | atom() | [atom()],
                                non_neg_integer(), iodata()) -> ok | {error, reason()}.
async_shutdown_connection(Conn, Flag, Code, Reason) ->
    case flags(Flag, [{none, 0}, {silent, 1}]) of
        {ok, _Flags} -> close_connection(Conn, Code, Reason);
        error -> {error, {bad_option, flag, {wanted, connection_flags}}}
    end.

%% The sum of the numbers of flags, each given by its name.
flags(Number, _Names) when is_integer(Number), Number >= 0 ->
    {ok, Number};
flags(Name, Names) when is_atom(Name) ->
    flags([Name], Names);
flags(List, Names) ->
    flags(List, Names, 0).

flags([], _Names, Flags) ->
    {ok, Flags};
flags([Name | Rest], Names, Flags) ->
    case lists:keyfind(Name, 1, Names) of
        {Name, Flag} -> flags(Rest, Names, Flags bor Flag);
        false -> error
    end;
flags(_, _Names, _Flags) ->
    error.

%%--------------------------------------------------------------------------------------------
%% Streams

%% @equiv open_stream(Conn, #{})
-spec open_stream(connection()) -> {ok, stream()} | {error, reason()}.
open_stream(Conn) ->
    open_stream(Conn, #{}).

%% @doc Opens a stream; the calling process owns it. The peer learns of it with the first bytes
%% sent, or with its end (RFC 9000, section 2).
%%
%% Options: `active' (`false'), `direction' (`bidirectional', or `unidirectional'), `priority'
%% (0; streams of a higher one are served first), `timeout' (5000 ms; how long to wait when the
%% peer allows no more streams for now: 0 is not at all), `high_watermark' (that of the connection; from
%% how many bytes queued senders wait), `start_flag' (1: the peer learns of the stream at once). Errors:
%% `timeout', `closed'.
-spec open_stream(connection(), options()) -> {ok, stream()} | {error, reason()}.
open_stream(Conn, Options) ->
    with_options(open_stream, Options, fun(Opts) ->
        #{active := Active, direction := Dir, priority := Prio, timeout := Timeout,
          start_flag := Start} = Opts,
        Bidi = Dir =:= bidirectional,
        Wait = if Start band 2 =/= 0 -> 0; true -> Timeout end,
        Open = fun(Ref) ->
            macula_nif:conn_open_stream(Conn, Ref, Bidi, Active, Prio, Wait)
        end,
        %% Mostly one is there, and nothing is made that could be waited for.
        Opened = case native(fun() -> Open(none) end) of
            later -> call(Open, infinity);
            Result -> Result
        end,
        begun(Opened, Opts)
    end).

%% What is said of a stream once there is one. One that has ended meanwhile says so by itself.
begun({ok, Stream} = Begun, Options) ->
    maps:foreach(fun(Key, Value) -> begin_with(Stream, Key, Value) end, Options),
    Begun;
begun(Error, _Options) ->
    Error.

begin_with(Stream, high_watermark, Bytes) when is_integer(Bytes) ->
    macula_nif:stream_set_watermarks(Stream, Bytes, Bytes div 2);
begin_with(Stream, start_flag, Flags) when Flags band 1 =/= 0 ->
    macula_nif:stream_announce(Stream);
begin_with(Stream, accepted_priority, Priority) when Priority =/= 0 ->
    macula_nif:stream_set_priority(Stream, Priority);
begin_with(_Stream, _Key, _Value) ->
    true.

%% @equiv accept_stream(Conn, #{}, infinity)
-spec accept_stream(connection()) -> {ok, stream()} | {error, reason()}.
accept_stream(Conn) ->
    accept_stream(Conn, #{}, infinity).

%% @doc Waits for a stream that the peer opens; the calling process owns it. Options: `active'
%% (`false'), `priority', `high_watermark'. With a timeout of 0 a stream that is there is given. Errors: `timeout', `closed'. Streams
%% that arrived before the peer, or the network, ended the connection are still given; `closed' comes after the last of them.
-spec accept_stream(connection(), options(), timeout()) -> {ok, stream()} | {error, reason()}.
accept_stream(Conn, Options, Timeout) ->
    with_options(accept_stream, Options, fun(#{active := Active, priority := Priority} = Opts) ->
        Accepted = await_there(fun(Ref, Now) ->
            case macula_nif:conn_accept_stream(Conn, Ref, Active, Now) of
                Operation when is_reference(Operation) -> Operation;
                Result -> {there, Result}
            end
        end, Timeout),
        Stream = case Accepted of
            {there, Result} -> Result;
            _ -> Accepted
        end,
        begun(Stream, Opts#{accepted_priority => Priority})
    end).

%% @equiv async_accept_stream(Conn, #{})
-spec async_accept_stream(connection()) -> ok | {error, reason()}.
async_accept_stream(Conn) ->
    async_accept_stream(Conn, #{}).

%% @doc Has every stream that the peer opens delivered to the owner of the connection, which alone
%% may ask for it, as `{quic, new_stream, Stream, Info}'. The owner of the connection then owns
%% the stream. `Info' is a map of `conn', `stream_id' and `direction'. Option: `active' (`false').
-spec async_accept_stream(connection(), options()) -> ok | {error, reason()}.
async_accept_stream(Conn, Options) ->
    with_options(arm_stream, Options, fun(#{active := Active}) ->
        macula_nif:conn_arm(Conn, Active)
    end).

%% @doc Finishes sending, once what is queued is sent, and stops reading. The owner gets
%% `stream_closed' when the peer has acknowledged everything.
-spec close_stream(stream()) -> ok | {error, badarg}.
close_stream(Stream) ->
    native(fun() -> macula_nif:stream_close(Stream) end).

%% @doc Shuts down a half of a stream, or both. The flag is a name, a list of names, or the sum of
%% their numbers:
%% <ul>
%% <li>`graceful' (1), and `none' (0): finishes sending; the peer gets all of it, then the end.</li>
%% <li>`abort_send' (2): resets the sending half with the code (RESET_STREAM).</li>
%% <li>`abort_receive' (4): asks the peer to stop sending, with the code (STOP_SENDING).</li>
%% <li>`abort' (6): both.</li>
%% <li>`immediate' (8), `inline' (16): change nothing, as no shutdown waits. Immediate alone aborts both
%% halves.</li>
%% </ul>
-spec async_shutdown_stream(stream(), non_neg_integer() | atom() | [atom()],
                            non_neg_integer()) -> ok | {error, reason()}.
async_shutdown_stream(Stream, Flag, Code) when ?is_code(Code) ->
    Names = [{none, 0}, {graceful, 1}, {abort_send, 2}, {abort_receive, 4}, {abort, 6},
             {immediate, 8}, {inline, 16}],
    case flags(Flag, Names) of
        {ok, Flags} when Flags < 32 ->
            Halves = case {Flags band 7, Flags band 8} of
                {0, 0} -> 1;
                {0, 8} -> 6;
                {Some, _} -> Some
            end,
            [Finish, Reset, Stop] = [Halves band Bit =/= 0 || Bit <- [1, 2, 4]],
            native(fun() ->
                macula_nif:stream_shutdown(Stream, Finish, Reset, Stop, Code)
            end);
        _ ->
            {error, {bad_option, flag, {wanted, stream_flags}}}
    end;
async_shutdown_stream(_Stream, _Flag, _Code) ->
    {error, {bad_option, code, {wanted, {integer, 0, ?MAX_CODE}}}}.

%% @doc Gives up a stream, both halves, with a code that the peer sees: what was not delivered is
%% discarded, nothing is read any more. The same as `async_shutdown_stream(Stream, abort, Code)'.
-spec reset_stream(stream(), non_neg_integer()) -> ok | {error, reason()}.
reset_stream(Stream, Code) ->
    async_shutdown_stream(Stream, abort, Code).

%% @equiv send(Stream, Data, #{})
-spec send(stream(), iodata()) -> ok | {error, reason()}.
send(Stream, Data) ->
    case iovec(Data) of
        {ok, Binaries} -> send_loop(Stream, Binaries, false, infinity);
        Error -> Error
    end.

%% @doc Sends data, and waits while more than the high-water mark is queued. `ok' means queued, as
%% with `gen_tcp'. Any process may send; data of one call stays together.
%%
%% Options: `timeout' (`infinity'; after it nothing of the data was sent), `fin' (`false'; finishes
%% the stream after the data). Errors: `closed', `{stopped, Code}' if the peer asked us to stop,
%% `timeout'.
-spec send(stream(), iodata(), options()) -> ok | {error, reason()}.
send(Stream, Data, Options) ->
    with_options(send, Options, fun(#{timeout := Timeout, fin := Fin}) ->
        case iovec(Data) of
            {ok, Binaries} ->
                send_loop(Stream, Binaries, Fin, macula_quic_call:deadline(Timeout));
            Error ->
                Error
        end
    end).

%% Most calls find room: for them nothing is made that could be waited for.
send_loop(Stream, Binaries, Fin, Deadline) ->
    case native(fun() -> macula_nif:stream_send(Stream, none, Binaries, Fin, now) end) of
        full -> send_when_drained(Stream, Binaries, Fin, Deadline);
        Result -> Result
    end.

send_when_drained(Stream, Binaries, Fin, Deadline) ->
    Send = fun(Ref) -> macula_nif:stream_send(Stream, Ref, Binaries, Fin, wait) end,
    case send_or_await_room(Send, macula_quic_call:left(Deadline)) of
        {sent, Result} -> Result;
        {error, Reason} = Error when Reason =:= timeout; Reason =:= badarg -> Error;
        _RoomOrEnd -> send_loop(Stream, Binaries, Fin, Deadline)
    end.

%% What the native call gives at once, or the word that there is room, or that there will be none.
send_or_await_room(Send, Timeout) ->
    macula_quic_call:call(fun(Ref) ->
        case Send(Ref) of
            {wait, Operation} -> {ok, Operation};
            Result -> {sent, Result}
        end
    end, Timeout).

%% @equiv async_send(Stream, Data, #{})
-spec async_send(stream(), iodata()) -> ok | {error, reason()}.
async_send(Stream, Data) ->
    send_or_be_told(Stream, Data, false).

%% @doc Sends data without waiting. `{error, busy}' if more than the high-water mark is queued:
%% then nothing of it was taken, and the calling process gets `{quic, send_ready, Stream,
%% undefined}' once the queue is down to the low-water mark.
%%
%% Options: `fin' (`false'; finishes the stream after the data, so that nothing of another process comes
%% between the two). Other errors are those of {@link send/3}.
-spec async_send(stream(), iodata(), options()) -> ok | {error, reason()}.
async_send(Stream, Data, Options) ->
    with_options(async_send, Options, fun(#{fin := Fin}) -> send_or_be_told(Stream, Data, Fin) end).

send_or_be_told(Stream, Data, Fin) ->
    case iovec(Data) of
        {ok, Binaries} ->
            native(fun() ->
                macula_nif:stream_send(Stream, make_ref(), Binaries, Fin, busy)
            end);
        Error ->
            Error
    end.

%% @doc Asks to be told, as the stream's owner, when all that was sent has arrived: `{quic, delivered,
%% Stream, undefined}' comes once the peer has acknowledged everything that was sent on the stream
%% before the call, and its end, if it was finished. That the peer's transport has it does not mean that
%% the peer has read it. Nothing else is waited for: no later data, no other stream, and no credit of
%% the peer's. Calls with nothing sent between them are answered together, as are those beyond 1024
%% that wait. When something else ends the sending half before that, it is all that is told.
-spec tell_delivered(stream()) -> ok | {error, reason()}.
tell_delivered(Stream) ->
    case native(fun() -> macula_nif:stream_tell_delivered(Stream) end) of
        true -> ok;
        false -> {error, closed};
        Error -> Error
    end.

%% More binaries than these are joined first: the native call that takes them must stay short.
-define(MAX_IOVEC, 64).

iovec(Data) when is_binary(Data) ->
    {ok, [Data]};
iovec(Data) ->
    try erlang:iolist_to_iovec(Data) of
        Binaries when length(Binaries) =< ?MAX_IOVEC -> {ok, Binaries};
        Binaries -> {ok, [iolist_to_binary(Binaries)]}
    catch
        error:badarg -> {error, {bad_option, data, {wanted, iodata}}}
    end.

%% @equiv recv(Stream, Len, infinity)
-spec recv(stream(), non_neg_integer()) -> {ok, binary()} | {error, reason()}.
recv(Stream, Len) ->
    recv(Stream, Len, infinity).

%% @doc Receives exactly `Len' bytes from a passive stream, or what there is if `Len' is 0; with a
%% timeout of 0, too, where the bytes have come. At the
%% end, of whatever kind, fewer bytes may come, and the next call gives the error that says how the
%% stream ended:
%% <ul>
%% <li>`closed': the peer has finished it, and everything was read. No other end gives this.</li>
%% <li>`{reset, Code}': the peer has given it up.</li>
%% <li>`{connection_lost, Reason}': it was cut off with its connection, `Reason' being that of the
%% connection's last message, and `closed' if this side has closed it.</li>
%% <li>`stopped': this side has stopped reading: the stream was closed, its receiving half was
%% aborted, or its owner died.</li>
%% </ul>
%% Other errors: `timeout' (what has arrived is kept for the next call), `einval' if the stream is
%% active, or has nothing to receive.
-spec recv(stream(), non_neg_integer(), timeout()) -> {ok, binary()} | {error, reason()}.
recv(Stream, Len, Timeout) when is_integer(Len), Len >= 0, Len =< 16#7fffffff ->
    await_there(fun(Ref, Now) -> macula_nif:stream_recv(Stream, Ref, Len, Now) end, Timeout);
recv(_Stream, _Len, _Timeout) ->
    {error, {bad_option, length, {wanted, {integer, 0, 16#7fffffff}}}}.

%% @doc Sets an option of a handle.
%%
%% Of a stream: `active': `true', `false', `once', or a number of messages, which is added to what
%% is left of an earlier one; when they are spent, the owner gets `{quic, passive, Stream,
%% undefined}'. `priority', `high_watermark': as in {@link open_stream/2}.
%%
%% Of a connection: `datagrams': `true', `false', `once' or a number, which is added to what is left of
%% an earlier one: delivers datagrams to the owner as `{quic, dgram, Conn, Data}'; when the number is
%% spent, the owner gets `{quic, passive, Conn, undefined}'. `conn_flow_control_window': bytes that the
%% peer may send ahead of their being read, all streams together; a listener can begin with few and
%% allow more to a peer it knows.
%%
%% Of a listener with the option `resumption': `resumption_keys', a list of secrets: from now on the first
%% one makes tickets, and tickets that none of them opens are not known any more.
-spec setopt(handle(), atom(), term()) -> ok | {error, reason()}.
setopt(Stream, active, Value) ->
    case native(fun() -> macula_nif:stream_set_active(Stream, Value) end) of
        {error, einval} ->
            {error, {bad_option, active, {wanted, active}}};
        Result ->
            Result
    end;
setopt(Stream, priority, Value) when is_integer(Value), Value >= -16#80000000, Value =< 16#7fffffff ->
    case native(fun() -> macula_nif:stream_set_priority(Stream, Value) end) of
        true -> ok;
        false -> {error, closed};
        Error -> Error
    end;
setopt(_Stream, priority, _Value) ->
    {error, {bad_option, priority, {wanted, {integer, -16#80000000, 16#7fffffff}}}};
setopt(Stream, high_watermark, Bytes) when is_integer(Bytes), Bytes >= 1, Bytes =< 1 bsl 40 ->
    case native(fun() -> macula_nif:stream_set_watermarks(Stream, Bytes, Bytes div 2) end) of
        true -> ok;
        false -> {error, closed};
        Error -> Error
    end;
setopt(_Stream, high_watermark, _Bytes) ->
    {error, {bad_option, high_watermark, {wanted, {integer, 1, 1 bsl 40}}}};
setopt(Conn, datagrams, Value) ->
    case native(fun() -> macula_nif:conn_set_datagrams(Conn, Value) end) of
        {error, einval} ->
            {error, {bad_option, datagrams, {wanted, active}}};
        Result ->
            Result
    end;
setopt(Conn, conn_flow_control_window, Bytes)
  when is_integer(Bytes), Bytes >= 1024, Bytes =< 16#3fffffffffffffff ->
    native(fun() -> macula_nif:conn_set_receive_window(Conn, Bytes) end);
setopt(_Conn, conn_flow_control_window, _Bytes) ->
    {error, {bad_option, conn_flow_control_window, {wanted, {integer, 1024, ?MAX_CODE}}}};
setopt(Listener, resumption_keys, Keys) ->
    case macula_quic_option_value:check(secrets, Keys) of
        {ok, [_ | _] = Secrets} ->
            case native(fun() -> macula_nif:listener_set_resumption_keys(Listener, Secrets) end) of
                true -> ok;
                false -> {error, {bad_option, resumption_keys, {needs, resumption}}};
                Error -> Error
            end;
        _ ->
            {error, {bad_option, resumption_keys, {wanted, secrets}}}
    end;
setopt(_Handle, Key, _Value) when is_atom(Key) ->
    {error, {bad_option, Key, unknown}};
setopt(_Handle, _Key, _Value) ->
    {error, {bad_option, key, {wanted, atom}}}.

%% @doc Sends one unreliable datagram (RFC 9221), of at most {@link max_datagram_size/1} bytes. `ok'
%% means queued: datagrams leave in the order of the calls, and the caller waits while some 256 KiB of
%% them wait for QUIC. What the network loses is not sent again. Where the path has come to take less
%% than it did when a datagram was queued, the datagram is counted as `dropped_datagrams'
%% ({@link getstat/2}). Errors: `emsgsize', `unsupported' by the peer, `disabled', `closed'.
-spec send_datagram(connection(), iodata()) -> ok | {error, reason()}.
send_datagram(Conn, Data) ->
    with_datagram(Data, fun(Binary) -> queue_datagram(Conn, Binary, now, infinity) end).

%% @doc Sends one unreliable datagram, as {@link send_datagram/2}, with a choice of what follows when as many wait for
%% QUIC as may.
%%
%% Options: `overflow': `wait' for room, the default, for `timeout' milliseconds at most (`infinity'), which
%% `{error, timeout}' follows; or `drop_oldest', which does not wait for room: the oldest datagrams that QUIC does not
%% have yet go, each counted as `dropped_datagrams'. QUIC holds `datagram_send_buffer' bytes of older ones beside
%% these. Other errors are those of {@link send_datagram/2}.
%%
%% ```
%% ok = macula_quic:send_datagram(Conn, Position, #{overflow => drop_oldest}).
%% '''
-spec send_datagram(connection(), iodata(), options()) -> ok | {error, reason()}.
send_datagram(Conn, Data, Options) ->
    with_options(send_datagram, Options, fun(#{overflow := Overflow, timeout := Timeout}) ->
        Mode = case Overflow of
            wait -> now;
            drop_oldest -> drop_oldest
        end,
        with_datagram(Data, fun(Binary) ->
            queue_datagram(Conn, Binary, Mode, macula_quic_call:deadline(Timeout))
        end)
    end).

with_datagram(Data, Send) when is_binary(Data) ->
    Send(Data);
with_datagram(Data, Send) ->
    try iolist_to_binary(Data) of
        Binary -> Send(Binary)
    catch
        error:badarg -> {error, {bad_option, data, {wanted, iodata}}}
    end.

queue_datagram(Conn, Data, Mode, Deadline) ->
    case native(fun() -> macula_nif:conn_send_datagram(Conn, none, Data, Mode) end) of
        full -> queue_datagram_later(Conn, Data, Mode, Deadline);
        Result -> Result
    end.

%% Until there is room, or until it is known how large a datagram may be.
queue_datagram_later(Conn, Data, Mode, Deadline) ->
    Send = fun(Ref) -> macula_nif:conn_send_datagram(Conn, Ref, Data, wait) end,
    case send_or_await_room(Send, macula_quic_call:left(Deadline)) of
        {sent, Result} -> Result;
        ok -> queue_datagram(Conn, Data, Mode, Deadline);
        Error -> Error
    end.

%% @equiv tell_changes(Conn, 1000)
-spec tell_changes(connection()) -> ok | {error, reason()}.
tell_changes(Conn) ->
    tell_changes(Conn, 1000).

%% @doc Asks to be told, as the connection's owner, of the handshake, of what changes on the connection's path, and how
%% many streams there may be.
%%
%% The messages are `{quic, connected, Conn, Props}', when the handshake is done, where `Props' is a map of `is_resumed',
%% `alpns' (a string), `negotiated_protocol' (the same as a binary), `peername', `sockname', `server_name' and
%% `peercert'; `{quic, peer_cert_received, Conn, #{cert => Der, chain => [Der]}}', where the peer has shown a certificate;
%% `{quic, peer_address_changed, Conn, {Ip, Port}}' and `{quic, local_address_changed, Conn,
%% {Ip, Port}}'; `{quic, dgram_state_changed, Conn, State}', where `State' is a map of `dgram_send_enabled' and
%% `dgram_max_len'; `{quic, streams_available, Conn, #{bidi_streams => N, unidi_streams => N}}', with how many more
%% streams may be opened; and `{quic, peer_needs_streams, Conn, bidi_streams | unidi_streams}'. The first two come
%% once, and `dgram_state_changed' and `streams_available' for a first time, after each such call.
%%
%% QUIC tells here when the peer allows more streams, and nothing else: a native task looks for the rest every so many
%% milliseconds (10 to 3600000), so a change is told that late at most, and one that is undone meanwhile is not.
%% `infinity' ends it.
-spec tell_changes(connection(), 10..3600000 | infinity) -> ok | {error, reason()}.
tell_changes(Conn, infinity) ->
    native(fun() -> macula_nif:conn_tell_changes(Conn, 0) end);
tell_changes(Conn, Every) when is_integer(Every), Every >= 10, Every =< 3600000 ->
    native(fun() -> macula_nif:conn_tell_changes(Conn, Every) end);
tell_changes(_Conn, _Every) ->
    {error, {bad_option, interval, {wanted, interval}}}.

%% @doc Has a client's connection leave from another port of the same local address, which the system chooses.
%% @see migrate/2
-spec migrate(connection()) -> {ok, address()} | {error, reason()}.
migrate(Conn) ->
    migrate(Conn, <<>>, 0).

%% @doc Has a client's connection leave from another local address: an address, `{Address, Port}' or
%% "Address:Port"; port 0, and an address without a port, takes a free one. `{ok, Local}' when the server has
%% answered there; streams and datagrams go on meanwhile. The owner, if it has asked by
%% {@link tell_changes/2}, is told `local_address_changed', and the server's owner `peer_address_changed'.
%%
%% Other connections of the same endpoint stay where they are; each of them sends one packet. Where the server
%% does not answer at the new address within six round trips, and at least 2 and at most 10 seconds (no way
%% leads there, or the server forbids migration), the connection goes on where it was: `{error, timeout}'.
%% Other errors: `not_a_client', as a server's side of a connection does not move; `disabled' by the option
%% `migration_enabled'; `eafnosupport' for an address of another family; `eaddrinuse', `eaddrnotavail' and the
%% like; `closed'.
-spec migrate(connection(), host_address() | {host_address(), inet:port_number()}) ->
          {ok, address()} | {error, reason()}.
migrate(Conn, Local) ->
    case macula_quic_option_value:check(local_address, Local) of
        {ok, {Address, Port}} -> migrate(Conn, Address, Port);
        error -> {error, {bad_option, local_address, {wanted, local_address}}}
    end.

migrate(Conn, Address, Port) ->
    call(fun(Ref) -> macula_nif:conn_migrate(Conn, Ref, Address, Port) end).

%%--------------------------------------------------------------------------------------------
%% Any handle

%% @doc Closes a stream, a connection or a listener. That a handle's object is gone already is no error.
-spec close(handle()) -> ok | {error, badarg}.
close(Handle) ->
    case kind(Handle) of
        stream -> close_stream(Handle);
        connection -> close_connection(Handle);
        listener -> close_listener(Handle);
        %% A handle whose object was collected cannot be told from any other reference.
        unknown when is_reference(Handle) -> ok;
        unknown -> {error, badarg}
    end.

%% @doc Gives a handle to another process, with the messages about it that wait in the mailbox of
%% the calling process, its owner. Nothing is lost or reordered, nothing arrives twice. Streams
%% that arrived with a connection and were not taken out of the mailbox go with it. Errors:
%% `not_owner', `noproc'.
-spec controlling_process(handle(), pid()) -> ok | {error, reason()}.
controlling_process(Handle, Pid) when is_pid(Pid), node(Pid) =:= node() ->
    case kind(Handle) of
        stream ->
            transfer(Handle, Pid, fun macula_nif:stream_begin_transfer/2,
                     fun macula_nif:stream_commit_transfer/1);
        connection ->
            transfer(Handle, Pid, fun macula_nif:conn_begin_transfer/2,
                     fun macula_nif:conn_commit_transfer/1);
        listener ->
            transfer(Handle, Pid, fun macula_nif:listener_begin_transfer/2,
                     fun macula_nif:listener_commit_transfer/1);
        unknown ->
            {error, badarg}
    end;
controlling_process(_Handle, _Pid) ->
    {error, badarg}.

%% Between the two steps the native side holds back what it has to say.
transfer(Handle, Pid, Begin, Commit) ->
    case Begin(Handle, Pid) of
        ok ->
            Streams = forward(Handle, Pid),
            lists:foreach(fun macula_nif:stream_commit_transfer/1, Streams),
            Commit(Handle);
        Error ->
            Error
    end.

%% Returns the streams that go with a connection.
forward(_Handle, Pid) when Pid =:= self() ->
    [];
forward(Handle, Pid) ->
    forward(Handle, Pid, #{Handle => moved}, []).

%% All handles in one go: a scan of the mailbox for each stream would take time as the square of their number.
forward(Handle, Pid, Moved, Streams) ->
    receive
        {quic, new_stream, Stream, #{conn := Handle}} = Message ->
            %% The stream goes with it, and its messages come behind this one.
            Begun = macula_nif:stream_begin_transfer(Stream, Pid),
            Pid ! Message,
            case Begun of
                ok ->
                    forward(Handle, Pid, Moved#{Stream => moved}, [Stream | Streams]);
                %% Somebody else's by now, or the new owner is dead.
                {error, _} ->
                    forward(Handle, Pid, Moved, Streams)
            end;
        {quic, _, Of, _} = Message when is_map_key(Of, Moved) ->
            Pid ! Message,
            forward(Handle, Pid, Moved, Streams)
    after 0 ->
        lists:reverse(Streams)
    end.

%% @doc Gives a stream to another process, as {@link controlling_process/2}. The option `active' is the
%% mode under the new owner: `true', `false', `once' or a number of messages, to which nothing of an
%% earlier mode is added. It holds from the hand-over on, behind the messages that came before.
-spec handoff_stream(stream(), pid(), options()) -> ok | {error, reason()}.
handoff_stream(Stream, NewOwner, Options) ->
    with_options(handoff, Options, fun(#{active := Active}) ->
        case kind(Stream) of
            stream when is_pid(NewOwner), node(NewOwner) =:= node() ->
                transfer(Stream, NewOwner, fun macula_nif:stream_begin_transfer/2,
                         fun(_) -> commit_with(Stream, Active) end);
            _ ->
                {error, badarg}
        end
    end).

commit_with(Stream, Active) ->
    set_mode(Stream, Active),
    macula_nif:stream_commit_transfer(Stream).

%% A count is added to what is left of an earlier one: of none, behind `false'.
set_mode(_Stream, undefined) ->
    ok;
set_mode(Stream, Count) when is_integer(Count) ->
    _ = macula_nif:stream_set_active(Stream, false),
    _ = macula_nif:stream_set_active(Stream, Count),
    ok;
set_mode(Stream, Mode) ->
    _ = macula_nif:stream_set_active(Stream, Mode),
    ok.

kind(Handle) when is_reference(Handle) ->
    case macula_nif:stream_is(Handle) of
        true -> stream;
        false ->
            case macula_nif:conn_is(Handle) of
                true -> connection;
                false ->
                    case macula_nif:listener_is(Handle) of
                        true -> listener;
                        false -> unknown
                    end
            end
    end;
kind(_Handle) ->
    unknown.

%%--------------------------------------------------------------------------------------------
%% Knowledge

%% @doc The address of the peer of a connection, which changes when the peer migrates.
-spec peername(connection()) -> {ok, address()} | {error, reason()}.
peername(Conn) ->
    ask(Conn, peername).

%% @doc The local address of a listener or a connection.
-spec sockname(listener() | connection()) -> {ok, address()} | {error, reason()}.
sockname(Handle) ->
    case kind(Handle) of
        listener -> macula_nif:listener_sockname(Handle);
        _ -> ask(Handle, sockname)
    end.

%% @doc The DER of the peer's certificate, or `{error, no_peercert}'.
-spec peercert(connection()) -> {ok, binary()} | {error, reason()}.
peercert(Conn) ->
    ask(Conn, peercert).

%% @doc The DER of all certificates that the peer has shown, the peer's own first (RFC 8446, section 4.4.2), or
%% `{error, no_peercert}'. None of the others was needed to trust the peer's, or is in a store: `verify' decides about
%% the first alone.
-spec peercerts(connection()) -> {ok, [binary(), ...]} | {error, reason()}.
peercerts(Conn) ->
    ask(Conn, peercerts).

%% @doc The application protocol (ALPN) that was agreed on, or
%% `{error, protocol_not_negotiated}'.
-spec negotiated_protocol(connection()) -> {ok, binary()} | {error, reason()}.
negotiated_protocol(Conn) ->
    ask(Conn, negotiated_protocol).

%% @doc How many bytes a datagram of {@link send_datagram/2} may carry on the path as it is known now:
%% less than {@link path_mtu/1} by the headers of QUIC. `no_path_mtu' if the peer takes no datagrams.
-spec max_datagram_size(connection()) -> {ok, pos_integer()} | {error, reason()}.
max_datagram_size(Conn) ->
    ask(Conn, max_datagram_size).

%% @doc How many bytes of UDP payload the path is known to take: it begins with `minimum_mtu' or
%% `initial_mtu' and grows as the path is probed (RFC 8899). Also the counter `mtu' of
%% {@link getstat/2}.
-spec path_mtu(connection()) -> {ok, pos_integer()} | {error, reason()}.
path_mtu(Conn) ->
    case getstat(Conn, [mtu]) of
        {ok, [{mtu, Bytes}]} -> {ok, Bytes};
        Error -> Error
    end.

%% @doc All counters of a connection: those of `inet:getstat/1' (`recv_oct', `recv_cnt', `recv_avg',
%% `send_oct', `send_cnt', `send_avg' count UDP payload, datagrams, and their mean size; `send_pend' the
%% bytes queued natively; `recv_max', `recv_dvi', `send_max' are 0, as nobody counts them),
%% `sent_packets', `lost_packets', `lost_bytes', `congestion_events', `black_holes',
%% `mtu_probes_sent', `mtu_probes_lost', `rtt' and `min_rtt' in microseconds, `cwnd' and `mtu' in
%% bytes, `streams' open here, and the frames sent and received. Quinn counts neither
%% retransmitted nor spurious packets.
-spec getstat(connection()) -> {ok, [{atom(), non_neg_integer()}]} | {error, reason()}.
getstat(Conn) ->
    case ask(Conn, stats) of
        {ok, Stats} -> {ok, maps:to_list(Stats)};
        Error -> Error
    end.

%% @doc What is counted in this VM, each with what it means, as exporters of metrics want it.
-spec counters() -> [counter()].
counters() ->
    macula_quic_counters:all().

%% @doc The counters of {@link getstat/1}, each with what it means.
-spec counters(connection()) -> {ok, [counter()]} | {error, reason()}.
counters(Conn) ->
    case ask(Conn, stats) of
        {ok, Stats} -> {ok, macula_quic_counters:all(Stats)};
        Error -> Error
    end.

%% @doc The named counters of a connection, in that order.
-spec getstat(connection(), [atom()]) -> {ok, [{atom(), non_neg_integer()}]} | {error, reason()}.
getstat(Conn, Names) when is_list(Names) ->
    case ask(Conn, stats) of
        {ok, Stats} -> pick(Names, Stats, []);
        Error -> Error
    end;
getstat(_Conn, _Names) ->
    {error, {bad_option, counters, {wanted, counters}}}.

pick([], _Stats, Picked) ->
    {ok, lists:reverse(Picked)};
pick([Name | Names], Stats, Picked) ->
    case Stats of
        #{Name := Value} -> pick(Names, Stats, [{Name, Value} | Picked]);
        _ when is_atom(Name) -> {error, {bad_option, Name, unknown}};
        _ -> {error, {bad_option, counters, {wanted, counters}}}
    end;
pick(_Improper, _Stats, _Picked) ->
    {error, {bad_option, counters, {wanted, counters}}}.

%% @doc Everything known about a handle, as a map for people and tools.
-spec info(handle()) -> {ok, map()} | {error, reason()}.
info(Handle) ->
    case kind(Handle) of
        stream -> {ok, macula_nif:stream_info(Handle)};
        connection -> ask(Handle, info);
        listener -> {ok, macula_nif:listener_info(Handle)};
        unknown -> {error, badarg}
    end.

%% @doc An error, or its reason, in words.
-spec format_error(term()) -> string().
format_error(Error) ->
    macula_quic_error:format(Error).

%%--------------------------------------------------------------------------------------------
%% Identity

%% @doc Makes the self-signed certificate of an Ed25519 key pair (both 32 bytes), valid for ten
%% years, for peers that pin the key with `verify_pubkey'. The names become IP addresses where
%% they are some, DNS names otherwise. Both results are PEM. Errors: `key_mismatch' if the private
%% key does not belong to the public key, `{bad_key, einval}', `{bad_san, N}' where the Nth name is none:
%% what stands there may be a key, and is not shown.
-spec generate_self_signed_cert(binary(), binary(), [binary() | string()]) ->
          {ok, {binary(), binary()}} | {error, reason()}.
generate_self_signed_cert(Pubkey, Privkey, Sans)
  when is_binary(Pubkey), is_binary(Privkey), is_list(Sans) ->
    case names(Sans, []) of
        {ok, Names} -> native(fun() -> macula_nif:tls_self_signed(Pubkey, Privkey, Names) end);
        Error -> Error
    end;
generate_self_signed_cert(_Pubkey, _Privkey, _Sans) ->
    {error, badarg}.

names([San | Sans], Names) ->
    try unicode:characters_to_binary(San) of
        Name when is_binary(Name), Name =/= <<>>, byte_size(Name) =< ?LONGEST_NAME -> names(Sans, [Name | Names]);
        _ -> {error, {bad_san, length(Names) + 1}}
    catch
        error:_ -> {error, {bad_san, length(Names) + 1}}
    end;
names([], Names) ->
    {ok, lists:reverse(Names)};
names(_Improper, Names) ->
    {error, {bad_san, length(Names) + 1}}.

%%--------------------------------------------------------------------------------------------
%% Calls

with_options(Role, Options, Fun) ->
    case macula_quic_options:stream(Role, Options) of
        {ok, Parsed} -> native(fun() -> Fun(Parsed) end);
        Error -> Error
    end.

ask(Conn, What) ->
    call(fun(Ref) -> macula_nif:conn_ask(Conn, Ref, What) end).

%% A native function says badarg to what is not a handle of its kind, or not any more.
native(Fun) ->
    try Fun()
    catch error:badarg -> {error, badarg}
    end.

%% What is there already is given also when there is no time to wait, and that is the native side's to
%% know.
await_there(Fun, 0) ->
    call(fun(Ref) -> Fun(Ref, true) end, infinity);
await_there(Fun, Timeout) ->
    call(fun(Ref) -> Fun(Ref, false) end, Timeout).

call(Fun) ->
    call(Fun, infinity).

call(Fun, Timeout) when Timeout =:= infinity; is_integer(Timeout), Timeout >= 0,
                        Timeout =< 16#ffffffff ->
    macula_quic_call:call(Fun, Timeout);
call(_Fun, _Timeout) ->
    {error, {bad_option, timeout, {wanted, timeout}}}.
