//! virtio-rng.
use devices::virtio::model::VirtioDevice;
use serde_json::{Value, json};

use super::{limiter, open};
use crate::session::{Buffer, Model, Session};

/// virtio-rng.
#[derive(Debug)]
pub struct Rng(Value);

impl Rng {
    /// One of several kinds.
    pub fn new(kind: u8) -> (Self, Box<dyn VirtioDevice>) {
        let config = if kind & 1 == 0 { json!({}) } else { json!({"rate_limiter": limiter()}) };
        let device = open("entropy", &config);
        (Self(config), device)
    }
}

impl Model for Rng {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let how = s.input.u8();
        let buffers = (0..1 + (how >> 6)).map(|_| match s.input.below(4) {
            0..3 => Buffer::In(s.input.u16().into()),
            _ => Buffer::At(s.address(), s.length(), s.input.below(8) > 0),
        });
        (0, buffers.collect())
    }

    fn host(&mut self, s: &mut Session<'_>) {
        let json = s.input.piece();
        s.patch(None, json);
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        Some(open("entropy", &self.0))
    }
}
