//! A directory for targets that write, and a canary in it that none may touch.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

/// Stands in the canary's files again and again, and nowhere else.
pub const MARK: &str = "the canary sings";

/// Whether there is something of the canary in it.
#[must_use]
pub fn sings(bytes: &[u8]) -> bool {
    bytes
        .windows(MARK.len())
        .any(|part| part == MARK.as_bytes())
}

/// The environment variable that names the directory to make it in.
pub const DIRECTORY: &str = "FORESHORE_FUZZ_SCRATCH";

/// A directory in memory where the machine has one, removed at the end of a test.
#[derive(Debug)]
pub struct Scratch {
    dir: tempfile::TempDir,
    before: Snapshot,
}

/// What a tree is: paths with type and mode, owner, size, time, and content.
type Snapshot = BTreeMap<PathBuf, (u32, u32, u32, u64, i64, Vec<u8>)>;

impl Scratch {
    /// Makes the directory with `canary/` and, as this process's working directory, `work/`: so `/proc/self/cwd/../canary`
    /// is an absolute path that inputs can name.
    ///
    /// # Panics
    /// When the disk does not allow it.
    #[must_use]
    pub fn new() -> Self {
        // libFuzzer ends its process without a word: whoever starts it names a directory, and removes that.
        let named = std::env::var_os(DIRECTORY).map(PathBuf::from);
        let memory = PathBuf::from("/dev/shm");
        let dir = match named.or_else(|| memory.is_dir().then_some(memory)) {
            Some(parent) => tempfile::tempdir_in(parent),
            None => tempfile::tempdir(),
        };
        let dir = dir.expect("a temporary directory can be made");
        let canary = dir.path().join("canary");
        for path in [&canary.join("inner"), &dir.path().join("work")] {
            fs::create_dir_all(path).expect("a directory can be made");
        }
        for name in ["file", "inner/file"] {
            fs::write(canary.join(name), MARK.repeat(8)).expect("a file can be written");
            let mode = fs::Permissions::from_mode(0o640);
            fs::set_permissions(canary.join(name), mode).expect("a mode can be set");
        }
        symlink("file", canary.join("link")).expect("a link can be made");
        std::env::set_current_dir(dir.path().join("work")).expect("it is a directory");
        let before = snapshot(&canary);
        Self { dir, before }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Asserts that the canary is as it was, and that beside it stand only `names`.
    ///
    /// # Panics
    /// When that is not so.
    pub fn check(&self, names: &[&str]) {
        let canary = snapshot(&self.path().join("canary"));
        assert!(canary == self.before, "the canary was changed: {canary:?}");
        for entry in fs::read_dir(self.path()).expect("it can be listed") {
            let name = entry.expect("it can be listed").file_name();
            let known = name == "canary" || name == "work" || names.iter().any(|n| name == *n);
            assert!(known, "{} was made outside", name.display());
        }
        let mut work = fs::read_dir(self.path().join("work")).expect("it can be listed");
        assert!(work.next().is_none(), "something was made outside");
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Everything below `root`; links are not followed.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn snapshot(root: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    let mut ahead = vec![root.to_owned()];
    while let Some(path) = ahead.pop() {
        let meta = fs::symlink_metadata(&path).expect("it is there");
        let content = if meta.is_dir() {
            ahead.extend(fs::read_dir(&path).expect("it can be listed").map(|entry| {
                let entry = entry.expect("it can be listed");
                entry.path()
            }));
            Vec::new()
        } else if meta.is_symlink() {
            let target = fs::read_link(&path).expect("it can be read");
            target.into_os_string().into_encoded_bytes()
        } else {
            fs::read(&path).expect("it can be read")
        };
        let facts = (
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.size(),
            meta.ctime_nsec() ^ meta.ctime(),
            content,
        );
        found.insert(path, facts);
    }
    found
}
