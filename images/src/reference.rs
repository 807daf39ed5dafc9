//! [`Reference`]: which image, in the words that Docker made usual: `HOST/REPOSITORY[:TAG][@DIGEST]`.
//!
//! The grammar is that of github.com/distribution/reference: what Docker, containerd and Podman accept as a
//! normalized name is accepted here and means the same.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// The host that is meant when a reference names none.
pub const DEFAULT_HOST: &str = "docker.io";
/// The longest repository with its host, in bytes (distribution/reference, `RepositoryNameTotalLengthMax`).
pub const NAME_BYTES_MAX: usize = 255;
/// The longest tag in bytes (distribution specification, "Pulling manifests").
pub const TAG_BYTES_MAX: usize = 128;

/// An image reference in its normal form: the host spelled out, Docker Hub's `library/` added, and the tag
/// `latest` when there is neither tag nor digest.
///
/// [`Display`](fmt::Display) writes that form and [`Reference::parse`] reads it back to an equal value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a [`Reference`]. Each message ends a sentence that begins with the reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseReferenceError {
    /// Nothing there, or nothing before the tag or digest.
    #[error("image reference names no repository; write it as HOST/REPOSITORY:TAG")]
    Empty,
    /// More than [`NAME_BYTES_MAX`] bytes of host and repository.
    #[error("image name is longer than {NAME_BYTES_MAX} bytes")]
    TooLong,
    /// The part before the first slash is not a host name, IPv4 or `[IPv6]` address with an optional port.
    #[error("\"{0}\" is not a registry host; write HOST, HOST:PORT or [IPV6]:PORT")]
    Host(String),
    /// A path component breaks the grammar; upper-case letters are the usual reason.
    #[error(
        "\"{0}\" is not a repository: its parts are lower-case letters and digits, joined by one '.', \
         one or two '_', or '-'"
    )]
    Repository(String),
    /// The tag breaks the grammar.
    #[error(
        "\"{0}\" is not a tag: at most {TAG_BYTES_MAX} letters, digits, '_', '.' and '-', not first '.' or '-'"
    )]
    Tag(String),
    /// What follows the `@` is not a SHA-256 digest.
    #[error("the part after \"@\" is not a digest that can be used")]
    Digest(#[source] foreshore_protocol::digest::ParseDigestError),
    /// 64 hexadecimal digits could be meant as a digest.
    #[error("a name of 64 hexadecimal digits is ambiguous; write REPOSITORY@sha256:DIGEST")]
    LooksLikeDigest,
}

impl Reference {
    /// Reads a reference such as `alpine`, `ghcr.io/acme/modbus:1.4`, `registry.lan:5000/x@sha256:…` or
    /// `hub.internal/demo:v1@sha256:…`.
    ///
    /// The first part is a host if it holds a `.` or a `:`, is `localhost`, or has an upper-case letter;
    /// otherwise the image is on Docker Hub.
    ///
    /// # Errors
    /// A [`ParseReferenceError`] that names the offending part.
    pub fn parse(text: &str) -> Result<Self, ParseReferenceError> {
        // A digest is 71 bytes, a tag at most 128: anything longer is refused before it is looked at.
        if text.len() > NAME_BYTES_MAX + TAG_BYTES_MAX + 80 {
            return Err(ParseReferenceError::TooLong);
        }
        // With a tag it cannot be meant as one any more.
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ParseReferenceError::LooksLikeDigest);
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (
                name,
                Some(digest.parse().map_err(ParseReferenceError::Digest)?),
            ),
            None => (text, None),
        };
        // A colon after the last slash starts the tag; one before it is a port.
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        if name.is_empty() {
            return Err(ParseReferenceError::Empty);
        }
        let (host, path) = split_host(name);
        if !is_host(host) {
            return Err(ParseReferenceError::Host(host.to_owned()));
        }
        if path.is_empty() {
            return Err(ParseReferenceError::Empty);
        }
        if !path.split('/').all(is_path_component) {
            return Err(ParseReferenceError::Repository(path.to_owned()));
        }
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(ParseReferenceError::Tag(tag.to_owned()));
        }
        let host = if host == "index.docker.io" {
            DEFAULT_HOST
        } else {
            host
        };
        let repository = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if host.len() + 1 + repository.len() > NAME_BYTES_MAX {
            return Err(ParseReferenceError::TooLong);
        }
        let tag = tag
            .map(str::to_owned)
            .or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self {
            host: host.to_owned(),
            repository,
            tag,
            digest,
        })
    }

    /// The registry's host, with the port if one was written: `docker.io`, `registry.lan:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository on that host: `library/alpine`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if there is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if there is one. It wins over the tag.
    #[must_use]
    pub const fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository pinned to `digest`, without a tag: the form that releases carry.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            host: self.host.clone(),
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// `HOST/REPOSITORY`, without tag and digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// Docker's rule for what is a host (distribution/reference, `splitDockerDomain`).
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_HOST, name),
    }
}

fn is_host(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else {
            return false;
        };
        let port_is_good = rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port);
        // An IPv4 address at its end is part of RFC 4291's grammar, but not of Docker's.
        return port_is_good
            && !address.contains('.')
            && address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let (name, port) = match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    };
    let label = |label: &str| {
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = label.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    };
    name.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return false;
    }
    bytes.split(alphanumeric).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-')
    })
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    tag.len() <= TAG_BYTES_MAX
        && tag.as_bytes().first().is_some_and(word)
        && tag
            .bytes()
            .all(|byte| word(&byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normal_forms() {
        let digest = format!("sha256:{HEX}");
        for (text, normal) in [
            ("alpine", "docker.io/library/alpine:latest".to_owned()),
            ("alpine:3.20", "docker.io/library/alpine:3.20".to_owned()),
            ("acme/modbus", "docker.io/acme/modbus:latest".to_owned()),
            (
                "docker.io/alpine",
                "docker.io/library/alpine:latest".to_owned(),
            ),
            (
                "index.docker.io/alpine",
                "docker.io/library/alpine:latest".to_owned(),
            ),
            (
                "ghcr.io/acme/modbus:1.4",
                "ghcr.io/acme/modbus:1.4".to_owned(),
            ),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x", "localhost:5000/x:latest".to_owned()),
            ("LOCAL/x", "LOCAL/x:latest".to_owned()),
            (
                "127.0.0.1:5000/a/b/c:v1",
                "127.0.0.1:5000/a/b/c:v1".to_owned(),
            ),
            ("[::1]:5000/x:v1", "[::1]:5000/x:v1".to_owned()),
            ("[fe80::1]/x", "[fe80::1]/x:latest".to_owned()),
            ("hub.internal/demo:v1", "hub.internal/demo:v1".to_owned()),
            (
                "a__b/c-d.e---f:T_1.-",
                "docker.io/a__b/c-d.e---f:T_1.-".to_owned(),
            ),
            (
                &format!("{HEX}:tag"),
                format!("docker.io/library/{HEX}:tag"),
            ),
            (
                &format!("ghcr.io/x@{digest}"),
                format!("ghcr.io/x@{digest}"),
            ),
            (
                &format!("ghcr.io/x:1@{digest}"),
                format!("ghcr.io/x:1@{digest}"),
            ),
        ] {
            assert_eq!(
                Reference::parse(text).map(|r| r.to_string()),
                Ok(normal),
                "{text}"
            );
        }
    }

    #[test]
    fn refusals() {
        for text in [
            "",
            ":tag",
            "@sha256:00",
            "UPPER",
            "ghcr.io/Acme/x",
            "ghcr.io/",
            "ghcr.io//x",
            "a//b",
            "a/",
            "a:",
            "a:.tag",
            "a:-tag",
            "a b",
            "a..b",
            "a___b",
            "-a/b",
            "_a",
            "host.:5000/x",
            "-host.lan/x",
            "host:/x",
            "host:0/x",
            "host:65536/x",
            "host:+80/x",
            "[::1/x",
            "[nonsense]/x",
            "[::ffff:1.2.3.4]/x",
            "::1/x",
            "../etc/passwd",
            "ghcr.io/../x",
            "ghcr.io/x@sha512:00",
            "ghcr.io/x@",
            "ghcr.io/x@sha256:E3B0",
            "https://ghcr.io/x",
            "user@ghcr.io/x",
            HEX,
            "é",
            "x\0y",
            "x\n",
        ] {
            assert!(
                Reference::parse(text).is_err(),
                "{text:?} was accepted: {:?}",
                Reference::parse(text)
            );
        }
        assert_eq!(
            Reference::parse(&"a".repeat(300)),
            Err(ParseReferenceError::TooLong)
        );
        assert_eq!(
            Reference::parse(&"a".repeat(1 << 20)),
            Err(ParseReferenceError::TooLong)
        );
        assert!(Reference::parse(&format!("x:{}", "t".repeat(128))).is_ok());
        assert!(Reference::parse(&format!("x:{}", "t".repeat(129))).is_err());
    }

    #[test]
    fn pinning_drops_the_tag() {
        let pinned = Reference::parse("hub.internal/demo:v1")
            .unwrap()
            .with_digest(Digest::of(b""));
        assert_eq!(
            pinned.to_string(),
            format!("hub.internal/demo@sha256:{HEX}")
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = Reference::parse(&text);
        }

        #[test]
        fn what_is_accepted_reads_back_equal(text in "[a-zA-Z0-9.:/_@\\[\\]-]{0,60}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference));
            }
        }

        #[test]
        fn good_references_are_accepted(
            host in "([a-z0-9]{1,8}\\.){1,3}[a-z]{2,4}(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,8}(((\\.|_|__|-{1,3})[a-z0-9]{1,5})?/[a-z0-9]{1,8}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            pinned: bool,
        ) {
            let mut text = format!("{host}/{path}");
            if let Some(tag) = &tag { text += &format!(":{tag}"); }
            if pinned { text += &format!("@sha256:{HEX}"); }
            let reference = Reference::parse(&text).unwrap();
            prop_assert_eq!(reference.host(), &host);
            prop_assert_eq!(reference.tag().is_some(), tag.is_some() || !pinned);
            prop_assert_eq!(reference.digest().is_some(), pinned);
            prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference));
        }
    }
}
