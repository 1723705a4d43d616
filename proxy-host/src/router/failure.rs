//! Why a request has no response, in Envoy's words.

use ::http::StatusCode;

use crate::{
    flags,
    upstream::{ChooseError, connect::ConnectError},
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
    Reset(hyper::Error, Tries),
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
            Self::Connect(_, tries) => flags::join("UF", tries.flag),
            Self::Overflow(tries) => flags::join("UO", tries.flag),
            Self::Reset(error, tries) if error.is_parse() => flags::join("UPE", tries.flag),
            Self::Reset(_, tries) => flags::join("UC", tries.flag),
            Self::Timeout { tries, .. } => flags::join("UT", tries.flag),
            Self::Idle { .. } => "SI",
            Self::Filter => "",
        }
    }

    /// Body for the client.
    #[must_use]
    pub fn body(&self) -> String {
        let before = |reason: &dyn std::fmt::Display, tries: &Tries| {
            let again = if tries.retried { "retried and the latest " } else { "" };
            format!("upstream connect error or disconnect/reset before headers. {again}reset reason: {reason}")
        };
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "no healthy upstream".into(),
            Self::Choose(ChooseError::Resolve(_)) => "DNS resolution failure".into(),
            Self::Connect(error, tries) => before(error, tries),
            Self::Overflow(tries) => before(&"overflow", tries),
            Self::Reset(error, tries) if error.is_parse() => before(&"protocol error", tries),
            Self::Reset(_, tries) => before(&"connection termination", tries),
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
            Self::Connect(error, _) => format!("upstream_reset_before_response_started{{{error}}}"),
            Self::Overflow(_) => "upstream_reset_before_response_started{overflow}".into(),
            Self::Reset(error, _) => format!("upstream_reset_before_response_started{{{error}}}"),
            Self::Timeout { attempt: true, .. } => "upstream_per_try_timeout".into(),
            Self::Timeout { .. } => "response_timeout".into(),
            Self::Idle { .. } => "stream_idle_timeout".into(),
            Self::Filter => "portolan_filter_failed".into(),
        }
    }
}
