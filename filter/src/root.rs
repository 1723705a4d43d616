//! Root contexts: configuration, and the registry stream of the VM.
//!
//! The root that is configured first opens the stream. When it goes and others stay, one of them takes over: it
//! subscribes anew, with the pages that are held. What kind of contexts a root makes need not be known, for the host
//! says it with every callback.

use std::collections::VecDeque;

use portolan_proto::v1::Scope;
use prost::Message;

use crate::config::{Config, ConfigError};
use crate::envoy::{EnvoyGrpc, GrpcService};
use crate::host::{Host, Level};
use crate::subscription::{Action, Subscription};
use crate::vm::Vm;

/// A configured root.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) config: Config,
    scope: Scope,
    subscriber: String,
}

/// Who holds the registry stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stream {
    /// The root context that opens it and gets the ticks.
    root: u32,
    /// The host's name for it while it is open.
    token: Option<u32>,
}

impl Stream {
    /// The root context that gets the ticks.
    pub(crate) fn root(self) -> u32 {
        self.root
    }
}

impl<H: Host> Vm<H> {
    /// A root has got its configuration. False: it cannot be used, and the log says why.
    pub fn on_configure(&mut self, context: u32) -> bool {
        self.refresh_log_level();
        let root = match self.read_root(context) {
            Ok(root) => root,
            Err(error) => {
                self.log(Level::Error, || format!("portolan: configuration refused: {error}"));
                return false;
            }
        };
        let same = |old: &Root| old.scope == root.scope && old.config.controller == root.config.controller;
        let others = |id: &u32| *id != context;
        if self.roots.iter().any(|(id, old)| others(id) && !same(old)) {
            self.log(Level::Warn, || {
                "portolan: plugins of one VM differ in scope or controller; those of the first are used".to_owned()
            });
        }
        let unchanged = self.roots.get(&context).is_some_and(same);
        self.roots.insert(context, root);
        self.report = self.roots.values().any(|root| root.config.report_decisions);
        self.destination_header = self.roots.values().all(|root| root.config.destination_header);
        match self.stream {
            None => self.take_over(context),
            Some(stream) if stream.root == context && !unchanged => {
                self.cancel();
                self.take_over(context);
            }
            Some(_) => {}
        }
        true
    }

    fn read_root(&self, context: u32) -> Result<Root, ConfigError> {
        let bytes = self.host.plugin_configuration().or_else(|status| {
            // "Not found" and "empty" are how hosts say that there is none.
            if matches!(status.0, 1 | 7) { Ok(Vec::new()) } else { Err(ConfigError::Host(status)) }
        })?;
        let config = Config::parse(&bytes)?;
        let scope = config.scope(&self.host)?;
        let subscriber = config.subscriber(&self.host, context);
        Ok(Root { config, scope, subscriber })
    }

    /// The period of this root's ticks has passed.
    pub fn on_tick(&mut self, context: u32) {
        if self.stream.is_some_and(|s| s.root == context) {
            self.refresh_log_level();
            if self.give_answers() {
                self.drive(Subscription::on_tick);
            }
            self.arm();
        }
    }

    /// A message has come on a stream.
    pub fn on_stream_message(&mut self, token: u32) {
        if self.is_open(token) {
            self.refresh_log_level();
            match self.host.stream_message() {
                Ok(message) => self.drive(|s| s.on_message(&message)),
                Err(status) => {
                    self.cancel();
                    self.drive(|s| s.on_close(&format!("a message cannot be read: {status}")));
                }
            }
        }
    }

    /// A stream has ended with this gRPC status.
    pub fn on_stream_close(&mut self, token: u32, status: u32) {
        if self.is_open(token) {
            self.set_token(None);
            self.drive(|s| s.on_close(&format!("gRPC status {status}")));
        }
    }

    /// A context is gone.
    pub fn on_delete(&mut self, context: u32) {
        self.pending.remove(&context);
        self.later.forget(context);
        self.roots.remove(&context);
        if self.stream.is_some_and(|s| s.root == context) {
            self.cancel();
            self.stream = None;
            if let Some(next) = self.roots.keys().next().copied() {
                self.take_over(next);
            }
        }
    }

    fn take_over(&mut self, context: u32) {
        let Some(root) = self.roots.get(&context) else { return };
        if let Err(status) = self.host.set_context(context) {
            self.log(Level::Warn, || format!("portolan: context {context} cannot be entered: {status}"));
        }
        let (scope, subscriber) = (root.scope.clone(), root.subscriber.clone());
        match &mut self.subscription {
            Some(subscription) => subscription.set_scope(scope, subscriber),
            None => {
                let now = self.host.now().unwrap_or_default();
                let seed = (now.as_secs() << 30) ^ u64::from(now.subsec_nanos()) ^ (u64::from(context) << 56);
                self.subscription = Some(Subscription::new(scope, subscriber, seed));
            }
        }
        self.stream = Some(Stream { root: context, token: None });
        self.later.moved();
        self.drive(Subscription::start);
    }

    fn is_open(&self, token: u32) -> bool {
        self.stream.is_some_and(|s| s.token == Some(token))
    }

    fn set_token(&mut self, token: Option<u32>) {
        if let Some(stream) = &mut self.stream {
            stream.token = token;
        }
    }

    fn cancel(&mut self) {
        if let Some(token) = self.stream.and_then(|s| s.token) {
            // If it fails there is no such stream, which is what is wanted.
            let _ = self.host.cancel(token);
            self.set_token(None);
        }
    }

    /// Tells the subscription something and does what it says, until it says nothing more.
    fn drive(&mut self, event: impl FnOnce(&mut Subscription) -> Vec<Action>) {
        let Some(subscription) = &mut self.subscription else { return };
        let mut actions = VecDeque::from(event(subscription));
        while let Some(action) = actions.pop_front() {
            actions.extend(self.act(action));
        }
        if let Some(subscription) = &self.subscription {
            self.metrics.show(&self.host, subscription);
        }
    }

    /// Does one thing; gives what follows from how it went.
    fn act(&mut self, action: Action) -> Vec<Action> {
        match action {
            Action::Open => {
                let opened = self.host.open_stream(&self.service());
                self.set_token(opened.ok());
                if let Some(subscription) = &mut self.subscription {
                    return match opened {
                        Ok(_) => subscription.on_open(),
                        Err(status) => subscription.on_close(&format!("it cannot be opened: {status}")),
                    };
                }
            }
            Action::Send(message) => {
                let sent = self.stream.and_then(|s| s.token).map(|token| self.host.send(token, &message));
                if let Some(Err(status)) = sent {
                    self.cancel();
                    if let Some(subscription) = &mut self.subscription {
                        return subscription.on_close(&format!("a message cannot be sent: {status}"));
                    }
                }
            }
            Action::Close => self.cancel(),
            Action::Tick(period) => {
                let now = self.host.now().unwrap_or_default();
                self.later.subscription(period, now);
                self.arm();
            }
            Action::Log(level, message) => self.log(level, || format!("portolan: {message}")),
            Action::Count(count) => self.metrics.count(&self.host, count),
        }
        Vec::new()
    }

    fn service(&self) -> Vec<u8> {
        let root = self.stream.and_then(|s| self.roots.get(&s.root));
        let cluster_name = root.map(|r| r.config.controller.clone()).unwrap_or_default();
        GrpcService { envoy_grpc: Some(EnvoyGrpc { cluster_name }) }.encode_to_vec()
    }

    fn refresh_log_level(&mut self) {
        self.log_level = self.host.log_level().unwrap_or(Level::Info as u32);
    }
}

#[cfg(test)]
mod tests {
    use portolan_proto::v1::watch_request::Message as Outgoing;
    use portolan_registry::row::CatchAll;

    use super::*;
    use crate::host::fake::{Call, Fake};
    use crate::subscription::State;
    use crate::testing::{CONFIGURATION, ROOT, STATUSES, configured, deliver, ready, rows, sent, whole, writer};

    const OTHER: u32 = 2;

    fn opened(calls: &[Call]) -> usize {
        calls.iter().filter(|c| matches!(c, Call::OpenStream(_))).count()
    }

    #[test]
    fn the_first_root_opens_the_only_stream() {
        let mut vm = configured(CONFIGURATION);
        assert!(vm.on_configure(OTHER));
        let calls = vm.host.calls();
        assert_eq!(opened(&calls), 1);
        assert!(calls.contains(&Call::OpenStream(b"\x0a\x0a\x0a\x08portolan".to_vec())));
        assert!(matches!(sent(&calls).as_slice(), [Outgoing::Subscribe(_)]));
    }

    #[test]
    fn a_bad_configuration_is_refused_and_the_log_names_the_field() {
        let mut vm = Vm::new(Fake::default());
        *vm.host.configuration.borrow_mut() = br#"{"namespace":"n","role":"router"}"#.to_vec();
        assert!(!vm.on_configure(ROOT));
        let line = "portolan: configuration refused: field `role`: expected `sidecar` or `gateway`";
        assert_eq!(vm.host.logs(), [line]);
        assert_eq!(opened(&vm.host.calls()), 0);
    }

    #[test]
    fn another_root_takes_over_with_the_pages_that_are_held() {
        let mut vm = ready(CatchAll::Block);
        assert!(vm.on_configure(OTHER));
        vm.on_delete(ROOT);
        let calls = vm.host.take_calls();
        assert!(calls.contains(&Call::Cancel(1)) && calls.contains(&Call::Context(OTHER)), "{calls:?}");
        match sent(&calls).as_slice() {
            [Outgoing::Subscribe(subscribe)] => assert!(!subscribe.held.is_empty()),
            other => panic!("expected Subscribe, got {other:?}"),
        }
        vm.on_tick(ROOT);
        vm.on_delete(OTHER);
        assert_eq!(opened(&vm.host.take_calls()), 0);
        assert!(vm.subscription().is_some_and(|s| s.state() == State::Stale));
    }

    #[test]
    fn a_new_configuration_of_the_same_scope_keeps_the_stream() {
        let mut vm = ready(CatchAll::Block);
        assert!(vm.on_configure(ROOT));
        assert_eq!(opened(&vm.host.take_calls()), 0);
        *vm.host.configuration.borrow_mut() = br#"{"namespace":"m"}"#.to_vec();
        assert!(vm.on_configure(ROOT));
        match sent(&vm.host.calls()).as_slice() {
            [Outgoing::Subscribe(s)] => assert_eq!(s.scope.as_ref().map(|s| s.namespace.as_str()), Some("m")),
            other => panic!("expected Subscribe, got {other:?}"),
        }
    }

    #[test]
    fn what_comes_for_another_stream_is_ignored() {
        let mut vm = ready(CatchAll::Block);
        vm.on_stream_message(99);
        vm.on_stream_close(99, 14);
        vm.on_tick(99);
        vm.on_delete(99);
        assert_eq!(vm.host.calls(), []);
        assert!(vm.subscription().is_some_and(|s| s.state() == State::Fresh));
    }

    #[test]
    fn the_gauges_follow_the_snapshot() {
        let mut vm = configured(CONFIGURATION);
        assert_eq!(vm.host.metrics().get("portolan.snapshot.state"), Some(&0));
        deliver(&mut vm, &whole(&writer(&rows(CatchAll::Block)), 5));
        let metrics = vm.host.metrics();
        assert_eq!(metrics.get("portolan.snapshot.state"), Some(&1));
        assert_eq!(metrics.get("portolan.snapshot.version"), Some(&5));
        assert!(metrics.get("portolan.snapshot.bytes").is_some_and(|bytes| *bytes > 0));
        assert_eq!(metrics.get("portolan.updates"), Some(&1));
        vm.on_stream_close(vm.host.token(), 14);
        assert_eq!(vm.host.metrics().get("portolan.snapshot.state"), Some(&2));
        assert_eq!(vm.host.metrics().get("portolan.stream_closed"), Some(&1));
    }

    /// Lets time pass until the stream is open again.
    fn reopen(vm: &mut Vm<Fake>) -> bool {
        let before = vm.host.token();
        for _ in 0..1000 {
            vm.on_tick(ROOT);
            if vm.host.token() > before {
                return true;
            }
        }
        false
    }

    #[test]
    fn whatever_call_fails_the_subscription_recovers() {
        let parts = whole(&writer(&rows(CatchAll::Block)), 1);
        for call in Fake::FALLIBLE {
            for status in STATUSES {
                let mut vm = Vm::new(Fake::default());
                *vm.host.configuration.borrow_mut() = CONFIGURATION.to_vec();
                vm.host.fail(call, status);
                let configured = vm.on_configure(ROOT);
                assert!(configured || call == "plugin_configuration", "{call} {status}");
                deliver(&mut vm, &parts);
                vm.on_stream_close(vm.host.token(), 14);
                (0..5).for_each(|_| vm.on_tick(ROOT));
                vm.host.heal();
                if configured {
                    vm.on_stream_close(vm.host.token(), 14);
                    assert!(reopen(&mut vm), "{call} {status}: {:?}", vm.host.logs());
                } else {
                    assert!(vm.on_configure(ROOT));
                }
                deliver(&mut vm, &parts);
                assert!(vm.subscription().is_some_and(|s| s.state() == State::Fresh), "{call} {status}");
                vm.host.fail(call, status);
                vm.on_delete(ROOT);
            }
        }
    }
}
