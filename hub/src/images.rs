//! Images: tags to digests for a release, and archives into the image directory.
//!
//! Network and disk work blocks, so it runs on threads of its own, a few at a time. [`sweep`] removes what is not
//! needed any more; [`survey`](mod@survey) says what an image is made of, [`look`] what devices would fetch of it.
//! [`through`] is what the site has of other registries.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use foreshore_images::blobs::BlobDir;
use foreshore_images::layout::{self, ImportError, ImportLimits, ImportedImage};
use foreshore_images::manifest::MANIFEST_BYTES_MAX;
use foreshore_images::reference::ParseReferenceError;
use foreshore_images::registry::{Client, ClientConfig, DockerConfig, FetchError};
use foreshore_images::{Digest, Fault, Reference};
use foreshore_protocol::api::ImageView;
use foreshore_protocol::manifest::App;
use foreshore_protocol::release::{Release, ReleaseError};
use tokio::sync::Semaphore;

use crate::controller::apps::Resolved;
use crate::rollout::UnixMs;
use crate::store::image::Image;
use crate::store::{self, Store, StoreError};

pub mod look;
pub mod survey;
pub mod sweep;
pub mod through;

use self::survey::{Demand, Survey};
use self::through::{Through, ThroughError, Upstreams};

/// The host of images that were imported into the hub.
pub const HUB_HOST: &str = "hub.internal";

/// How long all images of one manifest may take to be resolved.
const RESOLVE_WITHIN: Duration = Duration::from_secs(20);

/// Registries that are asked at once; more wait.
const ASKED_AT_ONCE: usize = 8;

/// Archives that are taken apart at once: it is disk and CPU work, and the hub may be small.
const IMPORTED_AT_ONCE: usize = 2;

/// Why a manifest's images did not become a release.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Not an image reference.
    #[error("service {service}: image {image:?} is not a reference")]
    Reference {
        /// Which service.
        service: String,
        /// What it says.
        image: String,
        /// Why.
        #[source]
        source: ParseReferenceError,
    },
    /// Not among the imported images.
    #[error(
        "image {image} was not imported into the hub; import it with `foreshore image import`, or check its name"
    )]
    NotImported {
        /// Which image.
        image: String,
    },
    /// The registry's answer.
    #[error("image {image} cannot be resolved")]
    Fetch {
        /// Which image.
        image: String,
        /// Why.
        #[source]
        source: Box<FetchError>,
    },
    /// It comes through the hub, and did not.
    #[error("image {image} cannot be resolved")]
    Through {
        /// Which image.
        image: String,
        /// Why.
        #[source]
        source: ThroughError,
    },
    /// All took too long together.
    #[error("image {image}: registry {host} did not answer within {} s; check that it runs and can be reached", RESOLVE_WITHIN.as_secs())]
    Timeout {
        /// The first image that was not resolved.
        image: String,
        /// Its registry.
        host: String,
    },
    /// What was resolved is no release that devices take: too large for the way to them, for example.
    #[error(
        "app {app} makes no release that devices take; use fewer services or shorter environments"
    )]
    Release {
        /// Which app.
        app: String,
        /// What is wrong with it.
        #[source]
        source: ReleaseError,
    },
    /// The certificates that the hub is configured with are not to be had any more.
    #[error("the registry configuration is not usable")]
    Client(#[from] foreshore_images::registry::ConfigError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Who asks registries for one app, with its logins.
struct Guest {
    client: Arc<Client>,
    /// Where these logins count.
    hosts: BTreeSet<String>,
}

impl ResolveError {
    /// Which class it falls into.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Reference { .. } | Self::Release { .. } | Self::Client(_) => Fault::Config,
            Self::NotImported { .. } => Fault::NotFound,
            Self::Fetch { source, .. } => source.fault(),
            Self::Through { source, .. } => source.fault(),
            Self::Timeout { .. } => Fault::Unreachable,
            Self::Store(_) => Fault::Internal,
        }
    }
}

/// Why an archive did not become an image.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The name is not one.
    #[error("{name:?} is not an image name; write it as NAME:TAG")]
    Name {
        /// As given.
        name: String,
        /// Why.
        #[source]
        source: ParseReferenceError,
    },
    /// A name with a host or digest.
    #[error("{0:?} is not an image name; write it as NAME:TAG, without registry and digest")]
    NotPlain(String),
    /// The archive names no image, or only a tag.
    #[error("the archive does not say what its image is called; give it a name: ?name=NAME:TAG")]
    Unnamed,
    /// The archive holds several images.
    #[error("the archive holds {0} images; save one of them alone, or name one that it holds")]
    Several(usize),
    /// The archive is broken, hostile or too large.
    #[error("the archive cannot be imported")]
    Import(#[from] ImportError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The thread that did the work ended early.
    #[error("the import was given up; see the hub's log")]
    GaveUp,
}

/// The hub's images. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    client: Arc<Client>,
    /// What `client` is made of.
    registries: ClientConfig,
    blobs: BlobDir,
    uploads: PathBuf,
    store: Store,
    asks: Arc<Semaphore>,
    imports: Arc<Semaphore>,
    broom: sweep::Broom,
    leases_ms: u64,
    through: Through,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images")
            .field("blobs", &self.inner.blobs)
            .finish_non_exhaustive()
    }
}

/// Why the images could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory could not be made or tidied.
    #[error("failed to open the image directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The registry client cannot be built.
    #[error("the registry configuration is not usable")]
    Client(#[from] foreshore_images::registry::ConfigError),
}

impl Images {
    /// Opens `directory`, making it when missing and removing what an interrupted import left. A blob that a push
    /// counts on stays for `leases_ms` after it last did. Blocks.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(
        directory: &Path,
        registries: ClientConfig,
        store: Store,
        leases_ms: u64,
        upstreams: Upstreams,
    ) -> Result<Self, OpenError> {
        let uploads = directory.join("uploads");
        let prepare = || {
            let blobs = BlobDir::open(directory)?;
            blobs.sweep()?;
            if uploads.exists() {
                std::fs::remove_dir_all(&uploads)?;
            }
            std::fs::create_dir_all(&uploads)?;
            Ok(blobs)
        };
        let blobs = prepare().map_err(|source| OpenError::Directory {
            path: directory.to_owned(),
            source,
        })?;
        let through = Through::open(directory, registries.clone(), upstreams)?;
        Ok(Self {
            inner: Arc::new(Inner {
                through,
                client: Arc::new(Client::new(registries.clone())?),
                registries,
                blobs,
                uploads,
                store,
                asks: Arc::new(Semaphore::new(ASKED_AT_ONCE)),
                imports: Arc::new(Semaphore::new(IMPORTED_AT_ONCE)),
                broom: sweep::Broom::new(),
                leases_ms,
            }),
        })
    }

    /// The blobs of imported images.
    #[must_use]
    pub fn blobs(&self) -> &BlobDir {
        &self.inner.blobs
    }

    /// How long a blob stays that a push counts on, in milliseconds.
    #[must_use]
    pub fn leases_ms(&self) -> u64 {
        self.inner.leases_ms
    }

    /// Where an upload may be spooled; emptied when the hub starts.
    #[must_use]
    pub fn uploads(&self) -> &Path {
        &self.inner.uploads
    }

    /// The release of a manifest: each image pinned by digest. `logins` are for registries that the hub is configured with
    /// none for; of two the first counts.
    ///
    /// # Errors
    ///
    /// See [`ResolveError`]. Bounded in time.
    pub async fn resolve(
        &self,
        app: App,
        logins: Vec<DockerConfig>,
        now: UnixMs,
    ) -> Result<Resolved, ResolveError> {
        let mut pinned: BTreeMap<String, String> = BTreeMap::new();
        let guest = self.guest(logins).await?;
        let deadline = tokio::time::Instant::now() + RESOLVE_WITHIN;
        for (name, service) in &app.spec.services {
            if pinned.contains_key(&service.image) {
                continue;
            }
            let reference =
                Reference::parse(&service.image).map_err(|source| ResolveError::Reference {
                    service: name.to_string(),
                    image: service.image.clone(),
                    source,
                })?;
            let digest =
                tokio::time::timeout_at(deadline, self.digest(&reference, guest.as_ref(), now))
                    .await
                    .map_err(|_| ResolveError::Timeout {
                        image: service.image.clone(),
                        host: reference.host().to_owned(),
                    })??;
            pinned.insert(
                service.image.clone(),
                reference.with_digest(digest).to_string(),
            );
        }
        let images = app.spec.services.iter().filter_map(|(name, service)| {
            pinned
                .get(&service.image)
                .map(|image| (name.clone(), image.clone()))
        });
        let release =
            Release::from_app(&app, &images.collect()).map_err(|source| ResolveError::Release {
                app: app.metadata.name.to_string(),
                source,
            })?;
        let bytes = release.to_canonical_json();
        Ok(Resolved {
            digest: Digest::of(&bytes),
            app,
            bytes,
            release,
        })
    }

    /// A client with logins that are an app's.
    async fn guest(&self, logins: Vec<DockerConfig>) -> Result<Option<Guest>, ResolveError> {
        if logins.is_empty() {
            return Ok(None);
        }
        let own = &self.inner.registries.registries;
        let has_none = |host: &&str| {
            let own = own.get(*host);
            own.is_none_or(|registry| registry.credentials.is_none())
        };
        let hosts = logins.iter().flat_map(DockerConfig::hosts);
        let hosts = hosts.filter(has_none).map(str::to_owned).collect();
        let mut config = self.inner.registries.clone();
        // It reads certificates.
        let client = tokio::task::spawn_blocking(move || {
            for login in &logins {
                login.fill(&mut config);
            }
            Client::new(config)
        });
        let client = client.await.map_err(|_| StoreError::Stopped)??;
        Ok(Some(Guest {
            client: Arc::new(client),
            hosts,
        }))
    }

    async fn digest(
        &self,
        reference: &Reference,
        guest: Option<&Guest>,
        now: UnixMs,
    ) -> Result<Digest, ResolveError> {
        if reference.host() == HUB_HOST {
            return self.imported(reference).await;
        }
        let guest = guest.filter(|guest| guest.hosts.contains(reference.host()));
        // What one app may see is not kept for all others.
        if guest.is_none() && self.is_upstream(reference.host()) {
            // Whoever applies means the tag as it is now, where that can be known.
            let passed = self.through_manifest(reference, now, Some(0)).await;
            return passed
                .map(|passed| passed.digest)
                .map_err(|source| ResolveError::Through {
                    image: reference.to_string(),
                    source,
                });
        }
        let permit = Arc::clone(&self.inner.asks)
            .acquire_owned()
            .await
            .map_err(|_| StoreError::Stopped)?;
        let client = guest.map_or(&self.inner.client, |guest| &guest.client);
        let (client, asked) = (Arc::clone(client), reference.clone());
        let answer = tokio::task::spawn_blocking(move || {
            // Held by the thread: a caller that gives up frees no thread that still waits for a registry.
            let _held = permit;
            client.resolve(&asked)
        });
        answer
            .await
            .map_err(|_| StoreError::Stopped)?
            .map_err(|source| ResolveError::Fetch {
                image: reference.to_string(),
                source: Box::new(source),
            })
    }

    async fn imported(&self, reference: &Reference) -> Result<Digest, ResolveError> {
        let not_imported = || ResolveError::NotImported {
            image: reference.to_string(),
        };
        if let Some(digest) = reference.digest() {
            let name = reference.repository().to_owned();
            let there = self.inner.store.read(move |connection| {
                let row = store::registry::manifest(connection, &name, &digest)?;
                Ok::<_, StoreError>(row.is_some())
            });
            return if there.await? {
                Ok(digest)
            } else {
                Err(not_imported())
            };
        }
        let name = reference.to_string();
        let image = self
            .inner
            .store
            .read(move |connection| {
                Ok::<_, StoreError>(store::image::by_reference(connection, &name)?)
            })
            .await?;
        image
            .map(|image| image.view.digest)
            .ok_or_else(not_imported)
    }

    /// Imports the image in an archive file under `name`, or under the name that the archive gives it.
    ///
    /// # Errors
    ///
    /// See [`TakeError`]; then nothing was imported, and what of it is on disk is swept.
    pub async fn import(
        &self,
        archive: PathBuf,
        name: Option<String>,
        now: UnixMs,
    ) -> Result<ImageView, TakeError> {
        let wanted = name.as_deref().map(hub_reference).transpose()?;
        let permit = Arc::clone(&self.inner.imports)
            .acquire_owned()
            .await
            .map_err(|_| TakeError::GaveUp)?;
        let blobs = self.inner.blobs.clone();
        let hold = self.inner.broom.hold_then_sweep().await;
        // The thread has the hold: it ends after a caller that goes away. The image's row is queued with the writer
        // before the hold is dropped.
        let (found, _hold) = tokio::task::spawn_blocking(move || {
            let _held = permit;
            (
                layout::import_path(&archive, &blobs, &ImportLimits::default()),
                hold,
            )
        })
        .await
        .map_err(|_| TakeError::GaveUp)?;
        let found = found?;
        let (reference, image) = choose(wanted, found)?;
        let rows = self.rows(reference.repository(), image.digest).await?;
        let signatures = self.signature_rows(&reference, &image, now).await?;
        let view = ImageView {
            reference: reference.to_string(),
            digest: image.digest,
            size_bytes: image.size_bytes,
            platforms: image.platforms.iter().map(ToString::to_string).collect(),
            imported_ms: now.0,
        };
        let row = Image {
            view: view.clone(),
            media_type: image.media_type,
        };
        self.inner
            .store
            .write(move |connection| {
                rows.record(connection)?;
                for (rows, tagged) in &signatures {
                    rows.record(connection)?;
                    if let Some(tagged) = tagged {
                        store::image::put(connection, tagged)?;
                    }
                }
                Ok::<_, StoreError>(store::image::put(connection, &row)?)
            })
            .await?;
        Ok(view)
    }

    /// The rows of the signatures that came with an image, and their tags, as if they had been pushed beside it.
    async fn signature_rows(
        &self,
        image: &Reference,
        imported: &ImportedImage,
        now: UnixMs,
    ) -> Result<Vec<(Survey, Option<Image>)>, StoreError> {
        let mut rows = Vec::new();
        for signature in &imported.signatures {
            let found = self.rows(image.repository(), signature.digest).await?;
            let tagged = signature.tag.as_ref().map(|tag| Image {
                view: ImageView {
                    reference: format!("{HUB_HOST}/{}:{tag}", image.repository()),
                    digest: signature.digest,
                    size_bytes: found.size_bytes,
                    platforms: Vec::new(),
                    imported_ms: now.0,
                },
                media_type: signature.media_type.clone(),
            });
            rows.push((found, tagged));
        }
        Ok(rows)
    }

    /// The rows of an image in `repository`: its index or manifest, and what of its variants is there.
    async fn rows(&self, repository: &str, digest: Digest) -> Result<Survey, StoreError> {
        let (blobs, repository) = (self.inner.blobs.clone(), repository.to_owned());
        tokio::task::spawn_blocking(move || {
            let bytes = blobs.read(&digest, MANIFEST_BYTES_MAX).ok().flatten();
            let found = bytes
                .map(|bytes| survey::survey(&blobs, &repository, &bytes, None, 0, Demand::Found));
            match found {
                Some(Ok(found)) => found,
                Some(Err(error)) => {
                    tracing::warn!(%digest, error = &error as &dyn std::error::Error, "failed to survey an image");
                    Survey::default()
                }
                None => Survey::default(),
            }
        })
        .await
        .map_err(|_| StoreError::Stopped)
    }

    /// Writes the rows of images that an older hub imported without.
    ///
    /// # Errors
    ///
    /// When the store fails.
    pub async fn adopt(&self) -> Result<(), StoreError> {
        let without = self.inner.store.read(|connection| {
            let mut without = Vec::new();
            for image in store::image::list(connection)? {
                let Ok(reference) = Reference::parse(&image.view.reference) else {
                    continue;
                };
                let (name, digest) = (reference.repository(), image.view.digest);
                if store::registry::manifest(connection, name, &digest)?.is_none() {
                    without.push((name.to_owned(), digest));
                }
            }
            Ok::<_, StoreError>(without)
        });
        for (repository, digest) in without.await? {
            let rows = self.rows(&repository, digest).await?;
            let write = move |connection: &rusqlite::Connection| {
                Ok::<_, StoreError>(rows.record(connection)?)
            };
            self.inner.store.write(write).await?;
        }
        Ok(())
    }
}

/// `hub.internal/NAME:TAG` of a name as users write it.
pub(crate) fn hub_reference(name: &str) -> Result<Reference, TakeError> {
    let plain = name
        .strip_prefix(HUB_HOST)
        .and_then(|rest| rest.strip_prefix('/'))
        .unwrap_or(name);
    let reference =
        Reference::parse(&format!("{HUB_HOST}/{plain}")).map_err(|source| TakeError::Name {
            name: name.to_owned(),
            source,
        })?;
    if reference.digest().is_some() {
        return Err(TakeError::NotPlain(name.to_owned()));
    }
    Ok(reference)
}

/// The name that an archive gives an image, as a name in the hub: without its registry.
fn archive_reference(name: &str) -> Option<Reference> {
    // A bare word is only a tag (OCI layouts often say no more).
    if !name.contains([':', '/']) {
        return None;
    }
    let parsed = Reference::parse(name).ok()?;
    let path = parsed.repository();
    let repository = path.strip_prefix("library/").unwrap_or(path);
    hub_reference(&format!("{repository}:{}", parsed.tag()?)).ok()
}

fn choose(
    wanted: Option<Reference>,
    found: Vec<ImportedImage>,
) -> Result<(Reference, ImportedImage), TakeError> {
    let digests: BTreeSet<Digest> = found.iter().map(|image| image.digest).collect();
    let several = TakeError::Several(digests.len());
    let named = |image: &ImportedImage| image.name.as_deref().and_then(archive_reference);
    match wanted {
        Some(reference) => {
            let same_name = found
                .iter()
                .position(|image| named(image).as_ref() == Some(&reference));
            let index = match same_name {
                Some(index) => index,
                None if digests.len() == 1 => 0,
                None => return Err(several),
            };
            Ok((
                reference,
                found.into_iter().nth(index).ok_or(TakeError::Unnamed)?,
            ))
        }
        None if digests.len() == 1 => {
            let image = found
                .into_iter()
                .find_map(|image| named(&image).map(|name| (name, image)));
            image.ok_or(TakeError::Unnamed)
        }
        None => Err(several),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: Option<&str>, content: &[u8]) -> ImportedImage {
        ImportedImage {
            name: name.map(str::to_owned),
            digest: Digest::of(content),
            media_type: String::new(),
            platforms: Vec::new(),
            size_bytes: 0,
            blobs: BTreeSet::new(),
            signatures: Vec::new(),
        }
    }

    #[test]
    fn names_become_names_in_the_hub() {
        for (name, expected) in [
            ("demo:v1", Some("hub.internal/demo:v1")),
            ("demo", Some("hub.internal/demo:latest")),
            ("hub.internal/demo:v1", Some("hub.internal/demo:v1")),
            ("acme/demo:v1", Some("hub.internal/acme/demo:v1")),
            ("Demo:v1", None),
            ("", None),
            ("../x:v1", None),
        ] {
            let made = hub_reference(name)
                .ok()
                .map(|reference| reference.to_string());
            assert_eq!(made.as_deref(), expected, "{name}");
        }
        assert!(hub_reference(&format!("demo@{}", Digest::of(b""))).is_err());
        let archived = |name| archive_reference(name).map(|reference| reference.to_string());
        assert_eq!(archived("v1"), None, "only a tag");
        assert_eq!(
            archived("docker.io/library/demo:v1").as_deref(),
            Some("hub.internal/demo:v1")
        );
        assert_eq!(
            archived("ghcr.io/acme/demo:v1").as_deref(),
            Some("hub.internal/acme/demo:v1")
        );
    }

    #[test]
    fn an_archive_of_several_images_needs_one_that_it_names() {
        let both = || vec![image(Some("a:1"), b"a"), image(Some("b:1"), b"b")];
        assert!(matches!(choose(None, both()), Err(TakeError::Several(2))));
        assert!(matches!(
            choose(hub_reference("c:1").ok(), both()),
            Err(TakeError::Several(2))
        ));
        let (reference, chosen) = choose(hub_reference("b:1").ok(), both()).unwrap();
        assert_eq!(
            (reference.tag(), chosen.digest),
            (Some("1"), Digest::of(b"b"))
        );
        assert!(matches!(
            choose(None, vec![image(Some("v1"), b"a")]),
            Err(TakeError::Unnamed)
        ));
        assert!(choose(hub_reference("x:1").ok(), vec![image(None, b"a")]).is_ok());
    }
}
