%% @doc The endpoint of the node: one UDP port for dialling and being dialled.
%% @private
-module(macula_dist_listen).

-export([listen/2, close/2, endpoint/1, native/1]).
%% Spawned.
-export([do_open/1]).

-include_lib("kernel/include/logger.hrl").

-define(ENDPOINT, {?MODULE, endpoint}).
%% The process that makes the endpoint of a node that does not listen.
-define(OPENER, macula_dist_opener).

%% @doc Opens the node's UDP port and makes its name known.
-spec listen(atom(), string()) ->
    {ok, Endpoint :: reference(), Node :: string(), Address :: tuple(), Creation :: integer()} | {error, term()}.
listen(Name, Host) ->
    case macula_dist_nif:load() of
        ok ->
            listen_loaded(Name, Host);
        {error, Reason} ->
            Error = {error, {native_library_not_loaded, Reason}},
            ?LOG_CRITICAL("macula_dist: ~ts", [macula_dist_trust:format_error(element(2, Error))],
                          #{macula_dist => start}),
            Error
    end.

listen_loaded(Name, Host) ->
    load_configuration(),
    guard(),
    close_left_over(),
    NameString = atom_to_list(Name),
    Node = NameString ++ "@" ++ Host,
    case open(Node, true, macula_dist_discovery:ports(NameString)) of
        {ok, Endpoint, Address} ->
            Port = element(2, Address),
            case macula_dist_discovery:register(NameString, Host, Port) of
                ok ->
                    persistent_term:put(?ENDPOINT, Endpoint),
                    {ok, Endpoint, Node, Address, creation()};
                {error, _} = Error ->
                    close_endpoint(Endpoint),
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

%% The configuration is readable once the application is loaded, which nobody has done yet.
load_configuration() ->
    try application:load(macula) of
        _ -> ok
    catch
        _:_ -> ok
    end.

%% Peers are told when this VM crashes. Without it they find out after the liveness time.
guard() ->
    case macula_library:guard() of
        ok -> ok;
        {error, Why} -> ?LOG_WARNING("macula_dist: peers will not be told of a crash: ~0p", [Why])
    end.

open(_Node, _Listen, {error, _} = Error) ->
    Error;
open(Node, Listen, Ports) ->
    case macula_dist_parameters:endpoint_options(Node, Listen) of
        {ok, Ip, Options} -> open_first(Ip, Ports, Options);
        {error, _} = Error -> Error
    end.

open_first(Ip, [Port | Ports], Options) ->
    case open_port(Ip, Port, Options) of
        {error, eaddrinuse} when Ports =/= [] -> open_first(Ip, Ports, Options);
        Result -> Result
    end.

open_port(Ip, Port, Options) ->
    case macula_dist_nif:dist_endpoint(native({Ip, Port}), Options) of
        {error, eaddrinuse} = Error ->
            %% Perhaps our own from a moment ago, whose links are ending. The engine knows: a restart of
            %% the VM spares no process that could.
            Ref = make_ref(),
            Awaited = macula_dist_nif:dist_await_port(Port, Ref),
            %% Each fresh reference has its receive (macula_quic_call).
            _ = Awaited orelse (self() ! {Ref, nothing}),
            receive {Ref, _} -> ok end,
            case Awaited of
                true -> macula_dist_nif:dist_endpoint(native({Ip, Port}), Options);
                false -> Error
            end;
        Result ->
            Result
    end.

%% Random, so that a node that starts again is never taken for what it was.
creation() ->
    case macula_dist_nif:dist_random() of
        %% The smallest ones have a meaning of old.
        <<Creation:32, _/binary>> when Creation >= 4 -> Creation;
        _ -> creation()
    end.

%% @doc Closes the node's port. Links that are up end with their processes.
-spec close(Endpoint :: reference(), Node :: string()) -> ok.
close(Endpoint, Node) ->
    macula_dist_discovery:unregister(Node),
    _ = persistent_term:get(?ENDPOINT, none) =:= Endpoint andalso persistent_term:erase(?ENDPOINT),
    close_endpoint(Endpoint).

%% The port is free when the links have ended, which they do when net_kernel has.
close_endpoint(Endpoint) ->
    macula_dist_nif:dist_endpoint_close(Endpoint).

%% The endpoint of a net_kernel that could not close it: it was killed, or never listened.
close_left_over() ->
    case persistent_term:get(?ENDPOINT, none) of
        none ->
            ok;
        Endpoint ->
            _ = persistent_term:erase(?ENDPOINT),
            close_endpoint(Endpoint)
    end.

%% @doc The endpoint to dial from. A node that does not listen gets one when it first dials.
-spec endpoint(Node :: string()) -> {ok, reference()} | {error, term()}.
endpoint(Node) ->
    case persistent_term:get(?ENDPOINT, none) of
        none ->
            %% By a process of its own, which a set-up that runs out of time does not take along.
            {Opener, Monitor} = spawn_monitor(?MODULE, do_open, [Node]),
            receive
                {'DOWN', Monitor, process, Opener, {opened, Result}} -> Result;
                {'DOWN', Monitor, process, Opener, Reason} -> {error, Reason}
            end;
        Endpoint ->
            {ok, Endpoint}
    end.

%% One at a time, by the registered name: of two endpoints the one that is not kept would be
%% collected, with the links that were made from it.
%% @private
-spec do_open(string()) -> no_return().
do_open(Node) ->
    try register(?OPENER, self()) of
        true ->
            exit({opened, open_to_dial(Node, persistent_term:get(?ENDPOINT, none))})
    catch
        error:badarg ->
            Monitor = erlang:monitor(process, ?OPENER),
            receive {'DOWN', Monitor, process, _, _} -> do_open(Node) end
    end.

open_to_dial(Node, none) ->
    load_configuration(),
    case macula_dist_nif:load() of
        ok -> open_loaded_to_dial(Node);
        {error, Reason} -> {error, {native_library_not_loaded, Reason}}
    end;
open_to_dial(_Node, Endpoint) ->
    {ok, Endpoint}.

open_loaded_to_dial(Node) ->
    guard(),
    case open(Node, false, [0]) of
        {ok, Endpoint, _Address} ->
            persistent_term:put(?ENDPOINT, Endpoint),
            {ok, Endpoint};
        {error, _} = Error ->
            Error
    end.

%% @doc An address as the engine takes it.
-spec native({tuple(), inet:port_number()}) -> macula_dist_nif:dist_address().
native({{Ip, Scope}, Port}) when is_tuple(Ip) -> {Ip, Port, Scope};
native({Ip, Port}) -> {Ip, Port}.
