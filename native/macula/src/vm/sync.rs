//! What threads hand things over with. The models in `loom/` have loom's types in this place.

pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
pub(crate) use std::time::Instant;
