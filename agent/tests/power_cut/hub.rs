//! The hub's end of the line, as a broker of one client that knows to the packet what was acknowledged: MQTT 5.0,
//! as little of it as the agent needs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use foreshore_protocol::message::{Command, Event, EventKind, Events, Head, Reported};
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Digest, Version, frame};

/// Larger packets are not an agent's.
const PACKET_MAX: usize = 256 * 1024;

#[derive(Debug)]
pub struct Hub {
    pub port: u16,
    device: DeviceId,
    talk: Arc<Mutex<Talk>>,
}

/// What was said so far.
#[derive(Debug, Default)]
struct Talk {
    retained: BTreeMap<String, Vec<u8>>,
    /// Of the newest connection.
    client: Option<TcpStream>,
    connection: u64,
    subscribed: BTreeSet<String>,
    heads_sent: BTreeMap<u16, Version>,
    next_id: u16,
    /// The newest head that the agent has acknowledged, ever.
    acknowledged: Option<Version>,
    reported: Option<Reported>,
    events: BTreeMap<u64, Event>,
    /// Two events with one number.
    reused: Vec<(Event, Event)>,
}

impl Hub {
    pub fn start(device: &DeviceId) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let talk = Arc::new(Mutex::new(Talk::default()));
        let (shared, id) = (Arc::clone(&talk), device.clone());
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (Ok(stream), shared, id) = (stream, Arc::clone(&shared), id.clone()) else {
                    return;
                };
                let number = number as u64;
                std::thread::spawn(move || {
                    // An agent that is killed breaks off in the middle of anything.
                    let _broken = serve(stream, number, &shared, &id);
                });
            }
        });
        Self {
            port,
            device: device.clone(),
            talk,
        }
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap()
    }

    pub fn publish_release(&self, digest: &Digest, bytes: Vec<u8>) {
        self.talk().publish(&topic::release(digest), bytes);
    }

    pub fn publish_head(&self, head: &Head) {
        let topic = topic::device(&self.device, Leaf::Head);
        self.talk().publish(&topic, frame::encode(head));
    }

    /// The newest head that the agent has acknowledged to the broker, which need not send it again.
    pub fn acknowledged(&self) -> Option<Version> {
        self.talk().acknowledged
    }

    pub fn reported(&self) -> Option<Reported> {
        self.talk().reported.clone()
    }

    pub fn newest_event(&self) -> u64 {
        self.talk().events.keys().next_back().copied().unwrap_or(0)
    }

    pub fn events_of(&self, kind: EventKind) -> Vec<Event> {
        let talk = self.talk();
        let of_kind = talk.events.values().filter(|event| event.kind == kind);
        of_kind.cloned().collect()
    }

    /// Numbers that were left out, and pairs of events that share one.
    pub fn event_faults(&self) -> (Vec<u64>, Vec<(Event, Event)>) {
        let talk = self.talk();
        let numbers: Vec<u64> = talk.events.keys().copied().collect();
        let gaps = numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1);
        (gaps.map(|pair| pair[0] + 1).collect(), talk.reused.clone())
    }
}

impl Talk {
    fn publish(&mut self, topic: &str, payload: Vec<u8>) {
        self.retained.insert(topic.to_owned(), payload);
        if self.subscribed.contains(topic) {
            self.send_retained(topic);
        }
    }

    fn send_retained(&mut self, topic: &str) {
        let Some(payload) = self.retained.get(topic).cloned() else {
            return;
        };
        self.next_id = self.next_id % 60_000 + 1;
        if topic.ends_with("/head") {
            let head: Head = frame::decode(&payload).unwrap();
            self.heads_sent.insert(self.next_id, head.version);
        }
        let mut body = text(topic);
        body.extend(self.next_id.to_be_bytes());
        body.push(0);
        body.extend(payload);
        // QoS 1, retained.
        self.send(0x33, &body);
    }

    fn send(&mut self, kind: u8, body: &[u8]) {
        let mut packet = vec![kind];
        let mut rest = body.len();
        while rest > 127 {
            packet.push(u8::try_from(rest & 127).unwrap() | 128);
            rest >>= 7;
        }
        packet.push(u8::try_from(rest).unwrap());
        packet.extend(body);
        if let Some(client) = &mut self.client
            && client.write_all(&packet).is_err()
        {
            self.client = None;
        }
    }

    fn hear(&mut self, topic: &str, payload: &[u8]) {
        if topic.ends_with("/reported") {
            self.reported = Some(frame::decode(payload).unwrap());
        } else if topic.ends_with("/event") {
            let Events { events, .. } = frame::decode(payload).unwrap();
            for event in events {
                match self.events.get(&event.seq) {
                    Some(other) if *other != event => self.reused.push((other.clone(), event)),
                    _ => drop(self.events.insert(event.seq, event)),
                }
            }
        }
    }

    /// What the hub says when it has stored what it heard; not to be acknowledged itself.
    fn acknowledge(&mut self, device: &DeviceId) {
        let order = Command::Ack {
            event: self.events.keys().next_back().copied().unwrap_or(0),
            reported: self.reported.as_ref().map_or(0, |report| report.seq),
            unix_ms: 0,
        };
        let mut body = text(&topic::device(device, Leaf::Command));
        body.push(0);
        body.extend(frame::encode(&order));
        self.send(0x30, &body);
    }
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = u16::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn serve(
    mut stream: TcpStream,
    number: u64,
    talk: &Mutex<Talk>,
    device: &DeviceId,
) -> io::Result<()> {
    loop {
        let (kind, body) = packet(&mut stream)?;
        let mut talk = talk.lock().unwrap();
        if kind >> 4 == 1 {
            talk.client = Some(stream.try_clone()?);
            talk.connection = number;
            talk.subscribed.clear();
            talk.heads_sent.clear();
            // No session was kept.
            talk.send(0x20, &[0, 0, 0]);
            continue;
        }
        if talk.connection != number {
            // A dead agent's last words, after its successor has come.
            return Ok(());
        }
        handle(&mut talk, device, kind, &body);
        if kind >> 4 == 14 {
            talk.client = None;
            return Ok(());
        }
    }
}

fn handle(talk: &mut Talk, device: &DeviceId, kind: u8, body: &[u8]) {
    match kind >> 4 {
        3 => {
            let qos = kind >> 1 & 3;
            let (topic, rest) = take_text(body);
            let (id, rest) = if qos > 0 {
                rest.split_at(2)
            } else {
                (&[][..], rest)
            };
            talk.hear(&topic, after_properties(rest));
            if qos > 0 {
                talk.send(0x40, id);
            }
            talk.acknowledge(device);
        }
        4 => {
            let id = u16::from_be_bytes([body[0], body[1]]);
            if let Some(version) = talk.heads_sent.remove(&id) {
                talk.acknowledged = talk.acknowledged.max(Some(version));
            }
        }
        8 => {
            let mut filters = after_properties(&body[2..]);
            let (mut topics, mut codes) = (Vec::new(), Vec::new());
            while !filters.is_empty() {
                let (topic, rest) = take_text(filters);
                filters = &rest[1..];
                topics.push(topic);
                codes.push(1);
            }
            talk.send(0x90, &[&body[..2], &[0], &codes].concat());
            for topic in topics {
                talk.subscribed.insert(topic.clone());
                talk.send_retained(&topic);
            }
        }
        10 => {
            let mut filters = after_properties(&body[2..]);
            let mut codes = Vec::new();
            while !filters.is_empty() {
                let (topic, rest) = take_text(filters);
                filters = rest;
                talk.subscribed.remove(&topic);
                codes.push(0);
            }
            talk.send(0xb0, &[&body[..2], &[0], &codes].concat());
        }
        12 => talk.send(0xd0, &[]),
        _ => {}
    }
}

fn packet(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let kind = byte[0];
    let (mut length, mut shift) = (0, 0);
    loop {
        stream.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 127) << shift;
        shift += 7;
        if byte[0] < 128 || shift > 21 {
            break;
        }
    }
    if length > PACKET_MAX {
        return Err(io::Error::other("a packet that is too large"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((kind, body))
}

fn take_text(body: &[u8]) -> (String, &[u8]) {
    let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
    let (text, rest) = body[2..].split_at(length);
    (String::from_utf8_lossy(text).into_owned(), rest)
}

/// Properties have a length in front, which here is below 128 bytes.
fn after_properties(body: &[u8]) -> &[u8] {
    assert!(body[0] < 128, "long properties are not read here");
    &body[1 + usize::from(body[0])..]
}
