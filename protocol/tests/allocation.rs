//! How much memory hostile input can make the decoders take.
//!
//! One test in one file: the counter is that of the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use foreshore_protocol::digest::Digest;
use foreshore_protocol::frame::{self, MAX_FRAME_BYTES, Message as _};
use foreshore_protocol::manifest::{self, MAX_MANIFEST_BYTES};
use foreshore_protocol::message::{Event, Events, Head, PullProgress, Reported};
use foreshore_protocol::release::{MAX_RELEASE_BYTES, Release};

/// The system's allocator, counting.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "counting needs an allocator of its own")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `run` held at once beyond what was held before.
fn peak<T>(run: impl FnOnce() -> T) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    drop(run());
    PEAK.load(Ordering::Relaxed) - before
}

fn framed(schema: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = frame::MAGIC.to_vec();
    frame.extend_from_slice(&schema.to_le_bytes());
    frame.push(0);
    frame.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    frame.extend_from_slice(body);
    frame
}

#[test]
fn hostile_input_takes_bounded_memory() {
    const FRAME_BOUND: usize = 4 << 20;
    const MANIFEST_BOUND: usize = 64 << 20;
    const RELEASE_BOUND: usize = 1 << 20;

    // A byte pattern claims huge lengths or many tiny things, wherever a length is read.
    for byte in 0..=255_u8 {
        let body = vec![byte; MAX_FRAME_BYTES - frame::HEADER_LEN];
        for schema in 1..=frame::MAX_SCHEMA {
            let bytes = framed(schema, &body);
            let taken = peak(|| {
                drop(frame::decode::<Head>(&bytes));
                drop(frame::decode::<Reported>(&bytes));
                drop(frame::decode::<Event>(&bytes));
                drop(frame::decode::<Events>(&bytes));
                drop(frame::decode::<PullProgress>(&bytes));
            });
            assert!(
                taken < FRAME_BOUND,
                "{taken} bytes for a frame of {byte:#04x}"
            );
        }
    }
    // As many services as fit into a frame: six bytes each.
    let mut body = vec![1, 1, 0, 1, b'1', 1, b'a', 1, b'6', 0, 0, 0, 0, 0, 0, 0];
    body.extend_from_slice(&[1, 1, b'a', 1, 1]);
    body.extend_from_slice(&[0; 32]);
    body.extend_from_slice(&[0, 0, 0, 0]);
    body.extend_from_slice(&[0x80, 0x50]); // 10240 of them
    body.extend((0..10_240).flat_map(|_| [1, b'a', 0, 0, 0, 0]));
    let bytes = framed(Reported::SCHEMA, &body);
    let taken = peak(|| {
        assert!(matches!(
            frame::decode::<Reported>(&bytes),
            Err(frame::FrameError::Bounds { .. })
        ))
    });
    assert!(taken < FRAME_BOUND, "{taken} bytes");

    let service = "apiVersion: foreshore/v1\nkind: App\nmetadata: {name: a}\nspec: {services: {a: {image: a, ";
    let fill = |start: &str, piece: &str, end: &str| {
        format!(
            "{start}{}{end}",
            piece.repeat((MAX_MANIFEST_BYTES - start.len() - end.len()) / piece.len())
        )
    };
    for manifest in [
        fill("", "[", ""),
        fill("", "- ", ""),
        fill("", "a:\n", ""),
        fill("", "? ", ""),
        fill("", "{a: ", ""),
        fill("", "\"", ""),
        fill("", "&a ", ""),
        fill("", "---\n", ""),
        fill("", "#\n", ""),
        fill(service, " ", "}}}"),
        fill(&format!("{service}command: ["), "a,", "]}}}"),
        fill(&format!("{service}command: ["), "'',", "]}}}"),
        fill(&format!("{service}tmpfs: ["), "/a,", "]}}}"),
        fill(&format!("{service}user: \""), "x", "\"}}}"),
        fill(&format!("{service}environment: {{\"a"), "\\0", "\": b}}}}"),
    ] {
        let taken = peak(|| manifest::parse(manifest.as_bytes()));
        let start: String = manifest.chars().skip(80).take(40).collect();
        assert!(taken < MANIFEST_BOUND, "{taken} bytes for …{start}…");
    }

    let start = "{\"schema\":1,\"app\":\"a\",\"services\":{\"a\":{\"image\":\"a\",\"command\":[";
    let pieces = (MAX_RELEASE_BYTES - start.len() - 8) / 3;
    for release in [
        "[".repeat(MAX_RELEASE_BYTES),
        "{\"a\":".repeat(MAX_RELEASE_BYTES / 5),
        format!("{start}{}\"\"]}}}}}}", "\"\",".repeat(pieces)),
    ] {
        let digest = Digest::of(release.as_bytes());
        let taken = peak(|| Release::from_bytes(release.as_bytes(), &digest));
        assert!(taken < RELEASE_BOUND, "{taken} bytes for a release");
    }
}
