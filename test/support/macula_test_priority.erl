%% @doc Priority messages, which OTP has since version 28: they come before all that waits in a mailbox. What else one
%% process sends to another keeps its order.
-module(macula_test_priority).

-export([is_known/0, orders/2, orders_beside_bulk/2, expected/0]).
%% Spawned.
-export([receiver/1, sink/0]).

%% @doc Whether this VM has them.
-spec is_known() -> boolean().
is_known() ->
    %% By the name at run time: an older compiler may know the options.
    try apply(erlang, alias, [[priority]]) of
        Alias -> apply(erlang, unalias, [Alias])
    catch
        error:badarg -> false
    end.

%% @doc What a process on Node finds in its mailbox, so many times.
-spec orders(node(), pos_integer()) -> [[term()]].
orders(Node, Times) ->
    [order(Node) || _ <- lists:seq(1, Times)].

%% @doc The same while another process fills the link.
-spec orders_beside_bulk(node(), pos_integer()) -> [[term()]].
orders_beside_bulk(Node, Times) ->
    Sink = spawn(Node, ?MODULE, sink, []),
    Bulk = spawn(fun() -> pour(Sink, binary:copy(<<0>>, 1000000)) end),
    Orders = orders(Node, Times),
    exit(Bulk, kill),
    exit(Sink, kill),
    Orders.

%% @doc What it is to find.
-spec expected() -> [term()].
expected() ->
    [urgent] ++ lists:seq(1, 8).

order(Node) ->
    Receiver = spawn(Node, ?MODULE, receiver, [self()]),
    Alias = receive {Receiver, Made} -> Made end,
    Large = binary:copy(<<0>>, 200000),
    lists:foreach(fun(N) -> Receiver ! {N, Large} end, lists:seq(1, 5)),
    _ = apply(erlang, send, [Alias, {urgent, x}, [priority]]),
    lists:foreach(fun(N) -> Receiver ! {N, x} end, lists:seq(6, 8)),
    receive {Receiver, order, Order} -> Order after 30000 -> error(no_order) end.

%% It takes nothing out before all are there.
receiver(To) ->
    To ! {self(), apply(erlang, alias, [[priority]])},
    ok = macula_test_nodes:wait_until(fun() ->
        {message_queue_len, Length} = process_info(self(), message_queue_len),
        Length =:= length(expected())
    end, 30000),
    {messages, Messages} = process_info(self(), messages),
    To ! {self(), order, [Tag || {Tag, _} <- Messages]}.

sink() ->
    receive _ -> sink() end.

pour(Sink, Bin) ->
    Sink ! Bin,
    pour(Sink, Bin).
