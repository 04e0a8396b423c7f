//! The demo guest: says what it found on this machine, and powers off.
//!
//! All text leaves at the end in one `rep outsb`, so that the time it tells is not that of its own printing, and every
//! register read is worth a line.
#![no_std]
#![no_main]

use rt::boot::BootInfo;
use rt::clock::{self, Source};
use rt::console::{self, Text};
use rt::{Outcome, acpi, cpu, options, power, virtio};

rt::entry!(run);

const BLK_F_RO: u64 = 1 << 5;
const NET_F_MAC: u64 = 1 << 5;

/// The whole text.
type Page = Text<2048>;

fn run(boot: &'static BootInfo) -> Outcome {
    let source = clock::start();
    let entered_us = clock::now_us();

    let mut page = Page::new();
    line(&mut page, "", format_args!(""));
    line(&mut page, "", format_args!("Hello from a bare-metal guest."));
    line(&mut page, "", format_args!(""));
    line(
        &mut page,
        "boot",
        format_args!("{} entry at {:#x}", boot.protocol, rt::memory::image().0),
    );
    memory(&mut page, boot);
    processors(&mut page, boot);
    match cpu::hypervisor() {
        Some(signature) => line(&mut page, "hypervisor", format_args!("{}", signature.as_str())),
        None => line(&mut page, "hypervisor", format_args!("none that says so")),
    }
    for device in virtio::devices(boot.cmdline) {
        describe(&mut page, device);
    }
    command(&mut page, boot.cmdline);
    time(&mut page, boot, source, entered_us);
    line(&mut page, "", format_args!(""));
    console::write(page.as_bytes());
    power::poweroff()
}

/// Adds a line: a label in a column of its own, then the text.
fn line(page: &mut Page, label: &str, text: core::fmt::Arguments) {
    match label {
        "" => page.push(format_args!("  {text}\r\n")),
        _ => page.push(format_args!("  {label:<11} {text}\r\n")),
    }
}

fn memory(page: &mut Page, boot: &BootInfo) {
    let ranges = boot.memory().iter().filter(|r| r.is_ram()).count();
    let plural = if ranges == 1 { "" } else { "s" };
    // Rounded: a hole of some KiB below 1 MiB should not cost a whole one here.
    let mib = (boot.ram_bytes() + (1 << 19)) >> 20;
    line(page, "memory", format_args!("{mib} MiB in {ranges} range{plural}"));
}

/// The brand, or the vendor where CPUID has no brand, and how many of them.
fn processors(page: &mut Page, boot: &BootInfo) {
    let (brand, vendor) = (cpu::brand(), cpu::vendor());
    let name = if brand.as_str().is_empty() { vendor.as_str() } else { brand.as_str() };
    line(page, "cpus", format_args!("{} x {name}", acpi::cpus(boot).count()));
}

/// The command line without the devices, which have lines of their own.
fn command(page: &mut Page, cmdline: &str) {
    let mut words = Text::<400>::new();
    for word in cmdline.split_ascii_whitespace() {
        if !word.starts_with("virtio_mmio.device=") {
            words.push(format_args!("{word} "));
        }
    }
    if !words.as_str().is_empty() {
        line(page, "command", format_args!("{}", words.as_str().trim_end()));
    }
}

fn describe(page: &mut Page, device: virtio::Device) {
    let place = device.base;
    if !device.is_present() {
        return line(page, "virtio", format_args!("nothing at {place:#x}"));
    }
    let irq = device.irq;
    match device.id() {
        virtio::ID_BLOCK => {
            let kib = device.config64(0) / 2;
            let (size, unit) = if kib >= 10 << 10 { (kib >> 10, "MiB") } else { (kib, "KiB") };
            let access = if device.features() & BLK_F_RO == 0 { "" } else { ", read-only" };
            line(page, "disk", format_args!("{size} {unit}{access} at {place:#x} irq {irq}"));
        }
        virtio::ID_NET if device.features() & NET_F_MAC != 0 => {
            let [a, b, c, d, e, f] = core::array::from_fn(|i| device.config8(i));
            let mac = format_args!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
            line(page, "net", format_args!("{mac} at {place:#x} irq {irq}"));
        }
        virtio::ID_NET => line(page, "net", format_args!("no MAC at {place:#x} irq {irq}")),
        id => line(page, name(id), format_args!("at {place:#x} irq {irq}")),
    }
}

/// Virtio 1.2, 5.
fn name(id: u32) -> &'static str {
    match id {
        3 => "console",
        virtio::ID_RNG => "entropy",
        5 => "balloon",
        9 => "9p",
        virtio::ID_VSOCK => "vsock",
        24 => "memory",
        26 => "fs",
        27 => "pmem",
        _ => "virtio",
    }
}

/// Kvm-clock starts with the VM; the monitor's own share of the start comes by the command line.
fn time(page: &mut Page, boot: &BootInfo, source: Source, entered_us: u64) {
    let spent = Millis(clock::now_us() - entered_us);
    let before = options::value(boot.cmdline, "husk.boot_us").and_then(options::parse);
    match (source, before) {
        (Source::KvmClock, Some(before)) => {
            let entered = Millis(before + entered_us);
            line(
                page,
                "time",
                format_args!("entered {entered} after husk started, {spent} spent here"),
            );
        }
        (Source::KvmClock, None) => {
            let entered = Millis(entered_us);
            line(
                page,
                "time",
                format_args!("entered {entered} after the VM was made, {spent} spent here"),
            );
        }
        (Source::Tsc, _) => line(page, "time", format_args!("no kvm-clock to tell")),
    }
}

/// Microseconds, shown in milliseconds.
struct Millis(u64);

impl core::fmt::Display for Millis {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        write!(f, "{}.{:02} ms", self.0 / 1000, self.0 % 1000 / 10)
    }
}
