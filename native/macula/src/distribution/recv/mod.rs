//! What is received on a link, before the VM has it. Nothing here knows the transport or the VM.

pub(crate) mod fence;
