//! The VM generation id (Microsoft, "Virtual Machine Generation ID", 2012), in a page of its own: 16
//! bytes that are other ones in every VM that a snapshot becomes.
//!
//! The page is a device, not RAM: so it is seen when the guest looks at it. Knows nothing of how the guest
//! is told to, nor where the page is.
use crate::bus::BusDeviceMut;

/// Bytes of the page.
pub const LEN: u64 = 0x1000;
/// Bytes of an id.
pub const ID_LEN: usize = 16;

/// The page.
#[derive(Debug)]
pub struct Generation {
    id: [u8; ID_LEN],
    was_read: bool,
}

impl Generation {
    /// A page with `id`, which the guest knows of if it `was_read` before.
    pub fn new(id: [u8; ID_LEN], was_read: bool) -> Self {
        Self { id, was_read }
    }

    /// Puts another id in its place.
    pub fn replace(&mut self, id: [u8; ID_LEN]) {
        self.id = id;
    }

    /// Whether the guest has looked at it: it has a driver then, which looks again when it is told to.
    pub fn was_read(&self) -> bool {
        self.was_read
    }

    /// Whether a read of the page at `offset` is the first of those that it takes to read the id.
    pub fn is_first(offset: u64) -> bool {
        offset == 0
    }
}

impl BusDeviceMut for Generation {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.was_read |= Self::is_first(offset);
        let at = usize::try_from(offset).unwrap_or(ID_LEN);
        let rest = self.id.get(at..).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_any_width_give_the_id_and_then_zeros() {
        let id = *b"0123456789abcdef";
        let mut page = Generation::new(id, false);
        for width in [1, 2, 4, 8] {
            let mut all = Vec::new();
            for offset in (0..24).step_by(width) {
                let mut data = vec![0xff; width];
                page.read(offset, &mut data);
                all.extend(data);
            }
            assert_eq!(all, [&id[..], &[0; 8]].concat());
        }
        let mut data = [0xff; 8];
        page.read(LEN - 8, &mut data);
        assert_eq!(data, [0; 8]);
        page.read(12, &mut data);
        assert_eq!(data, *b"cdef\0\0\0\0");
    }

    #[test]
    fn writes_change_nothing() {
        let mut page = Generation::new([7; ID_LEN], false);
        page.write(0, &[1; 8]);
        let mut data = [0; 8];
        page.read(8, &mut data);
        assert_eq!((data, page.was_read()), ([7; 8], false));
        page.replace([8; ID_LEN]);
        page.read(0, &mut data);
        assert_eq!((data, page.was_read()), ([8; 8], true));
    }
}
