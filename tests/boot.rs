//! Kernels of each kind boot, with RAM from very little to more than 4 GiB and one to many vCPUs, and find what they
//! need to know about the machine.
use std::process::Command;

use crate::util::*;

#[test]
fn demo_guest_needs_no_arguments() {
    let end = Husk::new(["run"]).wait().code(0);
    assert!(end.output.contains("Hello from a bare-metal guest."), "{end}");
    assert!(end.output.contains("128 MiB"), "{end}");
    assert!(end.output.contains("after husk started"), "{end}");
    assert_eq!(end.errors, "");
}

#[test]
fn demo_guest_lists_its_devices() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 << 20);
    let end = Husk::new(["run", "--cpus", "2", "--rng"]).read_only_disk(&disk).wait().code(0);
    assert!(end.output.contains("16 MiB, read-only at 0xc0001000"), "{end}");
    assert!(end.output.contains("entropy     at 0xc0002000"), "{end}");
    assert!(end.output.contains("2 x "), "{end}");
}

#[test]
fn elf_is_entered_by_pvh_if_it_has_the_note() {
    let end = Husk::guest("info", "some words").wait().ok();
    assert_eq!(end.value("protocol"), "PVH");
    assert_eq!(end.value("cmdline"), "some words");
}

#[test]
fn elf_is_entered_by_the_linux_protocol_otherwise() {
    let scratch = Scratch::new();
    let kernel = without_pvh(&scratch, &guest("info"));
    let end = Husk::run(kernel).cmdline("some words").wait().ok();
    assert_ne!(end.value("protocol"), "PVH");
    assert_eq!(end.value("cmdline"), "some words");
}

#[test]
fn elf_of_a_dozen_instructions_boots() {
    let scratch = Scratch::new();
    let kernel = scratch.file("plus.elf", Elf::good().bytes);
    let end = Husk::run(kernel).wait().code(0);
    assert_eq!(end.output, "+");
}

#[test]
fn bzimage_is_entered_at_its_64_bit_entry() {
    let scratch = Scratch::new();
    let kernel = scratch.file("bzImage", bz_image(PLUS_AND_POWEROFF));
    let end = Husk::run(kernel).wait().code(0);
    assert_eq!(end.output, "+");
}

#[test]
fn bss_is_zero_and_segments_lie_where_they_say() {
    let scratch = Scratch::new();
    // mov dx, 0x3f8; mov al, [0x200001]; add al, [0x200000]; out dx, al; then power off.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0x8a, 0x04, 0x25, 0x01, 0x00, 0x20, 0x00];
    code.extend([0x02, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xee]);
    code.extend(&PLUS_AND_POWEROFF[7..]);
    let data = Segment { addr: 0x20_0000, bytes: b"D".to_vec(), mem_len: 0x10_0000 };
    let elf = Elf::new(0x10_0000, &[Segment::new(0x10_0000, &code), data]);
    let end = Husk::run(scratch.file("data.elf", elf.bytes)).wait().code(0);
    assert_eq!(end.output, "D");
}

#[test]
fn ram_of_1_mib() {
    let end = Husk::run(guest_at("info", 0x4_0000)).memory(1).cmdline("touch").wait().ok();
    assert_eq!(end.values("memory"), ["0x0-0x9fc00 kind=1", "0x9fc00-0x100000 kind=2"]);
}

#[test]
fn ram_of_128_mib() {
    let end = Husk::guest("info", "touch").wait().ok();
    let expected = ["0x0-0x9fc00 kind=1", "0x9fc00-0x100000 kind=2", "0x100000-0x8000000 kind=1"];
    assert_eq!(end.values("memory"), expected);
    assert!(end.values("touched").contains(&"0x7fffff8"), "{end}");
}

#[test]
fn ram_of_5000_mib_goes_around_the_hole() {
    let scratch = Scratch::new();
    for kernel in [guest("info"), without_pvh(&scratch, &guest("info"))] {
        let end = Husk::run(kernel).memory(5000).cmdline("touch").wait().ok();
        let high = &end.values("memory")[2..];
        assert_eq!(high, ["0x100000-0xc0000000 kind=1", "0x100000000-0x178800000 kind=1"]);
        assert!(end.values("touched").ends_with(&["0x100001000", "0x1787ffff8"]), "{end}");
    }
}

#[test]
fn initrd_arrives_whole() {
    let scratch = Scratch::new();
    let bytes: Vec<u8> = (0..1_234_567_u32).map(|i| (i * 7 % 251) as u8).collect();
    let sum: u64 = bytes.iter().map(|&b| u64::from(b)).sum();
    let initrd = scratch.file("initrd", &bytes);
    for kernel in [guest("info"), without_pvh(&scratch, &guest("info"))] {
        let end = Husk::run(kernel).initrd(&initrd).wait().ok();
        assert!(end.value("initrd").ends_with(" size=1234567"), "{end}");
        assert_eq!(end.value("initrd_sum"), sum.to_string());
    }
}

#[test]
fn command_line_of_2047_bytes_arrives_whole() {
    let words = format!("{} last", "x".repeat(2047 - 5));
    let end = Husk::guest("info", &words).wait().ok();
    assert!(end.value("cmdline") == words, "{end}");
}

#[test]
fn devices_are_appended_to_the_command_line() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let end = Husk::guest("info", "mine").disk(disk).wait().ok();
    let expected = "mine root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5";
    assert_eq!(end.value("cmdline"), expected);
}

#[test]
fn one_vcpu_is_a_package_of_one() {
    check_topology(Husk::guest("info", ""), 1, 1);
}

#[test]
fn two_vcpus_are_two_cores() {
    check_topology(Husk::guest("info", "").cpus(2), 2, 1);
}

#[test]
fn six_vcpus_with_smt_are_three_cores() {
    check_topology(Husk::guest("info", "").cpus(6).arg("--smt"), 6, 2);
}

#[test]
fn thirty_two_vcpus_are_32_cores() {
    check_topology(Husk::guest("info", "").cpus(32), 32, 1);
}

/// CPUID, ACPI and MP table agree on `vcpus`, `threads` of them to a core.
#[track_caller]
fn check_topology(husk: Husk, vcpus: u32, threads: u32) {
    let end = husk.wait().ok();
    assert_eq!(end.value("cpus"), vcpus.to_string(), "MADT");
    assert_eq!(end.value("mp_processors"), vcpus.to_string(), "MP table");
    let ids: Vec<String> = (0..vcpus).map(|id| format!("{id} enabled=true")).collect();
    assert_eq!(end.values("cpu"), ids);
    // Intel's manual, CPUID: EBX[23:16] and EDX[28] of leaf 1; EAX[31:26] of leaf 4; levels of leaf 0xb.
    let [_, ebx, ecx, edx] = cpuid(&end, "1.0");
    assert_eq!(ebx >> 24, 0, "initial APIC id");
    assert_eq!(ebx >> 16 & 0xff, vcpus, "logical processors");
    // With one vCPU it is clear in what KVM was told, and yet some back ends show the host's.
    assert!(vcpus == 1 || edx >> 28 & 1 == 1, "HTT");
    assert_eq!(ecx >> 31, 1, "hypervisor");
    let [thread_shift, thread_count, thread_level, _] = cpuid(&end, "b.0");
    assert_eq!((1 << (thread_shift & 0x1f), thread_count & 0xffff), (threads, threads));
    assert_eq!(thread_level, 0x100, "SMT");
    let [core_shift, core_count, core_level, _] = cpuid(&end, "b.1");
    assert_eq!(1 << (core_shift & 0x1f), vcpus.next_power_of_two());
    assert_eq!((core_count & 0xffff, core_level), (vcpus, 0x201));
    let [_, none, level, _] = cpuid(&end, "b.2");
    assert_eq!((none & 0xffff, level & 0xff00), (0, 0));
}

/// EAX, EBX, ECX, EDX of a leaf and subleaf.
fn cpuid(end: &End, leaf: &str) -> [u32; 4] {
    let line = end.value(&format!("cpuid.{leaf}"));
    let words: Vec<u32> = line.split(' ').map(|w| u32::from_str_radix(w, 16).unwrap()).collect();
    words.try_into().unwrap()
}

#[test]
fn guest_knows_its_hypervisor_and_clock() {
    let end = Husk::guest("info", "").wait().ok();
    assert!(end.value("hypervisor").starts_with("KVMKVMKVM"), "{end}");
    assert_eq!(end.value("clock"), "KvmClock");
}

#[test]
fn acpi_tables_are_intact_and_complete() {
    // The guest checks the sums and the value of _S5.
    let end = Husk::guest("info", "").wait().ok();
    let tables = end.values("acpi");
    let names: Vec<&str> = tables.iter().map(|t| t.split(' ').next().unwrap()).collect();
    for name in ["XSDT", "FACP", "APIC", "DSDT"] {
        assert!(names.contains(&name), "{end}");
    }
    assert_eq!(end.value("s5"), "Some(5)");
    // HW_REDUCED_ACPI and RESET_REG_SUP (ACPI 6.5, table 5.10).
    let flags = u32::from_str_radix(&end.value("fadt_flags")[2..], 16).unwrap();
    assert_eq!(flags >> 20 & 1, 1);
    assert_eq!(flags >> 10 & 1, 1);
    assert_eq!(end.value("ioapic"), "0 at=0xfec00000 gsi=0");
}

#[test]
fn rtc_tells_the_time() {
    let now = || {
        let date = Command::new("date").args(["-u", "+%FT%T"]).output().unwrap();
        String::from_utf8(date.stdout).unwrap().trim().to_owned()
    };
    let before = now();
    let end = Husk::guest("info", "").wait().ok();
    let rtc = end.value("rtc").to_owned();
    assert!(before <= rtc && rtc <= now(), "{before} {rtc}");
}

#[test]
fn every_vcpu_starts_once() {
    for vcpus in [1, 2, 4, 32] {
        let cmdline = format!("expect={vcpus} timeout_ms=30000");
        let end = Husk::guest("smp", &cmdline).cpus(vcpus).wait().ok();
        let mut started: Vec<u32> = end.values("ap").iter().map(|id| id.parse().unwrap()).collect();
        started.sort_unstable();
        assert_eq!(started, (1..vcpus).collect::<Vec<_>>());
    }
}

#[test]
fn vcpus_start_by_x2apic() {
    let end = Husk::guest("smp", "expect=4 timeout_ms=30000 x2apic").cpus(4).wait().ok();
    assert_eq!(end.value("online"), "4");
}

#[test]
fn pit_and_huge_pages_by_option() {
    Husk::guest("info", "touch").arg("--pit").wait().ok();
    Husk::guest("info", "touch").option("--huge-pages", "transparent").wait().ok();
}
