//! One run of the virtual machine: started, listened to, and killed when its time is over.
//!
//! The guest has two serial lines. What it prints on the first is kept in a file for the failure message. On the
//! second it says in lines what it does; they are read here as they come.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::kernel::text;

/// How many lines of the console a failure message has.
const CONSOLE_LINES: usize = 60;

/// What is booted.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    /// The kernel.
    pub(crate) kernel: &'a Path,
    /// Its first file system.
    pub(crate) initrd: &'a Path,
    /// More arguments of qemu: disks, networks.
    pub(crate) devices: &'a [String],
    /// What the guest is to do, on its kernel's command line; further words are the kernel's.
    pub(crate) task: &'a str,
    /// Where its console goes.
    pub(crate) console: &'a Path,
    /// After this it is killed.
    pub(crate) limit: Duration,
}

/// A machine that runs. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Machine {
    qemu: Child,
    orders: ChildStdin,
    said: Receiver<String>,
    console: PathBuf,
    end: Instant,
}

impl Machine {
    /// Starts qemu with software emulation: it works everywhere, and the kernels of many virtual machines' own
    /// hardware emulation do not boot a guest.
    ///
    /// # Errors
    ///
    /// When qemu cannot be started.
    pub(crate) fn start(boot: &Boot<'_>) -> anyhow::Result<Self> {
        fs::write(boot.console, "")
            .with_context(|| format!("failed to write {}", boot.console.display()))?;
        // Killed with this process, however that ends: setpriv(1) sets it and then becomes qemu.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-machine", "q35,accel=tcg", "-cpu", "max"])
            .args(["-smp", "2", "-m", "1024", "-display", "none"])
            .arg("-kernel")
            .arg(boot.kernel)
            .arg("-initrd")
            .arg(boot.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 loglevel=5 panic=-1 oops=panic foreshore.task={}",
                boot.task
            ))
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", boot.console.display()))
            .args(["-serial", "chardev:console"])
            .args([
                "-chardev",
                "stdio,id=word,signal=off",
                "-serial",
                "chardev:word",
            ])
            .args(boot.devices);
        let mut qemu = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start qemu-system-x86_64 through setpriv")?;
        let output = qemu.stdout.take().context("qemu has no standard output")?;
        let orders = qemu.stdin.take().context("qemu has no standard input")?;
        let (say, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if say.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            qemu,
            orders,
            said,
            console: boot.console.to_owned(),
            end: Instant::now() + boot.limit,
        })
    }

    /// Says a line to the guest, on the line on which it answers.
    ///
    /// # Errors
    ///
    /// When the machine is off.
    pub(crate) fn order(&mut self, line: &str) -> anyhow::Result<()> {
        writeln!(self.orders, "{line}")
            .and_then(|()| self.orders.flush())
            .with_context(|| format!("failed to say {line:?} to the guest\n{}", self.console()))
    }

    /// The next line that the guest says, `None` when the machine is off.
    ///
    /// # Errors
    ///
    /// When its time is over; it is killed then.
    pub(crate) fn next(&mut self) -> anyhow::Result<Option<String>> {
        let left = self.end.saturating_duration_since(Instant::now());
        match self.said.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                self.cut();
                bail!("the guest's time was over\n{}", self.console())
            }
        }
    }

    /// The same, but `None` too when nothing is said for `patience`; `Err` when the machine is off or over time.
    ///
    /// # Errors
    ///
    /// As said.
    pub(crate) fn next_within(&mut self, patience: Duration) -> anyhow::Result<Option<String>> {
        let end = self.end.min(Instant::now() + patience);
        match self
            .said
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the guest ended by itself\n{}", self.console())
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < self.end => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                self.cut();
                bail!("the guest's time was over\n{}", self.console())
            }
        }
    }

    /// Cuts the power: the machine is gone between two instructions.
    pub(crate) fn cut(&mut self) {
        let _ended_already = self.qemu.kill();
        let _reaped = self.qemu.wait();
    }

    /// The end of what the guest printed.
    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        format!(
            "--- the end of {}\n{}",
            self.console.display(),
            last_lines(&String::from_utf8_lossy(&bytes), CONSOLE_LINES)
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Arguments of qemu for a disk of `bytes` at `path`, made anew: an ext4 file system, or nothing but zeroes.
///
/// # Errors
///
/// When the file cannot be written.
pub(crate) fn fresh_disk(path: &Path, bytes: u64, ext4: bool) -> anyhow::Result<[String; 2]> {
    fs::File::create(path)
        .and_then(|file| file.set_len(bytes))
        .with_context(|| format!("failed to write {}", path.display()))?;
    if ext4 {
        text(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4"])
                .arg(path),
        )?;
    }
    Ok([
        "-drive".to_owned(),
        format!("file={},format=raw,if=virtio", path.display()),
    ])
}

/// The last `count` lines, indented.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|line| format!("    {}\n", line.trim_end()))
        .collect()
}
