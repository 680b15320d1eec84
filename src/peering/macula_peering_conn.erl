%% @doc One link to a peer: the handshake, the conversation, the farewell.
%%
%% ```
%%   client: connecting ─► handshaking ─► connected ─► draining ─► (end)
%%   server: awaiting_start ─► handshaking ─► held ─► connected ─► draining ─► (end)
%%                                                        └─► leaving ─► (end)
%% '''
%% `held' is the short time in which HELLO travels, and nothing else is sent.
%% `draining' is our farewell, `leaving' the peer's. From every state every loss of the connection,
%% of the control stream or of the owner leads straight to the end; no state lasts without a timer
%% but `connected', where the transport's idle timeout stands for it.
%%
%% The end is told by `macula_peering_links', which watches this process; here the reason is only
%% written down. Frames are sent past this process, by whoever sends them.
%% @private
-module(macula_peering_conn).
-behaviour(gen_statem).

-include("macula_peering.hrl").

-export([start_link/1, start_server/2, forget/1, cut_short/1]).
-export([init/1, callback_mode/0, terminate/3, format_status/1]).
-export([connecting/3, awaiting_start/3, handshaking/3, held/3, connected/3, draining/3,
         leaving/3]).

-export_type([opts/0]).

-type opts() :: macula_peering:opts().

%% Streams that wait for the handshake to end; more are refused.
-define(MAX_WAITING_STREAMS, 8).
%% Reads in flight between the native side and this process, each of at most 256 KiB.
-define(READS, 8).
%% What a peer that is known may send ahead of its being read.
-define(WINDOW, 16 * 1024 * 1024).
%% How long the caller of accept may take to hand the connection over.
-define(START_TIMEOUT, 5_000).

-record(data, {
    role :: client | server,
    opts :: macula_peering_opts:opts(),
    identity :: macula_identity:identity(),
    conn :: undefined | macula_quic:connection(),
    stream :: undefined | macula_quic:stream(),
    dial :: undefined | {pid(), reference()},
    %% The process that decides about a peer, with what it decides about.
    deciding :: undefined | {pid(), reference(), macula_frame:frame()},
    peer :: undefined | macula_identity:node_id(),
    owner :: pid(),
    owner_ref :: reference(),
    %% Bytes read and not parsed.
    buffer = macula_peering_buffer:new() :: macula_peering_buffer:buffer(),
    reads = 0 :: non_neg_integer(),
    %% Bytes of the frames that came before CONNECT or HELLO.
    skipped = 0 :: non_neg_integer(),
    streams = [] :: [macula_quic:stream()],
    %% The peer's transport has our HELLO.
    hello_arrived = false :: boolean(),
    delivery :: macula_peering_delivery:delivery(),
    %% An end that is due when the waiting frames are delivered.
    ended :: undefined | {why, term()},
    %% Our GOODBYE, which a full queue may make wait; and until when the drain may last, where a
    %% close had to wait for its turn.
    farewell :: undefined | binary(),
    close_by :: undefined | integer(),
    rules :: macula_peering_incoming:rules(),
    counters :: counters:counters_ref()
}).

-type state() ::
    connecting | awaiting_start | handshaking | held | connected | draining | leaving.
-type result() :: gen_statem:event_handler_result(state()).

%% @doc Starts a worker. A client begins to dial; a server waits for its connection.
-spec start_link({client | server, macula_peering_opts:opts()}) -> {ok, pid()} | {error, term()}.
start_link(Args) ->
    case gen_statem:start_link(?MODULE, Args, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

%% @doc Lets a server worker begin with the connection that it owns by now.
-spec start_server(pid(), macula_quic:connection()) -> ok.
start_server(Pid, Conn) ->
    gen_statem:cast(Pid, {start, Conn}).

%% @doc Ends a server worker that got no connection, without a word.
-spec forget(pid()) -> ok.
forget(Pid) ->
    gen_statem:cast(Pid, forget).

%% @doc Ends a handshake as if its time were over. A link that stands is not disturbed.
-spec cut_short(pid()) -> ok.
cut_short(Pid) ->
    gen_statem:cast(Pid, cut_short).

-spec callback_mode() -> state_functions.
callback_mode() -> state_functions.

-spec init({client | server, macula_peering_opts:opts()}) ->
    gen_statem:init_result(state()).
init({Role, #{identity := Identity, controlling_pid := Owner} = Opts}) ->
    %% So that a shutdown of the supervisor is a farewell too.
    process_flag(trap_exit, true),
    Counters = macula_peering_counters:new(),
    Rules = macula_peering_incoming:rules(Opts),
    Data = #data{role = Role, opts = Opts, identity = Identity, owner = Owner,
                 owner_ref = monitor(process, Owner), counters = Counters,
                 delivery = macula_peering_delivery:new(maps:get(active, Opts), Rules, Counters),
                 rules = Rules},
    Link = #{pid => self(), role => Role, status => opening, owner => Owner, subscribers => [],
             reason => undefined, counters => Counters, identity => Identity,
             send_timeout => maps:get(send_timeout_ms, Opts),
             encoding => macula_peering_incoming:encoding(Opts)},
    Watched = case Opts of
        #{dialer := Dialer} -> _ = monitor(process, Dialer), Link#{dialer => Dialer};
        #{} -> Link
    end,
    case macula_peering_links:watch(Watched, Rules) of
        ok when Role =:= client -> {ok, connecting, dial(Data), []};
        ok -> {ok, awaiting_start, Data, [{state_timeout, ?START_TIMEOUT, start}]};
        {error, Reason} -> {stop, {shutdown, Reason}}
    end.

%% The secret is in a resource, which prints as a reference; options and frames are the users'.
-spec format_status(gen_statem:format_status()) -> gen_statem:format_status().
format_status(#{data := #data{role = Role, peer = Peer, owner = Owner}} = Status) ->
    Status#{data := #{role => Role, peer => Peer, owner => Owner}};
format_status(Status) ->
    Status.

-spec terminate(term(), state(), #data{}) -> ok.
terminate(Reason, State, #data{conn = Conn} = Data) ->
    %% They do not notice an end that is `normal'.
    _ = [exit(Pid, kill) || {{helper, Pid}, true} <- get()],
    _ = case {Reason, State} of
        {shutdown, connected} -> farewell(Data, operator_stop);
        {shutdown, held} -> hello_arrived(Data) andalso farewell(Data, operator_stop);
        %% It has been said, and is perhaps still on its way.
        {shutdown, draining} -> heard(Data);
        _ -> ok
    end,
    %% No-op when the reason is written already.
    note(case Reason of
        shutdown -> shutdown;
        {shutdown, Why} -> Why;
        Why -> {worker_down, Why}
    end),
    _ = is_reference(Conn) andalso macula_quic:close_connection(Conn, 0, <<"closed">>),
    macula_telemetry:ended(noted(Reason)).

noted(Reason) ->
    case macula_peering_links:find(self()) of
        {ok, #{reason := {why, Why}}} -> Why;
        _ -> Reason
    end.

%% What shares a read with HELLO is lost for older peers. One that does not have it by now knows of no
%% link that could end.
hello_arrived(#data{hello_arrived = true, opts = #{hello_gap_ms := Gap}}) ->
    receive after min(Gap, 200) -> true end;
hello_arrived(#data{stream = Stream} = Data) ->
    receive {quic, delivered, Stream, _} -> hello_arrived(Data#data{hello_arrived = true})
    after 300 -> false
    end.

%% At a shutdown nobody waits for the drain, but the peer shall know why.
farewell(#data{identity = Identity, stream = Stream} = Data, Reason) ->
    {ok, Wire} = macula_frame:sign_encode(macula_frame:goodbye(Reason), Identity),
    _ = macula_quic:send(Stream, Wire, #{fin => true, timeout => 0}),
    heard(Data).

%% The peer has read it, or is gone, or takes too long.
heard(#data{stream = Stream, conn = Conn}) ->
    receive
        {quic, peer_send_shutdown, Stream, _} -> ok;
        {quic, stream_closed, Stream, _} -> ok;
        {quic, What, Conn, _} when ?IS_END(What) -> ok
    after 500 ->
        ok
    end.

%%% Dialling

dial(#data{opts = #{target := Target} = Opts} = Data) ->
    Data#data{dial = helper(macula_peering_attempt, dialling, [Target, Opts, self()])}.

%% What may take time is done by another process, which does not outlive this one.
helper(Module, Function, Args) ->
    {Pid, Ref} = spawn_opt(Module, Function, Args, [link, monitor]),
    put({helper, Pid}, true),
    {Pid, Ref}.

-spec connecting(gen_statem:event_type(), term(), #data{}) -> result().
connecting(info, {'DOWN', Ref, process, _, {dialled, Result}}, #data{dial = {_, Ref}} = Data) ->
    case Result of
        {ok, Conn, Stream} ->
            begin_client(Data#data{dial = undefined, conn = Conn, stream = Stream});
        {error, {ended, What, Detail}} ->
            stop(end_reason(What, Detail), Data);
        {error, Reason} ->
            stop(Reason, Data)
    end;
connecting(info, {'DOWN', Ref, process, _, Why}, #data{dial = {_, Ref}} = Data) ->
    stop({connect_failed, Why}, Data);
connecting(info, {quic, _, _, _}, _) ->
    %% Of the connection whose hand-over is under way.
    {keep_state_and_data, [postpone]};
connecting(cast, {close, Reason}, Data) ->
    stop(close_reason(Reason, closed_during_handshake), Data);
connecting(Type, Event, Data) ->
    common(Type, Event, connecting, Data).

%% Whoever closes need not say why.
close_reason(undefined, Default) -> Default;
close_reason(Reason, _) -> Reason.

begin_client(#data{opts = Opts, stream = Stream, identity = Identity} = Data) ->
    case send_handshake(macula_peering_handshake:connect(Identity, Opts), Data) of
        ok ->
            case arm_streams(Data) of
                ok -> next_read(Data, fun(D) -> {next_state, handshaking, D, timer(Opts)} end);
                {error, Reason} -> failed(setopt_failed, Reason, Data)
            end;
        {error, Reason} ->
            _ = macula_quic:async_shutdown_stream(Stream, abort, 0),
            failed(send_connect_failed, Reason, Data)
    end.

%% Why a connection has ended that refuses what is asked of it: its message may still be under way.
failed(What, closed, Data) ->
    {next_state, handshaking, Data, [{state_timeout, ?LAST_WORD, {What, closed}}]};
failed(What, Reason, Data) ->
    stop({What, Reason}, Data).

timer(#{handshake_timeout_ms := Timeout}) ->
    [{state_timeout, Timeout, handshake}].

send_handshake(Frame, #data{identity = Identity, stream = Stream, opts = Opts}) ->
    case macula_frame:sign_encode(Frame, Identity, maps:with([newer_terms], Opts)) of
        {ok, Wire} -> macula_quic:send(Stream, Wire, #{timeout => 0});
        {error, Reason} -> {error, Reason}
    end.

arm_streams(#data{conn = Conn}) ->
    macula_quic:async_accept_stream(Conn, #{active => false}).

%% In the handshake one read at a time, so that a peer unknown has no more in our memory than the
%% buffer and one read.
next_read(#data{stream = Stream} = Data, Then) ->
    case macula_quic:setopt(Stream, active, once) of
        ok -> Then(Data);
        {error, Reason} -> failed(setopt_failed, Reason, Data)
    end.

%%% A server that has no connection yet

-spec awaiting_start(gen_statem:event_type(), term(), #data{}) -> result().
awaiting_start(cast, {start, Conn}, #data{opts = Opts} = Data) ->
    case arm_streams(Data#data{conn = Conn}) of
        ok -> {next_state, handshaking, Data#data{conn = Conn}, timer(Opts)};
        {error, Reason} -> failed(setopt_failed, Reason, Data#data{conn = Conn})
    end;
awaiting_start(state_timeout, start, Data) ->
    stop(never_started, Data);
awaiting_start(info, {quic, _, _, _}, _) ->
    {keep_state_and_data, [postpone]};
awaiting_start(cast, forget, Data) ->
    %% Whoever wanted this worker has been told otherwise, and never knew its pid.
    macula_peering_links:forget(),
    {stop, normal, Data};
awaiting_start(cast, {close, Reason}, Data) ->
    stop(close_reason(Reason, closed_during_handshake), Data);
awaiting_start(Type, Event, Data) ->
    common(Type, Event, awaiting_start, Data).

%%% Handshake

-spec handshaking(gen_statem:event_type(), term(), #data{}) -> result().
handshaking(state_timeout, handshake, Data) ->
    stop(handshake_timeout, Data);
handshaking(state_timeout, {_, closed} = Reason, Data) ->
    stop(Reason, Data);
handshaking(cast, cut_short, Data) ->
    stop(handshake_timeout, Data);
handshaking(info, {quic, new_stream, Stream, Info}, Data) ->
    waiting_stream(Stream, Info, Data);
handshaking(info, {quic, Bytes, Stream, _}, #data{stream = Stream} = Data) when is_binary(Bytes) ->
    handshake(add(Bytes, Data));
handshaking(info, {'DOWN', Ref, process, _, Verdict}, #data{deciding = {_, Ref, Frame}} = Data) ->
    decided(Verdict, Frame, Data#data{deciding = undefined});
handshaking(cast, {close, Reason}, Data) ->
    stop(close_reason(Reason, closed_during_handshake), Data);
handshaking(Type, Event, Data) ->
    common(Type, Event, handshaking, Data).

%% The control stream is the first that the client opens, whichever arrives first.
waiting_stream(Stream, #{stream_id := 0}, #data{role = server, stream = undefined} = Data) ->
    next_read(Data#data{stream = Stream}, fun(D) -> {keep_state, D} end);
waiting_stream(Stream, Info, #data{streams = Streams} = Data) ->
    case dedicated(Info, Data) andalso length(Streams) < ?MAX_WAITING_STREAMS of
        true -> {keep_state, Data#data{streams = [Stream | Streams]}};
        false -> refuse(Stream), keep_state_and_data
    end.

dedicated(#{direction := unidirectional}, _) -> false;
dedicated(_, #data{opts = #{dedicated_streams := Mode}}) -> Mode =:= owner.

refuse(Stream) ->
    _ = macula_quic:async_shutdown_stream(Stream, abort, 0),
    ok.

handshake(#data{buffer = Buffer} = Data) ->
    case macula_peering_buffer:is_ready(Buffer) of
        true -> handshake_frame(Data);
        false -> next_read(Data, fun(D) -> {keep_state, D} end)
    end.

%% One frame at a time: those behind CONNECT or HELLO are kept for later, when it is known whose
%% they are. Those before them count against what an unknown peer may send, and nobody verifies them.
handshake_frame(#data{skipped = Skipped} = Data) ->
    {Bytes, Data1} = take(Data),
    case macula_frame:decode(Bytes, #{max => max(0, ?HANDSHAKE_BYTES - 4 - Skipped)}) of
        {ok, Frame, Rest} ->
            Length = byte_size(Bytes) - byte_size(Rest),
            first_frame(Frame, binary:part(Bytes, 0, Length), keep(Rest, 0, Data1));
        {more, N} ->
            next_read(keep(Bytes, N, Data1), fun(D) -> {keep_state, D} end);
        {error, frame_too_large} when Skipped > 0 ->
            stop({protocol_error, too_much_before_handshake}, Data1);
        {error, Reason} ->
            stop({protocol_error, Reason}, Data1)
    end.

first_frame(Frame, Wire, #data{role = Role, skipped = Skipped} = Data) ->
    case {macula_frame:named_type(Frame), macula_peering_handshake:newer(Frame, Role)} of
        {_, {true, Version}} ->
            stop_newer(Version, Data);
        {{ok, connect}, false} when Role =:= server ->
            verified(connect_verify_failed, Frame, verdict(Wire), Data, fun judge/2);
        {{ok, hello}, false} when Role =:= client ->
            verified(hello_verify_failed, Frame, verdict(Wire), Data, fun welcomed/2);
        {{ok, connect}, _} -> stop(unexpected_connect_on_client, Data);
        {{ok, hello}, _} -> stop(unexpected_hello_on_server, Data);
        %% Whatever else is well formed says nothing before the handshake.
        {{ok, _}, _} -> handshake(Data#data{skipped = Skipped + byte_size(Wire)});
        {error, _} -> stop({protocol_error, no_frame_type}, Data)
    end.

verdict(Wire) ->
    {ok, _, Verdict, <<>>} = macula_frame:decode_verify(Wire, first, #{}),
    Verdict.

%% A dialler hears of it by a HELLO, whose version it does not know either.
stop_newer(Version, #data{role = server} = Data) ->
    refuse_peer(macula_frame:error_code(unknown_error), {unsupported_version, Version}, Data);
stop_newer(Version, Data) ->
    stop({unsupported_version, Version}, Data).

verified(Tag, Frame, {ok, NodeId}, Data, Then) ->
    case macula_peering_handshake:check_presence(Frame) of
        ok -> Then(Frame, Data#data{peer = NodeId});
        {error, Field} -> stop({Tag, {bad_frame, Field}}, Data)
    end;
verified(Tag, _, {error, signature_invalid}, Data, _) ->
    stop({Tag, signature_invalid}, Data);
verified(Tag, _, {error, _}, Data, _) ->
    stop({Tag, bad_frame}, Data).

%%% The server's judgement of CONNECT

judge(Frame, #data{opts = Opts, peer = Peer} = Data) ->
    case macula_peering_handshake:judge(Frame, Peer, Opts) of
        welcome -> welcome(Frame, Data);
        ask -> decide(Frame, Data);
        {refuse, Code} -> refuse_peer(Code, Data);
        {error, Why} -> stop({connect_verify_failed, Why}, Data)
    end.

%% The callbacks are the user's: they may take time, and they may fail. The handshake's timer runs.
decide(Frame, #data{opts = #{allow := Allow, deny := Deny}, conn = Conn, peer = Peer} = Data) ->
    Claim = macula_peering_handshake:claim(Frame, Peer, address(Conn)),
    {Pid, Ref} = helper(macula_peering_handshake, decide, [Allow, Deny, Peer, Claim]),
    {keep_state, Data#data{deciding = {Pid, Ref, Frame}}}.

decided({decided, allow}, Frame, Data) -> welcome(Frame, Data);
decided({decided, Code}, _, Data) when is_integer(Code) -> refuse_peer(Code, Data);
decided(Crash, _, Data) ->
    macula_peering_log:rule_failed(Data#data.peer, Crash),
    refuse_peer(macula_frame:error_code(unauthorized), Data).

refuse_peer(Code, Data) ->
    refuse_peer(Code, {refused, Code}, Data).

refuse_peer(Code, Reason, Data) ->
    Hello = hello(#{accepted => false, refusal_code => Code}, Data),
    _ = send_handshake(Hello, Data),
    finish_sending(Data#data.stream),
    _ = macula_quic:setopt(Data#data.stream, active, true),
    %% The peer closes when it has read this; if it does not, the timer does.
    note(Reason),
    {next_state, draining, Data,
     [{state_timeout, maps:get(drain_timeout_ms, Data#data.opts), drain}]}.

hello(Extra, #data{identity = Identity, opts = Opts}) ->
    macula_peering_handshake:hello(Extra, Identity, Opts).

welcome(Frame, #data{opts = #{hello_gap_ms := Gap}} = Data) ->
    Silent = macula_peering_buffer:is_empty(Data#data.buffer) andalso Data#data.streams =:= [],
    case send_handshake(hello(#{accepted => true}, Data), Data) of
        %% An older peer says nothing, and opens nothing, beside CONNECT.
        ok when Gap =:= 0; not Silent ->
            connect_done(Frame, Data, connected);
        ok -> connect_done(Frame, Data, held);
        {error, Reason} -> failed(send_hello_failed, Reason, Data)
    end.

%%% The client's judgement of HELLO

welcomed(_, #data{opts = #{target := #{node_id := Expected}}, peer = Peer} = Data)
  when Expected =/= undefined, Expected =/= Peer ->
    stop({peer_identity_mismatch, Expected, Peer}, Data);
welcomed(#{accepted := true} = Frame, Data) ->
    connect_done(Frame, Data, connected);
welcomed(#{accepted := false} = Frame, Data) ->
    case macula_frame:get(refusal_code, Frame, undefined) of
        Code when Code =:= undefined; is_integer(Code), Code >= 0 -> stop({refused, Code}, Data);
        _ -> stop({hello_verify_failed, {bad_frame, refusal_code}}, Data)
    end;
welcomed(_, Data) ->
    stop({hello_verify_failed, {bad_frame, accepted}}, Data).

%%% The conversation

connect_done(Frame, #data{stream = Stream, conn = Conn, peer = Peer, owner = Owner} = Data, Next) ->
    case macula_quic:setopt(Stream, active, ?READS) of
        ok ->
            _ = macula_quic:setopt(Conn, conn_flow_control_window, ?WINDOW),
            macula_peering_links:claims(self(), #{
                station_id => macula_frame:get(station_id, Frame),
                realms => macula_frame:get(realms, Frame),
                capabilities => macula_frame:get(capabilities, Frame),
                addresses => macula_peering_handshake:addresses(Frame)}),
            macula_peering_links:update(self(), #{
                status => status(Next), stream => Stream, conn => Conn, node_id => Peer,
                address => address(Conn), since => erlang:system_time(millisecond)}),
            tell(Owner, connected, Peer),
            macula_telemetry:begun([macula, peering, link], {up, down}, #{
                link => self(), role => Data#data.role, node_id => Peer, address => address(Conn)}),
            _ = [tell(Who, handshake_complete, Peer)
                 || Key <- [accept_owner, dialer], #{Key := Who} <- [Data#data.opts], is_pid(Who)],
            lists:foreach(fun(S) -> pass_stream(S, Data) end, lists:reverse(Data#data.streams)),
            {next_state, Next, Data#data{streams = [], reads = 0}, first_steps(Next, Data)};
        {error, Reason} ->
            failed(setopt_failed, Reason, Data)
    end.

status(held) -> held;
status(connected) -> open.

%% What came behind the handshake frame is taken up as if it had just been read.
first_steps(connected, _) ->
    [{next_event, internal, parse}];
first_steps(held, #data{stream = Stream, opts = #{handshake_timeout_ms := Limit}}) ->
    %% A stream that is over says so by its own message.
    _ = macula_quic:tell_delivered(Stream),
    [{{timeout, hello_limit}, Limit, open}].

tell(To, What, Detail) ->
    _ = To ! {macula_peering, What, self(), Detail},
    ok.

address(Conn) ->
    case macula_quic:peername(Conn) of
        {ok, Address} -> Address;
        {error, _} -> undefined
    end.

%% An original drops what it reads together with HELLO, and HELLO may be lost and sent again. So
%% nobody sends before the peer's transport has acknowledged it, and a moment more, in which the
%% peer reads it; or before the peer speaks. Those who want to send, and a farewell, wait.
-spec held(gen_statem:event_type(), term(), #data{}) -> result().
held(info, {quic, delivered, Stream, _}, #data{stream = Stream} = Data) ->
    #data{opts = #{hello_gap_ms := Gap}} = Data,
    {keep_state, Data#data{hello_arrived = true}, [{{timeout, hello_gap}, Gap, open}]};
held({timeout, _}, open, Data) ->
    open(Data, []);
held(info, {quic, Bytes, Stream, _}, #data{stream = Stream} = Data) when is_binary(Bytes) ->
    %% The peer has read HELLO, or it would not speak.
    open(Data, [postpone]);
held(info, {quic, new_stream, _, _}, Data) ->
    open(Data, [postpone]);
held({call, _}, await_open, _) ->
    {keep_state_and_data, [postpone]};
held(cast, {close, _}, Data) ->
    leave_soon(Data);
held(info, {'DOWN', Ref, process, _, _}, #data{owner_ref = Ref} = Data) ->
    note(owner_down),
    leave_soon(Data);
held(Type, Event, Data) ->
    connected(Type, Event, Data).

%% What wants to end the link is taken up again when HELLO has travelled; both together take no
%% longer than a drain may.
leave_soon(#data{close_by = undefined, opts = #{drain_timeout_ms := Drain}} = Data) ->
    {keep_state, Data#data{close_by = erlang:monotonic_time(millisecond) + Drain},
     [postpone, {{timeout, hello_limit}, Drain, open}]};
leave_soon(_) ->
    {keep_state_and_data, [postpone]}.

open(Data, Actions) ->
    macula_peering_links:update(self(), #{status => open}),
    {next_state, connected, Data,
     [{{timeout, hello_gap}, cancel}, {{timeout, hello_limit}, cancel} | Actions]}.

%% Bytes read at once, and of heap, that are worth a collection.
-define(MUCH, 256 * 1024).

-spec connected(gen_statem:event_type(), term(), #data{}) -> result().
connected(internal, parse, Data) ->
    parse(Data);
connected(info, {quic, Bytes, Stream, _}, #data{stream = Stream} = Data) when is_binary(Bytes) ->
    macula_peering_counters:add(Data#data.counters, bytes_in, byte_size(Bytes)),
    parse((add(Bytes, Data))#data{reads = Data#data.reads + 1});
connected(info, {quic, new_stream, Stream, Info}, Data) ->
    case dedicated(Info, Data) of
        true -> pass_stream(Stream, Data);
        false -> refuse(Stream)
    end,
    keep_state_and_data;
connected({call, From}, await_open, _) ->
    {keep_state_and_data, [{reply, From, ok}]};
connected({call, From}, {active, Active}, Data) ->
    deliver(grant(Active, Data), [{reply, From, ok}]);
connected(cast, {close, _}, #data{ended = {why, Reason}} = Data) ->
    %% The peer is gone; only frames without credit had kept this link.
    stop(Reason, Data);
connected(cast, {close, Reason}, Data) ->
    say_goodbye(close_reason(Reason, operator_stop), Data);
connected(Type, Event, Data) ->
    common(Type, Event, connected, Data).

pass_stream(Stream, #data{owner = Owner}) ->
    case macula_quic:controlling_process(Stream, Owner) of
        ok -> tell(Owner, new_dedicated_stream, Stream);
        {error, _} -> refuse(Stream)
    end.

parse(#data{buffer = Buffer, ended = Ended} = Data) ->
    case Ended =:= undefined andalso macula_peering_buffer:is_ready(Buffer) of
        true -> parse_frames(Data);
        false -> deliver(Data, [])
    end.

parse_frames(#data{rules = Rules, peer = Peer} = Data) ->
    {Bytes, Data1} = take(Data),
    case macula_frame:parse(Bytes, macula_peering_incoming:check(Rules, Peer),
                            macula_peering_incoming:decoding(Rules)) of
        {Items, Rest, {more, N}} ->
            deliver(queue(Items, keep(Rest, N, Data1)), after_parse(Bytes));
        {Items, Rest, {error, Reason}} ->
            case macula_peering_incoming:bad(Reason, Rest, Rules) of
                {skip, Bad, After} ->
                    {bad_frame, Why} = Reason,
                    parse(queue(Items ++ [{bad_frame, {Why, Bad}}], keep(After, 0, Data1)));
                close ->
                    Data2 = queue(Items, Data1),
                    deliver(Data2#data{ended = {why, {protocol_error, Reason}}}, [])
            end
    end.

%% What a large frame took as terms must not stay with an idle link.
after_parse(Bytes) when byte_size(Bytes) < ?MUCH ->
    [];
after_parse(_) ->
    {total_heap_size, Words} = process_info(self(), total_heap_size),
    [hibernate || Words * erlang:system_info(wordsize) >= ?MUCH].

queue(Items, #data{delivery = Delivery} = Data) ->
    Data#data{delivery = macula_peering_delivery:add(Items, Delivery)}.

grant(Active, #data{delivery = Delivery} = Data) ->
    Data#data{delivery = macula_peering_delivery:grant(Active, Delivery)}.

%% Delivers as the credit allows; then reads on, or ends if the end was only waiting for that.
deliver(#data{owner = Owner, peer = Peer, delivery = Delivery} = Data, Actions) ->
    {Outcome, Next} = macula_peering_delivery:run(Owner, Peer, Delivery),
    delivered(Outcome, Data#data{delivery = Next}, Actions).

delivered({error, Reason}, Data, Actions) ->
    stop_replying(Reason, Actions, Data);
delivered(goodbye, #data{ended = {why, _}} = Data, Actions) ->
    stop_replying(peer_closed, Actions, Data);
delivered(goodbye, Data, Actions) ->
    peer_leaves(Data, Actions);
delivered(held, Data, Actions) ->
    {keep_state, Data, Actions};
delivered(empty, #data{ended = {why, Reason}} = Data, Actions) ->
    stop_replying(Reason, Actions, Data);
delivered(empty, #data{reads = Reads, stream = Stream} = Data, Actions) when Reads >= ?READS div 2 ->
    %% An ended stream says so by its own message.
    _ = macula_quic:setopt(Stream, active, Reads),
    {keep_state, Data#data{reads = 0}, Actions};
delivered(empty, Data, Actions) ->
    {keep_state, Data, Actions}.

stop_replying(Reason, Actions, Data) ->
    note(Reason),
    case [Reply || {reply, _, _} = Reply <- Actions] of
        [] -> {stop, normal, Data};
        Replies -> {stop_and_reply, normal, Replies, Data}
    end.

%%% The farewell

say_goodbye(Reason, #data{stream = Stream, identity = Identity} = Data) ->
    macula_peering_links:update(self(), #{status => closing}),
    {ok, Wire} = macula_frame:sign_encode(macula_frame:goodbye(Reason), Identity),
    %% A queue that is full takes it when it has room, and the drain's timer bounds that.
    _ = send_last(Stream, Wire),
    _ = macula_quic:setopt(Stream, active, true),
    note(drained),
    Delivery = macula_peering_delivery:drop(Data#data.delivery),
    {next_state, draining, Data#data{buffer = macula_peering_buffer:new(), delivery = Delivery,
                                     farewell = Wire},
     [{state_timeout, drain_left(Data), drain}]}.

drain_left(#data{close_by = undefined, opts = #{drain_timeout_ms := Drain}}) -> Drain;
drain_left(#data{close_by = By}) -> max(0, By - erlang:monotonic_time(millisecond)).

%% In one call: what other processes send at the same time comes before it, or is refused.
send_last(Stream, Wire) ->
    macula_quic:async_send(Stream, Wire, #{fin => true}).

finish_sending(Stream) ->
    _ = macula_quic:async_shutdown_stream(Stream, graceful, 0),
    ok.

-spec draining(gen_statem:event_type(), term(), #data{}) -> result().
draining(state_timeout, drain, Data) ->
    {stop, normal, Data};
draining(info, {quic, send_ready, Stream, _}, #data{stream = Stream, farewell = <<Wire/binary>>}) ->
    _ = send_last(Stream, Wire),
    keep_state_and_data;
draining(info, {quic, peer_send_shutdown, Stream, _}, #data{stream = Stream} = Data) ->
    %% The peer has read our farewell and has nothing more to say.
    {stop, normal, Data};
draining(info, {quic, Bytes, _, _}, _) when is_binary(Bytes) ->
    keep_state_and_data;
draining(info, {quic, What, Conn, _}, #data{conn = Conn} = Data)
  when ?IS_END(What) ->
    note_over(drained, peer_closed_during_drain),
    {stop, normal, Data};
draining(info, {quic, What, Stream, _}, #data{stream = Stream} = Data)
  when What =:= peer_send_aborted; What =:= peer_receive_aborted ->
    {stop, normal, Data};
draining(info, {quic, new_stream, Stream, _}, _) ->
    refuse(Stream),
    keep_state_and_data;
draining(info, {quic, _, _, _}, _) ->
    keep_state_and_data;
draining(info, {'DOWN', Ref, process, _, _}, #data{owner_ref = Ref}) ->
    keep_state_and_data;
draining(cast, {close, _}, _) ->
    keep_state_and_data;
draining(Type, Event, Data) ->
    common(Type, Event, draining, Data).

%% The peer has said goodbye: it is answered by our end of the stream, and expected to close.
peer_leaves(#data{stream = Stream, opts = Opts, delivery = Delivery} = Data, Actions) ->
    macula_peering_links:update(self(), #{status => closing}),
    finish_sending(Stream),
    note(peer_closed),
    {next_state, leaving, Data#data{buffer = macula_peering_buffer:new(),
                                    delivery = macula_peering_delivery:drop(Delivery)},
     [{state_timeout, maps:get(drain_timeout_ms, Opts), drain} | Actions]}.

-spec leaving(gen_statem:event_type(), term(), #data{}) -> result().
leaving(state_timeout, drain, Data) ->
    {stop, normal, Data};
leaving(info, {quic, What, Conn, _}, #data{conn = Conn} = Data)
  when ?IS_END(What) ->
    {stop, normal, Data};
leaving(info, {quic, new_stream, Stream, _}, _) ->
    refuse(Stream),
    keep_state_and_data;
leaving(info, {quic, _, _, _}, _) ->
    keep_state_and_data;
leaving(info, {'DOWN', Ref, process, _, _}, #data{owner_ref = Ref}) ->
    keep_state_and_data;
leaving(cast, {close, _}, _) ->
    keep_state_and_data;
leaving(Type, Event, Data) ->
    common(Type, Event, leaving, Data).

%%% What is the same in every state

common(info, {quic, End, Conn, Reason}, State, #data{conn = Conn} = Data) when ?IS_END(End) ->
    lost(State, end_reason(End, Reason), Data);
common(info, {quic, peer_send_shutdown, Stream, _}, State, #data{stream = Stream} = Data) ->
    lost(State, peer_closed, Data);
common(info, {quic, peer_send_aborted, Stream, Code}, State, #data{stream = Stream} = Data) ->
    lost(State, {stream_reset, Code}, Data);
common(info, {quic, peer_receive_aborted, Stream, Code}, State, #data{stream = Stream} = Data) ->
    lost(State, {stream_stopped, Code}, Data);
common(info, {quic, stream_closed, Stream, #{is_conn_shutdown := false}}, State,
       #data{stream = Stream} = Data) ->
    lost(State, peer_closed, Data);
common(info, {quic, Bytes, _, _}, _, _) when is_binary(Bytes) ->
    keep_state_and_data;
common(info, {quic, new_stream, Stream, _}, _, _) ->
    refuse(Stream),
    keep_state_and_data;
common(info, {quic, _, _, _}, _, _) ->
    %% Ends of streams that are not the control stream, or of whose end more is told elsewhere.
    keep_state_and_data;
common(info, {'DOWN', Ref, process, _, _}, State, #data{owner_ref = Ref} = Data) ->
    note(owner_down),
    case {State, Data} of
        {connected, #data{ended = undefined}} -> say_goodbye(operator_stop, Data);
        _ -> stop(owner_down, Data)
    end;
common(info, {'DOWN', _, process, Dialer, Why}, _, #data{opts = #{dialer := Dialer}}) ->
    %% One that ends by itself has said what becomes of its link; one that is killed has not.
    _ = Why =:= normal orelse Why =:= shutdown orelse begin
        note({worker_down, Why}),
        gen_statem:cast(self(), {close, undefined})
    end,
    keep_state_and_data;
common(info, {'DOWN', Ref, process, Pid, _}, _, #data{delivery = Delivery} = Data) ->
    case macula_peering_delivery:down(Ref, Pid, Delivery) of
        {ok, Left} -> {keep_state, resubscribe(Left, Data)};
        error -> keep_state_and_data
    end;
common({call, From}, await_open, State, _) ->
    Reply = case State of
        S when S =:= draining; S =:= leaving -> {error, closed};
        _ -> {error, not_connected}
    end,
    {keep_state_and_data, [{reply, From, Reply}]};
common({call, From}, {active, Active}, State, Data)
  when State =:= handshaking; State =:= connecting; State =:= awaiting_start ->
    {keep_state, grant(Active, Data), [{reply, From, ok}]};
common({call, From}, {active, _}, _, _) ->
    {keep_state_and_data, [{reply, From, {error, closed}}]};
common({call, From}, {subscribe, Pid, Filter}, _, #data{delivery = Delivery} = Data) ->
    More = macula_peering_delivery:subscribe(Pid, Filter, Delivery),
    {keep_state, resubscribe(More, Data), [{reply, From, ok}]};
common({call, From}, {unsubscribe, Pid}, _, #data{delivery = Delivery} = Data) ->
    case macula_peering_delivery:unsubscribe(Pid, Delivery) of
        {ok, Left} -> {keep_state, resubscribe(Left, Data), [{reply, From, ok}]};
        error -> {keep_state_and_data, [{reply, From, ok}]}
    end;
common({call, From}, {controlling_process, Caller, New}, _, #data{owner = Caller} = Data) ->
    demonitor(Data#data.owner_ref, [flush]),
    macula_peering_links:update(self(), #{owner => New}),
    {keep_state, Data#data{owner = New, owner_ref = monitor(process, New)}, [{reply, From, ok}]};
common({call, From}, {controlling_process, _, _}, _, _) ->
    {keep_state_and_data, [{reply, From, {error, not_owner}}]};
common({call, From}, _, _, _) ->
    %% What only a listener answers.
    {keep_state_and_data, [{reply, From, {error, badarg}}]};
common(info, {'EXIT', Pid, Reason}, _, Data) ->
    case erase({helper, Pid}) of
        true -> keep_state_and_data;
        undefined -> {stop, Reason, Data}
    end;
common(_, _, _, _) ->
    keep_state_and_data.

resubscribe(Delivery, Data) ->
    macula_peering_links:update(self(), #{
        subscribers => macula_peering_delivery:subscribers(Delivery)}),
    Data#data{delivery = Delivery}.

end_reason(shutdown, {application_close, 0, _}) -> peer_closed;
end_reason(_, Reason) -> {connection_lost, Reason}.

%% Frames that arrived before the loss and wait for credit are still the owner's.
lost(connected, Reason, #data{delivery = Delivery, ended = Ended} = Data) ->
    case macula_peering_delivery:is_empty(Delivery) of
        true ->
            stop(Reason, Data);
        false when Ended =:= undefined ->
            macula_peering_links:update(self(), #{status => closing}),
            {keep_state, Data#data{ended = {why, Reason}}};
        false ->
            keep_state_and_data
    end;
lost(_, Reason, Data) ->
    stop(Reason, Data).

stop(Reason, Data) ->
    note(Reason),
    {stop, normal, Data}.

%% The first reason is the one that counts.
note(Reason) ->
    case macula_peering_links:find(self()) of
        {ok, #{reason := undefined}} ->
            macula_peering_links:update(self(), #{reason => {why, Reason}});
        _ ->
            ok
    end.

note_over(Old, Reason) ->
    case macula_peering_links:find(self()) of
        {ok, #{reason := {why, Old}}} ->
            macula_peering_links:update(self(), #{reason => {why, Reason}});
        _ ->
            ok
    end.

%%% The buffer

add(Bytes, #data{buffer = Buffer} = Data) ->
    Data#data{buffer = macula_peering_buffer:add(Bytes, Buffer)}.

take(#data{buffer = Buffer} = Data) ->
    {Bytes, Empty} = macula_peering_buffer:take(Buffer),
    {Bytes, Data#data{buffer = Empty}}.

keep(Bytes, Missing, Data) ->
    Data#data{buffer = macula_peering_buffer:keep(Bytes, Missing)}.
