//! A file from anywhere: read, validated, and what is valid compiled, in one order and in the other.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use portolan_controller::compile::compile;
use portolan_controller::config::documents;
use portolan_controller::model::{MeshConfig, Object, Scope};
use portolan_controller::source::read::{self, Outcome};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file: Arc<str> = "fuzz.yaml".into();
    // To YAML a carriage return is the end of a line too.
    let lines = u32::try_from(text.matches(['\n', '\r']).count()).unwrap_or(u32::MAX - 1) + 1;
    let mut objects: Vec<Object> = Vec::new();
    for document in documents::split(text) {
        let (outcomes, findings) = read::document(&document, &file);
        for finding in findings {
            assert!(finding.line <= lines + 1, "{finding:?} lies behind the end of the file");
        }
        for outcome in outcomes {
            // One object of a name: with two of them the order counts.
            if let Outcome::Object(object, _) = outcome
                && objects.iter().all(|known| known.key() != object.key())
            {
                objects.push(object);
            }
        }
    }
    let _ = read::mesh(text, &file);

    let scope = Scope { namespace: "default".into(), ..Scope::default() };
    let (forth, _) = compile(objects.clone(), scope.clone(), MeshConfig::default());
    let (back, _) = compile(objects.into_iter().rev(), scope, MeshConfig::default());
    assert_eq!(forth.digest(), back.digest());
});
