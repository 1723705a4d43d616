//! Whatever the order in which objects come and go, the pages are those of the set that is there in the end.

use crate::objects;

use std::collections::BTreeMap;

use objects::*;
use portolan_controller::compile::{Compiler, compile};
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Change, Object, ObjectKey, Protocol, Resolution};
use proptest::prelude::*;
use proptest::sample::select;

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Auto, Http, Grpc, Https, Tls, Tcp, Mongo, Mysql, Udp])
}

/// Few names and ports, so that they meet.
fn service_entry() -> impl Strategy<Value = Object> {
    let host = select(vec![
        "a.com",
        "A.com",
        "b.a.com",
        "*.a.com",
        "*part.com",
        "*",
        "x.default.svc.cluster.local",
        "10.0.0.9",
        "c.com",
    ]);
    let address = select(vec!["10.0.0.9", "10.0.0.8", "10.1.0.0/16", "10.1.2.0/24", "2001:db8::1"]);
    let port = (select(vec![80u16, 443, 9000, 15001]), protocol());
    let resolution = select(vec![Resolution::None, Resolution::Static, Resolution::Dns, Resolution::DynamicDns]);
    let export = select(vec!["", "*", ".", "default", "~"]);
    (
        (0..6u8, select(vec!["default", "n1", "n2"]), 0..3i64),
        proptest::collection::vec(host, 1..3),
        proptest::collection::vec(address, 0..3),
        proptest::collection::btree_map(port.0, port.1, 0..4),
        (resolution, export, proptest::option::of(select(vec!["t", "u"]))),
    )
        .prop_map(|((name, namespace, created), hosts, list, ports, (how, export, selector))| {
            let ports: Vec<(u16, Protocol)> = ports.into_iter().collect();
            let name = format!("{namespace}/e{name}@{created}");
            entry(se(&name, &hosts, &ports).with(addresses(&list)).with(|e| {
                e.resolution = how;
                e.export_to = [export].into_iter().filter(|e| !e.is_empty()).map(str::to_owned).collect();
                e.workload_selector = selector.map(|s| labels(&[("app", s)]));
            }))
        })
}

fn object() -> impl Strategy<Value = Object> {
    let app = select(vec!["t", "u"]);
    let namespace = select(vec!["default", "n1"]);
    let ip = select(vec!["10.0.0.9", "10.5.0.1", "1.1.1.1"]);
    prop_oneof![
        6 => service_entry(),
        1 => (0..3u8, namespace.clone(), ip.clone(), app)
            .prop_map(|(n, ns, ip, app)| workload(we(&format!("{ns}/w{n}"), ip, &[("app", app)]))),
        1 => (namespace.clone(), proptest::option::of(ip.clone()), protocol())
            .prop_map(|(ns, ip, p)| kube(ns, "x", ip, &[(80, p), (9000, Tcp)])),
        1 => (0..2u8, select(vec!["default", "istio-system", "n1"]), select(vec![
                "egress: [{hosts: ['./*']}]",
                "egress: [{hosts: ['*/*', '~./a.com']}]",
                "{egress: [{port: {number: 80, protocol: HTTP}, hosts: ['n1/*']}, {hosts: ['./*', n2/a.com]}]}",
                "{egress: [{port: {number: 9000, protocol: TCP}, hosts: ['*/*']}]}",
                "{workloadSelector: {labels: {app: x}}, outboundTrafficPolicy: {}}",
                "outboundTrafficPolicy: {mode: ALLOW_ANY}",
            ]))
            .prop_map(|(n, ns, spec)| sidecar(&format!("{ns}/s{n}@{n}"), spec)),
        1 => (namespace, ip).prop_map(|(ns, ip)| slice(ns, "x", &[ip], 9000)),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Apply(Object),
    /// Deletes one of those that are there.
    Delete(prop::sample::Index),
    Commit,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => object().prop_map(Step::Apply),
        2 => any::<prop::sample::Index>().prop_map(Step::Delete),
        2 => Just(Step::Commit),
    ];
    proptest::collection::vec(step, 1..40)
}

fn same(a: &Compiler, b: &Compiler) -> Result<(), TestCaseError> {
    let pages = |c: &Compiler| c.pages().map(|(id, p)| (id, p.clone())).collect::<Vec<_>>();
    prop_assert_eq!(a.plans(), b.plans());
    prop_assert_eq!(a.digest(), b.digest());
    prop_assert!(pages(a) == pages(b), "pages differ");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn incremental_is_as_from_scratch(steps in steps(), seed in any::<u64>()) {
        let mut compiler = Compiler::new(scope(), blocking());
        let mut there: BTreeMap<ObjectKey, Object> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Apply(object) => {
                    there.insert(object.key(), object.clone());
                    compiler.apply(&[Change::Apply(object)]);
                }
                Step::Delete(_) if there.is_empty() => {}
                Step::Delete(which) => {
                    let key = which.get(&there.keys().cloned().collect::<Vec<_>>()).clone();
                    there.remove(&key);
                    compiler.apply(&[Change::Delete(key)]);
                }
                Step::Commit => drop(compiler.commit()),
            }
        }
        compiler.commit();
        let (forward, _) = compile(there.values().cloned(), scope(), blocking());
        same(&compiler, &forward)?;
        let mut shuffled: Vec<Object> = there.into_values().collect();
        let len = shuffled.len().max(1) as u64;
        for i in 0..shuffled.len() {
            let at = usize::try_from(seed.rotate_left(u32::try_from(i).unwrap()) % len).unwrap();
            shuffled.swap(i, at);
        }
        let (other, _) = compile(shuffled, scope(), blocking());
        same(&compiler, &other)?;
        opened(&compiler);
    }
}
