//! The guest's kernel: Debian's cloud kernel, unpacked from its package and not installed.
//!
//! It has cgroup v2, BPF and ext4 built in; the modules that are missing are put into the guest's first file system.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// The package that depends on the newest cloud kernel.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Modules that the guest needs; what they need in turn is found in them.
const MODULES: [&str; 6] = [
    "overlay",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "loop",
    "bfq",
];

/// A kernel on disk.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What the machine boots.
    pub(crate) image: PathBuf,
    /// Module files in the order in which they can be loaded.
    pub(crate) modules: Vec<PathBuf>,
}

impl Kernel {
    /// Takes the kernel from `cache`, after downloading and unpacking the package there if it holds none.
    ///
    /// # Errors
    ///
    /// When there is none and it cannot be downloaded.
    pub(crate) fn find(cache: &Path, download: bool) -> anyhow::Result<Self> {
        let unpacked = cache.join("kernel");
        if !unpacked.exists() {
            ensure!(
                download,
                "no guest kernel in {}; run cargo xtask guest once without --no-install",
                unpacked.display()
            );
            unpack_newest(cache, &unpacked)?;
        }
        let image = fs::read_dir(unpacked.join("boot"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| name_of(path).starts_with("vmlinuz-"))
            .with_context(|| {
                format!(
                    "no kernel in {0}; remove {0} and run this again",
                    unpacked.display()
                )
            })?;
        let all = files(&unpacked.join("lib/modules"))?;
        Ok(Self {
            image,
            modules: in_order(&all, &MODULES, &|path| {
                fs::read(path).with_context(|| format!("failed to read {}", path.display()))
            })?,
        })
    }
}

fn unpack_newest(cache: &Path, unpacked: &Path) -> anyhow::Result<()> {
    eprintln!("==> downloading the guest's kernel ({NEWEST})");
    let depends = text(Command::new("apt-cache").args(["depends", NEWEST]))?;
    let package = dependency(&depends).with_context(|| {
        format!("this machine's package lists know no {NEWEST}; run apt-get update")
    })?;
    // A fresh directory, so that the one package file in it is the right one.
    let download = tempfile::Builder::new()
        .prefix("kernel-")
        .tempdir_in(cache)
        .with_context(|| format!("failed to make a directory in {}", cache.display()))?;
    text(
        Command::new("apt-get")
            .args(["-qq", "download", package])
            .current_dir(download.path()),
    )?;
    let file = fs::read_dir(download.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download brought no file of {package}"))?;
    let tree = download.path().join("tree");
    text(Command::new("dpkg").arg("-x").arg(&file).arg(&tree))?;
    fs::rename(&tree, unpacked)
        .with_context(|| format!("failed to move the kernel to {}", unpacked.display()))
}

/// The package that a meta package depends on, from `apt-cache depends`.
fn dependency(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
}

/// Runs a command; its output.
pub(crate) fn text(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn name_of(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let entries =
            fs::read_dir(&dir).with_context(|| format!("failed to read {}", dir.display()))?;
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// `wanted` and what they depend on, dependencies first; one that is not there is built in.
fn in_order(
    all: &[PathBuf],
    wanted: &[&str],
    read: &dyn Fn(&Path) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    // Module files and the kernel's idea of their names differ in "-" and "_".
    let plain = |name: &str| name.replace('-', "_");
    let mut open: Vec<(String, bool)> = wanted
        .iter()
        .rev()
        .map(|name| (plain(name), false))
        .collect();
    while let Some((name, ready)) = open.pop() {
        let file = format!("{name}.ko");
        let Some(path) = all.iter().find(|path| plain(name_of(path)) == file) else {
            continue;
        };
        if ready {
            order.push(path.clone());
        } else if seen.insert(name.clone()) {
            open.push((name, true));
            for needed in depends(&read(path)?) {
                open.push((plain(&needed), false));
            }
        }
    }
    Ok(order)
}

/// What a module says it depends on: the `depends=` entry of its `.modinfo` section, where strings end with NUL.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let rest = &module[at + key.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_depend_on_and_once() {
        let all = ["k/a.ko", "k/b-c.ko", "k/d.ko", "k/e.ko"].map(PathBuf::from);
        let read = |path: &Path| {
            Ok(match name_of(path) {
                "a.ko" => b"\0license=GPL\0depends=b_c,builtin,d\0".to_vec(),
                "b-c.ko" => b"\0depends=d\0name=b_c\0".to_vec(),
                _ => b"\0depends=\0".to_vec(),
            })
        };
        let order = in_order(&all, &["a", "b_c", "builtin"], &read).expect("all can be read");
        assert_eq!(order, ["k/d.ko", "k/b-c.ko", "k/a.ko"].map(PathBuf::from));
    }

    #[test]
    fn the_kernel_package_is_the_one_the_meta_package_depends_on() {
        let depends =
            "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-1-cloud-amd64\n  Conflicts: x\n";
        assert_eq!(dependency(depends), Some("linux-image-6.1.0-1-cloud-amd64"));
        assert_eq!(dependency("x\n  Depends: debconf\n"), None);
    }
}
