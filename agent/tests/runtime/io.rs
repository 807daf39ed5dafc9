//! Reading and writing disks is held to the limits of `blkio_config`, on cgroup v1 and v2.

use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use foreshore_agent::runtime::oci::without_io_weights;
use foreshore_agent::runtime::{Runtime as _, StartError};
use nix::sys::stat::{SFlag, major, minor};
use serde_json::{Value, json};

use crate::bed::{self, Bed, exit_of, find, pid_of, wait_for};
use crate::passthrough::Nodes;

/// A block device backed by a file of the bed, with one partition. Gone at the end.
struct Loop {
    name: String,
}

impl Loop {
    fn new(bed: &Bed) -> Self {
        let file = bed.dir.path().join("disk.img");
        std::fs::write(&file, vec![0_u8; 4 << 20]).unwrap();
        run("losetup", &["-fP", file.to_str().unwrap()]);
        let mut names = std::fs::read_dir("/sys/block").unwrap().flatten();
        let backed = |name: &str| {
            let path = format!("/sys/block/{name}/loop/backing_file");
            std::fs::read_to_string(path).is_ok_and(|found| Path::new(found.trim()) == file)
        };
        let name = names.find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            backed(&name).then_some(name)
        });
        let name = name.unwrap();
        add_partition(&format!("/dev/{name}"));
        Self { name }
    }

    /// The number of the disk, or of its partition.
    fn number(&self, partition: &str) -> (u64, u64) {
        let path = format!("/sys/block/{}/{partition}/dev", self.name);
        let text = std::fs::read_to_string(path).unwrap();
        let (major, minor) = text.trim().split_once(':').unwrap();
        (major.parse().unwrap(), minor.parse().unwrap())
    }

    fn node(&self, nodes: &Nodes, name: &str, partition: &str) -> String {
        let (major, minor) = self.number(partition);
        nodes.make(name, SFlag::S_IFBLK, major, minor)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["-d", &format!("/dev/{}", self.name)]);
    }
}

/// Tells the kernel of a partition from 1 to 3 MiB, as partx(8) does: some kernels know no partition tables.
#[expect(unsafe_code, reason = "ioctl(2) with a struct blkpg_ioctl_arg")]
fn add_partition(disk: &str) {
    /// linux/blkpg.h.
    #[repr(C)]
    struct Partition {
        start: i64,
        length: i64,
        number: i32,
        names: [[u8; 64]; 2],
    }
    #[repr(C)]
    struct Argument {
        operation: i32,
        flags: i32,
        length: i32,
        data: *mut Partition,
    }
    const BLKPG: libc::c_ulong = 0x1269;
    const ADD_PARTITION: i32 = 1;
    let mut partition = Partition {
        start: 1 << 20,
        length: 2 << 20,
        number: 1,
        names: [[0; 64]; 2],
    };
    let mut argument = Argument {
        operation: ADD_PARTITION,
        flags: 0,
        length: i32::try_from(size_of::<Partition>()).unwrap(),
        data: &raw mut partition,
    };
    let disk = std::fs::File::open(disk).unwrap();
    // SAFETY: both structs are laid out as the kernel has them and live through the call.
    let added = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw mut argument) };
    assert_eq!(added, 0, "{}", std::io::Error::last_os_error());
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install mount"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

fn unified() -> bool {
    bed::hierarchies() == [Path::new("/sys/fs/cgroup")]
}

/// The whole disk that a directory is on, as cgroup files name it.
fn disk_of(dir: &Path) -> String {
    let device = std::fs::metadata(dir).unwrap().dev();
    let sys = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let sys = std::fs::canonicalize(sys).unwrap();
    let whole = if sys.join("partition").exists() {
        sys.parent().unwrap()
    } else {
        &sys
    };
    std::fs::read_to_string(whole.join("dev"))
        .unwrap()
        .trim()
        .to_owned()
}

fn with(blkio: Value) -> Value {
    let mut more = json!({"volumes": ["data:/data"], "user": "0", "stop_grace_period": "1s"});
    more["blkio_config"] = blkio;
    more
}

#[tokio::test]
async fn the_kernel_is_told_every_limit_for_the_whole_disk() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let disk = Loop::new(&bed);
    let nodes = Nodes::new("disks");
    let (whole, part) = (
        disk.node(&nodes, "whole", "."),
        disk.node(&nodes, "part", &format!("{}p1", disk.name)),
    );
    let spec = bed.shell(
        "exec sleep 1000",
        with(json!({
            "weight": 300,
            "weight_device": [{"path": whole, "weight": 700}],
            "device_read_bps": [{"path": "state", "rate": "5m"}],
            "device_write_bps": [{"path": whole, "rate": "2m"}, {"path": part, "rate": "1m"}],
            "device_read_iops": [{"path": part, "rate": 50}],
            "device_write_iops": [{"path": "state", "rate": 4_000_000_000_u32}],
        })),
    );
    runtime.start(&spec).await.unwrap();
    let (disk_major, disk_minor) = disk.number(".");
    let (named, state) = (
        format!("{disk_major}:{disk_minor}"),
        disk_of(&bed.state_dir()),
    );
    let says = |file: &str, line: String| {
        let text = bed.cgroup_file(&spec.id, file);
        assert!(
            text.lines().any(|found| found == line),
            "{file} has no {line:?}: {text:?}"
        );
        assert_eq!(
            text.lines().count(),
            if file == "io.max" { 2 } else { 1 },
            "{file}: {text:?}"
        );
    };
    if unified() {
        says(
            "io.max",
            format!("{named} rbps=max wbps=1048576 riops=50 wiops=max"),
        );
        says(
            "io.max",
            format!("{state} rbps=5242880 wbps=max riops=max wiops=4000000000"),
        );
    } else {
        says("blkio.throttle.read_bps_device", format!("{state} 5242880"));
        says(
            "blkio.throttle.write_bps_device",
            format!("{named} 1048576"),
        );
        says("blkio.throttle.read_iops_device", format!("{named} 50"));
        says(
            "blkio.throttle.write_iops_device",
            format!("{state} 4000000000"),
        );
    }
    // Best effort: where the kernel has a file for it.
    let files = ["blkio.bfq.weight", "io.bfq.weight", "io.weight"];
    let dirs = bed.cgroups(&spec.id.to_string());
    let weights = dirs.iter().flat_map(|dir| files.map(|file| dir.join(file)));
    for file in weights.filter(|file| file.exists()) {
        let text = std::fs::read_to_string(&file).unwrap();
        let default = text.lines().next().unwrap().trim_start_matches("default ");
        assert_eq!(default, "300", "{}", file.display());
    }
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}

/// Writes 48 times 64k and reads 32 times 4k past every cache; says how long each took in seconds.
const WORK: &str = "now() { read up rest < /proc/uptime; echo $up; }
    now; dd if=/dev/zero of=/data/$NAME bs=64k count=48 oflag=direct 2>/dev/null || exit 1
    now; dd if=/data/$NAME of=/dev/null bs=4k count=32 iflag=direct 2>/dev/null || exit 2
    now; dd if=/dev/zero of=/data/$NAME.cached bs=64k count=48 conv=fsync 2>/dev/null || exit 3
    now";

fn seconds(log: &str) -> Vec<f64> {
    let times: Vec<f64> = log.lines().map(|line| line.parse().unwrap()).collect();
    let pairs = times.windows(2);
    pairs.map(|pair| pair[1] - pair[0]).collect()
}

#[tokio::test]
async fn a_container_is_held_to_its_rates_and_its_neighbour_is_not() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let service = |name: &str, blkio: Value| {
        let mut more = with(blkio);
        more["environment"] = json!({"NAME": name});
        bed.spec(name, &json!(["sh", "-c", WORK]), more)
    };
    // 3 MiB at 1 MiB a second, and 32 reads at 16 a second.
    let slow = service(
        "slow",
        json!({
            "device_write_bps": [{"path": "state", "rate": "1m"}],
            "device_read_iops": [{"path": "state", "rate": 16}],
        }),
    );
    let quick = service("quick", json!({}));
    runtime.start(&slow).await.unwrap();
    runtime.start(&quick).await.unwrap();
    assert_eq!(exit_of(&runtime, &quick.id).await.code, 0);
    assert_eq!(exit_of(&runtime, &slow.id).await.code, 0);
    let (slow_took, quick_took) = (seconds(&bed.log("slow")), seconds(&bed.log("quick")));
    for (index, expected) in [(0, 3.0), (1, 2.0)] {
        let (slow, quick) = (slow_took[index], quick_took[index]);
        assert!(
            slow > expected * 0.8 && slow < expected * 2.5,
            "{slow_took:?}"
        );
        assert!(quick < expected * 0.5, "{quick_took:?}");
    }
    if unified() {
        // What waits in the page cache is charged to whom it belongs on cgroup v2 alone.
        assert!(slow_took[2] > 3.0 * 0.8, "{slow_took:?}");
    }
    for id in [&slow.id, &quick.id] {
        runtime.remove(id).await.unwrap();
    }
    bed.assert_clean();
}

/// A process that waits for its turn at a disk does not take SIGKILL before it had it: here after four minutes.
#[tokio::test]
async fn what_waits_for_its_turn_at_a_disk_is_killed_at_once_all_the_same() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let command = [
        "dd",
        "if=/dev/zero",
        "of=/data/f",
        "bs=1M",
        "count=2",
        "oflag=direct",
    ];
    let rate = json!({"device_write_bps": [{"path": "state", "rate": "4k"}]});
    let spec = bed.spec("web", &json!(command), with(rate));
    runtime.start(&spec).await.unwrap();
    let pid = pid_of(&runtime, &spec.id).await;
    wait_for("dd to wait for the disk", || async {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains("(dd) D")
    })
    .await;
    let begin = Instant::now();
    runtime
        .stop(&spec.id, 15, Duration::from_millis(100))
        .await
        .unwrap();
    assert!(find(&runtime, &spec.id).await.is_some());
    runtime.remove(&spec.id).await.unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
    bed.assert_clean();
}

#[tokio::test]
async fn what_is_no_disk_keeps_a_container_from_starting_and_is_told() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let nodes = Nodes::new("none");
    // No driver answers for it.
    let unplugged = nodes.make("unplugged", SFlag::S_IFBLK, 60, 79);
    std::os::unix::fs::symlink("/etc/passwd", nodes.path("astray")).unwrap();
    let lists = [
        "device_read_bps",
        "device_write_bps",
        "device_read_iops",
        "device_write_iops",
    ];
    for (index, (path, is_missing)) in [
        ("/dev/null".to_owned(), false),
        (nodes.path("astray"), false),
        (nodes.path("absent"), true),
        (unplugged, true),
        ("/dev/null/sda".to_owned(), false),
    ]
    .into_iter()
    .enumerate()
    {
        let entry = json!([{"path": path, "rate": 10_000}]);
        let list = lists[index % lists.len()];
        let error = runtime
            .start(&bed.shell("true", with(json!({list: entry}))))
            .await
            .unwrap_err();
        let right = match &error {
            StartError::DeviceMissing(why) => is_missing && why.contains(&path),
            StartError::IoLimit(why) => {
                !is_missing && why.contains(&path) && !why.contains("passwd")
            }
            _ => false,
        };
        assert!(right, "{path}: {error:?}");
    }
    let weight = json!({"weight_device": [{"path": "/dev/null", "weight": 10}]});
    let error = runtime
        .start(&bed.shell("true", with(weight)))
        .await
        .unwrap_err();
    assert!(matches!(error, StartError::IoLimit(_)), "{error:?}");
    bed.assert_clean();
}

#[tokio::test]
async fn weights_without_an_effect_are_told_until_the_scheduler_knows_them() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let disk = Loop::new(&bed);
    let nodes = Nodes::new("weights");
    let whole = disk.node(&nodes, "whole", ".");
    let scheduler = PathBuf::from(format!("/sys/block/{}/queue/scheduler", disk.name));
    std::fs::write(&scheduler, "none").unwrap();
    let blkio = json!({"weight_device": [{"path": whole, "weight": 700}]});
    let told = |id: String| without_io_weights(&bed.run_dir(), &id);
    let first = bed.shell("exec sleep 1000", with(blkio.clone()));
    runtime.start(&first).await.unwrap();
    let why = told(first.id.to_string()).unwrap();
    assert!(why.contains(&disk.name) && why.contains("bfq"), "{why}");
    runtime.remove(&first.id).await.unwrap();

    std::fs::write(&scheduler, "bfq").unwrap();
    let second = bed.shell("exec sleep 1000", with(blkio));
    runtime.start(&second).await.unwrap();
    assert_eq!(told(second.id.to_string()), None);
    let (major, minor) = disk.number(".");
    let file = if unified() {
        "io.bfq.weight"
    } else {
        "blkio.bfq.weight_device"
    };
    let text = bed.cgroup_file(&second.id, file);
    let line = format!("{major}:{minor} 700");
    assert!(text.lines().any(|found| found == line), "{file}: {text:?}");
    runtime.remove(&second.id).await.unwrap();

    let without = bed.shell("exec sleep 1000", json!({}));
    runtime.start(&without).await.unwrap();
    assert_eq!(told(without.id.to_string()), None);
    runtime.remove(&without.id).await.unwrap();
    bed.assert_clean();
}
