//! A device raises interrupts for two reasons while the driver acknowledges.
use devices::sync::models::{explore, wait_until};
use devices::sync::thread;

use crate::driver::{HIGH, Machine};
use crate::register::{CONFIG_GENERATION, INTERRUPT_ACK, INTERRUPT_STATUS};
use crate::samples::sample;

const RUNS: usize = 200;
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// The handler is that of Linux (`vm_interrupt` of drivers/virtio/virtio_mmio.c): it reads the status,
/// acknowledges what it read, and then looks at what that was about, and at nothing else. It runs once for
/// all interrupts that came before it begins, as with an edge.
#[test]
fn a_driver_that_heeds_its_interrupts_misses_nothing() {
    explore(RUNS, || {
        let m = Machine::new(sample("entropy").device);
        let mut ring = m.start(0).remove(0);
        let transport = m.transport.clone();
        let vmm = thread::spawn(move || transport.lock().unwrap().tell_config_change());
        ring.add(&[(HIGH.0, 8, true)]);
        m.kick(&ring);
        let (mut handled, mut used, mut is_changed) = ((0, 0), 0, false);
        while used < 2 || !is_changed {
            let was = handled;
            wait_until(|| {
                handled = m.irq.counts();
                handled != was
            });
            let status = m.get(INTERRUPT_STATUS);
            m.set(INTERRUPT_ACK, status);
            if status & USED_BUFFER != 0 {
                let before = std::mem::replace(&mut used, ring.used_idx());
                // The second request is made in the midst of it.
                if before == 0 && used == 1 {
                    ring.add(&[(HIGH.0, 8, true)]);
                    m.kick(&ring);
                }
            }
            if status & CONFIG_CHANGE != 0 {
                assert_ne!(m.get(CONFIG_GENERATION), 0, "the change cannot be seen yet");
                is_changed = true;
            }
        }
        vmm.join().unwrap();
    });
}
