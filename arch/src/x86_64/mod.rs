//! x86-64.
pub(crate) mod acpi;
pub(crate) mod boot;
mod compat;
pub(crate) mod cpu_config;
pub(crate) mod cpuid;
pub(crate) mod error;
pub(crate) mod kernel;
pub mod layout;
pub(crate) mod mptable;
mod raw;
pub(crate) mod regs;
pub(crate) mod state;
pub(crate) mod template;
pub(crate) mod vcpu;
