//! The guest's first file system: a cpio archive as the kernel unpacks it.
//!
//! The format is "newc" (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`): a header of hexadecimal
//! numbers, the name, the contents, each padded to four bytes. It is written here because that is less than an
//! archiver to install and a temporary tree to fill.

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_600;

/// An archive being written. Everything belongs to root; directories above an entry are made when missing.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// A regular file at an absolute path; a second one at the same path is left out.
    pub(crate) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entry(path, FILE | mode, contents, (0, 0));
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK, target.as_bytes(), (0, 0));
    }

    /// A character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER, &[], (major, minor));
    }

    /// The archive, complete.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.write("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8], device: (u32, u32)) {
        let name = path.trim_start_matches('/');
        for (at, _) in name.match_indices('/') {
            let above = &name[..at];
            if self.names.insert(above.to_owned()) {
                self.write(above, DIRECTORY, &[], (0, 0));
            }
        }
        if self.names.insert(name.to_owned()) {
            self.write(name, mode, contents, device);
        }
    }

    fn write(&mut self, name: &str, mode: u32, contents: &[u8], (major, minor): (u32, u32)) {
        self.inode += 1;
        let number = |value: usize| u32::try_from(value).expect("a guest's file is below 4 GiB");
        let fields = [
            self.inode,
            mode,
            0, // owner
            0, // group
            1, // links
            0, // time
            number(contents.len()),
            0, // device it is on
            0,
            major,
            minor,
            number(name.len() + 1),
            0, // checksum, unused
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and contents of each entry, read back by the format's rules.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |index: usize| {
                let from = at + 6 + index * 8;
                let text = std::str::from_utf8(&bytes[from..from + 8]).expect("hexadecimal");
                usize::from_str_radix(text, 16).expect("hexadecimal")
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = &bytes[at + 110..at + 110 + name_size - 1];
            let start = (at + 110 + name_size).next_multiple_of(4);
            found.push((
                String::from_utf8(name.to_vec()).expect("a name"),
                u32::try_from(mode).expect("a mode"),
                bytes[start..start + size].to_vec(),
            ));
            at = (start + size).next_multiple_of(4);
        }
        found
    }

    #[test]
    fn entries_have_their_directories_once_and_end_with_a_trailer() {
        let mut archive = Archive::default();
        archive.file("/a/b/one", 0o755, b"x");
        archive.link("/a/b/two", "one");
        archive.file("/a/b/one", 0o644, b"another");
        let entries = entries(&archive.finish());
        let names: Vec<&str> = entries.iter().map(|(name, _, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "TRAILER!!!"]);
        assert_eq!(entries[0].1, 0o040_755);
        assert_eq!(
            (entries[2].1, entries[2].2.as_slice()),
            (0o100_755, &b"x"[..])
        );
        assert_eq!(
            (entries[3].1, entries[3].2.as_slice()),
            (0o120_777, &b"one"[..])
        );
    }

    #[test]
    fn every_part_begins_at_a_multiple_of_four() {
        for size in 0..9 {
            let mut archive = Archive::default();
            archive.file(&"n".repeat(size + 1), 0o600, &vec![7; size]);
            let bytes = archive.finish();
            assert_eq!(bytes.len() % 4, 0);
            assert_eq!(entries(&bytes)[0].2, vec![7; size]);
        }
    }
}
