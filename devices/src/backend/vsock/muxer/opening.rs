//! How connections begin: the host comes to the listener, or the guest asks for a port of the host.
use std::path::PathBuf;

use rustix::event::epoll;
use rustix::io::{Errno, retry_on_intr};

use super::{EVENTS_PER_TURN, Entry, Muxer, STREAMS_MAX, Slot, Stream, shorten};
use crate::backend::unix;
use crate::backend::vsock::connection::{Connection, Ports, Verdict};
use crate::backend::vsock::packet::Header;
use crate::backend::vsock::socket::{HostSocket, parse_connect};

/// What somebody who has connected said.
pub(super) enum Greeted {
    NotYet,
    Badly,
    Wants(Ports),
}

impl Muxer {
    /// Lets in those who wait at the listener.
    pub(super) fn accept(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            match unix::accept(&self.listener) {
                Ok(fd) if self.slots.len() >= STREAMS_MAX => {
                    self.counters.conns_refused().inc();
                    drop(fd);
                }
                Ok(fd) => {
                    let stream = self.new_stream();
                    if self.watch(stream, &fd) {
                        let greeting = Entry::Greeting(HostSocket::new(fd));
                        self.slots.insert(stream, Slot::of(greeting));
                        self.be_patient(stream);
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    // No descriptors, most likely. The listener would be ready for ever.
                    self.note_shortage("accept a connection", e);
                    let delete = || epoll::delete(&self.epoll, &self.listener);
                    self.is_deaf = retry_on_intr(delete).is_ok();
                    return;
                }
            }
        }
    }

    /// Reads which port somebody wants, and asks the guest.
    pub(super) fn greet(&mut self, stream: Stream, socket: &mut HostSocket) -> Greeted {
        let port = match socket.read_line() {
            Ok(None) => return Greeted::NotYet,
            Ok(Some(line)) => parse_connect(&line),
            Err(_) => None,
        };
        let ports = port.and_then(|guest| Some(Ports { host: self.free_port(guest)?, guest }));
        log::debug!("vsock: stream {stream:?} wants {ports:?}");
        ports.map_or(Greeted::Badly, Greeted::Wants)
    }

    /// The guest wants a connection to a port of the host.
    pub(super) fn connect(&mut self, request: &Header, ports: Ports) {
        if self.slots.len() >= STREAMS_MAX {
            self.counters.conns_refused().inc();
            return self.reply(request);
        }
        let stream = self.new_stream();
        match self.reach(ports.host) {
            Ok(socket) if self.watch(stream, &socket) => {
                let basis = self.basis(ports, socket);
                self.put(stream, Connection::grant(request, basis));
            }
            // The listener is there, and busy.
            Err(Errno::AGAIN) => {
                self.slots.insert(stream, Slot::of(Entry::Waiting(*request)));
                self.by_ports.insert(ports, stream);
                self.waiting.push_back(stream);
                let slots = &self.slots;
                shorten(&mut self.waiting, |stream| slots.contains_key(stream));
                self.be_patient(stream);
            }
            refused => {
                log::debug!("vsock: no connection to port {}: {:?}", ports.host, refused.err());
                self.reply(request);
            }
        }
    }

    /// Connects to who listens for connections to `port`.
    fn reach(&self, port: u32) -> Result<HostSocket, Errno> {
        let path = self.path_of(port);
        match &self.connector {
            Some(connector) => connector.run(|| HostSocket::connect(&path)),
            None => HostSocket::connect(&path),
        }
    }

    /// Where the host listens for connections to `port`.
    fn path_of(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }

    /// Tries again to connect those whose listener was busy.
    pub(super) fn connect_waiting(&mut self) {
        for _ in 0..self.waiting.len().min(EVENTS_PER_TURN) {
            let Some(stream) = self.waiting.pop_front() else { return };
            let Some(Slot { entry: Entry::Waiting(request), .. }) = self.slots.get(&stream) else {
                continue;
            };
            let request = *request;
            let ports = Ports { host: request.dst_port, guest: request.src_port };
            match self.reach(ports.host) {
                Err(Errno::AGAIN) => self.waiting.push_back(stream),
                Ok(socket) if self.watch(stream, &socket) => {
                    let basis = self.basis(ports, socket);
                    self.put(stream, Connection::grant(&request, basis));
                }
                _ => self.carry_out(stream, Verdict::Abort),
            }
        }
    }
}
