//! Tests of unpacking: attacks next to a canary tree, whiteouts, metadata, layers that lean on others.
//! They need root, as unpacking does.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use proptest::prelude::*;
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::*;

const ROOMY: Budget = Budget {
    bytes: 1 << 30,
    entries: 10_000,
};

/// Builds archives that the `tar` crate's own builder refuses to write.
#[derive(Default, Clone)]
struct Tar(Vec<u8>);

impl Tar {
    fn raw(
        mut self,
        entry_type: EntryType,
        path: &[u8],
        link: &[u8],
        mode: u32,
        body: &[u8],
    ) -> Self {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(entry_type);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_000_000_000);
        header.set_size(body.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(body);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, body: &str) -> Self {
        self.raw(
            EntryType::Regular,
            path.as_bytes(),
            b"",
            0o644,
            body.as_bytes(),
        )
    }

    fn dir(self, path: &str, mode: u32) -> Self {
        self.raw(EntryType::Directory, path.as_bytes(), b"", mode, b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(
            EntryType::Symlink,
            path.as_bytes(),
            target.as_bytes(),
            0o777,
            b"",
        )
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.raw(
            EntryType::Link,
            path.as_bytes(),
            target.as_bytes(),
            0o644,
            b"",
        )
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..)
                .find(|length| *length == rest + length.to_string().len())
                .unwrap();
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.raw(EntryType::XHeader, b"pax", b"", 0o644, &body)
    }
}

/// A directory to unpack into, with a canary beside it.
struct Cage {
    dir: TempDir,
}

impl Cage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let owner = dir.path().metadata().unwrap().uid();
        assert_eq!(
            owner, 0,
            "unpacking sets owners: run the tests as root, for example by cargo xtask test"
        );
        fs::create_dir_all(dir.path().join("canary/sub")).unwrap();
        fs::write(dir.path().join("canary/file"), "alive").unwrap();
        fs::create_dir(dir.path().join("target")).unwrap();
        Self { dir }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    fn lower(&self, name: &str, tar: &Tar) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        unpack_layer(&mut tar.0.as_slice(), &path, &[], ROOMY).unwrap();
        path
    }

    fn unpack(&self, tar: &Tar) -> Result<Unpacked, UnpackError> {
        unpack_layer(&mut tar.0.as_slice(), &self.target(), &[], ROOMY)
    }

    /// Everything outside of the target, with mode, owner, links and content.
    fn outside(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.dir.path().to_owned()];
        while let Some(path) = todo.pop() {
            for entry in fs::read_dir(&path).unwrap().map(Result::unwrap) {
                let meta = entry.path().symlink_metadata().unwrap();
                if entry.path() == self.target() {
                    continue;
                }
                let content = if meta.is_file() {
                    fs::read(entry.path()).unwrap()
                } else {
                    Vec::new()
                };
                found.push(format!(
                    "{} {:o} {} {} {} {content:?}",
                    entry.path().display(),
                    meta.mode(),
                    meta.uid(),
                    if meta.is_file() { meta.nlink() } else { 0 },
                    meta.mtime_nsec()
                ));
                if meta.is_dir() {
                    todo.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }
}

#[test]
fn attacks_change_nothing_outside() {
    let absolute = |cage: &Cage, rest: &str| format!("{}/canary{rest}", cage.dir.path().display());
    type Attack = fn(&Cage, &dyn Fn(&Cage, &str) -> String) -> Tar;
    let attacks: &[(&str, bool, Attack)] = &[
        ("parent", false, |_, _| {
            Tar::default().file("../canary/file", "dead")
        }),
        ("parent later", false, |_, _| {
            Tar::default().file("a/../../canary/file", "dead")
        }),
        ("parent in the middle is clean", true, |_, _| {
            Tar::default().file("a/../b", "fine")
        }),
        ("absolute", true, |cage, at| {
            Tar::default().file(&at(cage, "/file"), "dead")
        }),
        ("relative link, write through", true, |_, _| {
            Tar::default()
                .symlink("l", "../canary")
                .file("l/file", "dead")
                .dir("l/new", 0o777)
        }),
        ("absolute link, write through", true, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, ""))
                .file("l/file", "dead")
        }),
        ("link to a link", true, |cage, at| {
            Tar::default()
                .symlink("a", &at(cage, ""))
                .symlink("b", "a/sub")
                .file("b/file", "dead")
        }),
        ("link, then a file of its name", true, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, "/file"))
                .file("l", "dead")
        }),
        ("link, then a directory of its name", true, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, ""))
                .dir("l", 0o777)
                .file("l/file", "dead")
        }),
        ("hard link outside", false, |_, _| {
            Tar::default()
                .hard_link("h", "../canary/file")
                .file("h", "dead")
        }),
        ("hard link through a link", false, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, ""))
                .hard_link("h", "l/file")
                .file("h", "dead")
        }),
        ("hard link of a link", true, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, "/file"))
                .hard_link("h", "l")
                .file("h", "dead")
        }),
        ("whiteout of ..", false, |_, _| {
            Tar::default().file("d/.wh...", "")
        }),
        ("whiteout of .", false, |_, _| {
            Tar::default().file("d/.wh..", "")
        }),
        ("whiteout of nothing", false, |_, _| {
            Tar::default().file("d/.wh.", "")
        }),
        ("whiteout through a link", true, |cage, at| {
            Tar::default()
                .symlink("l", &at(cage, ""))
                .file("l/.wh.file", "")
                .file("l/.wh..wh..opq", "")
        }),
        ("links in a circle", false, |_, _| {
            Tar::default()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", "")
        }),
        ("root as a link", false, |_, _| {
            Tar::default().symlink("./", "../canary")
        }),
        ("root as a file", false, |_, _| {
            Tar::default().file("/", "x")
        }),
        ("hard link to the root", false, |_, _| {
            Tar::default().hard_link("h", "/")
        }),
        ("hard link to a directory", false, |_, _| {
            Tar::default().dir("d", 0o755).hard_link("h", "d")
        }),
        ("below a file", false, |_, _| {
            Tar::default().file("f", "").file("f/x", "")
        }),
        ("fifo over a link", true, |cage, at| {
            Tar::default().symlink("l", &at(cage, "/file")).raw(
                EntryType::Fifo,
                b"l",
                b"",
                0o777,
                b"",
            )
        }),
        ("NUL in a name", false, |_, _| {
            Tar::default().pax(&[("path", b"a\0b")]).file("x", "")
        }),
        ("long name", false, |_, _| {
            Tar::default().pax(&[("path", &[b'a'; 300])]).file("x", "")
        }),
        ("long path", false, |_, _| {
            Tar::default()
                .pax(&[("path", &b"a/".repeat(3000))])
                .file("x", "")
        }),
        ("deep path", false, |_, _| {
            Tar::default()
                .pax(&[("path", &b"a/".repeat(600))])
                .file("x", "")
        }),
        ("empty link", false, |_, _| Tar::default().symlink("l", "")),
    ];
    for (name, good, attack) in attacks {
        let cage = Cage::new();
        let before = cage.outside();
        let result = cage.unpack(&attack(&cage, &absolute));
        assert_eq!(cage.outside(), before, "{name}");
        assert_eq!(result.is_ok(), *good, "{name}: {result:?}");
        if let Err(error) = result {
            assert!(
                matches!(error, UnpackError::Entry { .. }),
                "{name}: {error:?}"
            );
        }
    }
}

#[test]
fn links_inside_lead_where_they_lead_in_the_container() {
    let cage = Cage::new();
    let tar = Tar::default()
        .dir("usr/lib", 0o755)
        .symlink("lib", "usr/lib")
        .symlink("usr/up", "/lib/../..")
        .file("lib/a", "a")
        .file("usr/up/b", "b");
    cage.unpack(&tar).unwrap();
    assert_eq!(
        fs::read_to_string(cage.target().join("usr/lib/a")).unwrap(),
        "a"
    );
    assert_eq!(fs::read_to_string(cage.target().join("b")).unwrap(), "b");
}

#[test]
fn metadata_is_kept_and_the_host_s_is_dropped() {
    let cage = Cage::new();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tar = Tar::default()
        .pax(&[
            ("mtime", b"1700000000.123456789"),
            ("SCHILY.xattr.user.kept", b"yes"),
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.security.selinux", b"no"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ])
        .raw(EntryType::Regular, b"bin/su", b"", 0o4755, b"#!")
        .dir("tmp", 0o1777)
        .raw(EntryType::Fifo, b"pipe", b"", 0o622, b"")
        .symlink("link", "/anywhere")
        .hard_link("bin/sudo", "bin/su")
        .raw(EntryType::Char, b"null", b"", 0o666, b"")
        .raw(EntryType::Block, b"sda", b"", 0o660, b"")
        .raw(EntryType::new(b'V'), b"volume", b"", 0, b"");
    let unpacked = cage.unpack(&tar).unwrap();
    let meta = |name: &str| cage.target().join(name).symlink_metadata().unwrap();

    let su = meta("bin/su");
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid()),
        (0o4755, 1000, 1001)
    );
    assert_eq!((su.mtime(), su.mtime_nsec()), (1_700_000_000, 123_456_789));
    assert_eq!(su.ino(), meta("bin/sudo").ino());
    assert_eq!(meta("tmp").mode() & 0o7777, 0o1777);
    assert_eq!(meta("tmp").mtime(), 1_000_000_000);
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!(meta("pipe").permissions().mode() & 0o7777, 0o622);
    assert_eq!(
        (meta("link").uid(), meta("link").mtime()),
        (1000, 1_000_000_000)
    );
    assert!(!cage.target().join("null").exists());
    assert_eq!(unpacked.notes.len(), 3, "{:?}", unpacked.notes);

    let file = File::open(cage.target().join("bin/su")).unwrap();
    let mut names = vec![0; 4096];
    let length = rustix::fs::flistxattr(&file, &mut names[..]).unwrap();
    let mut names: Vec<&[u8]> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    names.sort_unstable();
    assert_eq!(names, [&b"security.capability"[..], b"user.kept"]);
}

#[test]
fn whiteouts_become_what_overlayfs_reads() {
    let cage = Cage::new();
    let tar = Tar::default()
        .dir("d", 0o755)
        .file("d/.wh.gone", "")
        .file("d/.wh.new", "")
        .file("d/new", "a whiteout does not hide what is in its own layer")
        .file("o/.wh..wh..opq", "")
        .file("o/kept", "")
        .dir("replaced", 0o700)
        .file("replaced/inner", "")
        .file(".wh.replaced", "")
        .file(".wh..wh.plnk", "");
    cage.unpack(&tar).unwrap();
    let device = cage.target().join("d/gone").symlink_metadata().unwrap();
    assert!(device.file_type().is_char_device());
    assert_eq!(device.rdev(), 0);
    assert!(cage.target().join("d/new").is_file());
    assert!(cage.target().join("replaced/inner").is_file());
    assert!(cage.target().join("o/kept").is_file());
    let opaque = |name: &str| {
        let dir = File::open(cage.target().join(name)).unwrap();
        let mut value = [0; 8];
        rustix::fs::fgetxattr(&dir, lower::OPAQUE, &mut value[..])
            .is_ok_and(|length| value[..length] == *b"y")
    };
    assert!(opaque("o"));
    assert!(opaque("replaced"));
    assert!(!opaque("d"));
    let strays: Vec<_> = fs::read_dir(cage.target())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with(".wh."))
        .collect();
    assert_eq!(strays, Vec::<String>::new());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let cage = Cage::new();
    let tar = Tar::default()
        .dir("d", 0o755)
        .file("d/inner/deep", "x")
        .file("d", "now a file")
        .file("f", "old")
        .dir("f", 0o750)
        .file("f/x", "new")
        .file("twice", "first, and longer")
        .file("twice", "second");
    cage.unpack(&tar).unwrap();
    assert_eq!(
        fs::read_to_string(cage.target().join("d")).unwrap(),
        "now a file"
    );
    assert_eq!(
        fs::read_to_string(cage.target().join("f/x")).unwrap(),
        "new"
    );
    assert_eq!(
        fs::read_to_string(cage.target().join("twice")).unwrap(),
        "second"
    );
}

#[test]
fn zeros_take_no_space() {
    let cage = Cage::new();
    let mut body = vec![0; 1 << 20];
    body.push(1);
    let tar = Tar::default().raw(EntryType::Regular, b"holes", b"", 0o644, &body);
    cage.unpack(&tar).unwrap();
    let meta = cage.target().join("holes").metadata().unwrap();
    assert_eq!(meta.len(), (1 << 20) + 1);
    assert!(meta.blocks() * 512 < 1 << 18, "{} blocks", meta.blocks());
    assert_eq!(fs::read(cage.target().join("holes")).unwrap(), body);
}

#[test]
fn budgets_hold() {
    let tar = Tar::default().file("a", "12345").file("b", "12345");
    for (budget, expected) in [
        (
            Budget {
                bytes: 10,
                entries: 2,
            },
            "ok",
        ),
        (
            Budget {
                bytes: 9,
                entries: 2,
            },
            "bytes",
        ),
        (
            Budget {
                bytes: 10,
                entries: 1,
            },
            "entries",
        ),
    ] {
        let cage = Cage::new();
        let found = match unpack_layer(&mut tar.0.as_slice(), &cage.target(), &[], budget) {
            Ok(_) => "ok",
            Err(UnpackError::TooLarge(9)) => "bytes",
            Err(UnpackError::TooManyEntries(1)) => "entries",
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(found, expected);
    }
}

#[test]
fn a_sparse_file_as_large_as_the_world_is_refused() {
    let cage = Cage::new();
    let tar = Tar::default()
        .pax(&[
            ("GNU.sparse.map", b""),
            ("GNU.sparse.size", b"4611686018427387904"),
        ])
        .file("holes", "");
    assert!(matches!(cage.unpack(&tar), Err(UnpackError::TooLarge(_))));
}

#[test]
fn a_layer_leans_on_those_below() {
    let cage = Cage::new();
    let bottom = cage.lower(
        "bottom",
        &Tar::default()
            .dir("./", 0o555)
            .dir("private", 0o700)
            .dir("usr", 0o755)
            .dir("usr/lib", 0o751)
            .symlink("lib", "usr/lib")
            .raw(EntryType::Regular, b"usr/lib/tool", b"", 0o4711, b"tool")
            .dir("cut", 0o700),
    );
    let middle = cage.lower(
        "middle",
        &Tar::default()
            .file(".wh.cut", "")
            .file("usr/.wh..wh..opq", ""),
    );
    let unpack = |tar: &Tar, lowers: &[PathBuf]| {
        let target = tempfile::tempdir_in(cage.dir.path()).unwrap();
        let result = unpack_layer(&mut tar.0.as_slice(), target.path(), lowers, ROOMY);
        (target, result)
    };
    let mode = |path: PathBuf| path.symlink_metadata().unwrap().mode() & 0o7777;

    let passing = Tar::default()
        .file("private/x", "")
        .file("cut/x", "")
        .file("lib/x", "");
    let (target, unpacked) = unpack(&passing, std::slice::from_ref(&bottom));
    assert_eq!(
        mode(target.path().into()),
        0o555,
        "the root directory's mode comes from below"
    );
    assert_eq!(mode(target.path().join("private")), 0o700);
    assert_eq!(
        mode(target.path().join("usr/lib")),
        0o751,
        "through the link below"
    );
    assert!(target.path().join("usr/lib/x").is_file());
    assert!(unpacked.unwrap().leans.wholly);

    let (target, unpacked) = unpack(&passing, &[middle.clone(), bottom.clone()]);
    assert_eq!(
        mode(target.path().join("cut")),
        0o755,
        "hidden by a whiteout"
    );
    assert!(unpacked.is_ok());

    let simple = Tar::default().file("private/x", "");
    let (_target, unpacked) = unpack(&simple, std::slice::from_ref(&bottom));
    let leans = unpacked.unwrap().leans;
    assert!(leans.holds_above(std::slice::from_ref(&bottom)).unwrap());
    assert!(
        !leans.holds_above(&[]).unwrap(),
        "the mode would be another"
    );

    let link = Tar::default().hard_link("usr/lib/again", "usr/lib/tool");
    let (target, unpacked) = unpack(&link, std::slice::from_ref(&bottom));
    unpacked.unwrap();
    assert_eq!(
        fs::read_to_string(target.path().join("usr/lib/again")).unwrap(),
        "tool"
    );
    assert_eq!(mode(target.path().join("usr/lib/again")), 0o4711);
    assert_eq!(
        target
            .path()
            .join("usr/lib/again")
            .metadata()
            .unwrap()
            .ino(),
        target.path().join("usr/lib/tool").metadata().unwrap().ino()
    );
    let (_target, unpacked) = unpack(&link, &[middle, bottom]);
    assert!(
        matches!(unpacked, Err(UnpackError::Entry { .. })),
        "hidden by an opaque directory"
    );
}

#[derive(Debug, Clone)]
struct Step(u8, String, String);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let path = "(\\.\\./|/|\\./)?(a|b|l|d)(/(a|b|l|\\.\\.|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq)){0,3}";
    proptest::collection::vec(
        (0_u8..6, path, path).prop_map(|(kind, path, link)| Step(kind, path, link)),
        0..12,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_archive_changes_anything_outside(steps in steps()) {
        let cage = Cage::new();
        let before = cage.outside();
        let tar = steps.iter().fold(Tar::default(), |tar, Step(kind, path, link)| match kind {
            0 => tar.file(path, "x"),
            1 => tar.dir(path, 0o777),
            2 => tar.symlink(path, link),
            3 => tar.symlink(path, &format!("../canary/{link}")),
            4 => tar.hard_link(path, link),
            _ => tar.raw(EntryType::Fifo, path.as_bytes(), b"", 0o666, b""),
        });
        let _ = cage.unpack(&tar);
        prop_assert_eq!(cage.outside(), before);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
        let cage = Cage::new();
        let _ = cage.unpack(&Tar(bytes));
    }
}
