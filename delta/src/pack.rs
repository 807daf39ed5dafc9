//! zstd blocks with old bytes in front of them, as [`foreshore_images::delta::format`] has them.

use foreshore_images::delta::format::PATCH_MAX;
use zstd_safe::{CCtx, CParameter};

/// How hard zstd works: 1 to 22.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packer {
    pub(crate) level: i32,
}

/// The base-2 logarithm of [`PATCH_MAX`].
const WINDOW_LOG: u32 = PATCH_MAX.trailing_zeros();
/// The levels below find few matches far away by themselves: their tables hold only the nearest bytes.
const FAR_SIGHTED: i32 = 16;
/// Magic number, frame header descriptor and window descriptor.
const FRAME_HEADER: usize = 6;

impl Packer {
    /// `new` with `old` in front of it; together at most [`PATCH_MAX`] bytes.
    pub(crate) fn pack(self, old: &[u8], new: &[u8]) -> Vec<u8> {
        assert!(old.len() + new.len() <= PATCH_MAX, "it fits the window");
        let mut context = CCtx::create();
        for parameter in [
            CParameter::CompressionLevel(self.level),
            CParameter::WindowLog(WINDOW_LOG),
            CParameter::EnableLongDistanceMatching(self.level < FAR_SIGHTED),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
        ] {
            context
                .set_parameter(parameter)
                .map_err(zstd_safe::get_error_name)
                .expect("these are in range");
        }
        if !old.is_empty() {
            context
                .ref_prefix(old)
                .map_err(zstd_safe::get_error_name)
                .expect("nothing is being compressed yet");
        }
        let mut frame = Vec::with_capacity(zstd_safe::compress_bound(new.len()));
        context
            .compress2(&mut frame, new)
            .map_err(zstd_safe::get_error_name)
            .expect("the buffer is long enough");
        assert_eq!(
            frame.get(4),
            Some(&0),
            "the frame header has no optional fields"
        );
        frame.split_off(FRAME_HEADER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that do not compress (splitmix64).
    fn noise(length: usize, mut seed: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn old_bytes_are_found_at_every_level() {
        let old = noise(1900 << 10, 1);
        // A rebuilt program: pieces of the old one in another order, with a little that is new between them.
        let mut new = Vec::new();
        for (number, piece) in old.chunks(256 << 10).rev().enumerate() {
            new.extend_from_slice(piece);
            new.extend(noise(64, 100 + number as u64));
        }
        assert!(old.len() + new.len() <= PATCH_MAX);
        for level in [1, 3, 6, 9, 12, 15, 16, 19] {
            let packed = Packer { level }.pack(&old, &new);
            assert!(packed.len() < 16 << 10, "level {level}: {}", packed.len());
        }
    }
}
