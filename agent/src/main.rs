//! foreshore-agent: runs on each device. Arguments, logging and signals; the rest is in the library.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand, ValueEnum};
use foreshore_agent::config::{Config, DEFAULT_PATH};
use foreshore_agent::execute::Tools;
use foreshore_agent::plan::{Busy, Desired, Observed, ObservedContainer, ProbeStates, UpdateLocks};
use foreshore_agent::pulling::Pulling;
use foreshore_agent::reconcile::{Agent, Memory, Parts};
use foreshore_agent::runtime::Runtime as _;
use foreshore_agent::runtime::oci::{self, OciConfig, OciRuntime};
use foreshore_agent::state::{Loaded, OpenError, State};
use foreshore_agent::status::{ContainerLine, Published};
use foreshore_agent::vault::Vault;
use foreshore_agent::volumes::{self, VolumeId};
use foreshore_agent::watchdog::{Environment, Watchdog};
use foreshore_agent::{
    clock, disk, doctor, exec, fsck, images, link, plan, removal, shim, stage, state, status,
    unpack,
};
use foreshore_images::Digest;
use foreshore_images::store::{LayerFinding, LayerState, Progress, Store};
use foreshore_protocol::AppName;
use foreshore_protocol::api::PullView;
use foreshore_protocol::message::{AppStatus, ServiceState};
use foreshore_protocol::quantity::Span;

/// Runs containers on this device as the hub wants them, and keeps them running without it.
///
/// The agent needs to be root. It joins the hub that its configuration names, pulls what the hub assigns,
/// starts it, and goes back to the last-known-good release by itself when a new one is not well. Containers
/// outlive the agent: it may be restarted and updated at any time.
#[derive(Debug, Parser)]
#[command(name = "foreshore-agent", version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Try it:
  foreshore-agent check-config --config /etc/foreshore/agent.toml
  foreshore-agent doctor
  foreshore-agent run
  foreshore-agent status -o json

A configuration needs three lines at least:
  device = \"gateway-1\"
  [hub]
  broker = \"mqtt://hub.lan:1883\"
  join_token_file = \"/etc/foreshore/join-token\"

RUST_LOG sets what is logged to standard error, for example RUST_LOG=debug.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Join the hub and run what it assigns, until SIGTERM or SIGINT; containers keep running then.
    Run(At),
    /// Read the configuration, say what is wrong with it, and end. Exit status 2 when something is.
    CheckConfig(At),
    /// Look at this device and name the fix for whatever keeps containers from running well. Exit status 1 when an
    /// error is found.
    Doctor {
        #[command(flatten)]
        at: At,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Show what runs here; needs no hub and no running agent.
    Status {
        #[command(flatten)]
        at: At,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Stop every container of this agent, which must not be running. The next `run` starts them again.
    StopAll(At),
    /// Stop and remove every container of this agent, with its mounts, cgroups and run directory. State,
    /// images, volumes and logs stay. The agent must not be running.
    RemoveAll {
        #[command(flatten)]
        at: At,
        /// Delete the state directory too: images, volumes, logs, everything.
        #[arg(long)]
        purge: bool,
    },
    /// The named volumes of this device: they outlive releases and apps, and go only with `volume remove`.
    #[command(subcommand)]
    Volume(Volumes),
    /// The images of this device. Those loaded from a file need no registry and stay until they are removed.
    #[command(subcommand)]
    Image(Images),
    /// Pull and unpack images. The agent starts this by itself.
    #[command(hide = true)]
    Stage {
        #[command(flatten)]
        at: At,
        /// Whose images they are, for the policy's `[apps.NAME]`.
        #[arg(long)]
        app: Option<AppName>,
        /// Secrets with logins come on standard input.
        #[arg(long)]
        logins: bool,
        images: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum Images {
    /// Load every image of an OCI layout, OCI archive or docker-archive that runs on this device, for example what
    /// `docker save` or `skopeo copy … oci-archive:FILE` wrote. A release that names it by the digest shown needs no
    /// registry then. The agent may be running.
    Load {
        #[command(flatten)]
        at: At,
        /// File or directory; `-` is standard input.
        archive: PathBuf,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Show every image that is wholly here; needs no hub and no running agent.
    List {
        #[command(flatten)]
        at: At,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Look through the images and repair what is damaged, from the registry if need be. The agent may be running. Exit status 0
    /// when all is well or is again, 1 when something stays damaged, 3 when not everything could be checked.
    Fsck {
        #[command(flatten)]
        at: At,
        /// Read every file of every layer and compare it with what it was when it was unpacked.
        #[arg(long)]
        deep: bool,
        /// Change nothing.
        #[arg(long)]
        check: bool,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Let a loaded image go. It is deleted when the agent next collects garbage and no release on this device names it.
    /// Exit status 1 when it was not loaded.
    Remove {
        #[command(flatten)]
        at: At,
        /// Which, as `image list` shows it.
        digest: Digest,
    },
}

#[derive(Debug, Subcommand)]
enum Volumes {
    /// Show every volume and which containers use it; needs no hub and no running agent.
    List {
        #[command(flatten)]
        at: At,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Delete a volume with all that is in it. Refused while a container uses it. Exit status 1 when it was not deleted.
    Remove {
        #[command(flatten)]
        at: At,
        /// Which, as `volume list` shows it.
        #[arg(value_name = "APP/NAME")]
        volume: VolumeId,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

#[derive(Debug, clap::Args)]
struct At {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

fn main() -> ExitCode {
    wait_for_children();
    // These must run before any thread exists, and are for the agent only.
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(|first| first.to_str()) {
        Some("shim") => return shim::run(arguments),
        Some("exec") => return exec::run(arguments),
        Some(unpack::SUBCOMMAND) => return unpack::run(arguments),
        Some(unpack::INFLATE) => return unpack::run_inflate(arguments),
        Some(unpack::REBUILD) => return unpack::run_rebuild(arguments),
        Some(doctor::attempt::SUBCOMMAND) => return doctor::attempt::run(arguments),
        _ => {}
    }
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("foreshore-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes sure that children can be waited for: an ignored SIGCHLD, inherited from whoever started the agent, would make the
/// kernel throw exit statuses away (sigaction(2)).
fn wait_for_children() {
    #[expect(unsafe_code, reason = "signal(2)")]
    // SAFETY: the default action.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Stage {
            at,
            app,
            logins,
            images,
        } => {
            // The agent's own: what it says there is what operators look at.
            log_to_stderr();
            let config = Config::load(&at.config)?;
            Ok(stage::run(&config, app.as_ref(), &images, logins))
        }
        Command::CheckConfig(at) => Ok(check_config(&at.config)),
        Command::Doctor { at, output } => examine(&at.config, output),
        Command::Run(at) => run_agent(&at.config).map(|()| ExitCode::SUCCESS),
        Command::Status { at, output } => {
            show_status(&at.config, output).map(|()| ExitCode::SUCCESS)
        }
        Command::Image(command) => images_command(command),
        Command::Volume(command) => volumes_command(command).map(|()| ExitCode::SUCCESS),
        Command::StopAll(at) => stop_all(&at.config).map(|()| ExitCode::SUCCESS),
        Command::RemoveAll { at, purge } => {
            remove_all(&at.config, purge).map(|()| ExitCode::SUCCESS)
        }
    }
}

fn check_config(path: &Path) -> ExitCode {
    let checked = Config::load(path).and_then(|config| {
        config.join_token()?;
        config.registry_client()?;
        Ok(config)
    });
    match checked {
        Ok(config) => {
            if let Err(error) = config.policy_source().load() {
                eprintln!("foreshore-agent: {:#}", anyhow::Error::from(error));
                return ExitCode::from(2);
            }
            println!("{} is fine: device {}", path.display(), config.device);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("foreshore-agent: {:#}", anyhow::Error::from(error));
            ExitCode::from(2)
        }
    }
}

fn examine(config: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("failed to find the agent's own program")?;
    let report = doctor::examine(&program, config);
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        }
        Output::Text => out.write_all(report.text().as_bytes())?,
    }
    Ok(match report.worst() {
        doctor::Level::Error => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn one_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Garbage collection and name lookups; seldom, and gone soon after.
        .max_blocking_threads(2)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("failed to start the event loop")
}

fn log_to_stderr() {
    use std::io::IsTerminal as _;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // A full disk or a reader that is gone would end the agent: what cannot be written is told by a panic.
        .log_internal_errors(false)
        .init();
}

fn need_root() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root to start containers; run it as root or with sudo");
    }
    Ok(())
}

fn open_runtime(config: &Config) -> anyhow::Result<OciRuntime> {
    let agent_exe = std::env::current_exe().context("failed to find the agent's own program")?;
    Ok(OciRuntime::new(OciConfig {
        run_dir: config.paths.run.clone(),
        state_dir: config.paths.state.clone(),
        cgroup_parent: config.cgroup.parent.clone(),
        agent_exe,
        user_namespaces: config.isolation.user_namespaces,
        policy: config.policy_source(),
    })?)
}

fn run_agent(path: &Path) -> anyhow::Result<()> {
    log_to_stderr();
    let config = Config::load(path)?;
    let token = config.join_token()?;
    config.registry_client()?;
    need_root()?;
    // Containers go first when the device runs out of memory. Needs CAP_SYS_RESOURCE; systemd may have done it.
    let _refused_without_it = std::fs::write("/proc/self/oom_score_adj", "-900");
    let boot = clock::boot_id().context("failed to read the boot id")?;
    if disk::make_way(&config.paths.state) {
        tracing::warn!("the disk is full: the ballast was given up");
    }
    let (state, mut loaded) = open_state(&config.paths.state)?;
    let images = Store::open(&stage::store_path(&config))?;
    // What containers ran from that are gone, or began anew since.
    if let Err(error) = images.clear_aside(&oci::holders(&config.paths.run)) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "what was set aside stays for now"
        );
    }
    loaded
        .damage
        .extend(stage::survey(&images, &config.paths.run, boot));
    let tokio = one_thread()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&tokio, async {
        // The runtime watches containers through the event loop, so it is made inside.
        let runtime = open_runtime(&config)?;
        let stop = stop_signal()?;
        let ((to_link, from_link), ends) = link::channels();
        let memory = Memory::new(state);
        let settings = link::Settings {
            device: config.device.clone(),
            token,
            hub: config.hub.clone(),
            seed: u64::from_le_bytes(*boot.0.first_chunk().expect("a boot id has 16 bytes")),
        };
        let birth = memory.clone();
        let session = tokio::task::spawn_local(link::run(settings, ends, move || birth.birth()));
        tracing::info!(device = %config.device, "foreshore-agent {}", env!("CARGO_PKG_VERSION"));
        let watchdog = Watchdog::new(&Environment::of_process(), config.watchdog.as_ref());
        let agent = Agent::new(Parts {
            tools: Tools {
                runtime: Rc::new(runtime),
                images: Arc::new(images),
                program: std::env::current_exe()
                    .context("failed to find the agent's own program")?,
                config: path.to_owned(),
                pulling: Pulling::written_to(config.paths.run.clone()),
            },
            config,
            memory,
            loaded,
            link: to_link,
            boot,
            watchdog,
        });
        agent.run(from_link, stop).await;
        if session.is_finished() {
            session
                .await
                .context("the session with the broker broke off")??;
        }
        Ok(())
    })
}

/// How long an agent waits for the state directory: `status` holds it for a moment, and so does an agent
/// that is about to be gone.
const LOCK_WAIT: Duration = Duration::from_secs(5);

fn open_state(dir: &Path) -> Result<(State, Loaded), OpenError> {
    let begin = Instant::now();
    loop {
        match State::open(dir, clock::unix_ms()) {
            Err(OpenError::InUse(_)) if begin.elapsed() < LOCK_WAIT => {
                std::thread::sleep(Duration::from_millis(100));
            }
            opened => return opened,
        }
    }
}

/// Ready when the agent is asked to end.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn images_command(command: Images) -> anyhow::Result<ExitCode> {
    need_root()?;
    let open = |at: &At| anyhow::Ok(images::open(&Config::load(&at.config)?)?);
    let (found, output) = match command {
        Images::Fsck {
            at,
            deep,
            check,
            output,
        } => return look_through(&at.config, deep, check, output),
        Images::Load {
            at,
            archive,
            output,
        } => {
            let store = open(&at)?;
            let mut unpacked = |progress| {
                if let Progress::Unpacked { diff_id } = progress {
                    eprintln!("unpacked {diff_id}");
                }
            };
            let loaded = images::load(&store, &archive, &mut std::io::stdin(), &mut unpacked)
                .with_context(|| format!("failed to load {}", archive.display()))?;
            (loaded, output)
        }
        Images::List { at, output } => (images::list(&open(&at)?)?, output),
        Images::Remove { at, digest } => {
            if !open(&at)?.unpin(&digest)? {
                bail!("{digest} was not loaded from a file; `image list` shows what was (PINNED)");
            }
            println!(
                "{digest} is no longer pinned; it goes when no release on this device names it"
            );
            return Ok(ExitCode::SUCCESS);
        }
    };
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &found)?;
            writeln!(out)?;
        }
        Output::Text => out.write_all(images::table(&found).as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn look_through(path: &Path, deep: bool, check: bool, output: Output) -> anyhow::Result<ExitCode> {
    need_root()?;
    let config = Config::load(path)?;
    let store = images::open(&config)?;
    let options = fsck::Options {
        deep,
        repair: !check,
    };
    let mut looked = |layer: &LayerFinding| {
        if layer.state != LayerState::Sound {
            eprintln!("layer {} is not as it should be", layer.layer);
        }
    };
    let mut unpacked = |progress| {
        if let Progress::Unpacked { diff_id } = progress {
            eprintln!("unpacked {diff_id}");
        }
    };
    let report = fsck::run(&config, &store, options, &mut looked, &mut unpacked)?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        }
        Output::Text => out.write_all(report.text().as_bytes())?,
    }
    Ok(ExitCode::from(report.verdict.exit_code()))
}

fn volumes_command(command: Volumes) -> anyhow::Result<()> {
    need_root()?;
    let mut out = std::io::stdout().lock();
    match command {
        Volumes::List { at, output } => {
            let paths = Config::load(&at.config)?.paths;
            let volumes = volumes::list(&paths.state, &paths.run)?;
            match output {
                Output::Json => {
                    serde_json::to_writer_pretty(&mut out, &volumes)?;
                    writeln!(out)?;
                }
                Output::Text => out.write_all(volumes::table(&volumes).as_bytes())?,
            }
        }
        Volumes::Remove { at, volume, output } => {
            let paths = Config::load(&at.config)?.paths;
            volumes::remove(&paths.state, &paths.run, &volume)?;
            let name = format!("{}/{}", volume.app, volume.name);
            match output {
                Output::Json => writeln!(out, "{}", serde_json::json!({"removed": name}))?,
                Output::Text => writeln!(out, "removed volume {name}")?,
            }
        }
    }
    Ok(())
}

fn stop_all(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    need_root()?;
    let _lock = state::lock(&config.paths.state)?;
    let releases = state::peek(&config.paths.state)?.releases;
    let tokio = one_thread()?;
    tokio::task::LocalSet::new().block_on(&tokio, async {
        let runtime = open_runtime(&config)?;
        let stopped = removal::stop_all(&runtime, &releases).await?;
        println!("stopped {stopped} containers");
        Ok(())
    })
}

fn remove_all(path: &Path, purge: bool) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    need_root()?;
    let lock = state::lock(&config.paths.state)?;
    // Whatever the state is like, what runs can be removed.
    let releases = state::peek(&config.paths.state)
        .unwrap_or_default()
        .releases;
    let tokio = one_thread()?;
    tokio::task::LocalSet::new().block_on(&tokio, async {
        let runtime = open_runtime(&config)?;
        let removed = removal::remove_all(&runtime, &releases).await?;
        runtime.remove_empty_cgroups();
        println!("removed {removed} containers");
        anyhow::Ok(())
    })?;
    remove_dir(&config.paths.run)?;
    if purge {
        remove_dir(&config.paths.state)?;
    }
    drop(lock);
    Ok(())
}

fn remove_dir(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What `status` prints.
#[derive(Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    device: String,
    agent_running: bool,
    version: Option<foreshore_protocol::Version>,
    apps: Vec<AppStatus>,
    containers: Vec<ContainerLine>,
    /// What the agent fetches right now.
    pull: Option<PullView>,
    /// Containers that run without a user namespace, and why.
    without_user_namespace: BTreeMap<String, String>,
    /// Containers whose weights under `blkio_config` have no effect now, and why.
    without_io_weights: BTreeMap<String, String>,
    /// What the hub seals this device's secrets to: a fingerprint.
    secrets_key: Option<String>,
}

fn show_status(path: &Path, output: Output) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let (agent_running, published) = match state::lock(&config.paths.state) {
        // Only without an agent may its runtime be opened: that tidies up.
        Ok(_lock) => (false, work_out(&config)?),
        Err(OpenError::InUse(_)) => {
            let said = status::published(&config.paths.run)
                .context("the agent runs and has not said yet what it does; try again")?;
            (true, said)
        }
        Err(error) => return Err(error.into()),
    };
    let without = published.containers.iter().filter_map(|container| {
        let reason = oci::user_namespace(&config.paths.run, &container.id)?.err()?;
        Some((container.id.clone(), reason))
    });
    let unweighted = published.containers.iter().filter_map(|container| {
        let reason = oci::without_io_weights(&config.paths.run, &container.id)?;
        Some((container.id.clone(), reason))
    });
    let status = Status {
        without_user_namespace: without.collect(),
        without_io_weights: unweighted.collect(),
        // Root's alone; whoever else asks does without.
        secrets_key: state::peek_key(&config.paths.state)
            .ok()
            .flatten()
            .map(|key| key.public().fingerprint()),
        // What an agent that is gone was at is no news.
        pull: agent_running
            .then(|| status::pull(&config.paths.run, clock::boot_ms()))
            .flatten(),
        device: config.device.to_string(),
        agent_running,
        version: published.version,
        apps: published.apps,
        containers: published.containers,
    };
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &status)?;
            writeln!(out)?;
        }
        Output::Text => print_status(&mut out, &status)?,
    }
    Ok(())
}

/// What the agent would say if it ran, from what is on disk.
fn work_out(config: &Config) -> anyhow::Result<Published> {
    need_root()?;
    let tokio = one_thread()?;
    let containers = tokio::task::LocalSet::new().block_on(&tokio, async {
        anyhow::Ok(open_runtime(config)?.list().await?)
    })?;
    let state::Peeked {
        head,
        history,
        releases,
        secrets_key,
        secrets,
    } = state::peek(&config.paths.state)?;
    let mut vault = Vault::new(config.device.clone(), secrets_key);
    if let Some(Ok(bundle)) = secrets.map(|sealed| vault.open(&sealed)) {
        vault.keep(bundle);
    }
    let images: BTreeSet<_> = Store::open(&stage::store_path(config))?
        .list()?
        .into_iter()
        .map(|image| image.digest)
        .collect();
    let now = clock::now(clock::boot_id()?);
    let observed = Observed {
        watching_since: now.ms,
        containers: containers
            .iter()
            .map(|container| ObservedContainer {
                container: container.clone(),
                probes: ProbeStates::default(),
            })
            .collect(),
        releases,
        images,
        update_locks: UpdateLocks::default(),
        verdicts: BTreeMap::new(),
        secrets: vault.revisions(),
        busy: Busy::default(),
        ..Observed::default()
    };
    let desired = head.as_ref().map(Desired::from).unwrap_or_default();
    Ok(Published {
        version: desired.version,
        apps: plan::plan(&desired, &observed, &history, now).status,
        containers: containers.iter().map(ContainerLine::from).collect(),
    })
}

fn print_status(out: &mut impl std::io::Write, status: &Status) -> std::io::Result<()> {
    let agent = if status.agent_running {
        "runs"
    } else {
        "does not run"
    };
    let version = status
        .version
        .map_or_else(|| "none yet".to_owned(), |version| version.to_string());
    writeln!(
        out,
        "device {}: agent {agent}, desired state {version}",
        status.device
    )?;
    if let Some(key) = &status.secrets_key {
        writeln!(out, "key {key}")?;
    }
    for app in &status.apps {
        let phase = format!("{:?}", app.phase).to_lowercase();
        writeln!(
            out,
            "\napp {}: {phase}, release {}",
            app.app,
            app.release.short()
        )?;
        if let Some(reason) = &app.reason {
            writeln!(out, "  why: {}", reason.message)?;
        }
        for service in &app.services {
            let state = match service.state {
                ServiceState::Waiting => "waiting".to_owned(),
                ServiceState::Running => "running".to_owned(),
                ServiceState::BackOff { exit_code } => {
                    format!("ended with {exit_code}, will be started again")
                }
                ServiceState::Exited { exit_code } => format!("ended with {exit_code}"),
            };
            let ready = if service.ready { "ready" } else { "not ready" };
            writeln!(
                out,
                "  {:<20} {state}, {ready}, {} restarts",
                service.service, service.restarts
            )?;
            if let Some(kept) = &service.kept {
                writeln!(
                    out,
                    "  {:<20} container {} of release {} is kept, through the trial and for {} from the switch",
                    "",
                    kept.instance,
                    kept.release.short(),
                    Span(kept.keep_ms)
                )?;
            }
        }
    }
    if let Some(pull) = &status.pull {
        writeln!(out, "\nfetches images of release {}", pull.release.short())?;
        for image in &pull.images {
            writeln!(out, "  {}: {}", image.image, status::pull_line(pull, image))?;
        }
    }
    if !status.containers.is_empty() {
        writeln!(out)?;
    }
    for container in &status.containers {
        let pid = container
            .pid
            .map_or_else(String::new, |pid| format!(" pid {pid}"));
        writeln!(
            out,
            "container {:<30} {}{pid}",
            container.id, container.state
        )?;
        if let Some(reason) = status.without_user_namespace.get(&container.id) {
            writeln!(out, "  without a user namespace: {reason}")?;
        }
        if let Some(reason) = status.without_io_weights.get(&container.id) {
            writeln!(out, "  I/O weights have no effect: {reason}")?;
        }
    }
    Ok(())
}
