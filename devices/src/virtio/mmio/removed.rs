//! What is left of a device that was taken out of a machine that goes on.
use std::sync::Arc;

use serde_json::Value;

use crate::io::Worker;
use crate::metrics::CounterSet;
use crate::virtio::model::{DeviceError, VirtioDevice};
use crate::virtio::queue::VirtQueue;

/// What is left in the place of a device that was taken out: device ID 0, which drivers skip
/// (virtio 1.2, 4.2.3.1.1).
#[derive(Debug)]
pub(super) struct Placeholder;

impl VirtioDevice for Placeholder {
    fn device_id(&self) -> u32 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn activate(
        &mut self,
        _queues: Vec<VirtQueue>,
        _features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        Err(DeviceError::Removed)
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        Arc::new(())
    }
}
