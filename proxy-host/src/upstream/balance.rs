//! Which endpoint a connection or request goes to, by Envoy's policies.

use std::{
    cell::{Cell, RefCell},
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
    rc::Rc,
    time::{Duration, Instant},
};

use super::{cluster::Policy, hash::Table, options::Warmup};

/// What a balancer has to know of an endpoint.
pub trait Weighted {
    /// Requests and connections in progress.
    fn active(&self) -> u32;
    /// Share within the locality; at least 1.
    fn weight(&self) -> u32;
    /// Priority; the lowest is used first.
    fn priority(&self) -> u32;
    /// Index and weight of the locality.
    fn locality(&self) -> (usize, u32);
    /// What its place among hashes depends on: its address.
    fn key(&self) -> String;
    /// How long it has been there.
    fn age(&self) -> Duration;
}

/// How endpoints are picked.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Within a group.
    pub policy: Policy,
    /// Localities are picked by weight before endpoints.
    pub localities: bool,
    /// Where fewer endpoints than this are well, in percent, all are used.
    pub panic: u32,
    /// How new endpoints begin, where turns or load decide.
    pub warmup: Option<Warmup>,
}

/// Picks among the endpoints of one cluster on one thread.
pub struct Balancer<E> {
    levels: Vec<Level<E>>,
}

/// The endpoints of one priority.
struct Level<E> {
    /// Share of the traffic, in percent.
    load: u64,
    /// By locality where localities are weighted, else one group: weight and members.
    groups: Vec<(u64, Group<E>)>,
    total: u64,
}

struct Group<E> {
    policy: Policy,
    endpoints: Vec<Rc<E>>,
    next: Cell<usize>,
    /// Where each hash has its place.
    table: Option<Table>,
    /// Earliest deadline first, where weights differ (Envoy's EDF scheduler).
    schedule: Option<RefCell<BinaryHeap<Deadline>>>,
    /// How new endpoints begin, and until when weights that are equal differ by that.
    warmup: Option<(Warmup, Option<Instant>)>,
}

#[derive(PartialEq)]
struct Deadline {
    at: f64,
    order: u64,
    index: usize,
}

impl Eq for Deadline {}
impl Ord for Deadline {
    fn cmp(&self, other: &Self) -> Ordering {
        // A max-heap, so the earliest is the greatest; ties go in order of insertion.
        other.at.total_cmp(&self.at).then(other.order.cmp(&self.order))
    }
}
impl PartialOrd for Deadline {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E: Weighted> Balancer<E> {
    /// A balancer over these endpoints, of which some may not be `well`.
    #[must_use]
    pub fn new(rules: Rules, endpoints: &[Rc<E>], well: impl Fn(&E) -> bool) -> Self {
        let mut by_priority: BTreeMap<u32, Vec<&Rc<E>>> = BTreeMap::new();
        for endpoint in endpoints {
            by_priority.entry(endpoint.priority()).or_default().push(endpoint);
        }
        let healths: Vec<u64> = by_priority
            .values()
            .map(|all| (well_of(all, &well) * OVERPROVISIONING / all.len().max(1) as u64).min(100))
            .collect();
        let health = healths.iter().sum::<u64>().min(100);
        let mut left = 100;
        let mut levels = Vec::new();
        for (all, own) in by_priority.into_values().zip(healths) {
            let share = well_of(&all, &well) * 100 / all.len().max(1) as u64;
            // As long as the priorities together are well, none of them panics.
            let panics = health < 100 && share < u64::from(rules.panic);
            // Where nothing is well, the first takes all, for what that is worth.
            let load = (own * 100).checked_div(health).unwrap_or(left).min(left);
            left -= load;
            if load > 0 {
                levels.push(Level::new(rules, load, &all, |endpoint| panics || well(endpoint)));
            }
        }
        // What rounding leaves goes to the first.
        if let Some(first) = levels.first_mut() {
            first.load += left;
        }
        Self { levels }
    }

    /// The next endpoint; `None` where there is none. A `hash`, with the number of the attempt, has its place where
    /// the policy is one of hashing.
    #[must_use]
    pub fn pick(&self, hash: Option<(u64, u32)>) -> Option<Rc<E>> {
        if let [level] = self.levels.as_slice() {
            return level.pick(hash);
        }
        let mut at = match hash {
            Some((hash, _)) => hash % 100,
            None => fastrand::u64(..100),
        };
        for level in &self.levels {
            match at.checked_sub(level.load) {
                Some(rest) => at = rest,
                None => return level.pick(hash),
            }
        }
        None
    }
}

/// A priority that is well to this part still takes all of the traffic, in percent (Envoy's overprovisioning factor).
const OVERPROVISIONING: u64 = 140;

fn well_of<E>(all: &[&Rc<E>], well: impl Fn(&E) -> bool) -> u64 {
    all.iter().filter(|endpoint| well(endpoint)).count() as u64
}

impl<E: Weighted> Level<E> {
    fn new(rules: Rules, load: u64, all: &[&Rc<E>], used: impl Fn(&E) -> bool) -> Self {
        let hashes = matches!(rules.policy, Policy::RingHash(_) | Policy::Maglev(_));
        let mut by_locality: BTreeMap<usize, (u64, Vec<Rc<E>>, u64)> = BTreeMap::new();
        for endpoint in all {
            let (index, weight) = if rules.localities { endpoint.locality() } else { (0, 1) };
            let group = by_locality.entry(index).or_insert((u64::from(weight), Vec::new(), 0));
            group.2 += 1;
            if used(endpoint) {
                group.1.push((*endpoint).clone());
            }
        }
        let mut groups: Vec<(u64, Vec<Rc<E>>)> = (by_locality.into_values())
            .map(|(weight, used, all)| {
                // A locality that is well in part has so much less weight.
                let well = (used.len() as u64 * OVERPROVISIONING).min(all * 100);
                (weight * well / all.max(1), used)
            })
            .filter(|(weight, used)| *weight > 0 && !used.is_empty())
            .collect();
        if hashes {
            // All of them have places in one table.
            let weights: Vec<u64> = groups.iter().flat_map(|(weight, used)| shares(*weight, used)).collect();
            let used: Vec<_> = groups.drain(..).flat_map(|(_, used)| used).collect();
            let group = Group::new(rules, used, Some(&weights));
            return Self { load, groups: vec![(1, group)], total: 1 };
        }
        let groups: Vec<_> = groups.into_iter().map(|(w, used)| (w, Group::new(rules, used, None))).collect();
        Self { load, total: groups.iter().map(|g| g.0).sum(), groups }
    }

    fn pick(&self, hash: Option<(u64, u32)>) -> Option<Rc<E>> {
        if let [(_, group)] = self.groups.as_slice() {
            return group.pick(hash);
        }
        if self.total == 0 {
            return None;
        }
        let mut at = fastrand::u64(..self.total);
        for (weight, group) in &self.groups {
            match at.checked_sub(*weight) {
                Some(rest) => at = rest,
                None => return group.pick(hash),
            }
        }
        None
    }
}

/// The weights of a locality's members, as parts of the locality's weight.
fn shares<E: Weighted>(weight: u64, members: &[Rc<E>]) -> Vec<u64> {
    let total: u64 = members.iter().map(|member| u64::from(member.weight())).sum();
    members.iter().map(|member| (weight * u64::from(member.weight()) * 1000 / total.max(1)).max(1)).collect()
}

/// The weight of an endpoint that may be new.
fn weight(endpoint: &impl Weighted, warmup: Option<(Warmup, Option<Instant>)>) -> f64 {
    f64::from(endpoint.weight()) * warmup.map_or(1.0, |(warmup, _)| warmup.factor(endpoint.age()))
}

impl<E: Weighted> Group<E> {
    fn new(rules: Rules, endpoints: Vec<Rc<E>>, weights: Option<&[u64]>) -> Self {
        let policy = rules.policy;
        let members = || -> Vec<_> {
            let weights = weights.unwrap_or_default().iter().copied();
            endpoints.iter().map(|endpoint| endpoint.key()).zip(weights).collect()
        };
        let table = match policy {
            Policy::RingHash(least) => Some(Table::ring(&members(), least)),
            Policy::Maglev(size) => Some(Table::maglev(&members(), size)),
            Policy::RoundRobin | Policy::LeastRequest | Policy::Random => None,
        };
        let equal = endpoints.windows(2).all(|pair| pair[0].weight() == pair[1].weight());
        let warmup = rules.warmup.filter(|_| matches!(policy, Policy::RoundRobin | Policy::LeastRequest));
        let youngest = endpoints.iter().map(|endpoint| endpoint.age()).min().unwrap_or(Duration::MAX);
        let warmup = warmup.filter(|warmup| youngest < warmup.window);
        let until = warmup.map(|warmup| Instant::now() + warmup.window.saturating_sub(youngest));
        let warmup = warmup.map(|warmup| (warmup, until.filter(|_| equal)));
        let schedule = (!equal || warmup.is_some()).then(|| {
            let mut heap = BinaryHeap::with_capacity(endpoints.len());
            for (index, endpoint) in endpoints.iter().enumerate() {
                // Each starts somewhere in its first turn, so that threads and new snapshots do not march in step.
                let at = fastrand::f64() / weight(endpoint.as_ref(), warmup);
                heap.push(Deadline { at, order: index as u64, index });
            }
            RefCell::new(heap)
        });
        let next = Cell::new(if endpoints.is_empty() { 0 } else { fastrand::usize(..endpoints.len()) });
        Self { policy, endpoints, next, table, schedule, warmup }
    }

    fn pick(&self, hash: Option<(u64, u32)>) -> Option<Rc<E>> {
        if self.endpoints.len() <= 1 {
            return self.endpoints.first().cloned();
        }
        if let Some(table) = &self.table {
            // A request without a hash goes anywhere.
            let (hash, attempt) = hash.unwrap_or_else(|| (fastrand::u64(..), 0));
            return table.choose(hash, attempt).and_then(|at| self.endpoints.get(at)).cloned();
        }
        let even = matches!(self.warmup, Some((_, Some(until))) if Instant::now() >= until);
        if let Some(schedule) = self.schedule.as_ref().filter(|_| !even) {
            let mut schedule = schedule.borrow_mut();
            let due = schedule.pop()?;
            let endpoint = self.endpoints.get(due.index)?;
            let load = match self.policy {
                Policy::LeastRequest => f64::from(endpoint.active()) + 1.0,
                _ => 1.0,
            };
            let at = due.at + load / weight(endpoint.as_ref(), self.warmup);
            schedule.push(Deadline { at, order: due.order + self.endpoints.len() as u64, index: due.index });
            return Some(endpoint.clone());
        }
        let any = || self.endpoints.get(fastrand::usize(..self.endpoints.len()));
        match self.policy {
            Policy::Random | Policy::RingHash(_) | Policy::Maglev(_) => any().cloned(),
            Policy::LeastRequest => {
                let (a, b) = (any()?, any()?);
                Some(if b.active() < a.active() { b.clone() } else { a.clone() })
            }
            Policy::RoundRobin => {
                let at = self.next.get() % self.endpoints.len();
                self.next.set(at + 1);
                self.endpoints.get(at).cloned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        name: u32,
        weight: u32,
        active: u32,
        priority: u32,
        locality: (usize, u32),
        ill: bool,
        age: Duration,
    }

    impl Weighted for Fake {
        fn active(&self) -> u32 {
            self.active
        }
        fn weight(&self) -> u32 {
            self.weight
        }
        fn priority(&self) -> u32 {
            self.priority
        }
        fn locality(&self) -> (usize, u32) {
            self.locality
        }
        fn key(&self) -> String {
            self.name.to_string()
        }
        fn age(&self) -> Duration {
            self.age
        }
    }

    fn fake(name: u32) -> Fake {
        Fake { name, weight: 1, active: 0, priority: 0, locality: (0, 1), ill: false, age: Duration::MAX }
    }

    fn counts(policy: Policy, localities: bool, endpoints: Vec<Fake>, picks: usize) -> BTreeMap<u32, usize> {
        let endpoints: Vec<_> = endpoints.into_iter().map(Rc::new).collect();
        let rules = Rules { policy, localities, panic: 50, warmup: None };
        let balancer = Balancer::new(rules, &endpoints, |endpoint| !endpoint.ill);
        let mut out = BTreeMap::new();
        for _ in 0..picks {
            *out.entry(balancer.pick(None).unwrap().name).or_default() += 1;
        }
        out
    }

    #[test]
    fn round_robin_takes_turns() {
        assert_eq!(
            counts(Policy::RoundRobin, false, vec![fake(1), fake(2), fake(3)], 9),
            [(1, 3), (2, 3), (3, 3)].into()
        );
    }

    #[test]
    fn weights_are_kept_exactly_over_a_round() {
        let endpoints = vec![Fake { weight: 3, ..fake(1) }, fake(2)];
        let seen = counts(Policy::RoundRobin, false, endpoints, 400);
        assert!((299..=301).contains(&seen[&1]), "{seen:?}");
    }

    #[test]
    fn least_request_avoids_the_busy_one() {
        let seen = counts(Policy::LeastRequest, false, vec![Fake { active: 9, ..fake(1) }, fake(2)], 1000);
        assert!(seen[&2] > 650, "{seen:?}");
    }

    #[test]
    fn only_the_first_priority_that_is_present_is_used() {
        let endpoints = vec![Fake { priority: 2, ..fake(1) }, Fake { priority: 1, ..fake(2) }];
        assert_eq!(counts(Policy::Random, false, endpoints, 20), [(2, 20)].into());
    }

    #[test]
    fn localities_without_weight_take_nothing_where_localities_are_weighted() {
        let endpoints = || vec![Fake { locality: (0, 0), ..fake(1) }, Fake { locality: (1, 5), ..fake(2) }];
        assert_eq!(counts(Policy::RoundRobin, true, endpoints(), 20), [(2, 20)].into());
        assert_eq!(counts(Policy::RoundRobin, false, endpoints(), 20).len(), 2);
    }

    fn ill(name: u32) -> Fake {
        Fake { ill: true, ..fake(name) }
    }

    #[test]
    fn those_that_are_not_well_are_left_out_until_too_few_are_left() {
        let seen = counts(Policy::RoundRobin, false, vec![fake(1), ill(2), fake(3)], 10);
        assert_eq!(seen, [(1, 5), (3, 5)].into());
        let seen = counts(Policy::RoundRobin, false, vec![fake(1), ill(2), ill(3)], 9);
        assert_eq!(seen.len(), 3, "below half of them all are used");
    }

    #[test]
    fn a_priority_that_is_not_well_gives_traffic_to_the_next() {
        let next = |name| Fake { priority: 1, ..fake(name) };
        // Half of the first is well: 70 percent stay with it.
        let seen = counts(Policy::RoundRobin, false, vec![fake(1), ill(2), next(3)], 2000);
        assert!((1300..1500).contains(&seen[&1]) && !seen.contains_key(&2), "{seen:?}");
        let seen = counts(Policy::RoundRobin, false, vec![ill(1), ill(2), next(3)], 10);
        assert_eq!(seen, [(3, 10)].into());
    }

    #[test]
    fn without_panic_nothing_is_used_that_is_not_well() {
        let rules = Rules { policy: Policy::Random, localities: false, panic: 0, warmup: None };
        let balancer = Balancer::new(rules, &[Rc::new(ill(1))], |endpoint| !endpoint.ill);
        assert!(balancer.pick(None).is_none());
    }

    const WARMUP: Warmup = Warmup { window: Duration::from_secs(100), aggression: 1000, least: 100 };

    #[test]
    fn a_new_endpoint_begins_with_less() {
        for policy in [Policy::RoundRobin, Policy::LeastRequest] {
            let endpoints = [fake(1), Fake { age: Duration::from_secs(25), ..fake(2) }].map(Rc::new);
            let rules = Rules { policy, localities: false, panic: 50, warmup: Some(WARMUP) };
            let balancer = Balancer::new(rules, &endpoints, |_| true);
            let new = (0..500).filter(|_| balancer.pick(None).unwrap().name == 2).count();
            assert!((98..=102).contains(&new), "{policy:?}: {new}");
        }
    }

    #[test]
    fn the_weight_of_a_new_endpoint_grows() {
        let at = |warmup: Warmup, seconds| (warmup.factor(Duration::from_secs(seconds)) * 1000.0).round();
        let steep = Warmup { aggression: 2000, ..WARMUP };
        assert_eq!([0, 5, 25, 64, 100].map(|s| at(WARMUP, s)), [100.0, 100.0, 250.0, 640.0, 1000.0]);
        assert_eq!([0, 25, 64, 100].map(|s| at(steep, s)), [100.0, 500.0, 800.0, 1000.0]);
    }

    #[test]
    fn a_hash_stays_with_its_endpoint_while_that_is_well() {
        for policy in [Policy::RingHash(1024), Policy::Maglev(65537)] {
            let endpoints: Vec<_> = (0..5).map(|name| Rc::new(fake(name))).collect();
            let rules = Rules { policy, localities: false, panic: 0, warmup: None };
            let place = |balancer: &Balancer<Fake>, hash| balancer.pick(Some((hash, 0))).unwrap().name;
            let all = Balancer::new(rules, &endpoints, |_| true);
            let again = Balancer::new(rules, &endpoints, |_| true);
            let some = Balancer::new(rules, &endpoints, |endpoint| endpoint.name != 2);
            let hashes = (0..1000u64).map(|key| crate::upstream::hash::of(&key.to_le_bytes()));
            let (mut stayed, mut of) = (0, 0);
            for hash in hashes {
                assert_eq!(place(&all, hash), place(&again, hash));
                assert_ne!(place(&some, hash), 2);
                if place(&all, hash) != 2 {
                    of += 1;
                    stayed += u32::from(place(&all, hash) == place(&some, hash));
                }
            }
            assert!(stayed * 10 > of * 7, "{stayed} of {of}");
        }
    }

    #[test]
    fn nothing_to_pick_from_is_none() {
        let rules = Rules { policy: Policy::Random, localities: true, panic: 50, warmup: None };
        assert!(Balancer::<Fake>::new(rules, &[], |_| true).pick(None).is_none());
    }
}
