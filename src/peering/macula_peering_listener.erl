%% @doc Accepts peers: a QUIC listener with the identity's certificate, a bound on how many
%% handshakes are under way, and one link for each peer.
%% @private
-module(macula_peering_listener).
-behaviour(gen_server).

-include("macula_peering.hrl").

-export([start_link/1, listening/3]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-type state() :: #{
    opts := macula_peering_opts:opts(),
    listener := macula_quic:listener(),
    owner := pid(),
    owner_ref := reference(),
    %% With the monotonic time of its beginning; and the same by age.
    handshaking := #{pid() => {reference(), integer()}},
    ages := gb_sets:set({integer(), pid()}),
    %% Handshakes that have been told to end, and may have ended otherwise meanwhile.
    cut_short := #{pid() => reference()},
    cut := non_neg_integer(),
    links := #{pid() => {reference(), macula_identity:node_id()}},
    peers := #{macula_identity:node_id() => pid()},
    refused := non_neg_integer()
}.

-spec start_link(macula_peering_opts:opts()) -> {ok, pid()} | {error, term()}.
start_link(Opts) ->
    case gen_server:start_link(?MODULE, Opts, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

-spec init(macula_peering_opts:opts()) -> {ok, state()} | {stop, term()}.
init(#{controlling_pid := Owner, freshness_ms := Window} = Opts) ->
    process_flag(trap_exit, true),
    case listen(Opts) of
        {ok, Listener} ->
            ok = macula_quic:async_accept(Listener),
            macula_peering_replay:cover(Window),
            begun(Listener),
            {ok, #{opts => Opts, listener => Listener, owner => Owner,
                   owner_ref => monitor(process, Owner), handshaking => #{},
                   ages => gb_sets:new(), cut_short => #{}, cut => 0, links => #{}, peers => #{},
                   refused => 0}};
        {error, Reason} ->
            {stop, {shutdown, Reason}}
    end.

begun(Listener) ->
    Known = #{listener => self()},
    macula_telemetry:begun([macula, peering, listener], {start, stop}, case macula_quic:sockname(Listener) of
        {ok, Address} -> Known#{sockname => Address};
        {error, _} -> Known
    end).

%% In a process of its own, whose memory goes with it: the certificate's key passes through it, so that
%% a report of a failure could show the key, and there is none.
listen(#{identity := Identity} = Opts) ->
    Listener = self(),
    {Pid, Ref} = spawn_monitor(?MODULE, listening, [Identity, Opts, Listener]),
    receive
        {'DOWN', Ref, process, Pid, {listening, Result}} -> Result;
        {'DOWN', Ref, process, Pid, Reason} -> {error, Reason}
    end.

%% @private
-spec listening(macula_identity:identity(), map(), pid()) -> no_return().
listening(Identity, Opts, Listener) ->
    exit({listening, try listen(Identity, Opts, Listener)
                     catch Class:_ -> {error, {internal_error, Class}}
                     end}).

listen(Identity, #{port := Port, address := Address, sans := Sans} = Opts, Listener) ->
    case macula_quic:generate_self_signed_cert(macula_identity:public(Identity),
                                               macula_identity:seed(Identity), Sans) of
        {ok, {Cert, Key}} ->
            Options = [{cert, Cert}, {key, Key} | quic_opts(Opts)],
            Listening = case Address of
                any -> macula_quic:listen(Port, Options);
                _ -> macula_quic:listen(Address, Port, Options)
            end,
            case Listening of
                {ok, L} ->
                    case macula_quic:controlling_process(L, Listener) of
                        ok -> {ok, L};
                        Error -> Error
                    end;
                Error -> Error
            end;
        {error, {bad_san, _} = Why} ->
            {error, {bad_option, sans, Why}};
        Error ->
            Error
    end.

quic_opts(#{alpn := Alpn, idle_timeout_ms := Idle, keep_alive_interval_ms := Alive,
            max_handshaking := Max}) ->
    [{alpn, Alpn}, {idle_timeout_ms, Idle}, {keep_alive_interval_ms, Alive},
     {datagram_receive_enabled, false}, {peer_unidi_stream_count, 0},
     %% All that a peer may have in our memory before it is known; the link widens it.
     {conn_flow_control_window, ?HANDSHAKE_BYTES}, {max_handshakes, Max}].

-spec handle_call(term(), gen_server:from(), state()) ->
    {reply, term(), state()} | {stop, normal, ok, state()}.
handle_call(close_listener, _From, State) ->
    {stop, normal, ok, State};
handle_call(sockname, _From, #{listener := Listener} = State) ->
    {reply, macula_quic:sockname(Listener), State};
handle_call(info, _From, #{handshaking := Handshaking, links := Links, refused := Refused,
                           cut := Cut} = State) ->
    {reply, {ok, #{handshaking => map_size(Handshaking), links => map_size(Links),
                   refused => Refused, cut_short => Cut}}, State};
handle_call(_, _From, State) ->
    {reply, {error, badarg}, State}.

-spec handle_cast(term(), state()) -> {noreply, state()}.
handle_cast(_, State) ->
    {noreply, State}.

-spec handle_info(term(), state()) -> {noreply, state()} | {stop, term(), state()}.
handle_info({quic, new_conn, Conn, _}, State) ->
    {noreply, new_conn(Conn, State)};
handle_info({quic, listener_stopped, Listener, _}, #{listener := Listener} = State) ->
    {stop, {shutdown, listener_stopped}, State};
handle_info({macula_peering, handshake_complete, Pid, NodeId}, State) ->
    {noreply, linked(Pid, NodeId, State)};
handle_info({'DOWN', Ref, process, _, _}, #{owner_ref := Ref} = State) ->
    {stop, normal, State};
handle_info({'DOWN', _, process, Pid, _}, State) ->
    {noreply, gone(Pid, State)};
handle_info({'EXIT', _, Reason}, State) ->
    {stop, Reason, State};
handle_info(_, State) ->
    {noreply, State}.

new_conn(Conn, State) ->
    case room(State) of
        {ok, Roomy} ->
            take_in(Conn, Roomy);
        full ->
            _ = macula_quic:close_connection(Conn, 0, <<"busy">>),
            State#{refused := maps:get(refused, State) + 1}
    end.

take_in(Conn, #{opts := Opts, handshaking := Handshaking, ages := Ages} = State) ->
    case macula_peering:accept_checked(Conn, Opts#{accept_owner => self()}) of
        {ok, Pid} ->
            Now = now_ms(),
            State#{handshaking := Handshaking#{Pid => {monitor(process, Pid), Now}},
                   ages := gb_sets:add_element({Now, Pid}, Ages)};
        {error, _} ->
            %% Lost between its arrival and here, or peering is being shut down.
            _ = macula_quic:close_connection(Conn),
            State
    end.

%% Those who never say who they are must not keep out those who would: the oldest makes room, once it
%% has had the time that a peer far away on a bad path needs.
room(#{opts := #{max_handshaking := Max, max_links := MaxLinks}, links := Links,
       handshaking := Handshaking} = State) ->
    Places = case MaxLinks of
        infinity -> Max;
        _ -> min(Max, MaxLinks - map_size(Links))
    end,
    case map_size(Handshaking) of
        N when N < Places -> {ok, State};
        _ when Places > 0 -> oldest_makes_room(State);
        _ -> full
    end.

oldest_makes_room(#{opts := #{min_handshake_ms := Min}, handshaking := Handshaking, ages := Ages,
                    cut_short := CutShort, cut := Cut} = State) ->
    {{Since, Oldest}, Younger} = gb_sets:take_smallest(Ages),
    case now_ms() - Since >= Min of
        true ->
            macula_peering_conn:cut_short(Oldest),
            {{Ref, Since}, Left} = maps:take(Oldest, Handshaking),
            {ok, State#{handshaking := Left, ages := Younger, cut := Cut + 1,
                        cut_short := CutShort#{Oldest => Ref}}};
        false ->
            full
    end.

now_ms() ->
    erlang:monotonic_time(millisecond).

%% Of the handshakes under way, or of those that were to end; `error' for what is neither.
take_handshake(Pid, #{handshaking := Handshaking, ages := Ages, cut_short := CutShort} = State) ->
    case {maps:take(Pid, Handshaking), maps:take(Pid, CutShort)} of
        {{{Ref, Since}, Left}, _} ->
            {Ref, State#{handshaking := Left, ages := gb_sets:del_element({Since, Pid}, Ages)}};
        {error, {Ref, Left}} ->
            {Ref, State#{cut_short := Left}};
        {error, error} ->
            error
    end.

linked(Pid, NodeId, #{opts := Opts, links := Links, peers := Peers} = State) ->
    _ = [Owner ! {macula_peering, handshake_complete, Pid, NodeId}
         || #{accept_owner := Owner} <- [Opts], is_pid(Owner)],
    case take_handshake(Pid, State) of
        {Ref, Taken} ->
            Next = Taken#{links := Links#{Pid => {Ref, NodeId}}},
            case {Opts, Peers} of
                {#{duplicates := newest}, #{NodeId := Older}} ->
                    ok = macula_peering:close(Older, replaced_by_newer_handshake),
                    Next#{peers := Peers#{NodeId := Pid}};
                _ ->
                    Next#{peers := Peers#{NodeId => Pid}}
            end;
        error ->
            State
    end.

gone(Pid, #{links := Links, peers := Peers} = State) ->
    case Links of
        #{Pid := {_, NodeId}} ->
            Left = case Peers of
                #{NodeId := Pid} -> maps:remove(NodeId, Peers);
                #{} -> Peers
            end,
            State#{links := maps:remove(Pid, Links), peers := Left};
        #{} ->
            case take_handshake(Pid, State) of
                {_, Taken} -> Taken;
                error -> State
            end
    end.

%% Links that were accepted stay; they have an owner.
-spec terminate(term(), state()) -> ok.
terminate(Reason, #{listener := Listener}) ->
    _ = macula_quic:close_listener(Listener),
    macula_telemetry:ended(Reason).
