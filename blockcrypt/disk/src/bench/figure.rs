//! One figure, and how figures are shown: a table for people, or one JSON object each.

use super::sample::Samples;
use serde::Serialize;

/// A figure. As JSON it has the fields that `scripts/bench` names.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    name: String,
    /// Median.
    value: f64,
    unit: &'static str,
    /// First and third quartile.
    spread: [f64; 2],
    /// What it is compared with, in the same run.
    against: Option<String>,
    against_value: Option<f64>,
    /// `value` by `against_value`.
    ratio: Option<f64>,
    /// What the ratio should not exceed; for a figure without `against`, what the value should not exceed by: value by target.
    /// For a rate (a unit by the second) what the ratio should reach.
    target_ratio: Option<f64>,
    /// The target is to be reached, not kept below.
    #[serde(skip)]
    rate: bool,
}

impl Figure {
    /// A figure by itself.
    pub fn new(name: impl Into<String>, unit: &'static str, samples: &Samples) -> Self {
        Self {
            name: name.into(),
            value: rounded(samples.median()),
            unit,
            spread: samples.quartiles().map(rounded),
            against: None,
            against_value: None,
            ratio: None,
            target_ratio: None,
            rate: false,
        }
    }

    /// Compared with `other`; the ratio should be at most `target`, where there is one.
    pub fn against(mut self, name: impl Into<String>, other: &Samples, target: Option<f64>) -> Self {
        let other = rounded(other.median());
        self.against = Some(name.into());
        self.against_value = Some(other);
        self.ratio = Some(rounded(self.value / other));
        self.target_ratio = target;
        self
    }

    /// A rate, compared with `other`; the ratio should be at least `target`, where there is one.
    pub fn at_least(self, name: impl Into<String>, other: &Samples, target: Option<f64>) -> Self {
        Self { rate: true, ..self.against(name, other, target) }
    }

    /// Compared with a fixed limit, which it should not exceed.
    pub fn limit(self, limit: f64) -> Self {
        self.against("limit", &[limit].into_iter().collect(), Some(1.0))
    }

    /// What was measured.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn row(&self) -> [String; 6] {
        let number = |value: Option<f64>| value.map(|v| format!("{v}")).unwrap_or_default();
        let verdict = match (self.ratio, self.target_ratio) {
            (Some(ratio), Some(target)) => {
                let (met, bound) = if self.rate { (ratio >= target, "least") } else { (ratio <= target, "most") };
                format!("at {bound} {target}: {}", if met { "met" } else { "MISSED" })
            }
            _ => String::new(),
        };
        let against = self.against.as_ref().map(|name| format!("{name} {}", number(self.against_value)));
        [
            self.name.clone(),
            format!("{} {}", self.value, self.unit),
            format!("{} to {}", self.spread[0], self.spread[1]),
            against.unwrap_or_default(),
            number(self.ratio),
            verdict,
        ]
    }
}

/// The figures as a table, with a head. Columns that nothing stands in are left out.
pub fn table<'a>(figures: impl IntoIterator<Item = &'a Figure>) -> String {
    let head = ["what", "median", "quartiles", "against", "ratio", "target"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(figures.into_iter().map(Figure::row)).collect();
    let width = |n: usize| {
        let widest = rows.iter().skip(1).map(|row| row[n].chars().count()).max().unwrap_or(0);
        if widest == 0 { 0 } else { widest.max(rows[0][n].chars().count()) }
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths).filter(|(_, width)| **width > 0);
        let cells: Vec<String> = cells.map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Four significant digits: more would be noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_has_the_fields_that_scripts_read() {
        let (a, b): (Samples, Samples) = ([3.0].into_iter().collect(), [2.0].into_iter().collect());
        let figure = Figure::new("start unattested", "ms", &a).against("bare", &b, Some(1.7));
        let value = serde_json::to_value(&figure).expect("plain data");
        let expected = serde_json::json!({"name": "start unattested", "value": 3.0, "unit": "ms", "spread": [3.0, 3.0],
            "against": "bare", "against_value": 2.0, "ratio": 1.5, "target_ratio": 1.7});
        assert_eq!(value, expected);
        assert!(figure.row()[5].ends_with("met"));
        assert!(Figure::new("memory", "MiB", &a).limit(2.0).row()[5].ends_with("MISSED"));
        let rate = |target| Figure::new("write", "GB/s", &a).at_least("loop", &b, target).row();
        assert_eq!(rate(Some(1.4))[5], "at least 1.4: met");
        assert_eq!(rate(Some(1.6))[5], "at least 1.6: MISSED");
        // Without a target only the ratio stands there.
        assert_eq!(rate(None)[3..], ["loop 2", "1.5", ""].map(str::to_owned));
    }

    #[test]
    fn a_table_has_a_head_and_no_empty_column() {
        let a: Samples = [3.0].into_iter().collect();
        let (plain, bound) = (Figure::new("first", "ms", &a), Figure::new("second one", "ms", &a).limit(2.0));
        let short = table([&plain]);
        assert_eq!(short, "what   median  quartiles\nfirst  3 ms    3 to 3");
        let long = table([&plain, &bound]);
        assert!(
            long.lines().count() == 3 && long.lines().next().is_some_and(|head| head.ends_with("target")),
            "{long}"
        );
    }

    #[test]
    fn four_digits_are_kept() {
        assert_eq!((rounded(123_456.0), rounded(0.012_344_9), rounded(0.0)), (123_500.0, 0.012_34, 0.0));
    }
}
