%% @doc What calls have in common: one deadline over all that a call does, the wait for the answer of a native
%% operation, which is one message `{Ref, Result}', and the way from a host to a connection.
%%
%% A caller that stops waiting cancels the operation, so that no late answer is left in the mailbox.
%% @private
-module(macula_quic_call).

-export([deadline/1, left/1, call/2, connect/4]).

-export_type([deadline/0]).

-type deadline() :: integer() | infinity.

%% @doc The deadline of a call that may take so long.
-spec deadline(timeout()) -> deadline().
deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

%% @doc What is left until a deadline.
-spec left(deadline()) -> timeout().
left(infinity) -> infinity;
left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).

%% @doc Starts an operation with a fresh reference and waits for its answer.
-spec call(fun((reference()) -> reference() | {ok, reference()} | term()), timeout()) -> term().
call(Start, Timeout) ->
    %% Made here, so that the receive below skips what was in the mailbox before.
    Ref = make_ref(),
    try Start(Ref) of
        {ok, Operation} -> await(Ref, Operation, Timeout);
        Operation when is_reference(Operation) -> await(Ref, Operation, Timeout);
        Result -> answer(Ref, Result)
    catch
        error:badarg -> answer(Ref, {error, badarg})
    end.

%% A result that needs no waiting is taken as a message too. The reference has left a mark in the mailbox,
%% which only a receive takes away, and OTP 25 confuses the signals of a process that has more than eight
%% of them.
-spec answer(reference(), Result) -> Result.
answer(Ref, Result) ->
    self() ! {Ref, Result},
    receive {Ref, Answer} -> Answer end.

-spec await(reference(), reference(), timeout()) -> term().
await(Ref, Operation, Timeout) ->
    receive
        {Ref, Result} -> Result
    after Timeout ->
        case macula_nif:op_cancel(Operation) of
            true -> {error, timeout};
            %% Answered at the last moment.
            false -> receive {Ref, Result} -> Result end
        end
    end.

%% @doc Resolves the host and dials its addresses, with options that `macula_quic_options:connect/1' has checked.
-spec connect(term(), inet:port_number(), map(), deadline()) ->
          {ok, reference()} | {error, term()}.
connect(Host, Port, Options, Deadline) ->
    case macula_quic_address:literal(Host) of
        {ok, Ip} ->
            case reaches(maps:get(local_address, Options), Ip) of
                true -> dial([Ip], Ip, Port, Options, Deadline);
                false -> {error, eafnosupport}
            end;
        error ->
            case macula_quic_address:host(Host) of
                {ok, Name} -> by_name(Name, Port, Options, Deadline);
                error -> {error, {bad_option, host, {wanted, host}}}
            end
    end.

by_name(Name, Port, Options, Deadline) ->
    %% The resolver would take an address on a link that is not there for one on any.
    case lists:member($%, Name) of
        true -> {error, {bad_option, host, no_such_interface}};
        false -> resolve(Name, Port, Options, Deadline)
    end.

resolve(Name, Port, Options, Deadline) ->
    case macula_quic_address:resolve(Name, family(Options), Deadline) of
        {ok, Addresses, Pending} ->
            Host = list_to_binary(Name),
            case dial(Addresses, Host, Port, Options, Deadline) of
                {ok, _} = Dialled ->
                    ok = macula_quic_address:forget(Pending),
                    Dialled;
                Error ->
                    dial_rest(macula_quic_address:resolve_rest(Pending, Deadline), Error, Host, Port, Options, Deadline)
            end;
        Error ->
            Error
    end.

%% What the resolver was slow to tell.
dial_rest([], Error, _Host, _Port, _Options, _Deadline) -> Error;
dial_rest(Addresses, _Error, Host, Port, Options, Deadline) -> dial(Addresses, Host, Port, Options, Deadline).

%% Whoever names a local address can reach its family only.
family(#{local_address := <<>>}) -> any;
family(#{local_address := Local}) -> family_of(Local).

family_of(Ip) ->
    case binary:match(Ip, <<":">>) of
        nomatch -> inet;
        _ -> inet6
    end.

%% `::' has both.
reaches(Local, _Ip) when Local =:= <<>>; Local =:= <<"::">> -> true;
reaches(Local, Ip) -> family_of(Local) =:= family_of(Ip).

dial(Addresses, Host, Port, #{server_name := Asked, handshake_timeout := Handshake} = Options,
     Deadline) ->
    Name = case Asked of
        undefined -> hd(binary:split(Host, <<"%">>));
        _ -> Asked
    end,
    %% An atom, so infinity, is larger than any number.
    Left = min(Handshake, left(Deadline)),
    Native = Options#{addresses => Addresses, port => Port, server_name => Name,
                      %% Where early data is sent, the handshake goes on behind the call.
                      early_timeout => case Left of infinity -> 0; _ -> max(1, Left) end},
    call(fun(Ref) -> macula_nif:conn_dial(Ref, Native) end, Left).
