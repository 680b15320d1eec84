//! The control stream: frames of the handshake, then ticks, reports and credit.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::engine::transport::{RecvStream, SendStream, WriteError};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::super::frame::{self, Splitter, Whole};
use super::super::messages::Reply;
use super::super::send::lane::Lane;
use super::super::strangers::Slot;
use super::read::read_task;
use super::write::{FAREWELL, write_task};
use super::{CODE_END, CONTROL_PRIORITY, CONTROL_RESERVE, Control, Link, StreamError};
use crate::vm::fault::{self, Point};
use crate::vm::tasks::{Held, attempt, contain};

/// A handshake frame is a few hundred bytes: node names, flags, digests.
const MAX_CONTROL_FRAME: usize = 64 * 1024;

/// Deliveries of bulk are reported together.
const REPORT: Duration = Duration::from_millis(5);

pub(super) async fn control_task(
    link: Arc<Link>,
    (mut send, mut recv): (Held<SendStream>, Held<RecvStream>),
    commands: mpsc::UnboundedReceiver<Control>,
) {
    let _ = attempt(|| send.set_priority(CONTROL_PRIORITY));
    let evicted = link.slot().as_ref().map(Slot::evicted).unwrap_or_default();
    let ended = tokio::select! {
        ended = contain(control_loop(&link, &mut send, &mut recv, commands)) => {
            Some(ended.unwrap_or(StreamError::Panicked))
        }
        () = link.stopped() => None,
        () = evicted.notified() => Some(StreamError::Evicted),
        () = link.driver_failed() => Some(StreamError::Panicked),
    };
    if let Some(error) = ended {
        link.abort(&error);
    }
    link.outgoing.close();
    link.writer.0.ring();
    if !link.started.load(Ordering::Acquire) {
        // No lane: what was sent here last must still arrive, such as why a peer is refused.
        let farewell = contain(async {
            let _ = send.finish();
            send.stopped().await
        });
        tokio::select! {
            _ = timeout(FAREWELL, farewell) => (),
            () = link.driver_failed() => (),
        }
        link.close(CODE_END, "");
    }
    // With a lane, its writer closes the connection.
}

async fn control_loop(
    link: &Arc<Link>,
    send: &mut SendStream,
    recv: &mut RecvStream,
    mut commands: mpsc::UnboundedReceiver<Control>,
) -> StreamError {
    match control_rounds(link, send, recv, &mut commands).await {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

async fn control_rounds(
    link: &Arc<Link>,
    send: &mut SendStream,
    recv: &mut RecvStream,
    commands: &mut mpsc::UnboundedReceiver<Control>,
) -> Result<std::convert::Infallible, StreamError> {
    let mut splitter = Splitter::default();
    let mut waiting: Option<Reply> = None;
    let mut started = false;
    let mut open = true;
    let mut report_at: Option<tokio::time::Instant> = None;
    loop {
        fault::pass(Point::LinkControl);
        // One frame per request until the handshake is over; after that every frame is a tick.
        while started || waiting.is_some() {
            match splitter.next(if started { 0 } else { MAX_CONTROL_FRAME })? {
                // Serves to have the packet acknowledged.
                Some(Whole::Mark(0)) => (),
                Some(Whole::Mark(count)) => link.outgoing.delivered(count)?,
                Some(Whole::Credit {
                    stream: frame::CONTROL,
                    limit: open,
                }) => link.streams.wanted(&**link, open),
                Some(Whole::Credit { stream, limit }) => link.streams.granted(stream, limit),
                Some(Whole::Packet(frame)) => match waiting.take() {
                    Some(reply) => reply.ok(&frame),
                    None => {
                        link.counters.packets_in.fetch_add(1, Ordering::Relaxed);
                    }
                },
                None if open => break,
                None if started => break,
                None => return Err(StreamError::Ended),
            }
        }
        tokio::select! {
            command = commands.recv() => match command {
                Some(Control::Send(frame, reply)) => {
                    link.tell_trust();
                    send.write_all(&frame::packet_header(frame.len())?).await?;
                    send.write_chunk(frame).await?;
                    reply.ok(&[]);
                }
                Some(Control::Tick) => {
                    link.counters.packets_out.fetch_add(1, Ordering::Relaxed);
                    link.reserve(CONTROL_RESERVE);
                    link.send_pair(send, &frame::packet_header(0)?).await?;
                }
                Some(Control::Probe) => {
                    link.reserve(CONTROL_RESERVE);
                    link.send_pair(send, &frame::mark(0)).await?;
                }
                Some(Control::Receive(reply)) => waiting = Some(reply),
                Some(Control::Start(input)) => {
                    link.tell_trust();
                    started = true;
                    if !link.started.swap(true, Ordering::AcqRel) {
                        crate::vm::runtime::dist().spawn(write_task(link.clone()));
                        crate::vm::runtime::dist().spawn(read_task(link.clone(), input));
                    }
                }
                Some(Control::Credit { stream, limit }) => {
                    link.reserve(CONTROL_RESERVE);
                    send.write_all(&frame::credit(stream, limit)).await?;
                }
                Some(Control::Delivered) => {
                    report_at = Some(tokio::time::Instant::now() + REPORT);
                }
                // The sender lives in the link, which this task holds.
                None => return Err(StreamError::Ended),
            },
            () = sleep_until(report_at.unwrap_or_else(tokio::time::Instant::now)), if report_at.is_some() => {
                report_at = None;
                // What is delivered from here on is reported next time.
                link.reporting.store(false, Ordering::Release);
                let count = link.fence().count(Lane::Bulk);
                link.reserve(CONTROL_RESERVE);
                let sent = send.write_all(&frame::mark(count)).await;
                // A peer that ends the link hears no reports, and the rest of its lanes still comes.
                if let Err(WriteError::ConnectionLost(e)) = sent {
                    return Err(e.into());
                }
            }
            chunk = recv.read_chunk(MAX_CONTROL_FRAME, true), if open && (started || waiting.is_some()) => {
                match chunk? {
                    Some(chunk) => splitter.push(&chunk.bytes),
                    // The lane tells when the link ends, after all its data.
                    None => open = false,
                }
            }
        }
    }
}

impl Link {
    /// Sends a frame, and a mark without meaning in a packet of its own: the peer acknowledges the second
    /// packet at once (RFC 9000, section 13.2.2), and need not wake up once more to acknowledge the first.
    /// Both leave at once, so that the peer wakes up for both.
    async fn send_pair(&self, send: &mut SendStream, frame: &[u8]) -> Result<(), WriteError> {
        for frame in [frame, &frame::mark(0)] {
            send.write_all(frame).await?;
            self.driver.send_now();
        }
        Ok(())
    }
}
