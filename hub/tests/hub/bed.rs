//! A directory, a broker and a hub, gone when the test ends.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long a test waits for what takes milliseconds on an idle machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Waits for `condition` to give a value; says what it last saw when it does not.
pub(crate) fn wait_for<T, E: std::fmt::Debug>(
    what: &str,
    mut condition: impl FnMut() -> Result<T, E>,
) -> T {
    let end = Instant::now() + LONG;
    loop {
        match condition() {
            Ok(value) => return value,
            Err(seen) => assert!(
                Instant::now() < end,
                "waited in vain for {what}; last seen: {seen:?}"
            ),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || if condition() { Ok(()) } else { Err("not yet") });
}

/// A process that is killed when it is dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(command: &mut Command, log: &Path, hint: &str) -> Self {
        let output = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        let error = output.try_clone().unwrap();
        let spawned = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(error)
            .spawn();
        let child = spawned.unwrap_or_else(|error| {
            panic!(
                "{:?} does not start: {error}; {hint}",
                command.get_program()
            )
        });
        Self {
            child,
            log: log.to_owned(),
        }
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn kill(&mut self) {
        _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let mut text = String::new();
            _ = std::fs::File::open(&self.log).and_then(|mut log| log.read_to_string(&mut text));
            let tail: Vec<_> = text.lines().rev().take(60).collect();
            eprintln!("--- {} ---", self.log.display());
            for line in tail.into_iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

/// Which broker a hub uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The hub's own.
    Embedded,
    /// mosquitto, configured by the hub's program.
    Mosquitto,
}

/// Everything a test needs.
#[derive(Debug)]
pub(crate) struct Bed {
    hub: Option<Process>,
    mosquitto: Option<Process>,
    kind: Kind,
    extra: String,
    /// Where the hub kills itself: a kill point of its own.
    pub(crate) kill_at: Option<String>,
    pub(crate) api: String,
    pub(crate) broker: String,
    dir: TempDir,
}

/// A port that nobody listens on, and none that was given out here before: between the look and the broker's start another
/// test could be told the same one, and would talk to the wrong broker.
fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        if GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

impl Bed {
    pub(crate) fn start(kind: Kind) -> Self {
        Self::start_with(kind, "")
    }

    /// `extra` is appended to `hub.toml`.
    pub(crate) fn start_with(kind: Kind, extra: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut bed = Self {
            hub: None,
            mosquitto: None,
            kind,
            extra: extra.to_owned(),
            kill_at: None,
            api: "127.0.0.1:0".to_owned(),
            broker: "127.0.0.1:0".to_owned(),
            dir,
        };
        if kind == Kind::Mosquitto {
            bed.broker = format!("127.0.0.1:{}", free_port());
            bed.configure_mosquitto();
            bed.start_mosquitto();
        }
        bed.start_hub();
        bed
    }

    /// Appends to `hub.toml`, for the next [`Self::start_hub`].
    pub(crate) fn configure_more(&mut self, more: &str) {
        self.extra.push_str(more);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path("data")
    }

    pub(crate) fn program() -> Command {
        Command::new(env!("CARGO_BIN_EXE_foreshore-hub"))
    }

    fn configure_mosquitto(&self) {
        let devices =
            (0..20).flat_map(|number| ["--device".to_owned(), format!("device-{number}")]);
        let output = Self::program()
            .arg("mosquitto-config")
            .arg("--out")
            .arg(self.path("mosquitto"))
            .arg("--data")
            .arg(self.data())
            .args(["--listen", &self.broker])
            .args(devices)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    pub(crate) fn start_mosquitto(&mut self) {
        let mut command = Command::new("mosquitto");
        command.arg("-c").arg(self.path("mosquitto/mosquitto.conf"));
        let hint = "install mosquitto, or run cargo xtask test";
        self.mosquitto = Some(Process::start(
            &mut command,
            &self.path("mosquitto.log"),
            hint,
        ));
        wait_until("mosquitto to listen", || {
            std::net::TcpStream::connect(&self.broker).is_ok()
        });
    }

    /// SIGKILL; with it goes everything that was retained.
    pub(crate) fn kill_mosquitto(&mut self) {
        self.mosquitto.take().expect("mosquitto runs").kill();
    }

    pub(crate) fn start_hub(&mut self) {
        let broker = match self.kind {
            Kind::Embedded => format!("kind = \"embedded\"\nlisten = \"{}\"", self.broker),
            Kind::Mosquitto => format!("kind = \"external\"\nurl = \"mqtt://{}\"", self.broker),
        };
        let text = format!(
            "data = \"{}\"\n[api]\nlisten = \"{}\"\nmax_image_bytes = 67108864\n[broker]\n{broker}\n{}\n",
            self.data().display(),
            self.api,
            self.extra,
        );
        std::fs::write(self.path("hub.toml"), text).unwrap();
        let endpoints = self.data().join("endpoints.json");
        _ = std::fs::remove_file(&endpoints);
        let mut command = Self::program();
        command
            .arg("run")
            .arg("--config")
            .arg(self.path("hub.toml"))
            .env("RUST_LOG", "foreshore_hub=debug,info");
        if let Some(point) = &self.kill_at {
            command.env("FORESHORE_KILL_AT", format!("{point}#1"));
        }
        let mut hub = Process::start(
            &mut command,
            &self.path("hub.log"),
            "it is built with the tests",
        );
        let found: Value = wait_for("the hub to serve", || {
            assert!(hub.runs(), "the hub ended");
            let text = std::fs::read_to_string(&endpoints).map_err(|error| error.to_string())?;
            serde_json::from_str(&text).map_err(|error| error.to_string())
        });
        self.hub = Some(hub);
        let authority = |key: &str| {
            found[key]
                .as_str()
                .unwrap()
                .split_once("://")
                .unwrap()
                .1
                .to_owned()
        };
        self.api = authority("api");
        self.broker = authority("broker");
    }

    /// SIGKILL; the ports stay for the next [`Self::start_hub`].
    pub(crate) fn kill_hub(&mut self) {
        self.hub.take().expect("the hub runs").kill();
    }

    /// Waits until the hub is gone by itself; the ports stay for the next [`Self::start_hub`].
    pub(crate) fn await_death(&mut self) {
        let mut hub = self.hub.take().expect("the hub ran");
        wait_until("the hub to kill itself", || !hub.runs());
    }

    /// SIGTERM, and how long the end took.
    pub(crate) fn stop_hub(&mut self) -> Duration {
        let mut hub = self.hub.take().expect("the hub runs");
        let begun = Instant::now();
        let killed = Command::new("kill")
            .arg(hub.child.id().to_string())
            .status()
            .unwrap();
        assert!(killed.success());
        let status = wait_for("the hub to end", || {
            hub.child.try_wait().unwrap().ok_or("runs")
        });
        assert!(status.success(), "{status}");
        begun.elapsed()
    }

    pub(crate) fn token(&self) -> String {
        std::fs::read_to_string(self.data().join("api-token"))
            .unwrap()
            .trim()
            .to_owned()
    }

    pub(crate) fn join_token(&self) -> String {
        std::fs::read_to_string(self.data().join("join-token"))
            .unwrap()
            .trim()
            .to_owned()
    }

    /// A call below `/api/v1`: status and body.
    pub(crate) fn call(&self, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
        self.request(
            method,
            &format!("/api/v1{path}"),
            Some(&format!("Bearer {}", self.token())),
            body,
        )
    }

    /// A call of any path.
    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        authorization: Option<&str>,
        body: &[u8],
    ) -> (u16, Value) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(LONG))
            .build()
            .into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.api));
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let mut response = agent.run(request.body(body).unwrap()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (
            response.status().as_u16(),
            serde_json::from_str(&text).unwrap_or(Value::String(text)),
        )
    }

    /// A call of the registry by an operator: what came, or nothing when the hub died over it.
    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Option<Answer> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(LONG))
            .build()
            .into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.api))
            .header("authorization", format!("Bearer {}", self.token()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = agent.run(request.body(body).unwrap()).ok()?;
        Some(Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            bytes: response
                .body_mut()
                .with_config()
                .limit(1 << 30)
                .read_to_vec()
                .ok()?,
        })
    }

    /// The same of a hub that lives on.
    pub(crate) fn answer(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.ask(method, path, headers, body)
            .unwrap_or_else(|| panic!("{method} {path}: no answer"))
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, body) = self.call("GET", path, b"");
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    /// Applies a manifest that must be accepted.
    pub(crate) fn apply(&self, app: &str, manifest: &str) -> Value {
        let (status, body) = self.call("PUT", &format!("/apps/{app}"), manifest.as_bytes());
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The newest rollout of an app.
    pub(crate) fn rollout(&self, app: &str) -> Value {
        self.get(&format!("/rollouts?app={app}&limit=1"))["items"][0].clone()
    }

    pub(crate) fn await_rollout(&self, app: &str, state: &str) -> Value {
        wait_for(&format!("the rollout of {app} to be {state}"), || {
            let rollout = self.rollout(app);
            if rollout["state"] == state {
                Ok(rollout)
            } else {
                Err(rollout.to_string())
            }
        })
    }

    pub(crate) fn await_online(&self, count: usize) {
        wait_for(&format!("{count} devices online"), || {
            let devices = self.get("/devices");
            let online = devices["items"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|device| device["online"] == true);
            if online.count() == count {
                Ok(())
            } else {
                Err(devices.to_string())
            }
        });
    }

    /// The kinds of all events, oldest first.
    pub(crate) fn event_kinds(&self) -> Vec<String> {
        let events = self.get("/events?after=0&limit=1000");
        let kinds = events["items"].as_array().unwrap().iter();
        kinds
            .map(|event| event["kind"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Imports an image made of one small file; its name.
    pub(crate) fn import(&self, tag: &str) -> String {
        let archive = crate::images::oci_archive(self.dir.path(), tag);
        let (status, body) = self.call("POST", &format!("/images?name=demo:{tag}"), &archive);
        assert_eq!(status, 201, "{body}");
        body["reference"].as_str().unwrap().to_owned()
    }
}

/// What the registry answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: ureq::http::HeaderMap,
    pub(crate) bytes: Vec<u8>,
}

impl Answer {
    /// A header, empty when it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or(Value::Null)
    }

    /// The code of an error, empty when it is none.
    pub(crate) fn code(&self) -> String {
        let code = self.json()["errors"][0]["code"].as_str().map(str::to_owned);
        code.unwrap_or_default()
    }
}

/// A manifest with one service; every time is short.
pub(crate) fn manifest(app: &str, image: &str, waves: &str) -> String {
    format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: {app}}}\nspec:\n  services:\n    web: {{image: \"{image}\"}}\n  rollout: {{waves: {waves}, soak: 0s, bake: 0s, maxUnavailable: 100%}}\n"
    )
}
