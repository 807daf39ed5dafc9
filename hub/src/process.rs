//! A whole hub: everything started in order, and stopped in order.

use std::fs::{File, TryLockError};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::analysis::{self, Asker};
use crate::api::{self, Api};
use crate::broker::{self, Embedded, EmbeddedConfig};
use crate::clock::HubClock;
use crate::config::{Broker, BrokerKind, Config, ConfigError};
use crate::controller::{self, ControlError, Controller};
use crate::http;
use crate::images::{Images, OpenError};
use crate::link::{self, LinkConfig, LinkCounters};
use crate::pulls::Pulls;
use crate::registry::uploads::{self, UploadError, Uploads};
use crate::registry::{self, BLOBS_AT_ONCE, READERS_AT_ONCE};
use crate::secrets::{SecretError, Secrets};
use crate::store::{self, Store, StoreError, Writer};

/// How long to wait for the first connection to the broker before the hub says that it serves anyway.
const FIRST_LINK_WITHIN: Duration = Duration::from_secs(10);

/// Why a hub did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The secrets are not usable.
    #[error(transparent)]
    Secrets(#[from] SecretError),
    /// Another hub uses the data directory.
    #[error("another hub is using {}; stop it first", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The lock file cannot be used.
    #[error("failed to lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A first change failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The images cannot be used.
    #[error(transparent)]
    Images(#[from] OpenError),
    /// Nobody can be asked whether a release is well.
    #[error("[analysis] ca_file is not usable")]
    Analysis(#[from] analysis::OpenError),
    /// The uploads cannot be used.
    #[error("failed to open the uploads of the registry")]
    Uploads(#[from] UploadError),
    /// The address cannot be listened on.
    #[error("failed to listen on {address}; is another program using the port?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The broker did not start.
    #[error(transparent)]
    Broker(#[from] broker::StartError),
    /// `endpoints.json` cannot be written.
    #[error("failed to write {}", path.display())]
    Endpoints {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A hub that serves.
#[derive(Debug)]
pub struct RunningHub {
    api: SocketAddr,
    broker: String,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
    store: Option<Store>,
    writer: Writer,
    embedded: Option<Embedded>,
    data: PathBuf,
    _lock: File,
}

/// Keeps one data directory for one hub. The lock ends with the process, however it ends.
///
/// # Errors
///
/// When another hub has it.
pub fn lock(data: &Path) -> Result<File, StartError> {
    let path = data.join("lock");
    let failed = |source| StartError::Lock {
        path: path.clone(),
        source,
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::Locked { path }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Starts a hub and returns when it serves.
///
/// # Errors
///
/// See [`StartError`]; then nothing is left running.
pub async fn start(config: Config) -> Result<RunningHub, StartError> {
    let broker = config.broker.check()?;
    let secrets = Secrets::load_or_create(&config.data)?;
    let lock = lock(&config.data)?;
    let (store, writer) = Store::open(&config.data.join("hub.db"))?;
    let latest = store
        .read(|connection| Ok::<_, StoreError>(store::desired::latest(connection)?))
        .await?;
    let ttl = Duration::from_secs(config.leases.ttl_s);
    let controller = Controller::with_lease_ttl(store.clone(), HubClock::start(latest), ttl);
    let images = Images::open(
        &config.data.join("images"),
        config.registry_client()?,
        store.clone(),
        config.registry.unused_expires_s.saturating_mul(1000),
        config.upstreams()?,
    )?;
    images.adopt().await?;
    let limits = uploads::Limits {
        open: config.registry.max_uploads,
        blob_bytes: config.api.max_image_bytes,
        expires_ms: config.registry.upload_expires_s.saturating_mul(1000),
    };
    let asker = Asker::open(config.analysis.hosts()?, config.analysis.ca_file.as_deref())?;
    let uploads = Uploads::open(config.data.join("pushes"), store.clone(), limits).await?;
    let listener = TcpListener::bind(config.api.listen)
        .await
        .map_err(|source| StartError::Listen {
            address: config.api.listen,
            source,
        })?;
    let api = listener.local_addr().map_err(|source| StartError::Listen {
        address: config.api.listen,
        source,
    })?;
    let Reach {
        embedded,
        host,
        port,
        url,
    } = start_broker(broker, &secrets).await?;
    if embedded.is_some() {
        // Whoever was connected was connected to the broker of the process before.
        controller
            .change(|change| Ok(store::device::all_offline(change.connection)?))
            .await?;
    }
    let counters = Arc::new(LinkCounters::default());
    let pulls = Pulls::default();
    let (stop, stopping) = watch::channel(false);
    let link = LinkConfig {
        host,
        port,
        secret: secrets.hub.clone(),
    };
    let (tidy, now) = (images.clone(), controller.clone());
    let given_up = registry::keep_tidy(uploads.clone(), images.clone(), controller.clone());
    let router = api::router(Api {
        controller: controller.clone(),
        images,
        uploads,
        secrets,
        pulls: pulls.clone(),
        counters: Arc::clone(&counters),
        broker: if embedded.is_some() {
            BrokerKind::Embedded
        } else {
            BrokerKind::External
        },
        blob_turns: Arc::new(Semaphore::new(BLOBS_AT_ONCE)),
        readers: Arc::new(Semaphore::new(READERS_AT_ONCE)),
        max_image_bytes: config.api.max_image_bytes,
        analysis_hosts: asker.hosts().clone(),
        stopping: stopping.clone(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(http::serve(listener, router, stopping.clone()));
    tasks.spawn(until(
        stopping.clone(),
        link::run(link, controller.clone(), Arc::clone(&counters), pulls),
    ));
    tasks.spawn(until(stopping.clone(), async move {
        tidy.keep_tidy(move || now.now()).await
    }));
    tasks.spawn(until(
        stopping.clone(),
        controller::analysis::run(controller.clone(), asker),
    ));
    tasks.spawn(until(stopping.clone(), given_up));
    tasks.spawn(until(stopping, {
        let controller = controller.clone();
        async move { controller.run().await }
    }));
    await_link(&controller).await;
    let hub = RunningHub {
        api,
        broker: url,
        stop,
        tasks,
        store: Some(store),
        writer,
        embedded,
        data: config.data,
        _lock: lock,
    };
    hub.write_endpoints()?;
    Ok(hub)
}

/// A broker that is away must not keep the API from serving: the hub goes on without it, and says so.
async fn await_link(controller: &Controller) {
    let connected = async {
        while controller.listening().since.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(FIRST_LINK_WITHIN, connected)
        .await
        .is_err()
    {
        tracing::warn!("the broker does not answer yet; the hub serves its API and keeps trying");
    }
}

async fn until(mut stopping: watch::Receiver<bool>, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

impl RunningHub {
    /// Where the API listens.
    #[must_use]
    pub const fn api(&self) -> SocketAddr {
        self.api
    }

    /// Where devices connect to.
    #[must_use]
    pub fn broker(&self) -> &str {
        &self.broker
    }

    fn write_endpoints(&self) -> Result<(), StartError> {
        let path = self.data.join("endpoints.json");
        let api = format!("http://{}", reachable(self.api));
        let body = serde_json::json!({"api": api, "broker": self.broker});
        let write = || {
            let temporary = path.with_extension("new");
            let mut file = File::create(&temporary)?;
            writeln!(file, "{body}")?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)
        };
        write().map_err(|source| StartError::Endpoints {
            path: path.clone(),
            source,
        })?;
        tracing::info!(%api, broker = %self.broker, data = %self.data.display(), "the hub serves");
        Ok(())
    }

    /// Waits until something ended that should not have: the embedded broker. For ever if it is external. Cancel
    /// safe.
    pub async fn failed(&mut self) {
        match &mut self.embedded {
            Some(broker) => broker.ended().await,
            None => std::future::pending().await,
        }
    }

    /// Stops everything in order: no more calls, no more messages, then the store. Takes at most 5 s or so.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        _ = std::fs::remove_file(self.data.join("endpoints.json"));
        while self.tasks.join_next().await.is_some() {}
        if let Some(broker) = self.embedded.take() {
            // A panic in there ends only that thread, and the process ends anyway.
            _ = tokio::task::spawn_blocking(move || broker.shutdown()).await;
        }
        // The writer ends with the last handle; tasks that were cut off may hold one a moment longer.
        self.store = None;
        let writer = self.writer;
        let joined = tokio::task::spawn_blocking(move || writer.join());
        if tokio::time::timeout(Duration::from_secs(2), joined)
            .await
            .is_err()
        {
            tracing::warn!("the store is still busy; what was answered is on disk");
        }
    }
}

fn mqtt_url(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("mqtt://[{host}]:{port}")
    } else {
        format!("mqtt://{host}:{port}")
    }
}

/// The broker if it is the hub's own, and where the hub reaches it.
struct Reach {
    embedded: Option<Embedded>,
    host: String,
    port: u16,
    /// Where devices connect.
    url: String,
}

async fn start_broker(broker: Broker, secrets: &Secrets) -> Result<Reach, StartError> {
    let listen = match broker {
        Broker::External(host, port) => {
            let url = mqtt_url(&host, port);
            return Ok(Reach {
                embedded: None,
                host,
                port,
                url,
            });
        }
        Broker::Embedded(listen) => listen,
    };
    let config = EmbeddedConfig::new(listen, secrets.join.clone(), secrets.hub.clone());
    let embedded = tokio::task::spawn_blocking(move || Embedded::start(config))
        .await
        .map_err(|_| StoreError::Stopped)??;
    let (devices, hub) = (reachable(embedded.device_address()), embedded.hub_address());
    Ok(Reach {
        host: hub.ip().to_string(),
        port: hub.port(),
        url: mqtt_url(&devices.ip().to_string(), devices.port()),
        embedded: Some(embedded),
    })
}

/// An address that a client on this machine can connect to: loopback for "every interface".
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
