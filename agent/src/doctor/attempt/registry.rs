//! Tries a registry with the client that pulls images: the same address, certificates, credentials and proxies.

use std::path::Path;
use std::time::Duration;

use foreshore_images::Reference;
use foreshore_images::registry::{Client, FetchError, Timeouts};

use super::Said;
use super::child::say;
use crate::causes::chain;
use crate::config::{Config, HUB_REGISTRY};
use crate::doctor::facts::RegistryAnswer;

/// An image that no registry has: its absence proves that a registry answers.
const ABSENT: &str = "foreshore/doctor:absent";

pub(super) fn examine(config: &Path, host: &str) {
    // The doctor has read it before, so there is nobody to tell.
    let Ok(config) = Config::load(config) else {
        return;
    };
    let answer = ask(&config, host).unwrap_or_else(RegistryAnswer::Failed);
    say(&Said::Registry { answer });
}

fn ask(config: &Config, host: &str) -> Result<RegistryAnswer, String> {
    let mut client = config.registry_client().map_err(|error| chain(&error))?;
    // Of the others, a wrong CA file would be the one that is told.
    client.registries.retain(|listed, _| listed == host);
    client.timeouts = Timeouts {
        connect: Duration::from_secs(5),
        stall: Duration::from_secs(5),
        exchange: Duration::from_secs(10),
        ..client.timeouts
    };
    let client = Client::new(client).map_err(|error| chain(&error))?;
    let reference = Reference::parse(&format!("{host}/{ABSENT}")).map_err(|error| chain(&error))?;
    if reference.host() != host {
        return Err(format!(
            "\"{host}\" is not how image references name a registry: write HOST:PORT or a name with a dot"
        ));
    }
    match client.manifest(&reference) {
        Ok(_) | Err(FetchError::NotFound { .. }) => Ok(RegistryAnswer::Answers),
        // Public registries do not tell what is absent from what is private; the hub does.
        Err(FetchError::Denied { status, .. }) if host == HUB_REGISTRY => {
            Ok(RegistryAnswer::Denied(format!(
                "the hub does not take the join token for images (HTTP {status})"
            )))
        }
        Err(FetchError::Denied { .. }) => Ok(RegistryAnswer::Answers),
        Err(FetchError::TimedOut { .. }) => Ok(RegistryAnswer::Silent),
        Err(error) => Err(chain(&error).replace(" for manifest foreshore/doctor:absent", "")),
    }
}
