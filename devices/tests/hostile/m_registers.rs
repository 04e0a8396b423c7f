//! M1, M2, M8: registers and configuration space at every offset and width, and doorbells that are
//! rung in the wrong way.
use crate::bench::{Bench, Case, REJECTED, Verdict};
use crate::kinds::Kind;

const WIDTHS: [usize; 4] = [1, 2, 4, 8];
/// Registers, and the first of the configuration space.
const OFFSETS: u64 = 0x200;
/// What is written: 0, 1, all ones, and something.
const VALUES: [(&str, [u8; 8]); 4] = [
    ("0", [0; 8]),
    ("1", [1, 0, 0, 0, 0, 0, 0, 0]),
    ("ones", [0xff; 8]),
    ("random", [0x5a, 0xc3, 0x17, 0x88, 0x6d, 0xf1, 0x2e, 0x94]),
];
/// Reads as nothing at any width but 4, or unaligned (4.2.2.2).
const CONFIG: u64 = 0x100;
const STATUS: u64 = 0x70;

pub(crate) fn m1(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for is_live in [false, true] {
        let stage = if is_live { "live" } else { "reset" };
        for width in WIDTHS {
            let name = format!("m1_read_width_{width}_{stage}");
            cases.push(Case::on(kind, name, REJECTED, move |b| {
                prepare(b, is_live);
                for offset in 0..OFFSETS {
                    read(b, offset, width);
                }
                Verdict::Rejected
            }));
            for (what, value) in VALUES {
                let name = format!("m1_write_{what}_width_{width}_{stage}");
                cases.push(Case::on(kind, name, REJECTED, move |b| {
                    for offset in 0..OFFSETS {
                        prepare(b, is_live);
                        write(b, offset, &value[..width], is_live);
                    }
                    Verdict::Rejected
                }));
            }
        }
    }
    cases
}

fn prepare(b: &mut Bench, is_live: bool) {
    match is_live {
        true if b.m.status() != 15 => b.up(),
        true => {}
        false => b.m.set(0x70, 0),
    }
}

fn read(b: &Bench, offset: u64, width: usize) {
    let mut data = vec![0xaa; width];
    b.m.device().0.read(offset, &mut data);
    let is_register = width == 4 && offset.is_multiple_of(4);
    if offset < CONFIG && !is_register {
        assert_eq!(data, vec![0; width], "{offset:#x}");
    }
}

fn write(b: &Bench, offset: u64, value: &[u8], is_live: bool) {
    let status = b.m.status();
    b.m.device().0.write(offset, value);
    // A live device changes by its status register only.
    if is_live && offset != STATUS {
        assert_eq!(b.m.status(), status, "{offset:#x} {value:x?}");
    }
    if value.len() != 4 || !offset.is_multiple_of(4) {
        assert_eq!(b.m.status(), status, "{offset:#x} {value:x?} has an effect");
    }
}

pub(crate) fn m2(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, at) in [
        ("start", Place::At(0)),
        ("start_plus_1", Place::At(1)),
        ("end_less_1", Place::FromEnd(-1)),
        ("end", Place::FromEnd(0)),
        ("end_plus_1", Place::FromEnd(1)),
        ("offset_0xdff", Place::At(0xdff)),
        ("end_of_the_window", Place::At(0xef8)),
    ] {
        let name = format!("m2_config_read_{what}");
        cases.push(Case::on(kind, name, REJECTED, move |b| {
            let whole = b.m.config(0, 256);
            for width in WIDTHS {
                let at = at.in_space(&whole);
                let seen = b.m.config(u64::try_from(at).unwrap(), width);
                let expected: Vec<u8> =
                    (at..at + width).map(|i| whole.get(i).copied().unwrap_or(0)).collect();
                assert_eq!(seen, expected, "{at}+{width}");
            }
            Verdict::Rejected
        }));
        for (value, bytes) in VALUES {
            let name = format!("m2_config_write_{value}_{what}");
            cases.push(Case::on(kind, name, REJECTED, move |b| {
                let whole = b.m.config(0, 256);
                let at = at.in_space(&whole);
                for width in WIDTHS {
                    let offset = 0x100 + u64::try_from(at).unwrap();
                    b.m.device().0.write(offset, &bytes[..width]);
                }
                let after = b.m.config(0, 256);
                // `actual`, which is the driver's to write, is the second word of a balloon's.
                let is_writable = |i: usize| b.kind == Kind::Balloon && (4..8).contains(&i);
                for (i, (was, is)) in whole.iter().zip(&after).enumerate() {
                    assert!(was == is || is_writable(i), "byte {i} was {was}, is {is}");
                }
                b.m.device().0.write(0x104, &whole[4..8]);
                Verdict::Rejected
            }));
        }
    }
    cases
}

#[derive(Clone, Copy)]
enum Place {
    At(usize),
    FromEnd(isize),
}

impl Place {
    fn in_space(self, whole: &[u8]) -> usize {
        let end = whole.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        match self {
            Self::At(at) => at,
            Self::FromEnd(by) => end.saturating_add_signed(by),
        }
    }
}

/// In the VMM a doorbell is an ioeventfd of 4 bytes and one value; what does not match comes here.
pub(crate) fn m8(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for width in [1, 2, 8] {
        let name = format!("m8_doorbell_width_{width}");
        cases.push(Case::on(kind, name, REJECTED, move |b| {
            for queue in 0..b.rings.len() {
                let buffers = b.honest(queue);
                b.ring(queue).add(&buffers);
            }
            for value in [0, 1, u64::MAX] {
                b.m.device().0.write(0x50, &value.to_le_bytes()[..width]);
            }
            // What a device that has just come up looks at by itself is none of the doorbell's.
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        }));
    }
    for value in [64u32, 0xff, 0x100, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
        let name = format!("m8_doorbell_value_{value:#x}");
        cases.push(Case::on(kind, name, REJECTED, move |b| {
            b.settle();
            for _ in 0..100 {
                b.m.set(0x50, value);
            }
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        }));
    }
    for offset in [0x4f, 0x51, 0x52, 0x53] {
        let name = format!("m8_doorbell_at_{offset:#x}");
        cases.push(Case::on(kind, name, REJECTED, move |b| {
            for width in WIDTHS {
                b.m.device().0.write(offset, &[0; 8][..width]);
            }
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        }));
    }
    cases
}
