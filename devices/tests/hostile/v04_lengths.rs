//! V4: lengths that are none, too little, or more than there is. No allocation goes by them.
use crate::bench::{ANY_END, Case, LATCHED, Verdict};
use crate::driver::Machine;
use crate::kinds::{DATA, Kind};

const LENGTHS: [u32; 12] =
    [0, 1, 3, 13, 511, 513, 0xffff, 0x1_0001, 0x7fff_ffff, 0x8000_0000, 0xffff_fff0, u32::MAX];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let m = Machine::new(crate::samples::sample(kind.sample()).device);
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        let honest = kind.honest(&m, queue);
        for part in 0..honest.len() {
            for len in LENGTHS {
                let others: u32 =
                    honest.iter().map(|buffer| buffer.1).sum::<u32>() - honest[part].1;
                let expected = match others.checked_add(len) {
                    None => LATCHED,
                    // A drive's header and data have one length that is good.
                    _ if kind.is_block() && part < 2 => &[Verdict::IoErr],
                    _ => ANY_END,
                };
                let name = format!("v04_len_{len:#x}_in_buffer_{part}");
                cases.push(Case::on_queue(kind, queue, name, expected, move |b| {
                    let mut buffers = b.honest(queue);
                    buffers[part].1 = len;
                    b.send(queue, &buffers)
                }));
            }
        }
        for (what, lens) in [
            ("two_halves", [0x8000_0000, 0x8000_0000]),
            ("largest_and_1", [u32::MAX, 1]),
            ("largest_twice", [u32::MAX; 2]),
        ] {
            for is_writable in [false, true] {
                let how = if is_writable { "writable" } else { "readable" };
                let name = format!("v04_sum_of_{what}_{how}");
                cases.push(Case::on_queue(kind, queue, name, LATCHED, move |b| {
                    b.send(queue, &lens.map(|len| (DATA, len, is_writable)))
                }));
            }
        }
    }
    cases
}
