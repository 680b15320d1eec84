//! Resources whose types outlive the Erlang module.
//!
//! The VM frees a resource type when its module is purged and no object of it lives: `init:restart/0`
//! does that to every module. Native threads do not know, and what they made next would be made with
//! freed memory. So with the first object all types are pinned, by an object of each that is never
//! released. A module that is loaded later uses the same types, and what was made before stays valid
//! for whoever still holds it.

use std::any::TypeId;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::ops::Deref;
use std::panic::catch_unwind;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use upstream::codegen_runtime::inventory;
use upstream::sys::{
    ErlNifEnv, ErlNifMonitor, ErlNifPid, ErlNifResourceDown, ErlNifResourceDtor,
    ErlNifResourceFlags, ErlNifResourceType, ErlNifResourceTypeInit, enif_alloc_resource,
    enif_demonitor_process, enif_get_resource, enif_keep_resource, enif_make_resource,
    enif_monitor_process, enif_open_resource_type_x, enif_release_resource,
};
use upstream::thread::is_scheduler_thread;
use upstream::{Decoder, Encoder, Env, Error, LocalPid, Monitor, NifResult, Term};

/// What the VM can hold a reference to.
pub trait Resource: Sized + Send + Sync + 'static {
    /// Whether `down` is to be called; the macro sets it.
    const IMPLEMENTS_DOWN: bool = false;

    /// A process that is monitored for this object has died. Runs on a thread of the VM.
    #[allow(unused_variables)]
    fn down<'a>(&'a self, env: Env<'a>, pid: LocalPid, monitor: Monitor) {}
}

/// A type that is to be made known to the VM.
pub struct Registration {
    id: fn() -> TypeId,
    rust_name: fn() -> &'static str,
    name: Option<&'static str>,
    callbacks: ErlNifResourceTypeInit,
}

// SAFETY: the pointers in it are those of functions.
unsafe impl Sync for Registration {}

inventory::collect!(Registration);

impl Registration {
    pub const fn new<T: Resource>() -> Self {
        let down = if T::IMPLEMENTS_DOWN {
            down::<T> as *const ErlNifResourceDown
        } else {
            ptr::null()
        };
        Self {
            id: TypeId::of::<T>,
            rust_name: std::any::type_name::<T>,
            name: None,
            callbacks: ErlNifResourceTypeInit {
                // Each has one: the VM keeps the library for as long as it may have to call it.
                dtor: destroy::<T> as *const ErlNifResourceDtor,
                stop: ptr::null(),
                down,
            },
        }
    }

    pub const fn with_name(mut self, name: &'static str) -> Self {
        self.name = Some(name);
        self
    }

    /// # Safety
    /// `env` is that of a load callback.
    unsafe fn open(&self, env: *mut ErlNifEnv) -> Option<Type> {
        let name = CString::new(self.name.unwrap_or_else(self.rust_name)).ok()?;
        let mut tried = ErlNifResourceFlags::ERL_NIF_RT_CREATE;
        // SAFETY: the VM copies what these point to.
        let raw = unsafe {
            enif_open_resource_type_x(
                env,
                name.as_ptr(),
                &raw const self.callbacks,
                ErlNifResourceFlags::ERL_NIF_RT_CREATE,
                &raw mut tried,
            )
        };
        (!raw.is_null()).then_some(Type {
            id: (self.id)(),
            raw,
        })
    }
}

struct Type {
    id: TypeId,
    raw: *const ErlNifResourceType,
}

/// The types the VM knows; null before it knows any. A list that was published is never freed.
static TYPES: AtomicPtr<Vec<Type>> = AtomicPtr::new(ptr::null_mut());
static PINNED: Once = Once::new();

fn types() -> Option<&'static [Type]> {
    // SAFETY: null, or a list that is never freed nor changed.
    unsafe { TYPES.load(Ordering::Acquire).as_ref() }.map(Vec::as_slice)
}

fn type_of<T: Resource>() -> Option<*const ErlNifResourceType> {
    let id = TypeId::of::<T>();
    let found = types()?.iter().find(|one| one.id == id)?;
    Some(found.raw)
}

/// Makes all types known to the VM, unless they are.
///
/// # Safety
/// `env` is that of a load callback.
pub(crate) unsafe fn open_all(env: *mut ErlNifEnv) -> bool {
    if types().is_some() {
        // Pinned: else they would have been forgotten with the module that opened them.
        return true;
    }
    let opened: Option<Vec<_>> = inventory::iter::<Registration>()
        // SAFETY: as promised by the caller.
        .map(|one| unsafe { one.open(env) })
        .collect();
    match opened {
        Some(opened) => {
            TYPES.store(Box::into_raw(Box::new(opened)), Ordering::Release);
            true
        }
        None => false,
    }
}

/// Keeps all types for a module that takes over. False if this library knows of none.
pub(crate) fn keep_all() -> bool {
    if types().is_none() {
        return false;
    }
    PINNED.call_once(pin);
    true
}

/// A module is gone. Unless they are pinned, the VM has freed the types with it.
pub(crate) fn module_gone() {
    if PINNED.is_completed() {
        return;
    }
    TYPES.store(ptr::null_mut(), Ordering::Release);
}

fn pin() {
    for one in types().unwrap_or_default() {
        // SAFETY: the type is open. What is allocated is never released, so never looked into.
        unsafe { enif_alloc_resource(one.raw, 1) };
    }
}

/// Room for a `T` wherever the VM's alignment puts it.
const fn room<T>() -> usize {
    size_of::<T>() + align_of::<T>() - 1
}

/// Where in its room the `T` is.
fn place<T>(raw: *const c_void) -> *mut T {
    let offset = raw.align_offset(align_of::<T>());
    raw.wrapping_byte_add(offset).cast::<T>().cast_mut()
}

unsafe extern "C" fn destroy<T: Resource>(_env: *mut ErlNifEnv, raw: *mut c_void) {
    // A panic in it must not reach the VM, and there is nobody to tell.
    let _ = catch_unwind(|| {
        // SAFETY: the VM calls it once, when nobody can reach the object any more.
        unsafe { ptr::drop_in_place(place::<T>(raw)) }
    });
}

unsafe extern "C" fn down<T: Resource>(
    env: *mut ErlNifEnv,
    raw: *mut c_void,
    pid: *const ErlNifPid,
    monitor: *const ErlNifMonitor,
) {
    // As above.
    let _ = catch_unwind(|| {
        // SAFETY: the VM passes a live object, and both pointers are good for the call.
        let (object, pid, monitor) = unsafe { (&*place::<T>(raw), *pid, *monitor) };
        let scope = ();
        // SAFETY: used within this call only.
        let env = unsafe { Env::new(&scope, env) };
        object.down(env, LocalPid::from_c_arg(pid), Monitor::from_c_arg(monitor));
    });
}

/// A counted reference to an object that the VM can hold references to as well.
pub struct ResourceArc<T: Resource> {
    raw: *const c_void,
    of: PhantomData<T>,
}

// SAFETY: the count is the VM's, which is atomic, and `T` can be used from any thread.
unsafe impl<T: Resource> Send for ResourceArc<T> {}
// SAFETY: as above.
unsafe impl<T: Resource> Sync for ResourceArc<T> {}

impl<T: Resource> ResourceArc<T> {
    /// Panics if no module has loaded the library.
    pub fn new(value: T) -> Self {
        PINNED.call_once(pin);
        let Some(of) = type_of::<T>() else {
            panic!("the resource type is not registered");
        };
        // SAFETY: the type is pinned; the room is large enough for the value at its place.
        let raw = unsafe {
            let raw = enif_alloc_resource(of, room::<T>());
            place::<T>(raw).write(value);
            raw
        };
        Self {
            raw,
            of: PhantomData,
        }
    }

    /// Watches a process; `env` is that of the calling process, or nothing on a native thread.
    pub fn monitor(&self, env: Option<Env>, pid: &LocalPid) -> Option<Monitor> {
        if !T::IMPLEMENTS_DOWN {
            return None;
        }
        let env = caller(env);
        // SAFETY: a plain value, of which zero is one.
        let mut monitor: ErlNifMonitor = unsafe { std::mem::zeroed() };
        // SAFETY: the object lives, and the other pointers are good for the call.
        let refused =
            unsafe { enif_monitor_process(env, self.raw, pid.as_c_arg(), &raw mut monitor) };
        (refused == 0).then(|| Monitor::from_c_arg(monitor))
    }

    /// Ends the watch. False if it had ended.
    pub fn demonitor(&self, env: Option<Env>, monitor: &Monitor) -> bool {
        let env = caller(env);
        // SAFETY: as above.
        unsafe { enif_demonitor_process(env, self.raw, monitor.as_c_arg()) == 0 }
    }
}

/// The VM wants the environment of the caller on its own threads, and none on others.
fn caller(env: Option<Env>) -> *mut ErlNifEnv {
    match env {
        Some(env) if is_scheduler_thread() => env.as_c_arg(),
        _ => ptr::null_mut(),
    }
}

impl<T: Resource> Deref for ResourceArc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the object lives as long as a reference to it, and nobody changes it.
        unsafe { &*place::<T>(self.raw) }
    }
}

impl<T: Resource> Clone for ResourceArc<T> {
    fn clone(&self) -> Self {
        // SAFETY: the object lives.
        unsafe { enif_keep_resource(self.raw) };
        Self {
            raw: self.raw,
            of: PhantomData,
        }
    }
}

impl<T: Resource> Drop for ResourceArc<T> {
    fn drop(&mut self) {
        // SAFETY: this reference is counted.
        unsafe { enif_release_resource(self.raw) };
    }
}

impl<T: Resource> Encoder for ResourceArc<T> {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        // SAFETY: the object lives; the term is of this environment.
        unsafe { Term::new(env, enif_make_resource(env.as_c_arg(), self.raw)) }
    }
}

impl<'a, T: Resource> Decoder<'a> for ResourceArc<T> {
    fn decode(term: Term<'a>) -> NifResult<Self> {
        let of = type_of::<T>().ok_or(Error::BadArg)?;
        let mut raw = ptr::null();
        // SAFETY: the type is open.
        let found = unsafe {
            enif_get_resource(term.get_env().as_c_arg(), term.as_c_arg(), of, &raw mut raw)
        };
        if found == 0 {
            return Err(Error::BadArg);
        }
        // SAFETY: the term keeps the object alive until it is counted here.
        unsafe { enif_keep_resource(raw) };
        Ok(Self {
            raw,
            of: PhantomData,
        })
    }
}

// A panic in a NIF ends nothing that a resource guards: what they guard are locks that can be taken
// after a panic too.
impl<T: Resource> std::panic::RefUnwindSafe for ResourceArc<T> {}
impl<T: Resource> std::panic::UnwindSafe for ResourceArc<T> {}
