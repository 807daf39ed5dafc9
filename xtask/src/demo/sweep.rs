//! Leaving nothing behind: ends every process, mount, cgroup and file of a demo, and then looks whether
//! anything is left. Works from what is on the machine, so it also cleans up after a demo that was
//! killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::process::Process;
use super::stage::MARK;
use super::witness::{hierarchies, mounts, processes_in};

/// What of a demo is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing.
    Nothing,
    /// The logs.
    Logs,
}

/// Ends the demo in `dir`. Fails with a list of what could not be removed.
pub(crate) fn sweep(dir: &Path, keep: Keep) -> anyhow::Result<()> {
    let note: Value =
        serde_json::from_slice(&fs::read(dir.join("demo.json")).with_context(|| {
            format!(
                "{} is not the directory of a demo: it has no demo.json",
                dir.display()
            )
        })?)?;
    let cgroup = note["cgroup"].as_str().unwrap_or_default();
    ensure!(
        cgroup.starts_with("foreshore-demo-") && !cgroup.contains(['/', '.']),
        "{}/demo.json does not name the cgroup of a demo",
        dir.display()
    );
    end(
        &marked(dir, &["foreshore-agent", "foreshore-hub"]),
        Duration::from_secs(6),
    );
    remove_containers(dir, Path::new(note["agent"].as_str().unwrap_or_default()));
    // What a damaged agent could not remove. Containers first, so that their shims end by themselves.
    end(&processes_in(cgroup), Duration::ZERO);
    end(&marked(dir, &[]), Duration::from_secs(2));
    unmount(dir);
    remove_cgroups(cgroup);
    let left = leftovers(dir, cgroup);
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    match keep {
        Keep::Nothing => fs::remove_dir_all(dir)?,
        Keep::Logs => {
            for entry in fs::read_dir(dir)?
                .flatten()
                .filter(|entry| entry.file_name() != "logs")
            {
                let path = entry.path();
                if path.is_dir() {
                    fs::remove_dir_all(path)?
                } else {
                    fs::remove_file(path)?
                }
            }
        }
    }
    Ok(())
}

/// The demo's processes outside containers: those whose environment carries the mark, or whose program
/// lies in the directory. With `names`, only programs of these names.
fn marked(dir: &Path, names: &[&str]) -> Vec<Process> {
    let mark = format!("{MARK}={}", dir.display());
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let is_ours = environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == mark.as_bytes())
                || exe.starts_with(dir);
            let name = exe
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            // A program that was built anew while it ran is shown as "name (deleted)".
            let name = name.trim_end_matches(" (deleted)");
            is_ours && (names.is_empty() || names.contains(&name))
        })
        .filter_map(Process::of)
        .collect()
}

/// SIGTERM to all (unless there is no grace), then SIGKILL to those left.
fn end(processes: &[Process], grace: Duration) {
    if !grace.is_zero() {
        processes
            .iter()
            .for_each(|process| process.signal(libc::SIGTERM));
        let begin = Instant::now();
        for process in processes {
            process.gone_within(grace.saturating_sub(begin.elapsed()));
        }
    }
    processes
        .iter()
        .for_each(|process| process.signal(libc::SIGKILL));
    for process in processes {
        process.gone_within(Duration::from_secs(5));
    }
}

/// Lets each device's agent remove its containers, as an uninstall would.
fn remove_containers(dir: &Path, agent: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let config = entry.path().join("agent.toml");
        if config.exists() {
            // What it leaves is removed by force afterwards, and the log says why it left it.
            let name = format!("{}.log", entry.file_name().display());
            let log = fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(dir.join("logs").join(name));
            let Ok(log) = log else { continue };
            let Ok(errors) = log.try_clone() else {
                continue;
            };
            let mut command = Command::new(agent);
            command.arg("remove-all").arg("--config").arg(config);
            let _removed_by_force_then = command.stdout(log).stderr(errors).status();
        }
    }
}

/// Mount points below `dir`, innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let targets = mounts().into_iter().map(|(target, _)| target);
    let mut below: Vec<PathBuf> = targets.filter(|target| target.starts_with(dir)).collect();
    below.reverse();
    below
}

fn unmount(dir: &Path) {
    for target in mounts_below(dir) {
        let _looked_at_later = Command::new("umount").arg("--lazy").arg(target).status();
    }
}

fn cgroups(cgroup: &str) -> Vec<PathBuf> {
    let dirs = hierarchies()
        .into_iter()
        .map(|hierarchy| hierarchy.join(cgroup));
    dirs.filter(|dir| dir.exists()).collect()
}

fn remove_cgroups(cgroup: &str) {
    for dir in cgroups(cgroup) {
        remove_cgroup(&dir);
    }
}

/// Removes a cgroup and those in it, deepest first. The kernel may need a moment after the last process
/// ended.
fn remove_cgroup(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let begin = Instant::now();
    while fs::remove_dir(dir).is_err() && dir.exists() && begin.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What is still there of processes, mounts and cgroups.
fn leftovers(dir: &Path, cgroup: &str) -> Vec<String> {
    let mut processes = marked(dir, &[]);
    processes.extend(processes_in(cgroup));
    let processes = processes
        .iter()
        .map(|process| format!("process {}", process.pid));
    let mounts = mounts_below(dir)
        .into_iter()
        .map(|mount| format!("mount {}", mount.display()));
    let cgroups = cgroups(cgroup)
        .into_iter()
        .map(|dir| format!("cgroup {}", dir.display()));
    processes.chain(mounts).chain(cgroups).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_processes_are_ended_and_the_directory_goes() {
        let dir = tempfile::tempdir().unwrap().keep();
        let cgroup = format!("foreshore-demo-test-{}", std::process::id());
        let note = serde_json::json!({"cgroup": cgroup, "agent": "/does/not/exist"});
        fs::write(dir.join("demo.json"), note.to_string()).unwrap();
        let spawn = |mark: &Path| {
            Command::new("/bin/sleep")
                .arg("1000")
                .env(MARK, mark)
                .spawn()
                .unwrap()
        };
        let (mut ours, mut other) = (spawn(&dir), spawn(Path::new("/another/demo")));
        sweep(&dir, Keep::Nothing).unwrap();
        assert!(!ours.wait().unwrap().success() && !dir.exists());
        assert!(
            other.try_wait().unwrap().is_none(),
            "another demo's process was ended"
        );
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn only_the_directory_of_a_demo_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sweep(dir.path(), Keep::Nothing).is_err());
        for cgroup in ["", "system.slice", "foreshore-demo-1/..", "../x"] {
            let note = serde_json::json!({"cgroup": cgroup, "agent": "x"});
            fs::write(dir.path().join("demo.json"), note.to_string()).unwrap();
            assert!(sweep(dir.path(), Keep::Nothing).is_err(), "{cgroup}");
        }
        assert!(dir.path().exists());
    }
}
