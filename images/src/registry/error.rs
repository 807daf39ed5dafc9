//! [`FetchError`]: why something did not come from a registry.

use std::error::Error;
use std::io;
use std::time::Duration;

use crate::manifest::DocumentError;
use crate::{Digest, Fault};

/// Why something was not fetched. `what` is the image or blob with its repository and digest or tag; `host` the
/// registry as the reference names it. No message holds credentials or tokens.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The registry does not have it.
    #[error("registry {host} does not have {what}; check its name, or push it there")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The registry refuses it to us.
    #[error(
        "registry {host} refuses {what} (HTTP {status}); it is private or does not exist: \
         configure username and password for this registry, or check their rights"
    )]
    Denied {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// 401 or 403.
        status: u16,
    },
    /// No connection, or it broke.
    #[error(
        "registry {host} cannot be reached for {what}; check the network, the host name and its certificate"
    )]
    Unreachable {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What the connection said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Nothing came for too long, or the whole took too long.
    #[error("registry {host} is too slow or hangs: {what} did not come in time")]
    TimedOut {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// An answer that is neither yes nor no.
    #[error("registry {host} answers HTTP {status} for {what}{}", if *.status == 429 { "; it limits the rate, try later" } else { "" })]
    Status {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
        /// How long it wants to be left alone (`Retry-After`).
        retry_after: Option<Duration>,
    },
    /// Something else answers, such as the login page of a network.
    #[error(
        "registry {host} answers for {what} with \"{media_type}\", which is no image; \
         is there a captive portal or a proxy in between?"
    )]
    NotARegistry {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The media type that came.
        media_type: String,
    },
    /// More than the limit for its kind.
    #[error("{what} at registry {host} is larger than the limit of {max} bytes")]
    TooLarge {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The limit in bytes.
        max: u64,
    },
    /// Not the bytes that the digest names.
    #[error(
        "registry {host} sent wrong bytes for {what}: their digest is {found}; push the image again"
    )]
    DigestMismatch {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The digest of what came.
        found: Digest,
    },
    /// Not as many bytes as were declared.
    #[error(
        "registry {host} sent {found} bytes for {what} where {declared} were declared; push the image again"
    )]
    SizeMismatch {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// Bytes as the manifest declares.
        declared: u64,
        /// Bytes as the registry announces or sends; reading stops one after those declared.
        found: u64,
    },
    /// Sent elsewhere in a way that is not followed.
    #[error("registry {host} redirects {what} {problem}")]
    Redirect {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The token server did not give a token.
    #[error("registry {host} sends us to {realm} for a token to read {what}, {problem}")]
    Token {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The token server, without its query.
        realm: String,
        /// What went wrong there.
        problem: String,
        /// Whether that may pass by itself.
        transient: bool,
    },
    /// The index or manifest cannot be used.
    #[error("{what} at registry {host} is not an image that can be used")]
    Document {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// Not now: [`super::ClientConfig::gate`] is closed.
    #[error("{what} is not fetched now: {reason}")]
    Deferred {
        /// What was to be fetched.
        what: String,
        /// What the gate said.
        reason: String,
    },
    /// What was fetched could not be written.
    #[error("cannot write {what}")]
    Sink {
        /// What was being fetched.
        what: String,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
}

impl FetchError {
    /// Which class it falls into.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::NotFound { .. } | Self::Denied { .. } => Fault::NotFound,
            Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Status { .. }
            | Self::NotARegistry { .. }
            | Self::Redirect { .. }
            | Self::Token { .. } => Fault::Unreachable,
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } => Fault::DigestMismatch,
            Self::TooLarge { .. } | Self::Document { .. } => Fault::BadImage,
            Self::Deferred { .. } => Fault::Deferred,
            Self::Sink { source, .. } if is_disk_full(source) => Fault::DiskFull,
            Self::Sink { .. } => Fault::Internal,
        }
    }

    /// Whether trying again later, with nothing changed here, may help. True for wrong bytes, too: what is right
    /// is known, and a cache in between may come to its senses.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status >= 500 || matches!(status, 408 | 425 | 429),
            Self::Token { transient, .. } => *transient,
            Self::Redirect { .. } => false,
            _ => matches!(
                self.fault(),
                Fault::Unreachable | Fault::DigestMismatch | Fault::DiskFull | Fault::Deferred
            ),
        }
    }
}

impl FetchError {
    /// Whether it is about this device rather than about a registry, so that asking another would not help.
    pub(super) const fn is_ours(&self) -> bool {
        matches!(self, Self::Sink { .. })
    }

    /// Whether trying again within seconds may help: [`is_transient`](Self::is_transient) without what takes somebody to
    /// do something. Too few bytes may be a connection that ended, too many are none.
    pub(super) fn may_pass_soon(&self) -> bool {
        match self {
            Self::NotARegistry { .. } | Self::DigestMismatch { .. } | Self::Deferred { .. } => {
                false
            }
            Self::SizeMismatch {
                declared, found, ..
            } => found < declared,
            other => other.is_transient() && !other.is_ours(),
        }
    }
}

/// Whether an I/O error says that the disk, or our quota of it, is full.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
