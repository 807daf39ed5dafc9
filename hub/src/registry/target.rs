//! [`Target`]: what a path below `/v2/` asks for (distribution specification, "Endpoints").

use foreshore_images::Reference;
use foreshore_protocol::Digest;

use crate::images::HUB_HOST;

/// A name may hold slashes, so a path is read from its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// `_catalog`
    Catalog,
    /// `NAME/manifests/TAG` or `NAME/manifests/DIGEST`
    Manifest(String, ManifestReference),
    /// `NAME/manifests/DIGEST` with what the hub does not take for one
    NoDigest,
    /// `NAME/blobs/DIGEST`
    Blob(String, Digest),
    /// `NAME/blobs/uploads/`
    Uploads(String),
    /// `NAME/blobs/uploads/ID`
    Upload(String, String),
    /// `NAME/tags/list`
    Tags(String),
    /// `NAME/referrers/DIGEST`
    Referrers(String, Digest),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ManifestReference {
    Tag(String),
    Digest(Digest),
}

pub(super) fn parse(path: &str) -> Option<Target> {
    if path == "_catalog" {
        return Some(Target::Catalog);
    }
    let (rest, last) = path.rsplit_once('/')?;
    if last.is_empty() || last == "uploads" {
        let rest = if last.is_empty() { rest } else { path };
        return Some(Target::Uploads(name(rest.strip_suffix("/blobs/uploads")?)?));
    }
    let (before, kind) = rest.rsplit_once('/')?;
    match kind {
        // No tag has a colon.
        "manifests" if last.contains(':') => {
            let name = name(before)?;
            Some(last.parse().map_or(Target::NoDigest, |digest| {
                Target::Manifest(name, ManifestReference::Digest(digest))
            }))
        }
        "manifests" => {
            let tagged = Reference::parse(&format!("{HUB_HOST}/x:{last}")).ok()?;
            // Nothing but a tag may follow the colon.
            (tagged.tag()? == last).then_some(())?;
            Some(Target::Manifest(
                name(before)?,
                ManifestReference::Tag(last.to_owned()),
            ))
        }
        "blobs" => Some(Target::Blob(name(before)?, last.parse().ok()?)),
        "uploads" => Some(Target::Upload(
            name(before.strip_suffix("/blobs")?)?,
            last.to_owned(),
        )),
        "tags" if last == "list" => Some(Target::Tags(name(before)?)),
        "referrers" => Some(Target::Referrers(name(before)?, last.parse().ok()?)),
        _ => None,
    }
}

/// A repository of the hub, or `HOST:PORT/REPOSITORY` of another registry.
fn name(text: &str) -> Option<String> {
    let own = Reference::parse(&format!("{HUB_HOST}/{text}"));
    let named = |reference: Reference| {
        (reference.tag() == Some("latest") && reference.digest().is_none()).then_some(reference)
    };
    if let Some(own) = own.ok().and_then(named)
        && own.repository() == text
    {
        return Some(text.to_owned());
    }
    let (host, _) = text.split_once('/')?;
    let other = Reference::parse(text).ok().and_then(named)?;
    (host.contains(':') && other.name() == text).then(|| text.to_owned())
}

impl Target {
    /// The repository that it is in.
    pub(super) fn repository(&self) -> Option<&str> {
        match self {
            Self::Catalog | Self::NoDigest => None,
            Self::Manifest(name, _)
            | Self::Blob(name, _)
            | Self::Uploads(name)
            | Self::Upload(name, _)
            | Self::Tags(name)
            | Self::Referrers(name, _) => Some(name),
        }
    }
}

/// Whether repositories may be named so: the first parts of a name.
#[must_use]
pub fn is_prefix(text: &str) -> bool {
    name(&format!("{text}/x")).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_slashes_are_read_from_their_end() {
        let digest = Digest::of(b"");
        let manifest = |name: &str, reference| Some(Target::Manifest(name.to_owned(), reference));
        assert_eq!(
            parse("demo/manifests/v1"),
            manifest("demo", ManifestReference::Tag("v1".to_owned()))
        );
        assert_eq!(
            parse(&format!("acme/manifests/demo/manifests/{digest}")),
            manifest("acme/manifests/demo", ManifestReference::Digest(digest))
        );
        assert_eq!(
            parse(&format!("demo/blobs/{digest}")),
            Some(Target::Blob("demo".to_owned(), digest))
        );
        assert_eq!(
            parse(&format!("r.lan:5000/a/b/blobs/{digest}")),
            Some(Target::Blob("r.lan:5000/a/b".to_owned(), digest))
        );
        for digest in ["sha256:00", "sha512:00", ":"] {
            let path = format!("demo/manifests/{digest}");
            assert_eq!(parse(&path), Some(Target::NoDigest));
        }
        assert_eq!(parse("_catalog"), Some(Target::Catalog));
        assert_eq!(parse("a/b/tags/list"), Some(Target::Tags("a/b".to_owned())));
        assert_eq!(
            parse(&format!("a/referrers/{digest}")),
            Some(Target::Referrers("a".to_owned(), digest))
        );
        for uploads in ["a/b/blobs/uploads/", "a/b/blobs/uploads"] {
            assert_eq!(parse(uploads), Some(Target::Uploads("a/b".to_owned())));
        }
        assert_eq!(
            parse("a/blobs/uploads/blobs/uploads/1f"),
            Some(Target::Upload(
                "a/blobs/uploads".to_owned(),
                "1f".to_owned()
            ))
        );
    }

    #[test]
    fn what_is_no_name_asks_for_nothing() {
        let long = format!("{}/manifests/v1", "a".repeat(256));
        for bad in [
            "",
            "demo",
            "manifests/v1",
            "/manifests/v1",
            "../x/manifests/v1",
            "a/../b/manifests/v1",
            "a//b/manifests/v1",
            "demo/blobs/v1",
            "Demo/manifests/v1",
            "demo/tags/other",
            "demo/manifests/.x",
            "demo:x/manifests/v1",
            "demo@x/manifests/v1",
            "demo/manifests/a b",
            "demo/manifests/a\0",
            "_catalog/tags/list",
            "/blobs/uploads/",
            "blobs/uploads/",
            "../blobs/uploads/1f",
            "r.lan:x/a/tags/list",
            "r.lan:5000/tags/list",
            "r.lan:5000/../tags/list",
            "[::1]/a:1/tags/list",
            &long,
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_path_leads_out(parts in proptest::collection::vec("[a-z]{0,3}|\\.{1,2}|[:@%\\x00A-Z_-]{1,2}|manifests|blobs|uploads|tags|list|r\\.lan:5|sha256:[0-9a-f]{64}", 0..8)) {
            let path = parts.join("/");
            if let Some(name) = parse(&path).as_ref().and_then(Target::repository) {
                assert!(path.starts_with(name), "{path}");
                assert!(name.split('/').all(|part| part != ".." && part != "." && !part.is_empty()), "{path}");
                assert!(name.len() <= 255 && !name.contains(['%', '@', '\0']), "{path}");
            }
        }
    }
}
