//! `foreshore-hub`: arguments, logging and signals around the library.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use foreshore_hub::broker::mosquitto::{self, MosquittoConfig};
use foreshore_hub::clock::wall_clock;
use foreshore_hub::config::Config;
use foreshore_hub::store::{self, Store, StoreError};
use foreshore_hub::{backup, process, secrets};
use foreshore_protocol::DeviceId;

/// The Foreshore hub: holds what should run where, and rolls changes out to devices in waves.
///
/// One program is a whole hub: SQLite database, MQTT broker, REST API and image registry. It keeps everything in
/// one data directory.
#[derive(Debug, Parser)]
#[command(name = "foreshore-hub", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the hub until SIGTERM or SIGINT.
    ///
    /// On the first start it makes its data directory and in it api-token (for operators), join-token
    /// (for devices) and hub-secret, each readable only by its owner. When it serves, it writes
    /// endpoints.json there with the addresses of its API and broker.
    ///
    /// A smallest configuration:
    ///
    ///     data = "/var/lib/foreshore-hub"
    ///     [api]
    ///     listen = "127.0.0.1:8480"
    ///     [broker]
    ///     listen = "0.0.0.0:1883"
    ///
    /// Log levels come from RUST_LOG, for example RUST_LOG=debug; the default is info.
    #[command(verbatim_doc_comment)]
    Run(Run),
    /// Write a backup of the hub's data into a directory; the hub may run.
    ///
    /// It holds the database as of one moment and the hub's secrets, and with --images the images that the hub
    /// serves. Keep it as safe as the data directory: whoever reads it can act for the hub.
    ///
    ///     foreshore-hub backup --data /var/lib/foreshore-hub --to /mnt/backup/2026-11-21
    #[command(verbatim_doc_comment)]
    Backup(Backup),
    /// Make a hub's data directory of a backup.
    ///
    /// The database is then older than what devices have seen. A new epoch begins, and each device is told
    /// something only after it has said what it has. One that has more than the backup knows of keeps what it runs,
    /// and is held (`foreshore get devices` shows it) until `foreshore device release DEVICE` gives it what the hub
    /// has for it. All others go on as if nothing had happened.
    ///
    /// Without images in the backup, those that are in the data directory's `images` stay; what is missing has to be
    /// imported again.
    ///
    ///     foreshore-hub restore --from /mnt/backup/2026-11-21 --data /var/lib/foreshore-hub
    #[command(verbatim_doc_comment)]
    Restore(Restore),
    /// Begin a new epoch, after a database was put back by other means than `restore`.
    ///
    /// Such a database is older than what devices have seen, so they refuse what it says (the hub records
    /// `device-ahead` events). From a new epoch on they are treated as after `restore`. The hub must not run
    /// meanwhile.
    NewEpoch(Data),
    /// Write a configuration for mosquitto, to be used as an external broker.
    ///
    /// It holds the same rules as the embedded broker: a device reads and writes nothing but its own
    /// topics. The join token and the hub's secret come from the hub's data directory (made when
    /// missing). Run it again with every device when one joins, then make mosquitto read it again
    /// (SIGHUP).
    ///
    /// Then run `mosquitto -c DIRECTORY/mosquitto.conf`, and give the hub
    ///
    ///     [broker]
    ///     kind = "external"
    ///     url = "mqtt://HOST:PORT"
    #[command(verbatim_doc_comment)]
    MosquittoConfig(MosquittoArguments),
}

#[derive(Debug, Args)]
struct MosquittoArguments {
    /// Write mosquitto.conf, passwd and acl into this directory.
    #[arg(long, value_name = "DIRECTORY")]
    out: PathBuf,
    /// The hub's data directory.
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
    /// Where mosquitto shall listen.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:1883")]
    listen: SocketAddr,
    /// A device that may log in; may be given many times.
    #[arg(long = "device", value_name = "ID")]
    devices: Vec<DeviceId>,
}

#[derive(Debug, Args)]
struct Run {
    /// The configuration, TOML. Unknown keys are errors.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Use this data directory instead of the configured one.
    #[arg(long, value_name = "DIRECTORY")]
    data: Option<PathBuf>,
    /// Listen here for the API instead of where the configuration says; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct Backup {
    /// The hub's data directory.
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
    /// Where to write it: an empty directory, or one that is to be made.
    #[arg(long, value_name = "DIRECTORY")]
    to: PathBuf,
    /// Copy the images that the hub serves as well.
    #[arg(long)]
    images: bool,
}

#[derive(Debug, Args)]
struct Restore {
    /// The backup.
    #[arg(long, value_name = "DIRECTORY")]
    from: PathBuf,
    /// The data directory to make; it must hold no hub.db.
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
}

#[derive(Debug, Args)]
struct Data {
    /// The hub's data directory.
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
}

/// How long threads that still write may take once the hub has stopped.
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(run) => run_hub(run),
        Command::Backup(arguments) => write_backup(&arguments),
        Command::Restore(arguments) => restore(&arguments),
        Command::NewEpoch(Data { data }) => new_epoch(&data),
        Command::MosquittoConfig(arguments) => mosquitto_config(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("foreshore-hub: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_hub(run: Run) -> anyhow::Result<()> {
    let mut config = match (&run.config, &run.data) {
        (Some(file), _) => Config::load(file)?,
        (None, Some(data)) => Config::with_data(data.clone()),
        (None, None) => anyhow::bail!(
            "give --config FILE, or --data DIRECTORY for the defaults; see `foreshore-hub run --help`"
        ),
    };
    if let Some(data) = run.data {
        config.data = data;
    }
    if let Some(listen) = run.listen {
        config.api.listen = listen;
    }
    start_logging();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let result = runtime.block_on(serve(config));
    // A thread that waits for a registry is not waited for; what it wrote is gone on with.
    runtime.shutdown_timeout(LINGER);
    result
}

async fn serve(config: Config) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let mut hub = tokio::select! {
        started = process::start(config) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let failed = tokio::select! {
        _ = terminate.recv() => {
            tracing::info!("SIGTERM: stopping");
            false
        }
        _ = interrupt.recv() => {
            tracing::info!("SIGINT: stopping");
            false
        }
        () = hub.failed() => true,
    };
    hub.stop().await;
    // A supervisor starts the hub again; without a broker it would only look alive.
    anyhow::ensure!(!failed, "the embedded broker ended by itself; see the log");
    Ok(())
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,rmqtt=warn,rumqttc=warn"));
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        // A full disk or a reader that is gone would end the hub: what cannot be written is told by a panic.
        .log_internal_errors(false)
        .init();
}

fn write_backup(arguments: &Backup) -> anyhow::Result<()> {
    let contents = backup::write(&arguments.data, &arguments.to, arguments.images)?;
    let images = if arguments.images {
        format!("{} bytes of images", contents.image_bytes)
    } else {
        "no images".to_owned()
    };
    println!(
        "{}: {} devices, {images}",
        arguments.to.display(),
        contents.devices
    );
    Ok(())
}

fn restore(arguments: &Restore) -> anyhow::Result<()> {
    std::fs::create_dir_all(&arguments.data)
        .with_context(|| format!("failed to make {}", arguments.data.display()))?;
    let _lock = process::lock(&arguments.data)?;
    let (epoch, contents) = backup::restore(&arguments.from, &arguments.data, wall_clock())?;
    println!("epoch {epoch}, {} devices", contents.devices);
    eprintln!(
        "devices that went on without this backup keep what they run, and are held once they connect; \
         see `foreshore get devices` and `foreshore device release`"
    );
    Ok(())
}

fn new_epoch(data: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        data.join("hub.db").is_file(),
        "{} holds no hub.db",
        data.display()
    );
    secrets::Secrets::load_or_create(data)?;
    let _lock = process::lock(data)?;
    let (store, writer) = Store::open(&data.join("hub.db"))?;
    let change = store.write(|connection| {
        Ok::<_, StoreError>(store::desired::begin_epoch(connection, wall_clock())?)
    });
    let epoch = tokio::runtime::Builder::new_current_thread()
        .build()?
        .block_on(change)?;
    drop(store);
    writer.join();
    println!("epoch {epoch}");
    Ok(())
}

fn mosquitto_config(arguments: MosquittoArguments) -> anyhow::Result<()> {
    let secrets = secrets::Secrets::load_or_create(&arguments.data)?;
    let directory = std::path::absolute(&arguments.out)
        .with_context(|| format!("failed to find {}", arguments.out.display()))?;
    let config = MosquittoConfig {
        listen: arguments.listen,
        directory: directory.clone(),
        join_token: secrets.join,
        hub_secret: secrets.hub,
        devices: arguments.devices,
    };
    let mut random = Ok(());
    let files = mosquitto::render(&config, || {
        let mut salt = [0; mosquitto::SALT_BYTES];
        if let Err(error) = getrandom::fill(&mut salt) {
            random = Err(error);
        }
        salt
    })?;
    random.map_err(|error| anyhow::anyhow!("failed to draw random bytes: {error}"))?;
    mosquitto::write(&files, &directory)?;
    println!("{}", directory.join("mosquitto.conf").display());
    Ok(())
}
