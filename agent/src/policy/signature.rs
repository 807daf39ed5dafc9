//! `[[signatures]]`: which images run here only when they are signed, and by whom.

use foreshore_images::signature::{Demand, TrustedKey};
use foreshore_protocol::AppName;
use serde::Deserialize;

use super::Policy;
use super::pattern::part_matches;

/// One of `[[signatures]]`: every image that it means needs a signature by one of its keys.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignatureRule {
    /// The images that it means. Default: all.
    #[serde(default = "all")]
    pub images: Vec<ImagePattern>,
    /// Public keys in PEM form.
    pub keys: Vec<TrustedKey>,
}

fn all() -> Vec<ImagePattern> {
    vec![ImagePattern("*".to_owned())]
}

/// A pattern of image names (`HOST/REPOSITORY`, without tag and digest): `*` is anything, `?` one letter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ImagePattern(String);

impl TryFrom<String> for ImagePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // One that can match nothing would let everything through.
        let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        if text.is_empty()
            || !text
                .bytes()
                .all(|byte| letters(byte) || b"*?./:-_[]".contains(&byte))
        {
            return Err(format!(
                "{text:?} is no pattern of image names: write HOST/REPOSITORY without tag, for example \"ghcr.io/acme/*\""
            ));
        }
        let parts: Vec<&str> = text.split('/').collect();
        if text.contains('@') || parts[1..].iter().any(|part| part.contains(':')) {
            return Err(format!(
                "{text:?} has a tag or digest; write HOST/REPOSITORY alone"
            ));
        }
        let host = parts[0];
        let is_host = |host: &str| host.contains(['.', ':', '*', '?']) || host == "localhost";
        if !is_host(host) {
            return Err(format!(
                "{text:?} does not begin with a host; images of Docker Hub are \"docker.io/library/NAME\" or \"docker.io/USER/NAME\""
            ));
        }
        Ok(Self(text))
    }
}

impl ImagePattern {
    /// Whether it means the image of this name.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        part_matches(self.0.as_bytes(), name.as_bytes())
    }
}

impl SignatureRule {
    /// Whether it can be met at all.
    ///
    /// # Errors
    ///
    /// With what is wrong, for people.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.keys.is_empty() {
            return Err("signatures: a table without keys can be met by no image; name at least one, or leave the table out".to_owned());
        }
        if self.images.is_empty() {
            return Err("signatures: a table with `images = []` means none; leave it out, or leave the key out to mean all".to_owned());
        }
        Ok(())
    }
}

impl Policy {
    /// What an image of this name (`HOST/REPOSITORY`) needs before `app` may be switched to it: every rule that means it.
    /// Without an app, what is said for all.
    #[must_use]
    pub fn demands(&self, app: Option<&AppName>, name: &str) -> Vec<Demand<'_>> {
        let own = app.and_then(|app| self.apps.get(app)?.signatures.as_ref());
        own.unwrap_or(&self.signatures)
            .iter()
            .filter(|rule| rule.images.iter().any(|pattern| pattern.matches(name)))
            .map(|rule| Demand {
                by: self.path.to_str().unwrap_or("the device's policy"),
                keys: &rule.keys,
            })
            .collect()
    }
}
