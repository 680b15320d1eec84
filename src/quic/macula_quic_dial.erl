%% @doc From a host to a connection: resolution, then all addresses, under one deadline.
%% @private
-module(macula_quic_dial).

-export([connect/4]).

%% @doc Connects with options that `macula_quic_options:connect/1' has checked.
-spec connect(term(), inet:port_number(), map(), macula_quic_time:deadline()) ->
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
        true -> {error, {bad_option, host, "no such interface"}};
        false -> resolve(Name, Port, Options, Deadline)
    end.

resolve(Name, Port, Options, Deadline) ->
    case macula_quic_address:resolve(Name, family(Options), Deadline) of
        {ok, Addresses} -> dial(Addresses, list_to_binary(Name), Port, Options, Deadline);
        Error -> Error
    end.

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
    Native = Options#{addresses => Addresses, port => Port, server_name => Name},
    macula_quic_call:call(fun(Ref) -> macula_nif:conn_dial(Ref, Native) end,
                          %% An atom, so infinity, is larger than any number.
                          min(Handshake, macula_quic_time:left(Deadline))).
