//! What the types of a manifest cannot say: ranges, combinations and the syntax of strings.
//!
//! The service checks also guard a [`crate::release::Release`] that comes from the network: a device runs
//! nothing that did not pass them. Devices check again what they have on disk, so a later version may loosen
//! these rules but never tighten them: it would take a running release away.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use super::{
    App, Condition, Kind, Logging, Probe, ProbeAction, RestartPolicy, SECRETS_DIR, Service,
    UpdateConfig, UpdateOrder, VolumeSource, pull_secret,
};
use crate::Digest;
use crate::id::ServiceName;
use crate::quantity::{Bytes, Cpus, Span};
use crate::release::{MAX_RELEASE_BYTES, Release};

mod blkio;
mod rollout;

pub(super) use rollout::selector;

/// Services of one app.
pub const MAX_SERVICES: usize = 32;
/// Waves of one rollout.
pub const MAX_WAVES: usize = 32;
/// Volumes and tmpfs of one service.
const MAX_MOUNTS: usize = 64;
/// Configs of one app, and of one service.
const MAX_CONFIGS: usize = 32;
/// Secrets of one app, and of one service.
const MAX_SECRETS: usize = 32;
/// Device nodes of one service.
const MAX_DEVICES: usize = 32;
/// What is in every container's `/dev`, and what the starting of one needs there.
const OWN_NODES: [&str; 24] = [
    "c", "console", "core", "fd", "full", "l", "layer", "log", "m", "mqueue", "null", "ptmx",
    "pts", "random", "rootfs", "s", "shm", "stderr", "stdin", "stdout", "sys", "tty", "urandom",
    "zero",
];
/// Linux `PATH_MAX` without its NUL (limits.h).
const MAX_PATH_BYTES: usize = 4095;
/// Host and repository (255), tag (128) and digest (71) with what joins them.
const MAX_IMAGE_BYTES: usize = 255 + 1 + 128 + 1 + 71;
/// A container with less does not start reliably: the runtime itself needs about 2 MiB.
const MIN_MEM_LIMIT: Bytes = Bytes(4 << 20);
/// The kernel's smallest quota is 1 ms of a 100 ms period (`cfs_quota_us`).
const MIN_CPUS: Cpus = Cpus(10);
const MAX_PIDS: u32 = 32_768;
/// The kernel's own range of `cpu.shares`.
const CPU_SHARES: std::ops::RangeInclusive<u32> = 2..=262_144;
const MIN_LAYER_SIZE: Bytes = Bytes(1 << 20);
const MAX_PRIORITY: u8 = 100;
/// Hooks of one service at one occasion.
const MAX_HOOKS: usize = 8;
const MAX_STOP_GRACE_PERIOD: Span = Span::from_secs(3600);
const MAX_KEEP_OLD: Span = Span::from_secs(24 * 3600);
const MIN_PROBE_PERIOD: Span = Span(100);
const MAX_PROBE_TIMEOUT: Span = Span::from_secs(300);
const MAX_PROBE_THRESHOLD: u32 = 1000;
const MAX_HTTP_PATH_BYTES: usize = 1024;
const MIN_TMPFS: Bytes = Bytes(4 << 10);
const MIN_LOG_SIZE: Bytes = Bytes(4 << 10);
const MAX_LOG_SIZE: Bytes = Bytes(1 << 30);
const MAX_LOG_FILES: u32 = 100;

/// A value that is well-formed and still cannot mean anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct Violation {
    /// Where, for example `spec.services.web.mem_limit`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

pub(crate) type Checked = Result<(), Violation>;

fn refuse(path: impl Display, message: impl Into<String>) -> Checked {
    Err(Violation {
        path: path.to_string(),
        message: message.into(),
    })
}

pub(crate) fn ensure(holds: bool, path: impl Display, message: impl FnOnce() -> String) -> Checked {
    if holds {
        Ok(())
    } else {
        refuse(path, message())
    }
}

/// Every rule of the manifest.
pub(super) fn app(app: &App) -> Checked {
    let spec = &app.spec;
    is_kind(app.kind, Kind::App)?;
    selector("spec.selector", &spec.selector)?;
    services("spec.services", spec.services.len())?;
    for (name, service) in &spec.services {
        let path = format!("spec.services.{name}");
        self::service(&path, service)?;
        substitutions(&path, service)?;
        in_time(&path, service, spec.rollout.progress_deadline)?;
    }
    dependencies("spec.services", &spec.services)?;
    configs(app)?;
    secrets(app)?;
    pull_secret::check("spec.imagePullSecrets", &spec.image_pull_secrets)?;
    rollout::policy("spec.rollout", &spec.rollout)?;
    size(app)
}

/// A manifest that was sent where another kind belongs.
pub(super) fn is_kind(found: Kind, expected: Kind) -> Checked {
    ensure(found == expected, "kind", || {
        format!("{found:?} is not what belongs here; write {expected:?}")
    })
}

/// What the services of one app say about each other: whoever is depended on exists, can come to hold what is
/// asked of it, and nobody waits for itself.
pub(crate) fn dependencies(path: &str, services: &BTreeMap<ServiceName, Service>) -> Checked {
    for (name, service) in services {
        for (other, dependency) in &service.depends_on {
            let path = format!("{path}.{name}.depends_on.{other}");
            let Some(other_service) = services.get(other) else {
                let known: Vec<_> = services.keys().map(ServiceName::as_str).collect();
                return refuse(
                    path,
                    format!(
                        "there is no service {other}; the app has {}",
                        known.join(", ")
                    ),
                );
            };
            match dependency.condition {
                Condition::Healthy if other_service.probes.readiness.is_none() => refuse(
                    path,
                    format!(
                        "service {other} has no readiness probe to be healthy by; give it one under `probes`, or use \
                         condition service_started"
                    ),
                )?,
                Condition::Completed if other_service.restart == RestartPolicy::Always => refuse(
                    path,
                    format!(
                        "service {other} is restarted whenever it ends, so it never completes; give it restart \"no\" \
                         or on-failure"
                    ),
                )?,
                Condition::Started | Condition::Healthy | Condition::Completed => {}
            }
        }
    }
    match cycle(services) {
        Some(names) => refuse(
            format_args!("{path}.{}.depends_on", names[0]),
            format!("services wait for each other: {}", names.join(" → ")),
        ),
        None => Ok(()),
    }
}

/// Services that wait for each other, the first of them again at the end.
fn cycle(services: &BTreeMap<ServiceName, Service>) -> Option<Vec<&str>> {
    let mut open: BTreeSet<&ServiceName> = services.keys().collect();
    loop {
        let before = open.len();
        let waits = |name: &ServiceName| {
            services[name]
                .depends_on
                .keys()
                .any(|other| open.contains(other))
        };
        let still: BTreeSet<_> = open.iter().copied().filter(|name| waits(name)).collect();
        open = still;
        if open.len() == before {
            break;
        }
    }
    // Everyone left waits for someone left: whoever follows that comes back to where they were.
    let mut walk = vec![*open.first()?];
    loop {
        let next = services[*walk.last()?]
            .depends_on
            .keys()
            .find_map(|other| open.get(other))?;
        if let Some(begin) = walk.iter().position(|name| name == next) {
            walk.push(next);
            return Some(walk[begin..].iter().map(|name| name.as_str()).collect());
        }
        walk.push(next);
    }
}

/// 1 to [`MAX_SERVICES`].
pub(crate) fn services(path: &str, count: usize) -> Checked {
    ensure((1..=MAX_SERVICES).contains(&count), path, || {
        format!("an app has 1 to {MAX_SERVICES} services, not {count}")
    })
}

/// Every rule of one service, wherever it came from.
pub(crate) fn service(path: &str, service: &Service) -> Checked {
    image(&format!("{path}.image"), &service.image)?;
    arguments(&format!("{path}.entrypoint"), service.entrypoint.as_deref())?;
    arguments(&format!("{path}.command"), service.command.as_deref())?;
    environment(path, service)?;
    if let Some(text) = &service.user {
        user(&format!("{path}.user"), text)?;
    }
    if let Some(dir) = &service.working_dir {
        ensure(is_path(dir), format_args!("{path}.working_dir"), || {
            "must be an absolute path without . and .., for example /srv".to_owned()
        })?;
    }
    mounts(path, service)?;
    devices(path, service)?;
    config_mounts(path, service)?;
    secret_mounts(path, service)?;
    limits(path, service)?;
    blkio::check(&format!("{path}.blkio_config"), &service.blkio_config)?;
    for (name, probe) in service.probes.each() {
        let path = format!("{path}.probes.{name}");
        self::probe(&path, probe)?;
        ensure(
            name == "readiness" || probe.success_threshold == 1,
            format_args!("{path}.success_threshold"),
            || format!("must be 1 for a {name} probe"),
        )?;
    }
    ensure(
        service.pre_stop.len() <= MAX_HOOKS,
        format_args!("{path}.pre_stop"),
        || format!("at most {MAX_HOOKS} hooks are allowed"),
    )?;
    for (index, hook) in service.pre_stop.iter().enumerate() {
        let path = format!("{path}.pre_stop[{index}].command");
        arguments(&path, Some(&hook.command))?;
    }
    update_config(
        &format!("{path}.deploy.update_config"),
        service.deploy.update_config,
    )?;
    logging(&format!("{path}.logging"), service.logging)
}

fn update_config(path: &str, config: UpdateConfig) -> Checked {
    let Some(keep) = config.keep_old else {
        return Ok(());
    };
    let path = format!("{path}.keep_old");
    ensure(keep > Span(0) && keep <= MAX_KEEP_OLD, &path, || {
        format!("must be above 0 and at most {MAX_KEEP_OLD}, not {keep}")
    })?;
    ensure(config.order == UpdateOrder::StartFirst, &path, || {
        "needs `order: start-first`: otherwise the old container is stopped before the new one is started".to_owned()
    })
}

fn limits(path: &str, service: &Service) -> Checked {
    ensure(
        service.mem_limit >= MIN_MEM_LIMIT,
        format_args!("{path}.mem_limit"),
        || {
            format!(
                "must be at least {MIN_MEM_LIMIT}, not {}",
                service.mem_limit
            )
        },
    )?;
    ensure(
        service.cpus >= MIN_CPUS,
        format_args!("{path}.cpus"),
        || format!("must be at least {MIN_CPUS}, not {}", service.cpus),
    )?;
    ensure(
        (1..=MAX_PIDS).contains(&service.pids_limit),
        format_args!("{path}.pids_limit"),
        || format!("must be 1 to {MAX_PIDS}, not {}", service.pids_limit),
    )?;
    if let Some(shares) = service.cpu_shares {
        ensure(
            CPU_SHARES.contains(&shares),
            format_args!("{path}.cpu_shares"),
            || {
                let (low, high) = (CPU_SHARES.start(), CPU_SHARES.end());
                format!("must be {low} to {high}, not {shares}")
            },
        )?;
    }
    if let Some(option) = service.storage_opt {
        let path = format!("{path}.storage_opt");
        ensure(!service.read_only, &path, || {
            "is of use with `read_only: false` only: nothing can be written to a read-only root"
                .to_owned()
        })?;
        ensure(
            option.size >= MIN_LAYER_SIZE,
            format_args!("{path}.size"),
            || format!("must be at least {MIN_LAYER_SIZE}, not {}", option.size),
        )?;
    }
    ensure(
        service.priority <= MAX_PRIORITY,
        format_args!("{path}.priority"),
        || format!("must be 0 to {MAX_PRIORITY}, not {}", service.priority),
    )?;
    ensure(
        service.stop_grace_period <= MAX_STOP_GRACE_PERIOD,
        format_args!("{path}.stop_grace_period"),
        || {
            format!(
                "must be at most {MAX_STOP_GRACE_PERIOD}, not {}",
                service.stop_grace_period
            )
        },
    )
}

/// The syntax of distribution/reference as far as it can be told without knowing registries: the hub's
/// resolver and the device's image client read it again, strictly.
fn image(path: &str, text: &str) -> Checked {
    const EXAMPLE: &str = "write HOST/REPOSITORY:TAG, for example ghcr.io/acme/modbus:1.4";
    ensure(!text.is_empty(), path, || format!("is empty; {EXAMPLE}"))?;
    ensure(text.len() <= MAX_IMAGE_BYTES, path, || {
        format!("is longer than {MAX_IMAGE_BYTES} bytes; {EXAMPLE}")
    })?;
    ensure(!text.contains("${"), path, || {
        "substitution (`${`) is not built yet; write the value out".to_owned()
    })?;
    ensure(is_reference(text), path, || {
        format!("{text:?} is not an image reference; {EXAMPLE}")
    })
}

/// The digest that an image reference is pinned by.
pub(crate) fn pinned(image: &str) -> Option<Digest> {
    image
        .split_once('@')
        .and_then(|(_, digest)| digest.parse().ok())
}

fn is_reference(text: &str) -> bool {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    if digest.is_some_and(|digest| digest.parse::<Digest>().is_err()) {
        return false;
    }
    // A colon after the last slash starts the tag; one before it is a port.
    let (name, tag) = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (name, None),
    };
    if !tag.is_none_or(is_tag) {
        return false;
    }
    let (host, repository) = match name.split_once('/') {
        Some((first, rest)) if looks_like_host(first) => (Some(first), rest),
        _ => (None, name),
    };
    host.is_none_or(is_host) && repository.split('/').all(is_repository_part)
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag
            .bytes()
            .all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn looks_like_host(part: &str) -> bool {
    part == "localhost"
        || part
            .bytes()
            .any(|byte| matches!(byte, b'.' | b':') || byte.is_ascii_uppercase())
}

fn is_host(host: &str) -> bool {
    let name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let (host, port) = match host.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (host, None),
    };
    let known = match host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(name),
    };
    known && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn is_repository_part(part: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    part.bytes().next().is_some_and(plain)
        && part.bytes().next_back().is_some_and(plain)
        && part
            .bytes()
            .all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
}

fn arguments(path: &str, arguments: Option<&[String]>) -> Checked {
    let Some(arguments) = arguments else {
        return Ok(());
    };
    ensure(
        arguments.first().is_some_and(|program| !program.is_empty()),
        path,
        || "must name a program, or be left out".to_owned(),
    )?;
    match arguments
        .iter()
        .position(|argument| argument.contains('\0'))
    {
        Some(index) => refuse(
            format_args!("{path}[{index}]"),
            "must not hold a NUL character",
        ),
        None => Ok(()),
    }
}

fn environment(path: &str, service: &Service) -> Checked {
    for (key, value) in &service.environment {
        let path = format!("{path}.environment");
        ensure(!key.is_empty(), &path, || {
            "a variable has an empty name".to_owned()
        })?;
        ensure(!key.contains(['=', '\0']), &path, || {
            format!("variable name {key:?} must not hold '=' or a NUL character")
        })?;
        ensure(!value.contains('\0'), format_args!("{path}.{key}"), || {
            "must not hold a NUL character".to_owned()
        })?;
    }
    Ok(())
}

/// `user`, `uid`, `user:group`, `uid:gid` and mixtures (OCI image configuration, `User`).
fn user(path: &str, text: &str) -> Checked {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    ensure(is_user(user) && group.is_none_or(is_user), path, || {
        let text: String = text.chars().take(80).collect();
        format!(
            "{text:?} is not a user; write a name or number, or user:group, for example \"1000:1000\""
        )
    })
}

/// A number that the kernel has as an id, or a portable name (useradd(8)).
fn is_user(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        // The last one, (uid_t) -1, means "no change" to setuid(2) and its kin.
        return text.parse::<u32>().is_ok_and(|id| id < u32::MAX);
    }
    text.len() <= 64
        && text.bytes().next().is_some_and(word)
        && text
            .bytes()
            .all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn mounts(path: &str, service: &Service) -> Checked {
    let mut targets = BTreeSet::new();
    for (index, tmpfs) in service.tmpfs.iter().enumerate() {
        let path = format!("{path}.tmpfs[{index}]");
        target(&path, &tmpfs.target)?;
        ensure(tmpfs.size >= MIN_TMPFS, &path, || {
            format!("size must be at least {MIN_TMPFS}, not {}", tmpfs.size)
        })?;
        once(&path, &mut targets, &tmpfs.target)?;
    }
    for (index, volume) in service.volumes.iter().enumerate() {
        let path = format!("{path}.volumes[{index}]");
        target(&path, &volume.target)?;
        if let VolumeSource::Bind(source) = &volume.source {
            ensure(is_path(source), &path, || {
                format!("{source:?} must be an absolute path on the device without . and ..")
            })?;
        }
        once(&path, &mut targets, &volume.target)?;
    }
    ensure(
        targets.len() <= MAX_MOUNTS,
        format_args!("{path}.volumes"),
        || format!("at most {MAX_MOUNTS} volumes and tmpfs are allowed"),
    )
}

fn once<'a>(path: &str, targets: &mut BTreeSet<&'a str>, target: &'a str) -> Checked {
    ensure(targets.insert(target), path, || {
        format!("{target} is mounted twice; keep one")
    })
}

fn target(path: &str, target: &str) -> Checked {
    ensure(is_path(target) && target != "/", path, || {
        format!(
            "{target:?} must be an absolute path below / without . and .., for example /var/lib/app"
        )
    })?;
    let reserved = ["/proc", "/sys", "/dev"].into_iter().find(|top| {
        target
            .strip_prefix(top)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    match reserved {
        Some(top) => refuse(
            path,
            format!("{target} is in {top}, which the runtime fills; choose another place"),
        ),
        None => Ok(()),
    }
}

fn devices(path: &str, service: &Service) -> Checked {
    ensure(
        service.devices.len() <= MAX_DEVICES,
        format_args!("{path}.devices"),
        || format!("at most {MAX_DEVICES} devices are allowed"),
    )?;
    let mut targets: BTreeSet<&str> = BTreeSet::new();
    for (index, device) in service.devices.iter().enumerate() {
        let path = format!("{path}.devices[{index}]");
        for text in [&device.source, &device.target] {
            let node = text.strip_prefix("/dev/").filter(|_| is_path(text));
            let Some(node) = node else {
                return refuse(
                    path,
                    format!(
                        "{text:?} must be a path below /dev without . and .., for example /dev/ttyUSB0"
                    ),
                );
            };
            let first = node.split('/').next().unwrap_or_default();
            ensure(!OWN_NODES.contains(&first), &path, || {
                format!("{text} is in every container or has no meaning in one; remove it")
            })?;
            ensure(!text.contains(['*', '?', '[']), &path, || {
                format!("{text} must name one node; patterns are for the device's policy file")
            })?;
        }
        let target = device.target.as_str();
        let inside = |other: &str| {
            let below =
                |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
            below(target, other) || below(other, target)
        };
        ensure(!targets.iter().any(|other| inside(other)), &path, || {
            format!("{target} and another device are inside each other")
        })?;
        ensure(targets.insert(target), &path, || {
            format!("{target} is given twice; keep one")
        })?;
    }
    Ok(())
}

fn config_mounts(path: &str, service: &Service) -> Checked {
    ensure(
        service.configs.len() <= MAX_CONFIGS,
        format_args!("{path}.configs"),
        || format!("at most {MAX_CONFIGS} configs are allowed"),
    )?;
    let volumes = service.volumes.iter().map(|volume| volume.target.as_str());
    let tmpfs = service.tmpfs.iter().map(|tmpfs| tmpfs.target.as_str());
    let mut targets: BTreeSet<&str> = volumes.chain(tmpfs).collect();
    for (index, config) in service.configs.iter().enumerate() {
        let path = format!("{path}.configs[{index}]");
        target(&path, &config.target)?;
        once(&path, &mut targets, &config.target)?;
    }
    Ok(())
}

/// Every config that a service names exists, every config is named, and their texts are where they belong.
fn configs(app: &App) -> Checked {
    let spec = &app.spec;
    ensure(spec.configs.len() <= MAX_CONFIGS, "spec.configs", || {
        format!("at most {MAX_CONFIGS} configs are allowed")
    })?;
    for (name, service) in &spec.services {
        for (index, mount) in service.configs.iter().enumerate() {
            let path = format!("spec.services.{name}.configs[{index}]");
            ensure(
                mount.content.is_none(),
                format_args!("{path}.content"),
                || format!("belongs under spec.configs.{}", mount.source),
            )?;
            ensure(spec.configs.contains_key(&mount.source), &path, || {
                format!(
                    "there is no config {0}; write its text under spec.configs.{0}.content",
                    mount.source
                )
            })?;
        }
    }
    for (name, file) in &spec.configs {
        let path = format!("spec.configs.{name}");
        no_substitution(&format!("{path}.content"), &file.content)?;
        let mut mounts = spec.services.values().flat_map(|service| &service.configs);
        ensure(mounts.any(|mount| mount.source == *name), path, || {
            format!("no service has it; add configs: [{name}] to one, or remove it")
        })?;
    }
    Ok(())
}

fn secret_mounts(path: &str, service: &Service) -> Checked {
    ensure(
        service.secrets.len() <= MAX_SECRETS,
        format_args!("{path}.secrets"),
        || format!("at most {MAX_SECRETS} secrets are allowed"),
    )?;
    let (mut files, mut variables) = (BTreeSet::new(), BTreeSet::new());
    for (index, secret) in service.secrets.iter().enumerate() {
        let path = format!("{path}.secrets[{index}]");
        if let Some(file) = &secret.target {
            // What begins with a dot is the agent's own.
            let plain = !file.is_empty()
                && file.len() <= 255
                && !file.starts_with('.')
                && !file.contains('/')
                && !file.chars().any(char::is_control);
            ensure(plain, format_args!("{path}.target"), || {
                format!(
                    "{file:?} must be the name of a file in {SECRETS_DIR} that does not begin with a dot; link to it from \
                     elsewhere"
                )
            })?;
            ensure(files.insert(file), format_args!("{path}.target"), || {
                format!("{SECRETS_DIR}/{file} is given twice; keep one")
            })?;
        }
        if let Some(variable) = &secret.environment {
            let path = format!("{path}.environment");
            let named = !variable.is_empty() && !variable.contains(['=', '\0']);
            ensure(named, &path, || {
                format!("{variable:?} must be the name of a variable, without '=' and NUL")
            })?;
            let once = variables.insert(variable) && !service.environment.contains_key(variable);
            ensure(once, &path, || {
                format!("variable {variable} is given twice; keep one")
            })?;
        }
    }
    let volumes = service.volumes.iter().map(|volume| &volume.target);
    let tmpfs = service.tmpfs.iter().map(|tmpfs| &tmpfs.target);
    let configs = service.configs.iter().map(|config| &config.target);
    let inside = |target: &&String| {
        let rest = target.strip_prefix(SECRETS_DIR);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let taken = volumes.chain(tmpfs).chain(configs).find(inside);
    match taken.filter(|_| !files.is_empty()) {
        Some(target) => refuse(
            format_args!("{path}.secrets"),
            format!(
                "{target} is mounted where the secrets are ({SECRETS_DIR}); choose another place"
            ),
        ),
        None => Ok(()),
    }
}

/// Every secret that a service names is one of the app's, and every one of the app's is named.
fn secrets(app: &App) -> Checked {
    let spec = &app.spec;
    ensure(spec.secrets.len() <= MAX_SECRETS, "spec.secrets", || {
        format!("at most {MAX_SECRETS} secrets are allowed")
    })?;
    for (name, service) in &spec.services {
        for (index, mount) in service.secrets.iter().enumerate() {
            let path = format!("spec.services.{name}.secrets[{index}]");
            ensure(spec.secrets.contains_key(&mount.source), path, || {
                format!(
                    "the app has no secret {0}; write {0}: {{external: true}} under spec.secrets",
                    mount.source
                )
            })?;
        }
    }
    for (name, source) in &spec.secrets {
        let path = format!("spec.secrets.{name}");
        ensure(source.external, format_args!("{path}.external"), || {
            format!("must be true: the value is set with `foreshore secret set {name}`")
        })?;
        let mut mounts = spec.services.values().flat_map(|service| &service.secrets);
        ensure(mounts.any(|mount| mount.source == *name), path, || {
            format!("no service has it; add secrets: [{name}] to one, or remove it")
        })?;
    }
    Ok(())
}

/// Absolute and normal: no empty part, no `.` or `..`, no control characters.
fn is_path(path: &str) -> bool {
    path.len() <= MAX_PATH_BYTES
        && !path.chars().any(char::is_control)
        && (path == "/"
            || path.strip_prefix('/').is_some_and(|rest| {
                rest.split('/')
                    .all(|part| !matches!(part, "" | "." | "..") && part.len() <= 255)
            }))
}

fn probe(path: &str, probe: &Probe) -> Checked {
    match probe.action() {
        None => refuse(path, "must have exactly one of http, tcp and exec")?,
        Some(ProbeAction::Http(http)) => {
            port(&format!("{path}.http.port"), http.port)?;
            let plain = http.path.bytes().all(|byte| byte.is_ascii_graphic());
            ensure(
                http.path.starts_with('/') && plain && http.path.len() <= MAX_HTTP_PATH_BYTES,
                format_args!("{path}.http.path"),
                || {
                    format!(
                        "must begin with / and hold at most {MAX_HTTP_PATH_BYTES} visible ASCII characters; \
                         escape others as %XX"
                    )
                },
            )?;
        }
        Some(ProbeAction::Tcp(tcp)) => port(&format!("{path}.tcp.port"), tcp.port)?,
        Some(ProbeAction::Exec(exec)) => {
            arguments(&format!("{path}.exec.command"), Some(&exec.command))?;
        }
    }
    ensure(
        probe.period >= MIN_PROBE_PERIOD,
        format_args!("{path}.period"),
        || format!("must be at least {MIN_PROBE_PERIOD}, not {}", probe.period),
    )?;
    ensure(
        probe.timeout > Span(0) && probe.timeout <= MAX_PROBE_TIMEOUT,
        format_args!("{path}.timeout"),
        || {
            format!(
                "must be above 0 and at most {MAX_PROBE_TIMEOUT}, not {}",
                probe.timeout
            )
        },
    )?;
    for (name, threshold) in [
        ("success_threshold", probe.success_threshold),
        ("failure_threshold", probe.failure_threshold),
    ] {
        ensure(
            (1..=MAX_PROBE_THRESHOLD).contains(&threshold),
            format_args!("{path}.{name}"),
            || format!("must be 1 to {MAX_PROBE_THRESHOLD}, not {threshold}"),
        )?;
    }
    Ok(())
}

fn port(path: &str, port: u16) -> Checked {
    ensure(port != 0, path, || "must be 1 to 65535, not 0".to_owned())
}

fn logging(path: &str, logging: Logging) -> Checked {
    ensure(
        (MIN_LOG_SIZE..=MAX_LOG_SIZE).contains(&logging.max_size),
        format_args!("{path}.max_size"),
        || {
            format!(
                "must be {MIN_LOG_SIZE} to {MAX_LOG_SIZE}, not {}",
                logging.max_size
            )
        },
    )?;
    ensure(
        (1..=MAX_LOG_FILES).contains(&logging.max_file),
        format_args!("{path}.max_file"),
        || format!("must be 1 to {MAX_LOG_FILES}, not {}", logging.max_file),
    )
}

/// `${…}` will mean something one day; until then it must not silently mean itself.
fn substitutions(path: &str, service: &Service) -> Checked {
    let lists = [
        ("entrypoint", &service.entrypoint),
        ("command", &service.command),
    ];
    for (name, list) in lists {
        for (index, text) in list.iter().flatten().enumerate() {
            no_substitution(&format!("{path}.{name}[{index}]"), text)?;
        }
    }
    for (key, text) in &service.environment {
        no_substitution(&format!("{path}.environment.{key}"), text)?;
    }
    for (name, probe) in service.probes.each() {
        for (index, text) in probe.exec.iter().flat_map(|exec| &exec.command).enumerate() {
            no_substitution(&format!("{path}.probes.{name}.exec.command[{index}]"), text)?;
        }
    }
    for (hook, text) in service
        .pre_stop
        .iter()
        .enumerate()
        .flat_map(|(index, hook)| hook.command.iter().map(move |text| (index, text)))
    {
        no_substitution(&format!("{path}.pre_stop[{hook}].command"), text)?;
    }
    Ok(())
}

fn no_substitution(path: &str, text: &str) -> Checked {
    let bare = text
        .match_indices("${")
        .any(|(at, _)| !text[..at].ends_with('$'));
    ensure(!bare, path, || {
        "substitution (`${…}`) is not built yet; write the value out, or `$${` for the characters `${`".to_owned()
    })
}

/// A probe that cannot pass before the deadline would fail every rollout.
fn in_time(path: &str, service: &Service, deadline: Span) -> Checked {
    if service.probes.startup.is_none() && service.probes.readiness.is_none() {
        return Ok(());
    }
    let earliest = |probe: &Option<Probe>| {
        probe.as_ref().map_or(0, |probe| {
            let more = u64::from(probe.success_threshold.saturating_sub(1));
            let waits = probe.period.millis().saturating_mul(more);
            probe.initial_delay.millis().saturating_add(waits)
        })
    };
    let (startup, readiness) = (
        earliest(&service.probes.startup),
        earliest(&service.probes.readiness),
    );
    let name = if startup > readiness {
        "startup"
    } else {
        "readiness"
    };
    let earliest = startup.saturating_add(readiness);
    ensure(
        earliest < deadline.millis(),
        format_args!("{path}.probes.{name}"),
        || {
            format!(
                "cannot pass before {}, but spec.rollout.progressDeadline is {deadline}; make it longer",
                Span(earliest)
            )
        },
    )
}

/// The release must fit, with images pinned.
fn size(app: &App) -> Checked {
    // The digest with its `@`, and what a short name grows by when it is written out.
    const GROWTH: usize = "@sha256:".len() + 64 + "docker.io/library/".len();
    let release = Release {
        schema: 1,
        app: app.metadata.name.clone(),
        services: app.spec.resolved(),
        image_pull_secrets: app.spec.image_pull_secrets.clone(),
    };
    let size = release.to_canonical_json().len() + GROWTH * app.spec.services.len();
    ensure(size <= MAX_RELEASE_BYTES, "spec.services", || {
        format!(
            "the release would have {size} bytes; at most {MAX_RELEASE_BYTES} are allowed; shorten commands, \
             environment and configs, or put files into the image"
        )
    })
}
