//! A request of the guest to a reply, bytes to bytes: HTTP/1.0 and 1.1 without bodies, answered in
//! Firecracker's words. What connections are is not known here.
use std::time::Instant;

use super::store::{Format, StoreError};
use super::{Service, Version};

/// Where tokens are given out.
const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] =
    ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
/// Set by proxies, behind which nobody may get a token.
const FORWARDED: &str = "X-Forwarded-For";

/// Headers that a request may have.
const HEADERS_MAX: usize = 64;

const NO_TOKEN: &str = "No MMDS token provided. Use `X-metadata-token` or \
     `X-aws-ec2-metadata-token` header to specify the session token.";
const NO_TTL: &str = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
     `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
const INVALID: &str = "Invalid request.";

/// What a request came to.
#[derive(Debug)]
pub(super) struct Answered {
    /// Bytes of the request.
    pub(super) used: usize,
    /// The reply, as sent.
    pub(super) reply: Vec<u8>,
    /// Whether the connection ends with it.
    pub(super) is_last: bool,
}

/// Answers the request with which `received` begins; nothing if it is not all there.
pub(super) fn answer(service: &Service, received: &[u8], now: Instant) -> Option<Answered> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let (used, reply, minor, is_last) = match request.parse(received) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(used)) => {
            let request = Request::new(&request);
            let is_last = request.has_body() || !request.keeps_alive();
            (used, request.answer(service, now), request.minor, is_last)
        }
        // Nobody knows where the next one would begin.
        Err(e) => {
            let reply = match e {
                httparse::Error::Version => {
                    Reply::text(Status::NotImplemented, "Unsupported HTTP version.")
                }
                _ => Reply::text(Status::BadRequest, INVALID),
            };
            (received.len(), reply, 1, true)
        }
    };
    Some(Answered { used, reply: reply.to_bytes(minor, is_last), is_last })
}

struct Request<'a> {
    method: &'a str,
    target: &'a str,
    /// HTTP/1 is all there is.
    minor: u8,
    headers: &'a [httparse::Header<'a>],
}

impl<'a> Request<'a> {
    fn new(request: &'a httparse::Request<'_, '_>) -> Self {
        Self {
            method: request.method.unwrap_or_default(),
            target: request.path.unwrap_or_default(),
            minor: request.version.unwrap_or(1),
            headers: request.headers,
        }
    }

    /// The first header with one of these names.
    fn header(&self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let is_meant = |header: &&httparse::Header<'_>| {
            names.iter().any(|name| header.name.eq_ignore_ascii_case(name))
        };
        let header = self.headers.iter().find(is_meant)?;
        // What is not text is no value that anybody knows.
        Some((header.name, std::str::from_utf8(header.value).unwrap_or_default().trim()))
    }

    /// As HTTP/1.1 and 1.0 have it (RFC 9112, 9.3).
    fn keeps_alive(&self) -> bool {
        let says = |word: &str| {
            self.header(&["Connection"]).is_some_and(|(_, value)| {
                value.split(',').any(|v| v.trim().eq_ignore_ascii_case(word))
            })
        };
        !says("close") && (self.minor == 1 || says("keep-alive"))
    }

    fn has_body(&self) -> bool {
        let length = self.header(&["Content-Length"]);
        length.is_some_and(|(_, length)| length != "0")
            || self.header(&["Transfer-Encoding"]).is_some()
    }

    fn answer(&self, service: &Service, now: Instant) -> Reply {
        if self.has_body() {
            return Reply::text(Status::BadRequest, INVALID);
        }
        let Some(path) = absolute_path(self.target) else {
            return Reply::text(Status::BadRequest, "Invalid URI.");
        };
        match self.method {
            "GET" => self.get(service, path, now),
            "PUT" => self.put(service, path, now),
            "PATCH" | "DELETE" => Reply::text(Status::MethodNotAllowed, "Not allowed HTTP method.")
                .with_header("Allow", "GET, PUT"),
            _ => Reply::text(Status::NotImplemented, "Unsupported HTTP method."),
        }
    }

    fn get(&self, service: &Service, path: &str, now: Instant) -> Reply {
        let needs_token = service.config.version == Version::V2;
        match self.header(&TOKEN) {
            None => {
                service.counters().rx_no_token().inc();
                if needs_token {
                    return Reply::text(Status::Unauthorized, NO_TOKEN);
                }
            }
            Some((_, token)) if !service.tokens.is_valid(token, now) => {
                service.counters().rx_invalid_token().inc();
                if needs_token {
                    return Reply::text(Status::Unauthorized, "MMDS token not valid.");
                }
            }
            Some(_) => {}
        }
        let wants_json = self
            .header(&["Accept"])
            .is_some_and(|(_, accepted)| accepted.eq_ignore_ascii_case("application/json"));
        let format = match wants_json && !service.config.imds_compat {
            true => Format::Json,
            false => Format::Imds,
        };
        match service.value(&without_empty_segments(path), format) {
            Ok(body) => Reply { format, ..Reply::text(Status::Ok, body) },
            Err(e @ StoreError::UnsupportedType) => {
                Reply::text(Status::NotImplemented, e.to_string())
            }
            Err(_) => Reply::not_found(path),
        }
    }

    fn put(&self, service: &Service, path: &str, now: Instant) -> Reply {
        if let Some((name, _)) = self.header(&[FORWARDED]) {
            let why = format!("Invalid header. Reason: Unsupported header name. Key: {name}");
            return Reply::text(Status::BadRequest, why);
        }
        if without_empty_segments(path) != TOKEN_PATH {
            return Reply::not_found(path);
        }
        let Some((name, ttl)) = self.header(&TOKEN_TTL) else {
            return Reply::text(Status::BadRequest, NO_TTL);
        };
        let Ok(ttl_seconds) = ttl.parse() else {
            let why = format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{ttl}");
            return Reply::text(Status::BadRequest, why);
        };
        match service.tokens.give(ttl_seconds, now) {
            Ok(token) => Reply::text(Status::Ok, token).with_header(name, &ttl_seconds.to_string()),
            Err(e) => Reply::text(Status::BadRequest, e.to_string()),
        }
    }
}

/// The path of a target in origin or absolute form; `None` if it has none.
fn absolute_path(target: &str) -> Option<&str> {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)),
        None => Some(target).filter(|target| target.starts_with('/')),
    }
}

fn without_empty_segments(path: &str) -> String {
    let mut kept = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !kept.ends_with('/') {
            kept.push(c);
        }
    }
    kept
}

#[derive(Clone, Copy, Debug)]
enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    NotImplemented,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::NotImplemented => "501 Not Implemented",
        }
    }
}

struct Reply {
    status: Status,
    format: Format,
    /// A header more, as it is sent.
    header: String,
    body: String,
}

impl Reply {
    fn text(status: Status, body: impl Into<String>) -> Self {
        Self { status, format: Format::Imds, header: String::new(), body: body.into() }
    }

    fn not_found(path: &str) -> Self {
        Self::text(Status::NotFound, format!("Resource not found: {path}."))
    }

    fn with_header(mut self, name: &str, value: &str) -> Self {
        self.header = format!("{name}: {value}\r\n");
        self
    }

    fn to_bytes(&self, minor: u8, is_last: bool) -> Vec<u8> {
        let connection = if is_last { "close" } else { "keep-alive" };
        let mime = match self.format {
            Format::Json => "application/json",
            Format::Imds => "text/plain",
        };
        let Self { status, header, body, .. } = self;
        let (line, length) = (status.line(), body.len());
        format!(
            "HTTP/1.{minor} {line}\r\nServer: Firecracker API\r\nConnection: {connection}\r\n\
             {header}Content-Type: {mime}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::{Config, Mmds};
    use super::*;

    fn service(version: Version, imds_compat: bool) -> Service {
        let mmds = Mmds::new(10_000);
        mmds.put(json!({"age": 43, "name": {"first": "John", "last": "Doe"}})).unwrap();
        let network_interfaces = vec!["eth0".to_owned()];
        let config = Config { version, network_interfaces, ipv4_address: None, imds_compat };
        Service::new(Arc::new(mmds), config).unwrap()
    }

    /// Status line, headers and body of the answer to a whole request.
    fn asked(service: &Service, request: &str) -> (String, String, String) {
        let answered = answer(service, request.as_bytes(), Instant::now()).unwrap();
        assert_eq!(answered.used, request.len());
        let text = String::from_utf8(answered.reply).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let (status, headers) = head.split_once("\r\n").unwrap();
        let length = format!("Content-Length: {}", body.len());
        assert!(headers.ends_with(&length), "{headers}");
        assert_eq!(answered.is_last, headers.contains("Connection: close"), "{headers}");
        (status.into(), headers.into(), body.into())
    }

    fn token(service: &Service, header: &str) -> String {
        let request = format!("PUT /latest/api/token HTTP/1.1\r\n{header}: 60\r\n\r\n");
        let (status, headers, token) = asked(service, &request);
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert!(headers.contains(&format!("\r\n{header}: 60\r\n")), "{headers}");
        assert!(headers.contains("Content-Type: text/plain"));
        token
    }

    #[test]
    fn replies_have_the_version_the_type_and_the_manners_of_the_request() {
        let service = service(Version::V1, false);
        let bytes =
            answer(&service, b"GET /name/first HTTP/1.1\r\n\r\nGET", Instant::now()).unwrap();
        assert_eq!(bytes.used, 28);
        assert_eq!(
            String::from_utf8(bytes.reply).unwrap(),
            "HTTP/1.1 200 OK\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: text/plain\r\nContent-Length: 4\r\n\r\nJohn"
        );
        let (status, headers, _) = asked(&service, "GET / HTTP/1.0\r\n\r\n");
        assert_eq!(status, "HTTP/1.0 200 OK");
        assert!(headers.contains("Connection: close"));
        for (request, is_kept) in [
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: x, close\r\n\r\n", false),
            ("GET / HTTP/1.1\nHost: x\n\n", true),
        ] {
            let (_, headers, _) = asked(&service, request);
            assert_eq!(headers.contains("keep-alive"), is_kept, "{request}");
        }
    }

    #[test]
    fn waits_for_the_end_of_a_request() {
        let service = service(Version::V1, false);
        let request = b"GET /name HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
        for end in 0..request.len() {
            assert!(answer(&service, &request[..end], Instant::now()).is_none(), "{end}");
        }
        assert!(answer(&service, request, Instant::now()).is_some());
    }

    #[test]
    fn json_only_for_those_who_ask_for_nothing_else() {
        let plain = service(Version::V1, false);
        let compat = service(Version::V1, true);
        let get = |service, accept: &str| {
            let (status, headers, body) =
                asked(service, &format!("GET /name HTTP/1.1\r\n{accept}\r\n"));
            assert_eq!(status, "HTTP/1.1 200 OK");
            (headers.contains("Content-Type: application/json"), body)
        };
        let text = (false, "first\nlast".to_owned());
        let json = (true, r#"{"first":"John","last":"Doe"}"#.to_owned());
        for accept in
            ["", "Accept:\r\n", "Accept: */*\r\n", "Accept: text/plain\r\n", "Accept: a/b\r\n"]
        {
            assert_eq!(get(&plain, accept), text, "{accept}");
        }
        assert_eq!(get(&plain, "accept:  application/json \r\n"), json);
        assert_eq!(get(&compat, "Accept: application/json\r\n"), text);
    }

    #[test]
    fn errors_are_firecrackers() {
        let service = service(Version::V1, false);
        for (request, status, body) in [
            ("GET /invalid HTTP/1.0", "404 Not Found", "Resource not found: /invalid."),
            ("GET /name//x/ HTTP/1.0", "404 Not Found", "Resource not found: /name//x/."),
            (
                "GET /age HTTP/1.1",
                "501 Not Implemented",
                "Cannot retrieve value. The value has an unsupported type.",
            ),
            ("GET http:// HTTP/1.0", "400 Bad Request", "Invalid URI."),
            ("GET http://169.254.169.254 HTTP/1.0", "400 Bad Request", "Invalid URI."),
            ("GET name HTTP/1.1", "400 Bad Request", "Invalid URI."),
            ("PATCH / HTTP/1.1", "405 Method Not Allowed", "Not allowed HTTP method."),
            ("POST / HTTP/1.1", "501 Not Implemented", "Unsupported HTTP method."),
            ("GET / HTTP/2.0", "501 Not Implemented", "Unsupported HTTP version."),
            ("GET", "400 Bad Request", "Invalid request."),
            ("GET / HTTP/1.1\r\nContent-Length: 1", "400 Bad Request", "Invalid request."),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked", "400 Bad Request", "Invalid request."),
            ("GET / HTTP/1.1\r\nno colon", "400 Bad Request", "Invalid request."),
            ("PUT /token HTTP/1.1", "404 Not Found", "Resource not found: /token."),
            ("PUT /latest/api/token HTTP/1.1", "400 Bad Request", NO_TTL),
            (
                "PUT /latest/api/token HTTP/1.1\r\nx-metadata-token-ttl-seconds: 1s",
                "400 Bad Request",
                "Invalid header. Reason: Invalid value. Key:x-metadata-token-ttl-seconds; Value:1s",
            ),
            (
                "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 21601",
                "400 Bad Request",
                "Invalid time to live value provided for token: 21601. Please provide a value \
                 between 1 and 21600.",
            ),
            (
                "PUT /latest/api/token HTTP/1.1\r\nx-forwarded-for: me\r\nX-metadata-token-ttl-seconds: 60",
                "400 Bad Request",
                "Invalid header. Reason: Unsupported header name. Key: x-forwarded-for",
            ),
        ] {
            let (line, headers, said) = asked(&service, &format!("{request}\r\n\r\n"));
            assert_eq!((&line[9..], said.as_str()), (status, body), "{request}");
            assert!(headers.contains("Content-Type: text/plain"), "{headers}");
            assert_eq!(headers.contains("Allow: GET, PUT\r\n"), status.starts_with("405"));
        }
    }

    #[test]
    fn paths_may_have_slashes_to_spare_and_a_host_before_them() {
        let service = service(Version::V1, false);
        for target in ["//name///first", "/name/first/", "http://169.254.169.254/name//first"] {
            let (_, _, body) = asked(&service, &format!("GET {target} HTTP/1.1\r\n\r\n"));
            assert_eq!(body, "John", "{target}");
        }
    }

    #[test]
    fn version_2_wants_a_token_of_this_service() {
        let service = service(Version::V2, false);
        let get = |header: &str| {
            let (status, _, body) =
                asked(&service, &format!("GET /name/last HTTP/1.1\r\n{header}\r\n"));
            (status[9..12].to_owned(), body)
        };
        assert_eq!(get(""), ("401".into(), NO_TOKEN.into()));
        let not_valid = ("401".to_owned(), "MMDS token not valid.".to_owned());
        assert_eq!(get("X-metadata-token: x\r\n"), not_valid);
        assert_eq!(get("X-metadata-token: \u{e9}\r\n"), not_valid);
        for (ask, show) in TOKEN_TTL.into_iter().zip(TOKEN) {
            let token = token(&service, ask);
            assert_eq!(get(&format!("{show}: {token}\r\n")), ("200".into(), "Doe".into()));
            assert_eq!(get(&format!("{}: {token}\r\n", show.to_uppercase())).0, "200");
        }
        let counters = service.counters();
        assert_eq!((counters.rx_no_token().get(), counters.rx_invalid_token().get()), (1, 2));
    }

    #[test]
    fn version_1_knows_tokens_and_does_not_need_them() {
        let service = service(Version::V1, false);
        let token = token(&service, TOKEN_TTL[0]);
        for header in ["", "X-metadata-token: bad\r\n", &format!("X-metadata-token: {token}\r\n")] {
            let (_, _, body) = asked(&service, &format!("GET /name/last HTTP/1.1\r\n{header}\r\n"));
            assert_eq!(body, "Doe");
        }
        let counters = service.counters();
        assert_eq!((counters.rx_no_token().get(), counters.rx_invalid_token().get()), (1, 1));
    }
}
