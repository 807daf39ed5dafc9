//! Which release a device is given first, where a release can only be reached from some others (`requiresFrom`).
//!
//! The releases of an app and what they can be reached from are a graph, as Cincinnati's is
//! (openshift/cincinnati, "design/cincinnati.md"). A device takes the shortest way through it. What can be reached is a
//! matter of the rollout and not of the release itself, so it can be said of a release later on, and going back asks for
//! nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foreshore_protocol::Digest;
use serde::{Deserialize, Serialize};

use super::state::{Assignment, Facts, Placement, Rollout};

/// What the releases on the way to a rollout's own can be reached from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Requirements(BTreeMap<Digest, Vec<Digest>>);

impl Requirements {
    /// Releases that may have to be reached from others; see [`Requirements::are_too_many`].
    pub const MAX_RELEASES: usize = 256;

    /// Collects what `requires` says of `to` and of all that it leads to, until there are too many; a release that it
    /// says nothing of can be reached from any.
    ///
    /// # Errors
    ///
    /// The first error of `requires`.
    pub fn collect<E>(
        to: Digest,
        mut requires: impl FnMut(&Digest) -> Result<Vec<Digest>, E>,
    ) -> Result<Self, E> {
        let mut found = BTreeMap::new();
        let mut open = VecDeque::from([to]);
        while let Some(release) = open.pop_front() {
            if found.len() > Self::MAX_RELEASES {
                break;
            }
            if found.contains_key(&release) {
                continue;
            }
            let from = requires(&release)?;
            if !from.is_empty() {
                open.extend(&from);
                found.insert(release, from);
            }
        }
        Ok(Self(found))
    }

    /// Whether not all were collected, as there are more than [`Requirements::MAX_RELEASES`]: ways may be wrong then.
    #[must_use]
    pub fn are_too_many(&self) -> bool {
        self.0.len() > Self::MAX_RELEASES
    }

    /// Whether any release can be reached from any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a device that has `from` may be given `release`.
    #[must_use]
    pub fn allow(&self, from: &Digest, release: &Digest) -> bool {
        from == release
            || self
                .0
                .get(release)
                .is_none_or(|required| required.contains(from))
    }

    /// What a device that has `from` is given on its way to `to`: the first release of a shortest way, and of these the
    /// one that is named first. `None`: there is no way.
    #[must_use]
    pub fn next(&self, from: &Digest, to: &Digest) -> Option<Digest> {
        // Backwards from the end, so that what is found first is nearest to it.
        let mut seen = BTreeSet::from([*to]);
        let mut open = VecDeque::from([*to]);
        while let Some(release) = open.pop_front() {
            if self.allow(from, &release) {
                return Some(release);
            }
            let before = self.0.get(&release).into_iter().flatten();
            open.extend(before.filter(|before| seen.insert(**before)));
        }
        None
    }

    /// Whether every device finds a way to `to`, whatever it has.
    #[must_use]
    pub fn lead_anyone_to(&self, to: &Digest) -> bool {
        let mut seen = BTreeSet::from([*to]);
        let mut open = VecDeque::from([*to]);
        while let Some(release) = open.pop_front() {
            let Some(before) = self.0.get(&release) else {
                return true;
            };
            open.extend(before.iter().filter(|before| seen.insert(**before)));
        }
        false
    }

    /// The releases that devices may be given on their way, and those that they may come from.
    pub fn releases(&self) -> impl Iterator<Item = Digest> {
        let named: BTreeSet<Digest> = self.0.values().flatten().copied().collect();
        named.into_iter()
    }
}

impl Rollout {
    /// What a device of this assignment is given next: the rollout's release, or one on its way there.
    ///
    /// Where there is no way, which applying refuses, it is the rollout's own.
    #[must_use]
    pub fn next_placement(&self, assignment: &Assignment, facts: Option<&Facts>) -> Placement {
        let requirements = &self.policy.requirements;
        if requirements.is_empty() {
            return self.placement();
        }
        let release = has(assignment, facts)
            .and_then(|from| requirements.next(&from, &self.to))
            .unwrap_or(self.to);
        Placement {
            release,
            ..self.placement()
        }
    }

    /// What a device of this assignment was offered last, or would be first if it had all that it takes.
    #[must_use]
    pub fn offered(&self, assignment: &Assignment) -> Placement {
        Placement {
            release: assignment.via.unwrap_or(self.to),
            ..self.placement()
        }
    }
}

/// The release that a device has, as far as the hub knows: once it has taken a step, that. Else what it says was well
/// there last; what it was given before if it has said nothing.
#[must_use]
pub fn has(assignment: &Assignment, facts: Option<&Facts>) -> Option<Digest> {
    let previous = assignment.previous.map(|previous| previous.release);
    let report = facts.and_then(|facts| facts.report.as_ref());
    match report {
        Some(report) if !assignment.stepped => report.has.or(previous),
        Some(_) | None => previous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(name: char) -> Digest {
        Digest::of(name.to_string().as_bytes())
    }

    /// `"db"`: d can be reached from b only; `"ecd"`: e from c and d, in this order.
    fn requirements(to: char, edges: &[&str]) -> Requirements {
        let edges: BTreeMap<Digest, Vec<Digest>> = edges
            .iter()
            .map(|edge| {
                let mut names = edge.chars().map(release);
                (names.next().unwrap(), names.collect())
            })
            .collect();
        let requires = |release: &Digest| {
            Ok::<_, std::convert::Infallible>(edges.get(release).cloned().unwrap_or_default())
        };
        let Ok(found) = Requirements::collect(release(to), requires);
        found
    }

    fn way(requirements: &Requirements, from: char, to: char) -> Option<String> {
        let mut way = String::from(from);
        let mut at = release(from);
        while at != release(to) {
            at = requirements.next(&at, &release(to))?;
            way.push(('a'..='z').find(|name| release(*name) == at).unwrap());
            assert!(way.len() < 27, "a way without an end: {way}");
        }
        Some(way)
    }

    #[test]
    fn without_requirements_everyone_goes_straight() {
        let none = requirements('d', &[]);
        assert!(none.is_empty());
        assert_eq!(way(&none, 'a', 'd').as_deref(), Some("ad"));
    }

    #[test]
    fn a_device_takes_the_shortest_way_and_of_these_the_first_named() {
        let some = requirements('e', &["dc", "ebd"]);
        assert_eq!(way(&some, 'a', 'e').as_deref(), Some("abe"));
        assert_eq!(way(&some, 'b', 'e').as_deref(), Some("be"));
        assert_eq!(way(&some, 'c', 'e').as_deref(), Some("cbe"));
        assert_eq!(way(&some, 'd', 'e').as_deref(), Some("de"));
        let chain = requirements('d', &["dc", "cb"]);
        assert_eq!(way(&chain, 'a', 'd').as_deref(), Some("abcd"));
        assert_eq!(way(&chain, 'z', 'd').as_deref(), Some("zbcd"));
        assert_eq!(way(&chain, 'd', 'd').as_deref(), Some("d"));
    }

    #[test]
    fn a_circle_has_no_way_in_but_ends_the_search() {
        let circle = requirements('c', &["cb", "bc"]);
        assert!(!circle.lead_anyone_to(&release('c')));
        assert_eq!(way(&circle, 'a', 'c'), None);
        assert_eq!(way(&circle, 'b', 'c').as_deref(), Some("bc"));
        let open = requirements('c', &["cba", "bc"]);
        assert!(open.lead_anyone_to(&release('c')));
        assert_eq!(way(&open, 'z', 'c').as_deref(), Some("zac"));
    }

    #[test]
    fn a_chain_without_end_is_told_from_one_with_256_links() {
        let number = |number: u64| Digest::of(&number.to_be_bytes());
        let chain = |length: u64| {
            let all: BTreeMap<Digest, Digest> =
                (0..length).map(|n| (number(n), number(n + 1))).collect();
            let requires = |release: &Digest| {
                Ok::<_, std::convert::Infallible>(all.get(release).copied().into_iter().collect())
            };
            let Ok(found) = Requirements::collect(number(0), requires);
            found
        };
        let whole = chain(256);
        assert!(!whole.are_too_many());
        assert_eq!(whole.next(&number(999), &number(0)), Some(number(256)));
        assert!(chain(257).are_too_many() && chain(100_000).are_too_many());
    }

    #[test]
    fn the_releases_on_the_way_are_named_once() {
        let some = requirements('e', &["dc", "ecd"]);
        let expected = BTreeSet::from([release('c'), release('d')]);
        assert_eq!(some.releases().collect::<BTreeSet<_>>(), expected);
    }
}
