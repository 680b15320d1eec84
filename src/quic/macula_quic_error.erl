%% @doc Errors in words.
%% @private
-module(macula_quic_error).

-export([format/1, code/1]).

%% @doc One line about an error or its reason.
-spec format(term()) -> string().
format(Error) ->
    try say(Error)
    %% Nobody's error: it looks like one of ours, and is not.
    catch _:_ -> text("~0tp", [Error])
    end.

%% @doc The number of what the transport has ended a connection for (RFC 9000, section 20.1, RFC 8446, section 6).
-spec code(term()) -> undefined | non_neg_integer().
code({tls_alert, Name}) ->
    case lists:keyfind(Name, 1, alerts()) of
        {Name, Alert} -> 16#100 + Alert;
        false -> undefined
    end;
code({Whose, Name, _Text}) when Whose =:= transport_close; Whose =:= transport_error ->
    case lists:keyfind(Name, 1, transport_codes()) of
        {Name, Code} -> Code;
        false -> undefined
    end;
code({alpn_mismatch, _Offered}) ->
    code({tls_alert, no_application_protocol});
code(_Reason) ->
    undefined.

transport_codes() ->
    [{no_error, 16#0}, {internal_error, 16#1}, {connection_refused, 16#2}, {flow_control_error, 16#3},
     {stream_limit_error, 16#4}, {stream_state_error, 16#5}, {final_size_error, 16#6},
     {frame_encoding_error, 16#7}, {transport_parameter_error, 16#8}, {connection_id_limit_error, 16#9},
     {protocol_violation, 16#a}, {invalid_token, 16#b}, {application_error, 16#c},
     {crypto_buffer_exceeded, 16#d}, {key_update_error, 16#e}, {aead_limit_reached, 16#f}, {no_viable_path, 16#10}].

alerts() ->
    [{close_notify, 0}, {unexpected_message, 10}, {bad_record_mac, 20}, {record_overflow, 22},
     {handshake_failure, 40}, {bad_certificate, 42}, {unsupported_certificate, 43}, {certificate_revoked, 44},
     {certificate_expired, 45}, {certificate_unknown, 46}, {illegal_parameter, 47}, {unknown_ca, 48},
     {access_denied, 49}, {decode_error, 50}, {decrypt_error, 51}, {protocol_version, 70},
     {insufficient_security, 71}, {internal_error, 80}, {inappropriate_fallback, 86}, {user_canceled, 90},
     {missing_extension, 109}, {unsupported_extension, 110}, {unrecognized_name, 112},
     {bad_certificate_status_response, 113}, {unknown_psk_identity, 115}, {certificate_required, 116},
     {no_application_protocol, 120}].

say({error, Reason}) -> say(Reason);
say({bad_option, Key, Why}) -> text("bad option ~0tp: ~ts", [Key, option_why(Why)]);
say({unsupported_option, Key}) -> text("option ~0tp is not supported~ts", [Key, explain(Key)]);
say({bad_callback, Module, {missing, Missing}}) ->
    text("the callback module ~0tp does not export ~ts", [Module, functions(Missing)]);
say({bad_callback, Module, Why}) ->
    text("~0tp cannot be used as a callback module: ~ts", [Module, word(Why)]);
say({bad_certfile, File, Why}) -> file("certificate", File, Why);
say({bad_keyfile, File, Why}) -> file("private key", File, Why);
say({bad_cacertfile, File, Why}) -> file("trusted certificates", File, Why);
say({bad_sni_host, Host, Why}) -> text("for the host ~ts: ~ts", [Host, say(Why)]);
say({bad_cert, Why}) -> text("the certificate was refused: ~ts", [word(Why)]);
say({bad_key, Why}) -> text("the private key cannot be used: ~ts", [word(Why)]);
say({bad_san, Place}) -> text("name ~0tp of the list is neither a host name nor an IP address", [Place]);
say({tls_alert, Name}) -> text("TLS alert: ~ts", [word(Name)]);
say({alpn_mismatch, Offered}) ->
    text("the server speaks none of the application protocols offered: ~0tp", [Offered]);
say({application_close, Code, Reason}) ->
    text("closed by the peer's application with code ~b: ~ts", [Code, words(Reason)]);
say({transport_close, Name, Reason}) ->
    text("closed by the peer's transport: ~ts: ~ts", [word(Name), words(Reason)]);
say({transport_error, Name, Reason}) ->
    text("transport error: ~ts: ~ts", [word(Name), words(Reason)]);
say({start_stream, Why}) -> text("the stream could not be opened: ~ts", [say(Why)]);
say({reset, Code}) -> text("the peer reset the stream with code ~b", [Code]);
say({connection_lost, Why}) -> text("the connection was lost: ~ts", [say(Why)]);
say({stopped, Code}) -> text("the peer stopped reading the stream with code ~b", [Code]);
say(badarg) -> "not a handle of this kind, or one that was collected";
say(busy) -> "more than the high-water mark is queued";
say(closed) -> "closed";
say(stopped) -> "this side has stopped reading the stream";
say(timeout) -> "timed out";
say(reset) -> "the peer has forgotten the connection (stateless reset)";
say(not_owner) -> "the calling process does not own the handle";
say(noproc) -> "no such process";
say(connection_refused) -> "the server refused the connection";
say(version_mismatch) -> "the peer speaks no version of QUIC that we do";
say(cids_exhausted) -> "no connection id is left";
say(bad_server_name) -> "the server name is no host name";
say(not_a_client) -> "the server's side of a connection does not move";
say(no_peercert) -> "the peer showed no certificate";
say(protocol_not_negotiated) -> "no application protocol was negotiated";
say(no_path_mtu) -> "the peer takes no datagrams";
say(key_mismatch) -> "the private key does not belong to the public key";
say(unsupported) -> "the peer does not support it";
say(early_data_rejected) -> "the server has not read what was sent before the handshake was done";
say(disabled) -> "disabled by an option";
say(internal_error) -> "internal error";
say(nif_panicked) -> "internal error in a native function";
say(Posix) when is_atom(Posix) ->
    case inet:format_error(Posix) of
        "unknown POSIX error" ++ _ -> word(Posix);
        Words -> lists:flatten(Words)
    end;
say(Other) -> text("~0tp", [Other]).

option_why({wanted, Type}) -> text("wanted: ~ts", [macula_quic_option_value:words(Type)]);
option_why({contradicts, Other}) -> text("it contradicts ~0tp", [Other]);
option_why({needs, Other}) -> text("it needs ~0tp", [Other]);
option_why({excludes, Other}) -> text("it excludes ~0tp", [Other]);
option_why({must_be_below, Other}) -> text("it must be below ~0tp", [Other]);
option_why({must_not_be_below, Other}) -> text("it must not be below ~0tp", [Other]);
option_why({bad_san, _} = Why) -> say(Why);
option_why(missing) -> "it is missing";
option_why(unknown) -> "there is no such option";
option_why(Why) -> words(Why).

explain(Key) ->
    case macula_quic_option_table:explain(Key) of
        {ok, Why, Instead} -> text(": ~ts; there is ~ts", [Why, Instead]);
        error -> ""
    end.

functions(Functions) ->
    lists:join(", ", [text("~tw/~b", [Name, Arity]) || {Name, Arity} <- Functions]).

file(What, Source, Why) when is_atom(Source) ->
    text("no usable ~ts in the ~ts given: ~ts", [What, Source, file_why(Why)]);
file(What, Source, Why) ->
    text("no usable ~ts in ~ts: ~ts", [What, Source, file_why(Why)]).

file_why(no_certificate) -> "it holds no certificate";
file_why(no_key) -> "it holds no private key";
file_why(no_password) -> "the key is encrypted, and there is no password";
file_why(unsupported_encryption) -> "the key is encrypted in a way that OTP cannot undo";
file_why(bad_password) -> "the password does not open the key";
file_why(Posix) -> file:format_error(Posix).

word(Atom) when is_atom(Atom) ->
    [case C of $_ -> $\s; _ -> C end || C <- atom_to_list(Atom)];
word(Other) ->
    text("~0tp", [Other]).

words(Text) when is_binary(Text) -> Text;
words(Text) when is_list(Text) ->
    case io_lib:char_list(Text) of
        true -> Text;
        false -> text("~0tp", [Text])
    end;
words(Other) -> word(Other).

text(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).
