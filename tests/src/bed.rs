//! [`Bed`]: one test's temporary directory, and proof that nothing is left behind.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// One test's place. Drop it last: it checks that no mount, cgroup or container of the test is left.
#[derive(Debug)]
pub struct Bed {
    dir: Option<tempfile::TempDir>,
    cgroup: String,
}

impl Bed {
    /// A fresh place.
    ///
    /// # Panics
    ///
    /// When not root, or when no directory can be made.
    #[must_use]
    pub fn new(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        #[expect(
            unsafe_code,
            reason = "geteuid(2) has no safe wrapper in the standard library"
        )]
        // SAFETY: geteuid takes nothing and cannot fail.
        let user = unsafe { libc::geteuid() };
        assert_eq!(
            user, 0,
            "the end-to-end tests start containers: run them as root (cargo xtask test)"
        );
        let dir = tempfile::Builder::new()
            .prefix(&format!("foreshore-{test}-"))
            .tempdir()
            .expect("/tmp is writable");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            dir: Some(dir),
            cgroup: format!("foreshore-test-{}-{count}", std::process::id()),
        }
    }

    /// Its directory.
    ///
    /// # Panics
    ///
    /// Never: the directory lives as long as the bed.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("taken only in drop").path()
    }

    /// A path in its directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The cgroup that the test's devices have theirs below.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The directories of this bed's cgroup in every mounted hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                let (target, kind) = (fields.nth(1)?, fields.next()?);
                kind.starts_with("cgroup")
                    .then(|| Path::new(target).join(&self.cgroup))
            })
            .filter(|dir| dir.exists())
            .collect()
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let dir = self.dir().to_string_lossy().into_owned();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let mut below: Vec<PathBuf> = targets
            .filter(|target| target.starts_with(&dir))
            .map(PathBuf::from)
            .collect();
        below.reverse();
        below
    }

    /// Kills what is left in the bed's cgroups and removes them, deepest first.
    fn sweep_cgroup(dir: &Path) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                Self::sweep_cgroup(&entry.path());
            }
        }
        let left = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in left.lines().filter_map(|line| line.parse().ok()) {
            crate::process::signal(pid, libc::SIGKILL);
        }
        let begin = std::time::Instant::now();
        while std::fs::remove_dir(dir).is_err() && dir.exists() && begin.elapsed().as_secs() < 5 {
            std::thread::yield_now();
        }
    }

    fn leftovers(&self) -> Vec<String> {
        let mounts = self
            .mounts()
            .into_iter()
            .map(|path| format!("mount {}", path.display()));
        // A device's parent cgroup may stay while empty; a container's may not.
        let cgroups = self.cgroups().into_iter().filter(|dir| has_container(dir));
        mounts
            .chain(cgroups.map(|dir| format!("cgroup {}", dir.display())))
            .collect()
    }
}

/// Whether a container's cgroup (its name has two dots) is below `dir`.
fn has_container(dir: &Path) -> bool {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| {
            entry.file_type().is_ok_and(|kind| kind.is_dir())
                && (entry.file_name().to_string_lossy().matches('.').count() == 2
                    || has_container(&entry.path()))
        })
}

impl Drop for Bed {
    fn drop(&mut self) {
        let left = self.leftovers();
        for dir in self.cgroups() {
            Self::sweep_cgroup(&dir);
        }
        for mount in self.mounts() {
            let _best_effort = std::process::Command::new("umount")
                .arg("-l")
                .arg(mount)
                .status();
        }
        if std::thread::panicking() {
            if let Some(dir) = self.dir.take() {
                eprintln!(
                    "--- the failed test's files are kept in {}",
                    dir.keep().display()
                );
            }
        } else {
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

/// A small file system of its own, so that it can be filled. Unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    mount: PathBuf,
}

impl SmallDisk {
    /// An ext4 of `bytes`, mounted on `name` in the bed.
    ///
    /// # Panics
    ///
    /// When it cannot be made; `e2fsprogs` and loop devices are needed.
    #[must_use]
    pub fn mount(bed: &Bed, name: &str, bytes: u64) -> Self {
        let (disk, mount) = (bed.path(&format!("{name}.img")), bed.path(name));
        std::fs::create_dir_all(&mount).expect("the bed is writable");
        let file = std::fs::File::create(&disk).expect("the bed is writable");
        file.set_len(bytes).expect("the bed is writable");
        let mut mkfs = std::process::Command::new("mkfs.ext4");
        crate::image::run(mkfs.args(["-q", "-F", "-m", "0"]).arg(&disk), "e2fsprogs");
        let mut command = std::process::Command::new("mount");
        crate::image::run(command.args(["-o", "loop"]).arg(&disk).arg(&mount), "mount");
        Self { mount }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _reported_by_the_bed = std::process::Command::new("umount")
            .arg(&self.mount)
            .status();
    }
}

/// A file system in memory, as devices have it for their run directory. Unmounted when dropped.
#[derive(Debug)]
pub struct MemoryDisk {
    mount: PathBuf,
}

impl MemoryDisk {
    /// A tmpfs on `name` in the bed.
    ///
    /// # Panics
    ///
    /// When it cannot be mounted.
    #[must_use]
    pub fn mount(bed: &Bed, name: &str) -> Self {
        let mount = bed.path(name);
        std::fs::create_dir_all(&mount).expect("the bed is writable");
        let mut command = std::process::Command::new("mount");
        let options = ["-t", "tmpfs", "-o", "nosuid,nodev,mode=0755", "tmpfs"];
        crate::image::run(command.args(options).arg(&mount), "mount");
        Self { mount }
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        let _reported_by_the_bed = std::process::Command::new("umount")
            .arg(&self.mount)
            .status();
    }
}
