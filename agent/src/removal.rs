//! Stopping and removing everything of this agent on the device: for maintenance and for uninstalling.
//!
//! Works on what the runtime finds, so that it needs neither a hub nor intact state.

use std::collections::BTreeMap;
use std::time::Duration;

use foreshore_protocol::Digest;
use foreshore_protocol::release::{Release, service_digest};

use crate::runtime::{
    Container, ContainerId, ContainerState, ListError, RemoveError, Runtime, StopError,
};

/// How a container is stopped whose release is not known any more: SIGTERM, and SIGKILL after 10 s.
const UNKNOWN_STOP: (i32, Duration) = (15, Duration::from_secs(10));

/// Why not everything is gone. What could be stopped or removed, was.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// The containers could not be found.
    #[error(transparent)]
    List(#[from] ListError),
    /// One would not stop; the first of them.
    #[error("failed to stop container {id}")]
    Stop {
        /// Which.
        id: ContainerId,
        /// Why not.
        #[source]
        source: StopError,
    },
    /// One could not be removed; the first of them.
    #[error("failed to remove container {id}")]
    Remove {
        /// Which.
        id: ContainerId,
        /// Why not.
        #[source]
        source: RemoveError,
    },
}

/// Stops every container, one after the other, each as its service says; how many there were.
///
/// # Errors
///
/// See [`RemovalError`]; the others are stopped all the same.
pub async fn stop_all<R: Runtime>(
    runtime: &R,
    releases: &BTreeMap<Digest, Release>,
) -> Result<usize, RemovalError> {
    let mut first = None;
    let mut stopped = 0;
    for container in runtime.list().await? {
        if !matches!(container.state, ContainerState::Running { .. }) {
            continue;
        }
        let (signal, grace) = stop_of(&container, releases);
        match runtime.stop(&container.id, signal, grace).await {
            Ok(()) => stopped += 1,
            Err(source) => {
                let id = container.id;
                first.get_or_insert(RemovalError::Stop { id, source });
            }
        }
    }
    first.map_or(Ok(stopped), Err)
}

/// Stops and removes every container; how many there were.
///
/// # Errors
///
/// See [`RemovalError`]; the others are removed all the same.
pub async fn remove_all<R: Runtime>(
    runtime: &R,
    releases: &BTreeMap<Digest, Release>,
) -> Result<usize, RemovalError> {
    let mut first = stop_all(runtime, releases).await.err();
    let mut removed = 0;
    for container in runtime.list().await? {
        let id = container.id;
        match runtime.remove(&id).await {
            Ok(()) => removed += 1,
            Err(source) => {
                first.get_or_insert(RemovalError::Remove { id, source });
            }
        }
    }
    first.map_or(Ok(removed), Err)
}

fn stop_of(container: &Container, releases: &BTreeMap<Digest, Release>) -> (i32, Duration) {
    releases
        .values()
        .filter(|release| release.app == container.id.app)
        .filter_map(|release| release.services.get(&container.id.service))
        .find(|service| service_digest(service) == container.service_digest)
        .map_or(UNKNOWN_STOP, |service| {
            (
                service.stop_signal.number(),
                service.stop_grace_period.duration(),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ContainerSpec;
    use crate::runtime::fake::{Call, FakeRuntime, Fault};
    use foreshore_protocol::manifest::Service;

    fn spec(id: &str) -> ContainerSpec {
        let service: Service =
            serde_json::from_value(serde_json::json!({"image": "x", "stop_signal": "SIGINT"}))
                .unwrap();
        ContainerSpec {
            id: id.parse().unwrap(),
            release: Digest::of(b"release"),
            service_digest: service_digest(&service),
            service,
            image: crate::runtime::ImageConfig::default(),
            layers: Vec::new(),
            secrets: BTreeMap::new(),
        }
    }

    fn run<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(test)
    }

    #[test]
    fn everything_is_removed_and_one_that_will_not_go_does_not_keep_the_others() {
        run(async {
            let runtime = FakeRuntime::new();
            for id in ["shop.web.1", "shop.db.4", "till.web.2"] {
                runtime.start(&spec(id)).await.unwrap();
            }
            let stubborn: ContainerId = "shop.web.1".parse().unwrap();
            runtime.inject(
                Call::Remove(stubborn.clone()),
                Fault::Fail("busy".to_owned()),
            );
            let error = remove_all(&runtime, &BTreeMap::new()).await.unwrap_err();
            assert!(error.to_string().contains("shop.web.1"), "{error}");
            let left: Vec<_> = runtime
                .containers()
                .into_iter()
                .map(|left| left.id)
                .collect();
            assert_eq!(left, [stubborn]);
            assert_eq!(remove_all(&runtime, &BTreeMap::new()).await.unwrap(), 1);
            assert!(runtime.containers().is_empty());
        });
    }

    #[test]
    fn containers_are_stopped_as_their_service_says() {
        run(async {
            let runtime = FakeRuntime::new();
            let spec = spec("shop.web.1");
            runtime.start(&spec).await.unwrap();
            let release = Release {
                schema: 1,
                app: "shop".parse().unwrap(),
                services: [("web".parse().unwrap(), spec.service.clone())].into(),
                image_pull_secrets: Vec::new(),
            };
            let releases = [(spec.release, release)].into();
            assert_eq!(stop_all(&runtime, &releases).await.unwrap(), 1);
            let ContainerState::Exited(exit) = runtime.containers()[0].state else {
                panic!("still runs");
            };
            assert_eq!(exit.code, 128 + 2);
            assert_eq!(stop_all(&runtime, &releases).await.unwrap(), 0);
        });
    }
}
