//! The entropy device.
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{HIGH, Machine, Ring};
use crate::samples::{open, sample};

const BUFFER: u64 = HIGH.0;

#[test]
fn fills_buffers_to_the_brim_and_no_further() {
    let m = Machine::new(sample("entropy").device);
    let ring = &mut m.start(0)[0];
    for (count, len) in (1..).zip([1u32, 7, 64, 1023, 1024, 1025, 4096]) {
        m.mem.write_slice(&[0; 8192], GuestAddress(BUFFER)).unwrap();
        ring.add(&[(BUFFER, len / 2, true), (BUFFER + u64::from(len / 2), len - len / 2, true)]);
        m.finish(ring, count);
        assert_eq!(ring.used_entry(count - 1).1, len);
        let mut got = vec![0; 8192];
        m.mem.read_slice(&mut got, GuestAddress(BUFFER)).unwrap();
        let (random, rest) = got.split_at(len as usize);
        assert_eq!(rest, vec![0; rest.len()]);
        assert!(len < 64 || random.iter().filter(|b| **b == 0).count() < random.len() / 8);
    }
    assert_eq!(m.counter("entropy_bytes"), 1 + 7 + 64 + 1023 + 1024 + 1025 + 4096);
}

#[test]
fn gives_two_readers_different_numbers() {
    let m = Machine::new(sample("entropy").device);
    let ring = &mut m.start(0)[0];
    ring.add(&[(BUFFER, 32, true)]);
    ring.add(&[(BUFFER + 32, 32, true)]);
    m.finish(ring, 2);
    let read = |at| m.mem.read_obj::<[u64; 4]>(GuestAddress(at)).unwrap();
    assert_ne!(read(BUFFER), read(BUFFER + 32));
}

#[test]
fn a_huge_request_is_served_in_part() {
    let m = Machine::new(sample("entropy").device);
    let ring = &mut m.start(0)[0];
    ring.add(&[(BUFFER, 0x8_0000, true)]);
    m.finish(ring, 1);
    assert_eq!(ring.used_entry(0).1, 64 << 10);
}

/// It has its thread in common with the network.
#[test]
fn bytes_per_turn_are_bounded_and_nothing_is_lost() {
    let m = Machine::new(sample("entropy").device);
    m.negotiate(0);
    let rings = &mut [Ring::new(&m.mem, 0, 64)];
    m.place(rings);
    m.set(0x70, 15);
    let [ring] = rings;
    for _ in 0..64 {
        ring.add(&[(BUFFER, 64 << 10, true)]);
    }
    m.finish(ring, 64);
    assert_eq!(m.counter("entropy_bytes"), 4 << 20);
    let turns = m.counter("entropy_event_count");
    assert!(turns >= 4, "{turns} turns");
}

#[test]
fn nothing_to_write_to_is_counted() {
    let m = Machine::new(sample("entropy").device);
    let ring = &mut m.start(0)[0];
    ring.add(&[(BUFFER, 64, false)]);
    m.finish(ring, 1);
    assert_eq!((ring.used_entry(0).1, m.counter("entropy_event_fails")), (0, 1));
}

#[test]
fn refuses_unknown_fields() {
    open("entropy", &serde_json::json!({"rate_limiter": null}));
    let row = devices::virtio::model("entropy").unwrap();
    assert!((row.parse)(br#"{"source": "/dev/random"}"#).is_err());
    let shown = (row.parse)(b"{}").unwrap().to_json();
    assert_eq!(shown, serde_json::json!({"rate_limiter": null}));
}

#[test]
fn has_no_run_time_settings() {
    let m = Machine::new(sample("entropy").device);
    let e = m.transport.lock().unwrap().update(None, &serde_json::json!({})).unwrap_err();
    assert!(e.is_config(), "{e}");
}
