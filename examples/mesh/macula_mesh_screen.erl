%% @doc What is seen of the mesh: who is linked to whom, the latencies, the frames, what happens.
%% On a terminal this is one picture of at most 80 columns and 24 lines, drawn again as it changes;
%% into a pipe goes a line for everything that happens.
-module(macula_mesh_screen).

-export([start/1, stop/2, watch/2, nodes/1, step/2, say/2, table/1, median/1]).

-define(DRAW_MS, 200).
-define(WIDTH, 80).
-define(LOG_LINES, 11).

-record(screen, {
    terminal :: boolean(),
    colour :: boolean(),
    began :: integer(),
    nodes = #{} :: #{string() => macula_test_nodes:test_node()},
    names = [] :: [string()],
    views = #{} :: #{string() => macula_mesh_station:view() | gone},
    %% Frames received by each, and when: for the rate.
    rates = #{} :: #{string() => {integer(), non_neg_integer(), float()}},
    cursors = #{} :: #{string() => non_neg_integer()},
    step = 0 :: non_neg_integer(),
    title = "" :: iodata(),
    log = [] :: [iodata()],
    drawn = 0 :: non_neg_integer()
}).

%% @doc `terminal' or `pipe'.
-spec start(string()) -> pid().
start(Output) ->
    Terminal = Output =:= "terminal",
    Screen = #screen{terminal = Terminal, colour = Terminal andalso os:getenv("NO_COLOR") =:= false,
                     began = os:system_time(microsecond)},
    spawn_link(fun() ->
        Terminal andalso io:put_chars("\e[?25l"),
        loop(Screen)
    end).

%% @doc Draws for the last time, with the outcome.
-spec stop(pid(), iodata()) -> ok.
stop(Screen, Outcome) -> ask(Screen, {stop, Outcome}).

%% @doc The VMs to be watched from now on.
-spec watch(pid(), #{string() => macula_test_nodes:test_node()}) -> ok.
watch(Screen, Nodes) -> ask(Screen, {watch, Nodes}).

%% @doc The VMs watched.
-spec nodes(pid()) -> #{string() => macula_test_nodes:test_node()}.
nodes(Screen) -> ask(Screen, nodes).

-spec step(pid(), iodata()) -> ok.
step(Screen, Text) -> ask(Screen, {step, Text}).

-spec say(pid(), iodata()) -> ok.
say(Screen, Text) -> ask(Screen, {say, Text}).

%% @doc Into a pipe the table goes only when asked for.
-spec table(pid()) -> ok.
table(Screen) -> ask(Screen, table).

-spec median([number()]) -> number().
median(Values) -> lists:nth((length(Values) + 1) div 2, lists:sort(Values)).

ask(Screen, Request) ->
    Ref = monitor(process, Screen),
    Screen ! {Request, self(), Ref},
    receive
        {Ref, Answer} -> demonitor(Ref, [flush]), Answer;
        {'DOWN', Ref, process, Screen, Reason} -> exit({screen, Reason})
    end.

loop(Screen) ->
    receive
        {Request, From, Ref} ->
            {Answer, Next} = handle(Request, Screen),
            From ! {Ref, Answer},
            loop(Next)
    after ?DRAW_MS ->
        loop(draw(poll(Screen)))
    end.

handle(nodes, Screen) ->
    {Screen#screen.nodes, Screen};
handle({watch, Nodes}, #screen{names = Names, views = Views, cursors = Cursors} = Screen) ->
    New = maps:keys(Nodes) -- maps:keys(Screen#screen.nodes),
    Gone = maps:keys(Screen#screen.nodes) -- maps:keys(Nodes),
    {ok, Screen#screen{nodes = Nodes, names = lists:usort(Names ++ New),
                       views = maps:merge(Views, maps:from_keys(Gone, gone)),
                       cursors = maps:without(New, Cursors)}};
handle({step, Text}, #screen{step = N} = Screen) ->
    Title = io_lib:format("~b. ~ts", [N + 1, Text]),
    Next = Screen#screen{step = N + 1, title = Title},
    {ok, draw(line(bold(Title, Next), poll(Next)))};
handle({say, Text}, Screen) ->
    %% What led to it comes before it.
    {ok, draw(line(["   ", Text], poll(Screen)))};
handle(table, #screen{terminal = true} = Screen) ->
    {ok, Screen};
handle(table, Screen) ->
    Polled = poll(Screen),
    io:put_chars([[Row, $\n] || Row <- rows(Polled)]),
    {ok, Polled};
handle({stop, Outcome}, #screen{title = Title} = Screen) ->
    Last = draw(poll(Screen)),
    Failed = string:prefix(unicode:characters_to_list(Outcome), "FAILED") =/= nomatch,
    Text = case Failed of
        true -> io_lib:format("~nmesh: ~ts (in step ~ts)~n", [Outcome, Title]);
        false -> io_lib:format("~nmesh: ~ts, in ~.1f s~n", [Outcome, seconds(now_us(), Last)])
    end,
    io:put_chars(Text),
    Last#screen.terminal andalso io:put_chars("\e[?25h"),
    {ok, Last}.

%%% What the stations say

poll(#screen{nodes = Nodes, cursors = Cursors} = Screen) ->
    Seen = [{Name, View} || {Name, Node} <- maps:to_list(Nodes),
                            {ok, View} <- [view(Node, maps:get(Name, Cursors, 0))]],
    Polled = lists:foldl(fun seen/2, Screen, Seen),
    Happened = lists:sort([{At, Name, What} || {Name, #{happened := Events}} <- Seen,
                                               {At, What} <- Events]),
    lists:foldl(fun happened/2, Polled, Happened).

%% A VM that is being killed, or has no station yet, has nothing to say.
view(Node, From) ->
    try {ok, macula_test_nodes:call(Node, macula_mesh_station, view, [From], 2000)}
    catch _:_ -> unknown
    end.

seen({Name, #{next := Cursor, counts := Counts} = View},
     #screen{views = Views, cursors = Cursors, rates = Rates} = Screen) ->
    Now = now_us(),
    Frames = maps:get(frames_in, Counts, 0),
    Rate = case Rates of
        #{Name := {At, Before, _}} when Frames >= Before, Now > At + 800000 ->
            {Now, Frames, (Frames - Before) * 1.0e6 / (Now - At)};
        #{Name := {_, Before, _} = Old} when Frames >= Before -> Old;
        #{} -> {Now, Frames, 0.0}
    end,
    Screen#screen{views = Views#{Name => View}, cursors = Cursors#{Name => Cursor},
                  rates = Rates#{Name => Rate}}.

happened({At, Name, What}, Screen) ->
    case tell(Name, What) of
        none -> Screen;
        Text -> line(io_lib:format("~7.2f  ~ts", [seconds(At, Screen), Text]), Screen)
    end.

%% Each link once, as the one who dialled it says it.
tell(Name, {linked, Peer, client}) -> io_lib:format("~s -> ~s linked", [Name, Peer]);
tell(_, {linked, _, server}) -> none;
tell(Name, {lost, Peer, Reason}) ->
    io_lib:format("~s lost ~s: ~ts", [Name, Peer, macula_peering:format_reason(Reason)]);
tell(Name, {redialling, Peer, Attempt, Delay, _}) ->
    io_lib:format("~s dials ~s again in ~b ms (attempt ~b)", [Name, Peer, Delay, Attempt]).

%%% Drawing

line(Text, #screen{terminal = false} = Screen) ->
    io:put_chars([Text, $\n]),
    Screen;
line(Text, #screen{log = Log} = Screen) ->
    Screen#screen{log = lists:sublist([Text | Log], ?LOG_LINES)}.

%% One write for each picture, so that none is seen half done.
draw(#screen{terminal = false} = Screen) ->
    Screen;
draw(#screen{drawn = Drawn, log = Log} = Screen) ->
    Rows = rows(Screen) ++ [""] ++ [fit(Text) || Text <- lists:reverse(Log)],
    Up = case Drawn of 0 -> ""; _ -> io_lib:format("\e[~bA", [Drawn]) end,
    io:put_chars([Up, "\e[J", [[Row, $\n] || Row <- Rows]]),
    Screen#screen{drawn = length(Rows)}.

rows(#screen{names = Names} = Screen) ->
    Head = io_lib:format("macula mesh: signed links over QUIC~*ts",
                         [?WIDTH - 35, io_lib:format("~.1f s", [seconds(now_us(), Screen)])]),
    [bold(Head, Screen), "",
     [pad("PING, ms", 10), [pad_left(Name, 9) || Name <- Names],
      pad_left("frames/s", 10), pad_left("events", 8), pad_left("calls", 7)] |
     [row(Name, Screen) || Name <- Names]].

row(Name, #screen{names = Names, views = Views, rates = Rates} = Screen) ->
    View = maps:get(Name, Views, gone),
    {_, _, Rate} = maps:get(Name, Rates, {0, 0, 0.0}),
    Numbers = case View of
        gone -> [pad_left("-", 10), pad_left("-", 8), pad_left("-", 7)];
        #{counts := Counts} ->
            [pad_left(integer_to_list(round(Rate)), 10),
             pad_left(integer_to_list(maps:get(events, Counts, 0)), 8),
             pad_left(integer_to_list(maps:get(answered, Counts, 0)), 7)]
    end,
    [pad(Name, 10), [cell(Name, Other, View, Screen) || Other <- Names], Numbers].

cell(Name, Name, _, _) -> pad_left(".", 9);
cell(_, _, gone, Screen) -> red(pad_left("down", 9), Screen);
cell(_, Other, #{links := Links, redialling := Redialling}, Screen) ->
    case {Links, Redialling} of
        {#{Other := undefined}, _} -> pad_left("linked", 9);
        {#{Other := Micros}, _} ->
            green(pad_left(io_lib:format("~.2f", [Micros / 1000]), 9), Screen);
        {_, #{Other := Attempt}} ->
            yellow(pad_left(io_lib:format("dial ~b", [Attempt]), 9), Screen);
        _ -> red(pad_left("-", 9), Screen)
    end.

fit(Text) ->
    string:slice(Text, 0, ?WIDTH).

pad(Text, Width) -> string:pad(string:slice(Text, 0, Width), Width, trailing).
pad_left(Text, Width) -> string:pad(string:slice(Text, 0, Width), Width, leading).

bold(Text, Screen) -> paint("1", Text, Screen).
red(Text, Screen) -> paint("31", Text, Screen).
green(Text, Screen) -> paint("32", Text, Screen).
yellow(Text, Screen) -> paint("33", Text, Screen).

paint(Code, Text, #screen{colour = true}) -> ["\e[", Code, "m", Text, "\e[0m"];
paint(_, Text, _) -> Text.

seconds(Us, #screen{began = Began}) -> (Us - Began) / 1.0e6.

now_us() -> os:system_time(microsecond).
