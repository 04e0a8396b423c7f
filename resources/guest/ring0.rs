//! What only ring 0 may do: port I/O, MSRs, CPUID, halting. Each is a naked function that `ud2` makes the gate in
//! `entry.s` call; a guest may bring its own.
//!
//! CPUID is here too although ring 3 may execute it: where ring 3 runs natively and untrapped it would see the host's.

use core::arch::{asm, naked_asm};

/// The service tag of `entry.s`.
const SERVICE: u64 = 0x6b73_7568;

/// A function the gate calls in ring 0: System V arguments and result, no SSE, no stack beyond a few words.
pub type Function = unsafe extern "C" fn();

/// The ring-0 function raised an exception, such as #GP for an MSR that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faulted;

/// Calls `function` in ring 0.
///
/// # Safety
/// `function` must keep to [`Function`]'s limits and must leave the address space and this stack as they are.
pub unsafe fn call(function: Function, a: u64, b: u64, c: u64) -> Result<u64, Faulted> {
    let result: u64;
    let faulted: u64;
    // SAFETY: the gate preserves what the System V convention preserves; the rest is declared here.
    unsafe {
        asm!(
            "ud2",
            inout("rax") function as usize => result,
            inout("rdi") a => _,
            inout("rsi") b => _,
            inout("rdx") c => _,
            inout("r11") SERVICE => faulted,
            out("rcx") _, out("r8") _, out("r9") _, out("r10") _,
        );
    }
    if faulted == 0 { Ok(result) } else { Err(Faulted) }
}

/// Sends bytes to an I/O port by one `rep outsb`.
pub fn out_bytes(port: u16, bytes: &[u8]) {
    #[unsafe(naked)]
    unsafe extern "C" fn outsb() {
        naked_asm!("mov rcx, rdx", "mov edx, edi", "rep outsb", "ret")
    }
    let (start, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
    // SAFETY: reads `bytes` only.
    let _ = unsafe { call(outsb, port.into(), start, len) };
}

/// Fills `bytes` from an I/O port by one `rep insb`.
pub fn in_bytes(port: u16, bytes: &mut [u8]) {
    #[unsafe(naked)]
    unsafe extern "C" fn insb() {
        naked_asm!("xchg rdi, rsi", "mov rcx, rdx", "mov edx, esi", "rep insb", "ret")
    }
    let (start, len) = (bytes.as_mut_ptr() as u64, bytes.len() as u64);
    // SAFETY: writes `bytes` only.
    let _ = unsafe { call(insb, port.into(), start, len) };
}

pub fn in8(port: u16) -> u8 {
    #[unsafe(naked)]
    unsafe extern "C" fn inb() {
        naked_asm!("mov edx, edi", "xor eax, eax", "in al, dx", "ret")
    }
    // SAFETY: touches no memory.
    unsafe { call(inb, port.into(), 0, 0) }.map_or(0xff, |v| v as u8)
}

pub fn in16(port: u16) -> u16 {
    #[unsafe(naked)]
    unsafe extern "C" fn inw() {
        naked_asm!("mov edx, edi", "xor eax, eax", "in ax, dx", "ret")
    }
    // SAFETY: touches no memory.
    unsafe { call(inw, port.into(), 0, 0) }.map_or(0xffff, |v| v as u16)
}

pub fn in32(port: u16) -> u32 {
    #[unsafe(naked)]
    unsafe extern "C" fn inl() {
        naked_asm!("mov edx, edi", "in eax, dx", "ret")
    }
    // SAFETY: touches no memory.
    unsafe { call(inl, port.into(), 0, 0) }.map_or(u32::MAX, |v| v as u32)
}

pub fn out8(port: u16, value: u8) {
    #[unsafe(naked)]
    unsafe extern "C" fn outb() {
        naked_asm!("mov edx, edi", "mov eax, esi", "out dx, al", "ret")
    }
    // SAFETY: touches no memory.
    let _ = unsafe { call(outb, port.into(), value.into(), 0) };
}

pub fn out16(port: u16, value: u16) {
    #[unsafe(naked)]
    unsafe extern "C" fn outw() {
        naked_asm!("mov edx, edi", "mov eax, esi", "out dx, ax", "ret")
    }
    // SAFETY: touches no memory.
    let _ = unsafe { call(outw, port.into(), value.into(), 0) };
}

pub fn out32(port: u16, value: u32) {
    #[unsafe(naked)]
    unsafe extern "C" fn outl() {
        naked_asm!("mov edx, edi", "mov eax, esi", "out dx, eax", "ret")
    }
    // SAFETY: touches no memory.
    let _ = unsafe { call(outl, port.into(), value.into(), 0) };
}

pub fn rdmsr(index: u32) -> Result<u64, Faulted> {
    #[unsafe(naked)]
    unsafe extern "C" fn read() {
        naked_asm!("mov ecx, edi", "rdmsr", "shl rdx, 32", "or rax, rdx", "ret")
    }
    // SAFETY: touches no memory.
    unsafe { call(read, index.into(), 0, 0) }
}

/// # Safety
/// The MSR must not be one that Rust code depends on (EFER, FS base, ...).
pub unsafe fn wrmsr(index: u32, value: u64) -> Result<(), Faulted> {
    #[unsafe(naked)]
    unsafe extern "C" fn write() {
        naked_asm!("mov ecx, edi", "mov eax, esi", "shr rsi, 32", "mov edx, esi", "wrmsr", "ret")
    }
    // SAFETY: the caller's promise.
    unsafe { call(write, index.into(), value, 0) }.map(|_| ())
}

/// EAX, EBX, ECX, EDX of a CPUID leaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    #[unsafe(naked)]
    unsafe extern "C" fn leaf_into() {
        naked_asm!(
            "push rbx",
            "mov r8, rdx",
            "mov eax, edi",
            "mov ecx, esi",
            "cpuid",
            "mov [r8], eax",
            "mov [r8 + 4], ebx",
            "mov [r8 + 8], ecx",
            "mov [r8 + 12], edx",
            "pop rbx",
            "ret",
        )
    }
    let mut registers = [0u32; 4];
    let into = registers.as_mut_ptr() as u64;
    // SAFETY: writes the 16 bytes of `registers`.
    let _ = unsafe { call(leaf_into, leaf.into(), subleaf.into(), into) };
    registers
}

/// Control register 0, 2, 3 or 4; anything else reads 0.
pub fn control_register(number: u32) -> u64 {
    #[unsafe(naked)]
    unsafe extern "C" fn read() {
        naked_asm!(
            "xor eax, eax",
            "cmp edi, 0",
            "jne 2f",
            "mov rax, cr0",
            "2: cmp edi, 2",
            "jne 3f",
            "mov rax, cr2",
            "3: cmp edi, 3",
            "jne 4f",
            "mov rax, cr3",
            "4: cmp edi, 4",
            "jne 5f",
            "mov rax, cr4",
            "5: ret",
        )
    }
    // SAFETY: touches no memory.
    unsafe { call(read, number.into(), 0, 0) }.unwrap_or(0)
}

/// Halts with interrupts on until the next interrupt.
pub fn wait_for_interrupt() {
    #[unsafe(naked)]
    unsafe extern "C" fn wait() {
        naked_asm!("sti", "hlt", "cli", "ret")
    }
    // SAFETY: the interrupt path uses this same stack and leaves it balanced.
    let _ = unsafe { call(wait, 0, 0, 0) };
}

/// Halts for good, interrupts off.
pub fn halt() -> ! {
    #[unsafe(naked)]
    unsafe extern "C" fn stop() {
        naked_asm!("2: cli", "hlt", "jmp 2b")
    }
    loop {
        // SAFETY: never returns.
        let _ = unsafe { call(stop, 0, 0, 0) };
    }
}

/// Turns interrupts on in ring 3.
pub fn enable_interrupts() {
    #[unsafe(naked)]
    unsafe extern "C" fn set_if() {
        // Above our return address lie RIP, CS and RFLAGS of the ring-3 caller.
        naked_asm!("or qword ptr [rsp + 24], 0x200", "ret")
    }
    // SAFETY: changes the caller's interrupt flag only.
    let _ = unsafe { call(set_if, 0, 0, 0) };
}

/// Turns interrupts off in ring 3.
pub fn disable_interrupts() {
    #[unsafe(naked)]
    unsafe extern "C" fn clear_if() {
        naked_asm!("and qword ptr [rsp + 24], -513", "ret")
    }
    // SAFETY: changes the caller's interrupt flag only.
    let _ = unsafe { call(clear_if, 0, 0, 0) };
}
