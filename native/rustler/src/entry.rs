//! What the VM is told about the library, and what it calls when it loads and unloads it.

use std::ffi::{CStr, c_int, c_void};
use std::panic::catch_unwind;
use std::sync::OnceLock;

use upstream::codegen_runtime::{ErlNifEntry, inventory};
use upstream::sys::{ErlNifEnv, ErlNifTerm};

use crate::resource;

struct Entry(ErlNifEntry);

// SAFETY: made once, read by the VM, and what the pointers in it point to is never freed.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// The entry of a library with all functions marked as NIFs, for the module of this name.
pub fn entry(module: &'static CStr) -> *const ErlNifEntry {
    static ENTRY: OnceLock<Entry> = OnceLock::new();
    let entry = ENTRY.get_or_init(|| {
        // SAFETY: the VM is there, as it asks for the entry.
        unsafe { upstream::codegen_runtime::internal_write_symbols() };
        let functions: Vec<_> = inventory::iter::<upstream::Nif>()
            .map(upstream::Nif::get_def)
            .collect();
        let mut entry = ErlNifEntry::new(module, functions.leak(), load);
        entry.upgrade = Some(upgrade);
        entry.unload = Some(unload);
        Entry(entry)
    });
    &raw const entry.0
}

/// The module has no predecessor, or none that is still there.
unsafe extern "C" fn load(
    env: *mut ErlNifEnv,
    _private: *mut *mut c_void,
    _info: ErlNifTerm,
) -> c_int {
    status(catch_unwind(|| {
        // SAFETY: this is the environment of a load callback.
        unsafe { resource::open_all(env) }
    }))
}

/// The module is loaded over itself.
unsafe extern "C" fn upgrade(
    _env: *mut ErlNifEnv,
    _private: *mut *mut c_void,
    _old_private: *mut *mut c_void,
    _info: ErlNifTerm,
) -> c_int {
    // Another build of the library cannot take over the objects of this one, and says no: then the old
    // module stays with all its objects.
    status(catch_unwind(resource::keep_all))
}

/// A module that used the library is gone, and so are the objects of the types it opened.
unsafe extern "C" fn unload(_env: *mut ErlNifEnv, _private: *mut c_void) {
    resource::module_gone();
}

fn status(done: std::thread::Result<bool>) -> c_int {
    c_int::from(!done.unwrap_or(false))
}
