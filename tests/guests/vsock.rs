//! Talks to the host over virtio-vsock. `mode=up` connects to `port=` of the host and sends `bytes=`, then ends its side and
//! waits for the host's end; `mode=down` receives until the host's end, and with `reboot` resets the machine when the host
//! says "reboot!!". Both print `bytes=`, `sum=` (of 64-bit words, each
//! turned by its place) and `us=`. `mode=many` has `streams=` connections to `port=` and accepts as many on its own port
//! 1000, all open at once; over each it says its own port, wants it back, and ends it.
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer, Device, Queue};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, power, println};

rt::entry!(run);

const RX: u16 = 0;
const TX: u16 = 1;
const EVENTS: u16 = 2;

const HEADER: usize = 44;
const DATA: usize = 64 << 10;
/// The largest packet; each slot begins on a page, and its data behind the header.
const SLOT: usize = DATA + 4096;
const SLOTS: u16 = 32;
/// What the host may send to one connection without hearing of it.
const ROOM: u32 = 1 << 20;

const HOST: u64 = 2;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const SHUT_SEND: u32 = 2;
const SHUT_BOTH: u32 = 3;

/// Connections are told apart by the guest's port, or by the host's if the host has asked.
const FIRST_PORT: u32 = 1 << 20;
const LISTEN_PORT: u32 = 1000;
const FIRST_HOST_PORT: u32 = 1 << 30;
const TIMEOUT_US: u64 = 60_000_000;

#[derive(Clone, Copy)]
struct Header {
    src_port: u32,
    dst_port: u32,
    len: u32,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// One connection.
#[derive(Clone, Copy)]
struct Connection {
    host: u32,
    guest: u32,
    is_open: bool,
    has_ended: bool,
    sent: u32,
    received: u32,
    told: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

struct Vsock {
    cid: u64,
    rx: Queue,
    tx: Queue,
    pool: &'static mut [u8],
    out: &'static mut [u8],
    free: [u16; SLOTS as usize],
    free_count: usize,
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let device = virtio::find(boot.cmdline, virtio::ID_VSOCK, 0)?;
    let mut vsock = Vsock::open(device)?;
    println!("cid={}", vsock.cid);
    let port = number("port", 5000) as u32;
    match options::value(boot.cmdline, "mode").unwrap_or("up") {
        "up" => up(&mut vsock, port, number("bytes", 1 << 20)),
        "down" => down(&mut vsock, port, options::has(boot.cmdline, "reboot")),
        "many" => many(&mut vsock, port, number("streams", 1000) as u32),
        mode => fail!("mode={mode} is unknown"),
    }
}

fn up(vsock: &mut Vsock, port: u32, bytes: u64) -> Outcome {
    let mut connection = connect(vsock, port)?;
    let begin = clock::now_us();
    let (mut sent, mut sum, mut turns) = (0, Sum::default(), Turns::new());
    while sent < bytes {
        while let Some((head, header)) = vsock.poll()? {
            connection.note(&header);
            vsock.recycle(head);
            ensure!(header.op == CREDIT_UPDATE, "op {} while sending", header.op);
        }
        let len = (bytes - sent).min(u64::from(connection.credit())).min(DATA as u64) as usize;
        let Some(slot) = (if len > 0 { vsock.slot() } else { None }) else {
            turns.next()?;
            continue;
        };
        let data = vsock.data(slot, len);
        fill(data, sent);
        sum.add(data);
        vsock.send(slot, &mut connection, RW, 0, len);
        sent += len as u64;
        turns = Turns::new();
    }
    vsock.tell(&mut connection, SHUTDOWN, SHUT_SEND)?;
    // The host ends its side when it has read everything.
    while !connection.has_ended {
        let (head, header) = vsock.wait()?;
        connection.note(&header);
        vsock.recycle(head);
    }
    report(sent, sum, begin);
    close(vsock, &mut connection)
}

fn down(vsock: &mut Vsock, port: u32, reboots: bool) -> Outcome {
    let mut connection = connect(vsock, port)?;
    let begin = clock::now_us();
    let (mut received, mut sum) = (0, Sum::default());
    while !connection.has_ended {
        let (head, header) = vsock.wait()?;
        connection.note(&header);
        if header.op == RW {
            let data = vsock.received(head, header.len);
            if reboots && data == b"reboot!!" {
                power::reboot();
            }
            sum.add(data);
            received += u64::from(header.len);
        }
        vsock.recycle(head);
        if connection.received.wrapping_sub(connection.told) >= ROOM / 2
            || header.op == CREDIT_REQUEST
        {
            vsock.tell(&mut connection, CREDIT_UPDATE, 0)?;
        }
    }
    report(received, sum, begin);
    close(vsock, &mut connection)
}

fn many(vsock: &mut Vsock, port: u32, streams: u32) -> Outcome {
    let count = streams as usize;
    let none = Connection::new(0, 0);
    let bytes = memory::allocate(2 * count * size_of::<Connection>());
    // SAFETY: fresh memory, page-aligned, large enough; written before it is read.
    let all = unsafe {
        let first = bytes.as_mut_ptr().cast::<Connection>();
        (0..2 * count).for_each(|i| first.add(i).write(none));
        core::slice::from_raw_parts_mut(first, 2 * count)
    };
    for (i, connection) in (0..streams).zip(&mut *all) {
        *connection = Connection::new(port, FIRST_PORT + i);
        vsock.tell(connection, REQUEST, 0)?;
    }
    println!("ready");
    let (mut open, mut heard, mut gone) = (0, 0, 0);
    let mut leaving = 0;
    while gone < 2 * count {
        let (head, header) = vsock.wait()?;
        let index = match header.dst_port {
            LISTEN_PORT => (header.src_port - FIRST_HOST_PORT) as usize + count,
            port => (port - FIRST_PORT) as usize,
        };
        ensure!(index < 2 * count, "a packet for connection {index}");
        let connection = &mut all[index];
        match header.op {
            REQUEST => {
                *connection = Connection::new(header.src_port, LISTEN_PORT);
                connection.note(&header);
                vsock.tell(connection, RESPONSE, 0)?;
                open += 1;
            }
            RESPONSE => {
                connection.note(&header);
                open += 1;
            }
            RW => {
                connection.note(&header);
                let said = vsock.received(head, header.len);
                ensure!(
                    said == connection.name().to_le_bytes(),
                    "connection {index} hears {said:?}"
                );
                heard += 1;
            }
            RST => {
                ensure!(connection.is_open, "connection {index} was refused");
                connection.is_open = false;
                gone += 1;
            }
            _ => connection.note(&header),
        }
        vsock.recycle(head);
        // Not before all are there does anybody speak; not before all were heard does anybody go.
        if open == 2 * count {
            open = 0;
            println!("open={}", 2 * count);
            for connection in &mut *all {
                let slot = vsock.wait_for_slot()?;
                let name = connection.name().to_le_bytes();
                vsock.data(slot, 4).copy_from_slice(&name);
                vsock.send(slot, connection, RW, 0, 4);
            }
        }
        if heard == 2 * count {
            // A few at a time: who takes no answers is not listened to.
            while leaving < (gone + 16).min(2 * count) {
                vsock.tell(&mut all[leaving], SHUTDOWN, SHUT_BOTH)?;
                leaving += 1;
            }
        }
    }
    println!("gone={gone}");
    Ok(())
}

fn connect(vsock: &mut Vsock, port: u32) -> Result<Connection, Failure> {
    let mut connection = Connection::new(port, FIRST_PORT);
    vsock.tell(&mut connection, REQUEST, 0)?;
    let (head, header) = vsock.wait()?;
    connection.note(&header);
    vsock.recycle(head);
    ensure!(header.op == RESPONSE, "port {port} answers {}", header.op);
    Ok(connection)
}

/// Ends both sides, which the host confirms.
fn close(vsock: &mut Vsock, connection: &mut Connection) -> Outcome {
    vsock.tell(connection, SHUTDOWN, SHUT_BOTH)?;
    loop {
        let (head, header) = vsock.wait()?;
        vsock.recycle(head);
        if header.op == RST {
            return Ok(());
        }
    }
}

fn report(bytes: u64, sum: Sum, begin: u64) {
    let us = (clock::now_us() - begin).max(1);
    println!("bytes={bytes}");
    println!("sum={:016x}", sum.value());
    println!("us={us} mb_s={}", bytes / us);
}

/// Bytes that say where they are: the 64-bit word at `at` is a multiple of its number.
fn fill(data: &mut [u8], at: u64) {
    let mut words = data.chunks_exact_mut(8);
    for (i, word) in (at / 8..).zip(&mut words) {
        word.copy_from_slice(&i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    words.into_remainder().fill(0x5a);
}

/// A checksum that notices bytes that are lost, doubled or moved, however they are cut into packets.
#[derive(Clone, Copy, Default)]
struct Sum {
    state: u64,
    word: u64,
    bytes: u32,
}

impl Sum {
    fn add(&mut self, data: &[u8]) {
        let mut rest = data;
        while self.bytes != 0 && !rest.is_empty() {
            self.byte(rest[0]);
            rest = &rest[1..];
        }
        let mut words = rest.chunks_exact(8);
        for word in &mut words {
            self.word(u64::from_le_bytes(word.try_into().unwrap()));
        }
        words.remainder().iter().for_each(|byte| self.byte(*byte));
    }

    fn byte(&mut self, byte: u8) {
        self.word |= u64::from(byte) << (8 * self.bytes);
        self.bytes += 1;
        if self.bytes == 8 {
            let word = self.word;
            (self.word, self.bytes) = (0, 0);
            self.word(word);
        }
    }

    fn word(&mut self, word: u64) {
        self.state = (self.state.rotate_left(5) ^ word).wrapping_mul(0x0100_0000_01b3);
    }

    fn value(mut self) -> u64 {
        while self.bytes != 0 {
            self.byte(0);
        }
        self.state
    }
}

impl Connection {
    fn new(host: u32, guest: u32) -> Self {
        Self {
            host,
            guest,
            is_open: true,
            has_ended: false,
            sent: 0,
            received: 0,
            told: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The port that no other connection has.
    fn name(&self) -> u32 {
        if self.guest == LISTEN_PORT { self.host } else { self.guest }
    }

    fn credit(&self) -> u32 {
        self.buf_alloc - self.sent.wrapping_sub(self.fwd_cnt)
    }

    fn note(&mut self, header: &Header) {
        (self.buf_alloc, self.fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
        match header.op {
            RW => self.received = self.received.wrapping_add(header.len),
            SHUTDOWN => self.has_ended |= header.flags & SHUT_SEND != 0,
            RST => self.has_ended = true,
            _ => {}
        }
    }
}

impl Vsock {
    fn open(device: Device) -> Result<Self, Failure> {
        device.negotiate(0)?;
        let cid = device.config64(0);
        let mut rx = device.queue(RX, SLOTS)?;
        let tx = device.queue(TX, SLOTS)?;
        device.queue(EVENTS, 16)?;
        let pool = memory::allocate(SLOT * usize::from(SLOTS));
        let out = memory::allocate(SLOT * usize::from(SLOTS));
        for (i, slot) in (0..).zip(pool.chunks_mut(SLOT)) {
            rx.chain(i, &[Buffer::writable(&mut slot[..HEADER + DATA])]);
            rx.offer(i);
        }
        device.start()?;
        rx.kick();
        let free = core::array::from_fn(|i| i as u16);
        Ok(Self { cid, rx, tx, pool, out, free, free_count: usize::from(SLOTS) })
    }

    /// A free slot to send from.
    fn slot(&mut self) -> Option<u16> {
        while let Some((head, _)) = self.tx.poll() {
            self.free[self.free_count] = head;
            self.free_count += 1;
        }
        self.free_count = self.free_count.checked_sub(1)?;
        Some(self.free[self.free_count])
    }

    fn wait_for_slot(&mut self) -> Result<u16, Failure> {
        let mut turns = Turns::new();
        loop {
            if let Some(slot) = self.slot() {
                return Ok(slot);
            }
            turns.next()?;
        }
    }

    fn data(&mut self, slot: u16, len: usize) -> &mut [u8] {
        &mut self.out[usize::from(slot) * SLOT + HEADER..][..len]
    }

    /// Sends what is in `slot`.
    fn send(&mut self, slot: u16, to: &mut Connection, op: u16, flags: u32, len: usize) {
        to.sent = to.sent.wrapping_add(len as u32);
        to.told = to.received;
        let packet = &mut self.out[usize::from(slot) * SLOT..][..HEADER + len];
        packet[..8].copy_from_slice(&self.cid.to_le_bytes());
        packet[8..16].copy_from_slice(&HOST.to_le_bytes());
        let words =
            [to.guest, to.host, len as u32, 1 | u32::from(op) << 16, flags, ROOM, to.received];
        for (place, word) in packet[16..HEADER].chunks_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.tx.chain(slot, &[Buffer::readable(packet)]);
        self.tx.offer(slot);
        self.tx.kick();
    }

    /// Sends a packet without data.
    fn tell(&mut self, to: &mut Connection, op: u16, flags: u32) -> Outcome {
        let slot = self.wait_for_slot()?;
        self.send(slot, to, op, flags, 0);
        Ok(())
    }

    /// The next packet, if there is one.
    fn poll(&mut self) -> Result<Option<(u16, Header)>, Failure> {
        let Some((head, len)) = self.rx.poll() else { return Ok(None) };
        ensure!(head < SLOTS && len as usize >= HEADER, "used {head}, {len} bytes");
        let bytes = &self.pool[usize::from(head) * SLOT..][..HEADER];
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let dst_cid = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        ensure!(dst_cid == self.cid && word(0) == 2 && word(28) & 0xffff == 1, "not for us");
        let header = Header {
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        };
        ensure!(len as usize == HEADER + header.len as usize, "{len} bytes for {}", header.len);
        Ok(Some((head, header)))
    }

    fn wait(&mut self) -> Result<(u16, Header), Failure> {
        let mut turns = Turns::new();
        loop {
            if let Some(packet) = self.poll()? {
                return Ok(packet);
            }
            turns.next()?;
        }
    }

    fn received(&self, head: u16, len: u32) -> &[u8] {
        &self.pool[usize::from(head) * SLOT + HEADER..][..len as usize]
    }

    /// Gives a receive buffer back.
    fn recycle(&mut self, head: u16) {
        self.rx.offer(head);
        self.rx.kick();
    }
}

/// Waits in vain only so long. The clock is looked at now and then.
struct Turns {
    count: u32,
    end: u64,
}

impl Turns {
    fn new() -> Self {
        Self { count: 0, end: 0 }
    }

    fn next(&mut self) -> Outcome {
        core::hint::spin_loop();
        self.count += 1;
        if self.count & 0xffff == 0 {
            let now = clock::now_us();
            if self.end == 0 {
                self.end = now + TIMEOUT_US;
            }
            ensure!(now < self.end, "nothing has come for {TIMEOUT_US} us");
        }
        Ok(())
    }
}
