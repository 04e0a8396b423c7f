//! What every device must do, whatever it is: each test runs each row of the device table.
use std::cell::Cell;

use devices::virtio::mmio::Saved;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{
    ACPI, COMMAND_LINE, Desc, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, HIGH, INDIRECT, LOW, Machine,
    NEEDS_RESET, NEXT, Ring, WRITE, forget_written, is_written, pages_of, ram,
};
use crate::samples::{Host, Sample, kinds, sample, served};

/// Data that any device may read and write.
const SCRATCH: u64 = HIGH.0;

/// Runs `test` on each device twice: as a driver has it that takes none of the device's own
/// features, and as one that takes all. Some queues are served for the latter only.
fn every_device(test: impl Fn(&'static str, Machine, Host)) {
    for name in kinds() {
        for takes_all in [false, true] {
            let Sample { device, host } = sample(name);
            let features = device.features();
            let mut machine = Machine::new(device);
            machine.always = if takes_all { features } else { 0 };
            test(name, machine, host);
        }
    }
}

/// The queue of a device that needs nobody on the host to be served.
fn served_queue<'a>(m: &Machine, rings: &'a mut [Ring]) -> &'a mut Ring {
    &mut rings[served(m.get(8), usize::from(m.queues()))]
}

/// A chain that any device completes in some way.
fn add_some_chain(ring: &mut Ring) {
    ring.add(&[(SCRATCH, 64, false), (SCRATCH + 64, 64, true)]);
}

#[test]
fn offers_the_modern_interface_and_works() {
    every_device(|name, m, _host| {
        assert_eq!((m.get(0), m.get(4)), (0x7472_6976, 2), "{name}");
        assert_ne!(m.get(8), 0, "{name}");
        assert_eq!(m.features() & (F_VERSION_1 | F_INDIRECT | F_EVENT_IDX), 0x1_3000_0000);
        for features in [0, F_INDIRECT, F_EVENT_IDX] {
            let mut rings = m.start(features);
            let ring = served_queue(&m, &mut rings);
            for count in 1..=40 {
                add_some_chain(ring);
                m.finish(ring, count);
            }
            assert_eq!(m.status(), 15, "{name}");
        }
    });
}

#[test]
fn all_features_offered_can_be_negotiated() {
    every_device(|name, m, _host| {
        let mut rings = m.start(m.features());
        let ring = served_queue(&m, &mut rings);
        add_some_chain(ring);
        m.finish(ring, 1);
        assert_eq!(m.status(), 15, "{name}");
    });
}

#[test]
fn status_bits_come_in_order_and_stay() {
    every_device(|name, m, _host| {
        for value in 0..=255u32 {
            m.set(0x70, 0);
            m.set(0x70, value);
            // Without features FEATURES_OK is refused, and DRIVER_OK with it.
            let ack = value & 1;
            let driver = if ack != 0 { value & 2 } else { 0 };
            assert_eq!(m.status(), ack | driver | value & 128, "{name}: {value:#x}");
        }
        for value in 0..=255u32 {
            m.negotiate(0);
            m.set(0x70, value);
            let adds = value & 11 == 11;
            let expected = match value {
                0 => 0,
                _ if adds => 11 | value & (4 | 128),
                // Clearing a bit is refused as a whole.
                _ => 11,
            };
            assert_eq!(m.status(), expected, "{name}: {value:#x}");
        }
    });
}

#[test]
fn features_are_fixed_by_features_ok() {
    every_device(|name, m, _host| {
        // Not without VERSION_1.
        m.set(0x70, 0);
        m.set(0x70, 3);
        m.set(0x24, 0);
        m.set(0x20, 0);
        m.set(0x70, 11);
        assert_eq!(m.status(), 3, "{name}");
        // Not with one that is not offered.
        let unoffered = (0..64).find(|bit| m.features() >> bit & 1 == 0).unwrap();
        for (page, value) in [(1, 1), (unoffered / 32, 1u32 << (unoffered % 32))] {
            m.set(0x24, page);
            m.set(0x20, value | u32::from(page == 1));
        }
        m.set(0x70, 11);
        assert_eq!(m.status(), 3, "{name}: bit {unoffered}");
        // Before DRIVER they are ignored, after FEATURES_OK fixed.
        m.negotiate(0);
        for page in [0, 1, 2, u32::MAX] {
            m.set(0x24, page);
            m.set(0x20, u32::MAX);
        }
        m.set(0x70, 15);
        assert_eq!(m.status(), 15, "{name}");
    });
}

#[test]
fn any_access_to_any_register_is_harmless() {
    every_device(|name, m, _host| {
        for is_live in [false, true] {
            for offset in 0..0x200u64 {
                for width in [1usize, 2, 4, 8] {
                    if is_live {
                        m.start(0);
                    }
                    let device = m.device().0;
                    let mut data = vec![0xaa; width];
                    device.read(offset, &mut data);
                    if offset < 0x100 && (width != 4 || offset % 4 != 0) {
                        assert_eq!(data, vec![0; width], "{name}: {offset:#x} width {width}");
                    }
                    let patterns = [[0; 8], [1, 0, 0, 0, 0, 0, 0, 0], [0xff; 8], [0x5a; 8]];
                    for pattern in &patterns[..if is_live { 1 } else { 4 }] {
                        device.write(offset, &pattern[..width]);
                    }
                    if is_live {
                        device.write(offset, &[0x5a; 8][..width]);
                    }
                }
            }
        }
        let mut rings = m.start(0);
        let ring = served_queue(&m, &mut rings);
        add_some_chain(ring);
        m.finish(ring, 1);
    });
}

#[test]
fn configuration_space_ends_where_it_ends() {
    every_device(|name, m, _host| {
        let whole = m.config(0, 256);
        let len = whole.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        for at in [0, 1, len.saturating_sub(1), len, len + 1, 0xe00, 0xeff] {
            for width in [1, 2, 4, 8] {
                let at64 = u64::try_from(at).unwrap();
                let seen = m.config(at64, width);
                let expected: Vec<_> =
                    (at..at + width).map(|i| whole.get(i).copied().unwrap_or(0)).collect();
                assert_eq!(seen, expected, "{name}: {at}+{width}");
                m.device().0.write(0x100 + at64, &[0xff; 8][..width]);
            }
        }
        assert_eq!(m.config(0, 256), whole, "{name}: the driver wrote to it");
    });
}

#[test]
fn registers_have_no_effect_after_driver_ok() {
    every_device(|name, m, _host| {
        let mut rings = m.start(0);
        for value in [0, 1, 3, 0x10, 0x8000, u32::MAX] {
            for queue in 0..m.queues() {
                m.set(0x30, queue.into());
                for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x20, 0x24] {
                    m.set(register, value);
                }
                assert_eq!(m.get(0x44), 1, "{name}");
            }
        }
        let ring = served_queue(&m, &mut rings);
        for count in 1..=20 {
            add_some_chain(ring);
            m.finish(ring, count);
        }
        // Nor does a pause pick them up.
        m.transport.lock().unwrap().pause().unwrap();
        m.transport.lock().unwrap().resume().unwrap();
        add_some_chain(ring);
        m.finish(ring, 21);
        assert_eq!(m.status(), 15, "{name}");
    });
}

#[test]
fn kicks_are_harmless_whenever_and_wherever() {
    every_device(|name, m, _host| {
        let kick_all = |m: &Machine| {
            for queue in [0, 1, 2, 63, 0xffff, 0x1_0000, u32::MAX] {
                m.set(0x50, queue);
            }
        };
        kick_all(&m);
        m.negotiate(0);
        kick_all(&m);
        // Live, but no queue is ready.
        m.set(0x70, 15);
        kick_all(&m);
        let mut rings = m.start(0);
        for _ in 0..10_000 {
            kick_all(&m);
        }
        let ring = served_queue(&m, &mut rings);
        add_some_chain(ring);
        m.finish(ring, 1);
        m.set(0x70, 0);
        kick_all(&m);
        assert_eq!(m.status(), 0, "{name}");
    });
}

#[test]
fn pause_keeps_what_was_queued_and_resume_serves_it() {
    every_device(|name, m, _host| {
        let mut rings = m.start(0);
        let ring = served_queue(&m, &mut rings);
        for round in 0..50 {
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().pause().unwrap();
            add_some_chain(ring);
            m.kick(ring);
            assert_eq!(ring.used_idx(), round, "{name}: served while paused");
            m.transport.lock().unwrap().resume().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
            m.irq.wait("used buffers", || ring.used_idx() == round + 1);
        }
    });
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    for name in kinds() {
        let first = sample(name);
        let m = Machine::new(first.device);
        let mut rings = m.start(F_EVENT_IDX | F_INDIRECT);
        let ring = served_queue(&m, &mut rings);
        for count in 1..=20 {
            ring.set_used_event(count - 1);
            add_some_chain(ring);
            m.finish(ring, count);
        }
        let isr = m.get(0x60);
        m.transport.lock().unwrap().pause().unwrap();
        // One more waits in the ring when the snapshot is taken.
        ring.set_used_event(20);
        add_some_chain(ring);
        let saved = serde_json::to_string(&m.transport.lock().unwrap().save()).unwrap();
        let mem = m.ram.clone();
        drop((m, first.host));

        let saved: Saved = serde_json::from_str(&saved).unwrap();
        let second = sample(name);
        let m = Machine::with(second.device, mem, Some(&saved)).unwrap();
        assert_eq!((m.status(), m.get(0x60)), (15, isr), "{}", name);
        assert_eq!(ring.used_idx(), 20);
        // What was not acknowledged comes when it can get through, and not before.
        assert_eq!(m.irq.counts(), (0, 0), "{name}");
        m.transport.lock().unwrap().tell_again();
        assert_eq!(m.irq.counts(), (0, 1), "{name}");
        m.transport.lock().unwrap().resume().unwrap();
        m.irq.wait("used buffers", || ring.used_idx() == 21);
        ring.set_used_event(21);
        add_some_chain(ring);
        m.finish(ring, 22);
        // And can be saved once more.
        m.transport.lock().unwrap().pause().unwrap();
        let again = serde_json::to_value(m.transport.lock().unwrap().save()).unwrap();
        let position = &again["positions"][usize::from(ring.queue)];
        assert_eq!(position, &serde_json::json!([22, 22]));
    }
}

#[test]
fn a_device_moves_to_a_machine_that_has_a_stand_in() {
    let mut stayed = 0;
    for name in kinds() {
        let Sample { device, host } = sample(name);
        let old = Machine::new(device);
        let mut rings = old.start(F_EVENT_IDX | F_INDIRECT);
        let ring = served_queue(&old, &mut rings);
        add_some_chain(ring);
        old.finish(ring, 1);
        old.transport.lock().unwrap().pause().unwrap();
        let saved = old.transport.lock().unwrap().save();
        old.transport.lock().unwrap().resume().unwrap();
        let Some(stand_in) = old.transport.lock().unwrap().stand_in() else {
            stayed += 1;
            continue;
        };
        let new = Machine::with(Box::new(stand_in), old.ram.clone(), Some(&saved)).unwrap();
        assert_eq!((new.get(8), new.features()), (old.get(8), old.features()), "{name}");
        // Until it is taken, the device is at work where it is.
        assert_eq!(old.status(), 15, "{name}");
        old.transport.lock().unwrap().pause().unwrap();
        new.transport.lock().unwrap().take_over(&mut old.transport.lock().unwrap());
        // A stand-in does no work.
        assert!(old.transport.lock().unwrap().resume().is_err(), "{name}");
        drop(old);
        new.transport.lock().unwrap().resume().unwrap();
        add_some_chain(ring);
        new.finish(ring, 2);
        assert_eq!(new.status(), 15, "{name}");
        drop(host);
    }
    // Those with memory of their own, and the drive whose file others may have open as well.
    let stays = |name: &&str| {
        let mut device = sample(name).device;
        device.own_memory().is_some() || device.can_open_twice()
    };
    assert_eq!(stayed, kinds().filter(stays).count());
}

#[test]
fn every_stage_can_be_saved_and_restored() {
    for name in kinds() {
        type Stage = (&'static str, fn(&Machine));
        let prepare: [Stage; 4] = [
            ("untouched", |_| {}),
            ("negotiated", |m| m.negotiate(0)),
            ("live", |m| drop(m.start(0))),
            ("broken", |m| {
                m.negotiate(0);
                m.set(0x44, 1);
                m.set(0x70, 15);
                assert_eq!(m.status(), 15 | NEEDS_RESET);
            }),
        ];
        for (stage, prepare) in prepare {
            let first = sample(name);
            let m = Machine::new(first.device);
            prepare(&m);
            m.transport.lock().unwrap().pause().unwrap();
            let saved = m.transport.lock().unwrap().save();
            let (status, mem) = (m.status(), m.ram.clone());
            drop((m, first.host));
            let second = sample(name);
            let m = Machine::with(second.device, mem, Some(&saved)).unwrap();
            m.transport.lock().unwrap().resume().unwrap();
            assert_eq!(m.status(), status, "{}: {stage}", name);
            // Whatever it was, a reset makes it as new.
            let mut rings = m.start(0);
            add_some_chain(served_queue(&m, &mut rings));
            m.finish(served_queue(&m, &mut rings), 1);
        }
    }
}

/// All of the memory from 0 to what rings and chains need.
fn contents(m: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(LOW.1).unwrap()];
    m.mem.read_slice(&mut bytes, GuestAddress(LOW.0)).unwrap();
    bytes
}

#[test]
fn a_rewound_device_goes_on_where_it_was() {
    type Later = (&'static str, fn(&Machine, &mut Ring));
    let later: [Later; 4] = [
        ("nothing happened", |_, _| {}),
        ("it went on", |m, ring| {
            for count in 22..=40 {
                ring.set_used_event(count - 1);
                add_some_chain(ring);
                m.finish(ring, count);
            }
        }),
        ("it was reset", |m, _| m.set(0x70, 0)),
        ("its ring lied", |m, ring| {
            ring.set_avail_idx(9999);
            m.kick(ring);
            m.wait_for_latch("the latch");
        }),
    ];
    for (what, later) in later {
        every_device(|name, m, _host| {
            let mut rings = m.start(F_EVENT_IDX | F_INDIRECT);
            let ring = served_queue(&m, &mut rings);
            for count in 1..=20 {
                ring.set_used_event(count - 1);
                add_some_chain(ring);
                m.finish(ring, count);
            }
            let isr = m.get(0x60);
            m.transport.lock().unwrap().pause().unwrap();
            // One more waits in the ring when the snapshot is taken.
            ring.set_used_event(20);
            add_some_chain(ring);
            let (saved, memory) = (m.transport.lock().unwrap().save(), contents(&m));
            let mut ring = ring.clone();
            m.transport.lock().unwrap().resume().unwrap();
            m.irq.wait("used buffers", || ring.used_idx() == 21);
            later(&m, &mut ring.clone());

            let mut transport = m.transport.lock().unwrap();
            transport.pause().unwrap();
            transport.check(&saved).unwrap();
            m.mem.write_slice(&memory, GuestAddress(LOW.0)).unwrap();
            transport.rewind(&saved).unwrap();
            drop(transport);
            assert_eq!((m.status(), m.get(0x60)), (15, isr), "{name}: {what}");
            assert_eq!(ring.used_idx(), 20);
            m.transport.lock().unwrap().resume().unwrap();
            m.irq.wait("used buffers", || ring.used_idx() == 21);
            ring.set_used_event(21);
            add_some_chain(&mut ring);
            m.finish(&ring, 22);
        });
    }
}

#[test]
fn a_device_is_not_rewound_to_what_was_saved_of_another() {
    for name in kinds() {
        let first = sample(name);
        let m = Machine::new(first.device);
        let mut rings = m.start(0);
        m.transport.lock().unwrap().pause().unwrap();
        let good = serde_json::to_value(m.transport.lock().unwrap().save()).unwrap();
        let refused = |path: &str, value: serde_json::Value| {
            let mut bad = good.clone();
            *bad.pointer_mut(path).unwrap() = value;
            let saved: Saved = serde_json::from_value(bad).unwrap();
            assert!(m.transport.lock().unwrap().check(&saved).is_err(), "{name}: {path}");
        };
        refused("/positions", serde_json::json!([]));
        refused("/registers/queues", serde_json::json!([]));
        refused("/registers/driver_features", serde_json::json!(u64::MAX));
        // And goes on, as nothing was done to it.
        m.transport.lock().unwrap().resume().unwrap();
        let ring = served_queue(&m, &mut rings);
        add_some_chain(ring);
        m.finish(ring, 1);
    }
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused() {
    for name in kinds() {
        let first = sample(name);
        let m = Machine::new(first.device);
        m.start(0);
        m.transport.lock().unwrap().pause().unwrap();
        let good = serde_json::to_value(m.transport.lock().unwrap().save()).unwrap();
        let refused = |path: &str, value: serde_json::Value| {
            let mut bad = good.clone();
            *bad.pointer_mut(path).unwrap() = value;
            let saved: Saved = serde_json::from_value(bad).unwrap();
            let device = Machine::with(sample(name).device, ram(), Some(&saved));
            assert!(device.is_err(), "{}: {path}", name);
        };
        refused("/positions", serde_json::json!([]));
        refused("/registers/queues", serde_json::json!([]));
        refused("/registers/driver_features", serde_json::json!(u64::MAX));
        refused("/registers/driver_features", serde_json::json!(0));
        refused("/registers/queues/0/size", serde_json::json!(3));
        refused("/registers/queues/0/size", serde_json::json!(0x8000));
        refused("/registers/queues/0/desc_table", serde_json::json!(u64::MAX - 15));
        refused("/registers/queues/0/used_ring", serde_json::json!(1));
    }
}

#[test]
fn each_device_is_seen_in_one_window_only() {
    every_device(|name, m, _host| {
        let get = |base: u64, offset: u64| {
            let mut data = [0; 4];
            assert!(m.bus.read(base + offset, &mut data));
            u32::from_le_bytes(data)
        };
        let set = |base: u64, offset: u64, value: u32| {
            assert!(m.bus.write(base + offset, &value.to_le_bytes()));
        };
        let id = get(ACPI, 8);
        for (owner, other) in [(ACPI, COMMAND_LINE), (COMMAND_LINE, ACPI), (ACPI, COMMAND_LINE)] {
            // Free: seen in both.
            assert_eq!((get(owner, 8), get(other, 8)), (id, id), "{name}");
            set(owner, 0x70, 1);
            // Taken: a placeholder that drivers skip, and that does nothing.
            assert_eq!((get(owner, 8), get(other, 8)), (id, 0), "{name}");
            assert_eq!((get(other, 0), get(other, 4)), (0x7472_6976, 2));
            for offset in (8..0x200).step_by(4) {
                assert_eq!(get(other, offset), 0, "{name}: {offset:#x}");
                set(other, offset, 0);
                set(other, offset, u32::MAX);
            }
            assert_eq!(get(owner, 0x70), 1, "{name}");
            set(owner, 0x70, 0);
        }
    });
}

/// Starts each device once for each queue and lets `attack` loose on that queue; the device must
/// ask for a reset, and work after it.
fn latches(what: &str, attack: impl Fn(&Machine, &mut Ring)) {
    every_device(|name, m, _host| {
        for queue in 0..usize::from(m.queues()) {
            let mut rings = m.start(F_INDIRECT);
            let before = m.mem.read_obj::<[u64; 32]>(GuestAddress(SCRATCH)).unwrap();
            attack(&m, &mut rings[queue]);
            m.kick(&rings[queue]);
            m.wait_for_latch(&format!("{name} queue {queue}: {what}"));
            let used = rings[queue].used_idx();
            // Dead: it neither serves nor writes any more.
            m.kick(&rings[queue]);
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
            m.transport.lock().unwrap().pause().unwrap();
            assert_eq!(rings[queue].used_idx(), used, "{name}: {what}");
            let after = m.mem.read_obj::<[u64; 32]>(GuestAddress(SCRATCH)).unwrap();
            assert_eq!(before, after, "{name}: {what}");
            // Until the driver resets it.
            m.transport.lock().unwrap().resume().unwrap();
            let mut rings = m.start(0);
            add_some_chain(served_queue(&m, &mut rings));
            m.finish(served_queue(&m, &mut rings), 1);
        }
    });
}

#[test]
fn latches_on_chains_that_are_loops() {
    latches("self-loop", |_, ring| {
        ring.write_desc(ring.desc, 0, (SCRATCH, 64, NEXT, 0));
        ring.offer(0);
    });
    latches("loop of two", |_, ring| {
        ring.write_desc(ring.desc, 0, (SCRATCH, 64, NEXT, 1));
        ring.write_desc(ring.desc, 1, (SCRATCH, 64, NEXT | WRITE, 0));
        ring.offer(0);
    });
}

#[test]
fn latches_on_indices_out_of_range() {
    for next in [16, 17, 255, 256, 0x8000, u16::MAX] {
        latches("next out of range", |_, ring| {
            ring.write_desc(ring.desc, 0, (SCRATCH, 64, NEXT, next));
            ring.offer(0);
        });
        latches("head out of range", |_, ring| ring.offer(next));
    }
    latches("more than 4 GiB", |_, ring| {
        ring.write_desc(ring.desc, 0, (SCRATCH, u32::MAX, NEXT, 1));
        ring.write_desc(ring.desc, 1, (SCRATCH, 1, 0, 0));
        ring.offer(0);
    });
}

#[test]
fn latches_on_an_available_index_that_jumps() {
    for jump in [17, 0x8000, u16::MAX] {
        latches("avail.idx jumps", |_, ring| {
            ring.write_desc(ring.desc, 0, (SCRATCH, 64, 0, 0));
            ring.set_avail_idx(jump);
        });
    }
}

#[test]
fn latches_on_bad_indirect_tables() {
    const TABLE: u64 = SCRATCH + 0x1000;
    let cases: [(&str, (u64, u32, u16)); 9] = [
        ("with NEXT", (TABLE, 16, INDIRECT | NEXT)),
        ("empty", (TABLE, 0, INDIRECT)),
        ("ragged", (TABLE, 17, INDIRECT)),
        ("too long", (TABLE, 16 * 1025, INDIRECT)),
        ("huge", (TABLE, 0xffff_fff0, INDIRECT)),
        ("out of RAM", (HIGH.0 + HIGH.1, 16, INDIRECT)),
        ("in the hole", (LOW.0 + LOW.1, 16, INDIRECT)),
        ("wrapping", (u64::MAX - 7, 16, INDIRECT)),
        ("across the end", (HIGH.0 + HIGH.1 - 8, 16, INDIRECT)),
    ];
    for (what, (addr, len, flags)) in cases {
        latches(what, |_, ring| {
            ring.write_desc(TABLE, 0, (SCRATCH, 64, 0, 0));
            ring.write_desc(ring.desc, 0, (addr, len, flags, 1));
            ring.offer(0);
        });
    }
    let inside: [(&str, Desc); 3] = [
        ("nested", (TABLE, 16, INDIRECT, 0)),
        ("a loop inside", (SCRATCH, 64, NEXT, 0)),
        ("next out of the table", (SCRATCH, 64, NEXT, 1)),
    ];
    for (what, desc) in inside {
        latches(what, |_, ring| {
            ring.write_desc(TABLE, 0, desc);
            ring.write_desc(ring.desc, 0, (TABLE, 16, INDIRECT, 0));
            ring.offer(0);
        });
    }
    latches("not negotiated", |m, ring| {
        *ring = m.start(0)[usize::from(ring.queue)].clone();
        ring.write_desc(TABLE, 0, (SCRATCH, 64, 0, 0));
        ring.write_desc(ring.desc, 0, (TABLE, 16, INDIRECT, 0));
        ring.offer(0);
    });
}

#[test]
fn buffers_that_are_not_ram_come_back_unused() {
    every_device(|name, m, _host| {
        let end = HIGH.0 + HIGH.1;
        let cases = [
            (LOW.0 + LOW.1, 64),
            (LOW.0 + LOW.1 - 32, 64),
            (HIGH.0 - 1, 64),
            (end, 64),
            (end - 63, 64),
            (ACPI, 64),
            (u64::MAX - 10, 64),
            (u64::MAX, 1),
            (1 << 63, 64),
            (SCRATCH, 0),
            (SCRATCH, 0x7fff_ffff),
        ];
        let queues = m.queues();
        for queue in 0..usize::from(queues) {
            let mut rings = m.start(0);
            let ring = &mut rings[queue];
            for (count, (addr, len)) in (1..).zip(cases) {
                ring.add(&[(addr, len, false), (addr, len, true)]);
                m.finish(ring, count);
                let (_, used) = ring.used_entry(count - 1);
                assert!(used <= len, "{name} queue {queue}: {addr:#x}+{len:#x}: {used}");
                assert_eq!(m.status(), 15, "{name} queue {queue}: {addr:#x}+{len:#x}");
            }
        }
    });
}

#[test]
fn a_head_that_is_offered_twice_is_used_at_most_as_often() {
    every_device(|name, m, _host| {
        for queue in 0..usize::from(m.queues()) {
            let mut rings = m.start(m.features() & !F_EVENT_IDX);
            let ring = &mut rings[queue];
            ring.write_desc(ring.desc, 0, (SCRATCH, 32, WRITE, 0));
            for _ in 0..16 {
                ring.offer(0);
            }
            m.kick(ring);
            let is_done = || m.status() & NEEDS_RESET != 0 || ring.used_idx() == 16;
            m.irq.wait("an end", is_done);
            assert!(ring.used_idx() <= 16, "{name}");
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
        }
    });
}

#[test]
fn refuses_rings_that_cannot_be() {
    let end = HIGH.0 + HIGH.1;
    type Spoil = fn(&mut Ring, u64);
    let cases: [(&str, Spoil); 17] = [
        ("size 0", |r, _| r.size = 0),
        ("size 3", |r, _| r.size = 3),
        ("too large", |r, _| r.size = 512),
        ("size 32768", |r, _| r.size = 0x8000),
        ("descriptors misaligned", |r, _| r.desc += 8),
        ("avail misaligned", |r, _| r.avail += 1),
        ("used misaligned", |r, _| r.used += 2),
        ("descriptors at the end", |r, end| r.desc = end - 16),
        ("avail at the end", |r, end| r.avail = end - 2),
        ("used at the end", |r, end| r.used = end - 4),
        ("descriptors in the hole", |r, _| r.desc = LOW.0 + LOW.1),
        ("used across the hole", |r, _| r.used = LOW.0 + LOW.1 - 8),
        ("descriptors wrap", |r, _| r.desc = u64::MAX - 15),
        ("used wraps", |r, _| r.used = u64::MAX - 3),
        ("all at one place", |r, _| (r.avail, r.used) = (r.desc, r.desc)),
        ("used on avail", |r, _| r.used = r.avail + 4),
        ("no addresses", |r, _| (r.desc, r.avail, r.used) = (0, 0, 0)),
    ];
    every_device(|name, m, _host| {
        for (what, spoil) in cases {
            for queue in 0..m.queues() {
                m.negotiate(0);
                let mut ring = Ring::new(&m.mem, queue, 16);
                spoil(&mut ring, end);
                m.place(&[ring]);
                m.set(0x70, 15);
                m.wait_for_latch(&format!("{name} queue {queue}: {what}"));
                m.set(0x50, queue.into());
            }
        }
        m.start(0);
    });
}

#[test]
fn nothing_is_written_after_a_reset() {
    every_device(|name, m, host| {
        let queues = m.queues();
        for round in 0..1000u32 {
            let mut rings = m.start(0);
            for ring in &mut rings {
                for _ in 0..4 {
                    add_some_chain(ring);
                }
                m.kick(ring);
            }
            m.set(0x70, 0);
            assert_eq!(m.status(), 0, "{name}");
            // The rings and buffers are the driver's again.
            let mark = [u64::from(round); 16];
            m.mem.write_obj(mark, GuestAddress(SCRATCH)).unwrap();
            for queue in 0..queues {
                let ring = Ring::new(&m.mem, queue, 16);
                m.set(0x50, queue.into());
                assert_eq!(ring.used_idx(), 0, "{name}");
            }
            assert_eq!(m.mem.read_obj::<[u64; 16]>(GuestAddress(SCRATCH)).unwrap(), mark, "{name}");
            if let Some(peer) = &host.peer {
                // Frames sent meanwhile; a full wire is the host's affair.
                let mut frame = [0; 128];
                let flags = rustix::net::RecvFlags::DONTWAIT;
                while rustix::net::recv(peer, &mut frame, flags).is_ok() {}
            }
        }
    });
}

#[test]
fn used_rings_are_written_never_read() {
    every_device(|name, m, _host| {
        let mut rings = m.start(0);
        let ring = served_queue(&m, &mut rings);
        for count in 1..=40u16 {
            // Everything in the device's area is scribbled over but its index.
            m.mem.write_slice(&[0xff; 2], GuestAddress(ring.used)).unwrap();
            m.mem.write_slice(&[0xff; 8 * 16 + 2], GuestAddress(ring.used + 4)).unwrap();
            m.mem.write_obj(0x1234u16, GuestAddress(ring.used + 2)).unwrap();
            add_some_chain(ring);
            m.finish(ring, count);
        }
        assert_eq!(m.status(), 15, "{name}");
    });
}

#[test]
fn interrupts_only_when_the_driver_wants_one() {
    every_device(|name, m, _host| {
        // By event index: none before the mark, one past it.
        let mut rings = m.start(F_EVENT_IDX);
        let ring = served_queue(&m, &mut rings);
        let before = m.irq.counts().0;
        ring.set_used_event(3);
        for _ in 0..3 {
            add_some_chain(ring);
        }
        m.kick(ring);
        // Pausing waits for the event in progress.
        while ring.used_idx() < 3 {
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
        }
        assert_eq!(m.irq.counts().0, before, "{name}");
        add_some_chain(ring);
        m.finish(ring, 4);
        assert_eq!(m.irq.counts().0, before + 1, "{name}");
        assert_eq!(ring.avail_event(), 4, "{name}");

        // By flag.
        let mut rings = m.start(0);
        let ring = served_queue(&m, &mut rings);
        let before = m.irq.counts().0;
        m.mem.write_obj(1u16, GuestAddress(ring.avail)).unwrap();
        add_some_chain(ring);
        m.kick(ring);
        while ring.used_idx() < 1 {
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
        }
        assert_eq!(m.irq.counts().0, before, "{name}");
    });
}

/// Set in the process that counts its descriptors.
const COUNTS_DESCRIPTORS: &str = "HUSK_TEST_COUNTS_DESCRIPTORS";

/// In a process of its own, where no other test opens something meanwhile.
#[test]
fn ups_and_downs_leave_no_descriptors_behind() {
    if std::env::var_os(COUNTS_DESCRIPTORS).is_none() {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "conformance::ups_and_downs_leave_no_descriptors_behind"])
            .env(COUNTS_DESCRIPTORS, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    every_device(|name, m, _host| {
        m.start(0);
        let up = open();
        for _ in 0..20 {
            m.start(0);
            m.transport.lock().unwrap().pause().unwrap();
            m.transport.lock().unwrap().resume().unwrap();
        }
        assert_eq!(open(), up, "{name}");
    });
    assert_eq!(open(), before);
}

#[test]
fn rings_may_begin_where_another_ends() {
    let m = Machine::new(sample("entropy").device);
    m.negotiate(0);
    let mut ring = Ring::new(&m.mem, 0, 16);
    // Flags, index and event beside 16 entries.
    ring.avail = ring.used + 6 + 16 * 8;
    m.place(std::slice::from_ref(&ring));
    m.set(0x70, 15);
    assert_eq!(m.status(), 15);
    add_some_chain(&mut ring);
    m.finish(&ring, 1);
    // One byte more, and one would be written over by the other.
    m.negotiate(0);
    ring.avail -= 2;
    m.place(&[ring]);
    m.set(0x70, 15);
    assert_eq!(m.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn removal_leaves_a_placeholder() {
    every_device(|name, mut m, _host| {
        let mut rings = m.start(0);
        let ring = served_queue(&m, &mut rings);
        add_some_chain(ring);
        m.finish(ring, 1);
        let before = m.irq.counts().1;
        let device = m.transport.lock().unwrap().remove().unwrap();
        assert_ne!(device.device_id(), 0, "{name}");
        // Its driver is told.
        assert_eq!(m.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        assert_eq!(m.irq.counts().1, before + 1, "{name}");
        assert_eq!((m.get(0), m.get(4), m.get(8)), (0x7472_6976, 2, 0), "{name}");
        assert_eq!(m.queues(), 0, "{name}");
        // Whatever a driver does now changes nothing.
        add_some_chain(ring);
        m.kick(ring);
        m.set(0x70, 0);
        assert_eq!(m.status(), 0, "{name}");
        m.always = 0;
        m.negotiate(0);
        m.set(0x70, 15);
        assert_eq!(m.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        assert_eq!(ring.used_idx(), 1, "{name}");
        let mut transport = m.transport.lock().unwrap();
        transport.pause().unwrap();
        transport.resume().unwrap();
        assert_eq!(transport.counters()[1].values(), [], "{name}");
    });
}

/// What a snapshot of what has changed is made of: nothing that a device writes may be missing.
#[test]
fn every_page_that_is_written_is_recorded() {
    let changed = Cell::new(0);
    every_device(|name, m, host| {
        let mut rings = m.start(F_EVENT_IDX);
        // A device that has just started looks at its rings by itself.
        m.transport.lock().unwrap().pause().unwrap();
        let scratch = |offset: u64| SCRATCH + offset;
        // A header as drives like it, then whole pages and a bit.
        let buffers =
            [(scratch(0), 16, false), (scratch(0x2000), 0x2200, true), (scratch(0x6fff), 2, true)];
        for ring in &mut rings {
            ring.add(&buffers);
        }
        rings.iter().for_each(|ring| ring.set_used_event(0));
        let before = pages_of(&m.mem);
        forget_written(&m.mem);
        if let Some(peer) = &host.peer {
            rustix::net::send(peer, &[7; 100], rustix::net::SendFlags::empty()).unwrap();
        }
        m.transport.lock().unwrap().resume().unwrap();
        let ring = served_queue(&m, &mut rings);
        m.irq.wait("used buffers", || ring.used_idx() == 1);
        m.transport.lock().unwrap().pause().unwrap();
        let mut some = 0;
        for ((addr, before), (_, now)) in before.iter().zip(pages_of(&m.mem)) {
            if *before != now {
                some += 1;
                assert!(is_written(&m.mem, *addr), "{name}: {:#x}", addr.0);
            }
        }
        assert!(some > 0, "{name}");
        changed.set(changed.get() + some);
        // Recorded again, for the end of the machine, which asks for all of its life.
        before.iter().for_each(|(addr, bytes)| m.mem.write_slice(&bytes[..1], *addr).unwrap());
    });
    assert!(changed.get() > 40, "{}", changed.get());
}
