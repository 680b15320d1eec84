%% The relay takes no option that it would not honour.
-module(prop_macula_relay).

-include("macula_proper.hrl").

-export([prop_wrong_options_are_named/0, prop_a_lossless_relay_delivers_all_in_order/0,
         prop_a_relay_with_jitter_delivers_all_as_often_as_it_says/0]).

-define(TAKEN, [loss, duplicate, delay_ms, jitter_ms, rate, queue, largest]).

prop_wrong_options_are_named() ->
    ?FORALL({Key, Value}, {oneof([atom(), any(), elements([listen | ?TAKEN])]),
                           any()},
        case macula_relay:start_link(#{target => {{127, 0, 0, 1}, 9}, Key => Value}) of
            {ok, Relay} ->
                ok = macula_relay:stop(Relay),
                lists:member(Key, ?TAKEN);
            {error, {bad_option, Key, _}} ->
                true
        end).

prop_a_lossless_relay_delivers_all_in_order() ->
    ?FORALL({Sizes, Delay, Rate}, {list(range(0, 20000)), range(0, 3), oneof([infinity, 50000000])},
        begin
            {Sent, Got} = through(#{delay_ms => Delay, rate => Rate}, Sizes, 1),
            equals(Sent, Got)
        end).

prop_a_relay_with_jitter_delivers_all_as_often_as_it_says() ->
    ?FORALL({Sizes, Delay, Jitter, Twice}, {list(range(0, 20000)), range(0, 3), range(0, 3), range(0, 1)},
        begin
            {Sent, Got} = through(#{delay_ms => Delay, jitter_ms => Jitter, duplicate => Twice}, Sizes,
                                  1 + Twice),
            equals(lists:sort(lists:append(lists:duplicate(1 + Twice, Sent))), lists:sort(Got))
        end).

%% What was sent, and what came, of which there are so many copies.
through(Options, Sizes, Copies) ->
    Local = {127, 0, 0, 1},
    {ok, Server} = gen_udp:open(0, [binary, {active, false}, {ip, Local},
                                    {recbuf, 4000000}, {buffer, 65536}]),
    {ok, Port} = inet:port(Server),
    {ok, Relay} = macula_relay:start_link(Options#{target => {Local, Port}, queue => 10000000}),
    {ok, Client} = gen_udp:open(0, [binary, {ip, Local}]),
    To = macula_relay:port(Relay),
    Sent = [rand:bytes(Size) || Size <- Sizes],
    %% The kernel keeps only so many bytes for a socket that is not read.
    Send = fun(Data) -> ok = gen_udp:send(Client, Local, To, Data) end,
    Got = pass(Send, Server, Sent, Copies, 0),
    ok = macula_relay:stop(Relay),
    ok = gen_udp:close(Client),
    ok = gen_udp:close(Server),
    {Sent, Got}.

%% At most eight under way.
pass(_Send, _Server, [], _Copies, 0) ->
    [];
pass(Send, Server, [Data | Rest], Copies, UnderWay) when UnderWay < 8 ->
    Send(Data),
    pass(Send, Server, Rest, Copies, UnderWay + Copies);
pass(Send, Server, Left, Copies, UnderWay) ->
    {ok, {_, _, Data}} = gen_udp:recv(Server, 0, 5000),
    [Data | pass(Send, Server, Left, Copies, UnderWay - 1)].
