//! M1, M2, M4, M8: registers at every offset and width, the edges of the window, doorbells.
use core::arch::asm;

use rt::memory::*;
use rt::virtio::reg;
use rt::{Outcome, clock};

use crate::target::{LIVE, MOMENT_US, PATIENCE_US, Target, Verdict};

/// M1, M2, M4, M8.
pub(crate) fn registers(t: &Target) -> Outcome {
    let device = &t.device;
    for is_live in [false, true] {
        let stage = if is_live { "live" } else { "reset" };
        for (value, what) in
            [(0, "0"), (1, "1"), (u64::MAX, "ones"), (0x94_2e_f1_6d_88_17_c3_5a, "random")]
        {
            for (width, name) in [(1, "1"), (2, "2"), (4, "4"), (8, "8")] {
                let mut verdict = Verdict::Rejected;
                for offset in 0..0x200 {
                    if is_live && device.status() != LIVE {
                        t.up(0, 0)?;
                    } else if !is_live {
                        device.set_status(0);
                    }
                    let before = device.status();
                    write(device.base + offset, width, value);
                    let is_register = width == 4 && offset % 4 == 0 && offset < reg::CONFIG;
                    if !is_register && device.status() != before {
                        verdict = Verdict::Broken;
                    }
                    // A walk through all offsets reads them as well.
                    let read = read(device.base + offset, width);
                    if !is_register && offset < reg::CONFIG && read != 0 {
                        verdict = Verdict::Used;
                    }
                }
                let mut text = rt::console::Text::<48>::new();
                text.push(format_args!("write_{what}_width_{name}_{stage}"));
                t.report("m1", text.as_str(), None, verdict, "rejected");
            }
        }
    }
    configuration(t)?;
    edges(t)?;
    doorbells(t)
}

fn read(at: usize, width: u32) -> u64 {
    match width {
        1 => mmio_read8(at).into(),
        2 => mmio_read16(at).into(),
        4 => mmio_read32(at).into(),
        _ => mmio_read64(at),
    }
}

fn write(at: usize, width: u32, value: u64) {
    match width {
        1 => mmio_write8(at, value as u8),
        2 => mmio_write16(at, value as u16),
        4 => mmio_write32(at, value as u32),
        _ => mmio_write64(at, value),
    }
}

/// M2: behind the end of the configuration space there is nothing, up to the end of the window.
fn configuration(t: &Target) -> Outcome {
    let config = t.device.base + reg::CONFIG;
    let mut end = 0x80;
    while end > 0 && mmio_read8(config + end - 1) == 0 {
        end -= 1;
    }
    for (what, at) in [("end", end), ("end_plus_1", end + 1), ("0xdf8", 0xdf8), ("0xef8", 0xef8)] {
        let mut verdict = Verdict::Rejected;
        for width in [1, 2, 4, 8] {
            write(config + at, width, u64::MAX);
            if read(config + at, width) != 0 {
                verdict = Verdict::Used;
            }
        }
        t.report("m2", what, None, verdict, "rejected");
    }
    // Straddling it: what is behind reads as zero.
    let mut verdict = Verdict::Rejected;
    if end > 0 && read(config + end - 1, 8) >> 8 != 0 {
        verdict = Verdict::Used;
    }
    t.report("m2", "straddling", None, verdict, "rejected");
    Ok(())
}

/// M4: the last bytes of the window and across it, read-modify-write, 16 bytes.
fn edges(t: &Target) -> Outcome {
    let end = t.device.base + t.device.size;
    for (what, at, width) in [
        ("last_byte", end - 1, 1),
        ("across_the_end_2", end - 1, 2),
        ("across_the_end_4", end - 2, 4),
        ("across_the_end_8", end - 4, 8),
        ("before_the_window_4", t.device.base - 2, 4),
        ("before_the_window_8", t.device.base - 4, 8),
    ] {
        write(at, width, 0x5a5a_5a5a_5a5a_5a5a);
        let _ = read(at, width);
        t.report("m4", what, None, Verdict::Rejected, "rejected");
    }
    let status = t.device.base + reg::STATUS;
    let queue = t.up(0, 0)?;
    let mut value = 0_u32;
    // SAFETY: a register and the bytes behind it; what atomics and wide loads make of them is the test.
    unsafe {
        asm!("lock xadd [{}], {:e}", in(reg) status, inout(reg) value);
        asm!("movdqu xmm0, [{}]", in(reg) status, out("xmm0") _);
        asm!("movdqu xmm0, [{}]", in(reg) end - 8, out("xmm0") _);
    }
    let _ = (value, queue.index);
    t.report("m4", "atomics_and_sse", None, Verdict::Rejected, "rejected");
    Ok(())
}

/// M8: a doorbell of another width, or with a value that is no queue's.
fn doorbells(t: &Target) -> Outcome {
    let doorbell = t.device.base + reg::QUEUE_NOTIFY;
    for (what, width, value) in [
        ("width_1", 1, 0),
        ("width_2", 2, 0),
        ("width_8", 8, 0),
        ("width_8_and_more", 8, 1 << 32),
        ("value_63", 4, 63),
        ("value_0xffff", 4, 0xffff),
        ("value_0x10000", 4, 0x1_0000),
        ("value_largest", 4, 0xffff_ffff),
    ] {
        let number = t.served();
        let mut queue = t.up(number, 0)?;
        // Behind what a device looks at by itself when it comes up.
        let mut verdict = Verdict::Rejected;
        if queue.round_trip(&t.parts(), PATIENCE_US).is_err() {
            verdict = Verdict::Broken;
        }
        // Its own doorbell may be heard once more, when there is nothing.
        clock::delay_us(MOMENT_US);
        queue.chain(0, &t.parts());
        queue.offer(0);
        // Queue 0's is the value 0, at the width of 4 alone.
        write(doorbell, width, value);
        if clock::wait_until(MOMENT_US, || queue.poll().is_some()) {
            verdict = Verdict::Used;
        } else if t.see(&mut queue) != Verdict::Used {
            verdict = Verdict::Broken;
        }
        t.report("m8", what, None, verdict, "rejected");
    }
    Ok(())
}
