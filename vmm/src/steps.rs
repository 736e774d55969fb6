//! What happens, told as it happens: for people one line each with the time since the start, for scripts one JSON object
//! a line. Both go to standard error; standard output is the guest's.

use crate::console::terminal;
use crate::exit::{Failure, one_line};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Tells what happens. Copies tell the same story.
#[derive(Clone, Copy)]
pub struct Steps {
    start: Instant,
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
enum Line<'a> {
    Step {
        step: &'a str,
        ms: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        took_ms: Option<f64>,
        #[serde(skip_serializing_if = "str::is_empty")]
        detail: &'a str,
    },
    Error {
        ms: f64,
        exit: u8,
        message: &'a str,
    },
}

impl Steps {
    /// A story that begins now.
    pub fn new(json: bool) -> Self {
        Self { start: Instant::now(), json }
    }

    /// Whether it is told to a script.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Something was done, or happened.
    pub fn step(&self, step: &str, detail: &str) {
        self.tell(step, detail, None);
    }

    /// Something was done, and took `took`.
    pub fn timed(&self, step: &str, detail: &str, took: Duration) {
        self.tell(step, detail, Some(millis(took)));
    }

    fn tell(&self, step: &str, detail: &str, took_ms: Option<f64>) {
        let ms = millis(self.start.elapsed());
        if self.json {
            object(&one_line(detail), |detail| Line::Step { step, ms, took_ms, detail });
            return;
        }
        let took = took_ms.map(|ms| format!(" ({ms:.1} ms)")).unwrap_or_default();
        let colon = if detail.is_empty() { "" } else { ": " };
        line(&format!("[{ms:9.1} ms] {step}{colon}{}{took}", one_line(detail)));
    }

    /// Why the program ends: the last line.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let ms = millis(self.start.elapsed());
            object(&failure.message, |message| Line::Error { ms, exit: failure.exit as u8, message });
        } else {
            line(&format!("fealty: {failure}"));
        }
    }
}

/// Tells one object, of which `text` is the only part that may be long.
fn object<'a>(text: &'a str, make: impl Fn(&'a str) -> Line<'a>) {
    if let Some(json) = fitting(text, make) {
        line(&json);
    }
}

/// The object as a line's JSON: where that would be too long, `text` is cut, and not the object.
fn fitting<'a>(text: &'a str, make: impl Fn(&'a str) -> Line<'a>) -> Option<String> {
    let whole = serde_json::to_string(&make(text)).ok()?;
    // Each byte less of the text is at least one less of the JSON.
    let length = text.len().saturating_sub(whole.len().saturating_sub(LINE_MAX));
    let cut = (0..=length).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    if cut == text.len() { Some(whole) } else { serde_json::to_string(&make(&text[..cut])).ok() }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// One write, so that lines of several threads don't mix. What standard error does not take at once is lost: whoever holds its other end and
/// does not read must not hold up a lease's end.
pub(crate) fn line(text: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    let cut = (0..=text.len().min(LINE_MAX)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let bytes = format!("{}{end}", &text[..cut]);
    let stderr = rustix::stdio::stderr();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // Where poll(2) says that a pipe takes something, it takes PIPE_BUF bytes without waiting.
    let takes = |fd: &mut [PollFd<'_>]| poll(fd, Some(&now)).is_ok_and(|ready| ready > 0);
    for _ in 0..LINE_TRIES {
        if let Ok(_turn) = TURN.try_lock() {
            if takes(&mut [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)]) {
                let _ = rustix::io::write(stderr, bytes.as_bytes());
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whose line it is. Never waited for without end.
static TURN: Mutex<()> = Mutex::new(());
/// Bytes of a line: with its end no more than PIPE_BUF.
const LINE_MAX: usize = 4094;
/// Milliseconds that a line waits for its turn.
const LINE_TRIES: u32 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_whole_however_long_its_text_is() {
        for text in ["short", &"\u{10348}".repeat(1024), &"\"\\".repeat(512), &"x".repeat(100_000)] {
            for make in [
                |detail| Line::Step { step: "runs", ms: 1e9, took_ms: Some(1.5), detail },
                |message| Line::Error { ms: 1e9, exit: 13, message },
            ] {
                let json = fitting(text, make).expect("JSON");
                assert!(json.len() <= LINE_MAX, "{}", json.len());
                let told: serde_json::Value = serde_json::from_str(&json).expect("whole");
                let said = told["detail"].as_str().or(told["message"].as_str()).expect("text");
                assert!(text.starts_with(said) && (said == text || json.len() > LINE_MAX - 8), "{}", said.len());
            }
        }
    }
}
