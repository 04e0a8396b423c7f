//! Dumps what the machine says of itself: boot information, CPUID topology, ACPI and MP tables with their checksums
//! verified, RTC and kvm-clock. `touch` also writes to and reads from both ends of every RAM range.
#![no_std]
#![no_main]

use rt::acpi::{self, MadtEntry};
use rt::clock::{self, Source};
use rt::{
    BootInfo, Outcome, console, cpu, ensure, memory, options, power, print, println, ring0, virtio,
};

rt::entry!(run);

fn run(boot: &'static BootInfo) -> Outcome {
    let source = clock::start();
    print_boot(boot);
    print_cpuid();
    print_acpi(boot)?;
    print_mp_table()?;
    print_time(source);
    for device in virtio::devices(boot.cmdline) {
        let id = if device.is_present() { device.id() } else { 0 };
        println!("virtio={:#x} size={:#x} irq={} id={id}", device.base, device.size, device.irq);
    }
    if options::has(boot.cmdline, "touch") {
        touch(boot)?;
    }
    Ok(())
}

fn print_boot(boot: &BootInfo) {
    println!("protocol={}", boot.protocol);
    println!("boot_info={:#x}", boot.address);
    // May be longer than a line of println.
    print!("cmdline=");
    console::write(boot.cmdline.as_bytes());
    println!();
    let (start, end) = memory::image();
    println!("image={start:#x}-{end:#x}");
    for range in boot.memory() {
        println!("memory={:#x}-{:#x} kind={}", range.start, range.end(), range.kind);
    }
    println!("ram_bytes={}", boot.ram_bytes());
    if let Some((start, size)) = boot.initrd {
        println!("initrd={start:#x} size={size}");
        // SAFETY: the loader put it there.
        let bytes = unsafe { core::slice::from_raw_parts(start as *const u8, size as usize) };
        let sum = bytes.iter().fold(0_u64, |sum, byte| sum + u64::from(*byte));
        println!("initrd_sum={sum}");
    }
}

fn print_cpuid() {
    println!("vendor={}", cpu::vendor().as_str());
    println!("brand={}", cpu::brand().as_str());
    println!("hypervisor={}", cpu::hypervisor().map_or(rt::console::Text::new(), |h| h).as_str());
    for (leaf, subleaves) in
        [(1, 1), (4, 4), (7, 1), (0xb, 3), (0xd, 2), (0x8000_0001, 1), (0x8000_0008, 1)]
    {
        for subleaf in 0..subleaves {
            let [a, b, c, d] = ring0::cpuid(leaf, subleaf);
            println!("cpuid.{leaf:x}.{subleaf}={a:08x} {b:08x} {c:08x} {d:08x}");
        }
    }
    println!("cr0={:#x} cr4={:#x}", ring0::control_register(0), ring0::control_register(4));
    println!("misc_enable={:#x}", ring0::rdmsr(0x1a0).unwrap_or(0));
    println!("apic_base={:#x}", ring0::rdmsr(0x1b).unwrap_or(0));
}

fn print_acpi(boot: &BootInfo) -> Outcome {
    let Some(rsdp) = acpi::rsdp(boot) else {
        println!("rsdp=none");
        return Ok(());
    };
    println!("rsdp={rsdp:#x}");
    ensure!(acpi::is_rsdp_intact(rsdp), "the RSDP's checksum is wrong");
    let fadt = acpi::fadt(boot);
    for table in acpi::root(boot)
        .into_iter()
        .chain(acpi::tables(boot))
        .chain(fadt.as_ref().and_then(acpi::dsdt))
    {
        println!("acpi={} at={:#x} len={}", table.name(), table.address, table.len);
        ensure!(table.is_intact(), "the checksum of {} is wrong", table.name());
    }
    if let Some(fadt) = fadt {
        println!("fadt_flags={:#x}", fadt.flags);
        println!("sleep_control={:x?} sleep_status={:x?}", fadt.sleep_control, fadt.sleep_status);
        println!("reset={:x?}", fadt.reset);
        let s5 = acpi::dsdt(&fadt).and_then(|dsdt| s5_sleep_type(dsdt.bytes()));
        println!("s5={s5:?}");
        ensure!(s5.is_none_or(|s5| s5 == power::S5_SLEEP_TYPE), "_S5 is {s5:?}");
    }
    for entry in acpi::madt(boot) {
        match entry {
            MadtEntry::LocalApic { id, is_enabled } => println!("cpu={id} enabled={is_enabled}"),
            MadtEntry::IoApic { id, address, first_gsi } => {
                println!("ioapic={id} at={address:#x} gsi={first_gsi}");
            }
            MadtEntry::Override { irq, gsi } => println!("override={irq} gsi={gsi}"),
            MadtEntry::Other { kind } => println!("madt_entry={kind}"),
        }
    }
    println!("cpus={}", acpi::cpus(boot).count());
    Ok(())
}

/// The first element of the package `\_S5_`: NameOp, name, PackageOp, length, count, then a byte constant.
fn s5_sleep_type(aml: &[u8]) -> Option<u8> {
    let at = aml.windows(5).position(|w| w[..4] == *b"_S5_" && w[4] == 0x12)?;
    let package = aml.get(at + 5..)?;
    let length_bytes = 1 + usize::from(package.first()? >> 6);
    match package.get(length_bytes + 1..)? {
        [0x0a, value, ..] => Some(*value),
        [value @ 0..=1, ..] => Some(*value),
        _ => None,
    }
}

/// The MP floating pointer (MP specification 1.4, 4.1) is in the EBDA, the last KiB of base memory, or the BIOS area.
fn print_mp_table() -> Outcome {
    // SAFETY: the BIOS data area; mapped whether the machine fills it or not.
    let ebda = u64::from(unsafe { memory::read_at::<u16>(0x40e) }) << 4;
    let ebda = if (0x8_0000..0xa_0000).contains(&ebda) { ebda } else { 0x9_fc00 };
    let places = [ebda..ebda + 0x400, 0x9_fc00..0xa_0000, 0xf_0000..0x10_0000];
    // SAFETY: low memory is mapped and has no side effects.
    let is_pointer = |&at: &u64| unsafe { memory::read_at::<[u8; 4]>(at) } == *b"_MP_";
    let Some(pointer) = places.into_iter().find_map(|p| p.step_by(16).find(is_pointer)) else {
        println!("mp=none");
        return Ok(());
    };
    // SAFETY: the structure found above, and the table it names.
    let (pointer_bytes, table) = unsafe {
        let table: u32 = memory::read_at(pointer + 4);
        let len: u16 = memory::read_at(u64::from(table) + 4);
        (
            core::slice::from_raw_parts(pointer as *const u8, 16),
            core::slice::from_raw_parts(table as usize as *const u8, len.into()),
        )
    };
    ensure!(acpi::sum(pointer_bytes) == 0, "the MP floating pointer's checksum is wrong");
    ensure!(table.starts_with(b"PCMP"), "the MP table has no signature");
    ensure!(acpi::sum(table) == 0, "the MP table's checksum is wrong");
    let entries = u16::from_le_bytes([table[34], table[35]]);
    println!("mp={pointer:#x} len={} entries={entries}", table.len());
    // By length, as some firmware leaves the count 0.
    let (mut rest, mut walked, mut processors) = (&table[44..], 0, 0);
    while let Some(kind) = rest.first() {
        let len = if *kind == 0 { 20 } else { 8 };
        ensure!(rest.len() >= len, "the MP table ends inside an entry");
        (rest, walked) = (&rest[len..], walked + 1);
        processors += u32::from(*kind == 0);
    }
    ensure!(entries == 0 || entries == walked, "the MP table has {walked} entries, not {entries}");
    println!("mp_processors={processors}");
    Ok(())
}

fn print_time(source: Source) {
    println!("clock={source:?}");
    println!("clock_us={}", clock::now_us());
    let read = |register| {
        ring0::out8(0x70, register);
        ring0::in8(0x71)
    };
    // Status register A of an RTC that is not there.
    if read(0x0a) == 0xff {
        println!("rtc=none");
        return;
    }
    let is_binary = read(0x0b) & 4 != 0;
    let number = |register| match read(register) {
        value if is_binary => value,
        value => (value >> 4) * 10 + (value & 15),
    };
    let [second, minute, hour, day, month, year] = [0, 2, 4, 7, 8, 9].map(number);
    println!("rtc=20{year:02}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
}

fn touch(boot: &BootInfo) -> Outcome {
    let (image_start, image_end) = memory::image();
    for range in boot.memory().iter().filter(|r| r.is_ram()) {
        for address in [range.start + 0x1000, range.end() - 8] {
            let is_ours = (image_start..image_end).contains(&address);
            if range.size < 0x2000 || is_ours {
                continue;
            }
            memory::map_gib(address);
            let cell = address as *mut u64;
            // SAFETY: RAM by the memory map, outside the image; the old value is put back.
            let read = unsafe {
                let old = cell.read_volatile();
                cell.write_volatile(!address);
                let read = cell.read_volatile();
                cell.write_volatile(old);
                read
            };
            ensure!(read == !address, "RAM at {address:#x} reads {read:#x}");
            println!("touched={address:#x}");
        }
    }
    Ok(())
}
