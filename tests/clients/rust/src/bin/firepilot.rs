//! `firepilot` makes, uses and ends a microVM, as its examples do it.
//!
//!     firepilot FIRECRACKER DIRECTORY KERNEL DISK
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use firepilot::builder::drive::DriveBuilder;
use firepilot::builder::executor::FirecrackerExecutorBuilder;
use firepilot::builder::kernel::KernelBuilder;
use firepilot::builder::network_interface::NetworkInterfaceBuilder;
use firepilot::builder::{Builder, Configuration};
use firepilot::machine::Machine;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [firecracker, directory, kernel, disk] = &arguments[..] else {
        return Err("want FIRECRACKER DIRECTORY KERNEL DISK".into());
    };
    let kernel = KernelBuilder::new()
        .with_kernel_image_path(kernel.clone())
        .with_boot_args("echoes=1000000 timeout_ms=600000".into())
        .try_build()
        .expect("a kernel");
    let drive = DriveBuilder::new()
        .with_drive_id("rootfs".into())
        .with_path_on_host(disk.into())
        .as_read_only()
        .as_root_device()
        .try_build()
        .expect("a drive");
    let interface = NetworkInterfaceBuilder::new()
        .with_iface_id("eth0".into())
        .with_host_dev_name("tap0".into())
        .try_build()
        .expect("an interface");
    let executor = FirecrackerExecutorBuilder::new()
        .with_chroot(directory.clone())
        .with_exec_binary(PathBuf::from(firecracker))
        .try_build()
        .expect("an executor");
    let config = Configuration::new("vm-1".into())
        .with_kernel(kernel)
        .with_executor(executor)
        .with_drive(drive)
        .with_interface(interface);
    let mut machine = Machine::new();
    machine.create(config).await.map_err(text)?;
    println!("configured");

    machine.start().await.map_err(text)?;
    ping();
    machine.pause().await.map_err(text)?;
    machine.resume().await.map_err(text)?;
    ping();
    println!("paused and resumed");

    machine.stop().await.map_err(text)?;
    machine.kill().await.map_err(text)?;
    assert!(!Path::new(directory).join("vm-1/firecracker.socket").exists());
    println!("ended");
    Ok(())
}

/// Its errors are no [`Error`]s.
fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

fn ping() {
    let ping = Command::new("ping").args("-c 2 -i 0.2 -W 30 172.16.0.2".split(' ')).status();
    assert!(ping.expect("ping").success());
}
