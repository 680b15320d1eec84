//! What a stream needs of the connection that carries it.

use std::sync::Arc;

use crate::engine::transport::ConnectionError;

use super::{Inner, Watermarks};
use crate::vm::runtime::Worker;

pub(crate) trait Home: Send + Sync {
    /// Runs all that serves the stream.
    fn worker(&self) -> &'static Worker;

    fn watermarks(&self) -> Watermarks;

    /// A stream is there, which ends with the connection.
    fn keep_up_with(&self, id: u64, stream: &Arc<Inner>);

    /// A stream is over. Where early data was rejected another one may have its number by then.
    fn is_over(&self, id: u64, stream: &Inner);

    /// Whether streams of this side may be told that their early data is rejected.
    fn begins_early(&self) -> bool;

    /// Whether the user of the connection has closed it, though QUIC may hear of that only later.
    fn is_closed_here(&self) -> bool;

    /// Whether the connection was lost by a failure of this side.
    fn has_failed(&self) -> bool;

    /// Why the connection has ended, by what QUIC says.
    fn ended(&self, error: ConnectionError) -> ConnectionError;

    /// Why the connection has ended, if that is so.
    fn close_reason(&self) -> Option<ConnectionError>;

    /// So many bytes wait in the stream.
    fn queued(&self, bytes: usize);

    /// And so many wait no longer.
    fn dequeued(&self, bytes: usize);

    /// Returns when the message is sent that announces a stream of the peer, if one is being made.
    fn announced(&self);
}

/// A connection lives while one of its streams is held, whatever became of its own handle.
pub(crate) trait Keep: Send + Sync {}
