//! The agent's own program as containers may see it: never writable.
//!
//! Until it executes the user's program, a container's first process runs the agent's program inside the
//! container, and so does every command on its way in. An image can make that last: an entrypoint that is a script for
//! `/proc/self/exe` executes the agent's program once more, with the image's libraries, and root in there could
//! open `/proc/self/exe` for writing later (CVE-2019-5736). So the program is executed through a read-only
//! copy of its mount that is mounted nowhere, and that nobody can therefore remount. Unlike a copy in memory this
//! costs nothing per start, whatever the size of the program.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::mounts::Detached;

/// A program that is executed read-only.
#[derive(Debug)]
pub(crate) struct Program {
    path: PathBuf,
    /// Missing for a script, whose interpreter has to find it by its path. The program that it executes in turn
    /// seals itself.
    sealed: Option<OwnedFd>,
}

impl Program {
    /// Seals the program at `path`. What is executed from then on is this file, also after another one took its
    /// place.
    pub(crate) fn seal(path: &Path) -> io::Result<Self> {
        let mut magic = [0; 2];
        File::open(path)?.read_exact(&mut magic)?;
        let sealed = match &magic {
            b"#!" => None,
            _ => Some(sealed_copy(path)?),
        };
        Ok(Self {
            path: path.to_owned(),
            sealed,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn command(&self) -> Command {
        match &self.sealed {
            None => Command::new(&self.path),
            Some(fd) => {
                // Looked up by the child, which has the descriptor until it executes this.
                let mut command = Command::new(by_descriptor(fd));
                command.arg0(&self.path);
                command
            }
        }
    }
}

fn by_descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn sealed_copy(path: &Path) -> io::Result<OwnedFd> {
    let copy = Detached::copy(path)?;
    copy.read_only()?;
    Ok(copy.into_fd())
}

/// Set for a process that has sealed itself, so that it does so only once.
const SEALED: &str = "FORESHORE_SEALED";

/// Returns when this process runs from a read-only mount; otherwise executes the program again from one.
/// Must be called before anything of the arguments is acted upon.
///
/// # Errors
///
/// When the program cannot be sealed; then nothing of a container may be done by this process.
pub(crate) fn ensure() -> io::Result<()> {
    if is_sealed()? {
        return Ok(());
    }
    if std::env::var_os(SEALED).is_some() {
        return Err(io::Error::other(
            "it is still writable from a read-only mount",
        ));
    }
    let copy = sealed_copy(Path::new("/proc/self/exe"))?;
    let program = CString::new(by_descriptor(&copy))?;
    let arguments = std::env::args_os()
        .map(OsString::into_encoded_bytes)
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
    let environment = [CString::new(format!("{SEALED}=1"))?];
    let Err(error) = nix::unistd::execve(&program, &arguments, &environment);
    Err(error.into())
}

fn is_sealed() -> io::Result<bool> {
    let own = File::open("/proc/self/exe")?;
    Ok(fstatvfs(&own)?.flags().contains(FsFlags::ST_RDONLY))
}
