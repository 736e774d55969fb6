//! How far something long has come, on standard error: one line that changes on a terminal, a line now and then elsewhere.

use super::size::Bytes;
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const ON_A_TERMINAL: Duration = Duration::from_millis(200);
const ELSEWHERE: Duration = Duration::from_secs(10);
/// Lines from which a rate is taken.
const TRAIL: usize = 5;

/// Whether a terminal's last line is one of progress.
static ON_SCREEN: AtomicBool = AtomicBool::new(false);

/// Takes the line of progress off the terminal, if there is one: another line is to come.
pub(crate) fn clear() {
    let _ = io::stderr().lock().write_all(cleared().as_bytes());
}

/// What does that.
pub(crate) fn cleared() -> &'static str {
    if ON_SCREEN.swap(false, Ordering::Relaxed) { "\r\x1b[K" } else { "" }
}

/// Tells of one piece of work. Work that is done before the first line is due is not talked about.
pub(crate) struct Progress {
    what: &'static str,
    total: u64,
    form: Form,
    begun: Instant,
    told: Instant,
    /// The newest lines' times and bytes.
    trail: VecDeque<(Instant, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Terminal,
    Lines,
    Json,
}

#[derive(Serialize)]
struct Line<'a> {
    progress: &'a str,
    done: u64,
    total: u64,
    seconds: f64,
}

impl Progress {
    /// `what` is the command; `total` its bytes.
    pub(crate) fn of(what: &'static str, total: u64, json: bool) -> Self {
        let form = match json {
            true => Form::Json,
            false if io::stderr().is_terminal() => Form::Terminal,
            false => Form::Lines,
        };
        let now = Instant::now();
        Self { what, total, form, begun: now, told: now, trail: [(now, 0)].into() }
    }

    /// `done` bytes are behind us.
    pub(crate) fn at(&mut self, done: u64) {
        let pause = if self.form == Form::Terminal { ON_A_TERMINAL } else { ELSEWHERE };
        if self.told.elapsed() < pause {
            return;
        }
        self.told = Instant::now();
        let text = self.text(self.told, done);
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back((self.told, done));
        let mut out = io::stderr().lock();
        ON_SCREEN.store(self.form == Form::Terminal, Ordering::Relaxed);
        let _ = match self.form {
            Form::Terminal => write!(out, "\r{text}\x1b[K").and_then(|()| out.flush()),
            Form::Lines | Form::Json => writeln!(out, "{text}"),
        };
    }

    /// `done` of `all` steps are, whatever the steps.
    pub(crate) fn share(&mut self, done: u64, all: u64) {
        self.at((u128::from(self.total) * u128::from(done.min(all)) / u128::from(all.max(1))) as u64);
    }

    /// Seconds since the work began, never 0.
    pub(crate) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64().max(1e-6)
    }

    /// The rate is that of the newest lines: what was done by an earlier run, or went faster, says nothing of what is to come.
    fn text(&self, now: Instant, done: u64) -> String {
        if self.form == Form::Json {
            let line = Line { progress: self.what, done, total: self.total, seconds: self.seconds() };
            return serde_json::to_string(&line).unwrap_or_default();
        }
        let share = done as f64 * 100.0 / self.total.max(1) as f64;
        let (since, before) = self.trail.front().copied().unwrap_or((self.begun, 0));
        let rate = rate(done.saturating_sub(before), (now - since).as_secs_f64().max(1e-6));
        format!("{}: {} of {} ({share:.0} %), {rate}", self.what, Bytes(done), Bytes(self.total))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        clear();
    }
}

/// Bytes in a time, as a rate.
pub(crate) fn rate(bytes: u64, seconds: f64) -> String {
    format!("{:.0} MiB/s", bytes as f64 / seconds / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_how_fast() {
        let mut progress = Progress::of("import", 4 << 20, false);
        progress.form = Form::Lines;
        let second = progress.begun + Duration::from_secs(1);
        assert_eq!(progress.text(second, 1 << 20), "import: 1 MiB of 4 MiB (25 %), 1 MiB/s");
        progress.form = Form::Json;
        let line: serde_json::Value = serde_json::from_str(&progress.text(second, 7)).expect("JSON");
        assert_eq!(
            (&line["progress"], &line["done"], &line["total"]),
            (&"import".into(), &7.into(), &(4 << 20).into())
        );
        assert_eq!(rate(3 << 20, 2.0), "2 MiB/s");
    }

    #[test]
    fn the_rate_is_what_it_is_now() {
        let mut progress = Progress::of("rekey", 1 << 30, false);
        progress.form = Form::Lines;
        // An earlier run did the first half, which this one passes over at once.
        let at = |n: u64| progress.begun + Duration::from_secs(n);
        progress.trail = (1..=TRAIL as u64).map(|n| (at(n), (512 + 3 * n) << 20)).collect();
        let text = progress.text(at(7), (512 + 21) << 20);
        assert!(text.ends_with("(52 %), 3 MiB/s"), "{text}");
    }

    #[test]
    fn only_the_newest_lines_are_remembered() {
        let mut progress = Progress::of("rekey", 100, false);
        progress.form = Form::Json;
        for done in 1..20 {
            progress.told -= ELSEWHERE;
            progress.at(done);
        }
        assert_eq!(progress.trail.iter().map(|(_, done)| *done).collect::<Vec<_>>(), [15, 16, 17, 18, 19]);
    }
}
