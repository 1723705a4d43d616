//! Virtual addresses for hosts that declare none (SEMANTICS 2.9): one IPv4 and one IPv6 address for each namespace and
//! host, from Istio's ranges. What the status of an entry has already stays, whoever wrote it. Any other address follows
//! from the name, so that controllers agree and a restart changes nothing, but where two names meet at one address: there
//! the one that was first keeps it, and is never moved by another host that comes. Only an address that a resource
//! declares itself takes a place away, and one in a status takes it from a host that has it nowhere in writing.

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
/// No address of either family.
const NEITHER: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

type Key = (Namespace, Arc<str>);

/// Hosts that have no address yet: when their oldest entry was created, and their entries.
type New = BTreeMap<Key, (i64, BTreeSet<ObjectKey>)>;

/// Who has which address.
#[derive(Debug, Default)]
pub struct Allocator {
    held: BTreeMap<Key, Held>,
    /// Whose each address is, and how many resources declare it; the latter go first.
    taken: HashMap<IpAddr, Key>,
    declared: HashMap<IpAddr, usize>,
    /// What of the taken addresses the status of each entry has, and of how many entries each is.
    claims: HashMap<ObjectKey, Vec<IpAddr>>,
    written: HashMap<IpAddr, usize>,
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
        let mut new = New::new();
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
            self.unclaim(&key);
            let (old, hosts) = (before.as_deref().map(hosts), entry.as_deref().map(hosts));
            let (old, hosts) = (old.unwrap_or_default(), hosts.unwrap_or_default());
            for host in old.difference(&hosts) {
                self.leave(host, &key);
                if let Some((_, waiting)) = new.get_mut(host) {
                    waiting.remove(&key);
                }
            }
            for host in hosts {
                match self.held.get_mut(&host) {
                    Some(held) => drop(held.of.insert(key.clone())),
                    None => {
                        let created = entry.as_ref().map_or(0, |entry| entry.meta.created);
                        let (oldest, of) = new.entry(host).or_insert_with(|| (created, BTreeSet::new()));
                        *oldest = created.min(*oldest);
                        of.insert(key.clone());
                    }
                }
            }
            now.insert(key, entry);
        }
        self.honour(now.values().flatten(), &mut new, &mut moved);
        let mut follow: BTreeSet<ObjectKey> = BTreeSet::new();
        for key in moved {
            if let Some(held) = self.held.remove(&key) {
                follow.extend(held.of.iter().cloned());
                self.place(key, held.of, held.addresses);
            }
        }
        // Oldest first, then by name: the order in which they came in does not matter.
        let mut new: Vec<(i64, Key, BTreeSet<ObjectKey>)> =
            new.into_iter().map(|(key, (created, of))| (created, key, of)).collect();
        new.sort();
        for (_, key, of) in new.into_iter().filter(|(.., of)| !of.is_empty()) {
            self.place(key, of, NEITHER);
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

    /// Gives hosts what the status of their entries has, the oldest entry's first.
    fn honour<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Arc<ServiceEntry>>,
        new: &mut New,
        moved: &mut BTreeSet<Key>,
    ) {
        let mut entries: Vec<&Arc<ServiceEntry>> = entries.filter(|entry| !entry.status_addresses.is_empty()).collect();
        entries.sort_by_key(|entry| (entry.meta.created, &entry.meta.namespace, &entry.meta.name));
        for entry in entries {
            let of = Object::ServiceEntry(Arc::clone(entry)).key();
            for key in hosts(entry) {
                for address in in_status(entry, &key) {
                    self.claim(&of, &key, address, new, moved);
                }
            }
        }
    }

    /// The status of an entry has this address for a host.
    fn claim(&mut self, of: &ObjectKey, key: &Key, address: IpAddr, new: &mut New, moved: &mut BTreeSet<Key>) {
        if self.declared.contains_key(&address) {
            return;
        }
        if let Some(other) = self.taken.get(&address).filter(|other| *other != key) {
            if self.written.contains_key(&address) {
                return;
            }
            moved.insert(other.clone());
        }
        self.taken.insert(address, key.clone());
        *self.written.entry(address).or_default() += 1;
        self.claims.entry(of.clone()).or_default().push(address);
        let held = self.held.entry(key.clone()).or_insert_with(|| {
            let (_, of) = new.remove(key).unwrap_or_default();
            Held { addresses: NEITHER, of }
        });
        let Some(place) = held.addresses.get_mut(usize::from(address.is_ipv6())) else { return };
        if *place == address || self.written.contains_key(place) {
            return;
        }
        if self.taken.get(place) == Some(key) {
            self.taken.remove(place);
        }
        *place = address;
        // The other family may have none yet, and other entries of the host follow.
        moved.insert(key.clone());
    }

    /// Forgets what the status of an entry had. What its host goes on to hold stays.
    fn unclaim(&mut self, of: &ObjectKey) {
        for address in self.claims.remove(of).unwrap_or_default() {
            let Some(count) = self.written.get_mut(&address) else { continue };
            *count = count.saturating_sub(1);
            if *count > 0 {
                continue;
            }
            self.written.remove(&address);
            let held = self.taken.get(&address).and_then(|key| self.held.get(key));
            if !held.is_some_and(|held| held.addresses.contains(&address)) {
                self.taken.remove(&address);
            }
        }
    }

    fn leave(&mut self, host: &Key, key: &ObjectKey) {
        let Some(held) = self.held.get_mut(host) else { return };
        held.of.remove(key);
        if held.of.is_empty() {
            held.addresses.iter().for_each(|address| drop(self.taken.remove(address)));
            self.held.remove(host);
        }
    }

    /// Gives a host addresses: what it has of `keep`, unless a resource declares it, else what is free.
    fn place(&mut self, key: Key, of: BTreeSet<ObjectKey>, keep: [IpAddr; 2]) {
        let hash = hash(&key);
        let mut addresses = NEITHER;
        for (family, (places, kept)) in PLACES.into_iter().zip(keep).enumerate() {
            let own = self.taken.get(&kept) == Some(&key);
            if own && !self.declared.contains_key(&kept) {
                addresses[family] = kept;
                continue;
            }
            if own {
                self.taken.remove(&kept);
            }
            let free = |at: &IpAddr| !self.taken.contains_key(at) && !self.declared.contains_key(at);
            let at = |step: u128| address(family, (u128::from(hash) + step) % places);
            // Full ranges leave the host without an address.
            if let Some(found) = (0..PLACES[0]).map(at).find(free) {
                self.taken.insert(found, key.clone());
                addresses[family] = found;
            }
        }
        self.held.insert(key, Held { addresses, of });
    }

    fn with_addresses(&self, change: &Change) -> Change {
        let Change::Apply(Object::ServiceEntry(entry)) = change else { return change.clone() };
        let status = self.status(entry);
        if status == entry.status_addresses {
            return change.clone();
        }
        let entry = ServiceEntry { status_addresses: status, ..ServiceEntry::clone(entry) };
        Change::Apply(Object::ServiceEntry(Arc::new(entry)))
    }

    /// Addresses and hosts as the entry's status should have them: as it has them, where nothing speaks against it.
    fn status(&self, entry: &ServiceEntry) -> Vec<(String, String)> {
        let hosts = hosts(entry);
        let good =
            |key: &Key, address: &IpAddr| self.taken.get(address) == Some(key) && !self.declared.contains_key(address);
        let all_good = entry.status_addresses.iter().all(|(address, host)| {
            let key = key(entry, host);
            hosts.contains(&key) && address.parse().is_ok_and(|address| good(&key, &address))
        });
        if all_good && hosts.iter().all(|key| in_status(entry, key).next().is_some()) {
            return entry.status_addresses.clone();
        }
        let mut left = hosts;
        let mut status = Vec::new();
        for host in &entry.hosts {
            let Some(key) = left.take(&key(entry, host)) else { continue };
            let Some(held) = self.held.get(&key) else { continue };
            for of_family in held.addresses {
                // For a host the last of a family counts.
                let own = in_status(entry, &key).filter(|a| a.is_ipv6() == of_family.is_ipv6()).last();
                let address = own.filter(|own| good(&key, own)).unwrap_or(of_family);
                if !address.is_unspecified() {
                    status.push((address.to_string(), host.clone()));
                }
            }
        }
        status
    }
}

fn key(entry: &ServiceEntry, host: &str) -> Key {
    (entry.meta.namespace.clone(), group_key(host).into())
}

/// What the status of an entry has for one of its hosts.
fn in_status<'a>(entry: &'a ServiceEntry, (_, host): &'a Key) -> impl Iterator<Item = IpAddr> + 'a {
    let of_host = entry.status_addresses.iter().filter(move |(_, of)| group_key(of) == **host);
    of_host.filter_map(|(address, _)| address.parse::<IpAddr>().ok()).filter(|address| !address.is_unspecified())
}

/// The hosts of an entry that are entitled to addresses.
fn hosts(entry: &ServiceEntry) -> BTreeSet<Key> {
    let entitled = entry.hosts.iter().filter(|host| may_have_virtual_address(entry, host));
    entitled.map(|host| key(entry, host)).collect()
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

    /// An entry whose status is as another controller wrote it.
    fn written(name: &str, created: i64, hosts: &[&str], status: &[(&str, &str)]) -> Object {
        let Object::ServiceEntry(bare) = entry(name, hosts, &[]) else { unreachable!() };
        Object::ServiceEntry(Arc::new(ServiceEntry {
            meta: Meta { created, ..bare.meta.clone() },
            status_addresses: status.iter().map(|(address, host)| ((*address).into(), (*host).into())).collect(),
            ..ServiceEntry::clone(&bare)
        }))
    }

    #[test]
    fn what_a_status_has_stays() {
        let both: &[(&str, &str)] = &[("240.240.0.7", "A.com"), ("2001:2::7", "A.com")];
        let mut world = World::default();
        world.add(&[written("a", 2, &["A.com"], both), entry("b", &["a.com"], &[])]);
        let (a, b) = (world.status("a"), world.status("b"));
        assert_eq!(a, both.iter().map(|(a, h)| ((*a).to_owned(), (*h).to_owned())).collect::<Vec<_>>());
        assert_eq!((b[0].0.as_str(), b[1].0.as_str()), ("240.240.0.7", "2001:2::7"), "one for the host");
        // Istiod gives each entry its own.
        let other: &[(&str, &str)] = &[("240.240.0.9", "a.com"), ("2001:2::9", "a.com")];
        world.add(&[written("b", 3, &["a.com"], other)]);
        assert_eq!((world.v4("a").as_str(), world.v4("b").as_str()), ("240.240.0.7", "240.240.0.9"));
        // A host that comes gets both of a family; those that were there keep theirs.
        world.add(&[written("a", 2, &["A.com", "new.com"], both)]);
        let status = world.status("a");
        assert_eq!((status[0].0.as_str(), status.len()), ("240.240.0.7", 4), "{status:?}");
        // One of a family only, as of a controller with one range, is complete.
        let one: &[(&str, &str)] = &[("240.240.0.11", "one.com")];
        world.add(&[written("one", 4, &["one.com"], one)]);
        assert_eq!(world.status("one").len(), 1);
        // No longer entitled, no longer there.
        let Object::ServiceEntry(a) = written("a", 2, &["A.com"], both) else { unreachable!() };
        let none = ServiceEntry { resolution: Resolution::None, ..ServiceEntry::clone(&a) };
        world.add(&[Object::ServiceEntry(Arc::new(none))]);
        assert_eq!(world.status("a"), []);
    }

    #[test]
    fn of_two_that_have_one_address_in_writing_the_older_keeps_it() {
        let (old, young) = (
            written("old", 1, &["old.com"], &[("240.240.0.7", "old.com")]),
            written("young", 2, &["young.com"], &[("240.240.0.7", "young.com")]),
        );
        for both in [[old.clone(), young.clone()], [young, old]] {
            let mut world = World::default();
            world.add(&both);
            assert_eq!(world.v4("old"), "240.240.0.7");
            assert_ne!(world.v4("young"), "240.240.0.7");
        }
    }

    #[test]
    fn an_address_in_writing_goes_before_one_that_is_not() {
        let mut world = World::default();
        world.add(&[entry("a", &["a.com"], &[])]);
        let (v4, v6) = (world.v4("a"), world.status("a")[1].0.clone());
        world.add(&[written("b", 2, &["b.com"], &[(&v4, "b.com")])]);
        assert_eq!(world.v4("b"), v4);
        assert_ne!(world.v4("a"), v4);
        assert_eq!(world.status("a")[1].0, v6, "the other family stays");
        // And is free again with its entry.
        world.apply(&[Change::Delete(entry("b", &[], &[]).key())]);
        world.add(&[entry("c", &["c.com"], &[])]);
        assert!(!world.allocator.taken.contains_key(&v4.parse().unwrap()));
        assert!(world.allocator.written.is_empty() && world.allocator.claims.is_empty());
    }

    #[test]
    fn a_restart_moves_nobody() {
        let (first, second) = colliding();
        let mut world = World::default();
        // The younger name was there first, and so has the place of its hash.
        world.add(&[written("second", 5, &[&second], &[])]);
        world.add(&[written("first", 1, &[&first], &[])]);
        let now: Vec<Object> = world.objects.values().cloned().collect();
        let mut again = World::default();
        again.add(&now);
        for name in ["first", "second"] {
            assert_eq!(again.status(name), world.status(name));
        }
        assert_ne!(again.v4("first"), again.v4("second"));
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
