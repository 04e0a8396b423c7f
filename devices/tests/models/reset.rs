//! A device is reset, or paused, while it completes requests.
use devices::io::IoError;
use devices::sync::models::{explore, step, wait_until};
use devices::virtio::model::DeviceError;

use crate::driver::{HIGH, Machine, NEEDS_RESET, Ring};
use crate::register::{INTERRUPT_STATUS, STATUS};
use crate::samples::sample;

const RUNS: usize = 200;

/// A source of entropy that has been asked for some.
fn busy() -> (Machine, Ring) {
    let m = Machine::new(sample("entropy").device);
    let mut ring = m.start(0).remove(0);
    for _ in 0..2 {
        ring.add(&[(HIGH.0, 8, true)]);
        m.kick(&ring);
    }
    (m, ring)
}

/// What a driver can see of what a device does.
fn seen(m: &Machine, ring: &Ring) -> ((u64, u64), u16, u32) {
    (m.irq.counts(), ring.used_idx(), m.get(INTERRUPT_STATUS))
}

#[test]
fn when_status_reads_0_nothing_is_completed_any_more() {
    explore(RUNS, || {
        let (m, ring) = busy();
        // While its thread has not answered, the device needs a reset, and does not forget it.
        wait_until(|| {
            m.set(STATUS, 0);
            let status = m.status();
            assert!(status == 0 || status & NEEDS_RESET != 0, "status {status:#x}");
            status == 0
        });
        let before = seen(&m, &ring);
        assert_eq!(before.2, 0, "an interrupt of before the reset");
        (0..16).for_each(|_| step());
        assert_eq!(seen(&m, &ring), before);
        // And it works again.
        let ring = &mut m.start(0)[0];
        ring.add(&[(HIGH.0, 8, true)]);
        m.finish(ring, 1);
    });
}

#[test]
fn a_pause_loses_neither_requests_nor_the_worker() {
    explore(RUNS, || {
        let (m, ring) = busy();
        for _ in 0..2 {
            wait_until(|| match m.transport.lock().unwrap().pause() {
                Ok(()) => true,
                Err(DeviceError::Io(IoError::Busy)) => false,
                Err(e) => panic!("the worker is lost: {e}"),
            });
            let before = seen(&m, &ring);
            (0..8).for_each(|_| step());
            assert_eq!(seen(&m, &ring), before, "something was done in a pause");
            m.transport.lock().unwrap().resume().unwrap();
        }
        m.irq.wait("what was asked for before the pauses", || ring.used_idx() == 2);
        (0..8).for_each(|_| step());
        assert_eq!(ring.used_idx(), 2, "a request was served twice");
    });
}
