//! The few devices of a PC that a kernel expects without being told: thin wrappers on vm-superio
//! where it has them.
pub mod acpi;
pub mod i8042;
pub mod rtc;
pub mod serial;
