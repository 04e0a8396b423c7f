//! Guests of a few instructions, made here byte by byte: an ELF image with a PVH note, which husk
//! and the floor both boot. They run in 32-bit protected mode with paging off.
use std::path::PathBuf;
use std::{fs, io};

use crate::Bench;

/// Where the image is loaded, headers and all.
const LOAD_ADDR: u32 = 0x10_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Name length, descriptor length, type, "Xen", entry: 4 bytes each.
const NOTE: usize = 20;
const CODE_AT: usize = ELF_HEADER + 2 * PROGRAM_HEADER + NOTE;

/// `mov edx, 0x3f8; mov al, '!'; out dx, al`: the first byte out of the serial port.
const SAY: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'!', 0xee];
/// `cli; hlt; jmp $-2`: idle for good.
const IDLE: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfc];
/// `mov al, 0xfe; out 0x64, al`: a reset by the keyboard controller.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];

/// Writes a byte to the serial port, then idles.
pub(crate) fn idle(bench: &Bench) -> io::Result<PathBuf> {
    write(bench, "idle.elf", &[SAY, IDLE].concat())
}

/// Writes a byte to the serial port, then resets the machine.
pub(crate) fn reset(bench: &Bench) -> io::Result<PathBuf> {
    write(bench, "reset.elf", &[SAY, RESET, IDLE].concat())
}

/// Writes `count` bytes to the serial port, each by an instruction of its own.
pub(crate) fn bytes(bench: &Bench, count: u32) -> io::Result<PathBuf> {
    // mov edx, 0x3f8; mov al, '!'; mov ecx, COUNT; 1: out dx, al; dec ecx; jnz 1b
    let mut code = SAY[..7].to_vec();
    code.push(0xb9);
    code.extend(count.to_le_bytes());
    code.extend([0xee, 0x49, 0x75, 0xfc]);
    write(bench, "bytes.elf", &[&code, IDLE].concat())
}

/// Writes `count` bytes to the serial port by one string instruction.
pub(crate) fn burst(bench: &Bench, count: u32) -> io::Result<PathBuf> {
    // mov edx, 0x3f8; mov al, '!'; mov esi, LOAD_ADDR; mov ecx, COUNT; cld; rep outsb
    let mut code = SAY[..7].to_vec();
    code.push(0xbe);
    code.extend(LOAD_ADDR.to_le_bytes());
    code.push(0xb9);
    code.extend(count.to_le_bytes());
    code.extend([0xfc, 0xf3, 0x6e]);
    write(bench, "burst.elf", &[&code, IDLE].concat())
}

/// Writes bytes to the serial port and does nothing else: whenever it goes on, it says so at once.
pub(crate) fn chatter(bench: &Bench) -> io::Result<PathBuf> {
    // mov edx, 0x3f8; mov al, '!'; 1: out dx, al; jmp 1b
    write(bench, "chatter.elf", &[&SAY[..7], &[0xee, 0xeb, 0xfd]].concat())
}

/// Says that it is there; then, for each byte that it is sent, writes to `count` pages and says so.
pub(crate) fn writer(bench: &Bench, count: u32) -> io::Result<PathBuf> {
    let mut code = SAY.to_vec();
    // 1: mov edx, 0x3fd; 2: in al, dx; test al, 1; jz 2b; mov edx, 0x3f8; in al, dx
    code.extend([0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 1, 0x74, 0xfb, 0xba, 0xf8, 0x03, 0, 0, 0xec]);
    // mov edi, 32 MiB; mov ecx, COUNT; 3: mov [edi], al; add edi, 4096; dec ecx; jnz 3b
    code.extend([0xbf, 0, 0, 0, 2, 0xb9]);
    code.extend(count.to_le_bytes());
    code.extend([0x88, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x49, 0x75, 0xf5]);
    code.extend(SAY);
    code.extend([0xeb, 0xd1]); // jmp 1b
    write(bench, "writer.elf", &code)
}

fn write(bench: &Bench, name: &str, code: &[u8]) -> io::Result<PathBuf> {
    let path = bench.scratch.join(name);
    fs::write(&path, image(code))?;
    Ok(path)
}

/// One segment, which is the whole file, and a note that says where its code begins.
fn image(code: &[u8]) -> Vec<u8> {
    let entry = LOAD_ADDR + u32::try_from(CODE_AT).expect("the headers are short");
    let len = (CODE_AT + code.len()) as u64;
    let load_addr = u64::from(LOAD_ADDR);
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    image.extend(u64::from(entry).to_le_bytes());
    image.extend((ELF_HEADER as u64).to_le_bytes());
    image.extend([0; 12]); // no sections, no flags
    image.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]); // header sizes, two program headers
    let note_at = (ELF_HEADER + 2 * PROGRAM_HEADER) as u64;
    program_header(&mut image, [1, 7], 0, load_addr, len);
    program_header(&mut image, [4, 4], note_at, load_addr + note_at, NOTE as u64);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

fn program_header(image: &mut Vec<u8>, kind_flags: [u32; 2], offset: u64, addr: u64, len: u64) {
    image.extend(kind_flags.iter().flat_map(|word| word.to_le_bytes()));
    for word in [offset, addr, addr, len, len, 4] {
        image.extend(word.to_le_bytes());
    }
}
