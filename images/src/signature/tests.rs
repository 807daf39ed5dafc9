//! What openssl signed, as cosign would have it signed.

use super::*;

const PAYLOAD: &str = r#"{"critical":{"identity":{"docker-reference":"registry.example/demo"},"image":{"docker-manifest-digest":"sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"},"type":"cosign container image signature"},"optional":null}"#;

/// A kind of key, a public key of it, and its signature of [`PAYLOAD`].
const SIGNED: [(&str, &str, &str); 4] = [
    (
        "p256",
        "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElSj0n6mdVUBkACLrW1OmYLkFWR3A\niECnyg+r4gCfH3EF/cHPbNgaEpGqAuQTaVy6X66YHrGitZ1e206mlb8mqg==\n-----END PUBLIC KEY-----",
        "MEYCIQDj2wNlu7woh259ncPwJOD3DKKrUQ7arnDxdZj6KorFJAIhAMGjGmYWFPO2GYOorBKcvGSGmR4OYg7W57hBMv5jxASw",
    ),
    (
        "p384",
        "-----BEGIN PUBLIC KEY-----\nMHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEk+v42mnqVJy/kVsBDq0Oz7qc9zXjLIDr\nbqQNALXsHa1QGWrXqwSgpQTj/Ml9gSkWwZZGzhmuHNZ+Vd9aFJ9x9uEe50nXSd0c\nYsp3OcvNxrPETdDLVqH+/aq8XFxxMOoa\n-----END PUBLIC KEY-----",
        "MGYCMQDTNyDlA2Ui6UKnoWGWVj5jTCQDeUuTXRFsF0TQXC3v7LegkiEyM82zTE9ZNzeSgIICMQC97s/LWAW2kMx5ZwzAqDzoJyx75mPU0FWvapaMwPHBB2uEwIo35M6acDTqxCRHTPA=",
    ),
    (
        "ed25519",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAIuPoA/hDLbZD2klKPbfUXVBLdwYMyh6HnJ5mkz7liy0=\n-----END PUBLIC KEY-----",
        "temQtYJA/4a2jNPC64X8n+wIp8VOAemBkU/7XNySDXjCaarhhhG78llMa0RwuYfFUi9IeOKK9mw0WQwK9Y0rAQ==",
    ),
    (
        "rsa",
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA3BEnnDOAhSBNvVGSZ0rK\nRqCnd0Oa8f/+YIUDe6AWfMk5dHB4huDCDwwSwsetyaiXX8MYWPKQ2ynUr7W/Anrc\nJ2+dMD4KaHFiehpG8DxelHAKb+53zQfFoa/pwse6NCOJ3Z/VwPv9LCnRzlKoNeSZ\n+JvTQ27kz2r+9bSeP1KlrnYCccsARCEI+e2HxA2az0CFZmIyeLQAvp13JCXh+6cR\nivwk5GCvisqMy5BM1hqokiAEqqvMkRSerwwitNcTspjXQHtm9+GyfDlW6fi1W1vV\nRXuyCwHLmsrkHTYsS9Rz/jG0lMCaKojJtXFxXFldrvDPo2dEJqOfYNY46n7tChxv\nUQIDAQAB\n-----END PUBLIC KEY-----",
        "Fql0+nQ2k9kUhuXw0Vzc3AMSJmqiZW+HMdmrzrQOHYlSvomWtZZ/3eKz59yoM8yikUXWeS3s985MndxHbAWxEqTKKM0+KbUVf81VXZmWqA3I1UPteY2FvO7x6BmKOujHwoCiL+LahVu3/XjM1Mv7dfUoOmw2FcCQgWYoBB/v3nvXVli9lWRM6mSI+VNTqyxECvkM9rJctMVtkCyYgdgjOhXBMl5xSGXD1nPMU3IF+gZoASKP/DLjAq2yDcD43kd3EODWgPN2hB28jH5GY2Zn5UuZjEnSwXS6UTYyZxpJ1lHrtUIaPkB2EwLSyVWG1Ct3wbi7WPX2fBIeamikFgbnXA==",
    ),
];

/// By the first of them, of other payloads.
const OTHERS: [(&str, &str); 2] = [
    (
        r#"{"critical":{"identity":{"docker-reference":"registry.example/demo"},"image":{"docker-manifest-digest":"sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"},"type":"something else"},"optional":null}"#,
        "MEUCIGLzhAq/Gb+IaMROAJm2XOwHRNf47MMHh2Nmjd02giAZAiEAi6QG4KM0nhnTF08ZmXiFQ6/eXDGKf3+PIdBtaL8uaNI=",
    ),
    (
        "not json",
        "MEUCIEmmq0Rpq3S1Y/RcqmtZdO4MVLmZCR6dCnh8J9ahkGcNAiEA7sx6KqvAXnHs3oFz4GhNfRNGim9lsabjca+jifPB6Rc=",
    ),
];

fn key(pem: &str) -> TrustedKey {
    TrustedKey::try_from(pem.to_owned()).unwrap()
}

fn signature(payload: &str, signature: &str) -> Signature {
    Signature {
        payload: payload.to_owned(),
        signature: signature.to_owned(),
        payload_type: None,
    }
}

#[test]
fn keys_of_every_kind_vouch_for_what_they_signed_and_nothing_else() {
    let digest = Digest::of(b"image");
    for (name, pem, signed) in SIGNED {
        let right = signature(PAYLOAD, signed);
        assert!(right.vouches(&digest, &[key(pem)]), "{name}");
        assert!(
            !right.vouches(&Digest::of(b"another image"), &[key(pem)]),
            "{name}"
        );
        assert!(!right.vouches(&digest, &[]), "{name}");
        for (other, pem, _) in SIGNED {
            assert_eq!(
                right.vouches(&digest, &[key(pem)]),
                other == name,
                "{name} {other}"
            );
        }
        let every = SIGNED.map(|(_, pem, _)| key(pem));
        assert!(right.vouches(&digest, &every), "{name}");
        let changed = PAYLOAD.replace("demo", "demp");
        assert!(
            !signature(&changed, signed).vouches(&digest, &[key(pem)]),
            "{name}"
        );
    }
}

#[test]
fn what_is_signed_must_be_a_signature_of_an_image() {
    let (_, pem, _) = SIGNED[0];
    for (payload, signed) in OTHERS {
        let signature = signature(payload, signed);
        let bytes = STANDARD.decode(signed).unwrap();
        assert!(key(pem).verifies(payload.as_bytes(), &bytes), "{payload}");
        assert!(
            !signature.vouches(&Digest::of(b"image"), &[key(pem)]),
            "{payload}"
        );
    }
}

#[test]
fn every_demand_must_be_met() {
    let digest = Digest::of(b"image");
    let keys = SIGNED.map(|(_, pem, _)| key(pem));
    let signatures = [0, 2].map(|index| signature(PAYLOAD, SIGNED[index].2));
    let unmet = |wanted: &[(&'static str, std::ops::Range<usize>)]| {
        let demands: Vec<Demand<'_>> = wanted
            .iter()
            .map(|(by, range)| Demand {
                by,
                keys: &keys[range.clone()],
            })
            .collect();
        first_unmet(&digest, &demands, &signatures).map(|demand| demand.by.to_owned())
    };
    assert_eq!(unmet(&[]), None);
    assert_eq!(unmet(&[("first", 0..1), ("second", 1..3)]), None);
    assert_eq!(
        unmet(&[("first", 0..1), ("second", 3..4)]).as_deref(),
        Some("second")
    );
    assert_eq!(unmet(&[("nobody", 0..0)]).as_deref(), Some("nobody"));
}

#[test]
fn no_input_is_a_signature_by_accident() {
    let (_, pem, signed) = SIGNED[0];
    let digest = Digest::of(b"image");
    let bytes = STANDARD.decode(signed).unwrap();
    for at in 0..bytes.len() {
        for changed in [
            bytes[..at].to_vec(),
            [&bytes[..at], &[bytes[at] ^ 1], &bytes[at + 1..]].concat(),
        ] {
            let text = STANDARD.encode(changed);
            assert!(
                !signature(PAYLOAD, &text).vouches(&digest, &[key(pem)]),
                "{at}"
            );
        }
    }
    for text in ["", "=", "not base64", "AAAA"] {
        assert!(
            !signature(PAYLOAD, text).vouches(&digest, &[key(pem)]),
            "{text}"
        );
    }
}

#[test]
fn what_is_no_key_is_refused_with_the_reason() {
    let (_, pem, _) = SIGNED[0];
    let private =
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----";
    for text in [
        "",
        "ssh-ed25519 AAAA",
        private,
        &pem[..60],
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
    ] {
        assert_eq!(
            TrustedKey::try_from(text.to_owned()),
            Err(KeyError::Pem),
            "{text}"
        );
    }
    // A curve that is not verified.
    let other = "-----BEGIN PUBLIC KEY-----\nMFYwEAYHKoZIzj0CAQYFK4EEAAoDQgAEoyHIsbsKz1DhBMCRST59MNmewgrcLE5O\neiNRFhhwTTocNOjfmv7D8Y30cQMk0AIwStAuTctmYVX+ek5pnSIPjQ==\n-----END PUBLIC KEY-----";
    assert_eq!(TrustedKey::try_from(other.to_owned()), Err(KeyError::Kind));
}

/// In-toto statements and their signatures in envelopes, by the first key: a signature, and a list of contents.
const STATEMENTS: [(&str, &str); 2] = [
    (
        r#"{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"}}],"predicateType":"https://sigstore.dev/cosign/sign/v1","predicate":{}}"#,
        "MEQCIHyhfqYWAau9WEvp4gICng0ZBXMra/bqu6WebArcOFl7AiBoR0a02pxGjJTXbEIm3oTwlEJra3XmgV2hyAgwJJfVUQ==",
    ),
    (
        r#"{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"}}],"predicateType":"https://cyclonedx.org/bom","predicate":{}}"#,
        "MEUCIQDLJ5G9gFn7NhTmHMzLFvaFUwE586oFaS2b18UKn4BwZAIgdMbvHoq4SNuGf7xBgUP5lykwkXdO11rJF/yQvyRFtJM=",
    ),
];

fn bundle(payload: &str, kind: &str, signatures: &[&str]) -> Vec<u8> {
    let signatures: Vec<_> = signatures
        .iter()
        .map(|sig| serde_json::json!({"sig": sig, "keyid": ""}))
        .collect();
    let payload = STANDARD.encode(payload);
    serde_json::json!({
        "mediaType": BUNDLE_NOW,
        "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
        "dsseEnvelope": {"payload": payload, "payloadType": kind, "signatures": signatures},
    })
    .to_string()
    .into_bytes()
}

#[test]
fn a_bundle_vouches_for_the_image_that_its_statement_names() {
    let digest = Digest::of(b"image");
    let [(_, pem, _), (_, other, _), ..] = SIGNED;
    let (statement, signed) = STATEMENTS[0];
    let vouches = |bytes: &[u8], digest: &Digest, pem: &str| {
        let found = Signature::in_bundle(bytes);
        found.iter().any(|one| one.vouches(digest, &[key(pem)]))
    };
    let right = bundle(statement, IN_TOTO, &["AAAA", signed]);
    assert!(vouches(&right, &digest, pem));
    assert!(!vouches(&right, &digest, other));
    assert!(!vouches(&right, &Digest::of(b"another image"), pem));
    // The kind of the payload is signed with it, and so is every letter.
    let renamed = bundle(statement, "text/plain", &[signed]);
    assert!(!vouches(&renamed, &digest, pem));
    let changed = bundle(&statement.replace("v1", "v2"), IN_TOTO, &[signed]);
    assert!(!vouches(&changed, &digest, pem));
    // Rightly signed, and says something else about the image.
    let (contents, signed) = STATEMENTS[1];
    let listed = bundle(contents, IN_TOTO, &[signed]);
    let found = &Signature::in_bundle(&listed)[0];
    let bytes = STANDARD.decode(signed).unwrap();
    assert!(key(pem).verifies(&found.message(), &bytes));
    assert!(!vouches(&listed, &digest, pem));
    // One form is not read as the other.
    assert!(!signature(statement, STATEMENTS[0].1).vouches(&digest, &[key(pem)]));
    let not_base64 = bundle("", IN_TOTO, &[]);
    for nonsense in [&b""[..], b"{}", b"[]", &not_base64] {
        assert_eq!(Signature::in_bundle(nonsense), []);
    }
}
