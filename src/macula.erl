%% @doc For people at a shell: what macula does in this VM, and what may be wrong with it.
%%
%% ```
%% (b@127.0.0.1)1> macula:status().
%% macula 0.1.0 on OTP 25
%% distribution of b@127.0.0.1 over macula, UDP port 47760, 1 link
%%   a@127.0.0.1 at 127.0.0.1:4433: round trip 0.32 ms, MTU 32000, in 641 B, out 841 B, queued 0 B, held 0
%% macula_quic: 0 listeners, 0 connections, 0 streams
%% macula_peering: 0 links
%% ok
%% (b@127.0.0.1)2> macula:doctor('c@127.0.0.1').
%% error: nobody knows an address of c@127.0.0.1 (not_registered)
%% [{error,{unknown_node,'c@127.0.0.1',not_registered}}]
%% '''
-module(macula).

-export([status/0, doctor/0, doctor/1, format_finding/1]).

-export_type([finding/0]).

-type finding() :: {error | warning, term()}.
%% What {@link doctor/0} and {@link doctor/1} find. An error keeps something from working. `format_finding/1' has
%% words for each:
%% <ul>
%% <li>`{error, {native_library, Reason}}': the library could not be loaded.</li>
%% <li>`{error, proto_dist_given_twice}': OTP does not heed the flag, see `macula_dist:check_start_flags/0'.</li>
%% <li>`{error, {unknown_node, Node, Reason}}': the name leads to no address. Of this node, too: others may not find it.</li>
%% <li>`{error, {no_answer, Node, Addresses, Reason}}': no address answers QUIC.</li>
%% <li>`{error, {refused, Node, Reason}}': the node there is another one, has another cookie, or no room.</li>
%% <li>`{error, {handshake_failed, Node}}': OTP's handshake has failed, though the node answers and has the cookie:
%% for instance because another node with this node's name is connected there.</li>
%% <li>`{error, not_alive}', of `doctor/1': this VM is no node.</li>
%% <li>`{error, {no_socket, Reason}}': the system gives this VM no UDP socket, with `emfile' for want of descriptors.</li>
%% <li>`{warning, {other_carrier, Node}}': the distribution of this node is not over macula. Of `doctor/1' an
%% error.</li>
%% <li>`{warning, short_cookie}': a cookie of fewer than 16 characters can be guessed.</li>
%% <li>`{warning, {udp_buffer, Bytes}}': the system limits the buffers of UDP sockets to so many bytes, and bursts of
%% datagrams may be lost. macula asks for 4 MB.</li>
%% </ul>

%% @doc Prints what macula does in this VM: links of the distribution, listeners, connections and streams of
%% `macula_quic', and links of peering. It asks nothing of any peer. The figures of a link are those of
%% `macula_dist:info/1': `held' is how often a sender had to wait (`senders_held').
-spec status() -> ok.
status() ->
    io:put_chars(macula_status:lines()).

%% @doc Looks for what is wrong with macula in this VM, prints what is found, and returns it: `[]' when nothing is.
%% It takes no longer than a name's lookup, 2 seconds at most.
-spec doctor() -> [finding()].
doctor() ->
    tell("nothing is wrong here", macula_doctor:here()).

%% @doc Finds out why a node is not connected: whether its name leads to an address, whether a node answers there,
%% and whether both have the same cookie. It prints what is found, and returns it: `[]' when the node is connected. It
%% tries to connect as `net_kernel:connect_node/1' does. Where nothing answers it takes a few
%% times the set-up time of the distribution (7 seconds, `net_setuptime').
-spec doctor(node()) -> [finding()].
doctor(Node) when is_atom(Node) ->
    tell(io_lib:format("~ts is connected", [Node]), macula_doctor:peer(Node)).

%% @doc A sentence for what {@link doctor/0} or {@link doctor/1} has found.
-spec format_finding(finding()) -> string().
format_finding({Level, What}) ->
    unicode:characters_to_list([atom_to_list(Level), ": ", macula_doctor:format(What)]).

tell(Well, []) ->
    io:put_chars([Well, "\n"]),
    [];
tell(_Well, Findings) ->
    lists:foreach(fun(Finding) -> io:put_chars([format_finding(Finding), "\n"]) end, Findings),
    Findings.
