-module(rebar3_app).
-export([main/0]).
main() -> {module, _} = code:ensure_loaded(macula_quic_nif), io:format("native library loaded~n"), halt().
