//! virtio-blk over a file in memory.
use devices::virtio::model::VirtioDevice;
use serde_json::{Value, json};

use super::disk::{DISK, check_disk, disk};
use super::{limiter, open, s_of};
use crate::session::{Buffer, Model, Session};

/// virtio-blk.
#[derive(Debug)]
pub struct Block {
    is_read_only: bool,
    config: Value,
    has_ended: bool,
}

impl Block {
    /// One of several kinds.
    pub fn new(kind: u8) -> (Self, Box<dyn VirtioDevice>) {
        let path = disk();
        let is_read_only = kind & 1 != 0;
        let mut config = json!({
            "drive_id": "disk", "is_root_device": false, "path_on_host": path,
            "is_read_only": is_read_only,
            "cache_type": if kind & 2 == 0 { "Writeback" } else { "Unsafe" },
            // Making a ring takes longer than all else.
            "io_engine": if kind & 0x3c == 0x3c { "Async" } else { "Sync" },
        });
        if kind & 0x1c == 0x14 {
            config["rate_limiter"] = limiter();
        }
        if kind & 0x1c == 0x18 {
            config["overlay"] = "Memory".into();
            config["is_read_only"] = false.into();
        }
        let device = open("drives", &config);
        let is_read_only = is_read_only || !config["overlay"].is_null();
        (Self { is_read_only, config, has_ended: false }, device)
    }

    /// What holds when the device is gone.
    pub fn check(&self) {
        check_disk(self.is_read_only);
    }
}

impl Model for Block {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let kind = match s.input.u8() {
            n @ 0..128 => s_of(n, &[0, 1, 0, 1, 4, 8, 11, 13]),
            n @ 128..240 => u32::from(n % 20),
            _ => s.input.u32(),
        };
        let sectors = DISK / 512;
        let sector = match s.input.below(8) {
            0..4 => u64::from(s.input.u8()) % sectors,
            4 => sectors - u64::from(s.input.below(4)),
            5 => sectors + u64::from(s.input.below(4)),
            6 => u64::MAX - u64::from(s.input.u8()),
            _ => s.input.u64(),
        };
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(s.input.u8().to_le_bytes());
        header.extend([0; 3]);
        header.extend(sector.to_le_bytes());
        let how = s.input.u8();
        if how & 0x0f == 0x0f {
            header.truncate(usize::from(how >> 4));
        }
        let mut buffers = vec![Buffer::Out(header)];
        for _ in 0..how >> 6 {
            buffers.push(match (kind, how >> 4 & 3) {
                (11 | 13, 0..3) => Buffer::Out(segments(s)),
                (1, 0..3) => Buffer::Out(vec![how; s_of(s.input.u8(), &[512, 1024, 4096, 100])]),
                (0 | 8, 0..3) => Buffer::In(s_of(s.input.u8(), &[512, 20, 4096, 100])),
                _ => Buffer::At(s.address(), s.length(), s.input.flip()),
            });
        }
        match how & 0x0e {
            0x0e => {}
            0x0c => buffers.push(Buffer::In(s.input.u8().into())),
            _ => buffers.push(Buffer::In(1)),
        }
        (0, buffers)
    }

    fn host(&mut self, s: &mut Session<'_>) {
        match s.input.below(4) {
            0 => s.patch(
                None,
                br#"{"drive_id": "disk", "rate_limiter": {"ops": {"size": 2, "refill_time": 1}}}"#,
            ),
            1 => s.patch(None, br#"{"drive_id": "disk"}"#),
            2 => {
                let json = s.input.piece();
                // Not another file.
                if !json.windows(4).any(|word| word == b"path" || word == b"\\u00") {
                    s.patch(None, json);
                }
            }
            _ => {
                s.machine.pause();
                let mut transport = s.machine.transport();
                let mut saved = transport.save();
                let _ = transport.save_files(&mut saved);
                let _ = transport.resume();
            }
        }
    }

    fn end(&mut self) {
        self.has_ended = true;
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        // Who writes a disk has it alone: once it has been made again, it is not free any more.
        let is_free =
            std::mem::take(&mut self.has_ended) || self.config["is_read_only"] == Value::Bool(true);
        is_free.then(|| open("drives", &self.config))
    }
}

/// `struct virtio_blk_discard_write_zeroes`, some.
fn segments(s: &mut Session<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..1 + s.input.below(18) {
        let sector = if s.input.flip() { s.input.u8().into() } else { s.input.u64() };
        let count = if s.input.flip() { s.input.u8().into() } else { s.input.u32() };
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(u32::from(s.input.below(4)).to_le_bytes());
    }
    bytes
}
