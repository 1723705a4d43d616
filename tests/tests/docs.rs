//! The documents name what exists, and nothing in the repository speaks of the machine that it was written on.

use std::fs;

use portolan_tests::repo;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/envoy.md",
    "docs/filter.md",
    "docs/findings.md",
    "tests/conformance/README.md",
];

/// Words between backticks that look like a path of this repository.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|word| {
        word.contains('/')
            && word.starts_with(|c: char| c.is_ascii_lowercase() || c == '.')
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c))
    })
}

#[test]
fn each_path_in_the_documents_exists() {
    for document in DOCUMENTS {
        let file = repo::root().join(document);
        let text = fs::read_to_string(&file).unwrap();
        // Code blocks are no prose; an odd fence would shift every backtick after it.
        let prose: String = text.split("```").step_by(2).collect();
        for path in paths(&prose) {
            let found = repo::root().join(path).exists() || file.parent().unwrap().join(path).exists();
            assert!(found || generated(path), "{document} names {path}, which does not exist");
        }
    }
}

/// Made by a build.
fn generated(path: &str) -> bool {
    path.starts_with("target/") || path.starts_with(".venv/")
}

#[test]
fn nothing_speaks_of_the_machine_it_was_written_on() {
    let here = repo::root();
    let here = here.to_str().unwrap();
    let shared = concat!("../", "shared");
    for name in repo::files() {
        let path = repo::root().join(&name);
        // A link is read where it leads; a deleted file is not committed yet.
        let Ok(bytes) = fs::read(&path) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(shared), "{name} mentions {shared}");
        assert!(!text.contains(here), "{name} mentions {here}");
    }
}

#[test]
fn architecture_fits_in_150_lines() {
    let text = fs::read_to_string(repo::root().join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= 150, "{} lines", text.lines().count());
}

#[test]
fn each_difference_has_a_line_in_the_documents() {
    let text = fs::read_to_string(repo::root().join("ARCHITECTURE.md")).unwrap();
    for case in fs::read_dir(repo::root().join("tests/conformance/differences")).unwrap() {
        let name = case.unwrap().file_name().into_string().unwrap();
        assert!(text.contains(&format!("`{name}`")), "ARCHITECTURE.md does not name the difference {name}");
    }
}
