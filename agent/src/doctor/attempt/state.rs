//! Tries the state directory: its space and lock, a write that reaches the medium, and an overlay as containers have
//! them, in a private mount namespace. Everything is in one directory, which is removed at the end.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::child::say;
use super::{LockSaid, Said};
use crate::causes::chain;
use crate::doctor::facts::Space;
use crate::runtime::backstage::{Backstage, ROOTFS};
use crate::runtime::mounts::Detached;
use crate::runtime::rootfs::{Seclusion, StepError};
use crate::runtime::userns::UserNamespace;

/// What begins the names of scratch directories.
const PREFIX: &str = ".foreshore-doctor-";

/// The first of the ids that mapping is tried with; any will do.
const TRIED_ID: u32 = 1 << 20;

/// Entries of a directory that are looked at for what a killed doctor left.
const SWEEP_MAX: usize = 10_000;

pub(super) fn examine(state: &Path) {
    // To be stopped in the middle would leave the scratch directory behind.
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        signals.add(signal);
    }
    let _only_less_tidy = signals.thread_block();

    let Some(dir) = nearest(state) else {
        return;
    };
    let opened = File::open(&dir);
    let space = opened.as_ref().ok().and_then(space);
    say(&Said::LookedAt {
        dir: dir.to_string_lossy().into_owned(),
        space,
    });
    say(&Said::Lock { lock: lock(state) });
    sweep(&dir);
    match Scratch::make(&dir) {
        Err(error) => {
            let why = format!("a directory in {}: {error}", dir.display());
            say(&Said::Synced {
                why: Some(why),
                ms: 0,
            });
        }
        Ok(scratch) => {
            let begin = Instant::now();
            let why = sync(&scratch.path).err().map(|error| error.to_string());
            let ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
            say(&Said::Synced { why, ms });
            let why = overlay(&scratch.path).err();
            say(&Said::Overlay { why });
            let why = idmap(&scratch.path).err();
            say(&Said::Idmap { why });
        }
    }
}

/// The directory itself, or the nearest one above it that exists, without symbolic links.
fn nearest(state: &Path) -> Option<PathBuf> {
    state
        .ancestors()
        .filter(|dir| dir.is_dir())
        .find_map(|dir| dir.canonicalize().ok())
}

fn space(dir: &File) -> Option<Space> {
    let stat = fstatvfs(dir).ok()?;
    let block = wide(stat.fragment_size());
    Some(Space {
        total_bytes: wide(stat.blocks()).saturating_mul(block),
        free_bytes: wide(stat.blocks_available()).saturating_mul(block),
        total_inodes: wide(stat.files()),
        free_inodes: wide(stat.files_available()),
        read_only: stat.flags().contains(FsFlags::ST_RDONLY),
    })
}

/// These numbers have other widths on 32-bit systems.
fn wide(number: impl TryInto<u64>) -> u64 {
    number.try_into().unwrap_or(u64::MAX)
}

/// Whether an agent has the lock that [`crate::state::lock`] takes. Taken for a moment, shared, if nobody has; an
/// agent that starts in this moment waits.
fn lock(state: &Path) -> LockSaid {
    let path = state.join("lock");
    let opened = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_NOFOLLOW.bits())
        .open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return LockSaid::Free,
        Err(error) => return LockSaid::Unknown(format!("{}: {error}", path.display())),
    };
    let inode = file.metadata().map_or(0, |metadata| metadata.ino());
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_released_at_once) => LockSaid::Free,
        Err((_, nix::Error::EWOULDBLOCK)) => LockSaid::Held(inode),
        Err((_, error)) => LockSaid::Unknown(format!("{}: {error}", path.display())),
    }
}

/// A directory to try things in. Its owner holds a lock on it, so that others know it for their own.
struct Scratch {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Scratch {
    fn make(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("{PREFIX}{}", std::process::id()));
        // Another doctor may sweep it between the two steps, but not twice in the same moment.
        for _ in 0..3 {
            DirBuilder::new().mode(0o700).create(&path)?;
            let locked = File::open(&path)
                .map_err(|error| nix_error(&error))
                .and_then(|file| {
                    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)
                });
            if let Ok(lock) = locked
                && path.is_dir()
            {
                return Ok(Self { path, _lock: lock });
            }
        }
        Err(io::Error::from(io::ErrorKind::ResourceBusy))
    }
}

fn nix_error(error: &io::Error) -> nix::Error {
    nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left after a failure is swept by the next doctor.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes what doctors left that were killed: their locks went with them.
fn sweep(dir: &Path) {
    let own = nix::unistd::geteuid().as_raw();
    let entries = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .take(SWEEP_MAX)
        .flatten();
    for entry in entries {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry
                .metadata()
                .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == own);
        if !ours {
            continue;
        }
        let opened = File::options()
            .read(true)
            .custom_flags(OFlag::O_DIRECTORY.bits() | OFlag::O_NOFOLLOW.bits())
            .open(entry.path());
        if let Ok(file) = opened
            && let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Stores a file as the agent does: write, sync, rename, sync the directory.
fn sync(scratch: &Path) -> io::Result<()> {
    let temporary = scratch.join("file.new");
    let mut file = File::create(&temporary)?;
    file.write_all(&[b'x'; 4096])?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, scratch.join("file"))?;
    File::open(scratch)?.sync_all()
}

/// Mounts two layers as a container has them, and looks whether it reads, hides, writes and deletes as it should.
fn overlay(scratch: &Path) -> Result<(), String> {
    let prepared = prepare(scratch);
    let layers = prepared.map_err(|error| format!("layers cannot be made: {error}"))?;
    let step = |error: StepError| chain(&error);
    let seclusion = Seclusion::enter().map_err(step)?;
    let merged = Path::new(ROOTFS);
    let mounted = Backstage::mount(None, [])
        .map_err(step)
        .and_then(|backstage| {
            let writable = scratch.join("writable");
            let mounted = backstage.mount_overlay(&layers, Some(&writable));
            mounted.map_err(|error| chain(&error))
        })
        .and_then(|()| use_it(merged).map_err(|error| format!("mounted, but {error}")));
    // Going back fails in a user namespace that does not own the device's mounts, and what is mounted cannot be
    // removed.
    let _not_mounted = umount2(merged, MntFlags::MNT_DETACH);
    let left = seclusion.leave().map_err(step);
    mounted.and(left)
}

/// Gives a copy of the mount that the directory is on the ids of a user namespace, as layers and volumes of containers
/// get them. The copy is mounted nowhere.
fn idmap(scratch: &Path) -> Result<(), String> {
    let namespace = UserNamespace::create(TRIED_ID)
        .map_err(|error| format!("no user namespace can be made: {error}"))?;
    let copy = Detached::copy(scratch).map_err(|error| format!("copy the mount: {error}"))?;
    copy.map_ids(namespace.as_fd())
        .map_err(|error| format!("map the ids of the mount: {error}"))
}

fn prepare(scratch: &Path) -> io::Result<Vec<PathBuf>> {
    let (lower, upper) = (scratch.join("lower"), scratch.join("upper"));
    for dir in [&lower, &upper] {
        fs::create_dir(dir)?;
    }
    fs::create_dir(lower.join("dir"))?;
    for file in ["kept", "hidden", "deleted", "dir/inside"] {
        fs::write(lower.join(file), file)?;
    }
    // A whiteout, as a layer that deletes a file has it (kernel documentation, "Overlay Filesystem").
    mknod(&upper.join("hidden"), SFlag::S_IFCHR, Mode::empty(), 0)
        .map_err(|error| io::Error::other(format!("a whiteout: {error}")))?;
    Ok(vec![lower, upper])
}

fn use_it(merged: &Path) -> Result<(), String> {
    let said = |act: &str| {
        let act = act.to_owned();
        move |error: io::Error| format!("{act}: {error}")
    };
    let read = fs::read(merged.join("kept")).map_err(said("reading through it fails"))?;
    if read != b"kept" {
        return Err("it shows other bytes than are there".to_owned());
    }
    if merged.join("hidden").exists() {
        return Err("it shows a file that a layer has deleted".to_owned());
    }
    fs::write(merged.join("kept"), "changed").map_err(said("changing a file fails"))?;
    fs::remove_file(merged.join("deleted")).map_err(said("deleting a file fails"))?;
    // The new one is opaque, which takes an extended attribute.
    fs::remove_dir_all(merged.join("dir")).map_err(said("deleting a directory fails"))?;
    fs::create_dir(merged.join("dir")).map_err(said("making a directory anew fails"))?;
    if merged.join("deleted").exists() || merged.join("dir/inside").exists() {
        return Err("what was deleted is still there".to_owned());
    }

    Ok(())
}
