//! One probe task for each running container whose service has a readiness probe.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use foreshore_protocol::Digest;
use foreshore_protocol::manifest::Probe;
use foreshore_protocol::release::{Release, service_digest};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::plan::ProbeState;
use crate::probe;
use crate::runtime::{Container, ContainerId, ContainerState, Runtime};

type States = Rc<RefCell<BTreeMap<ContainerId, ProbeState>>>;

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

    /// What a container's probe says.
    pub(super) fn state(&self, id: &ContainerId) -> ProbeState {
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
            if let Some(probe) = probe_of(container, releases) {
                let task = self.begin(Rc::clone(runtime), container.id.clone(), probe);
                self.tasks.insert(container.id.clone(), task);
            }
        }
    }

    fn begin<R: Runtime + 'static>(
        &self,
        runtime: Rc<R>,
        id: ContainerId,
        probe: Probe,
    ) -> JoinHandle<()> {
        let (states, changed) = (Rc::clone(&self.states), Rc::clone(&self.changed));
        tokio::task::spawn_local(async move {
            probe::watch(&*runtime, &id, &probe, |state| {
                tracing::debug!(container = %id, ?state, "probe");
                states.borrow_mut().insert(id.clone(), state);
                changed.notify_one();
            })
            .await;
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

/// The readiness probe of the service that a container was started as.
fn probe_of(container: &Container, releases: &BTreeMap<Digest, Release>) -> Option<Probe> {
    releases
        .values()
        .filter(|release| release.app == container.id.app)
        .filter_map(|release| release.services.get(&container.id.service))
        .find(|service| service_digest(service) == container.service_digest)?
        .probes
        .readiness
        .clone()
}
