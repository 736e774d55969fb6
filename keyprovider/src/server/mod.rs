//! The server: connections, their limits, and the routes behind the [gate].

pub mod body;
pub mod gate;
pub mod problem;
pub mod routes;
pub mod tls;

use crate::provider::Provider;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use gate::Peer;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

/// The most connections at once.
const CONNECTIONS: usize = 4096;

/// The most connections at once from one address.
const CONNECTIONS_PER_PEER: usize = 1024;

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
        let all = Arc::new(Semaphore::new(CONNECTIONS));
        let peers = Peers::default();
        let mut connections = tokio::task::JoinSet::new();
        let mut renewal = tokio::time::interval(RENEWAL);
        let (closing, closed) = tokio::sync::watch::channel(false);
        tokio::pin!(stop);
        loop {
            let permit = tokio::select! {
                () = &mut stop => break,
                _ = renewal.tick() => {
                    if let Err(error) = identity.renew(&provider.authority, &provider.names, provider.clock.now_us()) {
                        tracing::error!("the server's certificate was not renewed: {}", problem::chain(&error));
                    }
                    continue;
                }
                Some(_) = connections.join_next() => continue,
                permit = all.clone().acquire_owned() => permit,
            };
            let Ok(permit) = permit else { break };
            let (stream, address) = tokio::select! {
                () = &mut stop => break,
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of descriptors, most likely: others have to end first.
                        tracing::warn!("a connection can't be accepted: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let Some(seat) = peers.seat(address.ip()) else { continue };
            let (acceptor, router, provider) = (acceptor.clone(), router.clone(), provider.clone());
            let mut closed = closed.clone();
            connections.spawn(async move {
                let gone = async move {
                    let _ = closed.wait_for(|closing| *closing).await;
                };
                connection(stream, address.ip(), &acceptor, router, &provider, gone).await;
                drop((permit, seat));
            });
        }
        let _ = closing.send(true);
        let _ = tokio::time::timeout(CLOSING_TIME, async { while connections.join_next().await.is_some() {} }).await;
    }
}

async fn connection(
    stream: TcpStream,
    address: IpAddr,
    acceptor: &TlsAcceptor,
    router: Router,
    provider: &Provider,
    gone: impl Future<Output = ()>,
) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await else { return };
    let chain = stream.get_ref().1.peer_certificates();
    let (key, admin_certificate) = tls::identify(chain, &provider.admin_authority, provider.clock.now_us());
    let peer = Peer { address, key, admin_certificate };
    let service = hyper::service::service_fn(move |mut request: Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer);
        router.clone().oneshot(request.map(Body::new))
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

/// How many connections each address has.
#[derive(Debug, Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them; dropped with its connection.
struct Seat(Peers, IpAddr);

impl Peers {
    fn seat(&self, address: IpAddr) -> Option<Seat> {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = peers.entry(address).or_insert(0);
        if *count >= CONNECTIONS_PER_PEER {
            return None;
        }
        *count += 1;
        Some(Seat(self.clone(), address))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut peers = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = peers.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.1);
            }
        }
    }
}
