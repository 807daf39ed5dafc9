//! The rules and bounds of this system as configuration files for mosquitto 2.0.
//!
//! What mosquitto's files cannot say: that a device may use the retain flag on two of its leaves only. It may
//! fill its own leaves with retained messages then, and no other's.
//!
//! A device that joins later needs the files to be generated anew and mosquitto to get a SIGHUP.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Digest};

use account::Account;

use super::authorize::{Action, HUB_NAME, Identity, authorize};
use crate::secrets::Secret;

mod account;

/// Bytes of a salt, as `mosquitto_passwd` makes them.
pub const SALT_BYTES: usize = 12;

/// Rounds of PBKDF2. The tokens have 256 random bits, so the rounds protect nothing; mosquitto spends them on
/// every connection of every device.
const ROUNDS: NonZeroU32 = NonZeroU32::new(101).expect("not zero");

/// Connections that mosquitto takes at least: with fewer devices than that, as many as the embedded broker.
const CONNECTIONS_MIN: usize = 10_000;

/// What the files are made from.
#[derive(Debug, Clone)]
pub struct MosquittoConfig {
    /// Where mosquitto listens. Not port 0.
    pub listen: SocketAddr,
    /// The directory that the files will be in: the configuration names the others by their absolute path.
    pub directory: PathBuf,
    /// What devices log in with.
    pub join_token: Secret,
    /// What the hub logs in with.
    pub hub_secret: Secret,
    /// The devices that may log in.
    pub devices: Vec<DeviceId>,
}

/// The three files, rendered.
#[derive(Clone, PartialEq, Eq)]
pub struct Files {
    /// `mosquitto.conf`.
    pub conf: String,
    /// `passwd`: names and hashes.
    pub passwd: String,
    /// `acl`.
    pub acl: String,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files")
            .field("conf", &self.conf)
            .field("acl", &self.acl)
            .finish_non_exhaustive()
    }
}

/// Why the files were not made.
#[derive(Debug, thiserror::Error)]
pub enum MosquittoError {
    /// mosquitto cannot report the port that it chose.
    #[error("mosquitto needs a port to listen on; port 0 means none")]
    Port,
    /// mosquitto's configuration has no quotes.
    #[error("mosquitto's configuration cannot name the directory {}", .0.display())]
    Directory(PathBuf),
    /// The hub's name as that of a device.
    #[error("no device can be called {HUB_NAME}; the hub is")]
    Reserved,
    /// A file could not be written.
    #[error("failed to write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Renders the files; `salt` gives the next random salt.
///
/// # Errors
///
/// See [`MosquittoError`]; nothing is written here.
pub fn render(
    config: &MosquittoConfig,
    mut salt: impl FnMut() -> [u8; SALT_BYTES],
) -> Result<Files, MosquittoError> {
    if config.listen.port() == 0 {
        return Err(MosquittoError::Port);
    }
    let directory = config
        .directory
        .to_str()
        .filter(|path| {
            path.starts_with('/') && !path.contains(char::is_control) && path.trim() == *path
        })
        .ok_or_else(|| MosquittoError::Directory(config.directory.clone()))?;
    let mut passwd = password_line(&Identity::Hub, &config.hub_secret, salt());
    let mut acl = acl_of(&Identity::Hub);
    for device in &config.devices {
        if device.as_str() == HUB_NAME {
            return Err(MosquittoError::Reserved);
        }
        let identity = Identity::Device(device.clone());
        passwd.push_str(&password_line(&identity, &config.join_token, salt()));
        acl.push_str(&acl_of(&identity));
    }
    Ok(Files {
        conf: conf(config.listen, directory, config.devices.len()),
        passwd,
        acl,
    })
}

/// Writes the files into `directory`, which is made if missing; only their owner can read them. Each is replaced
/// whole.
///
/// mosquitto gives up root before it reads its files. So when root writes them into a directory of its own, they are
/// given to the account `mosquitto`, if there is one and it can reach the directory; otherwise the configuration
/// tells mosquitto to run as the owner of the directory.
///
/// # Errors
///
/// [`MosquittoError::Write`].
pub fn write(files: &Files, directory: &Path) -> Result<(), MosquittoError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| MosquittoError::Write { path, source }
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed(directory))?;
    let account = account::of(directory).map_err(failed(directory))?;
    account.own(directory).map_err(failed(directory))?;
    let conf = match &account.name {
        Some(name) => format!(
            "{}\n# Whose files these are; mosquitto gives up root before it reads them.\nuser {name}\n",
            files.conf
        ),
        None => files.conf.clone(),
    };
    // The configuration last: it names the others.
    for (name, content) in [
        ("passwd", &files.passwd),
        ("acl", &files.acl),
        ("mosquitto.conf", &conf),
    ] {
        let path = directory.join(name);
        write_private(&path, content, &account).map_err(failed(&path))?;
    }
    Ok(())
}

fn write_private(path: &Path, content: &str, account: &Account) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    account.own(Path::new(&temporary))?;
    std::fs::rename(&temporary, path)
}

fn conf(listen: SocketAddr, directory: &str, devices: usize) -> String {
    // Each device may come back before its lost connection is noticed.
    let connections = devices.saturating_mul(2).max(CONNECTIONS_MIN);
    let (address, port) = (listen.ip(), listen.port());
    format!(
        "\
# For mosquitto 2.0 or later, from `foreshore-hub mosquitto-config`; it is overwritten by the next run.
# The hub needs: [broker] kind = \"external\", url = \"mqtt://{listen}\"

listener {port} {address}
allow_anonymous false
password_file {directory}/passwd
acl_file {directory}/acl
# A session belongs to its user: nobody takes over another's by its client id.
use_username_as_clientid true

# The hub publishes everything again after a restart, so nothing is written to the SD card.
persistence false

# Of 10,000 messages at once, mosquitto's defaults acknowledged all and delivered a tenth.
max_queued_messages 100000
max_queued_bytes 268435456
max_inflight_messages 1000
# Bounds on what one client can take from the others.
max_connections {connections}
max_packet_size 73728
max_keepalive 1800
max_qos 1
max_topic_alias 0
persistent_client_expiration 2h
queue_qos0_messages false
set_tcp_nodelay true
# No $SYS topics.
sys_interval 0

log_dest stderr
log_type error
log_type warning
log_type notice
"
    )
}

/// `name:$7$rounds$salt$hash`, PBKDF2 with HMAC-SHA512, as `mosquitto_passwd` of 2.0 writes it.
fn password_line(identity: &Identity, secret: &Secret, salt: [u8; SALT_BYTES]) -> String {
    let mut hash = [0; 64];
    ring::pbkdf2::derive(
        ring::pbkdf2::PBKDF2_HMAC_SHA512,
        ROUNDS,
        &salt,
        secret.expose().as_bytes(),
        &mut hash,
    );
    format!(
        "{identity}:$7${ROUNDS}${}${}\n",
        STANDARD.encode(salt),
        STANDARD.encode(hash)
    )
}

/// What [`authorize`] allows this identity, topic by topic.
fn acl_of(identity: &Identity) -> String {
    let mut acl = format!("user {identity}\n");
    let Identity::Device(id) = identity else {
        let _ = writeln!(acl, "topic readwrite {}/#\n", topic::PREFIX);
        return acl;
    };
    let may = |action, subject: &str| authorize(identity, action, subject).is_ok();
    for topic in Leaf::ALL
        .map(|leaf| topic::device(id, leaf))
        .into_iter()
        .chain([topic::HUB.to_owned()])
    {
        let write = may(Action::Publish { retain: false }, &topic);
        let read = may(Action::Subscribe, &topic);
        let access = match (read, write) {
            (true, true) => "readwrite",
            (true, false) => "read",
            (false, true) => "write",
            (false, false) => continue,
        };
        let _ = writeln!(acl, "topic {access} {topic}");
    }
    // All releases are alike.
    if may(Action::Subscribe, &topic::release(&Digest::of(b""))) {
        let _ = writeln!(acl, "topic read {}/rel/+", topic::PREFIX);
    }
    acl.push('\n');
    acl
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn config() -> MosquittoConfig {
        MosquittoConfig {
            listen: "127.0.0.1:1883".parse().unwrap(),
            directory: "/etc/mosquitto/fore shore".into(),
            join_token: Secret::new("join-token-text".to_owned()),
            hub_secret: Secret::new("hub-secret-text".to_owned()),
            devices: vec!["gateway-1".parse().unwrap(), "gateway-2".parse().unwrap()],
        }
    }

    fn rendered(config: &MosquittoConfig) -> Result<Files, MosquittoError> {
        let mut next = 0;
        render(config, || {
            next += 1;
            [next; SALT_BYTES]
        })
    }

    #[test]
    fn the_acl_says_what_authorize_says() {
        let files = rendered(&config()).unwrap();
        let shard = topic::shard(&"gateway-1".parse().unwrap());
        let expected = format!(
            "user foreshore-hub\ntopic readwrite fs/v1/#\n\n\
             user gateway-1\n\
             topic read fs/v1/{shard}/gateway-1/head\n\
             topic read fs/v1/{shard}/gateway-1/cmd\n\
             topic read fs/v1/{shard}/gateway-1/secrets\n\
             topic write fs/v1/{shard}/gateway-1/reported\n\
             topic write fs/v1/{shard}/gateway-1/beacon\n\
             topic write fs/v1/{shard}/gateway-1/pull\n\
             topic write fs/v1/{shard}/gateway-1/event\n\
             topic write fs/v1/{shard}/gateway-1/presence\n\
             topic write fs/v1/{shard}/gateway-1/lease_req\n\
             topic read fs/v1/{shard}/gateway-1/lease\n\
             topic read fs/v1/hub\n\
             topic read fs/v1/rel/+\n\nuser gateway-2\n"
        );
        assert!(files.acl.starts_with(&expected), "{}", files.acl);
        assert!(!files.acl.contains("pattern") && !files.acl.contains("$SYS"));
    }

    #[test]
    fn a_large_fleet_has_room() {
        let (few, mut many) = (config(), config());
        let names = (0..12_000).map(|number| format!("d{number}").parse().unwrap());
        many.devices = names.collect();
        let conf =
            |config: &MosquittoConfig| conf(config.listen, "/etc/mosquitto", config.devices.len());
        assert!(conf(&few).contains("\nmax_connections 10000\n"));
        assert!(conf(&many).contains("\nmax_connections 24000\n"));
    }

    #[test]
    fn passwords_are_salted_hashes_in_mosquittos_form() {
        let files = rendered(&config()).unwrap();
        let lines: Vec<_> = files.passwd.lines().collect();
        assert_eq!(lines.len(), 3);
        for (line, name) in lines.iter().zip([HUB_NAME, "gateway-1", "gateway-2"]) {
            let parts: Vec<_> = line.split('$').collect();
            assert_eq!(parts[..3], [&format!("{name}:"), "7", "101"], "{line}");
            assert_eq!(STANDARD.decode(parts[3]).unwrap().len(), 12);
            assert_eq!(STANDARD.decode(parts[4]).unwrap().len(), 64);
        }
        assert_ne!(
            lines[1].rsplit('$').next(),
            lines[2].rsplit('$').next(),
            "same token, other salt"
        );
        for text in [
            &files.passwd,
            &files.conf,
            &files.acl,
            &format!("{files:?}"),
        ] {
            assert!(!text.contains("token-text") && !text.contains("secret-text"));
        }
    }

    #[test]
    fn what_mosquitto_cannot_do_is_refused() {
        let refused = |change: fn(&mut MosquittoConfig)| {
            let mut config = config();
            change(&mut config);
            rendered(&config).unwrap_err().to_string()
        };
        assert!(refused(|config| config.listen.set_port(0)).contains("port 0"));
        assert!(refused(|config| config.directory = "relative".into()).contains("relative"));
        assert!(refused(|config| config.directory = "/a\nuser root".into()).contains("directory"));
        assert!(
            refused(|config| config.devices.push(HUB_NAME.parse().unwrap())).contains(HUB_NAME)
        );
    }

    #[test]
    fn files_are_private_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("mosquitto");
        let files = rendered(&config()).unwrap();
        write(&files, &out).unwrap();
        // An interrupted run leaves its temporary file, possibly with other permissions.
        std::fs::write(out.join("passwd.new"), "half").unwrap();
        write(&files, &out).unwrap();
        assert_eq!(
            std::fs::metadata(&out).unwrap().permissions().mode() & 0o777,
            0o700
        );
        for name in ["passwd", "acl", "mosquitto.conf"] {
            let mode = std::fs::metadata(out.join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert_eq!(
            std::fs::read_to_string(out.join("passwd")).unwrap(),
            files.passwd
        );
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 3);
    }
}
