//! Parsers of this package as functions of bytes, for fuzzing: they must return, whatever comes.

use crate::api::http;

/// The control socket's requests: parsing more bytes than a request has changes nothing about it.
pub fn fuzz_http(data: &[u8]) {
    if let Ok(Some((request, taken))) = http::parse(data) {
        assert!(taken <= data.len() && request.body.len() <= http::BODY_LIMIT);
        assert_eq!(http::parse(&data[..taken]), Ok(Some((request, taken))));
    }
    let _ = http::parse_answer(data);
}

/// Keys of the console: nothing that is not an escape is lost.
pub fn fuzz_keys(data: &[u8]) {
    let mut guest = Vec::new();
    let keys = crate::console::escape::Keys::default().sort(data, &mut guest);
    assert!(guest.len() + keys.len() <= data.len());
}

/// A plain configuration.
pub fn fuzz_plain(data: &[u8]) {
    if let Ok(config) = crate::run::plain::parse(data) {
        assert!((1..=16).contains(&config.cpus.boot_vcpus));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    /// Mutations of `corpus` by a generator with a fixed seed, for about half a second.
    fn run(corpus: &[&[u8]], target: fn(&[u8])) {
        corpus.iter().for_each(|entry| target(entry));
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below.max(1) as u64) as usize
        };
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let mut data = corpus[random(corpus.len())].to_vec();
            for _ in 0..=random(8) {
                let (at, byte) = (random(data.len() + 1), random(256) as u8);
                match random(4) {
                    0 if at < data.len() => data[at] = byte,
                    1 => data.insert(at, byte),
                    2 => data.truncate(at),
                    _ => {
                        let other = corpus[random(corpus.len())];
                        data.extend_from_slice(&other[random(other.len())..]);
                    }
                }
            }
            target(&data);
        }
    }

    #[test]
    fn http_is_total() {
        run(
            &[
                include_bytes!("../fuzz/http/get"),
                include_bytes!("../fuzz/http/put"),
                include_bytes!("../fuzz/http/answer"),
            ],
            super::fuzz_http,
        );
    }

    #[test]
    fn keys_are_total() {
        run(&[b"ls\r\x01x\x01\x01\x01c", b"\x01"], super::fuzz_keys);
    }

    #[test]
    fn plain_configurations_are_total() {
        run(
            &[
                include_bytes!("../fuzz/plain/small.json"),
                include_bytes!("../fuzz/plain/disks.json"),
                include_bytes!("../fuzz/plain/devices.json"),
            ],
            super::fuzz_plain,
        );
    }
}
