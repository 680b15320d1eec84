%% @doc The process that is asked about the certificates of peers, for the option `verify_fun'.
%%
%% A native task asks once a handshake is done, before anybody has the connection. Each question gets a
%% process of its own, which calls the function and answers; the task waits, and nothing else. What does not
%% answer in time, or dies, has said no.
%% @private
-module(macula_quic_verifier).

-export([listen/2, connect/2]).
%% Spawned.
-export([init/2, loop/1]).

%% The TLS alert of what could not be decided.
-define(INTERNAL_ERROR, 80).

-type verify_fun() :: {fun((term(), term(), term()) -> term())
                       | fun((term(), binary(), term(), term()) -> term()), term()}.

%% @doc Makes a listener, with a process that is asked, if one is needed.
-spec listen(map(), fun((map()) -> Result)) -> Result when Result :: {ok, reference()} | {error, term()}.
listen(#{verify_fun := undefined} = Native, Listen) ->
    Listen(Native#{verifier => []});
listen(#{verify_fun := Fun} = Native, Listen) ->
    Verifier = start(Fun),
    case Listen(Native#{verifier => [Verifier]}) of
        {ok, _} = Listening ->
            %% The native side ends it with the listener.
            Verifier ! keep,
            Listening;
        Error ->
            Verifier ! stop,
            Error
    end.

%% @doc Dials, with a process that is asked, if one is needed.
-spec connect(map(), fun((map()) -> Result)) -> Result when Result :: {ok, reference()} | {error, term()}.
connect(#{verify_fun := undefined} = Native, Dial) ->
    Dial(Native#{verifier => []});
connect(#{verify_fun := Fun} = Native, Dial) ->
    Verifier = start(Fun),
    Dialled = case Dial(Native#{verifier => [Verifier]}) of
        {error, {bad_cert, Default}} -> {error, {bad_cert, reason(Verifier, Default)}};
        Result -> Result
    end,
    Verifier ! stop,
    Dialled.

%% One for the calling process, with which it ends.
-spec start(verify_fun()) -> pid().
start(Fun) ->
    spawn(?MODULE, init, [Fun, self()]).

%% @private
-spec init(verify_fun(), pid()) -> ok.
init(Fun, Caller) ->
    process_flag(trap_exit, true),
    loop(#{'fun' => Fun, caller => monitor(process, Caller), asked => #{}, reason => none}).

%% Why the function has refused the peer; the default where it has not.
-spec reason(pid(), term()) -> term().
reason(Verifier, Default) ->
    Ref = monitor(process, Verifier),
    Verifier ! {reason, self(), Ref},
    receive
        {Ref, none} -> demonitor(Ref, [flush]), Default;
        {Ref, {refused, Reason}} -> demonitor(Ref, [flush]), Reason;
        {'DOWN', Ref, process, Verifier, _} -> Default
    end.

%% It waits in hibernation: a process that waits in the code of this module would be killed when the module has been
%% loaded twice, and the listener would refuse all clients.
%% @private
-spec loop(map()) -> ok.
loop(State) ->
    receive
        Message ->
            case told(Message, State) of
                {ok, Next} -> ?MODULE:loop(Next);
                over -> ok
            end
    after 0 ->
        erlang:hibernate(?MODULE, loop, [State])
    end.

told({verify, Question, Ders, Native, Within}, #{'fun' := Fun, asked := Asked} = State) ->
    Self = self(),
    {Pid, _} = spawn_monitor(fun() -> answer(Self, Question, Fun, Ders, Native) end),
    Timer = case Within of
        infinity -> none;
        _ -> erlang:send_after(Within, self(), {late, Pid})
    end,
    {ok, State#{asked := Asked#{Pid => {Timer, Question}}}};
told({'DOWN', Caller, process, _, _}, #{caller := Caller} = State) ->
    ended(State);
told({'DOWN', _, process, Pid, _}, #{asked := Asked} = State) ->
    case Asked of
        #{Pid := {Timer, Question}} ->
            _ = [erlang:cancel_timer(Timer) || Timer =/= none],
            %% Unless the process has said something itself.
            macula_nif:verdict_tell(Question, ?INTERNAL_ERROR);
        _ ->
            ok
    end,
    {ok, State#{asked := maps:remove(Pid, Asked)}};
told({late, Pid}, State) ->
    exit(Pid, kill),
    {ok, State};
told({refused, Why}, State) ->
    {ok, State#{reason := {refused, Why}}};
told({reason, From, Ref}, #{reason := Reason} = State) ->
    From ! {Ref, Reason},
    {ok, State};
told(keep, #{caller := Caller} = State) ->
    demonitor(Caller, [flush]),
    {ok, State#{caller := none}};
told(stop, State) ->
    ended(State);
told(_Other, State) ->
    {ok, State}.

ended(#{asked := Asked}) ->
    maps:foreach(fun(Pid, _) -> exit(Pid, kill) end, Asked),
    over.

answer(Verifier, Question, Fun, Ders, Native) ->
    Alert = try judge_chain(Fun, Ders, Native) of
        ok ->
            0;
        {refused, Reason} ->
            Verifier ! {refused, Reason},
            alert(Reason)
    catch
        Class:Reason:Stack ->
            Verifier ! {refused, verify_fun_failed},
            logger:error(#{what => quic_verify_fun_failed, class => Class, reason => Reason, stack => Stack},
                         #{macula => quic, report_cb => fun failed/1}),
            ?INTERNAL_ERROR
    end,
    macula_nif:verdict_tell(Question, Alert).

failed(#{class := Class, reason := Reason, stack := Stack}) ->
    {"macula: a verify_fun has failed, which refuses the connection: ~ts",
     [erl_error:format_exception(Class, Reason, Stack)]}.

%% What is wrong with the chain, then each certificate of it, that of the peer last.
judge_chain({Fun, State}, [Leaf | Others], Native) ->
    Events = [{Leaf, {bad_cert, Native}} || Native =/= ok]
        ++ [{Der, valid} || Der <- lists:reverse(Others)] ++ [{Leaf, valid_peer}],
    judge(Events, Fun, State).

judge([{Der, Event} | Events], Fun, State) ->
    Cert = public_key:pkix_decode_cert(Der, otp),
    Said = case is_function(Fun, 4) of
        true -> Fun(Cert, Der, Event, State);
        false -> Fun(Cert, Event, State)
    end,
    case {Said, Event} of
        {{valid, New}, _} -> judge(Events, Fun, New);
        {{valid_peer, New}, valid_peer} -> judge(Events, Fun, New);
        {{fail, Reason}, _} -> {refused, Reason};
        {{unknown, _}, {bad_cert, Why}} -> {refused, Why};
        {{unknown, New}, _} -> judge(Events, Fun, New)
    end;
judge([], _Fun, _State) ->
    ok.

%% The alert of a reason that has one (RFC 8446, section 6.2).
alert({bad_cert, Reason}) -> alert(Reason);
alert(certificate_revoked) -> 44;
alert(revoked) -> 44;
alert(certificate_expired) -> 45;
alert(cert_expired) -> 45;
alert(certificate_unknown) -> 46;
alert(unknown_ca) -> 48;
alert(access_denied) -> 49;
alert(_) -> 42.
