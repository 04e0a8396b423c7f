//! virtio-net.
use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::mmds::{Mmds, Service};
use devices::virtio::model::{Env, VirtioDevice};
use devices::virtio::net;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde_json::json;

use super::limiter;
use crate::session::{Buffer, Model, Session};

/// virtio-net: its host side is a packet socket.
#[derive(Debug)]
pub struct Net {
    peer: OwnedFd,
}

impl Net {
    /// One of several kinds.
    pub fn new(kind: u8) -> (Self, Box<dyn VirtioDevice>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, peer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .expect("there are descriptors");
        let mut config = net::Config::new("eth0", "unused");
        let mut env = Env::default();
        if kind & 1 != 0 {
            let limiter: Option<devices::limiter::RateLimiter> =
                serde_json::from_value(limiter()).expect("it is one");
            (config.rx_rate_limiter, config.tx_rate_limiter) = (limiter.clone(), limiter);
        }
        if kind & 2 != 0 {
            env.mmds = Some(service());
        }
        let device = net::Net::from_fd(&config, &env, ours).expect("it is a packet socket");
        (Self { peer }, Box::new(device))
    }
}

/// A metadata service with something in it.
pub fn service() -> Arc<Service> {
    let mmds = Mmds::new(1 << 16);
    mmds.put(json!({"a": "b", "c": {"d": ["e", 1, null]}, "large": "x".repeat(9000)}))
        .expect("fits");
    let config =
        serde_json::from_value(json!({"network_interfaces": ["eth0"]})).expect("it is one");
    Arc::new(Service::new(Arc::new(mmds), config).expect("there is randomness"))
}

impl Model for Net {
    fn request(&mut self, s: &mut Session<'_>) -> (u16, Vec<Buffer>) {
        let how = s.input.u8();
        if how & 1 == 0 {
            // Room to receive.
            let buffers = (0..1 + (how >> 6)).map(|_| match how >> 4 & 3 {
                0 => Buffer::In(1526),
                1 => Buffer::In(s.input.u8().into()),
                2 => Buffer::In(65_562),
                _ => Buffer::At(s.address(), s.length(), s.input.below(8) > 0),
            });
            return (0, buffers.collect());
        }
        let mut header = [0; 12];
        if how & 2 != 0 {
            let given = s.input.take(12);
            header[..given.len()].copy_from_slice(given);
        }
        let frame = frame(s, how >> 2);
        let packet = [&header[..], &frame].concat();
        let buffers = match how >> 6 {
            0 => vec![Buffer::Out(packet)],
            1 => vec![Buffer::Out(header.to_vec()), Buffer::Out(frame)],
            2 => packet
                .chunks(1 + usize::from(s.input.u8()))
                .map(|c| Buffer::Out(c.to_vec()))
                .collect(),
            _ => vec![
                Buffer::Out(packet),
                Buffer::At(s.address(), s.length(), s.input.below(8) == 0),
            ],
        };
        (1, buffers)
    }

    fn host(&mut self, s: &mut Session<'_>) {
        match s.input.below(8) {
            0..5 => {
                let how = s.input.u8();
                let mut packet = vec![0; 12];
                packet.extend(frame(s, how));
                let _ = send(&self.peer, &packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            }
            5 => {
                let mut packet = [0; 2048];
                let _ = recv(&self.peer, &mut packet, RecvFlags::DONTWAIT);
            }
            6 => {
                let given = s.input.piece();
                let _ = send(&self.peer, given, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            }
            _ => {
                let json = s.input.piece();
                s.patch(None, json);
            }
        }
    }
}

/// An Ethernet frame: to the metadata service, of ARP or of anything.
fn frame(s: &mut Session<'_>, how: u8) -> Vec<u8> {
    let mut frame = vec![6, 1, 0x23, 0x45, 0x67, 1, 2, 0, 0, 0, 0, 7];
    match how % 4 {
        0 => {
            frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7, 172, 16, 0, 2]);
            frame.extend([0, 0, 0, 0, 0, 0, 169, 254, 169, 254]);
        }
        1 => {
            let payload = s.input.piece();
            let total = (20 + payload.len()) as u16;
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2, 169, 254, 169, 254]);
            frame.extend(payload);
        }
        2 => frame.resize(s.input.u16().into(), how),
        _ => return s.input.piece().to_vec(),
    }
    frame
}
