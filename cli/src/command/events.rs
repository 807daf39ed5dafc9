//! `events`: what happened, and following it over server-sent events.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::thread;
use std::time::Duration;

use foreshore_protocol::api::{EventView, List};

use super::get;
use crate::arguments::{Events, Format};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, now_ms, printable, timestamp};

/// A stream without a byte for so long is taken for dead and opened again; the hub's comments keep a
/// living one going.
const QUIET: Duration = Duration::from_secs(60);
/// The longest line of a stream: an event is below 2 KiB.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// As many events as the hub gives in one answer. A filter looks at so many of the newest.
const PAGE: u32 = 1000;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) fn run(hub: &Hub, events: &Events, format: Format, out: &mut dyn Write) -> Outcome {
    let (shown, last) = past(hub, events)?;
    if events.watch {
        shown
            .iter()
            .try_for_each(|event| print_line(event, format, out))?;
        follow(hub, events, last, format, out)
    } else if format == Format::Json {
        output::json(out, &List { items: shown })?;
        Ok(code::OK)
    } else {
        get::print(&shown, format, now_ms(), out)?;
        Ok(code::OK)
    }
}

/// The events of the past that are asked for, oldest first, and the id to follow after.
fn past(hub: &Hub, events: &Events) -> Result<(Vec<EventView>, u64), Failure> {
    let limit = usize::try_from(events.limit).unwrap_or(usize::MAX);
    let Some(mut last) = events.after else {
        // With a limit of 0 events are still asked for: they say where to begin following.
        let filtered = events.app.is_some() || events.device.is_some();
        let count = if filtered { PAGE } else { events.limit.max(1) };
        let page = page(hub, &format!("/events?limit={count}"))?;
        let last = page.last().map_or(0, |event| event.id);
        let mut found: Vec<EventView> = page
            .into_iter()
            .filter(|event| wanted(events, event))
            .collect();
        found.drain(..found.len().saturating_sub(limit));
        return Ok((found, last));
    };
    let mut found = Vec::new();
    while found.len() < limit {
        let page = page(hub, &format!("/events?after={last}&limit={PAGE}"))?;
        let Some(end) = page.last() else { break };
        let end = end.id;
        for event in page {
            if found.len() < limit {
                last = event.id;
                found.extend(Some(event).filter(|event| wanted(events, event)));
            }
        }
        if last < end {
            break;
        }
    }
    Ok((found, last))
}

fn page(hub: &Hub, path: &str) -> Result<Vec<EventView>, Failure> {
    let mut list: List<EventView> = hub.get(path)?;
    list.items.sort_by_key(|event| event.id);
    Ok(list.items)
}

fn wanted(events: &Events, event: &EventView) -> bool {
    events
        .app
        .as_ref()
        .is_none_or(|app| event.app.as_ref() == Some(app))
        && events
            .device
            .as_ref()
            .is_none_or(|device| event.device.as_ref() == Some(device))
}

/// Prints events after `last` until interrupted or refused. A stream that breaks is opened again after
/// the last event seen, so none is missed and none is printed twice.
fn follow(
    hub: &Hub,
    events: &Events,
    mut last: u64,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    loop {
        match hub.stream(&format!("/events/stream?after={last}"), QUIET) {
            Ok(stream) => {
                if told {
                    eprintln!("connected again");
                    told = false;
                }
                let before = last;
                read(stream, |event| {
                    if event.id > last {
                        last = event.id;
                        if wanted(events, &event) {
                            print_line(&event, format, out)?;
                        }
                    }
                    Ok(())
                })?;
                if last > before {
                    pause = FIRST_PAUSE;
                }
            }
            Err(failure) if failure.is_unreachable() => {
                if !told {
                    eprintln!(
                        "the hub at {} does not answer; trying again until it does",
                        hub.url()
                    );
                    told = true;
                }
            }
            Err(failure) => return Err(failure),
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Hands each event of a stream to `take` until the stream ends or breaks (server-sent events, WHATWG
/// HTML, "Parsing an event stream"; only `data` lines matter, as events name their own ids).
fn read(
    stream: impl Read,
    mut take: impl FnMut(EventView) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut lines = BufReader::new(stream);
    let mut data = String::new();
    loop {
        let mut line = String::new();
        match (&mut lines).take(MAX_LINE_BYTES).read_line(&mut line) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(_) if !line.ends_with('\n') => return Ok(()),
            Ok(_) => {}
        }
        let line = line.trim_end_matches(['\n', '\r']);
        if let Some(value) = line.strip_prefix("data:") {
            data.push_str(value.strip_prefix(' ').unwrap_or(value));
            if data.len() > usize::try_from(MAX_LINE_BYTES).unwrap_or(usize::MAX) {
                return Ok(());
            }
        } else if line.is_empty() && !data.is_empty() {
            match serde_json::from_str(&data) {
                Ok(event) => take(event)?,
                Err(error) => {
                    eprintln!("an event of the hub is not what this version expects: {error}")
                }
            }
            data.clear();
        }
    }
}

/// `app` or `app/service`.
pub(super) fn subject(event: &EventView) -> String {
    match (&event.app, &event.service) {
        (Some(app), Some(service)) => format!("{app}/{service}"),
        (Some(app), None) => app.to_string(),
        (None, _) => String::new(),
    }
}

fn print_line(event: &EventView, format: Format, out: &mut dyn Write) -> Result<(), Failure> {
    match format {
        Format::Json => output::json_line(out, event)?,
        Format::Name => writeln!(out, "event/{}", event.id)?,
        Format::Table => {
            let device = event
                .device
                .as_ref()
                .map_or("hub", |device| device.as_str());
            let (time, kind, message) = (
                timestamp(event.received_ms),
                printable(&event.kind),
                printable(&event.message),
            );
            writeln!(
                out,
                "{time}  {device:<16}  {:<20}  {kind:<16}  {message}",
                subject(event)
            )?;
        }
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::samples;

    fn events_in(bytes: &[u8]) -> Vec<u64> {
        let mut ids = Vec::new();
        read(bytes, |event| {
            ids.push(event.id);
            Ok(())
        })
        .unwrap();
        ids
    }

    #[test]
    fn comments_ids_crlf_and_broken_events_are_survived() {
        let event = |id| {
            serde_json::to_string(&EventView {
                id,
                ..samples::event()
            })
            .unwrap()
        };
        let stream = format!(
            ": hello\n\nid: 4\ndata: {}\n\nevent: x\r\ndata:{}\r\n\r\ndata: {{broken\n\ndata: {}\n\ndata: {}",
            event(4),
            event(5),
            event(6),
            event(7)
        );
        assert_eq!(
            events_in(stream.as_bytes()),
            [4, 5, 6],
            "the last one was cut off"
        );
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let endless = vec![b'x'; 3 << 20];
        assert!(events_in(&endless).is_empty());
    }
}
