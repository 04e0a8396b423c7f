//! The host's side of vsock: connections between ports of the guest and Unix sockets, in the protocol
//! of Firecracker.
//!
//! ```text
//!   host asks:   connect(uds_path) ──"CONNECT 52\n"──► [Muxer] ──REQUEST──► guest, port 52
//!                                  ◄─"OK 1073741824\n"─        ◄─RESPONSE─
//!   guest asks:  listener at uds_path_53 ◄──connect── [Muxer] ◄──REQUEST─── guest
//! ```
//! Speaks in packets; does not know rings, chains or guest memory.
mod clock;
mod connection;
mod credit;
mod muxer;
pub mod packet;
mod socket;

pub use self::muxer::{Muxer, MuxerError, Outgoing, STREAMS_MAX, Stream};
use crate::counters;

counters! {
    /// What is counted.
    pub struct Counters as "vsock" {
        /// Times the driver kicked the receive queue.
        rx_queue_event_count: Counter,
        /// Times the driver kicked the transmit queue.
        tx_queue_event_count: Counter,
        /// Packets with data that the guest received.
        rx_packets_count: Counter,
        /// Bytes that the guest received.
        rx_bytes_count: Counter,
        /// Packets with data that the guest sent.
        tx_packets_count: Counter,
        /// Bytes that the guest sent.
        tx_bytes_count: Counter,
        /// Connections that came to be.
        conns_added: Counter,
        /// Connections that were broken off: an unanswered request, or a guest that broke the rules.
        conns_killed: Counter,
        /// Connections that ended, whatever the reason.
        conns_removed: Counter,
        /// Connections refused for want of room, on either side.
        conns_refused: Counter,
        /// Packets refused: unknown, for nobody or broken.
        tx_malformed_packets: Counter,
        /// Receive or event buffers that came back empty: too short, or not in guest memory.
        rx_bad_buffers: Counter,
        /// Times there was something to receive and no buffer for it.
        no_rx_avail_buffer: Counter,
        /// Times a stream of the host could not be read, because its peer left what it was sent.
        rx_read_fails: Counter,
        /// Times a stream of the host did not take what the guest sent: its peer was gone.
        tx_write_fails: Counter,
        /// Times it did not take what had waited for it.
        tx_flush_fails: Counter,
        /// Times the host did not say which streams are ready.
        muxer_event_fails: Counter,
    }
}
