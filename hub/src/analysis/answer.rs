//! PURE: what the answer of somebody who was asked says. Whatever is not exactly an answer is inconclusive.

use std::fmt;

use foreshore_protocol::manifest::PassIf;
use foreshore_protocol::message::fit;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::rollout::analysis::Verdict;

/// Bytes of a message that is kept.
const MESSAGE_BYTES_MAX: usize = 300;

/// A verdict, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which.
    pub verdict: Verdict,
    /// For people; short and without control characters.
    pub message: String,
}

impl Answer {
    /// One that tells nothing.
    #[must_use]
    pub fn inconclusive(why: &str) -> Self {
        Self {
            verdict: Verdict::Inconclusive,
            message: plain(why),
        }
    }
}

/// A text of somebody else's for a message of ours.
#[must_use]
pub fn plain(text: &str) -> String {
    let shown: String = fit(text, MESSAGE_BYTES_MAX)
        .chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect();
    shown.trim().to_owned()
}

/// What Prometheus' HTTP API says to an instant query ("HTTP API", "Instant queries").
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct QueryAnswer {
    status: String,
    #[serde(default)]
    data: Option<Data>,
    #[serde(default)]
    error_type: Option<String>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    result: Found,
}

/// The number in a result, and of how many series; of more than one only the first is kept.
#[derive(Default)]
struct Found {
    value: Option<String>,
    series: usize,
}

/// The answer to a query: exactly one number is held against the condition.
#[must_use]
pub fn promql(bytes: &[u8], pass_if: &PassIf) -> Answer {
    let Ok(answer) = serde_json::from_slice::<QueryAnswer>(bytes) else {
        return Answer::inconclusive("the answer is not that of Prometheus' HTTP API");
    };
    let found = match answer.data {
        Some(data) if answer.status == "success" => data.result,
        Some(_) | None => {
            let said = [answer.error_type, answer.error];
            let said: Vec<String> = said.into_iter().flatten().collect();
            return Answer::inconclusive(&format!("the query failed: {}", said.join(": ")));
        }
    };
    match (found.series, found.value) {
        (0, _) => Answer::inconclusive("the query finds nothing"),
        (1, Some(text)) => number(&text, pass_if),
        (1, None) => Answer::inconclusive("the query gives no number; write an instant query"),
        (more, _) => Answer::inconclusive(&format!(
            "the query gives {more} series; aggregate them to one, for example with sum()"
        )),
    }
}

fn number(text: &str, pass_if: &PassIf) -> Answer {
    // Prometheus writes +Inf, -Inf and NaN; Rust reads them.
    let value = text.parse::<f64>().ok();
    match value.and_then(|value| pass_if.holds(value)) {
        None => Answer::inconclusive(&format!(
            "the query gives {}, which is no number",
            plain(text)
        )),
        Some(holds) => Answer {
            verdict: if holds { Verdict::Pass } else { Verdict::Fail },
            message: plain(&format!("{text}, to be {pass_if}")),
        },
    }
}

/// The answer of a webhook.
#[must_use]
pub fn webhook(bytes: &[u8]) -> Answer {
    #[derive(Deserialize)]
    struct Said {
        verdict: Verdict,
        #[serde(default)]
        message: Option<String>,
    }
    match serde_json::from_slice::<Said>(bytes) {
        Ok(said) => Answer {
            verdict: said.verdict,
            message: plain(said.message.as_deref().unwrap_or("it gave no reason")),
        },
        Err(_) => Answer::inconclusive(
            "the answer is not {\"verdict\": \"pass\", \"fail\" or \"inconclusive\", \"message\": …}",
        ),
    }
}

/// What an error answer says for people, if it is one of Prometheus' or a problem (RFC 9457).
#[must_use]
pub fn error_of(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Said {
        #[serde(default)]
        error: Option<String>,
        #[serde(default)]
        message: Option<String>,
        #[serde(default)]
        detail: Option<String>,
    }
    let said: Said = serde_json::from_slice(bytes).ok()?;
    said.error
        .or(said.detail)
        .or(said.message)
        .map(|text| plain(&text))
        .filter(|text| !text.is_empty())
}

/// A scalar is `[TIME, "NUMBER"]`, a vector a list of `{"metric": …, "value": [TIME, "NUMBER"]}`. Read as it comes, so that
/// a large answer takes no more memory than a small one.
impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Outcome;

        impl<'de> Visitor<'de> for Outcome {
            type Value = Found;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a scalar or a vector")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Found, A::Error> {
                let mut found = Found::default();
                while let Some(part) = seq.next_element::<Part>()? {
                    match part {
                        Part::Time => {}
                        Part::Text(text) => {
                            found.series = 1;
                            found.value = Some(text);
                        }
                        Part::Series(value) => {
                            found.series += 1;
                            if found.series == 1 {
                                found.value = value;
                            }
                        }
                    }
                }
                Ok(found)
            }
        }

        deserializer.deserialize_seq(Outcome)
    }
}

enum Part {
    Time,
    Text(String),
    Series(Option<String>),
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Element;

        impl<'de> Visitor<'de> for Element {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time, a number in quotes, or a series")
            }

            fn visit_f64<E>(self, _: f64) -> Result<Part, E> {
                Ok(Part::Time)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Part, E> {
                Ok(Part::Time)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Part, E> {
                Ok(Part::Time)
            }

            fn visit_str<E>(self, text: &str) -> Result<Part, E> {
                Ok(Part::Text(fit(text, MESSAGE_BYTES_MAX).to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
                let mut value = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key == "value" {
                        let (_, text): (IgnoredAny, String) = map.next_value()?;
                        value = Some(text);
                    } else {
                        let _: IgnoredAny = map.next_value()?;
                    }
                }
                Ok(Part::Series(value))
            }
        }

        deserializer.deserialize_any(Element)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(body: &str) -> (Verdict, String) {
        let answer = promql(body.as_bytes(), &"< 0.5".parse().unwrap());
        (answer.verdict, answer.message)
    }

    fn vector(values: &[&str]) -> String {
        let series = values.iter().map(|value| {
            format!("{{\"metric\":{{\"job\":\"x\"}},\"value\":[1700000000.1,\"{value}\"]}}")
        });
        let series: Vec<String> = series.collect();
        format!(
            "{{\"status\":\"success\",\"data\":{{\"resultType\":\"vector\",\"result\":[{}]}}}}",
            series.join(",")
        )
    }

    #[test]
    fn one_number_is_a_verdict_and_everything_else_is_none() {
        let scalar = "{\"status\":\"success\",\"data\":{\"resultType\":\"scalar\",\"result\":[1.5,\"0.4\"]}}";
        let matrix = "{\"status\":\"success\",\"data\":{\"resultType\":\"matrix\",\"result\":[{\"metric\":{},\"values\":[[1,\"0\"]]}]}}";
        for (body, verdict) in [
            (vector(&["0.4"]), Verdict::Pass),
            (scalar.to_owned(), Verdict::Pass),
            (vector(&["0.5"]), Verdict::Fail),
            (vector(&["+Inf"]), Verdict::Fail),
            (vector(&["NaN"]), Verdict::Inconclusive),
            (vector(&["x"]), Verdict::Inconclusive),
            (vector(&[]), Verdict::Inconclusive),
            (vector(&["0.1", "0.1"]), Verdict::Inconclusive),
            (matrix.to_owned(), Verdict::Inconclusive),
            (
                "{\"status\":\"error\",\"errorType\":\"bad_data\",\"error\":\"parse\\u001b[2Jerror\"}".to_owned(),
                Verdict::Inconclusive,
            ),
            ("{\"status\":\"success\"}".to_owned(), Verdict::Inconclusive),
            ("<html>".to_owned(), Verdict::Inconclusive),
            (String::new(), Verdict::Inconclusive),
            ("[".repeat(100_000), Verdict::Inconclusive),
        ] {
            let (found, message) = ask(&body);
            let start: String = body.chars().take(200).collect();
            assert_eq!(found, verdict, "{start}: {message}");
            assert!(!message.is_empty() && !message.chars().any(char::is_control));
        }
        assert!(ask(&vector(&["1", "2", "3"])).1.contains("3 series"));
    }

    #[test]
    fn a_webhook_says_one_of_three_words() {
        for (body, verdict) in [
            ("{\"verdict\":\"pass\"}", Verdict::Pass),
            (
                "{\"verdict\":\"fail\",\"message\":\"p99\",\"more\":[1]}",
                Verdict::Fail,
            ),
            (
                "{\"verdict\":\"inconclusive\",\"message\":null}",
                Verdict::Inconclusive,
            ),
            ("{\"verdict\":\"PASS\"}", Verdict::Inconclusive),
            ("{\"verdict\":true}", Verdict::Inconclusive),
            ("{\"verdict\":\"pass\"} trailing", Verdict::Inconclusive),
            (
                "{\"verdict\":\"pass\",\"verdict\":\"fail\"}",
                Verdict::Inconclusive,
            ),
            ("pass", Verdict::Inconclusive),
            ("", Verdict::Inconclusive),
        ] {
            assert_eq!(webhook(body.as_bytes()).verdict, verdict, "{body}");
        }
        let long = format!(
            "{{\"verdict\":\"fail\",\"message\":\"{}\"}}",
            "é".repeat(9999)
        );
        assert!(webhook(long.as_bytes()).message.len() <= MESSAGE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_of_some_kind(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let pass_if = "< 1".parse().unwrap();
            prop_assert_eq!(promql(&bytes, &pass_if).verdict, Verdict::Inconclusive);
            prop_assert_eq!(webhook(&bytes).verdict, Verdict::Inconclusive);
            _ = error_of(&bytes);
        }

        #[test]
        fn a_number_is_judged_as_it_is_written(value in any::<f64>(), limit in -1e6..1e6_f64) {
            let pass_if = format!("<= {limit}").parse().unwrap();
            let expected = if value.is_nan() {
                Verdict::Inconclusive
            } else if value <= limit {
                Verdict::Pass
            } else {
                Verdict::Fail
            };
            let body = vector(&[&value.to_string()]);
            prop_assert_eq!(promql(body.as_bytes(), &pass_if).verdict, expected);
        }
    }
}
