//! `customer`, `policy`, `admin`.

use super::args::{AdminCommand, CustomerCommand, PolicyCommand};
use super::serve::{new_admin_key, write_profile};
use super::{CliError, Session, files};
use crate::api::{
    AdminCertificate, AdminView, ConfirmCustomer, CustomerView, Done, NewAdmin, NewCustomer, SignedPolicy, TrustView,
    VersionView,
};
use crate::authority::pem;
use crate::client::{Profile, from_pem};
use crate::server::problem::chain;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use policy::Base64Url;
use policy::document::PolicyStatement;
use std::path::Path;

/// `customer …`
pub(super) fn customer(mut s: Session, command: CustomerCommand) -> Result<(), CliError> {
    match command {
        CustomerCommand::Create { id, lab, policy_key } => {
            let key = policy_key_of(&policy_key, true)?;
            let public = Base64Url::from(key.public_key().as_ref());
            let new = NewCustomer { customer: id.clone(), lab, policy_key: public };
            let trust: TrustView = s.client.post("/v1/customers", &new)?;
            s.out.print(format!("created customer {id}"), &trust)
        }
        CustomerCommand::List => {
            let all: Vec<CustomerView> = s.client.get("/v1/customers")?;
            s.out.list(&all, |c| format!("{}{}", c.customer, if c.lab { " (lab)" } else { "" }))
        }
        CustomerCommand::Confirm { customer, policy, reference } => {
            let said = ConfirmCustomer { policy, reference };
            let done: Done = s.client.post(&format!("/v1/customers/{customer}/confirm"), &said)?;
            s.out.print(format!("policy {policy} and reference values {reference} of {customer} are confirmed"), &done)
        }
        CustomerCommand::AllowCloud { customer, cloud } => {
            let done: Done = s.client.put(&format!("/v1/customers/{customer}/clouds/{cloud}"), &())?;
            s.out.print(format!("VMs of {customer} may run in cloud {cloud}"), &done)
        }
    }
}

/// `policy …`
pub(super) fn policy(mut s: Session, command: PolicyCommand) -> Result<(), CliError> {
    match command {
        PolicyCommand::Set { customer, file, policy_key } => {
            let document = files::text(&file)?;
            let key = policy_key_of(&policy_key, false)?;
            let statement = PolicyStatement::of(&document).map_err(|e| CliError::Input(chain(&e)))?;
            let signature = key.sign(&statement.signed_bytes()).as_ref().into();
            let signed = SignedPolicy { document, signature };
            let view: VersionView = s.client.put(&format!("/v1/customers/{customer}/policy"), &signed)?;
            s.out.print(format!("policy version {} of {customer} is in force", view.version), &view)
        }
        PolicyCommand::Show { customer } => {
            let signed: SignedPolicy = s.client.get(&format!("/v1/customers/{customer}/policy"))?;
            s.out.print(signed.document.trim_end(), &signed)
        }
    }
}

/// `admin …`
pub(super) fn admin(mut s: Session, command: AdminCommand) -> Result<(), CliError> {
    match command {
        AdminCommand::Add { name, role, customer, out } => {
            if out.exists() {
                return Err(CliError::Input(format!("{} exists already", out.display())));
            }
            let (public, key) = new_admin_key()?;
            let new = NewAdmin { name: name.clone(), role, customer, public: public.into() };
            let made: AdminCertificate = s.client.post("/v1/admins", &new)?;
            let profile = Profile::new(&name, s.client.url.clone(), s.client.pin, &made.certificate, &key);
            write_profile(&out, &profile)?;
            s.out.print(format!("{name} is {} now; its profile is {}", role.name(), out.display()), &made)
        }
        AdminCommand::List => {
            let all: Vec<AdminView> = s.client.get("/v1/admins")?;
            s.out.list(&all, |a| {
                let scope = a.customer.as_ref().map_or("all customers".to_owned(), ToString::to_string);
                format!("{} {} {scope}{}", a.name, a.role.name(), if a.revoked { " revoked" } else { "" })
            })
        }
        AdminCommand::Revoke { name } => {
            let done: Done = s.client.post(&format!("/v1/admins/{name}/revoke"), &())?;
            s.out.print(format!("{name} is revoked"), &done)
        }
    }
}

/// The customer's policy key in `path` (PKCS#8, PEM), made there where `make` says so and nothing is.
fn policy_key_of(path: &Path, make: bool) -> Result<Ed25519KeyPair, CliError> {
    let bad = || CliError::Input(format!("{} holds no Ed25519 key (PKCS#8, PEM)", path.display()));
    if make && !path.exists() {
        let key = Ed25519KeyPair::generate_pkcs8(&aws_lc_rs::rand::SystemRandom::new())
            .map_err(|_| CliError::Input("a policy key can't be made".into()))?;
        files::write_new(path, pem("PRIVATE KEY", key.as_ref()).as_bytes())?;
    }
    let der = from_pem(&files::text(path)?).ok_or_else(bad)?;
    Ed25519KeyPair::from_pkcs8(&der).map_err(|_| bad())
}
