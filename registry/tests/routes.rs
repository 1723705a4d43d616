//! Route tables against a naive scan, and how they lie in pages.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use portolan_registry::decision::Verdict;
use portolan_registry::lookup::{Listener, Request};
use portolan_registry::route::{
    Action, Condition, Extras, Outcome, PathRewrite, Redirect, Route, Subject, Target, TextMatch, rows,
};
use portolan_registry::routing::{Asked, Matched, Patterns};
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Routes, Row, TableName};
use portolan_registry::snapshot::Snapshot;
use portolan_registry::write::Writer;
use proptest::prelude::*;

struct Headers(BTreeMap<&'static str, String>);

impl Asked for Headers {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.0.get(name).map(|value| Cow::Borrowed(value.as_bytes()))
    }
}

fn request(path: &str, headers: &[(&'static str, &str)]) -> Headers {
    let all = headers.iter().copied().chain([(":path", path)]);
    Headers(all.map(|(name, value)| (name, value.to_owned())).collect())
}

fn route(name: &str, path: TextMatch, conditions: Vec<Condition>) -> Route {
    let targets = vec![Target { cluster: format!("outbound|80||{name}"), weight: 1, extras: None }];
    let action = Action { outcome: Outcome::Forward(targets), extras: None };
    Route { name: name.into(), index: 7, path, ignore_case: false, conditions, action }
}

fn header(name: &str, text: TextMatch, negated: bool) -> Condition {
    Condition { subject: Subject::Header(name.into()), text, negated }
}

fn name() -> TableName {
    "n/v:80".parse().expect("a name")
}

/// A snapshot in which `a.com:80` has these routes.
fn snapshot(routes: &[Route]) -> (Writer, Snapshot) {
    let winner = Origin {
        namespace: "n".parse().expect("a name"),
        name: "v".parse().expect("a name"),
        kind: OriginKind::VirtualService,
    };
    let routes_of = Some(Routes::Table(name()));
    let choice = Choice { cluster: Default::default(), routes: routes_of, winner, losers: vec![] };
    let port = HostPort { port: 80, http: Some(choice), ..HostPort::default() };
    let mut writer = Writer::new();
    let host = Row::Host { pattern: "a.com".parse().expect("a pattern"), ports: vec![port] };
    for row in rows(&name(), routes).iter().chain([&host, &Row::Globals(Globals::default())]) {
        writer.put(row).expect("the row fits");
    }
    writer.commit();
    let mut snapshot = Snapshot::new();
    snapshot.reset();
    for (id, page) in writer.pages() {
        snapshot.stage(id, page.to_vec()).expect("a good page");
    }
    snapshot.commit(writer.digest()).expect("a whole snapshot");
    (writer, snapshot)
}

fn ask<'s>(snapshot: &'s Snapshot, asked: &Headers) -> Option<Matched<'s>> {
    let listener = Listener::Captured("192.0.2.1:80".parse().expect("an address"));
    let decision = snapshot.request(&Request { listener, authority: b"a.com", connect: false });
    let Verdict::Table { table } = decision.verdict else { panic!("expected a table, got {decision:?}") };
    snapshot.routed(table, asked, &Patterns::default())
}

fn taken(routes: &[Route], asked: &Headers) -> Option<String> {
    ask(&snapshot(routes).1, asked).map(|matched| matched.name.to_owned())
}

#[test]
fn conditions_hold_as_in_envoy() {
    let any = || TextMatch::Prefix("/".into());
    let one = |path, conditions| vec![route("r", path, conditions)];
    let exact = |text: &str| TextMatch::Exact(text.into());
    let regex = |text: &str| TextMatch::Regex(text.into());
    let query = |text| one(any(), vec![Condition { subject: Subject::Query("q".into()), text, negated: false }]);
    let cases: &[(&str, Vec<Route>, Headers, bool)] = &[
        ("a prefix knows no segments", one(TextMatch::Prefix("/foo".into()), vec![]), request("/foobar", &[]), true),
        ("the query is not of the path", one(exact("/foo"), vec![]), request("/foo?x=1", &[]), true),
        ("nor is the fragment", one(exact("/foo"), vec![]), request("/foo#x", &[]), true),
        ("case counts", one(exact("/foo"), vec![]), request("/Foo", &[]), false),
        ("an expression takes all", one(regex("/f.o"), vec![]), request("/foo/", &[]), false),
        ("alternatives too", one(regex("/a|/b"), vec![]), request("/b", &[]), true),
        ("classes are of ASCII", one(regex(r"/\d+"), vec![]), request("/12", &[]), true),
        ("one that cannot be compiled takes nothing", one(regex("("), vec![]), request("(", &[]), false),
        (
            "a header is there",
            one(any(), vec![header("h", TextMatch::Present, false)]),
            request("/", &[("h", "")]),
            true,
        ),
        ("or not", one(any(), vec![header("h", TextMatch::Present, true)]), request("/", &[("h", "")]), false),
        ("what is not there is not equal", one(any(), vec![header("h", exact(""), false)]), request("/", &[]), false),
        (
            "without: what is not there is empty",
            one(any(), vec![header("h", exact("x"), true)]),
            request("/", &[]),
            true,
        ),
        (
            "without: even where empty matches",
            one(any(), vec![header("h", regex(".*"), true)]),
            request("/", &[]),
            false,
        ),
        ("the first parameter", query(exact("1")), request("/?a=2&q=1&q=2", &[]), true),
        ("decoded", query(exact("a b")), request("/?q=a%20b", &[]), true),
        ("without a value", query(TextMatch::Present), request("/?q", &[]), true),
        ("not of a fragment", query(TextMatch::Present), request("/#?q=1", &[]), false),
    ];
    for (what, routes, asked, expected) in cases {
        assert_eq!(taken(routes, asked).is_some(), *expected, "{what}");
    }
}

#[test]
fn all_conditions_must_hold_and_the_first_route_wins() {
    let both = vec![header("a", TextMatch::Present, false), header("b", TextMatch::Present, false)];
    let routes =
        [route("both", TextMatch::Prefix("/".into()), both), route("rest", TextMatch::Prefix("/".into()), vec![])];
    assert_eq!(taken(&routes, &request("/", &[("a", "1")])).as_deref(), Some("rest"));
    assert_eq!(taken(&routes, &request("/", &[("a", "1"), ("b", "2")])).as_deref(), Some("both"));
}

#[test]
fn case_may_be_disregarded_and_how_much_matched_is_told() {
    let mut some = route("r", TextMatch::Prefix("/Api".into()), vec![]);
    some.ignore_case = true;
    let (_, snapshot) = snapshot(&[some]);
    assert_eq!(ask(&snapshot, &request("/aPI/x", &[])).map(|m| (m.path, m.index)), Some((4, 7)));
}

#[test]
fn an_action_is_read_as_it_was_written() {
    let redirect = Redirect { status: 302, authority: "b.com".into(), port: 8443, ..Redirect::default() };
    let extras = Extras {
        path: Some(PathRewrite::Regex("a+".into(), r"\0b".into())),
        timeout_ms: u32::MAX,
        ..Extras::default()
    };
    let mut some = route("r", TextMatch::Present, vec![]);
    some.action = Action { outcome: Outcome::Redirect(redirect), extras: Some(Box::new(extras)) };
    let (_, snapshot) = snapshot(&[some.clone()]);
    let mut read = ask(&snapshot, &request("/", &[])).expect("a route").action;
    let timeout = read.extras.as_mut().map(|e| std::mem::replace(&mut e.timeout_ms, u32::MAX));
    assert_eq!((read, timeout), (some.action, Some((1 << 28) - 1)), "a time too long is a very long one");
}

fn many(n: usize) -> Vec<Route> {
    (0..n).map(|i| route(&format!("r{i}"), TextMatch::Prefix(format!("/service-{i}/v1/")), vec![])).collect()
}

#[test]
fn a_long_table_is_found_through_and_a_change_resends_little() {
    let mut routes = many(1000);
    let (mut writer, held) = snapshot(&routes);
    for i in [0, 1, 499, 998, 999] {
        let asked = request(&format!("/service-{i}/v1/x"), &[]);
        assert_eq!(ask(&held, &asked).map(|m| m.name.to_owned()), Some(format!("r{i}")));
    }
    assert!(ask(&held, &request("/none", &[])).is_none());
    let total: usize = writer.pages().map(|(_, page)| page.len()).sum();
    let before: BTreeSet<_> = rows(&name(), &routes).iter().map(Row::key).collect();
    routes.insert(3, route("new", TextMatch::Exact("/new".into()), vec![]));
    let after = rows(&name(), &routes);
    let keys: BTreeSet<_> = after.iter().map(Row::key).collect();
    before.difference(&keys).for_each(|key| writer.remove(key));
    after.iter().for_each(|row| writer.put(row).expect("fits"));
    let sent: usize = writer.commit().changed.iter().filter_map(|id| writer.page(*id)).map(|page| page.len()).sum();
    assert!(sent * 5 < total, "{sent} of {total} bytes");
}

fn text() -> impl Strategy<Value = TextMatch> {
    let word = || prop::sample::select(vec!["/", "/a", "/a/b", "/b", "", "a", "A", "/A/B"]);
    prop_oneof![
        Just(TextMatch::Present),
        word().prop_map(|w| TextMatch::Exact(w.into())),
        word().prop_map(|w| TextMatch::Prefix(w.into())),
        prop::sample::select(vec!["/.*", "[ab/]*", "/a(/b)?", ".*"]).prop_map(|w| TextMatch::Regex(w.into())),
    ]
}

/// Conditions on how a path begins, of which a part may hold nothing else.
fn beginning() -> impl Strategy<Value = TextMatch> {
    let word = "/[a-h]{2,3}(/[ab]{0,2})?";
    prop_oneof![word.prop_map(TextMatch::Exact), word.prop_map(TextMatch::Prefix)]
}

fn condition() -> impl Strategy<Value = Condition> {
    let subject = prop_oneof![
        prop::sample::select(vec!["h", "g"]).prop_map(|n| Subject::Header(n.into())),
        prop::sample::select(vec!["q", "p"]).prop_map(|n| Subject::Query(n.into())),
    ];
    (subject, text(), any::<bool>()).prop_map(|(subject, text, negated)| Condition { subject, text, negated })
}

fn table() -> impl Strategy<Value = Vec<Route>> {
    let one = (text(), any::<bool>(), prop::collection::vec(condition(), 0..3), 0usize..300);
    prop::collection::vec(one, 0..60).prop_map(numbered)
}

/// A table of several parts.
fn plain_table() -> impl Strategy<Value = Vec<Route>> {
    let one = (beginning(), prop::bool::weighted(0.01), prop::collection::vec(condition(), 0..2), 0usize..60);
    prop::collection::vec(one, 50..120).prop_map(numbered)
}

/// Routes by path, whether case counts, conditions, and by how much their names are longer than they need be.
fn numbered(list: Vec<(TextMatch, bool, Vec<Condition>, usize)>) -> Vec<Route> {
    let made = list.into_iter().enumerate().map(|(i, (path, ignore_case, conditions, padding))| {
        let made = route(&format!("r{i}-{}", "x".repeat(padding)), path, conditions);
        Route { ignore_case, ..made }
    });
    made.collect()
}

/// The same rules, written for reading.
fn naive<'r>(routes: &'r [Route], path: &str, query: &BTreeMap<&str, String>, asked: &Headers) -> Option<&'r Route> {
    let holds = |wanted: &TextMatch, text: &str, fold: bool| {
        let same = |a: &str, b: &str| if fold { a.eq_ignore_ascii_case(b) } else { a == b };
        match wanted {
            TextMatch::Present => true,
            TextMatch::Exact(w) => same(text, w),
            TextMatch::Prefix(w) => text.get(..w.len()).is_some_and(|t| same(t, w)),
            TextMatch::Regex(w) => regex::Regex::new(&format!("^(?:{w})$")).expect("an expression").is_match(text),
        }
    };
    routes.iter().find(|route| {
        holds(&route.path, path, route.ignore_case)
            && route.conditions.iter().all(|condition| {
                let value = match &condition.subject {
                    Subject::Header(name) => asked.0.get(name.as_str()),
                    Subject::Query(name) => query.get(name.as_str()),
                };
                let empty = String::new();
                let missing = (condition.negated && condition.text != TextMatch::Present).then_some(&empty);
                let found = value.or(missing).is_some_and(|text| holds(&condition.text, text, false));
                found != condition.negated
            })
    })
}

proptest! {
    #[test]
    fn any_table_is_read_as_a_scan_reads_it(
        routes in table(),
        path in prop::sample::select(vec!["/", "/a", "/a/b", "/b/c", "/A/b"]),
        q in prop::option::of(prop::sample::select(vec!["", "a", "/a"])),
        h in prop::option::of(prop::sample::select(vec!["", "a", "/a/b"])),
    ) {
        let query: BTreeMap<&str, String> = q.iter().map(|q| ("q", (*q).to_owned())).collect();
        let full = q.map_or(path.to_owned(), |q| format!("{path}?q={q}"));
        let headers: Vec<(&'static str, &str)> = h.iter().map(|h| ("h", *h)).collect();
        let asked = request(&full, &headers);
        let expected = naive(&routes, path, &query, &asked).map(|route| route.name.clone());
        prop_assert_eq!(taken(&routes, &asked), expected);
    }

    #[test]
    fn parts_that_are_passed_over_have_no_route(routes in plain_table(), path in "/[a-h]{1,3}(/[ab]{0,3})?") {
        let asked = request(&path, &[("h", "/a")]);
        let expected = naive(&routes, &path, &BTreeMap::new(), &asked).map(|route| route.name.clone());
        prop_assert_eq!(taken(&routes, &asked), expected);
    }

    #[test]
    fn no_bytes_of_a_table_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let body = portolan_registry::route::TableBody::Whole(bytes);
        let (mut writer, _) = snapshot(&many(1));
        writer.put(&Row::Table { name: name(), body }).expect("fits");
        writer.commit();
        let mut snapshot = Snapshot::new();
        snapshot.reset();
        for (id, page) in writer.pages() {
            snapshot.stage(id, page.to_vec()).expect("a good page");
        }
        snapshot.commit(writer.digest()).expect("a whole snapshot");
        let _ = ask(&snapshot, &request("/service-0/v1/", &[("h", "x")]));
    }
}
