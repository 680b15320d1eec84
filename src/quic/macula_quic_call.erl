%% @doc Waiting for the answer of a native operation: one message `{Ref, Result}'. A caller that
%% stops waiting cancels the operation, so that no late answer is left in its mailbox.
%% @private
-module(macula_quic_call).

-export([call/2]).

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
