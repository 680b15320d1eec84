//! What the boundary to the VM needs, whatever passes it: messages, owners, replies, threads.

pub(crate) mod active;
pub(crate) mod alarm;
pub(crate) mod bell;
pub(crate) mod boost;
mod crash;
pub(crate) mod error;
pub(crate) mod fault;
pub(crate) mod halt;
pub(crate) mod locks;
pub(crate) mod messages;
#[cfg(test)]
mod no_vm;
pub(crate) mod objects;
mod outcome;
pub(crate) mod owner;
pub(crate) mod payload;
pub(crate) mod reply;
pub(crate) mod runtime;
pub(crate) mod seat;
pub(crate) mod sync;
pub(crate) mod tasks;
pub(crate) mod turns;
pub(crate) mod waiters;
