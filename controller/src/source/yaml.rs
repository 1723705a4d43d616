//! Resources from files: loaded once, then watched.
//!
//! What is wrong never takes away what was good. A resource whose new version is refused keeps its last good one; so do
//! all resources of a file that cannot be read, and those missing from a file of which some part cannot be read. Of a
//! file that changed only the documents that changed are read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{documents, files};
use crate::discovery;
use crate::model::{Change, LabelSelector, MeshConfig, Object, ObjectKey};
use crate::source::read::{self, Outcome};
use crate::source::watch::{Due, Watcher};
use crate::validate::conflict::{self, Placed};
use crate::validate::finding::{Finding, Severity};

/// How long a file may be empty before that counts: many programs empty a file before they write it.
const EMPTY: Duration = Duration::from_millis(250);
/// How many documents of a file may change for it to be changed in place.
const IN_PLACE: usize = 64;
/// Stands for all documents with errors, which have no hash to be known by.
const REFUSED: u64 = 0;
/// Stands for what is between the documents of one file.
const BETWEEN: u64 = 1;
/// When to look for a directory again that is gone.
const GONE: Duration = Duration::from_millis(500);

/// Why a source cannot start. All of them are the fault of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file or directory cannot be read.
    #[error("{}: {source}", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mesh configuration has errors. To go on with another one might open what it closes.
    #[error("mesh configuration refused: {}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Mesh {
        /// Its errors.
        findings: Vec<Finding>,
    },
    /// Files cannot be watched.
    #[error("cannot watch for changes: {0}")]
    Watch(#[from] notify::Error),
}

/// What a source begins with.
#[derive(Debug)]
pub struct Loaded {
    /// One [`Change::Apply`] for each resource.
    pub changes: Vec<Change>,
    /// The mesh configuration, Istio's defaults if there is none.
    pub mesh: MeshConfig,
    /// Everything validation has to say, conflicts between resources included.
    pub findings: Vec<Finding>,
}

/// What changed.
#[derive(Debug, Default)]
pub struct Batch {
    /// Changed resources, each at most once.
    pub changes: Vec<Change>,
    /// The mesh configuration, if it changed.
    pub mesh: Option<MeshConfig>,
    /// What validation has to say of the documents that changed.
    pub findings: Vec<Finding>,
    /// Documents changed, be it only that what was said of them holds no longer.
    pub reread: bool,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.mesh.is_none() && self.findings.is_empty() && !self.reread
    }
}

/// Files and directories of Istio YAML.
pub struct YamlSource {
    roots: Vec<Root>,
    mesh_file: Option<(PathBuf, Arc<str>)>,
    /// What the mesh file last said.
    explicit_mesh: Option<MeshConfig>,
    /// What there is to say of the mesh file.
    mesh_findings: Vec<Finding>,
    /// Files that cannot be read.
    unreadable: BTreeMap<PathBuf, Finding>,
    files: BTreeMap<PathBuf, File>,
    mesh: MeshConfig,
    watcher: Watcher,
}

/// A path as it was given, and where that is.
struct Root {
    given: PathBuf,
    absolute: PathBuf,
}

impl Root {
    fn new(given: &Path) -> Result<Root, ReadError> {
        let absolute = std::path::absolute(given).map_err(|source| ReadError::Path { path: given.into(), source })?;
        Ok(Root { given: given.to_owned(), absolute })
    }

    /// What findings call the file.
    fn name_of(&self, file: &Path) -> Option<Arc<str>> {
        let below = file.strip_prefix(&self.absolute).ok()?;
        let name = if below.as_os_str().is_empty() { self.given.clone() } else { self.given.join(below) };
        Some(Arc::from(name.to_string_lossy()))
    }
}

/// Tells one state of a file from another without reading it.
type Stamp = (u64, u64, i64, i64);

/// What is known of one file.
#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    /// Outcomes of documents that were read without error, by the hash of their text, with the line they began on.
    documents: HashMap<u64, (u32, Vec<Outcome>)>,
    /// What there is to say of them, where there is anything, by the same hash; other
    /// findings by [`REFUSED`] and [`BETWEEN`].
    findings: HashMap<u64, Vec<Finding>>,
    /// The hashes of all documents in their order, where each holds resources in force and no two the same one; then
    /// a change can be made in place.
    order: Option<Vec<u64>>,
    /// The resources in force.
    objects: HashMap<ObjectKey, Placed>,
    mesh: Option<MeshConfig>,
    /// Set when the file was found empty; the second time it counts.
    emptied: bool,
}

/// All resources at one moment. To compare them with each other takes a while, and changes need not wait for that.
#[derive(Debug)]
pub struct Review {
    pub(super) findings: Vec<Finding>,
    pub(super) placed: Vec<Placed>,
    /// Which namespaces are considered.
    pub(super) selectors: Vec<LabelSelector>,
}

impl Review {
    /// Everything there is to say about the resources, conflicts between them included.
    pub fn findings(self) -> Vec<Finding> {
        let mut findings = self.findings;
        let (mut objects, duplicates) = conflict::deduplicate(self.placed);
        findings.extend(duplicates);
        findings.extend(discovery::leave(&mut objects, &self.selectors));
        findings.extend(conflict::between(&objects));
        findings
    }
}

impl YamlSource {
    /// Reads everything that `paths` (files and directories) hold, and begins to watch them. `mesh` is a MeshConfig
    /// file; without it one is looked for among the rest.
    ///
    /// # Errors
    /// A path that cannot be read, a mesh configuration with errors, or no means to watch. Errors in resources are
    /// findings instead.
    pub fn load(paths: &[PathBuf], mesh: Option<&Path>) -> Result<(YamlSource, Loaded), ReadError> {
        let roots = paths.iter().map(|path| Root::new(path)).collect::<Result<Vec<_>, _>>()?;
        let mesh_file = mesh.map(Root::new).transpose()?.map(|root| {
            let name = Arc::from(root.given.to_string_lossy());
            (root.absolute, name)
        });
        let mut source = YamlSource {
            roots,
            mesh_file,
            explicit_mesh: None,
            mesh_findings: Vec::new(),
            unreadable: BTreeMap::new(),
            files: BTreeMap::new(),
            mesh: MeshConfig::default(),
            watcher: Watcher::new()?,
        };
        for path in source.roots.iter().map(|root| &root.given).chain(mesh.map(Path::to_path_buf).iter()) {
            std::fs::metadata(path).map_err(|source| ReadError::Path { path: path.clone(), source })?;
        }
        // Watch first: what changes while it is read is read again.
        source.watch()?;
        let mut findings = Vec::new();
        if let Some((path, name)) = &source.mesh_file {
            let text =
                std::fs::read_to_string(path).map_err(|error| ReadError::Path { path: path.clone(), source: error })?;
            let (mesh, found) = read::mesh(&text, name);
            let Some(mesh) = mesh else { return Err(ReadError::Mesh { findings: found }) };
            source.explicit_mesh = Some(mesh);
            source.mesh_findings.clone_from(&found);
            findings.extend(found);
        }
        let listing = source.list().map_err(|(path, source)| ReadError::Path { path, source })?;
        for (path, name) in listing {
            let stamp = stamp(&path);
            match std::fs::read(&path).and_then(utf8) {
                Ok(text) => {
                    let (mut file, found) = File::default().reread(&text, &name);
                    if text_has_refused_mesh(&found) && file.mesh.is_none() && source.explicit_mesh.is_none() {
                        return Err(ReadError::Mesh { findings: found });
                    }
                    file.stamp = stamp;
                    findings.extend(found);
                    source.files.insert(path, file);
                }
                Err(error) if source.roots.iter().any(|root| root.absolute == path) => {
                    return Err(ReadError::Path { path, source: error });
                }
                Err(error) => findings.push(source.cannot_read(&path, &name, &error)),
            }
        }
        source.mesh = source.effective_mesh();
        let all: Vec<Placed> = source.files.values().flat_map(File::in_order).cloned().collect();
        let (mut objects, duplicates) = conflict::deduplicate(all);
        findings.extend(duplicates);
        let changes = objects.iter().map(|placed| Change::Apply(placed.object.clone())).collect();
        findings.extend(discovery::leave(&mut objects, &source.mesh.discovery_selectors));
        findings.extend(conflict::between(&objects));
        let loaded = Loaded { changes, mesh: source.mesh.clone(), findings };
        Ok((source, loaded))
    }

    /// Waits for changes. Must run in a tokio runtime with time; nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Batch {
        loop {
            let due = self.watcher.next().await;
            let batch = self.apply(due);
            if !batch.is_empty() {
                return batch;
            }
        }
    }

    fn apply(&mut self, due: Due) -> Batch {
        let mut batch = Batch::default();
        let mut rescan = due.rescan;
        for path in due.paths {
            if self.mesh_file.as_ref().is_some_and(|(mesh, _)| *mesh == path) {
                self.reread_mesh(&mut batch);
            } else if self.files.contains_key(&path) || files::is_config(&path) && !path.is_dir() {
                if let Some(name) = self.name_of(&path) {
                    self.refresh(&path, &name, &mut batch);
                }
            } else {
                // A directory came or went, or the link that a mounted ConfigMap hangs on was turned.
                rescan = true;
            }
        }
        if rescan {
            self.rescan(&mut batch);
        }
        // Two files of one batch may touch the same resource; what counts is the end.
        let mut seen = HashSet::new();
        batch.changes.reverse();
        batch.changes.retain(|change| seen.insert(change.key()));
        batch.changes.reverse();
        let mesh = self.effective_mesh();
        if mesh != self.mesh {
            self.mesh = mesh.clone();
            batch.mesh = Some(mesh);
        }
        batch
    }

    /// Reads every file again, whether it seems to have changed or not.
    pub fn reload(&mut self) -> Batch {
        self.files.values_mut().for_each(|file| file.stamp = None);
        self.apply(Due { paths: Vec::new(), rescan: true })
    }

    /// The resources as they are now, to be looked over apart from the source.
    pub fn review(&self) -> Review {
        let of_files = self.files.values().flat_map(|file| file.findings.values().flatten());
        let findings = of_files.chain(&self.mesh_findings).chain(self.unreadable.values()).cloned().collect();
        let placed = self.files.values().flat_map(File::in_order).cloned().collect();
        Review { findings, placed, selectors: self.mesh.discovery_selectors.clone() }
    }

    /// How many resources are in force, those that stand in several files counted once for each.
    pub fn objects(&self) -> usize {
        self.files.values().map(|file| file.objects.len()).sum()
    }

    fn cannot_read(&mut self, path: &Path, name: &Arc<str>, error: &io::Error) -> Finding {
        let finding = unreadable(name, error);
        self.unreadable.insert(path.to_owned(), finding.clone());
        finding
    }

    fn effective_mesh(&self) -> MeshConfig {
        let found = self.files.values().rev().find_map(|file| file.mesh.as_ref());
        self.explicit_mesh.as_ref().or(found).cloned().unwrap_or_default()
    }

    fn list(&self) -> Result<BTreeMap<PathBuf, Arc<str>>, (PathBuf, io::Error)> {
        let roots: Vec<PathBuf> = self.roots.iter().map(|root| root.absolute.clone()).collect();
        let mut found = files::list(&roots)?;
        if let Some((mesh, _)) = &self.mesh_file {
            found.remove(mesh);
        }
        Ok(found.into_iter().filter_map(|path| self.name_of(&path).map(|name| (path, name))).collect())
    }

    fn name_of(&self, path: &Path) -> Option<Arc<str>> {
        // An explicit file may lie beside others that nobody asked for.
        self.roots.iter().find_map(|root| root.name_of(path))
    }

    fn watch(&mut self) -> Result<(), notify::Error> {
        let mut directories = BTreeSet::new();
        let single = self.mesh_file.iter().map(|(path, _)| path.as_path());
        for path in self.roots.iter().map(|root| root.absolute.as_path()).chain(single) {
            if path.is_dir() {
                directories.extend(files::directories(path));
            } else if let Some(parent) = path.parent() {
                directories.insert(parent.to_owned());
            }
        }
        self.watcher.watch(directories)
    }

    fn rescan(&mut self, batch: &mut Batch) {
        let listing = match self.list() {
            Ok(listing) => listing,
            Err((path, error)) => {
                tracing::warn!(path = %path.display(), %error, "configuration cannot be listed, the last good state stays");
                self.watcher.forget(&path);
                return self.watcher.rescan(GONE);
            }
        };
        if let Err(error) = self.watch() {
            tracing::warn!(%error, "watching configuration files");
            self.watcher.rescan(GONE);
        }
        let gone: Vec<PathBuf> = self.files.keys().filter(|path| !listing.contains_key(*path)).cloned().collect();
        for path in gone {
            self.replace(&path, None, batch);
        }
        for (path, name) in listing {
            if self.files.get(&path).is_none_or(|file| file.stamp.is_none() || file.stamp != stamp(&path)) {
                self.refresh(&path, &name, batch);
            }
        }
        self.reread_mesh(batch);
    }

    fn reread_mesh(&mut self, batch: &mut Batch) {
        let Some((path, name)) = &self.mesh_file else { return };
        match std::fs::read(path).and_then(utf8) {
            // Half-way through being written.
            Ok(text) if text.is_empty() => {}
            Ok(text) => {
                let (mesh, findings) = read::mesh(&text, name);
                if mesh.is_none() || mesh != self.explicit_mesh {
                    batch.findings.extend(findings.iter().cloned());
                }
                self.unreadable.remove(path);
                self.mesh_findings = findings;
                self.explicit_mesh = mesh.or(self.explicit_mesh.take());
            }
            Err(error) => {
                let (path, name) = (path.clone(), name.clone());
                batch.findings.push(self.cannot_read(&path, &name, &error));
            }
        }
    }

    /// Reads one file again, if it is still there.
    fn refresh(&mut self, path: &Path, name: &Arc<str>, batch: &mut Batch) {
        let stamp = stamp(path);
        let text = match std::fs::read(path).and_then(utf8) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.replace(path, None, batch),
            Err(error) => return batch.findings.push(self.cannot_read(path, name, &error)),
        };
        self.unreadable.remove(path);
        let known = self.files.get_mut(path);
        if let Some(file) = known.filter(|file| text.is_empty() && !file.objects.is_empty() && !file.emptied) {
            file.emptied = true;
            file.stamp = None;
            return self.watcher.again(path.to_owned(), EMPTY);
        }
        if let Some(findings) = self.patch(path, &text, name, stamp, batch) {
            return batch.findings.extend(findings);
        }
        let empty = File::default();
        let (mut file, findings) = self.files.get(path).unwrap_or(&empty).reread(&text, name);
        file.stamp = stamp;
        batch.findings.extend(findings);
        self.replace(path, Some(file), batch);
    }

    /// Puts a file's new state in place and says what that changes.
    fn replace(&mut self, path: &Path, file: Option<File>, batch: &mut Batch) {
        let nothing = HashMap::new();
        let old = self.files.get(path).map_or(&nothing, |file| &file.objects);
        let new = file.as_ref().map_or(&nothing, |file| &file.objects);
        let same = |key: &ObjectKey| match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) => same_object(&old.object, &new.object),
            (old, new) => old.is_none() && new.is_none(),
        };
        let touched: BTreeSet<ObjectKey> = old.keys().chain(new.keys()).filter(|key| !same(key)).cloned().collect();
        if file.is_none() {
            self.unreadable.remove(path);
        }
        let said = |file: Option<&File>| file.map_or(0, |file| file.findings.len());
        batch.reread |= said(self.files.get(path)) + said(file.as_ref()) > 0;
        self.change(touched, batch, |files| {
            match file {
                Some(file) => files.insert(path.to_owned(), file),
                None => files.remove(path),
            };
        });
    }

    /// Changes a large file in place, so that the cost of one changed document is not that of all the others. `None`
    /// if that cannot be done.
    fn patch(
        &mut self,
        path: &Path,
        text: &str,
        name: &Arc<str>,
        stamp: Option<Stamp>,
        batch: &mut Batch,
    ) -> Option<Vec<Finding>> {
        let file = self.files.get(path)?;
        let old = file.order.as_ref()?;
        let documents: Vec<_> = documents::split(text).collect();
        let new: Vec<u64> = documents.iter().map(|document| hash(document.text)).collect();
        let head = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
        let tail = old[head..].iter().rev().zip(new[head..].iter().rev()).take_while(|(a, b)| a == b).count();
        let (gone, come) = (head..old.len() - tail, head..new.len() - tail);
        if gone.len().max(come.len()) > IN_PLACE {
            return None;
        }
        let forgotten: Vec<u64> = old[gone].to_vec();
        let removed: Vec<ObjectKey> = forgotten
            .iter()
            .filter_map(|hash| file.documents.get(hash))
            .flat_map(|(_, outcomes)| outcomes)
            .filter_map(|outcome| if let Outcome::Object(object, _) = outcome { Some(object.key()) } else { None })
            .collect();
        let mut findings = Vec::new();
        let mut added: BTreeMap<ObjectKey, Placed> = BTreeMap::new();
        let (mut fresh, mut noted) = (Vec::new(), Vec::new());
        for index in come {
            if file.documents.contains_key(&new[index]) {
                return None;
            }
            let (outcomes, found) = read::document(&documents[index], name);
            if !found.is_empty() {
                noted.push((new[index], found.clone()));
            }
            findings.extend(found);
            for outcome in &outcomes {
                let Outcome::Object(object, line) = outcome else { return None };
                let key = object.key();
                if file.objects.contains_key(&key) && !removed.contains(&key) {
                    return None;
                }
                let placed = Placed { object: object.clone(), file: Arc::clone(name), line: *line };
                if added.insert(key, placed).is_some() {
                    return None;
                }
            }
            fresh.push((new[index], (documents[index].line, outcomes)));
        }
        if fresh.iter().map(|(hash, _)| hash).collect::<BTreeSet<_>>().len() < fresh.len() {
            return None;
        }
        let touched = removed.iter().chain(added.keys()).cloned().collect();
        self.change(touched, batch, |files| {
            let Some(file) = files.get_mut(path) else { return };
            for hash in &forgotten {
                file.documents.remove(hash);
                file.findings.remove(hash);
            }
            file.findings.extend(noted);
            removed.iter().for_each(|key| drop(file.objects.remove(key)));
            file.documents.extend(fresh);
            file.objects.extend(added);
            file.order = Some(new);
            file.stamp = stamp;
            file.emptied = false;
        });
        Some(findings)
    }

    /// Makes an edit and says which of the touched resources it changes.
    fn change(
        &mut self,
        touched: BTreeSet<ObjectKey>,
        batch: &mut Batch,
        edit: impl FnOnce(&mut BTreeMap<PathBuf, File>),
    ) {
        batch.reread |= !touched.is_empty();
        let before: Vec<Option<Object>> =
            touched.iter().map(|key| self.winner(key).map(|p| p.object.clone())).collect();
        edit(&mut self.files);
        for (key, before) in touched.into_iter().zip(before) {
            let after = self.winner(&key);
            let change = match (&before, after) {
                (Some(before), Some(after)) if same_object(before, &after.object) => continue,
                (None, None) => continue,
                (_, Some(after)) => Change::Apply(after.object.clone()),
                (Some(_), None) => Change::Delete(key.clone()),
            };
            if let (Some(after), true) = (after, before.is_some())
                && let Some(other) =
                    self.files.values().filter_map(|file| file.objects.get(&key)).find(|p| p.file != after.file)
            {
                batch.findings.push(conflict::duplicate(other, after));
            }
            batch.changes.push(change);
        }
    }

    /// Of the files that hold a resource the last one counts.
    fn winner(&self, key: &ObjectKey) -> Option<&Placed> {
        self.files.values().rev().find_map(|file| file.objects.get(key))
    }
}

impl File {
    /// The state after the file became `text`, with what there is to say of documents that were not known.
    fn reread(&self, text: &str, name: &Arc<str>) -> (File, Vec<Finding>) {
        let mut file = File::default();
        let mut findings = Vec::new();
        let mut complete = true;
        let mut mesh_refused = false;
        let mut order = Vec::new();
        // Resources of documents that hold nothing else.
        let mut plain = 0;
        for document in documents::split(text) {
            let hash = hash(document.text);
            let known = self.documents.get(&hash);
            let mut said: Vec<Finding> = Vec::new();
            let (first, outcomes) = match known {
                Some((first, outcomes)) => (*first, outcomes.clone()),
                None => {
                    let (outcomes, found) = read::document(&document, name);
                    said.clone_from(&found);
                    findings.extend(found);
                    (document.line, outcomes)
                }
            };
            if known.is_some() {
                said.extend(self.findings.get(&hash).into_iter().flatten().cloned());
            }
            let mut good = true;
            for outcome in &outcomes {
                match outcome {
                    Outcome::Object(object, line) => {
                        let line = document.line.saturating_add(line.saturating_sub(first));
                        let placed = Placed { object: object.clone(), file: Arc::clone(name), line };
                        if let Some(earlier) = file.objects.get(&object.key()) {
                            let duplicate = conflict::duplicate(earlier, &placed);
                            if known.is_none() {
                                findings.push(duplicate.clone());
                            }
                            file.findings.entry(BETWEEN).or_default().push(duplicate);
                        }
                        file.objects.insert(object.key(), placed);
                    }
                    Outcome::Refused(key) => {
                        good = false;
                        if let Some(last_good) = self.objects.get(key) {
                            file.objects.entry(key.clone()).or_insert_with(|| last_good.clone());
                        }
                    }
                    Outcome::Mesh(Some(mesh)) => file.mesh = Some((**mesh).clone()),
                    Outcome::Mesh(None) => (good, mesh_refused) = (false, true),
                    Outcome::Unreadable => (good, complete) = (false, false),
                }
            }
            if good {
                plain += outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Object(..))).count();
                order.push(hash);
                file.documents.insert(hash, (first, outcomes));
                if !said.is_empty() {
                    file.findings.insert(hash, said);
                }
            } else {
                file.findings.entry(REFUSED).or_default().extend(said);
                plain = usize::MAX / 2;
            }
        }
        if !complete {
            for (key, last_good) in &self.objects {
                file.objects.entry(key.clone()).or_insert_with(|| last_good.clone());
            }
        }
        if file.mesh.is_none() && (mesh_refused || !complete) {
            file.mesh.clone_from(&self.mesh);
        }
        let distinct = plain == file.objects.len() && order.len() == file.documents.len() && file.mesh.is_none();
        file.order = distinct.then_some(order);
        (file, findings)
    }

    /// The resources in the order of their lines.
    fn in_order(&self) -> impl Iterator<Item = &Placed> {
        let mut objects: Vec<&Placed> = self.objects.values().collect();
        objects.sort_by_key(|placed| placed.line);
        objects.into_iter()
    }
}

fn text_has_refused_mesh(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.kind == "MeshConfig" && finding.severity == Severity::Error)
}

/// Objects of unchanged documents are the same allocation, which spares the comparison.
fn same_object(a: &Object, b: &Object) -> bool {
    match (a, b) {
        (Object::ServiceEntry(a), Object::ServiceEntry(b)) if Arc::ptr_eq(a, b) => true,
        _ => a == b,
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    // The last document of a file ends differently from the others.
    text.trim_end().hash(&mut hasher);
    hasher.finish()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

fn utf8(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

fn unreadable(name: &Arc<str>, error: &io::Error) -> Finding {
    read::about_file(name, "unreadable", Severity::Error, format!("cannot be read: {error}"))
}
