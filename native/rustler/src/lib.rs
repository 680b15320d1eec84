//! rustler as macula uses it. The crate that depends on this one knows it by the name `rustler`, so
//! that rustler's own macros find here what differs:
//!
//! - a resource type lives as long as the VM, whatever happens to the Erlang module (`resource`);
//! - the library loads again over a loaded copy of itself (`entry`);
//! - a panic is the answer `{error, nif_panicked}` and no exception, as the stack trace of an
//!   exception shows the arguments of the call, private keys too.

mod entry;
mod resource;

pub use entry::entry;
pub use resource::{Resource, ResourceArc};
pub use upstream::*;

/// What rustler's macros name.
pub mod codegen_runtime {
    pub use crate::resource::Registration as ResourceRegistration;
    pub use upstream::codegen_runtime::*;

    use upstream::types::atom;
    use upstream::{Encoder, Env, Error};

    pub fn handle_nif_result<T: NifReturnable>(
        result: std::thread::Result<Result<T, Error>>,
        env: Env,
    ) -> NifReturned {
        // SAFETY: the result is given back to the VM in the environment it was made in.
        let returned = result.map(|value| unsafe { value.into_returned(env) });
        match returned {
            // The result could not be encoded.
            Ok(NifReturned::Raise(reason)) if reason == atom::nif_panicked().as_c_arg() => {
                panicked(env)
            }
            Ok(returned) => returned,
            Err(_) => panicked(env),
        }
    }

    fn panicked(env: Env) -> NifReturned {
        NifReturned::Term((atom::error(), atom::nif_panicked()).encode(env).as_c_arg())
    }
}
