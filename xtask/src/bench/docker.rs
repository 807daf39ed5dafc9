//! Docker's daemon as a peer: everything it has in one directory, and what it and its children use.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::demo::interrupt::wait_for;

/// A daemon. Ends with SIGTERM, so that it takes its own children down.
pub(super) struct Docker {
    daemon: Child,
    dir: PathBuf,
}

impl Docker {
    /// Starts one with an empty store below `dir`, and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it is not installed or does not answer within 30 s.
    pub(super) fn start(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new("dockerd");
        for (key, name) in [
            ("--data-root", "data"),
            ("--exec-root", "exec"),
            ("--pidfile", "pid"),
        ] {
            command.arg(key).arg(dir.join(name));
        }
        let daemon = command
            .arg(format!("--host=unix://{}/socket", dir.display()))
            .args([
                "--iptables=false",
                "--ip6tables=false",
                "--bridge=none",
                "--storage-driver=overlay2",
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("dockerd does not start")?;
        let mut docker = Self {
            daemon,
            dir: dir.to_owned(),
        };
        wait_for("dockerd", Duration::from_secs(30), || {
            if docker.daemon.try_wait()?.is_some() {
                let mut text = String::new();
                File::open(docker.dir.join("log"))?
                    .take(64 << 10)
                    .read_to_string(&mut text)?;
                bail!("dockerd ended: {}", text.lines().last().unwrap_or_default());
            }
            let answer = docker.command(&["version"]).output()?;
            Ok(answer.status.success().then_some(()))
        })?;
        Ok(docker)
    }

    /// The command line's program, told to talk to this daemon.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command
            .env("DOCKER_HOST", self.address())
            .env("DOCKER_CONFIG", &self.dir)
            .args(arguments);
        command
    }

    /// Where it listens, as `DOCKER_HOST` has it.
    pub(super) fn address(&self) -> String {
        format!("unix://{}/socket", self.dir.display())
    }

    /// The daemon's process.
    pub(super) fn pid(&self) -> u32 {
        self.daemon.id()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _it_may_have_ended = Command::new("kill").arg(self.pid().to_string()).status();
        let _reaped = self.daemon.wait();
    }
}
