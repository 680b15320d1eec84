//! What streams need of the link that carries them.

use crate::engine::transport::Connection;
use tokio::sync::watch;

use super::Streams;

pub(crate) trait Carrier: Send + Sync {
    fn connection(&self) -> &Connection;

    fn streams(&self) -> &Streams;

    /// Ends the link.
    fn stop(&self);

    /// Says true when the link ends.
    fn stops(&self) -> watch::Receiver<bool>;

    /// What streams have under way takes nothing of the lanes' window.
    fn make_room_for_streams(&self);

    /// The peer may send so many bytes of a stream, in all.
    fn give_stream_credit(&self, stream: u64, limit: u64);

    /// The peer may allow more streams: somebody waits, and so many that this end has opened are not over.
    fn ask_for_streams(&self, open: u64);

    /// The peer has sent more of a stream than that.
    fn end_for_overrun(&self);
}

/// Returns when the link ends.
pub(super) async fn stopped(link: &dyn Carrier) {
    // The sender lives in the link, so this can't fail.
    let _ = link.stops().wait_for(|stop| *stop).await;
}
