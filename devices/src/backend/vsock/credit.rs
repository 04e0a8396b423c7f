//! Credit (virtio 1.2, 5.10.6.3): each side says how large its buffer is and how much has left it
//! again, and the other sends no more than fits. All counts are modulo 2^32.

/// What the guest may send: our buffer for one connection.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded`, as the guest was last told.
    told: u32,
}

impl Window {
    pub(super) fn new(size: u32) -> Self {
        Self { size, received: 0, forwarded: 0, told: 0 }
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Counts `len` bytes from the guest; false if it had no credit for them.
    pub(super) fn receive(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = len <= self.size.saturating_sub(held);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// `len` bytes have left the buffer.
    pub(super) fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest may be waiting for news: as far as it knows, half of the buffer is full.
    pub(super) fn is_news_due(&self) -> bool {
        let in_flight = self.received.wrapping_sub(self.told);
        self.told != self.forwarded && in_flight >= self.size / 2
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is on its way.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.size, self.forwarded)
    }
}

/// What we may send: the guest's buffer, as it last said.
#[derive(Debug, Default)]
pub(super) struct Allowance {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

impl Allowance {
    /// Every packet of a connection says it anew.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        (self.buf_alloc, self.fwd_cnt) = (buf_alloc, fwd_cnt);
    }

    /// Bytes that may be sent now. A guest that claims to have forwarded what it never got has none.
    pub(super) fn left(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.sent.wrapping_sub(self.fwd_cnt))
    }

    pub(super) fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_fits_to_the_byte() {
        let mut window = Window::new(100);
        assert!(window.receive(60) && !window.receive(41) && window.receive(40));
        assert!(!window.receive(1) && window.receive(0));
        window.forward(30);
        assert!(!window.receive(31) && window.receive(30));
        assert_eq!(window.tell(), (100, 30));
    }

    #[test]
    fn tells_news_once_and_not_too_often() {
        let mut window = Window::new(100);
        assert!(window.receive(49));
        window.forward(49);
        assert!(!window.is_news_due());
        assert!(window.receive(1));
        assert!(window.is_news_due());
        window.tell();
        assert!(!window.is_news_due());
        assert!(window.receive(99) && !window.is_news_due(), "nothing has left: no news");
    }

    #[test]
    fn counts_wrap() {
        let mut window = Window::new(1 << 16);
        let mut allowance = Allowance::default();
        for _ in 0..0x1_8000 {
            assert!(window.receive(1 << 16));
            window.forward(1 << 16);
            allowance.send(1 << 16);
            let (buf_alloc, fwd_cnt) = window.tell();
            allowance.update(buf_alloc, fwd_cnt);
            assert_eq!(allowance.left(), 1 << 16);
        }
    }

    #[test]
    fn a_guest_that_lies_gets_nothing() {
        let mut allowance = Allowance::default();
        assert_eq!(allowance.left(), 0);
        allowance.update(1000, 0);
        allowance.send(400);
        assert_eq!(allowance.left(), 600);
        allowance.update(1000, 401);
        assert_eq!(allowance.left(), 0);
        allowance.update(300, 0);
        assert_eq!(allowance.left(), 0);
    }
}
