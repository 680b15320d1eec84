defmodule MixApp do
  @moduledoc """
  An echo over QUIC, both ends in one VM: `mix run -e 'MixApp.main()'`.
  """

  @alpn "echo"

  @doc "Sends a megabyte to an echo server and checks what comes back."
  def main do
    # The client knows the server by its key, as SSH does: no certificate authority is needed.
    {public_key, private_key} = :crypto.generate_key(:eddsa, :ed25519)
    port = start_server(public_key, private_key)

    {:ok, conn} =
      :macula_quic.connect("127.0.0.1", port, [alpn: [@alpn], verify_pubkey: public_key], 5000)

    {:ok, stream} = :macula_quic.open_stream(conn)
    data = :crypto.strong_rand_bytes(1_048_576)
    :ok = :macula_quic.send(stream, data, %{fin: true})
    {:ok, ^data} = :macula_quic.recv(stream, byte_size(data), 10_000)
    :ok = :macula_quic.close(conn)
    IO.puts("echoed #{byte_size(data)} bytes over QUIC")
  end

  defp start_server(public_key, private_key) do
    {:ok, {cert, key}} =
      :macula_quic.generate_self_signed_cert(public_key, private_key, ["127.0.0.1"])

    starter = self()

    spawn_link(fn ->
      {:ok, listener} =
        :macula_quic.listen({"127.0.0.1", 0}, cert: cert, key: key, alpn: [@alpn])

      {:ok, {_address, port}} = :macula_quic.sockname(listener)
      send(starter, {:listening, port})
      {:ok, conn} = :macula_quic.accept(listener, :infinity)
      {:ok, stream} = :macula_quic.accept_stream(conn, %{active: 10}, :infinity)
      echo(stream)
    end)

    receive do
      {:listening, port} -> port
    end
  end

  # Ten messages at a time: a client that does not read stops the server from reading, too.
  defp echo(stream) do
    receive do
      {:quic, data, ^stream, _info} when is_binary(data) ->
        :ok = :macula_quic.send(stream, data)
        echo(stream)

      {:quic, :passive, ^stream, :undefined} ->
        :ok = :macula_quic.setopt(stream, :active, 10)
        echo(stream)

      {:quic, :peer_send_shutdown, ^stream, :undefined} ->
        :ok = :macula_quic.async_shutdown_stream(stream, :graceful, 0)
        echo(stream)

      {:quic, :stream_closed, ^stream, _info} ->
        :ok
    end
  end
end
