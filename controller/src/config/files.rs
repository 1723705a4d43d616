//! Which files a list of paths means.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// Whether a file of that name holds configuration: `*.yaml`, `*.yml`, `*.json`, not hidden.
pub fn is_config(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let known = path.extension().is_some_and(|ext| ["yaml", "yml", "json"].iter().any(|e| ext.eq_ignore_ascii_case(e)));
    known && !hidden
}

/// The files that `paths` name, directories searched in depth, sorted. A file named outright counts whatever it is called.
/// Hidden entries of directories are passed over; links are followed, each directory once.
///
/// # Errors
/// A path that does not exist or a directory that cannot be listed, with its name.
pub fn list(paths: &[PathBuf]) -> Result<BTreeSet<PathBuf>, (PathBuf, io::Error)> {
    let mut found = Walk::default();
    for path in paths {
        let kind = std::fs::metadata(path).map_err(|error| (path.clone(), error))?;
        if kind.is_dir() {
            found.walk(path).map_err(|error| (path.clone(), error))?;
        } else {
            found.files.insert(path.clone());
        }
    }
    Ok(found.files)
}

/// The directories below `path`, itself included, that [`list`] looks into.
pub fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = Walk::default();
    // What cannot be listed has no files to watch either; `list` reports it.
    let _ = found.walk(path);
    found.directories
}

#[derive(Default)]
struct Walk {
    files: BTreeSet<PathBuf>,
    directories: BTreeSet<PathBuf>,
    /// Real paths, so that a link to a directory above does not go round.
    seen: BTreeSet<PathBuf>,
}

impl Walk {
    fn walk(&mut self, directory: &Path) -> io::Result<()> {
        if !self.seen.insert(directory.canonicalize()?) {
            return Ok(());
        }
        self.directories.insert(directory.to_owned());
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            // An entry that vanished meanwhile, or a dangling link, is no file.
            let Ok(kind) = std::fs::metadata(&path) else { continue };
            if kind.is_dir() {
                self.walk(&path)?;
            } else if kind.is_file() && is_config(&path) {
                self.files.insert(path);
            }
        }
        Ok(())
    }
}
