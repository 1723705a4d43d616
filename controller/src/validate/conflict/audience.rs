//! Who sees an object, and who of those before it is seen by the same.

use std::collections::{BTreeMap, BTreeSet};

/// The namespaces that see an object; `None` for all of them.
pub(super) type Audience<'o> = Option<BTreeSet<&'o str>>;

/// The audience of an object of `namespace`.
pub(super) fn of<'o>(namespace: &'o str, export_to: &'o [String]) -> Audience<'o> {
    if export_to.is_empty() || export_to.iter().any(|e| e == "*") {
        return None;
    }
    if export_to.iter().any(|e| e == "~") {
        return Some(BTreeSet::new());
    }
    Some(export_to.iter().map(|e| if e == "." { namespace } else { e.as_str() }).collect())
}

/// Who claims one thing, kept so that those who share an audience with another are found without asking all.
#[derive(Debug)]
pub(super) struct Claims<'o, T> {
    public: Vec<T>,
    private: BTreeMap<&'o str, Vec<T>>,
}

impl<T> Default for Claims<'_, T> {
    fn default() -> Self {
        Claims { public: Vec::new(), private: BTreeMap::new() }
    }
}

impl<'o, T: Copy> Claims<'o, T> {
    /// Those that somebody of the audience sees, too; one may come several times.
    pub(super) fn seen_with(&self, audience: &Audience<'o>) -> impl Iterator<Item = T> {
        let nobody = audience.as_ref().is_some_and(BTreeSet::is_empty);
        let public = self.public.iter().filter(move |_| !nobody);
        let named = audience.iter().flatten().filter_map(|namespace| self.private.get(namespace)).flatten();
        let all = self.private.values().filter(|_| audience.is_none()).flatten();
        public.chain(named).chain(all).copied()
    }

    /// Adds one.
    pub(super) fn add(&mut self, claim: T, audience: &Audience<'o>) {
        match audience {
            None => self.public.push(claim),
            Some(namespaces) => {
                for namespace in namespaces {
                    self.private.entry(namespace).or_default().push(claim);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_with_a_common_audience_are_found() {
        let list = |entries: &[&str]| entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>();
        let (all, own, other, nobody) = (list(&[]), list(&["."]), list(&["b", "c"]), list(&["~"]));
        let mut claims = Claims::default();
        for (claim, export_to) in [(1, &all), (2, &own), (3, &other), (4, &nobody)] {
            claims.add(claim, &of("a", export_to));
        }
        let seen = |export_to| {
            let mut seen: Vec<i32> = claims.seen_with(&of("b", export_to)).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(&all), [1, 2, 3]);
        assert_eq!(seen(&own), [1, 3]);
        assert_eq!(seen(&nobody), [0; 0]);
    }
}
