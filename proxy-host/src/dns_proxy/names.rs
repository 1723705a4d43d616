//! The names of the registry as a DNS proxy knows them, and what it answers.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    rc::Rc,
};

use hickory_resolver::proto::{
    op::{Message, Query},
    rr::{Name, RData, Record, RecordType, rdata::CNAME},
};
use portolan_proto::v1::DnsName;

/// Istio's: low, so that clients hear of changes soon.
const TTL: u32 = 30;

/// Whose a name is: a host's own name goes before a short form.
type Whose = BTreeMap<(bool, String), Rc<[IpAddr]>>;

/// The registry's names.
#[derive(Debug, Default)]
pub struct Names {
    /// All of them have been given at least once.
    complete: bool,
    /// The first search domain of clients, in lower case.
    search: Option<String>,
    by_host: HashMap<String, Vec<String>>,
    /// By name, in lower case without a trailing dot.
    table: HashMap<String, Whose>,
}

/// What a name is known as.
struct Found<'n> {
    addresses: &'n [IpAddr],
    /// The name that was meant, where the client's resolver has put a search domain behind it.
    meant: Option<String>,
}

impl Names {
    /// No names yet. Clients put this search domain behind names.
    #[must_use]
    pub fn new(search: Option<&str>) -> Self {
        let search = search.map(|domain| domain.trim_end_matches('.').to_ascii_lowercase());
        Self { search: search.filter(|domain| !domain.is_empty()), ..Self::default() }
    }

    /// Notes what is answered for a host; `None`: it is no more.
    pub fn set(&mut self, host: &str, answer: Option<&DnsName>) {
        for (place, name) in self.by_host.remove(host).unwrap_or_default().into_iter().enumerate() {
            if let Some(whose) = self.table.get_mut(&name) {
                whose.remove(&(place > 0, host.to_owned()));
                if whose.is_empty() {
                    self.table.remove(&name);
                }
            }
        }
        let Some(answer) = answer else { return };
        let addresses: Rc<[IpAddr]> = answer.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        for (place, name) in answer.names.iter().enumerate() {
            let whose = self.table.entry(name.clone()).or_default();
            whose.insert((place > 0, host.to_owned()), addresses.clone());
        }
        self.by_host.insert(host.to_owned(), answer.names.clone());
    }

    /// All names have been given.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// Whether there is something to answer from.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    fn exact(&self, name: &str) -> Option<&[IpAddr]> {
        self.table.get(name)?.values().next().map(AsRef::as_ref)
    }

    /// The longest wildcard that the name falls under.
    fn wildcard(&self, name: &str) -> Option<&[IpAddr]> {
        let parents = name.match_indices('.').filter_map(|(at, _)| name.get(at + 1..));
        parents.into_iter().find_map(|parent| self.exact(&format!("*.{parent}")))
    }

    fn find(&self, name: &str) -> Option<Found<'_>> {
        let plain = |addresses| Found { addresses, meant: None };
        if let Some(addresses) = self.exact(name) {
            return Some(plain(addresses));
        }
        let meant = self.search.as_deref().and_then(|search| name.strip_suffix(search)?.strip_suffix('.'));
        let expanded = |addresses| Found { addresses, meant: meant.map(str::to_owned) };
        (meant.and_then(|meant| self.exact(meant)).map(expanded))
            .or_else(|| self.wildcard(name).map(plain))
            .or_else(|| meant.and_then(|meant| self.wildcard(meant)).map(expanded))
    }

    /// The answer to a question; `None`: others have to be asked. Of a known name a family without addresses has an
    /// empty answer, since "no such name" would hold for both.
    #[must_use]
    pub fn answer(&self, query: &Query, request: &Message) -> Option<Message> {
        let family = query.query_type();
        if !matches!(family, RecordType::A | RecordType::AAAA) {
            return None;
        }
        let asked = query.name().to_ascii().to_ascii_lowercase();
        let found = self.find(asked.trim_end_matches('.'))?;
        let mut addresses: Vec<IpAddr> = found.addresses.to_vec();
        addresses.retain(|address| address.is_ipv4() == (family == RecordType::A));
        // Clients take the first.
        fastrand::shuffle(&mut addresses);
        let mut out = reply(request);
        out.metadata.authoritative = true;
        let mut name = query.name().clone();
        if let Some(meant) = found.meant.filter(|_| !addresses.is_empty()) {
            let meant = Name::from_ascii(format!("{meant}.")).ok()?;
            out.add_answer(Record::from_rdata(name, TTL, RData::CNAME(CNAME(meant.clone()))));
            name = meant;
        }
        for address in addresses {
            out.add_answer(Record::from_rdata(name.clone(), TTL, RData::from(address)));
        }
        Some(out)
    }
}

/// An answer without content.
pub fn reply(request: &Message) -> Message {
    let mut out = Message::response(request.metadata.id, request.metadata.op_code);
    out.metadata.recursion_desired = request.metadata.recursion_desired;
    out.metadata.recursion_available = true;
    out.add_queries(request.queries.iter().cloned());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns_name(names: &[&str], addresses: &[&str]) -> DnsName {
        let all = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        DnsName { names: all(names), addresses: all(addresses) }
    }

    fn names() -> Names {
        let mut names = Names::new(Some("shop.svc.cluster.local"));
        for (host, answer) in [
            ("a.com", dns_name(&["a.com"], &["240.240.0.1", "2001:2::1"])),
            ("only4.com", dns_name(&["only4.com"], &["10.0.0.1"])),
            ("*.w.com", dns_name(&["*.w.com"], &["10.0.0.2"])),
            ("*.deep.w.com", dns_name(&["*.deep.w.com"], &["10.0.0.3"])),
            (
                "web.shop.svc.cluster.local",
                dns_name(&["web.shop.svc.cluster.local", "web.shop", "web.shop.svc", "web"], &["10.96.0.1"]),
            ),
        ] {
            names.set(host, Some(&answer));
        }
        names
    }

    /// The records of an answer in words; `None`: others are asked.
    fn ask(names: &Names, name: &str, family: RecordType) -> Option<String> {
        let query = Query::query(Name::from_ascii(name).unwrap(), family);
        let mut request = Message::query();
        request.add_query(query.clone());
        let answer = names.answer(&query, &request)?;
        assert!(answer.metadata.authoritative && answer.metadata.id == request.metadata.id);
        let mut records: Vec<String> = answer
            .answers
            .iter()
            .map(|record| {
                assert_eq!(record.ttl, TTL);
                format!("{} {}", record.name, record.data)
            })
            .collect();
        records.sort();
        Some(records.join(", "))
    }

    #[test]
    fn hosts_wildcards_and_families() {
        let names = names();
        let a = |name: &str| ask(&names, name, RecordType::A);
        assert_eq!(a("a.com.").as_deref(), Some("a.com. 240.240.0.1"));
        assert_eq!(a("A.Com.").as_deref(), Some("A.Com. 240.240.0.1"));
        assert_eq!(ask(&names, "a.com.", RecordType::AAAA).as_deref(), Some("a.com. 2001:2::1"));
        assert_eq!(ask(&names, "only4.com.", RecordType::AAAA).as_deref(), Some(""), "no data, not no name");
        assert_eq!(a("x.w.com.").as_deref(), Some("x.w.com. 10.0.0.2"));
        assert_eq!(a("y.x.w.com.").as_deref(), Some("y.x.w.com. 10.0.0.2"));
        assert_eq!(a("x.deep.w.com.").as_deref(), Some("x.deep.w.com. 10.0.0.3"));
        for name in ["w.com.", "b.com.", "com.", "."] {
            assert_eq!(a(name), None, "{name}");
        }
        assert_eq!(ask(&names, "a.com.", RecordType::MX), None);
    }

    #[test]
    fn search_domains_are_seen_through() {
        let names = names();
        let a = |name: &str| ask(&names, name, RecordType::A).unwrap();
        assert_eq!(a("a.com.shop.svc.cluster.local."), "a.com. 240.240.0.1, a.com.shop.svc.cluster.local. a.com.");
        assert_eq!(a("x.w.com.shop.svc.cluster.local."), "x.w.com. 10.0.0.2, x.w.com.shop.svc.cluster.local. x.w.com.");
        assert_eq!(a("web.shop.svc.cluster.local."), "web.shop.svc.cluster.local. 10.96.0.1");
        for name in ["web.", "web.shop.", "web.shop.svc."] {
            assert_eq!(a(name), format!("{name} 10.96.0.1"));
        }
    }

    #[test]
    fn a_hosts_own_name_goes_before_a_short_form() {
        let mut names = names();
        names.set("web", Some(&dns_name(&["web"], &["10.1.1.1"])));
        assert_eq!(ask(&names, "web.", RecordType::A).as_deref(), Some("web. 10.1.1.1"));
        names.set("web", None);
        assert_eq!(ask(&names, "web.", RecordType::A).as_deref(), Some("web. 10.96.0.1"));
        names.set("web.shop.svc.cluster.local", Some(&dns_name(&["web.shop.svc.cluster.local"], &["10.96.0.2"])));
        assert_eq!(ask(&names, "web.", RecordType::A), None);
    }
}
