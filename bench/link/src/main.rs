//! A line between two network namespaces: rate, delay, a queue that drops its tail, and loss.
//!
//! `macula_bench_link NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B RATE DELAY_US QUEUE`
//!
//! RATE is bytes per second, QUEUE bytes that may wait for it, each way. The program makes a TUN device
//! in each namespace, says `ready`, and then obeys lines on its standard input: `loss PART` (0 to 1) changes the
//! loss of both ways; `figures` has it write, for each way since the last time, how long packets waited in the
//! queue, how late they were at the other end (microseconds: p50, p99, most), and how many the queue had no
//! room for. It ends with its input.
//!
//! Linux alone has TUN devices like these; elsewhere the program says so and ends.

#[cfg(target_os = "linux")]
fn main() -> std::io::Result<()> {
    linux::run()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("macula_bench_link: needs Linux");
    std::process::exit(1);
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::VecDeque;
    use std::fs::{File, OpenOptions};
    use std::io::{self, BufRead, Error, ErrorKind, Read, Write};
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::{Duration, Instant};

    const MTU: usize = 1500;
    /// The line is looked at so often: to wake up for each packet would take the processor from those who
    /// are measured.
    const TICK: Duration = Duration::from_micros(500);
    /// Loss is compared with the upper 32 bits of a random number.
    const CERTAIN: f64 = 4_294_967_296.0;

    #[derive(Clone, Copy)]
    struct Line {
        rate: f64,
        delay: Duration,
        queue: f64,
    }

    pub(super) fn run() -> io::Result<()> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let [from, from_ip, to, to_ip, rate, delay, queue] = args.as_slice() else {
            return Err(Error::new(ErrorKind::InvalidInput, "seven arguments"));
        };
        let line = Line {
            rate: number(rate)?,
            delay: Duration::from_secs_f64(number(delay)? / 1e6),
            queue: number(queue)?,
        };
        let a = Arc::new(tun("macula_a", from, from_ip)?);
        let b = Arc::new(tun("macula_b", to, to_ip)?);
        let loss = Arc::new(AtomicU64::new(0));
        let ways: [Arc<Mutex<Figures>>; 2] = Default::default();
        for (seed, source, target) in [(1, a.clone(), b.clone()), (2, b, a)] {
            let loss = loss.clone();
            let figures = ways[seed as usize - 1].clone();
            std::thread::spawn(move || {
                prefer_this_thread();
                if let Err(e) = carry(&source, &target, line, &loss, &figures, seed) {
                    eprintln!("macula_bench_link: {e}");
                    std::process::exit(1);
                }
            });
        }
        println!("ready");
        for command in io::stdin().lock().lines() {
            let command = command?;
            if let Some(part) = command.strip_prefix("loss ") {
                let part = number(part)?.clamp(0.0, 1.0);
                loss.store((part * CERTAIN) as u64, Ordering::Relaxed);
            } else if command == "figures" {
                let [to, back] = ways.each_ref().map(take_figures);
                println!("figures {to} {back}");
            }
        }
        Ok(())
    }

    /// What has happened on one way.
    #[derive(Default)]
    struct Figures {
        /// Microseconds.
        queued: Vec<u32>,
        late: Vec<u32>,
        full: u64,
    }

    fn take_figures(way: &Arc<Mutex<Figures>>) -> String {
        let mut figures = std::mem::take(&mut *way.lock().unwrap_or_else(PoisonError::into_inner));
        let queued = spread(&mut figures.queued);
        let late = spread(&mut figures.late);
        format!("{queued} {late} {}", figures.full)
    }

    fn spread(values: &mut [u32]) -> String {
        values.sort_unstable();
        let at = |part: usize| values.get(values.len() * part / 100).or(values.last());
        let [p50, p99, most] = [50, 99, 100].map(|part| at(part).copied().unwrap_or_default());
        format!("{p50} {p99} {most}")
    }

    fn number(text: &str) -> io::Result<f64> {
        text.trim()
            .parse()
            .map_err(|_| Error::new(ErrorKind::InvalidInput, format!("not a number: {text}")))
    }

    /// Makes a TUN device and moves it into a namespace.
    fn tun(name: &str, namespace: &str, address: &str) -> io::Result<File> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        // SAFETY: all zeros is a valid request, which the kernel only reads and writes in place.
        let done = unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
            libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &mut request)
        };
        if done < 0 {
            return Err(Error::last_os_error());
        }
        ip(&["link", "set", name, "netns", namespace])?;
        let within = |rest: &[&str]| ip(&[&["-n", namespace], rest].concat());
        within(&["address", "add", address, "dev", name])?;
        within(&[
            "link",
            "set",
            name,
            "up",
            "mtu",
            &MTU.to_string(),
            "txqueuelen",
            "10000",
        ])?;
        within(&["link", "set", "lo", "up"])?;
        Ok(device)
    }

    fn ip(args: &[&str]) -> io::Result<()> {
        match Command::new("ip").args(args).status()? {
            status if status.success() => Ok(()),
            _ => Err(Error::other(format!("ip {}", args.join(" ")))),
        }
    }

    /// A line has no processor to wait for. Without the right to say so the measurement is less exact.
    fn prefer_this_thread() {
        let param = libc::sched_param { sched_priority: 1 };
        // SAFETY: `param` lives through the call, which concerns the calling thread only.
        let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
    }

    fn carry(
        mut source: &File,
        mut target: &File,
        line: Line,
        loss: &AtomicU64,
        figures_of: &Mutex<Figures>,
        mut random: u64,
    ) -> io::Result<()> {
        let mut waiting: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut free_at = Instant::now();
        let mut buffer = [0; MTU + 64];
        loop {
            let now = Instant::now();
            let mut figures = figures_of.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let len = match source.read(&mut buffer) {
                    Ok(len) => len,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                };
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                if random >> 32 < loss.load(Ordering::Relaxed) {
                    continue;
                }
                free_at = free_at.max(now);
                let queued = (free_at - now).as_secs_f64() * line.rate;
                if queued + len as f64 > line.queue {
                    figures.full += 1;
                    continue;
                }
                figures.queued.push((free_at - now).as_micros() as u32);
                free_at += Duration::from_secs_f64(len as f64 / line.rate);
                waiting.push_back((free_at + line.delay, buffer[..len].to_vec()));
            }
            while waiting.front().is_some_and(|(due, _)| *due <= now) {
                if let Some((due, packet)) = waiting.pop_front() {
                    figures.late.push((now - due).as_micros() as u32);
                    // A device that is full or down loses the packet, as a line's end would.
                    let _ = target.write(&packet);
                }
            }
            drop(figures);
            if waiting.is_empty() {
                wait_readable(source.as_raw_fd())?;
            } else {
                std::thread::sleep(TICK);
            }
        }
    }

    fn wait_readable(fd: RawFd) -> io::Result<()> {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `poll` lives through the call.
        match unsafe { libc::poll(&mut poll, 1, -1) } {
            -1 if Error::last_os_error().kind() != ErrorKind::Interrupted => {
                Err(Error::last_os_error())
            }
            _ => Ok(()),
        }
    }
}
