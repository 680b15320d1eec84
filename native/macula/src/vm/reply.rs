//! Answers to calls that take time: the NIF returns an operation at once, the answer follows as
//! one message `{Ref, Result}`. A caller that stops waiting cancels the operation, and then either
//! no answer will come or it has come already: none is ever late.
//!
//! A caller may also die. It is asked for now and then by those who make others wait behind it, or
//! work for it, and not monitored: with a monitor of the calling process for each operation
//! OTP 25 crashed under load (macula_quic_robustness_SUITE).

use std::sync::Arc;
use std::time::Duration;

use rustler::env::SavedTerm;
use rustler::thread::is_scheduler_thread;
use rustler::{Encoder, Env, LocalPid, OwnedEnv, Resource, ResourceArc, Term};

use crate::vm::fault::{self, Point};
use crate::vm::messages::{self, Gone, atoms};
use crate::vm::outcome::Outcome;

/// What an operation that may wait long is about: the operation keeps it from being collected, as
/// a caller that only waits need not hold it, and tells it when the caller gives up.
pub(crate) trait Subject: Send + Sync {
    /// Runs on VM threads.
    fn cancelled(&self);
}

/// For those that are not about a handle.
impl Subject for () {
    fn cancelled(&self) {}
}

/// How often to ask whether a caller lives.
pub(crate) const LIVENESS: Duration = Duration::from_millis(100);

fn is_alive(pid: LocalPid) -> bool {
    OwnedEnv::new().run(|env| pid.is_alive(env))
}

/// What the caller holds of a pending operation.
pub(crate) struct Operation {
    outcome: Arc<Outcome>,
    subject: Option<Box<dyn Subject>>,
}

#[rustler::resource_impl]
impl Resource for Operation {}

impl Operation {
    /// `false` if it is answered already.
    fn cancel(&self) -> bool {
        let cancelled = self.outcome.cancel();
        if cancelled && let Some(subject) = &self.subject {
            subject.cancelled();
        }
        cancelled
    }
}

/// What the task that does the work holds of it. Answers with an error when dropped unanswered,
/// so that a task that panics does not leave its caller waiting.
pub(crate) struct Reply {
    outcome: Arc<Outcome>,
    caller: LocalPid,
    env: OwnedEnv,
    reference: SavedTerm,
}

impl Reply {
    /// An operation of the calling process, to be answered with `reference`, soon.
    pub(crate) fn new<'a>(env: Env<'a>, reference: Term<'a>) -> (Reply, ResourceArc<Operation>) {
        Self::make(env, reference, None)
    }

    /// An operation that may wait long.
    pub(crate) fn about<'a>(
        env: Env<'a>,
        reference: Term<'a>,
        subject: impl Subject + 'static,
    ) -> (Reply, ResourceArc<Operation>) {
        Self::make(env, reference, Some(Box::new(subject)))
    }

    fn make<'a>(
        env: Env<'a>,
        reference: Term<'a>,
        subject: Option<Box<dyn Subject>>,
    ) -> (Reply, ResourceArc<Operation>) {
        let outcome = Arc::new(Outcome::new());
        let owned = OwnedEnv::new();
        let reply = Reply {
            outcome: outcome.clone(),
            caller: env.pid(),
            reference: owned.save(reference),
            env: owned,
        };
        (reply, ResourceArc::new(Operation { outcome, subject }))
    }

    pub(crate) fn caller(&self) -> LocalPid {
        self.caller
    }

    /// Answers. `Gone` if nobody waits any more: then nothing was sent, and what the answer would
    /// have carried is still the task's to keep.
    pub(crate) fn send<F>(mut self, build: F) -> Result<(), Gone>
    where
        F: for<'a> FnOnce(Env<'a>) -> Term<'a>,
    {
        self.answer(build)
    }

    fn answer<F>(&mut self, build: F) -> Result<(), Gone>
    where
        F: for<'a> FnOnce(Env<'a>) -> Term<'a>,
    {
        let sent = self.outcome.answer(|| {
            let reference = self.reference.clone();
            messages::dispatch(&mut self.env, &self.caller, |env| {
                fault::pass(Point::Answer);
                (reference.load(env), build(env)).encode(env)
            })
        });
        sent.unwrap_or(Err(Gone))
    }

    /// Forgets the operation: the result of the NIF tells the caller.
    pub(crate) fn forget(self) {
        self.outcome.forget();
    }

    /// Answers `{error, Reason}`.
    pub(crate) fn error(self, reason: impl Encoder) {
        // A caller that is gone needs no error.
        let _ = self.send(|env| (atoms::error(), reason).encode(env));
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.outcome.is_cancelled()
    }

    /// The caller gave up, or died.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.is_cancelled() || !is_alive(self.caller)
    }

    /// Resolves when the caller stops waiting.
    pub(crate) fn cancelled(&self) -> impl Future<Output = ()> + Send + use<> {
        let outcome = self.outcome.clone();
        let caller = self.caller;
        async move {
            loop {
                let woken = outcome.given_up();
                if outcome.is_cancelled() {
                    return;
                }
                // A death wakes nobody.
                if tokio::time::timeout(LIVENESS, woken).await.is_err() && !is_alive(caller) {
                    return;
                }
            }
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let reason = match std::thread::panicking() {
            // The result of a NIF that panics tells the caller.
            true if is_scheduler_thread() => return,
            true => atoms::internal_error(),
            false => atoms::closed(),
        };
        // Who gave up waiting is not told.
        let _ = self.answer(|env| (atoms::error(), reason).encode(env));
    }
}

/// Gives up waiting: `true` if no answer will come, `false` if it is in the mailbox already.
#[rustler::nif]
fn op_cancel(operation: ResourceArc<Operation>) -> bool {
    operation.cancel()
}
