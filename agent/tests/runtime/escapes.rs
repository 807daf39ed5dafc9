//! Known ways out of containers, tried on real ones, with user namespaces and without. Each must fail, and nothing on the
//! device may have changed.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use foreshore_agent::runtime::oci::{OciRuntime, UserNamespaces};
use foreshore_agent::runtime::{ContainerSpec, Runtime as _, StartError};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use crate::bed::{Bed, LONG, exit_of, find, pid_of, wait_for};

const MODES: [UserNamespaces; 2] = [UserNamespaces::Auto, UserNamespaces::Off];

/// How many ways `attempts.c` knows.
const ATTEMPTS: usize = 122;

/// What lies outside, to be found unchanged.
struct Outside {
    bed: Bed,
    /// A copy: whoever gets to write it must not write the real one.
    agent: PathBuf,
    agent_bytes: Vec<u8>,
    file: PathBuf,
    process: Child,
    socket: String,
    _listener: UnixListener,
    memory: i32,
    kernel: Vec<(String, String)>,
    mounts: String,
}

impl Outside {
    fn new() -> Self {
        own_mounts();
        let bed = Bed::new();
        compile(&["-static"], "attempts.c", &bed.layer.join("escape"));
        std::fs::copy(bed.layer.join("escape"), bed.layer.join("setuid")).unwrap();
        let setuid = std::fs::Permissions::from_mode(0o4755);
        std::fs::set_permissions(bed.layer.join("setuid"), setuid).unwrap();
        let volume = bed.state_dir().join("volumes/shop/evil");
        std::fs::create_dir_all(&volume).unwrap();
        let (major, minor) = disk();
        let disk = makedev(major, minor);
        for node in [bed.layer.join("node-of-image"), volume.join("node")] {
            mknod(&node, SFlag::S_IFBLK, Mode::from_bits_truncate(0o666), disk).unwrap();
        }
        let agent = bed.dir.path().join("agent");
        std::fs::copy(env!("CARGO_BIN_EXE_foreshore-agent"), &agent).unwrap();
        let file = bed.dir.path().join("outside");
        std::fs::write(&file, "untouched").unwrap();
        // Numbers that no process inside has.
        if std::process::id() < 2000 {
            std::fs::write("/proc/sys/kernel/ns_last_pid", "2000").unwrap();
        }
        let process = Command::new("sleep")
            .arg("1000")
            .env("OF_ANOTHER", "secret")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let socket = format!("foreshore-escapes-{}-{}", std::process::id(), bed.cgroup);
        let address = SocketAddr::from_abstract_name(&socket).unwrap();
        #[expect(unsafe_code, reason = "shmget(2)")]
        // SAFETY: takes numbers only.
        let memory = unsafe { libc::shmget(0x4653_4553, 4096, libc::IPC_CREAT | 0o666) };
        assert!(memory >= 0, "shmget: {}", std::io::Error::last_os_error());
        Self {
            agent_bytes: std::fs::read(&agent).unwrap(),
            agent,
            file,
            process,
            _listener: UnixListener::bind_addr(&address).unwrap(),
            socket,
            memory,
            kernel: kernel(),
            mounts: mounts(),
            bed,
        }
    }

    fn runtime(&self, mode: UserNamespaces) -> OciRuntime {
        self.bed.runtime_of(&self.agent, mode)
    }

    /// The arguments of `attempts.c`.
    fn command(&self) -> Vec<String> {
        let (major, minor) = disk();
        vec![
            "/escape".to_owned(),
            self.process.id().to_string(),
            self.file.to_str().unwrap().to_owned(),
            self.socket.clone(),
            major.to_string(),
            minor.to_string(),
        ]
    }

    fn assert_untouched(&mut self) {
        assert_eq!(kernel(), self.kernel, "the kernel's settings changed");
        assert!(
            std::fs::read(&self.agent).unwrap() == self.agent_bytes,
            "the agent's program changed"
        );
        assert_eq!(std::fs::read_to_string(&self.file).unwrap(), "untouched");
        assert_eq!(
            self.process.try_wait().unwrap(),
            None,
            "the process outside has ended"
        );
        assert_eq!(mounts(), self.mounts, "mounts got out");
        assert!(!Path::new("/tmp/evil").exists());
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        #[expect(unsafe_code, reason = "shmctl(2)")]
        // SAFETY: removing takes no buffer.
        unsafe {
            libc::shmctl(self.memory, libc::IPC_RMID, std::ptr::null_mut());
        }
    }
}

/// Gives this thread, and all that it starts, mounts of its own: what other tests and programs mount meanwhile is not
/// seen here. They are shared, as systemd has it, so that what a container lets out would get here.
fn own_mounts() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    for kind in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | kind, nothing).unwrap();
    }
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

/// Major and minor number of the first disk of this machine.
fn disk() -> (u64, u64) {
    let partitions = std::fs::read_to_string("/proc/partitions").unwrap();
    let mut fields = partitions
        .lines()
        .nth(2)
        .expect("a machine has a disk")
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0));
    (fields.next().unwrap(), fields.next().unwrap())
}

/// What containers would like to change, as it is now.
fn kernel() -> Vec<(String, String)> {
    let paths = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/panic",
        "/proc/sys/kernel/hostname",
        "/proc/sys/kernel/domainname",
        "/proc/sys/vm/overcommit_memory",
        "/proc/irq/default_smp_affinity",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/memory/release_agent",
        "/sys/fs/cgroup/cpu/release_agent",
    ];
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    paths
        .iter()
        .map(|path| ((*path).to_owned(), read(path)))
        .collect()
}

fn compile(options: &[&str], source: &str, to: &Path) {
    // The guest of `cargo xtask guest` has no compiler.
    let ready = Path::new("/guest/attempts").join(to.file_name().unwrap());
    if ready.exists() {
        std::fs::copy(ready, to).unwrap();
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/runtime/escapes")
        .join(source);
    let status = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-o"])
        .arg(to)
        .args(options)
        .arg(source)
        .status()
        .expect("cc is installed wherever Rust links programs");
    assert!(status.success(), "cc: {status}");
}

/// Fails unless every attempt was made, and none got through.
fn assert_refused(log: &str, what: &str) {
    let through: Vec<&str> = log
        .lines()
        .filter(|line| line.ends_with("SUCCEEDED"))
        .collect();
    assert_eq!(through, Vec::<&str>::new(), "{what}");
    let answered = log
        .lines()
        .filter(|line| line.contains(" refused ") || line.contains(" killed "))
        .count();
    assert_eq!(answered, ATTEMPTS, "{what}: {log}");
    assert!(log.contains(&format!("tried {ATTEMPTS}\n")), "{what}");
    if cfg!(target_arch = "x86_64") {
        assert!(log.contains("foreign_calls killed 31"), "{what}: {log}");
    }
}

#[tokio::test]
async fn no_attempt_gets_out() {
    let mut outside = Outside::new();
    for mode in MODES {
        let runtime = outside.runtime(mode);
        let neighbour = outside.bed.spec(
            "neighbour",
            &json!(["sleep", "1000"]),
            json!({"environment": {"OF_ANOTHER": "secret"}}),
        );
        runtime.start(&neighbour).await.unwrap();
        for user in ["root", "app"] {
            let more = json!({"user": user, "volumes": ["evil:/volume"], "tmpfs": ["/tmp"]});
            let what = format!("{user}, user namespaces {mode:?}");

            // As the first process.
            let _ = std::fs::remove_file(outside.bed.log_file("web"));
            let spec = outside
                .bed
                .spec("web", &json!(outside.command()), more.clone());
            runtime.start(&spec).await.unwrap();
            assert_eq!(exit_of(&runtime, &spec.id).await.code, 0, "{what}");
            assert_refused(&outside.bed.log("web"), &what);
            runtime.remove(&spec.id).await.unwrap();

            // As a command.
            let spec = outside.bed.spec("web", &json!(["sleep", "1000"]), more);
            runtime.start(&spec).await.unwrap();
            let line = format!("{} > /tmp/log", outside.command().join(" "));
            let command = ["sh", "-c", &line].map(str::to_owned);
            // It kills its shell in the end.
            let _ = runtime.exec(&spec.id, &command, LONG).await;
            let pid = pid_of(&runtime, &spec.id).await;
            let log = std::fs::read_to_string(format!("/proc/{pid}/root/tmp/log")).unwrap();
            assert_refused(&log, &format!("{what}, a command"));
            runtime.remove(&spec.id).await.unwrap();
        }
        assert!(find(&runtime, &neighbour.id).await.is_some());
        runtime.remove(&neighbour.id).await.unwrap();
        outside.assert_untouched();
    }
    outside.bed.assert_clean();
}

#[tokio::test]
async fn commands_on_their_way_in_cannot_be_overwritten() {
    let mut outside = Outside::new();
    for mode in MODES {
        let runtime = outside.runtime(mode);
        let spec = outside
            .bed
            .spec("web", &json!(["/escape", "watch"]), json!({}));
        runtime.start(&spec).await.unwrap();
        for _ in 0..30 {
            let command = ["true".to_owned()];
            assert_eq!(runtime.exec(&spec.id, &command, LONG).await.unwrap(), 0);
        }
        assert_eq!(outside.bed.log("web"), "", "{mode:?}");
        runtime.remove(&spec.id).await.unwrap();
        outside.assert_untouched();
    }
}

/// The image executes the agent's program once more, with a library of its own in it.
#[tokio::test]
async fn the_agents_program_is_read_only_also_for_itself() {
    let mut outside = Outside::new();
    let layer = &outside.bed.layer;
    compile(&["-shared", "-fPIC"], "preload.c", &layer.join("evil.so"));
    std::fs::write(layer.join("entry"), "#!/proc/self/exe\n").unwrap();
    std::fs::set_permissions(layer.join("entry"), std::fs::Permissions::from_mode(0o755)).unwrap();
    // What ldd(1) does.
    let libraries = Command::new(&outside.agent)
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .output()
        .unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    let paths = libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    for path in paths.map(Path::new) {
        let to = layer.join(path.strip_prefix("/").unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(path, to).unwrap();
    }
    let dynamic = libraries.contains("=>");
    for mode in MODES {
        let runtime = outside.runtime(mode);
        let more = json!({"environment": {"LD_PRELOAD": "/evil.so"}});
        let spec = outside.bed.spec("web", &json!(["/entry"]), more);
        let _ = std::fs::remove_file(outside.bed.log_file("web"));
        runtime.start(&spec).await.unwrap();
        exit_of(&runtime, &spec.id).await;
        let log = outside.bed.log("web");
        // Root of a user namespace does not even get as far as to the read-only mount, but on Linux 6.1 it does.
        let refused: &[i32] = match mode {
            UserNamespaces::Auto => &[libc::EACCES, libc::EROFS],
            UserNamespaces::Off => &[libc::EROFS],
        };
        let refused = refused.iter().map(|code| format!("refused {code}\n"));
        assert!(
            refused.into_iter().any(|refused| log == refused) || !dynamic && log.is_empty(),
            "{mode:?}: {log}"
        );
        runtime.remove(&spec.id).await.unwrap();
        outside.assert_untouched();
    }
}

/// Starts it, and says why not or what it logged.
async fn outcome(bed: &Bed, runtime: &OciRuntime, spec: &ContainerSpec) -> Result<String, String> {
    let _ = std::fs::remove_file(bed.log_file("web"));
    match runtime.start(spec).await {
        Ok(()) => {
            exit_of(runtime, &spec.id).await;
            runtime.remove(&spec.id).await.unwrap();
            Ok(bed.log("web"))
        }
        Err(StartError::Refused(message) | StartError::Failed { message, .. }) => Err(message),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn links_where_mounts_go_lead_nowhere_outside() {
    let mut outside = Outside::new();
    let bed = &outside.bed;
    // The image's link, what is mounted where, and what comes of it: a log or a refusal.
    let cases: [(&str, &str, &str, Result<&str, &str>); 13] = [
        ("data", "/etc", "/data", Ok("/etc ")),
        ("data", "../../../../srv", "/data", Ok("/srv ")),
        ("data", "/bin/../srv/new", "/data", Err("leads to nowhere")),
        ("data", "../../..", "/data", Err("leads to /")),
        ("data", "/proc", "/data", Err("leads to")),
        ("data", "/proc/self/attr", "/data", Err("leads to nowhere")),
        (
            "data",
            "/proc/self/fd/3",
            "/data/x",
            Err("leads to nowhere"),
        ),
        ("data", "/dev", "/data", Err("leads to")),
        ("data", "/dev", "/data/shm", Ok("/dev/shm ")),
        ("data", "/dev", "/data/null", Err("leads to /dev/null")),
        ("data", "data", "/data", Err("leads to")),
        ("data", "/bin/busybox", "/data/x", Err("leads to")),
        ("srv/in", "../../../../..", "/srv/in/etc", Ok("/etc ")),
    ];
    for mode in MODES {
        let runtime = outside.runtime(mode);
        for (number, (link, to, target, expected)) in cases.iter().enumerate() {
            let layer = bed.dir.path().join(format!("links-{number}"));
            let link = layer.join(link);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            // What an image can hold at these places, besides nothing.
            for dir in ["dev", "proc", "sys"] {
                std::fs::create_dir_all(layer.join(dir)).unwrap();
            }
            let _ = std::os::unix::fs::symlink(to, &link);
            for more in [
                json!({"volumes": [format!("data:{target}")]}),
                json!({"tmpfs": [*target]}),
            ] {
                let line = "while read _ _ _ _ p _; do echo \"$p \"; done < /proc/self/mountinfo";
                let mut spec = bed.shell(line, more.clone());
                spec.layers.push(layer.clone());
                let came = outcome(bed, &runtime, &spec).await;
                let as_expected = match (&came, expected) {
                    (Ok(log), Ok(part)) | (Err(log), Err(part)) => log.contains(part),
                    _ => false,
                };
                assert!(as_expected, "{link:?} -> {to}, {more}: {came:?}");
            }
        }
    }
    bed.assert_clean();
    outside.assert_untouched();
}

#[tokio::test]
async fn images_cannot_take_the_place_of_what_is_the_kernels() {
    let mut outside = Outside::new();
    let bed = &outside.bed;
    for mode in MODES {
        let runtime = outside.runtime(mode);
        for name in ["dev", "proc", "sys"] {
            for kind in ["link", "absolute link", "file"] {
                let layer = bed.dir.path().join(format!("{name}-{kind}"));
                std::fs::create_dir_all(&layer).unwrap();
                let path = layer.join(name);
                match kind {
                    "link" => drop(std::os::unix::fs::symlink("../../../tmp", &path)),
                    "absolute link" => drop(std::os::unix::fs::symlink(&bed.layer, &path)),
                    _ => std::fs::write(&path, "").unwrap(),
                }
                let mut spec = bed.shell("true", json!({}));
                spec.layers.push(layer);
                let refused = outcome(bed, &runtime, &spec).await.unwrap_err();
                assert!(
                    refused.contains("is not a directory"),
                    "{name} {kind}: {refused}"
                );
            }
        }
        // Files and links at places that are masked or made: the kernel's are over them.
        let layer = bed.dir.path().join("shadows");
        for (path, to) in [
            ("dev/null", "/etc/passwd"),
            ("dev/ptmx", "/etc/passwd"),
            ("dev/pts", "/etc"),
            ("dev/shm", "/etc"),
            ("dev/fd", "/etc"),
            ("proc/kcore", "/etc/passwd"),
            ("proc/sys", "/etc"),
            ("sys/firmware", "/etc"),
        ] {
            let path = layer.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = std::os::unix::fs::symlink(to, path);
        }
        let line = "test -c /dev/null && test -d /dev/pts && ! test -L /dev/pts && grep -q root: /etc/passwd \
                    && ! test -L /proc/sys && echo whole";
        let mut spec = bed.shell(line, json!({}));
        spec.layers.push(layer);
        assert_eq!(
            outcome(bed, &runtime, &spec).await,
            Ok("whole\n".to_owned())
        );
    }
    outside.assert_untouched();
}

/// CVE-2024-21626: a working directory that is a descriptor which was forgotten open.
#[tokio::test]
async fn no_working_directory_is_outside() {
    let mut outside = Outside::new();
    let bed = &outside.bed;
    let found = format!(
        "test -e ../../../../../../../../..{} && echo SUCCEEDED; pwd",
        outside.file.display()
    );
    for mode in MODES {
        let runtime = outside.runtime(mode);
        for fd in 0..24 {
            let layer = bed.dir.path().join(format!("cwd-{fd}"));
            std::fs::create_dir_all(&layer).unwrap();
            let _ = std::os::unix::fs::symlink(format!("/proc/self/fd/{fd}"), layer.join("work"));
            for dir in ["/work".to_owned(), format!("/proc/self/fd/{fd}")] {
                let mut spec = bed.shell(&found, json!({"working_dir": dir}));
                spec.layers.push(layer.clone());
                let came = outcome(bed, &runtime, &spec).await;
                assert!(
                    came.as_ref().map_or(true, |log| !log.contains("SUCCEEDED")),
                    "{dir}, {mode:?}: {came:?}"
                );
                assert!(
                    !dir.starts_with("/proc") || came.is_err(),
                    "{dir}: {came:?}"
                );
            }
        }
    }
    outside.assert_untouched();
}

/// A container changes a volume while another one of the same app is started with a mount inside that volume.
#[tokio::test]
async fn a_volume_that_changes_under_a_start_misleads_no_mount() {
    let mut outside = Outside::new();
    let bed = &outside.bed;
    let (mut started, mut failed) = (0, 0);
    for mode in MODES {
        let runtime = outside.runtime(mode);
        let line = "cd /data; while :; do for to in /proc /proc/sys ../etc /dev ../../../../..; do \
                    mkdir -p inner; mv -T inner dir 2>/dev/null; ln -s $to inner; \
                    rm -f inner; mv -T dir inner 2>/dev/null; done; done";
        let mut racing = bed.shell(line, json!({"volumes": ["data:/data"]}));
        racing.id.service = "racer".parse().unwrap();
        runtime.start(&racing).await.unwrap();
        let inner = bed.state_dir().join("volumes/shop/data");
        wait_for("the race is on", || async {
            inner.join("inner").symlink_metadata().is_ok()
        })
        .await;
        for _ in 0..25 {
            let more = json!({"volumes": ["data:/data", "other:/data/inner"]});
            let spec = bed.spec("web", &json!(["sleep", "1000"]), more);
            match runtime.start(&spec).await {
                Err(_) => failed += 1,
                Ok(()) => {
                    started += 1;
                    let pid = pid_of(&runtime, &spec.id).await;
                    let mounts = format!("/proc/{pid}/mountinfo");
                    let mounts = std::fs::read_to_string(mounts).unwrap();
                    let over = |point: &str| {
                        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
                        points.filter(|is| *is == point).count()
                    };
                    // The directory it is on may have another name by now, or be gone and the mount with it.
                    let other = mounts
                        .lines()
                        .find(|line| line.contains("/volumes/shop/other "));
                    assert!(
                        other.is_none_or(|line| line.contains(" /data/")),
                        "{mounts}"
                    );
                    for (point, count) in [
                        ("/proc", 1),
                        ("/proc/sys", 1),
                        ("/dev", 1),
                        ("/etc", 0),
                        ("/", 1),
                    ] {
                        assert_eq!(over(point), count, "{point} in {mounts}");
                    }
                    runtime.remove(&spec.id).await.unwrap();
                }
            }
        }
        runtime.remove(&racing.id).await.unwrap();
    }
    println!("{started} started, {failed} failed");
    assert!(started + failed == 50);
    bed.assert_clean();
    outside.assert_untouched();
}
