//! Which endpoint a connection or request goes to, by Envoy's policies.

use std::{
    cell::{Cell, RefCell},
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
    rc::Rc,
};

use super::cluster::Policy;

/// What a balancer has to know of an endpoint.
pub trait Weighted {
    /// Requests and connections in progress.
    fn active(&self) -> u32;
    /// Share within the locality; at least 1.
    fn weight(&self) -> u32;
    /// Priority; only the lowest that is present is used.
    fn priority(&self) -> u32;
    /// Index and weight of the locality.
    fn locality(&self) -> (usize, u32);
}

/// Picks among the endpoints of one cluster on one thread.
pub struct Balancer<E> {
    /// By locality where localities are weighted, else one group: weight and members.
    groups: Vec<(u64, Group<E>)>,
    total: u64,
}

struct Group<E> {
    policy: Policy,
    endpoints: Vec<Rc<E>>,
    next: Cell<usize>,
    /// Earliest deadline first, where weights differ (Envoy's EDF scheduler).
    schedule: Option<RefCell<BinaryHeap<Deadline>>>,
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
    /// A balancer over these endpoints.
    #[must_use]
    pub fn new(policy: Policy, weighted_localities: bool, endpoints: &[Rc<E>]) -> Self {
        let first = endpoints.iter().map(|e| e.priority()).min();
        let mut by_locality: BTreeMap<usize, (u64, Vec<Rc<E>>)> = BTreeMap::new();
        for endpoint in endpoints.iter().filter(|e| Some(e.priority()) == first) {
            let (index, weight) = if weighted_localities { endpoint.locality() } else { (0, 1) };
            by_locality.entry(index).or_insert((u64::from(weight), Vec::new())).1.push(endpoint.clone());
        }
        let groups: Vec<_> = (by_locality.into_values())
            .filter(|(weight, _)| *weight > 0)
            .map(|(weight, endpoints)| (weight, Group::new(policy, endpoints)))
            .collect();
        Self { total: groups.iter().map(|g| g.0).sum(), groups }
    }

    /// The next endpoint; `None` where there is none.
    #[must_use]
    pub fn pick(&self) -> Option<Rc<E>> {
        if let [(_, group)] = self.groups.as_slice() {
            return group.pick();
        }
        if self.total == 0 {
            return None;
        }
        let mut at = fastrand::u64(..self.total);
        for (weight, group) in &self.groups {
            match at.checked_sub(*weight) {
                Some(rest) => at = rest,
                None => return group.pick(),
            }
        }
        None
    }
}

impl<E: Weighted> Group<E> {
    fn new(policy: Policy, endpoints: Vec<Rc<E>>) -> Self {
        let equal = endpoints.windows(2).all(|pair| pair[0].weight() == pair[1].weight());
        let schedule = (!equal).then(|| {
            let mut heap = BinaryHeap::with_capacity(endpoints.len());
            for (index, endpoint) in endpoints.iter().enumerate() {
                // Each starts somewhere in its first turn, so that threads and new snapshots do not march in step.
                let at = fastrand::f64() / f64::from(endpoint.weight());
                heap.push(Deadline { at, order: index as u64, index });
            }
            RefCell::new(heap)
        });
        let next = Cell::new(if endpoints.is_empty() { 0 } else { fastrand::usize(..endpoints.len()) });
        Self { policy, endpoints, next, schedule }
    }

    fn pick(&self) -> Option<Rc<E>> {
        if self.endpoints.len() <= 1 {
            return self.endpoints.first().cloned();
        }
        if let Some(schedule) = &self.schedule {
            let mut schedule = schedule.borrow_mut();
            let due = schedule.pop()?;
            let endpoint = self.endpoints.get(due.index)?;
            let load = match self.policy {
                Policy::LeastRequest => f64::from(endpoint.active()) + 1.0,
                Policy::RoundRobin | Policy::Random => 1.0,
            };
            let at = due.at + load / f64::from(endpoint.weight());
            schedule.push(Deadline { at, order: due.order + self.endpoints.len() as u64, index: due.index });
            return Some(endpoint.clone());
        }
        let any = || self.endpoints.get(fastrand::usize(..self.endpoints.len()));
        match self.policy {
            Policy::Random => any().cloned(),
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
    }

    fn fake(name: u32) -> Fake {
        Fake { name, weight: 1, active: 0, priority: 0, locality: (0, 1) }
    }

    fn counts(policy: Policy, localities: bool, endpoints: Vec<Fake>, picks: usize) -> BTreeMap<u32, usize> {
        let endpoints: Vec<_> = endpoints.into_iter().map(Rc::new).collect();
        let balancer = Balancer::new(policy, localities, &endpoints);
        let mut out = BTreeMap::new();
        for _ in 0..picks {
            *out.entry(balancer.pick().unwrap().name).or_default() += 1;
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

    #[test]
    fn nothing_to_pick_from_is_none() {
        assert!(Balancer::<Fake>::new(Policy::Random, true, &[]).pick().is_none());
    }
}
