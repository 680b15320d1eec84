//! The entry points of the distribution. Each checks its arguments, hands the work on and returns.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::atomic::Ordering;
use std::time::Duration;

use aws_lc_rs::{hmac, rand};
use bytes::Bytes;
use rustler::{
    Atom, Binary, Encoder, Env, Error, LocalPid, NifMap, NifResult, Reference, ResourceArc, Term,
};

use super::endpoint::{self, DistEndpoint, EndpointHandle, OpenError, Options};
use super::link::{LinkHandle, Rules};
use super::messages::{self, Reply};
use super::outgoing::{Framer, Pushed};
use super::send::queue::Hold;
use super::socket::SocketOptions;
use super::tls;

mod atoms {
    rustler::atoms! {
        busy, eacces, eaddrinuse, eagain, eaddrnotavail, eafnosupport, emfile, tls_failed, bad_config,
        bbr, cubic, hold,
    }
}

#[derive(NifMap)]
struct EndpointOptions<'a> {
    listen: bool,
    reset_key: Binary<'a>,
    liveness: u64,
    congestion: Atom,
    lanes: u32,
    streams: u32,
    window: u32,
    /// Sizes of the socket's buffers; 0 leaves them to us.
    recbuf: u32,
    sndbuf: u32,
    only_v6: bool,
}

#[rustler::nif]
fn dist_endpoint<'a>(
    env: Env<'a>,
    address: Term<'a>,
    options: EndpointOptions<'a>,
) -> NifResult<Term<'a>> {
    let (reset_key, cid_key) = split_key(&options.reset_key)?;
    let bbr = options.congestion == atoms::bbr();
    if !bbr && options.congestion != atoms::cubic() {
        return Err(Error::BadArg);
    }
    let options = Options {
        addr: socket_addr(address)?,
        socket: SocketOptions {
            receive_buffer: buffer_size(options.recbuf),
            send_buffer: buffer_size(options.sndbuf),
            only_v6: options.only_v6,
        },
        listen: options.listen,
        reset_key,
        cid_key,
        bbr,
        rules: Rules {
            liveness: Duration::from_millis(options.liveness),
            single: options.lanes == 1,
            streams: options.streams,
            window: options.window,
        },
    };
    Ok(match DistEndpoint::open(&options) {
        Ok(endpoint) => {
            let local = messages::address(env, endpoint.local());
            (messages::ok(), EndpointHandle::new(endpoint), local).encode(env)
        }
        Err(e) => (messages::error(), open_error(&e)).encode(env),
    })
}

fn buffer_size(asked: u32) -> Option<usize> {
    (asked != 0).then_some(asked as usize)
}

/// The two keys of an endpoint out of one secret of 40 bytes.
fn split_key(secret: &[u8]) -> NifResult<(Vec<u8>, u64)> {
    let (reset, cid) = secret.split_at_checked(32).ok_or(Error::BadArg)?;
    let cid: [u8; 8] = cid.try_into().map_err(|_| Error::BadArg)?;
    Ok((reset.to_vec(), u64::from_be_bytes(cid)))
}

fn open_error(e: &OpenError) -> Atom {
    use std::io::ErrorKind;
    match e {
        OpenError::Io(e) => match e.kind() {
            ErrorKind::AddrInUse => atoms::eaddrinuse(),
            ErrorKind::AddrNotAvailable => atoms::eaddrnotavail(),
            ErrorKind::PermissionDenied => atoms::eacces(),
            ErrorKind::Unsupported => atoms::eafnosupport(),
            // No more threads.
            ErrorKind::WouldBlock => atoms::eagain(),
            _ => atoms::emfile(),
        },
        OpenError::Tls(_) => atoms::tls_failed(),
        OpenError::Config(_) => atoms::bad_config(),
    }
}

#[rustler::nif]
fn dist_endpoint_close(endpoint: ResourceArc<EndpointHandle>) -> Atom {
    endpoint.0.close();
    messages::ok()
}

/// Whether an endpoint of this VM has the port; if so, answers when the port is free.
#[rustler::nif]
fn dist_await_port<'a>(env: Env<'a>, port: u16, reference: Term<'a>) -> NifResult<bool> {
    Ok(endpoint::await_port(port, reply(env, reference)?))
}

#[rustler::nif]
fn dist_accept(env: Env<'_>, endpoint: ResourceArc<EndpointHandle>) -> Term<'_> {
    done(env, endpoint.0.accept(env.pid()).then_some(()).ok_or(()))
}

#[rustler::nif]
fn dist_connect<'a>(
    env: Env<'a>,
    endpoint: ResourceArc<EndpointHandle>,
    address: Term<'a>,
    timeout: u64,
    reference: Term<'a>,
) -> NifResult<Atom> {
    let addr = socket_addr(address)?;
    endpoint
        .0
        .connect(addr, Duration::from_millis(timeout), reply(env, reference)?);
    Ok(messages::ok())
}

#[rustler::nif]
fn dist_own(env: Env<'_>, link: ResourceArc<LinkHandle>, owners: Vec<LocalPid>) -> bool {
    LinkHandle::own(&link, env, &owners)
}

#[rustler::nif]
fn dist_peer(env: Env<'_>, link: ResourceArc<LinkHandle>) -> Term<'_> {
    messages::address(env, link.link.known().peer)
}

/// The peer has proven itself; `liveness` is the peer's own, in milliseconds.
#[rustler::nif]
fn dist_trust(link: ResourceArc<LinkHandle>, liveness: u32) -> Atom {
    link.link.trust(Duration::from_millis(u64::from(liveness)));
    messages::ok()
}

#[rustler::nif]
fn dist_exporter(env: Env<'_>, link: ResourceArc<LinkHandle>) -> Term<'_> {
    match link.link.exporter() {
        Some(value) => (messages::ok(), messages::binary(env, &value)).encode(env),
        None => (messages::error(), messages::closed()).encode(env),
    }
}

#[rustler::nif]
fn dist_control_send<'a>(
    env: Env<'a>,
    link: ResourceArc<LinkHandle>,
    data: Term<'a>,
    reference: Term<'a>,
) -> NifResult<Term<'a>> {
    let data = Binary::from_iolist(data)?;
    let frame = Bytes::copy_from_slice(&data);
    Ok(done(
        env,
        link.link.control_send(frame, reply(env, reference)?),
    ))
}

#[rustler::nif]
fn dist_control_recv<'a>(
    env: Env<'a>,
    link: ResourceArc<LinkHandle>,
    reference: Term<'a>,
) -> NifResult<Term<'a>> {
    Ok(done(env, link.link.control_receive(reply(env, reference)?)))
}

#[rustler::nif]
fn dist_start(env: Env<'_>, link: ResourceArc<LinkHandle>, input: LocalPid) -> Term<'_> {
    done(env, link.link.start(input))
}

/// Queues packets, each `{Size, [Binary]}` as `erlang:dist_ctrl_get_data/1` gives it. The answer may name
/// senders that have to wait: `{hold, Answer, [{Number, Serial, Hold}]}`.
#[rustler::nif]
fn dist_send<'a>(
    env: Env<'a>,
    link: ResourceArc<LinkHandle>,
    packets: rustler::ListIterator<'a>,
) -> NifResult<Term<'a>> {
    let mut framer = Framer::new(link.link.outgoing());
    for packet in packets {
        let (size, parts): (usize, rustler::ListIterator) = packet.decode()?;
        framer.packet(size, parts)?;
    }
    let (pushed, hold) = link.link.send(framer.finish(), env.pid());
    let pushed = match pushed {
        Pushed::Ok => messages::ok(),
        Pushed::Busy => atoms::busy(),
        Pushed::Closed => messages::closed(),
    };
    if hold.is_empty() {
        return Ok(pushed.encode(env));
    }
    let hold: Vec<(u32, u32, u64)> = hold.into_iter().map(Hold::numbers).collect();
    Ok((atoms::hold(), pushed, hold).encode(env))
}

#[rustler::nif]
fn dist_tick(env: Env<'_>, link: ResourceArc<LinkHandle>) -> Term<'_> {
    done(env, link.link.tick())
}

#[rustler::nif]
fn dist_credit(link: ResourceArc<LinkHandle>, cost: u32) -> Atom {
    link.link.give_credit(i64::from(cost));
    messages::ok()
}

/// `{PacketsIn, PacketsOut, QueuedBytes}`.
#[rustler::nif]
fn dist_stat(link: ResourceArc<LinkHandle>) -> (u64, u64, u64) {
    let counters = &link.link.counters;
    (
        counters.packets_in.load(Ordering::Relaxed),
        counters.packets_out.load(Ordering::Relaxed),
        link.link.queued_bytes() as u64,
    )
}

#[rustler::nif]
fn dist_stop(link: ResourceArc<LinkHandle>) -> Atom {
    link.link.stop();
    messages::ok()
}

/// A link's state for people.
#[derive(NifMap)]
struct LinkInfo {
    cipher: String,
    key_exchange: String,
    rtt_us: u64,
    mtu: u16,
    cwnd: u64,
    sent_packets: u64,
    lost_packets: u64,
    congestion_events: u64,
    udp_tx_datagrams: u64,
    udp_rx_datagrams: u64,
    udp_tx_ios: u64,
    bytes_in: u64,
    bytes_out: u64,
    packets_in: u64,
    packets_out: u64,
    refused_datagrams: u64,
    queued_bytes: u64,
    /// Unsent bytes with which a sender has to wait.
    sender_mark: u64,
    /// How often one had to.
    senders_held: u64,
}

#[rustler::nif]
fn dist_info(link: ResourceArc<LinkHandle>) -> LinkInfo {
    let link = &link.link;
    let stats = link.known().stats;
    LinkInfo {
        cipher: tls::CIPHER.to_owned(),
        key_exchange: tls::KEY_EXCHANGE.to_owned(),
        rtt_us: stats.path.rtt.as_micros() as u64,
        mtu: stats.path.current_mtu,
        cwnd: stats.path.cwnd,
        sent_packets: stats.path.sent_packets,
        lost_packets: stats.path.lost_packets,
        congestion_events: stats.path.congestion_events,
        udp_tx_datagrams: stats.udp_tx.datagrams,
        udp_rx_datagrams: stats.udp_rx.datagrams,
        udp_tx_ios: stats.udp_tx.ios,
        bytes_in: link.counters.bytes_in.load(Ordering::Relaxed),
        bytes_out: link.counters.bytes_out.load(Ordering::Relaxed),
        packets_in: link.counters.packets_in.load(Ordering::Relaxed),
        packets_out: link.counters.packets_out.load(Ordering::Relaxed),
        refused_datagrams: link.counters.refused.load(Ordering::Relaxed),
        queued_bytes: link.queued_bytes() as u64,
        sender_mark: link.sender_mark() as u64,
        senders_held: link.counters.held.load(Ordering::Relaxed),
    }
}

/// HMAC-SHA-256. When a release boots the distribution comes up before the crypto application's
/// library does.
#[rustler::nif]
fn dist_mac<'a>(env: Env<'a>, key: Binary<'a>, data: Term<'a>) -> NifResult<Term<'a>> {
    let data = Binary::from_iolist(data)?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
    Ok(messages::binary(env, hmac::sign(&key, &data).as_ref()))
}

/// Whether this is the HMAC-SHA-256 of the data. The time it takes says nothing.
#[rustler::nif]
fn dist_is_mac<'a>(key: Binary<'a>, data: Term<'a>, mac: Binary<'a>) -> NifResult<bool> {
    let data = Binary::from_iolist(data)?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
    Ok(hmac::verify(&key, &data, &mac).is_ok())
}

/// 32 bytes that nobody can guess.
#[rustler::nif]
fn dist_random(env: Env<'_>) -> NifResult<Term<'_>> {
    let mut bytes = [0; 32];
    rand::fill(&mut bytes).map_err(|_| Error::RaiseAtom("no_random_bytes"))?;
    Ok(messages::binary(env, &bytes))
}

fn done(env: Env<'_>, result: Result<(), ()>) -> Term<'_> {
    match result {
        Ok(()) => messages::ok().encode(env),
        Err(()) => (messages::error(), messages::closed()).encode(env),
    }
}

pub(super) fn reply<'a>(env: Env<'a>, reference: Term<'a>) -> NifResult<Reply> {
    Ok(Reply::new(env.pid(), Reference::try_from(reference)?))
}

/// `{Ip, Port}`, or `{Ip, Port, ScopeId}` of an IPv6 address that counts on one link only.
/// A number that fits. Rustler's own decoder cuts one that is too large for a small type.
pub(super) fn number<T: TryFrom<u64>>(term: Term<'_>) -> NifResult<T> {
    T::try_from(term.decode()?).map_err(|_| Error::BadArg)
}

fn socket_addr(term: Term<'_>) -> NifResult<SocketAddr> {
    if let Ok((ip, port, scope)) = term.decode::<(Term, Term, u32)>() {
        return Ok(SocketAddrV6::new(ipv6(ip)?, number(port)?, 0, scope).into());
    }
    let (ip, port): (Term, Term) = term.decode()?;
    let ip = if let Ok((a, b, c, d)) = ip.decode::<(Term, Term, Term, Term)>() {
        let octets = [number(a)?, number(b)?, number(c)?, number(d)?];
        IpAddr::V4(Ipv4Addr::from(octets))
    } else {
        IpAddr::V6(ipv6(ip)?)
    };
    Ok(SocketAddr::new(ip, number(port)?))
}

fn ipv6(ip: Term<'_>) -> NifResult<Ipv6Addr> {
    let parts = rustler::types::tuple::get_tuple(ip)?;
    let parts: [Term; 8] = parts.try_into().map_err(|_| Error::BadArg)?;
    let mut segments = [0u16; 8];
    for (segment, part) in segments.iter_mut().zip(parts) {
        *segment = number(part)?;
    }
    Ok(Ipv6Addr::from(segments))
}
