%% @doc The top supervisor of the application.
%% @private
-module(macula_sup).
-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

-spec start_link() -> supervisor:startlink_ret().
start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    {ok, {#{strategy => one_for_one, intensity => 5, period => 10}, [
        #{id => macula_peering_sup, start => {macula_peering_sup, start_link, []}, type => supervisor}
    ]}}.
