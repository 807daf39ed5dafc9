//! Where the demo happens: its directory, its hub and devices, and `foreshore` pointed at them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::interrupt::{self, wait_for};
use super::process::{Recipe, Supervised};
use crate::step;

/// How long a killed agent stays away: systemd's `RestartSec=2`.
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// Set for every program of a demo and so for all they start: how stray processes are found.
pub(crate) const MARK: &str = "FORESHORE_DEMO_DIR";

/// The programs that the demo runs.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `foreshore-hub`.
    pub(crate) hub: PathBuf,
    /// `foreshore-agent`.
    pub(crate) agent: PathBuf,
    /// `foreshore`.
    pub(crate) cli: PathBuf,
}

impl Programs {
    /// Takes them from a directory.
    pub(crate) fn find(dir: &Path) -> anyhow::Result<Self> {
        let find = |name: &str| {
            let path = dir.join(name);
            path.canonicalize()
                .with_context(|| format!("there is no program {}", path.display()))
        };
        Ok(Self {
            hub: find("foreshore-hub")?,
            agent: find("foreshore-agent")?,
            cli: find("foreshore")?,
        })
    }

    /// Builds them, cargo's progress on our stderr, and asks cargo where they are.
    pub(crate) fn build() -> anyhow::Result<Self> {
        let packages = [
            "-p",
            "foreshore-hub",
            "-p",
            "foreshore-agent",
            "-p",
            "foreshore",
        ];
        let output = step::cargo(&[
            "build",
            "--bins",
            "--message-format=json-render-diagnostics",
        ])
        .args(packages)
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start cargo")?;
        ensure!(output.status.success(), "the programs did not build");
        let messages = String::from_utf8_lossy(&output.stdout);
        let find = |name: &str| {
            messages
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .filter(|message| message["target"]["name"] == name)
                .find_map(|message| message["executable"].as_str().map(PathBuf::from))
                .with_context(|| format!("cargo built no program {name}"))
        };
        Ok(Self {
            hub: find("foreshore-hub")?,
            agent: find("foreshore-agent")?,
            cli: find("foreshore")?,
        })
    }
}

/// A device of the demo.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// Relative to the cgroup hierarchies.
    pub(crate) cgroup: String,
    pub(crate) agent: Supervised,
}

/// The demo's directory and everything that runs in it.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) dir: PathBuf,
    cgroup: String,
    pub(crate) programs: Programs,
    hub: Option<Supervised>,
    url: String,
    pub(crate) devices: Vec<Device>,
}

impl Stage {
    /// Makes the directory. `dir` must not exist, or be empty.
    pub(crate) fn new(programs: Programs, dir: Option<&Path>) -> anyhow::Result<Self> {
        let dir = match dir {
            Some(dir) => {
                fs::create_dir_all(dir)
                    .with_context(|| format!("failed to make {}", dir.display()))?;
                let empty = fs::read_dir(dir)?.next().is_none();
                ensure!(empty, "{} is not empty; name another --dir", dir.display());
                dir.canonicalize()?
            }
            None => tempfile::Builder::new()
                .prefix("foreshore-demo-")
                .tempdir()
                .context("failed to make a temporary directory; name one with --dir")?
                .keep(),
        };
        let cgroup = format!("foreshore-demo-{}", std::process::id());
        let note = json!({"cgroup": cgroup, "agent": programs.agent});
        fs::create_dir_all(dir.join("logs"))?;
        fs::write(dir.join("demo.json"), serde_json::to_vec_pretty(&note)?)?;
        Ok(Self {
            dir,
            cgroup,
            programs,
            hub: None,
            url: String::new(),
            devices: Vec::new(),
        })
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    fn recipe(&self, name: &str, program: &Path, config: &Path) -> Recipe {
        Recipe {
            name: name.to_owned(),
            program: program.to_owned(),
            arguments: vec![
                "run".to_owned(),
                "--config".to_owned(),
                config.display().to_string(),
            ],
            environment: vec![(MARK.to_owned(), self.dir.display().to_string())],
            log: self.log(name),
        }
    }

    /// Starts the hub on free ports and waits until it serves.
    pub(crate) fn start_hub(&mut self) -> anyhow::Result<()> {
        let (data, config) = (self.dir.join("hub"), self.dir.join("hub.toml"));
        let text = format!(
            "data = {data:?}\n\n[api]\nlisten = \"127.0.0.1:0\"\n\n[broker]\nkind = \"embedded\"\nlisten = \"127.0.0.1:0\"\n"
        );
        fs::write(&config, text)?;
        let recipe = self.recipe("hub", &self.programs.hub, &config);
        let hub = Supervised::start(recipe, None)?;
        let endpoints = data.join("endpoints.json");
        let found = wait_for("the hub to serve", Duration::from_secs(30), || {
            ensure!(hub.process().is_some(), "the hub ended; see its log");
            Ok(fs::read(&endpoints).ok())
        });
        self.hub = Some(hub);
        let found: Value = serde_json::from_slice(&found?)?;
        self.url = text_of(&found, "api")?;
        let broker = text_of(&found, "broker")?;
        fs::write(self.dir.join("broker-url"), broker)?;
        Ok(())
    }

    /// Starts a device named `name`, quick to report and to notice.
    pub(crate) fn start_device(&mut self, name: &str) -> anyhow::Result<()> {
        let pace = "report_interval = \"500ms\"\nreconnect_max = \"2s\"\nkeepalive = \"10s\"\n";
        self.start_device_with(name, pace)
    }

    /// Starts a device named `name` with these lines in the `[hub]` part of its configuration.
    pub(crate) fn start_device_with(&mut self, name: &str, pace: &str) -> anyhow::Result<()> {
        let (home, cgroup) = (self.dir.join(name), format!("{}/{name}", self.cgroup));
        fs::create_dir(&home)?;
        let broker = fs::read_to_string(self.dir.join("broker-url"))?;
        let (token, state, run) = (
            self.dir.join("hub/join-token"),
            home.join("state"),
            home.join("run"),
        );
        let text = format!(
            "device = \"{name}\"\n\n\
             [hub]\nbroker = \"{broker}\"\nregistry = \"{url}\"\njoin_token_file = {token:?}\n\
             {pace}\n\
             [labels]\nrole = \"demo\"\n\n\
             [paths]\nstate = {state:?}\nrun = {run:?}\n\n\
             [cgroup]\nparent = \"{cgroup}\"\n",
            url = self.url,
        );
        let config = home.join("agent.toml");
        fs::write(&config, text)?;
        let recipe = self.recipe(name, &self.programs.agent, &config);
        let agent = Supervised::start(recipe, Some(RESTART_AFTER))?;
        self.devices.push(Device {
            name: name.to_owned(),
            cgroup,
            agent,
        });
        Ok(())
    }

    /// The device with this name.
    pub(crate) fn device(&self, name: &str) -> anyhow::Result<&Device> {
        (self.devices.iter().find(|device| device.name == name))
            .with_context(|| format!("there is no device {name}"))
    }

    /// `foreshore` with the demo's hub and token.
    pub(crate) fn foreshore(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.programs.cli);
        command
            .args(arguments)
            .env("FORESHORE_HUB", &self.url)
            .env("FORESHORE_TOKEN_FILE", self.dir.join("hub/api-token"))
            .env_remove("FORESHORE_TOKEN");
        command
    }

    /// What `foreshore … -o json` prints.
    pub(crate) fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self.foreshore(arguments).args(["-o", "json"]).output()?;
        if !output.status.success() {
            bail!(
                "foreshore {} ended with {}: {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Runs `foreshore` on this terminal; how it ended.
    pub(crate) fn show(&self, arguments: &[&str]) -> anyhow::Result<ExitStatus> {
        let mut child = self.foreshore(arguments).stdin(Stdio::null()).spawn()?;
        let end = wait_for("foreshore to end", Duration::from_secs(300), || {
            Ok(child.try_wait()?)
        });
        if end.is_err() {
            let _ended_meanwhile = child.kill();
            let _reaped = child.wait();
        }
        end
    }

    /// Stops supervising; agents and hub end, containers run on.
    pub(crate) fn stop(&mut self) {
        for device in &mut self.devices {
            device.agent.stop(Duration::from_secs(5));
        }
        if let Some(mut hub) = self.hub.take() {
            hub.stop(Duration::from_secs(6));
        }
    }

    /// What a person needs to look around in a demo that was kept.
    pub(crate) fn print_directions(&self) {
        let (dir, cli) = (self.dir.display(), self.programs.cli.display());
        println!("\nThe hub and its devices keep running. To look around:\n");
        println!("  export FORESHORE_HUB={}", self.url);
        println!("  export FORESHORE_TOKEN_FILE={dir}/hub/api-token");
        println!("  alias foreshore={cli}");
        println!("  foreshore get devices");
        println!("  foreshore describe device device-1");
        println!("  foreshore rollout history web");
        println!("  foreshore events -w");
        println!("  foreshore apply -f {dir}/web-v1.yaml     (web-v2.yaml, web-v3.yaml)");
        println!("  less {dir}/logs/device-1.log\n");
        println!(
            "From now on nothing starts an agent again that you kill; do it as systemd would:"
        );
        println!(
            "  {} run --config {dir}/device-1/agent.toml\n",
            self.programs.agent.display()
        );
        println!("To stop it and leave nothing behind:\n\n  cargo xtask demo --stop {dir}");
    }
}

fn text_of(value: &Value, key: &str) -> anyhow::Result<String> {
    let text = value[key].as_str();
    Ok(text
        .with_context(|| format!("endpoints.json has no {key}"))?
        .to_owned())
}

/// Fails once Ctrl-C was pressed; for chapters that do not wait.
pub(crate) fn go_on() -> anyhow::Result<()> {
    interrupt::check()
}
