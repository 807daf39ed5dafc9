//! Images for the tests, built by `umoci` around Debian's static busybox.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Bed;
use crate::registry::Login;

/// Builds images in one OCI layout.
#[derive(Debug)]
pub struct Builder {
    layout: PathBuf,
    scratch: PathBuf,
}

impl Builder {
    /// A fresh layout in the bed.
    ///
    /// # Panics
    ///
    /// When `umoci` is missing.
    #[must_use]
    pub fn new(bed: &Bed) -> Self {
        let builder = Self {
            layout: bed.path("layout"),
            scratch: bed.path("scratch"),
        };
        run(
            Command::new("umoci")
                .arg("init")
                .arg("--layout")
                .arg(&builder.layout),
            "umoci",
        );
        builder
    }

    /// An image with busybox, whose `fill` may add files to its root, and whose `config` is a list of
    /// `umoci config` arguments.
    pub fn image(&self, tag: &str, config: &[&str], fill: impl FnOnce(&Path)) {
        let reference = format!("{}:{tag}", self.layout.display());
        let bundle = self.scratch.join(tag);
        std::fs::create_dir_all(&self.scratch).expect("the bed is writable");
        run(
            Command::new("umoci").args(["new", "--image", &reference]),
            "umoci",
        );
        run(
            Command::new("umoci")
                .args(["unpack", "--image", &reference])
                .arg(&bundle),
            "umoci",
        );
        let root = bundle.join("rootfs");
        std::fs::create_dir_all(root.join("bin")).expect("the bed is writable");
        std::fs::create_dir_all(root.join("tmp")).expect("the bed is writable");
        std::fs::create_dir_all(root.join("etc")).expect("the bed is writable");
        std::fs::copy("/bin/busybox", root.join("bin/busybox"))
            .expect("/bin/busybox is there; install busybox-static, or run cargo xtask test");
        for applet in [
            "sh", "httpd", "sleep", "cat", "ls", "id", "env", "dd", "true", "false", "nc", "touch",
            "echo", "head", "tail", "wc", "mkdir", "rm", "test", "date", "kill", "yes",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))
                .expect("a fresh root");
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n",
        )
        .expect("writable");
        std::fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\n").expect("writable");
        fill(&root);
        run(
            Command::new("umoci")
                .args(["repack", "--image", &reference])
                .arg(&bundle),
            "umoci",
        );
        run(
            Command::new("umoci")
                .args(["config", "--image", &reference])
                .args(config),
            "umoci",
        );
        std::fs::remove_dir_all(&bundle).expect("the bundle is ours");
    }

    /// A web server on port 8080 that answers `/version` with `version` and, if `ready`, `/ready` with 200.
    pub fn web(&self, tag: &str, version: &str, ready: bool) {
        let config = [
            "--config.entrypoint",
            "/bin/httpd",
            "--config.cmd",
            "-f",
            "--config.cmd",
            "-p",
            "--config.cmd",
            "8080",
            "--config.cmd",
            "-h",
            "--config.cmd",
            "/www",
        ];
        self.image(tag, &config, |root| {
            std::fs::create_dir_all(root.join("www")).expect("writable");
            std::fs::write(root.join("www/version"), version).expect("writable");
            if ready {
                std::fs::write(root.join("www/ready"), "yes").expect("writable");
            }
        });
    }

    /// Where the layout is.
    #[must_use]
    pub fn layout(&self) -> &Path {
        &self.layout
    }

    /// Copies `tag` to a plain-HTTP registry; the reference there.
    #[must_use]
    pub fn push(&self, tag: &str, host: &str, name: &str) -> String {
        self.push_with(tag, host, name, &[])
    }

    /// [`Self::push`] as somebody; the reference there.
    #[must_use]
    pub fn push_as(&self, login: Login, tag: &str, host: &str, name: &str) -> String {
        let login = format!("{}:{}", login.user, login.password);
        self.push_with(tag, host, name, &["--dest-creds", &login])
    }

    fn push_with(&self, tag: &str, host: &str, name: &str, options: &[&str]) -> String {
        let (source, target) = (
            format!("oci:{}:{tag}", self.layout.display()),
            format!("{host}/{name}"),
        );
        let mut command = Command::new("skopeo");
        command.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
            &source,
        ]);
        command.args(options);
        run(command.arg(format!("docker://{target}")), "skopeo");
        target
    }

    /// Writes `tag` as an OCI archive.
    #[must_use]
    pub fn archive(&self, tag: &str) -> PathBuf {
        let path = self.scratch.join(format!("{tag}.tar"));
        std::fs::create_dir_all(&self.scratch).expect("the bed is writable");
        let (source, target) = (
            format!("oci:{}:{tag}", self.layout.display()),
            format!("oci-archive:{}:{tag}", path.display()),
        );
        run(
            Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet", &source, &target]),
            "skopeo",
        );
        path
    }
}

/// Runs a command to its end.
///
/// # Panics
///
/// When it fails; `package` names what to install if it is missing.
pub fn run(command: &mut Command, package: &str) {
    let output = command.output().unwrap_or_else(|error| {
        panic!("failed to run {command:?}: {error}; install {package}, or run cargo xtask test")
    });
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
