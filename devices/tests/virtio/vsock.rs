//! virtio-vsock between a driver and real Unix sockets.
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use devices::backend::vsock::STREAMS_MAX;
use devices::backend::vsock::packet::{Header, op, shutdown};
use devices::virtio::mmio::Saved;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, HIGH, LOW, Machine, NEEDS_RESET, Ring};
use crate::samples::{TempDir, open, refusal};

const CID: u64 = 7;
const HOST: u64 = 2;
const FIRST_HOST_PORT: u32 = 1 << 30;
const WINDOW: u32 = 256 << 10;

const RX: u64 = HIGH.0;
const RX_LEN: u32 = 4096;
const TX: u64 = HIGH.0 + 0x4_0000;
const EVENTS: u64 = HIGH.0 + 0xf_0000;

/// A guest's driver, and the directory with the host's sockets.
struct Guest {
    m: Machine,
    rx: Ring,
    tx: Ring,
    events: Ring,
    dir: TempDir,
    seen: u16,
    sent: u16,
}

impl Guest {
    fn new() -> Self {
        let dir = TempDir::new();
        let m = Machine::new(device(&dir));
        let mut guest = Self::up(m, dir);
        guest.fill();
        guest
    }

    /// A driver that has not given any buffers.
    fn up(m: Machine, dir: TempDir) -> Self {
        let mut rings = m.start(0);
        let (events, tx, rx) = (rings.pop(), rings.pop(), rings.pop());
        let (events, tx, rx) = (events.unwrap(), tx.unwrap(), rx.unwrap());
        Self { m, rx, tx, events, dir, seen: 0, sent: 0 }
    }

    /// Gives all receive buffers there are.
    fn fill(&mut self) {
        for i in 0..16 {
            self.rx.add(&[(RX + i * u64::from(RX_LEN), RX_LEN, true)]);
        }
        self.m.kick(&self.rx);
    }

    /// Sends what is described by `buffers`, whatever it is.
    fn send_buffers(&mut self, buffers: &[Buf]) {
        self.tx.add(buffers);
        self.sent = self.sent.wrapping_add(1);
        self.m.finish(&self.tx, self.sent);
    }

    fn write_header(&self, header: &Header) {
        self.m.mem.write_slice(&header.to_bytes(), GuestAddress(TX)).unwrap();
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.write_header(&Header { len, ..header });
        self.m.mem.write_slice(data, GuestAddress(TX + 0x1000)).unwrap();
        let buffers = [(TX, 44, false), (TX + 0x1000, len, false)];
        self.send_buffers(if len == 0 { &buffers[..1] } else { &buffers });
    }

    /// The next packet, and its data. Its buffer is given again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        self.m.irq.wait("a packet", || self.rx.used_idx() != self.seen);
        let (head, len) = self.rx.used_entry(self.seen);
        self.seen = self.seen.wrapping_add(1);
        let at = RX + u64::from(head) * u64::from(RX_LEN);
        let mut bytes = [0; 44];
        self.m.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!(len, 44 + header.len);
        let mut data = vec![0; header.len as usize];
        self.m.mem.read_slice(&mut data, GuestAddress(at + 44)).unwrap();
        self.rx.offer(u16::try_from(head).unwrap());
        self.m.kick(&self.rx);
        (header, data)
    }

    /// The next packet, which is of this kind.
    #[track_caller]
    fn expect(&mut self, op: u16, ports: (u32, u32)) -> Header {
        let (header, _) = self.packet();
        let expected = (HOST, CID, ports.0, ports.1, 1, op);
        let Header { src_cid, dst_cid, src_port, dst_port, kind, op, .. } = header;
        assert_eq!((src_cid, dst_cid, src_port, dst_port, kind, op), expected);
        header
    }

    /// Data of the next packets until there are `len` bytes. The guest takes note of them.
    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let (header, data) = self.packet();
            assert_eq!(header.op, op::RW, "{header:?}");
            all.extend(data);
        }
        all
    }

    /// Everything the device does before this returns is done.
    fn settle(&self) {
        self.m.transport.lock().unwrap().pause().unwrap();
        self.m.transport.lock().unwrap().resume().unwrap();
    }

    /// Nothing has come, and nothing is on its way.
    #[track_caller]
    fn expect_silence(&self) {
        for _ in 0..3 {
            self.settle();
        }
        assert_eq!(self.rx.used_idx(), self.seen, "a packet that nobody expected");
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path(&format!("v.sock_{port}"))).unwrap()
    }

    /// Connects the guest's port to one of the host.
    fn connect(&mut self, listener: &UnixListener, ports: (u32, u32)) -> UnixStream {
        self.send(of(op::REQUEST, ports), &[]);
        let (stream, _) = listener.accept().unwrap();
        self.expect(op::RESPONSE, ports);
        patient(stream)
    }

    /// Asks for a port of the guest.
    fn call(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path("v.sock")).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        patient(stream)
    }

    fn counter(&self, name: &str) -> u64 {
        self.m.counter(name)
    }
}

fn device(dir: &TempDir) -> Box<dyn devices::virtio::model::VirtioDevice> {
    open("vsock", &json!({"guest_cid": CID, "uds_path": dir.path("v.sock")}))
}

/// A stream whose reader does not wait for ever.
fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// A packet from the guest; `ports` are the host's and the guest's.
fn of(op: u16, (host, guest): (u32, u32)) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST,
        src_port: guest,
        dst_port: host,
        kind: 1,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

fn shut(flags: u32, ports: (u32, u32)) -> Header {
    Header { flags, ..of(op::SHUTDOWN, ports) }
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let word = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).to_be_bytes();
    (0..).flat_map(word).take(len).collect()
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.extend(read(stream, 1));
    }
    String::from_utf8(line).unwrap()
}

#[track_caller]
fn expect_end(stream: &mut UnixStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn guest_reaches_a_port_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    guest.send(of(op::REQUEST, (52, 1000)), &[]);
    let (stream, _) = listener.accept().unwrap();
    let response = guest.expect(op::RESPONSE, (52, 1000));
    assert_eq!((response.buf_alloc, response.fwd_cnt, response.len), (WINDOW, 0, 0));

    let mut stream = patient(stream);
    guest.send(of(op::RW, (52, 1000)), b"hello");
    assert_eq!(read(&mut stream, 5), b"hello");
    stream.write_all(b"good evening").unwrap();
    let (header, data) = guest.packet();
    assert_eq!((header.op, &data[..]), (op::RW, &b"good evening"[..]));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (WINDOW, 5));
    let counted = ["tx_packets_count", "tx_bytes_count", "rx_packets_count", "rx_bytes_count"];
    assert_eq!(counted.map(|name| guest.counter(name)), [1, 5, 1, 12]);
}

#[test]
fn host_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let mut streams = Vec::new();
    for n in 0..3 {
        let mut stream = guest.call("CONNECT 52\n");
        let ports = (FIRST_HOST_PORT + n, 52);
        assert_eq!(guest.expect(op::REQUEST, ports).buf_alloc, WINDOW);
        guest.send(of(op::RESPONSE, ports), &[]);
        assert_eq!(line(&mut stream), format!("OK {}\n", FIRST_HOST_PORT + n));
        stream.write_all(b"ping").unwrap();
        assert_eq!(guest.data(4), b"ping");
        guest.send(of(op::RW, ports), b"pong!");
        assert_eq!(read(&mut stream, 5), b"pong!");
        streams.push(stream);
    }
    // Data behind the line waits for the answer; lower case will do.
    let mut stream = guest.call("connect 9\nearly");
    let ports = (FIRST_HOST_PORT + 3, 9);
    guest.expect(op::REQUEST, ports);
    guest.expect_silence();
    guest.send(of(op::RESPONSE, ports), &[]);
    assert_eq!(guest.data(5), b"early");
    assert_eq!(line(&mut stream), "OK 1073741827\n");
}

#[test]
fn nobody_there_is_a_reset() {
    let mut guest = Guest::new();
    guest.send(of(op::REQUEST, (53, 1000)), &[]);
    guest.expect(op::RST, (53, 1000));
    // A listener that died and left its socket, a file, a directory.
    drop(guest.listen(54));
    std::fs::write(guest.dir.path("v.sock_55"), "").unwrap();
    std::fs::create_dir(guest.dir.path("v.sock_56")).unwrap();
    for port in [54, 55, 56, u32::MAX] {
        guest.send(of(op::REQUEST, (port, 1000)), &[]);
        guest.expect(op::RST, (port, 1000));
    }
    // And the other way round.
    let mut stream = guest.call("CONNECT 52\n");
    let ports = (FIRST_HOST_PORT, 52);
    guest.expect(op::REQUEST, ports);
    guest.send(of(op::RST, ports), &[]);
    expect_end(&mut stream);
    guest.expect_silence();
}

#[test]
fn who_asks_for_no_port_is_turned_away() {
    let guest = Guest::new();
    for words in
        ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT x\n", "CONNECT 5 6\n", "CONNECT 5\0\n"]
    {
        expect_end(&mut guest.call(words));
    }
    expect_end(&mut guest.call(&"CONNECT 5".repeat(20)));
    guest.expect_silence();
}

#[test]
fn nobody_is_waited_for_longer_than_two_seconds() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let start = Instant::now();
    let mut silent = guest.call("CONN");
    let mut unanswered = guest.call("CONNECT 8\n");
    guest.expect(op::REQUEST, (FIRST_HOST_PORT, 8));
    drop(guest.connect(&listener, (52, 1)));
    assert_eq!(guest.expect(op::SHUTDOWN, (52, 1)).flags, shutdown::BOTH);
    // All at once, in the order in which they began.
    guest.expect(op::RST, (FIRST_HOST_PORT, 8));
    guest.expect(op::RST, (52, 1));
    let took = start.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{took:?}");
    expect_end(&mut silent);
    expect_end(&mut unanswered);
    assert_eq!(guest.counter("conns_killed"), 2);
    assert_eq!((guest.counter("conns_added"), guest.counter("conns_removed")), (2, 2));
    // A connection that was answered may be idle as long as it likes.
    let ports = (FIRST_HOST_PORT + 1, 8);
    let mut idle = guest.call("CONNECT 8\n");
    guest.expect(op::REQUEST, ports);
    guest.send(of(op::RESPONSE, ports), &[]);
    line(&mut idle);
    idle.set_read_timeout(Some(Duration::from_millis(2500))).unwrap();
    assert_eq!(idle.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    guest.expect_silence();
}

#[test]
fn who_leaves_before_the_answer_is_taken_back() {
    let mut guest = Guest::new();
    let stream = guest.call("CONNECT 52\n");
    guest.expect(op::REQUEST, (FIRST_HOST_PORT, 52));
    drop(stream);
    guest.expect(op::RST, (FIRST_HOST_PORT, 52));
    // The answer comes too late.
    guest.send(of(op::RESPONSE, (FIRST_HOST_PORT, 52)), &[]);
    guest.expect(op::RST, (FIRST_HOST_PORT, 52));
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let with = |op, fwd_cnt| Header { buf_alloc: 100, fwd_cnt, ..of(op, ports) };
    guest.send(with(op::REQUEST, 0), &[]);
    let mut stream = patient(listener.accept().unwrap().0);
    guest.expect(op::RESPONSE, ports);

    let data = pattern(250, 1);
    stream.write_all(&data).unwrap();
    assert_eq!(guest.data(100), data[..100]);
    guest.expect(op::CREDIT_REQUEST, ports);
    guest.expect_silence();
    // No news: not asked again, or both would ask for ever.
    guest.send(with(op::CREDIT_UPDATE, 0), &[]);
    guest.expect_silence();
    guest.send(with(op::CREDIT_UPDATE, 60), &[]);
    assert_eq!(guest.data(60), data[100..160]);
    guest.expect(op::CREDIT_REQUEST, ports);
    // Any packet brings credit.
    guest.send(with(op::RW, 100), b"x");
    assert_eq!(guest.data(40), data[160..200]);
    guest.expect(op::CREDIT_REQUEST, ports);
    // More forwarded than it ever got, a buffer that shrinks: nothing.
    guest.send(with(op::CREDIT_UPDATE, 201), &[]);
    guest.send(Header { buf_alloc: 0, ..with(op::CREDIT_UPDATE, 200) }, &[]);
    guest.expect_silence();
    guest.send(with(op::CREDIT_UPDATE, 200), &[]);
    assert_eq!(guest.data(50), data[200..]);
    guest.expect_silence();
}

#[test]
fn a_host_that_does_not_read_costs_its_window_and_nobody_else() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut slow = guest.connect(&listener, (52, 1));
    let mut quick = guest.connect(&listener, (52, 2));
    let data = pattern(4 << 20, 5);
    let mut sent = 0;
    let mut piece = |guest: &mut Guest, len: usize| {
        guest.send(of(op::RW, (52, 1)), &data[sent..sent + len]);
        sent += len;
        sent
    };
    // Ask after each piece: so no news comes by itself.
    let forwarded = |guest: &mut Guest| {
        guest.send(of(op::CREDIT_REQUEST, (52, 1)), &[]);
        guest.expect(op::CREDIT_UPDATE, (52, 1)).fwd_cnt as usize
    };
    while piece(&mut guest, 32 << 10) == forwarded(&mut guest) {}
    let taken = forwarded(&mut guest);
    let room = WINDOW as usize - (sent_so_far(&mut piece, &mut guest) - taken);
    piece(&mut guest, room - 1);
    piece(&mut guest, 1);
    assert_eq!(forwarded(&mut guest), taken, "the host reads nothing");
    // Others are served meanwhile.
    guest.send(of(op::RW, (52, 2)), b"still here");
    assert_eq!(read(&mut quick, 10), b"still here");

    // It reads again: everything comes, and the guest hears of its room.
    let total = taken + WINDOW as usize;
    assert!(read(&mut slow, total) == data[..total]);
    guest.expect(op::CREDIT_UPDATE, (52, 1));
    while forwarded(&mut guest) != total {}

    // Full again; one byte too many is the end.
    let mut sent = total;
    loop {
        guest.send(of(op::RW, (52, 1)), &data[sent..sent + 1024]);
        sent += 1024;
        guest.send(of(op::CREDIT_REQUEST, (52, 1)), &[]);
        let fwd_cnt = guest.expect(op::CREDIT_UPDATE, (52, 1)).fwd_cnt as usize;
        let room = WINDOW as usize - (sent - fwd_cnt);
        if room < 1024 || sent - fwd_cnt > 0 {
            guest.send(of(op::RW, (52, 1)), &data[sent..sent + room]);
            break;
        }
    }
    guest.send(of(op::RW, (52, 1)), b"!");
    guest.expect(op::RST, (52, 1));
    assert_eq!(guest.counter("conns_killed"), 1);
    guest.send(of(op::RW, (52, 2)), b"still here");
    assert_eq!(read(&mut quick, 10), b"still here");
}

/// Bytes sent so far: an empty piece says.
fn sent_so_far(piece: &mut impl FnMut(&mut Guest, usize) -> usize, guest: &mut Guest) -> usize {
    piece(guest, 0)
}

#[test]
fn the_guest_may_stop_sending_and_go_on_receiving() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let mut stream = guest.connect(&listener, ports);
    guest.send(of(op::RW, ports), b"last words");
    guest.send(shut(shutdown::SEND, ports), &[]);
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "last words");
    stream.write_all(b"an answer").unwrap();
    assert_eq!(guest.data(9), b"an answer");
    // Now it is over.
    guest.send(shut(shutdown::RECEIVE, ports), &[]);
    guest.expect(op::RST, ports);
    assert_eq!(stream.write_all(b"more").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!((guest.counter("conns_removed"), guest.counter("conns_killed")), (1, 0));
}

#[test]
fn the_guest_may_stop_receiving_and_go_on_sending() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let mut stream = guest.connect(&listener, ports);
    guest.send(shut(shutdown::RECEIVE, ports), &[]);
    assert_eq!(stream.write_all(b"unheard").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(of(op::RW, ports), b"monologue");
    assert_eq!(read(&mut stream, 9), b"monologue");
    guest.expect_silence();
    // Nothing may follow its end.
    guest.send(shut(shutdown::SEND, ports), &[]);
    guest.expect(op::RST, ports);
    guest.send(of(op::RW, ports), b"x");
    guest.expect(op::RST, ports);
    expect_end(&mut stream);
}

#[test]
fn data_behind_the_end_is_the_end() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut stream = guest.connect(&listener, (52, 1));
    guest.send(shut(shutdown::SEND, (52, 1)), &[]);
    guest.send(of(op::RW, (52, 1)), b"x");
    guest.expect(op::RST, (52, 1));
    expect_end(&mut stream);
}

#[test]
fn the_host_may_stop_sending_and_go_on_receiving() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let mut stream = guest.connect(&listener, ports);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.data(10), b"last words");
    assert_eq!(guest.expect(op::SHUTDOWN, ports).flags, shutdown::SEND);
    guest.send(of(op::RW, ports), b"an answer");
    assert_eq!(read(&mut stream, 9), b"an answer");
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN, ports).flags, shutdown::BOTH);
    // What it does not know yet is no mistake.
    guest.send(of(op::RW, ports), b"too late");
    guest.send(of(op::RST, ports), &[]);
    guest.expect_silence();
    assert_eq!((guest.counter("conns_removed"), guest.counter("conns_killed")), (1, 0));
}

#[test]
fn the_host_may_stop_receiving_and_go_on_sending() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let mut stream = guest.connect(&listener, ports);
    stream.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(of(op::RW, ports), b"unheard");
    assert_eq!(guest.expect(op::SHUTDOWN, ports).flags, shutdown::RECEIVE);
    assert_eq!(guest.counter("tx_write_fails"), 1);
    stream.write_all(b"monologue").unwrap();
    assert_eq!(guest.data(9), b"monologue");
    guest.expect_silence();
}

#[test]
fn what_a_peer_said_before_it_vanished_arrives() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let mut stream = guest.connect(&listener, ports);
    let data = pattern(50_000, 3);
    stream.write_all(&data).unwrap();
    // It had not read this.
    guest.send(of(op::RW, ports), b"unread");
    drop(stream);
    let mut all = Vec::new();
    let flags = loop {
        let (header, data) = guest.packet();
        match header.op {
            op::RW => all.extend(data),
            op::SHUTDOWN if header.flags == shutdown::RECEIVE => {}
            op::SHUTDOWN => break header.flags,
            _ => panic!("{header:?}"),
        }
    };
    assert_eq!(flags, shutdown::BOTH);
    assert!(all == data);
}

#[test]
fn what_the_guest_said_before_it_closed_arrives() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    for (port, is_reset) in [(1, false), (2, true)] {
        let ports = (52, port);
        let mut stream = guest.connect(&listener, ports);
        let data = pattern(WINDOW as usize, port);
        for piece in data.chunks(64 << 10) {
            guest.send(of(op::RW, ports), piece);
        }
        if is_reset {
            guest.send(shut(shutdown::SEND, ports), &[]);
            guest.send(of(op::RST, ports), &[]);
            guest.settle();
            while guest.rx.used_idx() != guest.seen {
                assert_eq!(guest.packet().0.op, op::CREDIT_UPDATE);
            }
        } else {
            guest.send(shut(shutdown::BOTH, ports), &[]);
            // At once, however long the host takes.
            while guest.packet().0.op == op::CREDIT_UPDATE {}
        }
        let before = guest.counter("conns_removed");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == data);
        guest.settle();
        assert_eq!(guest.counter("conns_removed"), before.max(u64::from(port)));
    }
    // A reset alone is the end of everything.
    let mut stream = guest.connect(&listener, (52, 3));
    guest.send(of(op::RST, (52, 3)), &[]);
    expect_end(&mut stream);
}

#[test]
fn packets_that_make_no_sense_are_refused() {
    let mut guest = Guest::new();
    let (host, port) = (52, 1);
    let good = of(op::REQUEST, (host, port));
    let cases = [
        Header { src_cid: CID + 1, ..good },
        Header { src_cid: 0, ..good },
        Header { src_cid: CID | 1 << 32, ..good },
        Header { dst_cid: 1, ..good },
        Header { dst_cid: CID, ..good },
        Header { dst_cid: HOST | 1 << 32, ..good },
        Header { dst_cid: u64::MAX, ..good },
        Header { kind: 0, ..good },
        Header { kind: 2, ..good },
        Header { kind: u16::MAX, ..good },
        Header { op: 0, ..good },
        Header { op: 8, ..good },
        Header { op: u16::MAX, ..good },
        // Of no connection.
        of(op::RESPONSE, (host, port)),
        of(op::SHUTDOWN, (host, port)),
        of(op::CREDIT_UPDATE, (host, port)),
        of(op::CREDIT_REQUEST, (host, port)),
        of(op::RW, (host, port)),
    ];
    let _listener = guest.listen(host);
    for header in cases {
        guest.send(header, &[]);
        let (refusal, _) = guest.packet();
        let expected = Header { dst_cid: CID, ..header.refusal() };
        assert_eq!(refusal, expected, "{header:?}");
        // A reset is never answered, or two would go on for ever.
        guest.send(Header { op: op::RST, ..header }, &[]);
    }
    guest.expect_silence();
    assert_eq!(guest.counter("conns_added"), 0);
}

#[test]
fn packets_out_of_place_end_their_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let bad = [
        of(op::REQUEST, (52, 1)),
        of(op::RESPONSE, (52, 1)),
        of(0, (52, 1)),
        of(9, (52, 1)),
        Header { kind: 2, ..of(op::RW, (52, 1)) },
    ];
    for header in bad {
        let mut stream = guest.connect(&listener, (52, 1));
        guest.send(header, &[]);
        guest.expect(op::RST, (52, 1));
        expect_end(&mut stream);
    }
    // Before the guest has answered, it has nothing to say.
    for (n, op) in (0..).zip([op::RW, op::REQUEST, op::SHUTDOWN, op::CREDIT_REQUEST]) {
        let mut stream = guest.call("CONNECT 5\n");
        let ports = (FIRST_HOST_PORT + n, 5);
        guest.expect(op::REQUEST, ports);
        guest.send(of(op, ports), &[]);
        guest.expect(op::RST, ports);
        expect_end(&mut stream);
    }
    // Somebody else's packet does not end it.
    let mut stream = guest.connect(&listener, (52, 1));
    guest.send(Header { src_cid: CID + 1, ..of(op::RST, (52, 1)) }, &[]);
    guest.send(Header { src_cid: CID + 1, ..of(op::RW, (52, 1)) }, b"forged");
    guest.packet();
    guest.send(of(op::RW, (52, 1)), b"genuine");
    assert_eq!(read(&mut stream, 7), b"genuine");
}

#[test]
fn lengths_that_lie_end_their_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let ports = (52, 1);
    let beyond = HIGH.0 + HIGH.1;
    type Case = (u32, Vec<Buf>);
    let cases: Vec<Case> = vec![
        (1, vec![(TX, 44, false)]),
        (101, vec![(TX, 44, false), (TX + 64, 100, false)]),
        (u32::MAX, vec![(TX, 44, false), (TX + 64, 100, false)]),
        (100, vec![(TX, 44, false), (TX + 64, 100, true)]),
        (100, vec![(TX, 44, false), (beyond - 50, 100, false)]),
        (100, vec![(TX, 44, false), (LOW.0 + LOW.1, 100, false)]),
        (WINDOW + 1, vec![(TX, 44, false), (HIGH.0, WINDOW + 1, false)]),
    ];
    for (len, buffers) in cases {
        let mut stream = guest.connect(&listener, ports);
        guest.write_header(&Header { len, ..of(op::RW, ports) });
        guest.send_buffers(&buffers);
        guest.expect(op::RST, ports);
        expect_end(&mut stream);
    }
    // A packet that only carries data has a length.
    for op in [op::CREDIT_UPDATE, op::SHUTDOWN, op::CREDIT_REQUEST] {
        let mut stream = guest.connect(&listener, ports);
        guest.send(of(op, ports), b"why");
        guest.expect(op::RST, ports);
        expect_end(&mut stream);
    }
    // Headers that are none are nobody's.
    let before = guest.counter("tx_malformed_packets");
    let mut stream = guest.connect(&listener, ports);
    guest.write_header(&of(op::RST, ports));
    for buffers in [
        vec![(TX, 43, false)],
        vec![(TX, 0, false)],
        vec![(TX, 44, true)],
        vec![(beyond - 43, 44, false)],
        vec![(TX, 20, false), (TX + 20, 23, false)],
    ] {
        guest.send_buffers(&buffers);
    }
    assert_eq!(guest.counter("tx_malformed_packets"), before + 5);
    // In as many pieces as it likes, and with room to spare.
    guest.write_header(&Header { len: 7, ..of(op::RW, ports) });
    guest.m.mem.write_slice(b"partial, rest", GuestAddress(TX + 44)).unwrap();
    guest.send_buffers(&[
        (TX, 1, false),
        (TX + 1, 42, false),
        (TX + 43, 5, false),
        (TX + 48, 9, false),
    ]);
    assert_eq!(read(&mut stream, 7), b"partial");
}

#[test]
fn receive_buffers_that_will_not_do_come_back_empty() {
    let dir = TempDir::new();
    let mut guest = Guest::up(Machine::new(device(&dir)), dir);
    let listener = guest.listen(52);
    let bad = [(RX, 44, true), (RX, 0, true), (RX, 100, false), (HIGH.0 + HIGH.1 - 50, 100, true)];
    for buffer in bad {
        guest.rx.add(&[buffer]);
    }
    guest.m.kick(&guest.rx);
    guest.m.irq.wait("bad buffers", || guest.rx.used_idx() == 4);
    assert_eq!(guest.counter("rx_bad_buffers"), 4);
    guest.seen = 4;
    // Pieces of any size, bad ones in between.
    guest.send(of(op::REQUEST, (52, 1)), &[]);
    let mut stream = patient(listener.accept().unwrap().0);
    stream.write_all(b"abcdefgh").unwrap();
    let at = RX + 0x1000;
    guest.rx.add(&[(at, 43, true), (at + 0x100, 2, true)]);
    guest.rx.add(&[(RX, 10, true)]);
    guest.rx.add(&[(at + 0x200, 47, true)]);
    guest.rx.add(&[(at + 0x300, 20, true), (at + 0x400, 27, true), (at + 0x500, 100, true)]);
    guest.m.kick(&guest.rx);
    guest.m.irq.wait("packets", || guest.rx.used_idx() == 8);
    let lens = (4..8).map(|slot| guest.rx.used_entry(slot).1).collect::<Vec<_>>();
    assert_eq!(lens, [44, 0, 47, 44 + 5]);
    let mut data = [0; 3];
    guest.m.mem.read_slice(&mut data, GuestAddress(at + 0x200 + 44)).unwrap();
    assert_eq!(&data, b"abc");
    let mut data = [0; 5];
    guest.m.mem.read_slice(&mut data[..3], GuestAddress(at + 0x400 + 24)).unwrap();
    guest.m.mem.read_slice(&mut data[3..], GuestAddress(at + 0x500)).unwrap();
    assert_eq!(&data, b"defgh");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let dir = TempDir::new();
    let mut guest = Guest::up(Machine::new(device(&dir)), dir);
    // More requests than answers may wait.
    for n in 0..256 {
        guest.send(of(op::REQUEST, (52, n)), &[]);
    }
    guest.write_header(&of(op::REQUEST, (52, 256)));
    guest.tx.add(&[(TX, 44, false)]);
    guest.m.kick(&guest.tx);
    guest.settle();
    assert_eq!(guest.tx.used_idx(), 256, "listened to");
    guest.fill();
    for n in 0..=256 {
        guest.expect(op::RST, (52, n));
    }
    guest.m.irq.wait("the last request", || guest.tx.used_idx() == 257);
    assert!(guest.counter("no_rx_avail_buffer") > 0);
}

#[test]
fn a_busy_listener_is_asked_again() {
    let mut guest = Guest::new();
    let fd = |kind| {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap()
    };
    let listener: OwnedFd = fd(SocketType::STREAM);
    rustix::net::bind(&listener, &SocketAddrUnix::new(guest.dir.path("v.sock_52")).unwrap())
        .unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = UnixListener::from(listener);
    for port in 1..=4 {
        guest.send(of(op::REQUEST, (52, port)), &[]);
    }
    guest.expect(op::RESPONSE, (52, 1));
    guest.expect_silence();
    // A guest that loses patience may say so.
    guest.send(of(op::RST, (52, 3)), &[]);
    let mut streams = Vec::new();
    for port in [2, 4] {
        streams.push(patient(listener.accept().unwrap().0));
        guest.expect(op::RESPONSE, (52, port));
    }
    streams.push(patient(listener.accept().unwrap().0));
    for (stream, port) in streams.iter_mut().zip([1, 2, 4]) {
        guest.send(of(op::RW, (52, port)), b"hi");
        assert_eq!(read(stream, 2), b"hi");
    }
    // Nobody accepts: the guest hears so in the end.
    for port in 5..=6 {
        guest.send(of(op::REQUEST, (52, port)), &[]);
    }
    guest.expect(op::RESPONSE, (52, 5));
    let (header, _) = loop {
        let packet = guest.packet();
        if packet.0.op != op::SHUTDOWN {
            break packet;
        }
    };
    assert_eq!((header.op, header.dst_port), (op::RST, 6));
}

#[test]
fn a_thousand_streams_each_way() {
    allow_many_files();
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut streams = Vec::new();
    for n in 0..1000 {
        streams.push(((52, n), guest.connect(&listener, (52, n))));
        let stream = guest.call(&format!("CONNECT {n}\n"));
        let ports = (FIRST_HOST_PORT + n, n);
        guest.expect(op::REQUEST, ports);
        guest.send(of(op::RESPONSE, ports), &[]);
        streams.push((ports, stream));
    }
    for (ports, stream) in &mut streams {
        if ports.0 != 52 {
            assert_eq!(line(stream), format!("OK {}\n", ports.0));
        }
        guest.send(of(op::RW, *ports), &ports.1.to_le_bytes());
        stream.write_all(&ports.0.to_le_bytes()).unwrap();
    }
    let mut heard = std::collections::HashMap::new();
    while heard.len() < 2000 {
        let (header, data) = guest.packet();
        assert_eq!((header.op, data.len()), (op::RW, 4), "{header:?}");
        assert_eq!(data, header.src_port.to_le_bytes());
        assert!(heard.insert((header.src_port, header.dst_port), ()).is_none());
    }
    for (ports, stream) in &mut streams {
        assert_eq!(read(stream, 4), ports.1.to_le_bytes());
    }
    // There is room for some more, and no further.
    let left = u32::try_from(STREAMS_MAX).unwrap() - 2000;
    for n in 0..left {
        streams.push(((52, 0), guest.connect(&listener, (52, 5000 + n))));
    }
    guest.send(of(op::REQUEST, (52, 9999)), &[]);
    guest.expect(op::RST, (52, 9999));
    expect_end(&mut patient(UnixStream::connect(guest.dir.path("v.sock")).unwrap()));
    assert_eq!(guest.counter("conns_refused"), 2);
    // All go, and as many can come again.
    drop(streams);
    guest.send(of(op::RST, (52, 5000)), &[]);
    let mut gone = 1;
    while gone < STREAMS_MAX {
        let (header, _) = guest.packet();
        if header.op == op::SHUTDOWN && header.flags == shutdown::BOTH {
            guest.send(of(op::RST, (header.src_port, header.dst_port)), &[]);
            gone += 1;
        }
    }
    guest.settle();
    let connections = STREAMS_MAX as u64;
    assert_eq!(
        (guest.counter("conns_added"), guest.counter("conns_removed")),
        (connections, connections)
    );
    guest.connect(&listener, (52, 1));
}

/// As many descriptors as the host allows at all.
fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

#[test]
fn pause_and_resume_keep_connections() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut stream = guest.connect(&listener, (52, 1));
    for n in 0..20u8 {
        guest.m.transport.lock().unwrap().pause().unwrap();
        stream.write_all(&[n]).unwrap();
        assert_eq!(guest.rx.used_idx(), guest.seen);
        guest.m.transport.lock().unwrap().resume().unwrap();
        assert_eq!(guest.data(1), [n]);
        guest.send(of(op::RW, (52, 1)), &[n]);
        assert_eq!(read(&mut stream, 1), [n]);
    }
    // Who came meanwhile is let in.
    guest.m.transport.lock().unwrap().pause().unwrap();
    let _stream = guest.call("CONNECT 9\n");
    guest.m.transport.lock().unwrap().resume().unwrap();
    guest.expect(op::REQUEST, (FIRST_HOST_PORT, 9));
    assert_eq!(guest.events.used_idx(), 0);
}

#[test]
fn a_reset_ends_connections_and_keeps_the_socket() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut stream = guest.connect(&listener, (52, 1));
    guest.m.set(0x70, 0);
    // At once, not when the next driver comes.
    expect_end(&mut stream);
    assert_eq!(guest.counter("conns_removed"), 1);
    // Who comes in between is served by the next driver.
    let _waiting = guest.call("CONNECT 9\n");
    let Guest { m, dir, .. } = guest;
    let mut guest = Guest::up(m, dir);
    guest.fill();
    assert_eq!(guest.expect(op::REQUEST, (FIRST_HOST_PORT, 9)).fwd_cnt, 0);
    guest.connect(&listener, (52, 1));
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut stream = guest.connect(&listener, (52, 1));
    let caller = guest.call("CONNECT 9\n");
    guest.expect(op::REQUEST, (FIRST_HOST_PORT, 9));
    drop(caller);
    guest.expect(op::RST, (FIRST_HOST_PORT, 9));
    guest.m.transport.lock().unwrap().pause().unwrap();
    let saved = serde_json::to_string(&guest.m.transport.lock().unwrap().save()).unwrap();
    let saved: Saved = serde_json::from_str(&saved).unwrap();
    let Guest { m, dir, rx, tx, mut events, seen, sent } = guest;
    let mem = m.mem.clone();
    drop(m);
    assert!(!dir.path("v.sock").exists(), "its socket goes with it");
    expect_end(&mut stream);

    let m = Machine::with(device(&dir), mem, Some(&saved)).unwrap();
    m.transport.lock().unwrap().resume().unwrap();
    // A pause before it could hear of it does not change that.
    m.transport.lock().unwrap().pause().unwrap();
    m.transport.lock().unwrap().resume().unwrap();
    // Only when there is a buffer for it; one that will not do is none.
    events.add(&[(EVENTS, 3, true)]);
    m.mem.write_slice(&[0xff; 8], GuestAddress(EVENTS)).unwrap();
    events.add(&[(EVENTS, 8, true)]);
    events.add(&[(EVENTS + 8, 8, true)]);
    m.finish(&events, 2);
    assert_eq!((events.used_entry(0).1, events.used_entry(1).1), (0, 4));
    let mut event = [0; 8];
    m.mem.read_slice(&mut event, GuestAddress(EVENTS)).unwrap();
    assert_eq!(event, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);

    let mut guest = Guest { m, dir, rx, tx, events, seen, sent };
    // The old connection is unknown, new ones work, and host ports are not used again.
    guest.send(of(op::RW, (52, 1)), b"x");
    guest.expect(op::RST, (52, 1));
    let _stream = guest.connect(&listener, (52, 2));
    let _caller = guest.call("CONNECT 9\n");
    guest.expect(op::REQUEST, (FIRST_HOST_PORT + 1, 9));
    // Once: a pause is not a move.
    guest.settle();
    assert_eq!(guest.events.used_idx(), 2);
}

#[test]
fn random_packets_do_no_harm() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    listener.set_nonblocking(true).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    let mut streams = Vec::new();
    for round in 0..20_000 {
        let odd = |usual: u64, unusual: u64, dice: u64| if dice == 0 { unusual } else { usual };
        let noise = random(u64::MAX);
        let small = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
        let port = u32::try_from(random(6)).unwrap();
        let host_port = odd(52, u64::from(FIRST_HOST_PORT) + random(4), random(3));
        let len = random(300);
        let header = Header {
            src_cid: odd(CID, noise, random(40)),
            dst_cid: odd(HOST, noise, random(40)),
            src_port: port,
            dst_port: u32::try_from(host_port).unwrap(),
            len: small(odd(len, noise, random(40))),
            kind: u16::try_from(odd(1, noise & 0xffff, random(40))).unwrap(),
            op: u16::try_from(odd(1 + random(7), noise & 0xffff, random(40))).unwrap(),
            flags: small(odd(random(4), noise, random(8))),
            buf_alloc: small(odd(random(10_000), noise, random(4))),
            fwd_cnt: small(odd(random(10_000), noise, random(4))),
        };
        let has_data = header.op == op::RW || random(30) == 0;
        let header = Header { len: if has_data { header.len } else { 0 }, ..header };
        guest.write_header(&header);
        let data = (TX + 44, u32::try_from(odd(len, random(600), random(20))).unwrap(), false);
        let header = (TX, 44 - u32::from(random(100) == 0), random(200) == 0);
        guest.send_buffers(&[header, data]);
        while guest.rx.used_idx() != guest.seen {
            guest.packet();
        }
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true).unwrap();
            streams.push(stream);
        }
        match random(6) {
            0 if !streams.is_empty() => {
                let nth = usize::try_from(noise).unwrap() % streams.len();
                drop(streams.swap_remove(nth));
            }
            1 => streams.iter_mut().for_each(|stream| drop(stream.read(&mut [0; 1000]))),
            2 => streams.iter_mut().for_each(|stream| drop(stream.write(&[7; 500]))),
            3 if round % 10 == 0 => {
                let stream = guest.call(&format!("CONNECT {port}\n"));
                stream.set_nonblocking(true).unwrap();
                streams.push(stream);
            }
            4 if round % 50 == 0 => guest.settle(),
            _ => {}
        }
    }
    assert_eq!(guest.m.status() & NEEDS_RESET, 0);
    assert!(guest.counter("conns_added") > 500, "{}", guest.counter("conns_added"));
    // A new driver finds it as good as new.
    listener.set_nonblocking(false).unwrap();
    let Guest { m, dir, .. } = guest;
    m.set(0x70, 0);
    assert_eq!(m.counter("conns_added"), m.counter("conns_removed"));
    let mut guest = Guest::up(m, dir);
    guest.fill();
    let stream = guest.connect(&listener, (52, 77));
    drop(stream);
}

#[test]
fn refuses_addresses_and_paths_that_will_not_do() {
    let dir = TempDir::new();
    let path = dir.path("v.sock");
    for cid in [0u32, 1, 2, u32::MAX] {
        let text = refusal("vsock", &json!({"guest_cid": cid, "uds_path": path}));
        assert_eq!(text, format!("guest_cid: {cid} is not in 3 to 4294967294"));
    }
    std::fs::write(&path, "").unwrap();
    let text = refusal("vsock", &json!({"guest_cid": 3, "uds_path": path}));
    assert!(text.starts_with("uds_path: ") && text.contains("a regular file"), "{text}");
    let text = refusal("vsock", &json!({"guest_cid": 3, "uds_path": "x".repeat(200)}));
    assert!(text.starts_with("uds_path: ") && text.contains("limit is 107"), "{text}");
    let text = refusal("vsock", &json!({"guest_cid": 3, "uds_path": dir.path("none/v.sock")}));
    assert!(text.starts_with("uds_path: "), "{text}");
    let row = devices::virtio::model("vsock").unwrap();
    for bad in
        [r#"{"guest_cid": 3}"#, r#"{"uds_path": "x"}"#, r#"{"guest_cid": -3, "uds_path": "x"}"#]
    {
        assert!((row.parse)(bad.as_bytes()).is_err(), "{bad}");
    }
    let shown = |json: &str| (row.parse)(json.as_bytes()).unwrap().to_json();
    assert_eq!(
        shown(r#"{"guest_cid":3,"uds_path":"x"}"#),
        json!({"guest_cid": 3, "uds_path": "x"})
    );
    let with_id = r#"{"guest_cid":3,"uds_path":"x","vsock_id":"v"}"#;
    assert_eq!(shown(with_id)["vsock_id"], "v");
}

#[test]
fn shows_its_address() {
    let guest = Guest::new();
    assert_eq!((guest.m.get(8), guest.m.config(0, 9)), (19, vec![7, 0, 0, 0, 0, 0, 0, 0, 0]));
}
