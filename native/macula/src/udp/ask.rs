//! Asking whether anybody has a port.
//!
//! A host whose port is nobody's says so (RFC 1122, section 4.1.3.1), and a router to which no way is known, too.
//! The system tells the news to sockets with one peer only, which those of endpoints are not.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use super::aimed::aim;

/// A datagram that says nothing. No QUIC packet begins with a zero bit pair (RFC 9000, section 17), and none is
/// so short: an endpoint drops it.
pub(crate) const KNOCK: [u8; 1] = [0];

/// When to ask.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Before the first question: on a short way QUIC has its answer before.
    pub(crate) first: Duration,
    /// Before the second one; each is twice as long as the one before, up to the longest.
    pub(crate) pause: Duration,
    pub(crate) longest: Duration,
}

/// Completes when the system says that nobody has the port that `to` names, or that no way leads there from
/// this address. Hints that nobody can rely on are what QUIC's own handshake is there for.
pub(crate) async fn refusal(from: SocketAddr, to: SocketAddr, pace: Pace) -> io::Error {
    let heard = match aim(from, to) {
        Ok(socket) => match ask(socket, pace).await {
            Err(error) => Some(error).filter(is_refusal),
        },
        Err(unaimed) => unaimed.no_way(),
    };
    match heard {
        Some(error) => error,
        // Only the handshake itself will tell.
        None => std::future::pending().await,
    }
}

/// Asks until the system says something.
async fn ask(socket: std::net::UdpSocket, pace: Pace) -> io::Result<Infallible> {
    let socket = UdpSocket::from_std(socket)?;
    sleep(pace.first).await;
    let mut pause = pace.pause;
    loop {
        socket.send(&KNOCK).await?;
        let answers = async {
            loop {
                // Whatever the peer may answer says nothing.
                socket.recv(&mut [0]).await?;
            }
        };
        if let Ok(answered) = timeout(pause, answers).await {
            return answered;
        }
        pause = (pause * 2).min(pace.longest);
    }
}

fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(
        error.kind(),
        ConnectionRefused | NetworkUnreachable | HostUnreachable | AddrNotAvailable
    )
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use super::super::aimed::any;
    use super::*;

    #[test]
    fn a_port_that_is_free_soon_after_the_first_question_is_noticed_soon() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime");
        runtime.block_on(async {
            let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("bound");
            let addr = silent.local_addr().expect("address");
            let pace = Pace {
                first: Duration::ZERO,
                pause: Duration::from_millis(50),
                // More than any machine takes.
                longest: Duration::from_secs(60),
            };
            let ended = async {
                // After the first question.
                sleep(pace.pause / 5).await;
                drop(silent);
            };
            let begun = Instant::now();
            let ((), error) = tokio::join!(ended, refusal(any(addr), addr, pace));
            assert_eq!(io::ErrorKind::ConnectionRefused, error.kind());
            // The longest pause alone is as long.
            assert!(begun.elapsed() < pace.longest, "{:?}", begun.elapsed());
        });
    }
}
