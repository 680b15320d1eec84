//! Who owns a handle, and the messages it sends to its owner.
//!
//! A native task holds the inner state of what it serves, never the handle: else the collector
//! could not reach it. To name the handle in a message the task keeps the handle's external form,
//! which the VM turns back into the live resource, or into a stale reference once it was collected
//! (erl_nif, `enif_make_resource`). A handle that has promised its owner further messages (a
//! listener that accepts, a stream in active mode) is pinned while the promise stands, as a port
//! would be: a loop that only receives need not carry it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustler::{Atom, Encoder, Env, LocalPid, Monitor, Resource, ResourceArc, Term};

use crate::vm::messages::{self, Gone, atoms};
use crate::vm::runtime;

/// Builds a message for an owner from the handle; what it makes belongs to that owner.
type Message = Box<dyn for<'a> FnOnce(Env<'a>, Term<'a>, LocalPid) -> Option<Term<'a>> + Send>;

pub(crate) struct Owner<T: Resource>(Mutex<State<T>>);

struct State<T: Resource> {
    pid: LocalPid,
    monitor: Option<Monitor>,
    /// Empty where messages do not name the handle.
    name: Option<Vec<u8>>,
    pinned: Option<ResourceArc<T>>,
    transfer: Option<Box<Transfer>>,
    /// The terminal message is out: nothing follows it.
    ended: bool,
}

/// Between the two steps of a change of owner messages wait here, so that none overtakes those
/// that the old owner still forwards.
struct Transfer {
    to: LocalPid,
    monitor: Monitor,
    to_is_dead: bool,
    waiting: Vec<Message>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferError {
    NotOwner,
    NoProcess,
}

impl<T: Resource> Owner<T> {
    pub(crate) fn new(pid: LocalPid) -> Self {
        Owner(Mutex::new(State {
            pid,
            monitor: None,
            name: Some(Vec::new()),
            pinned: None,
            transfer: None,
            ended: false,
        }))
    }

    /// Of a handle that its owner knows by another name: messages are built from `undefined` in its place.
    /// A handle that is made a term for a message lives until the receiver collects its garbage.
    pub(crate) fn nameless(pid: LocalPid) -> Self {
        let owner = Self::new(pid);
        owner.lock().name = None;
        owner
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ties a new handle to the process that will own it. `Gone` if that is dead already.
    pub(crate) fn attach(
        &self,
        env: Env,
        handle: &ResourceArc<T>,
        pid: LocalPid,
    ) -> Result<(), Gone> {
        let mut state = self.lock();
        state.pid = pid;
        if let Some(name) = &mut state.name {
            *name = handle.encode(env).to_binary().as_slice().to_vec();
        }
        state.monitor = handle.monitor(Some(env), &pid);
        match state.monitor {
            Some(_) => Ok(()),
            None => Err(Gone),
        }
    }

    pub(crate) fn pid(&self) -> LocalPid {
        self.lock().pid
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Keeps the handle from being collected while it owes its owner messages.
    pub(crate) fn pin(&self, handle: &ResourceArc<T>) {
        let mut state = self.lock();
        if !state.ended {
            state.pinned = Some(handle.clone());
        }
    }

    /// Lets the collector reach the handle again. The result is dropped by the caller outside of
    /// its locks: it may be the last reference, whose destructor takes them.
    #[must_use]
    pub(crate) fn take_pin(&self) -> Option<ResourceArc<T>> {
        self.lock().pinned.take()
    }

    /// Sends another process `{quic, Tag, Handle, undefined}`.
    pub(crate) fn tell(&self, to: LocalPid, tag: Atom) {
        let state = self.lock();
        // A process that is gone is not told.
        let _ = messages::send(&to, |env| {
            let handle = state.handle(env)?;
            Some(messages::event(env, tag, handle, atoms::undefined()))
        });
    }

    /// Sends the owner a message.
    pub(crate) fn post<F>(&self, build: F) -> Result<(), Gone>
    where
        F: for<'a> FnOnce(Env<'a>, Term<'a>, LocalPid) -> Option<Term<'a>> + Send + 'static,
    {
        let mut state = self.lock();
        if state.ended {
            return Err(Gone);
        }
        state.deliver(build)
    }

    /// Sends the owner a message, from a NIF. False after the terminal one.
    pub(crate) fn post_from_nif<F>(&self, env: Env, handle: &ResourceArc<T>, build: F) -> bool
    where
        F: for<'a> FnOnce(Env<'a>, Term<'a>, LocalPid) -> Option<Term<'a>> + Send + 'static,
    {
        let mut state = self.lock();
        if state.ended {
            return false;
        }
        if let Some(transfer) = &mut state.transfer {
            transfer.waiting.push(Box::new(build));
            return true;
        }
        let to = state.pid;
        if let Some(message) = build(env, state.term(env, handle), to) {
            // A dead owner needs no message.
            let _ = env.send(&to, message);
        }
        true
    }

    /// Returns when no message is being sent: one that was begun before is in the mailbox then.
    pub(crate) fn settled(&self) {
        drop(self.lock());
    }

    /// Sends the owner the last message about this handle, if it was not sent before.
    pub(crate) fn post_terminal<F>(&self, build: F)
    where
        F: for<'a> FnOnce(Env<'a>, Term<'a>, LocalPid) -> Option<Term<'a>> + Send + 'static,
    {
        let mut state = self.lock();
        if state.ended {
            return;
        }
        // An owner that is gone, or a handle that nobody holds, has nobody to tell.
        let _ = state.deliver(build);
        state.ended = true;
        let pinned = state.pinned.take();
        drop(state);
        drop(pinned);
    }

    /// The first step of a change of owner: from here on messages wait.
    pub(crate) fn begin_transfer(
        &self,
        env: Env,
        handle: &ResourceArc<T>,
        to: LocalPid,
    ) -> Result<(), TransferError> {
        let mut state = self.lock();
        if state.pid != env.pid() || state.transfer.is_some() {
            return Err(TransferError::NotOwner);
        }
        let monitor = handle
            .monitor(Some(env), &to)
            .ok_or(TransferError::NoProcess)?;
        state.transfer = Some(Box::new(Transfer {
            to,
            monitor,
            to_is_dead: false,
            waiting: Vec::new(),
        }));
        Ok(())
    }

    /// The second step: the new owner gets what waited, and all that comes. Returns whether it
    /// lives.
    pub(crate) fn commit_transfer(&self, env: Env, handle: &ResourceArc<T>) -> bool {
        let mut state = self.lock();
        let Some(transfer) = state.transfer.take() else {
            return true;
        };
        if let Some(old) = state.monitor.replace(transfer.monitor) {
            handle.demonitor(Some(env), &old);
        }
        state.pid = transfer.to;
        let name = state.term(env, handle);
        for message in transfer.waiting {
            if let Some(message) = message(env, name, transfer.to) {
                // A dead new owner is reported below.
                let _ = env.send(&transfer.to, message);
            }
        }
        !transfer.to_is_dead
    }

    /// A monitored process died: is it the owner?
    pub(crate) fn is_down(&self, monitor: Monitor) -> bool {
        let mut state = self.lock();
        if let Some(transfer) = &mut state.transfer
            && transfer.monitor == monitor
        {
            transfer.to_is_dead = true;
            return false;
        }
        let owner_died = state.monitor.is_some_and(|m| m == monitor);
        if owner_died && let Some(abandoned) = state.transfer.take() {
            // It died between the two steps. What waits may hold what it is about, this very
            // object too: it must not stay here.
            if let Some(native) = runtime::running() {
                native.start(async move { drop(abandoned) });
            }
        }
        owner_died
    }
}

impl<T: Resource> State<T> {
    fn deliver<F>(&mut self, build: F) -> Result<(), Gone>
    where
        F: for<'a> FnOnce(Env<'a>, Term<'a>, LocalPid) -> Option<Term<'a>> + Send + 'static,
    {
        if let Some(transfer) = &mut self.transfer {
            transfer.waiting.push(Box::new(build));
            return Ok(());
        }
        let to = self.pid;
        messages::send(&to, |env| build(env, self.handle(env)?, to))
    }

    fn handle<'a>(&self, env: Env<'a>) -> Option<Term<'a>> {
        match (&self.pinned, &self.name) {
            (_, None) => Some(atoms::undefined().encode(env)),
            (Some(handle), Some(_)) => Some(handle.encode(env)),
            (None, Some(name)) => recreate::<T>(env, name),
        }
    }

    fn term<'a>(&self, env: Env<'a>, handle: &ResourceArc<T>) -> Term<'a> {
        match self.name {
            Some(_) => handle.encode(env),
            None => atoms::undefined().encode(env),
        }
    }
}

/// The live handle behind its external form.
fn recreate<'a, T: Resource>(env: Env<'a>, name: &[u8]) -> Option<Term<'a>> {
    let alive = |term: Term<'a>| term.decode::<ResourceArc<T>>().ok().map(|_| term);
    // SAFETY: `name` is what the VM itself wrote.
    let (term, _) = unsafe { env.binary_to_term_trusted(name) }?;
    alive(term).or_else(|| {
        // Collected; or the node took another name since, which the external form holds. The
        // numbers that end a reference stay the same.
        let fresh = env.make_ref().to_binary();
        let numbers = 12;
        let head = fresh.len().checked_sub(numbers)?;
        let mut renamed = fresh.as_slice()[..head].to_vec();
        renamed.extend_from_slice(name.get(name.len().checked_sub(numbers)?..)?);
        // SAFETY: a well formed reference of this node.
        let (term, _) = unsafe { env.binary_to_term_trusted(&renamed) }?;
        alive(term)
    })
}
