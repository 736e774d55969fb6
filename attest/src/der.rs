//! The little of X.509 (RFC 5280) that rustls-webpki does not tell: how long a certificate is valid.

use rustls_pki_types::UnixTime;

/// Seconds since 1970 between which a certificate is valid (RFC 5280, 4.1.2.5), both included; `None` where `certificate` is no
/// certificate.
pub(crate) fn validity(certificate: &[u8]) -> Option<(u64, u64)> {
    let mut outer = element(&mut &certificate[..], 0x30)?;
    let mut tbs = element(&mut outer, 0x30)?;
    if tbs.first() == Some(&0xa0) {
        element(&mut tbs, 0xa0)?;
    }
    element(&mut tbs, 0x02)?; // serial number
    element(&mut tbs, 0x30)?; // signature algorithm
    element(&mut tbs, 0x30)?; // issuer
    let mut validity = element(&mut tbs, 0x30)?;
    Some((time(&mut validity)?, time(&mut validity)?))
}

/// Whether `certificate` is valid at `now`. A trust anchor's dates are checked by nobody else.
pub(crate) fn is_valid_at(certificate: &[u8], now: UnixTime) -> bool {
    validity(certificate).is_some_and(|(from, to)| (from..=to).contains(&now.as_secs()))
}

fn element<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (first, rest) = input.split_first()?;
    if *first != tag {
        return None;
    }
    let (length, rest) = length(rest)?;
    let (content, rest) = rest.split_at_checked(length)?;
    *input = rest;
    Some(content)
}

fn length(input: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = input.split_first()?;
    match first {
        0..=0x7f => Some((usize::from(*first), rest)),
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
            Some((bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)), rest))
        }
        _ => None,
    }
}

/// UTCTime "YYMMDDhhmmssZ" or GeneralizedTime "YYYYMMDDhhmmssZ" (RFC 5280, 4.1.2.5.1 and 2).
fn time(input: &mut &[u8]) -> Option<u64> {
    let (text, century) = match input.first()? {
        0x17 => (element(input, 0x17)?, None),
        0x18 => (element(input, 0x18)?, Some(())),
        _ => return None,
    };
    let digits = text.strip_suffix(b"Z")?;
    let pair = |at: usize| -> Option<u64> {
        let pair = digits.get(at..at + 2)?;
        pair.iter().all(u8::is_ascii_digit).then(|| u64::from(pair[0] - b'0') * 10 + u64::from(pair[1] - b'0'))
    };
    let (year, at) = match century {
        Some(()) => (pair(0)? * 100 + pair(2)?, 4),
        None => (pair(0).map(|y| if y >= 50 { 1900 + y } else { 2000 + y })?, 2),
    };
    let fields: Vec<u64> = (0..5).map(|n| pair(at + 2 * n)).collect::<Option<_>>()?;
    let [month, day, hour, minute, second] = fields[..] else { return None };
    let fits = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 60;
    if digits.len() != at + 10 || !fits {
        return None;
    }
    let days = days_before(year, month)? + day - 1;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

/// Days from 1970-01-01 to the first of this month.
fn days_before(year: u64, month: u64) -> Option<u64> {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    if year < 1970 {
        return None;
    }
    let years: u64 = (1970..year).map(|y| if leap(y) { 366 } else { 365 }).sum();
    let months = [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    Some(years + months.iter().take(month as usize - 1).sum::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    #[test]
    fn dates_are_read_as_they_were_written() {
        let key = KeyPair::generate().expect("key");
        for (year, month, day) in
            [(1999, 12, 31), (2000, 2, 29), (2026, 3, 1), (2049, 12, 31), (2050, 1, 1), (9999, 12, 31)]
        {
            let mut params = CertificateParams::new(vec![]).expect("params");
            params.not_before = date_time_ymd(1970, 1, 1);
            params.not_after = date_time_ymd(year, month, day);
            let certificate = params.self_signed(&key).expect("signed");
            let expected = params.not_after.unix_timestamp() as u64;
            assert_eq!(validity(certificate.der()), Some((0, expected)), "{year}-{month}-{day}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = validity(&bytes);
        }
    }
}
