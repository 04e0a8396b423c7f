//! Boots a guest once and gives every request a copy of it: a function runner in small.
//!
//! `cargo run --release --example function_runner KERNEL READY REQUEST...`: the guest says READY on its serial port when it
//! is prepared; then it is sent a REQUEST there, and its next line is the answer.
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use husk::{Overrides, SerialConfig, SerialTo, Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kernel), Some(ready)) = (arguments.next(), arguments.next()) else {
        return Err("want KERNEL READY REQUEST...".into());
    };
    let name = |name| std::env::temp_dir().join(format!("runner-{}-{name}", std::process::id()));

    let template_path = name("template");
    let mut config = VmConfig::new(kernel);
    config.machine.mem_size_mib = 64;
    // Its memory is frozen rather than copied.
    config.machine.forkable = true;
    config.serial = at(&template_path);
    let template = Vm::start(config)?;
    let mut serial = BufReader::new(UnixStream::connect(&template_path)?);
    while !line(&mut serial)?.contains(&ready) {}
    // A template that stands still is forked without anything being copied.
    template.pause()?;

    let path = name("request");
    for request in arguments {
        let overrides = Overrides { serial: Some(at(&path)), ..Overrides::default() };
        let vms = template.fork(1, vec![overrides])?;
        let mut serial = BufReader::new(UnixStream::connect(&path)?);
        serial.get_mut().write_all(request.as_bytes())?;
        println!("{request}: {}", line(&mut serial)?);
        // With the VM goes all that the request has left behind.
        drop(vms);
    }
    Ok(())
}

/// A serial port at a socket.
fn at(path: &Path) -> SerialConfig {
    SerialConfig { to: Some(SerialTo::Socket(path.into())), ..SerialConfig::default() }
}

fn line(serial: &mut impl BufRead) -> Result<String, Box<dyn Error>> {
    let mut line = String::new();
    match serial.read_line(&mut line)? {
        0 => Err("the guest has ended".into()),
        _ => Ok(line.trim_end().to_owned()),
    }
}
