//! Stages one image, as a device does, and prints the directories to mount: `stage ROOT HTTP_REGISTRY/NAME@DIGEST`.
//!
//! Speaks plain HTTP to the registry, at most `STAGE_RATE` bytes a second if that is set and not 0. The tests kill it at
//! every moment. `STAGE_UNPACKER` is a program that unpacks and inflates, such as `foreshore-agent`.

use std::path::Path;
use std::time::Duration;

use foreshore_images::registry::{Client, ClientConfig, RegistryConfig};
use foreshore_images::store::{Store, StoreConfig, Unpacker};
use foreshore_images::{Platform, Reference};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, image] = arguments.as_slice() else {
        return Err("usage: stage ROOT HTTP_REGISTRY/NAME@DIGEST".into());
    };
    let reference = Reference::parse(image)?;
    let registry = RegistryConfig {
        plain_http: true,
        ..RegistryConfig::default()
    };
    let registries = [(reference.host().to_owned(), registry)].into();
    let rate = std::env::var("STAGE_RATE").unwrap_or_default();
    let client = Client::new(ClientConfig {
        registries,
        rate_bytes: rate.parse().ok().filter(|rate| *rate > 0),
        ..ClientConfig::default()
    })?;
    let config = StoreConfig {
        keep_privileges: true,
        unpacker: std::env::var_os("STAGE_UNPACKER").map(|program| Unpacker {
            program: program.into(),
            arguments: vec!["unpack".into()],
            inflate: vec!["inflate".into()],
            rebuild: vec!["rebuild".into()],
            patience: Duration::from_mins(10),
        }),
        ..StoreConfig::default()
    };
    let store = Store::open_with(Path::new(root), config)?;
    let staged = store.stage(&client, &reference, &Platform::host(), &mut |progress| {
        eprintln!("{progress:?}")
    })?;
    for layer in &staged.layers {
        println!("{}", layer.display());
    }
    Ok(())
}
