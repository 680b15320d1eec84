%% @doc The acceptors of one listener, and the connections that they become. None is started again:
%% `macula_quic_acceptor' replaces those that are gone.
%% @private
-module(macula_quic_acceptor_sup).
-behaviour(supervisor).

-export([start_link/1]).
-export([init/1]).

%% @doc Starts the supervisor, whose children have so long to end.
-spec start_link(non_neg_integer()) -> {ok, pid()} | ignore | {error, term()}.
start_link(ShutdownMs) ->
    supervisor:start_link(?MODULE, ShutdownMs).

%% @private
-spec init(non_neg_integer()) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(ShutdownMs) ->
    {ok, {#{strategy => simple_one_for_one},
          [#{id => connection,
             start => {macula_quic_connection, start_acceptor, []},
             restart => temporary,
             shutdown => ShutdownMs,
             modules => [macula_quic_connection]}]}}.
