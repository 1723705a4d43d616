//! What hostcalls work on: the data of a `Store`, one per VM.

use super::abi::Pairs;
use super::env::{CallToken, ContextId, Env};
use super::hostcalls::Expressions;
use super::metrics::MetricTable;
use super::shared::{QueueWaker, Shared};
use super::stored::Declarations;
use super::stream::{Effect, EffectKind, HttpState, NetworkState, ResponseHead, Stream, StreamKind};
use bytes::Bytes;
use http::HeaderMap;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;
use std::sync::Arc;
use wasmtime::{Memory, TypedFunc};

/// What a plugin does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginKind {
    /// HTTP streams.
    Http,
    /// TCP connections.
    Network,
}

/// One plugin of a VM: a root context and its stream contexts.
#[derive(Clone, Debug)]
pub struct PluginConfig {
    /// Name for logs and the property `plugin_name`.
    pub name: String,
    /// Selects the root context's code within the module.
    pub root_id: String,
    /// Given to `proxy_on_configure`.
    pub configuration: Bytes,
    /// What it works on.
    pub kind: PluginKind,
}

/// Everything a hostcall can reach.
pub(super) struct HostState {
    pub(super) env: Box<dyn Env>,
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: MetricTable,
    pub(super) vm_id: String,
    pub(super) vm_configuration: Bytes,
    pub(super) queue_waker: Option<QueueWaker>,
    pub(super) limits: MemoryLimit,
    /// None until the instance exists: a start function may already make hostcalls.
    pub(super) memory: Option<Memory>,
    /// Shared, as a clone of the function itself counts references to its type, by atomics.
    pub(super) allocate: Option<Rc<TypedFunc<u32, u32>>>,

    pub(super) roots: Vec<Root>,
    pub(super) streams: IdMap<Box<Stream>>,
    next_context: u32,
    /// The context whose callback runs.
    pub(super) current: u32,
    /// The context that hostcalls work on: `current` unless `proxy_set_effective_context` said otherwise.
    pub(super) effective: u32,

    pub(super) calls: BTreeMap<CallToken, Call>,
    next_call: u32,
    /// What the callback that runs is about.
    pub(super) delivery: Delivery,

    pub(super) effects: VecDeque<Effect>,
    /// What the guest asked of the stream whose callback runs.
    pub(super) own_effects: Vec<EffectKind>,
    /// Contexts that called `proxy_done` after they had said no to `proxy_on_done`.
    pub(super) done: Vec<ContextId>,

    /// Holds a value between its look-up and the guest's allocation for it.
    pub(super) scratch: Vec<u8>,
    /// Unfinished lines of the guest's stdout and stderr.
    pub(super) output: [Vec<u8>; 2],
}

pub(super) struct Root {
    pub(super) id: ContextId,
    pub(super) plugin: PluginConfig,
    /// What it compiled by `expr_create`.
    pub(super) expressions: Expressions,
    /// What it declared by `declare_property`.
    pub(super) declared: Declarations,
}

/// A call that is under way.
pub(super) struct Call {
    pub(super) context: ContextId,
    pub(super) kind: CallKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallKind {
    Http,
    Grpc,
    GrpcStream,
}

/// Maps, buffer and status that exist only during the callback which delivers them.
#[derive(Default)]
pub(super) struct Delivery {
    pub(super) http: Option<HttpDelivery>,
    pub(super) metadata: Option<Pairs>,
    pub(super) message: Option<Bytes>,
    pub(super) call_data: Option<Bytes>,
    pub(super) status: Option<(u32, Bytes)>,
}

pub(super) struct HttpDelivery {
    pub(super) head: ResponseHead,
    pub(super) body: Bytes,
    pub(super) trailers: HeaderMap,
}

/// Bounds the guest's linear memory.
pub(super) struct MemoryLimit {
    pub(super) max_bytes: usize,
    pub(super) used: usize,
}

/// Bound of the guest's function table, far above what any filter has.
const MAX_TABLE_ENTRIES: usize = 1 << 20;

impl wasmtime::ResourceLimiter for MemoryLimit {
    fn memory_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let fits = desired <= self.max_bytes;
        if fits {
            self.used = desired;
        }
        Ok(fits)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= MAX_TABLE_ENTRIES)
    }

    fn memories(&self) -> usize {
        1
    }
}

/// Ids are ours and dense, so they are their own hash.
#[derive(Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 << 8) | u64::from(*byte);
        }
    }
    fn write_u32(&mut self, id: u32) {
        // The table looks at the top bits too.
        self.0 = u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

pub(super) type IdMap<T> = HashMap<u32, T, BuildHasherDefault<IdHasher>>;

impl HostState {
    pub(super) fn new(env: Box<dyn Env>, shared: Arc<Shared>, vm_id: String, max_memory: usize) -> Self {
        Self {
            env,
            metrics: MetricTable::new(shared.metrics.clone()),
            shared,
            vm_id,
            vm_configuration: Bytes::new(),
            queue_waker: None,
            limits: MemoryLimit { max_bytes: max_memory, used: 0 },
            memory: None,
            allocate: None,
            roots: Vec::new(),
            streams: IdMap::default(),
            next_context: 0,
            current: 0,
            effective: 0,
            calls: BTreeMap::new(),
            next_call: 0,
            delivery: Delivery::default(),
            effects: VecDeque::new(),
            own_effects: Vec::new(),
            done: Vec::new(),
            scratch: Vec::new(),
            output: [Vec::new(), Vec::new()],
        }
    }

    /// A context id that is not in use; 0 is never one.
    pub(super) fn new_context(&mut self) -> ContextId {
        loop {
            self.next_context = self.next_context.wrapping_add(1);
            let id = self.next_context;
            if id != 0 && !self.streams.contains_key(&id) && self.roots.iter().all(|root| root.id.0 != id) {
                return ContextId(id);
            }
        }
    }

    /// Registers a call. It belongs to the effective context's root, as in Envoy: its answer is delivered to the root,
    /// from where SDKs find the stream by the token, and it outlives the stream that made it.
    pub(super) fn new_call(&mut self, kind: CallKind) -> CallToken {
        let context = self.root().map_or(ContextId(self.effective), |root| root.id);
        loop {
            self.next_call = self.next_call.wrapping_add(1);
            let token = CallToken(self.next_call);
            if token.0 != 0 && !self.calls.contains_key(&token) {
                self.calls.insert(token, Call { context, kind });
                return token;
            }
        }
    }

    /// Whether the guest may work on this context.
    pub(super) fn knows(&self, id: u32) -> bool {
        self.streams.contains_key(&id) || self.roots.iter().any(|root| root.id.0 == id)
    }

    /// The effective stream context.
    pub(super) fn stream(&mut self) -> Option<&mut Stream> {
        self.streams.get_mut(&self.effective).map(|stream| &mut **stream)
    }

    /// The effective HTTP stream.
    pub(super) fn http(&mut self) -> Option<&mut HttpState> {
        match self.stream().map(|stream| &mut stream.kind) {
            Some(StreamKind::Http(http)) => Some(http),
            _ => None,
        }
    }

    /// The effective TCP connection.
    pub(super) fn network(&mut self) -> Option<&mut NetworkState> {
        match self.stream().map(|stream| &mut stream.kind) {
            Some(StreamKind::Network(network)) => Some(network),
            _ => None,
        }
    }

    /// The root context of the effective context.
    pub(super) fn root(&self) -> Option<&Root> {
        self.root_of(self.effective)
    }

    /// The root context of a context, or that context itself.
    pub(super) fn root_of(&self, context: u32) -> Option<&Root> {
        let id = self.streams.get(&context).map_or(context, |stream| stream.root.0);
        self.roots.iter().find(|root| root.id.0 == id)
    }

    /// As [`HostState::root_of`], to be changed.
    pub(super) fn root_of_mut(&mut self, context: u32) -> Option<&mut Root> {
        let id = self.streams.get(&context).map_or(context, |stream| stream.root.0);
        self.roots.iter_mut().find(|root| root.id.0 == id)
    }

    /// Notes what the guest wants to happen to the effective stream.
    pub(super) fn push_effect(&mut self, kind: EffectKind) {
        if self.effective == self.current {
            self.own_effects.push(kind);
        } else {
            self.effects.push_back(Effect { context: ContextId(self.effective), kind });
        }
    }

    /// Logs what the guest printed without a line's end.
    pub(super) fn flush_output(&mut self) {
        for (lines, level) in self.output.iter_mut().zip([super::LogLevel::Info, super::LogLevel::Error]) {
            if !lines.is_empty() {
                self.env.log(level, lines);
                lines.clear();
            }
        }
    }
}
