//! Ways for the fuzz targets (`fuzz/`) into what is private here. Nothing else uses them, and nothing may.

use std::io::Read;

use crate::Digest;
use crate::signature::{Signature, TrustedKey};
use crate::tar_stream::{Extent, TarStream};

/// An entry of an archive as the tar reader gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// As written.
    pub path: Vec<u8>,
    /// As written.
    pub link: Vec<u8>,
    /// Its type, for comparing.
    pub kind: String,
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset and length of each piece of a sparse file.
    pub extents: Option<Vec<(u64, u64)>>,
    /// The stored bytes.
    pub body: Vec<u8>,
}

/// Every entry up to the archive's end or first fault, and that fault.
pub fn tar_entries(archive: impl Read) -> (Vec<TarEntry>, Option<String>) {
    let mut stream = TarStream::new(archive);
    let mut found = Vec::new();
    loop {
        let entry = match stream.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => return (found, None),
            Err(error) => return (found, Some(error.to_string())),
        };
        let mut body = Vec::new();
        let read = stream.read_to_end(&mut body);
        let pair = |extent: &Extent| (extent.offset, extent.length);
        found.push(TarEntry {
            path: entry.path,
            link: entry.link,
            kind: format!("{:?}", entry.kind),
            size: entry.size,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: (entry.mtime.seconds, entry.mtime.nanos),
            xattrs: entry.xattrs,
            extents: entry.extents.map(|all| all.iter().map(pair).collect()),
            body,
        });
        if let Err(error) = read {
            return (found, Some(error.to_string()));
        }
    }
}

/// The signed texts in a bundle, or in a file of kept signatures, by which one of `keys` says that `digest` is right.
#[must_use]
pub fn vouching(bytes: &[u8], digest: &Digest, keys: &[TrustedKey]) -> Vec<String> {
    let mut signatures = Signature::in_bundle(bytes);
    signatures.extend(serde_json::from_slice::<Vec<Signature>>(bytes).unwrap_or_default());
    signatures
        .into_iter()
        .filter(|signature| signature.vouches(digest, keys))
        .map(Signature::into_payload)
        .collect()
}
