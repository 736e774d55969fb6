//! The server: connections, their limits, and the routes behind the [gate].

pub mod body;
pub mod gate;
pub mod problem;
pub mod routes;
mod seats;
pub mod tls;

use crate::provider::Provider;
use crate::store::instances::instance_by_key;
use axum::Router;
use axum::http::{HeaderValue, Request, header};
use gate::Peer;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use seats::{Seat, Seats};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

/// How long a handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// How long the head of a request may take; also how long an idle connection is kept.
const HEAD_TIME: Duration = Duration::from_secs(60);

/// The longest head of a request, in bytes.
const HEAD_LIMIT: usize = 32 * 1024;

/// How long a connection may live: then it is closed after the request in flight.
const CONNECTION_TIME: Duration = Duration::from_secs(900);

/// How long the last request of a closing connection may take.
const CLOSING_TIME: Duration = Duration::from_secs(60);

/// How often the server's certificate is replaced.
const RENEWAL: Duration = Duration::from_secs(86_400);

/// Why the server can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or not ours.
    #[error("can't listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
    /// TLS can't be set up.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    identity: Arc<tls::ServerIdentity>,
    provider: Arc<Provider>,
    router: Router,
}

impl Server {
    /// Listens on `address`.
    pub async fn bind(provider: Arc<Provider>, address: SocketAddr) -> Result<Self, ServeError> {
        let listener = TcpListener::bind(address).await.map_err(|e| ServeError::Listen(address, e))?;
        let identity = tls::ServerIdentity::new(&provider.authority, &provider.names, provider.clock.now_us())?;
        let acceptor = TlsAcceptor::from(tls::config(identity.clone())?);
        let router = routes::router(provider.clone());
        Ok(Self { listener, acceptor, identity, provider, router })
    }

    /// The address it listens on.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves until `stop` is done; requests in flight are finished then.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let Self { listener, acceptor, identity, provider, router } = self;
        let seats = Seats::default();
        let mut connections = tokio::task::JoinSet::new();
        let mut renewal = tokio::time::interval(RENEWAL);
        let (closing, closed) = tokio::sync::watch::channel(false);
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                _ = renewal.tick() => {
                    if let Err(error) = identity.renew(&provider.authority, &provider.names, provider.clock.now_us()) {
                        tracing::error!("the server's certificate was not renewed: {}", problem::chain(&error));
                    }
                    continue;
                }
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: others have to end first.
                    tracing::warn!("a connection can't be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (acceptor, router, provider, seats) =
                (acceptor.clone(), router.clone(), provider.clone(), seats.clone());
            let standing = seats.stand(address.ip());
            let mut closed = closed.clone();
            connections.spawn(async move {
                let gone = async move {
                    let _ = closed.wait_for(|closing| *closing).await;
                };
                let greeted = standing.unless_pushed(greet(stream, address.ip(), &acceptor, &provider)).await.flatten();
                let Some((stream, peer)) = greeted else { return };
                if let Some(_seat) = seat(&seats, &peer, &provider).await {
                    connection(stream, peer, router, gone).await;
                }
            });
        }
        let _ = closing.send(true);
        let _ = tokio::time::timeout(CLOSING_TIME, async { while connections.join_next().await.is_some() {} }).await;
    }
}

type Tls = tokio_rustls::server::TlsStream<TcpStream>;

/// The handshake, which says who it is.
async fn greet(stream: TcpStream, address: IpAddr, acceptor: &TlsAcceptor, provider: &Provider) -> Option<(Tls, Peer)> {
    let _ = stream.set_nodelay(true);
    let stream = tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await.ok()?.ok()?;
    let chain = stream.get_ref().1.peer_certificates();
    let (key, admin_certificate) = tls::identify(chain, &provider.admin_authority, provider.clock.now_us());
    Some((stream, Peer { address, key, admin_certificate }))
}

/// A seat for the connection: a stranger's while there are any, else one that is kept for who is none.
async fn seat(seats: &Seats, peer: &Peer, provider: &Provider) -> Option<Seat> {
    if let Some(seat) = seats.stranger(peer.address) {
        return Some(seat);
    }
    let key = peer.key?;
    let known = peer.admin_certificate || {
        let instance = instance_by_key(&mut *provider.db.read().await.ok()?, &key).await.ok()?;
        instance.is_some_and(|instance| !instance.ended && !instance.revoked)
    };
    if known { seats.kept(key) } else { None }
}

async fn connection(stream: Tls, peer: Peer, router: Router, gone: impl Future<Output = ()>) {
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let router = router.clone();
        async move {
            let (head, body) = request.into_parts();
            let (body, rest) = body::lend(body);
            let mut request = Request::from_parts(head, body);
            request.extensions_mut().insert(peer);
            let mut response = router.oneshot(request).await?;
            if !rest.clear().await {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served, gone);
    tokio::select! {
        _ = &mut served => return,
        () = &mut gone => {}
        () = tokio::time::sleep(CONNECTION_TIME) => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(CLOSING_TIME, served).await;
}
