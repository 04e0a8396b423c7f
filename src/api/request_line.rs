//! Takes HTTP/1.0 for HTTP/1.1, in the first line of a request.
//!
//! Firecracker keeps the connection of a client that says HTTP/1.0, as if it had said 1.1, and there
//! are clients that count on it; hyper closes it, and has no option. So it gets to see 1.1. Of requests
//! that are pipelined only the first is looked at: nothing here knows where it ends.

const OLD: &[u8] = b" HTTP/1.0";
const NEW_MINOR: u8 = b'1';

/// How far a request's first line has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum RequestLine {
    /// Behind.
    #[default]
    Past,
    /// Empty lines may come before it.
    Ahead,
    /// In it, and in the version: so many bytes of [`OLD`] have come.
    Within(usize),
}

impl RequestLine {
    /// Takes note of bytes that have come, and changes the one that is too old.
    pub(super) fn pass(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *self = match (*self, *byte) {
                (Self::Past, _) => return,
                (Self::Ahead, b'\r' | b'\n') => Self::Ahead,
                (Self::Ahead, _) => Self::Within(0),
                (Self::Within(_), b'\n') => Self::Past,
                (Self::Within(matched), byte) if OLD.get(matched) == Some(&byte) => {
                    Self::Within(matched + 1)
                }
                (Self::Within(_), b' ') => Self::Within(1),
                (Self::Within(_), _) => Self::Within(0),
            };
            if *self == Self::Within(OLD.len()) {
                *byte = NEW_MINOR;
                *self = Self::Past;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(text: &str, piece: usize) -> String {
        let (mut bytes, mut line) = (text.as_bytes().to_vec(), RequestLine::Ahead);
        bytes.chunks_mut(piece).for_each(|bytes| line.pass(bytes));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn version_is_made_new_however_it_comes() {
        for piece in 1..20 {
            let text = "\r\n\r\nGET / HTTP/1.0\r\nA: b HTTP/1.0\r\n\r\n";
            let want = "\r\n\r\nGET / HTTP/1.1\r\nA: b HTTP/1.0\r\n\r\n";
            assert_eq!(passed(text, piece), want);
        }
        assert_eq!(passed("GET /  HTTP/1.0\r\n", 3), "GET /  HTTP/1.1\r\n");
    }

    #[test]
    fn nothing_else_is_touched() {
        for text in [
            "GET / HTTP/1.1\r\nA: b HTTP/1.0\r\n",
            "GET /HTTP/1.0 HTTP/1.1\r\n",
            "GET / HTTP/1\r\n HTTP/1.0\r\n",
            "GET / HTTP/2.0\r\n",
        ] {
            assert_eq!(passed(text, 5), text);
        }
    }
}
