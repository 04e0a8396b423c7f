//! The MC146818 real-time clock and CMOS memory of a PC, ports 0x70 (index) and 0x71 (data).
//!
//! Always shows the time of the host, in UTC. Setting the time is ignored; alarms are remembered
//! and never ring; there is no interrupt. All other CMOS bytes read as 0, so that nothing (floppies,
//! memory sizes) is reported by accident.
use serde::{Deserialize, Serialize};

use super::{read_bytes, write_bytes};
use crate::bus::BusDeviceMut;

/// Ports from 0x70 on.
pub const LEN: u64 = 2;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Bit 7 of the index masks NMI on a PC; there is none to mask.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// A 32.768 kHz crystal, 1.024 kHz periodic rate: what a BIOS leaves there.
const A_DEFAULT: u8 = 0x26;
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const D_VALID: u8 = 1 << 7;
const HOURS_PM: u8 = 1 << 7;

/// All there is to save: the time is the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    index: u8,
    status_a: u8,
    status_b: u8,
    alarm: [u8; 3],
}

impl Default for RtcState {
    fn default() -> Self {
        Self { index: 0, status_a: A_DEFAULT, status_b: B_24_HOURS, alarm: [0; 3] }
    }
}

/// The clock.
pub struct Rtc {
    now: Box<dyn Fn() -> i64 + Send>,
    /// The moment being read: the fields of one reading belong together, though they are read one
    /// at a time.
    latched: i64,
    state: RtcState,
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtc").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new(|| rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec)
    }
}

impl Rtc {
    /// A clock that shows `now`, in seconds since 1970 in UTC.
    pub fn new(now: impl Fn() -> i64 + Send + 'static) -> Self {
        Self { now: Box::new(now), latched: 0, state: RtcState::default() }
    }

    /// The state to be saved.
    pub fn state(&self) -> RtcState {
        self.state.clone()
    }

    /// Goes on as saved.
    pub fn set_state(&mut self, state: RtcState) {
        self.state = RtcState {
            index: state.index & INDEX_MASK,
            status_a: state.status_a & !A_UPDATE_IN_PROGRESS,
            ..state
        };
    }

    fn read_cmos(&mut self) -> u8 {
        match self.state.index {
            SECONDS_ALARM => self.state.alarm[0],
            MINUTES_ALARM => self.state.alarm[1],
            HOURS_ALARM => self.state.alarm[2],
            STATUS_A => self.state.status_a,
            STATUS_B => self.state.status_b,
            // No interrupt is ever pending, so reading has none to clear.
            STATUS_C => 0,
            STATUS_D => D_VALID,
            SECONDS..=YEAR | CENTURY => self.read_time(),
            _ => 0,
        }
    }

    fn read_time(&mut self) -> u8 {
        let now = (self.now)();
        // Drivers read the seconds first. What follows within a second goes with them, so that
        // 12:59:59 does not become 12:00:59 between two reads.
        if self.state.index == SECONDS || now.abs_diff(self.latched) > 1 {
            self.latched = now;
        }
        let date = Date::from_unix(self.latched);
        let value = match self.state.index {
            SECONDS => date.second,
            MINUTES => date.minute,
            HOURS => return self.encode_hours(date.hour),
            DAY_OF_WEEK => date.day_of_week,
            DAY_OF_MONTH => date.day,
            MONTH => date.month,
            YEAR => date.year_of_century,
            _ => date.century,
        };
        self.encode(value)
    }

    fn encode_hours(&self, hour: u8) -> u8 {
        if self.state.status_b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOURS_PM } else { 0 };
        let hour = match hour % 12 {
            0 => 12,
            hour => hour,
        };
        self.encode(hour) | pm
    }

    fn encode(&self, value: u8) -> u8 {
        if self.state.status_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn write_cmos(&mut self, value: u8) {
        match self.state.index {
            SECONDS_ALARM => self.state.alarm[0] = value,
            MINUTES_ALARM => self.state.alarm[1] = value,
            HOURS_ALARM => self.state.alarm[2] = value,
            STATUS_A => self.state.status_a = value & !A_UPDATE_IN_PROGRESS,
            STATUS_B => self.state.status_b = value,
            _ => {}
        }
    }
}

impl BusDeviceMut for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| match register {
            DATA => self.read_cmos(),
            // The index is write-only on a PC.
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| match register {
            INDEX => self.state.index = value & INDEX_MASK,
            DATA => self.write_cmos(value),
            _ => {}
        });
    }
}

/// A moment of UTC as the clock shows it. Sunday is 1.
#[derive(Debug, PartialEq, Eq)]
pub struct Date {
    century: u8,
    year_of_century: u8,
    month: u8,
    day: u8,
    day_of_week: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// As ISO 8601 has it, without a time zone.
impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { century, year_of_century, month, day, hour, minute, second, .. } = self;
        write!(f, "{century:02}{year_of_century:02}-{month:02}-{day:02}")?;
        write!(f, "T{hour:02}:{minute:02}:{second:02}")
    }
}

impl Date {
    /// The date of a Unix time, of the years 1970 to 9999.
    ///
    /// Gregorian date from days, by the method of H. Hinnant, "chrono-compatible low-level date
    /// algorithms": years begin in March, so that the leap day is the last of its year.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "seconds are clamped to the years 1970 to 9999, far from any limit of i64"
    )]
    pub fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, 253_402_300_799);
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        let from_march_0000 = days + 719_468;
        let (era, of_era) = (from_march_0000 / 146_097, from_march_0000 % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        // Every field is below 100 by construction.
        let field = |value: i64| u8::try_from(value).unwrap_or(0);
        Self {
            century: field(year / 100),
            year_of_century: field(year % 100),
            month: field(month),
            day: field(day),
            day_of_week: field((days + 4) % 7 + 1),
            hour: field(of_day / 3_600),
            minute: field(of_day / 60 % 60),
            second: field(of_day % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    /// 2024-02-29 23:58:59, a Thursday.
    const LEAP_DAY: i64 = 1_709_251_139;

    fn rtc(now: i64) -> (Rtc, Arc<AtomicI64>) {
        let clock = Arc::new(AtomicI64::new(now));
        let shown = clock.clone();
        (Rtc::new(move || shown.load(Ordering::Relaxed)), clock)
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(INDEX, &[index]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        data[0]
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(INDEX, &[index]);
        rtc.write(DATA, &[value]);
    }

    fn fields(rtc: &mut Rtc) -> [u8; 8] {
        [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY]
            .map(|index| get(rtc, index))
    }

    #[test]
    fn shows_the_time_in_bcd_and_in_binary() {
        let (mut rtc, _) = rtc(LEAP_DAY);
        assert_eq!(fields(&mut rtc), [0x59, 0x58, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        set(&mut rtc, STATUS_B, B_24_HOURS | B_BINARY);
        assert_eq!(fields(&mut rtc), [59, 58, 23, 5, 29, 2, 24, 20]);
    }

    #[test]
    fn shows_twelve_hours() {
        for (hour, bcd, binary) in
            [(0, 0x12, 12), (1, 1, 1), (11, 0x11, 11), (12, 0x92, 0x8c), (23, 0x91, 0x8b)]
        {
            let (mut rtc, _) = rtc(hour * 3600);
            set(&mut rtc, STATUS_B, 0);
            assert_eq!(get(&mut rtc, HOURS), bcd, "{hour}");
            set(&mut rtc, STATUS_B, B_BINARY);
            assert_eq!(get(&mut rtc, HOURS), binary, "{hour}");
        }
    }

    #[test]
    fn one_reading_belongs_together() {
        let (mut rtc, clock) = rtc(LEAP_DAY + 60);
        assert_eq!(get(&mut rtc, SECONDS), 0x59);
        clock.fetch_add(1, Ordering::Relaxed);
        assert_eq!(get(&mut rtc, MINUTES), 0x59);
        assert_eq!(get(&mut rtc, HOURS), 0x23);
        assert_eq!(get(&mut rtc, DAY_OF_MONTH), 0x29);
        assert_eq!(get(&mut rtc, SECONDS), 0);
        assert_eq!(get(&mut rtc, MONTH), 3);
        clock.fetch_add(61, Ordering::Relaxed);
        assert_eq!(get(&mut rtc, MINUTES), 1, "a reading two seconds old has passed");
    }

    #[test]
    fn status_registers_say_valid_and_idle() {
        let (mut rtc, _) = rtc(0);
        assert_eq!(get(&mut rtc, STATUS_A), A_DEFAULT);
        assert_eq!(get(&mut rtc, STATUS_B), B_24_HOURS);
        assert_eq!(get(&mut rtc, STATUS_C), 0);
        assert_eq!(get(&mut rtc, STATUS_D), 0x80);
        set(&mut rtc, STATUS_A, 0xff);
        assert_eq!(get(&mut rtc, STATUS_A), 0x7f);
    }

    #[test]
    fn every_register_takes_every_value() {
        let (mut rtc, _) = rtc(LEAP_DAY);
        for index in 0..=255 {
            for value in 0..=255 {
                set(&mut rtc, index, value);
                let read = get(&mut rtc, index);
                match index & 0x7f {
                    SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM | STATUS_B => {
                        assert_eq!(read, value);
                    }
                    STATUS_A => assert_eq!(read, value & 0x7f),
                    STATUS_C => assert_eq!(read, 0),
                    STATUS_D => assert_eq!(read, 0x80),
                    SECONDS..=YEAR | CENTURY => {}
                    _ => assert_eq!(read, 0),
                }
            }
            set(&mut rtc, STATUS_B, B_24_HOURS);
        }
        assert_eq!(fields(&mut rtc), [0x59, 0x58, 0x23, 5, 0x29, 2, 0x24, 0x20]);
    }

    #[test]
    fn a_wide_write_sets_the_index_and_the_byte_there() {
        let (mut rtc, _) = rtc(0);
        rtc.write(INDEX, &[SECONDS_ALARM | 0x80, 7]);
        let mut data = [0; 2];
        rtc.read(INDEX, &mut data);
        assert_eq!(data, [0xff, 7]);
    }

    #[test]
    fn dates_agree_with_counting_days() {
        let leap =
            |y: u32| (y.is_multiple_of(4) && !y.is_multiple_of(100)) || y.is_multiple_of(400);
        let mut seconds = 43_200;
        let mut day_of_week = 5;
        for year in 1970..=2420u32 {
            for (month, days) in (1..).zip([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]) {
                for day in 1..=days + u8::from(month == 2 && leap(year)) {
                    let expected = Date {
                        century: (year / 100).try_into().unwrap(),
                        year_of_century: (year % 100).try_into().unwrap(),
                        month,
                        day,
                        day_of_week,
                        hour: 12,
                        minute: 0,
                        second: 0,
                    };
                    assert_eq!(Date::from_unix(seconds), expected);
                    seconds += 86_400;
                    day_of_week = day_of_week % 7 + 1;
                }
            }
        }
    }

    #[test]
    fn a_host_clock_out_of_range_shows_the_nearest_date() {
        assert_eq!(Date::from_unix(i64::MIN), Date::from_unix(0));
        let last = Date::from_unix(i64::MAX);
        assert_eq!((last.century, last.year_of_century, last.month, last.day), (99, 99, 12, 31));
    }

    #[test]
    fn the_default_clock_is_the_hosts() {
        let mut rtc = Rtc::default();
        assert!(get(&mut rtc, CENTURY) >= 0x20);
    }

    #[test]
    fn goes_on_as_saved() {
        let (mut saved, _) = rtc(LEAP_DAY);
        set(&mut saved, STATUS_B, B_BINARY);
        set(&mut saved, HOURS_ALARM, 9);
        let json = serde_json::to_string(&saved.state()).unwrap();
        let (mut restored, _) = rtc(LEAP_DAY);
        restored.set_state(serde_json::from_str(&json).unwrap());
        assert_eq!(restored.state(), saved.state());
        assert_eq!(get(&mut restored, HOURS), 0x8b);
    }
}
