//! Images that are good, and images that are bad in one way each.
use std::io::Write;

use super::*;

/// A file that nobody else can see.
fn file(bytes: &[u8]) -> File {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("husk-kernel-{}-{n}", std::process::id()));
    let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF with the given program headers `(type, offset, paddr, filesz, memsz)` and 0x3000 bytes.
fn elf(entry: u64, headers: &[(u32, u64, u64, u64, u64)]) -> Vec<u8> {
    let mut image = vec![0; 0x3000];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &u16::try_from(headers.len()).unwrap().to_le_bytes());
    for (i, &(kind, offset, paddr, filesz, memsz)) in headers.iter().enumerate() {
        let at = 64 + 56 * i;
        put(&mut image, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, paddr), (32, filesz), (40, memsz)] {
            put(&mut image, at + field, &value.to_le_bytes());
        }
    }
    image
}

const LOAD: u32 = 1;
const NOTE: u32 = 4;

fn good() -> Vec<u8> {
    let mut image =
        elf(0x10_0010, &[(LOAD, 0x1000, 0x10_0000, 0x100, 0x800), (NOTE, 0x2000, 0, 0x20, 0x20)]);
    put(&mut image, 0x1010, b"code");
    image
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x2000];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &0x1c0u32.to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    image[0x201] = 0x6a;
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x600, b"code");
    image
}

fn read(image: &[u8]) -> Result<Kernel, FileError> {
    Kernel::parse(Path::new("k"), file(image))
}

fn refusal(image: &[u8]) -> String {
    read(image).unwrap_err().to_string()
}

fn ram(size: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

#[test]
fn loads_an_elf_by_its_own_entry() {
    let kernel = read(&good()).unwrap();
    assert_eq!(kernel.protocol(), Protocol::Linux64);
    let mem = ram(2 << 20);
    let entry = kernel.load(&mem).unwrap();
    assert_eq!((entry.addr, entry.start, entry.end), (0x10_0010, 0x10_0000, 0x10_0800));
    assert_eq!(mem.read_obj::<[u8; 4]>(GuestAddress(0x10_0010)).unwrap(), *b"code");
}

#[test]
fn prefers_pvh_where_the_note_is() {
    for (desc_len, name) in [(4u32, b"Xen\0"), (8, b"Xen\0")] {
        let mut image = good();
        put(&mut image, 0x2000, &4u32.to_le_bytes());
        put(&mut image, 0x2004, &desc_len.to_le_bytes());
        put(&mut image, 0x2008, &18u32.to_le_bytes());
        put(&mut image, 0x200c, name);
        put(&mut image, 0x2010, &0x10_0020u32.to_le_bytes());
        let kernel = read(&image).unwrap();
        assert_eq!((kernel.protocol(), kernel.entry), (Protocol::Pvh, 0x10_0020));
    }
}

#[test]
fn ignores_notes_of_others_and_broken_ones() {
    for (name_len, desc_len, kind) in
        [(4u32, 4u32, 17u32), (u32::MAX, 4, 18), (4, u32::MAX, 18), (0, 0, 18), (5, 4, 18)]
    {
        let mut image = good();
        put(&mut image, 0x2000, &name_len.to_le_bytes());
        put(&mut image, 0x2004, &desc_len.to_le_bytes());
        put(&mut image, 0x2008, &kind.to_le_bytes());
        put(&mut image, 0x200c, b"Xen\0");
        assert_eq!(read(&image).unwrap().protocol(), Protocol::Linux64);
    }
    let mut image = good();
    put(&mut image, 0x2000, &4u32.to_le_bytes());
    put(&mut image, 0x2004, &2u32.to_le_bytes());
    put(&mut image, 0x2008, &18u32.to_le_bytes());
    put(&mut image, 0x200c, b"Xen\0");
    assert!(refusal(&image).contains("PVH note"));
}

#[test]
fn refuses_what_is_no_kernel() {
    assert!(refusal(b"").contains("empty"));
    for len in 1..64 {
        read(&good()[..len]).unwrap_err();
        read(&vec![b'x'; len]).unwrap_err();
    }
    assert!(refusal(&[b'#'; 0x3000]).contains("neither an ELF file nor a bzImage"));
}

#[test]
fn names_the_bad_elf_header_field() {
    for (at, value, field) in [
        (4, &[1u8][..], "EI_CLASS"),
        (5, &[2], "EI_DATA"),
        (16, &[1, 0], "e_type"),
        (18, &[3, 0], "e_machine"),
        (32, &[8, 0], "e_phoff"),
        (54, &[32, 0], "e_phentsize"),
        (56, &[0xff, 0xff], "e_phnum"),
    ] {
        let mut image = good();
        put(&mut image, at, value);
        assert!(refusal(&image).contains(field), "{field}: {}", refusal(&image));
    }
    for (at, value) in [(32, u64::MAX), (32, 0x2ff0), (56, 60_000)] {
        let mut image = good();
        put(&mut image, at, &value.to_le_bytes()[..if at == 56 { 2 } else { 8 }]);
        assert!(refusal(&image).contains("truncated"), "{}", refusal(&image));
    }
}

#[test]
fn refuses_bad_segments() {
    let with = |header| refusal(&elf(0x10_0000, &[header]));
    assert!(with((LOAD, 0x1000, 0x10_0000, 0x2001, 0x2001)).contains("truncated"));
    assert!(with((LOAD, u64::MAX, 0x10_0000, 0x10, 0x10)).contains("truncated"));
    assert!(with((LOAD, 0x1000, 0x10_0000, 0x20, 0x10)).contains("p_filesz"));
    assert!(with((LOAD, 0x1000, u64::MAX - 8, 0x10, 0x10)).contains("p_paddr"));
    assert!(with((LOAD, 0x1000, 0x20_0000, 0x10, 0x10)).contains("entry point 0x100000"));
    assert!(refusal(&elf(0, &[])).contains("no segment"));
    assert!(with((LOAD, 0x1000, 0x10_0000, 0, 0)).contains("no segment"));
    let twice = [(LOAD, 0x1000, 0x10_0000, 0x10, 0x1000), (LOAD, 0x1000, 0x10_0fff, 0x10, 0x10)];
    assert!(refusal(&elf(0x10_0000, &twice)).contains("overlaps another segment"));
}

#[test]
fn refuses_segments_that_are_not_in_ram_or_over_boot_structures() {
    for (addr, len, what) in [
        (0x10_0000, 1 << 62, "not in RAM"),
        (0x1f_ff00, 0x101, "not in RAM"),
        (0xc000_0000, 0x10, "not in RAM"),
        (0x1_0000_0000, 0x10, "not in RAM"),
        (0x7000, 0x10, "boot structures"),
        (0x2_fff0, 0x20, "boot structures"),
        (0x9_fbf0, 0x20, "MP and ACPI"),
        (0xf_0000, 0x2_0000, "MP and ACPI"),
    ] {
        let kernel = read(&elf(addr, &[(LOAD, 0x1000, addr, 0x10, len)])).unwrap();
        let e = kernel.load(&ram(2 << 20)).unwrap_err().to_string();
        assert!(e.contains(what), "{addr:#x}: {e}");
    }
    read(&elf(0x3_0000, &[(LOAD, 0x1000, 0x3_0000, 0x10, 0x6_fc00)]))
        .unwrap()
        .load(&ram(1 << 20))
        .unwrap();
}

#[test]
fn a_kernel_that_shrinks_is_an_error() {
    let image = good();
    let file = file(&image);
    let shrinking = file.try_clone().unwrap();
    let kernel = Kernel::parse(Path::new("k"), file).unwrap();
    shrinking.set_len(0x1080).unwrap();
    let e = kernel.load(&ram(2 << 20)).unwrap_err();
    assert!(e.is_config(), "{e:?}");
    assert!(e.to_string().contains("became shorter while it was read"), "{e}");
}

#[test]
fn loads_a_bzimage_by_its_64_bit_entry() {
    let kernel = read(&bzimage()).unwrap();
    let mem = ram(32 << 20);
    let entry = kernel.load(&mem).unwrap();
    assert_eq!((entry.addr, entry.end), (0x100_0200, 0x110_0000));
    assert_eq!(mem.read_obj::<[u8; 4]>(GuestAddress(0x100_0200)).unwrap(), *b"code");
    assert_eq!((entry.initrd_ceiling(), entry.cmdline_max()), (0x8000_0000, 2048));
}

#[test]
fn names_the_bad_bzimage_field() {
    for (at, value, field) in [
        (0x1fe, &[0u8, 0][..], "boot_flag"),
        (0x202, b"Hdrs", "neither"),
        (0x206, &[5, 2], "version"),
        (0x206, &[0x0b, 2], "version"),
        (0x211, &[0], "loadflags"),
        (0x236, &[0, 0], "xloadflags"),
        (0x1f1, &[0xff], "setup_sects"),
        (0x1f1, &[0x0f], "syssize"),
        (0x1f4, &[0xff, 0xff], "syssize"),
        (0x1f4, &[0, 0, 0, 0], "syssize"),
        (0x258, &[0, 0x10, 0, 0], "pref_address"),
        (0x258, &[0xff; 8], "pref_address"),
    ] {
        let mut image = bzimage();
        put(&mut image, at, value);
        assert!(refusal(&image).contains(field), "{field}: {}", refusal(&image));
    }
    // init_size counts: the kernel unpacks itself there.
    let mut image = bzimage();
    put(&mut image, 0x260, &0x2000_0000u32.to_le_bytes());
    let e = read(&image).unwrap().load(&ram(32 << 20)).unwrap_err().to_string();
    assert!(e.contains("not in RAM"), "{e}");
}

/// What lies at a limit is within it.
#[test]
fn limits_are_within() {
    // Segments that end where the file does, have all their bytes in it, touch, and end where RAM does.
    let headers =
        [(LOAD, 0x1000, 0x1f_e000, 0x1000, 0x1000), (LOAD, 0x2000, 0x1f_f000, 0x1000, 0x1000)];
    let mut image = elf(0x1f_e000, &headers);
    put(&mut image, 0x2ffc, b"last");
    let mem = ram(2 << 20);
    read(&image).unwrap().load(&mem).unwrap();
    assert_eq!(mem.read_obj::<[u8; 4]>(GuestAddress(0x1f_fffc)).unwrap(), *b"last");
    // Program headers at the end of the file.
    let mut image = good();
    image.extend_from_within(64..64 + 56);
    put(&mut image, 32, &0x3000_u64.to_le_bytes());
    put(&mut image, 56, &1_u16.to_le_bytes());
    assert_eq!(read(&image).unwrap().entry().end, 0x10_0800);
    // None at all may be anywhere.
    put(&mut image, 32, &0_u64.to_le_bytes());
    put(&mut image, 56, &0_u16.to_le_bytes());
    assert!(refusal(&image).contains("no segment"));
    let mut image = bzimage();
    put(&mut image, 0x206, &bzimage::VERSION_MIN.to_le_bytes());
    put(&mut image, 0x258, &layout::HIGH_RAM.to_le_bytes());
    assert_eq!(read(&image).unwrap().entry().start, layout::HIGH_RAM);
}

#[test]
fn a_bzimage_that_ends_in_its_header_is_none() {
    assert!(refusal(&bzimage()[..0x26f]).contains("neither"));
    assert!(refusal(&bzimage()[..0x270]).contains("syssize"));
}

#[test]
fn a_kernel_takes_so_much_command_line() {
    let kernel = read(&bzimage()).unwrap();
    kernel.check_cmdline(&"x".repeat(2047)).unwrap();
    let e = kernel.check_cmdline(&"x".repeat(2048)).unwrap_err().to_string();
    assert!(e.contains("2047"), "{e}");
}

#[test]
fn a_file_is_copied_from_its_beginning() {
    let (mem, file) = (ram(1 << 20), file(b"initrd"));
    copy_file(&mem, 0x1000, &file, 6).unwrap();
    assert_eq!(mem.read_obj::<[u8; 6]>(GuestAddress(0x1000)).unwrap(), *b"initrd");
    copy_file(&mem, 0x1000, &file, 7).unwrap_err();
    copy_file(&mem, (1 << 20) - 1, &file, 6).unwrap_err();
}

#[test]
fn protocols_have_names() {
    assert_eq!([Protocol::Linux64, Protocol::Pvh].map(|p| p.to_string()), ["Linux 64-bit", "PVH"]);
}
