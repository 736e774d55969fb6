//! What the ciphers do alone, on buffers that stay in the processor's caches.

use super::MeasureError;
use super::figure::Figure;
use super::sample::Samples;
use super::work::{Work, thread_time};
use blockcrypt::bench::Ciphers;

/// Bytes on which they are measured: they stay in the second-level cache.
const CACHED: usize = 64 << 10;
const BLOCK: usize = 4096;

/// What the chosen ciphers do alone, in GB/s of one core: no volume with them does more.
#[derive(Default)]
pub struct Limit {
    /// Many blocks together: sealed, and opened.
    large: [Samples; 2],
    /// One block by itself.
    small: [Samples; 2],
}

impl Limit {
    /// The rate of `work`, in its unit, if it were the ciphers alone.
    pub fn of(&self, work: &Work) -> Samples {
        let way = usize::from(!work.write);
        // A second of a core gives so many bytes.
        let rate = |gigabytes: f64| work.rate(work.total() as f64 / (gigabytes * 1e9));
        if work.bytes * work.batch > BLOCK { self.large[way].map(rate) } else { self.small[way].map(rate) }
    }
}

/// Every path of the ciphers that runs here, the chosen one first, each compared with the crates that do one thing at a time.
///
/// # Errors
/// No memory for keys.
pub fn ciphers(rounds: u32) -> Result<(Limit, Vec<Figure>), MeasureError> {
    let all = Ciphers::all().map_err(MeasureError::volume("get a key"))?;
    let mut rates: Vec<[Samples; 4]> = vec![Default::default(); all.len()];
    let mut limit = Limit::default();
    let mut data = vec![0x5a; CACHED];
    for _ in 0..rounds {
        for (n, (ciphers, [xts, mac, seal, one])) in all.iter().zip(&mut rates).enumerate() {
            xts.add(rate(CACHED, || ciphers.part(true, &mut data)));
            mac.add(rate(CACHED, || ciphers.part(false, &mut data)));
            seal.add(rate(CACHED, || drop(ciphers.seal(None, &mut data))));
            one.add(rate(BLOCK, || drop(ciphers.seal(None, &mut data[..BLOCK]))));
            if n == 0 {
                let Limit { large, small } = &mut limit;
                both(ciphers, &mut data, large)?;
                both(ciphers, &mut data[..BLOCK], small)?;
            }
        }
    }
    let portable = rates.last().cloned().unwrap_or_default();
    let mut figures = Vec::new();
    for (ciphers, rates) in all.iter().zip(&rates) {
        let parts = ["XTS alone", "HMAC alone", "seal", "seal, 4 KiB alone"];
        for ((part, samples), portable) in parts.iter().zip(rates).zip(&portable) {
            let name = format!("ciphers: {part}, {}", ciphers.name());
            figures.push(Figure::new(name, "GB/s", samples).at_least("with the sha2 crate", portable, None));
        }
    }
    Ok((limit, figures))
}

/// Seals, and opens again.
fn both(ciphers: &Ciphers, data: &mut [u8], [seal, open]: &mut [Samples; 2]) -> Result<(), MeasureError> {
    let mut sealed = Vec::new();
    seal.add(rate(data.len(), || sealed = ciphers.seal(None, data).unwrap_or_default()));
    let (stored, mut good) = (data.to_vec(), true);
    open.add(rate(data.len(), || {
        data.copy_from_slice(&stored);
        good &= ciphers.open(&sealed, data);
    }));
    if good { Ok(()) } else { Err(MeasureError::Unequal("sealed blocks")) }
}

/// GB/s by this thread's processor time.
fn rate(bytes: usize, mut what: impl FnMut()) -> f64 {
    let times = (2 << 20) / bytes;
    let start = thread_time();
    (0..times).for_each(|_| what());
    (times * bytes) as f64 / (thread_time() - start) / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::WORKS;

    #[test]
    fn the_limit_is_in_the_works_unit() {
        let of = |value: f64| -> Samples { [value].into_iter().collect() };
        let limit = Limit { large: [of(2.0), of(4.0)], small: [of(1.024), of(2.048)] };
        for work in &WORKS {
            let expected = match (work.bytes > BLOCK, work.batch > 1, work.write) {
                (true, _, true) => 2.0,
                (true, _, false) => 4.0,
                (false, true, true) => 488.28125,
                (false, true, false) => 976.5625,
                (false, false, true) => 250.0,
                (false, false, false) => 500.0,
            };
            assert!((limit.of(work).median() - expected).abs() < 1e-9, "{}", work.name);
        }
    }

    #[test]
    fn every_path_is_measured_and_opens_what_it_seals() {
        let (limit, figures) = ciphers(1).expect("keys");
        assert!(figures.len() >= 8 && figures.len().is_multiple_of(4), "{}", figures.len());
        assert!(WORKS.iter().all(|work| limit.of(work).median() > 0.0));
    }
}
