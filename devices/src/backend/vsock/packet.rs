//! Packet headers (virtio 1.2, 5.10.6), decoded and encoded. What they mean is the connection's.

/// The host's address (5.10.4).
pub const HOST_CID: u64 = 2;
/// Length of a header.
pub const HEADER_BYTES: u32 = 44;
/// The only type of socket offered: a stream of bytes (5.10.6.1).
pub const TYPE_STREAM: u16 = 1;

/// What a packet does (5.10.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants one.
    pub const RESPONSE: u16 = 2;
    /// Ends one, or refuses it.
    pub const RST: u16 = 3;
    /// Says that no more will be received or sent: [`super::shutdown`].
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Says how much room the sender has.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`] (5.10.6.5).
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr` (5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of [`op::SHUTDOWN`] only.
    pub flags: u32,
    /// The sender's buffer for this connection, in all.
    pub buf_alloc: u32,
    /// Bytes that have left it again, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes one.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES as usize]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes it.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES as usize] {
        let fields = [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES as usize];
        let from = fields.into_iter().flatten();
        bytes.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        bytes
    }

    /// What refuses this packet, or ends its connection.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Cuts off the first bytes; the lengths in this file add up.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, tail)) = rest.split_first_chunk() else { return [0; N] };
    *rest = tail;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes: [u8; 44] = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let header = Header::from_bytes(&bytes);
        let expected = Header {
            src_cid: 0x0706_0504_0302_0100,
            dst_cid: 0x0f0e_0d0c_0b0a_0908,
            src_port: 0x1312_1110,
            dst_port: 0x1716_1514,
            len: 0x1b1a_1918,
            kind: 0x1d1c,
            op: 0x1f1e,
            flags: 0x2322_2120,
            buf_alloc: 0x2726_2524,
            fwd_cnt: 0x2b2a_2928,
        };
        assert_eq!(header, expected);
        assert_eq!(header.to_bytes(), bytes);
    }
}
