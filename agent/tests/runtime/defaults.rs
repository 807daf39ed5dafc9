//! Every default of a container's confinement, looked at for its first process and for a command run inside:
//! from outside in `/proc/PID`, from inside by a shell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use foreshore_agent::runtime::Runtime as _;
use serde_json::json;

use crate::bed::{Bed, LONG, pid_of, wait_for};

/// What the kernel says about a process of a container.
struct Facts {
    pid: i32,
    status: BTreeMap<String, String>,
    limits: String,
    environment: String,
    oom_score_adj: String,
    /// Mount point, options of the mount, propagation, kind of file system.
    mounts: Vec<Mount>,
    descriptors: Vec<(i32, String)>,
}

struct Mount {
    point: String,
    options: BTreeSet<String>,
    propagation: String,
    kind: String,
}

impl Facts {
    fn of(pid: i32) -> Self {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let status = read("status");
        let status = status.lines().filter_map(|line| line.split_once(':'));
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        Self {
            pid,
            status: status
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
            limits: read("limits"),
            environment: read("environ"),
            oom_score_adj: read("oom_score_adj").trim().to_owned(),
            mounts: read("mountinfo").lines().map(Mount::parse).collect(),
            descriptors: descriptors
                .flatten()
                .filter_map(|entry| {
                    // One that goes with the execution may be gone by now.
                    let target = std::fs::read_link(entry.path()).ok()?;
                    let number = entry.file_name().to_str().unwrap().parse().unwrap();
                    Some((number, target.to_str().unwrap().to_owned()))
                })
                .collect(),
        }
    }

    fn status(&self, name: &str) -> &str {
        self.status.get(name).map_or("", String::as_str)
    }

    fn mount(&self, point: &str) -> Option<&Mount> {
        self.mounts.iter().rfind(|mount| mount.point == point)
    }

    fn exists(&self, path: &str) -> bool {
        std::path::Path::new(&format!("/proc/{}/root{path}", self.pid)).exists()
    }

    fn limit(&self, name: &str) -> Vec<&str> {
        let line = self.limits.lines().find(|line| line.starts_with(name));
        line.unwrap_or_default()
            .trim_start_matches(name)
            .split_whitespace()
            .take(2)
            .collect()
    }

    fn namespace(pid: &str, name: &str) -> String {
        let link = std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        link.to_str().unwrap().to_owned()
    }
}

impl Mount {
    fn parse(line: &str) -> Self {
        let (own, device) = line.split_once(" - ").unwrap();
        let fields: Vec<&str> = own.split(' ').collect();
        Self {
            point: fields[4].to_owned(),
            options: fields[5].split(',').map(str::to_owned).collect(),
            propagation: fields[6..].join(" "),
            kind: device.split(' ').next().unwrap().to_owned(),
        }
    }

    fn has(&self, wanted: &[&str]) -> bool {
        wanted.iter().all(|option| self.options.contains(*option))
    }
}

/// A default and whether it holds.
type Promise = (&'static str, fn(&Facts) -> bool);

const NO_CAPABILITIES: &str = "0000000000000000";
/// CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, NET_BIND_SERVICE.
const CAPABILITIES: &str = "00000000000004eb";

const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const DEFAULTS: &[Promise] = &[
    ("effective capabilities", |facts| {
        facts.status("CapEff") == CAPABILITIES
    }),
    ("permitted capabilities", |facts| {
        facts.status("CapPrm") == CAPABILITIES
    }),
    ("bounding capabilities", |facts| {
        facts.status("CapBnd") == CAPABILITIES
    }),
    ("inheritable capabilities", |facts| {
        facts.status("CapInh") == NO_CAPABILITIES
    }),
    ("ambient capabilities", |facts| {
        facts.status("CapAmb") == NO_CAPABILITIES
    }),
    ("no new privileges", |facts| {
        facts.status("NoNewPrivs") == "1"
    }),
    ("seccomp", |facts| facts.status("Seccomp") == "2"),
    ("umask", |facts| facts.status("Umask") == "0022"),
    ("no groups of the agent", |facts| {
        facts.status("Groups").is_empty()
    }),
    ("no signal ignored or blocked", |facts| {
        // But for the two real-time signals that glibc keeps for itself.
        ["SigIgn", "SigBlk"].iter().all(|name| {
            u64::from_str_radix(facts.status(name), 16).is_ok_and(|mask| mask & !(3 << 31) == 0)
        })
    }),
    ("an own session and no tracer", |facts| {
        facts.status("TracerPid") == "0"
    }),
    ("open files", |facts| {
        facts
            .limit("Max open files")
            .first()
            .is_some_and(|soft| *soft == "1024")
    }),
    ("no core dumps", |facts| {
        facts.limit("Max core file size") == ["0", "0"]
    }),
    ("likelier to be killed for memory", |facts| {
        facts.oom_score_adj == "500"
    }),
    ("nothing of the agent's environment", |facts| {
        let names = facts.environment.split('\0').filter(|e| !e.is_empty());
        let known = ["PATH=", "HOME=", "HOSTNAME=", "FROM_IMAGE="];
        names
            .into_iter()
            .all(|entry| known.iter().any(|name| entry.starts_with(name)))
    }),
    ("own namespaces", |facts| {
        let pid = facts.pid.to_string();
        ["mnt", "pid", "ipc", "uts", "net", "cgroup", "user"]
            .iter()
            .all(|name| Facts::namespace(&pid, name) != Facts::namespace("self", name))
    }),
    ("root is nobody outside", |facts| {
        let ids = ["Uid", "Gid"].map(|name| {
            let ids = facts.status(name).split_whitespace();
            ids.map(|id| id.parse().unwrap_or(0)).min()
        });
        ids.iter()
            .all(|id| id.is_some_and(|id: u32| id >= 0x7000_0000))
    }),
    ("only standard descriptors, none of the device's", |facts| {
        facts.descriptors.iter().all(|(number, target)| {
            *number <= 2 && (target.starts_with("pipe:") || target == "/dev/null")
        })
    }),
    ("a read-only root", |facts| {
        facts
            .mount("/")
            .is_some_and(|mount| mount.has(&["ro", "nodev"]) && mount.kind == "overlay")
    }),
    ("a fresh /dev", |facts| {
        facts
            .mount("/dev")
            .is_some_and(|mount| mount.kind == "tmpfs" && mount.has(&["nosuid", "noexec"]))
    }),
    ("an own devpts", |facts| {
        facts
            .mount("/dev/pts")
            .is_some_and(|mount| mount.kind == "devpts" && mount.has(&["nosuid", "noexec"]))
    }),
    ("a fresh /proc", |facts| {
        facts
            .mount("/proc")
            .is_some_and(|mount| mount.kind == "proc" && mount.has(&["nosuid", "nodev", "noexec"]))
    }),
    ("a read-only /sys", |facts| {
        facts.mount("/sys").is_some_and(|mount| {
            mount.kind == "sysfs" && mount.has(&["ro", "nosuid", "nodev", "noexec"])
        })
    }),
    ("no cgroup hierarchy", |facts| {
        !facts
            .mounts
            .iter()
            .any(|mount| mount.kind.starts_with("cgroup"))
    }),
    ("nothing spreads", |facts| {
        facts
            .mounts
            .iter()
            .all(|mount| mount.propagation.trim().is_empty())
    }),
    ("masked paths", |facts| {
        MASKED
            .iter()
            .filter(|path| facts.exists(path))
            .all(|path| facts.mount(path).is_some())
    }),
    ("read-only paths", |facts| {
        READ_ONLY
            .iter()
            .filter(|path| facts.exists(path))
            .all(|path| {
                facts
                    .mount(path)
                    .is_some_and(|mount| mount.has(&["ro", "nosuid", "nodev", "noexec"]))
            })
    }),
];

fn broken(facts: &Facts) -> Vec<&'static str> {
    let failed = DEFAULTS.iter().filter(|(_, holds)| !holds(facts));
    failed.map(|(name, _)| *name).collect()
}

/// The one process in the container's cgroup that is not its first.
fn other_process(bed: &Bed, id: &foreshore_agent::runtime::ContainerId, first: i32) -> Option<i32> {
    let procs = bed.cgroup_file(id, "cgroup.procs");
    let mut pids = procs.lines().filter_map(|line| line.parse().ok());
    pids.find(|pid| {
        *pid != first
            && std::fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.ends_with("busybox"))
    })
}

/// Its program is seen a moment before the rest of its execution is done: what is closed with it, and whose it is.
async fn await_unbroken(pid: i32) {
    let until = Instant::now() + LONG;
    loop {
        let broken = broken(&Facts::of(pid));
        if broken.is_empty() {
            return;
        }
        assert!(Instant::now() < until, "{broken:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn every_default_holds_for_the_first_process_and_for_commands() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    // What a careless program around the agent may leave behind.
    let (_leak, _other) = nix::unistd::pipe().unwrap();
    nix::unistd::setgroups(&[nix::unistd::Gid::from_raw(4242)]).unwrap();
    let spec = bed.spec("web", &json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    let first = pid_of(&runtime, &spec.id).await;
    wait_for("the first process runs", || async {
        std::fs::read_link(format!("/proc/{first}/exe")).is_ok_and(|exe| exe.ends_with("busybox"))
    })
    .await;
    await_unbroken(first).await;

    let command = ["sleep".to_owned(), "1000".to_owned()];
    let look = async {
        wait_for("the command runs", || async {
            other_process(&bed, &spec.id, first).is_some()
        })
        .await;
        await_unbroken(other_process(&bed, &spec.id, first).unwrap()).await;
    };
    tokio::select! {
        ended = runtime.exec(&spec.id, &command, LONG) => panic!("it ended: {ended:?}"),
        () = look => {}
    }
    runtime.remove(&spec.id).await.unwrap();
}

#[tokio::test]
async fn dev_holds_the_harmless_nodes_and_nothing_else() {
    let bed = Bed::new();
    let line = "cd /dev; for f in *; do \
                if test -L $f; then echo link $f; \
                elif test -c $f; then echo node $f $(stat -c '%t:%T %a' $f); \
                elif test -d $f; then echo dir $f; else echo other $f; fi; done; \
                for f in null zero full random urandom tty ptmx; do \
                  (: < /dev/$f) 2>/dev/null && echo opened $f; done; exit 0";
    let (_, log) = crate::bed::run(&bed, &bed.shell(line, json!({}))).await;
    let expected = "link core\nlink fd\nnode full 1:7 666\ndir mqueue\nnode null 1:3 666\nlink ptmx\ndir pts\n\
                    node random 1:8 666\ndir shm\nlink stderr\nlink stdin\nlink stdout\nnode tty 5:0 666\n\
                    node urandom 1:9 666\nnode zero 1:5 666\n\
                    opened null\nopened zero\nopened full\nopened random\nopened urandom\nopened ptmx\n";
    // The kernel may be without /proc/kcore, then there is no link to it.
    assert_eq!(
        log.replace("link kcore\n", ""),
        expected.replace("link core\n", "")
    );
}
