//! Resources from files: what is read, what is told, and what stays when files go bad.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use portolan_controller::model::{Change, MeshConfig, Object, OutboundMode};
use portolan_controller::source::yaml::{Batch, Loaded, ReadError, YamlSource};
use portolan_controller::validate::finding::Gate;

fn entry(name: &str, host: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  hosts: [{host}]\n  \
         ports: [{{number: 443, name: tls, protocol: TLS}}]\n  resolution: DNS\n"
    )
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        for (name, text) in files {
            folder.write(name, text);
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn load(&self) -> (YamlSource, Loaded) {
        YamlSource::load(&[self.0.path().to_owned()], None).unwrap()
    }
}

/// Hosts by entry name.
fn hosts(changes: &[Change]) -> BTreeMap<String, String> {
    changes
        .iter()
        .map(|change| match change {
            Change::Apply(Object::ServiceEntry(entry)) => (entry.meta.name.to_string(), entry.hosts.join(",")),
            Change::Apply(other) => (other.meta().name.to_string(), "other".into()),
            Change::Delete(key) => (key.name.to_string(), "deleted".into()),
        })
        .collect()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

async fn next(source: &mut YamlSource) -> Batch {
    tokio::time::timeout(Duration::from_secs(10), source.next()).await.expect("a batch follows a change")
}

#[test]
fn one_bad_document_hides_no_other() {
    let bomb = "---\na: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n";
    let text = [entry("a", "a.com"), "---\nx: y: z\n".into(), bomb.into(), entry("b", "b.com")].concat();
    let folder = Folder::new(&[("deep/er/x.yml", &text), ("ignored.txt", "{")]);
    let (_, loaded) = folder.load();
    assert_eq!(hosts(&loaded.changes), map(&[("a", "a.com"), ("b", "b.com")]));
    let found: Vec<(u32, &str)> = loaded.findings.iter().map(|f| (f.line, f.code)).collect();
    assert_eq!(found, [(10, "syntax"), (16, "syntax")], "{:#?}", loaded.findings);
}

#[test]
fn lists_json_old_versions_and_snake_case_are_read() {
    let json = r#"{"apiVersion":"v1","kind":"List","items":[
        {"apiVersion":"networking.istio.io/v1alpha3","kind":"ServiceEntry","metadata":{"name":"a"},
         "spec":{"hosts":["a.com"],"export_to":["."],"ports":[{"number":"80","name":"http","protocol":"http","target_port":8080}],"resolution":2}},
        {"apiVersion":"networking.istio.io/v1beta1","kind":"WorkloadEntry","metadata":{"name":"w","creationTimestamp":"1970-01-01T00:01:00Z"},
         "spec":{"address":"10.0.0.1","service_account":"sa"},"status":{"conditions":[{"type":"Healthy","status":"False"}]}}]}"#;
    let folder = Folder::new(&[("list.json", json)]);
    let (_, loaded) = folder.load();
    let [Change::Apply(Object::ServiceEntry(se)), Change::Apply(Object::WorkloadEntry(we))] = &loaded.changes[..]
    else {
        panic!("{:?}", loaded.changes);
    };
    assert_eq!(se.export_to, ["."]);
    assert_eq!((se.ports[0].number, se.ports[0].target_port), (80, Some(8080)));
    assert_eq!((we.workload.service_account.as_str(), we.healthy, we.meta.created), ("sa", Some(false), 60));
}

#[test]
fn findings_name_the_line_of_the_field() {
    let text = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata:\n  name: a\nspec:\n  hosts:\n  - a.com\n  - b_c.com\n  \
                ports:\n  - number: 443\n    name: tls\n    protocol: FOO\n  resolution: NONE\n";
    let folder = Folder::new(&[("a.yaml", text)]);
    let (_, loaded) = folder.load();
    let found: Vec<(u32, &str)> =
        loaded.findings.iter().filter(|f| f.gate == Gate::Webhook).map(|f| (f.line, f.field.as_str())).collect();
    assert_eq!(found, [(8, "spec.hosts[1]"), (12, "spec.ports[0].protocol")]);
    assert_eq!(loaded.changes, []);
}

#[test]
fn of_one_resource_in_two_files_the_later_counts() {
    let folder = Folder::new(&[("a.yaml", &entry("x", "first.com")), ("b.yaml", &entry("x", "second.com"))]);
    let (_, loaded) = folder.load();
    assert_eq!(hosts(&loaded.changes), map(&[("x", "second.com")]));
    assert_eq!(loaded.findings.iter().map(|f| f.code).collect::<Vec<_>>(), ["duplicate-resource"]);
}

#[test]
fn the_mesh_is_found_and_a_wrong_one_is_refused() {
    let folder = Folder::new(&[("mesh.yaml", "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")]);
    let (_, loaded) = folder.load();
    assert_eq!(loaded.mesh, MeshConfig { outbound: OutboundMode::RegistryOnly, ..MeshConfig::default() });
    folder.write("mesh.yaml", "outboundTrafficPolicy: {mode: REGISTRY_ONY}\n");
    let result = YamlSource::load(&[folder.0.path().to_owned()], None);
    assert!(matches!(result.map(|_| ()), Err(ReadError::Mesh { .. })));
    let result = YamlSource::load(&[], Some(Path::new("/nowhere/mesh.yaml")));
    assert!(matches!(result.map(|_| ()), Err(ReadError::Path { .. })));
}

#[tokio::test]
async fn a_refused_version_keeps_the_last_good_one() {
    let folder = Folder::new(&[("a.yaml", &[entry("x", "x.com"), entry("w", "y.com")].concat())]);
    let (mut source, _) = folder.load();
    folder.write("a.yaml", &[entry("x", "x_1.com"), entry("w", "y2.com")].concat());
    let batch = next(&mut source).await;
    assert_eq!(hosts(&batch.changes), map(&[("w", "y2.com")]));
    assert_eq!(batch.findings[0].code, "host");
    // Once it is well again it counts, and then it can go.
    folder.write("a.yaml", &[entry("x", "x1.com"), entry("w", "y2.com")].concat());
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("x", "x1.com")]));
    folder.write("a.yaml", &entry("w", "y2.com"));
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("x", "deleted")]));
}

#[tokio::test]
async fn a_file_cut_short_takes_nothing_away() {
    let text = [entry("x", "x.com"), entry("w", "y.com")].concat();
    let folder = Folder::new(&[("a.yaml", &text)]);
    let (mut source, _) = folder.load();
    let cut = text.rfind("ports: [").unwrap() + 12;
    folder.write("a.yaml", &text[..cut]);
    let batch = next(&mut source).await;
    assert_eq!((batch.changes, batch.findings[0].code), (vec![], "syntax"));
}

#[tokio::test]
async fn files_come_and_go() {
    let folder = Folder::new(&[("a.yaml", &entry("x", "x.com")), ("b.yaml", &entry("x", "later.com"))]);
    let (mut source, _) = folder.load();
    folder.write("sub/c.yaml", &entry("z", "z.com"));
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("z", "z.com")]));
    std::fs::remove_file(folder.path("b.yaml")).unwrap();
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("x", "x.com")]));
    std::fs::remove_dir_all(folder.path("sub")).unwrap();
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("z", "deleted")]));
    folder.write("mesh.yaml", "proxyHttpPort: 15080\n");
    assert_eq!(next(&mut source).await.mesh.unwrap().proxy_http_port, Some(15080));
}

#[tokio::test]
async fn documents_move_within_a_file() {
    let list = |names: &[&str]| names.iter().map(|n| entry(n, &format!("{n}.com"))).collect::<String>();
    let folder = Folder::new(&[("a.yaml", &list(&["a", "b", "c", "d"]))]);
    let (mut source, _) = folder.load();
    folder.write("a.yaml", &list(&["a", "c", "b", "d", "e"]));
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("e", "e.com")]));
    folder.write("a.yaml", &list(&["e", "d"]));
    let gone = map(&[("a", "deleted"), ("b", "deleted"), ("c", "deleted")]);
    assert_eq!(hosts(&next(&mut source).await.changes), gone);
    folder.write("a.yaml", &[list(&["e", "d"]), entry("d", "d2.com")].concat());
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("d", "d2.com")]));
    folder.write("a.yaml", &list(&["d"]));
    assert_eq!(hosts(&next(&mut source).await.changes), map(&[("d", "d.com"), ("e", "deleted")]));
}

/// Mounts a version of a ConfigMap, step by step as a kubelet does: a folder of its own, a link to it that takes the place
/// of the last one's, links to new keys, none to those that are gone, and no last version.
fn mount(folder: &Folder, version: u32, files: &[(&str, String)]) {
    use std::os::unix::fs::symlink;
    for (name, text) in files {
        folder.write(&format!("..{version}/{name}"), text);
    }
    symlink(format!("..{version}"), folder.path("..data_tmp")).unwrap();
    std::fs::rename(folder.path("..data_tmp"), folder.path("..data")).unwrap();
    for (name, _) in files {
        if std::fs::symlink_metadata(folder.path(name)).is_err() {
            symlink(format!("..data/{name}"), folder.path(name)).unwrap();
        }
    }
    for link in std::fs::read_dir(folder.0.path()).unwrap().map(|entry| entry.unwrap().file_name()) {
        let name = link.to_str().unwrap();
        if !name.starts_with("..") && !files.iter().any(|(file, _)| *file == name) {
            std::fs::remove_file(folder.path(name)).unwrap();
        }
    }
    if version > 1 {
        std::fs::remove_dir_all(folder.path(&format!("..{}", version - 1))).unwrap();
    }
}

#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let folder = Folder::new(&[]);
    mount(&folder, 1, &[("a.yaml", entry("x", "x.com"))]);
    let (mut source, loaded) = folder.load();
    assert_eq!(hosts(&loaded.changes), map(&[("x", "x.com")]));
    let broken = entry("x", "x.com").replace("hosts:", "hosts: [");
    let versions = [
        // Changed; with another key; broken, which takes nothing away; mended; with a key less.
        (vec![("a.yaml", entry("x", "x2.com"))], ("x", "x2.com")),
        (vec![("a.yaml", entry("x", "x2.com")), ("b.yaml", entry("z", "y.com"))], ("z", "y.com")),
        (vec![("a.yaml", broken), ("b.yaml", entry("z", "y2.com"))], ("z", "y2.com")),
        (vec![("a.yaml", entry("x", "x3.com")), ("b.yaml", entry("z", "y2.com"))], ("x", "x3.com")),
        (vec![("b.yaml", entry("z", "y2.com"))], ("x", "deleted")),
    ];
    for (version, (files, change)) in (2..).zip(versions) {
        mount(&folder, version, &files);
        let mut seen = BTreeMap::new();
        // The steps of one version may come in several batches.
        while seen != map(&[change]) {
            seen.extend(hosts(&next(&mut source).await.changes));
        }
    }
}

#[tokio::test]
async fn a_change_is_a_batch_in_20_milliseconds() {
    let many: String = (0..1000).map(|i| entry(&format!("e{i}"), &format!("h{i}.com"))).collect();
    let folder = Folder::new(&[("a.yaml", &many)]);
    let (mut source, _) = folder.load();
    // The best of several tries: the machine may have other things to do.
    let mut best = Duration::MAX;
    for i in 0..10 {
        folder.write("a.yaml", &many.replace("h500.com", &format!("new{i}.com")));
        let written = Instant::now();
        assert_eq!(hosts(&next(&mut source).await.changes), map(&[("e500", &format!("new{i}.com"))]));
        best = best.min(written.elapsed());
    }
    assert!(best < Duration::from_millis(20), "{best:?}");
}

fn in_namespace(name: &str, host: &str, namespace: &str) -> String {
    entry(name, host).replace(&format!("{{name: {name}}}"), &format!("{{name: {name}, namespace: {namespace}}}"))
}

#[test]
fn namespaces_are_what_selectors_of_the_mesh_match() {
    let namespaces = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {mesh: 'on'}}\n---\n\
                      apiVersion: v1\nkind: Namespace\nmetadata: {name: bank}\n";
    let folder = Folder::new(&[
        ("entries.yaml", &["shop", "bank", "nobody"].map(|n| in_namespace(n, "one.example.com", n)).concat()),
        ("namespaces.yaml", namespaces),
        ("mesh.yaml", "discoverySelectors: [{matchLabels: {mesh: 'on'}}]\n"),
    ]);
    let (_, loaded) = folder.load();
    assert_eq!(loaded.changes.len(), 5, "what is passed over is known, should that change");
    assert_eq!(loaded.mesh.discovery_selectors.len(), 1);
    // One host thrice would be a conflict; a namespace that nobody declares is told.
    let told: Vec<_> = loaded.findings.iter().map(|f| (f.code, f.namespace.as_str())).collect();
    assert_eq!(told, [("unknown-namespace", "nobody")], "{:?}", loaded.findings);
    // By name, as in a cluster, where each has the label.
    folder.write("mesh.yaml", "discoverySelectors: [{matchLabels: {kubernetes.io/metadata.name: bank}}]\n");
    folder.write("entries.yaml", &["shop", "bank"].map(|n| in_namespace(n, "one.example.com", n)).concat());
    let (_, loaded) = folder.load();
    assert_eq!(loaded.findings, []);
}
