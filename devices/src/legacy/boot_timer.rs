//! Firecracker's boot timer: a page that nothing describes. A guest that writes 123 to its first
//! byte says that it has booted, and the log says how long that took.
//!
//! Knows neither where it lies nor what is being timed: it counts from when it was made, or made
//! to count anew.
use std::fmt;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::bus::BusDeviceMut;

/// Bytes of the window.
pub const LEN: u64 = 0x1000;
/// What says that the guest has booted.
const BOOTED: u8 = 123;

/// The timer.
#[derive(Debug)]
pub struct BootTimer {
    started: Instant,
    /// Processor time of this process until then.
    cpu_before: Duration,
}

/// What a guest needed to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BootTime {
    wall: Duration,
    cpu: Duration,
}

impl BootTimer {
    /// Starts it.
    pub fn start() -> Self {
        Self { started: Instant::now(), cpu_before: cpu_time() }
    }

    fn elapsed(&self) -> BootTime {
        BootTime { wall: self.started.elapsed(), cpu: cpu_time().saturating_sub(self.cpu_before) }
    }
}

impl BusDeviceMut for BootTimer {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if says_booted(offset, data) {
            log::info!("{}", self.elapsed());
        }
    }
}

fn says_booted(offset: u64, data: &[u8]) -> bool {
    offset == 0 && data == [BOOTED]
}

/// Of this process, all its threads.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

/// In Firecracker's words, which tools read.
impl fmt::Display for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wall, cpu } = self;
        write!(
            f,
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            wall.as_micros(),
            wall.as_millis(),
            cpu.as_micros(),
            cpu.as_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_in_its_place_says_so() {
        assert!(says_booted(0, &[123]));
        for (offset, data) in
            [(0, &[122][..]), (1, &[123]), (0, &[123, 0]), (0, &[123; 4]), (0, &[])]
        {
            assert!(!says_booted(offset, data), "{data:?} at {offset}");
        }
    }

    #[test]
    fn times_are_told_in_firecrackers_words() {
        let time =
            BootTime { wall: Duration::from_nanos(72_345_678), cpu: Duration::from_micros(999) };
        assert_eq!(time.to_string(), "Guest-boot-time =  72345 us 72 ms,    999 CPU us 0 CPU ms");
    }

    #[test]
    fn processor_time_is_counted() {
        let timer = BootTimer::start();
        while timer.elapsed().cpu < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        assert!(timer.elapsed().wall >= Duration::from_micros(100));
        let mut data = [7; 4];
        BootTimer::start().read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
