//! Values of headers that are set: Envoy puts in what stands between percent signs (`%HOSTNAME%`, `%REQ(x)%`).

/// A value that Envoy accepts.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(value: &str) -> Result<(), String> {
    if value.bytes().any(|b| b < 0x20 && b != b'\t' || b == 0x7f) {
        return Err(format!("header value configuration {value} is invalid"));
    }
    format(value.as_bytes()).map_err(|reason| format!("header value configuration: {reason} in {value:?}"))
}

/// Where in a value the reader is.
enum State {
    Text,
    Name,
    Arguments,
    NextString,
    String,
    AfterString,
    EndOfArguments,
    End,
}

fn format(value: &[u8]) -> Result<(), &'static str> {
    let mut state = State::Text;
    let mut bytes = value.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        state = match (state, byte) {
            (State::Text, b'%') => match bytes.peek() {
                None => return Err("un-escaped %"),
                Some(b'%') => {
                    bytes.next();
                    State::Text
                }
                Some(_) => State::Name,
            },
            (State::Name | State::End, b'%') | (State::Text, _) => State::Text,
            (State::Name, b'(') => State::Arguments,
            (State::Name, _) => State::Name,
            (State::Arguments, b'[') | (State::AfterString, b',') => State::NextString,
            (State::Arguments, b' ') => State::Arguments,
            (State::Arguments, _) | (State::NextString, b'"') => State::String,
            (State::NextString, b' ') => State::NextString,
            (State::NextString, _) => return Err("expected a quote"),
            (State::String, b'\\') => {
                bytes.next().ok_or("a backslash at the end")?;
                State::String
            }
            (State::String | State::EndOfArguments, b')') => State::End,
            (State::String, b'"') => State::AfterString,
            (State::String, _) => State::String,
            (State::AfterString, b']') => State::EndOfArguments,
            (State::AfterString, b' ') => State::AfterString,
            (State::AfterString, _) => return Err("expected a comma or a closing bracket"),
            (State::EndOfArguments, b' ') => State::EndOfArguments,
            (State::EndOfArguments, _) => return Err("expected a closing parenthesis"),
            (State::End, b' ') => State::End,
            (State::End, _) => return Err("expected %"),
        };
    }
    if matches!(state, State::Text) { Ok(()) } else { Err("a variable without its closing %") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_end_where_they_should() {
        for value in ["", "a b", "100%%", "%HOSTNAME%", "x %REQ(a)% y", "%META([\"a\", \"b\"])%", "a\tb"] {
            assert_eq!(check(value), Ok(()), "{value}");
        }
        for value in ["100%", "%A", "%A%%", "%REQ(a)", "%REQ(a)x%", "%META([\"a\" x])%", "a\nb", "a\u{7f}"] {
            assert!(check(value).is_err(), "{value}");
        }
    }
}
