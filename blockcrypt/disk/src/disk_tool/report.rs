//! What people and scripts see: results on standard output, everything else on standard error.

use super::error::ToolError;
use super::progress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::error::Error;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// The longest text of a line, in bytes: however JSON has it, a pipe that has any room takes it whole.
const LINE: usize = 2000;
/// How long an end waits for standard error to take its line.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

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

/// Whether standard error is for scripts too.
static JSON: AtomicBool = AtomicBool::new(false);

/// What standard error says beside progress: for people a line, for scripts an object on a line, as `fealty --json` has it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
enum Line<'a> {
    /// Something to know.
    Note { message: &'a str },
    /// Why the tool ends, and its exit code.
    Error { exit: u8, message: &'a str },
}

/// From now on lines on standard error are objects, if `json` says so.
pub(crate) fn speak(json: bool) {
    JSON.store(json, Ordering::Relaxed);
}

/// The line that says why the tool failed.
pub(crate) fn failure(error: &ToolError) {
    let message = &one_line(&chain(error), LINE);
    tell(&Line::Error { exit: error.code(), message }, message);
}

/// The line that says why the tool is ended, with exit code `exit`. Like [`interruption`], it does not depend on who reads it.
pub(crate) fn end(exit: u8, text: &str) {
    let message = &one_line(text, LINE);
    tell_at_once(&Line::Error { exit, message }, message);
}

/// What comes of an interruption.
pub(crate) fn interruption(text: &str) {
    let message = &one_line(text, LINE);
    tell_at_once(&Line::Note { message }, message);
}

/// A line on standard error. Whatever it quotes can't add a second one, nor move a terminal's cursor.
pub(crate) fn line(text: &str) {
    let message = &one_line(text, LINE);
    tell(&Line::Note { message }, message);
}

/// Something that nobody has to act upon at once.
pub(crate) fn note(text: &str) {
    let message = &one_line(text, LINE);
    tell(&Line::Note { message }, &format!("note: {message}"));
}

fn tell(line: &Line<'_>, text: &str) {
    let _ = io::stderr().lock().write_all(written(line, text).as_bytes());
}

/// The same in one piece, and past the lock: standard error may be a pipe that nobody empties, at which another thread waits already.
fn tell_at_once(line: &Line<'_>, text: &str) {
    let out = io::stderr();
    if let Ok(1..) = poll(&mut [PollFd::new(&out, PollFlags::OUT)], Some(&PATIENCE)) {
        let _ = rustix::io::write(&out, written(line, text).as_bytes());
    }
}

fn written(line: &Line<'_>, text: &str) -> String {
    let cleared = progress::cleared();
    match JSON.load(Ordering::Relaxed) {
        true => format!("{cleared}{}\n", serde_json::to_string(line).unwrap_or_default()),
        false => format!("{cleared}fealty-disk: {text}\n"),
    }
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
