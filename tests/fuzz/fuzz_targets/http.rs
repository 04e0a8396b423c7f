#![no_main]
//! The API's server: what a client sends, in pieces, from the first byte until it hangs up.

use std::cell::OnceCell;

use fuzz::bytes::Bytes;
use husk::fuzzing::Api;
use libfuzzer_sys::fuzz_target;

/// Pieces are told apart by this.
const CUT: &[u8] = b"\n~~\n";
/// Those that the API gives, and hyper's.
const STATUSES: [u16; 7] = [200, 204, 400, 413, 414, 431, 100];

thread_local! {
    static API: OnceCell<Api> = const { OnceCell::new() };
}

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut pieces = Vec::new();
    let mut rest = input;
    while let Some(at) = rest.windows(CUT.len()).position(|window| window == CUT) {
        pieces.push(&rest[..at]);
        rest = &rest[at + CUT.len()..];
    }
    pieces.push(rest);
    let (got, asked) = API.with(|api| api.get_or_init(Api::new).converse(&pieces));
    let answers = check(&got);
    assert!(answers >= asked, "{answers} answers to {asked} requests");
    // The shortest request is longer than this.
    assert!(answers <= 1 + input.len() / 12, "{answers} answers to {} bytes", input.len());
});

/// Counts answers, each of which is one.
fn check(got: &[u8]) -> usize {
    let mut rest = Bytes::new(got);
    let mut count = 0;
    while !rest.is_empty() {
        let (head, body) = split(&mut rest);
        let status = head.strip_prefix("HTTP/1.1 ").or(head.strip_prefix("HTTP/1.0 "));
        let status = status.unwrap_or_else(|| panic!("no status line: {head:?}"));
        let status: u16 = status[..3].parse().expect("a status is a number");
        assert!(STATUSES.contains(&status), "{head}");
        if status == 100 {
            continue;
        }
        if head.contains("Content-Type: application/json\r\n") {
            let json: serde_json::Value = serde_json::from_slice(&body).expect("it is JSON");
            assert!(status == 200 || json["fault_message"].is_string(), "{json}");
        }
        count += 1;
    }
    count
}

/// The next head and body.
fn split(rest: &mut Bytes<'_>) -> (String, Vec<u8>) {
    let all = rest.clone().rest();
    let end = all.windows(4).position(|four| four == b"\r\n\r\n").expect("a head ends") + 4;
    let head = std::str::from_utf8(rest.take(end)).expect("a head is text").to_owned();
    let field =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    if let Some(len) = field("Content-Length: ") {
        let len: usize = len.parse().expect("a length is a number");
        let body = rest.take(len);
        assert_eq!(body.len(), len, "a body is cut off");
        return (head, body.to_vec());
    }
    let mut body = Vec::new();
    if field("Transfer-Encoding: ").is_some() {
        // Events, until the client hangs up.
        let chunks = rest.rest();
        body.extend(chunks);
    }
    (head, body)
}
