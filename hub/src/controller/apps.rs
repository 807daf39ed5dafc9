//! What operators do to apps: apply, plan, undo, delete; and to devices: label, forget.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::api::{
    ApplyAnswer, ApplyOutcome, Change as Changed, LabelPatch, PlanAnswer, PlanWave, RolloutState,
    ServiceChange,
};
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{App, Service};
use foreshore_protocol::message::MAX_LABELS;
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest, topic};

use super::membership::{self, Beyond};
use super::{Change, ControlError, rollouts, secrets};
use crate::rollout::steps::Requirements;
use crate::rollout::{Policy, Rollout, waves};
use crate::store::{self, app::AppRow};
use crate::zone;

/// A manifest with its release, images pinned.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// As the user wrote it.
    pub app: App,
    /// The release's digest.
    pub digest: Digest,
    /// The release's canonical JSON.
    pub bytes: Vec<u8>,
    /// The release itself.
    pub release: Release,
}

/// Bytes of the reason for which a device is held.
const MAX_REASON: usize = 512;

/// Makes `resolved` the app's desired state. An equal release opens no rollout.
///
/// # Errors
///
/// When a time zone does not exist, a secret is not set, a device is selected by too many apps then, or the store fails.
pub fn apply(
    change: &mut Change<'_>,
    resolved: &Resolved,
    seed: u64,
) -> Result<ApplyAnswer, ControlError> {
    let name = &resolved.app.metadata.name;
    zone::windows(&resolved.app.spec.rollout)?;
    secrets::check(change.connection, &resolved.release)?;
    let (required, requirements) = way(change.connection, resolved)?;
    let existing = revive(change, name)?;
    let outcome = outcome(change, existing.as_ref(), resolved)?;
    let row = AppRow {
        manifest: resolved.app.clone(),
        created: existing.as_ref().map_or(change.now, |app| app.created),
        updated: change.now,
        deleting: false,
    };
    let mut rollout = None;
    if existing
        .as_ref()
        .is_none_or(|app| app.manifest != resolved.app)
    {
        store::app::put(change.connection, &row)?;
        membership::refresh_app(change, &row)?;
    }
    if matches!(outcome, ApplyOutcome::Created | ApplyOutcome::Updated) {
        store::app::put_release(
            change.connection,
            &resolved.digest,
            name,
            &resolved.bytes,
            change.now,
        )?;
        store::secret::put_names(change.connection, &resolved.digest, &resolved.release)?;
    }
    store::release::put_requirements(change.connection, &resolved.digest, &required)?;
    if matches!(outcome, ApplyOutcome::Created | ApplyOutcome::Updated) {
        rollout = Some(rollouts::open(
            change,
            name,
            resolved.digest,
            &resolved.app.spec.rollout,
            requirements,
            seed,
        )?);
    }
    match outcome {
        ApplyOutcome::Created => change
            .event("app-created")
            .app(name)
            .record(resolved.digest.to_string())?,
        ApplyOutcome::Updated => change
            .event("app-updated")
            .app(name)
            .record(resolved.digest.to_string())?,
        ApplyOutcome::Reconfigured => {
            change
                .event("app-reconfigured")
                .app(name)
                .record("same release; the selector or the policy changed")?;
        }
        ApplyOutcome::Unchanged => {}
    }
    Ok(ApplyAnswer {
        app: name.clone(),
        release: resolved.digest,
        rollout,
        outcome,
        devices: store::app::member_count(change.connection, name)?,
    })
}

/// The releases that `requiresFrom` means, and all that follows for the way to this one.
fn way(
    connection: &rusqlite::Connection,
    resolved: &Resolved,
) -> Result<(Vec<Digest>, Requirements), ControlError> {
    let app = &resolved.app.metadata.name;
    let mut required = Vec::new();
    for prefix in &resolved.app.spec.rollout.requires_from {
        let (app, prefix) = (app.clone(), prefix.clone());
        match store::release::beginning_with(connection, &app, &prefix)?.as_slice() {
            [] => return Err(ControlError::UnknownRelease { app, prefix }),
            [release] => required.push(*release),
            _ => return Err(ControlError::AmbiguousRelease { app, prefix }),
        }
    }
    let found = Requirements::collect(resolved.digest, |release| {
        if *release == resolved.digest {
            Ok(required.clone())
        } else {
            store::release::requirements(connection, release)
        }
    })?;
    if found.are_too_many() {
        return Err(ControlError::TooManySteps {
            app: app.clone(),
            release: resolved.digest.short(),
        });
    }
    if !found.lead_anyone_to(&resolved.digest) {
        return Err(ControlError::NoWay {
            app: app.clone(),
            release: resolved.digest.short(),
        });
    }
    Ok((required, found))
}

/// The app, unless it is being deleted: then what is left of it goes, and it is as new.
fn revive(change: &Change<'_>, name: &AppName) -> Result<Option<AppRow>, ControlError> {
    let existing = store::app::get(change.connection, name)?;
    if existing.as_ref().is_some_and(|app| app.deleting) {
        store::app::delete(change.connection, name)?;
        return Ok(None);
    }
    Ok(existing)
}

fn outcome(
    change: &Change<'_>,
    existing: Option<&AppRow>,
    resolved: &Resolved,
) -> Result<ApplyOutcome, ControlError> {
    let Some(existing) = existing.filter(|app| !app.deleting) else {
        return Ok(ApplyOutcome::Created);
    };
    if settled_on(change, existing.name())? != Some(resolved.digest) {
        return Ok(ApplyOutcome::Updated);
    }
    let (before, after) = (&existing.manifest.spec, &resolved.app.spec);
    let same = before.selector == after.selector && before.rollout == after.rollout;
    Ok(if same {
        ApplyOutcome::Unchanged
    } else if before.rollout != after.rollout && is_scheduled(change, existing.name())? {
        // Nothing of it has happened: it is opened anew as it is written now.
        ApplyOutcome::Updated
    } else {
        ApplyOutcome::Reconfigured
    })
}

fn is_scheduled(change: &Change<'_>, app: &AppName) -> rusqlite::Result<bool> {
    let newest = store::rollout::newest_header(change.connection, app)?;
    Ok(newest.is_some_and(|rollout| rollout.state == RolloutState::Scheduled))
}

/// The release that every device of the app has or is on its way to, if that can be said: applying it again
/// changes nothing. After an abort devices differ, so it cannot.
fn settled_on(change: &Change<'_>, app: &AppName) -> Result<Option<Digest>, ControlError> {
    let Some(newest) = store::rollout::newest_header(change.connection, app)? else {
        return Ok(None);
    };
    match newest.state {
        RolloutState::Scheduled
        | RolloutState::Running
        | RolloutState::Paused
        | RolloutState::Completed => Ok(Some(newest.to)),
        RolloutState::RolledBack => {
            Ok(store::rollout::newest_completed(change.connection, app)?.map(|rollout| rollout.to))
        }
        RolloutState::RollingBack
        | RolloutState::RollbackPaused
        | RolloutState::Aborted
        | RolloutState::Superseded => Ok(None),
    }
}

/// The release that the app is at or moving to: of its newest rollout that was not given up.
///
/// # Errors
///
/// When the store fails.
pub fn current_release(
    connection: &rusqlite::Connection,
    app: &AppName,
) -> rusqlite::Result<Option<(Digest, Rollout)>> {
    let Some(newest) = store::rollout::newest_header(connection, app)? else {
        return Ok(None);
    };
    if store::rollout::stands(newest.state) {
        return Ok(Some((newest.to, newest)));
    }
    let completed = store::rollout::newest_completed(connection, app)?;
    Ok(Some((
        completed.map_or(newest.to, |rollout| rollout.to),
        newest,
    )))
}

/// What [`apply`] would do now. Changes nothing. What it would ask of each device is for [`super::preview`] to say.
///
/// # Errors
///
/// Those of [`apply`], but that a secret may be missing.
pub fn plan(
    change: &Change<'_>,
    resolved: &Resolved,
    seed: u64,
) -> Result<PlanAnswer, ControlError> {
    let name = &resolved.app.metadata.name;
    zone::windows(&resolved.app.spec.rollout)?;
    // Those are said with everything else that is in the way.
    if secrets::unset(change.connection, &resolved.release)?.is_empty() {
        secrets::check(change.connection, &resolved.release)?;
    }
    let existing = store::app::get(change.connection, name)?.filter(|app| !app.deleting);
    let outcome = outcome(change, existing.as_ref(), resolved)?;
    let current = match &existing {
        Some(_) => current_release(change.connection, name)?.map(|(digest, _)| digest),
        None => None,
    };
    let before = match current {
        Some(digest) => store::preview::release(change.connection, &digest)?,
        None => None,
    };
    let selected: BTreeMap<DeviceId, Labels> = store::device::all_labels(change.connection)?
        .into_iter()
        .filter(|(_, labels)| resolved.app.spec.selector.matches(labels))
        .collect();
    for device in selected.keys() {
        membership::check_room(change.connection, name, device)?;
    }
    let mut warnings = warnings(change.connection, name, &selected, existing.is_some())?;
    let (_, requirements) = way(change.connection, resolved)?;
    warnings.extend(steps(
        change.connection,
        resolved,
        &requirements,
        &selected,
    )?);
    let pulled_with = |release: &Release| release.image_pull_secrets.clone();
    if before
        .as_ref()
        .is_some_and(|before| pulled_with(before) != pulled_with(&resolved.release))
    {
        warnings.push("imagePullSecrets changes; that alone restarts no container".to_owned());
    }
    let before = before.map_or_else(BTreeMap::new, |release| release.services);
    let waves = if matches!(outcome, ApplyOutcome::Created | ApplyOutcome::Updated) {
        plan_waves(resolved, seed, &selected)
    } else {
        Vec::new()
    };
    Ok(PlanAnswer {
        app: name.clone(),
        current,
        release: resolved.digest,
        outcome,
        services: service_changes(&before, &resolved.release.services),
        waves,
        warnings,
        preview: None,
    })
}

fn plan_waves(
    resolved: &Resolved,
    seed: u64,
    selected: &BTreeMap<DeviceId, Labels>,
) -> Vec<PlanWave> {
    let policy = Policy::freeze(&resolved.app.spec.rollout, selected.len());
    waves::cut(&policy.waves, seed, selected)
        .into_iter()
        .zip(1_u32..)
        .map(|(slice, ordinal)| PlanWave {
            ordinal,
            target: slice.spec.target,
            devices: slice.devices,
        })
        .collect()
}

fn warnings(
    connection: &rusqlite::Connection,
    app: &AppName,
    selected: &BTreeMap<DeviceId, Labels>,
    exists: bool,
) -> rusqlite::Result<Vec<String>> {
    let mut warnings = Vec::new();
    if selected.is_empty() {
        warnings.push("no device matches the selector".to_owned());
    }
    let live =
        store::rollout::newest_header(connection, app)?.filter(|rollout| !rollout.state.is_final());
    if let (Some(live), true) = (live, exists) {
        warnings.push(format!(
            "rollout {} is under way; a new release takes its place",
            live.id
        ));
    }
    let lost: BTreeSet<DeviceId> = store::app::members(connection, app)?.into_iter().collect();
    let kept: BTreeSet<DeviceId> = selected.keys().cloned().collect();
    let gone = lost.difference(&kept).count();
    if gone > 0 {
        warnings.push(format!(
            "{gone} devices are no longer selected; the app is removed from them at once"
        ));
    }
    Ok(warnings)
}

/// How many devices take which release first.
fn steps(
    connection: &rusqlite::Connection,
    resolved: &Resolved,
    requirements: &Requirements,
    selected: &BTreeMap<DeviceId, Labels>,
) -> rusqlite::Result<Vec<String>> {
    if requirements.is_empty() {
        return Ok(Vec::new());
    }
    let mut first: BTreeMap<Digest, u64> = BTreeMap::new();
    for (device, has) in store::release::on_devices(connection, &resolved.app.metadata.name)? {
        let next = requirements.next(&has, &resolved.digest);
        if let Some(next) = next.filter(|next| *next != resolved.digest)
            && selected.contains_key(&device)
        {
            *first.entry(next).or_default() += 1;
        }
    }
    let said = first.into_iter().map(|(release, devices)| {
        format!(
            "{devices} devices cannot go there from what they have and take release {} first; what they fetch for that is \
             not counted (requiresFrom)",
            release.short()
        )
    });
    Ok(said.collect())
}

fn service_changes(
    before: &BTreeMap<foreshore_protocol::ServiceName, Service>,
    after: &BTreeMap<foreshore_protocol::ServiceName, Service>,
) -> Vec<ServiceChange> {
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    names
        .into_iter()
        .map(|service| {
            let (change, fields) = match (before.get(service), after.get(service)) {
                (None, _) => (Changed::Added, Vec::new()),
                (_, None) => (Changed::Removed, Vec::new()),
                (Some(old), Some(new)) if old == new => (Changed::Unchanged, Vec::new()),
                (Some(old), Some(new)) => (Changed::Changed, differing_fields(old, new)),
            };
            ServiceChange {
                service: service.clone(),
                change,
                fields,
            }
        })
        .collect()
}

fn differing_fields(old: &Service, new: &Service) -> Vec<String> {
    let fields = |service| match serde_json::to_value(service) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (old, new) = (fields(old), fields(new));
    new.into_iter()
        .filter(|(key, value)| old.get(key) != Some(value))
        .map(|(key, _)| key)
        .collect()
}

/// Opens a rollout to the release before.
///
/// # Errors
///
/// When there is no such app, nothing to go back to, a secret of that is not set any more, or the store fails.
pub fn undo(
    change: &mut Change<'_>,
    name: &AppName,
    seed: u64,
) -> Result<ApplyAnswer, ControlError> {
    let app = store::app::get(change.connection, name)?
        .ok_or_else(|| ControlError::UnknownApp(name.clone()))?;
    if app.deleting {
        return Err(ControlError::Deleting(name.clone()));
    }
    let release = rollouts::undo_target(change, name)?;
    if let Some(bytes) = store::app::release_bytes(change.connection, &release)?
        && let Ok(release) = Release::from_bytes(&bytes, &release)
    {
        secrets::check(change.connection, &release)?;
    }
    // It goes back to what was there before: nothing is asked of the way.
    let rollout = rollouts::open(
        change,
        name,
        release,
        &app.manifest.spec.rollout,
        Requirements::default(),
        seed,
    )?;
    Ok(ApplyAnswer {
        app: name.clone(),
        release,
        rollout: Some(rollout),
        outcome: ApplyOutcome::Updated,
        devices: store::app::member_count(change.connection, name)?,
    })
}

/// Removes an app from its devices; it is gone when the last of them says so. Doing it again is the same.
///
/// # Errors
///
/// When there is no such app, or the store fails.
pub fn delete(change: &mut Change<'_>, name: &AppName) -> Result<(), ControlError> {
    let mut app = store::app::get(change.connection, name)?
        .ok_or_else(|| ControlError::UnknownApp(name.clone()))?;
    if app.deleting {
        return Ok(());
    }
    app.deleting = true;
    app.updated = change.now;
    store::app::put(change.connection, &app)?;
    change
        .event("app-deleting")
        .app(name)
        .record("it is removed from its devices")?;
    for device in store::app::members(change.connection, name)? {
        store::app::set_member(change.connection, name, &device, false)?;
    }
    rollouts::stop(change, name, "the app was deleted")?;
    for device in store::app::placed_on(change.connection, name)? {
        if store::desired::remove(change.connection, &device, name)?.is_some() {
            change.effects.publish = true;
        }
    }
    finish_deleting(change, name)
}

/// Ends the deletion of an app once every device said that it has removed it.
///
/// # Errors
///
/// When the store fails.
pub fn finish_deleting(change: &mut Change<'_>, name: &AppName) -> Result<(), ControlError> {
    let deleting = store::app::get(change.connection, name)?.is_some_and(|app| app.deleting);
    if deleting && store::app::removals_left(change.connection, name)? == 0 {
        store::app::delete(change.connection, name)?;
        change
            .event("app-deleted")
            .app(name)
            .record("no device has it any more")?;
    }
    Ok(())
}

/// Changes the operator's labels of a device.
///
/// # Errors
///
/// When there is no such device, it has too many labels or is selected by too many apps then, or the store fails.
pub fn patch_labels(
    change: &mut Change<'_>,
    device: &DeviceId,
    patch: &LabelPatch,
) -> Result<(), ControlError> {
    let counts = store::device::patch_labels(change.connection, device, &patch.labels)?;
    let (before, after) = counts.ok_or_else(|| ControlError::UnknownDevice(device.clone()))?;
    // A device that has more from before may lose some, one by one.
    if after > MAX_LABELS && after > before {
        return Err(ControlError::TooManyLabels(device.clone()));
    }
    membership::refresh_device(change, device, Beyond::Refused)
}

/// Holds a device for that reason, so that no rollout offers it anything, or (`None`) lets it go. One that went on without
/// a restored backup gives up by that what it has beyond it.
///
/// # Errors
///
/// When there is no such device, or the store fails.
pub fn hold(
    change: &mut Change<'_>,
    device: &DeviceId,
    reason: Option<&str>,
) -> Result<(), ControlError> {
    let reason = reason.map(|reason| {
        reason
            .get(..reason.floor_char_boundary(MAX_REASON))
            .unwrap_or_default()
    });
    let changed = store::device::put_held(change.connection, device, reason)?
        .ok_or_else(|| ControlError::UnknownDevice(device.clone()))?;
    let overruled = reason.is_none() && store::device::confirm(change.connection, device)?;
    if overruled {
        store::desired::bump(change.connection, device)?;
        change.effects.publish = true;
    }
    if !changed && !overruled {
        return Ok(());
    }
    change
        .effects
        .dirty
        .extend(store::rollout::interested(change.connection, device)?);
    let (kind, message) = match reason {
        Some("") => ("device-held", "by an operator".to_owned()),
        Some(reason) => ("device-held", format!("by an operator: {reason}")),
        None if overruled => (
            "device-released",
            "by an operator; what it has beyond the restored backup is overruled".to_owned(),
        ),
        None => ("device-released", "by an operator".to_owned()),
    };
    Ok(change.event(kind).device(device).record(message)?)
}

/// Forgets a device that is not connected, and clears what the broker keeps for it.
///
/// # Errors
///
/// When there is no such device, it is connected, or the store fails.
pub fn forget(change: &mut Change<'_>, device: &DeviceId) -> Result<(), ControlError> {
    let link = store::device::link(change.connection, device)?
        .ok_or_else(|| ControlError::UnknownDevice(device.clone()))?;
    if link.online {
        return Err(ControlError::Connected(device.clone()));
    }
    let waiting = store::app::removals_of(change.connection, device)?;
    change
        .effects
        .dirty
        .extend(store::rollout::interested(change.connection, device)?);
    store::device::delete(change.connection, device)?;
    for leaf in [
        topic::Leaf::Head,
        topic::Leaf::Secrets,
        topic::Leaf::Reported,
        topic::Leaf::Presence,
    ] {
        store::desired::enqueue_clear(change.connection, &topic::device(device, leaf))?;
    }
    change.effects.publish = true;
    change
        .event("device-forgotten")
        .device(device)
        .record("by an operator")?;
    for app in waiting {
        finish_deleting(change, &app)?;
    }
    Ok(())
}
