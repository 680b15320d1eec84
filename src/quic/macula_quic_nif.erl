%% @doc The VM boundary: the stubs of the native functions and their loading, nothing else.
%% @private
-module(macula_quic_nif).

%% The distribution's link engine: native/macula_quic/src/dist/nif.rs.
-export([dist_endpoint/2, dist_endpoint_close/2, dist_accept/1, dist_connect/4, dist_own/1,
         dist_peer/1, dist_exporter/1, dist_control_send/3, dist_control_recv/2, dist_start/2,
         dist_send/2, dist_tick/1, dist_credit/2, dist_stat/1, dist_stop/1, dist_info/1]).

-on_load(init/0).

-spec init() -> ok | {error, term()}.
init() ->
    %% Runs before any application is started when the distribution loads it: no application
    %% environment, no logger. The file is found beside the code, whatever the directory is called.
    Priv = case code:priv_dir(macula) of
        {error, bad_name} ->
            filename:join(filename:dirname(filename:dirname(code:which(?MODULE))), "priv");
        Dir ->
            Dir
    end,
    erlang:load_nif(filename:join(Priv, "macula_quic"), 0).

%% --- distribution ---------------------------------------------------------------------------

-type dist_endpoint() :: reference().
-type dist_link() :: reference().
-type dist_address() :: {inet:ip_address(), inet:port_number()}.

-spec dist_endpoint(dist_address(), map()) ->
          {ok, dist_endpoint(), dist_address()} | {error, atom()}.
dist_endpoint(_Address, _Options) -> erlang:nif_error(nif_not_loaded).

-spec dist_endpoint_close(dist_endpoint(), reference()) -> ok.
dist_endpoint_close(_Endpoint, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_accept(dist_endpoint()) -> ok | {error, closed}.
dist_accept(_Endpoint) -> erlang:nif_error(nif_not_loaded).

-spec dist_connect(dist_endpoint(), dist_address(), non_neg_integer(), reference()) -> ok.
dist_connect(_Endpoint, _Address, _Timeout, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_own(dist_link()) -> boolean().
dist_own(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_peer(dist_link()) -> dist_address().
dist_peer(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_exporter(dist_link()) -> {ok, <<_:256>>} | {error, closed}.
dist_exporter(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_control_send(dist_link(), iodata(), reference()) -> ok | {error, closed}.
dist_control_send(_Link, _Data, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_control_recv(dist_link(), reference()) -> ok | {error, closed}.
dist_control_recv(_Link, _Ref) -> erlang:nif_error(nif_not_loaded).

-spec dist_start(dist_link(), pid()) -> ok | {error, closed}.
dist_start(_Link, _Input) -> erlang:nif_error(nif_not_loaded).

-spec dist_send(dist_link(), [{non_neg_integer(), [binary()]}]) -> ok | busy | closed.
dist_send(_Link, _Packets) -> erlang:nif_error(nif_not_loaded).

-spec dist_tick(dist_link()) -> ok | {error, closed}.
dist_tick(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_credit(dist_link(), non_neg_integer()) -> ok.
dist_credit(_Link, _Cost) -> erlang:nif_error(nif_not_loaded).

-spec dist_stat(dist_link()) -> {non_neg_integer(), non_neg_integer(), non_neg_integer()}.
dist_stat(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_stop(dist_link()) -> ok.
dist_stop(_Link) -> erlang:nif_error(nif_not_loaded).

-spec dist_info(dist_link()) -> map().
dist_info(_Link) -> erlang:nif_error(nif_not_loaded).
