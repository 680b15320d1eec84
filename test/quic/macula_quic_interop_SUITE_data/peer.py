"""A peer of macula_quic_interop_SUITE on aioquic.

    peer.py server OPTIONS    serves until its standard input ends
    peer.py client OPTIONS    obeys the lines of its standard input, each a JSON list

The options are a JSON object, what is said are Erlang terms. A stream begins with a letter: `e` is
echoed, `k` as well after an update of the keys, `h` answered with the SHA-256 of what follows it, `g`
and a count of 8 bytes answered with so many bytes, `r` and `s` with 8 bytes reset and stopped with that
code, `x` with 8 bytes closes the connection. A unidirectional stream is answered by another one with the
SHA-256 of all of it, a datagram by itself.
"""

import asyncio
import hashlib
import json
import logging
import ssl
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicProtocolVersion

UNKNOWN_VERSION = 0x1A2A3A4A


def say(what, value):
    print("{%s, %s}." % (what, json.dumps(value)), flush=True)


def block(count):
    return (b"0123456789abcdef" * (count // 16 + 1))[:count]


class Peer(QuicConnectionProtocol):
    def __init__(self, *args, serving=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.serving = serving
        self.received = {}
        self.ended = {}
        self.stopped = {}
        self.datagrams = []
        self.closed = None
        self.news = asyncio.Event()

    def quic_event_received(self, event):
        if isinstance(event, events.StreamDataReceived):
            data = self.received.setdefault(event.stream_id, bytearray())
            data.extend(event.data)
            if self.serving and not self.is_mine(event.stream_id):
                self.serve(event.stream_id, data, event.data, event.end_stream)
            if event.end_stream:
                self.ended[event.stream_id] = "fin"
        elif isinstance(event, events.StreamReset):
            self.ended[event.stream_id] = event.error_code
        elif isinstance(event, events.StopSendingReceived):
            self.stopped[event.stream_id] = event.error_code
        elif isinstance(event, events.DatagramFrameReceived):
            if self.serving:
                self._quic.send_datagram_frame(event.data)
                self.transmit()
            self.datagrams.append(event.data)
        elif isinstance(event, events.ConnectionTerminated):
            # An application names no frame.
            self.closed = [event.error_code, event.frame_type is None, event.reason_phrase]
            if self.serving:
                say("closed", self.closed)
        self.news.set()

    def is_mine(self, stream_id):
        return bool(stream_id & 1) != self._quic._is_client

    def serve(self, stream_id, data, new, end):
        quic = self._quic
        if stream_id & 2:
            if end:
                back = quic.get_next_available_stream_id(is_unidirectional=True)
                quic.send_stream_data(back, hashlib.sha256(data).digest(), True)
        elif not data:
            quic.send_stream_data(stream_id, b"", end)
        elif data[:1] in (b"e", b"k"):
            if data[:1] == b"k" and len(data) == len(new):
                quic.request_key_update()
            quic.send_stream_data(stream_id, bytes(new), end)
        elif data[:1] == b"h":
            if end:
                quic.send_stream_data(stream_id, hashlib.sha256(data[1:]).digest(), True)
        elif len(data) >= 9:
            number = int.from_bytes(data[1:9], "big")
            if data[:1] == b"g":
                quic.send_stream_data(stream_id, block(number), True)
            elif data[:1] == b"r":
                quic.reset_stream(stream_id, number)
            elif data[:1] == b"s":
                quic.stop_stream(stream_id, number)
            elif data[:1] == b"x":
                quic.close(error_code=number, reason_phrase="asked to")
        self.transmit()

    async def until(self, done):
        while not done():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 20)

    async def answer(self, stream_id):
        await self.until(lambda: stream_id in self.ended)
        return self.ended[stream_id], bytes(self.received.get(stream_id, b""))

    def open(self, data, end=True, uni=False):
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional=uni)
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()
        return stream_id

    # What a client is told to do; each answers with what is to be compared.

    async def do_info(self):
        return [self._quic.tls.alpn_negotiated, self._quic._version]

    async def do_resumed(self):
        return self._quic.tls.session_resumed

    async def do_early(self):
        return [await self.answer(self.early) == ("fin", b"eearly"), self._quic.tls.early_data_accepted]

    async def do_retried(self):
        return self._quic._retry_source_connection_id is not None

    async def do_echo(self, streams, size):
        data = block(size)
        ids = [self.open(b"e" + data) for _ in range(streams)]
        return all([await self.answer(i) == ("fin", b"e" + data) for i in ids])

    async def do_up(self, size):
        end, digest = await self.answer(self.open(b"h" + block(size)))
        return [end, digest == hashlib.sha256(block(size)).digest()]

    async def do_down(self, size):
        end, data = await self.answer(self.open(b"g" + size.to_bytes(8, "big")))
        return [end, data == block(size)]

    async def do_uni(self, streams, size):
        before = {i for i in self.ended}
        for _ in range(streams):
            self.open(block(size), uni=True)
        fresh = lambda: [i for i in self.ended if i not in before and i & 3 == 3]
        await self.until(lambda: len(fresh()) == streams)
        digest = hashlib.sha256(block(size)).digest()
        return all(bytes(self.received[i]) == digest for i in fresh())

    async def do_empty(self):
        end, data = await self.answer(self.open(b""))
        return [end, data == b""]

    async def do_hold(self):
        """A stream that the other side ends when it likes to."""
        self.open(b"w")
        return "held"

    async def do_half(self):
        """The end comes alone, and much later than the data."""
        stream_id = self.open(b"h" + block(1000), end=False)
        await self.do_ping()
        self._quic.send_stream_data(stream_id, b"", True)
        self.transmit()
        end, digest = await self.answer(stream_id)
        return [end, digest == hashlib.sha256(block(1000)).digest()]

    async def do_reset(self, code):
        return (await self.answer(self.open(b"r" + code.to_bytes(8, "big"), end=False)))[0]

    async def do_stop(self, code):
        stream_id = self.open(b"s" + code.to_bytes(8, "big"), end=False)
        await self.until(lambda: stream_id in self.stopped)
        return self.stopped[stream_id]

    async def do_abort(self, code):
        stream_id = self.open(b"e" + block(100), end=False)
        await self.until(lambda: len(self.received.get(stream_id, b"")) == 101)
        self._quic.reset_stream(stream_id, code)
        self._quic.stop_stream(stream_id, code + 1)
        self.transmit()
        return "aborted"

    async def do_datagrams(self, size):
        before = len(self.datagrams)
        self._quic.send_datagram_frame(block(size))
        self.transmit()
        await self.until(lambda: len(self.datagrams) > before)
        return self.datagrams[-1] == block(size)

    async def do_key_update(self):
        self._quic.request_key_update()
        return await self.do_echo(1, 10000)

    async def do_ping(self):
        await asyncio.wait_for(self.ping(), 20)
        return "pong"

    async def do_ask_close(self, code):
        self.open(b"x" + code.to_bytes(8, "big"))
        await self.until(lambda: self.closed is not None)
        return self.closed

    async def do_close(self, code, reason):
        self.close(error_code=code, reason_phrase=reason or "")
        await self.wait_closed()
        return "closed"


def configuration(options, is_client):
    config = QuicConfiguration(
        alpn_protocols=[options.get("alpn", "interop")],
        is_client=is_client,
        max_datagram_frame_size=65536,
        idle_timeout=20.0,
    )
    if "cert" in options:
        config.load_cert_chain(options["cert"], options["key"])
    if "ca" in options:
        config.load_verify_locations(options["ca"])
    if is_client:
        config.server_name = "localhost"
        config.verify_mode = ssl.CERT_REQUIRED
    return config


class Asking(Peer):
    """Serves clients that show a certificate, which aioquic asks for in its own tests alone."""

    def connection_made(self, transport):
        super().connection_made(transport)
        initialize = self._quic._initialize

        def asking(*args):
            initialize(*args)
            self._quic.tls._request_client_certificate = True

        self._quic._initialize = asking


async def stdin():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def server(options):
    config = configuration(options, False)
    if options.get("v2"):
        config.supported_versions = [QuicProtocolVersion.VERSION_2]
    protocol = Asking if options.get("mtls") else Peer
    tickets = {}
    keep = lambda made: tickets.setdefault(made.ticket, made)
    listening = await serve("127.0.0.1", 0, configuration=config, create_protocol=protocol,
                            retry=options.get("retry", False), session_ticket_handler=keep,
                            session_ticket_fetcher=lambda label: tickets.pop(label, None))
    say("listening", listening._transport.get_extra_info("sockname")[1])
    await (await stdin()).read()


async def client(options):
    config = configuration(options, True)
    if options.get("resume"):
        config.session_ticket = await ticket(options, config)
    if options.get("vn"):
        config.original_version = UNKNOWN_VERSION
        config.supported_versions = [UNKNOWN_VERSION, QuicProtocolVersion.VERSION_1]
    lines = await stdin()
    made = []

    def protocol(*args, **kwargs):
        made.append(Peer(*args, serving=False, **kwargs))
        return made[0]

    early = options.get("early", False)
    try:
        async with connect("127.0.0.1", options["port"], configuration=config,
                           create_protocol=protocol, wait_connected=not early) as peer:
            if early:
                peer.early = peer.open(b"eearly")
                await peer.wait_connected()
            await obey(peer, lines)
    except ConnectionError:
        say("refused", made[0].closed)


async def ticket(options, config):
    """A ticket of a first connection, which is then closed."""
    tickets = asyncio.Queue()
    protocol = lambda *args, **kwargs: Peer(*args, serving=False, **kwargs)
    async with connect("127.0.0.1", options["port"], configuration=config, create_protocol=protocol,
                       session_ticket_handler=tickets.put_nowait) as peer:
        await peer.do_echo(1, 10)
        return await asyncio.wait_for(tickets.get(), 20)


async def obey(peer, lines):
    say("connected", True)
    while line := await lines.readline():
        what, *args = json.loads(line)
        try:
            say("result", await getattr(peer, "do_" + what)(*args))
        except Exception as error:
            say("failed", repr(error))


# What fails is told by what is said, or not.
logging.disable()
role, options = sys.argv[1:]
asyncio.run({"server": server, "client": client}[role](json.loads(options)))
