//! The link engine of the distribution carrier: what happens to each packet happens here.
//!
//! `nif` holds the entry points, `endpoint` the UDP endpoint both roles share, `strangers` the peers that
//! have proven nothing yet, `pake` the exchange that proves the cookie, `driver` who drives a connection,
//! `visit` what a process at a driver may do, `timer` when a driver looks at the clock, `lent` what a
//! process may have in the native thread's place, `boost` how soon, `congestion` how much is under way,
//! `link` one link between two nodes, `outgoing` its send queue, `send` whose bytes are in it and which
//! lane they take, `recv` how lanes become one, `incoming` what is handed to the VM, `frame` the layout
//! of streams, `classify` what a packet is, `line` (of tests) a line with a clock of its own, `streams`
//! the users' own streams, `messages` every message the VM gets from here.

mod classify;
mod congestion;
mod driver;
mod endpoint;
mod frame;
mod incoming;
mod lent;
#[cfg(test)]
mod line;
mod link;
mod messages;
mod nif;
mod outgoing;
mod pake;
mod recv;
mod send;
mod socket;
mod strangers;
mod streams;
mod timer;
mod tls;
mod visit;
