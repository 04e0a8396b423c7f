//! husk does what its OpenAPI document says, whatever it is sent: schemathesis makes requests of the
//! document, good and bad ones, and judges the replies by it.
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use serde_json::json;

use crate::util::*;

/// Requests of each endpoint, besides those for each corner of its schema.
const EXAMPLES: &str = "30";
/// They may take for ever; their replies have tests of their own.
const ENDLESS: [&str; 2] = ["/wait", "/events"];
/// What any number of requests may leave behind, in KiB: buffers that have grown, an allocator's
/// reserves.
const GROWTH_MAX_KIB: u64 = 8 << 10;

#[test]
fn document_holds_before_the_start() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let vm = harmless(Husk::new(["api"]), &scratch, &network).start();
    check(&vm, &scratch, &network, "InstanceStart", &ENDLESS);
    assert_eq!(vm.api().state(), "Not started");
}

#[test]
fn document_holds_while_a_guest_runs() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let vm = harmless(Husk::new(["api"]), &scratch, &network).start();
    let known = vm.api().get("/openapi.json").json();
    let known = known["components"]["schemas"]["Configuration"]["properties"].as_object().unwrap();
    let mut config = json!({
        "boot-source": {"kernel_image_path": guest("hello"), "boot_args": "how=hang"},
        "drives": [{"drive_id": "known", "path_on_host": "disk.img", "is_root_device": false}],
        "network-interfaces": [{"iface_id": "known", "host_dev_name": "tap0"}],
        "pmem": [{"id": "known", "path_on_host": scratch.sparse("pmem.img", 2 << 20)}],
        "entropy": {},
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "balloon": {"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1},
        "memory-hotplug": {"total_size_mib": 1024},
        "mmds-config": {"network_interfaces": ["known"]},
    });
    config.as_object_mut().unwrap().retain(|section, _| known.contains_key(section));
    vm.api().put("/vm", config).done();
    vm.expect("how=hang");
    // Children would be VMs that nobody ends.
    check(&vm, &scratch, &network, "Kill", &[&ENDLESS[..], &["/fork"]].concat());
    vm.api().patch("/vm", r#"{"state": "Resumed"}"#).done();
    assert_eq!(vm.api().state(), "Running");
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

/// Made to run where paths that a program invents do no harm: all but its directory is read-only.
fn harmless(husk: Husk, scratch: &Scratch, network: &Network) -> Husk {
    scratch.sparse("disk.img", 1 << 20);
    let directory = scratch.as_ref().display();
    let mounts =
        format!("mount --bind {directory} {directory}; mount -o remount,bind,ro /; cd {directory}");
    husk.after(&mounts).within(network).listening_at(&scratch.path("api.sock"))
}

/// Runs schemathesis against the API of `vm`. It leaves out what `unwanted` names, for it would change the
/// VM's state for good, and what is at the paths `left_out`.
fn check(vm: &TestVm, scratch: &Scratch, network: &Network, unwanted: &str, left_out: &[&str]) {
    let before = resident_kib(vm.pid()).unwrap();
    let document = vm.api().get("/openapi.json").json();
    let count = operations(&document).filter(|(_, path)| !left_out.contains(path)).count();
    let address = network.within(|| bridge(vm.socket()));
    let mut command = Command::new(python("st"));
    // From the address, it would leave out the document itself.
    scratch.file("openapi.json", document.to_string());
    command.args(["run", "openapi.json", "--url", &format!("http://{address}")]);
    command.args(left_out.iter().flat_map(|path| ["--exclude-path", *path]));
    command.args(["--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES]);
    command.args(["--seed", "1", "--generation-database", "none", "--no-color"]);
    // It says 400 where HTTP has 405, as Firecracker does, and what is good for the document may be wrong
    // for the host.
    command.args(["--exclude-checks", "unsupported_method,positive_data_acceptance,ignored_auth"]);
    command.args(["--request-timeout", "30", "--continue-on-failure", "--warnings", "off"]);
    command.env("SCHEMATHESIS_HOOKS", "contract").env("PYTHONPATH", clients().join("python"));
    command.env("HUSK_UNWANTED_ACTIONS", unwanted).env("PYTHONDONTWRITEBYTECODE", "1");
    network.enter(command.current_dir(scratch).stdin(Stdio::null()));
    let output = command.output().expect("schemathesis");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(&format!("Tested: {count}\n")), "not all {count} were tested\n{said}");
    let after = resident_kib(vm.pid()).unwrap();
    assert!(after < before + GROWTH_MAX_KIB, "{before} KiB have become {after}\n{said}");
}

/// Leads from a TCP port to a Unix socket; schemathesis knows no other way.
fn bridge(socket: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, socket) = (listener.local_addr().unwrap(), socket.to_owned());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, socket) = (stream.unwrap(), socket.clone());
            // husk may hang up, or be gone.
            thread::spawn(move || drop(join(&stream, &socket)));
        }
    });
    address
}

fn join(client: &TcpStream, socket: &PathBuf) -> io::Result<()> {
    let server = UnixStream::connect(socket)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let copied = io::copy(&mut &*client, &mut &server);
            copied.and_then(|_| server.shutdown(Shutdown::Write))
        });
        let copied = io::copy(&mut &server, &mut &*client);
        copied.and_then(|_| client.shutdown(Shutdown::Both))
    })
}
