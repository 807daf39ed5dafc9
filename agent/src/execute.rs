//! Does one step of a plan, and says what came of it. Decides nothing.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foreshore_images::store::Store;
use foreshore_killpoint as killpoint;
use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::message::{Reason, ReasonCode};
use foreshore_protocol::release::service_digest;
use foreshore_protocol::secret::Secret;
use foreshore_protocol::{AppName, Digest, ServiceName};

use crate::causes::chain;
use crate::plan::Outcome;
use crate::pulling::{Pulling, Tally};
use crate::runtime::secrets::Values;
use crate::runtime::{ContainerId, ContainerSpec, ImageConfig, Runtime, StartError};
use crate::stage::Staging;

/// What a container has at least between its stop signal and SIGKILL, however long its hooks took (as in Kubernetes).
const LAST_GRACE: Duration = Duration::from_secs(2);

/// What steps are done with.
#[derive(Debug)]
pub struct Tools<R> {
    /// Containers.
    pub runtime: Rc<R>,
    /// Images.
    pub images: Arc<Store>,
    /// The agent's own program, which stages in a child process.
    pub program: PathBuf,
    /// The configuration file that the child reads.
    pub config: PathBuf,
    /// Where it is shown how far staging is.
    pub pulling: Pulling,
}

impl<R> Clone for Tools<R> {
    fn clone(&self) -> Self {
        Self {
            runtime: Rc::clone(&self.runtime),
            images: Arc::clone(&self.images),
            program: self.program.clone(),
            config: self.config.clone(),
            pulling: self.pulling.clone(),
        }
    }
}

/// A step with all that it needs. [`crate::reconcile`] looks these up, so that a step under way rests on
/// nothing that may change.
#[derive(Debug)]
pub enum Task {
    /// [`crate::plan::Step::Stage`].
    Stage {
        /// For which app.
        app: AppName,
        /// Which release.
        release: Digest,
        /// As in the step.
        images: Vec<String>,
        /// Secrets with logins for their registries; the first that has one counts.
        logins: Vec<(SecretName, Secret)>,
    },
    /// [`crate::plan::Step::Stop`].
    Stop {
        /// Which container.
        id: ContainerId,
        /// As in the step.
        signal: i32,
        /// As in the step.
        grace: Duration,
        /// As in the step.
        pre_stop: Vec<Vec<String>>,
    },
    /// [`crate::plan::Step::Remove`].
    Remove {
        /// Which container.
        id: ContainerId,
    },
    /// [`crate::plan::Step::Start`].
    Start {
        /// The new container.
        id: ContainerId,
        /// Its release.
        release: Digest,
        /// Its service in that release.
        service: Box<Service>,
        /// The values of its secrets.
        secrets: Values,
    },
    /// [`crate::plan::Step::RenewSecrets`].
    RenewSecrets {
        /// Which container.
        id: ContainerId,
        /// Its service.
        service: Box<Service>,
        /// The values of its secrets.
        secrets: Values,
        /// As in the step.
        signals: BTreeSet<i32>,
    },
    /// [`crate::plan::Step::Collect`], for images and logs.
    Collect {
        /// As in the step.
        keep_images: BTreeSet<Digest>,
        /// As in the step.
        keep_logs: BTreeSet<(AppName, ServiceName)>,
    },
}

impl Task {
    /// What kill points call it.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Stage { .. } => "stage",
            Self::Stop { .. } => "stop",
            Self::Remove { .. } => "remove",
            // Giving a container what it would have been started with.
            Self::Start { .. } | Self::RenewSecrets { .. } => "start",
            Self::Collect { .. } => "collect",
        }
    }
}

/// Does a task. Dropping the future cuts it as a crash would; the next plan takes it from there.
pub async fn execute<R: Runtime>(tools: &Tools<R>, task: Task) -> Outcome {
    let kind = task.kind();
    killpoint::reached(kind, "begun");
    let outcome = perform(tools, task).await;
    killpoint::reached(kind, "done");
    outcome
}

async fn perform<R: Runtime>(tools: &Tools<R>, task: Task) -> Outcome {
    match task {
        Task::Stage {
            app,
            release,
            images,
            logins,
        } => match stage(tools, &app, release, &images, &logins).await {
            Ok(()) => Outcome::Staged { release },
            Err(reason) => Outcome::StagingFailed {
                release,
                reason,
                logins: logins
                    .into_iter()
                    .map(|(name, secret)| (name, secret.revision))
                    .collect(),
            },
        },
        Task::Stop {
            id,
            signal,
            grace,
            pre_stop,
        } => {
            let left = prepare_stop(tools, &id, &pre_stop, grace).await;
            match tools.runtime.stop(&id, signal, left).await {
                Ok(()) => Outcome::Stopped { id },
                Err(error) => Outcome::Stuck {
                    message: chain(&error),
                    id,
                },
            }
        }
        Task::Remove { id } => match tools.runtime.remove(&id).await {
            Ok(()) => Outcome::Removed { id },
            Err(error) => Outcome::Stuck {
                message: chain(&error),
                id,
            },
        },
        Task::Start {
            id,
            release,
            service,
            secrets,
        } => match start(tools, &id, release, *service, secrets).await {
            Ok(()) => Outcome::Started { id },
            Err(error) => Outcome::StartFailed {
                code: match error {
                    StartError::Denied(_) => ReasonCode::PolicyDenied,
                    StartError::DeviceMissing(_) => ReasonCode::DeviceMissing,
                    StartError::IoLimit(_) => ReasonCode::IoLimit,
                    StartError::Refused(_) | StartError::Failed { .. } | StartError::Io { .. } => {
                        ReasonCode::StartFailed
                    }
                },
                refused: matches!(error, StartError::Refused(_) | StartError::IoLimit(_)),
                message: chain(&error),
                id,
            },
        },
        Task::RenewSecrets {
            id,
            service,
            secrets,
            signals,
        } => {
            let renewed = tools
                .runtime
                .renew_secrets(&id, &service, &secrets, &signals);
            match renewed.await {
                Ok(()) => Outcome::SecretsRenewed { id },
                Err(error) => Outcome::Stuck {
                    message: chain(&error),
                    id,
                },
            }
        }
        Task::Collect {
            keep_images,
            keep_logs,
        } => {
            collect(tools, keep_images).await;
            killpoint::reached("collect", "images-gone");
            tools.runtime.remove_logs(&keep_logs).await;
            Outcome::Collected
        }
    }
}

/// Runs the commands that a container wants run before it is asked to stop; what is left of its grace period. One
/// that fails, or takes too long, keeps nothing from stopping.
async fn prepare_stop<R: Runtime>(
    tools: &Tools<R>,
    id: &ContainerId,
    commands: &[Vec<String>],
    grace: Duration,
) -> Duration {
    let began = Instant::now();
    let left = || grace.saturating_sub(began.elapsed());
    for command in commands {
        if left().is_zero() {
            break;
        }
        match tools.runtime.exec(id, command, left()).await {
            Ok(0) => {}
            Ok(code) => tracing::warn!(container = %id, ?command, code, "a pre_stop hook failed"),
            Err(error) => {
                tracing::warn!(container = %id, ?command, error = chain(&error), "a pre_stop hook failed");
            }
        }
    }
    left().max(LAST_GRACE.min(grace))
}

async fn stage<R>(
    tools: &Tools<R>,
    app: &AppName,
    release: Digest,
    images: &[String],
    logins: &[(SecretName, Secret)],
) -> Result<(), Reason> {
    let staging =
        Staging::start(&tools.program, &tools.config, app, images, logins).map_err(|error| {
            Reason {
                code: ReasonCode::Internal,
                service: None,
                message: format!("failed to start {}: {error}", tools.program.display()),
            }
        })?;
    let now = Instant::now();
    let mut shown = tools.pulling.show(Tally::new(release, images, now));
    staging
        .finish(|line| shown.note(&line, Instant::now()))
        .await
}

async fn start<R: Runtime>(
    tools: &Tools<R>,
    id: &ContainerId,
    release: Digest,
    service: Service,
    secrets: Values,
) -> Result<(), StartError> {
    let image = service
        .image
        .rsplit_once('@')
        .and_then(|(_, digest)| tools.images.staged(&digest.parse().ok()?))
        .ok_or_else(|| StartError::Failed {
            id: id.to_string(),
            message: format!("image {} is not on this disk any more", service.image),
        })?;
    let spec = ContainerSpec {
        id: id.clone(),
        release,
        service_digest: service_digest(&service),
        service,
        image: ImageConfig {
            entrypoint: image.config.entrypoint,
            cmd: image.config.cmd,
            env: image.config.env,
            user: image.config.user,
            working_dir: image.config.working_dir,
        },
        layers: image.layers,
        secrets,
    };
    tools.runtime.start(&spec).await
}

/// Removing a large image takes seconds; the thread ends soon after.
async fn collect<R>(tools: &Tools<R>, keep: BTreeSet<Digest>) {
    let images = Arc::clone(&tools.images);
    let removed = tokio::task::spawn_blocking(move || images.remove_unused(&keep));
    match removed.await {
        Ok(Ok(removed)) => {
            tracing::info!(
                images = removed.images.len(),
                bytes = removed.bytes,
                "garbage collected"
            );
        }
        Ok(Err(error)) => {
            tracing::warn!(error = chain(&error), "garbage could not be collected");
        }
        Err(error) => tracing::error!(%error, "collecting garbage broke off"),
    }
}
