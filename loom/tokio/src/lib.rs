//! In place of tokio: as much of it as the models need, of loom's types. What a program can tell of it is the
//! same; how tokio does it inside is not modelled.

pub mod runtime;
pub mod sync;
