//! The headers of a request, for those who ask for them by name.

use std::borrow::Cow;

use portolan_registry::routing::Asked;

use crate::host::pairs::Pairs;

/// The headers as the host gave them; read from front to end for every question, since most requests ask none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Headers<'h>(pub(crate) &'h [u8]);

impl<'h> Headers<'h> {
    /// The value of the first cookie of this name without quotes; an empty one counts as none.
    pub(crate) fn cookie(&self, name: &str) -> Option<&'h [u8]> {
        let pairs = Pairs::new(self.0).ok()?;
        let headers = pairs.filter_map(Result::ok).filter(|(n, _)| n.eq_ignore_ascii_case(b"cookie"));
        let mut cookies = headers.flat_map(|(_, value)| value.split(|b| *b == b';')).filter_map(|cookie| {
            let cookie = cookie.trim_ascii();
            let at = cookie.iter().position(|b| *b == b'=')?;
            Some((cookie.get(..at)?, cookie.get(at + 1..)?))
        });
        let value = cookies.find(|(known, _)| *known == name.as_bytes())?.1;
        let bare = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value);
        (!bare.is_empty()).then_some(bare)
    }
}

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
