//! V3: buffers that are not RAM, or are something else as well. Each buffer of a request that is in
//! order in its turn.
use crate::bench::{ANY, ANY_END, Case, FAILED, Verdict};
use crate::driver::{ACPI, COMMAND_LINE, HIGH, LOW, Machine, OWN};
use crate::kinds::Kind;

const END: u64 = HIGH.0 + HIGH.1;

/// No byte, or not every byte of 4 or more at these is RAM.
const NOT_RAM: [(&str, u64); 16] = [
    ("end_of_ram", END),
    ("end_of_ram_less_1", END - 1),
    ("end_of_ram_plus_1", END + 1),
    ("hole", LOW.0 + LOW.1),
    ("hole_less_1", LOW.0 + LOW.1 - 1),
    ("middle_of_hole", LOW.0 + LOW.1 + 0x8_0000),
    ("hole_to_ram", HIGH.0 - 1),
    ("window_of_acpi", ACPI),
    ("window_of_command_line", COMMAND_LINE + 0x50),
    ("local_apic", 0xfee0_0000),
    ("below_4_gib", 0xffff_fffe),
    ("wraps", u64::MAX - 1),
    ("largest", u64::MAX),
    ("top_bit", 1 << 63),
    ("negative_ram", HIGH.0.wrapping_neg()),
    ("high_bits", HIGH.0 | 1 << 48),
];

/// An address that depends on the queue.
type OfQueue = fn(u16) -> u64;

/// RAM, or what a device brings along, to which a request may do what the driver could do itself.
const OTHER: [(&str, OfQueue); 8] = [
    ("address_0", |_| 0),
    ("own_descriptors", ring_base),
    ("own_available", |queue| ring_base(queue) + 0x2000),
    ("own_used", |queue| ring_base(queue) + 0x3000),
    ("next_queues_descriptors", |queue| ring_base(queue + 1)),
    ("next_queues_used", |queue| ring_base(queue + 1) + 0x3000),
    ("devices_own_memory", |_| OWN.0),
    ("end_of_devices_own_memory", |_| OWN.0 + (256 << 20) - 1),
];

/// Where [`crate::driver::Ring::new`] puts the rings of a queue.
fn ring_base(queue: u16) -> u64 {
    0x1_0000 + u64::from(queue) * 0x4000
}

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    // How many buffers a request has, a device tells that is there.
    let m = Machine::new(crate::samples::sample(kind.sample()).device);
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        for part in 0..kind.honest(&m, queue).len() {
            let mut add = |what: &str, addr: u64, expected| {
                let name = format!("v03_addr_{what}_in_buffer_{part}");
                cases.push(Case::on_queue(kind, queue, name, expected, move |b| {
                    let mut buffers = b.honest(queue);
                    buffers[part].0 = addr;
                    b.send(queue, &buffers)
                }));
            };
            for (what, addr) in NOT_RAM {
                add(what, addr, not_ram(kind, queue, part));
            }
            for (what, addr) in OTHER {
                add(what, addr(u16::try_from(queue).unwrap()), ANY);
            }
        }
    }
    cases
}

fn not_ram(kind: Kind, queue: usize, part: usize) -> &'static [Verdict] {
    match (kind, queue) {
        // Where the status can be written, it is.
        _ if kind.is_block() && part < 2 => &[Verdict::IoErr],
        // One byte, which is RAM at the last address before an end.
        _ if kind.is_block() => ANY_END,
        // Not looked at: the driver may do with its pages what it likes.
        (Kind::Balloon, 1) => ANY_END,
        _ => FAILED,
    }
}
