%% @doc Names and ports: where a node listens, and where others are.
%%
%% A name whose part before the `@' is a port number (`4433@10.0.0.5') says all. Another name is
%% looked up, in this order: the table in the configuration (`{macula, [{dist_nodes, #{Node =>
%% {Host, Port}}}]}'), the registry of this user's nodes on this host, EPMD (unless the node was
%% started with `-no_epmd' and has no `-epmd_module'; with `-start_epmd false' alone, one that runs is
%% used), and last the default port, 4433. Where an EPMD answers, its answer counts: a name it does not know fails at once.
%% @private
-module(macula_dist_discovery).

-export([split/1, check_name/2, ports/1, register/3, unregister/1, lookup/1, resolvable/1,
         secret/0]).

-include_lib("kernel/include/file.hrl").

-define(DEFAULT_PORT, 4433).

-type address() :: {inet:ip_address(), inet:port_number()}.

%% @doc The two parts of a node's name. The first is a number when it is a port.
-spec split(atom() | string()) -> {inet:port_number() | string(), string()} | false.
split(Node) when is_atom(Node) ->
    split(atom_to_list(Node));
split(Node) when is_list(Node) ->
    %% string:split/3 raises on what is no text.
    case io_lib:char_list(Node) andalso string:split(Node, "@", all) of
        [[_ | _] = Name, [_ | _] = Host] -> {port_or_name(Name), Host};
        _ -> false
    end;
split(_) ->
    false.

port_or_name(Name) ->
    case lists:all(fun(C) -> C >= $0 andalso C =< $9 end, Name) andalso length(Name) =< 5 of
        true ->
            case list_to_integer(Name) of
                Port when Port >= 1, Port =< 65535 -> Port;
                _ -> Name
            end;
        false ->
            Name
    end.

%% @doc Whether the host part suits the way this node is named, as OTP's own carriers check it.
-spec check_name(string(), longnames | shortnames) -> ok | {error, not_longnames | not_shortnames}.
check_name(Host, LongOrShort) ->
    Dots = lists:member($., Host),
    case LongOrShort of
        longnames when not Dots ->
            case inet:parse_address(Host) of
                {ok, _} -> ok;
                _ -> {error, not_longnames}
            end;
        shortnames when Dots ->
            {error, not_shortnames};
        _ ->
            ok
    end.

%% @doc The ports to try to listen on, in order. What the command line says comes before what the
%% name says: where a port is mapped, peers dial another one than the node listens on.
-spec ports(string()) -> [inet:port_number()] | {error, {bad_option, atom(), term()}}.
ports(Name) ->
    case {init:get_argument(macula_dist_port), port_or_name(Name)} of
        {{ok, Args}, _} ->
            case lists:last(Args) of
                [Text] ->
                    case string:to_integer(Text) of
                        {Port, ""} when is_integer(Port), Port >= 0, Port =< 65535 -> [Port];
                        _ -> {error, {bad_option, macula_dist_port, Text}}
                    end;
                Other ->
                    {error, {bad_option, macula_dist_port, Other}}
            end;
        {error, Port} when is_integer(Port) ->
            [Port];
        {error, _} ->
            configured_ports(Name)
    end.

configured_ports(Name) ->
    case {application:get_env(kernel, inet_dist_listen_min), epmd_says(Name)} of
        {_, {ok, Port}} ->
            [Port];
        {{ok, Min}, none} when is_integer(Min) ->
            case application:get_env(kernel, inet_dist_listen_max) of
                {ok, Max} when is_integer(Max), Max >= Min -> lists:seq(Min, Max);
                _ -> [Min]
            end;
        {_, none} ->
            [?DEFAULT_PORT, 0]
    end.

%% A module given with `-epmd_module', or `-erl_epmd_port', may know the port to listen on.
epmd_says(Name) ->
    try epmd_call(listen_port_please, [Name, host()]) of
        {ok, Port} when is_integer(Port), Port > 0 -> {ok, Port};
        _ -> none
    catch
        _:_ -> none
    end.

host() ->
    {ok, Host} = inet:gethostname(),
    Host.

%% @doc Makes the name known where others look.
-spec register(string(), string(), inet:port_number()) -> ok | {error, duplicate_name | term()}.
register(Name, Host, Port) ->
    Carried = port_or_name(Name) =:= Port,
    case epmd() of
        none ->
            register_here(Name, Host, Port, Carried);
        Module ->
            case register_epmd(Module, Name, Port) of
                ok -> ok;
                {error, duplicate_name} = Error -> Error;
                %% A name that carries its port needs nobody to tell it.
                {error, _} when Carried -> ok;
                {error, _} = Error ->
                    case init:get_argument(start_epmd) of
                        %% None was started for us, and none is running.
                        {ok, [["false"]]} -> register_here(Name, Host, Port, Carried);
                        _ -> Error
                    end
            end
    end.

register_epmd(Module, Name, Port) ->
    _ = code:ensure_loaded(Module),
    try
        case erlang:function_exported(Module, register_node, 3) of
            true -> Module:register_node(Name, Port, inet);
            false -> Module:register_node(Name, Port)
        end
    of
        {ok, _Creation} -> ok;
        {error, _} = Error -> Error;
        Other -> {error, Other}
    catch
        exit:{noproc, _} -> {error, epmd_not_running}
    end.

%% The registry is a file per node in a folder of the user: `Port OsPid'.
register_here(_Name, _Host, _Port, true) ->
    ok;
register_here(Name, Host, Port, false) ->
    File = entry(Name ++ "@" ++ Host),
    case read_entry(File) of
        {ok, _, Pid} when is_list(Pid) ->
            case Pid =/= os:getpid() andalso is_alive(Pid) of
                true -> {error, duplicate_name};
                false -> write_entry(File, Port)
            end;
        none ->
            write_entry(File, Port)
    end.

write_entry(none, _Port) ->
    ok;
write_entry(File, Port) ->
    Text = [integer_to_list(Port), $\s, os:getpid(), $\n],
    Temporary = File ++ "." ++ os:getpid(),
    make_dir(filename:dirname(File)),
    %% Without a folder to write to the node is only found by its port; that is no reason not to run.
    case prim_file:write_file(Temporary, Text) of
        ok ->
            _ = prim_file:rename(Temporary, File),
            ok;
        {error, _} ->
            ok
    end.

%% The file server is not running yet when a node starts; hence prim_file here.
make_dir(Dir) ->
    case prim_file:read_file_info(Dir) of
        {ok, _} ->
            ok;
        {error, _} ->
            make_dir(filename:dirname(Dir)),
            _ = prim_file:make_dir(Dir),
            ok
    end.

%% @doc Takes the name back.
-spec unregister(string()) -> ok.
unregister(Node) ->
    File = entry(Node),
    Own = os:getpid(),
    case read_entry(File) of
        {ok, _, Own} ->
            _ = prim_file:delete(File),
            ok;
        _ ->
            ok
    end.

read_entry(none) ->
    none;
read_entry(File) ->
    case prim_file:read_file(File) of
        {ok, Text} ->
            case string:lexemes(binary_to_list(Text), " \n") of
                [Port, Pid] ->
                    case string:to_integer(Port) of
                        {N, ""} when is_integer(N), N > 0, N =< 65535 -> {ok, N, Pid};
                        _ -> none
                    end;
                _ ->
                    none
            end;
        {error, _} ->
            none
    end.

entry(Node) ->
    case home() of
        none -> none;
        Home -> filename:join([Home, "nodes", [escape(C) || C <- Node]])
    end.

%% The folder of this user: `MACULA_HOME', else where the system wants configuration.
home() ->
    try
        case os:getenv("MACULA_HOME") of
            Unset when Unset =:= false; Unset =:= "" -> filename:basedir(user_config, "macula");
            Dir -> Dir
        end
    catch
        _:_ -> none
    end.

%% @doc A secret of this user, made when first asked for and the same ever after; none where there is
%% no folder to keep it in. Nobody else can read it.
-spec secret() -> {ok, <<_:256>>} | none.
secret() ->
    case home() of
        none -> none;
        Home -> secret(filename:join(Home, "dist_secret"))
    end.

secret(File) ->
    case prim_file:read_file(File) of
        {ok, <<Secret:32/binary>>} ->
            {ok, Secret};
        _ ->
            make_dir(filename:dirname(File)),
            Secret = macula_dist_nif:dist_random(),
            Temporary = File ++ "." ++ os:getpid(),
            %% Closed to others before there is anything in it. Of two nodes that start at the same
            %% moment the first one's secret is kept, and read by both.
            Steps = [fun() -> prim_file:write_file(Temporary, <<>>) end,
                     fun() -> prim_file:write_file_info(Temporary, #file_info{mode = 8#600}) end,
                     fun() -> prim_file:write_file(Temporary, Secret) end,
                     fun() -> prim_file:make_link(Temporary, File) end],
            Made = lists:foldl(fun(Step, ok) -> Step(); (_, Error) -> Error end, ok, Steps),
            _ = prim_file:delete(Temporary),
            case {Made, prim_file:read_file(File)} of
                {ok, _} -> {ok, Secret};
                {{error, eexist}, {ok, <<Theirs:32/binary>>}} -> {ok, Theirs};
                _ -> none
            end
    end.

%% Host parts may hold nearly any character; a file's name may not.
escape(C) when C >= $0, C =< $9; C >= $A, C =< $Z; C >= $a, C =< $z;
               C =:= $@; C =:= $.; C =:= $-; C =:= $_ -> C;
escape(C) -> ["%", integer_to_list(C, 16)].

%% Where the system does not show its processes, the dial finds out.
is_alive(Pid) ->
    not exists("/proc/self") orelse exists("/proc/" ++ Pid).

exists(Path) ->
    element(1, prim_file:read_file_info(Path)) =:= ok.

%% @doc Whether a name could be dialled at all.
-spec resolvable(node()) -> boolean().
resolvable(Node) ->
    case split(Node) of
        {Name, Host} ->
            table(Node) =/= none orelse resolve(Host) =/= [] orelse known_to_epmd(Name, Host);
        false ->
            false
    end.

%% Only the module of an `-epmd_module' may know what a host is.
known_to_epmd(Name, Host) ->
    epmd() =/= none andalso is_list(Name) andalso
        try epmd_call(address_please, [Name, Host, inet]) of
            Answer -> element(1, Answer) =:= ok
        catch
            _:_ -> false
        end.

%% @doc Where a node can be reached.
-spec lookup(node()) -> {ok, [address()]} | {error, term()}.
lookup(Node) ->
    case {table(Node), split(Node)} of
        {{Host, Port}, _} -> at(Host, Port);
        {none, {Port, Host}} when is_integer(Port) -> at(Host, Port);
        {none, {Name, Host}} -> lookup_here(Node, Name, Host);
        {none, false} -> {error, bad_name}
    end.

lookup_here(Node, Name, Host) ->
    case read_entry(entry(atom_to_list(Node))) of
        {ok, Port, Pid} ->
            case is_alive(Pid) of
                true -> at(Host, Port);
                false -> lookup_epmd(Name, Host)
            end;
        none ->
            lookup_epmd(Name, Host)
    end.

lookup_epmd(Name, Host) ->
    case epmd() of
        none -> at(Host, ?DEFAULT_PORT);
        Module -> lookup_epmd(Module, Name, Host)
    end.

lookup_epmd(Module, Name, Host) ->
    case epmd_call(address_please, [Name, Host, inet]) of
        {ok, Ip, Port, _Version} ->
            {ok, [{Ip, Port}]};
        {ok, Ip} ->
            port_please(Module, Name, Ip, Host);
        _ ->
            case resolve(Host) of
                [Ip | _] -> port_please(Module, Name, Ip, Host);
                [] -> {error, nxdomain}
            end
    end.

port_please(Module, Name, Ip, Host) ->
    case Module:port_please(Name, Ip) of
        {port, Port, _Version} ->
            {ok, [{Ip, Port}]};
        _ when Module =:= erl_epmd ->
            %% Not known there, or no EPMD there: only in the second case is it worth going on.
            case erl_epmd:names(Ip) of
                {ok, _} -> {error, not_registered};
                {error, _} -> at(Host, ?DEFAULT_PORT)
            end;
        _ ->
            {error, not_registered}
    end.

at(Host, Port) when is_tuple(Host) ->
    {ok, [{Host, Port}]};
at(Host, Port) ->
    case resolve(Host) of
        [] -> {error, nxdomain};
        Ips -> {ok, [{Ip, Port} || Ip <- Ips]}
    end.

resolve(Host) ->
    case inet:getaddr(Host, inet) of
        {ok, Ip} ->
            [Ip];
        {error, _} ->
            case inet:getaddr(Host, inet6) of
                {ok, Ip} -> [Ip];
                {error, _} -> []
            end
    end.

table(Node) ->
    Table = application:get_env(macula, dist_nodes, #{}),
    Found = if
        is_map(Table) -> maps:get(Node, Table, none);
        is_list(Table) -> proplists:get_value(Node, Table, none);
        true -> none
    end,
    case Found of
        {Host, Port} when is_integer(Port), Port > 0, Port =< 65535 -> {Host, Port};
        _ -> none
    end.

%% The module that knows EPMD, or none when the node was started to do without.
epmd() ->
    case net_kernel:epmd_module() of
        erl_epmd ->
            Off = init:get_argument(no_epmd) =/= error,
            Fixed = init:get_argument(erl_epmd_port) =/= error,
            if
                Off andalso not Fixed -> none;
                true -> erl_epmd
            end;
        Module ->
            Module
    end.

%% Not every `-epmd_module' has every function; OTP's own has.
epmd_call(Function, Args) ->
    Module = net_kernel:epmd_module(),
    _ = code:ensure_loaded(Module),
    case erlang:function_exported(Module, Function, length(Args)) of
        true -> apply(Module, Function, Args);
        false -> apply(erl_epmd, Function, Args)
    end.
