%% @doc The native library as a file, and as the VM's guard against crashes that nobody is told of.
%%
%% Both are needed before any application is started, and while a release boots.
%% @private
-module(macula_library).

-export([priv/0, guard/0]).

-define(NAME, "macula_nif").

%% @doc The directory of the library. It is found beside the code, whatever the directory is called.
-spec priv() -> file:filename().
priv() ->
    case code:priv_dir(macula) of
        {error, bad_name} ->
            filename:join(filename:dirname(filename:dirname(code:which(?MODULE))), "priv");
        Dir ->
            Dir
    end.

%% @doc Makes sure that peers hear of a crash. The VM tells no NIF that it is about to write a crash
%% dump, but each driver that has a port. The library is a driver, too; one port of it lives as long as
%% the VM, whoever opened it.
-spec guard() -> ok | {error, term()}.
guard() ->
    case whereis(macula_guard) of
        undefined ->
            case erl_ddll:load(priv(), ?NAME) of
                ok -> keep_guard(open_port({spawn_driver, ?NAME}, []));
                {error, _} = Error -> Error
            end;
        _Port ->
            ok
    end.

keep_guard(Port) ->
    try register(macula_guard, Port) of
        true ->
            _ = unlink(Port),
            ok
    catch
        %% Another process was faster.
        error:badarg ->
            true = port_close(Port),
            ok
    end.
