//! Panics on purpose, for the tests that show what a panic ends and what not, and stalls, for those that
//! show who waits for whom. A point costs two relaxed loads while none is armed.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustler::Atom;

macro_rules! points {
    ($($point:ident $name:ident,)*) => {
        /// A place that can be made to panic.
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Point {
            $($point,)*
        }

        mod names {
            rustler::atoms! { $($name,)* }
        }

        fn named(name: Atom) -> Option<Point> {
            $(if name == names::$name() {
                return Some(Point::$point);
            })*
            None
        }
    };
}

points! {
    // macula_quic.
    Nif nif,
    Bell bell,
    Answer answer,
    Listen listen,
    Listener listener,
    Handshake handshake,
    NewConnection new_connection,
    Dial dial,
    Attempt attempt,
    Connection connection,
    AcceptStreams accept_streams,
    OpenStream open_stream,
    Datagrams datagrams,
    DatagramsOut datagrams_out,
    StreamRead stream_read,
    StreamWrite stream_write,
    Changes changes,
    SessionBegin session_begin,
    Session session,
    Silence silence,
    Verdict verdict,
    Qlog qlog,
    // Peering.
    Search search,
    // Drivers: they send with the lock of a connection in hand.
    Transmit transmit,
    Receive receive_datagram,
    Stray receive_stray,
    // The distribution.
    DistServe dist_serve,
    DistMeet dist_meet,
    DistDial dist_dial,
    DistWatch dist_watch,
    LinkControl link_control,
    LinkRead link_read,
    LinkWrite link_write,
    LinkSend link_send,
    DistStreams dist_streams,
    DistStreamRead dist_stream_read,
    DistStreamWrite dist_stream_write,
}

/// A bit for each point that is armed with a panic.
static PANICS: AtomicU64 = AtomicU64::new(0);
/// And for each that is armed with a stall.
static STALLS: AtomicU64 = AtomicU64::new(0);
/// How long a stall takes, in milliseconds.
static STALL: AtomicU32 = AtomicU32::new(0);

/// Panics, or stands still, if the point is armed, and disarms it.
#[inline]
pub(crate) fn pass(point: Point) {
    if PANICS.load(Ordering::Relaxed) | STALLS.load(Ordering::Relaxed) != 0 {
        trip(point);
    }
}

#[cold]
fn trip(point: Point) {
    let bit = 1 << point as u32;
    if STALLS.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
        let millis = STALL.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(u64::from(millis)));
    }
    if PANICS.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
        panic!("a panic on purpose: {point:?}");
    }
}

/// Has the next pass through a point panic. False if there is no such point.
#[rustler::nif]
fn inject_panic(name: Atom) -> bool {
    match named(name) {
        Some(point) => {
            PANICS.fetch_or(1 << point as u32, Ordering::AcqRel);
            true
        }
        None => false,
    }
}

/// How many points are armed.
#[rustler::nif]
fn injected_panics() -> u32 {
    PANICS.load(Ordering::Acquire).count_ones() + STALLS.load(Ordering::Acquire).count_ones()
}

/// Has the next pass through a point take so many milliseconds. False if there is no such point.
#[rustler::nif]
fn inject_stall(name: Atom, millis: u32) -> bool {
    match named(name) {
        Some(point) => {
            STALL.store(millis, Ordering::Relaxed);
            STALLS.fetch_or(1 << point as u32, Ordering::AcqRel);
            true
        }
        None => false,
    }
}
