//! Releases, as a device gets them from a hub that it does not believe.

use foreshore_protocol::Digest;
use foreshore_protocol::release::{MAX_RELEASE_BYTES, Release};

use crate::{accepted, memory};

/// One release.
///
/// # Panics
/// When it does not come back as written, or takes too much memory.
pub fn run(bytes: &[u8]) {
    let digest = Digest::of(bytes);
    let limit = (64 << 10) + 64 * bytes.len();
    let Ok(release) = memory::within(limit, || Release::from_bytes(bytes, &digest)) else {
        return;
    };
    accepted();
    assert!(Release::from_bytes(bytes, &Digest::of(b"other")).is_err());
    if release.to_canonical_json().len() <= MAX_RELEASE_BYTES {
        check(&release);
    }
}

/// Its canonical form is one, and a device takes it.
pub(crate) fn check(release: &Release) {
    let bytes = release.to_canonical_json();
    let again = Release::from_bytes(&bytes, &release.digest()).expect("a device takes it");
    assert_eq!(&again, release);
    assert_eq!(again.to_canonical_json(), bytes);
}
