//! Where a container is put together: a small file system in memory that covers `/dev` in the starting process's own
//! mount namespace.
//!
//! ```text
//! /dev/null …     fresh device nodes: those of the device are not shown to containers
//! /dev/l/N        the layers, lowest first; mounted with mapped ids, or links to them
//! /dev/layer      the writable layer, here for a read-only root, or a link to it
//! /dev/rootfs     the overlay of them
//! /dev/c/N        the files of the service's configs
//! /dev/s          the directory of the container's secrets
//! /dev/m/N        what will be bind-mounted, with mapped ids
//! ```
//!
//! `/dev` because it is on every device, and because root of a user namespace can get there: the run directory and what
//! is above it may be closed to it. Like every mount of the seclusion it goes with the container, so nothing of it has
//! to be deleted and nothing wears out flash.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::manifest::{ConfigMount, FileOwner};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use serde_json::{Value, json};

use super::mounts::Detached;
use super::rootfs::{Step as _, StepError};
use super::userns::UserNamespace;

const DIR: &str = "/dev";
/// The container's root file system.
pub(crate) const ROOTFS: &str = "/dev/rootfs";

/// The files of the service's configs.
pub(crate) const CONFIGS: &str = "/dev/c";

/// The directory of the container's secrets.
pub(crate) const SECRETS: &str = "/dev/s";

/// null, zero, full, random, urandom, tty: what libcontainer puts into every container.
const NODES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Why a container could not be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackstageError {
    #[error(transparent)]
    Step(#[from] StepError),
    /// It can be only without a user namespace. Depends on the kernel and its file systems, never on what is in an
    /// image: nobody must be able to get rid of the namespace by an image.
    #[error("{0}")]
    Unmappable(String),
}

/// The file system, and what was on the device's own paths before it was mounted.
#[derive(Debug)]
pub(crate) struct Backstage<'a> {
    namespace: Option<&'a UserNamespace>,
    sources: BTreeMap<PathBuf, Vec<Detached>>,
    mounted: u32,
}

impl<'a> Backstage<'a> {
    /// Mounts it. `sources` are what of the device will be bind-mounted, with what is mounted below it: by which name, and
    /// where it is found now. This process must have a mount namespace of its own.
    pub(crate) fn mount<'p>(
        namespace: Option<&'a UserNamespace>,
        sources: impl IntoIterator<Item = (&'p Path, PathBuf)>,
    ) -> Result<Self, StepError> {
        let mut copies: BTreeMap<PathBuf, Vec<Detached>> = BTreeMap::new();
        for (name, path) in sources {
            let copy = Detached::copy_tree(&path).step(|| format!("open {}", name.display()))?;
            copies.entry(name.to_owned()).or_default().push(copy);
        }
        let options = Some("size=16m,mode=0755");
        mount(
            Some("tmpfs"),
            DIR,
            Some("tmpfs"),
            MsFlags::MS_NOSUID,
            options,
        )
        .step(|| format!("mount a tmpfs on {DIR}"))?;
        let make = || -> io::Result<()> {
            umask(Mode::empty());
            for (name, major, minor) in NODES {
                let path = Path::new(DIR).join(name);
                mknod(
                    &path,
                    SFlag::S_IFCHR,
                    Mode::from_bits_truncate(0o666),
                    makedev(major, minor),
                )?;
            }
            umask(Mode::from_bits_truncate(0o022));
            for name in ["c", "l", "m", "rootfs"] {
                fs::create_dir(Path::new(DIR).join(name))?;
            }
            Ok(())
        };
        make().step(|| format!("fill {DIR}"))?;
        Ok(Self {
            namespace,
            sources: copies,
            mounted: 0,
        })
    }

    /// Mounts an overlay of `layers` (lowest first) on [`ROOTFS`], with its writable layer in the directory `writable`,
    /// which is made, or in memory.
    ///
    /// Layers have short names here, because the options of mount(2) must fit into one page and paths may hold the
    /// characters that separate them. The writable layer is `volatile`: it never outlives the container, so nothing
    /// waits for it to reach the disk. It is not mapped, so what is in it belongs to the app's own ids.
    pub(crate) fn mount_overlay(
        &self,
        layers: &[PathBuf],
        writable: Option<&Path>,
    ) -> Result<(), BackstageError> {
        let mut lower = String::new();
        for (index, layer) in layers.iter().enumerate().rev() {
            self.place_layer(&Path::new(DIR).join(format!("l/{index}")), layer)?;
            if !lower.is_empty() {
                lower.push(':');
            }
            lower.push_str(&format!("l/{index}"));
        }
        let here = Path::new(DIR).join("layer");
        let make_dir = |path: &Path| {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(path);
            made.step(|| format!("create {}", path.display()))
        };
        match writable {
            None => make_dir(&here)?,
            Some(dir) => {
                make_dir(dir)?;
                std::os::unix::fs::symlink(dir, &here)
                    .step(|| format!("link {}", dir.display()))?;
            }
        }
        make_dir(&here.join("work"))?;
        let upper = here.join("upper");
        make_dir(&upper)?;
        let base = self.namespace.map_or(0, UserNamespace::base);
        std::os::unix::fs::chown(&upper, Some(base), Some(base))
            .step(|| format!("change the owner of {}", upper.display()))?;
        std::env::set_current_dir(DIR).step(|| format!("change to {DIR}"))?;
        let overlay = |volatile: &str| {
            let options =
                format!("lowerdir={lower},upperdir=layer/upper,workdir=layer/work{volatile}");
            mount(
                Some("overlay"),
                ROOTFS,
                Some("overlay"),
                MsFlags::MS_NODEV,
                Some(&*options),
            )
        };
        let mounted = overlay(",volatile").or_else(|error| match error {
            // Before Linux 5.10.
            nix::Error::EINVAL => overlay(""),
            other => Err(other),
        });
        std::env::set_current_dir("/").step(|| "change to /".to_owned())?;
        match (mounted, self.namespace) {
            (Err(nix::Error::EINVAL), Some(_)) => Err(BackstageError::Unmappable(
                "this kernel cannot overlay layers with mapped ids; Linux 5.19 and later can"
                    .to_owned(),
            )),
            (mounted, _) => {
                mounted.step(|| format!("mount the overlay of {} layers", layers.len()))?;
                Ok(())
            }
        }
    }

    fn place_layer(&self, at: &Path, layer: &Path) -> Result<(), BackstageError> {
        let act = || format!("open layer {}", layer.display());
        if !layer.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotFound)).step(act)?;
        }
        let Some(namespace) = self.namespace else {
            return Ok(std::os::unix::fs::symlink(layer, at).step(act)?);
        };
        let copy = Detached::copy(layer).step(act)?;
        copy.map_ids(namespace.as_fd())
            .map_err(|error| unmappable(layer, error))?;
        fs::create_dir(at)
            .and_then(|()| copy.attach(at))
            .step(act)?;
        Ok(())
    }

    /// Points every bind mount of `configuration` to a copy in here: with mapped ids in a user namespace, and always
    /// where the container's first process can get at it.
    pub(crate) fn take_in(&mut self, configuration: &mut Value) -> Result<(), BackstageError> {
        let mounts = configuration["mounts"].as_array_mut();
        for mount in mounts.into_iter().flatten() {
            if mount["type"] != "bind" {
                continue;
            }
            let has = |name: &str| {
                let options = mount["options"].as_array().into_iter().flatten();
                options.into_iter().any(|option| option == name)
            };
            let source = PathBuf::from(mount["source"].as_str().unwrap_or_default());
            if source.starts_with(CONFIGS) || source == Path::new(SECRETS) {
                // Made for the container, with the right owner.
                continue;
            }
            let here = self.place_source(&source, has("rbind"), has("ro") || has("rro"))?;
            mount["source"] = json!(here);
        }
        Ok(())
    }

    /// Makes the directory of the container's secrets available, as it was copied before this was mounted. It belongs to the
    /// container's ids already, and is changed from outside while the container runs.
    pub(crate) fn place_secrets(&self, copy: Detached) -> Result<(), StepError> {
        fs::create_dir(SECRETS)
            .and_then(|()| copy.attach(Path::new(SECRETS)))
            .step(|| "mount the secrets".to_owned())
    }

    /// Writes the files of the service's configs, which belong to whom the container knows by their numbers.
    pub(crate) fn write_configs(&self, configs: &[ConfigMount]) -> Result<(), StepError> {
        let base = self.namespace.map_or(0, UserNamespace::base);
        for (index, config) in configs.iter().enumerate() {
            let path = Path::new(CONFIGS).join(index.to_string());
            let write = || -> io::Result<()> {
                fs::write(&path, config.content.as_deref().unwrap_or_default())?;
                fs::set_permissions(&path, fs::Permissions::from_mode(config.mode.0))?;
                let owner = |id: FileOwner| Some(base.saturating_add(id.0));
                std::os::unix::fs::chown(&path, owner(config.uid), owner(config.gid))
            };
            write().step(|| format!("write config {}", config.source))?;
        }
        Ok(())
    }

    fn place_source(
        &mut self,
        source: &Path,
        tree: bool,
        read_only: bool,
    ) -> Result<PathBuf, BackstageError> {
        let act = || format!("open {}", source.display());
        let checked = self.sources.get_mut(source).and_then(Vec::pop);
        let copy = match (checked, tree) {
            (Some(copy), _) => copy,
            (None, true) => Detached::copy_tree(source).step(act)?,
            (None, false) => Detached::copy(source).step(act)?,
        };
        let metadata = copy.metadata().step(act)?;
        if let Some(namespace) = self.namespace
            && let Err(error) = copy.map_ids(namespace.as_fd())
        {
            // Whoever it belongs to, it can be read.
            let readable = metadata.permissions().mode() & 0o5 == 0o5
                || metadata.is_file() && metadata.permissions().mode() & 0o4 != 0;
            if !(read_only && readable) {
                return Err(unmappable(source, error));
            }
        }
        let here = Path::new(DIR).join(format!("m/{}", self.mounted));
        self.mounted += 1;
        let made = if metadata.is_dir() {
            fs::create_dir(&here)
        } else {
            File::create(&here).map(drop)
        };
        made.and_then(|()| copy.attach(&here)).step(act)?;
        Ok(here)
    }

    /// Mounts the kernel's `/sys` of the network namespace that this process is in, for a container that shares it: root
    /// of a user namespace may not mount that one itself.
    pub(crate) fn mount_sys(&self) -> Result<PathBuf, StepError> {
        let here = Path::new(DIR).join("sys");
        let flags =
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
        fs::create_dir(&here)
            .and_then(|()| {
                mount(Some("sysfs"), &here, Some("sysfs"), flags, None::<&str>)
                    .map_err(io::Error::from)
            })
            .step(|| "mount sysfs".to_owned())?;
        Ok(here)
    }

    /// Makes the device nodes that `configuration` asks for besides the usual ones: in a user namespace they are bind-mounted
    /// from here.
    pub(crate) fn make_nodes(&self, configuration: &Value) -> Result<(), StepError> {
        let devices = configuration["linux"]["devices"].as_array();
        for device in devices.into_iter().flatten() {
            let text = |key: &str| device[key].as_str().unwrap_or_default();
            let number = |key: &str| device[key].as_u64();
            let path = text("path");
            let kind = match text("type") {
                "b" => SFlag::S_IFBLK,
                "p" => SFlag::S_IFIFO,
                _ => SFlag::S_IFCHR,
            };
            let id = |key: &str| {
                let id = number(key)
                    .and_then(|id| u32::try_from(id).ok())
                    .unwrap_or(0);
                Some(id.saturating_add(self.namespace.map_or(0, UserNamespace::base)))
            };
            let make = || -> io::Result<()> {
                let path = Path::new(path);
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent)?;
                }
                let mode = number("fileMode")
                    .and_then(|mode| u32::try_from(mode).ok())
                    .unwrap_or(0o666);
                let numbers = makedev(number("major").unwrap_or(0), number("minor").unwrap_or(0));
                mknod(path, kind, Mode::empty(), numbers)?;
                fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o777))?;
                std::os::unix::fs::chown(path, id("uid"), id("gid"))
            };
            make().step(|| format!("make the device node {path}"))?;
        }
        Ok(())
    }
}

fn unmappable(path: &Path, error: io::Error) -> BackstageError {
    let path = path.display();
    if lacks(&error) {
        return BackstageError::Unmappable(format!(
            "the file system of {path} cannot be mounted with mapped ids ({error})"
        ));
    }
    let failed = Err::<(), _>(error).step(|| format!("mount {path} with mapped ids"));
    BackstageError::Step(failed.expect_err("it is an error"))
}

/// Whether the kernel said that it cannot do this here, and not that it could not now: a lack of memory must not
/// take the user namespace from a container.
pub(crate) fn lacks(error: &io::Error) -> bool {
    let lasting = [
        libc::EINVAL,
        libc::ENOSPC,
        libc::ENOSYS,
        libc::EOPNOTSUPP,
        libc::EPERM,
        libc::EUSERS,
    ];
    error
        .raw_os_error()
        .is_some_and(|number| lasting.contains(&number))
}
