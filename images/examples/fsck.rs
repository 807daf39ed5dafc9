//! Looks through a store and repairs it, as a device does: `fsck ROOT HTTP_REGISTRY/NAME@DIGEST`. The tests kill it at every
//! moment.

use std::path::Path;

use foreshore_images::registry::{Client, ClientConfig, RegistryConfig};
use foreshore_images::store::{Sources, Store};
use foreshore_images::{Platform, Reference};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, image] = arguments.as_slice() else {
        return Err("usage: fsck ROOT HTTP_REGISTRY/NAME@DIGEST".into());
    };
    let reference = Reference::parse(image)?;
    let registry = RegistryConfig {
        plain_http: true,
        ..RegistryConfig::default()
    };
    let client = Client::new(ClientConfig {
        registries: [(reference.host().to_owned(), registry)].into(),
        ..ClientConfig::default()
    })?;
    let digest = reference.digest().ok_or("it names no digest")?;
    let sources = Sources {
        client: &client,
        references: &[(digest, reference)].into(),
        platform: &Platform::linux("amd64", ""),
    };
    let store = Store::open(Path::new(root))?;
    let findings = store.examine(true, &mut |layer| println!("{layer:?}"))?;
    let repairs = store.repair(&findings, &sources, &mut |_| {})?;
    match repairs.iter().find(|repair| !repair.repaired) {
        None => Ok(()),
        Some(repair) => Err(format!("{repair:?}").into()),
    }
}
