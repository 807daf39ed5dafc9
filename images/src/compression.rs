//! The compressions of layers and archives: none, gzip and zstd, told apart by their first bytes.
//!
//! The media type is not asked: registries are full of layers whose media type and bytes disagree, and Docker
//! and containerd go by the bytes, too.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The largest zstd window that is accepted, in bytes, since that much memory is taken: what
/// `zstd --ultra -22` uses (2^27). zstd itself also refuses more by default.
const ZSTD_WINDOW_MAX: u64 = 128 << 20;

/// A reader of what `source` holds uncompressed; all members of a gzip file, all frames of a zstd file.
///
/// Errors that come from bad data have no OS error code; those of `source` keep theirs.
///
/// # Errors
/// Those of reading the first bytes of `source`.
pub fn decompress<'a, R: BufRead + 'a>(mut source: R) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression(source.fill_buf()?) {
        Compression::Gzip => Box::new(MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(ZstdFrames::new(source)),
        Compression::None => Box::new(source),
    })
}

/// What the first bytes of something say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// `head` are the first four bytes, or all there are.
pub(crate) fn compression(head: &[u8]) -> Compression {
    let zstd_frame = head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let skippable_frame =
        head.len() >= 4 && head[0] & 0xf0 == 0x50 && head[1..4] == [0x2a, 0x4d, 0x18];
    if head.starts_with(&[0x1f, 0x8b]) {
        Compression::Gzip
    } else if zstd_frame || skippable_frame {
        Compression::Zstd
    } else {
        Compression::None
    }
}

/// Every frame of a zstd stream, one after the other; skippable frames are skipped (RFC 8878, section 3).
///
/// `zstd -T`, pzstd and zstd:chunked write several frames, the last also skippable ones.
struct ZstdFrames<R> {
    source: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> ZstdFrames<R> {
    fn new(source: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(ZSTD_WINDOW_MAX);
        Self {
            source,
            decoder,
            inside: false,
        }
    }

    /// Goes to the next frame; false at the end.
    fn open_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped =
                        io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.inside {
                if !self.open_frame()? {
                    return Ok(0);
                }
                self.inside = true;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.decoder.is_finished() {
                self.inside = false;
                continue;
            }
            self.decoder
                .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn plain_and_empty_pass_through() {
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"P").unwrap(), b"P");
        assert_eq!(read(b"plain text").unwrap(), b"plain text");
    }

    #[test]
    fn every_gzip_member_is_read() {
        let both = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
        assert_eq!(read(&both).unwrap(), b"one two");
        assert!(read(&both[..both.len() - 3]).is_err(), "cut off");
        let mut garbled = both;
        let end = garbled.len();
        garbled[end - 6] ^= 1;
        assert!(read(&garbled).is_err(), "checksum");
    }

    #[test]
    fn every_zstd_frame_is_read_and_skippable_ones_are_skipped() {
        let big = vec![7; 300_000];
        let skippable = [&[0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        let stream = [
            skippable.clone(),
            zstd(b"one "),
            skippable.clone(),
            zstd(&big),
            skippable,
        ]
        .concat();
        assert_eq!(read(&stream).unwrap(), [&b"one "[..], &big].concat());
        assert!(
            read(&stream[..stream.len() - 1]).is_err(),
            "cut off in a skippable frame"
        );
        assert!(read(&zstd(&big)[..20]).is_err(), "cut off in a frame");
    }

    #[test]
    fn a_window_that_takes_too_much_memory_is_refused() {
        // Frame header: no flags, window descriptor exponent 20 (2^30), then one raw empty last block.
        let error = read(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 0x01, 0x00, 0x00]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
