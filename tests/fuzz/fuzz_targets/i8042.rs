#![no_main]
//! The ports of a PC besides the serial one: keyboard controller, clock, ACPI registers, generation id.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use devices::bus::Bus;
use devices::legacy::acpi::Acpi;
use devices::legacy::generation::{self, Generation};
use devices::legacy::i8042::{self, I8042};
use devices::legacy::rtc::Rtc;
use devices::legacy::{Line, Power};
use fuzz::bytes::Bytes;
use fuzz::json::spoil;
use libfuzzer_sys::fuzz_target;

const STEPS_MAX: usize = 512;
/// Where they are, close to each other: an access may be between two.
const I8042: u64 = 0;
const RTC: u64 = 8;
const ACPI: u64 = 10;
const GENERATION: u64 = 16;
/// More bytes than the keyboard may have for the guest.
const QUEUE_MAX: usize = 16;

#[derive(Clone, Default)]
struct Host(Arc<[AtomicU32; 3]>);

impl Line for Host {
    fn raise(&self) {
        self.0[0].fetch_add(1, Ordering::Relaxed);
    }
}

impl Power for Host {
    fn off(&self) {
        self.0[1].fetch_add(1, Ordering::Relaxed);
    }
    fn reset(&self) {
        self.0[2].fetch_add(1, Ordering::Relaxed);
    }
}

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let host = Host::default();
    let power = Arc::new(host.clone());
    let counters = Arc::<i8042::Counters>::default();
    let keyboard = I8042::new(Box::new(host.clone()), power.clone(), counters);
    let keyboard = Arc::new(Mutex::new(keyboard));
    let time = input.u64().cast_signed();
    let clock = Arc::new(Mutex::new(Rtc::new(move || time)));
    let acpi = Arc::new(Mutex::new(Acpi::new(Box::new(host.clone()), power)));
    let id = Arc::new(Mutex::new(Generation::new([7; 16], false)));
    let mut bus = Bus::default();
    bus.insert(I8042, 5, keyboard.clone()).expect("it is apart");
    bus.insert(RTC, 2, clock.clone()).expect("it is apart");
    bus.insert(ACPI, 4, acpi.clone()).expect("it is apart");
    bus.insert(GENERATION, generation::LEN, id).expect("it is apart");
    let mut accesses = 0;
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let how = input.u8();
        let port = u64::from(how >> 3);
        let width = 1 << (how & 1);
        match how & 7 {
            0 | 1 => {
                let mut data = [0xaa; 4];
                let is_there = bus.read(port, &mut data[..2 * width]);
                assert!(is_there || data[..2 * width].iter().all(|byte| *byte == 0xff));
            }
            2..5 => drop(bus.write(port, &[input.u8(), input.u8()][..width])),
            5 if port < 8 => {
                let burst = input.u8();
                let burst = input.take(burst.into());
                if let Some((device, offset)) = bus.resolve(port, width) {
                    device.write_burst(offset, width, burst);
                }
                accesses += burst.len();
            }
            5 => drop(keyboard.lock().expect("no panic goes on").ctrl_alt_del()),
            6 if port < 16 => acpi.lock().expect("no panic goes on").press_power_button(),
            6 => acpi.lock().expect("no panic goes on").announce_generation(),
            // A restore.
            _ => {
                let mut keyboard = keyboard.lock().expect("no panic goes on");
                let mut state = serde_json::to_value(keyboard.state()).expect("it can be saved");
                spoil(&mut state, &mut input);
                if let Ok(state) = serde_json::from_value(state) {
                    keyboard.set_state(state);
                }
                let mut clock = clock.lock().expect("no panic goes on");
                let mut state = serde_json::to_value(clock.state()).expect("it can be saved");
                spoil(&mut state, &mut input);
                if let Ok(state) = serde_json::from_value(state) {
                    clock.set_state(state);
                }
                let mut acpi = acpi.lock().expect("no panic goes on");
                let mut state = serde_json::to_value(acpi.state()).expect("it can be saved");
                spoil(&mut state, &mut input);
                if let Ok(state) = serde_json::from_value(state) {
                    acpi.set_state(state);
                }
            }
        }
        accesses += 4;
    }
    let state = keyboard.lock().expect("no panic goes on").state();
    let state = serde_json::to_value(state).expect("it can be saved");
    let queued = state["queue"].as_array().map_or(0, Vec::len);
    assert!(queued <= QUEUE_MAX, "{queued} bytes wait for the guest");
    // Of one access come a few interrupts at most.
    let [raised, off, reset] = [0, 1, 2].map(|n| host.0[n].load(Ordering::Relaxed) as usize);
    assert!(raised <= 4 * accesses && off + reset <= accesses, "{raised}, {off}, {reset}");
});
