%% The relay takes no option that it would not honour.
-module(prop_macula_relay).

-include("macula_proper.hrl").

-export([prop_wrong_options_are_named/0, prop_a_lossless_relay_delivers_all_in_order/0]).

prop_wrong_options_are_named() ->
    ?FORALL({Key, Value}, {oneof([atom(), any(), elements([loss, delay_ms, rate, queue, listen])]),
                           any()},
        case macula_relay:start_link(#{target => {{127, 0, 0, 1}, 9}, Key => Value}) of
            {ok, Relay} ->
                ok = macula_relay:stop(Relay),
                lists:member(Key, [loss, delay_ms, rate, queue]);
            {error, {bad_option, Key, _}} ->
                true
        end).

prop_a_lossless_relay_delivers_all_in_order() ->
    ?FORALL({Sizes, Delay, Rate}, {list(range(0, 20000)), range(0, 3), oneof([infinity, 50000000])},
        begin
            Local = {127, 0, 0, 1},
            {ok, Server} = gen_udp:open(0, [binary, {active, false}, {ip, Local},
                                            {recbuf, 4000000}, {buffer, 65536}]),
            {ok, Port} = inet:port(Server),
            {ok, Relay} = macula_relay:start_link(#{
                target => {Local, Port}, delay_ms => Delay, rate => Rate, queue => 10000000}),
            {ok, Client} = gen_udp:open(0, [binary, {ip, Local}]),
            To = macula_relay:port(Relay),
            Sent = [rand:bytes(Size) || Size <- Sizes],
            lists:foreach(fun(Data) -> ok = gen_udp:send(Client, Local, To, Data) end, Sent),
            Got = [element(3, element(2, {ok, _} = gen_udp:recv(Server, 0, 5000))) || _ <- Sent],
            ok = macula_relay:stop(Relay),
            ok = gen_udp:close(Client),
            ok = gen_udp:close(Server),
            equals(Sent, Got)
        end).
