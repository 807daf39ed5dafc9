use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Mode, XattrFlags};

use super::*;

struct Bed {
    dir: tempfile::TempDir,
    tree: PathBuf,
    seal: Seal,
}

fn whiteout(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

impl Bed {
    /// A tree with something of everything, names that sort in unexpected ways among it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        for name in ["", "a", "a/b", "a.b", "a-b", "empty", "opaque"] {
            fs::create_dir_all(tree.join(name)).unwrap();
        }
        let large: Vec<u8> = (0..300_000_u32)
            .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect();
        fs::write(tree.join("a/large"), large).unwrap();
        fs::write(tree.join("a/b/one"), "one").unwrap();
        fs::write(tree.join("a.b/none"), "").unwrap();
        fs::hard_link(tree.join("a/b/one"), tree.join("a.b/same")).unwrap();
        fs::write(
            tree.join(std::ffi::OsStr::new("a-b"))
                .join("odd\u{1b}\nname"),
            "odd",
        )
        .unwrap();
        symlink("one", tree.join("a/b/link")).unwrap();
        symlink("nowhere/at/all", tree.join("z")).unwrap();
        whiteout(&tree.join("gone"));
        rustix::fs::mknodat(
            CWD,
            tree.join("pipe"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for (name, attribute, value) in [
            ("a/b/one", "user.note", &b"text"[..]),
            ("opaque", "trusted.overlay.opaque", b"y"),
        ] {
            rustix::fs::setxattr(tree.join(name), attribute, value, XattrFlags::empty()).unwrap();
        }
        let written = write(&tree, u64::MAX, &dir.path().join("ledger")).unwrap();
        assert_eq!((written.names, written.bytes), (15, 300_009));
        Self {
            seal: written.seal,
            tree,
            dir,
        }
    }

    fn ledger(&self) -> PathBuf {
        self.dir.path().join("ledger")
    }

    fn compare(&self) -> Compared {
        let mut reader = open(&self.ledger(), &self.seal).unwrap().unwrap();
        compare(&self.tree, &mut reader).unwrap()
    }
}

#[test]
fn a_tree_is_what_its_ledger_says_and_reading_it_twice_changes_nothing() {
    let bed = Bed::new();
    for _ in 0..2 {
        let compared = bed.compare();
        assert_eq!(compared.flaws, []);
        assert_eq!(compared.names, 15);
        // Each file once, however many names it has.
        assert_eq!(compared.bytes, 300_006);
    }
}

#[test]
fn whatever_is_wrong_is_named() {
    type Damage = fn(&Path);
    let cases: [(&str, Wrong, Damage); 17] = [
        ("a/large", Wrong::Content, |tree| {
            let file = File::options()
                .read(true)
                .write(true)
                .open(tree.join("a/large"))
                .unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 131_072).unwrap();
            file.write_all_at(&[byte[0] ^ 4], 131_072).unwrap();
        }),
        ("a/large", Wrong::Size, |tree| {
            let file = File::options().write(true).open(tree.join("a/large"));
            file.unwrap().set_len(299_999).unwrap();
        }),
        ("a/large", Wrong::Mode, |tree| {
            let mode = fs::Permissions::from_mode(0o4755);
            fs::set_permissions(tree.join("a/large"), mode).unwrap();
        }),
        ("a/b", Wrong::Mode, |tree| {
            fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o700)).unwrap();
        }),
        ("a", Wrong::Owner, |tree| {
            std::os::unix::fs::chown(tree.join("a"), Some(7), None).unwrap();
        }),
        ("", Wrong::Owner, |tree| {
            std::os::unix::fs::chown(tree, None, Some(7)).unwrap();
        }),
        ("a/large", Wrong::Missing, |tree| {
            fs::remove_file(tree.join("a/large")).unwrap();
        }),
        ("a/b", Wrong::Missing, |tree| {
            fs::remove_dir_all(tree.join("a/b")).unwrap();
        }),
        ("a/bb", Wrong::Extra, |tree| {
            fs::create_dir(tree.join("a/bb")).unwrap();
            fs::write(tree.join("a/bb/c"), "").unwrap();
        }),
        ("zz", Wrong::Extra, |tree| {
            fs::write(tree.join("zz"), "").unwrap();
        }),
        ("a/b/link", Wrong::Target, |tree| {
            fs::remove_file(tree.join("a/b/link")).unwrap();
            symlink("/etc/passwd", tree.join("a/b/link")).unwrap();
        }),
        ("a.b/none", Wrong::Type, |tree| {
            fs::remove_file(tree.join("a.b/none")).unwrap();
            fs::create_dir(tree.join("a.b/none")).unwrap();
            fs::write(tree.join("a.b/none/in"), "").unwrap();
        }),
        ("a", Wrong::Type, |tree| {
            fs::remove_dir_all(tree.join("a")).unwrap();
            symlink("a.b", tree.join("a")).unwrap();
        }),
        ("gone", Wrong::Device, |tree| {
            fs::remove_file(tree.join("gone")).unwrap();
            let null = rustix::fs::makedev(1, 3);
            let kind = FileType::CharacterDevice;
            rustix::fs::mknodat(CWD, tree.join("gone"), kind, Mode::empty(), null).unwrap();
        }),
        ("opaque", Wrong::Xattr, |tree| {
            rustix::fs::removexattr(tree.join("opaque"), "trusted.overlay.opaque").unwrap();
        }),
        ("empty", Wrong::Xattr, |tree| {
            let flags = XattrFlags::empty();
            rustix::fs::setxattr(tree.join("empty"), "user.new", b"", flags).unwrap();
        }),
        // The same content, in a file of its own.
        ("a.b/same", Wrong::HardLink, |tree| {
            let (one, fresh) = (tree.join("a/b/one"), tree.join("fresh"));
            fs::copy(&one, &fresh).unwrap();
            rustix::fs::setxattr(&fresh, "user.note", b"text", XattrFlags::empty()).unwrap();
            fs::rename(fresh, one).unwrap();
        }),
    ];
    for (path, wrong, damage) in cases {
        let bed = Bed::new();
        damage(&bed.tree);
        let flaws = bed.compare().flaws;
        let named: Vec<(&str, Wrong)> =
            flaws.iter().map(|flaw| (&*flaw.path, flaw.wrong)).collect();
        assert_eq!(named, [(path, wrong)], "{flaws:?}");
    }
    // One more name of a file is one name too many, and nothing else.
    let bed = Bed::new();
    rustix::fs::linkat(
        CWD,
        bed.tree.join("a.b/none"),
        CWD,
        bed.tree.join("new"),
        AtFlags::empty(),
    )
    .unwrap();
    let compared = bed.compare();
    assert_eq!(compared.flaws.len(), 1);
    assert_eq!(compared.flaws[0].wrong, Wrong::Extra);
}

#[test]
fn flaws_are_bounded_and_names_cannot_speak_to_a_terminal() {
    let bed = Bed::new();
    for number in 0..1500 {
        fs::write(bed.tree.join(format!("x{number}")), "").unwrap();
    }
    fs::write(bed.tree.join("a-b/odd\u{1b}\nname"), "new").unwrap();
    let compared = bed.compare();
    assert_eq!((compared.flaws.len(), compared.left_out), (1000, 501));
    assert_eq!(compared.flaws[0].path, "a-b/odd\\u{1b}\\nname");
}

#[test]
fn any_flipped_bit_of_a_ledger_makes_it_none() {
    let bed = Bed::new();
    let whole = fs::read(bed.ledger()).unwrap();
    assert!(whole.len() < 700, "{}", whole.len());
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(bed.ledger(), damaged).unwrap();
        assert!(open(&bed.ledger(), &bed.seal).unwrap().is_none(), "{at}");
    }
    fs::write(bed.ledger(), &whole[..whole.len() - 1]).unwrap();
    assert!(open(&bed.ledger(), &bed.seal).unwrap().is_none());
    fs::remove_file(bed.ledger()).unwrap();
    assert!(open(&bed.ledger(), &bed.seal).unwrap().is_none());
}

#[test]
fn who_left_more_behind_than_was_said_is_found_out_before_it_is_read() {
    let bed = Bed::new();
    let file = File::create(bed.tree.join("sparse")).unwrap();
    // Would take hours.
    file.set_len(1 << 42).unwrap();
    let begin = std::time::Instant::now();
    let refused = write(&bed.tree, 300_006, &bed.dir.path().join("second"));
    assert!(matches!(refused, Err(LedgerError::TooMuch)), "{refused:?}");
    assert!(begin.elapsed() < std::time::Duration::from_secs(10));
    // Nor is it when it is looked for rot.
    assert_eq!(bed.compare().flaws.len(), 1);
}

/// All entries of bytes that may be no ledger; how many there were.
fn read_all(bytes: &[u8]) -> io::Result<u64> {
    let mut reader = Reader::new(bytes);
    let mut count = 0;
    while reader.next()?.is_some() {
        count += 1;
    }
    Ok(count)
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut out =
        flate2::write::DeflateEncoder::new(b"fsledg1\n".to_vec(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _refused = read_all(&bytes);
        let _refused = read_all(&deflated(&bytes));
    }

    #[test]
    fn what_is_written_is_read(
        names in proptest::collection::btree_set("[a-z/.]{0,40}", 0..40),
        sizes in proptest::collection::vec(any::<(u64, u32, u32)>(), 40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut writer = Writer::new(File::create(&path).unwrap()).unwrap();
        let entries: Vec<Entry> = names.into_iter().zip(sizes).map(|(name, (size, sum, id))| Entry {
            path: name.into_bytes(),
            mode: 0o644,
            uid: id,
            gid: sum,
            node: match id % 5 {
                0 => Node::Directory,
                1 => Node::Symlink { target: size.to_string().into_bytes() },
                2 => Node::CharDevice { number: size },
                _ => Node::File { size, sum, same_as: (sum % 2 == 0).then_some(size) },
            },
            xattrs: if id % 7 == 0 {
                vec![Xattr { name: b"user.x".to_vec(), length: size, sum }]
            } else {
                Vec::new()
            },
        }).collect();
        for entry in &entries {
            writer.entry(entry).unwrap();
        }
        let seal = writer.finish().unwrap();
        let mut reader = open(&path, &seal).unwrap().unwrap();
        for (number, entry) in (0..).zip(&entries) {
            prop_assert_eq!(reader.next().unwrap(), Some((number, entry.clone())));
        }
        prop_assert_eq!(reader.next().unwrap(), None);
        prop_assert_eq!(reader.next().unwrap(), None);
    }
}
