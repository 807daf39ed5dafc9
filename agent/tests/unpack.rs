//! What `foreshore-agent unpack` may and may not do, seen from outside while it works.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use foreshore_images::delta::format::{MAGIC, Old, Operation};
use foreshore_images::unpack::Budget;
use foreshore_images::unpack::job::{Job, LowerLayer, Paths};
use serde_json::Value;

/// A store with a layer below and an empty target.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["store/layers/below/etc", "store/tmp/tree"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("secret"), "of the device").unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn target(&self) -> PathBuf {
        self.root().join("tmp/tree")
    }

    /// Starts it with a job; the blob is for the caller to write.
    fn start(&self) -> Child {
        let mut child = self.run(&mut Command::new(env!("CARGO_BIN_EXE_foreshore-agent")));
        self.give_job(&mut child);
        child
    }

    /// Where no user namespace and no PID namespace can be made: in a user namespace that is allowed none
    /// (`/proc/sys/user`, namespaces(7)).
    fn start_where_namespaces_are_refused(&self) -> Child {
        let limits = "echo 0 > /proc/sys/user/max_user_namespaces && echo 0 > /proc/sys/user/max_pid_namespaces";
        let inner = format!("{limits} && exec \"$@\"");
        // The first shell has no rights, because nobody has written yet who is root there.
        let outer = "read mapped && exec sh -c \"$@\"";
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--mount", "sh", "-c", outer, "sh", &inner, "sh"])
            .arg(env!("CARGO_BIN_EXE_foreshore-agent"));
        let mut child = self.run(&mut command);
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        wait_for("the user namespace", || {
            let theirs = fs::read_link(format!("/proc/{}/ns/user", child.id()));
            theirs.is_ok_and(|theirs| theirs != own)
        });
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{map}", child.id()), "0 0 100000").unwrap();
        }
        let input = child.stdin.as_mut().unwrap();
        input.write_all(b"mapped\n").unwrap();
        self.give_job(&mut child);
        child
    }

    fn run(&self, command: &mut Command) -> Child {
        command
            .arg("unpack")
            .arg(self.root())
            .arg(self.target())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn give_job(&self, child: &mut Child) {
        let job = Job {
            target: self.target(),
            lowers: vec![LowerLayer {
                path: self.root().join("layers/below"),
                opaque: Some(Paths::default()),
            }],
            budget: Budget {
                bytes: 10 << 20,
                entries: 1000,
            },
            stream_bytes_max: 20 << 20,
            reserve_bytes: Some(0),
            keep_privileges: false,
            opaque_later: true,
        };
        let text = serde_json::to_vec(&job).unwrap();
        let input = child.stdin.as_mut().unwrap();
        input.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
        input.write_all(&text).unwrap();
    }

    /// What it answers to a whole blob.
    fn answer(&self, blob: &[u8]) -> Value {
        let mut child = self.start();
        let _it_may_have_had_enough = child.stdin.take().unwrap().write_all(blob);
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn children(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    let is_its = |pid: &u32| {
        // It may have ended since.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| {
            line.split_ascii_whitespace()
                .eq(["PPid:", &parent.to_string()])
        })
    };
    pids.filter(is_its).collect()
}

/// Starts it, and waits until a first file arrived, so that it is past the preparations; it waits for the rest. With the first
/// process of its namespace and the one that works.
fn at_work(bed: &Bed) -> (Child, u32, u32) {
    let mut child = bed.start();
    let first = entry(tar::EntryType::Regular, "first", "", 0o644, b"x");
    child.stdin.as_mut().unwrap().write_all(&first).unwrap();
    child.stdin.as_mut().unwrap().write_all(&[1]).unwrap();
    wait_for("the first file", || bed.target().join("first").exists());
    let [first] = children(child.id())[..] else {
        panic!("not one child")
    };
    let [worker] = children(first)[..] else {
        panic!("not one grandchild")
    };
    (child, first, worker)
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn entry(kind: tar::EntryType, path: &str, link: &str, mode: u32, body: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(70_000);
    header.set_gid(7);
    header.set_size(body.len() as u64);
    // As it is, not as a library thinks it should be.
    let name = &mut header.as_gnu_mut().unwrap().name;
    name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_link_name_literal(link).unwrap();
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    bytes
}

#[test]
fn while_it_works_it_sees_the_store_and_has_next_to_no_rights() {
    let bed = Bed::new();
    let (mut child, _, worker) = at_work(&bed);
    let proc = |name: &str| PathBuf::from(format!("/proc/{worker}/{name}"));
    let status = fs::read_to_string(proc("status")).unwrap();
    let value = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(value("Seccomp:"), "2");
    assert_eq!(value("NoNewPrivs:"), "1");
    assert_eq!(value("Threads:"), "1");
    // chown, dac_override, fowner, fsetid, setfcap; and over nothing outside of its user namespace.
    let rights = u64::from_str_radix(&value("CapEff:"), 16).unwrap();
    assert_eq!(rights, 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31);
    // Number two in a PID namespace of its own.
    let number = status.lines().find(|line| line.starts_with("NSpid:"));
    assert_eq!(number.unwrap().split_ascii_whitespace().last(), Some("2"));
    for kind in ["user", "pid", "mnt", "net", "ipc", "uts"] {
        let its = fs::read_link(proc("ns").join(kind)).unwrap();
        let ours = fs::read_link(Path::new("/proc/self/ns").join(kind)).unwrap();
        assert_ne!(its, ours, "{kind}");
    }
    let mounts = fs::read_to_string(proc("mountinfo")).unwrap();
    let mounts: BTreeSet<(&str, bool)> = mounts
        .lines()
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            for flag in ["nosuid", "nodev", "noexec"] {
                assert!(fields[5].split(',').any(|found| found == flag), "{line}");
            }
            (fields[4], fields[5].split(',').any(|flag| flag == "ro"))
        })
        .collect();
    assert_eq!(mounts, [("/", true), ("/tmp/tree", false)].into());
    let limits = fs::read_to_string(proc("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..]
            .split_ascii_whitespace()
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(limit("Max address space"), (768_u64 << 20).to_string());
    assert_eq!(limit("Max file size"), (10_u64 << 20).to_string());
    assert_eq!(limit("Max core file size"), "0");
    let descriptors = fs::read_dir(proc("fd")).unwrap().count();
    assert!(descriptors <= 8, "{descriptors} descriptors");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// What inflates can read and write what it was given, and nothing more.
#[test]
fn what_inflates_has_no_right_at_all_and_does_its_work() {
    let bed = Bed::new();
    let start = || {
        Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
            .arg("inflate")
            .args([bed.root(), bed.target()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let content: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n >> 9).to_le_bytes()[0])
        .collect();
    let mut gzip = Command::new("gzip")
        .arg("-c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = gzip.stdin.take().unwrap();
    let compressed = std::thread::scope(|scope| {
        scope.spawn(|| input.write_all(&content).map(|()| drop(input)).unwrap());
        gzip.wait_with_output().unwrap().stdout
    });
    let inflate = |blob: &[u8]| {
        let mut child = start();
        let mut input = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let _it_may_have_had_enough = input.write_all(blob);
            });
            child.wait_with_output().unwrap()
        })
    };
    let whole = inflate(&compressed);
    assert_eq!(String::from_utf8_lossy(&whole.stderr), "");
    assert!(whole.status.success() && whole.stdout == content);
    let half = inflate(&compressed[..compressed.len() / 2]);
    assert_eq!(half.status.code(), Some(3));
    assert_eq!(inflate(b"\x1f\x8bnonsense").status.code(), Some(3));

    let mut child = start();
    child
        .stdin
        .as_mut()
        .unwrap()
        .write_all(&compressed[..1000])
        .unwrap();
    let mut first = [0; 100];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let [outer] = children(child.id())[..] else {
        panic!("not one child")
    };
    let [worker] = children(outer)[..] else {
        panic!("not one grandchild")
    };
    let status = fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    for line in [
        "Seccomp:\t2",
        "NoNewPrivs:\t1",
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let mounts = fs::read_to_string(format!("/proc/{worker}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let options = mounts.split(' ').nth(5).unwrap();
    assert!(options.split(',').any(|option| option == "ro"), "{mounts}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn whichever_of_its_processes_is_killed_none_is_left() {
    let bed = Bed::new();
    for killed in 0..3 {
        let (mut child, first, worker) = at_work(&bed);
        let pids = [child.id(), first, worker];
        // By its number: it is waited for below, or by its parent, and cannot be another's.
        let pid = nix::unistd::Pid::from_raw(pids[killed].try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "process {killed}");
        wait_for("all to end", || {
            pids.iter().all(|pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                // One whose parent was killed is reaped by whoever does that here.
                status.is_empty() || status.contains("State:\tZ")
            })
        });
        fs::remove_file(bed.target().join("first")).unwrap();
    }
}

/// Whoever is killed a moment after it made a process, before that has seen to its own end, leaves none behind either.
#[test]
fn killed_at_any_moment_of_its_preparations_none_is_left() {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    const MYSELF: nix::unistd::Pid = nix::unistd::Pid::from_raw(0);
    let bed = Bed::new();
    let allowed = sched_getaffinity(MYSELF).unwrap();
    let mut processors = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap());
    let one = processors.next().unwrap();
    let other = processors.next_back().unwrap_or(one);
    let move_to = |cpu| {
        let mut only = CpuSet::new();
        only.set(cpu).unwrap();
        sched_setaffinity(MYSELF, &only).unwrap();
    };
    for time in 0..100 {
        // All of its processes share one processor, where a new one has to wait for its turn; this test has another.
        move_to(one);
        let mut child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
            .arg("inflate")
            .args([bed.root(), bed.target()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        move_to(other);
        let (pid, until) = (child.id(), Instant::now() + Duration::from_secs(20));
        while fs::read(format!("/proc/{pid}/task/{pid}/children"))
            .unwrap()
            .is_empty()
        {
            assert!(Instant::now() < until, "waited 20 s for a child");
        }
        // Every other at once, which is when the first of them is new.
        if time % 2 == 1 {
            std::thread::sleep(Duration::from_micros(25 * time));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let target = bed.target().display().to_string();
    wait_for("all to end", || {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let mut commands = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        !commands.any(|command| String::from_utf8_lossy(&command).contains(&target))
    });
}

#[test]
fn owners_modes_and_whiteouts_come_out_right_and_privileges_do_not() {
    use tar::EntryType as Kind;
    let bed = Bed::new();
    fs::create_dir(bed.root().join("layers/below/gone")).unwrap();
    let answer = bed.answer(&archive(&[
        entry(Kind::Regular, "su", "", 0o4755, b"program"),
        entry(Kind::Directory, "shared", "", 0o2775, b""),
        entry(Kind::Regular, "shared/f", "", 0o640, b"content"),
        entry(Kind::Link, "hard", "shared/f", 0o640, b""),
        entry(Kind::Symlink, "soft", "/etc/shadow", 0o777, b""),
        entry(Kind::Fifo, "pipe", "", 0o600, b""),
        entry(Kind::Char, "null", "", 0o666, b""),
        entry(Kind::Regular, ".wh.gone", "", 0o644, b""),
        entry(Kind::Regular, "shared/.wh..wh..opq", "", 0o644, b""),
    ]));
    let done = &answer["Done"];
    assert!(done.is_object(), "{answer}");
    assert_eq!(done["opaque"], serde_json::json!(["736861726564"]));
    let notes = done["notes"].to_string();
    assert!(
        notes.contains("setuid") && notes.contains("\\\"su\\\""),
        "{notes}"
    );
    assert!(notes.contains("device node"), "{notes}");
    let meta = |name: &str| fs::symlink_metadata(bed.target().join(name)).unwrap();
    assert_eq!(meta("su").permissions().mode() & 0o7777, 0o755);
    assert_eq!(meta("shared").permissions().mode() & 0o7777, 0o2775);
    assert_eq!((meta("hard").uid(), meta("hard").gid()), (70_000, 7));
    assert_eq!(meta("hard").ino(), meta("shared/f").ino());
    assert!(meta("pipe").file_type().is_fifo());
    assert!(meta("gone").file_type().is_char_device() && meta("gone").rdev() == 0);
    assert!(fs::symlink_metadata(bed.target().join("null")).is_err());
    let mut content = String::new();
    let mut file = fs::File::open(bed.target().join("hard")).unwrap();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "content");
}

#[test]
fn where_namespaces_are_refused_it_says_so_and_works_without() {
    use tar::EntryType as Kind;
    let bed = Bed::new();
    fs::create_dir(bed.root().join("layers/below/gone")).unwrap();
    let blob = archive(&[
        entry(Kind::Regular, "su", "", 0o4755, b"program"),
        entry(Kind::Char, "null", "", 0o666, b""),
        entry(Kind::Regular, ".wh.gone", "", 0o644, b""),
        entry(Kind::Symlink, "up", "../..", 0o777, b""),
        entry(Kind::Regular, "up/escaped", "", 0o644, b"x"),
    ]);
    let mut child = bed.start_where_namespaces_are_refused();
    child.stdin.take().unwrap().write_all(&blob).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no PID namespace"), "{said}");
    assert!(said.contains("no user namespace"), "{said}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect(&said);
    assert!(answer["Done"].is_object(), "{answer}");
    let meta = |name: &str| fs::symlink_metadata(bed.target().join(name)).unwrap();
    assert_eq!(meta("su").permissions().mode() & 0o7777, 0o755);
    assert_eq!((meta("su").uid(), meta("su").gid()), (70_000, 7));
    assert!(meta("gone").file_type().is_char_device() && meta("gone").rdev() == 0);
    assert!(fs::symlink_metadata(bed.target().join("null")).is_err());
    assert!(meta("escaped").is_file(), "what leads out ends at the root");
    assert!(!bed.root().join("escaped").exists() && !bed.dir.path().join("escaped").exists());
}

#[test]
fn bad_layers_are_answered_and_touch_nothing_else() {
    use tar::EntryType as Kind;
    let bed = Bed::new();
    let before = fs::metadata(bed.dir.path().join("secret")).unwrap();
    let cases: [(&str, Vec<u8>, &str); 5] = [
        (
            "up and out",
            archive(&[entry(Kind::Regular, "../../../secret", "", 0o644, b"mine")]),
            "Entry",
        ),
        (
            "through a link",
            archive(&[
                entry(Kind::Symlink, "link", "/../..", 0o777, b""),
                entry(Kind::Regular, "link/layers/below/new", "", 0o644, b"mine"),
            ]),
            "Done",
        ),
        ("no archive", b"hello, world".to_vec(), "Failed"),
        (
            "half an archive",
            entry(Kind::Regular, "f", "", 0o644, &[1; 5000])[..3000].to_vec(),
            "Archive",
        ),
        (
            "more than its budget",
            archive(&[entry(Kind::Regular, "f", "", 0o644, &vec![1; 11 << 20])]),
            "TooLarge",
        ),
    ];
    for (name, blob, expected) in cases {
        fs::remove_dir_all(bed.target()).unwrap();
        fs::create_dir(bed.target()).unwrap();
        let answer = bed.answer(&blob).to_string();
        assert!(answer.contains(expected), "{name}: {answer}");
        let after = fs::metadata(bed.dir.path().join("secret")).unwrap();
        assert_eq!(
            (after.len(), after.ctime_nsec()),
            (before.len(), before.ctime_nsec()),
            "{name}"
        );
        let below = bed.root().join("layers/below");
        assert_eq!(fs::read_dir(below).unwrap().count(), 1, "{name}");
    }
}

/// A delta of one plan, as [`foreshore_images::delta::format`] has it.
fn delta(operations: &[Operation<'_>]) -> Vec<u8> {
    let mut plan = Vec::new();
    for operation in operations {
        foreshore_images::delta::format::write(&mut plan, operation);
    }
    let length = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
    // One raw block, the last.
    let block = length(plan.len() << 3 | 1);
    let head = [length(plan.len()), length(plan.len() + 3)].concat();
    [&MAGIC[..], &head, &block[..3], &plan].concat()
}

#[test]
fn a_layer_is_made_of_old_files_by_a_process_that_only_reads_them() {
    let bed = Bed::new();
    let file = bed.root().join("layers/below/etc/file");
    fs::write(&file, "of anybody, for nobody").unwrap();
    std::os::unix::fs::chown(&file, Some(4711), Some(4711)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    let link = bed.root().join("layers/below/link");
    std::os::unix::fs::symlink(bed.dir.path().join("secret"), link).unwrap();
    let rebuild = |path: &str, length: u64| {
        let old = Old {
            tree: 0,
            path: path.as_bytes(),
            offset: 3,
            length,
        };
        let mut child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
            .arg("rebuild")
            .arg(bed.root())
            .arg(bed.target())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let trees = br#"["layers/below"]"#;
        let mut input = child.stdin.take().unwrap();
        let delta = delta(&[Operation::Literal(b"new "), Operation::Copy(old)]);
        let length = (trees.len() as u64).to_le_bytes();
        let _it_may_have_had_enough = input.write_all(&[&length[..], trees, &delta].concat());
        drop(input);
        child.wait_with_output().unwrap()
    };
    let made = rebuild("etc/file", 7);
    assert_eq!(String::from_utf8_lossy(&made.stderr), "");
    assert_eq!(String::from_utf8_lossy(&made.stdout), "new anybody");
    assert!(made.status.success());
    for (path, said) in [
        ("link", "cannot use the old file"),
        ("../../../secret", "cannot use the old file"),
        ("etc/nothing", "cannot use the old file"),
    ] {
        let refused = rebuild(path, 1);
        assert_eq!(refused.status.code(), Some(3), "{path}: {refused:?}");
        assert_eq!(String::from_utf8_lossy(&refused.stdout), "new ", "{path}");
        let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(stderr.contains(said), "{path}: {stderr}");
    }
}
