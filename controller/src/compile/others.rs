//! What routes ask about the hosts that they lead to.

use std::collections::HashMap;
use std::sync::Arc;

use portolan_registry::route::HashKey;

use super::HostState;
use super::http_routes::Others;
use super::rules::Rules;
use super::service::{self, Context, group_key};
use crate::model::Service;

/// All that routes may ask about the hosts that they lead to.
pub(super) struct Registry<'c> {
    pub(super) hosts: &'c HashMap<Arc<str>, HostState>,
    pub(super) aliases: &'c HashMap<Arc<str>, Arc<Service>>,
    pub(super) rules: &'c Rules,
    pub(super) cx: &'c Context,
}

impl Registry<'_> {
    fn resolve(&self, host: &str) -> Option<service::Resolved> {
        let state = self.hosts.get(&*group_key(host))?;
        service::resolve(&state.members, &state.aliases, self.cx)
    }
}

impl Others for Registry<'_> {
    fn only_port(&self, host: &str) -> Option<u16> {
        match self.resolve(host)?.ports.as_slice() {
            [only] => Some(only.number),
            _ => None,
        }
    }

    fn alias(&self, host: &str) -> Option<(String, Option<u16>)> {
        let service = self.aliases.get(&*group_key(host))?;
        let port = match service.ports.as_slice() {
            [only] => Some(only.number),
            _ => None,
        };
        Some((service.external_name.clone()?, port))
    }

    fn hash(&self, host: &str, port: u16, subset: &str, by_port: bool) -> Option<HashKey> {
        if !self.rules.hash() {
            return None;
        }
        let resolved = self.resolve(host)?;
        let owner = resolved.ports.iter().find(|owner| owner.number == port);
        let base = &resolved.services.get(owner.map_or(0, |owner| owner.base))?.member;
        self.rules.of(&base.source.meta().namespace, &base.host, self.cx)?.hash(port, subset, by_port)
    }

    fn tunnel(&self, host: &str, subset: &str) -> Option<String> {
        if !self.rules.tunnel() {
            return None;
        }
        let base = &self.resolve(host)?.services.first()?.member.clone();
        self.rules.of(&base.source.meta().namespace, &base.host, self.cx)?.tunnel(subset)
    }
}
