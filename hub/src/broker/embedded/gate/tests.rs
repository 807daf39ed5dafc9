//! What the gate lets through, byte by byte.

use super::*;

fn connect(body: usize) -> Vec<u8> {
    let mut packet = vec![0x10];
    let mut length = body;
    loop {
        let byte = u8::try_from(length & 0x7f).unwrap();
        length >>= 7;
        packet.push(if length == 0 { byte } else { byte | 0x80 });
        if length == 0 {
            break;
        }
    }
    packet.extend(std::iter::repeat_n(7, body));
    packet
}

#[tokio::test]
async fn one_whole_connect_is_taken_and_nothing_after_it() {
    for body in [0, 1, 127, 128, 300, CONNECT_MAX] {
        let packet = connect(body);
        let mut stream: &[u8] = &[packet.clone(), b"next".to_vec()].concat();
        assert_eq!(read_connect(&mut stream).await.unwrap(), packet, "{body}");
        assert_eq!(stream, b"next");
    }
}

#[tokio::test]
async fn what_is_no_connect_is_refused() {
    let cut = &connect(100)[..50];
    for bytes in [
        &b""[..],
        &b"\x10"[..],
        &b"\x10\xff\xff\xff\xff\x7f"[..],
        &b"GET / HTTP/1.1\r\n"[..],
        &b"\x16\x03\x01\x02\x00"[..],
        &b"\x30\x02\x00\x00"[..],
        // 256 MiB announced.
        &b"\x10\xff\xff\xff\x7f"[..],
        &connect(CONNECT_MAX + 1),
        cut,
    ] {
        let mut stream = bytes;
        assert!(read_connect(&mut stream).await.is_err(), "{bytes:?}");
    }
}

#[test]
fn one_address_cannot_take_all_places() {
    let by_address = Arc::new(ByAddress::new(2));
    let (near, far): (IpAddr, IpAddr) =
        ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
    let first = by_address.enter(near).unwrap();
    // The same address, as a socket for both families sees it.
    let _second = by_address
        .enter("::ffff:192.0.2.1".parse().unwrap())
        .unwrap();
    assert!(by_address.enter(near).is_none());
    assert!(by_address.enter(far).is_some());
    drop(first);
    let _third = by_address.enter(near).unwrap();
    assert!(by_address.enter(near).is_none());
    let local: Vec<_> = (0..10)
        .map(|_| by_address.enter(IpAddr::from([127, 0, 0, 1])))
        .collect();
    assert!(local.iter().all(Option::is_some));
}

#[test]
fn turns_leave_nothing_behind() {
    let by_address = Arc::new(ByAddress::new(2));
    for last in 0..=255 {
        drop(by_address.enter(IpAddr::from([192, 0, 2, last])));
    }
    assert!(by_address.count.lock().unwrap().is_empty());
}
