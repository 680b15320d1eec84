%% @doc Peers that this node dials.
%% @private
-module(macula_dist_setup).

-export([start/5, try_out/1]).
%% Spawned.
-export([do_setup/6, do_dial/4, do_try_out/1]).

-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/logger.hrl").

%% How often a dial begins whose connection ends before the peer has proven itself.
-define(DIALS, 3).

%% How long an address is tried alone, in milliseconds.
-define(NEXT_ADDRESS, 250).

%% @doc Starts the process that dials a node.
-spec start(node(), normal | hidden, node(), longnames | shortnames, non_neg_integer()) -> pid().
start(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    spawn_opt(?MODULE, do_setup, [self(), Node, Type, MyNode, LongOrShortNames, SetupTime],
              dist_util:net_ticker_spawn_options()).

%% @private
-spec do_setup(pid(), node(), normal | hidden, node(), longnames | shortnames,
               non_neg_integer()) -> no_return().
do_setup(Kernel, Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    Timer = dist_util:start_timer(SetupTime),
    check_name(Node, LongOrShortNames),
    case macula_dist_discovery:lookup(Node, SetupTime) of
        {ok, Addresses} ->
            dist_util:reset_timer(Timer),
            case dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, ?DIALS) of
                {ok, Link, Liveness} ->
                    Controller = macula_dist_handshake:controller(Link, Node, Liveness),
                    dist_util:reset_timer(Timer),
                    HSData = (macula_dist_handshake:data(Link, Controller))#hs_data{
                        kernel_pid = Kernel,
                        other_node = Node,
                        this_node = MyNode,
                        timer = Timer,
                        other_version = 5,
                        request_type = Type},
                    dist_util:handshake_we_started(HSData);
                {refused, Reason} ->
                    macula_dist_refusals:log_dial(Node, Reason),
                    ?shutdown2(Node, {refused, Reason});
                {error, Reason} ->
                    ?shutdown2(Node, {dial_failed, Addresses, Reason})
            end;
        {error, Reason} ->
            ?shutdown2(Node, {lookup_failed, Reason})
    end.

%% @doc Why a node cannot be reached, as far as its name, its address, and the trust of both go. No link stays.
-spec try_out(node()) -> ok | {error, {unknown_node, node(), term()} | {no_answer, node(), [term()], term()}
                                      | {refused, node(), term()}}.
try_out(Node) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, do_try_out, [Node]),
    receive
        {'DOWN', Monitor, process, Pid, {tried, Result}} -> Result;
        {'DOWN', Monitor, process, Pid, Reason} -> {error, {refused, Node, Reason}}
    end.

%% @private
-spec do_try_out(node()) -> no_return().
do_try_out(Node) ->
    Time = macula_dist_parameters:setup_time(),
    %% What is tried has a time of its own, and says more at its end.
    Timer = dist_util:start_timer(2 * Time),
    exit({tried, case macula_dist_discovery:lookup(Node, Time) of
        {ok, Addresses} ->
            dist_util:reset_timer(Timer),
            case dial_and_trust(node(), Node, Addresses, Time, Timer, 1) of
                {ok, Link, _Liveness} -> macula_dist_nif:dist_stop(Link);
                {refused, Reason} -> {error, {refused, Node, Reason}};
                {error, Reason} -> {error, {no_answer, Node, Addresses, Reason}}
            end;
        {error, Reason} ->
            {error, {unknown_node, Node, Reason}}
    end}).

%% A node that ends while it is dialled takes the connection along, and the node that follows in its
%% place may be waiting for this very dial: so the dial begins anew.
dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, Dials) ->
    case dial(atom_to_list(MyNode), Addresses, SetupTime) of
        {ok, Link} ->
            dist_util:reset_timer(Timer),
            Liveness = macula_dist_parameters:own_liveness(),
            case macula_dist_trust:dial(Link, MyNode, Node, auth:get_cookie(Node), Liveness) of
                {ok, Agreed} ->
                    dist_util:reset_timer(Timer),
                    {ok, Link, Agreed};
                {error, {closed, _}} when Dials > 1 ->
                    dial_and_trust(MyNode, Node, Addresses, SetupTime, Timer, Dials - 1);
                {error, Reason} ->
                    {refused, Reason}
            end;
        {error, _} = Error ->
            Error
    end.

check_name(Node, LongOrShortNames) ->
    case macula_dist_discovery:split(Node) of
        {_, Host} ->
            case macula_dist_discovery:check_name(Host, LongOrShortNames) of
                ok ->
                    ok;
                {error, not_longnames} ->
                    ?LOG_ERROR("** System running to use fully qualified hostnames **~n"
                               "** Hostname ~ts is illegal **~n", [Host]),
                    ?shutdown(Node);
                {error, not_shortnames} ->
                    ?LOG_ERROR("** System NOT running to use fully qualified hostnames **~n"
                               "** Hostname ~ts is illegal **~n", [Host]),
                    ?shutdown(Node)
            end;
        false ->
            ?LOG_ERROR("** Nodename ~p illegal **~n", [Node]),
            ?shutdown(Node)
    end.

dial(MyNode, Addresses, SetupTime) ->
    case macula_dist_listen:endpoint(MyNode) of
        {ok, Endpoint} ->
            Deadline = erlang:monotonic_time(millisecond) + SetupTime,
            dial_each(Endpoint, Addresses, #{}, Deadline, no_address);
        {error, _} = Error ->
            Error
    end.

%% An address is tried when the one before has failed or has not answered for a moment, and the first
%% that answers counts: one that is silent takes neither the others' time nor their turn.
dial_each(Endpoint, [Address | Rest], Trying, Deadline, Last) ->
    Time = left(Deadline),
    {Dialler, Monitor} = spawn_monitor(?MODULE, do_dial, [self(), Endpoint, macula_dist_listen:native(Address),
                                                          Time div (length(Rest) + 1)]),
    Next = case Rest of
        [] -> Time;
        _ -> min(?NEXT_ADDRESS, Time)
    end,
    await_dialled(Endpoint, Rest, Trying#{Dialler => Monitor}, Deadline, Last, Next);
dial_each(_Endpoint, [], Trying, _Deadline, Last) when map_size(Trying) =:= 0 ->
    {error, Last};
dial_each(Endpoint, [], Trying, Deadline, Last) ->
    await_dialled(Endpoint, [], Trying, Deadline, Last, left(Deadline)).

await_dialled(Endpoint, Rest, Trying, Deadline, Last, Time) ->
    receive
        {Dialler, dialled, Link} when is_map_key(Dialler, Trying) ->
            true = macula_dist_nif:dist_own(Link, [self()]),
            give_up(Trying),
            {ok, Link};
        {'DOWN', _, process, Dialler, Reason} when is_map_key(Dialler, Trying) ->
            Why = case Reason of {dial_failed, Failure} -> Failure; _ -> Reason end,
            dial_each(Endpoint, Rest, maps:remove(Dialler, Trying), Deadline, Why)
    after Time ->
        case Rest of
            [] ->
                give_up(Trying),
                {error, case Last of no_address -> timeout; _ -> Last end};
            _ ->
                dial_each(Endpoint, Rest, Trying, Deadline, Last)
        end
    end.

%% A link that has been made all the same is ended: its reference is garbage here, and would keep it.
give_up(Trying) ->
    _ = [begin
             true = exit(Dialler, kill),
             receive {'DOWN', Monitor, process, Dialler, _} -> ok end,
             receive {Dialler, dialled, Link} -> macula_dist_nif:dist_stop(Link) after 0 -> ok end
         end || {Dialler, Monitor} <- maps:to_list(Trying)],
    ok.

left(Deadline) ->
    max(0, Deadline - erlang:monotonic_time(millisecond)).

%% @private
-spec do_dial(pid(), reference(), macula_dist_nif:dist_address(), non_neg_integer()) -> ok.
do_dial(Parent, Endpoint, Address, Time) ->
    %% The set-up timer may end the one that asked.
    Monitor = erlang:monitor(process, Parent),
    Ref = make_ref(),
    ok = macula_dist_nif:dist_connect(Endpoint, Address, Time, Ref),
    receive
        {Ref, {ok, Link}} ->
            Parent ! {self(), dialled, Link},
            %% Until the other has it.
            receive {'DOWN', Monitor, process, Parent, _} -> ok end;
        {Ref, {error, Why}} ->
            exit({dial_failed, Why});
        {'DOWN', Monitor, process, Parent, _} ->
            ok
    end.
