//! Names of objects and clusters, each with one parser. Host names are in [`crate::name`].

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ObjectNameError {
    /// Longer than Kubernetes allows.
    #[error("name is {got} bytes long, expected at most {max}")]
    TooLong {
        /// Its length.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// A character that would make two names one where they are written side by side.
    #[error("character {character:?} cannot be part of a name")]
    Character {
        /// The character.
        character: char,
    },
}

/// Longest name of an object in Kubernetes (RFC 1123 subdomain).
const MAX_OBJECT: usize = 253;
/// Longest name of a namespace in Kubernetes (RFC 1123 label).
const MAX_NAMESPACE: usize = 63;
/// Longest name of a cluster: a prefix, a port, a subset and a host.
const MAX_CLUSTER: usize = 1024;

fn check(s: &str, max: usize, refused: impl Fn(char) -> bool) -> Result<(), ObjectNameError> {
    if s.len() > max {
        return Err(ObjectNameError::TooLong { got: s.len(), max });
    }
    match s.chars().find(|c| c.is_control() || c.is_whitespace() || refused(*c)) {
        Some(character) => Err(ObjectNameError::Character { character }),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $max:expr, $refused:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                $name(Arc::from(""))
            }
        }

        impl FromStr for $name {
            type Err = ObjectNameError;

            fn from_str(s: &str) -> Result<Self, ObjectNameError> {
                check(s, $max, $refused).map(|()| $name(Arc::from(s)))
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, other: &&str) -> bool {
                &*self.0 == *other
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                &*self.0 == other
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// A namespace. Kubernetes checks its form more strictly; this keeps out what would blur `namespace/name`.
    Namespace,
    MAX_NAMESPACE,
    |c| c == '/'
);

name!(
    /// An object's name; empty where a document has none.
    ObjectName,
    MAX_OBJECT,
    |c| c == '/'
);

name!(
    /// A cluster's name, as it is written into a header: `outbound|PORT|SUBSET|HOST` as istiod has it, or one of the
    /// special ones. The empty name is that of no cluster: there is no route, which is 404 for HTTP.
    ClusterName,
    MAX_CLUSTER,
    |_| false
);

name!(
    /// A route table's name.
    TableName,
    MAX_CLUSTER,
    |_| false
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_blur_two_names_is_refused() {
        assert_eq!("a/b".parse::<ObjectName>(), Err(ObjectNameError::Character { character: '/' }));
        assert_eq!("a\n".parse::<ClusterName>(), Err(ObjectNameError::Character { character: '\n' }));
        assert_eq!("n".repeat(64).parse::<Namespace>(), Err(ObjectNameError::TooLong { got: 64, max: 63 }));
        assert_eq!("istio-system".parse::<Namespace>().map(|n| n.to_string()), Ok("istio-system".to_owned()));
    }
}
