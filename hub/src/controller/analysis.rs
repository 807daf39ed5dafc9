//! Asks the gates of [`crate::rollout::Policy::analysis`] when they are due, and records what they answer.
//!
//! What is due is a column of nobody: it is read off the waves of live rollouts, after every change of a rollout with
//! analysis and when the next question is due. An answer is recorded in one transaction with what follows from it, if it is still
//! waited for. A hub that is restarted asks again.

use std::collections::BTreeSet;
use std::time::Duration;

use foreshore_protocol::api::AssignmentState;
use foreshore_protocol::manifest::{Analysis, App, Control, ControlMetric};
use foreshore_protocol::message::Phase;
use rusqlite::Connection;
use serde::Serialize;
use tokio::task::JoinSet;

use super::{BEACON_INTERVAL_MS, Change, ControlError, Controller, rollouts};
use crate::analysis::answer::{self, Answer};
use crate::analysis::control::{self, Sample};
use crate::analysis::{Ask, Asker, Bearer, Hosts, host_of};
use crate::rollout::analysis::{self, Question, Verdict};
use crate::rollout::budget::Tally;
use crate::rollout::{Action, Rollout, UnixMs};
use crate::store::{self, StoreError};

/// It looks again after so long, whatever it was told.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// After a failure of the store.
const PAUSE: Duration = Duration::from_secs(5);

/// Questions that are under way at once; more wait.
const UNDER_WAY_MAX: usize = 64;

/// What a device that does not have the release said is worth something for so long.
const CONTROL_AGE_MS: u64 = 2 * BEACON_INTERVAL_MS as u64 + 60_000;

/// Whether an app's analysis asks only hosts that may be asked, and sends only secrets that are set.
///
/// # Errors
///
/// [`ControlError::AnalysisHost`] or [`ControlError::AnalysisSecret`]; or when the store fails.
pub fn check(connection: &Connection, app: &App, hosts: &Hosts) -> Result<(), ControlError> {
    for gate in &app.spec.rollout.analysis {
        let Some((url, secret)) = gate.endpoint() else {
            continue;
        };
        if !hosts.allow(url) {
            return Err(ControlError::AnalysisHost {
                analysis: gate.name.clone(),
                app: app.metadata.name.clone(),
                host: host_of(url),
            });
        }
        if let Some(secret) = secret {
            let value = store::secret::value(connection, secret)?;
            if value.as_ref().and_then(Bearer::of).is_none() {
                return Err(ControlError::AnalysisSecret {
                    secret: secret.clone(),
                    analysis: gate.name.clone(),
                    app: app.metadata.name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// Asks what is due, until the future is dropped. What is under way then is asked again by the next hub.
pub async fn run(controller: Controller, asker: Asker) {
    let mut under_way: BTreeSet<Question> = BTreeSet::new();
    let mut answers = JoinSet::new();
    loop {
        let now = controller.now();
        let look = move |connection: &Connection| Ok::<_, StoreError>(due(connection, now)?);
        let pause = match controller.store().read(look).await {
            Ok((questions, next)) => {
                for question in questions {
                    if under_way.len() < UNDER_WAY_MAX && under_way.insert(question.clone()) {
                        answers.spawn(settle(controller.clone(), asker.clone(), question));
                    }
                }
                next.map_or(LOOK_EVERY, |next| {
                    Duration::from_millis(next.since(controller.now()))
                })
            }
            Err(error) => {
                tracing::warn!(%error, "failed to look for analysis that is due");
                PAUSE
            }
        };
        tokio::select! {
            () = controller.analysis_news() => {}
            () = tokio::time::sleep(pause.min(LOOK_EVERY)) => {}
            Some(done) = answers.join_next() => match done {
                Ok(question) => {
                    under_way.remove(&question);
                }
                // A task that panicked: nothing of it is lost but its question, which is asked again.
                Err(_) => under_way.clear(),
            },
        }
    }
}

/// What is due, of all live rollouts, and when the next question is.
fn due(connection: &Connection, now: UnixMs) -> rusqlite::Result<(Vec<Question>, Option<UnixMs>)> {
    let (mut questions, mut next) = (Vec::new(), None);
    for app in store::rollout::live_apps(connection)? {
        let Some(mut rollout) = store::rollout::newest_header(connection, &app)? else {
            continue;
        };
        if rollout.policy.analysis.is_empty() {
            continue;
        }
        rollout.waves = store::rollout::waves(connection, rollout.id)?;
        let (found, then) = analysis::due(&rollout, rollout.clock.tick(now));
        questions.extend(found);
        let then = then.map(|tick| rollout.clock.unix(tick));
        next = [next, then].into_iter().flatten().min();
    }
    Ok((questions, next))
}

/// Asks, and records the answer. Comes back with the question in any case.
async fn settle(controller: Controller, asker: Asker, question: Question) -> Question {
    let asked = question.clone();
    let done = async {
        let answer = ask(&controller, &asker, &asked).await?;
        if let Some(answer) = answer {
            tracing::info!(
                rollout = asked.rollout,
                wave = asked.ordinal,
                gate = asked.gate,
                verdict = ?answer.verdict,
                "an analysis answered"
            );
            controller
                .change(move |change| record(change, &asked, answer))
                .await?;
        }
        Ok::<_, ControlError>(())
    };
    if let Err(error) = done.await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "failed to record what an analysis answered"
        );
        // Not at once again: the store is likely to fail again.
        tokio::time::sleep(PAUSE).await;
    }
    question
}

/// Records an answer that is still waited for, and lets the engine look at it.
///
/// # Errors
///
/// When the store fails.
pub fn record(
    change: &mut Change<'_>,
    question: &Question,
    answer: Answer,
) -> Result<(), ControlError> {
    let recorded = rollouts::with(change, question.rollout, |change, live| {
        let rollout = &mut live.rollout;
        if !analysis::awaits(rollout, question) {
            return Ok(None);
        }
        let measured = Action::Measured {
            ordinal: question.ordinal,
            gate: question.gate,
            verdict: answer.verdict,
            message: answer.message,
        };
        rollouts::act(change, rollout, &[measured])?;
        Ok(Some(rollout.app.clone()))
    })?;
    match recorded.flatten() {
        Some(app) => rollouts::advance_newest(change, &app),
        None => Ok(()),
    }
}

/// What a webhook is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Posted {
    app: String,
    analysis: String,
    rollout: u64,
    wave: u32,
    waves: usize,
    from: Option<String>,
    release: String,
    /// Of the wave.
    devices: Counts,
    /// Of the whole rollout.
    all_devices: Counts,
}

/// Devices, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Counts {
    total: u32,
    succeeded: u32,
    failed: u32,
    deferred: u32,
}

impl From<Tally> for Counts {
    fn from(tally: Tally) -> Self {
        Self {
            total: tally.devices,
            succeeded: tally.succeeded,
            failed: tally.failed,
            deferred: tally.deferred,
        }
    }
}

/// What one question comes down to.
enum Asked {
    /// Nobody waits for it any more.
    Nothing,
    /// It was answered from what the hub knows.
    Answered(Answer),
    /// Somebody is to be asked.
    Out(Box<Analysis>, Ask),
}

async fn ask(
    controller: &Controller,
    asker: &Asker,
    question: &Question,
) -> Result<Option<Answer>, ControlError> {
    let (asked, now) = (question.clone(), controller.now());
    let prepare = move |connection: &Connection| prepare(connection, &asked, now);
    let (gate, ask) = match controller.store().read(prepare).await? {
        Asked::Nothing => return Ok(None),
        Asked::Answered(answer) => return Ok(Some(answer)),
        Asked::Out(gate, ask) => (gate, ask),
    };
    let bytes = match asker.ask(&ask).await {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Some(Answer::inconclusive(&error.to_string()))),
    };
    Ok(Some(match &gate.promql {
        Some(promql) => answer::promql(&bytes, &promql.pass_if),
        None => answer::webhook(&bytes),
    }))
}

fn prepare(
    connection: &Connection,
    question: &Question,
    now: UnixMs,
) -> Result<Asked, ControlError> {
    let Some(rollout) = store::rollout::get(connection, question.rollout)? else {
        return Ok(Asked::Nothing);
    };
    let gate = rollout.policy.analysis.get(question.gate);
    let Some(gate) = gate.filter(|_| analysis::awaits(&rollout, question)) else {
        return Ok(Asked::Nothing);
    };
    if let Some(control) = &gate.control {
        let answer = compare(connection, &rollout, question.ordinal, control, now)?;
        return Ok(Asked::Answered(answer));
    }
    let Some((endpoint, secret)) = gate.endpoint() else {
        return Ok(Asked::Answered(Answer::inconclusive("it asks nobody")));
    };
    let bearer = match secret {
        None => None,
        Some(name) => {
            let value = store::secret::value(connection, name)?;
            let Some(bearer) = value.as_ref().and_then(Bearer::of) else {
                let why = format!("secret {name} is not set or is no token");
                return Ok(Asked::Answered(Answer::inconclusive(&why)));
            };
            Some(bearer)
        }
    };
    let (below, body) = match &gate.promql {
        Some(promql) => {
            let query = promql.filled(|name| match name {
                "app" => rollout.app.to_string(),
                "release" => rollout.to.to_string(),
                "rollout" => rollout.id.to_string(),
                _ => question.ordinal.to_string(),
            });
            (format!("/api/v1/query?query={}", escaped(&query)), None)
        }
        None => (
            String::new(),
            Some(posted(&rollout, gate, question.ordinal)),
        ),
    };
    let ask = Ask {
        endpoint: endpoint.clone(),
        below,
        body,
        bearer,
    };
    Ok(Asked::Out(Box::new(gate.clone()), ask))
}

fn posted(rollout: &Rollout, gate: &Analysis, ordinal: u32) -> Vec<u8> {
    let posted = Posted {
        app: rollout.app.to_string(),
        analysis: gate.name.clone(),
        rollout: rollout.id,
        wave: ordinal,
        waves: rollout.waves.len(),
        from: rollout.from.map(|release| release.to_string()),
        release: rollout.to.to_string(),
        devices: Tally::of_wave(rollout, ordinal).into(),
        all_devices: Tally::of(rollout).into(),
    };
    serde_json::to_vec(&posted).expect("numbers and texts serialize")
}

/// As in a form (RFC 3986, 2.3: everything but the unreserved characters is escaped).
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

/// The devices of the wave that succeeded and said how they are since, beside those that were offered nothing yet.
fn compare(
    connection: &Connection,
    rollout: &Rollout,
    ordinal: u32,
    control: &Control,
    now: UnixMs,
) -> Result<Answer, ControlError> {
    let since = UnixMs(now.0.saturating_sub(CONTROL_AGE_MS));
    let gauges = store::device::gauges_since(connection, since)?;
    let (mut wave, mut others, mut left) = (Vec::new(), Vec::new(), 0_u32);
    for (device, assignment) in rollout.assignments.iter() {
        let without = assignment.state == AssignmentState::Planned && assignment.since.is_none();
        left += u32::from(without);
        let Some(gauges) = gauges.get(device) else {
            continue;
        };
        let sample = Sample {
            stratum: assignment.stratum,
            value: f64::from(match control.metric {
                ControlMetric::Memory => gauges.memory_mib,
                ControlMetric::Load => gauges.load_centi,
            }),
        };
        let has_it = assignment.state == AssignmentState::Device(Phase::Succeeded);
        if has_it && assignment.wave == ordinal {
            if gauges.at > rollout.clock.unix(assignment.changed) {
                wave.push(sample);
            }
        } else if without {
            others.push(sample);
        }
    }
    if left < control.min_sample {
        // As in the last wave, always: to wait would be to wait for ever.
        return Ok(Answer {
            verdict: Verdict::Pass,
            message: format!(
                "nothing to compare with: {left} devices are left without the release"
            ),
        });
    }
    Ok(control::compare(&wave, &others, control))
}
