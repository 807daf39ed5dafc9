//! The files of the old image: by path, by content, by likeness.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;

use foreshore_images::Digest;
use foreshore_images::delta::contents::{What, contents};
use sha2::{Digest as _, Sha256};

use crate::sample::{Sample, samples};

/// Files shorter than this are not looked for by likeness.
const ALIKE_MIN: u64 = 4 << 10;
/// Places with the same mark that are looked at: more say nothing.
const SAME_MARK_MAX: usize = 16;
/// The largest file that is sampled, in bytes.
const SAMPLED_MAX: u64 = 1 << 30;

/// An uncompressed layer on this disk.
#[derive(Debug)]
pub struct Spooled {
    file: File,
    /// Of the stream.
    pub diff_id: Digest,
    /// Bytes of the stream.
    pub size: u64,
}

impl Spooled {
    /// Takes the uncompressed stream of a layer.
    ///
    /// # Errors
    /// Any of reading the layer or writing a temporary file.
    pub fn fill(mut layer: impl Read) -> io::Result<Self> {
        let mut file = tempfile::tempfile()?;
        let mut hasher = Sha256::new();
        let mut size = 0;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = match layer.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            hasher.update(&buffer[..count]);
            file.write_all(&buffer[..count])?;
            size += count as u64;
        }
        Ok(Self {
            file,
            diff_id: Digest::from_bytes(hasher.finalize().into()),
            size,
        })
    }

    /// Bytes of the stream from `offset` on.
    ///
    /// # Errors
    /// When they are not there.
    pub(crate) fn bytes(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    pub(crate) fn contents(&self) -> io::Result<Vec<foreshore_images::delta::contents::Found>> {
        let mut file = &self.file;
        file.rewind()?;
        contents(BufReader::with_capacity(256 << 10, file))
    }

    pub(crate) fn digest(&self, offset: u64, size: u64) -> io::Result<Digest> {
        let mut hasher = Sha256::new();
        let mut at = offset;
        while at < offset + size {
            let length =
                usize::try_from(offset + size - at).map_or(256 << 10, |n| n.min(256 << 10));
            hasher.update(self.bytes(at, length)?);
            at += length as u64;
        }
        Ok(Digest::from_bytes(hasher.finalize().into()))
    }
}

/// A file of the old image.
#[derive(Debug)]
pub(crate) struct OldFile {
    /// The layer it is in.
    pub(crate) tree: usize,
    pub(crate) path: Vec<u8>,
    offset: u64,
    pub(crate) size: u64,
}

/// The files of the old image's layers.
#[derive(Debug)]
pub struct Old {
    layers: Vec<Spooled>,
    files: Vec<OldFile>,
    by_path: BTreeMap<Vec<u8>, usize>,
    by_content: BTreeMap<Digest, usize>,
    by_stem: BTreeMap<Vec<u8>, Vec<usize>>,
    /// Sorted by their marks.
    samples: Vec<(Sample, u32)>,
}

impl Old {
    /// Looks through the layers of the old image, lowest first.
    ///
    /// # Errors
    /// When a layer cannot be read.
    pub fn new(layers: Vec<Spooled>) -> io::Result<Self> {
        let mut listed = Vec::new();
        let mut links = BTreeSet::new();
        for (tree, layer) in layers.iter().enumerate() {
            listed.push(files_of(layer, tree, &mut links)?);
        }
        let mut old = Self {
            layers,
            files: Vec::new(),
            by_path: BTreeMap::new(),
            by_content: BTreeMap::new(),
            by_stem: BTreeMap::new(),
            samples: Vec::new(),
        };
        // Where the path leads over a link the unpacker put the file elsewhere.
        for file in listed.into_iter().flatten() {
            if !leads_over(&file.path, &links) {
                old.add(file)?;
            }
        }
        old.samples.sort_unstable();
        Ok(old)
    }

    fn add(&mut self, file: OldFile) -> io::Result<()> {
        let index = self.files.len();
        let layer = &self.layers[file.tree];
        self.by_content
            .insert(layer.digest(file.offset, file.size)?, index);
        self.by_path.insert(file.path.clone(), index);
        self.by_stem
            .entry(stem(&file.path))
            .or_default()
            .push(index);
        if (ALIKE_MIN..=SAMPLED_MAX).contains(&file.size) {
            let length = usize::try_from(file.size).map_err(io::Error::other)?;
            let bytes = layer.bytes(file.offset, length)?;
            let number = u32::try_from(index).map_err(io::Error::other)?;
            self.samples
                .extend(samples(&bytes).map(|sample| (sample, number)));
        }
        self.files.push(file);
        Ok(())
    }

    /// The diff id of a layer.
    #[must_use]
    pub fn diff_id(&self, tree: usize) -> Digest {
        self.layers[tree].diff_id
    }

    pub(crate) fn file(&self, index: usize) -> &OldFile {
        &self.files[index]
    }

    pub(crate) fn bytes(&self, index: usize, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let file = &self.files[index];
        self.layers[file.tree].bytes(file.offset + offset, length)
    }

    /// A file with this content, that at `path` first.
    pub(crate) fn equal(&self, content: &Digest, path: &[u8]) -> io::Result<Option<usize>> {
        let Some(any) = self.by_content.get(content) else {
            return Ok(None);
        };
        if let Some(same) = self.by_path.get(path) {
            let file = &self.files[*same];
            if file.size == self.files[*any].size
                && self.layers[file.tree].digest(file.offset, file.size)? == *content
            {
                return Ok(Some(*same));
            }
        }
        Ok(Some(*any))
    }

    /// The file that `path` was called before: the same path, or one that differs in its numbers only.
    pub(crate) fn named(&self, path: &[u8], size: u64) -> Option<usize> {
        self.by_path.get(path).copied().or_else(|| {
            let others = self.by_stem.get(&stem(path))?;
            others
                .iter()
                .copied()
                .min_by_key(|index| self.files[*index].size.abs_diff(size))
        })
    }

    /// Files that have places of `bytes`, with where these are in them, most first.
    pub(crate) fn alike(&self, bytes: &[u8]) -> Vec<(usize, Vec<u64>)> {
        let mut found: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for sample in samples(bytes) {
            let from = self
                .samples
                .partition_point(|(other, _)| other.mark < sample.mark);
            let same = self.samples[from..]
                .iter()
                .take_while(|(other, _)| other.mark == sample.mark)
                .take(SAME_MARK_MAX);
            for (other, file) in same {
                found.entry(*file).or_default().push(other.at);
            }
        }
        let mut found: Vec<(usize, Vec<u64>)> = found
            .into_iter()
            .filter_map(|(file, places)| Some((usize::try_from(file).ok()?, places)))
            .collect();
        found.sort_by_key(|(_, places)| std::cmp::Reverse(places.len()));
        found
    }
}

/// The files that a layer leaves, and its symbolic links.
fn files_of(
    layer: &Spooled,
    tree: usize,
    links: &mut BTreeSet<Vec<u8>>,
) -> io::Result<Vec<OldFile>> {
    let mut files: BTreeMap<Vec<u8>, (u64, u64)> = BTreeMap::new();
    for found in layer.contents()? {
        match found.what {
            What::File { offset, size } => {
                files.insert(found.path, (offset, size));
            }
            What::HardLink { to } => match files.get(&to).copied() {
                Some(file) => {
                    files.insert(found.path, file);
                }
                None => {
                    files.remove(&found.path);
                }
            },
            What::Symlink => {
                files.remove(&found.path);
                links.insert(found.path);
            }
            What::Directory | What::Other => {
                files.remove(&found.path);
            }
        }
    }
    Ok(files
        .into_iter()
        .map(|(path, (offset, size))| OldFile {
            tree,
            path,
            offset,
            size,
        })
        .collect())
}

fn leads_over(path: &[u8], links: &BTreeSet<Vec<u8>>) -> bool {
    path.iter()
        .enumerate()
        .any(|(at, byte)| *byte == b'/' && links.contains(&path[..at]))
}

/// A path with `#` for each number: `lib/libx.so.1.2` and `lib/libx.so.1.13` have the same.
fn stem(path: &[u8]) -> Vec<u8> {
    let mut stem = Vec::with_capacity(path.len());
    for byte in path {
        match byte {
            b'0'..=b'9' if stem.last() == Some(&b'#') => {}
            b'0'..=b'9' => stem.push(b'#'),
            other => stem.push(*other),
        }
    }
    stem
}
