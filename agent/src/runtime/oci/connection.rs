//! TCP connections from inside a container's network namespace.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpSocket, TcpStream};

use crate::runtime::process::PidFd;

/// Connects to `port` on loopback, IPv4 first. A socket belongs to the namespace it was made in, so only its making
/// happens there; the waiting does not. `container` is a process in the namespace, `own` the way back.
pub(super) async fn connect(
    container: Option<&PidFd>,
    own: &File,
    port: u16,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let first = attempt(
        container,
        own,
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
    );
    let second = || {
        attempt(
            container,
            own,
            SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port),
        )
    };
    let either = async {
        match first.await {
            Ok(stream) => Ok(stream),
            // The first error is the one that says something on a device without IPv6.
            Err(error) => second().await.map_err(|_| error),
        }
    };
    tokio::time::timeout(timeout, either)
        .await
        .unwrap_or_else(|_| {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no connection within {timeout:?}"),
            ))
        })
}

async fn attempt(
    container: Option<&PidFd>,
    own: &File,
    address: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = match container {
        None => socket(address)?,
        Some(container) => {
            setns(container.fd(), CloneFlags::CLONE_NEWNET)?;
            let socket = socket(address);
            if setns(own, CloneFlags::CLONE_NEWNET).is_err() {
                // Everything this thread did from here on would happen in the container's network.
                std::process::abort();
            }
            socket?
        }
    };
    socket.connect(address).await
}

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
}
