%% @doc Supervises one worker for each link to a peer. None is restarted: whoever started it is told of its end.
%% @private
-module(macula_peering_conn_sup).
-behaviour(supervisor).

-export([start_link/0, start_child/1]).
-export([init/1]).

-spec start_link() -> supervisor:startlink_ret().
start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

-spec start_child(term()) -> {ok, pid()} | {error, term()}.
start_child(Args) ->
    try supervisor:start_child(?MODULE, [Args]) of
        {ok, Pid} when is_pid(Pid) -> {ok, Pid};
        {error, {shutdown, Reason}} -> {error, Reason};
        {error, Reason} -> {error, Reason}
    catch
        exit:{noproc, _} -> {error, not_started};
        exit:{shutdown, _} -> {error, not_started}
    end.

-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    {ok, {#{strategy => simple_one_for_one}, [
        #{id => macula_peering_conn,
          start => {macula_peering_conn, start_link, []},
          restart => temporary,
          shutdown => 5000}
    ]}}.
