//! As the library's `vm`.

#[path = "../../native/macula/src/vm/bell.rs"]
pub(crate) mod bell;
pub(crate) mod fault;
#[path = "../../native/macula/src/vm/locks.rs"]
pub(crate) mod locks;
#[path = "../../native/macula/src/vm/outcome.rs"]
mod outcome;
pub(crate) mod runtime;
pub(crate) mod sync;
pub(crate) mod tasks;
mod tests;
#[path = "../../native/macula/src/vm/turns.rs"]
pub(crate) mod turns;
