//! Disruption budgets as `get` and `describe` show them.

use std::io::{self, Write};

use foreshore_protocol::api::BudgetView;
use foreshore_protocol::id::BudgetName;
use foreshore_protocol::manifest::Amount;

use super::describe::{labels, line, when};
use super::get;
use crate::client::Hub;
use crate::failure::Failure;
use crate::output::{Table, age};

/// How many devices of a group are named; `-o json` has them all.
const NAMED: usize = 8;

/// The budget of that name, with its groups.
pub(super) fn find(hub: &Hub, name: &str) -> Result<BudgetView, Failure> {
    let name: BudgetName = name.parse().map_err(Failure::input)?;
    hub.get(&format!("/disruption-budgets/{name}"))
}

fn max(amount: Amount) -> String {
    match amount {
        Amount::Count(count) => count.to_string(),
        Amount::Percent(percent) => format!("{percent}%"),
    }
}

fn group_by(view: &BudgetView) -> String {
    let keys: Vec<&str> = view
        .manifest
        .spec
        .group_by
        .iter()
        .map(AsRef::as_ref)
        .collect();
    keys.join(",")
}

impl get::Listed for BudgetView {
    const HEADINGS: &'static [&'static str] = &[
        "NAME",
        "GROUP BY",
        "MAX UNAVAILABLE",
        "DEVICES",
        "UNAVAILABLE",
        "WAITING",
        "UPDATED",
    ];

    fn name(&self) -> String {
        format!("budget/{}", self.name)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        table.row([
            self.name.to_string(),
            group_by(self),
            max(self.manifest.spec.max_unavailable),
            self.devices.to_string(),
            self.unavailable.to_string(),
            self.waiting.to_string(),
            age(now_ms, self.updated_ms),
        ]);
    }
}

/// Everything about one.
pub(super) fn describe(view: &BudgetView, now_ms: u64, out: &mut dyn Write) -> io::Result<()> {
    let spec = &view.manifest.spec;
    let selector = labels(&spec.selector.match_labels);
    let every = "every device";
    line(out, "Budget", view.name.as_ref())?;
    line(
        out,
        "Selects",
        if selector.is_empty() {
            every
        } else {
            &selector
        },
    )?;
    line(out, "Groups by", &group_by(view))?;
    line(out, "At most", &max(spec.max_unavailable))?;
    let offline = if spec.offline_counts {
        "unavailable"
    } else {
        "available"
    };
    line(out, "Offline counts", &format!("as {offline}"))?;
    line(out, "Created", &when(now_ms, view.created_ms))?;
    line(out, "Updated", &when(now_ms, view.updated_ms))?;
    writeln!(out)?;
    let mut table = Table::new(&["GROUP", "DEVICES", "MAX", "WAITING", "UNAVAILABLE"]);
    for group in &view.groups {
        let mut names: Vec<&str> = group
            .unavailable
            .iter()
            .take(NAMED)
            .map(AsRef::as_ref)
            .collect();
        let more = format!("and {} more", group.unavailable.len().saturating_sub(NAMED));
        if group.unavailable.len() > NAMED {
            names.push(&more);
        }
        let pairs = labels(&group.group);
        table.row([
            if pairs.is_empty() {
                "all".to_owned()
            } else {
                pairs
            },
            group.devices.to_string(),
            group.max_unavailable.to_string(),
            group.waiting.to_string(),
            names.join(" "),
        ]);
    }
    table.print(out)
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::api::GroupView;
    use foreshore_protocol::manifest;

    use super::*;
    use crate::arguments::Format;
    use crate::live::samples::NOW_MS;

    fn sample() -> BudgetView {
        let text = "apiVersion: foreshore/v1\nkind: DisruptionBudget\nmetadata: {name: lines}\nspec:\n  \
                    selector: {matchLabels: {role: gateway}}\n  groupBy: [site]\n  maxUnavailable: 1\n";
        let group = |site: &str, unavailable: usize, waiting| GroupView {
            group: [("site".parse().unwrap(), site.parse().unwrap())].into(),
            devices: 12,
            max_unavailable: 1,
            unavailable: (0..unavailable)
                .map(|number| format!("gw-{number}").parse().unwrap())
                .collect(),
            waiting,
        };
        BudgetView {
            name: "lines".parse().unwrap(),
            manifest: manifest::parse_budget(text.as_bytes()).unwrap(),
            devices: 24,
            unavailable: 10,
            waiting: 3,
            created_ms: NOW_MS - 86_400_000,
            updated_ms: NOW_MS - 60_000,
            groups: vec![group("hull", 1, 3), group("", 9, 0)],
        }
    }

    #[test]
    fn a_budget_in_a_list_and_described() {
        let mut out = Vec::new();
        get::print(&[sample()], Format::Table, NOW_MS, &mut out).unwrap();
        describe(&sample(), NOW_MS, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }
}
