//! What a VM has for itself alone: a generation id, VMClock's counter, a seed, the user's payload.
//!
//! Two VMs that go on from one snapshot are the same up to here. [`Identity::renew`] makes the
//! difference, before the guest's first instruction, and has the guest told of it; docs/identity.md
//! says what the guest does then.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::sync::{Arc, PoisonError};

use arch::{GuestRam, layout};
use devices::legacy::acpi::Acpi;
use devices::legacy::generation::Generation;
use devices::sync::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::config::Payload;
use crate::error::Refusal;

/// Bytes before the text of a payload.
pub(crate) const HEADER_LEN: usize = 64;
const PAYLOAD_MAGIC: [u8; 8] = *b"huskdata";
const PAYLOAD_VERSION: u32 = 1;
const SEED_LEN: usize = 32;
const PAGE: usize = 4096;

/// What stays the same from one reset of the guest to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Current {
    id: [u8; 16],
    /// How often the VM has become another one.
    counter: u64,
}

impl Current {
    /// Of a VM that `counter` times has become another one.
    fn new(counter: u64) -> Result<Self, Refusal> {
        Ok(Self { id: random()?, counter })
    }
}

/// What a snapshot holds of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct IdentityState {
    counter: u64,
    /// Whether the guest has a driver for the generation id.
    was_read: bool,
    /// The vCPU that stands before a look at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first: Option<u8>,
}

/// The identity of a machine.
#[derive(Debug)]
pub(crate) struct Identity {
    current: Current,
    page: Arc<Mutex<Generation>>,
}

impl Identity {
    /// That of a machine that boots, or, `again`, is reset; or, `saved`, goes on and is to be renewed.
    pub(crate) fn new(
        again: Option<Current>,
        saved: Option<IdentityState>,
    ) -> Result<Self, Refusal> {
        let current = match (again, saved) {
            (_, Some(saved)) => Current::new(saved.counter)?,
            (Some(current), None) => current,
            (None, None) => Current::new(0)?,
        };
        let page = Generation::new(current.id, saved.is_some_and(|saved| saved.was_read));
        Ok(Self { current, page: Arc::new(Mutex::new(page)) })
    }

    /// For the guest's next reset.
    pub(crate) fn current(&self) -> Current {
        self.current
    }

    /// The page with the generation id, for the bus.
    pub(crate) fn page(&self) -> Arc<Mutex<Generation>> {
        self.page.clone()
    }

    /// Whether the guest looks at the generation id when it is told to.
    pub(crate) fn has_driver(&self) -> bool {
        lock(&self.page).was_read()
    }

    /// To be saved, with `first`: the vCPU that stands before a look at the generation id.
    pub(crate) fn state(&self, first: Option<u8>) -> IdentityState {
        IdentityState { counter: self.current.counter, was_read: self.has_driver(), first }
    }

    /// Takes over what was saved of the guest: to be renewed.
    pub(crate) fn go_back(&mut self, saved: IdentityState) {
        self.current.counter = self.current.counter.max(saved.counter);
        *lock(&self.page) = Generation::new(self.current.id, saved.was_read);
    }

    /// Makes this VM another one than whatever its state comes from: to be called before it runs, by
    /// all that lets a VM go on from a copy. Its guest is told when it runs.
    pub(crate) fn renew(
        &mut self,
        ram: &GuestRam,
        acpi: &Mutex<Acpi>,
        payload: Option<&Payload>,
    ) -> Result<(), Refusal> {
        self.current = Current::new(self.current.counter.wrapping_add(1))?;
        lock(&self.page).replace(self.current.id);
        self.place(ram, payload, usize::try_from(layout::PAYLOAD_LEN).unwrap_or(usize::MAX))?;
        lock(acpi).announce_generation();
        Ok(())
    }

    /// Puts what lies in RAM, which has only zeros there yet, in its place.
    pub(crate) fn write(&self, ram: &GuestRam, payload: Option<&Payload>) -> Result<(), Refusal> {
        self.place(ram, payload, 0)
    }

    /// Puts what lies in RAM in its place. After a payload there are zeros, up to `len` bytes from its beginning.
    fn place(&self, ram: &GuestRam, payload: Option<&Payload>, len: usize) -> Result<(), Refusal> {
        let text = payload.map_or("", Payload::as_str);
        let bytes = with_header(self.current.counter, random()?, text);
        let written = write_changes(ram, layout::VMCLOCK, &vmclock(self.current.counter), 0)
            .and_then(|()| write_changes(ram, layout::PAYLOAD, &bytes, len));
        let failed = |e| Refusal::host("cannot write the identity")(std::io::Error::other(e));
        written.map_err(failed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let mut bytes = [0; N];
    let mut rest = &mut bytes[..];
    while !rest.is_empty() {
        let got = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty());
        let count = got.map_err(Refusal::host("no random numbers"))?;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(bytes)
}

/// Writes the pages of `bytes`, and of zeros after them up to `len`, that are not so yet: clones share the others.
fn write_changes(
    ram: &GuestRam,
    at: u64,
    bytes: &[u8],
    len: usize,
) -> Result<(), GuestMemoryError> {
    let starts = (0..len.max(bytes.len())).step_by(PAGE);
    for (addr, start) in (at..).step_by(PAGE).zip(starts) {
        let (mut page, mut there) = ([0; PAGE], [0; PAGE]);
        let rest = bytes.get(start..).unwrap_or_default();
        page.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        ram.read_slice(&mut there, GuestAddress(addr))?;
        if there != page {
            ram.write_slice(&page, GuestAddress(addr))?;
        }
    }
    Ok(())
}

/// VMClock's page (UAPI.13): no clock, but a counter of generations.
fn vmclock(counter: u64) -> Vec<u8> {
    const COUNTER_INVALID: u8 = 0xff;
    const TIME_TAI: u8 = 1;
    const VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
    const NOTIFICATION_PRESENT: u64 = 1 << 9;
    let mut page = vec![0; usize::try_from(layout::VMCLOCK_LEN).unwrap_or(PAGE)];
    let mut put = |at: usize, bytes: &[u8]| {
        page.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0x00, b"VCLK");
    put(0x04, &u32::try_from(layout::VMCLOCK_LEN).unwrap_or(0).to_le_bytes());
    put(0x08, &1_u16.to_le_bytes());
    put(0x0a, &[COUNTER_INVALID, TIME_TAI]);
    // Even: nothing is being changed while the guest runs.
    let sequence = counter.wrapping_mul(2).to_le_bytes();
    put(0x0c, &sequence[..4]);
    put(0x10, &counter.to_le_bytes());
    put(0x18, &(VM_GEN_COUNTER_PRESENT | NOTIFICATION_PRESENT).to_le_bytes());
    // The status of the clock at 0x22 is "unknown", which is zero, and what it would say is not valid.
    put(0x68, &counter.to_le_bytes());
    page
}

/// What a payload's pages begin with: a header, the text.
///
/// ```text
///    0  "huskdata"              8  u32 version       12  u32 bytes before the text
///   16  u64 generation counter  24  u32 bytes of text 28  u32 CRC-32 of the text
///   32  seed, 32 bytes          64  text
/// ```
fn with_header(counter: u64, seed: [u8; SEED_LEN], text: &str) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut region = Vec::new();
    region.extend(PAYLOAD_MAGIC);
    region.extend(PAYLOAD_VERSION.to_le_bytes());
    region.extend(number(HEADER_LEN));
    region.extend(counter.to_le_bytes());
    region.extend(number(text.len()));
    region.extend(crc32(text.as_bytes()).to_le_bytes());
    region.extend(seed);
    region.extend(text.as_bytes());
    region
}

/// The CRC-32 of zlib and gzip.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let step = |crc: u32| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that panics is a test that fails"
)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use devices::bus::BusDeviceMut;
    use devices::legacy::{Power, acpi};
    use serde_json::json;

    use super::*;

    struct NoPower;

    impl Power for NoPower {
        fn off(&self) {}
        fn reset(&self) {}
    }

    struct Vm {
        ram: GuestRam,
        acpi: Mutex<Acpi>,
        raised: Arc<AtomicUsize>,
    }

    impl Vm {
        fn new() -> Self {
            let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let raised = Arc::new(AtomicUsize::new(0));
            let acpi = Mutex::new(Acpi::new(Box::new(raised.clone()), Arc::new(NoPower)));
            Self { ram, acpi, raised }
        }

        fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        }

        fn u64(&self, at: u64) -> u64 {
            self.ram.read_obj(GuestAddress(at)).unwrap()
        }
    }

    fn id(identity: &Identity) -> [u8; 16] {
        let mut id = [0; 16];
        let page = identity.page();
        let (low, high) = id.split_at_mut(8);
        lock(&page).read(0, low);
        lock(&page).read(8, high);
        id
    }

    #[test]
    fn crc32_is_the_usual_one() {
        assert_eq!((crc32(b"123456789"), crc32(b"")), (0xcbf4_3926, 0));
    }

    #[test]
    fn a_machine_that_boots_has_an_id_and_keeps_it_over_a_reset() {
        let (one, other) = (Identity::new(None, None).unwrap(), Identity::new(None, None).unwrap());
        assert_ne!(id(&one), id(&other));
        assert!(one.has_driver());
        let again = Identity::new(Some(one.current()), None).unwrap();
        assert_eq!((id(&again), again.current.counter), (id(&one), 0));
        let fresh = Identity::new(None, None).unwrap();
        assert!(!fresh.has_driver());
    }

    #[test]
    fn two_that_go_on_from_one_are_told_apart() {
        let parent = Identity::new(None, None).unwrap();
        let before = id(&parent);
        let state = serde_json::to_string(&parent.state(Some(1))).unwrap();
        let state: IdentityState = serde_json::from_str(&state).unwrap();
        assert_eq!(state.first, Some(1));
        let mut seen = vec![before];
        let mut seeds = Vec::new();
        for secret in ["a", "b"] {
            let vm = Vm::new();
            let mut identity = Identity::new(None, Some(state)).unwrap();
            let payload = Payload::new(&json!({ "secret": secret })).unwrap();
            identity.renew(&vm.ram, &vm.acpi, Some(&payload)).unwrap();
            seen.push(id(&identity));
            assert!(identity.has_driver());
            assert_eq!(identity.current.counter, 1);
            assert_eq!(vm.raised.load(Ordering::Relaxed), 1);
            let mut events = [0];
            lock(&vm.acpi).read(acpi::EVENTS, &mut events);
            assert_eq!(events, [acpi::EVENT_GENERATION]);
            seeds.push(vm.bytes(layout::PAYLOAD + 32, 32));
            let text = format!("{{\"secret\":\"{secret}\"}}\0");
            assert_eq!(vm.bytes(layout::PAYLOAD + 64, text.len()), text.as_bytes());
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 3);
        assert_ne!(seeds[0], seeds[1]);
    }

    #[test]
    fn what_goes_back_is_neither_what_it_was_nor_what_it_is() {
        let vm = Vm::new();
        let mut identity = Identity::new(None, None).unwrap();
        let saved = identity.state(None);
        identity.renew(&vm.ram, &vm.acpi, None).unwrap();
        let (before, is) = (identity.current, id(&identity));
        identity.go_back(saved);
        identity.renew(&vm.ram, &vm.acpi, None).unwrap();
        assert_eq!(identity.current.counter, before.counter + 1);
        assert_ne!(id(&identity), is);
        let later = IdentityState { counter: 9, ..saved };
        identity.go_back(later);
        assert!(!identity.has_driver());
        identity.renew(&vm.ram, &vm.acpi, None).unwrap();
        assert_eq!(identity.current.counter, 10);
    }

    #[test]
    fn vmclock_counts_generations() {
        let vm = Vm::new();
        let mut identity = Identity::new(None, None).unwrap();
        identity.write(&vm.ram, None).unwrap();
        assert_eq!(vm.bytes(layout::VMCLOCK, 12), b"VCLK\x00\x10\0\0\x01\0\xff\x01");
        assert_eq!(vm.u64(layout::VMCLOCK + 0x18), 0x300);
        for counter in 0..3 {
            assert_eq!(vm.u64(layout::VMCLOCK + 0x68), counter);
            assert_eq!(vm.u64(layout::VMCLOCK + 0x10), counter);
            let sequence: u32 = vm.ram.read_obj(GuestAddress(layout::VMCLOCK + 0x0c)).unwrap();
            assert_eq!(u64::from(sequence), 2 * counter);
            identity.renew(&vm.ram, &vm.acpi, None).unwrap();
        }
    }

    #[test]
    fn nothing_is_left_of_an_earlier_payload() {
        let vm = Vm::new();
        let mut identity = Identity::new(None, None).unwrap();
        let long = Payload::new(&json!("x".repeat(60_000))).unwrap();
        identity.write(&vm.ram, Some(&long)).unwrap();
        assert_eq!(vm.bytes(layout::PAYLOAD + 60_000, 1), b"x");
        assert_eq!(vm.bytes(layout::PAYLOAD, 24), b"huskdata\x01\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0");
        let (len, sum): (u32, u32) = (60_002, crc32(long.as_str().as_bytes()));
        let numbers = [len.to_le_bytes(), sum.to_le_bytes()].concat();
        assert_eq!(vm.bytes(layout::PAYLOAD + 24, 8), numbers);
        identity.renew(&vm.ram, &vm.acpi, None).unwrap();
        assert_eq!(vm.bytes(layout::PAYLOAD + 24, 8), [0; 8]);
        let len = usize::try_from(layout::PAYLOAD_LEN).unwrap() - HEADER_LEN;
        assert_eq!(vm.bytes(layout::PAYLOAD + 64, len), vec![0; len]);
    }

    #[test]
    fn no_option_rom_begins_in_these_pages() {
        let text = serde_json::Value::from("U\u{aa}".repeat(16_000)).to_string();
        let seed = [0x55; SEED_LEN];
        let all = [vmclock(0xaa55_aa55_aa55_aa55), with_header(0xaa55, seed, &text)].concat();
        assert!(all.chunks(2048).all(|rom| !rom.starts_with(&[0x55, 0xaa])));
    }
}
