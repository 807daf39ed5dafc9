//! Debian's `docker-registry` as a process.

use std::process::Command;
use std::time::Duration;

use crate::Bed;
use crate::process::{Program, free_port, wait_until};

/// A registry on loopback without authentication.
#[derive(Debug)]
pub struct Registry {
    program: Program,
    host: String,
}

impl Registry {
    /// Starts one and waits until it answers.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[must_use]
    pub fn start(bed: &Bed) -> Self {
        let host = format!("127.0.0.1:{}", free_port());
        let config = bed.path("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: {host}\n",
            bed.path("registry").display()
        );
        std::fs::write(&config, text).expect("the bed is writable");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let program = Program::start(
            "docker-registry",
            &mut command,
            &bed.path("registry.log"),
            "docker-registry",
        );
        let url = format!("http://{host}/v2/");
        wait_until("the registry to answer", Duration::from_secs(20), || {
            ureq::get(&url).call().is_ok()
        });
        Self { program, host }
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
