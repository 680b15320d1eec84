%% @doc The application callback. Distribution and QUIC work without the application being
%% started; it supervises what peering and the status functions need.
%% @private
-module(macula_app).
-behaviour(application).

-export([start/2, stop/1]).

-spec start(application:start_type(), term()) -> {ok, pid()} | {error, term()}.
start(_Type, _Args) ->
    %% A node that believes its distribution is encrypted, and is wrong, must hear of it.
    _ = macula_dist:check_start_flags(),
    %% Where it is not to be had, peers find out after their idle timeout.
    _ = macula_library:guard(),
    case macula_sup:start_link() of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.

-spec stop(term()) -> ok.
stop(_State) ->
    ok.
