//! Signs of life for whoever restarts a hung agent: the supervisor (sd_notify(3)) and, if configured, a
//! hardware watchdog (the kernel's `Documentation/watchdog/watchdog-api.rst`).
//!
//! Both are fed by the progress of the reconcile loop and by nothing else: there is no timer or thread of their
//! own that could go on while the loop stands still. The protocol with the supervisor is one datagram per
//! message, so it is spoken here without a library.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use crate::config;

/// After a sign of life could not be given, it is tried again after this; well below any usual deadline.
const RETRY: Duration = Duration::from_secs(1);

/// Signs are given no more often than this, whatever deadline the environment names.
const EVERY_MIN: Duration = Duration::from_millis(10);

/// `WDIOC_SETTIMEOUT` of `linux/watchdog.h`.
const SET_TIMEOUT: libc::Ioctl = libc::_IOWR::<libc::c_int>(b'W' as u32, 6);

/// Written before a clean close: without it the hardware counts on (the "magic close").
const MAGIC_CLOSE: &[u8] = b"V";

/// The supervisor's and the hardware's view of this process. Says nothing to anybody where neither is set up.
#[derive(Debug, Default)]
pub struct Watchdog {
    supervisor: Option<Supervisor>,
    hardware: Option<Hardware>,
    ready: bool,
    told: String,
    due: Option<Instant>,
}

/// The socket that `NOTIFY_SOCKET` names.
#[derive(Debug)]
struct Supervisor {
    socket: UnixDatagram,
    address: SocketAddr,
    /// How often it wants a sign of life; `None` when it does not watch.
    every: Option<Duration>,
}

#[derive(Debug)]
struct Hardware {
    path: PathBuf,
    timeout: Duration,
    /// `None` while it cannot be opened.
    device: Option<File>,
    trouble: bool,
}

/// What a supervisor says in the environment of the programs it starts; see sd_notify(3) and
/// sd_watchdog_enabled(3).
#[derive(Debug, Default, Clone)]
pub struct Environment {
    /// `NOTIFY_SOCKET`: a path, or `@` and an abstract name (unix(7)).
    pub notify_socket: Option<OsString>,
    /// `WATCHDOG_USEC`: within how many microseconds it wants a sign of life.
    pub watchdog_usec: Option<String>,
    /// `WATCHDOG_PID`: which process that is meant for.
    pub watchdog_pid: Option<String>,
}

impl Environment {
    /// What this process was started with.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()),
            watchdog_usec: std::env::var("WATCHDOG_USEC").ok(),
            watchdog_pid: std::env::var("WATCHDOG_PID").ok(),
        }
    }

    /// How often to give a sign: at half of the deadline, as sd_watchdog_enabled(3) recommends.
    fn every(&self, pid: u32) -> Option<Duration> {
        let meant = |text: &String| text.parse::<u32>().is_ok_and(|wanted| wanted == pid);
        if self.watchdog_pid.as_ref().is_some_and(|text| !meant(text)) {
            return None;
        }
        let micros: u64 = self.watchdog_usec.as_ref()?.parse().ok()?;
        (micros > 0).then(|| Duration::from_micros(micros / 2).max(EVERY_MIN))
    }
}

impl Watchdog {
    /// Takes up what the supervisor asks for and opens the hardware watchdog, which counts from then on. What does not
    /// work is logged and borne: containers matter more.
    #[must_use]
    pub fn new(environment: &Environment, hardware: Option<&config::Watchdog>) -> Self {
        let supervisor = environment.notify_socket.as_ref().and_then(|name| {
            Supervisor::new(name, environment.every(std::process::id()))
                .inspect_err(|error| tracing::warn!(?name, %error, "NOTIFY_SOCKET cannot be used"))
                .ok()
        });
        let mut watchdog = Self {
            supervisor,
            hardware: hardware.map(|config| Hardware {
                path: config.device.clone(),
                timeout: config.timeout.duration(),
                device: None,
                trouble: false,
            }),
            ..Self::default()
        };
        if let Some(hardware) = &mut watchdog.hardware {
            // Tried again with each sign if it fails.
            let _retried = hardware.feed();
        }
        watchdog
    }

    /// The loop went round once: called after every plan and every event, and only there. Gives a sign of life when
    /// half of the shortest deadline has passed, and says that we are ready, once.
    pub fn progress(&mut self, now: Instant) {
        if !self.ready {
            self.ready = self.say("READY=1");
        }
        if self.due.is_some_and(|due| now < due) {
            return;
        }
        let Some(every) = self.every() else { return };
        let told = match &self.supervisor {
            Some(Supervisor { every: Some(_), .. }) => self.say("WATCHDOG=1"),
            _ => true,
        };
        let fed = self.hardware.as_mut().is_none_or(Hardware::feed);
        self.due = Some(now + if told && fed { every } else { every.min(RETRY) });
    }

    /// When [`Self::progress`] has something to do next; `None` is never.
    #[must_use]
    pub const fn wake_at(&self) -> Option<Instant> {
        self.due
    }

    /// Tells the supervisor what this process does, in one line for people, when that changed.
    pub fn status(&mut self, text: &str) {
        // One assignment is one line (sd_notify(3)): what follows a line's end would be another assignment.
        let line = text.replace('\n', " ");
        if self.told != line && self.supervisor.is_some() && self.say(&format!("STATUS={line}")) {
            self.told = line;
        }
    }

    /// The agent ends because it was asked to: tells the supervisor, and stops the hardware's clock. An agent that
    /// ends in any other way leaves it running.
    pub fn stop(&mut self) {
        self.say("STOPPING=1");
        self.due = None;
        if let Some(hardware) = self.hardware.take()
            && let Some(mut device) = hardware.device
            && let Err(error) = device.write_all(MAGIC_CLOSE)
        {
            tracing::error!(path = %hardware.path.display(), %error, "the hardware watchdog could not be stopped: the device will reboot");
        }
    }

    /// True when it was said, or nobody listens.
    fn say(&self, message: &str) -> bool {
        let Some(supervisor) = &self.supervisor else {
            return true;
        };
        supervisor
            .say(message)
            .inspect_err(|error| tracing::debug!(message, %error, "the supervisor was not told"))
            .is_ok()
    }

    fn every(&self) -> Option<Duration> {
        let supervisor = self.supervisor.as_ref().and_then(|other| other.every);
        let hardware = self.hardware.as_ref().map(|hardware| hardware.timeout / 2);
        [supervisor, hardware].into_iter().flatten().min()
    }
}

impl Supervisor {
    fn new(name: &OsString, every: Option<Duration>) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            _ => {
                let message = "it is neither a path nor an abstract address";
                return Err(io::Error::new(io::ErrorKind::Unsupported, message));
            }
        };
        let socket = UnixDatagram::unbound()?;
        // A supervisor that does not read must not hang the loop whose hanging it is to notice.
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            address,
            every,
        })
    }

    fn say(&self, message: &str) -> io::Result<()> {
        self.socket
            .send_to_addr(message.as_bytes(), &self.address)
            .map(drop)
    }
}

impl Hardware {
    /// Starts its countdown anew. Logs when that stops working and when it works again.
    fn feed(&mut self) -> bool {
        let fed = self.try_feed();
        match &fed {
            Ok(()) if self.trouble => {
                tracing::info!(path = %self.path.display(), "the hardware watchdog is fed again");
            }
            Err(error) if !self.trouble => {
                tracing::error!(path = %self.path.display(), %error, "the hardware watchdog cannot be fed; check [watchdog] device");
            }
            _ => {}
        }
        self.trouble = fed.is_err();
        fed.is_ok()
    }

    fn try_feed(&mut self) -> io::Result<()> {
        let device = match &mut self.device {
            Some(device) => device,
            None => self.device.insert(open(&self.path, self.timeout)?),
        };
        // Any byte but the magic one.
        let written = device.write_all(b"\0");
        if written.is_err() {
            self.device = None;
        }
        written
    }
}

fn open(path: &PathBuf, timeout: Duration) -> io::Result<File> {
    let device = File::options()
        .write(true)
        // Never waits: not for a reader of a pipe that stands in for a device either.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut seconds = libc::c_int::try_from(timeout.as_secs()).unwrap_or(libc::c_int::MAX);
    #[expect(unsafe_code, reason = "ioctl(2), WDIOC_SETTIMEOUT")]
    // SAFETY: the request reads and writes one int, which lives through the call.
    let set = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            SET_TIMEOUT,
            std::ptr::from_mut(&mut seconds),
        )
    };
    if set != 0 {
        // Not every driver can: then its own deadline holds, which must be longer than half of ours.
        let error = io::Error::last_os_error();
        tracing::debug!(path = %path.display(), %error, "the hardware watchdog keeps its own deadline");
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str, usec: &str) -> Environment {
        Environment {
            notify_socket: Some(name.into()),
            watchdog_usec: Some(usec.to_owned()),
            watchdog_pid: None,
        }
    }

    fn heard(socket: &UnixDatagram) -> Vec<String> {
        socket.set_nonblocking(true).unwrap();
        let mut buffer = [0; 256];
        std::iter::from_fn(|| {
            let length = socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })
        .collect()
    }

    #[test]
    fn ready_once_then_a_sign_at_half_of_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let environment = environment(path.to_str().unwrap(), "60000000");
        let mut watchdog = Watchdog::new(&environment, None);
        assert!(heard(&socket).is_empty(), "nothing before the first plan");
        let begin = Instant::now();
        watchdog.progress(begin);
        assert_eq!(heard(&socket), ["READY=1", "WATCHDOG=1"]);
        watchdog.status("runs 1\ncontainer");
        watchdog.status("runs 1 container");
        assert_eq!(heard(&socket), ["STATUS=runs 1 container"]);
        watchdog.progress(begin + Duration::from_secs(29));
        assert!(heard(&socket).is_empty());
        let due = begin + Duration::from_secs(30);
        assert_eq!(watchdog.wake_at(), Some(due));
        watchdog.progress(due);
        assert_eq!(heard(&socket), ["WATCHDOG=1"]);
        watchdog.stop();
        assert_eq!(heard(&socket), ["STOPPING=1"]);
        assert_eq!(watchdog.wake_at(), None);
    }

    #[test]
    fn abstract_addresses_too_and_a_supervisor_that_comes_late_is_told() {
        let name = format!("foreshore-watchdog-test-{}", std::process::id());
        let mut watchdog = Watchdog::new(&environment(&format!("@{name}"), "2000000"), None);
        let begin = Instant::now();
        watchdog.progress(begin);
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        watchdog.progress(begin + RETRY);
        assert_eq!(heard(&socket), ["READY=1", "WATCHDOG=1"]);
    }

    #[test]
    fn what_is_not_for_us_or_makes_no_sense_is_left_alone() {
        assert_eq!(Watchdog::new(&Environment::default(), None).wake_at(), None);
        let mut other = environment("/nowhere", "1000000");
        other.watchdog_pid = Some("1".to_owned());
        assert_eq!(other.every(2), None);
        assert_eq!(other.every(1), Some(Duration::from_millis(500)));
        for usec in ["", "0", "-1", "x"] {
            assert_eq!(environment("/nowhere", usec).every(1), None, "{usec}");
        }
        for name in ["vsock:2:1234", "relative", ""] {
            let mut watchdog = Watchdog::new(&environment(name, "1000000"), None);
            watchdog.progress(Instant::now());
            assert!(watchdog.supervisor.is_none(), "{name}");
        }
    }

    #[test]
    fn a_supervisor_that_does_not_read_blocks_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let mut watchdog = Watchdog::new(&environment(path.to_str().unwrap(), "20000"), None);
        let mut now = Instant::now();
        for _ in 0..10_000 {
            now += Duration::from_secs(2);
            watchdog.progress(now);
        }
    }
}
