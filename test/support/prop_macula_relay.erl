%% The relay takes no option that it would not honour.
-module(prop_macula_relay).

-include("macula_proper.hrl").

-export([prop_wrong_options_are_named/0, prop_a_lossless_relay_delivers_all_in_order/0]).

prop_wrong_options_are_named() ->
    ?FORALL({Key, Value}, {oneof([atom(), any(), elements([loss, delay_ms, rate, queue, largest, listen])]),
                           any()},
        case macula_relay:start_link(#{target => {{127, 0, 0, 1}, 9}, Key => Value}) of
            {ok, Relay} ->
                ok = macula_relay:stop(Relay),
                lists:member(Key, [loss, delay_ms, rate, queue, largest]);
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
            %% The kernel keeps only so many bytes for a socket that is not read.
            Send = fun(Data) -> ok = gen_udp:send(Client, Local, To, Data) end,
            Got = pass(Send, Server, Sent, 0),
            ok = macula_relay:stop(Relay),
            ok = gen_udp:close(Client),
            ok = gen_udp:close(Server),
            equals(Sent, Got)
        end).

%% At most eight under way.
pass(_Send, _Server, [], 0) ->
    [];
pass(Send, Server, [Data | Rest], UnderWay) when UnderWay < 8 ->
    Send(Data),
    pass(Send, Server, Rest, UnderWay + 1);
pass(Send, Server, Left, UnderWay) ->
    {ok, {_, _, Data}} = gen_udp:recv(Server, 0, 5000),
    [Data | pass(Send, Server, Left, UnderWay - 1)].
