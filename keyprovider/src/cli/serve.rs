//! `init` and `serve`.

use super::args::{Init, Serve};
use super::output::Output;
use super::{CliError, files};
use crate::admin::{admins, backups};
use crate::api::NewAdmin;
use crate::authority::pem;
use crate::client::Profile;
use crate::provider::Provider;
use crate::server::Server;
use crate::store::people::Role;
use policy::audit::Actor;
use policy::header::ProviderUrl;
use rcgen::{KeyPair, PublicKeyData};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Makes a provider.
pub(super) fn init(init: &Init, out: Output) -> Result<(), CliError> {
    runtime()?.block_on(async {
        let first = init.names.first().ok_or_else(|| CliError::Input("a provider needs a name".into()))?;
        let host = if first.contains(':') { format!("[{first}]") } else { first.clone() };
        let url = ProviderUrl::try_from(format!("https://{host}:{}", init.port));
        let url = url.map_err(|e| CliError::Input(e.to_string()))?;
        let provider = Provider::create(&init.dir, &init.names).await?;
        let (key, profile) = new_admin_key()?;
        let new = NewAdmin { name: "admin".into(), role: Role::Admin, customer: None, public: key.into() };
        let (name, made) = admins::register(&provider, Actor::Provider, new).await?;
        let pin = provider.pin;
        let profile = Profile::new(&name, url, pin, &made.certificate, &profile);
        // Both may be there already, of an `init` that was killed: there is no provider yet for which they are good.
        let text = serde_json::to_vec_pretty(&profile).map_err(|e| CliError::Input(e.to_string()))?;
        files::write(&init.dir.join("admin.json"), &text, 0o600)?;
        let authority = pem("CERTIFICATE", provider.authority.certificate());
        files::write(&init.dir.join("ca.pem"), authority.as_bytes(), 0o644)?;
        provider.finish().await?;
        let dir = init.dir.display();
        let line = format!("made a provider in {dir}, pin {pin}; keep a copy of {dir}/master.key apart");
        out.print(line, &serde_json::json!({ "dir": init.dir, "pin": pin, "url": profile.url }))
    })
}

/// A fresh key for an administrator: SubjectPublicKeyInfo and PKCS#8, DER.
pub(super) fn new_admin_key() -> Result<(Vec<u8>, Vec<u8>), CliError> {
    let key = KeyPair::generate().map_err(|e| CliError::Input(e.to_string()))?;
    Ok((key.subject_public_key_info(), key.serialize_der()))
}

/// Writes a profile, which must not exist yet.
pub(super) fn write_profile(path: &Path, profile: &Profile) -> Result<(), CliError> {
    let text = serde_json::to_vec_pretty(profile).map_err(|e| CliError::Input(e.to_string()))?;
    files::write_new(path, &text)
}

/// Serves until SIGTERM or SIGINT.
pub(super) fn serve(serve: &Serve) -> Result<(), CliError> {
    let filter = EnvFilter::try_from_env("FEALTY_LOG").unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    allow_descriptors();
    runtime()?.block_on(async {
        let provider = Arc::new(Provider::open(&serve.dir).await?);
        backups::clear(&provider);
        let server = Server::bind(provider.clone(), serve.listen).await?;
        let port = server.address().map_or(serve.listen.port(), |a| a.port());
        let first = &provider.names[0];
        let host = if first.contains(':') { format!("[{first}]") } else { first.clone() };
        announce(serve, &format!("ready https://{host}:{port}"))?;
        server.serve(stopped()?).await;
        provider.db.close().await;
        Ok(())
    })
}

/// Each connection takes a descriptor: as many as this process may have.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("fewer connections at once than there could be: {error}");
    }
}

fn announce(serve: &Serve, line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::Output)?;
    if let Some(fd) = serve.ready_fd {
        let mut file =
            std::fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")).map_err(CliError::Output)?;
        writeln!(file, "{line}").map_err(CliError::Output)?;
    }
    Ok(())
}

fn stopped() -> Result<impl Future<Output = ()>, CliError> {
    let failed = |e| CliError::Start("a signal handler".into(), e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: requests in flight are finished first");
    })
}

/// The runtime of everything that is asynchronous.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    built.map_err(|e| CliError::Start("the runtime".into(), e))
}
