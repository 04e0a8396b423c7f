//! Runtime of a bare-metal guest: from either boot protocol's entry point to a Rust function in ring 3, with a serial
//! console, the boot information, ACPI, a clock and a virtio-mmio driver around it.
//!
//! It knows nothing of a particular monitor: addresses come from the boot information, ACPI and the command line.
#![no_std]

pub mod acpi;
pub mod block;
pub mod boot;
mod builtins;
pub mod clock;
pub mod console;
pub mod cpu;
pub mod interrupts;
pub mod memory;
pub mod options;
pub mod power;
pub mod ring0;
pub mod virtio;

use core::arch::global_asm;
use core::fmt;
use core::panic::PanicInfo;

pub use boot::BootInfo;
use console::Text;

global_asm!(include_str!("entry.s"), options(att_syntax));

/// Makes `$run`, a `fn(&'static BootInfo) -> Outcome`, the guest's main program.
#[macro_export]
macro_rules! entry {
    ($run:path) => {
        #[unsafe(no_mangle)]
        fn guest_main(boot: &'static $crate::BootInfo) -> $crate::Outcome {
            $run(boot)
        }
    };
}

/// Returns from the enclosing function with a [`Failure`] that says the formatted text.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => {
        return Err($crate::Failure::new(format_args!($($arg)*)))
    };
}

/// Fails unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($arg:tt)*) => {
        if !$condition {
            $crate::fail!($($arg)*);
        }
    };
}

/// What the main program ends with; printed as `RESULT ok` or `RESULT fail: why`.
pub type Outcome = Result<(), Failure>;

/// Why a guest failed, in words.
#[derive(Debug)]
pub struct Failure(Text<112>);

impl Failure {
    pub fn new(args: fmt::Arguments) -> Self {
        let mut text = Text::new();
        text.push(args);
        Self(text)
    }
}

unsafe extern "Rust" {
    fn guest_main(boot: &'static BootInfo) -> Outcome;
}

/// Entered from `entry.s`, in ring 3 with interrupts off.
///
/// # Safety
/// `info` is what the loader passed: hvm_start_info for protocol 0, boot_params for 1.
#[unsafe(no_mangle)]
unsafe extern "C" fn ring3_start(info: u64, protocol: u32) -> ! {
    interrupts::fill_idt();
    // SAFETY: the caller's promise is the one `read` asks for.
    let boot = unsafe { boot::read(info, protocol) };
    memory::init(boot);
    // SAFETY: `entry!` defines the function with this very signature.
    let outcome = unsafe { guest_main(boot) };
    finish(outcome)
}

/// Prints the result line and powers off.
pub fn finish(outcome: Outcome) -> ! {
    match outcome {
        Ok(()) => println!("RESULT ok"),
        Err(Failure(why)) => println!("RESULT fail: {}", why.as_str()),
    }
    power::poweroff()
}

/// A fault of ring 3 arrives here, on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn ring3_fault(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    finish(Err(Failure::new(format_args!(
        "exception {vector} error {error:#x} at {rip:#x} cr2 {cr2:#x}"
    ))))
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("{info}");
    finish(Err(Failure::new(format_args!("panic"))))
}
