//! What husk knows of a processor architecture: where things lie in guest memory, how a kernel is
//! entered, what a vCPU starts with, which tables describe the machine.
//!
//! One architecture is one folder. The VMM uses the names re-exported here and no others:
//!
//! * [`layout`] — addresses of RAM, devices and boot structures;
//! * [`power_ports`] — what the ACPI tables say of the power and reset ports;
//! * [`Kernel::read`], [`Kernel::load`] — check an image, put it into RAM;
//! * [`Platform::write`] — describe the machine to the kernel, in every form it may look for;
//! * [`HostCpu::new`], [`HostCpu::configure`] — give a vCPU its identity and first registers;
//! * [`VcpuState`], [`VmState`] — everything KVM knows of a vCPU and of what they share;
//! * [`again`], [`extension`] — call KVM so that a signal or a failure is not taken for an answer;
//! * [`CpuConfig`], [`CpuTemplate`] — how a guest's CPU is to differ from the host's.

#[cfg(fuzzing)]
pub mod fuzzing;
mod kvm;
mod x86_64;

pub use kvm::{again, extension};
pub use x86_64::acpi::power_ports;
pub use x86_64::boot::{Initrd, Platform, VirtioMmio, check_cmdline};
pub use x86_64::cpu_config::{
    Bitmap, Capability, CpuConfig, CpuError, CpuidModifier, MsrModifier, Number, Register,
    RegisterModifier,
};
pub use x86_64::error::{BootError, FileError};
pub use x86_64::kernel::{Entry, Kernel, Protocol};
pub use x86_64::layout;
pub use x86_64::state::{Clock, StateError, VcpuState, VmState};
pub use x86_64::template::{CpuChoice, CpuTemplate};
pub use x86_64::vcpu::{HostCpu, SetupError, Topology};

/// Guest RAM as this crate sees it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
