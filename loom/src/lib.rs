//! What threads hand over to each other, in every order that loom finds: the library's own files, with loom's
//! locks and atomics (`vm::sync`), and stand-ins for what they stand on.
//!
//! The bound of preemptions is `LOOM_MAX_PREEMPTIONS`. Two things are stronger here than Rust's memory model has them:
//! `SeqCst` is made of fences, and a lock that is tried is never found taken once it is free.
#![cfg(all(test, loom))]
// No model uses all of a file.
#![allow(dead_code)]

mod distribution;
mod engine;
mod udp;
mod vm;
