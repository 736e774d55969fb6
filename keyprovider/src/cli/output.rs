//! Printing: a line for people, or a JSON document.

use super::CliError;
use serde::Serialize;
use std::io::Write;

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    /// One JSON document a line.
    pub(super) json: bool,
}

impl Output {
    /// Prints a result: `line` for people, `value` as JSON.
    pub(super) fn print(self, line: impl std::fmt::Display, value: &impl Serialize) -> Result<(), CliError> {
        if self.json { self.document(value) } else { write_line(&line.to_string()) }
    }

    /// Prints a list: a line for each thing, or each thing's JSON on a line.
    pub(super) fn list<T: Serialize>(self, all: &[T], line: impl Fn(&T) -> String) -> Result<(), CliError> {
        for thing in all {
            self.print(line(thing), thing)?;
        }
        Ok(())
    }

    /// Prints a value as one line of JSON.
    pub(super) fn document(self, value: &impl Serialize) -> Result<(), CliError> {
        write_line(&serde_json::to_string(value).map_err(|e| CliError::Input(e.to_string()))?)
    }

    /// Prints a value as JSON that people read.
    pub(super) fn pretty(self, value: &impl Serialize) -> Result<(), CliError> {
        write_line(&serde_json::to_string_pretty(value).map_err(|e| CliError::Input(e.to_string()))?)
    }
}

fn write_line(line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::Output)
}
