-module(macula_quic_error_tests).

-include_lib("eunit/include/eunit.hrl").

transport_errors_have_the_numbers_of_their_rfc_test() ->
    [?assertEqual({Reason, Number}, {Reason, macula_quic_error:code(Reason)})
     || {Reason, Number} <- [{{transport_close, no_error, <<>>}, 0},
                             {{transport_close, connection_refused, <<>>}, 2},
                             {{transport_error, protocol_violation, <<"why">>}, 10},
                             {{transport_error, no_viable_path, <<>>}, 16},
                             {{tls_alert, close_notify}, 16#100},
                             {{tls_alert, bad_certificate}, 16#12a},
                             {{alpn_mismatch, ["h3"]}, 16#178}]].

other_reasons_have_none_test() ->
    [?assertEqual(undefined, macula_quic_error:code(Reason))
     || Reason <- [timeout, reset, internal_error, {transport_error, unknown, <<>>}, {tls_alert, unknown},
                   {bad_cert, unknown_ca}]].
