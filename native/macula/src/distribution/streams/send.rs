//! The sending half: what is queued goes out as the peer gives credit and as there is room.

use std::pin::pin;
use std::sync::Arc;

use crate::engine::transport::{SendStream, StoppedError, VarInt, WriteError};

use super::room::Ticket;
use super::stream::{End, Inner, SendStep};
use crate::vm::fault::{self, Point};
use crate::vm::tasks::{Held, attempt, contain};

/// Serves the sending half until it is over.
pub(super) async fn serve(inner: Arc<Inner>, mut stream: Held<SendStream>) {
    if contain(rounds(&inner, &mut stream)).await.is_err() {
        // Dropped as it is the stream would be finished, and the peer would take it for whole.
        let _ = attempt(|| stream.reset(VarInt::from_u32(0)));
        inner.cut(End::Failed);
    }
    inner.send_over();
    if inner.is_lost() {
        // Dropped before the connection is over it would be finished, too.
        let _ = contain(inner.link.connection().closed()).await;
    }
}

async fn rounds(inner: &Inner, stream: &mut SendStream) {
    let mut stopped = pin!(stream.stopped());
    let streams = &inner.link.streams();
    let mut ticket = Ticket::new(&streams.room, inner.priority, &inner.send_bell);
    let mut finished = false;
    loop {
        fault::pass(Point::DistStreamWrite);
        match inner.send_step(&mut ticket) {
            SendStep::Cut(code) => {
                // Fails only if all was acknowledged.
                let _ = stream.reset(code);
                return;
            }
            SendStep::Lost => return,
            SendStep::Write(bytes) => {
                streams.survey(&*inner.link);
                inner.link.make_room_for_streams();
                let size = bytes.len();
                let mut piece = [streams.room.track(bytes)];
                while !piece[0].is_empty() {
                    tokio::select! {
                        biased;
                        written = stream.write_chunks(&mut piece) => match written {
                            Ok(_) => (),
                            Err(WriteError::Stopped(code)) => return stop(inner, stream, code),
                            Err(WriteError::ConnectionLost(_)) => return inner.cut(End::Lost),
                            Err(_) => return,
                        },
                        () = inner.send_bell.rung() => if inner.is_cut() {
                            break;
                        },
                    }
                }
                inner.written(size);
                // A long stream of data must not keep the other tasks of this thread from running.
                tokio::task::coop::consume_budget().await;
            }
            SendStep::Finish if !finished => {
                finished = true;
                // Fails only if it was stopped, which is waited for next.
                let _ = stream.finish();
            }
            SendStep::Finish | SendStep::Idle => tokio::select! {
                biased;
                () = inner.send_bell.rung() => (),
                over = &mut stopped => match over {
                    // All was acknowledged.
                    Ok(None) => return,
                    Ok(Some(code)) => return stop(inner, stream, code),
                    Err(StoppedError::ConnectionLost(_)) => return inner.cut(End::Lost),
                    Err(StoppedError::ZeroRttRejected) => return,
                },
            },
        }
    }
}

/// The peer wants no more of it.
fn stop(inner: &Inner, stream: &mut SendStream, code: VarInt) {
    inner.stopped(code);
    let _ = stream.reset(code);
}
