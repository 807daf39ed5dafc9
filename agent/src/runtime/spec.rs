//! The OCI runtime configuration of a container, as a pure function of what was asked for.
//!
//! Defaults are safe: few capabilities, `no_new_privs`, own namespaces, device access denied but for the
//! harmless ones, masked and read-only paths, limits always set. The seccomp filter is not in here: the
//! library ignores it there, see `workload`.
//!
//! Device access is enforced by the `devices` hierarchy on cgroup v1 and by `device_filter` on v2, from the same
//! rules. Besides, containers lack CAP_MKNOD, and all their mounts but `/dev` are `nodev`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use foreshore_protocol::manifest::{NetworkMode, Service, VolumeSource};
use foreshore_protocol::secret::SecretValue;
use serde_json::{Value, json};

use super::user::User;
use super::{ContainerId, ImageConfig};
use crate::update_lock;

/// What docker(1) gives a container without a PATH of its own.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Kept even as root: changing owners, reading what one owns, becoming another user, signals, low ports.
const CAPABILITIES: [&str; 7] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
];

/// moby `oci/defaults.go`, and what tells about the hardware's power use.
const MASKED: [&str; 14] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/system/cpu/cpu0/thermal_throttle",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/bpf",
];

/// moby `oci/defaults.go`.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Character devices every container has: null, zero, full, random, urandom, tty, ptmx, and all pseudo terminals.
/// libcontainer adds the last two by itself, but only on cgroup v1.
const DEVICES: [(u32, Option<u32>); 8] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(2)),
    (136, None),
];

/// What every container has in `/dev`, and nothing may be mounted on or below.
const NODES: [&str; 15] = [
    "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "stderr", "stdin",
    "stdout", "tty", "urandom", "zero",
];

/// Descriptors a process may have open, at first and at most; programs that loop over all of them stay fast.
const NOFILE: (u64, u64) = (1024, 65_536);

/// Made likelier victims than anything of the system when the device as a whole runs out of memory.
const OOM_SCORE_ADJ: i32 = 500;

/// Length of a CPU period in microseconds; the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;
/// The kernel refuses less.
const MIN_CPU_QUOTA_US: u64 = 1000;
/// What a container gets beside others for each CPU that it may have, as in Kubernetes, so that one with a high
/// limit cannot starve one that asks for as much as it may have.
const SHARES_OF_A_CPU: u64 = 1024;
/// What the kernel takes for `cpu.shares`.
const SHARES: (u64, u64) = (2, 262_144);

/// Size of `/dev/shm`, as Docker's, unless the container may have less memory than that.
const SHM_BYTES: u64 = 64 << 20;

/// Everything the configuration depends on.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Of the container.
    pub id: &'a ContainerId,
    /// What the user asked for.
    pub service: &'a Service,
    /// What the image says.
    pub image: &'a ImageConfig,
    /// Who it runs as.
    pub user: &'a User,
    /// Below each hierarchy, beginning with `/`.
    pub cgroup: &'a str,
    /// The app's volumes.
    pub volumes: &'a Path,
    /// Where the files of the service's configs are, named by their place in its list.
    pub configs: &'a Path,
    /// Where the directory of the container's secrets is, and where the container sees it, if it has some as files.
    pub secrets: Option<(&'a Path, &'a str)>,
    /// Variables that hold secrets: text without NUL characters.
    pub secret_environment: &'a BTreeMap<String, SecretValue>,
    /// The directory of the app's update lock, if the service sees it.
    pub update_lock: Option<&'a Path>,
    /// Whether the kernel can limit swap.
    pub swap_limit: bool,
    /// Whether the kernel has cgroup namespaces.
    pub cgroup_namespace: bool,
    /// The most descriptors that the starting process may allow; it may be unable to raise its own limit.
    pub max_nofile: u64,
    /// Files of the device that a container with the device's network sees, read-only.
    pub host_files: &'a [&'a str],
}

/// What an image or manifest asks for that cannot be given; trying again will not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Neither manifest nor image name a command.
    #[error(
        "there is no command to run: neither the service nor its image names one; set command or entrypoint"
    )]
    NoCommand,
    /// A user that the image does not have.
    #[error("the image has no user {0:?}; use one that is in its /etc/passwd, or a number")]
    UnknownUser(String),
    /// A group that the image does not have.
    #[error("the image has no group {0:?}; use one that is in its /etc/group, or a number")]
    UnknownGroup(String),
    /// An id beyond those of the app's user namespace.
    #[error("user or group {0} is beyond the {1} ids that an app has; use a smaller one")]
    IdTooLarge(u32, u32),
    /// A mount point that may not be.
    #[error(
        "{0} cannot be a mount point; use an absolute path other than /, /dev with its nodes, and anything in /proc and /sys"
    )]
    MountPoint(String),
    /// A mount point that is a link in the image, to where none may be.
    #[error("the image's {0} leads to {1}, which cannot be a mount point; use another one")]
    MountPointLeads(String, String),
    /// A working directory among the kernel's own.
    #[error("{0} cannot be the working directory; use one outside of /proc and /sys")]
    WorkingDirectory(String),
    /// A bind mount without a source.
    #[error("{0} does not exist on this device; create it or remove the bind mount")]
    MissingSource(String),
    /// A NUL byte.
    #[error("{0} holds a NUL byte, which no program can be given")]
    Nul(&'static str),
    /// An image without the program.
    #[error("the image has no command {0:?}; check command, entrypoint and PATH")]
    NoSuchCommand(String),
    /// A program that the user may not run.
    #[error("the command {0:?} is not a file that uid {1} may execute")]
    NotExecutable(String, u32),
    /// An image that cannot be a root file system.
    #[error("the image's {0} is not a directory")]
    NotADirectory(String),
}

/// The process arguments: `entrypoint` given drops the image's `Cmd`, as Compose has it.
///
/// # Errors
///
/// When there are none.
pub fn arguments(service: &Service, image: &ImageConfig) -> Result<Vec<String>, Refusal> {
    let arguments: Vec<String> = match (&service.entrypoint, &service.command) {
        (Some(entrypoint), command) => entrypoint
            .iter()
            .chain(command.iter().flatten())
            .cloned()
            .collect(),
        (None, Some(command)) => image.entrypoint.iter().chain(command).cloned().collect(),
        (None, None) => image.entrypoint.iter().chain(&image.cmd).cloned().collect(),
    };
    if arguments.first().is_none_or(String::is_empty) {
        return Err(Refusal::NoCommand);
    }
    if arguments.iter().any(|argument| argument.contains('\0')) {
        return Err(Refusal::Nul("an argument"));
    }
    Ok(arguments)
}

/// The working directory: the service's, else the image's, else `/`; always absolute.
#[must_use]
pub fn working_dir(service: &Service, image: &ImageConfig) -> PathBuf {
    let wanted = service.working_dir.as_deref().unwrap_or(&image.working_dir);
    let mut dir = PathBuf::from("/");
    for component in Path::new(wanted).components() {
        match component {
            Component::Normal(part) => dir.push(part),
            // Above the root there is only the root.
            Component::ParentDir => drop(dir.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    dir
}

/// Who the service runs as, as text to resolve.
#[must_use]
pub fn user_text<'a>(service: &'a Service, image: &'a ImageConfig) -> &'a str {
    service.user.as_deref().unwrap_or(&image.user)
}

/// The environment: the image's, then the service's over it, and PATH, HOME and HOSTNAME where neither
/// sets them.
///
/// # Errors
///
/// When a value holds a NUL byte.
pub fn environment(input: &Input<'_>) -> Result<Vec<String>, Refusal> {
    let Input {
        service,
        image,
        user,
        ..
    } = input;
    let key = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut out: Vec<String> = Vec::new();
    let mut set = |entry: String| {
        let name = key(&entry);
        out.retain(|earlier| key(earlier) != name);
        out.push(entry);
    };
    set(format!("PATH={DEFAULT_PATH}"));
    set(format!("HOME={}", user.home));
    if let Some(hostname) = hostname(input) {
        set(format!("HOSTNAME={hostname}"));
    }
    // An entry without "=" sets nothing.
    for entry in image.env.iter().filter(|entry| entry.contains('=')) {
        set(entry.clone());
    }
    for (name, value) in &service.environment {
        set(format!("{name}={value}"));
    }
    for (name, value) in input.secret_environment {
        set(format!("{name}={}", value.as_text().unwrap_or_default()));
    }
    if out.iter().any(|entry| entry.contains('\0')) {
        return Err(Refusal::Nul("an environment variable"));
    }
    Ok(out)
}

/// The container's own host name: the service's name. With the device's network it has the device's.
#[must_use]
pub fn hostname<'a>(input: &Input<'a>) -> Option<&'a str> {
    (input.service.network_mode == NetworkMode::None).then(|| input.id.service.as_str())
}

/// The directory of a named volume.
#[must_use]
pub fn volume_path(volumes: &Path, source: &VolumeSource) -> PathBuf {
    match source {
        VolumeSource::Named(name) => volumes.join(name.as_str()),
        VolumeSource::Bind(path) => PathBuf::from(path),
    }
}

/// The whole configuration (OCI runtime specification 1.0, `config.json`), with the root file system at
/// `rootfs` beside it.
///
/// # Errors
///
/// See [`Refusal`].
pub fn configuration(input: &Input<'_>) -> Result<Value, Refusal> {
    let Input {
        service,
        image,
        user,
        ..
    } = input;
    let working_dir = working_dir(service, image);
    if ["/proc", "/sys"]
        .iter()
        .any(|kernel| working_dir.starts_with(kernel))
    {
        let shown = working_dir.display().to_string();
        return Err(Refusal::WorkingDirectory(shown.chars().take(200).collect()));
    }
    let mut configuration = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": service.read_only},
        "process": {
            "terminal": false,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022},
            "args": arguments(service, image)?,
            "env": environment(input)?,
            "cwd": working_dir,
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
                "inheritable": [], "ambient": [],
            },
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": NOFILE.0.min(input.max_nofile),
                 "hard": NOFILE.1.min(input.max_nofile)},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ],
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "mounts": mounts(input)?,
        "linux": {
            "cgroupsPath": input.cgroup,
            "namespaces": namespaces(input),
            "resources": resources(input),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "rootfsPropagation": "private",
        },
    });
    if let Some(hostname) = hostname(input) {
        configuration["hostname"] = json!(hostname);
    }
    Ok(configuration)
}

fn namespaces(input: &Input<'_>) -> Vec<Value> {
    let mut types = vec!["pid", "ipc", "uts", "mount"];
    if input.service.network_mode == NetworkMode::None {
        types.push("network");
    }
    if input.cgroup_namespace {
        types.push("cgroup");
    }
    types
        .into_iter()
        .map(|name| json!({"type": name}))
        .collect()
}

fn resources(input: &Input<'_>) -> Value {
    let service = input.service;
    let memory = service.mem_limit.0;
    let quota = (u64::from(service.cpus.0) * CPU_PERIOD_US / 1000).max(MIN_CPU_QUOTA_US);
    let shares = service.cpu_shares.map_or_else(
        || (u64::from(service.cpus.0) * SHARES_OF_A_CPU / 1000).clamp(SHARES.0, SHARES.1),
        u64::from,
    );
    let mut devices = vec![json!({"allow": false, "access": "rwm"})];
    devices.extend(DEVICES.map(|(major, minor)| {
        let mut rule = json!({"allow": true, "type": "c", "major": major, "access": "rw"});
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rule
    }));
    let mut resources = json!({
        "memory": {"limit": memory},
        "cpu": {"quota": quota, "period": CPU_PERIOD_US, "shares": shares},
        "pids": {"limit": service.pids_limit},
        "devices": devices,
    });
    if input.swap_limit {
        // Memory and swap together, as in cgroup v1: no swap.
        resources["memory"]["swap"] = json!(memory);
    }
    resources
}

fn mounts(input: &Input<'_>) -> Result<Vec<Value>, Refusal> {
    let shm = SHM_BYTES.min(input.service.mem_limit.0);
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=64k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
               "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={shm}")]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
               "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
               "options": ["nosuid", "noexec", "nodev", "ro"]}),
    ];
    if let Some(directory) = input.update_lock {
        // Read-only: a lock needs no more, and nobody fills the device's memory with files.
        mounts.push(bind(directory, update_lock::TARGET, true));
    }
    if input.service.network_mode == NetworkMode::Host {
        for path in input.host_files {
            mounts.push(bind(Path::new(path), path, true));
        }
    }
    let mut own = Vec::new();
    for tmpfs in &input.service.tmpfs {
        let target = mount_point(&tmpfs.target)?;
        own.push((
            target.clone(),
            json!({"destination": target, "type": "tmpfs", "source": "tmpfs",
                   "options": ["nosuid", "nodev", "mode=1777", format!("size={}", tmpfs.size.0)]}),
        ));
    }
    for volume in &input.service.volumes {
        let target = mount_point(&volume.target)?;
        let source = volume_path(input.volumes, &volume.source);
        let mount = match volume.source {
            VolumeSource::Named(_) => bind(&source, &target, volume.read_only),
            VolumeSource::Bind(_) => recursive_bind(&source, &target, volume.read_only),
        };
        own.push((target, mount));
    }
    for (index, config) in input.service.configs.iter().enumerate() {
        let target = mount_point(&config.target)?;
        let mount = bind(&input.configs.join(index.to_string()), &target, true);
        own.push((target, mount));
    }
    if let Some((source, target)) = input.secrets {
        let target = mount_point(target)?;
        let mount = json!({"destination": target, "type": "bind", "source": source,
                           "options": ["bind", "nosuid", "nodev", "noexec", "ro"]});
        own.push((target, mount));
    }
    // A mount inside another one must come after it.
    own.sort_by(|a, b| a.0.cmp(&b.0));
    mounts.extend(own.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

fn bind(source: &Path, target: &str, read_only: bool) -> Value {
    let mut options = vec!["bind", "nosuid", "nodev"];
    options.push(if read_only { "ro" } else { "rw" });
    json!({"destination": target, "type": "bind", "source": source, "options": options})
}

/// With what is mounted below the source, and the same restrictions on all of it.
fn recursive_bind(source: &Path, target: &str, read_only: bool) -> Value {
    let mut options = vec!["rbind", "rnosuid", "rnodev"];
    options.push(if read_only { "rro" } else { "rw" });
    json!({"destination": target, "type": "bind", "source": source, "options": options})
}

/// Normalizes a mount point, refusing those that would undo the container's confinement.
///
/// # Errors
///
/// [`Refusal::MountPoint`].
pub fn mount_point(text: &str) -> Result<String, Refusal> {
    let refused = || Refusal::MountPoint(text.chars().take(200).collect());
    let mut parts = Vec::new();
    for component in Path::new(text).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str().ok_or_else(refused)?),
            Component::ParentDir | Component::Prefix(_) => return Err(refused()),
        }
    }
    let confined = match parts.as_slice() {
        [] | ["dev" | "proc" | "sys"] => true,
        ["dev", name, ..] => NODES.contains(name),
        [first, ..] => matches!(*first, "proc" | "sys"),
    };
    if confined || !text.starts_with('/') || text.contains('\0') {
        return Err(refused());
    }
    Ok(format!("/{}", parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(more: Value) -> Service {
        let mut value = json!({"image": "x"});
        let (Value::Object(into), Value::Object(from)) = (&mut value, more) else {
            panic!("objects")
        };
        into.extend(from);
        serde_json::from_value(value).unwrap()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".to_owned()],
            cmd: vec!["by".to_owned(), "default".to_owned()],
            env: vec![
                "A=image".to_owned(),
                "B=image".to_owned(),
                "nonsense".to_owned(),
            ],
            user: String::new(),
            working_dir: "/image".to_owned(),
        }
    }

    fn configured(service: &Service, image: &ImageConfig) -> Result<Value, Refusal> {
        configuration(&Input {
            id: &"shop.web.7".parse().unwrap(),
            service,
            image,
            user: &User {
                uid: 5,
                gid: 6,
                groups: vec![7],
                home: "/home/x".to_owned(),
            },
            cgroup: "/parent/shop.web.7",
            update_lock: None,
            volumes: Path::new("/state/volumes/shop"),
            configs: Path::new("/files"),
            secrets: None,
            secret_environment: &BTreeMap::new(),
            swap_limit: true,
            cgroup_namespace: true,
            max_nofile: 4096,
            host_files: &["/etc/hosts"],
        })
    }

    #[test]
    fn arguments_follow_compose() {
        for (service_part, expected) in [
            (json!({}), vec!["/entry", "by", "default"]),
            (json!({"command": ["own"]}), vec!["/entry", "own"]),
            (json!({"command": []}), vec!["/entry"]),
            (json!({"entrypoint": ["/mine"]}), vec!["/mine"]),
            (
                json!({"entrypoint": ["/mine"], "command": ["own"]}),
                vec!["/mine", "own"],
            ),
            (json!({"entrypoint": [], "command": ["own"]}), vec!["own"]),
        ] {
            assert_eq!(
                arguments(&service(service_part.clone()), &image()).unwrap(),
                expected,
                "{service_part}"
            );
        }
        let none = ImageConfig::default();
        for service_part in [
            json!({}),
            json!({"entrypoint": []}),
            json!({"command": [""]}),
        ] {
            assert_eq!(
                arguments(&service(service_part), &none),
                Err(Refusal::NoCommand)
            );
        }
        let nul = service(json!({"command": ["a\0b"]}));
        assert_eq!(arguments(&nul, &none), Err(Refusal::Nul("an argument")));
    }

    #[test]
    fn the_service_wins_over_the_image_and_the_image_over_defaults() {
        let wanted = service(
            json!({"environment": {"B": "service", "HOME": "/elsewhere"}, "working_dir": "relative"}),
        );
        let configuration = configured(&wanted, &image()).unwrap();
        let environment: Vec<&str> = configuration["process"]["env"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let path = format!("PATH={DEFAULT_PATH}");
        assert_eq!(
            environment,
            [
                &path,
                "HOSTNAME=web",
                "A=image",
                "B=service",
                "HOME=/elsewhere"
            ]
        );
        assert_eq!(configuration["process"]["cwd"], "/relative");
        let plain = configured(
            &service(json!({})),
            &ImageConfig {
                env: vec!["PATH=/own".to_owned()],
                ..image()
            },
        );
        let plain = plain.unwrap();
        assert_eq!(plain["process"]["cwd"], "/image");
        assert_eq!(
            plain["process"]["env"],
            json!(["HOME=/home/x", "HOSTNAME=web", "PATH=/own"])
        );
    }

    #[test]
    fn a_working_directory_stays_out_of_the_kernels_own() {
        for (wanted, is) in [
            ("a/b", "/a/b"),
            ("/a/../../c/.", "/c"),
            ("", "/"),
            ("..", "/"),
        ] {
            let image = ImageConfig {
                working_dir: wanted.to_owned(),
                ..image()
            };
            assert_eq!(working_dir(&service(json!({})), &image), Path::new(is));
        }
        for wanted in ["/proc", "/proc/self/fd/7", "/x/../proc/self", "/sys/fs"] {
            let image = ImageConfig {
                working_dir: wanted.to_owned(),
                ..image()
            };
            assert!(matches!(
                configured(&service(json!({})), &image),
                Err(Refusal::WorkingDirectory(_))
            ));
        }
    }

    #[test]
    fn limits_are_always_there() {
        let configuration = configured(
            &service(json!({"mem_limit": "32m", "cpus": "0.25", "pids_limit": 9})),
            &image(),
        )
        .unwrap();
        let resources = &configuration["linux"]["resources"];
        assert_eq!(
            resources["memory"],
            json!({"limit": 32 << 20, "swap": 32 << 20})
        );
        assert_eq!(
            resources["cpu"],
            json!({"quota": 25_000, "period": 100_000, "shares": 256})
        );
        assert_eq!(resources["pids"], json!({"limit": 9}));
        assert_eq!(
            resources["devices"][0],
            json!({"allow": false, "access": "rwm"})
        );
        // The kernel refuses a quota below a millisecond.
        let least = configured(&service(json!({"cpus": "0.001"})), &image()).unwrap();
        assert_eq!(least["linux"]["resources"]["cpu"]["quota"], 1000);
        // And a limit above the process's own.
        assert_eq!(configuration["process"]["rlimits"][0]["hard"], 4096);
    }

    #[test]
    fn the_devices_network_brings_its_name_and_files() {
        let own = configured(&service(json!({})), &image()).unwrap();
        let host = configured(&service(json!({"network_mode": "host"})), &image()).unwrap();
        let types = |configuration: &Value| configuration["linux"]["namespaces"].to_string();
        let destinations = |configuration: &Value| configuration["mounts"].to_string();
        assert!(types(&own).contains("network") && !types(&host).contains("network"));
        assert!(
            !destinations(&own).contains("/etc/hosts")
                && destinations(&host).contains("/etc/hosts")
        );
        assert_eq!(
            (&own["hostname"], &host["hostname"]),
            (&json!("web"), &Value::Null)
        );
    }

    #[test]
    fn mounts_are_ordered_and_restricted() {
        let wanted = service(json!({
            "tmpfs": ["/data/inner/deep:size=1m"],
            "volumes": ["named:/data/inner", "/srv:/data:ro"],
        }));
        let configuration = configured(&wanted, &image()).unwrap();
        let mounts = configuration["mounts"].as_array().unwrap();
        let own = &mounts[mounts.len() - 3..];
        assert_eq!(own[0]["destination"], "/data");
        assert_eq!(
            own[0]["options"],
            json!(["rbind", "rnosuid", "rnodev", "rro"])
        );
        assert_eq!(own[1]["source"], "/state/volumes/shop/named");
        assert_eq!(own[1]["options"], json!(["bind", "nosuid", "nodev", "rw"]));
        assert_eq!(own[2]["destination"], "/data/inner/deep");
    }

    #[test]
    fn mount_points_cannot_undo_the_confinement() {
        for good in ["/data", "/dev/shm", "//data/./x/", "/procedure", "/var/sys"] {
            assert!(mount_point(good).is_ok(), "{good}");
        }
        assert_eq!(mount_point("//data/./x/").unwrap(), "/data/x");
        for bad in [
            "/",
            "",
            "data",
            "/dev",
            "/dev/",
            "/proc",
            "/proc/self",
            "/sys/fs/cgroup",
            "/a/../proc",
            "/./proc",
            "/a\0b",
            "/dev/null",
            "/dev/pts/x",
            "/dev/ptmx",
        ] {
            assert!(mount_point(bad).is_err(), "{bad}");
        }
    }
}
