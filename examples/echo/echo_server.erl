%% @doc An echo server: a process for each connection, which does nothing but accept it, and one for each
%% stream. `supervisor:start_child(Sup, echo_server:child_spec(Port, Credentials))', or `start_link/2'.
-module(echo_server).
-behaviour(macula_quic_connection).

-export([start_link/2, child_spec/2]).
-export([init/1, new_conn/3]).
%% Of macula_quic_stream.
-export([init_handoff/4, handle_stream_data/4, peer_send_shutdown/3]).

start_link(Port, Credentials) ->
    macula_quic_connection:start_listener(options(Port, Credentials)).

child_spec(Port, Credentials) ->
    macula_quic_connection:child_spec(options(Port, Credentials)).

options(Port, Credentials) ->
    #{callback => ?MODULE, listen_on => Port, listen_opts => Credentials#{alpn => ["echo"]},
      stream_opts => #{stream_callback => ?MODULE}}.

init(ConnOpts) ->
    {ok, ConnOpts}.

new_conn(_Conn, _Props, State) ->
    {ok, State}.

init_handoff(_Stream, _StreamOpts, _Conn, _Props) ->
    {ok, no_state}.

handle_stream_data(Stream, Data, _Flags, State) ->
    ok = macula_quic:send(Stream, Data),
    {ok, State}.

peer_send_shutdown(Stream, undefined, State) ->
    ok = macula_quic:async_shutdown_stream(Stream, graceful, 0),
    {ok, State}.
