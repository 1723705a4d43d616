//! Virtual addresses for hosts that declare none (SEMANTICS 2.9): one IPv4 and one IPv6 address for each namespace and
//! host, from Istio's ranges. A host's address follows from its name, so that controllers agree and a restart changes
//! nothing, but where two names meet at one address: there the one that was first keeps it, and is never moved by another
//! host that comes. Only an address that a resource declares itself takes a place away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use portolan_registry::object::Namespace;

use crate::compile::service::{group_key, may_have_virtual_address};
use crate::model::{Change, Object, ObjectKey, ServiceEntry};

/// 240.240.0.0/16
const V4: u32 = 0xf0f0_0000;
/// 2001:2::/48
const V6: u128 = 0x2001_0002 << 96;
/// Places in a range; the first and the last of the IPv4 range stay free.
const PLACES: [u128; 2] = [0xfffe, 1 << 64];

type Key = (Namespace, Arc<str>);

/// Who has which address.
#[derive(Debug, Default)]
pub struct Allocator {
    held: BTreeMap<Key, Held>,
    /// Whose each address is, and how many resources declare it; the latter go first.
    taken: HashMap<IpAddr, Key>,
    declared: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Held {
    addresses: [IpAddr; 2],
    /// Entries of the host.
    of: BTreeSet<ObjectKey>,
}

impl Allocator {
    /// The same changes, with addresses in the status of the entries that are entitled to them; entries whose addresses
    /// had to move follow. `objects` are those in force before.
    pub fn assign(&mut self, changes: &[Change], objects: &HashMap<ObjectKey, Object>) -> Vec<Change> {
        let mut moved: BTreeSet<Key> = BTreeSet::new();
        let mut new: BTreeMap<(i64, Key), BTreeSet<ObjectKey>> = BTreeMap::new();
        let mut now: HashMap<ObjectKey, Option<Arc<ServiceEntry>>> = HashMap::new();
        for change in changes {
            let (key, entry) = match change {
                Change::Apply(Object::ServiceEntry(entry)) => {
                    (Object::ServiceEntry(entry.clone()).key(), Some(entry.clone()))
                }
                Change::Delete(key) => (key.clone(), None),
                Change::Apply(_) => continue,
            };
            let before = match now.get(&key) {
                Some(before) => before.clone(),
                None => match objects.get(&key) {
                    Some(Object::ServiceEntry(entry)) => Some(entry.clone()),
                    _ => None,
                },
            };
            if let Some(before) = &before {
                for address in declared(before) {
                    self.declared.entry(address).and_modify(|count| *count = count.saturating_sub(1));
                }
            }
            self.declared.retain(|_, count| *count > 0);
            for address in entry.iter().flat_map(|entry| declared(entry)) {
                *self.declared.entry(address).or_default() += 1;
                if let Some(of) = self.taken.get(&address) {
                    moved.insert(of.clone());
                }
            }
            let (old, hosts) = (before.as_deref().map(hosts), entry.as_deref().map(hosts));
            let (old, hosts) = (old.unwrap_or_default(), hosts.unwrap_or_default());
            for host in old.difference(&hosts) {
                self.leave(host, &key);
                if let Some(waiting) = new.iter_mut().find(|((_, of), _)| of == host) {
                    waiting.1.remove(&key);
                }
            }
            for host in hosts {
                match self.held.get_mut(&host) {
                    Some(held) => drop(held.of.insert(key.clone())),
                    None => {
                        let created = entry.as_ref().map_or(0, |entry| entry.meta.created);
                        new.entry((created, host)).or_default().insert(key.clone());
                    }
                }
            }
            now.insert(key, entry);
        }
        let mut follow: BTreeSet<ObjectKey> = BTreeSet::new();
        for key in moved {
            if let Some(held) = self.held.remove(&key) {
                held.addresses.iter().for_each(|address| drop(self.taken.remove(address)));
                follow.extend(held.of.iter().cloned());
                let keep = held.addresses;
                self.place(key, held.of, Some(keep));
            }
        }
        // Oldest first, then by name: the order in which they came in does not matter.
        for ((_, key), of) in new {
            match self.held.get_mut(&key) {
                Some(held) => held.of.extend(of),
                None if of.is_empty() => {}
                None => self.place(key, of, None),
            }
        }
        let mut out: Vec<Change> = changes.iter().map(|change| self.with_addresses(change)).collect();
        for key in follow.into_iter().filter(|key| !now.contains_key(key)) {
            if let Some(object) = objects.get(&key) {
                out.push(self.with_addresses(&Change::Apply(object.clone())));
            }
        }
        out
    }

    /// What each host has, for people.
    pub fn all(&self) -> impl Iterator<Item = (&Namespace, &str, &[IpAddr; 2])> {
        self.held.iter().map(|((namespace, host), held)| (namespace, host.as_ref(), &held.addresses))
    }

    fn leave(&mut self, host: &Key, key: &ObjectKey) {
        let Some(held) = self.held.get_mut(host) else { return };
        held.of.remove(key);
        if held.of.is_empty() {
            held.addresses.iter().for_each(|address| drop(self.taken.remove(address)));
            self.held.remove(host);
        }
    }

    fn place(&mut self, key: Key, of: BTreeSet<ObjectKey>, before: Option<[IpAddr; 2]>) {
        let hash = hash(&key);
        let mut addresses = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        for (family, places) in PLACES.into_iter().enumerate() {
            let free = |at: &IpAddr| !self.taken.contains_key(at) && !self.declared.contains_key(at);
            let at = |step: u128| address(family, (u128::from(hash) + step) % places);
            // Full ranges leave the host without an address.
            let tries = 0..PLACES[0];
            let found = before.map(|before| before[family]).filter(free).or_else(|| tries.map(at).find(free));
            if let Some(found) = found {
                self.taken.insert(found, key.clone());
                addresses[family] = found;
            }
        }
        self.held.insert(key, Held { addresses, of });
    }

    fn with_addresses(&self, change: &Change) -> Change {
        let Change::Apply(Object::ServiceEntry(entry)) = change else { return change.clone() };
        let mut status: Vec<(String, String)> = Vec::new();
        for host in hosts(entry) {
            let Some(held) = self.held.get(&host) else { continue };
            let usable = held.addresses.iter().filter(|address| !address.is_unspecified());
            status.extend(usable.map(|address| (address.to_string(), host.1.to_string())));
        }
        if status == entry.status_addresses {
            return change.clone();
        }
        let entry = ServiceEntry { status_addresses: status, ..ServiceEntry::clone(entry) };
        Change::Apply(Object::ServiceEntry(Arc::new(entry)))
    }
}

/// The hosts of an entry that are entitled to addresses.
fn hosts(entry: &ServiceEntry) -> BTreeSet<Key> {
    let entitled = entry.hosts.iter().filter(|host| may_have_virtual_address(entry, host));
    entitled.map(|host| (entry.meta.namespace.clone(), group_key(host).into())).collect()
}

/// Addresses within the ranges that an entry declares.
fn declared(entry: &ServiceEntry) -> Vec<IpAddr> {
    let within = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.to_bits() & 0xffff_0000 == V4,
        IpAddr::V6(v6) => v6.to_bits() >> 80 == V6 >> 80,
    };
    entry.addresses.iter().filter_map(|address| address.parse().ok()).filter(within).collect()
}

fn address(family: usize, place: u128) -> IpAddr {
    #[expect(clippy::cast_possible_truncation, reason = "it is below the number of places")]
    match family {
        0 => Ipv4Addr::from_bits(V4 + 1 + place as u32).into(),
        _ => Ipv6Addr::from_bits(V6 + 1 + place).into(),
    }
}

/// FNV-1a: written down somewhere, so that it stays the same.
fn hash((namespace, host): &Key) -> u64 {
    let bytes = namespace.bytes().chain(*b"/").chain(host.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Meta, Resolution};

    fn entry(name: &str, hosts: &[&str], addresses: &[&str]) -> Object {
        Object::ServiceEntry(Arc::new(ServiceEntry {
            meta: Meta { namespace: "n".parse().unwrap(), name: name.parse().unwrap(), ..Meta::default() },
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            resolution: Resolution::Dns,
            ..ServiceEntry::default()
        }))
    }

    /// Objects in force, as the engine holds them.
    #[derive(Default)]
    struct World {
        allocator: Allocator,
        objects: HashMap<ObjectKey, Object>,
    }

    impl World {
        fn apply(&mut self, changes: &[Change]) {
            for change in self.allocator.assign(changes, &self.objects) {
                match change {
                    Change::Apply(object) => drop(self.objects.insert(object.key(), object)),
                    Change::Delete(key) => drop(self.objects.remove(&key)),
                }
            }
        }

        fn add(&mut self, objects: &[Object]) {
            self.apply(&objects.iter().cloned().map(Change::Apply).collect::<Vec<_>>());
        }

        fn status(&self, name: &str) -> Vec<(String, String)> {
            let found = self.objects.values().find(|object| object.meta().name == name).unwrap();
            let Object::ServiceEntry(entry) = found else { panic!("{found:?}") };
            entry.status_addresses.clone()
        }

        fn v4(&self, name: &str) -> String {
            self.status(name)[0].0.clone()
        }
    }

    #[test]
    fn one_address_of_each_family_for_each_host() {
        let mut world = World::default();
        world.add(&[entry("a", &["a.com", "b.com", "*.c.com"], &[]), entry("d", &["d.com"], &["10.0.0.1"])]);
        let status = world.status("a");
        let hosts: Vec<&str> = status.iter().map(|(_, host)| host.as_str()).collect();
        assert_eq!(hosts, ["a.com", "a.com", "b.com", "b.com"]);
        let all: BTreeSet<&String> = status.iter().map(|(address, _)| address).collect();
        assert_eq!(all.len(), 4);
        assert!(status[0].0.starts_with("240.240.") && status[1].0.starts_with("2001:2:"), "{status:?}");
        assert_eq!(world.status("d"), []);
        // A second entry of the host shares them.
        world.add(&[entry("e", &["a.com"], &[])]);
        assert_eq!(world.status("e"), status[..2]);
    }

    /// Names that meet at one IPv4 address.
    fn colliding() -> (String, String) {
        let mut seen: HashMap<u128, String> = HashMap::new();
        for i in 0.. {
            let name = format!("h{i}.com");
            let place = u128::from(hash(&("n".parse().unwrap(), name.as_str().into()))) % PLACES[0];
            if let Some(other) = seen.insert(place, name.clone()) {
                return (other, name);
            }
        }
        unreachable!("there are more names than places")
    }

    #[test]
    fn nobody_is_moved_by_others() {
        let (first, second) = colliding();
        let mut world = World::default();
        world.add(&[entry("second", &[&second], &[])]);
        let held = world.v4("second");
        let more: Vec<Object> = (0..500).map(|i| entry(&format!("m{i}"), &[&format!("m{i}.com")], &[])).collect();
        world.add(&[entry("first", &[&first], &[])]);
        world.add(&more);
        assert_eq!(world.v4("second"), held);
        assert_ne!(world.v4("first"), held);
        let first = world.v4("first");
        world.apply(&[Change::Delete(entry("second", &[], &[]).key())]);
        assert_eq!(world.v4("first"), first);
        let unique: BTreeSet<IpAddr> = world.allocator.all().map(|(_, _, addresses)| addresses[0]).collect();
        assert_eq!(unique.len(), 501);
    }

    #[test]
    fn the_order_within_a_batch_does_not_matter() {
        let (first, second) = colliding();
        let [one, two] = [entry("one", &[&first], &[]), entry("two", &[&second], &[])];
        let (mut forth, mut back) = (World::default(), World::default());
        forth.add(&[one.clone(), two.clone()]);
        back.add(&[two, one]);
        assert_eq!((forth.v4("one"), forth.v4("two")), (back.v4("one"), back.v4("two")));
    }

    #[test]
    fn what_a_resource_declares_goes_first() {
        let mut world = World::default();
        world.add(&[entry("a", &["a.com"], &[])]);
        let held = world.v4("a");
        world.add(&[entry("b", &["b.com"], &[&held])]);
        let moved = world.v4("a");
        assert_ne!(moved, held);
        world.apply(&[Change::Delete(entry("b", &[], &[]).key())]);
        assert_eq!(world.v4("a"), moved, "it stays where it is");
    }
}
