//! The REST API on a Unix socket: Firecracker's paths, fields and status codes, and more.
//!
//! ```text
//!  socket.rs        the API's socket: listening on it, connecting to it
//!  server.rs        the thread: accept, evict, shut down
//!  stream.rs        one connection: what it is doing and until when it may
//!  request_line.rs  HTTP/1.0 to HTTP/1.1
//!  http.rs          bytes to a question, the reply to bytes
//!  table.rs         THE TABLE: method and path to Request
//!  route.rs         what a row is, and which one a method and a path mean
//!  openapi.rs       the table as an OpenAPI document
//!  deprecated.rs    what clients should no longer send
//!  message.rs       the JSON of the fixed routes
//!  passed.rs        descriptors that come with requests
//!  counters.rs      how often each row was used
//!  chime.rs         how other threads wake the API's tasks
//!  client.rs        the other end, for `husk ctl`
//! ```
//!
//! Nothing here knows the VM: a request goes to the VMM thread through a [`crate::request::Handle`]
//! and comes back as JSON or as a refusal. The thread, and the tokio runtime on it, exist only while
//! there is a socket.

mod chime;
pub(crate) mod client;
mod counters;
mod deprecated;
mod hangups;
mod http;
pub(crate) mod message;
mod openapi;
mod passed;
mod request_line;
pub(crate) mod route;
mod server;
mod socket;
mod stream;
mod table;

pub(crate) use counters::RequestCounters;
pub(crate) use deprecated::{Deprecated, DeprecatedValue};
pub(crate) use route::{Id, Logged, Routes, Section};
#[cfg(fuzzing)]
pub(crate) use server::ByHand;
pub(crate) use server::{Options, Server};
pub(crate) use socket::bind;

#[cfg(test)]
mod tests;
