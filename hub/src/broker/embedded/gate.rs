//! The door for devices: it waits for a whole CONNECT, within bounds, before rmqtt hears of a connection.
//!
//! rmqtt reads the first bytes of a connection without a time limit and takes any number of connections (read in
//! rmqtt-net 0.5, `probe_version`), so that anybody in reach could use up the file descriptors of the whole hub.
//! The price is two more descriptors and about 5 kB for each device. With TLS the gate will go: rmqtt does
//! limit the time of a TLS handshake.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Limits;
use super::seldom::Seldom;

/// The largest CONNECT: names, a token and a Will of some hundred bytes.
const CONNECT_MAX: usize = 16 * 1024;

/// Copied at a time, each way. Control messages are mostly smaller.
const BUFFER_BYTES: usize = 2048;

/// A device that does not take a single byte for so long is gone.
const DEVICE_WRITE_WITHIN: Duration = Duration::from_secs(20);

/// rmqtt takes its time when a device sends too fast, but not so long.
const BROKER_WRITE_WITHIN: Duration = Duration::from_secs(60);

/// How long the broker's last words may take after a device has closed its side.
const LINGER: Duration = Duration::from_secs(5);

/// Connections that came to nothing are logged so often at most.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// A listening gate.
#[derive(Debug)]
pub(super) struct Gate {
    listener: TcpListener,
    address: SocketAddr,
    behind: SocketAddr,
    handshake_timeout: Duration,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    by_address: Arc<ByAddress>,
    turned_away: Seldom,
    given_up: Arc<Seldom>,
}

impl Gate {
    /// Listens on `address`; what passes goes on to `behind`.
    pub(super) fn bind(
        address: SocketAddr,
        behind: SocketAddr,
        limits: &Limits,
    ) -> io::Result<Self> {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        // A restarted hub finds its port again although old connections linger.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(1024)?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            behind,
            handshake_timeout: limits.handshake_timeout,
            connections: Arc::new(Semaphore::new(limits.connections)),
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            by_address: Arc::new(ByAddress::new(limits.handshakes_per_address)),
            turned_away: Seldom::new(LOG_EVERY),
            given_up: Arc::new(Seldom::new(LOG_EVERY)),
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets connections in until the future is dropped.
    pub(super) async fn run(&self) {
        loop {
            // Places come free within the time limit of a handshake; until then the kernel's queue holds the rest.
            let place = acquire(&self.handshakes).await;
            let (stream, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept an MQTT connection");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            let Some(turn) = self.by_address.enter(peer.ip()) else {
                self.turn_away(peer, "too many unfinished connections from this address");
                continue;
            };
            let Ok(connection) = self.connections.clone().try_acquire_owned() else {
                self.turn_away(peer, "the broker has as many connections as it may");
                continue;
            };
            let (behind, within) = (self.behind, self.handshake_timeout);
            let given_up = self.given_up.clone();
            tokio::spawn(async move {
                let introduced = timeout(within, introduce(stream, behind)).await;
                drop((place, turn));
                match introduced {
                    Ok(Ok((device, broker))) => carry(device, broker).await,
                    Ok(Err(error)) => {
                        tracing::debug!(%peer, %error, "a connection did not become an MQTT session");
                    }
                    Err(_) => {
                        if let Some(left_out) = given_up.due(Instant::now()) {
                            tracing::info!(%peer, left_out, "a client took too long to introduce itself");
                        }
                    }
                }
                drop(connection);
            });
        }
    }

    fn turn_away(&self, peer: SocketAddr, reason: &str) {
        if let Some(left_out) = self.turned_away.due(Instant::now()) {
            tracing::warn!(%peer, reason, left_out, "the broker turned a connection away");
        }
    }
}

async fn acquire(places: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    places
        .clone()
        .acquire_owned()
        .await
        .expect("the semaphore is never closed")
}

/// Reads a whole CONNECT and opens a connection to the broker with it.
async fn introduce(
    mut device: TcpStream,
    behind: SocketAddr,
) -> io::Result<(TcpStream, TcpStream)> {
    device.set_nodelay(true)?;
    let connect = read_connect(&mut device).await?;
    let mut broker = TcpStream::connect(behind).await?;
    broker.set_nodelay(true)?;
    broker.write_all(&connect).await?;
    Ok((device, broker))
}

/// The bytes of one CONNECT packet, and not one more.
async fn read_connect(device: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut packet = vec![device.read_u8().await?];
    if packet[0] != 0x10 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first packet is not a CONNECT",
        ));
    }
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        let byte = device.read_u8().await?;
        packet.push(byte);
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
        if shift > 21 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the length of the CONNECT is malformed",
            ));
        }
    }
    if length > CONNECT_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the CONNECT is too large",
        ));
    }
    let header = packet.len();
    // Grows with what has come, not with what was announced.
    device.take(length as u64).read_to_end(&mut packet).await?;
    if packet.len() - header < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(packet)
}

/// Carries bytes both ways until one side is done.
async fn carry(mut device: TcpStream, mut broker: TcpStream) {
    let (from_device, to_device) = device.split();
    let (from_broker, to_broker) = broker.split();
    let down = pump(from_broker, to_device, DEVICE_WRITE_WITHIN);
    let up = pump(from_device, to_broker, BROKER_WRITE_WITHIN);
    tokio::pin!(down, up);
    tokio::select! {
        // The broker has closed: nothing that the device still says matters.
        _ = &mut down => {}
        result = &mut up => {
            if result.is_ok() {
                // The device has closed its side, and may still read what is on its way.
                let _ = timeout(LINGER, down).await;
            }
        }
    }
}

/// Copies until the end, and passes the end on. Every write is bounded in time.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    write_within: Duration,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        timeout(write_within, to.write_all(&buffer[..count])).await??;
    }
}

/// Unfinished connections by address.
#[derive(Debug)]
struct ByAddress {
    most: usize,
    count: Mutex<HashMap<IpAddr, usize>>,
}

impl ByAddress {
    fn new(most: usize) -> Self {
        Self {
            most,
            count: Mutex::default(),
        }
    }

    /// A turn for one more, unless there are too many already. Loopback is not counted: there all of a machine's
    /// programs, and test beds with thousands of agents, share one address.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Turn> {
        let address = address.to_canonical();
        if !address.is_loopback() {
            let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            let unfinished = count.entry(address).or_insert(0);
            if *unfinished >= self.most {
                return None;
            }
            *unfinished += 1;
        }
        Some(Turn {
            of: self.clone(),
            address,
        })
    }
}

/// Gives the turn back when dropped.
#[derive(Debug)]
struct Turn {
    of: Arc<ByAddress>,
    address: IpAddr,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.address.is_loopback() {
            return;
        }
        let mut count = self.of.count.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(unfinished) = count.get_mut(&self.address) {
            *unfinished -= 1;
            if *unfinished == 0 {
                count.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
#[path = "gate/tests.rs"]
mod tests;
