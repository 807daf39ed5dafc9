//! Compressed blobs: gzip and zstd of anybody's making.

use std::io::Read;

use foreshore_images::compression::decompress;

use crate::{accepted, memory};

/// What is read of a blob; the unpacker stops bombs far beyond.
const READ_MAX: u64 = 1 << 20;

/// The largest zstd window that is accepted, and what the decoders have besides.
const MEMORY_MAX: usize = (128 << 20) + (16 << 20);

/// One blob.
///
/// # Panics
/// When it depends on how it is read, its fault looks like one of the disk, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    let whole = memory::within(MEMORY_MAX, || read(bytes, READ_MAX));
    if whole.0.len() > 1 && whole.1.is_none() {
        accepted();
    }
    let twice = 2 * whole.0.len() as u64;
    if whole.1.is_none() && bytes.len() >= 4 && twice < READ_MAX {
        // Members and frames follow each other, as some tools write them.
        let again = read(&[bytes, bytes].concat()[..], READ_MAX);
        assert_eq!(again, (whole.0.repeat(2), None), "what follows is not read");
    }
    if whole.0.len() <= 16 << 10 {
        let pieces = read(FourAtOnce(bytes), READ_MAX);
        // How much comes out before a fault is found is left open.
        let same = match (&whole.1, &pieces.1) {
            (None, None) => whole.0 == pieces.0,
            (Some(_), Some(_)) => whole.0.starts_with(&pieces.0) || pieces.0.starts_with(&whole.0),
            _ => false,
        };
        assert!(same, "it depends on how it comes in: {whole:?}, {pieces:?}");
    }
}

fn read(source: impl Read, max: u64) -> (Vec<u8>, Option<String>) {
    let mut out = Vec::new();
    // Longer than a zstd block's header, and short enough to be filled often.
    let source = std::io::BufReader::with_capacity(4096, source);
    let result = decompress(source).and_then(|inflated| inflated.take(max).read_to_end(&mut out));
    let fault = result.err().map(|error| {
        assert!(
            error.raw_os_error().is_none(),
            "bad data looks like a bad disk"
        );
        error.to_string()
    });
    (out, fault)
}

/// Gives four bytes at a time: by so many the compression is told.
struct FourAtOnce<'b>(&'b [u8]);

impl Read for FourAtOnce<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(self.0.len()).min(4);
        self.0.read(&mut buffer[..length])
    }
}
