//! What the driver writes to the registers before it has effect: inputs only.
use serde::{Deserialize, Serialize};

use super::reg;
use super::window::Window;
use crate::virtio::queue::QueueConfig;

/// All of it. A snapshot keeps it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    /// The window that the driver has come by.
    pub(super) owner: Option<Window>,
    pub(super) driver_features: u64,
    pub(super) device_page: u32,
    pub(super) driver_page: u32,
    /// The queue that the queue registers are about.
    pub(super) selected: u32,
    pub(super) queues: Vec<QueueConfig>,
}

impl Registers {
    /// As they are after a reset, of a device with queues of these largest sizes.
    pub(super) fn new(queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter();
        let queues = queues.map(|&size| QueueConfig { size, ..QueueConfig::default() }).collect();
        Self { queues, ..Self::default() }
    }

    /// The position of the selected queue, if that could be one.
    pub(super) fn selected(&self) -> Option<usize> {
        usize::try_from(self.selected).ok()
    }

    /// The selected queue.
    pub(super) fn selected_queue(&self) -> Option<&QueueConfig> {
        self.queues.get(self.selected()?)
    }

    /// Writes a page of the features that the driver accepts.
    pub(super) fn write_features(&mut self, value: u32) {
        match self.driver_page {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Writes a register of the selected queue, which may have `max_size` entries.
    pub(super) fn write_queue(&mut self, offset: u64, value: u32, max_size: u16) {
        let selected = self.selected();
        let Some(queue) = selected.and_then(|selected| self.queues.get_mut(selected)) else {
            return;
        };
        if offset == reg::QUEUE_READY {
            queue.is_ready = value == 1;
            return;
        }
        if queue.is_ready {
            return;
        }
        match offset {
            reg::QUEUE_NUM => {
                // Activation refuses what is not a power of two up to the maximum.
                queue.size = u16::try_from(value).ok().filter(|&s| s <= max_size).unwrap_or(0);
            }
            reg::QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.avail_ring, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail_ring, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_half_of_an_address_is_written_by_itself_and_anew() {
        let mut address = u64::MAX;
        set_low(&mut address, 0x1234_5678);
        assert_eq!(address, 0xffff_ffff_1234_5678);
        set_high(&mut address, 0x9abc_def0);
        set_low(&mut address, 1);
        assert_eq!(address, 0x9abc_def0_0000_0001);
    }
}
