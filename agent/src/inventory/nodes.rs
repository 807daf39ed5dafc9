//! The device nodes that apps may ask for, as they are now.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use foreshore_protocol::message::{DEV_NODE_DEPTH, MAX_DEV_NODES, MAX_FACT_BYTES, tells_of};

/// Entries that are looked at, at most: more is no `/dev` of a small machine.
const ENTRIES_MAX: usize = 8192;

/// The nodes below `root`, which stands for `/dev`, sorted and with the links to them. `None` when there are more than are
/// told, or `root` cannot be read. Blocks; a few milliseconds.
pub(super) fn list(root: &Path) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut ahead: Vec<(PathBuf, String, usize)> = vec![(root.to_owned(), "/dev".to_owned(), 1)];
    let mut entries = 0;
    while let Some((dir, name, depth)) = ahead.pop() {
        let listed = match fs::read_dir(&dir) {
            Ok(listed) => listed,
            Err(_) if depth == 1 => return None,
            // It was unplugged meanwhile.
            Err(_) => continue,
        };
        for entry in listed.flatten() {
            entries += 1;
            if entries > ENTRIES_MAX {
                return None;
            }
            let (Ok(kind), Ok(part)) = (entry.file_type(), entry.file_name().into_string()) else {
                continue;
            };
            let name = format!("{name}/{part}");
            if kind.is_dir() {
                // What is directly below it is as deep as one more.
                if depth < DEV_NODE_DEPTH && tells_of(&format!("{name}/x")) {
                    ahead.push((entry.path(), name, depth + 1));
                }
                continue;
            }
            let is_device = |kind: fs::FileType| kind.is_char_device() || kind.is_block_device();
            let leads_to_one = || {
                kind.is_symlink()
                    && fs::metadata(entry.path()).is_ok_and(|found| is_device(found.file_type()))
            };
            if name.len() <= MAX_FACT_BYTES
                && tells_of(&name)
                && (is_device(kind) || leads_to_one())
            {
                found.push(name);
                if found.len() > MAX_DEV_NODES {
                    return None;
                }
            }
        }
    }
    found.sort_unstable();
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nodes_and_links_to_them_are_found_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for (number, made) in ["serial/by-id", "pts", "a/b/c/d"].iter().enumerate() {
            fs::create_dir_all(root.join(made)).unwrap();
            symlink("/dev/null", root.join(made).join(format!("n{number}"))).unwrap();
        }
        symlink("/dev/null", root.join("ttyUSB0")).unwrap();
        symlink("/dev/null", root.join("tty1")).unwrap();
        symlink("/nowhere", root.join("gone")).unwrap();
        symlink(".", root.join("again")).unwrap();
        fs::write(root.join("plain"), "").unwrap();
        assert_eq!(
            list(root).unwrap(),
            ["/dev/serial/by-id/n0", "/dev/ttyUSB0"]
        );
        assert_eq!(list(&root.join("none")), None);
        for number in 0..=MAX_DEV_NODES {
            symlink("/dev/null", root.join(format!("i2c-{number}"))).unwrap();
        }
        assert_eq!(list(root), None, "more than are told");
    }
}
