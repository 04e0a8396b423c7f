//! V1 to V13, those that matter most, by real doorbells.
use core::sync::atomic::{Ordering, fence};

use rt::virtio::{self, Buffer, Descriptor, Queue, reg, status};
use rt::{Outcome, clock, println};

use crate::target::{F_INDIRECT, HOLE, INDIRECT, LIVE, NEXT, SIZE, Target, Verdict, WRITE};

/// What is done to a ring before it is kicked.
type Spoil = fn(&mut Queue, &Target);

const LATCHING: [(&str, &str, Spoil); 19] = [
    ("v01", "self_loop", |q, t| describe(q, 0, (t.data, 64, NEXT, 0))),
    ("v01", "cycle_of_two", |q, t| {
        describe(q, 0, (t.data, 64, NEXT, 1));
        describe(q, 1, (t.data, 64, NEXT | WRITE, 0));
    }),
    ("v01", "longer_than_the_queue", |q, t| {
        for i in 0..SIZE {
            describe(q, i, (t.data, 1, NEXT, (i + 1) % SIZE));
        }
    }),
    ("v01", "next_is_the_size", |q, t| describe(q, 0, (t.data, 64, NEXT, SIZE))),
    ("v01", "next_is_the_largest", |q, t| describe(q, 0, (t.data, 64, NEXT, u16::MAX))),
    ("v02", "indirect_not_negotiated", |q, t| describe(q, 0, (t.data, 16, INDIRECT, 0))),
    ("v02", "indirect_nested", |q, t| {
        table(t.data + 8192, 0, (t.data + 8192, 16, INDIRECT, 0));
        describe(q, 0, (t.data + 8192, 16, INDIRECT, 0));
    }),
    ("v02", "indirect_with_next", |q, t| describe(q, 0, (t.data, 16, INDIRECT | NEXT, 1))),
    ("v02", "indirect_empty", |q, t| describe(q, 0, (t.data, 0, INDIRECT, 0))),
    ("v02", "indirect_ragged", |q, t| describe(q, 0, (t.data, 17, INDIRECT, 0))),
    ("v02", "indirect_huge", |q, t| describe(q, 0, (t.data, 0xffff_fff0, INDIRECT, 0))),
    ("v02", "indirect_out_of_ram", |q, _| describe(q, 0, (HOLE, 16, INDIRECT, 0))),
    ("v02", "indirect_wraps", |q, _| describe(q, 0, (u64::MAX - 7, 16, INDIRECT, 0))),
    ("v02", "indirect_loop_inside", |q, t| {
        table(t.data + 8192, 0, (t.data, 64, NEXT, 0));
        describe(q, 0, (t.data + 8192, 16, INDIRECT, 0));
    }),
    ("v04", "more_than_4_gib", |q, t| {
        describe(q, 0, (t.data, u32::MAX, NEXT, 1));
        describe(q, 1, (t.data, u32::MAX, WRITE, 0));
    }),
    ("v06", "head_is_the_size", |q, _| slot(q, SIZE)),
    ("v06", "head_is_the_largest", |q, _| slot(q, u16::MAX)),
    ("v07", "index_one_too_far", |q, _| index(q, SIZE + 1)),
    ("v07", "index_back", |q, _| index(q, u16::MAX)),
];

const ADDRESSES: [(&str, u64); 9] = [
    ("hole", HOLE),
    ("window", 0xc000_1000),
    ("local_apic", 0xfee0_0000),
    ("below_4_gib", 0xffff_fffe),
    ("far", 1 << 45),
    ("top_bit", 1 << 63),
    ("wraps", u64::MAX - 1),
    ("largest", u64::MAX),
    ("high_bits", 1 << 52 | 0x10_0000),
];

/// What is written to a live device's registers, in turn.
const LATE: [(&str, usize); 8] = [
    ("size", reg::QUEUE_NUM),
    ("ready", reg::QUEUE_READY),
    ("desc_low", reg::QUEUE_DESC),
    ("desc_high", reg::QUEUE_DESC + 4),
    ("driver_low", reg::QUEUE_DRIVER),
    ("driver_high", reg::QUEUE_DRIVER + 4),
    ("device_low", reg::QUEUE_DEVICE),
    ("device_high", reg::QUEUE_DEVICE + 4),
];

/// V1 to V13, those that matter most.
pub(crate) fn queues(t: &Target) -> Outcome {
    for number in 0..t.queues {
        for (row, what, spoil) in LATCHING {
            let features = if what == "indirect_not_negotiated" { 0 } else { F_INDIRECT };
            let mut queue = t.up(number, features)?;
            queue.chain(0, &t.parts());
            spoil(&mut queue, t);
            if row < "v06" {
                queue.offer(0);
            }
            let verdict = t.see(&mut queue);
            t.report(row, what, Some(number), verdict, "latched");
        }
        for (what, address) in ADDRESSES {
            let mut queue = t.up(number, 0)?;
            let parts = t.parts().map(|part| Buffer { address, ..part });
            queue.chain(0, &parts);
            queue.offer(0);
            let verdict = t.see(&mut queue);
            t.report("v03", what, Some(number), verdict, "used");
        }
        for (what, len) in [("len_0", 0), ("len_1", 1), ("len_half", 0x7fff_ffff)] {
            let mut queue = t.up(number, 0)?;
            queue.chain(0, &t.parts().map(|part| Buffer { len, ..part }));
            queue.offer(0);
            let verdict = t.see(&mut queue);
            t.report("v04", what, Some(number), verdict, "used");
        }
        placement(t, number)?;
        late(t, number)?;
        kicks(t, number)?;
    }
    statuses(t)?;
    resets(t)
}

/// A descriptor: address, length, flags, next.
type Desc = (u64, u32, u16, u16);

fn describe(queue: &mut Queue, at: u16, (address, len, flags, next): Desc) {
    queue.describe(at, Descriptor { address, len, flags, next });
}

fn table(at: u64, entry: u64, (address, len, flags, next): Desc) {
    let at = (at + 16 * entry) as *mut Descriptor;
    // SAFETY: a page of the target's.
    unsafe { at.write_volatile(Descriptor { address, len, flags, next }) };
}

/// Offers `head`, whatever it is.
fn slot(queue: &mut Queue, head: u16) {
    queue.offer(head);
}

/// Sets the available index.
fn index(queue: &mut Queue, value: u16) {
    // SAFETY: the available ring: flags, idx, ring[size].
    unsafe { queue.avail.add(1).write_volatile(value) };
    fence(Ordering::SeqCst);
}

/// V9, V10: rings where none can be.
fn placement(t: &Target, number: usize) -> Outcome {
    for (what, register, low, high) in [
        ("size_0", reg::QUEUE_NUM, 0, None),
        ("size_3", reg::QUEUE_NUM, 3, None),
        ("size_32768", reg::QUEUE_NUM, 0x8000, None),
        ("size_65552", reg::QUEUE_NUM, 0x1_0010, None),
        ("desc_misaligned", reg::QUEUE_DESC, 0x10_0008, Some(0)),
        ("avail_misaligned", reg::QUEUE_DRIVER, 0x10_0001, Some(0)),
        ("used_misaligned", reg::QUEUE_DEVICE, 0x10_0002, Some(0)),
        ("desc_in_the_hole", reg::QUEUE_DESC, HOLE as u32, Some(0)),
        ("avail_in_the_hole", reg::QUEUE_DRIVER, HOLE as u32, Some(0)),
        ("used_in_the_hole", reg::QUEUE_DEVICE, HOLE as u32, Some(0)),
        ("desc_wraps", reg::QUEUE_DESC, 0xffff_fff0, Some(u32::MAX)),
        ("used_wraps", reg::QUEUE_DEVICE, 0xffff_fffc, Some(u32::MAX)),
    ] {
        t.device.negotiate(0)?;
        let queue = t.device.queue(number as u16, SIZE)?;
        t.device.write(reg::QUEUE_READY, 0);
        t.device.write(register, low);
        if let Some(high) = high {
            t.device.write(register + 4, high);
        }
        t.device.write(reg::QUEUE_READY, 1);
        t.device.set_status(LIVE);
        let verdict = t.await_latch();
        queue.notify();
        t.report("v09", what, Some(number), verdict, "latched");
    }
    t.device.negotiate(0)?;
    t.device.write(reg::QUEUE_SEL, number as u32);
    t.device.write(reg::QUEUE_READY, 1);
    t.device.set_status(LIVE);
    let verdict = t.await_latch();
    t.report("v10", "ready_without_addresses", Some(number), verdict, "latched");
    Ok(())
}

/// V10: registers of a live queue (Firecracker's CVE-2026-5747): the queue is what it was.
fn late(t: &Target, number: usize) -> Outcome {
    for (what, register) in LATE {
        let mut queue = t.up(number, 0)?;
        for value in [0, 1, 3, 0x8000, 0xffff, u32::MAX] {
            t.device.write(reg::QUEUE_SEL, number as u32);
            t.device.write(register, value);
        }
        let mut verdict = Verdict::Rejected;
        // All entries, and then the first once more.
        for round in 0..SIZE + 1 {
            queue.chain(0, &t.parts());
            queue.offer(0);
            match t.see(&mut queue) {
                Verdict::Held if t.holds(number as u16) => break,
                Verdict::Used => {}
                other => {
                    verdict = other;
                    println!("round={round}");
                    break;
                }
            }
        }
        t.report("v10", what, Some(number), verdict, "rejected");
    }
    Ok(())
}

/// V11.
fn kicks(t: &Target, number: usize) -> Outcome {
    let doorbell = |count: u32| {
        for _ in 0..count {
            t.device.write(reg::QUEUE_NOTIFY, number as u32);
        }
    };
    t.device.reset()?;
    doorbell(10);
    t.report("v11", "kick_after_reset", Some(number), Verdict::Rejected, "rejected");
    t.device.negotiate(0)?;
    doorbell(10);
    t.report("v11", "kick_before_driver_ok", Some(number), Verdict::Rejected, "rejected");
    let mut queue = t.up(number, 0)?;
    doorbell(10_000);
    let verdict = match (queue.poll(), t.device.status()) {
        (None, LIVE) => Verdict::Rejected,
        (Some(_), _) => Verdict::Used,
        _ => Verdict::Latched,
    };
    t.report("v11", "kick_10000_times", Some(number), verdict, "rejected");
    Ok(())
}

/// V12.
fn statuses(t: &Target) -> Outcome {
    let mut verdict = Verdict::Rejected;
    for value in 1..=255 {
        t.up(0, 0)?;
        t.device.set_status(value);
        let expected = if value & LIVE == LIVE { LIVE | value & status::FAILED } else { LIVE };
        if t.device.status() != expected {
            println!("status={value:#x} is={:#x}", t.device.status());
            verdict = Verdict::Used;
        }
    }
    t.report("v12", "all_values_when_live", None, verdict, "rejected");
    let mut verdict = Verdict::Rejected;
    let offered = t.device.features();
    for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
        t.device.reset()?;
        t.device.set_status(3);
        t.device.set_features(virtio::F_VERSION_1 | 1 << bit);
        t.device.set_status(11);
        if t.device.status() != 3 {
            verdict = Verdict::Used;
        }
    }
    t.report("v12", "each_unoffered_feature", None, verdict, "rejected");
    t.device.reset()?;
    t.device.set_status(3);
    t.device.set_features(0);
    t.device.set_status(11);
    let is_refused = t.device.status() == 3;
    let verdict = if is_refused { Verdict::Rejected } else { Verdict::Used };
    t.report("v12", "version_1_refused", None, verdict, "rejected");
    Ok(())
}

/// V13: when the status reads 0, rings and buffers are the driver's.
fn resets(t: &Target) -> Outcome {
    let mut verdict = Verdict::Rejected;
    for _ in 0..50 {
        let mut queue = t.up(t.served(), 0)?;
        for head in (0..SIZE).step_by(2) {
            queue.chain(head, &t.parts());
            queue.offer(head);
        }
        queue.notify();
        t.device.reset()?;
        let used = queue.used;
        let page = (t.data + 4096) as *mut u64;
        // SAFETY: the ring's own memory and a page of the target's.
        let is_same = unsafe {
            let index = used.add(1).read_volatile();
            page.write_volatile(0x1234_5678);
            queue.notify();
            clock::delay_us(100);
            used.add(1).read_volatile() == index && page.read_volatile() == 0x1234_5678
        };
        if !is_same {
            verdict = Verdict::Used;
        }
    }
    t.report("v13", "reset_in_flight", None, verdict, "rejected");
    for _ in 0..1000 {
        t.device.set_status(0);
    }
    let is_new = t.device.status() == 0;
    let verdict = if is_new { Verdict::Rejected } else { Verdict::Broken };
    t.report("v13", "reset_1000_times", None, verdict, "rejected");
    Ok(())
}
