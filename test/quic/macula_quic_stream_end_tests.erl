%% The end of a stream reaches its owner whenever that one begins to listen for it.
-module(macula_quic_stream_end_tests).

-include_lib("eunit/include/eunit.hrl").

an_end_that_came_while_passive_is_told_when_active_test_() ->
    {timeout, 60, fun an_end_that_came_while_passive_is_told_when_active/0}.

an_end_that_came_while_passive_is_told_when_active() ->
    Pub = crypto:strong_rand_bytes(32),
    {ok, Id} = macula_identity:from_seed(Pub),
    {ok, {Cert, Key}} = macula_quic:generate_self_signed_cert(macula_identity:public(Id), Pub, []),
    {ok, L} = macula_quic:listen("127.0.0.1", 0, [{cert, Cert}, {key, Key}]),
    {ok, {_, Port}} = macula_quic:sockname(L),
    {ok, C} = macula_quic:connect("127.0.0.1", Port, [{verify, verify_none}], 5000),
    {ok, S} = macula_quic:accept(L, 5000),
    [begin
        {ok, Out} = macula_quic:open_stream(C),
        ok = macula_quic:send(Out, <<"last">>, #{fin => true}),
        {ok, In} = macula_quic:accept_stream(S, #{active => once}, 5000),
        receive {quic, <<"last">>, In, _} -> ok after 5000 -> error(no_data) end,
        %% Now it is passive; the end is known there now or a moment later.
        busy(Micros),
        ok = macula_quic:setopt(In, active, Mode),
        receive {quic, peer_send_shutdown, In, undefined} -> ok after 5000 -> error(no_end) end,
        ok = macula_quic:setopt(In, active, once),
        receive {quic, peer_send_shutdown, In, undefined} -> error(twice) after 0 -> ok end,
        ok = macula_quic:close_stream(Out)
     end || Micros <- [0, 50, 200, 1000, 10000], Mode <- [once, 5, true]],
    ok = macula_quic:close_connection(C),
    ok = macula_quic:close_connection(S),
    ok = macula_quic:close_listener(L).

busy(Micros) ->
    Until = erlang:monotonic_time(microsecond) + Micros,
    (fun Spin() -> erlang:monotonic_time(microsecond) >= Until orelse Spin() end)().
