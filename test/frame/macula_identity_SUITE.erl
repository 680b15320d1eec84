%% Identities: their files, their puzzle, and that the secret stays where it is.
-module(macula_identity_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2, log/2]).
-export([rfc_8032_vectors/1, seeds_of_a_wrong_size_are_refused/1, the_puzzle_is_solved/1,
         a_search_can_be_cancelled/1, a_search_times_out_and_leaves_no_message/1,
         a_search_ends_with_its_owner/1, wrong_options_are_named/1, saved_is_loaded/1,
         a_pem_by_openssl_is_loaded/1, the_files_are_as_specified/1, open_modes_are_refused/1,
         damaged_files_are_refused/1, errors_of_the_file_system_are_named/1,
         the_secret_is_not_printed/1, wrong_sizes_are_no_signature/1,
         long_messages_are_signed/1, maps_with_a_seed_are_taken/1]).

all() ->
    [F || {F, 1} <- ?MODULE:module_info(exports), F =/= module_info].

init_per_testcase(Case, Config) ->
    Dir = filename:join(proplists:get_value(priv_dir, Config), atom_to_list(Case)),
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    [{dir, Dir} | Config].

end_per_testcase(_Case, _Config) ->
    ok.

path(Config, Name) ->
    filename:join(proplists:get_value(dir, Config), Name).

%% Section 7.1 of RFC 8032.
rfc_8032_vectors(_Config) ->
    [begin
        {ok, Id} = macula_identity:from_seed(<<Seed:256>>),
        ?assertEqual(<<Public:256>>, macula_identity:public(Id)),
        ?assertEqual(<<Signature:512>>, macula_identity:sign(Message, Id)),
        ?assert(macula_identity:verify(Message, <<Signature:512>>, <<Public:256>>)),
        ?assertNot(macula_identity:verify(<<Message/binary, 0>>, <<Signature:512>>,
                                          <<Public:256>>))
     end || {Seed, Public, Message, Signature} <- [
        {16#9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60,
         16#d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a, <<>>,
         16#e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b},
        {16#4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb,
         16#3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c, <<16#72>>,
         16#92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00}]].

seeds_of_a_wrong_size_are_refused(_Config) ->
    [?assertEqual({error, bad_seed}, macula_identity:from_seed(Seed))
     || Seed <- [<<>>, <<0:248>>, <<0:264>>, "list", 7]].

the_puzzle_is_solved(_Config) ->
    [begin
        {ok, Id} = macula_identity:generate(#{puzzle_bits => Bits}),
        ?assert(macula_identity:puzzle_bits(Id) >= Bits),
        Zeros = <<0:Bits>>,
        ?assertMatch(<<Zeros:Bits/bits, _/bits>>, macula_identity:puzzle_evidence(Id)),
        ?assertEqual(macula_identity:puzzle_evidence(Id),
                     crypto:hash(sha256, macula_identity:node_id(Id)))
     end || Bits <- [0, 1, 8, 10]],
    ?assert(macula_identity:puzzle_bits(macula_identity:generate()) >= 8).

a_search_can_be_cancelled(_Config) ->
    {ok, {search, Tag, _} = Search} = macula_identity:start_search(256),
    receive {Tag, Early} -> ct:fail(Early) after 0 -> ok end,
    ok = macula_identity:cancel_search(Search),
    receive {Tag, Result} -> ?assertEqual({error, cancelled}, Result) after 5000 -> ct:fail(late) end.

a_search_times_out_and_leaves_no_message(_Config) ->
    ?assertEqual({error, timeout}, macula_identity:generate(#{puzzle_bits => 200, timeout => 20})),
    ?assertEqual({messages, []}, process_info(self(), messages)).

%% Nothing tells about a native thread from outside but the work it does: the CPU time of the
%% emulator stops growing when the searches end.
a_search_ends_with_its_owner(_Config) ->
    {Owner, Ref} = spawn_monitor(fun() ->
        {ok, S} = macula_identity:start_search(256),
        receive stop -> S end
    end),
    exit(Owner, kill),
    receive {'DOWN', Ref, process, Owner, killed} -> ok end,
    %% Collected without its owner's death.
    {Other, Ref2} = spawn_monitor(fun() ->
        _ = macula_identity:start_search(256),
        erlang:garbage_collect()
    end),
    receive {'DOWN', Ref2, process, Other, normal} -> ok end,
    wait_until_idle(100).

wait_until_idle(0) -> ct:fail(still_searching);
wait_until_idle(N) ->
    Busy = fun() -> element(1, erlang:statistics(runtime)) end,
    Before = Busy(),
    receive after 100 -> ok end,
    case Busy() - Before of
        Used when Used < 50 -> ok;
        _ -> wait_until_idle(N - 1)
    end.

wrong_options_are_named(_Config) ->
    ?assertEqual({error, {bad_option, bits, unknown}}, macula_identity:generate(#{bits => 1})),
    ?assertEqual({error, {bad_option, puzzle_bits, 257}},
                 macula_identity:generate(#{puzzle_bits => 257})),
    ?assertEqual({error, {bad_option, timeout, soon}},
                 macula_identity:generate(#{timeout => soon})),
    ?assertEqual({error, bad_bits}, macula_identity:start_search(-1)).

saved_is_loaded(Config) ->
    Id = macula_identity:generate(),
    [begin
        Path = path(Config, Name),
        ok = macula_identity:save(Id, Path, Format),
        ok = macula_identity:save(Id, Path, Format),
        {ok, Loaded} = macula_identity:load(Path),
        ?assertEqual(macula_identity:public(Id), macula_identity:public(Loaded)),
        ?assertEqual(macula_identity:sign("m", Id), macula_identity:sign("m", Loaded)),
        {ok, Info} = file:read_file_info(Path),
        ?assertEqual(8#600, element(8, Info) band 8#777)
     end || {Name, Format} <- [{"a.key", key}, {<<"b.pem">>, pem}, {"ключ", key}]],
    ?assertEqual({error, {bad_option, format, der}},
                 macula_identity:save(Id, path(Config, "c"), der)),
    %% Nothing half written is left behind.
    {ok, Files} = file:list_dir(proplists:get_value(dir, Config)),
    ?assertEqual(["a.key", "b.pem", "ключ"], lists:sort(Files)).

a_pem_by_openssl_is_loaded(Config) ->
    case os:find_executable("openssl") of
        false ->
            {skip, "no openssl to compare with"};
        Openssl ->
            Path = path(Config, "openssl.pem"),
            "" = os:cmd(Openssl ++ " genpkey -algorithm ed25519 -out " ++ Path),
            ok = file:change_mode(Path, 8#600),
            {ok, Id} = macula_identity:load(Path),
            Text = os:cmd(Openssl ++ " pkey -in " ++ Path ++ " -pubout -outform DER | od -An -tx1"),
            Der = << <<(list_to_integer(Hex, 16))>> || Hex <- string:lexemes(Text, " \n") >>,
            ?assertEqual(macula_identity:public(Id), binary:part(Der, 12, 32)),
            {ok, Pem} = file:read_file(Path),
            ?assertEqual(Pem, macula_identity:to_pem(Id))
    end.

the_files_are_as_specified(Config) ->
    Seed = list_to_binary(lists:seq(0, 31)),
    {ok, Id} = macula_identity:from_seed(Seed),
    ok = macula_identity:save(Id, path(Config, "k")),
    Public = macula_identity:public(Id),
    ?assertEqual({ok, <<"macula-v2-key", 0, Public/binary, Seed/binary>>},
                 file:read_file(path(Config, "k"))),
    ?assertEqual(<<"-----BEGIN PRIVATE KEY-----\n"
                   "MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n"
                   "-----END PRIVATE KEY-----\n">>, macula_identity:to_pem(Id)),
    {ok, FromPem} = macula_identity:from_pem(macula_identity:to_pem(Id)),
    ?assertEqual(Seed, macula_identity:seed(FromPem)).

open_modes_are_refused(Config) ->
    Path = path(Config, "k"),
    ok = macula_identity:save(macula_identity:generate(), Path),
    [begin
        ok = file:change_mode(Path, Mode),
        ?assertEqual({error, {bad_mode, Mode}}, macula_identity:load(Path))
     end || Mode <- [8#640, 8#604, 8#660, 8#610, 8#601]],
    ok = file:change_mode(Path, 8#400),
    ?assertMatch({ok, _}, macula_identity:load(Path)).

damaged_files_are_refused(Config) ->
    Path = path(Config, "k"),
    ok = macula_identity:save(macula_identity:generate(), Path),
    {ok, <<Magic:14/binary, Public:32/binary, Seed:32/binary>>} = file:read_file(Path),
    Load = fun(Bytes) ->
        ok = file:write_file(Path, Bytes),
        macula_identity:load(Path)
    end,
    Other = crypto:strong_rand_bytes(32),
    ?assertEqual({error, key_mismatch}, Load([Magic, Other, Seed])),
    [?assertEqual({error, bad_key_file}, Load(Bytes))
     || Bytes <- [<<>>, Magic, [Magic, Public], [Magic, Public, Seed, 0],
                  ["macula-v3-key", 0, Public, Seed], "-----BEGIN PRIVATE KEY-----\n",
                  "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                  crypto:strong_rand_bytes(200_000)]].

errors_of_the_file_system_are_named(Config) ->
    Id = macula_identity:generate(),
    Dir = proplists:get_value(dir, Config),
    ?assertEqual({error, enoent}, macula_identity:load(path(Config, "none"))),
    ?assertEqual({error, enoent}, macula_identity:load(<<"a", 0, "b">>)),
    ?assertEqual({error, eisdir}, macula_identity:load(path(Config, "."))),
    %% Nobody ever writes to this one.
    Pipe = path(Config, "pipe"),
    "" = os:cmd("mkfifo -m 600 '" ++ Pipe ++ "'"),
    ?assertEqual({error, bad_key_file}, macula_identity:load(Pipe)),
    ok = file:delete(Pipe),
    ?assertEqual({error, enoent}, macula_identity:save(Id, path(Config, "no/such/dir"))),
    ok = file:make_dir(path(Config, "dir")),
    ?assertMatch({error, _}, macula_identity:save(Id, path(Config, "dir"))),
    {ok, Files} = file:list_dir(Dir),
    ?assertEqual(["dir"], Files).

the_secret_is_not_printed(_Config) ->
    Seed = crypto:strong_rand_bytes(32),
    {ok, Id} = macula_identity:from_seed(Seed),
    Hidden = fun(Text) ->
        Bin = iolist_to_binary(Text),
        [?assertEqual(nomatch, binary:match(Bin, Form))
         || Form <- [Seed, iolist_to_binary(io_lib:format("~w", [Seed])),
                     binary:part(iolist_to_binary(io_lib:format("~w", [Seed])), 2, 20)]]
    end,
    Hidden(io_lib:format("~p ~w ~p", [Id, Id, #{identity => Id}])),
    Hidden(term_to_binary(Id)),
    %% The report that a crashing process leaves.
    ok = logger:add_handler(?FUNCTION_NAME, ?MODULE, #{config => self()}),
    try
        _ = proc_lib:spawn(fun() -> put(identity, Id), error({crashed_with, #{identity => Id}}) end),
        receive
            {report, Text} ->
                ?assertNotEqual(nomatch, string:find(Text, "crashed_with")),
                Hidden(unicode:characters_to_binary(Text))
        after 5000 -> ct:fail(no_report)
        end
    after
        ok = logger:remove_handler(?FUNCTION_NAME)
    end.

%% A logger handler.
log(Event, #{config := Pid}) ->
    {Formatter, Config} = {logger_formatter, #{depth => unlimited}},
    Pid ! {report, unicode:characters_to_list(Formatter:format(Event, Config))}.

wrong_sizes_are_no_signature(_Config) ->
    Id = macula_identity:generate(),
    Signature = macula_identity:sign("m", Id),
    Public = macula_identity:public(Id),
    ?assertNot(macula_identity:verify("m", <<Signature/binary, 0>>, Public)),
    ?assertNot(macula_identity:verify("m", <<>>, Public)),
    ?assertNot(macula_identity:verify("m", Signature, <<Public/binary, 0>>)),
    ?assertNot(macula_identity:verify("m", Signature, <<0:256>>)).

long_messages_are_signed(_Config) ->
    Id = macula_identity:generate(),
    Message = binary:copy(<<"m">>, 10_000_000),
    Signature = macula_identity:sign(Message, Id),
    ?assert(macula_identity:verify(Message, Signature, macula_identity:public(Id))),
    ?assertEqual(Signature, crypto:sign(eddsa, none, Message,
                                        [macula_identity:seed(Id), ed25519])).

maps_with_a_seed_are_taken(_Config) ->
    Seed = crypto:strong_rand_bytes(32),
    {ok, Id} = macula_identity:from_seed(Seed),
    Public = macula_identity:public(Id),
    {ok, Same} = macula_identity:ensure(#{public => Public, private => Seed}),
    ?assertEqual(Public, macula_identity:public(Same)),
    ?assertMatch({ok, Id}, macula_identity:ensure(Id)),
    [?assertEqual({error, bad_identity}, macula_identity:ensure(Bad))
     || Bad <- [#{private => <<>>}, #{public => <<0:256>>, private => Seed}, make_ref(), self(),
                <<0:256>>, undefined]].
