//! Values that only the devices which need them can read: [`Bundle`], sealed by the hub to one device's key.
//!
//! The seal is libsodium's sealed box (X25519, XSalsa20-Poly1305): whoever has only the public key, or carries the bytes,
//! cannot open it. It does not say who sealed it; that is the broker's part, where nobody but the hub writes to
//! a device's topics.

use std::collections::BTreeMap;
use std::fmt;

use crypto_box::aead::OsRng;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::Digest;
use crate::id::{DeviceId, SecretName, Version};

/// Bytes of one value.
pub const MAX_SECRET_BYTES: usize = 4096;

/// Secrets in one [`Bundle`].
pub const MAX_BUNDLE_SECRETS: usize = 512;

/// Bytes of the values of one [`Bundle`], with their names.
pub const MAX_BUNDLE_BYTES: usize = 48 * 1024;

/// A value. Never printed; overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretValue(Vec<u8>);

impl SecretValue {
    /// Wraps bytes.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes themselves, to be handed to whom they are for.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// As text that can be the value of an environment variable; `None` when it is not.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        let text = std::str::from_utf8(&self.0).ok()?;
        (!text.contains('\0')).then_some(text)
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(…)")
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A value and which one it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Grows with every change of any secret of a hub, so a secret that is removed and set again has a new one.
    pub revision: u64,
    /// The value.
    pub value: SecretValue,
}

/// All secrets that one device needs, at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// For whom: a bundle of another device is refused.
    pub device: DeviceId,
    /// Grows with every bundle of this device: an older one is refused.
    pub version: Version,
    /// By name.
    pub secrets: BTreeMap<SecretName, Secret>,
}

impl Bundle {
    /// What a secret of this name and length counts against [`MAX_BUNDLE_BYTES`].
    #[must_use]
    pub fn cost(name: &SecretName, value_bytes: usize) -> usize {
        // Revision and lengths.
        name.as_str().len() + value_bytes + 16
    }

    fn is_bounded(&self) -> bool {
        let costs = self.secrets.iter().map(|(name, secret)| {
            let bytes = secret.value.expose().len();
            (bytes <= MAX_SECRET_BYTES).then(|| Self::cost(name, bytes))
        });
        self.secrets.len() <= MAX_BUNDLE_SECRETS
            && costs
                .sum::<Option<usize>>()
                .is_some_and(|sum| sum <= MAX_BUNDLE_BYTES)
    }
}

/// Down, retained: a [`Bundle`] that only one device can open.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSecrets {
    /// The sealed box.
    pub sealed: Vec<u8>,
}

impl fmt::Debug for SealedSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedSecrets({} bytes)", self.sealed.len())
    }
}

/// Why a sealed bundle was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Sealed to another key, or damaged.
    #[error("it is damaged, or sealed to another key than this device has now")]
    Sealed,
    /// Not a bundle that this program knows.
    #[error("what is in it is no bundle of secrets that this version can read")]
    Content,
}

/// The public half of a device's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Wraps the bytes of a key.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// For people to compare: 16 hexadecimal digits.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hex = Digest::of(&self.0).hex();
        hex.truncate(16);
        hex
    }

    /// Seals a bundle, with random bytes from the kernel.
    ///
    /// # Panics
    ///
    /// When the kernel has no random bytes; it has.
    #[must_use]
    pub fn seal(&self, bundle: &Bundle) -> SealedSecrets {
        let mut plain =
            postcard::to_allocvec(bundle).expect("a bundle serializes into a growing buffer");
        let sealed = crypto_box::PublicKey::from_bytes(self.0)
            .seal(&mut OsRng, &plain)
            .expect("a bundle is far smaller than what the cipher takes");
        plain.zeroize();
        SealedSecrets { sealed }
    }
}

/// A device's own key. Its secret half never leaves the device.
#[derive(Clone)]
pub struct DeviceKey(crypto_box::SecretKey);

impl DeviceKey {
    /// A new one, from random bytes of the kernel.
    ///
    /// # Panics
    ///
    /// When the kernel has no random bytes; it has.
    #[must_use]
    pub fn generate() -> Self {
        Self(crypto_box::SecretKey::generate(&mut OsRng))
    }

    /// Wraps the bytes of the secret half.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes.into())
    }

    /// The bytes of the secret half, to be kept.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The half that the hub is told.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.public_key().to_bytes())
    }

    /// Opens a bundle that was sealed to this key.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. No input panics.
    pub fn open(&self, sealed: &SealedSecrets) -> Result<Bundle, OpenError> {
        let mut plain = self
            .0
            .unseal(&sealed.sealed)
            .map_err(|_| OpenError::Sealed)?;
        let bundle: Result<Bundle, _> = postcard::from_bytes(&plain);
        plain.zeroize();
        bundle
            .ok()
            .filter(Bundle::is_bounded)
            .ok_or(OpenError::Content)
    }
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceKey({})", self.public().fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(values: &[(&str, &[u8])]) -> Bundle {
        let secret = |value: &[u8]| Secret {
            revision: 7,
            value: SecretValue::new(value.to_vec()),
        };
        Bundle {
            device: "gw-1".parse().unwrap(),
            version: Version::from_numbers(1, 2).unwrap(),
            secrets: values
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), secret(value)))
                .collect(),
        }
    }

    #[test]
    fn only_the_key_it_was_sealed_to_opens_a_bundle_and_only_whole() {
        let (key, other) = (DeviceKey::generate(), DeviceKey::generate());
        let plain = bundle(&[("db-password", b"correct horse")]);
        let sealed = key.public().seal(&plain);
        assert_eq!(key.open(&sealed).unwrap(), plain);
        let again = DeviceKey::from_bytes(key.to_bytes());
        assert_eq!(again.open(&sealed).unwrap(), plain);
        assert_eq!(other.open(&sealed), Err(OpenError::Sealed));
        for (index, _) in sealed.sealed.iter().enumerate() {
            let mut changed = sealed.clone();
            changed.sealed[index] ^= 1;
            assert!(key.open(&changed).is_err(), "byte {index}");
            changed.sealed.truncate(index);
            assert!(key.open(&changed).is_err(), "{index} bytes");
        }
        let found = |needle: &[u8], bytes: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
        for needle in [&b"correct"[..], b"db-password", b"gw-1"] {
            assert!(!found(needle, &sealed.sealed));
        }
    }

    #[test]
    fn what_is_too_large_or_no_bundle_is_refused() {
        let key = DeviceKey::generate();
        let large = bundle(&[("a", &[b'x'; MAX_SECRET_BYTES + 1])]);
        assert_eq!(
            key.open(&key.public().seal(&large)),
            Err(OpenError::Content)
        );
        let names: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
        let full = [b'x'; MAX_SECRET_BYTES];
        let many: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &full[..])).collect();
        assert_eq!(
            key.open(&key.public().seal(&bundle(&many))),
            Err(OpenError::Content)
        );
        assert!(key.open(&key.public().seal(&bundle(&many[..11]))).is_ok());
        let junk = crypto_box::PublicKey::from_bytes(*key.public().as_bytes())
            .seal(&mut OsRng, b"\xff\xff\xff\xff\xff")
            .unwrap();
        assert_eq!(
            key.open(&SealedSecrets { sealed: junk }),
            Err(OpenError::Content)
        );
    }

    #[test]
    fn values_are_never_printed() {
        let text = format!("{:?}", bundle(&[("a", b"horse")]));
        assert!(!text.contains("horse") && !text.contains("104"), "{text}");
        let key = DeviceKey::generate();
        let text = format!("{key:?}");
        assert!(!text.contains(&format!("{:?}", key.to_bytes())), "{text}");
    }
}
