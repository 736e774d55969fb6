//! Which packet numbers of a queue were seen: a ring of bits (RFC 6479) that slides with the highest.

/// How far behind the highest number a packet may come: 8192 packets, the highest included.
pub const WINDOW: u64 = 8192;

/// One word more than the window needs, so that moving on clears whole words.
const WORDS: usize = WINDOW as usize / 64 + 1;

/// The numbers seen.
#[derive(Clone)]
pub struct ReplayWindow {
    /// One above the highest number accepted.
    next: u64,
    /// Bit n % 64 of word (n / 64) % WORDS: whether n was seen.
    words: [u64; WORDS],
}

/// What the window knows of a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Never accepted.
    No,
    /// Accepted before.
    Yes,
    /// Behind the window: maybe accepted before.
    TooOld,
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }
}

impl ReplayWindow {
    /// What is known of `number` (at most 56 bits); changes nothing.
    pub fn look(&self, number: u64) -> Seen {
        match () {
            () if number >= self.next => Seen::No,
            () if self.next - number > WINDOW => Seen::TooOld,
            () if self.words[word(number)] & bit(number) != 0 => Seen::Yes,
            () => Seen::No,
        }
    }

    /// Accepts `number` if it was not seen; what it was before. Only for numbers of packets that verified.
    pub fn accept(&mut self, number: u64) -> Seen {
        let seen = self.look(number);
        if seen == Seen::No {
            self.advance(number);
            self.words[word(number)] |= bit(number);
        }
        seen
    }

    /// Makes `number` part of the window: clears the words that now stand for higher numbers.
    fn advance(&mut self, number: u64) {
        if number < self.next {
            return;
        }
        let first = self.next.div_ceil(64);
        let last = number / 64;
        for fresh in first..=last.min(first.saturating_add(WORDS as u64)) {
            self.words[(fresh % WORDS as u64) as usize] = 0;
        }
        self.next = number + 1;
    }
}

fn word(number: u64) -> usize {
    (number / 64 % WORDS as u64) as usize
}

fn bit(number: u64) -> u64 {
    1 << (number % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// What the window must do, without its arithmetic.
    #[derive(Default)]
    struct Model {
        seen: HashSet<u64>,
        highest: Option<u64>,
    }

    impl Model {
        fn accept(&mut self, number: u64) -> Seen {
            if self.highest.is_some_and(|h| h >= number && h - number >= WINDOW) {
                return Seen::TooOld;
            }
            self.highest = self.highest.max(Some(number));
            if self.seen.insert(number) { Seen::No } else { Seen::Yes }
        }
    }

    /// Numbers that crowd around a place that wanders, with leaps of all sizes.
    fn numbers() -> impl Strategy<Value = Vec<u64>> {
        let leap = prop_oneof![8 => 0..4_u64, 4 => 0..200_u64, 2 => 8000..8400_u64, 1 => 0..100_000_u64];
        prop::collection::vec((leap, 0..9000_u64, any::<bool>()), 1..400).prop_map(|steps| {
            let mut place = 0;
            let walk = |(leap, back, ahead)| {
                place += leap;
                if ahead { place } else { u64::saturating_sub(place, back) }
            };
            steps.into_iter().map(walk).collect()
        })
    }

    proptest! {
        #[test]
        fn it_does_what_a_set_of_all_numbers_would(numbers in numbers(), start in prop_oneof![Just(0), Just((1_u64 << 56) - 50_000_000)]) {
            let (mut window, mut model) = (ReplayWindow::default(), Model::default());
            for number in numbers {
                let number = start + number;
                let expected = model.accept(number);
                prop_assert_eq!(window.look(number), expected);
                prop_assert_eq!(window.accept(number), expected);
                prop_assert_ne!(window.look(number), Seen::No);
            }
        }
    }

    #[test]
    fn its_edge_is_exact() {
        let mut window = ReplayWindow::default();
        assert_eq!(window.accept(WINDOW), Seen::No);
        assert_eq!(window.accept(0), Seen::TooOld);
        assert_eq!(window.accept(1), Seen::No);
        assert_eq!(window.accept(1), Seen::Yes);
        assert_eq!(window.accept((1 << 56) - 1), Seen::No);
        assert_eq!(window.accept((1 << 56) - 1 - WINDOW), Seen::TooOld);
        assert_eq!(window.accept((1 << 56) - WINDOW), Seen::No);
    }
}
