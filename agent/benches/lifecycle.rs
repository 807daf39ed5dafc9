//! Container lifecycle beside `crun`, `runc` and, where a daemon answers, `docker run`: interleaved in one
//! run, same payload, same namespaces and limits.
//!
//! `cargo xtask bench` runs it. It only reports; nothing fails on time.
//!
//! - *first byte*: from the request until the payload's first instruction, on one monotonic clock that the
//!   payload itself writes. The payload's own start (exec and page faults) is in every row.
//! - *lifecycle*: create + start + kill + delete, the container waited for.
//!
//! Read with care: part of Foreshore's lead over a command-line runtime is that it starts one process
//! where create/start/kill/delete start four; the row `--version` shows what one start of each costs.
//! On a hybrid cgroup hierarchy crun 1.8 refuses to run, so the whole bench runs in a private mount
//! namespace without the unified mount (`cargo xtask bench` does that).

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use foreshore_agent::runtime::oci::UserNamespaces;

#[path = "lifecycle/foreshore.rs"]
mod foreshore;

/// What one iteration of one runtime took.
#[derive(Debug, Clone, Copy)]
struct Sample {
    first_byte: Duration,
    lifecycle: Duration,
}

/// The clock that the payload writes.
fn monotonic_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("the clock always reads");
    u64::try_from(Duration::from(time).as_nanos()).expect("the machine is younger than 584 years")
}

fn main() {
    // `cargo test --benches` passes --test; there is nothing to test here.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let count = std::env::var("FORESHORE_BENCH_COUNT")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(50);
    let dir = tempfile::Builder::new()
        .prefix("foreshore-bench-")
        .tempdir()
        .expect("a temporary directory");
    let rootfs = build_rootfs(dir.path());

    let mut rows: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
    let peers: Vec<&'static str> = ["crun", "runc"]
        .into_iter()
        .filter(|peer| answers(peer))
        .collect();
    let docker = answers_docker();
    // What the user namespace costs is the difference of these two.
    let benches = [
        ("foreshore", UserNamespaces::Auto),
        ("without userns", UserNamespaces::Off),
    ]
    .map(|(name, mode)| {
        let dir = dir.path().join(format!("{mode:?}"));
        (name, foreshore::Bench::new(&dir, &rootfs, mode))
    });
    let bundle = build_bundle(dir.path(), &rootfs);
    for round in 0..count {
        for (name, bench) in &benches {
            rows.entry(name).or_default().push(bench.sample(round));
        }
        for peer in &peers {
            match peer_sample(peer, &bundle, round) {
                Ok(sample) => rows.entry(peer).or_default().push(sample),
                Err(error) if round == 0 => eprintln!("{peer}: left out: {error}"),
                Err(_) => {}
            }
        }
        if docker && let Some(sample) = docker_sample(&rootfs, round) {
            rows.entry("docker run").or_default().push(sample);
        }
    }
    drop(benches);
    report(&rows, &peers);
}

fn report(rows: &BTreeMap<&str, Vec<Sample>>, peers: &[&str]) {
    println!(
        "{:<14} {:>4}   {:>8} {:>8} {:>8} {:>8}   {:>8} {:>8} {:>8} {:>8}",
        "ms", "n", "1st p50", "p90", "p99", "max", "life p50", "p90", "p99", "max"
    );
    for (name, samples) in rows {
        let [first, life] = [|s: &Sample| s.first_byte, |s: &Sample| s.lifecycle].map(|of| {
            let mut all: Vec<f64> = samples
                .iter()
                .map(|sample| of(sample).as_secs_f64() * 1e3)
                .collect();
            all.sort_by(f64::total_cmp);
            [50, 90, 99, 100].map(|percent| all[(all.len() * percent / 100).min(all.len() - 1)])
        });
        print!("{name:<14} {:>4}  ", samples.len());
        first.iter().for_each(|ms| print!(" {ms:>8.2}"));
        print!("  ");
        life.iter().for_each(|ms| print!(" {ms:>8.2}"));
        println!();
    }
    for peer in peers {
        let mut all: Vec<f64> = (0..20)
            .map(|_| {
                let begin = Instant::now();
                let _answered_before = Command::new(peer)
                    .arg("--version")
                    .stdout(Stdio::null())
                    .status();
                begin.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        all.sort_by(f64::total_cmp);
        println!(
            "{peer} --version alone: {:.2} ms (median of 20); its lifecycle starts it four times",
            all[10]
        );
    }
    println!(
        "docker run: --rm --network none, kill and delete are the daemon's; its lifecycle column is the whole command"
    );
}

/// A root with only the payload in it.
fn build_rootfs(dir: &Path) -> PathBuf {
    let rootfs = dir.join("rootfs");
    for name in ["proc", "sys", "dev", "tmp", "etc"] {
        std::fs::create_dir_all(rootfs.join(name)).expect("writable");
    }
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args([
            "--edition",
            "2024",
            "-C",
            "opt-level=s",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
            "-o",
        ])
        .arg(rootfs.join("payload"))
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/benches/lifecycle/payload.rs"
        ))
        .status()
        .expect("rustc runs");
    assert!(status.success(), "the payload did not compile");
    rootfs
}

/// A bundle for the command-line runtimes: `runc spec`, the same limits as Foreshore's, the payload.
fn build_bundle(dir: &Path, rootfs: &Path) -> PathBuf {
    let bundle = dir.join("bundle");
    std::fs::create_dir_all(&bundle).expect("writable");
    if !Command::new("runc")
        .arg("spec")
        .arg("--bundle")
        .arg(&bundle)
        .status()
        .is_ok_and(|status| status.success())
    {
        return bundle;
    }
    let path = bundle.join("config.json");
    let text = std::fs::read_to_string(&path).expect("just written");
    let mut spec: serde_json::Value = serde_json::from_str(&text).expect("runc writes JSON");
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["/payload", "stay"]);
    spec["root"]["path"] = rootfs.to_string_lossy().into_owned().into();
    spec["linux"]["resources"] = serde_json::json!({
        "memory": {"limit": 64 << 20, "swap": 64 << 20},
        "cpu": {"quota": 100_000, "period": 100_000},
        "pids": {"limit": 64},
        "devices": [{"allow": false, "access": "rwm"}],
    });
    // The cgroup mount is what Foreshore leaves out on cgroup v1; the peers need not pay for it either.
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["type"] != "cgroup");
    }
    std::fs::write(&path, spec.to_string()).expect("writable");
    bundle
}

fn answers(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_err() {
        eprintln!("{program}: not installed, left out");
    }
    found.is_ok()
}

fn answers_docker() -> bool {
    let info = Command::new("docker")
        .arg("info")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let answers = info.is_ok_and(|status| status.success());
    if !answers {
        eprintln!("docker: no daemon answers, left out");
    }
    answers
}

fn peer_sample(peer: &str, bundle: &Path, round: usize) -> Result<Sample, String> {
    let id = format!("foreshore-bench-{}-{round}", std::process::id());
    let verb = |arguments: &[&str]| -> Result<(), String> {
        let output = Command::new(peer)
            .args(arguments)
            .output()
            .map_err(|error| error.to_string())?;
        output
            .status
            .success()
            .then_some(())
            .ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let begin_ns = monotonic_ns();
    let begin = Instant::now();
    // The container inherits stdout, so it goes to a pipe that `output` would wait on; read it ourselves.
    let mut create = Command::new(peer)
        .args(["create", "--bundle"])
        .arg(bundle)
        .arg(&id)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut output = create.stdout.take().expect("piped");
    let status = create.wait().map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(format!("create ended with {status}"));
    }
    verb(&["start", &id])?;
    let first_ns = read_clock(&mut output)?;
    let seen = begin.elapsed();
    let after = Instant::now();
    verb(&["kill", &id, "KILL"])?;
    // Its end closes the pipe: no polling, and never `delete -f`, which polls every 100 ms.
    output
        .read_to_end(&mut Vec::new())
        .map_err(|error| error.to_string())?;
    let mut deleted = verb(&["delete", &id]);
    for _ in 0..50 {
        if deleted.is_ok() {
            break;
        }
        deleted = verb(&["delete", &id]);
    }
    deleted?;
    Ok(Sample {
        first_byte: Duration::from_nanos(first_ns.saturating_sub(begin_ns)),
        lifecycle: seen + after.elapsed(),
    })
}

fn docker_sample(rootfs: &Path, round: usize) -> Option<Sample> {
    if round == 0 {
        let mut tar = Command::new("tar")
            .arg("-C")
            .arg(rootfs)
            .args(["-c", "."])
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let import = Command::new("docker")
            .args(["import", "-", "foreshore-bench"])
            .stdin(tar.stdout.take()?)
            .stdout(Stdio::null())
            .status()
            .ok()?;
        tar.wait().ok()?;
        import.success().then_some(())?;
    }
    let begin_ns = monotonic_ns();
    let begin = Instant::now();
    let output = Command::new("docker")
        .args([
            "run",
            "--rm",
            "--network",
            "none",
            "--memory",
            "64m",
            "--pids-limit",
            "64",
            "foreshore-bench",
            "/payload",
        ])
        .output()
        .ok()?;
    let lifecycle = begin.elapsed();
    let first_ns = read_clock(&mut output.stdout.as_slice()).ok()?;
    Some(Sample {
        first_byte: Duration::from_nanos(first_ns.saturating_sub(begin_ns)),
        lifecycle,
    })
}

/// The payload's line.
fn read_clock(output: &mut impl std::io::Read) -> Result<u64, String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && line.len() < 64 {
        if output.read(&mut byte).map_err(|error| error.to_string())? == 0 {
            return Err("the payload wrote nothing".to_owned());
        }
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line)
        .trim()
        .parse()
        .map_err(|_| "the payload wrote no clock".to_owned())
}
