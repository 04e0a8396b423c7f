//! A guest's TCP/IP: smoltcp with Ethernet and ARP, frames in and out by hand. Also for the unit
//! tests of the metadata service.
use std::collections::VecDeque;
use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

/// The guest's hardware address.
pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// The guest's address.
pub(crate) const GUEST_IP: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

pub(crate) struct Guest {
    pub(crate) wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    next_port: u16,
}

/// Frames that came, and frames to send.
#[derive(Default)]
pub(crate) struct Wire {
    pub(crate) inbox: VecDeque<Vec<u8>>,
    pub(crate) outbox: VecDeque<Vec<u8>>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut wire = Wire::default();
        let config = Config::new(EthernetAddress(GUEST_MAC).into());
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|a| a.push(IpCidr::new(GUEST_IP.into(), 0)).unwrap());
        Self { wire, interface, sockets: SocketSet::new(Vec::new()), next_port: 50_000 }
    }

    /// Begins a connection to port 80.
    pub(crate) fn connect(&mut self, to: Ipv4Addr) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 16 << 10]);
        let handle = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        let (context, port) = (self.interface.context(), self.next_port);
        self.next_port += 1;
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(context, (to, 80), port).unwrap();
        handle
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Takes what came, and makes what there is to send.
    pub(crate) fn poll(&mut self, ms: i64) {
        self.interface.poll(Instant::from_millis(ms), &mut self.wire, &mut self.sockets);
    }

    /// Everything that came for a connection since the last call.
    pub(crate) fn read(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut all = Vec::new();
        let socket = self.socket(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), all.extend_from_slice(bytes))).unwrap();
        }
        all
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sent<'_>)> {
        Some((Received(self.inbox.pop_front()?), Sent(&mut self.outbox)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.outbox))
    }

    /// Checksums are verified, as by a driver to which the device has not promised any.
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub(crate) struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
