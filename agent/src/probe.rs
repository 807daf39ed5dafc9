//! Probes: asking a container whether it came up, does its job, still lives, with Kubernetes' thresholds.
//!
//! HTTP and TCP probes connect from inside the container's own network namespace
//! ([`Runtime::connect`]), so that services on the same port of one device do not meet.

use std::time::Duration;

use foreshore_protocol::manifest::{HttpProbe, Probe, ProbeAction};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::plan::ProbeState;
use crate::runtime::{ContainerId, ExecError, Runtime};

/// A status line fits in this many bytes; what comes after is not read.
const STATUS_LINE_BYTES: usize = 256;

/// How much longer than its timeout an exec probe is waited for: more than [`Runtime::exec`] takes to kill
/// a command and the process that ran it.
const EXEC_PATIENCE: Duration = Duration::from_secs(30);

/// Asks a container again and again, and tells every change of its state through `tell`. Never returns;
/// drop it when the container is gone.
///
/// Cancel safe; an exec probe that is cut in the middle leaves its process to end at its own timeout.
pub async fn watch<R: Runtime>(
    runtime: &R,
    id: &ContainerId,
    probe: &Probe,
    mut tell: impl FnMut(ProbeState),
) {
    follow(runtime, id, probe, |state| {
        tell(state);
        false
    })
    .await;
}

/// As [`watch`], and returns once the answer was yes: for startup probes.
pub async fn until_ready<R: Runtime>(
    runtime: &R,
    id: &ContainerId,
    probe: &Probe,
    mut tell: impl FnMut(ProbeState),
) {
    follow(runtime, id, probe, |state| {
        let ready = state == ProbeState::Ready;
        tell(state);
        ready
    })
    .await;
}

async fn follow<R: Runtime>(
    runtime: &R,
    id: &ContainerId,
    probe: &Probe,
    mut is_enough: impl FnMut(ProbeState) -> bool,
) {
    tokio::time::sleep(probe.initial_delay.duration()).await;
    let mut verdict = Verdict::new(probe.success_threshold, probe.failure_threshold);
    let mut ticks = tokio::time::interval(probe.period.duration().max(Duration::from_millis(1)));
    // After a suspend or a slow probe: one question, not a volley.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let answer = ask(runtime, id, probe).await;
        if let Some(state) = verdict.take(answer)
            && is_enough(state)
        {
            return;
        }
    }
}

/// Asks once. `Err` says, for people, what the answer was instead of yes.
///
/// # Errors
///
/// When the service is not ready, or does not answer within the probe's timeout.
pub async fn ask<R: Runtime>(runtime: &R, id: &ContainerId, probe: &Probe) -> Result<(), String> {
    let timeout = probe.timeout.duration();
    let asked = async {
        match probe.action() {
            Some(ProbeAction::Http(http)) => ask_http(runtime, id, http, timeout).await,
            Some(ProbeAction::Tcp(tcp)) => runtime
                .connect(id, tcp.port, timeout)
                .await
                .map(drop)
                .map_err(|error| format!("TCP port {}: {error}", tcp.port)),
            Some(ProbeAction::Exec(exec)) => match runtime.exec(id, &exec.command, timeout).await {
                Ok(0) => Ok(()),
                Ok(code) => Err(format!("command ended with status {code}")),
                Err(ExecError::Timeout(_)) => Err(no_answer(timeout)),
                Err(error) => Err(error.to_string()),
            },
            None => Err("the probe names no action".to_owned()),
        }
    };
    // Exec keeps its own timeout, kills the command and waits for its process; cut before that, it would
    // leave one behind at each question.
    let bound = if probe.exec.is_some() {
        timeout + EXEC_PATIENCE
    } else {
        timeout
    };
    tokio::time::timeout(bound, asked)
        .await
        .unwrap_or_else(|_| Err(no_answer(timeout)))
}

fn no_answer(timeout: Duration) -> String {
    format!("no answer within {timeout:?}")
}

/// GET over HTTP/1.1; 200 to 399 is yes (Kubernetes, "HTTP probes"). Only the status line is read.
async fn ask_http<R: Runtime>(
    runtime: &R,
    id: &ContainerId,
    http: &HttpProbe,
    timeout: Duration,
) -> Result<(), String> {
    let named = |what: String| format!("GET :{}{}: {what}", http.port, http.path);
    let mut stream = runtime
        .connect(id, http.port, timeout)
        .await
        .map_err(|error| named(error.to_string()))?;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: localhost:{}\r\nUser-Agent: foreshore-probe/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        http.path,
        http.port,
        env!("CARGO_PKG_VERSION"),
    );
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|error| named(error.to_string()))?;
    let mut line = [0; STATUS_LINE_BYTES];
    let mut read = 0;
    while read < line.len() && !line[..read].contains(&b'\n') {
        match stream.read(&mut line[read..]).await {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) => return Err(named(error.to_string())),
        }
    }
    match status(&line[..read]) {
        Some(200..=399) => Ok(()),
        Some(code) => Err(named(format!("status {code}"))),
        None => Err(named("the answer is not HTTP".to_owned())),
    }
}

/// The code of a status line (RFC 9112, section 4): `HTTP/1.1 200 OK`.
fn status(line: &[u8]) -> Option<u16> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.trim_end().splitn(3, ' ');
    words.next()?.starts_with("HTTP/1.").then_some(())?;
    let code = words.next()?;
    (code.len() == 3).then(|| code.parse().ok()).flatten()
}

/// Counts answers in a row.
#[derive(Debug, Clone)]
struct Verdict {
    success_threshold: u32,
    failure_threshold: u32,
    successes: u32,
    failures: u32,
    state: ProbeState,
}

impl Verdict {
    const fn new(success_threshold: u32, failure_threshold: u32) -> Self {
        Self {
            success_threshold,
            failure_threshold,
            successes: 0,
            failures: 0,
            state: ProbeState::Unknown,
        }
    }

    /// Takes an answer; the new state if it changed.
    fn take(&mut self, answer: Result<(), String>) -> Option<ProbeState> {
        let next = match answer {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                (self.successes >= self.success_threshold).then_some(ProbeState::Ready)?
            }
            Err(why) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                (self.failures >= self.failure_threshold).then_some(ProbeState::NotReady(why))?
            }
        };
        let same = std::mem::discriminant(&next) == std::mem::discriminant(&self.state);
        if same {
            return None;
        }
        self.state = next.clone();
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_answers_in_a_row() {
        let no = || Err("no".to_owned());
        let mut verdict = Verdict::new(2, 3);
        assert_eq!(verdict.take(Ok(())), None);
        assert_eq!(verdict.take(no()), None);
        assert_eq!(verdict.take(Ok(())), None);
        assert_eq!(verdict.take(Ok(())), Some(ProbeState::Ready));
        assert_eq!(verdict.take(Ok(())), None);
        assert_eq!(verdict.take(no()), None);
        assert_eq!(verdict.take(no()), None);
        assert_eq!(verdict.take(Ok(())), None);
        assert_eq!(
            [no(), no(), no()].map(|answer| verdict.take(answer))[2],
            Some(ProbeState::NotReady("no".to_owned()))
        );
        assert_eq!(verdict.take(no()), None);
    }

    #[test]
    fn status_lines() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\nServer: x"), Some(200));
        assert_eq!(status(b"HTTP/1.0 404\r\n"), Some(404));
        for bad in [
            &b""[..],
            b"SSH-2.0-OpenSSH",
            b"HTTP/2 200",
            b"HTTP/1.1 20",
            b"HTTP/1.1 2000 x",
            b"\xff\xfe",
            b"HTTP/1.1",
        ] {
            assert_eq!(status(bad), None, "{bad:?}");
        }
    }
}
