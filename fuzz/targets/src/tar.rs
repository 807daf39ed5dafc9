//! The tar reader, without unpacking.

use std::io::Read;

use foreshore_images::delta::contents::{What, contents};
use foreshore_images::fuzz::{TarEntry, tar_entries};

use crate::{accepted, memory};

const BLOCK: usize = 512;

/// One uncompressed archive.
///
/// # Panics
/// When it depends on how it is read, an entry has what no file has, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    let limit = (64 << 10) + 64 * bytes.len();
    let (entries, fault) = memory::within(limit, || tar_entries(bytes));
    if !entries.is_empty() {
        accepted();
    }
    let pieces = tar_entries(Short(bytes));
    assert_eq!(
        (&entries, &fault),
        (&pieces.0, &pieces.1),
        "it depends on how it comes in"
    );
    let stored: usize = entries.iter().map(|entry| entry.body.len()).sum();
    assert!(stored <= bytes.len());
    for entry in &entries {
        check(entry);
    }
    // The last may be cut off.
    let whole = entries.len() - usize::from(fault.is_some() && !entries.is_empty());
    for entry in &entries[..whole] {
        let pieces = entry.extents.iter().flatten();
        let total: u64 = pieces.map(|(_, length)| length).sum();
        let size = if entry.extents.is_some() {
            total
        } else {
            entry.body.len() as u64
        };
        assert_eq!(
            entry.body.len() as u64,
            size,
            "a sparse file's pieces are not what is stored"
        );
    }
    files_are_where_they_are_said_to_be(bytes, &entries);
}

fn check(entry: &TarEntry) {
    assert!(entry.mode <= 0o7777 && entry.mtime.1 < 1_000_000_000);
    assert!(entry.uid != u32::MAX && entry.gid != u32::MAX);
    let Some(extents) = &entry.extents else {
        return;
    };
    let mut end = 0;
    let mut total = 0_u64;
    for (offset, length) in extents {
        assert!(*offset >= end, "pieces overlap");
        end = offset.checked_add(*length).expect("it ends somewhere");
        assert!(end <= entry.size, "a piece is outside of its file");
        total += length;
    }
    assert!(entry.body.len() as u64 <= total);
}

/// What makes deltas and what unpacks them agree on where the bytes of files stand.
fn files_are_where_they_are_said_to_be(bytes: &[u8], entries: &[TarEntry]) {
    let found = contents(bytes).expect("memory can be read");
    assert!(found.len() <= entries.len());
    let mut bodies = entries.iter();
    for file in found {
        assert!(!file.path.is_empty() && !file.path.starts_with(b"/"));
        let parts = || file.path.split(|byte| *byte == b'/');
        assert!(parts().all(|part| !matches!(part, b"" | b"." | b"..")));
        let What::File { offset, size } = file.what else {
            continue;
        };
        let (Ok(offset), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else {
            continue;
        };
        // The last of an archive that is cut off is listed before its bytes are missed.
        let Some(content) = bytes.get(offset..offset.saturating_add(size)) else {
            continue;
        };
        let same = |entry: &TarEntry| entry.kind == "File" && entry.body == content;
        assert!(bodies.any(same), "the bytes of a file are elsewhere");
    }
}

/// Gives 1 to 13 bytes at a time.
struct Short<'b>(&'b [u8]);

impl Read for Short<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(1 + self.0.len() % 13);
        self.0.read(&mut buffer[..length])
    }
}

/// Gives the headers of a mutated archive right checksums, so that it is read as far as it goes.
pub fn repair(bytes: &mut [u8]) {
    let compressed = [&[0x1f, 0x8b][..], &[0x28, 0xb5, 0x2f, 0xfd]];
    if compressed.iter().any(|magic| bytes.starts_with(magic)) {
        return;
    }
    let mut at = 0;
    while let Some(header) = bytes.get_mut(at..at + BLOCK) {
        let size = number(&header[124..136]);
        if header.iter().any(|byte| *byte != 0) {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        // Links and directories have no content whatever they say.
        let stored = if matches!(header[156], b'1'..=b'6') {
            0
        } else {
            size
        };
        at = at
            .saturating_add(BLOCK)
            .saturating_add(stored.next_multiple_of(BLOCK));
    }
}

/// An octal number; what is none counts as nothing.
fn number(digits: &[u8]) -> usize {
    let digits = digits.iter().skip_while(|byte| **byte == b' ');
    digits
        .take_while(|byte| matches!(byte, b'0'..=b'7'))
        .fold(0, |sum, digit| {
            (sum * 8 + usize::from(digit - b'0')) % (1 << 30)
        })
}
