//! What routes want done that a stock Envoy does by its configuration only, and not when a header says so: its listeners
//! are made to suit, and hold nothing of the kind where no route asks for it.

use std::collections::BTreeSet;

use portolan_registry::route::{ALL, Manner, Mirror, Retry, Route};

/// Of a route's mirrors that get a share of the requests, so many are told apart: each combination is a route in Envoy.
const SHARED: usize = 6;

/// What the routes of a scope need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Some requests are delayed.
    pub delays: bool,
    /// How some are retried, in place of the default.
    pub retries: BTreeSet<Manner>,
    /// Some connections go through a tunnel.
    pub tunnels: bool,
    /// The clusters that may get a copy of one request, in the order in which the filter names them.
    pub mirrors: BTreeSet<Vec<String>>,
}

impl Needs {
    /// What a table needs.
    pub(crate) fn of(routes: &[Route]) -> Self {
        let mut out = Needs::default();
        for extras in routes.iter().filter_map(|route| route.action.extras.as_deref()) {
            out.delays |= extras.fault.as_ref().is_some_and(|fault| fault.delay_ms > 0 && fault.delay_share > 0);
            out.retries.extend(extras.retry.as_ref().and_then(Retry::manner));
            out.mirrors.extend(combinations(&extras.mirrors));
        }
        out
    }

    pub(crate) fn add(&mut self, other: &Needs) {
        self.delays |= other.delays;
        self.retries.extend(other.retries.iter().copied());
        self.mirrors.extend(other.mirrors.iter().cloned());
    }

    /// All clusters that may get a copy.
    pub fn mirrored(&self) -> BTreeSet<&str> {
        self.mirrors.iter().flatten().map(String::as_str).collect()
    }
}

/// Which of a route's mirrors may get the same request.
fn combinations(mirrors: &[Mirror]) -> Vec<Vec<String>> {
    let mut out: Vec<Vec<String>> = vec![Vec::new()];
    let mut shared = 0;
    for Mirror { cluster, share } in mirrors {
        let without = if *share < ALL && shared < SHARED { out.clone() } else { Vec::new() };
        shared += usize::from(*share < ALL);
        out.iter_mut().for_each(|some| some.push(cluster.clone()));
        out.extend(without);
    }
    out.retain(|some| !some.is_empty());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_of_some_requests_may_be_missing() {
        let mirror = |cluster: &str, share| Mirror { cluster: cluster.to_owned(), share };
        let seen = |mirrors: &[Mirror]| -> Vec<String> {
            let mut seen: Vec<String> = combinations(mirrors).iter().map(|some| some.join(",")).collect();
            seen.sort();
            seen
        };
        assert_eq!(seen(&[]), [""; 0]);
        assert_eq!(seen(&[mirror("a", ALL), mirror("b", ALL)]), ["a,b"]);
        assert_eq!(seen(&[mirror("a", 1)]), ["a"]);
        assert_eq!(seen(&[mirror("a", 1), mirror("b", 1)]), ["a", "a,b", "b"]);
        assert_eq!(seen(&[mirror("a", 1), mirror("b", ALL)]), ["a,b", "b"]);
        let many: Vec<Mirror> = (0..40).map(|i| mirror(&i.to_string(), 1)).collect();
        assert_eq!(seen(&many).len(), 1 << SHARED);
    }
}
