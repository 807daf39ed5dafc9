//! [`Cron`]: which minutes of which days, in local time. Neither clock nor time zone is known here.
//!
//! Five fields as in Vixie cron (crontab(5)): minute, hour, day of the month, month, day of the week; lists, ranges, steps
//! and three-letter names. What other programs add to that, or read in different ways, is refused.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest expression that is read, in bytes.
pub const MAX_CRON_BYTES: usize = 128;

/// A cron expression.
///
/// Two are equal when they are written alike, but for the spaces between fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cron {
    /// As written, with one space between fields.
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Neither the days of the month nor those of the week begin with `*`: then one of the two is enough.
    either_day: bool,
}

/// Why a text is not a [`Cron`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseCronError {
    /// Longer than [`MAX_CRON_BYTES`].
    #[error("the cron expression has {0} bytes; at most {MAX_CRON_BYTES} are read")]
    TooLong(usize),
    /// Not five fields.
    #[error(
        "{text:?} has {found} fields; a cron expression has five: minute, hour, day of the month, month, day of the week, for example \"0 2 * * *\""
    )]
    Fields {
        /// What was written.
        text: String,
        /// How many fields that is.
        found: usize,
    },
    /// Not a number, a name or `*`.
    #[error(
        "{field} {item:?} is not understood; write {expected}, lists (a,b), ranges (a-b) or steps (*/n, a-b/n)"
    )]
    Item {
        /// Which field.
        field: &'static str,
        /// What was written.
        item: String,
        /// What is possible there.
        expected: &'static str,
    },
    /// A number that the field does not have.
    #[error("{field} {value} does not exist; it is {low} to {high}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What was written.
        value: u32,
        /// The lowest.
        low: u32,
        /// The highest.
        high: u32,
    },
    /// A range that ends before it begins.
    #[error("{field} {item:?} ends before it begins; write it as two, for example 22-23,0-5")]
    Backwards {
        /// Which field.
        field: &'static str,
        /// What was written.
        item: String,
    },
    /// A step that is 0, or longer than what it goes through.
    #[error("{field} {item:?}: a step here is 1 to {most}")]
    Step {
        /// Which field.
        field: &'static str,
        /// What was written.
        item: String,
        /// The longest.
        most: u32,
    },
    /// No day of any year is meant.
    #[error("{0:?} never comes: none of these months has such a day")]
    Never(String),
}

/// What one of the five may hold.
struct Field {
    name: &'static str,
    range: RangeInclusive<u32>,
    names: &'static [&'static str],
    expected: &'static str,
}

const MINUTE: Field = Field {
    name: "minute",
    range: 0..=59,
    names: &[],
    expected: "* or 0 to 59",
};
const HOUR: Field = Field {
    name: "hour",
    range: 0..=23,
    names: &[],
    expected: "* or 0 to 23",
};
const DAY: Field = Field {
    name: "day of the month",
    range: 1..=31,
    names: &[],
    expected: "* or 1 to 31",
};
const MONTH: Field = Field {
    name: "month",
    range: 1..=12,
    names: &[
        "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
    ],
    expected: "*, 1 to 12 or jan to dec",
};
const WEEKDAY: Field = Field {
    name: "day of the week",
    range: 0..=7,
    names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
    expected: "*, 0 to 7 (0 and 7 are Sunday) or sun to sat",
};

/// Days of each month in a leap year, January first.
const LONGEST_MONTHS: [u32; 12] = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];

impl Cron {
    /// Whether it means the day of that month (from 1), month (from 1) and weekday (0 is Sunday).
    ///
    /// crontab(5): when neither field of days begins with `*`, a day that one of them means is enough.
    #[must_use]
    pub fn matches_day(&self, month: u32, day: u32, weekday: u32) -> bool {
        let of_month = has(self.days, day);
        let of_week = has(self.weekdays, weekday);
        self.matches_month(month)
            && if self.either_day {
                of_month || of_week
            } else {
                of_month && of_week
            }
    }

    /// Whether it means days of that month (from 1).
    #[must_use]
    pub fn matches_month(&self, month: u32) -> bool {
        has(self.months, month)
    }

    /// Whether it means that hour and minute of the days that it means.
    #[must_use]
    pub fn matches_time(&self, hour: u32, minute: u32) -> bool {
        has(self.hours, hour) && has(self.minutes, minute)
    }

    /// The hours and minutes of a day that it means, in order.
    pub fn times(&self) -> impl DoubleEndedIterator<Item = (u8, u8)> + '_ {
        let hours = (0_u8..24).filter(|hour| has(self.hours, (*hour).into()));
        hours.flat_map(|hour| {
            let minutes = (0_u8..60).filter(|minute| has(self.minutes, (*minute).into()));
            minutes.map(move |minute| (hour, minute))
        })
    }

    /// With both fields of days to be met, some month must be long enough for one of the days; every day of every month
    /// is every day of the week in some year.
    fn ever_comes(&self) -> bool {
        self.either_day
            || LONGEST_MONTHS.into_iter().zip(1..).any(|(length, month)| {
                self.matches_month(month) && (1..=length).any(|day| has(self.days, day))
            })
    }
}

const fn has(set: u64, number: u32) -> bool {
    number < 64 && set >> number & 1 == 1
}

impl Field {
    fn read(&self, text: &str) -> Result<u64, ParseCronError> {
        text.split(',')
            .try_fold(0, |set, item| Ok(set | self.item(item)?))
    }

    fn item(&self, item: &str) -> Result<u64, ParseCronError> {
        let (span, step) = match item.split_once('/') {
            Some((span, step)) => (span, Some(step)),
            None => (item, None),
        };
        let (low, high) = match span.split_once('-') {
            _ if span == "*" => (*self.range.start(), *self.range.end()),
            Some((low, high)) => {
                let low = self.value(low, item)?;
                match self.value(high, item)? {
                    // Sunday at the end of a week is the 7.
                    0 if high.eq_ignore_ascii_case("sun") => (low, 7),
                    high => (low, high),
                }
            }
            // crontab(5) knows steps of ranges only; what `5/10` means differs from program to program.
            None if step.is_some() => return Err(self.not_understood(item)),
            None => {
                let value = self.value(span, item)?;
                (value, value)
            }
        };
        if high < low {
            return Err(ParseCronError::Backwards {
                field: self.name,
                item: item.to_owned(),
            });
        }
        let step = match step {
            None => 1,
            Some(step) => {
                let most = (high - low).max(1);
                let step = number(step).ok_or_else(|| self.not_understood(item))?;
                if !(1..=most).contains(&step) {
                    return Err(ParseCronError::Step {
                        field: self.name,
                        item: item.to_owned(),
                        most,
                    });
                }
                step
            }
        };
        let mut set = 0;
        let mut value = low;
        while value <= high {
            // The week ends with the day that it begins with.
            let bit = if self.range == WEEKDAY.range {
                value % 7
            } else {
                value
            };
            set |= 1 << bit;
            value += step;
        }
        Ok(set)
    }

    fn value(&self, text: &str, item: &str) -> Result<u32, ParseCronError> {
        let named = self
            .names
            .iter()
            .zip(if self.range == MONTH.range { 1.. } else { 0.. })
            .find(|(name, _)| text.eq_ignore_ascii_case(name));
        if let Some((_, value)) = named {
            return Ok(value);
        }
        let value = number(text).ok_or_else(|| self.not_understood(item))?;
        if self.range.contains(&value) {
            Ok(value)
        } else {
            Err(ParseCronError::Range {
                field: self.name,
                value,
                low: *self.range.start(),
                high: *self.range.end(),
            })
        }
    }

    fn not_understood(&self, item: &str) -> ParseCronError {
        ParseCronError::Item {
            field: self.name,
            item: item.to_owned(),
            expected: self.expected,
        }
    }
}

/// At most four digits: no field has more, and nothing overflows.
fn number(text: &str) -> Option<u32> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl FromStr for Cron {
    type Err = ParseCronError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_CRON_BYTES {
            return Err(ParseCronError::TooLong(text.len()));
        }
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields[..] else {
            return Err(ParseCronError::Fields {
                text: text.to_owned(),
                found: fields.len(),
            });
        };
        let cron = Self {
            text: fields.join(" "),
            minutes: MINUTE.read(minute)?,
            hours: HOUR.read(hour)?,
            days: DAY.read(day)?,
            months: MONTH.read(month)?,
            weekdays: WEEKDAY.read(weekday)?,
            either_day: !day.starts_with('*') && !weekday.starts_with('*'),
        };
        if cron.ever_comes() {
            Ok(cron)
        } else {
            Err(ParseCronError::Never(cron.text))
        }
    }
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Cron {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Cron {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cron(text: &str) -> Cron {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn times(text: &str) -> Vec<(u8, u8)> {
        cron(text).times().collect()
    }

    #[test]
    fn lists_ranges_steps_and_names() {
        assert_eq!(times("0 2 * * *"), [(2, 0)]);
        assert_eq!(times("5,50-52 0,23 * * *").len(), 8);
        assert_eq!(
            times("*/20 7-9/2 * * *"),
            [(7, 0), (7, 20), (7, 40), (9, 0), (9, 20), (9, 40)]
        );
        assert_eq!(times("* * * * *").len(), 1440);
        let summer = cron("0 0 * JUN-aug *");
        let months: Vec<u32> = (0..20)
            .filter(|month| summer.matches_month(*month))
            .collect();
        assert_eq!(months, [6, 7, 8]);
        for (text, days) in [
            ("0 0 * * mon-fri", vec![1, 2, 3, 4, 5]),
            ("0 0 * * sat-sun", vec![0, 6]),
            ("0 0 * * 5-7", vec![0, 5, 6]),
            ("0 0 * * 7,0,Sun", vec![0]),
            ("0 0 * * sun-tue", vec![0, 1, 2]),
            ("0 0 * * */2", vec![0, 2, 4, 6]),
        ] {
            let cron = cron(text);
            let found: Vec<u32> = (0..7).filter(|day| cron.matches_day(1, 1, *day)).collect();
            assert_eq!(found, days, "{text}");
        }
    }

    #[test]
    fn days_of_month_and_week_are_either_or_unless_one_begins_with_a_star() {
        let either = cron("0 0 13 * fri");
        assert!(either.matches_day(1, 13, 2) && either.matches_day(1, 2, 5));
        assert!(!either.matches_day(1, 2, 2));
        let both = cron("0 0 */2 * fri");
        assert!(both.matches_day(1, 3, 5));
        assert!(!both.matches_day(1, 2, 5) && !both.matches_day(1, 3, 4));
        assert!(cron("0 0 * * fri").matches_day(1, 2, 5));
        assert!(!cron("0 0 13 * *").matches_day(1, 2, 5));
    }

    #[test]
    fn spaces_do_not_matter_and_it_is_written_as_it_is_read() {
        let cron = cron(" 0  2\t* * MON ");
        assert_eq!(cron.to_string(), "0 2 * * MON");
        assert_eq!(serde_json::to_string(&cron).unwrap(), "\"0 2 * * MON\"");
        assert_eq!(
            serde_json::from_str::<Cron>("\"0 2 * * MON\"").unwrap(),
            cron
        );
    }

    #[test]
    fn what_is_not_a_cron_expression_is_refused_with_what_would_be() {
        let long = "1,".repeat(100);
        let wrong = [
            "",
            "* * * *",
            "* * * * * *",
            "@daily",
            "60 * * * *",
            "* 24 * * *",
            "* * 0 * *",
            "* * 32 * *",
            "* * * 0 *",
            "* * * 13 *",
            "* * * * 8",
            "x * * * *",
            "1, * * * *",
            "-1 * * * *",
            "1- * * * *",
            "1-2-3 * * * *",
            "5/10 * * * *",
            "*/0 * * * *",
            "*/60 * * * *",
            "*/x * * * *",
            "*/5/5 * * * *",
            "5-5/2 * * * *",
            "30-10 * * * *",
            "* 22-5 * * *",
            "* * L * *",
            "* * ? * *",
            "* * * january *",
            "* * * * mon#1",
            "* * mon * *",
            "+1 * * * *",
            "٣ * * * *",
            "99999999999999999999 * * * *",
            "0 0 30 2 *",
            "0 0 30-31 feb *",
            "0 0 31 2,4,6,9,11 *",
            "0 0 30 2 */2",
            &long,
        ];
        let text: Vec<String> = wrong
            .iter()
            .map(|text| match text.parse::<Cron>() {
                Ok(cron) => panic!("{text:?} was read as {cron}"),
                Err(error) => error.to_string(),
            })
            .collect();
        insta::assert_snapshot!(text.join("\n"));
        // Seldom is not never.
        for text in [
            "0 0 29 2 *",
            "0 0 29 feb */6",
            "0 0 30 2 mon",
            "0 0 */30 2 *",
        ] {
            cron(text);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics_and_what_is_read_comes_in_its_ranges(text in "[-0-9*/, a-z#?L@]{0,40}") {
            if let Ok(cron) = text.parse::<Cron>() {
                proptest::prop_assert_eq!(cron.to_string().parse::<Cron>().unwrap(), cron.clone());
                proptest::prop_assert!(cron.times().count() > 0);
                proptest::prop_assert!((1..=12).any(|month| cron.matches_month(month)));
            }
        }
    }
}
