//! What fuzzing needs of this crate besides its interface. Only there with `--cfg fuzzing`: tests/fuzz.
use crate::layout;

/// Where a kernel must not lie: there come boot structures, from the first address to before the second.
pub const RESERVED: [(u64, u64); 2] =
    [(0, layout::LOW_RAM_FREE), (layout::MP_TABLE, layout::HIGH_RAM)];
