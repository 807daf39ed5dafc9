//! Which containers run from which layers, from outside of the agent.

use std::path::Path;

use foreshore_images::store::Holders;

use super::{names, read_json};
use crate::runtime::request::{RECORD, REQUEST, Record, Request};

/// For each layer's directory the containers that have it, or may be about to; reads only. One that has ended is not
/// among them. What began after this was called finds the layers as they are now.
#[must_use]
pub fn holders(run_dir: &Path) -> Holders {
    let containers = run_dir.join("containers");
    let mut holders = Holders::new();
    for name in names(&containers) {
        let dir = containers.join(&name);
        let Ok(request) = read_json::<Request>(&dir.join(REQUEST)) else {
            continue;
        };
        let ended = read_json::<Record>(&dir.join(RECORD))
            .ok()
            .and_then(|record| record.container)
            .is_some_and(|container| matches!(container.runs(), Ok(false)));
        if ended {
            continue;
        }
        for layer in request.layers {
            holders
                .entry(layer)
                .or_default()
                .push(request.id.to_string());
        }
    }
    holders
}
