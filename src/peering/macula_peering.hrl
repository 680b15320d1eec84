%% What a connection may cost before its peer is known, and what a handshake frame may measure.
-define(HANDSHAKE_BYTES, 65536).
%% How long the message that tells why a connection has ended may take.
-define(LAST_WORD, 1_000).
%% The last message of a connection.
-define(IS_END(What), (What =:= shutdown orelse What =:= transport_shutdown orelse What =:= closed)).
