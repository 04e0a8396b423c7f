//! `firecracker-rs-sdk` makes, uses and ends a microVM, as its README does it.
//!
//!     firecracker_rs_sdk FIRECRACKER DIRECTORY KERNEL DISK
//!
//! It sends HTTP/1.0 and expects its one connection to stay.
use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::*;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [firecracker, directory, kernel, disk] = &arguments[..] else {
        return Err("want FIRECRACKER DIRECTORY KERNEL DISK".into());
    };
    let directory = Path::new(directory);
    let mut instance = FirecrackerOption::new(firecracker)
        .api_sock(directory.join("api.sock"))
        .id("sdk-1")
        .stdout(directory.join("stdout"))
        .stderr(directory.join("stderr"))
        .build()?;
    instance.start_vmm()?;
    let version = instance.get_firecracker_version()?;
    println!("version {}", version.firecracker_version);
    assert_eq!(instance.describe_instance()?.id, "sdk-1");
    assert_eq!(state(&mut instance)?, "NotStarted");

    let machine = MachineConfiguration {
        cpu_template: None,
        smt: None,
        mem_size_mib: 64,
        track_dirty_pages: None,
        vcpu_count: 1,
        huge_pages: None,
    };
    instance.put_machine_configuration(&machine)?;
    instance.patch_machine_configuration(&MachineConfiguration { vcpu_count: 2, ..machine })?;
    assert_eq!(instance.get_machine_configuration()?.vcpu_count, 2);
    instance.put_guest_boot_source(&BootSource {
        boot_args: Some("echoes=1000000 timeout_ms=600000".into()),
        initrd_path: None,
        kernel_image_path: kernel.into(),
    })?;
    instance.put_guest_drive_by_id(&Drive {
        drive_id: "rootfs".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: None,
        is_read_only: false,
        path_on_host: disk.into(),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    })?;
    instance.put_guest_network_interface_by_id(&NetworkInterface {
        guest_mac: Some("06:00:AC:10:00:02".into()),
        host_dev_name: "tap0".into(),
        iface_id: "eth0".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    instance.put_entropy_device(&EntropyDevice { rate_limiter: None })?;
    instance.put_guest_vsock(&Vsock {
        guest_cid: 3,
        uds_path: directory.join("v.sock"),
        vsock_id: None,
    })?;
    let balloon =
        Balloon { amount_mib: 0, deflate_on_oom: true, stats_polling_interval_s: Some(1) };
    instance.put_balloon(&balloon)?;
    instance.put_mmds_config(&MmdsConfig {
        version: Some(MmdsConfigVersion::V2),
        network_interfaces: vec!["eth0".into()],
        ipv4_address: None,
    })?;
    instance.put_metrics(&Metrics { metrics_path: directory.join("metrics") })?;
    instance.put_logger(&Logger {
        level: Some(LogLevel::Info),
        log_path: directory.join("log"),
        show_level: Some(true),
        show_log_origin: None,
        module: None,
    })?;
    let config = instance.get_export_vm_config()?;
    assert_eq!(config.network_interfaces.map(|interfaces| interfaces.len()), Some(1));
    println!("configured");

    instance.start()?;
    ping();
    instance.pause()?;
    assert_eq!(state(&mut instance)?, "Paused");
    instance.resume()?;
    assert_eq!(state(&mut instance)?, "Running");
    ping();
    println!("paused and resumed");

    instance.patch_guest_drive_by_id(&PartialDrive {
        drive_id: "rootfs".into(),
        path_on_host: Some(disk.into()),
        rate_limiter: None,
    })?;
    instance.patch_balloon(&BalloonUpdate { amount_mib: 1 })?;
    assert_eq!(instance.describe_balloon_config()?.amount_mib, 1);
    instance.create_sync_action(ActionType::FlushMetrics)?;
    assert!(std::fs::read_to_string(directory.join("metrics"))?.starts_with('{'));
    println!("changed");

    let (state_file, memory_file) = (directory.join("vm.state"), directory.join("vm.mem"));
    instance.pause()?;
    instance.create_snapshot(&SnapshotCreateParams {
        mem_file_path: memory_file.clone(),
        snapshot_path: state_file.clone(),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    })?;
    instance.resume()?;
    ping();
    end(instance)?;
    println!("saved and ended");

    let backend =
        MemoryBackend { backend_type: BackendType::File, backend_path: memory_file.clone() };
    let ways = [(Some(memory_file), None), (None, Some(backend))];
    for (i, (mem_file_path, mem_backend)) in ways.into_iter().enumerate() {
        let mut clone = FirecrackerOption::new(firecracker)
            .api_sock(directory.join(format!("clone{i}.sock")))
            .id(format!("clone-{i}"))
            .stdout(directory.join("stdout"))
            .stderr(directory.join("stderr"))
            .build()?;
        clone.start_vmm()?;
        clone.load_snapshot(&SnapshotLoadParams {
            enable_diff_snapshots: Some(false),
            mem_file_path,
            mem_backend,
            resume_vm: Some(false),
            snapshot_path: state_file.clone(),
        })?;
        assert_eq!(state(&mut clone)?, "Paused");
        clone.resume()?;
        assert_eq!(state(&mut clone)?, "Running");
        ping();
        end(clone)?;
    }
    println!("restored");
    Ok(())
}

/// Asks the process to end, which the client does not wait for, and waits.
fn end(mut instance: Instance) -> Result<(), Box<dyn Error>> {
    instance.stop()?;
    let process = format!("/proc/{}", instance.firecracker_pid().expect("a process"));
    assert!(Path::new(&process).exists());
    drop(instance);
    let patience = Instant::now() + Duration::from_secs(30);
    while is_alive(&process) {
        assert!(Instant::now() < patience, "it goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether it is more than a zombie.
fn is_alive(process: &str) -> bool {
    let stat = std::fs::read_to_string(format!("{process}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// The name of the state: its type is private.
fn state(instance: &mut Instance) -> Result<String, Box<dyn Error>> {
    Ok(format!("{:?}", instance.describe_instance()?.state))
}

fn ping() {
    let ping = Command::new("ping").args("-c 2 -i 0.2 -W 30 172.16.0.2".split(' ')).status();
    assert!(ping.expect("ping").success());
}
