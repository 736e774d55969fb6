//! Why the conversation with the holder failed.

use super::handover::HANDOVER;
use policy::disk::{MESSAGE_LIMIT, VolumeOperation};
use secretmem::SecretError;
use std::io;

/// Why the conversation with the holder failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HolderError {
    #[error("the key holder hung up before it handed over the volume's key; see what it says")]
    NoHandover,
    #[error("the key holder's hand-over broke off in {0}; let fealty-keys volume exec start this")]
    Truncated(&'static str),
    #[error("the key holder sent nothing for {} s; stop it and start again", HANDOVER.as_secs())]
    Silent,
    #[error("the key holder's message has {0} bytes; 1 to {MESSAGE_LIMIT} are allowed")]
    Length(u32),
    #[error("the key holder's message can't be read; let a fealty-keys of this version start this")]
    Message(#[source] serde_json::Error),
    #[error("the conversation with the key holder failed")]
    Io(#[source] io::Error),
    #[error("no memory for the volume's key")]
    Secret(#[from] SecretError),
    #[error("the key holder is gone, and with it the right to use the volume; start again")]
    Gone,
    #[error("the audit log did not take what was found: {0}; repeat this when it does")]
    Unheard(String),
    #[error("{0} is not permitted, and nothing was done: {1}")]
    Forbidden(VolumeOperation, String),
    #[error(
        "whether {0} is permitted is not known: {1}; nothing was done here, but the key provider may have done its part: start again"
    )]
    NoPermit(VolumeOperation, String),
}
