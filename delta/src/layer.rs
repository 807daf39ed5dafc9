//! The delta of one layer.

use std::collections::BTreeMap;
use std::io::{self, Write};

use foreshore_images::Digest;
use foreshore_images::delta::contents::What;
use foreshore_images::delta::format::{self, Effort, MAGIC, Operation, PATCH_MAX, PLAN_MAX};

use crate::old::{Old, Spooled};
use crate::pack::Packer;

/// Files shorter than this are written out: naming another would take as much.
const WORTH_NAMING: u64 = 128;
/// New bytes of one patch when old and new do not fit together.
const PIECE: usize = 1 << 20;
/// Old bytes that a patch may lean on in any case.
const OLD_MIN: usize = 64 << 10;
/// Old bytes for each new one that a patch may lean on; [`Effort`] allows them.
const OLD_TIMES: usize = 16;
/// Content that is written into the plan when nothing old helps, so that neighbours help each other.
const INTO_PLAN: usize = 64 << 10;
/// A plan is closed when it is as long as this: what is added at once still fits.
const PLAN_FULL: usize = PLAN_MAX - LITERAL - 8192;
/// The longest literal.
const LITERAL: usize = 256 << 10;
/// Bytes of patches that are kept in memory.
const PATCHES_MAX: usize = 64 << 20;

/// What came of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The old layers that the delta leans on, in the order it numbers them.
    pub trees: Vec<Digest>,
}

/// Writes the delta that makes `new` of `old` to `out`. `level` is zstd's, 1 to 22.
///
/// # Errors
/// Any of reading the layers or writing.
pub fn make(old: &Old, new: &Spooled, level: i32, out: &mut dyn Write) -> io::Result<Made> {
    out.write_all(&MAGIC)?;
    let mut maker = Maker {
        old,
        new,
        packer: Packer { level },
        out,
        plan: Vec::new(),
        literal: Vec::new(),
        patches: Vec::new(),
        trees: BTreeMap::new(),
        effort: Effort::default(),
    };
    let mut at = 0;
    for found in new.contents()? {
        let What::File { offset, size } = found.what else {
            continue;
        };
        if size < WORTH_NAMING || offset < at || offset + size > new.size {
            continue;
        }
        maker.literal(at, offset)?;
        maker.content(&found.path, offset, size)?;
        at = offset + size;
    }
    maker.literal(at, new.size)?;
    maker.close_group()?;
    let mut trees = vec![Digest::of(b""); maker.trees.len()];
    for (tree, number) in &maker.trees {
        trees[*number] = old.diff_id(*tree);
    }
    Ok(Made { trees })
}

/// Part of an old file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    file: usize,
    offset: u64,
    length: usize,
}

struct Maker<'m> {
    old: &'m Old,
    new: &'m Spooled,
    packer: Packer,
    out: &'m mut dyn Write,
    plan: Vec<u8>,
    /// The end of the plan that is not yet an operation.
    literal: Vec<u8>,
    patches: Vec<u8>,
    /// Old layers in use, with the delta's numbers for them.
    trees: BTreeMap<usize, usize>,
    effort: Effort,
}

impl Maker<'_> {
    /// Bytes of the stream as they are.
    fn literal(&mut self, mut from: u64, to: u64) -> io::Result<()> {
        while from < to {
            let length = usize::try_from(to - from).map_or(LITERAL, |left| left.min(LITERAL));
            let bytes = self.new.bytes(from, length)?;
            self.write_out(&bytes)?;
            from += length as u64;
        }
        Ok(())
    }

    fn write_out(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.effort.made(bytes.len() as u64);
        if self.literal.len() + bytes.len() > LITERAL {
            self.end_literal();
        }
        self.make_room()?;
        self.literal.extend(bytes);
        Ok(())
    }

    /// A file's content.
    fn content(&mut self, path: &[u8], offset: u64, size: u64) -> io::Result<()> {
        let digest = self.new.digest(offset, size)?;
        if let Some(file) = self.old.equal(&digest, path)?
            && self.effort.spend(0, size)
        {
            return self.lean((file, 0, size), None);
        }
        let named = self.old.named(path, size);
        let together = named
            .is_some_and(|file| self.old.file(file).size.saturating_add(size) <= PATCH_MAX as u64);
        let piece = if together { PATCH_MAX } else { PIECE };
        let mut at = 0;
        while at < size {
            let length = usize::try_from(size - at).map_or(piece, |left| left.min(piece));
            let bytes = self.new.bytes(offset + at, length)?;
            if bytes.len() > 4096 && bytes.iter().all(|byte| *byte == 0) {
                self.zeros(bytes.len() as u64)?;
            } else {
                self.piece(&bytes, at, size, named)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    fn zeros(&mut self, length: u64) -> io::Result<()> {
        self.end_literal();
        self.make_room()?;
        self.effort.made(length);
        format::write(&mut self.plan, &Operation::Zeros(length));
        Ok(())
    }

    /// One piece of a changed file, at `at` of `size` bytes.
    fn piece(&mut self, new: &[u8], at: u64, size: u64, named: Option<usize>) -> io::Result<()> {
        let alone = self.packer.pack(&[], new);
        let mut best: Option<(Part, Vec<u8>)> = None;
        for part in self.candidates(new, at, size, named) {
            let old = self.old.bytes(part.file, part.offset, part.length)?;
            let packed = self.packer.pack(&old, new);
            if best
                .as_ref()
                .is_none_or(|(_, best)| packed.len() < best.len())
            {
                best = Some((part, packed));
            }
        }
        if let Some((part, packed)) = best
            // What naming the old file takes.
            && packed.len() + 24 < alone.len()
            && self.effort.spend(part.length as u64, new.len() as u64)
        {
            let whole = (part.file, part.offset, part.length as u64);
            self.lean(whole, Some((new.len(), packed.len())))?;
            self.patches.extend(packed);
            return Ok(());
        }
        if new.len() <= INTO_PLAN {
            return self.write_out(new);
        }
        self.end_literal();
        self.make_room()?;
        self.effort.made(new.len() as u64);
        let operation = Operation::Packed {
            length: new.len(),
            packed: alone.len(),
        };
        format::write(&mut self.plan, &operation);
        self.patches.extend(alone);
        Ok(())
    }

    /// Parts of old files that may help with a piece: of the file of that name, and of the most alike.
    fn candidates(&self, new: &[u8], at: u64, size: u64, named: Option<usize>) -> Vec<Part> {
        let most = (PATCH_MAX - new.len()).min(OLD_MIN.max(new.len().saturating_mul(OLD_TIMES)));
        let alike = self.old.alike(new);
        let mut parts = Vec::new();
        if let Some(file) = named {
            let places = alike
                .iter()
                .find(|(other, _)| *other == file)
                .map_or(&[][..], |(_, places)| places);
            parts.push(self.part(file, most, places, new.len(), at, size));
        }
        if let Some((file, places)) = alike.iter().find(|(file, _)| Some(*file) != named) {
            parts.push(self.part(*file, most, places, new.len(), at, size));
        }
        parts.retain(|part| part.length > 0);
        parts
    }

    /// The part of a file with most of the places found; without any, where the piece is in the new file.
    fn part(
        &self,
        file: usize,
        most: usize,
        places: &[u64],
        length: usize,
        at: u64,
        size: u64,
    ) -> Part {
        let whole = self.old.file(file).size;
        if let Ok(length) = usize::try_from(whole)
            && length <= most
        {
            return Part {
                file,
                offset: 0,
                length,
            };
        }
        let mut places = places.to_vec();
        places.sort_unstable();
        let (mut best, mut first) = ((0, 0), 0);
        for (index, place) in places.iter().enumerate() {
            while places[first] + (most as u64) < *place {
                first += 1;
            }
            best = best.max((index + 1 - first, first));
        }
        let middle = match best {
            (0, _) => {
                let centre = at + length as u64 / 2;
                let share = u128::from(centre) * u128::from(whole) / u128::from(size.max(1));
                u64::try_from(share).unwrap_or(whole)
            }
            (count, first) => places[first].midpoint(places[first + count - 1]),
        };
        Part {
            file,
            offset: middle
                .saturating_sub(most as u64 / 2)
                .min(whole - most as u64),
            length: most,
        }
    }

    /// Copies part of an old file, or patches it: new and packed length.
    fn lean(
        &mut self,
        (file, offset, length): (usize, u64, u64),
        patch: Option<(usize, usize)>,
    ) -> io::Result<()> {
        self.end_literal();
        self.make_room()?;
        let file = self.old.file(file);
        let next = self.trees.len();
        let tree = *self.trees.entry(file.tree).or_insert(next);
        let old = format::Old {
            tree,
            path: &file.path,
            offset,
            length,
        };
        let operation = match patch {
            None => Operation::Copy(old),
            Some((length, packed)) => Operation::Patch {
                old,
                length,
                packed,
            },
        };
        format::write(&mut self.plan, &operation);
        Ok(())
    }

    fn end_literal(&mut self) {
        if !self.literal.is_empty() {
            format::write(&mut self.plan, &Operation::Literal(&self.literal));
            self.literal.clear();
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.plan.len() + self.literal.len() > PLAN_FULL || self.patches.len() > PATCHES_MAX {
            self.close_group()?;
        }
        Ok(())
    }

    fn close_group(&mut self) -> io::Result<()> {
        self.end_literal();
        if self.plan.is_empty() {
            return Ok(());
        }
        let packed = self.packer.pack(&[], &self.plan);
        for length in [self.plan.len(), packed.len()] {
            let length = u32::try_from(length).map_err(io::Error::other)?;
            self.out.write_all(&length.to_le_bytes())?;
        }
        self.out.write_all(&packed)?;
        self.out.write_all(&self.patches)?;
        self.plan.clear();
        self.patches.clear();
        Ok(())
    }
}
