//! What can go wrong with a module and its instances.

use super::hostcalls::Exit;

/// The module cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// This machine cannot run the compiler's output.
    #[error("wasmtime does not start: {0}")]
    Wasmtime(String),
    /// Not a WebAssembly module, or not a valid one.
    #[error("module does not compile: {0}")]
    Compile(String),
    /// Compiled ahead of time by another wasmtime, with other settings or for another CPU.
    #[error("precompiled module does not fit: {0}")]
    Precompiled(String),
    /// An import has another type than the ABI's function of that name.
    #[error("module does not link: {0}")]
    Link(String),
    /// The module exports no `proxy_abi_version_0_2_1` or `_0_2_0`.
    #[error("module is not built for proxy-wasm ABI 0.2.0 or 0.2.1")]
    AbiVersion,
}

/// An instance did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The module wants more memory than the limit, or the system has no more.
    #[error("module does not instantiate: {0}")]
    Instantiate(String),
    /// An export that every module needs is missing or has another type.
    #[error("export {0:?} is missing or has a wrong type")]
    Export(&'static str),
    /// The guest answered "no".
    #[error("{callback} of root context {root_id:?} failed")]
    Refused {
        /// `proxy_on_vm_start` or `proxy_on_configure`.
        callback: &'static str,
        /// Whose.
        root_id: String,
    },
    /// The guest crashed.
    #[error(transparent)]
    Trap(#[from] Trap),
}

/// A callback that did not return; its VM is dead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{callback}: {kind}: {message}")]
pub struct Trap {
    /// The callback.
    pub callback: &'static str,
    /// Why.
    pub kind: TrapKind,
    /// wasmtime's own words.
    pub message: String,
}

/// Why a callback did not return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapKind {
    /// It ran longer than the deadline.
    Deadline,
    /// It ended itself by `proc_exit`.
    Exit,
    /// It did something undefined: a panic, an access out of bounds, a stack overflow.
    Guest,
    /// It was not tried, because an earlier one had trapped.
    Dead,
}

impl TrapKind {
    /// Label for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Exit => "exit",
            Self::Guest => "guest",
            Self::Dead => "dead",
        }
    }
}

impl std::fmt::Display for TrapKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deadline => "ran past its deadline",
            Self::Exit => "exited",
            Self::Guest => "crashed",
            Self::Dead => "not run",
        })
    }
}

impl Trap {
    pub(super) fn new(callback: &'static str, error: &wasmtime::Error) -> Self {
        let kind = match error.downcast_ref::<wasmtime::Trap>() {
            Some(wasmtime::Trap::Interrupt) => TrapKind::Deadline,
            _ if error.downcast_ref::<Exit>().is_some() => TrapKind::Exit,
            _ => TrapKind::Guest,
        };
        Self { callback, kind, message: format!("{error:#}") }
    }

    pub(super) fn dead(callback: &'static str) -> Self {
        Self { callback, kind: TrapKind::Dead, message: "the VM is dead".to_owned() }
    }
}
