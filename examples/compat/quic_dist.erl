%% @doc The names of `quic_dist' for programs that were written for it: a thin face of {@link macula_dist} and
%% {@link macula_dist_stream}.
%%
%% Copy this module into your own application. It is no part of macula's: there it would clash with the module
%% of the same name of the package `quic'. Messages are `{quic_dist_stream, StreamRef, Event}', streams are
%% `{quic_dist_stream, Node, Number}'. One event is not among those of `quic_dist': `{closed, Reason}', once for
%% each stream, when the link is gone.
%%
%% Start the node with `-proto_dist macula', or, where start lines must stay, with `-proto_dist quic': then the
%% callbacks here pass on to macula's.
-module(quic_dist).

%% What net_kernel calls.
-export([listen/1, listen/2, accept/1, accept_connection/5, setup/5, close/1, select/1, address/0,
         childspecs/0, is_node_name/1, splitname/1, setopts/2, getopts/2]).
-export([open_stream/1, open_stream/2, accept_streams/1, stop_accepting/1, send/2, send/3, close_stream/1,
         reset_stream/1, reset_stream/2, controlling_process/2, list_streams/0, list_streams/1,
         get_controller/1]).
-export_type([stream_ref/0, stream_opt/0, stream_info/0]).

-include_lib("kernel/include/net_address.hrl").

-define(TAG, quic_dist_stream).

-type stream_ref() :: {quic_dist_stream, node(), non_neg_integer()}.
-type stream_opt() :: {priority, 16..255}.
-type stream_info() :: #{ref => stream_ref(), node => node(), stream_id => non_neg_integer(),
                         owner => pid(), priority => 16..255, recv_fin => boolean(),
                         send_fin => boolean()}.

%% --- the carrier ----------------------------------------------------------------------------

%% @doc Starts listening for nodes.
-spec listen(atom()) -> {ok, {term(), #net_address{}, non_neg_integer()}} | {error, term()}.
listen(Name) -> macula_dist:listen(Name).

%% @doc The same at a host, or with options, of which macula takes none: it reads the command line.
-spec listen(atom(), string() | map()) ->
          {ok, {term(), #net_address{}, non_neg_integer()}} | {error, term()}.
listen(Name, Options) when is_map(Options) -> macula_dist:listen(Name);
listen(Name, Host) -> macula_dist:listen(Name, Host).

%% @doc Starts the process that takes what arrives at the port.
-spec accept(term()) -> pid().
accept(Listen) -> macula_dist:accept(Listen).

%% @doc Starts the process that does OTP's handshake with a node that has dialled.
-spec accept_connection(pid(), term(), node(), term(), non_neg_integer()) -> pid().
accept_connection(AcceptPid, Socket, MyNode, Allowed, SetupTime) ->
    macula_dist:accept_connection(AcceptPid, Socket, MyNode, Allowed, SetupTime).

%% @doc Starts the process that dials a node.
-spec setup(node(), atom(), node(), shortnames | longnames, non_neg_integer()) -> pid().
setup(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    macula_dist:setup(Node, Type, MyNode, LongOrShortNames, SetupTime).

%% @doc Stops listening.
-spec close(term()) -> ok.
close(Listen) -> macula_dist:close(Listen).

%% @doc Whether a node can be reached so.
-spec select(node()) -> boolean().
select(Node) -> macula_dist:select(Node).

%% @doc The address family.
-spec address() -> #net_address{}.
address() -> macula_dist:address().

%% @doc What runs beside net_kernel.
-spec childspecs() -> {ok, [supervisor:child_spec()]}.
childspecs() -> macula_dist:childspecs().

%% @doc Whether a term is the name of a node.
-spec is_node_name(term()) -> boolean().
is_node_name(Node) -> macula_dist:is_node_name(Node).

%% @doc The port in a node's name.
-spec splitname(atom() | string()) -> term().
splitname(Name) -> macula_dist:splitname(Name).

%% @doc Sets options of the listening port.
-spec setopts(term(), [term()]) -> ok | {error, term()}.
setopts(Listen, Options) -> macula_dist:setopts(Listen, Options).

%% @doc Reads options of the listening port.
-spec getopts(term(), [term()]) -> {ok, [term()]} | {error, term()}.
getopts(Listen, Options) -> macula_dist:getopts(Listen, Options).

%% --- streams --------------------------------------------------------------------------------

%% @doc Opens a stream to a connected node. The caller owns it.
-spec open_stream(node()) -> {ok, stream_ref()} | {error, term()}.
open_stream(Node) -> open_stream(Node, []).

%% @doc The same with options.
-spec open_stream(node(), [stream_opt()]) -> {ok, stream_ref()} | {error, term()}.
open_stream(Node, Options) ->
    macula_dist_stream:open_stream(Node, [{tag, ?TAG} | Options]).

%% @doc Makes the caller one of those that accept streams from a node, each in turn.
-spec accept_streams(node()) -> ok | {error, term()}.
accept_streams(Node) -> macula_dist_stream:accept_streams(Node, [{tag, ?TAG}]).

%% @doc The caller accepts no more streams from a node.
-spec stop_accepting(node()) -> ok | {error, term()}.
stop_accepting(Node) -> macula_dist_stream:stop_accepting(Node).

%% @doc Sends data.
-spec send(stream_ref(), iodata()) -> ok | {error, term()}.
send(Stream, Data) -> macula_dist_stream:send(Stream, Data).

%% @doc Sends data, and with `true' the end.
-spec send(stream_ref(), iodata(), boolean()) -> ok | {error, term()}.
send(Stream, Data, Fin) -> macula_dist_stream:send(Stream, Data, Fin).

%% @doc Finishes what this side sends.
-spec close_stream(stream_ref()) -> ok | {error, term()}.
close_stream(Stream) -> macula_dist_stream:close_stream(Stream).

%% @doc Resets a stream, with the code 0.
-spec reset_stream(stream_ref()) -> ok | {error, term()}.
reset_stream(Stream) -> macula_dist_stream:reset_stream(Stream).

%% @doc Ends a stream at once.
-spec reset_stream(stream_ref(), non_neg_integer()) -> ok | {error, term()}.
reset_stream(Stream, Code) -> macula_dist_stream:reset_stream(Stream, Code).

%% @doc Makes another process the owner.
-spec controlling_process(stream_ref(), pid()) -> ok | {error, term()}.
controlling_process(Stream, Pid) -> macula_dist_stream:controlling_process(Stream, Pid).

%% @doc The streams to and from all connected nodes.
-spec list_streams() -> [stream_info()].
list_streams() -> [named(Info) || Info <- macula_dist_stream:list_streams()].

%% @doc The streams to and from a node.
-spec list_streams(node()) -> [stream_info()].
list_streams(Node) -> [named(Info) || Info <- macula_dist_stream:list_streams(Node)].

named(#{ref := {_, Node, Number}} = Info) -> Info#{ref := {?TAG, Node, Number}}.

%% @doc The process that is the controller of the link to a node.
-spec get_controller(node()) -> {ok, pid()} | {error, not_connected}.
get_controller(Node) -> macula_dist_stream:get_controller(Node).
