//! `imagePullSecrets:` of an app: names of secrets that hold logins for registries. No login is ever here.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::check::{Checked, ensure};
use crate::id::SecretName;

/// Secrets that one app's images are pulled with. Together they fit into what a device is sent.
pub const MAX_PULL_SECRETS: usize = 8;

/// The long form of an entry, as in Kubernetes. The short form is the name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Long {
    name: SecretName,
}

impl From<Long> for SecretName {
    fn from(long: Long) -> Self {
        long.name
    }
}

/// Not too many, and each once: which one counts follows from the order.
pub(crate) fn check(path: &str, names: &[SecretName]) -> Checked {
    ensure(names.len() <= MAX_PULL_SECRETS, path, || {
        format!("at most {MAX_PULL_SECRETS} secrets are allowed")
    })?;
    let mut seen = BTreeSet::new();
    for (index, name) in names.iter().enumerate() {
        ensure(seen.insert(name), format_args!("{path}[{index}]"), || {
            format!("secret {name} is given twice; keep one")
        })?;
    }
    Ok(())
}
