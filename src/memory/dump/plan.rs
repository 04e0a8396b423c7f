//! What of guest memory is copied, and how the copy differs from it.
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::PAGE;
use crate::snapshot::{Compression, Extent};

/// A piece of guest memory to copy.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Where it is in this process.
    pub(crate) host: u64,
    /// Bytes, a multiple of the page size.
    pub(crate) len: u64,
    /// Where it begins in the image.
    pub(crate) start: u64,
    /// What is behind pages that this process has not written: an image that is mapped privately.
    pub(crate) base: Option<Arc<[Extent]>>,
    /// Which pages of the image have zeroes over them, a bit each: nothing, if none have.
    pub(crate) vacated: Vec<u64>,
}

/// What is copied, and how it gets into a file.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) patch: Patch,
    pub(crate) target: &'a File,
    pub(crate) compression: Compression,
}

/// Which pages are copied.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    /// All that are not zero.
    Full,
    /// Those that have changed since another snapshot.
    Changes(Changes),
}

/// What has changed since another snapshot, and how that is written.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    /// The pages of the image that have changed, a bit each. `None` if nobody has kept a record: then it
    /// is those that this process has written at all.
    pub(crate) pages: Option<Vec<u64>>,
    /// What was not zero in the other snapshot.
    pub(crate) before: Arc<[Extent]>,
    /// Pages that are looked at if they have not changed, so that the other snapshot can be told by
    /// them: their places in the image, in order.
    pub(crate) witnesses: Vec<u64>,
    /// What becomes of pages that are zero now, and were not.
    pub(crate) zeroes: Zeroes,
}

/// What becomes of pages that have become zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeroes {
    /// They are written, so that whoever copies what is in the file copies them.
    Written,
    /// The table of extents has them.
    Told,
}

/// What is put over the guest's memory in the copy: a place in the image, and bytes within one page.
#[derive(Clone, Debug)]
pub(crate) struct Patch {
    pub(crate) at: u64,
    pub(crate) bytes: [u8; 16],
    /// Whole pages of the image that are left zero, whatever the guest has there.
    pub(crate) blank: Range<u64>,
}

impl Patch {
    /// Which of `count` pages from `start` are left zero, a bit each.
    pub(super) fn blank_pages(&self, start: u64, count: usize) -> u64 {
        if self.blank.end <= start || start + (count * PAGE) as u64 <= self.blank.start {
            return 0;
        }
        let pages = (0..count).zip((start..).step_by(PAGE));
        pages.filter(|(_, at)| self.blank.contains(at)).fold(0, |bits, (n, _)| bits | 1 << n)
    }
}
