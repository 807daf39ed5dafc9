//! `label`: sets and removes labels of a device.

use std::collections::BTreeMap;
use std::io::Write;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{DeviceView, LabelPatch};
use foreshore_protocol::id::{LabelKey, LabelValue};

use super::describe::labels;
use crate::arguments::Format;
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output;

pub(super) fn run(
    hub: &Hub,
    device: &DeviceId,
    changes: &[String],
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    let patch = serde_json::to_vec(&parse(changes)?)?;
    let view: DeviceView = hub.call(
        "PATCH",
        &format!("/devices/{device}/labels"),
        "application/json",
        &patch,
    )?;
    match format {
        Format::Table => writeln!(out, "device/{device} labels: {}", labels(&view.labels))?,
        Format::Name => writeln!(out, "device/{device}")?,
        Format::Json => output::json(out, &view)?,
    }
    Ok(code::OK)
}

fn parse(changes: &[String]) -> Result<LabelPatch, Failure> {
    let mut labels: BTreeMap<LabelKey, Option<LabelValue>> = BTreeMap::new();
    for change in changes {
        let (key, value) = match (change.split_once('='), change.strip_suffix('-')) {
            (Some((key, value)), _) => (key, Some(value.parse().map_err(Failure::input)?)),
            (None, Some(key)) => (key, None),
            (None, None) => {
                return Err(
                    Failure::input(format_args!("{change:?} is not a label change"))
                        .hint("write KEY=VALUE to set, KEY- to remove"),
                );
            }
        };
        let key: LabelKey = key.parse().map_err(Failure::input)?;
        if labels.insert(key.clone(), value).is_some() {
            return Err(Failure::input(format_args!("label {key} is changed twice")));
        }
    }
    Ok(LabelPatch { labels })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(changes: &[&str]) -> Result<String, String> {
        let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        parse(&changes)
            .map(|patch| serde_json::to_string(&patch).unwrap())
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn set_and_remove() {
        assert_eq!(
            patch(&["role=gateway", "site-", "empty="]).unwrap(),
            r#"{"labels":{"empty":"","role":"gateway","site":null}}"#
        );
    }

    #[test]
    fn what_is_neither_is_refused() {
        for changes in [
            ["role"].as_slice(),
            &["=x"],
            &["-"],
            &["a=1", "a-"],
            &["a b=1"],
        ] {
            assert!(patch(changes).is_err(), "{changes:?}");
        }
    }
}
