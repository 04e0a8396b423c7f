//! V16: frames that are none, headers that lie, and buffers that hold nothing.
use rustix::net::{SendFlags, send};

use crate::bench::{Bench, Case, Verdict};
use crate::driver::HIGH;
use crate::kinds::{DATA, HEADER, Kind, frame};

const USED0: &[Verdict] = &[Verdict::Used0];
const HELD: &[Verdict] = &[Verdict::Held];
const BIG: u64 = HIGH.0 + 0x2_0000;

/// Bytes of a chain, the header of 12 included, and whether that is a frame.
const LENGTHS: [(u32, bool); 14] = [
    (0, false),
    (1, false),
    (11, false),
    (12, false),
    (13, false),
    (24, false),
    (25, false),
    (26, true),
    (72, true),
    (1526, true),
    (65562, true),
    (65563, false),
    (0x1_ffff, false),
    (0xd_0000, false),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    if !kind.is_net() {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for (len, is_frame) in LENGTHS {
        cases.push(Case::on_queue(kind, 1, format!("v16_frame_of_{len}"), USED0, move |b| {
            let malformed = b.m.counter("tx_malformed_frames");
            b.write(BIG, &frame(60));
            let verdict = b.send(1, &[(BIG, len, false)]);
            b.settle();
            let counted = b.m.counter("tx_malformed_frames") - malformed;
            assert_eq!(counted, u64::from(!is_frame), "it is dropped and counted");
            verdict
        }));
    }
    for (what, at, bytes) in [
        ("all_flags", 0, &[0xff][..]),
        ("unknown_gso", 1, &[0x7f]),
        ("gso_without_size", 1, &[1, 54, 0, 0, 0]),
        ("header_longer_than_the_frame", 1, &[1, 0xff, 0xff, 0xff, 0xff]),
        ("checksum_behind_the_end", 0, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        ("checksum_that_wraps", 0, &[1, 0, 0, 0, 0, 0, 0xfe, 0xff, 2, 0]),
        ("buffers_claimed", 10, &[0xff, 0xff]),
        ("all_ones", 0, &[0xff; 12]),
    ] {
        cases.push(Case::on_queue(kind, 1, format!("v16_header_{what}"), USED0, move |b| {
            b.write(HEADER, &frame(60));
            b.write(HEADER + at, bytes);
            b.send(1, &[(HEADER, 72, false)])
        }));
    }
    cases.push(Case::on_queue(kind, 1, "v16_frame_in_1024_pieces", USED0, |b| {
        b.write(BIG, &[0; 4096]);
        let buffers: Vec<_> = (0..1024).map(|i| (BIG + i, 1, false)).collect();
        b.ring(1).add_indirect(DATA + 0x4_0000, &buffers);
        b.kick_and_see(1)
    }));
    for len in [0, 1, 11] {
        let name = format!("v16_receive_into_{len}");
        cases.push(Case::on_queue(kind, 0, name, USED0, move |b| {
            let bad = b.m.counter("rx_bad_buffers");
            flood(b, 1);
            let verdict = b.send_for_what_comes(0, &[(DATA, len, true)]);
            b.settle();
            assert_eq!(b.m.counter("rx_bad_buffers"), bad + 1);
            verdict
        }));
    }
    for len in [12, 13, 25, 71] {
        // With merged buffers, what is too short for a frame alone waits for more.
        let name = format!("v16_receive_into_{len}_too_few");
        cases.push(Case::on_queue(kind, 0, name, &[Verdict::Held, Verdict::Used0], move |b| {
            b.write(DATA, &[0x11; 0x200]);
            flood(b, 1);
            let verdict = b.send(0, &[(DATA, len, true)]);
            let behind: [u8; 16] = b.read(DATA + u64::from(len));
            assert_eq!(behind, [0x11; 16], "bytes behind the buffer");
            verdict
        }));
    }
    cases.push(Case::on_queue(kind, 0, "v16_never_posts_buffers", HELD, |b| {
        for _ in 0..200 {
            flood(b, 8);
            b.kick_and_settle(0);
        }
        assert_eq!(b.ring(0).used_idx(), 0);
        Verdict::Held
    }));
    cases.push(Case::on_queue(kind, 0, "v16_only_readable_buffers", USED0, |b| {
        flood(b, 1);
        b.send_for_what_comes(0, &[(DATA, 4096, false)])
    }));
    cases
}

/// The host sends frames, as many as there is room for.
fn flood(b: &Bench, count: usize) {
    for _ in 0..count {
        // A full wire loses them.
        let _ = send(b.peer(), &frame(60), SendFlags::DONTWAIT);
    }
}
