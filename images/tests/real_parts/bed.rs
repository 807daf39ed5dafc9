//! Programs the tests run, and a registry.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use foreshore_images::registry::{Client, ClientConfig, Credentials, RegistryConfig, Timeouts};
use foreshore_images::store::StageError;
use tempfile::TempDir;

/// Runs a program to its end; its standard output.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run {program}: {error}; install it, or run cargo xtask test, which does")
        });
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for a condition.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What comes of work on a store. A process that another test starts holds the store's lock until it executes its program.
pub(crate) fn unless_busy<T>(mut work: impl FnMut() -> Result<T, StageError>) -> T {
    let mut done = None;
    wait_for("the store's lock", || {
        match work() {
            Err(StageError::Busy { .. }) => {}
            other => done = Some(other.unwrap()),
        }
        done.is_some()
    });
    done.unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Short times, so that a server that hangs is found out quickly.
pub(crate) const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    stall: Duration::from_secs(4),
    exchange: Duration::from_secs(8),
    pace_bytes: 1 << 20,
};

/// A client that speaks plain HTTP to one host.
pub(crate) fn client(host: &str, credentials: Option<Credentials>) -> Client {
    let registry = RegistryConfig {
        plain_http: true,
        credentials,
        ..RegistryConfig::default()
    };
    let timeouts = Timeouts {
        stall: Duration::from_secs(20),
        exchange: Duration::from_secs(60),
        ..TIMEOUTS
    };
    Client::new(ClientConfig {
        registries: [(host.to_owned(), registry)].into(),
        timeouts,
        ..ClientConfig::default()
    })
    .unwrap()
}

/// Debian's `docker-registry` on loopback.
pub(crate) struct Registry {
    child: Child,
    pub(crate) host: String,
    _dir: TempDir,
}

pub(crate) const USER: &str = "tester";
pub(crate) const PASSWORD: &str = "secret-password";

/// How a registry is protected.
pub(crate) enum Protection<'a> {
    None,
    Password,
    /// With the certificate `cert.pem` and its key `key.pem` in a directory.
    Tls(&'a Path),
}

/// A port that nobody listens on, and none that was given out here before: between the look and the registry's start another
/// test could be told the same one, and would talk to the wrong one.
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

impl Registry {
    pub(crate) fn start(protection: &Protection<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = format!("127.0.0.1:{}", free_port());
        let tls = match protection {
            Protection::Tls(dir) => format!(
                ", tls: {{certificate: {0}/cert.pem, key: {0}/key.pem}}",
                dir.display()
            ),
            _ => String::new(),
        };
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: \"{host}\"{tls}}}\n",
            dir.path().join("data").display()
        );
        if matches!(protection, Protection::Password) {
            // "tester:secret-password", bcrypt with the lowest cost.
            let line = "tester:$2b$04$oStqJXGQXMh.zuO1ZUcv6e/X31ZvM6mUSC9gyy272b8yxvjuauMJi\n";
            let path = dir.path().join("htpasswd");
            fs::write(&path, line).unwrap();
            config += &format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                path.display()
            );
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", text(&path)])
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("cannot run docker-registry: {error}; install it, or run cargo xtask test, which does")
            });
        wait_for("the registry to answer", || {
            std::net::TcpStream::connect(&host).is_ok()
        });
        Self {
            child,
            host,
            _dir: dir,
        }
    }

    /// Copies an image of an OCI layout here; the whole index if it is one.
    pub(crate) fn push(&self, layout: &Path, tag: &str, name: &str) {
        let (source, target) = (
            format!("oci:{}:{tag}", layout.display()),
            format!("docker://{}/{name}", self.host),
        );
        let credentials = format!("{USER}:{PASSWORD}");
        run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "--all",
                "--quiet",
                "--dest-tls-verify=false",
                "--dest-creds",
                &credentials,
                &source,
                &target,
            ],
        );
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Something mounted, until dropped.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn new(kind: &str, options: &str, target: &Path) -> Self {
        fs::create_dir_all(target).unwrap();
        run("mount", &["-t", kind, "-o", options, kind, text(target)]);
        Self(target.to_owned())
    }

    /// What a container would see.
    pub(crate) fn overlay(layers: &[PathBuf], target: &Path) -> Self {
        let mut lower: Vec<&str> = layers.iter().rev().map(|layer| text(layer)).collect();
        // With one layer overlayfs wants a second, or an upper one.
        let empty = target.with_extension("empty");
        fs::create_dir_all(&empty).unwrap();
        lower.push(text(&empty));
        Self::new(
            "overlay",
            &format!("ro,lowerdir={}", lower.join(":")),
            target,
        )
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
