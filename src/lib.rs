//! husk is a KVM micro-VM monitor. This library is all of it; the binary is a thin shell.
//!
//! [`Vm`] is a running VM, [`VmConfig`] what it is made from. Several VMs live in one process
//! without knowing of each other. docs/design.md says how it is built.

mod api;
mod arrived;
mod attach;
mod bell;
mod boot;
pub mod cli;
mod config;
mod controller;
mod error;
mod events;
mod exit;
mod fork;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gate;
mod identity;
mod instance;
mod jail;
mod logger;
mod machine;
mod memory;
mod metrics;
mod outcome;
mod parts;
mod request;
mod sandbox;
mod signals;
mod snapshot;
mod takeover;
mod vcpu;
mod vm;
mod vmm;

pub use arch::{
    Bitmap, Capability, CpuConfig, CpuTemplate, CpuidModifier, MsrModifier, Number, Register,
    RegisterModifier,
};
pub use boot::BootPhases;
pub use config::{
    BootSource, DEMO_GUEST, Defaults, HugePages, LogLevel, LoggerConfig, MachineConfig,
    MetricsConfig, OnReboot, Payload, RateLimitGroup, SerialConfig, SerialTo, VCPUS_MAX, VmConfig,
};
pub use devices::backend::passed::Name;
pub use devices::limiter::{RateLimiter, TokenBucket};
pub use devices::mmds::{Config as MmdsConfig, Version as MmdsVersion};
pub use devices::virtio::{balloon, block, mem, net, pmem, rng, vsock};
pub use error::Refusal;
pub use events::{Event, Sink, What};
pub use exit::{Ending, ExitCode};
pub use fork::{CHILDREN_MAX, Child, ChildOverrides, ForkError, ForkParams, Forked, ImageSink};
pub use instance::{InstanceInfo, State};
pub use request::{Handle, Reply, Request};
pub use snapshot::{
    Compression, Image, LoadPages, LoadParams, MemoryBackend, MemoryBackendType, NetworkOverride,
    Overrides, RecordParams, Restore, RewindParams, SnapshotError, SnapshotParams, SnapshotType,
    VsockOverride,
};
pub use vm::Vm;

/// The README's program is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
