//! Taking away directories in which container engines have left mounts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;

/// Unmounts whatever is mounted below `path`, and removes it with all it holds. It may be gone already.
///
/// # Errors
///
/// When something can be neither unmounted nor removed.
pub(super) fn clean(path: &Path) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines().rev() {
        let point = line.split(' ').nth(4).unwrap_or_default();
        if Path::new(point).starts_with(path) {
            let output = Command::new("umount").arg(point).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "umount {point}: {}", said.trim());
        }
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
