//! One running instance: start, contexts, and the way into its callbacks.

use super::abi::StreamType;
use super::engine::{Engine, Limits};
use super::env::{ContextId, Env, Properties};
use super::error::{StartError, Trap};
use super::exports::{self, Exports};
use super::hostcalls::Expressions;
use super::shared::{QueueWaker, Shared};
use super::state::{HostState, PluginConfig, PluginKind, Root};
use super::stored::{Declarations, Stored};
use super::stream::{Effect, EffectKind, FilterState, HttpState, NetworkState, Outcome, Stream, StreamKind};
use bytes::Bytes;
use std::rc::Rc;
use std::sync::Arc;
use wasmtime::{Store, TypedFunc, WasmParams, WasmResults};

/// How to start a [`Vm`].
#[derive(Clone, Default)]
pub struct VmConfig {
    /// VMs with one id share their data and queues.
    pub vm_id: String,
    /// Given to `proxy_on_vm_start`.
    pub vm_configuration: Bytes,
    /// One root context each, in this order.
    pub plugins: Vec<PluginConfig>,
    /// Time and memory.
    pub limits: Limits,
    /// What all VMs of the process share.
    pub shared: Arc<Shared>,
    /// Called when a message arrives in a queue that this VM registered; then call [`Vm::on_queue_ready`].
    pub queue_waker: Option<QueueWaker>,
}

/// Callbacks that a module exports; see [`Vm::wants`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is one export")]
pub struct Wants {
    /// `proxy_on_request_body`
    pub request_body: bool,
    /// `proxy_on_request_trailers`
    pub request_trailers: bool,
    /// `proxy_on_response_body`
    pub response_body: bool,
    /// `proxy_on_response_trailers`
    pub response_trailers: bool,
    /// `proxy_on_downstream_data`
    pub downstream_data: bool,
    /// `proxy_on_upstream_data`
    pub upstream_data: bool,
    /// `proxy_on_log`
    pub log: bool,
}

/// One instance of a module with its contexts. Not to be shared between threads.
pub struct Vm {
    pub(super) instance: Instance,
    pub(super) exports: Exports,
}

/// The part of a VM that a call into the guest needs, apart from the export that is called.
pub(super) struct Instance {
    pub(super) store: Store<HostState>,
    ticks: u64,
    dead: bool,
}

impl Instance {
    /// Calls the guest, with at most the deadline to run.
    pub(super) fn call<P: WasmParams, R: WasmResults>(
        &mut self,
        callback: &'static str,
        context: ContextId,
        func: &TypedFunc<P, R>,
        params: P,
    ) -> Result<R, Trap> {
        if self.dead {
            return Err(Trap::dead(callback));
        }
        self.store.set_epoch_deadline(self.ticks);
        let state = self.store.data_mut();
        (state.current, state.effective) = (context.0, context.0);
        match func.call(&mut self.store, params) {
            Ok(results) => Ok(results),
            Err(error) => {
                self.dead = true;
                let trap = Trap::new(callback, &error);
                let state = self.store.data_mut();
                state.flush_output();
                state.shared.count_trap(trap.kind);
                Err(trap)
            }
        }
    }

    /// Calls the guest if it exports the callback.
    pub(super) fn call_opt<P: WasmParams, R: WasmResults>(
        &mut self,
        callback: &'static str,
        context: ContextId,
        func: Option<&TypedFunc<P, R>>,
        params: P,
    ) -> Result<Option<R>, Trap> {
        match func {
            Some(func) => self.call(callback, context, func, params).map(Some),
            None if self.dead => Err(Trap::dead(callback)),
            None => Ok(None),
        }
    }
}

impl Vm {
    /// Instantiates the module and starts a root context for each plugin.
    ///
    /// # Errors
    /// When the module traps, wants more than its limits, or refuses its configuration.
    pub fn start(engine: &Engine, config: VmConfig, env: Box<dyn Env>) -> Result<Self, StartError> {
        let VmConfig { vm_id, vm_configuration, plugins, limits, shared, queue_waker } = config;
        let mut state = HostState::new(env, shared, vm_id, limits.memory);
        state.vm_configuration = vm_configuration;
        state.queue_waker = queue_waker;
        let mut store = Store::new(engine.wasmtime(), state);
        store.limiter(|state| &mut state.limits);
        store.epoch_deadline_trap();
        store.set_epoch_deadline(limits.ticks());

        let instance =
            engine.pre().instantiate(&mut store).map_err(|error| StartError::Instantiate(format!("{error:#}")))?;
        let memory = instance.get_memory(&mut store, "memory").ok_or(StartError::Export("memory"))?;
        let allocate = match exports::find(&instance, &mut store, "proxy_on_memory_allocate")? {
            Some(allocate) => Some(allocate),
            None => exports::find(&instance, &mut store, "malloc")?,
        };
        let exports = Exports::find(&instance, &mut store)?;
        let start: Option<TypedFunc<(), ()>> = match exports::find(&instance, &mut store, "_initialize")? {
            Some(start) => Some(start),
            None => exports::find(&instance, &mut store, "_start")?,
        };
        // As Envoy: a reactor's `main`, where there is one, configures its SDK. A `main` of another type is not meant.
        let is_reactor = instance.get_func(&mut store, "_initialize").is_some();
        let (main, main_void) = if is_reactor {
            let main = exports::find::<(u32, u32), u32>(&instance, &mut store, "main").ok().flatten();
            (main, exports::find::<(), u32>(&instance, &mut store, "__main_void").ok().flatten())
        } else {
            (None, None)
        };
        let state = store.data_mut();
        state.memory = Some(memory);
        state.allocate = Some(Rc::new(allocate.ok_or(StartError::Export("proxy_on_memory_allocate"))?));

        let mut vm = Self { instance: Instance { store, ticks: limits.ticks(), dead: false }, exports };
        vm.instance.call_opt("_initialize", ContextId(0), start.as_ref(), ())?;
        match main {
            Some(_) => vm.instance.call_opt("main", ContextId(0), main.as_ref(), (0, 0))?,
            None => vm.instance.call_opt("__main_void", ContextId(0), main_void.as_ref(), ())?,
        };
        for plugin in plugins {
            vm.start_root(plugin)?;
        }
        Ok(vm)
    }

    fn start_root(&mut self, plugin: PluginConfig) -> Result<(), StartError> {
        let root_id = plugin.root_id.clone();
        let len = |bytes: &Bytes| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let plugin_len = len(&plugin.configuration);
        let state = self.instance.store.data_mut();
        let vm_len = len(&state.vm_configuration);
        let id = state.new_context();
        let (expressions, declared) = (Expressions::default(), Declarations::default());
        state.roots.push(Root { id, plugin, expressions, declared });

        let (vm, exports) = (&mut self.instance, &self.exports);
        vm.call_opt("proxy_on_context_create", id, exports.context_create.as_ref(), (id.0, 0))?;
        let started = vm.call_opt("proxy_on_vm_start", id, exports.vm_start.as_ref(), (id.0, vm_len))?;
        if started == Some(0) {
            return Err(StartError::Refused { callback: "proxy_on_vm_start", root_id });
        }
        let configured = vm.call_opt("proxy_on_configure", id, exports.configure.as_ref(), (id.0, plugin_len))?;
        if configured == Some(0) {
            return Err(StartError::Refused { callback: "proxy_on_configure", root_id });
        }
        Ok(())
    }

    /// Which callbacks about bodies, trailers and bytes the module has; those that it has not need not be fed.
    pub fn wants(&self) -> Wants {
        let exports = &self.exports;
        Wants {
            request_body: exports.request_body.is_some(),
            request_trailers: exports.request_trailers.is_some(),
            response_body: exports.response_body.is_some(),
            response_trailers: exports.response_trailers.is_some(),
            downstream_data: exports.downstream_data.is_some(),
            upstream_data: exports.upstream_data.is_some(),
            log: exports.log.is_some(),
        }
    }

    /// Tells every root context that the end has come: `proxy_on_done`, then `proxy_on_delete`.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn shutdown(&mut self) -> Result<(), Trap> {
        let roots: Vec<_> = self.instance.store.data().roots.iter().map(|root| root.id).collect();
        for root in roots {
            self.instance.call_opt("proxy_on_done", root, self.exports.done.as_ref(), root.0)?;
            self.instance.call_opt("proxy_on_delete", root, self.exports.delete.as_ref(), root.0)?;
        }
        Ok(())
    }

    /// Whether a callback trapped; every further one is refused.
    pub fn is_dead(&self) -> bool {
        self.instance.dead
    }

    /// The root context of the plugin with that root id.
    pub fn root(&self, root_id: &str) -> Option<ContextId> {
        let roots = &self.instance.store.data().roots;
        roots.iter().find(|root| root.plugin.root_id == root_id).map(|root| root.id)
    }

    /// The plugin of a root context.
    pub fn plugin(&self, root: ContextId) -> Option<&PluginConfig> {
        self.instance.store.data().roots.iter().find(|have| have.id == root).map(|root| &root.plugin)
    }

    /// Bytes of linear memory the instance has now.
    pub fn memory_bytes(&self) -> usize {
        self.instance.store.data().limits.used
    }

    /// Streams that are not deleted yet.
    pub fn streams(&self) -> usize {
        self.instance.store.data().streams.len()
    }

    /// The surroundings given to [`Vm::start`].
    pub fn env(&mut self) -> &mut dyn Env {
        &mut *self.instance.store.data_mut().env
    }

    /// A context for an HTTP stream under the root context `root`.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn create_http(
        &mut self,
        root: ContextId,
        state: HttpState,
        properties: Rc<dyn Properties>,
    ) -> Result<ContextId, Trap> {
        self.create(root, StreamKind::Http(state), properties)
    }

    /// A context for a TCP connection under the root context `root`.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn create_network(&mut self, root: ContextId, properties: Rc<dyn Properties>) -> Result<ContextId, Trap> {
        self.create(root, StreamKind::Network(NetworkState::default()), properties)
    }

    fn create(&mut self, root: ContextId, kind: StreamKind, properties: Rc<dyn Properties>) -> Result<ContextId, Trap> {
        let state = self.instance.store.data_mut();
        let id = state.new_context();
        let (stored, declared) = (Stored::default(), Declarations::default());
        let stream = Stream { root, properties, stored, declared, kind, draining: false };
        state.streams.insert(id.0, Box::new(stream));
        let created =
            self.instance.call_opt("proxy_on_context_create", id, self.exports.context_create.as_ref(), (id.0, root.0));
        if let Err(trap) = created {
            self.instance.store.data_mut().streams.remove(&id.0);
            return Err(trap);
        }
        Ok(id)
    }

    /// Whether the plugin of `root` works on HTTP streams or on connections.
    pub fn kind(&self, root: ContextId) -> Option<PluginKind> {
        self.plugin(root).map(|plugin| plugin.kind)
    }

    /// The HTTP stream, to move its parts in and out; also after a trap. None once it is deleted.
    pub fn http(&mut self, context: ContextId) -> Option<&mut HttpState> {
        match self.stream(context).map(|stream| &mut stream.kind) {
            Some(StreamKind::Http(http)) => Some(http),
            _ => None,
        }
    }

    /// The TCP connection, to move its bytes in and out; also after a trap. None once it is deleted.
    pub fn network(&mut self, context: ContextId) -> Option<&mut NetworkState> {
        match self.stream(context).map(|stream| &mut stream.kind) {
            Some(StreamKind::Network(network)) => Some(network),
            _ => None,
        }
    }

    /// What the guest stored for the host to act on.
    pub fn filter_state(&mut self, context: ContextId) -> Option<&mut FilterState> {
        self.stream(context).map(|stream| &mut stream.stored.filter_state)
    }

    /// A property that the guest set on the stream, by its whole path.
    pub fn own_property(&mut self, context: ContextId, path: &[u8]) -> Option<Bytes> {
        self.stream(context)?.stored.property(path).map(|property| property.value().clone())
    }

    fn stream(&mut self, context: ContextId) -> Option<&mut Stream> {
        self.instance.store.data_mut().streams.get_mut(&context.0).map(|stream| &mut **stream)
    }

    /// The next thing the guest asked for outside the callback of the stream that it concerns.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.instance.store.data_mut().effects.pop_front()
    }

    /// Ends a stream: `proxy_on_done`, then `proxy_on_log` and `proxy_on_delete`, the latter two later when the guest is
    /// not done yet. An HTTP stream is logged before it is done, as in Envoy, where the log is not the filter's own.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn finish(&mut self, context: ContextId) -> Result<(), Trap> {
        let Some(stream) = self.stream(context) else { return Ok(()) };
        // Set before the callback, so that `proxy_done` within it counts.
        stream.draining = true;
        if let StreamKind::Http(http) = &mut stream.kind {
            http.shown.log();
            self.instance.call_opt("proxy_on_log", context, self.exports.log.as_ref(), context.0)?;
        }
        let done = self.instance.call_opt("proxy_on_done", context, self.exports.done.as_ref(), context.0)?;
        if done == Some(0) { self.after_callback() } else { self.delete(context) }
    }

    fn delete(&mut self, context: ContextId) -> Result<(), Trap> {
        if self.network(context).is_some() {
            self.instance.call_opt("proxy_on_log", context, self.exports.log.as_ref(), context.0)?;
        }
        self.instance.call_opt("proxy_on_delete", context, self.exports.delete.as_ref(), context.0)?;
        let state = self.instance.store.data_mut();
        state.streams.remove(&context.0);
        state.own_effects.clear();
        Ok(())
    }

    /// Deletes what became done, and keeps what the guest wanted of a root context from leaking into a stream's outcome.
    pub(super) fn after_callback(&mut self) -> Result<(), Trap> {
        loop {
            let state = self.instance.store.data_mut();
            let own = std::mem::take(&mut state.own_effects);
            let context = ContextId(state.current);
            state.effects.extend(own.into_iter().map(|kind| Effect { context, kind }));
            match state.done.pop() {
                Some(context) if state.streams.contains_key(&context.0) => self.delete(context)?,
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }

    /// What a stream callback ends in: the guest's answer, or what it asked for on the way. `direction` is the one that
    /// the callback belongs to: continuing it within its own callback overrules a pause.
    pub(super) fn outcome(&mut self, direction: StreamType, answer: Option<u32>) -> Result<Outcome, Trap> {
        let mut outcome = if answer.unwrap_or(0) == 0 { Outcome::Continue } else { Outcome::Pause };
        let state = self.instance.store.data_mut();
        if state.own_effects.is_empty() && state.done.is_empty() {
            return Ok(outcome);
        }
        let context = ContextId(state.current);
        for kind in std::mem::take(&mut state.own_effects) {
            match (kind, &outcome) {
                (EffectKind::Respond(response), Outcome::Continue | Outcome::Pause) => {
                    outcome = Outcome::Respond(response);
                }
                (EffectKind::Close(side), Outcome::Continue | Outcome::Pause) => outcome = Outcome::Close(side),
                (EffectKind::Continue(which), Outcome::Pause) if which == direction => outcome = Outcome::Continue,
                (EffectKind::Continue(which), _) if which == direction => {}
                (kind, _) => state.effects.push_back(Effect { context, kind }),
            }
        }
        self.after_callback()?;
        Ok(outcome)
    }
}
