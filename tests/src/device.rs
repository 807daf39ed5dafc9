//! A device: an agent as a process, with its own directories and cgroup.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::process::{Program, programs};
use crate::{Bed, Hub};

/// An agent and its state.
#[derive(Debug)]
pub struct Device {
    /// Its id.
    pub id: String,
    program: Option<Program>,
    config: PathBuf,
    log: PathBuf,
    state: PathBuf,
    run: PathBuf,
}

impl Device {
    /// Starts a device of `hub` with labels given as TOML lines (`role = "x"`).
    #[must_use]
    pub fn start(bed: &Bed, hub: &Hub, id: &str, labels: &str) -> Self {
        let mut device = Self::configure(
            bed,
            hub.broker(),
            hub.url(),
            &hub.join_token_file(),
            id,
            labels,
            "",
        );
        device.restart();
        device
    }

    /// Writes a device's configuration without starting it. `more` is appended to it as TOML.
    ///
    /// # Panics
    ///
    /// When the bed is not writable.
    #[must_use]
    pub fn configure(
        bed: &Bed,
        broker: &str,
        registry: &str,
        token: &Path,
        id: &str,
        labels: &str,
        more: &str,
    ) -> Self {
        let (state, run) = (
            bed.path(&format!("{id}/state")),
            bed.path(&format!("{id}/run")),
        );
        std::fs::create_dir_all(&state).expect("the bed is writable");
        let config = bed.path(&format!("{id}/agent.toml"));
        let text = format!(
            "device = \"{id}\"\n\
             [hub]\nbroker = \"{broker}\"\nregistry = \"{registry}\"\njoin_token_file = \"{}\"\n\
             report_interval = \"200ms\"\nreconnect_max = \"2s\"\nkeepalive = \"10s\"\n\
             [labels]\n{labels}\n\
             [paths]\nstate = \"{}\"\nrun = \"{}\"\n\
             [cgroup]\nparent = \"{}/{id}\"\n{more}",
            token.display(),
            state.display(),
            run.display(),
            bed.cgroup(),
        );
        std::fs::write(&config, text).expect("the bed is writable");
        let log = bed.path(&format!("{id}/agent.log"));
        Self {
            id: id.to_owned(),
            program: None,
            config,
            log,
            state,
            run,
        }
    }

    /// Starts the agent, again if it ran before.
    pub fn restart(&mut self) {
        let mut command = Command::new(programs().join("foreshore-agent"));
        command
            .args(["run", "--config"])
            .arg(&self.config)
            .env("RUST_LOG", "info")
            // Its own clock counts while there is no such file.
            .env("FORESHORE_WALL_CLOCK", self.clock());
        self.program = Some(Program::start(
            "foreshore-agent",
            &mut command,
            &self.log,
            "the workspace's programs",
        ));
    }

    fn clock(&self) -> PathBuf {
        self.config.with_file_name("clock")
    }

    /// Sets its wall clock, which then stands still, to so many milliseconds since 1970. Only in builds with kill points.
    ///
    /// # Panics
    ///
    /// When the bed is not writable.
    pub fn set_clock(&self, unix_ms: u64) {
        let new = self.clock().with_extension("new");
        std::fs::write(&new, unix_ms.to_string()).expect("the bed is writable");
        std::fs::rename(&new, self.clock()).expect("the bed is writable");
    }

    /// The agent's process.
    ///
    /// # Panics
    ///
    /// When it was not started.
    pub fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("the device was started")
    }

    /// SIGKILL to the agent only.
    pub fn kill9(&mut self) {
        self.program().kill9();
    }

    /// SIGTERM to the agent only.
    pub fn terminate(&mut self) {
        self.program().terminate(Duration::from_secs(10));
    }

    /// Its state directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What the agent wrote.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `foreshore-agent status -o json`, which needs no running agent.
    ///
    /// # Errors
    ///
    /// With what it printed, when it failed.
    pub fn status(&self) -> Result<Value, String> {
        let output = Command::new(programs().join("foreshore-agent"))
            .args(["status", "-o", "json", "--config"])
            .arg(&self.config)
            .output()
            .map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.program = None;
        let _best_effort = Command::new(programs().join("foreshore-agent"))
            .args(["remove-all", "--config"])
            .arg(&self.config)
            .output();
    }
}
