//! Repeated measurements of one thing.

/// Values in the order in which they were measured, in one unit.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Middle value; NaN of none.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// First and third quartile.
    pub fn quartiles(&self) -> [f64; 2] {
        [self.quantile(0.25), self.quantile(0.75)]
    }

    /// Each round's value of these with that round's value of `other`.
    pub fn with(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| combine(*a, *b)).collect())
    }

    /// Each value by another one.
    pub fn map(&self, by: impl Fn(f64) -> f64) -> Self {
        Self(self.0.iter().map(|value| by(*value)).collect())
    }

    /// Linear between the two nearest values.
    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = part * sorted.len().saturating_sub(1) as f64;
        let value = |index: f64| sorted.get(index as usize).copied().unwrap_or(f64::NAN);
        let (low, high) = (value(at.floor()), value(at.ceil()));
        low + (high - low) * at.fract()
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_quartiles_lie_between_the_values() {
        let samples: Samples = [4.0, 1.0, 3.0, 2.0].into_iter().collect();
        assert_eq!(samples.median(), 2.5);
        assert_eq!(samples.quartiles(), [1.75, 3.25]);
        let one: Samples = [7.0].into_iter().collect();
        assert_eq!((one.median(), one.quartiles()), (7.0, [7.0, 7.0]));
        assert!(Samples::default().median().is_nan());
    }

    #[test]
    fn rounds_are_combined_one_by_one() {
        let (a, b): (Samples, Samples) = ([10.0, 1.0].into_iter().collect(), [1.0, 10.0].into_iter().collect());
        assert_eq!(a.with(&b, |x, y| x + y).quartiles(), [11.0, 11.0]);
    }
}
