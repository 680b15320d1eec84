%% @doc The callbacks of the rows `behaviours' and `behaviour', of both ends: the server's streams echo, those of the
%% client send, and measure how long the echo takes. One `init/1' serves both behaviours, so that neither can be named.
-module(macula_bench_behaviours).

-export([init/1, new_conn/3, connected/3]).
-export([init_handoff/4, handle_info/2, handle_stream_data/4]).

-type state() :: map().

%% @doc Of a connection, or of a stream of the client.
-spec init(map()) -> {ok, state()}.
init(#{stream_opts := #{tell := _} = Own, stream := Stream}) ->
    {ok, Own#{stream => Stream, times => [], got => <<>>}};
init(Options) -> {ok, Options}.

-spec new_conn(macula_quic:connection(), map(), state()) -> {ok, state()}.
new_conn(_Conn, _Props, State) ->
    {ok, State}.

-spec connected(macula_quic:connection(), map(), state()) -> {ok, state()}.
connected(Conn, _Props, #{tell := Pid} = State) ->
    Pid ! {connected, Conn},
    {ok, State};
connected(_Conn, _Props, State) ->
    {ok, State}.

%% @doc Of a stream of the server.
-spec init_handoff(macula_quic:stream(), map(), macula_quic:connection(), map()) -> {ok, echo}.
init_handoff(_Stream, _Options, _Conn, _Props) ->
    {ok, echo}.

%% @doc All streams of the client are open: they begin, and end at the same time.
-spec handle_info(term(), State) -> {ok, State}.
handle_info({go, Warm, Deadline}, #{stream := Stream} = State) ->
    {ok, send(Stream, State#{warm => Warm, deadline => Deadline})};
handle_info(_Message, State) ->
    {ok, State}.

-spec handle_stream_data(macula_quic:stream(), binary(), map(), State) -> {ok, State}.
handle_stream_data(Stream, Data, _Flags, echo) ->
    ok = macula_quic:send(Stream, Data),
    {ok, echo};
handle_stream_data(Stream, Data, _Flags, #{data := Data, got := <<>>} = State) ->
    {ok, done(Stream, State)};
handle_stream_data(Stream, Data, _Flags, #{data := Sent, got := Got} = State) ->
    case <<Got/binary, Data/binary>> of
        Sent -> {ok, done(Stream, State#{got := <<>>})};
        Part when byte_size(Part) < byte_size(Sent) -> {ok, State#{got := Part}}
    end.

send(Stream, #{data := Data} = State) ->
    Since = erlang:monotonic_time(nanosecond),
    ok = macula_quic:send(Stream, Data),
    State#{since => Since}.

%% As `macula_bench_quic_load' has it.
done(Stream, #{since := Since, warm := Warm, deadline := Deadline, times := Times, tell := Pid} = State) ->
    Now = erlang:monotonic_time(nanosecond),
    if
        Now div 1000 < Warm -> send(Stream, State);
        Now div 1000 < Deadline -> send(Stream, State#{times := [Now - Since | Times]});
        true -> Pid ! {times, self(), Times}, State
    end.
