%% @doc Supervises peering: the table of links, the workers, the listeners, the redialling dialers.
%%
%% The tables belong to this supervisor, so that they outlive the process that watches them; if
%% that one fails, everything it watches goes on, and it takes up its watch again.
%% @private
-module(macula_peering_sup).
-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

-spec start_link() -> supervisor:startlink_ret().
start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    macula_peering_links:create(),
    macula_peering_replay:create(),
    Flags = #{strategy => one_for_one, intensity => 10, period => 10},
    {ok, {Flags, [
        #{id => links, start => {macula_peering_links, start_link, []}},
        #{id => replay, start => {macula_peering_replay, start_link, []}},
        sup(macula_peering_conn_sup),
        sup(macula_peering_dialer_sup),
        sup(macula_peering_listener_sup)
    ]}}.

sup(Module) ->
    #{id => Module, start => {Module, start_link, []}, type => supervisor}.
