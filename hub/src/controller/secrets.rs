//! What operators do to secrets, which of them hold logins, and what devices show of their keys.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_images::registry::DockerConfig;
use foreshore_protocol::api::SecretView;
use foreshore_protocol::id::{SecretName, Version};
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{Bundle, MAX_BUNDLE_BYTES, PublicKey, SecretValue};
use foreshore_protocol::{AppName, DeviceId, ServiceName};
use rusqlite::Connection;

use super::{Change, ControlError};
use crate::store::{self, secret::Shown};

/// Sets a value, and gives it to the devices that need it; what is there then. The same value again changes nothing.
///
/// # Errors
///
/// When it is no text and a service has it in its environment, it holds no logins and images are pulled with it, or the
/// store fails.
pub fn set(
    change: &mut Change<'_>,
    name: &SecretName,
    value: &SecretValue,
) -> Result<SecretView, ControlError> {
    if value.as_text().is_none()
        && let Some((app, service)) = in_environment(change.connection, name)?
    {
        return Err(ControlError::SecretNotText {
            secret: name.clone(),
            app,
            service,
        });
    }
    if let Err(problem) = DockerConfig::logins(value.expose())
        && let Some(app) = pulled_with(change.connection, name)?
    {
        return Err(ControlError::PullSecretNotLogins {
            secret: name.clone(),
            app,
            problem,
        });
    }
    if store::secret::put(change.connection, name, value, change.now)? {
        change.event("secret-set").record(name.as_str())?;
        for device in store::secret::devices_of(change.connection, name)? {
            refresh(change, &device)?;
        }
    }
    let view = view(change.connection, name)?;
    view.ok_or_else(|| ControlError::UnknownSecret(name.clone()))
}

/// Removes a secret.
///
/// # Errors
///
/// When there is none, an app uses it, or the store fails.
pub fn remove(change: &mut Change<'_>, name: &SecretName) -> Result<(), ControlError> {
    if store::secret::get(change.connection, name)?.is_none() {
        return Err(ControlError::UnknownSecret(name.clone()));
    }
    let users = users(change.connection)?.remove(name).unwrap_or_default();
    if !users.is_empty() {
        return Err(ControlError::SecretInUse {
            secret: name.clone(),
            apps: users,
        });
    }
    store::secret::delete(change.connection, name)?;
    for device in store::secret::devices_of(change.connection, name)? {
        refresh(change, &device)?;
    }
    Ok(change.event("secret-removed").record(name.as_str())?)
}

/// Every secret as the API shows it, by name.
///
/// # Errors
///
/// When the store fails.
pub fn views(connection: &Connection) -> Result<Vec<SecretView>, ControlError> {
    let mut users = users(connection)?;
    let rows = store::secret::list(connection)?.into_iter();
    Ok(rows
        .map(|row| SecretView {
            apps: users
                .remove(&row.name)
                .unwrap_or_default()
                .into_iter()
                .collect(),
            name: row.name,
            revision: row.revision,
            size: row.size,
            created_ms: row.created.0,
            changed_ms: row.changed.0,
        })
        .collect())
}

/// One of them.
///
/// # Errors
///
/// When the store fails.
pub fn view(
    connection: &Connection,
    name: &SecretName,
) -> Result<Option<SecretView>, ControlError> {
    let views = views(connection)?;
    Ok(views.into_iter().find(|view| view.name == *name))
}

/// Which apps use which secrets: those whose manifest names it, or that have a release which does and is needed.
fn users(connection: &Connection) -> rusqlite::Result<BTreeMap<SecretName, BTreeSet<AppName>>> {
    let mut users: BTreeMap<SecretName, BTreeSet<AppName>> = BTreeMap::new();
    for app in store::app::list(connection)? {
        if !app.deleting {
            let spec = &app.manifest.spec;
            let sent = spec.rollout.analysis.iter();
            let sent = sent.filter_map(|gate| gate.endpoint()?.1);
            for name in spec
                .secrets
                .keys()
                .chain(&spec.image_pull_secrets)
                .chain(sent)
            {
                users
                    .entry(name.clone())
                    .or_default()
                    .insert(app.name().clone());
            }
        }
    }
    for release in store::release::needed(connection)? {
        for name in release.secrets() {
            let apps = users.entry(name.clone()).or_default();
            apps.insert(release.app.clone());
        }
    }
    Ok(users)
}

/// A service of a release that is needed, which has the secret in its environment.
fn in_environment(
    connection: &Connection,
    name: &SecretName,
) -> rusqlite::Result<Option<(AppName, ServiceName)>> {
    let needed = store::release::needed(connection)?.into_iter();
    let mut found = needed.filter_map(|release| {
        let (service, _) = release.services.iter().find(|(_, service)| {
            let mut mounts = service.secrets.iter();
            mounts.any(|mount| mount.source == *name && mount.environment.is_some())
        })?;
        Some((release.app, service.clone()))
    });
    Ok(found.next())
}

/// An app whose images are pulled with the secret: its manifest says so, or a release that is needed.
fn pulled_with(connection: &Connection, name: &SecretName) -> rusqlite::Result<Option<AppName>> {
    let mut apps = store::app::list(connection)?.into_iter();
    let said = apps
        .find(|app| !app.deleting && app.manifest.spec.image_pull_secrets.contains(name))
        .map(|app| app.name().clone());
    if said.is_some() {
        return Ok(said);
    }
    let mut needed = store::release::needed(connection)?.into_iter();
    let found = needed.find(|release| release.image_pull_secrets.contains(name));
    Ok(found.map(|release| release.app))
}

/// The logins in the secrets that an app's images are pulled with, in their order.
///
/// # Errors
///
/// [`ControlError::PullSecretNotSet`] or [`ControlError::PullSecretNotLogins`]; or when the store fails.
pub fn logins(
    connection: &Connection,
    app: &AppName,
    names: &[SecretName],
) -> Result<Vec<DockerConfig>, ControlError> {
    let read = |name: &SecretName| {
        let Some(value) = store::secret::value(connection, name)? else {
            return Err(ControlError::PullSecretNotSet {
                secret: name.clone(),
                app: app.clone(),
            });
        };
        DockerConfig::logins(value.expose()).map_err(|problem| ControlError::PullSecretNotLogins {
            secret: name.clone(),
            app: app.clone(),
            problem,
        })
    };
    names.iter().map(read).collect()
}

/// The secrets that a release names and that are not set, by name.
///
/// # Errors
///
/// When the store fails.
pub fn unset(connection: &Connection, release: &Release) -> rusqlite::Result<BTreeSet<SecretName>> {
    let mounts = release
        .services
        .values()
        .flat_map(|service| &service.secrets);
    let names = mounts
        .map(|mount| &mount.source)
        .chain(&release.image_pull_secrets);
    let mut unset = BTreeSet::new();
    for name in names {
        if store::secret::get(connection, name)?.is_none() {
            unset.insert(name.clone());
        }
    }
    Ok(unset)
}

/// Whether every secret that a release names is there and can be what it is asked to be.
///
/// # Errors
///
/// [`ControlError::SecretNotSet`], [`ControlError::SecretNotText`], [`ControlError::SecretsTooLarge`] or those of [`logins`] if
/// not; or when the store fails.
pub fn check(connection: &Connection, release: &Release) -> Result<(), ControlError> {
    let mut bytes = BTreeMap::new();
    for (service, spec) in &release.services {
        for mount in &spec.secrets {
            let (app, service) = (release.app.clone(), service.clone());
            let secret = mount.source.clone();
            let Some(value) = store::secret::value(connection, &mount.source)? else {
                return Err(ControlError::SecretNotSet {
                    secret,
                    app,
                    service,
                });
            };
            let cost = Bundle::cost(&secret, value.expose().len());
            bytes.insert(&mount.source, cost);
            if mount.environment.is_some() && value.as_text().is_none() {
                return Err(ControlError::SecretNotText {
                    secret,
                    app,
                    service,
                });
            }
        }
    }
    logins(connection, &release.app, &release.image_pull_secrets)?;
    for name in &release.image_pull_secrets {
        let row = store::secret::get(connection, name)?;
        let size = row.map_or(0, |row| usize::try_from(row.size).unwrap_or(usize::MAX));
        bytes.insert(name, Bundle::cost(name, size));
    }
    if bytes.values().sum::<usize>() > MAX_BUNDLE_BYTES {
        return Err(ControlError::SecretsTooLarge(release.app.clone()));
    }
    Ok(())
}

/// Gives a device a new bundle if it needs one.
///
/// # Errors
///
/// When the store fails.
pub fn refresh(change: &mut Change<'_>, device: &DeviceId) -> rusqlite::Result<()> {
    change.effects.publish |= store::secret::refresh(change.connection, device)?;
    Ok(())
}

/// Takes note of a device's key and of the newest bundle that it has, and sends what it lacks.
///
/// # Errors
///
/// When the store fails.
pub fn noted(
    change: &mut Change<'_>,
    device: &DeviceId,
    key: Option<&PublicKey>,
    seen: Option<Version>,
) -> rusqlite::Result<()> {
    if let Some(key) = key {
        let shown = store::secret::show_key(change.connection, device, key)?;
        if shown == Shown::Other {
            let message = format!(
                "it shows another key ({}) than the one that its secrets are sealed to, and gets no secrets: it lost its state, \
                 or it is another device; if it is yours, run `foreshore device trust-key {device}`",
                key.fingerprint()
            );
            tracing::warn!(%device, "{message}");
            change
                .event("device-key-changed")
                .device(device)
                .record(message)?;
        }
    }
    refresh(change, device)?;
    change.effects.publish |= store::secret::repair(change.connection, device, seen)?;
    Ok(())
}

/// Trusts the key that a device shows now. Again, or without another key, it changes nothing.
///
/// # Errors
///
/// When there is no such device, it never showed a key, or the store fails.
pub fn trust_key(change: &mut Change<'_>, device: &DeviceId) -> Result<(), ControlError> {
    if store::device::link(change.connection, device)?.is_none() {
        return Err(ControlError::UnknownDevice(device.clone()));
    }
    if store::secret::keys(change.connection, device)?.is_none() {
        return Err(ControlError::NoKey(device.clone()));
    }
    if store::secret::trust_key(change.connection, device)? {
        change.effects.publish = true;
        change
            .event("device-key-trusted")
            .device(device)
            .record("by an operator; its secrets are sealed to that key")?;
    }
    Ok(())
}
