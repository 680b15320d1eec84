//! What is sent on a link, before the transport has it. Nothing here knows the transport or the VM, so
//! tests reach every order of events.

pub(crate) mod lane;
pub(crate) mod queue;
pub(crate) mod router;

#[cfg(test)]
mod order;
