//! Cuts a file into its documents. YAML ends a document at every line that begins with `---`, whatever stands before
//! it, so a document that cannot be read does not take the others down.

/// One document of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'t> {
    /// Line of the file on which the text begins, from 1.
    pub line: u32,
    /// The text, without the `---` line when nothing else stands on it.
    pub text: &'t str,
}

/// The documents of a file that hold more than blanks and comments.
pub fn split(text: &str) -> impl Iterator<Item = Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut rest = Some(text);
    let mut line = 1u32;
    std::iter::from_fn(move || {
        loop {
            let text = rest?;
            let end = boundary(text);
            let (document, tail) = match end {
                Some(at) => (&text[..at], Some(&text[at..])),
                None => (text, None),
            };
            let first = line;
            line = line.saturating_add(newlines(document));
            rest = tail;
            if !is_blank(document) {
                return Some(Document { line: first, text: document });
            }
        }
    })
}

/// Where the next document begins: the first `---` line after the first line of `text`.
fn boundary(text: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(found) = text[from..].find("\n---") {
        let at = from + found + 1;
        match text.as_bytes().get(at + 3) {
            None | Some(b' ' | b'\t' | b'\r' | b'\n') => return Some(at),
            Some(_) => from = at + 3,
        }
    }
    None
}

fn newlines(text: &str) -> u32 {
    u32::try_from(text.bytes().filter(|&b| b == b'\n').count()).unwrap_or(u32::MAX)
}

fn is_blank(text: &str) -> bool {
    text.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line == "---" || line == "..."
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_know_their_lines() {
        let text = "# head\n---\na: 1\n--- # two\nb: |\n  ---\n\n---\n# nothing\n---\nc: 1\n";
        let found: Vec<(u32, &str)> = split(text).map(|d| (d.line, d.text)).collect();
        assert_eq!(found, [(2, "---\na: 1\n"), (4, "--- # two\nb: |\n  ---\n\n"), (10, "---\nc: 1\n")]);
    }

    #[test]
    fn dashes_within_a_line_are_no_boundary() {
        assert_eq!(split("a: 1\n---b: 2\n").count(), 1);
    }
}
