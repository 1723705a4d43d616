//! The listeners of one Envoy, kept up to date with the plans: only what hangs on a changed plan is made again.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use portolan_proto::envoy::envoy::config::listener::v3::Listener;
use portolan_proto::v1::{Inspection, ListenerPlan};
use prost::Message;

use crate::compile::needs::Needs;
use crate::envoy::listeners::Renderer;
use crate::publish::Published;

pub(super) struct Listeners {
    renderer: Renderer,
    /// What every listener may depend on.
    general: Option<(Inspection, Option<u16>, Arc<Needs>)>,
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
        let general = Some((catch_all, published.proxy_http_port, published.needs.clone()));
        if self.general != general {
            self.general = general;
            self.renderer.suit(&published.needs);
            self.ports.clear();
            self.resources.clear();
            self.fixed.clear();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::needs::Needs;
    use crate::envoy::settings::{NoSnapshot, Settings};
    use crate::model::Scope;

    #[test]
    fn listeners_stay_when_what_all_depend_on_changes() {
        let settings = Settings {
            filter: "filter.wasm".into(),
            controller: "portolan".into(),
            transparent: Some(15001),
            http_proxy: vec!["127.0.0.1:15080".parse().unwrap()],
            bind_ports: None,
            credentials: None,
            no_snapshot: NoSnapshot::Closed,
            access_log: None,
        };
        let mut listeners = Listeners::new(Renderer::new(&settings, &Scope::default(), "test"));
        let plan = |port: u16, http| {
            let wildcard = Some(Inspection { tls: false, http });
            (port, Arc::new(ListenerPlan { port: port.into(), wildcard, ..ListenerPlan::default() }))
        };
        let mut published = Published { plans: [plan(0, false), plan(80, true)].into(), ..Published::default() };
        let mut seen = |published: &Published| -> Vec<(String, String)> {
            let all = listeners.follow(published).iter();
            all.map(|(name, rendered)| (name.clone(), rendered.version.clone())).collect()
        };
        let before = seen(&published);
        published.needs = Arc::new(Needs { delays: true, ..Needs::default() });
        let after = seen(&published);
        let names = |listeners: &[(String, String)]| listeners.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
        assert_eq!(names(&before), ["0.0.0.0_80", "127.0.0.1_15080", "virtualOutbound"]);
        assert_eq!(names(&after), names(&before));
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).map(|(a, _)| a.0.as_str());
        assert_eq!(changed.collect::<Vec<_>>(), ["0.0.0.0_80", "127.0.0.1_15080"], "the catch-all reads no HTTP");
        published.needs = Arc::default();
        assert_eq!(seen(&published), before);
    }
}
