//! `check`: reads and verifies all of a volume.

use super::blocks::BLOCK;
use super::cli::Check;
use super::error::ToolError;
use super::progress::{Progress, rate};
use super::report::Reporter;
use super::size::Bytes;
use super::{Context, open_file, open_volume};
use blockcrypt::{CheckReport, CheckStep};
use policy::VolumeId;
use serde::Serialize;
use std::borrow::Cow;

/// A line of the findings.
#[derive(Serialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Finding {
    /// Blocks of the guest's that can't be read.
    Bad {
        first: u64,
        last: u64,
        /// Where the first one lies in the store, in blocks.
        physical: Option<u64>,
        reason: Cow<'static, str>,
    },
    /// Something else.
    Problem(String),
}

#[derive(Serialize)]
struct Checked {
    volume: VolumeId,
    size: u64,
    good: bool,
    #[serde(flatten)]
    report: CheckReport,
    seconds: f64,
}

pub(super) fn check(context: &Context, words: &Check) -> Result<(), ToolError> {
    let file = open_file(&words.volume)?;
    let handover = context.handover("check")?;
    let volume = open_volume(&words.volume, file, &handover)?;
    let mut progress = Progress::of("check", volume.size(), context.report.json);
    let mut findings = Findings::new(context.report);
    let mut step = |step| match step {
        CheckStep::Progress { done, .. } => progress.at(done * BLOCK as u64),
        CheckStep::Bad { lba, physical, reason } => findings.add(Finding::bad(lba, physical, reason)),
        CheckStep::Problem(text) => findings.tell(Finding::Problem(text)),
    };
    let report = context.while_there(&handover.holder, || volume.check(&mut step))?;
    findings.end()?;
    let report = report.map_err(|e| ToolError::Volume(words.volume.clone(), e))?;
    let (seconds, size, id) = (progress.seconds(), volume.size(), volume.id());
    drop((volume, progress));
    let text = summary(&report, seconds);
    let (good, bad, problems) = (report.good(), report.bad_blocks, report.problems);
    context.report.result(&Checked { volume: id, size, good, report, seconds }, &text)?;
    handover.holder.finish()?;
    if good { Ok(()) } else { Err(ToolError::Bad { path: words.volume.clone(), bad, problems }) }
}

fn summary(report: &CheckReport, seconds: f64) -> String {
    let bytes = report.data_blocks * BLOCK as u64;
    let read = format!(
        "{} of data in {} blocks and {} pages verified in {seconds:.1} s, {}",
        Bytes(bytes),
        report.data_blocks,
        report.pages,
        rate(bytes, seconds)
    );
    let leaked = match report.leaked_blocks {
        0 => String::new(),
        n => format!("; {n} blocks are set aside for nothing, which is harmless"),
    };
    match (report.bad_blocks, report.problems) {
        (0, 0) => format!("good: {read}{leaked}"),
        (bad, problems) => format!("bad: {bad} blocks can't be read, {problems} other problems; {read}{leaked}"),
    }
}

/// Writes findings as they come, neighbouring bad blocks as one.
pub(super) struct Findings {
    report: Reporter,
    /// To standard error, for standard output is data, or says something else.
    aside: bool,
    pending: Option<Finding>,
    failed: Option<ToolError>,
}

impl Findings {
    fn new(report: Reporter) -> Self {
        Self { report, aside: false, pending: None, failed: None }
    }

    /// Findings of a command whose result is another.
    pub(super) fn aside(report: Reporter) -> Self {
        Self { aside: true, ..Self::new(report) }
    }

    pub(super) fn add(&mut self, finding: Finding) {
        if let (Some(Finding::Bad { last, reason: before, .. }), Finding::Bad { first: next, last: end, reason, .. }) =
            (&mut self.pending, &finding)
            && *last + 1 == *next
            && before == reason
        {
            *last = *end;
            return;
        }
        self.flush();
        self.pending = Some(finding);
    }

    fn tell(&mut self, finding: Finding) {
        self.flush();
        self.pending = Some(finding);
        self.flush();
    }

    fn flush(&mut self) {
        let Some(finding) = self.pending.take() else { return };
        if self.aside {
            return self.report.aside(&finding, &finding.text());
        }
        if let Err(error) = self.report.result(&finding, &finding.text()) {
            self.failed.get_or_insert(error);
        }
    }

    pub(super) fn end(mut self) -> Result<(), ToolError> {
        self.flush();
        self.failed.map_or(Ok(()), Err)
    }
}

impl Finding {
    /// One block.
    pub(super) fn bad(lba: u64, physical: Option<u64>, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Bad { first: lba, last: lba, physical, reason: reason.into() }
    }

    fn text(&self) -> String {
        match self {
            Self::Bad { first, last, physical, reason } => {
                let blocks = if first == last { format!("block {first}") } else { format!("blocks {first} to {last}") };
                let place = physical.map(|at| format!(" (from block {at} of the store)")).unwrap_or_default();
                format!("{blocks}{place}: {reason}")
            }
            Self::Problem(text) => super::report::one_line(text, 1000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_reason_are_one_finding() {
        let mut findings = Findings::new(Reporter::new(true));
        findings.add(Finding::bad(3, Some(90), "a"));
        findings.add(Finding::bad(4, Some(80), "a"));
        let expected = Finding::Bad { first: 3, last: 4, physical: Some(90), reason: "a".into() };
        assert_eq!(findings.pending, Some(expected));
        findings.add(Finding::bad(5, None, "b"));
        assert_eq!(findings.pending, Some(Finding::bad(5, None, "b")));
        findings.add(Finding::bad(7, None, "b"));
        let last = findings.pending.take().expect("pending");
        assert_eq!(last.text(), "block 7: b");
    }
}
