//! What people and scripts see: results on standard output, everything else on standard error.

use super::error::ToolError;
use super::progress;
use serde::Serialize;
use std::error::Error;
use std::io::{self, Write};

/// Writes results: for people, or as JSON, one object a line.
#[derive(Clone, Copy)]
pub(crate) struct Reporter {
    pub(crate) json: bool,
}

impl Reporter {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// A result.
    pub(crate) fn result(self, value: &impl Serialize, text: &str) -> Result<(), ToolError> {
        self.write(&mut io::stdout().lock(), value, text).map_err(ToolError::Output)
    }

    /// A result of a command whose standard output is data.
    pub(crate) fn aside(self, value: &impl Serialize, text: &str) {
        let _ = self.write(&mut io::stderr().lock(), value, text);
    }

    fn write(self, out: &mut impl Write, value: &impl Serialize, text: &str) -> io::Result<()> {
        progress::clear();
        if !self.json {
            return writeln!(out, "{text}");
        }
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        out.write_all(&line)
    }
}

/// The line that says why the tool failed.
pub(crate) fn failure(error: &ToolError) {
    line(&chain(error));
}

/// A line on standard error. Whatever it quotes can't add a second one, nor move a terminal's cursor.
pub(crate) fn line(text: &str) {
    progress::clear();
    let _ = writeln!(io::stderr().lock(), "fealty-disk: {}", one_line(text, 2000));
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// `text` without control characters, at most `limit` bytes long.
pub(crate) fn one_line(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if out.len() + c.len_utf8() > limit {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[2Jc\u{9b}d", 100), "a b [2Jc d");
        assert_eq!(one_line("ää", 3), "ä");
    }

    #[test]
    fn causes_are_named_in_order() {
        let error = ToolError::Open("x".into(), io::Error::other("no such thing"));
        assert_eq!(chain(&error), "x can't be opened: no such thing");
    }
}
