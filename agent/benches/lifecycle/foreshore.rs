//! Foreshore's own row: the runtime of the agent, driven as the agent drives it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use foreshore_agent::policy::Source;
use foreshore_agent::runtime::oci::{OciConfig, OciRuntime, UserNamespaces};
use foreshore_agent::runtime::{ContainerId, ContainerSpec, ImageConfig, Runtime as _};
use foreshore_protocol::release::service_digest;
use foreshore_protocol::{Digest, manifest};

use crate::{Sample, monotonic_ns, read_clock};

/// A runtime with its own directories and cgroup parent.
pub(crate) struct Bench {
    tokio: tokio::runtime::Runtime,
    runtime: OciRuntime,
    service: manifest::Service,
    rootfs: PathBuf,
    log: PathBuf,
}

const MANIFEST: &str = "apiVersion: foreshore/v1\n\
    kind: App\n\
    metadata: {name: bench}\n\
    spec:\n\
    \x20 services:\n\
    \x20   payload: {image: bench, entrypoint: [/payload, stay], mem_limit: 64m, cpus: 1, pids_limit: 64}\n";

impl Bench {
    pub(crate) fn new(dir: &Path, rootfs: &Path, user_namespaces: UserNamespaces) -> Self {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a tokio runtime");
        let app = manifest::parse(MANIFEST.as_bytes()).expect("the manifest is right");
        let service = app
            .spec
            .services
            .into_values()
            .next()
            .expect("it has one service");
        let config = OciConfig {
            run_dir: dir.join("run"),
            state_dir: dir.join("state"),
            cgroup_parent: format!("foreshore-bench-{}-{user_namespaces:?}", std::process::id()),
            agent_exe: env!("CARGO_BIN_EXE_foreshore-agent").into(),
            user_namespaces,
            policy: Source {
                path: dir.join("policy.toml"),
                required: false,
                own: Vec::new(),
            },
        };
        let runtime = tokio
            .block_on(async { OciRuntime::new(config) })
            .expect("this machine runs containers");
        let log = dir.join("state/logs/bench/payload.log");
        Self {
            tokio,
            runtime,
            service,
            rootfs: rootfs.to_owned(),
            log,
        }
    }

    pub(crate) fn sample(&self, round: usize) -> Sample {
        let id = ContainerId {
            app: "bench".parse().expect("a name"),
            service: "payload".parse().expect("a name"),
            instance: u64::try_from(round).expect("small") + 1,
        };
        let spec = ContainerSpec {
            id: id.clone(),
            release: Digest::of(b"bench"),
            service_digest: service_digest(&self.service),
            service: self.service.clone(),
            image: ImageConfig::default(),
            layers: vec![self.rootfs.clone()],
            secrets: std::collections::BTreeMap::new(),
        };
        let _from_the_round_before = std::fs::remove_file(&self.log);
        let begin_ns = monotonic_ns();
        let begin = Instant::now();
        self.tokio
            .block_on(self.runtime.start(&spec))
            .expect("the payload starts");
        let first_ns = self.first_line();
        let seen = begin.elapsed();
        let after = Instant::now();
        self.tokio
            .block_on(self.runtime.stop(&id, 9, Duration::from_secs(5)))
            .expect("the payload stops");
        self.tokio
            .block_on(self.runtime.remove(&id))
            .expect("nothing is left");
        Sample {
            first_byte: Duration::from_nanos(first_ns.saturating_sub(begin_ns)),
            lifecycle: seen + after.elapsed(),
        }
    }

    /// The payload's line, as soon as it is in the log.
    fn first_line(&self) -> u64 {
        let begin = Instant::now();
        loop {
            // `TIME stdout F TEXT`, the form of CRI logs.
            if let Ok(text) = std::fs::read_to_string(&self.log)
                && let Some((_, line)) = text.split_once(" F ")
                && let Ok(clock) = read_clock(&mut line.as_bytes())
            {
                return clock;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "the payload wrote nothing to {}",
                self.log.display()
            );
            std::thread::yield_now();
        }
    }
}
