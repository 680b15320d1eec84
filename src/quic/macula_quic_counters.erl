%% @private What is counted, with its kind and what it means: the one table, for those who show it.
-module(macula_quic_counters).

-export([all/0, all/1]).

%% @doc Of this VM.
-spec all() -> [macula_quic:counter()].
all() ->
    Live = maps:from_list(macula_nif:live_objects()),
    {Files, Records} = macula_nif:qlog_failures(),
    Values = #{listeners => maps:get(listener, Live), connections => maps:get(connection, Live),
               streams => maps:get(stream, Live), qlog_failed_files => Files,
               qlog_lost_records => Records},
    [counter(Row, Values) || Row <- vm()].

%% @doc Of a connection, with these values.
-spec all(#{atom() => non_neg_integer()}) -> [macula_quic:counter()].
all(Values) ->
    [counter(Row, Values) || Row <- connection()].

counter({Name, Type, Help}, Values) ->
    #{name => Name, type => Type, help => Help, value => maps:get(Name, Values)}.

vm() ->
    [{listeners, gauge, "listeners that live"},
     {connections, gauge, "connections that live, also those that are over while a handle is left"},
     {streams, gauge, "streams that live, also those that are over while a handle is left"},
     {qlog_failed_files, counter, "files of qlog_dir that could not be written"},
     {qlog_lost_records, counter, "records of qlog_dir that found no file, or no room before it was written"}].

%% Those of getstat/1.
connection() ->
    [{recv_oct, counter, "bytes of UDP payload received"},
     {recv_cnt, counter, "UDP datagrams received"},
     {recv_avg, gauge, "mean size of the UDP datagrams received, in bytes"},
     {recv_max, gauge, "0: nobody counts it"},
     {recv_dvi, gauge, "0: nobody counts it"},
     {recv_syscalls, counter, "calls of the system by which datagrams were received, as Quinn counts them"},
     {send_oct, counter, "bytes of UDP payload sent"},
     {send_cnt, counter, "UDP datagrams sent"},
     {send_avg, gauge, "mean size of the UDP datagrams sent, in bytes"},
     {send_max, gauge, "0: nobody counts it"},
     {send_pend, gauge, "bytes queued natively, on all streams"},
     {sent_syscalls, counter, "calls of the system by which datagrams were sent"},
     {sent_packets, counter, "QUIC packets sent"},
     {lost_packets, counter, "QUIC packets sent that were lost"},
     {lost_bytes, counter, "bytes of the QUIC packets that were lost"},
     {congestion_events, counter, "times the congestion window was reduced"},
     {black_holes, counter, "times the path was found to take no datagrams of the size it took before"},
     {mtu_probes_sent, counter, "probes for a larger path MTU"},
     {mtu_probes_lost, counter, "probes for a larger path MTU that were lost"},
     {rtt, gauge, "round trip, in microseconds"},
     {min_rtt, gauge, "shortest round trip so far, in microseconds"},
     {cwnd, gauge, "congestion window, in bytes"},
     {mtu, gauge, "bytes of UDP payload that the path is known to take"},
     {streams, gauge, "streams open here"},
     {sent_acks, counter, "ACK frames sent"},
     {recv_acks, counter, "ACK frames received"},
     {sent_stream_frames, counter, "STREAM frames sent"},
     {recv_stream_frames, counter, "STREAM frames received"},
     {sent_resets, counter, "RESET_STREAM frames sent"},
     {recv_resets, counter, "RESET_STREAM frames received"},
     {sent_datagrams, counter, "DATAGRAM frames sent"},
     {recv_datagrams, counter, "DATAGRAM frames received"},
     {dropped_datagrams, counter, "datagrams that the path no longer took when their turn came, or that made room for newer ones"}].
