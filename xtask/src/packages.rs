//! What the tests need from Debian, and why; installed where that is possible.

use std::path::Path;
use std::process::{Command, Stdio};

/// A Debian package that tests use.
#[derive(Debug)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: &'static str,
    /// A file it brings.
    file: &'static str,
    /// What it is for.
    why: &'static str,
}

/// Everything `cargo xtask test` needs beyond a Rust toolchain.
pub(crate) const FOR_TESTS: &[Package] = &[
    Package {
        name: "docker-registry",
        file: "/usr/bin/docker-registry",
        why: "the registry that images are pulled from",
    },
    Package {
        name: "skopeo",
        file: "/usr/bin/skopeo",
        why: "copies images into that registry and out of the hub's",
    },
    Package {
        name: "umoci",
        file: "/usr/bin/umoci",
        why: "builds the images, and unpacks them for comparison",
    },
    Package {
        name: "podman",
        file: "/usr/bin/podman",
        why: "pushes to the hub's registry",
    },
    Package {
        name: "docker.io",
        file: "/usr/sbin/dockerd",
        why: "pushes to the hub's registry",
    },
    Package {
        name: "buildah",
        file: "/usr/bin/buildah",
        why: "pushes to the hub's registry",
    },
    Package {
        name: "runc",
        file: "/usr/sbin/runc",
        why: "what podman wants to see before it does anything",
    },
    Package {
        name: "mosquitto",
        file: "/usr/sbin/mosquitto",
        why: "the second broker of the contract suite",
    },
    Package {
        name: "prometheus",
        file: "/usr/bin/prometheus",
        why: "judges waves with a metric",
    },
    Package {
        name: "busybox-static",
        file: "/bin/busybox",
        why: "what runs inside the test containers",
    },
    Package {
        name: "zstd",
        file: "/usr/bin/zstd",
        why: "layers in the compression that not every tool writes",
    },
    Package {
        name: "openssl",
        file: "/usr/bin/openssl",
        why: "certificates for the registry with TLS",
    },
    Package {
        name: "e2fsprogs",
        file: "/sbin/mkfs.ext4",
        why: "small file systems that tests fill up",
    },
    Package {
        name: "iproute2",
        file: "/sbin/ip",
        why: "network namespaces",
    },
    Package {
        name: "util-linux",
        file: "/usr/bin/nsenter",
        why: "asking containers from inside their network",
    },
    Package {
        name: "pkg-config",
        file: "/usr/bin/pkg-config",
        why: "builds of libraries with C parts",
    },
    Package {
        name: "gcc",
        file: "/usr/bin/gcc",
        why: "the bundled SQLite",
    },
    Package {
        name: "g++",
        file: "/usr/bin/g++",
        why: "libFuzzer",
    },
];

/// What `cargo xtask guest` needs beyond what the tests need.
pub(crate) const FOR_GUEST: &[Package] = &[
    Package {
        name: "qemu-system-x86",
        file: "/usr/bin/qemu-system-x86_64",
        why: "the machine with nothing but cgroup v2",
    },
    Package {
        name: "busybox-static",
        file: "/bin/busybox",
        why: "what the guest has for a system",
    },
    Package {
        name: "mosquitto",
        file: "/usr/sbin/mosquitto",
        why: "the broker of the device's tests",
    },
    Package {
        name: "e2fsprogs",
        file: "/sbin/mkfs.ext4",
        why: "the guest's disk",
    },
    Package {
        name: "util-linux",
        file: "/usr/bin/setpriv",
        why: "ends the guest with its task",
    },
    Package {
        name: "binutils",
        file: "/usr/bin/strip",
        why: "small programs for the guest",
    },
];

/// What `cargo xtask fuzz` needs.
pub(crate) const FOR_FUZZ: &[Package] = &[
    Package {
        name: "g++",
        file: "/usr/bin/g++",
        why: "libFuzzer",
    },
    Package {
        name: "gcc",
        file: "/usr/bin/gcc",
        why: "linking",
    },
];

/// What `cargo xtask bench` compares with.
pub(crate) const FOR_BENCH: &[Package] = &[
    Package {
        name: "docker.io",
        file: "/usr/sbin/dockerd",
        why: "a peer in the container lifecycle, in memory and in pulling",
    },
    Package {
        name: "podman",
        file: "/usr/bin/podman",
        why: "a peer in pulling",
    },
    Package {
        name: "skopeo",
        file: "/usr/bin/skopeo",
        why: "a peer in pulling",
    },
    Package {
        name: "umoci",
        file: "/usr/bin/umoci",
        why: "makes the image that is pulled, and unpacks it as a peer",
    },
    Package {
        name: "docker-registry",
        file: "/usr/bin/docker-registry",
        why: "where it is pulled from",
    },
    Package {
        name: "rdiff",
        file: "/usr/bin/rdiff",
        why: "a peer of deltas",
    },
    Package {
        name: "conmon",
        file: "/usr/bin/conmon",
        why: "a peer of the shim",
    },
    Package {
        name: "busybox-static",
        file: "/bin/busybox",
        why: "what runs inside the peers' containers",
    },
    Package {
        name: "crun",
        file: "/usr/bin/crun",
        why: "a peer in the container lifecycle",
    },
    Package {
        name: "runc",
        file: "/usr/sbin/runc",
        why: "a peer in the container lifecycle",
    },
];

/// Installs what is missing, or says what a person must install.
///
/// # Errors
///
/// With the names of packages that are still missing.
pub(crate) fn install(packages: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<&Package> = packages
        .iter()
        .filter(|package| !package.is_there())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("==> installing Debian packages that are missing:");
    for package in &missing {
        eprintln!("    {:<18} {}", package.name, package.why);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if crate::is_root() {
        let _lists_may_be_fresh = apt(&["update"], &[]);
        let _judged_by_what_is_there =
            apt(&["install", "--yes", "--no-install-recommends"], &names);
    }
    check(packages)
}

/// Says what a person must install.
///
/// # Errors
///
/// With the names of packages that are missing.
pub(crate) fn check(packages: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .filter(|package| !package.is_there())
        .map(|package| package.name)
        .collect();
    anyhow::ensure!(
        missing.is_empty(),
        "missing: {0}; install them: apt-get install {0}",
        missing.join(" ")
    );
    Ok(())
}

fn apt(verb: &[&str], names: &[&str]) -> std::io::Result<std::process::ExitStatus> {
    Command::new("apt-get")
        .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
        .args(verb)
        .args(names)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Packages with a daemon (mosquitto, docker-registry) must not start it here.
        .env("RUNLEVEL", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
}

impl Package {
    /// Debian merged `/usr`, so `/bin/x`, `/usr/bin/x` and `/usr/sbin/x` all count.
    fn is_there(&self) -> bool {
        let name = Path::new(self.file)
            .file_name()
            .expect("every file has a name");
        ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(name).exists())
    }
}
