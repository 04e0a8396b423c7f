//! Descriptors that clients pass with the bytes of their requests (SCM_RIGHTS): received, counted, given to the request
//! that they came with, closed if it does not want them. What they are open for is judged where a path would be opened.
//!
//! ```text
//!   recvmsg ──► Waiting, of a connection ──take──► Arrived, with the request ──answered──► closed, but for what is kept
//!                └ too many, out of turn: closed at once, and the next request is told
//! ```
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use devices::backend::passed::{Held, PASSED, named_places};
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde_json::Value;

use super::route::{Route, Routes};
use crate::arrived::{Arrived, Place, Room};

/// Most that one request may come with.
pub(super) const EACH_MAX: usize = 16;
/// Sections and fields in which clients may say what they like.
const FREE: [&str; 2] = ["mmds", "payload"];

/// Why descriptors that came, or were to come, do not fit their request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PassedError {
    #[error("More than {EACH_MAX} descriptors came with the request; they are closed.")]
    TooMany,
    #[error(
        "There is no room for the descriptors that came with the request: husk has as many open as it may, or other \
         requests have; they are closed."
    )]
    NoRoom,
    #[error(
        "Descriptors came at a time when there was no request; they are closed. Send them with bytes of the request, \
         after the answer to the one before."
    )]
    OutOfTurn,
    #[error("{count} descriptors came with the request, and {method} {path} takes none.")]
    NotTaken { count: usize, method: &'static str, path: String },
    #[error("A descriptor came with the request that nothing in it names: {PASSED}{0}.")]
    Unnamed(usize),
    #[error(
        "{field}: only a path will do, no descriptor; {PASSED}N can be the value of: {fields}."
    )]
    Field { field: String, fields: String },
}

/// What has come on a connection for the request that is coming.
#[derive(Debug)]
pub(super) struct Waiting {
    room: Room,
    fds: Vec<(OwnedFd, Place)>,
    wrong: Option<PassedError>,
}

impl Waiting {
    pub(super) fn new(room: Room) -> Self {
        Self { room, fds: Vec::new(), wrong: None }
    }

    /// Takes what came. All of it is closed once something is wrong with it.
    pub(super) fn add(&mut self, received: Vec<OwnedFd>, is_cut: bool) {
        let is_too_many = self.fds.len().saturating_add(received.len()) > EACH_MAX
            || is_cut && received.len() >= EACH_MAX;
        if is_too_many {
            return self.refuse(PassedError::TooMany);
        }
        // The kernel gives up on the rest when a process has as many as it may.
        if is_cut {
            return self.refuse(PassedError::NoRoom);
        }
        if self.wrong.is_some() {
            return;
        }
        for fd in received {
            match self.room.take() {
                Some(place) => self.fds.push((fd, place)),
                None => return self.refuse(PassedError::NoRoom),
            }
        }
    }

    /// Closes what is there, and tells the next request why.
    pub(super) fn refuse(&mut self, why: PassedError) {
        self.fds = Vec::new();
        self.wrong = Some(why);
    }

    /// What came with the request that is there.
    pub(super) fn take(&mut self) -> Result<Arrived, PassedError> {
        let fds = std::mem::take(&mut self.fds);
        match self.wrong.take() {
            Some(why) => Err(why),
            None if fds.is_empty() => Ok(Arrived::default()),
            None => {
                let (held, places): (Vec<_>, _) =
                    fds.into_iter().map(|(fd, place)| (Held::new(fd), place)).unzip();
                Ok(Arrived::new(held, places))
            }
        }
    }
}

/// What one call has received.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: usize,
    pub(super) fds: Vec<OwnedFd>,
    /// Whether there were more.
    pub(super) is_cut: bool,
}

/// Receives bytes, and descriptors with them: those of one sendmsg(2) at most, as the kernel has it.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(EACH_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(all) = message {
            fds.extend(all);
        }
    }
    Ok(Received { bytes: got.bytes, fds, is_cut: got.flags.contains(ReturnFlags::CTRUNC) })
}

/// Refuses descriptors that the request does not take or does not name, and names where a path must be.
pub(super) fn check(
    routes: &Routes,
    route: &Route,
    body: &[u8],
    count: usize,
) -> Result<(), PassedError> {
    let fields = routes.openable(route);
    if count > 0 && fields.is_empty() {
        let (method, path) = (route.method.name(), route.path.to_string());
        return Err(PassedError::NotTaken { count, method, path });
    }
    let is_free = FREE.iter().any(|free| route.path.trim_start_matches('/') == *free);
    if count == 0 && (is_free || !contains(body, PASSED.as_bytes())) {
        return Ok(());
    }
    // What is no JSON is refused by whoever reads it.
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return Ok(()) };
    check_fields(&body, &fields)?;
    let named = named_places(&without_free(body));
    match (0..count).find(|place| !named.contains(place)) {
        Some(place) => Err(PassedError::Unnamed(place)),
        None => Ok(()),
    }
}

fn contains(bytes: &[u8], words: &[u8]) -> bool {
    bytes.windows(words.len()).any(|window| window == words)
}

fn without_free(mut json: Value) -> Value {
    if let Some(fields) = json.as_object_mut() {
        fields.retain(|field, _| !FREE.contains(&field.as_str()));
        fields.values_mut().for_each(|value| *value = without_free(value.take()));
    }
    json
}

/// Refuses a descriptor as the value of a field that is not among those that may be.
fn check_fields(json: &Value, fields: &[&str]) -> Result<(), PassedError> {
    match json {
        Value::Array(all) => all.iter().try_for_each(|value| check_fields(value, fields)),
        Value::Object(all) => all
            .iter()
            .filter(|(field, _)| !FREE.contains(&field.as_str()))
            .try_for_each(|(field, value)| match value.as_str() {
                Some(text) if text.starts_with(PASSED) && !fields.contains(&field.as_str()) => {
                    let fields = match fields {
                        [] => "nothing here".to_owned(),
                        fields => fields.join(", "),
                    };
                    Err(PassedError::Field { field: field.clone(), fields })
                }
                _ => check_fields(value, fields),
            }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use serde_json::json;

    use super::*;
    use crate::config;

    fn nulls(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn there_is_room_for_so_many_and_again_when_they_are_gone() {
        let room = Room::of(Some(24));
        let [mut one, mut two] = [(); 2].map(|()| Waiting::new(room.clone()));
        one.add(nulls(2), false);
        two.add(nulls(2), false);
        assert_eq!(two.take().unwrap_err(), PassedError::NoRoom);
        // What was there of them is closed, and has left its place.
        two.add(nulls(1), false);
        let (of_one, of_two) = (one.take().unwrap(), two.take().unwrap());
        assert_eq!((of_one.held().len(), of_two.held().len()), (2, 1));
        one.add(nulls(1), false);
        assert!(one.take().is_err());
        // Whatever is kept of a request that was answered is the VM's.
        let kept = of_one.held().clone();
        drop(of_one);
        two.add(nulls(2), false);
        assert_eq!(two.take().unwrap().held().len(), 2);
        assert_eq!(kept.len(), 2);
    }

    #[test]
    fn what_is_too_many_is_told_of_once() {
        let mut waiting = Waiting::new(Room::of(None));
        for (parts, wrong) in [
            (&[(16, false)][..], None),
            (&[(8, false), (8, false)], None),
            (&[(8, false), (9, false)], Some(PassedError::TooMany)),
            (&[(16, true)], Some(PassedError::TooMany)),
            (&[(3, true)], Some(PassedError::NoRoom)),
            (&[(17, false), (1, false)], Some(PassedError::TooMany)),
        ] {
            for &(count, is_cut) in parts {
                waiting.add(nulls(count), is_cut);
            }
            assert_eq!(waiting.take().err(), wrong, "{parts:?}");
            assert_eq!(waiting.take().unwrap().held().len(), 0);
        }
    }

    #[test]
    fn the_kernel_closes_what_there_is_no_room_to_receive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for count in [0, 1, EACH_MAX, 40] {
            let fds = nulls(count);
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(40))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(&theirs, &[IoSlice::new(b"xy")], &mut control, SendFlags::empty()).unwrap();
            let got = receive(&ours, &mut [0; 8]).unwrap();
            assert_eq!((got.bytes, got.is_cut), (2, count > EACH_MAX));
            // One or two more fit into what the buffer has for its alignment.
            let most = if got.is_cut { EACH_MAX + 2 } else { count };
            assert!((count.min(EACH_MAX)..=most).contains(&got.fds.len()), "{}", got.fds.len());
            for fd in got.fds {
                let flags = rustix::io::fcntl_getfd(&fd).unwrap();
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            }
        }
    }

    #[test]
    fn every_section_says_what_it_opens() {
        let routes = Routes::new(config::sections().collect());
        let judged = |method: &str, path: &str, body: &Value, count| {
            let (route, _) = routes.find(method, path).unwrap();
            check(&routes, route, body.to_string().as_bytes(), count).err().map(|e| e.to_string())
        };
        let body = json!({"path_on_host": "passed:0"});
        for (method, path, body) in [
            ("PUT", "/drives/a", &body),
            ("PATCH", "/drives/a", &body),
            ("PUT", "/pmem/a", &body),
            ("PUT", "/network-interfaces/a", &json!({"host_dev_name": "passed:0"})),
            ("PUT", "/boot-source", &json!({"initrd_path": "passed:0"})),
            ("PUT", "/vm", &json!({"boot-source": {"kernel_image_path": "passed:0"}})),
            ("PUT", "/snapshot/load", &json!({"mem_backend": {"backend_path": "passed:0"}})),
            ("PUT", "/snapshot/load", &json!({"overrides": {"drives": [body]}})),
        ] {
            assert_eq!(judged(method, path, body, 1), None, "{method} {path}");
        }
        let said = judged("PUT", "/vm", &json!({"payload": {"x": "passed:0"}}), 1).unwrap();
        assert!(said.contains("nothing in it names: passed:0"), "{said}");
        let said =
            judged("PUT", "/vm", &json!({"serial": {"to": {"File": "passed:0"}}}), 1).unwrap();
        assert!(said.starts_with("File: only a path will do"), "{said}");
        for path in ["/payload", "/mmds"] {
            assert_eq!(judged("PUT", path, &json!({"x": "passed:0"}), 0), None);
        }
        let said = judged("PUT", "/payload", &json!({"x": "passed:0"}), 1).unwrap();
        assert!(said.ends_with("PUT /payload takes none."), "{said}");
    }
}
