defmodule EchoServer do
  @moduledoc "An echo server: a process for each connection, and one for each stream."
  @behaviour :macula_quic_connection

  def start_link({port, credentials}),
    do: :macula_quic_connection.start_listener(options(port, credentials))

  # Under a supervisor: children = [{EchoServer, {port, credentials}}]
  def child_spec({port, credentials}),
    do: :macula_quic_connection.child_spec(options(port, credentials))

  defp options(port, credentials) do
    %{
      callback: __MODULE__,
      listen_on: port,
      listen_opts: Map.put(credentials, :alpn, ["echo"]),
      stream_opts: %{stream_callback: __MODULE__}
    }
  end

  def init(conn_opts), do: {:ok, conn_opts}
  def new_conn(_conn, _props, state), do: {:ok, state}

  # Of :macula_quic_stream.
  def init_handoff(_stream, _stream_opts, _conn, _props), do: {:ok, nil}

  def handle_stream_data(stream, data, _flags, state) do
    :ok = :macula_quic.send(stream, data)
    {:ok, state}
  end

  def peer_send_shutdown(stream, :undefined, state) do
    :ok = :macula_quic.async_shutdown_stream(stream, :graceful, 0)
    {:ok, state}
  end
end
