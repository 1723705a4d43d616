//! Numbers and encodings of the proxy-wasm ABI, version 0.2.1.

use bytes::Bytes;

/// Result of a hostcall, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No such header, property, key, token or cluster.
    NotFound = 1,
    /// An argument is out of its range, or not allowed in this context.
    BadArgument = 2,
    /// The guest's bytes are not a serialized map.
    SerializationFailure = 3,
    /// The guest's bytes could not be parsed.
    ParseFailure = 4,
    /// A pointer or length lies outside the guest's memory.
    InvalidMemoryAccess = 6,
    /// The queue is empty.
    Empty = 7,
    /// The value changed since it was read.
    CasMismatch = 8,
    /// The host could not do it.
    InternalFailure = 10,
    /// The host does not offer it.
    Unimplemented = 12,
}

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Finest.
    Trace = 0,
    /// For developers.
    Debug = 1,
    /// Normal operation.
    Info = 2,
    /// Something looks wrong.
    Warn = 3,
    /// Something failed.
    Error = 4,
    /// The filter cannot go on.
    Critical = 5,
}

/// The header and metadata maps a guest may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapType {
    /// Request headers with `:method`, `:scheme`, `:authority` and `:path`.
    RequestHeaders,
    /// Request trailers.
    RequestTrailers,
    /// Response headers with `:status`.
    ResponseHeaders,
    /// Response trailers.
    ResponseTrailers,
    /// Initial metadata of the gRPC response being delivered.
    GrpcInitialMetadata,
    /// Trailing metadata of the gRPC response being delivered.
    GrpcTrailingMetadata,
    /// Headers of the HTTP call response being delivered.
    CallResponseHeaders,
    /// Trailers of the HTTP call response being delivered.
    CallResponseTrailers,
}

/// The byte buffers a guest may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferType {
    /// Body of the request.
    RequestBody,
    /// Body of the response.
    ResponseBody,
    /// Bytes from the client of a TCP connection.
    DownstreamData,
    /// Bytes from the upstream of a TCP connection.
    UpstreamData,
    /// Body of the HTTP call response being delivered.
    CallResponseBody,
    /// gRPC message being delivered.
    GrpcReceive,
    /// Configuration of the VM.
    VmConfiguration,
    /// Configuration of the current context's plugin.
    PluginConfiguration,
    /// Arguments of a foreign function call into the guest.
    CallData,
}

/// Direction or side of a stream that is continued or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamType {
    /// Request of an HTTP stream.
    Request,
    /// Response of an HTTP stream.
    Response,
    /// Client side of a TCP connection.
    Downstream,
    /// Upstream side of a TCP connection.
    Upstream,
}

/// Who closed a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PeerType {
    /// Not known.
    Unknown = 0,
    /// This proxy.
    Local = 1,
    /// The other end.
    Remote = 2,
}

/// What a metric does with its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution of recorded values.
    Histogram,
}

impl LogLevel {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::Trace,
            1 => Self::Debug,
            2 => Self::Info,
            3 => Self::Warn,
            4 => Self::Error,
            5 => Self::Critical,
            _ => return Err(Status::BadArgument),
        })
    }
}

impl MapType {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::RequestHeaders,
            1 => Self::RequestTrailers,
            2 => Self::ResponseHeaders,
            3 => Self::ResponseTrailers,
            4 => Self::GrpcInitialMetadata,
            5 => Self::GrpcTrailingMetadata,
            6 => Self::CallResponseHeaders,
            7 => Self::CallResponseTrailers,
            _ => return Err(Status::BadArgument),
        })
    }
}

impl BufferType {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::RequestBody,
            1 => Self::ResponseBody,
            2 => Self::DownstreamData,
            3 => Self::UpstreamData,
            4 => Self::CallResponseBody,
            5 => Self::GrpcReceive,
            6 => Self::VmConfiguration,
            7 => Self::PluginConfiguration,
            8 => Self::CallData,
            _ => return Err(Status::BadArgument),
        })
    }
}

impl StreamType {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::Request,
            1 => Self::Response,
            2 => Self::Downstream,
            3 => Self::Upstream,
            _ => return Err(Status::BadArgument),
        })
    }
}

impl MetricKind {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::Counter,
            1 => Self::Gauge,
            2 => Self::Histogram,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// Names and values in order, as they cross the ABI.
pub type Pairs = Vec<(Bytes, Bytes)>;

/// Writes a map as the ABI's pairs: count, lengths, then each name and value with a NUL behind it.
/// `pairs` is asked three times for the same pairs.
pub(super) fn write_pairs<'a, I: Iterator<Item = (&'a [u8], &'a [u8])>>(out: &mut Vec<u8>, pairs: impl Fn() -> I) {
    // Chained iterators are several times faster from within than by a loop outside.
    let (count, bytes) = pairs().fold((0, 0), |(n, bytes), (name, value)| (n + 1, bytes + name.len() + value.len()));
    out.reserve(4 + 10 * count + bytes);
    out.extend_from_slice(&length(count));
    pairs().for_each(|(name, value)| {
        out.extend_from_slice(&length(name.len()));
        out.extend_from_slice(&length(value.len()));
    });
    pairs().for_each(|(name, value)| {
        out.extend_from_slice(name);
        out.push(0);
        out.extend_from_slice(value);
        out.push(0);
    });
}

fn length(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes()
}

/// Names and values, as they lie in guest memory.
pub(super) type RawPairs<'b> = Vec<(&'b [u8], &'b [u8])>;

/// Reads the ABI's pairs out of guest bytes; no bytes at all are an empty map.
pub(super) fn read_pairs(bytes: &[u8]) -> Result<RawPairs<'_>, Status> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let word = |at: usize| -> Result<usize, Status> {
        let raw = bytes.get(at..at + 4).ok_or(Status::SerializationFailure)?;
        let raw = <[u8; 4]>::try_from(raw).map_err(|_| Status::SerializationFailure)?;
        Ok(u32::from_le_bytes(raw) as usize)
    };
    let count = word(0)?;
    // A count that the bytes cannot hold must not reserve memory.
    if count > bytes.len() / 8 {
        return Err(Status::SerializationFailure);
    }
    let mut at = 4 + count * 8;
    let mut take = |len: usize| -> Result<&[u8], Status> {
        let end = at.checked_add(len).ok_or(Status::SerializationFailure)?;
        let part = bytes.get(at..end).ok_or(Status::SerializationFailure)?;
        at = end + 1;
        Ok(part)
    };
    let mut pairs = Vec::with_capacity(count);
    for index in 0..count {
        let name = take(word(4 + index * 8)?)?;
        let value = take(word(8 + index * 8)?)?;
        pairs.push((name, value));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_survive_a_round_trip() {
        let pairs: [(&[u8], &[u8]); 2] = [(b":path", b"/"), (b"x", b"")];
        let mut bytes = Vec::new();
        write_pairs(&mut bytes, || pairs.iter().copied());
        assert_eq!(read_pairs(&bytes), Ok(pairs.to_vec()));
    }

    #[test]
    fn truncated_pairs_are_refused_at_every_length() {
        let pairs: [(&[u8], &[u8]); 1] = [(b"name", b"value")];
        let mut bytes = Vec::new();
        write_pairs(&mut bytes, || pairs.iter().copied());
        // The last NUL is not needed to read the value.
        for len in 1..bytes.len() - 1 {
            assert_eq!(read_pairs(&bytes[..len]), Err(Status::SerializationFailure), "length {len}");
        }
    }

    #[test]
    fn a_huge_count_is_refused() {
        assert_eq!(read_pairs(&u32::MAX.to_le_bytes()), Err(Status::SerializationFailure));
    }
}
