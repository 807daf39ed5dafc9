//! Tries the program that watches over each container: becomes it, with a child of its own to wait for. It does not
//! run where it was not built for the processor, or where the file system with the state allows no programs.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{close, dup2, execve, pipe2};

use crate::causes::chain;
use crate::runtime::process::PidFd;
use crate::runtime::rootfs::{Seclusion, mount_scratch};

#[cfg(foreshore_shim)]
static SHIM: &[u8] = include_bytes!(env!("FORESHORE_SHIM"));
#[cfg(not(foreshore_shim))]
static SHIM: &[u8] = b"";

/// One of these exists everywhere; a tmpfs is mounted on it in a private namespace.
const PLACES: [&str; 3] = ["/run", "/tmp", "/mnt"];

/// Above what the shim is given.
const ASIDE: i32 = 64;

/// Becomes the shim, which ends with 0 once its child has; returns why not.
pub(super) fn become_it() -> String {
    let Err(why) = try_it();
    why
}

fn try_it() -> Result<Infallible, String> {
    if SHIM.is_empty() {
        return Err(format!("it is not built for {}", std::env::consts::ARCH));
    }
    let place = PLACES.iter().map(Path::new).find(|place| place.is_dir());
    let place = place.ok_or("no directory to try it in")?;
    let _never_left = Seclusion::enter().map_err(|error| chain(&error))?;
    mount_scratch(place).map_err(|error| chain(&error))?;
    let program = place.join("foreshore-shim");
    let io = |error: io::Error| error.to_string();
    fs::write(&program, SHIM).map_err(io)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o555)).map_err(io)?;
    // Ends at once, since this is no try.
    let child = Command::new("/proc/self/exe")
        .arg(super::SUBCOMMAND)
        .stdout(Stdio::null())
        .spawn()
        .map_err(io)?;
    let pid = i32::try_from(child.id()).map_err(|error| error.to_string())?;
    let ended = PidFd::open(pid).map_err(io)?.into_fd();
    let directory = File::open(place).map_err(io)?;
    hand_over(ended, directory.into()).map_err(io)?;
    let text = |text: String| CString::new(text).map_err(|error| error.to_string());
    let arguments = [
        text("foreshore-shim".to_owned())?,
        text("doctor".to_owned())?,
        text(pid.to_string())?,
        text("4096".to_owned())?,
        text("1".to_owned())?,
        text("doctor.log".to_owned())?,
    ];
    let path = text(program.display().to_string())?;
    let Err(error) = execve::<_, CString>(&path, &arguments, &[]);
    Err(error.to_string())
}

/// Puts the descriptors where the shim expects them: two outputs that have ended, no log directory, the run directory,
/// and the process to wait for.
fn hand_over(ended: OwnedFd, directory: OwnedFd) -> io::Result<()> {
    let (output, end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    drop(end);
    // Nobody's from here on: their numbers may be ones that the shim is given.
    let [output, ended, directory] = [output, ended, directory].map(IntoRawFd::into_raw_fd);
    let aside = |fd: RawFd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(ASIDE));
    let moves = [
        (aside(output)?, 3),
        (aside(output)?, 4),
        (aside(directory)?, 6),
        (aside(ended)?, 7),
    ];
    let _may_be_closed = close(5);
    for (from, to) in moves {
        dup2(from, to)?;
    }
    Ok(())
}
