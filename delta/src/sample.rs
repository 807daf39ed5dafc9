//! Places in a file that depend on the bytes around them only, so that they are found again where content moved.

/// How many bytes before a place decide about it: a `u32` shifted once a byte forgets what is older.
const REACH: usize = 32;
/// One place in so many is taken, on average: a power of two.
const ONE_IN: u32 = 64;

/// A place: what stands before it, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sample {
    /// A hash of the bytes before it.
    pub(crate) mark: u32,
    /// Bytes from the beginning.
    pub(crate) at: u64,
}

/// The places of `bytes`; runs of one mark count once.
pub(crate) fn samples(bytes: &[u8]) -> impl Iterator<Item = Sample> {
    let mut rolling = 0_u32;
    let mut last = None;
    bytes.iter().enumerate().filter_map(move |(index, byte)| {
        rolling = (rolling << 1).wrapping_add(GEAR[usize::from(*byte)]);
        if index < REACH || rolling > u32::MAX / ONE_IN {
            return None;
        }
        // The upper bits chose it and say little more.
        let mark = rolling.wrapping_mul(0x9e37_79b1);
        if last.replace(mark) == Some(mark) {
            return None;
        }
        Some(Sample {
            mark,
            at: index as u64,
        })
    })
}

/// Arbitrary, fixed numbers (splitmix64).
const GEAR: [u32; 256] = {
    let mut table = [0; 256];
    let mut state = 0x466f_7265_7368_6f72_u64;
    let mut index = 0;
    while index < table.len() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bytes = mixed.to_le_bytes();
        table[index] = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        index += 1;
    }
    table
};
