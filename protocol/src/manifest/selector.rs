//! [`Selector`]: which devices, by their labels, as Kubernetes' label selectors are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{LabelKey, LabelValue, Labels};

/// Which devices: those whose labels fulfil every requirement (Kubernetes `LabelSelector`). Without any, every device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// All of these labels must be on the device with these values.
    #[serde(default)]
    pub match_labels: BTreeMap<LabelKey, LabelValue>,
    /// All of these must hold too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Expression>,
}

/// One requirement of a [`Selector`] (Kubernetes `LabelSelectorRequirement`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expression {
    /// The label that it is about.
    pub key: LabelKey,
    /// What must hold of it.
    pub operator: Operator,
    /// For `In` and `NotIn`, at least one; for the others none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub values: BTreeSet<LabelValue>,
}

/// What an [`Expression`] asks of a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Operator {
    /// The device has it, with one of the values.
    In,
    /// The device does not have it, or with another value.
    NotIn,
    /// The device has it.
    Exists,
    /// The device does not have it.
    DoesNotExist,
}

impl Operator {
    /// Whether it compares with values.
    #[must_use]
    pub const fn takes_values(self) -> bool {
        matches!(self, Self::In | Self::NotIn)
    }
}

impl Selector {
    /// Whether a device with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let equal = |(key, value)| labels.get(key) == Some(value);
        self.match_labels.iter().all(equal)
            && self
                .match_expressions
                .iter()
                .all(|expression| expression.matches(labels))
    }

    /// How many requirements it has.
    #[must_use]
    pub fn requirements(&self) -> usize {
        self.match_labels.len() + self.match_expressions.len()
    }
}

impl Expression {
    /// Whether a device with these labels fulfils it.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// As `kubectl` takes it after `-l`: `role=gateway,site in (north, south),!old`.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (key, value) in &self.match_labels {
            write!(f, "{comma}{key}={value}")?;
            comma = ",";
        }
        for expression in &self.match_expressions {
            write!(f, "{comma}{expression}")?;
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = match self.operator {
            Operator::In => "in",
            Operator::NotIn => "notin",
            Operator::Exists => return write!(f, "{}", self.key),
            Operator::DoesNotExist => return write!(f, "!{}", self.key),
        };
        write!(f, "{} {operator} (", self.key)?;
        for (index, value) in self.values.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{value}")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| (key.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn expression(key: &str, operator: Operator, values: &[&str]) -> Expression {
        Expression {
            key: key.parse().unwrap(),
            operator,
            values: values.iter().map(|value| value.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn operators_mean_what_they_mean_in_kubernetes() {
        let (north, bare) = (labels(&[("site", "north")]), labels(&[]));
        for (operator, values, on_north, on_bare) in [
            (Operator::In, &["north", "south"][..], true, false),
            (Operator::In, &["south"], false, false),
            (Operator::NotIn, &["north"], false, true),
            (Operator::NotIn, &["south"], true, true),
            (Operator::Exists, &[], true, false),
            (Operator::DoesNotExist, &[], false, true),
        ] {
            let expression = expression("site", operator, values);
            assert_eq!(expression.matches(&north), on_north, "{expression:?}");
            assert_eq!(expression.matches(&bare), on_bare, "{expression:?}");
        }
    }

    #[test]
    fn every_requirement_must_hold() {
        let selector = Selector {
            match_labels: labels(&[("role", "gateway")]),
            match_expressions: vec![
                expression("site", Operator::Exists, &[]),
                expression("model", Operator::NotIn, &["old"]),
            ],
        };
        assert!(selector.matches(&labels(&[("role", "gateway"), ("site", "north")])));
        assert!(!selector.matches(&labels(&[("role", "gateway")])));
        let old = [("role", "gateway"), ("site", "north"), ("model", "old")];
        assert!(!selector.matches(&labels(&old)));
        assert!(Selector::default().matches(&labels(&[])));
        assert_eq!(selector.to_string(), "role=gateway,site,model notin (old)");
    }
}
