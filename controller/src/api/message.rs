//! Messages declared once: the macros make of a list of fields both the type and its decoding (see [`super::decode`]).

use std::collections::BTreeMap;

use jiff::SignedDuration;

use crate::api::decode::{self, Path};
use crate::config::tree::{Node, Value};
use crate::validate::finding::Issue;

/// A value that protobuf JSON can hold. Absent and `null` are its default.
pub trait Decode: Default {
    /// Reads it; what cannot be read is reported and becomes the default.
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self;
}

impl Decode for String {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::string(node, path, issues)
    }
}

impl Decode for bool {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::boolean(node, path, issues)
    }
}

impl Decode for u32 {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::uint32(node, path, issues)
    }
}

impl Decode for i32 {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::integer(node, "a number from -2147483648 to 2147483647", path, issues)
    }
}

impl Decode for u64 {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::integer(node, "a number from 0 to 9223372036854775807", path, issues)
    }
}

impl Decode for f64 {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::double(node, path, issues)
    }
}

impl Decode for SignedDuration {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::duration(node, path, issues)
    }
}

/// `bytes`, in base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Decode for Bytes {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        Bytes(decode::base64(node, path, issues))
    }
}

/// A field that may be absent: a message, a wrapper or a member of a `oneof`.
impl<T: Decode> Decode for Option<T> {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        node.filter(|node| !node.is_null()).map(|node| T::decode(Some(node), path, issues))
    }
}

/// An item that is `null` is an empty message.
impl<T: Decode> Decode for Vec<T> {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::list(node, path, issues, |node, path, issues| T::decode(Some(node), path, issues))
    }
}

impl<T: Decode> Decode for BTreeMap<String, T> {
    fn decode(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Self {
        decode::map(node, path, issues, T::decode)
    }
}

/// The name or number of an enum, `None` (reported) if it is neither.
pub(super) fn enum_number(node: Option<&Node>, names: &[(&str, i32)], path: &Path<'_>, issues: &mut Vec<Issue>) -> i32 {
    match node.map(|node| &node.value) {
        // In quotes a number is a name that nobody knows.
        Some(Value::Int(_) | Value::String(_)) => decode::enumeration(node, names, path, issues),
        None | Some(Value::Null) => 0,
        Some(_) => {
            decode::wrong_type(node, "the name of a value", path, issues);
            0
        }
    }
}

/// Declares a message: each field with its type and its name in JSON.
macro_rules! message {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty = $json:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl $crate::api::message::Decode for $name {
            fn decode(
                node: Option<&$crate::config::tree::Node>,
                path: &$crate::api::decode::Path<'_>,
                issues: &mut Vec<$crate::validate::finding::Issue>,
            ) -> Self {
                let mut fields = $crate::api::decode::Fields::of(node, path, issues);
                let message = $name {
                    $($field: <$type as $crate::api::message::Decode>::decode(
                        fields.take($json),
                        &path.field($json),
                        issues,
                    ),)*
                };
                fields.finish(path, issues);
                message
            }
        }
    };
}

/// Declares an enum; the first value is number 0 and the default. Numbers without a name are kept.
macro_rules! enumeration {
    ($(#[$meta:meta])* $name:ident { $(#[$first_meta:meta])* $first:ident = 0 $first_json:literal,
        $($(#[$value_meta:meta])* $value:ident = $number:literal $json:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub enum $name {
            $(#[$first_meta])*
            #[default]
            $first,
            $($(#[$value_meta])* $value,)*
            /// A number that has no name.
            Other(i32),
        }

        impl $crate::api::message::Decode for $name {
            fn decode(
                node: Option<&$crate::config::tree::Node>,
                path: &$crate::api::decode::Path<'_>,
                issues: &mut Vec<$crate::validate::finding::Issue>,
            ) -> Self {
                const NAMES: &[(&str, i32)] = &[($first_json, 0), $(($json, $number),)*];
                match $crate::api::message::enum_number(node, NAMES, path, issues) {
                    0 => $name::$first,
                    $($number => $name::$value,)*
                    other => $name::Other(other),
                }
            }
        }
    };
}

pub(super) use {enumeration, message};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    message! {
        /// All kinds of fields.
        Sample {
            /// Text.
            text: String = "text",
            /// Perhaps a number.
            number: Option<u32> = "someNumber",
            /// Signed.
            signed: i32 = "signed",
            /// Durations.
            times: Vec<SignedDuration> = "times",
            /// Messages.
            items: Vec<Sample> = "items",
            /// An enum.
            color: Color = "color",
            /// Digits after a hump.
            errors: Option<u32> = "consecutive5xxErrors",
        }
    }

    enumeration! {
        /// Colours.
        Color {
            /// Red.
            Red = 0 "RED",
            /// Green.
            Green = 2 "GREEN",
        }
    }

    fn sample(text: &str) -> (Sample, Vec<Issue>) {
        let mut issues = Vec::new();
        let sample = Sample::decode(Some(&tree::parse(text, 1).unwrap().root), &Path::root("spec"), &mut issues);
        (sample, issues)
    }

    #[test]
    fn what_protobuf_json_reads() {
        let (sample, issues) = sample(
            "{text: a, someNumber: '7', signed: -3, times: [1.5s, -1m], items: [null, {text: b}], color: 2, \
             consecutive5xxErrors: 1}",
        );
        assert!(issues.is_empty(), "{issues:?}");
        assert_eq!((sample.number, sample.signed, sample.color), (Some(7), -3, Color::Green));
        assert_eq!(sample.times, [SignedDuration::from_millis(1500), SignedDuration::from_secs(-60)]);
        assert_eq!(sample.items.iter().map(|item| item.text.as_str()).collect::<Vec<_>>(), ["", "b"]);
        assert_eq!(sample.errors, Some(1));
    }

    #[test]
    fn snake_case_is_read_and_told() {
        let (sample, issues) = sample("{some_number: 7, consecutive_5xx_errors: 2}");
        assert_eq!((sample.number, sample.errors), (Some(7), Some(2)));
        assert!(issues.iter().all(|issue| issue.code == "snake-case" && !issue.rejects()), "{issues:?}");
        assert_eq!(issues.len(), 2);
    }

    #[test]
    fn what_cannot_be_read_names_its_field() {
        for (text, field) in [
            ("{items: [{someNumber: -1}]}", "spec.items[0].someNumber"),
            ("{color: BLUE}", "spec.color"),
            ("{times: [10]}", "spec.times[0]"),
            ("{times: ['10']}", "spec.times[0]"),
            ("{signed: 2147483648}", "spec.signed"),
        ] {
            let (_, issues) = sample(text);
            assert_eq!(issues.iter().map(|issue| issue.field.as_str()).collect::<Vec<_>>(), [field], "{text}");
            assert!(issues[0].rejects());
        }
    }
}
