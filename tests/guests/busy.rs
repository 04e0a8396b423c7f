//! Keeps every CPU busy, and, told so, every device. Each CPU counts its rounds, takes interrupts of its own timer, and at
//! each of them sends one to the next CPU; the timers of CPUs with an odd number are periodic, and those CPUs never stand
//! still, the others have deadlines of the TSC, and halt between two interrupts. Each looks at every round whether its TSC
//! is behind what another has read, and at every interrupt who it is. After `ready=1` the first CPU does what it is told
//! by bytes on the serial port: `c` waits until every CPU has counted on, from what it had counted when it was asked last,
//! been interrupted by its timer and by its neighbour, and says `going=CPUS back=TICKS`, the most that a TSC was behind;
//! `m` says how often it was told so, `mark=N`; `d` has every device that is there do something, which shows whether it is
//! as it was left, and says `devices=N`; `q` ends it.
#![no_std]
#![no_main]

use core::arch::{global_asm, naked_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rt::block::{Block, SECTOR};
use rt::memory::{allocate, map_gib, mmio_read32, mmio_write32};
use rt::virtio::{self, Buffer, Device, Queue};
use rt::{BootInfo, Failure, Outcome, acpi, clock, ensure, fail, interrupts, println, ring0};

rt::entry!(run);

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const MAX_CPUS: usize = 16;
const TIMEOUT_US: u64 = 30_000_000;
/// The page APs start in; SIPI's vector is its number.
const TRAMPOLINE: u64 = 0x8000;

const LAPIC_ID: usize = 0xfee0_0020;
const LAPIC_SPURIOUS: usize = 0xfee0_00f0;
const LAPIC_ICR_LOW: usize = 0xfee0_0300;
const LAPIC_ICR_HIGH: usize = 0xfee0_0310;
const LAPIC_TIMER: usize = 0xfee0_0320;
const LAPIC_INITIAL: usize = 0xfee0_0380;
const LAPIC_DIVIDE: usize = 0xfee0_03e0;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;
/// The software enable bit and the runtime's vector for spurious interrupts.
const SPURIOUS: u32 = 0x12f;
const PERIODIC: u32 = 1 << 17;
/// Ticks of KVM's 1 GHz divided by 16: 5 ms.
const PERIOD: u32 = 312_500;
/// Vectors: the runtime counts them for the first CPU.
const TIMER: u8 = 33;
const NEIGHBOUR: u8 = 34;

/// What is kept of a CPU. The assembly below knows the offsets.
#[repr(C, align(128))]
struct Cpu {
    id: AtomicU32,
    next: AtomicU32,
    rounds: AtomicU64,
    timers: AtomicU64,
    neighbours: AtomicU64,
    /// Its id by the local APIC and by CPUID, as of the last interrupt.
    id_now: AtomicU32,
    cpuid_now: AtomicU32,
    /// By how much its TSC was behind another's.
    back: AtomicU64,
    faults: AtomicU64,
}

impl Cpu {
    const fn new() -> Self {
        Self {
            id: AtomicU32::new(0),
            next: AtomicU32::new(0),
            rounds: AtomicU64::new(0),
            timers: AtomicU64::new(0),
            neighbours: AtomicU64::new(0),
            id_now: AtomicU32::new(0),
            cpuid_now: AtomicU32::new(0),
            back: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        }
    }

    fn counts(&self) -> [u64; 3] {
        [&self.rounds, &self.timers, &self.neighbours].map(|count| count.load(Ordering::SeqCst))
    }
}

#[unsafe(no_mangle)]
static CPUS: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS];
/// Numbers of APs; the first CPU has 0.
#[unsafe(no_mangle)]
static AP_NEXT: AtomicU32 = AtomicU32::new(1);
#[unsafe(no_mangle)]
static AP_READY: AtomicU32 = AtomicU32::new(0);
/// The latest that any CPU has read of its TSC.
#[unsafe(no_mangle)]
static LATEST: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static mut AP_IDT: [[u64; 2]; 48] = [[0; 2]; 48];

// Real mode straight to long mode, on the runtime's page tables and GDT. %r14 is a CPU's number, %r15 what is kept of it.
// Ring 0 may be interpreted, by who knows no fences.
global_asm!(
    r#"
    .section .text.ap, "ax"
    .balign 16
    .globl ap_trampoline
    .code16
ap_trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl (ap_gdtr - ap_trampoline)
    mov $0x20, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000033, %eax
    mov %eax, %cr0
    ljmpl $8, $ap_long
ap_gdtr:
    .word 0x37
    .long gdt
    .globl ap_trampoline_end
ap_trampoline_end:
    .code64
ap_idtr:
    .word 48 * 16 - 1
    .quad AP_IDT

ap_long:
    mov $1, %r14d
    lock xadd %r14d, AP_NEXT(%rip)
    and $15, %r14d
    mov %r14d, %r15d
    shl $7, %r15d
    add $CPUS, %r15d
    mov %r14d, %esp
    shl $12, %esp
    add $ap_stacks + 4096, %esp
    mov $0x10, %eax
    mov %eax, %ss
    lidt ap_idtr(%rip)
    mov $0xfee00020, %eax
    mov (%rax), %eax
    shr $24, %eax
    mov %eax, (%r15)
    mov $0xfee000f0, %eax
    movl $0x12f, (%rax)
    test $1, %r14b
    jz 1f
    mov $0xfee003e0, %eax               # divide by 16
    movl $3, (%rax)
    mov $0xfee00320, %eax               # periodic
    movl $0x20021, (%rax)
    mov $0xfee00380, %eax
    movl $312500, (%rax)
    jmp 2f
1:  mov $0xfee00320, %eax               # deadlines of the TSC
    movl $0x40021, (%rax)
    call ap_deadline
2:  lock incl AP_READY(%rip)
    sti

ap_round:
    incq 8(%r15)
    mov LATEST(%rip), %rbx
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %rbx, %rax
    jb 1f
    mov %rax, %rcx
    mov %rbx, %rax
    lock cmpxchg %rcx, LATEST(%rip)
    jmp 2f
1:  sub %rax, %rbx
    cmp 40(%r15), %rbx
    jbe 2f
    mov %rbx, 40(%r15)
2:  test $1, %r14b
    jnz ap_round
    hlt
    jmp ap_round

ap_deadline:
    rdtsc
    add $0x1000000, %eax
    adc $0, %edx
    mov $0x6e0, %ecx
    wrmsr
    ret

    .balign 16
ap_timer:
    push %rax
    push %rbx
    push %rcx
    push %rdx
    incq 16(%r15)
    mov $0xfee00020, %eax
    mov (%rax), %eax
    shr $24, %eax
    mov %eax, 32(%r15)
    mov $0xb, %eax
    xor %ecx, %ecx
    cpuid
    mov %edx, 36(%r15)
    test $1, %r14b
    jnz 1f
    call ap_deadline
1:  mov 4(%r15), %ecx
    shl $24, %ecx
    mov $0xfee00310, %eax
    mov %ecx, (%rax)
    mov $0xfee00300, %eax
    movl $34, (%rax)
    mov $0xfee000b0, %eax
    movl $0, (%rax)
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    iretq

    .balign 16
ap_neighbour:
    push %rax
    incq 24(%r15)
    mov $0xfee000b0, %eax
    movl $0, (%rax)
    pop %rax
ap_spurious:
    iretq

ap_fault:
    incq 48(%r15)
1:  cli
    hlt
    jmp 1b

    .section .bss.stacks, "aw", @nobits
    .balign 16
ap_stacks:
    .skip 16 * 4096
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn ap_trampoline();
    fn ap_trampoline_end();
    fn ap_timer();
    fn ap_neighbour();
    fn ap_spurious();
    fn ap_fault();
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let count = start(boot)?;
    let Some(io_apic) = acpi::io_apic(boot) else { fail!("no I/O APIC") };
    // Any pin: what matters is that the first CPU takes interrupts.
    interrupts::enable(io_apic, 23, 0);
    mmio_write32(LAPIC_DIVIDE, 3);
    mmio_write32(LAPIC_TIMER, PERIODIC | u32::from(TIMER));
    mmio_write32(LAPIC_INITIAL, PERIOD);
    let mut devices = Devices::open(boot.cmdline)?;
    let mut first = First { count, seen: [[0; 3]; MAX_CPUS] };
    println!("ready=1");
    let mut mark = 0;
    loop {
        first.round();
        if ring0::in8(LINE_STATUS) & 1 == 0 {
            continue;
        }
        match ring0::in8(DATA) {
            b'c' => first.check()?,
            b'm' => {
                mark += 1;
                println!("mark={mark}");
            }
            b'd' => devices.work()?,
            b'q' => return Ok(()),
            other => fail!("no command is {other:#x}"),
        }
    }
}

/// Starts the APs, and makes a ring of all CPUs; how many there are.
fn start(boot: &'static BootInfo) -> Result<usize, Failure> {
    let own = mmio_read32(LAPIC_ID) >> 24;
    CPUS[0].id.store(own, Ordering::SeqCst);
    for vector in 0..48_u8 {
        let handler = match vector {
            TIMER => ap_timer as *const () as u64,
            NEIGHBOUR => ap_neighbour as *const () as u64,
            47 => ap_spurious as *const () as u64,
            _ => ap_fault as *const () as u64,
        };
        // Present, interrupt gate.
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        // SAFETY: no CPU has loaded the table yet.
        unsafe { (&raw mut AP_IDT[usize::from(vector)]).write([low, handler >> 32]) };
    }
    let start = ap_trampoline as *const u8;
    let len = ap_trampoline_end as *const () as usize - start as usize;
    // SAFETY: a page of low RAM that holds no boot information.
    unsafe { (TRAMPOLINE as *mut u8).copy_from_nonoverlapping(start, len) };

    mmio_write32(LAPIC_SPURIOUS, SPURIOUS);
    let others = || acpi::cpus(boot).filter(|&id| id != own);
    let count = 1 + others().count();
    ensure!(count <= MAX_CPUS, "{count} CPUs");
    others().for_each(|id| send(id, INIT));
    clock::delay_us(200);
    for _ in 0..2 {
        others().for_each(|id| send(id, STARTUP));
        clock::delay_us(200);
    }
    let all = count as u32 - 1;
    let came = clock::wait_until(TIMEOUT_US, || AP_READY.load(Ordering::SeqCst) == all);
    ensure!(came, "{} of {all} APs came", AP_READY.load(Ordering::SeqCst));
    for number in 0..count {
        let next = CPUS[(number + 1) % count].id.load(Ordering::SeqCst);
        CPUS[number].next.store(next, Ordering::SeqCst);
    }
    Ok(count)
}

fn send(id: u32, command: u32) {
    mmio_write32(LAPIC_ICR_HIGH, id << 24);
    mmio_write32(LAPIC_ICR_LOW, command);
}

/// The first CPU.
struct First {
    count: usize,
    /// What the CPUs had counted when they were looked at last.
    seen: [[u64; 3]; MAX_CPUS],
}

impl First {
    /// What the others do in assembly.
    fn round(&mut self) {
        let cpu = &CPUS[0];
        cpu.rounds.fetch_add(1, Ordering::SeqCst);
        let latest = LATEST.load(Ordering::SeqCst);
        let now = tsc();
        LATEST.fetch_max(now, Ordering::SeqCst);
        cpu.back.fetch_max(latest.saturating_sub(now), Ordering::SeqCst);
        cpu.neighbours.store(
            interrupts::count(NEIGHBOUR - interrupts::FIRST_VECTOR).into(),
            Ordering::SeqCst,
        );
        let timers = interrupts::count(TIMER - interrupts::FIRST_VECTOR).into();
        if cpu.timers.swap(timers, Ordering::SeqCst) != timers {
            cpu.id_now.store(mmio_read32(LAPIC_ID) >> 24, Ordering::SeqCst);
            cpu.cpuid_now.store(ring0::cpuid(0xb, 0)[3], Ordering::SeqCst);
            send(cpu.next.load(Ordering::SeqCst), NEIGHBOUR.into());
        }
    }

    fn check(&mut self) -> Outcome {
        let count = self.count;
        for (number, cpu) in CPUS[..count].iter().enumerate() {
            let (was, is) = (self.seen[number], cpu.counts());
            ensure!(
                was.iter().zip(&is).all(|(was, is)| was <= is),
                "CPU {number} had {was:?}, has {is:?}"
            );
            self.seen[number] = is;
            cpu.id_now.store(u32::MAX, Ordering::SeqCst);
            cpu.cpuid_now.store(u32::MAX, Ordering::SeqCst);
        }
        for (number, cpu) in CPUS[..count].iter().enumerate() {
            let was = self.seen[number];
            let goes_on = || was.iter().zip(cpu.counts()).all(|(was, is)| is >= was + 2);
            let went_on = clock::wait_until(TIMEOUT_US, || {
                self.round();
                goes_on() && cpu.cpuid_now.load(Ordering::SeqCst) != u32::MAX
            });
            let (is, faults) = (cpu.counts(), cpu.faults.load(Ordering::SeqCst));
            ensure!(went_on && faults == 0, "CPU {number}: {was:?}, {is:?}, {faults} faults");
            let ids = [&cpu.id, &cpu.id_now, &cpu.cpuid_now].map(|id| id.load(Ordering::SeqCst));
            ensure!(ids[0] == ids[1] && ids[0] == ids[2], "CPU {number} has ids {ids:?}");
            self.seen[number] = is;
        }
        let back = CPUS.iter().map(|cpu| cpu.back.load(Ordering::SeqCst)).max().unwrap_or(0);
        println!("going={count} back={back}");
        Ok(())
    }
}

/// That of ring 0, as the other CPUs read it.
fn tsc() -> u64 {
    #[unsafe(naked)]
    unsafe extern "C" fn read() {
        naked_asm!("rdtsc", "shl rdx, 32", "or rax, rdx", "ret")
    }
    // SAFETY: touches no memory.
    unsafe { ring0::call(read, 0, 0, 0) }.unwrap_or(0)
}

const ID_BALLOON: u32 = 5;
const PAGE: usize = 4096;
/// Where the status register says that a device is live.
const LIVE: u32 = 15;

/// Every device that is there, live.
struct Devices {
    rounds: u64,
    page: &'static mut [u8],
    disk: Option<Block>,
    rng: Option<(Device, Queue)>,
    net: Option<(Device, Queue)>,
    pmem: Option<(Device, Queue)>,
    vsock: Option<Device>,
    /// With a page that is given and taken back.
    balloon: Option<(Device, Queue, Queue, &'static mut [u8])>,
    mem: Option<(Device, Queue)>,
    /// Blocks of memory that are plugged.
    plugged: u64,
}

impl Devices {
    fn open(cmdline: &str) -> Result<Self, Failure> {
        let claim = |id| match virtio::find(cmdline, id, 0) {
            // Unplugged memory is not accessible: virtio-mem has it so, or not at all.
            Ok(device) => {
                device.negotiate(2 * u64::from(id == virtio::ID_MEM)).map(|_| Some(device))
            }
            Err(_) => Ok(None),
        };
        let live = |id, index| match claim(id)? {
            Some(device) => {
                let queue = device.queue(index, 16)?;
                device.start()?;
                Ok(Some((device, queue)))
            }
            None => Ok::<_, Failure>(None),
        };
        let disk = match virtio::find(cmdline, virtio::ID_BLOCK, 0) {
            Ok(_) => Some(Block::open(cmdline, 0)?),
            Err(_) => None,
        };
        // Its second queue sends.
        let (rng, net) = (live(virtio::ID_RNG, 0)?, live(virtio::ID_NET, 1)?);
        let (pmem, mem) = (live(virtio::ID_PMEM, 0)?, live(virtio::ID_MEM, 0)?);
        let vsock = claim(virtio::ID_VSOCK)?;
        if let Some(vsock) = &vsock {
            for index in 0..3 {
                vsock.queue(index, 16)?;
            }
            vsock.start()?;
        }
        let balloon = match claim(ID_BALLOON)? {
            Some(device) => {
                let (inflate, deflate) = (device.queue(0, 16)?, device.queue(1, 16)?);
                device.start()?;
                Some((device, inflate, deflate, allocate(PAGE)))
            }
            None => None,
        };
        let page = allocate(PAGE);
        Ok(Self { rounds: 0, page, disk, rng, net, pmem, vsock, balloon, mem, plugged: 0 })
    }

    fn work(&mut self) -> Outcome {
        let mut count = 0;
        let mut live = |device: &Device| {
            count += 1;
            ensure!(device.status() == LIVE, "device {} is not live", device.id());
            Ok(())
        };
        if let Some(disk) = &mut self.disk {
            live(&disk.device)?;
            let sector = &mut self.page[..SECTOR as usize];
            disk.read(1, sector)?;
            let is = u64::from_le_bytes(*sector.first_chunk().unwrap_or(&[0; 8]));
            ensure!(is == self.rounds, "the disk has {is}, not {}", self.rounds);
            sector[..8].copy_from_slice(&(self.rounds + 1).to_le_bytes());
            disk.write(1, sector)?;
        }
        if let Some((device, queue)) = &mut self.rng {
            live(device)?;
            let len = queue.round_trip(&[Buffer::writable(&mut self.page[..16])], TIMEOUT_US)?;
            ensure!(len == 16, "{len} random bytes");
        }
        if let Some((device, queue)) = &mut self.net {
            live(device)?;
            // A header of 12 bytes, and a frame to everybody.
            self.page.fill(0);
            self.page[12..18].fill(0xff);
            queue.round_trip(&[Buffer::readable(&self.page[..72])], TIMEOUT_US)?;
        }
        if let Some((device, queue)) = &mut self.pmem {
            live(device)?;
            self.page.fill(0);
            let (request, answer) = self.page.split_at_mut(64);
            let buffers = [Buffer::readable(&request[..4]), Buffer::writable(&mut answer[..4])];
            queue.round_trip(&buffers, TIMEOUT_US)?;
            ensure!(answer[..4] == [0; 4], "flush: {:?}", &answer[..4]);
        }
        if let Some(device) = &self.vsock {
            live(device)?;
            ensure!(device.config64(0) == 3, "CID {}", device.config64(0));
        }
        if let Some((device, inflate, deflate, given)) = &mut self.balloon {
            live(device)?;
            let number = (given.as_ptr() as usize / PAGE) as u32;
            self.page[..4].copy_from_slice(&number.to_le_bytes());
            inflate.round_trip(&[Buffer::readable(&self.page[..4])], TIMEOUT_US)?;
            deflate.round_trip(&[Buffer::readable(&self.page[..4])], TIMEOUT_US)?;
        }
        if let Some((device, queue)) = &mut self.mem {
            live(device)?;
            self.plugged = plug(device, queue, self.page, self.plugged)?;
        }
        self.rounds += 1;
        println!("devices={count}");
        Ok(())
    }
}

/// Plugs what is requested, whose first `plugged` blocks are; how many are afterwards. Each has its number in its first word.
fn plug(device: &Device, queue: &mut Queue, page: &mut [u8], plugged: u64) -> Result<u64, Failure> {
    let (block, start) = (device.config64(0), device.config64(16));
    let wanted = device.config64(48) / block;
    ensure!(wanted >= plugged, "{wanted} blocks are requested, {plugged} are plugged");
    map_gib(start);
    if wanted > plugged {
        page[..24].fill(0);
        page[8..16].copy_from_slice(&(start + plugged * block).to_le_bytes());
        page[16..18].copy_from_slice(&((wanted - plugged) as u16).to_le_bytes());
        let (request, answer) = page.split_at_mut(64);
        let buffers = [Buffer::readable(&request[..24]), Buffer::writable(&mut answer[..10])];
        queue.round_trip(&buffers, TIMEOUT_US)?;
        ensure!(answer[..2] == [0; 2], "plugging: {:?}", &answer[..2]);
    }
    for number in 0..wanted {
        let word = (start + number * block) as *mut u64;
        // SAFETY: plugged memory, mapped; no Rust object lies there.
        let was = unsafe { word.replace(number + 1) };
        let want = if number < plugged { number + 1 } else { 0 };
        ensure!(was == want, "block {number} has {was}, not {want}");
    }
    Ok(wanted)
}
