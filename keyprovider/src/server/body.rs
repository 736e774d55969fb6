//! Reading requests: sizes and times are bounded before anything is parsed, and every failure is a problem document.

use super::problem::Refusal;
use attest::protocol::ProblemType;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// How long a client may take to send a body.
pub const BODY_TIME: Duration = Duration::from_secs(20);

/// The usual limit of a body, in bytes.
pub const SMALL: usize = 64 * 1024;

/// The limit of documents: policies, reference values, certificates.
pub const DOCUMENT: usize = 4 * 1024 * 1024;

/// The parts of the path, each checked by its type.
#[derive(Debug)]
pub struct At<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(value)) => Ok(Self(value)),
            Err(_) => Err(Refusal::new(ProblemType::BadRequest, "a name or number in the path can't be one")),
        }
    }
}

/// The query, each field checked by its type.
#[derive(Debug)]
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(error) => Err(Refusal::unreadable("the query can't be read", &error)),
        }
    }
}

/// A body's bytes, at most `LIMIT`.
#[derive(Debug)]
pub struct Raw<const LIMIT: usize>(pub Vec<u8>);

impl<S: Send + Sync, const LIMIT: usize> FromRequest<S> for Raw<LIMIT> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        read(request, LIMIT).await.map(Self)
    }
}

/// A JSON body of at most `LIMIT` bytes.
#[derive(Debug)]
pub struct Json<T, const LIMIT: usize = SMALL>(pub T);

impl<S: Send + Sync, T: DeserializeOwned, const LIMIT: usize> FromRequest<S> for Json<T, LIMIT> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        parse(&read(request, LIMIT).await?).map(Self)
    }
}

/// The value in JSON `bytes`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes).map_err(|error| Refusal::unreadable("the body can't be read", &error))
}

/// The length in bytes, at most `limit`, of a body for which room has to be made before it is read: that must be announced.
pub fn length(request: &Request, limit: usize) -> Result<usize, Refusal> {
    let unknown = || Refusal::new(ProblemType::BadRequest, "this body's length must be announced: send content-length");
    let length = announced(request).ok_or_else(unknown)?;
    usize::try_from(length).ok().filter(|length| *length <= limit).ok_or_else(|| too_long(limit))
}

fn too_long(limit: usize) -> Refusal {
    Refusal::new(ProblemType::TooMuch, format!("the body is longer than {limit} bytes"))
}

/// The length that a request says its body has, in bytes.
fn announced(request: &Request) -> Option<u64> {
    let announced = request.headers().get(axum::http::header::CONTENT_LENGTH)?;
    announced.to_str().ok()?.parse().ok()
}

/// Reads a body of at most `limit` bytes within [`BODY_TIME`].
pub async fn read(request: Request, limit: usize) -> Result<Vec<u8>, Refusal> {
    if announced(&request).is_some_and(|length| length > limit as u64) {
        return Err(too_long(limit));
    }
    match tokio::time::timeout(BODY_TIME, axum::body::to_bytes(request.into_body(), limit)).await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(_)) => Err(too_long(limit)),
        Err(_) => Err(Refusal::new(ProblemType::TooMuch, format!("the body took longer than {BODY_TIME:?}"))),
    }
}
