%% @doc Signed links to peers over QUIC.
%%
%% Each link is one process, the worker, whose pid names the link. It dials or accepts, proves its
%% identity, verifies the peer's, and then passes frames ({@link macula_frame}) to the process that
%% controls it. All of it needs the `macula' application to run.
%%
%% ```
%% {ok, L} = macula_peering:listen(#{identity => Id1, port => 0}),
%% {ok, {_, Port}} = macula_peering:sockname(L),
%% {ok, Link} = macula_peering:connect(#{
%%     identity => Id2,
%%     target => #{host => "localhost", port => Port, node_id => macula_identity:public(Id1)}}),
%% receive {macula_peering, connected, Link, _NodeId} -> ok end,
%% ok = macula_peering:send_frame(Link, macula_frame:ping(#{nonce => <<0:128>>})).
%% '''
%%
%% <h3>Events</h3>
%% The controlling process gets
%% <ul>
%% <li>`{macula_peering, connected, Pid, NodeId}': the link stands; the peer is `NodeId'.</li>
%% <li>`{macula_peering, frame, Pid, Frame}': a frame, in the peer's order; or
%% `{macula_peering, frame, Pid, Frame, Meta}' for categories that are verified (`verify_frames'),
%% with `verdict', `category' and `peer' in the map.</li>
%% <li>`{macula_peering, bad_frame, Pid, #{reason, bytes}}' with `bad_frames => deliver': a frame that
%% was not decoded, as it came, length and all.</li>
%% <li>`{macula_peering, passive, Pid, undefined}': the credit of `active' is spent.</li>
%% <li>`{macula_peering, new_dedicated_stream, Pid, Stream}': the peer opened a further stream; the
%% controlling process owns it. See {@link macula_peering_stream}.</li>
%% <li>`{macula_peering, disconnected, Pid, Reason}': the end, exactly once for every worker that was
%% started, whatever ended it, with one of {@link disconnect_reason()}.</li>
%% <li>`{macula_peering, reconnecting, Dialer, #{attempt, delay_ms, reason}}' and
%% `{macula_peering, gave_up, Dialer, #{attempts, reason}}' with `reconnect'; also, with the reason
%% `shutdown', where the application stops while a dialer waits, and with `{worker_down, Why}', where
%% the dialer was killed.</li>
%% </ul>
%% Subscribers ({@link subscribe/2}) get `frame' and `disconnected'. A process given as
%% `accept_owner' gets `{macula_peering, handshake_complete, Pid, NodeId}'.
%%
%% <h3>Trust</h3>
%% The dialler pins the node id given in its target in TLS and checks it again in HELLO; without
%% one it verifies the certificate against the roots of the platform. The acceptor learns the
%% dialler's node id from CONNECT, whose signature binds neither the connection nor the acceptor: a
%% CONNECT captured elsewhere can be replayed. `replay_cache' (on) refuses one that was seen here,
%% `freshness_ms' one that is old; both leave open that a fresh one made for another acceptor is
%% replayed to this one. The acceptor's view of who dials is only as strong as that; signatures on
%% later frames (`verify_frames') do not have this weakness.
-module(macula_peering).

-export([connect/1, accept/2, accept_checked/2, listen/1, close_listener/1, sockname/1,
         listener_info/1]).
-export([close/1, close/2, controlling_process/2, controlling_process/3, setopts/2]).
-export([send_frame/2, send_frame/3, subscribe/2, subscribe/3, unsubscribe/2]).
-export([peers/0, peer_info/1, open_stream/1, format_reason/1]).

-export_type([opts/0, target/0, reconnect/0, disconnect_reason/0, send_error/0, peer_info/0,
              verify_mode/0, rule/0, claim/0]).

-type opts() :: #{atom() => term()}.
%% Options of {@link connect/1}, {@link accept/2} and {@link listen/1}. A wrong one gives
%% `{error, {bad_option, Key, Why}}' from the call, also where it is one of `target' or `reconnect', and nothing
%% is dialled. `Why' is the value itself if that is an atom or a number, otherwise `invalid', `unknown', `missing'
%% or another atom, or `{bad_san, N}' for the Nth of `sans': what stands in a wrong place may be a secret.
%% <ul>
%% <li>`identity' (required): see {@link macula_identity}.</li>
%% <li>`controlling_pid' (the caller): gets the events. Its death closes the link.</li>
%% <li>`realms' (`[]', at most 1024 of 32 bytes), `capabilities' (0), `station_id' (the node id),
%% `addresses', `site', `endorsements': what CONNECT and HELLO say of this node, in at most 63 KiB.</li>
%% <li>`accept_owner': a process that is told when the handshake of a link is complete.</li>
%% <li>`handshake_timeout_ms' (30000), `drain_timeout_ms' (5000).</li>
%% <li>`send_timeout_ms' (5000, or `infinity'): how long {@link send_frame/2} waits for room.</li>
%% <li>`role': may be given, `client' to `connect' and `server' to `accept', which it is anyway.</li>
%% <li>`verify_frames' (`none'): how the signatures of frames are treated, for all categories or
%% as a map from category to mode with `default': `none' passes frames on unverified, `report' adds
%% the verdict to the event, `require' drops (and counts) what is not signed as its type asks.</li>
%% <li>`unknown_types' (`deliver'): or `drop', `close'.</li>
%% <li>`text' (`tagged'): `existing' turns text that names an existing atom into the atom.</li>
%% <li>`text_undefined' (`refuse'): whether frames with the text "undefined", which older peers
%% cannot verify, are signed (`allow').</li>
%% <li>`newer_terms' (`refuse'): whether frames with floats, negative integers or integer keys, at which
%% the decoders of older peers stop for good, are sent (`allow').</li>
%% <li>`bad_frames' (`drop'): what becomes of a frame whose end is known, and whose content is not what
%% the wire allows: a key that is no text, text that is not UTF-8, nesting over 64, a key twice, an item
%% of another kind, more than `max_terms'. `drop' counts the frame in `frames_rejected' and logs the
%% first of a link; `deliver' passes the bytes on as `bad_frame'; `close' ends the link.</li>
%% <li>`max_frame' (16777215): longer frames end the link.</li>
%% <li>`max_terms' (67108864): the bytes of memory that one frame may take as terms, sent or
%% received.</li>
%% <li>The last eight hold for dedicated streams, too, where they end the stream and not the link.</li>
%% <li>`active' (`true'): `once' or a number delivers so many frames and then `passive', until
%% {@link setopts/2}; flow control reaches the peer.</li>
%% <li>`dedicated_streams' (`owner'): or `refuse'.</li>
%% </ul>
%% Only `connect': `target' (required), `reconnect' (`false'). `connect' and `listen':
%% `idle_timeout_ms' (30000), `keep_alive_interval_ms' (10000): how a peer that is gone is noticed.
%%
%% `accept' and `listen': `allow' (`all'), `deny' (`none'): a list of node ids, or a function of
%% {@link claim()} that returns `true', `false', `allow', `deny' or `{deny, Code}'; `puzzle_bits'
%% (0): how far a peer's puzzle must be solved; `freshness_ms' (`infinity'): how far `sent_at_ms'
%% of CONNECT may be from our clock; `replay_cache' (`true'); `hello_gap_ms' (25): nothing is sent until
%% the peer's transport has acknowledged HELLO, and for so long after it (at most
%% `handshake_timeout_ms' in all), or until the peer speaks, since older peers drop what they read
%% together with HELLO; 0 is for listeners without such peers.
%%
%% Only `listen': `port' (required), `address' (all), `sans' (names in the certificate), `alpn',
%% `max_handshaking' (256): connections whose peer is not known yet; with so many of them a new one
%% takes the place of the oldest, which then ends with `handshake_timeout', if that has had
%% `min_handshake_ms' (200), and is closed else. `max_links' (`infinity'): of these and the links
%% together. `duplicates' (`newest'): a new link of a node closes its older one; or `allow'.

-type target() :: #{
    host := string() | binary() | inet:ip_address(),
    port := inet:port_number(),
    node_id => macula_identity:node_id(),
    expected_node_id => macula_identity:node_id(),
    tls => auto | pin | webpki | none,
    verify => webpki | none,
    pin_tls_cert => boolean(),
    timeout_ms => pos_integer() | infinity,
    alpn => [binary()],
    server_name => string() | binary(),
    cacertfile => file:name_all(),
    local_address => term()
}.
%% `host' and `port' are required. `node_id': who is expected. `tls' (`auto'): `pin' when there is a
%% node id, else `webpki'; `none' verifies nothing. `expected_node_id', `verify' and `pin_tls_cert' are
%% older names for the same: `verify' counts where there is no node id, or with `pin_tls_cert => false',
%% and neither of these two may stand beside `tls'. HELLO must be signed by the node id in any case.
%% `timeout_ms' (30000, or `infinity') is over resolution, dialling and TLS. `server_name', `cacertfile', `local_address', `alpn' (`[<<"macula">>]') as in {@link
%% macula_quic:connect/4}.
%%
%% What may be right at another time is no wrong option, and ends a dial with `{connect_failed, Why}': a host
%% that is not known or whose interface (`fe80::1%eth0') is not there, a `cacertfile' that cannot be read, a
%% `local_address' that this host does not have.

-type reconnect() :: boolean() | #{
    min_delay_ms => pos_integer(),
    max_delay_ms => pos_integer(),
    factor => number(),
    jitter => float(),
    max_attempts => pos_integer() | infinity
}.
%% `true' stands for the defaults: 200 ms, doubled up to 30 s, each shortened by up to a half at
%% random, without end.

-type verify_mode() :: none | report | require.
-type rule() ::
    all | none | [macula_identity:node_id()]
    | fun((claim()) -> boolean() | allow | deny | {deny, non_neg_integer()}).

-type claim() :: #{node_id := macula_identity:node_id(), atom() => term()}.
%% What an unknown peer says of itself, beside `address' and `puzzle_bits', which are found out.

-type disconnect_reason() :: atom() | {atom(), term()} | {atom(), term(), term()}.
%% <ul>
%% <li>`drained': closed by us, with a farewell; `peer_closed_during_drain': the peer was faster.</li>
%% <li>`peer_closed': closed by the peer.</li>
%% <li>`{connection_lost, Why}': the transport failed, such as by its idle timeout;
%% `{stream_reset, Code}', `{stream_stopped, Code}': the peer broke the control stream.</li>
%% <li>`{protocol_error, Why}': what the peer sent is no frame, or none that may come here.</li>
%% <li>`owner_down': the controlling process is dead. `shutdown': the application stops.</li>
%% <li>`{worker_down, Why}': the worker, or its dialer, was killed or failed.</li>
%% <li>of the handshake: `{connect_failed, Why}', `{open_stream_failed, Why}',
%% `{setopt_failed, Why}', `{send_connect_failed, Why}', `{send_hello_failed, Why}',
%% `handshake_timeout', `never_started', `closed_during_handshake' or the reason given to
%% {@link close/2},
%% `{connect_verify_failed, signature_invalid | bad_frame | {bad_frame, Field} | stale | replayed}',
%% `{hello_verify_failed, signature_invalid | bad_frame | {bad_frame, Field}}',
%% `{unsupported_version, Version}': the peer speaks a later handshake only;
%% `{peer_identity_mismatch, Expected, Got}', `{refused, Code}' on either side,
%% `unexpected_connect_on_client', `unexpected_hello_on_server'.</li>
%% </ul>

-type send_error() ::
    not_started | not_connected | closed | timeout | busy | {stopped, non_neg_integer()}
    | macula_frame:encode_error().

-type peer_info() :: #{
    pid := pid(),
    role := client | server,
    status := opening | held | open | closing,
    node_id => macula_identity:node_id(),
    station_id => binary(),
    realms => [binary()],
    capabilities => non_neg_integer(),
    addresses => [map()],
    address => macula_quic:address(),
    since => integer(),
    rtt_us => non_neg_integer(),
    frames_in := non_neg_integer(),
    bytes_in := non_neg_integer(),
    frames_out := non_neg_integer(),
    bytes_out := non_neg_integer(),
    frames_rejected := non_neg_integer()
}.

%%% Links

%% @doc Dials a peer. Returns at once; `connected' or `disconnected' follows as an event.
%%
%% With `reconnect' the pid returned is that of a dialer, which starts a worker for each attempt;
%% the events name the workers. The dialer's pid does for all functions here, too.
-spec connect(opts()) -> {ok, pid()} | {error, not_started | {bad_option, term(), term()}}.
connect(Opts) ->
    case macula_peering_opts:parse(connect, Opts) of
        {ok, #{reconnect := false} = Checked} ->
            macula_peering_sup:start_child(macula_peering_conn, {client, Checked});
        {ok, Checked} ->
            macula_peering_sup:start_child(macula_peering_dialer, Checked);
        {error, Reason} ->
            {error, Reason}
    end.

%% @doc Takes over a QUIC connection that the caller owns and has accepted, and waits there for
%% the peer's CONNECT. How much an unknown peer may send ahead is decided by the listener that the
%% connection came from: {@link listen/1} begins with a `conn_flow_control_window' of 65536.
-spec accept(macula_quic:connection(), opts()) ->
    {ok, pid()} | {error, not_started | {bad_option, term(), term()} | term()}.
accept(Conn, Opts) ->
    case macula_peering_opts:parse(accept, Opts) of
        {ok, #{freshness_ms := Window} = Checked} ->
            macula_peering_replay:cover(Window),
            accept_checked(Conn, Checked);
        {error, Reason} -> {error, Reason}
    end.

%% @private
-spec accept_checked(macula_quic:connection(), macula_peering_opts:opts()) ->
    {ok, pid()} | {error, term()}.
accept_checked(Conn, Opts) ->
    %% Before a worker has it: a listener can be given away, too.
    case macula_quic:peername(Conn) of
        {ok, _} -> accept_connection(Conn, Opts);
        {error, Reason} -> {error, Reason}
    end.

accept_connection(Conn, Opts) ->
    case macula_peering_sup:start_child(macula_peering_conn, {server, Opts}) of
        {ok, Pid} ->
            case macula_quic:controlling_process(Conn, Pid) of
                ok ->
                    macula_peering_conn:start_server(Pid, Conn),
                    {ok, Pid};
                {error, Reason} ->
                    macula_peering_conn:forget(Pid),
                    {error, Reason}
            end;
        {error, Reason} ->
            {error, Reason}
    end.

%% @doc Listens for peers with a certificate made from the identity. The controlling process gets
%% the events of all links accepted; when it dies, the listener is closed. Connections over
%% `max_handshaking' and `max_links' are closed at once, and counted.
-spec listen(opts()) -> {ok, pid()} | {error, term()}.
listen(Opts) ->
    case macula_peering_opts:parse(listen, Opts) of
        {ok, Checked} -> macula_peering_sup:start_child(macula_peering_listener, Checked);
        {error, Reason} -> {error, Reason}
    end.

-define(CLOSE_MS, 15_000).

%% @doc Stops a listener; its links stay. A process that is no listener stays, too, and gives an error:
%% `badarg' where it is of peering, is the caller itself, or gives another answer; else `timeout'.
-spec close_listener(pid()) -> ok | {error, badarg | timeout}.
close_listener(Pid) when Pid =:= self() ->
    {error, badarg};
close_listener(Pid) when is_pid(Pid) ->
    Deadline = macula_quic_call:deadline(?CLOSE_MS),
    Ref = monitor(process, Pid),
    Closed = case ask_to_close(Pid, ?CLOSE_MS) of
        closing -> await_end(Ref, macula_quic_call:left(Deadline));
        Error -> Error
    end,
    demonitor(Ref, [flush]),
    Closed.

%% A call fails otherwise than by its timeout only where the process is dead.
ask_to_close(Pid, Timeout) ->
    try gen_statem:call(Pid, close_listener, {clean_timeout, Timeout}) of
        ok -> closing;
        _ -> {error, badarg}
    catch
        exit:{timeout, _} -> {error, timeout};
        exit:_ -> closing
    end.

await_end(Ref, Timeout) ->
    receive
        {'DOWN', Ref, process, _, _} -> ok
    after Timeout ->
        {error, timeout}
    end.

%% @doc The address and port of a listener.
-spec sockname(pid()) -> {ok, macula_quic:address()} | {error, term()}.
sockname(Listener) ->
    call(Listener, sockname, 5000).

%% @doc How many handshakes are under way at a listener, how many links it has made that stand, and
%% how many connections it has refused for a limit, or cut short to take in others.
-spec listener_info(pid()) ->
    {ok, #{handshaking := non_neg_integer(), links := non_neg_integer(),
           refused := non_neg_integer(), cut_short := non_neg_integer()}} | {error, term()}.
listener_info(Listener) ->
    call(Listener, info, 5000).

%% @doc As {@link close/2}, with the reason `operator_stop' for the peer; before the link stands
%% `disconnected' gives `closed_during_handshake'.
-spec close(pid()) -> ok.
close(Pid) when is_pid(Pid) ->
    gen_statem:cast(Pid, {close, undefined}).

-define(MAX_REASON, 4096).

%% @doc Says goodbye with a reason (of at most 4096 bytes), waits until the peer has taken it (at most
%% `drain_timeout_ms'), and ends the link. Returns at once; `disconnected' follows, with `drained', or with
%% the reason given here where the link did not stand yet and nobody could be told. A dialer stops
%% dialling.
-spec close(pid(), atom() | {text, binary()}) -> ok | {error, {bad_option, reason, term()}}.
close(Pid, Reason) when is_pid(Pid), is_atom(Reason), Reason =/= undefined ->
    gen_statem:cast(Pid, {close, Reason});
close(Pid, {text, Text} = Reason)
  when is_pid(Pid), is_binary(Text), byte_size(Text) =< ?MAX_REASON ->
    case macula_frame:check_payload(Reason) of
        ok -> gen_statem:cast(Pid, {close, Reason});
        {error, _} -> {error, {bad_option, reason, shown(Reason)}}
    end;
close(Pid, Reason) when is_pid(Pid) ->
    {error, {bad_option, reason, shown(Reason)}}.

%% @doc Makes another process the controlling one. Only the present one may ask. Events sent
%% before stay in the old one's mailbox.
-spec controlling_process(pid(), pid()) -> ok | {error, not_owner | not_connected | timeout}.
controlling_process(Pid, New) when is_pid(New), node(New) =:= node() ->
    controlling_process(Pid, self(), New).

%% @private
-spec controlling_process(pid(), pid(), pid()) -> ok | {error, not_owner | not_connected | timeout}.
controlling_process(Pid, Owner, New) ->
    call(Pid, {controlling_process, Owner, New}, 5000).

%% @doc Sets options of a link: `{active, true | false | once | N}', where a number is added to the
%% credit left.
-spec setopts(pid(), [{active, boolean() | once | non_neg_integer()}]) ->
    ok | {error, not_connected | not_started | closed | timeout | {bad_option, term(), term()}}.
setopts(_, []) ->
    ok;
setopts(Pid, [{active, Active} | Rest])
  when is_boolean(Active); Active =:= once; is_integer(Active), Active >= 0 ->
    case worker(Pid) of
        {ok, Worker} ->
            case call(Worker, {active, Active}, 5000) of
                ok -> setopts(Pid, Rest);
                Error -> Error
            end;
        Error ->
            Error
    end;
setopts(_, [{Key, Value} | _]) ->
    {error, {bad_option, shown(Key), shown(Value)}};
setopts(_, [Other | _]) ->
    {error, {bad_option, shown(Other), unknown}};
setopts(_, _) ->
    {error, {bad_option, options, not_a_list}}.

worker(Pid) ->
    case macula_peering_links:find(Pid) of
        {ok, #{pid := Worker}} -> {ok, Worker};
        {error, Reason} -> {error, Reason}
    end.

%% @equiv subscribe(Pid, Subscriber, all)
-spec subscribe(pid(), pid()) ->
    ok | {error, not_connected | not_started | timeout | {bad_option, subscriber, term()}}.
subscribe(Pid, Subscriber) ->
    subscribe(Pid, Subscriber, all).

%% @doc Lets one more process have the frames of a link: all, or those of the types and categories
%% in a list, where a type that the catalogue does not have is `{text, Name}'. It gets `disconnected' as
%% well. Subscribing again changes the filter.
-spec subscribe(pid(), pid(), all | [macula_frame:frame_type() | macula_frame_table:category()]) ->
    ok | {error, not_connected | not_started | timeout | {bad_option, filter | subscriber, term()}}.
subscribe(_, Subscriber, _) when not is_pid(Subscriber) ->
    {error, {bad_option, subscriber, shown(Subscriber)}};
subscribe(Pid, Subscriber, Filter) ->
    case Filter =:= all orelse is_filter(Filter) of
        true -> with_worker(Pid, {subscribe, Subscriber, Filter});
        false -> {error, {bad_option, filter, shown(Filter)}}
    end.

is_filter([Type | Rest]) when is_atom(Type) -> is_filter(Rest);
is_filter([{text, Name} | Rest]) when is_binary(Name) -> is_filter(Rest);
is_filter(Rest) -> Rest =:= [].

%% @doc Ends a subscription.
-spec unsubscribe(pid(), pid()) -> ok | {error, term()}.
unsubscribe(Pid, Subscriber) ->
    with_worker(Pid, {unsubscribe, Subscriber}).

with_worker(Pid, Request) ->
    case worker(Pid) of
        {ok, Worker} -> call(Worker, Request, 5000);
        Error -> Error
    end.

call(Pid, Request, Timeout) ->
    try gen_statem:call(Pid, Request, {clean_timeout, Timeout})
    catch
        exit:{timeout, _} -> {error, timeout};
        exit:_ -> {error, not_connected}
    end.

%%% Frames

%% @doc Sends a frame: signs it with the link's identity unless it bears a signature, and queues it.
%% `ok' means queued, as with `gen_tcp'. While more than a megabyte is queued it waits, at most
%% `send_timeout_ms'. An already encoded frame may be given as a binary.
-spec send_frame(pid(), macula_frame:frame() | binary()) -> ok | {error, send_error()}.
send_frame(Pid, Frame) ->
    case macula_peering_links:find(Pid) of
        {ok, #{send_timeout := Timeout} = Link} -> send(Link, Frame, Timeout);
        {error, Reason} -> {error, Reason}
    end.

%% @doc As {@link send_frame/2}, with `timeout' in milliseconds or `infinity'; 0 gives
%% `{error, busy}' at once where the queue is full, or where an acceptor still gives HELLO its time
%% to travel alone. Then, and after `{error, timeout}', nothing of the frame was sent.
-spec send_frame(pid(), macula_frame:frame() | binary(), #{timeout => timeout()}) ->
    ok | {error, send_error() | {bad_option, term(), term()}}.
send_frame(Pid, Frame, #{timeout := Timeout} = Opts)
  when map_size(Opts) =:= 1, Timeout =:= infinity;
       map_size(Opts) =:= 1, is_integer(Timeout), Timeout >= 0, Timeout =< 16#ffffffff ->
    case macula_peering_links:find(Pid) of
        {ok, Link} -> send(Link, Frame, Timeout);
        {error, Reason} -> {error, Reason}
    end;
send_frame(Pid, Frame, Opts) when Opts =:= #{} ->
    send_frame(Pid, Frame);
send_frame(_, _, Opts) ->
    {error, {bad_option, send_frame, shown(Opts)}}.

%% What stands in a wrong place may be a secret.
shown(Term) ->
    macula_identity:shown(Term).

send(#{status := open, stream := Stream} = Link, Frame, Timeout) ->
    case wire(Frame, Link) of
        {ok, Wire} ->
            case macula_quic:send(Stream, Wire, #{timeout => Timeout}) of
                ok -> macula_peering_stream:sent(maps:get(counters, Link), Wire);
                {error, timeout} when Timeout =:= 0 ->
                    {error, busy};
                Error ->
                    Error
            end;
        {error, Reason} ->
            {error, Reason}
    end;
send(#{status := held, pid := Worker}, Frame, Timeout) ->
    Begun = erlang:monotonic_time(millisecond),
    case call(Worker, await_open, Timeout) of
        ok when Timeout =:= infinity -> send_frame(Worker, Frame, #{timeout => infinity});
        ok ->
            Gone = erlang:monotonic_time(millisecond) - Begun,
            send_frame(Worker, Frame, #{timeout => max(0, Timeout - Gone)});
        {error, timeout} when Timeout =:= 0 -> {error, busy};
        {error, Reason} -> {error, Reason}
    end;
send(#{status := closing}, _, _) ->
    {error, closed};
send(#{status := opening}, _, _) ->
    {error, not_connected}.

wire(Wire, _) when is_binary(Wire) ->
    case Wire of
        <<Length:32, _:Length/binary>> when Length > 0, Length =< 16#FFFFFF -> {ok, Wire};
        _ -> {error, {not_encodable, not_a_frame}}
    end;
wire(Frame, #{identity := Identity, encoding := Encoding}) ->
    macula_peering_stream:wire(Frame, Identity, Encoding).

%% @doc Opens a further stream to the peer, owned by the caller, for {@link macula_peering_stream}.
%% Where an acceptor still gives HELLO its time to travel alone, it waits as {@link send_frame/2} does.
-spec open_stream(pid()) -> {ok, macula_peering_stream:stream()} | {error, term()}.
open_stream(Pid) ->
    case macula_peering_links:find(Pid) of
        {ok, #{status := held, pid := Worker, send_timeout := Timeout}} ->
            case call(Worker, await_open, Timeout) of
                ok -> open_stream(Worker);
                {error, Reason} -> {error, Reason}
            end;
        {ok, #{status := open, conn := Conn} = Link} ->
            case macula_quic:open_stream(Conn) of
                {ok, Stream} -> macula_peering_stream:new(Stream, Link);
                {error, Reason} -> {error, Reason}
            end;
        {ok, #{status := closing}} -> {error, closed};
        {ok, _} -> {error, not_connected};
        {error, Reason} -> {error, Reason}
    end.

%%% Knowledge

%% @doc The links that stand: worker and peer.
-spec peers() -> [{pid(), macula_identity:node_id()}].
peers() ->
    [{Pid, NodeId} || #{pid := Pid, node_id := NodeId, status := Status}
                          <- macula_peering_links:all(), Status =/= closing].

%% @doc What is known of a link: peer, address, since when (milliseconds since 1970), round-trip
%% time in microseconds, counters. Before the handshake is done there is less of it.
-spec peer_info(pid()) -> {ok, peer_info()} | {error, not_connected | not_started}.
peer_info(Pid) ->
    case macula_peering_links:find(Pid) of
        {ok, #{counters := Counters} = Link} ->
            Known = maps:with([pid, role, status, node_id, address, since], Link),
            Claims = macula_peering_links:claims(maps:get(pid, Link)),
            Counts = macula_peering_counters:all(Counters),
            Now = maps:merge(rtt(Link), address(Link)),
            {ok, maps:merge(maps:merge(Claims, Known), maps:merge(Counts, Now))};
        {error, Reason} ->
            {error, Reason}
    end.

%% Where the peer is now: that may change, and nobody tells.
address(#{conn := Conn}) ->
    case macula_quic:peername(Conn) of
        {ok, Address} -> #{address => Address};
        {error, _} -> #{}
    end;
address(_) ->
    #{}.

rtt(#{conn := Conn}) ->
    case macula_quic:getstat(Conn, [rtt]) of
        {ok, [{rtt, Micros}]} -> #{rtt_us => Micros};
        {error, _} -> #{}
    end;
rtt(_) ->
    #{}.

%% @doc A reason of `disconnected' in words.
-spec format_reason(disconnect_reason()) -> unicode:chardata().
format_reason(drained) -> "closed by us";
format_reason(peer_closed) -> "closed by the peer";
format_reason(peer_closed_during_drain) -> "closed by both";
format_reason(handshake_timeout) -> "the peer did not finish the handshake in time";
format_reason(owner_down) -> "the process that controlled the link is dead";
format_reason({connect_failed, Why}) ->
    ["cannot connect: ", macula_quic:format_error(Why)];
format_reason({connection_lost, Why}) ->
    ["the connection was lost: ", macula_quic:format_error(Why)];
format_reason({peer_identity_mismatch, _, _}) -> "the peer is not the one that was expected";
format_reason({unsupported_version, Version}) ->
    io_lib:format("the peer speaks another version of the handshake (~tp) than this node (2)",
                  [Version]);
format_reason({refused, Code}) when is_integer(Code) ->
    io_lib:format("refused: ~s", [macula_frame:error_name(Code)]);
format_reason({protocol_error, Why}) ->
    io_lib:format("the peer broke the protocol: ~tp", [Why]);
format_reason(Reason) ->
    io_lib:format("~tp", [Reason]).
