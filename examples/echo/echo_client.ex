defmodule EchoClient do
  @moduledoc "A client: one connection, and a stream for each request, whose end is that of the response."
  @behaviour :macula_quic_connection

  def start_link({host, port, trust}) do
    conn_opts = Map.put(trust, :alpn, ["echo"])
    :macula_quic_connection.start_link(__MODULE__, {host, port}, {conn_opts, %{}})
  end

  def request(client, data), do: GenServer.call(client, {:request, data})

  def init(%{stream_opts: %{from: from, data: data}}), do: {:ok, {from, data}}
  def init(_conn_opts), do: {:ok, []}

  # Until there is a connection, the state is the list of requests that wait.
  def connected(conn, _props, waiting),
    do: List.foldr(waiting, {:ok, conn}, fn {request, from}, _ -> handle_call(request, from, conn) end)

  def handle_call(request, from, waiting) when is_list(waiting), do: {:noreply, [{request, from} | waiting]}

  def handle_call({:request, data}, from, conn) do
    {:ok, _} = :macula_quic_stream.start_link(__MODULE__, conn, %{is_local: true, from: from, data: data})
    {:ok, conn}
  end

  # What follows is of :macula_quic_stream, for the processes of the requests.
  def start_completed(stream, _props, {from, data}) do
    :ok = :macula_quic.send(stream, data, %{fin: true})
    {:ok, {from, []}}
  end

  def handle_stream_data(_stream, data, _flags, {from, got}), do: {:ok, {from, [got, data]}}

  def peer_send_shutdown(_stream, :undefined, {from, got}), do: over(from, {:ok, IO.iodata_to_binary(got)})
  def stream_closed(_stream, %{reason: reason}, {from, _got}), do: over(from, {:error, reason})
  defp over(from, answer), do: {:stop, GenServer.reply(from, answer) && :normal, nil}
end
