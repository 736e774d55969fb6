//! Reading requests: sizes and times are bounded before anything is parsed, and every failure is a problem document.

use super::problem::Refusal;
use attest::protocol::ProblemType;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use serde::de::DeserializeOwned;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

/// How long a client may take to send a body.
pub const BODY_TIME: Duration = Duration::from_secs(20);

/// The usual limit of a body, in bytes.
pub const SMALL: usize = 64 * 1024;

/// The limit of documents: policies, reference values, certificates.
pub const DOCUMENT: usize = 4 * 1024 * 1024;

/// How long the rest of a small body is waited for after its request was answered without it.
const REST_TIME: Duration = Duration::from_secs(2);

/// Lends a body to the handlers of a request. The other half says afterwards what they left of it.
pub fn lend(body: Incoming) -> (Body, Rest) {
    let back = Arc::new(Mutex::new(None));
    (Body::new(Lent { body: Some(body), back: back.clone() }), Rest(back))
}

/// What was not read of a body: a request may be refused before its body has come.
#[derive(Debug)]
pub struct Rest(Arc<Mutex<Option<Incoming>>>);

impl Rest {
    /// Reads a small rest and throws it away. Gives whether the connection stands at the next request's head then; if not, it
    /// must be closed, and the client be told: it would send its next request on a connection that is gone.
    pub async fn clear(self) -> bool {
        let rest = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match rest {
            None => true,
            Some(rest) if rest.size_hint().upper().is_none_or(|most| most > SMALL as u64) => false,
            Some(rest) => {
                let read = tokio::time::timeout(REST_TIME, axum::body::to_bytes(Body::new(rest), SMALL)).await;
                matches!(read, Ok(Ok(_)))
            }
        }
    }
}

/// A body that goes back where it came from when it is dropped before its end.
struct Lent {
    body: Option<Incoming>,
    back: Arc<Mutex<Option<Incoming>>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(HttpBody::size_hint).unwrap_or_default()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.is_end_stream() {
            *self.back.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
        }
    }
}

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
