//! Image references: what is accepted is exactly what github.com/distribution/reference accepts, and means the same.

use std::sync::LazyLock;

use foreshore_images::Reference;
use foreshore_images::reference::{DEFAULT_HOST, NAME_BYTES_MAX};
use regex::Regex;

use crate::{accepted, memory};

/// `ReferenceRegexp` of that project: domain with port, path, tag, and of digests those that are used here.
static GRAMMAR: LazyLock<Regex> = LazyLock::new(|| {
    let part = "(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])";
    let domain = format!(r"(?:{part}(?:\.{part})*|\[(?:[a-fA-F0-9:]+)\])(?::[0-9]+)?");
    let piece = "[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*";
    let tag = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}";
    Regex::new(&format!(
        r"\A({domain})/({piece}(?:/{piece})*)(?::({tag}))?(?:@(sha256:[0-9a-f]{{64}}))?\z"
    ))
    .expect("it is an expression")
});

/// `ParseNormalizedNamed` of that project, and then `TagNameOnly`, but for three rules of this one: a port is a port, an
/// IPv6 address is one, and host and path together have a bound.
fn model(text: &str) -> Option<String> {
    let hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == 64 && text.bytes().all(hex) {
        return None;
    }
    let (domain, rest) = match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.to_lowercase() != first =>
        {
            (first, rest)
        }
        _ => (DEFAULT_HOST, text),
    };
    let domain = if domain == "index.docker.io" {
        DEFAULT_HOST
    } else {
        domain
    };
    let library = domain == DEFAULT_HOST && !rest.contains('/');
    let rest = if library {
        format!("library/{rest}")
    } else {
        rest.to_owned()
    };
    let whole = format!("{domain}/{rest}");
    let found = GRAMMAR.captures(&whole)?;
    let (domain, path) = (&found[1], &found[2]);
    let bare = domain.rsplit_once("]:").map(|(_, port)| port);
    let port = if domain.starts_with('[') {
        bare
    } else {
        domain.split_once(':').map(|(_, port)| port)
    };
    if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return None;
    }
    if let Some(address) = domain.strip_prefix('[') {
        let (address, _) = address.split_once(']')?;
        address.parse::<std::net::Ipv6Addr>().ok()?;
    }
    if domain.len() + 1 + path.len() > NAME_BYTES_MAX {
        return None;
    }
    let latest = found.get(3).is_none() && found.get(4).is_none();
    Some(if latest { whole + ":latest" } else { whole })
}

/// One reference.
///
/// # Panics
/// When what it means is not what it means to Docker, or does not come back as written.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let parsed = memory::within(4096 + 4 * text.len(), || Reference::parse(text).ok());
    let shown = parsed.as_ref().map(ToString::to_string);
    assert_eq!(shown, model(text), "{text:?} means another image");
    let (Some(reference), Some(shown)) = (parsed, shown) else {
        return;
    };
    accepted();
    assert_eq!(Reference::parse(&shown).as_ref(), Ok(&reference));
    assert_eq!(
        reference.name(),
        format!("{}/{}", reference.host(), reference.repository())
    );
    let digest = foreshore_images::Digest::of(bytes);
    let pinned = reference.with_digest(digest);
    assert_eq!((pinned.tag(), pinned.digest()), (None, Some(digest)));
    assert_eq!(Reference::parse(&pinned.to_string()), Ok(pinned));
    // It becomes part of a URL and of paths as it stands.
    for part in reference.repository().split('/') {
        assert!(!matches!(part, "" | "." | ".."), "{shown}");
    }
    assert!(
        shown.bytes().all(|byte| byte.is_ascii_graphic()),
        "{shown:?}"
    );
}
