//! A broker to test: the embedded one, or mosquitto with our files.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use foreshore_hub::broker::mosquitto::{self, MosquittoConfig};
use foreshore_hub::broker::{Embedded, EmbeddedConfig, HUB_NAME, Limits};
use foreshore_hub::secrets::Secret;
use foreshore_protocol::topic::{self, Leaf};
use tempfile::TempDir;

use crate::wire::{Client, Connect, Refused, SOON, Version};

pub(crate) const JOIN: &str = "join-token-of-the-test";
pub(crate) const HUB: &str = "hub-secret-of-the-test";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Embedded,
    Mosquitto,
}

#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) kind: Kind,
    pub(crate) devices: SocketAddr,
    pub(crate) hub: SocketAddr,
    running: Running,
    directory: TempDir,
    limits: Limits,
}

#[derive(Debug)]
enum Running {
    Embedded(Option<Embedded>),
    Mosquitto(Child),
}

impl Bed {
    pub(crate) fn new(kind: Kind) -> Self {
        Self::with(kind, Limits::default())
    }

    /// The limits are those of the embedded broker.
    pub(crate) fn with(kind: Kind, limits: Limits) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // So that mosquitto, started by root, reaches its files from its own account.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o711))
            .expect("it is ours");
        match kind {
            Kind::Embedded => {
                let listen = SocketAddr::from(([127, 0, 0, 1], 0));
                let broker = start_embedded(listen, &limits);
                Self {
                    kind,
                    devices: broker.device_address(),
                    hub: broker.hub_address(),
                    running: Running::Embedded(Some(broker)),
                    directory,
                    limits,
                }
            }
            Kind::Mosquitto => {
                let listen = free_address();
                let config = MosquittoConfig {
                    listen,
                    directory: directory.path().join("conf"),
                    join_token: Secret::new(JOIN.to_owned()),
                    hub_secret: Secret::new(HUB.to_owned()),
                    devices: devices()
                        .iter()
                        .map(|name| name.parse().expect("a name"))
                        .collect(),
                };
                let mut salt = 0;
                let files = mosquitto::render(&config, || {
                    salt += 1;
                    [salt; mosquitto::SALT_BYTES]
                })
                .expect("a good configuration");
                mosquitto::write(&files, &config.directory).expect("a writable directory");
                let running = Running::Mosquitto(start_mosquitto(&directory, listen));
                Self {
                    kind,
                    devices: listen,
                    hub: listen,
                    running,
                    directory,
                    limits,
                }
            }
        }
    }

    /// The broker dies and comes back where it was.
    pub(crate) fn restart(&mut self) {
        match &mut self.running {
            Running::Embedded(broker) => {
                broker.take().expect("it runs").shutdown();
                let started = start_embedded(self.devices, &self.limits);
                self.hub = started.hub_address();
                *broker = Some(started);
            }
            Running::Mosquitto(child) => {
                end(child);
                *child = start_mosquitto(&self.directory, self.devices);
            }
        }
    }

    /// Connects; tries again, as every client does, when the broker is not ready for it. rmqtt says so to whoever
    /// returns while it is still clearing away the connection before.
    pub(crate) fn connect(&self, connect: &Connect) -> Result<Client, Refused> {
        let address = if connect.user.as_deref() == Some(HUB_NAME) {
            self.hub
        } else {
            self.devices
        };
        let deadline = Instant::now() + SOON;
        loop {
            match Client::open(address, connect) {
                Err(Refused::Unavailable) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
    }

    pub(crate) fn device(&self, version: Version, name: &str) -> Client {
        let connect = Connect::new(version, name, JOIN);
        self.connect(&connect)
            .unwrap_or_else(|refused| panic!("{name} was refused: {refused:?}"))
    }

    pub(crate) fn hub(&self) -> Client {
        self.connect(&hub())
            .unwrap_or_else(|refused| panic!("the hub was refused: {refused:?}"))
    }

    /// A hub that reads everything there is.
    pub(crate) fn listening_hub(&self) -> Client {
        let mut hub = self.hub();
        assert_eq!(hub.subscribe("fs/v1/#").expect("an answer"), 1);
        hub
    }
}

pub(crate) fn hub() -> Connect {
    Connect::new(Version::V5, HUB_NAME, HUB)
}

/// The devices that mosquitto knows.
pub(crate) fn devices() -> Vec<String> {
    (0..=250)
        .map(|number| format!("dev{number}"))
        .chain(["dev1x".to_owned(), "dev".to_owned()])
        .collect()
}

pub(crate) fn own(name: &str, leaf: Leaf) -> String {
    topic::device(&name.parse().expect("a name"), leaf)
}

fn start_embedded(listen: SocketAddr, limits: &Limits) -> Embedded {
    let mut config = EmbeddedConfig::new(
        listen,
        Secret::new(JOIN.to_owned()),
        Secret::new(HUB.to_owned()),
    );
    config.limits = limits.clone();
    Embedded::start(config).expect("the embedded broker starts")
}

fn start_mosquitto(directory: &TempDir, listen: SocketAddr) -> Child {
    let log = std::fs::File::create(directory.path().join("log")).expect("a writable directory");
    let mut child = Command::new("mosquitto")
        .arg("-c")
        .arg(directory.path().join("conf/mosquitto.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "mosquitto cannot be started ({error}): install mosquitto, or run cargo xtask test"
            )
        });
    wait_for("mosquitto to listen", || {
        if let Some(status) = child.try_wait().expect("a child") {
            let mut text = String::new();
            let file = std::fs::File::open(directory.path().join("log")).expect("its log");
            let _ = file.take(1 << 16).read_to_string(&mut text);
            panic!("mosquitto ended with {status}:\n{text}");
        }
        TcpStream::connect(listen).is_ok()
    });
    child
}

/// An address that nobody listens on, and none that was given out here before: between the look and the broker's start another
/// test could be told the same one, and would talk to the wrong broker.
fn free_address() -> SocketAddr {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let mut given = GIVEN.lock().expect("nothing panics here");
        if given.insert(address.port()) {
            return address;
        }
    }
}

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Bed {
    fn drop(&mut self) {
        match &mut self.running {
            Running::Embedded(broker) => {
                if let Some(broker) = broker.take() {
                    broker.shutdown();
                }
            }
            Running::Mosquitto(child) => end(child),
        }
    }
}
