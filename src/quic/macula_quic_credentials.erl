%% @doc Certificates and keys: from files, PEM or DER, encrypted or not, to DER.
%%
%% What stands where a file name is due may be a secret, such as a key in a form that nobody knows. So an
%% error names a file only where the file, or its directory, is there; of everything else it names the
%% option.
%% @private
-module(macula_quic_credentials).

-export([credentials/1, roots/1]).

%% @doc Adds `chain' and `private_key' to the options of a call.
-spec credentials(map()) -> {ok, map()} | {error, term()}.
credentials(Options) ->
    Cert = first([certfile, cert], Options),
    Key = first([keyfile, key], Options),
    case {Cert, Key} of
        {none, none} ->
            {ok, Options#{chain => [], private_key => {pkcs8, <<>>}}};
        {none, {Name, _}} ->
            {error, {bad_option, Name, {needs, certfile}}};
        {{Name, _}, none} ->
            {error, {bad_option, Name, {needs, keyfile}}};
        {{CertName, CertValue}, {KeyName, KeyValue}} ->
            maybe_credentials(chain(CertName, CertValue), fun() ->
                key(KeyName, KeyValue, maps:get(password, Options))
            end, Options)
    end.

maybe_credentials({ok, Chain}, Key, Options) ->
    case Key() of
        {ok, PrivateKey} -> {ok, Options#{chain => Chain, private_key => PrivateKey}};
        Error -> Error
    end;
maybe_credentials(Error, _Key, _Options) ->
    Error.

%% @doc The trusted roots of a call; none if it names none.
-spec roots(map()) -> {ok, [binary()]} | {error, term()}.
roots(Options) ->
    case first([cacertfile, cacerts], Options) of
        none -> {ok, []};
        {Name, Value} -> chain(Name, Value)
    end.

first([Name | Names], Options) ->
    case Options of
        #{Name := undefined} -> first(Names, Options);
        #{Name := Value} -> {Name, Value}
    end;
first([], _Options) ->
    none.

chain(Name, Value) ->
    case content(Name, Value) of
        {der, Ders} ->
            {ok, Ders};
        {pem, Source, Pem} ->
            case [Der || {'Certificate', Der, not_encrypted} <- pem_decode(Pem)] of
                [] -> {error, {bad(Name), Source, no_certificate}};
                Ders -> {ok, Ders}
            end;
        {error, Source, Why} ->
            {error, {bad(Name), Source, Why}};
        bad ->
            {error, {bad_option, Name, {wanted, credentials}}}
    end.

key(_Name, {Type, Der}, _Password) when is_atom(Type), is_binary(Der) ->
    {ok, {kind(Type), Der}};
key(Name, Value, Password) ->
    case content(Name, Value) of
        {der, [Der]} ->
            der_key(Name, Value, Der, Password);
        {pem, Source, Pem} ->
            key_of([Entry || {Type, _, _} = Entry <- pem_decode(Pem), is_key(Type)],
                   Name, Source, Password);
        {error, Source, Why} ->
            {error, {bad(Name), key_source(Name, Source), Why}};
        _ ->
            {error, {bad_option, Name, {wanted, credentials}}}
    end.

%% What is no file may be the key itself.
key_source(key, Source) when not is_atom(Source) -> key;
key_source(_Name, Source) -> Source.

der_key(Name, Value, Der, Password) ->
    case is_encrypted(Der) of
        true ->
            %% OTP decrypts entries of PEM only.
            Pem = [<<"-----BEGIN ENCRYPTED PRIVATE KEY-----\n">>, base64:encode(Der),
                   <<"\n-----END ENCRYPTED PRIVATE KEY-----\n">>],
            key_of(pem_decode(iolist_to_binary(Pem)), Name, der_source(Value), Password);
        false ->
            {ok, {der, Der}}
    end.

%% An encrypted key begins with its algorithm, every other with a version.
is_encrypted(<<16#30, Len, 16#30, _/binary>>) when Len < 128 -> true;
is_encrypted(<<16#30, 1:1, N:7, _Len:N/unit:8, 16#30, _/binary>>) -> true;
is_encrypted(_) -> false.

%% An error names a file, never a key.
der_source([Der | _]) when is_binary(Der) -> der;
der_source(Value) when is_binary(Value) ->
    case is_der(Value) of
        true -> der;
        false -> Value
    end;
der_source(Name) -> Name.

key_of([], Name, Source, _Password) ->
    {error, {bad(Name), Source, no_key}};
key_of([{Type, Der, not_encrypted} | _], _Name, _Source, _Password) ->
    {ok, {kind(Type), Der}};
key_of([_Encrypted | _], Name, Source, undefined) ->
    {error, {bad(Name), Source, no_password}};
%% The decoder knows no other key derivation than PBKDF2, and would blame the password.
key_of([{_, _, {_, {'PBES2-params', {_, Kdf, _}, _}}} | _], Name, Source, _Password)
  when Kdf =/= {1, 2, 840, 113549, 1, 5, 12} ->
    {error, {bad(Name), Source, unsupported_encryption}};
key_of([Encrypted | _], Name, Source, Password) ->
    try
        Key = public_key:pem_entry_decode(Encrypted, Password),
        {'PrivateKeyInfo', Der, not_encrypted} =
            public_key:pem_entry_encode('PrivateKeyInfo', Key),
        {ok, {pkcs8, Der}}
    catch
        %% The decoder fails in many ways on what a wrong password makes of a key.
        _:_ -> {error, {bad(Name), Source, bad_password}}
    end.

is_key(Type) ->
    lists:member(Type, ['PrivateKeyInfo', 'RSAPrivateKey', 'ECPrivateKey']).

kind('PrivateKeyInfo') -> pkcs8;
kind(_) -> der.

pem_decode(Pem) ->
    try public_key:pem_decode(Pem)
    catch _:_ -> []
    end.

%% A value is a file name, or the thing itself.
content(Name, Value) when is_binary(Value), Value =/= <<>> ->
    content(Name, Value, Value);
content(_Name, [Bin | _] = Ders) when is_binary(Bin) ->
    case lists:all(fun(D) -> is_binary(D) andalso is_der(D) end, Ders) of
        true -> {der, Ders};
        false -> bad
    end;
content(Name, [_ | _] = Value) ->
    case io_lib:char_list(Value) of
        true -> content(Name, Value, unicode:characters_to_binary(Value));
        false -> bad
    end;
content(_Name, _Value) ->
    bad.

%% The value as it was given, and as a binary.
content(Name, Given, Value) ->
    case {binary:match(Value, <<"-----BEGIN ">>), is_der(Value)} of
        {nomatch, true} -> {der, [Value]};
        {nomatch, false} -> file_content(Name, Given, Value);
        _ -> {pem, pem, Value}
    end.

%% A DER sequence that fills the binary.
is_der(<<16#30, Len, Rest/binary>>) when Len < 128 -> byte_size(Rest) =:= Len;
is_der(<<16#30, 1:1, N:7, Len:N/unit:8, Rest/binary>>) when N > 0 -> byte_size(Rest) =:= Len;
is_der(_) -> false.

file_content(Name, Given, File) ->
    case file:read_file(File) of
        {ok, Content} ->
            case is_der(Content) of
                true -> {der, [Content]};
                false -> {pem, Given, Content}
            end;
        {error, badarg} ->
            bad;
        {error, Why} ->
            case is_place(Name, File) of
                true -> {error, Given, Why};
                false -> {error, Name, Why}
            end
    end.

%% Whether this is the name of a file without doubt. Where roots are due nobody has a secret to give.
is_place(Name, File) ->
    case {file:read_link_info(File), filename:split(File)} of
        {{ok, _}, _} -> true;
        {_, [<<"/">>, _, _ | _]} when Name =:= cacertfile -> true;
        {_, [<<"/">>, _]} -> false;
        {_, [_]} -> false;
        _ -> filelib:is_file(filename:dirname(File))
    end.

bad(cert) -> bad_certfile;
bad(certfile) -> bad_certfile;
bad(key) -> bad_keyfile;
bad(keyfile) -> bad_keyfile;
bad(cacertfile) -> bad_cacertfile;
bad(cacerts) -> bad_cacertfile.
