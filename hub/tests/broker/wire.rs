//! A small MQTT client that does what it is told, also when that is wrong. Blocking, over plain TCP.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Everything that should happen happens within this time, also on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V3,
    V5,
}

pub(crate) const VERSIONS: [Version; 2] = [Version::V3, Version::V5];

#[derive(Debug, Clone)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) retain: bool,
    pub(crate) delay_s: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    pub(crate) client_id: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) clean: bool,
    /// MQTT 5 only.
    pub(crate) expiry_s: u32,
    pub(crate) keep_alive_s: u16,
    pub(crate) will: Option<Will>,
}

impl Connect {
    pub(crate) fn new(version: Version, name: &str, password: &str) -> Self {
        Self {
            version,
            client_id: name.to_owned(),
            user: Some(name.to_owned()),
            password: Some(password.to_owned()),
            clean: true,
            expiry_s: 0,
            keep_alive_s: 60,
            will: None,
        }
    }

    /// A session that outlives its connection by so much.
    pub(crate) fn lasting(mut self, expiry_s: u32) -> Self {
        self.clean = false;
        self.expiry_s = expiry_s;
        self
    }

    pub(crate) fn will(mut self, topic: &str, payload: &str, retain: bool) -> Self {
        self.will = Some(Will {
            topic: topic.to_owned(),
            payload: payload.as_bytes().to_vec(),
            retain,
            delay_s: 0,
        });
        self
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let v5 = self.version == Version::V5;
        let mut flags = u8::from(self.clean) << 1;
        let mut body = text("MQTT");
        body.push(if v5 { 5 } else { 4 });
        let mut payload = text(&self.client_id);
        if let Some(will) = &self.will {
            flags |= 0x04 | 0x08 | u8::from(will.retain) << 5;
            if v5 {
                let mut properties = vec![0x18];
                properties.extend(will.delay_s.to_be_bytes());
                payload.extend(sized(&properties));
            }
            payload.extend(text(&will.topic));
            payload.extend(binary(&will.payload));
        }
        if let Some(user) = &self.user {
            flags |= 0x80;
            payload.extend(text(user));
        }
        if let Some(password) = &self.password {
            flags |= 0x40;
            payload.extend(text(password));
        }
        body.push(flags);
        body.extend(self.keep_alive_s.to_be_bytes());
        if v5 {
            let mut properties = vec![0x11];
            properties.extend(self.expiry_s.to_be_bytes());
            body.extend(sized(&properties));
        }
        body.extend(payload);
        packet(0x10, &body)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) retain: bool,
    pub(crate) qos: u8,
}

/// What to publish.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outgoing<'a> {
    pub(crate) topic: &'a str,
    pub(crate) payload: &'a [u8],
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    /// MQTT 5 only.
    pub(crate) alias: Option<u16>,
}

#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    version: Version,
    next_id: u16,
    messages: VecDeque<Message>,
    pub(crate) session_present: bool,
}

/// The broker said no, or hung up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refused {
    Code(u8),
    /// "Server unavailable".
    Unavailable,
    Closed,
}

impl Client {
    pub(crate) fn open(address: SocketAddr, connect: &Connect) -> Result<Self, Refused> {
        let stream =
            TcpStream::connect_timeout(&address, SOON).expect("the broker accepts connections");
        stream.set_nodelay(true).expect("a socket");
        let mut client = Self {
            stream,
            version: connect.version,
            next_id: 0,
            messages: VecDeque::new(),
            session_present: false,
        };
        if client.send(&connect.encode()).is_err() {
            return Err(Refused::Closed);
        }
        match client.read(Instant::now() + SOON) {
            Ok((0x20, body)) if body.len() >= 2 && body[1] == 0 => {
                client.session_present = body[0] & 1 == 1;
                Ok(client)
            }
            Ok((0x20, body)) => match (connect.version, body.get(1).copied().unwrap_or(0xff)) {
                (Version::V3, 3) | (Version::V5, 0x88) => Err(Refused::Unavailable),
                (_, code) => Err(Refused::Code(code)),
            },
            Ok((kind, _)) => panic!("packet {kind:#x} instead of a CONNACK"),
            Err(error) if timed_out(&error) => panic!("no CONNACK within {SOON:?}"),
            Err(_) => Err(Refused::Closed),
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Publishes, and waits for the PUBACK if there is one to come; its code, 0 for none.
    pub(crate) fn publish(&mut self, outgoing: &Outgoing<'_>) -> io::Result<u8> {
        let id = self.post(outgoing)?;
        if outgoing.qos == 0 {
            return Ok(0);
        }
        self.await_ack(id)
    }

    /// Publishes and does not wait; the packet id.
    pub(crate) fn post(&mut self, outgoing: &Outgoing<'_>) -> io::Result<u16> {
        let mut body = text(outgoing.topic);
        let id = self.id();
        if outgoing.qos > 0 {
            body.extend(id.to_be_bytes());
        }
        if self.version == Version::V5 {
            let mut properties = Vec::new();
            if let Some(alias) = outgoing.alias {
                properties.push(0x23);
                properties.extend(alias.to_be_bytes());
            }
            body.extend(sized(&properties));
        }
        body.extend(outgoing.payload);
        self.send(&packet(
            0x30 | outgoing.qos << 1 | u8::from(outgoing.retain),
            &body,
        ))?;
        Ok(id)
    }

    /// Waits for a PUBACK; 0 or why not. "Nobody has subscribed" (0x10) is no refusal.
    pub(crate) fn await_ack(&mut self, id: u16) -> io::Result<u8> {
        self.answer(SOON, |kind, body| {
            let code = body.get(2).copied().filter(|code| *code >= 0x80);
            (kind == 0x40 && body.starts_with(&id.to_be_bytes())).then_some(code.unwrap_or(0))
        })
    }

    /// Subscribes with QoS 1; the code of the answer.
    pub(crate) fn subscribe(&mut self, filter: &str) -> io::Result<u8> {
        let id = self.id();
        let mut body = id.to_be_bytes().to_vec();
        if self.version == Version::V5 {
            body.push(0);
        }
        body.extend(text(filter));
        body.push(1);
        self.send(&packet(0x82, &body))?;
        self.answer(SOON, |kind, body| {
            (kind == 0x90 && body.starts_with(&id.to_be_bytes()))
                .then(|| body.last().copied().unwrap_or(0xff))
        })
    }

    /// Waits until the broker has worked through what was sent before.
    pub(crate) fn ping(&mut self) -> io::Result<()> {
        self.send(&[0xc0, 0])?;
        self.answer(SOON, |kind, _| (kind == 0xd0).then_some(()))
    }

    /// The next message, within a time.
    pub(crate) fn message(&mut self, within: Duration) -> io::Result<Message> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(message) = self.messages.pop_front() {
                return Ok(message);
            }
            let (kind, body) = self.read(deadline)?;
            self.take(kind, &body)?;
        }
    }

    /// Reads messages up to the one that `last` recognizes.
    pub(crate) fn messages_until(&mut self, last: impl Fn(&Message) -> bool) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.message(SOON).unwrap_or_else(|error| {
                panic!("{error}; the last message did not come after {messages:?}")
            });
            if last(&message) {
                return messages;
            }
            messages.push(message);
        }
    }

    /// Whether the broker hangs up within a time.
    pub(crate) fn is_closed_within(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            match self.read(deadline) {
                Ok((0xe0, _)) => return true,
                Ok((kind, body)) => {
                    if self.take(kind, &body).is_err() {
                        return true;
                    }
                }
                Err(error) => return !timed_out(&error),
            }
        }
    }

    /// Says goodbye, so that there is no Will, and waits until the broker has seen it.
    pub(crate) fn disconnect(mut self) {
        let _ = self.send(&[0xe0, 0]);
        // rmqtt leaves it to the client to close.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        assert!(
            self.is_closed_within(SOON),
            "the broker keeps a connection after a goodbye"
        );
    }

    fn id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.next_id
    }

    fn answer<T>(
        &mut self,
        within: Duration,
        expected: impl Fn(u8, &[u8]) -> Option<T>,
    ) -> io::Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let (kind, body) = self.read(deadline)?;
            if let Some(answer) = expected(kind, &body) {
                return Ok(answer);
            }
            self.take(kind, &body)?;
        }
    }

    /// Keeps a message and acknowledges it.
    fn take(&mut self, kind: u8, body: &[u8]) -> io::Result<()> {
        if kind & 0xf0 != 0x30 {
            return match kind {
                0xe0 => Err(io::ErrorKind::ConnectionAborted.into()),
                _ => Ok(()),
            };
        }
        let qos = kind >> 1 & 3;
        let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
        let topic = String::from_utf8(body[2..2 + length].to_vec()).expect("a topic is UTF-8");
        let mut rest = &body[2 + length..];
        if qos > 0 {
            let id = [rest[0], rest[1]];
            rest = &rest[2..];
            self.send(&packet(0x40, &id))?;
        }
        if self.version == Version::V5 {
            // A length below 128: properties here are few.
            rest = &rest[1 + usize::from(rest[0])..];
        }
        self.messages.push_back(Message {
            topic,
            payload: rest.to_vec(),
            retain: kind & 1 == 1,
            qos,
        });
        Ok(())
    }

    fn read(&mut self, deadline: Instant) -> io::Result<(u8, Vec<u8>)> {
        let kind = self.read_bytes(1, deadline)?[0];
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let byte = self.read_bytes(1, deadline)?[0];
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Ok((kind, self.read_bytes(length, deadline)?))
    }

    fn read_bytes(&mut self, count: usize, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        let mut filled = 0;
        while filled < count {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => filled += more,
                // A packet that has begun is read to its end, or the stream would be out of step.
                Err(error) if timed_out(&error) && filled == 0 => return Err(error),
                Err(error) if timed_out(&error) && Instant::now() < deadline + SOON => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }
}

pub(crate) fn timed_out(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(length(body.len()));
    bytes.extend(body);
    bytes
}

fn length(mut length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let byte = u8::try_from(length & 0x7f).expect("seven bits");
        length >>= 7;
        bytes.push(if length == 0 { byte } else { byte | 0x80 });
        if length == 0 {
            return bytes;
        }
    }
}

fn sized(properties: &[u8]) -> Vec<u8> {
    [length(properties.len()), properties.to_vec()].concat()
}

fn text(text: &str) -> Vec<u8> {
    binary(text.as_bytes())
}

fn binary(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("short");
    [&length.to_be_bytes(), bytes].concat()
}

impl Client {
    /// Sends bytes to a broker that may not like them, and leaves.
    pub(crate) fn scream(address: SocketAddr, bytes: &[u8]) {
        let mut stream =
            TcpStream::connect_timeout(&address, SOON).expect("the broker accepts connections");
        let _ = stream.write_all(bytes);
        let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
        let _ = stream.read(&mut [0; 64]);
    }

    /// Gives the broker a moment to answer anything at all.
    pub(crate) fn ping_within(&mut self, within: Duration) -> io::Result<()> {
        self.send(&[0xc0, 0])?;
        self.answer(within, |kind, _| (kind == 0xd0).then_some(()))
    }
}
