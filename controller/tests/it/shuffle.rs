//! The order of documents does not matter: every case, recorded or our own, of every kind compiles to the same bytes, plans and clusters however its
//! documents are shuffled. `SEED=N` repeats a run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use portolan_controller::compile::{Compiler, compile};
use portolan_controller::model::{Change, Object, Role, Scope};
use portolan_controller::source::yaml::YamlSource;

/// Every kind that is read.
const KINDS: [&str; 11] = [
    "ServiceEntry",
    "WorkloadEntry",
    "VirtualService",
    "DestinationRule",
    "Gateway",
    "Sidecar",
    "Service",
    "EndpointSlice",
    "Endpoints",
    "Pod",
    "Namespace",
];

/// The documents of a case, and its mesh file.
fn documents(case: &Path) -> (Vec<String>, Option<PathBuf>) {
    let mut out = Vec::new();
    for file in ["config.yaml", "k8s.yaml"] {
        // Not every case has both.
        let text = std::fs::read_to_string(case.join(file)).unwrap_or_default();
        out.extend(text.split("\n---\n").filter(|one| !one.trim().is_empty()).map(str::to_owned));
    }
    (out, Some(case.join("mesh.yaml")).filter(|mesh| mesh.exists()))
}

/// Compiles documents in this order.
fn compiled(documents: &[String], mesh: Option<&Path>, scope: &Scope) -> (Compiler, BTreeSet<String>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, documents.join("\n---\n")).unwrap();
    let (_, loaded) = YamlSource::load(&[file], mesh).unwrap();
    let objects = loaded.changes.into_iter().map(|change| match change {
        Change::Apply(object) => object,
        Change::Delete(key) => panic!("{key:?} is deleted at the start"),
    });
    let objects: Vec<Object> = objects.collect();
    let mut clusters = BTreeSet::new();
    for object in &objects {
        let (hosts, ports) = match object {
            Object::ServiceEntry(o) => (o.hosts.iter().map(ToString::to_string).collect(), o.ports.clone()),
            Object::Service(o) => {
                (vec![format!("{}.{}.svc.cluster.local", o.meta.name, o.meta.namespace)], o.ports.clone())
            }
            _ => continue,
        };
        for subset in ["", "v1", "v2"] {
            let name = |host: &String, port: u16| format!("outbound|{port}|{subset}|{host}");
            clusters.extend(hosts.iter().flat_map(|host| ports.iter().map(move |port| name(host, port.number))));
        }
    }
    (compile(objects, scope.clone(), loaded.mesh).0, clusters)
}

/// The scope of a case's proxy, from the JSON on the line `proxy: {…}`.
fn scope(case: &Path) -> Scope {
    let text = std::fs::read_to_string(case.join("case.yaml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("proxy: ")).unwrap_or("{}");
    let proxy: serde_json::Value = serde_json::from_str(line).unwrap();
    let text = |name: &str, default: &str| proxy[name].as_str().unwrap_or(default).to_owned();
    let labels = proxy["labels"].as_object().into_iter().flatten();
    Scope {
        namespace: text("namespace", "default"),
        labels: labels.map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned())).collect(),
        role: if text("type", "sidecar") == "router" { Role::Gateway } else { Role::Sidecar },
        ips: vec![text("ip", "1.1.1.1")],
        locality: text("locality", ""),
        ..Scope::default()
    }
}

/// Numbers that look random (SplitMix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn shuffle(list: &mut [String], state: &mut u64) {
    for last in (1..list.len()).rev() {
        let at = usize::try_from(next(state) % (last as u64 + 1)).unwrap();
        list.swap(last, at);
    }
}

#[test]
fn every_order_of_documents_compiles_to_the_same() {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let seed = std::env::var("SEED").map_or(u64::try_from(now % 1_000_000_007).unwrap(), |s| s.parse().unwrap());
    println!("SEED={seed}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance");
    let folders =
        ["cases", "differences", "gateways", "rules"].map(|folder| std::fs::read_dir(root.join(folder)).unwrap());
    let mut cases: Vec<PathBuf> = folders.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    let text: String = cases.iter().flat_map(|case| documents(case).0).map(|document| document + "\n").collect();
    for kind in KINDS {
        assert!(text.contains(&format!("kind: {kind}\n")), "no case has a {kind}");
    }
    assert!(cases.len() > 100, "{} cases", cases.len());
    let mut state = seed;
    for case in cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let (mut all, mesh) = documents(&case);
        let scope = scope(&case);
        let (first, clusters) = compiled(&all, mesh.as_deref(), &scope);
        for _ in 0..3 {
            shuffle(&mut all, &mut state);
            let (again, _) = compiled(&all, mesh.as_deref(), &scope);
            assert_eq!(again.digest(), first.digest(), "{name}: SEED={seed}");
            assert!(again.pages().eq(first.pages()), "{name}: SEED={seed}");
            assert_eq!(again.plans(), first.plans(), "{name}: SEED={seed}");
            for cluster in &clusters {
                assert_eq!(again.cluster(cluster), first.cluster(cluster), "{name}: {cluster}, SEED={seed}");
            }
        }
    }
}
