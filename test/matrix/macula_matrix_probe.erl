%% @doc The matrix' part inside its nodes.
-module(macula_matrix_probe).

-export([caught_error/1, register/1, send_async/2]).

%% @doc An error raised on the other node, as it arrives here.
-spec caught_error(node()) -> {atom(), term()}.
caught_error(Node) ->
    try
        {returned, erpc:call(Node, erlang, atom_to_list, [1])}
    catch
        Class:Reason -> {Class, Reason}
    end.

%% @doc Registers a process that stays.
-spec register(atom()) -> yes | no.
register(Name) ->
    global:register_name(Name, spawn(fun() -> receive after infinity -> ok end end)).

%% @doc How long a process with the flag `async_dist' takes to send so many megabytes, in milliseconds. OTP has
%% the flag since 25.3.
-spec send_async(node(), pos_integer()) -> non_neg_integer() | no_async_dist.
send_async(Node, Megabytes) ->
    {Pid, Ref} = spawn_monitor(fun() ->
        try process_flag(async_dist, true) of
            false -> exit({took, send_all(Node, Megabytes)})
        catch
            error:badarg -> exit({took, no_async_dist})
        end
    end),
    receive {'DOWN', Ref, process, Pid, {took, Took}} -> Took end.

send_all(Node, Megabytes) ->
    Data = binary:copy(<<0>>, 1000000),
    Start = erlang:monotonic_time(millisecond),
    lists:foreach(fun(_) ->
        {nobody, Node} ! Data,
        true = erlang:yield()
    end, lists:seq(1, Megabytes)),
    erlang:monotonic_time(millisecond) - Start.
