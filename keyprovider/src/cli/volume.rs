//! `volume`, but for `exec`.

use super::args::VolumeCommand;
use super::{CliError, Session};
use crate::api::{ConfirmVolume, NewVolume, VolumeView};

/// `volume …`
pub(super) fn volume(mut s: Session, command: VolumeCommand) -> Result<(), CliError> {
    match command {
        VolumeCommand::Create { customer, name } => {
            let view: VolumeView = s.client.post(&format!("/v1/customers/{customer}/volumes"), &NewVolume { name })?;
            s.out.print(format!("created volume {} {}", view.name, view.volume), &view)
        }
        VolumeCommand::List { customer } => {
            let all: Vec<VolumeView> = s.client.get(&format!("/v1/customers/{customer}/volumes"))?;
            s.out.list(&all, line)
        }
        VolumeCommand::Confirm { customer, name, anchor } => {
            let path = format!("/v1/customers/{customer}/volumes/{name}/confirm");
            let view: VolumeView = s.client.post(&path, &ConfirmVolume { anchor })?;
            s.out.print(format!("the anchor of volume {name} is confirmed"), &view)
        }
        VolumeCommand::Retire { name, force: false, .. } => Err(CliError::Input(format!(
            "volume {name} would be unreadable for ever, wherever its file lies; say --force if that is meant"
        ))),
        VolumeCommand::Retire { customer, name, force: true } => {
            let view: VolumeView = s.client.post(&format!("/v1/customers/{customer}/volumes/{name}/retire"), &())?;
            s.out.print(format!("the keys of volume {name} are retired: nobody can read it any more"), &view)
        }
        // Dispatched before: it ends with its command's code.
        VolumeCommand::Exec { .. } => Ok(()),
    }
}

fn line(volume: &VolumeView) -> String {
    let writer = volume.writer.map_or("empty".to_owned(), |w| format!("written by opening {w}"));
    if volume.retired {
        return format!("{} {} erased", volume.name, volume.volume);
    }
    let size = volume.size.map_or(String::new(), |bytes| format!("{bytes} bytes, "));
    let holder = volume.held_by.as_ref().map_or("free".to_owned(), |h| format!("held by {h}"));
    let waits = if volume.unconfirmed { ", waits for `volume confirm`" } else { "" };
    format!("{} {} {size}{writer}, {holder}{waits}", volume.name, volume.volume)
}
