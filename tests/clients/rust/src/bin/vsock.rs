//! `hyper-client-sockets`, by which SDKs reach servers in a guest, talks to one that echoes and says when it is done.
//!
//!     vsock SOCKET PORT
use std::error::Error;
use std::path::Path;

use hyper_client_sockets::Backend;
use hyper_client_sockets::tokio::TokioBackend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, port] = &arguments[..] else { return Err("want SOCKET PORT".into()) };
    let port = port.parse()?;
    let stream = TokioBackend::connect_to_firecracker_socket(Path::new(socket), port).await?;
    let mut stream = stream.into_inner();
    stream.write_all(b"hello").await?;
    stream.shutdown().await?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard).await?;
    println!("{heard}");
    Ok(())
}
