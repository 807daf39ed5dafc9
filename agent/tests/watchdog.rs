//! What a supervisor and a hardware watchdog hear of a real agent: signs of life while its loop goes round,
//! silence when it does not. Needs root, as the agent does.

#![expect(clippy::unwrap_used, reason = "this is a test")]

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(40);

/// The deadline that the supervisor names.
const DEADLINE: Duration = Duration::from_millis(400);

struct Bed {
    dir: tempfile::TempDir,
    socket: UnixDatagram,
}

/// An agent without hub; killed by its id when dropped.
struct Agent(Child);

impl Bed {
    fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "join-token\n").unwrap();
        let text = format!(
            "device = \"device-1\"\n[hub]\nbroker = \"mqtt://127.0.0.1:9\"\njoin_token_file = \"{dir}/token\"\n\
             [paths]\nstate = \"{dir}/state\"\nrun = \"{dir}/run\"\n\
             [cgroup]\nparent = \"foreshore-watchdog-{}\"\n{more}",
            std::process::id(),
            dir = dir.path().display(),
        );
        std::fs::write(dir.path().join("agent.toml"), text).unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self { dir, socket }
    }

    fn start(&self) -> Agent {
        let child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
            .args(["run", "--config"])
            .arg(self.path("agent.toml"))
            .env("NOTIFY_SOCKET", self.path("notify"))
            .env("WATCHDOG_USEC", DEADLINE.as_micros().to_string())
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(self.path("log")).unwrap())
            .spawn()
            .unwrap();
        Agent(child)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next thing the supervisor is told within `limit`.
    fn hear(&self, limit: Duration) -> Option<String> {
        let mut buffer = [0; 1024];
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Waits until the supervisor is told this.
    fn await_message(&self, wanted: &str) {
        let end = Instant::now() + LONG;
        while self.hear(LONG).is_none_or(|heard| heard != wanted) {
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(
                Instant::now() < end,
                "waited {LONG:?} for {wanted:?}:\n{log}"
            );
        }
    }

    /// What was sent before is out of the way.
    fn drain(&self) {
        while self.hear(Duration::from_millis(1)).is_some() {}
    }
}

impl Agent {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn ready_comes_after_the_first_plan_and_signs_of_life_stop_when_the_loop_does() {
    let bed = Bed::new("");
    let mut agent = bed.start();
    bed.await_message("READY=1");
    assert!(
        bed.path("run/status.json").exists(),
        "ready before anything was planned"
    );
    bed.await_message("STATUS=0 containers run, desired state none yet, without the hub");
    for _ in 0..3 {
        bed.await_message("WATCHDOG=1");
    }

    // As a thread that blocks, for whatever reason.
    agent.signal(Signal::SIGSTOP);
    bed.drain();
    let heard = bed.hear(4 * DEADLINE);
    assert_eq!(heard, None, "a stopped agent gave a sign of life");
    agent.signal(Signal::SIGCONT);
    bed.await_message("WATCHDOG=1");

    agent.signal(Signal::SIGTERM);
    bed.await_message("STOPPING=1");
    assert!(agent.0.wait().unwrap().success());
}

#[test]
fn an_agent_that_hangs_while_it_looks_at_containers_is_never_ready() {
    let bed = Bed::new("");
    let dir = bed.path("run/containers/shop.web.1");
    std::fs::create_dir_all(&dir).unwrap();
    let record = dir.join("record.json");
    nix::unistd::mkfifo(&record, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _agent = bed.start();
    // It has come to the pipe when the other end can be opened, and then waits for what it says.
    let end = Instant::now() + LONG;
    let pipe = loop {
        let opened = nix::fcntl::open(
            &record,
            nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_NONBLOCK,
            nix::sys::stat::Mode::empty(),
        );
        if let Ok(pipe) = opened {
            break pipe;
        }
        assert!(Instant::now() < end, "the agent never looked");
        std::thread::yield_now();
    };
    let heard = bed.hear(4 * DEADLINE);
    assert_eq!(heard, None, "a hanging agent says that it is well");
    // Replaced by something that reads, and the end of what it waits for.
    std::fs::remove_file(&record).unwrap();
    nix::unistd::close(pipe).unwrap();
    bed.await_message("READY=1");
    bed.await_message("WATCHDOG=1");
}

#[test]
fn a_hardware_watchdog_is_fed_and_stopped_by_a_clean_end_only() {
    let (_keep, watchdog) = {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        (dir, path)
    };
    let bed = Bed::new(&format!(
        "[watchdog]\ndevice = \"{}\"\n",
        watchdog.display()
    ));
    let fed = |end: Signal| {
        use std::io::Read as _;
        // Open for writing as well: the agent finds a reader, and there is no end of file.
        let mut pipe = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&watchdog)
            .unwrap();
        let mut agent = bed.start();
        let mut bytes = [0; 3];
        pipe.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);
        agent.signal(end);
        agent.0.wait().unwrap();
        // A mark behind all that the agent wrote.
        std::io::Write::write_all(&mut pipe, b"E").unwrap();
        let mut rest = Vec::new();
        while rest.last() != Some(&b'E') {
            let mut byte = [0];
            pipe.read_exact(&mut byte).unwrap();
            rest.push(byte[0]);
        }
        rest.contains(&b'V')
    };
    assert!(fed(Signal::SIGTERM), "a clean end leaves the clock running");
    assert!(!fed(Signal::SIGKILL), "a crash stopped the clock");
}

#[test]
fn a_hardware_watchdog_that_is_not_there_is_told_and_borne() {
    let bed = Bed::new("[watchdog]\ndevice = \"/nowhere/watchdog\"\n");
    let mut agent = bed.start();
    bed.await_message("READY=1");
    bed.await_message("WATCHDOG=1");
    agent.signal(Signal::SIGTERM);
    assert!(agent.0.wait().unwrap().success());
    let log = std::fs::read_to_string(bed.path("log")).unwrap();
    let told = log.matches("the hardware watchdog cannot be fed").count();
    assert_eq!(told, 1, "{log}");
}
