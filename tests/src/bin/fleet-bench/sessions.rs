//! Devices as real MQTT sessions: each a TCP connection from an address of its own in 127.0.0.0/8.

use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, BytesMut};
use rumqttc::{Packet, mqttbytes};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::device::{Device, News};
use crate::tally::Tally;

/// Connections that have no CONNACK yet.
const HANDSHAKES: usize = 200;

/// How long that may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(20);

/// The largest packet from the broker.
const PACKET_MAX: u32 = 128 * 1024;

/// Sessions whose segments are counted.
pub(crate) const SAMPLE: usize = 100;

/// What all devices are told by the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Nothing,
    /// The beacon that comes within a minute after an update, now.
    Beacon,
    /// What keeps the connection open.
    Ping,
    End,
}

/// What sessions share.
#[derive(Debug)]
pub(crate) struct Sessions {
    pub(crate) broker: SocketAddr,
    pub(crate) token: String,
    pub(crate) tally: Arc<Tally>,
    pub(crate) news: Sender<(usize, News)>,
    /// Sockets of the first [`SAMPLE`] devices.
    pub(crate) sample: Mutex<Vec<OwnedFd>>,
    pub(crate) lost: Mutex<Vec<String>>,
}

impl Sessions {
    /// Connects this many devices and keeps them until they are told to end.
    pub(crate) async fn run(self: Arc<Self>, devices: usize, orders: watch::Receiver<Order>) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..devices {
            let place = Arc::clone(&handshakes).acquire_owned().await;
            let (sessions, mut orders) = (Arc::clone(&self), orders.clone());
            tasks.spawn_local(async move {
                let mut device = Box::new(Device::new(number));
                let mut place = place.ok();
                loop {
                    let session = sessions.session(number, &mut device, &mut orders, &mut place);
                    let ended = Box::pin(session).await;
                    if *orders.borrow() == Order::End {
                        break;
                    }
                    if let Err(why) = ended {
                        let lost = format!("{}: {why:#}", device.id());
                        sessions.lost.lock().expect("no panic").push(lost);
                    }
                    // As agents do, though without their jitter: how often is told.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn session<P>(
        &self,
        number: usize,
        device: &mut Device,
        orders: &mut watch::Receiver<Order>,
        handshake: &mut Option<P>,
    ) -> anyhow::Result<()> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((address(number), 0)))?;
        let stream = tokio::time::timeout(HANDSHAKE_WITHIN, socket.connect(self.broker))
            .await
            .context("the broker does not answer")??;
        if number < SAMPLE {
            let copy = stream.as_fd().try_clone_to_owned()?;
            self.sample.lock().expect("no panic").push(copy);
        }
        let (until, mut connected) = (Instant::now() + HANDSHAKE_WITHIN, false);
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        let mut packets = vec![device.connect(&self.token)];
        loop {
            self.write(&stream, &mut packets, &mut output).await?;
            for news in device.news.drain(..) {
                // The bench may have ended.
                _ = self.news.send((number, news));
            }
            let wake = if connected {
                device.wake_at()
            } else {
                Some(until)
            };
            tokio::select! {
                ready = stream.readable() => {
                    ready?;
                    receive(&stream, &mut input)?;
                    while let Some((packet, bytes)) = next(&mut input)? {
                        self.tally.down(&packet, bytes);
                        match &packet {
                            Packet::ConnAck(answer) => {
                                if answer.code != rumqttc::ConnectReturnCode::Success {
                                    bail!("refused: {:?}", answer.code);
                                }
                                (*handshake, connected) = (None, true);
                            }
                            Packet::Disconnect(why) => bail!("the broker said {:?}", why.reason_code),
                            _ => {}
                        }
                        device.handle(packet, Instant::now(), &mut packets);
                    }
                }
                () = at(wake) => {
                    if !connected {
                        bail!("no CONNACK within {HANDSHAKE_WITHIN:?}");
                    }
                    device.go_on(Instant::now(), &mut packets);
                }
                changed = orders.changed() => {
                    changed?;
                    match *orders.borrow_and_update() {
                        Order::Nothing => {}
                        Order::Beacon => packets.push(device.beacon()),
                        Order::Ping => packets.push(Packet::PingReq),
                        Order::End => return Ok(()),
                    }
                }
            }
        }
    }

    async fn write(
        &self,
        stream: &TcpStream,
        packets: &mut Vec<Packet>,
        output: &mut BytesMut,
    ) -> anyhow::Result<()> {
        for packet in packets.drain(..) {
            let bytes = packet.write(output, None)?;
            self.tally.up(&packet, bytes);
        }
        while !output.is_empty() {
            stream.writable().await?;
            match stream.try_write(output) {
                Ok(written) => output.advance(written),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Thousands of sessions are idle: none keeps a buffer.
        *output = BytesMut::new();
        *packets = Vec::new();
        Ok(())
    }
}

/// Where device `number` comes from: no two of 16 million from the same.
fn address(number: usize) -> Ipv4Addr {
    let [_, high, middle, low] = u32::try_from(number + (1 << 16)).unwrap_or(0).to_be_bytes();
    Ipv4Addr::new(127, high, middle, low)
}

async fn at(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake.into()).await,
        None => std::future::pending().await,
    }
}

fn receive(stream: &TcpStream, input: &mut BytesMut) -> anyhow::Result<()> {
    thread_local! {
        static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; 64 * 1024]);
    }
    SCRATCH.with_borrow_mut(|scratch| match stream.try_read(scratch) {
        Ok(0) => bail!("the broker closed the connection"),
        Ok(read) => {
            input.extend_from_slice(&scratch[..read]);
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error.into()),
    })
}

/// The next whole packet and how many bytes it took.
pub(crate) fn next(input: &mut BytesMut) -> anyhow::Result<Option<(Packet, usize)>> {
    let before = input.len();
    if before == 0 {
        *input = BytesMut::new();
        return Ok(None);
    }
    match Packet::read(input, Some(PACKET_MAX)) {
        Ok(packet) => Ok(Some((packet, before - input.len()))),
        Err(mqttbytes::Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(error).context("the broker sends what is no packet"),
    }
}
