%% @doc Streams of your own to a connected node, on the link that the distribution has.
%%
%% A file, a video or a tunnel between two nodes need no port and no credentials of their own, and keep
%% no small message waiting. Streams have their turns beside what the distribution sends in bulk.
%%
%% ```
%% %% Here.
%% {ok, Stream} = macula_dist_stream:open_stream('b@host'),
%% ok = macula_dist_stream:send(Stream, <<"hello">>, true),
%% receive {macula_dist_stream, Stream, {data, Answer, true}} -> Answer end.
%%
%% %% At 'b@host'.
%% ok = macula_dist_stream:accept_streams('a@host'),
%% receive {macula_dist_stream, Stream, {data, <<"hello">>, true}} ->
%%     ok = macula_dist_stream:send(Stream, <<"welcome">>, true)
%% end.
%% '''
%%
%% A stream is bidirectional and has one owner at each end: the process that opened it, and the one of those
%% that accept streams from the node whose turn it was. The peer hears of a stream with the first data, or
%% with the end. Owners get messages `{macula_dist_stream, StreamRef, Event}':
%% <dl>
%% <dt>`{data, Data, Fin}'</dt>
%% <dd>Data in its order, in pieces as they come. `Fin' is `true' when the peer has finished: no more data
%%     follows. `Data' may be empty then.</dd>
%% <dt>`passive'</dt>
%% <dd>The messages of `{active, N}' are spent, see {@link setopts/2}.</dd>
%% <dt>`closed'</dt>
%% <dd><em>Terminal.</em> Both ends have finished, and the peer has acknowledged all that was sent.</dd>
%% <dt>`{reset, Code}'</dt>
%% <dd><em>Terminal.</em> One of both ends has reset the stream. The code is 16#100 where nobody accepts
%%     streams, and 0 where the peer's owner has died.</dd>
%% <dt>`{closed, Reason}'</dt>
%% <dd><em>Terminal.</em> `noconnection': the link is gone. `internal_error': the engine has failed.</dd>
%% </dl>
%% Each owner gets one terminal event for each stream, and nothing after it. When the owner dies the stream is
%% reset, unless it was finished: then what was sent is still delivered.
%%
%% Senders wait while the peer does not read: {@link send/2} takes data until some are queued, then returns
%% when there is room. A stream that is read holds up to 3 MB at the receiver; those that are not read hold half a
%% kilobyte or a few each, and two megabytes more on a link.
%%
%% Functions that name a stream are for its owner alone; others get `{error, not_owner}'. Both nodes must know
%% these streams: with `-macula_dist_streams 0' a node takes part in none, and `{error, unsupported}' is the
%% answer at both ends.
-module(macula_dist_stream).

-export([open_stream/1, open_stream/2, accept_streams/1, accept_streams/2, stop_accepting/1,
         send/2, send/3, close_stream/1, reset_stream/1, reset_stream/2, setopts/2,
         controlling_process/2, list_streams/0, list_streams/1, get_controller/1, format_error/1]).
-export_type([stream_ref/0, active/0, option/0, stream_info/0, event/0, reason/0]).

-define(DEFAULT_PRIORITY, 128).
%% The largest code that QUIC can carry.
-define(MAX_CODE, 16#3fffffffffffffff).

-type stream_ref() :: {macula_dist_stream, node(), non_neg_integer()}.
%% The number is the same at both ends.

-type active() :: boolean() | once | -32768..32767.
%% As of `inet:setopts/2'. A number is added to what is left.

-type option() :: {priority, 16..255} | {active, active()} | {tag, atom()}.
%% `priority': streams with a lower number go first (128); those above 128 wait while bulk fills the line. `active': which data come as messages (`true').
%% `tag': what stands in messages and in the stream's name in place of `macula_dist_stream', for programs that
%% know such messages by another name.

-type event() :: {data, binary(), Fin :: boolean()} | passive | closed
               | {closed, noconnection | internal_error} | {reset, non_neg_integer()}.

-type stream_info() :: #{ref := stream_ref(), node := node(), stream_id := non_neg_integer(),
                         owner := pid(), priority := 16..255, recv_fin := boolean(),
                         send_fin := boolean()}.

-type reason() :: not_connected | unsupported | unknown_stream | not_owner | noproc | too_many
                | closed | {reset, non_neg_integer()} | badarg | einval
                | {bad_option, atom(), term()} | {unsupported_option, term()}.

%% @doc Opens a stream to a connected node. The caller owns it.
-spec open_stream(node()) -> {ok, stream_ref()} | {error, reason()}.
open_stream(Node) ->
    open_stream(Node, []).

%% @doc The same with options. `{error, too_many}' where the peer allows no more streams.
-spec open_stream(node(), [option()]) -> {ok, stream_ref()} | {error, reason()}.
open_stream(Node, Options) when is_atom(Node) ->
    case options(Options, [priority, active, tag]) of
        {ok, #{priority := Priority, active := Active, tag := Tag}} ->
            Ref = make_ref(),
            case macula_dist_nif:dist_stream_open(Node, Ref, Tag, Priority, Active) of
                ok ->
                    receive
                        {Ref, {ok, Number}} -> {ok, {Tag, Node, Number}};
                        {Ref, {error, closed}} -> {error, not_connected};
                        {Ref, {error, _} = Error} -> Error
                    end;
                Error ->
                    Error
            end;
        Error ->
            Error
    end;
open_stream(_Node, _Options) ->
    {error, badarg}.

%% @doc Makes the caller one of those that accept streams from a connected node. New streams go to each of them
%% in turn, and nobody is asked: the first data is the first the new owner hears of a stream. A process may call
%% this again. It ends with {@link stop_accepting/1}, with the process or with the link.
-spec accept_streams(node()) -> ok | {error, reason()}.
accept_streams(Node) ->
    accept_streams(Node, []).

%% @doc The same with the options of the streams, `active' and `tag'. The first data of a stream is told
%% in every mode, and counts as a message.
-spec accept_streams(node(), [{active, active()} | {tag, atom()}]) -> ok | {error, reason()}.
accept_streams(Node, Options) when is_atom(Node) ->
    case options(Options, [active, tag]) of
        {ok, #{active := Active, tag := Tag}} ->
            macula_dist_nif:dist_stream_accept(Node, Tag, Active);
        Error ->
            Error
    end;
accept_streams(_Node, _Options) ->
    {error, badarg}.

%% @doc The caller accepts no more streams from a node. It keeps those it has.
-spec stop_accepting(node()) -> ok | {error, reason()}.
stop_accepting(Node) when is_atom(Node) ->
    macula_dist_nif:dist_stream_stop_accepting(Node);
stop_accepting(_Node) ->
    {error, badarg}.

%% @doc Sends data. `ok' means queued; while too much is queued the caller waits.
-spec send(stream_ref(), iodata()) -> ok | {error, reason()}.
send(Stream, Data) ->
    send(Stream, Data, false).

%% @doc Sends data, and with `true' the end of what this side sends.
-spec send(stream_ref(), iodata(), Fin :: boolean()) -> ok | {error, reason()}.
send({_, Node, Number}, Data, Fin)
  when is_atom(Node), is_integer(Number), Number >= 0, is_boolean(Fin) ->
    try erlang:iolist_to_iovec(Data) of
        Binaries -> send_all(Node, Number, Binaries, Fin)
    catch
        error:badarg -> {error, badarg}
    end;
send(_Stream, _Data, _Fin) ->
    {error, badarg}.

%% Most calls find room: for them nothing is made that could be waited for.
send_all(Node, Number, Binaries, Fin) ->
    case macula_dist_nif:dist_stream_send(Node, Number, none, Binaries, Fin) of
        full -> send_with_room(Node, Number, Binaries, Fin);
        Result -> Result
    end.

send_with_room(Node, Number, Binaries, Fin) ->
    Ref = make_ref(),
    case macula_dist_nif:dist_stream_send(Node, Number, Ref, Binaries, Fin) of
        wait ->
            receive
                {Ref, {ok, _}} -> still_there(send_all(Node, Number, Binaries, Fin));
                {Ref, {error, _} = Error} -> Error
            end;
        Result ->
            Result
    end.

%% A stream that was there when the caller began to wait is not unknown.
still_there({error, unknown_stream}) -> {error, closed};
still_there(Result) -> Result.

%% @doc Finishes what this side sends. What is queued is still delivered, and what the peer sends still
%% comes. When both ends have finished the owner gets `closed'.
-spec close_stream(stream_ref()) -> ok | {error, reason()}.
close_stream(Stream) ->
    send(Stream, [], true).

%% @doc Resets a stream, with the code 0.
-spec reset_stream(stream_ref()) -> ok | {error, reason()}.
reset_stream(Stream) ->
    reset_stream(Stream, 0).

%% @doc Ends a stream in both directions at once. What is queued is not delivered. Both owners get
%% `{reset, Code}'.
-spec reset_stream(stream_ref(), ErrorCode :: non_neg_integer()) -> ok | {error, reason()}.
reset_stream({_, Node, Number}, Code)
  when is_atom(Node), is_integer(Number), Number >= 0, is_integer(Code), Code >= 0, Code =< ?MAX_CODE ->
    macula_dist_nif:dist_stream_reset(Node, Number, Code);
reset_stream(_Stream, _Code) ->
    {error, badarg}.

%% @doc Sets who gets what arrives: `{active, true}' all data as messages, `false' nothing, `once' one message,
%% and `N' so many more messages, after which the owner gets `passive'. What is not asked for holds the peer
%% back. A stream that is passive still tells its terminal event, except for `closed', which follows the end
%% of the data.
-spec setopts(stream_ref(), [{active, active()}]) -> ok | {error, reason()}.
setopts({_, Node, Number}, Options) when is_atom(Node), is_integer(Number), Number >= 0 ->
    case options(Options, [active]) of
        {ok, #{active := Active}} when Options =/= [] ->
            macula_dist_nif:dist_stream_set_active(Node, Number, Active);
        {ok, _} ->
            ok;
        Error ->
            Error
    end;
setopts(_Stream, _Options) ->
    {error, badarg}.

%% @doc Makes another process of this node the owner. Messages that wait in the caller's mailbox go along.
-spec controlling_process(stream_ref(), NewOwner :: pid()) -> ok | {error, reason()}.
controlling_process({_, Node, Number}, Pid)
  when is_atom(Node), is_integer(Number), Number >= 0, is_pid(Pid), node(Pid) =:= node() ->
    case macula_dist_nif:dist_stream_begin_transfer(Node, Number, Pid) of
        {ok, Tag, Handle} ->
            forward(Tag, {Tag, Node, Number}, Pid),
            macula_dist_nif:dist_stream_commit_transfer(Handle);
        Error ->
            Error
    end;
controlling_process(_Stream, _Pid) ->
    {error, badarg}.

%% Meanwhile the engine holds back what it has to say.
forward(_Tag, _Stream, Pid) when Pid =:= self() ->
    ok;
forward(Tag, Stream, Pid) ->
    receive
        {Tag, Stream, _} = Message ->
            Pid ! Message,
            forward(Tag, Stream, Pid)
    after 0 ->
        ok
    end.

%% @doc The streams to and from all connected nodes.
-spec list_streams() -> [stream_info()].
list_streams() ->
    lists:append([list_streams(Node) || Node <- nodes(connected)]).

%% @doc The streams to and from a node, whoever owns them.
-spec list_streams(node()) -> [stream_info()].
list_streams(Node) when is_atom(Node) ->
    [#{ref => Ref, node => Node, stream_id => Id, owner => Owner, priority => Priority,
       recv_fin => RecvFin, send_fin => SendFin}
     || {Ref, {Id, Owner, Priority}, RecvFin, SendFin} <- list_from(Node, 0)].

%% One call tells of some.
list_from(Node, From) ->
    case macula_dist_nif:dist_stream_list(Node, From) of
        [] ->
            [];
        Some ->
            {{_, _, Last}, _, _, _} = lists:last(Some),
            Some ++ list_from(Node, Last + 1)
    end.

%% @doc The process that is the controller of the link to a node.
-spec get_controller(node()) -> {ok, pid()} | {error, not_connected}.
get_controller(Node) ->
    case lists:keyfind(Node, 1, erlang:system_info(dist_ctrl)) of
        {Node, Controller} when is_pid(Controller) -> {ok, Controller};
        _ -> {error, not_connected}
    end.

%% @doc A sentence for a reason.
-spec format_error(reason() | {error, reason()}) -> string().
format_error({error, Reason}) -> format_error(Reason);
format_error(not_connected) -> "the node is not connected by macula";
format_error(unsupported) -> "one of both nodes takes part in no streams";
format_error(unknown_stream) -> "there is no such stream, or no longer";
format_error(not_owner) -> "another process owns the stream";
format_error(noproc) -> "the new owner is dead";
format_error(too_many) -> "the peer allows no more streams at a time";
format_error(closed) -> "this side of the stream is finished, or the stream is over";
format_error({reset, Code}) -> lists:flatten(io_lib:format("the stream was reset with code ~w", [Code]));
format_error(badarg) -> "an argument of the wrong type";
format_error(einval) -> "a count of messages that is out of range";
format_error({bad_option, Key, Why}) ->
    lists:flatten(io_lib:format("the value of the option ~tw must be ~ts", [Key, format_why(Why)]));
format_error({unsupported_option, Key}) ->
    lists:flatten(io_lib:format("there is no option ~0tp here", [Key]));
format_error(Other) ->
    lists:flatten(io_lib:format("~0tp", [Other])).

format_why({not_in, From, To}) -> io_lib:format("an integer from ~w to ~w", [From, To]);
format_why(not_an_atom) -> "an atom";
format_why(not_a_mode) -> "true, false, once or an integer from -32768 to 32767";
format_why(Other) -> io_lib:format("other than it is: ~0tp", [Other]).

%% --- options --------------------------------------------------------------------------------

options(Options, Known) when is_list(Options), length(Options) >= 0 ->
    Default = #{priority => ?DEFAULT_PRIORITY, active => true, tag => ?MODULE},
    read_options(Options, Known, Default);
options(_Options, _Known) ->
    {error, badarg}.

read_options([], _Known, Read) ->
    {ok, Read};
read_options([{Key, Value} | Rest], Known, Read) ->
    case lists:member(Key, Known) of
        true ->
            case check(Key, Value) of
                ok -> read_options(Rest, Known, Read#{Key := Value});
                Why -> {error, {bad_option, Key, Why}}
            end;
        false ->
            {error, {unsupported_option, Key}}
    end;
read_options([Other | _], _Known, _Read) ->
    {error, {unsupported_option, Other}}.

check(priority, P) when is_integer(P), P >= 16, P =< 255 -> ok;
check(priority, _) -> {not_in, 16, 255};
check(active, Mode) when is_boolean(Mode); Mode =:= once -> ok;
check(active, N) when is_integer(N), N >= -32768, N =< 32767 -> ok;
check(active, _) -> not_a_mode;
check(tag, Tag) when is_atom(Tag) -> ok;
check(tag, _) -> not_an_atom.
