%% @doc Log lines about peers that were refused, or that refuse, so many in a time: an attacker shall not fill
%% the disk.
%% @private
-module(macula_dist_refusals).

-export([new/0, log/3, log_dial/2]).

-export_type([log/0]).

-include_lib("kernel/include/logger.hrl").

-define(DIAL_LOG, {?MODULE, dial_log}).
%% A peer that leaves during the handshake says no more (RFC 9000, section 10.2.3).
-define(APPLICATION_ERROR, 16#c).

%% Refusals logged per period, and the period in milliseconds.
-define(LOG_MAX, 20).
-define(LOG_PERIOD, 10000).

-type log() :: {Since :: integer(), Count :: non_neg_integer()}.
%% When the period began, and how many there were.

%% @doc A log without lines.
-spec new() -> log().
new() ->
    {erlang:monotonic_time(millisecond), 0}.

%% @doc Notes that a peer that has dialled was refused.
%%
%% A peer that leaves before its proof is no attack: so do nodes that dial each other at the same
%% moment, as one of the two calls is given up.
-spec log(Peer :: term(), Why :: term(), log()) -> log().
log(_Peer, {closed, _}, Log) ->
    Log;
log(_Peer, {application_closed, _}, Log) ->
    Log;
log(_Peer, {transport_error, ?APPLICATION_ERROR}, Log) ->
    Log;
log(Peer, Why, {Since, Count}) ->
    Now = erlang:monotonic_time(millisecond),
    if
        Now - Since > ?LOG_PERIOD ->
            log_unlogged(Count - ?LOG_MAX),
            macula_dist_trust:log_refused(Peer, Why),
            {Now, 1};
        Count < ?LOG_MAX ->
            macula_dist_trust:log_refused(Peer, Why),
            {Since, Count + 1};
        true ->
            {Since, Count + 1}
    end.

log_unlogged(Count) when Count > 0 ->
    ?LOG_ERROR("macula_dist: ~w more connections refused", [Count], #{macula_dist => refused});
log_unlogged(_) ->
    ok.

%% @doc The same for dials, each by a process of its own.
-spec log_dial(node(), Why :: term()) -> ok.
log_dial(Node, Why) ->
    Log = dial_log(),
    Now = erlang:monotonic_time(millisecond),
    Since = atomics:get(Log, 1),
    case Now - Since > ?LOG_PERIOD andalso atomics:compare_exchange(Log, 1, Since, Now) of
        ok ->
            log_unlogged(atomics:exchange(Log, 2, 1) - ?LOG_MAX),
            macula_dist_trust:log_refused({to, Node}, Why);
        _ ->
            case atomics:add_get(Log, 2, 1) =< ?LOG_MAX of
                true -> macula_dist_trust:log_refused({to, Node}, Why);
                false -> ok
            end
    end.

dial_log() ->
    case persistent_term:get(?DIAL_LOG, none) of
        none ->
            Log = atomics:new(2, [{signed, true}]),
            ok = atomics:put(Log, 1, erlang:monotonic_time(millisecond)),
            persistent_term:put(?DIAL_LOG, Log),
            Log;
        Log ->
            Log
    end.
