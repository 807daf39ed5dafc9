//! The frames of the wire and of state files, and every message in them.

use std::fmt::Debug;

use foreshore_protocol::api::PullView;
use foreshore_protocol::frame::{self, HEADER_LEN, MAX_FRAME_BYTES, Message};
use foreshore_protocol::message::{
    Beacon, Command, Event, Events, Head, HubInfo, Lease, LeaseRequest, Presence, PullProgress,
    Reported,
};
use foreshore_protocol::secret::{DeviceKey, SealedSecrets};

use crate::{accepted, memory};

/// What decoding may take: a small multiple of the longest frame, as `protocol/tests/allocation.rs` has it.
const MEMORY_MAX: usize = 4 << 20;

/// One frame, taken for each message.
///
/// # Panics
/// When two messages are in it, one does not come back as written, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    let found = found(bytes);
    assert!(found.iter().filter(|found| **found).count() <= 1);
}

/// Which of the messages it is.
fn found(bytes: &[u8]) -> [bool; 12] {
    [
        message::<Head>(bytes).is_some(),
        message::<Command>(bytes).is_some(),
        message::<Beacon>(bytes).is_some(),
        message::<Presence>(bytes).is_some(),
        message::<Event>(bytes).is_some(),
        message::<Events>(bytes).is_some(),
        message::<HubInfo>(bytes).is_some(),
        message::<LeaseRequest>(bytes).is_some(),
        message::<Lease>(bytes).is_some(),
        reported(bytes),
        pull(bytes),
        sealed(bytes),
    ]
}

fn message<M: Message + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message = memory::within(MEMORY_MAX, || frame::decode::<M>(bytes)).ok()?;
    accepted();
    assert!(bytes.len() <= MAX_FRAME_BYTES);
    let mut right = bytes.to_vec();
    repair(&mut right);
    assert_eq!(right, bytes, "its checksum is wrong");
    let written = frame::encode(&message);
    assert!(
        written.len() <= bytes.len(),
        "it grew to {} bytes",
        written.len()
    );
    assert_eq!(frame::decode::<M>(&written).as_ref(), Ok(&message));
    Some(message)
}

fn reported(bytes: &[u8]) -> bool {
    let Some(report) = message::<Reported>(bytes) else {
        return false;
    };
    let whole = frame::encode(&report).len();
    for max in [0, 200, 4096] {
        let fitted = report.clone().fitted(max);
        let length = frame::encode(&fitted).len();
        assert!(
            length <= max || length <= whole,
            "{length} bytes of {whole}"
        );
        let phases = |report: &Reported| -> Vec<_> {
            let apps = report.apps.iter();
            apps.map(|app| (app.app.clone(), app.phase)).collect()
        };
        assert_eq!(phases(&fitted), phases(&report));
    }
    true
}

fn pull(bytes: &[u8]) -> bool {
    let Some(progress) = message::<PullProgress>(bytes) else {
        return false;
    };
    for image in PullView::from(&progress).images {
        assert!(image.fetched_bytes <= image.total_bytes);
    }
    true
}

fn sealed(bytes: &[u8]) -> bool {
    let Some(sealed) = message::<SealedSecrets>(bytes) else {
        return false;
    };
    let stranger = DeviceKey::from_bytes([7; 32]);
    assert!(stranger.open(&sealed).is_err(), "nobody sealed this");
    true
}

/// Gives mutated bytes a right checksum, so that they get as far as their content does.
pub fn repair(bytes: &mut [u8]) {
    if bytes.len() >= HEADER_LEN {
        let (header, body) = bytes.split_at_mut(HEADER_LEN);
        header[5..].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_among_them() {
        assert_eq!(
            found(b"").len(),
            usize::from(frame::MAX_SCHEMA),
            "a message is missing above"
        );
    }
}
