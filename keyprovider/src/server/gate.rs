//! The gate before every route: one middleware, deny by default. A route that does not say who may use it can't be added,
//! and a request that matches no route passes nothing.

use super::problem::Refusal;
use crate::provider::Provider;
use crate::store::people::{Admin, Role, admin_by_key};
use attest::protocol::ProblemType;
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{MatchedPath, RawPathParams, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use policy::{CustomerId, Digest};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Whoever proves possession of some key: VM processes. The handler judges what the key may do.
    AnyKey,
    /// Administrators and auditors; those of one customer only under that customer's path.
    Auditor,
    /// Administrators; those of one customer only under that customer's path.
    Admin,
}

/// The other end of a connection, as its TLS handshake proved it.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// SHA-256 of its certificate's SubjectPublicKeyInfo, where it showed one and proved to have the key.
    pub key: Option<Digest>,
    /// Whether the certificate was signed by the administrators' authority and is in its time.
    pub admin_certificate: bool,
}

/// Who asks, after the gate.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Its address.
    pub address: IpAddr,
    /// Its key.
    pub key: Digest,
    /// Its record, where the route asked for an administrator.
    pub admin: Option<Admin>,
}

impl Caller {
    /// The name that goes into the audit log.
    pub fn actor(&self) -> policy::audit::Actor {
        match &self.admin {
            Some(admin) => policy::audit::Actor::Admin(admin.name.clone()),
            None => policy::audit::Actor::Stranger,
        }
    }
}

/// What the gate knows of the routes.
#[derive(Debug, Clone, Default)]
pub struct Rules(HashMap<(Method, &'static str), Access>);

impl Rules {
    /// Says who may use a route.
    pub fn add(&mut self, method: Method, path: &'static str, access: Access) {
        self.0.insert((method, path), access);
    }

    fn find(&self, method: &Method, path: &str) -> Option<Access> {
        // The map's keys are static strings; a look-up by a borrowed pair needs one scan of a small map.
        self.0.iter().find(|((m, p), _)| m == method && *p == path).map(|(_, access)| *access)
    }
}

/// Lets a request pass, with its [`Caller`], or refuses it.
pub async fn gate(
    State((provider, rules)): State<(Arc<Provider>, Arc<Rules>)>,
    path: Option<MatchedPath>,
    parameters: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let forbidden = |why: &str| Refusal::new(ProblemType::Forbidden, why);
    let peer = *request.extensions().get::<Peer>().ok_or_else(|| forbidden("this connection has no identity"))?;
    let key = peer.key.ok_or_else(|| forbidden("a client certificate is needed for every request"))?;
    let access = path.as_ref().and_then(|p| rules.find(request.method(), p.as_str()));
    let admin = match access {
        None => return Err(Refusal::missing("such route")),
        Some(Access::AnyKey) => None,
        Some(access) => {
            let customer = parameters.as_ref().ok().and_then(|p| p.iter().find(|(name, _)| *name == "customer"));
            Some(admit(&provider, &peer, &key, access, customer.map(|(_, value)| value)).await?)
        }
    };
    request.extensions_mut().insert(Caller { address: peer.address, key, admin });
    Ok(next.run(request).await)
}

async fn admit(
    provider: &Provider,
    peer: &Peer,
    key: &Digest,
    access: Access,
    customer: Option<&str>,
) -> Result<Admin, Refusal> {
    let forbidden = || Refusal::new(ProblemType::Forbidden, "this certificate may not do that");
    if !peer.admin_certificate {
        return Err(forbidden());
    }
    let mut reader = provider.db.read().await?;
    let admin = admin_by_key(&mut reader, key).await?.ok_or_else(forbidden)?;
    let role = admin.role == Role::Admin || access == Access::Auditor;
    let place = admin.customer.as_ref().map(CustomerId::as_str).is_none_or(|own| customer == Some(own));
    if role && place { Ok(admin) } else { Err(forbidden()) }
}

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _: &S) -> Result<Self, Refusal> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.ok_or_else(|| Refusal::new(ProblemType::Forbidden, "this request did not pass the gate"))
    }
}
