//! Signatures of images: who vouches for a digest, checked without asking anybody but the registry for the signature.
//!
//! Two forms of cosign's key-based signatures are read. The older ("Cosign Container Image Signature Specification",
//! "simple signing") is a manifest under the tag `sha256-HEX.sig` beside the image, each layer of it a payload that names
//! the image's digest, with the signature of the payload as an annotation. The newer ("Cosign Bundle Specification") is a
//! Sigstore bundle that refers to the image: an in-toto statement about its digest in a DSSE envelope. Certificates and
//! transparency logs are not used.
//! What was verified is kept in the store, so that a device without a network can look again.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};
use webpki::RawPublicKeyEntity;

use crate::manifest::{Descriptor, Document, Manifest};
use crate::registry::{Client, FetchError, Referrer};
use crate::store::StageError;
use crate::{Digest, Fault, Reference};

/// What cosign calls a payload.
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// Where the signature of a payload stands.
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// What a payload says that it is.
const KIND: &str = "cosign container image signature";

/// The largest part of a manifest with signatures that is read, in bytes.
pub(crate) const PART_BYTES_MAX: u64 = BUNDLE_BYTES_MAX;

/// The largest payload that is read, in bytes. They have some 250.
const PAYLOAD_BYTES_MAX: u64 = 16 << 10;

/// What the newer form is called, without its version.
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle";

/// The version of it that cosign writes; referrers are asked for by the whole name.
const BUNDLE_NOW: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// Where a bundle's manifest says what its statement is.
const PREDICATE: &str = "dev.sigstore.bundle.predicateType";

/// What a statement says that it is, when it is a signature and not, say, a list of what is in the image.
const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";

/// What the payload of an envelope is.
const IN_TOTO: &str = "application/vnd.in-toto+json";

/// The largest bundle that is read, in bytes. With entries of transparency logs they have some 10 KiB.
const BUNDLE_BYTES_MAX: u64 = 64 << 10;

/// The longest signature, in base64: an RSA key of 8192 bits.
const SIGNATURE_LEN_MAX: usize = 2048;

/// Signatures of one image that are looked at.
const SIGNATURES_MAX: usize = 32;

/// As cosign signs: SHA-256 for every key but Ed25519's own.
const ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 4] = [
    webpki::ring::ECDSA_P256_SHA256,
    webpki::ring::ECDSA_P384_SHA256,
    webpki::ring::ED25519,
    webpki::ring::RSA_PKCS1_2048_8192_SHA256,
];

/// A public key that images may be signed with, as PEM (`-----BEGIN PUBLIC KEY-----`): ECDSA over P-256 or P-384,
/// Ed25519, or RSA of 2048 to 8192 bits.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TrustedKey {
    spki: Vec<u8>,
}

impl fmt::Debug for TrustedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustedKey({})", Digest::of(&self.spki).short())
    }
}

/// Why a text is not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not PEM, or of something else.
    #[error(
        "it is not a public key in PEM form: write the text of cosign.pub, with its first and last line"
    )]
    Pem,
    /// Of a kind that is not verified.
    #[error(
        "its kind is not supported: use ECDSA over P-256 or P-384, Ed25519, or RSA of at least 2048 bits"
    )]
    Kind,
}

impl TryFrom<String> for TrustedKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes());
        let key = Self {
            spki: der.map_err(|_| KeyError::Pem)?.as_ref().to_vec(),
        };
        if RawPublicKeyEntity::try_from(&SubjectPublicKeyInfoDer::from(&*key.spki)).is_err() {
            return Err(KeyError::Pem);
        }
        let known = ALGORITHMS.iter().any(|algorithm| key.is_of(*algorithm));
        if known { Ok(key) } else { Err(KeyError::Kind) }
    }
}

impl TrustedKey {
    /// Whether this is a key of `algorithm`: its name stands in the key.
    fn is_of(&self, algorithm: &dyn SignatureVerificationAlgorithm) -> bool {
        let name = algorithm.public_key_alg_id();
        // SEQUENCE { SEQUENCE { name }, BIT STRING }: after two headers of two to four bytes.
        self.spki.windows(name.len()).take(9).any(|at| at == &*name)
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let der = SubjectPublicKeyInfoDer::from(&*self.spki);
        let Ok(key) = RawPublicKeyEntity::try_from(&der) else {
            return false;
        };
        ALGORITHMS
            .iter()
            .any(|algorithm| key.verify_signature(*algorithm, message, signature).is_ok())
    }
}

/// What an image needs: a signature by one of these keys.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// Who wants it, for messages.
    pub by: &'a str,
    /// Any of them will do.
    pub keys: &'a [TrustedKey],
}

/// A signature as it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Signature {
    /// JSON.
    payload: String,
    /// Base64.
    signature: String,
    /// Of the payload, when it came in an envelope; it is signed too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    payload_type: Option<String>,
}

/// As far as it matters.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    dsse_envelope: Envelope,
}

/// "DSSE: Dead Simple Signing Envelope".
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

/// in-toto Attestation Framework, "Statement".
#[derive(Deserialize)]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    subject: Vec<Subject>,
}

#[derive(Deserialize)]
struct Subject {
    digest: BTreeMap<String, String>,
}

/// As far as it matters.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: SignedImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

impl Signature {
    /// Whether one of `keys` says by it that `digest` is right. The name that the payload has besides is not looked at:
    /// an image that was copied is the same.
    pub(crate) fn vouches(&self, digest: &Digest, keys: &[TrustedKey]) -> bool {
        let Ok(signature) = STANDARD.decode(&self.signature) else {
            return false;
        };
        let message = self.message();
        // First that it is signed: what is not is not even parsed.
        keys.iter().any(|key| key.verifies(&message, &signature)) && self.names(digest)
    }

    /// What is signed, for who wants to know what vouched.
    pub(crate) fn into_payload(self) -> String {
        self.payload
    }

    /// The bytes that are signed.
    fn message(&self) -> Vec<u8> {
        let payload = &self.payload;
        match &self.payload_type {
            None => payload.clone().into_bytes(),
            Some(kind) => {
                let lengths = (kind.len(), payload.len());
                format!("DSSEv1 {} {kind} {} {payload}", lengths.0, lengths.1).into_bytes()
            }
        }
    }

    /// Whether it is about this image.
    fn names(&self, digest: &Digest) -> bool {
        match self.payload_type.as_deref() {
            None => serde_json::from_str::<Payload>(&self.payload).is_ok_and(|payload| {
                payload.critical.kind == KIND && payload.critical.image.digest == digest.to_string()
            }),
            Some(IN_TOTO) => serde_json::from_str::<Statement>(&self.payload).is_ok_and(|said| {
                let hex = digest.hex();
                let mut hashes = said
                    .subject
                    .iter()
                    .map(|subject| subject.digest.get("sha256"));
                said.kind.starts_with("https://in-toto.io/Statement/")
                    && said.predicate_type == SIGN
                    && hashes.any(|hash| hash.is_some_and(|hash| *hash == hex))
            }),
            Some(_) => false,
        }
    }

    /// The image that it says it is about, whoever made it: not to be believed before it [vouches](Self::vouches).
    pub(crate) fn claims(&self) -> Option<Digest> {
        match self.payload_type {
            None => {
                let payload: Payload = serde_json::from_str(&self.payload).ok()?;
                payload.critical.image.digest.parse().ok()
            }
            Some(_) => {
                let said: Statement = serde_json::from_str(&self.payload).ok()?;
                let hex = said.subject.first()?.digest.get("sha256")?;
                format!("sha256:{hex}").parse().ok()
            }
        }
    }

    /// Those in a bundle.
    pub(crate) fn in_bundle(bytes: &[u8]) -> Vec<Self> {
        let Ok(bundle) = serde_json::from_slice::<Bundle>(bytes) else {
            return Vec::new();
        };
        let envelope = bundle.dsse_envelope;
        let payload = STANDARD.decode(&envelope.payload).ok();
        let Some(payload) = payload.and_then(|bytes| String::from_utf8(bytes).ok()) else {
            return Vec::new();
        };
        let signatures = envelope.signatures.into_iter();
        signatures
            .filter(|signature| signature.sig.len() <= SIGNATURE_LEN_MAX)
            .take(SIGNATURES_MAX)
            .map(|signature| Self {
                payload: payload.clone(),
                signature: signature.sig,
                payload_type: Some(envelope.payload_type.clone()),
            })
            .collect()
    }
}

/// Why it is not proven that an image may be run.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The reference carries no digest.
    #[error("image {image} is not pinned by a digest; resolve its tag first")]
    NotPinned {
        /// The reference.
        image: String,
    },
    /// There is no signature.
    #[error(
        "image {image} is not signed, and {by} wants it to be; sign it with `cosign sign --key`"
    )]
    Unsigned {
        /// The reference.
        image: String,
        /// Who wants it.
        by: String,
    },
    /// There are some, and none is right.
    #[error(
        "image {image} has {found} signatures, none by a key that {by} names, and it wants one"
    )]
    Untrusted {
        /// The reference.
        image: String,
        /// How many were looked at.
        found: usize,
        /// Who wants it.
        by: String,
    },
    /// It could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StageError),
}

impl SignatureError {
    /// Which class it falls into: what the agent reports.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::NotPinned { .. } => Fault::Config,
            Self::Unsigned { .. } | Self::Untrusted { .. } => Fault::Unsigned,
            Self::Fetch(error) => error.fault(),
            Self::Store(error) => error.fault(),
        }
    }
}

pub(crate) fn first_unmet<'d>(
    digest: &Digest,
    demands: &'d [Demand<'d>],
    signatures: &[Signature],
) -> Option<&'d Demand<'d>> {
    demands.iter().find(|demand| {
        !signatures
            .iter()
            .any(|signature| signature.vouches(digest, demand.keys))
    })
}

/// The signatures of the older form that the registry has beside the image; none when it has no manifest of them.
pub(crate) fn fetch_attached(
    client: &Client,
    image: &Reference,
    digest: &Digest,
) -> Result<Vec<Signature>, SignatureError> {
    let tagged = format!("{}:sha256-{}.sig", image.name(), digest.hex());
    let beside = Reference::parse(&tagged).expect("a name and a short tag are a reference");
    let raw = match client.manifest(&beside) {
        Ok(raw) => raw,
        Err(error) if error.fault() == Fault::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let Ok(Document::Manifest(manifest)) = Document::parse(&raw.bytes, Some(&raw.media_type))
    else {
        return Ok(Vec::new());
    };
    let blob = |layer: &Descriptor| client.small_blob(&beside, layer).map(Some);
    Ok(simple_in(&manifest, blob)?)
}

/// Whether a manifest holds signatures of the older form and nothing else.
pub(crate) fn is_simple(manifest: &Manifest) -> bool {
    let mut layers = manifest.layers.iter();
    !manifest.layers.is_empty() && layers.all(|layer| layer.media_type == SIMPLE_SIGNING)
}

/// The signatures of either form in a manifest. `blob` has its blobs, `None` for one that is not there.
pub(crate) fn in_manifest<E>(
    manifest: &Manifest,
    mut blob: impl FnMut(&Descriptor) -> Result<Option<Vec<u8>>, E>,
) -> Result<Vec<Signature>, E> {
    let mut signatures = simple_in(manifest, &mut blob)?;
    signatures.extend(bundle_in(manifest, blob)?);
    Ok(signatures)
}

fn simple_in<E>(
    manifest: &Manifest,
    mut blob: impl FnMut(&Descriptor) -> Result<Option<Vec<u8>>, E>,
) -> Result<Vec<Signature>, E> {
    let mut signatures = Vec::new();
    for layer in manifest.layers.iter().take(SIGNATURES_MAX) {
        let Some(signature) = layer.annotations.get(ANNOTATION) else {
            continue;
        };
        let fits = layer.size <= PAYLOAD_BYTES_MAX && signature.len() <= SIGNATURE_LEN_MAX;
        if layer.media_type != SIMPLE_SIGNING || !fits {
            continue;
        }
        let payload = blob(layer)?.and_then(|bytes| String::from_utf8(bytes).ok());
        signatures.extend(payload.map(|payload| Signature {
            payload,
            signature: signature.clone(),
            payload_type: None,
        }));
    }
    Ok(signatures)
}

fn bundle_in<E>(
    manifest: &Manifest,
    mut blob: impl FnMut(&Descriptor) -> Result<Option<Vec<u8>>, E>,
) -> Result<Vec<Signature>, E> {
    let Some(layer) = manifest.layers.first() else {
        return Ok(Vec::new());
    };
    if layer.size > BUNDLE_BYTES_MAX || !layer.media_type.starts_with(BUNDLE) {
        return Ok(Vec::new());
    }
    let bytes = blob(layer)?;
    Ok(bytes.map_or_else(Vec::new, |bytes| Signature::in_bundle(&bytes)))
}

/// The signatures of the newer form that refer to the image.
pub(crate) fn fetch_bundles(
    client: &Client,
    image: &Reference,
    digest: &Digest,
) -> Result<Vec<Signature>, SignatureError> {
    let mut signatures = Vec::new();
    let may_be_one = |referrer: &&Referrer| {
        let annotations = referrer.annotations.as_ref();
        // Some registries leave annotations out.
        annotations
            .and_then(|annotations| annotations.get(PREDICATE))
            .is_none_or(|predicate| predicate == SIGN)
    };
    let referrers = client.referrers(image, digest, BUNDLE_NOW)?;
    for referrer in referrers.iter().filter(may_be_one).take(SIGNATURES_MAX) {
        let raw = client.manifest(&image.with_digest(referrer.digest))?;
        let Ok(Document::Manifest(manifest)) = Document::parse(&raw.bytes, Some(&raw.media_type))
        else {
            continue;
        };
        let blob = |layer: &Descriptor| client.small_blob(image, layer).map(Some);
        signatures.extend(bundle_in(&manifest, blob)?);
    }
    Ok(signatures)
}

#[cfg(test)]
mod tests;
