//! What can be asked of a connection. The answers come from a native thread: the state is
//! behind a lock that its driver may hold for longer than a scheduler should wait.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustler::{Atom, Encoder, Env, NifResult, ResourceArc, Term};

use super::{Connection, Handle, Handshake, address};
use crate::engine::transport;
use crate::quic::stream::Home;
use crate::vm::error::{Ended, binaries, binary};
use crate::vm::messages::atoms;
use crate::vm::reply::Reply;

mod names {
    rustler::atoms! {
        recv_oct, recv_cnt, recv_avg, recv_max, recv_dvi,
        send_oct, send_cnt, send_avg, send_max, send_pend,
        sent_packets, lost_packets, lost_bytes, congestion_events, black_holes,
        mtu_probes_sent, mtu_probes_lost, rtt, min_rtt, cwnd, mtu,
        streams, sent_acks, recv_acks, sent_stream_frames, recv_stream_frames,
        sent_datagrams, recv_datagrams, dropped_datagrams, sent_syscalls, recv_syscalls, sent_resets, recv_resets,
        stats, handshake, peercerts,
    }
}

/// Asks for `peername`, `sockname`, `peercert`, `peercerts`, `negotiated_protocol`, `max_datagram_size`,
/// `handshake`, which is waited for, `stats` or `info`.
#[rustler::nif]
fn conn_ask<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    what: Atom,
) -> Term<'a> {
    let (reply, operation) = Reply::new(env, reference);
    let connection = handle.connection.clone();
    handle.connection.worker.start(async move {
        if what == names::handshake() {
            connection.session.outcome().await;
        }
        // Who gave up waiting is not told.
        let _ = reply.send(|env| match answer(env, &connection, what) {
            Ok(answer) => answer,
            Err(_) => (atoms::error(), atoms::internal_error()).encode(env),
        });
    });
    operation.encode(env)
}

fn answer<'a>(env: Env<'a>, connection: &Arc<Connection>, what: Atom) -> NifResult<Term<'a>> {
    let quic = &connection.quic;
    let ok = |value: Term<'a>| (atoms::ok(), value).encode(env);
    let error = |why: Atom| (atoms::error(), why).encode(env);
    let answer = if what == atoms::peername() {
        ok(address(env, quic.remote_address()))
    } else if what == atoms::sockname() {
        ok(address(env, connection.local_address()))
    } else if what == atoms::peercert() {
        match Handshake::of(quic).peer_certificates.first() {
            Some(der) => ok(binary(env, der)),
            None => error(atoms::no_peercert()),
        }
    } else if what == names::peercerts() {
        match &Handshake::of(quic).peer_certificates[..] {
            [] => error(atoms::no_peercert()),
            shown => ok(binaries(env, shown)),
        }
    } else if what == atoms::negotiated_protocol() {
        match Handshake::of(quic).protocol {
            Some(protocol) => ok(binary(env, &protocol)),
            None => error(atoms::protocol_not_negotiated()),
        }
    } else if what == atoms::max_datagram_size() {
        match quic.max_datagram_size() {
            Some(size) => ok(size.encode(env)),
            None => error(atoms::no_path_mtu()),
        }
    } else if what == names::handshake() {
        match connection.close_reason() {
            None => atoms::ok().encode(env),
            Some(reason) => (atoms::error(), Ended(&reason)).encode(env),
        }
    } else if what == names::stats() {
        ok(stats(env, connection)?)
    } else {
        ok(info(env, connection)?)
    };
    Ok(answer)
}

fn stats<'a>(env: Env<'a>, connection: &Connection) -> NifResult<Term<'a>> {
    let stats = connection.quic.stats();
    let path = &stats.path;
    let (tx, rx) = (&stats.frame_tx, &stats.frame_rx);
    let mean = |of: &transport::UdpStats| of.bytes.checked_div(of.datagrams).unwrap_or(0);
    let micros = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    Term::map_from_pairs(
        env,
        &[
            (names::recv_oct(), stats.udp_rx.bytes),
            (names::recv_cnt(), stats.udp_rx.datagrams),
            (names::recv_avg(), mean(&stats.udp_rx)),
            // inet has them, and nobody counts them here.
            (names::recv_max(), 0),
            (names::recv_dvi(), 0),
            (names::send_oct(), stats.udp_tx.bytes),
            (names::send_cnt(), stats.udp_tx.datagrams),
            (names::send_avg(), mean(&stats.udp_tx)),
            (names::send_max(), 0),
            (
                names::send_pend(),
                connection.queued.load(Ordering::Relaxed).max(0) as u64,
            ),
            (names::sent_packets(), path.sent_packets),
            (names::lost_packets(), path.lost_packets),
            (names::lost_bytes(), path.lost_bytes),
            (names::congestion_events(), path.congestion_events),
            (names::black_holes(), path.black_holes_detected),
            (names::mtu_probes_sent(), path.sent_plpmtud_probes),
            (names::mtu_probes_lost(), path.lost_plpmtud_probes),
            (names::rtt(), micros(path.rtt)),
            (names::min_rtt(), micros(path.min_rtt)),
            (names::cwnd(), path.cwnd),
            (names::mtu(), u64::from(path.current_mtu)),
            (
                names::streams(),
                connection.streams.load(Ordering::Relaxed) as u64,
            ),
            (names::sent_acks(), tx.acks),
            (names::recv_acks(), rx.acks),
            (names::sent_stream_frames(), tx.stream),
            (names::recv_stream_frames(), rx.stream),
            (names::sent_datagrams(), tx.datagram),
            (names::recv_datagrams(), rx.datagram),
            (
                names::dropped_datagrams(),
                connection.datagrams_out.dropped(),
            ),
            (names::sent_resets(), tx.reset_stream),
            (names::recv_resets(), rx.reset_stream),
            (names::sent_syscalls(), stats.udp_tx.ios),
            (names::recv_syscalls(), stats.udp_rx.ios),
        ],
    )
}

fn info<'a>(env: Env<'a>, connection: &Connection) -> NifResult<Term<'a>> {
    let quic = &connection.quic;
    let state = match connection.close_reason() {
        None => atoms::open().encode(env),
        Some(transport::ConnectionError::LocallyClosed) => {
            (atoms::closed(), atoms::normal()).encode(env)
        }
        Some(reason) => (atoms::closed(), Ended(&reason)).encode(env),
    };
    let side = match quic.side() {
        transport::Side::Client => atoms::client(),
        transport::Side::Server => atoms::server(),
    };
    let map =
        Handshake::of(quic).info(env, quic.remote_address(), connection.session.early_data())?;
    map.map_put(atoms::handle(), atoms::connection())?
        .map_put(atoms::state(), state)?
        .map_put(atoms::side(), side)?
        .map_put(
            super::session::names::resumed(),
            connection.session.resumed(),
        )?
        .map_put(atoms::owner(), connection.owner.pid())?
        .map_put(atoms::sockname(), address(env, connection.local_address()))?
        .map_put(names::stats(), stats(env, connection)?)
}
