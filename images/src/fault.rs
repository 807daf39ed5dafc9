//! [`Fault`]: the few classes that every error of this crate falls into.

/// What kind of thing went wrong: what a caller decides and reports by.
///
/// Every error enum of this crate has a `fault()` and an `is_transient()`; the message holds the details.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The image, tag or blob is not there, or we may not read it.
    NotFound,
    /// The registry did not answer, not in time, or not as a registry.
    Unreachable,
    /// Bytes did not have the digest or size that was declared for them.
    DigestMismatch,
    /// The image has no variant for the platform asked for.
    NoMatchingPlatform,
    /// The image or archive is broken, hostile or beyond a limit.
    BadImage,
    /// The image is not signed by whom the policy trusts.
    Unsigned,
    /// Not enough disk space.
    DiskFull,
    /// The device does not fetch now, for example since its link costs money.
    Deferred,
    /// Another process holds the store.
    Busy,
    /// The configuration is wrong (a host, a URL, a CA file).
    Config,
    /// Anything else, such as an I/O error of the local disk.
    Internal,
}
