//! Dates of days, as people and clock chips read them.

/// Year, month and day of a number of days since 1970-01-01, by the Gregorian calendar (Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms").
pub fn date(days: u64) -> (u64, u64, u64) {
    // Eras of 400 years, which begin with a March: then a leap day is the last of its year.
    let z = days.saturating_add(719_468);
    let era = z / 146_097;
    let of_era = z % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_two_eras_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..2 * 146_097 {
            assert_eq!(date(days), (year, month, day));
            let leap = u64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
            let lengths = [31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            day += 1;
            if day > lengths[month as usize - 1] {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
        assert_eq!(year, 2770);
        date(u64::MAX);
    }
}
