//! Secrets, the keys of devices, and what each device is to be sent.
//!
//! A device gets a [`Bundle`] of exactly the secrets that its releases name: what is placed on it, and what it says it runs or
//! can go back to. Whatever changes that gives the bundle a new version and an outbox row in the same transaction; the
//! bundle is sealed when it is sent. Nothing here prints a value.

use std::collections::BTreeMap;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{
    Bundle, MAX_BUNDLE_BYTES, MAX_BUNDLE_SECRETS, PublicKey, SealedSecrets, Secret, SecretValue,
};
use foreshore_protocol::{DeviceId, Digest, Version};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{column, desired};
use crate::rollout::UnixMs;

/// A secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretRow {
    /// Its name.
    pub name: SecretName,
    /// Grows with every change of any secret.
    pub revision: u64,
    /// Bytes of its value.
    pub size: u64,
    /// When it was first set.
    pub created: UnixMs,
    /// When its value last changed.
    pub changed: UnixMs,
}

const COLUMNS: &str = "name, revision, length(value), created_ms, changed_ms";

fn read(row: &Row<'_>) -> rusqlite::Result<SecretRow> {
    Ok(SecretRow {
        name: column::parsed(row, 0)?,
        revision: row.get(1)?,
        size: row.get(2)?,
        created: UnixMs(row.get(3)?),
        changed: UnixMs(row.get(4)?),
    })
}

/// Every secret, by name.
///
/// # Errors
///
/// When SQLite fails.
pub fn list(connection: &Connection) -> rusqlite::Result<Vec<SecretRow>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM secret ORDER BY name"))?
        .query_map([], read)?
        .collect()
}

/// The secret of that name.
///
/// # Errors
///
/// When SQLite fails.
pub fn get(connection: &Connection, name: &SecretName) -> rusqlite::Result<Option<SecretRow>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM secret WHERE name = ?1"))?
        .query_row([name.as_str()], read)
        .optional()
}

/// The value of a secret.
///
/// # Errors
///
/// When SQLite fails.
pub fn value(connection: &Connection, name: &SecretName) -> rusqlite::Result<Option<SecretValue>> {
    connection
        .prepare_cached("SELECT value FROM secret WHERE name = ?1")?
        .query_row([name.as_str()], |row| row.get(0).map(SecretValue::new))
        .optional()
}

/// Sets a value; whether it is another than before.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(
    connection: &Connection,
    name: &SecretName,
    value: &SecretValue,
    now: UnixMs,
) -> rusqlite::Result<bool> {
    if self::value(connection, name)?.as_ref() == Some(value) {
        return Ok(false);
    }
    // One counter for all: a secret that is removed and set again is another one for devices.
    let revision: u64 = connection
        .prepare_cached(
            "INSERT INTO meta (key, value) VALUES ('secret_revision', 1)
             ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value",
        )?
        .query_row([], |row| row.get(0))?;
    connection
        .prepare_cached(
            "INSERT INTO secret (name, revision, value, created_ms, changed_ms) VALUES (?1, ?2, ?3, ?4, ?4)
             ON CONFLICT (name) DO UPDATE SET revision = ?2, value = ?3, changed_ms = ?4",
        )?
        .execute(params![name.as_str(), revision, value.expose(), now.0])?;
    Ok(true)
}

/// Removes a secret; whether it was there.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, name: &SecretName) -> rusqlite::Result<bool> {
    let gone = connection
        .prepare_cached("DELETE FROM secret WHERE name = ?1")?
        .execute([name.as_str()])?;
    Ok(gone > 0)
}

/// Keeps which secrets a release names. The release must be there.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_names(
    connection: &Connection,
    digest: &Digest,
    release: &Release,
) -> rusqlite::Result<()> {
    let mounts = release
        .services
        .values()
        .flat_map(|service| &service.secrets);
    let names = mounts.map(|mount| &mount.source);
    for name in names.chain(&release.image_pull_secrets) {
        connection
            .prepare_cached(
                "INSERT OR IGNORE INTO release_secret (release, secret) VALUES (?1, ?2)",
            )?
            .execute([digest.to_string().as_str(), name.as_str()])?;
    }
    Ok(())
}

/// The releases that a device has to have the secrets of.
const RELEASES: &str = "
    SELECT release FROM placement WHERE device = ?1
    UNION SELECT json_extract(body, '$.running') FROM report JOIN placement USING (device, app) WHERE device = ?1
    UNION SELECT json_extract(body, '$.last_known_good') FROM report JOIN placement USING (device, app) WHERE device = ?1";

type Wanted = BTreeMap<SecretName, u64>;

/// What a device's bundle must hold, with revisions, and the names that do not fit in any more.
fn wanted(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<(Wanted, Vec<SecretName>)> {
    let any: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM release_secret)")?
        .query_row([], |row| row.get(0))?;
    if !any {
        return Ok((Wanted::new(), Vec::new()));
    }
    let mut statement = connection.prepare_cached(&format!(
        "SELECT DISTINCT name, revision, length(value) FROM secret JOIN release_secret ON secret = name
         WHERE release IN ({RELEASES}) ORDER BY name"
    ))?;
    let mut rows = statement.query([device.as_str()])?;
    let (mut wanted, mut left_out, mut bytes) = (Wanted::new(), Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let (name, size): (SecretName, usize) = (column::parsed(row, 0)?, row.get(2)?);
        let cost = Bundle::cost(&name, size);
        if bytes + cost > MAX_BUNDLE_BYTES || wanted.len() == MAX_BUNDLE_SECRETS {
            left_out.push(name);
        } else {
            bytes += cost;
            wanted.insert(name, row.get(1)?);
        }
    }
    Ok((wanted, left_out))
}

/// What is known of a device's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    /// What its secrets are sealed to: the first one that it showed, or that an operator trusted.
    pub trusted: PublicKey,
    /// Another one that it showed last.
    pub untrusted: Option<PublicKey>,
}

fn key(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<PublicKey>> {
    Ok(row
        .get::<_, Option<[u8; 32]>>(index)?
        .map(PublicKey::from_bytes))
}

/// The keys of a device; `None` when it never showed one.
///
/// # Errors
///
/// When SQLite fails.
pub fn keys(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Option<Keys>> {
    let keys = connection
        .prepare_cached("SELECT key, untrusted FROM device_secrets WHERE device = ?1")?
        .query_row([device.as_str()], |row| Ok((key(row, 0)?, key(row, 1)?)))
        .optional()?;
    Ok(keys.and_then(|(trusted, untrusted)| {
        Some(Keys {
            trusted: trusted?,
            untrusted,
        })
    }))
}

/// What a device showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// What it showed before.
    Known,
    /// Its first key, which is trusted from now on.
    First,
    /// Another key than the trusted one.
    Other,
    /// The trusted key, after another one.
    Back,
}

/// Takes note of the key that a device shows.
///
/// # Errors
///
/// When SQLite fails.
pub fn show_key(
    connection: &Connection,
    device: &DeviceId,
    shown: &PublicKey,
) -> rusqlite::Result<Shown> {
    let Some(keys) = keys(connection, device)? else {
        connection
            .prepare_cached("INSERT INTO device_secrets (device, key) VALUES (?1, ?2)")?
            .execute(params![device.as_str(), shown.as_bytes()])?;
        return Ok(Shown::First);
    };
    let untrusted = (*shown != keys.trusted).then_some(*shown);
    if untrusted == keys.untrusted {
        return Ok(Shown::Known);
    }
    connection
        .prepare_cached("UPDATE device_secrets SET untrusted = ?2 WHERE device = ?1")?
        .execute(params![
            device.as_str(),
            untrusted.as_ref().map(PublicKey::as_bytes)
        ])?;
    if untrusted.is_some() {
        connection
            .prepare_cached("DELETE FROM outbox_secrets WHERE device = ?1")?
            .execute([device.as_str()])?;
        return Ok(Shown::Other);
    }
    Ok(Shown::Back)
}

/// Trusts the key that a device shows now, and gives it its bundle; false when it shows no other than the trusted one.
///
/// # Errors
///
/// When SQLite fails.
pub fn trust_key(connection: &Connection, device: &DeviceId) -> rusqlite::Result<bool> {
    let changed = connection
        .prepare_cached(
            "UPDATE device_secrets SET key = untrusted, untrusted = NULL WHERE device = ?1 AND untrusted IS NOT NULL",
        )?
        .execute([device.as_str()])?;
    if changed > 0 {
        let (wanted, _) = wanted(connection, device)?;
        bump(connection, device, &wanted, None)?;
    }
    Ok(changed > 0)
}

/// Gives a device a new bundle if it needs other secrets, or others of their values, than the newest one holds; whether it
/// did. What does not fit is left out; a service waits for it then.
///
/// # Errors
///
/// When SQLite fails.
pub fn refresh(connection: &Connection, device: &DeviceId) -> rusqlite::Result<bool> {
    let before: Option<Wanted> = connection
        .prepare_cached("SELECT wanted FROM device_secrets WHERE device = ?1")?
        .query_row([device.as_str()], |row| column::json(row, 0))
        .optional()?;
    let Some(before) = before else {
        return Ok(false);
    };
    let (wanted, left_out) = wanted(connection, device)?;
    if wanted == before {
        return Ok(false);
    }
    if !left_out.is_empty() {
        tracing::warn!(%device, ?left_out, "a device needs more secrets than it can be sent; some are left out");
    }
    bump(connection, device, &wanted, None)?;
    Ok(true)
}

/// The next version, above `seen`, and an outbox row unless the device's key is not trusted.
fn bump(
    connection: &Connection,
    device: &DeviceId,
    wanted: &Wanted,
    seen: Option<Version>,
) -> rusqlite::Result<()> {
    let epoch = desired::epoch(connection)?.get();
    let floor = seen
        // What a broken device says must not use the numbers up.
        .filter(|seen| seen.epoch.get() == epoch && seen.generation.get() < 1 << 62)
        .map_or(0, |seen| seen.generation.get());
    connection
        .prepare_cached(
            "UPDATE device_secrets SET wanted = ?2, epoch = ?3, generation = 1 + max(coalesce(generation, 0), ?4)
             WHERE device = ?1",
        )?
        .execute(params![
            device.as_str(),
            column::to_json(wanted)?,
            epoch,
            floor
        ])?;
    enqueue(connection, device)
}

fn enqueue(connection: &Connection, device: &DeviceId) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO outbox_secrets (device, epoch, generation)
             SELECT device, epoch, generation FROM device_secrets
             WHERE device = ?1 AND untrusted IS NULL AND generation IS NOT NULL",
        )?
        .execute([device.as_str()])?;
    Ok(())
}

/// Sends the newest bundle again to a device that has an older one; true when something waits then. One that has a newer
/// one, from before it was forgotten or the database was put back, gets one above that.
///
/// # Errors
///
/// When SQLite fails.
pub fn repair(
    connection: &Connection,
    device: &DeviceId,
    seen: Option<Version>,
) -> rusqlite::Result<bool> {
    let newest = connection
        .prepare_cached("SELECT epoch, generation FROM device_secrets WHERE device = ?1")?
        .query_row([device.as_str()], |row| column::version_option(row, 0))
        .optional()?;
    let Some(newest) = newest else {
        return Ok(false);
    };
    match newest.cmp(&seen) {
        std::cmp::Ordering::Equal => Ok(false),
        std::cmp::Ordering::Greater => enqueue(connection, device).map(|()| true),
        std::cmp::Ordering::Less => {
            let (wanted, _) = wanted(connection, device)?;
            bump(connection, device, &wanted, seen).map(|()| true)
        }
    }
}

/// Devices that have a secret, or a release placed that names it.
///
/// # Errors
///
/// When SQLite fails.
pub fn devices_of(connection: &Connection, name: &SecretName) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached(
            "SELECT device FROM device_secrets WHERE EXISTS (SELECT 1 FROM json_each(wanted) WHERE key = ?1)
             UNION SELECT device FROM placement JOIN release_secret USING (release) WHERE secret = ?1",
        )?
        .query_map([name.as_str()], |row| column::parsed(row, 0))?
        .collect()
}

/// Bundles that wait to be published, sealed, but those that `rests` says yes to; at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn waiting(
    connection: &Connection,
    limit: usize,
    rests: impl Fn(&DeviceId, Version) -> bool,
) -> rusqlite::Result<Vec<(DeviceId, Version, SealedSecrets)>> {
    // CROSS JOIN makes SQLite begin with what waits, which is little, not with every device that has a key.
    let mut statement = connection.prepare_cached(
        "SELECT d.device, d.epoch, d.generation, key, wanted FROM outbox_secrets AS waiting
             CROSS JOIN device_secrets AS d ON d.device = waiting.device
             CROSS JOIN device ON device.id = waiting.device
         WHERE untrusted IS NULL AND restored_epoch IS NULL ORDER BY waiting.device",
    )?;
    let mut rows = statement.query([])?;
    let mut bundles = Vec::new();
    while bundles.len() < limit
        && let Some(row) = rows.next()?
    {
        let (device, version) = (column::parsed(row, 0)?, column::version(row, 1)?);
        if rests(&device, version) {
            continue;
        }
        let Some(key) = key(row, 3)? else { continue };
        let wanted: Wanted = column::json(row, 4)?;
        let bundle = Bundle {
            device: device.clone(),
            version,
            secrets: values(connection, &wanted)?,
        };
        bundles.push((device, version, key.seal(&bundle)));
    }
    Ok(bundles)
}

fn values(
    connection: &Connection,
    wanted: &Wanted,
) -> rusqlite::Result<BTreeMap<SecretName, Secret>> {
    let mut secrets = BTreeMap::new();
    for (name, revision) in wanted {
        let value = connection
            .prepare_cached("SELECT value FROM secret WHERE name = ?1 AND revision = ?2")?
            .query_row(params![name.as_str(), revision], |row| row.get(0))
            .optional()?;
        if let Some(value) = value.map(SecretValue::new) {
            let revision = *revision;
            secrets.insert(name.clone(), Secret { revision, value });
        }
    }
    Ok(secrets)
}

/// Clears the outbox row of a device whose bundle of `version` the broker took, unless a newer one waits.
///
/// # Errors
///
/// When SQLite fails.
pub fn published(
    connection: &Connection,
    device: &DeviceId,
    version: Version,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM outbox_secrets WHERE device = ?1 AND (epoch, generation) <= (?2, ?3)",
        )?
        .execute(params![
            device.as_str(),
            version.epoch.get(),
            version.generation.get()
        ])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::Placement;
    use crate::store::tests::memory;
    use crate::store::{app, device};
    use foreshore_protocol::secret::DeviceKey;

    struct Bed {
        connection: Connection,
        device: DeviceId,
        key: DeviceKey,
    }

    impl Bed {
        fn new() -> Self {
            let connection = memory();
            let device: DeviceId = "gw-1".parse().unwrap();
            device::insert(&connection, &device, UnixMs(1)).unwrap();
            let key = DeviceKey::generate();
            let shown = show_key(&connection, &device, &key.public()).unwrap();
            assert_eq!(shown, Shown::First);
            Self {
                connection,
                device,
                key,
            }
        }

        fn set(&self, name: &str, value: &str) -> bool {
            let value = SecretValue::new(value.into());
            put(&self.connection, &name.parse().unwrap(), &value, UnixMs(2)).unwrap()
        }

        fn release(&self, app: &str, names: &[&str]) -> Digest {
            let secrets: BTreeMap<&str, _> = names
                .iter()
                .map(|name| (*name, serde_json::json!({"external": true})))
                .collect();
            let manifest = serde_json::json!({
                "apiVersion": "foreshore/v1", "kind": "App", "metadata": {"name": app},
                "spec": {"secrets": secrets, "services": {"web": {"image": "x", "secrets": names}}},
            });
            let manifest =
                foreshore_protocol::manifest::parse(manifest.to_string().as_bytes()).unwrap();
            let image = format!("hub.internal/x@{}", Digest::of(b"x"));
            let pins = [("web".parse().unwrap(), image)].into();
            let release = Release::from_app(&manifest, &pins).unwrap();
            let digest = release.digest();
            let name = app.parse().unwrap();
            let bytes = release.to_canonical_json();
            app::put_release(&self.connection, &digest, &name, &bytes, UnixMs(1)).unwrap();
            put_names(&self.connection, &digest, &release).unwrap();
            digest
        }

        fn place(&self, app: &str, release: Digest) {
            let placement = Placement {
                release,
                soak_ms: 1,
                progress_deadline_ms: 2,
            };
            let app = app.parse().unwrap();
            desired::place(&self.connection, &self.device, &app, &placement).unwrap();
        }

        /// What waits, opened and taken by the broker.
        fn sent(&self) -> Option<(u64, Vec<String>)> {
            let mut waiting = waiting(&self.connection, 10, |_, _| false).unwrap();
            let (device, version, sealed) = waiting.pop()?;
            assert_eq!(device, self.device);
            let bundle = self.key.open(&sealed).unwrap();
            assert_eq!((bundle.version, &bundle.device), (version, &self.device));
            published(&self.connection, &device, version).unwrap();
            let text = |(name, secret): (&SecretName, &Secret)| {
                format!("{name}={}", secret.value.as_text().unwrap())
            };
            Some((
                version.generation.get(),
                bundle.secrets.iter().map(text).collect(),
            ))
        }
    }

    #[test]
    fn a_device_gets_exactly_the_secrets_that_its_releases_name() {
        let bed = Bed::new();
        for (name, value) in [("a", "1"), ("b", "2"), ("c", "3")] {
            assert!(bed.set(name, value));
        }
        assert_eq!(bed.sent(), None);
        bed.place("shop", bed.release("shop", &["a"]));
        assert_eq!(bed.sent(), Some((1, vec!["a=1".to_owned()])));
        bed.place("till", bed.release("till", &["a", "b"]));
        let both = vec!["a=1".to_owned(), "b=2".to_owned()];
        assert_eq!(bed.sent(), Some((2, both)));
        // Nothing new: nothing is sent.
        bed.place("till", bed.release("till", &["a", "b"]));
        assert_eq!(bed.sent(), None);
        let app = "till".parse().unwrap();
        desired::remove(&bed.connection, &bed.device, &app).unwrap();
        assert_eq!(bed.sent(), Some((3, vec!["a=1".to_owned()])));
        // What the device can go back to is kept until it reports that it cannot any more.
        let (old, new) = (bed.release("shop", &["a"]), bed.release("shop", &["c"]));
        let report = |good: Digest| {
            let version = Version::from_numbers(1, 1).unwrap();
            let status = foreshore_protocol::message::AppStatus {
                app: "shop".parse().unwrap(),
                since: version,
                release: new,
                phase: foreshore_protocol::message::Phase::Staging,
                reason: None,
                running: None,
                last_known_good: Some(good),
                services: vec![],
            };
            device::put_reports(&bed.connection, &bed.device, &[status]).unwrap();
            refresh(&bed.connection, &bed.device).unwrap();
        };
        report(old);
        bed.place("shop", new);
        let both = vec!["a=1".to_owned(), "c=3".to_owned()];
        assert_eq!(bed.sent(), Some((4, both)));
        report(new);
        assert_eq!(bed.sent(), Some((5, vec!["c=3".to_owned()])));
        // A new value is another revision; the same value is not.
        let revision = || {
            get(&bed.connection, &"c".parse().unwrap())
                .unwrap()
                .unwrap()
                .revision
        };
        let before = revision();
        assert!(!bed.set("c", "3"));
        assert_eq!(revision(), before);
        assert!(bed.set("c", "4") && revision() > before);
        assert_eq!(
            devices_of(&bed.connection, &"c".parse().unwrap()).unwrap(),
            std::slice::from_ref(&bed.device)
        );
        refresh(&bed.connection, &bed.device).unwrap();
        assert_eq!(bed.sent(), Some((6, vec!["c=4".to_owned()])));
    }

    #[test]
    fn another_key_gets_nothing_until_it_is_trusted() {
        let mut bed = Bed::new();
        bed.set("a", "1");
        bed.place("shop", bed.release("shop", &["a"]));
        let (known, thief) = (bed.key.clone(), DeviceKey::generate());
        let show = |bed: &Bed, key: &DeviceKey| {
            show_key(&bed.connection, &bed.device, &key.public()).unwrap()
        };
        assert_eq!(show(&bed, &thief), Shown::Other);
        assert_eq!(show(&bed, &thief), Shown::Known);
        bed.set("a", "2");
        refresh(&bed.connection, &bed.device).unwrap();
        repair(&bed.connection, &bed.device, None).unwrap();
        assert_eq!(bed.sent(), None);
        assert_eq!(show(&bed, &known), Shown::Back);
        assert!(repair(&bed.connection, &bed.device, None).unwrap());
        assert_eq!(bed.sent().unwrap().1, ["a=2"]);
        assert!(!trust_key(&bed.connection, &bed.device).unwrap());
        assert_eq!(show(&bed, &thief), Shown::Other);
        assert!(trust_key(&bed.connection, &bed.device).unwrap());
        bed.key = thief;
        assert_eq!(bed.sent().unwrap().1, ["a=2"]);
    }

    #[test]
    fn a_device_that_is_behind_or_ahead_is_repaired() {
        let bed = Bed::new();
        let version = |generation| Version::from_numbers(1, generation).ok();
        assert!(!repair(&bed.connection, &bed.device, None).unwrap());
        bed.set("a", "1");
        bed.place("shop", bed.release("shop", &["a"]));
        assert_eq!(bed.sent().unwrap().0, 1);
        assert!(!repair(&bed.connection, &bed.device, version(1)).unwrap());
        assert_eq!(bed.sent(), None);
        assert!(repair(&bed.connection, &bed.device, None).unwrap());
        assert_eq!(bed.sent().unwrap().0, 1);
        assert!(repair(&bed.connection, &bed.device, version(7)).unwrap());
        assert_eq!(bed.sent(), Some((8, vec!["a=1".to_owned()])));
        desired::begin_epoch(&bed.connection, UnixMs(0)).unwrap();
        assert_eq!(bed.sent(), None, "not before it has spoken");
        device::confirm(&bed.connection, &bed.device).unwrap();
        assert_eq!(bed.sent().unwrap().1, ["a=1"]);
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_named() {
        let bed = Bed::new();
        let names: Vec<String> = (10..24).map(|number| format!("s{number}")).collect();
        for name in &names {
            bed.set(name, &"x".repeat(4096));
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let release = bed.release("shop", &names);
        bed.place("shop", release);
        assert_eq!(bed.sent().unwrap().1.len(), 11);
        let (_, left_out) = wanted(&bed.connection, &bed.device).unwrap();
        let left_out: Vec<&str> = left_out.iter().map(SecretName::as_str).collect();
        assert_eq!(left_out, ["s21", "s22", "s23"]);
    }
}
