//! One device under test, and what it needs around it.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use foreshore_agent::config::Config;
use foreshore_agent::execute::Tools;
use foreshore_agent::pulling::Pulling;
use foreshore_agent::reconcile::{Agent, Memory, Parts};
use foreshore_agent::runtime::ContainerState;
use foreshore_agent::runtime::fake::{Call, FakeRuntime};
use foreshore_agent::state::State;
use foreshore_agent::watchdog::Watchdog;
use foreshore_agent::{clock, link, stage};
use foreshore_images::store::Store;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::message::{AppStatus, Phase};
use foreshore_protocol::release::Release;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hub::Hub;
use crate::registry::Registry;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(40);

/// Asks until there is an answer.
pub async fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + LONG;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "waited {LONG:?} for {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A service whose image and spec differ by `name`.
pub fn shop(name: &str) -> Service {
    serde_json::from_value(serde_json::json!({"image": name})).unwrap()
}

#[derive(Debug)]
pub struct Bed {
    dir: tempfile::TempDir,
    pub hub: Hub,
    registry: Registry,
}

impl Bed {
    /// Where the owner of the device writes what apps may ask for.
    pub fn policy_file(&self) -> PathBuf {
        self.dir.path().join("policy.toml")
    }

    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "join-token\n").unwrap();
        let hub = Hub::start(dir.path(), &"device-1".parse().unwrap());
        let registry = Registry::start();
        let config = format!(
            "device = \"device-1\"\n[hub]\nbroker = \"mqtt://127.0.0.1:{}\"\nregistry = \"{}\"\n\
             join_token_file = \"{dir}/token\"\nreport_interval = \"100ms\"\nreconnect_max = \"1s\"\n\
             keepalive = \"5s\"\nwill_delay = \"0s\"\n[paths]\nstate = \"{dir}/state\"\nrun = \"{dir}/run\"\n",
            hub.port,
            registry.url,
            dir = dir.path().display(),
        );
        std::fs::write(dir.path().join("agent.toml"), config).unwrap();
        Self { dir, hub, registry }
    }

    /// A release of app `shop` with one service `web`, whose image exists.
    pub fn release(&self, service: &Service) -> Release {
        let image = self.registry.image(&service.image);
        self.release_with(service, &image)
    }

    pub fn release_with(&self, service: &Service, image: &str) -> Release {
        let mut service = service.clone();
        service.image = image.to_owned();
        Release {
            schema: 1,
            app: "shop".parse().unwrap(),
            services: [("web".parse().unwrap(), service)].into(),
            image_pull_secrets: Vec::new(),
        }
    }
}

/// A device: the agent's loop over a fake runtime that outlives it.
#[derive(Debug)]
pub struct Device<'a> {
    bed: &'a Bed,
    pub runtime: Rc<FakeRuntime>,
    agent: Option<(JoinHandle<()>, JoinHandle<()>, oneshot::Sender<()>)>,
}

impl<'a> Device<'a> {
    pub async fn start(bed: &'a Bed) -> Self {
        let runtime = Rc::new(FakeRuntime::new());
        runtime.set_now(clock::boot_ms().0);
        let mut device = Self {
            bed,
            runtime,
            agent: None,
        };
        device.restart().await;
        device
    }

    pub async fn restart(&mut self) {
        self.kill().await;
        let path = self.bed.dir.path().join("agent.toml");
        let config = Config::load(&path).unwrap();
        let (state, loaded) = State::open(&config.paths.state, clock::unix_ms()).unwrap();
        let images = Arc::new(Store::open(&stage::store_path(&config)).unwrap());
        let ((to_link, from_link), ends) = link::channels();
        let memory = Memory::new(state);
        let settings = link::Settings {
            device: config.device.clone(),
            token: config.join_token().unwrap(),
            hub: config.hub.clone(),
            seed: 1,
        };
        let birth = memory.clone();
        let session = tokio::task::spawn_local(async move {
            link::run(settings, ends, move || birth.birth())
                .await
                .unwrap();
        });
        let agent = Agent::new(Parts {
            tools: Tools {
                runtime: Rc::clone(&self.runtime),
                images,
                program: env!("CARGO_BIN_EXE_foreshore-agent").into(),
                config: path,
                pulling: Pulling::default(),
            },
            config,
            memory,
            loaded,
            link: to_link,
            boot: clock::boot_id().unwrap(),
            watchdog: Watchdog::default(),
        });
        let (stop, stopped) = oneshot::channel();
        let running = tokio::task::spawn_local(agent.run(from_link, async {
            let _asked = stopped.await;
        }));
        self.agent = Some((running, session, stop));
    }

    /// As SIGKILL: nothing is said, the connection breaks.
    pub async fn kill(&mut self) {
        if let Some((running, session, _stop)) = self.agent.take() {
            session.abort();
            running.abort();
            let _cancelled = (session.await, running.await);
        }
    }

    /// As SIGTERM.
    pub async fn stop(&mut self) {
        let (running, session, stop) = self.agent.take().unwrap();
        stop.send(()).unwrap();
        running.await.unwrap();
        session.await.unwrap();
    }

    pub fn state_dir(&self) -> PathBuf {
        self.bed.dir.path().join("state")
    }

    pub fn starts(&self) -> usize {
        self.runtime
            .calls()
            .iter()
            .filter(|call| matches!(call, Call::Start(_)))
            .count()
    }

    pub fn images(&self) -> usize {
        // Not by opening the store: that holds its lock for a moment, which the agent may want.
        std::fs::read_dir(self.state_dir().join("images/images")).map_or(0, Iterator::count)
    }

    /// How many events the file of the outbox holds beyond the acknowledged.
    pub fn unacknowledged(&self) -> usize {
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(self.state_dir().join("events"), copy.path().join("events")).unwrap();
        State::open(copy.path(), 1)
            .unwrap()
            .1
            .outbox
            .events()
            .count()
    }

    /// Waits until the hub was told of this phase in the newest assignment.
    pub async fn phase(&self, app: &str, phase: Phase) -> AppStatus {
        let mut last = None;
        let end = tokio::time::Instant::now() + LONG;
        loop {
            let status = self.bed.hub.reported().and_then(|report| {
                let newest = report.version;
                report
                    .apps
                    .into_iter()
                    .find(|status| status.app.as_str() == app && Some(status.since) == newest)
            });
            if let Some(status) = status {
                if status.phase == phase {
                    return status;
                }
                last = Some(status);
            }
            assert!(
                tokio::time::Instant::now() < end,
                "waited {LONG:?} for {phase:?}: {last:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until exactly this release's container runs.
    pub async fn running(&self, app: &str, release: &Release) {
        wait_for("the release to run", || {
            let containers = self.runtime.containers();
            let right = |container: &foreshore_agent::runtime::Container| {
                container.id.app.as_str() == app
                    && container.release == release.digest()
                    && matches!(container.state, ContainerState::Running { .. })
            };
            (containers.len() == 1 && right(&containers[0])).then_some(())
        })
        .await;
    }
}
