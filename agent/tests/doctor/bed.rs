//! A device to look at: a configuration, a token, a state directory, and something that listens like a broker.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde::Deserialize;

/// The program under test.
pub const AGENT: &str = env!("CARGO_BIN_EXE_foreshore-agent");

/// Fails with the reason where a test cannot run.
pub fn assert_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes namespaces and mounts: run it as root"
    );
}

/// A device with nothing wrong with it.
#[derive(Debug)]
pub struct Bed {
    dir: tempfile::TempDir,
    /// Accepts connections and says nothing.
    broker: TcpListener,
}

impl Bed {
    pub fn new() -> Self {
        // Not the usual place, which often is a tmpfs: that is no place for state, and the doctor says so.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let dir = if dir.is_dir() {
            dir.to_owned()
        } else {
            std::env::temp_dir()
        };
        Self::within(&dir)
    }

    /// Where other users can look, too.
    pub fn open_to_others() -> Self {
        Self::within(&std::env::temp_dir())
    }

    fn within(dir: &Path) -> Self {
        let bed = Self {
            dir: tempfile::tempdir_in(dir).unwrap(),
            broker: TcpListener::bind("127.0.0.1:0").unwrap(),
        };
        std::fs::create_dir(bed.state()).unwrap();
        std::fs::write(bed.token(), "secret\n").unwrap();
        set_mode(&bed.token(), 0o600);
        let port = bed.broker.local_addr().unwrap().port();
        bed.configure(&bed.text(&format!("mqtt://127.0.0.1:{port}"), ""));
        bed
    }

    /// The text of a configuration whose `[hub]` has `more`.
    pub fn text(&self, broker: &str, more: &str) -> String {
        format!(
            "device = \"d-1\"\n[hub]\nbroker = \"{broker}\"\njoin_token_file = \"{}\"\n{more}\n\
             [paths]\nstate = \"{}\"\nrun = \"{}\"\n",
            self.token().display(),
            self.state().display(),
            self.dir.path().join("run").display(),
        )
    }

    pub fn configure(&self, text: &str) {
        std::fs::write(self.config(), text).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("agent.toml")
    }

    pub fn token(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Lets others read the token.
    pub fn open_token(&self) {
        set_mode(&self.token(), 0o644);
    }

    /// Runs the agent with this configuration.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(AGENT);
        command.args(arguments);
        if arguments == ["doctor"] {
            command.arg("--config").arg(self.config());
        }
        command.output().unwrap()
    }

    /// Runs the doctor, and reads what it says in JSON.
    pub fn doctor(&self) -> Report {
        Report::read(
            &Command::new(AGENT)
                .args(["doctor", "-o", "json", "--config"])
                .arg(self.config())
                .output()
                .unwrap(),
        )
    }

    /// What is in the state directory.
    pub fn left(&self) -> Vec<String> {
        names(&self.state())
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// What the doctor said, and how it ended.
#[derive(Debug)]
pub struct Report {
    checks: Vec<Check>,
    pub code: Option<i32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    pub id: String,
    pub level: String,
    pub found: String,
    pub fix: Option<String>,
}

impl Report {
    pub fn read(output: &Output) -> Self {
        #[derive(Deserialize)]
        struct Said {
            checks: Vec<Check>,
        }
        let said: Said = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {output:?}"));
        Self {
            checks: said.checks,
            code: output.status.code(),
        }
    }

    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    pub fn of(&self, id: &str) -> Check {
        let found = self.checks.iter().find(|check| check.id == id);
        found
            .unwrap_or_else(|| panic!("no {id} in {self:#?}"))
            .clone()
    }

    /// The ids of what is an error.
    pub fn errors(&self) -> Vec<String> {
        let errors = self.checks.iter().filter(|check| check.level == "error");
        errors.map(|check| check.id.clone()).collect()
    }
}
