%% @doc The VM boundary: the stubs of the native functions and their loading, nothing else.
%% @private
-module(macula_quic_nif).

-on_load(init/0).

-spec init() -> ok | {error, term()}.
init() ->
    %% Runs before any application is started when the distribution loads it: no application
    %% environment, no logger. The file is found beside the code, whatever the directory is called.
    Priv = case code:priv_dir(macula) of
        {error, bad_name} ->
            filename:join(filename:dirname(filename:dirname(code:which(?MODULE))), "priv");
        Dir ->
            Dir
    end,
    erlang:load_nif(filename:join(Priv, "macula_quic"), 0).
