//! Bytes of a row, and reading them in place. A reader that meets anything but what the writer writes gives up with
//! `None`, which is a miss: a page was checked as a whole when it arrived.

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use crate::decision::OriginRef;
use crate::name::HostPattern;
use crate::route::{self, TableBody};
use crate::row::{CatchAll, Choice, Globals, HostPort, MAX_LOSERS, Origin, OriginKind, Routes, Row, RowKey};
use crate::wire::Wire;

pub(crate) const TAG_EXACT: u8 = 1;
pub(crate) const TAG_SUFFIX: u8 = 2;
pub(crate) const TAG_ADDRESS: u8 = 3;
pub(crate) const TAG_PORT: u8 = 4;
pub(crate) const TAG_PREFIX: u8 = 5;
pub(crate) const TAG_GLOBALS: u8 = 6;
pub(crate) const TAG_SUMMARY: u8 = 7;
pub(crate) const TAG_TABLE: u8 = 8;
pub(crate) const TAG_ROUTES: u8 = 9;

const HTTP: u8 = 1;
const SNI: u8 = 2;
const PROXY: u8 = 4;
const SNI_AS_HTTP: u8 = 8;
const PROXY_AS_BEFORE: u8 = 16;
const SERVER: u8 = 32;

/// A choice begins with a byte: the form of its cluster's name, how many lost, and whether the row's first origin won.
const FORM: u8 = 3;
const OUTBOUND: u8 = 0;
const FORWARD: u8 = 1;
const NAMED: u8 = 2;
const ROUTES: u8 = 3;
/// What stands before routes in place of a table's name.
pub(crate) const INLINE: u8 = 0;
const LOSERS_AT: u32 = 2;
const FIRST_WON: u8 = 16;

/// Why a row was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// A row must fit a page.
    #[error("row of {got} bytes, expected at most {max}")]
    TooLarge {
        /// Its size.
        got: usize,
        /// The limit.
        max: usize,
    },
}

/// What a host port is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Http,
    Sni,
    Proxy,
}

// === keys ===

pub(crate) fn key(key: &RowKey) -> (u8, Vec<u8>) {
    match key {
        RowKey::Host(HostPattern::Exact(host)) => (TAG_EXACT, host.as_str().as_bytes().to_vec()),
        RowKey::Host(HostPattern::Suffix(suffix)) => (TAG_SUFFIX, suffix.as_bytes().to_vec()),
        RowKey::Address(address, port) => (TAG_ADDRESS, address_key(*address, *port).to_vec()),
        RowKey::Port(port) => (TAG_PORT, port.to_be_bytes().to_vec()),
        RowKey::Prefix(port, net) => (TAG_PREFIX, prefix_key(net.network(), net.prefix_len(), *port).to_vec()),
        RowKey::Table(name) => (TAG_TABLE, name.as_bytes().to_vec()),
        RowKey::Routes(table, digest) => (TAG_ROUTES, [table.as_bytes(), &digest.to_le_bytes()].concat()),
        RowKey::Globals => (TAG_GLOBALS, Vec::new()),
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn concat<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(parts.iter().flat_map(|p| p.iter())) {
        *to = *from;
    }
    out
}

/// A v4-mapped address is the v4 address.
pub(crate) fn address_key(address: IpAddr, port: u16) -> [u8; 18] {
    concat(&[&octets(address), &port.to_be_bytes()])
}

/// `address` is masked already.
pub(crate) fn prefix_key(address: IpAddr, len: u8, port: u16) -> [u8; 20] {
    let family = u8::from(address.is_ipv6());
    concat(&[&octets(address), &[len, family], &port.to_be_bytes()])
}

// === writing ===

#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    origins: Vec<Origin>,
}

impl Out {
    fn varint(&mut self, mut v: usize) {
        while v >= 0x80 {
            self.bytes.push((v & 0x7f) as u8 | 0x80);
            v >>= 7;
        }
        self.bytes.push(v as u8);
    }

    fn text(&mut self, s: &str) {
        self.varint(s.len());
        self.bytes.extend_from_slice(s.as_bytes());
    }

    fn origin(&mut self, origin: &Origin) {
        let at = self.origins.iter().position(|o| o == origin).unwrap_or_else(|| {
            self.origins.push(origin.clone());
            self.origins.len() - 1
        });
        self.varint(at);
    }

    fn choice(&mut self, choice: &Choice, own: Option<(u16, &str)>) {
        let form = match (&choice.routes, own) {
            (Some(_), _) => ROUTES,
            (None, Some((port, host))) => cluster_form(&choice.cluster, port, host),
            (None, None) => NAMED,
        };
        let losers = choice.losers.get(..MAX_LOSERS).unwrap_or(&choice.losers);
        let first = self.origins.first().is_none_or(|origin| *origin == choice.winner);
        self.bytes.push(form | (losers.len() as u8) << LOSERS_AT | if first { FIRST_WON } else { 0 });
        let mut ids = Out { bytes: Vec::new(), origins: std::mem::take(&mut self.origins) };
        ids.origin(&choice.winner);
        if first {
            ids.bytes.clear();
        }
        losers.iter().for_each(|loser| ids.origin(loser));
        self.bytes.extend_from_slice(&ids.bytes);
        self.origins = ids.origins;
        match &choice.routes {
            Some(Routes::Table(table)) => self.text(table),
            Some(Routes::Inline(routes)) => {
                // No table has such a name.
                let routes = route::encode_all(routes);
                self.varint(routes.len() + 1);
                self.bytes.push(INLINE);
                self.bytes.extend_from_slice(&routes);
            }
            None if form == NAMED => self.text(&choice.cluster),
            None => {}
        }
    }

    /// The origins stand last: a decision that nobody asks the reason of never reads them.
    fn finish(self) -> Vec<u8> {
        let mut out = Out::default();
        out.varint(self.bytes.len());
        out.bytes.extend_from_slice(&self.bytes);
        for origin in &self.origins {
            out.bytes.push(match origin.kind {
                OriginKind::ServiceEntry => 0,
                OriginKind::Service => 1,
                OriginKind::VirtualService => 2,
                OriginKind::Gateway => 3,
            });
            out.text(&origin.namespace);
            out.text(&origin.name);
        }
        out.bytes
    }
}

fn cluster_form(cluster: &str, port: u16, host: &str) -> u8 {
    let own = |prefix: &str| {
        cluster
            .strip_prefix(prefix)
            .and_then(|c| c.split_once("||"))
            .is_some_and(|(p, h)| h == host && p == port.to_string())
    };
    if own("outbound|") {
        OUTBOUND
    } else if own("forward|") {
        FORWARD
    } else {
        NAMED
    }
}

fn host_port(out: &mut Out, port: &HostPort, pattern: &str) {
    let mut flags = 0;
    flags |= if port.http.is_some() { HTTP } else { 0 };
    flags |= if port.sni.is_some() { SNI } else { 0 };
    flags |= if port.proxy.is_some() { PROXY } else { 0 };
    let sni_as_http = port.sni.is_some() && port.sni == port.http;
    let before = port.sni.as_ref().or(port.http.as_ref());
    let proxy_as_before = port.proxy.is_some() && port.proxy.as_ref() == before;
    flags |= if sni_as_http { SNI_AS_HTTP } else { 0 };
    flags |= if proxy_as_before { PROXY_AS_BEFORE } else { 0 };
    flags |= if port.server != 0 { SERVER } else { 0 };
    out.bytes.extend_from_slice(&port.port.to_le_bytes());
    out.bytes.push(flags);
    if port.server != 0 {
        out.bytes.extend_from_slice(&port.server.to_le_bytes());
    }
    let own = Some((port.port, pattern));
    let stored = [
        port.http.as_ref(),
        port.sni.as_ref().filter(|_| !sni_as_http),
        port.proxy.as_ref().filter(|_| !proxy_as_before),
    ];
    stored.into_iter().flatten().for_each(|c| out.choice(c, own));
}

fn optional(out: &mut Out, choices: [Option<&Choice>; 2]) {
    let [first, second] = choices.map(|c| c.is_some());
    out.bytes.push(u8::from(first) | u8::from(second) << 1);
    choices.into_iter().flatten().for_each(|c| out.choice(c, None));
}

fn server_names(out: &mut Out, sni: &[(HostPattern, Choice)]) {
    out.varint(sni.len());
    for (pattern, choice) in sni {
        out.text(&pattern.to_string());
        out.choice(choice, None);
    }
}

pub(crate) fn value(row: &Row) -> Vec<u8> {
    let mut out = Out::default();
    match row {
        Row::Host { pattern, ports } => {
            let text = pattern.to_string();
            out.varint(ports.len());
            ports.iter().for_each(|p| host_port(&mut out, p, &text));
        }
        Row::Address { http, tcp, sni, .. } => {
            optional(&mut out, [http.as_ref(), tcp.as_ref()]);
            server_names(&mut out, sni);
        }
        Row::Port { http, tcp, prefixes, .. } => {
            let (mut v4, mut v6) = (0u64, [0u8; 17]);
            for net in prefixes {
                match net {
                    IpNet::V4(n) => v4 |= 1 << n.prefix_len(),
                    IpNet::V6(n) => set_bit(&mut v6, n.prefix_len()),
                }
            }
            let has_v6 = v6 != [0; 17];
            out.bytes.push(u8::from(*http) | u8::from(v4 != 0) << 1 | u8::from(has_v6) << 2);
            if v4 != 0 {
                out.bytes.extend_from_slice(&v4.to_le_bytes());
            }
            if has_v6 {
                out.bytes.extend_from_slice(&v6);
            }
            optional(&mut out, [tcp.as_ref(), None]);
        }
        Row::Prefix { tcp, sni, .. } => {
            optional(&mut out, [tcp.as_ref(), None]);
            server_names(&mut out, sni);
        }
        Row::Table { body, .. } => {
            return match body {
                TableBody::Whole(routes) => [&[0], routes.as_slice()].concat(),
                TableBody::Parts(parts) => {
                    let parts =
                        parts.iter().flat_map(|part| [&part.digest.to_le_bytes(), part.filter.as_slice()].concat());
                    std::iter::once(1).chain(parts).collect()
                }
            };
        }
        Row::Routes { bytes, .. } => return bytes.clone(),
        Row::Globals(globals) => {
            let mode = match globals.catch_all {
                CatchAll::Block => 0,
                CatchAll::PassThrough => 1,
                CatchAll::DynamicDns => 2,
            };
            let mut out = vec![mode, u8::from(globals.gateway)];
            globals.retry.put(&mut out);
            return out;
        }
    }
    out.finish()
}

pub(crate) fn set_bit(bits: &mut [u8], at: u8) {
    if let Some(byte) = bits.get_mut(usize::from(at / 8)) {
        *byte |= 1 << (at % 8);
    }
}

fn bit(bits: &[u8], at: u8) -> bool {
    bits.get(usize::from(at / 8)).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

// === reading ===

/// A place in bytes, moved on by what is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'s>(pub(crate) &'s [u8]);

impl<'s> Cursor<'s> {
    pub(crate) fn take(&mut self, n: usize) -> Option<&'s [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(|[b]| b)
    }

    pub(crate) fn varint(&mut self) -> Option<usize> {
        let mut v = 0usize;
        for shift in [0, 7, 14, 21] {
            let byte = self.u8()?;
            v |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(v);
            }
        }
        None
    }

    pub(crate) fn bytes(&mut self) -> Option<&'s [u8]> {
        let n = self.varint()?;
        self.take(n)
    }

    fn text(&mut self) -> Option<&'s str> {
        std::str::from_utf8(self.bytes()?).ok()
    }
}

/// A [`Choice`] as it lies in a snapshot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChoiceRef<'s> {
    /// From its first byte on.
    at: &'s [u8],
    origins: &'s [u8],
}

pub(crate) enum ClusterRef<'s> {
    Outbound,
    Forward,
    Named(&'s str),
    /// The name of a table, or routes.
    Routes(&'s [u8]),
}

impl<'s> ChoiceRef<'s> {
    /// Which of the row's origins won, which lost, and what stands behind them.
    fn ids(self) -> Option<(usize, impl Iterator<Item = usize>, Cursor<'s>)> {
        let mut c = Cursor(self.at);
        let head = c.u8()?;
        let winner = if head & FIRST_WON != 0 { 0 } else { c.varint()? };
        let mut ids = c;
        let losers = head >> LOSERS_AT & 3;
        for _ in 0..losers {
            c.varint()?;
        }
        Some((winner, (0..losers).filter_map(move |_| ids.varint()), c))
    }

    #[inline]
    pub(crate) fn cluster(self) -> Option<ClusterRef<'s>> {
        match self.at.first()? & FORM {
            OUTBOUND => Some(ClusterRef::Outbound),
            FORWARD => Some(ClusterRef::Forward),
            NAMED => self.ids()?.2.text().map(ClusterRef::Named),
            _ => self.ids()?.2.bytes().map(ClusterRef::Routes),
        }
    }

    pub(crate) fn winner(self) -> Option<OriginRef<'s>> {
        self.origin(self.ids()?.0)
    }

    pub(crate) fn losers(self) -> impl Iterator<Item = OriginRef<'s>> {
        self.ids().into_iter().flat_map(|(_, losers, _)| losers).filter_map(move |id| self.origin(id))
    }

    fn origin(self, at: usize) -> Option<OriginRef<'s>> {
        let mut c = Cursor(self.origins);
        for _ in 0..at {
            c.u8()?;
            c.bytes()?;
            c.bytes()?;
        }
        let kind = match c.u8()? {
            0 => OriginKind::ServiceEntry,
            1 => OriginKind::Service,
            2 => OriginKind::VirtualService,
            _ => OriginKind::Gateway,
        };
        Some(OriginRef { kind, namespace: c.text()?, name: c.text()? })
    }
}

/// A row's value: what it says, and the origins that it names.
#[derive(Clone, Copy)]
pub(crate) struct Value<'s> {
    rest: Cursor<'s>,
    origins: &'s [u8],
}

impl<'s> Value<'s> {
    #[inline]
    pub(crate) fn open(bytes: &'s [u8]) -> Option<Self> {
        let mut c = Cursor(bytes);
        let rest = Cursor(c.bytes()?);
        Some(Value { rest, origins: c.0 })
    }

    /// The choice that begins here, and moves on behind it.
    #[inline]
    fn choice(&self, c: &mut Cursor<'s>) -> Option<ChoiceRef<'s>> {
        let choice = ChoiceRef { at: c.0, origins: self.origins };
        match choice.at.split_first()? {
            // Nearly all of them: a cluster of the row's own, nobody lost.
            (&head, rest) if head & !FORWARD == FIRST_WON => c.0 = rest,
            (head, _) => {
                *c = choice.ids()?.2;
                if head & FORM >= NAMED {
                    c.bytes()?;
                }
            }
        }
        Some(choice)
    }

    fn optional(&self, c: &mut Cursor<'s>) -> Option<[Option<ChoiceRef<'s>>; 2]> {
        let flags = c.u8()?;
        let first = if flags & 1 != 0 { Some(self.choice(c)?) } else { None };
        let second = if flags & 2 != 0 { Some(self.choice(c)?) } else { None };
        Some([first, second])
    }

    /// What a Host row says of a port, and of a server there.
    #[inline]
    pub(crate) fn host_port(&self, port: u16, server: u32, wanted: Use) -> Option<ChoiceRef<'s>> {
        let mut c = self.rest;
        for _ in 0..c.varint()? {
            let number = u16::from_le_bytes(c.array()?);
            let flags = c.u8()?;
            let of = if flags & SERVER != 0 { u32::from_le_bytes(c.array()?) } else { 0 };
            let stored = |c: &mut Cursor<'s>, bits: u8, of: u8| {
                if flags & bits == of { self.choice(c).map(Some) } else { Some(None) }
            };
            let http = stored(&mut c, HTTP, HTTP)?;
            let sni = stored(&mut c, SNI | SNI_AS_HTTP, SNI)?;
            let proxy = stored(&mut c, PROXY | PROXY_AS_BEFORE, PROXY)?;
            if number == port && of == server {
                let sni = if flags & SNI_AS_HTTP != 0 { http } else { sni };
                return match wanted {
                    Use::Http => http,
                    Use::Sni => sni,
                    Use::Proxy if flags & PROXY_AS_BEFORE != 0 => sni.or(http),
                    Use::Proxy => proxy,
                };
            }
        }
        None
    }

    /// An Address row: (http, tcp).
    pub(crate) fn address(&self) -> Option<[Option<ChoiceRef<'s>>; 2]> {
        self.optional(&mut self.rest.clone())
    }

    pub(crate) fn port(&self) -> Option<PortRef<'s>> {
        let mut c = self.rest;
        let flags = c.u8()?;
        let v4 = if flags & 2 != 0 { u64::from_le_bytes(c.array()?) } else { 0 };
        let v6 = if flags & 4 != 0 { c.take(17)? } else { &[] };
        let [tcp, _] = self.optional(&mut c)?;
        Some(PortRef { v4, v6, tcp })
    }

    /// A Prefix or Address row's choice for a server name, if one matches: exact first, then the longest wildcard.
    pub(crate) fn server_name(&self, name: &[u8]) -> Option<ChoiceRef<'s>> {
        let mut c = self.rest;
        self.optional(&mut c)?;
        let mut best: Option<(usize, ChoiceRef<'s>)> = None;
        for _ in 0..c.varint()? {
            let pattern = c.bytes()?;
            let choice = self.choice(&mut c)?;
            let rank = match pattern.strip_prefix(b"*") {
                None if pattern == name => usize::MAX,
                Some(suffix) if name.len() > suffix.len() && name.ends_with(suffix) => suffix.len() + 1,
                _ => continue,
            };
            if best.is_none_or(|(r, _)| rank > r) {
                best = Some((rank, choice));
            }
        }
        best.map(|(_, choice)| choice)
    }

    pub(crate) fn prefix_tcp(&self) -> Option<ChoiceRef<'s>> {
        let [tcp, _] = self.optional(&mut self.rest.clone())?;
        tcp
    }
}

pub(crate) struct PortRef<'s> {
    v4: u64,
    v6: &'s [u8],
    pub(crate) tcp: Option<ChoiceRef<'s>>,
}

impl PortRef<'_> {
    /// Prefix lengths to ask for, longest first.
    pub(crate) fn prefix_lengths(&self, v6: bool) -> impl Iterator<Item = u8> + '_ {
        let top = match (v6, self.v4, self.v6.is_empty()) {
            (false, 0, _) | (true, _, true) => None,
            (false, ..) => Some(32u8),
            (true, ..) => Some(128),
        };
        top.into_iter()
            .flat_map(|top| (0..=top).rev())
            .filter(move |len| if v6 { bit(self.v6, *len) } else { self.v4 >> len & 1 == 1 })
    }
}

fn globals(value: &[u8]) -> Option<Globals> {
    let mut c = Cursor(value);
    let catch_all = match c.u8()? {
        0 => CatchAll::Block,
        1 => CatchAll::PassThrough,
        _ => CatchAll::DynamicDns,
    };
    Some(Globals { catch_all, gateway: c.u8()? != 0, retry: Wire::get(&mut c)? })
}

/// What a snapshot says of itself as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    /// Lengths of wildcards: those that begin inside a label, then those that begin with a dot.
    plain: [u8; 32],
    dotted: [u8; 32],
    /// Both.
    lengths: [u64; 4],
    /// Some listener is for one address.
    pub(crate) addresses: bool,
    pub(crate) globals: Globals,
}

impl Summary {
    /// Reads the two rows; what is not there is nothing.
    pub(crate) fn open(summary: Option<&[u8]>, row: Option<&[u8]>) -> Self {
        let mut c = Cursor(summary.unwrap_or_default());
        let (plain, dotted) = (c.array().unwrap_or([0; 32]), c.array().unwrap_or([0; 32]));
        let mut lengths = [0; 4];
        for half in [&plain, &dotted] {
            for (word, bytes) in lengths.iter_mut().zip(half.as_chunks().0) {
                *word |= u64::from_le_bytes(*bytes);
            }
        }
        Summary {
            plain,
            dotted,
            lengths,
            addresses: c.u8() == Some(1),
            globals: row.and_then(globals).unwrap_or_default(),
        }
    }

    /// What a star may stand before to take this name, longest first: the suffixes of the lengths that there are.
    pub(crate) fn suffixes<'s, 'n>(&'s self, name: &'n [u8]) -> Suffixes<'s, 'n> {
        // The star stands for at least one character.
        let top = name.len().saturating_sub(1).min(255);
        let left = self.lengths.get(top / 64).map_or(0, |word| word << (63 - top % 64) >> (63 - top % 64));
        Suffixes { summary: self, name, word: top / 64, left }
    }
}

/// See [`Summary::suffixes`].
pub(crate) struct Suffixes<'s, 'n> {
    summary: &'s Summary,
    name: &'n [u8],
    /// The word of the lengths that is looked at, and those of its bits that are still to be.
    word: usize,
    left: u64,
}

impl<'n> Iterator for Suffixes<'_, 'n> {
    type Item = &'n [u8];

    #[inline]
    fn next(&mut self) -> Option<&'n [u8]> {
        loop {
            let Some(at) = self.left.checked_ilog2() else {
                self.word = self.word.checked_sub(1)?;
                self.left = *self.summary.lengths.get(self.word)?;
                continue;
            };
            self.left ^= 1 << at;
            let len = self.word * 64 + at as usize;
            let suffix = self.name.get(self.name.len().checked_sub(len)?..)?;
            let half = if suffix.first() == Some(&b'.') { &self.summary.dotted } else { &self.summary.plain };
            if bit(half, len as u8) {
                return Some(suffix);
            }
        }
    }
}
