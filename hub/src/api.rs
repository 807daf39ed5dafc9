//! The REST API under `/api/v1`, health and metrics: what `foreshore_protocol::api` describes, over HTTP.
//!
//! Handlers parse, call the [`Controller`] and render; they decide nothing. Every error, the router's own
//! included, is a [`problem`] with a stable code. Every body is bounded in size, every call in time.
//!
//! | file | paths |
//! |---|---|
//! | [`problem`] | errors |
//! | [`authority`] | who may call |
//! | `drain` | the rest of refused requests |
//! | [`apps`] | `/apps` |
//! | [`devices`] | `/devices` |
//! | [`disruption_budgets`] | `/disruption-budgets` |
//! | [`leases`] | `/leases` |
//! | [`rollouts`] | `/rollouts` |
//! | [`events`] | `/events`, `/events/stream` |
//! | [`images`] | `/images` |
//! | [`secrets`](mod@secrets) | `/secrets` |
//! | [`health`] | `/healthz`, `/readyz`, `/metrics`, `/info` |

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, patch, post};
use tokio::sync::{Semaphore, watch};

use crate::analysis::Hosts;
use crate::config::BrokerKind;
use crate::controller::Controller;
use crate::images::Images;
use crate::link::LinkCounters;
use crate::pulls::Pulls;
use crate::registry::uploads::Uploads;
use crate::secrets::Secrets;

pub mod apps;
pub mod authority;
pub mod devices;
pub mod disruption_budgets;
mod drain;
pub mod events;
pub mod health;
pub mod images;
pub mod leases;
pub mod problem;
pub mod rollouts;
pub mod secrets;

pub use problem::Failure;

/// The largest body of any call but an image upload: a manifest, and some air so that its own limit is what
/// speaks.
const BODY_MAX: usize = 260 * 1024;

/// How long a call may take until its answer begins, image uploads apart.
const CALL_WITHIN: Duration = Duration::from_secs(60);

/// What handlers share.
#[derive(Debug, Clone)]
pub struct Api {
    /// For changes and reads.
    pub controller: Controller,
    /// For resolving and importing.
    pub images: Images,
    /// For pushing.
    pub uploads: Uploads,
    /// Who may call.
    pub secrets: Secrets,
    /// What devices fetch right now.
    pub pulls: Pulls,
    /// What the link counts.
    pub counters: Arc<LinkCounters>,
    /// For `/info`.
    pub broker: BrokerKind,
    /// How many blobs may be sent at once.
    pub blob_turns: Arc<Semaphore>,
    /// How many clients may read blobs that are on their way in.
    pub readers: Arc<Semaphore>,
    /// The largest image archive, in bytes.
    pub max_image_bytes: u64,
    /// Whom analysis may ask.
    pub analysis_hosts: Hosts,
    /// True once the hub is stopping: streams end.
    pub stopping: watch::Receiver<bool>,
}

/// Every path of the hub's HTTP side.
pub fn router(api: Api) -> Router {
    let v1 = Router::new()
        .route("/apps", get(apps::list))
        .route(
            "/apps/{app}",
            get(apps::get).put(apps::apply).delete(apps::delete),
        )
        .route("/apps/{app}/plan", post(apps::plan))
        .route("/apps/{app}/undo", post(apps::undo))
        .route("/devices", get(devices::list))
        .route(
            "/devices/{device}",
            get(devices::get).merge(delete(devices::forget)),
        )
        .route("/devices/{device}/labels", patch(devices::label))
        .route("/devices/{device}/trust-key", post(devices::trust_key))
        .route("/devices/{device}/explain", get(devices::explain))
        .route("/devices/{device}/hold", post(devices::hold))
        .route("/devices/{device}/release", post(devices::release))
        .route("/secrets", get(secrets::list))
        .route(
            "/secrets/{secret}",
            get(secrets::get).put(secrets::set).delete(secrets::remove),
        )
        .route("/disruption-budgets", get(disruption_budgets::list))
        .route(
            "/disruption-budgets/{budget}",
            get(disruption_budgets::get)
                .put(disruption_budgets::apply)
                .delete(disruption_budgets::delete),
        )
        .route("/leases", get(leases::list))
        .route("/leases/{device}", delete(leases::release))
        .route("/rollouts", get(rollouts::list))
        .route("/rollouts/{id}", get(rollouts::get))
        .route("/rollouts/{id}/pause", post(rollouts::pause))
        .route("/rollouts/{id}/resume", post(rollouts::resume))
        .route("/rollouts/{id}/abort", post(rollouts::abort))
        .route("/rollouts/{id}/approve", post(rollouts::approve))
        .route("/rollouts/{id}/retry", post(rollouts::retry))
        .route(
            "/rollouts/{id}/override-locks",
            post(rollouts::override_locks),
        )
        .route(
            "/rollouts/{id}/override-windows",
            post(rollouts::override_windows),
        )
        .route("/events", get(events::list))
        .route("/events/stream", get(events::stream))
        .route("/images", get(images::list))
        .route("/images/{*image}", delete(images::remove))
        .route("/info", get(health::info))
        .layer(middleware::from_fn(limit_time))
        .merge(Router::new().route(
            "/images",
            post(images::import).layer(DefaultBodyLimit::disable()),
        ))
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(middleware::from_fn_with_state(
            api.clone(),
            authority::operators_only,
        ));
    Router::new()
        .nest("/api/v1", v1)
        .route(
            "/metrics",
            get(health::metrics).layer(middleware::from_fn_with_state(
                api.clone(),
                authority::operators_only,
            )),
        )
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .merge(crate::registry::router(api.clone()))
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(drain::drain))
        .with_state(api)
}

async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(CALL_WITHIN, next.run(request)).await {
        Ok(response) => response,
        Err(_) => problem::timeout().into_response(),
    }
}

/// A handle that handlers take.
pub type Hub = State<Api>;

/// The one variable part of a path, decoded. Where it cannot be, the answer is a [`Failure`] like any other.
#[derive(Debug)]
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(text) = Path::<String>::from_request_parts(parts, state).await?;
        Ok(Self(text))
    }
}
