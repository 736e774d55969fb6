//! HTTP/1.1 as far as a control socket needs it (RFC 9112): requests with a length, answers with a length, nothing else.
//! What is malformed, too long, or of another kind gets one clear error, and the connection ends.

/// The longest head of a request, in bytes.
pub const HEAD_LIMIT: usize = 8 * 1024;

/// The longest body of a request, in bytes.
pub const BODY_LIMIT: usize = 64 * 1024;

const HEADERS: usize = 32;

/// A method of the API.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// Asks.
    Get,
    /// Does.
    Put,
}

/// One request, whole.
#[derive(PartialEq, Eq, Debug)]
pub struct Request {
    /// GET or PUT.
    pub method: Method,
    /// The path, without query.
    pub path: String,
    /// The body; empty where there is none.
    pub body: Vec<u8>,
    /// Whether another request may follow on this connection.
    pub keep_alive: bool,
}

/// A request that can't be served, with its HTTP status.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HttpError {
    /// Not HTTP.
    #[error("this is no HTTP/1.1 request")]
    Malformed,
    /// A method that no path has.
    #[error("the method is neither GET nor PUT")]
    Method,
    /// Too long a head.
    #[error("the request's head is longer than {HEAD_LIMIT} bytes or has more than {HEADERS} fields")]
    Head,
    /// Too long a body.
    #[error("the request's body is longer than {BODY_LIMIT} bytes")]
    Body,
    /// A body without, or with two, lengths.
    #[error("a request's body has one Content-Length and no Transfer-Encoding")]
    Length,
}

impl HttpError {
    /// The status to answer with.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed | Self::Length => 400,
            Self::Method => 405,
            Self::Head => 431,
            Self::Body => 413,
        }
    }
}

/// The request at the start of `bytes` and how many bytes it took; `None` where more must come.
pub fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(&bytes[..bytes.len().min(HEAD_LIMIT)]) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= HEAD_LIMIT => return Err(HttpError::Head),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(HttpError::Head),
        Err(_) => return Err(HttpError::Malformed),
    };
    if head.version != Some(1) {
        return Err(HttpError::Malformed);
    }
    let method = match head.method {
        Some("GET") => Method::Get,
        Some("PUT") => Method::Put,
        _ => return Err(HttpError::Method),
    };
    let path = head.path.unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
    let body_length = body_length(head.headers)?;
    let end = length + body_length;
    if bytes.len() < end {
        return Ok(None);
    }
    let keep_alive = !values(head.headers, "connection").any(|v| v.eq_ignore_ascii_case(b"close"));
    Ok(Some((Request { method, path, body: bytes[length..end].to_vec(), keep_alive }, end)))
}

fn values<'h>(headers: &'h [httparse::Header<'h>], name: &'static str) -> impl Iterator<Item = &'h [u8]> {
    headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, HttpError> {
    if values(headers, "transfer-encoding").next().is_some() {
        return Err(HttpError::Length);
    }
    let mut lengths = values(headers, "content-length");
    let (first, second) = (lengths.next(), lengths.next());
    let Some(text) = first else { return Ok(0) };
    if second.is_some() || text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(HttpError::Length);
    }
    let length = std::str::from_utf8(text).ok().and_then(|t| t.parse::<usize>().ok()).ok_or(HttpError::Body)?;
    if length > BODY_LIMIT { Err(HttpError::Body) } else { Ok(length) }
}

/// An answer as bytes. Without a body it is 204, whatever `status` of success was given.
pub fn answer(status: u16, body: Option<&str>, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "" } else { "Connection: close\r\n" };
    let kind = if status < 400 { "application/json" } else { "application/problem+json" };
    let head = format!("HTTP/1.1 {status} {}\r\nServer: fealty\r\n{connection}", reason(status));
    match body {
        None => format!("{head}\r\n").into_bytes(),
        Some(body) => {
            format!("{head}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// The status and the body of the answer in `bytes`; `None` where more must come. For `fealty ctl`.
pub fn parse_answer(bytes: &[u8]) -> Result<Option<(u16, Vec<u8>)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() > HEAD_LIMIT => return Err(HttpError::Head),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(HttpError::Malformed),
    };
    let end = length + body_length(head.headers)?;
    let status = head.code.ok_or(HttpError::Malformed)?;
    Ok((bytes.len() >= end).then(|| (status, bytes[length..end].to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_when_it_is_whole() {
        let text = b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET ";
        for cut in 0..text.len() - 4 {
            assert_eq!(parse(&text[..cut]), Ok(None), "{cut}");
        }
        let (request, taken) = parse(text).expect("good").expect("whole");
        assert_eq!(
            (request.method, request.path.as_str(), &request.body[..]),
            (Method::Put, "/api/v1/vm.pause", &b"{}"[..])
        );
        assert_eq!((taken, request.keep_alive), (text.len() - 4, true));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let bad = |fields: &str| parse(format!("PUT / HTTP/1.1\r\n{fields}\r\n\r\n").as_bytes());
        assert_eq!(bad("Content-Length: 1\r\nContent-Length: 2"), Err(HttpError::Length));
        assert_eq!(bad("Content-Length: +1"), Err(HttpError::Length));
        assert_eq!(bad("Content-Length: 99999999999999999999999"), Err(HttpError::Body));
        assert_eq!(bad("Content-Length: 65537"), Err(HttpError::Body));
        assert_eq!(bad("Transfer-Encoding: chunked"), Err(HttpError::Length));
        assert_eq!(parse(b"POST / HTTP/1.1\r\n\r\n"), Err(HttpError::Method));
        assert_eq!(parse(b"GET / HTTP/1.0\r\n\r\n"), Err(HttpError::Malformed));
        assert_eq!(parse(b"\x16\x03\x01"), Err(HttpError::Malformed));
        assert_eq!(parse(&[b"GET /".as_slice(), &[b'a'; HEAD_LIMIT]].concat()), Err(HttpError::Head));
        assert_eq!(parse(format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40)).as_bytes()), Err(HttpError::Head));
    }

    #[test]
    fn answers_are_read_back() {
        assert_eq!(parse_answer(&answer(200, Some("{}"), true)), Ok(Some((200, b"{}".to_vec()))));
        assert_eq!(parse_answer(&answer(204, None, false)), Ok(Some((204, Vec::new()))));
    }
}
