//! A host in memory: it answers from what a test has put in, and remembers what it was told.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use super::{Answer, Host, Level, MetricKind, Result, Status, pairs};

/// Something the filter had the host do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// A line of the log.
    Log(Level, String),
    /// The period of ticks, in milliseconds.
    Tick(u32),
    /// The effective context.
    Context(u32),
    /// A header removed.
    Remove(Vec<u8>),
    /// A header set.
    Replace(String, Vec<u8>),
    /// A header added.
    Add(String, Vec<u8>),
    /// A header of the response set.
    ReplaceResponse(String, Vec<u8>),
    /// A header of the response added.
    AddResponse(String, Vec<u8>),
    /// A header of the response removed.
    RemoveResponse(String),
    /// An answer to the request.
    Answer(Answer),
    /// An answer to the request: status, details, body.
    Respond(u16, String, String),
    /// The request reset.
    Reset,
    /// The client's connection closed.
    CloseDownstream,
    /// A foreign function, with its arguments.
    Foreign(String, Vec<u8>),
    /// A stream opened to this service.
    OpenStream(Vec<u8>),
    /// A message sent.
    Send(u32, Vec<u8>),
    /// A stream reset.
    Cancel(u32),
    /// A property of the stream set.
    Property(String, Vec<u8>),
    /// A metric defined.
    DefineMetric(String),
}

/// The host. Every call that can fail has the name of its method in [`Host`].
#[derive(Debug, Default)]
pub struct Fake {
    /// Answer to `request_headers`.
    pub headers: RefCell<Vec<u8>>,
    /// Properties; the parts of a path are joined by NUL.
    pub properties: RefCell<BTreeMap<String, Vec<u8>>>,
    /// Answer to `plugin_configuration`.
    pub configuration: RefCell<Vec<u8>>,
    /// Answer to `stream_message`.
    pub message: RefCell<Vec<u8>>,
    calls: RefCell<Vec<Call>>,
    /// Names of the metrics by id.
    names: RefCell<Vec<String>>,
    metrics: RefCell<BTreeMap<String, u64>>,
    failing: RefCell<BTreeMap<&'static str, u32>>,
    tokens: Cell<u32>,
    passed: Cell<Duration>,
}

impl Fake {
    /// Names of the calls that can fail.
    pub const FALLIBLE: [&'static str; 26] = [
        "log_level",
        "now",
        "set_tick",
        "set_context",
        "property",
        "set_property",
        "plugin_configuration",
        "request_headers",
        "replace_request_header",
        "remove_request_header",
        "add_request_header",
        "answer",
        "replace_response_header",
        "add_response_header",
        "remove_response_header",
        "local_response",
        "reset_request",
        "close_downstream",
        "foreign",
        "open_stream",
        "send",
        "cancel",
        "stream_message",
        "define_metric",
        "increment_metric",
        "record_metric",
    ];

    /// From now on this call fails with this status.
    pub fn fail(&self, call: &'static str, status: u32) {
        self.failing.borrow_mut().insert(call, status);
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        self.passed.set(self.passed.get() + time);
    }

    /// No call fails any more.
    pub fn heal(&self) {
        self.failing.borrow_mut().clear();
    }

    /// Sets a property.
    pub fn set_property(&self, path: &str, value: &[u8]) {
        self.properties.borrow_mut().insert(path.to_owned(), value.to_vec());
    }

    /// Sets the headers of the request.
    pub fn set_headers(&self, headers: &[(&[u8], &[u8])]) {
        let owned: Vec<_> = headers.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        *self.headers.borrow_mut() = pairs::write(&owned);
    }

    /// Everything the filter did so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.borrow().clone()
    }

    /// The same, and forgets it.
    pub fn take_calls(&self) -> Vec<Call> {
        self.calls.take()
    }

    /// Lines of the log, without their levels.
    pub fn logs(&self) -> Vec<String> {
        let line = |call: &Call| if let Call::Log(_, line) = call { Some(line.clone()) } else { None };
        self.calls.borrow().iter().filter_map(line).collect()
    }

    /// Values of the metrics.
    pub fn metrics(&self) -> BTreeMap<String, u64> {
        self.metrics.borrow().clone()
    }

    /// Token of the last stream that was opened; 0: none.
    pub fn token(&self) -> u32 {
        self.tokens.get()
    }

    fn may(&self, call: &'static str) -> Result {
        self.failing.borrow().get(call).map_or(Ok(()), |status| Err(Status(*status)))
    }

    fn did(&self, name: &'static str, call: Call) -> Result {
        self.calls.borrow_mut().push(call);
        self.may(name)
    }

    fn metric(&self, id: u32, change: impl FnOnce(&mut u64)) -> Result {
        let names = self.names.borrow();
        let mut metrics = self.metrics.borrow_mut();
        let value = names.get(id as usize).and_then(|name| metrics.get_mut(name));
        value.map(change).ok_or(Status(1))
    }
}

impl Host for Fake {
    fn log(&self, level: Level, message: &str) {
        self.calls.borrow_mut().push(Call::Log(level, message.to_owned()));
    }

    fn log_level(&self) -> Result<u32> {
        self.may("log_level").map(|()| 0)
    }

    fn now(&self) -> Result<Duration> {
        self.may("now").map(|()| Duration::from_secs(1_700_000_000) + self.passed.get())
    }

    fn set_tick(&self, period: u32) -> Result {
        self.did("set_tick", Call::Tick(period))
    }

    fn set_context(&self, context: u32) -> Result {
        self.did("set_context", Call::Context(context))
    }

    fn property(&self, path: &str) -> Option<Vec<u8>> {
        self.may("property").ok()?;
        self.properties.borrow().get(path).cloned()
    }

    fn set_property(&self, name: &str, value: &[u8]) -> Result {
        self.did("set_property", Call::Property(name.to_owned(), value.to_vec()))
    }

    fn plugin_configuration(&self) -> Result<Vec<u8>> {
        self.may("plugin_configuration").map(|()| self.configuration.borrow().clone())
    }

    fn request_headers(&self) -> Result<Vec<u8>> {
        self.may("request_headers").map(|()| self.headers.borrow().clone())
    }

    fn replace_request_header(&self, name: &str, value: &[u8]) -> Result {
        self.did("replace_request_header", Call::Replace(name.to_owned(), value.to_vec()))
    }

    fn remove_request_header(&self, name: &[u8]) -> Result {
        self.did("remove_request_header", Call::Remove(name.to_vec()))
    }

    fn add_request_header(&self, name: &str, value: &[u8]) -> Result {
        self.did("add_request_header", Call::Add(name.to_owned(), value.to_vec()))
    }

    fn answer(&self, answer: &Answer) -> Result {
        self.did("answer", Call::Answer(answer.clone()))
    }

    fn replace_response_header(&self, name: &str, value: &[u8]) -> Result {
        self.did("replace_response_header", Call::ReplaceResponse(name.to_owned(), value.to_vec()))
    }

    fn add_response_header(&self, name: &str, value: &[u8]) -> Result {
        self.did("add_response_header", Call::AddResponse(name.to_owned(), value.to_vec()))
    }

    fn remove_response_header(&self, name: &str) -> Result {
        self.did("remove_response_header", Call::RemoveResponse(name.to_owned()))
    }

    fn local_response(&self, status: u16, details: &str, body: &str) -> Result {
        self.did("local_response", Call::Respond(status, details.to_owned(), body.to_owned()))
    }

    fn reset_request(&self) -> Result {
        self.did("reset_request", Call::Reset)
    }

    fn close_downstream(&self) -> Result {
        self.did("close_downstream", Call::CloseDownstream)
    }

    fn foreign(&self, function: &str, arguments: &[u8]) -> Result {
        self.did("foreign", Call::Foreign(function.to_owned(), arguments.to_vec()))
    }

    fn open_stream(&self, service: &[u8]) -> Result<u32> {
        self.did("open_stream", Call::OpenStream(service.to_vec()))?;
        self.tokens.set(self.tokens.get() + 1);
        Ok(self.tokens.get())
    }

    fn send(&self, token: u32, message: &[u8]) -> Result {
        self.did("send", Call::Send(token, message.to_vec()))
    }

    fn cancel(&self, token: u32) -> Result {
        self.did("cancel", Call::Cancel(token))
    }

    fn stream_message(&self) -> Result<Vec<u8>> {
        self.may("stream_message").map(|()| self.message.borrow().clone())
    }

    fn define_metric(&self, _: MetricKind, name: &str) -> Result<u32> {
        self.did("define_metric", Call::DefineMetric(name.to_owned()))?;
        let mut names = self.names.borrow_mut();
        names.push(name.to_owned());
        self.metrics.borrow_mut().insert(name.to_owned(), 0);
        u32::try_from(names.len() - 1).map_err(|_| Status(10))
    }

    fn increment_metric(&self, id: u32, by: i64) -> Result {
        self.may("increment_metric")?;
        self.metric(id, |value| *value = value.saturating_add_signed(by))
    }

    fn record_metric(&self, id: u32, value: u64) -> Result {
        self.may("record_metric")?;
        self.metric(id, |v| *v = value)
    }
}
