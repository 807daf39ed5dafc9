//! A broker without sockets to devices, for more of them than the machine has file descriptors for. The hub is connected
//! to it by real MQTT, as to any external broker; devices live in the same task, and their packets are handed over.
//!
//! It does what the hub relies on: it acknowledges, it keeps manifests of releases and the hub's own topic, and it sends the
//! hub no more than its Receive Maximum at once.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use foreshore_protocol::topic::{self, Topic};
use rumqttc::{
    ConnAck, ConnAckProperties, ConnectReturnCode, Packet, PubAck, Publish, QoS, SubAck,
    SubscribeReasonCode, UnsubAck, UnsubAckReason,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::device::{self, Device, News};
use crate::sessions::{Order, next};
use crate::tally::Tally;

/// While so many messages wait for the hub no further device joins.
const JOIN_BELOW: usize = 2_000;

/// Bytes that are written to the hub at once.
const OUTPUT_MAX: usize = 256 * 1024;

/// Parts of the stand-in.
#[derive(Debug)]
pub(crate) struct StandIn {
    tally: Arc<Tally>,
    news: Sender<(usize, News)>,
    devices: Vec<Device>,
    numbers: HashMap<String, usize>,
    /// How many devices have joined, the first ones.
    joined: usize,
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    /// For which time each device is among the timers.
    timed: Vec<Option<Instant>>,
    retained: HashMap<Bytes, Publish>,
    /// Who waits for the manifest of a release that has not come yet.
    wanted: HashMap<Bytes, Vec<usize>>,
    hub: Hub,
}

/// The hub's session.
#[derive(Debug, Default)]
struct Hub {
    subscribed: usize,
    receive_maximum: usize,
    unacknowledged: usize,
    packet: u16,
    waiting: VecDeque<Publish>,
    output: BytesMut,
}

impl StandIn {
    /// One for this many devices.
    pub(crate) fn new(devices: usize, tally: Arc<Tally>, news: Sender<(usize, News)>) -> Self {
        let numbers = (0..devices).map(|number| (device::name(number), number));
        Self {
            tally,
            news,
            numbers: numbers.collect(),
            devices: (0..devices).map(Device::new).collect(),
            joined: 0,
            timers: BinaryHeap::new(),
            timed: vec![None; devices],
            retained: HashMap::new(),
            wanted: HashMap::new(),
            hub: Hub::default(),
        }
    }

    /// Serves the hub until the order to end.
    pub(crate) async fn run(
        mut self,
        listener: TcpListener,
        mut orders: watch::Receiver<Order>,
    ) -> anyhow::Result<()> {
        let stream = loop {
            let (stream, _) = listener.accept().await?;
            // Somebody who only looks whether there is a listener closes at once.
            if stream.peek(&mut [0]).await? > 0 {
                break stream;
            }
        };
        stream.set_nodelay(true)?;
        let mut input = BytesMut::new();
        loop {
            self.join()?;
            let now = Instant::now();
            while let Some(Reverse((at, number))) = self.timers.peek().copied()
                && now >= at
            {
                self.timers.pop();
                if self.timed[number] != Some(at) {
                    // Another one is earlier.
                    continue;
                }
                self.timed[number] = None;
                let mut out = Vec::new();
                self.devices[number].go_on(now, &mut out);
                // It may have nothing to send now, and more to do later.
                self.time(number);
                self.follow(number, out)?;
            }
            self.hub.send()?;
            write(&stream, &mut self.hub.output).await?;
            let wake = self.timers.peek().map(|Reverse((at, _))| *at);
            let wake = wake.unwrap_or(now + Duration::from_secs(60));
            tokio::select! {
                ready = stream.readable() => {
                    ready?;
                    if !read(&stream, &mut input)? {
                        bail!("the hub closed its connection");
                    }
                    while let Some((packet, _)) = next(&mut input)? {
                        self.hear(packet)?;
                    }
                }
                ready = stream.writable(), if !self.hub.output.is_empty() => ready?,
                () = tokio::time::sleep_until(wake.into()) => {}
                changed = orders.changed() => {
                    changed?;
                    let order = *orders.borrow_and_update();
                    if order == Order::End {
                        return Ok(());
                    }
                    for number in 0..self.joined {
                        let packet = match order {
                            Order::Beacon => self.devices[number].beacon(),
                            Order::Ping => Packet::PingReq,
                            Order::Nothing | Order::End => break,
                        };
                        self.follow(number, vec![packet])?;
                    }
                }
            }
        }
    }

    /// Lets devices join once the hub listens to everything, as fast as it takes them.
    fn join(&mut self) -> anyhow::Result<()> {
        // The hub's own topic, four leaves of all devices and two of each shard.
        while self.hub.subscribed >= 1 + 4 + 512
            && self.joined < self.devices.len()
            && self.hub.waiting.len() < JOIN_BELOW
        {
            let number = self.joined;
            self.joined += 1;
            let connect = self.devices[number].connect("none");
            self.follow(number, vec![connect])?;
        }
        Ok(())
    }

    /// Takes what a device sends, answers it, and so on until it has nothing more to say now.
    fn follow(&mut self, number: usize, out: Vec<Packet>) -> anyhow::Result<()> {
        let mut out = VecDeque::from(out);
        while let Some(packet) = out.pop_front() {
            self.tally.up(&packet, packet.size());
            let mut answers = Vec::new();
            match packet {
                Packet::Connect(..) => answers.push(Packet::ConnAck(ConnAck {
                    session_present: false,
                    code: ConnectReturnCode::Success,
                    properties: None,
                })),
                Packet::PingReq => answers.push(Packet::PingResp),
                Packet::Subscribe(subscribe) => {
                    answers.push(Packet::SubAck(SubAck {
                        pkid: subscribe.pkid,
                        return_codes: vec![SubscribeReasonCode::Success(QoS::AtLeastOnce)],
                        properties: None,
                    }));
                    for filter in subscribe.filters {
                        let topic = Bytes::from(filter.path);
                        if let Some(kept) = self.retained.get(&topic) {
                            answers.push(Packet::Publish(kept.clone()));
                        } else if matches!(
                            Topic::parse(std::str::from_utf8(&topic)?),
                            Some(Topic::Release(_))
                        ) {
                            self.wanted.entry(topic).or_default().push(number);
                        }
                    }
                }
                Packet::Unsubscribe(unsubscribe) => answers.push(Packet::UnsubAck(UnsubAck {
                    pkid: unsubscribe.pkid,
                    reasons: vec![UnsubAckReason::Success],
                    properties: None,
                })),
                Packet::Publish(publish) => {
                    if publish.qos == QoS::AtLeastOnce {
                        answers.push(Packet::PubAck(PubAck::new(publish.pkid, None)));
                    }
                    self.hub.waiting.push_back(publish);
                }
                _ => {}
            }
            for answer in answers {
                out.extend(self.tell(number, answer));
            }
        }
        Ok(())
    }

    /// Hands a packet to a device; what it answers.
    fn tell(&mut self, number: usize, packet: Packet) -> Vec<Packet> {
        self.tally.down(&packet, packet.size());
        let (mut out, device) = (Vec::new(), &mut self.devices[number]);
        device.handle(packet, Instant::now(), &mut out);
        for news in device.news.drain(..) {
            // The bench may have ended.
            _ = self.news.send((number, news));
        }
        self.time(number);
        out
    }

    /// Sees to it that the device goes on when it wants to.
    fn time(&mut self, number: usize) {
        if let Some(wake) = self.devices[number].wake_at()
            && self.timed[number].is_none_or(|timed| wake < timed)
        {
            self.timed[number] = Some(wake);
            self.timers.push(Reverse((wake, number)));
        }
    }

    fn hear(&mut self, packet: Packet) -> anyhow::Result<()> {
        match packet {
            Packet::Connect(connect, ..) => {
                let asked = connect.properties.and_then(|asked| asked.receive_maximum);
                self.hub.receive_maximum = asked.map_or(65_535, usize::from);
                self.hub.answer(&Packet::ConnAck(ConnAck {
                    session_present: false,
                    code: ConnectReturnCode::Success,
                    properties: None::<ConnAckProperties>,
                }))?;
            }
            Packet::PingReq => self.hub.answer(&Packet::PingResp)?,
            Packet::Subscribe(subscribe) => {
                self.hub.subscribed += subscribe.filters.len();
                self.hub.answer(&Packet::SubAck(SubAck {
                    pkid: subscribe.pkid,
                    return_codes: vec![
                        SubscribeReasonCode::Success(QoS::AtLeastOnce);
                        subscribe.filters.len()
                    ],
                    properties: None,
                }))?;
            }
            Packet::PubAck(_) => {
                self.hub.unacknowledged = self.hub.unacknowledged.saturating_sub(1)
            }
            Packet::Publish(publish) => {
                if publish.qos == QoS::AtLeastOnce {
                    self.hub
                        .answer(&Packet::PubAck(PubAck::new(publish.pkid, None)))?;
                }
                self.deliver(publish)?;
            }
            Packet::Disconnect(_) => bail!("the hub ended its session"),
            _ => {}
        }
        Ok(())
    }

    fn deliver(&mut self, mut publish: Publish) -> anyhow::Result<()> {
        publish.pkid = 1;
        let topic = std::str::from_utf8(&publish.topic).context("a topic is text")?;
        let to = match Topic::parse(topic) {
            Some(Topic::Device(device, _)) => {
                let number = self.numbers.get(device.as_str()).copied();
                publish.retain = false;
                number.into_iter().collect()
            }
            Some(Topic::Release(_)) => {
                self.retained.insert(publish.topic.clone(), publish.clone());
                self.wanted.remove(&publish.topic).unwrap_or_default()
            }
            Some(Topic::Hub) => {
                self.retained.insert(topic::HUB.into(), publish.clone());
                (0..self.joined).collect()
            }
            None => Vec::new(),
        };
        for number in to {
            let answers = self.tell(number, Packet::Publish(publish.clone()));
            self.follow(number, answers)?;
        }
        Ok(())
    }
}

impl Hub {
    fn answer(&mut self, packet: &Packet) -> anyhow::Result<()> {
        packet.write(&mut self.output, None)?;
        Ok(())
    }

    /// Makes packets of what waits, as far as the hub takes them now.
    fn send(&mut self) -> anyhow::Result<()> {
        while self.output.len() < OUTPUT_MAX
            && self.unacknowledged < self.receive_maximum
            && let Some(mut publish) = self.waiting.pop_front()
        {
            publish.retain = false;
            if publish.qos == QoS::AtLeastOnce {
                self.packet = self.packet.checked_add(1).unwrap_or(1);
                publish.pkid = self.packet;
                self.unacknowledged += 1;
            }
            publish.write(&mut self.output)?;
        }
        Ok(())
    }
}

/// False at the end of the stream.
fn read(stream: &TcpStream, input: &mut BytesMut) -> std::io::Result<bool> {
    let mut scratch = [0; 16 * 1024];
    loop {
        match stream.try_read(&mut scratch) {
            Ok(0) => return Ok(false),
            Ok(read) => input.extend_from_slice(&scratch[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// As much as the socket takes.
async fn write(stream: &TcpStream, output: &mut BytesMut) -> std::io::Result<()> {
    while !output.is_empty() {
        match stream.try_write(output) {
            Ok(written) => output.advance(written),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::task::yield_now().await;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
