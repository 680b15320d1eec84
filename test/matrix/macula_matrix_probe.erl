%% @doc The matrix' part inside its nodes.
-module(macula_matrix_probe).

-export([caught_error/1, register/1]).

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
