//! Debian's `docker-registry` as a process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::Bed;
use crate::process::{Program, free_port, wait_until};

/// A user of a protected registry.
#[derive(Debug, Clone, Copy)]
pub struct Login {
    /// Its name.
    pub user: &'static str,
    /// In the clear.
    pub password: &'static str,
    /// `password` as bcrypt with the lowest cost: what htpasswd(1) would write.
    hash: &'static str,
}

/// Who may pull from a protected registry at first.
pub const FIRST: Login = Login {
    user: "puller",
    password: "first-password-88c2",
    hash: "$2b$04$abcdefghijklmnopqrstuuqnDIIR3iyTvCdMQSlut7sbJickku7aK",
};

/// The same user with another password.
pub const ROTATED: Login = Login {
    user: "puller",
    password: "rotated-password-6b1d",
    hash: "$2b$04$abcdefghijklmnopqrstuubbWmG//leGCr8H1zBrNbNXo2tYuYbfS",
};

/// A registry on loopback.
#[derive(Debug)]
pub struct Registry {
    program: Program,
    host: String,
    config: PathBuf,
    log: PathBuf,
    users: PathBuf,
}

impl Registry {
    /// Starts one without authentication and waits until it answers.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[must_use]
    pub fn start(bed: &Bed) -> Self {
        Self::start_for(bed, None)
    }

    /// Starts one that only `login` may use, with basic authentication.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    #[must_use]
    pub fn protected(bed: &Bed, login: Login) -> Self {
        Self::start_for(bed, Some(login))
    }

    fn start_for(bed: &Bed, login: Option<Login>) -> Self {
        let host = format!("127.0.0.1:{}", free_port());
        let config = bed.path("registry.yml");
        let users = bed.path("registry-users");
        let auth = login.map_or_else(String::new, |login| {
            admit(&users, login);
            format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                users.display()
            )
        });
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: {host}\n{auth}",
            bed.path("registry").display()
        );
        std::fs::write(&config, text).expect("the bed is writable");
        let log = bed.path("registry.log");
        let program = spawn(&config, &log, &host);
        Self {
            program,
            host,
            config,
            log,
            users,
        }
    }

    /// Only `login` may use it from now on. It is another process then, at the same address.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    pub fn admit_only(&mut self, login: Login) {
        admit(&self.users, login);
        self.program.kill9();
        self.program = spawn(&self.config, &self.log, &self.host);
    }

    /// `127.0.0.1:PORT`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its process, to stop or freeze it.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }
}

fn admit(users: &Path, login: Login) {
    let line = format!("{}:{}\n", login.user, login.hash);
    std::fs::write(users, line).expect("the bed is writable");
}

fn spawn(config: &Path, log: &Path, host: &str) -> Program {
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(config);
    let program = Program::start("docker-registry", &mut command, log, "docker-registry");
    let url = format!("http://{host}/v2/");
    wait_until("the registry to answer", Duration::from_secs(20), || {
        matches!(
            ureq::get(&url).call(),
            Ok(_) | Err(ureq::Error::StatusCode(401))
        )
    });
    program
}
