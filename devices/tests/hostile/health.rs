//! Whether a device works: what a driver wants of it is done, and done right.
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vm_memory::{Bytes, GuestAddress};

use crate::bench::{Bench, Verdict};
use crate::driver::OWN;
use crate::kinds::{DATA, HEADER, Kind, NOBODY, RESPONSE, SPARE_PAGE, UNTOUCHED};
use crate::kinds::{block_header, frame, mem_request, vsock_request};

impl Bench {
    /// A reset makes it as new, whatever was: what a driver wants of it is done.
    pub(crate) fn works(&mut self) {
        self.up();
        match self.kind {
            _ if self.kind.is_block() => {
                self.write(DATA, &[0x5a; 512]);
                assert_eq!(self.block(1, 5, false), Verdict::Done, "a write");
                self.write(DATA, &[0; 512]);
                assert_eq!(self.block(0, 5, true), Verdict::Done, "a read");
                assert_eq!(self.read(DATA), [0x5a; 512], "what was read");
            }
            Kind::Mem => {
                // A reset of the device leaves memory as it is, and an attack may have plugged some.
                self.write(HEADER, &mem_request(2, 0, 0));
                assert_eq!(self.request(24, 10), Verdict::Done, "all is unplugged");
                for (request, what) in [(0, "plugged"), (3, "its state"), (1, "unplugged")] {
                    self.write(HEADER, &mem_request(request, OWN.0, 1));
                    assert_eq!(self.request(24, 10), Verdict::Done, "a block is {what}");
                    assert_eq!(self.read(RESPONSE + 8), [0, 0], "the state of a block");
                }
            }
            Kind::Pmem => {
                self.write(HEADER, &[0; 4]);
                assert_eq!(self.request(4, 4), Verdict::Done, "a flush");
            }
            Kind::Rng => {
                self.write(DATA, &[0; 64]);
                assert_eq!(self.send(0, &[(DATA, 64, true)]), Verdict::Done);
                assert_ne!(self.read(DATA), [0; 64], "random numbers");
            }
            Kind::Net | Kind::NetMetadata => self.wire_works(),
            Kind::Vsock => {
                self.rings[0].add(&[(DATA, 0x1000, true)]);
                self.kick_and_settle(0);
                self.write(HEADER, &vsock_request(NOBODY).to_bytes());
                assert_eq!(self.send(1, &[(HEADER, 44, false)]), Verdict::Used0);
                self.m.irq.wait("a refusal", || self.rings[0].used_idx() == 1);
                assert_eq!(self.read(DATA + 30), [3, 0], "the operation of a refusal");
            }
            _ => {
                self.write(SPARE_PAGE, &[0xff; 64]);
                let honest = self.honest(0);
                assert_eq!(self.send(0, &honest), Verdict::Used0);
                assert_eq!(self.read(SPARE_PAGE), [0; 64], "what is in a balloon");
            }
        }
    }

    /// Sends a drive a request with one sector of data.
    fn block(&mut self, request: u32, sector: u64, is_read: bool) -> Verdict {
        self.write(HEADER, &block_header(request, sector));
        self.write(RESPONSE, &[UNTOUCHED]);
        self.send(0, &[(HEADER, 16, false), (DATA, 512, is_read), (RESPONSE, 1, true)])
    }

    fn request(&mut self, len: u32, room: u32) -> Verdict {
        self.write(RESPONSE, &[UNTOUCHED; 16]);
        self.send(0, &[(HEADER, len, false), (RESPONSE, room, true)])
    }

    /// One frame each way.
    fn wire_works(&mut self) {
        // An attack may have left the wire full of frames like this one.
        while send(self.peer(), &frame(60), SendFlags::DONTWAIT).is_err() {
            self.up();
            for page in 0..12 {
                self.rings[0].add(&[(DATA + page * 0x1000, 0x1000, true)]);
            }
            self.kick_and_settle(0);
        }
        self.up();
        let Self { host, rings, m, .. } = self;
        let peer = host.peer.as_ref().unwrap();
        let mut seen = [0; 1 << 10];
        let flags = RecvFlags::DONTWAIT;
        while recv(peer, &mut seen, flags).is_ok() {}
        m.mem.write_slice(&frame(60), GuestAddress(HEADER)).unwrap();
        rings[1].add(&[(HEADER, 72, false)]);
        m.finish(&rings[1], 1);
        let (_, len) = recv(peer, &mut seen, flags).expect("a frame of the guest");
        assert_eq!((len, &seen[12..72]), (72, &frame(60)[12..]));
        rings[0].add(&[(DATA, 0x1000, true)]);
        m.kick(&rings[0]);
        m.irq.wait("a frame of the host", || rings[0].used_idx() == 1);
        assert_eq!(rings[0].used_entry(0).1, 72);
    }
}
