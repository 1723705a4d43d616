//! The VM of one thread, and the streams that wait for what their filter decides.
//!
//! As Envoy with `failure_policy: FAIL_RELOAD`: a filter that crashes fails the streams it has with a 503, and is
//! started afresh, at most once a second; until it runs again, every stream is answered with 503.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{
    attributes::Info,
    outside::{HostEnv, Outside},
};
use crate::{
    exec,
    vm::{
        ContextId, EffectKind, Engine, HttpState, LocalResponse, MapType, NetworkState, Outcome, RequestHead,
        ResponseHead, StartError, StreamType, Trap, Vm, VmConfig, Wants,
    },
};

/// A VM that crashes sooner after its start than this is replaced only after this time.
const RESTART: Duration = Duration::from_secs(1);

/// There is no VM, or it crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unavailable;

/// Why a stream ends before its time.
#[derive(Debug)]
pub enum Abort {
    /// The filter answers.
    Respond(Box<LocalResponse>),
    /// The filter resets or closes it.
    Close,
    /// The filter crashed.
    Failed,
    /// The body does not fit into the buffer.
    TooLarge,
}

/// What a callback comes to.
#[derive(Debug)]
pub enum Step {
    /// Go on.
    Go,
    /// Keep it until the direction is continued.
    Wait,
    /// End the stream.
    Abort(Abort),
}

/// A thread's filter.
pub struct Host {
    vm: RefCell<Option<Vm>>,
    /// Number of the VM; what was meant for an earlier one is dropped.
    generation: Cell<u64>,
    started: Cell<Instant>,
    engine: Engine,
    config: VmConfig,
    outside: Rc<Outside>,
    streams: RefCell<HashMap<ContextId, Rc<Signals>>>,
}

/// What has been asked of a stream outside its own callbacks.
#[derive(Default)]
struct Signals {
    resumed: [Cell<bool>; 2],
    resume: [Notify; 2],
    abort: RefCell<Option<Abort>>,
    aborted: Notify,
}

fn direction(stream: StreamType) -> usize {
    usize::from(matches!(stream, StreamType::Response | StreamType::Upstream))
}

impl Signals {
    fn raise(&self, abort: Abort) {
        let mut slot = self.abort.borrow_mut();
        // The first one counts.
        if slot.is_none() {
            *slot = Some(abort);
        }
        self.aborted.notify_one();
    }

    fn effect(&self, effect: EffectKind) {
        match effect {
            EffectKind::Continue(stream) => {
                let direction = direction(stream);
                self.resumed[direction].set(true);
                self.resume[direction].notify_one();
            }
            EffectKind::Respond(response) => self.raise(Abort::Respond(response)),
            EffectKind::Close(_) => self.raise(Abort::Close),
        }
    }
}

impl Host {
    /// Starts the first VM. Has to be called inside the thread's `LocalSet`.
    ///
    /// # Errors
    /// The module does not start, or refuses its configuration.
    pub fn start(engine: Engine, mut config: VmConfig, outside: Rc<Outside>) -> Result<Rc<Self>, StartError> {
        let (ready, mut queues) = tokio::sync::mpsc::unbounded_channel();
        // Queues are filled from any thread.
        config.queue_waker = Some(std::sync::Arc::new(move |root, queue| {
            let _ = ready.send((root, queue));
        }));
        let host = Rc::new(Self {
            vm: RefCell::new(None),
            generation: Cell::new(0),
            started: Cell::new(Instant::now()),
            engine,
            config,
            outside,
            streams: RefCell::default(),
        });
        host.restart()?;
        let weak = Rc::downgrade(&host);
        exec::spawn(async move {
            while let Some((root, queue)) = queues.recv().await {
                let Some(host) = weak.upgrade() else { return };
                // A crash has been dealt with.
                let _ = host.with(None, |vm| vm.on_queue_ready(root, queue));
            }
        });
        Ok(host)
    }

    /// Uses the VM, of one generation where that matters; a crash replaces it.
    ///
    /// # Errors
    /// There is no such VM, or it crashed.
    pub fn with<R>(
        self: &Rc<Self>,
        generation: Option<u64>,
        use_it: impl FnOnce(&mut Vm) -> Result<R, Trap>,
    ) -> Result<R, Unavailable> {
        if generation.is_some_and(|generation| generation != self.generation.get()) {
            return Err(Unavailable);
        }
        let mut slot = self.vm.try_borrow_mut().map_err(|_| Unavailable)?;
        let vm = slot.as_mut().ok_or(Unavailable)?;
        let result = use_it(vm);
        while let Some(effect) = vm.next_effect() {
            if let Some(signals) = self.streams.borrow().get(&effect.context) {
                signals.effect(effect.kind);
            }
        }
        drop(slot);
        result.map_err(|trap| {
            self.trapped(&trap);
            Unavailable
        })
    }

    /// A context for a request.
    ///
    /// # Errors
    /// There is no VM right now.
    pub fn http(self: &Rc<Self>, info: Rc<Info>) -> Result<Stream, Unavailable> {
        let state = HttpState { shown: crate::vm::Shown::NONE, ..HttpState::default() };
        self.stream(info, |vm, root, info| vm.create_http(root, state, info))
    }

    /// A context for a connection.
    ///
    /// # Errors
    /// There is no VM right now.
    pub fn network(self: &Rc<Self>, info: Rc<Info>) -> Result<Stream, Unavailable> {
        self.stream(info, |vm, root, info| vm.create_network(root, info))
    }

    fn stream(
        self: &Rc<Self>,
        info: Rc<Info>,
        create: impl FnOnce(&mut Vm, ContextId, Rc<Info>) -> Result<ContextId, Trap>,
    ) -> Result<Stream, Unavailable> {
        let generation = self.generation.get();
        let root_id = self.config.plugins.first().map_or("", |plugin| &plugin.root_id);
        let properties = info.clone();
        let (context, wants) = self
            .with(None, |vm| match vm.root(root_id) {
                Some(root) => create(vm, root, properties).map(|context| Some((context, vm.wants()))),
                None => Ok(None),
            })?
            .ok_or(Unavailable)?;
        let signals = Rc::<Signals>::default();
        self.streams.borrow_mut().insert(context, signals.clone());
        Ok(Stream { host: self.clone(), generation, context, signals, wants, info, kept: RefCell::default() })
    }

    /// Tells the filter that the end has come.
    pub fn shutdown(self: &Rc<Self>) {
        // A filter that crashes now has nothing left to decide.
        let _ = self.with(None, Vm::shutdown);
    }

    fn trapped(self: &Rc<Self>, trap: &Trap) {
        tracing::error!(target: "filter", "{trap}; the filter is started afresh");
        self.vm.borrow_mut().take();
        self.generation.set(self.generation.get() + 1);
        for (_, signals) in self.streams.take() {
            signals.raise(Abort::Failed);
        }
        self.outside.clear();
        if self.started.get().elapsed() >= RESTART {
            self.try_restart();
        } else {
            self.restart_later();
        }
    }

    fn try_restart(self: &Rc<Self>) {
        if let Err(error) = self.restart() {
            tracing::error!(target: "filter", "does not start: {error}");
            self.restart_later();
        }
    }

    fn restart_later(self: &Rc<Self>) {
        let (weak, generation) = (Rc::downgrade(self), self.generation.get());
        exec::spawn(async move {
            tokio::time::sleep(RESTART).await;
            if let Some(host) = weak.upgrade().filter(|host| host.generation.get() == generation) {
                host.try_restart();
            }
        });
    }

    fn restart(self: &Rc<Self>) -> Result<(), StartError> {
        self.outside.clear();
        self.generation.set(self.generation.get() + 1);
        self.started.set(Instant::now());
        let weak: Weak<Self> = Rc::downgrade(self);
        let env = HostEnv::new(weak, self.generation.get(), self.outside.clone());
        let vm = Vm::start(&self.engine, self.config.clone(), Box::new(env))?;
        *self.vm.borrow_mut() = Some(vm);
        Ok(())
    }
}

/// A stream context of the VM, ended when it is dropped.
pub struct Stream {
    host: Rc<Host>,
    generation: u64,
    context: ContextId,
    signals: Rc<Signals>,
    /// Which callbacks the module has.
    pub wants: Wants,
    /// The stream's attributes.
    pub info: Rc<Info>,
    /// Heads and trailers as they went on, to be shown in the log callback.
    kept: RefCell<Kept>,
}

#[derive(Default)]
struct Kept {
    request: Option<RequestHead>,
    response: Option<ResponseHead>,
    response_trailers: Option<http::HeaderMap>,
}

impl Stream {
    /// Runs a callback of this stream.
    pub fn call(&self, callback: impl FnOnce(&mut Vm, ContextId) -> Result<Outcome, Trap>) -> Step {
        match self.host.with(Some(self.generation), |vm| callback(vm, self.context)) {
            Ok(Outcome::Continue) => Step::Go,
            Ok(Outcome::Pause) => Step::Wait,
            Ok(Outcome::Respond(response)) => Step::Abort(Abort::Respond(response)),
            Ok(Outcome::Close(_)) => Step::Abort(Abort::Close),
            Err(Unavailable) => Step::Abort(Abort::Failed),
        }
    }

    /// Tells the filter something that it has no answer to.
    pub fn tell(&self, event: impl FnOnce(&mut Vm, ContextId) -> Result<(), Trap>) {
        // Where the VM is gone, nobody has to be told.
        let _ = self.host.with(Some(self.generation), |vm| event(vm, self.context));
    }

    /// The HTTP stream in the VM; `None` where the VM is gone.
    pub fn http<R>(&self, use_it: impl FnOnce(&mut HttpState) -> R) -> Option<R> {
        self.host.with(Some(self.generation), |vm| Ok(vm.http(self.context).map(use_it))).ok().flatten()
    }

    /// The connection in the VM; `None` where the VM is gone.
    pub fn network<R>(&self, use_it: impl FnOnce(&mut NetworkState) -> R) -> Option<R> {
        self.host.with(Some(self.generation), |vm| Ok(vm.network(self.context).map(use_it))).ok().flatten()
    }

    /// A value of the filter state.
    #[must_use]
    pub fn filter_state(&self, key: &str) -> Option<bytes::Bytes> {
        let get = |vm: &mut Vm| Ok(vm.filter_state(self.context).and_then(|state| state.get(key).cloned()));
        self.host.with(Some(self.generation), get).ok().flatten()
    }

    /// Keeps the request's head for the log, where the filter writes one.
    pub fn keep_request(&self, head: &RequestHead) {
        if self.wants.log {
            self.kept.borrow_mut().request = Some(head.clone());
        }
    }

    /// Keeps the response's head for the log, where the filter writes one.
    pub fn keep_response(&self, head: &ResponseHead) {
        if self.wants.log {
            self.kept.borrow_mut().response = Some(head.clone());
        }
    }

    /// Keeps the response's trailers for the log, where the filter writes one.
    pub fn keep_trailers(&self, trailers: &http::HeaderMap) {
        if self.wants.log {
            self.kept.borrow_mut().response_trailers = Some(trailers.clone());
        }
    }

    /// Waits until a paused direction is continued.
    ///
    /// # Errors
    /// The stream is to end.
    pub async fn resumed(&self, stream: StreamType) -> Result<(), Abort> {
        let direction = direction(stream);
        loop {
            if let Some(abort) = self.signals.abort.borrow_mut().take() {
                return Err(abort);
            }
            if self.signals.resumed[direction].take() {
                return Ok(());
            }
            tokio::select! {
                () = self.signals.resume[direction].notified() => {}
                () = self.signals.aborted.notified() => {}
            }
        }
    }

    /// Waits until a paused direction is continued, and leaves it to others that the stream ends.
    pub async fn continued(&self, stream: StreamType) {
        let direction = direction(stream);
        while !self.signals.resumed[direction].take() {
            self.signals.resume[direction].notified().await;
        }
    }

    /// Forgets that a direction was continued while it was not paused.
    pub fn pausing(&self, stream: StreamType) {
        self.signals.resumed[direction(stream)].set(false);
    }

    /// Waits until the stream is to end.
    pub async fn aborted(&self) -> Abort {
        loop {
            if let Some(abort) = self.signals.abort.borrow_mut().take() {
                return abort;
            }
            self.signals.aborted.notified().await;
        }
    }

    /// Ends the stream, from a part of it to the one that waits in [`Stream::aborted`].
    pub fn abort(&self, abort: Abort) {
        self.signals.raise(abort);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.info.complete();
        self.host.streams.borrow_mut().remove(&self.context);
        let kept = self.kept.take();
        // A VM that is gone has no streams left to end.
        let _ = self.host.with(Some(self.generation), |vm| {
            if let Some(http) = vm.http(self.context) {
                http.shown.set(MapType::RequestHeaders, true);
                http.shown.set(MapType::ResponseHeaders, self.info.code.get() != 0);
                http.shown.set(MapType::ResponseTrailers, kept.response_trailers.is_some());
                // What has not gone on is still there.
                if let Some(request) = kept.request {
                    http.request = request;
                }
                if let Some(response) = kept.response {
                    http.response = response;
                }
                http.response_trailers = kept.response_trailers.unwrap_or_default();
            }
            vm.finish(self.context)
        });
    }
}
