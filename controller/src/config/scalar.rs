//! What a plain YAML scalar means. Kubernetes tools read YAML 1.1, so `yes` is a boolean here and `0755` is octal.

use super::tree::Value;

/// Resolves a plain (unquoted) scalar.
pub(super) fn resolve(text: &str) -> Value {
    let Some(first) = text.bytes().next() else { return Value::Null };
    match first {
        b'~' | b'n' | b'N' | b'y' | b'Y' | b't' | b'T' | b'f' | b'F' | b'o' | b'O' => word(text),
        b'0'..=b'9' | b'-' | b'+' | b'.' => number(text).unwrap_or_else(|| Value::String(text.into())),
        _ => Value::String(text.into()),
    }
}

fn word(text: &str) -> Value {
    match text {
        "~" | "null" | "Null" | "NULL" => Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => Value::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => Value::Bool(false),
        _ => Value::String(text.into()),
    }
}

fn number(text: &str) -> Option<Value> {
    match text {
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => return Some(Value::Float(f64::INFINITY)),
        "-.inf" | "-.Inf" | "-.INF" => return Some(Value::Float(f64::NEG_INFINITY)),
        ".nan" | ".NaN" | ".NAN" => return Some(Value::Float(f64::NAN)),
        _ => {}
    }
    if !text.bytes().all(|b| b.is_ascii_hexdigit() || b"+-._xobXOB".contains(&b)) {
        return None;
    }
    let plain = text.replace('_', "");
    if let Some(integer) = integer(&plain) {
        return Some(Value::Int(integer));
    }
    // Rust reads "inf" and "e5" as floats; YAML wants a digit in front of the exponent.
    let body = plain.trim_start_matches(['+', '-']);
    let starts_like_a_number = body.starts_with(|c: char| c.is_ascii_digit())
        || (body.starts_with('.') && body[1..].starts_with(|c: char| c.is_ascii_digit()));
    let float: f64 = if starts_like_a_number { plain.parse().ok()? } else { return None };
    // 80.0 leaves a YAML-to-JSON conversion as 80.
    let whole = float.fract() == 0.0 && float.abs() < 9e15;
    #[allow(clippy::cast_possible_truncation, reason = "checked to be whole and small just above")]
    Some(if whole { Value::Int(float as i64) } else { Value::Float(float) })
}

fn integer(text: &str) -> Option<i64> {
    let (negative, body) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if !body.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let (radix, digits) = match body.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &body[2..]),
        [b'0', b'b' | b'B', ..] => (2, &body[2..]),
        [b'0', b'o' | b'O', ..] => (8, &body[2..]),
        [b'0', b'0'..=b'7', ..] => (8, &body[1..]),
        _ => (10, body),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let magnitude = i64::from_str_radix(digits, radix).ok()?;
    Some(if negative { -magnitude } else { magnitude })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_read_as_kubernetes_tools_read_them() {
        for (text, value) in [
            ("", Value::Null),
            ("~", Value::Null),
            ("on", Value::Bool(true)),
            ("no", Value::Bool(false)),
            ("80", Value::Int(80)),
            ("-1", Value::Int(-1)),
            ("0x1F", Value::Int(31)),
            ("0755", Value::Int(493)),
            ("1_000", Value::Int(1000)),
            ("80.0", Value::Int(80)),
            ("1.5", Value::Float(1.5)),
            ("10.0.0.1", Value::String("10.0.0.1".into())),
            ("2001:db8::1", Value::String("2001:db8::1".into())),
            ("2024-01-01T00:00:00Z", Value::String("2024-01-01T00:00:00Z".into())),
            ("e5", Value::String("e5".into())),
            ("none", Value::String("none".into())),
            ("-", Value::String("-".into())),
        ] {
            assert_eq!(resolve(text), value, "{text}");
        }
    }
}
