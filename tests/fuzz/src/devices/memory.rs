//! Devices with memory of their own: virtio-mem and virtio-pmem.
use devices::virtio::model::VirtioDevice;
use serde_json::{Value, json};

use super::disk::{check_disk, disk};
use super::{limiter, open, s_of};
use crate::session::{Buffer, Model, Session};

/// virtio-mem.
#[derive(Debug)]
pub struct Mem;

impl Mem {
    const BLOCK: u64 = 2 << 20;

    /// The device.
    pub fn new() -> (Self, Box<dyn VirtioDevice>) {
        (Self, open("memory-hotplug", &json!({"total_size_mib": 256})))
    }
}

impl Model for Mem {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let how = s.input.u8();
        let kind = if how & 0x80 == 0 { u16::from(how & 3) } else { s.input.u16() };
        let addr = match how >> 2 & 3 {
            0..3 => crate::guest::OWN.0 + u64::from(s.input.u8()) * Self::BLOCK,
            _ => s.address(),
        };
        let blocks = if how & 0x40 == 0 { s.input.below(8).into() } else { s.input.u16() };
        let mut bytes = Vec::new();
        bytes.extend(kind.to_le_bytes());
        bytes.extend([0; 6]);
        bytes.extend(addr.to_le_bytes());
        bytes.extend(blocks.to_le_bytes());
        bytes.extend([0; 6]);
        let response = s_of(how >> 4, &[10, 10, 9, 64]);
        match s.input.below(8) {
            0 => (0, vec![Buffer::Out(bytes[..20].to_vec()), Buffer::In(response)]),
            // From or to memory that is plugged, or is not.
            1 => (0, vec![Buffer::At(s.address(), 24, false), Buffer::In(response)]),
            2 => (0, vec![Buffer::Out(bytes), Buffer::At(s.address(), 10, true)]),
            _ => (0, vec![Buffer::Out(bytes), Buffer::In(response)]),
        }
    }

    fn host(&mut self, s: &mut Session<'_>) {
        if s.input.below(4) == 0 {
            let json = s.input.piece();
            return s.patch(None, json);
        }
        let size = json!({"requested_size_mib": u32::from(s.input.below(130)) * 2});
        s.patch(None, size.to_string().as_bytes());
        let _ = s.machine.transport().show(None);
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        Some(Self::new().1)
    }
}

/// virtio-pmem.
#[derive(Debug)]
pub struct Pmem {
    config: Value,
    has_ended: bool,
}

impl Pmem {
    /// One of several kinds.
    pub fn new(kind: u8) -> (Self, Box<dyn VirtioDevice>) {
        let path = disk();
        let mut config = json!({"id": "p", "path_on_host": path, "read_only": kind & 1 != 0});
        if kind & 6 == 6 {
            config["rate_limiter"] = limiter();
        }
        let device = open("pmem", &config);
        (Self { config, has_ended: false }, device)
    }

    /// What holds when the device is gone.
    pub fn check(&self) {
        check_disk(self.config["read_only"] == Value::Bool(true));
    }
}

impl Model for Pmem {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let how = s.input.u8();
        let kind: u32 = if how & 1 == 0 { 0 } else { s.input.u32() };
        let request = Buffer::Out(kind.to_le_bytes()[..s_of(how >> 1, &[4, 4, 4, 3])].to_vec());
        match how >> 4 {
            0 => (0, vec![request]),
            1 => (0, vec![Buffer::At(s.address(), s.length(), s.input.flip()), Buffer::In(4)]),
            2 => (0, vec![request, Buffer::At(s.address(), s.length(), s.input.flip())]),
            _ => (0, vec![request, Buffer::In(s_of(how >> 2, &[4, 4, 3, 8]))]),
        }
    }

    fn host(&mut self, s: &mut Session<'_>) {
        let json = s.input.piece();
        s.patch(None, json);
    }

    fn end(&mut self) {
        self.has_ended = true;
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        let is_free =
            std::mem::take(&mut self.has_ended) || self.config["read_only"] == Value::Bool(true);
        is_free.then(|| open("pmem", &self.config))
    }
}
