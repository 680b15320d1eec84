%% @doc What peering logs. Log events are without a domain: the VM's default handler shows no domain but
%% OTP's own, and an operator must see these.
%% @private
-module(macula_peering_log).

-export([rule_failed/2, bad_frame/2, report/1]).

%% @doc A function given as `allow' or `deny' has failed.
-spec rule_failed(macula_identity:node_id(), term()) -> ok.
rule_failed(Peer, Crash) ->
    warning(#{what => peering_rule_failed, peer => Peer, reason => Crash}).

%% @doc A frame could not be decoded, and nobody else hears of it.
-spec bad_frame(macula_identity:node_id(), atom()) -> ok.
bad_frame(Peer, Why) ->
    warning(#{what => peering_bad_frame, peer => Peer, reason => Why}).

warning(Report) ->
    logger:warning(Report, #{macula => peering, report_cb => fun ?MODULE:report/1}).

%% @private
-spec report(logger:report()) -> {io:format(), [term()]}.
report(#{what := peering_rule_failed, peer := Peer, reason := Crash}) ->
    {"macula: a function given as allow or deny failed, and the peer ~ts was refused: ~0tp",
     [hex(Peer), Crash]};
report(#{what := peering_bad_frame, peer := Peer, reason := Why}) ->
    {"macula: a frame of the peer ~ts was dropped (~ts); later ones of this link are only counted",
     [hex(Peer), macula_frame:explain({bad_frame, Why})]}.

hex(Binary) ->
    [io_lib:format("~2.16.0b", [Byte]) || <<Byte>> <= Binary].
