defmodule MixApp do
  def main, do: (
   {:module, _} = :code.ensure_loaded(:macula_quic_nif)
   IO.puts("native library loaded"))
end
