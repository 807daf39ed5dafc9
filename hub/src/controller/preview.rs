//! A preview of a release: which images must be looked at, and what comes of them over all devices.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::Digest;
use foreshore_protocol::api::Preview;
use rusqlite::Connection;

use super::apps::Resolved;
use super::{ControlError, secrets};
use crate::images::look::{Asked, questions};
use crate::preview::{Known, Wants, platform};
use crate::store;

/// Platforms that images are looked at for; a device of another has nothing known of it.
const PLATFORMS_MAX: usize = 8;

/// Releases of devices whose images are looked at; what others have counts as not there.
const RELEASES_MAX: usize = 64;

/// What is to be found out before a preview can be made.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// The images to look at.
    pub asked: Vec<Asked>,
    wants: Wants,
    unset: Vec<String>,
    releases: BTreeMap<Digest, BTreeSet<String>>,
}

/// Looks over the devices once: what they are, and which releases they have.
///
/// # Errors
///
/// When the store fails.
pub fn ahead(connection: &Connection, resolved: &Resolved) -> Result<Ahead, ControlError> {
    let (mut platforms, mut named) = (BTreeSet::new(), BTreeMap::<Digest, u64>::new());
    let spec = &resolved.app.spec;
    let name = &resolved.app.metadata.name;
    store::preview::each(
        connection,
        name,
        &resolved.digest,
        &spec.selector,
        |device| {
            if let Some(platform) = platform(device.inventory.as_ref())
                && (platforms.len() < PLATFORMS_MAX || platforms.contains(&platform))
            {
                platforms.insert(platform);
            }
            for release in device.on_disk {
                // Releases that nobody wrote are not to fill the memory.
                if named.len() < 16 * RELEASES_MAX || named.contains_key(&release) {
                    *named.entry(release).or_default() += 1;
                }
            }
        },
    )?;
    let mut often: Vec<(u64, Digest)> = named.into_iter().map(|(of, times)| (times, of)).collect();
    often.sort_unstable_by(|one, other| other.cmp(one));
    let mut releases = BTreeMap::new();
    for (_, digest) in often.into_iter().take(RELEASES_MAX) {
        if let Some(release) = store::preview::release(connection, &digest)? {
            let services = release.services.into_values();
            releases.insert(digest, services.map(|service| service.image).collect());
        }
    }
    let budgets = !store::disruption_budget::list(connection)?.is_empty();
    let wants = Wants::of(&resolved.release, budgets);
    let old: BTreeSet<&String> = releases.values().flatten().collect();
    let asked = questions(&platforms, &wants.images, old);
    let unset = secrets::unset(connection, &resolved.release)?;
    Ok(Ahead {
        asked,
        wants,
        unset: unset.iter().map(ToString::to_string).collect(),
        releases,
    })
}

/// Looks over them again with what was found out. Devices that came in between count as they are now.
///
/// # Errors
///
/// When the store fails.
pub fn preview(
    connection: &Connection,
    resolved: &Resolved,
    ahead: Ahead,
    images: BTreeMap<Asked, crate::preview::Image>,
) -> Result<Preview, ControlError> {
    let known = Known {
        images,
        releases: ahead.releases,
    };
    Ok(store::preview::preview(
        connection,
        &resolved.app.metadata.name,
        &resolved.digest,
        &resolved.app.spec.selector,
        (&ahead.wants, &known, &ahead.unset),
    )?)
}
