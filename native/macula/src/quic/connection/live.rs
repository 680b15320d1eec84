//! Every connection there is, so that their peers are told when the VM halts.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use crate::engine::transport::VarInt;

use super::Connection;
use crate::vm::halt::{self, Farewell};

#[derive(Default)]
struct Live(Mutex<HashMap<usize, Weak<Connection>>>);

static LIVE: LazyLock<Arc<Live>> = LazyLock::new(|| {
    let live = Arc::new(Live::default());
    let farewell: Weak<Live> = Arc::downgrade(&live);
    halt::register(farewell);
    live
});

pub(super) fn add(connection: &Arc<Connection>) {
    LIVE.lock()
        .insert(key(connection), Arc::downgrade(connection));
}

pub(super) fn remove(connection: &Connection) {
    LIVE.lock().remove(&key(connection));
}

/// Its address, which is its own while it lives.
fn key(connection: &Connection) -> usize {
    std::ptr::from_ref(connection).addr()
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Weak<Connection>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Vec<Arc<Connection>> {
        // Collected under the lock and looked at outside of it: the last reference to a
        // connection may be dropped here, and that takes the lock.
        let all: Vec<_> = self.lock().values().filter_map(Weak::upgrade).collect();
        all.into_iter()
            .filter(|connection| !connection.has_ended())
            .collect()
    }
}

impl Farewell for Live {
    fn begin(&self) -> bool {
        let open = self.open();
        for connection in &open {
            connection.close(VarInt::from_u32(0), b"halt");
        }
        !open.is_empty()
    }

    fn is_over(&self) -> bool {
        self.open().is_empty()
    }

    /// Closing sends its packet at once; there is nothing to hurry.
    fn force(&self) {}
}
