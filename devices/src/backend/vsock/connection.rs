//! One connection between a port of the guest and a stream of the host.
//!
//! ```text
//!   the guest asks:  Connecting ──the host's listener has room──┐
//!                    (its backlog is full)                      ├─► Open ──► gone
//!   the host asks:   Requested ──RESPONSE───────────────────────┘
//! ```
//! Knows packets and the stream; not how packets travel, nor other connections.
use std::sync::Arc;

use super::Counters;
use super::credit::{Allowance, Window};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::socket::{HostSocket, Received};
use crate::sys::rw::IoSlices;

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// The guest has ended it and wants no answer.
    Forget,
    /// The guest will neither send nor receive any more: it wants a RST.
    Finish,
    /// It is broken: RST, and nothing more to the host.
    Abort,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// A packet without data.
    Packet(Header),
    /// Up to so many bytes of data, if there are any.
    Data(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// We ask the guest, or are about to.
    Requested { is_sent: bool },
    /// The guest may or may not have been told.
    Open { is_granted: bool },
}

#[derive(Debug)]
pub(super) struct Connection {
    guest_cid: u64,
    ports: Ports,
    stage: Stage,
    socket: HostSocket,
    window: Window,
    allowance: Allowance,
    /// The guest wants to know its credit.
    is_credit_wanted: bool,
    /// We have asked for credit, and not got any since.
    has_asked: bool,
    /// [`shutdown`] flags the guest has sent.
    guest_shut: u32,
    /// Those that hold for the host's side, and those of them that the guest was told.
    host_shut: u32,
    told_shut: u32,
    counters: Arc<Counters>,
}

/// What both ways to a connection need.
#[derive(Debug)]
pub(super) struct Basis {
    pub(super) guest_cid: u64,
    pub(super) ports: Ports,
    pub(super) socket: HostSocket,
    /// Bytes of the guest's that may wait for the host.
    pub(super) window: u32,
    pub(super) counters: Arc<Counters>,
}

impl Connection {
    /// Asked for by the host.
    pub(super) fn request(basis: Basis) -> Self {
        Self::new(basis, Stage::Requested { is_sent: false })
    }

    /// Asked for by the guest, by the packet `request`.
    pub(super) fn grant(request: &Header, basis: Basis) -> Self {
        let mut connection = Self::new(basis, Stage::Open { is_granted: false });
        connection.allowance.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(basis: Basis, stage: Stage) -> Self {
        let Basis { guest_cid, ports, socket, window, counters } = basis;
        Self {
            guest_cid,
            ports,
            stage,
            socket,
            window: Window::new(window),
            allowance: Allowance::default(),
            is_credit_wanted: false,
            has_asked: false,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            counters,
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn window_size(&self) -> u32 {
        self.window.size()
    }

    /// Whether the guest has not answered yet.
    pub(super) fn is_requested(&self) -> bool {
        matches!(self.stage, Stage::Requested { .. })
    }

    /// Whether the guest knows of it, and so must hear of its end.
    pub(super) fn is_known_to_guest(&self) -> bool {
        self.stage != Stage::Requested { is_sent: false }
    }

    /// Whether the guest was told that it is over, and has to say so too.
    pub(super) fn is_waiting_for_the_end(&self) -> bool {
        self.told_shut == shutdown::BOTH
    }

    /// The host's stream, if it is still to be given what the guest had sent before it ended the
    /// connection in good order.
    pub(super) fn into_lingering(mut self) -> Option<HostSocket> {
        let lingers = self.guest_shut & shutdown::SEND != 0 && !self.socket.is_flushed();
        if lingers {
            self.socket.end();
        }
        lingers.then_some(self.socket)
    }

    /// Takes a packet of the guest, and its data.
    pub(super) fn take(&mut self, header: &Header, payload: IoSlices<'_>) -> Verdict {
        let had = self.allowance.left();
        self.allowance.update(header.buf_alloc, header.fwd_cnt);
        self.has_asked &= self.allowance.left() <= had;
        match (header.op, self.stage) {
            (op::RST, _) => Verdict::Forget,
            (op::RESPONSE, Stage::Requested { is_sent: true }) => self.open(),
            (op::RW, Stage::Open { .. }) => self.take_data(header.len, payload),
            (op::SHUTDOWN, Stage::Open { .. }) => self.take_shutdown(header.flags),
            (op::CREDIT_UPDATE, Stage::Open { .. }) => Verdict::Keep,
            (op::CREDIT_REQUEST, Stage::Open { .. }) => {
                self.is_credit_wanted = true;
                Verdict::Keep
            }
            _ => Verdict::Abort,
        }
    }

    /// The guest has granted what the host asked for.
    fn open(&mut self) -> Verdict {
        self.stage = Stage::Open { is_granted: true };
        let answer = format!("OK {}\n", self.ports.host);
        match self.socket.say(answer.as_bytes()) {
            Ok(()) => Verdict::Keep,
            Err(_) => Verdict::Abort,
        }
    }

    fn take_data(&mut self, len: u32, payload: IoSlices<'_>) -> Verdict {
        if self.guest_shut & shutdown::SEND != 0 || !self.window.receive(len) {
            return Verdict::Abort;
        }
        if self.host_shut & shutdown::RECEIVE != 0 {
            // It has not heard yet that nobody listens.
            self.window.forward(len);
            return Verdict::Keep;
        }
        match self.socket.send(payload) {
            Ok(sent) => self.window.forward(sent),
            Err(_) => {
                self.counters.tx_write_fails().inc();
                // Nothing of it was kept.
                self.window.forward(len);
                self.lose_reader();
            }
        }
        Verdict::Keep
    }

    fn take_shutdown(&mut self, flags: u32) -> Verdict {
        let added = flags & shutdown::BOTH & !self.guest_shut;
        self.guest_shut |= added;
        if self.guest_shut == shutdown::BOTH {
            return Verdict::Finish;
        }
        if added & shutdown::SEND != 0 {
            self.socket.end();
        }
        if added & shutdown::RECEIVE != 0 {
            self.socket.stop_reading();
        }
        Verdict::Keep
    }

    /// The host's stream has become ready, or its peer has gone.
    pub(super) fn host_ready(&mut self, is_readable: bool, is_writable: bool, is_gone: bool) {
        let is_read = self.guest_shut & shutdown::RECEIVE == 0;
        self.socket.note_ready(is_readable && is_read, is_writable);
        match self.socket.flush() {
            Ok(sent) => self.window.forward(sent),
            Err(_) => {
                self.counters.tx_flush_fails().inc();
                self.lose_reader();
            }
        }
        if is_gone {
            self.lose_reader();
        }
    }

    /// Nobody takes what the guest sends any more.
    fn lose_reader(&mut self) {
        self.host_shut |= shutdown::RECEIVE;
        let discarded = self.socket.discard();
        self.window.forward(discarded);
    }

    /// What the guest has to hear next, most urgent first.
    pub(super) fn next(&mut self) -> Option<Due> {
        match &mut self.stage {
            Stage::Requested { is_sent } if !*is_sent => {
                *is_sent = true;
                return Some(self.packet(op::REQUEST, 0));
            }
            Stage::Requested { .. } => return None,
            Stage::Open { is_granted } if !*is_granted => {
                *is_granted = true;
                return Some(self.packet(op::RESPONSE, 0));
            }
            Stage::Open { .. } => {}
        }
        let is_at_end = self.host_shut & shutdown::SEND != 0;
        if self.socket.is_readable() && !is_at_end {
            match self.allowance.left() {
                0 if !self.has_asked => {
                    self.has_asked = true;
                    return Some(self.packet(op::CREDIT_REQUEST, 0));
                }
                0 => {}
                room => return Some(Due::Data(room)),
            }
        }
        if std::mem::take(&mut self.is_credit_wanted) || self.window.is_news_due() {
            return Some(self.packet(op::CREDIT_UPDATE, 0));
        }
        if self.host_shut & !self.told_shut != 0 {
            self.told_shut = self.host_shut;
            return Some(self.packet(op::SHUTDOWN, self.host_shut));
        }
        None
    }

    /// Receives from the host into `room`; gives the header of what came, if anything did.
    pub(super) fn receive(&mut self, room: &mut IoSlices<'_>) -> Option<Header> {
        match self.socket.receive(room) {
            Ok(Received::Bytes(len)) => {
                self.allowance.send(len);
                Some(Header { len, ..self.header(op::RW) })
            }
            Ok(Received::Nothing) => None,
            Ok(Received::End) => {
                self.host_shut |= shutdown::SEND;
                None
            }
            Err(_) => {
                self.counters.rx_read_fails().inc();
                // It went without reading everything.
                self.host_shut |= shutdown::SEND;
                self.lose_reader();
                None
            }
        }
    }

    fn packet(&mut self, op: u16, flags: u32) -> Due {
        Due::Packet(Header { flags, ..self.header(op) })
    }

    fn header(&mut self, op: u16) -> Header {
        let (buf_alloc, fwd_cnt) = self.window.tell();
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }
}

impl std::os::fd::AsFd for Connection {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
