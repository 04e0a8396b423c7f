//! The devices that are attacked, their queues by name, and a request of each queue that is in order.
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, HIGH, Machine};
use crate::samples::{self, Host, Sample, TempDir};

/// Where honest requests have their parts, one page each but for the response, so that an attack on one
/// is none on another.
pub(crate) const HEADER: u64 = HIGH.0;
pub(crate) const RESPONSE: u64 = HIGH.0 + 0x800;
pub(crate) const DATA: u64 = HIGH.0 + 0x1000;
/// What a response holds that the device has not written.
pub(crate) const UNTOUCHED: u8 = 0xee;
/// A page that a balloon may have.
pub(crate) const SPARE_PAGE: u64 = HIGH.0 + 0x8000;

/// A device of the table, or one of it that is quite different inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    BlockAsync,
    BlockLimited,
    BlockLayered,
    Mem,
    Net,
    NetMetadata,
    Pmem,
    Rng,
    Vsock,
    Balloon,
}

pub(crate) const KINDS: [Kind; 11] = [
    Kind::Block,
    Kind::BlockAsync,
    Kind::BlockLimited,
    Kind::BlockLayered,
    Kind::Mem,
    Kind::Net,
    Kind::NetMetadata,
    Kind::Pmem,
    Kind::Rng,
    Kind::Vsock,
    Kind::Balloon,
];

impl Kind {
    /// The sample of it.
    pub(crate) fn sample(self) -> &'static str {
        match self {
            Self::Block => "drives",
            Self::BlockAsync => samples::ASYNC_DRIVE,
            Self::BlockLimited => samples::LIMITED_DRIVE,
            Self::BlockLayered => samples::LAYERED_DRIVE,
            Self::Mem => "memory-hotplug",
            Self::Net => "network-interfaces",
            Self::NetMetadata => samples::METADATA,
            Self::Pmem => "pmem",
            Self::Rng => "entropy",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
        }
    }

    /// A device of it, what must outlive that, and of vsock where the host's sockets are.
    pub(crate) fn open(self) -> (Sample, Option<TempDir>) {
        if self != Self::Vsock {
            return (samples::sample(self.sample()), None);
        }
        let directory = TempDir::new();
        let json = serde_json::json!({"guest_cid": CID, "uds_path": directory.path("v.sock")});
        let device = samples::open("vsock", &json);
        (Sample { device, host: Host::default() }, Some(directory))
    }

    /// Its name in those of cases.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::BlockAsync => "block_async",
            Self::BlockLimited => "block_limited",
            Self::BlockLayered => "block_layered",
            Self::Mem => "mem",
            Self::Net => "net",
            Self::NetMetadata => "net_metadata",
            Self::Pmem => "pmem",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
        }
    }

    /// Its queues by name, in virtio order.
    pub(crate) fn queues(self) -> &'static [&'static str] {
        match self {
            Self::Net | Self::NetMetadata => &["rx", "tx"],
            Self::Vsock => &["rx", "tx", "events"],
            Self::Balloon => &["inflate", "deflate", "statistics", "hinting", "reporting"],
            _ => &["requests"],
        }
    }

    pub(crate) fn is_block(self) -> bool {
        matches!(self, Self::Block | Self::BlockAsync | Self::BlockLimited | Self::BlockLayered)
    }

    pub(crate) fn is_net(self) -> bool {
        matches!(self, Self::Net | Self::NetMetadata)
    }

    /// Whether the device keeps buffers of this queue until it has something for them.
    pub(crate) fn holds(self, queue: usize) -> bool {
        match self {
            Self::Net | Self::NetMetadata => queue == 0,
            Self::Vsock => queue != 1,
            Self::Balloon => queue == 2,
            _ => false,
        }
    }

    /// The buffers of a request of `queue` that is in order, with what the device reads in memory.
    pub(crate) fn honest(self, m: &Machine, queue: usize) -> Vec<Buf> {
        let write = |bytes: &[u8]| m.mem.write_slice(bytes, GuestAddress(HEADER)).unwrap();
        m.mem.write_slice(&[UNTOUCHED; 16], GuestAddress(RESPONSE)).unwrap();
        match (self, queue) {
            (Self::Block | Self::BlockAsync | Self::BlockLimited | Self::BlockLayered, _) => {
                write(&block_header(0, 1));
                vec![(HEADER, 16, false), (DATA, 512, true), (RESPONSE, 1, true)]
            }
            (Self::Mem, _) => {
                write(&mem_request(3, crate::driver::OWN.0, 1));
                vec![(HEADER, 24, false), (RESPONSE, 10, true)]
            }
            (Self::Pmem, _) => {
                write(&[0; 4]);
                vec![(HEADER, 4, false), (RESPONSE, 4, true)]
            }
            (Self::Rng, _) => vec![(DATA, 64, true)],
            (Self::Net | Self::NetMetadata | Self::Vsock, 0) => vec![(DATA, 0x1000, true)],
            (Self::Net | Self::NetMetadata, _) => {
                write(&frame(60));
                vec![(HEADER, 72, false)]
            }
            (Self::Vsock, 1) => {
                write(&vsock_request(NOBODY).to_bytes());
                vec![(HEADER, 44, false)]
            }
            (Self::Vsock, _) => vec![(DATA, 4, true)],
            (Self::Balloon, 0 | 1) => {
                write(&u32::try_from(SPARE_PAGE >> 12).unwrap().to_le_bytes());
                vec![(HEADER, 4, false)]
            }
            (Self::Balloon, 2) => {
                write(&[4, 0, 0, 0, 0x10, 0, 0, 0, 0, 0]);
                vec![(HEADER, 10, false)]
            }
            (Self::Balloon, _) => vec![(SPARE_PAGE, 0x1000, true)],
        }
    }
}

/// A port of the host that nobody listens at.
pub(crate) const NOBODY: u32 = 9;
/// The guest's address.
pub(crate) const CID: u64 = 3;

/// Asks for a connection to a port of the host.
pub(crate) fn vsock_request(port: u32) -> devices::backend::vsock::packet::Header {
    use devices::backend::vsock::packet::{HOST_CID, Header, TYPE_STREAM, op};
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1024,
        dst_port: port,
        kind: TYPE_STREAM,
        op: op::REQUEST,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

/// `struct virtio_blk_req` before its data.
pub(crate) fn block_header(request: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&request.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// `struct virtio_mem_req`.
pub(crate) fn mem_request(request: u16, addr: u64, blocks: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&request.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// A header without offloads, and a frame of `len` bytes that no protocol has.
pub(crate) fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; 12 + len];
    for (at, byte) in [(12, 0xff), (18, 2), (24, 0x88), (25, 0xb5)] {
        if let Some(to) = frame.get_mut(at) {
            *to = byte;
        }
    }
    frame
}
