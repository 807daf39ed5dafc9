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
