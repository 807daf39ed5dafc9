//! `lease`: whose turn it is to switch under disruption budgets, and writing devices off.

use std::io::Write;

use foreshore_protocol::api::{LeaseState, LeaseView, List};

use super::get;
use crate::arguments::{Format, Lease};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output::{self, Table, age, word};

pub(super) fn run(hub: &Hub, verb: &Lease, format: Format, out: &mut dyn Write) -> Outcome {
    match verb {
        Lease::List => {
            let list: List<LeaseView> = hub.get("/leases")?;
            if format == Format::Json {
                output::json(out, &list)?;
            } else {
                get::print(&list.items, format, output::now_ms(), out)?;
            }
        }
        Lease::Release { device } => {
            hub.order("DELETE", &format!("/leases/{device}"))?;
            match format {
                Format::Json => output::json(out, &serde_json::json!({ "released": device }))?,
                Format::Name => writeln!(out, "device/{device}")?,
                Format::Table => {
                    writeln!(out, "device/{device} written off; others get its place")?
                }
            }
        }
    }
    Ok(code::OK)
}

impl get::Listed for LeaseView {
    const HEADINGS: &'static [&'static str] = &[
        "DEVICE", "APP", "STATE", "RELEASE", "ASKED", "GRANTED", "BUDGETS",
    ];

    fn name(&self) -> String {
        format!("lease/{}/{}", self.device, self.app)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        let budgets: Vec<String> = self
            .budgets
            .iter()
            .map(|budget| {
                let group = super::describe::labels(&budget.group);
                format!("{}({})", budget.budget, group.replace(' ', ","))
            })
            .collect();
        table.row([
            self.device.to_string(),
            self.app.to_string(),
            match self.state {
                // Nobody but an operator can know what became of it.
                LeaseState::Overdue => "overdue: keeps its place".to_owned(),
                state => word(&state),
            },
            self.release.short(),
            age(now_ms, self.requested_ms),
            self.granted_ms
                .map_or_else(String::new, |granted| age(now_ms, granted)),
            budgets.join(" "),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::Digest;
    use foreshore_protocol::message::BudgetGroup;

    use super::*;
    use crate::live::samples::NOW_MS;

    #[test]
    fn turns_in_a_table() {
        let lease = |device: &str, state, granted_ms| LeaseView {
            device: device.parse().unwrap(),
            app: "gateway".parse().unwrap(),
            release: Digest::of(b"v2"),
            state,
            budgets: vec![BudgetGroup {
                budget: "lines".parse().unwrap(),
                group: [
                    ("line".parse().unwrap(), "2".parse().unwrap()),
                    ("site".parse().unwrap(), "hull".parse().unwrap()),
                ]
                .into(),
            }],
            requested_ms: NOW_MS - 95_000,
            granted_ms,
            expires_ms: granted_ms.map(|granted| granted + 1),
        };
        let leases = [
            lease("gw-1", LeaseState::Overdue, Some(NOW_MS - 60_000)),
            lease("gw-2", LeaseState::Granted, Some(NOW_MS - 30_000)),
            lease("gw-3", LeaseState::Waiting, None),
        ];
        let mut out = Vec::new();
        get::print(&leases, Format::Table, NOW_MS, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }
}
