//! One container under conmon, the supervisor of podman and CRI-O, as a peer of the shim.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::demo::interrupt::wait_for;
use crate::demo::process::Process;

/// A conmon with its container. Both end when this is dropped.
#[derive(Debug)]
pub(super) struct Conmon {
    pub(super) process: Process,
    id: String,
    state: PathBuf,
}

impl Conmon {
    /// Starts busybox's `sleep` under conmon and runc, with everything in `dir`.
    ///
    /// # Errors
    ///
    /// When conmon, runc or a static busybox is missing, or the container does not start.
    pub(super) fn start(dir: &Path) -> anyhow::Result<Self> {
        let bundle = dir.join("bundle");
        fs::create_dir_all(bundle.join("rootfs/bin"))?;
        fs::copy("/bin/busybox", bundle.join("rootfs/bin/busybox")).context("no /bin/busybox")?;
        let spec = Command::new("runc")
            .arg("spec")
            .current_dir(&bundle)
            .status();
        ensure!(
            spec.is_ok_and(|status| status.success()),
            "runc is not installed"
        );
        let path = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = serde_json::json!(["/bin/busybox", "sleep", "100000"]);
        let id = format!("foreshore-bench-conmon-{}", std::process::id());
        config["linux"]["cgroupsPath"] = format!("/{id}").into();
        fs::write(&path, serde_json::to_vec(&config)?)?;

        let sockets = dir.join("attach");
        fs::create_dir(&sockets)?;
        let (state, pid_file) = (dir.join("state"), dir.join("conmon.pid"));
        let runc = ["/usr/sbin/runc", "/usr/bin/runc"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .context("runc is not installed")?;
        let started = Command::new("conmon")
            .args(["--cid", &id, "--cuuid", &id, "--runtime", runc])
            .arg("--runtime-arg")
            .arg(format!("--root={}", state.display()))
            .arg("--bundle")
            .arg(&bundle)
            .arg("--container-pidfile")
            .arg(dir.join("container.pid"))
            .arg("--conmon-pidfile")
            .arg(&pid_file)
            .arg("--log-path")
            .arg(format!("k8s-file:{}", dir.join("container.log").display()))
            .arg("--exit-dir")
            .arg(dir)
            .arg("--socket-dir-path")
            .arg(&sockets)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("conmon is not installed")?;
        ensure!(started.success(), "conmon ended with {started}");
        let process = wait_for("conmon", Duration::from_secs(10), || {
            let pid = fs::read_to_string(&pid_file).ok();
            Ok(pid.and_then(|pid| Process::of(pid.trim().parse().ok()?)))
        })?;
        let conmon = Self { process, id, state };
        wait_for(
            "the container below conmon",
            Duration::from_secs(10),
            || Ok(fs::metadata(dir.join("container.pid")).ok().map(drop)),
        )?;
        let started = conmon.runc(&["start"]).status()?;
        ensure!(started.success(), "runc start ended with {started}");
        Ok(conmon)
    }

    fn runc(&self, verb: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command
            .arg("--root")
            .arg(&self.state)
            .args(verb)
            .arg(&self.id)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

impl Drop for Conmon {
    fn drop(&mut self) {
        let _best_effort = self.runc(&["delete", "--force"]).status();
        if !self.process.gone_within(Duration::from_secs(5)) {
            self.process.signal(libc::SIGKILL);
        }
    }
}
