//! Tries the way to the broker: its name, a TCP connection, the TLS handshake. Says nothing of MQTT: a session with
//! the device's name would end the one of a running agent.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConnection};

use super::Said;
use super::child::say;
use crate::causes::chain;
use crate::config::{BrokerUrl, Config, HubConfig};
use crate::doctor::facts::{Connect, Handshake};
use crate::link;

/// How long the connection may take over all addresses, and the handshake after that.
const STEP: Duration = Duration::from_secs(5);

/// Addresses that are tried; a name with more of them is not a hub's.
const ADDRESSES_MAX: usize = 8;

pub(super) fn examine(config: &Path) {
    // The doctor has read it before, so there is nobody to tell.
    let Ok(config) = Config::load(config) else {
        return;
    };
    let HubConfig {
        broker, ca_file, ..
    } = &config.hub;
    let addresses = match (broker.host.as_str(), broker.port).to_socket_addrs() {
        Ok(addresses) => addresses.take(ADDRESSES_MAX).collect::<Vec<_>>(),
        Err(error) => {
            let why = Some(error.to_string());
            return say(&Said::Addresses {
                found: Vec::new(),
                why,
            });
        }
    };
    say_addresses(&addresses);
    let Some(stream) = connect(&addresses) else {
        return;
    };
    if broker.tls {
        let how = handshake(broker, ca_file.as_deref(), stream);
        say(&Said::Tls { how });
    }
}

fn say_addresses(addresses: &[SocketAddr]) {
    let mut found: Vec<String> = addresses.iter().map(|at| at.ip().to_string()).collect();
    found.dedup();
    let why = found.is_empty().then(|| "the answer is empty".to_owned());
    say(&Said::Addresses { found, why });
}

/// Connects to the first address that answers, and tells how it went; the last failure if none does.
fn connect(addresses: &[SocketAddr]) -> Option<TcpStream> {
    let begin = Instant::now();
    let mut how = Connect::Silent;
    for (index, address) in addresses.iter().enumerate() {
        // What is left, in equal parts: an address family without a route must not eat up the other's time.
        let left = STEP.saturating_sub(begin.elapsed());
        let others = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let Some(part) = left.checked_div(others).filter(|part| !part.is_zero()) else {
            break;
        };
        match TcpStream::connect_timeout(address, part) {
            Ok(stream) => {
                let ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
                let address = address.to_string();
                say(&Said::Connect {
                    how: Connect::Connected { address, ms },
                });
                return Some(stream);
            }
            Err(error) => how = why_not(&error),
        }
    }
    say(&Said::Connect { how });
    None
}

fn why_not(error: &io::Error) -> Connect {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => Connect::Refused,
        Kind::TimedOut | Kind::WouldBlock => Connect::Silent,
        Kind::HostUnreachable
        | Kind::NetworkUnreachable
        | Kind::NetworkDown
        | Kind::AddrNotAvailable => Connect::NoRoute,
        _ => Connect::Failed(error.to_string()),
    }
}

fn handshake(broker: &BrokerUrl, ca_file: Option<&Path>, mut stream: TcpStream) -> Handshake {
    let client = match link::tls_client(ca_file) {
        Ok(client) => client,
        Err(error) => return Handshake::NoRoots(chain(&error)),
    };
    let name = match ServerName::try_from(broker.host.clone()) {
        Ok(name) => name,
        Err(error) => return Handshake::Failed(error.to_string()),
    };
    let mut connection = match ClientConnection::new(Arc::new(client), name) {
        Ok(connection) => connection,
        Err(error) => return Handshake::Failed(error.to_string()),
    };
    let until = Instant::now() + STEP;
    while connection.is_handshaking() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Handshake::Silent;
        }
        let timed = stream
            .set_read_timeout(Some(left))
            .and_then(|()| stream.set_write_timeout(Some(left)));
        if let Err(error) = timed {
            return Handshake::Failed(error.to_string());
        }
        match connection.complete_io(&mut stream) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return failed(&error),
        }
    }
    let version = connection.protocol_version();
    let version = version.and_then(|version| version.as_str());
    Handshake::Verified(
        version
            .unwrap_or("TLS")
            .replace('_', ".")
            .replacen("TLSv", "TLS ", 1),
    )
}

fn failed(error: &io::Error) -> Handshake {
    use rustls::Error as Tls;
    if matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    ) {
        return Handshake::Silent;
    }
    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Tls>())
    else {
        // A broker without TLS drops what it does not understand.
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Handshake::NotTls,
            _ => Handshake::Failed(error.to_string()),
        };
    };
    match tls {
        Tls::InvalidMessage(_) => Handshake::NotTls,
        Tls::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                Handshake::UnknownIssuer
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                Handshake::Expired
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Handshake::NotYetValid
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Handshake::OtherName
            }
            other => Handshake::Failed(format!("the certificate is no good: {other}")),
        },
        other => Handshake::Failed(other.to_string()),
    }
}
