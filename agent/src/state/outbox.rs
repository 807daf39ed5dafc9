//! [`Outbox`]: events that the hub has not acknowledged, bounded in number and bytes.
//!
//! One append-only file: a frame with the next sequence number, then one frame per event, each behind its
//! length (u32 LE). An append is one write without fsync: an event that a power cut takes was about
//! something that the next report tells anyway, and flash is spared. What a cut leaves half-written at
//! the end is dropped. Acknowledged events leave when they are half of the file.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;
use foreshore_protocol::frame;
use foreshore_protocol::message::Event;
use serde::{Deserialize, Serialize};

use super::file::{self, Damage, FileError, Framed};

/// Events kept at most.
const EVENTS_MAX: usize = 1000;

/// The file is written anew when it has grown beyond this.
const BYTES_MAX: usize = 1 << 20;

/// No honest hub acknowledges more than its database can hold.
const SEQ_MAX: u64 = i64::MAX as u64;

/// The first record.
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    next_seq: u64,
}

impl Framed for Begin {
    const SCHEMA: u16 = 0x0103;
}

/// Events that wait for the hub's acknowledgement.
#[derive(Debug)]
pub struct Outbox {
    path: PathBuf,
    events: VecDeque<Event>,
    next_seq: u64,
    /// Bytes in the file.
    written: usize,
    /// Events in the file that are acknowledged or dropped.
    stale: usize,
}

impl Outbox {
    /// Reads what is kept. Where nothing is, numbers begin at `first`: above all that were ever used, as
    /// far as can be known, lest an old acknowledgement be taken for one of new events.
    pub(super) fn open(path: &Path, first: u64, damage: &mut Damage) -> Result<Self, FileError> {
        let mut outbox = Self {
            path: path.to_owned(),
            events: VecDeque::new(),
            next_seq: first.max(1),
            written: 0,
            stale: 0,
        };
        let Some(bytes) = file::read_bounded(path, 2 * BYTES_MAX)? else {
            return Ok(outbox);
        };
        let mut rest = bytes.as_slice();
        let begin: Option<Begin> =
            record(&mut rest).and_then(|bytes| file::decode_value(bytes).ok());
        let Some(begin) = begin else {
            let aside = file::set_aside(path, "it does not begin like an event file", damage);
            damage.bear(aside)?;
            return Ok(outbox);
        };
        outbox.next_seq = begin.next_seq;
        let mut whole = bytes.len() - rest.len();
        while let Some(event) =
            record(&mut rest).and_then(|bytes| frame::decode::<Event>(bytes).ok())
        {
            whole = bytes.len() - rest.len();
            outbox.next_seq = outbox.next_seq.max(event.seq.saturating_add(1));
            outbox.events.push_back(event);
        }
        outbox.written = bytes.len();
        if whole < bytes.len() {
            // What is appended behind a torn or damaged record would be lost with it.
            outbox.written = 0;
            let rewritten = outbox.rewrite();
            damage.bear(rewritten)?;
        }
        Ok(outbox)
    }

    /// Gives the event its number and keeps it until it is acknowledged. When there are too many, the oldest
    /// is dropped; the gap in the numbers tells the hub.
    ///
    /// # Errors
    ///
    /// When it could not be written; it is kept in memory all the same.
    pub fn push(&mut self, mut event: Event) -> Result<(), FileError> {
        event.seq = self.next_seq;
        self.next_seq = self.next_seq.saturating_add(1);
        let bytes = frame::encode(&event);
        self.events.push_back(event);
        while self.events.len() > EVENTS_MAX {
            self.events.pop_front();
            self.stale += 1;
        }
        if self.written == 0 || self.written + bytes.len() > BYTES_MAX {
            return self.rewrite();
        }
        let mut line = Vec::with_capacity(bytes.len() + 4);
        append(&mut line, &bytes);
        let write = || {
            killpoint::failure()?;
            let mut file = std::fs::File::options().append(true).open(&self.path)?;
            killpoint::torn("events", "append-torn", &line, |half| file.write_all(half));
            file.write_all(&line)
        };
        if let Err(source) = write() {
            // It may be half there: the next push writes the file anew.
            self.written = 0;
            return Err(FileError::new("append to", &self.path, source));
        }
        killpoint::reached("events", "appended");
        self.written += line.len();
        Ok(())
    }

    /// Forgets events up to and including `seq`.
    ///
    /// An acknowledgement of a number that was never given means that this device's numbers were lost (a
    /// damaged file, a new disk): what waits is numbered anew above it, or the hub would take it for known.
    ///
    /// # Errors
    ///
    /// When the file could not be written; the events are sent again after a restart, which is harmless.
    pub fn acknowledge(&mut self, seq: u64) -> Result<(), FileError> {
        if seq > SEQ_MAX {
            return Ok(());
        }
        if seq >= self.next_seq {
            self.next_seq = seq.saturating_add(1);
            for event in &mut self.events {
                event.seq = self.next_seq;
                self.next_seq = self.next_seq.saturating_add(1);
            }
            return self.rewrite();
        }
        while self.events.front().is_some_and(|event| event.seq <= seq) {
            self.events.pop_front();
            self.stale += 1;
        }
        if self.stale > 0 && self.stale >= self.events.len() {
            self.rewrite()
        } else {
            Ok(())
        }
    }

    /// The events that wait, oldest first.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// The number of the newest event; 0 before the first.
    #[must_use]
    pub const fn newest(&self) -> u64 {
        self.next_seq - 1
    }

    fn rewrite(&mut self) -> Result<(), FileError> {
        let first = self.events.front().map_or(self.next_seq, |event| event.seq);
        let mut bytes = Vec::new();
        append(
            &mut bytes,
            &file::encode(&Begin {
                next_seq: first.max(1),
            }),
        );
        for event in &self.events {
            append(&mut bytes, &frame::encode(event));
        }
        file::write_atomically(&self.path, &bytes)?;
        self.written = bytes.len();
        self.stale = 0;
        Ok(())
    }
}

fn append(bytes: &mut Vec<u8>, record: &[u8]) {
    let length = u32::try_from(record.len()).expect("records are far below 4 GiB");
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(record);
}

/// Takes one record off the front; `None` leaves `rest` where it is.
fn record<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, tail) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let (record, tail) = tail.split_at_checked(length)?;
    *rest = tail;
    Some(record)
}
