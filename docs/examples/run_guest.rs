//! Runs two guests side by side from a Rust program: what a function runner would do.
//!
//! `cargo run --release --example run_guest [KERNEL]`; without a kernel, the guest built into husk.
use husk::{DEMO_GUEST, Request, SerialTo, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernel = std::env::args().nth(1).unwrap_or_else(|| DEMO_GUEST.into());
    let mut running = Vec::new();
    for name in ["first", "second"] {
        let mut config = VmConfig::new(&kernel);
        config.machine.vcpu_count = 2;
        config.machine.mem_size_mib = 64;
        config.serial.to = Some(SerialTo::File(std::env::temp_dir().join(format!("{name}.log"))));

        // Prepared first and started then, so that no event is missed.
        let vm = Vm::prepare(config)?;
        let events = vm.events()?;
        vm.handle().call(Request::Start)?;
        running.push((name, vm, events));
    }
    for (name, vm, events) in running {
        let ending = vm.wait()?;
        for event in events {
            println!("{name}: {:>6} us  {:?}", event.time_us, event.what);
        }
        println!("{name}: {ending}");
    }
    Ok(())
}
