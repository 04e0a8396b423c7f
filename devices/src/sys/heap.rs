//! The C library's heap, which keeps what was freed.
#![expect(unsafe_code, reason = "calls the C library")]

/// Has all threads share one heap: each would begin one of its own with its first allocation, and
/// use next to nothing of it. Those that exist stay. For programs whose threads seldom allocate.
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number; glibc does so under its own lock.
    unsafe {
        // It fails for numbers that it does not know, and this is one of the oldest.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives the kernel back what is free: whole pages, wherever they lie. A few system calls.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: touches only what nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}
