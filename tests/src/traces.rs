//! Looks for what should be nowhere.

use std::path::Path;

/// Every file below `dir` that holds one of `needles`, added to `found`.
///
/// # Panics
///
/// When a directory entry has no type.
pub fn holding(dir: &Path, needles: &[&str], found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("has a type"));
        if kind.is_dir() {
            holding(&path, needles, found);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            for needle in needles {
                if bytes.windows(needle.len()).any(|w| w == needle.as_bytes()) {
                    found.push(format!("{needle} in {}", path.display()));
                }
            }
        }
    }
}
