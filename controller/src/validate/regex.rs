//! Expressions in RE2's syntax, as Envoy runs them.

use regex_syntax::ast::{self, Ast};

/// Envoy's limit on a program cannot be computed here; Istio limits the text instead.
const LONGEST: usize = 1024;

/// An expression that Envoy can run. `field` stands in the message as Istio has it.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(text: &str, field: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err(format!("{field:?}: regex string match should not be empty"));
    }
    if text.len() > LONGEST {
        return Err(format!("{field:?}: regex is too large, max length allowed is {LONGEST}"));
    }
    let wrong = |reason: String| {
        format!(
            "{field:?}: {reason}; Istio uses RE2 style regex-based match (https://github.com/google/re2/wiki/Syntax)"
        )
    };
    // What the parser below reads and RE2 does not, and the other way round; the rest is the same syntax.
    let rust = portable(text).map_err(wrong)?;
    let ast = ast::parse::ParserBuilder::new()
        .nest_limit(1000)
        .build()
        .parse(&rust)
        .map_err(|error| wrong(format!("error parsing regexp: {} in `{text}`", error.kind())))?;
    ast::visit(&ast, OnlyRe2).map_err(|reason| wrong(format!("error parsing regexp: {reason} in `{text}`")))?;
    regex_syntax::ParserBuilder::new()
        .nest_limit(1000)
        .build()
        .parse(&rust)
        .map(drop)
        .map_err(|error| wrong(format!("error parsing regexp: {}", last_line(&error.to_string()))))
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or(text)
}

/// Finds what our parser reads and RE2 does not.
struct OnlyRe2;

impl ast::Visitor for OnlyRe2 {
    type Output = ();
    type Err = &'static str;

    fn finish(self) -> Result<(), Self::Err> {
        Ok(())
    }

    fn visit_pre(&mut self, node: &Ast) -> Result<(), Self::Err> {
        let flags = match node {
            Ast::Repetition(outer) if matches!(*outer.ast, Ast::Repetition(_)) => {
                return Err("invalid nested repetition operator");
            }
            Ast::Flags(set) => &set.flags,
            Ast::Group(group) => match group.flags() {
                Some(flags) => flags,
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        let foreign = flags.items.iter().any(|item| {
            use ast::{Flag, FlagsItemKind};
            matches!(item.kind, FlagsItemKind::Flag(Flag::Unicode | Flag::CRLF | Flag::IgnoreWhitespace))
        });
        if foreign { Err("invalid or unsupported Perl syntax") } else { Ok(()) }
    }
}

/// The expression in the syntax of the parser that we use. RE2 takes a brace that is no repetition literally, knows
/// `\Q..\E`, `\C` and octal escapes, and limits repetitions to 1000.
fn portable(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len() + 8);
    let mut rest = text;
    let mut in_class = false;
    while let Some(c) = rest.chars().next() {
        let tail = &rest[c.len_utf8()..];
        match c {
            '\\' => {
                let Some(escaped) = tail.chars().next() else {
                    return Err("error parsing regexp: trailing backslash at end of expression: ``".into());
                };
                let after = &tail[escaped.len_utf8()..];
                match escaped {
                    'Q' if !in_class => {
                        let (literal, after) = after.split_once("\\E").unwrap_or((after, ""));
                        out.push_str(&regex_syntax::escape(literal));
                        rest = after;
                        continue;
                    }
                    'C' if !in_class => out.push('.'),
                    '0'..='7' => {
                        let length = after.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                        // A single digit other than 0 would be a back reference.
                        if escaped != '0' && length == 0 {
                            return Err(format!("error parsing regexp: invalid escape sequence: `\\{escaped}`"));
                        }
                        let digits = &tail[..=length];
                        let code = u32::from_str_radix(digits, 8).unwrap_or_default();
                        out.push_str(&format!("\\x{{{code:x}}}"));
                        rest = &tail[digits.len()..];
                        continue;
                    }
                    '<' | '>' | 'u' | 'U' => {
                        return Err(format!("error parsing regexp: invalid escape sequence: `\\{escaped}`"));
                    }
                    'p' | 'P' | 'x' if after.starts_with('{') && after.contains('}') => {
                        let end = escaped.len_utf8() + after.find('}').unwrap_or_default() + 1;
                        out.push('\\');
                        out.push_str(&tail[..end]);
                        rest = &tail[end..];
                        continue;
                    }
                    _ => {
                        out.push('\\');
                        out.push(escaped);
                    }
                }
                rest = after;
                continue;
            }
            '[' if in_class => {
                // A set inside a set is ours alone, save for [:alpha:].
                let named = tail.starts_with(':') && tail.contains(":]");
                if named {
                    let end = tail.find(":]").unwrap_or_default() + 2;
                    out.push('[');
                    out.push_str(&tail[..end]);
                    rest = &tail[end..];
                    continue;
                }
                out.push_str("\\[");
            }
            '[' => {
                in_class = true;
                out.push('[');
                rest = tail;
                if let Some(after) = rest.strip_prefix('^') {
                    out.push('^');
                    rest = after;
                }
                // The first bracket closes nothing.
                if let Some(after) = rest.strip_prefix(']') {
                    out.push_str("\\]");
                    rest = after;
                }
                continue;
            }
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            '&' | '~' if in_class => {
                // Set operations are ours alone.
                out.push('\\');
                out.push(c);
            }
            '{' if !in_class => match repetition(tail) {
                Some(length) => {
                    let numbers = tail[..length - 1].split(',').filter(|number| !number.is_empty());
                    if numbers.clone().any(|number| number.parse::<u32>().map_or(true, |number| number > 1000)) {
                        let repeat = &rest[..=length];
                        return Err(format!("error parsing regexp: invalid repeat count: `{repeat}`"));
                    }
                    out.push_str(&rest[..=length]);
                    rest = &tail[length..];
                    continue;
                }
                None => out.push_str("\\{"),
            },
            '}' if !in_class => out.push_str("\\}"),
            _ => out.push(c),
        }
        rest = tail;
    }
    Ok(out)
}

/// The length of `2,3}` at the beginning of the text.
fn repetition(text: &str) -> Option<usize> {
    let end = text.find('}')?;
    let (least, most) = match text[..end].split_once(',') {
        Some((least, most)) => (least, most),
        None => (&text[..end], ""),
    };
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    (!least.is_empty() && digits(least) && digits(most)).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_re2_reads() {
        for text in [
            "/v[0-9]+/.*",
            "a{2,3}",
            "{id}",
            "a{,3}",
            r"\Qa.b\E",
            r"\d+\pL\p{Greek}\x{41}",
            "(?i)abc",
            "(?P<name>x)",
            "[[:alpha:]_]+",
            "[]a]",
            "[a&&b]",
            r"\101",
            "x*?",
            "^/(a|b)$",
        ] {
            assert_eq!(check(text, "uri"), Ok(()), "{text}");
        }
    }

    #[test]
    fn what_re2_does_not_read() {
        for text in [
            "", "(", "[", r"\1", "(?=a)", "(?!a)", "(?<!a)", "a{1001}", "*", r"a\", "a**", "(?x)a", "b{2,1}", r"\u0041",
        ] {
            assert!(check(text, "uri").is_err(), "{text}");
        }
    }
}
