//! What a volume does on this machine, measured: against what its ciphers do alone, and against a plain file. `fealty-disk bench` and the
//! project's own benchmarks are built on it.
//!
//! Subjects are measured in turn, piece of work by piece of work, so that whatever else the machine does meets all of them; figures
//! are medians with quartiles. Rates are taken twice: by the wall's clock, and by the processor time of all this process ("per core"),
//! which a busy machine disturbs less.
//!
//! What a piece of work costs a volume depends on what was done before: requests at random leave changed pages all over the map, and
//! whoever comes next makes the checkpoint that writes them. So each piece is done twice, and the second time counts, which meets
//! what work of its own kind has left. What the first took is kept beside.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `work` | the pieces of work |
//! | `subject` | what they are done with: a volume, a plain file |
//! | `ciphers` | what the ciphers do alone |
//! | `keeper` | the provider's side of a volume, in memory |
//! | `sample`, `figure`, `machine` | what is printed |

mod ciphers;
mod figure;
mod keeper;
mod machine;
mod sample;
mod subject;
mod work;

pub use ciphers::{Limit, ciphers};
pub use figure::{Figure, table};
pub use keeper::Keeper;
pub use machine::machine;
pub use sample::Samples;
pub use subject::{HalfFull, Plain, Subject, fill};
pub use work::{Rates, Runner, Timing, WARM_UP, WORKS, Work, interleave, thread_time};

use blockcrypt::VolumeError;
use std::io;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The plain file failed.
    #[error("the plain file failed to {0}")]
    Plain(&'static str, #[source] io::Error),
    /// The volume failed.
    #[error("the volume failed to {0}")]
    Volume(&'static str, #[source] VolumeError),
    /// Something did not come back as it was.
    #[error("{0} are not what was written")]
    Unequal(&'static str),
    /// The system has no thread.
    #[error("no thread for the benchmark")]
    Thread(#[source] io::Error),
    /// A thread ended early.
    #[error("a thread of the benchmark panicked")]
    Panicked,
}

impl MeasureError {
    /// What a volume failed to do.
    pub fn volume(what: &'static str) -> impl Fn(VolumeError) -> Self {
        move |error| Self::Volume(what, error)
    }
}
