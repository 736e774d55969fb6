//! `bench attest`: where the time of an attested start goes, as the VM process itself tells it.

use super::BenchError;
use super::first_byte;
use super::printer::Printer;
use super::start::Protected;
use fealty_disk::bench::{Figure, Samples};
use serde::Deserialize;

/// The step after which the guest runs.
const LAST: &str = "runs";
/// Steps that wait for the TPM, and steps that wait for the key provider.
const OF_TPM: [&str; 2] = ["quote", "open"];
const OF_PROVIDER: [&str; 2] = ["challenge", "evidence"];

/// A line of `fealty run --json`.
#[derive(Deserialize)]
struct Step {
    step: String,
    /// Since the process's start.
    ms: f64,
    /// Of a step that has a length.
    took_ms: Option<f64>,
}

/// What one round told of a step: the time since the step before it, and its own length.
struct Part {
    since: Samples,
    took: Samples,
}

/// Steps by name, in the order in which they first came.
#[derive(Default)]
struct Parts(Vec<(String, Part)>);

/// Measures and prints.
pub(super) fn run(rounds: u32, printer: &mut Printer) -> Result<(), BenchError> {
    let mut protected = Protected::new()?;
    let (mut parts, mut whole, mut rest) = (Parts::default(), Samples::default(), Samples::default());
    let (mut tpm, mut tls) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        let speaking = first_byte::start(&mut protected.lab.vm(&["--json"]))?;
        let ms = speaking.ms;
        let runs = parts.add(&speaking.end()?).ok_or(BenchError::NoSteps)?;
        whole.add(ms);
        rest.add(ms - runs);
        tpm.add(protected.tpm_alone()?);
        tls.add(protected.tls_alone()?);
    }
    for (step, part) in &parts.0 {
        printer.add(Figure::new(format!("part: {step}"), "ms", &part.since).against("whole start", &whole, None));
    }
    let name = "part: start of the process, and from there to the first byte";
    printer.add(Figure::new(name, "ms", &rest).against("whole start", &whole, None));
    printer.add(Figure::new("whole start, to the guest's first byte", "ms", &whole));
    let name = format!("steps of the TPM ({})", OF_TPM.join(", "));
    printer.add(Figure::new(name, "ms", &parts.sum(&OF_TPM)).against("TPM commands alone", &tpm, None));
    let name = format!("steps of the provider ({})", OF_PROVIDER.join(", "));
    printer.add(Figure::new(name, "ms", &parts.sum(&OF_PROVIDER)).against("one TLS request alone", &tls, None));
    Ok(())
}

impl Parts {
    /// Adds what one VM process told up to the moment when its guest ran, and says when that was.
    fn add(&mut self, told: &str) -> Option<f64> {
        let mut before = 0.0;
        for step in told.lines().filter_map(|line| serde_json::from_str::<Step>(line).ok()) {
            let part = self.part(&step.step);
            part.since.add(step.ms - before);
            part.took.add(step.took_ms.unwrap_or(step.ms - before));
            if step.step == LAST {
                return Some(step.ms);
            }
            before = step.ms;
        }
        None
    }

    fn part(&mut self, name: &str) -> &mut Part {
        let at = self.0.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            self.0.push((name.to_owned(), Part { since: Samples::default(), took: Samples::default() }));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }

    /// The steps' own lengths together, round by round.
    fn sum(&self, steps: &[&str]) -> Samples {
        let mut lengths = self.0.iter().filter(|(name, _)| steps.contains(&name.as_str())).map(|(_, part)| &part.took);
        let first = lengths.next().cloned().unwrap_or_default();
        lengths.fold(first, |sum, next| sum.with(next, |a, b| a + b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_become_parts_up_to_the_moment_when_the_guest_runs() {
        let mut parts = Parts::default();
        let told = "{\"event\":\"step\",\"step\":\"quote\",\"ms\":5.5,\"took_ms\":2.0}\nnoise\n\
                    {\"event\":\"step\",\"step\":\"open\",\"ms\":7.0,\"took_ms\":1.0,\"detail\":\"x\"}\n\
                    {\"event\":\"step\",\"step\":\"runs\",\"ms\":9.0}\n{\"event\":\"step\",\"step\":\"volume-closed\",\"ms\":20.0}\n";
        assert_eq!(parts.add(told), Some(9.0));
        assert_eq!(parts.add("{\"event\":\"step\",\"step\":\"quote\",\"ms\":1.0}"), None);
        assert_eq!(parts.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["quote", "open", "runs"]);
        assert_eq!(parts.0[1].1.since.median(), 1.5);
        assert_eq!(parts.0[2].1.since.median(), 2.0);
        assert_eq!(parts.sum(&OF_TPM).median(), 3.0);
    }
}
