//! The listeners of one Envoy, kept up to date with the plans: only what hangs on a changed plan is made again.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use portolan_proto::envoy::envoy::config::listener::v3::Listener;
use portolan_proto::v1::{Inspection, ListenerPlan};
use prost::Message;

use crate::envoy::listeners::Renderer;
use crate::publish::Published;

pub(super) struct Listeners {
    renderer: Renderer,
    /// What every listener may depend on.
    general: Option<(Inspection, Option<u16>)>,
    /// Names of the general listeners.
    fixed: Vec<String>,
    /// Plans that were rendered, and the names of what came out.
    ports: BTreeMap<u16, (Arc<ListenerPlan>, Vec<String>)>,
    resources: BTreeMap<String, Rendered>,
}

/// A listener as it is sent.
pub(super) struct Rendered {
    pub(super) version: String,
    pub(super) bytes: Vec<u8>,
}

impl Listeners {
    pub(super) fn new(renderer: Renderer) -> Self {
        Listeners { renderer, general: None, fixed: Vec::new(), ports: BTreeMap::new(), resources: BTreeMap::new() }
    }

    /// The listeners by name, as these plans have them.
    pub(super) fn follow(&mut self, published: &Published) -> &BTreeMap<String, Rendered> {
        let catch_all = published.plans.get(&0).and_then(|plan| plan.wildcard).unwrap_or_default();
        let general = (catch_all, published.proxy_http_port);
        if self.general != Some(general) {
            self.general = Some(general);
            self.ports.clear();
            self.resources.clear();
            self.fixed = self.add(self.renderer.general(&catch_all, published.proxy_http_port));
        }
        let gone: Vec<u16> = self.ports.keys().filter(|port| !published.plans.contains_key(port)).copied().collect();
        for port in gone {
            self.remove(port);
        }
        for (port, plan) in &published.plans {
            if self.ports.get(port).is_some_and(|(held, _)| Arc::ptr_eq(held, plan)) {
                continue;
            }
            self.remove(*port);
            let names = self.add(self.renderer.port(plan, &catch_all));
            self.ports.insert(*port, (plan.clone(), names));
        }
        &self.resources
    }

    fn add(&mut self, listeners: Vec<Listener>) -> Vec<String> {
        let mut names = Vec::with_capacity(listeners.len());
        for listener in listeners {
            let bytes = listener.encode_to_vec();
            let mut hasher = DefaultHasher::new();
            hasher.write(&bytes);
            let rendered = Rendered { version: format!("{:016x}", hasher.finish()), bytes };
            // An HTTP proxy on a port of the registry: who asked for it by name has it.
            if !self.fixed.contains(&listener.name) {
                self.resources.insert(listener.name.clone(), rendered);
                names.push(listener.name);
            }
        }
        names
    }

    fn remove(&mut self, port: u16) {
        for name in self.ports.remove(&port).map(|(_, names)| names).unwrap_or_default() {
            self.resources.remove(&name);
        }
    }
}
