//! One task for each running container whose service has probes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use foreshore_protocol::Digest;
use foreshore_protocol::manifest;
use foreshore_protocol::release::{Release, service_digest};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::plan::{History, ProbeState, ProbeStates};
use crate::probe;
use crate::runtime::{Container, ContainerId, ContainerState, Runtime};

type States = Rc<RefCell<BTreeMap<ContainerId, ProbeStates>>>;

#[derive(Debug)]
pub(super) struct Probes {
    tasks: BTreeMap<ContainerId, JoinHandle<()>>,
    states: States,
    changed: Rc<Notify>,
}

impl Probes {
    pub(super) fn new() -> Self {
        Self {
            tasks: BTreeMap::new(),
            states: States::default(),
            changed: Rc::default(),
        }
    }

    /// What a container's probes say.
    pub(super) fn states(&self, id: &ContainerId) -> ProbeStates {
        self.states.borrow().get(id).cloned().unwrap_or_default()
    }

    /// Waits until a probe says something else. Cancel safe: a change between two calls is kept.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Begins probes of containers that run, ends those of containers that do not.
    pub(super) fn follow<R: Runtime + 'static>(
        &mut self,
        runtime: &Rc<R>,
        containers: &[Container],
        releases: &BTreeMap<Digest, Release>,
        history: &History,
    ) {
        let runs =
            |container: &&Container| matches!(container.state, ContainerState::Running { .. });
        let states = &self.states;
        self.tasks.retain(|id, task| {
            let running = containers.iter().filter(runs).any(|other| other.id == *id);
            if !running {
                task.abort();
                states.borrow_mut().remove(id);
            }
            running
        });
        for container in containers.iter().filter(runs) {
            if self.tasks.contains_key(&container.id) {
                continue;
            }
            if let Some(probes) = probes_of(container, releases) {
                let came_up = came_up(&container.id, history);
                let task = self.begin(Rc::clone(runtime), container.id.clone(), probes, came_up);
                self.tasks.insert(container.id.clone(), task);
            }
        }
    }

    fn begin<R: Runtime + 'static>(
        &self,
        runtime: Rc<R>,
        id: ContainerId,
        probes: manifest::Probes,
        came_up: bool,
    ) -> JoinHandle<()> {
        let (states, changed) = (Rc::clone(&self.states), Rc::clone(&self.changed));
        tokio::task::spawn_local(async move {
            let tell = |name: &str, state: ProbeState| {
                tracing::debug!(container = %id, probe = name, ?state, "probe");
                let mut states = states.borrow_mut();
                let states = states.entry(id.clone()).or_default();
                match name {
                    "startup" => states.startup = state,
                    "readiness" => states.readiness = state,
                    _ => states.liveness = state,
                }
                changed.notify_one();
            };
            match &probes.startup {
                Some(startup) if !came_up => {
                    probe::until_ready(&*runtime, &id, startup, |state| {
                        tell("startup", state);
                    })
                    .await
                }
                // Nobody waits for one that is not there; one that succeeded once is not asked again.
                _ => tell("startup", ProbeState::Ready),
            }
            let watch = async |name, probe: &Option<manifest::Probe>| {
                if let Some(probe) = probe {
                    probe::watch(&*runtime, &id, probe, |state| tell(name, state)).await;
                }
            };
            tokio::join!(
                watch("readiness", &probes.readiness),
                watch("liveness", &probes.liveness)
            );
        })
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        for task in self.tasks.values() {
            task.abort();
        }
    }
}

/// The probes of the service that a container was started as, if it has any.
fn probes_of(
    container: &Container,
    releases: &BTreeMap<Digest, Release>,
) -> Option<manifest::Probes> {
    let service = releases
        .values()
        .filter(|release| release.app == container.id.app)
        .filter_map(|release| release.services.get(&container.id.service))
        .find(|service| service_digest(service) == container.service_digest)?;
    let any = service.probes.each().next().is_some();
    any.then(|| service.probes.clone())
}

fn came_up(id: &ContainerId, history: &History) -> bool {
    let Some(app) = history.apps.get(&id.app) else {
        return false;
    };
    let own = app.services.get(&id.service);
    let old = app.kept.get(&id.service).map(|kept| &kept.service);
    let mut known = own.into_iter().chain(old);
    known.any(|service| service.came_up == id.instance)
}
