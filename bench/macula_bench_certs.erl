%% @doc Certificates for `inet_tls', in files, with the options that OTP's documentation gives for
%% verification in both directions.
-module(macula_bench_certs).

-include_lib("public_key/include/public_key.hrl").

-export([write/2]).

%% @doc Writes a certificate authority, a certificate and a key for `Hosts' and the file for
%% `-ssl_dist_optfile' into `Dir'; returns the name of the last.
-spec write(file:filename(), [string()]) -> file:filename().
write(Dir, Hosts) ->
    ok = filelib:ensure_dir(filename:join(Dir, "x")),
    San = #'Extension'{extnID = ?'id-ce-subjectAltName', critical = false,
                       extnValue = [Name || Host <- Hosts, Name <- [{dNSName, Host} | ip(Host)]]},
    Key = [{key, {namedCurve, secp256r1}}, {digest, sha256}],
    Chain = #{root => Key, intermediates => [], peer => [{extensions, [San]} | Key]},
    #{server_config := Config} = public_key:pkix_test_data(#{server_chain => Chain,
                                                              client_chain => Chain}),
    %% One node is server and client with the same certificate; among the roots that a server trusts
    %% here is the one that signed its own.
    Cert = proplists:get_value(cert, Config),
    {KeyType, KeyDer} = proplists:get_value(key, Config),
    Files = [{"cert.pem", [{'Certificate', Cert, not_encrypted}]},
             {"key.pem", [{KeyType, KeyDer, not_encrypted}]},
             {"ca.pem", [{'Certificate', Ca, not_encrypted} || Ca <- proplists:get_value(cacerts, Config)]}],
    [ok = file:write_file(filename:join(Dir, Name), public_key:pem_encode(Entries))
     || {Name, Entries} <- Files],
    Common = [{certfile, filename:join(Dir, "cert.pem")}, {keyfile, filename:join(Dir, "key.pem")},
              {cacertfile, filename:join(Dir, "ca.pem")}, {verify, verify_peer},
              {secure_renegotiate, true}],
    OptFile = filename:join(Dir, "ssl_dist.conf"),
    ok = file:write_file(OptFile, io_lib:format("~p.~n", [[
        {server, [{fail_if_no_peer_cert, true} | Common]}, {client, Common}]])),
    OptFile.

ip(Host) ->
    case inet:parse_address(Host) of
        {ok, Address} when tuple_size(Address) =:= 4 ->
            [{iPAddress, list_to_binary(tuple_to_list(Address))}];
        _ ->
            []
    end.
