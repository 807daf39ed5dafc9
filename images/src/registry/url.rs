//! The few things about URLs that decide who is spoken to and who gets what.

use ureq::http::Uri;

/// Scheme, host and port: what credentials are tied to (RFC 6454).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin {
    https: bool,
    hostname: String,
    port: u16,
}

impl Origin {
    /// The origin of an absolute `http` or `https` URL without user name and password.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return None;
        }
        // Not `authority.port()`: it has none for a port beyond 16 bits, too.
        let port = match authority.as_str().strip_prefix(authority.host())? {
            "" if https => 443,
            "" => 80,
            port => port.strip_prefix(':')?.parse().ok()?,
        };
        Some(Self {
            https,
            hostname: authority.host().to_ascii_lowercase(),
            port,
        })
    }

    pub(super) const fn is_https(&self) -> bool {
        self.https
    }

    /// Lower-case, without the port.
    pub(super) fn hostname(&self) -> String {
        self.hostname.clone()
    }

    /// `HOST:PORT`, the port always there.
    pub(super) fn authority(&self) -> String {
        format!("{}:{}", self.hostname, self.port)
    }

    /// `SCHEME://HOST:PORT`, a default port left out.
    pub(super) fn base(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let default = if self.https { 443 } else { 80 };
        if self.port == default {
            format!("{scheme}://{}", self.hostname)
        } else {
            format!("{scheme}://{}:{}", self.hostname, self.port)
        }
    }
}

/// What a `Location` header means, seen from `base`. `None` for what no registry sends.
pub(super) fn resolve(base: &Origin, location: &str) -> Option<String> {
    let location = location.split('#').next().unwrap_or_default();
    if location.starts_with("//") {
        let scheme = if base.is_https() { "https" } else { "http" };
        return Some(format!("{scheme}:{location}"));
    }
    if location.starts_with('/') {
        return Some(format!("{}{location}", base.base()));
    }
    location.contains("://").then(|| location.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let base = |url: &str| Origin::parse(url).map(|origin| origin.base());
        assert_eq!(
            base("https://GHCR.io/v2/").as_deref(),
            Some("https://ghcr.io")
        );
        assert_eq!(base("http://h:5000/x?y").as_deref(), Some("http://h:5000"));
        assert_eq!(base("https://h:443").as_deref(), Some("https://h"));
        assert_eq!(
            base("http://[::1]:5000/").as_deref(),
            Some("http://[::1]:5000")
        );
        for bad in [
            "",
            "h:5000",
            "/v2/",
            "ftp://h/",
            "https://u:p@h/",
            "https://",
            "http://h:99999/",
            "file:///etc",
        ] {
            assert_eq!(base(bad), None, "{bad}");
        }
    }

    #[test]
    fn locations() {
        let base = Origin::parse("https://h:1").unwrap();
        assert_eq!(resolve(&base, "/a?b#c").as_deref(), Some("https://h:1/a?b"));
        assert_eq!(resolve(&base, "//cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(resolve(&base, "http://x/y").as_deref(), Some("http://x/y"));
        assert_eq!(resolve(&base, "relative"), None);
        assert_eq!(resolve(&base, ""), None);
    }
}
