//! What a reload says: findings of every kind are counted while they are in force, and no longer.

use std::path::Path;
use std::time::Duration;

use portolan_controller::embed::{Controller, ControllerConfig};
use portolan_controller::validate::finding::{Gate, Severity};

fn entry(name: &str, port: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         hosts: [a.com]\n  resolution: DNS\n  ports: [{{{port}}}]\n"
    )
}

const HTTP: &str = "number: 80, name: http, protocol: HTTP";
const TCP: &str = "number: 80, name: tcp, protocol: TCP";

async fn start(dir: &Path) -> Controller {
    Controller::start(&ControllerConfig { paths: vec![dir.to_owned()], mesh: None }).await.unwrap()
}

/// Waits until the codes of the findings in force are these.
async fn until(controller: &Controller, expected: &[(Gate, Severity, &str)]) {
    let reached = async {
        loop {
            let found: Vec<_> = controller.status().findings().into_keys().collect();
            if found == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let reached = tokio::time::timeout(Duration::from_secs(15), reached).await;
    assert!(reached.is_ok(), "{:?} in place of {expected:?}", controller.status().findings());
}

#[tokio::test]
async fn conflicts_between_files_come_and_go_with_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("a.yaml", &entry("a", HTTP));
    let controller = start(dir.path()).await;
    until(&controller, &[]).await;
    write("b.yaml", &entry("b", TCP));
    let conflict = (Gate::Conflict, Severity::Warning, "protocol-conflict");
    until(&controller, &[conflict]).await;
    write("c.yaml", &entry("a", "number: 80, name: web, protocol: HTTP"));
    until(&controller, &[(Gate::Conflict, Severity::Warning, "duplicate-resource"), conflict]).await;
    write("b.yaml", &entry("b", HTTP));
    std::fs::remove_file(dir.path().join("c.yaml")).unwrap();
    until(&controller, &[]).await;
    assert_eq!(controller.status().objects(), 2);
}

#[tokio::test]
async fn what_is_refused_is_counted_and_its_last_good_version_stays() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(dir.path().join("a.yaml"), text).unwrap();
    write(&entry("a", HTTP));
    let controller = start(dir.path()).await;
    write(&entry("a", "number: 0, name: http, protocol: HTTP"));
    let refused = [(Gate::Webhook, Severity::Error, "port-range"), (Gate::Schema, Severity::Error, "cel")];
    until(&controller, &refused).await;
    assert_eq!(controller.status().objects(), 1);
    assert!(controller.status().reloads().1 >= 1);
    write(&entry("a", HTTP));
    until(&controller, &[]).await;
    assert!(controller.status().reloads().0 >= 1);
}

#[tokio::test]
async fn all_files_are_read_again_when_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), entry("a", "number: 0, name: http, protocol: HTTP")).unwrap();
    let controller = start(dir.path()).await;
    let before = controller.status().findings();
    assert_eq!(before.values().sum::<u64>(), 2, "{before:?}");
    controller.reload();
    let read = async {
        while controller.status().reloads() == (0, 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), read).await.unwrap();
    assert_eq!(controller.status().findings(), before);
}
