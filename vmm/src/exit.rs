//! How the program ends: exit codes, and the one line that goes with them.

use std::error::Error;
use std::fmt;

/// Exit codes of `fealty`. They are a contract with scripts: numbers are never reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// The guest powered off, or the operator ended the VM through its socket; for other commands: done.
    Done = 0,
    /// A fault of this program.
    Internal = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A file is missing, unreadable or not what it should be: VM file, configuration, kernel, initramfs.
    File = 3,
    /// The key provider, or the VM process, refused.
    Refused = 4,
    /// The key provider can't be reached, or can't answer just now.
    Unreachable = 5,
    /// Who answers is not the key provider that the VM file names.
    WrongProvider = 6,
    /// The TPM or its service is missing or fails.
    Tpm = 7,
    /// A volume is missing, damaged, not the newest, not this VM's, or could not be flushed at the VM's end.
    Volume = 8,
    /// There is no usable /dev/kvm.
    Kvm = 9,
    /// The guest failed: a triple fault, or something KVM can't go on with.
    Guest = 10,
    /// The lease ended and policy powered the VM off, or the provider knows a newer instance.
    Lease = 11,
    /// The guest asked for a reset: start it again.
    Reset = 12,
    /// The host lacks something: memory, a socket's path, the sandbox.
    Host = 13,
    /// The VM was stopped by a signal without the guest's own power-off; its volumes are flushed.
    Stopped = 14,
    /// The guest's kernel panicked, and said so through its panic device.
    Panic = 15,
}

/// The table of exit codes, for `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
   0  the guest powered off, or the operator ended the VM; done
   1  fault of this program
   2  command line
   3  VM file, configuration, kernel or initramfs
   4  refused by the key provider (or, for ctl, by the VM process)
   5  key provider not reachable
   6  not the key provider that the VM file names
   7  TPM or TPM service
   8  volume: missing, damaged, not the newest, not this VM's, or not flushed at the end
   9  no usable /dev/kvm
  10  the guest failed
  11  the lease ended
  12  the guest asked for a reset: start it again
  13  the host lacks something (memory, a socket's path, the sandbox)
  14  stopped by a signal before the guest powered off; volumes are flushed
  15  the guest's kernel panicked";

/// Why the program ends early: one line for the one who has to act on it.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// One line without control characters.
    pub message: String,
}

impl Failure {
    /// A failure that `message` explains.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: one_line(&message.to_string()) }
    }

    /// A failure that an error, with the errors that caused it, explains.
    pub fn of(exit: Exit, error: &(dyn Error + 'static)) -> Self {
        Self::new(exit, chain(error))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// An error and its causes, joined by colons.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// `text` as one line that a terminal shows and does not obey: control characters become spaces, and it ends after 1024
/// characters.
pub fn one_line(text: &str) -> String {
    visible(text).take(1024).collect()
}

/// `text` to its end, with spaces for control characters.
pub fn visible(text: &str) -> impl Iterator<Item = char> {
    text.chars().map(|c| if c.is_control() { ' ' } else { c })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_lists_each_code_once() {
        for code in 0..=15 {
            let lines = EXIT_CODES.lines().filter(|l| l.starts_with(&format!("{code:4}  "))).count();
            assert_eq!(lines, 1, "{code}");
        }
    }

    #[test]
    fn a_hostile_text_stays_one_line() {
        let failure = Failure::new(Exit::Refused, "no\r\n\x1b[2Jfealty: all is well");
        assert_eq!(failure.message, "no   [2Jfealty: all is well");
        assert_eq!(one_line(&"x".repeat(5000)).len(), 1024);
    }
}
