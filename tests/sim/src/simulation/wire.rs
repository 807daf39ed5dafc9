//! What is on its way: bytes, as the real encoders write them and the real decoders read them.
//!
//! Some senders are of a newer version, which writes more into its messages than anybody here knows of; the broker keeps
//! what they wrote for whoever comes. And some deliveries are preceded by a damaged copy. Both are drawn from a stream of
//! their own, so that they change nothing else in a run.

use foreshore_protocol::frame::{self, HEADER_LEN, Message};
use foreshore_protocol::message::Command;
use foreshore_protocol::release::Release;

use super::{Down, Simulation, Told, Up};
use crate::hub::unix;
use crate::mutation::Mutation;
use crate::random::{Random, hash};
use crate::scenario::Ms;

/// A message on its way, and for the rules what the sender meant.
#[derive(Debug, Clone)]
pub(super) struct Sent<M> {
    meant: M,
    bytes: Vec<u8>,
}

impl<M> Sent<M> {
    /// What the sender meant, which no receiver may look at.
    pub(super) const fn meant(&self) -> &M {
        &self.meant
    }
}

/// What travels.
pub(super) trait Wire: Clone + PartialEq + std::fmt::Debug {
    /// The bytes of it.
    fn write(&self, now: Ms) -> Vec<u8>;

    /// What `bytes` say that came where `self` was to come.
    fn read(&self, bytes: &[u8], reader: Reader) -> Option<Self>;
}

/// How a receiver reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader {
    mutation: Option<Mutation>,
}

impl Reader {
    fn frame<M: Message>(self, bytes: &[u8]) -> Option<M> {
        let mended = (self.mutation == Some(Mutation::BelieveDamage)).then(|| mend(bytes));
        let message = frame::decode(mended.as_deref().unwrap_or(bytes)).ok()?;
        let known = || frame::encode(&message).len() == bytes.len();
        (self.mutation != Some(Mutation::RefuseNewer) || known()).then_some(message)
    }
}

/// The same frame with the checksum that its body has now.
fn mend(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some((header, body)) = bytes.split_at_mut_checked(HEADER_LEN) {
        header[HEADER_LEN - 4..].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    }
    bytes
}

/// The frame as a newer version writes it, with more behind what is known of it.
fn extend(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let more = (0..random.between(1, 40)).map(|_| random.next().to_le_bytes()[0]);
    mend(&bytes.iter().copied().chain(more).collect::<Vec<u8>>())
}

/// Another bit, or an end that is missing.
fn damage(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let place = usize::try_from(random.below(bytes.len() as u64)).unwrap_or(0);
    if random.chance(50) {
        bytes.truncate(place);
    } else {
        bytes[place] ^= 1 << random.below(8);
    }
    bytes
}

impl Wire for Up {
    fn write(&self, _: Ms) -> Vec<u8> {
        match self {
            Self::Presence(presence) => frame::encode(presence),
            Self::Beacon(beacon) => frame::encode(beacon),
            Self::Reported(reported) => frame::encode(&**reported),
            Self::LeaseRequest(request) => frame::encode(request),
        }
    }

    fn read(&self, bytes: &[u8], reader: Reader) -> Option<Self> {
        Some(match self {
            Self::Presence(_) => Self::Presence(reader.frame(bytes)?),
            Self::Beacon(_) => Self::Beacon(reader.frame(bytes)?),
            Self::Reported(_) => Self::Reported(Box::new(reader.frame(bytes)?)),
            Self::LeaseRequest(_) => Self::LeaseRequest(reader.frame(bytes)?),
        })
    }
}

impl Wire for Down {
    fn write(&self, now: Ms) -> Vec<u8> {
        match self {
            Self::Head(told) => frame::encode(&told.head),
            Self::Ack(reported) => frame::encode(&Command::Ack {
                event: 0,
                reported: *reported,
                unix_ms: unix(now).0,
            }),
            Self::Resync => frame::encode(&Command::Resync),
            Self::Lease(lease) => frame::encode(lease),
            Self::Release(release) => release.to_canonical_json(),
        }
    }

    fn read(&self, bytes: &[u8], reader: Reader) -> Option<Self> {
        Some(match self {
            Self::Head(Told { life, .. }) => Self::Head(Told {
                life: *life,
                head: reader.frame(bytes)?,
            }),
            Self::Ack(_) | Self::Resync => match reader.frame(bytes)? {
                Command::Ack { reported, .. } => Self::Ack(reported),
                Command::Resync => Self::Resync,
            },
            Self::Lease(_) => Self::Lease(reader.frame(bytes)?),
            // Its digest is in the topic.
            Self::Release(release) => Self::Release(Box::new(
                Release::from_bytes(bytes, &release.digest()).ok()?,
            )),
        })
    }
}

impl Simulation {
    /// A device's message on its way. Every third start of an agent is one of a newer version.
    pub(super) fn written_by_device(&mut self, device: usize, message: Up) -> Sent<Up> {
        let life = self.devices[device].disk.starts;
        self.put_on_wire(message, &[device as u64, life])
    }

    /// A message of the hub on its way. Every third life of its process is one of a newer version.
    pub(super) fn written_by_hub(&mut self, message: Down) -> Sent<Down> {
        let life = self.hub.life;
        self.put_on_wire(message, &[u64::MAX, life])
    }

    fn put_on_wire<M: Wire>(&mut self, meant: M, sender: &[u64; 2]) -> Sent<M> {
        let mut bytes = meant.write(self.now);
        let is_frame = bytes.starts_with(&frame::MAGIC);
        if is_frame && hash(&[self.scenario.seed, 47, sender[0], sender[1]]).is_multiple_of(3) {
            bytes = extend(&bytes, &mut self.noise);
        }
        Sent { meant, bytes }
    }

    /// What the receiver makes of it.
    pub(super) fn take_from_wire<M: Wire>(&mut self, sent: &Sent<M>) -> Option<M> {
        let reader = Reader {
            mutation: self.mutation,
        };
        if self.noise.chance(5) {
            let damaged = damage(&sent.bytes, &mut self.noise);
            if let Some(taken) = sent.meant.read(&damaged, reader) {
                self.violations.push(format!(
                    "a damaged copy of {:?} was taken for {taken:?}",
                    sent.meant
                ));
            }
        }
        let taken = sent.meant.read(&sent.bytes, reader);
        if taken.as_ref() != Some(&sent.meant) {
            self.violations.push(format!(
                "{:?} was on the wire, and was read as {taken:?}",
                sent.meant
            ));
        }
        taken
    }
}
