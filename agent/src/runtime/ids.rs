//! Which ids an app's containers have outside: `ids.json` below the state directory.
//!
//! Ranges lie where systemd's table of ids (`docs/UIDS-GIDS.md`) has nothing: above the ranges of containers,
//! below what is reserved. An app keeps its range for good, so that files of it found anywhere tell whose they are. A range is
//! given to another app only when none is left, and only if its app has neither volumes nor containers.
//!
//! Nothing on disk depends on the numbers (mounts map them), so a lost file costs nothing but the names; ranges of
//! containers that run are found again in their requests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::AppName;

use super::request::read_json;
use super::userns::IDS;

/// The first id of the first range.
const FIRST: u32 = 0x7000_0000;
/// How many ranges there are, up to systemd's "foreign" range.
const RANGES: u32 = (0x7ffe_0000 - FIRST) / IDS;

/// What apps have which range.
#[derive(Debug)]
pub(super) struct Ids {
    dir: PathBuf,
    given: BTreeMap<AppName, u32>,
}

impl Ids {
    /// Reads what is in `dir`, and adds what running containers have (`used`), which counts more.
    pub(super) fn load(dir: &Path, used: BTreeMap<AppName, u32>) -> Self {
        let path = dir.join(NAME);
        let mut given: BTreeMap<AppName, u32> = match read_json(&path) {
            Ok(given) => given,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "id ranges could not be read; apps that do not run get new ones");
                let _ = fs::rename(&path, path.with_extension("json.bad"));
                BTreeMap::new()
            }
        };
        let mut seen: BTreeSet<u32> = used.values().copied().collect();
        given.retain(|app, base| is_range(*base) && !used.contains_key(app) && seen.insert(*base));
        given.extend(used);
        Self {
            dir: dir.to_owned(),
            given,
        }
    }

    /// The range of an app, given to it now if it has none. `is_free` tells whether an app's range may be taken from
    /// it. `None` when all are in use.
    pub(super) fn range(
        &mut self,
        app: &AppName,
        is_free: impl Fn(&AppName) -> bool,
    ) -> Option<u32> {
        if let Some(base) = self.given.get(app) {
            return Some(*base);
        }
        let taken: BTreeSet<u32> = self.given.values().copied().collect();
        let unused = (0..RANGES)
            .map(|index| FIRST + index * IDS)
            .find(|base| !taken.contains(base));
        let base = unused.or_else(|| {
            let left = self.given.keys().find(|app| is_free(app))?.clone();
            self.given.remove(&left)
        })?;
        self.given.insert(app.clone(), base);
        // A full disk stops no app: its containers tell their range as long as they run.
        if let Err(error) = self.save() {
            tracing::warn!(%error, %app, "the id range could not be written down");
        }
        Some(base)
    }

    fn save(&self) -> io::Result<()> {
        let bytes = serde_json::to_vec(&self.given).map_err(io::Error::other)?;
        let temporary = self.dir.join(format!("{NAME}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(NAME))?;
        File::open(&self.dir)?.sync_all()
    }
}

const NAME: &str = "ids.json";

fn is_range(base: u32) -> bool {
    base >= FIRST && (base - FIRST).is_multiple_of(IDS) && (base - FIRST) / IDS < RANGES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(name: &str) -> AppName {
        name.parse().unwrap()
    }

    #[test]
    fn an_app_keeps_its_range_and_no_two_have_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = Ids::load(dir.path(), BTreeMap::new());
        let shop = ids.range(&app("shop"), |_| true).unwrap();
        let other = ids.range(&app("other"), |_| true).unwrap();
        assert_eq!((shop, other), (FIRST, FIRST + IDS));
        let mut again = Ids::load(dir.path(), BTreeMap::new());
        assert_eq!(again.range(&app("other"), |_| true), Some(other));
        assert_eq!(again.range(&app("third"), |_| true), Some(FIRST + 2 * IDS));
    }

    #[test]
    fn what_runs_counts_more_than_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        for damage in [
            "",
            "{",
            "[]",
            "{\"shop\":5,\"b\":1879048192,\"c\":1879048192}",
            "{\"no name!\":1}",
        ] {
            fs::write(dir.path().join(NAME), damage).unwrap();
            let used = BTreeMap::from([(app("runs"), FIRST + IDS)]);
            let mut ids = Ids::load(dir.path(), used);
            let names = ["runs", "shop", "b", "c", "d"];
            let bases: BTreeSet<u32> = names
                .iter()
                .map(|name| ids.range(&app(name), |_| true).unwrap())
                .collect();
            assert_eq!(bases.len(), names.len(), "{damage}");
            assert_eq!(ids.range(&app("runs"), |_| true), Some(FIRST + IDS));
            assert!(bases.iter().all(|base| is_range(*base)), "{damage}");
        }
    }

    #[test]
    fn ranges_are_taken_only_from_apps_that_left_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let used = (0..RANGES).map(|index| (app(&format!("a{index}")), FIRST + index * IDS));
        let mut ids = Ids::load(dir.path(), used.collect());
        assert_eq!(ids.range(&app("new"), |_| false), None);
        let base = ids.range(&app("new"), |candidate| *candidate == app("a77"));
        assert_eq!(base, Some(FIRST + 77 * IDS));
        assert_eq!(ids.range(&app("newer"), |_| false), None);
    }
}
