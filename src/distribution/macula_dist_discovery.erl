%% @doc Names and ports: where a node listens, and where others are.
%%
%% A name whose part before the `@' is a port number (`4433@10.0.0.5') says all. Another name is
%% looked up, in this order: the table in the configuration (`{macula, [{dist_nodes, #{Node =>
%% {Host, Port}}}]}'), the registry of this user's nodes on this host, EPMD (unless the node was
%% started with `-no_epmd' and has no `-epmd_module'; with `-start_epmd false' alone, one that runs is
%% used), and last the default port, 4433. Where an EPMD answers, its answer counts: a name it does not know fails at once.
%% @private
-module(macula_dist_discovery).

-export([split/1, check_name/2, ports/1, register/3, unregister/1, lookup/2, address/1,
         secret/0]).
%% Internal, spawned.
-export([do_find/2]).

-include_lib("kernel/include/file.hrl").

-define(DEFAULT_PORT, 4433).

%% How long the other lookups may take when one has an answer, in milliseconds.
-define(OTHERS, 500).
%% And how long when an EPMD of the host does not know the name. The other family mostly leads to the same EPMD, and a
%% resolver may have no answer for that family (RFC 8305, section 3).
-define(OTHERS_IF_UNKNOWN, 50).

-type host_address() :: inet:ip_address() | {inet:ip6_address(), Scope :: pos_integer()}.
%% An address of one link comes with the number of its interface.
-type address() :: {host_address(), inet:port_number()}.
-export_type([host_address/0, address/0]).

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
            case address(Host) of
                {ok, _} -> ok;
                error -> {error, not_longnames}
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
                {ok, Max} when is_integer(Max) -> range(Min, Max);
                _ -> range(Min, Min)
            end;
        {_, none} ->
            [?DEFAULT_PORT, 0]
    end.

range(Min, _Max) when Min < 0; Min > 65535 -> {error, {bad_option, inet_dist_listen_min, Min}};
range(Min, Max) when Max < Min; Max > 65535 -> {error, {bad_option, inet_dist_listen_max, Max}};
range(Min, Max) -> lists:seq(Min, Max).

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

%% The registry is a file per node in a folder of the user: `Port OsPid Start'. The time at which the process was
%% started, where the system tells, keeps another process with the number of one that was killed from being taken
%% for the node.
register_here(_Name, _Host, _Port, true) ->
    ok;
register_here(Name, Host, Port, false) ->
    File = entry(Name ++ "@" ++ Host),
    case read_entry(File) of
        {ok, _, {Pid, _} = Process} ->
            case Pid =/= os:getpid() andalso is_alive(Process) of
                true -> {error, duplicate_name};
                false -> write_entry(File, Port)
            end;
        none ->
            write_entry(File, Port)
    end.

write_entry(none, _Port) ->
    ok;
write_entry(File, Port) ->
    Text = [integer_to_list(Port), $\s, os:getpid(), $\s, start_of("self"), $\n],
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
        {ok, _, {Own, _}} ->
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
                [Port, Pid | Start] ->
                    case string:to_integer(Port) of
                        {N, ""} when is_integer(N), N > 0, N =< 65535 -> {ok, N, {Pid, lists:append(Start)}};
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
        Home -> filename:join([Home, "nodes", entry_name(lists:flatten([escape(C) || C <- Node]))])
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
%% A file's name has 255 bytes at most, and that of the temporary file ends with the number of the process.
entry_name(Name) when length(Name) =< 200 ->
    Name;
entry_name(Name) ->
    <<Digest:128>> = erlang:md5(Name),
    lists:sublist(Name, 150) ++ "%" ++ integer_to_list(Digest, 16).

escape(C) when C >= $0, C =< $9; C >= $A, C =< $Z; C >= $a, C =< $z;
               C =:= $@; C =:= $.; C =:= $-; C =:= $_ -> C;
escape(C) -> ["%", integer_to_list(C, 16)].

%% Where the system does not show its processes, the dial finds out.
is_alive({Pid, Start}) ->
    not exists("/proc/self")
        orelse exists("/proc/" ++ Pid) andalso (Start =:= "" orelse start_of(Pid) =:= Start).

%% The 22nd word of what Linux tells of a process; the second one is a name in parentheses that may have spaces.
start_of(Pid) ->
    case prim_file:read_file("/proc/" ++ Pid ++ "/stat") of
        {ok, Stat} ->
            [_, Rest] = string:split(binary_to_list(Stat), ")", trailing),
            lists:nth(20, string:lexemes(Rest, " "));
        {error, _} ->
            ""
    end.

exists(Path) ->
    element(1, prim_file:read_file_info(Path)) =:= ok.

%% @doc Where a node can be reached, in the order in which the addresses are to be tried. The names
%% of hosts are looked up, which takes no longer than the time given, in milliseconds.
-spec lookup(node(), non_neg_integer()) -> {ok, [address()]} | {error, term()}.
lookup(Node, Time) ->
    Deadline = now_ms() + Time,
    case {table(Node), split(Node)} of
        {{Host, Port}, _} -> at(Host, Port, Deadline);
        {none, {Port, Host}} when is_integer(Port) -> at(Host, Port, Deadline);
        {none, {Name, Host}} -> lookup_here(Node, Name, Host, Deadline);
        {none, false} -> {error, bad_name}
    end.

lookup_here(Node, Name, Host, Deadline) ->
    case read_entry(entry(atom_to_list(Node))) of
        {ok, Port, Process} ->
            case is_alive(Process) of
                true -> at(Host, Port, Deadline);
                false -> lookup_epmd(Name, Host, Deadline)
            end;
        none ->
            lookup_epmd(Name, Host, Deadline)
    end.

lookup_epmd(Name, Host, Deadline) ->
    case epmd() of
        none ->
            at(Host, ?DEFAULT_PORT, Deadline);
        erl_epmd ->
            case address(Host) of
                {ok, Ip} -> registered(ask_epmds(Name, [Ip], Deadline));
                error when is_list(Host) -> registered(ask_epmds_of(Name, Host, Deadline));
                error -> {error, nxdomain}
            end;
        Module ->
            lookup_module(Module, Name, Host, Deadline)
    end.

%% Both families at the same time, each with the EPMDs it leads to.
ask_epmds_of(Name, Host, Deadline) ->
    Ask = fun(Family) ->
        ask_epmds(Name, unmapped(addresses(Host, Family)), Deadline)
    end,
    Patience = fun
        ([]) ->
            none;
        (Answers) ->
            case [Answer || {_, Answer} <- Answers, Answer =/= not_registered] of
                [] -> ?OTHERS_IF_UNKNOWN;
                _ -> ?OTHERS
            end
    end,
    lists:append(in_parallel(Ask, [inet6, inet], Patience, [], Deadline)).

%% The EPMD at each address is asked at the same time. One that does not answer says nothing against its address: it
%% may serve another one of the same host.
ask_epmds(Name, Ips, Deadline) ->
    Ask = fun(Ip) ->
        Plain = plain(Ip),
        case erl_epmd:port_please(Name, Plain, remaining(Deadline)) of
            {port, Port, _Version} ->
                {port, Port};
            _ ->
                %% Not known there, or no EPMD there.
                case erl_epmd:names(Plain) of
                    {ok, _} -> not_registered;
                    {error, _} -> no_answer
                end
        end
    end,
    Patience = fun({port, _}) -> ?OTHERS; (_) -> none end,
    lists:zip(Ips, in_parallel(Ask, Ips, Patience, no_answer, Deadline)).

registered([]) ->
    {error, nxdomain};
registered(Found) ->
    Answers = [{Ip, proplists:get_value(Ip, Found)} || Ip <- in_turn([Ip || {Ip, _} <- Found])],
    case [Port || {_, {port, Port}} <- Answers] of
        [First | _] ->
            {ok, [case Answer of
                      {port, Port} -> {Ip, Port};
                      no_answer -> {Ip, First}
                  end || {Ip, Answer} <- Answers, Answer =/= not_registered]};
        [] ->
            %% Where no EPMD is at all it is worth going on.
            case lists:keymember(not_registered, 2, Answers) of
                true -> {error, not_registered};
                false -> {ok, [{Ip, ?DEFAULT_PORT} || {Ip, _} <- Answers]}
            end
    end.

%% A module of the user's, which need not know of families.
lookup_module(Module, Name, Host, Deadline) ->
    case epmd_call(address_please, [Name, Host, inet]) of
        {ok, Ip, Port, _Version} ->
            {ok, [{Ip, Port}]};
        {ok, Ip} ->
            port_please(Module, Name, [Ip]);
        _ ->
            case epmd_call(address_please, [Name, Host, inet6]) of
                {ok, Ip, Port, _Version} -> {ok, [{Ip, Port}]};
                {ok, Ip} -> port_please(Module, Name, [Ip]);
                _ -> port_please(Module, Name, resolve(Host, Deadline))
            end
    end.

port_please(_Module, _Name, []) ->
    {error, nxdomain};
port_please(Module, Name, Ips) ->
    case [{Ip, Port} || Ip <- Ips, {port, Port, _} <- [Module:port_please(Name, plain(Ip))]] of
        [] -> {error, not_registered};
        Found -> {ok, Found}
    end.

at(Host, Port, Deadline) ->
    case resolve(Host, Deadline) of
        [] -> {error, nxdomain};
        Ips -> {ok, [{Ip, Port} || Ip <- Ips]}
    end.

%% All addresses of a host: both families are asked for at the same time.
resolve(Host, Deadline) ->
    case address(Host) of
        {ok, Ip} ->
            [Ip];
        error when is_list(Host) ->
            Ask = fun(Family) -> addresses(Host, Family) end,
            Patience = fun([]) -> none; (_) -> ?OTHERS end,
            in_turn(unmapped(lists:append(in_parallel(Ask, [inet6, inet], Patience, [], Deadline))));
        error ->
            []
    end.

addresses(Host, Family) ->
    case inet:getaddrs(Host, Family) of
        {ok, Ips} -> Ips;
        {error, _} -> []
    end.

%% @doc An address that is written as one: a tuple, or text, with the interface behind a `%' where the
%% address counts on one link only.
-spec address(term()) -> {ok, host_address()} | error.
address(Text) when is_list(Text) ->
    case io_lib:char_list(Text) andalso string:split(Text, "%") of
        [Plain] ->
            case inet:parse_strict_address(Plain) of
                {ok, Ip} -> {ok, Ip};
                {error, _} -> short_address(Plain)
            end;
        [Plain, Zone] ->
            case {inet:parse_ipv6strict_address(Plain), zone(Zone)} of
                {{ok, Ip}, {ok, Scope}} -> {ok, {Ip, Scope}};
                _ -> error
            end;
        _ ->
            error
    end;
address({Ip, Scope} = Address) when is_integer(Scope), Scope > 0, Scope =< 16#ffffffff ->
    case inet:is_ipv6_address(Ip) of
        true -> {ok, Address};
        false -> error
    end;
address(Ip) ->
    case inet:is_ip_address(Ip) of
        true -> {ok, Ip};
        false -> error
    end.

%% As inet has them: 127.1 is an address too.
short_address(Text) ->
    case inet:parse_address(Text) of
        {ok, Ip} -> {ok, Ip};
        {error, _} -> error
    end.

%% The number or the name of an interface.
zone(Zone) ->
    case string:to_integer(Zone) of
        {Scope, ""} when is_integer(Scope), Scope > 0, Scope =< 16#ffffffff ->
            {ok, Scope};
        _ ->
            try net:if_name2index(Zone) of
                {ok, Scope} -> {ok, Scope};
                {error, _} -> error
            catch
                %% A system where it is not known.
                error:_ -> error
            end
    end.

plain({Ip, Scope}) when is_tuple(Ip), is_integer(Scope) -> Ip;
plain(Ip) -> Ip.

%% One family after the other, as RFC 8305 has it, IPv6 first, and each address once.
in_turn(Ips) ->
    {Four, Six} = lists:partition(fun(Ip) -> tuple_size(Ip) =:= 4 end, Ips),
    unique(zip(Six, Four)).

%% IPv4 addresses that were found as IPv6 ones.
unmapped(Ips) ->
    [case Ip of
         {0, 0, 0, 0, 0, 16#ffff, _, _} -> inet:ipv4_mapped_ipv6_address(Ip);
         _ -> Ip
     end || Ip <- Ips].

zip([Six | Sixes], [Four | Fours]) -> [Six, Four | zip(Sixes, Fours)];
zip(Sixes, Fours) -> Sixes ++ Fours.

unique([Ip | Ips]) -> [Ip | unique([Other || Other <- Ips, Other =/= Ip])];
unique([]) -> [].

%% The function's results for all arguments, each found by a process of its own. Of each result Patience says how
%% many milliseconds more the others get, or `none' where it changes nothing; Default stands for what is not there
%% by then.
in_parallel(Fun, Args, Patience, Default, Deadline) ->
    Workers = [spawn_monitor(?MODULE, do_find, [Fun, Arg]) || Arg <- Args],
    Found = collect(maps:from_list(Workers), #{}, Patience, Deadline),
    [maps:get(Pid, Found, Default) || {Pid, _} <- Workers].

-spec do_find(fun((term()) -> term()), term()) -> no_return().
do_find(Fun, Arg) ->
    exit({found, Fun(Arg)}).

collect(Waiting, Found, _Patience, _Deadline) when map_size(Waiting) =:= 0 ->
    Found;
collect(Waiting, Found, Patience, Deadline) ->
    receive
        {'DOWN', _, process, Pid, Reason} when is_map_key(Pid, Waiting) ->
            Rest = maps:remove(Pid, Waiting),
            case Reason of
                {found, Result} ->
                    NewDeadline = case Patience(Result) of
                        none -> Deadline;
                        More -> now_ms() + min(More, remaining(Deadline) div 2)
                    end,
                    collect(Rest, Found#{Pid => Result}, Patience, NewDeadline);
                _ ->
                    collect(Rest, Found, Patience, Deadline)
            end
    after remaining(Deadline) ->
        _ = [begin
                 _ = erlang:demonitor(Monitor, [flush]),
                 exit(Pid, kill)
             end || {Pid, Monitor} <- maps:to_list(Waiting)],
        Found
    end.

now_ms() ->
    erlang:monotonic_time(millisecond).

remaining(Deadline) ->
    max(0, Deadline - now_ms()).

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
