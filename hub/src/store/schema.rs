//! The tables, and how an older database becomes one of today. Migrations only ever go forward.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// One step per version; never edited after a release, only added to.
const MIGRATIONS: &[&str] = &[
    INITIAL,
    UNLOCKED_RELEASE,
    REGISTRY,
    CACHE,
    SECRETS,
    LEASES,
    HOLDS,
    PULSE,
    RESTORED,
    GAUGES,
    TERMS,
    REQUIREMENTS,
    ALLOWANCES,
];

/// Devices say since when they keep events, and have only so many taken in.
const ALLOWANCES: &str = "
ALTER TABLE device DROP COLUMN event_gap;
ALTER TABLE device ADD COLUMN events_paid_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE device ADD COLUMN events_throttled INTEGER NOT NULL DEFAULT 0;
";

/// From which releases of its app one can be reached, in order; one without rows from any.
const REQUIREMENTS: &str = "
CREATE TABLE requirement (
    release TEXT NOT NULL REFERENCES release (digest) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    required TEXT NOT NULL,
    PRIMARY KEY (release, place)
) STRICT, WITHOUT ROWID;
CREATE INDEX requirement_required ON requirement (required);
";

/// What devices are told besides with what is placed on them, as JSON; NULL is nothing.
const TERMS: &str = "ALTER TABLE placement ADD COLUMN terms TEXT;";

/// Disruption budgets, whom they hold for, and whose turn it is.
const LEASES: &str = "
CREATE TABLE disruption_budget (
    name TEXT PRIMARY KEY,
    manifest TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Which devices a budget holds for, and their groups as JSON; in step with labels and selectors like member.
CREATE TABLE budget_member (
    budget TEXT NOT NULL REFERENCES disruption_budget (name) ON DELETE CASCADE,
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    labels TEXT NOT NULL,
    PRIMARY KEY (budget, device)
) STRICT, WITHOUT ROWID;
CREATE INDEX budget_member_device ON budget_member (device);

-- Devices that wait for their turn.
CREATE TABLE lease_request (
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    app TEXT NOT NULL,
    since_epoch INTEGER NOT NULL,
    since_generation INTEGER NOT NULL,
    release TEXT NOT NULL,
    boot INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    first_ms INTEGER NOT NULL,
    asked_ms INTEGER NOT NULL,
    PRIMARY KEY (device, app)
) STRICT, WITHOUT ROWID;

-- Devices that have their turn, or that were written off.
CREATE TABLE lease (
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    app TEXT NOT NULL,
    since_epoch INTEGER NOT NULL,
    since_generation INTEGER NOT NULL,
    release TEXT NOT NULL,
    boot INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    first_ms INTEGER NOT NULL,
    granted_ms INTEGER NOT NULL,
    ttl_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    written_off INTEGER NOT NULL,
    told_overdue INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device, app)
) STRICT, WITHOUT ROWID;

CREATE INDEX report_switching ON report (device) WHERE phase IN ('activating', 'soaking');
";

/// Devices that an operator holds, devices that a rollout has in hand, and rollouts that wake after their end.
const HOLDS: &str = "
ALTER TABLE device ADD COLUMN held TEXT;
ALTER TABLE assignment ADD COLUMN busy INTEGER NOT NULL DEFAULT 0;
CREATE INDEX rollout_wake ON rollout (wake_at_ms) WHERE wake_at_ms IS NOT NULL;
";

/// How many devices are connected, and in which hour the others were last heard of; and devices that a rollout has in
/// hand, by rollout.
const PULSE: &str = "
CREATE INDEX assignment_busy ON assignment (rollout) WHERE busy;

-- In step with device by the triggers below. All that are connected are in hour 0.
CREATE TABLE pulse (
    online INTEGER NOT NULL,
    hour INTEGER NOT NULL,
    devices INTEGER NOT NULL,
    PRIMARY KEY (online, hour)
) STRICT, WITHOUT ROWID;
INSERT INTO pulse (online, hour, devices)
    SELECT online, iif(online, 0, last_seen_ms / 3600000), count(*) FROM device
    WHERE online OR last_seen_ms IS NOT NULL GROUP BY 1, 2;
CREATE TRIGGER pulse_comes AFTER INSERT ON device WHEN NEW.online OR NEW.last_seen_ms IS NOT NULL
BEGIN
    INSERT OR IGNORE INTO pulse VALUES (NEW.online, iif(NEW.online, 0, NEW.last_seen_ms / 3600000), 0);
    UPDATE pulse SET devices = devices + 1
        WHERE online = NEW.online AND hour = iif(NEW.online, 0, NEW.last_seen_ms / 3600000);
END;
CREATE TRIGGER pulse_goes AFTER DELETE ON device WHEN OLD.online OR OLD.last_seen_ms IS NOT NULL
BEGIN
    UPDATE pulse SET devices = devices - 1
        WHERE online = OLD.online AND hour = iif(OLD.online, 0, OLD.last_seen_ms / 3600000);
    DELETE FROM pulse
        WHERE online = OLD.online AND hour = iif(OLD.online, 0, OLD.last_seen_ms / 3600000) AND devices <= 0;
END;
CREATE TRIGGER pulse_moves AFTER UPDATE OF online, last_seen_ms ON device
WHEN OLD.online IS NOT NEW.online
    OR (NOT NEW.online AND OLD.last_seen_ms / 3600000 IS NOT NEW.last_seen_ms / 3600000)
BEGIN
    UPDATE pulse SET devices = devices - 1
        WHERE online = OLD.online AND hour = iif(OLD.online, 0, OLD.last_seen_ms / 3600000);
    DELETE FROM pulse
        WHERE online = OLD.online AND hour = iif(OLD.online, 0, OLD.last_seen_ms / 3600000) AND devices <= 0;
    INSERT OR IGNORE INTO pulse SELECT NEW.online, iif(NEW.online, 0, NEW.last_seen_ms / 3600000), 0
        WHERE NEW.online OR NEW.last_seen_ms IS NOT NULL;
    UPDATE pulse SET devices = devices + 1
        WHERE online = NEW.online AND hour = iif(NEW.online, 0, NEW.last_seen_ms / 3600000);
END;
";

/// The version that a restored backup has for a device, until the device has said which one it has (0, 0: none).
const RESTORED: &str = "
ALTER TABLE device ADD COLUMN restored_epoch INTEGER;
ALTER TABLE device ADD COLUMN restored_generation INTEGER;
";

/// When the gauges of a device came.
const GAUGES: &str = "ALTER TABLE device ADD COLUMN gauges_ms INTEGER;";

/// What the hub fetched from other registries for its site.
const CACHE: &str = "
-- What a tag of HOST/REPOSITORY named when its registry was last asked.
CREATE TABLE cached_tag (
    name TEXT NOT NULL,
    tag TEXT NOT NULL,
    digest TEXT NOT NULL,
    checked_ms INTEGER NOT NULL,
    PRIMARY KEY (name, tag)
) STRICT, WITHOUT ROWID;

-- Blobs that a cached manifest is or names, whether they were fetched or not.
CREATE TABLE cached_blob (
    digest TEXT PRIMARY KEY,
    media_type TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    used_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// What the registry endpoint knows beside tags, which are rows of `image`.
const REGISTRY: &str = "
-- Manifests and indexes that can be pulled from a repository. One that nothing reaches goes after keep_until_ms.
CREATE TABLE manifest (
    repository TEXT NOT NULL,
    digest TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    subject TEXT,
    artifact_type TEXT,
    annotations TEXT NOT NULL,
    keep_until_ms INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX manifest_subject ON manifest (repository, subject, digest) WHERE subject IS NOT NULL;

-- Blobs that a push counts on although no manifest names them yet.
CREATE TABLE blob_lease (
    repository TEXT NOT NULL,
    digest TEXT NOT NULL,
    used_ms INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;

CREATE TABLE upload (
    id TEXT PRIMARY KEY,
    repository TEXT NOT NULL,
    touched_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// The release of an app that devices switch to although the app holds its update lock.
const UNLOCKED_RELEASE: &str = "ALTER TABLE app ADD COLUMN unlocked_release TEXT;";

/// Secrets, which releases name them, the keys of devices with what they are to be sent, and what waits to be sent.
const SECRETS: &str = "
CREATE TABLE secret (
    name TEXT PRIMARY KEY,
    revision INTEGER NOT NULL,
    value BLOB NOT NULL,
    created_ms INTEGER NOT NULL,
    changed_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE release_secret (
    release TEXT NOT NULL REFERENCES release (digest) ON DELETE CASCADE,
    secret TEXT NOT NULL,
    PRIMARY KEY (release, secret)
) STRICT, WITHOUT ROWID;
CREATE INDEX release_secret_secret ON release_secret (secret);
CREATE TABLE device_secrets (
    device TEXT PRIMARY KEY REFERENCES device (id) ON DELETE CASCADE,
    key BLOB NOT NULL,
    untrusted BLOB,
    wanted TEXT NOT NULL DEFAULT '{}',
    epoch INTEGER,
    generation INTEGER
) STRICT, WITHOUT ROWID;
CREATE TABLE outbox_secrets (
    device TEXT PRIMARY KEY REFERENCES device (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    generation INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// Brings the database to the newest schema, each step in its own transaction.
///
/// # Errors
///
/// When a newer hub wrote it, or SQLite fails.
pub fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let known = i64::try_from(MIGRATIONS.len()).expect("a handful of migrations");
    loop {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > known {
            return Err(StoreError::Newer { found, known });
        }
        let Some(step) = usize::try_from(found)
            .ok()
            .and_then(|found| MIGRATIONS.get(found))
        else {
            return Ok(());
        };
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", found + 1)?;
        transaction.commit()?;
    }
}

/// Times are milliseconds since 1970. Digests, ids and JSON are text, so that `sqlite3` shows them.
const INITIAL: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta (key, value) VALUES ('epoch', 1), ('latest_ms', 0);

CREATE TABLE device (
    id TEXT PRIMARY KEY,
    created_ms INTEGER NOT NULL,
    operator_labels TEXT NOT NULL DEFAULT '{}',
    own_labels TEXT NOT NULL DEFAULT '{}',
    inventory TEXT,
    session INTEGER NOT NULL DEFAULT 0,
    online INTEGER NOT NULL DEFAULT 0,
    last_seen_ms INTEGER,
    boot INTEGER NOT NULL DEFAULT 0,
    reported_seq INTEGER NOT NULL DEFAULT 0,
    event_seq INTEGER NOT NULL DEFAULT 0,
    event_gap INTEGER,
    accepted_epoch INTEGER,
    accepted_generation INTEGER,
    desired_epoch INTEGER,
    desired_generation INTEGER,
    memory_mib INTEGER,
    load_centi INTEGER,
    repair_at_ms INTEGER NOT NULL DEFAULT 0,
    repair_tries INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX device_seen ON device (online, last_seen_ms);

CREATE TABLE release (
    digest TEXT PRIMARY KEY,
    app TEXT NOT NULL,
    bytes BLOB NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE app (
    name TEXT PRIMARY KEY,
    manifest TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    deleting INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

-- Which devices an app selects now; kept in step with labels and selectors in the same transaction.
CREATE TABLE member (
    app TEXT NOT NULL REFERENCES app (name) ON DELETE CASCADE,
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    PRIMARY KEY (app, device)
) STRICT, WITHOUT ROWID;
CREATE INDEX member_device ON member (device);

CREATE TABLE placement (
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    app TEXT NOT NULL,
    release TEXT NOT NULL REFERENCES release (digest),
    soak_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL,
    since_epoch INTEGER NOT NULL,
    since_generation INTEGER NOT NULL,
    PRIMARY KEY (device, app)
) STRICT, WITHOUT ROWID;
CREATE INDEX placement_release ON placement (release);
CREATE INDEX placement_app ON placement (app);

-- A device that must still say that it removed an app.
CREATE TABLE removal (
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    app TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    PRIMARY KEY (device, app)
) STRICT, WITHOUT ROWID;
CREATE INDEX removal_app ON removal (app);

-- What must be published: the newest head of a device, and releases. One row each, however often it changes.
CREATE TABLE outbox (
    device TEXT PRIMARY KEY REFERENCES device (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    generation INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE outbox_release (digest TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
-- Topics whose retained message must go: those of forgotten devices and releases.
CREATE TABLE outbox_clear (topic TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

CREATE TABLE rollout (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    app TEXT NOT NULL,
    state TEXT NOT NULL,
    final INTEGER NOT NULL,
    wake_at_ms INTEGER,
    created_ms INTEGER NOT NULL,
    header TEXT NOT NULL
) STRICT;
CREATE INDEX rollout_app ON rollout (app, id);
CREATE INDEX rollout_live ON rollout (final, wake_at_ms);

CREATE TABLE wave (
    rollout INTEGER NOT NULL REFERENCES rollout (id) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (rollout, ordinal)
) STRICT, WITHOUT ROWID;

CREATE TABLE assignment (
    rollout INTEGER NOT NULL REFERENCES rollout (id) ON DELETE CASCADE,
    device TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (rollout, device)
) STRICT, WITHOUT ROWID;
CREATE INDEX assignment_device ON assignment (device);

CREATE TABLE report (
    device TEXT NOT NULL REFERENCES device (id) ON DELETE CASCADE,
    app TEXT NOT NULL,
    since_epoch INTEGER NOT NULL,
    since_generation INTEGER NOT NULL,
    release TEXT NOT NULL,
    phase TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (device, app)
) STRICT, WITHOUT ROWID;
CREATE INDEX report_app ON report (app, release, phase);

CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    received_ms INTEGER NOT NULL,
    device TEXT,
    app TEXT,
    service TEXT,
    rollout INTEGER,
    kind TEXT NOT NULL,
    message TEXT NOT NULL
) STRICT;

CREATE TABLE image (
    reference TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    platforms TEXT NOT NULL,
    imported_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrating_twice_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        connection
            .execute("UPDATE meta SET value = 7 WHERE key = 'epoch'", [])
            .unwrap();
        migrate(&mut connection).unwrap();
        let epoch: i64 = connection
            .query_row("SELECT value FROM meta WHERE key = 'epoch'", [], |row| {
                row.get(0)
            })
            .unwrap();
        assert_eq!(epoch, 7);
    }
}
