%% @doc Bar charts as SVG text: enough for the bench and no dependency.
-module(macula_bench_svg).

-export([render/1]).

-type bar() :: {Subject :: atom(), Value :: number()}.
-type chart() :: {Title :: string(), Unit :: string(), linear | log,
                  [{Label :: string(), [bar()]}]}.
-export_type([chart/0]).

-define(WIDTH, 720).
-define(HEIGHT, 260).
-define(LEFT, 20).
-define(TOP, 60).
-define(BOTTOM, 40).

%% @doc One picture with the charts below each other.
-spec render([chart()]) -> iodata().
render(Charts) ->
    Height = ?HEIGHT * length(Charts),
    [io_lib:format("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"~b\" height=\"~b\" "
                   "viewBox=\"0 0 ~b ~b\" font-family=\"sans-serif\" font-size=\"12\">~n"
                   "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>~n",
                   [?WIDTH, Height, ?WIDTH, Height]),
     [chart(Chart, (N - 1) * ?HEIGHT) || {N, Chart} <- lists:enumerate(Charts)],
     "</svg>\n"].

chart({Title, Unit, Scale, Groups}, Y) ->
    Values = [Value || {_, Bars} <- Groups, {_, Value} <- Bars],
    Most = lists:max(Values),
    Least = lists:min(Values),
    Subjects = lists:usort([Subject || {_, Bars} <- Groups, {Subject, _} <- Bars]),
    Slot = (?WIDTH - 2 * ?LEFT) / length(Groups),
    Area = ?HEIGHT - ?TOP - ?BOTTOM,
    Base = Y + ?HEIGHT - ?BOTTOM,
    [text(?LEFT, Y + 22, "start", "15", Title),
     text(?LEFT, Y + 40, "start", "12", Unit),
     [[rect(?WIDTH - 130 * (length(Subjects) - N + 1), Y + 12, 12, 12, Subject),
       text(?WIDTH - 130 * (length(Subjects) - N + 1) + 18, Y + 22, "start", "12",
            atom_to_list(Subject))] || {N, Subject} <- lists:enumerate(Subjects)],
     io_lib:format("<line x1=\"~b\" y1=\"~b\" x2=\"~b\" y2=\"~b\" stroke=\"#888888\"/>~n",
                   [?LEFT, Base, ?WIDTH - ?LEFT, Base]),
     [group(Group, ?LEFT + (N - 1) * Slot, Slot, Base, fun(V) -> Area * part(Scale, V, Least, Most) end)
      || {N, Group} <- lists:enumerate(Groups)]].

group({Label, Bars}, X, Slot, Base, Height) ->
    Width = min(70.0, Slot * 0.8 / max(1, length(Bars))),
    Start = X + (Slot - Width * length(Bars)) / 2,
    [text(X + Slot / 2, Base + 18, "middle", "12", Label) |
     [[rect(Start + (N - 1) * Width + 2, Base - Height(Value), Width - 4, Height(Value), Subject),
       text(Start + (N - 0.5) * Width, Base - Height(Value) - 4, "middle", "11", number(Value))]
      || {N, {Subject, Value}} <- lists:enumerate(Bars)]].

%% Of the height. On the logarithmic scale the axis begins a factor of two below the least.
part(linear, Value, _Least, Most) -> Value / Most;
part(log, Value, Least, Most) -> math:log(Value / Least * 2) / math:log(Most / Least * 2).

rect(X, Y, Width, Height, Subject) ->
    io_lib:format("<rect x=\"~.1f\" y=\"~.1f\" width=\"~.1f\" height=\"~.1f\" fill=\"~s\"/>~n",
                  [float(X), float(Y), float(Width), float(Height), colour(Subject)]).

text(X, Y, Anchor, Size, Text) ->
    io_lib:format("<text x=\"~.1f\" y=\"~.1f\" text-anchor=\"~s\" font-size=\"~s\">~ts</text>~n",
                  [float(X), float(Y), Anchor, Size, Text]).

number(Value) when Value >= 100 -> integer_to_list(round(Value));
number(Value) -> io_lib:format("~.1f", [float(Value)]).

colour(macula) -> "#b5179e";
colour(macula_quic) -> "#b5179e";
colour(inet_tls) -> "#4361ee";
colour(inet_tcp) -> "#8d99ae";
colour(_) -> "#f4a261".
