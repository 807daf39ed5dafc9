//! The TLS side of `mqtts://`: rustls with the ring provider, and a CA file of the operator's.

use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// Where Debian and most others keep the system's certificates.
const SYSTEM_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificates cannot be read.
    #[error("failed to read certificates from {}", path.display())]
    Read {
        /// From where.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The file holds no certificate that could be trusted.
    #[error("{} holds no certificate authority in PEM; name one with [hub] ca_file", .0.display())]
    Empty(PathBuf),
    /// The provider offers no protocol version that we accept.
    #[error("failed to set up TLS")]
    Protocol(#[source] rustls::Error),
}

/// A client that trusts the certificates in `ca_file`, or the system's.
///
/// # Errors
///
/// See [`TlsError`].
pub(crate) fn client(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let path = ca_file.unwrap_or_else(|| Path::new(SYSTEM_BUNDLE));
    let read = |source| TlsError::Read {
        path: path.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
        // A bundle may hold some that rustls does not take; the others still count.
        let _left_out = roots.add(certificate.map_err(read)?);
    }
    if roots.is_empty() {
        return Err(TlsError::Empty(path.to_owned()));
    }
    let provider = rustls::crypto::ring::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Protocol)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}
