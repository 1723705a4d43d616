//! The headers of a request, for those who ask for them by name.

use std::borrow::Cow;

use portolan_registry::routing::Asked;

use crate::host::pairs::Pairs;

/// The headers as the host gave them; read from front to end for every question, since most requests ask none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Headers<'h>(pub(crate) &'h [u8]);

impl Asked for Headers<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let name = if name == "host" { ":authority" } else { name };
        let pairs = Pairs::new(self.0).ok()?;
        let mut values = pairs.filter_map(Result::ok).filter(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()));
        let mut joined = Cow::Borrowed(values.next()?.1);
        for (_, more) in values {
            let joined = joined.to_mut();
            joined.push(b',');
            joined.extend_from_slice(more);
        }
        Some(joined)
    }
}
