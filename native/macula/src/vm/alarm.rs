//! A timer for what happens seldom. The runtime keeps its timers in a wheel, whose coarse turns wake the
//! thread some times before the timer is due; a timer of the system's own wakes the thread once.

use std::time::Instant;

use tokio::time::sleep_until;

/// One timer. To be made and used inside a runtime.
pub(crate) struct Alarm {
    #[cfg(target_os = "linux")]
    system: Option<system::Timer>,
}

impl Alarm {
    pub(crate) fn new() -> Self {
        Alarm {
            #[cfg(target_os = "linux")]
            system: system::Timer::new().ok(),
        }
    }

    /// Completes at this time, or somewhat later.
    pub(crate) async fn at(&self, due: Instant) {
        #[cfg(target_os = "linux")]
        if let Some(system) = &self.system
            && system.at(due).await.is_ok()
        {
            return;
        }
        // The system has no such timer, or none to give.
        sleep_until(due.into()).await;
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::time::Instant;

    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    pub(super) struct Timer(AsyncFd<OwnedFd>);

    impl Timer {
        pub(super) fn new() -> io::Result<Self> {
            let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
            // SAFETY: takes no pointers.
            let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor is new, and nobody else's.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // SAFETY: the `AsyncFd` owns the descriptor.
            let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
            Ok(Timer(fd))
        }

        pub(super) async fn at(&self, due: Instant) -> io::Result<()> {
            self.set(due)?;
            loop {
                let mut guard = self.0.readable().await?;
                // What an earlier time left behind is no longer there to be read.
                match guard.try_io(|fd| expired(fd.get_ref())) {
                    Ok(expired) => return expired,
                    Err(_would_block) => {}
                }
            }
        }

        fn set(&self, due: Instant) -> io::Result<()> {
            let left = due.saturating_duration_since(Instant::now());
            let time = libc::itimerspec {
                it_interval: libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                },
                it_value: libc::timespec {
                    tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
                    // All zero would mean never.
                    tv_nsec: libc::c_long::from(left.subsec_nanos().max(1).cast_signed()),
                },
            };
            let fd = self.0.get_ref().as_raw_fd();
            // SAFETY: a live descriptor and a live time; the old time is not asked for.
            match unsafe { libc::timerfd_settime(fd, 0, &raw const time, std::ptr::null_mut()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    fn expired(fd: &OwnedFd) -> io::Result<()> {
        let mut times = [0; 8];
        // SAFETY: a live buffer of this size.
        match unsafe { libc::read(fd.as_raw_fd(), times.as_mut_ptr().cast(), times.len()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn an_alarm_wakes_its_thread_once() {
        fn sleeps() -> u32 {
            let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.and_then(|count| count.trim().parse().ok())
                .expect("a count")
        }

        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(async {
            let alarm = Alarm::new();
            let due = Instant::now() + Duration::from_secs(2);
            let before = sleeps();
            alarm.at(due).await;
            // The runtime's own timer takes two or three.
            assert_eq!(1, sleeps() - before);
        });
    }

    #[test]
    fn an_alarm_rings_when_it_is_due_and_obeys_the_time_it_was_given_last() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(async {
            let alarm = Alarm::new();
            let begun = Instant::now();
            let [soon, late] = [20, 3_600_000].map(Duration::from_millis);
            // At once, and again.
            alarm.at(begun).await;
            alarm.at(begun).await;
            // It has rung, and nobody has heard it.
            let _ = timeout(Duration::ZERO, alarm.at(begun + soon)).await;
            std::thread::sleep(2 * soon);
            assert!(timeout(soon, alarm.at(begun + late)).await.is_err());
            let due = Instant::now() + soon;
            alarm.at(due).await;
            assert!(Instant::now() >= due);
        });
    }
}
