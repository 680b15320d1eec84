%% @doc The processes of a distribution link, and calls on a link that is not one yet.
%%
%% Per link there are:
%% <ul>
%% <li>the <em>output handler</em>, the distribution controller the VM knows. It pulls packets from
%%     the VM and hands them to the native link engine, many in one call;</li>
%% <li>the <em>input handler</em>, which hands what the engine received to the VM, and gives the
%%     engine credit back as it goes, so that a VM that is slow slows its peers;</li>
%% <li>the connection supervisor that `dist_util' provides, which sends the net ticks.</li>
%% </ul>
%% They are linked: when one ends, all end, and the reason of the first is the reason of the
%% `nodedown'. The engine monitors the output handler and the supervisor, so the QUIC connection ends with
%% the first of them. A disconnect ends the supervisor first.
%% @private
-module(macula_dist_link).

%% The two handlers are servers for one reason: a process that waits in a loop of this module would be
%% killed when the module has been loaded twice, and the link would end with it.
-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

-export([start_controller/2, call/2, send_frame/2, recv_frame/2, tick/1, getstat/1,
         info/1]).
-export([controller_init/3, input_init/5]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% What is in a handler's mailbox is large and passed on soon: not worth a copy in a collection.
-define(SPAWN_OPTIONS, [{message_queue_data, off_heap}]).

%% What one call to the engine carries: enough to be worth a call, little enough to be quick.
-define(BATCH_BYTES, 128 * 1024).
-define(BATCH_PACKETS, 1024).

%% How long the output handler stays ahead of others after the link was full, in milliseconds.
-define(HURRY, 1000).

%% A packet of this size that did not come from the VM is answered when there is room for the next one.
-define(LARGE, 64 * 1024).

%% Credit is given back in lumps of this size.
-define(CREDIT_LUMP, 128 * 1024).

%% Deliveries of this size are bulk, those under the other are not.
-define(BULK, 64 * 1024).
-define(LIGHT, 16 * 1024).

-type link() :: reference().

%% Starts the process that becomes the output handler, linked to the caller. The facts are those of
%% info/1 that the engine does not know.
-spec start_controller(link(), map()) -> {ok, pid()} | {error, closed}.
start_controller(Link, Facts) ->
    Sup = self(),
    Pid = proc_lib:spawn_opt(?MODULE, controller_init, [Link, Sup, Facts],
                             [link, {priority, max} | ?SPAWN_OPTIONS]),
    receive
        {Pid, owner, true} -> {ok, Pid};
        {Pid, owner, false} -> {error, closed}
    end.

%% A request to the controller.
-spec call(pid(), term()) -> term().
call(Controller, Request) ->
    Ref = erlang:monitor(process, Controller),
    Controller ! {Ref, self(), Request},
    receive
        {Ref, Result} ->
            _ = erlang:demonitor(Ref, [flush]),
            Result;
        {'DOWN', Ref, process, Controller, Reason} ->
            exit({dist_controller_exit, Reason})
    end.

%% Sends one frame during the handshake.
-spec send_frame(link(), iodata()) -> ok | {error, closed}.
send_frame(Link, Data) ->
    Ref = make_ref(),
    case macula_dist_nif:dist_control_send(Link, Data, Ref) of
        ok ->
            receive
                {Ref, {ok, _}} -> ok;
                {Ref, {error, _}} -> {error, closed}
            end;
        {error, closed} = Error ->
            Error
    end.

%% Receives one frame during the handshake.
-spec recv_frame(link(), timeout()) -> {ok, binary()} | {error, term()}.
recv_frame(Link, Timeout) ->
    Ref = make_ref(),
    case macula_dist_nif:dist_control_recv(Link, Ref) of
        ok ->
            receive
                {Ref, Result} -> Result
            after Timeout ->
                {error, timeout}
            end;
        {error, closed} = Error ->
            Error
    end.

%% A net tick. It does not wait behind data.
-spec tick(link()) -> ok.
tick(Link) ->
    _ = macula_dist_nif:dist_tick(Link),
    ok.

%% Packets received and sent. Nothing counts as pending: a tick goes past whatever is.
-spec getstat(link()) -> {ok, non_neg_integer(), non_neg_integer(), 0}.
getstat(Link) ->
    {In, Out, _Queued} = macula_dist_nif:dist_stat(Link),
    {ok, In, Out, 0}.

%% A link's state, asked of its controller.
-spec info(pid()) -> {ok, map()} | error.
info(Controller) ->
    try call(Controller, info) of
        #{} = Info -> {ok, Info}
    catch
        exit:_ -> error
    end.

%% --- output handler -------------------------------------------------------------------------

-spec controller_init(link(), pid(), map()) -> no_return().
controller_init(Link, Sup, Facts) ->
    _ = put(facts, Facts),
    Sup ! {self(), owner, macula_dist_nif:dist_own(Link, [Sup, self()])},
    gen_server:enter_loop(?MODULE, [], {setup, Sup, Link}).

%% @private
-spec init(term()) -> ignore.
init(_) ->
    ignore.

%% @private
-spec handle_call(term(), term(), State) -> {noreply, State}.
handle_call(_, _, State) ->
    {noreply, State}.

%% @private
-spec handle_cast(term(), State) -> {noreply, State}.
handle_cast(_, State) ->
    {noreply, State}.

%% @private
-spec handle_info(term(), term()) -> {noreply, term()}.
handle_info({Ref, From, {handshake_complete, Node, DHandle}}, {setup, Sup, Link}) ->
    Input = proc_lib:spawn_opt(?MODULE, input_init, [DHandle, Link, Sup, self(), Node],
                               [link, {priority, high} | ?SPAWN_OPTIONS]),
    ok = erlang:dist_ctrl_input_handler(DHandle, Input),
    _ = erlang:dist_ctrl_set_opt(DHandle, get_size, true),
    Input ! DHandle,
    ok = macula_dist_nif:dist_streams(Link, Node),
    From ! {Ref, ok},
    macula_telemetry:begun([macula, dist, link], {up, down}, #{node => Node, controller => self()}),
    %% Normal, as with OTP's own carriers: by the time it runs, others that were ready to run
    %% have sent too, and their packets travel together.
    _ = process_flag(priority, normal),
    _ = erlang:dist_ctrl_get_data_notification(DHandle),
    {noreply, {output, DHandle, Link}};
handle_info(dist_data, {output, DHandle, Link}) ->
    {noreply, go_on(pull(DHandle, Link), DHandle, Link)};
%% The link was full. Not pulling is what makes the VM suspend the senders.
handle_info(macula_dist_writable, {output, DHandle, Link}) ->
    macula_dist_asking:answer_all(room),
    {noreply, go_on(pull(DHandle, Link), DHandle, Link)};
%% The queue has room for these again.
handle_info({macula_dist_free, Senders}, {output, DHandle, Link} = State) ->
    Waited = macula_dist_asking:is_any(),
    macula_dist_held:free(Senders),
    case Waited of
        true -> {noreply, go_on(pull(DHandle, Link), DHandle, Link)};
        false -> {noreply, State}
    end;
handle_info({macula_dist_async, Pid}, {output, _, _} = State) ->
    macula_dist_held:let_go_async(Pid),
    {noreply, State};
handle_info(macula_dist_standstill, {output, _, Link} = State) ->
    macula_dist_held:look_again(Link),
    {noreply, State};
handle_info({send, From, Ref, Data}, {output, DHandle, Link}) ->
    %% A packet that did not come from the VM. OTP's own test suites ask for it.
    Vec = erlang:iolist_to_iovec(Data),
    {noreply, go_on(put_foreign(From, Ref, {iolist_size(Vec), Vec}, Link), DHandle, Link)};
handle_info({Ref, From, Request}, State) when is_reference(Ref), is_pid(From) ->
    answer(Ref, From, Request, State),
    {noreply, State};
handle_info({macula_dist_data, Packets, Cost}, {input, DHandle, Link, Priority, Owed}) ->
    Next = priority(Priority, Cost),
    case put_data(DHandle, Packets) of
        ok ->
            %% Where all share one scheduler a turn of ours brings more than one of theirs takes.
            _ = Next =:= normal andalso erlang:yield(),
            {noreply, {input, DHandle, Link, Next, pay(Link, Owed + Cost)}};
        closed ->
            {noreply, death_row()}
    end;
handle_info({macula_dist_closed, Why}, {input, _, _, _, _} = State) ->
    log_end(Why),
    end_link(State);
handle_info(leave, dead) ->
    leave(dead);
handle_info(_, State) ->
    {noreply, State}.

log_end({protocol_error, Rule}) ->
    Node = get(node),
    ?LOG_ERROR("macula_dist: the link to ~ts ended, as the peer broke a rule of the protocol: ~ts", [Node, Rule],
               #{macula_dist => {protocol_error, Node, Rule}});
log_end(_Why) ->
    ok.

%% Ends the controller, which takes the other processes of the link along. Where the input handler goes first, its
%% supervisor and net_kernel run before the controller, as their priority is higher, and until the controller
%% has run the VM lists the node: what another node asks in the meantime would be answered with what was.
end_link(State) ->
    true = exit(get(controller), connection_closed),
    {noreply, State}.

%% An exit of a server's own would be reported as a crash.
leave(State) ->
    true = exit(self(), connection_closed),
    {noreply, State}.

%% When it was full, `macula_dist_writable' says when there is room.
go_on(Pulled, DHandle, Link) when Pulled =:= ok; Pulled =:= busy -> {output, DHandle, Link};
%% Closed, or failed: then it ends, too.
go_on(_, _DHandle, _Link) -> death_row().

%% Answers a request in any state of the link: a full link and a busy one keep nobody waiting.
answer(Ref, From, getll, _State) ->
    From ! {Ref, {ok, self()}},
    ok;
answer(Ref, From, info, {_, _, Link}) ->
    Info = maps:merge(macula_dist_nif:dist_info(Link), get(facts)),
    From ! {Ref, Info#{address => macula_dist_nif:dist_peer(Link)}},
    ok;
answer(Ref, From, _Request, _State) ->
    From ! {Ref, {error, bad_request}},
    ok.

%% Deals with what has come while there was data to move, and cannot wait.
answer_waiting(State) ->
    receive
        {Ref, From, Request} when is_reference(Ref), is_pid(From) ->
            answer(Ref, From, Request, State),
            answer_waiting(State);
        {macula_dist_free, Senders} ->
            macula_dist_held:free(Senders),
            answer_waiting(State);
        {macula_dist_async, Pid} ->
            macula_dist_held:let_go_async(Pid),
            answer_waiting(State)
    after 0 ->
        ok
    end.

%% Everything the VM has, batch by batch; then it is asked to tell when there is more.
pull(DHandle, Link) ->
    case macula_dist_asking:is_any() of
        false -> pull_all(DHandle, Link);
        true -> busy
    end.

pull_all(DHandle, Link) ->
    case batch(DHandle, [], 0, 0) of
        {more, Packets} ->
            case put_on_link(Link, Packets) of
                ok ->
                    answer_waiting({output, DHandle, Link}),
                    pull_all(DHandle, Link);
                Other -> Other
            end;
        {last, Packets} ->
            case put_last(Link, Packets) of
                ok ->
                    calm_down(),
                    ask_for_more(DHandle);
                Other ->
                    Other
            end;
        closed ->
            closed
    end.

put_last(_Link, []) -> ok;
put_last(Link, Packets) -> put_on_link(Link, Packets).

batch(_DHandle, Packets, Bytes, Count) when Bytes >= ?BATCH_BYTES; Count >= ?BATCH_PACKETS ->
    {more, lists:reverse(Packets)};
batch(DHandle, Packets, Bytes, Count) ->
    case get_data(DHandle) of
        none ->
            {last, lists:reverse(Packets)};
        {Size, _Vec} = Packet ->
            batch(DHandle, [Packet | Packets], Bytes + Size, Count + 1);
        closed ->
            closed
    end.

get_data(DHandle) ->
    try
        erlang:dist_ctrl_get_data(DHandle)
    catch
        %% The VM has no such link any more.
        _:_ -> closed
    end.

ask_for_more(DHandle) ->
    try
        _ = erlang:dist_ctrl_get_data_notification(DHandle),
        ok
    catch
        %% As above.
        _:_ -> closed
    end.

%% --- packets that did not come from the VM ---------------------------------------------------

%% OTP's own test suites send them. What a small one says may make the peer close the link so quickly that this
%% process is gone before the next line: it is answered first. The sender of a large one waits for the answer until
%% the link has room, and so does the VM with what it has, as where a process writes to a socket that is full.
put_foreign(From, Ref, {Size, _} = Packet, Link) when Size < ?LARGE ->
    From ! {Ref, ok},
    put_on_link(Link, [Packet]);
put_foreign(From, Ref, Packet, Link) ->
    macula_dist_asking:add(From, Ref),
    case put_on_link(Link, [Packet]) of
        busy -> busy;
        Result -> macula_dist_asking:answer(From, room), Result
    end.

put_on_link(Link, Packets) ->
    case macula_dist_nif:dist_send(Link, Packets) of
        {hold, Result, Senders} ->
            macula_dist_held:hold(Link, Senders),
            stay_ahead(Result);
        Result ->
            stay_ahead(Result)
    end.

stay_ahead(Result) ->
    case Result of
        busy ->
            %% When it is pulled again all senders go on, and the one with the most to send would fill
            %% the VM's queue before the others have had a turn: from now on the queue is emptied
            %% before anybody else runs.
            hurry(),
            busy;
        _ ->
            Result
    end.

hurry() ->
    _ = put(hurried, erlang:monotonic_time(millisecond)),
    _ = process_flag(priority, high),
    ok.

%% The link has not been full for a while.
calm_down() ->
    case get(hurried) of
        undefined ->
            ok;
        Since ->
            case erlang:monotonic_time(millisecond) - Since > ?HURRY of
                true ->
                    _ = erase(hurried),
                    _ = process_flag(priority, normal),
                    ok;
                false ->
                    ok
            end
    end.

%% The link is ending. The process that began it has the reason, and its exit reaches us; ending
%% by ourselves would hide it.
death_row() ->
    macula_dist_held:free_all(),
    _ = erlang:send_after(5000, self(), leave),
    dead.

%% --- input handler --------------------------------------------------------------------------

-spec input_init(erlang:dist_handle(), link(), pid(), pid(), node()) -> {noreply, closed}.
input_init(DHandle, Link, Sup, Controller, Node) ->
    true = link(Sup),
    _ = put(node, Node),
    _ = put(controller, Controller),
    %% Data must not be put before the VM knows us as its input handler.
    receive DHandle -> ok end,
    case macula_dist_nif:dist_start(Link, self()) of
        ok -> gen_server:enter_loop(?MODULE, [], {input, DHandle, Link, high, 0});
        {error, closed} -> end_link(closed)
    end.

pay(Link, Owed) when Owed >= ?CREDIT_LUMP ->
    ok = macula_dist_nif:dist_credit(Link, Owed),
    0;
pay(_Link, Owed) ->
    Owed.

%% What comes one by one should not wait for those that compute. Bulk must not keep those that
%% receive it from running: their mailboxes would grow without bound, and with them the time that
%% each of their garbage collections takes.
priority(high, Cost) when Cost >= ?BULK ->
    _ = process_flag(priority, normal),
    normal;
priority(normal, Cost) when Cost < ?LIGHT ->
    _ = process_flag(priority, high),
    %% What was large must not wait for the next collection, which may be far away now.
    true = erlang:garbage_collect(),
    high;
priority(Priority, _Cost) ->
    Priority.

put_data(DHandle, Packets) ->
    try
        put_each(DHandle, Packets)
    catch
        %% The VM has no such link any more.
        _:_ -> closed
    end.

put_each(DHandle, [Packet | Packets]) ->
    _ = erlang:dist_ctrl_put_data(DHandle, Packet),
    put_each(DHandle, Packets);
put_each(_DHandle, []) ->
    ok.
