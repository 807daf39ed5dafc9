//! Old containers that run on beside those that took their place (`deploy.update_config.keep_old`).
//!
//! What is kept is a container of the last-known-good whose service the release on trial starts anew, beside it. It runs on,
//! untouched, through the trial and for `keep_old` from when the new one was ready. While it does, going back to its
//! release takes it back: nothing is started, and it never stopped. A container that ends, or would have to be stopped if
//! it were its service's own, is not kept any more; nothing is ever started to be kept. Of one service one is kept at most.

use std::collections::BTreeMap;

use foreshore_protocol::message::EventKind;
use foreshore_protocol::quantity::Span;
use foreshore_protocol::release::service_digest;
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::ends;
use super::health::{Health, signal_name};
use super::service::{Spec, Target, service_of};
use super::{
    AppHistory, Cause, Condemned, Draft, History, Kept, KeptUntil, Observed, ObservedContainer,
    ServiceHistory,
};
use crate::runtime::{Container, ContainerState, Exit};

/// Makes containers that were kept their services' own again, where `target` wants them.
pub(super) fn take_back(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'_>,
) {
    let AppHistory { kept, services, .. } = history;
    let is_wanted = |name: &ServiceName, kept: &mut Kept| {
        let spec = target.services.get(name).map(|spec| spec.digest);
        let seen = find(containers, name, kept);
        kept.until != KeptUntil::Over && kept.service.spec == spec && seen.is_some_and(runs)
    };
    for (name, kept) in kept.extract_if(.., is_wanted) {
        let message = format!(
            "container {app}.{name}.{}, which was kept, is the service's own again; it never stopped",
            kept.service.instance
        );
        draft.notice(EventKind::TakenBack, app, Some(name.clone()), message);
        let service = services.entry(name).or_default();
        *service = ServiceHistory {
            last_instance: service.last_instance.max(kept.service.last_instance),
            stuck_until: service.stuck_until,
            ..kept.service
        };
    }
}

/// Decides which old containers are kept now: who joins them, for how long, and who is let go.
pub(super) fn settle(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'_>,
    healths: &BTreeMap<&ServiceName, Health>,
) {
    let observed = draft.observed;
    let good = history.last_known_good.as_ref().map(|good| good.release);
    // Confirming the last-known-good proves nothing new.
    let proving = history
        .trial
        .as_ref()
        .is_some_and(|trial| good != Some(trial.release));
    let look = Look {
        app,
        good: good.and_then(|good| Some((good, observed.releases.get(&good)?))),
        containers,
        proving,
    };
    let mut kept = std::mem::take(&mut history.kept);
    kept.retain(|name, kept| {
        let ready = healths.get(name) == Some(&Health::Ready);
        look.keeps(draft, name, kept, target.services.get(name), ready)
    });
    for (name, spec) in &target.services {
        if !kept.contains_key(*name)
            && let Some(old) = look.joins(draft, name, spec, history.services.get(*name))
        {
            kept.insert((*name).clone(), old);
        }
    }
    history.kept = kept;
}

struct Look<'a> {
    app: &'a AppName,
    /// The last-known-good.
    good: Option<(Digest, &'a foreshore_protocol::release::Release)>,
    containers: &'a [&'a ObservedContainer],
    /// Whether something else than the last-known-good is on trial.
    proving: bool,
}

impl Look<'_> {
    /// Whether an old container is still there; says until when it is kept.
    fn keeps(
        &self,
        draft: &mut Draft<'_>,
        name: &ServiceName,
        kept: &mut Kept,
        spec: Option<&Spec<'_>>,
        ready: bool,
    ) -> bool {
        let id = format!("{}.{name}.{}", self.app, kept.service.instance);
        let tell = |draft: &mut Draft<'_>, kind, why: &str| {
            let message = format!("old container {id} is not kept any more: {why}");
            draft.notice(kind, self.app, Some(name.clone()), message);
        };
        let is_over = kept.until == KeptUntil::Over;
        let Some(seen) = find(self.containers, name, kept).filter(|seen| runs(seen)) else {
            if !is_over {
                let seen = find(self.containers, name, kept);
                let end = how_it_ended(seen.map(|seen| &seen.container));
                let why = format!("{end}, and is not started again");
                tell(draft, EventKind::LetGo, &why);
            }
            return false;
        };
        if is_over {
            return true;
        }
        let Some(spec) = spec else {
            tell(draft, EventKind::LetGo, "the release has no such service");
            return false;
        };
        if self.proving && spec.service.deploy.update_config.keep_old_ms().is_none() {
            tell(draft, EventKind::LetGo, "the release on trial keeps none");
            return false;
        }
        if let Some((kind, why)) = self.lets_go(draft, name, seen, kept) {
            tell(draft, kind, &why);
            kept.until = KeptUntil::Over;
            return true;
        }
        if kept.beside != spec.digest {
            // Another new one, beside the same old one.
            kept.beside = spec.digest;
            kept.keep_ms = spec.service.deploy.update_config.keep_old_ms().unwrap_or(0);
            kept.until = KeptUntil::Ready;
        }
        if kept.until == KeptUntil::Ready && (ready || !self.proving) {
            kept.until = KeptUntil::At(draft.now.ms.plus(kept.keep_ms));
            let message = format!(
                "old container {id} runs on for {}, and through the trial: going back to release {} starts nothing",
                Span(kept.keep_ms),
                kept.release.short()
            );
            draft.notice(EventKind::Kept, self.app, Some(name.clone()), message);
        }
        if let KeptUntil::At(at) = kept.until
            && !self.proving
            && !draft.is_later(at)
        {
            tell(draft, EventKind::LetGo, "its time is over");
            kept.until = KeptUntil::Over;
        }
        true
    }

    /// Why an old container cannot be kept, although it runs.
    fn lets_go(
        &self,
        draft: &Draft<'_>,
        name: &ServiceName,
        seen: &ObservedContainer,
        kept: &Kept,
    ) -> Option<(EventKind, String)> {
        let good = self.good.and_then(|(_, good)| good.services.get(name));
        if self.proving && self.good.is_some() && good.map(service_digest) != kept.service.spec {
            let why = "a newer release is the last-known-good";
            return Some((EventKind::LetGo, why.to_owned()));
        }
        let disk = draft.observed.disk;
        if disk.low {
            let why = format!(
                "the device is short of disk space ({} MiB free, {} MiB in reserve), and what is kept goes first",
                disk.free >> 20,
                disk.reserve >> 20
            );
            return Some((EventKind::Evicted, why));
        }
        // Taken back, it would have to be started again.
        let (_, service) = service_of(
            draft.observed,
            &seen.container,
            &std::collections::BTreeSet::new(),
        )?;
        let Condemned { cause, why } = ends::condemnation(draft, seen, service)?;
        let kind = match cause {
            Cause::Probe => EventKind::ProbeFailed,
            Cause::DiskLimit => EventKind::DiskLimit,
            Cause::Evicted => EventKind::Evicted,
            Cause::Secret => EventKind::SecretRotated,
        };
        Some((kind, why))
    }

    /// The container of a service that is kept from now on, before the new one is started.
    fn joins(
        &self,
        draft: &Draft<'_>,
        name: &ServiceName,
        spec: &Spec<'_>,
        history: Option<&ServiceHistory>,
    ) -> Option<Kept> {
        let keep_ms = spec.service.deploy.update_config.keep_old_ms()?;
        let (release, good) = self.good.filter(|_| self.proving)?;
        let digest = service_digest(good.services.get(name)?);
        if digest == spec.digest || draft.observed.disk.low || draft.is_busy(self.app, name) {
            return None;
        }
        let of_service = || {
            self.containers
                .iter()
                .filter(|seen| seen.container.id.service == *name)
        };
        // With one of the new spec there, it is not the beginning: what is beside it goes as it would without being kept.
        if of_service().any(|seen| seen.container.service_digest == spec.digest) {
            return None;
        }
        let old = of_service()
            .filter(|seen| runs(seen) && seen.container.service_digest == digest)
            .max_by_key(|seen| seen.container.id.instance)?;
        let instance = old.container.id.instance;
        let known = history.filter(|history| history.instance == instance);
        if known.is_some_and(|history| history.ended) {
            return None;
        }
        let unknown = || ServiceHistory {
            last_instance: instance,
            instance,
            spec: Some(digest),
            release: Some(old.container.release),
            present: instance,
            began: true,
            ..ServiceHistory::default()
        };
        Some(Kept {
            service: known.cloned().unwrap_or_else(unknown),
            release,
            keep_ms,
            beside: spec.digest,
            until: KeptUntil::Ready,
        })
    }
}

/// Whether old containers are on their way out, so that nobody else need be evicted yet.
pub(super) fn are_leaving(observed: &Observed, history: &History) -> bool {
    history.apps.values().any(|app| {
        let planned = app
            .current
            .is_some_and(|current| observed.releases.contains_key(&current));
        planned
            && app.kept.keys().any(|name| {
                let service = app.services.get(name);
                service.is_none_or(|service| service.stuck_until == super::BootMs::default())
            })
    })
}

/// Whether a container is one that is kept, or was and is on its way out.
pub(super) fn is_kept(kept: &BTreeMap<ServiceName, Kept>, container: &Container) -> bool {
    kept.get(&container.id.service)
        .is_some_and(|kept| kept.service.instance == container.id.instance)
}

fn find<'a>(
    containers: &[&'a ObservedContainer],
    name: &ServiceName,
    kept: &Kept,
) -> Option<&'a ObservedContainer> {
    containers.iter().copied().find(|seen| {
        let id = &seen.container.id;
        id.service == *name && id.instance == kept.service.instance
    })
}

const fn runs(seen: &ObservedContainer) -> bool {
    matches!(seen.container.state, ContainerState::Running { .. })
}

fn how_it_ended(container: Option<&Container>) -> String {
    match container.map(|container| container.state) {
        Some(ContainerState::Exited(Exit { oom: true, .. })) => {
            "it was killed for using more memory than its limit".to_owned()
        }
        Some(ContainerState::Exited(Exit {
            signal: Some(signal),
            ..
        })) => format!("it was ended by {}", signal_name(signal)),
        Some(ContainerState::Exited(Exit { code, .. })) => {
            format!("it ended with exit code {code}")
        }
        Some(ContainerState::Broken) => "its supervisor was killed".to_owned(),
        Some(ContainerState::Running { .. }) | None => "it is gone".to_owned(),
    }
}
