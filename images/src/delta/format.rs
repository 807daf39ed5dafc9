//! The bytes of a delta: limits, groups and operations, read and written.
//!
//! ```text
//! delta  = "FSDELTA1" group*
//! group  = plan length (u32) · packed length of the plan (u32) · plan, packed · patches, packed, in the plan's order
//! plan   = operation*            packed = zstd blocks (RFC 8878, section 3.1.1.2) without a frame around them
//! ```
//!
//! Numbers in a group's head are little-endian, those in a plan LEB128. A plan's literal bytes and operations stand
//! together, so that zstd finds the path of an operation in the tar header just before it.

use super::DeltaError;

/// How a delta begins; the last byte is the version.
pub const MAGIC: [u8; 8] = *b"FSDELTA1";
/// The longest plan, unpacked, in bytes.
pub const PLAN_MAX: usize = 1 << 20;
/// What a patch may have in memory: the old bytes it leans on and the new ones together.
pub const PATCH_MAX: usize = 4 << 20;
/// More bytes than packing ever adds.
pub const PACKED_EXTRA: usize = 64 << 10;
/// The longest path of an old file, in bytes.
pub const PATH_MAX: usize = 4096;

/// One step towards the new stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'p> {
    /// These bytes.
    Literal(&'p [u8]),
    /// So many zeros.
    Zeros(u64),
    /// Bytes of an old file as they are.
    Copy(Old<'p>),
    /// So many bytes, packed with those of an old file in front of them.
    Patch {
        /// What stands in front.
        old: Old<'p>,
        /// New bytes.
        length: usize,
        /// What they take behind the plan.
        packed: usize,
    },
    /// So many bytes, packed by themselves.
    Packed {
        /// New bytes.
        length: usize,
        /// What they take behind the plan.
        packed: usize,
    },
}

/// Bytes of an old file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Old<'p> {
    /// Which of the old trees.
    pub tree: usize,
    /// Relative to the tree, without a slash in front.
    pub path: &'p [u8],
    /// The first of them.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// What reading old files may cost beside the output it makes: a bound for hostile deltas that a producer
/// keeps to.
#[derive(Debug, Clone, Default)]
pub struct Effort {
    output: u64,
    opened: u64,
    leaned_on: u64,
}

impl Effort {
    /// Counts one use of an old file that leans on `old` bytes to make `output` ones; false when that is too much.
    #[must_use]
    pub fn spend(&mut self, old: u64, output: u64) -> bool {
        let opened = self.opened + 1;
        let leaned_on = self.leaned_on.saturating_add(old);
        let total = self.output.saturating_add(output);
        let fits = opened <= 1024 + total / 512
            && leaned_on <= total.saturating_mul(16).saturating_add(64 << 20);
        if fits {
            (self.opened, self.leaned_on, self.output) = (opened, leaned_on, total);
        }
        fits
    }

    /// Counts output that needs no old file.
    pub fn made(&mut self, output: u64) {
        self.output = self.output.saturating_add(output);
    }
}

/// The length of a raw block is in the upper bits, type 0, not the last (RFC 8878, section 3.1.1.2).
pub(super) fn raw_block_header(length: usize) -> [u8; 3] {
    let [a, b, c, _] = (u32::try_from(length).unwrap_or(u32::MAX) << 3).to_le_bytes();
    [a, b, c]
}

/// Reads the next operation at `at` and moves on; `None` at the plan's end.
///
/// # Errors
/// [`DeltaError::Malformed`].
pub fn read<'p>(plan: &'p [u8], at: &mut usize) -> Result<Option<Operation<'p>>, DeltaError> {
    let mut rest = plan.get(*at..).unwrap_or_default();
    let Some((kind, behind)) = rest.split_first() else {
        return Ok(None);
    };
    rest = behind;
    let operation = match kind {
        0 => Operation::Literal(bytes(&mut rest, PLAN_MAX)?),
        1 => Operation::Zeros(number(&mut rest)?),
        2 => Operation::Copy(old(&mut rest)?),
        3 => {
            let old = old(&mut rest)?;
            let (length, packed) = patch(&mut rest, old.length)?;
            Operation::Patch {
                old,
                length,
                packed,
            }
        }
        4 => {
            let (length, packed) = patch(&mut rest, 0)?;
            Operation::Packed { length, packed }
        }
        _ => return Err(DeltaError::Malformed("an unknown operation")),
    };
    // A plan of nothing but these would be work that no output pays for.
    if operation.makes() == 0 {
        return Err(DeltaError::Malformed("an operation that makes nothing"));
    }
    *at = plan.len() - rest.len();
    Ok(Some(operation))
}

impl Operation<'_> {
    /// How many bytes come of it.
    const fn makes(&self) -> u64 {
        match self {
            Self::Literal(bytes) => bytes.len() as u64,
            Self::Zeros(length) => *length,
            Self::Copy(old) => old.length,
            Self::Patch { length, .. } | Self::Packed { length, .. } => *length as u64,
        }
    }
}

/// Appends an operation to a plan.
pub fn write(plan: &mut Vec<u8>, operation: &Operation<'_>) {
    match *operation {
        Operation::Literal(bytes) => {
            plan.push(0);
            put(plan, bytes.len() as u64);
            plan.extend(bytes);
        }
        Operation::Zeros(length) => {
            plan.push(1);
            put(plan, length);
        }
        Operation::Copy(old) => {
            plan.push(2);
            put_old(plan, &old);
        }
        Operation::Patch {
            old,
            length,
            packed,
        } => {
            plan.push(3);
            put_old(plan, &old);
            put(plan, length as u64);
            put(plan, packed as u64);
        }
        Operation::Packed { length, packed } => {
            plan.push(4);
            put(plan, length as u64);
            put(plan, packed as u64);
        }
    }
}

fn put_old(plan: &mut Vec<u8>, old: &Old<'_>) {
    put(plan, old.tree as u64);
    put(plan, old.path.len() as u64);
    plan.extend(old.path);
    put(plan, old.offset);
    put(plan, old.length);
}

fn put(plan: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        plan.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    plan.push(value.to_le_bytes()[0]);
}

fn number(rest: &mut &[u8]) -> Result<u64, DeltaError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, behind) = rest
            .split_first()
            .ok_or(DeltaError::Malformed("a plan that ends in a number"))?;
        *rest = behind;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(DeltaError::Malformed("a number that is too large"))
}

fn small(rest: &mut &[u8], max: usize) -> Result<usize, DeltaError> {
    let value = usize::try_from(number(rest)?).unwrap_or(usize::MAX);
    if value > max {
        return Err(DeltaError::Malformed("a length over its limit"));
    }
    Ok(value)
}

fn bytes<'p>(rest: &mut &'p [u8], max: usize) -> Result<&'p [u8], DeltaError> {
    let length = small(rest, max)?;
    let (bytes, behind) = rest
        .split_at_checked(length)
        .ok_or(DeltaError::Malformed("a plan that ends in an operation"))?;
    *rest = behind;
    Ok(bytes)
}

fn old<'p>(rest: &mut &'p [u8]) -> Result<Old<'p>, DeltaError> {
    Ok(Old {
        tree: small(rest, crate::manifest::LAYERS_MAX)?,
        path: bytes(rest, PATH_MAX)?,
        offset: number(rest)?,
        length: number(rest)?,
    })
}

/// Length and packed length of a patch over `old` bytes.
fn patch(rest: &mut &[u8], old: u64) -> Result<(usize, usize), DeltaError> {
    let left = usize::try_from(old)
        .ok()
        .and_then(|old| PATCH_MAX.checked_sub(old))
        .ok_or(DeltaError::Malformed("a length over its limit"))?;
    let length = small(rest, left)?;
    let packed = small(rest, length + PACKED_EXTRA)?;
    Ok((length, packed))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_old() -> impl Strategy<Value = (usize, Vec<u8>, u64, u64)> {
        (
            0..=127_usize,
            prop::collection::vec(any::<u8>(), 0..40),
            any::<u64>(),
            1..2_u64 << 20,
        )
    }

    proptest! {
        #[test]
        fn operations_come_back(
            literal in prop::collection::vec(any::<u8>(), 1..200),
            zeros in 1..=u64::MAX,
            (tree, path, offset, length) in any_old(),
            new in 1..(2_usize << 20),
        ) {
            let old = Old { tree, path: &path, offset, length };
            let all = [
                Operation::Literal(&literal),
                Operation::Zeros(zeros),
                Operation::Copy(old),
                Operation::Patch { old, length: new, packed: new / 2 },
                Operation::Packed { length: new, packed: new + 7 },
            ];
            let mut plan = Vec::new();
            for operation in &all {
                write(&mut plan, operation);
            }
            let mut at = 0;
            for operation in all {
                prop_assert_eq!(read(&plan, &mut at).unwrap(), Some(operation));
            }
            prop_assert_eq!(read(&plan, &mut at).unwrap(), None);
        }

        #[test]
        fn any_plan_is_read_to_an_end(plan in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut at = 0;
            while let Ok(Some(_)) = read(&plan, &mut at) {}
            prop_assert!(at <= plan.len());
        }
    }

    #[test]
    fn what_makes_nothing_is_refused() {
        let old = Old {
            tree: 0,
            path: b"a",
            offset: 0,
            length: 0,
        };
        for operation in [
            Operation::Literal(b""),
            Operation::Zeros(0),
            Operation::Copy(old),
            Operation::Packed {
                length: 0,
                packed: 3,
            },
        ] {
            let mut plan = Vec::new();
            write(&mut plan, &operation);
            let refused = read(&plan, &mut 0).unwrap_err().to_string();
            assert!(refused.contains("makes nothing"), "{operation:?}");
        }
    }

    #[test]
    fn effort_is_bounded_by_what_is_made() {
        let mut effort = Effort::default();
        assert!((0..1024).all(|_| effort.spend(0, 1)));
        assert!(!(0..10).all(|_| effort.spend(0, 1)));
        effort.made(1 << 20);
        assert!(effort.spend(64 << 20, 1));
        assert!(!effort.spend(64 << 20, 1));
    }

    #[test]
    fn what_would_take_too_much_memory_is_refused() {
        let old = Old {
            tree: 0,
            path: b"a",
            offset: 0,
            length: 3 << 20,
        };
        for (length, packed, fine) in [
            (1 << 20, 100, true),
            ((1 << 20) + 1, 100, false),
            (100, 100 + PACKED_EXTRA, true),
            (100, 101 + PACKED_EXTRA, false),
            (0, 0, false),
        ] {
            let mut plan = Vec::new();
            write(
                &mut plan,
                &Operation::Patch {
                    old,
                    length,
                    packed,
                },
            );
            assert_eq!(read(&plan, &mut 0).is_ok(), fine, "{length} {packed}");
        }
    }
}
