//! What a layer could do that has taken over the process that unpacks it: this program does it in its place.
//!
//! It has no harness: the confinement is for a process without threads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use foreshore_agent::unpack::confined;
use foreshore_images::unpack::Budget;
use foreshore_images::unpack::job::Job;

const INSIDE: &str = "inside";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match &arguments[..] {
        [inside, root, target, victim] if inside == INSIDE => {
            let victim: libc::c_int = victim.to_str().unwrap().parse().unwrap();
            confined(&PathBuf::from(root), &PathBuf::from(target), |_, stdin| {
                // What follows the job is there to be read.
                let mut blob = String::new();
                stdin.read_to_string(&mut blob)?;
                let mut said = attempts(victim);
                said.insert("blob length", i64::try_from(blob.len()).unwrap());
                serde_json::to_writer(io::stdout().lock(), &said)?;
                Ok(())
            })
        }
        _ => {
            who_has_taken_it_over_can_signal_nobody_and_reaches_nothing();
            println!("test who_has_taken_it_over_can_signal_nobody_and_reaches_nothing ... ok");
            ExitCode::SUCCESS
        }
    }
}

/// What each system call says: 0, or the error's number.
#[expect(unsafe_code, reason = "system calls as an attacker makes them")]
fn attempts(victim: libc::c_int) -> BTreeMap<&'static str, i64> {
    let said = |result: i64| match result {
        -1 => io::Error::last_os_error().raw_os_error().unwrap().into(),
        other => other,
    };
    let mut results = BTreeMap::new();
    // SAFETY: these take numbers and constant strings; none of them changes memory of this process.
    unsafe {
        let mut attempt = |name, result| results.insert(name, said(result));
        let kill = libc::c_long::from(libc::SIGKILL);
        let pid = libc::c_long::from(victim);
        attempt("own number", libc::syscall(libc::SYS_getpid));
        attempt("kill", libc::syscall(libc::SYS_kill, pid, kill));
        attempt("kill all", libc::syscall(libc::SYS_kill, -1, kill));
        attempt("tgkill", libc::syscall(libc::SYS_tgkill, pid, pid, kill));
        // One that has no handlers in its own namespace takes none.
        attempt("tgkill first", libc::syscall(libc::SYS_tgkill, 1, 1, kill));
        // Signals on input go to whom it says.
        attempt("set owner", libc::fcntl(0, libc::F_SETOWN, victim).into());
        attempt("pidfd", libc::syscall(libc::SYS_pidfd_open, pid, 0));
        let none = libc::PR_SET_PDEATHSIG;
        attempt("outlive", libc::syscall(libc::SYS_prctl, none, 0, 0, 0, 0));
        attempt(
            "socket",
            libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
        );
        attempt(
            "fork",
            libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
        );
        attempt(
            "ptrace",
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 1, 0, 0),
        );
        attempt(
            "proc",
            libc::open(c"/proc/1/status".as_ptr(), libc::O_RDONLY).into(),
        );
        attempt(
            "write",
            libc::open(c"/new".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600).into(),
        );
    }
    results
}

fn who_has_taken_it_over_can_signal_nobody_and_reaches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (root, target) = (dir.path().join("store"), dir.path().join("store/tmp/tree"));
    fs::create_dir_all(&target).unwrap();
    let mut victim = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(INSIDE)
        .args([&root, &target])
        .arg(victim.id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let job = Job {
        target,
        lowers: Vec::new(),
        budget: Budget {
            bytes: 1 << 20,
            entries: 10,
        },
        stream_bytes_max: 1 << 20,
        reserve_bytes: Some(0),
        keep_privileges: false,
        opaque_later: true,
    };
    let text = serde_json::to_vec(&job).unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    input.write_all(&text).unwrap();
    input.write_all(b"blob").unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let lives = victim.try_wait().unwrap().is_none();
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let said: BTreeMap<&str, i64> = serde_json::from_slice(&output.stdout).unwrap();
    let [refused, nobody] = [libc::EPERM, libc::ESRCH].map(i64::from);
    let expected: BTreeMap<&str, i64> = [
        ("blob length", 4),
        ("own number", 2),
        ("kill", refused),
        ("kill all", refused),
        ("tgkill", nobody),
        ("tgkill first", 0),
        ("set owner", nobody),
        ("pidfd", refused),
        ("outlive", refused),
        ("socket", refused),
        ("fork", refused),
        ("ptrace", refused),
        ("proc", libc::ENOENT.into()),
        ("write", libc::EROFS.into()),
    ]
    .into();
    assert_eq!(said, expected);
    assert!(lives, "somebody outside was killed");
}
