//! A4, A6: bodies that are no JSON or say what they may not, ids and paths that are none. Each is refused with its place,
//! and changes nothing.
use std::io::{BufReader, Write};

use serde_json::json;

use super::subject::{Subject, differs};
use crate::util::*;

/// Sends a body that need not be text; status and what was said.
fn send(subject: &Subject, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let mut stream = subject.api().connect();
    let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    // It may hang up before it has heard everything.
    let _ = stream.write_all(&[head.as_bytes(), body].concat());
    match Reply::try_read(&mut BufReader::new(stream)) {
        Ok(reply) => (reply.status, reply.body),
        Err(e) => (0, e.to_string()),
    }
}

/// Good bodies, by which each endpoint is known.
fn good() -> Vec<(&'static str, &'static str, String)> {
    let kernel = guest("hello");
    vec![
        ("PUT", "/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64}).to_string()),
        ("PUT", "/boot-source", json!({"kernel_image_path": kernel}).to_string()),
        (
            "PUT",
            "/entropy",
            json!({"rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}).to_string(),
        ),
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"}).to_string()),
        ("PATCH", "/vm", json!({"state": "Paused"}).to_string()),
        ("PUT", "/actions", json!({"action_type": "InstanceStart"}).to_string()),
    ]
}

/// What the program shows of its state.
fn state_shown(subject: &Subject) -> (String, String) {
    (subject.ask("GET", "/", "").1, subject.ask("GET", "/vm/config", "").1)
}

#[test]
fn a04_bodies_that_are_no_json() {
    let mut subject = Subject::start("A4");
    subject.settle();
    let before = state_shown(&subject);
    let mut count = 0;
    for (method, path, text) in good() {
        let good = text.as_bytes();
        let around = |front: &[u8], back: &[u8]| [front, good, back].concat();
        let mut bodies: Vec<(String, Vec<u8>)> =
            (1..good.len()).map(|len| (format!("{len} bytes"), good[..len].to_vec())).collect();
        bodies.extend(
            [
                ("twice", around(b"", good)),
                ("a byte order mark", around(b"\xef\xbb\xbf", b"")),
                ("UTF-16", text.encode_utf16().flat_map(u16::to_le_bytes).collect()),
                ("a comment", around(b"/* */", b"")),
                ("a comma", around(b"", b",")),
                ("a NUL behind", around(b"", b"\0")),
                ("nothing but space", b" \t\r\n".to_vec()),
                ("no UTF-8", around(b"", b"\xff")),
                ("no UTF-8 in a name", b"{\"\xff\xfe\": 1}".to_vec()),
                ("an overlong slash", b"{\"\xc0\xaf\": 1}".to_vec()),
                ("a surrogate as UTF-8", b"{\"\xed\xa0\x80\": 1}".to_vec()),
                ("a lone surrogate", br#"{"\ud800": 1}"#.to_vec()),
                ("two high surrogates", br#"{"\ud800\ud800": 1}"#.to_vec()),
                ("a bad escape", br#"{"\x41": 1}"#.to_vec()),
                ("a line break in a name", b"{\"a\nb\": 1}".to_vec()),
                ("single quotes", b"{'a': 1}".to_vec()),
                ("no quotes", b"{a: 1}".to_vec()),
                ("a number alone", b"5".to_vec()),
                ("a string alone", b"\"a\"".to_vec()),
                ("null", b"null".to_vec()),
                ("true", b"true".to_vec()),
                ("deep arrays", b"[".repeat(50_000)),
                ("deep objects", br#"{"a":"#.repeat(10_000)),
                ("deep and closed", [b"[".repeat(20_000), b"]".repeat(20_000)].concat()),
            ]
            .map(|(name, body)| (name.to_owned(), body)),
        );
        for (name, body) in bodies {
            let (status, said) = send(&subject, method, path, &body);
            let has_place = said.contains("line ") && said.contains("column ")
                // There is no line of what is no text.
                || std::str::from_utf8(&body).is_err() && said.contains("UTF-8");
            let is_right = status == 400 && has_place;
            if is_anothers() {
                println!("A4 {path} {name}: {status} {}", said.trim_end());
            }
            assert!(is_right || differs("A4"), "{path}, {name}: {status} {said}");
            count += 1;
        }
    }
    println!("A4: {count} bodies");
    assert!(state_shown(&subject) == before || differs("A4"), "something has changed");
    subject.serves_as_before();
}

fn is_anothers() -> bool {
    crate::hostile::other().is_some()
}

#[test]
fn a04_bodies_that_say_what_they_may_not() {
    let mut subject = Subject::start("A4");
    subject.settle();
    let before = state_shown(&subject);
    let machine =
        |count: &str, more: &str| format!(r#"{{"vcpu_count": {count}, "mem_size_mib": 64{more}}}"#);
    let mut bodies = vec![
        machine("1", r#", "vcpu_count": 2"#),
        machine("1", r#", "mem_size_mib": 64"#),
        machine("1", r#", "nope": 1"#),
        machine("1", r#", "": 1"#),
        machine("1", r#", "VCPU_COUNT": 1"#),
        r#"{"vcpu_count": 1}"#.into(),
        "{}".into(),
        "[[1, 64]]".into(),
        "[1, 64, false, false, \"None\", null, true, true, \"Restart\", 1]".into(),
    ];
    for value in [
        "\"1\"",
        "1.0",
        "1e0",
        "1.5",
        "-1",
        "256",
        "4294967297",
        "18446744073709551617",
        "1e400",
        "NaN",
        "Infinity",
        "-Infinity",
        "01",
        "0x1",
        "+1",
        ".5",
        "true",
        "[1]",
        "{}",
        "\"\"",
    ] {
        bodies.push(machine(value, ""));
    }
    for body in bodies {
        let (status, said) = send(&subject, "PUT", "/machine-config", body.as_bytes());
        println!("A4 {body}: {status} {}", said.trim_end());
        let is_right = status == 400 && said.contains(" at line 1 column ");
        assert!(is_right || differs("A4"), "{body}: {status} {said}");
    }
    assert!(state_shown(&subject) == before || differs("A4"), "something has changed");
    subject.serves_as_before();
}

#[test]
fn a06_ids_that_are_none() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("A6"));
    let disk = scratch.sparse("disk.img", 1 << 20);
    subject.settle();
    let before = state_shown(&subject);
    let long = "x".repeat(65);
    let longer = "x".repeat(4097);
    for id in [
        "..",
        ".",
        "../a",
        "a/b",
        "a/../b",
        "a.b",
        "a b",
        "a%2fb",
        "%2e%2e",
        "%00",
        "a%00",
        "caf%c3%a9",
        "a;b",
        "a:b",
        "a@b",
        "~",
        "a,b",
        "*",
        "a\\b",
        "a'b",
        &long,
        &longer,
    ] {
        // A path ends where a space begins.
        let in_path = id.replace(' ', "%20");
        for (kind, key, more) in [
            ("drives", "drive_id", json!({"path_on_host": disk, "is_root_device": false})),
            ("network-interfaces", "iface_id", json!({"host_dev_name": "tap0"})),
            ("pmem", "id", json!({"path_on_host": disk})),
        ] {
            let mut body = more;
            body[key] = json!(id);
            let (status, said) =
                send(&subject, "PUT", &format!("/{kind}/{in_path}"), body.to_string().as_bytes());
            let name = &id[..id.len().min(70)];
            println!("A6 {kind} {name:?}: {status} {}", &said[..said.len().min(200)]);
            assert!(status == 400 || differs("A6"), "{kind} {id:?}: {status} {said}");
        }
    }
    // Within a body alone, it must be the path's.
    for id in ["", "..", "b", "a/b", "a\0b", "caf\u{e9}"] {
        let body = json!({"drive_id": id, "path_on_host": disk, "is_root_device": false});
        let (status, said) = send(&subject, "PUT", "/drives/a", body.to_string().as_bytes());
        println!("A6 {id:?} in a body: {status} {said}");
        assert!(status == 400 || differs("A6"), "{id:?}: {status} {said}");
    }
    assert!(state_shown(&subject) == before || differs("A6"), "something has changed");
    subject.serves_as_before();
}

#[test]
fn a06_paths_that_are_none() {
    let mut subject = Subject::start("A6");
    subject.settle();
    let before = state_shown(&subject);
    let name = "x".repeat(256);
    let long = "x/".repeat(2100);
    for path in [
        "",
        "a\0b",
        "\0",
        "/dev/null\0.img",
        "../../../../../../../nope",
        "/proc/self/fd/99999",
        "/nope/\u{1f600}",
        "\u{202e}gpj.exe",
        &name,
        &long,
    ] {
        let shown = &path[..path.len().min(70)];
        for (endpoint, body) in [
            ("/boot-source", json!({"kernel_image_path": path})),
            ("/boot-source", json!({"kernel_image_path": guest("hello"), "initrd_path": path})),
            ("/drives/a", json!({"drive_id": "a", "path_on_host": path, "is_root_device": false})),
            ("/pmem/a", json!({"id": "a", "path_on_host": path})),
            (
                "/snapshot/load",
                json!({"snapshot_path": path, "mem_backend":
                {"backend_type": "File", "backend_path": path}}),
            ),
        ] {
            let (status, said) = send(&subject, "PUT", endpoint, body.to_string().as_bytes());
            println!("A6 {endpoint} {shown:?}: {status} {}", &said[..said.len().min(200)]);
            assert!(status == 400 || differs("A6"), "{endpoint} {shown:?}: {status} {said}");
        }
    }
    assert!(state_shown(&subject) == before || differs("A6"), "something has changed");
    subject.serves_as_before();
}
