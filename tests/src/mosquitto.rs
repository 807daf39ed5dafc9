//! Debian's `mosquitto` as a process, configured by `foreshore-hub mosquitto-config`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::Bed;
use crate::process::{Program, free_port, programs, wait_until};

/// A broker on loopback.
#[derive(Debug)]
pub struct Mosquitto {
    program: Program,
    port: u16,
    dir: PathBuf,
    data: PathBuf,
    log: PathBuf,
}

impl Mosquitto {
    /// Starts one that knows the hub and these devices. The hub's data directory is `bed/hub`.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    #[must_use]
    pub fn start(bed: &Bed, devices: &[&str]) -> Self {
        let (dir, data, log) = (
            bed.path("mosquitto"),
            bed.path("hub"),
            bed.path("mosquitto.log"),
        );
        std::fs::create_dir_all(&data).expect("the bed is writable");
        let port = free_port();
        let mut command = Command::new(programs().join("foreshore-hub"));
        command
            .arg("mosquitto-config")
            .arg("--out")
            .arg(&dir)
            .arg("--data")
            .arg(&data);
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        for device in devices {
            command.args(["--device", device]);
        }
        let output = command.output().expect("the hub's program runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let program = Self::spawn(&dir, &log);
        let broker = Self {
            program,
            port,
            dir,
            data,
            log,
        };
        broker.await_ready();
        broker
    }

    fn spawn(dir: &Path, log: &Path) -> Program {
        let mut command = Command::new("mosquitto");
        command.arg("-c").arg(dir.join("mosquitto.conf"));
        Program::start("mosquitto", &mut command, log, "mosquitto")
    }

    fn await_ready(&self) {
        let address = format!("127.0.0.1:{}", self.port);
        wait_until("mosquitto to answer", Duration::from_secs(20), || {
            std::net::TcpStream::connect(&address).is_ok()
        });
    }

    /// `mqtt://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// The secrets are where the hub looks for them already; checks that.
    pub(crate) fn give_secrets(&self, data: &Path) {
        assert_eq!(self.data, data, "the broker was configured for another hub");
    }

    /// Its process.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Starts it again after [`Program::kill9`].
    pub fn restart(&mut self) {
        self.program = Self::spawn(&self.dir, &self.log);
        self.await_ready();
    }
}
