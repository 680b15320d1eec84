//! What the VM holds of a link.

use std::sync::{Arc, Mutex, PoisonError};

use rustler::{Env, LocalPid, Monitor, Resource, ResourceArc};

use super::Link;
use crate::vm::tasks::attempt;

/// The VM's handle on a link.
pub(crate) struct LinkHandle {
    pub(crate) link: Arc<Link>,
    owner: Mutex<Option<Monitor>>,
}

#[rustler::resource_impl]
impl Resource for LinkHandle {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        let owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        // A monitor that was replaced is no longer of interest.
        if owner.as_ref() == Some(&monitor) {
            // The native thread does what a panic leaves.
            let _ = attempt(|| self.link.end_inline());
            self.link.stop();
        }
    }
}

impl LinkHandle {
    pub(crate) fn new(link: Arc<Link>) -> ResourceArc<Self> {
        ResourceArc::new(Self {
            link,
            owner: Mutex::new(None),
        })
    }

    /// Makes the process the owner. False when it is dead already.
    pub(crate) fn own(this: &ResourceArc<Self>, env: Env<'_>, pid: &LocalPid) -> bool {
        let mut owner = this.owner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = owner.take() {
            this.demonitor(Some(env), &old);
        }
        *owner = this.monitor(Some(env), pid);
        owner.is_some()
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.link.stop();
    }
}
