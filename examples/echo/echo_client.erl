%% @doc A client: one connection, and a stream for each request, whose end is that of the response.
-module(echo_client).
-behaviour(macula_quic_connection).

-export([start_link/3, request/2]).
-export([init/1, connected/3, handle_call/3]).
%% Of macula_quic_stream, for the processes of the requests.
-export([start_completed/3, handle_stream_data/4, peer_send_shutdown/3, stream_closed/3]).

start_link(Host, Port, Trust) ->
    macula_quic_connection:start_link(?MODULE, {Host, Port}, {Trust#{alpn => ["echo"]}, #{}}).

request(Client, Data) -> gen_server:call(Client, {request, Data}).

init(#{stream_opts := #{from := From, data := Data}}) -> {ok, {From, Data}};
init(_ConnOpts) -> {ok, []}.

%% Until there is a connection, the state is the list of requests that wait.
connected(Conn, _Props, Waiting) ->
    lists:foldr(fun({Request, From}, _) -> handle_call(Request, From, Conn) end, {ok, Conn}, Waiting).

handle_call(Request, From, Waiting) when is_list(Waiting) -> {noreply, [{Request, From} | Waiting]};
handle_call({request, Data}, From, Conn) ->
    {ok, _} = macula_quic_stream:start_link(?MODULE, Conn, #{is_local => true, from => From, data => Data}),
    {ok, Conn}.

start_completed(Stream, _Props, {From, Data}) ->
    ok = macula_quic:send(Stream, Data, #{fin => true}),
    {ok, {From, []}}.

handle_stream_data(_Stream, Data, _Flags, {From, Got}) -> {ok, {From, [Got, Data]}}.

peer_send_shutdown(_Stream, undefined, {From, Got}) ->
    gen_server:reply(From, {ok, iolist_to_binary(Got)}),
    {stop, normal, done}.

stream_closed(_Stream, #{reason := Reason}, {From, _Got}) ->
    gen_server:reply(From, {error, Reason}),
    {stop, normal, failed}.
