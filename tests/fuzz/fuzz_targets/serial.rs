#![no_main]
//! The serial port: its registers, and what the host sends to it and takes from it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use devices::backend::console::Console;
use devices::bus::BusDevice;
use devices::io::IoThread;
use devices::legacy::Line;
use devices::legacy::serial::{FIFO_LEN, Serial};
use devices::limiter::TokenBucket;
use fuzz::bytes::Bytes;
use fuzz::json::spoil;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

const STEPS_MAX: usize = 256;

#[derive(Clone, Default)]
struct Edges(Arc<AtomicU64>);

impl Line for Edges {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn path() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        std::env::temp_dir().join(format!("husk-fuzz-serial-{}", std::process::id()))
    })
}

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let how = input.u8();
    let is_socket = how & 1 != 0;
    let console = match is_socket {
        true => Console::socket(path()).expect("files can be made there"),
        false => Console::none().expect("there are descriptors"),
    };
    let mut client = None;
    let edges = Edges::default();
    let (serial, worker) =
        Serial::new(Box::new(edges.clone()), console).expect("there are descriptors");
    if how & 6 == 6 {
        let bucket = json!({"size": 40, "refill_time": 1});
        let bucket: TokenBucket = serde_json::from_value(bucket).expect("it is one");
        serial.lock().expect("no panic goes on").limit(Some(&bucket));
    }
    let io = IoThread::by_hand().expect("there are descriptors");
    io.add(Box::new(worker), None).expect("there are descriptors");
    let settle = || {
        let turns = (0..1000).take_while(|_| io.turn() > 0).count();
        assert!(turns < 1000, "the worker does not come to rest");
    };
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let how = input.u8();
        let register = u64::from(how >> 4 & 7);
        let width = 1 << (how >> 3 & 1);
        match how & 7 {
            0 | 1 => serial.read(register, &mut [0; 4][..width]),
            2 | 3 => serial.write(register, &[input.u8(), input.u8()][..width]),
            4 => {
                let burst = vec![how; usize::from(input.u8()) * 16];
                serial.write_burst(register & 1, width, &burst);
            }
            5 => settle(),
            6 if is_socket => match (input.below(4), &mut client) {
                (0, client) => {
                    *client = UnixStream::connect(path()).ok();
                    if let Some(stream) = client {
                        stream.set_nonblocking(true).expect("it is a socket");
                    }
                    settle();
                }
                (1, Some(stream)) => {
                    let bytes = input.piece();
                    let _ = stream.write(if bytes.is_empty() { &[0x41; 200] } else { bytes });
                }
                (2, Some(stream)) => drop(stream.read(&mut [0; 300])),
                (_, client) => *client = None,
            },
            6 => serial.lock().expect("no panic goes on").reset(),
            // A restore.
            _ => {
                let mut serial = serial.lock().expect("no panic goes on");
                let mut state = serde_json::to_value(serial.state()).expect("it can be saved");
                spoil(&mut state, &mut input);
                if let Ok(state) = serde_json::from_value(state) {
                    let _ = serial.set_state(state);
                    serial.tell_again();
                }
            }
        }
    }
    settle();
    let state = serde_json::to_value(serial.lock().expect("no panic goes on").state());
    let state = state.expect("it can be saved");
    let waits = state["in_buffer"].as_array().map_or(0, Vec::len);
    assert!(waits <= FIFO_LEN, "{waits} bytes wait for the guest");
    assert_ne!(state["in_buffer"], Value::Null);
});
