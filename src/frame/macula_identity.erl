%% @doc Ed25519 identities of peering nodes.
%%
%% An identity is one key pair. Its public key is the node id, 32 raw bytes. The private key lives
%% in native memory behind a reference: it is not printed by `~p', by a crash report or by a
%% debugger, it is not copied between processes, and it is wiped when the last reference is
%% collected.
%%
%% ```
%% {ok, Id} = macula_identity:generate(#{puzzle_bits => 8}),
%% ok = macula_identity:save(Id, "/etc/node.key"),
%% {ok, Id2} = macula_identity:load("/etc/node.key"),
%% true = macula_identity:public(Id) =:= macula_identity:public(Id2).
%% '''
%%
%% A node id that others shall take in needs a solved puzzle: the first bits of its SHA-256 must be
%% zero (8 of them by default). Finding one costs about `2^Bits * 20' microseconds on one core; the
%% search runs on a native thread and stops when it is cancelled or when its caller dies.
-module(macula_identity).

-export([generate/0, generate/1, start_search/1, cancel_search/1]).
-export([from_seed/1, from_pem/1, load/1, save/2, save/3]).
-export([public/1, node_id/1, puzzle_evidence/1, puzzle_bits/1]).
-export([sign/2, verify/3, to_pem/1, seed/1, ensure/1, shown/1]).

-export_type([identity/0, node_id/0, generate_opts/0, search/0, error_reason/0]).

-type identity() :: reference().
-opaque search() :: {search, reference(), reference()}.
-type node_id() :: <<_:256>>.
-type generate_opts() :: #{puzzle_bits => 0..256, timeout => timeout()}.
-type error_reason() ::
    bad_seed | bad_bits | bad_key_file | {bad_mode, non_neg_integer()} | key_mismatch
    | no_randomness | cancelled | timeout | eagain | internal_error | {bad_option, term(), term()}
    | enoent | eacces | eexist | enospc | eisdir | enotdir | erofs | eio.
%% `{bad_mode, Mode}': others than the owner have rights on the file.

%% Longer messages take more than a normal scheduler should give to one call.
-define(SHORT, 65536).
-define(DEFAULT_BITS, 8).

%% @doc A new identity whose puzzle is solved to 8 bits.
-spec generate() -> identity().
generate() ->
    case generate(#{}) of
        {ok, Identity} -> Identity;
        {error, Reason} -> error({no_identity, Reason})
    end.

%% @doc A new identity. Options: `puzzle_bits' (0 to 256, default 8) and `timeout' in milliseconds
%% (default `infinity'), after which the search is cancelled and `{error, timeout}' returned.
-spec generate(generate_opts()) -> {ok, identity()} | {error, error_reason()}.
generate(Opts) when not is_map(Opts) ->
    {error, {bad_option, options, not_a_map}};
generate(Opts) ->
    case check_opts(maps:to_list(Opts)) of
        ok ->
            Timeout = maps:get(timeout, Opts, infinity),
            case start_search(maps:get(puzzle_bits, Opts, ?DEFAULT_BITS)) of
                {ok, Search} -> await(Search, Timeout);
                {error, Reason} -> {error, Reason}
            end;
        {error, Reason} ->
            {error, Reason}
    end.

%% The thread answers every search exactly once, so a cancelled one is waited for: its answer does
%% not come later as a stray message.
await({search, Tag, _} = Search, Timeout) ->
    receive
        {Tag, Result} -> Result
    after Timeout ->
        cancel_search(Search),
        receive
            {Tag, _} -> {error, timeout}
        end
    end.

check_opts([]) -> ok;
check_opts([{puzzle_bits, N} | Rest]) when is_integer(N), N >= 0, N =< 256 -> check_opts(Rest);
check_opts([{timeout, infinity} | Rest]) -> check_opts(Rest);
check_opts([{timeout, T} | Rest]) when is_integer(T), T >= 0 -> check_opts(Rest);
check_opts([{Key, Value} | _]) when Key =:= puzzle_bits; Key =:= timeout ->
    {error, {bad_option, Key, shown(Value)}};
check_opts([{Key, _} | _]) -> {error, {bad_option, shown(Key), unknown}}.

%% @doc What an error may show of a value in a wrong place, which may be a secret: atoms and numbers.
%% @private
-spec shown(term()) -> term().
shown(Value) when is_atom(Value); is_number(Value), abs(Value) < 1 bsl 64 -> Value;
shown(_) -> invalid.

%% @doc Starts a search for an identity with a solved puzzle and returns at once. The caller gets
%% `{Tag, {ok, Identity}}' or `{Tag, {error, cancelled}}', where the search is `{search, Tag, _}'.
%% The search ends when its caller dies or when the returned term is collected.
-spec start_search(0..256) -> {ok, search()} | {error, bad_bits | eagain}.
start_search(Bits) when is_integer(Bits), Bits >= 0, Bits =< 256 ->
    Tag = make_ref(),
    case macula_nif:identity_search(Bits, Tag) of
        {ok, Handle} -> {ok, {search, Tag, Handle}};
        %% No thread is to be had.
        {error, _} = Error -> Error
    end;
start_search(_) ->
    {error, bad_bits}.

%% @doc Stops a search. Its `{Tag, {error, cancelled}}' follows, unless the result was under way.
-spec cancel_search(search()) -> ok.
cancel_search({search, _Tag, Handle}) ->
    macula_nif:identity_cancel(Handle).

%% @doc The identity of a 32-byte RFC 8032 seed. The binary given stays in the VM's memory: prefer
%% {@link load/1}.
-spec from_seed(<<_:256>>) -> {ok, identity()} | {error, bad_seed}.
from_seed(Seed) when is_binary(Seed) ->
    case macula_nif:identity_from_seed(Seed) of
        {ok, Identity} -> {ok, Identity};
        {error, _} -> {error, bad_seed}
    end;
from_seed(_) ->
    {error, bad_seed}.

%% @doc The identity in a PEM text (PKCS#8, Ed25519).
-spec from_pem(binary()) -> {ok, identity()} | {error, bad_key_file}.
from_pem(Pem) when is_binary(Pem) ->
    case macula_nif:identity_from_pem(Pem) of
        {ok, Identity} -> {ok, Identity};
        {error, _} -> {error, bad_key_file}
    end;
from_pem(_) ->
    {error, bad_key_file}.

%% @doc Reads a key file (78 bytes: `macula-v2-key', a zero byte, public key, seed) or a PEM file.
%% A file that group or others may touch is refused with `{bad_mode, Mode}'.
-spec load(file:name_all()) -> {ok, identity()} | {error, error_reason()}.
load(Path) ->
    case path(Path) of
        {ok, Bytes} -> macula_nif:identity_load(Bytes);
        error -> {error, enoent}
    end.

%% @equiv save(Identity, Path, key)
-spec save(identity(), file:name_all()) -> ok | {error, error_reason()}.
save(Identity, Path) ->
    save(Identity, Path, key).

%% @doc Writes the identity with mode 0600, as key file or as PEM. An existing file is replaced
%% atomically.
-spec save(identity(), file:name_all(), key | pem) -> ok | {error, error_reason()}.
save(Identity, Path, Format)
  when is_reference(Identity), Format =:= key; is_reference(Identity), Format =:= pem ->
    case path(Path) of
        {ok, Bytes} -> macula_nif:identity_save(Identity, Bytes, Format);
        error -> {error, enoent}
    end;
save(Identity, _Path, _Format) when not is_reference(Identity) ->
    no_identity();
save(_Identity, _Path, Format) ->
    {error, {bad_option, format, shown(Format)}}.

path(Path) when is_binary(Path) ->
    nonzero(Path);
path(Path) ->
    try unicode:characters_to_binary(filename:flatten(Path), unicode,
                                     file:native_name_encoding()) of
        Bytes when is_binary(Bytes) -> nonzero(Bytes);
        _ -> error
    catch
        %% Its report would show what stands there for a name.
        error:_ -> error
    end.

nonzero(Bytes) ->
    case binary:match(Bytes, <<0>>) of
        nomatch -> {ok, Bytes};
        _ -> error
    end.

%% @doc The public key, which is the node id.
-spec public(identity()) -> node_id().
public(Identity) when is_reference(Identity) ->
    macula_nif:identity_public(Identity);
public(_) ->
    no_identity().

%% @equiv public(Identity)
-spec node_id(identity()) -> node_id().
node_id(Identity) ->
    public(Identity).

%% @doc What CONNECT carries as `puzzle_evidence': the SHA-256 of the node id.
-spec puzzle_evidence(identity() | node_id()) -> <<_:256>>.
puzzle_evidence(NodeId) when is_binary(NodeId) -> crypto:hash(sha256, NodeId);
puzzle_evidence(Identity) -> puzzle_evidence(public(Identity)).

%% @doc To how many bits the puzzle of a node id is solved.
-spec puzzle_bits(identity() | node_id()) -> 0..256.
puzzle_bits(NodeId) when is_binary(NodeId) -> macula_nif:identity_puzzle_bits(NodeId);
puzzle_bits(Identity) -> puzzle_bits(public(Identity)).

%% @doc The Ed25519 signature of a message.
-spec sign(iodata(), identity()) -> <<_:512>>.
sign(Message, Identity) when is_reference(Identity) ->
    case iolist_to_binary(Message) of
        Short when byte_size(Short) =< ?SHORT -> macula_nif:identity_sign(Identity, Short);
        Long -> macula_nif:identity_sign_dirty(Identity, Long)
    end;
sign(_, _) ->
    no_identity().

%% Raised here and not by the library, whose report would show a map with its seed.
-spec no_identity() -> no_return().
no_identity() ->
    erlang:error(badarg).

%% @doc Whether a signature of a message was made by a node id's key. Arguments of a wrong size are
%% no signature.
-spec verify(iodata(), binary(), binary()) -> boolean().
verify(Message, Signature, NodeId) when is_binary(Signature), is_binary(NodeId) ->
    case iolist_to_binary(Message) of
        Short when byte_size(Short) =< ?SHORT ->
            macula_nif:identity_verify(NodeId, Short, Signature);
        Long ->
            macula_nif:identity_verify_dirty(NodeId, Long, Signature)
    end.

%% @doc The private key as PEM text (PKCS#8). The result is a secret in the VM's memory.
-spec to_pem(identity()) -> binary().
to_pem(Identity) when is_reference(Identity) ->
    macula_nif:identity_pem(Identity);
to_pem(_) ->
    no_identity().

%% @doc The 32-byte seed. The result is a secret in the VM's memory.
-spec seed(identity()) -> <<_:256>>.
seed(Identity) when is_reference(Identity) ->
    macula_nif:identity_seed(Identity);
seed(_) ->
    no_identity().

%% @doc An identity from what a caller may hold: an identity, or a map with `private' and
%% optionally `public'.
%% @private
-spec ensure(term()) -> {ok, identity()} | {error, bad_identity}.
ensure(#{private := Seed} = Pair) ->
    case from_seed(Seed) of
        {ok, Identity} ->
            case public(Identity) =:= maps:get(public, Pair, public(Identity)) of
                true -> {ok, Identity};
                false -> {error, bad_identity}
            end;
        {error, _} ->
            {error, bad_identity}
    end;
ensure(Identity) when is_reference(Identity) ->
    %% Any reference looks alike from here; only the library knows its own.
    try public(Identity) of
        _ -> {ok, Identity}
    catch
        error:badarg -> {error, bad_identity}
    end;
ensure(_) ->
    {error, bad_identity}.
