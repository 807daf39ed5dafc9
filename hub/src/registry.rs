//! `/v2/`: a registry after the OCI distribution specification 1.1, so that a site needs no other.
//!
//! What is pushed here and what the API imports are the same: tags are rows of `image`, what they name stays as long
//! as a tag or a release needs it. Blobs are shared by all repositories, so a layer that one has is pushed to none
//! again. Operators push and remove; devices pull. Errors have the specification's own shape, since clients know no
//! other.
//!
//! | file | what it does |
//! |---|---|
//! | `target` | paths |
//! | `refusal` | errors |
//! | `pull` | manifests and blobs |
//! | `list` | tags, repositories, referrers |
//! | [`uploads`] | blobs on their way in |
//! | `push` | uploads over HTTP, mounts, manifests |
//! | `remove` | tags, manifests, blobs |
//! | `through` | other registries, seen through this one |

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Query, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use axum::{Router, middleware};

use self::refusal::Refusal;
use self::target::Target;
use self::uploads::Uploads;
use crate::api::Api;
use crate::api::authority::{self, Caller};
use crate::controller::Controller;
use crate::images::Images;

mod list;
mod pull;
mod push;
mod refusal;
mod remove;
mod target;
mod through;
pub mod uploads;

pub use self::pull::BLOBS_AT_ONCE;
pub use self::target::is_prefix;
pub use self::through::READERS_AT_ONCE;

/// How often uploads are looked at that may have been given up.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

/// The query of a request; unknown keys are passed over, as clients send some of their own.
type Keys = BTreeMap<String, String>;

/// The paths of the endpoint.
pub fn router(api: Api) -> Router<Api> {
    Router::new()
        .route("/v2", any(root))
        .route("/v2/", any(root))
        .route("/v2/{*path}", any(serve))
        .layer(middleware::from_fn_with_state(api, guard))
}

/// Ends uploads that were given up, until the future is dropped.
pub async fn keep_tidy(uploads: Uploads, images: Images, controller: Controller) {
    loop {
        match uploads.expire(controller.now()).await {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(count, "ended uploads that were given up");
                images.want_sweep();
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to end uploads that were given up"
            ),
        }
        tokio::time::sleep(HOUSEKEEPING).await;
    }
}

async fn guard(State(api): State<Api>, mut request: Request, next: middleware::Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let mut response = match authority::puller(&api.secrets, request.headers()) {
        None => {
            let message = "log in with any user name and the API token as password, or a device's id and the join token";
            Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message).into_response()
        }
        Some(Caller::Device) if !reads => {
            let message = "devices pull only; log in with the API token to push or remove";
            Refusal::new(StatusCode::FORBIDDEN, "DENIED", message).into_response()
        }
        Some(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
    };
    let version = HeaderValue::from_static("registry/2.0");
    response
        .headers_mut()
        .insert("docker-distribution-api-version", version);
    response
}

async fn root() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], "{}").into_response()
}

async fn serve(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Response {
    // What cannot be decoded names nothing either.
    let target = path.ok().and_then(|Path(path)| target::parse(&path));
    let keys = Query::<Keys>::try_from_uri(request.uri());
    let answer = match (target, keys) {
        (Some(target), Ok(Query(keys))) => route(&api, caller, target, keys, request).await,
        (Some(_), Err(_)) => Err(Refusal::bad("UNSUPPORTED", "the query cannot be read")),
        (None, _) => Err(Refusal::not_found(
            "NAME_INVALID",
            "write /v2/NAME/manifests/REFERENCE, /v2/NAME/blobs/DIGEST, /v2/NAME/blobs/uploads/ or /v2/NAME/tags/list",
        )),
    };
    answer.unwrap_or_else(Refusal::into_response)
}

async fn route(
    api: &Api,
    caller: Caller,
    target: Target,
    keys: Keys,
    request: Request,
) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let (headers, method) = (&parts.headers, &parts.method);
    let reads = matches!(*method, Method::GET | Method::HEAD);
    let namespace = keys.get("ns").map(String::as_str);
    let upstream = |name| api.images.upstream(name, namespace);
    if let Some(upstream) = target.repository().and_then(upstream) {
        if reads {
            return through::pull(api, upstream, target, headers, method).await;
        }
        let message = format!(
            "this is {} seen through the hub; push there",
            upstream.name()
        );
        return Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message));
    }
    if let Some((host, _)) = target.repository().and_then(|name| name.split_once('/'))
        && host.contains(':')
    {
        let message = format!("{host} is not among [registry.upstreams] in hub.toml");
        return Err(Refusal::not_found("NAME_UNKNOWN", message));
    }
    match target {
        Target::Catalog if reads => list::catalog(api, &keys).await,
        Target::Tags(name) if reads => list::tags(api, name, &keys).await,
        Target::Referrers(name, digest) if reads => list::referrers(api, name, digest, &keys).await,
        Target::Manifest(name, reference) => match *method {
            Method::GET | Method::HEAD => pull::manifest(api, name, reference).await,
            Method::PUT => push::manifest(api, name, reference, headers, body).await,
            Method::DELETE => remove::manifest(api, name, reference).await,
            _ => Err(unsupported(method)),
        },
        Target::NoDigest => Err(Refusal::bad(
            "DIGEST_INVALID",
            "a digest is sha256: and 64 hexadecimal digits here",
        )),
        Target::Blob(name, digest) => match *method {
            Method::GET | Method::HEAD => {
                pull::own_blob(api, caller, name, digest, headers, method).await
            }
            Method::DELETE => remove::blob(api, name, digest).await,
            _ => Err(unsupported(method)),
        },
        Target::Uploads(name) if *method == Method::POST => {
            push::begin(api, name, &keys, headers, body).await
        }
        Target::Upload(name, id) => match *method {
            Method::GET | Method::HEAD => push::status(api, name, id).await,
            Method::PATCH => push::append(api, name, id, headers, body).await,
            Method::PUT => push::finish(api, name, id, &keys, headers, body).await,
            Method::DELETE => push::cancel(api, name, id).await,
            _ => Err(unsupported(method)),
        },
        Target::Catalog | Target::Tags(_) | Target::Referrers(..) | Target::Uploads(_) => {
            Err(unsupported(method))
        }
    }
}

fn unsupported(method: &Method) -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "UNSUPPORTED",
        format!("{method} does nothing here"),
    )
}
