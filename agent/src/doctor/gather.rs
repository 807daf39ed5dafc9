//! Filling in the [`Facts`]: small files of the kernel and the system, each read with a bound, and the tries of
//! [`attempt`](super::attempt). Decides nothing.

mod cgroups;
mod files;
mod init;

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use self::files::Tree;
use super::attempt::{Attempt, End, LockSaid, Outcome, Said, Try, no_result};
use super::facts::{
    Broker, Clock, ConfigFile, ConfigProblem, Connect, Facts, Handshake, Host, Hub, Namespace,
    RegistryAnswer, RunDir, SecretFile, StateDir, StateDisk, StateLock, Swap, Tried, mount_of,
    parse_mounts,
};
use crate::causes::chain;
use crate::config::{Cgroup, Config, ConfigError, HUB_REGISTRY, Paths};
use crate::disk::block;

/// 2026-11-01, when this program was young. A build with `SOURCE_DATE_EPOCH` (reproducible-builds.org) says it more
/// precisely.
const EARLIEST_S: i64 = 1_793_491_200;

/// Registries that are tried; all at once, and more of them are not configured by hand.
const REGISTRIES_MAX: usize = 16;

/// Looks at this device. `program` is the agent itself, for the tries. Takes at most some 25 s.
pub(crate) fn gather(program: &Path, config_path: &Path) -> Facts {
    let loaded = Config::load(config_path);
    let config = loaded.as_ref().ok();
    let paths = config.map_or_else(Paths::default, |config| config.paths.clone());
    let parent = config.map_or_else(Cgroup::default, |config| config.cgroup.clone());
    let root = nix::unistd::geteuid().is_root();

    // All at once: what hangs costs its time only once.
    let hub = config.map(|_| Attempt::start(program, Try::Hub(config_path)));
    let registries: Vec<(String, Attempt)> = config
        .map(configured_registries)
        .unwrap_or_default()
        .into_iter()
        .map(|host| {
            let attempt = Attempt::start(program, Try::Registry(config_path, &host));
            (host, attempt)
        })
        .collect();
    let state = Attempt::start(program, Try::State(&paths.state));
    let seccomp = Attempt::start(program, Try::Seccomp);
    let device_filter = root.then(|| Attempt::start(program, Try::DeviceFilter));
    let shim = root.then(|| Attempt::start(program, Try::Shim));
    let namespaces: Vec<(Namespace, Option<Attempt>)> = Namespace::ALL
        .into_iter()
        .map(|kind| {
            // Only user namespaces are for everybody.
            let may = root || kind == Namespace::User;
            (
                kind,
                may.then(|| Attempt::start(program, Try::Namespace(kind))),
            )
        })
        .collect();

    let tree = Tree::new(Path::new("/"));
    let host = host(&tree);
    let state = state_dir(&tree, &paths, &state.finish());
    Facts {
        disks: state_disks(&state),
        config: config_file(config_path, &loaded),
        secrets: config.map(secrets).unwrap_or_default(),
        cgroups: cgroups::cgroups(&tree, &parent.parent),
        namespaces_max: files::namespaces_max(&tree),
        unprivileged_userns: tree
            .line("proc/sys/kernel/unprivileged_userns_clone")
            .map(|text| text != "0"),
        swap: Swap {
            total_bytes: files::swap_bytes(&tree),
        },
        clock: clock(&tree),
        init: init::init(&tree),
        namespaces: namespaces
            .into_iter()
            .map(|(kind, attempt)| {
                (
                    kind,
                    attempt.map_or_else(only_root, |attempt| attempt.finish().tried()),
                )
            })
            .collect(),
        seccomp: seccomp.finish().tried(),
        device_filter: device_filter.map_or_else(only_root, |attempt| attempt.finish().tried()),
        shim: shim.map_or_else(only_root, |attempt| attempt.finish().ended_well()),
        run: run_dir(&tree, &paths),
        state,
        hub: hub_facts(&tree, config, hub.map(Attempt::finish)),
        registries: registries
            .into_iter()
            .map(|(host, attempt)| (host, registry(&attempt.finish())))
            .collect(),
        host,
    }
}

fn only_root() -> Tried {
    Tried::Skipped("only root may".to_owned())
}

fn configured_registries(config: &Config) -> Vec<String> {
    let hub = config
        .hub
        .registry
        .as_ref()
        .map(|_| HUB_REGISTRY.to_owned());
    hub.into_iter()
        .chain(config.registries.keys().cloned())
        .take(REGISTRIES_MAX)
        .collect()
}

fn host(tree: &Tree) -> Host {
    let status = tree.text("proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Host {
        kernel: tree.line("proc/sys/kernel/osrelease").unwrap_or_default(),
        command_line: tree.line("proc/cmdline").unwrap_or_default(),
        model: tree
            .text("proc/device-tree/model")
            .map(|model| model.trim_end_matches('\0').trim().to_owned()),
        container: files::container(tree),
        boot_files: super::judge::boot_files()
            .filter_map(|file| Some((file.to_owned(), tree.text(file.trim_start_matches('/'))?)))
            .collect(),
        own_users: files::own_users(tree),
        euid: nix::unistd::geteuid().as_raw(),
        capabilities: effective.unwrap_or(0),
    }
}

fn config_file(path: &Path, loaded: &Result<Config, ConfigError>) -> ConfigFile {
    use std::os::unix::fs::PermissionsExt as _;
    let read = match loaded {
        Ok(_) => Ok(()),
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(ConfigProblem::Missing)
        }
        Err(error) => Err(ConfigProblem::Wrong(chain(error))),
    };
    let mode = std::fs::metadata(path).map(|metadata| metadata.permissions().mode() & 0o7777);
    ConfigFile {
        path: path.to_owned(),
        read,
        mode: mode.ok(),
    }
}

fn secrets(config: &Config) -> Vec<SecretFile> {
    let join = (
        "hub.join_token_file".to_owned(),
        config.hub.join_token_file.clone(),
    );
    let passwords = config.registries.iter().filter_map(|(host, entry)| {
        let file = entry.password_file.clone()?;
        Some((format!("registries.\"{host}\".password_file"), file))
    });
    std::iter::once(join)
        .chain(passwords)
        .map(|(key, path)| {
            use std::os::unix::fs::MetadataExt as _;
            let owner = std::fs::metadata(&path)
                .ok()
                .map(|metadata| (metadata.mode() & 0o7777, metadata.uid()));
            let problem = crate::config::read_secret(&path)
                .err()
                .map(|error| chain(&error));
            SecretFile {
                key,
                path,
                owner,
                problem,
            }
        })
        .collect()
}

fn state_dir(tree: &Tree, paths: &Paths, outcome: &Outcome) -> StateDir {
    let mounts = parse_mounts(&tree.mounts());
    let looked_at = outcome.said.iter().find_map(|said| match said {
        Said::LookedAt { dir, space } => Some((Path::new(dir).to_owned(), *space)),
        _ => None,
    });
    let (dir, space) = looked_at.map_or((None, None), |(dir, space)| (Some(dir), space));
    let sync = outcome.part(|said| match said {
        Said::Synced { why, .. } => Some(why.clone()),
        _ => None,
    });
    let overlay = if matches!(sync, Tried::Works) {
        outcome.part(|said| match said {
            Said::Overlay { why } => Some(why.clone()),
            _ => None,
        })
    } else {
        Tried::Skipped("see state.sync".to_owned())
    };
    let overlay = match overlay {
        Tried::Fails(_) if !nix::unistd::geteuid().is_root() => only_root(),
        overlay => overlay,
    };
    let idmap = if matches!(sync, Tried::Works) {
        outcome.part(|said| match said {
            Said::Idmap { why } => Some(why.clone()),
            _ => None,
        })
    } else {
        Tried::Skipped("see state.sync".to_owned())
    };
    let idmap = match idmap {
        Tried::Fails(_) if !nix::unistd::geteuid().is_root() => only_root(),
        idmap => idmap,
    };
    StateDir {
        path: paths.state.clone(),
        mount: dir.as_ref().and_then(|dir| mount_of(&mounts, dir)).cloned(),
        looked_at: dir,
        space,
        sync,
        sync_ms: outcome
            .said
            .iter()
            .find_map(|said| match said {
                Said::Synced { ms, .. } => Some(*ms),
                _ => None,
            })
            .unwrap_or(0),
        overlay,
        idmap,
        lock: state_lock(tree, outcome),
    }
}

fn state_disks(state: &StateDir) -> Result<Vec<StateDisk>, String> {
    let Some(dir) = &state.looked_at else {
        return Err("the state directory could not be looked at".to_owned());
    };
    let disks = block::holding(std::slice::from_ref(dir)).map_err(|error| chain(&error))?;
    Ok(disks
        .iter()
        .map(|disk| StateDisk {
            name: disk.name.clone(),
            weights: block::shared_by_weight(disk),
        })
        .collect())
}

fn state_lock(tree: &Tree, outcome: &Outcome) -> StateLock {
    let lock = outcome.said.iter().find_map(|said| match said {
        Said::Lock { lock } => Some(lock),
        _ => None,
    });
    match (lock, &outcome.end) {
        (Some(LockSaid::Free), _) => StateLock::Free,
        (Some(LockSaid::Held(inode)), _) => StateLock::Held(files::lock_holder(tree, *inode)),
        (Some(LockSaid::Unknown(why)), _) => StateLock::Unknown(why.clone()),
        (None, End::NotStarted(why)) => StateLock::Unknown(why.clone()),
        (None, End::Ended(_) | End::TimedOut(_)) => {
            StateLock::Unknown("the directory could not be looked at".to_owned())
        }
    }
}

fn run_dir(tree: &Tree, paths: &Paths) -> RunDir {
    let mounts = parse_mounts(&tree.mounts());
    let real = paths
        .run
        .ancestors()
        .find_map(|dir| dir.canonicalize().ok());
    RunDir {
        path: paths.run.clone(),
        mount: real.and_then(|real| mount_of(&mounts, &real).cloned()),
    }
}

fn clock(tree: &Tree) -> Clock {
    let unix_s = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds)
        }
    };
    let built = option_env!("SOURCE_DATE_EPOCH").and_then(|text| text.parse().ok());
    let boot_ms = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_err(|error| error.to_string())
        .map(|_| crate::clock::boot_ms().0);
    Clock {
        unix_s,
        earliest_s: built.unwrap_or(EARLIEST_S),
        boot_ms,
        rtc: !tree.names("sys/class/rtc").is_empty(),
        timesyncd: [
            "usr/lib/systemd/systemd-timesyncd",
            "lib/systemd/systemd-timesyncd",
        ]
        .iter()
        .any(|path| tree.exists(path)),
    }
}

fn hub_facts(tree: &Tree, config: Option<&Config>, outcome: Option<Outcome>) -> Hub {
    let broker = config.map(|config| Broker {
        host: config.hub.broker.host.clone(),
        port: config.hub.broker.port,
        tls: config.hub.broker.tls,
    });
    let outcome = outcome.unwrap_or_else(|| Outcome {
        said: Vec::new(),
        end: End::NotStarted("no configuration".to_owned()),
    });
    let resolve = outcome.part(|said| match said {
        Said::Addresses { why, .. } => Some(why.clone()),
        _ => None,
    });
    let pick = |pick: &dyn Fn(&Said) -> Option<Vec<String>>| {
        outcome.said.iter().find_map(pick).unwrap_or_default()
    };
    let connect = outcome.said.iter().find_map(|said| match said {
        Said::Connect { how } => Some(how.clone()),
        _ => None,
    });
    let connect = connect.unwrap_or(match resolve {
        Tried::Works => Connect::Silent,
        _ => Connect::NotTried,
    });
    let tls = outcome.said.iter().find_map(|said| match said {
        Said::Tls { how } => Some(how.clone()),
        _ => None,
    });
    let tls = tls.unwrap_or(match connect {
        Connect::Connected { .. } => Handshake::Silent,
        _ => Handshake::NotTried,
    });
    Hub {
        broker,
        nameservers: files::nameservers(tree),
        addresses: pick(&|said| match said {
            Said::Addresses { found, .. } => Some(found.clone()),
            _ => None,
        }),
        resolve,
        connect,
        tls,
    }
}

fn registry(outcome: &Outcome) -> RegistryAnswer {
    let answer = outcome.said.iter().find_map(|said| match said {
        Said::Registry { answer } => Some(answer.clone()),
        _ => None,
    });
    match (answer, &outcome.end) {
        (Some(answer), _) => answer,
        (None, End::TimedOut(_)) => RegistryAnswer::Silent,
        (None, End::NotStarted(why)) => RegistryAnswer::Failed(why.clone()),
        (None, End::Ended(status)) => RegistryAnswer::Failed(no_result(status.as_deref())),
    }
}

#[cfg(test)]
mod tests;
