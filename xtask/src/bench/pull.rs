//! Pulling and unpacking one image from a registry on this machine: wall time, CPU time and memory of the device's staging
//! beside `docker pull`, `podman pull` and `skopeo copy` with `umoci unpack`; and what a pull costs that was killed in the middle.
//!
//! The image is made of this machine's own programs, libraries and documentation, so that it compresses as images do.
//! Every round begins with a cold store and, where the machine allows it, an empty page cache.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::docker::Docker;
use super::footprint;
use super::mounts::clean;
use super::wire::Wire;
use crate::demo::interrupt::wait_for;

/// What each layer is made of, and how much of it at most, in MiB.
const LAYERS: &[(&str, u64)] = &[
    ("/usr/lib/x86_64-linux-gnu", 90),
    ("/usr/lib/aarch64-linux-gnu", 90),
    ("/usr/bin", 60),
    ("/usr/lib/python3", 40),
    ("/usr/share", 60),
];
const MIB: u64 = 1 << 20;

/// What one pull took.
struct Figures {
    wall: Duration,
    /// User and system time of all its processes.
    cpu: Duration,
    /// The largest resident set that all its processes had together, in bytes, as seen every few milliseconds.
    memory: u64,
}

/// One pull, ready to begin.
struct Pull {
    /// Run one after the other.
    commands: Vec<Command>,
    /// What does the work for them.
    daemon: Option<Docker>,
}

impl Pull {
    const fn by(commands: Vec<Command>) -> Self {
        Self {
            commands,
            daemon: None,
        }
    }
}

/// Ends a process.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _it_may_have_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Runs the part.
///
/// # Errors
///
/// When the image cannot be made or the agent cannot be built.
pub(super) fn run(programs: Option<&Path>, rounds: u32) -> anyhow::Result<()> {
    let agent = footprint::programs(programs)?.agent;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let (_registry, host) = registry(dir)?;
    let size = push(dir, &host)?;
    let digest = output(Command::new("skopeo").args([
        "inspect",
        "--tls-verify=false",
        "--format",
        "{{.Digest}}",
        &format!("docker://{host}/bench:v1"),
    ]))?;
    println!(
        "\npull and unpack an image of {} MiB (gzip) in {} layers from a registry here; {rounds} rounds, interleaved, median and worst",
        size / MIB,
        LAYERS
            .iter()
            .filter(|(path, _)| Path::new(path).exists())
            .count(),
    );
    let config = agent_config(dir, &host)?;
    type Peer<'p> = (&'p str, Box<dyn Fn(&Path) -> anyhow::Result<Pull> + 'p>);
    let image = format!("{host}/bench@{}", digest.trim());
    let peers: [Peer<'_>; 4] = [
        (
            "foreshore-agent stage",
            Box::new(|_| Ok(Pull::by(vec![stage(&agent, &config, &image)]))),
        ),
        (
            "docker pull (overlay2)",
            Box::new(|store| {
                let docker = Docker::start(store)?;
                Ok(Pull {
                    commands: vec![docker.command(&["pull", "--quiet", &image])],
                    daemon: Some(docker),
                })
            }),
        ),
        (
            "podman pull (overlay)",
            Box::new(|store| Ok(Pull::by(vec![podman(store, &image)]))),
        ),
        (
            "skopeo copy + umoci unpack",
            Box::new(|store| {
                let layout = store.join("layout");
                let mut copy = Command::new("skopeo");
                copy.args(["copy", "-q", "--src-tls-verify=false"])
                    .arg(format!("docker://{image}"))
                    .arg(format!("oci:{}:v1", layout.display()));
                let mut unpack = Command::new("umoci");
                unpack
                    .args(["unpack", "--image"])
                    .arg(format!("{}:v1", layout.display()))
                    .arg(store.join("bundle"));
                Ok(Pull::by(vec![copy, unpack]))
            }),
        ),
    ];
    let mut taken: Vec<Vec<Figures>> = peers.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for ((name, commands), taken) in peers.iter().zip(&mut taken) {
            let store = dir.join("store");
            fs::create_dir(&store)?;
            let figures = commands(&store).and_then(measure);
            clean(&store)?;
            clean(&dir.join("state"))?;
            match figures {
                Ok(figures) => taken.push(figures),
                Err(error) => eprintln!("    {name}: left out: {error:#}"),
            }
        }
    }
    println!(
        "{:<28} {:>9} {:>9} {:>9} {:>12}",
        "", "wall s", "worst s", "CPU s", "memory MiB"
    );
    for ((name, _), mut taken) in peers.iter().zip(taken) {
        if taken.is_empty() {
            continue;
        }
        taken.sort_by_key(|figures| figures.wall);
        let median = &taken[taken.len() / 2];
        let worst = taken.last().map_or(Duration::ZERO, |figures| figures.wall);
        let memory = taken
            .iter()
            .map(|figures| figures.memory)
            .max()
            .unwrap_or(0);
        println!(
            "{name:<28} {:>9.2} {:>9.2} {:>9.2} {:>12}",
            median.wall.as_secs_f64(),
            worst.as_secs_f64(),
            median.cpu.as_secs_f64(),
            memory / MIB
        );
    }
    println!(
        "docker: without the time its daemon takes to start; CPU and memory with the daemon's"
    );
    resume(dir, &agent, &host, digest.trim())
}

fn stage(agent: &Path, config: &Path, image: &str) -> Command {
    let mut command = Command::new(agent);
    command.arg("stage").arg("--config").arg(config).arg(image);
    command
}

fn podman(store: &Path, image: &str) -> Command {
    let mut command = Command::new("podman");
    command
        .arg("--root")
        .arg(store.join("root"))
        .arg("--runroot")
        .arg(store.join("run"))
        .args(["--storage-driver", "overlay", "pull", "-q"])
        .args(["--tls-verify=false", image]);
    command
}

/// What a pull costs that was killed in the middle, over a link of 20 MB/s: bytes that came a second time.
fn resume(dir: &Path, agent: &Path, host: &str, digest: &str) -> anyhow::Result<()> {
    const RATE: u64 = 20_000_000;
    let wire = Wire::open(host, RATE)?;
    let image = format!("{}/bench@{digest}", wire.address());
    let config = agent_config(dir, wire.address())?;
    println!("\nkilled in the middle and begun again, over 20 MB/s; KiB that came a second time");
    println!(
        "{:<28} {:>7} {:>7} {:>7} {:>7} {:>7}",
        "killed after", "10 %", "30 %", "50 %", "70 %", "90 %"
    );
    let ours = |_: &Path| stage(agent, &config, &image);
    let theirs = |store: &Path| podman(store, &image);
    type Peer<'p> = (&'p str, &'p dyn Fn(&Path) -> Command);
    let peers: [Peer<'_>; 2] = [
        ("foreshore-agent stage", &ours),
        ("podman pull (overlay)", &theirs),
    ];
    for (name, command) in peers {
        let row = again(dir, &wire, command)?;
        let cells: Vec<String> = row
            .iter()
            .map(|bytes| format!("{:>7}", bytes / 1024))
            .collect();
        println!("{name:<28} {}", cells.join(" "));
    }
    Ok(())
}

/// Bytes that came a second time after the end at each tenth of the way.
fn again(dir: &Path, wire: &Wire, command: &dyn Fn(&Path) -> Command) -> anyhow::Result<Vec<u64>> {
    let store = dir.join("store");
    let whole = {
        fs::create_dir(&store)?;
        wire.take();
        measure(Pull::by(vec![command(&store)]))?;
        clean(&store)?;
        clean(&dir.join("state"))?;
        wire.take()
    };
    let mut row = Vec::new();
    for percent in [10, 30, 50, 70, 90] {
        fs::create_dir(&store)?;
        wire.take();
        let mut child = Running(
            command(&store)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()?,
        );
        wait_for("its share of the bytes", Duration::from_secs(120), || {
            ensure!(child.0.try_wait()?.is_none(), "the pull ended too soon");
            Ok((wire.down() >= whole * percent / 100).then_some(()))
        })?;
        let with_it = children(child.0.id());
        child.0.kill()?;
        child.0.wait()?;
        wait_for("what it started to end", Duration::from_secs(60), || {
            let lives = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
            Ok((!with_it.iter().any(lives)).then_some(()))
        })?;
        measure(Pull::by(vec![command(&store)]))?;
        row.push(wire.take().saturating_sub(whole));
        clean(&store)?;
        clean(&dir.join("state"))?;
    }
    Ok(row)
}

fn registry(dir: &Path) -> anyhow::Result<(Running, String)> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let host = format!("127.0.0.1:{port}");
    let config = dir.join("registry.yml");
    fs::write(
        &config,
        format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n",
            dir.join("registry").display()
        ),
    )?;
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("docker-registry does not start")?;
    let running = Running(child);
    wait_for("the registry", Duration::from_secs(20), || {
        Ok(std::net::TcpStream::connect(&host).ok())
    })?;
    Ok((running, host))
}

/// Makes the image and pushes it; its size.
fn push(dir: &Path, host: &str) -> anyhow::Result<u64> {
    let layout = dir.join("image");
    let image = format!("{}:v1", layout.display());
    finish(
        Command::new("umoci")
            .args(["init", "--layout"])
            .arg(&layout),
    )?;
    finish(Command::new("umoci").args(["new", "--image", &image]))?;
    for (path, most) in LAYERS {
        if !Path::new(path).exists() {
            continue;
        }
        let tar = dir.join("layer.tar");
        make_layer(Path::new(path), most * MIB, &tar)?;
        finish(
            Command::new("umoci")
                .args(["raw", "add-layer", "--image", &image])
                .arg(&tar),
        )?;
        fs::remove_file(&tar)?;
    }
    finish(Command::new("skopeo").args([
        "copy",
        "-q",
        "--dest-tls-verify=false",
        &format!("oci:{image}"),
        &format!("docker://{host}/bench:v1"),
    ]))?;
    let size = |entry: std::io::Result<fs::DirEntry>| anyhow::Ok(entry?.metadata()?.len());
    let total = fs::read_dir(layout.join("blobs/sha256"))?
        .map(size)
        .sum::<anyhow::Result<u64>>()?;
    // The machine's disk is not the image's.
    fs::remove_dir_all(&layout)?;
    Ok(total)
}

/// Regular files below `path`, in order of their names, until there are `most` bytes of them.
fn make_layer(path: &Path, most: u64, to: &Path) -> anyhow::Result<()> {
    let mut builder = tar::Builder::new(fs::File::create(to)?);
    let mut ahead = vec![path.to_owned()];
    let mut taken = 0;
    while let Some(next) = ahead.pop() {
        let meta = fs::symlink_metadata(&next)?;
        let name = next.strip_prefix("/")?;
        if meta.is_dir() {
            let mut entries: Vec<PathBuf> = fs::read_dir(&next)?
                .map(|entry| Ok(entry?.path()))
                .collect::<std::io::Result<_>>()?;
            entries.sort_unstable_by(|a, b| b.cmp(a));
            ahead.extend(entries);
        } else if meta.is_file() && taken + meta.len() <= most {
            taken += meta.len();
            builder.append_path_with_name(&next, name)?;
        }
    }
    builder.into_inner()?;
    Ok(())
}

fn agent_config(dir: &Path, host: &str) -> anyhow::Result<PathBuf> {
    let token = dir.join("token");
    fs::write(&token, "unused\n")?;
    let path = dir.join("agent.toml");
    let text = format!(
        "device = \"bench\"\n[hub]\nbroker = \"mqtt://127.0.0.1:1\"\njoin_token_file = \"{0}/token\"\n[paths]\n\
         state = \"{0}/state\"\nrun = \"{0}/run\"\n[registries.\"{host}\"]\nplain_http = true\n",
        dir.display()
    );
    fs::write(&path, text)?;
    Ok(path)
}

fn measure(pull: Pull) -> anyhow::Result<Figures> {
    let Pull { commands, daemon } = pull;
    let daemon = daemon.as_ref().map(Docker::pid);
    finish(&mut Command::new("sync"))?;
    // Not everywhere allowed; the same for all then.
    let _warm = fs::write("/proc/sys/vm/drop_caches", "3");
    let spent = || children_time() + daemon.map_or(Duration::ZERO, tree_time);
    let before = spent();
    let begin = Instant::now();
    let mut memory = 0;
    for mut command in commands {
        let name = command.get_program().to_string_lossy().into_owned();
        let errors = tempfile::tempfile()?;
        let mut child = Running(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(errors.try_clone()?)
                .spawn()
                .with_context(|| format!("{name} is not there"))?,
        );
        // The staging process ends when nobody listens.
        let listener = child.0.stdout.take();
        let status = loop {
            if let Some(status) = child.0.try_wait()? {
                break status;
            }
            memory = memory.max(resident(child.0.id()) + daemon.map_or(0, resident));
            std::thread::sleep(Duration::from_millis(5));
        };
        drop(listener);
        if !status.success() {
            use std::io::{Read as _, Seek as _};
            let (mut errors, mut text) = (errors, String::new());
            errors.rewind()?;
            errors.take(4096).read_to_string(&mut text)?;
            bail!("{name} ended with {status}: {}", text.trim());
        }
    }
    let wall = begin.elapsed();
    Ok(Figures {
        wall,
        cpu: spent().saturating_sub(before),
        memory,
    })
}

/// What a process and its children have resident together: proportionally, so that what they share counts once.
fn resident(pid: u32) -> u64 {
    let own = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("Pss:"))?;
            line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .unwrap_or(0);
    own * 1024 + children(pid).into_iter().map(resident).sum::<u64>()
}

/// User and system time of a process, its living children and those that it has waited for: fields 14 to 17 of
/// proc_pid_stat(5), in hundredths of a second.
fn tree_time(pid: u32) -> Duration {
    let own: u64 = fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|text| {
            let (_, fields) = text.rsplit_once(") ")?;
            let times = fields.split(' ').skip(11).take(4);
            Some(times.filter_map(|field| field.parse::<u64>().ok()).sum())
        })
        .unwrap_or(0);
    Duration::from_millis(own * 10) + children(pid).into_iter().map(tree_time).sum::<Duration>()
}

pub(super) fn children(pid: u32) -> Vec<u32> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// User and system time of all children that were waited for, getrusage(2).
fn children_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    #[expect(unsafe_code, reason = "getrusage(2) fills a structure")]
    // SAFETY: the structure is valid for writes, and all zeros are a valid value of it.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time = |value: libc::timeval| {
        Duration::from_secs(value.tv_sec.try_into().unwrap_or(0))
            + Duration::from_micros(value.tv_usec.try_into().unwrap_or(0))
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{} ended with {}: {}",
        command.get_program().display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn finish(command: &mut Command) -> anyhow::Result<()> {
    output(command).map(drop)
}
