//! virtio-balloon.
use devices::virtio::model;
use devices::virtio::model::VirtioDevice;
use serde_json::{Value, json};

use super::open;
use crate::session::{Buffer, Model, Session};

/// virtio-balloon.
#[derive(Debug)]
pub struct Balloon(Value);

impl Balloon {
    /// One of several kinds.
    pub fn new(kind: u8) -> (Self, Box<dyn VirtioDevice>) {
        let config = json!({
            "amount_mib": kind >> 4, "deflate_on_oom": kind & 1 != 0,
            "stats_polling_interval_s": u8::from(kind & 2 == 0),
            "free_page_hinting": kind & 4 == 0, "free_page_reporting": kind & 8 == 0,
        });
        let device = open("balloon", &config);
        (Self(config), device)
    }
}

impl Model for Balloon {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let (queue, how) = (s.input.below(5).into(), s.input.u8());
        let buffers = match how & 7 {
            // Page numbers.
            0..3 => {
                let mut bytes = Vec::new();
                for _ in 0..how >> 3 {
                    let pfn = if s.input.below(8) == 7 {
                        s.input.u32()
                    } else {
                        s.input.below(0x70).into()
                    };
                    bytes.extend(pfn.to_le_bytes());
                }
                bytes.truncate(bytes.len() - usize::from(how & 3).min(bytes.len()));
                vec![Buffer::Out(bytes)]
            }
            // Statistics.
            3 => {
                let mut bytes = Vec::new();
                for _ in 0..how >> 3 {
                    bytes.extend(u16::from(s.input.below(20)).to_le_bytes());
                    bytes.extend(s.input.u32().to_le_bytes());
                    bytes.extend([0; 4]);
                }
                vec![Buffer::Out(bytes)]
            }
            // What a run of hints is at, and hints.
            4 => vec![Buffer::Out(u32::from(s.input.below(4)).to_le_bytes().to_vec())],
            5 => (0..1 + (how >> 5)).map(|_| Buffer::In(4096 * u32::from(how >> 3 & 3))).collect(),
            _ => {
                let mut buffers = vec![Buffer::At(s.address(), s.length(), how & 8 == 0)];
                for _ in 0..how >> 6 {
                    let addr = u64::from(s.input.below(0x70)) * 4096;
                    buffers.push(Buffer::At(addr, 4096 * u32::from(s.input.below(8)), true));
                }
                buffers
            }
        };
        (queue, buffers)
    }

    fn host(&mut self, s: &mut Session<'_>) {
        let views = model("balloon").expect("it is one").views;
        let view = s.input.below(8);
        let view = views.get(usize::from(view)).map(|view| view.path);
        let _ = s.machine.transport().show(view);
        match s.input.below(4) {
            0 => s.patch(view, b"{}"),
            1 => {
                let amount = json!({"amount_mib": s.input.u8()});
                s.patch(None, amount.to_string().as_bytes());
            }
            2 => s.patch(view, br#"{"stats_polling_interval_s": 1}"#),
            _ => {
                let json = s.input.piece();
                s.patch(view, json);
            }
        }
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        Some(open("balloon", &self.0))
    }
}
