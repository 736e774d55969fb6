//! `bench attest`: where the time of an attested start goes, as the VM process itself tells it.

use super::BenchError;
use super::figure::{Figure, Printer};
use super::first_byte;
use super::sample::Samples;
use super::start::Protected;
use serde::Deserialize;

/// A line of `fealty run --json`.
#[derive(Deserialize)]
struct Step {
    step: String,
    /// Since the process's start.
    ms: f64,
    /// Of a step that has a length.
    took_ms: Option<f64>,
}

/// Steps by name, in the order in which they first came.
#[derive(Default)]
struct Parts(Vec<(String, Samples, Samples)>);

/// Measures and prints.
pub(super) fn run(rounds: u32, printer: &mut Printer) -> Result<(), BenchError> {
    let protected = Protected::new()?;
    let (mut parts, mut whole) = (Parts::default(), Samples::default());
    for _ in 0..rounds {
        let speaking = first_byte::start(&mut protected.lab.vm(&["--json"]))?;
        whole.add(speaking.ms);
        parts.add(&speaking.end()?);
    }
    if parts.0.is_empty() {
        return Err(BenchError::NoSteps);
    }
    for (step, at, took) in &parts.0 {
        printer.add(&Figure::new(format!("at: {step}"), "ms", at));
        if took.median().is_finite() {
            printer.add(&Figure::new(format!("took: {step}"), "ms", took).against("whole start", &whole, None));
        }
    }
    printer.add(&Figure::new("whole start, to the guest's first byte", "ms", &whole));
    Ok(())
}

impl Parts {
    /// Adds what one VM process told.
    fn add(&mut self, told: &str) {
        for step in told.lines().filter_map(|line| serde_json::from_str::<Step>(line).ok()) {
            let at = self.0.iter().position(|(name, ..)| *name == step.step).unwrap_or_else(|| {
                self.0.push((step.step, Samples::default(), Samples::default()));
                self.0.len() - 1
            });
            self.0[at].1.add(step.ms);
            if let Some(took) = step.took_ms {
                self.0[at].2.add(took);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_from_other_lines() {
        let mut parts = Parts::default();
        parts.add("{\"event\":\"step\",\"step\":\"quote\",\"ms\":5.5,\"took_ms\":2.0}\nnoise\n{\"event\":\"step\",\"step\":\"runs\",\"ms\":9.0}\n");
        parts.add("{\"event\":\"step\",\"step\":\"quote\",\"ms\":6.5,\"took_ms\":4.0,\"detail\":\"x\"}\n");
        let [quote, runs] = &parts.0[..] else { panic!("two steps") };
        assert_eq!((quote.1.median(), quote.2.median()), (6.0, 3.0));
        assert_eq!(runs.1.median(), 9.0);
        assert!(runs.2.median().is_nan());
    }
}
