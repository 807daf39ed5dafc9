//! Signatures of images: nothing vouches for one but what was really signed.

use std::sync::LazyLock;

use foreshore_images::Digest;
use foreshore_images::fuzz::vouching;
use foreshore_images::signature::TrustedKey;

use crate::{accepted, memory};

/// Public keys whose private halves were thrown away once they had signed what the corpus has: P-256, P-384, Ed25519, RSA.
const KEYS: [&str; 4] = [
    "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElSj0n6mdVUBkACLrW1OmYLkFWR3A\niECnyg+r4gCfH3EF/cHPbNgaEpGqAuQTaVy6X66YHrGitZ1e206mlb8mqg==\n-----END PUBLIC KEY-----",
    "-----BEGIN PUBLIC KEY-----\nMHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEk+v42mnqVJy/kVsBDq0Oz7qc9zXjLIDr\nbqQNALXsHa1QGWrXqwSgpQTj/Ml9gSkWwZZGzhmuHNZ+Vd9aFJ9x9uEe50nXSd0c\nYsp3OcvNxrPETdDLVqH+/aq8XFxxMOoa\n-----END PUBLIC KEY-----",
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAIuPoA/hDLbZD2klKPbfUXVBLdwYMyh6HnJ5mkz7liy0=\n-----END PUBLIC KEY-----",
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA3BEnnDOAhSBNvVGSZ0rK\nRqCnd0Oa8f/+YIUDe6AWfMk5dHB4huDCDwwSwsetyaiXX8MYWPKQ2ynUr7W/Anrc\nJ2+dMD4KaHFiehpG8DxelHAKb+53zQfFoa/pwse6NCOJ3Z/VwPv9LCnRzlKoNeSZ\n+JvTQ27kz2r+9bSeP1KlrnYCccsARCEI+e2HxA2az0CFZmIyeLQAvp13JCXh+6cR\nivwk5GCvisqMy5BM1hqokiAEqqvMkRSerwwitNcTspjXQHtm9+GyfDlW6fi1W1vV\nRXuyCwHLmsrkHTYsS9Rz/jG0lMCaKojJtXFxXFldrvDPo2dEJqOfYNY46n7tChxv\nUQIDAQAB\n-----END PUBLIC KEY-----",
];

/// All that was signed with them and names an image, the one of the digest of `image`.
const SIGNED: [&str; 2] = [
    r#"{"critical":{"identity":{"docker-reference":"registry.example/demo"},"image":{"docker-manifest-digest":"sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"},"type":"cosign container image signature"},"optional":null}"#,
    r#"{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"}}],"predicateType":"https://sigstore.dev/cosign/sign/v1","predicate":{}}"#,
];

static TRUSTED: LazyLock<Vec<TrustedKey>> = LazyLock::new(|| {
    let key = |pem: &str| TrustedKey::try_from(pem.to_owned());
    KEYS.iter()
        .map(|pem| key(pem).expect("these are keys"))
        .collect()
});

/// One bundle, file of kept signatures, or key.
///
/// # Panics
/// When it vouches for an image without having been signed, or takes too much memory.
pub fn run(bytes: &[u8]) {
    let keys = &*TRUSTED;
    let image = Digest::of(b"image");
    let limit = (64 << 10) + 64 * bytes.len();
    let found = memory::within(limit, || vouching(bytes, &image, keys));
    for payload in &found {
        accepted();
        assert!(
            SIGNED.contains(&payload.as_str()),
            "nobody signed {payload:?}"
        );
    }
    if !found.is_empty() {
        assert!(vouching(bytes, &Digest::of(b"another"), keys).is_empty());
        assert!(vouching(bytes, &image, &[]).is_empty());
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && TrustedKey::try_from(text.to_owned()).is_ok()
    {
        accepted();
        assert!(text.contains("-----BEGIN PUBLIC KEY-----"));
    }
}
