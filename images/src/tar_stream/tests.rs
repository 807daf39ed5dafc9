//! Tests of the tar reader: examples of each format, and no input that panics.

use proptest::prelude::*;

use super::*;

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}

fn block(entry_type: EntryType, path: &str, body: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_entry_type(entry_type);
    header.set_size(body.len() as u64);
    header.set_mode(0o4755);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(9);
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn entries(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut stream = TarStream::new(archive);
    let mut found = Vec::new();
    while let Some(entry) = stream.next()? {
        let mut body = Vec::new();
        stream.read_to_end(&mut body).map_err(TarError::Read)?;
        found.push((entry, body));
    }
    Ok(found)
}

#[test]
fn extended_headers_one_after_the_other_take_no_more_memory_than_one() {
    let value = vec![b'v'; 400_000];
    let records = pax(&[("SCHILY.xattr.user.k", &value[..])]);
    let header = block(EntryType::XHeader, "x", &records);
    let file = block(EntryType::Regular, "f", b"hello");
    let two = [&header[..], &header, &file].concat();
    assert_eq!(entries(&two).unwrap()[0].0.xattrs.len(), 2);
    let three = [&header[..], &header, &header, &file].concat();
    assert!(matches!(entries(&three), Err(TarError::ExtendedTooLong)));
    // Each entry has its own.
    let apart = [&header[..], &header, &file, &header, &header, &file].concat();
    assert_eq!(entries(&apart).unwrap().len(), 2);
}

#[test]
fn pax_records_win_over_the_header() {
    let records = pax(&[
        ("path", b"long/\xff name\nwith newline"),
        ("mtime", b"1700000000.25"),
        ("uid", b"100000"),
        ("SCHILY.xattr.user.k", b"v=1\n"),
    ]);
    let archive = [
        block(EntryType::XHeader, "x", &records),
        block(EntryType::Regular, "short", b"hello"),
    ]
    .concat();
    let found = entries(&archive).unwrap();
    let (entry, body) = &found[0];
    assert_eq!(entry.path, b"long/\xff name\nwith newline");
    assert_eq!(
        entry.mtime,
        Mtime {
            seconds: 1_700_000_000,
            nanos: 250_000_000
        }
    );
    assert_eq!((entry.uid, entry.gid, entry.mode), (100_000, 8, 0o4755));
    assert_eq!(entry.xattrs, [(b"user.k".to_vec(), b"v=1\n".to_vec())]);
    assert_eq!(body, b"hello");
}

#[test]
fn pax_times() {
    assert_eq!(
        pax_time(b"-1.25"),
        Some(Mtime {
            seconds: -2,
            nanos: 750_000_000
        })
    );
    assert_eq!(
        pax_time(b"1.1234567899"),
        Some(Mtime {
            seconds: 1,
            nanos: 123_456_789
        })
    );
    for bad in [
        &b""[..],
        b"x",
        b"1.x",
        b"--1",
        b"1e3",
        b"99999999999999999999",
    ] {
        assert_eq!(pax_time(bad), None);
    }
}

#[test]
fn sparse_1_0() {
    let records = pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"4096"),
    ]);
    let mut body = b"2\n1024\n3\n4000\n2\n".to_vec();
    body.resize(BLOCK, 0);
    body.extend_from_slice(b"abcde");
    let archive = [
        block(EntryType::XHeader, "x", &records),
        block(EntryType::Regular, "s", &body),
    ]
    .concat();
    let found = entries(&archive).unwrap();
    assert_eq!(found[0].0.path, b"holes");
    assert_eq!(found[0].0.size, 4096);
    let extents = found[0].0.extents.as_deref().unwrap();
    assert_eq!(
        extents,
        [
            Extent {
                offset: 1024,
                length: 3
            },
            Extent {
                offset: 4000,
                length: 2
            }
        ]
    );
    assert_eq!(found[0].1, b"abcde");
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for map in [
        &b"0,5,3,5"[..],
        b"0,5,4090,10",
        b"0,4",
        b"0,5,6",
        b"18446744073709551615,5",
    ] {
        let records = pax(&[("GNU.sparse.map", map), ("GNU.sparse.size", b"4096")]);
        let archive = [
            block(EntryType::XHeader, "x", &records),
            block(EntryType::Regular, "s", b"12345"),
        ]
        .concat();
        assert!(
            entries(&archive).is_err(),
            "{}",
            String::from_utf8_lossy(map)
        );
    }
}

#[test]
fn an_endless_extended_header_is_refused_unread() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let mut stream = TarStream::new(header.as_bytes().chain(io::repeat(b'a')));
    assert!(matches!(stream.next(), Err(TarError::ExtendedTooLong)));
}

#[test]
fn cut_off_archives_are_refused() {
    let archive = block(EntryType::Regular, "a", &[1; 700]);
    for length in [1, 511, 513, 600, 1400, archive.len() - 1] {
        assert!(entries(&archive[..length]).is_err(), "{length}");
    }
    assert_eq!(
        entries(&archive).unwrap().len(),
        1,
        "without the closing zeros"
    );
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = entries(&bytes);
    }

    #[test]
    fn no_damage_panics(at in 0_usize..3000, byte: u8, pax_body in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut archive = [
            block(EntryType::XHeader, "x", &pax(&[("path", b"p"), ("GNU.sparse.map", b"0,5"), ("GNU.sparse.size", b"9")])),
            block(EntryType::Regular, "s", b"12345"),
            block(EntryType::XHeader, "x", &pax_body),
            block(EntryType::Directory, "d/", b""),
        ].concat();
        let end = archive.len();
        archive[at % end] = byte;
        let _ = entries(&archive);
    }
}
