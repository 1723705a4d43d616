//! `portolan validate`

use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use portolan_controller::config::{documents, files};
use portolan_controller::discovery;
use portolan_controller::model::MeshConfig;
use portolan_controller::source::read::{self, Outcome};
use portolan_controller::validate::conflict::{self, Placed};
use portolan_controller::validate::finding::{Finding, Severity};
use portolan_controller::validate::sarif;

const LONG: &str = "\
Reads Istio resources from files, directories (*.yaml, *.yml and *.json, in depth) or standard input (-), and says \
what a cluster would say of them. YAML and JSON, several documents to a file, and lists are read; one bad document \
never hides the others.

Four gates speak:
  webhook   istiod's admission webhook. Its errors keep a resource from being applied, here too.
  schema    the API server with the CRD's schema, as a second opinion: fields it would drop or refuse.
  conflict  resources in each other's way: the same one twice, a host or a port that two claim, a route to nowhere,
            a wildcard that takes too much. docs/findings.md lists them.
  portolan  what a cluster would act on and Portolan does not, or otherwise than the field asks for.";

const EXAMPLES: &str = "\
Findings read
  FILE:LINE: SEVERITY[CODE] KIND NAMESPACE/NAME FIELD: MESSAGE (GATE)

Exit status: 0 clean or warnings only, 1 errors, 2 something could not be read.

Examples:
  portolan validate mesh-config/
  kubectl get serviceentries -A -o yaml | portolan validate -
  portolan validate --output sarif mesh-config/ > portolan.sarif
  portolan validate --output json --mesh mesh.yaml egress.yaml | jq 'select(.severity == \"error\")'";

/// Check Istio resources as a cluster would, before they get there
#[derive(Args)]
#[command(long_about = LONG, after_long_help = EXAMPLES, after_help = "See --help for the gates, the exit status and examples.")]
pub struct Validate {
    /// Files or directories, or - for standard input
    #[arg(required = true, value_name = "FILE|DIR|-")]
    paths: Vec<PathBuf>,
    /// Also check this file as Istio's MeshConfig
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// How to print findings
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// One line each, for people and editors
    Text,
    /// One JSON object a line: file, line, kind, namespace, name, field, gate, severity, code, message
    Json,
    /// One SARIF 2.1.0 document, for code hosts and editors
    Sarif,
}

impl Validate {
    /// Runs it; findings go to standard output, what could not be read to standard error.
    pub fn run(self) -> ExitCode {
        let out = BufWriter::new(io::stdout().lock());
        let mut report = Report { output: self.output, out, errors: false, kept: Vec::new() };
        let mut unreadable = false;
        let mut objects = Vec::new();
        let mut selectors = None;
        if let Some(mesh) = &self.mesh {
            match read_file(mesh) {
                Ok(text) => {
                    let (mesh, findings) = read::mesh(&text, &file_name(mesh));
                    selectors = mesh.map(|mesh| mesh.discovery_selectors);
                    report.print(findings);
                }
                Err(error) => unreadable |= complain(mesh, &error),
            }
        }
        for path in &self.paths {
            let files = match path.as_os_str() == "-" {
                true => Ok([path.clone()].into()),
                false => files::list(std::slice::from_ref(path)),
            };
            let files = match files {
                Ok(files) => files,
                Err((path, error)) => {
                    unreadable |= complain(&path, &error);
                    continue;
                }
            };
            for file in files {
                match read_file(&file) {
                    Ok(text) => {
                        let (found, mesh) = check(&text, &file_name(&file), &mut report);
                        objects.extend(found);
                        selectors = selectors.or(mesh.map(|mesh| mesh.discovery_selectors));
                    }
                    Err(error) => unreadable |= complain(&file, &error),
                }
            }
        }
        let (mut objects, duplicates) = conflict::deduplicate(objects);
        report.print(duplicates);
        report.print(discovery::leave(&mut objects, &selectors.unwrap_or_default()));
        report.print(conflict::between(&objects));
        report.finish();
        match (unreadable, report.errors) {
            (true, _) => ExitCode::from(2),
            (false, true) => ExitCode::from(1),
            (false, false) => ExitCode::SUCCESS,
        }
    }
}

/// Prints what there is to say of each document and hands back the objects that stand, and the mesh's settings if they
/// are among them.
fn check(text: &str, file: &Arc<str>, report: &mut Report<impl Write>) -> (Vec<Placed>, Option<MeshConfig>) {
    let mut objects = Vec::new();
    let mut mesh = None;
    for document in documents::split(text) {
        let (outcomes, findings) = read::document(&document, file);
        report.print(findings);
        objects.extend(outcomes.into_iter().filter_map(|outcome| match outcome {
            Outcome::Object(object, line) => Some(Placed { object, file: Arc::clone(file), line }),
            Outcome::Mesh(found) => {
                mesh = found.map(|found| *found).or(mesh.take());
                None
            }
            Outcome::Refused(_) | Outcome::Unreadable => None,
        }));
    }
    (objects, mesh)
}

fn read_file(path: &Path) -> io::Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path)
}

fn file_name(path: &Path) -> Arc<str> {
    Arc::from(path.to_string_lossy())
}

fn complain(path: &Path, error: &io::Error) -> bool {
    eprintln!("portolan: {}: {error}", path.display());
    true
}

struct Report<W> {
    output: Output,
    out: W,
    errors: bool,
    /// What a document of all findings waits for.
    kept: Vec<Finding>,
}

impl<W: Write> Report<W> {
    fn print(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            self.errors |= finding.severity == Severity::Error;
            // See `finish` on a reader that has gone away.
            let _ = match self.output {
                Output::Text => writeln!(self.out, "{finding}"),
                Output::Json => {
                    let line = serde_json::to_string(&finding).unwrap_or_default();
                    writeln!(self.out, "{line}")
                }
                Output::Sarif => {
                    self.kept.push(finding);
                    Ok(())
                }
            };
        }
    }

    fn finish(&mut self) {
        // A reader that has gone away (`| head`) wants no more; there is nobody left to tell.
        if matches!(self.output, Output::Sarif) {
            let log = serde_json::to_string_pretty(&sarif::log(&self.kept)).unwrap_or_default();
            let _ = writeln!(self.out, "{log}");
        }
        let _ = self.out.flush();
    }
}
