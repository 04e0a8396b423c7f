//! Bugs of other monitors, each as a test: what a guest did to them does nothing here. A name carries the
//! bug's, and the line above it says what it did there.
use std::sync::atomic::Ordering;

use devices::backend::console::Console;
use devices::backend::vsock::packet::{HEADER_BYTES, op};
use devices::bus::BusDevice;
use devices::legacy::serial::Serial;
use devices::virtio::mmio::Saved;
use rustix::net::{SendFlags, send};
use serde_json::Value;

use crate::bench::{ANY_END, Bench, Case, LATCHED, REJECTED, SIZE, Verdict, alone, run};
use crate::driver::{HIGH, Machine, NEEDS_RESET, NEXT, Ring, WRITE};
use crate::kinds::{DATA, HEADER, KINDS, Kind, NOBODY, RESPONSE, UNTOUCHED};
use crate::kinds::{block_header, frame, vsock_request};
use crate::samples::{TempFile, sample};
use crate::zones::Zones;

/// An attack on one queue, whichever it is.
type OnQueue = fn(&mut Bench, usize) -> Verdict;

/// Runs an attack on each queue of each kind of device that `is_meant`.
fn each(name: &str, is_meant: fn(Kind) -> bool, expected: &'static [Verdict], attack: OnQueue) {
    let alone = alone();
    for kind in KINDS.into_iter().filter(|kind| is_meant(*kind)) {
        let case = |queue| {
            Case::on_queue(kind, queue, name, expected, move |b: &mut Bench| attack(b, queue))
        };
        run(&alone, kind, &(0..kind.queues().len()).map(case).collect::<Vec<_>>());
    }
}

/// Firecracker's PCI transport took a queue size written after activation: division by 0, then writes up
/// to 524,284 bytes behind the ring.
#[test]
fn fc_cve_2026_5747_queue_size_after_activation() {
    each(
        "fc_cve_2026_5747",
        |_| true,
        ANY_END,
        |b, queue| {
            b.m.set(0x30, u32::try_from(queue).unwrap());
            for size in [0, 0xffff, 0x8000, 3] {
                b.m.set(0x44, 0);
                b.m.set(0x38, size);
                b.m.set(0x44, 1);
                b.pause();
                b.resume();
            }
            let mut verdict = Verdict::Held;
            for _ in 0..2 * SIZE {
                let buffers = b.honest(queue);
                verdict = b.send(queue, &buffers[..1]);
                if verdict == Verdict::Held {
                    break;
                }
            }
            verdict
        },
    );
}

/// Firecracker's vsock checked a length against the whole of a buffer, and read or wrote behind it.
#[test]
fn fc_cve_2019_18960_vsock_length_beyond_its_buffer() {
    each(
        "fc_cve_2019_18960",
        |kind| kind == Kind::Vsock,
        ANY_END,
        |b, queue| {
            if queue != 1 {
                // Room for half a header, right at the end of memory.
                return b.send(queue, &[(HIGH.0 + HIGH.1 - 3, 3, true)]);
            }
            let end = HIGH.0 + HIGH.1 - u64::from(HEADER_BYTES);
            let mut header = vsock_request(NOBODY);
            (header.op, header.len) = (op::RW, 4096);
            b.write(end, &header.to_bytes());
            b.send(queue, &[(end, HEADER_BYTES, false)])
        },
    );
}

/// Firecracker kept serial output that nobody read without end (issue 2177, CVE-2020-27174).
#[test]
fn fc_2177_cve_2020_27174_serial_output_is_bounded() {
    let _alone = alone();
    let (port, _input) =
        Serial::new(Box::<std::sync::Arc<_>>::default(), Console::pty().unwrap()).unwrap();
    let before = crate::allocator::live();
    for _ in 0..4096 {
        port.write_burst(0, 1, &[b'x'; 1024]);
    }
    let kept = crate::allocator::live().saturating_sub(before);
    assert!(kept <= 256 << 10, "{kept} bytes of 4 MiB are kept");
}

/// Firecracker panicked at a short write to the configuration space (1822), Cloud Hypervisor at accesses of
/// widths it did not expect (8405, 8506).
#[test]
fn fc_1822_ch_8405_8506_accesses_of_any_width() {
    let alone = alone();
    for kind in KINDS {
        let case = Case::on(kind, "fc_1822_ch_8405_8506", REJECTED, |b| {
            for len in 0..=16 {
                for offset in (0xf0..0x140).chain(0..0x10).chain(0xff0..0x1000) {
                    let mut data = vec![0; len];
                    b.m.device().0.read(offset, &mut data);
                    b.m.device().0.write(offset, &data);
                }
            }
            Verdict::Rejected
        });
        run(&alone, kind, &[case]);
    }
}

/// Firecracker and Cloud Hypervisor took a failed activation for impossible and panicked (4665, 8295).
#[test]
fn fc_4665_ch_8295_activation_that_fails_is_told() {
    each(
        "fc_4665_ch_8295",
        |_| true,
        LATCHED,
        |b, queue| {
            b.m.negotiate(0);
            let mut ring = Ring::new(&b.m.mem, u16::try_from(queue).unwrap(), SIZE);
            ring.used = u64::MAX - 3;
            b.m.place(&[ring]);
            let told = b.m.irq.counts().1;
            b.m.set(0x70, 15);
            let verdict = b.latched();
            assert_eq!(b.m.irq.counts().1, told + 1, "one interrupt for it");
            verdict
        },
    );
}

/// Firecracker took what a snapshot says of a device for sane: asserts and unwraps on it (2116, 5521, 5918,
/// 6025).
#[test]
fn fc_2116_5521_5918_6025_saved_devices_are_input() {
    let _alone = alone();
    for kind in KINDS {
        let mut b = Bench::new(kind);
        let buffers = b.honest(0);
        b.send(0, &buffers);
        b.pause();
        let good = serde_json::to_value(b.m.transport.lock().unwrap().save()).unwrap();
        let mut paths = Vec::new();
        leaves(&good, String::new(), &mut paths);
        assert!(paths.len() > 8, "{good}");
        for path in paths {
            for value in [0, 1, 3, 0xffff, 0x1_0000, u64::from(u32::MAX), u64::MAX] {
                let mut bad = good.clone();
                *bad.pointer_mut(&path).unwrap() = value.into();
                let Ok(saved) = serde_json::from_value::<Saved>(bad) else { continue };
                let (ram, zones) = Zones::new();
                let device = sample(kind.sample());
                let Ok(m) = Machine::with(device.device, ram, Some(&saved)) else { continue };
                // It may be what a device can be in: then it works, or asks for a reset.
                let _ = m.transport.lock().unwrap().resume();
                (0..m.queues()).for_each(|queue| m.set(0x50, queue.into()));
                m.set(0x70, 0);
                assert_eq!(m.status(), 0, "{path} {value:#x}");
                zones.assert_untouched();
            }
        }
    }
}

/// Pointers to the numbers in `value`.
fn leaves(value: &Value, path: String, to: &mut Vec<String>) {
    match value {
        Value::Number(_) => to.push(path),
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(i, one)| leaves(one, format!("{path}/{i}"), to));
        }
        Value::Object(all) => {
            all.iter().for_each(|(key, one)| leaves(one, format!("{path}/{key}"), to));
        }
        _ => {}
    }
}

/// Cloud Hypervisor wrote what a request had read to memory that was no longer the request's, after a reset
/// (CVE-2026-45782).
#[test]
fn ch_cve_2026_45782_completion_after_reset() {
    each("ch_cve_2026_45782", Kind::is_block, &[Verdict::Reset], |b, _| {
        for _ in 0..200 {
            b.up();
            for _ in 0..5 {
                let buffers = b.honest(0);
                b.ring(0).add(&buffers);
            }
            b.m.kick(&b.rings[0]);
            crate::v13_reset::nothing_is_written(b);
        }
        Verdict::Reset
    });
}

/// Cloud Hypervisor and QEMU guess a disk's format from what the guest wrote: a header of QCOW2 then names
/// a file of the host (CVE-2026-27211).
#[test]
fn ch_cve_2026_27211_format_is_never_guessed() {
    let _alone = alone();
    let mut image = vec![0; 1 << 16];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    // The backing file: offset 0x200, 11 bytes.
    image[8..24].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11, 0, 0, 0, 16]);
    image[0x200..0x20b].copy_from_slice(b"/etc/passwd");
    let file = TempFile::new(&image);
    let json = serde_json::json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": file.path,
    });
    let m = Machine::new(crate::samples::open("drives", &json));
    let mut ring = m.start(0).remove(0);
    let write = |at, bytes: &[u8]| {
        vm_memory::Bytes::write_slice(&m.mem, bytes, vm_memory::GuestAddress(at)).unwrap();
    };
    write(HEADER, &block_header(0, 0));
    ring.add(&[(HEADER, 16, false), (DATA, 1024, true), (RESPONSE, 1, true)]);
    m.finish(&ring, 1);
    let mut seen = [0; 1024];
    vm_memory::Bytes::read_slice(&m.mem, &mut seen, vm_memory::GuestAddress(DATA)).unwrap();
    assert_eq!(seen[..], image[..1024], "sector 0 is the file's first 512 bytes");
    assert_eq!(u64::from(u32::from_le_bytes(m.config(0, 4).try_into().unwrap())), 128);
}

/// Cloud Hypervisor indexed its queues by what the guest had selected (7917).
#[test]
fn ch_7917_queue_select_is_no_index() {
    let alone = alone();
    for kind in KINDS {
        let case = Case::on(kind, "ch_7917", REJECTED, |b| {
            for queue in [5, 6, 63, 255, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
                b.m.set(0x30, queue);
                assert_eq!((b.m.get(0x34), b.m.get(0x44)), (0, 0), "queue {queue}");
                for register in [0x38, 0x44, 0x50, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
                    b.m.set(register, queue);
                }
            }
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        });
        run(&alone, kind, &[case]);
    }
}

/// Cloud Hypervisor read a vsock header twice: checked the length of the one, used that of the other (7530).
#[test]
fn ch_7530_vsock_header_is_read_once() {
    each(
        "ch_7530",
        |kind| kind == Kind::Vsock,
        &[Verdict::Reset],
        |b, queue| {
            let stop = std::sync::atomic::AtomicBool::new(false);
            let ring = b.rings[queue].clone();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for turn in 0u32.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let len = [0, 64, u32::MAX, 4096][usize::try_from(turn % 4).unwrap()];
                        let at = vm_memory::GuestAddress(HEADER + 24);
                        vm_memory::Bytes::write_obj(&ring.mem, len, at).unwrap();
                    }
                });
                for _ in 0..200 {
                    b.up();
                    let mut header = vsock_request(NOBODY);
                    header.op = op::RW;
                    b.write(HEADER, &header.to_bytes());
                    let is_writable = queue != 1;
                    b.ring(queue).add(&[(HEADER, 44, is_writable), (DATA, 64, is_writable)]);
                    b.kick_and_settle(queue);
                }
                stop.store(true, Ordering::Relaxed);
            });
            crate::v13_reset::nothing_is_written(b);
            Verdict::Reset
        },
    );
}

/// Cloud Hypervisor (8388) and OpenVMM (4046, 4047) added sectors and lengths that overflow.
#[test]
fn ch_8388_openvmm_4046_4047_sums_that_overflow() {
    each("ch_8388_openvmm_4046_4047", Kind::is_block, &[Verdict::IoErr], |b, _| {
        let mut verdict = Verdict::Rejected;
        for request in [0, 1, 11, 13] {
            for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, i64::MAX.unsigned_abs()] {
                b.write(HEADER, &block_header(request, sector));
                b.write(RESPONSE, &[UNTOUCHED]);
                b.write(DATA, &sector.to_le_bytes());
                b.write(DATA + 8, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
                let len = if request < 2 { 1024 } else { 16 };
                let data = (DATA, len, request == 0);
                verdict = b.send(0, &[(HEADER, 16, false), data, (RESPONSE, 1, true)]);
                assert_eq!(verdict, Verdict::IoErr, "type {request} sector {sector:#x}");
            }
        }
        verdict
    });
}

/// Cloud Hypervisor lost the head of a malformed request (8401), or the thread that served it (8142).
#[test]
fn ch_8401_8142_a_bad_request_comes_back_and_the_next_is_served() {
    each(
        "ch_8401_8142",
        |_| true,
        ANY_END,
        |b, queue| {
            // More bad ones than the ring has room for, so that one that is lost is missed.
            for round in 0..3 * SIZE {
                let verdict = b.send(queue, &[(HIGH.0 + HIGH.1, 64, round % 2 == 0)]);
                assert!(ANY_END.contains(&verdict), "{verdict:?}");
                assert_ne!(verdict, Verdict::Held);
            }
            let buffers = b.honest(queue);
            b.send(queue, &buffers)
        },
    );
}

/// OpenVMM (4036, 4045) and QEMU (CVE-2026-16457, CVE-2016-6490) tried a request that could not be done
/// again and again, or followed a chain that leads nowhere for ever.
#[test]
fn openvmm_4036_4045_qemu_cve_2026_16457_2016_6490_no_livelock() {
    each(
        "no_livelock",
        |_| true,
        LATCHED,
        |b, queue| {
            let ring = b.ring(queue);
            ring.write_desc(ring.desc, 0, (DATA, 0, NEXT | WRITE, 1));
            ring.write_desc(ring.desc, 1, (DATA, 0, NEXT | WRITE, 0));
            (0..SIZE).for_each(|_| ring.offer(0));
            let verdict = b.kick_and_see(queue);
            // The latch holds however often it is kicked; that nobody spins is looked at after each case.
            (0..1000).for_each(|_| b.m.kick(&b.rings[queue]));
            b.pause();
            b.resume();
            assert_ne!(b.m.status() & NEEDS_RESET, 0);
            assert_eq!(b.ring(queue).used_idx(), 0);
            verdict
        },
    );
}

/// QEMU kept as many requests as the guest asked for (CVE-2016-5403), allocated what one said it was long
/// (CVE-2016-7422), and asserted that it was longer than nothing (issue 3984).
#[test]
fn qemu_cve_2016_5403_2016_7422_3984_bounded_by_the_ring() {
    each(
        "qemu_cve_2016_5403_7422_3984",
        |_| true,
        LATCHED,
        |b, queue| {
            for len in [0, u32::MAX] {
                let buffers = b.honest(queue);
                let verdict = b.send(queue, &[(buffers[0].0, len, buffers[0].2)]);
                assert!(ANY_END.contains(&verdict), "{len:#x}: {verdict:?}");
            }
            // One head more than there are entries.
            b.ring(queue).set_avail_idx(2 + 3 * SIZE);
            b.kick_and_see(queue)
        },
    );
}

/// QEMU took the value written to the doorbell for an index (CVE-2011-2512).
#[test]
fn qemu_cve_2011_2512_doorbell_value_is_no_index() {
    let alone = alone();
    for kind in KINDS {
        let case = Case::on(kind, "qemu_cve_2011_2512", REJECTED, |b| {
            for queue in (0..=0xffff).chain([0x1_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX]) {
                b.m.set(0x50, queue);
            }
            b.settle();
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        });
        run(&alone, kind, &[case]);
    }
}

/// rust-vmm's virtio-queue followed an available index further than the ring is long (vm-virtio 196).
#[test]
fn vm_virtio_196_available_index_beyond_the_ring() {
    each(
        "vm_virtio_196",
        |_| true,
        LATCHED,
        |b, queue| {
            let buffers = b.honest(queue);
            b.ring(queue).add(&buffers);
            b.ring(queue).set_avail_idx(SIZE + 1);
            b.kick_and_see(queue)
        },
    );
}

/// rust-vmm's virtio-queue let the lengths of a chain add up to more than 2^32 (vm-virtio 236).
#[test]
fn vm_virtio_236_chain_of_more_than_4_gib() {
    each(
        "vm_virtio_236",
        |_| true,
        LATCHED,
        |b, queue| {
            b.send(queue, &[(DATA, u32::MAX, false), (DATA, u32::MAX, true), (DATA, 2, true)])
        },
    );
}

/// Kata's Dragonball let guests write behind buffers in several devices (4.3.0): the last bytes of memory
/// are written, the first behind it are not.
#[test]
fn kata_4_3_0_nothing_behind_the_last_byte() {
    each(
        "kata_4_3_0",
        |_| true,
        ANY_END,
        |b, queue| {
            let end = HIGH.0 + HIGH.1;
            let mut verdict = Verdict::Held;
            for (part, spare) in
                (0..b.honest(queue).len()).flat_map(|p| [(p, 0), (p, 1), (p, 4095)])
            {
                b.up();
                let mut buffers = b.honest(queue);
                let len = buffers[part].1;
                buffers[part].0 = end - u64::from(len) + spare;
                verdict = b.send(queue, &buffers);
                assert!(ANY_END.contains(&verdict), "{verdict:?}");
            }
            if b.kind.is_net() {
                // A frame into what is too short for it.
                b.up();
                send(b.peer(), &frame(1400), SendFlags::DONTWAIT).unwrap();
                b.ring(0).add(&[(end - 64, 64, true)]);
                b.kick_and_settle(0);
            }
            verdict
        },
    );
}
