//! The main thread's stack, which keeps what was once deep.
#![expect(unsafe_code, reason = "tells the kernel which pages nobody has")]
use rustix::mm::{Advice, madvise};

const PAGE: usize = 4096;
/// A start goes less deep than this.
const DEPTH: usize = 32 * PAGE;

/// Gives the kernel back what lies below the frame of the caller: pages of calls that have returned. Nothing
/// happens on other threads, whose stacks end sooner.
#[inline(never)]
pub fn give_back() {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return;
    }
    let here = 0_u8;
    // The page of this frame stays, and the one below it, where the call below has its own.
    let end = (std::ptr::from_ref(&here).addr() & !(PAGE - 1)).saturating_sub(PAGE);
    let start = std::ptr::without_provenance_mut(end.saturating_sub(DEPTH));
    // SAFETY: below the main thread's stack pointer, past a page that the call here fits in, is what calls have left
    // that have returned, and further down nothing: the kernel keeps a gap below that stack, larger than DEPTH, in
    // which it places no mapping. It says ENOMEM of that part, having done the rest.
    let _ = unsafe { madvise(start, DEPTH, Advice::LinuxDontNeed) };
}
