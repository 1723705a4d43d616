//! Why a request has no response, in Envoy's words.

use std::io;

use ::http::StatusCode;

use crate::{
    flags,
    upstream::{ChooseError, answer::Broken, connect::ConnectError},
};

/// What has been tried before the failure that is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tries {
    /// It was not the first attempt.
    pub retried: bool,
    /// Flag that says why it was not tried again; empty where nothing asked for that.
    pub flag: &'static str,
}

/// Why there is no response; texts, statuses and flags are Envoy's (SEMANTICS 8.4).
#[derive(Debug)]
pub enum Failure {
    /// The cluster has nowhere to go.
    Choose(ChooseError),
    /// No endpoint could be connected to.
    Connect(ConnectError, Tries),
    /// There are as many requests or connections as there may be.
    Overflow(Tries),
    /// The connection ended before the response.
    Reset(Broken, Tries),
    /// The time for the request, or for the last attempt, has passed.
    Timeout {
        /// It was the attempt's.
        attempt: bool,
        /// The client wants 204 in place of 504 (`x-envoy-upstream-rq-timeout-alt-response`).
        no_content: bool,
        /// What has been tried.
        tries: Tries,
    },
    /// Nothing has moved for too long.
    Idle {
        /// The client had said all.
        whole: bool,
    },
    /// The filter left headers that make no request, or did not let the response pass.
    Filter,
}

impl Failure {
    /// Status for the client.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Reset(error, _) if error.is_parse() => StatusCode::BAD_GATEWAY,
            Self::Timeout { no_content: true, .. } => StatusCode::NO_CONTENT,
            Self::Idle { whole: false } => StatusCode::REQUEST_TIMEOUT,
            Self::Timeout { .. } | Self::Idle { whole: true } => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Flags for the access log.
    #[must_use]
    pub fn flags(&self) -> &'static str {
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "UH",
            Self::Choose(ChooseError::Resolve(_)) => "DF",
            Self::Connect(_, tries) => flags::join(tries.flag, "UF"),
            Self::Overflow(tries) => flags::join(tries.flag, "UO"),
            Self::Reset(error, tries) => flags::join(tries.flag, reset(error).0),
            Self::Timeout { tries, .. } => flags::join(tries.flag, "UT"),
            Self::Idle { .. } => "SI",
            Self::Filter => "",
        }
    }

    /// Body for the client.
    #[must_use]
    pub fn body(&self) -> String {
        let before = |reason: &str, tries: &Tries| {
            let again = if tries.retried { "retried and the latest " } else { "" };
            format!("upstream connect error or disconnect/reset before headers. {again}reset reason: {reason}")
        };
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "no healthy upstream".into(),
            Self::Choose(ChooseError::Resolve(_)) => "DNS resolution failure".into(),
            Self::Connect(error, tries) => before(error.reason(), tries),
            Self::Overflow(tries) => before("overflow", tries),
            Self::Reset(error, tries) => before(reset(error).1, tries),
            Self::Timeout { no_content: true, .. } => String::new(),
            Self::Timeout { .. } => "upstream request timeout".into(),
            Self::Idle { .. } => "stream timeout".into(),
            Self::Filter => "portolan: the filter failed\n".into(),
        }
    }

    /// Response code details.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "no_healthy_upstream".into(),
            Self::Choose(ChooseError::Resolve(error)) => format!("dns_resolution_failure{{{error}}}"),
            Self::Connect(error, _) => details("before", &error.details()),
            Self::Overflow(_) => details("before", "overflow"),
            Self::Reset(error, _) => details("before", reset(error).1),
            Self::Timeout { attempt: true, .. } => "upstream_per_try_timeout".into(),
            Self::Timeout { .. } => "response_timeout".into(),
            Self::Idle { .. } => "stream_idle_timeout".into(),
            Self::Filter => "portolan_filter_failed".into(),
        }
    }
}

/// Details hold no white space, as in Envoy.
fn details(when: &str, reason: &str) -> String {
    format!("upstream_reset_{when}_response_started{{{}}}", reason.replace(char::is_whitespace, "_"))
}

/// Flag and reason of an upstream's connection or stream that ended before its answer.
fn reset(error: &Broken) -> (&'static str, &'static str) {
    if error.is_parse() {
        return ("UPE", "protocol error");
    }
    match error.reset_by_server() {
        Some(h2::Reason::REFUSED_STREAM) => ("UR", "remote refused stream reset"),
        Some(_) => ("UR", "remote reset"),
        None => ("UC", "connection termination"),
    }
}

/// Flag and response code details of an answer that ended in its middle.
#[must_use]
pub fn cut(error: &Broken) -> (&'static str, String) {
    let (flag, reason) = match error.io_kind() {
        // In HTTP/1.1 it is less than was announced, or no chunk.
        Some(io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {
            ("UPE", "protocol error")
        }
        _ => reset(error),
    };
    (flag, details("after", reason))
}
