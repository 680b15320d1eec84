%% PropEr without its header, which Debian packs apart from the library: the macros we use, over the
%% functions PropEr exports, and its generators by their short names.

-define(DELAYED(Expr), fun() -> Expr end).
-define(FORALL(X, Type, Property), proper:forall(Type, fun(X) -> Property end)).
-define(IMPLIES(Condition, Property), proper:implies(Condition, ?DELAYED(Property))).
-define(WHENFAIL(Action, Property), proper:whenfail(?DELAYED(Action), ?DELAYED(Property))).
-define(TRAPEXIT(Property), proper:trapexit(?DELAYED(Property))).
-define(TIMEOUT(Milliseconds, Property), proper:timeout(Milliseconds, ?DELAYED(Property))).
-define(SETUP(Fun, Property), proper:setup(Fun, Property)).

%% EUnit has a LET of its own.
-undef(LET).
-define(LET(X, Type, In), proper_types:bind(Type, fun(X) -> In end, false)).
-define(LETSHRINK(X, Type, In), proper_types:bind(Type, fun(X) -> In end, true)).
-define(SUCHTHAT(X, Type, Condition),
        proper_types:add_constraint(Type, fun(X) -> Condition end, true)).
-define(LAZY(Type), proper_types:lazy(?DELAYED(Type))).
-define(SIZED(Size, Type), proper_types:sized(fun(Size) -> Type end)).

-import(proper_types, [
    integer/0, integer/2, non_neg_integer/0, pos_integer/0, neg_integer/0, range/2, largeint/0,
    float/0, number/0, boolean/0, byte/0, char/0, atom/0, binary/0, binary/1, bitstring/0,
    list/0, list/1, vector/2, tuple/0, tuple/1, string/0, term/0, any/0, timeout/0,
    union/1, oneof/1, elements/1, frequency/1, exactly/1, return/1, fixed_list/1, choose/2,
    non_empty/1, resize/2, default/2, noshrink/1, orderedlist/1,
    function0/1, function1/1, function2/1]).
-import(proper, [
    collect/2, aggregate/2, classify/3, conjunction/1, equals/2, numtests/2, measure/3]).
