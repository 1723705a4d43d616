//! Bytes of what a route holds: fields in order, numbers as varints, texts and lists with their lengths before them.
//! A reader that meets anything else gives up with `None`.

use crate::encode::Cursor;

/// Written to and read from bytes.
pub(crate) trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn get(c: &mut Cursor<'_>) -> Option<Self>;
}

/// Largest number that is written; larger ones become it.
pub(crate) const MOST: u32 = (1 << 28) - 1;

pub(crate) fn varint(out: &mut Vec<u8>, v: usize) {
    let mut v = v.min(MOST as usize);
    while v >= 0x80 {
        out.push((v & 0x7f) as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

impl Wire for u32 {
    fn put(&self, out: &mut Vec<u8>) {
        varint(out, *self as usize);
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        u32::try_from(c.varint()?).ok()
    }
}

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        Some(c.u8()? != 0)
    }
}

impl Wire for Vec<u8> {
    fn put(&self, out: &mut Vec<u8>) {
        varint(out, self.len());
        out.extend_from_slice(self);
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        c.bytes().map(<[u8]>::to_vec)
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        varint(out, self.len());
        out.extend_from_slice(self.as_bytes());
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        std::str::from_utf8(c.bytes()?).ok().map(str::to_owned)
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        if c.u8()? == 0 { Some(None) } else { T::get(c).map(Some) }
    }
}

impl<T: Wire> Wire for Box<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (**self).put(out);
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        T::get(c).map(Box::new)
    }
}

/// Lists of what takes at least one byte each.
macro_rules! lists {
    ($($item:ty),*) => {$(
        impl Wire for Vec<$item> {
            fn put(&self, out: &mut Vec<u8>) {
                varint(out, self.len());
                self.iter().for_each(|item| item.put(out));
            }

            fn get(c: &mut Cursor<'_>) -> Option<Self> {
                // Never more room than there are bytes.
                (0..c.varint()?).map(|_| Wire::get(c)).collect()
            }
        }
    )*};
}
pub(crate) use lists;

macro_rules! fields {
    ($name:ident: $($field:ident),*) => {
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn get(c: &mut Cursor<'_>) -> Option<Self> {
                Some($name { $($field: Wire::get(c)?),* })
            }
        }
    };
}
pub(crate) use fields;

impl Wire for (String, String) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        Some((Wire::get(c)?, Wire::get(c)?))
    }
}

lists!((String, String), String);
