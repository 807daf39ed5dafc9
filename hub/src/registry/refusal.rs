//! [`Refusal`]: errors as clients of registries know them (distribution specification, "Error Codes").

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use foreshore_images::Fault;

use super::uploads::UploadError;
use crate::controller::ControlError;
use crate::images::survey::SurveyError;
use crate::images::through::ThroughError;
use crate::store::StoreError;

/// An error on its way to the client.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
    /// Beside those of every refusal.
    pub(super) headers: Vec<(HeaderName, String)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            headers: Vec::new(),
        }
    }

    pub(super) fn internal(error: impl std::fmt::Display) -> Self {
        tracing::warn!(%error, "the registry endpoint failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            "the hub failed; see its log",
        )
    }

    pub(super) fn bad(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(super) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// Not now; the client comes again.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
    }

    /// The disk takes no more of what is pushed. The specification has no code for it, and of a status above 499 clients
    /// show no message.
    pub(super) fn no_room(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "DENIED", message)
    }

    pub(super) fn into_response(self) -> Response {
        let body = serde_json::json!({"errors": [{"code": self.code, "message": self.message}]});
        let mut response = (self.status, body.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        for (name, text) in self.headers {
            if let Ok(value) = text.parse() {
                headers.insert(name, value);
            }
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge =
                HeaderValue::from_static("Basic realm=\"foreshore\", charset=\"UTF-8\"");
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        response
    }
}

/// An error and its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full => Self::no_room(error.to_string()),
            error => Self::internal(chain(&error)),
        }
    }
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        let message = error.to_string();
        match error {
            UploadError::Unknown => Self::not_found("BLOB_UPLOAD_UNKNOWN", message),
            UploadError::Busy | UploadError::TooMany(_) => Self::busy(message),
            UploadError::TooLarge(_) => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
            }
            UploadError::NoRoom(_) | UploadError::Full => Self::no_room(message),
            UploadError::Slow(_) => {
                Self::new(StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID", message)
            }
            UploadError::Broken(_) => Self::bad("BLOB_UPLOAD_INVALID", message),
            UploadError::OutOfOrder(_) => Self::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "BLOB_UPLOAD_INVALID",
                message,
            ),
            UploadError::Length { .. } => Self::bad("SIZE_INVALID", message),
            UploadError::Digest(_) => Self::bad("DIGEST_INVALID", message),
            UploadError::Io(error) => Self::internal(chain(&error)),
            UploadError::Store(error) => error.into(),
        }
    }
}

impl From<&ThroughError> for Refusal {
    fn from(error: &ThroughError) -> Self {
        let message = chain(error);
        match error.fault() {
            Fault::NotFound => match error {
                ThroughError::Unnamed(_) => Self::not_found("BLOB_UNKNOWN", message),
                _ => Self::not_found("MANIFEST_UNKNOWN", message),
            },
            Fault::DiskFull => Self::new(StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN", message),
            Fault::Busy => Self::busy(message),
            Fault::Internal => Self::internal(message),
            // The registry behind the hub is at fault; a client may well ask it itself.
            _ => Self::new(StatusCode::BAD_GATEWAY, "UNKNOWN", message),
        }
    }
}

impl From<ThroughError> for Refusal {
    fn from(error: ThroughError) -> Self {
        Self::from(&error)
    }
}

impl From<SurveyError> for Refusal {
    fn from(error: SurveyError) -> Self {
        let message = error.to_string();
        match error {
            SurveyError::Missing { .. } => Self::bad("MANIFEST_BLOB_UNKNOWN", message),
            SurveyError::Size { .. }
            | SurveyError::Document { .. }
            | SurveyError::Extras { .. }
            | SurveyError::TooDeep { .. } => Self::bad("MANIFEST_INVALID", message),
            SurveyError::Io { .. } => Self::internal(chain(&error)),
        }
    }
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::UnknownImage(_) => Self::not_found("MANIFEST_UNKNOWN", error.to_string()),
            ControlError::ImageInUse { .. } => {
                Self::new(StatusCode::CONFLICT, "DENIED", error.to_string())
            }
            ControlError::Store(error) => error.into(),
            error => Self::internal(chain(&error)),
        }
    }
}
