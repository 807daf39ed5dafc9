//! The container's root file system: an overlay of the image's layers in a mount namespace that only the
//! starting process and the container ever see.
//!
//! Because the device's own mount namespace never has these mounts, nothing can be left mounted: they
//! vanish with the container, however it ends.
//!
//! Paths inside an image are never followed with the device's root: every look-up goes through openat2(2)
//! with `RESOLVE_IN_ROOT`, so a symbolic link in an image means what it means in the container.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;

use super::spec::{Refusal, mount_point};
use super::user::MAX_DATABASE;

/// A failed step, saying what was tried.
#[derive(Debug, thiserror::Error)]
#[error("failed to {act}")]
pub(crate) struct StepError {
    act: String,
    #[source]
    source: io::Error,
}

/// Names the step that failed.
pub(crate) trait Step<T> {
    /// Wraps an error with what was tried.
    fn step(self, act: impl FnOnce() -> String) -> Result<T, StepError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, act: impl FnOnce() -> String) -> Result<T, StepError> {
        self.map_err(|error| StepError {
            act: act(),
            source: error.into(),
        })
    }
}

/// A mount namespace of this process's own, and the way back.
#[derive(Debug)]
pub(crate) struct Seclusion {
    device: File,
}

impl Seclusion {
    /// Enters a new mount namespace in which nothing spreads in or out.
    pub(crate) fn enter() -> Result<Self, StepError> {
        let device =
            File::open("/proc/self/ns/mnt").step(|| "open the mount namespace".to_owned())?;
        unshare(CloneFlags::CLONE_NEWNS).step(|| "make a mount namespace".to_owned())?;
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .step(|| "make the mounts private".to_owned())?;
        Ok(Self { device })
    }

    /// Goes back to the device's mount namespace. The other one lives on in the container, without the
    /// device's file systems.
    pub(crate) fn leave(self) -> Result<(), StepError> {
        setns(self.device.as_fd(), CloneFlags::CLONE_NEWNS)
            .step(|| "return to the device's mount namespace".to_owned())?;
        std::env::set_current_dir("/").step(|| "change to /".to_owned())
    }
}

/// Mounts a small file system in memory on `dir`. Like every mount of the seclusion it goes with it.
pub(crate) fn mount_scratch(dir: &Path) -> Result<(), StepError> {
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(
        Some("tmpfs"),
        dir,
        Some("tmpfs"),
        flags,
        Some("size=16m,mode=0755"),
    )
    .step(|| format!("mount a tmpfs on {}", dir.display()))
}

/// More than openat2(2) ever answers EAGAIN in a row.
const MAX_TRIES: u32 = 10_000;

/// A mounted root file system.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
    /// What id 0 of the container is here.
    base: u32,
}

impl Root {
    /// Opens the one at `path`, in which id 0 is `base`.
    pub(crate) fn open(path: &Path, base: u32) -> Result<Self, StepError> {
        let dir = File::open(path).step(|| format!("open {}", path.display()))?;
        Ok(Self {
            dir: dir.into(),
            base,
        })
    }

    /// Gives a file that was just made to the container's root.
    fn give(&self, file: File) -> io::Result<File> {
        std::os::unix::fs::fchown(&file, Some(self.base), Some(self.base))?;
        Ok(file)
    }

    fn open_inside(&self, path: &Path, flags: OFlag, mode: Mode) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        // A path that climbs may have to be tried again when something else on the machine is renamed or mounted.
        let mut tries = 0..MAX_TRIES;
        let fd: RawFd = loop {
            match openat2(self.dir.as_raw_fd(), path, how) {
                Err(nix::Error::EAGAIN) if tries.next().is_some() => std::thread::yield_now(),
                opened => break opened?,
            }
        };
        #[expect(unsafe_code, reason = "openat2 of this nix gives a raw descriptor")]
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(File::from(fd))
    }

    /// The contents of a user database; empty when the image has none.
    pub(crate) fn database(&self, path: &str) -> Result<String, StepError> {
        // Non-blocking, so that a pipe planted there ends the read instead of holding it.
        let file = match self.open_inside(
            Path::new(path),
            OFlag::O_RDONLY | OFlag::O_NONBLOCK,
            Mode::empty(),
        ) {
            Ok(file) => file,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(String::new());
            }
            Err(error) => return Err(error).step(|| format!("open the image's {path}")),
        };
        let mut bytes = Vec::new();
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            file.take(MAX_DATABASE)
                .read_to_end(&mut bytes)
                .step(|| format!("read the image's {path}"))?;
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Checks that the kernel's file systems will land on plain directories: a link there would put them
    /// somewhere else.
    pub(crate) fn check_plain(&self) -> Result<(), Refusal> {
        for path in ["dev", "proc", "sys"] {
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
            let plain = match openat2(self.dir.as_raw_fd(), path, how) {
                Ok(fd) => {
                    #[expect(unsafe_code, reason = "openat2 of this nix gives a raw descriptor")]
                    // SAFETY: the kernel just gave us this descriptor.
                    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
                    file.metadata().is_ok_and(|metadata| metadata.is_dir())
                }
                Err(error) => error == nix::Error::ENOENT,
            };
            if !plain {
                return Err(Refusal::NotADirectory(format!("/{path}")));
            }
        }
        Ok(())
    }

    /// Opens a directory inside, making it and its parents where they are missing.
    fn make_dir(&self, path: &Path) -> io::Result<File> {
        let mut at = self.open_inside(Path::new("."), OFlag::O_DIRECTORY, Mode::empty())?;
        let mut sofar = PathBuf::new();
        for component in path.components() {
            let Component::Normal(part) = component else {
                continue;
            };
            sofar.push(part);
            at = match self.open_inside(&sofar, OFlag::O_DIRECTORY, Mode::empty()) {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    nix::sys::stat::mkdirat(
                        Some(at.as_raw_fd()),
                        part,
                        Mode::from_bits_truncate(0o755),
                    )?;
                    self.give(self.open_inside(&sofar, OFlag::O_DIRECTORY, Mode::empty())?)?
                }
                Err(error) => return Err(error),
            };
        }
        Ok(at)
    }

    /// Where a mount on `target` would really be: links in the image are followed as in the container, and what is
    /// missing is taken as it is written. A link may lead to another good place, but not to where no mount may be.
    ///
    /// # Errors
    ///
    /// [`Refusal::MountPoint`] and [`Refusal::MountPointLeads`].
    pub(crate) fn mount_point(&self, target: &str) -> Result<String, Refusal> {
        let target = mount_point(target)?;
        let leads = |to: &str| Refusal::MountPointLeads(target.clone(), to.to_owned());
        let mut known = PathBuf::from(".");
        let mut at = self
            .open_inside(&known, OFlag::O_PATH, Mode::empty())
            .map_err(|error| leads(&error.to_string()))?;
        let mut components = Path::new(&target).components().skip(1);
        let mut missing = PathBuf::new();
        for component in components.by_ref() {
            let next = known.join(component);
            match self.open_inside(&next, OFlag::O_PATH, Mode::empty()) {
                Ok(file) => (known, at) = (next, file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let nofollow = OFlag::O_PATH | OFlag::O_NOFOLLOW;
                    if self.open_inside(&next, nofollow, Mode::empty()).is_ok() {
                        return Err(leads("nowhere"));
                    }
                    missing.push(component);
                    break;
                }
                Err(error) => return Err(leads(&error.to_string())),
            }
        }
        missing.extend(components);
        let real = self.inside(&at).ok_or_else(|| leads("nowhere"))?;
        let real = real.join(missing);
        let real = real.to_str().ok_or_else(|| leads("nowhere"))?;
        if real == target {
            return Ok(target);
        }
        mount_point(real).map_err(|_| leads(real))
    }

    /// The path of an open file as the container sees it.
    fn inside(&self, file: &File) -> Option<PathBuf> {
        let path = |fd: RawFd| fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let (root, file) = (path(self.dir.as_raw_fd())?, path(file.as_raw_fd())?);
        Some(Path::new("/").join(file.strip_prefix(root).ok()?))
    }

    /// Makes the working directory if the image lacks it, as Docker does.
    pub(crate) fn make_working_dir(&self, path: &Path) -> Result<(), StepError> {
        self.make_dir(path)
            .map(drop)
            .step(|| format!("create the working directory {}", path.display()))
    }

    /// Writes a small file into `/etc`, over what the image has there.
    pub(crate) fn write_etc(&self, name: &str, contents: &str) -> Result<(), StepError> {
        let write = || -> io::Result<()> {
            let dir = self.make_dir(Path::new("etc"))?;
            let inside = Self {
                dir: dir.into(),
                base: self.base,
            };
            // Not through a link: the image's own link may point into a mount that does not exist yet.
            match nix::unistd::unlinkat(
                Some(inside.dir.as_raw_fd()),
                name,
                nix::unistd::UnlinkatFlags::NoRemoveDir,
            ) {
                Ok(()) | Err(nix::Error::ENOENT) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
            let file =
                inside.open_inside(Path::new(name), flags, Mode::from_bits_truncate(0o644))?;
            let mut file = self.give(file)?;
            file.write_all(contents.as_bytes())
        };
        write().step(|| format!("write the container's /etc/{name}"))
    }

    /// Owner, as the container sees it, and mode of a directory in the image; `None` when there is none.
    pub(crate) fn owner(&self, path: &str) -> Option<(u32, u32, u32)> {
        let dir = self
            .open_inside(Path::new(path), OFlag::O_DIRECTORY, Mode::empty())
            .ok()?;
        let metadata = dir.metadata().ok()?;
        let id = |id: u32| id.checked_sub(self.base);
        let (uid, gid) = (id(metadata.uid())?, id(metadata.gid())?);
        Some((uid, gid, metadata.mode() & 0o7777))
    }
}

/// Makes the directory of a named volume if it is missing. A new one gets owner and mode of the directory it
/// is mounted on, so that an image that runs as its own user can write there; else it is `fallback`'s, 0755.
pub(crate) fn make_volume(
    path: &Path,
    model: Option<(u32, u32, u32)>,
    fallback: (u32, u32),
) -> Result<(), StepError> {
    let act = || format!("create volume {}", path.display());
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .step(act)?;
    }
    let (uid, gid, mode) = model.unwrap_or((fallback.0, fallback.1, 0o755));
    // Whole or not at all: a volume with the wrong owner would stay wrong for ever.
    let temporary = path.with_extension("new");
    match fs::remove_dir(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).step(act),
        _ => {}
    }
    fs::create_dir(&temporary).step(act)?;
    std::os::unix::fs::chown(&temporary, Some(uid), Some(gid)).step(act)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(mode)).step(act)?;
    fs::rename(&temporary, path).step(act)
}
