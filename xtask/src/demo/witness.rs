//! What is true on this machine, asked of the containers themselves and not of Foreshore: which
//! processes are in a device's cgroup, and what they answer over HTTP inside their own network.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};

use super::process::Process;

/// How long one question to a container may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Every mounted cgroup hierarchy, v1 and v2.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    mounts()
        .into_iter()
        .filter(|(_, kind)| kind.starts_with("cgroup"))
        .map(|(target, _)| target)
        .collect()
}

/// Mount points and file system types, as proc_pid_mounts(5) lists them.
pub(crate) fn mounts() -> Vec<(PathBuf, String)> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (target, kind) = (fields.next()?, fields.next()?);
            Some((PathBuf::from(unescape(target)), kind.to_owned()))
        })
        .collect()
}

/// Blank, tab, newline and backslash are written as octal escapes in mount tables.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// The processes in `cgroup` (relative to the hierarchies) and below it.
pub(crate) fn processes_in(cgroup: &str) -> Vec<Process> {
    let mut found = Vec::new();
    for hierarchy in hierarchies() {
        collect(&hierarchy.join(cgroup), &mut found);
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn collect(dir: &Path, into: &mut Vec<Process>) {
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    into.extend(
        pids.lines()
            .filter_map(|pid| Process::of(pid.parse().ok()?)),
    );
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), into);
        }
    }
}

/// The one process in `cgroup` that runs the demo's service.
pub(crate) fn service_in(cgroup: &str) -> anyhow::Result<Process> {
    let is_service = |process: &Process| {
        fs::read_link(format!("/proc/{}/exe", process.pid)).is_ok_and(|exe| exe.ends_with("web"))
    };
    let services: Vec<Process> = processes_in(cgroup)
        .into_iter()
        .filter(is_service)
        .collect();
    match services.as_slice() {
        [one] => Ok(*one),
        [] => bail!("no container runs in {cgroup}"),
        several => bail!("{} containers run in {cgroup}", several.len()),
    }
}

/// What the service of `process` answers at `path`: the status and the body.
pub(crate) fn ask(process: Process, path: &str) -> anyhow::Result<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: container\r\nconnection: close\r\n\r\n");
    // A thread of its own: it stays in the container's network namespace and ends there.
    std::thread::spawn(move || -> anyhow::Result<(u16, String)> {
        enter_network(process)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.take(64 << 10).read_to_string(&mut answer)?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("not an HTTP answer")?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((status.context("no HTTP status")?, body.to_owned()))
    })
    .join()
    .map_err(|_| anyhow!("asking a container panicked"))?
    .with_context(|| format!("process {} does not answer", process.pid))
}

fn enter_network(process: Process) -> anyhow::Result<()> {
    let namespace = File::open(format!("/proc/{}/ns/net", process.pid))?;
    ensure!(process.runs(), "process {} is gone", process.pid);
    #[expect(
        unsafe_code,
        reason = "setns(2) has no safe wrapper in the standard library"
    )]
    // SAFETY: the descriptor is open for the duration of the call, which changes this thread only.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}
