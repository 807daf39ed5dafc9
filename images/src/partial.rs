//! [`PartialBlob`]: a blob on its way in that may be interrupted at any point, power cuts included, and goes on from
//! there.
//!
//! ```text
//! ROOT/partial/HEX          what has come so far
//! ROOT/partial/HEX.sums     a CRC-32 (little endian) for each whole piece of it
//! ```
//!
//! The checksums make what is there worth something after a power cut: file systems may then show a file of the
//! right length that is full of zeros. Opening reads the pieces again, into the hash that the whole blob needs anyway,
//! and cuts the file where one is not what it was. They find accidents only; that the blob is the right one is said
//! by its SHA-256 at the end.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use foreshore_killpoint as killpoint;
use sha2::{Digest as _, Sha256};

use crate::Digest;

/// How much one checksum covers, and so how much a power cut costs besides what was not flushed.
const PIECE: usize = 256 << 10;
/// After so many bytes the file is flushed, if [`FLUSH_EVERY`] has passed as well.
const FLUSH_BYTES: u64 = 512 << 10;
/// On a fast link what a power cut costs is measured in time, and flushing each piece would cost more.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// Where partial blobs are; see the module.
#[derive(Debug, Clone)]
pub struct PartialDir {
    path: PathBuf,
}

/// One of them, open for writing. Only one process may have it open: the store's lock sees to that.
#[derive(Debug)]
pub struct PartialBlob {
    file: File,
    sums: File,
    hasher: Sha256,
    size: u64,
    /// Of the bytes behind the last whole piece.
    piece: crc32fast::Hasher,
    flushed: u64,
    flushed_at: Instant,
}

impl PartialDir {
    /// Opens the directory, creating it if needed.
    ///
    /// # Errors
    /// Any error of creating it.
    pub fn open(root: &Path) -> io::Result<Self> {
        let path = root.join("partial");
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    /// Where the bytes of a blob are.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.path.join(digest.hex())
    }

    fn sums_path(&self, digest: &Digest) -> PathBuf {
        self.path.join(format!("{}.sums", digest.hex()))
    }

    /// Opens what there is of a blob of `size` bytes, or begins it. Reads all of it.
    ///
    /// # Errors
    /// Any error of the disk.
    pub fn blob(&self, digest: &Digest, size: u64) -> io::Result<PartialBlob> {
        let open = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
        };
        let mut file = open(&self.path(digest))?;
        let mut sums = open(&self.sums_path(digest))?;
        let mut hasher = Sha256::new();
        let good = verify(&mut file, &mut sums, size, &mut hasher)?;
        file.set_len(good)?;
        sums.set_len(good.div_ceil(PIECE as u64) * 4)?;
        file.seek(SeekFrom::End(0))?;
        sums.seek(SeekFrom::End(0))?;
        Ok(PartialBlob {
            file,
            sums,
            hasher,
            size: good,
            piece: crc32fast::Hasher::new(),
            flushed: good,
            flushed_at: Instant::now(),
        })
    }

    /// Bytes of it on this disk, checked or not.
    pub(crate) fn size(&self, digest: &Digest) -> u64 {
        fs::symlink_metadata(self.path(digest)).map_or(0, |meta| meta.len())
    }

    /// Removes one; nothing happens if it is not there.
    ///
    /// # Errors
    /// Any other error of removing it.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        for path in [self.path(digest), self.sums_path(digest)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => killpoint::reached("partial", "removed"),
            }
        }
        Ok(())
    }

    /// Removes all for which `keep` is false and returns how many bytes that freed. Names that are no digests go, too.
    ///
    /// # Errors
    /// Any error of reading the directory or removing a file.
    pub fn retain(&self, keep: impl Fn(&Digest) -> bool) -> io::Result<u64> {
        let mut freed = 0;
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let hex = name.strip_suffix(".sums").unwrap_or(&name);
            let kept = format!("sha256:{hex}")
                .parse()
                .is_ok_and(|digest| keep(&digest));
            if !kept {
                freed += entry.metadata().map_or(0, |meta| meta.len());
                fs::remove_file(entry.path())?;
            }
        }
        Ok(freed)
    }
}

/// How many bytes from the start are what they were; they are in the hash then.
fn verify(file: &mut File, sums: &mut File, size: u64, hasher: &mut Sha256) -> io::Result<u64> {
    let mut good = 0;
    let mut piece = vec![0; PIECE];
    let mut sum = [0; 4];
    while good < size {
        // The last piece of a whole blob is shorter.
        let length = usize::try_from(size - good).map_or(PIECE, |left| left.min(PIECE));
        let whole = read_whole(sums, &mut sum)? && read_whole(file, &mut piece[..length])?;
        if !whole || crc32fast::hash(&piece[..length]) != u32::from_le_bytes(sum) {
            break;
        }
        hasher.update(&piece[..length]);
        good += length as u64;
    }
    Ok(good)
}

/// Fills the buffer; false when the file ends before that.
fn read_whole(file: &mut File, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

impl PartialBlob {
    /// Bytes that are there.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The digest of what is there.
    pub(crate) fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// Appends; a reader of the file sees it when this returns.
    ///
    /// # Errors
    /// Any error of the disk; [`PartialDir::blob`] then finds what is whole.
    pub(crate) fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let filled = usize::try_from(self.size % PIECE as u64).expect("less than a piece");
            let (now, rest) = bytes.split_at(bytes.len().min(PIECE - filled));
            self.file.write_all(now)?;
            killpoint::reached("partial", "appended");
            self.hasher.update(now);
            self.piece.update(now);
            self.size += now.len() as u64;
            if filled + now.len() == PIECE {
                self.close_piece()?;
            }
            bytes = rest;
        }
        Ok(())
    }

    fn close_piece(&mut self) -> io::Result<()> {
        let sum = std::mem::take(&mut self.piece).finalize();
        self.sums.write_all(&sum.to_le_bytes())?;
        if self.size - self.flushed >= FLUSH_BYTES && self.flushed_at.elapsed() >= FLUSH_EVERY {
            self.file.sync_data()?;
            self.sums.sync_data()?;
            self.flushed = self.size;
            self.flushed_at = Instant::now();
        }
        Ok(())
    }

    /// Says that nothing will be appended, so that the last piece counts, too.
    ///
    /// # Errors
    /// Any error of the disk.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if !self.size.is_multiple_of(PIECE as u64) {
            let sum = std::mem::take(&mut self.piece).finalize();
            self.sums.write_all(&sum.to_le_bytes())?;
        }
        Ok(())
    }

    /// Forgets everything: what is there is not what it should be.
    ///
    /// # Errors
    /// Any error of the disk.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        for file in [&mut self.file, &mut self.sums] {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
        }
        self.hasher = Sha256::new();
        self.piece = crc32fast::Hasher::new();
        self.size = 0;
        self.flushed = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 3 * PIECE + 1000;

    fn bytes() -> Vec<u8> {
        (0_u32..)
            .take(SIZE)
            .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect()
    }

    fn begun(root: &Path, count: usize) -> (PartialDir, Digest) {
        let dir = PartialDir::open(root).unwrap();
        let digest = Digest::of(&bytes());
        let mut blob = dir.blob(&digest, SIZE as u64).unwrap();
        for piece in bytes()[..count].chunks(70_001) {
            blob.append(piece).unwrap();
        }
        if count == SIZE {
            blob.finish().unwrap();
        }
        (dir, digest)
    }

    #[test]
    fn what_came_is_kept_in_whole_pieces_and_goes_on() {
        for count in [
            0,
            1,
            PIECE - 1,
            PIECE,
            2 * PIECE + 5,
            3 * PIECE,
            SIZE - 1,
            SIZE,
        ] {
            let root = tempfile::tempdir().unwrap();
            let (dir, digest) = begun(root.path(), count);
            let mut blob = dir.blob(&digest, SIZE as u64).unwrap();
            let kept = if count == SIZE {
                SIZE
            } else {
                count - count % PIECE
            };
            assert_eq!(blob.size(), kept as u64, "{count}");
            blob.append(&bytes()[kept..]).unwrap();
            assert_eq!((blob.size(), blob.digest()), (SIZE as u64, digest));
            assert_eq!(fs::read(dir.path(&digest)).unwrap(), bytes());
        }
    }

    #[test]
    fn what_a_power_cut_spoiled_is_cut_off() {
        type Spoil = fn(&Path, &Path);
        let spoil: [(&str, Spoil); 5] = [
            ("zeros", |file, _| write_at(file, PIECE + 7, &[0; 4096])),
            ("a flipped bit", |file, _| {
                write_at(file, 2 * PIECE - 1, &[bytes()[2 * PIECE - 1] ^ 1]);
            }),
            ("a torn sum", |_, sums| {
                File::options()
                    .write(true)
                    .open(sums)
                    .unwrap()
                    .set_len(6)
                    .unwrap();
            }),
            ("zeros for a sum", |_, sums| write_at(sums, 4, &[0; 4])),
            ("a shorter file", |file, _| {
                File::options()
                    .write(true)
                    .open(file)
                    .unwrap()
                    .set_len(2 * PIECE as u64 - 1)
                    .unwrap();
            }),
        ];
        for (name, spoil) in spoil {
            let root = tempfile::tempdir().unwrap();
            let (dir, digest) = begun(root.path(), SIZE);
            spoil(&dir.path(&digest), &dir.sums_path(&digest));
            let mut blob = dir.blob(&digest, SIZE as u64).unwrap();
            assert_eq!(blob.size(), PIECE as u64, "{name}");
            blob.append(&bytes()[PIECE..]).unwrap();
            assert_eq!(blob.digest(), digest, "{name}");
        }
        // Another blob's size: whatever is longer than declared goes.
        let root = tempfile::tempdir().unwrap();
        let (dir, digest) = begun(root.path(), SIZE);
        let blob = dir.blob(&digest, PIECE as u64).unwrap();
        assert_eq!(blob.size(), PIECE as u64);
        assert_eq!(dir.size(&digest), PIECE as u64);
    }

    fn write_at(path: &Path, at: usize, bytes: &[u8]) {
        use std::os::unix::fs::FileExt as _;
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
    }

    #[test]
    fn only_what_is_wanted_stays() {
        let root = tempfile::tempdir().unwrap();
        let (dir, digest) = begun(root.path(), PIECE);
        let other = Digest::of(b"other");
        dir.blob(&other, 10).unwrap().append(b"12345").unwrap();
        fs::write(root.path().join("partial/nonsense"), "x").unwrap();
        assert_eq!(dir.retain(|found| *found == digest).unwrap(), 6);
        assert_eq!((dir.size(&digest), dir.size(&other)), (PIECE as u64, 0));
        dir.remove(&digest).unwrap();
        assert_eq!(
            fs::read_dir(root.path().join("partial")).unwrap().count(),
            0
        );
    }
}
