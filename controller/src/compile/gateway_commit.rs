//! What changes when a gateway's objects do.

use std::collections::BTreeSet;

use portolan_registry::object::Namespace;

use super::service::Member;
use super::{Compiler, Conflict, ConflictRule, Registry, Update, gateways};
use crate::cluster::endpoints::host_endpoints;

impl Compiler {
    /// Brings up to date what a gateway has.
    pub(super) fn commit_gateway(&mut self, update: &mut Update) {
        let dirty = std::mem::take(&mut self.dirty_hosts);
        for key in &dirty {
            if self.hosts.get(key).is_some_and(|s| s.members.is_empty() && s.aliases.is_empty()) {
                self.hosts.remove(key);
            }
            let served = self.hosts.get(key).map(|state| self.served_here(&state.members)).unwrap_or_default();
            self.gateways.stands_behind(key, served);
        }
        if std::mem::take(&mut self.virtual_services.dirty) | self.gateways.dirty {
            let others = Registry { hosts: &self.hosts, aliases: &self.aliases, rules: &self.rules, cx: &self.cx };
            let compiled = self.gateways.compile(&self.virtual_services, &self.cx, &others);
            self.put_gateways(compiled, update);
        }
        update.pages = self.writer.commit();
        update.hosts = dirty.union(&std::mem::take(&mut self.dirty_clusters)).cloned().collect();
    }

    /// Ports of services that this very workload is an endpoint of, and where it listens for them.
    fn served_here(&self, members: &[Member]) -> Vec<(u16, u16)> {
        let namespaces: BTreeSet<&Namespace> = members.iter().map(|m| &m.source.meta().namespace).collect();
        let endpoints = namespaces.into_iter().flat_map(|of| host_endpoints(members, of, &self.workloads));
        let own = endpoints.filter(|endpoint| self.cx.scope.ips.contains(&endpoint.address));
        own.map(|endpoint| (endpoint.service_port, endpoint.port)).collect()
    }

    fn put_gateways(&mut self, compiled: gateways::Compiled, update: &mut Update) {
        let before = std::mem::take(&mut self.gateways.written);
        for key in before.keys().filter(|key| !compiled.rows.contains_key(key)) {
            self.writer.remove(key);
        }
        for (key, row) in compiled.rows.iter().filter(|(key, row)| before.get(key) != Some(row)) {
            self.put(key, Some(row), &mut update.conflicts);
        }
        self.gateways.written = compiled.rows;
        let refused = compiled.refused.into_iter().map(|(subject, winner, loser)| Conflict {
            subject,
            rule: ConflictRule::Port,
            winner: Some(winner),
            losers: vec![loser],
        });
        update.conflicts.extend(refused);
        let ports: BTreeSet<u16> = self.plans.keys().chain(compiled.plans.keys()).copied().collect();
        for port in ports.into_iter().filter(|port| *port != 0) {
            let plan = compiled.plans.get(&port);
            if self.plans.get(&port) != plan {
                update.plans.push(port);
                match plan {
                    Some(plan) => drop(self.plans.insert(port, plan.clone())),
                    None => drop(self.plans.remove(&port)),
                }
            }
        }
    }
}
