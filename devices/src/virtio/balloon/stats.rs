//! What the guest tells of its memory (virtio 1.2, 5.5.6.4). All of it is hearsay: the guest's
//! driver may say what it likes.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::virtio::chain::Readable;

/// A tag of 16 bits and a value of 64, both little-endian, without padding.
const ENTRY_BYTES: usize = 10;
/// More than any driver has to say: 16 tags are known.
const MAX_BYTES: u64 = 64 * ENTRY_BYTES as u64;

/// Makes a type of a list of tags, so that a tag has one line.
macro_rules! statistics {
    ($($tag:literal $name:ident: $about:literal,)+) => {
        /// What the guest has told of its memory. What it has not, is not shown.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
        pub struct GuestStatistics {
            $(
                #[doc = $about]
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )+
        }

        impl GuestStatistics {
            /// Takes one value; false if the tag is not known.
            fn set(&mut self, tag: u16, value: u64) -> bool {
                match tag {
                    $($tag => self.$name = Some(value),)+
                    _ => return false,
                }
                true
            }
        }
    };
}

// Up to 9: virtio 1.2, 5.5.6.4.3. The others are those of Linux since 6.12
// (include/uapi/linux/virtio_balloon.h).
statistics! {
    0 swap_in: "Bytes swapped in.",
    1 swap_out: "Bytes swapped out.",
    2 major_faults: "Page faults that had to wait for a disk.",
    3 minor_faults: "Page faults that had not.",
    4 free_memory: "Bytes not in use at all.",
    5 total_memory: "Bytes in all.",
    6 available_memory: "Bytes that programs could have without swapping, as the guest sees it.",
    7 disk_caches: "Bytes that could be had at once without writing anything, mostly caches of files.",
    8 hugetlb_allocations: "Huge pages allocated.",
    9 hugetlb_failures: "Huge pages that could not be allocated.",
    10 oom_kill: "Processes killed for want of memory.",
    11 alloc_stall: "Allocations that had to wait for memory.",
    12 async_scan: "Pages looked at in the background.",
    13 direct_scan: "Pages looked at by whoever wanted memory.",
    14 async_reclaim: "Pages reclaimed in the background.",
    15 direct_reclaim: "Pages reclaimed by whoever wanted memory.",
}

/// What `GET /balloon/statistics` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "BalloonStats")]
pub struct Statistics {
    /// 4 KiB pages that the balloon is to hold.
    pub target_pages: u32,
    /// 4 KiB pages that it holds, as the guest says.
    pub actual_pages: u32,
    /// MiB that the balloon is to hold.
    pub target_mib: u32,
    /// MiB that it holds.
    pub actual_mib: u32,
    /// What the guest has told.
    #[serde(flatten)]
    pub guest: GuestStatistics,
}

/// A buffer that is no list of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl GuestStatistics {
    /// Takes over all that a buffer says; how many of its tags are not known. What the guest says
    /// nothing of stays. A malformed buffer changes nothing.
    pub(super) fn update(&mut self, mut from: Readable<'_>) -> Result<u64, Malformed> {
        let is_list = from.len().is_multiple_of(ENTRY_BYTES as u64);
        if !is_list || from.is_empty() || from.len() > MAX_BYTES {
            return Err(Malformed);
        }
        let mut said = self.clone();
        let mut unknown: u64 = 0;
        while !from.is_empty() {
            let (mut tag, mut value) = ([0; 2], [0; 8]);
            from.read(&mut tag).and_then(|()| from.read(&mut value)).map_err(|_| Malformed)?;
            let is_known = said.set(u16::from_le_bytes(tag), u64::from_le_bytes(value));
            unknown = unknown.saturating_add((!is_known).into());
        }
        *self = said;
        Ok(unknown)
    }
}
