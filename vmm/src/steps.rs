//! What happens, told as it happens: for people one line each with the time since the start, for scripts one JSON object
//! a line. Both go to standard error; standard output is the guest's.

use crate::console::terminal;
use crate::exit::{Failure, one_line};
use serde::Serialize;
use std::io::Write;
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
            self.object(&Line::Step { step, ms, took_ms, detail: &one_line(detail) });
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
            self.object(&Line::Error { ms, exit: failure.exit as u8, message: &failure.message });
        } else {
            line(&format!("fealty: {failure}"));
        }
    }

    fn object(&self, object: &Line<'_>) {
        if let Ok(text) = serde_json::to_string(object) {
            line(&text);
        }
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// One write, so that lines of several threads don't mix; what can't be written is lost.
pub(crate) fn line(text: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    let _ = std::io::stderr().write_all(format!("{text}{end}").as_bytes());
}
