//! The DisruptionBudget manifest: how many devices of a group may be switching at once, over all apps.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::check::{Checked, ensure, is_kind, selector};
use super::{Amount, ApiVersion, Kind, Selector};
use crate::id::{BudgetName, LabelKey, LabelValue, Labels};
use crate::message::MAX_GROUP_LABELS;

/// A DisruptionBudget: *which devices* (selector), *in which groups* (`groupBy`), *how many of each group at once*
/// (`maxUnavailable`). It holds for every app of these devices, and for all rollouts together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DisruptionBudget {
    /// Always `foreshore/v1`.
    pub api_version: ApiVersion,
    /// Always `DisruptionBudget`.
    pub kind: Kind,
    /// The budget's name.
    pub metadata: BudgetMetadata,
    /// Everything else.
    pub spec: BudgetSpec,
}

/// The envelope's `metadata`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BudgetMetadata {
    /// Unique among the hub's budgets.
    pub name: BudgetName,
}

/// The envelope's `spec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BudgetSpec {
    /// Which devices. Missing or empty: every device.
    #[serde(default)]
    pub selector: Selector,
    /// The labels that make a group: devices with the same values share the budget. A device that lacks one of them is in
    /// the group with the empty value for it. Missing or empty: all selected devices are one group. At most 8.
    #[serde(default)]
    pub group_by: Vec<LabelKey>,
    /// How many devices of a group may be unavailable at once: a count from 1, or `"20%"` of the group, rounded up.
    pub max_unavailable: Amount,
    /// Whether a device that is not connected counts as unavailable. Default: false, as an edge device goes on working
    /// without its hub.
    #[serde(default)]
    pub offline_counts: bool,
}

impl DisruptionBudget {
    /// What the types cannot say.
    pub(super) fn check(&self) -> Checked {
        is_kind(self.kind, Kind::DisruptionBudget)?;
        let spec = &self.spec;
        selector("spec.selector", &spec.selector)?;
        ensure(
            spec.group_by.len() <= MAX_GROUP_LABELS,
            "spec.groupBy",
            || format!("at most {MAX_GROUP_LABELS} labels are allowed"),
        )?;
        let mut seen = BTreeSet::new();
        for (index, key) in spec.group_by.iter().enumerate() {
            ensure(
                seen.insert(key),
                format_args!("spec.groupBy[{index}]"),
                || format!("label {key} is named twice; keep one"),
            )?;
        }
        Ok(())
    }

    /// The labels of the group that a device with these labels is in; `None`: the budget does not hold for it.
    #[must_use]
    pub fn group_of(&self, labels: &Labels) -> Option<Labels> {
        let empty = || -> LabelValue { "".parse().expect("a label's value may be empty") };
        self.spec.selector.matches(labels).then(|| {
            let group = self.spec.group_by.iter();
            group
                .map(|key| {
                    let value = labels.get(key).cloned().unwrap_or_else(empty);
                    (key.clone(), value)
                })
                .collect()
        })
    }
}
