#![no_main]
//! A virtqueue by itself, on rings that the fuzzer writes, against a model of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::GuestRam;
use devices::fuzzing::queue;
use devices::virtio::chain::{Buffers, Readable, Writable};
use devices::virtio::notifier::{Counters, Interrupt, Notifier};
use devices::virtio::queue::{QueueConfig, Served, VirtQueue};
use fuzz::bytes::Bytes;
use fuzz::guest::{HIGH, ram};
use fuzz::queue::{Chain, Model, is_sound};
use fuzz::ring::{Desc, INDIRECT, NEXT, RINGS, Ring, WRITE};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const STEPS_MAX: usize = 256;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    if let Some(mut world) = World::new(Bytes::new(input)) {
        world.run();
    }
});

#[derive(Default)]
struct Irq(AtomicU64);

impl Interrupt for Irq {
    fn used_buffer(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn config_change(&self) {}
}

struct World<'a> {
    input: Bytes<'a>,
    mem: GuestRam,
    queue: VirtQueue,
    ring: Ring,
    irq: Arc<Irq>,
    model: Model,
}

impl<'a> World<'a> {
    fn new(mut input: Bytes<'a>) -> Option<Self> {
        let mem = ram();
        let how = input.u8();
        let size = if how & 1 == 0 { 1 << input.below(9) } else { input.u16() };
        let ring = Ring::new(&mem, 0, size.max(1));
        let [mut desc_table, mut avail_ring, mut used_ring] = [ring.desc, ring.avail, ring.used];
        let is_odd = how & 2 != 0;
        if is_odd {
            for place in [&mut desc_table, &mut avail_ring, &mut used_ring] {
                *place = place.wrapping_add(i64::from(input.u16().cast_signed()).cast_unsigned());
                if input.below(8) == 7 {
                    *place = input.u64();
                }
            }
        }
        let config = QueueConfig { size, is_ready: true, desc_table, avail_ring, used_ring };
        let (is_indirect, is_event_idx) = (how & 4 != 0, how & 8 != 0);
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).ok()?);
        let irq = Arc::<Irq>::default();
        let notifier = Arc::new(Notifier::new(irq.clone(), Arc::<Counters>::default()));
        let features = (is_indirect, is_event_idx);
        let queue = queue(256, &config, features, kick, mem.clone(), notifier);
        assert_eq!(queue.is_ok(), is_sound(&config), "{config:x?}: {queue:?}");
        let model = Model {
            config,
            is_indirect,
            is_event_idx,
            next_avail: 0,
            next_used: 0,
            notified: 0,
            staged: 0,
            taken: Vec::new(),
            is_latched: false,
            interrupts: 0,
        };
        Some(Self { input, mem, queue: queue.ok()?, ring, irq, model })
    }

    fn run(&mut self) {
        for _ in 0..STEPS_MAX {
            if self.input.is_empty() {
                return;
            }
            self.step();
            assert_eq!(self.queue.is_latched(), self.model.is_latched);
            assert_eq!(self.irq.0.load(Ordering::Relaxed), self.model.interrupts);
        }
    }

    fn step(&mut self) {
        let Self { input, mem, queue, ring, model, .. } = self;
        match input.below(12) {
            0 => {
                let addr =
                    if input.flip() { RINGS } else { HIGH.0 } + u64::from(input.u16() % 0x4000);
                let len = input.u8();
                let _ = mem.write_slice(input.take(len.into()), GuestAddress(addr));
            }
            1 | 2 => {
                let table = if input.below(4) > 0 { ring.desc } else { HIGH.0 };
                let index = u16::from(input.u8());
                let addr = match input.below(6) {
                    0..3 => HIGH.0 + 16 * u64::from(input.u8()),
                    3 => HIGH.0 + HIGH.1 - u64::from(input.u8()),
                    4 => u64::from(input.u16()),
                    _ => input.u64(),
                };
                let len = match input.below(4) {
                    0 => 16 * u32::from(input.u8()),
                    1 => input.u8().into(),
                    2 => input.u16().into(),
                    _ => input.u32(),
                };
                let flags = match input.below(8) {
                    0 => 0,
                    1 | 2 => NEXT,
                    3 => WRITE,
                    4 => WRITE | NEXT,
                    5 | 6 => INDIRECT,
                    _ => input.u16(),
                };
                let next = u16::from(input.u8());
                ring.write_desc(table, index, Desc { addr, len, flags, next });
            }
            3 => {
                let head = if input.below(8) == 7 { input.u16() } else { input.u8().into() };
                offer(mem, model, head);
            }
            4 => {
                let index = input.u16();
                let _ = mem.write_obj(index, GuestAddress(model.config.avail_ring + 2));
            }
            5..7 => pop(queue, model, mem),
            7 => {
                let (which, len) = (usize::from(input.u8()), input.u32());
                // One that the device never had, too.
                let head = match model.taken.get(which) {
                    Some(head) => *head,
                    None => input.u16(),
                };
                queue.stage(head, len);
                model.stage(mem, head, len);
                if input.flip() {
                    queue.publish();
                    model.publish(mem);
                }
            }
            8 => {
                queue.publish();
                model.publish(mem);
                let wants = model.wants_interrupt(mem);
                queue.notify();
                model.interrupts += u64::from(wants);
            }
            9 => {
                if let Some(head) = model.taken.pop() {
                    queue.undo_pop(head);
                    model.next_avail = model.next_avail.wrapping_sub(1);
                }
            }
            10 => {
                let offset = 4 + 2 * u64::from(model.config.size);
                let at = if input.flip() { 0 } else { offset };
                let _ = mem.write_obj(input.u16(), GuestAddress(model.config.avail_ring + at));
            }
            _ => self.serve(),
        }
    }

    /// Everything at once: each chain is completed until the input says otherwise.
    fn serve(&mut self) {
        let Self { input, mem, queue, model, .. } = self;
        let (later, len) = (input.u8(), input.u32());
        let (mut count, mut has_used) = (0_u32, false);
        queue.serve(|chain| {
            count += 1;
            let expected = model.pop(mem).expect("a chain that is none");
            assert_eq!(chain.head(), expected.0);
            check_chain(mem, &expected.1, chain.readable(), chain.writable());
            if count > later.into() {
                model.taken.pop();
                model.next_avail = model.next_avail.wrapping_sub(1);
                return Served::Later;
            }
            model.taken.pop();
            // With it becomes visible what was staged before.
            model.next_used = model.next_used.wrapping_add(model.staged + 1);
            model.staged = 0;
            has_used = true;
            Served::Used(len)
        });
        let budget = 2 * u32::from(model.config.size);
        assert!(count <= budget, "more than a turn");
        if count <= later.into() && count < budget {
            assert_eq!(model.pop(mem), None, "a chain was left");
        }
        if has_used && !model.is_latched {
            model.check_used(mem);
        }
        model.interrupts += u64::from(model.wants_interrupt(mem));
    }
}

/// Puts `head` into the next slot.
fn offer(mem: &GuestRam, model: &Model, head: u16) {
    let avail = model.config.avail_ring;
    let index: u16 = mem.read_obj(GuestAddress(avail + 2)).expect("it is RAM");
    let slot = u64::from(index % model.config.size);
    mem.write_obj(head, GuestAddress(avail + 4 + 2 * slot)).expect("it is RAM");
    mem.write_obj(index.wrapping_add(1), GuestAddress(avail + 2)).expect("it is RAM");
}

fn pop(queue: &mut VirtQueue, model: &mut Model, mem: &GuestRam) {
    let mut buffers = Buffers::default();
    let expected = model.pop(mem);
    let popped = queue.pop(&mut buffers);
    assert_eq!(popped, expected.as_ref().map(|(head, _)| *head));
    if let Some((_, chain)) = expected {
        check_chain(mem, &chain, buffers.readable(mem), buffers.writable(mem));
    }
}

/// The buffers are those of the chain, and what is read of them is what is there.
fn check_chain(
    mem: &GuestRam,
    (reads, writes): &Chain,
    readable: Readable<'_>,
    mut writable: Writable<'_>,
) {
    let total = |list: &[(u64, u32)]| list.iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
    assert_eq!((readable.len(), writable.len()), (total(reads), total(writes)));
    let there: Vec<_> = writes.iter().copied().filter(|(_, len)| *len > 0).collect();
    let found = writable.buffers().map(|b| (b.addr.0, b.len)).filter(|(_, len)| *len > 0);
    assert_eq!(found.collect::<Vec<_>>(), there);
    // By pieces that fit nothing.
    let mut rest = readable;
    let mut expected = Vec::new();
    for (addr, len) in reads {
        let mut bytes = vec![0; (*len).min(4096) as usize];
        if bytes.len() < *len as usize || mem.read_slice(&mut bytes, GuestAddress(*addr)).is_err() {
            break;
        }
        expected.extend(bytes);
    }
    for piece in expected.chunks(7) {
        let mut bytes = [0; 7];
        rest.read(&mut bytes[..piece.len()]).expect("it is RAM");
        assert_eq!(&bytes[..piece.len()], piece);
    }
    // A write that does not fit fails; it goes nowhere but to RAM.
    let _ = writable.take(writable.len().min(3)).map(|mut few| few.write(&[0; 3]));
}
