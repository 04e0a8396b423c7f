//! virtio-vsock.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use devices::virtio::model::VirtioDevice;
use serde_json::json;

use super::{open, s_of};
use crate::session::{Buffer, Model, Session};

/// The directory of what is on the host's side of vsock, the same for all inputs.
fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("husk-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("files can be made there");
        path
    })
}

/// virtio-vsock: programs on the host listen at ports 1 and 2, and connect.
#[derive(Debug)]
pub struct Vsock {
    streams: Vec<UnixStream>,
    has_ended: bool,
}

impl Vsock {
    /// The device.
    pub fn new() -> (Self, Box<dyn VirtioDevice>) {
        Self::listener();
        let config = json!({"guest_cid": 3, "uds_path": directory().join("v")});
        (Self { streams: Vec::new(), has_ended: false }, open("vsock", &config))
    }

    fn listener() -> &'static UnixListener {
        static LISTENER: OnceLock<UnixListener> = OnceLock::new();
        LISTENER.get_or_init(|| {
            let listener =
                UnixListener::bind(directory().join("v_1")).expect("it is not there yet");
            listener.set_nonblocking(true).expect("it is a socket");
            listener
        })
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("it is a socket");
        self.streams.push(stream);
    }
}

impl Drop for Vsock {
    /// Nobody waits at the listener for the next input.
    fn drop(&mut self) {
        while Self::listener().accept().is_ok() {}
    }
}

impl Model for Vsock {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let how = s.input.u8();
        match how & 7 {
            0 => return (0, vec![Buffer::In(s_of(how >> 3, &[4096, 44, 45, 65_580, 10]))]),
            1 => {
                return (0, vec![Buffer::In(44), Buffer::In(s_of(how >> 3, &[4096, 1, 0]))]);
            }
            2 => return (2, vec![Buffer::In(s_of(how >> 3, &[4, 8, 3, 0]))]),
            3 => {
                return (
                    how as u16 >> 6,
                    vec![Buffer::At(s.address(), s.length(), s.input.flip())],
                );
            }
            _ => {}
        }
        let mut header = Vec::new();
        let payload = s.input.piece();
        let cid = |n: u8, good: u64, s: &mut Session<'_>| match n {
            0..7 => good,
            _ => s.input.u64(),
        };
        let ways = s.input.u8();
        header.extend(cid(ways & 7, 3, s).to_le_bytes());
        header.extend(cid(ways >> 3 & 7, 2, s).to_le_bytes());
        header.extend(u32::from(s_of(s.input.u8(), &[9_u16, 10, 5000, 0xffff])).to_le_bytes());
        let port: u32 = match ways >> 6 {
            0 | 1 => 1,
            2 => 2,
            _ => s.input.u32(),
        };
        header.extend(port.to_le_bytes());
        let len = if how & 0x80 == 0 { payload.len() as u32 } else { s.length() };
        header.extend(len.to_le_bytes());
        header.extend(u16::from(how & 0x78 != 0x78).to_le_bytes());
        header.extend(
            u16::from(s_of(s.input.u8(), &[1_u8, 1, 5, 5, 6, 7, 4, 3, 2, 0, 8])).to_le_bytes(),
        );
        header.extend(u32::from(s.input.below(4)).to_le_bytes());
        let buf_alloc = if how & 0x40 == 0 { 4096 } else { s.input.u32() };
        header.extend(buf_alloc.to_le_bytes());
        header.extend(u32::from(s.input.u16()).to_le_bytes());
        let buffers = match how >> 4 & 3 {
            0 | 1 => vec![Buffer::Out(header), Buffer::Out(payload.to_vec())],
            2 => vec![Buffer::Out([&header, payload].concat())],
            _ => vec![Buffer::Out(header), Buffer::At(s.address(), len, s.input.below(8) == 0)],
        };
        (1, buffers)
    }

    fn end(&mut self) {
        self.has_ended = true;
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        // Its socket must be free, and is not when it has been made again.
        std::mem::take(&mut self.has_ended).then(|| Self::new().1)
    }

    fn host(&mut self, s: &mut Session<'_>) {
        let (which, at) = (s.input.below(8), usize::from(s.input.u8()));
        let at = at % self.streams.len().max(1);
        match which {
            0 | 1 => {
                if let Ok((stream, _)) = Self::listener().accept() {
                    self.keep(stream);
                }
            }
            2 => {
                if let Ok(mut stream) = UnixStream::connect(directory().join("v")) {
                    let line = s.input.piece();
                    let line = if line.is_empty() { &b"CONNECT 9\n"[..] } else { line };
                    let _ = stream.write(line);
                    self.keep(stream);
                }
            }
            3 => {
                let bytes = vec![at as u8; s_of(s.input.u8(), &[1, 100, 4096, 70_000])];
                if let Some(stream) = self.streams.get_mut(at) {
                    let _ = stream.write(&bytes);
                }
            }
            4 => {
                if let Some(stream) = self.streams.get_mut(at) {
                    let _ = stream.write(s.input.piece());
                }
            }
            5 => {
                let mut bytes = [0; 8192];
                if let Some(stream) = self.streams.get_mut(at) {
                    let _ = stream.read(&mut bytes);
                }
            }
            6 if at < self.streams.len() => drop(self.streams.swap_remove(at)),
            _ => {
                if let Some(stream) = self.streams.get(at) {
                    let how =
                        s_of(s.input.u8(), &[std::net::Shutdown::Write, std::net::Shutdown::Read]);
                    let _ = stream.shutdown(how);
                }
            }
        }
    }
}
