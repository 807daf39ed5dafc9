//! What the guest is made of: the programs under test, what they need, and busybox for the rest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::archive::Archive;
use super::kernel::{Kernel, text};
use crate::step;

/// The programs under test, built for this machine.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `foreshore-agent`. Tests know it by this path.
    pub(crate) agent: PathBuf,
    /// The agent's unit tests.
    pub(crate) units: PathBuf,
    /// `agent/tests/runtime.rs`.
    pub(crate) runtime: PathBuf,
    /// `agent/tests/device.rs`.
    pub(crate) device: PathBuf,
}

impl Programs {
    /// Builds them, cargo's progress on our stderr, and asks cargo where they are.
    pub(crate) fn build() -> anyhow::Result<Self> {
        // The whole workspace, for its features: `cargo xtask test` has built with those.
        let output = step::cargo(&[
            "test",
            "--workspace",
            "--lib",
            "--bin",
            "foreshore-agent",
            "--test",
            "runtime",
            "--test",
            "device",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start cargo")?;
        ensure!(output.status.success(), "the guest's tests did not build");
        let messages = String::from_utf8_lossy(&output.stdout);
        let find = |kind, name, test| {
            executable(&messages, kind, name, test)
                .with_context(|| format!("cargo built no {kind} {name}"))
        };
        Ok(Self {
            agent: find("bin", "foreshore-agent", false)?,
            units: find("lib", "foreshore_agent", true)?,
            runtime: find("test", "runtime", true)?,
            device: find("test", "device", true)?,
        })
    }
}

/// The file of a target among cargo's messages (the Cargo book, "External tools").
fn executable(messages: &str, kind: &str, name: &str, test: bool) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| {
            message["target"]["name"] == name
                && message["target"]["kind"][0] == kind
                && message["profile"]["test"] == test
        })
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// A guest's file system with its kernel's modules, busybox, and nothing to do yet.
pub(crate) fn base(kernel: &Kernel) -> anyhow::Result<Archive> {
    let mut archive = Archive::default();
    archive.file("/init", 0o755, include_bytes!("init.sh"));
    // The kernel opens it for the first process before anything is mounted.
    archive.device("/dev/console", 5, 1);
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("busybox is missing; install busybox-static")?;
    archive.file("/bin/busybox", 0o755, &read(busybox)?);
    archive.link("/bin/sh", "busybox");
    let mut list = String::new();
    for module in &kernel.modules {
        let name = module.file_name().context("a module has a name")?;
        let path = format!("/guest/modules.d/{}", name.display());
        archive.file(&path, 0o644, &read(module)?);
        list.push_str(&path);
        list.push('\n');
    }
    archive.file("/guest/modules", 0o644, list.as_bytes());
    archive.file(
        "/etc/passwd",
        0o644,
        b"root:x:0:0::/root:/bin/sh\nmosquitto:x:100:100::/:/bin/false\n",
    );
    archive.file("/etc/group", 0o644, b"root:x:0:\nmosquitto:x:100:\n");
    archive.file("/etc/hosts", 0o644, b"127.0.0.1 localhost\n");
    archive.file("/etc/resolv.conf", 0o644, b"nameserver 192.0.2.1\n");
    Ok(archive)
}

/// Adds a program at `path`, without its debug information, and the libraries it needs.
pub(crate) fn add_program(archive: &mut Archive, program: &Path, path: &str) -> anyhow::Result<()> {
    let stripped = tempfile::NamedTempFile::new().context("failed to make a temporary file")?;
    text(
        Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(stripped.path())
            .arg(program),
    )?;
    archive.file(path, 0o755, &read(stripped.path())?);
    for library in libraries(&text(Command::new("ldd").arg(program))?) {
        archive.file(library, 0o755, &read(Path::new(library))?);
    }
    Ok(())
}

/// The files that ldd(1) names.
fn libraries(ldd: &str) -> Vec<&str> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .collect()
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_found_and_the_loader() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries(ldd),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert!(libraries("\tstatically linked\n").is_empty());
    }

    #[test]
    fn a_test_and_a_program_of_one_name_are_told_apart() {
        let messages = concat!(
            r#"{"target":{"kind":["bin"],"name":"a"},"profile":{"test":true},"executable":"/t"}"#,
            "\nnot json\n",
            r#"{"target":{"kind":["bin"],"name":"a"},"profile":{"test":false},"executable":"/p"}"#,
            "\n",
        );
        assert_eq!(executable(messages, "bin", "a", false), Some("/p".into()));
        assert_eq!(executable(messages, "bin", "a", true), Some("/t".into()));
        assert_eq!(executable(messages, "lib", "a", true), None);
    }
}
