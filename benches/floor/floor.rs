//! The speed floor: how fast a VM can start at all on this machine. Nothing but the KVM calls that a monitor cannot do
//! without, in the best order known, up to the guest's first exit.
//!
//! It deliberately shares no code with husk: what husk adds on top is the difference to this. The guest is two
//! instructions, or an ELF image with a PVH note.
//!
//! `cargo bench` runs it for comparison; by hand it is `cargo bench -- floor` and
//!
//!     [--elf FILE] [--cmdline TEXT] [--mem MIB] [--runs N]    one process, N VMs one after another: medians
//!     --image FILE [...]                                      the least a restore can do: the guest's memory is FILE, mapped
//!                                                             privately, and it goes on in real mode at 0x1000
//!     --at-once N [...]                                       N processes with a VM each, at the same time
//!     --echo exit|stay [...]                                  one VM; writes to standard output what the guest wrote
//!                                                             first, then ends, or waits to be killed
#![expect(unsafe_code, reason = "raw ioctls are the point")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, ptr, slice};

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_GET_SUPPORTED_CPUID: u64 = 0xc008_ae05;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_SET_TSS_ADDR: u64 = 0xae47;
const KVM_CREATE_IRQCHIP: u64 = 0xae60;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_SET_MSRS: u64 = 0x4008_ae89;
const KVM_SET_FPU: u64 = 0x41a0_ae8d;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_SET_LAPIC: u64 = 0x4400_ae8f;
const KVM_SET_CPUID2: u64 = 0x4008_ae90;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const PVH_NOTE: u32 = 18;
const START_INFO: u64 = 0x6000;
const CMDLINE: u64 = 0x2_0000;

/// `out 0x80, al; hlt`, run in real mode at 0x1000.
const TWO_INSTRUCTIONS: &[u8] = &[0xe6, 0x80, 0xf4];

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// `struct kvm_regs`.
#[repr(C)]
#[derive(Default)]
struct Regs {
    rax: u64,
    rbx: u64,
    rcx_to_r15: [u64; 14],
    rip: u64,
    rflags: u64,
}

/// `struct kvm_segment`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

/// `struct kvm_sregs`.
#[repr(C)]
#[derive(Default)]
struct Sregs {
    cs: Segment,
    ds_es_fs_gs_ss: [Segment; 5],
    tr: Segment,
    ldt: Segment,
    gdt_idt: [u64; 4],
    cr0: u64,
    cr2_to_apic_base: [u64; 6],
    interrupt_bitmap: [u64; 4],
}

/// `struct kvm_cpuid2` with room for every entry KVM may give.
#[repr(C)]
struct Cpuid {
    count: u32,
    padding: u32,
    entries: [[u32; 10]; 256],
}

/// `struct kvm_msrs` with one `struct kvm_msr_entry`.
#[repr(C)]
struct Msrs {
    count: u32,
    padding: u32,
    index: u32,
    reserved: u32,
    data: u64,
}

/// `struct kvm_fpu`: what matters is FCW at byte 128 and MXCSR at 408.
#[repr(C, align(8))]
struct Fpu([u8; 416]);

/// `struct kvm_lapic_state`.
#[repr(C, align(8))]
struct Lapic([u8; 1024]);

struct Options {
    elf: Option<Vec<u8>>,
    image: Option<File>,
    cmdline: String,
    mem_mib: usize,
    runs: usize,
    at_once: usize,
    echo: Option<Echo>,
}

/// What follows the guest's first output.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    Exit,
    Stay,
}

/// What took how long, in order.
struct Laps {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Laps {
    fn new() -> Self {
        Self { last: Instant::now(), laps: Vec::new() }
    }

    fn lap(&mut self, what: &'static str) {
        let now = Instant::now();
        self.laps.push((what, now - self.last));
        self.last = now;
    }
}

/// Where the guest begins: in real mode at an address, or by PVH.
enum Entry {
    RealMode(u64),
    Pvh(u64),
}

/// Runs the program with `arguments`, as above.
pub(crate) fn main(arguments: &[String]) -> io::Result<()> {
    let options = parse(arguments)?;
    if options.at_once > 1 {
        return many(options.at_once, arguments);
    }
    if options.echo.is_some() {
        return start(&options).map(drop);
    }
    let runs: Vec<Laps> = (0..options.runs).map(|_| start(&options)).collect::<Result<_, _>>()?;
    let mut total = Duration::ZERO;
    for (step, (what, _)) in runs[0].laps.iter().enumerate() {
        let time = median(runs.iter().map(|run| run.laps[step].1).collect());
        total += time;
        println!("{what:<16} {:>9.3} ms", millis(time));
    }
    println!("{:<16} {:>9.3} ms", "total", millis(total));
    Ok(())
}

/// Starts `count` copies of this process with the same options but this one.
fn many(count: usize, arguments: &[String]) -> io::Result<()> {
    let at = arguments.iter().position(|a| a == "--at-once").unwrap_or(0);
    let mut arguments = arguments.to_vec();
    arguments.drain(at..at + 2);
    arguments.insert(0, "floor".into());
    let begin = Instant::now();
    let spawn =
        |_| Command::new(env::current_exe()?).args(&arguments).stdout(Stdio::null()).spawn();
    let children: Vec<_> = (0..count).map(spawn).collect::<Result<_, _>>()?;
    let mut ends = Vec::new();
    for mut child in children {
        if !child.wait()?.success() {
            return Err(io::Error::other("a process failed"));
        }
        ends.push(begin.elapsed());
    }
    println!("{:<16} {count:>9}", "processes");
    println!("{:<16} {:>9.3} ms", "first ended", millis(ends[0]));
    println!("{:<16} {:>9.3} ms", "last ended", millis(ends[count - 1]));
    Ok(())
}

/// Makes a VM and runs it to its first exit.
fn start(options: &Options) -> io::Result<Laps> {
    let mut laps = Laps::new();
    let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    laps.lap("open");
    let vm = made(&kvm, KVM_CREATE_VM, 0)?;
    laps.lap("create vm");
    by_value(&vm, KVM_SET_TSS_ADDR, 0xfffb_d000)?;
    let memory = match &options.image {
        Some(image) => map_with(options.mem_mib << 20, libc::MAP_PRIVATE, image.as_raw_fd())?,
        None => map(options.mem_mib << 20, None)?,
    };
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    by_ref(&vm, KVM_SET_USER_MEMORY_REGION, &mut { region })?;
    // The slot goes first: once there is an irqchip, KVM waits for an SRCU grace period at every change of slots.
    laps.lap("memory");
    by_value(&vm, KVM_CREATE_IRQCHIP, 0)?;
    laps.lap("irqchip");
    let vcpu = made(&vm, KVM_CREATE_VCPU, 0)?;
    let run_len = by_value(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?;
    let run = map(usize::try_from(run_len).unwrap_or(4096), Some(&vcpu))?;
    laps.lap("create vcpu");
    let mut cpuid = Cpuid { count: 256, padding: 0, entries: [[0; 10]; 256] };
    by_ref(&kvm, KVM_GET_SUPPORTED_CPUID, &mut cpuid)?;
    by_ref(&vcpu, KVM_SET_CPUID2, &mut cpuid)?;
    laps.lap("cpuid");
    let entry = match &options.elf {
        _ if options.image.is_some() => Entry::RealMode(0x1000),
        Some(elf) => load(elf, &options.cmdline, memory)?,
        None => {
            memory[0x1000..][..TWO_INSTRUCTIONS.len()].copy_from_slice(TWO_INSTRUCTIONS);
            Entry::RealMode(0x1000)
        }
    };
    laps.lap("load");
    set_registers(&vcpu, &entry)?;
    laps.lap("registers");
    by_value(&vcpu, KVM_RUN, 0)?;
    laps.lap("run to exit");
    let exit_reason = field(run, 8, 4);
    if exit_reason != Some(2) && exit_reason != Some(6) {
        return Err(io::Error::other(format!("exit {exit_reason:?}, neither port nor MMIO")));
    }
    if let Some(echo) = options.echo {
        // `io.data_offset`: where in the mapping the byte is that the guest wrote to the port.
        let byte = field(run, 40, 8).and_then(|offset| run.get(offset..=offset));
        io::stdout().write_all(byte.unwrap_or_default())?;
        io::stdout().flush()?;
        if echo == Echo::Stay {
            loop {
                std::thread::park();
            }
        }
    }
    drop((vcpu, vm, kvm));
    unmap(run);
    unmap(memory);
    laps.lap("tear down");
    Ok(laps)
}

fn set_registers(vcpu: &File, entry: &Entry) -> io::Result<()> {
    let mut sregs = Sregs::default();
    by_ref(vcpu, KVM_GET_SREGS, &mut sregs)?;
    let mut regs = Regs { rflags: 2, ..Regs::default() };
    match *entry {
        Entry::RealMode(rip) => {
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            regs.rip = rip;
        }
        Entry::Pvh(rip) => {
            let flat =
                Segment { limit: u32::MAX, present: 1, db: 1, s: 1, g: 1, ..Segment::default() };
            sregs.cs = Segment { kind: 0xb, selector: 8, ..flat };
            sregs.ds_es_fs_gs_ss = [Segment { kind: 3, selector: 16, ..flat }; 5];
            sregs.tr = Segment { limit: 0x67, kind: 0xb, present: 1, ..Segment::default() };
            sregs.cr0 = 1;
            (regs.rip, regs.rbx) = (rip, START_INFO);
        }
    }
    by_ref(vcpu, KVM_SET_SREGS, &mut sregs)?;
    by_ref(vcpu, KVM_SET_REGS, &mut regs)?;
    let index = MSR_IA32_MISC_ENABLE;
    by_ref(vcpu, KVM_SET_MSRS, &mut Msrs { count: 1, padding: 0, index, reserved: 0, data: 1 })?;
    let mut fpu = Fpu([0; 416]);
    fpu.0[128..130].copy_from_slice(&0x37f_u16.to_le_bytes());
    fpu.0[408..412].copy_from_slice(&0x1f80_u32.to_le_bytes());
    by_ref(vcpu, KVM_SET_FPU, &mut fpu)?;
    let mut lapic = Lapic([0; 1024]);
    by_ref(vcpu, KVM_GET_LAPIC, &mut lapic)?;
    by_ref(vcpu, KVM_SET_LAPIC, &mut lapic)?;
    Ok(())
}

/// Copies an ELF image's segments and writes the PVH boot information.
fn load(elf: &[u8], cmdline: &str, memory: &mut [u8]) -> io::Result<Entry> {
    let bad = || io::Error::other("not an ELF image with a PVH note that fits the memory");
    let mut entry = None;
    let (headers, count) = (field(elf, 32, 8).ok_or_else(bad)?, field(elf, 56, 2).ok_or_else(bad)?);
    for header in (0..count).map(|i| headers + i * 56) {
        let of = |offset, len| field(elf, header + offset, len);
        let (kind, offset, to) = (of(0, 4), of(8, 8), of(24, 8));
        let (Some(kind), Some(offset), Some(to), Some(len)) = (kind, offset, to, of(32, 8)) else {
            return Err(bad());
        };
        let bytes = elf.get(offset..offset.saturating_add(len)).ok_or_else(bad)?;
        match kind {
            1 => memory.get_mut(to..to.saturating_add(len)).ok_or_else(bad)?.copy_from_slice(bytes),
            // The first note only: name "Xen" and a 4-byte descriptor.
            4 if field(bytes, 8, 4) == usize::try_from(PVH_NOTE).ok() => {
                entry = field(bytes, 16, 4)
            }
            _ => {}
        }
    }
    let words: [u64; 7] = [0x1_336e_c578, 0, 0, CMDLINE, 0, START_INFO + 64, 1];
    let map = [0, memory.len() as u64, 1];
    let at = |address: u64| usize::try_from(address).unwrap_or(usize::MAX);
    for (i, word) in words.iter().chain(&[0]).chain(&map).enumerate() {
        let to = memory.get_mut(at(START_INFO) + i * 8..).and_then(|m| m.first_chunk_mut());
        *to.ok_or_else(bad)? = word.to_le_bytes();
    }
    let to = memory.get_mut(at(CMDLINE)..at(CMDLINE) + cmdline.len());
    to.ok_or_else(bad)?.copy_from_slice(cmdline.as_bytes());
    entry.map(|entry| Entry::Pvh(entry as u64)).ok_or_else(bad)
}

/// A little-endian number of `len` bytes.
fn field(bytes: &[u8], offset: usize, len: usize) -> Option<usize> {
    let field = bytes.get(offset..offset.checked_add(len)?)?;
    let number = field.iter().rev().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    usize::try_from(number).ok()
}

/// Maps `len` bytes, of `file` or anonymous.
fn map(len: usize, file: Option<&File>) -> io::Result<&'static mut [u8]> {
    let (flags, fd) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    map_with(len, flags, fd)
}

fn map_with(len: usize, flags: i32, fd: i32) -> io::Result<&'static mut [u8]> {
    let flags = flags | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, wherever the kernel likes.
    let address = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: mapped above; a guest that writes to it meanwhile writes bytes, of which any value is valid.
    Ok(unsafe { slice::from_raw_parts_mut(address.cast(), len) })
}

fn unmap(mapping: &'static mut [u8]) {
    // SAFETY: made by `map`; the reference is given up here.
    unsafe { libc::munmap(mapping.as_mut_ptr().cast(), mapping.len()) };
}

/// An ioctl that returns a new file descriptor.
fn made(file: &File, request: u64, argument: u64) -> io::Result<File> {
    let fd = by_value(file, request, argument)?;
    // SAFETY: the ioctls this is used for return a descriptor that is ours alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn by_value(file: &File, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: requests that take a number, or nothing.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), request, argument) })
}

fn by_ref<T>(file: &File, request: u64, argument: &mut T) -> io::Result<i32> {
    // Bits 16-29 of a request are its argument's size; the kernel reads or writes no more.
    let size = (request >> 16) & 0x3fff;
    assert!(size <= size_of::<T>() as u64, "{request:#x} wants {size} bytes");
    // SAFETY: `T` is at least as large as the structure, and variable tails say their own length.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), request, ptr::from_mut(argument)) })
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn parse(arguments: &[String]) -> io::Result<Options> {
    let mut options = Options {
        elf: None,
        image: None,
        cmdline: String::new(),
        mem_mib: 128,
        runs: 1,
        at_once: 1,
        echo: None,
    };
    let mut arguments = arguments.iter();
    let bad =
        |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("bad option {what}"));
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or_else(|| bad(option))?;
        let number = value.parse::<usize>().ok().filter(|n| *n > 0);
        match option.as_str() {
            "--elf" => options.elf = Some(fs::read(value)?),
            "--image" => options.image = Some(File::open(value)?),
            "--cmdline" => options.cmdline.clone_from(value),
            "--mem" => options.mem_mib = number.ok_or_else(|| bad(option))?,
            "--runs" => options.runs = number.ok_or_else(|| bad(option))?,
            "--at-once" => options.at_once = number.ok_or_else(|| bad(option))?,
            "--echo" if value == "exit" => options.echo = Some(Echo::Exit),
            "--echo" if value == "stay" => options.echo = Some(Echo::Stay),
            _ => return Err(bad(option)),
        }
    }
    Ok(options)
}
