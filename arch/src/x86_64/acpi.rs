//! ACPI tables (ACPI 6.5): processors, interrupts, power, and every device that cannot be probed.
//!
//! The machine is hardware-reduced: no PM timer, no fixed events, no SMM. Power and sleep are four
//! I/O ports ([`layout::ACPI_POWER`]); the power button and a new generation id are events of a Generic
//! Event Device.
use acpi_tables::aml::{self, EISAName, Name, Path, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::boot::VirtioMmio;
use super::layout;

const OEM_ID: [u8; 6] = *b"HUSK  ";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// FADT boot flags: a keyboard controller is there (bit 1), no VGA (bit 2).
const BOOT_ARCH: u16 = 1 << 1 | 1 << 2;

/// What the tables say of the ports at [`layout::ACPI_POWER`]; a device has to agree.
pub mod power_ports {
    /// Offset of the sleep control port.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of the sleep status port.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of the reset port.
    pub const RESET: u64 = 2;
    /// Offset of the event port.
    pub const EVENTS: u64 = 3;
    /// Sleep type of \_S5; what a guest writes to the sleep control port to power off.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// What a guest writes to the reset port.
    pub const RESET_VALUE: u8 = 1;
    /// Bit of the event port that says the power button was pressed.
    pub const EVENT_POWER_BUTTON: u8 = 1;
    /// Bit of the event port that says the VM has become another one.
    pub const EVENT_GENERATION: u8 = 2;
}

/// All tables as they lie in memory from [`layout::ACPI`], the RSDP first.
pub(crate) fn build(apic_ids: &[u8], devices: &[VirtioMmio]) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut append = |table: &[u8]| {
        let at = layout::ACPI + image.len() as u64;
        image.extend_from_slice(table);
        image.resize(image.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = append(&dsdt(devices));
    let fadt = append(&bytes(&fadt(dsdt)));
    let madt = append(&bytes(&madt(apic_ids)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, layout::ACPI_POWER + offset)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means "no fixed button": ours is a device of the namespace.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.sleep_control_reg = port(power_ports::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power_ports::SLEEP_STATUS);
    fadt.reset_reg = port(power_ports::RESET);
    fadt.reset_value = power_ports::RESET_VALUE;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"HUSK    ").into();
    fadt.finalize()
}

fn madt(apic_ids: &[u8]) -> MADT {
    let lapic = u32::try_from(layout::LOCAL_APIC).unwrap_or(0);
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(lapic));
    for &id in apic_ids {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    let io_apic = u32::try_from(layout::IO_APIC).unwrap_or(0);
    madt.add_structure(IoApic::new(0, io_apic, 0));
    madt
}

/// An AML encoder made of several others, as `Scope` takes references only.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn dsdt(devices: &[VirtioMmio]) -> Vec<u8> {
    let mut body = Vec::new();
    let s5 = aml::Package::new(vec![&power_ports::SLEEP_TYPE_S5]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);
    let mut scope = Raw(Vec::new());
    power(&mut scope.0);
    identity(&mut scope.0);
    legacy(&mut scope.0);
    for (index, device) in devices.iter().enumerate() {
        virtio(&mut scope.0, index, device);
    }
    aml::Scope::new("_SB_".into(), vec![&scope]).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

fn interrupt(number: u32) -> aml::Interrupt {
    let (is_consumer, is_edge, is_active_low, is_shared) = (true, true, false, false);
    aml::Interrupt::new(is_consumer, is_edge, is_active_low, is_shared, number)
}

fn io(port: u64, len: u8) -> aml::IO {
    let port = u16::try_from(port).unwrap_or(0);
    aml::IO::new(port, port, 1, len)
}

/// The power button, and the device whose interrupt says that it was pressed.
fn power(out: &mut Vec<u8>) {
    let button = EISAName::new("PNP0C0C");
    aml::Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &button)]).to_aml_bytes(out);

    let event_port = u32::try_from(layout::ACPI_POWER + power_ports::EVENTS).unwrap_or(0);
    let region =
        aml::OpRegion::new("EVTR".into(), aml::OpRegionSpace::SystemIO, &event_port, &aml::ONE);
    let field = aml::Field::new(
        "EVTR".into(),
        aml::FieldAccessType::Byte,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        vec![aml::FieldEntry::Named(*b"EVTS", 8)],
    );
    // Reading the port takes the events; each is told to the device it belongs to.
    let (local, status, pressed) = (aml::Local(0), Path::new("EVTS"), Path::new("PWRB"));
    let take = aml::Store::new(&local, &status);
    // First, and twice: that the id is looked at again says that the first notification has been
    // served, as they are served in their order.
    let is_other = aml::And::new(&aml::Local(1), &local, &power_ports::EVENT_GENERATION);
    let (vgen, vclk) = (Path::new(GENERATION), Path::new(VMCLOCK));
    let (vgen, vclk) = (aml::Notify::new(&vgen, &0x80u8), aml::Notify::new(&vclk, &0x80u8));
    let payload = Path::new(PAYLOAD);
    let payload = aml::Notify::new(&payload, &0x80u8);
    let is_other_then = aml::If::new(&aml::Local(1), vec![&vgen, &vgen, &vclk, &payload]);
    let masked = aml::And::new(&aml::Local(1), &local, &power_ports::EVENT_POWER_BUTTON);
    let notify = aml::Notify::new(&pressed, &0x80u8);
    let is_pressed = aml::If::new(&aml::Local(1), vec![&notify]);
    let steps: Vec<&dyn Aml> = vec![&take, &is_other, &is_other_then, &masked, &is_pressed];
    let method = aml::Method::new("_EVT".into(), 1, true, steps);
    let irq = interrupt(layout::ACPI_IRQ);
    let resources = ResourceTemplate::new(vec![&irq]);
    aml::Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &resources),
            &region,
            &field,
            &method,
        ],
    )
    .to_aml_bytes(out);
}

const GENERATION: &str = "VGEN";
const VMCLOCK: &str = "VCLK";
const PAYLOAD: &str = "PYLD";

/// What says that a VM has become another one: the generation id (Microsoft, "Virtual Machine
/// Generation ID", 2012), VMClock (UAPI.13), and the payload, which is husk's.
fn identity(out: &mut Vec<u8>) {
    let low = u32::try_from(layout::GENERATION_ID).unwrap_or(0);
    let place = aml::Package::new(vec![&low, &aml::ZERO]);
    aml::Device::new(
        GENERATION.into(),
        vec![
            &Name::new("_HID".into(), &"HUSK0002"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &place),
        ],
    )
    .to_aml_bytes(out);
    let page = |base: u64, len: u64| {
        let (base, len) = (u32::try_from(base).unwrap_or(0), u32::try_from(len).unwrap_or(0));
        aml::Memory32Fixed::new(false, base, len)
    };
    aml::Device::new(
        VMCLOCK.into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&page(layout::VMCLOCK, layout::VMCLOCK_LEN)]),
            ),
        ],
    )
    .to_aml_bytes(out);
    aml::Device::new(
        PAYLOAD.into(),
        vec![
            &Name::new("_HID".into(), &"HUSK0001"),
            &Name::new("_DDN".into(), &"husk payload"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&page(layout::PAYLOAD, layout::PAYLOAD_LEN)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// Serial port, keyboard controller, clock.
fn legacy(out: &mut Vec<u8>) {
    let device = |out: &mut Vec<u8>, path: &str, hid: &str, resources: Vec<&dyn Aml>| {
        let hid = EISAName::new(hid);
        aml::Device::new(
            path.into(),
            vec![
                &Name::new("_HID".into(), &hid),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(out);
    };
    device(out, "COM1", "PNP0501", vec![&io(layout::SERIAL, 8), &interrupt(layout::SERIAL_IRQ)]);
    device(
        out,
        "KBD_",
        "PNP0303",
        vec![
            &io(layout::I8042_DATA, 1),
            &io(layout::I8042_COMMAND, 1),
            &interrupt(layout::I8042_IRQ),
        ],
    );
    // No interrupt: the clock has no alarm, and a kernel that is told of none polls instead.
    device(out, "RTC_", "PNP0B00", vec![&io(layout::RTC, 2)]);
}

fn virtio(out: &mut Vec<u8>, index: usize, device: &VirtioMmio) {
    let window = u32::try_from(device.acpi_window).unwrap_or(0);
    let memory = aml::Memory32Fixed::new(true, window, VirtioMmio::WINDOW_LEN);
    let irq = interrupt(device.irq);
    aml::Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            // DMA is coherent: the device is the host.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq])),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Vec<u8> {
        let devices: Vec<_> = (0..17)
            .map(|i| VirtioMmio {
                acpi_window: layout::VIRTIO_ACPI + i * 0x1000,
                cmdline_window: layout::VIRTIO_CMDLINE + i * 0x1000,
                irq: 5,
            })
            .collect();
        build(&(0..32).collect::<Vec<_>>(), &devices)
    }

    fn at(image: &[u8], addr: u64) -> &[u8] {
        let start = usize::try_from(addr - layout::ACPI).unwrap();
        let len = u32::from_le_bytes(image[start + 4..start + 8].try_into().unwrap());
        &image[start..start + len as usize]
    }

    fn u64_at(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let image = tables();
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = at(&image, u64_at(&image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = at(&image, u64_at(xsdt, 36));
        let madt = at(&image, u64_at(xsdt, 44));
        let dsdt = at(&image, u64_at(fadt, 140));
        assert_eq!(
            (&fadt[..4], &madt[..4], &dsdt[..4]),
            (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
        );
        for table in [xsdt, fadt, madt, dsdt] {
            assert_eq!(sum(table), 0);
        }
        assert!(layout::ACPI + image.len() as u64 <= layout::HIGH_RAM);
        // 32 local APICs of 8 bytes and an I/O APIC of 12 after the 44-byte header.
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
    }
}
