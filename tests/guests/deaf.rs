//! Takes every packet that the vsock device has for it, and answers none. Says `ready=1`, and goes on for ever.
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer};
use rt::{BootInfo, Outcome, clock, memory, println};

rt::entry!(run);

const RX: u16 = 0;
const TX: u16 = 1;
const EVENTS: u16 = 2;
const SLOTS: u16 = 64;
const SLOT: usize = 4096;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let device = virtio::find(boot.cmdline, virtio::ID_VSOCK, 0)?;
    device.negotiate(0)?;
    let mut rx = device.queue(RX, SLOTS)?;
    device.queue(TX, SLOTS)?;
    device.queue(EVENTS, SLOTS)?;
    let pool = memory::allocate(SLOT * usize::from(SLOTS));
    for (i, slot) in (0..rx.size).zip(pool.chunks_mut(SLOT)) {
        rx.chain(i, &[Buffer::writable(slot)]);
        rx.offer(i);
    }
    device.start()?;
    rx.kick();
    println!("ready=1");
    loop {
        while let Some((head, _)) = rx.poll() {
            rx.offer(head);
            rx.kick();
        }
        core::hint::spin_loop();
    }
}
