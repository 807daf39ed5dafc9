//! A hub as a process.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::api::Api;
use crate::process::{Program, programs, wait_for};
use crate::{Bed, mosquitto::Mosquitto};

/// A hub and its data directory.
#[derive(Debug)]
pub struct Hub {
    program: Program,
    config: PathBuf,
    data: PathBuf,
    log: PathBuf,
    broker: String,
    api_url: String,
}

/// How a test's hub is set up.
#[derive(Debug, Default)]
pub struct HubOptions<'a> {
    /// Use this broker instead of the embedded one.
    pub broker: Option<&'a Mosquitto>,
    /// Or the one at this URL.
    pub url: Option<String>,
    /// Registries reached over plain HTTP, as `host:port`.
    pub plain_http: Vec<String>,
    /// Appended to `hub.toml`.
    pub more: String,
}

impl Hub {
    /// Starts a hub with the embedded broker and waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[must_use]
    pub fn start(bed: &Bed) -> Self {
        Self::start_with(bed, &HubOptions::default())
    }

    /// Starts a hub and waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[must_use]
    pub fn start_with(bed: &Bed, options: &HubOptions<'_>) -> Self {
        let (data, config, log) = (bed.path("hub"), bed.path("hub.toml"), bed.path("hub.log"));
        std::fs::create_dir_all(&data).expect("the bed is writable");
        if let Some(broker) = options.broker {
            broker.give_secrets(&data);
        }
        let url = options.broker.map(Mosquitto::url);
        let broker = url.or_else(|| options.url.clone()).map_or_else(
            || "kind = \"embedded\"\nlisten = \"127.0.0.1:0\"".to_owned(),
            |url| format!("kind = \"external\"\nurl = \"{url}\""),
        );
        let registries: String = (options.plain_http.iter())
            .map(|host| format!("[registries.\"{host}\"]\nplain_http = true\n"))
            .collect();
        let text = format!(
            "data = \"{}\"\n[api]\nlisten = \"127.0.0.1:0\"\n[broker]\n{broker}\n{registries}{}",
            data.display(),
            options.more
        );
        std::fs::write(&config, text).expect("the bed is writable");
        let program = Self::spawn(&config, &log);
        let mut hub = Self {
            program,
            config,
            data,
            log,
            broker: String::new(),
            api_url: String::new(),
        };
        hub.await_ready();
        hub
    }

    fn spawn(config: &std::path::Path, log: &std::path::Path) -> Program {
        let mut command = Command::new(programs().join("foreshore-hub"));
        command
            .args(["run", "--config"])
            .arg(config)
            .env("RUST_LOG", "info");
        Program::start(
            "foreshore-hub",
            &mut command,
            log,
            "the workspace's programs",
        )
    }

    fn await_ready(&mut self) {
        let endpoints = self.data.join("endpoints.json");
        let program = &mut self.program;
        let found: Value = wait_for("the hub to serve", Duration::from_secs(30), || {
            assert!(program.runs(), "the hub ended:\n{}", program.tail());
            let text = std::fs::read_to_string(&endpoints).map_err(|error| error.to_string())?;
            let found: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            let url = found["api"].as_str().ok_or("no api in endpoints.json")?;
            ureq::get(format!("{url}/readyz"))
                .call()
                .map_err(|error| error.to_string())?;
            Ok::<_, String>(found)
        });
        self.api_url = found["api"].as_str().expect("checked above").to_owned();
        self.broker = found["broker"]
            .as_str()
            .expect("endpoints.json names the broker")
            .to_owned();
    }

    /// A client of its API.
    ///
    /// # Panics
    ///
    /// When it has no token.
    #[must_use]
    pub fn api(&self) -> Api {
        let token = std::fs::read_to_string(self.data.join("api-token"))
            .expect("a running hub has a token");
        Api::new(&self.api_url, token.trim())
    }

    /// Where its API is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.api_url
    }

    /// Where its broker is.
    #[must_use]
    pub fn broker(&self) -> &str {
        &self.broker
    }

    /// Its data directory.
    #[must_use]
    pub fn data(&self) -> &std::path::Path {
        &self.data
    }

    /// The file that holds the token devices join with.
    #[must_use]
    pub fn join_token_file(&self) -> PathBuf {
        self.data.join("join-token")
    }

    /// Its process.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// SIGKILL. The ports stay the same for [`Self::restart`], so that devices find it again.
    pub fn kill9(&mut self) {
        self.program.kill9();
        self.pin_ports();
    }

    /// SIGTERM, and waits for a clean end.
    pub fn terminate(&mut self) {
        self.program.terminate(Duration::from_secs(10));
        self.pin_ports();
    }

    fn pin_ports(&self) {
        let text = std::fs::read_to_string(&self.config).expect("the configuration is still there");
        let (api, broker) = (authority(&self.api_url), authority(&self.broker));
        let text = text.replacen(
            "listen = \"127.0.0.1:0\"",
            &format!("listen = \"{api}\""),
            1,
        );
        let text = text.replacen(
            "listen = \"127.0.0.1:0\"",
            &format!("listen = \"{broker}\""),
            1,
        );
        std::fs::write(&self.config, text).expect("the bed is writable");
        let _may_be_gone = std::fs::remove_file(self.data.join("endpoints.json"));
    }

    /// Starts it again on the same data directory and ports.
    pub fn restart(&mut self) {
        self.program = Self::spawn(&self.config, &self.log);
        self.await_ready();
    }
}

fn authority(url: &str) -> &str {
    url.split("://").nth(1).unwrap_or(url).trim_end_matches('/')
}
