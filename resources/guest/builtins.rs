//! The C functions the compiler calls by name. String instructions: ring 3 runs them natively, and no loop is there for
//! the compiler to turn back into a call of the same function.

use core::arch::asm;

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _);
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: `to` does not begin inside `from`, so forwards is right.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller's promise; backwards, from the last byte, as `to` begins inside `from`.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rdi") to.add(len).sub(1) => _,
            inout("rsi") from.add(len).sub(1) => _,
            inout("rcx") len => _,
        );
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _) };
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let (left, right): (u32, u32);
    // SAFETY: the caller's promise. After the scan the bytes before the pointers are the first that differ, or the
    // last ones; an empty range is equal.
    unsafe {
        asm!(
            "xor {left:e}, {left:e}",
            "xor {right:e}, {right:e}",
            "test rcx, rcx",
            "jz 2f",
            "repe cmpsb",
            "movzx {left:e}, byte ptr [rsi - 1]",
            "movzx {right:e}, byte ptr [rdi - 1]",
            "2:",
            left = out(reg) left,
            right = out(reg) right,
            inout("rsi") a => _,
            inout("rdi") b => _,
            inout("rcx") len => _,
        );
    }
    left as i32 - right as i32
}

/// # Safety
/// As BSD's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, len) }
}
