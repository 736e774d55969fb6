//! Every route, with who may use it. There is no other way to add one.

use super::gate::{Access, Rules, gate};
use super::problem::Refusal;
use crate::provider::Provider;
use crate::{admin, attestation, instance};
use axum::Router;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, post, put};
use std::sync::Arc;

/// A route: method, path, who may use it, what it does.
type Route = (Method, &'static str, Access, MethodRouter<Arc<Provider>>);

/// Method, path and access of every route.
pub fn table() -> Vec<(Method, &'static str, Access)> {
    routes().into_iter().map(|(method, path, access, _)| (method, path, access)).collect()
}

/// The router, behind its gate.
pub fn router(provider: Arc<Provider>) -> Router {
    let mut rules = Rules::default();
    let mut router = Router::new();
    for (method, path, access, handler) in routes() {
        rules.add(method, path, access);
        router = router.route(path, handler);
    }
    let state = (provider.clone(), Arc::new(rules));
    router.fallback(async || Refusal::missing("such route")).layer(from_fn_with_state(state, gate)).with_state(provider)
}

fn routes() -> Vec<Route> {
    [vm_routes(), customer_routes(), customer_vm_routes(), customer_volume_routes(), provider_routes()].concat()
}

fn vm_routes() -> Vec<Route> {
    use Access::AnyKey;
    vec![
        (Method::POST, "/v1/vms/{vm}/attestations", AnyKey, post(attestation::ask)),
        (Method::PUT, "/v1/vms/{vm}/attestations/{id}/evidence", AnyKey, put(attestation::prove)),
        (Method::PUT, "/v1/vms/{vm}/attestations/{id}/opinion", AnyKey, put(attestation::examine)),
        (Method::POST, "/v1/vms/{vm}/instances/{instance}/reports", AnyKey, post(instance::report)),
        (Method::PUT, "/v1/vms/{vm}/instances/{instance}/anchors", AnyKey, put(instance::anchor)),
    ]
}

fn customer_routes() -> Vec<Route> {
    use Access::{Admin, Auditor};
    use admin::{customers as a, streams};
    vec![
        (Method::GET, "/v1/customers", Auditor, get(a::list)),
        (Method::POST, "/v1/customers", Admin, post(a::create)),
        (Method::GET, "/v1/customers/{customer}", Auditor, get(a::show)),
        (Method::POST, "/v1/customers/{customer}/confirm", Admin, post(a::confirm)),
        (Method::PUT, "/v1/customers/{customer}/clouds/{cloud}", Admin, put(a::allow_cloud)),
        (Method::GET, "/v1/customers/{customer}/reference", Auditor, get(a::reference)),
        (Method::PUT, "/v1/customers/{customer}/reference", Admin, put(a::set_reference)),
        (Method::GET, "/v1/customers/{customer}/policy", Auditor, get(a::policy)),
        (Method::PUT, "/v1/customers/{customer}/policy", Admin, put(a::set_policy)),
        (Method::GET, "/v1/customers/{customer}/audit", Auditor, get(a::audit)),
        (Method::GET, "/v1/customers/{customer}/streams", Auditor, get(streams::list)),
        (Method::POST, "/v1/customers/{customer}/streams/{key}/open", Admin, post(streams::open)),
    ]
}

fn customer_vm_routes() -> Vec<Route> {
    use Access::{Admin, Auditor};
    use admin::vms as a;
    vec![
        (Method::GET, "/v1/customers/{customer}/vms", Auditor, get(a::list)),
        (Method::POST, "/v1/customers/{customer}/vms", Admin, post(a::create)),
        (Method::POST, "/v1/customers/{customer}/vms/{vm}/keys", Admin, post(a::new_key)),
        (Method::PUT, "/v1/customers/{customer}/vms/{vm}/file", Admin, put(a::set_file)),
        (Method::POST, "/v1/customers/{customer}/vms/{vm}/files/{digest}/open", Admin, post(a::open_file)),
        (Method::POST, "/v1/customers/{customer}/vms/{vm}/files/{digest}/back", Admin, post(a::back)),
        (Method::POST, "/v1/customers/{customer}/vms/{vm}/revoke", Admin, post(a::revoke)),
        (Method::POST, "/v1/customers/{customer}/vms/{vm}/confirm", Admin, post(a::confirm)),
    ]
}

fn customer_volume_routes() -> Vec<Route> {
    use Access::{Admin, Auditor};
    use admin::{operations as o, volumes as a};
    vec![
        (Method::GET, "/v1/customers/{customer}/volumes", Auditor, get(a::list)),
        (Method::POST, "/v1/customers/{customer}/volumes", Admin, post(a::create)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/confirm", Admin, post(a::confirm)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions", Admin, post(a::open)),
        (Method::PUT, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/anchor", Admin, put(a::anchor)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/events", Admin, post(a::event)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/renew", Admin, post(a::renew)),
        (Method::PUT, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/size", Admin, put(a::size)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/end", Admin, post(a::end)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/operations", Admin, post(o::begin)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/sessions/{session}/outcome", Admin, post(o::ended)),
        (Method::POST, "/v1/customers/{customer}/volumes/{name}/retire", Admin, post(o::retire)),
    ]
}

fn provider_routes() -> Vec<Route> {
    use Access::{Admin, Auditor};
    use admin::{admins, backups, clouds};
    vec![
        (Method::GET, "/v1/clouds", Auditor, get(clouds::list)),
        (Method::POST, "/v1/clouds", Admin, post(clouds::create)),
        (Method::GET, "/v1/clouds/{cloud}/hosts", Auditor, get(clouds::hosts)),
        (Method::POST, "/v1/clouds/{cloud}/hosts", Admin, post(clouds::enroll)),
        (Method::DELETE, "/v1/clouds/{cloud}/hosts/{host}", Admin, delete(clouds::remove)),
        (Method::GET, "/v1/admins", Auditor, get(admins::list)),
        (Method::POST, "/v1/admins", Admin, post(admins::create)),
        (Method::POST, "/v1/admins/{name}/revoke", Admin, post(admins::revoke)),
        (Method::POST, "/v1/backups", Admin, post(backups::create)),
        (Method::GET, "/v1/backups/{id}/{chunk}", Admin, get(backups::chunk)),
        (Method::DELETE, "/v1/backups/{id}", Admin, delete(backups::remove)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_route_stands_twice_and_only_vm_routes_take_any_key() {
        let table = table();
        let unique: HashSet<_> = table.iter().map(|(method, path, _)| (method.clone(), *path)).collect();
        assert_eq!(unique.len(), table.len());
        for (method, path, access) in table {
            assert_eq!(access == Access::AnyKey, path.starts_with("/v1/vms/"), "{method} {path}");
            assert!(access != Access::Auditor || method == Method::GET, "auditors only read: {method} {path}");
        }
    }
}
