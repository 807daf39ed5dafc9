//! A runtime in memory, for tests of what stands on top of one: it starts nothing, and does what it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::{AppName, ServiceName};
use tokio::sync::Notify;

use super::secrets::Values;
use super::{
    Container, ContainerId, ContainerSpec, ContainerState, ExecError, Exit, ListError, RemoveError,
    Runtime, StartError, StopError,
};

/// A verb of the trait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// `start`.
    Start(ContainerId),
    /// `stop`.
    Stop(ContainerId),
    /// `remove`.
    Remove(ContainerId),
    /// `exec`, with its command.
    Exec(ContainerId, Vec<String>),
    /// `connect`, with its port.
    Connect(ContainerId, u16),
}

/// What a call does instead of working.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `start` is refused for good.
    Refuse(String),
    /// The verb fails with this message.
    Fail(String),
    /// The verb never returns, as if the agent had been killed in it. What it did before that stays: a start leaves
    /// a broken container, a stop a running one, a remove a broken one.
    Crash,
}

/// Containers in memory.
#[derive(Debug, Default)]
pub struct FakeRuntime {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    containers: BTreeMap<ContainerId, Container>,
    faults: Vec<(Call, Fault)>,
    calls: Vec<Call>,
    exec_codes: BTreeMap<Vec<String>, i32>,
    servers: BTreeMap<(ContainerId, u16), std::net::SocketAddr>,
    now_ms: u64,
    next_pid: i32,
}

impl FakeRuntime {
    /// Without containers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the time that new containers start at, milliseconds of `CLOCK_BOOTTIME`.
    pub fn set_now(&self, now_ms: u64) {
        self.inner().now_ms = now_ms;
    }

    /// Makes the next call equal to `call` (commands and ports included) meet `fault`, once.
    pub fn inject(&self, call: Call, fault: Fault) {
        self.inner().faults.push((call, fault));
    }

    /// Ends a container by itself; [`Runtime::changed`] returns. An unknown one is fine.
    pub fn exit(&self, id: &ContainerId, exit: Exit) {
        if let Some(container) = self.inner().containers.get_mut(id) {
            container.state = ContainerState::Exited(exit);
        }
        self.changed.notify_one();
    }

    /// Loses a container's supervisor: it is broken from now on.
    pub fn break_container(&self, id: &ContainerId) {
        if let Some(container) = self.inner().containers.get_mut(id) {
            container.state = ContainerState::Broken;
        }
        self.changed.notify_one();
    }

    /// What happens after a reboot: no container is there.
    pub fn reboot(&self) {
        self.inner().containers.clear();
    }

    /// Sets the exit code of a command run with `exec`; others give 0.
    pub fn set_exec_code(&self, command: &[String], code: i32) {
        self.inner().exec_codes.insert(command.to_vec(), code);
    }

    /// Makes connections to a container's port go to `server`; ports without one refuse.
    pub fn set_server(&self, id: &ContainerId, port: u16, server: std::net::SocketAddr) {
        self.inner().servers.insert((id.clone(), port), server);
    }

    /// All calls so far, `list` and `changed` left out.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.inner().calls.clone()
    }

    /// The containers there are.
    #[must_use]
    pub fn containers(&self) -> Vec<Container> {
        self.inner().containers.values().cloned().collect()
    }

    fn enter(&self, call: Call) -> Option<Fault> {
        let mut inner = self.inner();
        let at = inner.faults.iter().position(|(faulty, _)| *faulty == call);
        let fault = at.map(|index| inner.faults.remove(index).1);
        inner.calls.push(call);
        fault
    }

    fn put(&self, spec: &ContainerSpec, broken: bool) {
        let mut inner = self.inner();
        inner.next_pid += 1;
        let state = if broken {
            ContainerState::Broken
        } else {
            ContainerState::Running {
                pid: inner.next_pid,
                started_ms: inner.now_ms,
            }
        };
        let container = Container {
            id: spec.id.clone(),
            release: spec.release,
            service_digest: spec.service_digest,
            state,
            secrets: revisions(&spec.secrets),
        };
        inner.containers.insert(spec.id.clone(), container);
    }
}

fn revisions(values: &Values) -> BTreeMap<SecretName, u64> {
    let pairs = values.iter();
    pairs
        .map(|(name, secret)| (name.clone(), secret.revision))
        .collect()
}

fn io_error(message: String) -> io::Error {
    io::Error::other(message)
}

impl Runtime for FakeRuntime {
    async fn start(&self, spec: &ContainerSpec) -> Result<(), StartError> {
        let failed = |message: String| StartError::Failed {
            id: spec.id.to_string(),
            message,
        };
        match self.enter(Call::Start(spec.id.clone())) {
            Some(Fault::Refuse(message)) => return Err(StartError::Refused(message)),
            Some(Fault::Fail(message)) => return Err(failed(message)),
            Some(Fault::Crash) => {
                self.put(spec, true);
                return std::future::pending().await;
            }
            None => {}
        }
        if self.inner().containers.contains_key(&spec.id) {
            return Err(failed("it exists already; remove it first".to_owned()));
        }
        self.put(spec, false);
        Ok(())
    }

    async fn stop(&self, id: &ContainerId, signal: i32, _grace: Duration) -> Result<(), StopError> {
        match self.enter(Call::Stop(id.clone())) {
            Some(Fault::Refuse(message) | Fault::Fail(message)) => {
                return Err(StopError::Io {
                    act: format!("signal container {id}"),
                    source: io_error(message),
                });
            }
            Some(Fault::Crash) => return std::future::pending().await,
            None => {}
        }
        if let Some(container) = self.inner().containers.get_mut(id)
            && matches!(container.state, ContainerState::Running { .. })
        {
            container.state = ContainerState::Exited(Exit {
                code: 128 + signal,
                oom: false,
                signal: u8::try_from(signal).ok(),
            });
        }
        Ok(())
    }

    async fn renew_secrets(
        &self,
        id: &ContainerId,
        _service: &Service,
        values: &Values,
        _signals: &BTreeSet<i32>,
    ) -> Result<(), StopError> {
        if let Some(container) = self.inner().containers.get_mut(id) {
            container.secrets = revisions(values);
        }
        Ok(())
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), RemoveError> {
        match self.enter(Call::Remove(id.clone())) {
            Some(Fault::Refuse(message) | Fault::Fail(message)) => {
                return Err(RemoveError::Io {
                    act: format!("remove container {id}"),
                    source: io_error(message),
                });
            }
            Some(Fault::Crash) => {
                self.break_container(id);
                return std::future::pending().await;
            }
            None => {}
        }
        self.inner().containers.remove(id);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Container>, ListError> {
        Ok(self.containers())
    }

    async fn remove_logs(&self, _keep: &BTreeSet<(AppName, ServiceName)>) {}

    async fn exec(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> Result<i32, ExecError> {
        match self.enter(Call::Exec(id.clone(), command.to_vec())) {
            Some(Fault::Refuse(message) | Fault::Fail(message)) => {
                return Err(ExecError::Failed(message));
            }
            Some(Fault::Crash) => return Err(ExecError::Timeout(timeout)),
            None => {}
        }
        let inner = self.inner();
        match inner.containers.get(id).map(|container| container.state) {
            Some(ContainerState::Running { .. }) => {
                Ok(inner.exec_codes.get(command).copied().unwrap_or(0))
            }
            _ => Err(ExecError::NotRunning(id.to_string())),
        }
    }

    async fn connect(
        &self,
        id: &ContainerId,
        port: u16,
        timeout: Duration,
    ) -> io::Result<tokio::net::TcpStream> {
        match self.enter(Call::Connect(id.clone(), port)) {
            Some(Fault::Refuse(message) | Fault::Fail(message)) => return Err(io_error(message)),
            Some(Fault::Crash) => return std::future::pending().await,
            None => {}
        }
        let server = self.inner().servers.get(&(id.clone(), port)).copied();
        let server = server.ok_or(io::ErrorKind::ConnectionRefused)?;
        tokio::time::timeout(timeout, tokio::net::TcpStream::connect(server)).await?
    }

    async fn changed(&self) {
        self.changed.notified().await;
    }
}
