%% @doc Accepts peers: a QUIC listener with the identity's certificate, a bound on how many
%% handshakes are under way, and one link for each peer.
%% @private
-module(macula_peering_listener).
-behaviour(gen_server).

-export([start_link/1, listening/3]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-type state() :: #{
    opts := macula_peering_opts:opts(),
    listener := macula_quic:listener(),
    owner := pid(),
    owner_ref := reference(),
    handshaking := #{pid() => reference()},
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
            {ok, #{opts => Opts, listener => Listener, owner => Owner,
                   owner_ref => monitor(process, Owner), handshaking => #{}, links => #{},
                   peers => #{}, refused => 0}};
        {error, Reason} ->
            {stop, {shutdown, Reason}}
    end.

%% In a process of its own, whose memory goes with it: the certificate's key passes through it.
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
    exit({listening, listen(Identity, Opts, Listener)}).

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
        Error ->
            Error
    end.

quic_opts(#{alpn := Alpn, idle_timeout_ms := Idle, keep_alive_interval_ms := Alive,
            max_handshaking := Max}) ->
    [{alpn, Alpn}, {idle_timeout_ms, Idle}, {keep_alive_interval_ms, Alive},
     {datagram_receive_enabled, false}, {peer_unidi_stream_count, 0},
     %% All that a peer may have in our memory before it is known; the link widens it.
     {conn_flow_control_window, 65536}, {max_handshakes, Max}].

-spec handle_call(term(), gen_server:from(), state()) -> {reply, term(), state()}.
handle_call(sockname, _From, #{listener := Listener} = State) ->
    {reply, macula_quic:sockname(Listener), State};
handle_call(info, _From, #{handshaking := Handshaking, links := Links, refused := Refused} = State) ->
    {reply, {ok, #{handshaking => map_size(Handshaking), links => map_size(Links),
                   refused => Refused}}, State};
handle_call(_, _From, State) ->
    {reply, {error, badarg}, State}.

-spec handle_cast(term(), state()) -> {noreply, state()} | {stop, normal, state()}.
handle_cast(close, State) ->
    {stop, normal, State};
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

new_conn(Conn, #{opts := Opts, handshaking := Handshaking, links := Links} = State) ->
    #{max_handshaking := MaxHandshaking, max_links := MaxLinks} = Opts,
    case map_size(Handshaking) < MaxHandshaking
         andalso map_size(Handshaking) + map_size(Links) < MaxLinks of
        true ->
            case macula_peering:accept_checked(Conn, Opts#{accept_owner => self()}) of
                {ok, Pid} ->
                    State#{handshaking := Handshaking#{Pid => monitor(process, Pid)}};
                {error, _} ->
                    %% Lost between its arrival and here, or peering is being shut down.
                    _ = macula_quic:close_connection(Conn),
                    State
            end;
        false ->
            _ = macula_quic:close_connection(Conn, 0, <<"busy">>),
            State#{refused := maps:get(refused, State) + 1}
    end.

linked(Pid, NodeId, #{opts := Opts, handshaking := Handshaking, links := Links,
                      peers := Peers} = State) ->
    _ = [Owner ! {macula_peering, handshake_complete, Pid, NodeId}
         || #{accept_owner := Owner} <- [Opts], is_pid(Owner)],
    case maps:take(Pid, Handshaking) of
        {Ref, Rest} ->
            Next = State#{handshaking := Rest, links := Links#{Pid => {Ref, NodeId}}},
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

gone(Pid, #{handshaking := Handshaking, links := Links, peers := Peers} = State) ->
    case Links of
        #{Pid := {_, NodeId}} ->
            Left = case Peers of
                #{NodeId := Pid} -> maps:remove(NodeId, Peers);
                #{} -> Peers
            end,
            State#{links := maps:remove(Pid, Links), peers := Left};
        #{} ->
            State#{handshaking := maps:remove(Pid, Handshaking)}
    end.

%% Links that were accepted stay; they have an owner.
-spec terminate(term(), state()) -> ok.
terminate(_, #{listener := Listener}) ->
    _ = macula_quic:close_listener(Listener),
    ok.
