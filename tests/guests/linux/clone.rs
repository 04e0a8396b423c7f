//! A program for the Linux guest: draws random numbers on every processor without a pause, and once it finds that it is in
//! a clone goes on for 100 ms or more, then prints what it has drawn since, and who it is told to be.
//!
//! A number counts if it was asked for after the payload's counter had changed: what was drawn before the snapshot is in
//! every clone, whatever anybody does.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

const PAYLOAD: i64 = 0xd_0000;
const PAYLOAD_LEN: usize = 0x1_0000;
const COUNTER: usize = 16;
const TEXT_LEN: usize = 24;
const SEED: std::ops::Range<usize> = 32..64;
const TEXT: usize = 64;
/// How long numbers are drawn, and how many at least, as a busy host runs little of a guest in that time.
const WINDOW: Duration = Duration::from_millis(100);
const LEAST: usize = 8;
const PROT_READ: i32 = 1;
const MAP_SHARED: i32 = 1;

unsafe extern "C" {
    fn mmap(at: *mut u8, len: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn getrandom(buffer: *mut u8, len: usize, flags: u32) -> isize;
    fn sethostname(name: *const u8, len: usize) -> i32;
}

/// The payload's pages, as the host has written them.
#[derive(Clone, Copy)]
struct Payload(&'static [u8]);

impl Payload {
    fn open() -> Result<Self> {
        let memory = File::open("/dev/mem")?;
        let at = std::ptr::null_mut();
        // SAFETY: a new mapping, which is only read.
        let at =
            unsafe { mmap(at, PAYLOAD_LEN, PROT_READ, MAP_SHARED, memory.as_raw_fd(), PAYLOAD) };
        if at as isize == -1 {
            return Err(Error::last_os_error());
        }
        // SAFETY: mapped above and never unmapped.
        Ok(Self(unsafe { std::slice::from_raw_parts(at, PAYLOAD_LEN) }))
    }

    /// How often this VM has become another one.
    fn counter(self) -> u64 {
        // SAFETY: aligned and inside; it may change between two instructions, so it is read anew each time.
        unsafe { self.0.as_ptr().add(COUNTER).cast::<u64>().read_volatile() }
    }

    fn text(self) -> &'static str {
        let len = u32::from_le_bytes(self.0[TEXT_LEN..][..4].try_into().unwrap());
        std::str::from_utf8(&self.0[TEXT..][..len as usize]).unwrap()
    }
}

fn main() -> Result<()> {
    let payload = Payload::open()?;
    // The first one waits until the kernel has collected enough for its generator: some seconds.
    random()?;
    let processors = thread::available_parallelism()?.get();
    let threads: Vec<_> = (0..processors).map(|_| thread::spawn(move || draw(payload))).collect();
    println!("DRAWING on {processors}");
    let drawn: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    // A guest names itself as its first act, by what it alone was given.
    let name = payload.text().split('"').nth(3).unwrap_or_default();
    // SAFETY: as many bytes as there are.
    if unsafe { sethostname(name.as_ptr(), name.len()) } != 0 {
        return Err(Error::last_os_error());
    }
    println!("hostname={}", fs::read_to_string("/proc/sys/kernel/hostname")?.trim());
    println!("generation={}", payload.counter());
    println!("seed={}", hex(&payload.0[SEED]));
    for drawn in drawn {
        for number in drawn? {
            println!("drawn={number}");
        }
    }
    println!("DONE");
    Ok(())
}

/// Draws numbers and UUIDs until some time after the counter has changed; those from then on.
fn draw(payload: Payload) -> Result<Vec<String>> {
    static CHANGED: OnceLock<Instant> = OnceLock::new();
    let uuids = File::open("/proc/sys/kernel/random/uuid")?;
    let mut drawn = Vec::new();
    loop {
        let is_clone = payload.counter() != 0;
        let is_over = is_clone && CHANGED.get_or_init(Instant::now).elapsed() > WINDOW;
        if is_over && drawn.len() >= LEAST {
            return Ok(drawn);
        }
        let bytes = random()?;
        let mut uuid = [0; 36];
        uuids.read_exact_at(&mut uuid, 0)?;
        if is_clone {
            drawn.push(hex(&bytes));
            drawn.push(String::from_utf8_lossy(&uuid).into_owned());
        }
    }
}

fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    // SAFETY: as many bytes as there are.
    match unsafe { getrandom(bytes.as_mut_ptr(), bytes.len(), 0) } {
        16 => Ok(bytes),
        _ => Err(Error::last_os_error()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
