%% @doc Supervises peering: the table of links, and one supervisor each for the workers, the
%% listeners and the redialling dialers, registered as `macula_peering_conn_sup' and so on.
%%
%% The tables belong to this supervisor, so that they outlive the process that watches them; if
%% that one fails, everything it watches goes on, and it takes up its watch again.
%% @private
-module(macula_peering_sup).
-behaviour(supervisor).

-export([start_link/0, start_link/1, start_child/2]).
-export([init/1]).

-type child() :: macula_peering_conn | macula_peering_dialer | macula_peering_listener.

-spec start_link() -> supervisor:startlink_ret().
start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, peering).

%% @doc The supervisor of all children of one module. None is restarted: whoever started it is told
%% of its end.
-spec start_link(child()) -> supervisor:startlink_ret().
start_link(Child) ->
    supervisor:start_link({local, name(Child)}, ?MODULE, Child).

-spec start_child(child(), term()) -> {ok, pid()} | {error, term()}.
start_child(Child, Args) ->
    try supervisor:start_child(name(Child), [Args]) of
        {ok, Pid} when is_pid(Pid) -> {ok, Pid};
        {error, {shutdown, Reason}} -> {error, Reason};
        {error, Reason} -> {error, Reason}
    catch
        exit:{noproc, _} -> {error, not_started};
        exit:{shutdown, _} -> {error, not_started}
    end.

name(macula_peering_conn) -> macula_peering_conn_sup;
name(macula_peering_dialer) -> macula_peering_dialer_sup;
name(macula_peering_listener) -> macula_peering_listener_sup.

-spec init(peering | child()) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(peering) ->
    macula_peering_links:create(),
    macula_peering_replay:create(),
    Flags = #{strategy => one_for_one, intensity => 10, period => 10},
    Children = [macula_peering_conn, macula_peering_dialer, macula_peering_listener],
    {ok, {Flags, [
        #{id => links, start => {macula_peering_links, start_link, []}},
        #{id => replay, start => {macula_peering_replay, start_link, []}}
        | [#{id => name(Child), start => {?MODULE, start_link, [Child]}, type => supervisor}
           || Child <- Children]]}};
init(Child) ->
    {ok, {#{strategy => simple_one_for_one}, [
        #{id => Child, start => {Child, start_link, []}, restart => temporary, shutdown => 5000}
    ]}}.
