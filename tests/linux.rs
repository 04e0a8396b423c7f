//! A real Linux in the guest: kernel, file system, network, console, power; each with a guest that boots, and again with
//! one that is restored.
//!
//! A boot takes about 15 s where KVM emulates guest ring 0, so each test looks at several things.
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::util::*;

/// The output of a program that must succeed.
fn run(program: &str, args: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(args).arg(path).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{text}{errors}", output.status);
    text
}

/// A checksum that the guest printed, without the name of the file.
fn sum<'a>(end: &'a End, key: &str) -> &'a str {
    end.value(key).split_whitespace().next().unwrap_or_default()
}

/// Linux from a copy of the root disk, which is returned, with a script on a second one.
fn from_disk(scratch: &Scratch, script: &str, words: &str) -> (Husk, PathBuf) {
    let root = root_disk(scratch);
    let husk = Husk::run(product("vmlinux"))
        .disk(&root)
        .read_only_disk(script_disk(scratch, script))
        .memory(256)
        .cmdline(&cmdline(&format!("husk.run=/dev/vdb {words}")));
    (husk, root)
}

/// What each way of finding devices must find, and must not complain about.
const DEVICES: &str = "\
echo cpus=$(nproc)
echo virtio=$(ls /sys/bus/virtio/devices | wc -l)
echo disks=$(ls /dev/vd? | wc -l)
echo trouble=$(dmesg | grep -i virtio | grep -ciE 'fail|error|busy')
echo entropy=$(head -c 32 /dev/hwrng | wc -c)
";

#[track_caller]
fn expect_devices(end: &End, cpus: &str, virtio: &str, disks: &str) {
    assert_eq!(end.value("cpus"), cpus);
    assert_eq!(end.value("virtio"), virtio, "each device is found once");
    assert_eq!(end.value("disks"), disks);
    assert_eq!(end.value("trouble"), "0");
    assert_eq!(end.value("entropy"), "32");
}

#[test]
fn linux_boots_from_an_initrd_with_two_vcpus() {
    both_ways(|scratch, origin| {
        let script = format!("{DEVICES}echo memory=$(grep MemTotal /proc/meminfo)\n");
        let disk = scratch.sparse("data.img", 1 << 20);
        let husk = from_initrd(scratch, &script, "").cpus(2).disk(&disk).arg("--rng");
        let end = origin.start(husk, &[&disk]).wait_within(BOOT).code(0);
        expect_devices(&end, "2", "2", "1");
        assert!(end.output.contains("husk-guest: exit 0"), "{end}");
    });
}

#[test]
fn linux_without_acpi_finds_processors_and_devices() {
    both_ways(|scratch, origin| {
        let (husk, root) = from_disk(scratch, DEVICES, "acpi=off");
        // Without ACPI Linux cannot power off; the guest resets the machine instead.
        let husk = husk.cpus(2).arg("--rng").exit_on_reboot();
        let end = origin.start(husk, &[&root]).wait_within(BOOT).code(0);
        expect_devices(&end, "2", "3", "2");
        run("e2fsck", &["-f", "-n"], &root);
    });
}

#[test]
fn linux_boots_by_its_own_protocol() {
    both_ways(|scratch, origin| {
        let script = "echo words=$(grep -o 'last=.*' /proc/cmdline)\n";
        let husk = Husk::run(without_pvh(scratch, &product("vmlinux")))
            .initrd(initrd_with(scratch, script.as_bytes()))
            .cmdline(&cmdline("husk.run=/test.sh last=one"));
        let end = origin.start(husk, &[]).wait_within(BOOT).code(0);
        assert_eq!(end.value("words"), "last=one");
    });
}

#[test]
fn a_root_disk_keeps_what_was_written_over_a_reboot() {
    let script = "\
if [ ! -e /kept ]; then
    head -c 300000 /dev/urandom >/kept
    echo sum=$(sha256sum </kept)
    sync
    /etc/down reboot
else
    echo again=$(sha256sum </kept)
    echo done >/second
    if dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null; then echo readonly=no; else echo readonly=yes; fi
fi
";
    both_ways(|scratch, origin| {
        let (husk, root) = from_disk(scratch, script, "");
        let before = std::fs::read(scratch.path("script.img")).unwrap();
        let vm = origin.start(husk, &[&root]);
        // A restored VM boots the kernel that it once came from.
        vm.expect_within("husk-guest: waiting", BOOT);
        vm.type_in("\n");
        let end = vm.wait_within(BOOT).code(0);
        assert_eq!(end.value("sum"), end.value("again"), "{end}");
        assert_eq!(end.value("readonly"), "yes");
        run("e2fsck", &["-f", "-n"], &root);
        assert_eq!(run("debugfs", &["-R", "cat /second"], &root), "done\n");
        let kept = scratch.path("kept");
        run("debugfs", &["-R", &format!("dump /kept {}", kept.display())], &root);
        assert_eq!(sum(&end, "sum"), sha256(&std::fs::read(kept).unwrap()));
        assert_eq!(before, std::fs::read(scratch.path("script.img")).unwrap());
    });
}

#[test]
fn linux_talks_to_the_host_over_a_tap() {
    both_ways(|scratch, origin| {
        const PORT: u16 = 8000;
        let network = Network::with_tap();
        let large: String =
            (0..100_001u32).map(|i| char::from(b"metadata"[(i % 7 + i % 2) as usize])).collect();
        let metadata = json!({"latest": {
            "large": large, "meta-data": {"instance-id": "i-7", "network": {}, "tags": "none"},
        }});
        let metadata = scratch.file("metadata.json", metadata.to_string());
        let script = "\
ip route add 169.254.169.254 dev eth0
wget -q -O /tmp/large http://169.254.169.254:80/latest/large && echo large=$(sha256sum </tmp/large) &
echo list=$(wget -q -O - http://169.254.169.254:80/latest/meta-data)
echo id=$(wget -q -O - http://169.254.169.254:80/latest/meta-data/instance-id)
ping -c 3 172.16.0.1 >/dev/null && echo ping=ok
wget -q -O /tmp/down http://172.16.0.1:8000/ && echo down=$(sha256sum </tmp/down)
mkdir /tmp/www && head -c 150000 /dev/urandom >/tmp/www/up
echo up=$(sha256sum </tmp/www/up)
wait
httpd -p 80 -h /tmp/www && echo SERVING
read -r word
";
        // Not a multiple of anything, and enough for segments of 64 KiB.
        let down: Vec<u8> = (0..300_007u32)
            .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
            .take(300_007)
            .collect();
        let listener = network.within(|| TcpListener::bind(("172.16.0.1", PORT)).unwrap());
        let body = down.clone();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            let len = body.len();
            write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {len}\r\n\r\n").unwrap();
            stream.write_all(&body).unwrap();
        });
        let husk = from_initrd(scratch, script, "husk.ip=172.16.0.2/24")
            .network(&network, ",mac=02:00:00:00:00:07,mmds=V1")
            .option("--metadata", metadata)
            .option("--mmds-size-limit", "200000");
        let vm = origin.start(husk, &[]);
        vm.expect_within("SERVING", BOOT);
        server.join().unwrap();
        let up = network.within(|| {
            let mut stream = TcpStream::connect(("172.16.0.2", 80)).unwrap();
            stream.write_all(b"GET /up HTTP/1.0\r\n\r\n").unwrap();
            let mut reply = Vec::new();
            stream.read_to_end(&mut reply).unwrap();
            let at = reply.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
            reply.split_off(at + 4)
        });
        network.run("ping", "-c 3 -W 10 172.16.0.2");
        vm.type_in("\n");
        let end = vm.wait_within(BOOT).code(0);
        assert_eq!(end.value("ping"), "ok");
        assert_eq!(end.value("list"), "instance-id network/ tags");
        assert_eq!(end.value("id"), "i-7");
        assert_eq!(sum(&end, "large"), sha256(large.as_bytes()));
        assert_eq!(sum(&end, "down"), sha256(&down));
        assert_eq!(sum(&end, "up"), sha256(&up));
    });
}

#[test]
fn linux_talks_to_the_host_over_vsock() {
    both_ways(|scratch, origin| {
        let client = crate::clients::rust("vsock");
        let socket = scratch.path("v.sock");
        let [echo, leaver, mourner, last] = [52, 53, 55, 56].map(|port| {
            let path = scratch.path(&format!("v.sock_{port}"));
            // The first guest's.
            let _ = std::fs::remove_file(&path);
            UnixListener::bind(path).unwrap()
        });
        let hosts = std::thread::spawn(move || {
            // Hears everything before it answers: the guest has ended its direction.
            let (mut stream, _) = echo.accept().unwrap();
            let mut said = Vec::new();
            stream.read_to_end(&mut said).unwrap();
            stream.write_all(&said).unwrap();
            drop(stream);
            // Goes without a word more.
            let (mut stream, _) = leaver.accept().unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
            stream.write_all(b"bye").unwrap();
            drop(stream);
            // Hears that its peer was killed.
            let (mut stream, _) = mourner.accept().unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            (said, last.accept().unwrap().0)
        });
        let husk = from_initrd(scratch, linux_program("vsock"), "").vsock(42, &socket);
        let vm = origin.start(husk, &[]);
        vm.expect_within("SERVING", BOOT);
        let (said, last) = hosts.join().unwrap();
        assert_eq!(said, "alive");

        // Several at once, each with its end before the guest's answer to it; a pause in between.
        let threads = [1u8, 2, 3, 4].map(|seed| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let mut stream = vsock_to(&socket, 1000);
                let mut reader = stream.try_clone().unwrap();
                let said: Vec<u8> = (0..300_000u32).map(|i| (i / 3) as u8 ^ seed).collect();
                let heard = std::thread::spawn(move || {
                    let mut heard = Vec::new();
                    reader.read_to_end(&mut heard).unwrap();
                    heard
                });
                stream.write_all(&said).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                assert!(heard.join().unwrap() == [&said[..], b"[end]"].concat());
            })
        });
        vm.api().patch("/vm", json!({ "state": "Paused" })).done();
        vm.api().patch("/vm", json!({ "state": "Resumed" })).done();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // One that goes in the middle does not matter; where nobody listens is the end at once.
        vsock_to(&socket, 1000).write_all(b"never mind").unwrap();
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"CONNECT 1001\n").unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        // A client that was written for Firecracker.
        let heard = run(client.to_str().unwrap(), &[socket.to_str().unwrap()], Path::new("1000"));
        assert_eq!(heard, "hello[end]\n");

        drop(last);
        let end = vm.wait_within(BOOT).code(0);
        for (step, result) in [
            ("nobody", "Err(ConnectionReset)"),
            ("cid", "42"),
            ("half_close", "true"),
            ("vanished", "3 Some(BrokenPipe)"),
            ("killed", "alive"),
            ("done", "Ok(0)"),
        ] {
            assert_eq!(end.value(step).trim(), result, "{step}\n{end}");
        }
    });
}

/// A stream to a port of the guest.
fn vsock_to(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(BOOT)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{}", String::from_utf8_lossy(&line));
    stream
}

#[test]
fn a_shell_hears_what_is_typed_and_ctrl_alt_del() {
    both_ways(|_, origin| {
        let husk = Husk::run(product("vmlinux"))
            .initrd(product("initrd.cpio"))
            .cmdline(&cmdline(""))
            .exit_on_reboot();
        let vm = origin.start(husk, &[]);
        vm.expect_within("husk-guest: ready", BOOT);
        vm.expect_text("# ");
        vm.type_in("echo answer=$((6 * 7))\n");
        vm.expect("answer=42");
        vm.api().act("SendCtrlAltDel").done();
        // The guest resets the machine, and a reset was to end the VM.
        vm.wait_within(BOOT).code(0);
    });
}

#[test]
fn the_api_boots_pauses_resumes_and_shuts_down() {
    both_ways(|scratch, origin| {
        let network = Network::with_tap();
        let script = "\
m=http://169.254.169.254:80 i=0
ip route add 169.254.169.254 dev eth0
wget -q -O - $m/now 2>&1
token=$(printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-metadata-token-ttl-seconds: 600\\r\\n\\r\\n' |
    nc 169.254.169.254 80 | tail -n 1)
get() { wget -q -O - --header \"X-metadata-token: $token\" \"$@\"; }
echo json=$(get --header 'Accept: application/json' $m/)
while sleep 1; do i=$((i + 1)); echo tick=$i now=$(get $m/now); done
";
        let script = script_disk(scratch, script);
        let vm = Husk::api().within(&network).typing().start();
        let api = vm.api();
        let mmds = json!({"now": "first"});
        let mut events = api.follow("/events");
        assert_eq!(events.next().unwrap()["state"], "Not started");
        let happened_first: &[&str] = match origin.snapshot() {
            None => {
                configure(&api, &script);
                api.put("/mmds", mmds).done();
                api.act("InstanceStart").done();
                origin.save(&vm, &[]);
                &["started", "paused", "snapshot_created", "resumed"]
            }
            Some(directory) => {
                let body = json!({
                    "directory": directory, "resume_vm": true, "overrides": { "mmds": mmds },
                });
                api.put("/snapshot/load", body).done();
                &["restored"]
            }
        };
        vm.type_in("\n");
        vm.expect_within("HTTP/1.1 401 Unauthorized", BOOT);
        vm.expect(r#"json={"now":"first"}"#);
        vm.expect("tick=1 now=first");
        api.patch("/mmds", json!({"now": "second"})).done();
        vm.expect("now=second");

        api.patch("/vm", json!({ "state": "Paused" })).done();
        assert_eq!(api.state(), "Paused");
        let heard = vm.serial.len();
        // Silence cannot be waited for but by waiting: two ticks' time.
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(vm.serial.len(), heard, "a paused guest says nothing");
        api.put("/mmds", json!({"now": "third"})).done();
        api.patch("/vm", json!({ "state": "Resumed" })).done();
        vm.expect("now=third");

        api.act("Shutdown").done();
        let waited = api.get("/wait").json();
        assert_eq!(waited["reason"], "powered_off");
        let (devices, others): (Vec<_>, Vec<_>) = events.partition(|e| e["event"] == "device");
        let names: Vec<_> = others.iter().map(|e| e["event"].as_str().unwrap()).collect();
        let happened_then = ["paused", "resumed", "shutdown_requested", "ended"];
        assert_eq!(names, [happened_first, &happened_then].concat());
        // Linux drives all three, which a restore has active, and resets them when it powers off.
        let count = |what| devices.iter().filter(|e| e["what"] == what).count();
        let activated = if origin.snapshot().is_none() { 3 } else { 0 };
        assert_eq!((count("activated"), count("reset")), (activated, 3), "{devices:?}");
        vm.wait_within(BOOT).code(0);
    });
}

/// A machine with two vCPUs, a script on a disk, an entropy device and an interface with metadata.
fn configure(api: &Api, script: &Path) {
    api.put("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 256 })).done();
    let source = json!({
        "kernel_image_path": product("vmlinux"), "initrd_path": product("initrd.cpio"),
        "boot_args": cmdline("husk.run=/dev/vda husk.ip=172.16.0.2/24"),
    });
    api.put("/boot-source", source).done();
    let drive = json!({
        "drive_id": "script", "path_on_host": script, "is_root_device": false, "is_read_only": true,
    });
    api.put("/drives/script", drive).done();
    api.put("/entropy", "{}").done();
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
    api.put("/network-interfaces/eth0", interface).done();
    api.put("/mmds/config", json!({"network_interfaces": ["eth0"], "version": "V2"})).done();
}

#[test]
fn linux_boots_from_persistent_memory_and_gets_more_memory() {
    both_ways(|scratch, origin| {
        let root = root_disk(scratch);
        let script = "\
total() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
echo root=$(awk '$2 == \"/\" && $4 ~ /dax/ { print $3 }' /proc/mounts)
head -c 300000 /dev/urandom >/kept
echo sum=$(sha256sum </kept)
sync
echo before=$(total)
while [ $(total) -lt 350 ]; do sleep 0.2; done
echo more=$(total)
while [ $(total) -gt 300 ]; do sleep 0.2; done
echo less=$(total)
";
        let words = "husk.run=/dev/vda rootflags=dax memhp_default_state=online_movable";
        let husk = Husk::run(product("vmlinux"))
            .option("--pmem", format!("{},root", root.display()))
            .option("--hotplug-memory", "256")
            .read_only_disk(script_disk(scratch, script))
            .memory(256)
            .cmdline(&cmdline(words));
        let vm = origin.start(husk, &[&root]);
        vm.expect_within("before=", BOOT);
        let api = vm.api();
        api.patch("/hotplug/memory", json!({ "requested_size_mib": 128 })).done();
        vm.expect_within("more=", BOOT);
        assert_eq!(api.get("/hotplug/memory").json()["plugged_size_mib"], 128);
        api.patch("/hotplug/memory", json!({ "requested_size_mib": 0 })).done();
        vm.expect_within("less=", BOOT);
        assert_eq!(api.get("/hotplug/memory").json()["plugged_size_mib"], 0);
        let end = vm.wait_within(BOOT).code(0);
        assert_eq!(end.value("root"), "ext4", "the root is mounted with DAX\n{end}");
        let mib = |key| end.value(key).parse::<u64>().unwrap();
        assert_eq!((mib("more") - mib("before"), mib("less")), (128, mib("before")), "{end}");
        run("e2fsck", &["-f", "-n"], &root);
        let kept = scratch.path("kept");
        run("debugfs", &["-R", &format!("dump /kept {}", kept.display())], &root);
        assert_eq!(sum(&end, "sum"), sha256(&std::fs::read(kept).unwrap()));
    });
}

/// Does what is typed: fills a file in memory, removes it.
const MEMORY: &str = "\
stty -echo
echo READY
while read -r word size; do
    case $word in
    fill) head -c $size </dev/zero >/fill; echo filled=$(wc -c </fill) ;;
    drop) rm /fill; echo dropped=$size ;;
    esac
done
";

/// MiB of the host's memory that a process uses.
fn rss_mib(vm: &TestVm) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// Asks until the answer is one that is waited for; it.
#[track_caller]
fn poll<T: std::fmt::Debug>(what: &str, ask: impl Fn() -> T, is_it: impl Fn(&T) -> bool) -> T {
    let deadline = std::time::Instant::now() + BOOT;
    loop {
        let answer = ask();
        if is_it(&answer) {
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "waited in vain for {what}: {answer:?}");
        // The guest takes its time, and tells nobody when it is through.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Linux with a balloon and little memory, which it takes long to fill, waiting for what it is to do.
fn with_balloon(scratch: &Scratch, origin: &Origin, balloon: &str) -> TestVm {
    let husk = Husk::run(product("vmlinux"))
        .initrd(initrd_with(scratch, MEMORY.as_bytes()))
        .memory(64)
        .cmdline(&cmdline("husk.run=/test.sh"))
        .option("--balloon", balloon);
    let vm = origin.start(husk, &[]);
    vm.expect_within("READY", BOOT);
    vm
}

#[test]
fn linux_inflates_deflates_and_tells_of_its_memory() {
    both_ways(|scratch, origin| {
        let vm = with_balloon(scratch, origin, "0,deflate-on-oom,stats=1");
        let api = vm.api();
        let statistic = |name: &str| {
            let all = api.get("/balloon/statistics").json();
            all[name].as_u64().unwrap_or_else(|| panic!("no {name} in {all}"))
        };
        let free = || statistic("free_memory") >> 20;
        let target = |mib: u64| {
            api.patch("/balloon", json!({ "amount_mib": mib })).done();
            poll("the balloon", || statistic("actual_mib"), |actual| *actual == mib);
        };
        let (total, at_first) = (statistic("total_memory") >> 20, free());
        assert!((32..=64).contains(&total) && at_first < total, "{at_first} of {total} MiB");

        vm.type_in("fill 12582912\n");
        vm.expect_within("filled=12582912", BOOT);
        let filled = poll("statistics", free, |now| now + 10 < at_first);
        vm.type_in("drop it\n");
        vm.expect_within("dropped=it", BOOT);
        // All that is free but a little: what was in use is among it.
        let dropped = poll("statistics", free, |now| *now > filled + 8);
        let full = rss_mib(&vm);
        let amount = dropped - 6;
        target(amount);
        let inflated = rss_mib(&vm);
        assert!(inflated + 6 < full, "{full} MiB, then {inflated}");
        let left = poll("statistics", free, |now| *now < 10);

        // More than is left: the guest takes it from the balloon, and kills nobody.
        vm.type_in("fill 12582912\n");
        vm.expect_within("filled=12582912", BOOT);
        let actual = statistic("actual_mib");
        assert!(actual < amount, "{left} MiB were free, {actual} of {amount} are in the balloon");
        assert_eq!(statistic("target_mib"), amount);
        let taken = rss_mib(&vm);
        assert!(taken > inflated + 6, "{inflated} MiB, then {taken}");
        target(0);
        poll("statistics", free, |now| now + 4 > filled);
    });
}
