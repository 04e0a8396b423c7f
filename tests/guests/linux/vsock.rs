//! A program for the Linux guest: the guest's side of `tests/linux.rs`'s conversation over `AF_VSOCK`. Each step prints
//! `step=result`. With the argument `linger` it is the step that gets killed.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Command, Stdio};
use std::thread;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;
/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`.
const GET_LOCAL_CID: u64 = 0x7b9;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn connect(fd: i32, address: *const Address, len: u32) -> i32;
    fn bind(fd: i32, address: *const Address, len: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, len: *mut u32) -> i32;
    fn ioctl(fd: i32, request: u64, cid: *mut u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
}

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "linger") {
        return linger();
    }
    println!("cid={}", own_cid()?);
    let listener = listener(1000)?;
    thread::spawn(move || serve(&listener));
    println!("nobody={:?}", stream_to(54).map(drop).map_err(|e| e.kind()));

    // Much, then the end of one direction; the answer comes in the other.
    let mut stream = stream_to(52)?;
    let said: Vec<u8> = (0..500_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    stream.write_all(&said)?;
    end(&stream)?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    println!("half_close={}", heard == said);
    drop(stream);

    // The host's process goes: the end, and nobody to write to.
    let mut stream = stream_to(53)?;
    stream.write_all(b"hello")?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    let error = (0..1000).find_map(|_| stream.write_all(&[0; 4096]).err());
    println!("vanished={} {:?}", heard.len(), error.map(|e| e.kind()));

    // The guest's process goes.
    let program = std::env::current_exe()?;
    let mut child = Command::new(program).arg("linger").stdout(Stdio::piped()).spawn()?;
    let mut line = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut line)?;
    child.kill()?;
    child.wait()?;
    println!("killed={}", String::from_utf8_lossy(&line));

    println!("SERVING");
    let mut stream = stream_to(56)?;
    let rest = stream.read(&mut [0; 16]);
    println!("done={rest:?}");
    Ok(())
}

/// Says that it is connected, and stays so.
fn linger() -> Result<()> {
    let mut stream = stream_to(55)?;
    stream.write_all(b"alive")?;
    println!("alive");
    stream.read_exact(&mut [0])
}

/// Echoes each stream to its end, then says so.
fn serve(listener: &File) {
    loop {
        // SAFETY: no address is wanted.
        let fd = unsafe { accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
        if fd < 0 {
            println!("accept: {}", Error::last_os_error());
            return;
        }
        // SAFETY: it is new and ours.
        let mut stream = unsafe { File::from_raw_fd(fd) };
        thread::spawn(move || -> Result<()> {
            let mut buffer = [0; 10_000];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return stream.write_all(b"[end]"),
                    len => stream.write_all(&buffer[..len])?,
                }
            }
        });
    }
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, reserved: 0, port, cid, zero: [0; 4] }
}

fn new_socket() -> Result<File> {
    // SAFETY: the descriptor is new and ours.
    let fd = check(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) })?;
    // SAFETY: as above.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn stream_to(port: u32) -> Result<File> {
    let stream = new_socket()?;
    let to = address(HOST, port);
    // SAFETY: an address of its own length.
    check(unsafe { connect(stream.as_raw_fd(), &to, size_of::<Address>() as u32) })?;
    Ok(stream)
}

fn listener(port: u32) -> Result<File> {
    let listener = new_socket()?;
    let at = address(ANY, port);
    // SAFETY: an address of its own length.
    check(unsafe { bind(listener.as_raw_fd(), &at, size_of::<Address>() as u32) })?;
    // SAFETY: no memory is involved.
    check(unsafe { listen(listener.as_raw_fd(), 16) })?;
    Ok(listener)
}

/// The guest's own address.
fn own_cid() -> Result<u32> {
    let device = File::open("/dev/vsock")?;
    let mut cid = 0;
    // SAFETY: room for what the request gives.
    check(unsafe { ioctl(device.as_raw_fd(), GET_LOCAL_CID, &mut cid) })?;
    Ok(cid)
}

fn end(stream: &File) -> Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) }).map(drop)
}

fn check(result: i32) -> Result<i32> {
    match result {
        -1 => Err(match Error::last_os_error() {
            e if e.kind() == ErrorKind::Interrupted => Error::other("interrupted"),
            e => e,
        }),
        result => Ok(result),
    }
}
