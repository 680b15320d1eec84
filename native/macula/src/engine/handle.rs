//! A handle of a Quinn connection that may be dropped whatever has become of the connection.

use std::ops::Deref;

use quinn::Connection;

use crate::vm::tasks::{Held, attempt};

/// The last handle but one takes the connection's lock in its destructor, as the last one does, when the
/// driver is gone, and the lock of a connection whose driver has panicked is poisoned. So there is a spare
/// handle beside: no other, such as that of a stream, is the last but one while this is there.
pub(crate) struct Handle {
    connection: Held<Connection>,
    _spare: Held<Connection>,
}

impl Handle {
    pub(crate) fn new(connection: Connection) -> Self {
        Handle {
            _spare: Held::new(connection.clone()),
            connection: Held::new(connection),
        }
    }
}

impl Deref for Handle {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if attempt(|| self.connection.close_reason()).is_err() {
            // Quinn has failed. So the destructors of our handles do not take the poisoned lock.
            for _ in 0..2 {
                std::mem::forget((*self.connection).clone());
            }
        }
    }
}
