%% @doc The link engine's functions, also for the time in which a release boots.
%%
%% In embedded mode the boot script has loaded all modules when the distribution starts, but those with
%% an `on_load' function, as macula_nif, are not known by their names before the kernel has run
%% that function, which it does when all of its own processes are there: other libraries' `on_load'
%% functions may call the file server, which starts after the distribution. So their turn must not
%% come earlier for the distribution's sake. load/0 runs macula_nif's own function alone, which
%% leaves the functions behind the names here; the kernel runs it again in its turn, and from then on
%% calls go to macula_nif by name.
%% @private
-module(macula_dist_nif).

-export([load/0, offer/1]).
%% Internal, spawned.
-export([do_load/0]).
-export([dist_endpoint/2, dist_endpoint_close/1, dist_await_port/2, dist_accept/1, dist_connect/4, dist_own/2,
         dist_peer/1, dist_trust/2, dist_exporter/1, dist_control_send/3, dist_control_recv/2, dist_start/2,
         dist_send/2, dist_tick/1, dist_credit/2, dist_stat/1, dist_info/1,
         dist_exchange/2, dist_exchange_key/2, dist_mac/2, dist_is_mac/3, dist_random/0, dist_stop/1]).
-export([dist_streams/2, dist_stream_open/5, dist_stream_accept/3, dist_stream_stop_accepting/1, dist_stream_send/5,
         dist_stream_reset/3, dist_stream_set_active/3, dist_stream_begin_transfer/3,
         dist_stream_commit_transfer/1, dist_stream_list/2]).

-define(EARLY, {?MODULE, early}).
-define(CALL(Function, Args),
        case erlang:module_loaded(macula_nif) of
            true -> macula_nif:Function Args;
            false ->
                case early(Function) of
                    %% The module was deleted, and this call loads it again.
                    none -> macula_nif:Function Args;
                    Early -> Early Args
                end
        end).

%% @doc Makes the functions callable. To be called before any of them.
-spec load() -> ok | {error, term()}.
load() ->
    %% In interactive mode this loads the module; in embedded mode it says whether the boot script's
    %% on_load functions have run.
    case code:ensure_loaded(macula_nif) of
        {module, _} ->
            ok;
        {error, Reason} ->
            case erlang:module_loaded(macula_nif) of
                true -> ok;
                false -> load_early(Reason)
            end
    end.

load_early(Reason) ->
    case persistent_term:get(?EARLY, none) of
        #{} ->
            ok;
        _ ->
            persistent_term:put(?EARLY, wanted),
            %% As the kernel does it, in a process of its own.
            {Pid, Monitor} = spawn_monitor(?MODULE, do_load, []),
            receive
                {'DOWN', Monitor, process, Pid, {returned, ok}} -> ok;
                {'DOWN', Monitor, process, Pid, {returned, Error}} -> {error, Error};
                %% Nothing has been loaded whose on_load could run.
                {'DOWN', Monitor, process, Pid, {badarg, _}} -> {error, Reason};
                {'DOWN', Monitor, process, Pid, Other} -> {error, Other}
            end
    end.

-spec do_load() -> no_return().
do_load() ->
    exit({returned, erlang:call_on_load_function(macula_nif)}).

%% @doc Called by macula_nif when its library is loaded.
-spec offer(#{atom() => function()}) -> ok.
offer(Functions) ->
    case persistent_term:get(?EARLY, none) of
        wanted -> persistent_term:put(?EARLY, Functions);
        _ -> ok
    end.

early(Function) ->
    case persistent_term:get(?EARLY, none) of
        #{Function := Early} -> Early;
        _ -> none
    end.

-spec dist_endpoint(macula_nif:dist_address(), map()) ->
          {ok, reference(), macula_nif:dist_address()} | {error, atom()}.
dist_endpoint(A, B) -> ?CALL(dist_endpoint, (A, B)).

-spec dist_endpoint_close(reference()) -> ok.
dist_endpoint_close(A) -> ?CALL(dist_endpoint_close, (A)).

-spec dist_await_port(inet:port_number(), reference()) -> boolean().
dist_await_port(A, B) -> ?CALL(dist_await_port, (A, B)).

-spec dist_accept(reference()) -> ok | {error, closed}.
dist_accept(A) -> ?CALL(dist_accept, (A)).

-spec dist_connect(reference(), macula_nif:dist_address(), non_neg_integer(), reference()) ->
          ok.
dist_connect(A, B, C, D) -> ?CALL(dist_connect, (A, B, C, D)).

-spec dist_own(reference(), [pid()]) -> boolean().
dist_own(A, B) -> ?CALL(dist_own, (A, B)).

-spec dist_peer(reference()) -> macula_nif:dist_address().
dist_peer(A) -> ?CALL(dist_peer, (A)).

-spec dist_trust(reference(), 1000..600000) -> ok.
dist_trust(A, B) -> ?CALL(dist_trust, (A, B)).

-spec dist_exporter(reference()) -> {ok, <<_:256>>} | {error, closed}.
dist_exporter(A) -> ?CALL(dist_exporter, (A)).

-spec dist_control_send(reference(), iodata(), reference()) -> ok | {error, closed}.
dist_control_send(A, B, C) -> ?CALL(dist_control_send, (A, B, C)).

-spec dist_control_recv(reference(), reference()) -> ok | {error, closed}.
dist_control_recv(A, B) -> ?CALL(dist_control_recv, (A, B)).

-spec dist_start(reference(), pid()) -> ok | {error, closed}.
dist_start(A, B) -> ?CALL(dist_start, (A, B)).

-spec dist_send(reference(), [{non_neg_integer(), [binary()]}]) -> Result | {hold, Result, [Sender]}
              when Result :: ok | busy | closed, Sender :: {non_neg_integer(), non_neg_integer(), pos_integer()}.
dist_send(A, B) -> ?CALL(dist_send, (A, B)).

-spec dist_tick(reference()) -> ok | {error, closed}.
dist_tick(A) -> ?CALL(dist_tick, (A)).

-spec dist_credit(reference(), non_neg_integer()) -> ok.
dist_credit(A, B) -> ?CALL(dist_credit, (A, B)).

-spec dist_stat(reference()) -> {non_neg_integer(), non_neg_integer(), non_neg_integer()}.
dist_stat(A) -> ?CALL(dist_stat, (A)).

-spec dist_info(reference()) -> map().
dist_info(A) -> ?CALL(dist_info, (A)).

-spec dist_exchange(dialler | acceptor, binary()) -> {reference(), Share :: <<_:264>>}.
dist_exchange(A, B) -> ?CALL(dist_exchange, (A, B)).

-spec dist_exchange_key(reference(), binary()) -> {ok, <<_:256>>} | {error, bad_share}.
dist_exchange_key(A, B) -> ?CALL(dist_exchange_key, (A, B)).

-spec dist_mac(binary(), iodata()) -> <<_:256>>.
dist_mac(A, B) -> ?CALL(dist_mac, (A, B)).

-spec dist_is_mac(binary(), iodata(), binary()) -> boolean().
dist_is_mac(A, B, C) -> ?CALL(dist_is_mac, (A, B, C)).

-spec dist_random() -> <<_:256>>.
dist_random() -> ?CALL(dist_random, ()).

-spec dist_stop(reference()) -> ok.
dist_stop(A) -> ?CALL(dist_stop, (A)).

-spec dist_streams(reference(), node()) ->
          ok.
dist_streams(A, B) -> ?CALL(dist_streams, (A, B)).

-spec dist_stream_open(node(), reference(), atom(), 16..255, macula_nif:stream_active()) ->
          ok | {error, not_connected | unsupported}.
dist_stream_open(A, B, C, D, E) -> ?CALL(dist_stream_open, (A, B, C, D, E)).

-spec dist_stream_accept(node(), atom(), macula_nif:stream_active()) ->
          ok | {error, not_connected | unsupported}.
dist_stream_accept(A, B, C) -> ?CALL(dist_stream_accept, (A, B, C)).

-spec dist_stream_stop_accepting(node()) ->
          ok.
dist_stream_stop_accepting(A) -> ?CALL(dist_stream_stop_accepting, (A)).

-spec dist_stream_send(node(), non_neg_integer(), reference() | none, [binary()], boolean()) ->
          ok | full | wait | {error, term()}.
dist_stream_send(A, B, C, D, E) -> ?CALL(dist_stream_send, (A, B, C, D, E)).

-spec dist_stream_reset(node(), non_neg_integer(), non_neg_integer()) ->
          ok | {error, atom()}.
dist_stream_reset(A, B, C) -> ?CALL(dist_stream_reset, (A, B, C)).

-spec dist_stream_set_active(node(), non_neg_integer(), macula_nif:stream_active()) ->
          ok | {error, atom()}.
dist_stream_set_active(A, B, C) -> ?CALL(dist_stream_set_active, (A, B, C)).

-spec dist_stream_begin_transfer(node(), non_neg_integer(), pid()) ->
          {ok, atom(), reference()} | {error, atom()}.
dist_stream_begin_transfer(A, B, C) -> ?CALL(dist_stream_begin_transfer, (A, B, C)).

-spec dist_stream_commit_transfer(reference()) ->
          ok.
dist_stream_commit_transfer(A) -> ?CALL(dist_stream_commit_transfer, (A)).

-spec dist_stream_list(node(), non_neg_integer()) ->
          [macula_nif:stream_facts()].
dist_stream_list(A, B) -> ?CALL(dist_stream_list, (A, B)).
