//! Packed bytes: zstd blocks that may point back into old bytes in front of them ("patch-from").
//!
//! The blocks of a delta have no frame around them. This side writes the frame's header itself, so that no delta can ask
//! for a larger window, and then hands the old bytes to the decoder as raw blocks: what follows finds them
//! where a dictionary of raw content would be, and they are in memory once.

use std::io::{self, Read};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::DeltaError;
use super::format::{PATCH_MAX, raw_block_header};

/// No checksum, no content size, no dictionary; a window of 2^22 = [`PATCH_MAX`] bytes (RFC 8878, section 3.1.1.1).
const FRAME: [u8; 6] = [0x28, 0xb5, 0x2f, 0xfd, 0, 12 << 3];
/// The longest block.
const BLOCK: usize = 128 << 10;

/// Unpacks one piece after the other.
pub(super) struct Blocks {
    decoder: FrameDecoder,
}

impl Blocks {
    pub(super) fn new() -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(PATCH_MAX as u64);
        Self { decoder }
    }

    /// Unpacks `packed` bytes of `source` to `length` bytes behind the `old_length` ones of `old`; then they can be
    /// [read](Self::read). The two lengths together are at most [`PATCH_MAX`].
    pub(super) fn unpack(
        &mut self,
        mut old: impl Read,
        old_length: usize,
        source: impl Read,
        packed: usize,
        length: usize,
    ) -> Result<(), DeltaError> {
        let decoder = &mut self.decoder;
        decoder.reset(&FRAME[..]).map_err(bad)?;
        let mut left = old_length;
        while left > 0 {
            let piece = left.min(BLOCK);
            let header = raw_block_header(piece);
            let block = header.chain(Read::by_ref(&mut old).take(piece as u64));
            decoder
                .decode_blocks(block, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(|error| DeltaError::Old(Box::new(error)))?;
            left -= piece;
        }
        let mut source = source.take(packed as u64);
        while !decoder.is_finished() {
            decoder
                .decode_blocks(&mut source, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(bad)?;
            // Something is only ready before the end when there is more than a window, and so too much.
            if !decoder.is_finished() && decoder.can_collect() > 0 {
                return Err(DeltaError::Malformed("a patch that makes too much"));
            }
        }
        if source.limit() > 0 || decoder.can_collect() != old_length + length {
            return Err(DeltaError::Malformed(
                "a patch of another length than it says",
            ));
        }
        let passed = Read::by_ref(decoder).take(old_length as u64);
        io::copy(&mut { passed }, &mut io::sink())
            .map_err(|error| DeltaError::Old(error.into()))?;
        Ok(())
    }

    /// What was unpacked last, from where the last call stopped; 0 at its end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buffer)
    }
}

fn bad(error: ruzstd::decoding::errors::FrameDecoderError) -> DeltaError {
    DeltaError::Unpack(Box::new(error))
}
