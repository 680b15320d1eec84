%% @doc Hosts and addresses: literals, and names resolved to all their addresses.
%% @private
-module(macula_quic_address).

-export([literal/1, host/1, resolve/3, resolve_rest/2, forget/1]).

-export_type([pending/0]).

-type literal() :: binary().
-opaque pending() :: #{reference() => {pos_integer(), pid()}}.
%% Lookups that have not ended, with the places of their families.

%% How long the addresses of one family wait for those of the other: a resolver may answer for one alone.
-define(RESOLUTION_DELAY, 250).

%% @doc The text of an IP address given as a tuple, a string or a binary; brackets around an IPv6
%% address are dropped. An address that counts on one link only has the number of the interface behind a
%% `%' in the result, where the caller gave the number or the name, or `{Address, Number}'.
-spec literal(term()) -> {ok, literal()} | error.
literal({Ip, Scope}) when is_tuple(Ip), is_integer(Scope), Scope > 0, Scope =< 16#ffffffff ->
    case inet:is_ipv6_address(Ip) of
        true -> {ok, scoped(inet:ntoa(Ip), Scope)};
        false -> error
    end;
literal(Address) when is_tuple(Address) ->
    case inet:ntoa(Address) of
        {error, einval} -> error;
        Text -> {ok, list_to_binary(Text)}
    end;
literal(Address) ->
    case host(Address) of
        {ok, Host} ->
            on_link(string:split(Host, "%"));
        error ->
            error
    end.

%% `fe80::1%2' or `fe80::1%eth0'.
on_link([Plain]) ->
    %% Strict: "1" is a name, not 0.0.0.1.
    case inet:parse_strict_address(Plain) of
        {ok, _} -> {ok, list_to_binary(Plain)};
        {error, einval} -> error
    end;
on_link([Ip, Zone]) ->
    %% inet would take any text for a scope, and forget it.
    case {inet:parse_ipv6strict_address(Ip), zone(Zone)} of
        {{ok, _}, {ok, Scope}} -> {ok, scoped(Ip, Scope)};
        _ -> error
    end.

scoped(Ip, Scope) ->
    iolist_to_binary([Ip, "%", integer_to_list(Scope)]).

zone(Zone) ->
    case string:to_integer(Zone) of
        {Scope, ""} when is_integer(Scope), Scope >= 0, Scope =< 16#ffffffff ->
            {ok, Scope};
        _ ->
            try net:if_name2index(Zone) of
                {ok, Scope} -> {ok, Scope};
                {error, _} -> error
            catch
                %% A system where it is not known, or what can be nobody's name.
                error:_ -> error
            end
    end.

%% @doc A host as a string, without brackets.
-spec host(term()) -> {ok, string()} | error.
host(Host) when is_binary(Host) ->
    host(binary_to_list(Host));
host(Host) when is_atom(Host), Host =/= undefined ->
    host(atom_to_list(Host));
host("[" ++ Rest) ->
    case lists:reverse(Rest) of
        "]" ++ Host -> host(lists:reverse(Host));
        _ -> error
    end;
host([_ | _] = Host) ->
    %% A name in DNS has at most 253 characters (RFC 1035).
    case io_lib:latin1_char_list(Host) andalso length(Host) =< 253
         andalso not lists:any(fun(C) -> C =< $\s end, Host) of
        true -> {ok, Host};
        false -> error
    end;
host(_) ->
    error.

%% @doc The addresses of a host, IPv6 and IPv4 in turn, IPv6 first (RFC 8305, section 4). Once those of one family are
%% known, the other one has a quarter of a second more (section 3). A lookup that is left then is for
%% `resolve_rest/2' or `forget/1'.
-spec resolve(string(), any | inet | inet6, integer() | infinity) ->
          {ok, [literal()], pending()} | {error, nxdomain | timeout | term()}.
resolve(Host, Family, Deadline) ->
    Families = case Family of
        any -> [inet6, inet];
        One -> [One]
    end,
    %% In processes of their own: the resolver has no deadline over everything.
    Lookups = [begin
        {Pid, Monitor} = lookup(Host, F),
        {Monitor, {Place, Pid}}
    end || {Place, F} <- lists:enumerate(Families)],
    gather(maps:from_list(Lookups), Deadline, []).

%% @doc The addresses that the lookups which are left find.
-spec resolve_rest(pending(), integer() | infinity) -> [literal()].
resolve_rest(Pending, Deadline) ->
    case gather(Pending, Deadline, []) of
        {ok, Addresses, Rest} ->
            ok = forget(Rest),
            Addresses;
        {error, _} ->
            []
    end.

%% @doc Ends the lookups that are left.
-spec forget(pending()) -> ok.
forget(Pending) ->
    maps:foreach(fun(Monitor, {_Place, Pid}) ->
        exit(Pid, kill),
        erlang:demonitor(Monitor, [flush])
    end, Pending).

%% Its exit reason is the result.
-dialyzer({nowarn_function, lookup/2}).
lookup(Host, Family) ->
    spawn_monitor(fun() -> exit({resolved, inet:getaddrs(Host, Family)}) end).

gather(Pending, _Until, Results) when map_size(Pending) =:= 0 ->
    known(Pending, Results);
gather(Pending, Until, Results) ->
    receive
        {'DOWN', Monitor, process, _Pid, Reason} when is_map_key(Monitor, Pending) ->
            {{Place, _}, Rest} = maps:take(Monitor, Pending),
            case Reason of
                {resolved, {ok, _} = Known} ->
                    %% An atom, so infinity, is larger than any number.
                    Sooner = min(Until, macula_quic_call:deadline(?RESOLUTION_DELAY)),
                    gather(Rest, Sooner, [{Place, Known} | Results]);
                {resolved, Error} ->
                    gather(Rest, Until, [{Place, Error} | Results]);
                _ ->
                    gather(Rest, Until, [{Place, {error, Reason}} | Results])
            end
    after macula_quic_call:left(Until) ->
        known(Pending, Results)
    end.

known(Pending, Results) ->
    case interleave([Ips || {_Place, {ok, Ips}} <- lists:sort(Results)]) of
        [] when map_size(Pending) > 0 ->
            ok = forget(Pending),
            {error, timeout};
        [] ->
            {error, failure([Result || {_Place, Result} <- Results])};
        Ips ->
            {ok, [list_to_binary(inet:ntoa(Ip)) || Ip <- Ips], Pending}
    end.

%% The error that says most: a name that does not exist is no error of the resolver.
failure(Results) ->
    case [Why || {error, Why} <- Results, Why =/= nxdomain, Why =/= eafnosupport] of
        [Why | _] -> Why;
        [] -> nxdomain
    end.

interleave([[], B]) -> B;
interleave([A, []]) -> A;
interleave([[A | As], Bs]) -> [A | interleave([Bs, As])];
interleave([A]) -> A;
interleave([]) -> [].
