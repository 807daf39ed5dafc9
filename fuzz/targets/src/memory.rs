//! How much memory an input takes: an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting for each thread.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize, sign: isize) {
    let now = NOW.get() + sign * isize::try_from(bytes).unwrap_or(isize::MAX);
    NOW.set(now);
    PEAK.set(PEAK.get().max(now));
}

#[expect(unsafe_code, reason = "counting needs an allocator of its own")]
// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: `pointer` came from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work` and returns what it returns.
///
/// # Panics
/// When this thread held more than `limit` bytes at once beyond what it held before.
pub fn within<T>(limit: usize, work: impl FnOnce() -> T) -> T {
    let before = NOW.get();
    PEAK.set(before);
    let result = work();
    let taken = usize::try_from(PEAK.get() - before).unwrap_or(0);
    assert!(
        taken <= limit,
        "{taken} bytes of memory were taken, more than {limit}"
    );
    result
}

#[cfg(test)]
mod tests {
    use super::within;

    #[test]
    fn what_takes_too_much_is_noticed() {
        assert_eq!(within(2000, || vec![1_u8; 1000].len()), 1000);
        let much = std::panic::catch_unwind(|| within(2000, || vec![1_u8; 3000].len()));
        assert!(much.is_err());
        let zeroed = std::panic::catch_unwind(|| within(2000, || vec![0_u8; 3000].len()));
        assert!(zeroed.is_err());
    }
}
