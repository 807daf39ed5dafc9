//! Archives of images that people hand to the hub.

use std::cell::OnceCell;
use std::fs;

use foreshore_images::blobs::BlobDir;
use foreshore_images::layout::{ImportLimits, import_archive};
use foreshore_images::manifest::Document;

use crate::scratch::Scratch;
use crate::{accepted, memory};

/// What an archive may hold here.
const LIMITS: ImportLimits = ImportLimits {
    bytes_max: 4 << 20,
    entries_max: 64,
    reserve_bytes: 0,
};

thread_local! {
    static BED: OnceCell<Scratch> = const { OnceCell::new() };
}

/// One archive: an OCI layout or a docker-archive.
///
/// # Panics
/// When anything is written but whole images, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    BED.with(|bed| within(bed.get_or_init(Scratch::new), bytes));
}

fn within(scratch: &Scratch, bytes: &[u8]) {
    let path = scratch.path().join("blobs");
    let blobs = BlobDir::open(&path).expect("a directory can be made");
    // The decoders of a compressed archive have windows of up to 128 MiB.
    let limit = (144 << 20) + 64 * bytes.len();
    let imported = memory::within(limit, || import_archive(&mut &bytes[..], &blobs, &LIMITS));
    let kept = blobs.list().expect("it can be listed");
    match imported {
        Ok(images) => {
            accepted();
            let named: std::collections::BTreeSet<_> = images
                .iter()
                .flat_map(|image| image.blobs.clone())
                .collect();
            assert_eq!(kept, named, "what stays is what the images are made of");
            for image in &images {
                let document = blobs.read(&image.digest, u64::MAX).expect("it can be read");
                let document = document.expect("it is there");
                assert!(Document::parse(&document, Some(&image.media_type)).is_ok());
                let size = |digest| blobs.size(digest).expect("it is there");
                assert_eq!(image.blobs.iter().map(size).sum::<u64>(), image.size_bytes);
            }
            for digest in &kept {
                let size = blobs.size(digest).expect("it is there");
                assert!(blobs.verify(digest, size).expect("it can be read"));
            }
        }
        Err(_) => assert!(kept.is_empty(), "something stays of what was refused"),
    }
    scratch.check(&["blobs"]);
    fs::remove_dir_all(&path).expect("it can be removed");
}
