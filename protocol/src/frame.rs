//! The frame around every message on the wire and every state file: `[magic "FS"][schema id u16 LE]
//! [flags u8][CRC-32 of the body u32 LE][postcard body]`.
//!
//! The schema id names one shape for ever. A changed message gets a new id; [`decode`] turns every id it
//! knows into today's shape. An unknown id is an error that names it, so the receiver can keep the raw
//! bytes and the link.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{
    Beacon, Command, Event, Events, Head, HubInfo, Lease, LeaseRequest, Presence, PullProgress,
    Reported,
};
use crate::secret::SealedSecrets;

/// The first two bytes of every frame.
pub const MAGIC: [u8; 2] = *b"FS";

/// Bytes before the body.
pub const HEADER_LEN: usize = 9;

/// The largest frame that is decoded: 64 KiB, the MQTT packet limit Foreshore asks for.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;

/// The highest schema id this build reads.
pub const MAX_SCHEMA: u16 = 0x000c;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Larger than [`MAX_FRAME_BYTES`].
    #[error("frame has {0} bytes; at most {MAX_FRAME_BYTES} are read")]
    TooLarge(usize),
    /// Shorter than a header, or without the magic.
    #[error("not a Foreshore frame")]
    NotAFrame,
    /// A schema id of another message, or of a newer version.
    #[error("frame has schema {found:#06x}; expected {expected:#06x}")]
    Schema {
        /// In the frame.
        found: u16,
        /// Of the message that was asked for.
        expected: u16,
    },
    /// Flags that this version does not know.
    #[error("frame has unknown flags {0:#04x}")]
    Flags(u8),
    /// The body does not match its checksum.
    #[error("frame body does not match its checksum")]
    Checksum,
    /// The body is not what the schema says.
    #[error("failed to decode the body of a frame with schema {0:#06x}")]
    Body(u16),
    /// The body holds more than a message may.
    #[error("frame with schema {schema:#06x} holds {what}")]
    Bounds {
        /// In the frame.
        schema: u16,
        /// What is too much.
        what: &'static str,
    },
}

/// A message that travels in a frame.
pub trait Message: Serialize + DeserializeOwned {
    /// The id of its current shape.
    const SCHEMA: u16;

    /// Whether it holds no more than a message may; [`decode`] refuses it otherwise.
    ///
    /// # Errors
    ///
    /// What is too much.
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

macro_rules! schema {
    ($($message:ty => $id:literal),* $(,)?) => {
        $(impl Message for $message {
            const SCHEMA: u16 = $id;

            fn check(&self) -> Result<(), &'static str> {
                self.bounds()
            }
        })*
    };
}
schema! {
    Head => 0x0001,
    Command => 0x0002,
    Reported => 0x0003,
    Beacon => 0x0004,
    Presence => 0x0005,
    Event => 0x0006,
    HubInfo => 0x0007,
    SealedSecrets => 0x0008,
    PullProgress => 0x0009,
    LeaseRequest => 0x000a,
    Lease => 0x000b,
    Events => 0x000c,
}

/// The bytes of `message`, framed.
///
/// # Panics
///
/// Never: every message serializes into a growing buffer.
#[must_use]
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    let body = postcard::to_allocvec(message).expect("messages serialize into a growing buffer");
    let mut frame = Vec::with_capacity(HEADER_LEN + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&M::SCHEMA.to_le_bytes());
    frame.push(0);
    frame.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}

/// The message in `frame`. Bytes behind the body's known fields are ignored, so that a newer sender may
/// append.
///
/// # Errors
///
/// See [`FrameError`]. No input panics or makes it allocate more than a small multiple of
/// [`MAX_FRAME_BYTES`].
pub fn decode<M: Message>(frame: &[u8]) -> Result<M, FrameError> {
    if frame.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge(frame.len()));
    }
    let Some((header, body)) = frame.split_at_checked(HEADER_LEN) else {
        return Err(FrameError::NotAFrame);
    };
    let &[
        magic_0,
        magic_1,
        id_0,
        id_1,
        flags,
        crc_0,
        crc_1,
        crc_2,
        crc_3,
    ] = header
    else {
        return Err(FrameError::NotAFrame);
    };
    if [magic_0, magic_1] != MAGIC {
        return Err(FrameError::NotAFrame);
    }
    let found = u16::from_le_bytes([id_0, id_1]);
    if found != M::SCHEMA {
        return Err(FrameError::Schema {
            found,
            expected: M::SCHEMA,
        });
    }
    if flags != 0 {
        return Err(FrameError::Flags(flags));
    }
    if crc32fast::hash(body) != u32::from_le_bytes([crc_0, crc_1, crc_2, crc_3]) {
        return Err(FrameError::Checksum);
    }
    let (message, _): (M, _) =
        postcard::take_from_bytes(body).map_err(|_| FrameError::Body(found))?;
    message.check().map_err(|what| FrameError::Bounds {
        schema: found,
        what,
    })?;
    Ok(message)
}
