//! The hostile-guest suite without KVM: every row of the catalogue that a device answers for, against every
//! device, by a driver that does whatever it likes. `docs/hostile-guests.md` says what the rows are.
//!
//! A test is a row and a device. It prints each case with its verdict, and fails if that is not one that
//! the catalogue has, or if the device panicked, hung, spun, grew, wrote outside of RAM, or would not work
//! after a reset. `tests/asan` runs the same program under AddressSanitizer.
#![expect(clippy::indexing_slicing, reason = "a test that panics is a test that fails")]

mod allocator;
mod bench;
mod bugs;
mod count;
#[path = "../virtio/driver.rs"]
#[expect(dead_code, reason = "shared with the tests of each device")]
mod driver;
mod health;
mod kinds;
mod legacy;
mod m_registers;
#[path = "../virtio/samples.rs"]
#[expect(dead_code, reason = "shared with the tests of each device")]
mod samples;
mod v01_chains;
mod v02_indirect;
mod v03_addresses;
mod v04_lengths;
mod v05_directions;
mod v06_heads;
mod v07_avail;
mod v08_used;
mod v09_placement;
mod v10_ready;
mod v11_kicks;
mod v12_status;
mod v13_reset;
mod v14_races;
mod v15_block;
mod v16_net;
mod v17_vsock;
mod v18_memory;
mod watch;
mod zones;

use bench::Case;
use kinds::Kind;

/// A row of the catalogue: its cases for a device.
type Row = (&'static str, fn(Kind) -> Vec<Case>);

/// The rows that a virtio device answers for.
const ROWS: [Row; 21] = [
    ("V1", v01_chains::cases),
    ("V2", v02_indirect::cases),
    ("V3", v03_addresses::cases),
    ("V4", v04_lengths::cases),
    ("V5", v05_directions::cases),
    ("V6", v06_heads::cases),
    ("V7", v07_avail::cases),
    ("V8", v08_used::cases),
    ("V9", v09_placement::cases),
    ("V10", v10_ready::cases),
    ("V11", v11_kicks::cases),
    ("V12", v12_status::cases),
    ("V13", v13_reset::cases),
    ("V14", v14_races::cases),
    ("V15", v15_block::cases),
    ("V16", v16_net::cases),
    ("V17", v17_vsock::cases),
    ("V18", v18_memory::cases),
    ("M1", m_registers::m1),
    ("M2", m_registers::m2),
    ("M8", m_registers::m8),
];

fn attack(row: &str, kind: Kind) {
    let alone = bench::alone();
    let (_, cases) = ROWS.iter().find(|(id, _)| *id == row).unwrap();
    let cases = cases(kind);
    assert!(!cases.is_empty());
    bench::run(&alone, kind, &cases);
}

/// A test of each of these devices, by name.
macro_rules! tests {
    ($($module:ident $row:literal: $($test:ident $kind:ident),+;)+) => {$(
        mod $module {
            $(#[test]
            fn $test() {
                crate::attack($row, crate::kinds::Kind::$kind);
            })+
        }
    )+};
}

/// The same, of every device.
macro_rules! tests_of_all {
    ($($module:ident $row:literal)+) => {
        tests! {$(
            $module $row: block Block, block_async BlockAsync, block_limited BlockLimited,
                block_layered BlockLayered, mem Mem, net Net, net_metadata NetMetadata, pmem Pmem,
                rng Rng, vsock Vsock, balloon Balloon;
        )+}
    };
}

tests_of_all! {
    v01 "V1" v02 "V2" v03 "V3" v04 "V4" v05 "V5" v06 "V6" v07 "V7" v08 "V8" v09 "V9" v10 "V10"
    v11 "V11" v12 "V12" v13 "V13" v14 "V14" m1 "M1" m2 "M2" m8 "M8"
}

tests! {
    v15 "V15": block Block, block_async BlockAsync, block_limited BlockLimited,
        block_layered BlockLayered;
    v16 "V16": net Net, net_metadata NetMetadata;
    v17 "V17": vsock Vsock;
    v18 "V18": mem Mem, pmem Pmem, rng Rng, balloon Balloon;
}
