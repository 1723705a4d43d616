//! The streams that are open: who is there, what it has, what it refused last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::peer::Peer;
use crate::model::{Role, Scope};

/// One open stream.
#[derive(Debug, Clone, Serialize)]
pub struct Session {
    /// `registry` or `discovery`.
    pub stream: &'static str,
    /// What the subscriber calls itself.
    pub name: String,
    /// Its address; none within the process.
    pub address: Option<String>,
    /// Its certificate's identity.
    pub identity: Option<String>,
    /// Namespace of its scope.
    pub namespace: String,
    /// `sidecar` or `gateway`.
    pub role: &'static str,
    /// The last version that it acknowledged.
    pub version: u64,
    /// Why it refused the last update that it refused.
    pub refused: Option<String>,
}

impl Session {
    pub(super) fn new(stream: &'static str, name: &str, peer: Option<&Peer>, scope: &Scope) -> Self {
        Session {
            stream,
            name: name.to_owned(),
            address: peer.map(|p| p.address.to_string()),
            identity: peer.and_then(|p| p.identity.as_ref()).map(|i| i.uri.clone()),
            namespace: scope.namespace.clone(),
            role: if scope.role == Role::Gateway { "gateway" } else { "sidecar" },
            version: 0,
            refused: None,
        }
    }
}

/// All open streams.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<(u64, BTreeMap<u64, Session>)>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Session>)> {
        // Nothing that is held under the lock can be left half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is open now.
    pub fn all(&self) -> Vec<Session> {
        self.lock().1.values().cloned().collect()
    }
}

/// Keeps a session listed for as long as it lives.
#[derive(Debug)]
pub(super) struct Listed {
    sessions: Arc<super::Counters>,
    id: u64,
}

impl Listed {
    pub(super) fn new(counters: &Arc<super::Counters>, session: Session) -> Self {
        let mut held = counters.sessions.lock();
        held.0 += 1;
        let id = held.0;
        held.1.insert(id, session);
        drop(held);
        Listed { sessions: counters.clone(), id }
    }

    pub(super) fn note(&self, what: impl FnOnce(&mut Session)) {
        if let Some(session) = self.sessions.sessions.lock().1.get_mut(&self.id) {
            what(session);
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.sessions.sessions.lock().1.remove(&self.id);
    }
}
