//! A medium that takes no writes: read-only, full, thin, failing. What runs keeps running and is kept running, the hub is
//! told, and when the medium is well again, so is the agent. Needs loop devices and e2fsprogs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foreshore_protocol::message::EventKind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::device::Device;

/// Within this after the medium is well again, everything is as it should be.
const RECOVERY: Duration = Duration::from_secs(60);

/// What is mounted, until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// An ext4 without journal in a sparse file.
    fn disk(file: &Path, target: &Path, bytes: u64) -> Self {
        File::create(file).unwrap().set_len(bytes).unwrap();
        let mkfs = ["-q", "-F", "-m", "0", "-O", "^has_journal"];
        run(Command::new("mkfs.ext4").args(mkfs).arg(file));
        fs::create_dir_all(target).unwrap();
        let options = ["-o", "loop,errors=continue"];
        run(Command::new("mount").args(options).arg(file).arg(target));
        Self(target.to_owned())
    }

    fn tmpfs(target: &Path, bytes: u64) -> Self {
        fs::create_dir_all(target).unwrap();
        let size = format!("size={bytes}");
        mount(
            Some("tmpfs"),
            target,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .unwrap();
        Self(target.to_owned())
    }

    /// The same directory, read-only, above itself: what asks by path is refused, as after a remount. (A remount
    /// itself is refused by the kernel while files are open for writing, unless an error brings it about.)
    fn read_only(target: &Path) -> Self {
        let none: Option<&str> = None;
        mount(Some(target), target, none, MsFlags::MS_BIND, none).unwrap();
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(none, target, none, flags, none).unwrap();
        Self(target.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _reported = umount2(&self.0, MntFlags::MNT_DETACH)
            .inspect_err(|error| eprintln!("umount {}: {error}", self.0.display()));
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; install e2fsprogs and mount"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Takes all the room there is. False when there was none.
fn fill(path: &Path) -> bool {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    let before = file.metadata().unwrap().len();
    let filled = std::io::copy(&mut std::io::repeat(0), &mut file);
    filled.expect_err("the disk fills up");
    file.metadata().unwrap().len() > before
}

/// A file that takes what room there is, and what others give back, until it is dropped.
struct Ballast {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ballast {
    fn fill(path: &Path) -> Self {
        while fill(path) {}
        let (stop, target) = (Arc::new(AtomicBool::new(false)), path.to_owned());
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                fill(&target);
                std::thread::yield_now();
            }
        });
        Self {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        let _gone = fs::remove_file(&self.path);
    }
}

/// With a container that runs: the medium fails, is repaired, and what must hold at each moment does.
fn ordeal<T>(
    device: &mut Device,
    errno: &str,
    fail: impl FnOnce() -> T,
    worsen: impl Fn(),
    repair: impl FnOnce(T),
) {
    let (before, agent) = (device.container(), device.agent_pid());
    let damage = fail();
    // What one write gives back, the next may take: there are several until one fails.
    let told = device.provoke(EventKind::StateUnwritable, worsen);
    assert!(told.message.contains(errno), "{}", told.message);
    device.check_acknowledged();
    assert_eq!(device.container(), before, "what ran did not keep running");

    device.kill_container();
    device.await_other_container(&before);
    assert_eq!(device.agent_pid(), agent, "the agent did not keep running");
    let healed = device.container();

    repair(damage);
    let begin = Instant::now();
    device.await_event(EventKind::StateWritable, |_| true);
    device.await_settled();
    assert!(begin.elapsed() < RECOVERY, "it took {:?}", begin.elapsed());
    assert!(device.is_acknowledged());
    assert_eq!(device.container(), healed, "recovery restarted a container");
    // And all of it is on disk.
    device.kill();
    device.check_disk(false);
    device.start(None);
    device.assign();
    device.await_settled();
    device.check_accounts();
}

fn begun(number: usize) -> Device {
    let mut device = Device::new(number);
    device.read_only_root();
    device
}

fn settle(device: &mut Device) {
    device.assign();
    device.start(None);
    device.await_settled();
    device.check_accounts();
}

/// As where the log is a file on a disk that is full: what cannot be written is lost, and that is all.
#[test]
fn an_agent_whose_log_cannot_be_written_does_its_work() {
    let mut device = Device::new(204);
    device.log = PathBuf::from("/dev/full");
    device.assign();
    device.start(None);
    device.await_settled();
    device.check_accounts();
    device.finish();
}

#[test]
fn a_state_directory_that_becomes_read_only_is_survived_and_told() {
    let mut device = begun(30);
    settle(&mut device);
    let state = device.path("state");
    ordeal(
        &mut device,
        "os error 30",
        || Mounted::read_only(&state),
        || {},
        drop,
    );
}

#[test]
fn a_disk_that_fills_up_is_survived_and_told() {
    let mut device = begun(31);
    // It would give up its own, and whoever fills the disk would have to be quicker than it makes that again.
    device.configure("[disk]\nballast = \"0\"\n");
    let (disk, state) = (device.path("disk"), device.path("state"));
    device.keep(Mounted::disk(&disk, &state, 48 << 20));
    settle(&mut device);
    let ballast = device.path("state/filling");
    ordeal(
        &mut device,
        "os error 28",
        || Ballast::fill(&ballast),
        || {
            fill(&ballast);
        },
        drop,
    );
}

/// A thin disk: the file behind it has holes, and the file system below has no room. Writing works, flushing does not.
#[test]
fn a_disk_that_has_less_than_it_says_is_survived_and_told() {
    let mut device = begun(32);
    let below = device.path("below");
    device.keep(Mounted::tmpfs(&below, 24 << 20));
    let state = device.path("state");
    device.keep(Mounted::disk(&below.join("disk"), &state, 64 << 20));
    settle(&mut device);
    let ballast = below.join("filling");
    ordeal(
        &mut device,
        "os error",
        || Ballast::fill(&ballast),
        // What was freed loses its blocks, and somebody else has them: only what is in use has any.
        || run(Command::new("fstrim").arg(&state)),
        drop,
    );
}

/// No device here fails on demand: the error is put where the agent would get it, at each write of a state file.
#[test]
fn a_disk_that_fails_is_survived_and_told() {
    let mut device = begun(33);
    settle(&mut device);
    let errno = device.path("errno");
    ordeal(
        &mut device,
        "os error 5",
        || fs::write(&errno, "5").unwrap(),
        || {},
        |()| fs::remove_file(&errno).unwrap(),
    );
}
