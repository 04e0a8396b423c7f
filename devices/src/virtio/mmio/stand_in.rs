//! What stands for a device in a machine that is being put together while the device is at work in
//! another.
use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;

use crate::io::Worker;
use crate::metrics::CounterSet;
use crate::virtio::model::{DeviceError, VirtioDevice};
use crate::virtio::queue::VirtQueue;

/// Looks like a device to whoever puts a machine together, and cannot be put to work:
/// [`super::MmioTransport::take_over`] puts the device itself in its place.
#[derive(Debug)]
pub struct StandIn {
    device_id: u32,
    queue_sizes: Vec<u16>,
    features: u64,
    config_space: Vec<u8>,
    may_block: bool,
    counters: Arc<dyn CounterSet>,
}

impl StandIn {
    pub(super) fn of(device: &dyn VirtioDevice) -> Self {
        Self {
            device_id: device.device_id(),
            queue_sizes: device.queue_sizes().to_vec(),
            features: device.features(),
            config_space: device.config_space().into_owned(),
            may_block: device.may_block(),
            counters: device.counters(),
        }
    }
}

impl VirtioDevice for StandIn {
    fn device_id(&self) -> u32 {
        self.device_id
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config_space(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config_space)
    }

    fn activate(
        &mut self,
        _queues: Vec<VirtQueue>,
        _features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        Err(DeviceError::Removed)
    }

    fn may_block(&self) -> bool {
        self.may_block
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }
}
