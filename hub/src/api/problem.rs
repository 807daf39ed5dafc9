//! [`Failure`]: every error as `application/problem+json` (RFC 9457) with a stable code.

use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use foreshore_images::Fault;
use foreshore_protocol::api::Problem;
use foreshore_protocol::manifest::ManifestError;

use crate::controller::ControlError;
use crate::images::{ResolveError, TakeError};
use crate::rollout::Refused;
use crate::store::StoreError;

/// An error on its way to the caller.
#[derive(Debug)]
pub struct Failure(Box<Problem>);

impl Failure {
    /// An error of a stable `code`; `detail` names the thing and the way out.
    #[must_use]
    pub fn new(
        status: StatusCode,
        code: &'static str,
        title: &str,
        detail: impl Into<String>,
    ) -> Self {
        Self(Box::new(Problem {
            kind: format!("https://foreshore.dev/problems/{code}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            code: code.to_owned(),
            line: None,
            column: None,
        }))
    }

    /// A value in the path or query that cannot be one.
    #[must_use]
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "bad-request",
            "the request cannot be understood",
            detail,
        )
    }

    /// Something that is not there.
    #[must_use]
    pub fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            code,
            "there is no such thing",
            detail,
        )
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.0.code
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(code = %self.0.code, detail = %self.0.detail, "a call failed");
        }
        let body = serde_json::to_vec(&*self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"foreshore\""),
            );
        }
        response
    }
}

/// An error and all its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.ends_with(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = error.source();
    }
    text
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Full => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "storage-full",
                "the hub's disk is full",
                error.to_string(),
            ),
            StoreError::Stopped => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "stopping",
                "the hub is stopping",
                error.to_string(),
            ),
            _ => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "storage-failed",
                "the hub's database failed",
                chain(&error),
            ),
        }
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        StoreError::from(error).into()
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let detail = error.to_string();
        let conflict = |code| {
            Self::new(
                StatusCode::CONFLICT,
                code,
                "not in this state",
                detail.clone(),
            )
        };
        match error {
            ControlError::UnknownApp(_) => Self::not_found("unknown-app", detail),
            ControlError::UnknownDevice(_) => Self::not_found("unknown-device", detail),
            ControlError::UnknownRollout(_) => Self::not_found("unknown-rollout", detail),
            ControlError::OtherApp { .. } => Self::new(
                StatusCode::BAD_REQUEST,
                "other-app",
                "path and manifest disagree",
                detail,
            ),
            ControlError::Refused(Refused::Final { .. }) => conflict("rollout-is-final"),
            ControlError::Refused(Refused::State { .. }) => conflict("rollout-state"),
            ControlError::Refused(Refused::Nothing { .. }) => conflict("nothing-to-do"),
            ControlError::Refused(Refused::NothingBefore { .. })
            | ControlError::NothingToUndo(_) => conflict("nothing-before"),
            ControlError::NoWindows(_) => conflict("no-windows"),
            ControlError::UnknownZone(_) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "unknown-time-zone",
                "there is no such time zone",
                detail,
            ),
            ControlError::UnknownRelease { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "unknown-release",
                "there is no such release",
                detail,
            ),
            ControlError::AmbiguousRelease { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "ambiguous-release",
                "more than one release is meant",
                detail,
            ),
            ControlError::TooManySteps { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "too-many-steps",
                "the release cannot be reached",
                detail,
            ),
            ControlError::NoWay { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "no-way-to-release",
                "the release cannot be reached",
                detail,
            ),
            ControlError::Deleting(_) => conflict("app-deleting"),
            ControlError::Connected(_) => conflict("device-connected"),
            ControlError::UnknownImage(_) => Self::not_found("unknown-image", detail),
            ControlError::ImageInUse { .. } => conflict("image-in-use"),
            ControlError::TooManyApps(_) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "too-many-apps",
                "a device has only so much room",
                detail,
            ),
            ControlError::TooManyLabels(_) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "too-many-labels",
                "a device has only so much room",
                detail,
            ),
            ControlError::UnknownSecret(_) => Self::not_found("unknown-secret", detail),
            ControlError::SecretNotSet { .. } | ControlError::PullSecretNotSet { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "secret-not-set",
                "a secret is not set",
                detail,
            ),
            ControlError::AnalysisHost { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "analysis-host-not-allowed",
                "the hub may not ask this host",
                detail,
            ),
            ControlError::AnalysisSecret { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "secret-not-set",
                "a secret is not set",
                detail,
            ),
            ControlError::SecretNotText { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "secret-not-text",
                "a secret is no text",
                detail,
            ),
            ControlError::PullSecretNotLogins { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "secret-not-docker-config",
                "a secret holds no logins",
                detail,
            ),
            ControlError::SecretsTooLarge(_) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "secrets-too-large",
                "a device has only so much room",
                detail,
            ),
            ControlError::SecretInUse { .. } => conflict("secret-in-use"),
            ControlError::UnknownBudget(_) => Self::not_found("unknown-budget", detail),
            ControlError::OtherBudget { .. } => Self::new(
                StatusCode::BAD_REQUEST,
                "other-budget",
                "path and manifest disagree",
                detail,
            ),
            ControlError::TooManyBudgets => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "too-many-budgets",
                "a hub has only so much room",
                detail,
            ),
            ControlError::NoLease(_) => Self::not_found("no-lease", detail),
            ControlError::NoKey(_) => conflict("no-device-key"),
            ControlError::Store(error) => error.into(),
        }
    }
}

impl From<ManifestError> for Failure {
    fn from(error: ManifestError) -> Self {
        let (status, code) = match &error {
            ManifestError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "manifest-too-large"),
            ManifestError::Encoding { .. }
            | ManifestError::Syntax { .. }
            | ManifestError::Meaning { .. } => (StatusCode::BAD_REQUEST, "bad-manifest"),
        };
        let mut failure = Self::new(status, code, "the manifest was refused", error.to_string());
        if let ManifestError::Syntax { line, column, .. } = &error
            && *line > 0
        {
            failure.0.line = Some(*line);
            failure.0.column = Some(*column);
        }
        failure
    }
}

impl From<ResolveError> for Failure {
    fn from(error: ResolveError) -> Self {
        let detail = chain(&error);
        let fault = error.fault();
        match error {
            ResolveError::Store(error) => return error.into(),
            ResolveError::Reference { .. } => {
                return Self::new(
                    StatusCode::BAD_REQUEST,
                    "bad-image-reference",
                    "an image reference cannot be read",
                    detail,
                );
            }
            ResolveError::Release { .. } => {
                return Self::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "release-too-large",
                    "the release is too large",
                    detail,
                );
            }
            ResolveError::NotImported { .. }
            | ResolveError::Fetch { .. }
            | ResolveError::Through { .. }
            | ResolveError::Client(_)
            | ResolveError::Timeout { .. } => {}
        }
        let (status, code, title) = image_fault(fault);
        Self::new(status, code, title, detail)
    }
}

const fn image_fault(fault: Fault) -> (StatusCode, &'static str, &'static str) {
    match fault {
        Fault::NotFound => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "unknown-image",
            "there is no such image",
        ),
        // A hub has no gate that could defer anything.
        Fault::Unreachable | Fault::Deferred => (
            StatusCode::BAD_GATEWAY,
            "registry-unreachable",
            "a registry did not answer as one",
        ),
        Fault::DigestMismatch => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "digest-mismatch",
            "bytes do not have their digest",
        ),
        Fault::NoMatchingPlatform => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "no-matching-platform",
            "no variant fits",
        ),
        Fault::BadImage => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "bad-image",
            "the image is broken",
        ),
        Fault::DiskFull => (
            StatusCode::INSUFFICIENT_STORAGE,
            "storage-full",
            "the hub's disk is full",
        ),
        Fault::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "try again"),
        Fault::Config => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "registry-configuration",
            "a registry is not configured right",
        ),
        // A hub wants no signatures.
        Fault::Unsigned | Fault::Internal => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the hub failed",
        ),
    }
}

impl From<TakeError> for Failure {
    fn from(error: TakeError) -> Self {
        let detail = chain(&error);
        let bad = |code| {
            Self::new(
                StatusCode::BAD_REQUEST,
                code,
                "the image was refused",
                detail.clone(),
            )
        };
        match error {
            TakeError::Name { .. } | TakeError::NotPlain(_) | TakeError::Unnamed => {
                bad("bad-image-name")
            }
            TakeError::Several(_) => bad("several-images"),
            TakeError::Import(error) => {
                let (status, code, title) = image_fault(error.fault());
                Self::new(status, code, title, detail)
            }
            TakeError::Store(error) => error.into(),
            TakeError::GaveUp => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "the hub failed",
                detail,
            ),
        }
    }
}

impl From<BytesRejection> for Failure {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "manifest-too-large",
                "the body is too large",
                "at most 256 KiB are read",
            );
        }
        Self::bad_request(rejection.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// For paths that the hub does not have.
pub async fn no_such_path(uri: Uri) -> Failure {
    Failure::not_found(
        "unknown-path",
        format!("the hub has no path {}", uri.path()),
    )
}

/// For methods that a path does not have.
pub async fn method_not_allowed(method: Method, uri: Uri) -> Failure {
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "the path does not have this method",
        format!("{method} {}", uri.path()),
    )
}

/// For calls that take too long.
#[must_use]
pub fn timeout() -> Failure {
    Failure::new(
        StatusCode::GATEWAY_TIMEOUT,
        "timeout",
        "the call took too long",
        "it was given up; a change that had begun may still happen",
    )
}

/// For callers without the token.
#[must_use]
pub fn unauthorized(detail: &str) -> Failure {
    Failure::new(
        StatusCode::UNAUTHORIZED,
        "unauthorized",
        "the token is missing or wrong",
        detail,
    )
}
