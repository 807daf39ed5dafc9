//! The secrets of this device: opened from the newest bundle that the hub sent, kept in memory only.
//!
//! On disk are the device's own key and the bundle as it came, sealed to that key ([`crate::state`]).

use std::collections::BTreeMap;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{Bundle, DeviceKey, OpenError, PublicKey, SealedSecrets, Secret};
use foreshore_protocol::{DeviceId, Version};

use crate::runtime::secrets::Values;

/// The newest bundle, opened.
#[derive(Debug)]
pub struct Vault {
    device: DeviceId,
    /// `None` when none could be kept: then there are no secrets.
    key: Option<DeviceKey>,
    version: Option<Version>,
    secrets: Values,
}

/// Why a bundle is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It cannot be opened.
    #[error("secrets from the hub cannot be opened")]
    Open(#[from] OpenError),
    /// This device has no key.
    #[error("secrets from the hub cannot be opened: this device could not keep a key")]
    NoKey,
    /// It was made for another device.
    #[error("secrets from the hub are for device {0}")]
    Foreign(DeviceId),
    /// It is not newer than the one we have.
    #[error("secrets {offered} from the hub are not newer than {stored}")]
    Old {
        /// Its version.
        offered: Version,
        /// What we have.
        stored: Version,
    },
}

impl Vault {
    /// A vault without secrets.
    #[must_use]
    pub const fn new(device: DeviceId, key: Option<DeviceKey>) -> Self {
        Self {
            device,
            key,
            version: None,
            secrets: BTreeMap::new(),
        }
    }

    /// What the hub seals to.
    #[must_use]
    pub fn public_key(&self) -> Option<PublicKey> {
        self.key.as_ref().map(DeviceKey::public)
    }

    /// The version of the newest bundle.
    #[must_use]
    pub const fn version(&self) -> Option<Version> {
        self.version
    }

    /// Opens a bundle; [`Self::keep`] takes it.
    ///
    /// # Errors
    ///
    /// See [`Refused`]. Nothing has changed then.
    pub fn open(&self, sealed: &SealedSecrets) -> Result<Bundle, Refused> {
        let bundle = self.key.as_ref().ok_or(Refused::NoKey)?.open(sealed)?;
        if bundle.device != self.device {
            return Err(Refused::Foreign(bundle.device));
        }
        match self.version.filter(|stored| bundle.version <= *stored) {
            Some(stored) => Err(Refused::Old {
                offered: bundle.version,
                stored,
            }),
            None => Ok(bundle),
        }
    }

    /// Has these secrets from now on, and no others.
    pub fn keep(&mut self, bundle: Bundle) {
        self.version = Some(bundle.version);
        self.secrets = bundle.secrets;
    }

    /// Which secrets there are, with their revisions.
    #[must_use]
    pub fn revisions(&self) -> BTreeMap<SecretName, u64> {
        let secrets = self.secrets.iter();
        secrets
            .map(|(name, secret)| (name.clone(), secret.revision))
            .collect()
    }

    /// Those that a service names, as far as they are there.
    #[must_use]
    pub fn values(&self, service: &Service) -> Values {
        let mounts = service.secrets.iter();
        mounts
            .filter_map(|mount| self.secrets.get_key_value(&mount.source))
            .map(|(name, secret)| (name.clone(), secret.clone()))
            .collect()
    }

    /// Those that hold the logins of a release, as far as they are there, in its order.
    #[must_use]
    pub fn logins(&self, release: &Release) -> Vec<(SecretName, Secret)> {
        let names = release.image_pull_secrets.iter();
        names
            .filter_map(|name| self.secrets.get_key_value(name))
            .map(|(name, secret)| (name.clone(), secret.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foreshore_protocol::secret::{Secret, SecretValue};

    fn bundle(device: &str, generation: u64, value: &str) -> Bundle {
        let secret = Secret {
            revision: generation,
            value: SecretValue::new(value.into()),
        };
        Bundle {
            device: device.parse().unwrap(),
            version: Version::from_numbers(1, generation).unwrap(),
            secrets: [("a".parse().unwrap(), secret)].into(),
        }
    }

    #[test]
    fn old_and_foreign_bundles_and_those_of_other_keys_are_refused() {
        let key = DeviceKey::generate();
        let seal = |bundle: &Bundle| key.public().seal(bundle);
        let mut vault = Vault::new("gw-1".parse().unwrap(), Some(key.clone()));
        let second = vault.open(&seal(&bundle("gw-1", 2, "two"))).unwrap();
        vault.keep(second);
        for generation in [1, 2] {
            let refused = vault.open(&seal(&bundle("gw-1", generation, "old")));
            assert!(matches!(refused, Err(Refused::Old { .. })), "{refused:?}");
        }
        let refused = vault.open(&seal(&bundle("gw-2", 3, "x")));
        assert!(matches!(refused, Err(Refused::Foreign(_))), "{refused:?}");
        let other = DeviceKey::generate().public().seal(&bundle("gw-1", 3, "x"));
        assert_eq!(vault.open(&other), Err(OpenError::Sealed.into()));
        let keyless = Vault::new("gw-1".parse().unwrap(), None);
        let refused = keyless.open(&seal(&bundle("gw-1", 3, "x")));
        assert_eq!(refused, Err(Refused::NoKey));
        assert_eq!(vault.revisions(), [("a".parse().unwrap(), 2)].into());
        let third = vault.open(&seal(&bundle("gw-1", 3, "three"))).unwrap();
        vault.keep(third);
        assert!(!format!("{vault:?}").contains("three"));
    }
}
