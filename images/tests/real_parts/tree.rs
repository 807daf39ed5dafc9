//! Directory trees, described so that two can be compared.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use foreshore_images::Digest;

/// Every entry by its path: type, mode, owner, time, content, and the first path of the same file.
pub(crate) fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut paths = vec![root.to_owned()];
    let mut at = 0;
    while at < paths.len() {
        if paths[at].symlink_metadata().unwrap().is_dir() {
            let mut children: Vec<PathBuf> = fs::read_dir(&paths[at])
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            paths.append(&mut children);
        }
        at += 1;
    }
    paths.sort();
    let mut first_of = BTreeMap::new();
    let mut found = BTreeMap::new();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().to_owned();
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if meta.is_file() {
            let first = first_of.entry(meta.ino()).or_insert_with(|| name.clone());
            format!(
                "{} bytes {} as {}",
                meta.len(),
                Digest::of(&fs::read(&path).unwrap()),
                first.display()
            )
        } else {
            String::new()
        };
        let line = format!(
            "{:o} {}:{} {}.{:09} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        found.insert(name, line);
    }
    found
}

/// Fails with the lines that differ.
pub(crate) fn assert_same(left: &Path, right: &Path) {
    let (a, b) = (describe(left), describe(right));
    let mut differences = String::new();
    for name in a
        .keys()
        .chain(b.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        if a.get(name) != b.get(name) {
            differences += &format!(
                "{}\n  {:?}\n  {:?}\n",
                name.display(),
                a.get(name),
                b.get(name)
            );
        }
    }
    assert!(
        differences.is_empty(),
        "{} and {} differ:\n{differences}",
        left.display(),
        right.display()
    );
}
