//! Endpoints that fail are left out for a while (Envoy's outlier detection). What is known of them all workers share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{breakers::Usage, cluster::Address, options::Ejection};

/// What all workers know of one cluster. Copies of the cluster share it; it does not tell two clusters apart.
#[derive(Debug, Clone)]
pub struct Shared(Arc<State>);

#[derive(Debug)]
struct State {
    begun: Instant,
    hosts: Mutex<HashMap<Vec<Address>, Arc<Health>>>,
    /// Grows with each ejection.
    version: AtomicU64,
    usage: Arc<Usage>,
}

/// What is known of one endpoint.
#[derive(Debug, Default)]
pub struct Health {
    /// When it was first there.
    since: Option<Instant>,
    errors: AtomicU32,
    gateway_errors: AtomicU32,
    local: AtomicU32,
    /// How often it was ejected of late.
    times: AtomicU32,
    /// Milliseconds since the cluster's begin, until which it is ejected.
    until: AtomicU64,
}

/// How a request or connection went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A response with this status.
    Status(u16),
    /// No connection, or it ended before the response.
    Broken,
    /// No response in time.
    Late,
    /// A connection for bytes was opened.
    Connected,
}

impl Default for Shared {
    fn default() -> Self {
        Self(Arc::new(State {
            begun: Instant::now(),
            hosts: Mutex::default(),
            version: AtomicU64::new(0),
            usage: Arc::default(),
        }))
    }
}

impl PartialEq for Shared {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Shared {}

impl Shared {
    /// What is known of the endpoint with these addresses.
    #[must_use]
    pub fn host(&self, addresses: &[Address]) -> Arc<Health> {
        let mut hosts = self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Health { since: Some(Instant::now()), ..Health::default() });
        hosts.entry(addresses.to_vec()).or_insert_with(new).clone()
    }

    /// What is going on.
    pub(super) fn usage(&self) -> &Arc<Usage> {
        &self.0.usage
    }

    /// Forgets endpoints that nobody uses.
    pub fn tidy(&self) {
        self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, health| Arc::strong_count(health) > 1);
    }

    /// Changes when an endpoint is ejected.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.version.load(Relaxed)
    }

    /// Milliseconds since the cluster's begin.
    #[must_use]
    pub fn now(&self) -> u64 {
        millis(self.0.begun.elapsed())
    }

    /// Takes note of how it went, and ejects the endpoint where that is one failure too many; `count` endpoints there
    /// are in all.
    pub fn note(&self, rules: &Ejection, health: &Health, count: usize, outcome: Outcome) {
        let status = match outcome {
            Outcome::Status(status) => {
                if rules.split {
                    health.local.store(0, Relaxed);
                }
                match &rules.codes[..] {
                    [] => status,
                    // As Envoy: those of the list are at least 500, and others are none.
                    codes if codes.contains(&status) => status.max(500),
                    _ => 200,
                }
            }
            Outcome::Connected if rules.split => {
                health.local.store(0, Relaxed);
                return;
            }
            Outcome::Connected => 200,
            Outcome::Broken | Outcome::Late if rules.split => {
                if reached(&health.local, rules.local) {
                    self.eject(rules, health, count);
                }
                return;
            }
            Outcome::Broken => 503,
            Outcome::Late => 504,
        };
        let gateway = if (502..=504).contains(&status) {
            reached(&health.gateway_errors, rules.gateway_errors)
        } else {
            clear(&health.gateway_errors);
            false
        };
        let error = if status >= 500 {
            reached(&health.errors, rules.errors)
        } else {
            clear(&health.errors);
            false
        };
        if gateway || error {
            self.eject(rules, health, count);
        }
    }

    fn eject(&self, rules: &Ejection, health: &Health, count: usize) {
        let hosts = self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let ejected = hosts.values().filter(|host| host.is_ejected(now)).count();
        if health.is_ejected(now) || (ejected + 1) * 100 > count * rules.share as usize {
            return;
        }
        // Each interval without an ejection takes one from the count.
        let calm = now.saturating_sub(health.until.load(Relaxed)) / millis(rules.interval).max(1);
        let times = health.times.load(Relaxed).saturating_sub(u32::try_from(calm).unwrap_or(u32::MAX)) + 1;
        health.times.store(times, Relaxed);
        health.until.store(now + millis((rules.time * times).min(rules.longest)).max(1), Relaxed);
        for counter in [&health.errors, &health.gateway_errors, &health.local] {
            counter.store(0, Relaxed);
        }
        self.0.version.fetch_add(1, Relaxed);
    }
}

impl Health {
    /// How long it has been there.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.map_or(Duration::MAX, |since| since.elapsed())
    }

    /// Whether it is left out now, in milliseconds since the cluster's begin.
    #[must_use]
    pub fn is_ejected(&self, now: u64) -> bool {
        now < self.until.load(Relaxed)
    }

    /// When it comes back, where it is left out now.
    #[must_use]
    pub fn back_at(&self, now: u64) -> Option<u64> {
        Some(self.until.load(Relaxed)).filter(|until| now < *until)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn reached(counter: &AtomicU32, threshold: Option<u32>) -> bool {
    let count = counter.fetch_add(1, Relaxed).saturating_add(1);
    threshold.is_some_and(|threshold| count >= threshold)
}

/// Written only where it changes, so that workers do not take the line from each other.
fn clear(counter: &AtomicU32) {
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Ejection {
        Ejection {
            codes: Vec::new(),
            errors: Some(3),
            gateway_errors: None,
            local: Some(2),
            split: false,
            interval: Duration::from_secs(10),
            time: Duration::from_secs(30),
            longest: Duration::from_secs(300),
            share: 50,
        }
    }

    fn at(path: &str) -> Vec<Address> {
        vec![Address::Unix(path.into())]
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_eject_and_each_time_for_longer() {
        let (shared, rules) = (Shared::default(), rules());
        let (a, b) = (shared.host(&at("a")), shared.host(&at("b")));
        for status in [500, 500, 200, 500, 500] {
            shared.note(&rules, &a, 2, Outcome::Status(status));
        }
        assert!(!a.is_ejected(shared.now()), "not in a row");
        shared.note(&rules, &a, 2, Outcome::Broken);
        assert!(a.is_ejected(shared.now()));
        for _ in 0..3 {
            shared.note(&rules, &b, 2, Outcome::Status(503));
        }
        assert!(!b.is_ejected(shared.now()), "no more than half of them");
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(!a.is_ejected(shared.now()));
        for _ in 0..3 {
            shared.note(&rules, &a, 2, Outcome::Late);
        }
        assert_eq!(a.back_at(shared.now()), Some(shared.now() + 60_000));
    }

    #[tokio::test(start_paused = true)]
    async fn local_failures_have_a_count_of_their_own_where_they_are_told_apart() {
        let (shared, rules) = (Shared::default(), Ejection { split: true, errors: Some(1), ..rules() });
        let a = shared.host(&at("a"));
        shared.note(&rules, &a, 2, Outcome::Broken);
        assert!(!a.is_ejected(shared.now()));
        shared.note(&rules, &a, 2, Outcome::Broken);
        assert!(a.is_ejected(shared.now()));
    }
}
