//! V17: packets that are none, lengths and credit that lie, and floods of connections.
use std::os::unix::net::UnixListener;

use devices::backend::vsock::STREAMS_MAX;
use devices::backend::vsock::packet::{HEADER_BYTES, Header, op, shutdown};

use crate::bench::{Bench, Case, Verdict};
use crate::driver::HIGH;
use crate::kinds::{CID, DATA, HEADER, Kind, NOBODY, vsock_request};

const RST: &[Verdict] = &[Verdict::Rst];
const USED0: &[Verdict] = &[Verdict::Used0];
const RX: usize = 0;
const TX: usize = 1;
/// A port of the host that somebody listens at.
const SOMEBODY: u32 = 5;
const PAYLOAD: u64 = HIGH.0 + 0x4_0000;
/// Where the receive buffers are, a page each.
const ROOM: u64 = DATA;
const BUFFERS: u16 = 12;
/// Rounds of floods.
const MANY: u32 = if cfg!(husk_asan) { 8_192 } else { 65_536 };
/// What the device may keep of a flood: less than 8 bytes of each packet.
const FLOOD_ALLOWANCE: usize = 512 << 10;

/// What is done to a packet that asks for a connection.
type Spoil = fn(&mut Header);

const SPOILT: [(&str, Spoil); 16] = [
    ("op_0", |h| h.op = 0),
    ("op_8", |h| h.op = 8),
    ("op_largest", |h| h.op = u16::MAX),
    ("op_response", |h| h.op = op::RESPONSE),
    ("op_rw_of_nobody", |h| h.op = op::RW),
    ("op_shutdown_of_nobody", |h| h.op = op::SHUTDOWN),
    ("op_credit_update_of_nobody", |h| h.op = op::CREDIT_UPDATE),
    ("op_credit_request_of_nobody", |h| h.op = op::CREDIT_REQUEST),
    ("type_0", |h| h.kind = 0),
    ("type_seqpacket", |h| h.kind = 2),
    ("type_largest", |h| h.kind = u16::MAX),
    ("to_the_hypervisor", |h| h.dst_cid = 0),
    ("to_itself", |h| h.dst_cid = CID),
    ("to_a_high_cid", |h| h.dst_cid = 2 | 1 << 32),
    ("from_another", |h| h.src_cid = CID + 1),
    ("from_a_high_cid", |h| h.src_cid = CID | 1 << 40),
];

/// What is done to a connection that is there.
const MISUSE: [(&str, Spoil); 9] = [
    ("a_second_request", |h| h.op = op::REQUEST),
    ("an_answer_nobody_asked_for", |h| h.op = op::RESPONSE),
    ("an_unknown_op", |h| h.op = 99),
    ("another_type", |h| h.kind = 2),
    ("len_without_payload", |h| (h.op, h.len) = (op::RW, 4096)),
    ("len_largest", |h| (h.op, h.len) = (op::RW, u32::MAX)),
    ("len_of_a_credit_update", |h| (h.op, h.len) = (op::CREDIT_UPDATE, 1)),
    ("len_of_a_shutdown", |h| (h.op, h.len, h.flags) = (op::SHUTDOWN, 7, 3)),
    ("shutdown_of_both", |h| (h.op, h.flags) = (op::SHUTDOWN, shutdown::BOTH)),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    if kind != Kind::Vsock {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for (what, spoil) in SPOILT {
        cases.push(Case::on_queue(kind, TX, format!("v17_{what}"), RST, move |b| {
            fill(b);
            let mut header = vsock_request(NOBODY);
            spoil(&mut header);
            put(b, &header, 0);
            answered(b, op::RST)
        }));
    }
    for (what, spoil) in MISUSE {
        cases.push(Case::on_queue(kind, TX, format!("v17_{what}"), RST, move |b| {
            let _listener = connected(b);
            let mut header = vsock_request(SOMEBODY);
            spoil(&mut header);
            put(b, &header, 0);
            answered(b, op::RST)
        }));
    }
    for len in [0, 1, 43] {
        let name = format!("v17_packet_of_{len}");
        cases.push(Case::on_queue(kind, TX, name, USED0, move |b| {
            let malformed = b.m.counter("tx_malformed_packets");
            let verdict = b.send(TX, &[(HEADER, len, false)]);
            b.settle();
            assert_eq!(b.m.counter("tx_malformed_packets"), malformed + 1);
            verdict
        }));
    }
    cases.push(Case::on_queue(kind, TX, "v17_rst_is_not_answered", USED0, |b| {
        fill(b);
        let header = Header { op: op::RST, ..vsock_request(NOBODY) };
        let verdict = put(b, &header, 0);
        b.settle();
        assert_eq!(b.ring(RX).used_idx(), 0);
        verdict
    }));
    cases.push(
        Case::on_queue(kind, TX, "v17_more_than_its_credit", RST, overflow).allowing(8 << 20),
    );
    cases.push(Case::on_queue(kind, TX, "v17_guest_without_room", USED0, |b| {
        // Buffers of nothing, and a count of what it took that cannot be: nothing comes.
        let _listener = connected(b);
        for fwd_cnt in [1, 1 << 31, u32::MAX] {
            let header =
                Header { op: op::CREDIT_UPDATE, buf_alloc: 0, fwd_cnt, ..vsock_request(SOMEBODY) };
            put(b, &header, 0);
        }
        b.settle();
        Verdict::Used0
    }));
    for (what, attack) in FLOODS {
        let case = Case::on_queue(kind, TX, format!("v17_{what}"), USED0, move |b| {
            attack(b);
            Verdict::Used0
        });
        let has_streams = what == "many_streams";
        let allowance = if has_streams { 4 << 20 } else { FLOOD_ALLOWANCE };
        cases.push(case.allowing(allowance).flooding());
    }
    cases
}

type Flood = fn(&mut Bench);

/// Many connections, in ways that make a device keep something of each.
const FLOODS: [(&str, Flood); 6] = [
    ("connects_to_nobody", |b| {
        // Answers that nobody takes are bounded: the guest is not listened to until it does.
        for port in 0..400 {
            offer(b, &Header { src_port: port, ..vsock_request(NOBODY) });
            if b.rings[TX].used_idx() != sent(b) {
                break;
            }
        }
        assert!(b.rings[TX].used_idx() < 400, "it listened to the last");
    }),
    ("connects_taken", |b| {
        // One port after the other, each answer taken.
        fill(b);
        for port in 0..MANY / 32 {
            put(b, &Header { src_port: port, ..vsock_request(NOBODY) }, 0);
            answered(b, op::RST);
        }
    }),
    ("many_streams", |b| {
        let listener = listen(b);
        fill(b);
        let refused = b.m.counter("conns_refused");
        let mut ends = Vec::new();
        for port in 0..64 {
            put(b, &Header { src_port: port, ..vsock_request(SOMEBODY) }, 0);
            answered(b, op::RESPONSE);
            ends.push(listener.accept().unwrap());
        }
        assert_eq!(b.m.counter("conns_refused"), refused);
        assert!(ends.len() < STREAMS_MAX);
    }),
    ("connects_and_leaves_without_taking_answers", |b| {
        // No receive buffers: what is for the guest waits. Each connection ends before it was heard of.
        let listener = listen(b);
        let request = vsock_request(SOMEBODY);
        let leave = Header { op: op::RST, ..request };
        for _ in 0..MANY / 8 {
            burst(b, &[request, leave].repeat(7));
            while listener.accept().is_ok() {}
        }
    }),
    ("waits_for_a_busy_listener_and_leaves", |b| {
        let _listener = listen(b);
        // Whoever asks when the backlog is full has to wait.
        for port in 0..200 {
            put(b, &Header { src_port: port, ..vsock_request(SOMEBODY) }, 0);
        }
        let request = Header { src_port: 7777, ..vsock_request(SOMEBODY) };
        let leave = Header { op: op::RST, ..request };
        for _ in 0..MANY / 8 {
            burst(b, &[request, leave].repeat(7));
        }
    }),
    ("credit_requests", |b| {
        let _listener = connected(b);
        let request = Header { op: op::CREDIT_REQUEST, ..vsock_request(SOMEBODY) };
        for _ in 0..MANY / 14 {
            burst(b, &[request; 14]);
        }
        b.settle();
    }),
];

/// Gives receive buffers.
fn fill(b: &mut Bench) {
    for i in 0..u64::from(BUFFERS) {
        b.ring(RX).add(&[(ROOM + i * 0x1000, 0x1000, true)]);
    }
    b.kick_and_settle(RX);
}

/// Sends a packet with `payload` bytes behind its header.
fn put(b: &mut Bench, header: &Header, payload: u32) -> Verdict {
    b.write(HEADER, &header.to_bytes());
    match payload {
        0 => b.send(TX, &[(HEADER, HEADER_BYTES, false)]),
        len => b.send(TX, &[(HEADER, HEADER_BYTES, false), (PAYLOAD, len, false)]),
    }
}

/// Sends packets without payload, as many as fit a ring, by one kick.
fn burst(b: &mut Bench, headers: &[Header]) {
    for (at, header) in (HEADER..).step_by(64).zip(headers) {
        b.write(at, &header.to_bytes());
        b.ring(TX).add(&[(at, HEADER_BYTES, false)]);
    }
    let all = sent(b);
    b.m.kick(&b.rings[TX]);
    b.m.irq.wait("packets to be taken", || b.rings[TX].used_idx() == all);
}

/// Offers one, and waits until the device has looked at it, whatever it made of it.
fn offer(b: &mut Bench, header: &Header) {
    b.write(HEADER, &header.to_bytes());
    b.ring(TX).add(&[(HEADER, HEADER_BYTES, false)]);
    b.kick_and_settle(TX);
}

/// Chains that were offered for transmission.
fn sent(b: &Bench) -> u16 {
    use vm_memory::Bytes;
    b.m.mem.read_obj(vm_memory::GuestAddress(b.rings[TX].avail + 2)).unwrap()
}

/// Waits for the next packet and gives its buffer back; it does this.
fn answered(b: &mut Bench, operation: u16) -> Verdict {
    let next = taken(b);
    b.m.irq.wait("an answer", || b.rings[RX].used_idx() != next);
    let (head, _) = b.ring(RX).used_entry(next);
    let bytes: [u8; 44] = b.read(ROOM + u64::from(head) * 0x1000);
    let header = Header::from_bytes(&bytes);
    assert_eq!(header.op, operation, "{header:?}");
    b.ring(RX).offer(u16::try_from(head).unwrap());
    b.m.kick(&b.rings[RX]);
    Verdict::Rst
}

/// Packets that were taken, each of whose buffers was given back.
fn taken(b: &Bench) -> u16 {
    use vm_memory::Bytes;
    let given: u16 = b.m.mem.read_obj(vm_memory::GuestAddress(b.rings[RX].avail + 2)).unwrap();
    given.wrapping_sub(BUFFERS)
}

fn listen(b: &Bench) -> UnixListener {
    let directory = b.directory.as_ref().unwrap();
    let path = directory.path(&format!("v.sock_{SOMEBODY}"));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// A connection that is granted, and that the host has yet to accept.
fn connected(b: &mut Bench) -> UnixListener {
    let listener = listen(b);
    fill(b);
    put(b, &vsock_request(SOMEBODY), 0);
    answered(b, op::RESPONSE);
    listener
}

/// Sends until the host's socket and the window are full, and on.
fn overflow(b: &mut Bench) -> Verdict {
    let listener = connected(b);
    let _end = listener.accept().unwrap();
    let header = Header { op: op::RW, len: 0x1_0000, ..vsock_request(SOMEBODY) };
    for _ in 0..1000 {
        put(b, &header, 0x1_0000);
        let next = taken(b);
        b.settle();
        if b.ring(RX).used_idx() == next {
            continue;
        }
        let (head, _) = b.ring(RX).used_entry(next);
        let bytes: [u8; 44] = b.read(ROOM + u64::from(head) * 0x1000);
        if Header::from_bytes(&bytes).op == op::RST {
            return Verdict::Rst;
        }
        b.ring(RX).offer(u16::try_from(head).unwrap());
        b.m.kick(&b.rings[RX]);
    }
    panic!("64 MB were taken by nobody");
}
