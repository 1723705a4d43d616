//! Objects that come and go: what they are to host names, and what they withdraw.

use std::sync::Arc;

use super::service::{Member, Source, group_key, kube_host};
use super::{Compiler, rules};
use crate::api::destination_rule::DestinationRule;
use crate::cluster::endpoints::Workloads;
use crate::model::{Change, Checked, Object};
use crate::validate::predicates;

impl Compiler {
    pub(super) fn apply_one(&mut self, change: &Change) {
        match change {
            Change::Delete(key) => {
                if let Some(old) = self.objects.remove(key) {
                    self.leave(&old);
                }
            }
            Change::Apply(object) => {
                match self.objects.insert(object.key(), object.clone()) {
                    Some(old) if old == *object => return,
                    Some(old) => self.leave(&old),
                    None => {}
                }
                self.join(object);
            }
        }
    }

    /// What an object is to host names: members of a group each, or an alias of one.
    fn members(&self, object: &Object) -> Vec<(Arc<str>, Member, bool)> {
        let keyed = |host: &str, source: Source| {
            let key: Arc<str> = group_key(host).into();
            let host = if *key == *host { key.clone() } else { host.into() };
            (key, Member { source, host })
        };
        match object {
            Object::ServiceEntry(entry) => {
                let mut out: Vec<(Arc<str>, Member, bool)> = Vec::with_capacity(entry.hosts.len());
                for host in &entry.hosts {
                    let (key, member) = keyed(host, Source::Entry(entry.clone()));
                    if !out.iter().any(|(k, ..)| *k == key) {
                        out.push((key, member, false));
                    }
                }
                out
            }
            Object::Service(service) => {
                let host = kube_host(service, &self.cx);
                let (key, member) = keyed(&host, Source::Kube(service.clone()));
                match &service.external_name {
                    Some(target) => vec![(group_key(target).into(), member, true)],
                    None => vec![(key, member, false)],
                }
            }
            _ => Vec::new(),
        }
    }

    fn join(&mut self, object: &Object) {
        if let Object::Sidecar(sidecar) = object {
            self.sidecars.insert(sidecar, &self.cx.scope, &self.cx.mesh.root_namespace);
            return self.choose_sidecar();
        }
        if let Object::DestinationRule(rule) = object {
            self.touch_clusters(rule);
            self.rules.insert(rule);
            return self.touch_clusters(rule);
        }
        if let Object::VirtualService(object) = object {
            return self.virtual_services.insert(object);
        }
        if let Object::Gateway(gateway) = object {
            return self.gateways.insert(gateway, &self.cx.scope);
        }
        for (key, member, alias) in self.members(object) {
            self.touch(&key);
            if let (true, Source::Kube(service)) = (alias, &member.source) {
                self.aliases.insert(group_key(&member.host).into(), Arc::clone(service));
                // Routes name the alias.
                self.touch(&group_key(&member.host).into());
            }
            if member.source.is_kube() || selects(&member.source) {
                let namespace = member.source.meta().namespace.clone();
                self.selecting.entry(namespace).or_default().insert(key.clone());
            }
            let state = self.hosts.entry(key).or_default();
            if alias { &mut state.aliases } else { &mut state.members }.push(member);
        }
        self.touch_selecting(object);
        self.workloads.insert(object);
    }

    fn leave(&mut self, object: &Object) {
        if let Object::Sidecar(sidecar) = object {
            self.sidecars.remove(sidecar, &self.cx.scope, &self.cx.mesh.root_namespace);
            return self.choose_sidecar();
        }
        if let Object::DestinationRule(rule) = object {
            self.touch_clusters(rule);
            self.rules.remove(rule);
            return self.touch_clusters(rule);
        }
        if let Object::VirtualService(object) = object {
            return self.virtual_services.remove(object);
        }
        if let Object::Gateway(gateway) = object {
            return self.gateways.remove(gateway);
        }
        let gone = object.key();
        for (key, member, alias) in self.members(object) {
            self.touch(&key);
            if alias {
                let own: Arc<str> = group_key(&member.host).into();
                self.aliases.remove(&own);
                self.touch(&own);
            }
            let namespace = &member.source.meta().namespace;
            let Some(state) = self.hosts.get_mut(&key) else { continue };
            let stays = |m: &Member| {
                let meta = m.source.meta();
                m.source.is_kube() != member.source.is_kube()
                    || meta.name != gone.name
                    || meta.namespace != gone.namespace
            };
            state.members.retain(stays);
            state.aliases.retain(stays);
            let still =
                |m: &Member| m.source.meta().namespace == *namespace && (m.source.is_kube() || selects(&m.source));
            if !state.members.iter().any(still)
                && let Some(hosts) = self.selecting.get_mut(namespace)
            {
                hosts.remove(&key);
            }
        }
        self.touch_selecting(object);
        self.workloads.remove(object);
    }

    /// Notes the hosts that a rule may be about.
    fn touch_clusters(&mut self, rule: &Checked<DestinationRule>) {
        let of = rules::expand(&rule.spec.host, &rule.meta.namespace, &self.cx.mesh.cluster_domain);
        let of = group_key(&of).into_owned();
        let about = |host: &&Arc<str>| predicates::is_host_subset(host, &of);
        let hosts: Vec<Arc<str>> = self.hosts.keys().filter(about).cloned().collect();
        if rules::tunnels(&rule.spec) {
            // Connections to other hosts may be led to its own.
            let all: Vec<Arc<str>> = self.hosts.keys().cloned().collect();
            all.iter().for_each(|host| self.touch(host));
            self.gateways.dirty = true;
        }
        if self.rules.hash() {
            self.gateways.dirty = true;
            hosts.iter().for_each(|host| self.touch(host));
        }
        self.dirty_clusters.extend(hosts);
    }

    /// Withdraws what the hosts claim that take a workload for an endpoint, before it comes or goes.
    fn touch_selecting(&mut self, object: &Object) {
        let Some(workload) = Workloads::labels(object) else { return };
        let Some(hosts) = self.selecting.get(&object.meta().namespace) else { return };
        let takes = |key: &&Arc<str>| {
            self.hosts.get(*key).is_some_and(|s| s.members.iter().any(|m| workload.selected_by(&m.source)))
        };
        let touched: Vec<Arc<str>> = hosts.iter().filter(takes).cloned().collect();
        for key in touched {
            self.touch(&key);
        }
    }

    /// Withdraws what a host name claims now; what it claims then is made at the commit.
    pub(super) fn touch(&mut self, key: &Arc<str>) {
        if !self.dirty_hosts.insert(key.clone()) {
            return;
        }
        let aliases = self.hosts.get(key).into_iter().flat_map(|state| &state.aliases);
        self.dirty_hosts.extend(aliases.map(|alias| group_key(&alias.host).into()));
        let Some(group) = self.group(key) else { return };
        for row in group.foreign_rows() {
            if let Some(hosts) = self.claimants.get_mut(&row) {
                hosts.remove(key);
                if hosts.is_empty() {
                    self.claimants.remove(&row);
                }
            }
            self.dirty_rows.insert(row);
        }
        for (port, order, _) in group.port_claims() {
            self.ports.entry(port).or_default().remove(&order);
            self.dirty_ports.insert(port);
        }
    }
}

/// Does the source take workloads for endpoints?
fn selects(source: &Source) -> bool {
    match source {
        Source::Entry(entry) => entry.workload_selector.is_some(),
        Source::Kube(_) => true,
    }
}
