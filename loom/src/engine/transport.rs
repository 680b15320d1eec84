//! As the library's `engine::transport`.

mod connection;
#[path = "../../../native/macula/src/engine/transport/inbox.rs"]
mod inbox;
#[path = "../../../native/macula/src/engine/transport/shares.rs"]
mod shares;
#[path = "../../../native/macula/src/engine/transport/state.rs"]
mod state;
#[path = "../../../native/macula/src/engine/transport/step.rs"]
mod step;
mod tests;
mod timer;
mod way;

pub(crate) use connection::{Connection, connection};
pub(crate) use step::{Hold, Stepper};
