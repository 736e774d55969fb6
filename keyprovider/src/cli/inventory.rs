//! `cloud`.

use super::args::CloudCommand;
use super::{CliError, Session, files};
use crate::api::{CloudView, Done, HostView, NewCloud, NewHost};
use crate::client::from_pem;
use std::path::Path;

/// `cloud …`
pub(super) fn cloud(mut s: Session, command: CloudCommand) -> Result<(), CliError> {
    match command {
        CloudCommand::Create { id, kind, roots } => {
            let roots = roots.map(|path| files::text(&path)).transpose()?.unwrap_or_default();
            let view: CloudView = s.client.post("/v1/clouds", &NewCloud { cloud: id.clone(), kind, roots })?;
            s.out.print(format!("created cloud {id} ({})", kind.name()), &view)
        }
        CloudCommand::Enroll { id, certificate, ek_public, name } => {
            let certificate = certificate.map(|path| der(&path)).transpose()?.map(Into::into);
            let ek_public = ek_public.map(|path| der(&path)).transpose()?.map(Into::into);
            let new = NewHost { certificate, ek_public, name };
            let view: HostView = s.client.post(&format!("/v1/clouds/{id}/hosts"), &new)?;
            s.out.print(format!("enrolled host {} in cloud {id}{}", view.host, lab(&view)), &view)
        }
        CloudCommand::Remove { id, host } => {
            let done: Done = s.client.delete(&format!("/v1/clouds/{id}/hosts/{host}"))?;
            s.out.print(format!("host {host} is no longer in cloud {id}"), &done)
        }
        CloudCommand::List => {
            let all: Vec<CloudView> = s.client.get("/v1/clouds")?;
            s.out.list(&all, |c| format!("{} ({}), {} hosts", c.cloud, c.kind.name(), c.hosts))
        }
        CloudCommand::Hosts { id } => {
            let all: Vec<HostView> = s.client.get(&format!("/v1/clouds/{id}/hosts"))?;
            s.out.list(&all, |h| {
                let name = h.name.as_deref().unwrap_or("-");
                format!("{} {name}{}{}", h.host, if h.pinned { " pinned" } else { "" }, lab(h))
            })
        }
    }
}

fn lab(host: &HostView) -> &'static str {
    if host.lab { " (lab)" } else { "" }
}

/// A file's DER, also where it is PEM.
fn der(path: &Path) -> Result<Vec<u8>, CliError> {
    let bytes = files::read(path)?;
    if !bytes.starts_with(b"-----BEGIN ") {
        return Ok(bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    from_pem(&text).ok_or_else(|| CliError::Input(format!("{} is neither DER nor PEM", path.display())))
}
