//! What the VM holds of a link.

use std::sync::{Arc, Mutex, PoisonError};

use rustler::{Env, LocalPid, Monitor, Resource, ResourceArc};

use super::Link;
use crate::vm::tasks::attempt;

/// The VM's handle on a link.
pub(crate) struct LinkHandle {
    pub(crate) link: Arc<Link>,
    owners: Mutex<Vec<Monitor>>,
}

#[rustler::resource_impl]
impl Resource for LinkHandle {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        let owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        // A monitor that was replaced is no longer of interest.
        if owners.contains(&monitor) {
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
            owners: Mutex::default(),
        })
    }

    /// Makes the processes the owners: the link ends with the first that does. False when one is dead already.
    pub(crate) fn own(this: &ResourceArc<Self>, env: Env<'_>, pids: &[LocalPid]) -> bool {
        let mut owners = this.owners.lock().unwrap_or_else(PoisonError::into_inner);
        for old in owners.drain(..) {
            this.demonitor(Some(env), &old);
        }
        owners.extend(pids.iter().filter_map(|pid| this.monitor(Some(env), pid)));
        owners.len() == pids.len()
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.link.stop();
    }
}
