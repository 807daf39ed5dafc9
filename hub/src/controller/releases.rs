//! Forgetting releases that nobody asks for any more, here and at the broker.

use foreshore_protocol::{Digest, topic};
use rusqlite::Connection;

use super::{Change, ControlError};
use crate::store;

/// The releases of an app's newest rollouts that are kept although no device needs them: so many rollouts.
pub const KEEP_ROLLOUTS: u64 = 10;

/// Releases that are forgotten at once; the others wait for the next time.
const AT_ONCE: u64 = 500;

/// What nobody asked for when it was looked at.
#[derive(Debug)]
pub struct Expired {
    releases: Vec<Digest>,
    newest_rollout: u64,
}

impl Expired {
    /// Looks for releases to forget. Reads every report of the fleet, so it is no work for the writer.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn find(connection: &Connection) -> rusqlite::Result<Self> {
        Ok(Self {
            releases: store::release::expired(connection, KEEP_ROLLOUTS, AT_ONCE)?,
            newest_rollout: store::rollout::next_id(connection)? - 1,
        })
    }

    /// Whether there is nothing to forget.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.releases.is_empty()
    }
}

/// Forgets releases, and has the broker forget them, unless a rollout that was opened meanwhile needs them; how
/// many went.
///
/// # Errors
///
/// When the store fails.
pub fn forget(change: &mut Change<'_>, expired: &Expired) -> Result<usize, ControlError> {
    let mut gone = 0;
    for digest in &expired.releases {
        if store::release::delete(change.connection, digest, expired.newest_rollout)? {
            store::desired::enqueue_clear(change.connection, &topic::release(digest))?;
            change.effects.publish = true;
            gone += 1;
        }
    }
    Ok(gone)
}
