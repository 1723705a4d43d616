//! Envoy's response flags, several of which may be true of one request.

use std::cell::RefCell;

/// Flags in the order in which Envoy writes them.
const ORDER: [&str; 20] = [
    "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "DC", "URX", "SI", "DPE", "DT", "UPE", "NC",
    "DF", "DR",
];

thread_local! {
    /// The combinations met on this thread; there are few, and they are never given back.
    static JOINED: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// Both, each once, separated by commas.
#[must_use]
pub fn join(some: &'static str, more: &'static str) -> &'static str {
    if more.is_empty() || some == more {
        return some;
    }
    if some.is_empty() {
        return more;
    }
    let named = |flag: &&&str| some.split(',').chain(more.split(',')).any(|one| one == **flag);
    let text = ORDER.iter().filter(named).copied().collect::<Vec<_>>().join(",");
    JOINED.with(|joined| {
        let mut joined = joined.borrow_mut();
        if let Some(known) = joined.iter().find(|known| **known == text) {
            return *known;
        }
        let new: &'static str = text.leak();
        joined.push(new);
        new
    })
}

#[cfg(test)]
mod tests {
    use super::join;

    #[test]
    fn flags_come_once_and_in_envoys_order() {
        assert_eq!(join("", "UF"), "UF");
        assert_eq!(join("DI", ""), "DI");
        assert_eq!(join("URX", "UF"), "UF,URX");
        assert_eq!(join("DI,UF", "UF,URX"), "UF,DI,URX");
    }
}
