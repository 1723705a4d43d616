//! The subscription to the registry, without I/O: told what happened, it says what to do.
//!
//! * An update takes effect whole, when its last part has come, or not at all. It is acknowledged, or refused with the
//!   reason. One that is refused is asked for again; refused twice, it is asked for from nothing.
//! * A stream that is lost, breaks the protocol or owes an answer for too long is opened again after a back-off, and
//!   resumes from the pages that are held. Meanwhile the last good snapshot decides.
//! * Time is counted in the ticks that were asked for; no clock is read. An idle subscription asks for none.

use portolan_proto::v1::watch_request::Message as Outgoing;
use portolan_proto::v1::{Ack, Nack, Scope, Subscribe, Taken, WatchRequest, WatchResponse};
use portolan_registry::snapshot::{FORMAT, Snapshot};
use prost::Message;

use crate::host::Level;

/// First back-off, in milliseconds; each failure in a row doubles it.
pub const BACKOFF_BASE: u32 = 100;
/// Longest back-off, in milliseconds.
pub const BACKOFF_MAX: u32 = 30_000;
/// How long the controller may owe an answer, in milliseconds.
pub const ANSWER_LIMIT: u32 = 30_000;
/// Longest message that is read, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Parts of an update that may be on their way at a time. A host reads all that has come before it turns to anything else,
/// so this bounds what an update keeps requests waiting; with two, one travels while the other is taken in.
pub const WINDOW: u32 = 2;
/// What a replaced snapshot took is freed in steps of this many chunks, one step in each period.
const RETIRE_STEP: usize = 4;
const RETIRE_PERIOD: u32 = 10;
const ANSWER_CHECK: u32 = 5_000;

/// What the snapshot in force is worth. The numbers are those of the gauge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is none yet.
    None = 0,
    /// It is the last that the controller sent.
    Fresh = 1,
    /// The stream is lost, or the last update was refused.
    Stale = 2,
}

/// Something to be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// An update took effect.
    Update,
    /// An update was refused.
    Refused,
    /// The stream ended or could not be opened.
    Closed,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Open the stream; answer with `on_open` or `on_close`.
    Open,
    /// Send a message on it.
    Send(Vec<u8>),
    /// Reset it; nothing more is expected from it.
    Close,
    /// Tick with this period in milliseconds from now on; 0: not at all.
    Tick(u32),
    /// Write to the log.
    Log(Level, String),
    /// Count.
    Count(Count),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// To be opened in this many milliseconds.
    Down { left: u32 },
    /// Open. `owed`: how long the controller has owed an answer.
    Up { owed: Option<u32> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Update {
    /// None is under way.
    None,
    /// Parts of this version are being staged.
    Staging(u64),
    /// This version has been refused; the parts that were on their way are ignored.
    Skipping(u64),
}

/// The subscription of one VM, with the snapshot that it keeps.
#[derive(Debug)]
pub struct Subscription {
    scope: Scope,
    subscriber: String,
    snapshot: Snapshot,
    /// Version in force.
    version: u64,
    fresh: bool,
    link: Link,
    update: Update,
    /// The next update begins from nothing, not from what is in force.
    from_nothing: bool,
    /// Attempts since the last good update.
    failures: u32,
    /// Updates refused since the last good one.
    refusals: u32,
    retiring: bool,
    tick: u32,
    random: Random,
    actions: Vec<Action>,
}

impl Subscription {
    /// A subscription for this scope, with nothing done yet. `seed` is for the jitter.
    pub fn new(scope: Scope, subscriber: String, seed: u64) -> Self {
        Subscription {
            scope,
            subscriber,
            snapshot: Snapshot::new(),
            version: 0,
            fresh: false,
            link: Link::Down { left: 0 },
            update: Update::None,
            from_nothing: true,
            failures: 0,
            refusals: 0,
            retiring: false,
            tick: 0,
            random: Random(seed | 1),
            actions: Vec::new(),
        }
    }

    /// Who subscribes from now on; takes effect when the stream is next opened.
    pub fn set_scope(&mut self, scope: Scope, subscriber: String) {
        self.scope = scope;
        self.subscriber = subscriber;
    }

    /// Whom it subscribes for.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The snapshot in force; `None` before the first.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        if self.snapshot.is_empty() { None } else { Some(&self.snapshot) }
    }

    /// What it is worth.
    pub fn state(&self) -> State {
        match (self.snapshot.is_empty(), self.fresh) {
            (true, _) => State::None,
            (false, true) => State::Fresh,
            (false, false) => State::Stale,
        }
    }

    /// Version in force; 0: none.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Begins, or begins anew on other hands: whatever stream and ticks there were are gone.
    pub fn start(&mut self) -> Vec<Action> {
        self.lose();
        self.tick = 0;
        self.link = Link::Down { left: 0 };
        self.actions.push(Action::Open);
        self.finish()
    }

    /// The stream is open.
    pub fn on_open(&mut self) -> Vec<Action> {
        self.link = Link::Up { owed: Some(0) };
        self.from_nothing = self.snapshot.is_empty() || self.refusals > 1;
        self.send(Outgoing::Subscribe(Subscribe {
            scope: Some(self.scope.clone()),
            subscriber: self.subscriber.clone(),
            format: u32::from(FORMAT),
            held: if self.from_nothing { Vec::new() } else { self.snapshot.held() },
            version: if self.from_nothing { 0 } else { self.version },
            window: WINDOW,
        }));
        self.finish()
    }

    /// A message has come.
    pub fn on_message(&mut self, message: &[u8]) -> Vec<Action> {
        if let Link::Up { owed } = &mut self.link {
            if owed.is_some() {
                *owed = Some(0);
            }
            if message.len() > MAX_MESSAGE {
                self.break_off(&format!("a message of {} bytes, expected at most {MAX_MESSAGE}", message.len()));
            } else {
                match WatchResponse::decode(message) {
                    Ok(part) => self.part(part),
                    Err(error) => self.break_off(&format!("a message that cannot be read: {error}")),
                }
            }
        }
        self.finish()
    }

    /// The stream has ended with this gRPC status, or could not be opened.
    pub fn on_close(&mut self, why: &str) -> Vec<Action> {
        self.down(why);
        self.finish()
    }

    /// One period has passed.
    pub fn on_tick(&mut self) -> Vec<Action> {
        let passed = self.tick;
        if self.retiring {
            self.retiring = self.snapshot.retire_some(RETIRE_STEP);
        }
        match &mut self.link {
            Link::Down { left } => {
                *left = left.saturating_sub(passed);
                if *left == 0 {
                    self.actions.push(Action::Open);
                }
            }
            Link::Up { owed: Some(owed) } => {
                *owed = owed.saturating_add(passed);
                if *owed >= ANSWER_LIMIT {
                    self.break_off("no answer in time");
                }
            }
            Link::Up { owed: None } => {}
        }
        self.finish()
    }

    fn part(&mut self, part: WatchResponse) {
        match self.update {
            Update::Skipping(version) if version == part.version => {
                if part.last {
                    self.update = Update::None;
                } else {
                    self.send(Outgoing::Taken(Taken { version }));
                }
                return;
            }
            Update::Staging(version) if version != part.version => {
                self.break_off(&format!("version {} before version {version} was complete", part.version));
                return;
            }
            Update::Staging(_) => {}
            Update::None | Update::Skipping(_) => {
                if self.from_nothing {
                    self.snapshot.reset();
                } else {
                    self.snapshot.abandon();
                }
                self.update = Update::Staging(part.version);
                if let Link::Up { owed } = &mut self.link {
                    *owed = Some(0);
                }
            }
        }
        for id in part.removed {
            self.snapshot.unstage(id);
        }
        for page in part.pages {
            if let Err(error) = self.snapshot.stage(page.id, page.data) {
                self.refuse(part.version, part.last, &error.to_string());
                return;
            }
        }
        if part.last {
            match self.snapshot.commit(part.digest) {
                Ok(()) => self.accept(part.version),
                Err(error) => self.refuse(part.version, true, &error.to_string()),
            }
        } else {
            self.send(Outgoing::Taken(Taken { version: part.version }));
        }
    }

    fn accept(&mut self, version: u64) {
        self.version = version;
        self.fresh = true;
        self.from_nothing = false;
        self.update = Update::None;
        self.failures = 0;
        self.refusals = 0;
        self.retiring = self.snapshot.is_retiring();
        self.link = Link::Up { owed: None };
        self.send(Outgoing::Ack(Ack { version }));
        self.actions.push(Action::Count(Count::Update));
        let bytes = self.snapshot.bytes();
        self.log(Level::Info, format!("snapshot {version} is in force, {bytes} bytes"));
    }

    fn refuse(&mut self, version: u64, last: bool, reason: &str) {
        self.snapshot.abandon();
        self.retiring = self.snapshot.is_retiring();
        self.fresh = false;
        // What follows a refusal is the whole state, whatever was in force.
        self.from_nothing = true;
        self.refusals = self.refusals.saturating_add(1);
        self.update = if last { Update::None } else { Update::Skipping(version) };
        self.send(Outgoing::Nack(Nack { version, reason: reason.to_owned() }));
        self.actions.push(Action::Count(Count::Refused));
        self.log(Level::Error, format!("update to {version} refused: {reason}"));
        if self.refusals > 1 {
            self.break_off("updates refused twice");
        } else if let Link::Up { owed } = &mut self.link {
            *owed = Some(0);
        }
    }

    fn break_off(&mut self, why: &str) {
        self.actions.push(Action::Close);
        self.down(why);
    }

    fn down(&mut self, why: &str) {
        self.lose();
        let left = self.backoff();
        self.failures = self.failures.saturating_add(1);
        self.link = Link::Down { left };
        self.actions.push(Action::Count(Count::Closed));
        self.log(Level::Warn, format!("registry stream lost: {why}; next attempt in {left} ms"));
    }

    fn lose(&mut self) {
        self.snapshot.abandon();
        self.retiring = self.snapshot.is_retiring();
        self.update = Update::None;
        self.fresh = false;
    }

    fn backoff(&mut self) -> u32 {
        let longest = BACKOFF_BASE.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        longest / 2 + self.random.below(longest / 2 + 1)
    }

    fn send(&mut self, message: Outgoing) {
        self.actions.push(Action::Send(WatchRequest { message: Some(message) }.encode_to_vec()));
    }

    fn log(&mut self, level: Level, message: String) {
        self.actions.push(Action::Log(level, message));
    }

    /// The actions, with a new period if another is needed.
    fn finish(&mut self) -> Vec<Action> {
        let needed = match self.link {
            Link::Down { left } => left,
            Link::Up { owed: Some(_) } => ANSWER_CHECK,
            Link::Up { owed: None } => 0,
        };
        let period = match (self.retiring, needed) {
            (false, needed) => needed,
            (true, 0) => RETIRE_PERIOD,
            (true, needed) => needed.min(RETIRE_PERIOD),
        };
        if period != self.tick {
            self.tick = period;
            self.actions.push(Action::Tick(period));
        }
        std::mem::take(&mut self.actions)
    }
}

/// xorshift64: enough to keep workers from knocking all at once.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let high = u32::try_from(self.0 >> 32).unwrap_or_default();
        high.checked_rem(limit).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "subscription_tests.rs"]
mod tests;
