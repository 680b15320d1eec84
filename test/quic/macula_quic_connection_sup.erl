%% A supervisor as users write it, for acceptors of one listener.
-module(macula_quic_connection_sup).
-behaviour(supervisor).

-export([init/1]).

init([Listener, Table]) ->
    {ok, {#{strategy => simple_one_for_one},
          [#{id => connection,
             start => {macula_quic_connection, start_acceptor, [Listener, Table]},
             restart => temporary}]}}.
