//! What a container is made of before it starts: what it may have, and its directory.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use foreshore_killpoint as killpoint;
use foreshore_protocol::AppName;
use foreshore_protocol::secret::SecretValue;

use super::{OciRuntime, UserNamespaces, lock, make_dir, ranges};
use crate::policy::{self, Grant};
use crate::runtime::request::{RECORD, REQUEST, Record, Request, write_json};
use crate::runtime::{ContainerSpec, StartError, secrets};
use crate::update_lock;

impl OciRuntime {
    /// What the policy, as it is on disk now, allows to the app. Without a usable one, what needs none still starts: a
    /// mistake in the file must not take down what it is not about.
    pub(super) fn grant(&self, spec: &ContainerSpec) -> Result<Grant, StartError> {
        match self.config.policy.load() {
            Ok(policy) => Ok(policy.grant(&spec.id.app)),
            Err(_) if !policy::is_privileged(&spec.service) => Ok(Grant::default()),
            Err(error) => Err(StartError::Denied(crate::causes::chain(&error))),
        }
    }

    /// The variables that hold secrets, if all secrets are there, can be what they are to be, and stay in memory.
    pub(super) fn check_secrets(
        &self,
        spec: &ContainerSpec,
    ) -> Result<BTreeMap<String, SecretValue>, StartError> {
        if spec.service.secrets.is_empty() {
            return Ok(BTreeMap::new());
        }
        let run_dir = &self.config.run_dir;
        let in_memory = secrets::is_in_memory(run_dir).map_err(|source| StartError::Io {
            act: format!("look at the file system of {}", run_dir.display()),
            source,
        })?;
        if !in_memory {
            return Err(StartError::Refused(format!(
                "it has secrets, and {} is not in memory; let [paths] run in agent.toml be on a tmpfs, such as /run/foreshore",
                run_dir.display()
            )));
        }
        let mut mounts = spec.service.secrets.iter();
        if let Some(missing) = mounts.find(|mount| !spec.secrets.contains_key(&mount.source)) {
            return Err(StartError::Failed {
                id: spec.id.to_string(),
                message: format!("secret {} is not there", missing.source),
            });
        }
        secrets::environment(&spec.service, &spec.secrets).map_err(|name| {
            StartError::Refused(format!(
                "secret {name} is not UTF-8 text without NUL characters, so it cannot be in the environment"
            ))
        })
    }

    /// Writes the container's directory, complete before it has its name.
    pub(super) fn create_dir(
        &self,
        spec: &ContainerSpec,
        grant: &Grant,
        environment: BTreeMap<String, SecretValue>,
    ) -> io::Result<PathBuf> {
        let id = spec.id.to_string();
        let dir = self.dir(&spec.id);
        let fresh = self.containers().join(format!("{id}.new"));
        if fresh.exists() {
            fs::remove_dir_all(&fresh)?;
        }
        make_dir(&fresh, 0o700)?;
        killpoint::reached("container", "created");
        let record = Record {
            release: spec.release,
            service_digest: spec.service_digest,
            boot_id: self.boot_id.clone(),
            shim: None,
            container: None,
        };
        let app = spec.id.app.as_str();
        let update_lock = spec
            .service
            .update_lock
            .then(|| update_lock::directory(&self.config.run_dir, &spec.id.app));
        if let Some(directory) = &update_lock {
            update_lock::open(directory)?;
        }
        let mapping = self.mapping(spec);
        let request = Request {
            id: spec.id.clone(),
            service: spec.service.clone(),
            image: spec.image.clone(),
            grant: grant.clone(),
            layers: spec.layers.clone(),
            cgroup: self.cgroups.path(&id),
            base: mapping.as_ref().ok().copied(),
            unmapped: mapping.err(),
            writable: (!spec.service.read_only).then(|| self.writable(&id)),
            volumes: self.config.state_dir.join("volumes").join(app),
            logs: self.config.state_dir.join("logs").join(app),
            update_lock,
            secret_environment: environment,
            shim: self.shim.clone(),
            swap_limit: self.cgroups.limits_swap(),
            swap_file: self.cgroups.swap_file(&id),
            device_cgroup: self.cgroups.device_cgroup(&id),
            shim_cgroup: self.cgroups.shims(),
            cgroups: self.cgroups.all(&id),
            state: self.state_dirs(),
        };
        write_json(&fresh, RECORD, &record)?;
        killpoint::reached("container", "recorded");
        write_json(&fresh, REQUEST, &request)?;
        secrets::write(&fresh, &spec.service, &spec.secrets)?;
        killpoint::reached("container", "described");
        fs::rename(&fresh, &dir)?;
        killpoint::reached("container", "named");
        Ok(dir)
    }

    /// The first of the app's ids, or why the container gets no user namespace.
    fn mapping(&self, spec: &ContainerSpec) -> Result<u32, String> {
        if self.config.user_namespaces == UserNamespaces::Off {
            return Err("user namespaces are off on this device".to_owned());
        }
        if let Some(reason) = lock(&self.unmappable).get(&spec.service_digest) {
            return Err(reason.clone());
        }
        let volumes = self.config.state_dir.join("volumes");
        let running = LazyCell::new(|| ranges(&self.config.run_dir));
        let is_free =
            |app: &AppName| !volumes.join(app.as_str()).exists() && !running.contains_key(app);
        let range = lock(&self.ids).range(&spec.id.app, is_free);
        range.ok_or_else(|| "every range of ids is in use".to_owned())
    }

    /// Those whose disks `state` means under `blkio_config`; each may be a mount of its own.
    fn state_dirs(&self) -> Vec<PathBuf> {
        let state = &self.config.state_dir;
        let parts = ["volumes", "containers", "images", "logs"];
        let parts = parts.map(|part| state.join(part));
        std::iter::once(state.clone()).chain(parts).collect()
    }
}
