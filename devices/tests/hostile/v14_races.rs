//! V14: another vCPU rewrites descriptors, rings, tables and headers while they are read. What was checked
//! is what is used: nothing is written outside of RAM, and the device works after a reset.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::bench::{Bench, Case, SIZE, Verdict};
use crate::driver::{HIGH, INDIRECT, LOW, NEXT, Ring, WRITE};
use crate::kinds::{DATA, HEADER, Kind, RESPONSE};
use crate::v13_reset::nothing_is_written;

const RESET: &[Verdict] = &[Verdict::Reset];
const TABLE: u64 = HIGH.0 + 0x1_0000;
/// Rounds, or so long: the machine may be slow.
const ROUNDS: u32 = 300;
const MOMENT: Duration = Duration::from_millis(150);

/// Writes what is bad in one turn and good in the next.
type Scribble = fn(&Ring, u64);

const ADDRESSES: [u64; 8] = [
    DATA,
    HIGH.0 + HIGH.1 - 1,
    LOW.0 + LOW.1 - 8,
    u64::MAX - 1,
    HEADER,
    LOW.0 + LOW.1,
    RESPONSE,
    1 << 63,
];

const RACES: [(&str, Scribble); 5] = [
    ("descriptors", |ring, turn| {
        let bits = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let flags = [NEXT, WRITE, NEXT | WRITE, INDIRECT, 0][low(bits >> 8, 5)];
        let len = [1, 16, 512, u32::MAX, 0, 0x8000_0000][low(bits >> 12, 6)];
        let next = u16::try_from(bits >> 16 & 31).unwrap();
        let index = u16::try_from(turn % 4).unwrap();
        ring.write_desc(ring.desc, index, (ADDRESSES[low(bits, 8)], len, flags, next));
    }),
    ("addresses_and_lengths", |ring, turn| {
        // The chain stays one: what changes is where its parts are.
        let at = GuestAddress(ring.desc + 16 * (turn % 3));
        ring.mem.write_obj(ADDRESSES[low(turn / 3, 8)], at).unwrap();
        let len = [16u32, 512, 1, u32::MAX / 4][low(turn / 5, 4)];
        ring.mem.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
    }),
    ("headers", |ring, turn| {
        let bits = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let at = GuestAddress(HEADER + 4 * (turn % 12));
        let value = [0u32, 1, u32::MAX, low32(bits >> 32), 3, 0x10][low(turn / 12, 6)];
        ring.mem.write_obj(value, at).unwrap();
    }),
    ("available_ring", |ring, turn| {
        let slot = turn % u64::from(SIZE);
        let head = [0u16, 3, SIZE, u16::MAX][low(turn / 16, 4)];
        ring.mem.write_obj(head, GuestAddress(ring.avail + 4 + 2 * slot)).unwrap();
        if turn % 64 == 0 {
            let index = low32(turn).wrapping_mul(7) & 31;
            let index = u16::try_from(index).unwrap();
            ring.mem.write_obj(index, GuestAddress(ring.avail + 2)).unwrap();
        }
    }),
    ("indirect_table", |ring, turn| {
        let bits = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let flags = [NEXT, NEXT | WRITE, WRITE, 0][low(bits, 4)];
        let next = u16::try_from(bits >> 8 & 7).unwrap();
        let len = [16, 1, 512, u32::MAX][low(bits >> 4, 4)];
        let index = u16::try_from(turn % 4).unwrap();
        ring.write_desc(TABLE, index, (ADDRESSES[low(bits >> 16, 8)], len, flags, next));
    }),
];

/// The low part of `bits`, below `limit`.
fn low(bits: u64, limit: u64) -> usize {
    usize::try_from(bits % limit).unwrap()
}

fn low32(bits: u64) -> u32 {
    u32::try_from(bits & 0xffff_ffff).unwrap()
}

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let on = |queue| {
        RACES.map(|(what, scribble)| {
            let name = format!("v14_race_of_{what}");
            Case::on_queue(kind, queue, name, RESET, move |b| {
                race(b, queue, what == "indirect_table", scribble);
                nothing_is_written(b);
                Verdict::Reset
            })
            .allowing(4 << 20)
        })
    };
    (0..kind.queues().len()).flat_map(on).collect()
}

fn race(b: &mut Bench, queue: usize, is_indirect: bool, scribble: Scribble) {
    let stop = AtomicBool::new(false);
    let ring = b.rings[queue].clone();
    std::thread::scope(|scope| {
        // Whatever fails here, the other one stops.
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            let mut turn = 0u64;
            while !stop.load(Ordering::Relaxed) {
                scribble(&ring, turn);
                turn += 1;
            }
        });
        let end = Instant::now() + MOMENT;
        for round in 0..ROUNDS {
            if Instant::now() > end {
                break;
            }
            if b.is_latched() || round % u32::from(SIZE / 4) == 0 {
                b.up();
            }
            let buffers = b.honest(queue);
            match is_indirect {
                true => b.ring(queue).add_indirect(TABLE, &buffers),
                false => b.ring(queue).add(&buffers),
            };
            b.m.kick(&b.rings[queue]);
            b.settle();
        }
    });
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
