//! Image configs.

use foreshore_images::manifest::{ConfigDocument, DocumentError};

use crate::{accepted, memory};

/// One config.
///
/// # Panics
/// When it does not come back as written, pairs with another number of layers, or takes too much memory.
pub fn run(bytes: &[u8]) {
    let limit = (64 << 10) + 48 * bytes.len();
    let parse = |layers| memory::within(limit, || ConfigDocument::parse(bytes, layers));
    // No image has so many layers, so this tells how many it has diff ids for.
    let layers = match parse(usize::MAX) {
        Err(DocumentError::DiffIds { diff_ids, .. }) => diff_ids,
        Err(_) => return,
        Ok(_) => panic!("it has no diff ids for so many layers"),
    };
    accepted();
    let config = parse(layers).expect("it has as many diff ids as it says");
    assert!(parse(layers + 1).is_err());
    let written = serde_json::to_vec(&config).expect("a config can be written");
    let again = ConfigDocument::parse(&written, layers).expect("what was written is read");
    assert_eq!(again, config);
    if let Some(platform) = config.platform() {
        assert!(!platform.os.is_empty() && !platform.architecture.is_empty());
    }
}
