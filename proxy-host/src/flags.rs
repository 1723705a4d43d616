//! Envoy's response flags, several of which may be true of one request.

use std::cell::RefCell;

thread_local! {
    /// The combinations met on this thread; there are few, and they are never given back.
    static JOINED: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// Both, each once, separated by commas, in the order in which they became true, as Envoy writes them.
#[must_use]
pub fn join(some: &'static str, more: &'static str) -> &'static str {
    if more.is_empty() || some == more {
        return some;
    }
    if some.is_empty() {
        return more;
    }
    let new = more.split(',').filter(|flag| !some.split(',').any(|one| one == *flag));
    let text = std::iter::once(some).chain(new).collect::<Vec<_>>().join(",");
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
    fn flags_come_once_and_in_their_own_order() {
        assert_eq!(join("", "UF"), "UF");
        assert_eq!(join("DI", ""), "DI");
        assert_eq!(join("URX", "UF"), "URX,UF");
        assert_eq!(join("DI,URX", "URX,UF"), "DI,URX,UF");
    }
}
