//! [`LocalZone`]: the time zone that the device is set to, read again when that changes.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;

use crate::plan::DeviceZone;

/// Where names of zones are looked up (tzfile(5)).
const ZONEINFO: &str = "/usr/share/zoneinfo";

/// What the system is set to (localtime(5)).
const LOCALTIME: &str = "/etc/localtime";

/// The largest such file is 4 KiB.
const MAX_BYTES: u64 = 64 * 1024;

/// The device's time zone.
#[derive(Debug)]
pub struct LocalZone {
    source: Source,
    /// What was read, from which state of the file.
    cached: Option<(Stamp, DeviceZone)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// Nothing that could change.
    Fixed(DeviceZone),
    /// A file, and whether something names it: then it must be there.
    File(PathBuf, bool),
}

/// Changes when the file does: device, inode, length, and seconds and nanoseconds of its change.
type Stamp = (u64, u64, u64, i64, i64);

impl LocalZone {
    /// As `configured` says, or the agent's environment (`TZ`), or the system.
    #[must_use]
    pub fn new(configured: Option<String>) -> Self {
        let said = configured
            .or_else(|| std::env::var("TZ").ok())
            .filter(|text| !text.is_empty());
        Self::from_source(said.map_or_else(
            || Source::File(LOCALTIME.into(), false),
            |text| source(&text, Path::new(ZONEINFO)),
        ))
    }

    const fn from_source(source: Source) -> Self {
        Self {
            source,
            cached: None,
        }
    }

    /// What it is now.
    pub fn read(&mut self) -> DeviceZone {
        let (path, named) = match &self.source {
            Source::Fixed(zone) => return zone.clone(),
            Source::File(path, named) => (path, *named),
        };
        // Follows the link that /etc/localtime is.
        let Ok(metadata) = fs::metadata(path) else {
            return if named {
                unknown(path, "it cannot be read")
            } else {
                DeviceZone::default()
            };
        };
        let stamp = (
            metadata.dev(),
            metadata.ino(),
            metadata.len(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        if let Some((_, zone)) = self.cached.as_ref().filter(|(of, _)| *of == stamp) {
            return zone.clone();
        }
        let zone = load(path);
        self.cached = Some((stamp, zone.clone()));
        zone
    }
}

/// What a text such as that of `TZ` means (tzset(3)): a file or name, or else a POSIX string.
fn source(text: &str, zoneinfo: &Path) -> Source {
    let name = text.strip_prefix(':').unwrap_or(text);
    if name == "UTC" {
        return Source::Fixed(DeviceZone::default());
    }
    if name.starts_with('/') {
        return Source::File(name.into(), true);
    }
    let is_name = name.split('/').all(|part| !["", ".", ".."].contains(&part));
    let file = zoneinfo.join(name);
    if is_name && file.is_file() {
        return Source::File(file, true);
    }
    match TimeZone::posix(name) {
        Ok(zone) => Source::Fixed(DeviceZone(Ok(zone))),
        Err(_) if is_name => Source::File(file, true),
        Err(_) => Source::Fixed(DeviceZone(Err(format!(
            "{text:?} is neither the name of a time zone nor a POSIX TZ string"
        )))),
    }
}

fn load(path: &Path) -> DeviceZone {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
    match read {
        Err(error) => unknown(path, &error.to_string()),
        Ok(_) => TimeZone::tzif("device", &bytes).map_or_else(
            |_| unknown(path, "it is no time zone file"),
            |zone| DeviceZone(Ok(zone)),
        ),
    }
}

fn unknown(path: &Path, why: &str) -> DeviceZone {
    DeviceZone(Err(format!("{}: {why}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TZif file of version 2 without transitions, for a footer.
    fn tzif(footer: &str) -> Vec<u8> {
        let header = |counts: [u32; 6]| {
            let mut bytes = b"TZif2".to_vec();
            bytes.extend([0; 15]);
            bytes.extend(counts.into_iter().flat_map(u32::to_be_bytes));
            bytes
        };
        let body = [0, 0, 0, 0, 0, 0, b'X', b'X', b'X', 0];
        let counts = [0, 0, 0, 0, 1, 4];
        let mut bytes = Vec::new();
        for _ in 0..2 {
            bytes.extend(header(counts));
            bytes.extend(body);
        }
        bytes.extend(format!("\n{footer}\n").bytes());
        bytes
    }

    fn offset(zone: &DeviceZone) -> i32 {
        let noon = jiff::Timestamp::from_second(1_800_000_000).unwrap();
        zone.0.as_ref().unwrap().to_offset(noon).seconds()
    }

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("localtime");
        let mut zone = LocalZone::from_source(Source::File(path.clone(), false));
        assert_eq!(offset(&zone.read()), 0, "UTC where there is none");
        fs::write(&path, tzif("<+03>-3")).unwrap();
        assert_eq!(offset(&zone.read()), 3 * 3600);
        assert_eq!(zone.read(), zone.read());
        let other = dir.path().join("other");
        fs::write(&other, tzif("<-02>2")).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(offset(&zone.read()), -2 * 3600);
        fs::write(&path, "not a zone").unwrap();
        let why = zone.read().0.unwrap_err();
        assert!(why.contains("no time zone file"), "{why}");
    }

    #[test]
    fn names_files_and_posix_strings() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("Europe")).unwrap();
        fs::write(
            dir.path().join("Europe/Berlin"),
            tzif("CET-1CEST,M3.5.0,M10.5.0/3"),
        )
        .unwrap();
        let read = |text: &str| LocalZone::from_source(source(text, dir.path())).read();
        for (text, seconds) in [
            ("UTC", 0),
            (":UTC", 0),
            ("Europe/Berlin", 3600),
            (":Europe/Berlin", 3600),
            ("CET-1CEST,M3.5.0,M10.5.0/3", 3600),
            ("<+0545>-5:45", 5 * 3600 + 45 * 60),
        ] {
            assert_eq!(offset(&read(text)), seconds, "{text}");
        }
        let file = dir.path().join("Europe/Berlin");
        assert_eq!(offset(&read(&file.display().to_string())), 3600);
        for wrong in [
            "Europe/Nowhere",
            "../Europe/Berlin",
            "/nonexistent",
            "",
            "Europe",
        ] {
            assert!(read(wrong).0.is_err(), "{wrong}");
        }
    }
}
