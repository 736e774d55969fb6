//! Refusals as problem documents (RFC 9457). Whatever a handler returns as an error becomes one here, so that no refusal
//! leaves the server in another shape.

use crate::store::StoreError;
use attest::protocol::{Problem, ProblemType};
use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;

/// A request that is refused: nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{title}")]
pub struct Refusal {
    /// The stable type.
    pub kind: ProblemType,
    /// What happened, one line.
    pub title: String,
    /// What to do, one line.
    pub detail: Option<String>,
}

impl Refusal {
    /// A refusal of this type.
    pub fn new(kind: ProblemType, title: impl Into<String>) -> Self {
        Self { kind, title: one_line(title.into()), detail: None }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(one_line(detail.into()));
        self
    }

    /// A request that can't be read, with the whole chain of reasons.
    pub fn unreadable(what: &str, error: &dyn std::error::Error) -> Self {
        Self::new(ProblemType::BadRequest, format!("{what}: {}", chain(error)))
    }

    /// Something that is not there.
    pub fn missing(what: impl std::fmt::Display) -> Self {
        Self::new(ProblemType::NotFound, format!("there is no {what}"))
    }

    /// The HTTP status that goes with the type.
    pub fn status(&self) -> StatusCode {
        use ProblemType::*;
        match self.kind {
            BadRequest => StatusCode::BAD_REQUEST,
            NotFound => StatusCode::NOT_FOUND,
            Forbidden | UnknownTpm | NotActivated | BadEvidence | BadLog | UntrustedPlatform | NotCurrentFile
            | PolicyRefuses | OldInstance => StatusCode::FORBIDDEN,
            TooMuch => StatusCode::TOO_MANY_REQUESTS,
            StaleNonce | StillRuns | VolumeHeld | AnchorBackward | ReportGap | Conflict => StatusCode::CONFLICT,
            Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The document.
    pub fn document(&self) -> Problem {
        Problem {
            kind: self.kind.urn(),
            title: self.title.clone(),
            status: self.status().as_u16(),
            detail: self.detail.clone(),
        }
    }
}

/// An error's text and those of its sources, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    one_line(text)
}

fn one_line(text: String) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(600).collect();
    line.truncate(line.trim_end().len());
    line
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        // The cause is for whoever runs the provider, not for whoever asked.
        tracing::error!("the database or key store failed, so a request was refused: {}", chain(&error));
        Self::new(ProblemType::Unavailable, "the key provider can't decide this just now; nothing was done")
            .hint("try again; if it stays so, the provider's log says why")
    }
}

impl From<crate::keystore::KeyStoreError> for Refusal {
    fn from(error: crate::keystore::KeyStoreError) -> Self {
        StoreError::from(error).into()
    }
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        StoreError::from(error).into()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let body = serde_json::to_vec(&self.document()).unwrap_or_default();
        let headers = [(header::CONTENT_TYPE, "application/problem+json")];
        (self.status(), headers, body).into_response()
    }
}
